"""What the fused backends, `cpp` and `triton_site`, share. Each is a module with

| name | what it is |
|---|---|
| `forward`, `backward`, `track`, `relative_noise`, `draw_noise` | what it computes; shapes and results in `cpp.py` |
| `NAME` | as users are told |
| `UNSUPPORTED` | precisions of a map that it cannot take |
| `WHOLE_SLOT` | whether it rectifies, and without gradients gives several draws and, in evaluation, adds a shortcut |
"""

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from metaperturb.errors import UserError
from metaperturb.kernels.plain import Settings

NO_NOISE, DRAWN, GIVEN, EXPECTED = range(4)  # as in site.cpp

# Strength 0 leaves only the statistics of a training step to do.
TRACKING = Settings(training=True, noise=False, gate=False, strength=0.0, clip=None, channel_ratio=0, size_ratio=0)


def relative_settings(strength: float) -> Settings:
    """Of a factor of mean one: neither a scale nor statistics."""
    return Settings(training=False, noise=True, gate=False, strength=strength, clip=None, channel_ratio=0, size_ratio=0)


class Unavailable(UserError):
    """No fused kernel here; the message says why and what to do, in one line."""


def draw_seed(device: torch.device) -> Tensor:
    """Seed of one site's noise, from PyTorch's generator of the device: an int64 scalar, which stays there."""
    return torch.empty((), dtype=torch.int64, device=device).random_()


def noise_source(settings: Settings, noise: Tensor | None) -> int:
    if not settings.noise:
        return NO_NOISE
    return EXPECTED if settings.expected else DRAWN if noise is None else GIVEN


def upper_bound(settings: Settings) -> float:
    """What the output is clipped to; infinity where it is not clipped."""
    return math.inf if settings.clip is None else settings.clip


def order_of(h: Tensor) -> torch.memory_format:
    """In which kernels take and give maps like `h`; there is one for each of the orders that PyTorch has."""
    last = not h.is_contiguous() and h.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def cache_folder() -> Path:
    """Where a user's compiled kernels are kept, and what was found out about kernels.

    Raises:
        Unavailable: a user without a home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metaperturb"
    except RuntimeError:
        raise Unavailable("no home folder to keep the compiled kernels in (set XDG_CACHE_HOME)") from None
