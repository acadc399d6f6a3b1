"""One JSON a cell under `results/`: writing it, reading back those that belong to a grid, and what seeds say."""

import functools
import itertools
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metaperturb.config import MetaTestConfig
from metaperturb.data import DATA_SETS
from metaperturb.errors import UserError
from metaperturb.identity import INCIDENTAL, differences
from metaperturb.provenance import code_digest, commit
from metaperturb.runs import read_metrics, read_result
from metaperturb.storage import save_json
from metaperturb.weights import load_phi
from tables.grid import Cell, Grid, Need, config_of

METRICS = {"accuracy": 100, "nll": 1, "ece": 100}  # as runs have them → what they are multiplied with to be read
LEVEL = 0.95  # of the intervals
CLASSES, IMAGES_A_CLASS = 200, 500  # of Tiny ImageNet's training set
DIVERGED = "diverged"  # folder beside the records, for those cells that have none because they diverged
PATHS = ("run_dir", "data_root", "target_path", "phi", "init", "from", "split_file", "source_paths")


# --- records: `metaperturb.runs.read_result` says what is in them


def write_record(cell: Mapping[str, Any], run_dir: Path, path: Path) -> None:
    """Make a finished run's record: its `result.json` without this machine's folders, place in the table and curve."""
    result = shortened(read_result(run_dir / "result.json"))
    save_json({"program": result["program"], "cell": cell, **result, "curve": curve(run_dir)}, path)


def write_diverged(
    cell: Mapping[str, Any], config: MetaTestConfig, images: Sequence[str], said: str, path: Path
) -> None:
    """The record of a run that diverged: its last message in place of metrics; `images`: their fingerprints."""
    run_dir = Path(config.run_dir)
    record = {
        "program": "meta_test",
        "cell": cell,
        "seed": config.seed,
        "target": {"name": None, "train": None, "test": None, "fingerprints": [*images]},
        "metrics": None,
        "diverged": said.removeprefix(f"{run_dir}: ").replace(str(run_dir), run_dir.name),
        **dict.fromkeys(("init", "sites", "phi_digest", "kernel", "seconds", "versions", "hardware")),
        "phi_card": shortened(load_phi(config.phi).card) if config.method == "metaperturb" else None,
        "config": shortened(asdict(config)),
        "commit": commit(),
        "code": code_digest(),
        "curve": [],
    }
    save_json(record, path)


def read_record(path: Path) -> dict[str, Any]:
    """A cell's record, also of one that diverged; any other file is refused."""
    record = read_result(path)
    match record.get("cell"):
        case {"row": _, "column": _, "needs": dict()}:
            return record
    raise UserError(f"{path}: is no record of a table's cell; remove it")


def record_files(folder: Path) -> list[Path]:
    """The records in a folder, and those of trainings that diverged."""
    found = [*folder.glob("*--*.json"), *folder.glob(f"{DIVERGED}/*--*.json")]
    return sorted(found, key=lambda path: path.name)


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """The evaluations in a run's `metrics.jsonl`, each with the means of training over the steps since the last one."""
    found, trained, before = [], [], 0  # trained: since the last evaluation, the lines and how many steps each is of
    for line in read_metrics(run_dir):
        if "train_loss" in line:
            trained.append((line, line["step"] - before))
            before = line["step"]
        if "test_accuracy" in line:
            tested = {key: value for key, value in line.items() if key == "step" or key.startswith("test_")}
            weights = [steps for _, steps in trained]
            for key in ("train_loss", "train_accuracy") if sum(weights) else ():
                tested[key] = round(statistics.fmean((line[key] for line, _ in trained), weights), 6)
            found.append(tested)
            trained = []
    return found


def images_of(result: Mapping[str, Any]) -> str:
    """What a run trained and was evaluated on: `cub50.zip, 84 pixels: 1,500 training and 1,389 test images`."""
    target, config = result["target"], result["config"]
    name = Path(config["target_path"]).name if config["target"] == "folder" else config["target"]
    size = config["image_size"] or DATA_SETS[config["target"]].image_size
    held_out = {"holdout": "held-out", "val": "validation"}.get(config["eval_split"], config["eval_split"])
    return f"{name}, {size} pixels: {target['train']:,} training and {target['test']:,} {held_out} images"


