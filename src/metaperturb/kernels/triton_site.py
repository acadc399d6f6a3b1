"""The fused site on a GPU, in Triton: the same function, gradients and noise as `site.cpp`.

Launches the kernels of `triton_kernels.py`, 3 a site forward and 4 backward, 5 with the gradient of φ; strength 0 takes
2. What the settings make needless is not launched. No launch waits for the host, so a CUDA graph can hold a whole step.

What is convolved a second time (the hidden map; backward the gradients of μ and of the hidden map) goes through memory,
in maps that end with the call and for usual sizes stay in the GPU's L2 cache. From forward to backward two maps of
means over channels are kept, `[B, H, W]` each.
"""

import functools

import torch
from torch import Tensor

from metaperturb.kernels import triton_kernels
from metaperturb.kernels.backend import TRACKING, Unavailable, noise_source, relative_settings, upper_bound
from metaperturb.kernels.plain import MOMENTUM, NUM_SCALE_FEATURES, Settings
from metaperturb.kernels.triton_blocks import triton
from metaperturb.storage import reason

NAME = "triton"
WHOLE_SLOT = False
UNSUPPORTED = ()
PARAMETERS, AFFINE = 82, 72  # all parameters of φ; where the affine map of the scale begins among them

# Sizes of tiles. A few values a thread: all nine neighbours of each are on their way at once, and registers are left
# for many warps.
TILE, WARPS = 512, 4
PIXELS = 128  # at most
QUARTER_PIXELS, QUARTER_WARPS = 32, 8  # where a program has the same piece of all four quarters of an image
VALUES = 2048  # a program of `input_backward` goes through
SCALE_CHANNELS, SCALE_ROWS = 4, 128
SUM_BLOCK = 512


class _Map:
    """A feature map `[B, C, H, W]` as the kernels take it."""

    def __init__(self, h: Tensor) -> None:
        self.batch, self.channels, height, width = h.shape
        self.pixels = height * width
        self.last = not h.is_contiguous() and h.is_contiguous(memory_format=torch.channels_last)
        self.sizes = {"C": self.channels, "H": height, "W": width, "LAST": self.last}
        self.tensor = self.laid_out(h)

    def laid_out(self, other: Tensor) -> Tensor:
        """Another map of this shape, in the memory format of this one."""
        return other.contiguous(memory_format=torch.channels_last if self.last else torch.contiguous_format)

    def tile(self, size: int, most_pixels: int, warps: int, pixels: int | None = None) -> dict[str, int]:
        """The tile of a program that has room for `size` values."""
        return _tile(self.channels, pixels or self.pixels, size, most_pixels, warps, self.last)

    def quarter_tile(self) -> tuple[dict[str, int], int]:
        """The tile of a program that does all four quarters of an image, and how many of them make a quarter."""
        quarter = _ceil(self.pixels, 4)
        tile = self.tile(TILE, QUARTER_PIXELS, QUARTER_WARPS, quarter)
        return tile, _ceil(quarter, tile["PIXELS"])


