"""The fused site on the CPU as one differentiable function; `cpp.py` calls the kernel.

It keeps the feature map that comes in and, at most, a byte a value: the backward pass computes the intermediate maps
again and draws the noise again from its seed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metaperturb.kernels import cpp, plain
from metaperturb.kernels.cpp import DRAWN, noise_source
from metaperturb.kernels.plain import HALF_PRECISION, Phi, Settings

NAME = "cpp"


def site(
    h: Tensor,
    phi: Tensor,
    noise: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    settings: Settings,
    **whole: Any,
) -> Tensor:
    """`plain.site` by the kernel, which draws ε from a seed that PyTorch's generator gives.

    `whole` are `draws`, several of each image, and a `shortcut`, in evaluation; both without gradients.
    """
    if settings.strength == 0.0:
        if settings.training:
            x = h.to(running_mean.dtype) if h.dtype in HALF_PRECISION else h
            cpp.track(x.detach(), phi, running_mean, running_var)
        return F.relu(h) if settings.relu else h
    seed = draw_seed() if noise_source(settings, noise) == DRAWN else None
    return apply(h, phi, noise, seed, running_mean, running_var, settings, **whole)


def draw_seed() -> Tensor:
    """Seed of one site's noise, from PyTorch's generator: an int64 scalar."""
    return torch.empty((), dtype=torch.int64).random_()


def alike(h: Tensor, shortcut: Tensor) -> bool:
    """Whether the kernel can add a shortcut: it lies in memory as the map does."""
    return (
        h.dtype == shortcut.dtype not in HALF_PRECISION
        and h.shape == shortcut.shape
        and h.device == shortcut.device
        and h.is_contiguous()
        and shortcut.is_contiguous()
    )


def relative_noise(h: Tensor, phi: Tensor, noise: Tensor | None, strength: float, **whole: Any) -> Tensor:
    """`plain.relative_noise`, a factor `[B, C, H, W]` in the precision of `h`."""
    seed = draw_seed() if noise is None else None
    x, phi = h.detach(), phi.detach()
    if h.dtype in HALF_PRECISION:
        x, noise = x.to(phi.dtype), None if noise is None else noise.to(phi.dtype)
    return cpp.relative_noise(x, phi, noise, seed, strength, **whole).to(h.dtype)


def apply(
    h: Tensor,
    phi: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    settings: Settings,
    **whole: Any,
) -> Tensor:
    """The same at a strength above 0, with the seed of the noise given."""
    if h.dtype in HALF_PRECISION:
        noise = None if noise is None else noise.to(running_mean.dtype)
        x = h.to(running_mean.dtype)
        return apply(x, phi, noise, seed, running_mean, running_var, settings, **whole).to(h.dtype)
    if not torch.is_grad_enabled():
        return cpp.forward(h, phi, noise, seed, running_mean, running_var, settings, **whole)[0]
    return _Perturb.apply(h, phi, noise, seed, running_mean, running_var, settings)


class _Perturb(torch.autograd.Function):
    # `forward` with a context: PyTorch's newer form without one inspects signatures at each call, 60 µs a site.
    @staticmethod
    def forward(ctx, h, phi, noise, seed, mean, var, settings):
        out, *scratch = cpp.forward(h, phi, noise, seed, mean, var, settings)
        ctx.settings = settings
        ctx.save_for_backward(h, phi, noise, seed, *scratch)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        h, phi, noise, seed, *scratch = ctx.saved_tensors  # once: activation checkpointing allows no second look
        nothing = (None,) * 5
        if torch.is_grad_enabled():  # somebody will differentiate this gradient: the plain operators can be
            grads = _differentiable_backward(ctx, grad_out, h, phi, noise, seed, statistics=scratch[1])
            return *grads, *nothing
        wanted = ctx.needs_input_grad[:2]  # of the first site in the φ-step h needs none
        return *cpp.backward(grad_out, h, phi, noise, seed, scratch, ctx.settings, *wanted), *nothing


def _differentiable_backward(ctx, grad_out, h, phi, noise, seed, statistics):
    if seed is not None:
        noise = cpp.draw_noise(seed, h)
    inputs = [t for t, needed in zip((h, phi), ctx.needs_input_grad, strict=False) if needed]
    named = Phi.of(phi)
    mean, var = plain.batch_statistics(h, named) if ctx.settings.training else statistics
    out = plain.perturb(h, named, mean, var, noise, ctx.settings)
    grads = iter(torch.autograd.grad(out, inputs, grad_out, create_graph=True, allow_unused=True))
    return [next(grads) if needed else None for needed in ctx.needs_input_grad[:2]]
