"""Training and evaluation mode of networks, module by module."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has its own mode again, a frozen batch norm too."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def batch_norm_to_eval(model: nn.Module) -> None:
    """Batch norm normalizes by its running statistics and leaves them as they are; all else keeps its mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
