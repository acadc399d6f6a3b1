"""Putting φ, or other modules, into any CNN and out of it; `metaperturb.sites` says where they act.

The network's code is not changed. Hooks hand the outputs of modules to their sites. Additions are no modules, so the
forward pass of a block with one runs under a `TorchFunctionMode` that passes the sum on to the site.
"""

import copyreg
import functools
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metaperturb.dry_run import summed_maps
from metaperturb.errors import UserError
from metaperturb.perturbation import CLIP, MetaPerturb, PerturbSite, UsesPhi
from metaperturb.sites import PLACES, SiteSpec, choose_sites, find_sites

# What methods add to a network: its children of these names.
PERTURBATION, REGULARIZER = "metaperturb", "regularizer"


class Sites(nn.Module):
    """Modules that act at the sites of one network, as a child of it (see `place`).

    Args:
        specs: the sites, as `find_sites` gives them.
        modules: one a site: feature map `[B, C, H, W]` → the same shape.
    """

    def __init__(self, specs: list[SiteSpec], modules: list[nn.Module]) -> None:
        super().__init__()
        if repeated := [name for name, count in Counter(spec.name for spec in specs).items() if count > 1]:
            raise ValueError(f"several sites are called {repeated[0]!r}")
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
            there = {module for module in model.modules() if _acting(module)}
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


