"""The fused site on the CPU (`site.cpp`), built on first use.

The library lands in `$XDG_CACHE_HOME/metaperturb` (default `~/.cache/metaperturb`) under a name made of the sources,
the compiler and the processor, so that it is built once a machine. `CXX` chooses the compiler.
"""

import ctypes
import functools
import hashlib
import math
import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from metaperturb.errors import Unavailable
from metaperturb.kernels import plain
from metaperturb.kernels.plain import MOMENTUM, NUM_SCALE_FEATURES, Settings

SOURCE = Path(__file__).with_name("site.cpp")
OWN_FOLDER = "set XDG_CACHE_HOME to a folder of your own"
SUFFIX = {torch.float32: "float", torch.float64: "double"}
NO_NOISE, DRAWN, GIVEN, EXPECTED = range(4)  # as in site.cpp

# Strength 0 leaves only the statistics of a training step to do.
TRACKING = Settings(training=True, noise=False, gate=False, strength=0.0, clip=None, channel_ratio=0, size_ratio=0)


class _Site(ctypes.Structure):
    """`Site` of site.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "channels", "height", "width", "draws")),
        *((name, ctypes.c_int32) for name in ("threads", "training", "noise", "gate", "relative", "relu")),
        *((name, ctypes.c_int32) for name in ("channels_last", "h_gradient", "phi_gradient")),
        *((name, ctypes.c_double) for name in ("strength", "clip", "channel_ratio", "size_ratio", "momentum")),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_void_p) for name in ("h", "shortcut", "given_noise", "phi", "running_mean", "running_var")),
        *((name, ctypes.c_void_p) for name in ("features", "statistics", "scale", "signs", "out")),
        *((name, ctypes.c_void_p) for name in ("grad_out", "grad_h", "grad_phi")),
    ]


def draw_noise(seed: Tensor, like: Tensor) -> Tensor:
    """The ε that the kernel draws from `seed` for a feature map: `[B, C, H, W]`."""
    batch, channels, height, width = like.shape
    noise = torch.empty(like.shape, dtype=like.dtype)
    draw = getattr(load(), f"draw_{SUFFIX[like.dtype]}")
    draw(seed.item(), batch * channels, height * width, torch.get_num_threads(), noise.data_ptr())
    return noise


def relative_noise(
    h: Tensor, phi: Tensor, noise: Tensor | None, seed: Tensor | None, strength: float, draws: int = 1
) -> Tensor:
    """`plain.relative_noise`, a factor `[draws · B, C, H, W]`."""
    settings = replace(TRACKING, training=False, noise=True, strength=strength)  # neither a scale nor statistics
    out = _like(h, draws)
    _run("forward", (h, phi, noise, seed, settings), draws, relative=True, out=out)
    return out


def track(h: Tensor, phi: Tensor, running_mean: Tensor, running_var: Tensor) -> None:
    """Only the statistics of a training step, which is what strength 0 leaves to do."""
    running = {"running_mean": running_mean, "running_var": running_var}
    _run("forward", (h, phi, None, None, TRACKING), **running, **_scratch(h, training=True))


def forward(
    h: Tensor,
    phi: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    settings: Settings,
    draws: int = 1,
    shortcut: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """One site; moves the running statistics in training. A shortcut, in memory like h, is added to it in evaluation.

    Returns:
        The perturbed map `[draws · B, C, H, W]`, and what `backward` needs beside its inputs: features `[B, C, 4]`
        (empty in evaluation), the statistics that made the scale `[2, C, 4]`, the scale
        `[C]`, and in training where the scale's kernels were above 0, a byte a value.
    """
    out, scratch = _like(h, draws), _scratch(h, settings.training)
    if settings.training and settings.gate:
        scratch["signs"] = torch.empty(load().signs_size(ctypes.byref(_Site(*h.shape))), dtype=torch.uint8)
    tensors = {"running_mean": running_mean, "running_var": running_var, "out": out, **scratch}
    if shortcut is not None:
        tensors["shortcut"] = shortcut
    _run("forward", (h, phi, noise, seed, settings), draws, **tensors)
    return out, *scratch.values()


def backward(
    grad_out: Tensor,
    h: Tensor,
    phi: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    scratch: tuple[Tensor, ...],
    settings: Settings,
    h_gradient: bool,
    phi_gradient: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of h `[B, C, H, W]` and of φ `[82]`, each None unless asked for.

    `scratch` is what `forward` returned after the perturbed map.
    """
    tensors = dict(zip(("features", "statistics", "scale", "signs"), scratch, strict=False))
    tensors |= {"grad_out": grad_out.contiguous(memory_format=_order_of(h)), "grad_h": _like(h)}
    tensors["grad_phi"] = torch.empty(phi.shape, dtype=torch.float64)
    wanted = {"h_gradient": h_gradient, "phi_gradient": phi_gradient}
    _run("backward", (h, phi, noise, seed, settings), **wanted, **tensors)
    return tensors["grad_h"] if h_gradient else None, tensors["grad_phi"].to(h.dtype) if phi_gradient else None


def noise_source(settings: Settings, noise: Tensor | None) -> int:
    if not settings.noise:
        return NO_NOISE
    return EXPECTED if settings.expected else DRAWN if noise is None else GIVEN


