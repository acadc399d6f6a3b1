"""Finished runs for pictures: found, named, grouped, and refused where they do not go together.

A run of meta-testing is its folder, or its record under `results/`, which tells what came out and what the evaluations
on the way found, but has no network; one of meta-training is its folder.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaperturb import plots
from metaperturb.config import MetaTestConfig, MetaTrainConfig, default_of
from metaperturb.errors import UserError
from metaperturb.storage import load_json
from tables.grid import INCIDENTAL, fingerprint_of
from tables.results import PATHS, content_of, curve

FIELDS = {field.name: field for field in dataclasses.fields(MetaTestConfig)}
# What may differ between the runs that are averaged; and, as well, between the methods of a picture.
OF_A_RUN = {*INCIDENTAL, "method", "phi", *(name for name, field in FIELDS.items() if not field.metadata["identity"])}
OF_PHI = ("sites", "noise", "gate", "anneal", "clip", "clip_eval")  # how it is used
EVALUATION = ("step", "test_nll", "test_accuracy", "test_ece")  # the numbers of a curve that every evaluation has
OF_A_METHOD = {*OF_A_RUN, *OF_PHI, "recipe", "init", "init_batch_norm"}


@dataclass(frozen=True)
class Finished:
    """A finished run, as far as its `result.json` or its record tells."""

    path: Path  # its folder, or the record's file
    result: Mapping[str, Any]
    need: str | None = None  # of a record: the id of its φ in that table
    recorded: Sequence[Mapping[str, Any]] = ()  # of a record: its curve
    phi: str = ""  # tells its φ apart, where runs have several
    rank: int = 0  # of its φ among these: those that got a name first, in the order in which it was given

    @property
    def dir(self) -> Path:
        """Its folder.

        Raises:
            UserError: there is a record only.
        """
        if self.path.is_file():
            raise UserError(f"{self.path}: is a record of a run; this picture needs the run's folder")
        return self.path

    @property
    def curve(self) -> Sequence[Mapping[str, Any]]:
        """Its evaluations, as `results.curve` has them.

        Raises:
            UserError: there are none, or one lacks a number or holds one that is not finite.
        """
        if self.path.is_file():
            found, where = self.recorded, "curve"
            lacking = "is a record without its curve; this picture needs the run's folder"
        else:
            found, where, lacking = curve(self.path), "metrics.jsonl", "metrics.jsonl holds no evaluation"
        if not found:
            raise UserError(f"{self.path}: {lacking}")
        for line in found:
            numbers = [line.get(key) for key in EVALUATION]
            if not all(isinstance(value, int | float) and math.isfinite(value) for value in numbers):
                raise UserError(f"{self.path}: {where}, step {numbers[0]}: values are missing or not finite")
        return found

    @property
    def phi_key(self) -> str:
        """Equal for runs with the same φ: its file, or of a record, which has only the file's name, its content."""
        return (self.need and content_of(self.need)) or self.need or self.config.get("phi") or ""

    @property
    def phi_names(self) -> tuple[str, ...]:
        """What its φ may be called: by its file, the folder of that or the table, and in full."""
        file = Path(self.config["phi"])
        return file.stem, self.need or file.parent.name, self.phi_key

    @property
    def config(self) -> Mapping[str, Any]:
        return self.result["config"]

    def setting(self, key: str) -> Any:
        """Of a run older than the setting, its default."""
        return self.config.get(key, default_of(FIELDS[key]))

    @property
    def method(self) -> str:
        return self.config["method"]

    @property
    def name(self) -> str:
        """The method as pictures call it: `base, finetuned`, `metaperturb, φ selected, sites top`, `base, mixup`."""
        changed = OF_PHI if self.method == "metaperturb" else ()
        changed = [key for key in changed if self.setting(key) != default_of(FIELDS[key])]
        parts = [self.method, self.phi, *(f"{key} {self.setting(key)}" for key in changed)]
        parts += ["finetuned" if self.config["init"] else "", *self.setting("recipe")]
        return ", ".join(part for part in parts if part)

    @property
    def data(self) -> str:
        """The data set as pictures call it; of an image folder its name. Without `train_per_class`."""
        name = Path(self.config["target_path"]).stem if self.config["target"] == "folder" else self.config["target"]
        size, split = self.setting("image_size"), self.setting("eval_split")
        return name + (f", {size} px" if size else "") + (f", {split}" if split != "test" else "")

    @property
    def steps(self) -> int:
        return self.config["steps"]

    @property
    def train_images(self) -> int:
        return self.result["target"]["train"]

    @property
    def accuracy(self) -> float:
        return self.result["metrics"]["accuracy"]


