"""Trainings as jobs of Slurm, submitted through submitit.

    ./run.sh table1 --slurm partition=gpu gpus=1 time=8:00:00 array=64   # the cells that are not done, as job arrays
    ./run.sh src --slurm nodes=2 gpus=8                                  # one meta-training on two nodes, by torchrun
    ./run.sh table1 --status                                             # also: ./run.sh src --status

What Slurm has in its queue is asked of Slurm. Beside it there is one file for each submission, which says what its jobs
are about and is written before they are submitted: so nothing is submitted twice, whenever a command is killed.
"""

import argparse
import dataclasses
import getpass
import importlib.util
import os
import re
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tables.runner import SETTINGS, Job, last_line, run_jobs

from metaperturb import identity
from metaperturb.cli import argument_parser, pairs, run_program
from metaperturb.config import MetaTrainConfig, load_config
from metaperturb.errors import UserError
from metaperturb.meta_train import load_tasks
from metaperturb.runs import clock, read_metrics
from metaperturb.storage import hold, load_json, save_json, save_yaml

SCRIPTS = Path(__file__).resolve().parent
SAVING = 120  # seconds before its time is over that a job is asked to save
LONG_NAMES = {"gpus": "gpus-per-node", "cpus": "cpus-per-task"}  # ours → sbatch's; all others are sbatch's own
NEVER = ("Partition", "BadConstraints", "Account", "QOS", "Assoc", "Reservation", "Node")  # reasons not to start
# Behind the call in a job's script: what was asked to stop (128 + SIGTERM or SIGUSR1), and not cancelled, is requeued.
REQUEUE = """code=$?
if [[ $code = 143 || $code = 138 ]] && [ -n "$(squeue --noheader --jobs $SLURM_JOB_ID --states RUNNING)" ]; then
    echo "stopped and saved; back into the queue"
    scontrol requeue $SLURM_JOB_ID
fi
exit $code"""
SHARED_FOLDER_SECONDS = 60  # that a file may take to be seen on another node
RESTARTS = 100  # of the processes of a meta-training within one job, each from the last checkpoint
HEARTBEATS = 720  # of 5 s, that torchrun lets a node be silent, by the clocks of both: an hour


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--slurm` and `--status`."""
    parser.add_argument(
        "--slurm", nargs="*", metavar="KEY=VALUE",
        help="submit to Slurm instead: partition=… gpus=… (of a node) cpus=… time=… array=… (jobs at a time), or any "
        "other option of sbatch",
    )  # fmt: skip
    parser.add_argument("--status", action="store_true", help="say what is done, running, waiting, failed; run nothing")


def parse_options(words: Sequence[str]) -> dict[str, str]:
    """What `--slurm` was given."""
    options = pairs("--slurm", words, "KEY=VALUE")
    for key in ("gpus", "nodes", "array"):
        if not re.fullmatch(r"\d+-\d+|\d+" if key == "nodes" else r"\d+", options.get(key, "1")):
            raise UserError(f"--slurm {key}={options[key]}: expected a whole number")
    return options


# --- the queue


class Task(NamedTuple):
    """A job of ours that Slurm has in its queue: its number, state, the reason why it waits, and the node."""

    id: str
    state: str
    reason: str
    node: str


class Queue:
    """What was submitted for one table or meta-training: a folder of submissions, each with the jobs' logs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    def submissions(self) -> dict[Path, list[str]]:
        """Folder of each, the newest last → what its tasks are about, in their order."""
        files = sorted(self.folder.glob("*/jobs.json"), key=lambda file: file.stat().st_mtime_ns)
        return {file.parent: [*load_json(file)] for file in files}

    def tasks(self) -> dict[str, Task]:
        """What is in Slurm's queue, by what it is about."""
        about = {folder.name: jobs for folder, jobs in self.submissions().items()}
        options = ("--noheader", "--array", "--user", getpass.getuser(), "--format", "%i|%j|%T|%r|%N")
        found = {}
        for line in slurm("squeue", *options).splitlines() if about else ():
            id_, name, *rest = line.strip().split("|")
            if name in about:
                found[about[name][int(id_.partition("_")[2] or 0)]] = Task(id_, *rest)
        return found


def slurm(program: str, *arguments: str) -> str:
    """What a program of Slurm prints; a `UserError` says that it is not there, or refuses."""
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"--slurm: there is no {program} here; run this on a login node of the cluster") from None
    if done.returncode:
        raise UserError(f"{program}: {said_by_slurm(done.stderr)}")
    return done.stdout


def said_by_slurm(text: str) -> str:
    lines = [re.sub(r"^\w+: (error: )?", "", line.strip()) for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "failed without a word"


# --- submitting


def submit(queue: Queue, work: Sequence[tuple[Job, tuple[Any, ...]]], options: Mapping[str, str]) -> None:
    """Submit what is not in the queue, as one array what waits for the same jobs, and say so; or refuse.

    `work`: jobs, each with `one_job` or `one_node` and its arguments.
    """
    check_cluster()
    lock = hold(queue.folder / ".lock")
    if lock is None:
        raise UserError(f"{queue.folder}: another command submits these just now")
    with lock:
        ids = {job: task.id for job, task in queue.tasks().items()}
        new, arrays = [(job, call) for job, call in work if job.id not in ids], defaultdict(list)
        if len(new) < len(work):
            print(f"{len(work) - len(new)} are in the queue already", file=sys.stderr)
        there = ids.keys() | {job.id for job, _ in new}
        for job, call in new:
            arrays[tuple(need.id for need in job.needs if need.id in there)].append((job, call))
        numbers = []
        for needs, some in sorted(arrays.items()):  # first of what waits for nothing
            folder = queue.folder / f"metaperturb-{queue.folder.name}-{secrets.token_hex(4)}"
            share = len(some) / len(new)
            executor = make_executor(folder, options, share, [ids[need] for need in needs])
            save_json([job.id for job, _ in some], folder / "jobs.json")
            try:
                with executor.batch():
                    handles = [executor.submit(*call) for _, call in some]
            except Exception as error:  # of submitit
                shutil.rmtree(folder)
                what = f"only {', '.join(numbers)}" if numbers else "nothing"
                raise UserError(f"sbatch: {said_by_slurm(str(error))}; {what} was submitted") from error
            ids |= {job.id: handle.job_id for (job, _), handle in zip(some, handles, strict=True)}
            numbers.append(handles[0].job_id.partition("_")[0])
    if new:
        print(f"submitted {len(new)} as job {' and '.join(numbers)}; --status says how far they are", file=sys.stderr)


def check_cluster() -> None:
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError("--slurm: there is no sbatch here; run this on a login node of the cluster, or without --slurm")
    if importlib.util.find_spec("submitit") is None:
        raise UserError(f"--slurm needs submitit: {sys.executable} -m pip install submitit")


def make_executor(folder: Path, options: Mapping[str, str], share: float, after: Sequence[str]):
    """The one of submitit, with what every job of ours has; of the jobs at a time it gets a share."""
    import submitit

    executor = submitit.SlurmExecutor(folder)
    more = {LONG_NAMES.get(key, key): value for key, value in options.items() if key != "array" and value != "0"}
    more |= {"requeue": True, "kill-on-invalid-dep": "yes", "signal": f"USR1@{SAVING}"}
    more |= {"dependency": f"afterok:{':'.join(after)}"} if after else {}
    path = os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent / "src"), os.environ.get("PYTHONPATH", "")])
    executor.update_parameters(
        job_name=folder.name,
        time=None,  # the partition's, unless the options have it
        wckey=None,
        array_parallelism=max(1, int(share * int(options.get("array", 1000)))),
        stderr_to_stdout=True,
        setup=[f"export PYTHONPATH='{path}'"],
        teardown=REQUEUE.splitlines(),
        additional_parameters=more,
    )
    return executor


# --- on a node


def one_job(job: Job, device: str) -> None:
    """A job of a table, once what it needs is seen here."""

    def work() -> None:
        for need in job.needs:
            wait_for(need.record)
        if failed := run_jobs([dataclasses.replace(job, needs=())], [device], 1):
            raise UserError(failed[job.id])

    sys.exit(run_program(work, show_traceback=False))


def one_node(arguments: list[str]) -> None:
    """A node's share of a meta-training: how many nodes there must be, and torchrun's arguments."""
    # submitit would ignore both, and torchrun passes only the first one on.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    least, *arguments = arguments
    number = os.environ["SLURM_JOB_ID"]
    nodes = slurm("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    if len(nodes) < int(least):
        sys.exit(f"error: {least} nodes were asked for, job {number} has {len(nodes)}: {', '.join(nodes)}")
    address = re.search(r"\bNodeAddr=(\S+)", slurm("scontrol", "show", "node", nodes[0]))[1]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-id", number, "--nnodes", str(len(nodes))]
    meeting += ["--rdzv-endpoint", f"{address}:{20000 + int(number) % 10000}"]
    host = f"is_host={int(os.environ['SLURM_NODEID'] == '0')}"
    meeting += ["--rdzv-conf", f"{host},keep_alive_max_attempt={HEARTBEATS}"]
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException

    try:
        run.main([*meeting, *arguments])
    except SignalException as stop:  # its processes have saved
        sys.exit(128 + stop.sigval)


def wait_for(path: Path) -> None:
    """Until a file that another node has written is seen on this one, at most a minute."""
    end = time.monotonic() + SHARED_FOLDER_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            raise UserError(f"{path}: is not there, though what makes it is done; do all nodes see this folder?")
        time.sleep(1.0)


# --- how far it is


def tell_status(title: str, queue: Queue, jobs: Sequence[Job], finished: Sequence[str]) -> None:
    """A line for each job that is not done, and one for all, which counts the ids in `finished` as well."""
    tasks, submissions = queue.tasks(), queue.submissions()
    count, left = Counter(done=len(finished)), []
    for job in jobs:
        newest = [{"step": 0}, *read_metrics(job.run_dir)][-1]
        state, more = state_of(job, newest["step"], tasks.get(job.id), submissions)
        count[state] += 1
        if state != "done":
            print(f"{state:8}{job.id}{': ' if more else ''}{more}")
        if state not in ("done", "failed"):
            left.append((max(0, job.config.steps - newest["step"]), newest))
    told = ", ".join(f"{count[state]} {state}" for state in ("done", "running", "waiting", "failed"))
    told += f", {count['to do']} to do" if count["to do"] else ""
    told += f"; {time_left(left, max(1, count['running']))}" if left else ""
    print(f"{title}: {told}")


def state_of(job: Job, step: int, task: Task | None, submissions: Mapping[Path, list[str]]) -> tuple[str, str]:
    """Whether it is done, running, waiting, failed or to do, and what there is to say of that."""
    begun = f" (step {step} of {job.config.steps})" if step else ""
    if job.done:
        return "done", ""
    if task is not None and task.state in ("RUNNING", "COMPLETING", "CONFIGURING"):
        return "running", f"step {step} of {job.config.steps} (job {task.id} on {task.node})"
    if task is not None:
        never = "; it may never start so: scancel it, and submit it with other options"
        why = never if task.reason.startswith(NEVER) else ""
        return "waiting", f"Slurm says {task.reason} (job {task.id}){begun}{why}"
    about = [(folder, of) for folder, of in submissions.items() if job.id in of]
    if not about:
        return "to do", begun.strip()
    folder, ids = about[-1]
    index = f"_{ids.index(job.id)}" if len(ids) > 1 else ""
    if log := next(folder.glob(f"*{index}_0_log.out"), None):
        return "failed", f"{last_line(log)}{begun} (log: {log})"
    lost = [need.id for need in job.needs if any(need.id in of for of in submissions.values())]
    return "failed", f"not run, because {f'{lost[0]} failed or' if lost else 'it'} was cancelled"


def time_left(lines: Sequence[tuple[int, Mapping[str, Any]]], at_once: int) -> str:
    """Of steps that are left and the newest lines: by the pace of what has begun, if as many go on running as now."""
    pace = [line["seconds"] / line["step"] if line["step"] else None for _, line in lines]
    if not (known := [each for each in pace if each]):
        return "time left not known yet"
    usual = statistics.median(known)
    seconds = sum(steps * (own or usual) for (steps, _), own in zip(lines, pace, strict=True))
    return f"about {clock(seconds / at_once)} left, {at_once} at a time"


# --- ./run.sh src --slurm


def src_parser() -> argparse.ArgumentParser:
    parser = argument_parser(__doc__)
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="other settings")
    add_options(parser)
    return parser


def meta_train(arguments: argparse.Namespace) -> None:
    """Submit a meta-training, or say how far it is."""
    settings = {field.name for field in dataclasses.fields(MetaTrainConfig)} - {"gpus"}
    own = [word for word in arguments.slurm or () if word.partition("=")[0] in settings]
    options = parse_options([word for word in arguments.slurm or () if word not in own])
    config = load_config(MetaTrainConfig, arguments.config, [*arguments.set, *own])
    run_dir = Path(config.run_dir).absolute()
    job = Job(run_dir.name, "meta_train", config, record=run_dir / "result.json")
    queue = Queue(run_dir.parent / "slurm" / run_dir.name)
    if arguments.status:
        return tell_status(run_dir.name, queue, [job], [])
    least, _, most = options.get("nodes", "1").partition("-")  # nodes=1-2: with one, where there are not two
    nodes, gpus = int(most or least), int(options.get("gpus", 0))
    if nodes > config.tasks:
        raise UserError(f"--slurm nodes={nodes}: there are {config.tasks} tasks, and each node needs one")
    if gpus > (busy := config.tasks // nodes):
        print(f"{config.tasks} tasks keep {busy} GPUs of a node busy: asking for gpus={busy}", file=sys.stderr)
        gpus = busy
    if gpus:
        config = dataclasses.replace(config, gpus=",".join(map(str, range(gpus))))
        options["gpus"] = str(gpus)
    processes = config.gpus.count(",") + 1
    identity.check_folder(config, "meta_train")
    if job.done:
        print(f"{run_dir}: already finished", file=sys.stderr)
        return None
    load_tasks(config)  # whatever is wrong with the data is said now
    save_yaml(dataclasses.asdict(config), queue.folder / SETTINGS)
    call = [least, "--nproc-per-node", str(processes), "--max-restarts", str(RESTARTS)]
    call += ["-m", "metaperturb.meta_train", "--config", str(queue.folder / SETTINGS)]
    submit(queue, [(job, (one_node, call))], {"nodes": "1", **options})
    return None
