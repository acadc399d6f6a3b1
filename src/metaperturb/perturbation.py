"""The perturbation of MetaPerturb: 82 shared parameters φ and the places ("sites") where they act.

Section numbers refer to Ryu et al., NeurIPS 2020. A feature map is `h`: `[B, C, H, W]`. φ multiplies it by

    g(h) = s ∘ softplus(μ(h) + ε),   ε ~ N(0, I)                                              (eqs. 1, 2)

where μ is a two-layer convolution that is equivariant to permutations of the channels and `s ∈ [0, 1]^C` is a
scale a channel, computed from the statistics of the batch. One `MetaPerturb` (φ) serves every layer of every network;
a `PerturbSite` adds what belongs to one place in one network: running statistics, strength and clip.
"""

import contextlib
import contextvars
import copy
import math
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaperturb.errors import UserError
from metaperturb.kernels import fused, kernel_for, plain
from metaperturb.kernels.plain import HALF_PRECISION, MOMENTUM, NUM_SCALE_FEATURES, PHI_SHAPES, Phi, Settings

CLIP = 100.0  # k of section 3.2
FIRST_LAYER = 18  # of the 82 parameters: λ₁ and γ₁
TINY = 1e-6  # a map of zeros is divided by this
_draws_due = contextvars.ContextVar("draws_due", default=1)


def _part(name: str) -> property:
    return property(lambda phi: getattr(phi.tensors(), name))


class MetaPerturb(nn.Module):
    """The 82 parameters φ of the perturbation and the functions they define (section 3.2, figure 2).

    They are one parameter, `flat` `[82]`, with a view for each of its parts:

    | view | shape | role |
    |---|---|---|
    | `self1`, `all1` | `[3, 3]` each | first layer of μ: kernels λ₁ (each channel) and γ₁ (mean over channels) |
    | `self2`, `all2` | `[3, 3]` each | second layer of μ: λ₂ and γ₂ |
    | `scale_kernels` | `[4, 3, 3]` | four feature maps a channel, shared by all channels |
    | `scale_affine` | `[10]` | statistics of a channel → logit of its scale |

    The all-kernel acts on the *mean* over all channels, as in the authors' code, where the paper writes a sum over the
    other channels: the number of channels then does not set the magnitude.

    All start from N(0, 0.01²). They belong to φ alone: a site or network that uses φ does not list them among its own
    parameters, so `optimizer(model.parameters())` trains θ and leaves φ as it is.

    Args:
        scale_free: beyond the paper: μ is of h divided by its root mean square, so that z does not grow with the size
            of the maps, which differs from network to network. It is a property of φ, to be given when it is made.

    Examples:
        >>> phi = MetaPerturb()
        >>> phi.flat.shape, phi.scale_kernels.shape
        (torch.Size([82]), torch.Size([4, 3, 3]))
    """

    self1, all1, self2, all2, scale_kernels, scale_affine = map(_part, Phi._fields)

    def __init__(self, scale_free: bool = False) -> None:
        super().__init__()
        self.scale_free = scale_free
        if scale_free:
            self.register_buffer("scale_free_mark", torch.ones(()))  # so that its state dict says so
        self.flat = nn.Parameter(torch.cat([0.01 * torch.randn(shape).flatten() for shape in PHI_SHAPES]))

    def noise_mean(self, h: Tensor) -> Tensor:
        """μ(h), the mean of the noise before softplus: `[B, C, H, W]` → `[B, C, H, W]`."""
        return plain.noise_mean(h, Phi.of(self.for_size(rms(h)) if self.scale_free else self.flat))

    def for_size(self, size: Tensor) -> Tensor:
        """φ `[82]` whose μ(h) is that of h / size: μ has no bias and a ReLU inside, so its first layer divides."""
        return torch.cat([self.flat[:FIRST_LAYER] / size.clamp_min(TINY), self.flat[FIRST_LAYER:]])

    def tensors(self) -> Phi:
        """The views by name, which is how the plain operators take φ."""
        return Phi.of(self.flat)

    def extra_repr(self) -> str:
        return f"{sum(p.numel() for p in self.parameters())} parameters" + ", scale-free" * self.scale_free


