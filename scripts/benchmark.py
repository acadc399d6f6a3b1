"""Measure what φ costs: the perturbed network beside the plain one, as ratios with their bars, and the times behind.

    ./run.sh bench                            # minutes on two CPU cores; on the GPU where there is one
    ./run.sh bench --only steps,memory        # some parts
    ./run.sh bench --smoke                    # seconds: tiny sizes, which test the program and measure nothing

Parts: `start` (imports), `steps` (θ-steps in float32, bfloat16 and channels-last, meta-steps, joint steps of tasks),
`evaluation` (Monte-Carlo samples, a deterministic pass, `predict`), `memory`, `site` (one site alone).
The table is printed, in Markdown; a whole run goes into results/benchmark/, a JSON for each kind of processor.

Variants take turns within one run, after a warm-up, and every round begins with another one. A time is the median of
the rounds; a ratio is that of the medians, its quartiles those of the ratios of single rounds. Images are noise.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.ticker import EngFormatter
from tables.grid import slug
from tables.page import markdown_table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from metaperturb import kernels, models
from metaperturb.attach import attach, detach
from metaperturb.cli import argument_parser, run_program
from metaperturb.config import MetaTrainConfig
from metaperturb.data.arrays import from_memory
from metaperturb.data.batches import DeviceImages, normalize
from metaperturb.data.splits import TaskSplit
from metaperturb.distributed import Group
from metaperturb.errors import UserError
from metaperturb.meta_train import Task, joint_step
from metaperturb.perturbation import MetaPerturb, PerturbSite
from metaperturb.prediction import log_prediction, make_deterministic, predict
from metaperturb.provenance import available_cores, provenance
from metaperturb.storage import save_json

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 20  # of a task: 200 classes of Tiny ImageNet in 10 tasks (section 4.1)
FORMATS = ("float32", "bfloat16", "channels-last")
PASSES = ("forward", "with gradient of h", "with gradient of h and φ")  # of a site
IMPORTS = ("torch", "metaperturb", "metaperturb.meta_test")
QUARTILES = (0.25, 0.5, 0.75)
WARM_UP = {"cpu": 2, "cuda": 10}  # calls; the first ones compile, tune and fill caches

Groups = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Bench:
    """Where, how long and at which sizes to measure."""

    device: torch.device
    threads: int
    rounds: int  # turns of each variant
    turn: float = 0.02  # seconds: a cheap variant is repeated until a turn lasts as long
    model: str = "resnet20"
    batch: int = 128
    image_size: int = 32
    eval_batch: int = 500  # the program's default
    tasks: int = 10
    site: tuple[int, int, int, int] = (128, 16, 32, 32)  # [B, C, H, W], ResNet20's first

    def time(self, variants: Mapping[str, Callable[[], object]], share: float = 1.0) -> dict[str, Any]:
        """Time variants in turns, so that whatever else the machine does meets all of them alike.

        Every round begins with another one; a variant is called as often in one turn as fills about `turn` seconds.
        There is this share of the rounds, for costly variants. Returns of each the `summary` of the seconds a call, one
        value a round, and `calls`, how many a turn had.
        """
        calls, names = {}, [*variants]
        for name, call in variants.items():
            once = [seconds_a_call(call, 1, self.device) for _ in range(1 + WARM_UP[self.device.type])]
            calls[name] = max(1, math.ceil(self.turn / once[-1]))
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for round_ in range(max(2, round(share * self.rounds))):
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(seconds_a_call(variants[name], calls[name], self.device))
        return {"unit": "s", "timings": {name: {**summary(seconds[name]), "calls": calls[name]} for name in names}}

    def images(self, count: int = 2000) -> DeviceImages:
        """Noise: what is in an image does not change how long it takes."""
        shape, labels = (count, 3, self.image_size, self.image_size), np.arange(count) % CLASSES
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        return DeviceImages(from_memory("noise", pixels, labels, [*map(str, range(CLASSES))]), self.device)


# Tiny sizes, which test the program and measure nothing.
SMOKE = {"model": "resnet8", "batch": 8, "image_size": 16, "eval_batch": 8, "tasks": 2, "turn": 0.0, "site": (4,) * 4}


def chosen(only: str | None, parts: Mapping[str, Any]) -> list[str]:
    """The parts that `--only` names, in their order; all without it."""
    asked = [*parts] if only is None else [item.strip() for item in only.split(",")]
    for item in asked:
        if item not in parts:
            raise UserError(f"--only: unknown part {item!r} (known: {', '.join(parts)})")
    return [part for part in parts if part in asked]


# --- what is timed


def make_phi(device: torch.device) -> MetaPerturb:
    torch.manual_seed(0)
    return MetaPerturb().to(device)


def learner(
    bench: Bench, images: DeviceImages, phi: MetaPerturb, *, plain: bool = False, form: str = "float32", index: int = 0
) -> Task:
    """A task of the meta-training program.

    `plain`: without the perturbation; everything else, data and optimizer too, is the same code.
    """
    half, precision = len(images.arrays) // 2, "bfloat16" if form == "bfloat16" else "float32"
    split = TaskSplit(np.arange(CLASSES), np.arange(half), np.arange(half, 2 * half))
    sizes = {"model": bench.model, "batch_size": bench.batch, "image_size": bench.image_size, "tasks": bench.tasks}
    task = Task(index, split, images, phi, MetaTrainConfig(precision=precision, **sizes))
    if plain:
        detach(task.model)
    if form == "channels-last":
        task.model.to(memory_format=torch.channels_last)
    return task


def theta_step(task: Task, kernel: str = "auto") -> Callable[[], object]:
    """A step of a task's network, the next one with each call."""
    steps = itertools.count()

    def step() -> object:
        with kernels.use_kernel(kernel):
            return task.theta_step(next(steps))

    return step


