"""The fused kernel of the CPU against the plain operators.

In test_perturbation.py each test runs with both ways to compute a site, against a second implementation.
"""

import shutil

import numpy as np
import pytest
import torch
from oracle import drawn_noise

from metaperturb import kernels
from metaperturb.kernels import cpp, fused, plain
from metaperturb.kernels.plain import Phi, Settings

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")

SHAPES = [(2, 3, 5, 6), (2, 1, 1, 1), (5, 3, 1, 3), (4, 3, 8, 8), (3, 2, 17, 13), (2, 7, 2, 1), (5, 33, 6, 6)]
# Small planes, which the C++ kernel takes several at a time; the last of them are fewer.
SHAPES += [(3, 300, 2, 2), (2, 37, 4, 4), (2, 401, 1, 1), (3, 11, 7, 7)]


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


def by_kernel(h, noise, grad_out, site, dtype=torch.float32, phi_gradient=True, seed=None):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    phi, running = make_phi(wide).requires_grad_(), [s.to(wide) for s in statistics(h.shape[1])]
    h = torch.empty_strided(h.shape, h.stride(), dtype=dtype).copy_(h).requires_grad_()
    noise, grad_out = (None if t is None else t.to(dtype) for t in (noise, grad_out))
    out = fused.apply(h, phi, noise, seed, *running, site)
    assert out.dtype == dtype
    return tensors(out, h, phi, grad_out, running, phi_gradient)


def by_plain_operators(h, noise, grad_out, site, phi_gradient=True):
    h, phi, running = h.clone().requires_grad_(), make_phi(torch.float64).requires_grad_(), statistics(h.shape[1])
    mean, var = plain.batch_statistics(h, Phi.of(phi)) if site.training else running
    out = plain.perturb(h, Phi.of(phi), mean, var, noise, site)
    if site.training:
        running = [s.lerp(new.detach(), plain.MOMENTUM) for s, new in zip(running, (mean, var), strict=True)]
    return tensors(out, h, phi, grad_out, running, phi_gradient)


