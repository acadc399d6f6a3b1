"""The perturbation of MetaPerturb: 82 shared parameters φ and the places ("sites") where they act.

Section numbers refer to Ryu et al., NeurIPS 2020. A feature map is `h`: `[B, C, H, W]`. φ multiplies it by

    g(h) = s ∘ softplus(μ(h) + ε),   ε ~ N(0, I)                                              (eqs. 1, 2)

where μ is a two-layer convolution that is equivariant to permutations of the channels and `s ∈ [0, 1]^C` is a
scale a channel, computed from the statistics of the batch. One `MetaPerturb` (φ) serves every layer of every network;
a `PerturbSite` adds what belongs to one place in one network: running statistics, strength and clip.
"""

from typing import Any

import torch
from torch import Tensor, nn

from metaperturb.kernels import fused, fused_backend, plain
from metaperturb.kernels.plain import MOMENTUM, NUM_SCALE_FEATURES, Phi, Settings

CLIP = 100.0  # k of section 3.2


class MetaPerturb(nn.Module):
    """The 82 parameters φ of the perturbation and the functions they define (section 3.2, figure 2).

    | parameter | shape | role |
    |---|---|---|
    | `self1`, `all1` | `[3, 3]` each | first layer of μ: kernels λ₁ (each channel) and γ₁ (mean over channels) |
    | `self2`, `all2` | `[3, 3]` each | second layer of μ: λ₂ and γ₂ |
    | `scale_kernels` | `[4, 3, 3]` | four feature maps a channel, shared by all channels |
    | `scale_affine` | `[10]` | statistics of a channel → logit of its scale |

    The all-kernel acts on the *mean* over all channels, as in the authors' code, where the paper writes a sum over the
    other channels: the number of channels then does not set the magnitude.

    All parameters start from N(0, 0.01²). They belong to φ alone: a site or network that uses φ does not list them
    among its own parameters, so `optimizer(model.parameters())` trains θ and leaves φ as it is.

    Example:
        >>> phi = MetaPerturb()
        >>> sum(p.numel() for p in phi.parameters())
        82
    """

    def __init__(self) -> None:
        super().__init__()
        for name in ("self1", "all1", "self2", "all2"):
            setattr(self, name, nn.Parameter(0.01 * torch.randn(3, 3)))
        self.scale_kernels = nn.Parameter(0.01 * torch.randn(NUM_SCALE_FEATURES, 3, 3))
        self.scale_affine = nn.Parameter(0.01 * torch.randn(2 * NUM_SCALE_FEATURES + 2))

    def noise_mean(self, h: Tensor) -> Tensor:
        """μ(h), the mean of the noise before softplus: `[B, C, H, W]` → `[B, C, H, W]`."""
        return plain.noise_mean(h, self.tensors())

    def tensors(self) -> Phi:
        """The parameters, by name, in the form that the kernels take."""
        return Phi(*(getattr(self, name) for name in Phi._fields))

    def extra_repr(self) -> str:
        return f"{sum(p.numel() for p in self.parameters())} parameters"


class UsesPhi(nn.Module):
    """Uses φ without owning it: φ is neither its child, nor among its parameters or in its state.

    Raises:
        AttributeError: `phi` is set.
    """

    _phi: tuple[MetaPerturb]  # in a tuple, so that nn.Module does not register φ as a child

    @property
    def phi(self) -> MetaPerturb:
        return self._phi[0]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "phi":  # the property cannot refuse it: nn.Module makes a module its child before it asks
            raise AttributeError("φ cannot be exchanged: load into it (phi.load_state_dict), or detach and attach anew")
        super().__setattr__(name, value)


