"""Putting φ, or other modules, into any CNN: finding the sites, attaching and detaching them.

Where the sites are (section 3.2, figure 3, and the authors' code), in this order of preference:

1. the network's own `Slot`s (the zoo);
2. residual networks: every block, after the addition (the last of a + b + x); a block of the same class without an
   addition (a strided one of MobileNet, say): its output;
3. plain networks: every convolution, after its normalization if it has one, before the activation. In a network that
   normalizes before it convolves (DenseNet) that is the output of every normalization.

Maps of one pixel that weight the channels of larger ones (attention) are no feature maps, nor are [B, H, W, C].

The network's code is not changed. A dry run on zeros watches which modules and functions are called; hooks do the rest.
Additions are no modules, so the forward pass of a block with one runs under a `TorchFunctionMode` that passes the sum
on to the site.
"""

import copyreg
import difflib
import functools
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metaperturb.dry_run import NORMALIZATIONS, Watched, summed_maps, watch
from metaperturb.errors import UserError
from metaperturb.perturbation import CLIP, MetaPerturb, PerturbSite, Slot

# What methods add to a network: its children of these names.
PERTURBATION, REGULARIZER = "metaperturb", "regularizer"
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


class Sites(nn.Module):
    """Modules that act at the sites of one network, as a child of it (see `place`).

    Args:
        specs: the sites, as `find_sites` gives them.
        modules: one a site: feature map `[B, C, H, W]` → the same shape.
    """

    def __init__(self, specs: list[SiteSpec], modules: list[nn.Module]) -> None:
        super().__init__()
        self.specs = specs
        for spec, module in zip(specs, modules, strict=True):
            # Child names may not hold "."; the "/" in front keeps them apart from our own attributes.
            self.add_module("/" + spec.name.replace(".", "/"), module)
        self._placed: tuple[nn.Module, list[nn.Module]] | None = None  # the network, and the modules that run the sites

    def forward(self, x: Any) -> Any:
        """The identity: a network that is an `nn.Sequential` runs its children, and this is one."""
        return x

    def train(self, mode: bool = True) -> "Sites":
        """As of any module, and a check: a module that was replaced after `place` no longer runs its site.

        Raises:
            UserError: there is one.
        """
        if self._placed is not None:
            model, hosts = self._placed
            there = {module for module in model.modules() if _acts(module)}
            lost = [spec.module for spec, host in zip(self.specs, hosts, strict=True) if host not in there]
            if lost:
                raise UserError(
                    f"{type(model).__name__}: {lost[0]!r} ({len(lost)} in all) was replaced after attach, and is not "
                    "perturbed; detach(model), and attach after such changes"
                )
        return super().train(mode)

    @property
    def sites(self) -> list[nn.Module]:
        return list(self.children())

    @property
    def strength(self) -> float:
        return self.sites[0].strength

    @strength.setter
    def strength(self, value: float) -> None:
        for site in self.sites:
            site.strength = value

    def extra_repr(self) -> str:
        return "\n".join(map(str, self.specs))


class Attachment(Sites):
    """The perturbation's sites in one network, as its last child, `metaperturb`.

    `strength` and `clip` set those of all sites. The state dict holds the running statistics of every site, the 82
    values of φ and the strength, so that a reloaded network evaluates identically: loading it sets both.

    Raises:
        UserError: a state dict is loaded that was saved with other `noise` or `gate`.
    """

    def __init__(self, phi: MetaPerturb, specs: list[SiteSpec], sites: list[PerturbSite]) -> None:
        super().__init__(specs, sites)
        self._phi = (phi,)  # not a child: φ is not among the network's parameters

    @property
    def phi(self) -> MetaPerturb:
        return self._phi[0]

    @property
    def noise(self) -> bool:
        """Whether the sites multiply by z; a choice of `attach`, not to be set here."""
        return self.sites[0].noise

    @property
    def gate(self) -> bool:
        """Whether the sites multiply by s; likewise."""
        return self.sites[0].gate

    @property
    def clip(self) -> float | None:
        return self.sites[0].clip

    @clip.setter
    def clip(self, value: float | None) -> None:
        for site in self.sites:
            site.clip = value

    def get_extra_state(self) -> Tensor:
        """φ, strength, noise and gate: `[85]`, in the dtype of φ, in which sites compute."""
        site = self.sites[0]
        values = [p.detach().reshape(-1) for p in self.phi.parameters()]
        return torch.cat([*values, values[0].new_tensor([site.strength, site.noise, site.gate])])

    def set_extra_state(self, state: Tensor) -> None:
        parameters = list(self.phi.parameters())
        sizes = [p.numel() for p in parameters]
        *values, usage = state.split([*sizes, len(state) - sum(sizes)])
        if len(usage):  # else it was saved when φ alone was
            strength, noise, gate = usage.tolist()
            for name, saved in (("noise", bool(noise)), ("gate", bool(gate))):
                if (own := getattr(self.sites[0], name)) != saved:
                    raise UserError(f"this state was saved with {name}={saved}, the network was attached with {own}")
            self.strength = strength
        with torch.no_grad():
            for p, saved in zip(parameters, values, strict=True):
                p.copy_(saved.view_as(p))


