"""The embedded data set: small drawn photographs, made on the spot from a seed, for the demo and the tests.

Two families that share the world they are photographed in and nothing else, as Tiny ImageNet and the paper's
fine-grained target sets do:

- *source*: 8 shapes × 5 fills = 40 classes ("striped star"), 120 images each, to meta-train φ on;
- *target*: bugs, 2 bodies × 2 markings × 4 kinds of limbs = 16 classes that differ in their parts only, 25 training
  images each. A small CNN learns these by heart while it takes many a six-legged bug for a four-legged one: the regime
  where a regularizer matters.

Place, size, rotation, foreshortening and colors are random, the background is cluttered, something lies in front,
light, blur and sensor noise vary. None of it depends on the class. (Figures are lighter than the ground: with contrast
of either sign, a small CNN stayed near chance.) Every class is closed under mirroring left to right.

Images depend on their size alone. All arithmetic is in float64 and rounded to 8 bits at the end, so that a last
digit that differs between processors or numpy versions hardly ever reaches a pixel.
"""

import functools
from collections.abc import Callable

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence

from metaperturb.errors import UserError

Images = tuple[np.ndarray, np.ndarray, tuple[str, ...]]  # uint8 [N, 3, S, S], int64 [N], class names
Drawing = tuple[np.ndarray, np.ndarray]  # distance to the outline (< 0 inside) and blend of two colors, [n, D, D]
Draw = Callable[[Generator, np.ndarray, np.ndarray], Drawing]  # of the figure's own coordinates u, v [n, D, D]

_SUPERSAMPLING = 2  # figures are drawn on a grid finer by this factor, then averaged


@functools.cache  # a grid's trainings in one process draw them once
def embedded(part: str, image_size: int = 32) -> Images:
    """The images of `"source"`, or of the `"train"` or `"test"` split of the target: 120, 25 and 63 a class, in order.

    Example:
        >>> images, labels, classes = embedded("source")
        >>> images.shape, classes[labels[0]]
        ((4800, 3, 32, 32), 'plain disk')
    """
    if image_size < 8:
        raise UserError(f"embedded data: image_size is {image_size}; the figures need at least 8 pixels")
    parts = {"source": (_SOURCE_CLASSES, 120), "train": (_TARGET_CLASSES, 25), "test": (_TARGET_CLASSES, 63)}
    classes, per_class = parts[part]
    images = np.empty((len(classes) * per_class, 3, image_size, image_size), np.uint8)
    for i, draw in enumerate(classes.values()):  # each from a random stream of its own
        rng = Generator(PCG64(SeedSequence([0, list(parts).index(part), i])))
        images[i * per_class : (i + 1) * per_class] = _photograph(rng, draw, per_class, image_size)
    return images, np.repeat(np.arange(len(classes)), per_class), tuple(classes)


# --- The source family: shapes × fills. Every shape fills the unit disk and is mirror-symmetric in v. -------------


