// One perturbation site on the CPU, forward and backward, one image at a time so that it stays in cache.
//
// Mirrors the operators in plain.py, which are the reference, and saves none of their intermediate feature maps but the
// signs of one: the backward pass computes them again, and draws the same noise again from the same seed.
//
// Plain C++17 behind a C interface (no PyTorch headers): builds in seconds and fits every version of PyTorch.
// Images are independent and sums over images run in a fixed order: the result does not depend on the thread count.
//
// A plane is one channel of one image. A sheet is a plane, or several small ones side by side, with zeros around each: rows
// of whole vectors, with at least one zero behind each plane's part, and a row of zeros above and below. A 3×3 convolution
// is then a loop over vectors, without a special case, whose vectors are nearly full however small the planes are.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int TAPS = 9, FEATURES = 4, LANES = 16;
constexpr int64_t SHEET = 1024;  // values that a sheet of several planes has at most: several of them fit into the cache
#if defined(__AVX512F__)
constexpr int REGISTER = 64, ROWS = 4, KERNELS = 4;  // bytes; rows and kernels of convolutions that the registers bear
#elif defined(__AVX2__)
constexpr int REGISTER = 32, ROWS = 4, KERNELS = 1;
#else
constexpr int REGISTER = 16, ROWS = 2, KERNELS = 1;
#endif
#define INLINE [[gnu::always_inline]] inline  // a call within a loop keeps it from becoming vector code
constexpr int SELF1 = 0, ALL1 = 9, SELF2 = 18, ALL2 = 27, SCALE_KERNELS = 36, SCALE_AFFINE = 72, PARAMETERS = 82;
constexpr float TWO_PI_4 = 1.57079632679489662f;

inline int64_t whole_vectors(int64_t values) { return (values + LANES - 1) / LANES * LANES; }

enum Noise : int32_t { NO_NOISE = 0, DRAWN = 1, GIVEN = 2, EXPECTED = 3 };

}  // namespace

// Fields and order as in cpp.py.
template <typename T>
struct Site {
    int64_t batch, channels, height, width, draws;  // draws: of each image in one forward pass of evaluation
    int32_t threads, training, noise, gate, relative, relu, channels_last, h_gradient, phi_gradient;
    double strength, clip, channel_ratio, size_ratio, momentum;
    uint64_t seed;
    const T *h;            // [B, C, H, W], in memory [B, H, W, C] if `channels_last`: so are out, grad_out and grad_h
    const T *shortcut;     // added to h, or null: not with channels_last, and only in `forward`
    const T *given_noise;  // [B, C, H, W] if noise is GIVEN
    const T *phi;          // [82]: self1, all1, self2, all2, scale_kernels, scale_affine
    T *running_mean;       // [C, 4]
    T *running_var;        // [C, 4]
    T *features;           // [B, C, 4], written by forward in training, read by backward
    T *statistics;         // [2, C, 4]: the mean and variance that made the scale, likewise
    T *scale;              // [C], likewise
    uint8_t *signs;        // [signs_size]: bit k of a value says that the scale's kernel k was above 0 there; likewise
    T *out;                // [draws · B, C, H, W], all images of a draw together; if `relative`, plain.py's factor of mean one
    const T *grad_out;     // [B, C, H, W]
    T *grad_h;             // [B, C, H, W]; without h_gradient only its direct part, which costs nothing
    double *grad_phi;      // [82]
};

