"""Meta-training: the same bits for any number of processes and after any kill; all end together, in one line."""

import contextlib
import functools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import alive, children, error_line, logged, start, wait_for

import metaperturb.meta_train as program
from metaperturb import kernels
from metaperturb.config import MetaTrainConfig, load_config
from metaperturb.data.batches import DeviceImages
from metaperturb.distributed import Group, PeerLost, _cause, backend_for, choose_devices, launch, parse_devices
from metaperturb.errors import Diverged
from metaperturb.perturbation import MetaPerturb
from metaperturb.runs import Run
from metaperturb.storage import load_tensors, save_tensors
from metaperturb.weights import load_phi

STEPS = 6


def phi_bits(run_dir: Path) -> torch.Tensor:
    return load_phi(run_dir / "phi.pt").flat


@pytest.fixture(scope="module")
def reference(source_settings, tmp_path_factory) -> Path:
    """An uninterrupted run in one process, this one."""
    run_dir = tmp_path_factory.mktemp("reference") / "src"
    assert program.main(["--set", *source_settings, f"steps={STEPS}", f"run_dir={run_dir}", "gpus=cpu"]) == 0
    return run_dir


@pytest.fixture
def here(source_settings, tmp_path) -> list[str]:
    """Settings of the reference, for a run of its own."""
    return [*source_settings, f"steps={STEPS}", f"run_dir={tmp_path / 'src'}", "gpus=cpu"]


@pytest.fixture
def src(here, tmp_path):
    """`src(*changes)` runs in this process with changed settings, ends with `code`, and returns the run's folder."""

    def train(*changes: str, code: int = 0) -> Path:
        assert program.main(["--set", *here, *changes]) == code
        return tmp_path / "src"

    return train


def check_equal(run_dir: Path, reference: Path) -> None:
    """φ to the bit, and the log."""
    assert torch.equal(phi_bits(run_dir), phi_bits(reference))
    assert logged(run_dir) == logged(reference)


