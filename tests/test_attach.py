"""Where `attach` puts the sites, what it leaves alone, and what it refuses.

Where the sites act is checked from outside: the test replaces what every site returns by a constant, or computes by
hand the feature map that a site should receive.
"""

import copy
import functools
import importlib.util
import operator
import pickle
import re
import signal
import sys
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.fx.experimental.optimization
import torch.nn.functional as F
import torchvision
import torchvision.models.feature_extraction
from conftest import ROOT
from image_files import one_line
from torch import nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.utils.checkpoint import checkpoint

import metaperturb
from metaperturb import MetaPerturb, UserError, attach, detach, find_sites, models
from metaperturb.early import check_command_line
from metaperturb.sites import choose_sites

CONSTANT = 7.0


def quiet(model, phi=None, image_size=32, sites=None, **options):
    return attach(model, phi or MetaPerturb(), image_size, sites, verbose=False, **options)


def site_names(model):
    return [spec.name for spec in model.metaperturb.specs]


def images(batch=2, size=32, seed=0):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def record_inputs(model):
    """What the sites receive, in the order in which they run: a list that fills as the model runs."""
    received = []
    for site in model.metaperturb.sites:
        site.register_forward_pre_hook(lambda site, args: received.append((site, args[0].detach().clone())))
    return received


def constant_sites(model):
    """Let every site return a constant map."""
    for site in model.metaperturb.sites:
        site.register_forward_hook(lambda site, args, output: torch.full_like(output, CONSTANT))


def seeded(model, x, seed=0):
    torch.manual_seed(seed)
    return model(x)


# --- networks of a user


def conv(a, b, stride=1):
    return nn.Conv2d(a, b, 3, stride, padding=1)


class Head(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Linear(channels, 5)

    def forward(self, x):
        return self.fc(x.mean(dim=(2, 3)))


class FunctionalPlain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.head = conv(3, 4), conv(4, 6), Head(6)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        return self.head(F.relu(self.conv2(x)))


class NormPlain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(3, 4), nn.BatchNorm2d(4), conv(4, 6), nn.BatchNorm2d(6)
        self.head = Head(6)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.head(self.bn2(self.conv2(x)).relu())


class SharedReLU(nn.Module):
    """One in-place ReLU module, used after every layer."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.head = conv(3, 4), conv(4, 4), conv(4, 6, 2), Head(6)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        for layer in (self.conv1, self.conv2, self.conv3):
            x = self.relu(layer(x))
        return self.head(x)


def all_conv():
    return nn.Sequential(
        conv(3, 4),
        nn.ReLU(),
        conv(4, 6, 2),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 5, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


ADDITIONS = {
    "out + x": lambda out, x: out + x,
    "x + out": lambda out, x: x + out,
    "torch.add": torch.add,
    "torch.add keywords": lambda out, x: torch.add(input=out, other=x),
    "out.add": lambda out, x: out.add(x),
    "out.add_": lambda out, x: out.add_(x),
    "sum of a list": lambda out, x: sum([out, x]),
    "out += x": operator.iadd,
    "out.add_ as a statement": lambda out, x: (out.add_(x), out)[1],
}


class Block(nn.Module):
    def __init__(self, channels, add):
        super().__init__()
        self.conv1, self.conv2, self.add = conv(channels, channels), conv(channels, channels), add
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.add(self.conv2(self.relu(self.conv1(x))), x))


class Residual(nn.Module):
    def __init__(self, make_block, blocks=2):
        super().__init__()
        self.stem = conv(3, 4)
        self.blocks = nn.Sequential(*(make_block() for _ in range(blocks)))
        self.head = Head(4)

    def forward(self, x):
        return self.head(self.blocks(F.relu(self.stem(x))))


class RootSum(nn.Module):
    """Residual sums in the forward of the network itself."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.head = conv(3, 4), conv(4, 4), conv(4, 4), Head(4)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x) + x)
        x = F.relu(x + self.conv3(x))
        return self.head(x)


PLAIN_NETS = {
    "functional": (FunctionalPlain, ["conv1", "conv2"]),
    "batch norm": (NormPlain, ["bn1", "bn2"]),
    "shared relu": (SharedReLU, ["conv1", "conv2", "conv3"]),
    "all conv": (all_conv, ["0", "2"]),
    "conv bn pool relu": (
        lambda: nn.Sequential(
            conv(3, 4), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.ReLU(), conv(4, 6), nn.BatchNorm2d(6), nn.ReLU(), Head(6)
        ),
        ["1", "5"],
    ),
}
RESIDUAL_NETS = {name: lambda add=add: Residual(lambda: Block(4, add)) for name, add in ADDITIONS.items()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", PLAIN_NETS)
def test_plain_networks_before_each_activation(name, training):
    make, expected_names = PLAIN_NETS[name]
    torch.manual_seed(0)
    model = quiet(make().train(training))
    assert site_names(model) == expected_names
    x = images(4, 16)
    before = []  # what the marked layers give by themselves: hooks that ran before a site's
    received = record_inputs(model)
    for site_name in expected_names:
        module = model.get_submodule(site_name)
        hook = module.register_forward_hook(lambda m, args, out: before.append(out.detach().clone()), prepend=True)
        assert hook is not None
    model(x)
    assert [site for site, _ in received] == model.metaperturb.sites
    for (_, h), expected in zip(received, before, strict=True):
        assert torch.equal(h, expected) and (h < 0).any() and (h > 0).any()
    constant_sites(model)
    activated = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, Head)):
            module.register_forward_pre_hook(lambda m, args: activated.append(args[0]))
    model(x)
    for h in activated[1:]:  # all but the image: relu of the constant, whatever pooling came between
        assert (h == CONSTANT).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", RESIDUAL_NETS)
def test_residual_blocks_after_the_sum_before_the_activation(name, training):
    torch.manual_seed(0)
    model = quiet(RESIDUAL_NETS[name]().train(training))
    assert site_names(model) == ["blocks.0", "blocks.1"]
    received, entering, leaving = record_inputs(model), [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, args: entering.append(args[0].detach().clone()))
        block.register_forward_hook(lambda block, args, out: leaving.append(out.detach().clone()))
    x = images(4, 16)
    seeded(model, x)
    for (_, h), start, block in zip(received, entering, model.blocks, strict=True):
        with torch.no_grad():
            expected = F.conv2d(start, block.conv1.weight, block.conv1.bias, padding=1).clamp(min=0)
            expected = F.conv2d(expected, block.conv2.weight, block.conv2.bias, padding=1) + start
        torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-5)
        assert (h < 0).any()
    for (site, h), end in zip(received, leaving, strict=True):  # and what leaves the block is what the site made of it
        assert not torch.allclose(end, h.relu())
        assert site.channels == 4
    constant_sites(model)
    leaving.clear()
    model(x).sum().backward()
    assert len(leaving) == 2 and all((end == CONSTANT).all() for end in leaving)


