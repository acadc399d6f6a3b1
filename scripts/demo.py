"""The whole method on drawn images: meta-train φ, train a network with and without it, print what was measured.

    ./run.sh demo                          # some ten minutes on two CPU cores, nothing to download
    python scripts/demo.py --out runs/demo --seeds 5

It starts the two training programs as anybody would, several at once; started again, it continues where it was.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tables.page import markdown_table
from tables.results import METRICS
from tables.runner import Job, run_jobs
from tables.statistics import summarize

from metaperturb.cli import PARENT, argument_parser, run_program
from metaperturb.config import MetaTestConfig, MetaTrainConfig, load_config
from metaperturb.errors import UserError
from metaperturb.plots import LABELS, plot_convergence
from metaperturb.runs import finished_result, read_metrics
from metaperturb.storage import write_atomically

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "demo_tgt.yaml"
METHODS = ("base", "metaperturb")


@dataclass(frozen=True)
class Cell:
    """One training run on the target."""

    method: str
    seed: int
    run_dir: Path

    def job(self, phi: Path, settings: list[str]) -> Job:
        own = [f"method={self.method}", f"seed={self.seed}", f"run_dir={self.run_dir}"]
        if self.method == "metaperturb":
            own.append(f"phi={phi}")
        return Job(
            id=self.run_dir.name,
            program="meta_test",
            arguments=["--config", str(CONFIG), "--set", *own, *settings],
            run_dir=self.run_dir,
            record=self.run_dir / "result.json",
            finish=lambda: None,  # the run's own result is the record
            steps=load_config(MetaTestConfig, str(CONFIG), settings).steps,
        )


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for runs, table and picture")
    parser.add_argument("--seeds", type=int, default=3, help="target trainings a method")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--device", default="cpu", help="'cpu' or a GPU number")
    parser.add_argument("--src", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the meta-training")
    parser.add_argument("--tgt", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the target trainings")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1")
    return run_program(lambda: demo(arguments), show_traceback=arguments.traceback)


def demo(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    out: Path = arguments.out
    source_run = out / "src"
    config = ROOT / "configs" / "demo_src.yaml"
    tasks = load_config(MetaTrainConfig, config, arguments.src).tasks
    devices = ",".join([arguments.device] * min(arguments.jobs, tasks))
    own = [f"run_dir={source_run}", f"gpus={devices}"]
    print("1. meta-train φ on the source: drawn shapes, 40 classes in 4 tasks", flush=True)
    command = [sys.executable, "-m", "metaperturb.meta_train", "--config", str(config), "--set", *own, *arguments.src]
    environment = {**os.environ, PARENT: str(os.getpid())}  # it ends when the demo is gone
    if subprocess.run(command, check=False, env=environment).returncode:
        raise UserError("the meta-training did not finish (see above); the same command resumes")

    print("2. train on the target, drawn bugs, with and without φ", flush=True)
    cells = [Cell(method, seed, out / f"{method}-seed{seed}") for seed in range(arguments.seeds) for method in METHODS]
    jobs = [cell.job(source_run / "phi.pt", arguments.tgt) for cell in cells]
    outcome = run_jobs("demo", jobs, [arguments.device], arguments.jobs, retries=0)
    if outcome.failed:
        raise UserError("; ".join(f"{name}: {why}" for name, why in outcome.failed.items()))
    if outcome.elsewhere:
        raise UserError(f"{out}: in use by another demo")

    table = results_table(cells)
    write_atomically(out / "table.md", lambda file: file.write((table + "\n").encode()))
    histories = {m: [read_metrics(cell.run_dir) for cell in cells if cell.method == m] for m in METHODS}
    title = "Embedded target (16 classes, 25 images each)"
    plot_convergence(histories, title, out / "convergence.png")
    print(f"\n{table}\n\nconvergence: {out / 'convergence.png'}   ({time.monotonic() - started:.0f} s in all)")


def results_table(cells: list[Cell]) -> str:
    """Markdown: mean ± std over seeds, a row a method."""
    rows = []
    for method in METHODS:
        metrics = [finished_result(str(cell.run_dir))["metrics"] for cell in cells if cell.method == method]
        numbers = [str(summarize([factor * m[key] for m in metrics])) for key, factor in METRICS.items()]
        rows.append([LABELS[method], str(len(metrics)), *numbers])
    return markdown_table(["method", "seeds", "accuracy %", "NLL", "ECE %"], rows)


if __name__ == "__main__":
    sys.exit(main())
