"""The regularizers to compare with: each against its definition, worked out a second time here, and as a training run.

What a method does is derived from its paper in loops, not by the code under test.
"""

import copy
import dataclasses
import math
import typing
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import model_state, result, train
from torch import nn
from torchvision.transforms.v2 import TrivialAugmentWide

import metaperturb.meta_test as program
from metaperturb import MetaPerturb, attach, detach, find_sites, models, save_phi
from metaperturb.config import MetaTestConfig
from metaperturb.data.arrays import from_memory
from metaperturb.data.batches import DeviceImages
from metaperturb.evaluation import evaluate
from metaperturb.methods import create, mixing, noise
from metaperturb.plots import COLORS, LABELS
from metaperturb.regularizers import REGULARIZERS
from metaperturb.trained import load_run
from metaperturb.training import accuracy, autocast

BASELINES = [name for name in REGULARIZERS if name not in ("base", "metaperturb")]
SITE_METHODS = ["info_dropout", "dropblock", "manifold_mixup", "dropout"]
OFF = ["info_dropout_beta=0 info_dropout_max_alpha=0", "dropblock_prob=0", "manifold_mixup_alpha=0", "dropout_prob=0"]
OFF += ["mixup_alpha=0", "cutmix_alpha=0", "label_smoothing=0", "adversarial_eps=0"]


def images(count=80, classes=10, size=12):
    """What methods ask of the training images."""
    pixels = np.random.default_rng(0).integers(256, size=(count, 3, size, size), dtype=np.uint8)
    return from_memory("drawn", pixels, np.arange(count) % classes, "0123456789"[:classes])


def prepared(name, model=None, train=None, **settings):
    """A method and a network that it is prepared for."""
    train = train or images()
    method = create(MetaTestConfig(method=name, **settings))
    torch.manual_seed(1)
    model = model or models.create("resnet8", train.num_classes, train.image_size)
    method.prepare(model, train)
    return method, model.train()


def test_one_list_of_names():
    """For settings, classes and pictures; a hyperparameter belongs to one method, and each method has its own look."""
    names = list(REGULARIZERS)
    assert list(typing.get_args(typing.get_type_hints(MetaTestConfig)["method"])) == list(LABELS) == names
    assert len({COLORS[name] for name in names}) == len(set(LABELS.values())) == len(names)
    settings = [setting for regularizer in REGULARIZERS.values() for setting in regularizer.settings]
    assert len(set(settings)) == len(settings) and set(settings) <= dataclasses.asdict(MetaTestConfig()).keys()
    for name, regularizer in REGULARIZERS.items():
        assert type(create(MetaTestConfig(method=name), MetaPerturb())).__name__ == regularizer.made_by.split(".")[1]


# --- Information Dropout


@torch.no_grad()
def test_information_dropout_kl_by_hand():
    torch.manual_seed(0)
    site, h = noise.InformationDropoutSite(channels=3, max_alpha=0.7), torch.rand(2, 3, 2, 2) + 0.1
    nn.init.normal_(site.logit.weight)
    site(h)
    by_hand = 0.0  # −log α, less that of the most noise, unit by unit
    for pixel in h.permute(0, 2, 3, 1).reshape(-1, 3):
        for logit in (site.logit.weight[:, :, 0, 0] @ pixel + site.logit.bias).tolist():
            by_hand += math.log(0.7) - math.log(0.7 / (1 + math.exp(-logit)))
    assert site.kl.item() == pytest.approx(by_hand / 2, rel=1e-4)  # summed over units, mean over images


