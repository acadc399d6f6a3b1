// One perturbation site on the CPU, forward and backward, one image at a time so that it stays in cache.
//
// Mirrors the operators in perturbation.py, which are the reference, and saves none of their intermediate feature maps:
// the backward pass computes them again, and draws the same noise again from the same seed.
//
// Plain C++17 behind a C interface (no PyTorch headers): builds in seconds and fits every version of PyTorch.
// Images are independent and sums over images run in a fixed order: the result does not depend on the thread count.
//
// A plane is one channel of one image, kept with a border of zeros: [H + 2][W + 2] in a row. A 3×3 convolution is then a
// loop over consecutive values, nine loads at fixed offsets, without a special case. The two border values a row
// that such a loop spoils are set to zero again, or masked.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace {

constexpr int TAPS = 9, FEATURES = 4, LANES = 16;
constexpr int SELF1 = 0, ALL1 = 9, SELF2 = 18, ALL2 = 27, SCALE_KERNELS = 36, SCALE_AFFINE = 72, PARAMETERS = 82;
constexpr float TWO_PI_4 = 1.57079632679489662f;

enum Noise : int32_t { NO_NOISE = 0, DRAWN = 1, GIVEN = 2 };

}  // namespace

// Fields and order as in cpu.py.
template <typename T>
struct Site {
    int64_t batch, channels, height, width;
    int32_t threads, training, noise, gate, phi_gradient;
    double strength, clip, channel_ratio, size_ratio, momentum;
    uint64_t seed;
    const T *h;            // [B, C, H, W]
    const T *given_noise;  // [B, C, H, W] if noise is GIVEN
    const T *phi;          // [82]: self1, all1, self2, all2, scale_kernels, scale_affine
    T *running_mean;       // [C, 4]
    T *running_var;        // [C, 4]
    T *features;           // [B, C, 4], written by forward in training, read by backward
    T *statistics;         // [2, C, 4]: the mean and variance that made the scale, likewise
    T *scale;              // [C], likewise
    T *out;                // [B, C, H, W]
    const T *grad_out;     // [B, C, H, W]
    T *grad_h;             // [B, C, H, W]
    double *grad_phi;      // [82]
};

namespace {

// --- elementary functions, in float without calls or branches so that loops over them become vector code

inline float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t as_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

template <typename T>
inline T relu(T x) {
    return x < T(0) ? T(0) : x;  // keeps a NaN
}

// e^x for x <= 0: x = n ln 2 + r, |r| <= ln 2 / 2, and the Taylor series of e^r.
inline float exp_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float shift = 12582912.0f;  // 1.5 · 2²³: adding it rounds to an integer
    const float n = (x * 1.44269504088896341f + shift) - shift;
    const float r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * as_float(uint32_t(int32_t(n) + 127) << 23);
}

inline double exp_negative(double x) { return std::exp(x); }

// log(1 + e) for 0 <= e <= 1: 2 artanh(e / (2 + e)), accurate to the last digits for small e too.
inline float log1p_unit(float e) {
    const float w = e / (2.0f + e), w2 = w * w;
    float p = 1.0f / 15;
    p = p * w2 + 1.0f / 13;
    p = p * w2 + 1.0f / 11;
    p = p * w2 + 1.0f / 9;
    p = p * w2 + 1.0f / 7;
    p = p * w2 + 1.0f / 5;
    p = p * w2 + 1.0f / 3;
    return 2.0f * w + 2.0f * w * w2 * p;
}

inline double log1p_unit(double e) { return std::log1p(e); }

// log(x) for 0 < x <= 1, normal: x = 2^n m, sqrt(1/2) <= m < sqrt(2), log m = 2 artanh((m − 1) / (m + 1)).
inline float log_unit(float x) {
    const uint32_t bits = as_bits(x) - 0x3f3504f3u;  // bits of sqrt(1/2): the carry makes the exponent one of m
    const int32_t n = int32_t(bits) >> 23;
    const float m = as_float((bits & 0x007fffffu) + 0x3f3504f3u);
    const float w = (m - 1.0f) / (m + 1.0f), w2 = w * w;
    float p = 1.0f / 9;
    p = p * w2 + 1.0f / 7;
    p = p * w2 + 1.0f / 5;
    p = p * w2 + 1.0f / 3;
    return float(n) * 0.693147180559945309f + (2.0f * w + 2.0f * w * w2 * p);
}

