"""Grids run as anybody runs them: real processes that finish, fail, are killed and share folders with others."""

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO
from unittest.mock import Mock

import make_tables
import pytest
import torch
from conftest import ROOT, alive, children, wait_for
from grid_files import read_csv, tables, write_grid, write_record
from tables.grid import Grid
from tables.runner import Job, run_jobs
from tables.trainings import grid_parser, read_grid
from tables.trainings import make_table as run_experiment
from test_run_sh import run_sh

from metaperturb import meta_train, models
from metaperturb.config import MetaTestConfig
from metaperturb.errors import UserError
from metaperturb.identity import fingerprints

CPU = ("--devices", "cpu")

# --- the runner, with jobs of a line of Python


@dataclass(frozen=True)
class Script(Job):
    """A job that runs a line of Python in its run folder; `done()` in it makes the record."""

    code: str = "done()"

    def command(self, device: str) -> list[str]:
        head = f"import os, signal, sys, time, pathlib; os.environ['DEVICE'] = {device!r}; "
        head += f"done = lambda: pathlib.Path({str(self.record)!r}).write_text('{{}}'); "
        head += f"os.chdir({str(self.run_dir)!r}); count = lambda: open('starts', 'a').write('x'); count(); "
        return [sys.executable, "-S", "-c", head + self.code]

    @property
    def starts(self) -> int:
        path = self.run_dir / "starts"
        return len(path.read_text()) if path.exists() else 0


def script(folder: Path, id_: str, code: str = "done()", steps: int = 1, **more) -> Script:
    (folder / "records").mkdir(parents=True, exist_ok=True)
    config = MetaTestConfig(run_dir=str(folder / "runs" / id_), steps=steps)
    return Script(id_, "none", config, folder / "records" / f"{id_}.json", code=code, **more)


def test_jobs_run_after_what_they_need_on_devices_in_turn(tmp_path):
    phi = script(tmp_path, "phi", "time.sleep(0.2); done()")
    jobs = [
        script(tmp_path, "cell", "assert os.path.exists('../phi/starts'); done()", needs=(phi,)),
        phi,
        *(script(tmp_path, i, "open('device', 'w').write(os.environ['DEVICE']); done()") for i in "ab"),
    ]
    assert run_jobs(jobs, ["0", "1"], 3) == {} and all(job.done for job in jobs)
    assert all(job.starts == 1 for job in jobs)
    assert {(jobs[i].run_dir / "device").read_text() for i in (2, 3)} == {"0", "1"}
    assert run_jobs(jobs, ["0"], 1) == {} and all(job.starts == 1 for job in jobs)


NOT_FINITE = "print('error: not finite', file=sys.stderr); sys.exit(3)"
DENIED = PermissionError(13, "Permission denied", "metrics.jsonl")