namespace {

// --- elementary functions, in float without calls or branches so that loops over them become vector code

INLINE float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

INLINE uint32_t as_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

// A constant that compilers do not know: with one that they know, GCC makes comparisons and blends of a maximum.
template <typename T>
INLINE T opaque(T x) {
    asm("" : "+m"(x));
    return x;
}

template <typename T>
struct Limits {
    T zero = opaque(T(0)), lowest = opaque(T(-87));  // e to it is the smallest normal number, nearly
};

// Both keep an x that is a NaN.
template <typename T>
INLINE T at_least(T bound, T x) {
    return x < bound ? bound : x;
}

template <typename T>
INLINE T at_most(T bound, T x) {
    return x > bound ? bound : x;
}

// P(x) · x with these coefficients of P, lowest first. They are minimax, to 4e-7 of what is approximated.
template <int count>
INLINE float polynomial(float x, const float (&coefficients)[count]) {
    float p = coefficients[count - 1];
#pragma GCC unroll 8
    for (int i = count - 2; i >= 0; --i) p = p * x + coefficients[i];
    return p * x;
}

// e^−|a|: −|a| = n ln 2 + r, |r| <= ln 2 / 2.
INLINE float exp_negative(float a, const Limits<float> &limits) {
    const float x = at_least(limits.lowest, as_float(as_bits(a) | 0x80000000u));
    const float shift = 12582912.0f;  // 1.5 · 2²³: adding it rounds to an integer, which the last bits then are
    const float shifted = x * 1.44269504088896341f + shift, n = shifted - shift;
    const float r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
    const float p = 1.0f + polynomial(r, {0.9999997019767761f, 0.49999144673347473f, 0.16667640209197998f,
                                          0.04189838841557503f, 0.008290229365229607f});
    return p * as_float((as_bits(shifted) << 23) + 0x3f800000u);
}

INLINE double exp_negative(double a, const Limits<double> &) { return std::exp(-std::fabs(a)); }

// log(1 + e) for 0 <= e <= 1: a polynomial, as dividing takes longer.
INLINE float log1p_unit(float e) {
    return polynomial(e, {0.9999998211860657f, -0.4999740421772003f, 0.33275479078292847f, -0.24495457112789154f,
                          0.17745229601860046f, -0.10768155008554459f, 0.04408952221274376f, -0.008539178408682346f});
}

INLINE double log1p_unit(double e) { return std::log1p(e); }

// log(x) for 0 < x <= 1, normal: x = 2^n (1 + t), sqrt(1/2) <= 1 + t < sqrt(2), and log(1 + t) like that of `log1p_unit`.
INLINE float log_unit(float x) {
    const uint32_t bits = as_bits(x) - 0x3f3504f3u;  // bits of sqrt(1/2): the carry makes the exponent one of 1 + t
    const int32_t n = int32_t(bits) >> 23;
    const float t = as_float((bits & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
    return float(n) * 0.693147180559945309f +
           polynomial(t, {0.9999999403953552f, -0.5000036358833313f, 0.33335059881210327f, -0.24969908595085144f,
                          0.19900165498256683f, -0.17250829935073853f, 0.16222578287124634f, -0.1010689064860344f});
}

// What a site returns is at least this: 0 with a ReLU behind it, else nothing, which a NaN says, as it compares with nothing.
template <typename T>
INLINE T least(const Site<T> &site) {
    return site.relu ? T(0) : std::numeric_limits<T>::quiet_NaN();
}

// z and its derivative by μ.
template <typename T>
struct Factor {
    T z, slope;
};

template <typename T>
INLINE Factor<T> softplus(T a, const Limits<T> &limits) {
    const T e = exp_negative(a, limits);
    return {at_least(limits.zero, a) + log1p_unit(e), (a < T(0) ? e : T(1)) / (T(1) + e)};
}

// E[softplus(mu + ε)] by the formula of plain.py.
INLINE Factor<double> expected_softplus(double mu, const Limits<double> &limits) {
    const double e = exp_negative(mu, limits), share = 1 / (1 + e), u = 4 * e * share * share;
    constexpr double P[] = EXPECTATION_P, Q[] = EXPECTATION_Q;
    double p = P[4], q = Q[4], dp = 0, dq = 0;  // polynomials and their derivatives
    for (int i = 3; i >= 0; --i) {
        dp = dp * u + p;
        dq = dq * u + q;
        p = p * u + P[i];
        q = q * u + Q[i];
    }
    const double ratio = p / q, du = (mu < 0 ? u : -u) * (1 - e) * share;
    return {at_least(limits.zero, mu) + log1p_unit(e) + 0.25 * u * ratio,
            (mu < 0 ? e : 1) * share + 0.25 * du * (ratio + u * (dp - ratio * dq) / q)};
}

// The same to 5e-7 in half the time: what it and its derivative have above those of relu is e = e^-|mu| times a ratio of
// polynomials in e.
INLINE Factor<float> expected_softplus(float mu, const Limits<float> &limits) {
    const float e = exp_negative(mu, limits);
    const float above = polynomial(e, {1.64872105f, 112.005076f, 1644.1391f, 5992.76338f, 4413.83637f, 179.627542f}) /
                        (1 + polynomial(e, {70.1749306f, 1136.4958f, 5297.79247f, 6924.96263f, 1883.60911f}));
    const float slope = polynomial(e, {1.64872081f, 142.007612f, 2635.67607f, 11975.9989f, 10650.5538f, 105.516621f}) /
                        (1 + polynomial(e, {90.6125794f, 1950.82049f, 12638.51f, 24737.4237f, 11604.4224f}));
    return {at_least(limits.zero, mu) + above, mu < 0 ? slope : 1 - slope};
}

// --- noise: a pure function of (seed, plane, position in the plane)

// Two standard normals from two random words (Box and Muller 1958).
INLINE void normal_pair(uint32_t first, uint32_t second, float &n0, float &n1) {
    const float u = (float(int32_t(first >> 1)) + 0.5f) * 4.656612873077393e-10f;  // (0, 1], step 2⁻³¹
    const float radius = std::sqrt(-2.0f * log_unit(u));
    // The low 30 bits of the second word are an angle in [−π/4, π/4), the high two say which quarter.
    const float angle = (float(int32_t(second & 0x3fffffffu)) * 9.313225746154785e-10f - 0.5f) * TWO_PI_4;
    const float a2 = angle * angle;
    const float sine = angle + angle * polynomial(a2, {-0.16666651f, 0.00833198f, -0.00019496f});
    const float cosine = 1.0f + polynomial(a2, {-0.49999896f, 0.04165629f, -0.00135978f});
    const uint32_t swapped = (as_bits(sine) ^ as_bits(cosine)) & uint32_t(int32_t(second << 1) >> 31);
    const float sign = as_float(as_bits(radius) ^ (second & 0x80000000u));
    n0 = sign * as_float(as_bits(cosine) ^ swapped);
    n1 = sign * as_float(as_bits(sine) ^ swapped);
}

// Words in lanes of 64 bits, of which only the low halves count: compilers do not find the instruction that multiplies
// those, which takes a third of the time of a product of whole lanes.
typedef uint64_t Words __attribute__((vector_size(REGISTER)));

INLINE Words product(Words a, uint64_t factor) {
    const Words b = Words{} + factor;
#if defined(__AVX512F__)
    return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
    return (a & 0xffffffffu) * b;
#endif
}

// A register of words as two: those at even places, and those at odd ones.
struct Pair {
    Words half[2];

    Pair() = default;
    INLINE explicit Pair(const uint32_t *from) {
        std::memcpy(&half[0], from, REGISTER);
        half[1] = half[0] >> 32;
    }

    INLINE void put(uint32_t *to) const {
        const Words all = (half[0] & 0xffffffffu) | half[1] << 32;
        std::memcpy(to, &all, REGISTER);
    }
};

// Philox4x32-7 (Salmon et al. 2011, who found seven rounds enough for BigCrush). Counter (j, plane, 0, 0) gives the values j, q + j, 2q + j and 3q + j of a plane of
// n, q = ⌈n/4⌉. One loop runs over the counters of several planes, so that those of small ones fill vectors, too.
template <typename T>
class Draw {
   public:
    Draw(int64_t pixels, int64_t planes)
        : pixels_(pixels),
          quarter_((pixels + 3) / 4),
          plane_(whole_vectors(planes * quarter_)),
          low_(plane_.size()),
          high_(plane_.size()),
          word_(4 * plane_.size()),
          normal_(4 * plane_.size()),
          out_(planes * pixels) {
        for (size_t i = 0; i < plane_.size(); ++i) {
            const uint64_t first = uint64_t(i % quarter_) * 0xD2511F53u;  // the product of round one, the same in all planes
            plane_[i] = uint32_t(i / quarter_);
            low_[i] = uint32_t(first);
            high_[i] = uint32_t(first >> 32);
        }
    }

    // The noise of planes `first`, `first` + 1, …: [planes, pixels], until the next call.
    const T *operator()(uint64_t seed, uint32_t first, int64_t planes) {
        const int64_t counters = whole_vectors(planes * quarter_);
        uint32_t *__restrict w0 = word_.data(), *__restrict w1 = w0 + counters, *__restrict w2 = w1 + counters,
                            *__restrict w3 = w2 + counters;
        for (int64_t i = 0; i < counters; i += REGISTER / 4) {
            Pair a(&plane_[i]), b, c(&high_[i]), d(&low_[i]);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                uint64_t k0 = uint32_t(seed), k1 = seed >> 32;
                Words c0 = (a.half[half] + first) ^ k0, c1{}, c2 = c.half[half] ^ k1, c3 = d.half[half];
#pragma GCC unroll 6
                for (int round = 1; round < 7; ++round) {
                    k0 = uint32_t(k0 + 0x9E3779B9u);
                    k1 = uint32_t(k1 + 0xBB67AE85u);
                    const Words p0 = product(c0, 0xD2511F53u), p1 = product(c2, 0xCD9E8D57u);
                    c0 = (p1 >> 32) ^ c1 ^ k0;
                    c1 = p1;
                    c2 = (p0 >> 32) ^ c3 ^ k1;
                    c3 = p0;
                }
                a.half[half] = c0, b.half[half] = c1, c.half[half] = c2, d.half[half] = c3;
            }
            a.put(w0 + i);
            b.put(w1 + i);
            c.put(w2 + i);
            d.put(w3 + i);
        }
        T *__restrict n0 = normal_.data(), *__restrict n1 = n0 + counters, *__restrict n2 = n1 + counters,
                    *__restrict n3 = n2 + counters;
#pragma omp simd
        for (int64_t i = 0; i < counters; ++i) {
            float m0, m1, m2, m3;
            normal_pair(w0[i], w1[i], m0, m1);
            normal_pair(w2[i], w3[i], m2, m3);
            n0[i] = T(m0);
            n1[i] = T(m1);
            n2[i] = T(m2);
            n3[i] = T(m3);
        }
        if (planes == 1 && 4 * counters == pixels_) return normal_.data();  // in order as they are
        for (int64_t c = 0; c < planes; ++c)
            for (int k = 0; k < 4; ++k) {
                const T *__restrict from = n0 + k * counters + c * quarter_;
                T *__restrict to = out_.data() + c * pixels_ + k * quarter_;
                for (int64_t i = 0, n = std::min(quarter_, pixels_ - k * quarter_); i < n; ++i) to[i] = from[i];
            }
        return out_.data();
    }

   private:
    int64_t pixels_, quarter_;
    std::vector<uint32_t> plane_, low_, high_, word_;
    std::vector<T> normal_, out_;
};

// --- sheets

template <typename T>
struct Register {
    typedef T Vector __attribute__((vector_size(REGISTER)));
    using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    static constexpr int64_t width = REGISTER / sizeof(T);
};

template <typename T>
using Vector = typename Register<T>::Vector;

template <typename T>
INLINE Vector<T> load(const T *from) {
    Vector<T> x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

// Into a register for several uses. GCC would load the value anew for each of them, and mostly from two cache lines.
template <typename T>
INLINE Vector<T> fetch(const T *from) {
    Vector<T> x = load(from);
#if defined(__AVX2__)
    asm("" : "+v"(x));
#endif
    return x;
}

template <typename T>
INLINE void store(T *to, Vector<T> x) {
    std::memcpy(to, &x, sizeof x);
}

// In pieces of `step` values, the last of which may overlap the one before. The empty statement keeps compilers from making
// a call of memmove of the loop, which costs more than what rows hold.
template <int64_t step, typename T>
inline void copy_pieces(const T *__restrict from, int64_t width, T *__restrict to) {
    for (int64_t x = 0; x + step < width; x += step) {
        std::memcpy(to + x, from + x, step * sizeof(T));
        asm volatile("");
    }
    std::memcpy(to + width - step, from + width - step, step * sizeof(T));
}

template <typename T>
inline void copy_row(const T *__restrict from, int64_t width, T *__restrict to) {
    if (width >= 16)
        copy_pieces<16>(from, width, to);
    else if (width >= 8)
        copy_pieces<8>(from, width, to);
    else if (width >= 4)
        copy_pieces<4>(from, width, to);
    else
        std::copy_n(from, width, to);
}

// Asks for what is read later, so that it is there by then.
template <typename T>
inline void prefetch(const T *from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i, 0, 2);
}

template <typename T>
struct Sheet {
    using Integer = typename Register<T>::Integer;
    int64_t height, width, channels;
    int64_t planes, groups;      // planes side by side in a sheet, and sheets an image
    int64_t span, pitch;         // of a row: values in the vectors that hold its planes, values from it to the next one
    int64_t first, size;         // where the first row begins, values in all

    explicit Sheet(const Site<T> &site) : height(site.height), width(site.width), channels(site.channels), planes(1) {
        const int64_t most = std::min(SHEET / std::max<int64_t>(1, height * (width + 1)), channels);
        for (int64_t n = 2; n <= most; ++n)  // the more, the fewer sheets, as long as the vectors are as full
            if (row(n) * planes * 32 <= row(planes) * n * 33) planes = n;
        groups = (channels + planes - 1) / planes;
        planes = (channels + groups - 1) / groups;  // even shares
        span = row(planes);
        pitch = whole_vectors(planes * (width + 1));
        first = LANES + pitch;  // what is left of a corner, too, can be loaded
        size = first + (height + 1) * pitch + LANES;
        for (int64_t group : {int64_t(0), groups - 1}) {
            std::vector<Integer> &mask = group + 1 < groups ? inside_ : inside_last_;
            mask.assign(span, 0);
            for (int64_t c = 0; c < planes_of(group); ++c) std::fill_n(&mask[c * (width + 1)], width, -1);
        }
    }

    int64_t pixels() const { return height * width; }

    // How many channels a sheet holds: all hold `planes`, but for the last.
    int64_t planes_of(int64_t group) const { return std::min(planes, channels - group * planes); }

    // Of each row, all bits where a sheet has values, none elsewhere.
    const Integer *inside(int64_t group) const { return (group + 1 < groups ? inside_ : inside_last_).data(); }

    // Whether rows of values [H, W] are vectors as they are.
    bool whole() const { return span == width; }

    // From values [planes, H, W] into a sheet.
    void expand(int64_t group, const T *__restrict values, T *__restrict sheet) const {
        for (int64_t c = 0; c < planes_of(group); ++c)
            for (int64_t y = 0; y < height; ++y) copy_row(values + (c * height + y) * width, width, sheet + place(c, y));
    }

    // And back.
    void compact(int64_t group, const T *__restrict sheet, T *__restrict values) const {
        for (int64_t c = 0; c < planes_of(group); ++c)
            for (int64_t y = 0; y < height; ++y) copy_row(sheet + place(c, y), width, values + (c * height + y) * width);
    }

    void add_to(int64_t group, const T *__restrict sheet, T *__restrict values) const {
        for (int64_t c = 0; c < planes_of(group); ++c)
            for (int64_t y = 0; y < height; ++y) {
                const T *__restrict row = sheet + place(c, y);
                T *__restrict target = values + (c * height + y) * width;
#pragma omp simd
                for (int64_t x = 0; x < width; ++x) target[x] += row[x];
            }
    }

    // Σ of all sheets of an image.
    void accumulate(const T *__restrict sheets, T *__restrict sum) const {
        for (int64_t y = 0; y < height; ++y)
            for (int64_t i = first + y * pitch, end = i + span; i < end; i += Register<T>::width) {
                Vector<T> total = load(sheets + i);
                for (int64_t g = 1; g < groups; ++g) total += load(sheets + g * size + i);
                store(sum + i, total);
            }
    }

    // Replaces each plane of a sheet by `factor` times the sum of all.
    void share_sum(T *sheet, T factor) const {
        for (int64_t y = 0; y < height; ++y) {
            T *__restrict row = sheet + place(0, y);
            for (int64_t c = 1; c < planes; ++c) {
                const T *__restrict other = row + c * (width + 1);
#pragma omp simd
                for (int64_t x = 0; x < width; ++x) row[x] += other[x];
            }
            for (int64_t x = 0; x < width; ++x) row[x] *= factor;
            for (int64_t c = 1; c < planes; ++c) copy_row(row, width, row + c * (width + 1));
        }
    }

   private:
    int64_t row(int64_t n) const { return whole_vectors(n * (width + 1) - 1); }
    int64_t place(int64_t c, int64_t y) const { return first + y * pitch + c * (width + 1); }

    std::vector<Integer> inside_, inside_last_;
};

template <typename T>
struct Kernel {
    T w[TAPS];

    explicit Kernel(const T *values, bool transposed = false, T factor = T(1)) {
        for (int i = 0; i < TAPS; ++i) w[i] = factor * values[transposed ? TAPS - 1 - i : i];
    }

    // Adds what it makes of vectors in `rows` rows, one below the other: what is loaded serves all of them.
    template <int rows>
    inline void apply(const T *x, int64_t pitch, Vector<T> (&sum)[rows]) const {
#pragma GCC unroll 6
        for (int from = -1; from <= rows; ++from) {
            const T *row = x + from * pitch;
            const Vector<T> left = fetch(row - 1), middle = fetch(row), right = fetch(row + 1);
#pragma GCC unroll 4
            for (int to = 0; to < rows; ++to) {
                const int tap = 3 * (from - to + 1);
                if (tap < 0 || tap > 6) continue;
                sum[to] += w[tap] * left;
                sum[to] += w[tap + 1] * middle;
                sum[to] += w[tap + 2] * right;
            }
        }
    }
};

// body(std::integral_constant<int, number of rows>, the first of them): what is loaded serves several rows.
template <int count = ROWS, typename Body>
inline void rows_at_once(int64_t y, int64_t rows, Body body) {
    for (; y + count <= rows; y += count) body(std::integral_constant<int, count>{}, y);
    if constexpr (count > 1) rows_at_once<count / 2>(y, rows, body);
}

// out(kernel of `in`, plus `add` if there is one; x, y; their place in a sheet) for all vectors of a sheet.
template <typename T, typename Out>
inline void convolve(const Sheet<T> &p, const Kernel<T> kernel, const T *in, const T *add, Out out) {
    for (int64_t x = 0; x < p.span; x += Register<T>::width)
        rows_at_once(0, p.height, [&](auto rows, int64_t y) {
            constexpr int count = decltype(rows)::value;
            const int64_t at = p.first + y * p.pitch + x;
            Vector<T> sum[count];
            for (int r = 0; r < count; ++r) sum[r] = add ? load(add + at + r * p.pitch) : Vector<T>{};
            kernel.apply(in + at, p.pitch, sum);
            for (int r = 0; r < count; ++r) out(sum[r], x, y + r, at + r * p.pitch);
        });
}

template <typename T>
void convolve(const Sheet<T> &p, const Kernel<T> &kernel, const T *in, T *out) {
    convolve(p, kernel, in, (const T *)nullptr, [&](Vector<T> value, int64_t, int64_t, int64_t at) { store(out + at, value); });
}

// gradient[tap] += Σ of d(x, y) · `in` shifted by the tap: what a 3×3 kernel gets when its output gets d, which is 0 between
// planes. d gives vectors.
template <typename T, typename Gradient>
inline void correlate_with(const Sheet<T> &p, const T *in, double *gradient, Gradient d) {
    Vector<T> sum[TAPS]{};
    for (int64_t x = 0; x < p.span; x += Register<T>::width)
        rows_at_once(0, p.height, [&](auto rows, int64_t y) {
            constexpr int count = decltype(rows)::value;
            const T *v = in + p.first + y * p.pitch + x;
            Vector<T> incoming[count];
            for (int r = 0; r < count; ++r) incoming[r] = d(x, y + r);
#pragma GCC unroll 6
            for (int from = -1; from <= count; ++from) {
                const T *row = v + from * p.pitch;
                const Vector<T> left = fetch(row - 1), middle = fetch(row), right = fetch(row + 1);
#pragma GCC unroll 4
                for (int to = 0; to < count; ++to) {
                    const int tap = 3 * (from - to + 1);
                    if (tap < 0 || tap > 6) continue;
                    sum[tap] += incoming[to] * left;
                    sum[tap + 1] += incoming[to] * middle;
                    sum[tap + 2] += incoming[to] * right;
                }
            }
        });
    for (int tap = 0; tap < TAPS; ++tap) {
        T total = T(0);
        for (int64_t i = 0; i < Register<T>::width; ++i) total += sum[tap][i];
        gradient[tap] += total;
    }
}

template <typename T>
void correlate(const Sheet<T> &p, const T *d, const T *in, double *gradient) {
    correlate_with(p, in, gradient, [&](int64_t x, int64_t y) { return load(d + p.first + y * p.pitch + x); });
}

// --- images

// Eight rows of eight values → eight columns.
template <typename T>
inline void transpose_block(const T *__restrict from, int64_t columns, T *__restrict to, int64_t rows) {
    for (int c = 0; c < 8; ++c)
        for (int r = 0; r < 8; ++r) to[c * rows + r] = from[r * columns + c];
}

#if defined(__AVX2__)
inline void transpose_block(const float *__restrict from, int64_t columns, float *__restrict to, int64_t rows) {
    __m256 row[8], pair[8];
    for (int r = 0; r < 8; ++r) row[r] = _mm256_loadu_ps(from + r * columns);
    for (int r = 0; r < 8; r += 2) {
        pair[r] = _mm256_unpacklo_ps(row[r], row[r + 1]);
        pair[r + 1] = _mm256_unpackhi_ps(row[r], row[r + 1]);
    }
    for (int half = 0; half < 8; half += 4)  // now columns of four values, two in a register
        for (int c = 0; c < 2; ++c) {
            row[half + 2 * c] = _mm256_shuffle_ps(pair[half + c], pair[half + 2 + c], 0x44);
            row[half + 2 * c + 1] = _mm256_shuffle_ps(pair[half + c], pair[half + 2 + c], 0xee);
        }
    for (int c = 0; c < 4; ++c) {
        _mm256_storeu_ps(to + c * rows, _mm256_permute2f128_ps(row[c], row[4 + c], 0x20));
        _mm256_storeu_ps(to + (4 + c) * rows, _mm256_permute2f128_ps(row[c], row[4 + c], 0x31));
    }
}
#endif

// [rows, columns] → [columns, rows]
template <typename T>
void transpose(const T *__restrict from, int64_t rows, int64_t columns, T *__restrict to) {
    const int64_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
    for (int64_t r = 0; r < whole_rows; r += 8)
        for (int64_t c = 0; c < whole_columns; c += 8) transpose_block(from + r * columns + c, columns, to + c * rows + r, rows);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) to[c * rows + r] = from[r * columns + c];
}

// --- what one thread works in

template <typename T>
class Buffer {
   public:
    explicit Buffer(int64_t size) : values_(size + 64 / sizeof(T), T(0)) {
        const auto address = reinterpret_cast<uintptr_t>(values_.data());
        start_ = values_.data() + (64 - address % 64) % 64 / sizeof(T);
    }
    T *operator()(int64_t offset = 0) { return start_ + offset; }