def attach(
    model: nn.Module,
    phi: MetaPerturb,
    image_size: int,
    sites: str | Iterable[str] | None = None,
    *,
    noise: bool = True,
    gate: bool = True,
    clip: float | None = CLIP,
    verbose: bool = True,
) -> nn.Module:
    """Put φ into `model`, in place, and return the model.

    Args:
        model: any CNN that maps images `[B, C, S, S]` to logits.
        phi: the shared φ.
        image_size: S in pixels; also the normalizer of the layer's size.
        sites: default: all that are found as this module describes (`find_sites` lists them). `"before_pooling"`,
            `"top"` or `"bottom"`: those that `choose_sites` leaves of them. A list: names of modules to perturb (their
            residual sum, else their output).
        noise, gate: see `PerturbSite`.
        clip: upper bound in training, or None.
        verbose: say on stderr, in one line, which sites were chosen (`print(model.metaperturb)` shows all).

    The channels of a layer are normalized by those of the widest one that is listed or, where a word chooses among the
    found ones, the widest found: a site computes the same whether or not the others are there.

    Raises:
        UserError: φ is none, already attached, a wrapper (of DistributedDataParallel, `torch.compile` and the like), a
            module of the network's own is called `metaperturb`, no site found, unknown site name, or the network does
            not run on such images, or makes other sums in training than in evaluation.

    Example:
        >>> import torchvision
        >>> model = attach(torchvision.models.resnet18(num_classes=10), MetaPerturb(), image_size=64, verbose=False)
        >>> len(model.metaperturb.sites)
        8
    """
    if not isinstance(phi, MetaPerturb):
        raise UserError(f"phi: expected a MetaPerturb, as load_phi(…) gives one, got {type(phi).__name__}")
    if any(isinstance(module, Attachment) for module in model.modules()):
        raise UserError("this network has a perturbation attached already (detach(model) removes it)")
    if sites is None or sites in PLACES:
        found = find_sites(model, image_size)
        specs = choose_sites(found, sites or "all")
    else:
        found = specs = find_sites(model, image_size, sites)
    widest = max(spec.channels for spec in found)
    made = [PerturbSite(phi, s.channels, widest, image_size, noise=noise, gate=gate) for s in specs]
    attachment = Attachment(phi, specs, made)
    attachment.clip = clip
    place(model, attachment, PERTURBATION, verbose=verbose)
    return model


