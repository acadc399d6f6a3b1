"""Where φ acts in a CNN (section 3.2, figure 3, and the authors' code), in this order of preference:

1. the network's own `Slot`s (the zoo);
2. residual networks: every block, that is every module whose forward adds feature maps; of nested ones the outer one,
   unless it holds more than two (a stage). A block of the same class without a sum (a strided one) is one, too;
3. networks that concatenate (Inception, Fire, ShuffleNet, DenseNet): every block whose output is a concatenation;
4. plain networks: every convolution (with its normalization) that an activation follows. A convolution of each channel
   by itself is a part of the layer that follows it.

A block has one site, however many sums it makes, and however they are written: before the block's last activation if
that is a module that gets the sum, else on the block's output. A sum in the forward pass of the network itself has one
where a single module gets it.

Feature maps are `[B, C, H, W]` with rows and columns of the image: no attention scores, tokens, `[B, H, W, C]`, channel
weights, nor what the network returns. All of this is made for classifiers: elsewhere look at what was found, and name
the places.
"""

import difflib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

from metaperturb.dry_run import LAYERS, Call, Trace, Value, watch
from metaperturb.errors import UserError
from metaperturb.perturbation import Slot

PLACES = ("all", "before_pooling", "top", "bottom")  # what `choose_sites` knows
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
ACTIVATIONS = {
    *("relu", "hardtanh", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "hardswish", "mish", "prelu", "tanh"),
    *("_prelu_kernel", "rrelu", "rrelu_with_noise", "softplus", "sigmoid", "hardsigmoid", "threshold", "clamp_min"),
}
NORMALIZATIONS = {
    *("native_batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_no_update", "cudnn_batch_norm"),
    *("native_group_norm", "native_layer_norm", "batch_norm_with_update", "_native_batch_norm_legit"),
}
STAGE = 3  # blocks, from which on an outer block is a stage


@dataclass(frozen=True)
class SiteSpec:
    """Where a site acts.

    Attributes:
        name: of the block or layer.
        module: the module that the site is a child of.
        where: "output" of that module, its "input", or the name of its child that gets the map in its last call.
        channels: C of the feature map.
        size: (H, W) of it.
        calls: of that child, in one pass.
    """

    name: str
    module: str
    where: str
    channels: int
    size: tuple[int, int]
    calls: int = 1

    def __str__(self) -> str:
        places = {"output": "output", "input": f"input of {self.module}"}
        place = places.get(self.where, f"before the last {self.where}")
        return f"{self.name}: {place}, {[self.channels, *self.size]}"


@dataclass
class Sites:
    """Modules that act at the sites of one network, one a site (see `metaperturb.attach.place`).

    Attributes:
        specs: the places, as `find_sites` gives them.
        sites: the modules: feature map `[B, C, H, W]` → the same shape.
    """

    specs: list[SiteSpec]
    sites: list[nn.Module]