   private:
    std::vector<T> values_;
    T *start_;
};

// One image of a map as planes [C, H, W], whatever the order of the map in memory.
template <typename T>
class Image {
   public:
    explicit Image(const Site<T> &site, bool sum = false)
        : channels_(site.channels),
          pixels_(site.height * site.width),
          copied_(site.channels_last),
          copy_(copied_ || sum ? channels_ * pixels_ : 0) {}

    // The sum of two maps.
    const T *read(const T *map, const T *other, int64_t b) {
        if (!other) return read(map, b);
        const T *__restrict x = map + b * channels_ * pixels_, *__restrict y = other + b * channels_ * pixels_;
        T *__restrict sum = copy_();
#pragma omp simd
        for (int64_t i = 0; i < channels_ * pixels_; ++i) sum[i] = x[i] + y[i];
        return sum;
    }

    template <typename Map>  // of T, or of const T
    Map *read(Map *map, int64_t b) {
        Map *image = map + b * channels_ * pixels_;
        if (!copied_) return image;
        transpose(image, pixels_, channels_, copy_());
        return copy_();
    }

    // Where to write image b, before `written`.
    T *target(T *map, int64_t b) { return copied_ ? copy_() : map + b * channels_ * pixels_; }

    void written(T *map, int64_t b) {
        if (copied_) transpose(copy_(), channels_, pixels_, map + b * channels_ * pixels_);
    }

