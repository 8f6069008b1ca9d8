"""What a run ran in: versions, hardware, memory."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from forcetune._version import __version__

ENVIRONMENT_NAME = "environment.json"
_PACKAGES = (
    "torch",
    "mace-torch",
    "e3nn",
    "numpy",
    "ase",
    "matscipy",
    "schedulefree",
    "safetensors",
)


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware that a result may depend on; nothing that names the user or the machine."""
    facts: dict[str, Any] = {
        "forcetune": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
    }
    for package in _PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return facts


def _processor() -> str:
    if sys.platform.startswith("linux"):
        try:
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()


def process_peak_memory() -> int | None:
    """Largest resident memory of this process so far, bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest
