"""The whole method on drawn images: meta-train φ, train a network with and without it, print what was measured.

    ./run.sh demo                          # some seven minutes on two CPU cores, nothing to download
    python scripts/demo.py --out runs/demo --seeds 5

It starts the two training programs as anybody would, several at once; started again, it continues where it was.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from metaperturb.cli import PARENT, run_program
from metaperturb.config import MetaTestConfig, load_config
from metaperturb.errors import UserError
from metaperturb.plots import LABELS, plot_convergence
from metaperturb.runs import finished_result, read_metrics
from metaperturb.storage import write_atomically

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("base", "metaperturb")
METRICS = (("accuracy", 100, "accuracy %"), ("nll", 1, "NLL"), ("ece", 100, "ECE %"))


@dataclass
class Cell:
    """One training run on the target."""

    method: str
    seed: int
    run_dir: Path

    def command(self, phi: Path, settings: list[str]) -> list[str]:
        own = [f"method={self.method}", f"seed={self.seed}", f"run_dir={self.run_dir}"]
        if self.method == "metaperturb":
            own.append(f"phi={phi}")
        config = str(ROOT / "configs" / "demo_tgt.yaml")
        return [sys.executable, "-m", "metaperturb.meta_test", "--config", config, "--set", *own, *settings]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for runs, table and picture")
    parser.add_argument("--seeds", type=int, default=3, help="target trainings a method")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--device", default="cpu", help="'cpu' or a GPU number")
    parser.add_argument("--src", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the meta-training")
    parser.add_argument("--tgt", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the target trainings")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1")
    return run_program(lambda: demo(arguments), show_traceback=False)


def demo(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    out: Path = arguments.out
    devices = ",".join([arguments.device] * arguments.jobs)
    source_run = out / "src"
    config = str(ROOT / "configs" / "demo_src.yaml")
    own = [f"run_dir={source_run}", f"gpus={devices}"]
    print("1. meta-train φ on the source: drawn shapes, 40 classes in 4 tasks", flush=True)
    command = [sys.executable, "-m", "metaperturb.meta_train", "--config", config, "--set", *own, *arguments.src]
    if subprocess.run(command, check=False, env=child_environment()).returncode:
        raise UserError("the meta-training did not finish (see above); the same command resumes")

    print("2. train on the target, drawn bugs, with and without φ", flush=True)
    cells = [Cell(method, seed, out / f"{method}-seed{seed}") for seed in range(arguments.seeds) for method in METHODS]
    settings = [f"gpu={arguments.device}", *arguments.tgt]
    train_cells(cells, source_run / "phi.pt", settings, arguments.jobs)

    table = results_table(cells)
    write_atomically(out / "table.md", lambda file: file.write((table + "\n").encode()))
    histories = {m: [read_metrics(cell.run_dir) for cell in cells if cell.method == m] for m in METHODS}
    title = "Embedded target (16 classes, 25 images each)"
    plot_convergence(histories, title, out / "convergence.png")
    print(f"\n{table}\n\nconvergence: {out / 'convergence.png'}   ({time.monotonic() - started:.0f} s in all)")


def train_cells(cells: list[Cell], phi: Path, settings: list[str], jobs: int) -> None:
    """Run all cells, `jobs` at a time; the first failure stops the others."""
    steps = load_config(MetaTestConfig, str(ROOT / "configs" / "demo_tgt.yaml"), settings).steps
    waiting = list(cells)
    running: dict[subprocess.Popen, Cell] = {}
    with tqdm(total=steps * len(cells), unit="step", disable=not sys.stderr.isatty()) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    cell = waiting.pop(0)
                    cell.run_dir.mkdir(parents=True, exist_ok=True)
                    with open(cell.run_dir / "log.txt", "w") as log:
                        process = subprocess.Popen(
                            cell.command(phi, settings), stdout=log, stderr=log, env=child_environment()
                        )
                    running[process] = cell
                time.sleep(0.5)
                bar.n = sum(last_step(cell) for cell in cells)
                bar.refresh()
                for process, cell in [*running.items()]:
                    if process.poll() is None:
                        continue
                    del running[process]
                    log_lines = (cell.run_dir / "log.txt").read_text().strip().splitlines() or ["no output"]
                    if process.returncode:
                        raise UserError(f"{cell.run_dir}: {log_lines[-1].removeprefix('error: ')}")
                    tqdm.write(f"   {log_lines[-1]}")
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()


def child_environment() -> dict[str, str]:
    """Lets the programs end when the demo is gone."""
    return {**os.environ, PARENT: str(os.getpid())}


def last_step(cell: Cell) -> int:
    history = read_metrics(cell.run_dir)
    return history[-1]["step"] if history else 0


def results_table(cells: list[Cell]) -> str:
    """Markdown: mean ± std over seeds, a row a method."""
    rows = ["| method | seeds | " + " | ".join(name for _, _, name in METRICS) + " |", "|---|---|---|---|---|"]
    for method in METHODS:
        results = [finished_result(str(cell.run_dir)) for cell in cells if cell.method == method]
        columns = [f"{LABELS[method]}", str(len(results)), *summaries([r["metrics"] for r in results])]
        rows.append("| " + " | ".join(columns) + " |")
    return "\n".join(rows)


def summaries(metrics: list[dict[str, float]]) -> Iterator[str]:
    for key, factor, _ in METRICS:
        values = [factor * m[key] for m in metrics]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        yield f"{statistics.mean(values):.2f}{spread}"


if __name__ == "__main__":
    sys.exit(main())