@torch.no_grad()
def rms(h: Tensor) -> Tensor:
    """Root mean square of a feature map, over all its dimensions: a scalar, without a gradient."""
    dtype = torch.float32 if h.dtype in HALF_PRECISION else None
    of_images = torch.linalg.vector_norm(h.detach(), dim=(1, 2, 3), dtype=dtype)  # one sum of all would lose digits
    return torch.linalg.vector_norm(of_images) / math.sqrt(h.numel())


class Usage(NamedTuple):
    """How a network uses φ.

    Attributes:
        strength: c in [0, 1]; 0 makes every site the identity.
        noise: whether the sites multiply by z.
        gate: whether the sites multiply by s.
        clip: k, the bound of what sites return, or None: in the paper's arithmetic from above and in training only,
            else of the absolute value and always.
        paper: whether the sites compute what the paper says, or multiply by noise of mean one.
        clip_eval: whether the paper's bound holds in evaluation, too.
        deterministic: whether the sites multiply by E[z | h] in place of a draw of z; `make_deterministic` sets it.
        amplitude: of the noise of mean one at strength 1.
    """

    strength: float = 1.0
    noise: bool = True
    gate: bool = True
    clip: float | None = CLIP
    paper: bool = True
    clip_eval: bool = False
    deterministic: bool = False
    amplitude: float = 1.0

    @property
    def draws(self) -> bool:
        """Whether the sites draw noise."""
        return self.noise and self.strength > 0 and not self.deterministic


class UsesPhi(nn.Module):
    """Uses φ without owning it: φ is neither its child, nor among its parameters. `Usage` is what all share."""

    @property
    def phi(self) -> MetaPerturb:
        return self.attachment._phi[0]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "phi":  # the property cannot refuse it: nn.Module makes a module its child before it asks
            raise AttributeError("φ cannot be exchanged: load into it (phi.load_state_dict), or detach and attach anew")
        super().__setattr__(name, value)


class Attachment(UsesPhi):
    """φ in one network: what all its sites share. It belongs to the first of them, and is in their state once.

    Its state is the 82 values of φ and a buffer with all of `Usage`, so that a reloaded network evaluates identically;
    of a deterministic network also what `make_stochastic` needs.
    An average of the network (timm's `ModelEma`, PyTorch's `AveragedModel`) averages buffers, which makes no sense of a
    strength: a copy whose buffer something else has changed takes what its original has then.

    Attributes:
        phi: the shared φ, not to be set. It is referred to, not owned: `parameters()` is empty.
        strength, clip, …: those of `Usage`, which may be set.
        before: of a deterministic network batch norm's statistics from before, one after the other, or None.
        specs: where the sites are, in the order in which the network runs them.
        sites: the sites, likewise.

    Raises:
        ValueError: a strength or clip out of range.
    """

    def __init__(self, phi: MetaPerturb, **usage: Any) -> None:
        super().__init__()
        self._phi = (phi,)  # in a tuple, so that nn.Module does not register φ as a child
        self._original: weakref.ref[Attachment] | None = None
        self.specs: list[Any] = []
        self.sites: list[PerturbSite] = []
        self.before: Tensor | None = None
        self._renew(phi.flat, Usage(**usage))

    attachment = property(lambda self: self)

    def current(self) -> Usage:
        """What the buffer says; it is read, and a GPU waited for, only where something else has written to it."""
        buffer = self.usage
        if not (
            torch.compiler.is_compiling()
            or type(buffer) is not Tensor
            or buffer.is_meta
            or torch._C._functorch.is_functorch_wrapped_tensor(buffer)
            or self._seen == _content(buffer)
        ):
            if original := self._original and self._original():
                self._write(original.current())
            else:
                self._usage, self._seen = _usage(buffer.tolist()), _content(buffer)
        return self._usage

    def _write(self, usage: Usage) -> None:
        if not 0.0 <= usage.strength <= 1.0:
            raise ValueError(f"strength must lie in [0, 1], got {usage.strength}")
        if usage.clip is not None and not usage.clip > 0:
            raise ValueError(f"clip must be positive or None, got {usage.clip}")
        values = torch.tensor([float(value or 0) for value in usage], dtype=self.usage.dtype, device="cpu")
        with torch.no_grad():
            self.usage.copy_(values)
        self._usage, self._seen = usage, _content(self.usage)

    def _renew(self, like: Tensor, usage: Usage) -> None:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32  # half would round the strength
        self.register_buffer("usage", torch.empty(len(usage), device=like.device, dtype=dtype))
        self._write(usage)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Attachment":
        memo[id(self)] = copied = self.__class__.__new__(self.__class__)
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        copied.__dict__.update(_original=weakref.ref(self), _seen=_content(copied.usage))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        self.current()
        return {**self.__dict__, "_original": None}

    def _apply(self, fn, recurse: bool = True):
        usage = self.current()
        super()._apply(fn, recurse)
        self._renew(self.usage, usage)
        return self

    def get_extra_state(self) -> Tensor:
        """φ: `[82]`, and of a deterministic network `before` behind it. A tensor: averages of networks need one."""
        phi = self.phi.flat.detach().clone()
        return phi if self.before is None else torch.cat([phi.cpu().double(), self.before])

    def set_extra_state(self, state: Tensor) -> None:
        if self.phi.flat.is_meta:
            raise UserError("φ is on the meta device and takes no values: model.to_empty(device=…) before loading")
        phi, before = state[: self.phi.flat.numel()], state[self.phi.flat.numel() :]
        with torch.no_grad():
            self.phi.flat.copy_(phi)
        self.before = before.cpu().double() if len(before) else None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._original = None
        self.current()

    def extra_repr(self) -> str:
        return "\n".join(map(str, (self._usage, *self.specs)))


