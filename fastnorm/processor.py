"""What this machine's processor is."""

import functools
import platform
from pathlib import Path


@functools.cache
def facts() -> dict[str, str]:
    """What Linux tells of the first core: "vendor_id", "cpu family", "model name", …"""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:  # another system
        return {}
    lines = (line.partition(":") for line in told.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def name() -> str:
    """`platform` knows it everywhere but on Linux."""
    return facts().get("model name") or platform.processor() or platform.machine()
