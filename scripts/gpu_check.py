"""Try everything on a GPU once, in at most nine minutes: whether it works there, and how fast.

    ./run.sh gpu-check                          # GPU 0; NCCL on all
    ./run.sh gpu-check --only kernels,steps
    ./run.sh gpu-check --rehearse               # on the CPU: tiny sizes, which test this program and measure nothing

Parts, in the order of their value: `kernels` (compiled sites against plain operators, at a network's sizes), `steps` (a
θ-step with φ over one without it: with compiled sites, with plain operators, with the whole network compiled),
`meta_train` (φ's gradient beside the CPU's, and 10 tasks, 750 steps), `meta_test` (10,000 steps at 32 px), `nccl` (one
GPU, and meta-training on all) and `tests` (those that need a GPU).

Each part runs in a process of its own and has a share of the time that is left. One that fails, crashes or uses up its
time is recorded, with what it found until then, and the next goes on. The record, results/gpu/<GPU>.json, is written
after each part, and when the program is stopped.
"""

import argparse
import contextlib
import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from benchmark import SMOKE, Bench, chosen, learner, make_phi, ratio, theta_step
from tables.grid import slug

from metaperturb.cli import PARENT, argument_parser, run_program
from metaperturb.data import batches
from metaperturb.distributed import Group, parse_devices
from metaperturb.errors import UserError
from metaperturb.kernels import compiled, fused, kernel_name, trial, use_kernel
from metaperturb.meta_train import METRICS, joint_step
from metaperturb.provenance import provenance
from metaperturb.runs import read_metrics
from metaperturb.storage import load_json, save_json

ROOT = Path(__file__).resolve().parent.parent
GRACE = 8.0  # seconds in which a part that is asked to end may write what it has
TEST_FILES = ("kernels", "perturbation", "batches", "meta_train", "meta_test")
SHAPES = ((128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8))  # of ResNet20's sites
TINY = ("model=resnet8", "steps=3", "batch_size=8", "image_size=16")  # of a rehearsal


@dataclasses.dataclass
class Part:
    """What a part works with: its device, whether this is a rehearsal, and `found`, which `keep` writes down."""

    device: torch.device
    rehearse: bool
    path: Path
    found: dict[str, Any] = dataclasses.field(default_factory=dict)

    def keep(self, **found: Any) -> None:
        self.found |= found
        save_json(self.found, self.path)

    def run(self, program: str, *settings: str) -> None:
        """A program of the package: keeps its result."""
        config = ROOT / "configs" / ("src.yaml" if program == "meta_train" else "tgt.yaml")
        settings = (*settings, *(TINY if self.rehearse else ()), f"run_dir={self.path.with_suffix('')}")
        command = [sys.executable, "-m", f"metaperturb.{program}", "--config", str(config), "--set", *settings]
        if code := subprocess.call(command, env={**os.environ, PARENT: str(os.getpid())}, stdin=subprocess.DEVNULL):
            raise UserError(f"{shlex.join(command)} ended with exit code {code}")
        result = load_json(self.path.with_suffix("") / "result.json")
        self.keep(settings=settings, **{key: result.get(key) for key in ("metrics", "one_pass", "kernel", "processes")})


# --- the parts


def about(part: Part) -> None:
    """Hardware and versions; a machine without a GPU that works ends here."""
    part.keep(**provenance(part.device), gpus=torch.cuda.device_count(), cuda=torch.version.cuda)


def kernels(part: Part) -> None:
    """The relative errors of compiled sites at a network's sizes."""
    kernel, errors = fused if part.rehearse else compiled, {}
    for shape in [(4, 4, 4, 4)] if part.rehearse else SHAPES:
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
            key = f"{shape} {str(dtype).removeprefix('torch.')}"
            errors[key] = float(f"{trial.error_of(kernel, part.device, dtype, shape):.2g}")
            part.keep(errors=errors)
            if not errors[key] < tolerance:
                raise UserError(f"compiled sites differ from plain operators: {key}, relative error {errors[key]}")


