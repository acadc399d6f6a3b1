"""Finished runs read back: the network that was trained, on the images that it was trained on."""

import math
import shutil

import pytest
import torch
from conftest import class_pictures
from image_files import one_line, refused, write_folder

from metaperturb.data.batches import DeviceImages
from metaperturb.errors import UserError
from metaperturb.evaluation import evaluate
from metaperturb.randomness import seed_torch
from metaperturb.runs import finished_result, read_metrics
from metaperturb.storage import load_tensors, save_tensors
from metaperturb.trained import load_run
from metaperturb.training import restoring


@pytest.mark.parametrize("method", ["base", "metaperturb"])
def test_the_network_evaluates_as_it_did(trained, method):
    run = trained[method]
    assert run.stochastic == (method == "metaperturb") and not run.model.training
    seed_torch(run.config.seed, 0, "evaluate", run.config.steps)
    samples = run.result["metrics"]["samples"]
    again = evaluate(run.model, DeviceImages(run.test, torch.device("cpu")), samples, run.config.eval_batch_size)
    assert again == finished_result(str(run.dir))["metrics"]
    assert (len(run.train), len(run.test)) == (300, 200)


def test_what_is_no_finished_run_is_said(trained_runs, tmp_path):
    refused("holds no finished run", load_run, tmp_path)
    run = shutil.copytree(trained_runs["metaperturb"], tmp_path / "run")
    other = write_folder(tmp_path / "other", class_pictures(10, 8, "train", 13) | class_pictures(10, 5, "test", 13))
    refused("other images", load_run, run, target_path=str(other))
    moved = shutil.copytree(trained_runs["base"].parent / "images", tmp_path / "moved")
    assert len(load_run(run, target_path=str(moved), data_root=str(tmp_path / "cache")).test) == 200
    refused("no such file or folder", load_run, run, target_path=str(tmp_path / "nowhere"))
    checkpoint, result = run / "checkpoints" / "latest.pt", run / "result.json"
    whole = checkpoint.read_bytes()
    for name in ("bn1.running_mean", "layer3.0.slot.metaperturb.running_var"):
        checkpoint.write_bytes(whole)
        state = load_tensors(checkpoint)
        state["model"][name].view(-1)[0] = math.nan
        save_tensors(state, checkpoint)
        refused("holds values that are not finite", load_run, run)
    checkpoint.write_bytes(b"half")
    refused("latest.pt", load_run, run)
    checkpoint.unlink()
    refused("was not kept", load_run, run)
    result.unlink()
    refused("holds no finished run", load_run, run)
    for text in ('{"program": "meta_train", "config": {}}', "[1, 2", '"just text"', '{"program": "meta_test"}'):
        result.write_text(text)
        refused("a run of meta_train" if "train" in text else "result.json: ", load_run, run)


@pytest.mark.parametrize("place", [0.25, 0.75])
def test_a_flipped_byte_is_noticed(tmp_path, place):
    path = tmp_path / "latest.pt"
    save_tensors({"model": {"weight": torch.randn(64, 64)}}, path)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged, or no file of PyTorch") as error, restoring(path):
        load_tensors(path)
    assert "begin anew without its folder checkpoints" in one_line(error)


def test_a_damaged_line_of_metrics_loses_itself_alone(tmp_path):
    lines = [b'{"step": 1}', b'{"step": 2, "l\x00\xff', b"[3]", b'{"step": 4}', b'{"step": 5']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 4]
