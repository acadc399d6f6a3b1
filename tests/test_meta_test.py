"""Meta-testing as a process: resumable to the bit, every test image counts, bad input in one line."""

import dataclasses
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import logged, model_state, result, start, train, wait_for
from image_files import write_folder
from torch.optim.optimizer import register_optimizer_step_pre_hook

import metaperturb.meta_test as program
from metaperturb import kernels, models
from metaperturb.data.batches import draw
from metaperturb.data.registry import load_parts
from metaperturb.errors import Diverged
from metaperturb.perturbation import MetaPerturb
from metaperturb.prediction import make_deterministic
from metaperturb.randomness import numpy_generator, seed_torch
from metaperturb.runs import StepProgress
from metaperturb.storage import load_tensors, save_tensors
from metaperturb.trained import load_run
from metaperturb.training import annealed_strength, choose_precision, choose_threads, place
from metaperturb.weights import save_phi

STEPS = 8


@pytest.fixture(scope="module")
def settings(target_settings, phi_file) -> list[str]:
    return [*target_settings, f"steps={STEPS}", f"phi={phi_file}"]


@pytest.fixture(scope="module")
def reference(settings, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    return train(tmp_path_factory.mktemp("reference") / "tgt", settings)


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return tmp_path / "tgt"


def test_run_folder_is_complete(reference, phi_file):
    found = result(reference)
    assert (found["target"]["train"], found["target"]["test"]) == (80, 50)
    assert found["phi_card"] == {"note": "random"}
    assert found["metrics"]["accuracy"] * 50 == pytest.approx(round(found["metrics"]["accuracy"] * 50), abs=1e-9)
    lines = logged(reference)
    assert [line["step"] for line in lines if "test_accuracy" in line] == [4, 8]
    assert lines[-1]["test_samples"] == 3 and lines[1]["test_samples"] == 2
    assert lines[-1]["test_nll"] == pytest.approx(found["metrics"]["nll"], abs=1e-6)
    assert (reference / "curves.png").read_bytes().startswith(b"\x89PNG")
    state = model_state(reference)  # φ is frozen, and saved with the network
    (saved,) = [value for key, value in state.items() if key.endswith("metaperturb.shared._extra_state")]
    assert torch.equal(saved[:82], program.load_phi(phi_file).flat)


def check_equal(run_dir: Path, reference: Path) -> None:
    """The same network to the bit, the same result, the same log."""
    ours, theirs = model_state(run_dir), model_state(reference)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert result(run_dir)["metrics"] == result(reference)["metrics"]
    assert logged(run_dir) == logged(reference)


@pytest.mark.parametrize(("at", "saved"), [(("theta_step", 2), 3), (("evaluate", 4), 4), (("evaluate", STEPS), STEPS)])
def test_a_signal_is_followed_by_a_checkpoint_and_the_same_bits(
    reference, settings, run_dir, monkeypatch, capsys, at, saved
):
    """In training, in an evaluation and in the last one, also where no checkpoint is due for long."""
    seed_torch = program.seed_torch

    def signalled(seed, task, *where):
        if where == at:
            os.kill(os.getpid(), signal.SIGTERM)
        seed_torch(seed, task, *where)

    monkeypatch.setattr(program, "seed_torch", signalled)
    train(run_dir, settings, "checkpoint_every=100", code=128 + signal.SIGTERM)
    assert f"stopped; saved after step {saved} of {STEPS}; the same command goes on" in capsys.readouterr().err
    monkeypatch.undo()
    train(run_dir, settings, "checkpoint_every=100")
    assert f"resuming after step {saved}" in capsys.readouterr().err
    check_equal(run_dir, reference)


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "step"), [(3, 2), (500, STEPS)])
def test_bits_after_sigkill_and_resume(reference, settings, run_dir, tmp_path, capsys, samples, step):
    """Killed in training, and in the last evaluation, which begins anew."""
    settings, checkpoint = [*settings, f"final_samples={samples}"], run_dir / "checkpoints" / "latest.pt"
    killed = start("meta_test", [*settings, f"run_dir={run_dir}"])
    wait_for(lambda: checkpoint.exists() and load_tensors(checkpoint)["step"] >= step)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (run_dir / "result.json").exists(), "finished before the kill: the test shows nothing"
    train(run_dir, settings)
    assert "resuming after step" in capsys.readouterr().err
    check_equal(run_dir, reference if samples == 3 else train(tmp_path / "never", settings))


