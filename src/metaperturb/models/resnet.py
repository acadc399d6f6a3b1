"""CIFAR-style residual networks (He et al. 2016, section 4.2) and WRN-28-2 (Zagoruyko & Komodakis 2016).

The site of a block follows the residual addition and precedes the block's last ReLU; a block of a wide ResNet ends with
the addition, so there its site is the block's output.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from metaperturb.models.convnet import kaiming_init
from metaperturb.perturbation import Slot


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut: subsampled and zero-padded where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
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


class ResNet(nn.Module):
    """`6n + 2` layers in three stages of 16, 32 and 64 channels: `[B, 3, S, S]` → `[B, num_classes]`."""

    def __init__(self, blocks_per_stage: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = _stages(BasicBlock, (16, 16, 32, 64), blocks_per_stage)
        self.fc = nn.Linear(64, num_classes)
        kaiming_init(self)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.fc(out.mean(dim=(2, 3)))


class WideBlock(nn.Module):
    """Pre-activation block; a 1x1 convolution is the shortcut where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        same = stride == 1 and in_channels == channels
        self.shortcut = None if same else nn.Conv2d(in_channels, channels, 1, stride, bias=False)
        self.slot = Slot()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return self.slot(out, shortcut)


class WideResNet(nn.Module):
    """`6n + 4` layers, `width` times the channels of a CIFAR ResNet: `[B, 3, S, S]` → `[B, num_classes]`."""

    def __init__(self, blocks_per_stage: int, width: int, num_classes: int) -> None:
        super().__init__()
        channels = (16, 16 * width, 32 * width, 64 * width)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1, self.layer2, self.layer3 = _stages(WideBlock, channels, blocks_per_stage)
        self.bn = nn.BatchNorm2d(channels[-1])
        self.fc = nn.Linear(channels[-1], num_classes)
        kaiming_init(self)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(F.relu(self.bn(out)).mean(dim=(2, 3)))


def _stages(block: type[nn.Module], channels: tuple[int, ...], blocks: int) -> list[nn.Sequential]:
    """Three stages, of which the second and the third begin by halving the map."""
    return [
        nn.Sequential(block(before, after, stride), *(block(after, after, 1) for _ in range(blocks - 1)))
        for before, after, stride in zip(channels, channels[1:], (1, 2, 2), strict=False)
    ]