def at_step(when: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    joint_step = program.joint_step

    def acting(step, *arguments):
        if step == when:
            act()
        return joint_step(step, *arguments)

    monkeypatch.setattr(program, "joint_step", acting)


def latest(tmp_path: Path) -> Path:
    return tmp_path / "src" / "checkpoints" / "latest.json"


def started(settings: list[str], tmp_path: Path) -> subprocess.Popen:
    """A process that trains for long, and has saved."""
    process = start("meta_train", [*settings, "steps=100000"])
    wait_for(lambda: latest(tmp_path).exists() or process.poll() is not None)
    return process


def test_run_folder_is_complete(reference):
    result = json.loads((reference / "result.json").read_text())
    assert result["config"]["steps"] == STEPS and result["seed"] == 0 and result["processes"] == 1
    assert result["versions"]["torch"] == str(torch.__version__)
    assert set(result["metrics"]) == {"train_loss", "test_loss", "train_accuracy", "test_accuracy"}
    lines = logged(reference)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert (reference / "curves.png").read_bytes().startswith(b"\x89PNG")
    phi = load_phi(reference / "phi.pt")
    assert phi.card["config"]["tasks"] == 5
    norms = {name: math.sqrt(sum(x * x for x in p.flatten().tolist())) for name, p in phi.tensors()._asdict().items()}
    assert lines[-1]["phi_norms"] == pytest.approx(norms, abs=1e-5)
    assert [p.name for p in (reference / "checkpoints").glob("step-*")] == [f"step-{STEPS:06}"]


@pytest.mark.parametrize("processes", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_bits_do_not_depend_on_the_number_of_processes(reference, src, processes):
    check_equal(src("gpus=" + ",".join(["cpu"] * processes)), reference)


@pytest.mark.slow
def test_bits_under_torchrun(reference, here, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "metaperturb.meta_train", "--set", *here, "gpus=cpu,cpu"]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert completed.returncode == 0, completed.stderr
    check_equal(tmp_path / "src", reference)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_followed_by_a_checkpoint_and_the_same_bits(reference, src, monkeypatch, capsys, number):
    """Also where no checkpoint is due for long."""
    at_step(1, lambda: signal.raise_signal(number), monkeypatch)  # the next one tells the others
    src("checkpoint_every=100", code=128 + number)
    what = "interrupted" if number == signal.SIGINT else "stopped"
    assert f"\n{what}; saved after step 3 of {STEPS}; the same command goes on from there\n" in capsys.readouterr().err
    monkeypatch.undo()
    check_equal(src("checkpoint_every=100"), reference)
    assert "resuming after step 3" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("delay", "then"), [(0.0, "cpu"), (0.15, "cpu,cpu,cpu")])
def test_bits_after_sigkill_and_resume_with_other_processes(reference, here, src, tmp_path, capfd, delay, then):
    killed = start("meta_train", [*here, "gpus=cpu,cpu"])
    wait_for(lambda: latest(tmp_path).exists() or killed.poll() is not None)
    time.sleep(delay)
    os.killpg(killed.pid, signal.SIGKILL)  # launcher and workers alike, wherever they are
    killed.communicate()
    assert not (tmp_path / "src" / "result.json").exists(), "finished before the kill: the test shows nothing"
    with (tmp_path / "src" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "half')  # as a kill in mid-write leaves it
    check_equal(src(f"gpus={then}"), reference)
    assert "resuming after step" in capfd.readouterr().err


def test_a_finished_run_is_not_run_again_and_answers_for_no_other_settings(reference, here, src, capsys, refused):
    before = (reference / "phi.pt").stat().st_mtime_ns
    src(f"run_dir={reference}")
    assert "already finished" in capsys.readouterr().err
    line = refused(program, [*here, "steps=7", "seed=1", f"run_dir={reference}"])
    assert "steps: 6 → 7" in line and "seed: 0 → 1" in line
    assert (reference / "phi.pt").stat().st_mtime_ns == before


def test_changed_images_are_refused(here, src, image_folder, tmp_path, refused):
    """By a run that is finished and by one that goes on; a finished run does not answer for what is gone."""
    images = shutil.copytree(image_folder, tmp_path / "images")
    run_dir = src(f"source_paths={images}")
    told = refused(program, [*here, f"source_paths={tmp_path / 'gone'}"])
    assert "a finished run cannot answer for what is not there: " in told and "gone" in told
    shutil.copy(images / "train/class00/0.png", images / "train/class01/0.png")
    for finished in (True, False):
        if not finished:
            (run_dir / "result.json").unlink()  # as if it had been killed just before
        assert "src: the source or its split changed" in refused(program, [*here, f"source_paths={images}"])


@pytest.mark.slow
def test_worker_killed_ends_all_within_seconds(here, tmp_path):
    launcher = started([*here, "gpus=cpu,cpu,cpu"], tmp_path)
    workers = children(launcher.pid)
    assert len(workers) == 3
    os.kill(workers[1], signal.SIGKILL)
    killed_at = time.monotonic()
    _, err = launcher.communicate(timeout=30)
    assert time.monotonic() - killed_at < 15 and launcher.returncode == 1
    line = error_line(err)
    assert "process 1 (cpu) was killed by SIGKILL" in line and "goes on with what is saved" in line
    assert not any(alive(pid) for pid in workers) and latest(tmp_path).exists()


def test_a_process_that_only_lost_contact_with_another_is_not_the_cause(tmp_path):
    codes = [PeerLost.exit_code, -signal.SIGKILL]  # the first is seen before the one that was killed
    cause = _cause(0, codes, [torch.device("cpu")] * 2, tmp_path, 0)
    assert "process 1 (cpu) was killed by SIGKILL (out of memory?)" in str(cause)


@pytest.mark.slow
def test_launcher_killed_leaves_no_orphans(here, tmp_path):
    launcher = started([*here, "gpus=cpu,cpu"], tmp_path)
    workers = children(launcher.pid)
    assert len(workers) == 2
    launcher.kill()
    launcher.communicate()
    wait_for(lambda: not any(alive(pid) for pid in workers), seconds=60)


@pytest.fixture
def two_machines() -> Iterator[list[str]]:
    """The names of two network namespaces, 10.77.0.1 and 10.77.0.2 on their `link0`."""
    names = [f"metaperturb-{os.getpid()}-{i}" for i in range(2)]

    def ip(words: str) -> None:
        subprocess.run(["ip", *words.split()], check=True, capture_output=True)

    try:
        for name in names:
            ip(f"netns add {name}")
        ip(f"link add link0 netns {names[0]} type veth peer name link0 netns {names[1]}")
        for i, name in enumerate(names):
            ip(f"-n {name} address add 10.77.0.{i + 1}/24 dev link0")
            for link in ("lo", "link0"):
                ip(f"-n {name} link set {link} up")
        yield names
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("two network namespaces need root and the program ip")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@contextlib.contextmanager
def under_torchrun(machines: list[str], tmp_path: Path, settings: list[str]) -> Iterator[list[subprocess.Popen]]:
    """A process on each machine, which meet as the documentation has it, and have saved; `<i>.log`: what they say."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-id", "test", "--rdzv-endpoint", "10.77.0.1:29511"]
    own = ["-m", "metaperturb.meta_train", "--set", *settings]
    env, processes = {**os.environ, "GLOO_SOCKET_IFNAME": "link0"}, []
    for i, name in enumerate(machines):
        place = ["--local-addr", f"10.77.0.{i + 1}", "--rdzv-conf", f"is_host={1 - i}"]
        with open(tmp_path / f"{i}.log", "wb") as log:
            streams = {"stdout": log, "stderr": log, "start_new_session": True}
            command_there = ["ip", "netns", "exec", name, *command, *place, *own]
            processes.append(subprocess.Popen(command_there, env=env, **streams))
    try:
        wait_for(lambda: latest(tmp_path).exists() or any(process.poll() for process in processes))
        yield processes
    finally:
        for process in processes:
            process.kill()


def cut(machine: str, state: str) -> None:
    subprocess.run(["ip", "-n", machine, "link", "set", "link0", state], check=True)


@pytest.mark.slow
def test_a_machine_that_is_cut_off_and_comes_back_changes_nothing(two_machines, here, src, tmp_path):
    settings = ["steps=60", "checkpoint_every=10", "timeout=100"]
    with under_torchrun(two_machines, tmp_path, [*here, *settings]) as machines:
        cut(two_machines[1], "down")
        time.sleep(3)
        before = latest(tmp_path).read_text()
        time.sleep(3)
        assert latest(tmp_path).read_text() == before, "it was not cut off"
        cut(two_machines[1], "up")
        assert [machine.wait(200) for machine in machines] == [0, 0]
    src(*settings, f"run_dir={tmp_path / 'one'}")
    check_equal(tmp_path / "src", tmp_path / "one")


@pytest.mark.slow
def test_a_machine_that_is_cut_off_for_good_ends_both(two_machines, here, tmp_path):
    """Each process ends with a sentence. torchrun on the one that cannot reach the meeting place waits for TCP."""
    with under_torchrun(two_machines, tmp_path, [*here, "steps=1000000", "timeout=20"]) as machines:
        cut(two_machines[1], "down")
        for rank in (0, 1):
            sentence = f"error: process {rank}: lost contact with another process (".encode()
            wait_for(lambda rank=rank, sentence=sentence: sentence in (tmp_path / f"{rank}.log").read_bytes(), 120)
        assert machines[0].wait(120) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_all_and_says_how_to_go_on(here, tmp_path, number):
    launcher = started([*here, "gpus=cpu,cpu"], tmp_path)
    workers = children(launcher.pid)
    if number == signal.SIGINT:
        os.killpg(launcher.pid, number)  # as Ctrl-C on a terminal
    else:
        launcher.send_signal(number)
    _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 128 + number
    what = "interrupted" if number == signal.SIGINT else "stopped"
    step = json.loads(latest(tmp_path).read_text())["step"]
    assert f"{what}; saved after step {step} of 100000; the same command" in err and "Traceback" not in err
    assert not any(alive(pid) for pid in workers)


@pytest.mark.parametrize("gpus", ["cpu", pytest.param("cpu,cpu", marks=pytest.mark.slow)])
def test_interrupt_while_starting_is_quiet(here, gpus):
    """In the midst of importing PyTorch, in the one process or in those that it starts."""
    launcher = start("meta_train", [*here, f"gpus={gpus}"])
    wait_for(lambda: gpus == "cpu" or len(children(launcher.pid)) == 2)
    for worker in children(launcher.pid):  # the launcher passes it on when they are ready for it
        ignored = int(re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{worker}/status").read_text())[1], 16)
        assert ignored & 1 << (signal.SIGINT - 1)
    time.sleep(1.0)
    os.killpg(launcher.pid, signal.SIGINT)
    _, err = launcher.communicate(timeout=30)
    assert launcher.returncode in (130, -signal.SIGINT)
    assert not re.search("Traceback|KeyboardInterrupt|  File ", err), err


@pytest.mark.parametrize("gpus", ["cpu", pytest.param("cpu,cpu", marks=pytest.mark.slow)])
def test_nan_stops_and_keeps_the_last_good_checkpoint(here, tmp_path, refused, gpus):
    line = refused(program, [*here, "phi_lr=1e30", "checkpoint_every=1", f"gpus={gpus}"], code=Diverged.exit_code)
    assert "not finite" in line and "task 0, step 2" in line
    assert json.loads(latest(tmp_path).read_text())["step"] == 1
    state = load_tensors(latest(tmp_path).with_name("step-000001") / "task-00.pt")
    assert all(torch.isfinite(v).all() for v in state["model"].values() if v.is_floating_point())


def test_no_checkpoint_of_parameters_that_are_not_finite(here, tmp_path, refused):
    """float32 overflows in φ's first update, not yet in any loss."""
    line = refused(program, [*here, "phi_lr=1e38", "checkpoint_every=1"], code=Diverged.exit_code)
    assert "φ, step 1" in line and "not finite" in line and not latest(tmp_path).exists()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["gpus=cpu,cpu,cpu,cpu,cpu,cpu"], "6 processes for 5 tasks"),
        (["gpus=99"], "no GPU 99"),
        (["tasks=6"], "tasks 6: some get one class only, of the 10 there are"),
        (["classes=11"], "11 classes are asked for, the data has 10"),
        (["classes=4"], "5 tasks need 5 classes, the data has 4"),
        (["source_paths=nowhere.zip"], "nowhere.zip"),
        (["model=resnet21", "source_paths=nowhere.zip"], "model: unknown 'resnet21' (near: resnet"),  # seen first
        (["split=paired"], "split paired: needs an even number of tasks, got 5"),
        (["split_file=nowhere.json"], "nowhere.json: cannot be read"),
        (["noise=false", "scale_free=true"], "scale_free: is about the noise, and with noise=false there is none"),
        (["model=resnet8,resnet21"], "model: unknown 'resnet21' (near: resnet"),
        (["model=resnet8,,conv4"], "model: unknown ''"),
        (["model=resnet8,conv4,resnet8", "image_size=12,16"], "needs one at each image size, together 6, got 5"),
        (["steps=4", "keep_phi=3,4"], "keep_phi: step 4 is not before the last, 4"),
        (["noise=false", "gate=false"], "noise, gate: with both false φ does nothing"),
        (["keep_phi=1", "anneal=0.4"], "keep_phi: with annealing, φ on the way is not the φ of a shorter run"),
    ],
)
def test_bad_settings_are_one_line(here, tmp_path, refused, settings, expected):
    assert expected in refused(program, [*here, *settings])
    assert not (tmp_path / "src").exists()


