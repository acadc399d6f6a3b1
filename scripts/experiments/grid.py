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
    baselines: [Base]            # each row is compared with the nearest of these above it
    paper: {Base: ["66.78±0.59", …], …}                           # a value a column; null: none reported
    presets:
      paper: {}                  # what the others are measured against
      quick: {set: …, seeds: …, needs: {phi: {steps: 100}}, rows: [names] , columns: [names] or {name: settings},
              also: {another row: settings}, tuned: file that scripts/tune.py wrote,
              tuned_as: the column it was tuned for, where that is none of the same name}

A column that stands in for one of the paper says so: `stands_for: CUB`, and `comparable: false` (of a preset: for all
its columns) where the data differ so much that a difference between the numbers would mean nothing.
"""

import dataclasses
import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metaperturb.config import MetaTestConfig, MetaTrainConfig, default_of, differences, load_config, read_yaml
from metaperturb.errors import UserError
from metaperturb.storage import load_json
from metaperturb.weights import load_phi

PROGRAMS = {"meta_train": MetaTrainConfig, "meta_test": MetaTestConfig}
REFERENCE = re.compile(r"\$\{(\w+)\}")
# Settings that neither tell two cells of a table apart nor keep one from being at the paper's setting.
INCIDENTAL = {"seed", "threads", "log_every", "eval_every", "eval_samples", "eval_batch_size"}
GRID_KEYS = {
    "title",
    "config",
    "set",
    "seeds",
    "needs",
    "columns",
    "rows",
    "candidates",
    "baselines",
    "paper",
    "presets",
}
PRESET_KEYS = {"set", "seeds", "needs", "columns", "rows", "also", "comparable", "tuned", "tuned_as"}
COLUMN_KEYS = {"stands_for", "comparable"}


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


@dataclass(frozen=True)
class Column:
    settings: Mapping[str, Any]
    stands_for: str
    comparable: bool


@dataclass(frozen=True)
class Overrides:
    """What the command line changes: `steps=100` for cells, `phi.steps=100` for the need `phi`."""

    settings: tuple[str, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)  # need → a file or run folder to use in its place
    paths: Mapping[str, str] = field(default_factory=dict)  # column → where its data are
    data_root: str = "data"
    tuned: Path | None = None


class Grid:
    """One preset of a table.

    Args:
        path: the YAML file.
        preset: one of its presets.
        overrides: of the command line.

    Raises:
        UserError: anything wrong with the file, an unknown preset, setting or name.
    """

    def __init__(self, path: Path, preset: str = "paper", overrides: Overrides = Overrides()) -> None:
        self.path, self.name, self.preset, self.overrides = path, path.stem, preset, overrides
        content = read_yaml(path)
        self._check_keys(content, GRID_KEYS, "")
        presets = content.get("presets") or {}
        for name, value in presets.items():
            self._check_keys(value or {}, PRESET_KEYS, f"presets: {name}: ")
        if preset not in presets:
            raise unknown(f"{self.name}: preset", preset, presets)
        chosen = presets[preset] or {}
        self.title = content["title"]
        self.base = path.parent / content["config"]
        self.seeds: list[int] = self._numbers(chosen.get("seeds", content["seeds"]))
        self.settings = {**content.get("set", {}), **chosen.get("set", {})}
        self.baselines: list[str] = content.get("baselines", [])
        rows = content.get("rows", {}) | candidate_rows(content.get("candidates", {}))
        self.rows = self._pick("row", rows, chosen.get("rows")) | chosen.get("also", {})
        columns = self._pick("column", content["columns"], chosen.get("columns"))
        comparable = chosen.get("comparable", True)
        self.columns = {name: self._column(name, value, comparable) for name, value in columns.items()}
        self.paper = self._paper(content.get("paper", {}), list(content["columns"]))
        self.paper_sources = content["columns"], rows, content.get("set", {})
        self._needs = content.get("needs", {})
        self._preset_needs = chosen.get("needs", {})
        for name in self._preset_needs:
            if name not in self._needs:
                raise unknown(f"{self.path}: presets: {preset}: need", name, self._needs)
        tuned = overrides.tuned or (path.parent.parent / chosen["tuned"] if "tuned" in chosen else None)
        self.tuned_path = tuned
        self.tuned = read_tuned(tuned, self.columns, chosen.get("tuned_as")) if tuned else {}
        self._apply_command_line()

    def cells(self) -> list[Cell]:
        """All of them, seed by seed, so that a table that is interrupted has every row."""
        order = [(row, column, seed) for seed in self.seeds for column in self.columns for row in self.rows]
        return [self.cell(*place) for place in order]

    def add_phi(self, row: str, path: Path) -> None:
        """A further row: MetaPerturb with the φ in a file."""
        name = f"phi{len(self._needs)}"
        self._needs = {**self._needs, name: {"program": "meta_train", "config": "src.yaml"}}
        self._given[name] = path
        self.rows[row] = {"method": "metaperturb", "phi": f"${{{name}}}"}

    def baseline(self, row: str) -> str | None:
        """The row that `row` is compared with: the nearest baseline above it, itself none."""
        found = None
        for name in self.rows:
            if name == row:
                return None if name in self.baselines else found
            found = name if name in self.baselines else found
        return None

    def paper_value(self, row: str, column: str) -> str | None:
        """What the paper reports, `"66.78±0.59"`."""
        return self.paper.get((row, self.columns[column].stands_for))

    def cell(self, row: str, column: str, seed: int) -> Cell:
        place = self.columns[column]
        settings = {**self.settings, **place.settings, **self.rows[row]}
        tuned = self.tuned.get(column, {}).get(str(settings.get("method")), {})
        if column in self.overrides.paths:
            settings["target_path"] = self.overrides.paths[column]
        settings = {**settings, **tuned, "seed": seed}
        needs = {}
        for key, value in settings.items():
            if isinstance(value, str) and (match := REFERENCE.fullmatch(value)):
                needs[key] = self._need(match[1], settings, used=True)
                settings[key] = needs[key].id
        config = load_config(MetaTestConfig, str(self.base), self._cell_texts, settings, str(self.path))
        config = dataclasses.replace(config, data_root=self.overrides.data_root)
        id_ = f"{slug(row)}--{slug(column)}--seed{seed}--{fingerprint('meta_test', config)}"
        return Cell(row, column, seed, id_, config, needs, tuple(self._differences(row, column, config, needs)))

    # --- the parts

    def _apply_command_line(self) -> None:
        self._cell_texts, self._need_texts = [], {}
        for text in self.overrides.settings:
            key, separator, _ = text.partition("=")
            need, dot, _ = key.partition(".")
            if separator and dot:
                if need not in self._needs:
                    raise unknown(f"--set {text}: need", need, self._needs)
                self._need_texts.setdefault(need, []).append(text[len(need) + 1 :])
            else:
                self._cell_texts.append(text)
        self._given = dict(self.overrides.files)
        for name in self._given:
            if name not in self._needs:
                raise unknown("--use: need", name, self._needs)
        for name in self.overrides.paths:
            if name not in self.columns:
                raise unknown("--path: column", name, self.columns)

    def _need(self, name: str, settings: Mapping[str, Any], used: bool) -> Need:
        """`used`: as this preset and the command line have it; otherwise as the paper has it."""
        if name not in self._needs:
            raise unknown(f"{self.path}: need", name, self._needs)
        spec = self._needs[name]
        if used and name in self._given:
            return given_need(name, self._given[name], spec)
        if "file" in spec:
            file = Path(self.overrides.data_root).expanduser() / spec["file"]
            return Need(name, f"{name}-{spec['sha256'][:8]}", file=file, hint=spec["hint"], sha256=spec["sha256"])
        cls = PROGRAMS[spec["program"]]
        chosen = self._preset_needs.get(name, {}) if used else {}
        values = {key: settings[key] for key in spec.get("like", []) if key in settings}
        values = {**spec.get("set", {}), **values, **chosen}
        texts = self._need_texts.get(name, []) if used else []
        origin = f"{self.path}: needs: {name}"
        config = load_config(cls, str(self.path.parent / spec["config"]), texts, values, origin)
        config = dataclasses.replace(config, data_root=self.overrides.data_root)
        id_ = f"{name}-seed{config.seed}-{fingerprint(spec['program'], config)}"
        return Need(name, id_, spec["program"], config)

    def _differences(self, row: str, column: str, config: MetaTestConfig, needs: Mapping[str, Need]) -> Iterable[str]:
        """How a cell departs from the paper's setting of the cell that it is, or stands for."""
        columns, rows, shared = self.paper_sources
        standard = columns.get(self.columns[column].stands_for, {})
        standard = {key: value for key, value in standard.items() if key not in COLUMN_KEYS}
        settings = {**shared, **standard, **rows.get(row, self.rows[row])}
        tuned = self.tuned.get(column, {}).get(str(settings.get("method")), {})
        for key, value in settings.items():
            if isinstance(value, str) and (match := REFERENCE.fullmatch(value)):
                settings[key] = needs[key].id if key in needs else match[1]  # compared below, setting by setting
        paper = load_config(MetaTestConfig, str(self.base), (), {**settings, **tuned}, str(self.path))
        yield from changes(paper, config)
        for key, need in needs.items():
            name = REFERENCE.fullmatch(rows.get(row, self.rows[row])[key])[1]
            standard_need = self._need(name, settings, used=False)
            if need.config is not None:
                yield from (f"{name}: {change}" for change in changes(standard_need.config, need.config))
            elif need.id != standard_need.id:
                yield f"{name}: {need.file.name}, of which nothing is recorded"

    def _column(self, name: str, value: Mapping[str, Any], comparable: bool) -> Column:
        settings = {key: v for key, v in value.items() if key not in COLUMN_KEYS}
        return Column(settings, value.get("stands_for", name), value.get("comparable", comparable))

    def _pick(self, kind: str, known: Mapping[str, Any], chosen: Any) -> dict[str, Any]:
        if chosen is None:
            return dict(known)
        if isinstance(chosen, Mapping):
            return dict(chosen)
        for name in chosen:
            if name not in known:
                raise unknown(f"{self.path}: presets: {self.preset}: {kind}", name, known)
        return {name: known[name] for name in known if name in chosen}

    def _paper(self, rows: Mapping[str, Sequence[str | None]], columns: list[str]) -> dict[tuple[str, str], str]:
        values = {}
        for row, numbers in rows.items():
            if len(numbers) != len(columns):
                raise UserError(f"{self.path}: paper: {row}: has {len(numbers)} values for {len(columns)} columns")
            values |= {(row, column): v for column, v in zip(columns, numbers, strict=True) if v is not None}
        return values

    def _numbers(self, seeds: Any) -> list[int]:
        if isinstance(seeds, list) and seeds and all(type(s) is int and s >= 0 for s in seeds):
            return list(dict.fromkeys(seeds))
        raise UserError(f"{self.path}: seeds: expected a list of whole numbers, got {seeds!r}")

    def _check_keys(self, content: Mapping[str, Any], known: set[str], where: str) -> None:
        for key in content:
            if key not in known:
                raise unknown(f"{self.path}: {where}key", key, known)


