"""Figures 5 to 8, and some beyond the paper, from finished runs, as PNG and SVG with the numbers behind them as CSV.

    ./run.sh fig5 runs/tgt-*                              # convergence: all methods and seeds of one data set
    ./run.sh fig6 runs/tgt-cub-*                          # robustness and calibration
    ./run.sh fig7 runs/                                   # learned scales, of any number of data sets
    ./run.sh fig8 runs/tgt-cub-*-seed0                    # loss surfaces, a panel a method
    ./run.sh lengths runs/schedule/cpu                    # final accuracy against the number of training steps
    ./run.sh amount runs/amount/cpu                       # against the number of training images
    ./run.sh effort runs/effort/cpu                       # against the steps, tasks and classes of φ's meta-training
    ./run.sh figures                                      # all of them, for every data set under runs/

A folder that holds runs stands for all of them. Runs of a method that differ in their seed alone are averaged; those of
MetaPerturb with several φ are told apart by the φ's file. What takes long (attacks, Monte-Carlo samples, surfaces) says
its cost first, is kept in the run's folder, and continues from there. --set gives other settings of the figure's
analysis: fig6 --set steps=50 images=1000, fig8 --set points=31.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.grid import INCIDENTAL, slug

from metaperturb import plots
from metaperturb.analyses.calibration import Sampling, calibration_curves, measure_calibration
from metaperturb.analyses.robustness import Attack, measure_robustness, robustness_curves
from metaperturb.analyses.scales import learned_scales, noise_spread
from metaperturb.analyses.surface import Plane, loss_surface
from metaperturb.cli import pairs, run_program
from metaperturb.config import MetaTrainConfig, default_of
from metaperturb.distributed import choose_devices
from metaperturb.errors import UserError
from metaperturb.runs import read_metrics
from metaperturb.storage import load_json
from metaperturb.trained import TrainedRun, load_run

ROOT = Path(__file__).resolve().parent.parent
# What may differ between the runs that are averaged; and, as well, between the methods of a picture.
OF_A_RUN = {*INCIDENTAL, "method", "run_dir", "data_root", "target_path"}
OF_A_METHOD = {*OF_A_RUN, "phi", "recipe", "init", "clip", "anneal"}


@dataclass(frozen=True)
class Finished:
    """A finished run, as far as its `result.json` tells."""

    dir: Path
    result: Mapping[str, Any]
    phi: str = ""  # tells its φ apart, where runs have several

    @property
    def config(self) -> Mapping[str, Any]:
        return self.result["config"]

    @property
    def name(self) -> str:
        """The method as pictures call it: `metaperturb`, `base, finetuned`, `metaperturb, φ selected, mixup`."""
        parts = [self.config["method"], self.phi, "finetuned" if self.config["init"] else ""]
        parts += self.config.get("recipe", [])  # older runs lack it
        return ", ".join(part for part in parts if part)

    @property
    def data(self) -> str:
        """The data set as pictures call it; of an image folder its name."""
        config = self.config
        return Path(config["target_path"]).stem if config["target"] == "folder" else config["target"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=[*FIGURES, "figures"])
    parser.add_argument("sources", type=Path, nargs="*", help="run folders, or folders that hold some [all of --runs]")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where runs are looked for")
    parser.add_argument("--out", type=Path, default=ROOT / "figures", help="folder of the pictures")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="only these")
    parser.add_argument(
        "--call", nargs="+", default=[], metavar="FILE=NAME", help='name a φ: --call perturb_750="the authors\' φ"'
    )
    parser.add_argument("--device", default="auto", help="GPU number, 'cpu' or 'auto'")
    parser.add_argument("--data-root", help="where the data are, if elsewhere than when the runs ran")
    parser.add_argument("--target-path", help="likewise, of an image folder")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="of the analysis")
    parser.add_argument("--traceback", action="store_true", help="show where an error arose")
    arguments = parser.parse_intermixed_args(argv)  # options may stand before, between and behind the folders
    return run_program(lambda: figures(arguments), show_traceback=arguments.traceback)


def figures(arguments: argparse.Namespace) -> None:
    runs = find_runs(arguments.sources or [arguments.runs])
    if arguments.methods:
        runs = [run for run in runs if run.config["method"] in arguments.methods]
    if not runs:
        raise UserError("no finished run of these methods")
    runs = tell_phis_apart(runs, pairs("--call", arguments.call, "FILE=NAME, the file of a φ without its suffix"))
    if arguments.figure != "figures":
        FIGURES[arguments.figure](runs, arguments)
        return
    by_data = grouped(runs, data_of)
    for name, figure in FIGURES.items():
        if name == "fig7":
            for of_network in grouped(runs, lambda run: run.config["model"]).values():
                if any(run.config["method"] == "metaperturb" for run in of_network):
                    figure(of_network, arguments)
        elif name in ("lengths", "amount"):
            by, amounts = (data_of, steps_of) if name == "lengths" else (test_of, train_images)
            for comparable in grouped(runs, by).values():
                if len(grouped(comparable, amounts)) > 1:
                    figure(comparable, arguments)
        elif name == "effort":
            continue  # which φ are to be compared must be said
        else:
            for of_data in by_data.values():
                for of_length in grouped(of_data, steps_of).values():
                    figure(of_length, arguments)


# --- which runs


def find_runs(sources: Iterable[Path]) -> list[Finished]:
    """The finished runs of meta-testing among folders and below them, in the order of their names.

    Raises:
        UserError: a folder that is not there, holds no finished run, or is a run that is not finished.
    """
    found: dict[Path, Finished] = {}
    for source in sources:
        if not source.is_dir():
            raise UserError(f"{source}: no such folder")
        if (source / "config.yaml").exists() and not (source / "result.json").exists():
            raise UserError(f"{source}: this run is not finished (the command that began it continues it)")
        results = [source / "result.json"] if (source / "result.json").exists() else sorted(source.rglob("result.json"))
        runs = [Finished(path.parent, load_json(path)) for path in results]
        runs = [run for run in runs if isinstance(run.result, dict) and run.result.get("program") == "meta_test"]
        if not runs:
            raise UserError(f"{source}: holds no finished run of meta-testing (./run.sh tgt, ./run.sh table1)")
        found |= {run.dir.resolve(): run for run in runs}
    return [*found.values()]


def tell_phis_apart(runs: Sequence[Finished], called: Mapping[str, str]) -> list[Finished]:
    """Where runs have several φ, each gets a name: that of its file, of the file's folder if all are `phi.pt`.

    Args:
        runs: of any methods.
        called: other names in place of these.

    Raises:
        UserError: `called` names a φ that no run has.
    """
    paths = sorted({run.config["phi"] for run in runs if run.config["phi"]})
    for name_of in (lambda path: Path(path).stem, lambda path: Path(path).parent.name, str):
        names = {path: name_of(path) for path in paths}
        if len({*names.values()}) == len(names):
            break
    if unknown := [name for name in called if name not in names.values()]:
        raise UserError(
            f"--call {unknown[0]}: no run has a φ of this name ({', '.join(names.values()) or 'none at all'})"
        )
    if len(paths) < 2 and not called:
        return [*runs]
    names = {path: called.get(name, f"φ {name}") for path, name in names.items()}
    return [dataclasses.replace(run, phi=names.get(run.config["phi"], "")) for run in runs]


def grouped(runs: Iterable[Finished], key: Callable[[Finished], Any]) -> dict[Any, list[Finished]]:
    groups: dict[Any, list[Finished]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def steps_of(run: Finished) -> int:
    return run.config["steps"]


def train_images(run: Finished) -> int:
    return run.result["target"]["train"]


def test_of(run: Finished) -> tuple[Any, ...]:
    """Identifies what networks trained on different images are compared by."""
    return (run.result["target"]["fingerprints"][1], run.config["model"], steps_of(run))


def data_of(run: Finished) -> tuple[str, ...]:
    """Identifies the images and the network of a run."""
    return (*run.result["target"]["fingerprints"], run.config["model"])


def one_data_set(runs: Sequence[Finished]) -> str:
    """The name of the data set and network that all runs share.

    Raises:
        UserError: they are of several.
    """
    first = runs[0]
    for run in runs[1:]:
        if data_of(run) != data_of(first):
            raise UserError(
                f"{run.dir}: is about {title(run)}, {first.dir.name} about {title(first)}, and one picture shows one "
                "data set and network (./run.sh figures draws each)"
            )
    return title(first)


def title(run: Finished) -> str:
    return f"{run.data}, {run.config['model']}"


def of_one_length(runs: Sequence[Finished]) -> tuple[str, dict[str, list[Finished]]]:
    """The picture's title, and its runs under the names of their methods."""
    return f"{one_data_set(runs)}, {steps_of(runs[0])} steps", by_method(runs)


