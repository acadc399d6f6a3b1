"""The fused site as one differentiable function, whatever backend (`cpp`, `triton`) computes it.

It keeps the feature map that comes in and nothing else of that size: the backward pass computes the intermediate maps
again and draws the noise again from its seed.
"""

from types import ModuleType

import torch
from torch import Tensor

from metaperturb.kernels import plain
from metaperturb.kernels.backend import draw_seed
from metaperturb.kernels.plain import Phi, Settings


def perturb(
    backend: ModuleType,
    h: Tensor,
    phi: Phi,
    noise: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    settings: Settings,
) -> Tensor:
    """Perturb `h` `[B, C, H, W]` and, in training, move the running statistics `[C, 4]`.

    Without `noise` `[B, C, H, W]`, ε is drawn in the kernel, from a seed that PyTorch's generator of the device gives.
    """
    if settings.strength == 0.0:
        if settings.training:
            x = h.to(running_mean.dtype) if h.dtype in backend.UNSUPPORTED else h
            backend.track(x.detach(), phi, running_mean, running_var)
        return h
    seed = draw_seed(h.device) if settings.noise and noise is None else None
    return apply(backend, h, phi, noise, seed, running_mean, running_var, settings)


def apply(
    backend: ModuleType,
    h: Tensor,
    phi: Phi,
    noise: Tensor | None,
    seed: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    settings: Settings,
) -> Tensor:
    """The same at a strength above 0, with the seed of the noise given."""
    if h.dtype in backend.UNSUPPORTED:  # half precision
        noise = None if noise is None else noise.to(running_mean.dtype)
        x = h.to(running_mean.dtype)
        return apply(backend, x, phi, noise, seed, running_mean, running_var, settings).to(h.dtype)
    return _Perturb.apply(h, *phi, noise, seed, running_mean, running_var, settings, backend)


class _Perturb(torch.autograd.Function):
    # `forward` with a context: PyTorch's newer form without one inspects signatures at each call, 60 µs a site.
    @staticmethod
    def forward(
        ctx, h, self1, all1, self2, all2, scale_kernels, scale_affine, noise, seed, mean, var, settings, backend
    ):
        phi = Phi(self1, all1, self2, all2, scale_kernels, scale_affine)
        out, *scratch = backend.forward(h, phi, noise, seed, mean, var, settings)
        ctx.settings, ctx.backend = settings, backend
        ctx.save_for_backward(h, *phi, noise, seed, *scratch)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        saved = ctx.saved_tensors  # once: activation checkpointing allows no second look
        h, phi, noise, seed, scratch = saved[0], Phi(*saved[1:7]), saved[7], saved[8], saved[9:]
        nothing = (None,) * 6
        if torch.is_grad_enabled():  # somebody will differentiate this gradient: the plain operators can be
            grads = _differentiable_backward(ctx, grad_out, h, phi, noise, seed, statistics=scratch[1])
            return *grads, *nothing
        h_gradient, phi_gradient = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:7])
        wanted = h_gradient, phi_gradient  # of the first site in the φ-step h needs none
        grad_h, grad_phi = ctx.backend.backward(grad_out, h, phi, noise, seed, scratch, ctx.settings, *wanted)
        grads = nothing
        if phi_gradient:
            parts = grad_phi.split([p.numel() for p in phi])
            grads = tuple(part.view_as(p) for part, p in zip(parts, phi, strict=True))
        return grad_h, *grads, *nothing


def _differentiable_backward(ctx, grad_out, h, phi, noise, seed, statistics):
    if seed is not None:
        noise = ctx.backend.draw_noise(seed, h)
    inputs = [t for t, needed in zip((h, *phi), ctx.needs_input_grad, strict=False) if needed]
    mean, var = plain.batch_statistics(h, phi) if ctx.settings.training else statistics
    out = plain.perturb(h, phi, mean, var, noise, ctx.settings)
    grads = iter(torch.autograd.grad(out, inputs, grad_out, create_graph=True, allow_unused=True))
    return [next(grads) if needed else None for needed in ctx.needs_input_grad[:7]]
