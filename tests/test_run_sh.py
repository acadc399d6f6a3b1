"""`run.sh` end to end, on tiny settings."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, class_pictures, result
from image_files import tiny_imagenet, write_folder, write_zip

from metaperturb.config import MetaTestConfig
from metaperturb.identity import data_name


def run_sh(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """With the packages of the Python that runs the tests; installing them is what started the tests."""
    env = {**os.environ, "VENV": "none", "PYTHON": sys.executable, "PYTHONPATH": "", **environment}
    command = [str(ROOT / "run.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=env, check=False)


def test_help():
    """Of all commands, with settings as a table that has the YAML's defaults; of a program, with its keys."""
    table = run_sh("help", TGT_STEPS="77").stdout
    assert table == run_sh(TGT_STEPS="77").stdout and "./run.sh demo" in table
    assert max(map(len, table.splitlines())) <= 120
    rows = [line[2:].split() for line in table.split("\n\n")[-1].splitlines()]
    assert rows[0][0] == "GPUS" and rows[-1][0] == "PYTHON"
    shown = {row[0]: row[1] for row in rows}
    assert [shown[name] for name in ("SRC_STEPS", "METHOD", "TGT_STEPS")] == ["750", "metaperturb", "77"]
    for command in ("src --help", "tgt cpu -h"):
        completed = run_sh(*command.split())
        assert completed.returncode == 0 and "settings (--set key=value):" in completed.stdout, completed.stderr


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("dmeo", "./run.sh help lists the commands and settings\nerror: unknown command 'dmeo'"),
        ("tgt", "error: usage: ./run.sh tgt <gpu"),
        ("pretrain steps=1", "error: usage: ./run.sh pretrain <gpu"),
        ("demo", "error: needs Python 3.11 or later (looked for: /bin/false; PYTHON=/path/to/python names one)"),
    ],
)
def test_wrong_commands(command, said):
    completed = run_sh(*command.split(), PYTHON="/bin/false")
    assert completed.returncode == 1 and completed.stderr.startswith(said)


STUB = """#!/bin/sh
echo "$0 $*" >>"$LOG"
[ "$2" != venv ] || { mkdir -p "$4/bin" && cp "$0" "$4/bin/python"; }
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """`run.sh`, requirements and settings in a folder of their own, with a Python that writes down what it is told."""
    monkeypatch.delenv("VENV", raising=False)
    folder = tmp_path / "project"
    (folder / "tests").mkdir(parents=True)
    for name in ("run.sh", "requirements.txt", "tests/requirements.txt"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def told(*arguments: str, **environment: str) -> list[str]:
        log = tmp_path / "log"
        log.write_text("")
        env = {**os.environ, "PYTHON": str(stub), "LOG": str(log), **environment}
        command = [str(folder / "run.sh"), *arguments]
        completed = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert completed.returncode == 0, completed.stderr
        return log.read_text().splitlines()

    return folder, told


@pytest.mark.parametrize("venv", [None, "a/b"])
def test_the_environment_is_made_once_wherever_it_is(project, tmp_path, venv):
    """And packages are installed whenever their list has changed."""
    folder, told = project
    environment = {} if venv is None else {"VENV": venv}
    python = (folder / ".venv" if venv is None else tmp_path / venv) / "bin" / "python"
    first = told("test", "-k", "some", **environment)
    assert any(line.startswith(f"{tmp_path / 'python'} -m venv --clear ") for line in first)
    assert next(line for line in first if "pip install" in line).count(" -r ") == 2
    requirements = folder / "requirements.txt"
    for text, installs in ((before := requirements.read_text(), 0), ("another\n", 1), (before, 1), (before, 0)):
        requirements.write_text(text)
        again = told("test", "-k", "some", **environment)
        assert first[-1] == again[-1] == f"{python} -m pytest -k some"
        assert sum("pip install" in line for line in again) == installs
        assert not any("venv" in line.split()[1:3] for line in again)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_the_installation_of_another_user(project, tmp_path):
    """A lab's shared folder: it is used as it is, and what it lacks is a sentence."""
    folder, told = project
    told("demo")
    for path in [*tmp_path.parents[:3], *tmp_path.rglob("*"), tmp_path]:
        path.chmod(path.stat().st_mode | 0o055)
    (tmp_path / "log").chmod(0o666)

    def demo() -> subprocess.CompletedProcess:
        env = {**os.environ, "LOG": str(tmp_path / "log"), "RUNS": "/tmp"}
        command, nobody = [str(folder / "run.sh"), "demo"], {"user": 65534, "group": 65534}
        return subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, check=False, **nobody)

    assert demo().returncode == 0 and "scripts/demo.py" in (tmp_path / "log").read_text().splitlines()[-1]
    with (folder / "requirements.txt").open("a") as file:
        file.write("another\n")
    completed = demo()
    assert completed.returncode == 1 and len(completed.stderr.splitlines()) == 1
    assert "is another user's and lacks packages" in completed.stderr and "VENV=/a/folder" in completed.stderr


