"""Run a grid of trainings, one of the paper's tables for instance, and make its table.

    ./run.sh table1                                         # at the paper's settings, on all GPUs (or the CPU)
    ./run.sh table2 --preset quick --jobs 4 --devices 0,1   # reduced; four trainings at a time on two GPUs
    ./run.sh table1 --rows Base MetaPerturb --columns CUB --seeds 0 1
    ./run.sh table3 --report                                # no training: the table of what is there

Data that are missing are named before anything runs. Finished cells (a JSON each, under --results) are skipped, cells
that failed are tried again, and what was interrupted resumes: give the same command again, on this or another machine.
Several runners may share the folders. With --reuse, a training that another table has (its Base, for instance) is not
run again: its record is taken over and says from where. The table says for each cell whether it ran at the paper's
setting.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from metaperturb import models
from metaperturb.cli import argument_parser, pairs, run_program
from metaperturb.config import MetaTestConfig, MetaTrainConfig, to_assignments
from metaperturb.data import TARGETS
from metaperturb.data.parts import load_parts, load_source_images
from metaperturb.distributed import parse_devices
from metaperturb.errors import UserError
from metaperturb.finetuning import read_weights
from metaperturb.provenance import available_cores, code_digest
from metaperturb.storage import load_json, reason, save_json, write_atomically
from metaperturb.weights import load_phi
from tables.grid import Cell, Grid, Need, Overrides, fingerprint_of, sha256, unknown
from tables.page import csv_text, markdown
from tables.results import (
    DIVERGED,
    Results,
    cell_place,
    keep_need_records,
    take_recorded,
    training_of,
    trainings_elsewhere,
    write_diverged,
    write_record,
)
from tables.runner import LOG, Job, Outcome, run_jobs

ROOT = Path(__file__).resolve().parents[2]
# What decides which images a run loads.
DATA_SETTINGS = (
    "source",
    "source_paths",
    "target",
    "target_path",
    "image_size",
    "classes",
    "train_per_class",
    "eval_split",
    "holdout",
    "skip_unreadable",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = grid_parser(__doc__)
    parser.add_argument("grid", type=Path, help="YAML file of the table")
    arguments = parser.parse_args(argv)
    return run_program(lambda: experiment(arguments), show_traceback=arguments.traceback)


def grid_parser(doc: str) -> argparse.ArgumentParser:
    """The options that everything that runs a grid has."""
    parser = argument_parser(doc)
    parser.add_argument("--preset", default="paper", help="which of the grid's settings: paper, quick, smoke, …")
    parser.add_argument("--jobs", type=int, help="trainings at a time [one a device; on a CPU one a core]")
    parser.add_argument("--devices", default="auto", help="'0,1,…', 'cpu' or 'auto'")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these")
    parser.add_argument("--columns", nargs="+", metavar="COLUMN", help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="only these")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="other settings of the cells; NEED.KEY=VALUE: of what they start from",
    )  # fmt: skip
    parser.add_argument(
        "--use", nargs="+", action="extend", default=[], metavar="NEED=PATH",
        help="a φ (file or shipped name) or finished run to use instead of making it: phi=phi.pt",
    )  # fmt: skip
    parser.add_argument(
        "--path", nargs="+", action="extend", default=[], metavar="COLUMN=PATH",
        help="where a column's images are; NEED=PATH,PATH…: those that φ is meta-trained or a network pretrained on",
    )  # fmt: skip
    parser.add_argument("--tuned", type=Path, help="hyperparameters that ./run.sh tune chose")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the JSONs and tables")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the runs")
    parser.add_argument("--data-root", default=str(ROOT / "data"), help="downloads and cached image arrays")
    parser.add_argument(
        "--reuse", action="store_true", help="take over what another table or preset under --results has trained alike"
    )
    parser.add_argument(
        "--retries", type=int, default=1, help="how often a cell that failed, unless it diverged, is tried again"
    )
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--list", action="store_true", help="name the cells and what is done of them, run nothing")
    return parser


def experiment(arguments: argparse.Namespace) -> None:
    grid = Grid(arguments.grid, arguments.preset, overrides(arguments))
    if arguments.report:
        for need in take_recorded(grid, results_folder(grid, arguments)):
            print(
                f"{need.name}: {need.id}, as of the records there (--use {need.name}=… names another)", file=sys.stderr
            )
    elsewhere = run_grid(grid, arguments)
    if arguments.list or (elsewhere and not Results(grid, results_folder(grid, arguments)).records):
        return
    folder = results_folder(grid, arguments)
    page = write_table(grid, folder, arguments.runs)
    print(page.read_text(encoding="utf-8"))
    print(f"table: {page}   numbers: {page.with_suffix('.csv')}", file=sys.stderr)


def overrides(arguments: argparse.Namespace) -> Overrides:
    files = {name: Path(path) for name, path in pairs("--use", arguments.use, "NAME=PATH").items()}
    paths = pairs("--path", arguments.path, "NAME=PATH")
    return Overrides(tuple(arguments.set), files, paths, arguments.data_root, arguments.tuned)


def results_folder(grid: Grid, arguments: argparse.Namespace) -> Path:
    """Of this grid and preset; settings from the command line get one of their own."""
    name = grid.preset + (f"-{fingerprint_of(sorted(arguments.set))}" if arguments.set else "")
    return arguments.results / grid.name / name


def write_table(grid: Grid, folder: Path, runs: Path) -> Path:
    """Markdown and CSV beside the folder of the records; the Markdown's path.

    Raises:
        UserError: nothing has run yet, or records that may not be put together.
    """
    results = Results(grid, folder)
    if not results.records and not results.diverged:
        raise UserError(f"{folder}: no finished cell of this table yet")
    for name in results.strangers():
        print(f"not in the table: {folder / name} (another row, setting or φ)", file=sys.stderr)
    versions = results.code_versions()
    if len(versions) > 1:
        print(
            f"the table's cells come from {len(versions)} versions of the code: {', '.join(versions)}", file=sys.stderr
        )
    needs = {need.id: need for cell in results.cells.values() for need in cell.needs.values()}
    for text in results.several_makings():
        print(text, file=sys.stderr)
    kept = keep_need_records(needs.values(), runs / "needs", folder)
    page = folder.with_name(folder.name + ".md")
    write_atomically(page, lambda file: file.write(markdown(grid, results, kept).encode()))
    write_atomically(page.with_suffix(".csv"), lambda file: file.write(csv_text(results).encode()))
    return page


def run_grid(grid: Grid, arguments: argparse.Namespace) -> Sequence[str]:
    """Train what is asked for and not there yet; returns the cells that were left to another runner.

    Raises:
        UserError: data or files are missing (before anything runs), or cells failed (after all others ran).
    """
    folder = results_folder(grid, arguments)
    results = Results(grid, folder)  # records that cannot be used are named now
    cells = chosen_cells(results, arguments)
    if arguments.list:
        for cell in cells:
            state = "done" if results.path(cell).exists() else "diverged" if cell.place in results.diverged else "to do"
            print(f"{state}  {cell.id}")
        return []
    todo = [cell for cell in cells if not results.path(cell).exists() and cell.place not in results.diverged]
    if arguments.report:
        return []
    if diverged := [cell.id for cell in cells if cell.place in results.diverged]:
        print(
            f"{len(diverged)} cells diverged before: {', '.join(diverged)}; without their JSONs in "
            f"{results.folder / DIVERGED} they run again",
            file=sys.stderr,
        )
    if not todo:
        return []
    if old := results.made_by_other_code(code_digest()):
        print(
            f"{old} finished cells were made by another version of the code and are kept; to make them anew, remove "
            f"their JSONs in {results.folder}",
            file=sys.stderr,
        )
    if untuned := [column for column in grid.untuned if any(cell.column == column for cell in todo)]:
        raise UserError(f"{grid.tuned_path}: nothing was tuned for {', '.join(untuned)}; --columns names others")
    if arguments.jobs is not None and arguments.jobs < 1:
        raise UserError(f"--jobs: must be at least 1, got {arguments.jobs}")
    seen: dict[tuple, list[str]] = {}  # fingerprints of data sets, each of which is loaded once
    if arguments.reuse:
        todo = [*take_over(results, todo, arguments.results, seen)]
        if not todo:
            return []
    devices = parse_devices(arguments.devices, "--devices", most=torch.cuda.device_count())
    devices = [str(device.index) if device.type == "cuda" else "cpu" for device in devices]
    at_once = arguments.jobs or (len(devices) if "cpu" not in devices else max(1, available_cores() // threads(todo)))
    needs = {need.id: need for cell in todo for need in cell.needs.values()}
    need_jobs = {need.id: need_job(need, arguments.runs / "needs") for need in needs.values() if need.file is None}
    made = {id_: job.record for id_, job in need_jobs.items() if job.done}
    check(results, todo, made, seen)
    jobs = [
        *need_jobs.values(),
        *(cell_job(results, cell, arguments.runs, fingerprints(cell.config, seen)) for cell in todo),
    ]
    title = f"{grid.name} {grid.preset}"
    print(
        f"{title}: {len(todo)} of {len(cells)} cells to run, {at_once} at a time on {','.join(devices)}",
        file=sys.stderr,
    )
    outcome = run_jobs(title, jobs, devices, at_once, arguments.retries)
    tell(outcome, jobs)
    return outcome.elsewhere


def take_over(results: Results, cells: Iterable[Cell], root: Path, seen: dict[tuple, list[str]]) -> Iterator[Cell]:
    """Give cells the records that other tables under `root` have of the same trainings; yields the cells left.

    `seen`: as of `fingerprints`.
    """
    known = trainings_elsewhere(root, results.folder)
    for cell in cells:
        place, path = cell_place(results.grid, cell), None
        with contextlib.suppress(UserError):  # data that are missing are named with all others, by `check`
            check_images(results, cell, seen)
            sources = {key: fingerprints(need.config, seen) for key, need in cell.needs.items() if need.file is None}
            path = known.get(training_of(cell.config, place["needs"], fingerprints(cell.config, seen), sources))
        if path is None:
            yield cell
            continue
        record, origin = load_json(path), path.relative_to(root).as_posix()
        for key, need in cell.needs.items():
            made = path.parent / "needs" / f"{record['needs'][key]}.json"
            kept = results.folder / "needs" / f"{need.id}.json"
            if made.exists() and not kept.exists():
                save_json({**load_json(made), "need": need.name}, kept)
        save_json({**record, **place, "taken_from": origin}, results.path(cell))
        print(f"{cell.id}: is {origin}", file=sys.stderr)


def threads(cells: Sequence[Cell]) -> int:
    return max(cell.config.threads or available_cores() for cell in cells)


def chosen_cells(results: Results, arguments: argparse.Namespace) -> list[Cell]:
    grid = results.grid
    for kind, wanted, known in (
        ("--rows", arguments.rows, grid.rows),
        ("--columns", arguments.columns, grid.columns),
        ("--seeds", arguments.seeds, grid.seeds),
    ):
        for name in wanted or ():
            if name not in known:
                raise unknown(kind, name, known)
    return [
        cell
        for cell in results.cells.values()
        if (arguments.rows is None or cell.row in arguments.rows)
        and (arguments.columns is None or cell.column in arguments.columns)
        and (arguments.seeds is None or cell.seed in arguments.seeds)
    ]


def tell(outcome: Outcome, jobs: Sequence[Job]) -> None:
    if outcome.elsewhere:
        print(f"{len(outcome.elsewhere)} cells are with another runner", file=sys.stderr)
    if outcome.failed:
        logs = {job.id: job.run_dir / LOG for job in jobs}
        lines = [f"  {id_}: {why} (log: {logs[id_]})" for id_, why in outcome.failed.items()]
        head = f"{len(lines)} runs failed; the same command tries them again, and --report makes the table"
        raise UserError("\n".join([f"{head}:", *lines]))


# --- before anything runs


def check(results: Results, cells: Sequence[Cell], made: Mapping[str, Path], seen: dict[tuple, list[str]]) -> None:
    """Whatever would stop a run in hours is said now: data, other ones than those of finished cells, files, networks.

    Data are fetched and decoded here, once, not by several runs at the same time.

    Args:
        results: of the table.
        cells: that are to run.
        made: id of a need of theirs whose run is finished → its result.
        seen: as of `fingerprints`.

    Raises:
        UserError: all that is wrong, a line each.
    """
    wrong: list[str] = []

    def attempt(what: str, action: Callable[[], object]) -> None:
        try:
            action()
        except UserError as error:
            wrong.append(f"  {what}: {error}")

    for cell in {cell.column: cell for cell in cells}.values():
        attempt(f"column {cell.column}", lambda cell=cell: check_images(results, cell, seen))
    needs = {need.id: (key, need) for cell in cells for key, need in cell.needs.items()}
    for key, need in needs.values():
        if need.file is not None:
            read = load_phi if key == "phi" else read_weights
            attempt(f"need {need.name}", lambda need=need, read=read: check_file(need, read))
        elif need.id not in made:
            attempt(f"need {need.name}", lambda need=need: fingerprints(need.config, seen))
        elif need.name in results.grid.overrides.paths:
            attempt(f"need {need.name}", lambda need=need: check_made(need, made[need.id], seen))
    for cell in {(cell.row, cell.column): cell for cell in cells}.values():
        attempt(f"row {cell.row}, column {cell.column}", lambda cell=cell: cost(cell.config))
    if wrong:
        raise UserError("\n".join(["nothing was run, because this is missing or wrong:", *dict.fromkeys(wrong)]))


def check_file(need: Need, read: Callable[[Path], object]) -> None:
    if not need.file.exists():
        raise UserError(f"{need.file} does not exist ({need.hint})")
    if need.sha256 and sha256(need.file) != need.sha256:
        raise UserError(f"{need.file} is another file than the one meant (sha256 {need.sha256[:12]}…)")
    read(need.file)


def check_made(need: Need, result: Path, seen: dict[tuple, list[str]]) -> None:
    """What is there was made from the images that `--path` names."""
    content = load_json(result)
    meta_trained = need.program == "meta_train"
    before = [content["source"]["fingerprint"]] if meta_trained else content["target"]["fingerprints"]
    if fingerprints(need.config, seen) != before:
        raise UserError(
            f"{result.parent}: was made from other images than --path names; remove it or give other --runs"
        )


def check_images(results: Results, cell: Cell, seen: dict[tuple, list[str]]) -> None:
    found = fingerprints(cell.config, seen)
    if found != results.images.get(cell.column, found):
        raise UserError(f"these are other images than those of the cells in {results.folder}; a column mixes no data")


def fingerprints(config: MetaTestConfig | MetaTrainConfig, seen: dict[tuple, list[str]]) -> list[str]:
    """Of the images of a run; `seen`: those of the runs before, so that each data set is loaded once."""
    key = tuple(str(getattr(config, name, None)) for name in DATA_SETTINGS)
    if key in seen:
        return seen[key]
    parts = load_parts(config) if isinstance(config, MetaTestConfig) else [load_source_images(config)]
    seen[key] = [part.fingerprint for part in parts]
    return seen[key]


def cost(config: MetaTestConfig | MetaTrainConfig) -> float:
    """Floating-point operations of all forward passes of training: what progress is measured in."""
    tasks = 2 * config.tasks if isinstance(config, MetaTrainConfig) else 1
    image_size = config.image_size
    if image_size is None:
        if config.target not in TARGETS:
            raise unknown("target", config.target, TARGETS)
        image_size = TARGETS[config.target].image_size
    return float(tasks * config.steps * config.batch_size * forward_cost(config.model, image_size))


@cache
def forward_cost(model: str, image_size: int) -> int:
    """Of one image."""
    network = models.create(model, num_classes=10, image_size=image_size)  # some, RegNet for one, cannot be made there
    try:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            network.to("meta").eval()(torch.zeros(2, 3, image_size, image_size))
    except Exception as error:  # whatever a network does with images that it was not made for
        raise UserError(f"model {model}: does not run on images of {image_size} pixels ({reason(error)})") from error
    return counter.get_total_flops() // 2


# --- jobs


def need_job(need: Need, runs: Path) -> Job:
    run_dir = runs / need.id
    arguments = command_line(need.config, {"run_dir": str(run_dir)})
    steps, record = need.config.steps, run_dir / "result.json"  # the run's own result is the record
    return Job(need.id, need.program, arguments, run_dir, record, lambda: None, (), steps, cost(need.config))


def cell_job(results: Results, cell: Cell, runs: Path, images: list[str]) -> Job:
    """`images`: fingerprints of those it trains and is evaluated on."""
    grid, record = results.grid, results.path(cell)
    run_dir = runs / grid.name / results.folder.name / cell.id
    lost = results.diverged_path(cell)
    made = {key: str(need.outcome(runs / "needs")) for key, need in cell.needs.items()}
    arguments = command_line(cell.config, {**made, "run_dir": str(run_dir)})
    needs = tuple(need.id for need in cell.needs.values() if need.file is None)

    def finish() -> None:
        write_record(cell_place(grid, cell), run_dir, record)
        lost.unlink(missing_ok=True)

    def diverge(said: str) -> None:
        write_diverged(results, cell, images, run_dir, said)

    work = cost(cell.config)
    return Job(
        cell.id, "meta_test", arguments, run_dir, record, finish, needs, cell.config.steps, work, diverge, lost.exists
    )


def command_line(config: MetaTestConfig | MetaTrainConfig, made: dict[str, str]) -> list[str]:
    """`--set` and the settings that are not at their defaults."""
    return ["--set", *to_assignments(config, made)]