def test_some_images_of_each_class(target_settings, tmp_path):
    """The same ones, and all test images; of what is held out none is taken."""
    trained = load_run(train(tmp_path / "tgt", target_settings, "method=base steps=1 train_per_class=3"))
    np.testing.assert_array_equal(np.bincount(trained.train.labels), 3)
    assert len(trained.test) == 50
    config = dataclasses.replace(trained.config, eval_split="holdout", holdout=0.5, train_per_class=4)
    rest, held_out = load_parts(config)
    images = {image.tobytes() for image in held_out.images}
    assert len(rest) == 40 and len(images) == 40 and not images & {image.tobytes() for image in rest.images}


def test_learning_rate_and_strength_schedules(settings, run_dir):
    seen = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    train(run_dir, settings, "steps=10")
    hook.remove()
    assert seen == pytest.approx([1e-3] * 4 + [3e-4] * 3 + [9e-5] * 2 + [2.7e-5])
    strengths = [annealed_strength(i, 10_000, 0.4) for i in (0, 1999, 3999, 4000, 9999)]
    assert strengths == [1 / 4000, 0.5, 1.0, 1.0, 1.0]
    assert annealed_strength(0, 750, 0.0) == 1.0
    assert annealed_strength(27, 100, 0.29) < 1.0 == annealed_strength(28, 100, 0.29)  # 100 · 0.29 is 28.999…


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ("gpu=99", "gpu: no GPU 99"),
        ("gpu=cpu,cpu", "gpu: expected one device"),
        ("phi=null", "phi: method metaperturb needs"),
        ("phi=nowhere.pt", "nowhere.pt: no such φ file"),
        ("phi=.", ".: is a folder; φ is a file, for instance phi.pt"),
        ("init=. target_path=nowhere", "init: .: holds no finished run (no result.json"),
        ("eval_split=val", "val"),
        ("eval_split=train", "eval_split: expected one of test, val, holdout"),
        ("target=embedded_source", "eval_split: embedded_source has no test images"),
        ("target=cub eval_split=val", "eval_split: cub has no val images"),
        *((f"holdout={share}", f"holdout: must be at least 0.001 and below 1, got {share}") for share in (0, 1)),
        ("train_per_class=9", "train_per_class 9: class class00 has 8 training images"),
        ("target_path=nowhere", "nowhere"),
        ("target=embedded target_path=nowhere", "takes no path"),
        ("target=embedded_source target_path=nowhere eval_split=holdout", "takes no path"),
        ("target=cub target_path=null download=false", "CUB_200_2011"),
        *(
            (f"model=vgg11 image_size=8 target_path=nowhere{more}", "VGG: does not run on images [2, 3, 8, 8]")
            for more in ("", " method=base")
        ),
        *((text, f"{text.partition('=')[0]}: ") for text in ("target=cifar5", "train_per_class=0", "lr=-1", "lr=nan")),
    ],
)
def test_bad_settings_are_one_line(settings, tmp_path, refused, changes, expected):
    assert expected in refused(program, [*settings, f"run_dir={tmp_path / 'tgt'}", *changes.split()])
    assert not (tmp_path / "tgt").exists()


def test_nan_stops_and_keeps_the_last_good_checkpoint(settings, run_dir, refused):
    changes = ["lr=1e30", "checkpoint_every=1", f"run_dir={run_dir}"]
    line = refused(program, [*settings, *changes], code=Diverged.exit_code)
    assert "step" in line and "not finite" in line
    assert load_tensors(run_dir / "checkpoints" / "latest.pt")["step"] == 1
    assert all(torch.isfinite(v).all() for v in model_state(run_dir).values())