class Attention(nn.Module):
    """Weights of channels from two sums of one pixel each, as CBAM has them."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.mix(x.mean((2, 3), keepdim=True)) + self.mix(x.amax((2, 3), keepdim=True)))


def test_sums_of_attention_are_no_feature_maps():
    model = quiet(nn.Sequential(conv(3, 4), nn.ReLU(), Attention(), conv(4, 4), nn.ReLU(), Head(4)))
    assert site_names(model) == ["0", "3"]
    model = quiet(nn.Sequential(conv(3, 4), Attention(), Block(4, torch.add), Head(4)))
    assert site_names(model) == ["2"]
    model = quiet(models.create("resnet18", 5, 32))  # whose last maps have one pixel
    assert site_names(model)[-1] == "layer4.1" and model.metaperturb.specs[-1].size == (1, 1)


# --- the zoo and torchvision


def network(name, num_classes=6):
    """Of torchvision built without the initialization by `create`, which takes seconds for the large ones."""
    if name in models.ZOO:
        return models.create(name, num_classes, 32)
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=num_classes)
        if name.startswith("vgg"):  # 100 million weights that the sites have nothing to do with
            model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, num_classes)
    torch.manual_seed(0)
    model = model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if hasattr(module, "layer_scale"):  # ConvNeXt
            nn.init.constant_(module.layer_scale, 0.1)
    return model


# sites, the widest, image size, classes of the modules whose output is the site's (after an activation, if it has one)
NETWORKS = {
    "conv4": (4, 64, 32, ("ConvLayer",)),
    "conv6": (6, 64, 32, ("ConvLayer",)),
    "vgg9": (8, 512, 32, ("ConvLayer",)),
    "resnet20": (9, 64, 32, ("BasicBlock",)),
    "resnet56": (27, 64, 32, ("BasicBlock",)),
    "wrn_28_2": (12, 128, 32, ("WideBlock",)),
    "resnet18": (8, 512, 32, ("BasicBlock",)),
    "resnet50": (16, 2048, 32, ("Bottleneck",)),
    "vgg11": (8, 512, 32, ("ReLU",)),
    "vgg11_bn": (8, 512, 32, ("ReLU",)),
    "shufflenet_v2_x1_0": (16, 464, 32, ("InvertedResidual",)),
    "squeezenet1_1": (8, 512, 64, ("Fire",)),
    "mobilenet_v2": (17, 320, 32, ("InvertedResidual",)),
    "mobilenet_v3_small": (11, 96, 32, ("InvertedResidual",)),
    "efficientnet_b0": (16, 320, 32, ("MBConv",)),
    "convnext_tiny": (18, 768, 32, ("CNBlock",)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    count, widest, size, classes = NETWORKS[name]
    model = network(name)
    parameters = {n for n, _ in model.named_parameters()}
    quiet(model, image_size=size)
    sites = model.metaperturb.sites
    assert len(sites) == count
    assert {site.channel_norm for site in sites} == {widest} == {max(site.channels for site in sites)}
    assert {site.size_norm for site in sites} == {size}
    assert {n for n, _ in model.named_parameters()} == parameters

    # training: backward through in-place activations; θ and φ both get a gradient
    received = record_inputs(model)
    x = images(2, size)
    model.train()
    F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    assert [site for site, _ in received] == sites  # each once, in this order
    if name not in ("squeezenet1_1", "shufflenet_v2_x1_0"):  # whose blocks rectify the parts that they concatenate
        assert all((h < 0).any() for _, h in received)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).weight
    assert torch.isfinite(first.grad).all() and first.grad.any()

    # where: behind a constant site, what leaves the block (or layer) is that constant
    constant_sites(model)
    leaving = []
    for module in model.modules():
        if any(kind.__name__ in classes for kind in type(module).__mro__):
            module.register_forward_hook(lambda module, args, output: leaving.append(output.clone()))
    with torch.no_grad():
        model.eval()(x)
    assert len(leaving) >= count  # of VGG's activations two are the classifier's
    leaving = leaving[:count]
    assert all((output == CONSTANT).all() for output in leaving)


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "mobilenet_v2"])
def test_strength_0_is_the_network_itself(name):
    model = network(name)
    twin = copy.deepcopy(model)
    quiet(model).metaperturb.strength = 0.0
    x = images(4)
    assert torch.equal(seeded(model, x), seeded(twin, x))  # the seed is for dropout: at strength 0 no noise is drawn
    assert torch.equal(model.eval()(x), twin.eval()(x))


# --- attach leaves the network as it was


class ModeChanger(nn.Module):
    """Part of it in evaluation mode while the whole trains, as when batch norm is frozen."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.bn2, self.head = conv(3, 4), nn.BatchNorm2d(4), nn.BatchNorm2d(4), Head(4)
        self.bn2.eval()

    def forward(self, x):
        return self.head(F.relu(self.bn2(F.relu(self.bn1(self.conv1(x))))))


class MonteCarloDropout(FunctionalPlain):
    """Draws in evaluation, too, and so in the dry run."""

    def forward(self, x):
        return super().forward(F.dropout(x))


@pytest.mark.parametrize("make", [lambda: models.create("resnet8", 5, 16), ModeChanger, RootSum, MonteCarloDropout])
def test_attach_changes_neither_mode_nor_statistics_nor_random_state(make):
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    children = [name for name, _ in model.named_children()]
    phi = MetaPerturb()
    random_state = torch.get_rng_state()
    quiet(model, phi, image_size=16)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training == modes[n] for n, module in model.named_modules() if "metaperturb" not in n)
    assert [name for name, _ in model.named_children()] == children
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    for spec, site in zip(model.metaperturb.specs, model.metaperturb.sites, strict=True):
        assert site.training == model.get_submodule(spec.module).training
    assert all((site.running_mean == 0).all() and (site.running_var == 1).all() for site in model.metaperturb.sites)
    assert all(p.grad is None for p in [*phi.parameters(), *model.parameters()])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: models.create("resnet8", 5, 16),
        lambda: models.create("conv4", 5, 16),
        RootSum,
        SharedReLU,
        RESIDUAL_NETS["out += x"],
    ],
)
def test_detach_restores_the_network_bit_for_bit(make, training):
    torch.manual_seed(0)
    model = make().train(training)
    keys, twin, x = list(model.state_dict()), copy.deepcopy(model), images(3, 16)
    own_calls = []
    model.register_forward_hook(lambda *_: own_calls.append(1))
    quiet(model, image_size=16)
    assert any("metaperturb" in key for key in model.state_dict())
    assert detach(model) is model
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), twin(x))
    assert own_calls  # the user's own hook is still there
    for module in model.modules():
        own = module is model
        assert len(module._forward_hooks) == own and not module._forward_pre_hooks
        assert not module._forward_hooks_always_called
    for module, untouched in zip(model.modules(), twin.modules(), strict=True):
        assert type(module) is type(untouched) and vars(module).keys() == vars(untouched).keys()
    assert detach(model) is model  # nothing attached: nothing to do
    quiet(model, image_size=16)  # and it may be attached anew
    assert not torch.equal(seeded(model, x), twin(x))