def test_what_fails_is_tried_again_and_the_others_run(tmp_path, capsys):
    kept = tmp_path / "kept"
    cases = {  # what is said of it in the end, None: it is well; how often it started; code and options
        "blocked": ("cannot be started (", 0, "done()"),
        "phi": ("no luck", 2, "print('error: no luck', file=sys.stderr); sys.exit(1)"),
        "cell": ("not run, because phi failed", 0, "done()", {"needs": (script(tmp_path, "phi"),)}),
        "killed": (None, 2, "os.path.getsize('starts') > 1 or os.kill(os.getpid(), signal.SIGKILL); done()"),
        "silent": ("said nothing", 2, "sys.exit(4)"),
        "without a record": ("said nothing", 2, "pass"),
        "hopeless": ("not finite", 1, NOT_FINITE),
        "diverged": (None, 1, NOT_FINITE, {"diverge": kept.write_text}),
        "not kept": ("disk full", 2, NOT_FINITE, {"diverge": Mock(side_effect=UserError("disk full"))}),
        "denied": ("[Errno 13] Permission denied: 'metrics.jsonl'", 2, "pass", {"finish": Mock(side_effect=DENIED)}),
        "good": (None, 1, "done()"),
    }
    jobs = [script(tmp_path, id_, code, **dict(*options)) for id_, (_, _, code, *options) in cases.items()]
    jobs[0].run_dir.parent.mkdir()
    jobs[0].run_dir.write_text("a file")
    failed = run_jobs(jobs, ["cpu"], 2, retries=1)
    assert failed["blocked"].endswith("cannot write (File exists))") and kept.read_text() == "not finite"
    for job, (said, starts, *_) in zip(jobs, cases.values(), strict=True):
        assert failed.get(job.id, "").startswith(said or "") and (job.id in failed) == bool(said)
        assert job.starts == starts and job.done == (said is None and job.id != "diverged"), job.id
    said = capsys.readouterr().err
    assert "phi: failed, will be tried again: no luck" in said and "phi: failed: no luck" in said
    assert "diverged: diverged: not finite" in said
    log = (jobs[1].run_dir / "log.txt").read_text().splitlines()
    assert [line.startswith(f"$ {sys.executable} -S -c ") for line in log] == [True, False] * 2
    assert log[1::2] == ["error: no luck"] * 2


# --- whole trainings

CELLS = """
title: A table of seconds
config: tgt.yaml
set: {model: resnet8, steps: 6, batch_size: 8, final_samples: 1, eval_every: 6, log_every: 1, threads: 1,
      checkpoint_every: 2, eval_split: holdout, image_size: 16, target: folder, target_path: IMAGES}
seeds: [0, 1]
needs:
  phi: {program: meta_train, config: src.yaml, set: &small {source: folder, source_paths: [IMAGES], image_size: 12,
        model: resnet8, tasks: 5, steps: 2, batch_size: 4}}
  few: {program: meta_train, config: src.yaml, set: {<<: *small, classes: 4}}
  start: {program: meta_test, config: pretrain.yaml}
columns: {Bugs: {}}
rows:
  Base: {method: base}
  MetaPerturb: {method: metaperturb, phi: "${phi}"}
  Dropout: {method: dropout}
  From few: {method: metaperturb, phi: "${few}"}
  Finetuned: {method: base, init: "${start}"}
baselines: [Base]
presets:
  paper: {rows: [Base, MetaPerturb, Dropout]}
  all: {seeds: [0], columns: {Bugs: {}, Two an image: {train_per_class: 2}}}
  long: {seeds: [0], rows: [Base], set: {steps: 200, checkpoint_every: 10}}
  absent: {columns: {Bugs: {}, Birds: {target_path: null}, Cars: {target: cars, target_path: null, download: false}}}
"""


def command(path: Path, folder: Path, *more: str) -> list[str]:
    folders = ["--results", str(folder / "results"), "--runs", str(folder / "runs")]
    folders += ["--data-root", str(folder / "data")]
    return [sys.executable, str(ROOT / "scripts" / "make_tables.py"), "table", str(path), *folders, *CPU, *more]


def parsed(*arguments) -> Namespace:
    """The same command line, for this process."""
    return grid_parser("").parse_intermixed_args(command(*arguments)[3:])


def records(folder: Path, preset: str) -> list[str]:
    return [path.name for path in (folder / "results" / "small" / preset).glob("*.json")]


@pytest.fixture
def here(monkeypatch) -> None:
    """Programs run in this process, which has imported all of them."""

    def run(command: list[str], stdout: BinaryIO, **_: object) -> Mock:
        _python, _m, program, *arguments = command
        log = io.TextIOWrapper(stdout, write_through=True)
        with contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
            code = importlib.import_module(program).main(arguments)
        log.detach()
        return Mock(returncode=code, poll=lambda: code)

    monkeypatch.setattr("tables.runner.subprocess", SimpleNamespace(Popen=run, DEVNULL=None))


