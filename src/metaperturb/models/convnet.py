"""The paper's plain networks: Conv4, Conv6 and VGG9. A site follows each batch norm, before the ReLU."""

from torch import Tensor, nn

from metaperturb.errors import UserError
from metaperturb.perturbation import Slot

# Output channels of each layer; True where a 2x2 max pooling follows. Conv4: Vinyals et al. 2016; Conv6 and VGG9 as in
# the authors' released code (the paper names them only).
CONV4 = [(64, True)] * 4
CONV6 = [(64, True), (64, True), (64, False), (64, True), (64, False), (64, True)]
VGG9 = [(64, True), (128, True), *((width, pool) for width in (256, 512, 512) for pool in (False, True))]


def kaiming_init(model: nn.Module) -> None:
    """He et al. 2015 (fan-out, as in torchvision's ResNets) for convolutions; batch norm starts as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class ConvLayer(nn.Sequential):
    """3x3 convolution, batch norm, slot, ReLU and, if `pool`, 2x2 max pooling."""

    def __init__(self, in_channels: int, out_channels: int, pool: bool) -> None:
        super().__init__()
        self.add_module("conv", nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.add_module("bn", nn.BatchNorm2d(out_channels))
        self.add_module("slot", Slot())
        self.add_module("relu", nn.ReLU(inplace=True))
        if pool:
            self.add_module("pool", nn.MaxPool2d(2))


class ConvNet(nn.Module):
    """A stack of `ConvLayer` and one linear classifier on the flattened map: `[B, 3, S, S]` → `[B, num_classes]`."""

    def __init__(self, layers: list[tuple[int, bool]], num_classes: int, image_size: int) -> None:
        super().__init__()
        pools = sum(pool for _, pool in layers)
        final_size = image_size // 2**pools
        if final_size < 1:
            raise UserError(f"image_size {image_size}: too small for this network, which halves it {pools} times")
        widths = [3] + [width for width, _ in layers]
        self.layers = nn.Sequential(*(ConvLayer(widths[i], width, pool) for i, (width, pool) in enumerate(layers)))
        self.fc = nn.Linear(widths[-1] * final_size**2, num_classes)
        kaiming_init(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).flatten(1))