def place(model: nn.Module, sites: Sites, name: str, *, verbose: bool = True) -> None:
    """Let modules act at sites of `model`, in place: what `attach` does for φ, for any modules. `detach` undoes it.

    Args:
        model: the network that `find_sites` found the sites in.
        sites: takes the network's mode and device and becomes its child `name`, so that the modules' parameters and
            buffers are among the network's.
        name: of this child.
        verbose: say on stderr, in one line, where the sites are.

    Raises:
        UserError: the network has something of this name already.
    """
    if hasattr(model, name):
        raise UserError(f"{type(model).__name__} has a {name!r} of its own; rename that")
    parameter = next(model.parameters(), None)
    sites.train(model.training)
    if parameter is not None:
        sites.to(parameter.device)
    modules = dict(model.named_modules())
    hosts = [modules[spec.module] for spec in sites.specs]
    for spec, site, host in zip(sites.specs, sites.sites, hosts, strict=True):
        if spec.addition is None:
            host.register_forward_hook(_OutputHook(site))
        else:
            _tap(host).setdefault(spec.addition, []).append(site)
    setattr(model, name, sites)
    sites._placed = (model, hosts)
    if verbose:
        print(f"{name}: {len(sites.specs)} sites in {type(model).__name__}: {_summary(sites.specs)}", file=sys.stderr)


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach` and `place`, in place, and return the model. A network without sites is returned as it is.

    Of a wrapper (of DistributedDataParallel, `torch.compile` and the like) the network inside is meant.
    """
    modules = list(model.modules())
    owners = [(m, name) for m in modules for name, child in m.named_children() if isinstance(child, Sites)]
    if not owners:  # a part of a network, say: its sites are not its own
        return model
    for owner, name in owners:
        delattr(owner, name)
    for module in modules:
        _untap(module)
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, _OutputHook)]:
            del module._forward_hooks[key]
    return model


def find_sites(model: nn.Module, image_size: int, names: Iterable[str] | None = None) -> list[SiteSpec]:
    """The sites that `attach` would choose, in the order in which the network runs them.

    Raises:
        UserError: no site found, unknown or repeated name, a wrapper, or the network does not run on such images, or
            makes other sums in training than in evaluation.
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
    _check_sums(model, image_size, specs, seen)
    return specs


def _check_sums(model: nn.Module, image_size: int, specs: list[SiteSpec], seen: Watched) -> None:
    """Sums are counted, so those before a site must be the same in training as in the dry run.

    Raises:
        UserError: they are not.
    """
    tapped = {spec.module for spec in specs if spec.addition is not None}
    if not tapped:
        return
    try:
        in_training = watch(model, image_size, training=True)
    except UserError:  # a network that wants labels in training, say: nothing can be known of its sums there
        return
    for name in sorted(tapped):
        if seen.sums[name].keys() != in_training.sums.get(name, {}).keys():
            raise UserError(
                f"{type(model).__name__}: {name or 'its forward'!r} makes other sums in training than in evaluation, "
                "so that none can be told; put a metaperturb.Slot() where φ belongs, or name other modules: sites=[…]"
            )


def choose_sites(specs: list[SiteSpec], where: str) -> list[SiteSpec]:
    """Those of a network's sites that an ablation leaves (table 3 (b)).

    A stage is a run of consecutive sites with feature maps of one size.

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


# --- choosing


def _spec(name: str, module: str, addition: int | None, value: Tensor) -> SiteSpec:
    return SiteSpec(name, module, addition, value.shape[1], (value.shape[2], value.shape[3]))


def _slot_sites(model: nn.Module, seen: Watched) -> list[SiteSpec]:
    slots = [n for n, m in model.named_modules() if isinstance(m, Slot) and n in seen.outputs]
    order = list(seen.outputs)
    slots.sort(key=order.index)
    return [_spec(n.rpartition(".")[0] or n, n, None, seen.outputs[n]) for n in slots]


def _residual_sites(model: nn.Module, seen: Watched) -> list[SiteSpec]:
    modules = dict(model.named_modules())
    blocks = {type(modules[name]) for name in seen.sums if name} - {nn.Sequential}
    specs = []
    for name, output in seen.outputs.items():
        if name in seen.sums:
            specs += _sum_sites(name, seen)
        elif type(modules[name]) in blocks and output.dim() == 4:
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
        if output.dim() != 4 or name in layers[-1:] or name in seen.weights:  # the last layer is the classifier
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
        elif name in seen.outputs and seen.outputs[name].dim() == 4:
            specs.append(_spec(name, name, None, seen.outputs[name]))
        else:
            candidates = [*known, *(n for n, v in seen.outputs.items() if n and v.dim() == 4)]
            near = ", ".join(difflib.get_close_matches(name, candidates, n=3)) or ", ".join(candidates[:3])
            raise UserError(
                f"site {name!r}: no module of {type(model).__name__} with a feature map has this name (near: {near})"
            )
    if not specs or len(set(specs)) < len(specs):
        raise UserError(f"sites {names}: name at least one site, and none twice")
    order = list(seen.outputs)
    return sorted(specs, key=lambda spec: (order.index(spec.module), spec.addition or 0))


def _summary(specs: list[SiteSpec]) -> str:
    shown = [spec.name for spec in specs]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:5], "…", *shown[-5:]])


# --- acting. Hooks are objects that refer to their site, not closures: a deep copy of the network gets its own sites.

# A site adds feature maps itself; the tap of an enclosing block must not count those sums.
_local = threading.local()


def _act(site: nn.Module, h: Tensor) -> Tensor:
    _local.inside = True
    try:
        return site(h)
    finally:
        _local.inside = False


def _in_checkpoint() -> bool:
    """Whether a running block calls us from within activation checkpointing, which runs its part again without us."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not _Tapped.forward.__code__:
        if frame.f_globals.get("__name__") == torch.utils.checkpoint.__name__:
            return True
        frame = frame.f_back
    return False


def _check_replica(module: nn.Module) -> None:
    if getattr(module, "_is_replica", False):
        raise UserError("nn.DataParallel: its replicas would share the sites of one GPU; use DistributedDataParallel")


class _OutputHook:
    def __init__(self, site: nn.Module) -> None:
        self.site = site

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        _check_replica(module)
        return _act(self.site, output)


class _TapMode(TorchFunctionMode):
    """Passes the sums of a block on to their sites: index of the sum → sites, one after the other."""

    def __init__(self, sites: Mapping[int, list[nn.Module]]) -> None:
        super().__init__()
        self.sites, self.count = sites, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if getattr(_local, "inside", False) or not summed_maps(func, args, kwargs, out):
            return out
        sites = self.sites.get(self.count, ())
        self.count += 1
        if not sites:
            return out
        if not torch.compiler.is_compiling() and _in_checkpoint():
            raise UserError(
                "torch.utils.checkpoint of a part of a residual block: its backward pass would run that part without "
                "the perturbation; checkpoint whole blocks"
            )
        h = out.clone() if func is torch.Tensor.add_ else out
        for site in sites:
            h = _act(site, h)
        # add_ is maybe a statement, whose value nobody takes: the sum itself must change
        return out.copy_(h) if func is torch.Tensor.add_ else h


class _Tapped(nn.Module):
    """Mixed into the class of a block that has sites on its sums.

    Its forward pass runs under a `_TapMode` in a `with`, not between two hooks: PyTorch runs no hook after a
    KeyboardInterrupt, and a mode that stayed would perturb the additions of whatever runs next.
    """

    _untapped: type[nn.Module]
    _metaperturb_tap: Mapping[int, list[nn.Module]] = MappingProxyType({})  # a block made later from its class has none

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        _check_replica(self)
        with _TapMode(self._metaperturb_tap):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: int) -> Any:
        """So that it can be pickled and copied, though its class is made at run time."""
        make, arguments, *state = super().__reduce_ex__(protocol)
        if make is copyreg.__newobj__:
            make, arguments = _new_tapped, (self._untapped, *arguments[1:])
        return make, arguments, *state


@functools.cache
def _tapped_class(untapped: type[nn.Module]) -> type[_Tapped]:
    same = {"__module__": untapped.__module__, "__qualname__": untapped.__qualname__, "__doc__": untapped.__doc__}
    return type(untapped.__name__, (_Tapped, untapped), {**same, "_untapped": untapped})


def _new_tapped(untapped: type[nn.Module], *arguments: Any) -> _Tapped:
    cls = _tapped_class(untapped)
    return cls.__new__(cls, *arguments)


def _tap(module: nn.Module) -> dict[int, list[nn.Module]]:
    """Of the sums of a block the sites that act on them."""
    if not isinstance(module, _Tapped):
        module.__class__ = _tapped_class(type(module))
    return vars(module).setdefault("_metaperturb_tap", {})


def _untap(module: nn.Module) -> None:
    if isinstance(module, _Tapped):
        module.__class__ = module._untapped
        vars(module).pop("_metaperturb_tap", None)


def _acts(module: nn.Module) -> bool:
    """Whether sites act on its sums or its output."""
    tapped = isinstance(module, _Tapped) and bool(module._metaperturb_tap)
    return tapped or any(isinstance(hook, _OutputHook) for hook in module._forward_hooks.values())