def shortened(value: Any, key: str = "") -> Any:
    """The same with file names for paths, so that a record says nothing of the machine's folders."""
    if isinstance(value, Mapping):
        return {name: shortened(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [shortened(part, key) for part in value]
    if key in PATHS and isinstance(value, str) and value:
        return ",".join(Path(part.strip()).resolve().name for part in value.split(","))  # may list several
    return value


# --- statistics


class Summary(NamedTuple):
    """Values over seeds. `std` is the unbiased sample standard deviation; None for a single seed, `mean` for none."""

    mean: float | None
    std: float | None
    n: int

    def __str__(self) -> str:
        if self.mean is None:
            return "–"
        return f"{self.mean:.2f}" + (f" ± {self.std:.2f}" if self.std is not None else "")


class Difference(NamedTuple):
    """Mean of paired differences over `n` seeds that both have; `low` and `high` bound it, None for a single pair."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:+.2f}" + (f" [{self.low:+.2f}, {self.high:+.2f}]" if self.low is not None else "")


def summarize(values: Sequence[float]) -> Summary:
    mean = statistics.fmean(values) if values else None
    return Summary(mean, statistics.stdev(values) if len(values) > 1 else None, len(values))


def paired_difference(ours: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Student's t interval of mean(ours − baseline) over the seeds that both have; None if they share none.

    Pairing takes out what seeds have in common: initial weights and the order of the data.
    """
    seeds = sorted(ours.keys() & baseline.keys())
    mean, std, n = summarize([ours[seed] - baseline[seed] for seed in seeds])
    if std is None:
        return Difference(mean, None, None, n) if seeds else None
    half = t_quantile((1 + LEVEL) / 2, n - 1) * std / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)


@functools.cache  # a table asks for a few numbers of seeds, in each of its cells
def t_quantile(probability: float, freedom: int) -> float:
    """The value that Student's t with `freedom` degrees of freedom stays below with `probability` in [0.5, 1).

    With t = √f · tan θ the density of θ is proportional to (cos θ)^(f − 1), which is summed here.
    """
    edges = np.linspace(0, np.pi / 2, 1_000_001)
    below = np.cumsum(np.cos((edges[1:] + edges[:-1]) / 2) ** (freedom - 1))
    theta = np.interp(2 * probability - 1, np.concatenate([[0.0], below]) / below[-1], edges)
    return math.sqrt(freedom) * math.tan(theta)


# --- the records of a grid


class Results:
    """The records of a grid's cells in a folder; those that are damaged, misnamed or of other images are refused."""

    def __init__(self, grid: Grid, folder: Path) -> None:
        self.grid, self.folder = grid, folder
        self.cells = {cell.place: cell for cell in grid.cells()}
        self.records: dict[tuple[str, str, int], dict[str, Any]] = {}  # of trainings that diverged, too
        self.images: dict[str, list[str]] = {}  # column → fingerprints of its training and evaluation images
        for place, cell in self.cells.items():
            path = self.path(cell) if self.path(cell).exists() else self.path(cell, diverged=True)
            if path.exists():
                self.records[place] = self._read(path, cell)
                images = self.records[place]["target"]["fingerprints"]
                if self.images.setdefault(cell.column, images) != images:
                    raise UserError(
                        f"{path}: trained or evaluated on other images than the cells before it, and a column mixes no "
                        "data; remove it or those"
                    )

    def path(self, cell: Cell, diverged: bool = False) -> Path:
        return self.folder / (DIVERGED if diverged else "") / f"{cell.id}.json"

    def entries(self) -> list["Entry"]:
        """Of every row and column that has a result, row by row, then of those of which seeds only diverged."""
        entries = [Entry(self, row, column) for row in self.grid.rows for column in self.grid.columns]
        known = [entry for entry in entries if entry.records or entry.diverged]
        return sorted(known, key=lambda entry: not entry.records)

    def of(self, row: str, column: str) -> dict[int, dict[str, Any]]:
        """Seed → record."""
        places = {seed: (row, column, seed) for seed in self.grid.seeds}
        return {seed: self.records[place] for seed, place in places.items() if place in self.records}

    def _read(self, path: Path, cell: Cell) -> dict[str, Any]:
        record = read_record(path)
        place = record["cell"]["row"], record["cell"]["column"], record["config"]["seed"]
        wrong = [f"it is of {place}"] if place != cell.place else []
        if record["cell"]["needs"] != cell.need_ids:
            wrong.append("it started from another φ or network")
        wrong += differences(record["config"], cell.config, without=INCIDENTAL | cell.needs.keys())
        if wrong:
            raise UserError(f"{path}: holds other settings than its name says ({'; '.join(wrong)}); remove it")
        return record


class Entry:
    """What a table says of one row and column: of accuracy (%), NLL (nats) and ECE (%), by draws and in one pass."""

    def __init__(self, results: Results, row: str, column: str) -> None:
        grid, self.row, self.column = results.grid, row, column
        found = results.of(row, column)
        self.records = {seed: record for seed, record in found.items() if finished(record)}
        self.diverged = len(found) - len(self.records)  # which have no metrics
        self.seeds = f"{len(self.records)}" + f"; {self.diverged} diverged" * bool(self.diverged)
        self.metrics = _summaries([record["metrics"] for record in self.records.values()])
        self.one_pass = _summaries([record["one_pass"] for record in self.records.values() if record.get("one_pass")])
        self.versus = grid.baseline(row) if self.records else None
        theirs = results.of(self.versus, column) if self.versus else {}
        self.difference = paired_difference(_accuracies(found), _accuracies(theirs))
        # From the paper's setting: those of settings, and which part of Tiny ImageNet cells started from.
        first, *_ = cells = [results.cells[row, column, seed] for seed in grid.seeds]
        parts = (_part_of_source(cell, self.records[cell.seed]) for cell in cells if cell.seed in self.records)
        self.differences = tuple(dict.fromkeys([*first.differences, *itertools.chain(*parts)]))
        self.paper = grid.paper_value(row, column)
        shorter = any(change.startswith(("steps:", "batch_size:")) for change in self.differences)
        comparable = self.records and self.paper is not None and grid.columns[column]["comparable"] and not shorter
        self.gap = self.metrics["accuracy"].mean - float(self.paper.partition("±")[0]) if comparable else None
        self.code = versions(self.records.values())


def finished(record: Mapping[str, Any]) -> bool:
    """Whether it is of a training that did not diverge."""
    return record["metrics"] is not None


def _accuracies(records: Mapping[int, Mapping[str, Any]]) -> dict[int, float]:
    return {seed: 100 * record["metrics"]["accuracy"] for seed, record in records.items() if finished(record)}


def _summaries(metrics: Sequence[Mapping[str, float]]) -> dict[str, Summary]:
    return {key: summarize([factor * m[key] for m in metrics]) for key, factor in METRICS.items()}


def _part_of_source(cell: Cell, record: Mapping[str, Any]) -> Iterator[str]:
    """For each φ or network that a cell started from and that saw a part of Tiny ImageNet only: how many images."""
    phi, network = (record["phi_card"] or {}).get("source"), ((record["init"] or {}).get("run") or {}).get("data")
    for key, need in cell.needs.items():
        data = (phi if key == "phi" else network) or {}
        images, all_ = data.get("images", data.get("train")), IMAGES_A_CLASS * data.get("classes", CLASSES)
        if str(data.get("name")).startswith("tiny_imagenet") and images != all_:
            yield f"{need.name}: images: {all_} → {images}"


def versions(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """`"commit (digest)"` of each version of the package; commits between which it did not change count as one."""
    found: dict[str, str] = {}
    for record in records:
        found.setdefault(record["code"], f"{record['commit'] or 'no commit'} ({record['code']})")
    return sorted(found.values())


def take_recorded(grid: Grid, folder: Path) -> list[Need]:
    """For reports: take what the records started from and may be gone, unless the command line names something else.

    Nothing is taken where records started from several, or from one that a run of the table made. Of a choice among
    several φ each is a row, and not among those that are returned.
    """
    cards: dict[str, Any] = {}
    for record in map(read_record, record_files(folder)):
        for key, id_ in record["cell"]["needs"].items():
            cards[id_] = record["phi_card"] if key == "phi" else {"config": (record["init"] or {}).get("run")}
            if re.fullmatch(r"phi_[0-9a-f]{8}", id_) and record["cell"]["row"] not in grid.rows:
                grid.add_row(record["cell"]["row"], id_)
    taken = {}
    for name, spec in grid.needs.items():
        ids = [id_ for id_ in cards if re.fullmatch(rf"{re.escape(name)}(-[0-9a-f]{{8}})?", id_)]
        if "program" in spec and name not in grid.given and len(ids) == 1:
            taken[name] = Need(name, ids[0], config=config_of(spec["program"], cards[ids[0]]), file=Path(ids[0]))
    grid.given |= taken
    return [need for name, need in taken.items() if need.id != name]