@torch.no_grad()
def test_information_dropout_noise_is_log_normal_and_evaluation_takes_its_mean():
    torch.manual_seed(0)
    alpha, count = 0.4, 200_000
    site, h = noise.InformationDropoutSite(channels=1, max_alpha=0.7), torch.full((2, 1, 1, count // 2), -3.0)
    nn.init.zeros_(site.logit.weight)
    nn.init.constant_(site.logit.bias, math.log(alpha / (0.7 - alpha)))  # the same α everywhere
    ratio = (site(h) / h).flatten().double()
    log_noise = ratio.log().sort().values
    normal = torch.distributions.Normal(torch.zeros(1, dtype=torch.float64), alpha)
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    distance = (normal.cdf(log_noise) - steps).abs().max().item()  # Kolmogorov and Smirnov
    assert distance < 1.95 / math.sqrt(count)  # exceeded once in a thousand
    site.eval()
    assert torch.equal(site(h), site(h))
    (mean,) = (site(h) / h).unique()
    assert mean.item() == pytest.approx(ratio.mean().item(), abs=4 * ratio.std().item() / math.sqrt(count))


def test_information_dropout_loss_and_gradients():
    train = images(60)
    method, model = prepared("info_dropout", train=train, info_dropout_beta=2.0)
    x, y = torch.randn(4, 3, 12, 12), torch.tensor([0, 1, 2, 3])
    logits = model(x)
    kl = sum(site.kl.item() for site in method.sites.sites)
    assert kl > 0 and len(method.sites.sites) == 3
    loss = method.loss(logits, y)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, y).item() + 2.0 / 60 * kl, rel=1e-5)
    assert all(site.kl is None for site in method.sites.sites)
    loss.backward()
    own = {n: p for n, p in model.named_parameters() if ".regularizer." in n}
    assert len(own) == 6 and all(p.grad.any() for p in own.values())
    assert own.keys() <= model.state_dict().keys()
    copy.deepcopy(model)  # no graph is left in it


# --- DropBlock and dropout


@pytest.fixture
def drawn(monkeypatch):
    """The calls of torchvision's DropBlock."""
    monkeypatch.setattr(noise, "drop_block2d", spy := Mock(wraps=noise.drop_block2d))
    return spy


@pytest.mark.parametrize(
    ("height", "width", "size", "fits"), [(16, 16, 7, 7), (12, 9, 3, 3), (4, 4, 7, 3), (2, 3, 7, 1), (1, 1, 7, 1)]
)
def test_dropblock_drops_the_largest_odd_squares_that_fit(height, width, size, fits, drawn):
    torch.manual_seed(0)
    site, h = noise.DropBlockSite(prob=0.2, size=size), torch.ones(200, 16, height, width)
    site.strength = 0.5
    out = site(h)
    assert drawn.call_args.args[1:] == (0.1, fits) and 0.05 < (out == 0).float().mean() < 0.12
    assert out.mean().item() == pytest.approx(1, rel=1e-4) and site.eval()(h) is h


def test_dropblock_rises_linearly_over_the_whole_training(target_settings, tmp_path, drawn):
    train(tmp_path / "tgt", target_settings, "method=dropblock dropblock_prob=0.2 steps=5")
    drops = [call.args[1] for call in drawn.call_args_list if call.kwargs["training"]]
    assert drops[::3] == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2]) and len(drops) == 15


# --- mixup, CutMix, Manifold Mixup


def numbered(batch=8, size=12):
    """Images and labels that are all different: soft labels then say who was mixed with whom."""
    torch.manual_seed(3)
    return torch.rand(batch, 3, size, size) * 2 - 1, torch.arange(batch)


def pairs_of(soft):
    """[(i, j, λ)] of soft labels `[B, B]` of `numbered` images."""
    pairs = []
    for i, row in enumerate(soft.tolist()):
        others = [j for j, weight in enumerate(row) if j != i and weight > 0]
        assert len(others) <= 1 and sum(row) == pytest.approx(1)
        pairs.append((i, others[0] if others else i, row[i]))
    assert sorted(j for _, j, _ in pairs) == list(range(len(pairs)))  # a permutation
    shares = {share for i, j, share in pairs if j != i}
    assert len(shares) <= 1  # one λ for the batch
    return pairs


def by_hand(h, pairs):
    return torch.stack([share * h[i] + (1 - share) * h[j] for i, j, share in pairs])


def test_mixup_by_hand():
    x, y = numbered()
    method, _ = prepared("mixup", train=images(classes=8))
    before = x.clone()
    for seed in range(5):
        torch.manual_seed(seed)
        mixed, soft = method.batch(x, y)
        torch.testing.assert_close(mixed, by_hand(x, pairs_of(soft)))
    assert torch.equal(x, before)
    logits = torch.randn(8, 8)
    torch.testing.assert_close(method.loss(logits, soft), -(soft * logits.log_softmax(1)).sum() / 8)
    guessed = logits.argmax(1)
    assert accuracy(logits, soft).item() == pytest.approx(sum(soft[i, guessed[i]].item() for i in range(8)) / 8)