def assert_equal(actual, expected, tolerance=1e-5):
    """Relative, of each tensor's largest value."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert (a - e).abs().max() <= tolerance * e.abs().max().clamp(min=1e-6)


def check(shape, site, dtype=torch.float32, tolerance=1e-5, phi_gradient=True):
    inputs = maps(*shape), maps(*shape, seed=2), maps(*shape, seed=3)
    expected = by_plain_operators(*inputs, site, phi_gradient)
    assert_equal(by_kernel(*inputs, site, dtype, phi_gradient), expected, tolerance)


# --- values and gradients


@pytest.mark.parametrize("shape", [*SHAPES, (16, 16, 32, 32)])
def test_equals_the_plain_operators(shape):
    check(shape, settings())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("clip", [None, 0.75])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_equals_the_plain_operators_whatever_strength_and_clip(shape, strength, clip, training):
    check(shape, settings(training, strength=strength, clip=clip))


ABLATIONS = [{"clip": None, "strength": 1.0}, {"noise": False, "gate": False}, {"relu": True}, {"training": False}]
ABLATIONS += [{name: value} for name, value in (("noise", False), ("gate", False), ("expected", True))]
ABLATIONS += [{"training": False} | ablation for ablation in ABLATIONS[-3:]]
ABLATIONS += [{"relu": True, "training": False, "noise": False, "clip": None}]


@pytest.mark.parametrize("shape", [(3, 4, 6, 5), (2, 37, 4, 4), (2, 5, 1, 1)])
@pytest.mark.parametrize("ablation", ABLATIONS, ids=str)
def test_equals_the_plain_operators_in_the_ablations(shape, ablation):
    check(shape, settings(**ablation))


def test_equals_the_plain_operators_without_the_gradient_of_phi_and_in_float64():
    check((2, 5, 4, 5), settings(), phi_gradient=False)
    check((2, 3, 3, 5), settings(), torch.float64, tolerance=1e-12)


@pytest.mark.parametrize("shape", [(3, 4, 6, 5), (2, 37, 4, 4), (2, 5, 1, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_noise_of_mean_one_equals_that_of_the_plain_operators(shape, channels_last):
    h, noise, phi = 3 * maps(*shape), maps(*shape, seed=2), make_phi(torch.float64)
    h = h.to(memory_format=torch.channels_last) if channels_last else h
    inputs = [t.float() for t in (h, phi, noise)]
    expected = plain.relative_noise(h, phi, noise, 0.7)
    assert_equal([fused.relative_noise(*inputs, 0.7).double()], [expected])


@pytest.mark.parametrize("shape", [(3, 4, 6, 5), (2, 37, 4, 4), (4, 16, 32, 32)])
@pytest.mark.parametrize("site", [{}, {"noise": False}, {"gate": False}, {"training": False}], ids=str)
def test_the_gradient_of_phi_does_not_depend_on_whether_that_of_h_is_wanted(shape, site):
    h, noise, grad_out = (maps(*shape, seed=seed).float() for seed in (1, 2, 3))

    def gradient(wanted):
        phi = make_phi(torch.float32).requires_grad_()
        running = [s.float() for s in statistics(shape[1])]
        out = fused.apply(h.clone().requires_grad_(wanted), phi, noise, None, *running, settings(**site))
        return torch.autograd.grad(out, phi, grad_out)[0]

    assert torch.equal(gradient(False), gradient(True)) and gradient(True).abs().max() > 0


@pytest.mark.parametrize("dtype", kernels.HALF_PRECISION, ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    """Each result is rounded once."""
    inputs = [maps(2, 3, 4, 5, seed=i).to(dtype).double() for i in range(3)]
    exact, actual = by_plain_operators(*inputs, settings()), by_kernel(*inputs, settings(), dtype)
    for i, (a, e) in enumerate(zip(actual, exact, strict=True)):
        if i < 2:
            torch.testing.assert_close(a, e, rtol=1.02 * torch.finfo(dtype).eps / 2, atol=1e-5)
        else:
            assert_equal([a], [e])


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 20, 5, 6)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
def test_equals_the_plain_operators_whatever_the_memory_layout(shape, layout, training):
    batch, channels, height, width = shape
    h, grad_out = maps(*shape).to(memory_format=torch.channels_last), maps(*shape, seed=3)
    if layout == "transposed":
        h, grad_out = maps(batch, channels, width, height).mT, grad_out.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "strided":
        h = maps(2 * batch, channels, 2 * height, 2 * width)[::2, :, ::2, ::2]
        grad_out = maps(1, channels, 1, width, seed=3).expand(shape)
    noise, site = maps(*shape, seed=2), settings(training)
    assert_equal(by_kernel(h, noise, grad_out, site), by_plain_operators(h, noise, grad_out, site))


def test_strength_0_only_moves_the_running_statistics():
    h = maps(3, 5, 3, 2)
    expected = by_plain_operators(h, h, h, settings())[-2:]
    phi, x = make_phi(torch.float32), h.float()
    running = [s.float() for s in statistics(5)]
    assert fused.site(x, phi, None, *running, settings(strength=0.0)).equal(x)
    assert_equal([s.double() for s in running], expected)


def test_large_arguments_and_values_that_are_not_finite():
    h, noise, phi = maps(2, 2, 3, 3).float(), torch.zeros(2, 2, 3, 3), make_phi(torch.float32)
    noise[0, 0, 0] = torch.tensor([-300.0, 300.0, 1e30])
    running, site = [s.float() for s in statistics(2)], settings(training=False)
    expected = plain.perturb(h, Phi.of(phi), *running, noise, site)
    out = fused.apply(h, phi, noise, None, *running, site)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    h[1, 0, 1, 1] = torch.nan
    for training in (True, False):
        out = fused.apply(h, phi, noise, None, *running, settings(training, gate=False))
        assert out[1, 0, 1, 1].isnan() and not out[0].isnan().any()


@pytest.mark.parametrize("shape", [(3, 4, 6, 5), (2, 37, 4, 4)])
@pytest.mark.parametrize("site", [{}, {"noise": False}, {"expected": True}], ids=str)
def test_a_shortcut_is_added_in_the_same_pass(shape, site):
    h, shortcut, noise = (maps(*shape, seed=seed).float() for seed in (1, 2, 3))
    rest = make_phi(torch.float32), noise, None, *(s.float() for s in statistics(shape[1])), settings(False, **site)
    with torch.no_grad():
        assert fused.alike(h, shortcut)
        out = fused.apply(h, *rest, shortcut=shortcut)
        assert out.equal(fused.apply(h + shortcut, *rest)) and not out.equal(fused.apply(h, *rest))
        assert not fused.alike(h, shortcut[:1]) and not fused.alike(h, shortcut.double())


# --- noise


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 1, 1, 1), (3, 2, 5, 3), (1, 2, 7, 11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", [0x0123456789ABCDEF, 0xFEDCBA9876543210])
def test_the_drawn_noise_is_the_oracles(shape, dtype, seed):
    signed = seed - (seed >> 63 << 64)
    noise = cpp.draw_noise(torch.tensor(signed), torch.empty(shape, dtype=dtype))
    assert noise.dtype == dtype
    np.testing.assert_allclose(noise, drawn_noise(seed, shape), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (2, 37, 4, 4), (2, 300, 3, 1), (2, 600, 1, 1), (2, 3, 24, 24)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_site_draws_this_noise(shape, channels_last):
    h, seed = maps(*shape), fused.draw_seed()
    h = h.to(memory_format=torch.channels_last) if channels_last else h
    noise = cpp.draw_noise(seed, torch.empty(shape))
    for site in (settings(), settings(training=False)):
        drawn, given = by_kernel(h, None, h, site, seed=seed), by_kernel(h, noise, h, site)
        assert_equal(drawn, given, tolerance=1e-6)