@pytest.mark.parametrize(("gpus", "expected"), [(0, "cpu"), (1, "0"), (4, "0,1,2,3"), (8, "0,1,2,3,4")])
def test_auto_is_every_gpu_that_has_something_to_do(gpus, expected, monkeypatch, capsys):
    monkeypatch.setattr("metaperturb.distributed.count_gpus", lambda: (gpus, "none"))
    devices = choose_devices("auto", tasks=5)
    assert ",".join("cpu" if device.type == "cpu" else str(device.index) for device in devices) == expected
    said = capsys.readouterr().err
    assert said.startswith(f"running on {'the CPU (' if expected == 'cpu' else f'GPU {expected}'}")
    assert len(parse_devices("auto", "gpu")) == 1


def test_what_torchrun_lacks_is_one_line(here, refused, monkeypatch):
    """Half of its variables, and machines that cannot reach this one by its name."""
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert "torchrun: MASTER_ADDR is not set" in refused(program, here)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    line = refused(program, here)
    assert "has the address 127.0.1.1, where other machines cannot reach it; set GLOO_SOCKET_IFNAME" in line


def test_a_run_folder_in_use_and_one_that_cannot_be_written(here, tmp_path, refused):
    """The second is said before PyTorch is imported."""
    running = Run(load_config(MetaTrainConfig, None, here), "meta_train")
    assert "in use by another process" in refused(program, here)
    assert (running.dir / "config.yaml").exists()
    (tmp_path / "file").write_text("no folder")
    line = error_line(start("meta_train", [*here, f"run_dir={tmp_path / 'file' / 'src'}"]).communicate()[1])
    assert "run_dir: " in line and "cannot be written" in line


