"""What sets the fused kernel of the CPU apart, sites compiled by PyTorch, and how a kernel is chosen and built."""

import functools
import os
import shutil
import warnings

import pytest
import test_fused
import torch
import torch.utils.checkpoint
from conftest import python
from oracle import philox
from test_fused import maps
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from metaperturb import MetaPerturb, PerturbSite, UserError, attach, kernels, models
from metaperturb.kernels import compiled, cpp, fused, plain, trial
from metaperturb.randomness import seed_torch

# Not where the kernel is not used: one that computes something else would then be skipped.
pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")


def make_phi(dtype):
    phi = MetaPerturb().to(dtype)
    phi.flat.data.copy_(test_fused.make_phi(dtype))
    return phi


def test_a_map_without_pixels_stays_one():
    assert PerturbSite(make_phi(torch.float32), 3).eval()(torch.zeros(2, 3, 0, 4)).shape == (2, 3, 0, 4)


# --- derivatives


@pytest.mark.parametrize("drawn", [True, False])
def test_first_and_second_derivatives_against_finite_differences(drawn):
    site = PerturbSite(make_phi(torch.float64), 2, 3, 5)
    h, noise = maps(3, 2, 3, 3).requires_grad_(), None if drawn else maps(3, 2, 3, 3, seed=2)

    def function(h, phi):
        torch.manual_seed(5)  # the same draw every time
        return fused.site(
            h, phi, noise, site.running_mean, site.running_var, site._settings(h, site.attachment.current())
        )

    assert torch.autograd.gradcheck(function, (h, site.phi.flat))
    assert torch.autograd.gradgradcheck(function, (h, site.phi.flat), fast_mode=True)


def test_a_step_ahead_is_differentiated_as_with_the_plain_operators():
    phi = make_phi(torch.float64)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double()
    attach(network, phi, image_size=6, paper=True, verbose=False)
    x, y, noise = maps(5, 3, 6, 6), torch.tensor([0, 1, 2, 0, 1]), maps(5, 4, 4, 4, seed=2)
    (site,) = network.metaperturb.sites
    forward = site.forward
    site.forward = lambda h: forward(h, noise=noise)
    gradients = []
    for kernel in ("plain", "fused"):
        with kernels.use_kernel(kernel):
            theta = dict(network.named_parameters())
            inner = nn.functional.cross_entropy(network(x), y)
            steps = torch.autograd.grad(inner, list(theta.values()), create_graph=True)
            ahead = {name: p - 0.5 * g for (name, p), g in zip(theta.items(), steps, strict=True)}
            outer = nn.functional.cross_entropy(torch.func.functional_call(network, ahead, x), y)
            gradients.append(torch.autograd.grad(outer, phi.flat)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)


