"""Training and evaluation mode of networks, module by module."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has its own mode again, a frozen batch norm too."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The batch norms of a network, for `set_mode`."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def set_mode(modules: list[nn.Module], training: bool) -> None:
    """Training or evaluation mode of these modules alone; `model.train()` at each step would visit all of them."""
    for module in modules:
        module.training = training
