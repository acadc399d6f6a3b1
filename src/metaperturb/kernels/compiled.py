"""The plain operators, compiled by PyTorch: the site on a GPU.

One compilation serves sites of all widths, sizes and strengths. There are some for a network: with and without
gradients, in training and in evaluation, for each precision and memory format.

A compiled function has no second derivatives: where they are wanted, `use_kernel("plain")`.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from metaperturb.kernels import plain
from metaperturb.kernels.cpp import Unavailable
from metaperturb.storage import reason

NAME = "compiled"
MOST = 64  # compilations of one function; after PyTorch's 8 the rest would run uncompiled


def site(*arguments) -> Tensor:
    """`plain.site`."""
    return _compiled(plain.site)(*arguments)


def relative_noise(*arguments) -> Tensor:
    """`plain.relative_noise`."""
    return _compiled(plain.relative_noise)(*arguments)


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST)
    return torch.compile(function, dynamic=True)


def check(device: torch.device) -> None:
    """Compile and run something small.

    Raises:
        Unavailable: that does not work here.
    """
    try:
        torch.compile(lambda x: -x)(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler, a linker or a driver has to say
        raise Unavailable(f"torch.compile does not work here ({reason(error)})") from None
