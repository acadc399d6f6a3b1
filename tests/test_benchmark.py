"""The benchmark program in smoke mode: what it writes is complete and follows from what it measured."""

import json
import statistics

import benchmark
import pytest
import torch
from benchmark import Bench, peak_memory, ratio, summary

from metaperturb.provenance import available_cores

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "parts", [("steps", "evaluation", "memory", "site"), pytest.param(("start",), marks=pytest.mark.slow)]
)
def test_what_it_says_follows_from_the_rounds(parts, tmp_path, capsys):
    """And the page has all that was measured, and nothing that a smoke run measured is kept."""
    path = tmp_path / "cpu.json"
    asked = ["--smoke", "--device", "cpu", "--only", ",".join(parts), "--json", str(path)]
    assert benchmark.main(asked) == 0
    content, page = json.loads(path.read_text()), capsys.readouterr().out
    assert content["smoke"] and content["hardware"]["cores"] == available_cores()
    assert content["versions"]["torch"] == torch.__version__ and content["command"].startswith("./run.sh bench --smoke")
    assert content["processor"].startswith(content["hardware"]["cpu"])
    assert (content["settings"]["threads"], content["settings"]["rounds"]) == (1, 2)
    assert {*content["groups"]} - {"joint", "samples", "predict"} == {*parts}
    for group in content["groups"].values():
        for timing in group["timings"].values():
            assert timing["n"] == len(timing["rounds"]) and min(timing["rounds"]) == timing["min"] > 0
            assert timing["median"] == pytest.approx(statistics.median(timing["rounds"]), rel=1e-4)
    bars = [bar for bar in benchmark.BARS if bar[1] in content["groups"]]
    for found, bar in zip(content["ratios"], bars, strict=True):
        timings = content["groups"][found["group"]]["timings"]
        above, below = timings[found["numerator"]], timings[found["denominator"]]
        assert found["ratio"] == pytest.approx(above["median"] / below["median"], rel=1e-4)
        assert (found["what"] == bar[0] and [found["bar"]] == [*bar[4:5]]) or [None]
        assert found["met"] == (None if found["bar"] is None else found["ratio"] <= found["bar"])
        assert f"| {found['what']} | {found['ratio']:.2f} |" in page
    assert "Nothing here is a measurement" in page and content["command"] in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "steps,speed"], "unknown part 'speed' (known: start, steps"),
        (["--rounds", "1"], "--rounds 1: must be at least 2"),
        (["--threads", "0"], "--threads 0: must be at least 1"),
        (["--device", "cuda"], "PyTorch sees no GPU here"),
    ],
)
def test_bad_options_are_named(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main(arguments) == 1
    assert message in capsys.readouterr().err


# --- timing


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
    variants = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = Bench(CPU, threads=1, rounds=3, turn=0.0).time(variants)["timings"]
    assert "".join(order[-9:]) == "abcbcacab"  # after the warm-up; each round begins with another one
    assert all(timing["n"] == 3 for timing in timings.values())


def test_ratio_and_quartiles_of_known_rounds():
    timings = {"a": summary([2.0, 4.0, 6.0, 9.0, 8.0]), "b": summary([1.0, 2.0, 2.0, 3.0, 2.0])}
    assert timings["a"]["median"] == 6 and timings["a"]["q1"] == 4 and timings["a"]["q3"] == 8
    assert ratio(timings, "a", "b") == {"numerator": "a", "denominator": "b", "ratio": 3.0, "q1": 2.0, "q3": 3.0}


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(2.5, "s", "2.5 s"), (0.0025, "s", "2.5 ms"), (2.5e-6, "s", "2.5 µs"), (2_503_000, "bytes", "2.5 MB")],
)
def test_units(value, unit, text):
    assert benchmark.quantity(value, unit) == text