def _content(buffer: Tensor) -> Any:
    """What tells whether something has written to a buffer: its values, or what is known of them without a wait."""
    if buffer.device.type == "cpu":
        return buffer.tolist()
    return id(buffer), None if buffer.is_inference() else buffer._version


def _usage(values: list[float]) -> Usage:
    """`Usage` as a state holds it. Averaged states are a little off: ten times 0.1 is 1.0000001."""
    strength, noise, gate, clip, *switches, amplitude = values
    if not -1e-3 <= strength <= 1 + 1e-3:
        raise UserError(f"this state has strength {strength:g}, which must lie in [0, 1]")
    switches = [value > 0.5 for value in switches]
    return Usage(min(max(strength, 0.0), 1.0), noise > 0.5, gate > 0.5, clip or None, *switches, amplitude)


def _shared(name: str) -> property:
    def get(self: UsesPhi) -> Any:
        return getattr(self.attachment.current(), name)

    def set_(self: UsesPhi, value: Any) -> None:
        if isinstance(Usage._field_defaults[name], bool) and not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
        self.attachment._write(self.attachment.current()._replace(**{name: value}))

    return property(get, set_)


for _name in Usage._fields:
    setattr(UsesPhi, _name, _shared(_name))


@contextlib.contextmanager
def draws_at_first_site(draws: int) -> Iterator[None]:
    """Inside, the first site that draws returns this many draws of each image, `[draws · B, C, H, W]`, the others one.

    For evaluation without gradients. All images of the first draw come first: what follows gets what it would get if
    the network ran on so many repetitions of its images. `metaperturb.prediction` tries out which networks bear it.
    """
    before = _draws_due.set(draws)
    try:
        yield
    finally:
        _draws_due.reset(before)