def test_the_networks_parameters_do_not_include_phi():
    phi = MetaPerturb()
    model = models.create("resnet8", 5, 16)
    count = sum(p.numel() for p in model.parameters())
    quiet(model, phi, image_size=16)
    assert sum(p.numel() for p in model.parameters()) == count
    identities = {id(p) for p in model.parameters()}
    assert not any(id(p) in identities for p in phi.parameters())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in phi.parameters()]
    model(images(4, 16)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, phi.parameters(), strict=True))
    model.requires_grad_(False)  # θ constant, φ not
    assert all(p.requires_grad for p in phi.parameters())


@pytest.mark.parametrize("after", [False, True])
def test_moving_the_network_moves_sites_and_phi(after):
    phi = MetaPerturb()
    model = models.create("resnet8", 5, 16)
    model = quiet(model, phi, image_size=16).double() if after else quiet(model.double(), phi, image_size=16)
    assert model(images(2, 16).double()).dtype == torch.float64
    if after:
        moved = [phi.flat, *(site.running_mean for site in model.metaperturb.sites)]
        assert all(tensor.dtype == torch.float64 for tensor in moved)


def test_one_line_on_stderr_names_the_sites(capsys):
    attach(models.create("conv4", 5, 32), MetaPerturb(), image_size=32)
    attach(models.create("resnet20", 5, 32), MetaPerturb(), image_size=32)
    captured = capsys.readouterr()
    assert captured.out == ""
    plain, residual = captured.err.splitlines()
    assert "4 sites" in plain and all(f"layers.{i}" in plain for i in range(4))
    assert "9 sites" in residual and "layer1.0" in residual and "layer3.2" in residual
    quiet(models.create("conv4", 5, 32))
    assert capsys.readouterr().err == ""


def test_settings_of_all_sites():
    model = quiet(models.create("resnet8", 5, 16), image_size=16, clip=None, gate=False)
    everywhere = [model.metaperturb, *model.metaperturb.sites]
    assert all((one.noise, one.gate, one.clip, one.strength) == (True, False, None, 1.0) for one in everywhere)
    model.metaperturb.strength, model.metaperturb.clip, model.metaperturb.clip_eval = 0.25, 3.0, True
    assert all((one.strength, one.clip, one.clip_eval) == (0.25, 3.0, True) for one in everywhere)
    with pytest.raises(ValueError):
        model.metaperturb.strength = 1.5
    for name in ("noise", "gate"):
        with pytest.raises(AttributeError):
            setattr(model.metaperturb, name, True)


# --- saving


@pytest.mark.parametrize("make", [lambda: models.create("resnet8", 5, 16), RootSum, SharedReLU])
@pytest.mark.parametrize("through_file", [False, True])
def test_state_dict_round_trip_gives_the_same_logits(make, through_file, tmp_path):
    torch.manual_seed(0)
    model = quiet(make(), image_size=16)
    with torch.no_grad():
        for p in model.metaperturb.phi.parameters():
            p.add_(0.3 * torch.randn_like(p))
        for seed in range(3):
            model(images(4, 16, seed))
    x = images(3, 16, 9)
    expected = seeded(model.eval(), x, seed=5)
    state = copy.deepcopy(model.state_dict())
    if through_file:
        torch.save(model.state_dict(), tmp_path / "model.pt")
        state = torch.load(tmp_path / "model.pt", weights_only=True)
    fresh = quiet(make(), MetaPerturb(), image_size=16).eval()
    assert not torch.equal(seeded(fresh, x, seed=5), expected)
    fresh.load_state_dict(state)
    assert torch.equal(seeded(fresh, x, seed=5), expected)
    assert fresh.metaperturb.phi is not model.metaperturb.phi
    assert not torch.equal(seeded(fresh, x, seed=6), expected)  # the noise is still drawn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("usage", [{"clip": 2.0, "paper": True, "clip_eval": True}, {"clip": 2.0}, {"clip": None}])
def test_a_reloaded_network_has_the_settings_of_the_saved_one(usage, dtype):
    x = 3 * images(4, 16).to(dtype)
    model, fresh = (
        quiet(models.create("resnet8", 5, 16).to(dtype), MetaPerturb().to(dtype), image_size=16, **options).eval()
        for options in (usage, {"clip": 0.01, "paper": True})
    )
    for strength in (0.3, 0.0, 1.0):
        model.metaperturb.strength = strength
        fresh.load_state_dict(model.state_dict())
        assert fresh.metaperturb.strength == pytest.approx(strength)
        assert fresh.metaperturb.current()[1:] == model.metaperturb.current()[1:]
        assert torch.equal(seeded(fresh, x), seeded(model, x))


@pytest.mark.parametrize("part", ["noise", "gate"])
def test_a_state_with_another_part_of_φ_is_refused(part):
    state = quiet(models.create("resnet8", 5, 16), image_size=16, **{part: False}).state_dict()
    with pytest.raises(UserError, match=f"saved with {part}=False, the network was attached with True"):
        quiet(models.create("resnet8", 5, 16), image_size=16).load_state_dict(state)


def test_a_child_of_the_networks_own_is_not_replaced():
    model = models.create("resnet8", 5, 16)
    model.metaperturb = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="ResNet has a 'metaperturb' of its own"):
        quiet(model, image_size=16)
    assert isinstance(model.metaperturb, torch.nn.Linear) and not any(m._forward_hooks for m in model.modules())


def test_state_dict_does_not_alias_phi():
    model = quiet(models.create("resnet8", 5, 16), image_size=16)
    state = model.state_dict()
    (key,) = [key for key in state if key.endswith("shared._extra_state")]
    kept = state[key].clone()
    with torch.no_grad():
        model.metaperturb.phi.self1.add_(1)
    assert torch.equal(state[key], kept)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("make", [lambda: models.create("resnet8", 5, 16), RootSum, RESIDUAL_NETS["out += x"]])
