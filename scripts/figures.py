"""Figures 5 to 8, and some beyond the paper, from finished runs, as PNG and SVG with the numbers behind them as CSV.

    ./run.sh fig5 runs/tgt-*                              # convergence: all methods and seeds of one data set
    ./run.sh fig6 runs/tgt-cub-*                          # robustness and calibration
    ./run.sh fig7 runs/                                   # learned scales, of any number of data sets
    ./run.sh fig8 runs/tgt-cub-*-seed0                    # loss surfaces, a panel a method
    ./run.sh compare results/table3/cpu/*cub*             # final accuracy, loss and calibration, a line a method
    ./run.sh lengths results/schedule/cpu                 # final accuracy against the number of training steps
    ./run.sh amount results/target_size/cpu               # against the number of training images
    ./run.sh effort results/meta_training/cpu/*cub*       # against the steps, tasks and classes of φ's meta-training
    ./run.sh learning runs/src-*                          # meta-training: what φ learns, a line a setting
    ./run.sh phi runs/src-seed0/phi.pt                    # the 82 numbers of a φ: a file or a shipped name
    ./run.sh figures                                      # all that can be drawn, of each folder of runs under runs/

A folder that holds runs stands for all of them. fig5, compare, lengths, amount and effort also take a table's records
under results/. Runs of a method that differ in their seed alone are averaged. Runs of MetaPerturb with several φ are
told apart by the φ's file; --call gives a φ another name, and averages those that get the same one. Attacks,
Monte-Carlo samples and surfaces take long: they say their cost first, are kept in the run's folder, and continue from
there. --set changes their settings: fig6 --set steps=50 images=1000 linf=0,2/255,8/255, fig8 --set points=31.
"""

import argparse
import copy
import dataclasses
import functools
import operator
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tables.grid import PROGRAMS, slug
from tables.results import curve

from metaperturb import plots
from metaperturb.analyses.calibration import Sampling, measure_calibration
from metaperturb.analyses.robustness import NORMS, Attack, check_attack, measure_robustness
from metaperturb.analyses.scales import learned_scales
from metaperturb.analyses.surface import Plane, loss_surface
from metaperturb.cli import argument_parser, pairs, run_program
from metaperturb.config import MetaTestConfig, MetaTrainConfig, from_record, load_config
from metaperturb.distributed import make_current, parse_devices
from metaperturb.errors import UserError
from metaperturb.identity import INCIDENTAL, data_name, differences, digest, settings
from metaperturb.regularizers import REGULARIZERS
from metaperturb.runs import read_metrics, read_result
from metaperturb.storage import load_json
from metaperturb.trained import TrainedRun, load_run
from metaperturb.weights import load_phi

ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = vars(MetaTestConfig())
# What may differ between the runs that are averaged; and, as well, between the methods of a picture.
OF_A_RUN = {*INCIDENTAL, "method", "phi"}
OF_PHI = ("sites", "noise", "gate", "anneal", "clip", "clip_eval", "paper")  # how it is used
HYPERPARAMETERS = {key for key in DEFAULTS if key.startswith(tuple(REGULARIZERS))}
OF_A_METHOD = {*OF_A_RUN, *OF_PHI, *HYPERPARAMETERS, "recipe", "init", "init_batch_norm"}


# --- finished runs: found, named, grouped, and refused where they do not go together


class Finished:
    """A finished run, as far as its `result.json` or its record tells."""

    phi = ""  # its name in pictures of runs that have several
    network: TrainedRun | None = None  # once it is loaded

    def __init__(self, path: Path, result: Mapping[str, Any]) -> None:
        self.path, self.result = path, result  # its folder, or the record's file
        self.config = config = vars(from_record(PROGRAMS[result["program"]], result["config"]))
        self.seed, self.steps, self.model = config["seed"], config["steps"], config["model"]
        self.is_target, self.is_source = (result["program"] == name for name in ("meta_test", "meta_train"))
        self.has_network = self.is_target and path.is_dir()
        self.has_scales = self.has_network and config["method"] == "metaperturb" and config["gate"]
        if self.is_target:
            self.method, self.accuracy = config["method"], result["metrics"]["accuracy"]
            size, split = config["image_size"], config["eval_split"]
            # As pictures call it, without `train_per_class`.
            self.data = data_name(config) + f", {size} px" * bool(size) + f", {split}" * (split != "test")
            self.train_images, self.images = result["target"]["train"], result["target"]["fingerprints"]
            self.phi_key, file = result["phi_digest"] or "", Path(config["phi"] or "")
            need = result.get("cell", {"needs": {}})["needs"].get("phi", file.parent.name)
            self.phi_names = file.stem, need, self.phi_key[:8]

    @property
    def curve(self) -> Sequence[Mapping[str, Any]]:
        """Its evaluations, as `results.curve` has them; refused where there are none."""
        found = self.result.get("curve") if self.path.is_file() else curve(self.path)
        if not found:
            lacking = "this picture needs the metrics.jsonl of the run's folder"
            raise UserError(f"{self.path}: holds no evaluation; {lacking}")
        return [{**line, "seed": self.seed} for line in found]

    @property
    def name(self) -> str:
        """The method as pictures call it: `base, finetuned`, `metaperturb, φ selected, sites top`, `base, mixup`."""
        changed = [key for key in OF_PHI if self.method == "metaperturb" and self.config[key] != DEFAULTS[key]]
        parts = [self.method, self.phi, *(f"{key} {self.config[key]}" for key in changed)]
        return ", ".join(filter(None, [*parts, "finetuned" * bool(self.config["init"]), *self.config["recipe"]]))

    def title(self, without: str = "") -> str:
        """What all runs of a picture have in common, but for this setting."""
        known = {"train_per_class": f"{self.config['train_per_class']} images a class", "steps": f"{self.steps} steps"}
        amount, steps = (text * (key != without and self.config[key] is not None) for key, text in known.items())
        return ", ".join(filter(None, [self.data, amount, self.model, steps]))


def find_runs(sources: Iterable[Path]) -> list[Finished]:
    """The finished runs in and below folders, and records, each once; meta-trainings of a step or more."""
    found: dict[Path, Finished] = {}
    for path in (path for source in sources for path in _results(source)):
        content = load_json(path)
        if not (isinstance(content, dict) and content.get("program") in PROGRAMS):
            continue
        result, place = read_result(path), path.parent if path.name == "result.json" else path
        whole = result["metrics"] is not None if result["program"] == "meta_test" else place.is_dir()
        if whole and result["config"].get("steps", 1) > 0:
            found[place.resolve()] = Finished(place, result)
    return [*found.values()]


def _results(source: Path) -> list[Path]:
    """The files of results and records that a source holds; a folder that holds runs stands for those alone."""
    whole = source / "result.json"
    if not source.exists():
        raise UserError(f"{source}: no such folder or record")
    if (source / "config.yaml").exists() and not whole.exists():
        raise UserError(f"{source}: this run is not finished (the command that began it continues it)")
    if source.is_file():
        return [source]
    return [whole] if whole.exists() else sorted(source.rglob("result.json")) or sorted(source.rglob("*--*.json"))


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
    known = {key: {name for run in same for name in run.phi_names} for key, same in phis.items()}
    alternatives = [*zip(*(same[0].phi_names for same in phis.values()), strict=True)] or [()]
    own = next((names for names in alternatives if len({*names}) == len(phis)), alternatives[-1])
    if unknown := called.keys() - set().union(*known.values()):
        raise UserError(f"--call {min(unknown)}: no run has a φ of this name ({', '.join(own) or 'none at all'})")
    for (key, same), name in zip(phis.items(), own, strict=True):
        for run in same if len(phis) > 1 or called else ():
            run.phi = next((called[other] for other in called if other in known[key]), f"φ {name}")


def by_method(runs: Sequence[Finished]) -> dict[str, list[Finished]]:
    """Checked runs under the name of their method, in the order of `REGULARIZERS`."""
    check_settings(runs)
    methods, order = grouped(runs, lambda run: run.name), [*REGULARIZERS]
    place = {name: (one.config["init"] or "", order.index(one.method), name) for name, (one, *_) in methods.items()}
    return {name: _of_other_seeds(methods[name], name) for name in sorted(methods, key=place.get)}


def by_making(runs: Sequence[Finished]) -> dict[str, list[Finished]]:
    """Runs of meta-training that differ in their seed alone, under the settings in which others differ."""
    made = {run.path: settings(MetaTrainConfig, run.config, INCIDENTAL) for run in runs}
    differ = [key for key in made[runs[0].path] if len({str(making[key]) for making in made.values()}) > 1]
    groups = grouped(runs, lambda run: ", ".join(f"{key} {made[run.path][key]}" for key in differ) or "MetaPerturb")
    return {name: _of_other_seeds(same, name) for name, same in groups.items()}


def _of_other_seeds(same: Sequence[Finished], name: str) -> Sequence[Finished]:
    """The runs, which are averaged; refused where two have one seed (and φ)."""
    if len({(run.seed, run.is_target and run.phi_key) for run in same}) < len(same):
        raise UserError(f"{same[-1].path}: there are two runs of {name} with one seed; name those that are meant")
    return same


def meta_training(run: Finished) -> dict[str, Any] | None:
    """The settings of φ's meta-training, how many classes the source had, and images of each; None where unknown."""
    card = run.result["phi_card"] or {}
    source = card.get("source") or {}
    if "config" not in card or not {"classes", "images"} <= source.keys():
        return None
    made = {"classes": source["classes"], "images_a_class": source["images"] / source["classes"]}
    return settings(MetaTrainConfig, card["config"], INCIDENTAL) | made


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


# --- the command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("figure", choices=[*FIGURES, "phi", "figures"])
    where = "run folders, records, or folders that hold some [all of --runs]; of phi the file or name of a φ"
    parser.add_argument("sources", type=Path, nargs="*", help=where)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where runs are looked for")
    parser.add_argument("--out", type=Path, default=ROOT / "figures", help="folder of the pictures")
    called = 'name a φ: --call perturb_750="the authors\' φ"'
    parser.add_argument("--call", nargs="+", default=[], metavar="FILE=NAME", help=called)
    parser.add_argument("--device", default="auto", help="GPU number, 'cpu' or 'auto'")
    parser.add_argument("--data-root", help="where the data are, if elsewhere than when the runs ran")
    parser.add_argument("--target-path", help="likewise, of an image folder")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="of the analysis")
    arguments = parser.parse_intermixed_args(argv)  # options may stand before, between and behind the folders
    return run_program(lambda: figures(arguments), show_traceback=arguments.traceback)


def figures(arguments: argparse.Namespace) -> None:
    everything = arguments.figure == "figures"
    chosen = [figure for name, figure in FIGURES.items() if everything or name == arguments.figure]
    arguments.analyses = read_settings([cls for figure in chosen for cls in figure.analyses], arguments.set)
    arguments.where, arguments.drawn = "", set()  # see `draw`
    if arguments.figure == "phi":
        every_number(arguments)
        return
    runs = find_runs(arguments.sources or [arguments.runs])
    called = pairs("--call", arguments.call, "FILE=NAME, the file of a φ without its suffix")
    tell_phis_apart([run for run in runs if run.is_target], called)
    if everything:
        every_figure(runs, arguments)
        return
    (figure,) = chosen
    runs = [run for run in runs if run.is_source == (figure.takes == "is_source")]
    if not runs:
        raise UserError(f"no finished run of {'meta_train' if figure.takes == 'is_source' else 'meta_test'} there")
    if others := [run for run in runs if figure.alike(run) != figure.alike(runs[0])]:
        about = f"{others[0].path}: has another data set, network or length than {runs[0].path}"
        raise UserError(f"{about}, and a picture shows one (./run.sh figures draws each)")
    figure.draw(runs, arguments)