@pytest.fixture
def unfinished(reference, settings, run_dir) -> list[str]:
    """The reference as a kill just before its end would have left it: the settings to go on with."""
    shutil.copytree(reference, run_dir)
    (run_dir / "result.json").unlink()
    return [*settings, f"run_dir={run_dir}"]


def test_a_run_goes_on_with_phi_at_another_place_and_other_evaluations(
    reference, unfinished, run_dir, phi_file, tmp_path, capsys
):
    moved = f"phi={shutil.copy(phi_file, tmp_path / 'moved.pt')}"
    for told in ("resuming after step 8", "already finished"):
        train(run_dir, unfinished, moved, "eval_every=1 eval_samples=1")
        assert told in capsys.readouterr().err
    check_equal(run_dir, reference)


def test_a_network_that_is_finite_in_training_alone_gets_no_result(settings, run_dir, tmp_path, capsys):
    """φ's noise grows with its input, from block to block; training clips it, evaluation does not."""
    phi = MetaPerturb()
    phi.flat.data.fill_(1e4)
    save_phi(phi, tmp_path / "explosive.pt")
    changes = f"phi={tmp_path / 'explosive.pt'} steps=4 eval_every=2 lr=1e-6 anneal=0"
    train(run_dir, settings, changes, code=Diverged.exit_code)
    said = capsys.readouterr().err
    assert "\nstep 2: the network's output is not finite for " in said and "clip_eval=true may help" in said
    assert "after the last step the network's output is not finite" in said and "diverged" in said
    assert not (run_dir / "result.json").exists()
    assert logged(run_dir) and not any("test_accuracy" in line for line in logged(run_dir))
    clipped = train(tmp_path / "clipped", settings, changes, "clip_eval=true")
    assert load_run(clipped).model.metaperturb.clip_eval and math.isfinite(result(clipped)["metrics"]["nll"])


def test_another_phi_or_target_under_the_same_name_is_refused(
    settings, phi_file, image_folder, run_dir, tmp_path, refused, capsys
):
    """By a run that is finished and by one that goes on; for what is gone a finished run does not answer."""
    phi = shutil.copy(phi_file, tmp_path / "phi.pt")
    images = shutil.copytree(image_folder, tmp_path / "images")
    settings = [*settings, f"phi={phi}", f"target_path={images}", f"run_dir={run_dir}"]
    train(run_dir, settings)
    answer = capsys.readouterr().out
    moved = images.rename(tmp_path / "moved")
    told = refused(program, settings)
    assert f"{run_dir}: a finished run cannot answer for what is not there: {images}: " in told
    train(run_dir, settings, f"target_path={moved}")
    assert capsys.readouterr().out == answer
    other = shutil.copytree(moved, images)
    shutil.copy(other / "test/class00/0.png", other / "test/class01/0.png")

    def changed(what: str, *more: str) -> None:
        told = refused(program, [*settings, *more])
        assert f"error: {run_dir}: {what} changed since this run began; choose another" in told

    changed("the target")
    (run_dir / "result.json").rename(tmp_path / "result.json")
    changed("the target")
    save_phi(MetaPerturb(), phi)
    changed(f"φ in {phi}", f"target_path={moved}")
    (tmp_path / "result.json").rename(run_dir / "result.json")
    changed(f"φ in {phi}", f"target_path={moved}")


@pytest.mark.skipif(kernels.kernel_name() == "plain", reason="needs a C++ compiler")
def test_another_kernel_on_resume_is_said(reference, unfinished, run_dir, capsys):
    assert result(reference)["kernel"] == "cpp"
    with kernels.use_kernel("auto"):  # the program's choice ends here
        train(run_dir, unfinished, "kernel=plain")
    assert "goes on with the plain kernel where it began with cpp" in capsys.readouterr().err
    assert result(run_dir)["kernel"] == "plain"


