"""What a result depends on beside its arguments: versions, and the machine."""

import platform
from importlib import metadata

import torch

from fastnorm import processor

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
        "name": torch.cuda.get_device_name(device) if cuda else processor.name(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }
