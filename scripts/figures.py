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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tables import finished
from tables.finished import Finished, by_method, grouped
from tables.grid import slug

from metaperturb import plots
from metaperturb.analyses.calibration import Sampling, measure_calibration
from metaperturb.analyses.records import check_comparable
from metaperturb.analyses.robustness import NORMS, Attack, check_attack, measure_robustness
from metaperturb.analyses.scales import learned_scales
from metaperturb.analyses.surface import Plane, loss_surface
from metaperturb.cli import argument_parser, pairs, run_program
from metaperturb.config import load_config
from metaperturb.distributed import make_current, parse_devices
from metaperturb.errors import UserError
from metaperturb.identity import digest
from metaperturb.runs import read_metrics
from metaperturb.trained import TrainedRun, load_run
from metaperturb.weights import load_phi

ROOT = Path(__file__).resolve().parent.parent


def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("figure", choices=[*FIGURES, "phi", "figures"])
    where = "run folders, records, or folders that hold some [all of --runs]; of phi the file or name of a φ"
    parser.add_argument("sources", type=Path, nargs="*", help=where)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where runs are looked for")
    parser.add_argument("--out", type=Path, default=ROOT / "figures", help="folder of the pictures")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="only these")
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
    called = pairs("--call", arguments.call, "FILE=NAME, the file of a φ without its suffix")
    found = finished.find_runs(arguments.sources or [arguments.runs])
    sources = [run for run in found if not run.is_target]
    targets = [run for run in found if run.is_target and run.method in (arguments.methods or [run.method])]
    if everything or chosen[0].draw is not learning:
        finished.tell_phis_apart(targets, called)
    if everything:
        every_figure([*targets, *sources], arguments)
        return
    (figure,) = chosen
    runs = sources if figure.draw is learning else targets
    if not runs:
        what = "meta-training (./run.sh src)" if figure.draw is learning else "these methods (./run.sh tgt, table1, …)"
        raise UserError(f"no finished run of {what} there")
    for run in runs[1:]:
        if figure.alike(run) != figure.alike(runs[0]):
            about = f"{run.path}: has another {figure.one} than {runs[0].path}"
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
            for some in grouped(filter(figure.takes, of_folder), figure.alike).values():
                try:
                    figure.draw(some, arguments)
                except NothingToShow:
                    continue
                except UserError as error:
                    refused += 1
                    print(f"{name} not drawn: {error}", file=sys.stderr)
    if refused:
        raise UserError(f"{refused} pictures were not drawn, for the reasons above")


class NothingToShow(UserError):
    """Runs that go together, but have nothing of what a picture is about."""


def draw(arguments: argparse.Namespace, kind: str, plot: Callable[..., None], content: Any, title: str) -> None:
    """Draw `content` into a file named after kind and title, and after the folder where runs are of several."""
    path = arguments.out / (slug(f"{kind} {title}") + (f"-{arguments.where}" if arguments.where else ""))
    if path in arguments.drawn:
        raise UserError(f"{path}: other runs have the same data set's name and settings; draw them by --out elsewhere")
    arguments.drawn.add(path)
    try:
        plot(content, title, path)
    except ValueError as error:  # of curves that lack something
        raise UserError(f"metrics.jsonl of {error}") from error
    print(path.with_name(path.name + ".png"))


@functools.cache
def chosen_device(text: str) -> torch.device:
    """What `--device` names; says it once, however many runs there are."""
    device = parse_devices(text, "--device")[0]
    make_current(device)
    return device


def loaded(run: Finished, arguments: argparse.Namespace) -> TrainedRun:
    places = {"data_root": arguments.data_root, "target_path": arguments.target_path}
    folder, device = run.dir, chosen_device(arguments.device)
    try:
        return load_run(folder, device, **{key: value for key, value in places.items() if value is not None})
    except UserError as error:
        path = arguments.target_path or run.config["target_path"]
        hint = "" if path is None or Path(path).exists() else " (--target-path says where they are now)"
        raise UserError(f"{error}{hint}") from error


def read_settings(classes: Sequence[type], texts: Sequence[str]) -> dict[type, Any]:
    """Analysis → its settings, by `key=value` texts, which are checked; a key may belong to several."""
    known = {cls: {field.name for field in dataclasses.fields(cls)} for cls in classes}
    keys = sorted(set().union(*known.values()))
    expected = f"expected KEY=VALUE, the key one of {', '.join(keys)}" if keys else "this figure has no settings"
    for text in texts:
        if text.partition("=")[0] not in keys:
            raise UserError(f"--set {text}: {expected}")
    return {cls: load_config(cls, None, [t for t in texts if t.partition("=")[0] in known[cls]]) for cls in classes}


