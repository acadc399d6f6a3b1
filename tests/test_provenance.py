"""Where a result comes from: the code, and the cores that it had."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

import metaperturb
from metaperturb.provenance import available_cores, code_digest


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_cores_are_those_that_a_scheduler_leaves(monkeypatch):
    all_of_them = os.sched_getaffinity(0)
    assert available_cores() == len(all_of_them)
    try:
        os.sched_setaffinity(0, {min(all_of_them)})
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, all_of_them)
    monkeypatch.delattr(os, "sched_getaffinity")  # as on other systems
    assert available_cores() == os.cpu_count()


def test_the_digest_is_that_of_the_sources_wherever_they_lie(tmp_path):
    copy = tmp_path / "metaperturb"
    shutil.copytree(Path(metaperturb.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    spec = importlib.util.spec_from_file_location("provenance_of_the_copy", copy / "provenance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.code_digest() == code_digest()
    (copy / "analyses" / "surface.py").write_text("# of finished runs")
    assert module.code_digest() == code_digest()
    with open(copy / "kernels" / "site.cpp", "a") as file:
        file.write("// changed\n")
    assert module.code_digest() != code_digest()
