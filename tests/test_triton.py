"""The Triton kernels where there is no GPU (interpreted, and compiled for one), and what only a GPU can show.

test_fused.py compares them with the plain operators.
"""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_fused import DEVICES, GPU, make_phi, settings, statistics

from metaperturb import MetaPerturb, PerturbSite, kernels

triton = pytest.importorskip("triton")
from metaperturb.kernels import triton_site  # noqa: E402 (needs Triton)

DEVICE = torch.device(DEVICES["triton"])
PROGRAMS = Path(triton.__file__).parent / "backends/nvidia/bin"

COMPILES = all((PROGRAMS / name).exists() for name in ("ptxas", "cuobjdump"))


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="they run on it")
def test_in_the_interpreter():
    tests = str(Path(__file__).with_name("test_fused.py"))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", tests, "-k", "triton"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= 25


def test_without_triton_it_says_so(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("metaperturb.kernels.triton_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(kernels.Unavailable, match="Triton cannot be imported"):
        importlib.import_module("metaperturb.kernels.triton_site")


@pytest.mark.slow
@pytest.mark.skipif(not COMPILES, reason="needs Triton's compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_compiles_for_a_hopper_gpu_and_keeps_its_values_in_registers(dtype, monkeypatch, tmp_path):
    from triton.backends.compiler import GPUTarget

    hopper = SimpleNamespace(get_current_device=lambda: 99, get_current_target=lambda: GPUTarget("cuda", 90, 32))
    hopper.get_current_stream = lambda device: 0
    monkeypatch.setattr(triton.runtime.driver, "_active", hopper)
    built = {}

    def build(kernel, programs, *args, warps=triton_site.WARPS, **constants):
        options = {"num_warps": warps, "enable_fp_fusion": True}
        found = kernel.warmup(*args, **constants, grid=(programs,), **options)
        built[kernel.fn.__name__, found.hash] = found.asm["cubin"]

    monkeypatch.setattr(triton_site, "_launch", build)
    phi, running, seed = make_phi(torch.float32).to(DEVICE), statistics(16), torch.tensor(1, device=DEVICE)
    running = [s.to(DEVICE, torch.float32) for s in running]
    h = torch.zeros(2, 16, 32, 32, device=DEVICE, dtype=dtype)
    _, *scratch = triton_site.forward(h, phi, None, seed, *running, settings())
    for wanted in ((True, False), (True, True), (False, True)):
        triton_site.backward(h, h, phi, None, seed, tuple(scratch), settings(), *wanted)
    assert len(built) == 12 and len({name for name, _ in built}) == 8
    for (name, _), cubin in built.items():
        (path := tmp_path / "kernel.cubin").write_bytes(cubin)
        command = [PROGRAMS / "cuobjdump", "-res-usage", path]
        report = subprocess.run(command, capture_output=True, text=True, check=True)
        stack = re.search(r"STACK:(\d+)", report.stdout + report.stderr)
        assert int(stack[1]) <= 32, name  # bytes a thread; a compiler may have its reasons for a few


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_step_waits_for_nothing_and_can_be_captured_in_a_graph():
    phi = MetaPerturb().cuda()
    site = PerturbSite(phi, 16).cuda()
    h = torch.randn(8, 16, 32, 32, device=DEVICE, requires_grad=True)
    parameters = [h, *phi.parameters()]
    assert kernels.kernel_name(DEVICE) == "triton"

    def step():
        out = site(h)
        return out, *torch.autograd.grad(out, parameters, h)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)

    graph, found, before = torch.cuda.CUDAGraph(), [], site.running_mean.clone()
    with torch.cuda.graph(graph):
        results = step()
    for seed, run in ((1, graph.replay), (2, graph.replay), (1, step)):
        site.running_mean.copy_(before)
        torch.cuda.manual_seed(seed)
        found.append([t.clone() for t in (*(run() or results), site.running_mean)])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))
    assert not torch.equal(found[0][0], found[1][0])  # other noise
