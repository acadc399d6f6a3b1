"""The one mechanism for settings: types, ranges and names are checked before any work."""

import dataclasses
from pathlib import Path

import pytest
from conftest import ROOT
from image_files import refusal

from metaperturb.config import MetaTestConfig, MetaTrainConfig, load_config, read_yaml
from metaperturb.identity import differences

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_defaults_are_the_papers():
    source, target = MetaTrainConfig(), MetaTestConfig()
    assert (source.tasks, source.steps, source.batch_size, source.lr, source.weight_decay) == (10, 750, 128, 1e-3, 5e-4)
    assert (source.split, source.clip, source.anneal, source.lookahead) == ("disjoint", 100.0, 0.0, None)
    assert (target.steps, target.lr_milestones, target.lr_factor, target.anneal) == (10_000, [0.4, 0.7, 0.9], 0.3, 0.4)
    assert (target.eval_samples, target.final_samples) == (5, 100)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configs_are_valid_and_say_what_they_are(path):
    if "columns" not in read_yaml(path):  # not a table, whose settings are spread over rows and columns
        load_config(MetaTrainConfig if "src" in path.name else MetaTestConfig, str(path))
    head = path.read_text().split("\n\n")[0]
    assert head.startswith("# ") and "./run.sh" in head


def test_shipped_paper_configs_are_the_defaults():
    assert load_config(MetaTrainConfig, str(ROOT / "configs/src.yaml")) == MetaTrainConfig()
    assert load_config(MetaTestConfig, str(ROOT / "configs/tgt.yaml")) == MetaTestConfig()


def test_the_home_folder_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    texts = ["run_dir=~/r", "data_root=~/d", "source_paths=~/a.zip,b.zip", "split_file=~/s.json"]
    config = load_config(MetaTrainConfig, None, texts)
    found = (config.run_dir, config.data_root, config.source_paths, config.split_file)
    assert found == ("/home/ada/r", "/home/ada/d", ["/home/ada/a.zip", "b.zip"], "/home/ada/s.json")
    texts = ["phi=~/phi.pt", "init=~/run", "target=tiny_imagenet", "target_path=a.zip,~/b.zip", "model=~"]
    config = load_config(MetaTestConfig, None, texts)
    found = (config.phi, config.init, config.target_path, config.target_paths, config.model)
    paths = ["a.zip", "/home/ada/b.zip"]
    assert found == ("/home/ada/phi.pt", "/home/ada/run", ",".join(paths), paths, "~")


def test_file_then_assignments(tmp_path):
    path = str(tmp_path / "settings.yaml")
    Path(path).write_text("steps: 5\nlr: 1e-4\nclip: null\nsource_paths: [a.zip, b.zip]\n")
    config = load_config(MetaTrainConfig, path, ["steps=6", "seed = 3", "source_paths=c.zip,"])
    assert (config.steps, config.lr, config.clip, config.seed, config.source_paths) == (6, 1e-4, None, 3, ["c.zip"])
    assert load_config(MetaTrainConfig, path, ["clip=none", "source_paths="]).source_paths == []
    assert load_config(MetaTestConfig, None, ["steps=10_000", "phi=null"]).phi is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stpes: 5", "unknown setting 'stpes' (did you mean steps?)"),
        ("steps: 1.5", "steps: expected a whole number, got 1.5"),
        ("steps: true", "steps: expected a whole number, got True"),
        ("tasks: 0", "tasks: must be at least 1, got 0"),
        ("steps:", "steps: expected a whole number, got nothing"),
        ("lr: fast", "lr: expected a number, got 'fast'"),
        ("lr: .nan", "lr: must be finite"),
        ("clip: 0", "clip: must be at least"),
        ("anneal: 1.5", "anneal: must be between 0 and 1, got 1.5"),
        ("download: 1", "download: expected true or false, got 1"),
        ("split: random", "split: expected one of disjoint, paired, homogeneous, got 'random'"),
        ("source_paths: 1", "source_paths: expected a list, got 1"),
        ("gpus: true", "gpus: expected text, got True"),
        ("- steps", "expected 'key: value' lines"),
        ("steps: [1", "line 1: not valid YAML"),
        ("steps: !!python/object/apply:os.system ['true']", "not valid YAML"),
        (None, "cannot read"),
    ],
)
def test_refused_in_a_file(tmp_path, text, expected):
    path = tmp_path / "settings.yaml"
    if text:
        path.write_text(text)
    message = refusal(load_config, MetaTrainConfig, str(path))
    assert expected in message and str(path) in message


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("steps", "expected key=value"),
        ("steps=", "steps: expected a whole number, got ''"),
        ("download=yes", "download: expected true or false, got 'yes'"),
        ("lr=inf", "lr: must be finite"),
        ("image_size=12,,16", "image_size: expected a whole number or a list, got '12,,16'"),
        ("image_size=", "image_size: expected a whole number or a list, got ''"),
        ("image_size=12,4", "image_size: must be at least 8, got 4"),
        ("split=disjunct", "split: expected one of"),
        ("spilt=paired", "did you mean split?"),
    ],
)
def test_refused_on_the_command_line(assignment, expected):
    message = refusal(load_config, MetaTrainConfig, None, [assignment])
    assert expected in message and "--set" in message


def test_differences_name_what_changes_a_result_only():
    old = dataclasses.asdict(MetaTrainConfig())
    assert differences(old, MetaTrainConfig(gpus="cpu,cpu", run_dir="elsewhere", log_every=1, timeout=1)) == []
    assert differences(old, MetaTrainConfig(steps=1, clip=None)) == ["clip: 100.0 → None", "steps: 750 → 1"]
    older = {key: value for key, value in old.items() if key not in ("classes", "gpus")}  # of before these settings
    assert differences(older, MetaTrainConfig()) == []
    assert differences(older, MetaTrainConfig(classes=3)) == ["classes: None → 3"]


def test_files_that_moved_are_no_difference():
    old = dataclasses.asdict(MetaTestConfig(phi="here.pt"))
    assert differences(old, MetaTestConfig(phi="there.pt")) == ["phi: here.pt → there.pt"]
    assert differences(old, MetaTestConfig(phi="there.pt"), by_content=True) == []
    assert differences(old, MetaTestConfig(), by_content=True) == ["phi: here.pt → None"]
    assert differences(old, MetaTestConfig(phi="here.pt", init="run"), by_content=True) == ["init: None → run"]