def test_statistics_of_one_pass_are_of_images_augmented_as_in_training(settings, run_dir, monkeypatch):
    augmented, make = [], program.TrainingBatches
    monkeypatch.setattr(program, "TrainingBatches", lambda *how: augmented.append(how[-1]) or make(*how))
    train(run_dir, settings, "recipe=trivial_augment,label_smoothing steps=1")
    assert len(augmented) == 2 and None not in augmented
    assert load_run(run_dir).config.recipe == ["label_smoothing", "trivial_augment"]  # whatever their order


def test_settings_without_effect_are_said(settings, run_dir, capsys):
    changes = "method=base recipe=mixup mixup_alpha=0.5 dropblock_prob=0.5 clip=3 steps=1 holdout=0.5"
    train(run_dir, settings, changes, "gpu=auto")
    said = capsys.readouterr().err
    assert "this run of base does not use clip, phi, dropblock_prob, holdout\n" in said
    assert said.count("running on") == 1


@pytest.mark.parametrize("content", [b"PK\x03\x04 half a file", b"", {"a": 1}, [1]])
def test_a_checkpoint_that_is_none_is_one_line(unfinished, run_dir, refused, content):
    checkpoint = run_dir / "checkpoints" / "latest.pt"
    checkpoint.write_bytes(content) if isinstance(content, bytes) else save_tensors(content, checkpoint)
    way_out = "begin anew without its folder checkpoints" if isinstance(content, bytes) else "remove it, or choose"
    line = refused(program, unfinished)
    assert way_out in line and f"error: {checkpoint}: " in line