def kept(run: Finished, analysis: str, settings: Any, without: Iterable[str] = ()) -> Path:
    """Where what an analysis found about a run is kept: a file for each choice of settings."""
    chosen = {key: value for key, value in dataclasses.asdict(settings).items() if key not in without}
    return run.dir / "analyses" / f"{analysis}-{digest(chosen)}.json"


# --- the figures: of runs that are alike in what `FIGURES` says


def figure5(runs: Sequence[Finished], arguments: argparse.Namespace) -> None:
    """Convergence."""
    histories = {
        method: [[{**line, "seed": run.seed} for line in run.curve] for run in same]
        for method, same in by_method(runs).items()
    }
    draw(arguments, "fig5", plots.plot_convergence, histories, runs[0].title())


def figure6(runs: Sequence[Finished], arguments: argparse.Namespace) -> None:
    """Robustness and calibration."""
    methods = by_method(runs)
    attack, sampling = arguments.analyses[Attack], arguments.analyses[Sampling]
    trained = {run.dir: loaded(run, arguments) for run in runs}
    for run in trained.values():  # whatever is wrong is told before hours of work
        check_attack(run, attack)
    calibrated: dict[str, list[dict]] = {name: [] for name in methods}
    attacked: dict[str, list[dict]] = {name: [] for name in methods}
    for name, run in ((name, run) for name, same in methods.items() for run in same):
        network = trained[run.dir]
        calibrated[name].append(measure_calibration(network, sampling, kept(run, "calibration", sampling)))
        attacked[name].append(measure_robustness(network, attack, kept(run, "robustness", attack, without=NORMS)))
    for kind, results, plot in (
        ("calibration", calibrated, plots.plot_reliability),
        ("samples", calibrated, plots.plot_samples),
        ("robustness", attacked, plots.plot_robustness),
    ):
        check_comparable(results)
        draw(arguments, f"fig6 {kind}", plot, results, runs[0].title())


def figure7(runs: Sequence[Finished], arguments: argparse.Namespace) -> None:
    """Learned scales, of several data sets side by side; of the runs those of MetaPerturb."""
    perturbed = [run for run in runs if run.method == "metaperturb"]
    if not perturbed:
        raise UserError(f"{runs[0].dir}: method {runs[0].method} has no scales s, nor has any other run here")
    steps_differ = len({run.steps for run in perturbed}) > 1
    by_data: dict[str, list[list[dict]]] = {}
    for same in grouped(perturbed, lambda run: (data_of(run), run.steps)).values():
        for name, of_name in by_method(same).items():
            name = name.replace("metaperturb", of_name[0].data, 1)
            name += f", {of_name[0].steps} steps" if steps_differ else ""
            if name in by_data:
                raise UserError(f"{of_name[0].dir}: is about other images than another run about {name}")
            for run in of_name:
                own = {"run": run.dir.name, "seed": run.seed}
                by_data.setdefault(name, []).append([at | own for at in learned_scales(loaded(run, arguments))])
    networks = [[(at["site"], at["channels"]) for at in scales] for same in by_data.values() for scales in same]
    if any(sites != networks[0] for sites in networks):
        raise UserError("the runs are of different networks, whose blocks cannot be set side by side")
    names = dict.fromkeys(run.data for run in perturbed)
    names = ", ".join(names) if len(names) < 4 else f"{len(names)} data sets"
    draw(arguments, "fig7 scales", plots.plot_scales, by_data, f"{names}, {perturbed[0].model}")


def figure8(runs: Sequence[Finished], arguments: argparse.Namespace) -> None:
    """Loss surfaces, of each method its first seed."""
    plane, surfaces = arguments.analyses[Plane], {}
    for method, same in by_method(runs).items():
        run = min(same, key=lambda run: run.seed)
        surfaces[method] = loss_surface(loaded(run, arguments), plane, kept(run, "surface", plane))
    draw(arguments, "fig8", plots.plot_surfaces, surfaces, runs[0].title())


def compare(runs: Sequence[Finished], arguments: argparse.Namespace) -> None:
    """Final accuracy, loss and calibration of methods."""
    results = {name: [run.result["metrics"] for run in same] for name, same in by_method(runs).items()}
    draw(arguments, "compare", plots.plot_comparison, results, runs[0].title())


