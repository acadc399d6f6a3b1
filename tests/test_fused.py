"""Each fused kernel against the plain operators: C++ on the CPU; Triton on a GPU, or in its interpreter on the CPU.

The interpreter has to be chosen before Triton is imported: without a GPU, test_triton.py runs this file in a process of
its own. In test_perturbation.py each test runs with both ways to compute a site, against a second implementation.
"""

import os
import shutil

import numpy as np
import pytest
import torch
from oracle import drawn_noise

from metaperturb import kernels
from metaperturb.kernels import cpp, fused, plain
from metaperturb.kernels.backend import draw_seed
from metaperturb.kernels.plain import Phi, Settings

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICES = {"cpp": "cpu", "triton": "cuda" if GPU else "cpu"}
NAMES = [
    *["cpp"] * any(map(shutil.which, ("c++", "g++", "clang++"))),
    *["triton"] * (GPU or INTERPRETED),
]
SMALLEST = {"cpp": 1e-6, "triton": 1e-2}  # what errors are relative to, at least

SHAPES = [(2, 3, 5, 6), (2, 1, 1, 1), (5, 3, 1, 3), (4, 3, 8, 8), (3, 2, 17, 13), (2, 7, 2, 1), (5, 33, 6, 6)]
# Small planes, which the C++ kernel takes several at a time; the last of them are fewer.
SHAPES += [(3, 300, 2, 2), (2, 37, 4, 4), (2, 401, 1, 1), (3, 11, 7, 7)]


@pytest.fixture(params=NAMES)
def backend(request, monkeypatch):
    """A backend; Triton's with several programs along each axis, and ragged edges, in small maps."""
    if request.param == "cpp":
        return cpp
    pytest.importorskip("triton")
    from metaperturb.kernels import triton_site

    sizes = {"TILE": 32, "PIXELS": 16, "QUARTER_PIXELS": 4, "VALUES": 32, "SCALE_CHANNELS": 2, "SCALE_ROWS": 2}
    for name, size in {**sizes, "SUM_BLOCK": 32, "WARPS": 1, "QUARTER_WARPS": 1}.items():
        monkeypatch.setattr(triton_site, name, size)
    return triton_site


def shapes(cpp, triton):
    """Fewer for Triton, whose interpreter takes its time."""
    pairs = [(name, shape) for name in NAMES for shape in {"cpp": cpp, "triton": triton}[name]]
    return pytest.mark.parametrize(("backend", "shape"), pairs, indirect=["backend"])


def make_phi(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in plain.PHI_SHAPES]
    return torch.cat([0.3 * values.flatten() for values in shapes]).to(dtype)


