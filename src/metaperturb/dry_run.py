"""A dry run: one forward pass that notes which operators a network computes, and in which of its modules.

It needs no pixels: the network runs on the meta device, where tensors have shapes and no values. A network that asks
for values runs on zeros instead.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from metaperturb.errors import UserError

SUMS = {"add", "sub", "rsub", "addcmul", "addcdiv", "lerp", "index_add", "scatter_add"}
GATHERS = {"cat", "stack"}
LAYERS = {"convolution", "addmm", "mm", "bmm", "baddbmm"}
_LIKE = ("rand", "zeros", "ones", "empty", "full", "new_", "bernoulli")  # operators that take no more than a shape
_VIEWS = {"view", "_unsafe_view", "reshape", "expand", "squeeze", "unsqueeze", "stack", "sum", "mean"}


@dataclass(eq=False)
class Value:
    """A result of an operator that follows from the network's input.

    Attributes:
        position: in the order in which they were computed.
        op: of ATen, without overload and the `_` of in-place ones; "input" for what the network is given.
        inputs: those of its operands that follow from the input, too.
        module: name of the innermost module that ran.
        space: which dimensions are rows and columns of the image, or None if none are: `(2, 3)` of a feature map,
            `(1, 2)` of `[B, H, W, C]`; tokens, attention scores and channel weights have none.
        join: "sum" where several maps of one shape are added, "cat" where they are concatenated, else "".
        gathered: whether several maps lie side by side in it, so that a sum over them is a join.
        depthwise: a convolution of each channel by itself.
        users: what is computed from it.
        returned: whether the network returned it.
    """

    position: int
    op: str
    inputs: tuple["Value", ...]
    shape: torch.Size
    module: str
    space: tuple[int, int] | None
    join: str = ""
    gathered: bool = False
    depthwise: bool = False
    users: list["Value"] = field(default_factory=list)
    returned: bool = False

    @property
    def is_map(self) -> bool:
        return len(self.shape) == 4 and self.space == (2, 3)


@dataclass(frozen=True)
class Call:
    """One call of a module, its first argument and its (first) result; None where that follows not from the input.

    `shape` is that of the result if that is one tensor, whether it follows from the input or not.
    """

    module: str
    parent: str
    taken: Value | None
    given: Value | None
    shape: torch.Size | None


class Trace(TorchDispatchMode):
    """What the dry run sees: all values, and all calls in the order in which they ended."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Value] = []
        self.calls: list[Call] = []
        self.stack = [""]  # names of the running modules
        self.value_of: dict[int, Value] = {}  # by the identity of a tensor
        self.first_of: dict[int, Tensor] = {}  # storage → the first tensor in it, to follow writing into views
        self.kept: list[Any] = []  # keeps identities unique

    def value(self, tensor: Any) -> Value | None:
        return self.value_of.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def add(self, tensor: Tensor, op: str, inputs: tuple[Value, ...], *properties: Any) -> Value:
        value = Value(len(self.values), op, inputs, tensor.shape, self.stack[-1], *properties)
        for operand in set(inputs):
            operand.users.append(value)
        self.kept.append(tensor)
        self.values.append(value)
        self.value_of[id(tensor)] = value
        return value

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        op = func._schema.name.partition("::")[2]
        operands = [] if op.startswith(_LIKE) else list(tensors((args, kwargs)))
        for result in tensors(out):
            self._note(op.rstrip("_"), operands, args, result, in_place=op.endswith("_"))
        return out

    def _note(self, op: str, operands: list[Tensor], args: tuple, result: Tensor, in_place: bool) -> None:
        owner = self.first_of.setdefault(result.untyped_storage()._cdata, result)
        self.kept.append(result)
        inputs = tuple(v for v in map(self.value, operands) if v is not None)
        if not inputs:
            if op == "detach":  # what torch.empty gives is one of itself
                self.first_of[result.untyped_storage()._cdata] = result
            return
        space, join = _space(op, args, inputs, result), ""
        gathered = op not in LAYERS and any(v.gathered for v in inputs)
        if op in SUMS and sum(v.shape == result.shape for v in set(inputs)) >= 2 and space and result.dim() == 4:
            join = "sum"
        elif op in GATHERS and sum(v.space is not None for v in set(inputs)) >= 2:
            join, gathered = ("cat" if space == (2, 3) else ""), True
        elif op in ("sum", "mean") and inputs[0].gathered and space == (2, 3) and result.shape[1] > 1:
            pooled = {d % len(inputs[0].shape) for d in args[1]} & set(inputs[0].space)
            join, gathered = ("", True) if pooled else ("sum", False)
        more = join, gathered, op == "convolution" and 1 < args[8] == args[0].shape[1]
        before, value = self.value(owner), self.add(result, op, inputs, space, *more)
        if in_place and owner is not result:  # out[:, :8] += x changes out
            if before is None:
                self.add(owner, op, (value,), space, *more)
            else:
                self.add(owner, op, (before, value), before.space, *more)