def by_method(runs: Sequence[Finished]) -> dict[str, list[Finished]]:
    """Runs under the name of their method, in the order of `plots.LABELS`.

    Raises:
        UserError: two runs of a method differ in more than the seed, or do not, or runs differ in what all share.
    """
    methods = grouped(runs, lambda run: run.name)
    for name, same in methods.items():
        seeds = [run.config["seed"] for run in same]
        for run in same[1:]:
            tell_apart(same[0], run, OF_A_RUN, f"runs of {name}")
        if len(set(seeds)) < len(seeds):
            raise UserError(f"{same[-1].dir}: there are two runs of {name} with one seed; name those that are meant")
    for run in runs[1:]:
        hyperparameters = {key for key in run.config if key.startswith(tuple(plots.LABELS))}
        tell_apart(runs[0], run, OF_A_METHOD | hyperparameters, "runs")
    order = [*plots.LABELS]
    return dict(
        sorted(
            methods.items(),
            key=lambda item: (item[1][0].config["init"] or "", order.index(item[1][0].config["method"]), item[0]),
        )
    )


def tell_apart(first: Finished, other: Finished, expected: set[str], what: str) -> None:
    keys = [key for key in first.config if key not in expected and first.config[key] != other.config.get(key)]
    if keys:
        changed = "; ".join(f"{key}: {first.config[key]} → {other.config.get(key)}" for key in keys)
        raise UserError(f"{other.dir}: {what} are averaged or compared, but this one has {changed}")


