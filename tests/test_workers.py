"""What several tests share is made once: xdist gives tests of one group to one worker."""

import subprocess
import sys

TESTS = """
import os, pathlib
import pytest

@pytest.mark.xdist_group("one group")
@pytest.mark.parametrize("n", range(6))
def test_in_one_worker(n):
    with pathlib.Path("workers").open("a") as file:
        print(os.environ["PYTEST_XDIST_WORKER"], file=file)
"""


def test_a_group_runs_in_one_worker(tmp_path):
    """pytest 9.2 and pytest-xdist 3.8 do not agree on it, and say nothing."""
    tmp_path.joinpath("test_group.py").write_text(TESTS)
    tmp_path.joinpath("pytest.ini").write_text("[pytest]")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    workers = tmp_path.joinpath("workers").read_text().split()
    assert len(workers) == 6
    assert len(set(workers)) == 1
