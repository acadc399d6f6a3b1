"""What a regularizer may do to a training run; φ as one, and several at once."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from metaperturb.attach import REGULARIZER, attach, place
from metaperturb.config import MetaTestConfig
from metaperturb.data.arrays import ImageArrays
from metaperturb.errors import UserError
from metaperturb.perturbation import MetaPerturb
from metaperturb.sites import Sites, find_sites


class Method:
    """A regularizer, as the training loop sees it. As it stands it does nothing: the paper's Base (section 4.1).

    | hook | called | may |
    |---|---|---|
    | `prepare(model, train)` | once, before the optimizer is made | put modules at the network's sites |
    | `set_strength(c)` | before each step | make the modules follow a schedule |
    | `augment(images)` | on each training batch of 8-bit images, where a method has it | change the images |
    | `batch(x, y)` | on each training batch | change images, soften labels |
    | `loss(logits, labels)` | after the forward pass | add a term |

    Attributes:
        augment: None, or a function of uint8 images `[B, 3, S, S]`, cropped and flipped but not normalized yet.
        ramp: the share of the steps over which the strength c rises linearly from 0 to 1; 0: it is 1 from the start.
        stochastic: whether evaluation draws, too, so that predictions are averaged over Monte-Carlo samples.
        mixes_images: whether `batch` mixes images with each other, which only one of a recipe may.
        sites: the modules that it put into the network.

    What a method learns is among the network's parameters, and its state in the network's state dict.
    """

    augment: Callable[[Tensor], Tensor] | None = None
    ramp = 0.0
    stochastic = False
    mixes_images = False
    sites: Sites | None = None

    def prepare(self, model: nn.Module, train: ImageArrays) -> None:
        """Get `model`, which maps `[B, 3, S, S]` to `[B, K]`, ready for training on `train`, in place."""

    def set_strength(self, strength: float) -> None:
        """c in [0, 1], for the next step."""
        if self.sites is not None:
            self.sites.strength = strength

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

    @abstractmethod
    def site(self, channels: int) -> nn.Module:
        """The module for one site: feature map `[B, C, H, W]` → the same shape."""

    def prepare(self, model: nn.Module, train: ImageArrays) -> None:
        specs = find_sites(model, train.image_size)
        self.sites = Sites(specs, [self.site(spec.channels) for spec in specs])
        place(model, self.sites, REGULARIZER)

    def set_strength(self, strength: float) -> None:
        for site in self.sites.sites:
            site.strength = strength


class Perturbation(Method):
    """MetaPerturb (Ryu et al. 2020, Algorithm 2): a frozen φ perturbs the feature maps, in evaluation too.

    Args:
        phi: the meta-learned perturbation.
        config: `clip` is the upper bound of perturbed values in training (section 3.2: 100), with `clip_eval` in
            evaluation, too; `anneal` the share of the steps over which the strength rises (section 3.3 anneals; 0.4 in
            the authors' code); `sites`, `noise` and `gate` are ablations of table 3; `paper` chooses the
            arithmetic. Without noise evaluation draws nothing.
    """

    def __init__(self, phi: MetaPerturb, config: MetaTestConfig) -> None:
        self.phi, self.config, self.ramp, self.stochastic = phi, config, config.anneal, config.noise

    def prepare(self, model: nn.Module, train: ImageArrays) -> None:
        names = "sites", "noise", "gate", "clip", "clip_eval", "paper"
        options = {name: getattr(self.config, name) for name in names}
        if not self.config.paper:
            options["clip"] = "paper"  # which is none then
        self.sites = attach(model, self.phi, train.image_size, **options).metaperturb


class Recipe(Method):
    """A method, and further ones that change images, labels or the loss alone.

    8-bit images are augmented first, wherever TrivialAugment stands; batches then pass through the further ones, then
    through the method. Only one may mix images, only one have a loss of its own (`UserError`).
    """

    def __init__(self, methods: Mapping[str, Method]) -> None:
        first, *further = methods
        names = [*further, first]
        self.method, self.parts = methods[first], [methods[name] for name in names]
        mixing = [name for name in names if methods[name].mixes_images]
        own_loss = [name for name in names if type(methods[name]).loss is not Method.loss]
        for what, found in (("mixes images", mixing), ("has its own loss", own_loss)):
            if len(found) > 1:
                raise UserError(f"recipe: {' and '.join(found)} do not go together: each {what}")
        self.augment = next((part.augment for part in self.parts if part.augment), None)
        self.ramp, self.stochastic = self.method.ramp, self.method.stochastic
        self.loss, self.set_strength = methods[[first, *own_loss][-1]].loss, self.method.set_strength
        if hasattr(self.method, "attacked_loss"):
            self.method.attacked_loss = self.loss

    def prepare(self, model: nn.Module, train: ImageArrays) -> None:
        for part in self.parts:
            part.prepare(model, train)
        self.sites = self.method.sites

    def batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        for part in self.parts:
            x, y = part.batch(x, y)
        return x, y
