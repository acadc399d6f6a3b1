"""The perturbation against a second implementation, its symmetries, its gradients, its noise and its errors."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import OracleSite, softplus

from metaperturb import MetaPerturb, PerturbSite, kernels
from metaperturb.kernels import cpp, fused
from metaperturb.perturbation import draws_at_first_site

KERNELS = dict.fromkeys(("self1", "all1", "self2", "all2"), (3, 3))
SHAPES = {**KERNELS, "scale_kernels": (4, 3, 3), "scale_affine": (10,)}


@pytest.fixture(params=["plain", "fused"], autouse=True)
def kernel(request):
    """Every test of this file holds for both ways to compute a site."""
    if request.param == "fused" and kernels.kernel_name() == "plain":
        pytest.skip("needs a C++ compiler")
    with kernels.use_kernel(request.param):
        yield request.param


def make_phi(seed=0, spread=0.5, scale_free=False):
    """φ far from its initial weights, in float64: with N(0, 0.01²) most mistakes would hide below the tolerance."""
    generator = torch.Generator().manual_seed(seed)
    phi = MetaPerturb(scale_free).double()
    with torch.no_grad():
        for p in phi.tensors():
            p.copy_(spread * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return phi


def make_pair(channels=3, channel_norm=7, size_norm=11, seed=0, scale_free=False):
    """A site and its oracle."""
    phi, sizes = make_phi(seed, scale_free=scale_free), (channels, channel_norm, size_norm)
    weights = {name: p.detach().numpy() for name, p in phi.tensors()._asdict().items()}
    return PerturbSite(phi, *sizes), OracleSite(weights, *sizes, scale_free)


def maps(*shape, seed=1, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(shape, generator=generator, dtype=torch.float64)


def assert_same(actual, expected):
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def assert_same_statistics(site, oracle):
    assert_same(site.running_mean, oracle.running_mean)
    assert_same(site.running_var, oracle.running_var)
    if oracle.scale_free:
        assert_same(site.running_rms, oracle.running_rms)


# --- against the oracle

ODD_SHAPES = [(2, 3, 5, 5), (3, 1, 4, 4), (2, 4, 1, 1), (4, 2, 3, 7), (2, 1, 1, 1), (3, 5, 2, 1)]


@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_noise_mean(shape):
    site, oracle = make_pair(shape[1])
    h = maps(*shape)
    assert_same(site.phi.noise_mean(h), oracle.noise_mean(h.numpy()))


@pytest.mark.parametrize("scale_free", [False, True])
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_whole_site_through_training_and_evaluation(shape, scale_free):
    site, oracle = make_pair(shape[1], scale_free=scale_free)
    for step in range(4):
        h, noise = maps(*shape, seed=2 * step, spread=7.0), maps(*shape, seed=2 * step + 1, spread=(1, 50)[step % 2])
        before = h.clone(), noise.clone()
        assert_same(site.scale(h), oracle.scale(h.numpy()))
        assert_same(site(h, noise=noise), oracle.forward(h.numpy(), noise.numpy()))
        assert torch.equal(h, before[0]) and torch.equal(noise, before[1])
        assert_same_statistics(site, oracle)
    site.eval()
    oracle.training = False
    assert_same(site.scale(h), oracle.scale(h.numpy()))
    assert_same(site(h, noise=noise), oracle.forward(h.numpy(), noise.numpy()))
    one = h[:1], noise[:1]  # a single image will do in evaluation
    assert_same(site(one[0], noise=one[1]), oracle.forward(one[0].numpy(), one[1].numpy()))
    assert_same_statistics(site, oracle)  # evaluation left them alone


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("clip", [None, 0.75])
@pytest.mark.parametrize("clip_eval", [False, True])
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_strength_and_clip(strength, clip, training, clip_eval):
    site, oracle = make_pair()
    h, noise = maps(3, 3, 4, 5, spread=2.0), maps(3, 3, 4, 5, seed=5)
    h[0, 0, 0, 0] = -0.0
    site.strength = oracle.strength = strength
    site.clip = oracle.clip = clip
    site.clip_eval = oracle.clip_eval = clip_eval
    site.train(training)
    oracle.training = training
    out, expected = site(h, noise=noise), oracle.forward(h.numpy(), noise.numpy())
    assert_same(out, expected)
    assert_same_statistics(site, oracle)  # also at strength 0, where annealing starts
    if clip == 0.75:  # the clip is at work, on one side only, with some strength, where it was asked for
        assert (out.max() <= 0.75) == ((training or clip_eval) and strength > 0)
        assert out.min() < -0.75
    if strength == 0.0:  # the identity bit for bit
        assert torch.equal(out.view(torch.uint8), h.view(torch.uint8))


# --- parameters


def test_82_parameters():
    phi = MetaPerturb()
    assert {name: tuple(p.shape) for name, p in phi.named_parameters()} == {"flat": (82,)}
    assert phi.flat.requires_grad and phi.flat.dtype == torch.float32
    assert {name: tuple(getattr(phi, name).shape) for name in SHAPES} == SHAPES
    assert torch.equal(phi.flat, torch.cat([getattr(phi, name).flatten() for name in SHAPES]))  # φ files and ablations
    with torch.no_grad():  # rely on this order
        phi.scale_affine[3] = 7.0  # a view, not a copy
    assert phi.flat[75] == 7.0


def test_initial_weights_are_normal_with_std_001():
    torch.manual_seed(0)
    made = [MetaPerturb() for _ in range(60)]
    for name in SHAPES:
        values = torch.stack([getattr(phi, name) for phi in made]).detach()
        count = values.numel()
        assert abs(values.mean()) < 5 * 0.01 / count**0.5, name
        assert abs(values.std() / 0.01 - 1) < 5 / (2 * count) ** 0.5, name
        assert values.abs().max() > 0.02  # normal, not uniform with this deviation
        assert not torch.equal(values[0], values[1])


def test_a_site_owns_its_statistics_and_nothing_else():
    phi = MetaPerturb()
    site = PerturbSite(phi, channels=5, channel_norm=64, size_norm=32)
    assert list(site.parameters()) == [] and list(site.children()) == []
    assert {n: tuple(b.shape) for n, b in site.named_buffers()} == {"running_mean": (5, 4), "running_var": (5, 4)}
    assert set(site.state_dict()) == {"running_mean", "running_var"}
    assert (site.running_mean == 0).all() and (site.running_var == 1).all()
    assert site.phi is phi and site.clip == 100.0 and site.strength == 1.0
    other = PerturbSite(phi, channels=5, channel_norm=64, size_norm=32)
    site(torch.randn(2, 5, 4, 4))
    assert (other.running_mean == 0).all() and (other.running_var == 1).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    site, oracle = make_pair()
    h, noise = maps(3, 3, 5, 5), maps(3, 3, 5, 5, seed=2)
    site.cuda()
    assert site.phi.flat.is_cuda
    assert_same(site(h.cuda(), noise=noise.cuda()).cpu(), oracle.forward(h.numpy(), noise.numpy()))
    site.cpu(), assert_same_statistics(site, oracle)


# --- gradients


@pytest.mark.parametrize("training, scale_free", [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_gradients_of_phi_and_h_against_finite_differences(strength, training, scale_free):
    site, _ = make_pair(2, scale_free=scale_free)
    for seed in range(2):
        site(maps(3, 2, 3, 3, seed=seed))
    site.strength = strength
    site.train(training)
    h, noise = maps(3, 2, 3, 3, seed=4).requires_grad_(), maps(3, 2, 3, 3, seed=5)

    def through(h, weights):
        clean = copy.deepcopy(site)
        del clean.phi.flat
        clean.phi.flat = weights
        return clean(h, noise=noise)

    weights = site.phi.flat.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(through, (h, weights), eps=1e-6, atol=1e-7, rtol=1e-5)


def test_autocast_leaves_the_scale_in_float32():
    site = PerturbSite(make_phi().float(), 5).eval()
    h = maps(2, 5, 6, 6).float()
    expected = site.scale(h)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(site.scale(h), expected)


def test_running_statistics_carry_no_graph():
    site, _ = make_pair()
    h = maps(2, 3, 4, 4).requires_grad_()
    for _ in range(2):
        site(h).sum().backward()  # a second backward would fail if the statistics kept the first graph
    out = site.eval()(h)
    (gradient,) = torch.autograd.grad(out.sum(), site.phi.flat)
    assert not gradient[36:72].any() and gradient[72:].any()  # running statistics stand in for the batch's


# --- noise


def test_noise_has_mean_zero_and_variance_one():
    """μ = 0 and s = 1/2 when φ = 0: the output of ones is softplus(ε)/2, so ε can be read back."""
    phi = MetaPerturb().double()
    with torch.no_grad():
        for p in phi.parameters():
            p.zero_()
    site = PerturbSite(phi, 8, 8, 32)
    torch.manual_seed(0)
    for training in (True, False):
        out = site.train(training)(torch.ones(16, 8, 24, 24, dtype=torch.float64))
        noise = torch.log(torch.expm1(2 * out)).detach()
        count = noise.numel()
        assert abs(noise.mean()) < 5 / count**0.5
        assert abs(noise.var() - 1) < 5 * (2 / count) ** 0.5
        assert abs((noise**4).mean() - 3) < 0.15  # normal


def test_softplus_of_large_arguments():
    site, h = PerturbSite(MetaPerturb(), 3).eval(), torch.ones(2, 3, 4, 4)
    low, high = (site(h, noise=torch.full_like(h, eps)) for eps in (50.0, 100.0))  # e^100 is no float32
    torch.testing.assert_close(high, 2 * low, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("training", [True, False])
def test_noise_differs_between_calls_and_sites_and_follows_the_seed(training, kernel):
    phi = make_phi()
    sites = [PerturbSite(phi, 3, 3, 5).train(training) for _ in range(2)]
    h = maps(2, 3, 5, 5)

    def draw():
        return [sites[0](h), sites[0](h), sites[1](h)]

    torch.manual_seed(7)
    first = draw()
    for a, b in itertools.combinations(first, 2):
        assert not torch.allclose(a, b)
    torch.manual_seed(7)
    again = draw()
    if not training:  # in training the running statistics have moved, but the output does not depend on them
        assert torch.equal(sites[0].running_mean, torch.zeros(3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.manual_seed(7)
    noise = torch.randn_like(h) if kernel == "plain" else cpp.draw_noise(fused.draw_seed(), h)
    torch.testing.assert_close(sites[0](h, noise=noise), first[0])


def test_scale_free_at_zero_and_in_half_precision():
    site = PerturbSite(make_phi(scale_free=True).float(), 3)
    assert torch.equal(site(torch.zeros(2, 3, 4, 4)), torch.zeros(2, 3, 4, 4))
    site(torch.full((64, 3, 32, 32), 600.0, dtype=torch.float16))  # whose squares are beyond half precision
    assert site.running_rms == pytest.approx(0.9 * 0.9 + 0.1 * 600, rel=1e-5)
    h = maps(2, 3, 4, 4)
    size = h.square().mean().sqrt()
    torch.testing.assert_close(make_phi(scale_free=True).noise_mean(h), make_phi().noise_mean(h / size))


# --- ablations of table 3 (a)


def test_ablations_switch_off_one_component_each():
    phi = make_phi()
    h, noise = maps(3, 3, 4, 4), maps(3, 3, 4, 4, seed=2)
    only_scale = PerturbSite(phi, 3, 7, 11)
    only_noise = PerturbSite(phi, 3, 7, 11)
    only_scale.noise = only_noise.gate = False
    scale = only_scale.scale(h)[:, None, None]
    torch.testing.assert_close(only_scale(h, noise=noise), h * scale)
    torch.testing.assert_close(only_noise(h, noise=noise), h * F.softplus(phi.noise_mean(h) + noise))


# --- errors


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 4, 5, 5), (3, 5, 5), (2, 3)], ids=str)
def test_wrong_shapes(shape, training):
    site = PerturbSite(MetaPerturb(), 3, 64, 32).train(training)
    for call in (site, site.scale):
        with pytest.raises(ValueError, match=rf"a feature map \[B, 3, H, W\], got \[{', '.join(map(str, shape))}\]"):
            call(torch.randn(shape))
    with pytest.raises(ValueError, match="noise"):  # and is not broadcast
        site(torch.randn(2, 3, 5, 5), noise=torch.randn((2, 1, 5, 5) if len(shape) == 4 else shape))
    assert (site.running_mean == 0).all() and (site.running_var == 1).all()


REFUSED = {
    "strength": [-0.01, 1.01, float("nan")],
    "clip": [0, -1.0, float("nan")],
    "clip_eval": [0, 5.0, "false", None],
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_out_of_range_are_refused(name):
    site = PerturbSite(MetaPerturb(), 3)
    before = getattr(site, name)
    for value in REFUSED[name]:
        with pytest.raises(ValueError, match=f"{name} must"):
            setattr(site, name, value)
    assert getattr(site, name) == before
    with pytest.raises(ValueError, match="must be positive"):
        PerturbSite(MetaPerturb(), 3, 64, -32)


# --- noise of mean one


def make_mean_one(amplitude=0.6, scale_free=False):
    site, oracle = make_pair(scale_free=scale_free)
    site.paper, site.clip, site.amplitude, site.strength = False, None, amplitude, 0.5
    return site, oracle


def expected_softplus(mu):
    """E[softplus(μ + ε)] by the trapezoidal rule."""
    steps = np.linspace(-12, 12, 2401)
    density = np.exp(-(steps**2) / 2) / np.exp(-(steps**2) / 2).sum()
    return (softplus(mu[..., None] + steps) * density).sum(axis=-1)


@pytest.mark.parametrize("scale_free", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_noise_of_mean_one(training, scale_free):
    site, oracle = make_mean_one(scale_free=scale_free)
    site.train(training)
    oracle.training = training
    h, noise = maps(2, 3, 4, 5, spread=2.0).requires_grad_(), maps(2, 3, 4, 5, seed=5)
    mu = oracle.noise_mean(h.detach().numpy())
    factor = 1 + 0.5 * 0.6 * (softplus(mu + noise.numpy()) / expected_softplus(mu) - 1)
    out, grad_out = site(h, noise=noise), maps(2, 3, 4, 5, seed=6)
    np.testing.assert_allclose(out.detach(), h.detach().numpy() * factor, rtol=1e-6)
    gradient = torch.autograd.grad(out, h, grad_out)[0]  # the factor is a constant
    np.testing.assert_allclose(gradient, grad_out.numpy() * factor, rtol=1e-6)
    assert torch.equal(site.running_mean, torch.zeros(3, 4, dtype=torch.float64))
    site.clip = 0.75
    assert site(h, noise=noise).abs().max() == 0.75
    site.strength = 0.0
    assert site(h) is h


def test_the_mean_over_draws_is_what_came_in_and_one_pass_too():
    site, _ = make_mean_one()
    h = maps(1, 3, 4, 5)
    torch.manual_seed(0)
    draws = torch.stack([site(h) for _ in range(500)])
    assert ((draws.mean(dim=0) - h).abs() < 5 * draws.std(dim=0) / 500**0.5).all()
    assert draws.std(dim=0).min() > 0
    site.attachment.deterministic = True
    assert torch.equal(site(h), h)


@pytest.mark.parametrize("paper", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (3, 16, 32, 32), (2, 64, 8, 8)])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_several_draws_are_those_of_repeated_images(order, shape, paper):
    first, second = (PerturbSite(make_phi().float(), shape[1], size_norm=shape[2]).eval() for _ in range(2))
    first.paper = second.paper = paper
    h = maps(*shape).float().to(memory_format=order)
    torch.manual_seed(0)
    with draws_at_first_site(3), torch.no_grad():
        found = first(h), second(h)  # the second site of a network sees what the first one has made
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(found[0], first(h.repeat(3, 1, 1, 1))) and torch.equal(found[1], second(h))
    with draws_at_first_site(3):  # with gradients there are no several draws
        assert first(h.requires_grad_()).shape == h.shape
