"""Predictions as means over draws of the noise: what `evaluate` and `predict` have in common.

Up to the first site that acts, a network computes the same for all draws of one image. So only what follows that site
runs once a draw: the site gets `[B, C, H, W]` and returns `[draws · B, C, H, W]`, all images of the first draw first.
Not every network bears that its batch grows on the way: in some, what follows meets something that is `[B, …]` still.
Each network is therefore tried out, and where both ways do not give the same, the images are repeated.
"""

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metaperturb.errors import UserError
from metaperturb.kernels.plain import HALF_PRECISION
from metaperturb.modes import batch_norms
from metaperturb.perturbation import PerturbSite, draws_at_first_site

# Of a forward pass, up to which images and draws run together: 64 images of 32 pixels on a CPU, where more are slower
# than one pass a draw, and 1,024 elsewhere.
PIXELS = {"cpu": 2**16}
PIXELS_ELSEWHERE = 2**20
DRAWS = 20  # together: what runs once for all of them is then a small part of the work

_bears_draws: "weakref.WeakKeyDictionary[nn.Module, dict[Any, bool]]" = weakref.WeakKeyDictionary()


@torch.no_grad()
def log_prediction(
    model: nn.Module, x: Tensor, samples: int, tell: Callable[[float], None] = lambda share: None
) -> Tensor:
    """Log of the mean of softmax over `samples` draws: `[B, K]` in float32, of images `[B, C, H, W]`.

    The network has to be in evaluation mode. One without sites gets all images at once, and one draw after the other.
    Calls `tell` with the share of the work that is done, after each pass.

    Raises:
        UserError: the network returns no logits `[B, K]`.
    """
    draws, images = 1, len(x)
    shared = False
    if samples > 1 and any(isinstance(module, PerturbSite) for module in model.modules()):
        fits = max(1, PIXELS.get(x.device.type, PIXELS_ELSEWHERE) // (x.shape[2] * x.shape[3]))
        draws, shared = max(1, fits // images), bears_draws(model, x)
        if shared:
            draws = max(draws, min(fits, DRAWS))
            images = max(1, fits // min(draws, samples))
    parts, done = [], 0
    for chunk in x.split(images):
        log_p = x.new_full((), -math.inf, dtype=torch.float32)
        for first in range(0, samples, draws):
            count = min(draws, samples - first)
            # In float32 whatever the network computes in: a sum of a hundred bfloat16 numbers loses the last ones.
            log_q = _logits(model, chunk, count, shared).float().log_softmax(dim=1).unflatten(0, (count, len(chunk)))
            log_p = torch.logaddexp(log_p, log_q.logsumexp(dim=0))
            done += count * len(chunk)
            tell(done / (samples * len(x)))
        parts.append(log_p - math.log(samples))
    return torch.cat(parts)


@torch.no_grad()
def bears_draws(model: nn.Module, x: Tensor) -> bool:
    """Whether the first site of a network may return several draws of each image like `x` `[B, C, H, W]`.

    Tried out on two of the images and three draws, once for each network and size. The random generators stay as they
    are.
    """
    known = _bears_draws.setdefault(model, {})
    key = (x.shape[1:], x.dtype, x.device, *map(id, model.modules()))
    if key not in known:
        known[key] = _agree(model, x[:2] if len(x) > 1 else torch.cat([x, x.flip(3)]))
    return known[key]


def _agree(model: nn.Module, x: Tensor, draws: int = 3) -> bool:
    if any(norm.running_mean is None for norm in batch_norms(model)):  # what an image gives depends on the others
        return False
    devices = [x.device] if x.is_cuda else []
    try:
        with torch.random.fork_rng(devices):
            found = _logits(model, x, draws, True).float()
    except Exception:  # whatever it is: where it has another cause, the images as they are will raise it again
        return False
    with torch.random.fork_rng(devices):
        expected = _logits(model, x, draws, False).float()
    half = torch.is_autocast_enabled(x.device.type) or x.dtype in HALF_PRECISION
    tolerance = 0.05 if half else 1e-3  # of rounding, which a deep network makes larger; another draw differs by more
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def _logits(model: nn.Module, x: Tensor, draws: int, shared: bool) -> Tensor:
    """`[draws · B, K]`, all images of the first draw first."""
    if shared:
        with draws_at_first_site(draws):
            logits = model(x)
    else:
        logits = model(x.repeat(draws, 1, 1, 1) if draws > 1 else x)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != draws * len(x):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"the network returns {shape} where logits [{draws * len(x)}, K] are expected")
    return logits