def loaded(run: Finished, arguments: argparse.Namespace) -> TrainedRun:
    device = choose_devices(arguments.device, 1)[0]
    places = {"data_root": arguments.data_root, "target_path": arguments.target_path}
    return load_run(run.dir, device, **{key: value for key, value in places.items() if value is not None})


ANALYSES = (Attack, Sampling, Plane)


def settings(cls: type, texts: Sequence[str]) -> Any:
    """An analysis's settings with `key=value` texts in place of defaults; keys of other analyses are left alone.

    Raises:
        UserError: no analysis has the key, or the value is no number.
    """
    known = {field.name: field.default for analysis in ANALYSES for field in dataclasses.fields(analysis)}
    values = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or key not in known:
            raise UserError(f"--set {text}: expected KEY=VALUE, the key one of {', '.join(sorted(known))}")
        try:
            numbers = tuple((float if "." in part or "e" in part else int)(part) for part in value.split(",") if part)
        except ValueError:
            raise UserError(f"--set {text}: not a number") from None
        values[key] = numbers if isinstance(known[key], tuple) else numbers[0] if len(numbers) == 1 else None
        if values[key] is None:
            raise UserError(f"--set {text}: expected one number")
    own = {field.name for field in dataclasses.fields(cls)}
    return cls(**{key: value for key, value in values.items() if key in own})


# --- the figures


def figure5(runs: Sequence[Finished], arguments: argparse.Namespace) -> None:
    """Convergence."""
    name, methods = of_one_length(runs)
    histories = {method: [read_metrics(run.dir) for run in same] for method, same in methods.items()}
    rows = [
        {
            "method": method,
            "seed": run.config["seed"],
            **{k: line[k] for k in ("step", "test_nll", "test_accuracy", "test_ece")},
        }
        for method, same in methods.items()
        for run, history in zip(same, histories[method], strict=True)
        for line in history
        if "test_accuracy" in line
    ]
    path = arguments.out / f"fig5-{slug(name)}"
    plots.plot_convergence(histories, name, path)
    write_numbers(rows, path)