   private:
    int64_t channels_, pixels_;
    bool copied_;
    Buffer<T> copy_;
};

template <typename T>
struct Workspace {
    Sheet<T> p;
    Buffer<T> h, hidden, mean, hidden_mean, shared, sheet, mu, scale;
    Draw<T> draw;

    explicit Workspace(const Site<T> &site)
        : p(site),
          h(p.groups * p.size),
          hidden(p.groups * p.size),
          mean(p.size),
          hidden_mean(p.size),
          shared(p.size),
          sheet(p.size),
          mu((site.draws > 1 ? p.groups : 1) * p.planes * p.pixels()),
          scale(p.planes * p.pixels()),
          draw(p.pixels(), p.planes) {}

    // First layer of μ for one image: fills h, mean, hidden, hidden_mean, and `shared`, the all-kernel's part of layer two.
    void first_layer(const Site<T> &site, const T *image) {
        using I = typename Register<T>::Integer;
        const Kernel<T> self(site.phi + SELF1), all(site.phi + ALL1), all2(site.phi + ALL2);
        const T share = T(1) / T(site.channels);
        const Vector<T> zero = Vector<T>{} + opaque(T(0));
        for (int64_t g = 0; g < p.groups; ++g) p.expand(g, image + g * p.planes * p.pixels(), h(g * p.size));
        p.accumulate(h(), mean());
        p.share_sum(mean(), share);
        convolve(p, all, mean(), shared());
        for (int64_t g = 0; g < p.groups; ++g) {
            const I *inside = p.inside(g);
            T *out = hidden(g * p.size);
            convolve(p, self, h(g * p.size), shared(), [=](Vector<T> value, int64_t x, int64_t, int64_t at) {
                value = Vector<T>(Vector<I>(at_least(zero, value)) & load(inside + x));
                store(out + at, value);
            });
        }
        p.accumulate(hidden(), hidden_mean());
        p.share_sum(hidden_mean(), share);
        convolve(p, all2, hidden_mean(), shared());
    }

