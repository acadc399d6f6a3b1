"""Kernels are compared with the plain operators before they are used: nobody tested the compilers that they meet."""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from metaperturb.errors import Unavailable
from metaperturb.kernels import cpp, fused, plain
from metaperturb.storage import reason

SHAPE = (6, 5, 7, 9)  # of what is compared: small, and no two sides alike, which would be taken for one by compilers
SEED = 0x123456789ABCDEF


def check_agreement(kernel: ModuleType, device: torch.device) -> None:
    """Compare a small site's output and gradients with those of the plain operators in float64.

    Raises:
        Unavailable: they differ, or there is no kernel.
    """
    try:
        error = error_of(kernel, device, torch.float32)
    except Exception as error:  # whatever a compiler, a linker or a driver has to say
        if kernel is fused:
            raise
        needs = "that takes a GPU that works, a C compiler and Python's headers"
        raise Unavailable(f"torch.compile fails on {device} ({reason(error)}); {needs}") from None
    if not error < 1e-4:  # a NaN is no agreement either
        raise Unavailable(f"{kernel.NAME} disagrees with them on this machine (relative error {error:.1e})")


def error_of(kernel: ModuleType, device: torch.device, dtype: torch.dtype, shape: Sequence[int] = SHAPE) -> float:
    """The largest relative error for a feature map of this shape; half-precision ones have their channels last.

    In float32 the plain operators would err more: on a GPU convolutions may round what they multiply to TF32.
    """
    half = dtype in plain.HALF_PRECISION
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):

        def wave(*shape: int) -> Tensor:
            values = torch.arange(torch.Size(shape).numel(), dtype=torch.float32, device=device).mul(0.7).sin()
            return values.view(shape)

        h, phi, grad_out = wave(*shape).to(dtype), wave(82).requires_grad_(), wave(*shape).flip(0).to(dtype)
        h = (h.to(memory_format=torch.channels_last) if half else h).requires_grad_()
        running = wave(shape[1], 4), wave(shape[1], 4)
        settings = plain.Settings(True, True, True, 0.7, 1.5, 0.5, 0.5)
        if kernel is fused:  # what it draws itself
            seed = torch.tensor(SEED)
            noise = cpp.draw_noise(seed, h.to(phi.dtype))
            actual = fused.apply(h, phi, None, seed, *running, settings)
        else:
            noise = wave(*shape).flip(1).to(dtype)
            actual = kernel.site(h, phi, noise, *running, settings)
        exact_h, exact_phi = h.double(), plain.Phi.of(phi.double())
        statistics = plain.batch_statistics(exact_h, exact_phi)
        expected = plain.perturb(exact_h, exact_phi, *statistics, noise.double(), settings)
        grads = (torch.autograd.grad(out, [h, phi], grad_out.to(out.dtype)) for out in (actual, expected))
        pairs = [(actual, expected), *zip(*grads, strict=True)]
        return max(((a - e).norm() / e.norm()).item() for a, e in pairs)
