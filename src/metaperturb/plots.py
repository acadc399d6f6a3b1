"""Pictures in one style, and the numbers in them.

    plot_convergence({"base": [read_metrics("runs/tgt-base-seed0")]}, "CUB", Path("curves"))

Each `plot_…` takes what its description names, then `title` and `path`. It writes PNG, SVG and the numbers as CSV, or
the one format that the suffix of `path` names. Lines are means over seeds; bands are one standard deviation wide on
both sides. A method has the name that `name_of` reads: `metaperturb, finetuned`.
"""

import csv
import functools
import io
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure  # by itself, without pyplot: files only; no display is needed
from matplotlib.ticker import LogLocator, NullLocator

from metaperturb.errors import UserError
from metaperturb.regularizers import REGULARIZERS
from metaperturb.storage import write_atomically

# Okabe & Ito, then Tol: told apart by color-blind readers too (every two methods differ by 16 or more in CIELAB, for
# full protanopia, deuteranopia and tritanopia as in Machado et al. 2009).
COLORS = {
    "base": "#0072B2",
    "metaperturb": "#D55E00",
    "info_dropout": "#009E73",
    "dropblock": "#E69F00",
    "manifold_mixup": "#CC79A7",
    "dropout": "#8B5A2B",
    "mixup": "#56B4E9",
    "cutmix": "#332288",
    "label_smoothing": "#882255",
    "trivial_augment": "#000000",
    "adversarial": "#9933EE",
}
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # of what are no methods: data sets
STYLE = {
    **{"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3},
    **{"svg.hashsalt": "metaperturb", "legend.frameon": False, "lines.linewidth": 1.8},
}
LABELS = {name: regularizer.title for name, regularizer in REGULARIZERS.items()}
DASHES = ("-", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
POINTS = {"marker": "o", "markersize": 3.5}
MARKERS = ("o", "s", "^", "D")  # of a method's variants, as the dashes: a point alone has no dashes
FEW = 10  # images: too few for an accuracy to be drawn
NORM_LABELS = {"linf": "$L_\\infty$", "l2": "$L_2$", "l1": "$L_1$"}
FORMATS = (".png", ".svg")
PERCENT = {"accuracy": 100, "ece": 100}  # what numbers in [0, 1] are multiplied with

Results = Mapping[str, Sequence[Mapping[str, Any]]]  # name in the picture → of each of its runs what was found
Histories = Mapping[str, Iterable[Sequence[Mapping[str, Any]]]]  # name → for each seed, the lines of `metrics.jsonl`
# A figure, and the numbers in it as rows, of which the first is a header.
Drawn = tuple[Figure, Sequence[Sequence[Any]]]


# --- files


def save_figure(figure: Figure, path: Path) -> None:
    """Write the format that the suffix of `path` names, or, where it has none, both `.png` and `.svg`; atomically."""
    for file in [path] if path.suffix in FORMATS else [path.with_name(path.name + suffix) for suffix in FORMATS]:
        buffer = io.BytesIO()
        metadata = {"Date": None} if file.suffix == ".svg" else None  # the same figure gives the same file
        figure.savefig(buffer, format=file.suffix[1:], dpi=150, bbox_inches="tight", metadata=metadata)
        write_atomically(file, lambda stream, buffer=buffer: stream.write(buffer.getbuffer()))


def _picture(legend: int = 4, **style: Any) -> Callable[[Callable[..., Drawn]], Callable[..., None]]:
    """Make of a function that draws one that takes `title` and `path`, too, and writes the files.

    `legend`: columns of the one legend for all panels, which stands below them; 0: none. `style`: besides `STYLE`.
    """

    def decorate(plot: Callable[..., Drawn]) -> Callable[..., None]:
        @functools.wraps(plot)
        def write(content: Any, title: str, path: Path, **options: Any) -> None:
            title = title.encode("utf-8", "replace").decode()  # it may hold a file name that is not Unicode
            with matplotlib.rc_context(STYLE | style):
                figure, rows = plot(content, **options)
                if legend:
                    handles, labels = figure.axes[0].get_legend_handles_labels()
                    where = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0)}
                    figure.legend(handles, labels, ncols=legend, fontsize=9, **where)
                figure.suptitle(title + figure.get_suptitle())  # what a plot adds to the title
                save_figure(figure, path)
            if path.suffix not in FORMATS and rows:
                text = io.StringIO()
                csv.writer(text, lineterminator="\n").writerows(rows)  # None is an empty cell
                write_atomically(path.with_name(path.name + ".csv"), lambda file: file.write(text.getvalue().encode()))

        return write

    return decorate