@pytest.fixture
def path(tmp_path, image_folder) -> Path:
    return write_grid(tmp_path / "configs", CELLS.replace("IMAGES", str(image_folder)))


@pytest.mark.slow
def test_killed_and_stopped_it_resumes_to_the_same_result(path, tmp_path, request):
    more, runs = ("--preset", "long"), tmp_path / "a" / "runs"

    def saved() -> list[float]:
        return [checkpoint.stat().st_mtime for checkpoint in runs.glob("**/checkpoints/latest.pt")]

    for number, code in [(signal.SIGKILL, -9), (signal.SIGTERM, 128 + 15)]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        started = command(path, tmp_path / "a", *more)
        process = subprocess.Popen(started, text=True, env=environment, stderr=subprocess.PIPE)
        training = wait_for(lambda process=process: children(process.pid, b"metaperturb.meta"))[0]
        seen = saved()
        wait_for(lambda seen=seen: saved() != seen)
        process.send_signal(number)
        said = process.communicate(timeout=200)[1]
        assert process.returncode == code and "Traceback" not in said
        assert code == -9 or "the same command goes on with what is saved" in said
        wait_for(lambda training=training: not alive(training))
    (log,) = runs.glob("**/log.txt")
    request.getfixturevalue("here")
    for name in ("a", "b"):
        run_experiment(parsed(path, tmp_path / name, *more))
    assert "resuming after step" in log.read_text()
    interrupted, whole = (next((tmp_path / name / "results").glob("small/*/*.json")) for name in "ab")
    assert json.loads(interrupted.read_text())["metrics"] == json.loads(whole.read_text())["metrics"]


def test_one_that_diverges_is_reported_and_not_tried_again(path, tmp_path, capsys, here):
    text = path.read_text().replace("{method: dropout}", "{method: base, lr: 1.0e+30}")
    path.write_text(text.replace("rows: [Base]", "rows: [Dropout, Base]").replace("steps: 200", "steps: 20"))
    more = ("--preset", "long", "--jobs", "1")
    run_experiment(parsed(path, tmp_path, *more))
    page = capsys.readouterr().out
    assert tables(page)[0][2] == ["Dropout", "diverges (1) (a)"]
    (said,) = [line for line in page.splitlines() if line.startswith("- Dropout on Bugs, seed 0, diverged: ")]
    assert "not finite" in said and str(tmp_path) not in page
    (kept,) = (tmp_path / "results" / "small" / "long" / "diverged").glob("*.json")
    assert json.loads(kept.read_text())["config"]["lr"] == 1e30 and records(tmp_path, "long")[0].startswith("base--")
    run_experiment(parsed(path, tmp_path, *more))  # nothing is left to do
    said = capsys.readouterr()
    assert "1 cells diverged before: dropout--bugs--seed0" in said.err and tables(said.out) == tables(page)
    run_experiment(parsed(path, tmp_path, *more, "--status"))
    assert capsys.readouterr().out == "small long: 2 done, 0 running, 0 waiting, 0 failed\n"


def refused(path: Path, folder: Path, *more: str, runs: Path | None = None) -> str:
    """`runs`: with those that are there already."""
    arguments = parsed(path, folder, *more)
    arguments.runs = runs or folder / "runs"
    with pytest.raises(UserError) as error:
        run_experiment(arguments)
    assert not (folder / "runs").exists()
    return str(error.value)


def test_what_is_absent_or_does_not_run_is_named_before_anything_runs(path, tmp_path):
    more = ("--preset", "absent", "--path", f"phi={tmp_path / 'nowhere'}")
    first, *lines = refused(path, tmp_path, *more).splitlines()
    assert first == "nothing was run, because this is missing or wrong:"
    heads = ["  column Birds", "  column Cars", "  need phi", "  need start"]
    assert [line.partition(":")[0] for line in lines] == heads
    assert "put" in lines[1] and str(tmp_path / "data") in lines[1]  # what to get and where it belongs
    assert not (tmp_path / "results").exists()
    more = ("--rows", "Base", "--columns", "Bugs", "--set", "model=conv4", "image_size=8")
    assert "  row Base, column Bugs: image_size 8: too small for this network" in refused(path, tmp_path, *more)


