"""Putting φ, or other modules, into any CNN: finding the sites, attaching and detaching them.

Where the sites are (section 3.2, figure 3, and the authors' code), in this order of preference:

1. the network's own `Slot`s (the zoo);
2. residual networks: every block, after the addition; a block of the same class without an addition (a strided one of
   MobileNet, say): its output;
3. plain networks: every convolution, after its normalization if it has one, before the activation. In a network that
   normalizes before it convolves (DenseNet) that is the output of every normalization.

The network's code is not changed. A dry run on zeros watches which modules and functions are called; hooks do the rest.
Additions are no modules, so a block with one is run under a `TorchFunctionMode` that passes the sum on to the site.
"""

import difflib
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metaperturb.errors import UserError
from metaperturb.modes import eval_mode
from metaperturb.perturbation import CLIP, MetaPerturb, PerturbSite, Slot

ADDITIONS = {
    torch.add,
    torch.Tensor.add,
    torch.Tensor.add_,
    torch.Tensor.__add__,
    torch.Tensor.__iadd__,
    torch.Tensor.__radd__,
}
ACTIVATIONS = {
    *(
        "relu",
        "relu_",
        "relu6",
        "hardtanh",
        "hardtanh_",
        "leaky_relu",
        "leaky_relu_",
        "elu",
        "elu_",
        "selu",
        "celu",
    ),
    *("gelu", "silu", "hardswish", "mish", "prelu", "rrelu", "softplus", "tanh"),
}
NORMALIZATIONS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)


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

    def forward(self, x: Any) -> Any:
        """The identity: a network that is an `nn.Sequential` runs its children, and this is one."""
        return x

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

    `strength` and `clip` set those of all sites. The state dict holds the running statistics of every site and the 82
    values of φ, so that a reloaded network evaluates identically; loading it sets φ to the saved values.
    """

    def __init__(self, phi: MetaPerturb, specs: list[SiteSpec], sites: list[PerturbSite]) -> None:
        super().__init__(specs, sites)
        self._phi = (phi,)  # not a child: φ is not among the network's parameters

    @property
    def phi(self) -> MetaPerturb:
        return self._phi[0]

    @property
    def clip(self) -> float | None:
        return self.sites[0].clip

    @clip.setter
    def clip(self, value: float | None) -> None:
        for site in self.sites:
            site.clip = value

    def get_extra_state(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.phi.parameters()])

    def set_extra_state(self, state: Tensor) -> None:
        parameters = list(self.phi.parameters())
        with torch.no_grad():
            for p, values in zip(parameters, state.split([p.numel() for p in parameters]), strict=True):
                p.copy_(values.view_as(p))


def attach(
    model: nn.Module,
    phi: MetaPerturb,
    image_size: int,
    sites: Iterable[str] | None = None,
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
        sites: names of modules to perturb (their residual sum, else their output); default: found as the module
            describes. `find_sites` lists them.
        noise, gate: see `PerturbSite`.
        clip: upper bound in training, or None.
        verbose: say on stderr, in one line, which sites were chosen (`print(model.metaperturb)` shows all).

    Raises:
        UserError: already attached, no site found, unknown site name, or the network does not run on such images.

    Example:
        >>> import torchvision
        >>> model = attach(torchvision.models.resnet18(num_classes=10), MetaPerturb(), image_size=64, verbose=False)
        >>> len(model.metaperturb.sites)
        8
    """
    if isinstance(getattr(model, "metaperturb", None), Attachment):
        raise UserError("this network has a perturbation attached already (detach(model) removes it)")
    specs = find_sites(model, image_size, sites)
    widest = max(spec.channels for spec in specs)
    made = [PerturbSite(phi, s.channels, widest, image_size, noise=noise, gate=gate) for s in specs]
    attachment = Attachment(phi, specs, made)
    attachment.clip = clip
    place(model, attachment, "metaperturb", verbose=verbose)
    return model


