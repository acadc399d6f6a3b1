"""The fused site on a GPU: its Triton kernels, which `triton_site.py` launches.

| pass | kernel | a program has | computes |
|---|---|---|---|
| forward | `summarize` | some channels, or some pixels | scale features; mean over channels |
| | `first_layer` | some channels, or some pixels | statistics and scale; hidden map and its mean |
| | `perturb` | some channels and pixels | noise, perturbed map |
| backward | `first_layer_again` | some pixels | hidden map, signs of the four feature maps |
| | `perturb_backward` | some pixels | gradient of μ, direct part of that of h, shares in that of the scale |
| | `second_layer_backward` | some channels, or some pixels | gradient of the scale; gradient of the hidden map |
| | `input_backward` | some channels and pixels | gradient of h, shares in that of φ |
| | `sum_parts` | a parameter | gradient of φ |

No kernel adds atomically: sums are taken in parts, the parts in a fixed order, so equal inputs give equal bits.

A tile of a map is `[channels, pixels]`, pixels row by row. A 3×3 convolution loads it nine times, at nine offsets,
eight of them from the cache of the multiprocessor. Sizes of maps are constants of the compiler, which makes the offsets
immediate operands. Half-precision maps are read and written as they are; all arithmetic is in the dtype of φ.
"""

from metaperturb.kernels.triton_blocks import (
    LEAST_MU,
    MOST_MU,
    constexpr,
    convolve,
    convolve_transposed,
    correlate,
    expected_softplus,
    feature_kernels,
    jit,
    kernel3x3,
    neighbours,
    nine_zeros,
    normals,
    offsets,
    relu,
    softplus,
    store_sums,
    tl,
)

# --- forward