@pytest.mark.parametrize("damage", ["latest.json", "phi.pt"])
def test_a_checkpoint_of_another_program_is_one_line(reference, here, tmp_path, refused, damage):
    shutil.copytree(reference, tmp_path / "src")
    (tmp_path / "src" / "result.json").unlink()
    if damage == "latest.json":
        latest(tmp_path).write_text("[]")
    else:
        save_tensors({"a": 1}, latest(tmp_path).with_name(f"step-{STEPS:06}") / damage)
    assert "latest.json: is no checkpoint of this run; remove it, or choose" in refused(program, here)


# --- one process, from inside


@pytest.fixture
def setting(here):
    """Config, φ and tasks as `work` builds them, without a run folder."""
    torch.set_num_threads(1)

    def build(*settings: str, device: str = "cpu"):
        config = load_config(MetaTrainConfig, None, [*here, *settings])
        sources, splits, _ = program.load_tasks(config)
        images = {source.image_size: DeviceImages(source, torch.device(device)) for source in sources}
        program.seed_torch(config.seed, 0, "phi")
        phi = MetaPerturb(config.scale_free).to(device)
        sizes = [size for _, size in config.networks]
        return config, phi, [program.Task(t, splits[t], images[sizes[t]], phi, config) for t in range(config.tasks)]

    return build


