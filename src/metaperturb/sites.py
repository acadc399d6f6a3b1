"""Where φ acts in a CNN (section 3.2, figure 3, and the authors' code), in this order of preference:

1. the network's own `Slot`s (the zoo);
2. residual networks: every block, after the addition (the last of a + b + x); a block of the same class without an
   addition (a strided one of MobileNet, say): its output;
3. plain networks: every convolution, after its normalization if it has one, before the activation. In a network that
   normalizes before it convolves (DenseNet) that is the output of every normalization.

Maps of one pixel that weight the channels of larger ones (attention) are no feature maps, nor are [B, H, W, C], nor is
what the network returns. All of this is made for classifiers: elsewhere look at what was found, and name the places.
"""

import difflib
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from metaperturb.dry_run import NORMALIZATIONS, Watched, watch
from metaperturb.errors import UserError
from metaperturb.perturbation import Slot

PLACES = ("all", "before_pooling", "top", "bottom")  # what `choose_sites` knows
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)


@dataclass(frozen=True)
class SiteSpec:
    """Where a site acts: on the output of `module`, or on the result of the `addition`-th residual sum inside it."""

    name: str
    module: str
    addition: int | None
    channels: int
    size: tuple[int, int]

    def __str__(self) -> str:
        place = "output" if self.addition is None else "residual sum"
        height, width = self.size
        return f"{self.name}: {place}, [{self.channels}, {height}, {width}]"


def find_sites(model: nn.Module, image_size: int, names: Iterable[str] | None = None) -> list[SiteSpec]:
    """The sites that `attach` would choose, in the order in which the network runs them.

    Raises:
        UserError: no site found, unknown or repeated name, a wrapper, or the network does not run on such images,
            makes other sums in training than in evaluation, or runs the module of a site several times a pass.
    """
    if isinstance(model, WRAPPERS) or hasattr(model, "_orig_mod"):
        raise UserError(f"{type(model).__name__} wraps a network; attach to that one, before it is wrapped")
    if type(image_size) is not int or image_size < 1:
        raise UserError(f"image_size: expected the side of the images in pixels, got {image_size!r}")
    seen = watch(model, image_size)
    specs = _slot_sites(model, seen) or _residual_sites(model, seen) or _plain_sites(model, seen)
    if names is not None:
        specs = _named_sites(model, seen, specs, names)
    if not specs:
        raise UserError(
            f"{type(model).__name__}: found no place to perturb (no residual sum of feature maps, no convolution "
            "before an activation); name modules with sites=[…]"
        )
    _check_calls(model, specs, seen)
    _check_sums(model, image_size, specs, seen)
    return specs


def _check_calls(model: nn.Module, specs: list[SiteSpec], seen: Watched) -> None:
    """A site has the statistics of one place.

    Raises:
        UserError: a site's module runs several times a pass.
    """
    for spec in specs:
        if (calls := seen.calls[spec.module]) > 1:
            raise UserError(
                f"{type(model).__name__}: {spec.module!r} runs {calls} times a pass, and a site has the statistics of "
                "one place; give each place a module of its own, or name other modules: sites=[…]"
            )


def _check_sums(model: nn.Module, image_size: int, specs: list[SiteSpec], seen: Watched) -> None:
    """Sums are counted, so those before a site must be the same in training as in the dry run.

    Where layers are left out at random one pass may not show that; the first training step that lacks a sum does.

    Raises:
        UserError: they are not.
    """
    tapped = {spec.module for spec in specs if spec.addition is not None}
    if not tapped:
        return
    try:
        in_training = watch(model, image_size, training=True)
    except UserError as error:  # a network that wants labels in training, say
        warnings.warn(f"{error}; so whether it makes other sums in training is not known", stacklevel=4)
        return
    for name in sorted(tapped):
        found = in_training.sums.get(name, {}).keys()
        if found and found != seen.sums[name].keys():  # none at all: the block is left out in some steps
            raise UserError(
                f"{type(model).__name__}: {name or 'its forward'!r} makes other sums in training than in evaluation, "
                "so that none can be told; put a metaperturb.Slot() where φ belongs, or name other modules: sites=[…]"
            )