CDFS = {1.0: lambda v: v, 2.0: lambda v: 3 * v**2 - 2 * v**3, 0.5: lambda v: 2 / math.pi * np.arcsin(np.sqrt(v))}


@pytest.mark.parametrize("alpha", [*CDFS, 1e-3, 1e-8])
def test_mixing_shares_are_beta(alpha):
    torch.manual_seed(0)
    shares = np.sort([mixing.draw_share(alpha) for _ in range(3000)])
    if alpha in CDFS:
        assert np.abs(CDFS[alpha](shares) - np.arange(1, 3001) / 3000).max() < 1.95 / math.sqrt(3000)
    else:  # 0 or 1, each half of the time
        assert ((shares < 1e-3) | (shares > 1 - 1e-3)).mean() > 0.98 and abs((shares > 0.5).mean() - 0.5) < 0.04


def test_cutmix_pastes_boxes_and_weighs_labels_by_their_area(monkeypatch):
    monkeypatch.setattr(mixing, "draw_share", lambda alpha: 0.75)
    x, y = numbered(batch=6, size=16)
    method, _ = prepared("cutmix", train=images(classes=6, size=16))
    before, areas = x.clone(), []
    torch.manual_seed(0)
    for _ in range(50):
        mixed, soft = method.batch(x, y)
        boxes = set()
        for i, j, share in pairs_of(soft):
            pasted = (mixed[i] != x[i]).all(dim=0)
            assert torch.equal(mixed[i][:, ~pasted], x[i][:, ~pasted])
            if i == j:
                assert not pasted.any()
                continue
            rows, columns = (pasted.any(dim=d).nonzero().flatten().tolist() for d in (1, 0))
            area = len(rows) * len(columns)
            assert area == pasted.sum() == (rows[-1] + 1 - rows[0]) * (columns[-1] + 1 - columns[0])  # a box
            assert torch.equal(mixed[i][:, pasted], x[j][:, pasted])
            assert share == pytest.approx(1 - area / 256)
            boxes.add((*rows, *columns))
            areas.append(area / 256)
        assert len(boxes) <= 1
    assert torch.equal(x, before)
    assert max(areas) == 0.25 > 2 * min(areas)  # a share 1 − λ, less what is cut off


def test_manifold_mixup_mixes_one_layer_by_hand():
    x, y = numbered()
    method, model = prepared("manifold_mixup", train=images(classes=8))
    received = []
    for site in method.sites.sites:
        site.register_forward_hook(lambda site, args, out: received.append((args[0].clone(), out.clone())))
    chosen = set()
    with torch.no_grad():
        for seed in range(24):
            received.clear()
            torch.manual_seed(seed)
            mixed, soft = method.batch(x, y)
            pairs = pairs_of(soft)
            model(mixed)
            where = [k for k, (h, out) in enumerate(received) if not torch.equal(h, out)]
            if where:
                (layer,) = where
                assert torch.equal(mixed, x)
                torch.testing.assert_close(received[layer][1], by_hand(received[layer][0], pairs))
                chosen.add(layer)
            elif not torch.equal(mixed, x):
                torch.testing.assert_close(mixed, by_hand(x, pairs))
                chosen.add("input")
        assert chosen == {"input", 0, 1, 2}
        received.clear()
        model(x)  # without `batch`: nothing is mixed
        model.eval()
        for _ in range(6):  # nor in evaluation
            method.batch(x, y)
            model(x)
        assert all(torch.equal(h, out) for h, out in received) and len(received) == 7 * 3


# --- adversarial training


@pytest.mark.parametrize("eps", [1 / 255, 0.1, 1.0])
def test_examples_by_hand(eps):
    """A linear network: every step adds step_size · sign(w_k − …) of a gradient worked out on paper."""
    method, _ = prepared("adversarial", adversarial_eps=eps, adversarial_steps=3, adversarial_step_size=eps / 5)
    (x, _), y, linear = numbered(16), torch.arange(16) % 10, nn.Linear(3 * 12 * 12, 10)
    before = x.clone()
    method.prepare(nn.Sequential(nn.Flatten(), linear), None)
    torch.manual_seed(2)
    adversarial, labels = method.batch(x, y)
    assert labels is y and torch.equal(x, before) and not adversarial.requires_grad
    torch.manual_seed(2)
    expected = (x + torch.empty_like(x).uniform_(-2 * eps, 2 * eps)).clamp(-1, 1)
    for _ in range(3):
        p = linear(expected.flatten(1)).detach().softmax(1)
        gradient = (p - F.one_hot(y, 10)) @ linear.weight.detach()  # of the loss of each image
        expected = expected + 2 * eps / 5 * gradient.sign().view_as(x)
        expected = torch.min(torch.max(expected, x - 2 * eps), x + 2 * eps).clamp(-1, 1)
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-6)


