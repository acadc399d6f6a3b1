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
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import bench
import torch
from bench import IMPORTS, PASSES, Bench, Groups, ratio
from matplotlib.ticker import EngFormatter
from tables.grid import slug
from tables.page import markdown_table

from metaperturb import kernels
from metaperturb.cli import argument_parser, run_program
from metaperturb.errors import UserError
from metaperturb.provenance import available_cores, provenance
from metaperturb.storage import save_json

ROOT = Path(__file__).resolve().parent.parent
PARTS: dict[str, Callable[[Bench], Groups]] = {
    part.__name__: part for part in (bench.start, bench.steps, bench.evaluation, bench.memory, bench.site)
}
ROUNDS = {"cpu": 12, "cuda": 20}


class Bar(NamedTuple):
    """A ratio to print, and the most it may be on a CPU and on a GPU; None: no bar."""

    what: str
    group: str
    numerator: str
    denominator: str
    cpu: float | None = None
    cuda: float | None = None


BARS = (
    Bar("import metaperturb / torch", "start", f"import {IMPORTS[1]}", f"import {IMPORTS[0]}", 1.15),
    Bar("import metaperturb.meta_test / torch", "start", f"import {IMPORTS[2]}", f"import {IMPORTS[0]}", 1.3),
    Bar("θ-step, float32", "steps", "perturbed, float32", "plain, float32", 1.25, 1.2),
    Bar("θ-step, bfloat16", "steps", "perturbed, bfloat16", "plain, bfloat16", 1.35),
    Bar("θ-step, channels-last", "steps", "perturbed, channels-last", "plain, channels-last", 1.4),
    Bar("θ-step, float32, plain operators", "steps", "perturbed, plain operators", "plain, float32"),
    Bar("meta-step of a task / two plain θ-steps", "steps", "meta-step", "two plain steps", 1.15, 1.3),
    Bar("joint step of ten tasks / two plain θ-steps each", "joint", "joint step", "two plain steps a task", 1.2),
    Bar("evaluation: 10 Monte-Carlo samples / 10 plain passes", "samples", "10 samples", "10 plain passes", 1.15, 1.2),
    Bar(
        "evaluation: a deterministic pass / a plain pass", "evaluation", "deterministic pass", "plain pass", 1.15, 1.15
    ),
    Bar("predict with 20 draws / 20 plain passes", "predict", "predict", "20 plain passes", 1.1, 1.1),
    Bar("peak memory of a θ-step", "memory", "perturbed", "plain", 1.3, 1.3),
    *(Bar(f"one site, {what}: plain operators / kernel", "site", f"{what}, plain", f"{what}, auto") for what in PASSES),
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
    how, wanted = checked(arguments), bench.chosen(arguments.only, PARTS)
    torch.set_num_threads(how.threads)
    about = provenance(how.device)
    hardware = about["hardware"]
    # A CPU's name may be as vague as "AMD EPYC": its vector instructions tell more.
    cpu = f"{hardware['cpu']} {torch.backends.cpu.get_cpu_capability()}"
    document: dict[str, Any] = {
        "smoke": arguments.smoke,
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "processor": hardware["device"] if how.device.type == "cuda" else cpu,
        **about,
        "kernel": kernels.kernel_name(how.device),
        "settings": {key: value for key, value in dataclasses.asdict(how).items() if key != "device"},
        "load_before": round(os.getloadavg()[0], 2),
    }
    started, groups = time.monotonic(), {}
    for name in wanted:
        print(f"{name}: measuring", file=sys.stderr, flush=True)
        groups |= PARTS[name](how)
    document |= {"seconds": round(time.monotonic() - started, 1), "ratios": ratios(groups, how), "groups": groups}
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
    sizes = bench.SMOKE if arguments.smoke else {"turn": 0.02 if name == "cpu" else 0.1}
    return Bench(torch.device(name), threads, rounds, **sizes)


def ratios(groups: Groups, how: Bench) -> list[dict[str, Any]]:
    """Those of `BARS` that were measured."""
    found = []
    for bar in BARS:
        if bar.group in groups:
            limit = getattr(bar, how.device.type)
            measured = ratio(groups[bar.group]["timings"], bar.numerator, bar.denominator)
            met = None if limit is None else measured["ratio"] <= limit
            found.append({"what": bar.what, "group": bar.group, **measured, "bar": limit, "met": met})
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