def test_the_norm_of_phis_gradient_is_that_of_the_mean_over_tasks():
    tables = torch.zeros(2, 2, 82 + len(program.METRICS))
    tables[:, 0, 0], tables[:, 1, 0], tables[:, :, 1] = 3.0, -3.0, 4.0
    assert program.summarize(tables)["phi_gradient_norm"] == 4.0


def test_no_gradient_is_computed_that_is_thrown_away(setting, monkeypatch):
    _, phi, (task, *_) = setting()
    wanted, cross_entropy = [], F.cross_entropy

    def recording(logits, labels):
        wanted.append(({p.requires_grad for p in task.theta}, phi.flat.requires_grad))
        return cross_entropy(logits, labels)

    monkeypatch.setattr(F, "cross_entropy", recording)
    task.theta_step(0)
    task.phi_gradient(0)
    assert wanted == [({True}, False), ({False}, True)]


def test_against_a_plain_loop_of_algorithm_1(setting, tmp_path):
    """The same draws, but textbook code: one backward pass a step, with every gradient."""
    config, phi, tasks = setting("tasks=2", "steps=3")
    adam = {"lr": config.lr, "weight_decay": config.weight_decay, "foreach": False}
    theta_optimizers = [torch.optim.Adam(task.model.parameters(), **adam) for task in tasks]
    phi_optimizer = torch.optim.Adam(phi.parameters(), **adam)

    def loss(task, purpose, batches, step):
        program.seed_torch(config.seed, task.index, purpose, step)
        x, y = batches.batch(step)
        return -task.model(x).log_softmax(1)[range(len(y)), y].mean()

    for step in range(config.steps):
        total = torch.zeros(82)
        for task, optimizer in zip(tasks, theta_optimizers, strict=True):
            task.model.train()
            optimizer.zero_grad()
            loss(task, "theta_step", task.train_batches, step).backward()
            optimizer.step()
            for module in task.model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.eval()
            phi_optimizer.zero_grad()
            loss(task, "phi_step", task.test_batches, step).backward()
            total += phi.flat.grad
        phi.flat.grad = total / len(tasks)
        phi_optimizer.step()
    expected = phi.flat.detach().clone()

    program.meta_train(config)
    assert torch.allclose(phi_bits(tmp_path / "src"), expected, rtol=1e-4, atol=1e-6)


