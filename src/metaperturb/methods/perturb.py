"""MetaPerturb as a method."""

from torch import nn

from metaperturb.attach import Attachment, attach
from metaperturb.data.arrays import ImageArrays
from metaperturb.methods.base import Method
from metaperturb.perturbation import MetaPerturb


class Perturbation(Method):
    """MetaPerturb (Ryu et al. 2020, Algorithm 2): a frozen φ perturbs the feature maps, in evaluation too.

    Args:
        phi: the meta-learned perturbation.
        clip: k, upper bound of perturbed values in training (section 3.2: 100), or None.
        ramp: the share of the steps over which the strength rises (section 3.3 anneals; 0.4 in the authors' code).
        where, noise, gate: ablations of table 3, as `attach` takes them. Without noise evaluation draws nothing.
        clip_eval: clip in evaluation, too.
    """

    sites: Attachment

    def __init__(
        self, phi: MetaPerturb, clip: float | None, ramp: float, where: str, noise: bool, gate: bool, clip_eval: bool
    ) -> None:
        self.phi, self.clip, self.clip_eval, self.ramp = phi, clip, clip_eval, ramp
        self.where, self.noise, self.gate = where, noise, gate
        self.stochastic = noise

    def prepare(self, model: nn.Module, train: ImageArrays) -> None:
        options = {
            "noise": self.noise,
            "gate": self.gate,
            "clip": self.clip,
            "clip_eval": self.clip_eval,
            "paper": True,
        }
        self.sites = attach(model, self.phi, train.image_size, self.where, **options).metaperturb

    def set_strength(self, strength: float) -> None:
        self.sites.strength = strength
