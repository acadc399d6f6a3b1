"""Networks by name: those of the paper, and any CNN of torchvision or timm."""

import difflib
import sys
from collections.abc import Callable

from torch import nn

from metaperturb.errors import UserError
from metaperturb.models.convnet import conv4, conv6, vgg9
from metaperturb.models.resnet import resnet8, resnet20, resnet32, resnet44, resnet56, wrn_28_2

# ResNet18 and ResNet34 (He et al. 2016, ImageNet form) are torchvision's own.
ZOO: dict[str, Callable[..., nn.Module]] = {
    "conv4": conv4,
    "conv6": conv6,
    "vgg9": vgg9,
    "resnet8": resnet8,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "wrn_28_2": wrn_28_2,
}


def create(name: str, num_classes: int, image_size: int) -> nn.Module:
    """A network with fresh weights, without perturbation, that maps `[B, 3, S, S]` to logits `[B, num_classes]`.

    Args:
        name: of the zoo (`resnet20`, `wrn_28_2`, …), of torchvision (`densenet121`, …), or `timm/<name>`.
        num_classes: at least 2.
        image_size: S in pixels. The plain ConvNets size their classifier by it.

    Raises:
        UserError: unknown name (with the nearest known ones), images too small, timm asked for and not installed.

    Example:
        >>> model = create("resnet20", num_classes=10, image_size=32)
    """
    if num_classes < 2:
        raise UserError(f"model {name}: needs at least 2 classes, got {num_classes}")
    if name in ZOO:
        return ZOO[name](num_classes, image_size)
    if name.startswith("timm/"):
        return _from_timm(name.removeprefix("timm/"), num_classes)
    import torchvision  # takes longer to import than all the rest, and the zoo does without

    available = torchvision.models.list_models(module=torchvision.models)
    if name not in available:
        near = difflib.get_close_matches(name, [*ZOO, *available], n=3)
        raise UserError(
            f"model {name}: unknown (near: {', '.join(near) or 'none'}; the zoo: {', '.join(ZOO)}; also any CNN of "
            "torchvision by name, and timm/<name>)"
        )
    builder = torchvision.models.get_model_builder(name)
    options = {"weights": None, "num_classes": num_classes}
    if "inception" in name or name == "googlenet":  # their auxiliary heads would change the output in training
        options |= {"aux_logits": False, "init_weights": True}
    return builder(**options)


def _from_timm(name: str, num_classes: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise UserError(f"model timm/{name}: timm is not installed ({sys.executable} -m pip install timm)") from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(f"model timm/{name}: unknown to timm {timm.__version__} (near: {', '.join(near) or 'none'})")
    return timm.create_model(name, num_classes=num_classes)