def choose_sites(specs: list[SiteSpec], where: str) -> list[SiteSpec]:
    """Those of a network's sites that an ablation leaves (table 3 (b)).

    A stage is a run of consecutive sites with feature maps of one size; so each convolution that does not pad ends one.

    Args:
        specs: as `find_sites` gives them, at least one.
        where: `"all"`; `"bottom"`: the first stage; `"top"`: the last one; `"before_pooling"`: the last site of each
            stage, which the next down-sampling or the final pooling follows.

    Returns:
        at least one of `specs`, in the same order.

    Raises:
        UserError: an unknown word.

    Example:
        >>> model = metaperturb.models.create("resnet20", num_classes=10, image_size=32)
        >>> [spec.name for spec in choose_sites(find_sites(model, 32), "before_pooling")]
        ['layer1.2', 'layer2.2', 'layer3.2']
    """
    if where not in PLACES:
        raise UserError(f"sites {where!r}: unknown place (known: {', '.join(PLACES)})")
    stages = [list(stage) for _, stage in groupby(specs, key=lambda spec: spec.size)]
    if where == "bottom":
        return stages[0]
    if where == "top":
        return stages[-1]
    return [stage[-1] for stage in stages] if where == "before_pooling" else list(specs)


# --- the ways to find them


def _is_map(output: Tensor | None) -> bool:
    return output is not None and output.dim() == 4


def _spec(name: str, module: str, addition: int | None, value: Tensor) -> SiteSpec:
    return SiteSpec(name, module, addition, value.shape[1], (value.shape[2], value.shape[3]))


def _slot_sites(model: nn.Module, seen: Watched) -> list[SiteSpec]:
    slots = [n for n, m in model.named_modules() if isinstance(m, Slot) and n in seen.outputs]
    order = list(seen.calls)
    slots.sort(key=order.index)
    parents = Counter(name.rpartition(".")[0] for name in slots)
    specs = []
    for name in slots:
        parent = name.rpartition(".")[0]
        alone = parent and parents[parent] == 1  # then the block is what one thinks of
        specs.append(_spec(parent if alone else name, name, None, seen.outputs[name]))
    return specs


def _residual_sites(model: nn.Module, seen: Watched) -> list[SiteSpec]:
    modules = dict(model.named_modules())
    blocks = {type(modules[name]) for name in seen.sums if name} - {nn.Sequential}
    specs = []
    for name in seen.calls:
        output = seen.outputs.get(name)
        if name in seen.sums:
            specs += _sum_sites(name, seen)
        elif type(modules[name]) in blocks and _is_map(output) and id(output) not in seen.returned:
            specs.append(_spec(name, name, None, output))
    return specs


def _sum_sites(name: str, seen: Watched) -> list[SiteSpec]:
    sums = seen.sums[name]
    alone = len(sums) == 1 and name
    return [_spec(name if alone else f"{name or 'model'}.sum{i}", name, k, v) for i, (k, v) in enumerate(sums.items())]


def _plain_sites(model: nn.Module, seen: Watched) -> list[SiteSpec]:
    modules = dict(model.named_modules())
    any_norm = any(isinstance(modules[name], NORMALIZATIONS) for name in seen.outputs)
    layers = [name for name in seen.outputs if isinstance(modules[name], nn.Conv2d | nn.Linear)]
    specs = []
    for name, output in seen.outputs.items():
        if not _is_map(output) or name in seen.weights or id(output) in seen.returned:
            continue
        if name in layers[-1:]:  # the classifier
            continue
        is_norm = isinstance(modules[name], NORMALIZATIONS)
        is_conv = isinstance(modules[name], nn.Conv2d) and id(output) not in seen.normalized
        if is_norm or (is_conv and (not any_norm or id(output) in seen.activated)):
            specs.append(_spec(name, name, None, output))
    return specs


def _named_sites(model: nn.Module, seen: Watched, found: list[SiteSpec], names: Iterable[str]) -> list[SiteSpec]:
    names = [names] if isinstance(names, str) else list(names)
    known = {spec.name: spec for spec in found}
    specs = []
    for name in names:
        if name in known:
            specs.append(known[name])
        elif name in seen.sums:
            specs += _sum_sites(name, seen)
        elif _is_map(seen.outputs.get(name)):
            specs.append(_spec(name, name, None, seen.outputs[name]))
        else:
            candidates = [*known, *(n for n, v in seen.outputs.items() if n and _is_map(v)), *PLACES]
            near = ", ".join(difflib.get_close_matches(name, candidates, n=3)) or ", ".join(candidates[:3])
            raise UserError(
                f"sites: {name!r} is neither a place nor a module of {type(model).__name__} with a feature map "
                f"(near: {near}; places: {', '.join(PLACES)})"
            )
    if not specs or len(set(specs)) < len(specs):
        raise UserError(f"sites {names}: name at least one site, and none twice")
    order = list(seen.calls)
    return sorted(specs, key=lambda spec: (order.index(spec.module), spec.addition or 0))
