"""Choose the best of several meta-trained φ on validation images, as the paper did (section 4.1).

    SEED="0 1 2 3 4" ./run.sh src       # five meta-trainings
    ./run.sh select                     # of all finished ones in runs/; or name them: ./run.sh select runs/src-…
    ./run.sh select --report            # no training, no choice: the page of the choice that was made

Each φ trains networks on s-CIFAR100, which are evaluated on images of CIFAR-100 that are in neither its training nor
its test set. The best mean accuracy wins. The chosen φ is copied to --out, its card extended by the evidence, which
also stands in results/select/. Further options are those of the tables (`./run.sh table1 --help`).
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metaperturb.cli import run_program
from metaperturb.config import MetaTrainConfig
from metaperturb.errors import UserError
from metaperturb.identity import differences
from metaperturb.storage import load_json, save_json
from metaperturb.weights import load_phi, save_phi
from tables.grid import Grid
from tables.results import Results, read_all, take_recorded
from tables.statistics import summarize
from tables.trainings import ROOT, grid_parser, overrides, results_folder, run_grid, write_table


def main(argv: Sequence[str] | None = None) -> int:
    parser = grid_parser(__doc__)
    parser.add_argument("sources", type=Path, nargs="*", help="run folders of meta-trainings [runs/src-*]")
    parser.add_argument("--out", type=Path, help="where the chosen φ goes [<runs>/selected/phi.pt]")
    parser.add_argument("--grid", type=Path, default=ROOT / "configs" / "select.yaml", help="how each φ is tried")
    arguments = parser.parse_intermixed_args(argv)  # options may stand before, between and behind the folders
    return run_program(lambda: select(arguments), show_traceback=arguments.traceback)


def select(arguments: argparse.Namespace) -> None:
    if arguments.report and not arguments.sources:
        grid = Grid(arguments.grid, arguments.preset, overrides(arguments))
        folder = results_folder(grid, arguments)
        take_rows(grid, folder)
        print(f"{write_table(grid, folder, arguments.runs)}: of the choice that is recorded", file=sys.stderr)
        return
    folders = arguments.sources or [path for path in sorted(arguments.runs.glob("src-*")) if (path / "phi.pt").exists()]
    if len(folders) < 2:
        raise UserError(f'needs two or more finished meta-trainings, found {len(folders)} (SEED="0 1 …" ./run.sh src)')
    sources = {folder.absolute().name: folder / "phi.pt" for folder in folders}
    if no_run := [str(folder) for folder in folders if not (folder / "phi.pt").is_file()]:
        raise UserError(f"{no_run[0]}: no folder of a finished meta-training (it holds no phi.pt)")
    if len(sources) < len(folders):
        raise UserError("two of the runs have the same folder name, by which the result would call both")
    changed = other_settings(sources)
    for text in changed:
        print(text, file=sys.stderr)
    if changed and not arguments.sources:
        raise UserError("these runs are no repetitions of one meta-training (above); name those to choose from")

    grid = Grid(arguments.grid, arguments.preset, overrides(arguments))
    for name, path in sources.items():
        grid.add_phi(name, path)
    for cell in grid.cells():
        if cell.config.eval_split == "test":
            raise UserError(f"{arguments.grid}: eval_split must not be test: choosing on test images is cheating")
    run_grid(grid, arguments)
    if arguments.list:
        return
    folder = results_folder(grid, arguments)
    page = write_table(grid, folder, arguments.runs)
    evidence = collect(grid, Results(grid, folder), [*sources])
    best = max((name for name in sources if "mean" in evidence[name]), key=lambda name: evidence[name]["mean"])
    selection = {"chosen": best, "evaluated": describe(grid), "accuracy": evidence}
    save_json(selection, folder.with_name(folder.name + ".json"))
    phi = load_phi(sources[best])
    out = arguments.out or arguments.runs / "selected" / "phi.pt"
    save_phi(phi, out, {**phi.card, "selection": selection})
    for name, found in evidence.items():
        text = (
            f"{found['mean']:.2f} % over {found['seeds']} seeds" if "mean" in found else f"{found['diverged']} diverged"
        )
        print(f"{'*' if name == best else ' '} {name}: {text}")
    print(f"chosen: {out}   evidence: {page}", file=sys.stderr)


def take_rows(grid: Grid, folder: Path) -> None:
    """The rows of a choice that was made, from its records: the files of its φ may be gone.

    Raises:
        UserError: none was made there.
    """
    path = folder.with_name(folder.name + ".json")
    if not path.is_file():
        raise UserError(f"{path}: no choice was made there yet; name two or more meta-trainings to choose from")
    started = {record["row"]: record["needs"] for record in read_all(folder)}
    for row in load_json(path)["accuracy"]:
        if row in started:
            grid.add_row(row, started[row]["phi"])
    take_recorded(grid, folder)


def other_settings(sources: dict[str, Path]) -> list[str]:
    """What the runs differ in, beside their seed, a line each: a choice among other settings is tuning."""
    cards = {name: load_phi(path).card for name, path in sources.items()}
    fields = MetaTrainConfig.__dataclass_fields__
    known = {
        name: MetaTrainConfig(**{key: value for key, value in card["config"].items() if key in fields})
        for name, card in cards.items()
        if card.get("config")
    }
    images = {name: card.get("source", {}).get("fingerprint") for name, card in cards.items()}
    lines = [f"{name}: nothing is recorded of its settings" for name in sources if name not in known]
    for name, config in [*known.items()][1:]:
        first, settings = next(iter(known.items()))
        changed = [c for c in differences(asdict(settings), config) if not c.startswith("seed:")]
        changed += ["other images"] * (images[name] != images[first])
        if changed:
            lines.append(f"{name} differs from {first} in more than the seed: {'; '.join(changed)}")
    return lines


def collect(grid: Grid, results: Results, names: list[str]) -> dict[str, dict[str, Any]]:
    """Name → mean and standard deviation of the accuracy in %; where trainings diverged how many: such a φ loses.

    Raises:
        UserError: a run of the grid is missing, so that the choice would not be among all; some diverged with each φ.
    """
    column = next(iter(grid.columns))
    evidence = {}
    for name in names:
        accuracies = results.accuracies(name, column)
        if lost := results.lost(name, column):
            evidence[name] = {"diverged": lost}
            continue
        if len(accuracies) < len(grid.seeds):
            raise UserError(f"{name}: {len(accuracies)} of {len(grid.seeds)} trainings are there; nothing was chosen")
        summary = summarize([*accuracies.values()])
        evidence[name] = {"mean": summary.mean, "std": summary.std, "seeds": summary.n}
    if not any("mean" in found for found in evidence.values()):
        raise UserError("with each φ some trainings diverged; nothing was chosen")
    return evidence


def describe(grid: Grid) -> str:
    config = grid.cells()[0].config
    seeds = ", ".join(map(str, grid.seeds))
    name = Path(config.target_path).stem if config.target == "folder" else config.target
    return f"{name}, {config.eval_split} images, {config.model}, {config.steps} steps, seeds {seeds}"