def figure6(runs: Sequence[Finished], arguments: argparse.Namespace) -> None:
    """Robustness and calibration."""
    name, methods = of_one_length(runs)
    attack, sampling = settings(Attack, arguments.set), settings(Sampling, arguments.set)
    attacked: dict[str, list[dict]] = {}
    calibrated: dict[str, list[dict]] = {}
    for method, same in methods.items():
        for run in same:
            trained = loaded(run, arguments)
            found = measure_calibration(trained, sampling, analysis_path(run, "calibration"))
            calibrated.setdefault(method, []).append(found)
            found = measure_robustness(trained, attack, analysis_path(run, "robustness"))
            attacked.setdefault(method, []).append(found)
    calibration = calibration_curves(calibrated)
    for kind, curves, plot in (
        ("calibration", calibration, plots.plot_reliability),
        ("samples", calibration, plots.plot_samples),
        ("robustness", robustness_curves(attacked), plots.plot_robustness),
    ):
        path = arguments.out / f"fig6-{kind}-{slug(name)}"
        plot(curves, path)
        print(path.with_name(path.name + ".png"))


def figure7(runs: Sequence[Finished], arguments: argparse.Namespace) -> None:
    """Learned scales, of several data sets side by side; of the runs those of MetaPerturb."""
    perturbed = [run for run in runs if run.config["method"] == "metaperturb"]
    if not perturbed:
        raise UserError(f"{runs[0].dir}: method {runs[0].config['method']} has no scales s, nor has any other run here")
    by_data: dict[str, list[list[dict]]] = {}
    rows = []
    for run in perturbed:
        trained = loaded(run, arguments)
        scales = [
            {**place, "spread": spread}
            for place, spread in zip(learned_scales(trained), noise_spread(trained), strict=True)
        ]
        name = run.name.replace("metaperturb", run.data, 1)
        by_data.setdefault(name, []).append(scales)
        rows += [
            {"data": name, "run": run.dir.name, "seed": run.config["seed"]}
            | {"site": place["site"], "channel": channel, "s": s, "spread": spread}
            for place in scales
            for channel, (s, spread) in enumerate(zip(place["s"], place["spread"], strict=True))
        ]
    networks = {
        tuple((place["site"], place["channels"]) for place in scales) for same in by_data.values() for scales in same
    }
    if len(networks) > 1:
        raise UserError("the runs are of different networks, whose blocks cannot be set side by side")
    path = arguments.out / f"fig7-scales-{slug(perturbed[0].config['model'])}"
    plots.plot_scales(by_data, path)
    write_numbers(rows, path)


def figure8(runs: Sequence[Finished], arguments: argparse.Namespace) -> None:
    """Loss surfaces, of each method its first seed."""
    name, methods = of_one_length(runs)
    plane = settings(Plane, arguments.set)
    surfaces = {}
    for method, same in methods.items():
        run = min(same, key=lambda run: run.config["seed"])
        surfaces[method] = loss_surface(loaded(run, arguments), plane, analysis_path(run, "surface"))
    path = arguments.out / f"fig8-{slug(name)}"
    plots.plot_surfaces(surfaces, name, path)
    rows = [
        {"method": method, "a": a, "b": b, "loss": loss}
        for method, surface in surfaces.items()
        for a, row in zip(surface["coordinates"], surface["loss"], strict=True)
        for b, loss in zip(surface["coordinates"], row, strict=True)
    ]
    write_numbers(rows, path)


def lengths(runs: Sequence[Finished], arguments: argparse.Namespace) -> None:
    """Final accuracy against the length of training."""
    name = one_data_set(runs)
    growth(runs, steps_of, "training steps", f"lengths-{slug(name)}", name, arguments)


def amount(runs: Sequence[Finished], arguments: argparse.Namespace) -> None:
    """Final accuracy against the number of training images, all runs of one length."""
    for run in runs[1:]:
        if test_of(run) != test_of(runs[0]):
            raise UserError(
                f"{run.dir}: is about {title(run)}, {steps_of(run)} steps, {runs[0].dir.name} about {title(runs[0])}, "
                f"{steps_of(runs[0])} steps, and one picture shows one test set, network and length"
            )
    name = f"{title(runs[0])}, {steps_of(runs[0])} steps"
    growth(runs, train_images, "training images", f"amount-{slug(name)}", name, arguments)