def _panels(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure of this size in inches, and its axes `[rows, columns]`."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


# --- training


@_picture(legend=2)
def plot_learning(runs: Histories) -> Drawn:
    """What meta-trainings learn, against the steps that all seeds of a name have.

    Loss and accuracy on D_te, mean over tasks (of a single setting on D_tr too), and the norms of φ's two parts: the
    kernels of μ, and the scale's.

    Raises:
        UserError: seeds of a name have no step in common.
    """
    columns = ("test_loss", "test_accuracy_percent", "norm_of_mu", "norm_of_scale")
    rows = [("name", "step", *(name + std for name in columns for std in ("", "_std")), "seeds")]
    figure, grid = _panels(2, 2, (9, 6), sharex=True)
    for i, (name, histories) in enumerate(runs.items()):
        learned = [{line["step"]: _learned(line) for line in history} for history in histories]
        steps, (*values, train_loss, train_accuracy) = _common(name, learned)
        drawn: list[np.ndarray] = []
        for axes, of_quantity in zip(grid.flat, values, strict=True):
            drawn += _draw_band(axes, name, steps, of_quantity, color=SERIES[i % len(SERIES)])
        rows += [(name, *row, len(learned)) for row in zip(steps, *drawn, strict=True)]
        for axes, of_quantity in zip(grid[0], (train_loss, train_accuracy), strict=True) if len(runs) == 1 else ():
            axes.plot(steps, of_quantity.mean(axis=0), ":", color="0.4", label=r"on $D^{tr}$, where θ learns")
    grid[0, 0].set(ylabel=r"cross-entropy on $D^{te}$ (nats)")
    grid[0, 1].set(ylabel=r"accuracy on $D^{te}$ (%)")
    for axes, of in zip(grid[1], ("μ's kernels", "the scale's parameters"), strict=True):
        axes.set(xlabel="meta-training step", ylabel=f"norm of {of}", ylim=(0, None))
    return figure, rows


def _learned(line: Mapping[str, Any]) -> tuple[float, ...]:
    """Of a line of metrics: loss and accuracy in % on D_te, norms of μ's kernels and the scale's parameters, D_tr's."""
    norms = line["phi_norms"]
    parts = [[norms[name] for name in norms if name.startswith("scale") is scale] for scale in (False, True)]
    test, train = ((line[f"{part}_loss"], 100 * line[f"{part}_accuracy"]) for part in ("test", "train"))
    return *test, *map(np.linalg.norm, parts), *train


@_picture()
def plot_convergence(histories: Histories) -> Drawn:
    """Test loss and accuracy against training steps (figure 5); a `seed` in the lines is among the numbers.

    A loss that leaps at a single evaluation would press all curves flat: the axis ends below it. The other axis says
    where the last evaluation averages more samples than those before it.
    """
    columns = ("seed", "step", "test_nll", "test_accuracy", "test_ece")
    rows, lines = [("method", *columns)], _lines(histories)
    highest, top, samples, before = 0.0, 0.0, 1, set()  # losses; of the last evaluation, of those before
    figure, ((left, right),) = _panels(1, 2, (9, 3.4))
    for method, runs in histories.items():
        evaluated = [[line for line in run if "test_accuracy" in line] for run in runs]
        of_runs = [{at["step"]: (at["test_nll"], 100 * at["test_accuracy"]) for at in run} for run in evaluated]
        steps, (loss, accuracy) = _common(method, of_runs)
        mean, std = _draw_band(left, method, steps, loss, **lines[method])
        _draw_band(right, method, steps, accuracy, **lines[method])
        padded = np.pad(mean + std, 1, mode="edge")
        highest = max(highest, *mean)
        top = max(top, *np.median([padded[:-2], padded[1:-1], padded[2:]], axis=0))  # of three in a row
        for run in evaluated:
            *others, last = (line.get("test_samples", 1) for line in run)
            samples, before = max(samples, last), before.union(others)
        rows += [(method, *map(line.get, columns)) for run in evaluated for line in run]
    if highest > 2 * top:
        left.set_ylim(top=1.1 * top)
    note = f", before: {max(before)}" if before else ""
    note = f"\n(last point: {samples} Monte-Carlo samples{note})" if samples != max(before, default=1) else ""
    left.set(xlabel="training step", ylabel="test loss (NLL, nats)")
    right.set(xlabel=f"training step{note}", ylabel="test accuracy (%)")
    return figure, rows


def _common(name: str, by_place: Sequence[Mapping[Any, Sequence[float]]]) -> tuple[list[Any], np.ndarray]:
    """The places (steps, radii) that all seeds have, and what each has there: `[quantities, seeds, places]`."""
    places = sorted(set.intersection(*map(set, by_place)))
    if not places:
        raise UserError(f"metrics.jsonl of {name}: no step that all seeds have")
    return places, np.moveaxis(np.array([[of_seed[place] for place in places] for of_seed in by_place]), -1, 0)


# --- final accuracy


@_picture(legend=2)
def plot_growth(
    panels: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]], level: Sequence[float] = ()
) -> Drawn:
    """Final test accuracy against how much there was of something, with bars of one standard deviation; a panel each.

    Args:
        panels: what is counted, "training steps" → method → how much → accuracy in [0, 1] of each run; a line joins the
            points of as many runs each.
        level: accuracies of Base, which has none of what is counted: a level line.
    """
    rows: list[tuple[Any, ...]] = [("name", "of", "amount", "accuracy_percent", "std", "runs")]
    width = 5.5 if len(panels) == 1 else 3.8 * len(panels) + 0.6
    figure, (grid,) = _panels(1, len(panels), (width, 3.9), sharey=True)
    for axes, (unit, results) in zip(grid, panels.items(), strict=True):
        lines = _lines([*results, *["base"] * bool(level)], markers=True)
        for method, by_amount in results.items():
            found = [(n, *_mean_std(100 * np.array(by_amount[n])), len(by_amount[n])) for n in sorted(by_amount)]
            amounts, mean, std, count = map(np.array, zip(*found, strict=True))
            line, label = POINTS | lines[method], _with_seeds(method, int(count[0]))
            if len({*count}) > 1:  # of other seeds: no trend
                line, label = line | {"linestyle": "none"}, f"{name_of(method)} ({min(count)} to {max(count)} runs)"
            axes.errorbar(amounts, mean, np.where(count > 1, std, np.nan), label=label, capsize=3, **line)
            rows += [(method, unit, *row) for row in found]
        if level:
            mean, std = _mean_std(100 * np.array(level))
            axes.axhline(mean, label=_with_seeds("base", len(level)), color=lines["base"]["color"])
            axes.axhspan(mean - std, mean + std, color=lines["base"]["color"], alpha=0.2, linewidth=0)
        ticks = sorted({n for of_method in results.values() for n in of_method})
        if ticks[0] > 0:
            axes.set_xscale("log")
        else:  # where there is none of it: a φ of no meta-training step
            axes.set_xscale("symlog", linthresh=ticks[1], linscale=0.5)
            axes.autoscale_view(scaley=False)  # limits are kept from before, of a linear axis
        axes.set_xlabel(f"{unit} (logarithmic)")
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axes.minorticks_off()
    if level:
        rows.append(("base", "", "", mean, std, len(level)))
    grid[0].set(ylabel="test accuracy (%)")
    return figure, rows


