"""Slurm for real: a controller and two node daemons on this machine."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, wait_for
from grid_files import write_grid
from test_experiments import CELLS, CPU

import metaperturb.meta_train as program
from metaperturb.weights import load_phi

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),  # a minute each, but for what else keeps the machine busy
    pytest.mark.skipif(
        not all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch", "setpriv"))),
        reason="needs Slurm's daemons (on Debian: apt install slurm-wlm munge)",
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons need root"),
]
pytest.importorskip("submitit", reason="needs submitit: pip install submitit")

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=1,bf_interval=1,requeue_delay=1
ReturnToService=2
SlurmdTimeout=8
KillWait=5
MailProg=/bin/true
NodeName=n0 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[1]} CPUs=2
NodeName=n1 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[2]} CPUs=2
PartitionName=main Nodes=n0,n1 Default=YES MaxTime=60 State=UP
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


class Cluster:
    """Daemons of Slurm in the foreground, so that they end with this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen] = {}
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=socket.gethostname(), ports=free_ports(3)))
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        files = [f"--{option}={folder / name}" for option, name in files.items()]
        self.start("munged", "munged", "--foreground", "--force", *files)
        wait_for((folder / "munge.socket").exists, 60)
        self.start("slurmctld", "slurmctld", "-D", "-c")
        for node in ("n0", "n1"):
            self.start(node, "slurmd", "-D", "-N", node)
        wait_for(lambda: self.say("sinfo", "-h", "-o", "%D %t") == "2 idle", 60)

    def start(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.out", "ab") as log:
            command = ("setpriv", "--pdeathsig", "KILL", *command)  # also where this process is killed
            self.daemons[name] = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def say(self, *command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    def queue(self) -> list[str]:
        return self.say("squeue", "--noheader", "--array", "--format", "%i %T %r %N").splitlines()

    def lose(self, node: str) -> None:
        """The node and all that runs on it, at once."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"SLURMD_NODENAME={node}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    os.kill(int(folder.name), signal.SIGKILL)

    def close(self) -> None:
        self.say("scancel", "--user", "root")
        for daemon in reversed(self.daemons.values()):
            daemon.kill()
            daemon.wait()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Cluster]:
    before = os.environ.copy()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.close()
    os.environ.clear()
    os.environ.update(before)


def tables(*words: object) -> subprocess.CompletedProcess:
    """make_tables.py, as run.sh calls it."""
    command = [sys.executable, str(ROOT / "scripts" / "make_tables.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})


def test_an_array_of_cells_is_stopped_requeued_and_the_same_to_the_bit(slurm, tmp_path, image_folder):
    text = CELLS.replace("IMAGES", str(image_folder))
    text += "  six: {rows: [Base, MetaPerturb, Dropout], set: {steps: 800}}"  # long enough to be stopped on the way
    text = text.replace("checkpoint_every: 2,", "checkpoint_every: 1000,")  # it is saved only because it is asked to
    path = write_grid(tmp_path / "configs", text)

    def table(name: str, *more: str) -> str:
        folders = [f"--{key}={tmp_path / name / key}" for key in ("results", "runs")]
        done = tables("table", path, "--preset", "six", *folders, "--data-root", tmp_path / "data", *CPU, *more)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert "submitted 7 as job " in table("a", "--slurm", "array=3")
    assert "submitted" not in table("a", "--slurm", "array=3")  # on a busy machine some are done by now
    assert sum(" Dependency" in line for line in slurm.queue()) in (0, 2)  # MetaPerturb's, as long as there is no φ
    (log,) = wait_for(lambda: [*(tmp_path / "a" / "runs" / "small" / "six").glob("base--*--seed0--*/log.txt")])
    wait_for(lambda: "step" in log.read_text(), 600)
    folder = tmp_path / "a" / "runs" / "slurm" / "small" / "six"
    (jobs,) = [file for file in folder.glob("*/jobs.json") if log.parent.name in file.read_text()]
    number = slurm.say("squeue", "--noheader", "--name", jobs.parent.name, "--format", "%F").split()[0]
    task = f"{number}_{json.loads(jobs.read_text()).index(log.parent.name)}"
    slurm.say("scancel", "--signal=TERM", task)
    status = table("a", "--status")
    assert " (job " in status and "small six: " in status
    wait_for(lambda: not slurm.queue(), 600)
    assert "SIGTERM: saving" in log.read_text() and "resuming after step" in log.read_text()
    batch = (jobs.parent / f"{task}_0_log.out").read_text()
    assert "stopped and saved; back into the queue" in batch
    assert "small six: 6 done" in table("a", "--status") and "Dropout" in table("a", "--slurm")  # the page
    table("b", "--rows", "Base")
    found = {
        name: {p.name: json.loads(p.read_text())["metrics"] for p in (tmp_path / name / "results").glob("*/*/*.json")}
        for name in ("a", "b")
    }
    assert len(found["a"]) == 6 and len(found["b"]) == 2
    assert found["b"].items() <= found["a"].items()


def test_a_meta_training_on_two_nodes_goes_on_when_one_is_lost(slurm, tmp_path, source_settings):
    settings = [*source_settings, "steps=150", "gpus=cpu"]
    settings.remove("checkpoint_every=2")
    words = ("src", "--set", *settings, "checkpoint_every=10", f"run_dir={tmp_path / 'src'}")
    submitted = tables(*words, "--slurm", "nodes=1-2")
    assert "submitted 1 as job" in submitted.stderr, submitted.stderr
    latest = tmp_path / "src" / "checkpoints" / "latest.json"
    wait_for(latest.exists, 600)
    assert slurm.queue()[0].endswith(" RUNNING None n[0-1]")
    slurm.lose("n1")
    wait_for(lambda: (tmp_path / "src" / "result.json").exists(), 600)
    slurm.start("n1", "slurmd", "-D", "-N", "n1")
    logs = [path.read_text() for path in (tmp_path / "slurm" / "src").glob("*/*.out")]
    assert "resuming after step" in "".join(logs)
    assert json.loads((tmp_path / "src" / "result.json").read_text())["processes"] == 1
    assert program.main(["--set", *settings, f"run_dir={tmp_path / 'one'}"]) == 0
    assert torch.equal(load_phi(tmp_path / "src" / "phi.pt").flat, load_phi(tmp_path / "one" / "phi.pt").flat)
    assert "src: 1 done" in tables(*words, "--status").stdout