def _polygon(corners: int, tip: float = 1.0) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A star: straight edges from each corner, at radius 1, to `tip` × cos(π / corners) half-way to the next.

    With `tip` = 1 the half-way points lie on the line between two corners: a regular polygon.
    """
    half = np.pi / corners
    bx, by = tip * np.cos(half) * np.cos(half), tip * np.cos(half) * np.sin(half)
    length = np.hypot(bx - 1, by)

    def distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        radius, angle = np.hypot(u, v), np.arctan2(v, u)
        angle = np.abs((angle + half) % (2 * half) - half)  # folded into one half-sector
        x, y = radius * np.cos(angle), radius * np.sin(angle)
        return ((x - 1) * by - y * (bx - 1)) / length

    return distance


def _box(u: np.ndarray, v: np.ndarray, half_length: float, half_width: float) -> np.ndarray:
    return np.maximum(np.abs(u) - half_length, np.abs(v) - half_width)


_SHAPES = {
    "disk": lambda u, v: np.hypot(u, v) - 0.85,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.7) - 0.25,
    "triangle": _polygon(3),
    "square": _polygon(4),
    "star": _polygon(5, tip=0.55),
    "cross": lambda u, v: np.minimum(_box(u, v, 0.95, 0.3), _box(u, v, 0.3, 0.95)),
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.95, 0.7 - np.hypot(u - 0.55, v)),
    "lens": lambda u, v: np.hypot(u, np.abs(v) + 0.75) - 1.2,
}


def _waves(rng: Generator, x: np.ndarray) -> np.ndarray:
    """Alternating bands along x, of random width and phase; in [0, 1] with edges of about a pixel."""
    return np.clip(0.5 + 1.5 * np.sin(x * _uniform(rng, x, 7, 11) + _uniform(rng, x, 0, 2 * np.pi)), 0, 1)


def _checked(rng: Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    a, b = _waves(rng, u), _waves(rng, v)
    return a + b - 2 * a * b


_FILLS = {
    "plain": lambda rng, u, v: np.clip(0.5 + 0.5 * u * _uniform(rng, u, -1, 1), 0, 1),  # a soft gradient
    "striped": lambda rng, u, v: _waves(rng, u),
    "checked": _checked,
    "dotted": lambda rng, u, v: _waves(rng, u) * _waves(rng, v),
    "ringed": lambda rng, u, v: _waves(rng, np.hypot(u, v)),
}


def _shape(outline: Callable, fill: Callable) -> Draw:
    def draw(rng: Generator, u: np.ndarray, v: np.ndarray) -> Drawing:
        turn = _uniform(rng, u, 0, 2 * np.pi)  # the fill lies in the shape at any angle
        cos, sin = np.cos(turn), np.sin(turn)
        return outline(u, v), fill(rng, cos * u - sin * v, sin * u + cos * v)

    return draw


_SOURCE_CLASSES = {f"{f} {s}": _shape(_SHAPES[s], _FILLS[f]) for s in _SHAPES for f in _FILLS}


# --- The target family: bugs, seen from above, head towards +u, mirror-symmetric in v. -----------------------------


def _bug(body: str, limbs: str, marking: str) -> Draw:
    def draw(rng: Generator, u: np.ndarray, v: np.ndarray) -> Drawing:
        side = np.abs(v)
        length = _uniform(rng, u, 0.60, 0.70)
        width = length * (_uniform(rng, u, 0.30, 0.42) if body == "slender" else _uniform(rng, u, 0.58, 0.72))
        distance = (np.hypot(u / length, v / width) - 1) * width
        if marking == "banded":
            phase = _uniform(rng, u, 0, 2 * np.pi)
            blend = np.clip(0.5 + 2 * np.sin(u * _uniform(rng, u, 9, 11) + phase), 0, 1)
        else:  # a line from head to tail
            blend = np.clip(0.5 + 12 * (width * _uniform(rng, u, 0.35, 0.5) - side), 0, 1)
        head = _uniform(rng, u, 0.16, 0.24)
        parts = [np.hypot(u - length - 0.4 * head, v) - head]
        reach, sweep = _uniform(rng, u, 0.8, 1.0), _uniform(rng, u, -0.25, 0.25)
        if limbs == "winged":
            chord = _uniform(rng, u, 0.18, 0.26)
            across, along = side - 0.55 * reach, u - 0.15 - sweep * side
            parts.append((np.hypot(along / chord, across / (0.5 * reach)) - 1) * chord)
        else:
            pairs = {"four-legged": 2, "six-legged": 3, "eight-legged": 4}[limbs]
            thick = _uniform(rng, u, 0.04, 0.065)
            for hip in np.linspace(-0.6, 0.6, pairs):
                hip_u = length * (hip + _uniform(rng, u, -0.07, 0.07))
                foot_u = hip_u + sweep + 0.35 * hip + _uniform(rng, u, -0.06, 0.06)
                slant = foot_u - hip_u  # the distance from the line between hip and foot
                t = np.clip(((u - hip_u) * slant + side * reach) / (slant * slant + reach * reach), 0, 1)
                parts.append(np.hypot(u - hip_u - t * slant, side - t * reach) - thick)
        limb = np.minimum.reduce(parts)
        tint = _uniform(rng, u, 0, 0.4)  # one for head and limbs
        return np.minimum(distance, limb), np.where(distance < 0, blend, tint)

    return draw


_TARGET_CLASSES = {
    f"{body} {marking} {limbs} bug": _bug(body, limbs, marking)
    for body in ("slender", "stout")
    for marking in ("banded", "lined")
    for limbs in ("four-legged", "six-legged", "eight-legged", "winged")
}


# --- The photograph: everything that does not depend on the class. -------------------------------------------------


def _photograph(rng: Generator, draw: Draw, n: int, size: int) -> np.ndarray:
    """n images uint8 `[n, 3, size, size]` of what `draw` draws, each with its own pose, scene and camera."""
    cover, blend = _figure(rng, draw, n, size)
    ground, ground_2 = _color(rng, n, 0.1, 0.5), _color(rng, n, 0.1, 0.5)
    paint, paint_2 = _color(rng, n, 0.6, 0.95), _color(rng, n, 0.05, 0.4)
    image = _mix(ground, ground_2, _texture(rng, n, size))
    image = _mix(image, _color(rng, n, 0.1, 0.6), _patch(rng, n, size))  # a thing behind the figure
    image = _mix(image, _mix(paint, paint_2, blend), cover)
    image = _mix(image, _color(rng, n, 0.1, 0.9), _patch(rng, n, size, largest=0.2))  # a thing in front of it
    light = 0.9 + _uniform(rng, cover, -0.2, 0.2) + 0.4 * (_texture(rng, n, size, slope=2.0) - 0.5)
    image = image * light[:, None]
    image = _blur(image, rng.uniform(0, 0.2, (n, 1, 1, 1)))
    image = image + rng.uniform(0.01, 0.04, (n, 1, 1, 1)) * rng.standard_normal(image.shape)
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)


def _figure(rng: Generator, draw: Draw, n: int, size: int) -> Drawing:
    """Coverage and color blend of the figure in a random pose, both in [0, 1], `[n, size, size]`."""
    fine = size * _SUPERSAMPLING
    x, y = _grid(n, fine)
    x, y = x - _uniform(rng, x, -0.2, 0.2), y - _uniform(rng, x, -0.2, 0.2)
    x, y = x / _uniform(rng, x, 0.8, 1), y / _uniform(rng, x, 0.8, 1)  # foreshortening
    turn, scale = np.pi / 2 + _uniform(rng, x, -0.8, 0.8), _uniform(rng, x, 0.7, 0.95)
    u, v = (np.cos(turn) * x - np.sin(turn) * y) / scale, (np.sin(turn) * x + np.cos(turn) * y) / scale
    distance, blend = draw(rng, u, v)
    cover = np.clip(0.5 - distance * scale * (fine / 2), 0, 1)  # the grid's step is 2 / fine
    blend = _shrink(cover * blend) / np.maximum(_shrink(cover), 1e-6)
    return _shrink(cover), blend


def _shrink(a: np.ndarray) -> np.ndarray:
    k = _SUPERSAMPLING
    return a.reshape(len(a), a.shape[1] // k, k, a.shape[2] // k, k).mean((2, 4))


def _grid(n: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of every pixel's middle in [-1, 1], `[n, side, side]`."""
    line = (2 * np.arange(side) + 1) / side - 1
    return np.broadcast_to(line, (n, side, side)), np.broadcast_to(line[:, None], (n, side, side))