def every_figure(runs: Sequence[Finished], arguments: argparse.Namespace) -> None:
    """All pictures that can be drawn, folder by folder: a table's runs belong together, apart from those of another."""
    refused = 0
    by_folder = grouped(runs, lambda run: run.path.resolve().parent)
    for folder, of_folder in by_folder.items():
        if len(by_folder) > 1:
            arguments.where = slug(os.path.relpath(folder, os.path.commonpath(by_folder)))
        for name, figure in FIGURES.items():
            for some in grouped(filter(operator.attrgetter(figure.takes), of_folder), figure.alike).values():
                try:
                    figure.draw(some, arguments)
                except NothingToShow:
                    pass
                except UserError as error:
                    refused += 1
                    print(f"{name} not drawn: {error}", file=sys.stderr)
                for run in some:
                    run.network = None  # a GPU does not hold those of all
    if refused:
        raise UserError(f"{refused} pictures were not drawn, for the reasons above")


class NothingToShow(UserError):
    """Runs that go together, but have nothing of what a picture is about."""


def draw(arguments: argparse.Namespace, kind: str, plot: Callable[..., None], content: Any, title: str) -> None:
    """Draw `content` into a file named after kind and title, and after the folder where runs are of several."""
    path = arguments.out / slug(f"{kind} {title} {arguments.where}")
    if path in arguments.drawn:
        raise UserError(f"{path}: other runs have the same data set's name and settings; draw them by --out elsewhere")
    arguments.drawn.add(path)
    plot(content, title, path)
    print(path.with_name(path.name + ".png"))


def read_settings(classes: Sequence[type], texts: Sequence[str]) -> dict[type, Any]:
    """Analysis → its settings, by `key=value` texts, which are checked; a key may belong to several."""
    known = {cls: {field.name for field in dataclasses.fields(cls)} for cls in classes}
    keys = sorted(set().union(*known.values()))
    expected = f"expected KEY=VALUE, the key one of {', '.join(keys)}" if keys else "this figure has no settings"
    for text in texts:
        if text.partition("=")[0] not in keys:
            raise UserError(f"--set {text}: {expected}")
    return {cls: load_config(cls, None, [t for t in texts if t.partition("=")[0] in known[cls]]) for cls in classes}


# --- the figures: of runs that are alike in what `FIGURES` says


def loaded(run: Finished, arguments: argparse.Namespace) -> TrainedRun:
    """Its network, on the device that `--device` names, and its images; once."""
    if isinstance(arguments.device, str):
        arguments.device = parse_devices(arguments.device, "--device")[0]
        make_current(arguments.device)
    if run.network is None:
        places = {"data_root": arguments.data_root, "target_path": arguments.target_path}
        places = {key: value for key, value in places.items() if value is not None}
        run.network = load_run(run.path, arguments.device, **places)
    return run.network


ANALYSES = {  # settings → what they are of; which of them do not name the file in which its results are kept
    Sampling: ("calibration", measure_calibration, ()),
    Attack: ("robustness", measure_robustness, NORMS),
    Plane: ("surface", loss_surface, ()),
}


def analysed(run: Finished, arguments: argparse.Namespace, analysis: type) -> dict[str, Any]:
    """What an analysis finds about a run, which is kept: a file for each choice of settings."""
    (name, measure, without), settings = ANALYSES[analysis], arguments.analyses[analysis]
    chosen = {key: value for key, value in dataclasses.asdict(settings).items() if key not in without}
    return measure(loaded(run, arguments), settings, run.path / "analyses" / f"{name}-{digest(chosen)}.json")


def of_methods(runs: Sequence[Finished], arguments: argparse.Namespace, *pictures: tuple[str, Callable, Any]) -> None:
    """Pictures of methods and their runs: file, how it is drawn, and what of each run: an analysis or a function."""
    methods = by_method(runs)
    if any(what is Attack for *_, what in pictures):
        for run in runs:  # whatever is wrong is told before hours of work
            check_attack(loaded(run, arguments), arguments.analyses[Attack])
    for kind, plot, what in pictures:
        of_run = functools.partial(analysed, arguments=arguments, analysis=what) if what in ANALYSES else what
        draw(arguments, kind, plot, {name: [*map(of_run, same)] for name, same in methods.items()}, runs[0].title())


