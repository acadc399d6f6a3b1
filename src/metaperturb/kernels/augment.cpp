// Crop, flip and normalization of a batch of images in one pass, from where the data set lies to the training batch.
//
// Equal to the tensor code in data/batches.py to the bit: the same division and subtraction, value by value.

#include <algorithm>
#include <cstdint>
#include <vector>

static inline float normalize(uint8_t value) { return float(value) / 127.5f - 1.0f; }

// images uint8 [N, channels, height, width]; rows, top, left int64 [batch]; flip uint8 [batch];
// out float [batch, channels, height, width]. Image b is rows[b], cut at (top[b], left[b]) out of a black border of
// `padding` pixels, then flipped if flip[b].
extern "C" void crop_flip_normalize(const uint8_t *images, const int64_t *rows, const int64_t *top, const int64_t *left,
                                    const uint8_t *flip, int64_t batch, int64_t channels, int64_t height,
                                    int64_t width, int64_t padding, int32_t threads, float *out) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint8_t> line(width);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < batch; ++b) {
            const int64_t down = top[b] - padding, right = left[b] - padding;
            const int64_t first = std::max<int64_t>(0, -right), last = std::min(width, width - right);
            for (int64_t c = 0; c < channels; ++c) {
                const uint8_t *image = images + (rows[b] * channels + c) * height * width;
                for (int64_t y = 0; y < height; ++y) {
                    const int64_t source = y + down;
                    if (source < 0 || source >= height || last <= first) {
                        std::fill(line.begin(), line.end(), uint8_t(0));
                    } else {
                        const uint8_t *row = image + source * width + right;
                        std::fill(line.begin(), line.begin() + first, uint8_t(0));
                        std::copy(row + first, row + last, line.begin() + first);
                        std::fill(line.begin() + last, line.end(), uint8_t(0));
                    }
                    const uint8_t *__restrict values = line.data();
                    float *__restrict target = out + ((b * channels + c) * height + y) * width;
                    if (flip[b]) {
#pragma omp simd
                        for (int64_t x = 0; x < width; ++x) target[x] = normalize(values[width - 1 - x]);
                    } else {
#pragma omp simd
                        for (int64_t x = 0; x < width; ++x) target[x] = normalize(values[x]);
                    }
                }
            }
        }
    }
}
