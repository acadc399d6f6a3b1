"""How programs start: what they do with memory that is freed."""

import platform
import subprocess
import sys

import pytest

PAGES = """
import resource, sys
import torch
from metaperturb.cli import run_program

def pages():
    for _ in range(10):
        torch.ones(24, 1024, 1024)  # 96 MB: glibc's own limit is 32
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(24, 1024, 1024)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

run_program(pages, show_traceback=True) if sys.argv[1] == "program" else pages()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_program_touches_new_memory_once_a_library_as_its_user_wants():
    def new_pages(how: str) -> int:
        command = [sys.executable, "-c", PAGES, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert new_pages("program") < 100
    assert new_pages("import") > 400  # 96 MB each time, in pages of 4 kB or of 2 MB
