"""The fused site on a GPU, in Triton: the same function, gradients and noise as `site.cpp`.

| pass | launch | a program has | computes |
|---|---|---|---|
| forward | `_summarize` | some channels, or some pixels | scale features; mean over channels |
| | `_first_layer` | some channels, or some pixels | statistics and scale; hidden map and its mean |
| | `_perturb` | some channels and pixels | noise, perturbed map |
| backward | `_first_layer_again` | some pixels | hidden map, signs of the four feature maps |
| | `_perturb_backward` | some pixels | gradient of μ, direct part of that of h, shares in that of the scale |
| | `_second_layer_backward` | some channels, or some pixels | gradient of the scale; gradient of the hidden map |
| | `_input_backward` | some channels and pixels | gradient of h, shares in that of φ |
| | `_sum_parts` | a parameter | gradient of φ |

That is 3 launches a site forward and 4 backward, 5 with the gradient of φ; strength 0 takes 2. What the settings make
needless is not launched. No launch waits for the host and none adds atomically: sums are taken in parts, the parts in a
fixed order. So equal inputs give equal bits, and a CUDA graph can hold a whole step.

What is convolved a second time (the hidden map; backward the gradients of μ and of the hidden map) goes through memory,
in maps that end with the call and for usual sizes stay in the GPU's L2 cache. From forward to backward two maps of
means over channels are kept, `[B, H, W]` each.

A tile of a map is `[channels, pixels]`, pixels row by row. A 3×3 convolution loads it nine times, at nine offsets,
eight of them from the cache of the multiprocessor. Sizes of maps are constants of the compiler, which makes the offsets
immediate operands. Half-precision maps are read and written as they are; all arithmetic is in the dtype of φ.
"""

import functools

import torch
from torch import Tensor

from metaperturb.kernels.backend import TRACKING, Unavailable, noise_source, upper_bound
from metaperturb.kernels.plain import MOMENTUM, NUM_SCALE_FEATURES, Phi, Settings

try:
    import triton
    import triton.language as tl
except ImportError:  # `_check` says so
    triton = None

    class tl:
        constexpr = float64 = None  # what signatures name


NAME = "triton"
UNSUPPORTED = ()
PARAMETERS, AFFINE = 82, 72  # all parameters of φ; where the affine map of the scale begins among them

# Sizes of tiles. A few values a thread: all nine neighbours of each are on their way at once, and registers are left
# for many warps.
TILE, WARPS = 512, 4
PIXELS = 128  # at most
QUARTER_PIXELS, QUARTER_WARPS = 32, 8  # where a program has the same piece of all four quarters of an image
VALUES = 2048  # a program of `_input_backward` goes through
SCALE_CHANNELS, SCALE_ROWS = 4, 128
SUM_BLOCK = 512


def jit(function):
    counts = ["batch", "rows", "columns", "second_layer_parts", "input_parts"]  # of any size, with one compiled kernel
    return function if triton is None else triton.jit(function, do_not_specialize=counts)


# --- a tile and its neighbourhood


@jit
def offsets(c, pixel, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr):
    """Where channels c and pixels lie inside an image, `[channels, pixels]`; `LAST`: channels last."""
    # Without channels last, hides how rows are aligned: else a thread takes four pixels of a row, for the sake of wide
    # loads, and the loads at shifted places, which cannot be wide, touch four times as many cache lines each.
    return pixel * C + c if LAST else tl.multiple_of(c * (H * W) + pixel, [1, 1])


@jit
def neighbour(p, y, x, inside, DY: tl.constexpr, DX: tl.constexpr, H: tl.constexpr, W: tl.constexpr, STEP):
    mask = inside
    if DY != 0:
        mask = mask & (y + DY >= 0) & (y + DY < H)
    if DX != 0:
        mask = mask & (x + DX >= 0) & (x + DX < W)
    return tl.load(p + (DY * W + DX) * STEP, mask=mask, other=0)


@jit
def neighbours(p, pixel, inside, H: tl.constexpr, W: tl.constexpr, STEP: tl.constexpr):
    """The 3×3 neighbourhood of each place that `p` points to, zeros around the map: nine tiles, row by row."""
    y, x = pixel // W, pixel % W
    return (
        neighbour(p, y, x, inside, -1, -1, H, W, STEP),
        neighbour(p, y, x, inside, -1, 0, H, W, STEP),
        neighbour(p, y, x, inside, -1, 1, H, W, STEP),
        neighbour(p, y, x, inside, 0, -1, H, W, STEP),
        neighbour(p, y, x, inside, 0, 0, H, W, STEP),
        neighbour(p, y, x, inside, 0, 1, H, W, STEP),
        neighbour(p, y, x, inside, 1, -1, H, W, STEP),
        neighbour(p, y, x, inside, 1, 0, H, W, STEP),
        neighbour(p, y, x, inside, 1, 1, H, W, STEP),
    )


@jit
def kernel3x3(p, k):
    """The k-th kernel of φ at `p`: nine numbers."""
    p += 9 * k
    return (
        tl.load(p),
        tl.load(p + 1),
        tl.load(p + 2),
        tl.load(p + 3),
        tl.load(p + 4),
        tl.load(p + 5),
        tl.load(p + 6),
        tl.load(p + 7),
        tl.load(p + 8),
    )


@jit
def convolve(near, w, DTYPE: tl.constexpr):
    total = near[0].to(DTYPE) * w[0]
    for i in tl.static_range(1, 9):
        total += near[i].to(DTYPE) * w[i]
    return total


@jit
def convolve_transposed(near, w, DTYPE: tl.constexpr):
    """What `convolve` does, backward: from the gradient of its result to that of its input."""
    total = near[8].to(DTYPE) * w[0]
    for i in tl.static_range(1, 9):
        total += near[8 - i].to(DTYPE) * w[i]
    return total


