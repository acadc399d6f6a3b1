"""One JSON a cell under `results/`: writing it, and reading back those that belong to a grid."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from metaperturb.data import DATA_SETS
from metaperturb.errors import UserError
from metaperturb.identity import INCIDENTAL, differences
from metaperturb.provenance import code_digest, commit
from metaperturb.runs import read_metrics, read_result
from metaperturb.storage import save_json
from metaperturb.weights import load_phi
from tables.grid import Cell, Grid, Need, config_of
from tables.statistics import Difference, Summary, paired_difference, summarize

METRICS = {"accuracy": 100, "nll": 1, "ece": 100}  # as runs have them → what they are multiplied with to be read
CLASSES, IMAGES_A_CLASS = 200, 500  # of Tiny ImageNet's training set
DIVERGED = "diverged"  # folder beside the records, for those cells that have none because they diverged
PATHS = ("run_dir", "data_root", "target_path", "phi", "init", "from", "split_file", "source_paths")


# --- records: `metaperturb.runs.read_result` says what is in them


def write_record(cell: Mapping[str, Any], run_dir: Path, path: Path) -> None:
    """Make a finished run's record: its `result.json` without this machine's folders, place in the table and curve."""
    result = shortened(read_result(run_dir / "result.json"))
    save_json({"program": result["program"], "cell": cell, **result, "curve": curve(run_dir)}, path)


def write_diverged(
    results: "Results", cell: Cell, images: Iterable[str], phi: str | None, run_dir: Path, said: str
) -> None:
    """The record of a run that diverged: its last message in place of metrics.

    Args:
        results: of the table.
        cell: that diverged.
        images: their fingerprints.
        phi: file of the φ that it used, if any.
        run_dir: of the run.
        said: its last message.
    """
    record = {
        "program": "meta_test",
        "cell": place_of(results.grid, cell),
        "seed": cell.seed,
        "target": {"name": None, "train": None, "test": None, "fingerprints": [*images]},
        "metrics": None,
        "diverged": said.removeprefix(f"{run_dir}: ").replace(str(run_dir), run_dir.name),
        **dict.fromkeys(("init", "sites", "phi_digest", "kernel", "seconds", "versions", "hardware")),
        "phi_card": shortened(load_phi(phi).card) if phi else None,
        "config": shortened(asdict(cell.config)),
        "commit": commit(),
        "code": code_digest(),
        "curve": [],
    }
    save_json(record, results.diverged_path(cell))


def place_of(grid: Grid, cell: Cell) -> dict[str, Any]:
    return {"table": grid.name, "row": cell.row, "column": cell.column, "needs": cell.need_ids}


def read_record(path: Path) -> dict[str, Any]:
    """A cell's record, also of one that diverged; any other file is refused."""
    record = read_result(path)
    cell = record.get("cell")
    if not (isinstance(cell, dict) and {"row", "column"} <= cell.keys() and isinstance(cell.get("needs"), dict)):
        raise UserError(f"{path}: is no record of a table's cell; remove it")
    return record


def read_all(folder: Path) -> Iterator[dict[str, Any]]:
    """The records in a folder, and those of trainings that diverged."""
    yield from map(read_record, record_files(folder))