@jit
def summarize(
    h,
    phi,
    features,
    mean,
    C: constexpr,
    H: constexpr,
    W: constexpr,
    LAST: constexpr,
    CHANNELS: constexpr,
    PIXELS: constexpr,
):
    """Features `[B, C, 4]` and the mean over channels `[B, H, W]`, by programs of two kinds; either may be None."""
    DTYPE: constexpr = phi.dtype.element_ty
    FEATURE_PARTS: constexpr = (C + CHANNELS - 1) // CHANNELS if features is not None else 0
    PARTS: constexpr = FEATURE_PARTS + ((H * W + PIXELS - 1) // PIXELS if mean is not None else 0)
    image = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    h += image.to(tl.int64) * (C * H * W)
    if features is not None and part < FEATURE_PARTS:
        place, first = features + image * (C * 4), part * CHANNELS
        w, zero = feature_kernels(phi), tl.zeros([CHANNELS, PIXELS], DTYPE)
        c, sums = first + tl.arange(0, CHANNELS)[:, None], (zero, zero, zero, zero)
        for start in range(0, H * W, PIXELS):
            pixel = start + tl.arange(0, PIXELS)[None, :]
            inside = (c < C) & (pixel < H * W)
            near = neighbours(h + offsets(c, pixel, C, H, W, LAST), pixel, inside, H, W, C if LAST else 1)
            # Outside the map all nine are 0, and so is what they give.
            added = ()
            for k in tl.static_range(4):
                added += (sums[k] + relu(convolve(near, w[k], DTYPE)),)
            sums = added
        c = first + tl.arange(0, CHANNELS)
        for k in tl.static_range(4):
            tl.store(place + c * 4 + k, tl.sum(sums[k], 1) / (H * W), mask=c < C)
    if mean is not None and part >= FEATURE_PARTS:
        start, place = (part - FEATURE_PARTS) * PIXELS, mean + image.to(tl.int64) * (H * W)
        pixel = start + tl.arange(0, PIXELS)
        total = tl.zeros([CHANNELS, PIXELS], DTYPE)
        for first in range(0, C, CHANNELS):
            c = first + tl.arange(0, CHANNELS)[:, None]
            inside = (c < C) & (pixel[None, :] < H * W)
            total += tl.load(h + offsets(c, pixel[None, :], C, H, W, LAST), mask=inside, other=0).to(DTYPE)
        tl.store(place + pixel, tl.sum(total, 0) / C, mask=pixel < H * W)


@jit
def first_layer(
    h,
    mean,
    phi,
    hidden,
    hidden_mean,
    features,
    running_mean,
    running_var,
    statistics,
    scale,
    batch,
    channel_ratio: tl.float64,
    size_ratio: tl.float64,
    momentum: tl.float64,
    C: constexpr,
    H: constexpr,
    W: constexpr,
    LAST: constexpr,
    TRAINING: constexpr,
    NOISE: constexpr,
    CHANNELS: constexpr,
    PIXELS: constexpr,
    SCALE_CHANNELS: constexpr,
    SCALE_ROWS: constexpr,
):
    """The scale `[C]`; the hidden map `[B, C, H, W]` and its mean `[B, H, W]`: by programs of two kinds."""
    DTYPE: constexpr = phi.dtype.element_ty
    SCALES: constexpr = (C + SCALE_CHANNELS - 1) // SCALE_CHANNELS
    if tl.program_id(0) < SCALES:
        # Mean and unbiased variance over the batch, in training, into `statistics` `[2, C, 4]` and the running ones; s.
        by_channels, by_size = tl.full([], channel_ratio, DTYPE), tl.full([], size_ratio, DTYPE)
        rate = tl.full([], momentum, DTYPE)
        # A feature of a channel after the other, as they lie in memory.
        v = tl.program_id(0) * (SCALE_CHANNELS * 4) + tl.arange(0, SCALE_CHANNELS * 4)
        inside = v < C * 4
        if TRAINING:
            total = tl.zeros([SCALE_ROWS, SCALE_CHANNELS * 4], DTYPE)
            for first in range(0, batch, SCALE_ROWS):
                b = first + tl.arange(0, SCALE_ROWS)[:, None]
                total += tl.load(features + b * (C * 4) + v[None, :], mask=(b < batch) & inside[None, :], other=0)
            average = tl.sum(total, 0) / batch
            total = tl.zeros([SCALE_ROWS, SCALE_CHANNELS * 4], DTYPE)
            for first in range(0, batch, SCALE_ROWS):
                b = first + tl.arange(0, SCALE_ROWS)[:, None]
                mask = (b < batch) & inside[None, :]
                difference = tl.load(features + b * (C * 4) + v[None, :], mask=mask, other=0) - average[None, :]
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
        tl.store(statistics + C * 4 + v, var, mask=inside)
        terms = average * tl.load(phi + 72 + v % 4) + var * tl.load(phi + 76 + v % 4)
        logit = tl.sum(tl.reshape(terms, [SCALE_CHANNELS, 4]), 1)
        logit += tl.load(phi + 80) * by_channels + tl.load(phi + 81) * by_size
        c = tl.program_id(0) * SCALE_CHANNELS + tl.arange(0, SCALE_CHANNELS)
        tl.store(scale + c, 1.0 / (1.0 + tl.exp(-logit)), mask=c < C)
    if NOISE and tl.program_id(0) >= SCALES:
        program = tl.program_id(0) - SCALES
        _hidden_layer(h, mean, phi, hidden, hidden_mean, None, program, C, H, W, LAST, CHANNELS, PIXELS)


@jit
def _hidden_layer(h, mean, phi, hidden, hidden_mean, signs, program, C, H, W, LAST, CHANNELS, PIXELS):
    """A piece of an image of what is asked for, which is what is not None among `hidden`, `hidden_mean`, `signs`."""
    DTYPE: constexpr = phi.dtype.element_ty
    TILES: constexpr = (H * W + PIXELS - 1) // PIXELS
    image = program // TILES
    base = image.to(tl.int64) * (C * H * W)
    plane = image.to(tl.int64) * (H * W)
    pixel = program % TILES * PIXELS + tl.arange(0, PIXELS)[None, :]
    if hidden is not None:
        w = kernel3x3(phi, 0)
        around = neighbours(mean + plane + pixel, pixel, pixel < H * W, H, W, 1)
        shared = convolve(around, kernel3x3(phi, 1), DTYPE)
    if signs is not None:
        w_features = feature_kernels(phi)
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
            bits = tl.where(convolve(near, w_features[0], DTYPE) <= 0, 0, 1)
            for k in tl.static_range(1, 4):
                bits += tl.where(convolve(near, w_features[k], DTYPE) <= 0, 0, 1 << k)
            tl.store(signs + base + offset, bits.to(tl.uint8), mask=inside)
    if hidden_mean is not None:
        tl.store(hidden_mean + plane + pixel, tl.sum(total, 0)[None, :] / C, mask=pixel < H * W)


@jit
def _noise_mean(hidden, hidden_mean, w, w_all, pixel, inside, H, W, STEP, DTYPE):
    """μ of a tile; `hidden` and `hidden_mean` point to its places."""
    shared = convolve(neighbours(hidden_mean, pixel, pixel < H * W, H, W, 1), w_all, DTYPE)
    return convolve(neighbours(hidden, pixel, inside, H, W, STEP), w, DTYPE) + shared


@jit
def perturb(
    h,
    hidden,
    hidden_mean,
    phi,
    scale,
    noise,
    seed,
    out,
    strength: tl.float64,
    clip: tl.float64,
    C: constexpr,
    H: constexpr,
    W: constexpr,
    LAST: constexpr,
    NOISE: constexpr,
    GATE: constexpr,
    RELATIVE: constexpr,
    CHANNELS: constexpr,
    PIXELS: constexpr,
):
    """`h ∘ ((s ∘ z − 1)·c + 1)`, clipped from above; `RELATIVE`: the factor of mean one that `plain` describes."""
    DTYPE: constexpr = phi.dtype.element_ty
    STEP: constexpr = C if LAST else 1
    QUARTER: constexpr = (H * W + 3) // 4
    TILES: constexpr = (QUARTER + PIXELS - 1) // PIXELS
    CHANNEL_TILES: constexpr = (C + CHANNELS - 1) // CHANNELS
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
        w, w_all = kernel3x3(phi, 2), kernel3x3(phi, 3)
    if NOISE == 1:
        drawn = normals(seed, image * C + c, j)
    for i in tl.static_range(4):
        pixel = i * QUARTER + j
        inside = (c < C) & (j < QUARTER) & (pixel < H * W)
        offset = offsets(c, pixel, C, H, W, LAST)
        x = tl.load(h + base + offset, mask=inside, other=0).to(DTYPE)
        if NOISE:
            a = _noise_mean(hidden + base + offset, hidden_mean + pixel, w, w_all, pixel, inside, H, W, STEP, DTYPE)
            if RELATIVE:
                a = tl.where(a < LEAST_MU, LEAST_MU, tl.where(a > MOST_MU, MOST_MU, a))
            expected, _ = expected_softplus(a)
            if NOISE == 1:
                a += drawn[i].to(DTYPE)
            elif NOISE == 2:
                a += tl.load(noise + base + offset, mask=inside, other=0).to(DTYPE)
            z, _ = softplus(a)
            if RELATIVE:
                x = (z / expected - 1.0) * strength + 1.0
            else:
                if NOISE == 3:
                    z = expected
                x *= (z * s - 1.0) * strength + 1.0
        else:
            x *= (s - 1.0) * strength + 1.0
        x = tl.where(x > clip, clip, x)
        tl.store(out + base + offset, x.to(out.dtype.element_ty), mask=inside)


# --- backward


@jit
def first_layer_again(
    h,
    mean,
    phi,
    hidden,
    signs,
    C: constexpr,
    H: constexpr,
    W: constexpr,
    LAST: constexpr,
    CHANNELS: constexpr,
    PIXELS: constexpr,
):
    """The hidden map, and which of the four feature maps are positive, a bit each: `[B, C, H, W]` both."""
    program = tl.program_id(0)
    _hidden_layer(h, mean, phi, hidden, None, signs, program, C, H, W, LAST, CHANNELS, PIXELS)


@jit
def perturb_backward(
    h,
    grad_out,
    hidden,
    hidden_mean,
    phi,
    scale,
    noise,
    seed,
    grad_h,
    grad_mu,
    grad_mu_mean,
    grad_scale,
    strength: tl.float64,
    clip: tl.float64,
    C: constexpr,
    H: constexpr,
    W: constexpr,
    LAST: constexpr,
    NOISE: constexpr,
    GATE: constexpr,
    CHANNELS: constexpr,
    PIXELS: constexpr,
):
    """From the gradient of the perturbed map to those of its factors.

    Writes the direct part of the gradient of h (if wanted) and the gradient of μ, `[B, C, H, W]`, the latter's mean
    over channels `[B, H, W]`, and the gradient of the scale `[programs, C]`.
    """
    DTYPE: constexpr = phi.dtype.element_ty
    STEP: constexpr = C if LAST else 1
    QUARTER: constexpr = (H * W + 3) // 4
    TILES: constexpr = (QUARTER + PIXELS - 1) // PIXELS
    program = tl.program_id(0).to(tl.int64)
    image = tl.program_id(0) // TILES
    j = tl.program_id(0) % TILES * PIXELS + tl.arange(0, PIXELS)[None, :]
    base = image.to(tl.int64) * (C * H * W)
    strength = tl.full([], strength, DTYPE)
    clip = tl.full([], clip, DTYPE)
    zero = tl.zeros([CHANNELS, PIXELS], DTYPE)
    sums = (zero, zero, zero, zero)
    if NOISE:
        hidden_mean += image.to(tl.int64) * (H * W)
        grad_mu_mean += image.to(tl.int64) * (H * W)
        w, w_all = kernel3x3(phi, 2), kernel3x3(phi, 3)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)[:, None]
        s = tl.load(scale + c, mask=c < C, other=0) if GATE else 1.0
        total, added = zero, ()
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
                elif NOISE == 2:
                    a += tl.load(noise + base + offset, mask=inside, other=0).to(DTYPE)
                if NOISE == 3:
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
            if NOISE:
                total += grad_g * z
                through = grad_g * s * slope
                tl.store(grad_mu + base + offset, through, mask=inside)
                added += (sums[i] + through,)
            else:
                total += grad_g
        if NOISE:
            sums = added
        if GATE:
            c = first + tl.arange(0, CHANNELS)
            tl.store(grad_scale + program * C + c, tl.sum(total, 1), mask=c < C)
    if NOISE:
        for i in tl.static_range(4):
            pixel = i * QUARTER + j
            mean = tl.sum(sums[i], 0)[None, :] / C
            tl.store(grad_mu_mean + pixel, mean, mask=(j < QUARTER) & (pixel < H * W))


