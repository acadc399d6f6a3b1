"""Methods that change the labels alone."""

import torch.nn.functional as F
from torch import Tensor

from metaperturb.methods.base import Method


class LabelSmoothing(Method):
    """Label smoothing (Szegedy et al. 2016, section 7): the label's class gets 1 − ε + ε/K, every other one ε/K.

    Args:
        smoothing: ε. Default 0.1 (section 7, ImageNet).
    """

    def __init__(self, smoothing: float) -> None:
        self.smoothing = smoothing

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing)
