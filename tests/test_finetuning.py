"""Finetuning: what is taken from a pretrained network and what is not, which files are refused, and whole runs."""

import copy
import hashlib
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import model_state, result, train
from image_files import refusal
from torch import nn

import metaperturb.meta_test as program
from metaperturb import models
from metaperturb.dry_run import classifier_name
from metaperturb.finetuning import initialize
from metaperturb.storage import load_tensors

CLASSIFIERS = {
    **dict.fromkeys(models.ZOO, "fc"),
    "resnet18": "fc",
    "mobilenet_v2": "classifier.1",
    "densenet121": "classifier",
    "alexnet": "classifier.6",
    "squeezenet1_1": "classifier.1",  # a convolution, which an activation and a pooling follow
    "efficientnet_b0": "classifier.1",
    "shufflenet_v2_x0_5": "fc",
}


def size_of(name: str) -> int:
    return 32 if name in models.ZOO else 64


def network(name: str, num_classes: int = 6, seed: int = 0) -> nn.Module:
    """With weights and statistics that are all of them drawn, so that no two networks have any in common."""
    torch.manual_seed(seed)
    model = models.create(name, num_classes, size_of(name))
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                # Near 1, so that batch norm's variances are positive, or small, so that deep networks stay in range.
                value.copy_(1 + 0.1 * torch.rand_like(value) if value.dim() == 1 else 0.1 * torch.randn_like(value))
            else:
                value.fill_(seed + 1)
    return model


def saved(model: nn.Module, path: Path) -> Path:
    torch.save(model.state_dict(), path)
    return path


def quietly(model, path, size=32, batch_norm="drop"):
    return initialize(model, size, path, batch_norm, verbose=False)


# --- which module is the classifier


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_classifier_is_found_and_the_network_left_alone(name):
    model = network(name, num_classes=64 if name in models.ZOO else 6)  # 64: as many classes as hidden channels
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    assert classifier_name(model, size_of(name)) == CLASSIFIERS[name]
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Prototypes(nn.Sequential):
    """Its logits come from no layer: what is behind the last convolution cannot be left out by name."""

    def forward(self, x):
        return super().forward(x).mean((2, 3)) @ torch.eye(5, 4)


def test_no_classifier_is_an_error():
    assert "Prototypes: no classifier found" in refusal(classifier_name, Prototypes(nn.Conv2d(3, 5, 3)), 16)
    assert "image_size" in refusal(classifier_name, models.create("conv4", 4, 32), 64)


# --- what is taken