// --- noise: a pure function of (seed, plane, position in the plane), the same in every backend

// Two standard normals from two random words (Box and Muller 1958).
inline void normal_pair(uint32_t first, uint32_t second, float &n0, float &n1) {
    const float u = (float(int32_t(first >> 1)) + 0.5f) * 4.656612873077393e-10f;  // (0, 1], step 2⁻³¹
    const float radius = std::sqrt(-2.0f * log_unit(u));
    // The low 30 bits of the second word are an angle in [−π/4, π/4), the high two say which quarter.
    const float angle = (float(int32_t(second & 0x3fffffffu)) * 9.313225746154785e-10f - 0.5f) * TWO_PI_4;
    const float a2 = angle * angle;
    const float sine =
        angle * (1.0f + a2 * (-1.0f / 6 + a2 * (1.0f / 120 + a2 * (-1.0f / 5040 + a2 * (1.0f / 362880)))));
    const float cosine = 1.0f + a2 * (-0.5f + a2 * (1.0f / 24 + a2 * (-1.0f / 720 + a2 * (1.0f / 40320))));
    const bool swap = second & 0x40000000u;
    const float sign = second & 0x80000000u ? -radius : radius;
    n0 = sign * (swap ? sine : cosine);
    n1 = sign * (swap ? cosine : sine);
}