def test_what_a_finished_need_was_made_of_may_be_absent_but_not_other_images(path, tmp_path, image_folder):
    more = ("--rows", "MetaPerturb", "--seeds", "0", "--path", "Bugs=nowhere")
    phi = Grid(path).cell("MetaPerturb", "Bugs", 0).needs["phi"]
    path.write_text(path.read_text().replace(f"source_paths: [{image_folder}]", "source_paths: [gone]"))
    said = refused(path, tmp_path, *more)
    assert "column Bugs" in said and "need phi" in said
    made = tmp_path / "made" / "needs" / phi.id / "result.json"
    made.parent.mkdir(parents=True)
    made.write_text(json.dumps({"program": "meta_train", "config": {}, "source": {"fingerprint": "of other images"}}))
    said = refused(path, tmp_path, *more, runs=tmp_path / "made")
    assert "column Bugs" in said and "need phi" not in said
    said = refused(path, tmp_path, *more, f"phi={image_folder}", runs=tmp_path / "made")
    assert f"need phi: {made.parent}: was made from other images than --path names" in said


def test_a_network_may_come_from_a_file_under_any_name(path, tmp_path, capsys, here):
    weights = tmp_path / "start.pt"
    torch.save(models.create("resnet8", num_classes=3, image_size=16).state_dict(), weights)
    more = ("--preset", "all", "--columns", "Bugs", "--rows", "Finetuned", "--use", f"start={weights}")
    run_experiment(parsed(path, tmp_path, *more))
    page = capsys.readouterr().out
    assert len(records(tmp_path, "all")) == 1 and "start: start.pt, of which nothing is recorded" in page
    weights.write_bytes(b"no weights")
    assert "need start: " in refused(path, tmp_path / "elsewhere", *more)


def test_columns_that_were_not_tuned_are_left_out_or_named(path, tmp_path, capsys):
    tuned = tmp_path / "tuned.json"
    tuned.write_text(json.dumps({"chosen": {"Bugs": {"dropout": {"dropout_prob": 0.02}}}}))
    more = ("--preset", "all", "--rows", "Dropout", "--tuned", str(tuned))
    assert refused(path, tmp_path, *more) == f"{tuned}: nothing was tuned for Two an image; --columns names others"
    arguments = parsed(path, tmp_path, *more, "--columns", "Bugs")
    write_record(tmp_path / "results" / "small" / "all", read_grid(arguments).cell("Dropout", "Bugs", 0), 0.5)
    run_experiment(arguments)
    assert "on Two an image are the defaults of their sources, not tuned." in capsys.readouterr().out


def test_columns_may_differ_in_images_but_a_column_mixes_none_and_phi_in_how_many_classes(path, tmp_path):
    grid = Grid(path, "all", data_root=str(tmp_path / "data"))
    cells = [grid.cell("Base", column, 0) for column in grid.columns]
    (first, test), (second, same_test) = images = [fingerprints(cell.config) for cell in cells]
    assert first != second and test == same_test
    for cell, found in zip(cells, images, strict=True):
        write_record(tmp_path / "results" / "small" / "all", cell, 0.5, target={"fingerprints": found})
    more = ("--preset", "all", "--rows", "Base", "MetaPerturb", "From few", "--set", "few.classes=999")
    _, said = refused(path, tmp_path, *more).splitlines()
    assert said.startswith("  need few: 999 classes are asked for, the data has 10")
    write_record(tmp_path / "results" / "small" / "paper", Grid(path).cell("Base", "Bugs", 0), 0.5)
    said = refused(path, tmp_path, "--rows", "Base")
    assert "column Bugs: these are other images than those of the cells in" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--preset", "smok"), "preset 'smok' is unknown"),
        (("--rows", "Bas"), "--rows 'Bas' is unknown; did you mean 'Base'?"),
        (("--seeds", "7"), "--seeds 7 is unknown (0, 1)"),
        (("--devices", "tpu"), "expected GPU numbers or 'cpu'"),
        (("--jobs", "0"), "--jobs: must be at least 1, got 0"),
        (("--path", "Bugs"), "--path Bugs: expected NAME=PATH"),
        (("--report",), "no finished cell of this table yet"),
    ],
)
def test_a_wrong_option_is_one_line(path, tmp_path, more, said):
    assert said in refused(path, tmp_path, *more)


