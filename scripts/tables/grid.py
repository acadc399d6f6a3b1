"""A table of the paper as data: a YAML file of rows × columns × seeds, and the training runs it stands for.

    title: what the table shows
    config: tgt.yaml             # settings of every cell, a file beside this one; then `set`, column, row
    set: {threads: 1}
    seeds: [0, 1, 2]
    needs:                       # what cells start from, made once: ${name} in a setting stands for its outcome
      phi: {program: meta_train, config: src.yaml, set: {…}}      # phi.pt of that run
      pretrained: {program: meta_test, config: pretrain.yaml, like: [model]}  # its run folder; model as in the cell
      authors: {file: phi.pth, sha256: …, hint: where to get it}  # a file under data_root
    columns: {STL10: {target: stl10}, …}
    rows: {Base: {method: base}, MetaPerturb: {method: metaperturb, phi: "${phi}"}, …}
    candidates: {dropout: {dropout_prob: [0.1, 0.2]}, …}          # to tune: further rows, every combination of a method
    baselines: [Base]            # each row is compared with the nearest of these above it, or with `versus: <row>`
    paper: {Base: ["66.78±0.59", …], …}                           # a value a column; null: none reported
    presets:
      paper: {}                  # what the others are measured against
      quick: {set: …, seeds: …, needs: {phi: {steps: 100}}, rows: [names] , columns: [names] or {name: settings},
              also: {another row, or settings of one: settings},
              tuned: file that ./run.sh tune wrote}

A column that stands in for one of the paper says so: `stands_for: CUB`, and `comparable: false` (of a preset: for all
its columns) where the data differ so much that a difference between the numbers would mean nothing.
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
from typing import Any, NamedTuple

from metaperturb.config import MetaTestConfig, MetaTrainConfig, from_record, load_config, read_yaml
from metaperturb.errors import UserError
from metaperturb.identity import INCIDENTAL, differences, fingerprint, image_size
from metaperturb.storage import load_json
from metaperturb.weights import find_phi, load_phi, phi_digest

PROGRAMS = {"meta_train": MetaTrainConfig, "meta_test": MetaTestConfig}
_settings_in = functools.cache(read_yaml)
REFERENCE = re.compile(r"\$\{(\w+)\}")
VERSUS = "versus"  # of a row: what it is compared with
# Settings that --set cannot give to cells, and how they are given.
GIVEN_OTHERWISE = {"seed": "--seeds", "gpu": "--devices", "run_dir": "--runs", "data_root": "--data-root"}
GIVEN_OTHERWISE |= {"phi": "--use", "init": "--use"}


# --- the file


class Column(NamedTuple):
    settings: Mapping[str, Any]
    stands_for: str | None
    comparable: bool | None


def check_known(what: str, names: Iterable[Any], known: Iterable[Any]) -> None:
    """Refuse a name that is not among those that are known, and say which may be meant."""
    known = [*known]
    for name in names:
        if name not in known:
            texts = [str(one) for one in known]
            near = difflib.get_close_matches(str(name), texts, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f" ({', '.join(texts)})"
            raise UserError(f"{what} {name!r} is unknown{hint}")


def checked(where: str, value: Any, kind: Any) -> Any:
    """The value at this place (`configs/table1.yaml: rows: Base`), which must be of this kind.

    That is a type; `[kind]`: a list; `{name: kind, "name?": one that may be left out, ...: any other}`; or a function
    of place and value.
    """
    if isinstance(kind, list):
        return [checked(where, item, kind[0]) for item in checked(where, value, list)]
    if isinstance(kind, dict):
        kinds = {str(name).rstrip("?"): of for name, of in kind.items()}
        content = checked(where, {} if value is None else value, Mapping)
        if wrong := [name for name in content if not isinstance(name, str) or not name]:
            raise UserError(f"{where}: {wrong[0]!r} is no text; put names like this in quotes")
        check_known(f"{where}: key", content if ... not in kind else (), kinds)
        if lacking := [name for name in kind if name in kinds and name not in content]:
            raise UserError(f"{where}: lacks {lacking[0]!r}")
        return {name: checked(f"{where}: {name}", of, kinds.get(name, kind.get(...))) for name, of in content.items()}
    if not isinstance(kind, type):
        return kind(where, value)
    if not isinstance(value, kind):
        expected = {str: "text", bool: "true or false", list: "a list of names", Mapping: "'name: value' lines"}[kind]
        raise UserError(f"{where}: expected {expected}, got {value!r:.60}")
    return value


def chosen(each: Any) -> Any:
    """Names, or others in their place."""
    return lambda where, value: checked(where, value, {...: each} if isinstance(value, Mapping) else [str])


def seeds(where: str, value: Any) -> list[int]:
    if isinstance(value, list) and value and all(type(seed) is int and seed >= 0 for seed in value):
        return list(dict.fromkeys(value))
    raise UserError(f"{where}: expected a list of whole numbers, got {value!r}")


def number(where: str, value: Any) -> str | None:
    """What the paper reports: `66.78±0.59`, or null."""
    try:
        float(str(0 if value is None else value).partition("±")[0])
    except ValueError:
        raise UserError(f"{where}: expected numbers such as 66.78±0.59, got {value!r}") from None
    return None if value is None else str(value)


def need(where: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping) and "file" in value:
        return checked(where, value, dict.fromkeys(("file", "sha256", "hint"), str))
    content = checked(where, value, {"program": str, "config": str, "set?": SETTINGS, "like?": [str]})
    check_known(f"{where}: program", [content["program"]], PROGRAMS)
    return content


def column(where: str, value: Any) -> Column:
    settings = checked(where, value, {"stands_for?": str, "comparable?": bool, ...: object})
    return Column(settings, settings.pop("stands_for", None), settings.pop("comparable", None))


SETTINGS = {...: object}
PRESET = {
    **{"set?": SETTINGS, "seeds?": seeds, "needs?": {...: SETTINGS}, "columns?": chosen(column)},
    **{"rows?": chosen(SETTINGS), "also?": {...: SETTINGS}, "comparable?": bool, "tuned?": str},
}
GRID = {
    **{"title": str, "config": str, "set": SETTINGS, "seeds": seeds, "needs": {...: need}, "columns": {...: column}},
    **{"rows": {...: SETTINGS}, "candidates": {...: {...: [object]}}, "baselines": [str], "paper": {...: [number]}},
    "presets": {...: PRESET},
}


def read_grid(path: Path) -> dict[str, Any]:
    """The content, checked, with every part that a grid may leave out filled in."""
    empty = {key: {} for key in ("set", "needs", "rows", "candidates", "paper")} | {"baselines": []}
    content = checked(str(path), empty | read_yaml(path), GRID)
    columns = content["columns"]
    for row, numbers in content["paper"].items():
        if len(numbers) != len(columns):
            raise UserError(f"{path}: paper: {row}: has {len(numbers)} values for {len(columns)} columns")
    for preset in (content, *content["presets"].values()):
        own = preset.get("columns", {})
        stand_ins = [some.stands_for for some in own.values()] if isinstance(own, Mapping) else []
        check_known(f"{path}: stands_for: column", filter(None, stand_ins), columns)
    return content


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


@dataclass(frozen=True)
class Overrides:
    """What the command line changes: `steps=100` for cells, `phi.steps=100` for the need `phi`."""

    settings: tuple[str, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)  # need → a file or run folder to use in its place
    paths: Mapping[str, str] = field(default_factory=dict)  # column, or need that is a run → where its data are
    data_root: str = "data"
    tuned: Path | None = None


class Grid:
    """One preset of a table; a `UserError` names what is wrong with its file or the overrides of the command line."""

    def __init__(self, path: Path, preset: str = "paper", overrides: Overrides = Overrides()) -> None:
        self.path, self.name, self.preset, self.overrides = path, path.stem, preset, overrides
        content = read_grid(path)
        check_known(f"{path}: preset", [preset], content["presets"])
        chosen = content["presets"][preset]
        self.title, self.needs, self.baselines = content["title"], content["needs"], content["baselines"]
        self._base = path.parent / content["config"]
        load_config(MetaTestConfig, str(self._base))
        self.seeds: list[int] = chosen.get("seeds", content["seeds"])
        self.settings = {**content["set"], **chosen.get("set", {})}
        self.tunes = bool(content["candidates"])  # what hyperparameters to take is what it asks
        rows = content["rows"] | candidate_rows(content["candidates"])
        self.rows = self._pick("row", rows, chosen.get("rows")) | chosen.get("also", {})
        columns = self._pick("column", content["columns"], chosen.get("columns"))
        comparable = chosen.get("comparable", True)
        self.columns = {
            name: Column(own, stands_for or name, comparable if said is None else said)
            for name, (own, stands_for, said) in columns.items()
        }
        self.paper = {row: dict(zip(content["columns"], of, strict=True)) for row, of in content["paper"].items()}
        versus = [row[VERSUS] for row in self.rows.values() if VERSUS in row]
        for what, names in (("paper", self.paper), ("baselines", self.baselines), (VERSUS, versus)):
            check_known(f"{path}: {what}: row", names, rows | self.rows)
        self._of_paper = content["columns"], rows, content["set"]
        self._preset_needs = chosen.get("needs", {})
        check_known(f"{path}: presets: {preset}: need", self._preset_needs, self.needs)
        self.tuned_path = overrides.tuned or (path.parent.parent / chosen["tuned"] if "tuned" in chosen else None)
        self.tuned = read_tuned(self.tuned_path, self.columns) if self.tuned_path else {}
        self.untuned = [column for column in self.columns if self.tuned_path and column not in self.tuned]
        self._apply_command_line()

    def cells(self) -> list[Cell]:
        """All of them, seed by seed, so that a table that is interrupted has every row."""
        order = [(row, column, seed) for seed in self.seeds for column in self.columns for row in self.rows]
        first: dict[str, Cell] = {}
        for cell in (self.cell(*place) for place in order):
            if (other := first.setdefault(cell.id, cell)) is not cell:
                what = " and ".join(f"{c.row!r} on {c.column!r}" for c in (other, cell))
                raise UserError(f"{self.path}: {what}: the same settings under names that make the same file name")
        return [*first.values()]

    def add_phi(self, row: str, path: Path) -> None:
        """A further row: MetaPerturb with the φ in a file."""
        if row in self.rows:
            raise UserError(f"{self.path}: has a row {row!r} already; rename the folder of this φ")
        name = f"phi_{phi_digest(load_phi(path)):.8}"  # whichever others come before it, its cells keep their names
        self.add_row(row, name)
        self.given[name] = given_need(name, path, self.needs[name])

    def add_row(self, row: str, name: str) -> None:
        """A further row: MetaPerturb with the φ that `add_phi` called so when it had the file."""
        self.needs = {**self.needs, name: {"program": "meta_train", "config": "src.yaml"}}
        self.rows[row] = {"method": "metaperturb", "phi": f"${{{name}}}"}

    def baseline(self, row: str) -> str | None:
        """The row that `row` is compared with: the one it names, else the nearest baseline above it, itself none."""
        if VERSUS in self.rows[row] or row in self.baselines:
            return self.rows[row].get(VERSUS)
        above = itertools.takewhile(lambda name: name != row, self.rows)
        return next((name for name in reversed([*above]) if name in self.baselines), None)

    def paper_value(self, row: str, column: str) -> str | None:
        """What the paper reports, `"66.78±0.59"`."""
        return self.paper.get(row, {}).get(self.columns[column].stands_for)

    def cell(self, row: str, column: str, seed: int) -> Cell:
        """One training: its settings are those of the preset, then of the column, of the row, tuned ones, the seed."""
        settings = {**self.settings, **self.columns[column].settings, **self.rows[row]}
        settings |= {**self._tuned_values(column, settings), "seed": seed}
        if column in self.overrides.paths:
            settings["target_path"] = self.overrides.paths[column]
        config, needs = self._resolve(settings, f"{row}, {column}", used=True)
        id_ = f"{slug(row)}--{slug(column)}--seed{seed}--{fingerprint('meta_test', config)}"
        return Cell(row, column, seed, id_, config, needs, tuple(self._differences(row, column, config, needs)))

    # --- the parts

    def _tuned_values(self, column: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Of the method of a cell, and of those that its recipe adds."""
        chosen = self.tuned.get(column, {})
        methods = [*settings.get("recipe", []), str(settings.get("method"))]
        return {key: value for method in methods for key, value in chosen.get(method, {}).items()}

    def _apply_command_line(self) -> None:
        self._cell_texts, self._need_texts = [], {}
        for text in self.overrides.settings:
            key, separator, _ = text.partition("=")
            need, dot, _ = key.partition(".")
            if separator and dot:
                check_known(f"--set {text}: need", [need], self.needs)
                self._need_texts.setdefault(need, []).append(text[len(need) + 1 :])
            elif key.strip() in GIVEN_OTHERWISE:
                raise UserError(f"--set {text}: is given by {GIVEN_OTHERWISE[key.strip()]}")
            else:
                self._cell_texts.append(text)
        check_known("--use: need", self.overrides.files, self.needs)
        runs = [name for name, spec in self.needs.items() if "program" in spec]
        check_known("--path: column or need", self.overrides.paths, [*self.columns, *runs])
        self.given = {name: given_need(name, path, self.needs[name]) for name, path in self.overrides.files.items()}

    def _resolve(self, settings: Mapping[str, Any], place: str, used: bool) -> tuple[MetaTestConfig, dict[str, Need]]:
        """A cell's configuration, in which ids stand for needs, and setting → need; `used`: see `_need`."""
        references = {key: REFERENCE.fullmatch(value) for key, value in settings.items() if isinstance(value, str)}
        needs = {key: self._need(match[1], settings, used) for key, match in references.items() if match}
        values = {**_settings_in(self._base), **settings, **{key: need.id for key, need in needs.items()}}
        values.pop(VERSUS, None)
        texts = self._cell_texts if used else ()
        config = load_config(MetaTestConfig, None, texts, values, f"{self.path}: {place}")
        return dataclasses.replace(config, data_root=self.overrides.data_root), needs

    def _need(self, name: str, settings: Mapping[str, Any], used: bool) -> Need:
        """`used`: as this preset and the command line have it; otherwise as the paper has it."""
        check_known(f"{self.path}: need", [name], self.needs)
        if used and name in self.given:
            return self.given[name]
        spec, texts = self.needs[name], []
        if "file" in spec:
            file = Path(self.overrides.data_root).expanduser() / spec["file"]
            return Need(name, f"{name}-{spec['sha256'][:8]}", file=file, hint=spec["hint"], sha256=spec["sha256"])
        like = {key: settings[key] for key in spec.get("like", []) if key in settings}
        values = {**_settings_in(self.path.parent / spec["config"]), **spec.get("set", {}), **like}
        if used:
            values |= self._preset_needs.get(name, {})
            texts = self._need_texts.get(name, [])
            if path := self.overrides.paths.get(name):
                of_source = spec["program"] == "meta_train"
                values |= {"source_paths": path.split(",")} if of_source else {"target_path": path}
        config = load_config(PROGRAMS[spec["program"]], None, texts, values, f"{self.path}: needs: {name}")
        config = dataclasses.replace(config, data_root=self.overrides.data_root)
        return Need(name, f"{name}-seed{config.seed}-{fingerprint(spec['program'], config)}", spec["program"], config)

    def _differences(self, row: str, column: str, config: MetaTestConfig, needs: Mapping[str, Need]) -> Iterable[str]:
        """How a cell departs from the paper's setting of the cell that it is, or stands for."""
        columns, rows, shared = self._of_paper
        standard = columns.get(self.columns[column].stands_for)
        settings = {**shared, **(standard.settings if standard else {}), **rows.get(row, self.rows[row])}
        settings |= self._tuned_values(column, settings)
        paper, paper_needs = self._resolve(settings, f"{row}, {column}", used=False)
        paper, ours = (dataclasses.replace(some, image_size=image_size(some)) for some in (paper, config))
        both = [key for key in needs if key in paper_needs]  # compared setting by setting
        yield from differences(vars(paper), ours, without=INCIDENTAL.union(both))
        for need, theirs in ((needs[key], paper_needs[key]) for key in both):
            if need.config is not None:
                changed = differences(vars(theirs.config), need.config, without=INCIDENTAL)
                yield from (f"{theirs.name}: {change}" for change in changed)
            elif need.id != theirs.id:
                yield f"{theirs.name}: {need.file.name}, of which nothing is recorded"

    def _pick(self, kind: str, known: Mapping[str, Any], chosen: Any) -> dict[str, Any]:
        if chosen is None or isinstance(chosen, Mapping):
            return dict(known if chosen is None else chosen)
        check_known(f"{self.path}: presets: {self.preset}: {kind}", chosen, known)
        return {name: known[name] for name in known if name in chosen}


def given_need(name: str, path: Path, spec: Mapping[str, Any]) -> Need:
    """A file, run folder or shipped φ that the command line gives in place of a run; identified by its content."""
    is_run, program, card = path.is_dir(), spec.get("program"), None  # card: of its making, to hold it to the paper's
    absent = UserError(f"--use {name}={path}: no such file or finished run")
    if is_run and not (path / "result.json").is_file():
        raise absent
    if program == "meta_train":
        path = path / "phi.pt" if is_run else find_phi(path)
        phi = load_phi(path)
        card, content = phi.card, phi_digest(phi)
    else:
        file = path / "checkpoints" / "latest.pt" if is_run else path
        if not file.is_file():
            raise absent
        content = sha256(file)
        card = load_json(path / "result.json") if is_run else None
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
    if not isinstance(chosen, dict):
        raise UserError(f"{path}: holds no choice of hyperparameters; ./run.sh tune writes one")
    tuned = {column: chosen[column] for column in columns if column in chosen}
    if not tuned:
        raise UserError(f"{path}: nothing was tuned for {', '.join(columns)} (tuned: {', '.join(chosen)})")
    return tuned


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