    // μ of a sheet's channels, [planes, H, W], after first_layer.
    void second_layer(const Site<T> &site, int64_t group, T *out) {
        const Kernel<T> self(site.phi + SELF2);
        T *const target = p.whole() ? out : sheet(p.first);
        const int64_t pitch = p.whole() ? p.width : p.pitch;
        convolve(p, self, hidden(group * p.size), shared(),
                 [=](Vector<T> value, int64_t x, int64_t y, int64_t) { store(target + y * pitch + x, value); });
        if (!p.whole()) p.compact(group, sheet(), out);
    }

    // The same, kept from the first draw on if there are several.
    const T *mu_of(const Site<T> &site, int64_t group, int64_t number) {
        T *kept = mu((site.draws > 1 ? group : 0) * p.planes * p.pixels());
        if (number == 0) second_layer(site, group, kept);
        return kept;
    }

    // ε of a sheet's channels: drawn, or the caller's. `first` counts the planes of all images.
    const T *noise_of(const Site<T> &site, int64_t first, int64_t planes) {
        if (site.noise == EXPECTED) return mu();  // not read
        if (site.noise == GIVEN) return site.given_noise + first * p.pixels();
        return draw(site.seed, uint32_t(first), planes);
    }

    // s of a sheet's channels, for each of their pixels.
    const T *scale_of(const Site<T> &site, int64_t group) {
        for (int64_t c = 0; c < p.planes_of(group); ++c)
            std::fill_n(scale(c * p.pixels()), p.pixels(), site.scale[group * p.planes + c]);
        return scale();
    }

};

// --- the scale

template <typename T>
void compute_features(const Site<T> &site) {
    using I = typename Register<T>::Integer;
    const Sheet<T> p(site);
    const Vector<T> zero = Vector<T>{} + opaque(T(0));
    const T *weight = site.phi + SCALE_KERNELS;
    const Kernel<T> kernels[FEATURES] = {Kernel<T>(weight), Kernel<T>(weight + TAPS), Kernel<T>(weight + 2 * TAPS),
                                         Kernel<T>(weight + 3 * TAPS)};
#pragma omp parallel num_threads(site.threads)
    {
        Buffer<T> sheet(p.size), sums(FEATURES * p.span);
        std::vector<I> signs(p.height * p.span);
        Image<T> h(site);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < site.batch; ++b) {
            const T *image = h.read(site.h, b);
            for (int64_t group = 0; group < p.groups; ++group) {
                const int64_t channel = group * p.planes;
                if (b + 1 < site.batch)
                    prefetch(site.h + ((b + 1) * p.channels + channel) * p.pixels(), p.planes_of(group) * p.pixels());
                p.expand(group, image + channel * p.pixels(), sheet());
                std::fill(signs.begin(), signs.end(), 0);
                for (int first = 0; first < FEATURES; first += KERNELS)
                    for (int64_t x = 0; x < p.span; x += Register<T>::width) {
                        Vector<T> total[KERNELS]{};
                        rows_at_once<std::max(2, KERNELS)>(0, p.height, [&](auto rows, int64_t y) {
                            constexpr int count = decltype(rows)::value;
                            Vector<I> above[count]{};
#pragma GCC unroll 4
                            for (int k = 0; k < KERNELS; ++k) {
                                Vector<T> value[count]{};
                                kernels[first + k].apply(sheet(p.first + y * p.pitch + x), p.pitch, value);
                                for (int r = 0; r < count; ++r) {
                                    total[k] += at_least(zero, value[r]);
                                    above[r] |= (value[r] > zero) & (1 << (first + k));
                                }
                            }
                            for (int r = 0; r < count; ++r) {
                                I *at = &signs[(y + r) * p.span + x];
                                store(at, load(at) | above[r]);
                            }
                        });
                        for (int k = 0; k < KERNELS; ++k) store(sums((first + k) * p.span + x), total[k]);
                    }
                if (site.signs) std::copy(signs.begin(), signs.end(), site.signs + (b * p.groups + group) * signs.size());
                for (int64_t c = 0; c < p.planes_of(group); ++c)
                    for (int k = 0; k < FEATURES; ++k) {
                        const T *row = sums(k * p.span + c * (p.width + 1));
                        T sum = T(0);
                        for (int64_t x = 0; x < p.width; ++x) sum += row[x];
                        site.features[(b * site.channels + channel + c) * FEATURES + k] = sum / T(p.pixels());
                    }
            }
        }
    }
}

template <typename T>
void batch_statistics(const Site<T> &site) {
    const int64_t values = site.channels * FEATURES;
    std::vector<double> mean(values, 0.0), var(values, 0.0);
    for (int64_t b = 0; b < site.batch; ++b)
        for (int64_t i = 0; i < values; ++i) mean[i] += site.features[b * values + i];
    for (double &m : mean) m /= double(site.batch);
    for (int64_t b = 0; b < site.batch; ++b)
        for (int64_t i = 0; i < values; ++i) {
            const double difference = site.features[b * values + i] - mean[i];
            var[i] += difference * difference;
        }
    for (int64_t i = 0; i < values; ++i) {
        var[i] /= double(site.batch - 1);
        site.statistics[i] = T(mean[i]);
        site.statistics[values + i] = T(var[i]);
        site.running_mean[i] += T(site.momentum) * (T(mean[i]) - site.running_mean[i]);
        site.running_var[i] += T(site.momentum) * (T(var[i]) - site.running_var[i]);
    }
}

