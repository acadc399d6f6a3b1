"""One JSON a cell under `results/`: writing it, and reading back those that belong to a grid."""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from metaperturb.config import MetaTestConfig
from metaperturb.data import TARGETS
from metaperturb.errors import UserError
from metaperturb.provenance import code_digest, commit
from metaperturb.runs import read_metrics
from metaperturb.storage import load_json, save_json
from tables.grid import Cell, Grid, Need, changes, config_of, fingerprint
from tables.statistics import Difference, Summary, paired_difference, summarize

METRICS = {
    "accuracy": 100,
    "nll": 1,
    "ece": 100,
}  # as the programs write them → what they are multiplied with to be read
CLASSES, IMAGES_A_CLASS = 200, 500  # of Tiny ImageNet's training set
STARTS = ("phi", "init")  # settings that say what a training starts from
SETTINGS = {field.name for field in dataclasses.fields(MetaTestConfig)}
DIVERGED = "diverged"  # folder beside the records, for those cells that have none because they diverged
PATHS = ("run_dir", "data_root", "target_path", "phi", "init", "from", "split_file", "source_paths")


def write_record(place: Mapping[str, Any], run_dir: Path, path: Path) -> None:
    """Make a finished run's record: its place in the table, `result.json` without this machine's folders, its curve."""
    save_json({**place, "result": shortened(load_json(run_dir / "result.json")), "curve": curve(run_dir)}, path)


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


def cell_place(grid: Grid, cell: Cell) -> dict[str, Any]:
    return {"table": grid.name, "row": cell.row, "column": cell.column, "seed": cell.seed, "needs": cell.need_ids}


def write_diverged(results: "Results", cell: Cell, images: Iterable[str], run_dir: Path, said: str) -> None:
    """Keep of a run that diverged, instead of a record, its place in the table, settings, version and what it said.

    `images`: fingerprints of those it trained and is evaluated on.
    """
    said = said.removeprefix(f"{run_dir}: ").replace(str(run_dir), run_dir.name)
    made = {
        "diverged": said,
        "fingerprints": [*images],
        "config": shortened(dataclasses.asdict(cell.config)),
        "code": code_digest(),
    }
    save_json({**cell_place(results.grid, cell), **made, "commit": commit()}, results.diverged_path(cell))