def given_need(name: str, path: Path, spec: Mapping[str, Any]) -> Need:
    """A file or run folder that the command line gives in place of a run; identified by its content."""
    file = path / "checkpoints" / "latest.pt" if path.is_dir() else path
    if not file.is_file() or (path.is_dir() and not (path / "result.json").is_file()):
        raise UserError(f"--use {name}={path}: no such file or finished run")
    config = None
    if "program" in spec:  # what the file says of its making, to hold it to the paper's setting
        card = load_json(path / "result.json") if path.is_dir() else load_phi(path).card
        cls = PROGRAMS[spec["program"]]
        known = {f.name for f in dataclasses.fields(cls)}
        settings = card.get("config") or {}
        config = cls(**{key: settings[key] for key in settings if key in known}) if settings else None
    return Need(name, f"{name}-{sha256(file)[:8]}", config=config, file=path)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def candidate_rows(candidates: Mapping[str, Mapping[str, Sequence[Any]]]) -> dict[str, dict[str, Any]]:
    """A row for each combination of each method's values.

    >>> [*candidate_rows({"dropout": {"dropout_prob": [0.1, 0.2]}})]
    ['dropout: dropout_prob 0.1', 'dropout: dropout_prob 0.2']
    """
    rows = {}
    for method, values in candidates.items():
        for combination in itertools.product(*values.values()):
            settings = dict(zip(values, combination, strict=True))
            name = ", ".join(f"{key} {value}" for key, value in settings.items())
            rows[f"{method}: {name}"] = {"method": method, **settings}
    return rows