def test_the_network_is_attacked_as_it_trains_and_left_as_it_was():
    """By default in the original's seven steps of 2/255, within 8/255."""
    (method, model), (x, _), y = prepared("adversarial"), numbered(16), torch.arange(16) % 10
    assert (method.eps, method.steps, method.step_size) == (2 * 8 / 255, 7, 2 * 2 / 255)  # of images in [-1, 1]
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    trained_on = []
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    norm.register_forward_hook(lambda module, args, out: trained_on.append(out.detach().mean(dim=(0, 2, 3))))
    method.batch(x, y)
    assert len(trained_on) == 7
    assert all(mean.abs().max() < 1e-4 for mean in trained_on)  # statistics of the batch: mean 0
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# --- TrivialAugment


def test_trivial_augment_is_for_training_images(common, base_state, draws_itself, tmp_path, monkeypatch):
    """One call for each training image of each step, none for evaluation; where it changes nothing, that is Base."""
    torch.manual_seed(0)
    given = torch.randint(0, 256, (64, 3, 12, 12), dtype=torch.uint8)
    augmented = create(MetaTestConfig(method="trivial_augment")).augment(kept := given.clone())
    assert torch.equal(given, kept) and augmented.shape == given.shape and augmented.dtype == torch.uint8
    assert (augmented != given).flatten(1).any(dim=1).float().mean().item() > 0.6
    calls = []
    monkeypatch.setattr(TrivialAugmentWide, "forward", lambda self, image: calls.append(image.dtype) or image)
    check_same(model_state(train(tmp_path / "tgt", common, "method=trivial_augment")), base_state)
    assert calls == [torch.uint8] * 4 * 16


# --- sites


@pytest.mark.parametrize("name", ["conv4", "vgg9", "resnet20", "wrn_28_2", "mobilenet_v2"])
def test_site_methods_on_every_network(name):
    model = models.create(name, 10, 32)
    expected = find_sites(model, 32)
    plain = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([1, 7])
    with torch.no_grad():
        reference = model.eval()(x)
    for kind in SITE_METHODS:
        model.load_state_dict(plain)
        method, _ = prepared(kind, model, images(size=32))
        assert method.sites.specs == expected  # where MetaPerturb acts
        assert kind != "dropout" or {(type(site), site.p) for site in method.sites.sites} == {(nn.Dropout, 0.25)}
        method.set_strength(1.0)
        mixed, labels = method.batch(x, y)
        method.loss(model(mixed), labels).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(x), model(x))
            model.load_state_dict(plain, strict=False)
            if kind != "info_dropout":  # whose noise has a mean other than 1
                assert torch.equal(model(x), reference)
        model.zero_grad()
        detach(model)
        assert list(model.state_dict()) == list(plain)
        with torch.no_grad():
            assert torch.equal(model(x), reference)


