"""MetaPerturb as a method."""

from torch import nn

from metaperturb.attach import Attachment, attach
from metaperturb.config import MetaTestConfig
from metaperturb.data.arrays import ImageArrays
from metaperturb.methods.base import Method
from metaperturb.perturbation import MetaPerturb


class Perturbation(Method):
    """MetaPerturb (Ryu et al. 2020, Algorithm 2): a frozen φ perturbs the feature maps, in evaluation too.

    Args:
        phi: the meta-learned perturbation.
        config: `clip` is the upper bound of perturbed values in training (section 3.2: 100), with `clip_eval` in
            evaluation, too; `anneal` the share of the steps over which the strength rises (section 3.3 anneals; 0.4 in
            the authors' code); `sites`, `noise` and `gate` are ablations of table 3; `paper` chooses the
            arithmetic. Without noise evaluation draws nothing.
    """

    sites: Attachment

    def __init__(self, phi: MetaPerturb, config: MetaTestConfig) -> None:
        self.phi, self.config, self.ramp, self.stochastic = phi, config, config.anneal, config.noise

    def prepare(self, model: nn.Module, train: ImageArrays) -> None:
        options = {
            name: getattr(self.config, name) for name in ("sites", "noise", "gate", "clip", "clip_eval", "paper")
        }
        if not self.config.paper:
            options["clip"] = "paper"  # which is none then
        self.sites = attach(model, self.phi, train.image_size, **options).metaperturb

    def set_strength(self, strength: float) -> None:
        self.sites.strength = strength
