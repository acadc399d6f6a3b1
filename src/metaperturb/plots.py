"""Pictures of training curves, in one style."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from metaperturb.storage import write_atomically

matplotlib.use("Agg")  # files only; no display is needed
import matplotlib.pyplot as plt

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
    "train": "#009E73",
    "test": "#CC79A7",
}
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
LABELS = {
    "base": "Base",
    "metaperturb": "MetaPerturb",
    "info_dropout": "Info. Dropout",
    "dropblock": "DropBlock",
    "manifold_mixup": "Manifold Mixup",
    "dropout": "Dropout",
    "mixup": "mixup",
    "cutmix": "CutMix",
    "label_smoothing": "Label smoothing",
    "trivial_augment": "TrivialAugment",
}


def save_figure(figure: plt.Figure, path: Path) -> None:
    """PNG, written atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


def plot_meta_training(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss and accuracy on D_tr and D_te, mean over tasks, against meta-training steps."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
        steps = [line["step"] for line in history]
        for part, label in (("train", r"$D^{tr}$ (θ learns)"), ("test", r"$D^{te}$ (φ learns)")):
            left.plot(steps, [line[f"{part}_loss"] for line in history], color=COLORS[part], label=label)
            right.plot(steps, [100 * line[f"{part}_accuracy"] for line in history], color=COLORS[part], label=label)
        left.set(xlabel="meta-training step", ylabel="cross-entropy (nats)")
        right.set(xlabel="meta-training step", ylabel="accuracy (%)")
        left.legend()
        save_figure(figure, path)


def plot_convergence(histories: Mapping[str, Iterable[Sequence[Mapping[str, Any]]]], title: str, path: Path) -> None:
    """Test loss and accuracy against steps: mean over seeds, band of one standard deviation (figure 5).

    Args:
        histories: method → for each seed, the lines of `metrics.jsonl`; lines with `test_accuracy` are drawn.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
        for method, runs in histories.items():
            evaluated = [[line for line in run if "test_accuracy" in line] for run in runs]
            steps = sorted(set.intersection(*({line["step"] for line in run} for run in evaluated)))
            for axis, key, factor in ((axes[0], "test_nll", 1), (axes[1], "test_accuracy", 100)):
                by_step = [{line["step"]: factor * line[key] for line in run} for run in evaluated]
                values = np.array([[run[step] for step in steps] for run in by_step])
                mean, std = values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else 0 * values[0]
                label = f"{LABELS.get(method, method)} ({len(values)} seed{'s' * (len(values) > 1)})"
                axis.plot(steps, mean, color=COLORS.get(method), label=label)
                axis.fill_between(steps, mean - std, mean + std, color=COLORS.get(method), alpha=0.2, linewidth=0)
        axes[0].set(xlabel="training step", ylabel="test loss (NLL, nats)")
        axes[1].set(xlabel="training step", ylabel="test accuracy (%)")
        axes[0].legend()
        figure.suptitle(title)
        save_figure(figure, path)
