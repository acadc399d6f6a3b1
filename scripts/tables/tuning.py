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
from pathlib import Path
from typing import Any

from metaperturb.cli import run_program
from metaperturb.errors import UserError
from metaperturb.storage import save_json
from tables.grid import Grid
from tables.results import Results
from tables.statistics import Summary, summarize
from tables.trainings import ROOT, grid_parser, overrides, results_folder, run_grid, write_table


def main(argv: Sequence[str] | None = None) -> int:
    parser = grid_parser(__doc__)
    parser.add_argument("--grid", type=Path, default=ROOT / "configs" / "tune.yaml", help="YAML file of the values")
    arguments = parser.parse_args(argv)
    return run_program(lambda: tune(arguments), show_traceback=arguments.traceback)


def tune(arguments: argparse.Namespace) -> None:
    grid = Grid(arguments.grid, arguments.preset, overrides(arguments))
    for cell in grid.cells():
        if cell.config.eval_split != "holdout":
            raise UserError(
                f"{arguments.grid}: {cell.row}: eval_split must be holdout, so that tuning sees no test image"
            )
    run_grid(grid, arguments)
    if arguments.list:
        return
    folder = results_folder(grid, arguments)
    page = write_table(grid, folder, arguments.runs)
    chosen, evidence = choose(grid, Results(grid, folder))
    path = folder.with_name(folder.name + ".json")
    save_json({"chosen": chosen, "accuracy": evidence}, path)
    for column, methods in chosen.items():
        for method, settings in methods.items():
            if settings:
                print(f"{column}: {method}: {', '.join(f'{key} {value}' for key, value in settings.items())}")
    print(f"chosen: {path}   all values: {page}", file=sys.stderr)


def choose(grid: Grid, results: Results) -> tuple[dict[str, Any], dict[str, Any]]:
    """Column → method → the best settings, and column → row → accuracy, of columns whose candidates have all run.

    Of equally good ones the first wins. What is at the edge of the values tried is said: the best may lie beyond.

    Raises:
        UserError: no column is complete.
    """
    chosen: dict[str, Any] = {}
    evidence: dict[str, Any] = {}
    for column in grid.columns:
        lost = [row for row in grid.rows if results.lost(row, column)]
        finished = [row for row in grid.rows if row not in lost]
        missing = sum(len(results.accuracies(row, column)) < len(grid.seeds) for row in finished)
        if missing:
            print(
                f"{column}: {missing} of {len(grid.rows)} candidates have not run yet: nothing chosen", file=sys.stderr
            )
            continue
        means: dict[str, Summary] = {row: summarize([*results.accuracies(row, column).values()]) for row in finished}
        evidence[column] = {row: {"mean": m.mean, "std": m.std, "seeds": m.n} for row, m in means.items()}
        evidence[column] |= {row: {"diverged": results.lost(row, column)} for row in lost}
        chosen[column] = {}
        for method in dict.fromkeys(settings["method"] for settings in grid.rows.values()):
            rows = [row for row in finished if grid.rows[row]["method"] == method]
            if not rows:
                print(f"{column}: {method}: all candidates diverged, nothing chosen", file=sys.stderr)
                continue
            best = max(rows, key=lambda row: means[row].mean)
            chosen[column][method] = {key: value for key, value in grid.rows[best].items() if key != "method"}
            tell_edges(column, method, chosen[column][method], [grid.rows[row] for row in rows])
    if not chosen:
        raise UserError("nothing was chosen: no column has all its candidates yet")
    return chosen, evidence


def tell_edges(column: str, method: str, best: dict[str, Any], tried: list[dict[str, Any]]) -> None:
    for key, value in best.items():
        values = sorted({row[key] for row in tried})
        if len(values) > 2 and value in (values[0], values[-1]):
            print(f"{column}: {method}: {key} {value} is at the edge of the values tried {values}", file=sys.stderr)
