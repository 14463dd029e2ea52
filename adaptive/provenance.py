"""Where figures come from: the command, commit, machine and versions that every file of results carries."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch


def provenance(*packages: str) -> dict:
    """Returns `command`, `commit`, `date`, `machine` and `versions` of this process, as plain JSON values.

    Args:
        *packages: names of distributions whose versions matter, beside torch, transformers and numpy.
    """
    git = "git describe --always --dirty --abbrev=40 --exclude='*'"
    commit = subprocess.run(git, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = (re.findall(r"model name\s*: (.*)", info) or [platform.processor()])[0]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy", *packages)}
    return {
        "command": " ".join(sys.argv),
        "commit": commit or None,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
        "versions": {"python": platform.python_version(), **versions},
    }