def test_lookahead_gradient_against_finite_differences(setting):
    """d/dφ of L_te(θ − η ∇L_tr(θ, φ), φ), in float64, with everything else held fixed."""
    _, phi, tasks = setting("lookahead=0.05", "clip=null")
    task = tasks[0]
    task.model.double()
    for batches in (task.train_batches, task.test_batches):
        original = batches.batch
        batches.batch = lambda step, original=original: (original(step)[0].double(), original(step)[1])
    phi.flat.data.normal_(0, 0.3)  # away from zero, where every derivative is small

    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    gradient, *_ = task.lookahead_gradient(0)
    assert all(torch.equal(value, before[key]) for key, value in task.model.state_dict().items())
    for index in (4, 13, 22, 31, 54, 77):  # one of each part
        losses, value = [], phi.flat[index].item()
        for moved in (value + 1e-6, value - 1e-6):
            phi.flat.data[index] = moved
            losses.append(task.lookahead_gradient(0)[1])
        phi.flat.data[index] = value
        assert torch.isclose(gradient[index], (losses[0] - losses[1]) / 2e-6, rtol=1e-4, atol=1e-8)


ABLATIONS = ["noise=false", "gate=false", "scale_free=true", "sites=before_pooling", "sites=top", "sites=bottom"]
USED = {"noise=false": slice(36, 82), "gate=false": slice(0, 36)}  # kernels of μ come first, then those of the scale


@pytest.mark.parametrize("lookahead", ["null", "0.01"])
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablations_have_gradients_where_phi_is_used_and_zeros_elsewhere(setting, ablation, lookahead):
    _, _, tasks = setting(ablation, f"lookahead={lookahead}")
    compute = tasks[0].phi_gradient if lookahead == "null" else tasks[0].lookahead_gradient
    used = torch.zeros(82, dtype=torch.bool)
    used[USED.get(ablation, slice(0, 82))] = True
    gradients = []
    for kernel in ("auto", "plain"):
        with kernels.use_kernel(kernel):
            gradient, loss, _ = compute(0)
        assert torch.isfinite(loss) and (gradient[~used] == 0).all()
        assert (gradient[used] != 0).float().mean() > 0.9
        gradients.append(gradient)
    if ablation == "noise=false":  # else the kernels draw other numbers
        assert torch.allclose(*gradients, rtol=1e-3, atol=1e-7)


