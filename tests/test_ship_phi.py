"""φ in the package: how it gets there, what its card says, and that the one we ship is what it claims to be."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from image_files import one_line
from tables import shipping

from metaperturb import UserError, load_phi, weights
from metaperturb.perturbation import MetaPerturb
from metaperturb.weights import SHIPPED, phi_digest, save_phi

CARD = {
    "source": {"name": "tiny_imagenet-train", "images": 40000, "classes": 200, "fingerprint": "44bdec7ca5ee700a"},
    "metrics": {"train_loss": 2.5, "test_loss": 2.6},
    "seconds": 61.4,
    "config": {
        **{"run_dir": "/home/me/runs/src", "source_paths": ["/home/me/one.zip"], "model": "resnet20", "tasks": 10},
        **{"split": "disjoint", "seed": 3, "image_size": 32, "steps": 750, "batch_size": 32, "lr": 0.001},
        **{"weight_decay": 0.0005, "precision": "float32", "anneal": 0.0},
    },
    "versions": {"torch": "2.11"},
    "hardware": {"cpu": "EPYC", "device": "cpu"},
    "commit": "abc",
    "selection": {
        "chosen": "src-3",
        "evaluated": "s_cifar100, val images",
        "accuracy": {
            "src-3": {"mean": 31.25, "std": None, "seeds": 1},
            "src-0": {"mean": 30.5, "std": 1.0, "seeds": 2},
        },
    },
}


@pytest.fixture
def phi(tmp_path) -> Path:
    torch.manual_seed(3)
    save_phi(MetaPerturb(), tmp_path / "phi.pt", CARD)
    return tmp_path / "phi.pt"


def record(
    folder: Path, row: str, seed: int, accuracy: float, phi: str | None, taken_from=None, phi_card=None, **settings
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model": "resnet20", "steps": 4000, "batch_size": 32, "seed": seed, **settings}
    metrics = {"accuracy": accuracy, "nll": 1.0, "ece": 0.1}
    result = {"metrics": metrics, "config": config, "target": {"fingerprints": ["train", "test"]}, "phi_card": phi_card}
    content = {
        "row": row,
        "column": "CUB",
        "seed": seed,
        "needs": {} if phi is None else {"phi": phi},
        "result": result,
    }
    content |= {"taken_from": taken_from} if taken_from else {}
    (folder / f"{row.lower()}--cub--seed{seed}--{phi}.json").write_text(json.dumps(content))


def ship(*arguments: object) -> int:
    return shipping.main([*map(str, arguments)])


def test_what_is_shipped_and_what_its_card_says(phi, tmp_path):
    results, out = tmp_path / "results", tmp_path / "out"
    assert ship("mine", phi, "--results", results, "--out", out) == 0
    shipped, original = load_phi(out / "mine.pt"), load_phi(phi)
    assert all(torch.equal(a, b) for a, b in zip(shipped.parameters(), original.parameters(), strict=True))
    assert shipped.card["selection"] == CARD["selection"]
    assert "/home" not in json.dumps(shipped.card) and shipped.card["config"]["source_paths"] == ["one.zip"]
    assert "Nothing yet." in (out / "mine.md").read_text()

    ours = f"phi_of_seed_3-{phi_digest(original):.8}"
    for seed, base, accuracy in ((0, 0.30, 0.33), (1, 0.32, 0.34)):
        record(results / "schedule" / "cpu", "Base", seed, base, None)
        record(results / "schedule" / "cpu", "MetaPerturb", seed, accuracy, ours)
        record(results / "schedule" / "cpu", "Other", seed, 0.5, "phi-00000000")
        record(results / "schedule" / "smoke", "MetaPerturb", seed, accuracy, ours)
        record(results / "table1" / "cpu", "Base", seed, base, None)
        record(results / "table1" / "cpu", "Finetuning (FT)", seed, base + 0.1, None)
        record(results / "table1" / "cpu", "FT + MetaPerturb", seed, accuracy + 0.1, ours)
    record(results / "recipe" / "cpu", "Recipe", 0, 0.4, None)
    record(results / "recipe" / "cpu", "Recipe + MetaPerturb", 0, 0.405, ours)
    made = {"config": {"seed": 0, "eval_split": "test"}, "fingerprints": ["a", "b"]}
    for needs in ({"phi": ours}, {"phi": "phi-00000000"}, {}):
        lost = {"table": "networks", "row": "MetaPerturb", "column": "Net", "seed": len(needs), "needs": needs}
        path = results / "networks" / "cpu" / "diverged" / f"row--net--{len(str(needs))}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(lost | {"diverged": "step 3: not finite", **made}))
    for name, split in (("later", "test"), ("chosen", "val")):  # one that finished later, one that chose something
        lost |= {"needs": {"phi": ours}, "diverged": "not finite", **made, "config": {"seed": 0, "eval_split": split}}
        (path.parent / f"row--{name}--0.json").write_text(json.dumps(lost))
    record(path.parent.parent, "Later", 0, 0.3, None)
    next(path.parent.parent.glob("later*")).rename(path.parent.parent / "row--later--0.json")
    assert ship("mine", "--results", results, "--out", out) == 0
    text = (out / "mine.md").read_text()
    assert text.count("not finite") == 1
    assert "\n- networks, preset cpu: MetaPerturb, Net, seed 1: step 3: not finite\n" in text
    (recipe,) = (line for line in text.splitlines() if line.startswith("| recipe"))
    assert recipe.endswith("| 0 | Recipe: 40.00 |  | 40.50 | +0.50 |")  # what the row says that it is compared with
    lines = [line for line in text.splitlines() if line.startswith("| schedule")]
    expected = "| 0, 1 | Base: 31.00 ± 1.41 |  | 33.50 ± 0.71 | +2.50 [-3.85, +8.85] |"  # t = 12.706
    assert len(lines) == 1 and lines[0].endswith(expected) and "4,000 steps of 32" in lines[0]
    (finetuned,) = (line for line in text.splitlines() if line.startswith("| table1"))
    assert finetuned.endswith("| Finetuning (FT): 41.00 ± 1.41 |  | 43.50 ± 0.71 | +2.50 [-3.85, +8.85] |")
    for part in ("40,000 images of 200 classes", "disjoint, 10 tasks, seed 3", "750 steps, batches of 32", "`abc`"):
        assert part in text
    chosen = "src-3, the best of 2 meta-trainings by accuracy (seeds) on s_cifar100, val images: "
    assert f"{chosen}src-3 31.25 % (1), src-0 30.50 % (2)\n" in text


def test_what_is_not_shipped(phi, tmp_path, capsys):
    save_phi(MetaPerturb(), tmp_path / "bare.pt")
    save_phi(MetaPerturb(), tmp_path / "less.pt", CARD | {"metrics": None})
    save_phi(MetaPerturb(), tmp_path / "drawn.pt", CARD | {"metrics": None, "config": CARD["config"] | {"steps": 0}})
    for arguments, said in (
        (("mine", tmp_path / "drawn.pt"), "drawn.pt: was not meta-trained (0 steps)"),
        (("a-b", phi), "a-b: a name has letters, digits and underscores only"),
        (("mine", tmp_path / "bare.pt"), "bare.pt: its card does not say how it was meta-trained: no config, source,"),
        (("mine", tmp_path / "less.pt"), "less.pt: its card does not say how it was meta-trained: no metrics"),
        (("2mine", phi), "2mine: a name has letters, digits and underscores only, and does not begin with a digit"),
        (("mine", tmp_path / "none.pt"), "none.pt: no such φ file"),
        (("mine",), "mine.pt: no such φ yet; name the file to ship"),
    ):
        assert ship(*arguments, "--out", tmp_path / "out", "--results", tmp_path) == 1
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def table_lines(card: Path) -> list[str]:
    """Of the table: its head and a line a row."""
    return [line for line in card.read_text().partition("## Tested on")[2].splitlines() if line.startswith("|")]


def test_the_control_is_of_the_same_settings_in_any_table(phi, tmp_path):
    """Not of another number of steps, nor a φ that was meta-trained; settings that came later have their defaults."""
    results, ours = tmp_path / "results", f"phi-{phi_digest(load_phi(phi)):.8}"
    record(results / "schedule" / "cpu", "MetaPerturb", 0, 0.5, ours, clip_eval=False)
    for seed, accuracy in enumerate((0.44, 0.46)):
        record(results / "recipe" / "cpu", "Control", seed, accuracy, "p-0", phi_card={"config": {"steps": 0}})
    record(results / "recipe" / "cpu", "Longer", 2, 0.9, "p-1", phi_card={"config": {"steps": 0}}, steps=8000)
    record(results / "recipe" / "cpu", "Clipped", 2, 0.9, "p-2", phi_card={"config": {"steps": 0}}, clip_eval=True)
    record(results / "recipe" / "cpu", "Learned", 2, 0.9, "p-3", phi_card={"config": {"steps": 750}})
    assert ship("mine", phi, "--results", results, "--out", tmp_path / "out") == 0
    (_, _, line) = table_lines(tmp_path / "out" / "mine.md")
    assert line.endswith("| 0 |  | 45.00 ± 1.41 (2) | 50.00 |  |")


def test_what_counts_as_tested(phi, tmp_path, capsys):
    """On test images; without φ, of the seeds that φ has; folders of other settings and damaged records are said."""
    results, ours = tmp_path / "results", f"phi-{phi_digest(load_phi(phi)):.8}"
    record(results / "select" / "cpu", "Base", 0, 0.3, None, eval_split="val")
    record(results / "select" / "cpu", "src-3", 0, 0.4, ours, eval_split="val")
    record(results / "schedule" / "cpu", "MetaPerturb", 1, 0.5, ours)
    for seed, accuracy in enumerate((0.1, 0.2, 0.3)):
        record(results / "schedule" / "cpu", "Base", seed, accuracy, None)
    record(results / "schedule" / "cpu-1a2b3c4d", "MetaPerturb", 1, 0.9, ours)
    assert ship("mine", phi, "--results", results, "--out", tmp_path / "out") == 0
    assert "cpu-1a2b3c4d: left out (" in capsys.readouterr().err
    lines = table_lines(tmp_path / "out" / "mine.md")
    assert len(lines) == 3 and lines[2].endswith("| 1 | Base: 20.00 |  | 50.00 | +30.00 |")
    # A training that a table took over counts where it was run.
    (origin,) = (results / "schedule" / "cpu").glob("metaperturb--*")
    record(results / "table1" / "cpu", "MetaPerturb", 1, 0.5, ours, f"schedule/cpu/{origin.name}")
    record(results / "table1" / "cpu", "MetaPerturb", 2, 0.7, ours)
    assert ship("mine", "--results", results, "--out", tmp_path / "out") == 0
    lines = table_lines(tmp_path / "out" / "mine.md")
    assert len(lines) == 4 and lines[2].startswith("| schedule") and "| 1 |" in lines[2]
    assert lines[3].startswith("| table1") and "| 2 |" in lines[3]
    shutil.rmtree(results / "table1")
    (results / "schedule" / "cpu" / "damaged--x--seed0--1.json").write_text("{}")
    assert ship("mine", "--results", results, "--out", tmp_path / "out") == 1
    assert "damaged--x--seed0--1.json: is no record of a training run; remove it" in capsys.readouterr().err
    (results / "schedule" / "cpu" / "damaged--x--seed0--1.json").unlink()
    record(results / "schedule" / "cpu", "MetaPerturb", 1, 0.6, f"phi_of_another_name-{phi_digest(load_phi(phi)):.8}")
    assert ship("mine", "--results", results, "--out", tmp_path / "out") == 1
    assert "there are two records of MetaPerturb, CUB, seed 1" in capsys.readouterr().err


def test_a_shipped_phi_is_known_by_its_name(phi, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHIPPED", tmp_path / "out")
    assert ship("mine", phi, "--results", tmp_path, "--out", tmp_path / "out") == 0
    assert phi_digest(load_phi("mine")) == phi_digest(load_phi(phi))
    with pytest.raises(UserError) as error:
        load_phi("yours")
    assert "yours: no such φ file (shipped names: mine)" in one_line(error)


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
