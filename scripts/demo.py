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
Results = dict[str, dict[int, dict]]  # method → seed → what its run left


def job(program: str, kind: str, run_dir: Path, settings: list[str]) -> Job:
    """A run whose own result is its record."""
    config = str(ROOT / "configs" / f"demo_{kind}.yaml")
    config = load_config(PROGRAMS[program], config, [f"run_dir={run_dir}", *settings])
    return Job(run_dir.name, program, config, record=run_dir / "result.json")


def run(jobs: list[Job], device: str, at_once: int) -> None:
    if failed := run_jobs(jobs, [device], at_once, retries=0):
        raise UserError("; ".join(f"{name}: {why}" for name, why in failed.items()))


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
    started, out = time.monotonic(), arguments.out
    what = "one network a task, four tasks of ten classes of drawn shapes, 82 shared numbers"
    print(f"1. meta-train a φ: {what}", flush=True)
    source = job("meta_train", "src", out / "src", arguments.src)
    run([source], ",".join([arguments.device] * min(arguments.jobs, source.config.tasks)), 1)
    losses = [line["test_loss"] for line in read_metrics(out / "src")]
    print(f"   the loss of its networks on images that they do not train on: {losses[0]:.2f} → {losses[-1]:.2f}")

    print(f"2. train networks on drawn bugs, without φ and with the φ that is shipped, {PHI}", flush=True)
    jobs = [
        job("meta_test", "tgt", out / f"{m}-seed{seed}", [f"method={m}", f"seed={seed}", *METHODS[m], *arguments.tgt])
        for m in reversed(METHODS)  # which begins with the longest ones
        for seed in range(arguments.seeds)
    ]
    run(jobs, arguments.device, arguments.jobs)

    folders = {m: {seed: out / f"{m}-seed{seed}" for seed in range(arguments.seeds)} for m in METHODS}
    results = {m: {seed: finished_result(path) for seed, path in of.items()} for m, of in folders.items()}
    table = results_table(results)
    write_atomically(out / "table.md", lambda file: file.write((table + "\n").encode()))
    histories = {m: [*map(read_metrics, of.values())] for m, of in folders.items()}
    plot_convergence(histories, "Drawn bugs (16 classes, few images of each)", out / "convergence.png")
    seconds = time.monotonic() - started
    print(f"\n{table}\n\n{meaning(results)}\n\nconvergence: {out / 'convergence.png'}   ({seconds:.0f} s in all)")


def results_table(results: Results) -> str:
    """Markdown: mean ± std over seeds, a row a way to predict."""
    rows = []
    for method, of_seeds in results.items():
        for kind in ("metrics", "one_pass"):
            if found := [result[kind] for result in of_seeds.values() if kind in result]:
                draws = found[0].get("samples", 1) if kind == "metrics" else 1
                name = "" if method == "base" else f", {draws} draws" if draws > 1 else ", one pass"
                numbers = [str(summarize([factor * one[key] for one in found])) for key, factor in METRICS.items()]
                rows.append([LABELS[method] + name, str(len(found)), *numbers])
    return markdown_table(["method", "seeds", "accuracy %", "NLL", "ECE %"], rows)


def meaning(results: Results) -> str:
    """Two sentences on what the table says, made from its numbers."""
    told, sure = [], []
    for key, unit, what in (
        ("accuracy", "points of accuracy", "the accuracy"),
        ("nll", "of NLL", "the NLL, that is how good the probabilities are,"),
    ):
        of_method = [{s: METRICS[key] * r["metrics"][key] for s, r in results[m].items()} for m in reversed(METHODS)]
        mean, low, high, _ = paired_difference(*of_method)
        interval = "" if low is None else f" (95 % interval {low:+.2f} to {high:+.2f})"
        told.append(f"{mean:+.2f} {unit}{interval}")
        if low is not None and low * high > 0:
            sure.append(what)
    says = f"the difference in {' and in '.join(sure)} is more than seeds make" if sure else "seeds can make all of it"
    return (
        f"The networks with φ differ from those without by {' and by '.join(told)}.\n"
        f"On these few drawn images {says}; results/README.md tells what φ does on photographs."
    )


if __name__ == "__main__":
    sys.exit(main())