def surfaces(runs: Sequence[Finished], arguments: argparse.Namespace) -> None:
    """Loss surfaces, of each method its first seed."""
    first = [min(same, key=lambda run: run.seed) for same in by_method(runs).values()]
    of_methods(first, arguments, ("fig8", plots.plot_surfaces, Plane))


def scales(runs: Sequence[Finished], arguments: argparse.Namespace) -> None:
    """Learned scales, of several data sets side by side; of the runs those of MetaPerturb."""
    perturbed = [run for run in runs if run.method == "metaperturb"] or runs  # which have none
    several = len({run.steps for run in perturbed}) > 1
    by_data: dict[str, list[list[dict]]] = {}
    for same in grouped(perturbed, lambda run: (data_of(run), run.steps)).values():
        for name, of_name in by_method(same).items():
            name = name.replace("metaperturb", same[0].data, 1) + f", {same[0].steps} steps" * several
            if name in by_data:
                raise UserError(f"{of_name[0].path}: is about other images than another run about {name}")
            by_data[name] = [
                [at | {"run": run.path.name, "seed": run.seed} for at in learned_scales(loaded(run, arguments))]
                for run in of_name
            ]
    networks = {str([(at["site"], at["channels"]) for at in of_run]) for same in by_data.values() for of_run in same}
    if len(networks) > 1:
        raise UserError("the runs are of different networks, whose blocks cannot be set side by side")
    names = [*dict.fromkeys(run.data for run in perturbed)]
    title = f"{', '.join(names) if len(names) < 4 else f'{len(names)} data sets'}, {perturbed[0].model}"
    draw(arguments, "fig7 scales", plots.plot_scales, by_data, title)


def growth(runs: Sequence[Finished], arguments: argparse.Namespace, kind: str, setting: str, of: str) -> None:
    """Final accuracy against the number `of` runs, which a setting gives, over the seeds that a method has for all."""
    unit = {"steps": "training steps", "train_images": "training images"}[of]
    by_amount = grouped(sorted(runs, key=operator.attrgetter(of)), operator.attrgetter(of))
    if len(by_amount) < 2:
        raise NothingToShow(f"all runs have {getattr(runs[0], of)} {unit}; this picture needs several numbers of them")
    check_settings(runs, varied=setting)
    by_amount = {n: by_method(same) for n, same in by_amount.items()}
    results: dict[str, dict[int, list[float]]] = {}
    for method in dict.fromkeys(name for methods in by_amount.values() for name in methods):
        found = {n: methods[method] for n, methods in by_amount.items() if method in methods}
        common = set.intersection(*({run.seed for run in same} for same in found.values()))
        for n, same in found.items():
            if left_out := sorted({run.seed for run in same} - common):
                print(f"{method}, {n} {unit}: left out, as others lack them: seeds {left_out}", file=sys.stderr)
            if common:
                results.setdefault(method, {})[n] = [run.accuracy for run in same if run.seed in common]
    if not results:
        raise UserError(f"no method has one seed for all numbers of {unit}")
    draw(arguments, kind, plots.plot_growth, {unit: results}, runs[0].title(without=setting))


EFFORT = {  # what φ's card says of its meta-training → what the picture calls it
    "steps": "meta-training steps",
    "tasks": "meta-training tasks",
    "classes": "classes of the source",
}


