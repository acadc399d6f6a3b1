"""The paper's networks: plain ones, residual ones for CIFAR (He et al. 2016, section 4.2), and WRN-28-2 (Zagoruyko &
Komodakis 2016).

In plain networks a site follows each batch norm and precedes the ReLU. In a residual block it follows the sum and
precedes the last ReLU; a block of a wide ResNet ends with the sum.
"""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from metaperturb.errors import UserError
from metaperturb.perturbation import Slot

# Output channels of each layer; True where a 2x2 max pooling follows. Conv4: Vinyals et al. 2016; Conv6 and VGG9 as in
# the authors' released code (the paper names them only).
CONV4 = [(64, True)] * 4
CONV6 = [(64, True), (64, True), (64, False), (64, True), (64, False), (64, True)]
VGG9 = [(64, True), (128, True), *((width, pool) for width in (256, 512, 512) for pool in (False, True))]


class ConvNet(nn.Module):
    """3x3 convolutions and one linear classifier on the flattened map: `[B, 3, S, S]` → `[B, num_classes]`."""

    def __init__(self, layers: list[tuple[int, bool]], num_classes: int, image_size: int) -> None:
        super().__init__()
        pools = sum(pool for _, pool in layers)
        final_size = image_size // 2**pools
        if final_size < 1:
            raise UserError(f"image_size {image_size}: too small for this network, which halves it {pools} times")
        self.layers, channels = nn.Sequential(), 3
        for width, pool in layers:
            layer = OrderedDict(conv=nn.Conv2d(channels, width, 3, padding=1), bn=nn.BatchNorm2d(width), slot=Slot())
            layer |= {"relu": nn.ReLU(inplace=True), **({"pool": nn.MaxPool2d(2)} if pool else {})}
            self.layers.append(nn.Sequential(layer))
            channels = width
        self.fc = nn.Linear(channels * final_size**2, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).flatten(1))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut: subsampled and zero-padded where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.slot = Slot(relu=True)
        self.stride = stride
        self.pad = (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride > 1 or self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return self.slot(out, x)


class WideBlock(nn.Module):
    """Pre-activation block; a 1x1 convolution is the shortcut where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv(in_channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels)
        same = stride == 1 and in_channels == channels
        self.shortcut = None if same else nn.Conv2d(in_channels, channels, 1, stride, bias=False)
        self.slot = Slot()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return self.slot(out, shortcut)


class ResNet(nn.Module):
    """Three stages of `blocks` blocks each, 16, 32 and 64 channels times `width`: `[B, 3, S, S]` → `[B, num_classes]`.

    `6n + 2` layers for n blocks; a wide one has `6n + 4`, and its last batch norm behind all blocks.
    """

    def __init__(self, blocks: int, num_classes: int, width: int = 1) -> None:
        super().__init__()
        block, self.wide = (BasicBlock, False) if width == 1 else (WideBlock, True)
        self.conv1 = _conv(3, 16)
        if not self.wide:
            self.bn1 = nn.BatchNorm2d(16)
        before = 16
        for number, stride in enumerate((1, 2, 2), 1):
            channels = 8 * width * 2**number
            stage = [block(before, channels, stride), *(block(channels, channels, 1) for _ in range(blocks - 1))]
            self.add_module(f"layer{number}", nn.Sequential(*stage))
            before = channels
        if self.wide:
            self.bn = nn.BatchNorm2d(before)
        self.fc = nn.Linear(before, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out = self.layer1(out if self.wide else F.relu(self.bn1(out)))
        out = self.layer3(self.layer2(out))
        return self.fc((F.relu(self.bn(out)) if self.wide else out).mean(dim=(2, 3)))


def _conv(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)


def _initialize(model: nn.Module) -> None:
    """He et al. 2015 (fan-out, as in torchvision's ResNets) for convolutions; batch norm starts as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
