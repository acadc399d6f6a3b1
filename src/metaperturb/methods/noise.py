"""Methods that multiply feature maps by noise: dropout, DropBlock, Information Dropout."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import drop_block2d

from metaperturb.data.arrays import ImageArrays
from metaperturb.errors import UserError
from metaperturb.methods.base import SiteMethod


class Dropout(SiteMethod):
    """Dropout (Srivastava et al. 2014, section 4): each unit is 0 with probability p, else divided by 1 − p.

    Args:
        prob: p. Default 0.25, what the original takes for most convolutional layers (section 6.1.2: units of the
            convolutions on SVHN are retained with probability 0.75, 0.75 and 0.5).
            In a residual network the sum that runs through all sites gathers the noise: less may serve better.

    Evaluation drops nothing.
    """

    def __init__(self, prob: float) -> None:
        self.prob = prob

    def site(self, channels: int) -> nn.Module:
        return nn.Dropout(self.prob)


class DropBlock(SiteMethod):
    """DropBlock (Ghiasi et al. 2018, Algorithm 1): squares of neighboring units are dropped together.

    Args:
        prob: the share of units dropped at the end of training. Default 0.1 (keep_prob 0.9, section 4.1).
        size: side of the square, odd. Default 7 (section 4.1), for maps of 7 units and more; a smaller map takes the
            largest odd size that fits.

    The dropped share rises linearly from 0 over the whole training ("scheduled DropBlock", section 3). What is
    left is multiplied by the number of units over the number of those left, in the whole batch. Evaluation drops
    nothing.

    Raises:
        UserError: an even size, whose square would have no center.
    """

    ramp = 1.0

    def __init__(self, prob: float, size: int) -> None:
        if size % 2 == 0:
            raise UserError(f"dropblock_size: must be odd, got {size}")
        self.prob, self.size = prob, size

    def site(self, channels: int) -> nn.Module:
        return DropBlockSite(self.prob, self.size)


class DropBlockSite(nn.Module):
    """DropBlock of `[B, C, H, W]` with probability `prob · strength`."""

    def __init__(self, prob: float, size: int) -> None:
        super().__init__()
        self.prob, self.size, self.strength = prob, size, 1.0

    def forward(self, h: Tensor) -> Tensor:
        size = min(self.size, *h.shape[2:])
        size -= 1 - size % 2
        return drop_block2d(h, self.prob * self.strength, size, training=self.training)


class InformationDropout(SiteMethod):
    """Information Dropout (Achille & Soatto 2018): noise whose size each unit learns to adapt to the image.

    In training `z = ε ∘ h` with `log ε ~ N(0, α(h)²)`, the paper's log-normal noise, and to the cross-entropy comes
    β/N times the information that z keeps of h, the sum over all units of

        KL(p(z|h) ‖ p(z)) = −log α(h) + const        (the paper's cost for ReLU; the prior p(z) is log-uniform)

    with the constant chosen so that the term is 0 at α = α_max, the most noise. N is the number of training images.

    Args:
        beta: β. Default 3, as in the authors' code for CIFAR-10. There N was 50,000, and two maps had noise; on a set
            of 5,000 and at every block the same β weighs much more. Tune it, downwards.
        max_alpha: α_max; 0 turns noise and KL term off. Default 0.7, as in the authors' code: variance of ε about 1.

    As in the authors' code, α(h) = α_max · sigmoid(convolution of features), and every unit counts, also where h ≤ 0.
    There the convolution is 3×3 and runs beside the one that makes the feature map; here it is 1×1 on the map itself,
    which keeps the parameters of wide networks bounded (C² + C a site).

    Evaluation draws no noise. The authors' code takes ε = 1 there and first measures the statistics of batch norm anew;
    here ε is its mean, exp(α²/2), which fits the statistics of training. (Accuracy of a ResNet20 on s-CIFAR100 at 16
    pixels, 1,200 steps, β = 0.1, one seed: 12.2 % so, 11.9 % their way, 7.7 % with ε = 1 on those of training.)
    """

    def __init__(self, beta: float, max_alpha: float) -> None:
        self.beta, self.max_alpha = beta, max_alpha

    def site(self, channels: int) -> nn.Module:
        return InformationDropoutSite(channels, self.max_alpha)

    def prepare(self, model: nn.Module, train: ImageArrays) -> None:
        super().prepare(model, train)
        self.weight = self.beta / len(train)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = super().loss(logits, labels)
        for site in self.sites.sites:
            kl, site.kl = site.kl, None  # let go of, with the graph that it belongs to
            if kl is not None:
                loss = loss + self.weight * kl
        return loss


class InformationDropoutSite(nn.Module):
    """Multiplies `h` `[B, C, H, W]` by log-normal noise with a spread that it learns.

    Attributes:
        kl: after a forward pass in training, the KL term: summed over units, mean over the batch, a scalar.
    """

    def __init__(self, channels: int, max_alpha: float) -> None:
        super().__init__()
        self.logit = nn.Conv2d(channels, channels, 1)
        self.max_alpha = max_alpha
        self.kl: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:
        if self.max_alpha == 0.0:
            return h
        logit = self.logit(h).float()
        alpha = self.max_alpha * logit.sigmoid()
        if not self.training:
            return h * (alpha.square() / 2).exp().to(h.dtype)
        self.kl = F.softplus(-logit).sum(dim=(1, 2, 3)).mean()  # −log(α / α_max) without a logarithm of 0
        return h * (alpha * torch.randn_like(alpha)).exp().to(h.dtype)