def test_several_seeds_are_a_run_each_and_what_goes_to_slurm_keeps_its_words(project):
    """`gpus=8` behind `--slurm` is Slurm's, before it a setting of the program."""
    _, told = project
    runs = [line for line in told("src", "steps=1", SEED="3 1") if "metaperturb.meta_train" in line]
    for line, seed in zip(runs, "31", strict=True):
        assert f" seed={seed} " in line and f"-seed{seed} " in line and line.endswith(" steps=1")
    line = told("src", "steps=1", "--slurm", "nodes=2", "gpus=8")[-1]
    assert "scripts/make_tables.py src --config " in line and line.endswith(" steps=1 --slurm nodes=2 gpus=8")
    assert " gpus=8 " not in line.partition(" --set ")[2].partition(" steps=1 ")[0]
    assert "metaperturb.meta_train" in told("src", "gpus=0")[-1]
    assert told("src", "--status")[-1].endswith(" --status")


def typed(line: str) -> tuple[list[str], dict[str, str]]:
    """What is typed at a shell: the words behind ./run.sh, and the variables before it."""
    before, _, behind = line.partition("./run.sh ")
    return behind.split(), dict(word.split("=", 1) for word in before.split())


@pytest.fixture
def options(project):
    """The settings that a command of `run.sh` gives its program beside those of its file."""
    folder, told = project

    def of(line: str, **environment: str) -> dict[str, str]:
        command, variables = typed(line)
        said = told(*command, VENV="none", **variables, **environment)[-1]
        assert f" --config {folder}/configs/{command[0]}.yaml " in said
        return dict(word.split("=", 1) for word in said.partition(" --set ")[2].split())

    return of


GIVEN = {
    "./run.sh src": "seed=0 run_dir=src-tiny_imagenet-resnet20-disjoint-seed0",
    "SRC_STEPS=5 ./run.sh src": "seed=0 steps=5 run_dir=src-tiny_imagenet-resnet20-disjoint-seed0",
    "METHOD=base ./run.sh tgt 0": "method=base gpu=0 run_dir=tgt-s_cifar100-resnet20-base-seed0",
    "./run.sh tgt 0 method=base": "method=base gpu=0 run_dir=tgt-s_cifar100-resnet20-base-seed0",
    "INIT=net.pt PHI=unused ./run.sh tgt 0 TGT_DATA=cub METHOD=base": (
        "target=cub method=base gpu=0 init=net.pt run_dir=tgt-cub-resnet20-base-seed0-ft"
    ),
    "SEED=1 TGT_STEPS=9 ./run.sh tgt cpu steps=3": (
        "phi=tiny_imagenet_resnet20 gpu=cpu seed=1 steps=3 run_dir=tgt-s_cifar100-resnet20-metaperturb-seed1"
    ),
    "PHI=own TGT_RUN=here ./run.sh tgt cpu": "phi=own gpu=cpu run_dir=here",
    "TGT_MODEL=conv4 SRC_PATHS=a.zip,b.zip TGT_PATH=c.zip METHOD=dropout ./run.sh pretrain 1": (
        "gpu=1 model=conv4 target_path=a.zip,b.zip run_dir=pretrain-tiny_imagenet-conv4-seed0"
    ),
    "SRC_DATA=embedded ./run.sh pretrain 1": (  # it has no test images
        "gpu=1 target=embedded_source eval_split=holdout run_dir=pretrain-embedded-resnet20-seed0"
    ),
}


