"""All that is worth running on a machine with a GPU, within minutes, into one folder.

    python bench/gpu.py --out runs/gpu

First, side by side, since most of the time kernels are compiled: the gpu tests in several shares,
`fastnorm verify --quick`, and compute-sanitizer's memcheck and racecheck over a small case of each
kernel. Then, alone, `fastnorm bench --quick`. Each step has a limit and a log of its own; one that
fails or runs out of time does not keep the others from running. Nothing is installed and nothing is
downloaded: what is missing is named. `summary.json` says how each step ended.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS_LIMIT, SANITIZER_LIMIT, BENCH_LIMIT = 290, 290, 240  # seconds


@dataclass(frozen=True)
class Step:
    """A command and how long it may take; `missing` says why it is not run."""

    name: str
    command: tuple[str, ...] = ()
    limit: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""


@dataclass(frozen=True)
class Ending:
    """How a step ended: "passed", "failed", "out of time" or "left out: …"."""

    name: str
    ending: str
    seconds: float = 0.0


def together(out: Path, shares: int) -> list[Step]:
    """The steps that run side by side."""
    python = sys.executable
    absent = "" if importlib.util.find_spec("pytest") else "pytest is not installed"
    steps = [
        Step(
            f"tests-{share}",
            (
                *(python, "-m", "pytest", "-p", "shard", "-m", "gpu and not slow", "-q"),
                # of the command line, which may need an extra, only what is run beside the tests
                "--ignore-glob=*/test_cli_*.py",
                *("-p", "no:cacheprovider", f"--junitxml={out / f'tests-{share}.xml'}", "tests"),
            ),
            TESTS_LIMIT,
            {"FASTNORM_SHARD": f"{share}/{shares}"},
            absent,
        )
        for share in range(shares)
    ]
    verify = (python, "-m", "fastnorm", "verify", "--quick", "--out", str(out / "verify"))
    return [*steps, Step("verify", verify, TESTS_LIMIT), *_sanitizers(python)]


def _sanitizers(python: str) -> list[Step]:
    found = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    tools = ("memcheck", "racecheck")
    if found is None:
        return [Step(tool, missing="compute-sanitizer is not installed") for tool in tools]
    return [
        Step(
            tool,
            (found, "--tool", tool, "--error-exitcode", "1", python, "bench/sanitize.py"),
            SANITIZER_LIMIT,
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # an allocation each: bounds are seen
        )
        for tool in tools
    ]


def alone(out: Path) -> list[Step]:
    """The step that needs the GPU to itself."""
    command = (sys.executable, "-m", "fastnorm", "bench", "--quick", "--out")
    return [Step("bench", (*command, str(out / "bench")), BENCH_LIMIT)]


def run(steps: Sequence[Step], out: Path) -> list[Ending]:
    """Run the steps side by side, each into its own log."""
    endings = [Ending(step.name, f"left out: {step.missing}") for step in steps if step.missing]
    start = time.monotonic()
    running = []
    for step in steps:
        if not step.missing:
            with (out / f"{step.name}.log").open("w") as log:
                process = subprocess.Popen(
                    step.command,
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": _path(), **step.environment},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            running.append((step, process))
    for step, process in running:
        left = start + step.limit - time.monotonic()
        try:
            status = process.wait(max(left, 0.1))
            ending = "passed" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            _stop(process)
            ending = f"out of time after {step.limit} s"
        endings.append(Ending(step.name, ending, round(time.monotonic() - start, 1)))
        print(f"{step.name}: {ending}", flush=True)
    return endings


def _path() -> str:
    """The source tree, whether it is installed or not."""
    inherited = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "bench"), inherited)))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does, so that pytest writes what it knows; then for good."""
    for number, patience in ((signal.SIGINT, 15), (signal.SIGKILL, 15)):
        os.killpg(process.pid, number)
        try:
            process.wait(patience)
            return
        except subprocess.TimeoutExpired:
            continue


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="a new folder")
    parser.add_argument(
        "--shares",
        type=int,
        default=max(1, (os.cpu_count() or 2) - 6),  # verify and the sanitizers have some too
        help="processes that divide the tests",
    )
    options = parser.parse_args(arguments)
    out: Path = options.out.resolve()
    if out.exists() and any(out.iterdir()):
        parser.error(f"argument --out: {out} has files in it")
    out.mkdir(parents=True, exist_ok=True)
    with (out / "doctor.txt").open("w") as log:
        doctor = (sys.executable, "-m", "fastnorm", "doctor")
        environment = {**os.environ, "PYTHONPATH": _path()}
        subprocess.run(doctor, cwd=ROOT, env=environment, stdout=log, check=False)
    endings = run(together(out, options.shares), out) + run(alone(out), out)
    summary = json.dumps([asdict(ending) for ending in endings], indent=2)
    (out / "summary.json").write_text(summary + "\n")
    print(f"results in {out}")
    good = ("passed", "left out")
    return int(not all(ending.ending.startswith(good) for ending in endings))


if __name__ == "__main__":
    sys.exit(main())
