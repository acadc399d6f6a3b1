"""Compiled kernels are tried before they are used: nobody tested the compiler, the driver or the device they meet.

On a CPU they are compared with the plain operators. On a GPU a kernel that fails can crash or hang the process, so the
trial runs in a process of its own, and its verdict is kept: once a kind of device, driver and version of PyTorch,
Triton and this package.
"""

import contextlib
import hashlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from metaperturb.cli import PARENT, end_with
from metaperturb.errors import UserError
from metaperturb.kernels import fused, plain
from metaperturb.kernels.backend import Unavailable, cache_folder
from metaperturb.storage import hold, load_json, reason, save_json

PASSED = "passed"
SILENCE = 300.0  # seconds without progress, which is a kernel compiled and run: then it hangs
FROM_OUTSIDE = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)  # signals that say nothing about kernels
SHAPE = (4, 5, 6, 7)  # of what is compared: small, and no side a power of two
SAYS = "trial: "  # before what the child tells
DEVICE_WORKS = "the device works"


# --- the comparison


def check_agreement(backend: ModuleType, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    """Compare a small site's output and gradients with those of the plain operators in float64, once for each dtype.

    In float32 the plain operators would err more: on a GPU convolutions may round what they multiply to TF32.

    Raises:
        Unavailable: they differ.
    """
    for dtype in dtypes:
        error = error_of(backend, device, dtype)
        if not error < tolerated(dtype):  # a NaN is no agreement either
            found = f"{str(dtype).removeprefix('torch.')}, relative error {error:.1e}"
            raise Unavailable(f"{backend.NAME} disagrees with them on this machine ({found})")


def tolerated(dtype: torch.dtype) -> float:
    """A relative error that rounding explains."""
    return 1e-4 if dtype == torch.float32 else torch.finfo(dtype).eps


def error_of(backend: ModuleType, device: torch.device, dtype: torch.dtype, shape: Sequence[int] = SHAPE) -> float:
    """The largest relative error for a feature map of this shape; half-precision ones have their channels last."""
    half = dtype in plain.HALF_PRECISION
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):

        def wave(*shape: int) -> Tensor:
            values = torch.arange(torch.Size(shape).numel(), dtype=torch.float32, device=device).mul(0.7).sin()
            return values.view(shape)

        h, phi, grad_out = wave(*shape).to(dtype), wave(82).requires_grad_(), wave(*shape).flip(0).to(dtype)
        h = (h.to(memory_format=torch.channels_last) if half else h).requires_grad_()
        running = wave(shape[1], 4), wave(shape[1], 4)
        settings = plain.Settings(True, True, True, 0.7, 1.5, 0.5, 0.5)
        seed = torch.full((), 0x123456789ABCDEF, dtype=torch.int64, device=device)
        actual = fused.apply(backend, h, phi, None, seed, *running, settings)
        exact_h, exact_phi = h.double(), plain.Phi.of(phi.double())
        noise = backend.draw_noise(seed, h.to(phi.dtype)).double()
        expected = plain.perturb(exact_h, exact_phi, *plain.batch_statistics(exact_h, exact_phi), noise, settings)
        grads = (torch.autograd.grad(out, [h, phi], grad_out.to(out.dtype)) for out in (actual, expected))
        pairs = [(actual, expected), *zip(*grads, strict=True)]
        return max(((a - e).norm() / e.norm()).item() for a, e in pairs)


def _check_relative(backend: ModuleType, device: torch.device) -> None:
    """What else a GPU's kernels compute: factors of mean one."""
    h, phi, noise = (torch.arange(n, device=device).mul(0.7).sin() for n in (840, 82, 840))
    h, noise = h.view(4, 5, 6, 7), noise.view(4, 5, 6, 7).flip(0)
    factor = fused.relative_noise(backend, h, phi, noise, 0.7)
    exact = plain.relative_noise(h.double(), plain.Phi.of(phi.double()), noise.double(), 0.7)
    if not (factor - exact).abs().max() < 1e-4 * exact.abs().max():
        raise Unavailable(f"{backend.NAME} disagrees with them on this machine (noise of mean one)")


# --- in a process of its own