def start(bench: Bench) -> Groups:
    """Seconds in which a fresh interpreter imports PyTorch, the package, and the program of meta-testing."""
    seconds: dict[str, list[float]] = {f"import {name}": [] for name in IMPORTS}
    for round_ in range(max(2, bench.rounds // 3) + 1):
        for statement, measured in seconds.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True)
            if round_:  # the first one reads files that the others find in memory
                measured.append(time.perf_counter() - began)
    return {"start": {"unit": "s", "timings": {name: summary(measured) for name, measured in seconds.items()}}}


def steps(bench: Bench) -> Groups:
    """θ-steps without and with φ (frozen) in three formats; a task's meta-step, and a joint step of all tasks."""
    images, phi = bench.images(), make_phi(bench.device)
    variants, counter, group = {}, itertools.count(), Group(0, 1, bench.device)
    for form in FORMATS:
        variants[f"plain, {form}"] = theta_step(learner(bench, images, phi, plain=True, form=form))
        variants[f"perturbed, {form}"] = theta_step(learner(bench, images, phi, form=form))
    variants["perturbed, plain operators"] = theta_step(learner(bench, images, phi), kernel="plain")
    plain, perturbed = theta_step(learner(bench, images, phi, plain=True)), learner(bench, images, phi)

    def plain_steps(count: int) -> Callable[[], object]:
        return lambda: [plain() for _ in range(count)]

    def meta_step() -> object:
        """What a task does in one step of meta-training: its θ-step, then its gradient of φ."""
        step = next(counter)
        return perturbed.theta_step(step), perturbed.phi_gradient(step)

    variants |= {"two plain steps": plain_steps(2), "meta-step": meta_step}
    tasks = [learner(bench, images, phi, index=i) for i in range(bench.tasks)]
    optimizer = torch.optim.Adam(phi.parameters(), lr=1e-3, weight_decay=5e-4, fused=True)
    both = {
        "two plain steps a task": plain_steps(2 * bench.tasks),
        "joint step": lambda: joint_step(next(counter), tasks, phi, optimizer, group, tasks[0].config),
    }
    return {"steps": bench.time(variants), "joint": bench.time(both, share=0.25)}


def evaluation(bench: Bench) -> Groups:
    """A pass over a batch as `evaluate` makes it, plain and deterministic; its Monte-Carlo samples; and `predict`."""
    x = normalize(bench.images(bench.eval_batch).take(torch.arange(bench.eval_batch, device=bench.device))[0])
    few, phi = x[: max(2, bench.eval_batch // 10)], make_phi(bench.device).requires_grad_(False)
    plain, perturbed, deterministic = (
        models.create(bench.model, CLASSES, bench.image_size).to(bench.device).eval() for _ in range(3)
    )
    for model in (perturbed, deterministic):
        attach(model, phi, bench.image_size, paper=True, verbose=False)
    make_deterministic(deterministic, [x])

    def passes(model: torch.nn.Module, images: Tensor, count: int = 1) -> Callable[[], object]:
        return torch.no_grad()(lambda: [model(images).log_softmax(dim=1) for _ in range(count)])

    once = {"plain pass": passes(plain, x), "deterministic pass": passes(deterministic, x)}
    samples = {"10 plain passes": passes(plain, x, 10), "10 samples": lambda: log_prediction(perturbed, x, samples=10)}
    draws = {"20 plain passes": passes(plain, few, 20), "predict": lambda: predict(perturbed, few, samples=20)}
    return {
        "evaluation": bench.time(once),
        "samples": bench.time(samples, share=0.25),
        "predict": bench.time(draws, share=0.25),
    }


def memory(bench: Bench) -> Groups:
    """Peak memory of a θ-step: parameters, buffers and optimizer, and the most that a step adds to them."""
    images, timings = bench.images(), {}
    for name, plain in (("plain", True), ("perturbed", False)):
        task = learner(bench, images, make_phi(bench.device), plain=plain)
        step = theta_step(task)
        for _ in range(WARM_UP[bench.device.type]):
            step()
        task.optimizer.zero_grad(set_to_none=True)
        held = [*task.model.parameters(), *task.model.buffers()]
        for state in task.optimizer.state.values():
            held += [value for value in state.values() if isinstance(value, Tensor)]
        timings[name] = summary([float(peak_memory(step, bench.device) + sum(tensor.nbytes for tensor in held))])
    return {"memory": {"unit": "bytes", "timings": timings}}


def site(bench: Bench) -> Groups:
    """One site alone in training mode: forward, backward to the feature map, and to φ as well."""
    phi = make_phi(bench.device)
    perturb = PerturbSite(phi, channels=bench.site[1], size_norm=bench.site[2]).to(bench.device).train()
    h, upstream = torch.randn(bench.site, device=bench.device), torch.randn(bench.site, device=bench.device)

    def call(kernel: str, what: str) -> Callable[[], object]:
        learns_phi = what == PASSES[2]

        def run() -> None:
            phi.requires_grad_(learns_phi)
            leaf = h.detach().requires_grad_(what != PASSES[0])
            with kernels.use_kernel(kernel):
                out = perturb(leaf)
                if out.requires_grad:
                    torch.autograd.grad(out, [leaf, *phi.parameters()] if learns_phi else leaf, upstream)

        return run

    variants = {f"{what}, {kernel}": call(kernel, what) for what in PASSES for kernel in ("auto", "plain")}
    return {"site": bench.time({**variants, "noise alone": lambda: torch.randn_like(h)})}


# --- how


def seconds_a_call(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Mean of `calls` calls one after another; the device is waited for before and after."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rounded(values: Any, digits: int = 5) -> list[float]:
    """To so many significant digits."""
    return [float(f"{value:.{digits}g}") for value in values]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles, least and number of the values, and the values; all from the rounded ones."""
    values = rounded(values)
    q1, median, q3 = rounded(np.quantile(values, QUARTILES))
    return {"median": median, "q1": q1, "q3": q3, "min": min(values), "n": len(values), "rounds": values}


def ratio(timings: Mapping[str, Mapping[str, Any]], numerator: str, denominator: str) -> dict[str, Any]:
    """Ratio of the medians, and quartiles of the ratios of the single rounds."""
    above, below = timings[numerator], timings[denominator]
    q1, _, q3 = np.quantile(np.divide(above["rounds"], below["rounds"]), QUARTILES)
    found = rounded([above["median"] / below["median"], q1, q3])
    return {"numerator": numerator, "denominator": denominator, **dict(zip(("ratio", "q1", "q3"), found, strict=True))}


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors that are alive at once during `call`, above those alive before it.

    CUDA: PyTorch's own count of allocated bytes. CPU: the running sum of all allocations and releases of PyTorch's
    allocator, as its profiler records them; what was allocated before and is released during the call does not count,
    nor does memory that a library takes for itself.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would remark on missing GPUs
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    # Backward passes allocate in threads of their own.
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return max(itertools.accumulate(changes, initial=0))


# --- the program


PARTS: dict[str, Callable[[Bench], Groups]] = {part.__name__: part for part in (start, steps, evaluation, memory, site)}
ROUNDS = {"cpu": 12, "cuda": 20}
# What is printed, of which group, numerator, denominator; the most it may be on a CPU and on a GPU.
BARS = (
    ("import metaperturb / torch", "start", f"import {IMPORTS[1]}", f"import {IMPORTS[0]}", 1.15),
    ("import metaperturb.meta_test / torch", "start", f"import {IMPORTS[2]}", f"import {IMPORTS[0]}", 1.3),
    ("θ-step, float32", "steps", "perturbed, float32", "plain, float32", 1.25, 1.2),
    ("θ-step, bfloat16", "steps", "perturbed, bfloat16", "plain, bfloat16", 1.35),
    ("θ-step, channels-last", "steps", "perturbed, channels-last", "plain, channels-last", 1.4),
    ("θ-step, float32, plain operators", "steps", "perturbed, plain operators", "plain, float32"),
    ("meta-step of a task / two plain θ-steps", "steps", "meta-step", "two plain steps", 1.15, 1.3),
    ("joint step of ten tasks / two plain θ-steps each", "joint", "joint step", "two plain steps a task", 1.2),
    ("evaluation: 10 Monte-Carlo samples / 10 plain passes", "samples", "10 samples", "10 plain passes", 1.15, 1.2),
    ("evaluation: a deterministic pass / a plain pass", "evaluation", "deterministic pass", "plain pass", 1.15, 1.15),
    ("predict with 20 draws / 20 plain passes", "predict", "predict", "20 plain passes", 1.1, 1.1),
    ("peak memory of a θ-step", "memory", "perturbed", "plain", 1.3, 1.3),
    *((f"one site, {what}: plain operators / kernel", "site", f"{what}, plain", f"{what}, auto") for what in PASSES),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--only", metavar="PART[,PART]", help=f"of {', '.join(PARTS)}; nothing is kept but --json")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--threads", type=int, help="CPU threads (default: 2; on a GPU one a core; smoke 1)")
    parser.add_argument("--rounds", type=int, help="turns of each variant (default: 12; on a GPU 20; smoke 2)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: results/benchmark/<processor>.json")
    arguments = parser.parse_args(argv)
    line = shlex.join(["./run.sh", "bench", *(sys.argv[1:] if argv is None else argv)])
    return run_program(lambda: benchmark(arguments, line), show_traceback=arguments.traceback)


def benchmark(arguments: argparse.Namespace, command: str) -> None:
    bench, wanted = checked(arguments), chosen(arguments.only, PARTS)
    torch.set_num_threads(bench.threads)
    about = provenance(bench.device)
    hardware = about["hardware"]
    # A CPU's name may be as vague as "AMD EPYC": its vector instructions tell more.
    cpu = f"{hardware['cpu']} {torch.backends.cpu.get_cpu_capability()}"
    document: dict[str, Any] = {
        "smoke": arguments.smoke,
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "processor": hardware["device"] if bench.device.type == "cuda" else cpu,
        **about,
        "kernel": kernels.kernel_name(bench.device),
        "settings": {key: value for key, value in dataclasses.asdict(bench).items() if key != "device"},
        "load_before": round(os.getloadavg()[0], 2),
    }
    started, groups = time.monotonic(), {}
    for name in wanted:
        print(f"{name}: measuring", file=sys.stderr, flush=True)
        groups |= PARTS[name](bench)
    document |= {"seconds": round(time.monotonic() - started, 1), "ratios": ratios(groups, bench), "groups": groups}
    print(page(document))
    path = arguments.json
    if path is None and not (arguments.smoke or arguments.only):
        path = ROOT / "results" / "benchmark" / f"{slug(document['processor'])}.json"
    if path is not None:
        save_json(document, path)
        print(path, file=sys.stderr)


def checked(arguments: argparse.Namespace) -> Bench:
    """Where and how to measure; refuses what makes no sense."""
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; --device cpu works")
    default = 1 if arguments.smoke else 2 if name == "cpu" else available_cores()
    threads = default if arguments.threads is None else arguments.threads
    rounds = (2 if arguments.smoke else ROUNDS[name]) if arguments.rounds is None else arguments.rounds
    for option, number, least in (("threads", threads, 1), ("rounds", rounds, 2)):
        if number < least:
            raise UserError(f"--{option} {number}: must be at least {least}")
    sizes = SMOKE if arguments.smoke else {"turn": 0.02 if name == "cpu" else 0.1}
    return Bench(torch.device(name), threads, rounds, **sizes)


def ratios(groups: Groups, bench: Bench) -> list[dict[str, Any]]:
    """Those of `BARS` that were measured."""
    found = []
    for what, group, numerator, denominator, *most in (bar for bar in BARS if bar[1] in groups):
        limit = dict(zip(("cpu", "cuda"), most, strict=False)).get(bench.device.type)
        measured = ratio(groups[group]["timings"], numerator, denominator)
        met = None if limit is None else measured["ratio"] <= limit
        found.append({"what": what, "group": group, **measured, "bar": limit, "met": met})
    return found


def page(document: Mapping[str, Any]) -> str:
    """Markdown: the circumstances, the ratios, and the times."""
    hardware, versions, settings = document["hardware"], document["versions"], document["settings"]
    size = settings["image_size"]
    facts = [f"`{document['command']}`", document["date"], f"commit {document['commit'] or 'unknown'}"]
    facts += [f"{hardware['cores']} cores", f"{settings['threads']} threads", f"{settings['rounds']} rounds"]
    facts += [f"load before {document['load_before']}", f"took {quantity(document['seconds'], 's')}"]
    facts += [f"Python {versions['python']}", f"PyTorch {versions['torch']}", f"kernel {document['kernel']}"]
    facts += [f"{settings['model']}, batch {settings['batch']} (evaluation {settings['eval_batch']}), {size} × {size}"]
    rows = []
    for found in document["ratios"]:
        spread = "exact" if found["group"] == "memory" else f"{found['q1']:.2f} – {found['q3']:.2f}"
        verdict = ["–", "–"] if found["bar"] is None else [f"≤ {found['bar']:g}", "yes" if found["met"] else "**no**"]
        rows.append([found["what"], f"{found['ratio']:.2f}", spread, *verdict])
    times = []
    for group, of in document["groups"].items():
        for name, timing in of["timings"].items():
            median, *quartiles = (quantity(timing[key], of["unit"]) for key in ("median", "q1", "q3"))
            times.append([group, name, median, " – ".join(quartiles) if timing["n"] > 1 else "–"])
    warning = "**A smoke run: tiny sizes, which test the program. Nothing here is a measurement.**"
    return "\n\n".join(
        [
            f"## {document['processor']}",
            *([warning] if document["smoke"] else []),
            "; ".join(facts) + ".",
            markdown_table(["perturbed / plain, where nothing else is said", "ratio", "quartiles", "bar", "met"], rows),
            markdown_table(["part", "variant", "median", "quartiles"], times),
        ]
    )


def quantity(value: float, unit: str) -> str:
    """Seconds or bytes with three digits, in a unit that suits their size."""
    return EngFormatter({"s": "s", "bytes": "B"}[unit])(float(f"{value:.3g}"))


if __name__ == "__main__":
    sys.exit(main())