@jit
def second_layer_backward(
    grad_mu,
    grad_mu_mean,
    hidden,
    hidden_mean,
    phi,
    grad_hidden_mean,
    grad_scale,
    scale,
    grad_logit,
    rows,
    parts,
    columns,
    C: constexpr,
    H: constexpr,
    W: constexpr,
    LAST: constexpr,
    CHANNELS: constexpr,
    PIXELS: constexpr,
    SCALE_CHANNELS: constexpr,
    SCALE_ROWS: constexpr,
):
    """The gradient of the scale's logit `[C]`, and that of layer 1 before its relu, by programs of two kinds.

    The latter takes the place of `hidden`; its mean over channels is `grad_hidden_mean` `[B, H, W]`.
    """
    DTYPE: constexpr = phi.dtype.element_ty
    SCALES: constexpr = (C + SCALE_CHANNELS - 1) // SCALE_CHANNELS if grad_logit is not None else 0
    if grad_logit is not None and tl.program_id(0) < SCALES:
        c = tl.program_id(0) * SCALE_CHANNELS + tl.arange(0, SCALE_CHANNELS)
        sums = tl.zeros([SCALE_ROWS, SCALE_CHANNELS], DTYPE)
        for first in range(0, rows, SCALE_ROWS):
            row = first + tl.arange(0, SCALE_ROWS)[:, None]
            p = grad_scale + row.to(tl.int64) * C + c[None, :]
            sums += tl.load(p, mask=(row < rows) & (c[None, :] < C), other=0)
        s = tl.load(scale + c, mask=c < C, other=0)
        tl.store(grad_logit + c, tl.sum(sums, 0) * s * (1.0 - s), mask=c < C)
    if grad_mu is not None and tl.program_id(0) >= SCALES:
        program = tl.program_id(0) - SCALES
        TILES: constexpr = (H * W + PIXELS - 1) // PIXELS
        image = program // TILES
        base = image.to(tl.int64) * (C * H * W)
        plane = image.to(tl.int64) * (H * W)
        pixel = program % TILES * PIXELS + tl.arange(0, PIXELS)[None, :]
        w = kernel3x3(phi, 2)
        around = neighbours(grad_mu_mean + plane + pixel, pixel, pixel < H * W, H, W, 1)
        shared = convolve_transposed(around, kernel3x3(phi, 3), DTYPE)
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
def input_backward(
    h,
    mean,
    grad_hidden,
    grad_hidden_mean,
    phi,
    signs,
    features,
    statistics,
    grad_logit,
    direct,
    grad_h,
    parts,
    batch,
    columns,
    C: constexpr,
    H: constexpr,
    W: constexpr,
    LAST: constexpr,
    CHANNELS: constexpr,
    PIXELS: constexpr,
    GROUP: constexpr,
    RUN: constexpr,
):
    """Adds to the direct part of the gradient of h (if wanted) what comes through layer 1 and through the features.

    A program goes through `GROUP` channels and `RUN` pixels of an image.
    """
    DTYPE: constexpr = phi.dtype.element_ty
    STEP: constexpr = C if LAST else 1
    GROUPS: constexpr = (C + GROUP - 1) // GROUP
    RUNS: constexpr = (H * W + RUN - 1) // RUN
    start_pixel = tl.program_id(0) % RUNS * RUN
    start = tl.program_id(0) // RUNS % GROUPS * GROUP
    image = tl.program_id(0) // RUNS // GROUPS
    plane = image.to(tl.int64) * (H * W)
    base = image.to(tl.int64) * (C * H * W)
    if grad_hidden is not None:
        w, w_all = kernel3x3(phi, 0), kernel3x3(phi, 1)
        if parts is not None:
            sums = nine_zeros(CHANNELS, PIXELS, DTYPE)
            sums_all = nine_zeros(1, PIXELS, DTYPE)
    if signs is not None:
        w_features = feature_kernels(phi)
        if parts is not None:
            zeros = nine_zeros(CHANNELS, PIXELS, DTYPE)
            feature_sums = (zeros, zeros, zeros, zeros)
    for first in range(start, start + GROUP, CHANNELS):
        c = first + tl.arange(0, CHANNELS)[:, None]
        if signs is not None:
            p = features + image * (C * 4) + c * 4
            q = statistics + c * 4
            logit = tl.load(grad_logit + c, mask=c < C, other=0) / (H * W)
            gradients = ()
            for k in tl.static_range(4):
                gradients += (_feature_gradient(p + k, q + k, phi + 72 + k, logit, c < C, batch),)
        for tile in range(start_pixel, start_pixel + RUN, PIXELS):
            pixel = tile + tl.arange(0, PIXELS)[None, :]
            inside = (c < C) & (pixel < H * W)
            offset = offsets(c, pixel, C, H, W, LAST)
            if grad_h is not None:
                total = tl.load(direct + base + offset, mask=inside, other=0)
            if parts is not None:
                x = tl.load(h + base + offset, mask=inside, other=0).to(DTYPE)
            if grad_hidden is not None:
                near = neighbours(grad_hidden_mean + plane + pixel, pixel, pixel < H * W, H, W, 1)
                if grad_h is not None:
                    total += convolve_transposed(near, w_all, DTYPE)
                if parts is not None:
                    # γ₁ sees the mean of h once, not once a channel, and C times the mean of the gradient.
                    once = (pixel < H * W) & (first == 0)
                    m = tl.load(mean + plane + pixel, mask=once, other=0) * C
                    sums_all = correlate(sums_all, near, m)
                near = neighbours(grad_hidden + base + offset, pixel, inside, H, W, STEP)
                if grad_h is not None:
                    total += convolve_transposed(near, w, DTYPE)
                if parts is not None:
                    sums = correlate(sums, near, x)
            if signs is not None:
                bits = neighbours(signs + base + offset, pixel, inside, H, W, STEP)
                if grad_h is not None:
                    for k in tl.static_range(4):
                        total += gradients[k] * _sum_where(bits, 1 << k, w_features[k])
                if parts is not None:
                    added = ()
                    for k in tl.static_range(4):
                        added += (_add_where(feature_sums[k], bits, 1 << k, gradients[k] * x),)
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
def _feature_gradient(feature, mean, weight, logit, inside, batch):
    """What one feature of an image gets from the gradient of the logit, through mean and variance over the batch."""
    difference = tl.load(feature, mask=inside, other=0) - tl.load(mean, mask=inside, other=0)
    return logit * (tl.load(weight) / batch + tl.load(weight + 4) * 2.0 / (batch - 1) * difference)


@jit
def _sum_where(bits, BIT, w):
    """`convolve_transposed` of a map that is 1 where the neighbourhood `bits` has `BIT`, else 0."""
    total = tl.where((bits[8] & BIT) != 0, w[0], 0.0)
    for i in tl.static_range(1, 9):
        total = tl.where((bits[8 - i] & BIT) != 0, total + w[i], total)
    return total


@jit
def _add_where(sums, bits, BIT, x):
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
    channel_ratio: tl.float64,
    size_ratio: tl.float64,
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


# --- the noise as a tensor


@jit
def draw(seed, noise, C: constexpr, H: constexpr, W: constexpr, CHANNELS: constexpr, PIXELS: constexpr):
    """The noise of a site as a tensor: `[B, C, H, W]`."""
    QUARTER: constexpr = (H * W + 3) // 4
    TILES: constexpr = (QUARTER + PIXELS - 1) // PIXELS
    CHANNEL_TILES: constexpr = (C + CHANNELS - 1) // CHANNELS
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
