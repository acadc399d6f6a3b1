"""MetaPerturb (Ryu et al., NeurIPS 2020): a meta-learned perturbation of 82 parameters that regularizes any CNN.

>>> import metaperturb
>>> model = metaperturb.models.create("resnet20", num_classes=10, image_size=32)
>>> phi = metaperturb.load_phi("tiny_imagenet_resnet20")
>>> model = metaperturb.attach(model, phi, image_size=32, verbose=False)
"""

import signal
import sys

# `python -m metaperturb.…`: until `run_program` has taken over, Ctrl-C ends the long import of PyTorch quietly.
if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].removeprefix("-m").startswith(f"{__name__}."):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from metaperturb import kernels, models
from metaperturb.attach import attach, detach, find_sites
from metaperturb.errors import UserError
from metaperturb.perturbation import MetaPerturb, PerturbSite, Slot
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
    "models",
    "save_phi",
]
