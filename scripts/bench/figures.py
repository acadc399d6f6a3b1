"""Figures of the benchmark, drawn from its JSON."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from bench.exchange import HOPS, predicted
from bench.page import quantity, short
from metaperturb.plots import COLORS, STYLE, save_figure

PLAIN, PERTURBED, UNFUSED = COLORS["base"], COLORS["metaperturb"], COLORS["test"]
TASK_COLORS = (COLORS["train"], COLORS["base"], COLORS["metaperturb"], COLORS["test"])


def draw_figures(document: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """The figures of those suites that have one: suite → file."""
    suffix = "" if document["device"] == "cpu" else f"_{document['device']}"
    drawn = {}
    for suite, draw in (("scaling", draw_scaling), ("exchange", draw_exchange)):
        if suite in document["suites"]:
            drawn[suite] = folder / f"benchmark_{suite}{suffix}.png"
            with plt.rc_context(STYLE):
                draw(document, drawn[suite])
    return drawn


def draw_scaling(document: Mapping[str, Any], path: Path) -> None:
    groups = document["suites"]["scaling"]["groups"]
    figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)
    fused = "perturbed" if document["kernel"] == "plain" else f"perturbed ({document['kernel']} kernel)"

    tasks = groups["tasks"]
    values = tasks["settings"]["values"]
    _line(axes[0, 0], tasks["timings"], values, "{}", PERTURBED, "measured")
    first = tasks["timings"][str(values[0])]["median"]
    axes[0, 0].plot(values, [first * v / values[0] for v in values], color="gray", linestyle=":", label="in proportion")
    _finish(axes[0, 0], f"Joint step, batch {tasks['settings']['batch']}", "tasks on one process", "seconds", values)

    processes = groups["processes"]
    values = processes["settings"]["values"]
    _line(axes[0, 1], processes["timings"], values, "{}", PERTURBED, "measured")
    first = processes["timings"][str(values[0])]["median"]
    axes[0, 1].plot(values, [first / v for v in values], color="gray", linestyle=":", label="in proportion")
    title = f"Joint step of {processes['settings']['tasks']} tasks, batch {processes['settings']['batch']}"
    _finish(axes[0, 1], title, "processes", "seconds", values)

    channels = groups["channels"]
    values = channels["settings"]["values"]
    settings = channels["settings"]
    _line(axes[0, 2], channels["timings"], values, "auto {}", PERTURBED, f"{document['kernel']} kernel")
    _line(axes[0, 2], channels["timings"], values, "plain kernel {}", UNFUSED, "plain kernel")
    title = f"One site, forward + backward,\n[{settings['batch']}, C, {settings['side']}, {settings['side']}]"
    _finish(axes[0, 2], title, "channels C", "ms", values, 1e3)

    for axis, name, fixed in (
        (axes[1, 0], "image size", lambda s: f"θ-step, batch {s['batch']}"),
        (axes[1, 1], "batch", lambda s: f"θ-step, {s['image_size']} × {s['image_size']} pixels"),
    ):
        group = groups[name]
        values = group["settings"]["values"]
        _line(axis, group["timings"], values, "perturbed {}", PERTURBED, fused)
        _line(axis, group["timings"], values, "plain {}", PLAIN, "plain network")
        label = "image size (pixels)" if name == "image size" else "batch"
        _finish(axis, fixed(group["settings"]), label, "ms", values, 1e3)

    group = groups["batch"]
    values = group["settings"]["values"]
    for name, color, label in (("perturbed", PERTURBED, fused), ("plain", PLAIN, "plain network")):
        peaks = [group["peak_bytes"][f"{name} {value}"] for value in values]
        axes[1, 2].plot(values, peaks, color=color, marker="o", markersize=4, label=label)
    _finish(axes[1, 2], "Peak memory of a θ-step", "batch", "MB", values, 1e-6)
    save_figure(figure, path)


def draw_exchange(document: Mapping[str, Any], path: Path) -> None:
    suite = document["suites"]["exchange"]
    gather = suite["groups"]["gather"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    processes = [count for count in gather["settings"]["processes"] if count > 1]
    for color, tasks in zip(TASK_COLORS, gather["settings"]["tasks"], strict=False):
        there = [count for count in processes if count <= tasks]
        _line(left, gather["timings"], there, f"{{}} processes, {tasks} tasks", color, f"{tasks:,} tasks")
        fitted = [predicted(suite["fits"]["ring"], "ring", count, tasks) for count in there]
        left.plot(there, fitted, color=color, linestyle=":", linewidth=1.4)
    left.plot([], [], color="gray", linestyle=":", label="fitted model (ring)")
    cores = document["hardware"]["cores"]
    transport = "gloo" if "gloo" in gather["transport"].values() else "nccl"
    title = f"Exchange of φ's gradients, measured\n({transport}, {cores} cores)"
    _finish(left, title, "processes", "ms", processes, 1e3)

    styles = {"tree": "-", "ring": "--"}
    names = {"fitted": "this machine's model", "cluster": "assumed cluster"}
    for case, color in zip(suite["projections"], (PERTURBED, PLAIN), strict=True):
        tasks = [row["tasks"] for row in case["rows"]]
        step = quantity(case["step_seconds"], "s")
        for hops in HOPS:
            efficiency = [100 * row[f"{hops}_efficiency"] for row in case["rows"]]
            label = f"{names[case['case']]}, step {step}, {hops}"
            right.plot(tasks, efficiency, styles[hops], color=color, marker="o", markersize=4, label=label)
    right.set(xscale="log", xlabel="tasks = GPUs", ylabel="parallel efficiency (%)", ylim=(0, 105))
    right.set_title("Projected, not measured", fontsize=11)
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    right.legend(fontsize=9, loc="lower left")
    save_figure(figure, path)


def _line(
    axis: plt.Axes,
    timings: Mapping[str, Any],
    values: list[int],
    key: str,
    color: str,
    label: str,
) -> None:
    """Medians against `values`, with a band between the quartiles."""
    found = [timings[key.format(value)] for value in values]
    axis.plot(values, [t["median"] for t in found], color=color, marker="o", markersize=4, label=label)
    axis.fill_between(values, [t["q1"] for t in found], [t["q3"] for t in found], color=color, alpha=0.2, linewidth=0)


def _finish(axis: plt.Axes, title: str, x: str, y: str, ticks: list[int], factor: float = 1.0) -> None:
    """Logarithmic axes, with the measured values as ticks."""
    axis.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    axis.set_title(title, fontsize=11)
    axis.xaxis.set_major_locator(FixedLocator(_apart(ticks)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value * factor)))
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 5 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.legend(fontsize=9)


def _apart(ticks: list[int]) -> list[int]:
    """Without those whose labels would touch the next one's on a logarithmic axis."""
    length = math.log(ticks[-1] / ticks[0]) if len(ticks) > 1 else 1.0
    kept = [
        tick for tick, above in itertools.pairwise(ticks) if math.log(above / tick) > 0.04 * len(str(above)) * length
    ]
    return [*kept, ticks[-1]]
