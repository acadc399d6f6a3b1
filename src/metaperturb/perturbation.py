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
from metaperturb.kernels import fused, fused_backend, plain
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
    """How a network uses φ; `Attachment` says what each of these is."""

    strength: float = 1.0
    noise: bool = True
    gate: bool = True
    clip: float | None = CLIP
    paper: bool = True
    clip_eval: bool = False
    deterministic: bool = False
    amplitude: float = 1.0


class UsesPhi(nn.Module):
    """Uses φ without owning it: φ is neither its child, nor among its parameters."""

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
        strength: c in [0, 1]; 0 makes every site the identity.
        paper: whether the sites compute what the paper says, or multiply by noise of mean one.
        amplitude: of the noise of mean one at strength 1; a choice of `attach`, not to be set here.
        clip: k, the bound of what sites return, or None: in the paper's arithmetic from above and in training only,
            else of the absolute value and always.
        clip_eval: whether the paper's bound holds in evaluation, too.
        deterministic: whether the sites multiply by E[z | h] in place of a draw of z; `make_deterministic` sets it.
        before: batch norm's statistics from before that, one after the other, or None.
        noise: whether the sites multiply by z; a choice of `attach`, not to be set here.
        gate: whether the sites multiply by s; likewise.
        specs: where the sites are, in the order in which the network runs them.
        sites: the sites, likewise.

    Raises:
        UserError: a state is loaded that was saved with other `noise`, `gate` or `paper`.
        ValueError: a strength or clip out of range.
    """

    def __init__(self, phi: MetaPerturb, **usage: Any) -> None:
        super().__init__()
        self._phi = (phi,)  # in a tuple, so that nn.Module does not register φ as a child
        self._original: weakref.ref[Attachment] | None = None
        self.specs: list[Any] = []
        self.sites: list[PerturbSite] = []
        self.before: Tensor | None = None
        like = phi.flat
        with torch.inference_mode(False):
            self.register_buffer("usage", torch.zeros(len(Usage._fields), device=like.device, dtype=_precision(like)))
        self._write(Usage(**usage))

    @property
    def phi(self) -> MetaPerturb:
        return self._phi[0]

    attachment = property(lambda self: self)  # for what it has in common with its sites

    @property
    def draws(self) -> bool:
        """Whether the sites draw noise, as they are now."""
        usage = self.current()
        return usage.noise and usage.strength > 0 and not usage.deterministic

    def current(self) -> Usage:
        """What the buffer says; a GPU is waited for only where something has changed the buffer."""
        buffer = self.usage
        if (
            torch.compiler.is_compiling()
            or type(buffer) is not Tensor
            or buffer.is_meta
            or torch._C._functorch.is_functorch_wrapped_tensor(buffer)
        ):
            return self._usage
        if buffer.device.type != "cpu" and self._seen == _identity(buffer):
            return self._usage
        values = buffer.tolist()
        if values != self._written:
            original = self._original() if self._original else None
            self._write(original.current() if original else _usage(values))
        self._seen = _identity(self.usage)
        return self._usage

    def _write(self, usage: Usage) -> None:
        if not 0.0 <= usage.strength <= 1.0:
            raise ValueError(f"strength must lie in [0, 1], got {usage.strength}")
        if usage.clip is not None and not usage.clip > 0:
            raise ValueError(f"clip must be positive or None, got {usage.clip}")
        values = torch.tensor([float(value or 0) for value in usage], dtype=self.usage.dtype, device="cpu")
        with torch.no_grad():
            self.usage.copy_(values)
        self._usage, self._written, self._seen = usage, values.tolist(), _identity(self.usage)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Attachment":
        memo[id(self)] = copied = self.__class__.__new__(self.__class__)
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        copied.__dict__["_original"] = weakref.ref(self)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        self.current()
        return {**self.__dict__, "_original": None}

    def _apply(self, fn, recurse: bool = True):
        usage = self.current()
        super()._apply(fn, recurse)
        self.usage = self.usage.to(_precision(self.usage))  # .half() would round the strength
        self._write(usage)
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
        saved = state_dict.get(f"{prefix}usage")
        if saved is None:
            return super()._load_from_state_dict(state_dict, prefix, *arguments)
        usage = _usage(saved.tolist())
        for name in ("noise", "gate", "paper"):
            was, own = getattr(usage, name), getattr(self._usage, name)
            if was != own:
                raise UserError(f"this state was saved with {name}={was}, the network was attached with {own}")
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._original = None
        self._write(usage)

    def extra_repr(self) -> str:
        return "\n".join(map(str, (self._usage, *self.specs)))


def _precision(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _identity(buffer: Tensor) -> tuple[int, int] | None:
    """Of a buffer as it is now; another one when something has written to it."""
    return None if buffer.is_inference() else (id(buffer), buffer._version)


def _usage(values: list[float]) -> Usage:
    """`Usage` as a state holds it. Averaged states are a little off: ten times 0.1 is 1.0000001."""
    strength, noise, gate, clip, *switches, amplitude = values
    if not -1e-3 <= strength <= 1 + 1e-3:
        raise UserError(f"this state has strength {strength:g}, which must lie in [0, 1]")
    switches = [value > 0.5 for value in switches]
    return Usage(min(max(strength, 0.0), 1.0), noise > 0.5, gate > 0.5, clip or None, *switches, amplitude)


def _shared(name: str, settable: bool = True) -> property:
    def get(self: "Attachment | PerturbSite") -> Any:
        return getattr(self.attachment.current(), name)

    def set_(self: "Attachment | PerturbSite", value: Any) -> None:
        if name in ("paper", "clip_eval", "deterministic") and not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
        self.attachment._write(self.attachment.current()._replace(**{name: value}))

    return property(get, set_ if settable else None)


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
        noise: False is an ablation of table 3 (a), which sets z to 1.
        gate: False is another, which sets s to 1.
        attachment: what it shares with the other sites of a network; else it has one of its own, with the paper's
            arithmetic.
        relu: whether a ReLU follows, which the site then computes.

    Attributes:
        strength, clip, paper, clip_eval: those of the `Attachment`, for all its sites.
        running_mean: `[C, 4]`, what evaluation computes the scale from.
        running_var: `[C, 4]`, likewise.
        running_rms: of a scale-free φ: the root mean square of the map, a scalar, likewise; else None.

    In the paper's arithmetic and training mode the scale comes from the batch, and the running statistics follow it
    (momentum 0.1, unbiased variance); in evaluation mode it comes from the running statistics. A single image has no
    variance: in training it takes the running statistics, too, and leaves them. Noise is drawn in both modes from
    PyTorch's global generator of the device, or given by the caller.

    The root mean square of a scale-free φ is that of the whole batch, all channels and pixels, so that images and
    channels still differ, and predictions do not depend on the other images. No gradient flows through it. In
    evaluation an image far from those of training still gets larger noise from site to site: only a bound
    (`clip_eval`) keeps it finite.

    Raises:
        ValueError: a feature map of other shape, noise of other shape, or a strength or clip out of range.
        UserError: gradients of single images under `torch.func.vmap`, in training; a state is loaded of which φ was
            scale-free and this one is not, or the other way round.

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
        *,
        noise: bool = True,
        gate: bool = True,
        attachment: Attachment | None = None,
        relu: bool = False,
    ) -> None:
        super().__init__()
        self.relu = relu
        channel_norm = channels if channel_norm is None else channel_norm
        if min(channels, channel_norm, size_norm) < 1:
            sizes = f"{channels}, {channel_norm}, {size_norm}"
            raise ValueError(f"channels, channel_norm and size_norm must be positive, got {sizes}")
        self._attachment = (attachment or Attachment(phi, noise=noise, gate=gate),)
        self.channels, self.channel_norm, self.size_norm = channels, channel_norm, size_norm
        statistics = (channels, NUM_SCALE_FEATURES)
        like = {"device": phi.flat.device, "dtype": phi.flat.dtype}
        self.register_buffer("running_mean", torch.zeros(statistics, **like))
        self.register_buffer("running_var", torch.ones(statistics, **like))
        self.register_buffer("running_rms", torch.ones((), **like) if phi.scale_free else None)

    @property
    def attachment(self) -> Attachment:
        return self._attachment[0]

    @property
    def phi(self) -> MetaPerturb:
        return self.attachment.phi

    def forward(self, h: Tensor, noise: Tensor | None = None, shortcut: Tensor | None = None) -> Tensor:
        """Perturb `h` `[B, C, H, W]`, or `h + shortcut`; `noise` `[B, C, H, W]` replaces the drawn ε."""
        if isinstance(h, torch.fx.Proxy):
            # In a trace by torch.fx, a module that the graph calls: what is inside depends on values.
            added = {} if shortcut is None else {"shortcut": shortcut}
            return h.tracer.create_proxy("call_module", h.tracer.path_of_module(self), (h,), added)
        usage = self.attachment.current()
        if shortcut is not None and (self.training or not usage.paper or usage.strength == 0.0):
            h, shortcut = h + shortcut, None
        if not usage.paper:
            return self._rectified(self._with_mean_one(h, noise, usage))
        if usage.strength == 0.0 and not (
            self.training and h.dim() == 4 and h.shape[:2] == (h.shape[0], self.channels)
        ):
            return self._rectified(h)
        self._check(h, noise)
        flat, settings = self._flat(h), self._settings(h, noise)
        backend = fused_backend(h, flat, noise, self.running_mean, self.running_var)
        if shortcut is not None and (backend is None or not fused.adds(backend, h, shortcut)):
            h, shortcut = h + shortcut, None
        draws, h = self._draws(h, backend) if noise is None and settings.noise and not settings.expected else (1, h)
        if backend is not None:
            running = self.running_mean, self.running_var
            return fused.perturb(backend, h, flat, noise, *running, settings, draws, shortcut)
        phi = Phi.of(flat)
        mean, var = self._statistics(h, phi)
        if settings.training:
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), MOMENTUM)
                self.running_var.lerp_(var.to(self.running_var.dtype), MOMENTUM)
        if settings.strength == 0.0:
            return self._rectified(h)
        if settings.noise and not settings.expected and noise is None:
            noise = torch.randn_like(h)
        return plain.perturb(h, phi, mean, var, noise, settings)

    def _rectified(self, out: Tensor) -> Tensor:
        return F.relu(out) if self.relu else out

    def _with_mean_one(self, h: Tensor, noise: Tensor | None, usage: Usage) -> Tensor:
        strength = usage.strength * usage.amplitude
        if strength == 0.0 or (usage.deterministic and noise is None):
            return h
        self._check(h, noise)
        flat = self._flat(h)
        backend = fused_backend(h, flat, noise, self.running_mean, self.running_var)
        draws, h = self._draws(h, backend) if noise is None else (1, h)
        if backend is not None:
            factor = fused.relative_noise(backend, h, flat, noise, strength, draws)
        else:
            noise = torch.randn_like(h) if noise is None else noise
            factor = plain.relative_noise(h, Phi.of(flat), noise, strength)
        out = (factor.unflatten(0, (draws, -1)) * h).flatten(0, 1) if draws > 1 else h * factor
        return out if usage.clip is None else out.clamp(-usage.clip, usage.clip)

    def scale(self, h: Tensor) -> Tensor:
        """s: `[C]`, from the batch in training mode, from the running statistics in evaluation mode."""
        self._check(h)
        phi, settings = self.phi.tensors(), self._settings(h)
        return plain.scale(*self._statistics(h, phi), phi, settings.channel_ratio, settings.size_ratio).to(h.dtype)

    def _draws(self, h: Tensor, backend: Any) -> tuple[int, Tensor]:
        """How many draws of each image are due here, and `h`, repeated where the kernel draws but once an image."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or (draws := _draws_due.get()) == 1:
            return 1, h
        _draws_due.set(1)
        return (draws, h) if backend is not None and backend.MANY_DRAWS else (1, h.repeat(draws, 1, 1, 1))

    def _settings(self, h: Tensor, noise: Tensor | None = None) -> Settings:
        usage = self.attachment.current()
        return Settings(
            training=self._uses_batch(h),
            noise=usage.noise,
            gate=usage.gate,
            strength=usage.strength,
            clip=usage.clip if self.training or usage.clip_eval else None,
            channel_ratio=self.channels / self.channel_norm,
            size_ratio=h.shape[2] / self.size_norm,
            expected=usage.deterministic and noise is None,
            relu=self.relu,
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

    def _statistics(self, h: Tensor, phi: Phi) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance over the batch (training) or the running ones: `[C, 4]` each."""
        return plain.batch_statistics(h, phi) if self._uses_batch(h) else (self.running_mean, self.running_var)

    def _check(self, h: Tensor, noise: Tensor | None = None) -> None:
        if h.dim() != 4 or h.shape[1] != self.channels:
            raise ValueError(f"expected a feature map [B, {self.channels}, H, W], got {list(h.shape)}")
        if h.is_quantized:
            raise UserError("φ acts on numbers, and these are quantized; quantize a network without φ: detach(model)")
        if noise is not None and noise.shape != h.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, the feature map {tuple(h.shape)}")
        if self.training and not torch.compiler.is_compiling() and _is_batched(h):
            raise UserError("φ acts on whole batches: there are no gradients of single ones (torch.func.vmap)")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        saved, own = f"{prefix}running_rms" in state_dict, self.phi.scale_free
        if f"{prefix}running_mean" in state_dict and saved != own:
            raise UserError(f"this state was saved with scale_free={saved}, the network was attached with {own}")
        super()._load_from_state_dict(state_dict, prefix, *arguments)

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


for _name in Usage._fields:
    setattr(Attachment, _name, _shared(_name, settable=_name not in ("noise", "gate", "amplitude")))
    setattr(PerturbSite, _name, _shared(_name))


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
        h = h if shortcut is None else h + shortcut
        done = any(isinstance(site, PerturbSite) for site in self.children())
        return F.relu(h) if self.relu and not done else h