def check(module: str, device: torch.device) -> None:
    """Let the kernels of `module` vouch for themselves on `device`, or recall how that went.

    Raises:
        Unavailable: they crash, hang, fail or disagree; the message says how to have them tried again.
    """
    about = _circumstances(module, device)
    name = f"trial-{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}.json"
    with contextlib.ExitStack() as stack:
        verdict = path = None
        with contextlib.suppress(UserError, OSError, LookupError):  # without a folder they are tried each time
            cache_folder().mkdir(mode=0o700, parents=True, exist_ok=True)
            # Others that want the same verdict wait for it.
            stack.enter_context(hold(cache_folder() / f".{name}.lock", wait=True))
            path = cache_folder() / name
            verdict = load_json(path)["verdict"] if path.exists() else None
        if verdict is None:
            print(f"trying the GPU kernels on {about['device']}, once: a minute or so", file=sys.stderr)
            verdict, output, lasting = try_out(module, device)
            if path and lasting:
                with contextlib.suppress(UserError):
                    save_json({**about, "verdict": verdict, "output": output}, path)
    if verdict != PASSED:
        kept = path is not None and path.exists()
        again = f"delete {path} to have them tried again" if kept else "the next start tries them again"
        raise Unavailable(f"on {about['device']} {verdict}; {again}")


def _circumstances(module: str, device: torch.device) -> dict[str, Any]:
    """What a verdict depends on."""
    code = hashlib.sha256(b"".join(source.read_bytes() for source in sorted(Path(__file__).parent.glob("*.py"))))
    triton = getattr(sys.modules.get("triton"), "__version__", "none")
    about = {"kernels": module, "torch": str(torch.__version__), "triton": triton, "code": code.hexdigest()[:16]}
    if device.type != "cuda":
        return {**about, "device": device.type}
    gpu, driver = torch.cuda.get_device_properties(device), Path("/proc/driver/nvidia/version")
    version = driver.read_text().splitlines()[0] if driver.exists() else "unknown"
    return {**about, "device": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "driver": version}


def try_out(module: str, device: torch.device) -> tuple[str, str, bool]:
    """Runs the child: its verdict, its output, and whether the verdict says something about the kernels."""
    places = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), PARENT: str(os.getpid())}
    command = [sys.executable, "-P", "-c", f"from {__name__} import main; main()", module, str(device)]
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        options = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": subprocess.STDOUT}
        child = subprocess.Popen(command, env=environment, start_new_session=True, **options)
        try:
            length, since, hangs = 0, time.monotonic(), False
            runs = os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT  # its number stays its own
            while os.waitid(*runs) is None and not hangs:
                time.sleep(0.1)
                if length != (length := os.fstat(said.fileno()).st_size):
                    since = time.monotonic()
                hangs = time.monotonic() - since > SILENCE
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # compilers that it started, too
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)  # one that a driver holds cannot be ended
        said.seek(0)
        lines = [line.strip() for line in said if line.strip()]
    told = ["", *(line.removeprefix(SAYS) for line in lines if line.startswith(SAYS))]
    output = [line for line in lines if not line.startswith(SAYS)]
    code, text = child.returncode or 0, "\n".join(output)[-2000:]
    if DEVICE_WORKS not in told:
        why = (output or ["it hangs" if hangs else f"exit code {code}"])[-1]
        return f"they could not be tried ({why})", text, False
    last = f" ({told[-1]})" if told[-1] != DEVICE_WORKS else ""
    if hangs:
        return f"they hang: no progress in {SILENCE:.0f} s{last}", text, True
    if code < 0 and told[-1] != PASSED:
        return f"they crash: {signal.Signals(-code).name}{last}", text, -code not in FROM_OUTSIDE
    return told[-1], text, True


def main() -> None:
    """The child: tells what it is about to do, then the verdict."""
    module, device = sys.argv[1], torch.device(sys.argv[2])
    end_with(int(os.environ.pop(PARENT)))

    def say(text: str) -> None:
        print(f"\n{SAYS}{text}", flush=True)

    torch.ones(8, device=device).sum().item()
    say(DEVICE_WORKS)
    try:
        backend = importlib.import_module(module)
        if launch := getattr(backend, "_launch", None):

            def telling(kernel: Any, *args: Any, **options: Any) -> None:
                """Names each kernel before it is compiled and launched, and waits until it is through."""
                say(kernel.fn.__name__)
                launch(kernel, *args, **options)
                torch.cuda.synchronize(device)

            backend._launch = telling
        check_agreement(backend, device, (torch.float32, torch.bfloat16))
        if backend.NAME == "triton":
            _check_relative(backend, device)
    except Exception as error:  # whatever a compiler, a linker or a driver has to say
        say(str(error) if isinstance(error, Unavailable) else f"they fail: {reason(error)}")
    else:
        say(PASSED)