MIXED = ["model=resnet8, mobilenet_v3_small", "image_size=16,32"]


def test_networks_and_image_sizes_are_spread_over_the_tasks(setting):
    """Task t has the network t mod n in the size (t // n) mod m; each sees its own images, split as those of one."""
    _, _, tasks = setting(*MIXED)
    kinds = [(type(task.model).__name__, task.train_batches.batch(0)[0].shape[-1]) for task in tasks]
    assert kinds == [("ResNet", 16), ("MobileNetV3", 16), ("ResNet", 32), ("MobileNetV3", 32), ("ResNet", 16)]
    assert [task.model.metaperturb.sites[0].size_norm for task in tasks] == [16, 16, 32, 32, 16]
    assert all(task.model.metaperturb.paper for task in tasks)
    assert {norm.momentum for task in tasks for norm in task.batch_norms} == {0.1}  # of this MobileNetV3: 0.01
    _, _, (alone, *_) = setting(*MIXED, "model=resnet8", "image_size=16")
    for key, value in alone.model.state_dict().items():  # what a task draws does not depend on the others
        assert torch.equal(tasks[0].model.state_dict()[key], value)


def test_lookahead_annealing_and_bfloat16_change_the_result(src, tmp_path):
    results = set()
    for setting in ("lr=1e-3", "lookahead=0.01", "anneal=1", "precision=bfloat16"):  # the first is the default
        src("steps=2", "tasks=2", f"run_dir={tmp_path / setting}", setting)
        results.add(tuple(phi_bits(tmp_path / setting).tolist()))
    assert len(results) == 4


def test_phi_that_is_kept_on_the_way_is_that_of_a_shorter_run(reference, here, src, refused):
    settings = ["steps=9", f"keep_phi=1,{STEPS}"]
    run_dir = src(*settings)
    assert sorted(path.name for path in run_dir.glob("phi*")) == ["phi-000001.pt", "phi-000006.pt", "phi.pt"]
    kept, shorter = load_phi(run_dir / f"phi-{STEPS:06}.pt"), load_phi(reference / "phi.pt")
    assert torch.equal(kept.flat, shorter.flat)
    assert kept.card["metrics"] == shorter.card["metrics"] and kept.card["config"]["steps"] == STEPS
    assert load_phi(run_dir / "phi.pt").card["config"]["steps"] == 9
    for finished in (True, False):
        if not finished:  # as if killed before its end
            (run_dir / "result.json").unlink()
        line = refused(program, [*here, "steps=9", "keep_phi=1,5"])
        assert f"error: keep_phi: {run_dir} is past step 5, its φ is gone" in line
        src(*settings)


def test_phi_that_is_kept_belongs_to_a_run_on_record(here, src, tmp_path, monkeypatch, refused, capsys):
    """Killed right behind it, the run holds its folder: no other settings may begin there and leave that φ."""
    settings = ["keep_phi=2", "checkpoint_every=100"]
    at_step(3, lambda: 1 / 0, monkeypatch)
    src(*settings, code=1)
    assert (tmp_path / "src" / "phi-000002.pt").exists()
    monkeypatch.undo()
    line = refused(program, [*here, *settings, "lr=0.1"])
    assert "holds a run with other settings (lr: 0.001 → 0.1)" in line
    src(*settings)
    assert "resuming after step 2" in capsys.readouterr().err


def test_no_step_at_all_is_phi_as_it_is_drawn(src):
    """The control of what meta-training brings: no kernel or weight has left N(0, 0.01²)."""
    run_dir = src("steps=0")
    phi = load_phi(run_dir / "phi.pt")
    assert 0.007 < phi.flat.std() < 0.013 and phi.flat.abs().max() < 0.05
    assert phi.card["config"]["steps"] == 0 and not phi.scale_free and phi.card["metrics"] is None
    assert (run_dir / "result.json").exists() and not (run_dir / "curves.png").exists()


