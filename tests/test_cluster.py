"""What is submitted to Slurm, once, and what is said when Slurm refuses: with stand-ins for its programs."""

import sys
from pathlib import Path

import cluster
import make_tables
import pytest
from grid_files import write_grid
from image_files import refusal, refused
from tables.grid import Grid
from test_experiments import CELLS, parsed, run_experiment

pytest.importorskip("submitit", reason="needs submitit: pip install submitit")

# A queue in a file: a line a task, as squeue prints it. What `refuses` names ends with what is in that file.
STAND_IN = f"""#!{sys.executable} -S
import pathlib, re, sys
here = pathlib.Path(sys.argv[0]).parent
name, queue, said = pathlib.Path(sys.argv[0]).name, here / "queue", here / "said"
said.open("a").write(" ".join([name, *sys.argv[1:]]) + "\\n")
if (here / ("refuses-" + name)).exists():
    sys.exit((here / ("refuses-" + name)).read_text())
lines = queue.read_text().splitlines() if queue.exists() else []
if name == "sbatch":
    script = pathlib.Path(sys.argv[1]).read_text()
    number = 1 + sum(line.startswith("sbatch") for line in said.read_text().splitlines())
    (here / f"script-{{number}}").write_text(script)
    array = re.search(r"--array=0-(\\d+)", script)
    ids = [f"{{number}}_{{i}}" for i in range(int(array[1]) + 1)] if array else [str(number)]
    lines += [f"{{id_}}|{{re.search('--job-name=(.*)', script)[1]}}|PENDING|Priority|" for id_ in ids]
    print("Submitted batch job", number)
if name == "squeue":
    print(*lines, sep="\\n", end="")
queue.write_text("\\n".join(lines))
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """Where the stand-ins are, and what they keep: the scripts of jobs, among others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "squeue", "scontrol", "srun"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder


@pytest.fixture
def path(tmp_path, image_folder) -> Path:
    return write_grid(tmp_path / "configs", CELLS.replace("IMAGES", str(image_folder)))


def submissions(tmp_path: Path) -> dict[Path, list[str]]:
    """What the jobs of each are about."""
    found = cluster.Queue(tmp_path / "runs" / "slurm" / "small" / "paper").submissions()
    return {folder: [*jobs] for folder, jobs in found.items()}


def test_cells_are_submitted_once_behind_what_they_need(slurm, path, tmp_path, capsys):
    command = parsed(path, tmp_path, "--slurm", "partition=gpu", "gpus=1", "time=1:00:00", "array=3", "--seeds", "0")
    run_experiment(command)
    assert "submitted 4 as job 2 and 3" in capsys.readouterr().err
    about = [[job.partition("-")[0] for job in jobs] for jobs in submissions(tmp_path).values()]
    assert about == [["phi", "base", "dropout"], ["metaperturb"]]
    signal = f"signal=USR1@{cluster.SAVING}"
    for words in ("array=0-2%2", "gpus-per-node=1", "partition=gpu", "time=1:00:00", "requeue", signal):
        assert f"#SBATCH --{words}\n" in (slurm / "script-2").read_text()
    assert "dependency" not in (slurm / "script-2").read_text()
    assert "#SBATCH --dependency=afterok:2_0\n" in (slurm / "script-3").read_text()
    run_experiment(command)
    assert "4 are in the queue already" in capsys.readouterr().err
    # Another seed of what needs the same φ, on a device that is not here.
    more = parsed(path, tmp_path, "--slurm", "--rows", "MetaPerturb", "--devices", "7")
    run_experiment(more)
    assert "2 are in the queue already" in capsys.readouterr().err
    assert "#SBATCH --dependency=afterok:2_0\n" in (slurm / "script-4").read_text()
    assert not (slurm / "script-5").exists()


def test_what_a_killed_command_had_not_submitted_the_next_one_does(slurm, path, tmp_path, capsys, monkeypatch):
    command, make_executor = parsed(path, tmp_path, "--slurm", "--seeds", "0"), cluster.make_executor
    with monkeypatch.context() as killed:
        killed.setattr(cluster, "make_executor", lambda *how: sys.exit("killed") if how[-1] else make_executor(*how))
        with pytest.raises(SystemExit):
            run_experiment(command)
    (folder,) = submissions(tmp_path)
    with cluster.hold(folder.parent / ".lock"):
        refused("another command submits these just now", run_experiment, command)
    capsys.readouterr()
    run_experiment(command)
    said = capsys.readouterr().err
    assert "3 are in the queue already" in said and "submitted 1 as job 3" in said
    assert "#SBATCH --dependency=afterok:2_0\n" in (slurm / "script-3").read_text()


@pytest.mark.parametrize(
    ("program", "words", "said"),
    [
        ("sbatch", "sbatch: error: invalid partition specified: nope", "invalid partition specified: nope; nothing"),
        ("squeue", "slurm_load_jobs error: Unable to contact slurm controller", "Unable to contact slurm controller"),
    ],
)
def test_what_slurm_refuses_is_a_sentence_and_nothing_is_lost(slurm, path, tmp_path, capsys, program, words, said):
    command = parsed(path, tmp_path, "--slurm", "partition=nope", "--seeds", "0")
    if program == "squeue":  # which is asked once something was submitted
        run_experiment(command)
    refuses = slurm / f"refuses-{program}"
    refuses.write_text(words)
    assert said in refusal(run_experiment, command)
    refuses.unlink()
    capsys.readouterr()
    run_experiment(command)
    assert ("in the queue already" if program == "squeue" else "submitted 4 as job") in capsys.readouterr().err
    assert len((slurm / "queue").read_text().splitlines()) == 4