class PerturbSite(UsesPhi):
    """One place in a network where φ perturbs the feature map.

    | arithmetic | what it returns |
    |---|---|
    | the paper's | `h ∘ ((s ∘ z − 1)·c + 1)`, clipped from above |
    | noise of mean one | `h ∘ ((z / E[z given h] − 1)·c·a + 1)`, with the amplitude a that `attach` chooses |

    z and s are those of g(h). Noise of mean one keeps the mean of the signal at every site, so it can act at many
    places, and in a network that was trained without it. It is a constant for the backward pass, as dropout's is.

    Args:
        phi: the shared φ. It is referred to, not owned: `site.parameters()` is empty and the state dict of a site
            holds only its running statistics. Moving the site (`.to`, `.double`) moves φ along, for all who use it.
        channels: C of the feature map.
        channel_norm: channels of the widest perturbed layer of the network (default: `channels`).
        size_norm: height of the network's input images in pixels.
        attachment: what it shares with the other sites of a network; else it has one of its own, with the paper's
            arithmetic.

    Attributes:
        strength, clip, …: those of the `Attachment`, for all its sites.
        running_mean: `[C, 4]`, what evaluation computes the scale from.
        running_var: `[C, 4]`, likewise.
        running_rms: of a scale-free φ: the root mean square of the map, a scalar, likewise; else None.

    In the paper's arithmetic and training mode the scale comes from the batch, and the running statistics follow it
    (momentum 0.1, unbiased variance); in evaluation mode it comes from the running statistics. A single image has no
    variance: in training it takes the running statistics, too, and leaves them. Noise is drawn in both modes from
    PyTorch's global generator of the device, or given by the caller. The root mean square of a scale-free φ is that of
    the whole batch, and no gradient flows through it.

    Raises:
        ValueError: a feature map of other shape, noise of other shape, or a strength or clip out of range.
        UserError: gradients of single images under `torch.func.vmap`, in training.

    Examples:
        >>> site = PerturbSite(MetaPerturb(), channels=16, channel_norm=64, size_norm=32)
        >>> site(torch.randn(8, 16, 32, 32)).shape
        torch.Size([8, 16, 32, 32])
    """

    def __init__(
        self,
        phi: MetaPerturb,
        channels: int,
        channel_norm: int | None = None,
        size_norm: int = 32,
        attachment: Attachment | None = None,
    ) -> None:
        super().__init__()
        channel_norm = channels if channel_norm is None else channel_norm
        if min(channels, channel_norm, size_norm) < 1:
            sizes = f"{channels}, {channel_norm}, {size_norm}"
            raise ValueError(f"channels, channel_norm and size_norm must be positive, got {sizes}")
        self._attachment = (attachment or Attachment(phi),)
        self.channels, self.channel_norm, self.size_norm = channels, channel_norm, size_norm
        statistics = (channels, NUM_SCALE_FEATURES)
        like = {"device": phi.flat.device, "dtype": phi.flat.dtype}
        self.register_buffer("running_mean", torch.zeros(statistics, **like))
        self.register_buffer("running_var", torch.ones(statistics, **like))
        self.register_buffer("running_rms", torch.ones((), **like) if phi.scale_free else None)

    @property
    def attachment(self) -> Attachment:
        return self._attachment[0]

    def forward(
        self, h: Tensor, noise: Tensor | None = None, shortcut: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """Perturb `h` `[B, C, H, W]`, or `h + shortcut`; `noise` replaces the drawn ε; `relu`: rectify the result."""
        if isinstance(h, torch.fx.Proxy):
            # In a trace by torch.fx, a module that the graph calls: what is inside depends on values.
            options = {"shortcut": shortcut, "relu": relu}
            return h.tracer.create_proxy("call_module", h.tracer.path_of_module(self), (h,), options)
        usage = self.attachment.current()
        idle = usage.strength == 0.0 or not (usage.paper or usage.draws or noise is not None)
        if idle and not (self.training and usage.paper):  # whose statistics move at strength 0, too
            h = h if shortcut is None else h + shortcut
            return F.relu(h) if relu else h
        kernel = kernel_for(h, self.phi.flat, noise, self.running_mean, self.running_var)
        whole = kernel is fused and not torch.is_grad_enabled()
        if shortcut is not None and (self.training or not (usage.paper and whole and fused.alike(h, shortcut))):
            h, shortcut = h + shortcut, None
        self._check(h, noise)
        flat, draws = self._flat(h), 1
        if noise is None and usage.draws and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            draws = _draws_due.get()
            _draws_due.set(1)
        if draws > 1 and not whole:
            h, draws = h.repeat(draws, 1, 1, 1), 1
        more = {"draws": draws} if whole else {}
        if usage.paper:
            more |= {} if shortcut is None else {"shortcut": shortcut}
            settings = self._settings(h, usage, noise, relu)
            return kernel.site(h, flat, noise, self.running_mean, self.running_var, settings, **more)
        factor = kernel.relative_noise(h, flat, noise, usage.strength * usage.amplitude, **more)
        out = (factor.unflatten(0, (draws, -1)) * h).flatten(0, 1) if draws > 1 else h * factor
        out = out if usage.clip is None else out.clamp(-usage.clip, usage.clip)
        return F.relu(out) if relu else out

    def scale(self, h: Tensor) -> Tensor:
        """s: `[C]`, from the batch in training mode, from the running statistics in evaluation mode."""
        self._check(h)
        phi, settings = self.phi.tensors(), self._settings(h, self.attachment.current())
        mean, var = plain.batch_statistics(h, phi) if settings.training else (self.running_mean, self.running_var)
        return plain.scale(mean, var, phi, settings.channel_ratio, settings.size_ratio).to(h.dtype)

    def _settings(self, h: Tensor, usage: Usage, noise: Tensor | None = None, relu: bool = False) -> Settings:
        return Settings(
            training=self._uses_batch(h),
            noise=usage.noise,
            gate=usage.gate,
            strength=usage.strength,
            clip=usage.clip if self.training or usage.clip_eval else None,
            channel_ratio=self.channels / self.channel_norm,
            size_ratio=h.shape[2] / self.size_norm,
            expected=usage.deterministic and noise is None,
            relu=relu,
        )

    def _flat(self, h: Tensor) -> Tensor:
        """φ for this map: `[82]`. In training the running size of a scale-free one follows the map's."""
        if not self.phi.scale_free:
            return self.phi.flat
        size = self.running_rms
        if self._uses_batch(h):
            size = rms(h).to(size.dtype)
            with torch.no_grad():
                self.running_rms.lerp_(size, MOMENTUM)
        return self.phi.for_size(size)

    def _uses_batch(self, h: Tensor) -> bool:
        return self.training and h.shape[0] > 1

    def _check(self, h: Tensor, noise: Tensor | None = None) -> None:
        if h.dim() != 4 or h.shape[1] != self.channels:
            raise ValueError(f"expected a feature map [B, {self.channels}, H, W], got {list(h.shape)}")
        if h.is_quantized:
            raise UserError("φ acts on numbers, and these are quantized; quantize a network without φ: detach(model)")
        if noise is not None and noise.shape != h.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, the feature map {tuple(h.shape)}")
        if self.training and not torch.compiler.is_compiling() and _is_batched(h):
            raise UserError("φ acts on whole batches: there are no gradients of single ones (torch.func.vmap)")

    def _apply(self, fn, recurse: bool = True):
        self.phi._apply(fn)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.channels}, channel_norm={self.channel_norm}, size_norm={self.size_norm}"


def _is_batched(h: Tensor) -> bool:
    """Whether `torch.func.vmap` runs over it, under whatever other transform."""
    while torch._C._functorch.is_functorch_wrapped_tensor(h):
        if torch._C._functorch.is_batchedtensor(h):
            return True
        h = torch._C._functorch.get_unwrapped(h)
    return False


class Slot(nn.Module):
    """Marks, inside a network's own forward pass, a place for a site; without an attached φ it returns what it gets.

    `attach` prefers slots to what it would find by itself: a network written for this library says where to perturb.
    A slot may also make the sum before the site, `slot(h, shortcut)`, and the ReLU behind it: one pass for all three.

    Args:
        relu: whether it ends with a ReLU.
    """

    def __init__(self, relu: bool = False) -> None:
        super().__init__()
        self.relu = relu

    def forward(self, h: Tensor, shortcut: Tensor | None = None, /) -> Tensor:
        sites = list(self.children())
        if len(sites) == 1 and isinstance(sites[0], PerturbSite):
            return sites[0](h, relu=self.relu, **({} if shortcut is None else {"shortcut": shortcut}))
        h = h if shortcut is None else h + shortcut
        for site in sites:
            h = site(h)
        return F.relu(h) if self.relu else h