def test_a_copy_is_independent(make, copied):
    torch.manual_seed(0)
    model = quiet(make(), image_size=16, paper=True)
    model(images(4, 16))
    clone = copied(model)
    x = images(2, 16, 3)
    assert torch.equal(seeded(model.eval(), x), seeded(clone.eval(), x))
    assert clone.metaperturb.phi is not model.metaperturb.phi
    assert {id(site.phi) for site in clone.metaperturb.sites} == {id(clone.metaperturb.phi)}
    statistics = [site.running_mean.clone() for site in model.metaperturb.sites]
    moved = [site.running_mean.clone() for site in clone.metaperturb.sites]
    clone.train()(x)
    assert all(torch.equal(a, s.running_mean) for a, s in zip(statistics, model.metaperturb.sites, strict=True))
    assert not any(torch.equal(a, s.running_mean) for a, s in zip(moved, clone.metaperturb.sites, strict=True))
    clone.eval().metaperturb.strength = 0.0
    assert model.metaperturb.strength == 1.0
    assert not torch.equal(seeded(model, x), seeded(clone, x))
    expected = seeded(model, x)
    detach(clone)
    assert torch.equal(seeded(model, x), expected)


def test_one_phi_in_two_networks():
    phi = MetaPerturb()
    first = quiet(models.create("resnet8", 5, 16), phi, image_size=16)
    second = quiet(models.create("conv4", 5, 16), phi, image_size=16)
    assert first.metaperturb.phi is second.metaperturb.phi is phi
    first(images(2, 16)).sum().backward()
    gradient = phi.flat.grad.clone()
    second(images(2, 16)).sum().backward()
    assert not torch.equal(phi.flat.grad, gradient)
    assert all((site.running_mean != 0).any() for m in (first, second) for site in m.metaperturb.sites)
    detach(first)
    assert second.metaperturb.phi is phi


# --- named sites


def test_named_sites():
    model = models.create("resnet20", 5, 32)
    chosen = [spec.name for spec in find_sites(model, 32)]
    assert len(chosen) == 9
    quiet(model, sites=["layer3.2", "layer2.0"])
    assert site_names(model) == ["layer2.0", "layer3.2"]  # in the order in which the network runs them
    assert {s.channel_norm for s in model.metaperturb.sites} == {64}
    detach(model)
    quiet(model, sites=["layer2.0"])
    assert model.metaperturb.sites[0].channel_norm == 32  # the widest perturbed layer, which need not be the last
    wide = nn.Sequential(conv(3, 9), nn.ReLU(), conv(9, 12), nn.ReLU(), conv(12, 4), nn.ReLU(), Head(4))
    assert [site.channel_norm for site in quiet(wide, image_size=16).metaperturb.sites] == [12, 12, 12]
    detach(model)
    quiet(model, sites=chosen)
    assert site_names(model) == chosen


def test_named_modules_that_would_not_be_found():
    model = quiet(NormPlain(), image_size=16, sites=["bn2", "conv1"])
    assert site_names(model) == ["conv1", "bn2"]
    plain = quiet(network("resnet18"), sites=["bn1", "layer1.0.bn1", "layer4.1"])
    received = record_inputs(plain)
    with torch.no_grad():
        plain.eval()(images())
    assert [h.shape[1] for _, h in received] == [64, 64, 512]
    assert all((h < 0).any() for _, h in received)


# --- places

PLACES = {
    "resnet20": (
        ["layer1.0", "layer1.1", "layer1.2"],
        ["layer3.0", "layer3.1", "layer3.2"],
        "layer1.2 layer2.2 layer3.2",
    ),
    "resnet8": (["layer1.0"], ["layer3.0"], "layer1.0 layer2.0 layer3.0"),
    "wrn_28_2": ([f"layer1.{i}" for i in range(4)], [f"layer3.{i}" for i in range(4)], "layer1.3 layer2.3 layer3.3"),
    "vgg9": (["layers.0"], ["layers.6", "layers.7"], "layers.0 layers.1 layers.3 layers.5 layers.7"),
    "conv4": (["layers.0"], ["layers.3"], "layers.0 layers.1 layers.2 layers.3"),
    "resnet18": (["layer1.0", "layer1.1"], ["layer4.0", "layer4.1"], "layer1.1 layer2.1 layer3.1 layer4.1"),
}


@pytest.mark.parametrize("name", PLACES)
def test_places_of_ablations(name):
    """By the names of the layers: what comes before each max pooling or strided block, and the ends."""
    found = find_sites(models.create(name, 5, 32), 32)
    bottom, top, before_pooling = PLACES[name]
    assert choose_sites(found, "all") == found
    for where, expected in (("bottom", bottom), ("top", top), ("before_pooling", before_pooling.split())):
        assert [spec.name for spec in choose_sites(found, where)] == expected


def test_a_site_computes_the_same_wherever_else_phi_acts():
    model = models.create("resnet8", 5, 16)
    phi = MetaPerturb()
    everywhere = quiet(copy.deepcopy(model), phi, image_size=16).eval()
    bottom = quiet(copy.deepcopy(model), phi, 16, "bottom").eval()
    assert site_names(bottom) == ["layer1.0"]
    h = torch.randn(4, 16, 16, 16)
    noise = torch.randn_like(h)
    first, alone = everywhere.metaperturb.sites[0], bottom.metaperturb.sites[0]
    assert first.channel_norm == alone.channel_norm == 64
    assert torch.equal(first(h, noise=noise), alone(h, noise=noise))


def test_a_place_is_a_word_and_a_name_is_in_a_list():
    model = nn.Sequential(OrderedDict(bottom=conv(3, 4), act=nn.ReLU(), top=conv(4, 6), end=nn.ReLU(), head=Head(6)))
    assert site_names(quiet(copy.deepcopy(model), image_size=16, sites="all")) == ["bottom", "top"]
    assert site_names(quiet(copy.deepcopy(model), image_size=16, sites="before_pooling")) == [
        "top"
    ]  # one size, one stage
    assert site_names(quiet(copy.deepcopy(model), image_size=16, sites=["bottom"])) == ["bottom"]
    assert site_names(quiet(copy.deepcopy(model), image_size=16, sites="bottom")) == ["bottom", "top"]
    with pytest.raises(UserError, match="unknown place") as error:
        choose_sites(find_sites(model, 16), "middle")
    one_line(error)


# --- what it refuses


