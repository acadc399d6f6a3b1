"""MetaPerturb as a method."""

from typing import Any

from torch import nn

from metaperturb.attach import Attachment, attach
from metaperturb.data.arrays import ImageArrays
from metaperturb.methods.base import Method
from metaperturb.perturbation import MetaPerturb


class Perturbation(Method):
    """MetaPerturb (Ryu et al. 2020, Algorithm 2): a frozen φ perturbs the feature maps, in evaluation too.

    Args:
        phi: the meta-learned perturbation.
        ramp: the share of the steps over which the strength rises (section 3.3 anneals; 0.4 in the authors' code).
        where: the sites, as `attach` takes them.
        noise, gate, clip, clip_eval, paper: likewise. Without noise evaluation draws nothing.
    """

    sites: Attachment

    def __init__(self, phi: MetaPerturb, ramp: float, where: str, **options: Any) -> None:
        self.phi, self.ramp, self.where, self.options = phi, ramp, where, options
        self.stochastic = options["noise"]

    def prepare(self, model: nn.Module, train: ImageArrays) -> None:
        options = self.options if self.options["paper"] else self.options | {"clip": "paper"}
        self.sites = attach(model, self.phi, train.image_size, self.where, **options).metaperturb

    def set_strength(self, strength: float) -> None:
        self.sites.strength = strength
