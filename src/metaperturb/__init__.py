"""MetaPerturb (Ryu et al., NeurIPS 2020): a meta-learned perturbation of 82 parameters that regularizes any CNN.

>>> import metaperturb
>>> model = metaperturb.models.create("resnet20", num_classes=10, image_size=32)
>>> phi = metaperturb.load_phi("tiny_imagenet_resnet20")
>>> model = metaperturb.attach(model, phi, image_size=32, verbose=False)
"""

import sys

if sys.argv[:1] == ["-m"]:  # as a program: what is wrong with the command is said before PyTorch is there
    from metaperturb.early import check_command_line

    check_command_line()

from metaperturb import kernels, models
from metaperturb.attach import attach, detach, find_sites
from metaperturb.errors import UserError
from metaperturb.perturbation import MetaPerturb, PerturbSite, Slot
from metaperturb.prediction import make_deterministic, make_stochastic, predict
from metaperturb.weights import load_phi, save_phi

__version__ = "0.1.0"
__all__ = [
    "MetaPerturb",
    "PerturbSite",
    "Slot",
    "UserError",
    "attach",
    "detach",
    "find_sites",
    "kernels",
    "load_phi",
    "make_deterministic",
    "make_stochastic",
    "models",
    "predict",
    "save_phi",
]