def _order_of(h: Tensor) -> torch.memory_format:
    """In which the kernel takes and gives maps like `h`."""
    last = not h.is_contiguous() and h.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _like(h: Tensor, draws: int = 1) -> Tensor:
    return torch.empty((draws * len(h), *h.shape[1:]), dtype=h.dtype, memory_format=_order_of(h))


def _scratch(h: Tensor, training: bool) -> dict[str, Tensor]:
    batch, channels = h.shape[:2]
    return {
        "features": h.new_empty(batch if training else 0, channels, NUM_SCALE_FEATURES),
        "statistics": h.new_empty(2, channels, NUM_SCALE_FEATURES),
        "scale": h.new_empty(channels),
    }


def _run(name: str, site: tuple, draws: int = 1, **values: Tensor | bool) -> None:
    """Call `name` of the library for h, φ, ε, its seed and settings; it fills the tensors among `values`."""
    h, phi, noise, seed, settings = site
    order = _order_of(h)
    values["h"], values["phi"] = h.contiguous(memory_format=order), phi
    if noise is not None:
        values["given_noise"] = noise.contiguous()
    made = _Site(
        *h.shape,
        draws=draws,
        threads=torch.get_num_threads(),
        training=settings.training,
        noise=noise_source(settings, noise),
        gate=settings.gate,
        relu=settings.relu,
        channels_last=order == torch.channels_last,
        strength=settings.strength,
        clip=math.inf if settings.clip is None else settings.clip,
        channel_ratio=settings.channel_ratio,
        size_ratio=settings.size_ratio,
        momentum=MOMENTUM,
        seed=0 if seed is None else seed.item(),
        **{key: value.data_ptr() if isinstance(value, Tensor) else value for key, value in values.items()},
    )
    getattr(load(), f"{name}_{SUFFIX[h.dtype]}")(ctypes.byref(made))


# --- building

# No -ffast-math: a NaN has to stay one, and sums keep their order.
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
CONSTANTS = tuple(
    f"-D{name}={{{', '.join(map(repr, getattr(plain, name)))}}}"
    for name in ("EXPECTATION_P", "EXPECTATION_Q", "MU_RANGE")
)
# Tried in turn: processors other than x86 have no such width, Apple's compiler lacks OpenMP.
NATIVE = (("-march=native", "-mprefer-vector-width=512", "-fopenmp"), ("-march=native", "-fopenmp"))
VARIANTS = (("-fopenmp",), ("-fopenmp-simd",), ())


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled sources, built if this machine has not built it yet.

    Raises:
        Unavailable: no compiler, or it fails.
    """
    compiler = _compiler()
    # They name the compiler's version and the instructions of this processor: others may share the folder.
    macros = subprocess.run([*compiler, "-march=native", "-dM", "-E", "-xc++", os.devnull], capture_output=True).stdout
    variants = NATIVE + VARIANTS if macros else VARIANTS
    key = hashlib.sha256(SOURCE.read_bytes() + macros)
    key.update(repr((compiler, os.uname().machine, FLAGS, CONSTANTS, variants)).encode())
    path = cache_folder() / f"kernels-{key.hexdigest()[:16]}.so"
    try:
        if not path.exists():
            _build(compiler, variants, path)
        foreign = [place for place in (path.parent, path) if place.stat().st_uid not in (0, os.getuid())]
    except OSError as error:
        raise Unavailable(f"{path.parent} cannot be used ({error.strerror}); {OWN_FOLDER}") from None
    if foreign:  # a library of somebody else is not loaded: it could do anything
        raise Unavailable(f"{foreign[0]} belongs to another user; {OWN_FOLDER}")
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path} cannot be loaded ({error}); delete it to have it built again") from None
    loaded.site_size.restype = loaded.signs_size.restype = ctypes.c_int64
    if loaded.site_size() != ctypes.sizeof(_Site):
        raise Unavailable(f"{path} does not fit this interpreter")
    int32, int64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
    loaded.draw_float.argtypes = loaded.draw_double.argtypes = [ctypes.c_uint64, int64, int64, int32, pointer]
    return loaded


def cache_folder() -> Path:
    """Where a user's compiled kernels are kept.

    Raises:
        Unavailable: a user without a home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metaperturb"
    except RuntimeError:
        raise Unavailable("no home folder to keep the compiled kernels in (set XDG_CACHE_HOME)") from None


def _build(compiler: tuple[str, ...], variants: tuple[tuple[str, ...], ...], path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        built = Path(folder) / "kernels.so"
        for variant in variants:
            command = [*compiler, *FLAGS, *CONSTANTS, *variant, str(SOURCE), "-o", str(built)]
            result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            if result.returncode == 0:
                os.replace(built, path)
                return
    lines = result.stderr.strip().splitlines() or ["no message"]
    error = next((line for line in lines if "error" in line), lines[-1])
    raise Unavailable(f"{compiler[0]} cannot compile the kernels ({error.strip()})")


def _compiler() -> tuple[str, ...]:
    chosen = tuple(shlex.split(os.environ.get("CXX", "")))
    for command in [chosen] if chosen else [("c++",), ("g++",), ("clang++",)]:
        if shutil.which(command[0]):
            return command
    if chosen:
        raise Unavailable(f"CXX names no compiler ({os.environ['CXX']!r})")
    raise Unavailable("no C++ compiler found (install g++ or clang++, or set CXX)")