@pytest.mark.parametrize("rest", ["result.json", "checkpoints/latest.pt"])
def test_what_lacks_its_settings_answers_for_no_others(reference, unfinished, run_dir, refused, rest):
    (run_dir / "config.yaml").unlink()
    if rest == "result.json":
        shutil.copy(reference / rest, run_dir)
        shutil.rmtree(run_dir / "checkpoints")
    assert "config.yaml: cannot read the settings" in refused(program, [*unfinished, "lr=0.5"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(settings, run_dir):
    train(run_dir, settings, "gpu=0")


def test_bfloat16_is_another_run_and_comes_near(reference, settings, run_dir, refused):
    train(run_dir, settings, "precision=bfloat16")
    half, full = (logged(folder)[0]["train_loss"] for folder in (run_dir, reference))
    assert half != full and half == pytest.approx(full, rel=0.05)
    assert "precision: bfloat16 → float32" in refused(program, [*settings, f"run_dir={run_dir}"])


LOADS = [  # busy, quota, OMP_NUM_THREADS, threads
    *((0, "max 100000", "", 2), (50, "max 100000", "", 1), (90, "max 100000", "", 1)),
    *((0, "100000 100000", "", 1), (0, "max", "3", 3)),
]


@pytest.mark.parametrize(("busy", "quota", "variable", "threads"), LOADS)
def test_threads_follow_the_cores_and_their_load(tmp_path, monkeypatch, capsys, busy, quota, variable, threads):
    """Four CPUs on two cores, of which others keep a share busy; a container may have less of them."""
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    siblings = {topology.format(cpu): f"{cpu % 2},{cpu % 2 + 2}\n".encode() for cpu in range(4)}
    write_folder(tmp_path, {**siblings, "sys/fs/cgroup/cpu.max": quota.encode()})
    counts = iter([(0, 0), (busy, 100 - busy)])  # since the machine started: at work, idle

    def wait(_: float = 0.0) -> None:
        work, idle = next(counts)
        lines = [f"cpu{cpu} {work} 0 0 {idle} 0 0 0 0 0 0\n" for cpu in range(4)]
        write_folder(tmp_path, {"proc/stat": "".join(lines).encode()})

    wait()
    monkeypatch.setattr("metaperturb.training.time.sleep", wait)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(torch, "get_num_threads", lambda: int(variable or 0))
    assert choose_threads(tmp_path) == threads
    assert capsys.readouterr().err.startswith(f"CPU threads: {threads} (")


@pytest.mark.parametrize(("seconds", "chosen"), [(8.0, "float32"), (0.5, "bfloat16")])
def test_bfloat16_is_left_where_it_is_slower(monkeypatch, capsys, seconds, chosen):
    monkeypatch.setattr("metaperturb.training._read", lambda path: "flags : fpu avx2")
    monkeypatch.setattr("metaperturb.training.step_seconds", {"bfloat16": seconds, "float32": 1.0}.get)
    assert choose_precision("bfloat16", torch.device("cpu")) == chosen
    assert ("takes 8.0 times as long" in capsys.readouterr().err) == (chosen == "float32")
    for asked, device, flags in (("float32", "cpu", ""), ("bfloat16", "cuda", ""), ("bfloat16", "cpu", "amx_bf16")):
        monkeypatch.setattr("metaperturb.training._read", lambda path, flags=flags: f"flags : {flags}")
        assert choose_precision(asked, torch.device(device)) == asked


def test_a_long_evaluation_tells_now_and_then_how_long_it_takes(capsys, monkeypatch):
    clock = iter([0, 10, 20, 30, 1030, 1031])  # made, updated, then one a call
    monkeypatch.setattr("metaperturb.runs.time.monotonic", lambda: next(clock))
    progress = StepProgress("base on cub", 100, 40, interval=1000)
    progress.update(50, loss=1.0)
    capsys.readouterr()
    progress.within(0.1)  # too soon after the line before
    progress.within(0.2)
    progress.within(0.6)
    progress.within(0.61)  # too soon, too
    assert capsys.readouterr().err == "base on cub: step 50/100  evaluating: 60%\n"


def test_one_pass_is_evaluated_and_leaves_the_training_as_it_is(reference, settings, run_dir, capsys):
    train(run_dir, settings, "eval=one_pass eval_every=2")
    ours, theirs = model_state(run_dir), model_state(reference)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs) and ours.keys() == theirs.keys()
    results = [result(run_dir), result(reference)]
    assert all(results[0][key] == results[1][key] for key in ("metrics", "one_pass"))
    assert [line["test_samples"] for line in logged(run_dir) if "test_samples" in line] == [1, 1, 1, 3]
    trained = load_run(run_dir)
    seen, test = (torch.tensor(part.images).float() / 127.5 - 1 for part in (trained.train, trained.test))
    seed_torch(0, 0, "one_pass")
    top, left, flip = draw(len(seen), 4, torch.device("cpu"))
    order = numpy_generator(0, 0, "one_pass").permutation(len(seen))
    moved = torch.nn.functional.pad(seen[order], (4,) * 4, value=-1.0)
    moved = torch.stack([x[:, i : i + 12, j : j + 12] for x, i, j in zip(moved, top, left, strict=True)])
    moved[flip] = moved[flip].flip(-1)
    logits = make_deterministic(trained.model, [moved])(test)
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(trained.test.labels)).item()
    assert nll == pytest.approx(results[0]["one_pass"]["nll"], rel=1e-4)
    assert f"in one pass: accuracy {100 * results[0]['one_pass']['accuracy']:.2f} %" in capsys.readouterr().out


def test_further_steps_of_one_pass_leave_the_training_as_it_is(reference, settings, run_dir, monkeypatch):
    epochs, make = [], program.make_deterministic
    monkeypatch.setattr(program, "ONE_PASS_SHARE", 2.0)

    def making(model, batches, steps, lr):
        epochs.extend([torch.cat(list(batches)) for _ in range(2)])
        assert (steps, lr) == (16, result(reference)["config"]["lr"])
        return make(model, batches, steps, lr=lr)

    monkeypatch.setattr(program, "make_deterministic", making)
    train(run_dir, settings)
    ours, theirs = model_state(run_dir), model_state(reference)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert result(run_dir)["metrics"] == result(reference)["metrics"]
    assert result(run_dir)["one_pass"] != result(reference)["one_pass"]
    assert epochs[0].shape == epochs[1].shape and not torch.equal(*epochs)  # augmented anew


def test_grouped_convolutions_run_in_channels_last_on_a_cpu():
    for name, grouped in (("mobilenet_v3_small", True), ("resnet18", False)):
        model = place(models.create(name, 5, 32), torch.device("cpu"))
        weight = next(m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3))
        assert weight.is_contiguous() is not grouped
