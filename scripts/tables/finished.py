"""Finished runs for pictures: found, named, grouped, and refused where they do not go together.

A run of meta-testing is a run folder, or a record under `results/`. A record has the result and the evaluations during
training, but no network. A run of meta-training is a run folder.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metaperturb.config import MetaTestConfig, MetaTrainConfig, from_record
from metaperturb.errors import UserError
from metaperturb.identity import INCIDENTAL, data_name, differences, settings, training
from metaperturb.regularizers import REGULARIZERS
from metaperturb.runs import read_result
from metaperturb.storage import load_json
from tables.grid import PROGRAMS
from tables.results import curve

DEFAULTS = vars(MetaTestConfig())
# What may differ between the runs that are averaged; and, as well, between the methods of a picture.
OF_A_RUN = {*INCIDENTAL, "method", "phi"}
OF_PHI = ("sites", "noise", "gate", "anneal", "clip", "clip_eval", "paper")  # how it is used
HYPERPARAMETERS = {key for key in DEFAULTS if key.startswith(tuple(REGULARIZERS))}
OF_A_METHOD = {*OF_A_RUN, *OF_PHI, *HYPERPARAMETERS, "recipe", "init", "init_batch_norm"}


class Finished:
    """A finished run, as far as its `result.json` or its record tells.

    Attributes:
        path: its folder, or the record's file.
        config: its settings; those that came with a later version at their defaults.
        data: the data set as pictures call it, without `train_per_class`.
        phi: tells its φ apart, where runs have several; `phi_key`: equal for runs with the same φ.
        phi_names: what its φ may be called: by its file, the folder of that or the table, and by its content.
    """

    def __init__(self, path: Path, result: Mapping[str, Any]) -> None:
        self.path, self.result = path, result
        self.config = config = vars(from_record(PROGRAMS[result["program"]], result["config"]))
        self.seed, self.steps, self.model = config["seed"], config["steps"], config["model"]
        self.is_target = result["program"] == "meta_test"
        self.has_network = self.is_target and path.is_dir()
        if not self.is_target or result["metrics"] is None:
            return
        self.method, self.accuracy = config["method"], result["metrics"]["accuracy"]
        size, split = config["image_size"], config["eval_split"]
        self.data = data_name(config) + (f", {size} px" if size else "") + (f", {split}" if split != "test" else "")
        self.train_images, self.images = result["target"]["train"], result["target"]["fingerprints"]
        self.phi, self.phi_key = "", result["phi_digest"] or ""
        file, cell = Path(config["phi"] or ""), result.get("cell") or {"needs": {}}
        self.phi_names = file.stem, cell["needs"].get("phi", file.parent.name), self.phi_key[:8]

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
    def name(self) -> str:
        """The method as pictures call it: `base, finetuned`, `metaperturb, φ selected, sites top`, `base, mixup`."""
        changed = [key for key in OF_PHI if self.method == "metaperturb" and self.config[key] != DEFAULTS[key]]
        parts = [self.method, self.phi, *(f"{key} {self.config[key]}" for key in changed)]
        parts += ["finetuned" if self.config["init"] else "", *self.config["recipe"]]
        return ", ".join(filter(None, parts))

    def title(self, with_steps: bool = True, with_amount: bool = True) -> str:
        amount = self.config["train_per_class"] if with_amount else None
        parts = [self.data, f"{amount} images a class" if amount else "", self.model]
        return ", ".join(filter(None, [*parts, f"{self.steps} steps" if with_steps else ""]))


def find_runs(sources: Iterable[Path]) -> list[Finished]:
    """The finished runs among folders and below them, in the order of their names: each training once.

    Sources are run folders, files of records, or folders that hold either; one that holds runs stands for those alone.
    Of meta-trainings it is those of a step or more.
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
    whole = source / "result.json"
    if not source.exists():
        raise UserError(f"{source}: no such folder or record")
    if (source / "config.yaml").exists() and not whole.exists():
        raise UserError(f"{source}: this run is not finished (the command that began it continues it)")
    if source.is_file():
        return [source]
    return [whole] if whole.exists() else sorted(source.rglob("result.json")) or sorted(source.rglob("*--*.json"))


