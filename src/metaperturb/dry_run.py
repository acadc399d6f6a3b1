"""A dry run: one forward pass that notes which operators a network computes, and in which of its modules.

It needs no pixels: the network runs on the meta device, where tensors have shapes and no values. A network that asks
for values runs on zeros instead.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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


@dataclass(frozen=True)
class Value:
    """A result of an operator that follows from the network's input.

    Attributes:
        op: of ATen, without overload and the `_` of in-place ones; "input" for what the network is given.
        inputs: positions (in `Trace.values`) of the operands that follow from the input, too.
        module: name of the innermost module that ran.
        space: which dimensions are rows and columns of the image, or None if none are: `(2, 3)` of a feature map,
            `(1, 2)` of `[B, H, W, C]`; tokens, attention scores and channel weights have none.
        join: "sum" where several maps of one shape are added, "cat" where they are concatenated, else "".
        gathered: whether several maps lie side by side in it, so that a sum over them is a join.
        depthwise: a convolution of each channel by itself.
    """

    op: str
    inputs: tuple[int, ...]
    shape: torch.Size
    module: str
    space: tuple[int, int] | None = None
    join: str = ""
    gathered: bool = False
    depthwise: bool = False

    @property
    def is_map(self) -> bool:
        return len(self.shape) == 4 and self.space == (2, 3)


@dataclass(frozen=True)
class Call:
    """One call of a module: positions in `Trace.values` of its first argument and of its (first) result, or None."""

    module: str
    parent: str
    taken: int | None
    given: int | None


@dataclass
class Trace:
    """What the dry run saw."""

    values: list[Value] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)  # in the order in which they ended
    outputs: dict[str, Tensor] = field(default_factory=dict)  # module → its last output, if that is a tensor
    returned: set[int] = field(default_factory=set)  # positions of what the network returned

    def users(self) -> list[list[int]]:
        """For each value the positions of those that are computed from it."""
        users: list[list[int]] = [[] for _ in self.values]
        for position, value in enumerate(self.values):
            for operand in set(value.inputs):
                users[operand].append(position)
        return users


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self.stack = [""]  # names of the running modules
        self.positions: dict[int, int] = {}  # identity of a tensor → position of its value
        self.first_of: dict[int, Tensor] = {}  # storage → the first tensor in it, to follow writing into views
        self.kept: list[Any] = []  # keeps identities unique

    def position(self, tensor: Any) -> int | None:
        return self.positions.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def add(self, tensor: Tensor, value: Value) -> None:
        self.kept.append(tensor)
        self.trace.values.append(value)
        self.positions[id(tensor)] = len(self.trace.values) - 1

    def add_input(self, tensor: Tensor) -> None:
        self.add(tensor, Value("input", (), tensor.shape, "", (2, 3) if tensor.dim() == 4 else None))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        op = func._schema.name.partition("::")[2]
        op, in_place = op.rstrip("_"), op.endswith("_")
        operands = [] if op.startswith(_LIKE) else list(tensors((args, kwargs or {})))
        for result in tensors(out):
            self._note(op, operands, args, result, in_place)
        return out

    def _note(self, op: str, operands: list[Tensor], args: tuple, result: Tensor, in_place: bool) -> None:
        owner = self.first_of.setdefault(result.untyped_storage()._cdata, result)
        self.kept.append(result)
        inputs = tuple(p for p in map(self.position, operands) if p is not None)
        if not inputs:
            if op == "detach":  # what torch.empty gives is one of itself
                self.first_of[result.untyped_storage()._cdata] = result
            return
        values = [self.trace.values[p] for p in inputs]
        space = _space(op, args, values, result)
        gathered = op not in LAYERS and any(v.gathered for v in values)
        join = ""
        alike = {p for p, v in zip(inputs, values, strict=True) if v.shape == result.shape}
        if op in SUMS and len(alike) >= 2 and space and result.dim() == 4:
            join = "sum"
        elif op in GATHERS and len({p for p, v in zip(inputs, values, strict=True) if v.space}) >= 2:
            join, gathered = ("cat" if space == (2, 3) else ""), True
        elif op in ("sum", "mean") and values[0].gathered and space == (2, 3) and result.shape[1] > 1:
            pooled = {d % len(values[0].shape) for d in args[1]} & set(values[0].space)
            join, gathered = ("", True) if pooled else ("sum", False)
        depthwise = op == "convolution" and 1 < args[8] == args[0].shape[1]
        value = Value(op, inputs, result.shape, self.stack[-1], space, join, gathered, depthwise)
        self.add(result, value)
        if in_place and owner is not result:  # out[:, :8] += x changes out
            before = self.position(owner)
            whole = self.trace.values[before].space if before is not None else space
            changed = (self.position(result),) if before is None else (before, self.position(result))
            self.add(owner, replace(value, inputs=changed, shape=owner.shape, space=whole))


def _space(op: str, args: tuple, values: list[Value], result: Tensor) -> tuple[int, int] | None:
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
        order = list(range(rank))
        if op == "permute":
            order = [d % rank for d in args[1]]
        else:
            a, b = (0, 1) if op == "t" else (args[1] % rank, args[2] % rank)
            order[a], order[b] = order[b], order[a]
        return order.index(rows), order.index(columns)
    if op in _VIEWS or len(shape) != rank:
        if rows == rank - 2 and columns == rank - 1 and len(shape) >= 3 and shape[-2:] == before.shape[-2:]:
            return len(shape) - 2, len(shape) - 1
        return (rows, columns) if shape[: columns + 1] == before.shape[: columns + 1] else None
    sizes, sizes_before = [(s[rows], s[columns]) for s in (shape, before.shape)]
    if op not in ("max_pool2d_with_indices", "cat", "slice") and any(
        now == 1 < was for now, was in zip(sizes, sizes_before, strict=True)
    ):
        return None  # pooled to one pixel, row or column: no map any more
    return rows, columns


def tensors(value: Any) -> Iterator[Tensor]:
    """Those in it, however deep in tuples, lists and mappings."""
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def example_of(model: nn.Module, image_size: int | tuple[int, int]) -> Iterator[Tensor]:
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
        candidates = ((image,) for image in example_of(model, image_size))
    failure, shape = None, None
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
        raise UserError(f"{type(model).__name__}: does not run on the example ({cause})") from failure
    raise UserError(
        f"{type(model).__name__}: does not run on images {shape[0]} ({cause}); {_way_out(model, image_size, failure)}"
    ) from failure


def classifier_name(model: nn.Module, image_size: int | None = None, example: Any = None) -> str:
    """The module that makes the logits: the last linear layer or convolution that runs, with one output a class.

    Raises:
        UserError: that layer has another number of outputs, so that there may be parameters behind it; or the network
            does not run on images of this size.
    """
    outputs = watch(model, image_size, example).outputs
    modules = dict(model.named_modules())
    layers = [name for name in outputs if isinstance(modules[name], nn.Linear | nn.Conv2d)]  # in order of completion
    if layers and "" in outputs:
        output = outputs[layers[-1]]
        count = output.shape[-1] if isinstance(modules[layers[-1]], nn.Linear) else output.shape[-3]
        if outputs[""].dim() == 2 and count == outputs[""].shape[1]:
            return layers[-1]
    raise UserError(
        f"{type(model).__name__}: no classifier found: its last linear layer or convolution has not one output a class"
    )


def _way_out(model: nn.Module, image_size: int | tuple[int, int], failure: Exception | None) -> str:
    """What to do with a network that takes no such images: a part that does, or the arguments to give."""
    if not any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in model.modules()):
        return "it has no nn.Conv2d, and the perturbation acts on feature maps of CNNs"
    takes_more = isinstance(failure, TypeError | LookupError | AttributeError)  # than an image
    for name, part in model.named_modules():
        if takes_more and name and any(isinstance(m, nn.Conv2d) for m in part.modules()) and list(part.children()):
            with contextlib.suppress(Exception):
                _dry_run(part, (next(example_of(part, image_size)),), "meta")
                return f"attach to its part {name!r}, or give example=(…), what it runs on"
    return "is image_size right? (image_size=(height, width), or example=(…), what it runs on)"


def _dry_run(model: nn.Module, arguments: tuple, device: str | None) -> Trace:
    recorder = _Recorder()
    names = {module: name for name, module in model.named_modules()}

    def moved(value: Any) -> Any:
        return tree_map_only(Tensor, lambda t: t.detach().to(device) if device else t.detach().clone(), value)

    def enter(module: nn.Module, args: tuple) -> tuple | None:
        recorder.stack.append(names[module])
        taken.append(recorder.position(args[0]) if args else None)

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        name = recorder.stack.pop()
        first = output[0] if type(output) is tuple and output else output
        recorder.trace.calls.append(Call(name, recorder.stack[-1], taken.pop(), recorder.position(first)))
        recorder.trace.outputs.pop(name, None)
        if isinstance(output, Tensor):
            recorder.trace.outputs[name] = output

    taken: list[int | None] = []
    images = moved(arguments)
    for image in tensors(images):
        recorder.add_input(image)
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
        with recorder:
            result = torch.func.functional_call(model, state, images, strict=False)
    recorder.trace.returned = {p for p in map(recorder.position, tensors(result)) if p is not None}
    return recorder.trace


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
