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

    The network has to be in evaluation mode. One whose sites draw nothing needs one pass and gets one; one without
    sites gets all images at once, and one draw after the other. Calls `tell` with the share of the work that is done,
    after each pass.

    Raises:
        UserError: the network returns no logits `[B, K]`.
    """
    draws, images = 1, len(x)
    shared = False
    sites = [module for module in model.modules() if isinstance(module, PerturbSite)]
    if sites and not any(site.attachment.draws for site in sites):
        samples = 1
    if samples > 1 and sites:
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

    Tried out on two of the images and three draws, once for each size and each state of the network: of which modules
    it consists, which sites draw, what is compiled. The random generators stay as they are.
    """
    known = _bears_draws.setdefault(model, {})
    key = (x.shape[1:], x.dtype, x.device, *map(_state, model.modules()))
    if key not in known:
        agree = _agree(model, x[:2] if len(x) > 1 else torch.cat([x, x.flip(3)]))
        if agree is None:
            return False
        known[key] = agree
    return known[key]


def _state(module: nn.Module) -> tuple[Any, ...]:
    """A module, which another one at its address is not, and what of it decides where draws begin."""
    draws = isinstance(module, PerturbSite) and module.attachment.draws
    return weakref.ref(module), draws, module._compiled_call_impl is not None


def _agree(model: nn.Module, x: Tensor, draws: int = 3) -> bool | None:
    """Whether both ways give the same; None where all outputs are equal, as of a classifier of zeros."""
    devices = [x.device] if x.is_cuda else []

    def logits(x: Tensor, shared: bool) -> Tensor:
        with torch.random.fork_rng(devices):
            return _logits(model, x, draws, shared).float()

    try:
        found = logits(x, True)
    except Exception:  # whatever it is: where it has another cause, the images as they are will raise it again
        return False
    expected = logits(x, False)
    if (expected == expected[0]).all():
        return None
    half = torch.is_autocast_enabled(x.device.type) or x.dtype in HALF_PRECISION
    tolerance = 0.05 if half else 1e-3  # of rounding, which a deep network makes larger; another draw differs by more
    bound = tolerance * expected.abs().max()
    if not (found - expected).abs().max() <= bound:
        return False
    beside = logits(torch.cat([x[:1], x[1:] + 1]), False)  # where the others matter, images must not go in parts
    return bool((beside - expected)[:: len(x)].abs().max() <= bound)


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