template <typename T>
void compute_scale(const Site<T> &site) {
    const int64_t values = site.channels * FEATURES;
    if (!site.training) {
        std::copy_n(site.running_mean, values, site.statistics);
        std::copy_n(site.running_var, values, site.statistics + values);
    }
    const T *weight = site.phi + SCALE_AFFINE;
    for (int64_t c = 0; c < site.channels; ++c) {
        double logit = weight[2 * FEATURES] * site.channel_ratio + weight[2 * FEATURES + 1] * site.size_ratio;
        for (int k = 0; k < FEATURES; ++k)
            logit += double(weight[k]) * site.statistics[c * FEATURES + k] +
                     double(weight[FEATURES + k]) * site.statistics[values + c * FEATURES + k];
        site.scale[c] = site.gate ? T(1.0 / (1.0 + std::exp(-logit))) : T(1);
    }
}

// From the gradient of the scale [C] to that of φ's affine map and of the features [B, C, 4].
template <typename T>
void scale_backward(const Site<T> &site, const std::vector<double> &grad_scale, std::vector<double> &grad_features) {
    const int64_t values = site.channels * FEATURES;
    const T *weight = site.phi + SCALE_AFFINE;
    double *grad_affine = site.grad_phi + SCALE_AFFINE;
    std::vector<double> grad_mean(values), grad_var(values);  // by way of one image's features
    for (int64_t c = 0; c < site.channels; ++c) {
        const double s = site.scale[c], grad_logit = grad_scale[c] * s * (1.0 - s);
        for (int k = 0; k < FEATURES; ++k) {
            const int64_t i = c * FEATURES + k;
            grad_affine[k] += grad_logit * site.statistics[i];
            grad_affine[FEATURES + k] += grad_logit * site.statistics[values + i];
            grad_mean[i] = grad_logit * weight[k] / double(site.batch);
            grad_var[i] = grad_logit * weight[FEATURES + k] * 2.0 / double(site.batch - 1);
        }
        grad_affine[2 * FEATURES] += grad_logit * site.channel_ratio;
        grad_affine[2 * FEATURES + 1] += grad_logit * site.size_ratio;
    }
    if (!site.training) return;
    for (int64_t b = 0; b < site.batch; ++b)
        for (int64_t i = 0; i < values; ++i)
            grad_features[b * values + i] =
                grad_mean[i] + grad_var[i] * (double(site.features[b * values + i]) - double(site.statistics[i]));
}

// The signs of a value in the form that `look_up` takes.
template <typename T>
INLINE int32_t coded(int32_t signs) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    // As the bits of a float: 1, or 2 if the last kernel was above 0, but for the low bits, which hold the other signs.
    if (sizeof(T) == 4) return (signs & 7) + ((signs & 8) << 20) + 0x3f800000;
#endif
    return signs;
}

// Σ over the nine taps of table[tap][signs at the tap], for `count` values of a plane with zeros around it.
template <typename T>
inline void look_up(const T (*table)[1 << FEATURES], const int32_t *__restrict signs, int64_t pitch, int64_t count,
                    T *__restrict out) {
    for (int64_t i = 0; i < count; ++i) {
        T sum = T(0);
        for (int tap = 0; tap < TAPS; ++tap) sum += table[tap][signs[i + (tap / 3 - 1) * pitch + tap % 3 - 1]];
        out[i] = sum;
    }
}

#if defined(__AVX2__)  // a register holds a table, or half of one, and an instruction looks up all of its lanes
inline void look_up(const float (*table)[1 << FEATURES], const int32_t *__restrict signs, int64_t pitch, int64_t count,
                    float *__restrict out) {
    int64_t offset[TAPS];
    for (int tap = 0; tap < TAPS; ++tap) offset[tap] = (tap / 3 - 1) * pitch + tap % 3 - 1;
#if defined(__AVX512F__)
    __m512 entries[TAPS];
    for (int tap = 0; tap < TAPS; ++tap) entries[tap] = _mm512_loadu_ps(table[tap]);
    for (int64_t i = 0; i < count; i += 16) {
        __m512 sum[3]{};
#pragma GCC unroll 9
        for (int tap = 0; tap < TAPS; ++tap)
            sum[tap % 3] += _mm512_permutexvar_ps(_mm512_loadu_si512(signs + i + offset[tap]), entries[tap]);
        _mm512_storeu_ps(out + i, sum[0] + sum[1] + sum[2]);
    }
#else
    __m256 entries[TAPS], last[TAPS];  // what the last kernel adds is multiplied by the code, which is 1 where it adds nothing
    for (int tap = 0; tap < TAPS; ++tap) {
        last[tap] = _mm256_set1_ps(table[tap][8]);
        entries[tap] = _mm256_loadu_ps(table[tap]) - last[tap];
    }
    for (int64_t i = 0; i < count; i += 16) {
        __m256 first[2]{}, sum[2]{};
#pragma GCC unroll 9
        for (int tap = 0; tap < TAPS; ++tap)
            for (int half = 0; half < 2; ++half) {
                const __m256 code = fetch((const float *)(signs + i + offset[tap] + 8 * half));
                first[half] += _mm256_permutevar8x32_ps(entries[tap], _mm256_castps_si256(code));
                sum[half] += last[tap] * code;
            }
        for (int half = 0; half < 2; ++half) _mm256_storeu_ps(out + i + 8 * half, first[half] + sum[half]);
    }
#endif
}
#endif

// Adds what reaches h (and the scale kernels) by way of the features.
//
// In a plane, each feature hands the same gradient to all values where its kernel was above 0. So what a value of h gets
// from its neighbour at a tap is one of sixteen numbers, which the neighbour's signs choose.
template <typename T>
void features_backward(const Site<T> &site, const std::vector<double> &grad_features, std::vector<double> &grad_phi) {
    const Sheet<T> p(site);
    const T *weight = site.phi + SCALE_KERNELS;
    const int64_t pitch = p.width + 1, first = whole_vectors(pitch + 1), count = whole_vectors(p.height * pitch);
#pragma omp parallel num_threads(site.threads)
    {
        Buffer<T> sheet(p.size), shares(p.span), total(count);
        Image<T> h(site), of_grad_h(site);
        std::vector<typename Register<T>::Integer> wide(p.height * p.span);
        std::vector<int32_t> codes(p.height * p.span);
        std::vector<int32_t> plane(first + count + pitch + 1 + LANES, coded<T>(0));  // of one, with those of zeros around
#pragma omp for schedule(static)
        for (int64_t b = 0; b < site.batch; ++b) {
            const T *image = site.phi_gradient ? h.read(site.h, b) : nullptr;
            T *image_grad_h = site.h_gradient ? of_grad_h.read(site.grad_h, b) : nullptr;
            for (int64_t g = 0; g < p.groups; ++g) {
                const int64_t channel = b * site.channels + g * p.planes;
                const uint8_t *__restrict signs = site.signs + (b * p.groups + g) * p.height * p.span;
                if (site.phi_gradient) {
                    p.expand(g, image + g * p.planes * p.pixels(), sheet());
                    std::copy_n(signs, wide.size(), wide.data());
                    for (int k = 0; k < FEATURES; ++k) {
                        std::fill_n(shares(), p.span, T(0));
                        for (int64_t c = 0; c < p.planes_of(g); ++c)
                            std::fill_n(shares(c * (p.width + 1)), p.width,
                                        T(grad_features[(channel + c) * FEATURES + k]) / T(p.pixels()));
                        double *gradient = &grad_phi[b * SCALE_AFFINE + SCALE_KERNELS + k * TAPS];
                        correlate_with(p, sheet(), gradient, [&](int64_t x, int64_t y) {
                            const auto above = load(&wide[y * p.span + x]) & (1 << k);
                            return above != 0 ? load(shares(x)) : Vector<T>{};
                        });
                    }
                }
#pragma omp simd
                for (size_t i = 0; i < codes.size(); ++i) codes[i] = coded<T>(signs[i]);
                for (int64_t c = 0; c < p.planes_of(g) && site.h_gradient; ++c) {
                    T table[TAPS][1 << FEATURES]{};
                    for (int k = 0; k < FEATURES; ++k) {
                        const T grad = T(grad_features[(channel + c) * FEATURES + k]) / T(p.pixels());
                        for (int tap = 0; tap < TAPS; ++tap) {
                            const T value = weight[k * TAPS + TAPS - 1 - tap] * grad;
#pragma omp simd
                            for (int entry = 0; entry < 1 << FEATURES; ++entry) table[tap][entry] += T(entry >> k & 1) * value;
                        }
                    }
                    for (int64_t y = 0; y < p.height; ++y)
                        copy_row(&codes[y * p.span + c * pitch], p.width, plane.data() + first + y * pitch);
                    look_up(table, plane.data() + first, pitch, count, total());
                    for (int64_t y = 0; y < p.height; ++y) {
                        const T *__restrict row = total(y * pitch);
                        T *__restrict target = image_grad_h + (g * p.planes + c) * p.pixels() + y * p.width;
#pragma omp simd
                        for (int64_t x = 0; x < p.width; ++x) target[x] += row[x];
                    }
                }
            }
            if (site.h_gradient) of_grad_h.written(site.grad_h, b);
        }
    }
}