def test_a_split_from_a_file_is_recorded_as_it_was_made(here, src, tmp_path, refused):
    drawn, read = (tmp_path / name for name in ("drawn", "read"))
    settings = ["steps=1", "tasks=4"]
    src(*settings, "split=paired", "seed=7", f"run_dir={drawn}")
    settings.append(f"split_file={drawn / 'split.json'}")
    line = refused(program, [*here, *settings])
    assert "split.json: has split=paired, the settings ask for split=disjoint" in line
    src(*settings, "split=paired", f"run_dir={read}")
    assert (read / "split.json").read_bytes() == (drawn / "split.json").read_bytes()
    assert not torch.equal(phi_bits(read), phi_bits(drawn))  # of another seed
    check_equal(src(*settings, "split=paired", "seed=7"), drawn)
    card = load_phi(read / "phi.pt").card
    assert (card["split_seed"], card["seed"], card["config"]["split"]) == (7, 0, "paired")


def test_some_classes(reference, src):
    run_dir = src("steps=1", "tasks=3", "classes=6")
    split = json.loads((run_dir / "split.json").read_text())["tasks"]
    assert len({c for task in split for c in task["classes"]}) == sum(len(task["classes"]) for task in split) == 6
    card = load_phi(run_dir / "phi.pt").card
    assert card["source"]["classes"] == 6 and card["source"]["images"] == 48
    assert load_phi(reference / "phi.pt").card["source"]["classes"] == 10


def record_collectives(group: Group, config: MetaTrainConfig, path: Path) -> None:
    """`work`, with the size of every tensor that any collective sends written down."""
    names = ("all_gather", "all_reduce", "broadcast", "all_gather_into_tensor", "reduce", "gather", "scatter")
    with patch.multiple(dist, **{name: Mock(wraps=getattr(dist, name)) for name in names}):
        program.work(group, config)
        calls = [(name, call) for name in names for call in getattr(dist, name).call_args_list]
    sent = []
    for name, call in calls:
        tensors = [a for a in (*call.args, *call.kwargs.values()) if isinstance(a, torch.Tensor)]
        sent.append((name, tensors[-1].numel()))  # what comes back stands before it
    if group.rank == 0:
        path.write_text(json.dumps(sent))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet8", "conv4"])
def test_collectives_carry_82_numbers_a_task_and_few_more(here, tmp_path, model):
    config = load_config(MetaTrainConfig, None, [*here, "image_size=16", f"model={model}", "steps=2"])
    recorded = functools.partial(record_collectives, config=config, path=tmp_path / "sent.json")
    launch(recorded, [torch.device("cpu")] * 2)
    per_step = -(-5 // 2) * (82 + len(program.METRICS) + 1)  # and whether to stop; nothing grows with θ
    assert json.loads((tmp_path / "sent.json").read_text()) == [["all_gather_into_tensor", per_step]] * 2


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
def test_steps_never_wait_for_the_gpu(setting):
    _, _, (task, *_) = setting(device="cuda:0")
    for step in range(4):  # the first steps allocate, and let the optimizer make its state
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            task.theta_step(step)
            task.phi_gradient(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("gpus", ["0", "0,0"])
def test_on_one_gpu_alone_and_shared(src, gpus):
    assert torch.isfinite(phi_bits(src(f"gpus={gpus}"))).all()


BACKENDS = [("cpu cpu", "gloo"), ("cuda:0 cuda:1", "nccl"), ("cuda:0 cuda:0", "gloo"), ("cuda:0 cpu", "gloo")]


@pytest.mark.parametrize(("devices", "backend"), BACKENDS)
def test_backend(devices, backend):
    assert backend_for([torch.device(device) for device in devices.split()]) == backend
