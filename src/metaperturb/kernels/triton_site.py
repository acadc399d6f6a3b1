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
from metaperturb.kernels.backend import TRACKING, Unavailable, noise_source, order_of, relative_settings, upper_bound
from metaperturb.kernels.plain import MOMENTUM, NUM_SCALE_FEATURES
from metaperturb.kernels.triton_kernels import Constants, triton
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


def _tile(h: Tensor, size: int) -> dict[str, Constants | int]:
    """How programs with room for `size` values divide a map: their constants and warps."""
    return _divided(h.shape[1:], order_of(h), False, (size, PIXELS, WARPS), (SCALE_CHANNELS, SCALE_ROWS))


def _quarter_tile(h: Tensor, *site: int) -> dict[str, Constants | int]:
    """The same for programs that have the same piece of all four quarters of an image."""
    tile = TILE, QUARTER_PIXELS, QUARTER_WARPS
    return _divided(h.shape[1:], order_of(h), True, tile, (SCALE_CHANNELS, SCALE_ROWS), site)


@functools.cache
def _divided(shape, order, quarters, tile, scale_tile, site=(0, False, False)) -> dict[str, Constants | int]:
    channels, height, width = shape
    size, most_pixels, most_warps = tile
    plane, quarter, last = height * width, _ceil(height * width, 4), order == torch.channels_last
    covered = quarter if quarters else plane
    c, p = triton.next_power_of_2(channels), triton.next_power_of_2(covered)
    if last:
        c = min(c, max(8, size // p))  # 8: a sector of the cache in float32
        p = min(p, max(size // c, 1))
    else:
        p = min(p, most_pixels)
        c = min(c, max(size // p, 1))
    layout, tiles = (*shape, last, plane, channels if last else 1), (_ceil(channels, c), _ceil(covered, p))
    K = Constants(*layout, c, p, *tiles, quarter, _ceil(channels, scale_tile[0]), *scale_tile, *site)
    # No more threads than values: two that have the same one, one of them late, must not meet in a map that is updated.
    return {"K": K, "warps": max(1, min(most_warps, c * p // 32))}


@functools.cache
def _group(K: Constants, size: int) -> tuple[int, int]:
    """Channels and pixels of a program that goes through `size` values, tile by tile; small planes it takes whole."""
    channels, pixels = triton.next_power_of_2(K.C), triton.next_power_of_2(K.PLANE)
    group = max(K.CHANNELS, min(channels, size // pixels))
    return group, max(K.PIXELS, min(pixels, size // group))


def _ceil(count: int, block: int) -> int:
    return -(-count // block)


def _like(h: Tensor, other: Tensor) -> Tensor:
    """Another map of its shape, in the memory format of h."""
    return other.contiguous(memory_format=order_of(h))


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


# --- a backend's functions: arguments and results as in cpp.py, maps in the memory format of h


def draw_noise(seed, like):
    noise = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    with torch.cuda.device_of(like):
        tile = _quarter_tile(noise, 0, False, False)
        programs = len(noise) * tile["K"].TILES * tile["K"].CHANNEL_TILES
        _launch(triton_kernels.draw, programs, seed, noise, **tile)
    return noise


def relative_noise(h, phi, noise, seed, strength):
    settings, unused = relative_settings(strength), phi.new_empty(h.shape[1], NUM_SCALE_FEATURES)
    return forward(h, phi, noise, seed, unused, unused, settings, relative=True)[0]


def track(h, phi, running_mean, running_var):
    with torch.cuda.device_of(h):
        _prepare(_like(h, h), phi, running_mean, running_var, TRACKING)


def forward(h, phi, noise, seed, running_mean, running_var, settings, relative=False):
    """One site, and what `backward` needs: features (None in evaluation), statistics, scale, means over channels.

    Those are of h and of the hidden map, `[B, H, W]` (None without noise).
    """
    with torch.cuda.device_of(h):
        h = _like(h, h)
        hidden, scratch = _prepare(h, phi, running_mean, running_var, settings)
        _, _, scale, _, hidden_mean = scratch
        out = torch.empty_like(h)
        tile = _quarter_tile(h, noise_source(settings, noise), settings.gate, relative)
        _launch(
            triton_kernels.perturb,
            len(h) * tile["K"].TILES * tile["K"].CHANNEL_TILES,
            *(h, hidden, hidden_mean, phi, scale, None if noise is None else _like(h, noise), seed, out),
            *(settings.strength, upper_bound(settings)),
            **tile,
        )
        return out, *scratch


def _prepare(h, phi, running_mean, running_var, settings):
    """What comes before the noise: the hidden map of μ `[B, C, H, W]`, and what `forward` returns for `backward`."""
    (batch, channels), tile = h.shape[:2], _tile(h, TILE)
    K = tile["K"]
    new = functools.partial(torch.empty, dtype=phi.dtype, device=h.device)
    features = new(batch, channels, NUM_SCALE_FEATURES) if settings.training else None
    statistics, scale = new(2, channels, NUM_SCALE_FEATURES), new(channels)
    hidden = mean = hidden_mean = None
    if settings.noise:
        hidden = torch.empty_like(h, dtype=phi.dtype)
        mean, hidden_mean = new(batch, K.PLANE), new(batch, K.PLANE)
    pieces = batch * K.TILES if settings.noise else 0
    if programs := pieces + (batch * K.CHANNEL_TILES if settings.training else 0):
        _launch(triton_kernels.summarize, programs, h, phi, features, mean, **tile)
    _launch(
        triton_kernels.first_layer,
        K.SCALES + pieces,
        (h, mean, phi, hidden, hidden_mean),
        (features, running_mean, running_var, statistics, scale),
        *(batch, settings.channel_ratio, settings.size_ratio, MOMENTUM),
        **tile,
    )
    return hidden, (features, statistics, scale, mean, hidden_mean)


def backward(grad_out, h, phi, noise, seed, scratch, settings, h_gradient, phi_gradient):
    """Gradients of h and of φ, each None unless asked for; `scratch` is what `forward` returned after the map."""
    features, statistics, scale, mean, hidden_mean = scratch
    with torch.cuda.device_of(h):
        h, (batch, channels), dtype = _like(h, h), h.shape[:2], phi.dtype
        tile, quarter_tile = _tile(h, TILE), _quarter_tile(h, noise_source(settings, noise), settings.gate, False)
        K = tile["K"]
        new = functools.partial(torch.empty, dtype=dtype, device=h.device)
        new_map = functools.partial(torch.empty_like, h, dtype=dtype)
        gradient_of_features = settings.training and settings.gate
        through_maps = settings.noise or gradient_of_features  # as well as directly
        hidden = grad_mu = grad_mu_mean = grad_hidden_mean = signs = grad_scale = grad_logit = parts = None

        if settings.noise:
            hidden, grad_mu = new_map(), new_map()
            grad_mu_mean, grad_hidden_mean = new(batch, K.PLANE), new(batch, K.PLANE)
        if gradient_of_features:
            signs = torch.empty_like(h, dtype=torch.uint8)
        pieces = batch * K.TILES
        if through_maps:
            _launch(triton_kernels.hidden_layer, pieces, h, mean, phi, hidden, None, signs, **tile, FIRST=0)

        grad_h = torch.empty_like(h) if h_gradient else None
        # A part of a sum is not rounded to half precision.
        direct = new_map() if h_gradient and through_maps and h.dtype != dtype else grad_h
        rows = batch * quarter_tile["K"].TILES
        if settings.gate:
            grad_scale, grad_logit = new(rows, channels), new(channels)
        _launch(
            triton_kernels.perturb_backward,
            rows,
            (h, _like(h, grad_out), hidden, hidden_mean, phi, scale, None if noise is None else _like(h, noise), seed),
            (direct, grad_mu, grad_mu_mean, grad_scale),
            *(settings.strength, upper_bound(settings)),
            **quarter_tile,
        )

        # A value a thread where the gradient of φ takes 54 sums along.
        group_tile = _tile(h, 32 * WARPS) if phi_gradient else tile
        group, run = _group(group_tile["K"], VALUES)
        groups = batch * _ceil(channels, group) * _ceil(K.PLANE, run)
        columns = max(pieces, groups)
        if phi_gradient:
            parts = new(AFFINE, columns)
        if settings.noise or settings.gate:
            _launch(
                triton_kernels.second_layer_backward,
                (pieces if settings.noise else 0) + (K.SCALES if settings.gate else 0),
                (grad_mu, grad_mu_mean, hidden, hidden_mean, phi, grad_hidden_mean),
                (grad_scale, scale, grad_logit),
                *(rows, parts, columns),
                **tile,
            )
        del grad_mu
        if through_maps:
            _launch(
                triton_kernels.input_backward,
                groups,
                (h, mean, hidden, grad_hidden_mean, phi),
                (signs, features, statistics, grad_logit),
                *(direct, grad_h, parts, batch, columns),
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
            C=channels,
            NOISE=settings.noise,
            FEATURES=gradient_of_features,
            GATE=settings.gate,
            BLOCK=SUM_BLOCK,
        )
        return grad_h, grad_phi
