"""Run a grid of trainings, one of the paper's tables for instance, and make its table.

    ./run.sh table1                                         # at the paper's settings, on all GPUs (or the CPU)
    ./run.sh table2 --preset quick --jobs 4 --devices 0,1   # reduced; four trainings at a time on two GPUs
    ./run.sh table1 --rows Base MetaPerturb --columns CUB --seeds 0 1
    ./run.sh table3 --report                                # no training: the table of what is there
    ./run.sh table1 --slurm partition=gpu gpus=1 time=8:00:00 array=64   # on a cluster: job arrays; returns
    ./run.sh table1 --status                                # what is done, running, waiting, failed; the time left

Data that are missing are named before anything runs. Finished cells (a JSON each, under --results) are skipped, cells
that failed are tried again, and what was interrupted resumes: give the same command again. The table says for each cell
whether it ran at the paper's setting.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import cluster
import torch

from metaperturb.cli import argument_parser, pairs
from metaperturb.distributed import parse_devices
from metaperturb.errors import UserError
from metaperturb.finetuning import read_weights
from metaperturb.identity import check_network, digest, fingerprints, image_size
from metaperturb.provenance import available_cores
from metaperturb.runs import read_result
from metaperturb.storage import write_atomically
from metaperturb.weights import load_phi
from tables.grid import Cell, Grid, Need, check_known, sha256
from tables.page import csv_text, markdown
from tables.results import DIVERGED, Results, finished, record_files, take_recorded, write_diverged, write_record
from tables.runner import LOG, Job, run_jobs

ROOT = Path(__file__).resolve().parents[2]


def grid_parser(doc: str, grid: str | None = None) -> argparse.ArgumentParser:
    """The options that everything that runs a grid has; `grid`: the YAML file of one that has a grid of its own."""
    parser = argument_parser(doc)
    what = {"type": Path, "help": "YAML file of the trainings"}
    if grid is None:
        parser.add_argument("grid", **what)
    else:
        parser.add_argument("--grid", default=ROOT / "configs" / grid, **what)
    parser.add_argument("--preset", default="paper", help="which of the grid's settings: paper, quick, smoke, …")
    parser.add_argument("--jobs", type=int, help="trainings at a time [one a device; on a CPU one a core]")
    parser.add_argument("--devices", default="auto", help="'0,1,…', 'cpu' or 'auto'")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these")
    parser.add_argument("--columns", nargs="+", metavar="COLUMN", help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="only these")
    several = {"nargs": "+", "action": "extend", "default": []}
    parser.add_argument(
        "--set", **several, metavar="KEY=VALUE", help="other settings; NEED.KEY=VALUE: of what cells start from"
    )
    parser.add_argument(
        "--use", **several, metavar="NEED=PATH", help="a φ (file or shipped name) or finished run, instead of making it"
    )
    parser.add_argument(
        "--path", **several, metavar="COLUMN=PATH",
        help="where a column's images are; NEED=PATH,PATH…: those that φ is meta-trained or a network pretrained on",
    )  # fmt: skip
    parser.add_argument("--tuned", type=Path, help="hyperparameters that ./run.sh tune chose")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the JSONs and tables")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the runs")
    parser.add_argument("--data-root", default=str(ROOT / "data"), help="downloads and cached image arrays")
    parser.add_argument("--report", action="store_true", help="run nothing")
    cluster.add_options(parser)
    return parser


def make_table(arguments: argparse.Namespace) -> None:
    if page := run_grid(read_grid(arguments), arguments):
        print(page.read_text(encoding="utf-8"))
        print(f"table: {page}   numbers: {page.with_suffix('.csv')}", file=sys.stderr)


def read_grid(arguments: argparse.Namespace) -> Grid:
    """The grid, with what the command line changes."""
    files = {name: Path(path) for name, path in pairs("--use", arguments.use, "NAME=PATH").items()}
    paths = pairs("--path", arguments.path, "NAME=PATH")
    return Grid(arguments.grid, arguments.preset, arguments.set, files, paths, arguments.data_root, arguments.tuned)


def write_table(grid: Grid, folder: Path) -> Path:
    """Markdown and CSV beside the folder of the records; the Markdown's path."""
    results = Results(grid, folder)
    if not results.records:
        raise UserError(f"{folder}: no finished cell of this table yet")
    ours = {results.path(cell).name for cell in results.cells.values()}
    for path in record_files(folder):
        if path.name not in ours:
            print(f"not in the table: {path} (another row, setting or φ)", file=sys.stderr)
    page = folder.with_name(folder.name + ".md")
    write_atomically(page, lambda file: file.write(markdown(results).encode()))
    write_atomically(page.with_suffix(".csv"), lambda file: file.write(csv_text(results).encode()))
    return page


