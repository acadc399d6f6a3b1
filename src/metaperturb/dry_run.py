"""A dry run: one forward pass on zeros that notes which modules and functions a network calls, and with what."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metaperturb.errors import UserError
from metaperturb.modes import in_mode

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

    outputs: dict[str, Tensor] = field(default_factory=dict)  # module → its last output, in order of completion
    sums: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # module → index of sum → value, innermost only
    activated: set[int] = field(default_factory=set)  # identities of tensors that an activation received
    normalized: set[int] = field(default_factory=set)  # … that a normalization received
    kept: list[Any] = field(default_factory=list)


class _Watcher(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = Watched()
        self.stack: list[list] = []  # [module name, residual sums so far inside this call]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ACTIVATIONS and args and isinstance(args[0], Tensor):
            self.seen.activated.add(id(args[0]))
        out = func(*args, **(kwargs or {}))
        operands = summed_maps(func, args, kwargs, out)
        if operands:
            name, index = self.stack[-1]
            if operands[0].shape == operands[1].shape:
                self.seen.sums.setdefault(name, {})[index] = out
            for call in self.stack:
                call[1] += 1
        self.seen.kept.append((args, out))
        return out


def watch(model: nn.Module, image_size: int, *, training: bool = False) -> Watched:
    """Run the network once on zeros, in evaluation (or training) mode, and note what happens.

    Modes, buffers and the state of the random generators stay as they are.

    Raises:
        UserError: the network has no convolution, or does not run on such images.
    """
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
            _dry_run(model, image, watcher, training)
            return watcher.seen
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
        watcher.seen.outputs.pop(names[module], None)
        if isinstance(output, Tensor):
            watcher.seen.outputs[names[module]] = output

    handles = []
    for module in model.modules():
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        devices = [image.device] if image.is_cuda else []
        with in_mode(model, training), _kept_buffers(model), torch.random.fork_rng(devices), torch.no_grad(), watcher:
            model(image)
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