@pytest.mark.parametrize("name", ["resnet8", "conv4", "mobilenet_v2"])
@pytest.mark.parametrize("batch_norm", ["drop", "keep"])
def test_value_by_value(name, batch_norm, tmp_path, capsys):
    """With as many classes as before, so that shapes give nothing away; one line says it."""
    pretrained, model = network(name, seed=1), network(name, seed=2)
    fresh = copy.deepcopy(model.state_dict())
    norms = [f"{n}." for n, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    origin = initialize(model, size_of(name), path := saved(pretrained, tmp_path / "weights.pt"), batch_norm)
    taken, kept = [], (f"{CLASSIFIERS[name]}.", *(norms if batch_norm == "drop" else ()))
    for key, value in model.state_dict().items():
        is_fresh = key.startswith(kept)
        assert not torch.equal(fresh[key], pretrained.state_dict()[key])
        assert torch.equal(value, (fresh if is_fresh else pretrained.state_dict())[key]), key
        taken += [] if is_fresh else [(key, value)]
    content = [f"{key} {value.dtype} {list(value.shape)}\n".encode() + value.numpy().tobytes() for key, value in taken]
    assert origin == {
        **{"from": str(path), "sha256": hashlib.sha256(b"".join(content)).hexdigest(), "tensors": len(taken)},
        **{"classifier": CLASSIFIERS[name], "batch_norm": batch_norm, "run": None},
    }
    said = f"init: {len(taken)} tensors from {path}; the classifier {CLASSIFIERS[name]} starts fresh; batch norm "
    assert capsys.readouterr().err == said + {"drop": "starts fresh\n", "keep": "taken, too\n"}[batch_norm]


def test_another_image_size_where_the_network_allows_it(tmp_path):
    path = saved(models.create("conv4", 6, 32), tmp_path / "weights.pt")
    model = models.create("conv4", 6, 64)  # its classifier has four times the inputs
    assert quietly(model, path, 64)["tensors"] == 8

    class Hidden(nn.Sequential):
        def __init__(self, size):
            super().__init__(nn.Conv2d(3, 2, 3, padding=1), nn.ReLU(), nn.Flatten())
            self.extend([nn.Linear(2 * size**2, 5), nn.ReLU(), nn.Linear(5, 4)])

    path = saved(Hidden(8), tmp_path / "hidden.pt")
    assert quietly(Hidden(8), path, 8)["classifier"] == "5"
    assert "3.weight should be [5, 512], found torch.float32 [5, 128]" in refusal(quietly, Hidden(16), path, 16)


def test_half_precision_and_batch_norm_without_counts(tmp_path):
    """As files of older versions of PyTorch and torchvision are."""
    state = {k: v.half() for k, v in network("resnet8", seed=1).state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "weights.pt")
    model = network("resnet8", seed=2)
    quietly(model, tmp_path / "weights.pt", batch_norm="keep")
    ours = model.state_dict()
    assert all(torch.equal(ours[k], v.float()) for k, v in state.items() if not k.startswith("fc."))
    assert all(v == 3 for k, v in ours.items() if "num_batches" in k)


# --- what is refused


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def broken(**changes):
    state = network("resnet8").state_dict()
    return {key: value for key, value in {**state, **changes}.items() if value is not None}


CONV, WHOLE = "layer1.0.conv1.weight", torch.zeros(16, 16, 3, 3)
REFUSED = {
    "no such file": (None, "no such file or run folder"),
    "half a file": (b"PK\x03\x04 half a file", "weights.pt"),
    "code": (pickle.dumps({"conv1.weight": Malicious()}), "could run code"),
    "numbered": ({0: torch.zeros(1)}, "holds no network"),
    "missing": (broken(**{CONV: None}), f"not the weights of this network: lacks {CONV}"),
    "unknown": (broken(**{"layer9.bias": torch.zeros(1)}), "has unknown layer9.bias"),
    **{
        kind: (broken(**{CONV: value}), f"{CONV} {said}")
        for kind, value, said in (
            ("shape", WHOLE[..., :1, :1], "should be [16, 16, 3, 3], found torch.float32 [16, 16, 1, 1]"),
            ("kind", WHOLE.to(torch.int8), "should be [16, 16, 3, 3], found torch.int8"),
            ("complex", WHOLE.to(torch.complex64), "should be [16, 16, 3, 3], found torch.complex64"),
            ("sparse", WHOLE.to_sparse(), "should be [16, 16, 3, 3], found no dense tensor (Tensor)"),
            ("not finite", WHOLE + float("nan"), "holds values that are not finite"),
        )
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_and_nothing_changed(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, expected = REFUSED[case]
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    model = network("resnet8", seed=2)
    before = copy.deepcopy(model.state_dict())
    assert expected in refusal(quietly, model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not (tmp_path / "executed").exists()


def test_what_is_not_taken_need_not_be_right(tmp_path):
    state = broken(**{"bn1.running_mean": torch.full((16,), float("nan")), "fc.weight": torch.zeros(1)})
    torch.save(state, tmp_path / "weights.pt")
    model, path = network("resnet8"), tmp_path / "weights.pt"
    quietly(model, path, batch_norm="drop")
    assert "bn1.running_mean holds values that are not finite" in refusal(quietly, model, path, batch_norm="keep")


# --- runs


@pytest.fixture(scope="module")
def settings(target_settings, phi_file) -> list[str]:
    return [*target_settings, f"phi={phi_file}"]


@pytest.fixture(scope="module")
def pretrained(target_settings, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("pretrained") / "pre", target_settings, "method=base steps=6 seed=5")


PAIRS = [("base", "info_dropout"), ("metaperturb", "base"), ("info_dropout", "metaperturb")]


@pytest.mark.parametrize(("method", "before"), PAIRS)
def test_every_method_begins_with_the_pretrained_weights(method, before, settings, tmp_path, capsys):
    """With a learning rate of 0 they are still there at the end; the rest is what a run from scratch begins with."""
    pretrained = train(tmp_path / "pretrained", settings, f"method={before} steps=6 seed=5")
    common = [*settings, f"method={method}", "steps=1", "lr=0", "weight_decay=0"]
    source = pretrained / ("checkpoints/latest.pt" if method == "metaperturb" else "")
    runs = train(tmp_path / "ft", common, f"init={source}"), train(tmp_path / "scratch", common), pretrained
    assert capsys.readouterr().err.count(f"init: 7 tensors from {source}; the classifier fc starts fresh") == 1
    ours, scratch, weights = map(model_state, runs)
    assert ours.keys() == scratch.keys() and weights.keys() != ours.keys()
    for key, value in ours.items():
        if "conv" in key and "regularizer" not in key:
            assert torch.equal(value, weights[key]) and not torch.equal(value, scratch[key])
        elif not key.endswith(("running_mean", "running_var")):
            assert torch.equal(value, scratch[key]), key
    began, drawn, whole = (result(run) for run in runs)
    assert drawn["init"] is None and (began["init"]["run"] is None) == (source != pretrained)
    if run := began["init"]["run"]:
        assert [run[key] for key in ("seed", "steps", "method")] == [5, 6, before]
        assert (run["data"]["train"], run["metrics"]) == (80, whole["metrics"])


def test_a_pretrained_network_may_move_or_vanish_but_not_change(settings, pretrained, tmp_path, capsys):
    """Whether the run that began with it is finished or goes on."""
    init, moved, run_dir = tmp_path / "pre", tmp_path / "moved", tmp_path / "tgt"
    common = ["--set", *settings, "method=base", "steps=4", f"run_dir={run_dir}"]
    shutil.copytree(pretrained, init)
    assert program.main([*common, f"init={init}"]) == 0
    whole, state = result(run_dir), model_state(run_dir)
    assert program.main([*common, "init_batch_norm=keep"]) == 1  # from scratch it is another run
    message = capsys.readouterr().err
    assert f"init: {init} → None" in message and "init_batch_norm: drop → keep" in message
    init.rename(moved)

    def again() -> list[tuple[int, str]]:
        found = [(program.main([*common, f"init={moved}"]), capsys.readouterr().err)]
        (run_dir / "result.json").unlink()  # as if killed before its end
        return [*found, (program.main([*common, f"init={moved}"]), capsys.readouterr().err)]

    assert all(code == 0 and "not compared" not in said for code, said in again())
    assert result(run_dir)["metrics"] == whole["metrics"]
    checkpoint = moved / "checkpoints" / "latest.pt"
    changed = load_tensors(checkpoint)
    changed["model"]["conv1.weight"] += 1
    torch.save(changed, checkpoint)
    said = f"the network in {moved} changed since this run began"
    assert all(code == 1 and said in message for code, message in again())
    checkpoint.unlink()
    assert program.main([*common, f"init={moved}", f"run_dir={tmp_path / 'new'}"]) == 1  # what begins needs all of it
    assert f"error: init: {checkpoint}: no such file" in capsys.readouterr().err and not (tmp_path / "new").exists()
    shutil.rmtree(moved)
    assert program.main([*common, f"init={moved}"]) == 0
    message = capsys.readouterr().err
    assert f"not compared with what it began with: init: {moved}: no such file" in message
    assert "resuming after step 4" in message and "tensors from" not in message
    assert all(torch.equal(value, state[name]) for name, value in model_state(run_dir).items())
    assert (result(run_dir)["metrics"], result(run_dir)["init"]) == (whole["metrics"], whole["init"])
