"""Figure 7: what φ does to the channels of a trained network, place by place: the scales s, and how much z scatters.

Both are computed in float32, whatever precision the network was trained in.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metaperturb.data.batches import DeviceImages, normalize
from metaperturb.errors import UserError
from metaperturb.randomness import seed_torch
from metaperturb.trained import TrainedRun

NODES = 40  # of Gauss-Hermite quadrature over ε; softplus is smooth, so that the error is below 1e-6


@torch.no_grad()
def learned_scales(run: TrainedRun) -> list[dict[str, Any]]:
    """s of every channel in evaluation, from the running statistics (section 3.2), in the order of the sites.

    Returns:
        for each site its `site` name, the `channels` C and `size` H of its feature map, and `s`: C numbers in [0, 1].

    Raises:
        UserError: the run's network has no scale: another method, or the ablation without it.
    """
    if run.config.method != "metaperturb":
        raise UserError(f"{run.dir}: method {run.config.method} has no scales s; figure 7 is about metaperturb")
    if not run.config.gate:
        raise UserError(f"{run.dir}: was trained without scales s (gate=false)")
    attachment = run.model.metaperturb
    found = []
    for spec, site in zip(attachment.specs, attachment.sites, strict=True):
        height, width = spec.size
        like = site.running_mean.new_zeros(1, spec.channels, height, width)  # in evaluation only its shape matters
        s = site.scale(like).tolist()
        found.append({"site": spec.name, "channels": spec.channels, "size": height, "s": s})
    return found


@torch.no_grad()
def noise_spread(run: TrainedRun, images: int = 64) -> list[list[float]]:
    """How strongly the noise perturbs every channel: the relative standard deviation of z over ε, std(z) / mean(z).

    Mean over the first `images` test images and all positions. Where μ = 0, which is where meta-training begins, it is
    0.65 and says nothing of the input; the larger μ, the smaller. With `noise=false`, z = 1, it is 0.

    Args:
        run: of method metaperturb.
        images: how many.

    Returns:
        for each site, in their order, C numbers.
    """
    attachment = run.model.metaperturb
    if not run.config.noise:
        return [[0.0] * spec.channels for spec in attachment.specs]
    found: dict[int, list[float]] = {}
    handles = [
        site.register_forward_pre_hook(lambda site, args, i=i: found.update({i: _spread(site.phi.noise_mean(args[0]))}))
        for i, site in enumerate(attachment.sites)
    ]
    device = next(run.model.parameters()).device
    first = torch.arange(min(images, len(run.test)), device=device)
    batch, _ = DeviceImages(run.test, device).take(first)
    seed_torch(0, 0, "scales")  # what a site sees depends on the noise before it
    try:
        run.model(normalize(batch))
    finally:
        for handle in handles:
            handle.remove()
    return [found[i] for i in range(len(attachment.sites))]


def _spread(mu: Tensor) -> list[float]:
    """std(z) / mean(z) of z = softplus(μ + ε), μ `[B, C, H, W]`: the mean over all but the channels."""
    # For μ far below 0, z is exp(μ + ε), and the ratio its limit; from −300 on squares are still normal numbers.
    mu = mu.double().clamp_min(-300)
    nodes, weights = np.polynomial.hermite.hermgauss(NODES)
    mean, square = torch.zeros_like(mu), torch.zeros_like(mu)
    for node, weight in zip(nodes.tolist(), (weights / math.sqrt(math.pi)).tolist(), strict=True):
        z = F.softplus(mu + math.sqrt(2) * node)
        mean += weight * z
        square += weight * z.square()
    return ((square - mean.square()).clamp_min(0).sqrt() / mean).mean(dim=(0, 2, 3)).tolist()
