"""A second implementation of the perturbation site, from SPEC section 2 and section 3.2 of the paper alone.

float64 NumPy and loops over images and channels: obvious enough to be believed. It shares no code with `metaperturb`.
"""

import numpy as np

MOMENTUM = 0.1


def correlate3x3(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """What deep learning calls convolution: `[H, W]` with `[3, 3]`, one pixel of zeros around, `[H, W]`."""
    (height, width), padded = image.shape, np.pad(image, 1)
    return sum(kernel[y, x] * padded[y : y + height, x : x + width] for y, x in np.ndindex(3, 3))


def equivariant_layer(h: np.ndarray, self_kernel: np.ndarray, all_kernel: np.ndarray) -> np.ndarray:
    """Every channel with the self kernel, the mean channel with the all kernel, added: `[B, C, H, W]`."""
    out = np.empty(h.shape)
    for b, example in enumerate(h):
        shared = correlate3x3(sum(example) / len(example), all_kernel)
        for c, channel in enumerate(example):
            out[b, c] = correlate3x3(channel, self_kernel) + shared
    return out


def softplus(a: np.ndarray) -> np.ndarray:
    return np.maximum(a, 0) + np.log1p(np.exp(-np.abs(a)))


class OracleSite:
    """One site with its own running statistics; the arguments are those of `PerturbSite`, the weights by name.

    `scale_free`: the noise sees h divided by its root mean square, the batch's or the running one.
    """

    def __init__(
        self, weights: dict[str, np.ndarray], channels: int, channel_norm: int, size_norm: int, scale_free: bool = False
    ) -> None:
        self.scale_free, self.running_rms = scale_free, 1.0
        self.weights = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
        self.channel_norm, self.size_norm = channel_norm, size_norm
        self.running_mean = np.zeros((channels, 4))
        self.running_var = np.ones((channels, 4))
        self.training = True
        self.strength, self.clip, self.clip_eval = 1.0, 100.0, False

    def noise_mean(self, h: np.ndarray) -> np.ndarray:
        w = self.weights
        if self.scale_free:
            h = h / (np.sqrt((h**2).mean()) if self.training else self.running_rms)
        hidden = np.maximum(equivariant_layer(h, w["self1"], w["all1"]), 0)
        return equivariant_layer(hidden, w["self2"], w["all2"])

    def features(self, h: np.ndarray) -> np.ndarray:
        """v: `[B, C, 4]`."""
        v = np.empty((*h.shape[:2], 4))
        for b, example in enumerate(h):
            for c, channel in enumerate(example):
                for k, kernel in enumerate(self.weights["scale_kernels"]):
                    v[b, c, k] = np.maximum(correlate3x3(channel, kernel), 0).mean()
        return v

    def batch_statistics(self, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and unbiased variance over the batch, `[C, 4]` each."""
        v = self.features(h)
        mean = v.sum(axis=0) / len(v)
        return mean, ((v - mean) ** 2).sum(axis=0) / (len(v) - 1)

    def scale(self, h: np.ndarray) -> np.ndarray:
        """s: `[C]`; leaves the running statistics alone."""
        mean, var = self.batch_statistics(h) if self.training else (self.running_mean, self.running_var)
        channels, height = h.shape[1], h.shape[2]
        s = np.empty(channels)
        for c in range(channels):
            layer = [channels / self.channel_norm, height / self.size_norm]
            statistics = np.array([*mean[c], *var[c], *layer])
            s[c] = 1 / (1 + np.exp(-(self.weights["scale_affine"] @ statistics)))
        return s

    def forward(self, h: np.ndarray, noise: np.ndarray) -> np.ndarray:
        z = softplus(self.noise_mean(h) + noise)
        s = self.scale(h)
        out = h.copy()
        for c in range(h.shape[1]):
            g = s[c] * z[:, c]
            out[:, c] *= (g - 1) * self.strength + 1
        if self.training:
            mean, var = self.batch_statistics(h)
            self.running_mean = (1 - MOMENTUM) * self.running_mean + MOMENTUM * mean
            self.running_var = (1 - MOMENTUM) * self.running_var + MOMENTUM * var
            self.running_rms = (1 - MOMENTUM) * self.running_rms + MOMENTUM * np.sqrt((h**2).mean())
        if (self.training or self.clip_eval) and self.clip is not None and self.strength > 0:  # at 0: the identity
            out = np.minimum(out, self.clip)
        return out


# --- the noise of the fused kernels


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Philox4x32-7 of Salmon et al. 2011, in Python integers: four words of 32 bits."""
    c, k = list(counter), list(key)
    for _ in range(7):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ k[0], second & 0xFFFFFFFF, first >> 32 ^ c[3] ^ k[1], first & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def normal_pair(first: int, second: int) -> tuple[float, float]:
    """Two standard normals from two words: Box and Muller's, the angle taken by quarters of the circle."""
    radius = np.sqrt(-2 * np.log(((first >> 1) + 0.5) / 2**31))
    angle = (second % 2**30 / 2**30 - 0.5) * np.pi / 2
    pair = [np.cos(angle), np.sin(angle)]
    if second >> 30 & 1:
        pair.reverse()
    sign = -1 if second >> 31 else 1
    return sign * radius * pair[0], sign * radius * pair[1]


def drawn_noise(seed: int, shape: tuple[int, int, int, int]) -> np.ndarray:
    """ε `[B, C, H, W]` of a seed: counter j of a plane gives its values j, q + j, 2q + j and 3q + j, q = ⌈HW/4⌉."""
    batch, channels, height, width = shape
    quarter = -(-height * width // 4)
    noise = np.empty((batch * channels, 4 * quarter))
    for plane in range(batch * channels):
        for j in range(quarter):
            words = philox((j, plane, 0, 0), (seed % 2**32, seed >> 32))
            noise[plane, j::quarter] = *normal_pair(*words[:2]), *normal_pair(*words[2:])
    return noise[:, : height * width].reshape(shape)