def growth(
    runs: Sequence[Finished],
    amount_of: Callable[[Finished], int],
    unit: str,
    file: str,
    name: str,
    arguments: argparse.Namespace,
) -> None:
    """Final accuracy against `amount_of`, counted in `unit`, over the seeds that a method has for each amount of its.

    Raises:
        UserError: there is one amount only, or no seed that goes through all.
    """
    by_amount = {n: by_method(same) for n, same in sorted(grouped(runs, amount_of).items())}
    if len(by_amount) < 2:
        raise UserError(f"all runs have {amount_of(runs[0])} {unit}; this picture needs several numbers of them")
    results: dict[str, dict[int, list[float]]] = {}
    for method in dict.fromkeys(name for methods in by_amount.values() for name in methods):
        found = {n: methods[method] for n, methods in by_amount.items() if method in methods}
        common = set.intersection(*({run.config["seed"] for run in same} for same in found.values()))
        for n, same in found.items():
            if left_out := sorted(run.config["seed"] for run in same if run.config["seed"] not in common):
                print(f"{method}, {n} {unit}: left out, as others lack them: seeds {left_out}", file=sys.stderr)
            kept = [run.result["metrics"]["accuracy"] for run in same if run.config["seed"] in common]
            if kept:
                results.setdefault(method, {})[n] = kept
    if not results:
        raise UserError(f"no method has one seed for all numbers of {unit}")
    path = arguments.out / file
    plots.plot_growth(results, unit, name, path)
    print(path.with_name(path.name + ".png"))


EFFORT = {  # what φ's card says of its meta-training → what the picture calls it
    "steps": "meta-training steps",
    "tasks": "meta-training tasks",
    "classes": "classes of the source",
}


def effort(runs: Sequence[Finished], arguments: argparse.Namespace) -> None:
    """Final accuracy with φ against what φ was meta-trained with: a panel for each of `EFFORT` of which φ have several.

    A panel holds the runs whose φ differ in nothing else, seeds aside; those of several seeds are averaged.
    """
    name = f"{one_data_set(runs)}, {steps_of(runs[0])} steps"
    for run in runs[1:]:
        tell_apart(runs[0], run, OF_A_METHOD, "runs")
    base = [run.result["metrics"]["accuracy"] for run in runs if run.config["method"] == "base"]
    trained = [(run.result["metrics"]["accuracy"], meta_training(run)) for run in runs]
    panels = {}
    for key, label in EFFORT.items():
        alike: dict[str, dict[int, list[float]]] = {}  # all other settings → amount → accuracies
        for accuracy, made in trained:
            if made is not None:
                others = {k: v for k, v in made.items() if k != key}
                alike.setdefault(str(others), {}).setdefault(made[key], []).append(accuracy)
        widest = max(alike.values(), key=len, default={})
        if len(widest) > 1:
            panels[label] = dict(sorted(widest.items()))
    if not panels:
        raise UserError(
            "no two runs of MetaPerturb whose φ differ in the steps, tasks or classes of their meta-training alone"
        )
    path = arguments.out / f"effort-{slug(name)}"
    plots.plot_effort(panels, base, name, path)
    print(path.with_name(path.name + ".png"))


def meta_training(run: Finished) -> dict[str, Any] | None:
    """The settings that made a run's φ what it is, `classes`: how many the source had; None where they are unknown."""
    card = run.result["phi_card"] or {}
    if not {"config", "source"} <= card.keys():
        return None
    made = {
        field.name: card["config"].get(field.name, default_of(field))
        for field in dataclasses.fields(MetaTrainConfig)
        if field.metadata["identity"] and field.name not in INCIDENTAL
    }
    return {**made, "classes": card["source"]["classes"]}


FIGURES: dict[str, Callable[[Sequence[Finished], argparse.Namespace], None]] = {
    "fig5": figure5,
    "fig6": figure6,
    "fig7": figure7,
    "fig8": figure8,
    "lengths": lengths,
    "amount": amount,
    "effort": effort,
}


def analysis_path(run: Finished, name: str) -> Path:
    return run.dir / "analyses" / f"{name}.json"


def write_numbers(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    plots.save_numbers([*rows[0]], [[*row.values()] for row in rows], path)
    print(path.with_name(path.name + ".png"))


if __name__ == "__main__":
    sys.exit(main())
