"""Where `attach` puts the sites, what it leaves alone, and what it refuses.

Where the sites act is checked from outside: the test replaces what every site returns by a constant, or computes by
hand the feature map that a site should receive.
"""

import copy
import functools
import importlib.util
import io
import operator
import pickle
import signal
import sys
import warnings
from collections import OrderedDict
from unittest.mock import Mock

import pytest
import torch
import torch.fx.experimental.optimization
import torch.nn.functional as F
import torchvision
import torchvision.models.feature_extraction
from conftest import ROOT
from image_files import refused
from torch import nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.utils.checkpoint import checkpoint

import metaperturb
from metaperturb import MetaPerturb, attach, detach, find_sites, models
from metaperturb.early import check_command_line
from metaperturb.sites import choose_sites

CONSTANT = 7.0
SMALL = functools.partial(models.create, "resnet8", 5, 16)


def quiet(model, phi=None, image_size=16, sites=None, **options):
    return attach(model, phi or MetaPerturb(), image_size, sites, verbose=False, **options)


def site_names(model):
    return [spec.name for spec in model.metaperturb.specs]


def images(batch=2, size=16, seed=0):
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


def site_inputs(model, behind):
    """What each site gets, which is checked to be once and in this order; all that the modules `behind` get is from
    sites alone."""
    received, given = record_inputs(model), []
    model(images(4))
    assert [site for site, _ in received] == model.metaperturb.sites
    constant_sites(model)
    for module in behind:
        module.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    model(images(4)).sum().backward()
    assert len(given) == len(behind) and all((h == CONSTANT).all() for h in given)
    return [h for _, h in received[: len(received) // 2]]


def seeded(model, x, seed=0):
    torch.manual_seed(seed)
    return model(x)


def acts(network, x):
    """Whether φ's noise makes two predictions differ."""
    with torch.no_grad():
        return not torch.equal(network(x), network(x))


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def statistics(model):
    return [site.running_mean.clone() for site in model.metaperturb.sites]


# --- networks of a user


class Net(nn.Module):
    """A network or block: what it has by name, and its forward pass as a function of that."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def net(**parts):
    """What makes a `Net` of its forward pass; of its parts a pair is a convolution, a number a head, a function makes
    the part."""

    def make(part):
        return conv(*part) if isinstance(part, tuple) else Head(part) if isinstance(part, int) else part()

    def maker(run):
        def made():
            return Net(run, **{name: make(part) for name, part in parts.items()})

        made.__name__, made.run = run.__name__, run
        run.__qualname__ += ".run"  # where pickle finds it
        return made

    return maker


class Head(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Linear(channels, 5)

    def forward(self, x):
        return self.fc(x.mean(dim=(2, 3)))


def conv(a, b, stride=1):
    return nn.Conv2d(a, b, 3, stride, padding=1)


def norm(channels):
    return functools.partial(nn.BatchNorm2d, channels)


def layer(channels, *between):
    return conv(channels, 6), *(make() for make in between), nn.ReLU(inplace=True)


@net(conv1=(3, 4), conv2=(4, 6), head=6)
def functional_plain(net, x):
    return net.head(F.relu(net.conv2(F.max_pool2d(F.relu(net.conv1(x)), 2))))


@net(conv1=(3, 4), conv2=(4, 6), head=6, bn1=norm(4), bn2=norm(6))
def norm_plain(net, x):
    return net.head(net.bn2(net.conv2(torch.relu(net.bn1(net.conv1(x))))).relu())


@net(conv1=(3, 4), conv2=(4, 4), conv3=(4, 6, 2), head=6, relu=lambda: nn.ReLU(inplace=True))
def shared_relu(net, x):
    """One in-place ReLU module, used after every layer."""
    for layer in (net.conv1, net.conv2, net.conv3):
        x = net.relu(layer(x))
    return net.head(x)


@net(conv1=(3, 4), conv2=(4, 4), conv3=(4, 4), head=4)
def root_sum(net, x):
    """Residual sums in the forward of the network itself."""
    x = F.relu(net.conv1(x))
    x = F.relu(net.conv2(x) + x)
    return net.head(F.relu(x + net.conv3(x)))


class Block(nn.Module):
    def __init__(self, channels, add):
        super().__init__()
        self.conv1, self.conv2, self.add = conv(channels, channels), conv(channels, channels), add
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.add(self.conv2(self.relu(self.conv1(x))), x))


class Residual(nn.Module):
    def __init__(self, make_block=lambda: Block(4, torch.add), blocks=2):
        super().__init__()
        self.stem = conv(3, 4)
        self.blocks = nn.Sequential(*(make_block() for _ in range(blocks)))
        self.head = Head(4)

    def forward(self, x):
        return self.head(self.blocks(F.relu(self.stem(x))))


def in_place():
    return Residual(lambda: Block(4, operator.iadd))


@net(conv=(4, 4))
def simple_block(block, x):
    """Its sum is not before an activation that is a module."""
    return F.relu(block.conv(x) + x)


PLAIN_NETS = {
    "functional": (functional_plain, ["conv1", "conv2"]),
    "batch norm": (norm_plain, ["bn1", "bn2"]),
    "shared relu": (shared_relu, ["conv1", "conv2", "conv3"]),
    "all conv": (lambda: nn.Sequential(*layer(3), *layer(6), nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1)), ["0", "2"]),
    "conv bn pool relu": (
        lambda: nn.Sequential(*layer(3, norm(6), lambda: nn.MaxPool2d(2)), *layer(6, norm(6)), Head(6)),
        ["1", "5"],
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", PLAIN_NETS)
def test_plain_networks_before_each_activation(name, training):
    make, expected_names = PLAIN_NETS[name]
    torch.manual_seed(0)
    model = quiet(make().train(training))
    assert site_names(model) == expected_names
    after_first = [module for module in model.modules() if isinstance(module, (nn.Conv2d, Head))][1:]
    assert all((h < 0).any() and (h > 0).any() for h in site_inputs(model, after_first))


SUMS = {
    "f + x": lambda f, x: f + x,
    "x + f": lambda f, x: x + f,
    "sum of a list": lambda f, x: sum([f, x]),
    "f += x": operator.iadd,
    "f.add_ as a statement": lambda f, x: (f.add_(x), f)[1],
    "addcmul": lambda f, x: torch.addcmul(x, torch.full_like(f, 0.5), f),
    "lerp": lambda f, x: torch.lerp(x, f, 0.3),
    "stack": lambda f, x: torch.stack([f, x]).sum(0),
    "minus": lambda f, x: x - (-f),
    "chain": lambda f, x: f.add_(x).add_(2 * x).add_(f),
    "three": lambda f, x: x + (2 * x + f),
    "a sum of a sum": lambda f, x: (f + x) + F.avg_pool2d(f + x, 3, 1, 1),
    "addcdiv": lambda f, x: torch.addcdiv(x, f, torch.full_like(f, 2.0)),
    "index_add": lambda f, x: x.index_add(0, torch.arange(len(x), device=x.device), f),
    "a part of the channels": lambda f, x: (f[:, :2].add_(x[:, :2]), f)[1],
    "[B, H, W, C]": lambda f, x: (f.permute(0, 2, 3, 1) + x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
}
ON_OUTPUT = ("chain", "[B, H, W, C]")  # where the activation gets something else than a sum of two feature maps


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SUMS)
def test_residual_blocks_once_after_the_sum_before_the_activation(name, training):
    torch.manual_seed(0)
    model = quiet(Residual(lambda: Block(4, SUMS[name])).train(training))
    assert site_names(model) == ["blocks.0", "blocks.1"]
    for h in site_inputs(model, [model.blocks[1], model.head]):
        assert (h < 0).any() != (name in ON_OUTPUT)


# --- which sites there are


@net(mix=lambda: nn.Conv2d(4, 4, 1))
def attention(net, x):
    """Weights of channels from two sums of one pixel each, as CBAM has them."""
    return x * torch.sigmoid(net.mix(x.mean((2, 3), keepdim=True)) + net.mix(x.amax((2, 3), keepdim=True)))


@net(conv1=(3, 4), conv2=(4, 6), head=6, slot1=metaperturb.Slot, slot2=metaperturb.Slot)
def slots(net, x):
    return net.head(F.relu(net.slot2(net.conv2(F.relu(net.slot1(net.conv1(x)))))))


def of_functions(slot):
    def run(net, x):
        return net.head(F.relu(net.slot(F.conv2d(x, net.weight, padding=1))))

    return Net(run, weight=nn.Parameter(torch.randn(4, 3, 3, 3)), slot=slot, head=Head(4))


def reused(shared):
    """One module at two places, between convolutions of their own."""

    def run(net, x):
        return net.head(F.relu(net.shared(net.conv2(F.relu(net.shared(net.conv1(x)))))))

    return Net(run, conv1=conv(3, 4), conv2=conv(4, 4), head=Head(4), shared=shared)


@net(conv=(4, 4))
def pair(block, x):
    """The same feature map twice, one for a decoder."""
    x = F.relu(block.conv(x) + x)
    return x, x


def encoder(result):
    def run(net, x):
        x, skip = net.block1(F.relu(net.stem(x)))
        x, _ = net.block2(x)
        return result(net.head(x + skip))

    return Net(run, stem=conv(3, 4), block1=pair(), block2=pair(), head=Head(4))


@net(stem=(3, 4), block=simple_block, tail=(4, 3))
def restored(net, x):
    """An image plus what its blocks add to it."""
    return x + net.tail(net.block(net.stem(x)))


@net(body=(3, 4), boxes=(4, 8), classes=(4, 5))
def two_heads(net, x):
    x = F.relu(net.body(x))
    return {"boxes": net.boxes(x), "classes": net.classes(x)}


@net(fc=lambda: nn.Linear(16, 4), body=(16, 16), stem=(3, 16))
def declared_backwards(net, x):
    return net.fc(net.body(net.stem(x).relu()).relu().mean((2, 3)))


@net(a=(3, 4), b=(3, 4), bn=norm(8), head=8)
def written_into_one_map(net, x):
    out = torch.empty(len(x), 8, *x.shape[2:], device=x.device)
    out[:, :4], out[:, 4:] = net.a(x), net.b(x)
    return net.head(net.bn(F.relu(out)).relu())


def like_a_word():
    return nn.Sequential(OrderedDict(bottom=conv(3, 4), act=nn.ReLU(), top=conv(4, 6), end=nn.ReLU(), head=Head(6)))


class Collecting(nn.Sequential):
    """As in VoVNet: one child more would be one map more."""

    def forward(self, x):
        maps = [x]
        for layer in self:
            maps.append(layer(maps[-1]))
        return torch.cat(maps, 1)


FOUND = {
    "attention": (lambda: nn.Sequential(conv(3, 4), nn.ReLU(), attention(), conv(4, 4), nn.ReLU(), Head(4)), "0 3"),
    "attention and a sum": (lambda: nn.Sequential(conv(3, 4), attention(), Block(4, torch.add), Head(4)), "2"),
    "slots": (slots, "slot1 slot2"),
    "a slot among functions": (lambda: of_functions(metaperturb.Slot()), "slot"),
    "pairs": (lambda: encoder(lambda y: y), "block1 block2 head"),
    "pairs, a mapping": (lambda: encoder(lambda y: {"logits": y}), "block1 block2 head"),
    "a pair by name": (lambda: encoder(lambda y: y), "block2", ["block2"]),
    "not what is returned": (restored, "block"),
    "nor what is returned in a mapping": (two_heads, "body"),
    "nor a block that is returned, resized": (
        lambda: nn.Sequential(conv(3, 4), Block(4, torch.add), Block(4, torch.add), nn.Upsample(scale_factor=2)),
        "1",
    ),
    "by order of calls": (declared_backwards, "stem body"),
    "a layer of the whole map is linear": (
        lambda: nn.Sequential(
            *(conv(3, 4, 4), nn.ReLU(), nn.Conv2d(4, 6, 4), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(6, 5)),
        ),
        "0",
    ),
    "channels written into one map": (written_into_one_map, "bn"),
    "sequences that collect": (
        lambda: nn.Sequential(
            Collecting(conv(3, 4), conv(4, 4)), conv(11, 4), Collecting(conv(4, 4)), conv(8, 4), Head(4)
        ),
        "0 2",
    ),
    "all": (like_a_word, "bottom top", "all"),
    "one size is one stage": (like_a_word, "top", "before_pooling"),
    "a name is in a list": (like_a_word, "bottom", ["bottom"]),
    "a place is a word": (like_a_word, "bottom top", "bottom"),
    "of a module that runs twice another": (lambda: reused(nn.BatchNorm2d(4)), "conv1", ["conv1"]),
    "named in another order": (norm_plain, "conv1 bn2", ["bn2", "conv1"]),
    "named in the zoo": (SMALL, "layer2.0 layer3.0", ["layer3.0", "layer2.0"]),
    "named in a residual network": (
        lambda: network("resnet18"),
        "bn1 layer1.0.bn1 layer4.1",
        ["layer1.0.bn1", "bn1", "layer4.1"],
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_which_sites_there_are(name):
    """And each gets, once and in this order, a map of its size; `detach` leaves nothing."""
    make, expected, *sites = FOUND[name]
    model = quiet(make(), None, 16, *sites)
    assert site_names(model) == expected.split()
    received = record_inputs(model)
    with torch.no_grad():
        model.train()(images())
    assert [site for site, _ in received] == model.metaperturb.sites
    for (_, h), spec in zip(received, model.metaperturb.specs, strict=True):
        assert list(h.shape[1:]) == [spec.channels, *spec.size]
    assert hooks_of(detach(model)) == 0


def test_the_normalizer_of_channels_is_the_widest_site():
    for sites, widest in ((["layer3.0", "layer2.0"], 64), (["layer2.0"], 32), ("bottom", 64)):
        assert {site.channel_norm for site in quiet(SMALL(), sites=sites).metaperturb.sites} == {widest}
    wide = nn.Sequential(conv(3, 9), nn.ReLU(), conv(9, 12), nn.ReLU(), conv(12, 4), nn.ReLU(), Head(4))
    assert [site.channel_norm for site in quiet(wide).metaperturb.sites] == [12, 12, 12]  # which need not be the last
    model, phi = SMALL(), MetaPerturb()
    first, alone = (
        quiet(copy.deepcopy(model), phi, 16, sites).eval().metaperturb.sites[0] for sites in (None, "bottom")
    )
    h, noise = torch.randn(2, 4, 16, 16, 16)
    assert torch.equal(first(h, noise=noise), alone(h, noise=noise))  # wherever else φ acts


# bottom, top, before pooling: by the names of the layers what comes before each max pooling or strided block, the ends
ABLATIONS = {
    "resnet20": ("layer1.0 layer1.1 layer1.2", "layer3.0 layer3.1 layer3.2", "layer1.2 layer2.2 layer3.2"),
    "vgg9": ("layers.0", "layers.6 layers.7", "layers.0 layers.1 layers.3 layers.5 layers.7"),
    "resnet18": ("layer1.0 layer1.1", "layer4.0 layer4.1", "layer1.1 layer2.1 layer3.1 layer4.1"),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_places_of_ablations(name):
    found = find_sites(models.create(name, 5, 32), 32)
    assert choose_sites(found, "all") == found
    for where, expected in zip(("bottom", "top", "before_pooling"), ABLATIONS[name], strict=True):
        assert [spec.name for spec in choose_sites(found, where)] == expected.split()


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


# sites, the widest, image size, class of the modules whose output is the site's (after an activation, if it has one)
NETWORKS = {
    "conv4": (4, 64, 32, "ReLU"),
    "vgg9": (8, 512, 32, "ReLU"),
    "resnet20": (9, 64, 32, "BasicBlock"),
    "wrn_28_2": (12, 128, 32, "WideBlock"),
    "resnet18": (8, 512, 32, "BasicBlock"),
    "resnet50": (16, 2048, 32, "Bottleneck"),
    "vgg11_bn": (8, 512, 32, "ReLU"),
    "shufflenet_v2_x1_0": (16, 464, 32, "InvertedResidual"),
    "squeezenet1_1": (8, 512, 64, "Fire"),
    "mobilenet_v2": (17, 320, 32, "InvertedResidual"),
    "mobilenet_v3_small": (11, 96, 32, "InvertedResidual"),
    "efficientnet_b0": (16, 320, 32, "MBConv"),
    "convnext_tiny": (18, 768, 32, "CNBlock"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    count, widest, size, kind = NETWORKS[name]
    model = network(name)
    sites = quiet(model, image_size=size).metaperturb.sites
    assert len(sites) == count
    assert {site.channel_norm for site in sites} == {widest} == {max(site.channels for site in sites)}
    assert {site.size_norm for site in sites} == {size}

    # training: backward through in-place activations; θ and φ both get a gradient
    received = record_inputs(model)
    model.train()
    F.cross_entropy(model(images(2, size)), torch.tensor([0, 1])).backward()
    assert [site for site, _ in received] == sites  # each once, in this order
    if name not in ("squeezenet1_1", "shufflenet_v2_x1_0"):  # whose blocks rectify the parts that they concatenate
        assert all((h < 0).any() for _, h in received)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).weight
    assert torch.isfinite(first.grad).all() and first.grad.any()

    # where: behind a constant site, what leaves the block (or layer) is that constant
    constant_sites(model)
    leaving = []
    for module in model.modules():
        if kind in [of.__name__ for of in type(module).__mro__]:
            module.register_forward_hook(lambda module, args, output: leaving.append(output.clone()))
    with torch.no_grad():
        model.eval()(images(2, size))
    assert len(leaving) >= count  # of VGG's activations two are the classifier's
    assert all((output == CONSTANT).all() for output in leaving[:count])


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [("maxvit_t", 224, 11), ("densenet121", 64, 4), ("shufflenet_v2_x1_0", 64, 16), ("inception_v3", 96, 11)],
)
def test_sites_of_other_families(name, size, count):
    with torch.device("meta"):
        specs = find_sites(models.create(name, 5, size), size)
    assert len(specs) == count and not any("attention" in spec.name for spec in specs)


# --- attach leaves the network as it was


def half_frozen():
    """Part of it in evaluation mode while the whole trains, as when batch norm is frozen."""
    model = norm_plain()
    model.bn2.eval()
    return model


@net(plain=functional_plain)
def monte_carlo_dropout(net, x):
    """Draws in evaluation, too, and so in the dry run."""
    return net.plain(F.dropout(x))


@pytest.mark.parametrize("make", [SMALL, half_frozen, root_sum, shared_relu, norm_plain, in_place, monte_carlo_dropout])
def test_attach_leaves_the_network_as_it_is_and_detach_restores_it_bit_for_bit(make):
    torch.manual_seed(0)
    model, x, own_calls = make(), images(3), []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    twin = copy.deepcopy(model)
    model.register_forward_hook(lambda *_: own_calls.append(1))
    phi, random_state = MetaPerturb(), torch.get_rng_state()
    quiet(model, phi)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [*dict(model.named_children())] == [*dict(twin.named_children())]
    assert any("metaperturb" in key for key in model.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in twin.state_dict().items())
    for spec, site in zip(model.metaperturb.specs, model.metaperturb.sites, strict=True):
        assert site.training == model.get_submodule(spec.module).training
        assert (site.running_mean == 0).all() and (site.running_var == 1).all()
    assert detach(model) is model is detach(model)
    for module, untouched in zip(model.modules(), twin.modules(), strict=True):
        assert type(module) is type(untouched) and vars(module).keys() == vars(untouched).keys()
        assert module.training == untouched.training and not module._forward_hooks_always_called
    for training in (True, False):
        assert torch.equal(seeded(model.train(training), x), seeded(twin.train(training), x))
    assert own_calls and hooks_of(model) == 1  # the user's own hook is still there
    quiet(model)  # and it may be attached anew
    assert not torch.equal(seeded(model, x), seeded(twin, x))


def test_one_line_on_stderr_names_the_sites(capsys):
    attach(models.create("resnet20", 5, 32), MetaPerturb(), image_size=32)
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and all(part in err for part in ("9 sites", "layer1.0", "layer3.2"))
    quiet(SMALL())
    assert capsys.readouterr().err == ""


def test_what_all_sites_share():
    model = quiet(SMALL(), clip=None, gate=False)
    everywhere = [model.metaperturb, *model.metaperturb.sites]
    assert model.double()(images().double()).dtype == model.metaperturb.phi.flat.dtype == torch.float64
    assert all((one.noise, one.gate, one.clip, one.strength) == (True, False, None, 1.0) for one in everywhere)
    model.metaperturb.strength, model.metaperturb.clip, model.metaperturb.clip_eval = 0.25, 3.0, True
    assert all((one.strength, one.clip, one.clip_eval) == (0.25, 3.0, True) for one in everywhere)
    with pytest.raises(ValueError):
        model.metaperturb.strength = 1.5
    parameters, state = list(model.parameters()), model.state_dict().keys()
    for module in everywhere[:2]:
        with pytest.raises(AttributeError, match="cannot be exchanged"):
            module.phi = MetaPerturb()
    assert len(list(model.parameters())) == len(parameters) and model.state_dict().keys() == state


# --- saving


def copied(model, make):
    return copy.deepcopy(model)


def pickled(model, make):
    return pickle.loads(pickle.dumps(model))


def reloaded(model, make):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = quiet(make(), MetaPerturb(model.metaperturb.phi.scale_free))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@pytest.mark.parametrize("again", [copied, pickled, reloaded])
@pytest.mark.parametrize(
    ("make", "scale_free"), [(SMALL, False), (root_sum, True), (shared_relu, False), (in_place, False)]
)
def test_another_network_made_of_one_computes_the_same_and_is_independent(make, scale_free, again):
    torch.manual_seed(0)
    model, x = quiet(make(), MetaPerturb(scale_free), paper=True), images(seed=5)
    with torch.no_grad():
        model.metaperturb.phi.flat.add_(0.3 * torch.randn(82))
        for seed in range(3):
            model(images(4, seed=seed))
    expected, before = seeded(model.eval(), x), statistics(model)
    clone = again(model, make).eval()
    assert torch.equal(seeded(clone, x), expected) and not torch.equal(seeded(clone, x, seed=1), expected)
    assert clone.metaperturb.phi is not model.metaperturb.phi
    assert {id(site.phi) for site in clone.metaperturb.sites} == {id(clone.metaperturb.phi)}
    clone.train()(x)
    for a, of_model, of_clone in zip(before, statistics(model), statistics(clone), strict=True):
        assert torch.equal(a, of_model) and not torch.equal(a, of_clone)
    clone.eval().metaperturb.strength = 0.0
    assert model.metaperturb.strength == 1.0 and not torch.equal(seeded(clone, x), expected)
    detach(clone)
    assert torch.equal(seeded(model, x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("usage", [{"clip": 2.0, "clip_eval": True}, {"gate": False}, {"paper": False}])
def test_a_reloaded_network_has_the_settings_of_the_saved_one(usage, dtype):
    x = 3 * images(4).to(dtype)
    model, fresh = (
        quiet(SMALL().to(dtype), MetaPerturb().to(dtype), **options).eval()
        for options in (usage, {"clip": 0.01, "paper": True})
    )
    for strength in (0.3, 0.0, 1.0):
        model.metaperturb.strength = strength
        fresh.load_state_dict(model.state_dict())
        assert fresh.metaperturb.strength == pytest.approx(strength)
        assert fresh.metaperturb.current()[1:-1] == model.metaperturb.current()[1:-1]
        assert torch.equal(seeded(fresh, x), seeded(model, x))


def test_loading_into_nothing():
    saved = quiet(SMALL()).state_dict()
    with torch.device("meta"):
        model = quiet(SMALL())
    refused("to_empty", model.load_state_dict, saved, assign=True)
    model.to_empty(device="cpu").load_state_dict(saved)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        model.metaperturb.phi.flat.add_(1)
    assert not any(torch.equal(value, saved[name]) for name, value in model.state_dict().items() if "_extra" in name)


def test_an_average_has_the_strength_of_the_network():
    swa = torch.optim.swa_utils
    for options in ({}, {"multi_avg_fn": swa.get_ema_multi_avg_fn(0.9), "use_buffers": True}):
        model = quiet(SMALL())
        model.metaperturb.strength = 0.1
        average, kept = swa.AveragedModel(model, **options), copy.deepcopy(model)
        for strength in (0.1, 0.5, 0.75):
            model.metaperturb.strength = strength
            average.update_parameters(model)
        assert average.module.metaperturb.strength == 0.75 and kept.metaperturb.strength == 0.1
    states = [quiet(SMALL()).state_dict() for _ in range(10)]
    kept.load_state_dict({key: sum(0.1 * state[key] for state in states) for key in states[0]})
    assert kept.metaperturb.strength == 1.0


# --- what it refuses


def with_a_child_of_this_name():
    return Net(functional_plain.run, **dict(functional_plain().named_children()), metaperturb=nn.Linear(2, 2))


def compiled():
    model = norm_plain()
    model.compile()
    return model


def without_values(name):
    with torch.device("meta"):
        return torchvision.models.get_model(name, num_classes=5)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.cnn, self.head = Residual(), nn.Linear(7, 2)

    def forward(self, image, table):
        return self.head(torch.cat([self.cnn(image), table], 1))


def of_one_size():
    return nn.Sequential(conv(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16 * 8, 2))


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "OptimizedModule": torch.compile,
}
TWICE = "'shared' runs 2 times a pass"  # its site would mix the statistics of two maps
REFUSED = {
    "unknown name": (SMALL, {"sites": ["layer2.0", "layer1.9"]}, "'layer1.9' is neither a place.*layer1.0"),
    "no feature map": (SMALL, {"sites": ["fc"]}, "'fc'"),
    "a name twice": (SMALL, {"sites": ["layer1.0", "layer1.0"]}, "none twice"),
    "no name": (SMALL, {"sites": []}, "at least one"),
    "a place misspelt": (SMALL, {"sites": "topp"}, "near: top"),
    "nothing of φ": (SMALL, {"noise": False, "gate": False}, "noise=False and gate=False"),
    "an ablation outside the paper": (SMALL, {"noise": False, "paper": False}, "need paper=True"),
    "nothing to bound": (SMALL, {"clip": None, "clip_eval": True}, "needs a clip"),
    "a name as φ": (SMALL, {"phi": "tiny_imagenet_resnet20"}, "load_phi"),
    "no images": (lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), Head(4)), {}, "no nn.Conv2d"),
    "a classifier": (lambda: nn.Sequential(conv(3, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten()), {}, r"sites=\["),
    "images too small": (lambda: network("vgg11"), {"image_size": 8}, r"\[2, 3, 8, 8\].*image_size"),
    "images too large": (lambda: network("conv4"), {"image_size": 64}, "image_size"),
    "attached": (lambda: quiet(SMALL()), {}, "detach"),
    "attached in part": (lambda: nn.Sequential(quiet(root_sum()), nn.Linear(5, 2)), {}, "attached already"),
    "a child of this name": (with_a_child_of_this_name, {}, "Net has a 'metaperturb' of its own"),
    "functions": (lambda: of_functions(nn.Identity()), {}, r"put a metaperturb.Slot\(\) where"),
    "batch norm twice": (lambda: reused(nn.BatchNorm2d(4)), {}, TWICE),
    "a slot twice": (lambda: reused(metaperturb.Slot()), {}, TWICE),
    "an activation": (shared_relu, {"sites": ["relu"]}, "'relu' runs 3 times a pass"),
    "tokens": (lambda: without_values("vit_b_16"), {"image_size": 224}, "cuts the image into patches"),
    "more than an image": (TwoInputs, {}, "attach to a part of it"),
    "another shape": (of_one_size, {}, r"\(height, width\)"),
    "no shape yet": (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU()), {}, "run it once on a batch"),
    "compiled in place": (compiled, {}, "before that"),
    **{
        f"in {name}": (lambda wrap=wrap: wrap(SMALL()), {}, f"{name} wraps a network")
        for name, wrap in WRAPPERS.items()
    },
    **{
        f"size {size!r}": (SMALL, {"image_size": size}, "image_size")
        for size in [(16, 16.0), "16", -1, None, (16, 0), (8, 8, 8)]
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    make, options, says = REFUSED[name]
    model = make()
    training, keys, hooks = model.training, list(model.state_dict()), hooks_of(model)
    refused(says, quiet, model, **options)
    assert model.training == training and list(model.state_dict()) == keys and hooks_of(model) == hooks
    if "attached" in name:
        assert hooks_of(detach(model)) == 0 and not any(hasattr(m, "metaperturb") for m in model.modules())


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_network_inside_a_wrapper_is_meant(name):
    wrapped = WRAPPERS[name](quiet(SMALL()))
    refused("attached already", quiet, wrapped)
    inside = detach(wrapped)._orig_mod if name == "OptimizedModule" else detach(wrapped).module
    assert not hasattr(inside, "metaperturb") and not acts(inside, images())


def test_networks_that_take_more_than_a_square_image():
    model = attach(TwoInputs(), MetaPerturb(), example=(torch.zeros(2, 3, 24, 16), torch.zeros(2, 2)), verbose=False)
    assert site_names(model) == ["cnn.blocks.0", "cnn.blocks.1"] and model.metaperturb.sites[0].size_norm == 24
    assert quiet(of_one_size(), image_size=(16, 8)).metaperturb.specs[0].size == (16, 8)


# --- while it runs


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn"])
def test_a_module_that_was_replaced_after_attach_is_told(name):
    model, x = quiet(network(name), image_size=32), images(size=32)
    model.train()(x)
    copied = copy.deepcopy(model)
    if name == "resnet18":
        model.layer4[1] = type(copied.layer4[1])(512, 512)
    else:
        for i in range(len(model.features)):
            if isinstance(model.features[i], nn.ReLU):
                model.features[i] = nn.ReLU()
    refused({"resnet18": r"'layer4.1' \(1 in all\)", "vgg11_bn": r"'features.2' \(8 in all\)"}[name], model, x)
    detach(model)(x)
    copied(x)  # has all its modules


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_blocks_gives_the_gradient_and_of_their_parts_is_refused(reentrant):
    class Checkpointed(Block):
        part = False

        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=reentrant) if self.part else super().forward(x)

    torch.manual_seed(0)
    (block,) = quiet(Residual(lambda: Checkpointed(4, torch.add), blocks=1)).blocks
    x = torch.randn(2, 4, 8, 8, requires_grad=True)

    def gradient(run):
        x.grad = None
        seeded(run, x).square().sum().backward()
        return x.grad

    torch.testing.assert_close(gradient(lambda x: checkpoint(block, x, use_reentrant=reentrant)), gradient(block))
    block.part = True
    refused("checkpoint whole blocks", gradient, block)


def test_a_replica_of_data_parallel_is_refused():
    model = quiet(SMALL())
    for module in model.modules():
        module._is_replica = True  # as on each of several GPUs
    refused("DistributedDataParallel", model, images())


@pytest.mark.parametrize("make", [root_sum, Residual, shared_relu])
def test_after_an_error_in_the_forward_all_is_as_before(make):
    model, x = quiet(make()).eval(), images()
    expected, fail = seeded(model, x), Mock(side_effect=RuntimeError("on purpose"))
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for module in (convolutions[0], convolutions[-1]):
        with module.register_forward_hook(fail), pytest.raises(RuntimeError, match="on purpose"):
            model(x)
    assert torch.equal(seeded(model, x), expected)


@pytest.mark.parametrize(("inlined", "make_block"), [(False, simple_block), (True, lambda: conv(4, 4))])
def test_blocks_dropped_in_training(inlined, make_block):
    """One of them, as modules or in the network's own forward."""

    def forward(net, x):
        x = net.stem(x)
        for i, block in enumerate(net.blocks):
            if not net.training or i != (0 if inlined else 1):
                x = block(x) + x if inlined else block(x)
        return net.head(x)

    blocks = nn.ModuleList(make_block() for _ in range(3))
    model = quiet(Net(forward, stem=conv(3, 4), blocks=blocks, head=Head(4))).train()
    received, sites = record_inputs(model), model.metaperturb.sites
    model(images())
    assert [site for site, _ in received] == (sites if inlined else [sites[0], sites[2]])


def test_a_block_that_does_nothing_in_a_step():
    @net(conv=(4, 4), relu=nn.ReLU)
    def idle(block, x):
        return x if block.training else block.relu(block.relu(block.conv(x)) + x)

    model = quiet(Residual(idle))
    assert site_names(model) == ["blocks.0", "blocks.1"]
    model.train()(images())


def test_what_is_finite_in_training_is_finite_in_evaluation():
    """In the paper's arithmetic z grows with h, so that what is large would be squared from site to site."""
    phi = MetaPerturb()
    with torch.no_grad():
        phi.flat.fill_(1.0)
    h = torch.cat([torch.linspace(-1e9, 1e9, 64), torch.tensor([-3.0, 0.0, 3.0])]).reshape(1, 1, 1, 67)
    free, bounded, paper = (
        quiet(Residual(), phi, **options).metaperturb.sites[0] for options in ({}, {"clip": 100.0}, {"paper": True})
    )
    for mode in (True, False):
        x = h.repeat(2, 4, 1, 1)
        for _ in range(20):  # sites
            x = free.train(mode)(x)
        assert x.isfinite().all() and (x.abs() > 1e6).any()  # what is large is not cut either
        assert bounded.train(mode)(x).abs().max() == 100.0
    assert paper.eval()(torch.full((2, 4, 4, 4), 90.0)).max() > 100.0  # as in the paper's evaluation


def test_the_arithmetic_is_that_of_the_paper_where_a_network_says_its_places():
    assert not quiet(Residual(), image_size=32).metaperturb.paper
    assert quiet(Residual(), image_size=32, noise=False).metaperturb.paper  # an ablation of it
    zoo = quiet(models.create("resnet20", 5, 32), image_size=32)
    assert zoo.metaperturb.paper and zoo.metaperturb.amplitude == 1.0
    # Noise of mean one: φ was meta-trained in the first; seven blocks where that has three; a quarter of the pixels.
    for name, size, amplitude in (("resnet20", 32, 1.0), ("resnet44", 32, (3 / 7) ** 0.5), ("resnet20", 16, 0.5)):
        model = quiet(models.create(name, 5, size), image_size=size, paper=False)
        assert model.metaperturb.amplitude == pytest.approx(amplitude) and model.metaperturb.clip is None


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn"])
def test_a_part_has_the_state_of_its_sites(name):
    model = quiet(network(name), image_size=32)
    part = nn.Sequential(*list(model.children())[:-1]).eval()
    before = statistics(model)
    assert acts(part, images(2, 32)) and acts(part, images(1, 32))
    assert all(not site.training for site in model.metaperturb.sites)
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True))
    assert sum("running_mean" in key and "metaperturb" in key for key in part.state_dict()) == 8
    detach(model)
    assert not acts(part, images(2, 32))