def maps(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(channels):
    return torch.linspace(0.2, 2, 8 * channels, dtype=torch.float64).view(2, channels, 4).unbind()


def settings(training=True, noise=True, gate=True, strength=0.6, clip=0.75, expected=False, relu=False):
    return Settings(training, noise, gate, strength, clip, 0.5, 0.3, expected, relu)


def tensors(out, h, phi, grad_out, running, phi_gradient):
    """All that a site yields, in float64: output, gradients of h and φ, running statistics."""
    inputs = [h, phi] if phi_gradient else [h]
    grad_h, *grad_phi = torch.autograd.grad(out, inputs, grad_out, materialize_grads=True)
    parts = Phi.of(grad_phi[0]) if phi_gradient else ()
    return [t.detach().double() for t in (out, grad_h, *parts, *running)]


def by_kernels(backend, h, noise, grad_out, site, dtype=torch.float32, phi_gradient=True, seed=None):
    device, wide = DEVICES[backend.NAME], torch.float64 if dtype == torch.float64 else torch.float32
    phi, running = make_phi(wide).to(device).requires_grad_(), [s.to(device, wide) for s in statistics(h.shape[1])]
    h = torch.empty_strided(h.shape, h.stride(), dtype=dtype, device=device).copy_(h).requires_grad_()
    noise, grad_out = (None if t is None else t.to(device, dtype) for t in (noise, grad_out))
    out = fused.apply(backend, h, phi, noise, seed, *running, site)
    assert out.dtype == dtype
    if backend.NAME == "triton" and h.is_contiguous(memory_format=torch.channels_last):
        assert out.is_contiguous(memory_format=torch.channels_last)
    return tensors(out, h, phi, grad_out, running, phi_gradient)


def by_plain_operators(h, noise, grad_out, site, phi_gradient=True):
    h, phi, running = h.clone().requires_grad_(), make_phi(torch.float64).requires_grad_(), statistics(h.shape[1])
    mean, var = plain.batch_statistics(h, Phi.of(phi)) if site.training else running
    out = plain.perturb(h, Phi.of(phi), mean, var, noise, site)
    if site.training:
        running = [s.lerp(new.detach(), plain.MOMENTUM) for s, new in zip(running, (mean, var), strict=True)]
    return tensors(out, h, phi, grad_out, running, phi_gradient)


def assert_equal(backend, actual, expected, tolerance=1e-5):
    """Relative, of each tensor's largest value."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert (a.cpu() - e).abs().max() <= tolerance * e.abs().max().clamp(min=SMALLEST[backend.NAME])


def check(backend, shape, site, dtype=torch.float32, tolerance=1e-5, phi_gradient=True):
    inputs = maps(*shape), maps(*shape, seed=2), maps(*shape, seed=3)
    expected = by_plain_operators(*inputs, site, phi_gradient)
    assert_equal(backend, by_kernels(backend, *inputs, site, dtype, phi_gradient), expected, tolerance)


# --- values and gradients


@shapes(cpp=[*SHAPES, (16, 16, 32, 32)], triton=SHAPES[:3])
def test_equals_the_plain_operators(backend, shape):
    check(backend, shape, settings())


@shapes(cpp=SHAPES, triton=[])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("clip", [None, 0.75])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_equals_the_plain_operators_whatever_strength_and_clip(backend, shape, strength, clip, training):
    check(backend, shape, settings(training, strength=strength, clip=clip))


ABLATIONS = [{"clip": None, "strength": 1.0}, {"noise": False, "gate": False}, {"relu": True}, {"training": False}]
ABLATIONS += [{name: value} for name, value in (("noise", False), ("gate", False), ("expected", True))]
ABLATIONS += [{"training": False} | ablation for ablation in ABLATIONS[-3:]]
ABLATIONS += [{"relu": True, "training": False, "noise": False, "clip": None}]


@shapes(cpp=[(3, 4, 6, 5), (2, 37, 4, 4), (2, 5, 1, 1)], triton=[(2, 3, 4, 3)])
@pytest.mark.parametrize("ablation", ABLATIONS, ids=str)
def test_equals_the_plain_operators_in_the_ablations(backend, shape, ablation):
    check(backend, shape, settings(**ablation))


def test_equals_the_plain_operators_without_the_gradient_of_phi_and_in_float64(backend):
    check(backend, (2, 5, 4, 5), settings(), phi_gradient=False)
    check(backend, (2, 3, 3, 5), settings(), torch.float64, tolerance=1e-12)


def test_equals_the_plain_operators_with_tiles_of_the_usual_size(backend, monkeypatch):
    monkeypatch.undo()
    check(backend, (2, 5, 12, 11), settings())


@shapes(cpp=[(3, 4, 6, 5), (2, 37, 4, 4), (2, 5, 1, 1)], triton=[(2, 3, 4, 5)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_noise_of_mean_one_equals_that_of_the_plain_operators(backend, shape, channels_last):
    h, noise, phi = 3 * maps(*shape), maps(*shape, seed=2), make_phi(torch.float64)
    h = h.to(memory_format=torch.channels_last) if channels_last else h
    inputs = [t.to(DEVICES[backend.NAME], torch.float32) for t in (h, phi, noise)]
    expected = plain.relative_noise(h, Phi.of(phi), noise, 0.7)
    assert_equal(backend, [fused.relative_noise(backend, *inputs, 0.7).double()], [expected])


@shapes(cpp=[(3, 4, 6, 5), (2, 37, 4, 4), (4, 16, 32, 32)], triton=[(2, 3, 3, 2)])
@pytest.mark.parametrize("site", [{}, {"noise": False}, {"gate": False}, {"training": False}], ids=str)
def test_the_gradient_of_phi_does_not_depend_on_whether_that_of_h_is_wanted(backend, shape, site):
    device = DEVICES[backend.NAME]
    h, noise, grad_out = (maps(*shape, seed=seed).float().to(device) for seed in (1, 2, 3))

    def gradient(wanted):
        phi = make_phi(torch.float32).to(device).requires_grad_()
        running = [s.float().to(device) for s in statistics(shape[1])]
        out = fused.apply(backend, h.clone().requires_grad_(wanted), phi, noise, None, *running, settings(**site))
        return torch.autograd.grad(out, phi, grad_out)[0]

    assert torch.equal(gradient(False), gradient(True)) and gradient(True).abs().max() > 0


@pytest.mark.parametrize("dtype", kernels.HALF_PRECISION, ids=str)
def test_half_precision_is_computed_in_float32(backend, dtype):
    """Each result is rounded once."""
    inputs = [maps(2, 3, 4, 5, seed=i).to(dtype).double() for i in range(3)]
    exact, actual = by_plain_operators(*inputs, settings()), by_kernels(backend, *inputs, settings(), dtype)
    for i, (a, e) in enumerate(zip(actual, exact, strict=True)):
        if i < 2:  # the interpreter cuts bfloat16 off
            cut = backend.NAME == "triton" and INTERPRETED and dtype == torch.bfloat16
            rounding = torch.finfo(dtype).eps / (1 if cut else 2)
            torch.testing.assert_close(a.cpu(), e, rtol=1.02 * rounding, atol=1e-5)
        else:
            assert_equal(backend, [a], [e])


@shapes(cpp=[(3, 4, 5, 6), (3, 20, 5, 6)], triton=[(2, 2, 3, 4)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
def test_equals_the_plain_operators_whatever_the_memory_layout(backend, shape, layout, training):
    batch, channels, height, width = shape
    h, grad_out = maps(*shape).to(memory_format=torch.channels_last), maps(*shape, seed=3)
    if layout == "transposed":
        h, grad_out = maps(batch, channels, width, height).mT, grad_out.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "strided":
        h = maps(2 * batch, channels, 2 * height, 2 * width)[::2, :, ::2, ::2]
        grad_out = maps(1, channels, 1, width, seed=3).expand(shape)
    noise, site = maps(*shape, seed=2), settings(training)
    assert_equal(backend, by_kernels(backend, h, noise, grad_out, site), by_plain_operators(h, noise, grad_out, site))


def test_strength_0_only_moves_the_running_statistics(backend):
    h, device = maps(3, 5, 3, 2), DEVICES[backend.NAME]
    expected = by_plain_operators(h, h, h, settings())[-2:]
    phi, x = make_phi(torch.float32).to(device), h.float().to(device)
    running = [s.float().to(device) for s in statistics(5)]
    assert fused.site(backend, x, phi, None, *running, settings(strength=0.0)).equal(x)
    assert_equal(backend, [s.double() for s in running], expected)


def test_large_arguments_and_values_that_are_not_finite(backend):
    device = DEVICES[backend.NAME]
    h, noise, phi = maps(2, 2, 3, 3).float().to(device), torch.zeros(2, 2, 3, 3, device=device), make_phi(torch.float32)
    noise[0, 0, 0] = torch.tensor([-300.0, 300.0, 1e30])
    phi, running, site = phi.to(device), [s.float().to(device) for s in statistics(2)], settings(training=False)
    expected = plain.perturb(h, Phi.of(phi), *running, noise, site)
    out = fused.apply(backend, h, phi, noise, None, *running, site)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    h[1, 0, 1, 1] = torch.nan
    for training in (True, False):
        out = fused.apply(backend, h, phi, noise, None, *running, settings(training, gate=False))
        assert out[1, 0, 1, 1].isnan() and not out[0].isnan().any()


@shapes(cpp=[(3, 4, 6, 5), (2, 37, 4, 4)], triton=[])
@pytest.mark.parametrize("site", [{}, {"noise": False}, {"expected": True}], ids=str)
def test_a_shortcut_is_added_in_the_same_pass(backend, shape, site):
    h, shortcut, noise = (maps(*shape, seed=seed).float() for seed in (1, 2, 3))
    rest = make_phi(torch.float32), noise, None, *(s.float() for s in statistics(shape[1])), settings(False, **site)
    with torch.no_grad():
        assert fused.alike(h, shortcut)
        out = fused.apply(backend, h, *rest, shortcut=shortcut)
        assert out.equal(fused.apply(backend, h + shortcut, *rest)) and not out.equal(fused.apply(backend, h, *rest))
        assert not fused.alike(h, shortcut[:1]) and not fused.alike(h, shortcut.double())


# --- noise


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 1, 1, 1), (3, 2, 5, 3), (1, 2, 7, 11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", [0x0123456789ABCDEF, 0xFEDCBA9876543210])
def test_the_drawn_noise_is_the_oracles(backend, shape, dtype, seed):
    device, signed = DEVICES[backend.NAME], seed - (seed >> 63 << 64)
    noise = backend.draw_noise(torch.tensor(signed, device=device), torch.empty(shape, dtype=dtype, device=device))
    assert noise.dtype == dtype
    np.testing.assert_allclose(noise.cpu(), drawn_noise(seed, shape), rtol=1e-5, atol=2e-6)


@shapes(cpp=[(2, 3, 5, 5), (2, 37, 4, 4), (2, 300, 3, 1), (2, 600, 1, 1), (2, 3, 24, 24)], triton=[(2, 2, 3, 3)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_site_draws_this_noise(backend, shape, channels_last):
    h, seed = maps(*shape), draw_seed(torch.device(DEVICES[backend.NAME]))
    h = h.to(memory_format=torch.channels_last) if channels_last else h
    noise = backend.draw_noise(seed, torch.empty(shape, device=seed.device))
    for site in (settings(), settings(training=False)):
        drawn, given = by_kernels(backend, h, None, h, site, seed=seed), by_kernels(backend, h, noise, h, site)
        assert_equal(backend, drawn, [t.cpu() for t in given], tolerance=1e-6)