@jit
def nine_zeros(CHANNELS: tl.constexpr, PIXELS: tl.constexpr, DTYPE: tl.constexpr):
    zero = tl.zeros([CHANNELS, PIXELS], DTYPE)
    return (zero, zero, zero, zero, zero, zero, zero, zero, zero)


@jit
def correlate(sums, near, x):
    """Adds a tile's share of the gradient of a 3×3 kernel: `near`, the gradient around what it reads, times that."""
    return (
        sums[0] + near[8] * x,
        sums[1] + near[7] * x,
        sums[2] + near[6] * x,
        sums[3] + near[5] * x,
        sums[4] + near[4] * x,
        sums[5] + near[3] * x,
        sums[6] + near[2] * x,
        sums[7] + near[1] * x,
        sums[8] + near[0] * x,
    )


@jit
def store_sums(sums, p, stride):
    for i in tl.static_range(9):
        tl.store(p + i * stride, tl.sum(sums[i]))


# --- elementary functions


@jit
def relu(x):
    return tl.where(x < 0, 0.0, x)  # keeps a NaN


@jit
def softplus(a):
    """log(1 + eᵃ) and its derivative, stable for every a."""
    e = tl.exp(-tl.abs(a))
    if a.dtype == tl.float64:
        u = 1.0 + e  # log(u) · e / (u − 1): the rounding of u cancels
        log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    else:
        # 2 artanh(e / (2 + e)), accurate to the last digits for small e too.
        w = e / (2.0 + e)
        w2 = w * w
        p = 1.0 / 15
        p = p * w2 + 1.0 / 13
        p = p * w2 + 1.0 / 11
        p = p * w2 + 1.0 / 9
        p = p * w2 + 1.0 / 7
        p = p * w2 + 1.0 / 5
        p = p * w2 + 1.0 / 3
        log1p = 2.0 * w + 2.0 * w * w2 * p
    return relu(a) + log1p, tl.where(a < 0, e, 1.0) / (1.0 + e)


# --- noise: a pure function of (seed, plane, position in the plane), the same in every backend


