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

NAME = "compiled"
MOST = 64  # compilations of one function; after PyTorch's 8 the rest would run uncompiled


def site(*arguments) -> Tensor:
    """`plain.site`."""
    return _run(plain.site, *arguments)


def relative_noise(*arguments) -> Tensor:
    """`plain.relative_noise`."""
    return _run(plain.relative_noise, *arguments)


def _run(function: Callable[..., Tensor], *arguments) -> Tensor:
    plain.STENCILS = True
    try:
        return _compiled(function)(*arguments)
    finally:
        plain.STENCILS = False


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    from torch._functorch import config  # not before something is compiled: it takes its time

    config.donated_buffer = False  # which would forbid backward(retain_graph=True)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST)
    return torch.compile(function, dynamic=True)
