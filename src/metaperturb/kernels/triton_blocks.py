"""What the Triton kernels are made of: tiles and their neighbourhoods, elementary functions, noise."""

from metaperturb.kernels import plain
from metaperturb.kernels.backend import Unavailable

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:
    raise Unavailable("Triton cannot be imported (install the package triton)") from None


def jit(function):
    counts = ["batch", "rows", "columns", "second_layer_parts", "input_parts"]  # of any size, with one compiled kernel
    return triton.jit(function, do_not_specialize=counts)


# --- a tile and its neighbourhood


@jit
def offsets(c, pixel, C, H, W, LAST):
    """Where channels c and pixels lie inside an image, `[channels, pixels]`; `LAST`: channels last."""
    # Without channels last, hides how rows are aligned: else a thread takes four pixels of a row, for the sake of wide
    # loads, and the loads at shifted places, which cannot be wide, touch four times as many cache lines each.
    return pixel * C + c if LAST else tl.multiple_of(c * (H * W) + pixel, [1, 1])


@jit
def neighbour(p, y, x, inside, DY, DX, H, W, STEP):
    mask = inside
    if DY != 0:
        mask = mask & (y + DY >= 0) & (y + DY < H)
    if DX != 0:
        mask = mask & (x + DX >= 0) & (x + DX < W)
    return tl.load(p + (DY * W + DX) * STEP, mask=mask, other=0)


@jit
def neighbours(p, pixel, inside, H, W, STEP):
    """The 3×3 neighbourhood of each place that `p` points to, zeros around the map: nine tiles, row by row."""
    y, x, near = pixel // W, pixel % W, ()
    for i in tl.static_range(9):
        near += (neighbour(p, y, x, inside, i // 3 - 1, i % 3 - 1, H, W, STEP),)
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
def convolve(near, w, DTYPE):
    total = near[0].to(DTYPE) * w[0]
    for i in tl.static_range(1, 9):
        total += near[i].to(DTYPE) * w[i]
    return total


@jit
def convolve_transposed(near, w, DTYPE):
    """What `convolve` does, backward: from the gradient of its result to that of its input."""
    total = near[8].to(DTYPE) * w[0]
    for i in tl.static_range(1, 9):
        total += near[8 - i].to(DTYPE) * w[i]
    return total


@jit
def nine_zeros(CHANNELS, PIXELS, DTYPE):
    zero = tl.zeros([CHANNELS, PIXELS], DTYPE)
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
