"""What a first run on a machine with a GPU meets: an old driver, kernels that nobody tried there, `./run.sh gpu-check`.

Kernels are tried in real child processes; backends that crash, hang or compute something else are made of the CPU's.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import gpu_check
import pytest
import torch
from conftest import alive, python, wait_for

from metaperturb import UserError, kernels
from metaperturb.distributed import make_current
from metaperturb.kernels import cpp, trial
from metaperturb.kernels.backend import Unavailable

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
OLD_DRIVER = """
    #include <dlfcn.h>
    int cuInit(unsigned flags) { return 0; }
    int cuDriverGetVersion(int *version) { *version = 12040; return 0; }
    int cuGetProcAddress(const char *name, void **found, int version, long flags, void *status) {
        return (*found = dlsym(dlopen("libcuda.so.1", RTLD_LAZY), name)) ? 0 : 500;
    }
    int cuGetProcAddress_v2() __attribute__((alias("cuGetProcAddress")));
    int nvmlInit(void) { return 0; }
    int nvmlDeviceGetCount_v2(int *count) { *count = 1; return 0; }
"""


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a PyTorch for CUDA")
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_driver_that_is_too_old_is_told_from_no_gpu(tmp_path):
    """As the real ones, NVIDIA's management library counts the GPU that PyTorch cannot use."""
    (tmp_path / "driver.c").write_text(OLD_DRIVER)
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        command = ["cc", "-shared", "-fPIC", "-o", tmp_path / name, tmp_path / "driver.c"]
        subprocess.run(command, check=True)
    code = """
        from metaperturb.distributed import UserError, parse_devices
        print(parse_devices("auto", "gpus"))
        try:
            parse_devices("0", "gpu")
        except UserError as error:
            print(error)
    """
    out, said = python(code, LD_LIBRARY_PATH=str(tmp_path), CUDA_VISIBLE_DEVICES="0").communicate()
    old = f"the NVIDIA driver is too old for this PyTorch, which needs CUDA {torch.version.cuda}: update it, or "
    old += f"install a PyTorch for older ones: {sys.executable} -m pip install --force-reinstall 'torch>=2.11' "
    devices, numbered = out.splitlines()
    assert devices == "[device(type='cpu')]" and f"running on the CPU ({old}" in said
    assert numbered.startswith(f"gpu: no GPU 0 ({old}") and len(said.splitlines()) == 1


@pytest.mark.parametrize(("capability", "refused"), [((7, 0), True), ((7, 5), False), ((12, 1), False)])
def test_a_gpu_that_is_too_old_is_named(capability, refused, monkeypatch):
    found = {"set_device": None, "get_device_capability": capability, "get_device_name": "Tesla V100"}
    for name, value in {**found, "get_arch_list": ["sm_80", "sm_75", "sm_120", "compute_120"]}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    if not refused:
        return make_current(torch.device("cuda", 1))
    with pytest.raises(UserError, match=r"^cuda:1: Tesla V100 is too old for this PyTorch; install a PyTorch for"):
        make_current(torch.device("cuda", 1))


def test_a_pytorch_for_an_older_driver_is_kept_when_the_requirements_change(tmp_path):
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nwhile [ "$1" ]; do [ "$1" != -r ] || cat "$2"; shift; done\n')  # of pip install
    python.chmod(0o755)
    for version, kept in (("2.15.0", False), ("2.12.0+cu126", True)):
        (tmp_path / f".venv/lib/python3.12/site-packages/torch-{version}.dist-info").mkdir(parents=True)
        (tmp_path / "requirements.txt").write_text(
            f"torch==9\ntorchvision==9\ntorchmetrics==9\nnumpy=={len(version)}\n"
        )
        completed = subprocess.run([tmp_path / "run.sh", "bench"], capture_output=True, text=True, check=True)
        wanted = [line.partition("==")[0] for line in completed.stderr.splitlines() if "==" in line]
        assert wanted == ["torchmetrics", "numpy"] if kept else ["torch", "torchvision", "torchmetrics", "numpy"]


# --- the trial of kernels