def _space(op: str, args: tuple, values: tuple[Value, ...], result: Tensor) -> tuple[int, int] | None:
    """`Value.space` of a result: whether the rows and columns of its operands are still dimensions of their own."""
    shape, before = result.shape, next((v for v in values if v.space), None)
    if op == "convolution":  # one of a single pixel may as well mix tokens
        image, kernel = args[0].shape[2:], args[1].shape[2:]
        if kernel == image and kernel.numel() > 1 and not any(args[4]) and all(stride == 1 for stride in args[3]):
            return None  # a linear layer
        is_wide = result.dim() == 4 and kernel.numel() > 1
        return (2, 3) if is_wide else (before.space if before and values[0] is before else None)
    if before is None or op in LAYERS:
        return None
    rank, (rows, columns) = len(before.shape), before.space
    if op in ("permute", "transpose", "t"):
        order = list(getattr(torch.empty(tuple(range(rank)), device="meta"), op)(*args[1:]).shape)
        return order.index(rows), order.index(columns)
    if op in _VIEWS or len(shape) != rank:
        if rows == rank - 2 and columns == rank - 1 and len(shape) >= 3 and shape[-2:] == before.shape[-2:]:
            return len(shape) - 2, len(shape) - 1
        return (rows, columns) if shape[: columns + 1] == before.shape[: columns + 1] else None
    pooled = any(shape[d] == 1 < before.shape[d] for d in before.space)  # to one row or column: no map any more
    return None if pooled and op not in ("max_pool2d_with_indices", "cat", "slice") else before.space