// Philox4x32-10 (Salmon et al. 2011). Counter (j, plane, 0, 0) gives the values j, q + j, 2q + j and 3q + j of a plane of
// n, q = ⌈n/4⌉: vectors of counters give vectors of neighbours. Writes 4q values.
template <typename T>
void draw_plane(uint64_t seed, uint32_t plane, int64_t n, T *__restrict out) {
    const int64_t quarter = (n + 3) / 4;
    T *__restrict out1 = out + quarter, *__restrict out2 = out + 2 * quarter, *__restrict out3 = out + 3 * quarter;
#pragma omp simd
    for (int64_t j = 0; j < quarter; ++j) {
        uint32_t c0 = uint32_t(j), c1 = plane, c2 = 0, c3 = 0, k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
        for (int round = 0; round < 10; ++round) {
            const uint64_t a = uint64_t(c0) * 0xD2511F53u, b = uint64_t(c2) * 0xCD9E8D57u;
            c0 = uint32_t(b >> 32) ^ c1 ^ k0;
            c1 = uint32_t(b);
            c2 = uint32_t(a >> 32) ^ c3 ^ k1;
            c3 = uint32_t(a);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        float n0, n1, n2, n3;
        normal_pair(c0, c1, n0, n1);
        normal_pair(c2, c3, n2, n3);
        out[j] = T(n0);
        out1[j] = T(n1);
        out2[j] = T(n2);
        out3[j] = T(n3);
    }
}

// --- planes

struct Plane {
    int64_t height, width, pitch, first, count, size;

    Plane(int64_t height, int64_t width) : height(height), width(width), pitch(width + 2), first(pitch + 1) {
        count = (height * pitch - 2 + LANES - 1) / LANES * LANES;  // what loops run over, from `first`: whole vectors
        size = (first + count + pitch + 1 + LANES - 1) / LANES * LANES;
    }

    int64_t pixels() const { return height * width; }

    template <typename T>
    void expand(const T *__restrict values, T *__restrict plane) const {
        for (int64_t y = 0; y < height; ++y) std::copy_n(values + y * width, width, plane + (y + 1) * pitch + 1);
    }

    template <typename T>
    void compact(const T *__restrict plane, T *__restrict values) const {
        for (int64_t y = 0; y < height; ++y) std::copy_n(plane + (y + 1) * pitch + 1, width, values + y * width);
    }

    template <typename T>
    void add_to(const T *__restrict plane, T *__restrict values) const {
        for (int64_t y = 0; y < height; ++y) {
            const T *__restrict row = plane + (y + 1) * pitch + 1;
            T *__restrict target = values + y * width;
#pragma omp simd
            for (int64_t x = 0; x < width; ++x) target[x] += row[x];
        }
    }

    template <typename T>
    void clear_border(T *plane) const {
        for (int64_t y = 1; y <= height; ++y) plane[y * pitch + width + 1] = plane[(y + 1) * pitch] = T(0);
        for (int64_t i = (height + 1) * pitch; i < first + count; ++i) plane[i] = T(0);
    }
};

template <typename T>
struct Kernel {
    T w[TAPS];

    explicit Kernel(const T *values, bool transposed = false, T factor = T(1)) {
        for (int i = 0; i < TAPS; ++i) w[i] = factor * values[transposed ? TAPS - 1 - i : i];
    }

    inline T row(int y, const T *__restrict x) const { return w[3 * y] * x[-1] + w[3 * y + 1] * x[0] + w[3 * y + 2] * x[1]; }

    inline T at(const T *__restrict x, int64_t pitch) const {
        const T *__restrict up = x - pitch, *__restrict down = x + pitch;
        T sum = w[0] * up[-1];
        sum += w[1] * up[0];
        sum += w[2] * up[1];
        sum += w[3] * x[-1];
        sum += w[4] * x[0];
        sum += w[5] * x[1];
        sum += w[6] * down[-1];
        sum += w[7] * down[0];
        sum += w[8] * down[1];
        return sum;
    }
};

template <typename T>
void convolve(const Plane &p, const Kernel<T> &kernel, const T *__restrict in, T *__restrict out) {
    const T *__restrict x = in + p.first;
    T *__restrict y = out + p.first;
#pragma omp simd
    for (int64_t i = 0; i < p.count; ++i) y[i] = kernel.at(x + i, p.pitch);
}

// gradient[tap] += Σ of d · x shifted by the tap: what a 3×3 kernel gets when its output gets d.
template <typename T>
void correlate(const Plane &p, const T *__restrict d, const T *__restrict in, double *gradient) {
    const T *__restrict g = d + p.first;
    for (int dy = -1; dy <= 1; ++dy) {
        const T *__restrict x = in + p.first + dy * p.pitch;
        T left = 0, middle = 0, right = 0;
#pragma omp simd reduction(+ : left, middle, right)
        for (int64_t i = 0; i < p.count; ++i) {
            left += g[i] * x[i - 1];
            middle += g[i] * x[i];
            right += g[i] * x[i + 1];
        }
        gradient[0] += left;
        gradient[1] += middle;
        gradient[2] += right;
        gradient += 3;
    }
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

template <typename T>
struct Workspace {
    Plane p;
    Buffer<T> h, hidden, mean, hidden_mean, shared, plane, mu, noise;

    explicit Workspace(const Site<T> &site)
        : p(site.height, site.width),
          h(site.channels * p.size),
          hidden(site.channels * p.size),
          mean(p.size),
          hidden_mean(p.size),
          shared(p.size),
          plane(p.size),
          mu(p.pixels()),
          noise((p.pixels() + 3) / 4 * 4) {}

    // First layer of μ for one image: fills h, mean, hidden and hidden_mean, and `shared`, the all-kernel's part of layer two.
    void first_layer(const Site<T> &site, const T *image) {
        const int64_t pixels = p.pixels(), channels = site.channels;
        const Kernel<T> self(site.phi + SELF1), all(site.phi + ALL1), all2(site.phi + ALL2);
        std::fill_n(mean(), p.size, T(0));
        std::fill_n(hidden_mean(), p.size, T(0));
        for (int64_t c = 0; c < channels; ++c) {
            p.expand(image + c * pixels, h(c * p.size));
            accumulate(h(c * p.size), mean());
        }
        finish_mean(mean(), channels);
        convolve(p, all, mean(), shared());
        for (int64_t c = 0; c < channels; ++c) {
            const T *__restrict x = h(c * p.size) + p.first, *__restrict add = shared() + p.first;
            T *__restrict y = hidden(c * p.size) + p.first, *__restrict sum = hidden_mean() + p.first;
#pragma omp simd
            for (int64_t i = 0; i < p.count; ++i) {
                const T value = relu(self.at(x + i, p.pitch) + add[i]);
                y[i] = value;
                sum[i] += value;
            }
            p.clear_border(hidden(c * p.size));
        }
        finish_mean(hidden_mean(), channels);
        convolve(p, all2, hidden_mean(), shared());
    }

    // μ of one channel, pixel by pixel, after first_layer.
    void second_layer(const Site<T> &site, int64_t c) {
        const Kernel<T> self(site.phi + SELF2);
        const T *__restrict x = hidden(c * p.size) + p.first, *__restrict add = shared() + p.first;
        T *__restrict y = plane() + p.first;
#pragma omp simd
        for (int64_t i = 0; i < p.count; ++i) y[i] = self.at(x + i, p.pitch) + add[i];
        p.compact(plane(), mu());
    }

    // ε of one plane: drawn, or the caller's.
    const T *noise_of(const Site<T> &site, int64_t index) {
        if (site.noise == GIVEN) return site.given_noise + index * p.pixels();
        draw_plane(site.seed, uint32_t(index), p.pixels(), noise());
        return noise();
    }

    void accumulate(const T *__restrict x, T *__restrict sum) const {
#pragma omp simd
        for (int64_t i = 0; i < p.size; ++i) sum[i] += x[i];
    }

    void finish_mean(T *sum, int64_t channels) const {
        const T factor = T(1) / T(channels);
        for (int64_t i = 0; i < p.size; ++i) sum[i] *= factor;
        p.clear_border(sum);
    }
};

// --- the scale

template <typename T>
void compute_features(const Site<T> &site) {
    const Plane p(site.height, site.width);
    const Kernel<T> k0(site.phi + SCALE_KERNELS), k1(site.phi + SCALE_KERNELS + TAPS),
        k2(site.phi + SCALE_KERNELS + 2 * TAPS), k3(site.phi + SCALE_KERNELS + 3 * TAPS);
    std::vector<T> ones(p.pixels(), T(1));
#pragma omp parallel num_threads(site.threads)
    {
        Buffer<T> plane(p.size), inside(p.size);
        p.expand(ones.data(), inside());
#pragma omp for schedule(static)
        for (int64_t index = 0; index < site.batch * site.channels; ++index) {
            p.expand(site.h + index * p.pixels(), plane());
            const T *__restrict x = plane() + p.first, *__restrict mask = inside() + p.first;
            T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
            for (int64_t i = 0; i < p.count; ++i) {
                s0 += mask[i] * relu(k0.at(x + i, p.pitch));
                s1 += mask[i] * relu(k1.at(x + i, p.pitch));
                s2 += mask[i] * relu(k2.at(x + i, p.pitch));
                s3 += mask[i] * relu(k3.at(x + i, p.pitch));
            }
            T *feature = site.features + index * FEATURES;
            feature[0] = s0 / T(p.pixels());
            feature[1] = s1 / T(p.pixels());
            feature[2] = s2 / T(p.pixels());
            feature[3] = s3 / T(p.pixels());
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
    for (int64_t c = 0; c < site.channels; ++c) {
        const double s = site.scale[c], grad_logit = grad_scale[c] * s * (1.0 - s);
        for (int k = 0; k < FEATURES; ++k) {
            const int64_t i = c * FEATURES + k;
            const double mean = site.statistics[i];
            grad_affine[k] += grad_logit * mean;
            grad_affine[FEATURES + k] += grad_logit * site.statistics[values + i];
            if (!site.training) continue;
            const double grad_mean = grad_logit * weight[k] / double(site.batch);
            const double grad_var = grad_logit * weight[FEATURES + k] * 2.0 / double(site.batch - 1);
            for (int64_t b = 0; b < site.batch; ++b)
                grad_features[b * values + i] = grad_mean + grad_var * (site.features[b * values + i] - mean);
        }
        grad_affine[2 * FEATURES] += grad_logit * site.channel_ratio;
        grad_affine[2 * FEATURES + 1] += grad_logit * site.size_ratio;
    }
}

// Adds what reaches h (and the scale kernels) by way of the features.
template <typename T>
void features_backward(const Site<T> &site, const std::vector<double> &grad_features, std::vector<double> &grad_phi) {
    const Plane p(site.height, site.width);
    const T *weight = site.phi + SCALE_KERNELS;
    const Kernel<T> k0(weight), k1(weight + TAPS), k2(weight + 2 * TAPS), k3(weight + 3 * TAPS);
    const Kernel<T> t0(weight, true), t1(weight + TAPS, true), t2(weight + 2 * TAPS, true), t3(weight + 3 * TAPS, true);
#pragma omp parallel num_threads(site.threads)
    {
        Buffer<T> plane(p.size), d0(p.size), d1(p.size), d2(p.size), d3(p.size), row0(p.size), row1(p.size), row2(p.size),
            sum(p.size);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < site.batch; ++b) {
            for (int64_t c = 0; c < site.channels; ++c) {
                const int64_t index = b * site.channels + c;
                p.expand(site.h + index * p.pixels(), plane());
                const double *grad = &grad_features[index * FEATURES];
                const T share = T(1) / T(p.pixels());
                const T f0 = T(grad[0]) * share, f1 = T(grad[1]) * share, f2 = T(grad[2]) * share,
                        f3 = T(grad[3]) * share;
                const T *__restrict x = plane() + p.first;
                T *__restrict y0 = d0() + p.first, *__restrict y1 = d1() + p.first, *__restrict y2 = d2() + p.first,
                              *__restrict y3 = d3() + p.first;
#pragma omp simd
                for (int64_t i = 0; i < p.count; ++i) {
                    y0[i] = k0.at(x + i, p.pitch) > T(0) ? f0 : T(0);
                    y1[i] = k1.at(x + i, p.pitch) > T(0) ? f1 : T(0);
                    y2[i] = k2.at(x + i, p.pitch) > T(0) ? f2 : T(0);
                    y3[i] = k3.at(x + i, p.pitch) > T(0) ? f3 : T(0);
                }
                for (T *d : {d0(), d1(), d2(), d3()}) p.clear_border(d);
                // All three rows of the four transposed kernels at once, then the rows are put together: 15 loads, not 36.
                T *__restrict up = row0() + p.first, *__restrict middle = row1() + p.first,
                              *__restrict down = row2() + p.first, *__restrict total = sum() + p.first;
                const T *__restrict z0 = d0() + p.first, *__restrict z1 = d1() + p.first, *__restrict z2 = d2() + p.first,
                                    *__restrict z3 = d3() + p.first;
#pragma omp simd
                for (int64_t i = 0; i < p.count; ++i) {
                    up[i] = t0.row(0, z0 + i) + t1.row(0, z1 + i) + t2.row(0, z2 + i) + t3.row(0, z3 + i);
                    middle[i] = t0.row(1, z0 + i) + t1.row(1, z1 + i) + t2.row(1, z2 + i) + t3.row(1, z3 + i);
                    down[i] = t0.row(2, z0 + i) + t1.row(2, z1 + i) + t2.row(2, z2 + i) + t3.row(2, z3 + i);
                }
#pragma omp simd
                for (int64_t i = 0; i < p.count; ++i) total[i] = up[i - p.pitch] + middle[i] + down[i + p.pitch];
                p.add_to(sum(), site.grad_h + index * p.pixels());
                if (site.phi_gradient) {
                    double *gradient = &grad_phi[b * SCALE_AFFINE + SCALE_KERNELS];
                    for (T *d : {d0(), d1(), d2(), d3()}) {
                        correlate(p, d, plane(), gradient);
                        gradient += TAPS;
                    }
                }
            }
        }
    }
}

// --- the whole site

template <typename T>
void forward(const Site<T> &site) {
    if (site.training) {
        compute_features(site);
        batch_statistics(site);
    }
    if (!site.out) return;  // strength 0: only the statistics
    compute_scale(site);
    const T strength = T(site.strength), clip = T(site.clip);
    const int64_t pixels = site.height * site.width;
#pragma omp parallel num_threads(site.threads)
    {
        std::unique_ptr<Workspace<T>> w(site.noise == NO_NOISE ? nullptr : new Workspace<T>(site));
#pragma omp for schedule(static)
        for (int64_t b = 0; b < site.batch; ++b) {
            const int64_t image = b * site.channels;
            if (w) w->first_layer(site, site.h + image * pixels);
            for (int64_t c = 0; c < site.channels; ++c) {
                const T *__restrict h = site.h + (image + c) * pixels;
                T *__restrict out = site.out + (image + c) * pixels;
                const T s = site.scale[c];
                if (!w) {
                    const T factor = (s - T(1)) * strength + T(1);
#pragma omp simd
                    for (int64_t i = 0; i < pixels; ++i) out[i] = h[i] * factor > clip ? clip : h[i] * factor;
                    continue;
                }
                w->second_layer(site, c);
                const T *__restrict mu = w->mu(), *__restrict noise = w->noise_of(site, image + c);
#pragma omp simd
                for (int64_t i = 0; i < pixels; ++i) {
                    const T a = mu[i] + noise[i];
                    const T z = relu(a) + log1p_unit(exp_negative(a < T(0) ? a : -a));
                    const T x = h[i] * ((z * s - T(1)) * strength + T(1));
                    out[i] = x > clip ? clip : x;
                }
            }
        }
    }
}

// Through μ of one image: from grad_mu [C] planes to grad_h, added, and to φ's four kernels. Ends first_layer's results.
template <typename T>
void mu_backward(const Site<T> &site, Workspace<T> &w, Buffer<T> &grad_mu, T *image_grad_h, double *grad_phi) {
    const Plane &p = w.p;
    const int64_t channels = site.channels;
    const T share = T(1) / T(channels);
    const Kernel<T> self1(site.phi + SELF1, true), all1(site.phi + ALL1, true, share), self2(site.phi + SELF2, true),
        all2(site.phi + ALL2, true, share);
    T *sum = w.plane();

    std::fill_n(sum, p.size, T(0));
    for (int64_t c = 0; c < channels; ++c) w.accumulate(grad_mu(c * p.size), sum);
    if (grad_phi) correlate(p, sum, w.hidden_mean(), grad_phi + ALL2);
    convolve(p, all2, sum, w.shared());

    std::fill_n(sum, p.size, T(0));
    for (int64_t c = 0; c < channels; ++c) {
        if (grad_phi) correlate(p, grad_mu(c * p.size), w.hidden(c * p.size), grad_phi + SELF2);
        const T *__restrict x = grad_mu(c * p.size) + p.first, *__restrict add = w.shared() + p.first;
        T *__restrict y = w.hidden(c * p.size) + p.first, *__restrict total = sum + p.first;
#pragma omp simd
        for (int64_t i = 0; i < p.count; ++i) {
            const T through = self2.at(x + i, p.pitch) + add[i];
            const T value = y[i] > T(0) ? through : T(0);  // `hidden` is 0 on the border, and so is this
            y[i] = value;
            total[i] += value;
        }
        if (grad_phi) correlate(p, w.hidden(c * p.size), w.h(c * p.size), grad_phi + SELF1);
    }
    if (grad_phi) correlate(p, sum, w.mean(), grad_phi + ALL1);
    convolve(p, all1, sum, w.shared());

    for (int64_t c = 0; c < channels; ++c) {
        const T *__restrict x = w.hidden(c * p.size) + p.first, *__restrict add = w.shared() + p.first;
        T *__restrict y = w.plane() + p.first;
#pragma omp simd
        for (int64_t i = 0; i < p.count; ++i) y[i] = self1.at(x + i, p.pitch) + add[i];
        p.add_to(w.plane(), image_grad_h + c * p.pixels());
    }
}

template <typename T>
void backward(const Site<T> &site) {
    const T strength = T(site.strength), clip = T(site.clip);
    const int64_t pixels = site.height * site.width, channels = site.channels;
    std::vector<double> image_grad_scale(site.batch * channels, 0.0);
    std::vector<double> image_grad_phi(site.phi_gradient ? site.batch * SCALE_AFFINE : 0, 0.0);
#pragma omp parallel num_threads(site.threads)
    {
        std::unique_ptr<Workspace<T>> w;
        std::unique_ptr<Buffer<T>> grad_mu;
        if (site.noise != NO_NOISE) {
            w.reset(new Workspace<T>(site));
            grad_mu.reset(new Buffer<T>(channels * w->p.size));
        }
#pragma omp for schedule(static)
        for (int64_t b = 0; b < site.batch; ++b) {
            const int64_t image = b * channels;
            if (w) w->first_layer(site, site.h + image * pixels);
            for (int64_t c = 0; c < channels; ++c) {
                const T *__restrict h = site.h + (image + c) * pixels;
                const T *__restrict grad_out = site.grad_out + (image + c) * pixels;
                T *__restrict grad_h = site.grad_h + (image + c) * pixels;
                const T s = site.scale[c];
                T grad_scale = 0;
                if (!w) {
                    const T factor = (s - T(1)) * strength + T(1);
#pragma omp simd reduction(+ : grad_scale)
                    for (int64_t i = 0; i < pixels; ++i) {
                        const T incoming = grad_out[i];
                        const T d = h[i] * factor > clip ? T(0) : incoming;
                        grad_h[i] = d * factor;
                        grad_scale += d * h[i] * strength;
                    }
                    image_grad_scale[image + c] = grad_scale;
                    continue;
                }
                w->second_layer(site, c);
                T *__restrict mu = w->mu();
                const T *__restrict noise = w->noise_of(site, image + c);
#pragma omp simd reduction(+ : grad_scale)
                for (int64_t i = 0; i < pixels; ++i) {
                    const T a = mu[i] + noise[i];
                    const T e = exp_negative(a < T(0) ? a : -a);
                    const T z = relu(a) + log1p_unit(e);
                    const T sigmoid = (a < T(0) ? e : T(1)) / (T(1) + e);
                    const T factor = (z * s - T(1)) * strength + T(1);
                    const T incoming = grad_out[i];  // loaded in any case: a load under a condition is no vector code
                    const T d = h[i] * factor > clip ? T(0) : incoming;
                    const T grad_g = d * h[i] * strength;
                    grad_h[i] = d * factor;
                    grad_scale += grad_g * z;
                    mu[i] = grad_g * s * sigmoid;  // from here on the gradient of μ
                }
                image_grad_scale[image + c] = grad_scale;
                w->p.expand(w->mu(), (*grad_mu)(c * w->p.size));
            }
            if (w) {
                double *grad_phi = site.phi_gradient ? &image_grad_phi[b * SCALE_AFFINE] : nullptr;
                mu_backward(site, *w, *grad_mu, site.grad_h + image * pixels, grad_phi);
            }
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
        Buffer<T> plane((pixels + 3) / 4 * 4);
#pragma omp for schedule(static)
        for (int64_t index = 0; index < planes; ++index) {
            draw_plane(seed, uint32_t(index), pixels, plane());
            std::copy_n(plane(), pixels, out + index * pixels);
        }
    }
}

}  // namespace

extern "C" {

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