def refused(model, image_size=32, sites=None, phi=None, **options):
    training, keys = model.training, list(model.state_dict())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with pytest.raises(UserError) as error:
        attach(model, phi or MetaPerturb(), image_size, sites, verbose=False, **options)
    assert model.training == training and list(model.state_dict()) == keys
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    return one_line(error)


resnet8 = functools.partial(models.create, "resnet8", 5, 32)
REFUSED = {
    "unknown name": (
        resnet8,
        {"sites": ["layer2.0", "layer1.9"]},
        "'layer1.9' is neither a place nor a module.*layer1.0",
    ),
    "no feature map": (resnet8, {"sites": ["fc"]}, "'fc'"),
    "a name twice": (resnet8, {"sites": ["layer1.0", "layer1.0"]}, "none twice"),
    "no name": (resnet8, {"sites": []}, "at least one"),
    "a place misspelt": (resnet8, {"sites": "topp"}, "near: top"),
    "another": (resnet8, {"sites": "before_poling"}, "near: before_pooling"),
    "nothing of φ": (resnet8, {"noise": False, "gate": False}, "noise=False and gate=False"),
    "a name as φ": (resnet8, {"phi": "tiny_imagenet_resnet20"}, "load_phi"),
    "no convolution": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU()), {}, "Conv2d"),
    "no images": (lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), Head(4)), {}, "no nn.Conv2d"),
    "a classifier": (lambda: nn.Sequential(conv(3, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten()), {}, r"sites=\["),
    "images too small": (lambda: network("vgg11"), {"image_size": 8}, r"\[2, 3, 8, 8\].*image_size"),
    "images too large": (lambda: network("conv4"), {"image_size": 64}, "image_size"),
    "attached": (lambda: quiet(resnet8()), {}, "detach"),
    "attached in part": (lambda: nn.Sequential(quiet(RootSum()), nn.Linear(5, 2)), {}, "attached already"),
    **{
        f"size {size!r}": (resnet8, {"image_size": size}, "image_size")
        for size in [(16, 16.0), 16.0, "16", -1, 0, None, (16, 0), (8, 8, 8)]
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    make, options, said = REFUSED[name]
    model = make()
    assert re.search(said, refused(model, **options))
    detach(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "metaperturb") for m in model.modules())


class TwoSlots(nn.Module):
    """Two places in one module, as children or in a list."""

    def __init__(self, listed: bool):
        super().__init__()
        self.conv1, self.conv2, self.head = conv(3, 4), conv(4, 6), Head(6)
        self.slots = nn.ModuleList([metaperturb.Slot(), metaperturb.Slot()])
        if not listed:
            self.slot1, self.slot2 = self.slots
            del self.slots

    def forward(self, x):
        first, second = self.slots if hasattr(self, "slots") else (self.slot1, self.slot2)
        return self.head(F.relu(second(self.conv2(F.relu(first(self.conv1(x)))))))


@pytest.mark.parametrize("listed", [False, True])
def test_several_slots_in_one_module(listed):
    model = quiet(TwoSlots(listed), image_size=16)
    assert site_names(model) == (["slots.0", "slots.1"] if listed else ["slot1", "slot2"])
    received = record_inputs(model)
    model(images(2, 16))
    assert [list(h.shape) for _, h in received] == [[2, 4, 16, 16], [2, 6, 16, 16]]
    assert not any(m._forward_hooks for m in detach(model).modules())


class Reused(nn.Module):
    """One module at two places, between convolutions of their own."""

    def __init__(self, shared: nn.Module, widths: tuple[int, int]):
        super().__init__()
        self.conv1, self.conv2, self.head = conv(3, widths[0]), conv(*widths), Head(widths[1])
        self.shared = shared

    def forward(self, x):
        return self.head(F.relu(self.shared(self.conv2(F.relu(self.shared(self.conv1(x)))))))


def test_a_module_that_runs_at_two_places():
    """Its site would mix the statistics of two maps."""
    for shared, widths in ((nn.BatchNorm2d(4), (4, 4)), (metaperturb.Slot(), (4, 4)), (metaperturb.Slot(), (4, 6))):
        assert "'shared' runs 2 times a pass" in refused(Reused(shared, widths), 16)
    assert "'relu' runs 3 times a pass" in refused(SharedReLU(), 16, sites=["relu"])
    assert site_names(quiet(Reused(nn.BatchNorm2d(4), (4, 4)), image_size=16, sites=["conv1"])) == ["conv1"]


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "OptimizedModule": torch.compile,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_network_inside_a_wrapper_is_meant(name):
    with pytest.raises(UserError) as error:
        quiet(WRAPPERS[name](models.create("resnet8", 5, 16)), image_size=16)
    assert f"{name} wraps a network" in one_line(error)
    model = models.create("resnet8", 5, 16)
    wrapped = WRAPPERS[name](quiet(model, image_size=16))
    with pytest.raises(UserError, match="attached already"):
        quiet(wrapped, image_size=16)
    inside = detach(wrapped)._orig_mod if name == "OptimizedModule" else detach(wrapped).module
    assert not hasattr(inside, "metaperturb")
    assert all(torch.equal(inside(x), inside(x)) for x in [images(2, 16)])  # no noise


class Noisy(nn.Module):
    """Adds noise in training, which is a sum of two maps of one shape."""

    def __init__(self, inside: bool):
        super().__init__()
        self.conv, self.inside = conv(4, 4), inside

    def forward(self, x):
        shortcut = x
        if self.training and self.inside:
            x = x + torch.randn_like(x)
        return F.relu(self.conv(x) + shortcut)


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn"])
def test_a_module_that_was_replaced_after_attach_is_told(name):
    model, x = quiet(network(name)), images()
    model.train()(x)
    copied = copy.deepcopy(model)
    if name == "resnet18":
        model.layer4[1] = type(copied.layer4[1])(512, 512)
    else:
        for i in range(len(model.features)):
            if isinstance(model.features[i], nn.ReLU):
                model.features[i] = nn.ReLU()
    with pytest.raises(UserError) as error:
        model(x)
    assert ("'layer4.1' (1 in all)" if name == "resnet18" else "'features.2' (8 in all)") in one_line(error)
    detach(model)(x)
    copied(x)  # has all its modules


# --- errors while it runs


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_blocks_gives_the_gradient_and_of_their_parts_is_refused(reentrant):
    class Checkpointed(Block):
        def __init__(self):
            super().__init__(4, torch.add)
            self.part = False

        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=reentrant) if self.part else super().forward(x)

    torch.manual_seed(0)
    (block,) = quiet(Residual(Checkpointed, blocks=1)).blocks
    start = torch.randn(2, 4, 8, 8)

    def gradient(run):
        torch.manual_seed(0)
        x = start.clone().requires_grad_()
        run(x).square().sum().backward()
        return x.grad

    torch.testing.assert_close(gradient(lambda x: checkpoint(block, x, use_reentrant=reentrant)), gradient(block))
    block.part = True
    with pytest.raises(UserError) as error:
        gradient(block)
    assert "checkpoint whole blocks" in one_line(error)