def steps(part: Part) -> None:
    """Medians of θ-steps, and their ratios: first as they are, then of whole networks compiled."""
    sizes = SMOKE if part.rehearse else {"turn": 0.1}
    bench = Bench(part.device, threads=1, rounds=2 if part.rehearse else 20, **sizes)
    images, phi = bench.images(), make_phi(part.device)

    def whole(**options: Any) -> Callable[[], object]:
        task = learner(bench, images, phi, **options)
        task.model.compile(dynamic=False, disable=part.rehearse)
        return theta_step(task)

    variants = {
        "plain": theta_step(learner(bench, images, phi, plain=True)),
        "perturbed": theta_step(learner(bench, images, phi)),
        "plain operators": theta_step(learner(bench, images, phi), kernel="plain"),
    }
    part.keep(kernel=kernel_name(part.device))
    for further in ({}, {"plain network, compiled": {"plain": True}, "perturbed network, compiled": {}}):
        variants |= {name: whole(**options) for name, options in further.items()}
        timings = bench.time(variants)["timings"]
        ratios = {f"{name} / plain": ratio(timings, name, "plain") for name in timings if name != "plain"}
        part.keep(timings=timings, ratios=ratios)


def meta_train(part: Part) -> None:
    """φ's gradients of two joint steps beside those on the CPU, from the same draws; then a whole meta-training."""
    cpu, draw, draw_noise = torch.device("cpu"), batches.draw, torch.randn_like
    torch.randn_like = lambda h: draw_noise(h.cpu()).to(h.device)
    batches.draw = lambda batch, padding, device: tuple(t.to(device) for t in draw(batch, padding, cpu))
    torch.backends.cudnn.allow_tf32 = False
    with use_kernel("plain"):
        pairs = [*zip(gradients(part, part.device), gradients(part, cpu), strict=True)]
    part.keep(phi_gradient_error=[((here - there).norm() / there.norm()).item() for here, there in pairs])
    gpu = "cpu" if part.rehearse else "0"
    part.run("meta_train", "source=embedded", "tasks=10", "steps=750", f"gpus={gpu}", "checkpoint_every=1000")


def gradients(part: Part, device: torch.device) -> list[torch.Tensor]:
    """φ's gradient in each of two joint steps of two tasks, `[82]`."""
    bench = Bench(device, threads=1, rounds=1, **(SMOKE if part.rehearse else {"tasks": 2}))
    images, phi = bench.images(), make_phi(torch.device("cpu")).to(device)
    tasks = [learner(bench, images, phi, index=i) for i in range(bench.tasks)]
    optimizer, group = torch.optim.Adam(phi.parameters(), lr=1e-3), Group(0, 1, device)
    tables = [joint_step(i, tasks, phi, optimizer, group, tasks[0].config)[0].cpu() for i in range(2)]
    return [table[:, : -len(METRICS)].mean(dim=0) for table in tables]


def meta_test(part: Part) -> None:
    """A whole training with φ, evaluated on the way as the program's defaults have it."""
    gpu = "cpu" if part.rehearse else "0"
    more = ("image_size=32", "steps=10000", "final_samples=2" if part.rehearse else "final_samples=100")
    part.run("meta_test", "target=embedded", "phi=tiny_imagenet_resnet20", f"gpu={gpu}", *more)


def nccl(part: Part) -> None:
    """The collective of meta-training on one GPU; then a short meta-training on all of this machine."""
    backend = "gloo" if part.rehearse else "nccl"
    identity = {} if part.rehearse else {"device_id": part.device}
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **identity)
    received = torch.zeros(82, device=part.device)
    dist.all_gather_into_tensor(received, torch.arange(82.0, device=part.device))
    dist.destroy_process_group()
    part.keep(backend=backend, one=received.tolist() == [*range(82)])
    gpus = ["cpu"] * 2 if part.rehearse else [str(i) for i in range(torch.cuda.device_count())]
    tasks = 2 * len(gpus) + 1  # not as many on each
    if len(gpus) > 1:
        part.run("meta_train", "source=embedded", f"tasks={tasks}", "steps=20", f"gpus={','.join(gpus)}")


def tests(part: Part) -> None:
    """Those that need a GPU; on the CPU all are skipped."""
    files = [f"tests/test_{name}.py" for name in (("perturbation",) if part.rehearse else TEST_FILES)]
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-o", "addopts=", "-k", "gpu", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "src"})
    print(done.stdout, done.stderr, file=sys.stderr)
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", done.stdout.strip().rpartition("\n")[2])
    part.keep(counts={what: int(count) for count, what in counts}, failed=re.findall(r"(?m)^FAILED (\S+)", done.stdout))
    if done.returncode:
        raise UserError(f"pytest ended with exit code {done.returncode}")


