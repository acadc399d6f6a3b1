"""`run.sh` end to end, on tiny settings."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, class_pictures
from image_files import write_folder, write_zip


def run_sh(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """With the packages of the Python that runs the tests; installing them is what started the tests."""
    env = {**os.environ, "VENV": "none", "PYTHON": sys.executable, "PYTHONPATH": "", **environment}
    return subprocess.run(
        [str(ROOT / "run.sh"), *arguments], capture_output=True, text=True, timeout=280, env=env, check=False
    )


def test_usage():
    for arguments in ((), ("help",)):
        completed = run_sh(*arguments)
        assert completed.returncode == 0 and "./run.sh demo" in completed.stdout
        assert "\n  METHOD=metaperturb " in completed.stdout and "label_smoothing" in completed.stdout
    completed = run_sh("dmeo")
    assert completed.returncode == 1 and "error: unknown command 'dmeo'" in completed.stderr
    for arguments in (("tgt",), ("tgt", "--help")):
        completed = run_sh(*arguments)
        assert completed.returncode == 1 and "error: usage: ./run.sh tgt <gpu" in completed.stderr
    completed = run_sh("pretrain")
    assert completed.returncode == 1 and "error: usage: ./run.sh pretrain <gpu" in completed.stderr


def test_no_suitable_python():
    completed = run_sh("demo", PYTHON="/bin/false")
    assert completed.returncode == 1
    assert completed.stderr.strip() == (
        "error: needs Python 3.11 or later (looked for: /bin/false; PYTHON=/path/to/python names one)"
    )


STUB = """#!/bin/sh
echo "$0 $*" >>"$LOG"
[ "$2" != venv ] || { mkdir -p "$4/bin" && cp "$0" "$4/bin/python"; }
"""


@pytest.fixture
def project(tmp_path):
    """`run.sh` and its requirements in a folder of their own, with a Python that only writes down what it is told."""
    folder = tmp_path / "project"
    (folder / "tests").mkdir(parents=True)
    for name in ("run.sh", "requirements.txt", "tests/requirements.txt"):
        shutil.copy(ROOT / name, folder / name)
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


@pytest.mark.parametrize("venv", [None, "environment", "a/b"])
def test_the_environment_is_made_once_wherever_it_is(project, tmp_path, venv):
    folder, told = project
    environment = {} if venv is None else {"VENV": venv}
    python = (folder / ".venv" if venv is None else tmp_path / venv) / "bin" / "python"
    first = told("test", "-k", "some", **environment)
    assert any(line.startswith(f"{tmp_path / 'python'} -m venv --clear ") for line in first)
    assert next(line for line in first if "pip install" in line).count(" -r ") == 2
    again = told("test", "-k", "some", **environment)
    assert first[-1] == again[-1] == f"{python} -m pytest -k some"
    assert not any("venv" in line.split()[1:3] or "pip install" in line for line in again)


def test_packages_are_installed_whenever_their_list_has_changed(project):
    folder, told = project
    requirements = folder / "requirements.txt"
    first, other = requirements.read_text(), "another\n"
    installs = []
    for text in (first, first, other, first, first):
        requirements.write_text(text)
        installs.append(sum("pip install" in line for line in told("bench")))
    assert installs == [1, 0, 1, 1, 0]


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
        command = [str(folder / "run.sh"), "demo"]
        return subprocess.run(
            command, cwd="/", env=env, capture_output=True, text=True, check=False, user=65534, group=65534
        )

    assert demo().returncode == 0 and "scripts/demo.py" in (tmp_path / "log").read_text().splitlines()[-1]
    with (folder / "requirements.txt").open("a") as file:
        file.write("another\n")
    completed = demo()
    assert completed.returncode == 1 and len(completed.stderr.splitlines()) == 1
    assert "is another user's and lacks packages" in completed.stderr and "VENV=/a/folder" in completed.stderr


def test_several_seeds_are_a_run_each(project):
    _, told = project
    runs = [line for line in told("src", "steps=1", SEED="3 1") if "metaperturb.meta_train" in line]
    assert [re.search(r" seed=(\d) ", line)[1] for line in runs] == ["3", "1"]
    assert all(line.endswith(f"-seed{seed} steps=1") for line, seed in zip(runs, "31", strict=True))


@pytest.mark.slow
def test_demo_with_more_jobs_than_tasks(tmp_path):
    src = ["steps=1", "tasks=2", "batch_size=4"]
    tgt = ["steps=1", "batch_size=4", "final_samples=1"]
    completed = run_sh("demo", "--seeds", "1", "--jobs", "3", "--src", *src, "--tgt", *tgt, RUNS=str(tmp_path))
    assert completed.returncode == 0, completed.stderr


@pytest.mark.slow
def test_demo(tmp_path):
    src = ["steps=4", "tasks=2", "batch_size=8", "checkpoint_every=2"]
    tgt = ["steps=4", "batch_size=8", "eval_every=2", "final_samples=2"]
    completed = run_sh("demo", "--seeds", "1", "--src", *src, "--tgt", *tgt, RUNS=str(tmp_path))
    assert completed.returncode == 0, completed.stderr
    table = (tmp_path / "demo" / "table.md").read_text()
    assert table.strip() in completed.stdout
    header, _, base, metaperturb, *one_pass = table.strip().splitlines()
    assert all(line.startswith("| MetaPerturb, one pass | 1 | ") for line in one_pass)
    assert header == "| method | seeds | accuracy % | NLL | ECE % |"
    assert base.startswith("| Base | 1 | ") and metaperturb.startswith("| MetaPerturb, 2 draws | 1 | ")
    result = json.loads((tmp_path / "demo" / "base-seed0" / "result.json").read_text())
    assert f"| 1 | {100 * result['metrics']['accuracy']:.2f} | " in base
    assert (tmp_path / "demo" / "convergence.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def tiny_imagenet(tmp_path) -> list[Path]:
    """Two zips with the official layout, 10 classes of 4 images in each; the first has a validation image a class."""
    parts = []
    for part in (1, 2):
        files = {}
        for name, content in class_pictures(10, 8, "train", size=64).items():
            _, label, file = name.split("/")
            index = int(file.removesuffix(".png"))
            if index % 2 == part - 1:
                wnid = f"n{int(label[5:]):08}"
                files[f"tiny-imagenet-200/train/{wnid}/images/{wnid}_{index}.JPEG"] = content
                if index == 0:
                    files[f"tiny-imagenet-200/val/images/{wnid}.JPEG"] = content
                    table = files.get("tiny-imagenet-200/val/val_annotations.txt", b"")
                    files["tiny-imagenet-200/val/val_annotations.txt"] = table + f"{wnid}.JPEG\t{wnid}\t0\n".encode()
        parts.append(write_zip(tmp_path / f"tiny.part{part}.zip", files))
    return parts


def test_src_then_tgt(tmp_path, tiny_imagenet):
    environment = {"RUNS": str(tmp_path / "runs"), "DATA": str(tmp_path / "data")}
    source = {
        "SRC_PATHS": ",".join(map(str, tiny_imagenet)),
        "SRC_TASKS": "5",
        "SRC_STEPS": "2",
        "SRC_MODEL": "resnet8",
    }
    completed = run_sh("src", "batch_size=4", GPUS="cpu,cpu", **environment, **source)
    assert completed.returncode == 0, completed.stderr
    phi = tmp_path / "runs" / "src-tiny_imagenet-resnet8-disjoint-seed0" / "phi.pt"
    assert phi.exists()

    folder = write_folder(tmp_path / "images", class_pictures(3, 4, "train") | class_pictures(3, 2, "test"))
    target = {"TGT_DATA": "folder", "TGT_PATH": str(folder), "TGT_MODEL": "conv4", "TGT_STEPS": "2", **environment}
    for seed, taken in (("0", str(phi)), ("1", "tiny_imagenet_resnet20")):  # of the second seed there is no φ
        completed = run_sh("tgt", "cpu", "batch_size=4", "final_samples=2", SRC_MODEL="resnet8", SEED=seed, **target)
        assert completed.returncode == 0, completed.stderr
        assert ("taking the shipped φ, tiny_imagenet_resnet20" in completed.stderr) == (seed == "1")
        assert ("taking the φ of ./run.sh src" in completed.stderr) == (seed != "1")
        result = json.loads(
            (tmp_path / "runs" / f"tgt-folder-images-conv4-metaperturb-seed{seed}" / "result.json").read_text()
        )
        assert result["config"]["phi"] == taken
    completed = run_sh("tgt", "cpu", "batch_size=4", METHOD="base", **target)
    assert completed.returncode == 0, completed.stderr
    for method in ("metaperturb", "base"):
        result = json.loads((tmp_path / "runs" / f"tgt-folder-images-conv4-{method}-seed0" / "result.json").read_text())
        assert result["config"]["method"] == method and result["target"]["test"] == 6


def test_pretrain_then_finetune(tmp_path, tiny_imagenet):
    environment = {"RUNS": str(tmp_path / "runs"), "DATA": str(tmp_path / "data"), "TGT_MODEL": "resnet8"}
    paths = ",".join(map(str, tiny_imagenet))
    completed = run_sh("pretrain", "cpu", "steps=2", "batch_size=4", SRC_PATHS=paths, **environment)
    assert completed.returncode == 0, completed.stderr
    pretrained = tmp_path / "runs" / "pretrain-tiny_imagenet-resnet8-seed0"
    result = json.loads((pretrained / "result.json").read_text())
    assert result["config"]["method"] == "base" and result["init"] is None
    assert (result["target"]["train"], result["target"]["test"]) == (80, 10)

    folder = write_folder(tmp_path / "images", class_pictures(3, 4, "train") | class_pictures(3, 2, "test"))
    target = {"TGT_DATA": "folder", "TGT_PATH": str(folder), "TGT_STEPS": "2", "METHOD": "base", **environment}
    for more in ({}, {"INIT": str(pretrained)}):
        completed = run_sh("tgt", "cpu", "batch_size=4", **target, **more)
        assert completed.returncode == 0, completed.stderr
    scratch, finetuned = (
        json.loads((tmp_path / "runs" / f"tgt-folder-images-resnet8-base-seed0{suffix}" / "result.json").read_text())
        for suffix in ("", "-ft")
    )
    assert scratch["init"] is None and finetuned["init"]["from"] == str(pretrained)
    assert finetuned["init"]["run"]["target"] == "tiny_imagenet"


def test_pretrain_on_drawn_images(tmp_path):
    settings = ["steps=1", "batch_size=4", "image_size=8", "holdout=0.01"]
    environment = {"SRC_DATA": "embedded", "TGT_MODEL": "resnet8", "RUNS": str(tmp_path), "DATA": str(tmp_path)}
    completed = run_sh("pretrain", "cpu", *settings, **environment)
    assert completed.returncode == 0, completed.stderr
    result = json.loads((tmp_path / "pretrain-embedded-resnet8-seed0" / "result.json").read_text())
    assert (result["target"]["train"], result["target"]["test"]) == (4760, 40)


def test_wrong_settings_are_named(tmp_path):
    completed = run_sh("tgt", "99", METHOD="base", RUNS=str(tmp_path), TGT_DATA="embedded")
    assert completed.returncode == 1 and "error: gpu: no GPU 99" in completed.stderr
    completed = run_sh("src", SRC_STEPS="many", RUNS=str(tmp_path))
    assert completed.returncode == 1 and "steps: expected a whole number, got 'many'" in completed.stderr
    completed = run_sh("src", "steps", RUNS=str(tmp_path))
    assert completed.returncode == 1 and "expected key=value" in completed.stderr
    completed = run_sh("data", "cub51", DATA=str(tmp_path))
    assert completed.returncode == 1 and "unknown data set 'cub51'" in completed.stderr
