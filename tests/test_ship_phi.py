"""φ in the package: how it gets there, what its card says, and that the one we ship is what it claims to be."""

import json
from pathlib import Path

import make_tables
import pytest
import torch
from image_files import refusal

from metaperturb import load_phi, weights
from metaperturb.identity import tell_phi
from metaperturb.perturbation import MetaPerturb
from metaperturb.weights import SHIPPED, phi_digest, save_phi

CARD = {
    "source": {"name": "tiny_imagenet-train", "images": 40000, "classes": 200, "fingerprint": "44bdec7ca5ee700a"},
    **{"metrics": {"train_loss": 2.5, "test_loss": 2.6}, "seconds": 61.4, "versions": {"torch": "2.11"}},
    "config": {
        **{"run_dir": "/home/me/runs/src", "source_paths": ["/home/me/one.zip"], "model": "resnet20", "tasks": 10},
        **{"split": "disjoint", "seed": 3, "image_size": 32, "steps": 750, "batch_size": 32, "lr": 0.001},
        **{"weight_decay": 0.0005, "precision": "float32", "anneal": 0.0},
    },
    **{"hardware": {"cpu": "EPYC", "device": "cpu"}, "commit": "abc"},
    "selection": {
        "chosen": "src-3",
        "evaluated": "s_cifar100, val images",
        "accuracy": {"src-3": {"mean": 31.25, "seeds": 1}, "src-0": {"mean": 30.5, "std": 1.0, "seeds": 2}},
    },
}


@pytest.fixture
def phi(tmp_path) -> Path:
    torch.manual_seed(3)
    save_phi(MetaPerturb(), tmp_path / "phi.pt", CARD)
    return tmp_path / "phi.pt"


def ship(*arguments: object) -> int:
    return make_tables.main(["ship", *map(str, arguments)])


def test_what_is_shipped_and_what_its_card_says(phi, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert ship("mine", phi, "--out", out) == 0
    shipped, original = load_phi(out / "mine.pt"), load_phi(phi)
    assert shipped.card["selection"] == CARD["selection"]
    assert "/home" not in json.dumps(shipped.card) and shipped.card["config"]["source_paths"] == ["one.zip"]
    text = (out / "mine.md").read_text()
    for part in ("40,000 images of 200 classes", "disjoint, 10 tasks, seed 3", "750 steps, batches of 32", "`abc`"):
        assert part in text
    chosen = "src-3, the best of 2 meta-trainings by accuracy (seeds) on s_cifar100, val images: "
    assert f"{chosen}src-3 31.25 % (1), src-0 30.50 % (2)\n" in text
    monkeypatch.setattr(weights, "SHIPPED", out)
    assert phi_digest(load_phi("mine")) == phi_digest(original)
    assert "yours: no such φ file (shipped names: mine)" in refusal(load_phi, "yours")
    (out / "mine.md").unlink()
    assert ship("mine", "--out", out) == 0  # the page again, of what is shipped
    assert (out / "mine.md").read_text() == text


def test_what_is_not_shipped(phi, tmp_path, capsys):
    save_phi(MetaPerturb(), tmp_path / "bare.pt")
    save_phi(MetaPerturb(), tmp_path / "less.pt", CARD | {"metrics": None})
    for arguments, said in (
        (("a-b", phi), "a-b: a name has letters, digits and underscores only"),
        (("mine", tmp_path / "bare.pt"), "bare.pt: its card does not say how it was meta-trained: no config, source,"),
        (("mine", tmp_path / "less.pt"), "less.pt: its card does not say how it was meta-trained: no metrics"),
        (("mine", tmp_path / "none.pt"), "none.pt: no such φ file"),
        (("mine",), "mine.pt: no such φ yet; name the file to ship"),
    ):
        assert ship(*arguments, "--out", tmp_path / "out") == 1
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("made", "warned"),
    [({"steps": 375}, []), ({"steps": 374}, ["374 steps"]), ({"steps": 9, "tasks": 4}, ["9 steps", "4 tasks"])],
)
def test_how_a_phi_was_made_is_told_and_what_is_below_half_of_the_papers_warned_of(tmp_path, capsys, made, warned):
    config = {"tasks": 10} | made
    for name, card in (("mine", CARD | {"config": config}), ("bare", {})):
        save_phi(MetaPerturb(), tmp_path / f"{name}.pt", card)
        tell_phi(name, load_phi(tmp_path / f"{name}.pt"))
    told, *warnings, bare = capsys.readouterr().err.splitlines()
    how = f"meta-trained in {config['steps']} steps of {config['tasks']} tasks, 40,000 images of tiny_imagenet-train"
    assert told == f"φ mine: {how}" and bare == "φ bare: its file does not say how it was meta-trained"
    assert [line.partition(" are far from the paper's ")[0] for line in warnings] == [f"warning: {w}" for w in warned]


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.pt")), ids=lambda path: path.stem)
def test_every_shipped_phi_has_a_card(path):
    phi = load_phi(path.stem)
    values = torch.cat([p.flatten() for p in phi.parameters()])
    assert len(values) == 82 and values.isfinite().all() and not values.requires_grad
    config, source = phi.card["config"], phi.card["source"]
    assert f"{source['images']:,} images of {source['classes']} classes" in path.with_suffix(".md").read_text()
    assert config["steps"] and config["seed"] is not None and phi.card["commit"]
    assert not any("/" in str(value) for value in config.values())
    noise = phi.noise_mean(torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0)).relu())
    assert noise.abs().max() > 0.01  # its noise depends on what it perturbs