def find_runs(sources: Iterable[Path], may_lack: bool = False) -> list[Finished]:
    """The finished runs of meta-testing among folders and below them, in the order of their names.

    Args:
        sources: run folders, files of records, or folders that hold either; one that holds runs stands for those alone.
        may_lack: a source may hold none.

    Raises:
        UserError: a folder or file that is not there, holds no finished run, or is a run that is not finished.
    """
    found: dict[Path, Finished] = {}
    known: dict[str, Finished] = {}
    for source in sources:
        if not source.exists():
            raise UserError(f"{source}: no such folder or record")
        if (source / "config.yaml").exists() and not (source / "result.json").exists():
            raise UserError(f"{source}: this run is not finished (the command that began it continues it)")
        runs = [run for path in _results(source) if (run := _read(path))]
        if not (runs or may_lack):
            raise UserError(f"{source}: holds no finished run of meta-testing (./run.sh tgt, ./run.sh table1)")
        for run in runs:
            first = known.setdefault(_identity(run), run)
            if first is not run and run.path.is_file() and first.path.resolve() != run.path.resolve():
                print(f"{run.path}: left out, is the same training as {first.path}", file=sys.stderr)
            else:
                found[run.path.resolve()] = run
    return [*found.values()]


def find_meta_trainings(sources: Iterable[Path]) -> list[Finished]:
    """The finished runs of meta-training, of a step or more, among folders and below them, in the order of their names.

    Args:
        sources: run folders, or folders that hold some.

    Raises:
        UserError: a folder that is not there, or a result that cannot be read.
    """
    found = {}
    for source in sources:
        if not source.exists():
            raise UserError(f"{source}: no such folder")
        for path in _results(source):
            result = load_json(path) if path.name == "result.json" else None
            if isinstance(result, dict) and result.get("program") == "meta_train" and result["config"]["steps"] > 0:
                found[path.parent.resolve()] = Finished(path.parent, result)
    return [*found.values()]


def by_making(runs: Sequence[Finished]) -> dict[str, list[Finished]]:
    """Runs of meta-training that differ in their seed alone, under the settings in which they differ from the others.

    Raises:
        UserError: two runs have one seed and the same settings.
    """
    made = {run.path: _making(run.config) for run in runs}
    differ = [key for key in _making({}) if len({str(making[key]) for making in made.values()}) > 1]
    groups = grouped(runs, lambda run: ", ".join(f"{key} {made[run.path][key]}" for key in differ) or "MetaPerturb")
    for same in groups.values():
        _check_seeds(same, "meta-trainings with these settings and")
    return groups