@_picture(legend=0)
def plot_comparison(results: Mapping[str, Sequence[Mapping[str, float]]]) -> Drawn:
    """Final accuracy, loss and calibration of methods, one below the other: a point a seed; a bar is their mean."""
    lines, labels = _lines(results), [_with_seeds(method, len(same)) for method, same in results.items()]
    quantities = {"accuracy": "test accuracy (%)", "nll": "test loss (NLL, nats)", "ece": "ECE (%)"}
    columns = [key + "_percent" * (key in PERCENT) for key in quantities]
    rows: list[list[Any]] = [["name", *(name + std for name in columns for std in ("", "_std")), "seeds"]]
    size = 7 + 0.08 * max(map(len, labels)), 1.3 + 0.32 * len(results)
    figure, (grid,) = _panels(1, len(quantities), size, sharey=True)
    for place, (method, of_method) in enumerate(results.items()):
        color, seeds, numbers = lines[method]["color"], len(of_method), []
        for axes, (key, label) in zip(grid, quantities.items(), strict=True):
            values = PERCENT.get(key, 1) * np.array([metrics[key] for metrics in of_method])
            mean, std = _mean_std(values)
            axes.plot(values, np.full(seeds, place), "o", color=color, markersize=5, alpha=0.6)
            axes.plot(mean, place, "|", color=color, markersize=16, markeredgewidth=2)
            axes.set(xlabel=label)
            axes.grid(axis="y", visible=False)
            numbers += [mean, std if seeds > 1 else None]
        rows.append([method, *numbers, seeds])
    grid[0].set_yticks(range(len(results)), labels)
    grid[0].set_ylim(len(results) - 0.5, -0.5)  # the first on top
    return figure, rows


