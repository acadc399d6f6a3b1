"""Methods that augment the training images further."""

import torch
from torch import Tensor
from torchvision.transforms import v2

from metaperturb.methods.base import Method


class TrivialAugment(Method):
    """TrivialAugment (Müller & Hutter 2021, Algorithm 1): one random operation of random magnitude an image.

    The space is its "Wide" one, in torchvision's implementation: 14 operations of color or geometry with up to 31
    magnitudes. There are no hyperparameters. It acts on the 8-bit images that crop and flip return, as in torchvision's
    training reference, one image after the other: some 25 ms of a CPU core for a batch of 128 images of 32 pixels.
    """

    def __init__(self) -> None:
        self.transform = v2.TrivialAugmentWide()

    def augment(self, images: Tensor) -> Tensor:
        """uint8 images `[B, 3, S, S]`, cropped and flipped → the same, each changed in its own way."""
        return torch.stack([self.transform(image) for image in images])