def find_sites(
    model: nn.Module,
    image_size: int | tuple[int, int] | None = None,
    names: Iterable[str] | None = None,
    *,
    example: Any = None,
) -> list[SiteSpec]:
    """The sites that `attach` would choose, in the order in which the network runs them.

    Their number is that of the network's blocks, or of its layers where it has none: 9 in ResNet20, 50 in ResNet152,
    115 in timm's HRNet-W18. What bounds their total effect is the amplitude of the noise (`attach`, `paper=False`).

    Args:
        model: the network, or the part of one that takes images.
        image_size: side of the images in pixels, or (height, width).
        names: of modules to perturb, in place of those that are found.
        example: what the network is run on instead of images, as in `attach`.

    Raises:
        UserError: no site found, unknown or repeated name, a wrapper, or the network does not run on such images, or
            runs the module of a site several times a pass.
    """
    kind = type(model).__name__
    if unwrapped(model) is not model:
        raise UserError(f"{kind} wraps a network; attach to that one, before it is wrapped")
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise UserError(f"{kind}: model.compile() has been called, which wraps it; attach before that")
    if scripted := [n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]:
        raise UserError(f"{kind}: {scripted[0] or 'it'} is a ScriptModule; attach first, then torch.jit.trace")
    if example is None:
        sides = image_size if isinstance(image_size, tuple) and len(image_size) == 2 else (image_size, image_size)
        if any(type(side) is not int or side < 1 for side in sides):
            raise UserError(f"image_size: expected the images' side in pixels or (height, width), got {image_size!r}")
    return _Finder(model, watch(model, image_size, example)).find(names)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside a wrapper of DistributedDataParallel, `torch.compile` and the like."""
    while isinstance(model, WRAPPERS) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def choose_sites(specs: list[SiteSpec], where: str) -> list[SiteSpec]:
    """Those of a network's sites that an ablation leaves (table 3 (b)).

    A stage is a run of consecutive sites with feature maps of one size; so each convolution that does not pad ends one.
    `where`: `"all"`; `"bottom"`: the first stage; `"top"`: the last one; `"before_pooling"`: the last site of each
    stage, which the next down-sampling or the final pooling follows.
    """
    stages = [list(stage) for _, stage in groupby(specs, key=lambda spec: spec.size)]
    last = [stage[-1] for stage in stages]
    return {"all": list(specs), "before_pooling": last, "top": stages[-1], "bottom": stages[0]}[where]


class _Finder:
    """Finds the sites of one network in its dry run. Found places: what is perturbed → spec."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.model, self.trace = model, trace
        self.modules = dict(model.named_modules())
        self.calls: dict[str, list[Call]] = {}
        for call in trace.calls:
            self.calls.setdefault(call.module, []).append(call)
        self.given = {name: calls[-1].given for name, calls in self.calls.items()}

    def find(self, names: Iterable[str] | None) -> list[SiteSpec]:
        found = self.slots() or self.blocks("sum") or self.blocks("cat") or self.layers()
        if names is not None:
            found = self.named(found, [names] if isinstance(names, str) else list(names))
        if not found:
            raise UserError(f"{type(self.model).__name__}: {self._why_none()}")
        for spec in found.values():
            if (count := len(self.calls[spec.module])) > 1:
                raise UserError(
                    f"{type(self.model).__name__}: {spec.module!r} runs {count} times a pass, and a site has the "
                    f"statistics of one place; give each place a module of its own, attach to the part of the network "
                    f"that runs {count} times, or name other modules: sites=[…]"
                )
        return [found[value] for value in sorted(found, key=lambda value: value.position)]

    # --- the ways to find them

    def slots(self) -> dict[Value, SiteSpec]:
        slots = [name for name in self.calls if isinstance(self.modules[name], Slot)]
        parents = Counter(name.rpartition(".")[0] for name in slots)
        found = {}
        for name in slots:
            parent, taken = name.rpartition(".")[0], self.calls[name][-1].taken
            if taken is not None and len(taken.shape) == 4:
                alone = parent and parents[parent] == 1  # then the block is what one thinks of
                found[taken] = _spec(parent if alone else name, name, "output", taken)
        return found

    def blocks(self, join: str) -> dict[Value, SiteSpec]:
        joined = {v.module for v in self.trace.values if v.join == join and v.module}
        classes = {type(self.modules[name]) for name in joined} - {nn.Sequential}
        candidates = [
            name
            for name, given in self.given.items()
            if name
            and (name in joined or type(self.modules[name]) in classes)
            and _is_site_value(given)
            and (join == "sum" or _is_concatenation(given))
        ]
        inner = {name: sum(other.startswith(f"{name}.") for other in candidates) for name in candidates}
        chosen = [name for name in candidates if inner[name] < STAGE]
        chosen = [name for name in chosen if not any(name.startswith(f"{other}.") for other in chosen)]
        found = dict(self._place(name) for name in chosen)
        for value in self.trace.values:  # a sum that the network's own forward makes, where one module gets it
            if value.join == join == "sum" and not value.module and value not in found:
                takers = [c.module for c in self._takers(value) if self._may_host(c.module)]
                takers = [name for name in takers if len(self.calls[name]) == 1]
                if takers and _is_site_value(value):
                    found[value] = _spec(takers[0], takers[0], "input", value)
        return found

    def layers(self) -> dict[Value, SiteSpec]:
        layers = [value for value in self.trace.values if value.op in LAYERS]
        classifier = _layer_below(layers[-1]) if layers else None
        found: dict[Value, SiteSpec] = {}
        for activation in self.trace.values:
            if activation.op not in ACTIVATIONS or len(activation.inputs) != 1:
                continue
            name = _layer_below(activation.inputs[0])
            if name is None or name == classifier or any(spec.name == name for spec in found.values()):
                continue
            module, where, value = self._before_activation(name, activation.inputs[0])
            if _is_site_value(value) and value.shape[1] > 1:
                found[value] = _spec(name, module, where, value)
        return found

    def named(self, found: dict[Value, SiteSpec], names: list[str]) -> dict[Value, SiteSpec]:
        known = {spec.name: (value, spec) for value, spec in found.items()}
        for name in names:
            if name in known:
                continue
            given = self.given.get(name)
            if not name or given is None or len(given.shape) != 4:
                maps = [name for name, given in self.given.items() if name and given is not None and given.is_map]
                candidates = [*known, *maps, *PLACES]
                near = ", ".join(difflib.get_close_matches(name, candidates, n=3)) or ", ".join(candidates[:3])
                raise UserError(
                    f"sites: {name!r} is neither a place nor a module of {type(self.model).__name__} with a feature "
                    f"map (near: {near}; places: {', '.join(PLACES)})"
                )
            known[name] = self._place(name)
        chosen = dict(known[name] for name in names)
        if not chosen or len(chosen) < len(names):
            raise UserError(f"sites {names}: name at least one site, and none twice")
        return chosen

    # --- a place

    def _place(self, name: str) -> tuple[Value, SiteSpec]:
        """Where a block is perturbed: before its last activation, if that is a module that gets its sum, or behind."""
        given = self.given[name]
        sums = [v for v in self.trace.values[: given.position + 1] if v.module == name and v.join == "sum"]
        for call in self._takers(sums[-1]) if sums else ():
            if not call.module.startswith(f"{name}.") or call.given is not given or not _is_activation(call):
                continue
            calls = self.calls[call.module]
            if len(calls) == 1:
                return sums[-1], _spec(name, call.module, "input", sums[-1])
            if calls[-1] is call and all(f"{c.parent}.".startswith(f"{name}.") for c in calls):
                return sums[-1], _spec(name, name, call.module[len(name) + 1 :], sums[-1], len(calls))
        return given, self._output(name, given)

    def _output(self, name: str, given: Value) -> SiteSpec:
        """The output of a module. A site can be no child of a module that runs its children; then the last of them."""
        host = name
        while type(self.modules[host]) is nn.Sequential and len(self.modules[host]):
            host = f"{host}.{[*self.modules[host]._modules][-1]}"
        kind, parent = type(self.modules[host]), host.rpartition(".")[0]
        if not self._may_host(host) and kind.forward is not nn.Sequential.forward:  # as DenseNet's: runs what it has
            if type(self.modules[parent]) is nn.Sequential and self.given[parent] is given:
                return _spec(name, parent, "output", given)
            for call in self._takers(given):
                if self._may_host(call.module):
                    return _spec(name, call.module, "input", given)
        return _spec(name, host, "output", given)

    def _before_activation(self, name: str, value: Value) -> tuple[str, str, Value | None]:
        """Of a layer: the input of the activation, if that is a module that nothing else runs, or the layer's output.

        Tools that fuse a convolution with its normalization leave the activation and what hangs on it in place.
        """
        for call in self._takers(value) if value is self.given[name] or value.module == name else ():
            if len(self.calls[call.module]) == 1 and call.module != name and _is_activation(call):
                return call.module, "input", value
        return name, "output", self.given[name]

    def _takers(self, value: Value) -> list[Call]:
        """The calls of modules that get a value, where nothing else does."""
        return [
            call
            for call in self.trace.calls
            if call.taken is value and all(f"{user.module}.".startswith(f"{call.module}.") for user in value.users)
        ]

    def _may_host(self, name: str) -> bool:
        return bool(name) and not isinstance(self.modules[name], nn.Sequential | nn.ModuleDict | nn.ModuleList)

    def _why_none(self) -> str:
        convolutions = [v for v in self.trace.values if v.op == "convolution" and len(v.shape) == 4]
        if not convolutions:
            return "has no nn.Conv2d; the perturbation acts on feature maps of CNNs"
        if "" not in (within := {v.module for v in convolutions}) and len(within) <= 2:
            return (
                f"its only convolution, {convolutions[0].module!r}, has no activation behind it, as where it cuts the "
                "image into patches: what follows are tokens, and φ acts on feature maps of CNNs (or name: sites=[…])"
            )
        return (
            "found no place to perturb (no block with a sum or concatenation of feature maps, no convolution before an "
            "activation); name modules with sites=[…], or put a metaperturb.Slot() where φ shall act"
        )