class Attachment(UsesPhi, Sites):
    """The perturbation's sites in one network, as its last child, `metaperturb`.

    `strength`, `clip` and `clip_eval` set those of all sites. The state dict holds the running statistics of every
    site, the 82 values of φ, the strength and what evaluation clips at, so that a reloaded network evaluates
    identically: loading it sets them.

    Raises:
        UserError: a state dict is loaded that was saved with other `noise` or `gate`.
    """

    def __init__(self, phi: MetaPerturb, specs: list[SiteSpec], sites: list[PerturbSite]) -> None:
        super().__init__(specs, sites)
        self._phi = (phi,)

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

    @property
    def clip_eval(self) -> bool:
        return self.sites[0].clip_eval

    @clip_eval.setter
    def clip_eval(self, value: bool) -> None:
        for site in self.sites:
            site.clip_eval = value

    def get_extra_state(self) -> Tensor:
        """φ, strength, noise, gate and, if evaluation clips, its bound: `[85]` or `[86]`, in the dtype of φ."""
        site = self.sites[0]
        usage = [site.strength, site.noise, site.gate, *([site.clip] if site.clip_eval and site.clip else [])]
        values = [p.detach().reshape(-1) for p in self.phi.parameters()]
        return torch.cat([*values, values[0].new_tensor(usage)])

    def set_extra_state(self, state: Tensor) -> None:
        parameters = list(self.phi.parameters())
        sizes = [p.numel() for p in parameters]
        *values, usage = state.split([*sizes, len(state) - sum(sizes)])
        if len(usage):  # else it was saved when φ alone was
            strength, noise, gate, *bound = usage.tolist()
            for name, saved in (("noise", bool(noise)), ("gate", bool(gate))):
                if (own := getattr(self.sites[0], name)) != saved:
                    raise UserError(f"this state was saved with {name}={saved}, the network was attached with {own}")
            self.strength = strength
            self.clip_eval = bool(bound)
            self.clip = bound[0] if bound else self.clip
        if parameters[0].is_meta:
            raise UserError("φ is on the meta device and takes no values: model.to_empty(device=…) before loading")
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
    clip_eval: bool = False,
    verbose: bool = True,
) -> nn.Module:
    """Put φ into `model`, in place, and return the model.

    Args:
        model: any CNN that maps images `[B, C, S, S]` to logits.
        phi: the shared φ.
        image_size: S in pixels; also the normalizer of the layer's size.
        sites: default: all that are found as `metaperturb.sites` describes (`find_sites` lists them).
            `"before_pooling"`, `"top"` or `"bottom"`: those that `choose_sites` leaves of them. A list: names of
            modules to perturb (their residual sum, else their output).
        noise, gate: see `PerturbSite`.
        clip: upper bound in training, or None.
        clip_eval: clip in evaluation, too, which the paper does not: for networks whose outputs overflow there.
        verbose: say on stderr, in one line, which sites were chosen (`print(model.metaperturb)` shows all).

    The channels of a layer are normalized by those of the widest one that is listed or, where a word chooses among the
    found ones, the widest found: a site computes the same whether or not the others are there.

    Raises:
        UserError: φ is no `MetaPerturb`, already attached, or left with neither `noise` nor `gate`; the network is a
            wrapper (of DistributedDataParallel, `torch.compile` and the like) or has a `metaperturb` of its own; and
            what `find_sites` raises.

    Example:
        >>> import torchvision
        >>> model = attach(torchvision.models.resnet18(num_classes=10), MetaPerturb(), image_size=64, verbose=False)
        >>> len(model.metaperturb.sites)
        8
    """
    if not isinstance(phi, MetaPerturb):
        raise UserError(f"phi: expected a MetaPerturb, as load_phi(…) gives one, got {type(phi).__name__}")
    if not (noise or gate):
        raise UserError("noise=False and gate=False leave nothing of φ; choose one of the two")
    if clip_eval and clip is None:
        raise UserError("clip_eval=True needs a clip")
    if any(isinstance(m, Attachment) or any(isinstance(s, PerturbSite) for s in _acting(m)) for m in model.modules()):
        raise UserError("this network has a perturbation attached already (detach(model) removes it)")
    if sites is None or sites in PLACES:
        found = find_sites(model, image_size)
        specs = choose_sites(found, sites or "all")
    else:
        found = specs = find_sites(model, image_size, sites)
    widest = max(spec.channels for spec in found)
    made = [PerturbSite(phi, s.channels, widest, image_size, noise=noise, gate=gate) for s in specs]
    attachment = Attachment(phi, specs, made)
    attachment.clip, attachment.clip_eval = clip, clip_eval
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
        UserError: the network has something of this name already, or the `forward` of a block with a sum was replaced
            on the block itself and not in its class.
    """
    if hasattr(model, name):
        raise UserError(f"{type(model).__name__} has a {name!r} of its own; rename that")
    parameter = next(model.parameters(), None)
    sites.train(model.training)
    if parameter is not None:
        sites.to(parameter.device)
    modules = dict(model.named_modules())
    hosts = [modules[spec.module] for spec in sites.specs]
    for spec, host in zip(sites.specs, hosts, strict=True):
        if spec.addition is not None and "forward" in vars(host):
            raise UserError(
                f"{type(model).__name__}: the forward of {spec.module!r} was replaced, by torch.compile(….forward) or "
                "the like, so that its sums cannot be reached; attach before that"
            )
    for spec, site, host in zip(sites.specs, sites.sites, hosts, strict=True):
        if spec.addition is None:
            host.register_forward_hook(_OutputHook(site))
        else:
            _tap(host).setdefault(spec.addition, []).append(site)
    setattr(model, name, sites)
    sites._placed = (model, hosts)
    if verbose:
        count = f"{len(sites.specs)} site{'s' * (len(sites.specs) > 1)}"
        print(f"{name}: {count} in {type(model).__name__}: {_summary(sites.specs)}", file=sys.stderr)


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach` and `place`, in place, and return the model. A network without sites is returned as it is.

    The weights stay. Those that were trained with the sites need them to predict, too: this gives φ up, for training
    without it.

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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A tapped class is none of the user's, whose classes may count or register their subclasses."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        _check_replica(self)
        if any(isinstance(value, torch.fx.Proxy) for value in (*args, *kwargs.values())):
            raise UserError("torch.fx would trace the network without φ: trace it first, and attach to what comes out")
        mode = _TapMode(self._metaperturb_tap)
        with mode:
            output = super().forward(*args, **kwargs)
        if 0 < mode.count <= max(mode.sites, default=0):  # none at all: a block that is left out in this step
            raise UserError(
                f"{type(self).__name__}: {mode.count} sums in this pass, but φ acts on sum {max(mode.sites) + 1}: "
                "which is which cannot be told; put a metaperturb.Slot() there, or name other modules: sites=[…]"
            )
        return output

    def __reduce_ex__(self, protocol: int) -> Any:
        """So that it can be pickled and copied, though its class is made at run time."""
        make, arguments, *state = super().__reduce_ex__(protocol)
        if make is copyreg.__newobj__:
            make, arguments = _new_tapped, (self._untapped, *arguments[1:])
        return make, arguments, *state


def _refuse_copies(self: _Tapped, *arguments: Any) -> None:
    raise UserError("a network made by torch.fx cannot be copied or pickled while φ acts on its sums: detach it first")


@functools.cache
def _tapped_class(untapped: type[nn.Module]) -> type[_Tapped]:
    members = {"__module__": untapped.__module__, "__qualname__": untapped.__qualname__, "__doc__": untapped.__doc__}
    if issubclass(untapped, torch.fx.GraphModule):  # it writes its class anew when it is copied
        members |= {"__deepcopy__": _refuse_copies, "__reduce_ex__": _refuse_copies}
    return type(untapped.__name__, (_Tapped, untapped), {**members, "_untapped": untapped})


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


def _acting(module: nn.Module) -> list[nn.Module]:
    """The sites that act on its sums or its output."""
    tap = module._metaperturb_tap if isinstance(module, _Tapped) else {}
    hooks = [hook for hook in module._forward_hooks.values() if isinstance(hook, _OutputHook)]
    return [*(site for sites in tap.values() for site in sites), *(hook.site for hook in hooks)]