class PerturbSite(UsesPhi):
    """One place in a network where φ perturbs the feature map: `h ← h ∘ ((g(h) − 1)·c + 1)`.

    Args:
        phi: the shared φ. It is referred to, not owned: `site.parameters()` is empty and the state dict of a site
            holds only its running statistics. Moving the site (`.to`, `.double`) moves φ along, for all who use it.
        channels: C of the feature map.
        channel_norm: channels of the widest perturbed layer of the network (default: `channels`).
        size_norm: height of the network's input images in pixels.
        noise, gate: ablations of table 3 (a): `noise=False` sets z to 1, `gate=False` sets s to 1.

    Attributes:
        strength: c in [0, 1]; 0 makes the site the identity.
        clip: upper bound of the output in training, or None.
        clip_eval: whether evaluation clips, too; the paper's does not [False].
        running_mean, running_var: `[C, 4]` buffers, the statistics that evaluation uses.

    In training mode the scale comes from the batch and the running statistics follow it (momentum 0.1, unbiased
    variance); in evaluation mode it comes from the running statistics. Noise is drawn in both modes from PyTorch's
    global generator of the device, or given by the caller.

    Raises:
        ValueError: a feature map of other shape, a batch of one image in training, noise of other shape, or a
            strength or clip out of range.

    Example:
        >>> site = PerturbSite(MetaPerturb(), channels=16, channel_norm=64, size_norm=32)
        >>> site(torch.randn(8, 16, 32, 32)).shape
        torch.Size([8, 16, 32, 32])
    """

    _clip_eval = False  # of the class, for what was pickled before there was a choice

    def __init__(
        self,
        phi: MetaPerturb,
        channels: int,
        channel_norm: int | None = None,
        size_norm: int = 32,
        *,
        noise: bool = True,
        gate: bool = True,
    ) -> None:
        super().__init__()
        channel_norm = channels if channel_norm is None else channel_norm
        if min(channels, channel_norm, size_norm) < 1:
            raise ValueError(
                f"channels, channel_norm and size_norm must be positive, got {channels}, {channel_norm}, {size_norm}"
            )
        self._phi = (phi,)
        self.channels, self.channel_norm, self.size_norm = channels, channel_norm, size_norm
        self.noise, self.gate = noise, gate
        self.strength = 1.0
        self.clip = CLIP
        statistics = (channels, NUM_SCALE_FEATURES)
        like = {"device": phi.self1.device, "dtype": phi.self1.dtype}
        self.register_buffer("running_mean", torch.zeros(statistics, **like))
        self.register_buffer("running_var", torch.ones(statistics, **like))

    @property
    def strength(self) -> float:
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"strength must lie in [0, 1], got {value}")
        self._strength = float(value)

    @property
    def clip(self) -> float | None:
        return self._clip

    @clip.setter
    def clip(self, value: float | None) -> None:
        if value is not None and not value > 0:
            raise ValueError(f"clip must be positive or None, got {value}")
        self._clip = None if value is None else float(value)

    @property
    def clip_eval(self) -> bool:
        return self._clip_eval

    @clip_eval.setter
    def clip_eval(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"clip_eval must be True or False, got {value!r}")
        self._clip_eval = value

    def forward(self, h: Tensor, noise: Tensor | None = None) -> Tensor:
        """Perturb `h` `[B, C, H, W]`; `noise` `[B, C, H, W]` replaces the drawn ε."""
        self._check(h, noise)
        phi, settings = self.phi.tensors(), self._settings(h)
        backend = fused_backend(h, phi, noise, self.running_mean, self.running_var)
        if backend is not None:
            return fused.perturb(backend, h, phi, noise, self.running_mean, self.running_var, settings)
        mean, var = self._statistics(h, phi)
        if self.training:
            self._track(mean, var)
        if self.strength == 0.0:
            return h
        if self.noise and noise is None:
            noise = torch.randn_like(h)
        return plain.perturb(h, phi, mean, var, noise, settings)

    def scale(self, h: Tensor) -> Tensor:
        """s: `[C]`, from the batch in training mode, from the running statistics in evaluation mode."""
        self._check(h)
        phi, settings = self.phi.tensors(), self._settings(h)
        return plain.scale(*self._statistics(h, phi), phi, settings.channel_ratio, settings.size_ratio).to(h.dtype)

    def _settings(self, h: Tensor) -> Settings:
        return Settings(
            training=self.training,
            noise=self.noise,
            gate=self.gate,
            strength=self.strength,
            clip=self.clip if self.training or self.clip_eval else None,
            channel_ratio=self.channels / self.channel_norm,
            size_ratio=h.shape[2] / self.size_norm,
        )

    def _statistics(self, h: Tensor, phi: Phi) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance over the batch (training) or the running ones: `[C, 4]` each."""
        return plain.batch_statistics(h, phi) if self.training else (self.running_mean, self.running_var)

    def _check(self, h: Tensor, noise: Tensor | None = None) -> None:
        if h.dim() != 4 or h.shape[1] != self.channels:
            raise ValueError(f"expected a feature map [B, {self.channels}, H, W], got {list(h.shape)}")
        if self.training and h.shape[0] < 2:
            raise ValueError("the perturbation needs at least 2 images a batch in training (variance over the batch)")
        if noise is not None and noise.shape != h.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, the feature map {tuple(h.shape)}")

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), MOMENTUM)
        self.running_var.lerp_(var.to(self.running_var.dtype), MOMENTUM)

    def _apply(self, fn, recurse: bool = True):
        self.phi._apply(fn)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.channels}, channel_norm={self.channel_norm}, size_norm={self.size_norm}"


class Slot(nn.Identity):
    """Marks, inside a network's own forward pass, a place for a site; without an attached φ it does nothing.

    `attach` prefers slots to what it would find by itself: a network written for this library says where to perturb.
    """
