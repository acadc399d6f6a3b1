"""Where a result comes from: the code, and the cores that it had."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import metaperturb
from metaperturb.provenance import available_cores, code_digest


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_cores_are_those_that_a_scheduler_leaves():
    one = min(os.sched_getaffinity(0))
    code = "import os; from metaperturb.provenance import available_cores\n"
    code += f"os.sched_setaffinity(0, {{{one}}}); print(available_cores())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"
    assert available_cores() == len(os.sched_getaffinity(0))


def test_a_system_without_affinity_counts_its_cores(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert available_cores() == os.cpu_count()


def test_the_digest_is_that_of_the_sources_wherever_they_lie(tmp_path):
    copy = tmp_path / "metaperturb"
    shutil.copytree(Path(metaperturb.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))

    def digest() -> str:
        code = "from metaperturb.provenance import code_digest; print(code_digest())"
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    assert digest() == code_digest()
    with open(copy / "kernels" / "site.cpp", "a") as file:
        file.write("// changed\n")
    assert digest() != code_digest()
