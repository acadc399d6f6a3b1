"""Putting φ, or other modules, into any CNN and out of it; `metaperturb.sites` says where they act.

The network's code is not changed. A site is a child of the module that it acts in, so that it has that module's mode,
travels with it and is in its state dict. A hook of that module hands its output, or its input, to the site.
"""

import functools
import math
import sys
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils._expanded_weights.expanded_weights_impl import ExpandedWeight

from metaperturb.dry_run import tensors
from metaperturb.errors import UserError
from metaperturb.perturbation import CLIP, Attachment, MetaPerturb, PerturbSite, Slot
from metaperturb.sites import PLACES, Sites, SiteSpec, choose_sites, find_sites

# What methods add to a network: children of these names in the modules where they act.
PERTURBATION, REGULARIZER = "metaperturb", "regularizer"

RESNET20 = 3 / 32**2 + 3 / 16**2 + 3 / 8**2


def attach(
    model: nn.Module,
    phi: MetaPerturb,
    image_size: int | tuple[int, int] | None = None,
    sites: str | Iterable[str] | None = None,
    *,
    example: Any = None,
    paper: bool | None = None,
    noise: bool = True,
    gate: bool = True,
    clip: float | Literal["paper"] | None = "paper",
    clip_eval: bool = False,
    verbose: bool = True,
) -> nn.Module:
    """Put φ into `model`, in place, and return the model. `model.metaperturb` is its `Attachment`.

    Args:
        model: any CNN that maps images `[B, C, H, W]` to logits; the part of a larger network that does.
        phi: the shared φ.
        image_size: side of the images in pixels, or (height, width); the height is also the normalizer of a layer's
            size.
        sites: default: all that are found as `metaperturb.sites` describes (`find_sites` lists them).
            `"before_pooling"`, `"top"` or `"bottom"`: those that `choose_sites` leaves of them. A list: names of
            modules to perturb (their residual sum, else their output).
        example: what the network is run on to find the sites, where it takes more than an image: a tuple of its
            arguments, or its one argument. Only shapes matter.
        paper: True: the sites compute what the paper says. False: noise of mean one, whose total over the sites is
            bounded by what φ was meta-trained with (`amplitude`). None: True for networks that mark their places
            themselves (`Slot`: those of `metaperturb.models`) and with an ablation, else False.
        noise: False is an ablation of the paper's arithmetic, which sets z to 1.
        gate: False is another, which sets s to 1.
        clip: the bound of what sites return (see `Attachment`), or None; "paper": 100 in the paper's arithmetic, in
            which what is large is squared from site to site, and none outside it.
        clip_eval: in the paper's arithmetic values are bounded in evaluation, too.
        verbose: say on stderr, in one line, which sites were chosen (`print(model.metaperturb)` shows all).

    The channels of a layer are normalized by those of the widest one that is listed or, where a word chooses among the
    found ones, the widest found: a site computes the same whether or not the others are there.

    Raises:
        UserError: φ is no `MetaPerturb`, already attached, or left with neither `noise` nor `gate`; the network is a
            wrapper (of DistributedDataParallel, `torch.compile` and the like) or has a `metaperturb` of its own; and
            what `find_sites` raises.

    Examples:
        >>> import torchvision
        >>> model = attach(torchvision.models.resnet18(num_classes=10), MetaPerturb(), image_size=64, verbose=False)
        >>> len(model.metaperturb.sites)
        8
    """
    if not isinstance(phi, MetaPerturb):
        raise UserError(f"phi: expected a MetaPerturb, as load_phi(…) gives one, got {type(phi).__name__}")
    if not (noise or gate):
        raise UserError("noise=False and gate=False leave nothing of φ; choose one of the two")
    if paper is False and not (noise and gate):
        raise UserError("noise=False and gate=False are ablations of the paper's arithmetic and need paper=True")
    if clip_eval and clip is None:
        raise UserError("clip_eval=True needs a clip")
    if any(isinstance(module, PerturbSite) for module in model.modules()):
        raise UserError("this network has a perturbation attached already (detach(model) removes it)")
    if sites is None or sites in PLACES:
        found = find_sites(model, image_size, example=example)
        specs = choose_sites(found, sites or "all")
    else:
        found = specs = find_sites(model, image_size, sites, example=example)
    if paper is None:
        paper = not (noise and gate) or all(isinstance(model.get_submodule(spec.module), Slot) for spec in specs)
    if clip == "paper":
        clip = CLIP if paper else None
    size = image_size if image_size is not None else next(t.shape[2:] for t in tensors(example) if t.dim() == 4)
    height, widest = size if isinstance(size, int) else size[0], max(spec.channels for spec in found)
    with torch.inference_mode(False):
        usage = {"noise": noise, "gate": gate, "paper": paper, "clip": clip, "clip_eval": clip_eval}
        attachment = Attachment(phi, **usage, amplitude=1.0 if paper else amplitude(specs))
        attachment.specs = specs
        attachment.sites = [PerturbSite(phi, spec.channels, widest, height, attachment) for spec in specs]
        attachment.sites[0].add_module("shared", attachment)  # once in the network's state
    place(model, attachment, PERTURBATION, verbose=verbose)
    if verbose and not paper:
        print(f"{PERTURBATION}: noise of mean one, amplitude {attachment.amplitude:.2f}", file=sys.stderr)
    return model