// --- the whole site

template <bool expected, typename T>
INLINE Factor<T> factor_of(T mu, T noise, const Limits<T> &limits) {
    return expected ? expected_softplus(mu, limits) : softplus(mu + noise, limits);
}

template <bool expected, typename T>
void perturb(const Site<T> &site, int64_t values, const T *__restrict h, const T *__restrict mu, const T *__restrict noise,
             const T *__restrict s, T *__restrict out) {
    const T strength = T(site.strength), clip = T(site.clip), floor = least(site);
    const Limits<T> limits;
#pragma omp simd
    for (int64_t i = 0; i < values; ++i) {
        const T z = factor_of<expected>(mu[i], noise[i], limits).z;
        const T x = h[i] * ((z * s[i] - T(1)) * strength + T(1));
        out[i] = at_least(floor, at_most(clip, x));
    }
}

template <typename T>
void relative_noise(const Site<T> &site, int64_t values, const T *__restrict mu, const T *__restrict noise, T *__restrict out) {
    constexpr double RANGE[] = MU_RANGE;
    const T strength = T(site.strength), lowest = T(RANGE[0]), highest = T(RANGE[1]);
    const Limits<T> limits;
#pragma omp simd
    for (int64_t i = 0; i < values; ++i) {
        const T bounded = at_least(lowest, at_most(highest, mu[i]));
        const T z = softplus(bounded + noise[i], limits).z;
        out[i] = (z / expected_softplus(bounded, limits).z - T(1)) * strength + T(1);
    }
}

// From the gradient of the perturbed map to those of its factors; `mu` becomes the gradient of μ.
template <bool expected, typename T>
void perturb_backward(const Site<T> &site, int64_t values, const T *__restrict h, const T *__restrict noise,
                      const T *__restrict s, const T *__restrict grad_out, T *__restrict mu, T *__restrict grad_h,
                      T *__restrict grad_s) {
    const T strength = T(site.strength), clip = T(site.clip), floor = least(site);
    const Limits<T> limits;
#pragma omp simd
    for (int64_t i = 0; i < values; ++i) {
        const Factor<T> of_mu = factor_of<expected>(mu[i], noise[i], limits);
        const T factor = (of_mu.z * s[i] - T(1)) * strength + T(1);
        const T incoming = grad_out[i];  // loaded in any case: a load under a condition is no vector code
        const T x = h[i] * factor, d = x > clip || x <= floor ? T(0) : incoming;
        const T grad_g = d * h[i] * strength;
        grad_h[i] = d * factor;
        grad_s[i] = grad_g * of_mu.z;
        mu[i] = grad_g * s[i] * of_mu.slope;
    }
}

template <typename T>
void forward(const Site<T> &site) {
    if (site.training) {
        compute_features(site);
        batch_statistics(site);
    }
    if (!site.out) return;  // strength 0: only the statistics
    if (!site.relative) compute_scale(site);
    const T strength = T(site.strength), clip = T(site.clip), floor = least(site);
    const int64_t pixels = site.height * site.width;
#pragma omp parallel num_threads(site.threads)
    {
        std::unique_ptr<Workspace<T>> w(site.noise == NO_NOISE ? nullptr : new Workspace<T>(site));
        Image<T> of_h(site, site.shortcut), of_out(site);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < site.batch; ++b) {
            const T *image_h = of_h.read(site.h, site.shortcut, b);
            if (w) w->first_layer(site, image_h);
            for (int64_t d = 0; d < site.draws; ++d) {
                const int64_t index = d * site.batch + b;
                T *image_out = of_out.target(site.out, index);
                for (int64_t c = 0; c < site.channels && !w; ++c) {
                    const T *__restrict h = image_h + c * pixels;
                    T *__restrict out = image_out + c * pixels;
                    const T factor = (site.scale[c] - T(1)) * strength + T(1);
#pragma omp simd
                    for (int64_t i = 0; i < pixels; ++i) {
                        const T x = h[i] * factor;
                        out[i] = at_least(floor, at_most(clip, x));
                    }
                }
                for (int64_t g = 0; w && g < w->p.groups; ++g) {
                    const int64_t first = g * w->p.planes, planes = w->p.planes_of(g);
                    if (b + 1 < site.batch && !d) prefetch(site.h + ((b + 1) * site.channels + first) * pixels, planes * pixels);
                    const T *h = image_h + first * pixels;
                    T *out = image_out + first * pixels;
                    const T *mu = w->mu_of(site, g, d > 0), *noise = w->noise_of(site, index * site.channels + first, planes);
                    const T *s = site.relative ? nullptr : w->scale_of(site, g);
                    if (site.relative)
                        relative_noise(site, planes * pixels, mu, noise, out);
                    else if (site.noise == EXPECTED)
                        perturb<true>(site, planes * pixels, h, mu, noise, s, out);
                    else
                        perturb<false>(site, planes * pixels, h, mu, noise, s, out);
                }
                of_out.written(site.out, index);
            }
        }
    }
}

