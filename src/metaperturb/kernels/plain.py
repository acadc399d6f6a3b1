"""The perturbation in plain PyTorch operators: the reference that every fused kernel has to equal.

Differentiable any number of times, on any device, under `torch.func` and `torch.compile`. Section numbers refer to Ryu
et al., NeurIPS 2020.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_SCALE_FEATURES = 4
NAME = "plain"
HALF_PRECISION = (torch.bfloat16, torch.float16)
MOMENTUM = 0.1  # of the running statistics
STENCILS = False  # while `compiled` compiles: sums in place of convolutions


class Phi(NamedTuple):
    """The parameters φ by name; `MetaPerturb` documents them."""

    self1: Tensor
    all1: Tensor
    self2: Tensor
    all2: Tensor
    scale_kernels: Tensor
    scale_affine: Tensor

    @classmethod
    def of(cls, flat: Tensor) -> "Phi":
        """Views of the flat parameter `[82]`."""
        parts = flat.split([math.prod(shape) for shape in PHI_SHAPES])
        return cls(*(part.view(shape) for part, shape in zip(parts, PHI_SHAPES, strict=True)))


PHI_SHAPES = Phi((3, 3), (3, 3), (3, 3), (3, 3), (NUM_SCALE_FEATURES, 3, 3), (2 * NUM_SCALE_FEATURES + 2,))


@dataclass(frozen=True, slots=True)
class Settings:
    """What a site computes, apart from its tensors; `PerturbSite` documents them.

    `channel_ratio` is C / `channel_norm`, `size_ratio` H / `size_norm`; `clip` None does not clip. `expected` replaces
    z by its expectation E[z | h]. `relu`: of the result.
    """

    training: bool
    noise: bool
    gate: bool
    strength: float
    clip: float | None
    channel_ratio: float
    size_ratio: float
    expected: bool = False
    relu: bool = False


# E[softplus(μ + ε)] = softplus(μ) + u/4 · P(u)/Q(u) with u = 4 σ(μ) σ(−μ): coefficients of P and Q, from the constant
# term on, fitted to numerical integration. The difference to softplus is even and falls like e^−|μ|, as u does.
EXPECTATION_P = (0.64872119, 12.87690728, 51.34353126, 40.60030954, 2.30104965)
EXPECTATION_Q = (1.0, 20.58064118, 92.27215444, 102.97856728, 21.78472695)
MU_RANGE = (-20.0, 1e4)  # outside of it the limits hold to rounding, and inside nothing is 0 / 0


def noise_mean(h: Tensor, phi: Phi) -> Tensor:
    """μ(h): `[B, C, H, W]` → `[B, C, H, W]`."""
    hidden = F.relu(_equivariant_conv(h, phi.self1, phi.all1))
    return _equivariant_conv(hidden, phi.self2, phi.all2)


def scale_features(h: Tensor, kernels: Tensor) -> Tensor:
    """v, four spatial averages of rectified convolutions a channel: `[B, C, H, W]` → `[B, C, 4]`."""
    # One depthwise convolution a kernel: on CPU a quarter of the time of a single one with four outputs a group.
    maps = (F.relu(_depthwise_conv(h, kernel)).mean(dim=(2, 3)) for kernel in kernels)
    return torch.stack(tuple(maps), dim=2)


def batch_statistics(h: Tensor, phi: Phi) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of the scale features over the batch: `[C, 4]` each."""
    features = scale_features(h, phi.scale_kernels)
    if features.dtype in HALF_PRECISION:  # too coarse for a variance
        features = features.float()
    var, mean = torch.var_mean(features, dim=0, correction=1)
    return mean, var


def scale(mean: Tensor, var: Tensor, phi: Phi, channel_ratio: float, size_ratio: float) -> Tensor:
    """s: `[C]`, from statistics `[C, 4]` (figure 2, right)."""
    weight = phi.scale_affine.to(mean.dtype)
    statistics = (torch.cat([mean, var], dim=1) * weight[:-2]).sum(dim=1)  # no matmul: autocast would round its factors
    # The two ratios are numbers of the host: multiplying saves the copy that a tensor of them would cost on a GPU.
    return torch.sigmoid(statistics + weight[-2] * channel_ratio + weight[-1] * size_ratio)