def growth(runs: Sequence[Finished], arguments: argparse.Namespace, kind: str, setting: str, of: str) -> None:
    """Final accuracy against the number `of` runs, which a setting gives, over the seeds that a method has for all."""
    unit = {"steps": "training steps", "train_images": "training images"}[of]
    amounts = grouped(runs, operator.attrgetter(of))
    if len(amounts) < 2:
        raise NothingToShow(f"all runs have {getattr(runs[0], of)} {unit}; this picture needs several numbers of them")
    finished.check_settings(runs, varied=setting)
    by_amount = {n: by_method(same) for n, same in sorted(amounts.items())}
    results: dict[str, dict[int, list[float]]] = {}
    for method in dict.fromkeys(name for methods in by_amount.values() for name in methods):
        found = {n: methods[method] for n, methods in by_amount.items() if method in methods}
        common = set.intersection(*({run.seed for run in same} for same in found.values()))
        for n, same in found.items():
            if left_out := sorted({run.seed for run in same} - common):
                print(f"{method}, {n} {unit}: left out, as others lack them: seeds {left_out}", file=sys.stderr)
            if accuracies := [run.accuracy for run in same if run.seed in common]:
                results.setdefault(method, {})[n] = accuracies
    if not results:
        raise UserError(f"no method has one seed for all numbers of {unit}")
    about = runs[0].title(with_steps=setting != "steps", with_amount=setting != "train_per_class")
    draw(arguments, kind, plots.plot_growth, {unit: results}, about)


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
        run.phi = ""
    trained = [(run, made) for run in runs if (made := finished.meta_training(run)) is not None]
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
    finished.check_settings(runs)
    for method, same in grouped(runs, lambda run: run.method).items():
        if len(names := [*grouped(same, lambda run: run.name)]) > 1:
            raise UserError(f"this picture shows one use of {method}, but the runs are of {' and of '.join(names[:2])}")
        for twice in grouped(same, lambda run: (run.phi_key, run.seed)).values():
            if len(twice) > 1:
                seed = f"seed {twice[1].seed} and the same φ"
                raise UserError(f"{twice[1].path}: there are two runs of {method} with {seed}")
    for run, _ in trained:
        if run.path not in shown:
            print(f"{run.path}: left out, its φ differs in more than one number from those drawn", file=sys.stderr)
    base = [run.accuracy for run in runs if run.method == "base"]
    draw(arguments, "effort", functools.partial(plots.plot_growth, level=base), panels, runs[0].title())


def learning(runs: Sequence[Finished], arguments: argparse.Namespace) -> None:
    """Loss, accuracy and the size of φ's parts during meta-training, of several settings and seeds."""
    histories = {name: [read_metrics(run.dir) for run in same] for name, same in finished.by_making(runs).items()}
    name = ", ".join([runs[0].result["source"]["name"], *dict.fromkeys(run.model for run in runs)])
    draw(arguments, "learning", plots.plot_learning, histories, name)


def every_number(arguments: argparse.Namespace) -> None:
    """The 82 numbers of a φ each."""
    if not arguments.sources:
        raise UserError("name a φ: its file, or a shipped one")
    for source in map(str, arguments.sources):
        values = {name: value.detach().numpy() for name, value in load_phi(source).tensors()._asdict().items()}
        name = Path(source).stem
        name = Path(source).resolve().parent.name if name == "phi" else name
        draw(arguments, "phi", plots.plot_phi, values, name)


def data_of(run: Finished) -> tuple[Any, ...]:
    """Identifies the images and the network of a run."""
    return *run.images, run.model


class Figure(NamedTuple):
    """A figure's command, and what `./run.sh figures` draws with it.

    Attributes:
        draw: the picture of some runs; refuses what does not go together.
        takes: whether `./run.sh figures` has a run in such a picture.
        alike: runs that are equal in this are in one picture; `one`: what that is.
        analyses: settings that `--set` changes.
    """

    draw: Callable[[Sequence[Finished], argparse.Namespace], None]
    takes: Callable[[Finished], bool] = operator.attrgetter("is_target")
    alike: Callable[[Finished], Any] = lambda run: (data_of(run), run.steps)
    one: str = "data set, network or length"
    analyses: tuple[type, ...] = ()


has_network = operator.attrgetter("has_network")
LENGTHS = functools.partial(growth, kind="lengths", setting="steps", of="steps")
AMOUNT = functools.partial(growth, kind="amount", setting="train_per_class", of="train_images")
FIGURES = {
    "fig5": Figure(figure5, has_network),
    "fig6": Figure(figure6, has_network, analyses=(Attack, Sampling)),
    "fig7": Figure(
        figure7,
        lambda run: run.has_network and run.method == "metaperturb" and run.config["gate"],
        operator.attrgetter("model"),
        "network",
    ),
    "fig8": Figure(figure8, has_network, analyses=(Plane,)),
    "compare": Figure(compare),
    "lengths": Figure(LENGTHS, alike=data_of, one="data set or network"),
    "amount": Figure(
        AMOUNT, alike=lambda run: (run.images[1], run.model, run.steps), one="test set, network or length"
    ),
    "effort": Figure(effort),
    "learning": Figure(
        learning, lambda run: not run.is_target, lambda run: run.result["source"]["fingerprint"], "source of images"
    ),
}


if __name__ == "__main__":
    sys.exit(main())