// Through μ of one image: from grad_mu, all its sheets, to grad_h, added, and to φ's four kernels. Ends first_layer's results.
template <typename T>
void mu_backward(const Site<T> &site, Workspace<T> &w, Buffer<T> &grad_mu, T *image_grad_h, double *grad_phi) {
    const Sheet<T> &p = w.p;
    const T share = T(1) / T(site.channels);
    const Kernel<T> self1(site.phi + SELF1, true), all1(site.phi + ALL1, true, share), self2(site.phi + SELF2, true),
        all2(site.phi + ALL2, true, share);
    T *sum = w.sheet();

    p.accumulate(grad_mu(), sum);
    if (grad_phi) correlate(p, sum, w.hidden_mean(), grad_phi + ALL2);
    p.share_sum(sum, T(1));
    convolve(p, all2, sum, w.shared());

    for (int64_t g = 0; g < p.groups; ++g) {
        T *hidden = w.hidden(g * p.size);
        if (grad_phi) correlate(p, grad_mu(g * p.size), hidden, grad_phi + SELF2);
        convolve(p, self2, grad_mu(g * p.size), w.shared(), [=](Vector<T> through, int64_t, int64_t, int64_t at) {
            const Vector<T> zero{}, value = load(hidden + at) > zero ? through : zero;  // 0 outside the planes, as `hidden` is
            store(hidden + at, value);
        });
        if (grad_phi) correlate(p, hidden, w.h(g * p.size), grad_phi + SELF1);
    }
    p.accumulate(w.hidden(), sum);
    if (grad_phi) correlate(p, sum, w.mean(), grad_phi + ALL1);
    if (!site.h_gradient) return;
    p.share_sum(sum, T(1));
    convolve(p, all1, sum, w.shared());

    for (int64_t g = 0; g < p.groups; ++g) {
        T *grad_h = image_grad_h + g * p.planes * p.pixels(), *sheet = w.sheet();
        convolve(p, self1, w.hidden(g * p.size), w.shared(), [=, &p](Vector<T> value, int64_t x, int64_t y, int64_t at) {
            T *direct = grad_h + y * p.width + x;
            if (p.whole())
                store(direct, load(direct) + value);
            else
                store(sheet + at, value);
        });
        if (!p.whole()) p.add_to(g, sheet, grad_h);
    }
}

template <typename T>
void backward(const Site<T> &site) {
    const T strength = T(site.strength), clip = T(site.clip), floor = least(site);
    const int64_t pixels = site.height * site.width, channels = site.channels;
    std::vector<double> image_grad_scale(site.batch * channels, 0.0);
    std::vector<double> image_grad_phi(site.phi_gradient ? site.batch * SCALE_AFFINE : 0, 0.0);
#pragma omp parallel num_threads(site.threads)
    {
        std::unique_ptr<Workspace<T>> w;
        std::unique_ptr<Buffer<T>> grad_mu, grad_scale;
        if (site.noise != NO_NOISE) {
            w.reset(new Workspace<T>(site));
            grad_mu.reset(new Buffer<T>(w->p.groups * w->p.size));
            grad_scale.reset(new Buffer<T>(w->p.planes * pixels));
        }
        Image<T> of_h(site), of_grad_out(site), of_grad_h(site);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < site.batch; ++b) {
            const int64_t image = b * channels;
            const T *image_h = of_h.read(site.h, b), *image_grad_out = of_grad_out.read(site.grad_out, b);
            T *image_grad_h = of_grad_h.target(site.grad_h, b);
            if (w) w->first_layer(site, image_h);
            for (int64_t c = 0; c < channels && !w; ++c) {
                const T *__restrict h = image_h + c * pixels;
                const T *__restrict grad_out = image_grad_out + c * pixels;
                T *__restrict grad_h = image_grad_h + c * pixels;
                const T factor = (site.scale[c] - T(1)) * strength + T(1);
                T sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t i = 0; i < pixels; ++i) {
                    const T incoming = grad_out[i];
                    const T x = h[i] * factor, d = x > clip || x <= floor ? T(0) : incoming;
                    grad_h[i] = d * factor;
                    sum += d * h[i] * strength;
                }
                image_grad_scale[image + c] = sum;
            }
            for (int64_t g = 0; w && g < w->p.groups; ++g) {
                const int64_t first = g * w->p.planes, channel = image + first, planes = w->p.planes_of(g);
                if (b + 1 < site.batch) {
                    prefetch(site.h + (channel + channels) * pixels, planes * pixels);
                    prefetch(site.grad_out + (channel + channels) * pixels, planes * pixels);
                }
                const T *h = image_h + first * pixels, *grad_out = image_grad_out + first * pixels;
                T *grad_h = image_grad_h + first * pixels, *grad_s = (*grad_scale)();
                w->second_layer(site, g, w->mu());
                const T *noise = w->noise_of(site, channel, planes), *s = w->scale_of(site, g);
                if (site.noise == EXPECTED)
                    perturb_backward<true>(site, planes * pixels, h, noise, s, grad_out, w->mu(), grad_h, grad_s);
                else
                    perturb_backward<false>(site, planes * pixels, h, noise, s, grad_out, w->mu(), grad_h, grad_s);
                for (int64_t c = 0; c < planes; ++c) {
                    T sum = 0;
#pragma omp simd reduction(+ : sum)
                    for (int64_t i = 0; i < pixels; ++i) sum += grad_s[c * pixels + i];
                    image_grad_scale[channel + c] = sum;
                }
                w->p.expand(g, w->mu(), (*grad_mu)(g * w->p.size));
            }
            if (w) {
                double *grad_phi = site.phi_gradient ? &image_grad_phi[b * SCALE_AFFINE] : nullptr;
                mu_backward(site, *w, *grad_mu, image_grad_h, grad_phi);
            }
            of_grad_h.written(site.grad_h, b);
        }
    }
    std::fill_n(site.grad_phi, PARAMETERS, 0.0);
    if (site.gate) {
        std::vector<double> grad_scale(channels, 0.0);
        for (int64_t b = 0; b < site.batch; ++b)
            for (int64_t c = 0; c < channels; ++c) grad_scale[c] += image_grad_scale[b * channels + c];
        std::vector<double> grad_features(site.training ? site.batch * channels * FEATURES : 0);
        scale_backward(site, grad_scale, grad_features);
        if (site.training) features_backward(site, grad_features, image_grad_phi);
    }
    if (site.phi_gradient)
        for (int64_t b = 0; b < site.batch; ++b)
            for (int i = 0; i < SCALE_AFFINE; ++i) site.grad_phi[i] += image_grad_phi[b * SCALE_AFFINE + i];
}

template <typename T>
void draw(uint64_t seed, int64_t planes, int64_t pixels, int32_t threads, T *out) {
#pragma omp parallel num_threads(threads)
    {
        Draw<T> plane(pixels, 1);
#pragma omp for schedule(static)
        for (int64_t index = 0; index < planes; ++index)
            std::copy_n(plane(seed, uint32_t(index), 1), pixels, out + index * pixels);
    }
}

}  // namespace

extern "C" {

int64_t signs_size(const Site<float> *site) {
    const Sheet<float> p(*site);
    return site->batch * p.groups * p.height * p.span;
}

int64_t site_size() { return sizeof(Site<float>); }  // lets the caller check that both sides agree on the structure

void forward_float(const Site<float> *site) { forward(*site); }
void forward_double(const Site<double> *site) { forward(*site); }
void backward_float(const Site<float> *site) { backward(*site); }
void backward_double(const Site<double> *site) { backward(*site); }

// The noise of a site as a tensor: [planes, pixels].
void draw_float(uint64_t seed, int64_t planes, int64_t pixels, int32_t threads, float *out) {
    draw(seed, planes, pixels, threads, out);
}
void draw_double(uint64_t seed, int64_t planes, int64_t pixels, int32_t threads, double *out) {
    draw(seed, planes, pixels, threads, out);
}
}