# --- naming and grouping


def grouped(runs: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def tell_phis_apart(runs: Sequence[Finished], called: Mapping[str, str]) -> None:
    """Where runs have several φ, each gets a name: that of its file, of the file's folder if all are `phi.pt`.

    `called` has other names for some, by file, folder or digest. Several φ of one name are one line, for instance those
    of several seeds.
    """
    phis = grouped([run for run in runs if run.phi_key], lambda run: run.phi_key)
    alternatives = [*zip(*(same[0].phi_names for same in phis.values()), strict=True)]
    own = next((names for names in alternatives if len({*names}) == len(phis)), (alternatives or [()])[-1])
    known = {key: {name for run in same for name in run.phi_names} for key, same in phis.items()}
    if unknown := called.keys() - set().union(*known.values()):
        raise UserError(f"--call {min(unknown)}: no run has a φ of this name ({', '.join(own) or 'none at all'})")
    if len(phis) < 2 and not called:
        return
    for (key, same), name in zip(phis.items(), own, strict=True):
        for run in same:
            run.phi = next((called[other] for other in called if other in known[key]), f"φ {name}")


def by_method(runs: Sequence[Finished]) -> dict[str, list[Finished]]:
    """Checked runs under the name of their method, in the order of `REGULARIZERS`."""
    check_settings(runs)
    methods = grouped(runs, lambda run: run.name)
    for name, same in methods.items():
        _check_seeds(same, f"runs of {name} with")
    order = [*REGULARIZERS]
    place = {name: (one.config["init"] or "", order.index(one.method), name) for name, (one, *_) in methods.items()}
    return {name: methods[name] for name in sorted(methods, key=place.get)}


def by_making(runs: Sequence[Finished]) -> dict[str, list[Finished]]:
    """Runs of meta-training that differ in their seed alone, under the settings in which others differ."""
    made = {run.path: settings(MetaTrainConfig, run.config, INCIDENTAL) for run in runs}
    differ = [key for key in next(iter(made.values())) if len({str(making[key]) for making in made.values()}) > 1]
    groups = grouped(runs, lambda run: ", ".join(f"{key} {made[run.path][key]}" for key in differ) or "MetaPerturb")
    for same in groups.values():
        _check_seeds(same, "meta-trainings with these settings and")
    return groups


def meta_training(run: Finished) -> dict[str, Any] | None:
    """The settings of φ's meta-training, how many classes the source had, and images of each; None where unknown."""
    card = run.result["phi_card"] or {}
    source = card.get("source") or {}
    if "config" not in card or not {"classes", "images"} <= source.keys():
        return None
    made = {"classes": source["classes"], "images_a_class": source["images"] / source["classes"]}
    return settings(MetaTrainConfig, card["config"], INCIDENTAL) | made


# --- what goes together


def check_settings(runs: Sequence[Finished], varied: str | None = None) -> None:
    """What one picture averages or compares differs in nothing else than `varied`, which the picture is about.

    Runs of a method may differ in the seed, and methods in what not all of them share.
    """
    pairs = [(same[0], run, OF_A_RUN) for same in grouped(runs, lambda run: run.name).values() for run in same[1:]]
    pairs += [(runs[0], run, OF_A_METHOD) for run in runs[1:]]
    for first, other, expected in pairs:
        if changed := differences(first.config, MetaTestConfig(**other.config), without=expected | {varied}):
            what = f"runs of {other.name}" if expected is OF_A_RUN else "runs"
            raise UserError(f"{other.path}: {what} are averaged or compared, but this one has {'; '.join(changed)}")


def _check_seeds(same: Sequence[Finished], what: str) -> None:
    """Refuse runs with the same seed among those that are averaged."""
    if len({run.seed for run in same}) < len(same):
        raise UserError(f"{same[-1].path}: there are two {what} one seed; name those that are meant")