def amplitude(specs: list[SiteSpec]) -> float:
    """Of noise of mean one at these places: at most 1, less where noise would have more effect than on ResNet20.

    White noise in a map of H·W pixels leaves a share 1 / (H·W) of its variance after average pooling. The sum of these
    shares over all sites, times the amplitude squared, is at most that of the nine sites of ResNet20 at 32 pixels, in
    which φ is meta-trained: it is small maps rather than many sites that a network does not bear.
    """
    return min(1.0, math.sqrt(RESNET20 / sum(1 / math.prod(spec.size) for spec in specs)))


def place(model: nn.Module, sites: Sites, name: str, *, verbose: bool = True) -> None:
    """Let modules act at sites of `model`, in place: what `attach` does for φ, for any modules. `detach` undoes it.

    Each takes the mode and device of the module where it acts, and becomes the child `name` of that; `sites` itself
    becomes the attribute `name` of the network, which may have none yet. `verbose`: say on stderr where they are.
    """
    acting = {spec: model.get_submodule(spec.module) for spec in sites.specs}
    for host in (model, *acting.values()):
        if hasattr(host, name):
            raise UserError(f"{type(host).__name__} has a {name!r} of its own; rename that")
    parameter = next(model.parameters(), None)
    for (spec, host), site in zip(list(acting.items()), sites.sites, strict=True):
        site.train(host.training)
        if parameter is not None:
            site.to(parameter.device)
        host.add_module(name, _Aside(site) if isinstance(host, nn.Sequential) else site)
        if isinstance(host, Slot):
            continue  # runs its children itself
        if type(host).__module__.startswith("torch.nn.modules") and not isinstance(host, nn.Sequential):
            host.__class__ = _with_site(type(host))
        hook = _Acts(name, site, spec)
        if spec.where == "output":
            host.register_forward_hook(hook.on_output)
        elif spec.where == "input":
            host.register_forward_pre_hook(hook.on_input)
        else:
            acting[spec] = host.get_submodule(spec.where)
            host.register_forward_pre_hook(hook.begin)
            acting[spec].register_forward_pre_hook(hook.on_last_call)
            host.register_forward_hook(hook.end, always_call=True)
    model.__dict__[name] = sites  # no child: the network's children stay what they are
    model.register_forward_pre_hook(_Check(name, acting))
    _forget_compiled()
    if verbose:
        shown = [spec.name for spec in sites.specs]
        shown = shown if len(shown) <= 12 else [*shown[:5], "…", *shown[-5:]]
        count = f"{len(acting)} site{'s' * (len(acting) > 1)}"
        print(f"{name}: {count} in {type(model).__name__}: {', '.join(shown)}", file=sys.stderr)


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach` and `place`, in place, and return the model. A network without sites is returned as it is.

    The weights stay. Those that were trained with the sites need them to predict, too: this gives φ up, for training
    without it.

    Of a wrapper (of DistributedDataParallel, `torch.compile` and the like) the network inside is meant.
    """
    for module in list(model.modules()):
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook := getattr(hook, "__self__", hook), _Hook):
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
                    module._modules.pop(hook.name, None)
                    vars(module).pop(hook.name, None)
                    if type(module) is _with_site(kind := type(module).__base__):
                        module.__class__ = kind
        if isinstance(module, Slot):
            module._modules.clear()
    _forget_compiled()
    return model


def _forget_compiled() -> None:
    """What `torch.compile` has made of the network before knows nothing of hooks that come or go."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@functools.cache
def _with_site(kind: type) -> type:
    """The same layer of PyTorch by another exact type, which is what tools go by that fuse or exchange layers.

    They leave it, or say that they do not know it; else they would drop what hangs on it, and φ with it. What PyTorch's
    `fuse_modules` says then has the class's `__qualname__`.
    """
    own = {
        "__module__": kind.__module__,
        "__qualname__": f"{kind.__qualname__} with a site of φ: fuse before attach",
        "__reduce_ex__": lambda layer, _: (_new_with_site, (kind,), layer.__getstate__()),
    }
    return type(f"{kind.__name__}WithSite", (kind,), own)


def _new_with_site(kind: type) -> nn.Module:
    return object.__new__(_with_site(kind))


# --- acting. Hooks are objects, so that a copy of the network has its own.


class _Aside(nn.Identity):
    """A site as the child of a module that runs its children one by one: as one of them it does nothing."""

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self.site = site


class _Hook:
    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def __name__(self) -> str:
        """What torch.jit.script asks every hook for."""
        raise UserError("torch.jit.script cannot compile a network with φ; use torch.export, or torch.jit.trace")


class _Acts(_Hook):
    """Hands to a site what a module gives or gets, or what an activation gets in its last call in a block."""

    def __init__(self, name: str, site: nn.Module, spec: SiteSpec) -> None:
        super().__init__(name)
        self.site, self.spec = site, spec
        self.count: int | None = None  # calls in the present pass; None outside the block's forward pass

    def on_output(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if type(output) is not tuple:
            return self.site(output)
        h = self.site(output[0])  # a block that returns its feature map with something else
        return tuple(h if value is output[0] else value for value in output)

    def on_input(self, module: nn.Module, args: tuple) -> tuple:
        return self.site(args[0]), *args[1:]

    def begin(self, block: nn.Module, args: tuple) -> None:
        self.count = 0

    def on_last_call(self, activation: nn.Module, args: tuple) -> tuple | None:
        if self.count is None:
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:  # a backward pass
                raise UserError(
                    "torch.utils.checkpoint of a part of a residual block: its backward pass would run that part "
                    "without the perturbation; checkpoint whole blocks"
                )
            return None
        self.count += 1
        return self.on_input(activation, args) if self.count == self.spec.calls else None

    def end(self, block: nn.Module, args: tuple, output: Any) -> None:
        count, self.count = self.count, None
        if isinstance(output, torch.fx.Proxy):  # a trace does not run the hooks of the activation
            node, tracer = output.node, output.tracer
            with tracer.graph.inserting_before(node):
                source = torch.fx.Proxy(node.args[0], tracer)
                node.replace_input_with(node.args[0], self.site(source).node)
        elif output is not None and count not in (0, self.spec.calls):  # 0: a block that is left out in this step
            raise UserError(
                f"{self.spec.name!r} runs its {self.spec.where!r} {count} times in this pass and ran it "
                f"{self.spec.calls} times in the dry run, so where φ acts cannot be told; put a metaperturb.Slot() "
                "there, or name other modules: sites=[…]"
            )


class _Check(_Hook):
    """Before each pass of the network: whether every module that runs a site is still in it."""

    def __init__(self, name: str, acting: dict[SiteSpec, nn.Module]) -> None:
        super().__init__(name)
        self.acting = acting

    def __call__(self, model: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling():
            return
        trained = (p for p in model.parameters() if isinstance(p, ExpandedWeight) or p.requires_grad)
        one = next(trained, None) if model.training else None
        if isinstance(one, ExpandedWeight) or hasattr(one, "grad_sample"):  # as Opacus marks them
            raise UserError("φ acts on whole batches: there are no gradients of single ones (grad_sample)")
        if getattr(model, "_is_replica", False):
            raise UserError("nn.DataParallel: its replicas would share the sites; use DistributedDataParallel")
        present = set(model.modules())
        if lost := [spec.module for spec, module in self.acting.items() if module not in present]:
            raise UserError(
                f"{type(model).__name__}: {lost[0]!r} ({len(lost)} in all) was replaced after attach, by fusing or the "
                "like, and is not perturbed; detach(model), and attach after such changes"
            )