# --- analyses: each takes name → of each seed what the function of `analyses` that it names returned


@_picture()
def plot_robustness(results: Results) -> Drawn:
    """Accuracy against the radius ε of the attack (figure 6 a-c), by `measure_robustness`.

    The ε that all seeds of a name have are drawn. A method with one seed has no band, but bars: the standard error
    that comes from the choice of images.
    """
    found, norms = {}, set()
    for name, runs in results.items():
        by_place = [{(at["norm"], at["eps"]): (100 * at["accuracy"],) for at in run["points"]} for run in runs]
        places, (accuracy,) = _common(name, by_place)
        found[name] = np.array(places, dtype=object).T, accuracy
        norms |= {norm for norm, _ in places}
    lines, first = _lines(results), next(iter(results.values()))[0]
    rows, attack, bars = [("name", "norm", "eps", "accuracy_percent", "std", "seeds")], first["settings"], ""
    figure, (grid,) = _panels(1, len(norms), (4 * len(norms), 4.0), sharey=True)
    for axes, norm in zip(grid, sorted(norms, key=[*NORM_LABELS].index), strict=True):
        for name, ((of_norm, of_eps), of_places) in found.items():
            eps, accuracy = of_eps[of_norm == norm].astype(float), of_places[:, of_norm == norm]
            mean, std = _draw_band(axes, name, eps, accuracy, **lines[name], **POINTS)
            if len(accuracy) == 1:  # no band: what the choice of images does, the binomial's standard error
                error = np.sqrt(mean * (100 - mean).clip(0) / attack["images"])
                axes.errorbar(eps, mean, error, fmt="none", ecolor=lines[name]["color"], alpha=0.5, capsize=2)
                bars = "; bars: one standard error, of these images"
            rows += [(name, norm, *row, len(accuracy)) for row in zip(eps, mean, std, strict=True)]
        axes.axhline(100 / first["target"]["classes"], color="0.5", linestyle=":", linewidth=1.2, label="chance")
        axes.set(xlabel=f"ε in {NORM_LABELS[norm]}, pixels in [0, 1]", ylim=(0, None))
        axes.set_xlim(left=0)
    grid[0].set(ylabel="accuracy under attack (%)")
    eot = f"{attack['draws']} draws of the noise each" if attack["draws"] > 1 else "one draw of the noise each"
    figure.suptitle(f"\nPGD on {attack['images']:,} images, {attack['steps']} steps, {eot}{bars}")
    return figure, rows


