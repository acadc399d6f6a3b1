"""What a first run on a machine with a GPU meets: an old driver, an old GPU, `./run.sh gpu-check`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import gpu_check
import pytest
import torch
from conftest import alive, python, wait_for

from metaperturb import UserError
from metaperturb.distributed import make_current

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


# --- ./run.sh gpu-check

PART = """
    import json, os, pathlib, signal, sys, time
    name, path = sys.argv[2], pathlib.Path(sys.argv[4])
    found = {"hardware": {"device": "Made GPU 1"}} if name == "about" else {"number": 1}
    if name == "steps":
        found = {"kernel": "compiled", "ratios": {"perturbed / plain": {"ratio": 1.5, "q1": 1.4, "q3": 1.6}}}
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
    assert content["verdict"] == "A θ-step takes 1.50 times as long with φ [1.40, 1.60], its sites compiled."
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
    assert {"perturbed / plain", "perturbed network, compiled / plain"} <= {*found["steps"]["ratios"]}
    assert [found[name]["last"]["step"] for name in ("meta_train", "meta_test", "nccl")] == [3, 3, 3]
    assert found["meta_train"]["phi_gradient_error"] == [0.0, 0.0] and found["kernels"]["errors"]
    assert found["meta_train"]["processes"] == 1 and found["nccl"]["processes"] == 2 and found["nccl"]["one"]
    assert found["tests"]["counts"] == {"skipped": 2}
    assert capfd.readouterr().out.strip() == "A rehearsal: nothing here is a measurement."
