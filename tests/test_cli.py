"""How programs start, stop and write files."""

import os
import platform
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from metaperturb.cli import Stop, Stopped, run_program
from metaperturb.storage import write_atomically

PAGES = """
import resource, torch
from metaperturb.cli import run_program

def pages():
    for twice in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(24, 1024, 1024)  # 96 MB: glibc's own limit is 32
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

pages()
run_program(pages, show_traceback=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_program_touches_new_memory_once_a_library_as_its_user_wants():
    printed = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True).stdout
    library, program = map(int, printed.split())
    assert library > 400 and program < 100  # 96 MB each time, in pages of 4 kB or of 2 MB


def test_writers_in_two_containers_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    """There every program may be process 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path, meeting = tmp_path / "page.md", threading.Barrier(2)

    def write(text: bytes) -> None:
        def halves(file) -> None:
            file.write(text[:5])
            meeting.wait()
            file.write(text[5:])

        write_atomically(path, halves)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, (b"A" * 10, b"B" * 10)))
    assert path.read_bytes() in (b"A" * 10, b"B" * 10)
    assert list(tmp_path.iterdir()) == [path]


def test_a_second_signal_ends_at_once():
    """But not one that comes within a second: terminal, scheduler and launcher may each pass on the same."""
    with pytest.raises(Stopped) as stopped, Stop() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.number == signal.SIGTERM
        stop.since -= 2.0
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")
    assert stopped.value.number == signal.SIGINT


@pytest.mark.parametrize("kind", ["closed pipe", "full disk", "closed"])
def test_a_report_that_nobody_takes_does_not_end_the_work(kind, monkeypatch, capsys):
    """As in `./run.sh … | head -1`."""
    if kind == "full disk":
        stream = open("/dev/full", "w")  # noqa: SIM115
    else:
        read, write = os.pipe()
        os.close(read)
        stream = os.fdopen(write, "w") if kind == "closed pipe" else None
    monkeypatch.setattr(sys, "stdout", stream)
    done = []

    def work() -> None:
        for step in range(3):
            print("x" * 20_000, flush=True)
            done.append(step)

    assert run_program(work, show_traceback=True) == 0
    assert done == [0, 1, 2] and sys.stdout is stream and not capsys.readouterr().err


@pytest.mark.parametrize("resumes", [True, False])
def test_a_program_promises_to_resume_only_if_it_can(resumes, capsys):
    assert run_program(lambda: signal.raise_signal(signal.SIGINT), show_traceback=False, resumes=resumes) == 130
    assert ("goes on with what is saved" in capsys.readouterr().err) == resumes
