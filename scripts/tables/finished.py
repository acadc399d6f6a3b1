"""Finished runs for pictures: found, named, grouped, and refused where they do not go together.

A run of meta-testing is a run folder, or a record under `results/`. A record has the result and the evaluations during
training, but no network. A run of meta-training is a run folder.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaperturb.config import MetaTestConfig, MetaTrainConfig
from metaperturb.errors import UserError
from metaperturb.identity import INCIDENTAL, data_name, differences, settings, training
from metaperturb.regularizers import REGULARIZERS
from metaperturb.runs import read_result
from metaperturb.storage import load_json
from tables.grid import config_of
from tables.results import curve
from tables.schema import PROGRAMS

DEFAULTS = vars(MetaTestConfig())
# What may differ between the runs that are averaged; and, as well, between the methods of a picture.
OF_A_RUN = {*INCIDENTAL, "method", "phi"}
OF_PHI = ("sites", "noise", "gate", "anneal", "clip", "clip_eval", "paper")  # how it is used
OF_A_METHOD = {*OF_A_RUN, *OF_PHI, "recipe", "init", "init_batch_norm"}


@dataclass(frozen=True)
class Finished:
    """A finished run, as far as its `result.json` or its record tells."""

    path: Path  # its folder, or the record's file
    result: Mapping[str, Any]
    phi: str = ""  # tells its φ apart, where runs have several

    @property
    def dir(self) -> Path:
        """Its folder; a record, which has none, is refused."""
        if self.path.is_file():
            raise UserError(f"{self.path}: is a record of a run; this picture needs the run's folder")
        return self.path

    @property
    def curve(self) -> Sequence[Mapping[str, Any]]:
        """Its evaluations, as `results.curve` has them; refused where there are none."""
        found = self.result.get("curve") if self.path.is_file() else curve(self.path)
        if not found:
            lacking = "holds no evaluation" if self.path.is_dir() else "is a record without its curve"
            raise UserError(f"{self.path}: {lacking}; this picture needs the metrics.jsonl of the run's folder")
        return found

    @property
    def phi_key(self) -> str:
        """Equal for runs with the same φ."""
        return self.result["phi_digest"] or ""

    @property
    def phi_names(self) -> tuple[str, ...]:
        """What its φ may be called: by its file, the folder of that or the table, and by its content."""
        file, cell = Path(self.config["phi"]), self.result.get("cell") or {"needs": {}}
        return file.stem, cell["needs"].get("phi", file.parent.name), self.phi_key[:8]

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        """Its settings; those that came with a later version at their defaults."""
        return vars(config_of(self.result["program"], self.result))

    @property
    def is_target(self) -> bool:
        """Of meta-testing, not of meta-training."""
        return self.result["program"] == "meta_test"

    @property
    def has_network(self) -> bool:
        """Of meta-testing, and more than a record."""
        return self.is_target and self.path.is_dir()

    @property
    def method(self) -> str:
        return self.config["method"]

    @property
    def name(self) -> str:
        """The method as pictures call it: `base, finetuned`, `metaperturb, φ selected, sites top`, `base, mixup`."""
        changed = [key for key in OF_PHI if self.method == "metaperturb" and self.config[key] != DEFAULTS[key]]
        parts = [self.method, self.phi, *(f"{key} {self.config[key]}" for key in changed)]
        parts += ["finetuned" if self.config["init"] else "", *self.config["recipe"]]
        return ", ".join(part for part in parts if part)

    @property
    def data(self) -> str:
        """The data set as pictures call it; of an image folder its name. Without `train_per_class`."""
        name = data_name(self.config)
        size, split = self.config["image_size"], self.config["eval_split"]
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


# --- finding


def find_runs(sources: Iterable[Path]) -> list[Finished]:
    """The finished runs among folders and below them, in the order of their names: each training once.

    Of meta-trainings those of a step or more.

    Args:
        sources: run folders, files of records, or folders that hold either; one that holds runs stands for those alone.

    Raises:
        UserError: a folder or file that is not there, or is a run that is not finished.
    """
    found: dict[Path, Finished] = {}
    known: dict[str, Finished] = {}
    for path in (path for source in sources for path in _results(source)):
        content = load_json(path)
        if not (isinstance(content, dict) and content.get("program") in PROGRAMS):
            continue
        run = Finished(path.parent if path.name == "result.json" else path, read_result(path))
        if not run.is_target and run.path.is_dir() and run.steps > 0:
            found[run.path.resolve()] = run
        elif run.is_target and run.result["metrics"] is not None:
            first = known.setdefault(training(run.result), run)
            if first is not run and run.path.is_file() and first.path.resolve() != run.path.resolve():
                print(f"{run.path}: left out, is the same training as {first.path}", file=sys.stderr)
            else:
                found[run.path.resolve()] = run
    return [*found.values()]


def _results(source: Path) -> list[Path]:
    """The files of results and records that a source holds."""
    if not source.exists():
        raise UserError(f"{source}: no such folder or record")
    if (source / "config.yaml").exists() and not (source / "result.json").exists():
        raise UserError(f"{source}: this run is not finished (the command that began it continues it)")
    if source.is_file():
        return [source]
    whole = source / "result.json"
    return [whole] if whole.exists() else sorted(source.rglob("result.json")) or sorted(source.rglob("*--*.json"))


# --- naming and grouping


def grouped(runs: Iterable[Finished], key: Callable[[Finished], Any]) -> dict[Any, list[Finished]]:
    groups: dict[Any, list[Finished]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def tell_phis_apart(runs: Sequence[Finished], called: Mapping[str, str]) -> list[Finished]:
    """Where runs have several φ, each gets a name: that of its file, of the file's folder if all are `phi.pt`.

    Args:
        runs: of any methods.
        called: file, its folder or digest → another name in place of this; several φ of one name are one line, for
            instance those of several seeds.

    Raises:
        UserError: `called` names a φ that no run has.
    """
    phis = grouped([run for run in runs if run.phi_key], lambda run: run.phi_key)
    alternatives = [*zip(*(same[0].phi_names for same in phis.values()), strict=True)]
    own = next((names for names in alternatives if len({*names}) == len(phis)), (alternatives or [()])[-1])
    known = {key: {name for run in same for name in run.phi_names} for key, same in phis.items()}
    if unknown := [name for name in called if not any(name in some for some in known.values())]:
        raise UserError(f"--call {unknown[0]}: no run has a φ of this name ({', '.join(own) or 'none at all'})")
    if len(phis) < 2 and not called:
        return [*runs]
    chosen = {"": ""}
    for key, name in zip(phis, own, strict=True):
        chosen[key] = next((called[other] for other in called if other in known[key]), f"φ {name}")
    return [dataclasses.replace(run, phi=chosen[run.phi_key]) for run in runs]


def title(run: Finished, with_steps: bool = True, with_amount: bool = True) -> str:
    amount = run.config["train_per_class"] if with_amount else None
    parts = [run.data, f"{amount} images a class" if amount else "", run.config["model"]]
    return ", ".join(part for part in [*parts, f"{run.steps} steps" if with_steps else ""] if part)


def by_method(runs: Sequence[Finished]) -> dict[str, list[Finished]]:
    """Checked runs under the name of their method, in the order of `REGULARIZERS`."""
    check_settings(runs)
    methods = grouped(runs, lambda run: run.name)
    for name, same in methods.items():
        _check_seeds(same, f"runs of {name} with")
    order = [*REGULARIZERS]
    place = {name: (one.config["init"] or "", order.index(one.method)) for name, (one, *_) in methods.items()}
    return {name: methods[name] for name in sorted(methods, key=lambda name: (*place[name], name))}


def by_making(runs: Sequence[Finished]) -> dict[str, list[Finished]]:
    """Runs of meta-training that differ in their seed alone, under the settings in which others differ."""
    made = {run.path: settings(MetaTrainConfig, run.config, INCIDENTAL) for run in runs}
    differ = [key for key in next(iter(made.values())) if len({str(making[key]) for making in made.values()}) > 1]
    groups = grouped(runs, lambda run: ", ".join(f"{key} {made[run.path][key]}" for key in differ) or "MetaPerturb")
    for same in groups.values():
        _check_seeds(same, "meta-trainings with these settings and")
    return groups


def meta_training(run: Finished) -> dict[str, Any] | None:
    """What made a run's φ what it is; None where it is unknown.

    The settings, `classes`: how many the source had, and how many images of each.
    """
    card = run.result["phi_card"] or {}
    source = card.get("source") or {}
    if "config" not in card or not {"classes", "images"} <= source.keys():
        return None
    made = {"classes": source["classes"], "images_a_class": source["images"] / source["classes"]}
    return settings(MetaTrainConfig, card["config"], INCIDENTAL) | made


# --- what goes together


def check_settings(runs: Sequence[Finished], varied: str | None = None) -> None:
    """What one picture averages or compares differs in nothing else.

    Args:
        runs: of any methods.
        varied: a setting that may differ, as the picture is about it.

    Raises:
        UserError: two runs of a method differ in more than the seed, or runs in what all methods share.
    """
    hyperparameters = {key for key in DEFAULTS if key.startswith(tuple(REGULARIZERS))}
    pairs = [(same[0], run, OF_A_RUN) for same in grouped(runs, lambda run: run.name).values() for run in same[1:]]
    pairs += [(runs[0], run, OF_A_METHOD | hyperparameters) for run in runs[1:]]
    for first, other, expected in pairs:
        if changed := differences(first.config, MetaTestConfig(**other.config), without=expected | {varied}):
            what = f"runs of {other.name}" if expected is OF_A_RUN else "runs"
            raise UserError(f"{other.path}: {what} are averaged or compared, but this one has {'; '.join(changed)}")


def _check_seeds(same: Sequence[Finished], what: str) -> None:
    """Refuse runs with the same seed among those that are averaged."""
    if len({run.config["seed"] for run in same}) < len(same):
        raise UserError(f"{same[-1].path}: there are two {what} one seed; name those that are meant")