# --- the smoke presets, as the README has them


def made(table: str, folder: Path, *more: str) -> str:
    """The page."""
    command = [table] if table in make_tables.COMMANDS else ["table", str(ROOT / "configs" / f"{table}.yaml")]
    folders = ["--results", folder / "results", "--runs", folder / "runs", "--data-root", folder / "data"]
    assert make_tables.main([*command, "--preset", "smoke", *map(str, folders), *CPU, *more]) == 0
    for record in (folder / "results" / table).rglob("*.json"):
        assert str(folder) not in record.read_text()
    (page,) = (folder / "results" / table).glob("*.md")
    return page.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("table", ["table1", "table2", "table3"])
def test_smoke_of_a_table(table, tmp_path, here):
    """Every cell has a result on the page and in the CSV; of a second seed some are left."""
    grid = Grid(ROOT / "configs" / f"{table}.yaml", "smoke")
    for seed in grid.seeds:
        page = made(table, tmp_path, "--seeds", str(seed), *(["--rows", "Base", "MetaPerturb"] if seed else []))
    lines = read_csv(tmp_path / "results" / table / "smoke.md")
    overview, details, *_, trainings = tables(page)
    assert lines.keys() == {(row, column) for row in grid.rows for column in grid.columns}
    assert len(overview) == 1 + len(grid.rows) and len(details) == 1 + len(lines)
    assert all(line["setting"] == "reduced" and float(line["accuracy"]) >= 0 for line in lines.values())
    assert lines["MetaPerturb", [*grid.columns][-1]]["pairs"] == f"{len(grid.seeds)}"
    assert ("cells have not run yet, or failed" in page) == (len(grid.seeds) > 1)
    assert {line[0] for line in trainings[1:]} == {c.needs["phi"].name for c in grid.cells() if "phi" in c.needs}


@pytest.mark.slow
def test_smoke_of_tuning_and_selection(tmp_path, image_folder, here, capsys):
    tiny = ["--set", "steps=2", "eval_every=2", "image_size=12", "target=folder", f"target_path={image_folder}"]
    made("tune", tmp_path, *tiny)
    (written,) = (tmp_path / "results" / "tune").glob("*.json")
    chosen = json.loads(written.read_text())["chosen"]["Drawn bugs"]
    assert chosen["dropout"]["dropout_prob"] in (0.02, 0.25) and chosen["mixup"] == {"mixup_alpha": 0.2}
    source = ["source=folder", f"source_paths={image_folder}", "steps=1", "tasks=2", "batch_size=2", "image_size=8"]
    for seed in (0, 1):
        own = [f"seed={seed}", f"run_dir={tmp_path / 'runs' / f'src-{seed}'}"]
        assert meta_train.main(["--set", *source, "model=resnet8", "gpus=cpu", *own]) == 0
    page = made("select", tmp_path, *tiny)
    assert (tmp_path / "runs" / "selected" / "phi.pt").exists()
    assert capsys.readouterr().out.count("% over 1 seeds") == 2
    options = ["--preset", "smoke", "--results", str(tmp_path / "results"), *tiny, "--report"]
    assert run_sh("select", *options, RUNS=str(tmp_path / "runs")).returncode == 0
    (again,) = (tmp_path / "results" / "select").glob("*.md")
    assert again.read_text() == page
