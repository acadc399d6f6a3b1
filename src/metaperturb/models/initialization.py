"""The initial weights of the zoo."""

from torch import nn


def kaiming_init(model: nn.Module) -> nn.Module:
    """He et al. 2015 (fan-out, as in torchvision's ResNets) for convolutions; batch norm starts as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
