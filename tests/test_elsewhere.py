"""Nothing is made on the CPU, and the host waits for nothing, where tensors are on a GPU."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_operation_stays_on_the_device_of_its_input():
    """In a process of its own: there nothing is interpreted."""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'bench'}", "PATH": ""}
    command = [sys.executable, ROOT / "tests" / "elsewhere.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    cases, launches = map(int, done.stdout.split())
    assert launches > 2 * cases > 1000