@jit
def normal_pair(first, second):
    """Two standard normals from two random words (Box and Muller 1958), by the formulas of site.cpp."""
    u = ((first >> 1).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10
    # log u: u = 2ⁿ m, sqrt(1/2) <= m < sqrt(2), log m = 2 artanh((m − 1) / (m + 1)).
    bits = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    m = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    w = (m - 1.0) / (m + 1.0)
    w2 = w * w
    p = 1.0 / 9
    p = p * w2 + 1.0 / 7
    p = p * w2 + 1.0 / 5
    p = p * w2 + 1.0 / 3
    log_u = (bits >> 23).to(tl.float32) * 0.693147180559945309 + (2.0 * w + 2.0 * w * w2 * p)
    radius = tl.sqrt(-2.0 * log_u)
    # The low 30 bits of the second word are an angle in [−π/4, π/4), the high two say which quarter.
    angle = ((second & 0x3FFFFFFF).to(tl.int32).to(tl.float32) * 9.313225746154785e-10 - 0.5) * 1.57079632679489662
    a2 = angle * angle
    sine = angle * (1.0 + a2 * (-1.0 / 6 + a2 * (1.0 / 120 + a2 * (-1.0 / 5040 + a2 * (1.0 / 362880)))))
    cosine = 1.0 + a2 * (-0.5 + a2 * (1.0 / 24 + a2 * (-1.0 / 720 + a2 * (1.0 / 40320))))
    swap = (second & 0x40000000) != 0
    signed = tl.where((second >> 31) != 0, -radius, radius)
    return signed * tl.where(swap, sine, cosine), signed * tl.where(swap, cosine, sine)


@jit
def normals(seed, plane, j):
    """ε of the positions j, q + j, 2q + j and 3q + j, q a quarter of a plane: four tiles in float32.

    `plane` `[channels, 1]`, `j` `[1, pixels]`. Philox4x32-10 (Salmon et al. 2011) of the counter (j, plane, 0, 0).
    """
    zero = tl.zeros([1, 1], tl.int32)
    c0, c1, c2, c3 = tl.philox(tl.load(seed), j, plane, zero, zero)
    n0, n1 = normal_pair(c0, c1)
    n2, n3 = normal_pair(c2, c3)
    return n0, n1, n2, n3


@jit
def _draw(
    seed,
    noise,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """The noise of a site as a tensor: `[B, C, H, W]`."""
    QUARTER: tl.constexpr = (H * W + 3) // 4
    TILES: tl.constexpr = (QUARTER + PIXELS - 1) // PIXELS
    CHANNEL_TILES: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    tile = tl.program_id(0) % TILES
    first = tl.program_id(0) // TILES % CHANNEL_TILES * CHANNELS
    image = tl.program_id(0) // TILES // CHANNEL_TILES
    c = first + tl.arange(0, CHANNELS)[:, None]
    j = tile * PIXELS + tl.arange(0, PIXELS)[None, :]
    noise += image.to(tl.int64) * (C * H * W) + c * (H * W)
    values = normals(seed, image * C + c, j)
    for i in tl.static_range(4):
        pixel = i * QUARTER + j
        tl.store(noise + pixel, values[i].to(noise.dtype.element_ty), mask=(c < C) & (j < QUARTER) & (pixel < H * W))


# --- forward


@jit
def _summarize(
    h,
    scale_kernels,
    features,
    mean,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Features `[B, C, 4]` and the mean over channels `[B, H, W]`, by programs of two kinds; either may be None."""
    FEATURE_PARTS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS if features is not None else 0
    PARTS: tl.constexpr = FEATURE_PARTS + ((H * W + PIXELS - 1) // PIXELS if mean is not None else 0)
    image = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    h += image.to(tl.int64) * (C * H * W)
    if features is not None and part < FEATURE_PARTS:
        _features(h, scale_kernels, features + image * (C * 4), part * CHANNELS, C, H, W, LAST, CHANNELS, PIXELS)
    if mean is not None and part >= FEATURE_PARTS:
        start = (part - FEATURE_PARTS) * PIXELS
        _channel_mean(h, mean + image.to(tl.int64) * (H * W), start, C, H, W, LAST, CHANNELS, PIXELS)


@jit
def _features(
    h,
    scale_kernels,
    features,
    first,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    DTYPE: tl.constexpr = scale_kernels.dtype.element_ty
    w0, w1 = kernel3x3(scale_kernels, 0), kernel3x3(scale_kernels, 1)
    w2, w3 = kernel3x3(scale_kernels, 2), kernel3x3(scale_kernels, 3)
    c = first + tl.arange(0, CHANNELS)[:, None]
    s0 = tl.zeros([CHANNELS, PIXELS], DTYPE)
    s1, s2, s3 = s0, s0, s0
    for start in range(0, H * W, PIXELS):
        pixel = start + tl.arange(0, PIXELS)[None, :]
        inside = (c < C) & (pixel < H * W)
        near = neighbours(h + offsets(c, pixel, C, H, W, LAST), pixel, inside, H, W, C if LAST else 1)
        # Outside the map all nine are 0, and so is what they give.
        s0 += relu(convolve(near, w0, DTYPE))
        s1 += relu(convolve(near, w1, DTYPE))
        s2 += relu(convolve(near, w2, DTYPE))
        s3 += relu(convolve(near, w3, DTYPE))
    c = first + tl.arange(0, CHANNELS)
    tl.store(features + c * 4, tl.sum(s0, 1) / (H * W), mask=c < C)
    tl.store(features + c * 4 + 1, tl.sum(s1, 1) / (H * W), mask=c < C)
    tl.store(features + c * 4 + 2, tl.sum(s2, 1) / (H * W), mask=c < C)
    tl.store(features + c * 4 + 3, tl.sum(s3, 1) / (H * W), mask=c < C)


@jit
def _channel_mean(
    h,
    mean,
    start,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    DTYPE: tl.constexpr = mean.dtype.element_ty
    pixel = start + tl.arange(0, PIXELS)
    total = tl.zeros([CHANNELS, PIXELS], DTYPE)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)[:, None]
        inside = (c < C) & (pixel[None, :] < H * W)
        total += tl.load(h + offsets(c, pixel[None, :], C, H, W, LAST), mask=inside, other=0).to(DTYPE)
    tl.store(mean + pixel, tl.sum(total, 0) / C, mask=pixel < H * W)


@jit
def _first_layer(
    h,
    mean,
    self1,
    all1,
    hidden,
    hidden_mean,
    features,
    affine,
    running_mean,
    running_var,
    statistics,
    scale,
    batch,
    channel_ratio: tl.float64,
    size_ratio: tl.float64,
    momentum: tl.float64,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    LAST: tl.constexpr,
    TRAINING: tl.constexpr,
    NOISE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    SCALE_CHANNELS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
):
    """The scale `[C]`; the hidden map `[B, C, H, W]` and its mean `[B, H, W]`: by programs of two kinds."""
    DTYPE: tl.constexpr = self1.dtype.element_ty
    SCALES: tl.constexpr = (C + SCALE_CHANNELS - 1) // SCALE_CHANNELS
    if tl.program_id(0) < SCALES:
        _scale(
            features,
            affine,
            running_mean,
            running_var,
            statistics,
            scale,
            batch,
            tl.full([], channel_ratio, DTYPE),
            tl.full([], size_ratio, DTYPE),
            tl.full([], momentum, DTYPE),
            C,
            TRAINING,
            SCALE_CHANNELS,
            SCALE_ROWS,
        )
    if NOISE and tl.program_id(0) >= SCALES:
        program = tl.program_id(0) - SCALES
        _hidden_layer(h, mean, self1, all1, None, hidden, hidden_mean, None, program, C, H, W, LAST, CHANNELS, PIXELS)


@jit
def _hidden_layer(
    h,
    mean,
    self1,
    all1,
    scale_kernels,
    hidden,
    hidden_mean,
    signs,
    program,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """A piece of an image of what is asked for, which is what is not None among `hidden`, `hidden_mean`, `signs`."""
    DTYPE: tl.constexpr = self1.dtype.element_ty
    TILES: tl.constexpr = (H * W + PIXELS - 1) // PIXELS
    image = program // TILES
    base = image.to(tl.int64) * (C * H * W)
    plane = image.to(tl.int64) * (H * W)
    pixel = program % TILES * PIXELS + tl.arange(0, PIXELS)[None, :]
    if hidden is not None:
        w = kernel3x3(self1, 0)
        around = neighbours(mean + plane + pixel, pixel, pixel < H * W, H, W, 1)
        shared = convolve(around, kernel3x3(all1, 0), DTYPE)
    if signs is not None:
        w0, w1 = kernel3x3(scale_kernels, 0), kernel3x3(scale_kernels, 1)
        w2, w3 = kernel3x3(scale_kernels, 2), kernel3x3(scale_kernels, 3)
    total = tl.zeros([CHANNELS, PIXELS], DTYPE)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)[:, None]
        inside = (c < C) & (pixel < H * W)
        offset = offsets(c, pixel, C, H, W, LAST)
        near = neighbours(h + base + offset, pixel, inside, H, W, C if LAST else 1)
        if hidden is not None:
            value = relu(convolve(near, w, DTYPE) + shared)
            tl.store(hidden + base + offset, value, mask=inside)
            total += tl.where(inside, value, 0.0)
        if signs is not None:
            # A NaN counts as positive, as where relu is differentiated.
            bits = tl.where(convolve(near, w0, DTYPE) <= 0, 0, 1)
            bits += tl.where(convolve(near, w1, DTYPE) <= 0, 0, 2)
            bits += tl.where(convolve(near, w2, DTYPE) <= 0, 0, 4)
            bits += tl.where(convolve(near, w3, DTYPE) <= 0, 0, 8)
            tl.store(signs + base + offset, bits.to(tl.uint8), mask=inside)
    if hidden_mean is not None:
        tl.store(hidden_mean + plane + pixel, tl.sum(total, 0)[None, :] / C, mask=pixel < H * W)


@jit
def _scale(
    features,
    affine,
    running_mean,
    running_var,
    statistics,
    scale,
    batch,
    channel_ratio,
    size_ratio,
    momentum,
    C: tl.constexpr,
    TRAINING: tl.constexpr,
    CHANNELS: tl.constexpr,
    BATCH: tl.constexpr,
):
    """Mean and unbiased variance over the batch, in training, into `statistics` `[2, C, 4]` and the running ones; s."""
    DTYPE: tl.constexpr = affine.dtype.element_ty
    # A feature of a channel after the other, as they lie in memory.
    v = tl.program_id(0) * (CHANNELS * 4) + tl.arange(0, CHANNELS * 4)
    inside = v < C * 4
    if TRAINING:
        total = tl.zeros([BATCH, CHANNELS * 4], DTYPE)
        for first in range(0, batch, BATCH):
            b = first + tl.arange(0, BATCH)[:, None]
            total += tl.load(features + b * (C * 4) + v[None, :], mask=(b < batch) & inside[None, :], other=0)
        mean = tl.sum(total, 0) / batch
        total = tl.zeros([BATCH, CHANNELS * 4], DTYPE)
        for first in range(0, batch, BATCH):
            b = first + tl.arange(0, BATCH)[:, None]
            mask = (b < batch) & inside[None, :]
            difference = tl.load(features + b * (C * 4) + v[None, :], mask=mask, other=0) - mean[None, :]
            total += tl.where(mask, difference * difference, 0.0)
        var = tl.sum(total, 0) / (batch - 1)
        before = tl.load(running_mean + v, mask=inside, other=0)
        tl.store(running_mean + v, before + momentum * (mean - before), mask=inside)
        before = tl.load(running_var + v, mask=inside, other=0)
        tl.store(running_var + v, before + momentum * (var - before), mask=inside)
    else:
        mean = tl.load(running_mean + v, mask=inside, other=0)
        var = tl.load(running_var + v, mask=inside, other=0)
    tl.store(statistics + v, mean, mask=inside)
    tl.store(statistics + C * 4 + v, var, mask=inside)
    terms = mean * tl.load(affine + v % 4) + var * tl.load(affine + 4 + v % 4)
    logit = tl.sum(tl.reshape(terms, [CHANNELS, 4]), 1)
    logit += tl.load(affine + 8) * channel_ratio + tl.load(affine + 9) * size_ratio
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    tl.store(scale + c, 1.0 / (1.0 + tl.exp(-logit)), mask=c < C)


@jit
def _noise_mean(
    hidden,
    hidden_mean,
    w,
    w_all,
    pixel,
    inside,
    H: tl.constexpr,
    W: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """μ of a tile; `hidden` and `hidden_mean` point to its places."""
    shared = convolve(neighbours(hidden_mean, pixel, pixel < H * W, H, W, 1), w_all, DTYPE)
    return convolve(neighbours(hidden, pixel, inside, H, W, STEP), w, DTYPE) + shared


@jit
def _perturb(
    h,
    hidden,
    hidden_mean,
    self2,
    all2,
    scale,
    noise,
    seed,
    out,
    strength: tl.float64,
    clip: tl.float64,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    LAST: tl.constexpr,
    NOISE: tl.constexpr,
    GATE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """`h ∘ ((s ∘ z − 1)·c + 1)`, clipped from above."""
    DTYPE: tl.constexpr = self2.dtype.element_ty
    STEP: tl.constexpr = C if LAST else 1
    QUARTER: tl.constexpr = (H * W + 3) // 4
    TILES: tl.constexpr = (QUARTER + PIXELS - 1) // PIXELS
    CHANNEL_TILES: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    tile = tl.program_id(0) % TILES
    first = tl.program_id(0) // TILES % CHANNEL_TILES * CHANNELS
    image = tl.program_id(0) // TILES // CHANNEL_TILES
    base = image.to(tl.int64) * (C * H * W)
    c = first + tl.arange(0, CHANNELS)[:, None]
    j = tile * PIXELS + tl.arange(0, PIXELS)[None, :]
    strength = tl.full([], strength, DTYPE)
    clip = tl.full([], clip, DTYPE)
    s = tl.load(scale + c, mask=c < C, other=0) if GATE else 1.0
    if NOISE:
        hidden_mean += image.to(tl.int64) * (H * W)
        w, w_all = kernel3x3(self2, 0), kernel3x3(all2, 0)
    if NOISE == 1:
        drawn = normals(seed, image * C + c, j)
    for i in tl.static_range(4):
        pixel = i * QUARTER + j
        inside = (c < C) & (j < QUARTER) & (pixel < H * W)
        offset = offsets(c, pixel, C, H, W, LAST)
        x = tl.load(h + base + offset, mask=inside, other=0).to(DTYPE)
        if NOISE:
            a = _noise_mean(hidden + base + offset, hidden_mean + pixel, w, w_all, pixel, inside, H, W, STEP, DTYPE)
            if NOISE == 1:
                a += drawn[i].to(DTYPE)
            else:
                a += tl.load(noise + base + offset, mask=inside, other=0).to(DTYPE)
            z, _ = softplus(a)
            x *= (z * s - 1.0) * strength + 1.0
        else:
            x *= (s - 1.0) * strength + 1.0
        x = tl.where(x > clip, clip, x)
        tl.store(out + base + offset, x.to(out.dtype.element_ty), mask=inside)


# --- backward


@jit
def _first_layer_again(
    h,
    mean,
    self1,
    all1,
    scale_kernels,
    hidden,
    signs,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """The hidden map, and which of the four feature maps are positive, a bit each: `[B, C, H, W]` both."""
    program = tl.program_id(0)
    _hidden_layer(h, mean, self1, all1, scale_kernels, hidden, None, signs, program, C, H, W, LAST, CHANNELS, PIXELS)


@jit
def _perturb_backward(
    h,
    grad_out,
    hidden,
    hidden_mean,
    self2,
    all2,
    scale,
    noise,
    seed,
    grad_h,
    grad_mu,
    grad_mu_mean,
    grad_scale,
    strength: tl.float64,
    clip: tl.float64,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    LAST: tl.constexpr,
    NOISE: tl.constexpr,
    GATE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """From the gradient of the perturbed map to those of its factors.

    Writes the direct part of the gradient of h and the gradient of μ, `[B, C, H, W]`, the latter's mean over channels
    `[B, H, W]`, and the gradient of the scale `[programs, C]`.
    """
    DTYPE: tl.constexpr = self2.dtype.element_ty
    STEP: tl.constexpr = C if LAST else 1
    QUARTER: tl.constexpr = (H * W + 3) // 4
    TILES: tl.constexpr = (QUARTER + PIXELS - 1) // PIXELS
    program = tl.program_id(0).to(tl.int64)
    image = tl.program_id(0) // TILES
    j = tl.program_id(0) % TILES * PIXELS + tl.arange(0, PIXELS)[None, :]
    base = image.to(tl.int64) * (C * H * W)
    strength = tl.full([], strength, DTYPE)
    clip = tl.full([], clip, DTYPE)
    m0 = tl.zeros([CHANNELS, PIXELS], DTYPE)
    m1, m2, m3 = m0, m0, m0
    if NOISE:
        hidden_mean += image.to(tl.int64) * (H * W)
        grad_mu_mean += image.to(tl.int64) * (H * W)
        w, w_all = kernel3x3(self2, 0), kernel3x3(all2, 0)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)[:, None]
        s = tl.load(scale + c, mask=c < C, other=0) if GATE else 1.0
        total = tl.zeros([CHANNELS, PIXELS], DTYPE)
        if NOISE == 1:
            drawn = normals(seed, image * C + c, j)
        for i in tl.static_range(4):
            pixel = i * QUARTER + j
            inside = (c < C) & (j < QUARTER) & (pixel < H * W)
            offset = offsets(c, pixel, C, H, W, LAST)
            x = tl.load(h + base + offset, mask=inside, other=0).to(DTYPE)
            incoming = tl.load(grad_out + base + offset, mask=inside, other=0).to(DTYPE)
            if NOISE:
                p = hidden + base + offset
                a = _noise_mean(p, hidden_mean + pixel, w, w_all, pixel, inside, H, W, STEP, DTYPE)
                if NOISE == 1:
                    a += drawn[i].to(DTYPE)
                else:
                    a += tl.load(noise + base + offset, mask=inside, other=0).to(DTYPE)
                z, slope = softplus(a)
                factor = (z * s - 1.0) * strength + 1.0
            else:
                factor = (s - 1.0) * strength + 1.0
            direct = tl.where(x * factor > clip, 0.0, incoming)
            grad_g = tl.where(inside, direct * x * strength, 0.0)
            tl.store(grad_h + base + offset, direct * factor, mask=inside)
            if NOISE:
                total += grad_g * z
                through = grad_g * s * slope
                tl.store(grad_mu + base + offset, through, mask=inside)
                if i == 0:
                    m0 += through
                elif i == 1:
                    m1 += through
                elif i == 2:
                    m2 += through
                else:
                    m3 += through
            else:
                total += grad_g
        if GATE:
            c = first + tl.arange(0, CHANNELS)
            tl.store(grad_scale + program * C + c, tl.sum(total, 1), mask=c < C)
    if NOISE:
        sums = (m0, m1, m2, m3)
        for i in tl.static_range(4):
            pixel = i * QUARTER + j
            mean = tl.sum(sums[i], 0)[None, :] / C
            tl.store(grad_mu_mean + pixel, mean, mask=(j < QUARTER) & (pixel < H * W))


@jit
def _second_layer_backward(
    grad_mu,
    grad_mu_mean,
    hidden,
    hidden_mean,
    self2,
    all2,
    grad_hidden_mean,
    grad_scale,
    scale,
    grad_logit,
    rows,
    parts,
    columns,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    SCALE_CHANNELS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
):
    """The gradient of the scale's logit `[C]`, and that of layer 1 before its relu, by programs of two kinds.

    The latter takes the place of `hidden`; its mean over channels is `grad_hidden_mean` `[B, H, W]`.
    """
    SCALES: tl.constexpr = (C + SCALE_CHANNELS - 1) // SCALE_CHANNELS if grad_logit is not None else 0
    if grad_logit is not None and tl.program_id(0) < SCALES:
        _scale_backward(grad_scale, scale, grad_logit, rows, C, SCALE_CHANNELS, SCALE_ROWS)
    if grad_mu is not None and tl.program_id(0) >= SCALES:
        _hidden_backward(
            grad_mu,
            grad_mu_mean,
            hidden,
            hidden_mean,
            self2,
            all2,
            grad_hidden_mean,
            parts,
            columns,
            tl.program_id(0) - SCALES,
            C,
            H,
            W,
            LAST,
            CHANNELS,
            PIXELS,
        )


@jit
def _scale_backward(
    grad_scale,
    scale,
    grad_logit,
    rows,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    DTYPE: tl.constexpr = scale.dtype.element_ty
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    sums = tl.zeros([ROWS, CHANNELS], DTYPE)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        p = grad_scale + row.to(tl.int64) * C + c[None, :]
        sums += tl.load(p, mask=(row < rows) & (c[None, :] < C), other=0)
    s = tl.load(scale + c, mask=c < C, other=0)
    tl.store(grad_logit + c, tl.sum(sums, 0) * s * (1.0 - s), mask=c < C)


@jit
def _hidden_backward(
    grad_mu,
    grad_mu_mean,
    hidden,
    hidden_mean,
    self2,
    all2,
    grad_hidden_mean,
    parts,
    columns,
    program,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    DTYPE: tl.constexpr = self2.dtype.element_ty
    TILES: tl.constexpr = (H * W + PIXELS - 1) // PIXELS
    image = program // TILES
    base = image.to(tl.int64) * (C * H * W)
    plane = image.to(tl.int64) * (H * W)
    pixel = program % TILES * PIXELS + tl.arange(0, PIXELS)[None, :]
    w = kernel3x3(self2, 0)
    around = neighbours(grad_mu_mean + plane + pixel, pixel, pixel < H * W, H, W, 1)
    shared = convolve_transposed(around, kernel3x3(all2, 0), DTYPE)
    if parts is not None:
        # γ₂ sees the mean of the hidden map and the sum of the gradient over channels: C times its mean.
        mean = tl.load(hidden_mean + plane + pixel, mask=pixel < H * W, other=0)
        all_sums = correlate(nine_zeros(1, PIXELS, DTYPE), around, mean * C)
        store_sums(all_sums, parts + 27 * columns + program, columns)
        sums = nine_zeros(CHANNELS, PIXELS, DTYPE)
    total = tl.zeros([CHANNELS, PIXELS], DTYPE)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)[:, None]
        inside = (c < C) & (pixel < H * W)
        offset = offsets(c, pixel, C, H, W, LAST)
        near = neighbours(grad_mu + base + offset, pixel, inside, H, W, C if LAST else 1)
        x = tl.load(hidden + base + offset, mask=inside, other=0)
        value = tl.where(x <= 0, 0.0, convolve_transposed(near, w, DTYPE) + shared)
        tl.store(hidden + base + offset, value, mask=inside)
        total += value
        if parts is not None:
            sums = correlate(sums, near, x)
    tl.store(grad_hidden_mean + plane + pixel, tl.sum(total, 0)[None, :] / C, mask=pixel < H * W)
    if parts is not None:
        store_sums(sums, parts + 18 * columns + program, columns)


@jit
def _input_backward(
    h,
    mean,
    grad_hidden,
    grad_hidden_mean,
    self1,
    all1,
    scale_kernels,
    affine,
    signs,
    features,
    statistics,
    grad_logit,
    direct,
    grad_h,
    parts,
    batch,
    columns,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
):
    """Adds to the direct part of the gradient of h what comes through layer 1 and through the features.

    A program goes through `GROUP` channels and `RUN` pixels of an image.
    """
    DTYPE: tl.constexpr = self1.dtype.element_ty
    STEP: tl.constexpr = C if LAST else 1
    GROUPS: tl.constexpr = (C + GROUP - 1) // GROUP
    RUNS: tl.constexpr = (H * W + RUN - 1) // RUN
    start_pixel = tl.program_id(0) % RUNS * RUN
    start = tl.program_id(0) // RUNS % GROUPS * GROUP
    image = tl.program_id(0) // RUNS // GROUPS
    plane = image.to(tl.int64) * (H * W)
    base = image.to(tl.int64) * (C * H * W)
    if grad_hidden is not None:
        w, w_all = kernel3x3(self1, 0), kernel3x3(all1, 0)
        if parts is not None:
            sums = nine_zeros(CHANNELS, PIXELS, DTYPE)
            sums_all = nine_zeros(1, PIXELS, DTYPE)
    if signs is not None:
        w0, w1 = kernel3x3(scale_kernels, 0), kernel3x3(scale_kernels, 1)
        w2, w3 = kernel3x3(scale_kernels, 2), kernel3x3(scale_kernels, 3)
        if parts is not None:
            sums0 = nine_zeros(CHANNELS, PIXELS, DTYPE)
            sums1, sums2, sums3 = sums0, sums0, sums0
    for first in range(start, start + GROUP, CHANNELS):
        c = first + tl.arange(0, CHANNELS)[:, None]
        if signs is not None:
            p = features + image * (C * 4) + c * 4
            q = statistics + c * 4
            logit = tl.load(grad_logit + c, mask=c < C, other=0) / (H * W)
            g0 = _feature_gradient(p, q, affine, logit, c < C, batch)
            g1 = _feature_gradient(p + 1, q + 1, affine + 1, logit, c < C, batch)
            g2 = _feature_gradient(p + 2, q + 2, affine + 2, logit, c < C, batch)
            g3 = _feature_gradient(p + 3, q + 3, affine + 3, logit, c < C, batch)
        for tile in range(start_pixel, start_pixel + RUN, PIXELS):
            pixel = tile + tl.arange(0, PIXELS)[None, :]
            inside = (c < C) & (pixel < H * W)
            offset = offsets(c, pixel, C, H, W, LAST)
            total = tl.load(direct + base + offset, mask=inside, other=0)
            if parts is not None:
                x = tl.load(h + base + offset, mask=inside, other=0).to(DTYPE)
            if grad_hidden is not None:
                near = neighbours(grad_hidden_mean + plane + pixel, pixel, pixel < H * W, H, W, 1)
                total += convolve_transposed(near, w_all, DTYPE)
                if parts is not None:
                    # γ₁ sees the mean of h once, not once a channel, and C times the mean of the gradient.
                    once = (pixel < H * W) & (first == 0)
                    m = tl.load(mean + plane + pixel, mask=once, other=0) * C
                    sums_all = correlate(sums_all, near, m)
                near = neighbours(grad_hidden + base + offset, pixel, inside, H, W, STEP)
                total += convolve_transposed(near, w, DTYPE)
                if parts is not None:
                    sums = correlate(sums, near, x)
            if signs is not None:
                bits = neighbours(signs + base + offset, pixel, inside, H, W, STEP)
                total += g0 * _sum_where(bits, 1, w0)
                total += g1 * _sum_where(bits, 2, w1)
                total += g2 * _sum_where(bits, 4, w2)
                total += g3 * _sum_where(bits, 8, w3)
                if parts is not None:
                    sums0 = _add_where(sums0, bits, 1, g0 * x)
                    sums1 = _add_where(sums1, bits, 2, g1 * x)
                    sums2 = _add_where(sums2, bits, 4, g2 * x)
                    sums3 = _add_where(sums3, bits, 8, g3 * x)
            tl.store(grad_h + base + offset, total.to(grad_h.dtype.element_ty), mask=inside)
    if parts is not None:
        parts += tl.program_id(0)
        if grad_hidden is not None:
            store_sums(sums, parts, columns)
            store_sums(sums_all, parts + 9 * columns, columns)
        if signs is not None:
            store_sums(sums0, parts + 36 * columns, columns)
            store_sums(sums1, parts + 45 * columns, columns)
            store_sums(sums2, parts + 54 * columns, columns)
            store_sums(sums3, parts + 63 * columns, columns)


@jit
def _feature_gradient(feature, mean, weight, logit, inside, batch):
    """What one feature of an image gets from the gradient of the logit, through mean and variance over the batch."""
    difference = tl.load(feature, mask=inside, other=0) - tl.load(mean, mask=inside, other=0)
    return logit * (tl.load(weight) / batch + tl.load(weight + 4) * 2.0 / (batch - 1) * difference)


@jit
def _sum_where(bits, BIT: tl.constexpr, w):
    """`convolve_transposed` of a map that is 1 where the neighbourhood `bits` has `BIT`, else 0."""
    total = tl.where((bits[8] & BIT) != 0, w[0], 0.0)
    for i in tl.static_range(1, 9):
        total = tl.where((bits[8 - i] & BIT) != 0, total + w[i], total)
    return total


@jit
def _add_where(sums, bits, BIT: tl.constexpr, x):
    """`correlate` of such a map with x."""
    return (
        tl.where((bits[8] & BIT) != 0, sums[0] + x, sums[0]),
        tl.where((bits[7] & BIT) != 0, sums[1] + x, sums[1]),
        tl.where((bits[6] & BIT) != 0, sums[2] + x, sums[2]),
        tl.where((bits[5] & BIT) != 0, sums[3] + x, sums[3]),
        tl.where((bits[4] & BIT) != 0, sums[4] + x, sums[4]),
        tl.where((bits[3] & BIT) != 0, sums[5] + x, sums[5]),
        tl.where((bits[2] & BIT) != 0, sums[6] + x, sums[6]),
        tl.where((bits[1] & BIT) != 0, sums[7] + x, sums[7]),
        tl.where((bits[0] & BIT) != 0, sums[8] + x, sums[8]),
    )


@jit
def _sum_parts(
    parts,
    statistics,
    grad_logit,
    grad_phi,
    second_layer_parts,
    input_parts,
    columns,
    channel_ratio: tl.float64,
    size_ratio: tl.float64,
    C: tl.constexpr,
    NOISE: tl.constexpr,
    FEATURES: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One of the 82 parameters: the sum of what the programs of two launches found."""
    DTYPE: tl.constexpr = grad_phi.dtype.element_ty
    parameter = tl.program_id(0)
    total = tl.zeros([BLOCK], DTYPE)
    if parameter < 72:
        count = input_parts
        if parameter < 36:
            if not NOISE:
                count = 0
            elif parameter >= 18:
                count = second_layer_parts
        elif not FEATURES:
            count = 0
        for first in range(0, count, BLOCK):
            i = first + tl.arange(0, BLOCK)
            total += tl.load(parts + parameter * columns + i, mask=i < count, other=0)
    elif GATE:
        weight = parameter - 72
        for first in range(0, C, BLOCK):
            c = first + tl.arange(0, BLOCK)
            gradient = tl.load(grad_logit + c, mask=c < C, other=0)
            if weight < 8:
                statistic = tl.load(statistics + weight // 4 * (C * 4) + c * 4 + weight % 4, mask=c < C, other=0)
            else:
                ratio = tl.where(weight == 8, tl.full([], channel_ratio, DTYPE), tl.full([], size_ratio, DTYPE))
                statistic = tl.zeros([BLOCK], DTYPE) + ratio
            total += gradient * statistic
    tl.store(grad_phi + parameter, tl.sum(total, 0))


# --- the host's side


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
        c = min(channels, 8)  # a sector of the cache in float32
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


@functools.cache
def _check(device: torch.device) -> None:
    """Compile and launch something.

    Raises:
        Unavailable: Triton is missing, or does not work here.
    """
    if triton is None:
        raise Unavailable("Triton cannot be imported (install the package triton)")
    seed, noise = torch.zeros((), dtype=torch.int64, device=device), torch.empty(4, device=device)
    try:
        with torch.cuda.device_of(noise):
            _launch(_draw, 1, seed, noise, C=1, H=2, W=2, CHANNELS=1, PIXELS=1)
    except Exception as error:  # whatever a compiler, a linker or a driver has to say
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise Unavailable(f"Triton does not work here ({lines[0]})") from None


def draw_noise(seed: Tensor, like: Tensor) -> Tensor:
    """The ε that the kernels draw from `seed` for a feature map: `[B, C, H, W]`."""
    _check(like.device)
    noise = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    with torch.cuda.device_of(like):
        x = _Map(noise)
        tile, pieces = x.quarter_tile()
        sizes = {name: x.sizes[name] for name in ("C", "H", "W")}
        _launch(_draw, x.batch * pieces * _ceil(x.channels, tile["CHANNELS"]), seed, noise, **sizes, **tile)
    return noise


def track(h: Tensor, phi: Phi, running_mean: Tensor, running_var: Tensor) -> None:
    """Only the statistics of a training step, which is what strength 0 leaves to do."""
    _check(h.device)
    with torch.cuda.device_of(h):
        _prepare(_Map(h), phi, running_mean, running_var, TRACKING)


def forward(
    h: Tensor,
    phi: Phi,
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
    _check(h.device)
    with torch.cuda.device_of(h):
        x = _Map(h)
        hidden, scratch = _prepare(x, phi, running_mean, running_var, settings)
        _, _, scale, _, hidden_mean = scratch
        out = torch.empty_like(x.tensor)
        tile, pieces = x.quarter_tile()
        _launch(
            _perturb,
            x.batch * pieces * _ceil(x.channels, tile["CHANNELS"]),
            *(x.tensor, hidden, hidden_mean, phi.self2, phi.all2, scale),
            *(None if noise is None else x.laid_out(noise), seed, out),
            *(settings.strength, upper_bound(settings)),
            **x.sizes,
            NOISE=noise_source(settings, noise),
            GATE=settings.gate,
            **tile,
        )
    return out, *scratch


def _prepare(
    x: _Map, phi: Phi, running_mean: Tensor, running_var: Tensor, settings: Settings
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """What comes before the noise: the hidden map of μ `[B, C, H, W]`, and what `forward` returns for `backward`."""
    new = functools.partial(torch.empty, dtype=phi.self1.dtype, device=x.tensor.device)
    features = new(x.batch, x.channels, NUM_SCALE_FEATURES) if settings.training else None
    statistics, scale = new(2, x.channels, NUM_SCALE_FEATURES), new(x.channels)
    hidden = mean = hidden_mean = None
    if settings.noise:
        hidden = torch.empty_like(x.tensor, dtype=phi.self1.dtype)
        mean, hidden_mean = new(x.batch, x.pixels), new(x.batch, x.pixels)
    tile = x.tile(TILE, PIXELS, WARPS)
    groups = _ceil(x.channels, tile["CHANNELS"]) if settings.training else 0
    pieces = _ceil(x.pixels, tile["PIXELS"]) if settings.noise else 0
    if groups or pieces:
        _launch(
            _summarize,
            x.batch * (groups + pieces),
            *(x.tensor, phi.scale_kernels, features, mean),
            **x.sizes,
            **tile,
        )
    _launch(
        _first_layer,
        _ceil(x.channels, SCALE_CHANNELS) + x.batch * pieces,
        *(x.tensor, mean, phi.self1, phi.all1, hidden, hidden_mean),
        *(features, phi.scale_affine, running_mean, running_var, statistics, scale),
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
    phi: Phi,
    noise: Tensor | None,
    seed: Tensor | None,
    scratch: tuple[Tensor | None, ...],
    settings: Settings,
    phi_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of h `[B, C, H, W]` and of φ `[82]` (None unless asked for).

    `scratch` is what `forward` returned after the perturbed map.
    """
    with torch.cuda.device_of(h):
        return _backward(_Map(h), grad_out, phi, noise, seed, *scratch, settings, phi_gradient)


def _backward(
    x: _Map,
    grad_out: Tensor,
    phi: Phi,
    noise: Tensor | None,
    seed: Tensor | None,
    features: Tensor | None,
    statistics: Tensor,
    scale: Tensor,
    mean: Tensor | None,
    hidden_mean: Tensor | None,
    settings: Settings,
    phi_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    h, dtype = x.tensor, phi.self1.dtype
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
        _launch(
            _first_layer_again,
            pieces,
            *(h, mean, phi.self1, phi.all1, phi.scale_kernels, hidden, signs),
            **x.sizes,
            **tile,
        )

    grad_h = torch.empty_like(h)
    # A part of a sum is not rounded to half precision.
    direct = new_map() if through_maps and h.dtype != dtype else grad_h
    quarter_tile, quarter_pieces = x.quarter_tile()
    rows = x.batch * quarter_pieces
    if settings.gate:
        grad_scale, grad_logit = new(rows, x.channels), new(x.channels)
    _launch(
        _perturb_backward,
        rows,
        *(h, x.laid_out(grad_out), hidden, hidden_mean, phi.self2, phi.all2, scale),
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
            _second_layer_backward,
            (pieces if settings.noise else 0) + (_ceil(x.channels, SCALE_CHANNELS) if settings.gate else 0),
            *(grad_mu, grad_mu_mean, hidden, hidden_mean, phi.self2, phi.all2, grad_hidden_mean),
            *(grad_scale, scale, grad_logit, rows, parts, columns),
            **x.sizes,
            **tile,
            SCALE_CHANNELS=SCALE_CHANNELS,
            SCALE_ROWS=SCALE_ROWS,
        )
    del grad_mu
    if through_maps:
        _launch(
            _input_backward,
            groups,
            *(h, mean, hidden, grad_hidden_mean, phi.self1, phi.all1, phi.scale_kernels, phi.scale_affine),
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
        _sum_parts,
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