def test_the_feature_map_and_a_byte_a_value_are_kept_for_the_backward_pass():
    site, h = PerturbSite(make_phi(torch.float32), 8), torch.randn(4, 8, 16, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        site(h)
    assert h.nbytes <= sum(kept) < 1.1 * (h.nbytes + 1.2 * h.numel())  # rows of 16 with a byte between them


def test_activation_checkpointing_gives_the_same_gradients():
    site, h = PerturbSite(make_phi(torch.float32), 3), maps(2, 3, 4, 4).float().requires_grad_()
    gradients = []
    for forward in (site, lambda h: torch.utils.checkpoint.checkpoint(site, h, use_reentrant=False)):
        torch.manual_seed(0)
        gradients.append(torch.autograd.grad(forward(h).square().sum(), [h, site.phi.flat]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_network_can_be_saved(tmp_path):
    network = attach(
        models.create("resnet8", 3, 8), make_phi(torch.float32).requires_grad_(False), 8, verbose=False
    ).eval()
    x = maps(2, 3, 8, 8).float()
    torch.jit.save(torch.jit.trace(network, x, check_trace=False), tmp_path / "traced.pt")
    torch.manual_seed(0)
    found = torch.jit.load(tmp_path / "traced.pt")(x)
    torch.manual_seed(0)
    with kernels.use_kernel("plain"):
        torch.testing.assert_close(found, network(x))


def test_what_the_kernel_cannot_do_is_left_to_the_plain_operators():
    """torch.func, forward mode, the gradient of a noise, torch.compile."""
    site = PerturbSite(make_phi(torch.float64), 2).eval()
    h, noise, v = maps(2, 2, 4, 4), maps(2, 2, 4, 4, seed=2), maps(2, 2, 4, 4, seed=3)
    differentiate = torch.autograd.functional
    actual = torch.func.jacrev(lambda h: (site(h, noise=noise) * v).sum())(h)
    torch.testing.assert_close(actual, differentiate.vjp(lambda h: site(h, noise=noise), h, v)[1])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(h, v)
        actual = torch.autograd.forward_ad.unpack_dual(site(dual, noise=noise)).tangent
    torch.testing.assert_close(actual, differentiate.jvp(lambda h: site(h, noise=noise), h, v)[1])
    actual = differentiate.vjp(lambda noise: site(h, noise=noise), noise, v)[1]
    with torch.no_grad():
        expected = v * (site(h, noise=noise + 1e-6) - site(h, noise=noise - 1e-6)) / 2e-6
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)
    compiled = torch.compile(lambda h: site(h, noise=noise), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(h), site(h, noise=noise))


# --- noise


PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
KNOWN = {  # answers of the authors' library Random123
    (0,) * 6: (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
    (0xFFFFFFFF,) * 6: (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
    PI: (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
}


def test_the_oracle_knows_philox():
    for counter_and_key, words in KNOWN.items():
        assert tuple(philox(counter_and_key[:4], counter_and_key[4:])) == words


def test_distribution_of_the_noise():
    noise = cpp.draw_noise(torch.tensor(11), torch.empty(64, 16, 32, 32)).double()
    n = noise.numel()
    # Mean, variance, third and fourth moment of a normal, in standard errors of their estimates.
    moments = torch.stack([noise.mean(), noise.var(), (noise**3).mean(), (noise**4).mean()])
    errors = (moments - torch.tensor([0.0, 1.0, 0.0, 3.0])).abs() * (n / torch.tensor([1, 2, 15, 96])).sqrt()
    assert errors.max() < 4.5
    distance = (torch.special.ndtr(noise.flatten().sort().values) - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 1.95 / n**0.5  # Kolmogorov and Smirnov's test at the level 0.001
    for tail in (3.0, 4.0):
        expected = n * 2 * torch.special.ndtr(torch.tensor(-tail, dtype=torch.float64))
        assert abs((noise.abs() > tail).sum() - expected) < 4.5 * expected**0.5


def test_noise_is_not_correlated():
    """Within a map, whose quarters come from one call of Philox, and between sites, tasks and steps."""
    like = torch.empty(32, 8, 32, 32)
    a = cpp.draw_noise(torch.tensor(11), like)
    pairs = {"pixels": (a[..., 1:], a[..., :-1]), "rows": (a[:, :, 1:], a[:, :, :-1])}
    pairs |= {"channels": (a[:, 1:], a[:, :-1]), "images": (a[1:], a[:-1])}
    pairs |= {f"quarters {i}": (a[:, :, 8 * i : 8 * i + 8], a[:, :, 8 * i + 8 : 8 * i + 16]) for i in range(3)}
    seeds = {"seeds": (11, 12), "seeds with other high bits": (11, 11 + (1 << 40))}
    drawn = []
    for task, step in ((0, 0), (1, 0), (0, 1)):
        seed_torch(0, task, "theta_step", step)
        drawn += [fused.draw_seed().item() for _ in range(2)]  # two sites
    seeds |= {name: (drawn[0], drawn[i]) for name, i in (("sites", 1), ("tasks", 2), ("steps", 4))}
    pairs |= {name: [cpp.draw_noise(torch.tensor(seed), like) for seed in both] for name, both in seeds.items()}
    for name, (x, y) in pairs.items():
        for power in (1, 2):  # values and their squares: what makes pairs of Box and Muller alike shows in the radius
            r = torch.corrcoef(torch.stack([x.flatten() ** power, y.flatten() ** power]))[0, 1]
            assert abs(r) < 4.5 / x.numel() ** 0.5, name


@pytest.mark.parametrize("shape", [(7, 5, 6, 6), (5, 300, 2, 2)])
def test_nothing_depends_on_the_number_of_threads(shape):
    site, h = PerturbSite(make_phi(torch.float32), shape[1]), maps(*shape).float().requires_grad_()
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            out = site(h)
            results.append((out, *torch.autograd.grad(out.square().sum(), [h, site.phi.flat])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# --- sites compiled by PyTorch, as on a GPU


def test_a_stencil_is_the_convolution():
    for shape in ((2, 3, 5, 6), (1, 2, 1, 1)):
        found = []
        for convolve in (plain._depthwise_conv, plain._stencil):
            x, kernel = maps(*shape).requires_grad_(), maps(3, 3, seed=2).requires_grad_()
            out = convolve(x, kernel)
            found.append((out, *torch.autograd.grad(out, [x, kernel], maps(*shape, seed=3))))
        torch.testing.assert_close(*found)


def test_half_precision_of_a_gpu_is_kept():
    """Its autocast computes softplus in float32."""
    with FakeTensorMode(), torch.autocast("cuda", torch.bfloat16):
        h = torch.empty(6, 5, 8, 8, device="cuda", dtype=torch.bfloat16)
        phi, *running = (torch.empty(shape, device="cuda") for shape in (82, (5, 4), (5, 4)))
        assert plain.site(h, phi, None, *running, test_fused.settings()).dtype == torch.bfloat16
        assert plain.relative_noise(h, phi, None, 0.7).dtype == torch.bfloat16


@pytest.mark.slow
def test_a_compilation_serves_sites_of_all_widths_sizes_and_strengths(monkeypatch):
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    built, compile = [], torch.compile
    backend = aot_autograd(
        fw_compiler=lambda graph, inputs: built.append(graph) or graph, decompositions=select_decomp_table()
    )
    options = {"backend": backend, "fullgraph": True}
    monkeypatch.setattr(torch, "compile", lambda function, **more: compile(function, **more, **options))
    monkeypatch.setattr(compiled, "_compiled", functools.cache(compiled._compiled.__wrapped__))
    torch._dynamo.reset()
    phi, kept = test_fused.make_phi(torch.float32), None
    for training in (True, False):
        for shape, strength in (((6, 5, 7, 9), 0.2), ((3, 8, 12, 12), 0.9), ((5, 33, 3, 2), 0.5)):
            h, noise = maps(*shape).float().requires_grad_(), maps(*shape, seed=2).float()
            site, results = test_fused.settings(training, strength=strength), []
            for kernel in (plain, compiled):
                running = [s.float() for s in test_fused.statistics(shape[1])]
                out = kernel.site(h, phi, noise, *running, site)
                gradients = [*torch.autograd.grad(out, h, noise, retain_graph=True), *torch.autograd.grad(out, h, h)]
                results.append([out, *gradients, *running])
            torch.testing.assert_close(*results)
            kept = compiled.relative_noise(h, phi, noise, strength)
            torch.testing.assert_close(kept, plain.relative_noise(h, phi, noise, strength))
    assert len(built) == 5 and not kept.requires_grad  # training and evaluation, each with gradients; noise of mean one


@pytest.mark.slow
@pytest.mark.timeout(1800)  # compiling, on a busy machine
def test_compiled_by_inductor_it_equals_the_plain_operators():
    assert trial.error_of(compiled, torch.device("cpu"), torch.float32) < 1e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_where_nothing_can_be_compiled_the_plain_operators_take_over(fresh):
    with pytest.warns(UserWarning, match="which is slower: torch.compile fails on cuda"):
        assert kernels.kernel_name("cuda") == "plain"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiled_sites_on_a_gpu():
    assert kernels.kernel_name("cuda") == "compiled"
    assert trial.error_of(compiled, torch.device("cuda"), torch.float32) < 1e-5
    site, h = PerturbSite(make_phi(torch.float32), 3).cuda(), torch.randn(8, 3, 16, 16, device="cuda")
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(site(h))
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])


# --- choosing and building


def test_choices():
    assert kernels.kernel_name() == "cpp"
    with kernels.use_kernel("plain"):
        assert kernels.kernel_name() == "plain"
        with kernels.use_kernel("fused"):
            assert kernels.kernel_name() == "cpp"
        assert kernels.kernel_name() == "plain"
    with pytest.raises(UserError, match="kernel: unknown 'fast'"):
        kernels.set_kernel("fast")
    with kernels.use_kernel("fused"), pytest.raises(UserError, match="no fused one on meta"):
        kernels.kernel_name("meta")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a dry run on the meta device says nothing
        assert kernels.kernel_name("meta") == "plain"


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a process that has not used a kernel yet, with a cache of its own that holds the library."""
    shutil.copytree(cpp.cache_folder(), tmp_path / "metaperturb", dirs_exist_ok=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpp, "load", functools.cache(cpp.load.__wrapped__))
    monkeypatch.setattr(kernels, "_load", functools.cache(kernels._load.__wrapped__))
    monkeypatch.setattr(kernels, "_told", {"meta"})


def refused():
    """Why there is no fused kernel, which is a warning once, and an error where the fused one was asked for."""
    site = PerturbSite(make_phi(torch.float32), 3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            site(maps(2, 3, 4, 4).float())
        assert kernels.kernel_name() == "plain"
    with kernels.use_kernel("fused"), pytest.raises(UserError) as error:
        kernels.kernel_name()
    reason = str(error.value).removeprefix("kernel: no fused one on cpu: ")
    assert [str(warning.message) for warning in said] == [
        f"the perturbation runs in plain PyTorch operators, which is slower: {reason}"
    ]
    assert "\n" not in reason
    return reason


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": "/nowhere", "CXX": ""}, "no C++ compiler found"),
        ({"CXX": "/nowhere/c++"}, "CXX names no compiler"),
        ({"CXX": "false"}, "false cannot compile the kernels"),
        ({"XDG_CACHE_HOME": __file__}, "set XDG_CACHE_HOME to a folder of your own"),
    ],
    ids=["no compiler", "unknown", "failing", "no folder"],
)
def test_why_there_is_no_fused_kernel_is_said_once(environment, reason, fresh, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert reason in refused()


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_kernel_that_disagrees_is_not_used(error, fresh, monkeypatch):
    monkeypatch.setattr(trial, "error_of", lambda *_: error)
    assert "cpp disagrees with them on this machine" in refused()


def test_kinds_of_processor_that_share_a_home_have_libraries_of_their_own(fresh, monkeypatch, tmp_path):
    """One with instructions that the other lacks would end its process."""
    library, kind, compiler, built = cpp.load()._name, tmp_path / "kind", tmp_path / "compiler", []
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-march=native*) cat {kind}; esac')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))

    def build(compiler, variants, path):
        shutil.copy(library, path)
        built.append(any("-march=native" in variant for variant in variants))

    monkeypatch.setattr(cpp, "_build", build)
    for macros in ("#define __AVX2__ 1", "#define __AVX512F__ 1", "#define __AVX2__ 1", ""):
        kind.write_text(macros)
        cpp.load.__wrapped__()
    assert built == [True, True, False]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("whose", ["folder", "library"])
def test_a_library_of_another_user_is_not_loaded(whose, fresh):
    assert kernels.kernel_name() == "cpp"
    folder = cpp.cache_folder()
    for path in [folder] if whose == "folder" else folder.glob("*.so"):
        os.chown(path, 12345, 12345)
    cpp.load.cache_clear()
    kernels._load.cache_clear()
    assert "belongs to another user" in refused()


NAME = "import metaperturb; print(metaperturb.kernels.kernel_name())"


@pytest.mark.slow
def test_processes_that_build_at_once_do_not_disturb_each_other(tmp_path):
    processes = [python(NAME, XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    assert [process.communicate()[0].split() for process in processes] == [["cpp"], ["cpp"]]
    folder = tmp_path / "metaperturb"
    assert len(list(folder.iterdir())) == 1 and folder.stat().st_mode & 0o777 == 0o700
