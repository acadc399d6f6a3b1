"""How sites compute: fused where that works, else plain PyTorch operators.

| kernel | where | what it is |
|---|---|---|
| `plain` | everywhere | PyTorch operators: the reference (`plain.py`) |
| `cpp` | CPU, with a C++ compiler | one pass an image in cache, built on first use (`fused.py`, `cpp.py`, `site.cpp`) |
| `compiled` | CUDA | the plain operators, by `torch.compile` (`compiled.py`) |

All are equal up to rounding. The noise of each is another draw, from a seed of PyTorch's generator; a run should stay
with one kernel.
"""

import contextlib
import functools
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from metaperturb.errors import Unavailable, UserError
from metaperturb.kernels import compiled, fused, plain, trial
from metaperturb.kernels.plain import HALF_PRECISION

CHOICES = ("auto", "fused", "plain")
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
    """What sites on this device compute with under the present choice: `"cpp"`, `"compiled"` or `"plain"`."""
    return _kernel_on(torch.device(device)).NAME


def tell_change(before: str, now: str, run_dir: str) -> None:
    """Say that a resumed run goes on with another kernel than it began with."""
    if before != now:
        print(
            f"{run_dir}: goes on with the {now} kernel where it began with {before}; from here on the noise is another "
            "draw than in an uninterrupted run",
            file=sys.stderr,
        )


def kernel_for(h: Tensor, phi: Tensor, noise: Tensor | None, running_mean: Tensor, running_var: Tensor) -> ModuleType:
    """`fused`, `compiled` or `plain`: each has `site` and `relative_noise`, as in `plain.py`.

    The plain operators serve what the others cannot: `torch.compile`, `torch.jit`, `torch.func`, forward-mode
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
        return plain
    return _kernel_on(h.device)


def _kernel_on(device: torch.device) -> ModuleType:
    if _choice == "plain":
        return plain
    found = _load(device)
    if isinstance(found, ModuleType):
        return found
    if _choice == "fused":
        raise UserError(f"kernel: no fused one on {device}: {found}")
    if device.type not in _told:
        _told.add(device.type)
        text = f"the perturbation runs in plain PyTorch operators, which is slower: {found}"
        warnings.warn_explicit(text, UserWarning, "metaperturb", 1)  # of no file, whose line would be printed, too
    return plain


_told = {"meta"}  # devices whose lack of a fused kernel has been said, or needs no saying


@functools.cache
def _load(device: torch.device) -> ModuleType | str:
    """The kernel for this device, tried out on it and on no other, or why there is none."""
    kernel = {"cpu": fused, "cuda": compiled}.get(device.type)
    if kernel is None:
        return f"there is none for {device.type}"
    try:
        trial.check_agreement(kernel, device)
    except Unavailable as unavailable:
        return str(unavailable)
    return kernel