@functools.cache
def _tile(channels: int, pixels: int, size: int, most_pixels: int, warps: int, channels_last: bool) -> dict[str, int]:
    channels, pixels = triton.next_power_of_2(channels), triton.next_power_of_2(pixels)
    if channels_last:
        c = min(channels, max(8, size // pixels))  # 8: a sector of the cache in float32
        p = min(pixels, max(size // c, 1))
    else:
        p = min(pixels, most_pixels)
        c = min(channels, max(size // p, 1))
    # No more threads than values: two that have the same one, one of them late, must not meet in a map that is updated.
    return {"CHANNELS": c, "PIXELS": p, "warps": max(1, min(warps, c * p // 32))}


@functools.cache
def _group(channels: int, pixels: int, tile_channels: int, tile_pixels: int, size: int) -> tuple[int, int]:
    """Channels and pixels of a program that goes through `size` values, tile by tile; small planes it takes whole."""
    channels, pixels = triton.next_power_of_2(channels), triton.next_power_of_2(pixels)
    group = max(tile_channels, min(channels, size // pixels))
    return group, max(tile_pixels, min(pixels, size // group))


def _ceil(count: int, block: int) -> int:
    return -(-count // block)


def _launch(kernel, programs: int, *args, warps: int = WARPS, **constants) -> None:
    # Multiplications and additions may be contracted, as in C++ compilers and in PyTorch's own kernels.
    kernel[(programs,)](*args, **constants, num_warps=warps, enable_fp_fusion=True)


def check_launch(device: torch.device) -> None:
    """Compile and launch something in this process, which may lack what the one that tried the kernels had.

    Raises:
        Unavailable: Triton does not work here.
    """
    try:
        draw_noise(torch.zeros((), dtype=torch.int64, device=device), torch.empty(1, 1, 2, 2, device=device))
    except Exception as error:  # whatever a compiler, a linker or a driver has to say
        raise Unavailable(f"Triton does not work here ({reason(error)})") from None


def draw_noise(seed: Tensor, like: Tensor) -> Tensor:
    """The ε that the kernels draw from `seed` for a feature map: `[B, C, H, W]`."""
    noise = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    with torch.cuda.device_of(like):
        x = _Map(noise)
        tile, pieces = x.quarter_tile()
        sizes, programs = {name: x.sizes[name] for name in "CHW"}, x.batch * pieces
        _launch(triton_kernels.draw, programs * _ceil(x.channels, tile["CHANNELS"]), seed, noise, **sizes, **tile)
    return noise


def relative_noise(h: Tensor, phi: Tensor, noise: Tensor | None, seed: Tensor | None, strength: float) -> Tensor:
    """`plain.relative_noise`, a factor `[B, C, H, W]` in the memory format of `h`."""
    with torch.cuda.device_of(h):
        settings, unused = relative_settings(strength), phi.new_empty(h.shape[1], NUM_SCALE_FEATURES)
        hidden, scratch = _prepare(_Map(h), phi, unused, unused, settings)
        return _perturb(_Map(h), hidden, scratch, phi, noise, seed, settings, relative=True)


def track(h: Tensor, phi: Tensor, running_mean: Tensor, running_var: Tensor) -> None:
    """Only the statistics of a training step, which is what strength 0 leaves to do."""
    with torch.cuda.device_of(h):
        _prepare(_Map(h), phi, running_mean, running_var, TRACKING)


def forward(
    h: Tensor,
    phi: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    settings: Settings,
) -> tuple[Tensor | None, ...]:
    """One site; moves the running statistics in training.

    Returns:
        The perturbed map `[B, C, H, W]`, in the memory format of `h`, and what `backward` needs beside its inputs:
        features `[B, C, 4]` (None in evaluation), the statistics that made the scale `[2, C, 4]` (second in every
        backend), the scale `[C]`, the means over channels of h and of the hidden map `[B, H, W]` (None without noise).
    """
    with torch.cuda.device_of(h):
        x = _Map(h)
        hidden, scratch = _prepare(x, phi, running_mean, running_var, settings)
        return _perturb(x, hidden, scratch, phi, noise, seed, settings), *scratch


def _perturb(
    x: _Map,
    hidden: Tensor | None,
    scratch: tuple[Tensor | None, ...],
    phi: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    settings: Settings,
    relative: bool = False,
) -> Tensor:
    _, _, scale, _, hidden_mean = scratch
    out = torch.empty_like(x.tensor)
    tile, pieces = x.quarter_tile()
    _launch(
        triton_kernels.perturb,
        x.batch * pieces * _ceil(x.channels, tile["CHANNELS"]),
        *(x.tensor, hidden, hidden_mean, phi, scale),
        *(None if noise is None else x.laid_out(noise), seed, out),
        *(settings.strength, upper_bound(settings)),
        **x.sizes,
        NOISE=noise_source(settings, noise),
        GATE=settings.gate,
        RELATIVE=relative,
        **tile,
    )
    return out


def _prepare(
    x: _Map, phi: Tensor, running_mean: Tensor, running_var: Tensor, settings: Settings
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """What comes before the noise: the hidden map of μ `[B, C, H, W]`, and what `forward` returns for `backward`."""
    new = functools.partial(torch.empty, dtype=phi.dtype, device=x.tensor.device)
    features = new(x.batch, x.channels, NUM_SCALE_FEATURES) if settings.training else None
    statistics, scale = new(2, x.channels, NUM_SCALE_FEATURES), new(x.channels)
    hidden = mean = hidden_mean = None
    if settings.noise:
        hidden = torch.empty_like(x.tensor, dtype=phi.dtype)
        mean, hidden_mean = new(x.batch, x.pixels), new(x.batch, x.pixels)
    tile = x.tile(TILE, PIXELS, WARPS)
    groups = _ceil(x.channels, tile["CHANNELS"]) if settings.training else 0
    pieces = _ceil(x.pixels, tile["PIXELS"]) if settings.noise else 0
    if groups or pieces:
        programs = x.batch * (groups + pieces)
        _launch(triton_kernels.summarize, programs, x.tensor, phi, features, mean, **x.sizes, **tile)
    _launch(
        triton_kernels.first_layer,
        _ceil(x.channels, SCALE_CHANNELS) + x.batch * pieces,
        *(x.tensor, mean, phi, hidden, hidden_mean),
        *(features, running_mean, running_var, statistics, scale),
        *(x.batch, settings.channel_ratio, settings.size_ratio, MOMENTUM),
        **x.sizes,
        TRAINING=settings.training,
        NOISE=settings.noise,
        **tile,
        SCALE_CHANNELS=SCALE_CHANNELS,
        SCALE_ROWS=SCALE_ROWS,
    )
    return hidden, (features, statistics, scale, mean, hidden_mean)


def backward(
    grad_out: Tensor,
    h: Tensor,
    phi: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    scratch: tuple[Tensor | None, ...],
    settings: Settings,
    h_gradient: bool,
    phi_gradient: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of h `[B, C, H, W]` and of φ `[82]`, each None unless asked for.

    `scratch` is what `forward` returned after the perturbed map.
    """
    features, statistics, scale, mean, hidden_mean = scratch
    with torch.cuda.device_of(h):
        x = _Map(h)
        h, dtype = x.tensor, phi.dtype
        new = functools.partial(torch.empty, dtype=dtype, device=h.device)
        new_map = functools.partial(torch.empty_like, h, dtype=dtype)
        gradient_of_features = settings.training and settings.gate
        through_maps = settings.noise or gradient_of_features  # as well as directly
        hidden = grad_mu = grad_mu_mean = grad_hidden_mean = signs = grad_scale = grad_logit = parts = None

        if settings.noise:
            hidden, grad_mu = new_map(), new_map()
            grad_mu_mean, grad_hidden_mean = new(x.batch, x.pixels), new(x.batch, x.pixels)
        if gradient_of_features:
            signs = torch.empty_like(h, dtype=torch.uint8)
        tile = x.tile(TILE, PIXELS, WARPS)
        pieces = x.batch * _ceil(x.pixels, tile["PIXELS"])
        if through_maps:
            _launch(triton_kernels.first_layer_again, pieces, h, mean, phi, hidden, signs, **x.sizes, **tile)

        grad_h = torch.empty_like(h) if h_gradient else None
        # A part of a sum is not rounded to half precision.
        direct = new_map() if h_gradient and through_maps and h.dtype != dtype else grad_h
        quarter_tile, quarter_pieces = x.quarter_tile()
        rows = x.batch * quarter_pieces
        if settings.gate:
            grad_scale, grad_logit = new(rows, x.channels), new(x.channels)
        _launch(
            triton_kernels.perturb_backward,
            rows,
            *(h, x.laid_out(grad_out), hidden, hidden_mean, phi, scale),
            *(None if noise is None else x.laid_out(noise), seed, direct, grad_mu, grad_mu_mean, grad_scale),
            *(settings.strength, upper_bound(settings)),
            **x.sizes,
            NOISE=noise_source(settings, noise),
            GATE=settings.gate,
            **quarter_tile,
        )

        # A value a thread where the gradient of φ takes 54 sums along.
        group_tile = x.tile(32 * WARPS, PIXELS, WARPS) if phi_gradient else tile
        group, run = _group(x.channels, x.pixels, group_tile["CHANNELS"], group_tile["PIXELS"], VALUES)
        groups = x.batch * _ceil(x.channels, group) * _ceil(x.pixels, run)
        columns = max(pieces, groups)
        if phi_gradient:
            parts = new(AFFINE, columns)
        if settings.noise or settings.gate:
            _launch(
                triton_kernels.second_layer_backward,
                (pieces if settings.noise else 0) + (_ceil(x.channels, SCALE_CHANNELS) if settings.gate else 0),
                *(grad_mu, grad_mu_mean, hidden, hidden_mean, phi, grad_hidden_mean),
                *(grad_scale, scale, grad_logit, rows, parts, columns),
                **x.sizes,
                **tile,
                SCALE_CHANNELS=SCALE_CHANNELS,
                SCALE_ROWS=SCALE_ROWS,
            )
        del grad_mu
        if through_maps:
            _launch(
                triton_kernels.input_backward,
                groups,
                *(h, mean, hidden, grad_hidden_mean, phi),
                *(signs, features, statistics, grad_logit, direct, grad_h, parts, x.batch, columns),
                **x.sizes,
                **group_tile,
                GROUP=group,
                RUN=run,
            )
        if not phi_gradient:
            return grad_h, None
        grad_phi = new(PARAMETERS)
        _launch(
            triton_kernels.sum_parts,
            PARAMETERS,
            *(parts, statistics, grad_logit, grad_phi, pieces, groups, columns),
            *(settings.channel_ratio, settings.size_ratio),
            C=x.channels,
            NOISE=settings.noise,
            FEATURES=gradient_of_features,
            GATE=settings.gate,
            BLOCK=SUM_BLOCK,
        )
        return grad_h, grad_phi