SECONDS = {kernels: 100, steps: 120, meta_train: 100, meta_test: 100, nccl: 40, tests: 70}  # of nine minutes
PARTS = {part.__name__: part for part in SECONDS}


# --- the program


def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--only", metavar="PART[,PART]", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="at most (default: 9)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: results/gpu/<GPU>.json")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # what a part's process is started with
    arguments = parser.parse_args(argv)
    line = shlex.join(["./run.sh", "gpu-check", *(sys.argv[1:] if argv is None else argv)])
    work = (lambda: run_part(arguments)) if arguments.part else (lambda: check(arguments, line))
    return run_program(work, show_traceback=arguments.traceback, resumes=False)


def run_part(arguments: argparse.Namespace) -> None:
    device = parse_devices("cpu" if arguments.rehearse else "0", "gpu")[0]
    with use_kernel("auto"):
        {"about": about, **PARTS}[arguments.part](Part(device, arguments.rehearse, arguments.json))


def check(arguments: argparse.Namespace, command: str) -> None:
    end, asked = time.monotonic() + 60 * arguments.minutes, chosen(arguments.only, PARTS)
    with tempfile.TemporaryDirectory() as folder:
        document: dict[str, Any] = {"rehearsal": arguments.rehearse, "command": command}
        attempt("about", arguments, Path(folder), end - time.monotonic(), into=document)
        if document["outcome"] != "done":
            raise UserError(document["outcome"].removeprefix("failed: error: "))
        document |= {"date": datetime.now(UTC).date().isoformat(), "parts": {}}
        path = arguments.json or ROOT / "results" / "gpu" / f"{slug(document['hardware']['device'])}.json"
        for i, name in enumerate(asked):
            shares = [SECONDS[PARTS[other]] for other in asked[i:]]
            limit = (end - time.monotonic()) * shares[0] / sum(shares) - GRACE
            entry = document["parts"][name] = {"outcome": "no time left"}
            try:
                if limit > 0:
                    attempt(name, arguments, Path(folder), limit, into=entry)
            finally:
                document["verdict"] = verdict(document)
                save_json(document, path)
        print(path, file=sys.stderr)
    print(document["verdict"])


def attempt(name: str, arguments: argparse.Namespace, folder: Path, limit: float, into: dict[str, Any]) -> None:
    """Run one part in a process of its own; `into` gets its outcome, its seconds, and what it found."""
    kept, log, began = folder / f"{name}.json", folder / f"{name}.log", time.monotonic()
    command = [sys.executable, __file__, "--part", name, "--json", str(kept), *["--rehearse"] * arguments.rehearse]
    print(f"{name}: at most {limit:.0f} s", file=sys.stderr)
    with open(log, "w") as said:
        streams = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": said}
        environment = {**os.environ, PARENT: str(os.getpid())}
        child = subprocess.Popen(command, env=environment, **streams, start_new_session=True)
    into["outcome"] = "stopped"
    try:
        code = child.wait(limit)
        lines = log.read_text(errors="replace").strip().splitlines() or ["no message"]
        into["outcome"] = f"failed: {lines[-1]}" if code > 0 else "done"
        if code < 0:
            into["outcome"] = f"crashed: {signal.Signals(-code).name}"
        if code:
            into["log"] = lines[-20:]
    except subprocess.TimeoutExpired:
        into["outcome"] = "out of time"
    finally:
        for number, seconds in ((signal.SIGTERM, GRACE - 1), (signal.SIGKILL, 1)):  # and what it started
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(child.pid, number)
                child.wait(seconds)  # one that a driver holds cannot be ended
        into |= load_json(kept) if kept.exists() else {}
        if steps_done := read_metrics(folder / name):
            into["last"] = steps_done[-1]
        into["seconds"] = round(time.monotonic() - began, 1)
        print(f"{name}: {into['outcome']}", file=sys.stderr)


def verdict(document: dict[str, Any]) -> str:
    """One line: what φ costs here."""
    if document["rehearsal"]:
        return "A rehearsal: nothing here is a measurement."
    steps = document["parts"].get("steps", {})
    if (found := steps.get("ratios", {}).get("perturbed / plain")) is None:
        return "No verdict, as the part steps did not come to its ratio."
    spread = f"[{found['q1']:.2f}, {found['q3']:.2f}]"
    return f"A θ-step takes {found['ratio']:.2f} times as long with φ {spread}, its sites {steps['kernel']}."


if __name__ == "__main__":
    sys.exit(main())
