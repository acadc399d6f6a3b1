"""Networks by name: those of the paper, and any CNN of torchvision or timm."""

import difflib
import sys
from collections.abc import Callable

from torch import nn

from metaperturb.errors import UserError
from metaperturb.models.zoo import CONV4, CONV6, VGG9, ConvNet, ResNet

# Number of classes and image size → network. ResNets average over whatever map is left.
# ResNet18 and ResNet34 (He et al. 2016, ImageNet form) are torchvision's own.
ZOO: dict[str, Callable[[int, int], nn.Module]] = {
    "conv4": lambda num_classes, image_size: ConvNet(CONV4, num_classes, image_size),
    "conv6": lambda num_classes, image_size: ConvNet(CONV6, num_classes, image_size),
    "vgg9": lambda num_classes, image_size: ConvNet(VGG9, num_classes, image_size),
    **{f"resnet{6 * n + 2}": lambda num_classes, _, n=n: ResNet(n, num_classes) for n in (1, 3, 5, 7, 9)},
    "wrn_28_2": lambda num_classes, _: ResNet(4, num_classes, width=2),
}


def create(name: str, num_classes: int, image_size: int) -> nn.Module:
    """A network with fresh weights, without perturbation, that maps `[B, 3, S, S]` to logits `[B, num_classes]`.

    Args:
        name: of the zoo (`resnet20`, `wrn_28_2`, …), of torchvision (`densenet121`, …), or `timm/<name>`.
        num_classes: at least 2.
        image_size: S in pixels. The plain ConvNets size their classifier by it.

    Raises:
        UserError: unknown name (with the nearest known ones), images too small, timm asked for and not installed.

    Examples:
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
        raise UserError(
            f"model: unknown {name!r} ({_near(name, [*ZOO, *available])}; the zoo: {', '.join(ZOO)}; also any CNN of "
            "torchvision by name, and timm/<name>)"
        )
    auxiliary = "inception" in name or name == "googlenet"  # heads that would change the output in training
    options = {"aux_logits": False, "init_weights": True} if auxiliary else {}
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)


def _from_timm(name: str, num_classes: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise UserError(f"model: timm/{name}: timm is not installed ({sys.executable} -m pip install timm)") from error
    if not timm.is_model(name):
        raise UserError(f"model: timm/{name}: unknown to timm {timm.__version__} ({_near(name, timm.list_models())})")
    return timm.create_model(name, num_classes=num_classes)


def _near(name: str, known: list[str]) -> str:
    return f"near: {', '.join(difflib.get_close_matches(name, known, n=3)) or 'none'}"
