"""What the fused backends, `cpp` and `triton_site`, share."""

import math

import torch
from torch import Tensor

from metaperturb.kernels.plain import Settings

NO_NOISE, DRAWN, GIVEN = range(3)  # as in site.cpp

# Strength 0 leaves only the statistics of a training step to do.
TRACKING = Settings(training=True, noise=False, gate=False, strength=0.0, clip=None, channel_ratio=0, size_ratio=0)


class Unavailable(Exception):
    """No fused kernel here; the message says why and what to do, in one line."""


def draw_seed(device: torch.device) -> Tensor:
    """Seed of one site's noise, from PyTorch's generator of the device: an int64 scalar, which stays there."""
    return torch.empty((), dtype=torch.int64, device=device).random_()


def noise_source(settings: Settings, noise: Tensor | None) -> int:
    return NO_NOISE if not settings.noise else DRAWN if noise is None else GIVEN


def upper_bound(settings: Settings) -> float:
    """What the output is clipped to; infinity where it is not clipped."""
    return math.inf if settings.clip is None else settings.clip
