"""What a regularizer may do to a training run."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from metaperturb.attach import REGULARIZER, place
from metaperturb.data.arrays import ImageArrays
from metaperturb.sites import Sites, find_sites


class Method:
    """A regularizer, as the training loop sees it. As it stands it does nothing: the paper's Base (section 4.1).

    | hook | called | may |
    |---|---|---|
    | `prepare(model, train)` | once, before the optimizer is made | put modules at the network's sites |
    | `set_strength(c)` | before each step | follow a schedule |
    | `augment(images)` | on each training batch of 8-bit images, where a method has it | change the images |
    | `batch(x, y)` | on each training batch | change images, soften labels |
    | `loss(logits, labels)` | after the forward pass | add a term |

    Attributes:
        augment: None, or a function of uint8 images `[B, 3, S, S]`, cropped and flipped but not normalized yet.
        ramp: the share of the steps over which the strength c rises linearly from 0 to 1; 0: it is 1 from the start.
        stochastic: whether evaluation draws, too, so that predictions are averaged over Monte-Carlo samples.

    What a method learns is among the network's parameters, and its state in the network's state dict.
    """

    augment: Callable[[Tensor], Tensor] | None = None
    ramp = 0.0
    stochastic = False

    def prepare(self, model: nn.Module, train: ImageArrays) -> None:
        """Get `model`, which maps `[B, 3, S, S]` to `[B, K]`, ready for training on `train`, in place."""

    def set_strength(self, strength: float) -> None:
        """c in [0, 1], for the next step."""

    def batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Images `[B, 3, S, S]` in [-1, 1] and labels `[B]` → images and labels `[B]` or soft labels `[B, K]`."""
        return x, y

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What training minimizes, a scalar: here the cross-entropy of `logits` `[B, K]` with what `batch` returned."""
        return F.cross_entropy(logits, labels)


class SiteMethod(Method, ABC):
    """A method that acts on feature maps, with a module at each of the sites where MetaPerturb acts.

    Most sites precede a ReLU, while some originals act behind it: what multiplies by numbers that are not negative does
    the same on either side.
    """

    sites: Sites

    @abstractmethod
    def site(self, channels: int) -> nn.Module:
        """The module for one site: feature map `[B, C, H, W]` → the same shape."""

    def prepare(self, model: nn.Module, train: ImageArrays) -> None:
        specs = find_sites(model, train.image_size)
        self.sites = Sites(specs, [self.site(spec.channels) for spec in specs])
        place(model, self.sites, REGULARIZER)
