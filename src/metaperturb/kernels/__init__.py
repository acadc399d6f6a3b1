"""How sites compute: a fused kernel where there is one, else plain PyTorch operators.

| kernel | where | what it is |
|---|---|---|
| `plain` | everywhere | PyTorch operators: the reference (`plain.py`) |
| `cpp` | CPU, with a C++ compiler | one pass an image in cache, compiled on first use (`cpp.py`, `site.cpp`) |
| `triton` | CUDA | a few launches a site (`triton_site.py`) |

All equal the plain operators up to rounding. The noise is another draw: the plain operators take ε from `torch.randn`,
the fused kernels from their own counter-based generator, seeded by PyTorch's; a run should stay with one kernel.
"""

import contextlib
import functools
import importlib
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from metaperturb.errors import UserError
from metaperturb.kernels import fused, plain
from metaperturb.kernels.backend import Unavailable
from metaperturb.kernels.plain import HALF_PRECISION

CHOICES = ("auto", "fused", "plain")
_BACKENDS = {"cpu": "cpp", "cuda": "triton_site"}
_choice = "auto"


def set_kernel(choice: str) -> None:
    """Choose for all sites of this process.

    Args:
        choice: `"auto"`: fused where it can be; `"fused"`: the same, and an error on a device that has no fused kernel;
            `"plain"`.

    Raises:
        UserError: another word.
    """
    global _choice
    if choice not in CHOICES:
        raise UserError(f"kernel: unknown {choice!r} (known: {', '.join(CHOICES)})")
    _choice = choice


@contextlib.contextmanager
def use_kernel(choice: str) -> Iterator[None]:
    """`set_kernel` for the time of a `with` block."""
    before = _choice
    set_kernel(choice)
    try:
        yield
    finally:
        set_kernel(before)


def kernel_name(device: torch.device | str = "cpu") -> str:
    """What sites on this device compute with under the present choice: `"cpp"`, `"triton"` or `"plain"`."""
    backend = _backend(torch.device(device))
    return "plain" if backend is None else backend.NAME


def batch_kernel(device: torch.device) -> str | None:
    """Name of the kernels that make image batches on this device; None: PyTorch operators do, with the same bits."""
    found = _load(device) if _choice != "plain" else None
    return found.NAME if isinstance(found, ModuleType) else None


def tell_change(before: str, now: str, run_dir: str) -> None:
    """Say that a resumed run goes on with another kernel than it began with."""
    if before != now:
        print(
            f"{run_dir}: goes on with the {now} kernel where it began with {before}; from here on the noise is another "
            "draw than in an uninterrupted run",
            file=sys.stderr,
        )


def fused_backend(
    h: Tensor, phi: Tensor, noise: Tensor | None, running_mean: Tensor, running_var: Tensor
) -> ModuleType | None:
    """The fused backend for a site's input, or None where the plain operators have to do.

    The plain operators serve what the fused kernels cannot: `torch.compile`, `torch.jit`, `torch.func`, forward-mode
    derivatives, a noise with a gradient, precisions other than φ's (a half-precision map excepted); and they tell what
    is wrong where tensors are on different devices.
    """
    tensors = (phi, running_mean, running_var)
    dtype = torch.float32 if h.dtype in HALF_PRECISION else h.dtype
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or type(h) not in (Tensor, torch.nn.Parameter)
        or dtype not in (torch.float32, torch.float64)
        or any(t.dtype != dtype or t.device != h.device or not t.is_contiguous() for t in tensors)
        or (noise is not None and (noise.requires_grad or noise.dtype != h.dtype or noise.device != h.device))
    ):
        return None
    return _backend(h.device)


def _backend(device: torch.device) -> ModuleType | None:
    if _choice == "plain":
        return None
    found = _load(device)
    if isinstance(found, ModuleType):
        return found
    if _choice == "fused":
        raise UserError(f"kernel: no fused one on {device}: {found}")
    if device.type not in _told:
        _told.add(device.type)
        warnings.warn(f"the perturbation runs in plain PyTorch operators, which is slower: {found}", stacklevel=2)
    return None


_told = {"meta"}  # devices whose lack of a fused kernel has been said, or needs no saying


@functools.cache
def _load(device: torch.device) -> ModuleType | str:
    """The backend for this device, tried out on it and on no other, or why there is none."""
    if device.type not in _BACKENDS:
        return f"there is none for {device.type}"
    try:
        backend = importlib.import_module(f"metaperturb.kernels.{_BACKENDS[device.type]}")
        error = _error(backend, device)
    except Unavailable as unavailable:
        return str(unavailable)
    if not error < 1e-4:  # a NaN is no agreement either
        return f"{backend.NAME} disagrees with them on this machine (relative error {error:.1e})"
    return backend


def _error(backend: ModuleType, device: torch.device) -> float:
    """Largest relative error of a small site's output and gradients against the plain operators in float64.

    Kernels are compiled on the user's machine, by a compiler nobody tested: a look before the first use. In float32 the
    plain operators would err more: on a GPU convolutions may round what they multiply to TF32.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):

        def wave(*shape: int, requires_grad: bool = True) -> Tensor:
            values = torch.arange(torch.Size(shape).numel(), dtype=torch.float32, device=device).mul(0.7).sin()
            return values.view(shape).requires_grad_(requires_grad)

        h, phi = wave(4, 5, 6, 7), wave(82)
        settings = plain.Settings(True, True, True, 0.7, 1.5, 0.5, 0.5)
        seed = torch.full((), 0x123456789ABCDEF, dtype=torch.int64, device=device)
        running = wave(5, 4, requires_grad=False), wave(5, 4, requires_grad=False)
        actual = fused.apply(backend, h, phi, None, seed, *running, settings)
        exact_h, exact_phi = h.double(), plain.Phi.of(phi.double())
        noise = backend.draw_noise(seed, h).double()
        expected = plain.perturb(exact_h, exact_phi, *plain.batch_statistics(exact_h, exact_phi), noise, settings)
        grad_out = wave(4, 5, 6, 7, requires_grad=False).flip(0)
        grads = (torch.autograd.grad(out, [h, phi], grad_out.to(out.dtype)) for out in (actual, expected))
        pairs = [(actual, expected), *zip(*grads, strict=True)]
        return max(((a - e).norm() / e.norm()).item() for a, e in pairs)