def _uniform(rng: Generator, like: np.ndarray, low: float, high: float) -> np.ndarray:
    """One number per image, `[n, 1, 1]`."""
    return rng.uniform(low, high, (len(like), 1, 1))


def _color(rng: Generator, n: int, darkest: float, lightest: float) -> np.ndarray:
    """A color of random lightness in the given range and random hue, `[n, 3, 1, 1]`."""
    hue = rng.uniform(-0.3, 0.3, (n, 3, 1, 1))
    return np.clip(rng.uniform(darkest, lightest, (n, 1, 1, 1)) + hue - hue.mean(1, keepdims=True), 0, 1)


def _mix(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """From a to b as `weight` [n, S, S] goes from 0 to 1; a and b are `[n, 3, S or 1, S or 1]`."""
    return a + (b - a) * weight[:, None]


def _texture(rng: Generator, n: int, size: int, slope: float | None = None) -> np.ndarray:
    """Noise with spectrum 1/f^slope, as natural images have (slope about 1), in [0, 1], `[n, size, size]`."""
    slopes = rng.uniform(0.8, 2.0, (n, 1, 1)) if slope is None else slope
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    f[0, 0] = np.inf  # no constant part
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((n, size, size))) * f**-slopes, s=(size, size))
    return np.clip(0.5 + 0.3 * noise / noise.std((1, 2), keepdims=True), 0, 1)


def _patch(rng: Generator, n: int, size: int, largest: float = 0.6) -> np.ndarray:
    """Coverage of a bar, box or ellipse somewhere in the picture, `[n, size, size]`."""
    x, y = _grid(n, size)
    x, y = x - _uniform(rng, x, -1, 1), y - _uniform(rng, x, -1, 1)
    turn, round_ = _uniform(rng, x, 0, np.pi), _uniform(rng, x, 0, 1) < 0.5
    x, y = np.abs(np.cos(turn) * x - np.sin(turn) * y), np.abs(np.sin(turn) * x + np.cos(turn) * y)
    a, b = _uniform(rng, x, 0.1, 2 * largest), _uniform(rng, x, 0.05, largest)
    distance = np.where(round_, (np.hypot(x / a, y / b) - 1) * np.minimum(a, b), np.maximum(x - a, y - b))
    return np.clip(0.5 - distance * size / 2, 0, 1)


def _blur(image: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Binomial blur: every pixel gives `amount` (0 to 0.25) to each neighbour, along both axes."""
    image = np.pad(image, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    image = (1 - 2 * amount) * image[:, :, 1:-1] + amount * (image[:, :, :-2] + image[:, :, 2:])
    return (1 - 2 * amount) * image[..., 1:-1] + amount * (image[..., :-2] + image[..., 2:])
