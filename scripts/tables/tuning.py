"""Choose the regularizers' hyperparameters on held-out training images, as the paper did for its baselines.

    ./run.sh tune                                   # all values of configs/tune.yaml on every data set of table 1
    ./run.sh tune --preset quick --columns CUB

Test images are never opened. Of each method the values with the best mean accuracy over seeds are written to
results/tune/<preset>.json, with what all the others reached; `./run.sh table1 --tuned` that file uses them. Options are
those of the tables (`./run.sh table1 --help`).
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from metaperturb.cli import run_program
from metaperturb.errors import UserError
from metaperturb.storage import save_json
from tables.grid import Grid
from tables.results import Results
from tables.statistics import evidence
from tables.trainings import grid_parser, parse, read_grid, results_folder, run_grid, write_table


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(grid_parser(__doc__, "tune.yaml"), "tune", argv)
    return run_program(lambda: tune(arguments), show_traceback=arguments.traceback)


def tune(arguments: argparse.Namespace) -> None:
    grid = read_grid(arguments)
    if wrong := [cell.row for cell in grid.cells() if cell.config.eval_split != "holdout"]:
        raise UserError(f"{grid.path}: {wrong[0]}: eval_split must be holdout, so that tuning sees no test image")
    if not run_grid(grid, arguments):
        return
    folder = results_folder(grid, arguments)
    page = write_table(grid, folder)
    chosen, accuracy = choose(grid, Results(grid, folder))
    path = folder.with_name(folder.name + ".json")
    save_json({"chosen": chosen, "accuracy": accuracy}, path)
    for column, methods in chosen.items():
        for method, settings in methods.items():
            if settings:
                print(f"{column}: {method}: {', '.join(f'{key} {value}' for key, value in settings.items())}")
    print(f"chosen: {path}   all values: {page}", file=sys.stderr)


def choose(grid: Grid, results: Results) -> tuple[dict[str, Any], dict[str, Any]]:
    """Column → method → the best settings, and column → row → accuracy, of columns whose candidates have all run.

    The first of equally good ones wins. A value at the edge of those tried is reported: the best may lie beyond it.

    Raises:
        UserError: no column is complete.
    """
    chosen: dict[str, Any] = {}
    accuracy: dict[str, Any] = {}
    for column in grid.columns:
        found = {row: evidence(results.accuracies(row, column), results.lost(row, column)) for row in grid.rows}
        missing = sum(one.get("seeds", len(grid.seeds)) < len(grid.seeds) for one in found.values())
        if missing:
            left = f"{missing} of {len(grid.rows)} candidates have not run yet"
            print(f"{column}: {left}: nothing chosen", file=sys.stderr)
            continue
        accuracy[column], chosen[column] = found, {}
        for method in dict.fromkeys(settings["method"] for settings in grid.rows.values()):
            rows = [row for row in grid.rows if grid.rows[row]["method"] == method and "mean" in found[row]]
            if not rows:
                print(f"{column}: {method}: all candidates diverged, nothing chosen", file=sys.stderr)
                continue
            best = max(rows, key=lambda row: found[row]["mean"])
            chosen[column][method] = {key: value for key, value in grid.rows[best].items() if key != "method"}
            tell_edges(f"{column}: {method}", chosen[column][method], [grid.rows[row] for row in rows])
    if not chosen:
        raise UserError("nothing was chosen: no column has all its candidates yet")
    return chosen, accuracy


def tell_edges(place: str, best: dict[str, Any], tried: list[dict[str, Any]]) -> None:
    for key, value in best.items():
        values = sorted({row[key] for row in tried})
        if len(values) > 2 and value in (values[0], values[-1]):
            print(f"{place}: {key} {value} is at the edge of the values tried {values}", file=sys.stderr)