def test_placing_beside_an_attached_phi_and_copying():
    method, model = prepared("dropblock", dropblock_prob=0.5)
    attach(model, MetaPerturb(), 12, verbose=False)
    clone = copy.deepcopy(model)
    assert method.sites.sites[0].strength == 1.0 and clone.regularizer.sites[0] is not model.regularizer.sites[0]
    detach(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- training runs


def with_dropout(*_):
    """A network that draws numbers itself, in training: others than with Base if a method draws any before."""
    layers = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 8, 3), nn.ReLU())
    return nn.Sequential(*layers, nn.Dropout(0.3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


@pytest.fixture
def draws_itself(monkeypatch):
    monkeypatch.setattr(models, "create", with_dropout)


def check_same(state, base):
    assert all(torch.equal(value, state[key]) for key, value in base.items())


@pytest.fixture(scope="module")
def common(target_settings) -> list[str]:
    return [*target_settings, "steps=4", "lr_milestones=0.5"]


@pytest.fixture(scope="module")
def base_state(common, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "create", with_dropout)
        return model_state(train(tmp_path_factory.mktemp("base") / "tgt", common, "method=base"))


@pytest.mark.parametrize("off", OFF)
def test_a_method_that_is_off_is_base_bit_for_bit(off, common, base_state, draws_itself, tmp_path):
    """And draws nothing."""
    (name,) = [name for name, method in REGULARIZERS.items() if off.partition("=")[0] in method.settings]
    check_same(model_state(train(tmp_path / "tgt", common, f"method={name}", off)), base_state)


def test_strength_0_is_base_bit_for_bit(common, base_state, draws_itself, phi_file, tmp_path, monkeypatch):
    monkeypatch.setattr(program.training, "annealed_strength", lambda *_: 0.0)
    check_same(model_state(train(tmp_path / "tgt", common, f"phi={phi_file}")), base_state)


@pytest.mark.parametrize("name", BASELINES)
def test_run_interrupt_resume(name, common, base_state, draws_itself, tmp_path, monkeypatch):
    """A run trains otherwise than Base, says what it was, is read back, and continues to the bit where it was cut."""
    settings = [*common, f"method={name}"]
    found = result(train(tmp_path / "whole", settings))
    assert found["config"]["method"] == name and found["metrics"]["samples"] == 1
    defaults = dataclasses.asdict(MetaTestConfig())
    assert all(found["config"][key] == defaults[key] for key in REGULARIZERS[name].settings)
    run = load_run(tmp_path / "whole")
    again = evaluate(run.model, DeviceImages(run.test, torch.device("cpu")), 1, run.config.eval_batch_size)
    assert again == found["metrics"] and not run.stochastic
    whole = model_state(tmp_path / "whole")
    assert any(not torch.equal(value, whole[key]) for key, value in base_state.items())
    assert any("regularizer" in key for key in whole) == (name == "info_dropout")

    if name not in ("info_dropout", "dropblock", "manifold_mixup", "trivial_augment"):
        return  # has neither parameters nor a schedule nor state between two calls
    save = program.save_tensors

    def cut(state, path):
        save(state, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(program, "save_tensors", cut)
        assert program.main(["--set", *settings, f"run_dir={tmp_path / 'cut'}"]) == 130
    assert not (tmp_path / "cut" / "result.json").exists()
    again = model_state(train(tmp_path / "cut", settings))
    assert again.keys() == whole.keys() and result(tmp_path / "cut")["metrics"] == found["metrics"]
    check_same(again, whole)


OUT_OF_RANGE = """
    sites=middle mixup_alpha=-1 cutmix_alpha=nan manifold_mixup_alpha=-0.1 dropout_prob=1 dropblock_prob=-0.1
    dropblock_size=0 label_smoothing=1.5 info_dropout_beta=-3 info_dropout_max_alpha=-1 adversarial_eps=-0.1
    adversarial_eps=8 adversarial_steps=0 adversarial_step_size=0 method=droblock
"""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        *((setting, f"{setting.partition('=')[0]}: ") for setting in OUT_OF_RANGE.split()),
        ("sites=top", "sites: only method metaperturb uses it, this is dropblock"),
        ("noise=false", "noise: only method metaperturb"),
        ("gate=false", "gate: only method metaperturb"),
        ("dropblock_size=4", "dropblock_size: must be odd, got 4"),
        ("method=metaperturb phi=any noise=false gate=false", "noise, gate: with both false φ does nothing"),
        ("method=mixup recipe=mixup", "recipe: mixup is the method already"),
        ("recipe=mixup,mixup", "recipe: mixup stands in it more than once"),
        ("method=cutmix recipe=mixup", "recipe: mixup and cutmix do not go together: each mixes images"),
        ("recipe=cutmix method=manifold_mixup", "recipe: cutmix and manifold_mixup do not go together"),
        ("method=info_dropout recipe=label_smoothing", "label_smoothing and info_dropout do not go together: each has"),
        ("recipe=dropblock", "recipe: expected one of mixup, cutmix, label_smoothing, trivial_augment"),
    ],
)
def test_what_does_not_work_is_one_line(settings, expected, common, tmp_path, refused):
    assert expected in refused(program, [*common, "method=dropblock", f"run_dir={tmp_path / 'tgt'}", *settings.split()])
    assert not (tmp_path / "tgt").exists()


@pytest.mark.parametrize("name", BASELINES)
def test_bfloat16(name):
    method, model = prepared(name, precision="bfloat16")
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    x, y = method.batch(torch.randn(4, 3, 12, 12), torch.arange(4))
    with autocast(torch.device("cpu"), "bfloat16"):
        method.loss(model(x), y).backward()
    assert x.dtype == torch.float32 and seen == [torch.bfloat16] * (8 if name == "adversarial" else 1)
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters())