def run_grid(grid: Grid, arguments: argparse.Namespace) -> Path | None:
    """Train what is asked for and not there yet, here or on a cluster; returns the page once all of it is there."""
    own = f"-{digest(sorted(arguments.set))}" if arguments.set else ""  # other settings have a folder of their own
    folder = arguments.results / grid.name / (grid.preset + own)
    if arguments.report:
        for need in take_recorded(grid, folder):
            print(f"{need.name}: {need.id}, as of the records (--use {need.name}=… names another)", file=sys.stderr)
        return write_table(grid, folder)
    results = Results(grid, folder)  # records that cannot be used are named now
    cells = list(results.cells.values())
    for name, known in (("row", grid.rows), ("column", grid.columns), ("seed", grid.seeds)):
        wanted = getattr(arguments, f"{name}s")
        check_known(f"--{name}s", wanted or (), known)
        cells = [cell for cell in cells if wanted is None or getattr(cell, name) in wanted]
    there = {cell.id: results.records[cell.place] for cell in cells if cell.place in results.records}
    todo = [cell for cell in cells if cell.id not in there]
    queue = cluster.Queue(arguments.runs / "slurm" / grid.name / folder.name)
    jobs = grid_jobs(results, todo, arguments.runs)
    title = f"{grid.name} {grid.preset}"
    if arguments.status:
        return cluster.tell_status(title, queue, jobs, [*there])
    if diverged := [id_ for id_, record in there.items() if not finished(record)]:
        where = f"without their JSONs in {folder / DIVERGED} they run again"
        print(f"{len(diverged)} cells diverged before: {', '.join(diverged)}; {where}", file=sys.stderr)
    if not todo:
        return write_table(grid, folder)
    if untuned := [column for column in grid.untuned if any(cell.column == column for cell in todo)]:
        raise UserError(f"{grid.tuned_path}: nothing was tuned for {', '.join(untuned)}; --columns names others")
    if arguments.slurm is not None:  # this machine's devices are not those of the jobs
        options = cluster.parse_options(arguments.slurm)
        check(results, todo, jobs)
        device = "0" if options.get("gpus") else arguments.devices
        return cluster.submit(queue, [(job, (cluster.one_job, job, device)) for job in jobs if not job.done], options)
    devices = parse_devices(arguments.devices, "--devices", most=torch.cuda.device_count())
    check(results, todo, jobs)
    devices = [str(device.index) if device.type == "cuda" else "cpu" for device in devices]
    threads = max(cell.config.threads or available_cores() for cell in todo)
    if arguments.jobs is not None and arguments.jobs < 1:
        raise UserError(f"--jobs: must be at least 1, got {arguments.jobs}")
    at_once = arguments.jobs or (len(devices) if "cpu" not in devices else max(1, available_cores() // threads))
    head = f"{title}: {len(todo)} of {len(cells)} cells to run, {at_once} at a time on {','.join(devices)}"
    print(head, file=sys.stderr)
    if failed := run_jobs(jobs, devices, at_once):
        logs = {job.id: job.run_dir / LOG for job in jobs}
        lines = [f"  {id_}: {why} (log: {logs[id_]})" for id_, why in failed.items()]
        head = f"{len(lines)} runs failed; the same command tries them again, and --report makes the table"
        raise UserError("\n".join([f"{head}:", *lines]))
    return write_table(grid, folder)


# --- before anything runs


def check(results: Results, cells: Sequence[Cell], jobs: Iterable[Job]) -> None:
    """Find now what would stop a run in hours: missing files or data, other images, networks that do not run.

    Data are fetched and decoded here once, so that several runs do not do it at the same time.
    """
    made, moved = {job.id: job.record for job in jobs if job.done}, results.grid.paths
    columns = {cell.column: cell for cell in cells}
    needs = {need.id: (key, need) for cell in cells for key, need in cell.needs.items()}
    networks = {(cell.config.model, image_size(cell.config)): cell for cell in reversed(cells)}
    checks = [(f"column {cell.column}", check_images, results, cell) for cell in columns.values()]
    for key, need in needs.values():
        if need.id not in made or need.name in moved:
            checks.append((f"need {need.name}", check_need, key, need, made.get(need.id)))
    checks += [(f"row {cell.row}, column {cell.column}", check_network, cell.config) for cell in networks.values()]
    wrong = []
    for what, do, *arguments in checks:
        try:
            do(*arguments)
        except UserError as error:
            wrong.append(f"  {what}: {error}")
    if wrong:
        raise UserError("\n".join(["nothing was run, because this is missing or wrong:", *dict.fromkeys(wrong)]))


def check_images(results: Results, cell: Cell) -> None:
    found = fingerprints(cell.config)
    if found != results.images.get(cell.column, found):
        other = f"these are other images than those of the cells in {results.folder}"
        raise UserError(f"{other}; a column mixes no data")


def check_need(key: str, need: Need, made: Path | None) -> None:
    """A file is the one meant and can be read. The images of a run are there, and those that it was made from."""
    if need.file is not None:
        if not need.file.exists():
            raise UserError(f"{need.file} does not exist ({need.hint})")
        if need.sha256 and sha256(need.file) != need.sha256:
            raise UserError(f"{need.file} is another file than the one meant (sha256 {need.sha256[:12]}…)")
        (load_phi if key == "phi" else read_weights)(need.file)
        return
    found, result = fingerprints(need.config), read_result(made) if made else None
    if result and found != ([result["source"]["fingerprint"]] if key == "phi" else result["target"]["fingerprints"]):
        raise UserError(f"{made.parent}: was made from other images than --path names; remove it or give other --runs")


# --- jobs


def grid_jobs(results: Results, cells: Iterable[Cell], runs: Path) -> list[Job]:
    """The runs of these cells, behind those of what they need."""
    needs: dict[str, Job] = {}
    for need in (need for cell in cells for need in cell.needs.values() if need.file is None):
        config = dataclasses.replace(need.config, run_dir=str(runs / "needs" / need.id))
        needs[need.id] = Job(need.id, need.program, config, runs / "needs" / need.id / "result.json")
    return [*needs.values(), *(cell_job(results, cell, runs, needs) for cell in cells)]


def cell_job(results: Results, cell: Cell, runs: Path, needs: Mapping[str, Job]) -> Job:
    record, run_dir = results.path(cell), runs / results.grid.name / results.folder.name / cell.id
    made = {key: str(need.outcome(runs / "needs")) for key, need in cell.needs.items()}
    config = dataclasses.replace(cell.config, **made, run_dir=str(run_dir))
    place = {"table": results.grid.name, "row": cell.row, "column": cell.column, "needs": cell.need_ids}

    def diverge(said: str) -> None:
        write_diverged(place, config, fingerprints(config), said, results.path(cell, diverged=True))

    before = tuple(needs[id_] for id_ in cell.need_ids.values() if id_ in needs)
    return Job(cell.id, "meta_test", config, record, partial(write_record, place, run_dir, record), before, diverge)
