"""The zoo: parameter counts as published, shapes, initial weights, names."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from image_files import one_line
from torch import nn

from metaperturb import UserError, models

# Classes, image size, parameters. CIFAR ResNets with parameter-free shortcuts: He et al. 2016, table 6 ("0.27M, …").
PUBLISHED = {
    "resnet20": [(10, 32, 269_722)],
    "resnet32": [(10, 32, 464_154)],
    "resnet44": [(10, 32, 658_586)],
    "resnet56": [(10, 32, 853_018)],
    "wrn_28_2": [(10, 32, 1_467_610)],
    "resnet18": [(1000, 32, 11_689_512)],
    "resnet34": [(1000, 32, 21_797_672)],
    "conv4": [(10, 32, 115_658), (200, 84, 433_288)],  # these by hand
    "conv6": [(10, 32, 189_770), (200, 84, 507_400)],
    "vgg9": [(10, 32, 9_231_114), (200, 84, 9_635_784)],
}


def create_without_weights(name, num_classes=10, image_size=32):
    with torch.device("meta"):
        return models.create(name, num_classes, image_size)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_as_published(name):
    for num_classes, image_size, expected in PUBLISHED[name]:
        assert sum(p.numel() for p in create_without_weights(name, num_classes, image_size).parameters()) == expected


SIZES = [(name, size) for name in PUBLISHED for size in (32, 84, 96)]
SIZES += [("conv4", 16), ("conv6", 16), ("vgg9", 32)]  # the smallest
SIZES += [("googlenet", 64), ("inception_v3", 96), ("densenet121", 64)]  # of torchvision, without what is auxiliary


@pytest.mark.parametrize(("name", "image_size"), SIZES)
def test_plain_logits_in_training(name, image_size):
    logits = create_without_weights(name, 7, image_size).train()(
        torch.empty(4, 3, image_size, image_size, device="meta")
    )
    assert isinstance(logits, torch.Tensor) and logits.shape == (4, 7)


@pytest.mark.parametrize(("name", "smallest"), [("conv4", 4), ("vgg9", 2), ("resnet20", 8), ("wrn_28_2", 8)])
def test_downsampling(name, smallest):
    """The smallest map that a convolution sees."""
    model, sizes = create_without_weights(name).eval(), []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, args, out: sizes.append(args[0].shape[-1]))
    model(torch.empty(2, 3, 32, 32, device="meta"))
    assert min(sizes) == smallest


def test_cifar_resnet_by_hand():
    """Batch norm is the identity at first in evaluation, so the whole of ResNet8 can be written down."""
    torch.manual_seed(0)
    model = models.create("resnet8", 5, 32).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    norm = (1 + 1e-5) ** -0.5

    def conv(x, module):
        return nn.functional.conv2d(x, module.weight, stride=module.stride, padding=1) * norm

    h = conv(x, model.conv1).relu()
    for layer in (model.layer1, model.layer2, model.layer3):
        block = layer[0]
        out = conv(conv(h, block.conv1).relu(), block.conv2)
        shortcut = torch.zeros_like(out)
        border = (out.shape[1] - h.shape[1]) // 2
        step = h.shape[2] // out.shape[2]
        shortcut[:, border : border + h.shape[1]] = h[:, :, ::step, ::step]
        h = (out + shortcut).relu()
    assert h.shape == (2, 64, 8, 8)
    torch.testing.assert_close(model(x), model.fc(h.mean(dim=(2, 3))))


@pytest.mark.parametrize("name", ["resnet20", "wrn_28_2", "conv4"])
def test_signals_keep_their_size_at_initialization(name):
    torch.manual_seed(0)
    model = models.create(name, 10, 32).train()
    logits = model(torch.randn(16, 3, 32, 32))
    assert 0.02 < logits.std() < 20
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()


# --- torchvision and timm


REFUSED = [
    *((name, 10, 32, name) for name in ("", "alexnet2000", "timm", "os.system", "resnet20 ")),
    *(("resnet20", count, 32, f"got {count}") for count in (1, 0, -3)),
    *((name, 10, size, f"image_size {size}: too small") for name, size in (("conv4", 15), ("conv6", 8), ("vgg9", 31))),
    *((name, 10, 32, f"near: {near}") for name, near in (("vg9", "vgg9"), ("wrn-28-2", "wrn_28_2"))),
]


@pytest.mark.parametrize(("name", "num_classes", "image_size", "said"), REFUSED)
def test_what_is_refused(name, num_classes, image_size, said):
    with pytest.raises(UserError) as error:
        models.create(name, num_classes, image_size)
    assert said in one_line(error)


def test_timm_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # makes `import timm` fail
    with pytest.raises(UserError) as error:
        models.create("timm/resnet10t", num_classes=10, image_size=32)
    message = one_line(error)
    assert "timm/resnet10t" in message and "pip install" in message


def test_timm_network():
    pytest.importorskip("timm")
    model = models.create("timm/resnet10t", num_classes=10, image_size=32)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(UserError, match="resnet10t"):
        models.create("timm/resnet10", num_classes=10, image_size=32)


def test_what_is_slow_to_import_waits_until_it_is_needed():
    """Each of these takes a second or more, before a program has said what is wrong with its settings."""
    code = """
import sys, metaperturb, metaperturb.meta_test, metaperturb.meta_train
slow = ("torch._dynamo", "torchvision", "matplotlib", "scipy", "timm", "triton")
print([name for name in slow if name in sys.modules])
metaperturb.attach(metaperturb.models.create("resnet8", 10, 16), metaperturb.MetaPerturb(), image_size=16)
print([name for name in ("torchvision", "matplotlib") if name in sys.modules])
metaperturb.models.create("mobilenet_v3_small", 10, 32)
print("torchvision" in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    completed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert completed.stdout.splitlines() == ["[]", "[]", "True"]
