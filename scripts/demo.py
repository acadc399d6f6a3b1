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

from tables.page import markdown_table
from tables.results import METRICS
from tables.runner import Job, run_jobs
from tables.schema import PROGRAMS
from tables.statistics import paired_difference, summarize

from metaperturb.cli import argument_parser, run_program
from metaperturb.config import MetaTrainConfig, load_config
from metaperturb.errors import UserError
from metaperturb.plots import LABELS, plot_convergence
from metaperturb.runs import finished_result, read_metrics
from metaperturb.storage import write_atomically

ROOT = Path(__file__).resolve().parent.parent
SOURCE, TARGET = (ROOT / "configs" / f"demo_{program}.yaml" for program in ("src", "tgt"))
METHODS = ("base", "metaperturb")
PHI = "tiny_imagenet_resnet20"  # of the networks: the one that is shipped


Results = dict[str, dict[int, dict]]  # method → seed → what its run left


def job(program: str, config: Path, run_dir: Path, settings: list[str]) -> Job:
    """A run whose own result is its record."""
    config = load_config(PROGRAMS[program], config, [f"run_dir={run_dir}", *settings])
    return Job(run_dir.name, program, config, record=run_dir / "result.json")


def run(out: Path, jobs: list[Job], device: str, at_once: int) -> None:
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
    print(
        "1. meta-train a φ: one network a task, four tasks of ten classes of drawn shapes, 82 shared numbers",
        flush=True,
    )
    tasks = load_config(MetaTrainConfig, SOURCE, arguments.src).tasks
    devices = ",".join([arguments.device] * min(arguments.jobs, tasks))
    run(out, [job("meta_train", SOURCE, out / "src", arguments.src)], devices, 1)
    losses = [line["test_loss"] for line in read_metrics(out / "src")]
    print(f"   the loss of its networks on images that they do not train on: {losses[0]:.2f} → {losses[-1]:.2f}")

    print(f"2. train networks on drawn bugs, without φ and with the φ that is shipped, {PHI}", flush=True)
    longest_first = [(m, seed) for m in reversed(METHODS) for seed in range(arguments.seeds)]
    cells = {(m, seed): out / f"{m}-seed{seed}" for m, seed in longest_first}
    own = {"base": [], "metaperturb": [f"phi={PHI}"]}
    settings = {(m, seed): [f"method={m}", f"seed={seed}", *own[m], *arguments.tgt] for m, seed in cells}
    run(out, [job("meta_test", TARGET, cells[c], settings[c]) for c in cells], arguments.device, arguments.jobs)

    results = {m: {seed: finished_result(cells[of, seed]) for of, seed in cells if of == m} for m in METHODS}
    table = results_table(results)
    write_atomically(out / "table.md", lambda file: file.write((table + "\n").encode()))
    histories = {m: [read_metrics(cells[m, seed]) for seed in results[m]] for m in METHODS}
    plot_convergence(histories, "Drawn bugs (16 classes, few images of each)", out / "convergence.png")
    seconds = time.monotonic() - started
    print(f"\n{table}\n\n{meaning(results)}\n\nconvergence: {out / 'convergence.png'}   ({seconds:.0f} s in all)")


def results_table(results: Results) -> str:
    """Markdown: mean ± std over seeds, a row a way to predict."""
    rows = []
    for method, of_seeds in results.items():
        for kind in ("metrics", "one_pass"):
            found = [result[kind] for result in of_seeds.values() if kind in result]
            if not found:
                continue
            draws = found[0].get("samples", 1) if kind == "metrics" else 1
            name = LABELS[method] + ("" if method == "base" else f", {draws} draws" if draws > 1 else ", one pass")
            numbers = [str(summarize([factor * metrics[key] for metrics in found])) for key, factor in METRICS.items()]
            rows.append([name, str(len(found)), *numbers])
    return markdown_table(["method", "seeds", "accuracy %", "NLL", "ECE %"], rows)


def meaning(results: Results) -> str:
    """Two sentences on what the table says, made from its numbers."""
    told, sure = [], []
    for key, (factor, what) in {"accuracy": (100, "points of accuracy"), "nll": (1, "of NLL")}.items():
        of_method = [{s: factor * r["metrics"][key] for s, r in results[m].items()} for m in ("metaperturb", "base")]
        difference = paired_difference(*of_method)
        told.append(f"{difference.mean:+.2f} {what}")
        if difference.low is not None:
            told[-1] += f" (95 % interval {difference.low:+.2f} to {difference.high:+.2f})"
            if difference.low * difference.high > 0:
                sure.append("the accuracy" if key == "accuracy" else "the NLL, that is how good the probabilities are,")
    says = f"the difference in {' and in '.join(sure)} is more than seeds make" if sure else "seeds can make all of it"
    return (
        f"The networks with φ differ from those without by {' and by '.join(told)}.\n"
        f"On these few drawn images {says}; results/README.md tells what φ does on photographs."
    )


if __name__ == "__main__":
    sys.exit(main())