# --- recipes


def recipe(method, *further, **settings):
    return create(MetaTestConfig(method=method, recipe=list(further), **settings), MetaPerturb())


def test_a_recipe_augments_pixels_and_smooths_what_was_mixed(monkeypatch):
    partner, share = torch.tensor([3, 4, 5, 0, 1, 2]), 0.3
    monkeypatch.setattr(torch, "randperm", lambda *_, **options: partner)
    monkeypatch.setattr(mixing, "draw_share", lambda alpha: share)
    torch.manual_seed(0)
    x, y, logits = torch.randn(6, 3, 8, 8), torch.arange(6), torch.randn(6, 10)
    for method, further in (
        ("base", ("mixup", "trivial_augment", "label_smoothing")),
        ("trivial_augment", ("label_smoothing", "mixup")),
        ("mixup", ("label_smoothing", "trivial_augment")),
    ):
        combined = recipe(method, *further, label_smoothing=0.3)
        combined.prepare(models.create("resnet8", 10, 8), images())
        assert combined.augment.__self__.__class__.__name__ == "TrivialAugment"
        mixed, labels = combined.batch(x, y)
        torch.testing.assert_close(mixed, share * x + (1 - share) * x[partner])
        target = share * F.one_hot(y, 10) + (1 - share) * F.one_hot(y[partner], 10)
        torch.testing.assert_close(labels, target.float())
        expected = -((0.7 * target + 0.03) * logits.log_softmax(dim=1)).sum(dim=1).mean()
        assert combined.loss(logits, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    assert recipe("base", "mixup").augment is None


def test_a_recipe_keeps_what_its_method_is():
    combined = recipe("metaperturb", "label_smoothing", "trivial_augment")
    assert combined.stochastic and combined.ramp == 0.4
    model = models.create("resnet8", 10, 12)
    combined.prepare(model, images())
    combined.set_strength(0.25)
    assert model.metaperturb.strength == 0.25 and combined.sites is model.metaperturb
    dropped = recipe("dropblock", "cutmix")
    assert not dropped.stochastic and dropped.ramp == create(MetaTestConfig(method="dropblock")).ramp
    dropped.prepare(models.create("resnet8", 10, 12), images())
    dropped.set_strength(0.25)
    assert {site.strength for site in dropped.sites.sites} == {0.25}
    adversarial = recipe("adversarial", "label_smoothing")
    assert adversarial.method.attacked_loss == adversarial.loss != adversarial.method.loss
    information = recipe("info_dropout", "mixup")  # whose loss is its own
    model = models.create("resnet8", 10, 12).train()
    information.prepare(model, images())
    logits, labels = model(torch.randn(4, 3, 12, 12)), torch.tensor([0, 1, 2, 3])
    assert information.loss(logits, labels) > F.cross_entropy(logits, labels) + 1.0  # with its KL term


def test_ablations_as_runs(common, tmp_path, capsys):
    """A φ that learned under another one is told."""
    save_phi(MetaPerturb(), tmp_path / "phi.pt", card={"config": {"noise": True, "gate": False}})
    for name, sites in {
        "sites=before_pooling": ["layer1.0", "layer2.0", "layer3.0"],
        "sites=bottom noise=false": ["layer1.0"],
        "sites=bottom gate=false": ["layer1.0"],
    }.items():
        found = result(train(tmp_path / name, common, f"phi={tmp_path / 'phi.pt'}", name))
        assert found["sites"] == sites and found["metrics"]["samples"] == (1 if "noise" in name else 3)
        told = "φ was meta-trained with gate=false, this run has gate=true" in capsys.readouterr().err
        assert told == ("gate" not in name)