def effort(runs: Sequence[Finished], arguments: argparse.Namespace) -> None:
    """Final accuracy with φ against what φ was meta-trained with.

    A panel has the runs whose φ differ in one of `EFFORT` and nothing else, seeds aside; those of several seeds are
    averaged. Where this leaves several panels of one number, the one with most values is shown.
    """
    runs = [copy.copy(run) for run in runs if run.method in ("base", "metaperturb")]
    for run in runs:
        run.phi = ""  # all are one method
    trained = [(run, made) for run in runs if (made := meta_training(run)) is not None]
    panels, shown = {}, set()
    for key, label in EFFORT.items():
        alike = grouped(trained, lambda item, key=key: str({k: v for k, v in item[1].items() if k != key}))
        by_number = [grouped(same, lambda item, key=key: item[1][key]) for same in alike.values()]
        widest = max(by_number, key=len, default={})
        if len(widest) > 1:
            of_number = {number: [run.accuracy for run, _ in same] for number, same in sorted(widest.items())}
            panels[label] = {"metaperturb": of_number}
            shown |= {run.path for same in widest.values() for run, _ in same}
    if not panels:
        raise NothingToShow(
            "no two runs of MetaPerturb whose φ differ in the steps, tasks or classes of their meta-training alone"
        )
    methods = by_method(runs)
    for method, names in grouped(methods, lambda name: name.partition(",")[0]).items():
        if len(names) > 1:
            raise UserError(f"this picture shows one use of {method}, but the runs are of {' and of '.join(names[:2])}")
    for run, _ in trained:
        if run.path not in shown:
            print(f"{run.path}: left out, its φ differs in more than one number from those drawn", file=sys.stderr)
    base = [run.accuracy for run in methods.get("base", ())]
    draw(arguments, "effort", functools.partial(plots.plot_growth, level=base), panels, runs[0].title())


def learning(runs: Sequence[Finished], arguments: argparse.Namespace) -> None:
    """Loss, accuracy and the size of φ's parts during meta-training, of several settings and seeds."""
    histories = {name: [read_metrics(run.path) for run in same] for name, same in by_making(runs).items()}
    name = ", ".join([runs[0].result["source"]["name"], *dict.fromkeys(run.model for run in runs)])
    draw(arguments, "learning", plots.plot_learning, histories, name)


def every_number(arguments: argparse.Namespace) -> None:
    """The 82 numbers of a φ each."""
    if not arguments.sources:
        raise UserError("name a φ: its file, or a shipped one")
    for source in arguments.sources:
        values = {name: value.detach().numpy() for name, value in load_phi(str(source)).tensors()._asdict().items()}
        name = source.resolve().parent.name if source.stem == "phi" else source.stem
        draw(arguments, "phi", plots.plot_phi, values, name)


def data_of(run: Finished) -> tuple[Any, ...]:
    """Identifies the images and the network of a run."""
    return *run.images, run.model


class Figure(NamedTuple):
    """A figure's command, and what `./run.sh figures` draws with it."""

    draw: Callable[[Sequence[Finished], argparse.Namespace], None]  # refuses what does not go together
    takes: str = "is_target"  # what `figures` has in one: attribute of a run
    alike: Callable[[Finished], Any] = lambda run: (data_of(run), run.steps)  # equal for runs of one picture
    analyses: tuple[type, ...] = ()  # settings that `--set` changes


def pictures(*of_runs: tuple[str, Callable, Any]) -> Callable[[Sequence[Finished], argparse.Namespace], None]:
    return lambda runs, arguments: of_methods(runs, arguments, *of_runs)


LENGTHS = functools.partial(growth, kind="lengths", setting="steps", of="steps")
AMOUNT = functools.partial(growth, kind="amount", setting="train_per_class", of="train_images")
CALIBRATION = ("fig6 calibration", plots.plot_reliability, Sampling), ("fig6 samples", plots.plot_samples, Sampling)
ROBUSTNESS = ("fig6 robustness", plots.plot_robustness, Attack)
FIGURES = {
    "fig5": Figure(pictures(("fig5", plots.plot_convergence, operator.attrgetter("curve"))), "has_network"),
    "fig6": Figure(pictures(*CALIBRATION, ROBUSTNESS), "has_network", analyses=(Attack, Sampling)),
    "fig7": Figure(scales, "has_scales", operator.attrgetter("model")),
    "fig8": Figure(surfaces, "has_network", analyses=(Plane,)),
    "compare": Figure(pictures(("compare", plots.plot_comparison, lambda run: run.result["metrics"]))),
    "lengths": Figure(LENGTHS, alike=data_of),
    "amount": Figure(AMOUNT, alike=lambda run: (run.images[1], run.model, run.steps)),
    "effort": Figure(effort),
    "learning": Figure(learning, "is_source", lambda run: run.result["source"]["fingerprint"]),
}


if __name__ == "__main__":
    sys.exit(main())