def read_diverged(path: Path) -> dict[str, Any]:
    """What `write_diverged` wrote.

    Raises:
        UserError: the file cannot be read or is none.
    """
    found = load_json(path)
    try:
        _ = found["row"], found["column"], found["seed"], found["config"]["seed"]
        whole = isinstance(found["diverged"], str) and len(found["fingerprints"]) == 2
        whole = whole and all(isinstance(id_, str) for id_ in found["needs"].values())
    except (AttributeError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{path}: does not say which training diverged; remove it")
    return found


def content_of(id_: str) -> str | None:
    """What the id of a need says of its content, without what a table calls it: a digest, or a run's settings."""
    found = re.fullmatch(r".*?[-_]((seed\d+-)?[0-9a-f]{8})", id_)
    return found and found[1]


@dataclass(frozen=True)
class Training:
    """What makes two trainings of meta-testing one, in whatever table they stand.

    Attributes:
        settings: fingerprint of the settings, without what the training starts from.
        seed: of the training.
        images: fingerprints of those it trains and is evaluated on.
        started: what it starts from: setting, content, and for one that was made, not given, its images.
    """

    settings: str
    seed: int
    images: tuple[str, ...]
    started: tuple[tuple[str, str, tuple[str, ...]], ...]


def training_of(
    config: MetaTestConfig, needs: Mapping[str, str], images: Iterable[str], sources: Mapping[str, Iterable[str]]
) -> Training | None:
    """Of settings, of needs (setting → id), and of fingerprints of images; None where too little is known.

    Args:
        config: the settings.
        needs: setting → id of what it refers to.
        images: those it trains and is evaluated on.
        sources: setting → those that what it refers to was made of.
    """
    contents = {key: content_of(id_) for key, id_ in needs.items()}
    unknown = None in contents.values() or any(getattr(config, key) and key not in needs for key in STARTS)
    made = {key: tuple(sources.get(key, ())) for key, content in contents.items() if str(content).startswith("seed")}
    if unknown or not all(made.values()):
        return None
    settings = fingerprint("meta_test", dataclasses.replace(config, **dict.fromkeys(needs)))
    started = tuple((key, content, made.get(key, ())) for key, content in sorted(contents.items()))
    return Training(settings, config.seed, tuple(images), started)


def trainings_elsewhere(root: Path, folder: Path) -> dict[Training, Path]:
    """The records under `root` of trainings that were run for another folder of it than this one."""
    found: dict[Training, Path] = {}
    for path in sorted(root.glob("*/*/*--*.json")):
        if path.parent.resolve() == folder.resolve():
            continue
        try:
            record = read_record(path)
            result = record["result"]
            settings = {key: value for key, value in result["config"].items() if key in SETTINGS}
            sources = {"phi": [], "init": []}
            with contextlib.suppress(AttributeError, KeyError, TypeError):
                sources["phi"] = [result["phi_card"]["source"]["fingerprint"]]
            with contextlib.suppress(AttributeError, KeyError, TypeError):
                sources["init"] = result["init"]["run"]["data"]["fingerprints"]
            images = result["target"]["fingerprints"]
            training = training_of(MetaTestConfig(**settings), record["needs"], images, sources)
        except (AttributeError, KeyError, TypeError, UserError, RecursionError):
            print(f"{path}: passed over, is no record of a training", file=sys.stderr)
            continue
        if training is not None and "taken_from" not in record:
            found.setdefault(training, path)
    return found


def read_record(path: Path) -> dict[str, Any]:
    """The record of a training run.

    Raises:
        UserError: the file cannot be read or is none.
    """
    record = load_json(path)
    try:
        result, metrics = record["result"], record["result"]["metrics"]
        _ = record["row"], record["column"], record["seed"], result["config"]["seed"]
        whole = all(isinstance(metrics[key], int | float) for key in METRICS) and isinstance(record["needs"], Mapping)
        whole = whole and len(result["target"]["fingerprints"]) == 2
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{path}: is no record of a training run; remove it")
    return record


def images_of(result: Mapping[str, Any]) -> str:
    """What a run trained and was evaluated on: `cub50.zip, 84 pixels: 1,500 training and 1,389 test images`."""
    target, config = result["target"], result["config"]
    name = Path(config["target_path"]).name if config.get("target") == "folder" else config.get("target", "")
    if not (name and {"train", "test"} <= target.keys()):  # of an older version
        return ""
    size = config.get("image_size") or TARGETS[name].image_size
    split = config.get("eval_split", "test")
    held_out = {"holdout": "held-out", "val": "validation"}.get(split, split)
    return f"{name}, {size} pixels: {target['train']:,} training and {target['test']:,} {held_out} images"


def shortened(result: Mapping[str, Any]) -> dict[str, Any]:
    """The same with file names for paths, so that a record says nothing of the machine's folders."""

    def name(value: Any) -> Any:
        if isinstance(value, list):
            return [name(item) for item in value]
        if not isinstance(value, str):
            return value
        return ",".join(Path(part.strip()).name for part in value.split(","))  # `target_path` may list several

    def walk(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: name(v) if k in PATHS and not isinstance(v, Mapping) else walk(v) for k, v in value.items()}
        return [walk(item) for item in value] if isinstance(value, list) else value

    return walk(result)


@dataclass(frozen=True)
class Entry:
    """What a table says of one row and column."""

    row: str
    column: str
    metrics: Mapping[str, Summary]  # of accuracy (%), NLL (nats), ECE (%)
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
        self.records = {}
        self.diverged: dict[tuple[str, str, int], dict[str, Any]] = {}  # what is kept of those that did
        self.images: dict[str, Any] = {}  # column → fingerprints of its training and evaluation images
        for place, cell in self.cells.items():
            path = self.path(cell)
            if path.exists():
                self.records[place] = self._read(path, cell)
            elif self.diverged_path(cell).exists():
                self.diverged[place] = self._read_diverged(self.diverged_path(cell), cell)
        self._check_data()

    def path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.id}.json"

    def diverged_path(self, cell: Cell) -> Path:
        return self.folder / DIVERGED / f"{cell.id}.json"

    def strangers(self) -> list[str]:
        """Records in the folder that are of other rows or settings than this grid's."""
        ours = {self.path(cell).name for cell in self.cells.values()}
        found = [*self.folder.glob("*--*.json"), *self.folder.glob(f"{DIVERGED}/*--*.json")]
        return sorted(str(path.relative_to(self.folder)) for path in found if path.name not in ours)

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
        return {seed: 100 * m["accuracy"] for seed, m in self._metrics(row, column).items()}

    def code_versions(self) -> list[str]:
        return _versions([*self.records.values(), *({"result": found} for found in self.diverged.values())])

    def made_by_other_code(self, digest: str) -> int:
        """How many records are of another version of the package than this one."""
        made = [*(record["result"] for record in self.records.values()), *self.diverged.values()]
        return sum(result.get("code") != digest for result in made)

    def needs_of_other_code(self, needs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """Of runs that cells started from, id → result, those whose version made no cell: id → version."""
        ours = {record["result"].get("code") for record in self.records.values()}
        return {id_: _version(result) for id_, result in needs.items() if result.get("code") not in ours}

    def several_makings(self) -> list[str]:
        """A line for each φ or network that was made more than once: by equal settings, but of other values."""
        makings: dict[str, set[str]] = {}
        for place, record in self.records.items():
            result = record["result"]
            for key, id_ in record["needs"].items():
                if self.cells[place].needs[key].file is not None:  # given, not made: its id is that of its values
                    continue
                made = result.get("init")
                made = result.get("phi_digest") if key == "phi" else isinstance(made, Mapping) and made.get("sha256")
                if made:  # records of older versions do not tell
                    makings.setdefault(id_, set()).add(made)
        return [
            f"{id_} was made {len(found)} times: cells that start from it do not all start from the same values"
            for id_, found in makings.items()
            if len(found) > 1
        ]

    def _metrics(self, row: str, column: str) -> dict[int, dict[str, float]]:
        places = ((seed, self.records.get((row, column, seed))) for seed in self.grid.seeds)
        return {seed: record["result"]["metrics"] for seed, record in places if record is not None}

    def _entry(self, row: str, column: str) -> Entry | None:
        metrics, diverged = self._metrics(row, column), self.lost(row, column)
        if not metrics and not diverged:
            return None
        summaries = {key: summarize([factor * m[key] for m in metrics.values()]) for key, factor in METRICS.items()}
        versus = self.grid.baseline(row) if metrics else None
        difference = None
        if versus is not None:
            difference = paired_difference(self.accuracies(row, column), self.accuracies(versus, column))
        records = {seed: self.records[row, column, seed] for seed in metrics}
        differences = self._differences(row, column, records)
        paper = self.grid.paper_value(row, column)
        comparable = metrics and paper is not None and self.grid.columns[column].comparable
        shorter = any(change.startswith(("steps:", "batch_size:")) for change in differences)
        gap = summaries["accuracy"].mean - float(paper.partition("±")[0]) if comparable and not shorter else None
        return Entry(
            row=row,
            column=column,
            metrics=summaries,
            versus=versus,
            difference=difference,
            paper=paper,
            gap=gap,
            differences=differences,
            code=tuple(_versions(records.values())),
            diverged=diverged,
        )

    def _differences(self, row: str, column: str, records: Mapping[int, Mapping[str, Any]]) -> tuple[str, ...]:
        """From the paper's setting: those of the settings, and which part of Tiny ImageNet cells started from."""
        cells = {seed: self.cells[row, column, seed] for seed in self.grid.seeds}  # of one setting
        parts = [_part_of_source(cells[seed], record["result"]) for seed, record in records.items()]
        settings = cells[self.grid.seeds[0]].differences
        return tuple(dict.fromkeys([*settings, *(text for texts in parts for text in texts)]))

    def _read(self, path: Path, cell: Cell) -> dict[str, Any]:
        record = read_record(path)
        recorded, needs = record["result"]["config"], record["needs"]
        own = record["row"], record["column"], record["seed"]
        # A setting that the record's version did not know: the file's name says that the cell has it at its default.
        # References to needs are compared by id, below.
        before = dataclasses.replace(
            cell.config, **{k: v for k, v in recorded.items() if k in SETTINGS and k not in cell.needs}
        )
        differing = changes(before, cell.config)
        if own != cell.place or recorded.get("seed") != cell.seed:
            differing.append(f"it is of {own}")
        if needs != cell.need_ids:
            differing.append("it started from another φ or network")
        if differing:
            raise UserError(f"{path}: holds other settings than its name says ({'; '.join(differing)}); remove it")
        return record

    def _read_diverged(self, path: Path, cell: Cell) -> dict[str, Any]:
        found = read_diverged(path)
        if (found["row"], found["column"], found["seed"]) != cell.place or found["needs"] != cell.need_ids:
            raise UserError(f"{path}: is of another training than its name says; remove it")
        return found

    def _check_data(self) -> None:
        first: dict[str, Path] = {}
        data_of = {place: record["result"]["target"]["fingerprints"] for place, record in self.records.items()}
        data_of |= {place: found["fingerprints"] for place, found in self.diverged.items()}
        for place, data in data_of.items():
            cell, column = self.cells[place], place[1]
            path = self.path(cell) if place in self.records else self.diverged_path(cell)
            if self.images.setdefault(column, data) != data:
                raise UserError(
                    f"{path}: trained or evaluated on other images than {first[column].name}, and a column mixes no "
                    "data; remove one"
                )
            first.setdefault(column, path)


def _part_of_source(cell: Cell, result: Mapping[str, Any]) -> Iterator[str]:
    """For each φ or network that a cell started from and that saw a part of Tiny ImageNet only: how many images."""
    for key, need in cell.needs.items():
        made = result.get("phi_card" if key == "phi" else "init") or {}
        data = made.get("source") if key == "phi" else (made.get("run") or {}).get("data")
        if not data or not str(data.get("name")).startswith("tiny_imagenet"):
            continue
        images, all_ = data.get("images", data.get("train")), IMAGES_A_CLASS * data.get("classes", CLASSES)
        if images != all_:
            yield f"{need.name}: images: {all_} → {images}"


def _versions(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """`"commit (digest)"` of each version of the package; commits between which it did not change count as one."""
    found: dict[str | None, str] = {}
    for result in (record["result"] for record in records):
        found.setdefault(result.get("code") or result.get("commit"), _version(result))
    return sorted(found.values())


def _version(result: Mapping[str, Any]) -> str:
    return f"{result.get('commit') or 'no commit'} ({result.get('code') or 'no digest'})"


def read_all(folder: Path) -> Iterator[dict[str, Any]]:
    """What is recorded of the trainings in a folder, and of those that diverged.

    Raises:
        UserError: a record is damaged.
    """
    yield from map(read_record, folder.glob("*--*.json"))
    yield from map(read_diverged, folder.glob(f"{DIVERGED}/*--*.json"))


def take_recorded(grid: Grid, folder: Path) -> list[Need]:
    """Let what the command line gives nothing for be what the records in `folder` started from; returns these needs.

    It is for reports: of a φ or network that was given for those trainings there is what was kept of its making, not
    the file. Where records started from several, or from one that a run of the table made, none is taken.

    Raises:
        UserError: a record is damaged.
    """
    started = {id_ for record in read_all(folder) for id_ in record["needs"].values()}
    taken = []
    for name, program in grid.runs_not_given().items():
        ids = [id_ for id_ in started if (content := content_of(id_)) and id_ in (name, f"{name}-{content}")]
        if len(ids) != 1 or "-seed" in ids[0]:
            continue
        kept = folder / "needs" / f"{ids[0]}.json"
        card = {key: value for key, value in load_json(kept).items() if key != "need"} if kept.exists() else {}
        taken.append(Need(name, ids[0], config=config_of(program, card), file=Path(ids[0]), card=card))
        grid.give(taken[-1])
    return taken


def keep_need_records(needs: Iterable[Need], runs: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Copy what is known of the runs that cells start from beside the cells' records: id → `result.json`."""
    kept = {}
    for need in needs:
        path = folder / "needs" / f"{need.id}.json"
        made = runs / need.id / "result.json"
        known = load_json(made) if need.program is not None and made.exists() else need.card
        if not path.exists() and known:
            save_json({"need": need.name, **shortened(known)}, path)
        if path.exists():
            kept[need.id] = load_json(path)
    return kept
