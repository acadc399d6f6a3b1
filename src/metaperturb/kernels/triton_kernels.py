"""The fused site on a GPU: its Triton kernels, which `triton_site.py` launches.

| pass | kernel | a program has | computes |
|---|---|---|---|
| forward | `summarize` | some channels, or some pixels | scale features; mean over channels |
| | `first_layer` | some channels, or some pixels | statistics and scale; hidden map and its mean |
| | `perturb` | some channels and pixels | noise, perturbed map |
| backward | `hidden_layer` | some pixels | hidden map again, signs of the four feature maps |
| | `perturb_backward` | some pixels | gradient of μ, direct part of that of h, shares in that of the scale |
| | `second_layer_backward` | some channels, or some pixels | gradient of the scale; gradient of the hidden map |
| | `input_backward` | some channels and pixels | gradient of h, shares in that of φ |
| | `sum_parts` | a parameter | gradient of φ |

No kernel adds atomically: sums are taken in parts, the parts in a fixed order, so equal inputs give equal bits.

A tile of a map is `[channels, pixels]`, pixels row by row. A 3×3 convolution loads it nine times, at nine offsets,
eight of them from the cache of the multiprocessor. Sizes of maps are constants of the compiler, which makes the offsets
immediate operands. Half-precision maps are read and written as they are; all arithmetic is in the dtype of φ.
"""

from dataclasses import make_dataclass

from metaperturb.kernels import plain
from metaperturb.kernels.backend import Unavailable

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
    from triton.language import float64 as f64
except ImportError:
    raise Unavailable("Triton cannot be imported (install the package triton)") from None


def jit(function):
    counts = ["batch", "rows", "columns", "second_layer_parts", "input_parts"]  # of any size, with one compiled kernel
    return triton.jit(function, do_not_specialize=counts)


# What a kernel is compiled for, its argument `K`. A map `[B, C, H, W]` has `PLANE` pixels, `STEP` values apart, `LAST`
# if its channels come last. A program's tile has `CHANNELS` and `PIXELS`; `CHANNEL_TILES` and `TILES` cover the map or,
# in the kernels that need the noise, the first `QUARTER` of its pixels. `SCALES` programs of `SCALE_CHANNELS` make the
# scale, `SCALE_ROWS` images at a time. `NOISE` (a number of backend.py), `GATE`, `RELATIVE`: what the site computes.
MAP, TILE = ("C", "H", "W", "LAST", "PLANE", "STEP"), ("CHANNELS", "PIXELS", "CHANNEL_TILES", "TILES", "QUARTER")
SCALE, SITE = ("SCALES", "SCALE_CHANNELS", "SCALE_ROWS"), ("NOISE", "GATE", "RELATIVE")
Constants = make_dataclass("Constants", MAP + TILE + SCALE + SITE, frozen=True)


# --- a tile and its neighbourhood


@jit
def offsets(c, pixel, K):
    """Where channels c and pixels lie inside an image: `[channels, pixels]`."""
    # Without channels last, hides how rows are aligned: else a thread takes four pixels of a row, for the sake of wide
    # loads, and the loads at shifted places, which cannot be wide, touch four times as many cache lines each.
    return pixel * K.C + c if K.LAST else tl.multiple_of(c * K.PLANE + pixel, [1, 1])


