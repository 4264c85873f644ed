"""What a result depends on beside its arguments: versions, and the machine."""

import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("fastnorm", "torch", "triton", "numpy", "scikit-learn", "matplotlib", "rich")


def versions() -> dict[str, str | None]:
    """The version of Python and of each package; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def describe(device: torch.device) -> dict[str, str | int]:
    """The device's type and name, the system, and how many threads torch uses."""
    cuda = device.type == "cuda"
    return {
        "device": str(device),
        "name": torch.cuda.get_device_name(device) if cuda else _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """The processor's name; `platform` knows it everywhere but on Linux."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