def _spec(name: str, module: str, where: str, value: Value, calls: int = 1) -> SiteSpec:
    return SiteSpec(name, module, where, value.shape[1], tuple(value.shape[2:]), calls)


def _is_site_value(value: Value | None) -> bool:
    """Whether it is a feature map, and more than a resized form of what the network returns."""
    if value is None or not value.is_map:
        return False
    while not value.returned:
        if len(value.users) != 1:
            return True
        (value,) = value.users
        if len(value.inputs) != 1 or value.op in LAYERS or not value.is_map:
            return True
    return False


def _is_concatenation(value: Value) -> bool:
    """Whether a value is one, up to operators without weights, such as an activation or a channel shuffle."""
    while value.join != "cat" and len(value.inputs) == 1 and value.op not in LAYERS | NORMALIZATIONS:
        (value,) = value.inputs
    return value.join == "cat"


def _layer_below(value: Value) -> str | None:
    """The module whose convolution or normalization made a value, up to pooling and the like; None if none did."""
    name = None
    while len(value.inputs) == 1 and value.op not in ACTIVATIONS:
        if name is None and value.op in LAYERS | NORMALIZATIONS:
            name = value.module
        if value.op in LAYERS:
            return None if value.depthwise else name
        (value,) = value.inputs
    return name


def _is_activation(call: Call) -> bool:
    """A module that does nothing but an activation to one map."""
    value = call.given
    while value is not None and value is not call.taken:
        if value.module != call.module or value.op in LAYERS | NORMALIZATIONS or not value.inputs:
            return False
        value = value.inputs[0]
    return value is not None and call.given is not call.taken