@pytest.mark.parametrize("line", GIVEN)
def test_only_what_is_set_is_passed_on(options, project, line):
    expected = dict(word.split("=") for word in GIVEN[line].split())
    got = options(line, RUNS="runs")
    assert got.pop("data_root") == f"{project[0]}/data"
    assert got.pop("run_dir").removeprefix("runs/") == expected.pop("run_dir")
    assert got == expected


def test_edited_settings_take_effect(options, project):
    """Nothing overrules them, and the names of folders follow them."""
    src, tgt = (project[0] / "configs" / name for name in ("src.yaml", "tgt.yaml"))
    src.write_text(src.read_text().replace("split: disjoint", "split: paired  # as the authors").replace("750", "123"))
    assert options("RUNS=r ./run.sh src")["run_dir"] == "r/src-tiny_imagenet-resnet20-paired-seed0"
    text = tgt.read_text().replace("method: metaperturb", "method: 'base'")
    tgt.write_text(text + "data_root: /data\nrun_dir: own\n")
    assert options("./run.sh tgt 0") == {"gpu": "0"}
    tgt.write_text("target: cub\nmodel: conv4\nmethod: metaperturb\nphi: mine.pt\nseed: 3\n")
    given = options("RUNS=r ./run.sh tgt 0")
    assert given["run_dir"] == "r/tgt-cub-conv4-metaperturb-seed3" and "phi" not in given
    src.write_text("source: embedded\nmodel: conv4\nsplit: disjoint\n")  # also where a line is missing
    assert options("RUNS=r ./run.sh src")["run_dir"] == "r/src-embedded-conv4-disjoint-seed"


def test_the_phi_of_src_is_taken_where_it_is(options, tmp_path):
    phi = tmp_path / "src-tiny_imagenet-conv4-disjoint-seed2" / "phi.pt"
    phi.parent.mkdir()
    phi.touch()
    variables = f"RUNS={tmp_path} SRC_MODEL=conv4"
    assert options(f"{variables} ./run.sh tgt 0 seed=2")["phi"] == str(phi)
    assert options(f"{variables} ./run.sh tgt 0")["phi"] == "tiny_imagenet_resnet20"
    assert options(f"SEED=2 SRC_RUN={phi.parent} ./run.sh tgt 0")["phi"] == str(phi)