def test_single_images():
    model = quiet(Residual()).train()
    before = statistics(model)
    model(images(1)).sum().backward()
    assert torch.equal(before[0], statistics(model)[0])
    per_image = torch.func.grad(lambda p, x: torch.func.functional_call(model, p, (x[None],)).sum())
    of_each = torch.func.vmap(per_image, in_dims=(None, 0), randomness="different")
    refused("no gradients of single ones", of_each, dict(model.named_parameters()), images())
    refused("gradients of single ones", call_for_per_sample_grads(quiet(functional_plain()).train()), images())


# --- what tools make of the network keeps φ, or there is an error that names the cause


@pytest.mark.parametrize("make", [norm_plain, functional_plain, lambda: network("vgg11_bn")])
def test_fusing_and_quantizing_keep_phi_or_say_that_they_do_not(make):
    model, x = quiet(make().eval(), image_size=32), images(16, 32)
    assert acts(torch.fx.experimental.optimization.fuse(model), x)
    fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    prepared = fx.prepare_fx(copy.deepcopy(model), torch.ao.quantization.get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    assert acts(fx.convert_fx(prepared), x)
    if isinstance(model, torchvision.models.VGG):
        with pytest.raises(AssertionError, match="with a site of φ: fuse before attach"):
            torch.ao.quantization.fuse_modules(model, ["features.0", "features.1", "features.2"])


def test_a_sequence_that_collects_what_its_children_give():
    stages = nn.Sequential(*(nn.Sequential(conv(c, 4), Collecting(conv(4, 4))) for c in (3, 8)), Head(8))
    stages = quiet(stages).eval()  # RDNet: the features alone have all sites
    received = record_inputs(stages)
    stages[:2](images())
    assert len(received) == len(stages.metaperturb.sites) == 2 and acts(torch.fx.symbolic_trace(stages), images())
    assert torch.equal(seeded(copy.deepcopy(stages), images()), seeded(stages, images()))


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn"])
def test_traces_keep_phi(name):
    model, x = quiet(network(name).eval(), image_size=32), images(size=32)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(seeded(traced, x), seeded(model, x)) and acts(copy.deepcopy(traced), x)
    assert acts(torch.fx.symbolic_trace(torch.fx.experimental.optimization.fuse(model)), x)
    assert acts(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)), x)
    extract = torchvision.models.feature_extraction.create_feature_extractor
    extractor = extract(model.train(), {"avgpool": "y"}).eval()
    assert acts(lambda x: extractor(x)["y"], x) and not model.metaperturb.sites[0].training
    refused(r"torch.jit.script", torch.jit.script, model)
    traced = quiet(torch.fx.symbolic_trace(network(name).eval()), image_size=32)  # attached to a trace
    assert acts(traced, x) and torch.equal(seeded(traced, x), seeded(copy.deepcopy(traced), x))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_keep_phi(strict):
    if strict and torch.__version__ < "2.15":
        pytest.skip("strict export knows no parameter outside the network, as φ is; later PyTorch does")
    model, x = quiet(in_place().eval()), images()
    assert acts(torch.export.export(model, (x,), strict=strict).module(), x)


def test_what_was_compiled_before_attach_is_compiled_anew():
    model, x = norm_plain().eval(), images()
    before = torch.compile(model, backend="eager")
    assert not acts(before, x)
    quiet(model)
    assert acts(before, x)


def test_importing_the_library_leaves_signals_as_they_are(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    for arguments in ([], ["metaperturb.meta_train"]):
        monkeypatch.setattr(sys, "argv", ["-m", *arguments])  # as while Python imports a package for -m
        monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "mine.train", *arguments])
        check_command_line()
        assert signal.getsignal(signal.SIGINT) is before


def test_the_panel_goes_on_where_it_stopped(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("panel", ROOT / "results" / "panel.py")
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
