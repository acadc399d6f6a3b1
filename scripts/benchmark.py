"""Measure how fast everything is, and write it up: JSON, page and figures.

    ./run.sh bench                          # all suites on the CPU, or on the GPU where there is one
    ./run.sh bench --only bars,site         # some of them; the others in the JSON stay
    ./run.sh bench --resume                 # only what the JSON does not have yet
    ./run.sh bench --smoke                  # seconds: tiny sizes, which test the program and measure nothing

Suites: `bars` (the perturbed network beside the plain one, with the ratios to keep), `site` (one perturbation site),
`scaling` (tasks, processes, channels, image size, batch), `exchange` (the processes' collective; projection to very
many GPUs), `training` (whole trainings; on a GPU only).
"""

import argparse
import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from bench.bars import bars
from bench.exchange import exchange
from bench.figures import draw_figures
from bench.growth import scaling, site
from bench.page import write_page
from bench.training import training
from bench.workload import Bench

from metaperturb import kernels
from metaperturb.cli import Stopped, argument_parser, run_program
from metaperturb.errors import UserError
from metaperturb.provenance import available_cores, provenance
from metaperturb.storage import load_json, save_json, write_atomically

ROOT = Path(__file__).resolve().parent.parent
SUITES: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "bars": bars,
    "site": site,
    "scaling": scaling,
    "exchange": exchange,
    "training": training,
}
ROUNDS = {"cpu": 12, "cuda": 20}


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    return run_program(lambda: benchmark(arguments, argv), show_traceback=arguments.traceback)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--only", metavar="SUITE[,SUITE]", help=f"of {', '.join(SUITES)}")
    parser.add_argument("--device", metavar="cpu|cuda", help="default: cuda where there is one")
    parser.add_argument("--threads", type=int, help="CPU threads (default: 2; on a GPU one a core; smoke 1)")
    parser.add_argument("--rounds", type=int, help="turns of each variant (default: 12; on a GPU 20)")
    parser.add_argument("--resume", action="store_true", help="keep suites that the JSON has with these settings")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: results/benchmark/<device>.json")
    parser.add_argument("--page", type=Path, metavar="FILE", help="default: README.md beside the JSON")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="default: figures; beside the page if smoke")
    return parser.parse_args(argv)


def benchmark(arguments: argparse.Namespace, argv: list[str] | None = None) -> None:
    bench, wanted = checked(arguments)
    folder = ROOT / ("runs/benchmark-smoke" if bench.smoke else "results/benchmark")
    path = arguments.json or folder / f"{bench.device.type}.json"
    page = arguments.page or path.parent / "README.md"
    figures = arguments.figures or (page.parent if bench.smoke else ROOT / "figures")

    torch.set_num_threads(bench.threads)
    document = describe(bench)
    document["suites"] = earlier_suites(path, document)
    settings = {"threads": bench.threads, "rounds": bench.rounds}
    try:
        for name in wanted:
            if arguments.resume and document["suites"].get(name, {}).get("settings") == settings:
                print(f"{name}: kept", file=sys.stderr)
                continue
            print(f"{name}: measuring", file=sys.stderr, flush=True)
            started, load = time.monotonic(), os.getloadavg()[0]
            measured = SUITES[name](bench)
            seconds = time.monotonic() - started
            print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)
            entry = {
                "command": command(sys.argv[1:] if argv is None else argv),
                "date": datetime.now(UTC).date().isoformat(),
                "commit": provenance(bench.device)["commit"],
                "load_before": round(load, 2),
                "seconds": round(seconds, 1),
                "settings": settings,
                **measured,
            }
            suites = {**document["suites"], name: entry}
            document["suites"] = {known: suites[known] for known in SUITES if known in suites}
            save_json(document, path)
    except (KeyboardInterrupt, Stopped) as stop:
        raise UserError("stopped; with --resume, the same command keeps the suites that were measured") from stop
    save_json(document, path)
    write_up(path, page, figures, bench.smoke)
    print(f"{path}\n{page}")


def checked(arguments: argparse.Namespace) -> tuple[Bench, list[str]]:
    """Where and how to measure, and which suites, in their order.

    Raises:
        UserError: an unknown suite or device, or a number that makes no sense.
    """
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: expected cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; --device cpu works")
    smoke = arguments.smoke
    default = 1 if smoke else 2 if name == "cpu" else available_cores()
    threads = default if arguments.threads is None else arguments.threads
    rounds = (2 if smoke else ROUNDS[name]) if arguments.rounds is None else arguments.rounds
    if threads < 1:
        raise UserError(f"--threads {threads}: must be at least 1")
    if rounds < 2:
        raise UserError(f"--rounds {rounds}: must be at least 2")
    if arguments.only is None:
        wanted = [suite for suite in SUITES if suite != "training" or name == "cuda" or smoke]
    else:
        asked = [item.strip() for item in arguments.only.split(",")]
        for item in asked:
            if item not in SUITES:
                raise UserError(f"--only: unknown suite {item!r} (known: {', '.join(SUITES)})")
        wanted = [suite for suite in SUITES if suite in asked]
        if "training" in asked and name == "cpu" and not smoke:
            raise UserError("--only training: needs --device cuda (on a CPU it would take many hours)")
    return Bench(torch.device(name), threads, rounds, smoke), wanted


def describe(bench: Bench) -> dict[str, Any]:
    """What a result must share with another to stand in one file with it."""
    about = provenance(bench.device)
    hardware = {**about["hardware"], "gpus": torch.cuda.device_count() if bench.device.type == "cuda" else 0}
    document = {
        "smoke": bench.smoke,
        "device": bench.device.type,
        "hardware": hardware,
        "versions": about["versions"],
        "kernel": kernels.kernel_name(bench.device),
        "sizes": dataclasses.asdict(bench.sizes),
    }
    return json.loads(json.dumps(document))  # as it will be read again


def earlier_suites(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """The suites that `path` holds, if they were measured on such a machine, with such software, at such sizes."""
    if not path.exists():
        return {}
    earlier = load_json(path)
    if not isinstance(earlier, dict) or "suites" not in earlier:
        raise UserError(f"{path}: no result of this program; name another --json")
    changed = [key for key in document if earlier.get(key) != document[key]]
    if changed:
        print(f"{path.name}: measured with other {', '.join(changed)}; its suites are replaced", file=sys.stderr)
        return {}
    return earlier["suites"]


def command(argv: list[str]) -> str:
    """The command line, with files by their names alone."""
    shown = [Path(text).name if os.sep in text else text for text in argv]
    return shlex.join(["./run.sh", "bench", *shown])


def write_up(path: Path, page: Path, figures: Path, smoke: bool) -> None:
    """The page and the figures of all results that lie beside `path`."""
    documents, drawn = [], {}
    for file in sorted(path.parent.glob("*.json")):
        document = load_json(file)
        if not isinstance(document, dict) or "suites" not in document or document.get("smoke") != smoke:
            continue
        documents.append(document)
        for suite, figure in draw_figures(document, figures).items():
            drawn[document["device"], suite] = figure
    text = write_page(documents, drawn, page)
    write_atomically(page, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    sys.exit(main())
