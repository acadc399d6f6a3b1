"""A table of the paper as data: a YAML file of rows × columns × seeds, and the training runs it stands for.

docs/experiments.md says what is in the file.
"""

import dataclasses
import difflib
import functools
import hashlib
import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metaperturb.config import MetaTestConfig, MetaTrainConfig, from_record, load_config, read_yaml
from metaperturb.errors import UserError
from metaperturb.identity import INCIDENTAL, differences, fingerprint, image_size
from metaperturb.storage import load_json
from metaperturb.weights import find_phi, load_phi, phi_digest

PROGRAMS = {"meta_train": MetaTrainConfig, "meta_test": MetaTestConfig}
_settings_in = functools.cache(read_yaml)
REFERENCE = re.compile(r"\$\{(\w+)\}")
VERSUS = "versus"  # of a row: what it is compared with
ABOUT = {VERSUS, "stands_for", "comparable"}  # what rows and columns say beside settings of the training
# Settings that --set cannot give to cells, and how they are given.
GIVEN_OTHERWISE = {"seed": "--seeds", "gpu": "--devices", "run_dir": "--runs", "data_root": "--data-root"}
GIVEN_OTHERWISE |= {"phi": "--use", "init": "--use"}


# --- what may stand in the file: an expectation and its test; [each]; {name: …, "name?": may be absent, ...: any other
# name}; or a function of the value that says which


def chosen(each: Any) -> Any:
    """Names, or others in their place."""
    return lambda value: {...: each} if isinstance(value, Mapping) else [TEXT]


TEXT = "text", lambda value: isinstance(value, str)
TRUTH = "true or false", lambda value: isinstance(value, bool)
ANYTHING = "anything", lambda value: True
LIST = "a list of names", lambda value: isinstance(value, list)
LINES = "'name: value' lines", lambda value: isinstance(value, Mapping)
SEEDS = "a list of whole numbers", lambda value: re.fullmatch(r"\[\d+(, \d+)*\]", str(value))
NUMBER = "numbers such as 66.78±0.59", lambda value: re.match(r"[\d.]+(±|$)|None$", str(value))
SETTINGS = {...: ANYTHING}
COLUMN = {"stands_for?": TEXT, "comparable?": TRUTH, ...: ANYTHING}
FILE = dict.fromkeys(("file", "sha256", "hint"), TEXT)
PROGRAM = " or ".join(PROGRAMS), lambda value: value in [*PROGRAMS]
RUN = {"program": PROGRAM, "config": TEXT, "set?": SETTINGS, "like?": [TEXT]}
PRESET = {
    **{"set?": SETTINGS, "seeds?": SEEDS, "needs?": {...: SETTINGS}, "columns?": chosen(COLUMN)},
    **{"rows?": chosen(SETTINGS), "also?": {...: SETTINGS}, "comparable?": TRUTH, "tuned?": TEXT},
}
GRID = {
    **{"title": TEXT, "config": TEXT, "set": SETTINGS, "seeds": SEEDS, "columns": {...: COLUMN}},
    "needs": {...: lambda value: FILE if isinstance(value, Mapping) and "file" in value else RUN},
    **{"rows": {...: SETTINGS}, "candidates": {...: {...: [ANYTHING]}}, "baselines": [TEXT], "paper": {...: [NUMBER]}},
    "presets": {...: PRESET},
}
MAY_LACK = {key: {} for key in ("set", "needs", "rows", "candidates", "paper")} | {"baselines": []}


def check(where: str, value: Any, kind: Any) -> None:
    """Refuse what cannot stand at this place (`configs/table1.yaml: rows: Base`)."""
    kind = kind(value) if callable(kind) else kind
    if isinstance(kind, list):
        check(where, value, LIST)
        for item in value:
            check(where, item, kind[0])
    elif isinstance(kind, dict):
        check(where, value, LINES)
        kinds = {str(name).rstrip("?"): of for name, of in kind.items()}
        if wrong := [name for name in value if not isinstance(name, str)]:
            raise UserError(f"{where}: {wrong[0]!r} is no text; put names like this in quotes")
        check_known(f"{where}: key", () if ... in kind else value, kinds)
        if lacking := [name for name in kind if name in kinds and name not in value]:
            raise UserError(f"{where}: lacks {lacking[0]!r}")
        for name, content in value.items():
            check(f"{where}: {name}", content, kinds.get(name, kind.get(...)))
    elif not kind[1](value):
        raise UserError(f"{where}: expected {kind[0]}, got {value!r:.60}")


