"""Where a result comes from: versions, code and hardware."""

import hashlib
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch


def provenance(device: torch.device) -> dict[str, Any]:
    """Versions, commit and hardware."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # a subclass of str otherwise, which weights_only refuses
            "torchvision": version("torchvision"),
            "numpy": np.__version__,
        },
        "commit": commit(),
        "code": code_digest(),
        "hardware": {"device": gpu or "cpu", "cpu": _cpu_name(), "cores": available_cores()},
    }


def code_digest() -> str:
    """Identifies the code that computes results, in a checkout or installed: 12 hex digits of its source files.

    What only draws or measures finished runs, `plots.py` and `analyses/`, does not enter.
    """
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(p for p in here.rglob("*") if p.suffix in (".py", ".cpp")):
        name = path.relative_to(here)
        if name.parts[0] not in ("plots.py", "analyses"):
            digest.update(f"{name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def commit() -> str | None:
    """The commit of this source tree, `+` appended if it has uncommitted changes; None outside a checkout."""
    here = str(Path(__file__).parent)

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", here, *command], capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)
        head = git("rev-parse", "--short=12", "HEAD")
        return head + "+" * bool(git("status", "--porcelain", "-uno", "--", here))
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    about = Path("/proc/cpuinfo")  # of Linux
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def available_cores() -> int:
    """How many cores this process may run on: all of the machine's, or those that a scheduler has left it."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1
