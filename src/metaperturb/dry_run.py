"""A dry run: one forward pass on zeros that notes which modules and functions a network calls, and with what."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metaperturb.errors import UserError
from metaperturb.modes import in_mode
from metaperturb.perturbation import Slot

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


@dataclass
class Watched:
    """What the dry run saw. Tensors are kept, so that their identities stay unique."""

    outputs: dict[str, Tensor] = field(default_factory=dict)  # module → its last output, if that is a tensor
    sums: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # module → index of sum → value, innermost only
    activated: set[int] = field(default_factory=set)  # identities of tensors that an activation received
    normalized: set[int] = field(default_factory=set)  # … that a normalization received
    calls: Counter[str] = field(default_factory=Counter)  # module → how often it ran, in order of first completion
    returned: set[int] = field(default_factory=set)  # … that the network returned, and no function received
    weights: set[str] = field(default_factory=set)  # modules whose output, of one pixel, weights larger maps
    kept: list[Any] = field(default_factory=list)

    def leave_out(self, name: str, index: int) -> None:
        """A sum that is none of feature maps, or only a part of one."""
        sums = self.sums.get(name, {})
        sums.pop(index, None)
        if not sums:
            self.sums.pop(name, None)


class _Watcher(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = Watched()
        self.stack: list[list] = []  # [module name, residual sums so far inside this call]
        # Identity of a map of one pixel → where it comes from: module, and index of the sum or None for its output.
        self.origins: dict[int, set[tuple[str, int | None]]] = {}
        self.parts: list[tuple[str, int, Tensor]] = []  # sums that another sum of the same module took: likewise, value
        self.uses: Counter[int] = Counter()  # identity of a tensor → how many functions received it

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ACTIVATIONS and args and isinstance(args[0], Tensor):
            self.seen.activated.add(id(args[0]))
        out = func(*args, **(kwargs or {}))
        operands = summed_maps(func, args, kwargs, out)
        if operands:
            self._note_sum(operands, out)
        received = list(_tensors((args, kwargs or {})))
        if next(_tensors(out), None) is not None:  # what asks for a size, say, does not use it
            self.uses.update({id(value) for value in received})
        self._follow_pixels(received, out)
        self.seen.kept.append((args, out))
        return out

    def _note_sum(self, operands: tuple[Tensor, Tensor], out: Tensor) -> None:
        name, index = self.stack[-1]
        _, channels, height, width = out.shape
        transposed = channels == height != width  # [B, H, W, C], as of Swin: images here are squares
        if operands[0].shape == operands[1].shape and not transposed:
            sums = self.seen.sums.setdefault(name, {})
            sums[index] = out
            self.parts += [(name, i, s) for i, s in sums.items() if s is not out and any(s is o for o in operands)]
            self.note_pixel(name, index, out)
        for call in self.stack:
            call[1] += 1

    def note_pixel(self, name: str, index: int | None, value: Tensor) -> None:
        """A sum in a module, or (`None`) its output; only maps of one pixel are followed."""
        if _is_pixel(value):
            self.origins.setdefault(id(value), set()).add((name, index))

    def _follow_pixels(self, received: list[Tensor], out: Any) -> None:
        """Maps of one pixel that a larger map is multiplied by are no feature maps, but weights of its channels."""
        origins = set().union(*(self.origins.get(id(value), ()) for value in received))
        if not origins or not isinstance(out, Tensor):
            return
        if _is_pixel(out):
            self.origins.setdefault(id(out), set()).update(origins)
        elif any(value.shape == out.shape for value in received):
            for name, index in origins:
                if index is None:
                    self.seen.weights.add(name)
                else:
                    self.seen.leave_out(name, index)

    def finish(self) -> Watched:
        """a + b + x is one sum: its first half goes nowhere but into the second. The network's output is no sum."""
        for name, index, value in self.parts:
            if self.uses[id(value)] == 1:
                self.seen.leave_out(name, index)
        self.seen.returned = {identity for identity in self.seen.returned if not self.uses[identity]}
        for name, index, value in [(n, i, v) for n, sums in self.seen.sums.items() for i, v in sums.items()]:
            if id(value) in self.seen.returned:
                self.seen.leave_out(name, index)
        return self.seen


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those in it, however deep in tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _is_pixel(value: Tensor) -> bool:
    return value.dim() == 4 and value.shape[2:].numel() == 1


def watch(model: nn.Module, image_size: int, *, training: bool = False) -> Watched:
    """Run the network once on zeros, in evaluation (or training) mode, and note what happens.

    Modes, buffers and the state of the random generators stay as they are; hooks of the network run, too.

    Raises:
        UserError: the network has neither a convolution nor a slot, or does not run on such images.
    """
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    if not convolutions and not any(isinstance(m, Slot) for m in model.modules()):
        raise UserError(f"{type(model).__name__}: has no nn.Conv2d; the perturbation acts on feature maps of CNNs")
    # Which convolution sees the image is not known before the network has run; mostly the one declared first.
    inputs = [m.in_channels for m in convolutions]
    candidates = dict.fromkeys([*inputs[:1], 3, *inputs])
    like = next((m.weight for m in convolutions), next(model.parameters(), torch.empty(0)))
    failure: Exception | None = None
    for channels in candidates:
        watcher = _Watcher()
        image = like.new_zeros(2, channels, image_size, image_size)
        try:
            _dry_run(model, image, watcher, training)
            return watcher.finish()
        except Exception as error:
            failure = failure or error
    cause = str(failure).strip().split("\n")[0]
    raise UserError(
        f"{type(model).__name__}: does not run on images [2, {next(iter(candidates))}, {image_size}, {image_size}] "
        f"({cause}); is image_size right?"
    ) from failure


def _dry_run(model: nn.Module, image: Tensor, watcher: _Watcher, training: bool) -> None:
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: tuple) -> None:
        watcher.stack.append([names[module], 0])
        if args and isinstance(args[0], Tensor) and isinstance(module, NORMALIZATIONS):
            watcher.seen.normalized.add(id(args[0]))

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        watcher.stack.pop()
        watcher.seen.calls[names[module]] += 1
        watcher.seen.outputs.pop(names[module], None)
        if isinstance(output, Tensor):
            watcher.seen.outputs[names[module]] = output
            watcher.note_pixel(names[module], None, output)

    handles = []
    for module in model.modules():
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        devices = [image.device] if image.is_cuda else []
        with in_mode(model, training), _kept_buffers(model), torch.random.fork_rng(devices), torch.no_grad(), watcher:
            result = model(image)
        watcher.seen.kept.append(result)
        watcher.seen.returned = {id(value) for value in _tensors(result)}
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    """Afterwards the buffers are the same tensors with the same values, whatever the network did to them."""
    buffers = [(m._buffers, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    values = [buffer.clone() for *_, buffer in buffers]
    try:
        yield
    finally:
        for (names, name, buffer), value in zip(buffers, values, strict=True):
            names[name] = buffer.copy_(value)


def summed_maps(func: Any, args: tuple, kwargs: dict | None, out: Any) -> tuple[Tensor, Tensor] | None:
    """The operands, if this call adds two tensors to a feature map.

    Whether their shapes are equal (a residual sum) or one is broadcast (a bias, a position) is for the dry run to say:
    there the batch has two images, while a later batch of one may make a broadcast look like a residual sum.
    """
    if func not in ADDITIONS or not isinstance(out, Tensor) or out.dim() != 4:
        return None
    named = kwargs or {}
    operands = (*args, *(named[key] for key in ("input", "other") if key in named))
    return operands[:2] if len(operands) >= 2 and all(isinstance(o, Tensor) for o in operands[:2]) else None