def test_without_slurm_or_submitit_it_is_said(path, tmp_path, monkeypatch, slurm):
    command = parsed(path, tmp_path, "--slurm", "--seeds", "0")
    monkeypatch.setitem(sys.modules, "submitit", None)
    refused(r"--slurm needs submitit: .*python.* -m pip install submitit", run_experiment, command)
    monkeypatch.setenv("PATH", "/nowhere")
    refused("there is no sbatch here; run this on a login node", run_experiment, command)
    assert not (tmp_path / "runs").exists()


def test_status_is_what_slurm_and_the_folders_say(slurm, path, tmp_path, capsys):
    run_experiment(parsed(path, tmp_path, "--status"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [["to", "do"]] * 7  # φ and six cells; Slurm is not asked
    assert lines[-1] == "small paper: 0 done, 0 running, 0 waiting, 0 failed, 7 to do; time left not known yet"
    assert not (slurm / "said").exists()
    run_experiment(parsed(path, tmp_path, "--slurm", "--seeds", "0"))
    base, meta = (Grid(path).cell(row, "Bugs", 0).id for row in ("Base", "MetaPerturb"))
    run_dir = tmp_path / "runs" / "small" / "paper" / base
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text('{"step": 2, "seconds": 10.0}\n')
    # φ failed, which cancelled what needs it.
    _, running, waiting, _ = (slurm / "queue").read_text().splitlines()
    running = running.replace("PENDING|Priority|", "RUNNING|None|n0")
    (slurm / "queue").write_text(running + "\n" + waiting.replace("Priority", "PartitionTimeLimit"))
    folder, _ = submissions(tmp_path)
    (folder / "2_0_0_log.out").write_text("error: no luck\nsrun: error: n0: task 0: Exited with exit code 1\n")
    capsys.readouterr()
    run_experiment(parsed(path, tmp_path, "--status", "--seeds", "0"))
    first, second, third, fourth, last = capsys.readouterr().out.splitlines()
    assert first.startswith("failed  phi-") and f": no luck (log: {folder / '2_0_0_log.out'})" in first
    assert second == f"running {base}: step 2 of 6 (job 2_1 on n0)"
    assert third.startswith(f"failed  {meta}: not run, because phi-") and third.endswith(" failed or was cancelled")
    assert "waiting dropout--" in fourth and "PartitionTimeLimit (job 2_2); it may never start so: scancel it" in fourth
    # 4 steps of Base and 6 of Dropout at 5 s
    assert last == "small paper: 0 done, 1 running, 1 waiting, 2 failed; about 00:50 left, 1 at a time"
    run_experiment(parsed(path, tmp_path, "--slurm", "--seeds", "0"))
    assert [*submissions(tmp_path).values()][-2:] == [[first.split()[1].strip(":")], [meta]]


def src(tmp_path: Path, source_settings: list[str], *words: str) -> int:
    return make_tables.main(["src", "--set", *source_settings, f"run_dir={tmp_path / 'src'}", *words])


def test_a_meta_training_asks_for_no_more_than_its_tasks_keep_busy(slurm, source_settings, tmp_path, capsys):
    for said in ("5 tasks keep 2 GPUs of a node busy: asking for gpus=2", "1 are in the queue already"):
        assert src(tmp_path, source_settings, "--slurm", "nodes=2", "gpus=8", "steps=7") == 0
        assert said in capsys.readouterr().err
    assert all(f"#SBATCH --{words}=2\n" in (slurm / "script-2").read_text() for words in ("nodes", "gpus-per-node"))
    settings = (tmp_path / "slurm" / "src" / "settings.yaml").read_text()
    assert "gpus: 0,1\n" in settings and "steps: 7\n" in settings
    assert src(tmp_path, source_settings, "--slurm", "nodes=6") == 1
    assert "--slurm nodes=6: there are 5 tasks, and each node needs one" in capsys.readouterr().err
    assert src(tmp_path, source_settings, "steps=7", "--status") == 0
    assert "waiting src: Slurm says Priority (job 2)" in capsys.readouterr().out


def test_what_is_wrong_with_a_word_or_a_node_is_a_sentence(slurm, monkeypatch, tmp_path):
    refused("--slurm gpus=one: expected a whole number", cluster.parse_options, ["gpus=one"])
    refused("--slurm partition: expected KEY=VALUE", cluster.parse_options, ["partition"])
    monkeypatch.setattr(cluster, "SHARED_FOLDER_SECONDS", 0)
    said = "is not there, though what makes it is done; do all nodes see"
    refused(said, cluster.wait_for, tmp_path / "result.json")
    (slurm / "scontrol").write_text("#!/bin/sh\necho n0\n")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n0")
    monkeypatch.setattr(cluster.signal, "signal", lambda *_: None)  # of this process
    with pytest.raises(SystemExit, match=r"error: 2 nodes were asked for, job 7 has 1: n0"):
        cluster.one_node(["2", "-m", "metaperturb.meta_train"])