@_picture(legend=2)
def plot_reliability(results: Results) -> Drawn:
    """Accuracy against confidence by bins, and the share of images in each (figure 6 d), by `measure_calibration`.

    Seeds are pooled. Bins of a few images, whose accuracy is mere chance, are among the numbers but not in the picture.
    """
    rows, lines = [("name", "bin", "count", "confidence", "accuracy")], _lines(results)
    figure, ((upper,), (lower,)) = _panels(2, 1, (5, 5.6), sharex=True, height_ratios=(3, 1))
    upper.plot([0, 100], [0, 100], color="0.5", linestyle=":", linewidth=1.2)
    for name, runs in results.items():
        bins = [[run["reliability"][key] for run in runs] for key in ("count", "confidence", "accuracy")]
        counts, *means = np.array(bins, float)  # [runs, bins] each; an empty bin has means that are NaN
        count = counts.sum(axis=0)
        confidence, accuracy = (np.nansum(counts * mean, axis=0) / count.clip(1) for mean in means)
        last = [run["counts"][-1] for run in runs]
        mean, std = _mean_std(100 * np.array([np.mean(of["ece"]) for of in last]))
        samples = f", {last[0]['samples']} samples" if last[0]["samples"] > 1 else ""
        label = f"{name_of(name)}{samples}: ECE {mean:.1f}" + (f" ± {std:.1f} %" if len(runs) > 1 else " %")
        full = count >= FEW
        upper.plot(100 * confidence[full], 100 * accuracy[full], label=label, clip_on=False, **lines[name], **POINTS)
        lower.stairs(100 * count / count.sum(), np.linspace(0, 100, len(count) + 1), linewidth=1.4, **lines[name])
        columns = zip(count.astype(int), confidence, accuracy, strict=True)
        rows += [(name, k, n, *(both if n else (None, None))) for k, (n, *both) in enumerate(columns, 1)]
    upper.set(ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 100))
    lower.set(ylabel="images (%)", xlabel=f"confidence (%); above, bins of fewer than {FEW} images are left out")
    return figure, rows