def tensors(value: Any) -> Iterator[Tensor]:
    """Those in it, however deep in tuples, lists and mappings."""
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _images(model: nn.Module, image_size: int | tuple[int, int]) -> Iterator[Tensor]:
    """Zeros `[2, C, H, W]` for each number of channels that the network's images may have, the likeliest first."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    # Which convolution sees the image is not known before the network has run; mostly the one declared first.
    channels = dict.fromkeys([*(m.in_channels for m in convolutions[:1]), 3, 1, *(m.in_channels for m in convolutions)])
    like = next((m.weight for m in convolutions), next(model.parameters(), torch.empty(0)))
    for c in channels:
        yield torch.zeros(2, c, height, width, dtype=like.dtype, device=like.device)


def watch(model: nn.Module, image_size: int | tuple[int, int] | None = None, example: Any = None) -> Trace:
    """Run the network once, in evaluation mode, and note what happens.

    Modes, parameters, buffers and the state of the random generators stay as they are; hooks of the network run, too.
    `image_size` and `example` are those of `attach`. A `UserError` says why the network does not run.
    """
    if lazy := [n for n, p in model.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]:
        raise UserError(f"{type(model).__name__}: {lazy[0]!r} has no shape yet; run it once on a batch before attach")
    if example is not None:
        candidates = [example if isinstance(example, tuple) else (example,)]
    else:
        candidates = ((image,) for image in _images(model, image_size))
    failure = shape = None
    for arguments in candidates:
        shape = shape or [list(t.shape) for t in tensors(arguments)]
        for device in ("meta", None):
            try:
                return _dry_run(model, arguments, device)
            except Exception as error:
                last = error
        failure = failure or last  # that of the run on zeros: of the meta device a user need not know
    cause = str(failure).strip().split("\n")[0] or type(failure).__name__  # an assertion says nothing
    if example is not None:
        what = f"the example ({cause})"
    elif not any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in model.modules()):
        what = f"images {shape[0]} ({cause}); it has no nn.Conv2d, and φ acts on feature maps of CNNs"
    else:
        way = "image_size=(height, width), or example=(…), what it runs on, or attach to a part of it"
        what = f"images {shape[0]} ({cause}); is image_size right? ({way})"
    raise UserError(f"{type(model).__name__}: does not run on {what}") from failure


def classifier_name(model: nn.Module, image_size: int | None = None, example: Any = None) -> str:
    """The module that makes the logits: the last linear layer or convolution that runs, with one output a class.

    Raises:
        UserError: that layer has another number of outputs, so that there may be parameters behind it; or the network
            does not run on images of this size.
    """
    trace, modules = watch(model, image_size, example), dict(model.named_modules())
    layers = [call for call in trace.calls if isinstance(modules[call.module], nn.Linear | nn.Conv2d) and call.shape]
    logits = trace.calls[-1].shape
    if layers and logits and len(logits) == 2:
        last = layers[-1]
        if last.shape[-1 if isinstance(modules[last.module], nn.Linear) else -3] == logits[1]:
            return last.module
    raise UserError(
        f"{type(model).__name__}: no classifier found: its last linear layer or convolution has not one output a class"
    )


def _dry_run(model: nn.Module, arguments: tuple, device: str | None) -> Trace:
    trace = Trace()
    names = {module: name for name, module in model.named_modules()}

    def moved(value: Any) -> Any:
        return tree_map_only(Tensor, lambda t: t.detach().to(device) if device else t.detach().clone(), value)

    def enter(module: nn.Module, args: tuple) -> tuple | None:
        trace.stack.append(names[module])
        taken.append(trace.value(args[0]) if args else None)

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        name = trace.stack.pop()
        first = output[0] if type(output) is tuple and output else output
        shape = output.shape if isinstance(output, Tensor) else None
        trace.calls.append(Call(name, trace.stack[-1], taken.pop(), trace.value(first), shape))

    taken: list[Value | None] = []
    images = moved(arguments)
    for image in tensors(images):
        trace.add(image, "input", (), (2, 3) if image.dim() == 4 else None)
    state = moved(dict(model.named_buffers()) | (dict(model.named_parameters()) if device else {}))
    devices = [t.device for t in tensors(images) if t.is_cuda]
    with (
        _kept_attributes(model),
        torch.random.fork_rng(devices[:1]),
        torch.no_grad(),
        torch.device(device) if device else contextlib.nullcontext(),
    ):
        model.eval()
        for module in names:
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
        with trace:
            result = torch.func.functional_call(model, state, images, strict=False)
    for value in filter(None, map(trace.value, tensors(result))):
        value.returned = True
    return trace


@contextlib.contextmanager
def _kept_attributes(model: nn.Module) -> Iterator[None]:
    """Afterwards each module has the mode, hooks and attributes that it had, whatever its forward pass stored in it."""
    before = [
        (vars(module), dict(vars(module)), [(v, dict(v)) for v in vars(module).values() if isinstance(v, dict)])
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for attributes, own, contents in before:
            for kept, content in [(attributes, own), *contents]:  # in place: handles of hooks refer to the dictionary
                kept.clear()
                kept.update(content)