def test_a_replica_of_data_parallel_is_refused():
    for model in (quiet(models.create("resnet8", 5, 16), image_size=16), quiet(RootSum(), image_size=16)):
        for module in model.modules():
            module._is_replica = True  # as on each of several GPUs
        with pytest.raises(UserError) as error:
            model(images(2, 16))
        assert "DistributedDataParallel" in one_line(error)


@pytest.mark.parametrize("make", [RootSum, RESIDUAL_NETS["out + x"], SharedReLU])
def test_after_an_error_in_the_forward_all_is_as_before(make):
    model, x = quiet(make(), image_size=16).eval(), images(2, 16)
    expected = seeded(model, x)

    def fail(module, args, output):
        raise RuntimeError("on purpose")

    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for module in (convolutions[0], convolutions[-1]):
        handle = module.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(x)
        handle.remove()
    assert torch.equal(seeded(model, x), expected)


def test_layers_declared_in_another_order_than_called():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 4)
            self.body = nn.Conv2d(16, 16, 3, padding=1)
            self.stem = nn.Conv2d(3, 16, 3, padding=1)

        def forward(self, x):
            return self.fc(self.body(self.stem(x).relu()).relu().mean((2, 3)))

    assert [spec.name for spec in find_sites(Reversed(), 16)] == ["stem", "body"]


# --- importing


def test_importing_the_library_leaves_signals_as_they_are(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    for arguments in ([], ["metaperturb.meta_train"]):
        monkeypatch.setattr(sys, "argv", ["-m", *arguments])  # as while Python imports a package for -m
        monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "mine.train", *arguments])
        check_command_line()
        assert signal.getsignal(signal.SIGINT) is before


class Dropped(nn.Module):
    """Residual blocks that training leaves out by chance, as modules or in the network's own forward."""

    def __init__(self, inlined: bool):
        super().__init__()
        self.stem, self.head, self.inlined = conv(3, 4), Head(4), inlined
        self.blocks = nn.ModuleList(Noisy(False) if not inlined else conv(4, 4) for _ in range(3))
        self.dropped: set[int] = set()

    def forward(self, x):
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            if not (self.training and i in self.dropped):
                x = block(x) + x if self.inlined else block(x)
        return self.head(x)


def test_layers_dropped_at_random():
    blocks = quiet(Dropped(inlined=False), image_size=8)
    blocks.dropped = {1}
    received = record_inputs(blocks.train())
    blocks(images(2, 8))
    assert [site for site, _ in received] == [blocks.metaperturb.sites[i] for i in (0, 2)]

    inlined = quiet(Dropped(inlined=True), image_size=8)
    inlined.train()(images(2, 8))
    inlined.dropped = {0}
    received = record_inputs(inlined)
    inlined(images(2, 8))
    assert len(received) == len(inlined.metaperturb.sites)


def test_a_block_that_does_nothing_in_a_step():
    class Skipping(Noisy):
        def forward(self, x):
            return x if self.training else super().forward(x)

    model = quiet(Residual(lambda: Skipping(False)), image_size=8)
    assert site_names(model) == ["blocks.0", "blocks.1"]
    model.train()(images(2, 8))


class Pair(nn.Module):
    """A block of an encoder: its feature map, and the same for a decoder."""

    def __init__(self):
        super().__init__()
        self.conv = conv(4, 4)

    def forward(self, x):
        x = F.relu(self.conv(x) + x)
        return x, x


class Encoder(nn.Module):
    def __init__(self, result):
        super().__init__()
        self.stem, self.block1, self.block2, self.head, self.result = conv(3, 4), Pair(), Pair(), Head(4), result

    def forward(self, x):
        x, skip = self.block1(F.relu(self.stem(x)))
        x, _ = self.block2(x)
        return self.result(self.head(x + skip))


@pytest.mark.parametrize(
    "result", [lambda y: y, lambda y: (y,), lambda y: {"logits": y}], ids=["plain", "tuple", "dict"]
)
def test_blocks_that_return_several_values(result):
    model = quiet(Encoder(result), image_size=8)
    assert site_names(model) == ["block1", "block2", "head"]
    received = record_inputs(model.train())
    model(images(2, 8))
    assert [site for site, _ in received] == model.metaperturb.sites
    assert site_names(quiet(Encoder(result), image_size=8, sites=["block2"])) == ["block2"]


def test_what_the_network_returns_is_no_site():
    class Restored(nn.Module):
        """An image plus what its blocks add to it."""

        def __init__(self):
            super().__init__()
            self.stem, self.block, self.tail = conv(3, 4), Noisy(False), conv(4, 3)

        def forward(self, x):
            return x + self.tail(self.block(self.stem(x)))

    assert site_names(quiet(Restored(), image_size=8)) == ["block"]

    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.boxes, self.classes = conv(3, 4), conv(4, 8), conv(4, 5)

        def forward(self, x):
            x = F.relu(self.body(x))
            return {"boxes": self.boxes(x), "classes": self.classes(x)}

    assert site_names(quiet(TwoHeads(), image_size=8)) == ["body"]


def test_phi_cannot_be_exchanged():
    model = quiet(models.create("resnet8", 5, 16), image_size=16)
    parameters, state = list(model.parameters()), model.state_dict().keys()
    for module in (model.metaperturb, model.metaperturb.sites[0]):
        with pytest.raises(AttributeError, match="cannot be exchanged"):
            module.phi = MetaPerturb()
    assert len(list(model.parameters())) == len(parameters) and model.state_dict().keys() == state


def test_networks_of_torch_fx():
    traced = quiet(torch.fx.symbolic_trace(Residual(lambda: Noisy(False)).eval()), image_size=8).eval()
    before = seeded(traced, images(2, 8))
    assert not torch.equal(before, seeded(traced, images(2, 8), seed=1))
    assert torch.equal(before, seeded(copy.deepcopy(traced), images(2, 8)))