@_picture()
def plot_samples(results: Results) -> Drawn:
    """Accuracy, calibration error and time of a prediction against its Monte-Carlo samples, by `measure_calibration`.

    Whiskers are what the draws alone do to one network's prediction: the standard deviation over repetitions, where a
    count has several. A network without noise, which has one prediction, is a level line.
    """
    keys = ("accuracy", "accuracy_scatter", "ece", "ece_scatter", "nll", "seconds")
    rows, lines = [("name", "samples", *keys, "seeds")], _lines(results)
    ticks = sorted({of["samples"] for runs in results.values() for of in runs[0]["counts"]})
    panels = {"accuracy": "accuracy (%)", "ece": "ECE (%)", "seconds": "time for all test images (s)"}
    figure, (grid,) = _panels(1, 3, (12, 3.6))
    for name, runs in results.items():
        samples = [of["samples"] for of in runs[0]["counts"]]
        noisy = len(samples) > 1 or ticks == [1]
        found = {}
        for key in keys:  # [seeds, counts]
            key, scatter, _ = key.partition("_scatter")
            over = np.std if scatter else np.mean
            found[key + scatter] = np.array([[over(of[key]) for of in run["counts"]] for run in runs])
        for axes, (key, label) in zip(grid, panels.items(), strict=True):
            values = PERCENT.get(key, 1) * found[key]
            x, drawn = (samples, values) if noisy else ([1, ticks[-1]], values.repeat(2, axis=1))
            _draw_band(axes, name, x, drawn, **lines[name], **(POINTS if noisy else {}))
            if noisy and key in PERCENT:
                scatter = PERCENT[key] * found[f"{key}_scatter"].mean(axis=0)
                axes.errorbar(x, values.mean(axis=0), scatter, fmt="none", ecolor=lines[name]["color"], capsize=3)
            axes.set(xlabel="Monte-Carlo samples", ylabel=label, xscale="log")
            axes.set_xticks(ticks, map(str, ticks), minor=False)
            axes.minorticks_off()
        columns = zip(samples, *(found[key].mean(axis=0) for key in keys), strict=True)
        rows += [(name, *column, len(runs)) for column in columns]
    grid[2].set(yscale="log")
    grid[2].yaxis.set(major_formatter="{x:g}", major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
    return figure, rows


@_picture(legend=2)
def plot_scales(by_data: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Drawn:
    """The scale s of every channel, block by block (figure 7), and how much its noise scatters, by `learned_scales`.

    Data sets stand side by side. Boxes hold the middle half of a block's channels, whiskers all but the outer
    twentieths. `run` and `seed` of the places are among the numbers.
    """
    sites = [place["site"] for place in next(iter(by_data.values()))[0]]
    width, rows = 0.8 / len(by_data), [("data", "run", "seed", "site", "channel", "s", "spread")]
    figure, ((upper,), (lower,)) = _panels(2, 1, (max(6.0, 1.05 * len(sites)), 6.0), sharex=True)
    for i, (data, runs) in enumerate(by_data.items()):
        color = SERIES[i % len(SERIES)]
        edge, places = {"color": color}, np.arange(len(sites)) + (i - (len(by_data) - 1) / 2) * width
        style = {"boxprops": {"facecolor": color + "55", "edgecolor": color}, "medianprops": edge | {"linewidth": 2}}
        style |= {"whiskerprops": edge, "capprops": edge, "patch_artist": True, "showfliers": False, "whis": (5, 95)}
        for axes, key in ((upper, "s"), (lower, "spread")):
            channels = [np.concatenate([run[block][key] for run in runs]) for block in range(len(sites))]
            axes.boxplot(channels, positions=places, widths=0.85 * width, manage_ticks=False, **style)
        label = f"{data} ({len(runs)} run{'s' * (len(runs) > 1)})"
        upper.plot([], [], color=color, linewidth=6, alpha=0.6, label=label)
        for at in itertools.chain(*runs):
            channels = enumerate(zip(at["s"], at["spread"], strict=True))
            rows += [(data, at["run"], at["seed"], at["site"], channel, *both) for channel, both in channels]
    upper.set(ylabel="scale s of a channel", ylim=(0, 1))
    lower.set(ylabel="noise: std(z) / mean(z)", ylim=(0, None), xlabel="block, from the image to the classifier")
    lower.set_xticks(range(len(sites)), sites)
    lower.tick_params(axis="x", labelsize=9)
    for axes in (upper, lower):
        axes.grid(axis="x", visible=False)
    return figure, rows


@_picture(legend=0, **{"axes.grid": False})
def plot_surfaces(results: Results) -> Drawn:
    """Training loss around each method's first network, on one plane and color scale (figure 8), by `loss_surface`."""
    surfaces = {method: runs[0] for method, runs in results.items()}
    losses = {method: np.array(surface["loss"]) for method, surface in surfaces.items()}
    low, high = min(loss.min() for loss in losses.values()), max(loss.max() for loss in losses.values())
    levels = np.geomspace(max(low, 1e-4), max(high, 2e-4), 21)
    columns, numbers = min(len(losses), 4), [("method", "a", "b", "loss")]
    rows = -(-len(losses) // columns)
    figure, grid = _panels(rows, columns, (3.1 * columns + 1, 3.0 * rows + 0.6), sharex=True, sharey=True)
    for axes, (method, loss) in zip(grid.flat, losses.items(), strict=False):
        coordinates = surfaces[method]["coordinates"]
        places = itertools.product(enumerate(coordinates), repeat=2)
        numbers += [(method, a, b, surfaces[method]["loss"][i][j]) for (i, a), (j, b) in places]
        drawn = {"levels": levels, "norm": LogNorm(levels[0], levels[-1])}
        image = axes.contourf(coordinates, coordinates, loss.clip(*levels[[0, -1]]).T, cmap="cividis", **drawn)
        axes.contour(coordinates, coordinates, loss.T, colors="white", linewidths=0.5, **drawn)
        axes.plot(0, 0, "+", color="white")
        middle = loss[len(loss) // 2, len(loss) // 2]
        axes.set_title(f"{name_of(method)}\n{middle:.2f} in the middle", fontsize=10)
        axes.set_aspect("equal")
    for empty in range(len(losses), grid.size):
        grid.flat[empty].set_visible(False)
        grid.flat[empty - columns].tick_params(labelbottom=True)  # now the lowest of its column
    note = "batch norm and scales s by the statistics of the images, the same noise at every point"
    figure.supxlabel(f"along direction 1 (in norms of the filters)\n{note}", fontsize=10)
    figure.supylabel("along direction 2", fontsize=10)
    bar = figure.colorbar(image, ax=grid, label="training loss (nats)", ticks=levels[::4], format="%.3g")
    bar.minorticks_off()
    return figure, numbers


@_picture(legend=0, **{"axes.grid": False})
def plot_phi(values: Mapping[str, np.ndarray]) -> Drawn:
    """φ's parts by name: eight 3×3 kernels and the ten weights of the affine map, with their values; without CSV."""
    layers = (1, "self"), (1, "all"), (2, "self"), (2, "all")
    kernels = {f"μ, layer {layer}, {kernel}": values[f"{kernel}{layer}"] for layer, kernel in layers}
    kernels |= {f"scale kernel {i}": kernel for i, kernel in enumerate(values["scale_kernels"], 1)}
    limit = max(abs(kernel).max() for kernel in kernels.values())
    figure = Figure(figsize=(12, 7.2), layout="constrained")
    *grid, lowest = figure.subplot_mosaic("ABCD;EFGH;IIII").values()
    for axes, (name, kernel) in zip(grid, kernels.items(), strict=True):
        image = axes.imshow(kernel.reshape(3, 3), cmap="PuOr", vmin=-limit, vmax=limit)
        for (row, column), value in np.ndenumerate(kernel.reshape(3, 3)):
            color = "white" if abs(value) > 0.6 * limit else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=9, color=color)
        axes.set_title(name, fontsize=10)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=grid, fraction=0.02, pad=0.02, label="weight")
    names = [*(f"{what} {i}" for what in ("mean", "variance") for i in range(1, 5)), "C / $C_{max}$", "H / S"]
    colors = np.repeat([COLORS["base"], COLORS["info_dropout"], COLORS["manifold_mixup"]], (4, 4, 2))
    lowest.bar(names, values["scale_affine"].reshape(-1), color=colors)
    lowest.axhline(0, color="black", linewidth=0.8)
    lowest.set(ylabel="weight of the affine map")
    lowest.tick_params(axis="x", labelsize=9)
    return figure, ()


# --- lines and labels


def name_of(method: str) -> str:
    """What a picture calls a method: `metaperturb`, `metaperturb, finetuned`, `base, mixup`."""
    return ", ".join(LABELS.get(part, part) for part in method.split(", "))


def _lines(names: Iterable[str], markers: bool = False) -> dict[str, dict[str, Any]]:
    """The line of each: a method's variants have its color, and their dashes (and markers) tell them apart.

    Adversarial training, the reference of figure 6, is dashed.
    """
    lines, drawn = {}, Counter()
    for name in names:
        base = name.partition(",")[0]
        dashes = "--" if base == "adversarial" else DASHES[drawn[base] % len(DASHES)]
        lines[name] = {"color": COLORS.get(base), "linestyle": dashes}
        if markers:
            lines[name]["marker"] = MARKERS[drawn[base] % len(MARKERS)]
        drawn[base] += 1
    return lines


def _with_seeds(method: str, seeds: int) -> str:
    return f"{name_of(method)} ({seeds} seed{'s' * (seeds > 1)})"


def _draw_band(
    axis: Axes, name: str, x: Sequence[float], values: np.ndarray, **line: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of `values` `[seeds, points]` against `x`, in a band of a standard deviation; both."""
    mean, std = _mean_std(values)
    line = (POINTS if len(x) == 1 else {}) | line  # one point alone would not be seen
    (drawn,) = axis.plot(x, mean, label=_with_seeds(name, len(values)), **line)
    axis.fill_between(x, mean - std, mean + std, color=drawn.get_color(), alpha=0.2, linewidth=0)
    return mean, std


def _mean_std(values: np.ndarray) -> tuple[Any, Any]:
    """Over the seeds, the first dimension; the standard deviation of one is 0."""
    mean = values.mean(axis=0)
    return mean, values.std(axis=0, ddof=1) if len(values) > 1 else 0 * mean
