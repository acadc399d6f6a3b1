"""The whole method on drawn images: meta-train a φ, train a network with and without one, print what was measured.

    ./run.sh demo                          # some four minutes on two CPU cores, nothing to download
    python scripts/demo.py --out runs/demo --seeds 5

Half a minute of meta-training shows how φ is made. The networks are then trained with the φ that comes with the
package: one of half a minute is no match for it. The demo starts the two training programs as anybody would, several
at once. Started again, it continues where it was.
"""

import argparse
import sys
import time
from pathlib import Path

from tables.grid import PROGRAMS
from tables.page import markdown_table
from tables.results import METRICS, paired_difference, summarize
from tables.runner import Job, run_jobs

from metaperturb.cli import argument_parser, run_program
from metaperturb.config import load_config
from metaperturb.errors import UserError
from metaperturb.plots import LABELS, plot_convergence
from metaperturb.runs import finished_result, read_metrics
from metaperturb.storage import write_atomically

ROOT = Path(__file__).resolve().parent.parent
PHI = "tiny_imagenet_resnet20"  # of the networks: the one that is shipped
METHODS = {"base": [], "metaperturb": [f"phi={PHI}"]}


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
    started, out, seeds = time.monotonic(), arguments.out, range(arguments.seeds)
    what = "one network a task, four tasks of ten classes of drawn shapes, 82 shared numbers"
    print(f"1. meta-train a φ: {what}", flush=True)
    source = job("meta_train", "src", out / "src", arguments.src)
    run([source], ",".join([arguments.device] * min(arguments.jobs, source.config.tasks)), 1)
    losses = [line["test_loss"] for line in read_metrics(out / "src")]
    print(f"   the loss of its networks on images that they do not train on: {losses[0]:.2f} → {losses[-1]:.2f}")

    print(f"2. train networks on drawn bugs, without φ and with the φ that is shipped, {PHI}", flush=True)
    folders = {method: [out / f"{method}-seed{seed}" for seed in seeds] for method in METHODS}
    jobs = [
        job("meta_test", "tgt", folder, [f"method={method}", f"seed={seed}", *METHODS[method], *arguments.tgt])
        for method in reversed(METHODS)  # which begins with the longest ones
        for seed, folder in enumerate(folders[method])
    ]
    run(jobs, arguments.device, arguments.jobs)

    table = results_table({method: [*map(finished_result, of)] for method, of in folders.items()})
    write_atomically(out / "table.md", lambda file: file.write((table + "\n").encode()))
    histories = {method: [*map(read_metrics, of)] for method, of in folders.items()}
    plot_convergence(histories, "Drawn bugs (16 classes, few images of each)", out / "convergence.png")
    seconds = time.monotonic() - started
    print(f"\n{table}\n\nThis is about a few drawn images; results/README.md tells what φ does on photographs.")
    print(f"convergence: {out / 'convergence.png'}   ({seconds:.0f} s in all)")


def job(program: str, kind: str, run_dir: Path, settings: list[str]) -> Job:
    """A run whose own result is its record."""
    config = str(ROOT / "configs" / f"demo_{kind}.yaml")
    config = load_config(PROGRAMS[program], config, [f"run_dir={run_dir}", *settings])
    return Job(run_dir.name, program, config, record=run_dir / "result.json")


def run(jobs: list[Job], device: str, at_once: int) -> None:
    if failed := run_jobs(jobs, [device], at_once, retries=0):
        raise UserError("; ".join(f"{name}: {why}" for name, why in failed.items()))


def results_table(results: dict[str, list[dict]]) -> str:
    """Markdown: mean ± std over seeds, a row a way to predict, and what φ changes."""
    rows, found = [], {}
    for method, of_seeds in results.items():
        for kind in (kind for kind in ("metrics", "one_pass") if kind in of_seeds[0]):
            one = found[method, kind] = [[factor * of[kind][key] for of in of_seeds] for key, factor in METRICS.items()]
            draws = of_seeds[0][kind].get("samples", 1)
            name = "" if method == "base" else f", {draws} draws" if kind == "metrics" else ", one pass"
            rows.append([LABELS[method] + name, str(len(of_seeds)), *(str(summarize(values)) for values in one)])
    pairs = zip(found["metaperturb", "metrics"], found["base", "metrics"], strict=True)
    differences = [str(paired_difference(dict(enumerate(ours)), dict(enumerate(base)))) for ours, base in pairs]
    rows.append(["draws − Base [95 % over paired seeds]", str(len(results["base"])), *differences])
    return markdown_table(["method", "seeds", "accuracy %", "NLL", "ECE %"], rows)


if __name__ == "__main__":
    sys.exit(main())