def site(
    h: Tensor, phi: Tensor, noise: Tensor | None, running_mean: Tensor, running_var: Tensor, settings: Settings
) -> Tensor:
    """Perturb `h` `[B, C, H, W]` by φ `[82]` and, in training, move the running statistics `[C, 4]`.

    ε is drawn where no `noise` `[B, C, H, W]` is given. At strength 0 only the statistics are left to do.
    """
    named, mean, var = Phi.of(phi), running_mean, running_var
    if settings.training:
        mean, var = batch_statistics(h, named)
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), MOMENTUM)
            running_var.lerp_(var.to(running_var.dtype), MOMENTUM)
    if settings.strength == 0.0:
        return F.relu(h) if settings.relu else h
    if settings.noise and not settings.expected and noise is None:
        noise = torch.randn_like(h)
    return perturb(h, named, mean, var, noise, settings)


def perturb(h: Tensor, phi: Phi, mean: Tensor, var: Tensor, noise: Tensor | None, settings: Settings) -> Tensor:
    """`h ∘ ((s ∘ z − 1)·c + 1)`, clipped from above.

    Args:
        h: `[B, C, H, W]`.
        mean, var: `[C, 4]`, what the scale is computed from: `batch_statistics` in training, else the running ones.
        noise: ε `[B, C, H, W]`, not read if `settings.noise` is off or `settings.expected` on.
    """
    z = 1.0
    if settings.noise:
        mu = noise_mean(h, phi)
        z = expected_softplus(mu) if settings.expected else F.softplus(mu + noise)
    g = z
    if settings.gate:
        g = z * scale(mean, var, phi, settings.channel_ratio, settings.size_ratio).to(h.dtype)[:, None, None]
    out = h * ((g - 1.0) * settings.strength + 1.0)
    out = out if settings.clip is None else out.clamp(max=settings.clip)
    out = out.to(h.dtype)  # autocast of a GPU has softplus in float32
    return F.relu(out) if settings.relu else out


def relative_noise(h: Tensor, phi: Tensor, noise: Tensor | None, strength: float) -> Tensor:
    """`1 + (z / E[z | h] − 1)·c`, a factor of mean one for `h` `[B, C, H, W]`; no gradient flows through it."""
    with torch.no_grad():
        noise = torch.randn_like(h) if noise is None else noise
        mu = noise_mean(h, Phi.of(phi)).clamp(*MU_RANGE)
        return (1.0 + (F.softplus(mu + noise) / expected_softplus(mu) - 1.0) * strength).to(h.dtype)


def expected_softplus(mu: Tensor) -> Tensor:
    """E[softplus(μ + ε)], ε ~ N(0, 1), of each value, to a relative error of 1e-7; differentiable."""
    u = 4.0 * torch.sigmoid(mu) * torch.sigmoid(-mu)
    return F.softplus(mu) + 0.25 * u * _polynomial(EXPECTATION_P, u) / _polynomial(EXPECTATION_Q, u)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    return functools.reduce(lambda value, coefficient: value * x + coefficient, reversed(coefficients))


def _depthwise_conv(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve every channel of `x` `[B, C, H, W]` with the one `kernel` `[3, 3]`, padding 1."""
    if STENCILS:
        return _stencil(x, kernel)
    channels = x.shape[1]
    return F.conv2d(x, kernel.to(x.dtype).expand(channels, 1, 3, 3), padding=1, groups=channels)


def _stencil(x: Tensor, kernel: Tensor) -> Tensor:
    """The same as a sum, which a compiler fuses with what is around it, once for all numbers of channels."""
    height, width = x.shape[2:]
    padded, kernel = F.pad(x, (1, 1, 1, 1)), kernel.to(x.dtype)
    return sum(kernel[i, j] * padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3))


def _equivariant_conv(x: Tensor, self_kernel: Tensor, all_kernel: Tensor) -> Tensor:
    """Permuting the channels of `x` permutes those of the result (section 3.2, after Zaheer et al. 2017)."""
    return _depthwise_conv(x, self_kernel) + _depthwise_conv(x.mean(dim=1, keepdim=True), all_kernel)
