"""Figure 8: the training loss around a trained network, along two random directions (Li et al. 2018).

The directions are normalized filter by filter: a filter of the direction has the norm of the network's filter, so that
networks whose weights differ in scale can be compared. Biases and batch norm stay as they are.

What is drawn is the cross-entropy of training images, not augmented, with choices that a picture's caption should name:

- Batch norm and the scales s of MetaPerturb take the statistics of the images at hand, as in training. The running ones
  belong to the weights in the middle; a step away from them the loss would mostly show that they no longer fit.
- Whatever precision the network was trained in, the loss is measured in float32.
- A network that draws noise draws the same noise at every point (common random numbers), and the losses of some draws
  are averaged: what differs between points is the weights alone.
"""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaperturb.analyses import begun
from metaperturb.attach import REGULARIZER
from metaperturb.config import option
from metaperturb.data.batches import DeviceImages, normalize
from metaperturb.errors import UserError
from metaperturb.modes import batch_norms, set_mode
from metaperturb.perturbation import PerturbSite
from metaperturb.randomness import numpy_generator
from metaperturb.runs import StepProgress
from metaperturb.storage import save_json
from metaperturb.trained import TrainedRun

REVISION = 3  # of how the loss is measured: results of another one are not continued


@dataclass(frozen=True)
class Plane:
    """Where the loss is measured."""

    reach: float = option(1.0, "coordinates a and b of θ + a·d₁ + b·d₂ run from −reach to reach", low=1e-3)
    points: int = option(21, "values of each; odd, so that the network itself is among them", low=3)
    images: int = option(1000, "training images, a fixed choice", low=2)
    batch_size: int = option(250, "images a batch, whose statistics batch norm takes", low=2)
    draws: int = option(4, "of the noise, where the network draws any", low=1)
    seed: int = option(0, "of directions and noise, the same for all networks that are compared")

    def __post_init__(self) -> None:
        if self.points % 2 == 0:
            raise UserError(f"points: must be odd, got {self.points}")

    @property
    def coordinates(self) -> list[float]:
        """Of a, and of b."""
        return np.linspace(-self.reach, self.reach, self.points).tolist()


def filter_normalized_directions(model: nn.Module, generator: torch.Generator) -> tuple[dict[str, Tensor], ...]:
    """Two random directions in weight space: Gaussian, each filter scaled to the norm of the network's.

    Of a convolution `[out, in, k, k]` a filter is `[in, k, k]`, of a linear layer `[out, in]` a row. Vectors (biases,
    batch norm) do not move.

    What a regularizer learns beside the network is drawn last, so that the network itself moves the same way under
    every method.

    Returns:
        of each direction, parameter name → its part; only of parameters that move.
    """
    moving = {name: parameter.data for name, parameter in model.named_parameters() if parameter.dim() > 1}
    directions: tuple[dict[str, Tensor], ...] = ({}, {})
    for of_regularizer in (False, True):
        for direction in directions:
            for name in (name for name in moving if (REGULARIZER in name.split(".")) == of_regularizer):
                random = torch.randn(moving[name].shape, generator=generator).to(moving[name])
                axes = tuple(range(1, random.dim()))
                norm, wanted = (torch.linalg.vector_norm(w, dim=axes, keepdim=True) for w in (random, moving[name]))
                direction[name] = random * wanted / norm
    return directions


def loss_surface(run: TrainedRun, plane: Plane, path: Path) -> dict[str, Any]:
    """Measure the loss on the plane around a run's network, row by row into `path`, where it also continues from.

    Returns:
        the content of `path`: what it is about, `coordinates` `[points]`, and `loss` `[points][points]` in nats:
        `loss[i][j]` at a = `coordinates[i]`, b = `coordinates[j]`.
    """
    settings = {**dataclasses.asdict(plane), "revision": REVISION}
    record = begun(path, run, "surface", settings, {"coordinates": plane.coordinates, "loss": []})
    rows: list[list[float]] = record["loss"]
    if len(rows) == plane.points:
        return record
    loss = _loss(run, plane)
    progress = StepProgress(f"loss surface of {run.dir.name}", plane.points**2, len(rows) * plane.points)
    for a in plane.coordinates[len(rows) :]:
        row = []
        for b in plane.coordinates:
            row.append(loss(a, b))
            progress.update(len(rows) * plane.points + len(row), loss=row[-1])
        rows.append(row)
        save_json(record, path)
    progress.close()
    return record


def _loss(run: TrainedRun, plane: Plane) -> Callable[[float, float], float]:
    """The loss of a run's network as a function of the two coordinates."""
    model, draws = copy.deepcopy(run.model), plane.draws if run.stochastic else 1
    first, second = filter_normalized_directions(model, torch.Generator().manual_seed(plane.seed))
    moving = [(p, p.detach().clone(), name) for name, p in model.named_parameters() if name in first]
    norms = batch_norms(model)
    for norm in norms:
        norm.momentum = 0.0  # the statistics of the batch are used, and leave no trace
    # The running statistics of sites do move, but nothing here reads them.
    set_mode([*norms, *(m for m in model.modules() if isinstance(m, PerturbSite))], training=True)
    chosen = numpy_generator(plane.seed, 0, "order_train", 0).permutation(len(run.train))[: plane.images]
    images = DeviceImages(run.train, moving[0][0].device)
    parts = torch.from_numpy(np.sort(chosen)).tensor_split(-(-len(chosen) // plane.batch_size))  # none of one image
    batches = [images.take(part.to(images.device)) for part in parts]

    @torch.no_grad()
    def loss(a: float, b: float) -> float:
        for parameter, center, name in moving:
            parameter.copy_(center + a * first[name] + b * second[name])
        torch.manual_seed(plane.seed)  # the same noise at every point
        losses = [
            F.cross_entropy(model(normalize(x)), y, reduction="sum").item() for x, y in batches for _ in range(draws)
        ]
        loss = sum(losses) / (len(chosen) * draws)
        if not np.isfinite(loss):
            raise UserError(f"{run.dir}: the loss at ({a:g}, {b:g}) is not finite; a smaller reach may help")
        return loss

    return loss
