"""A small real image folder, and the programs run as processes, for the tests of training."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import write_folder
from PIL import Image

from metaperturb import MetaPerturb, save_phi
from metaperturb.storage import load_tensors

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, and no others")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The default suite takes minutes; what kills processes, compiles or trains for long waits for --slow."""
    wanted = [item for item in items if bool(item.get_closest_marker("slow")) == config.getoption("--slow")]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted


def class_pictures(classes: int, per_class: int, split: str, size: int = 12) -> dict[str, bytes]:
    """PNG files `<split>/<class>/<i>.png` whose stripes differ between classes, so that there is something to learn."""
    files = {}
    for label in range(classes):
        for i in range(per_class):
            rng = np.random.default_rng((label, i, split == "test"))
            y, x = np.mgrid[:size, :size]
            wave = np.sin((label + 1) * (x if label % 2 else y) / 3.0 + rng.uniform(0, 6))
            image = 128 + 60 * wave[..., None] + rng.normal(0, 25, (size, size, 3))
            buffer = io.BytesIO()
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
            files[f"{split}/class{label:02}/{i}.png"] = buffer.getvalue()
    return files


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """10 classes, 8 training and 5 test images each, 12×12 pixels; its cache lies beside it in `cache_root`."""
    path = tmp_path_factory.mktemp("images") / "folder"
    return write_folder(path, class_pictures(10, 8, "train") | class_pictures(10, 5, "test"))


def listed(settings: str) -> list[str]:
    """Of a line, each setting; paths may hold spaces."""
    return re.split(r" (?=\w+=)", settings)


@pytest.fixture(scope="session")
def source_settings(image_folder, tmp_path_factory) -> list[str]:
    """A meta-training of seconds: five tasks of two classes."""
    images = f"source=folder source_paths={image_folder} data_root={tmp_path_factory.mktemp('data')} image_size=12"
    return listed(f"{images} model=resnet8 tasks=5 batch_size=4 log_every=2 checkpoint_every=2")


@pytest.fixture(scope="session")
def target_settings(image_folder, tmp_path_factory) -> list[str]:
    """A meta-test of seconds."""
    images = f"target=folder target_path={image_folder} data_root={tmp_path_factory.mktemp('data')} image_size=12"
    often = "eval_every=4 eval_samples=2 final_samples=3 log_every=2 checkpoint_every=2"
    return listed(f"{images} model=resnet8 batch_size=16 {often} gpu=cpu threads=1")


@pytest.fixture(scope="session")
def phi_file(tmp_path_factory) -> Path:
    """A φ whose numbers are not small."""
    torch.manual_seed(1)
    phi, path = MetaPerturb(), tmp_path_factory.mktemp("phi") / "phi.pt"
    phi.flat.data.normal_(0, 0.2)
    save_phi(phi, path, {"note": "random"})
    return path


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory) -> dict[str, Path]:
    """Finished runs of networks that learned their ten classes, in seconds: for the analyses. Do not change them."""
    root = tmp_path_factory.mktemp("trained")
    files = class_pictures(10, 30, "train") | class_pictures(10, 20, "test")
    save_phi(MetaPerturb(), root / "phi.pt")
    data = f"target=folder target_path={write_folder(root / 'images', files)} data_root={root} image_size=12"
    long = "steps=70 lr=3e-3 batch_size=50 eval_every=1000 final_samples=5 checkpoint_every=1000 gpu=cpu threads=1"
    own = {"base": "method=base", "metaperturb": f"method=metaperturb phi={root / 'phi.pt'}"}
    runs = {name: train(root / name, [], data, "model=resnet8", long, settings) for name, settings in own.items()}
    (root / "phi.pt").unlink()  # a run is complete without it
    return runs


@pytest.fixture(scope="module")
def trained(trained_runs) -> dict:
    from metaperturb.trained import load_run

    return {method: load_run(folder) for method, folder in trained_runs.items()}


def train(run_dir: Path, settings: list[str], *more: str, code: int = 0) -> Path:
    """A run of meta-testing in this process, which ends with `code`; `more` may hold several settings each."""
    import metaperturb.meta_test as program

    own = [setting for text in more for setting in listed(text) if setting]
    assert program.main(["--set", *settings, f"run_dir={run_dir}", *own]) == code
    return run_dir


def model_state(run_dir: Path) -> dict[str, torch.Tensor]:
    """Of the run's last checkpoint."""
    return load_tensors(run_dir / "checkpoints" / "latest.pt")["model"]


def result(run_dir: Path) -> dict:
    return json.loads((run_dir / "result.json").read_text())


def logged(run_dir: Path) -> list[dict]:
    """The lines of `metrics.jsonl`, without the time."""
    return [{**json.loads(line), "seconds": 0} for line in (run_dir / "metrics.jsonl").open()]


STREAMS = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}


def start(program: str, settings: list[str]) -> subprocess.Popen:
    """`python -m metaperturb.<program> --set …` in a process group of its own, output captured as text."""
    return subprocess.Popen([sys.executable, "-m", f"metaperturb.{program}", "--set", *settings], **STREAMS)


def python(code: str, **environment: str) -> subprocess.Popen:
    """`python -c code` with these variables beside the present ones, likewise."""
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, **environment}, **STREAMS)


def error_line(err: str) -> str:
    """The one `error:` line of a program that failed as it should, without a traceback."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


@pytest.fixture
def refused(capsys):
    """`refused(program, settings)`: the one `error:` line of a program that is called in this process and fails."""

    def of(program, settings: list[str], code: int = 1) -> str:
        capsys.readouterr()
        assert program.main(["--set", *settings]) == code
        return error_line(capsys.readouterr().err)

    return of


def wait_for(condition, seconds: float = 600.0):
    """What the condition gives, once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)
    return found


def alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int, word: bytes = b"spawn_main") -> list[int]:
    """Of a process those with this word in their command, such as a launcher's workers; any may be gone at once."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            with contextlib.suppress(OSError):
                if word in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found


os.environ.setdefault("OMP_NUM_THREADS", "1")