def check_known(what: str, names: Iterable[Any], known: Iterable[Any]) -> None:
    """Refuse a name that is not among those that are known, and say which may be meant."""
    known = [*known]
    for name in names:
        if name not in known:
            texts = [str(one) for one in known]
            near = difflib.get_close_matches(str(name), texts, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f" ({', '.join(texts)})"
            raise UserError(f"{what} {name!r} is unknown{hint}")


# --- the trainings


@dataclass(frozen=True)
class Need:
    """What cells start from: the outcome of a run (`config` is set), or a file."""

    name: str
    id: str
    program: str | None = None
    config: Any = None
    file: Path | None = None
    hint: str = ""
    sha256: str = ""

    def outcome(self, folder: Path) -> Path:
        """What a setting that refers to it becomes; `folder`: where the runs of needs are."""
        if self.file is not None:
            return self.file
        return folder / self.id / "phi.pt" if self.program == "meta_train" else folder / self.id


@dataclass(frozen=True)
class Cell:
    """One training run of a table: a row, a column and a seed."""

    row: str
    column: str
    seed: int
    id: str
    config: MetaTestConfig  # settings that refer to a need hold its id
    needs: Mapping[str, Need]  # setting → what it refers to
    differences: tuple[str, ...]  # from the paper's setting, "steps: 10000 → 1500"; empty: at it

    @property
    def place(self) -> tuple[str, str, int]:
        return self.row, self.column, self.seed

    @property
    def need_ids(self) -> dict[str, str]:
        return {key: need.id for key, need in self.needs.items()}


@dataclass(eq=False)
class Grid:
    """One preset of a table; a `UserError` names what is wrong with its file or with what the command line changes."""

    path: Path
    preset: str = "paper"
    sets: Sequence[str] = ()  # `steps=100` for all cells, `phi.steps=100` for the need `phi`
    files: Mapping[str, Path] = field(default_factory=dict)  # need → a file or run folder to use in its place
    paths: Mapping[str, str] = field(default_factory=dict)  # column, or need that is a run → where its data are
    data_root: str = "data"
    tuned_path: Path | None = None  # hyperparameters in place of the preset's

    def __post_init__(self) -> None:
        self.name, path, preset = self.path.stem, self.path, self.preset
        content = MAY_LACK | read_yaml(path)
        check(str(path), content, GRID)
        check_known(f"{path}: preset", [preset], content["presets"])
        chosen = content["presets"][preset]
        self.title, self.needs, self.baselines = content["title"], dict(content["needs"]), content["baselines"]
        self.seeds: list[int] = [*dict.fromkeys(chosen.get("seeds", content["seeds"]))]
        self.settings = content["set"] | chosen.get("set", {})
        self.tunes = bool(content["candidates"])  # what hyperparameters to take is what it asks
        content["rows"] = content["rows"] | candidate_rows(content["candidates"])
        self.rows = self._pick("row", content["rows"], chosen.get("rows")) | chosen.get("also", {})
        columns = self._pick("column", content["columns"], chosen.get("columns"))
        usual = {"comparable": chosen.get("comparable", True)}
        self.columns = {name: {"stands_for": name, **usual, **own} for name, own in columns.items()}
        number = len(content["columns"])
        if wrong := [row for row, numbers in content["paper"].items() if len(numbers) != number]:
            raise UserError(f"{path}: paper: {wrong[0]}: expected {number} values, one a column")
        self.paper = {row: dict(zip(content["columns"], of, strict=True)) for row, of in content["paper"].items()}
        versus = [row[VERSUS] for row in self.rows.values() if VERSUS in row]
        for what, names in (("paper", self.paper), ("baselines", self.baselines), (VERSUS, versus)):
            check_known(f"{path}: {what}: row", names, content["rows"] | self.rows)
        stand_ins = [own["stands_for"] for own in columns.values() if "stands_for" in own]
        check_known(f"{path}: stands_for: column", stand_ins, content["columns"])
        self._base, self._preset_needs = content["config"], chosen.get("needs", {})
        check_known(f"{path}: presets: {preset}: need", self._preset_needs, self.needs)
        if "tuned" in chosen:
            self.tuned_path = self.tuned_path or path.parent.parent / chosen["tuned"]
        self.tuned = read_tuned(self.tuned_path, self.columns) if self.tuned_path else {}
        self.untuned = [column for column in self.columns if self.tuned_path and column not in self.tuned]
        self._sets: dict[str, list[str]] = {"": []}  # need, or "" for cells → texts
        for text in self.sets:
            name, text_of_need = re.match(r"(?:(\w+)\.)?(.*)", text, re.DOTALL).groups("")
            check_known(f"--set {text}: need", [name], ["", *self.needs])
            if not name and (key := text.partition("=")[0].strip()) in GIVEN_OTHERWISE:
                raise UserError(f"--set {text}: is given by {GIVEN_OTHERWISE[key]}")
            self._sets.setdefault(name, []).append(text_of_need)
        check_known("--use: need", self.files, self.needs)
        runs = [name for name, spec in self.needs.items() if "program" in spec]
        check_known("--path: column or need", self.paths, [*self.columns, *runs])
        self.given = {name: given_need(name, path, self.needs[name]) for name, path in self.files.items()}

    def cells(self) -> list[Cell]:
        """All of them, seed by seed, so that a table that is interrupted has every row."""
        return [self.cell(row, column, seed) for seed in self.seeds for column in self.columns for row in self.rows]

    def add_row(self, row: str, name: str, file: Path | None = None) -> None:
        """A further row: MetaPerturb with the φ that is called so, in this file if it is still there."""
        self.needs[name] = self.papers.needs[name] = {"program": "meta_train", "config": "src.yaml"}
        self.rows[row] = {"method": "metaperturb", "phi": f"${{{name}}}"}
        if file is not None:
            self.given[name] = given_need(name, file, self.needs[name])

    def baseline(self, row: str) -> str | None:
        """The row that `row` is compared with: the one it names, else the nearest baseline above it, itself none."""
        if VERSUS in self.rows[row] or row in self.baselines:
            return self.rows[row].get(VERSUS)
        above = itertools.takewhile(lambda name: name != row, self.rows)
        return next((name for name in reversed([*above]) if name in self.baselines), None)

    def paper_value(self, row: str, column: str) -> str | None:
        """What the paper reports, `"66.78±0.59"`."""
        value = self.paper.get(row, {}).get(self.columns[column]["stands_for"])
        return None if value is None else str(value)

    @functools.cached_property
    def papers(self) -> "Grid":
        """The same table at the paper's settings."""
        return Grid(self.path, data_root=self.data_root)

    def cell(self, row: str, column: str, seed: int) -> Cell:
        """One training: its settings are those of the preset, then of the column, of the row, tuned ones, the seed."""
        place, given = f"{row}, {column}", {"seed": seed}
        if column in self.paths:
            given["target_path"] = self.paths[column]
        settings = self._merged(column, self.settings, self.columns[column], self.rows[row])
        config, needs = self._resolve(settings | given, place)
        id_ = f"{slug(row)}--{slug(column)}--seed{seed}--{fingerprint('meta_test', config)}"
        papers = self.papers  # of what it is there, or stands for
        standard = papers.columns.get(self.columns[column]["stands_for"], {})
        settings = self._merged(column, papers.settings, standard, papers.rows.get(row, self.rows[row]))
        changed = departures((config, needs), papers._resolve(settings, place))
        return Cell(row, column, seed, id_, config, needs, tuple(changed))

    # --- the parts

    def _merged(self, column: str, *layers: Mapping[str, Any]) -> dict[str, Any]:
        """Settings, with those that were tuned for the method of a cell and the methods that its recipe adds."""
        settings = {key: value for layer in layers for key, value in layer.items() if key not in ABOUT}
        for method in [*settings.get("recipe", []), settings.get("method")]:
            settings |= self.tuned.get(column, {}).get(method, {})
        return settings

    def _resolve(self, settings: Mapping[str, Any], place: str) -> tuple[MetaTestConfig, dict[str, Need]]:
        """A cell's configuration, in which ids stand for needs, and setting → need."""
        references = {key: REFERENCE.fullmatch(value) for key, value in settings.items() if isinstance(value, str)}
        needs = {key: self._need(match[1], settings) for key, match in references.items() if match}
        values = {**settings, **{key: need.id for key, need in needs.items()}}
        return self._config("meta_test", self._base, values, self._sets[""], place), needs

    def _need(self, name: str, settings: Mapping[str, Any]) -> Need:
        check_known(f"{self.path}: need", [name], self.needs)
        if name in self.given:
            return self.given[name]
        spec = self.needs[name]
        if "file" in spec:
            file = Path(self.data_root).expanduser() / spec["file"]
            return Need(name, f"{name}-{spec['sha256'][:8]}", file=file, hint=spec["hint"], sha256=spec["sha256"])
        program = spec["program"]
        like = {key: settings[key] for key in spec.get("like", []) if key in settings}
        values = {**spec.get("set", {}), **like, **self._preset_needs.get(name, {})}
        if path := self.paths.get(name):
            values |= {"source_paths": path.split(",")} if program == "meta_train" else {"target_path": path}
        config = self._config(program, spec["config"], values, self._sets.get(name, ()), f"needs: {name}")
        return Need(name, f"{name}-seed{config.seed}-{fingerprint(program, config)}", program, config)

    def _config(self, program: str, file: str, values: Mapping[str, Any], texts: Iterable[str], place: str) -> Any:
        values = {**_settings_in(self.path.parent / file), **values, "data_root": self.data_root}
        return load_config(PROGRAMS[program], None, texts, values, f"{self.path}: {place}")

    def _pick(self, kind: str, known: Mapping[str, Any], chosen: Any) -> dict[str, Any]:
        if chosen is None or isinstance(chosen, Mapping):
            return dict(known if chosen is None else chosen)
        check_known(f"{self.path}: presets: {self.preset}: {kind}", chosen, known)
        return {name: known[name] for name in known if name in chosen}


Resolved = tuple[MetaTestConfig, Mapping[str, Need]]


def departures(ours: Resolved, papers: Resolved) -> Iterable[str]:
    """How a cell departs from the paper's setting; what both start from is compared setting by setting."""
    (config, needs), (standard, their_needs) = ours, papers
    config, standard = (dataclasses.replace(some, image_size=image_size(some)) for some in (config, standard))
    both = [key for key in needs if key in their_needs]
    yield from differences(vars(standard), config, without=INCIDENTAL.union(both))
    for need, theirs in ((needs[key], their_needs[key]) for key in both):
        if need.config is not None:
            for change in differences(vars(theirs.config), need.config, without=INCIDENTAL):
                yield f"{theirs.name}: {change}"
        elif need.id != theirs.id:
            yield f"{theirs.name}: {need.file.name}, of which nothing is recorded"


def given_need(name: str, path: Path, spec: Mapping[str, Any]) -> Need:
    """A file, run folder or shipped φ that the command line gives in place of a run; identified by its content."""
    is_run, program, card = path.is_dir(), spec.get("program"), None  # card: of its making, to hold it to the paper's
    if program == "meta_train":
        path = path / "phi.pt" if (path / "result.json").is_file() else find_phi(path)
        phi = load_phi(path)
        card, content = phi.card, phi_digest(phi)
    else:
        file = path / "checkpoints" / "latest.pt" if is_run else path
        if not file.is_file() or (is_run and not (path / "result.json").is_file()):
            raise UserError(f"--use {name}={path}: no such file or finished run")
        content, card = sha256(file), load_json(path / "result.json") if is_run else None
    id_ = name if name.endswith(f"_{content:.8}") else f"{name}-{content:.8}"
    return Need(name, id_, config=config_of(program, card) if program else None, file=path)


def config_of(program: str, card: Any) -> Any:
    """The settings in what is recorded of a run; None where there are none."""
    settings = card.get("config") if isinstance(card, Mapping) else None
    return from_record(PROGRAMS[program], settings) if settings and isinstance(settings, Mapping) else None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def candidate_rows(candidates: Mapping[str, Mapping[str, Sequence[Any]]]) -> dict[str, dict[str, Any]]:
    """A row for each combination of each method's values: `dropout: dropout_prob 0.1`."""
    rows = {}
    for method, values in candidates.items():
        for combination in itertools.product(*values.values()):
            settings = dict(zip(values, combination, strict=True))
            name = ", ".join(f"{key} {value}" for key, value in settings.items())
            rows[f"{method}: {name}"] = {"method": method, **settings}
    return rows


def read_tuned(path: Path, columns: Collection[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Hyperparameters that tuning chose: column → method → settings, of the columns that were tuned, at least one."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; ./run.sh tune writes it")
    content = load_json(path)
    chosen = content.get("chosen") if isinstance(content, dict) else None
    tuned = {column: chosen[column] for column in columns if column in (chosen or ())}
    if not tuned:
        raise UserError(f"{path}: nothing was tuned for {', '.join(columns)}; ./run.sh tune does it")
    return tuned


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