def test_loading_into_nothing():
    saved = quiet(models.create("resnet8", 5, 16), image_size=16).state_dict()
    with torch.device("meta"):
        model = quiet(models.create("resnet8", 5, 16), image_size=16)
    with pytest.raises(UserError, match="to_empty"):
        model.load_state_dict(saved, assign=True)
    model.to_empty(device="cpu").load_state_dict(saved)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_slots_in_a_network_of_functions():
    class Functions(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.slot, self.head = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Identity(), Head(4)

        def forward(self, x):
            return self.head(F.relu(self.slot(F.conv2d(x, self.weight, padding=1))))

    model = Functions()
    assert "put a metaperturb.Slot()" in refused(model, 8)
    model.slot = metaperturb.Slot()
    assert site_names(quiet(model, image_size=8)) == ["slot"]


# --- any CNN: finite, sound places, state where it acts, never lost silently


def acts(network, x):
    with torch.no_grad():
        return not torch.equal(network(x), network(x))


def foreach(f, x):
    torch._foreach_add_([f], [x])
    return f


SUMS = {
    "addcmul": lambda f, x: torch.addcmul(x, torch.full_like(f, 0.5), f),
    "lerp": lambda f, x: torch.lerp(x, f, 0.3),
    "stack": lambda f, x: torch.stack([f, x]).sum(0),
    "minus": lambda f, x: x - (-f),
    "foreach": foreach,
    "chain": lambda f, x: f.add_(x).add_(2 * x).add_(f),
    "three": lambda f, x: x + (2 * x + f),
    "a sum of a sum": lambda f, x: (f + x) + F.avg_pool2d(f + x, 3, 1, 1),
    "addcdiv": lambda f, x: torch.addcdiv(x, f, torch.full_like(f, 2.0)),
    "index_add": lambda f, x: x.index_add(0, torch.arange(len(x), device=x.device), f),
    "a part of the channels": lambda f, x: (f[:, :2].add_(x[:, :2]), f)[1],
    "[B, H, W, C]": lambda f, x: (f.permute(0, 2, 3, 1) + x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_counts_once_however_it_is_written(name):
    model = quiet(Residual(lambda: Block(4, SUMS[name])), image_size=16)
    assert site_names(model) == ["blocks.0", "blocks.1"]
    constant_sites(model)
    with torch.no_grad():
        assert (model.blocks(torch.randn(2, 4, 8, 8)) == CONSTANT).all()


def test_what_is_finite_in_training_is_finite_in_evaluation():
    """In the paper's arithmetic z grows with h, so that what is large would be squared from site to site."""
    phi = MetaPerturb()
    with torch.no_grad():
        phi.flat.fill_(1.0)
    h = torch.cat([torch.linspace(-1e9, 1e9, 64), torch.tensor([-3.0, 0.0, 3.0])]).reshape(1, 1, 1, 67)
    free, bounded, paper = (
        quiet(Residual(lambda: Block(4, torch.add)), phi, image_size=16, **options).metaperturb.sites[0]
        for options in ({}, {"clip": 100.0}, {"paper": True})
    )
    for mode in (True, False):
        x = h.repeat(2, 4, 1, 1)
        for _ in range(20):  # sites
            x = free.train(mode)(x)
        assert x.isfinite().all() and (x.abs() > 1e6).any()  # what is large is not cut either
        assert bounded.train(mode)(x).abs().max() == 100.0
    assert paper.eval()(torch.full((2, 4, 4, 4), 90.0)).max() > 100.0  # as in the paper's evaluation


def test_the_arithmetic_is_that_of_the_paper_where_a_network_says_its_places():
    user, zoo = Residual(lambda: Block(4, torch.add)), models.create("resnet20", 5, 32)
    assert not quiet(user, image_size=32).metaperturb.paper
    assert quiet(zoo, image_size=32).metaperturb.paper and zoo.metaperturb.amplitude == 1.0
    assert quiet(detach(user), image_size=32, noise=False).metaperturb.paper  # an ablation of it
    with pytest.raises(UserError, match="need paper=True"):
        quiet(detach(user), image_size=32, noise=False, paper=False)
    quiet(detach(zoo), image_size=32, paper=False)
    assert zoo.metaperturb.amplitude == 1.0 and zoo.metaperturb.clip is None  # φ was meta-trained in this one
    deeper = quiet(models.create("resnet44", 5, 32), image_size=32, paper=False)
    assert deeper.metaperturb.amplitude == pytest.approx((3 / 7) ** 0.5)  # seven blocks where that has three
    half = quiet(models.create("resnet20", 5, 16), image_size=16, paper=False)
    assert half.metaperturb.amplitude == pytest.approx(0.5)  # a quarter of the pixels


@pytest.mark.parametrize("name", ["vit_b_16", "swin_t"])
def test_networks_of_tokens_are_refused(name):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=5)
    assert "cuts the image into patches" in refused(model, 224)


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [("maxvit_t", 224, 11), ("densenet121", 64, 4), ("shufflenet_v2_x1_0", 64, 16), ("inception_v3", 96, 11)],
)
def test_sites_of_other_families(name, size, count):
    with torch.device("meta"):
        specs = find_sites(models.create(name, 5, size), size)
    assert len(specs) == count and not any("attention" in spec.name for spec in specs)


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn"])
def test_a_part_has_the_state_of_its_sites(name):
    model = quiet(network(name))
    part = nn.Sequential(*list(model.children())[:-1]).eval()
    statistics = [site.running_mean.clone() for site in model.metaperturb.sites]
    assert acts(part, images(2)) and acts(part, images(1))
    assert all(not site.training for site in model.metaperturb.sites)
    assert all(torch.equal(a, s.running_mean) for a, s in zip(statistics, model.metaperturb.sites, strict=True))
    assert sum("running_mean" in key and "metaperturb" in key for key in part.state_dict()) == 8
    detach(model)
    assert not acts(part, images(2))


def test_an_average_has_the_strength_of_the_network():
    swa = torch.optim.swa_utils
    for options in ({}, {"multi_avg_fn": swa.get_ema_multi_avg_fn(0.9), "use_buffers": True}):
        model = quiet(models.create("resnet8", 5, 16), image_size=16)
        model.metaperturb.strength = 0.1
        average, kept = swa.AveragedModel(model, **options), copy.deepcopy(model)
        for strength in (0.1, 0.5, 0.75):
            model.metaperturb.strength = strength
            average.update_parameters(model)
        assert average.module.metaperturb.strength == 0.75 and kept.metaperturb.strength == 0.1
    states = [quiet(models.create("resnet8", 5, 16), image_size=16).state_dict() for _ in range(10)]
    mean = {key: sum(0.1 * state[key] for state in states) for key in states[0]}
    kept.load_state_dict(mean)
    assert kept.metaperturb.strength == 1.0


@pytest.mark.parametrize("make", [NormPlain, FunctionalPlain, lambda: network("vgg11_bn")])
def test_fusing_and_quantizing_keep_phi_or_say_that_they_do_not(make):
    model, x = quiet(make().eval()), images(16)
    assert acts(torch.fx.experimental.optimization.fuse(model), x)
    fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    prepared = fx.prepare_fx(copy.deepcopy(model), torch.ao.quantization.get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    assert acts(fx.convert_fx(prepared), x)
    if isinstance(model, torchvision.models.VGG):
        with pytest.raises(AssertionError, match="with a site of φ: fuse before attach"):
            torch.ao.quantization.fuse_modules(model, ["features.0", "features.1", "features.2"])
    with pytest.raises(UserError, match="gradients of single ones"):
        call_for_per_sample_grads(model.train())(x)


def test_a_layer_that_covers_the_whole_map_is_no_convolution():
    fully = nn.Sequential(conv(3, 4, 4), nn.ReLU(), nn.Conv2d(4, 6, 4), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.ReLU())
    assert site_names(quiet(nn.Sequential(*fully, nn.Flatten(), nn.Linear(6, 5)), image_size=16)) == ["0"]


def test_a_sequence_that_collects_what_its_children_give():
    class Collecting(nn.Sequential):
        """As in VoVNet: one child more would be one map more."""

        def forward(self, x):
            maps = [x]
            for layer in self:
                maps.append(layer(maps[-1]))
            return torch.cat(maps, 1)

    blocks = nn.Sequential(Collecting(conv(3, 4), conv(4, 4)), conv(11, 4), Collecting(conv(4, 4)), conv(8, 4), Head(4))
    model = quiet(blocks, image_size=16)
    assert site_names(model) == ["0", "2"]
    received = record_inputs(model)
    model(images(2, 16))
    assert [h.shape[1] for _, h in received] == [11, 8]
    stages = nn.Sequential(*(nn.Sequential(conv(c, 4), Collecting(conv(4, 4))) for c in (3, 8)), Head(8))
    stages = quiet(stages, image_size=16).eval()  # RDNet: the features alone have all sites
    received = record_inputs(stages)
    stages[:2](images(2, 16))
    assert len(received) == len(stages.metaperturb.sites) == 2 and acts(torch.fx.symbolic_trace(stages), images(2, 16))
    assert torch.equal(seeded(copy.deepcopy(stages), images(2, 16)), seeded(stages, images(2, 16)))


def test_channels_that_are_written_into_one_map():
    class Slices(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.bn = conv(3, 4), conv(3, 4), nn.BatchNorm2d(8)

        def forward(self, x):
            out = torch.empty(len(x), 8, *x.shape[2:], device=x.device)
            out[:, :4], out[:, 4:] = self.a(x), self.b(x)
            return self.bn(F.relu(out)).relu()

    assert site_names(quiet(nn.Sequential(Slices(), Head(8)), image_size=16)) == ["0.bn"]


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn"])
def test_traces_keep_phi(name):
    model, x = quiet(network(name).eval()), images(2)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(seeded(traced, x), seeded(model, x)) and acts(copy.deepcopy(traced), x)
    assert acts(torch.fx.symbolic_trace(torch.fx.experimental.optimization.fuse(model)), x)
    assert acts(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)), x)
    extract = torchvision.models.feature_extraction.create_feature_extractor
    extractor = extract(model.train(), {"avgpool": "y"}).eval()
    assert acts(lambda x: extractor(x)["y"], x) and not model.metaperturb.sites[0].training
    with pytest.raises(UserError, match=r"torch.jit.script"):
        torch.jit.script(model)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_keep_phi(strict):
    model, x = quiet(RESIDUAL_NETS["out += x"]().eval()), images(2)
    assert acts(torch.export.export(model, (x,), strict=strict).module(), x)


def test_single_images():
    model = quiet(Residual(lambda: Block(4, torch.add)), image_size=16).train()
    statistics = model.metaperturb.sites[0].running_mean.clone()
    model(images(1, 16)).sum().backward()
    assert torch.equal(statistics, model.metaperturb.sites[0].running_mean)
    with pytest.raises(UserError, match="no gradients of single ones"):
        parameters = dict(model.named_parameters())
        per_image = torch.func.grad(lambda p, x: torch.func.functional_call(model, p, (x[None],)).sum())
        torch.func.vmap(per_image, in_dims=(None, 0), randomness="different")(parameters, images(2, 16))


def test_networks_that_take_more_than_a_square_image():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.cnn, self.head = Residual(lambda: Block(4, torch.add)), nn.Linear(7, 2)

        def forward(self, image, table):
            return self.head(torch.cat([self.cnn(image), table], 1))

    assert "attach to its part 'cnn'" in refused(Two(), 16)
    model = attach(Two(), MetaPerturb(), example=(torch.zeros(2, 3, 24, 16), torch.zeros(2, 2)), verbose=False)
    assert site_names(model) == ["cnn.blocks.0", "cnn.blocks.1"] and model.metaperturb.sites[0].size_norm == 24
    fixed = nn.Sequential(conv(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16 * 8, 2))
    assert "(height, width)" in refused(fixed, 16)
    assert quiet(fixed, image_size=(16, 8)).metaperturb.specs[0].size == (16, 8)
    with pytest.raises(UserError, match="run the network once"):
        quiet(nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU()), image_size=16)