def place(model: nn.Module, sites: Sites, name: str, *, verbose: bool = True) -> None:
    """Let modules act at sites of `model`, in place: what `attach` does for φ, for any modules. `detach` undoes it.

    Args:
        model: the network that `find_sites` found the sites in.
        sites: takes the network's mode and device and becomes its child `name`, so that the modules' parameters and
            buffers are among the network's.
        name: unused in the network so far.
        verbose: say on stderr, in one line, where the sites are.
    """
    parameter = next(model.parameters(), None)
    sites.train(model.training)
    if parameter is not None:
        sites.to(parameter.device)
    modules = dict(model.named_modules())
    taps: dict[str, _Tap] = {}
    for spec, site in zip(sites.specs, sites.sites, strict=True):
        if spec.addition is None:
            modules[spec.module].register_forward_hook(_OutputHook(site))
        else:
            taps.setdefault(spec.module, _Tap()).sites[spec.addition] = site
    for module, tap in taps.items():
        modules[module].register_forward_pre_hook(_EnterTap(tap))
        modules[module].register_forward_hook(_LeaveTap(tap), always_call=True)
    setattr(model, name, sites)
    if verbose:
        print(f"{name}: {len(sites.specs)} sites in {type(model).__name__}: {_summary(sites.specs)}", file=sys.stderr)


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach` and `place`, in place, and return the model. A network without sites is returned as it is."""
    names = [name for name, child in model.named_children() if isinstance(child, Sites)]
    if not names:
        return model
    for name in names:
        delattr(model, name)
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
    return model


def find_sites(model: nn.Module, image_size: int, names: Iterable[str] | None = None) -> list[SiteSpec]:
    """The sites that `attach` would choose, in the order in which the network runs them.

    Raises:
        UserError: no site found, unknown or repeated name, or the network does not run on such images.
    """
    seen = _watch(model, image_size)
    found = _slot_sites(model, seen) or _residual_sites(model, seen) or _plain_sites(model, seen)
    if names is None:
        if not found:
            raise UserError(
                f"{type(model).__name__}: found no place to perturb (no residual sum of feature maps, no convolution "
                "before an activation); name modules with sites=[…]"
            )
        return found
    return _named_sites(model, seen, found, names)


# --- the dry run


@dataclass
class _Watched:
    """What the dry run saw. Tensors are kept, so that their identities stay unique."""

    outputs: dict[str, Tensor] = field(default_factory=dict)  # module → its last output, in order of completion
    sums: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # module → index of sum → value, innermost only
    activated: set[int] = field(default_factory=set)  # identities of tensors that an activation received
    normalized: set[int] = field(default_factory=set)  # … that a normalization received
    kept: list[Any] = field(default_factory=list)


class _Watcher(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = _Watched()
        self.stack: list[list] = []  # [module name, residual sums so far inside this call]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ACTIVATIONS and args and isinstance(args[0], Tensor):
            self.seen.activated.add(id(args[0]))
        out = func(*args, **(kwargs or {}))
        operands = _summed_maps(func, args, kwargs, out)
        if operands:
            name, index = self.stack[-1]
            if operands[0].shape == operands[1].shape:
                self.seen.sums.setdefault(name, {})[index] = out
            for call in self.stack:
                call[1] += 1
        self.seen.kept.append((args, out))
        return out


def _watch(model: nn.Module, image_size: int) -> _Watched:
    """Run the network once on zeros and note what happens."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    if not convolutions:
        raise UserError(f"{type(model).__name__}: has no nn.Conv2d; the perturbation acts on feature maps of CNNs")
    # Which convolution sees the image is not known before the network has run; mostly the one declared first.
    candidates = dict.fromkeys([convolutions[0].in_channels, 3, *(m.in_channels for m in convolutions)])
    failure: Exception | None = None
    for channels in candidates:
        watcher = _Watcher()
        image = convolutions[0].weight.new_zeros(2, channels, image_size, image_size)
        try:
            _dry_run(model, image, watcher)
            return watcher.seen
        except Exception as error:
            failure = failure or error
    cause = str(failure).strip().split("\n")[0]
    raise UserError(
        f"{type(model).__name__}: does not run on images [2, {next(iter(candidates))}, {image_size}, {image_size}] "
        f"({cause}); is image_size right?"
    ) from failure


def _dry_run(model: nn.Module, image: Tensor, watcher: _Watcher) -> None:
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: tuple) -> None:
        watcher.stack.append([names[module], 0])
        if args and isinstance(args[0], Tensor) and isinstance(module, NORMALIZATIONS):
            watcher.seen.normalized.add(id(args[0]))

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        watcher.stack.pop()
        watcher.seen.outputs.pop(names[module], None)
        if isinstance(output, Tensor):
            watcher.seen.outputs[names[module]] = output

    handles = []
    for module in model.modules():
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        devices = [image.device] if image.is_cuda else []
        with eval_mode(model), torch.random.fork_rng(devices), torch.no_grad(), watcher:
            model(image)
    finally:
        for handle in handles:
            handle.remove()


def _summed_maps(func: Any, args: tuple, kwargs: dict | None, out: Any) -> tuple[Tensor, Tensor] | None:
    """The operands, if this call adds two tensors to a feature map.

    Whether their shapes are equal (a residual sum) or one is broadcast (a bias, a position) is for the dry run to say:
    there the batch has two images, while a later batch of one may make a broadcast look like a residual sum.
    """
    if func not in ADDITIONS or not isinstance(out, Tensor) or out.dim() != 4:
        return None
    named = kwargs or {}
    operands = (*args, *(named[key] for key in ("input", "other") if key in named))
    return operands[:2] if len(operands) >= 2 and all(isinstance(o, Tensor) for o in operands[:2]) else None


# --- choosing


def _spec(name: str, module: str, addition: int | None, value: Tensor) -> SiteSpec:
    return SiteSpec(name, module, addition, value.shape[1], (value.shape[2], value.shape[3]))


def _slot_sites(model: nn.Module, seen: _Watched) -> list[SiteSpec]:
    slots = [n for n, m in model.named_modules() if isinstance(m, Slot) and n in seen.outputs]
    order = list(seen.outputs)
    slots.sort(key=order.index)
    return [_spec(n.rpartition(".")[0] or n, n, None, seen.outputs[n]) for n in slots]


def _residual_sites(model: nn.Module, seen: _Watched) -> list[SiteSpec]:
    modules = dict(model.named_modules())
    blocks = {type(modules[name]) for name in seen.sums if name} - {nn.Sequential}
    specs = []
    for name, output in seen.outputs.items():
        if name in seen.sums:
            specs += _sum_sites(name, seen)
        elif type(modules[name]) in blocks and output.dim() == 4:
            specs.append(_spec(name, name, None, output))
    return specs


def _sum_sites(name: str, seen: _Watched) -> list[SiteSpec]:
    sums = seen.sums[name]
    alone = len(sums) == 1 and name
    return [_spec(name if alone else f"{name or 'model'}.sum{i}", name, k, v) for i, (k, v) in enumerate(sums.items())]


def _plain_sites(model: nn.Module, seen: _Watched) -> list[SiteSpec]:
    modules = dict(model.named_modules())
    any_norm = any(isinstance(modules[name], NORMALIZATIONS) for name in seen.outputs)
    layers = [name for name in seen.outputs if isinstance(modules[name], nn.Conv2d | nn.Linear)]
    specs = []
    for name, output in seen.outputs.items():
        if output.dim() != 4 or name in layers[-1:]:  # the last layer is the classifier
            continue
        is_norm = isinstance(modules[name], NORMALIZATIONS)
        is_conv = isinstance(modules[name], nn.Conv2d) and id(output) not in seen.normalized
        if is_norm or (is_conv and (not any_norm or id(output) in seen.activated)):
            specs.append(_spec(name, name, None, output))
    return specs


def _named_sites(model: nn.Module, seen: _Watched, found: list[SiteSpec], names: Iterable[str]) -> list[SiteSpec]:
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


class _Hook:
    pass


# A site adds feature maps itself; the tap of an enclosing block must not count those sums.
_local = threading.local()


def _act(site: nn.Module, h: Tensor) -> Tensor:
    _local.inside = True
    try:
        return site(h)
    finally:
        _local.inside = False


class _OutputHook(_Hook):
    def __init__(self, site: nn.Module) -> None:
        self.site = site

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return _act(self.site, output)


class _Tap:
    """The sites on the residual sums of one block, and its calls under way."""

    def __init__(self) -> None:
        self.sites: dict[int, nn.Module] = {}
        self.calls: list[_TapMode] = []


class _TapMode(TorchFunctionMode):
    def __init__(self, sites: dict[int, nn.Module]) -> None:
        super().__init__()
        self.sites, self.count = sites, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if getattr(_local, "inside", False) or not _summed_maps(func, args, kwargs, out):
            return out
        site = self.sites.get(self.count)
        self.count += 1
        if site is None:
            return out
        if func is torch.Tensor.add_:  # maybe a statement, whose value nobody takes: the sum itself must change
            return out.copy_(_act(site, out.clone()))
        return _act(site, out)


class _EnterTap(_Hook):
    def __init__(self, tap: _Tap) -> None:
        self.tap = tap

    def __call__(self, module: nn.Module, args: tuple) -> None:
        mode = _TapMode(self.tap.sites)
        self.tap.calls.append(mode)
        mode.__enter__()


class _LeaveTap(_Hook):
    def __init__(self, tap: _Tap) -> None:
        self.tap = tap

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.tap.calls.pop().__exit__(None, None, None)
