"""The benchmark program in smoke mode: what it writes is complete and follows from what it measured."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench.exchange import fit, predicted
from bench.page import quantity, short
from bench.timing import interleave, peak_memory, ratio, summary
from bench.training import steps_together
from benchmark import checked, parse
from conftest import ROOT, error_line

from metaperturb.errors import UserError
from metaperturb.provenance import available_cores

CPU = torch.device("cpu")
SUITES = ("bars", "site", "scaling", "exchange", "training")


def bench(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    completed = bench("--smoke", "--device", "cpu", "--only", ",".join(SUITES), "--json", str(folder / "cpu.json"))
    assert completed.returncode == 0, completed.stderr
    return folder


def document(folder: Path) -> dict:
    return json.loads((folder / "cpu.json").read_text())


def test_every_suite_is_there_with_its_circumstances(smoke):
    content = document(smoke)
    assert content["smoke"] and content["device"] == "cpu" and content["hardware"]["cores"] == available_cores()
    assert content["versions"]["torch"] == torch.__version__
    assert tuple(content["suites"]) == SUITES
    for suite in content["suites"].values():
        assert suite["command"].startswith("./run.sh bench --smoke")
        assert suite["settings"] == {"threads": 1, "rounds": 2}
    assert str(smoke) not in (smoke / "cpu.json").read_text() + (smoke / "README.md").read_text()


def test_figures_follow_from_the_rounds(smoke):
    count = 0
    for suite in document(smoke)["suites"].values():
        for group in suite["groups"].values():
            for timing in group["timings"].values():
                assert timing["n"] == len(timing["rounds"]) and min(timing["rounds"]) == timing["min"] > 0
                assert timing["median"] == pytest.approx(statistics.median(timing["rounds"]), rel=1e-4)
        for found in suite["ratios"]:
            timings = suite["groups"][found["group"]]["timings"]
            above, below = timings[found["numerator"]], timings[found["denominator"]]
            assert found["ratio"] == pytest.approx(above["median"] / below["median"], rel=1e-4)
            count += 1
    assert count > 10


def test_bars_are_judged_by_their_ratios(smoke):
    bars = {found["name"]: found for found in document(smoke)["suites"]["bars"]["ratios"] if "name" in found}
    limits = {"theta_step": 1.5, "meta_step": 1.5, "memory": 1.3, "loader": 10.0, "evaluation": 1.5}
    assert {name: found["bar"] for name, found in bars.items()} == limits
    for name, found in bars.items():
        assert found["met"] == (found["ratio"] >= 10 if name == "loader" else found["ratio"] <= limits[name])


def test_the_page_names_every_suite_and_says_that_it_is_no_measurement(smoke):
    page = (smoke / "README.md").read_text()
    assert "Nothing here is a measurement" in page
    assert all(f"(`{suite}`)" in page for suite in SUITES)
    assert "Projected, not measured" in page and "10,000" in page
    for name in ("benchmark_scaling.png", "benchmark_exchange.png"):
        assert f"]({name})" in page
        assert (smoke / name).read_bytes().startswith(b"\x89PNG")


def test_resume_keeps_what_is_there(smoke):
    before = document(smoke)
    completed = bench("--smoke", "--device", "cpu", "--resume", "--json", str(smoke / "cpu.json"))
    assert completed.returncode == 0, completed.stderr
    assert all(f"{suite}: kept" in completed.stderr for suite in SUITES)
    assert document(smoke) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "bars,speed"], "unknown suite 'speed' (known: bars, site"),
        (["--device", "tpu"], "--device tpu: expected cpu or cuda"),
        (["--rounds", "1"], "--rounds 1: must be at least 2"),
        (["--threads", "0"], "--threads 0: must be at least 1"),
        (["--only", "training", "--device", "cpu"], "needs --device cuda"),
    ],
)
def test_bad_options_are_named(arguments, message):
    with pytest.raises(UserError) as caught:
        checked(parse(arguments))
    assert message in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named():
    with pytest.raises(UserError, match="PyTorch sees no GPU"):
        checked(parse(["--device", "cuda"]))


def test_a_bad_option_is_one_line():
    assert "unknown suite 'speed'" in error_line(bench("--only", "bars,speed"))


def test_another_file_is_not_overwritten(tmp_path):
    (tmp_path / "notes.json").write_text("[1, 2]")
    assert "no result of this program" in error_line(
        bench("--smoke", "--device", "cpu", "--only", "site", "--json", str(tmp_path / "notes.json"))
    )
    assert (tmp_path / "notes.json").read_text() == "[1, 2]"


# --- the parts


def test_peak_memory_of_known_allocations():
    def call() -> None:
        first = torch.empty(1000, dtype=torch.float32)
        second = torch.empty(3000, dtype=torch.float64)
        del first
        third = torch.empty(500, dtype=torch.float32)
        del second, third

    assert peak_memory(call, CPU) == 4000 + 24_000


def test_variants_take_turns():
    order = []
    timings = interleave({name: lambda name=name: order.append(name) for name in "abc"}, 3, CPU)
    assert "".join(order[-9:]) == "abcbcacab"  # after the warm-up; each round begins with another one
    assert all(timing["n"] == 3 for timing in timings.values())


def test_ratio_and_quartiles_of_known_rounds():
    timings = {"a": summary([2.0, 4.0, 6.0, 9.0, 8.0]), "b": summary([1.0, 2.0, 2.0, 3.0, 2.0])}
    assert timings["a"]["median"] == 6 and timings["a"]["q1"] == 4 and timings["a"]["q3"] == 8
    assert ratio(timings, "a", "b") == {"numerator": "a", "denominator": "b", "ratio": 3.0, "q1": 2.0, "q3": 3.0}


@pytest.mark.parametrize("hops", ["tree", "ring"])
def test_the_model_of_the_exchange_is_found_again(hops):
    truth = {"start": 1e-4, "hop": 3e-5, "seconds_a_byte": 1e-9}
    points = [(g, t, predicted(truth, hops, g, t)) for g in (2, 4, 8, 16) for t in (16, 1000, 10_000)]
    found = fit(points, hops)
    assert all(found[name] == pytest.approx(value, rel=1e-3) for name, value in truth.items())
    assert found["worst_relative_error"] < 1e-6


def test_throughput_is_that_of_the_time_in_which_all_runs_train(tmp_path):
    folders = [tmp_path / "early", tmp_path / "late"]
    for folder, started, speed in zip(folders, (1000.0, 1004.0), (10, 20), strict=True):
        folder.mkdir()
        (folder / "config.yaml").touch()
        os.utime(folder / "config.yaml", (started, started))
        lines = [{"step": speed * second, "seconds": float(second)} for second in range(1, 11)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert steps_together(folders[:1]) == pytest.approx(10)
    assert steps_together(folders) == pytest.approx(30)  # from 1007, where the late one is warm, to 1009


@pytest.mark.parametrize(
    ("value", "text"), [(0.0123456, "0.0123"), (1.2345, "1.23"), (999.6, "1,000"), (12345, "12,300"), (0, "0")]
)
def test_three_digits(value, text):
    assert short(value) == text


def test_units():
    assert [quantity(v, "s") for v in (2.5, 0.0025, 2.5e-6)] == ["2.50 s", "2.50 ms", "2.50 µs"]
    assert quantity(2_500_000, "bytes") == "2.50 MB"