def test_a_compiled_network_is_a_wrapper():
    model, x = NormPlain().eval(), images(2, 16)
    compiled = torch.compile(model, backend="eager")
    assert not acts(compiled, x)
    quiet(model, image_size=16)
    assert acts(compiled, x)  # what was compiled before attach is compiled anew
    detach(model)
    model.compile()
    assert "before that" in refused(model, 16)


def test_the_panel_goes_on_where_it_stopped(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("panel", ROOT / "scripts" / "panel.py")
    panel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(panel)
    out = ["--out", str(tmp_path / "panel"), "--sizes"]
    with warnings.catch_warnings():
        panel.main(["--only", "squeezenet1_1", *out, "8", "32"])
        panel.main(["--only", "squeezenet1_1", "resnet8", "convnext_large", "squeezenet1_0", *out, "8"])
    said = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["squeezenet1_1:", "resnet8:", "convnext_large:", "squeezenet1_0:"]
    rows = (tmp_path / "panel.md").read_text().splitlines()[-4:]
    assert rows[:2] == [r"| squeezenet1_1 | 32 | 8 | features.\* | ok |", r"| resnet8 | 8 | 3 | layer\*.\* | ok |"]
    assert "more than 60 M parameters" in rows[2] and "refused: SqueezeNet: does not run" in rows[3]