def _making(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, the seed aside, that make a φ what it is; of a meta-training older than a setting its default."""
    return {
        field.name: config.get(field.name, default_of(field))
        for field in dataclasses.fields(MetaTrainConfig)
        if field.metadata["identity"] and field.name not in INCIDENTAL
    }


def _check_seeds(same: Sequence[Finished], what: str) -> None:
    """Runs that are averaged have a seed each.

    Raises:
        UserError: two have the same.
    """
    if len({run.config["seed"] for run in same}) < len(same):
        raise UserError(f"{same[-1].path}: there are two {what} one seed; name those that are meant")


def _results(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if (source / "result.json").exists():
        return [source / "result.json"]
    return sorted(source.rglob("result.json")) or sorted(source.rglob("*--*.json"))


def _read(path: Path) -> Finished | None:
    result, made_from, recorded = load_json(path), None, ()
    if isinstance(result, dict) and {"row", "column", "needs", "result"} <= result.keys():
        result, made_from, recorded = result["result"], result["needs"].get("phi"), result.get("curve", ())
    if not isinstance(result, dict) or result.get("program") != "meta_test":
        return None
    if not {"config", "metrics", "target"} <= result.keys():
        raise UserError(f"{path}: is no whole result of meta-testing; remove it and run it again")
    return Finished(path.parent if path.name == "result.json" else path, result, made_from, recorded)


def _identity(run: Finished) -> str:
    """Equal for the records of a run in whatever tables."""
    config = {key: value for key, value in run.config.items() if key not in PATHS}
    return fingerprint_of([config, *(run.result.get(key) for key in ("metrics", "target", "seconds", "commit"))])


def tell_phis_apart(runs: Sequence[Finished], called: Mapping[str, str]) -> list[Finished]:
    """Where runs have several φ, each gets a name: that of its file, of the file's folder if all are `phi.pt`.

    Args:
        runs: of any methods.
        called: file, its folder or whole path → another name in place of this; several φ of one name are one line, for
            instance those of several seeds.

    Raises:
        UserError: `called` names a φ that no run has.
    """
    names: dict[str, list[tuple[str, ...]]] = {}
    for run in runs:
        if run.phi_key and run.phi_names not in names.setdefault(run.phi_key, []):
            names[run.phi_key].append(run.phi_names)
    kind = next((i for i in range(3) if len({of_phi[0][i] for of_phi in names.values()}) == len(names)), 0)
    known = {key: {name for some in of_phi for name in some} for key, of_phi in names.items()}
    if unknown := [name for name in called if not any(name in of_phi for of_phi in known.values())]:
        given = ", ".join(of_phi[0][kind] for of_phi in names.values())
        raise UserError(f"--call {unknown[0]}: no run has a φ of this name ({given or 'none at all'})")
    if len(names) < 2 and not called:
        return [*runs]
    chosen = {
        key: next((called[name] for name in called if name in known[key]), f"φ {of_phi[0][kind]}")
        for key, of_phi in names.items()
    }
    ranks = {name: rank for rank, name in enumerate(dict.fromkeys(called.values()))}

    def named(run: Finished) -> Finished:
        name = chosen.get(run.phi_key, "")
        return dataclasses.replace(run, phi=name, rank=ranks.get(name, len(ranks)))

    return [named(run) for run in runs]


def grouped(runs: Iterable[Finished], key: Callable[[Finished], Any]) -> dict[Any, list[Finished]]:
    groups: dict[Any, list[Finished]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def data_of(run: Finished) -> tuple[str, ...]:
    """Identifies the images and the network of a run."""
    return (*run.result["target"]["fingerprints"], run.config["model"])


def test_of(run: Finished) -> tuple[Any, ...]:
    """Identifies what networks trained on different images are compared by."""
    return (run.result["target"]["fingerprints"][1], run.config["model"], run.steps)


def title(run: Finished, with_steps: bool = True, with_amount: bool = True) -> str:
    amount = run.setting("train_per_class") if with_amount else None
    parts = [run.data, f"{amount} images a class" if amount else "", run.config["model"]]
    return ", ".join(part for part in [*parts, f"{run.steps} steps" if with_steps else ""] if part)


def check_alike(runs: Sequence[Finished], key: Callable[[Finished], Any], what: str) -> None:
    """All runs of a picture share `what` it shows.

    Raises:
        UserError: they are of several.
    """
    for run in runs[1:]:
        if key(run) != key(runs[0]):
            raise UserError(
                f"{run.path}: is about {title(run)}, {runs[0].path.name} about {title(runs[0])}, and one picture shows "
                f"one {what} (./run.sh figures draws each)"
            )


def by_method(runs: Sequence[Finished]) -> dict[str, list[Finished]]:
    """Runs under the name of their method, in the order of `plots.LABELS`, of several φ in that of `--call`.

    Raises:
        UserError: two runs of a method differ in more than the seed, or do not, or runs differ in what all share.
    """
    check_settings(runs)
    methods = grouped(runs, lambda run: run.name)
    for name, same in methods.items():
        _check_seeds(same, f"runs of {name} with")
    order = [*plots.LABELS]
    return dict(
        sorted(
            methods.items(),
            key=lambda item: (
                *(item[1][0].config["init"] or "", order.index(item[1][0].method)),
                *(item[1][0].rank, item[0]),
            ),
        )
    )


def check_settings(runs: Sequence[Finished], varied: str | None = None) -> None:
    """What one picture averages or compares differs in nothing else.

    Args:
        runs: of any methods.
        varied: a setting that may differ, as the picture is about it.

    Raises:
        UserError: two runs of a method differ in more than the seed, or runs in what all methods share.
    """
    for name, same in grouped(runs, lambda run: run.name).items():
        for run in same[1:]:
            tell_apart(same[0], run, {*OF_A_RUN, varied}, f"runs of {name}")
    hyperparameters = {key for key in FIELDS if key.startswith(tuple(plots.LABELS))}
    for run in runs[1:]:
        tell_apart(runs[0], run, {*OF_A_METHOD, *hyperparameters, varied}, "runs")


def tell_apart(first: Finished, other: Finished, expected: set[str], what: str) -> None:
    keys = [key for key in FIELDS if key not in expected and first.setting(key) != other.setting(key)]
    if keys:
        changed = "; ".join(f"{key}: {first.setting(key)} → {other.setting(key)}" for key in keys)
        raise UserError(f"{other.path}: {what} are averaged or compared, but this one has {changed}")


def meta_training(run: Finished) -> dict[str, Any] | None:
    """What made a run's φ what it is; None where it is unknown.

    The settings, `classes`: how many the source had, and how many images of each.
    """
    card = run.result["phi_card"] or {}
    if not {"config", "source"} <= card.keys() or not {"classes", "images"} <= card["source"].keys():
        return None
    source = card["source"]
    return {
        **_making(card["config"]),
        "classes": source["classes"],
        "images_a_class": source["images"] / source["classes"],
    }