@pytest.mark.parametrize("path", [".", "a/Birds.v2i.zip", "{}/x.tar.gz,b.tgz", "link"])
def test_folders_of_runs_have_the_names_of_the_images(options, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("elsewhere.v3.tar")
    path = path.format(tmp_path)
    name = data_name(MetaTestConfig(target="folder", target_path=path))
    given = options(f"TGT_DATA=folder TGT_PATH={path} METHOD=base RUNS=r ./run.sh tgt 0")
    assert given["run_dir"] == f"r/tgt-folder-{name}-resnet20-base-seed0"


@pytest.mark.slow
def test_demo(tmp_path):
    tiny = ["steps=4", "batch_size=8"]
    tiny = ["--src", *tiny, "tasks=2", "checkpoint_every=2", "--tgt", *tiny, "eval_every=2", "final_samples=2"]
    completed = run_sh("demo", "--seeds", "1", "--jobs", "3", *tiny, RUNS=str(tmp_path))
    assert completed.returncode == 0, completed.stderr
    table = (tmp_path / "demo" / "table.md").read_text()
    assert table.strip() in completed.stdout
    header, _, base, metaperturb, *one_pass, difference = table.strip().splitlines()
    assert all(line.startswith("| MetaPerturb, one pass | 1 | ") for line in one_pass)
    assert header == "| method | seeds | accuracy % | NLL | ECE % |" and difference.startswith("| draws − Base ")
    assert metaperturb.startswith("| MetaPerturb, 2 draws | 1 | ")
    accuracy = 100 * result(tmp_path / "demo" / "base-seed0")["metrics"]["accuracy"]
    assert base.startswith(f"| Base | 1 | {accuracy:.2f} | ")
    assert (tmp_path / "demo" / "convergence.png").read_bytes().startswith(b"\x89PNG")


def test_src_then_tgt(tmp_path):
    """On two parts of Tiny ImageNet, 10 classes of 4 images in each, and on three classes with two test images each."""
    wnids = [f"n{label:08}" for label in range(10)]
    parts = [tiny_imagenet(wnids, range(4), val=wnids), tiny_imagenet(wnids, range(4, 8))]
    parts = [str(write_zip(tmp_path / f"tiny.part{i}.zip", part)) for i, part in enumerate(parts)]
    images = write_folder(tmp_path / "images", class_pictures(3, 4, "train") | class_pictures(3, 2, "test"))
    common = {"RUNS": str(tmp_path / "runs"), "DATA": str(tmp_path / "data"), "SRC_MODEL": "resnet8"}
    source = {"SRC_PATHS": ",".join(parts), "SRC_TASKS": "5", "SRC_STEPS": "2", "GPUS": "cpu,cpu"}
    completed = run_sh("src", "batch_size=4", **common, **source)
    assert completed.returncode == 0, completed.stderr
    target = {"TGT_DATA": "folder", "TGT_PATH": str(images), "TGT_STEPS": "2", "TGT_MODEL": "conv4"}
    completed = run_sh("tgt", "cpu", "batch_size=4", "final_samples=2", **common, **target)
    assert completed.returncode == 0 and ", of ./run.sh src (PHI=" in completed.stderr, completed.stderr
    found = result(tmp_path / "runs" / "tgt-folder-images-conv4-metaperturb-seed0")
    made = tmp_path / "runs" / "src-tiny_imagenet-resnet8-disjoint-seed0"
    assert found["config"]["phi"] == str(made / "phi.pt") and found["target"]["test"] == 6


ERRORS = {
    "METHOD=base ./run.sh tgt 99": "gpu: no GPU 99 (",
    "SRC_STEPS=many ./run.sh src": "SRC_STEPS: expected a whole number, got 'many'",
    "./run.sh src steps=many": "steps: expected a whole number, got 'many'",
    "./run.sh tgt cpu stps=3": "stps=3: unknown setting 'stps' (did you mean steps?)",
    "TGT_DATA=folder TGT_PATH=/no,where ./run.sh tgt cpu": "TGT_PATH: /no,where: no such file or folder",
    "SRC_DATA=folder SRC_PATHS=a,b ./run.sh src": "SRC_PATHS: must name one folder or archive, with",
    "TGT_DATA=folder ./run.sh tgt cpu target_path=/nowhere": "target_path: /nowhere: no such file or folder",
    f"TGT_RUN={__file__} ./run.sh tgt cpu": f"TGT_RUN: {__file__} cannot be written (",
}


@pytest.mark.parametrize("line", ERRORS)
def test_errors_name_what_was_typed(tmp_path, line):
    command, variables = typed(line)
    completed = run_sh(*command, **{"RUNS": str(tmp_path), "PHI": "tiny_imagenet_resnet20", **variables})
    assert completed.returncode == 1 and completed.stderr.startswith(f"error: {ERRORS[line]}"), completed.stderr
    assert completed.stderr.count("\n") == 1
