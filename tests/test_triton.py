"""The Triton kernels where there is no GPU (interpreted, and compiled for one), and what only a GPU can show.

test_fused.py compares them with the plain operators.
"""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from test_fused import DEVICES, GPU, by_kernels, by_plain_operators, make_phi, maps, settings, statistics

from metaperturb import MetaPerturb, PerturbSite, kernels

triton = pytest.importorskip("triton")
from metaperturb.kernels import triton_site  # noqa: E402 (needs Triton)

DEVICE = torch.device(DEVICES["triton"])
PROGRAMS = Path(triton.__file__).parent / "backends/nvidia/bin"

on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
compiled = pytest.mark.skipif(
    not all((PROGRAMS / name).exists() for name in ("ptxas", "cuobjdump")), reason="needs Triton's compiler"
)


# --- without a GPU


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="test_fused.py runs them")
def test_in_the_interpreter():
    tests = str(Path(__file__).with_name("test_fused.py"))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", tests, "-k", "triton"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= 25


def test_without_triton_it_says_so():
    code = """
        import sys, torch
        sys.modules["triton"] = None
        from metaperturb.kernels import Unavailable
        try:
            from metaperturb.kernels import triton_site
        except Unavailable as unavailable:
            print(unavailable)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert "Triton cannot be imported" in result.stdout and len(result.stdout.splitlines()) == 1, result.stderr


NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int64: "i64"}


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_compiles_for_a_hopper_gpu_and_keeps_its_values_in_registers(dtype, monkeypatch, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launches = {}

    def record(kernel, programs, *args, warps=triton_site.WARPS, **constants):
        signature, constexprs, alignment = {}, {}, {}
        for i, (parameter, value) in enumerate(zip(kernel.params, [*args, *constants.values()], strict=True)):
            assert parameter.name in constants or i < len(args)
            if parameter.is_constexpr or value is None:
                signature[parameter.name] = "constexpr"
                constexprs[parameter.name] = constants.get(parameter.name, value)
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + NAMES[value.dtype]
                alignment[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = parameter.annotation_type or "i32"
        source = ASTSource(kernel, signature, constexprs, alignment)
        launches[kernel.fn.__name__, str(signature)] = (source, {"num_warps": warps, "enable_fp_fusion": True})

    monkeypatch.setattr(triton_site, "_launch", record)
    phi, running, seed = make_phi(torch.float32).to(DEVICE), statistics(16), torch.tensor(1, device=DEVICE)
    running = [s.to(DEVICE, torch.float32) for s in running]
    h = torch.zeros(2, 16, 32, 32, device=DEVICE, dtype=dtype)
    _, *scratch = triton_site.forward(h, phi, None, seed, *running, settings())
    for wanted in ((True, False), (True, True), (False, True)):
        triton_site.backward(h, h, phi, None, seed, tuple(scratch), settings(), *wanted)
    assert len(launches) == 12 and len({name for name, _ in launches}) == 8
    for (name, _), (source, options) in launches.items():
        path = tmp_path / "kernel.cubin"
        path.write_bytes(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"])
        command = [PROGRAMS / "cuobjdump", "-res-usage", path]
        report = subprocess.run(command, capture_output=True, text=True, check=True)
        stack = re.search(r"STACK:(\d+)", report.stdout + report.stderr)
        assert int(stack[1]) <= 32, name  # bytes a thread; a compiler may have its reasons for a few


# --- on a GPU


@on_gpu
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("shape", [(128, 16, 32, 32), (128, 64, 8, 8), (32, 32, 84, 84), (8, 512, 4, 4)])
def test_equals_the_plain_operators_at_the_size_of_networks(shape, channels_last):
    # Positive gradients: sums over millions of values that do not cancel.
    h, noise, grad_out = maps(*shape).relu(), maps(*shape, seed=2), maps(*shape, seed=3).abs()
    h = h.to(memory_format=torch.channels_last) if channels_last else h
    actual = by_kernels(triton_site, h, noise, grad_out, settings())
    for a, e in zip(actual, by_plain_operators(h, noise, grad_out, settings(), device=DEVICE), strict=True):
        wrong = (a - e).abs() > 2e-5 * e.abs().max()
        # Among millions of values some are so near to the kink of a relu that rounding decides for a neighbourhood.
        assert wrong.double().mean() < 1e-3
    again = by_kernels(triton_site, h, noise, grad_out, settings())
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@on_gpu
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

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    replays = []
    before = site.running_mean.clone()
    for seed in (1, 2, 1):
        site.running_mean.copy_(before)
        torch.cuda.manual_seed(seed)
        graph.replay()
        replays.append([t.clone() for t in (*results, site.running_mean)])
    assert all(torch.equal(a, b) for a, b in zip(replays[0], replays[2], strict=True))
    assert not torch.equal(replays[0][0], replays[1][0])  # other noise
    site.running_mean.copy_(before)
    torch.cuda.manual_seed(1)
    eager = (*step(), site.running_mean)
    assert all(torch.equal(a, b) for a, b in zip(replays[0], eager, strict=True))