@pytest.fixture
def backend(tmp_path, monkeypatch):
    """`backend(BODY)`: a module that is the CPU's kernels, but for what `BODY` defines; each trial adds to `tries`."""
    if kernels.kernel_name() == "plain":
        pytest.skip("needs a C++ compiler")

    def make(body):
        tries = f"import os, signal, time\nopen({str(tmp_path / 'tries')!r}, 'a').write('x')\n"
        shutil.copytree(cpp.cache_folder(), tmp_path / "cache/metaperturb", ignore=shutil.ignore_patterns("trial-*"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        code = "from metaperturb.kernels.cpp import *\n" + tries + body
        (tmp_path / "made_kernels.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path))
        return "made_kernels"

    return make


def refusal(module):
    with pytest.raises(Unavailable) as caught:
        trial.check(module, CPU)
    return str(caught.value)


FORWARD = "from metaperturb.kernels import cpp\ndef forward(*arguments):\n    "
CRASHES = FORWARD + "os.kill(os.getpid(), signal.SIGSEGV)"
KILLED = FORWARD + "os.kill(os.getpid(), signal.SIGKILL)"  # as by the system, out of memory
DIFFERS = FORWARD + "out, *rest = cpp.forward(*arguments)\n    return out * 1.001, *rest"
FAILS = FORWARD + "raise RuntimeError('ptxas exited with code 255')"


def check_verdict(module, said, tmp_path):
    """A refusal is one line; it is kept, and told again without a trial until its file is deleted."""
    first = refusal(module)
    (kept,) = (tmp_path / "cache/metaperturb").glob("trial-*.json")
    assert said in first and "\n" not in first and f"delete {kept} to have them tried again" in first
    assert refusal(module) == first and (tmp_path / "tries").read_text() == "x"
    assert json.loads(kept.read_text())["device"] == "cpu"
    return kept


def test_kernels_that_crash_are_not_used(backend, tmp_path, monkeypatch, capfd):
    kept = check_verdict(backend(CRASHES), "on cpu they crash: SIGSEGV", tmp_path)
    monkeypatch.setattr(kernels, "_told", set())
    monkeypatch.setattr(kernels, "_load", lambda device: refusal("made_kernels"))
    with warnings.catch_warnings(record=True) as said:
        assert kernels.kernel_name() == "plain"
    assert len(said) == 1 and "in plain PyTorch operators, which is slower: on cpu they crash" in str(said[0].message)
    kept.write_text("{")  # of a full disk, say
    assert "they crash" in refusal("made_kernels") and (tmp_path / "tries").read_text() == "xx"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "said"),
    [
        (DIFFERS, "on cpu cpp disagrees with them on this machine (float32, relative error 1"),
        (FAILS, "on cpu they fail: ptxas exited with code 255"),
        ("raise ImportError('no launcher')", "on cpu they fail: no launcher"),
    ],
    ids=["differ", "fail", "cannot be imported"],
)
def test_kernels_that_fail_are_not_used(body, said, backend, tmp_path):
    check_verdict(backend(body), said, tmp_path)


@pytest.mark.slow
def test_kernels_that_hang_are_not_used(backend, tmp_path, monkeypatch):
    """The limit falls once they hang, so that no load can reach it before."""
    hanging = tmp_path / "hanging"

    def impatient():
        while not hanging.exists():
            time.sleep(0.1)
        monkeypatch.setattr(trial, "SILENCE", 0.0)

    threading.Thread(target=impatient, daemon=True).start()
    body = f"import pathlib\nfile = pathlib.Path({str(hanging)!r})\n{FORWARD}"
    body += "file.with_suffix('.new').write_text(str(os.getpid()))\n    file.with_suffix('.new').rename(file)"
    check_verdict(backend(body + "\n    time.sleep(1e6)"), "on cpu they hang: no progress in 0 s", tmp_path)
    assert not alive(int(hanging.read_text()))


@pytest.mark.slow
def test_what_says_nothing_about_the_kernels_is_not_kept(backend, tmp_path, monkeypatch):
    module = backend(KILLED)
    assert "on cpu they crash: SIGKILL; the next start tries them again" in refusal(module)
    with pytest.raises(Unavailable, match="could not be tried"):
        trial.check(module, torch.device("meta"))
    assert not list((tmp_path / "cache/metaperturb").glob("trial-*.json"))


@pytest.mark.slow
def test_without_a_cache_folder_they_are_tried_each_time(backend, tmp_path, monkeypatch):
    module = backend("from metaperturb.kernels.plain import *\nNAME = 'none'")
    monkeypatch.setenv("XDG_CACHE_HOME", __file__)
    assert [refusal(module).rpartition("; ")[2] for _ in range(2)] == ["the next start tries them again"] * 2


@pytest.mark.slow
def test_kernels_that_pass_are_tried_once_for_each_version(backend, tmp_path, monkeypatch):
    module = backend("")
    for _ in range(2):
        trial.check(module, CPU)
    assert (tmp_path / "tries").read_text() == "x"
    monkeypatch.setattr(torch, "__version__", "99.0")
    trial.check(module, CPU)
    assert (tmp_path / "tries").read_text() == "xx"


@pytest.mark.slow
def test_processes_that_start_at_once_try_once(backend, tmp_path):
    code = f"""
        import torch
        from metaperturb.kernels import trial
        trial.check({backend("")!r}, torch.device("cpu"))
    """
    processes = [python(code, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path])) for _ in range(3)]
    outputs = [process.communicate() for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    assert (tmp_path / "tries").read_text() == "x"
    assert sum("trying the GPU kernels" in said for _, said in outputs) == 1


# --- ./run.sh gpu-check

PART = """
    import json, os, pathlib, signal, sys, time
    name, path = sys.argv[2], pathlib.Path(sys.argv[4])
    found = {"hardware": {"device": "Made GPU 1"}} if name == "about" else {"number": 1}
    if name == "steps":
        spread = {"ratio": 1.5, "q1": 1.4, "q3": 1.6}
        found = {"kernel": "triton", "ratios": {"compiled operators / triton": spread}}
    path.write_text(json.dumps(found))
    if name == "kernels":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name in ("meta_train", "nccl"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        pathlib.Path(sys.argv[0]).with_name(name).write_text(str(os.getpid()))
        time.sleep(1e6)
    sys.exit("error: nothing works" if name == "meta_test" else 0)
"""


def test_what_fails_is_recorded_the_rest_goes_on_and_a_signal_leaves_what_was_found(tmp_path):
    """In place of each part's process one that finds something at once and then crashes, hangs, fails or is done."""
    (tmp_path / "part.py").write_text(textwrap.dedent(PART))
    code = f"""
        import gpu_check, sys
        gpu_check.__file__, gpu_check.GRACE = {str(tmp_path / "part.py")!r}, 1.2
        gpu_check.SECONDS[gpu_check.meta_train] = 3
        sys.exit(gpu_check.main(["--json", {str(tmp_path / "gpu.json")!r}]))
    """
    process = python(code, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    wait_for(lambda: ((tmp_path / "nccl").exists() and (tmp_path / "nccl").read_text()) or process.poll())
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and "meta_train: at most" in said
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: part["outcome"] for name, part in content["parts"].items()} == {
        "kernels": "crashed: SIGSEGV",
        "steps": "done",
        "meta_train": "out of time",
        "meta_test": "failed: error: nothing works",
        "nccl": "stopped",
    }
    assert all(content["parts"][name]["number"] == 1 for name in ("kernels", "meta_train", "nccl"))
    assert "Triton earns its place: a θ-step takes 1.50 times" in content["verdict"]
    assert not any(alive(int((tmp_path / name).read_text())) for name in ("meta_train", "nccl"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(capfd):
    assert gpu_check.main([]) == 1
    assert "error: gpu: no GPU 0 (" in capfd.readouterr().err
    assert gpu_check.main(["--only", "speed"]) == 1
    assert "unknown part 'speed' (known: kernels, steps, " in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the time of the seven processes that it starts, on a busy machine
def test_the_rehearsal_comes_to_its_end(tmp_path, capfd):
    path = tmp_path / "gpu.json"
    assert gpu_check.main(["--rehearse", "--minutes", "30", "--json", str(path)]) == 0
    found = json.loads(path.read_text())["parts"]
    assert [*found] == [*gpu_check.PARTS]
    assert {part["outcome"] for part in found.values()} == {"done"}, found
    assert {f"{name} / plain" for name in ("triton", "compiled operators", "plain operators")} <= {
        *found["steps"]["ratios"]
    }
    assert [found[name]["last"]["step"] for name in ("meta_train", "meta_test", "nccl")] == [3, 3, 3]
    assert found["meta_train"]["phi_gradient_error"] == [0.0, 0.0] and found["kernels"]["errors"]
    assert found["meta_train"]["processes"] == 1 and found["nccl"]["processes"] == 2 and found["nccl"]["one"]
    assert found["tests"]["counts"] == {"skipped": 2}
    assert capfd.readouterr().out.strip() == "A rehearsal: nothing here is a measurement."