@jit
def neighbours(p, pixel, inside, STEP, K):
    """The 3×3 neighbourhood of each place that `p` points to, zeros around the map: nine tiles, row by row."""
    y, x, near = pixel // K.W, pixel % K.W, ()
    for i in tl.static_range(9):
        mask = inside
        if i // 3 != 1:
            mask = mask & (y + (i // 3 - 1) >= 0) & (y + (i // 3 - 1) < K.H)
        if i % 3 != 1:
            mask = mask & (x + (i % 3 - 1) >= 0) & (x + (i % 3 - 1) < K.W)
        near += (tl.load(p + ((i // 3 - 1) * K.W + (i % 3 - 1)) * STEP, mask=mask, other=0),)
    return near


@jit
def kernel3x3(p, k):
    """The k-th kernel of φ at `p`: nine numbers."""
    numbers = ()
    for i in tl.static_range(9):
        numbers += (tl.load(p + 9 * k + i),)
    return numbers


@jit
def feature_kernels(phi):
    return kernel3x3(phi, 4), kernel3x3(phi, 5), kernel3x3(phi, 6), kernel3x3(phi, 7)


@jit
def convolve(near, w, DTYPE, BACKWARD: constexpr = False):
    """`BACKWARD`: from the gradient of the result to that of the input."""
    total = (near[8] if BACKWARD else near[0]).to(DTYPE) * w[0]
    for i in tl.static_range(1, 9):
        total += (near[8 - i] if BACKWARD else near[i]).to(DTYPE) * w[i]
    return total


@jit
def zeros(CHANNELS, PIXELS, DTYPE):
    return tl.zeros([CHANNELS, PIXELS], DTYPE)  # where Triton 3.6 cannot take what it reads from `K`


@jit
def nine_zeros(CHANNELS, PIXELS, DTYPE):
    zero = zeros(CHANNELS, PIXELS, DTYPE)
    return (zero, zero, zero, zero, zero, zero, zero, zero, zero)


@jit
def correlate(sums, near, x):
    """Adds a tile's share of the gradient of a 3×3 kernel: `near`, the gradient around what it reads, times that."""
    added = ()
    for i in tl.static_range(9):
        added += (sums[i] + near[8 - i] * x,)
    return added


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
    if a.dtype == f64:
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


P, Q = constexpr(plain.EXPECTATION_P), constexpr(plain.EXPECTATION_Q)
LEAST_MU, MOST_MU = constexpr(plain.MU_RANGE[0]), constexpr(plain.MU_RANGE[1])


@jit
def expected_softplus(mu):
    """E[softplus(μ + ε)], ε ~ N(0, 1), and its derivative by μ: the formula of plain.py."""
    value, slope = softplus(mu)
    e = tl.exp(-tl.abs(mu))
    share = 1.0 / (1.0 + e)
    u = 4.0 * e * share * share
    p, q = P[4] + 0.0 * u, Q[4] + 0.0 * u
    dp, dq = 0.0 * u, 0.0 * u
    for i in tl.static_range(3, -1, -1):
        dp, dq = dp * u + p, dq * u + q
        p, q = p * u + P[i], q * u + Q[i]
    ratio = p / q
    du = tl.where(mu < 0, u, -u) * (1.0 - e) * share
    return value + 0.25 * u * ratio, slope + 0.25 * du * (ratio + u * (dp - ratio * dq) / q)


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

    `plane` `[channels, 1]`, `j` `[1, pixels]`. Philox4x32-7 (Salmon et al. 2011) of the counter (j, plane, 0, 0).
    """
    zero = tl.zeros([1, 1], tl.int32)
    c0, c1, c2, c3 = tl.philox(tl.load(seed), j, plane, zero, zero, n_rounds=7)
    n0, n1 = normal_pair(c0, c1)
    n2, n3 = normal_pair(c2, c3)
    return n0, n1, n2, n3


# --- forward


@jit
def summarize(h, phi, features, mean, K: constexpr):
    """Features `[B, C, 4]` and the mean over channels `[B, H, W]`, by programs of two kinds; either may be None."""
    DTYPE: constexpr = phi.dtype.element_ty
    FEATURE_PARTS: constexpr = K.CHANNEL_TILES if features is not None else 0
    PARTS: constexpr = FEATURE_PARTS + (K.TILES if mean is not None else 0)
    image = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    h += image.to(tl.int64) * (K.C * K.PLANE)
    if features is not None and part < FEATURE_PARTS:
        place, first = features + image * (K.C * 4), part * K.CHANNELS
        w, zero = feature_kernels(phi), zeros(K.CHANNELS, K.PIXELS, DTYPE)
        c, sums = first + tl.arange(0, K.CHANNELS)[:, None], (zero, zero, zero, zero)
        for start in range(0, K.PLANE, K.PIXELS):
            pixel = start + tl.arange(0, K.PIXELS)[None, :]
            inside = (c < K.C) & (pixel < K.PLANE)
            near = neighbours(h + offsets(c, pixel, K), pixel, inside, K.STEP, K)
            # Outside the map all nine are 0, and so is what they give.
            added = ()
            for k in tl.static_range(4):
                added += (sums[k] + relu(convolve(near, w[k], DTYPE)),)
            sums = added
        c = first + tl.arange(0, K.CHANNELS)
        for k in tl.static_range(4):
            tl.store(place + c * 4 + k, tl.sum(sums[k], 1) / K.PLANE, mask=c < K.C)
    if mean is not None and part >= FEATURE_PARTS:
        start, place = (part - FEATURE_PARTS) * K.PIXELS, mean + image.to(tl.int64) * K.PLANE
        pixel = start + tl.arange(0, K.PIXELS)
        total = zeros(K.CHANNELS, K.PIXELS, DTYPE)
        for first in range(0, K.C, K.CHANNELS):
            c = first + tl.arange(0, K.CHANNELS)[:, None]
            inside = (c < K.C) & (pixel[None, :] < K.PLANE)
            total += tl.load(h + offsets(c, pixel[None, :], K), mask=inside, other=0).to(DTYPE)
        tl.store(place + pixel, tl.sum(total, 0) / K.C, mask=pixel < K.PLANE)


@jit
def first_layer(maps, scales, batch, channel_ratio: f64, size_ratio: f64, momentum: f64, K: constexpr):
    """The scale `[C]`; the hidden map `[B, C, H, W]` and its mean `[B, H, W]`: by programs of two kinds."""
    h, mean, phi, hidden, hidden_mean = maps
    features, running_mean, running_var, statistics, scale = scales
    DTYPE: constexpr = phi.dtype.element_ty
    if tl.program_id(0) < K.SCALES:
        # Mean and unbiased variance over the batch, in training, into `statistics` `[2, C, 4]` and the running ones; s.
        by_channels, by_size = tl.full([], channel_ratio, DTYPE), tl.full([], size_ratio, DTYPE)
        rate = tl.full([], momentum, DTYPE)
        # A feature of a channel after the other, as they lie in memory.
        v = tl.program_id(0) * (K.SCALE_CHANNELS * 4) + tl.arange(0, K.SCALE_CHANNELS * 4)
        inside = v < K.C * 4
        if features is not None:
            total = zeros(K.SCALE_ROWS, K.SCALE_CHANNELS * 4, DTYPE)
            for first in range(0, batch, K.SCALE_ROWS):
                b = first + tl.arange(0, K.SCALE_ROWS)[:, None]
                total += tl.load(features + b * (K.C * 4) + v[None, :], mask=(b < batch) & inside[None, :], other=0)
            average = tl.sum(total, 0) / batch
            total = zeros(K.SCALE_ROWS, K.SCALE_CHANNELS * 4, DTYPE)
            for first in range(0, batch, K.SCALE_ROWS):
                b = first + tl.arange(0, K.SCALE_ROWS)[:, None]
                mask = (b < batch) & inside[None, :]
                difference = tl.load(features + b * (K.C * 4) + v[None, :], mask=mask, other=0) - average[None, :]
                total += tl.where(mask, difference * difference, 0.0)
            var = tl.sum(total, 0) / (batch - 1)
            before = tl.load(running_mean + v, mask=inside, other=0)
            tl.store(running_mean + v, before + rate * (average - before), mask=inside)
            before = tl.load(running_var + v, mask=inside, other=0)
            tl.store(running_var + v, before + rate * (var - before), mask=inside)
        else:
            average = tl.load(running_mean + v, mask=inside, other=0)
            var = tl.load(running_var + v, mask=inside, other=0)
        tl.store(statistics + v, average, mask=inside)
        tl.store(statistics + K.C * 4 + v, var, mask=inside)
        terms = average * tl.load(phi + 72 + v % 4) + var * tl.load(phi + 76 + v % 4)
        logit = tl.sum(tl.reshape(terms, K.SCALE_CHANNELS, 4), 1)
        logit += tl.load(phi + 80) * by_channels + tl.load(phi + 81) * by_size
        c = tl.program_id(0) * K.SCALE_CHANNELS + tl.arange(0, K.SCALE_CHANNELS)
        tl.store(scale + c, 1.0 / (1.0 + tl.exp(-logit)), mask=c < K.C)
    if hidden is not None and tl.program_id(0) >= K.SCALES:
        hidden_layer(h, mean, phi, hidden, hidden_mean, None, K.SCALES, K)


@jit
def hidden_layer(h, mean, phi, hidden, hidden_mean, signs, FIRST: constexpr, K: constexpr):
    """Of what is not None: the hidden map `[B, C, H, W]`, its mean `[B, H, W]`, bits of which features are positive.

    `FIRST`: the first program.
    """
    DTYPE: constexpr = phi.dtype.element_ty
    program = tl.program_id(0) - FIRST
    image = program // K.TILES
    base = image.to(tl.int64) * (K.C * K.PLANE)
    plane = image.to(tl.int64) * K.PLANE
    pixel = program % K.TILES * K.PIXELS + tl.arange(0, K.PIXELS)[None, :]
    if hidden is not None:
        w = kernel3x3(phi, 0)
        around = neighbours(mean + plane + pixel, pixel, pixel < K.PLANE, 1, K)
        shared = convolve(around, kernel3x3(phi, 1), DTYPE)
    if signs is not None:
        w_features = feature_kernels(phi)
    total = zeros(K.CHANNELS, K.PIXELS, DTYPE)
    for first in range(0, K.C, K.CHANNELS):
        c = first + tl.arange(0, K.CHANNELS)[:, None]
        inside = (c < K.C) & (pixel < K.PLANE)
        offset = offsets(c, pixel, K)
        near = neighbours(h + base + offset, pixel, inside, K.STEP, K)
        if hidden is not None:
            value = relu(convolve(near, w, DTYPE) + shared)
            tl.store(hidden + base + offset, value, mask=inside)
            total += tl.where(inside, value, 0.0)
        if signs is not None:
            # A NaN counts as positive, as where relu is differentiated.
            bits = tl.where(convolve(near, w_features[0], DTYPE) <= 0, 0, 1)
            for k in tl.static_range(1, 4):
                bits += tl.where(convolve(near, w_features[k], DTYPE) <= 0, 0, 1 << k)
            tl.store(signs + base + offset, bits.to(tl.uint8), mask=inside)
    if hidden_mean is not None:
        tl.store(hidden_mean + plane + pixel, tl.sum(total, 0)[None, :] / K.C, mask=pixel < K.PLANE)


@jit
def noise_mean(hidden, hidden_mean, w, w_all, pixel, inside, K, DTYPE):
    """μ of a tile; `hidden` and `hidden_mean` point to its places."""
    shared = convolve(neighbours(hidden_mean, pixel, pixel < K.PLANE, 1, K), w_all, DTYPE)
    return convolve(neighbours(hidden, pixel, inside, K.STEP, K), w, DTYPE) + shared


@jit
def place_in_quarters(K):
    """A program's image and where it begins, its channels `[channels, 1]` and, of the first quarter, its pixels."""
    tile = tl.program_id(0) % K.TILES
    first = tl.program_id(0) // K.TILES % K.CHANNEL_TILES * K.CHANNELS
    image = tl.program_id(0) // K.TILES // K.CHANNEL_TILES
    base = image.to(tl.int64) * (K.C * K.PLANE)
    c = first + tl.arange(0, K.CHANNELS)[:, None]
    return image, base, c, tile * K.PIXELS + tl.arange(0, K.PIXELS)[None, :]


@jit
def perturb(h, hidden, hidden_mean, phi, scale, noise, seed, out, strength: f64, clip: f64, K: constexpr):
    """`h ∘ ((s ∘ z − 1)·c + 1)`, clipped from above; `RELATIVE`: the factor of mean one that `plain` describes."""
    DTYPE: constexpr = phi.dtype.element_ty
    image, base, c, j = place_in_quarters(K)
    strength = tl.full([], strength, DTYPE)
    clip = tl.full([], clip, DTYPE)
    s = tl.load(scale + c, mask=c < K.C, other=0) if K.GATE else 1.0
    if K.NOISE:
        hidden_mean += image.to(tl.int64) * K.PLANE
        w, w_all = kernel3x3(phi, 2), kernel3x3(phi, 3)
    if K.NOISE == 1:
        drawn = normals(seed, image * K.C + c, j)
    for i in tl.static_range(4):
        pixel = i * K.QUARTER + j
        inside = (c < K.C) & (j < K.QUARTER) & (pixel < K.PLANE)
        offset = offsets(c, pixel, K)
        x = tl.load(h + base + offset, mask=inside, other=0).to(DTYPE)
        if K.NOISE:
            a = noise_mean(hidden + base + offset, hidden_mean + pixel, w, w_all, pixel, inside, K, DTYPE)
            if K.RELATIVE:
                a = tl.where(a < LEAST_MU, LEAST_MU, tl.where(a > MOST_MU, MOST_MU, a))
            expected, _ = expected_softplus(a)
            if K.NOISE == 1:
                a += drawn[i].to(DTYPE)
            elif K.NOISE == 2:
                a += tl.load(noise + base + offset, mask=inside, other=0).to(DTYPE)
            z, _ = softplus(a)
            if K.RELATIVE:
                x = (z / expected - 1.0) * strength + 1.0
            else:
                if K.NOISE == 3:
                    z = expected
                x *= (z * s - 1.0) * strength + 1.0
        else:
            x *= (s - 1.0) * strength + 1.0
        x = tl.where(x > clip, clip, x)
        tl.store(out + base + offset, x.to(out.dtype.element_ty), mask=inside)


@jit
def draw(seed, noise, K: constexpr):
    """The noise of a site as a tensor: `[B, C, H, W]`."""
    image, base, c, j = place_in_quarters(K)
    noise += base + c * K.PLANE
    values = normals(seed, image * K.C + c, j)
    for i in tl.static_range(4):
        pixel = i * K.QUARTER + j
        mask = (c < K.C) & (j < K.QUARTER) & (pixel < K.PLANE)
        tl.store(noise + pixel, values[i].to(noise.dtype.element_ty), mask=mask)


# --- backward


@jit
def perturb_backward(site, gradients, strength: f64, clip: f64, K: constexpr):
    """From the gradient of the perturbed map to those of its factors.

    Writes the direct part of the gradient of h (if wanted) and the gradient of μ, `[B, C, H, W]`, the latter's mean
    over channels `[B, H, W]`, and the gradient of the scale `[programs, C]`.
    """
    h, grad_out, hidden, hidden_mean, phi, scale, noise, seed = site
    grad_h, grad_mu, grad_mu_mean, grad_scale = gradients
    DTYPE: constexpr = phi.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    image = tl.program_id(0) // K.TILES
    j = tl.program_id(0) % K.TILES * K.PIXELS + tl.arange(0, K.PIXELS)[None, :]
    base = image.to(tl.int64) * (K.C * K.PLANE)
    strength = tl.full([], strength, DTYPE)
    clip = tl.full([], clip, DTYPE)
    zero = zeros(K.CHANNELS, K.PIXELS, DTYPE)
    sums = (zero, zero, zero, zero)
    if K.NOISE:
        hidden_mean += image.to(tl.int64) * K.PLANE
        grad_mu_mean += image.to(tl.int64) * K.PLANE
        w, w_all = kernel3x3(phi, 2), kernel3x3(phi, 3)
    for first in range(0, K.C, K.CHANNELS):
        c = first + tl.arange(0, K.CHANNELS)[:, None]
        s = tl.load(scale + c, mask=c < K.C, other=0) if K.GATE else 1.0
        total, added = zero, ()
        if K.NOISE == 1:
            drawn = normals(seed, image * K.C + c, j)
        for i in tl.static_range(4):
            pixel = i * K.QUARTER + j
            inside = (c < K.C) & (j < K.QUARTER) & (pixel < K.PLANE)
            offset = offsets(c, pixel, K)
            x = tl.load(h + base + offset, mask=inside, other=0).to(DTYPE)
            incoming = tl.load(grad_out + base + offset, mask=inside, other=0).to(DTYPE)
            if K.NOISE:
                a = noise_mean(hidden + base + offset, hidden_mean + pixel, w, w_all, pixel, inside, K, DTYPE)
                if K.NOISE == 1:
                    a += drawn[i].to(DTYPE)
                elif K.NOISE == 2:
                    a += tl.load(noise + base + offset, mask=inside, other=0).to(DTYPE)
                if K.NOISE == 3:
                    z, slope = expected_softplus(a)
                else:
                    z, slope = softplus(a)
                factor = (z * s - 1.0) * strength + 1.0
            else:
                factor = (s - 1.0) * strength + 1.0
            direct = tl.where(x * factor > clip, 0.0, incoming)
            grad_g = tl.where(inside, direct * x * strength, 0.0)
            if grad_h is not None:
                tl.store(grad_h + base + offset, direct * factor, mask=inside)
            if K.NOISE:
                total += grad_g * z
                through = grad_g * s * slope
                tl.store(grad_mu + base + offset, through, mask=inside)
                added += (sums[i] + through,)
            else:
                total += grad_g
        if K.NOISE:
            sums = added
        if K.GATE:
            c = first + tl.arange(0, K.CHANNELS)
            tl.store(grad_scale + program * K.C + c, tl.sum(total, 1), mask=c < K.C)
    if K.NOISE:
        for i in tl.static_range(4):
            pixel = i * K.QUARTER + j
            mean = tl.sum(sums[i], 0)[None, :] / K.C
            tl.store(grad_mu_mean + pixel, mean, mask=(j < K.QUARTER) & (pixel < K.PLANE))


@jit
def second_layer_backward(layer, gate, rows, parts, columns, K: constexpr):
    """The gradient of the scale's logit `[C]`, and that of layer 1 before its relu, by programs of two kinds.

    The latter takes the place of `hidden`; its mean over channels is `grad_hidden_mean` `[B, H, W]`.
    """
    grad_mu, grad_mu_mean, hidden, hidden_mean, phi, grad_hidden_mean = layer
    grad_scale, scale, grad_logit = gate
    DTYPE: constexpr = phi.dtype.element_ty
    SCALES: constexpr = K.SCALES if grad_logit is not None else 0
    if grad_logit is not None and tl.program_id(0) < SCALES:
        c = tl.program_id(0) * K.SCALE_CHANNELS + tl.arange(0, K.SCALE_CHANNELS)
        sums = zeros(K.SCALE_ROWS, K.SCALE_CHANNELS, DTYPE)
        for first in range(0, rows, K.SCALE_ROWS):
            row = first + tl.arange(0, K.SCALE_ROWS)[:, None]
            p = grad_scale + row.to(tl.int64) * K.C + c[None, :]
            sums += tl.load(p, mask=(row < rows) & (c[None, :] < K.C), other=0)
        s = tl.load(scale + c, mask=c < K.C, other=0)
        tl.store(grad_logit + c, tl.sum(sums, 0) * s * (1.0 - s), mask=c < K.C)
    if grad_mu is not None and tl.program_id(0) >= SCALES:
        program = tl.program_id(0) - SCALES
        image = program // K.TILES
        base = image.to(tl.int64) * (K.C * K.PLANE)
        plane = image.to(tl.int64) * K.PLANE
        pixel = program % K.TILES * K.PIXELS + tl.arange(0, K.PIXELS)[None, :]
        w = kernel3x3(phi, 2)
        around = neighbours(grad_mu_mean + plane + pixel, pixel, pixel < K.PLANE, 1, K)
        shared = convolve(around, kernel3x3(phi, 3), DTYPE, True)
        if parts is not None:
            # γ₂ sees the mean of the hidden map and the sum of the gradient over channels: C times its mean.
            mean = tl.load(hidden_mean + plane + pixel, mask=pixel < K.PLANE, other=0)
            all_sums = correlate(nine_zeros(1, K.PIXELS, DTYPE), around, mean * K.C)
            store_sums(all_sums, parts + 27 * columns + program, columns)
            sums = nine_zeros(K.CHANNELS, K.PIXELS, DTYPE)
        total = zeros(K.CHANNELS, K.PIXELS, DTYPE)
        for first in range(0, K.C, K.CHANNELS):
            c = first + tl.arange(0, K.CHANNELS)[:, None]
            inside = (c < K.C) & (pixel < K.PLANE)
            offset = offsets(c, pixel, K)
            near = neighbours(grad_mu + base + offset, pixel, inside, K.STEP, K)
            x = tl.load(hidden + base + offset, mask=inside, other=0)
            value = tl.where(x <= 0, 0.0, convolve(near, w, DTYPE, True) + shared)
            tl.store(hidden + base + offset, value, mask=inside)
            total += value
            if parts is not None:
                sums = correlate(sums, near, x)
        tl.store(grad_hidden_mean + plane + pixel, tl.sum(total, 0)[None, :] / K.C, mask=pixel < K.PLANE)
        if parts is not None:
            store_sums(sums, parts + 18 * columns + program, columns)


@jit
def input_backward(layer, gate, direct, grad_h, parts, batch, columns, K: constexpr, GROUP: constexpr, RUN: constexpr):
    """Adds to the direct part of the gradient of h (if wanted) what comes through layer 1 and through the features.

    A program goes through `GROUP` channels and `RUN` pixels of an image.
    """
    h, mean, grad_hidden, grad_hidden_mean, phi = layer
    signs, features, statistics, grad_logit = gate
    DTYPE: constexpr = phi.dtype.element_ty
    GROUPS: constexpr = (K.C + GROUP - 1) // GROUP
    RUNS: constexpr = (K.PLANE + RUN - 1) // RUN
    start_pixel = tl.program_id(0) % RUNS * RUN
    start = tl.program_id(0) // RUNS % GROUPS * GROUP
    image = tl.program_id(0) // RUNS // GROUPS
    plane = image.to(tl.int64) * K.PLANE
    base = image.to(tl.int64) * (K.C * K.PLANE)
    if grad_hidden is not None:
        w, w_all = kernel3x3(phi, 0), kernel3x3(phi, 1)
        if parts is not None:
            sums = nine_zeros(K.CHANNELS, K.PIXELS, DTYPE)
            sums_all = nine_zeros(1, K.PIXELS, DTYPE)
    if signs is not None:
        w_features = feature_kernels(phi)
        if parts is not None:
            nine = nine_zeros(K.CHANNELS, K.PIXELS, DTYPE)
            feature_sums = (nine, nine, nine, nine)
    for first in range(start, start + GROUP, K.CHANNELS):
        c = first + tl.arange(0, K.CHANNELS)[:, None]
        if signs is not None:
            p = features + image * (K.C * 4) + c * 4
            q = statistics + c * 4
            logit = tl.load(grad_logit + c, mask=c < K.C, other=0) / K.PLANE
            gradients = ()
            for k in tl.static_range(4):
                gradients += (feature_gradient(p + k, q + k, phi + 72 + k, logit, c < K.C, batch),)
        for tile in range(start_pixel, start_pixel + RUN, K.PIXELS):
            pixel = tile + tl.arange(0, K.PIXELS)[None, :]
            inside = (c < K.C) & (pixel < K.PLANE)
            offset = offsets(c, pixel, K)
            if grad_h is not None:
                total = tl.load(direct + base + offset, mask=inside, other=0)
            if parts is not None:
                x = tl.load(h + base + offset, mask=inside, other=0).to(DTYPE)
            if grad_hidden is not None:
                near = neighbours(grad_hidden_mean + plane + pixel, pixel, pixel < K.PLANE, 1, K)
                if grad_h is not None:
                    total += convolve(near, w_all, DTYPE, True)
                if parts is not None:
                    # γ₁ sees the mean of h once, not once a channel, and C times the mean of the gradient.
                    once = (pixel < K.PLANE) & (first == 0)
                    m = tl.load(mean + plane + pixel, mask=once, other=0) * K.C
                    sums_all = correlate(sums_all, near, m)
                near = neighbours(grad_hidden + base + offset, pixel, inside, K.STEP, K)
                if grad_h is not None:
                    total += convolve(near, w, DTYPE, True)
                if parts is not None:
                    sums = correlate(sums, near, x)
            if signs is not None:
                bits = neighbours(signs + base + offset, pixel, inside, K.STEP, K)
                if grad_h is not None:
                    for k in tl.static_range(4):
                        total += gradients[k] * sum_where(bits, 1 << k, w_features[k])
                if parts is not None:
                    added = ()
                    for k in tl.static_range(4):
                        added += (add_where(feature_sums[k], bits, 1 << k, gradients[k] * x),)
                    feature_sums = added
            if grad_h is not None:
                tl.store(grad_h + base + offset, total.to(grad_h.dtype.element_ty), mask=inside)
    if parts is not None:
        parts += tl.program_id(0)
        if grad_hidden is not None:
            store_sums(sums, parts, columns)
            store_sums(sums_all, parts + 9 * columns, columns)
        if signs is not None:
            for k in tl.static_range(4):
                store_sums(feature_sums[k], parts + (36 + 9 * k) * columns, columns)


@jit
def feature_gradient(feature, mean, weight, logit, inside, batch):
    """What one feature of an image gets from the gradient of the logit, through mean and variance over the batch."""
    difference = tl.load(feature, mask=inside, other=0) - tl.load(mean, mask=inside, other=0)
    return logit * (tl.load(weight) / batch + tl.load(weight + 4) * 2.0 / (batch - 1) * difference)


@jit
def sum_where(bits, BIT, w):
    """`convolve`, backward, of a map that is 1 where the neighbourhood `bits` has `BIT`, else 0."""
    total = tl.where((bits[8] & BIT) != 0, w[0], 0.0)
    for i in tl.static_range(1, 9):
        total = tl.where((bits[8 - i] & BIT) != 0, total + w[i], total)
    return total


@jit
def add_where(sums, bits, BIT, x):
    """`correlate` of such a map with x."""
    added = ()
    for i in tl.static_range(9):
        added += (tl.where((bits[8 - i] & BIT) != 0, sums[i] + x, sums[i]),)
    return added


@jit
def sum_parts(
    parts,
    statistics,
    grad_logit,
    grad_phi,
    second_layer_parts,
    input_parts,
    columns,
    channel_ratio: f64,
    size_ratio: f64,
    C: constexpr,
    NOISE: constexpr,
    FEATURES: constexpr,
    GATE: constexpr,
    BLOCK: constexpr,
):
    """One of the 82 parameters: the sum of what the programs of two launches found."""
    DTYPE: constexpr = grad_phi.dtype.element_ty
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
