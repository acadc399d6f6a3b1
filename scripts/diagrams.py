"""Figures 1 to 3 in our own drawing, and the 82 numbers of a learned φ.

    ./run.sh diagrams                       # into figures/, PNG and SVG
    PHI=phi.pt ./run.sh diagrams            # with the learned values of that φ

Without a φ the picture of the 82 numbers is left out: fresh weights show nothing.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from metaperturb.cli import argument_parser, run_program
from metaperturb.perturbation import MetaPerturb
from metaperturb.plots import COLORS, STYLE, save_figure
from metaperturb.weights import load_phi

ROOT = Path(__file__).resolve().parent.parent
PHI, THETA, DATA, PLAIN = COLORS["metaperturb"], COLORS["base"], COLORS["info_dropout"], "#444444"


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--phi", help="file or shipped name of φ")
    parser.add_argument("--out", type=Path, default=ROOT / "figures", help="folder of the pictures")
    arguments = parser.parse_args()

    def draw() -> None:
        phi = load_phi(arguments.phi) if arguments.phi else None
        drawings = {"fig1-concept": concept, "fig2-functions": functions, "fig3-site": site}
        for name, drawing in drawings.items():
            with plt.rc_context(STYLE):
                save_figure(drawing(), arguments.out / name)
            print(arguments.out / f"{name}.png")
        if phi is None:
            print("no φ given (--phi): its 82 numbers are not drawn", file=sys.stderr)
            return
        with plt.rc_context(STYLE):
            save_figure(numbers(phi), arguments.out / "phi-82-numbers")
        print(arguments.out / "phi-82-numbers.png")

    return run_program(draw, show_traceback=arguments.traceback, resumes=False)


# --- figure 1


def concept() -> plt.Figure:
    """One φ, meta-trained over many tasks in parallel, then used by networks and data sets of other kinds."""
    figure, axes = canvas(12.2, 4.1)
    title(axes, 2.75, 3.9, "Meta-training (Algorithm 1)")
    for row, name in enumerate(("task 1", "task 2", "task T")):
        y = 2.75 - 1.15 * row - (0.3 if row == 2 else 0)
        box(axes, 0.1, y, 1.5, 0.75, f"{name}\n20 classes", DATA)
        box(axes, 2.1, y, 1.35, 0.75, rf"ResNet20, $\theta_{{{('1', '2', 'T')[row]}}}$", THETA)
        arrow(axes, (1.6, y + 0.375), (2.1, y + 0.375))
        arrow(axes, (3.45, y + 0.5), (4.6, 2.15), PHI)
        arrow(axes, (4.6, 1.8), (3.45, y + 0.22), PHI)
    axes.text(0.85, 1.38, "⋮", ha="center", va="center", fontsize=16)
    box(axes, 4.6, 1.6, 1.3, 0.75, "φ\n82 numbers", PHI, bold=True)
    axes.text(
        4.35,
        0.75,
        "to the networks: φ\nback: ∂loss/∂φ on $D^{te}$,\n82 numbers a task",
        fontsize=9,
        va="top",
        color=PHI,
    )
    arrow(axes, (5.9, 1.975), (7.25, 1.975), PHI, width=2.5)
    axes.text(6.57, 2.12, "transfer", ha="center", fontsize=10, color=PHI)
    title(axes, 9.6, 3.9, "Meta-testing (Algorithm 2)")
    box(axes, 7.25, 1.6, 0.95, 0.75, "φ\nfrozen", PHI, bold=True)
    for row, (network, data) in enumerate((("VGG9", "CUB"), ("WRN-28-2", "Cars"), ("any CNN", "your images"))):
        y = 2.75 - 1.15 * row - (0.3 if row == 2 else 0)
        arrow(axes, (8.2, 1.975), (8.95, y + 0.375), PHI)
        box(axes, 8.95, y, 1.35, 0.75, f"{network}, θ", THETA)
        box(axes, 10.75, y, 1.3, 0.75, data, DATA)
        arrow(axes, (10.75, y + 0.375), (10.3, y + 0.375))
    return figure


# --- figure 2


def functions() -> plt.Figure:
    """The channel-equivariant operation of the noise, and the scale function, with shapes."""
    figure, axes = canvas(12.4, 6.2)
    title(axes, 0.1, 5.95, "Noise z: two channel-equivariant layers, 36 numbers (eq. 1)", left=True)
    map_stack(axes, 0.25, 3.75, "h\n[B, C, H, W]")
    arrow(axes, (1.55, 4.55), (2.3, 4.9))
    arrow(axes, (1.55, 4.3), (2.3, 3.85))
    box(axes, 2.3, 4.6, 1.95, 0.62, "self kernel λ, 3×3\neach channel by itself", PHI)
    box(axes, 2.3, 3.55, 1.95, 0.62, "all kernel γ, 3×3\nthe channels' mean", PHI)
    axes.text(3.27, 4.42, "[B, C, H, W]", ha="center", va="center", fontsize=8)
    axes.text(3.27, 3.38, "[B, 1, H, W], broadcast", ha="center", va="center", fontsize=8)
    circle(axes, 4.8, 4.4, "+")
    arrow(axes, (4.25, 4.9), (4.67, 4.52))
    arrow(axes, (4.25, 3.85), (4.67, 4.28))
    steps = [("ReLU", PLAIN), ("same again:\nlayer 2", PHI), ("+ ε\nε ~ N(0, I)", PLAIN), ("softplus", PLAIN)]
    x = 5.3
    arrow(axes, (4.96, 4.4), (x, 4.4))
    for text, color in steps:
        box(axes, x, 4.06, 1.15, 0.68, text, color)
        arrow(axes, (x + 1.15, 4.4), (x + 1.47, 4.4))
        x += 1.47
    map_stack(axes, x + 0.05, 3.85, "z\n[B, C, H, W]", scale=0.8)
    axes.text(
        6.35, 3.3, "Permuting the channels of h permutes those of z: one φ fits any C.", fontsize=9, style="italic"
    )
    axes.plot([0.1, 12.3], [2.95, 2.95], color="#bbbbbb", linewidth=0.8)
    title(axes, 0.1, 2.68, "Scale s: what a channel is worth in this batch, 46 numbers", left=True)
    map_stack(axes, 0.25, 0.62, "h\n[B, C, H, W]")
    arrow(axes, (1.55, 1.3), (2.05, 1.3))
    boxes = [
        ("4 kernels, 3×3,\nshared by channels", PHI, "[B, C, 4, H, W]", 1.85),
        ("ReLU, mean\nover H, W", PLAIN, "v: [B, C, 4]", 1.2),
        ("mean, variance\nover the batch", PLAIN, "[C, 8]", 1.5),
        ("append C / $C_{max}$\nand H / S", PLAIN, "[C, 10]", 1.6),
        ("affine\n10 → 1", PHI, "[C]", 0.95),
        ("sigmoid", PLAIN, "s: [C]", 0.95),
    ]
    x = 2.05
    for index, (text, color, shape, width) in enumerate(boxes):
        box(axes, x, 0.95, width, 0.7, text, color)
        axes.text(x + width / 2, 0.75, shape, ha="center", va="center", fontsize=8)
        if index < len(boxes) - 1:
            arrow(axes, (x + width, 1.3), (x + width + 0.3, 1.3))
        x += width + 0.3
    note = "In evaluation the batch's mean and variance give way to running ones, kept at every site."
    axes.text(6.3, 0.28, note, fontsize=9, style="italic", ha="center")
    return figure


# --- figure 3


def site() -> plt.Figure:
    """Where the perturbation acts: in a residual block after the addition; in plain networks after batch norm."""
    figure, axes = canvas(12, 3.7)
    title(axes, 0.1, 3.45, "Residual networks: in every block, after the addition", left=True)
    arrow(axes, (0.1, 2.3), (0.55, 2.3))
    x = 0.55
    for text in ("conv, BN", "ReLU", "conv, BN"):
        box(axes, x, 2.0, 1.05, 0.6, text, THETA)
        arrow(axes, (x + 1.05, 2.3), (x + 1.4, 2.3))
        x += 1.4
    circle(axes, x + 0.15, 2.3, "+")
    axes.plot([0.3, 0.3, x + 0.15], [2.3, 2.9, 2.9], color=PLAIN, linewidth=1.3)
    arrow(axes, (x + 0.15, 2.9), (x + 0.15, 2.46))
    axes.text(x / 2, 2.98, "shortcut", ha="center", va="bottom", fontsize=9)
    perturb(axes, x + 0.3, 2.3)
    box(axes, x + 4.05, 2.0, 0.8, 0.6, "ReLU", THETA)
    arrow(axes, (x + 4.85, 2.3), (x + 5.3, 2.3))
    title(axes, 0.1, 1.2, "Plain networks: after every convolution's batch norm", left=True)
    arrow(axes, (0.1, 0.5), (0.55, 0.5))
    box(axes, 0.55, 0.2, 1.05, 0.6, "conv", THETA)
    arrow(axes, (1.6, 0.5), (1.95, 0.5))
    box(axes, 1.95, 0.2, 1.05, 0.6, "BN", THETA)
    perturb(axes, 3.0, 0.5)
    box(axes, 6.75, 0.2, 0.8, 0.6, "ReLU", THETA)
    arrow(axes, (7.55, 0.5), (8.0, 0.5))
    axes.text(
        10.15,
        0.5,
        "c: strength, 0 → 1 in training\noutput clipped at k = 100 in training",
        ha="center",
        va="center",
        fontsize=9,
    )
    return figure


def perturb(axes: Axes, x: float, y: float) -> None:
    """h → h ∘ ((g − 1)·c + 1), drawn from x to x + 3.75."""
    arrow(axes, (x, y), (x + 0.4, y))
    text = "h ∘ ((g − 1)·c + 1)\ng = s(h) ∘ z(h)"
    box(axes, x + 0.4, y - 0.42, 2.9, 0.84, text, PHI, bold=True)
    arrow(axes, (x + 3.3, y), (x + 3.75, y))


# --- the 82 numbers


def numbers(phi: MetaPerturb) -> plt.Figure:
    """All of φ: eight 3×3 kernels and the ten weights of the affine map, with their values."""
    values = {name: p.detach().cpu().numpy() for name, p in phi.named_parameters()}
    kernels = {
        "λ₁: layer 1, self": values["self1"],
        "γ₁: layer 1, all": values["all1"],
        "λ₂: layer 2, self": values["self2"],
        "γ₂: layer 2, all": values["all2"],
        **{f"scale kernel {i + 1}": kernel for i, kernel in enumerate(values["scale_kernels"])},
    }
    figure = plt.figure(figsize=(12, 6.6))
    grid = figure.add_gridspec(3, 4, height_ratios=[1, 1, 0.95], hspace=0.55, wspace=0.25)
    limit = max(abs(kernel).max() for kernel in kernels.values())
    for index, (name, kernel) in enumerate(kernels.items()):
        axes = figure.add_subplot(grid[index // 4, index % 4])
        image = axes.imshow(kernel.reshape(3, 3), cmap="PuOr", vmin=-limit, vmax=limit)
        for (row, column), value in np.ndenumerate(kernel.reshape(3, 3)):
            color = "white" if abs(value) > 0.6 * limit else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=9, color=color)
        axes.set(title=name, xticks=[], yticks=[])
        axes.title.set_size(10)
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
    figure.colorbar(image, ax=figure.axes, fraction=0.02, pad=0.02, label="weight")
    axes = figure.add_subplot(grid[2, :])
    names = [*(f"mean {i}" for i in range(1, 5)), *(f"variance {i}" for i in range(1, 5)), "C / $C_{max}$", "H / S"]
    weights = values["scale_affine"].reshape(-1)
    axes.bar(names, weights, color=[COLORS["base"]] * 4 + [COLORS["info_dropout"]] * 4 + [COLORS["manifold_mixup"]] * 2)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel("weight of the affine map")
    axes.tick_params(axis="x", labelsize=9)
    axes.grid(axis="x", visible=False)
    return figure


# --- drawing


def canvas(width: float, height: float) -> tuple[plt.Figure, Axes]:
    """An empty sheet whose units are inches."""
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(
    axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str, *, bold: bool = False
) -> None:
    shape = "round,pad=0,rounding_size=0.08"
    patch = FancyBboxPatch(
        (x, y), width, height, boxstyle=shape, facecolor=color + "22", edgecolor=color, linewidth=1.5
    )
    axes.add_patch(patch)
    weight = "bold" if bold else "normal"
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9.5, fontweight=weight)


def circle(axes: Axes, x: float, y: float, text: str) -> None:
    axes.add_patch(plt.Circle((x, y), 0.16, facecolor="white", edgecolor=PLAIN, linewidth=1.3, zorder=3))
    axes.text(x, y, text, ha="center", va="center", fontsize=11, zorder=4)


def map_stack(axes: Axes, x: float, y: float, text: str, scale: float = 1.0) -> None:
    """A feature map: sheets one behind the other."""
    for i in (3, 2, 1, 0):
        corner = (x + 0.12 * i * scale, y + 0.35 + 0.12 * i * scale)
        axes.add_patch(Rectangle(corner, 0.8 * scale, 0.8 * scale, facecolor="white", edgecolor=THETA, linewidth=1.2))
    axes.text(x + 0.55 * scale, y + 0.25, text, ha="center", va="top", fontsize=8.5)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = PLAIN, width: float = 1.3
) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 12, "color": color, "linewidth": width}
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **style))


def title(axes: Axes, x: float, y: float, text: str, *, left: bool = False) -> None:
    axes.text(x, y, text, fontsize=12, fontweight="bold", ha="left" if left else "center", va="center")


if __name__ == "__main__":
    sys.exit(main())
