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
from metaperturb.perturbation import PerturbSite
from metaperturb.randomness import seed_torch
from metaperturb.trained import TrainedRun

NODES = 40  # of Gauss-Hermite quadrature over ε; softplus is smooth, so that the error is below 1e-6


@torch.no_grad()
def learned_scales(run: TrainedRun, images: int = 64) -> list[dict[str, Any]]:
    """The scales of every channel in evaluation, and how strongly the noise perturbs it, in the order of the sites.

    Args:
        run: of method metaperturb, with scales.
        images: how many test images the noise is examined on, the first ones.

    Returns:
        for each site its `site` name, the `channels` C and `size` H of its feature map; `s`: C numbers in [0, 1], from
        the running statistics (section 3.2); and `spread`: C numbers, the relative standard deviation of z over ε,
        std(z) / mean(z), mean over the images and all positions. Where μ = 0, which is where meta-training begins,
        that is 0.65 and says nothing of the input; the larger μ, the smaller. With `noise=false`, z = 1, it is 0.
    """
    if run.config.method != "metaperturb":
        raise UserError(f"{run.dir}: method {run.config.method} has no scales s; figure 7 is about metaperturb")
    if not run.config.gate:
        raise UserError(f"{run.dir}: was trained without scales s (gate=false)")
    attachment, received = run.model.metaperturb, {}

    def receive(site: PerturbSite, args: tuple, more: dict[str, Any]) -> None:
        received[site] = args[0] + more.get("shortcut", 0.0)

    handles = [site.register_forward_pre_hook(receive, with_kwargs=True) for site in attachment.sites]
    device = next(run.model.parameters()).device
    batch, _ = DeviceImages(run.test, device).take(torch.arange(min(images, len(run.test)), device=device))
    seed_torch(0, 0, "scales")  # what a site sees depends on the noise before it
    try:
        run.model(normalize(batch))
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for spec, site in zip(attachment.specs, attachment.sites, strict=True):
        h = received[site]
        spread = _spread(site.phi.noise_mean(h)) if run.config.noise else [0.0] * spec.channels
        at = {"site": spec.name, "channels": spec.channels, "size": spec.size[0]}
        found.append({**at, "s": site.scale(h).tolist(), "spread": spread})
    return found


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
