"""Figure 7: the scales s that φ gave the channels of a trained network, place by place."""

from typing import Any

import torch

from metaperturb.errors import UserError
from metaperturb.trained import TrainedRun


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
