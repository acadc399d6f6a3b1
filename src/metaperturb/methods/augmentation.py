"""Methods that augment the training images further."""

import torch
from torch import Tensor
from torchvision.transforms import v2

from metaperturb.data.batches import normalize
from metaperturb.methods.base import Method


class TrivialAugment(Method):
    """TrivialAugment (Müller & Hutter 2021, Algorithm 1): one random operation of random magnitude an image.

    The space is its "Wide" one, in torchvision's implementation: 14 operations of color or geometry with up to 31
    magnitudes. There are no hyperparameters. It acts on the 8-bit images that crop and flip return, as in torchvision's
    training reference, one image after the other: some 25 ms of a CPU core for a batch of 128 images of 32 pixels.
    """

    def __init__(self) -> None:
        self.augment = v2.TrivialAugmentWide()

    def batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        images = x.add(1.0).mul_(127.5).round_().to(torch.uint8)  # undoes `normalize`, exactly
        return normalize(torch.stack([self.augment(image) for image in images])), y