def record_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*--*.json"), *folder.glob(f"{DIVERGED}/*--*.json")])


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
                tested[key] = round(fmean((line[key] for line, _ in trained), weights), 6)
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


# --- the records of a grid


@dataclass(frozen=True)
class Entry:
    """What a table says of one row and column."""

    row: str
    column: str
    metrics: Mapping[str, Summary]  # of accuracy (%), NLL (nats), ECE (%)
    one_pass: Mapping[str, Summary]  # the same of deterministic predictions, of no seeds where none was measured
    versus: str | None  # the baseline's row
    difference: Difference | None  # of accuracy, to the baseline
    paper: str | None
    gap: float | None  # our mean accuracy − the paper's
    differences: tuple[str, ...]  # from the paper's setting
    code: tuple[str, ...]  # versions of the code that made the cells, "commit (digest)"
    diverged: int  # seeds that did, and have no part in the metrics

    @property
    def seeds(self) -> str:
        n = self.metrics["accuracy"].n
        return f"{n}; {self.diverged} diverged" if self.diverged else f"{n}"


class Results:
    """The records of a grid's cells.

    Args:
        grid: what is asked for.
        folder: where its JSONs are.

    Raises:
        UserError: a record that is damaged or holds other settings than its name says, or a column whose cells were
            trained or evaluated on different images.
    """

    def __init__(self, grid: Grid, folder: Path) -> None:
        self.grid, self.folder = grid, folder
        self.cells = {cell.place: cell for cell in grid.cells()}
        self.records: dict[tuple[str, str, int], dict[str, Any]] = {}
        self.diverged: dict[tuple[str, str, int], dict[str, Any]] = {}  # its records; a later result counts instead
        self.images: dict[str, list[str]] = {}  # column → fingerprints of its training and evaluation images
        first: dict[str, Path] = {}
        for place, cell in self.cells.items():
            for path, records in ((self.path(cell), self.records), (self.diverged_path(cell), self.diverged)):
                if not path.exists():
                    continue
                records[place] = self._read(path, cell)
                column, images = place[1], records[place]["target"]["fingerprints"]
                if self.images.setdefault(column, images) != images:
                    raise UserError(
                        f"{path}: trained or evaluated on other images than {first[column].name}, and a column mixes "
                        "no data; remove one"
                    )
                first.setdefault(column, path)
                break

    def path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.id}.json"

    def diverged_path(self, cell: Cell) -> Path:
        return self.folder / DIVERGED / f"{cell.id}.json"

    def phis(self) -> dict[str, tuple[str, Mapping[str, Any]]]:
        """Of each φ that cells start from, by its id: its name in the grid, and its card as far as records have it."""
        found: dict[str, tuple[str, Mapping[str, Any]]] = {}
        for place, cell in self.cells.items():
            if need := cell.needs.get("phi"):
                card = self.records.get(place, {}).get("phi_card")
                found[need.id] = need.name, card or found.get(need.id, ("", {}))[1]
        return found

    def strangers(self) -> list[str]:
        """Records in the folder that are of other rows or settings than this grid's."""
        ours = {self.path(cell).name for cell in self.cells.values()}
        return [str(path.relative_to(self.folder)) for path in record_files(self.folder) if path.name not in ours]

    def entries(self) -> list[Entry]:
        """Of every row and column that has a result, row by row, then of those of which seeds only diverged."""
        places = [(row, column) for row in self.grid.rows for column in self.grid.columns]
        entries = [entry for place in places if (entry := self._entry(*place))]
        return sorted(entries, key=lambda entry: entry.metrics["accuracy"].n == 0)

    def lost(self, row: str, column: str) -> int:
        """How many seeds diverged."""
        return sum(place[:2] == (row, column) for place in self.diverged)

    def accuracies(self, row: str, column: str) -> dict[int, float]:
        """Seed → accuracy in %."""
        return {seed: 100 * record["metrics"]["accuracy"] for seed, record in self._of(row, column).items()}

    def code_versions(self) -> list[str]:
        return _versions([*self.records.values(), *self.diverged.values()])

    def made_by_other_code(self, digest: str) -> int:
        """How many records are of another version of the package than this one."""
        return sum(record["code"] != digest for record in [*self.records.values(), *self.diverged.values()])

    def _of(self, row: str, column: str) -> dict[int, dict[str, Any]]:
        """Seed → record."""
        found = {seed: self.records.get((row, column, seed)) for seed in self.grid.seeds}
        return {seed: record for seed, record in found.items() if record is not None}

    def _entry(self, row: str, column: str) -> Entry | None:
        records, diverged = self._of(row, column), self.lost(row, column)
        if not records and not diverged:
            return None
        one_pass = _summaries([record["one_pass"] for record in records.values() if record.get("one_pass")])
        metrics = _summaries([record["metrics"] for record in records.values()])
        versus = self.grid.baseline(row) if records else None
        difference = versus and paired_difference(self.accuracies(row, column), self.accuracies(versus, column))
        settings = self._differences(row, column, records)
        paper = self.grid.paper_value(row, column)
        shorter = any(change.startswith(("steps:", "batch_size:")) for change in settings)
        comparable = records and paper is not None and self.grid.columns[column].comparable and not shorter
        gap = metrics["accuracy"].mean - float(paper.partition("±")[0]) if comparable else None
        code = tuple(_versions(records.values()))
        return Entry(row, column, metrics, one_pass, versus, difference, paper, gap, settings, code, diverged)

    def _differences(self, row: str, column: str, records: Mapping[int, Mapping[str, Any]]) -> tuple[str, ...]:
        """From the paper's setting: those of the settings, and which part of Tiny ImageNet cells started from."""
        cells = {seed: self.cells[row, column, seed] for seed in self.grid.seeds}  # of one setting
        parts = [text for seed, record in records.items() for text in _part_of_source(cells[seed], record)]
        return tuple(dict.fromkeys([*cells[self.grid.seeds[0]].differences, *parts]))

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


def _summaries(metrics: Sequence[Mapping[str, float]]) -> dict[str, Summary]:
    return {key: summarize([factor * m[key] for m in metrics]) for key, factor in METRICS.items()}


def _part_of_source(cell: Cell, record: Mapping[str, Any]) -> Iterator[str]:
    """For each φ or network that a cell started from and that saw a part of Tiny ImageNet only: how many images."""
    for key, need in cell.needs.items():
        made = record["phi_card" if key == "phi" else "init"] or {}
        data = made.get("source") if key == "phi" else (made.get("run") or {}).get("data")
        if not data or not str(data.get("name")).startswith("tiny_imagenet"):
            continue
        images, all_ = data.get("images", data.get("train")), IMAGES_A_CLASS * data.get("classes", CLASSES)
        if images != all_:
            yield f"{need.name}: images: {all_} → {images}"


def _versions(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """`"commit (digest)"` of each version of the package; commits between which it did not change count as one."""
    found: dict[str, str] = {}
    for record in records:
        found.setdefault(
            record["code"] or record["commit"], f"{record['commit'] or 'no commit'} ({record['code'] or 'no digest'})"
        )
    return sorted(found.values())


# --- what cells start from


def take_recorded(grid: Grid, folder: Path) -> list[Need]:
    """For reports: take what the records in `folder` started from, unless the command line names something else.

    The φ or network that was given for those trainings may be gone. What was kept of its making is enough for a page.
    Nothing is taken where records started from several, or from one that a run of the table made.

    Returns:
        the needs that were taken.

    Raises:
        UserError: a record is damaged.
    """
    cards: dict[str, Any] = {}
    for record in read_all(folder):
        for key, id_ in record["cell"]["needs"].items():
            cards[id_] = record["phi_card"] if key == "phi" else {"config": (record["init"] or {}).get("run")}
    taken = []
    made = {name: spec["program"] for name, spec in grid.needs.items() if "program" in spec and name not in grid.given}
    for name, program in made.items():
        ids = [id_ for id_ in cards if re.fullmatch(rf"{re.escape(name)}(-[0-9a-f]{{8}})?", id_)]
        if len(ids) == 1:
            taken.append(Need(name, ids[0], config=config_of(program, cards[ids[0]]), file=Path(ids[0])))
            grid.given[name] = taken[-1]
    return taken
