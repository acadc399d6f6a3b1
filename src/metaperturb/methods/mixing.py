"""Methods that soften labels: label smoothing, and those that mix pairs of images or their feature maps, and their
labels alike: mixup, CutMix, Manifold Mixup.

The pairs are those of the batch and a random permutation of it (Zhang et al. 2018, section 2), and one λ ~ Beta(α, α)
serves a whole batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaperturb.data.arrays import ImageArrays
from metaperturb.methods.base import Method, SiteMethod


class LabelSmoothing(Method):
    """Label smoothing (Szegedy et al. 2016, section 7): the label's class gets 1 − ε + ε/K, every other one ε/K.

    Args:
        smoothing: ε. Default 0.1 (section 7, ImageNet).
    """

    def __init__(self, smoothing: float) -> None:
        self.smoothing = smoothing

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing)


class Mixing(Method):
    """What the three share: who is mixed, in which share, and the labels.

    Args:
        alpha: α of λ ~ Beta(α, α); 0 is off.
    """

    mixes_images = True

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def prepare(self, model: nn.Module, train: ImageArrays) -> None:
        super().prepare(model, train)
        self.num_classes = train.num_classes

    def batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.alpha == 0.0:
            return x, y
        partner = torch.randperm(len(x), device=x.device)
        x, share = self.mix_images(x, partner, draw_share(self.alpha))
        return x, mix(F.one_hot(y, self.num_classes).float(), partner, share)

    def mix_images(self, x: Tensor, partner: Tensor, share: float) -> tuple[Tensor, float]:
        """What the network is given for `x`, and the share that its own labels have."""
        return mix(x, partner, share), share


class Mixup(Mixing):
    """mixup (Zhang et al. 2018, eq. 1): `λ·x_i + (1 − λ)·x_j` with labels `λ·y_i + (1 − λ)·y_j`.

    Default of α: 1, the original's for CIFAR (section 3.2; 0.2 on ImageNet).
    """


class CutMix(Mixing):
    """CutMix (Yun et al. 2019, section 3.1, Algorithm A1): a box of x_i is overwritten with that of x_j.

    Default of α: 1 (section 3.1); λ is the share of x_i to be left. The box has the proportions of the image and a
    center anywhere in it. What lies outside is cut off, and the labels are weighted by the pixels that were in fact
    pasted (Algorithm A1).
    """

    def mix_images(self, x: Tensor, partner: Tensor, share: float) -> tuple[Tensor, float]:
        height, width = x.shape[2:]
        rows, columns = draw_interval(height, share), draw_interval(width, share)
        patch = x[:, :, rows, columns].index_select(0, partner)
        x = x.clone()
        x[:, :, rows, columns] = patch
        return x, 1 - patch[0, 0].numel() / (height * width)


class ManifoldMixup(Mixing, SiteMethod):
    """Manifold Mixup (Verma et al. 2019, section 2): mixup of the feature maps of a layer drawn for each batch.

    Default of α: 2, of the authors' code for CIFAR. The eligible layers are the input and the sites, with equal
    probability (the original takes, in its residual networks, the input and the first two stages).
    """

    def site(self, channels: int) -> nn.Module:
        return MixingSite()

    def mix_images(self, x: Tensor, partner: Tensor, share: float) -> tuple[Tensor, float]:
        sites = self.sites.sites
        layer = int(torch.randint(len(sites) + 1, ()))
        if layer == len(sites):
            return super().mix_images(x, partner, share)
        sites[layer].pending = partner, share
        return x, share


class MixingSite(nn.Module):
    """The identity, but once for what is `pending`: the partners and the share with which the next maps are mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.pending: tuple[Tensor, float] | None = None

    def forward(self, h: Tensor) -> Tensor:
        if self.pending is None or not self.training:
            return h
        (partner, share), self.pending = self.pending, None
        return mix(h, partner, share)


def mix(values: Tensor, partner: Tensor, share: float) -> Tensor:
    """`share · values[i] + (1 − share) · values[partner[i]]`, of the shape of `values` `[B, …]`."""
    return values.index_select(0, partner).lerp(values, share)


def draw_share(alpha: float) -> float:
    """λ ~ Beta(α, α), on the host, so that no device is waited for.

    As a quotient of Gamma variables, by their logarithms, with Gamma(α) = Gamma(α + 1)·U^(1/α): the Gamma(α) themselves
    underflow for small α, where `torch.distributions.Beta` then returns 1/2.
    """
    gamma = torch.distributions.Gamma(torch.full((2,), alpha + 1, dtype=torch.float64), 1.0).sample()
    log_gamma = gamma.log() + torch.rand(2, dtype=torch.float64).log() / alpha
    return (log_gamma[0] - log_gamma[1]).sigmoid().item()


def draw_interval(length: int, share: float) -> slice:
    """One side of CutMix's box: √(1 − λ) of `length` about a uniform center, cut off at the ends, in whole pixels."""
    half = length * (1 - share) ** 0.5 / 2
    center = length * torch.rand(()).item()
    return slice(round(max(center - half, 0)), round(min(center + half, length)))