def read_tuned(path: Path, columns: Iterable[str], tuned_as: str | None) -> dict[str, dict[str, dict[str, Any]]]:
    """Hyperparameters that tuning chose: column → method → settings.

    Raises:
        UserError: no such file, or it lacks a column.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; ./run.sh tune writes it")
    chosen = load_json(path)["chosen"]
    tuned = {}
    for column in columns:
        name = tuned_as or column
        if name not in chosen:
            raise UserError(f"{path}: nothing was tuned for {name} (tuned: {', '.join(chosen)})")
        tuned[column] = chosen[name]
    return tuned


def fingerprint(program: str, config: Any) -> str:
    """Identifies what a run computes, its seed aside; settings at their defaults do not enter.

    So a setting that a later version adds does not orphan the results of earlier ones.
    """
    chosen = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if f.metadata["identity"] and f.name not in INCIDENTAL and getattr(config, f.name) != default_of(f)
    }
    return fingerprint_of([program, chosen])


def fingerprint_of(content: Any) -> str:
    """8 hex digits of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def changes(paper: Any, ours: Any) -> list[str]:
    """Settings in which `ours` differs from `paper` in a way that matters to the result."""
    found = differences(dataclasses.asdict(paper), ours)
    return [change for change in found if change.partition(":")[0] not in INCIDENTAL]


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    known = [str(k) for k in known]
    near = difflib.get_close_matches(str(name), known, n=1)
    return UserError(
        f"{what} {name!r} is unknown" + (f"; did you mean {near[0]!r}?" if near else f" ({', '.join(known)})")
    )
