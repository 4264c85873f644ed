"""All that is worth running on a machine with a GPU, within minutes, into one folder.

    python bench/gpu.py --out runs/gpu
    python bench/gpu.py --out runs/gpu-tests --steps tests --pack tests.tar.gz

First, side by side, since most of the time kernels are compiled: the gpu tests in several shares,
`fastnorm verify --quick` of both backends, and compute-sanitizer's memcheck and racecheck over a
small case of each kernel. Then, alone, `fastnorm bench --quick`. All of it ends within `--limit`
seconds: verify and bench begin nothing new when their share of them is over, and write what they
have; what runs on is interrupted. A step that fails or runs out of time keeps no other from
running. Nothing is installed and nothing is downloaded: what is missing is named. `summary.json`
says how each step ended, and is written anew, as is the archive of `--pack`, whenever one has.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS = ("tests", "verify", "sanitize", "bench")
LIMIT = 560  # seconds
BENCH_SHARE = 0.45  # of them, where there are other steps
PATIENCE = 15  # seconds that an interrupted step has to write what it knows
FINISHING = 30  # seconds that verify and bench have for their reports
PACKAGES = ("torch", "triton", "pytest", "hypothesis", "liger-kernel", "numpy")


@dataclass(frozen=True)
class Step:
    """A command and how long it may take; `missing` says why it is not run."""

    name: str
    command: tuple[str, ...] = ()
    limit: float = 0
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""


@dataclass(frozen=True)
class Ending:
    """How a step ended: "passed", "failed", "out of time" or "left out: …"."""

    name: str
    ending: str
    seconds: float = 0.0


def together(out: Path, shares: int, limit: float, steps: Sequence[str] = STEPS) -> list[Step]:
    """The steps that run side by side, those of `steps`."""
    python = sys.executable
    absent = "" if importlib.util.find_spec("pytest") else "pytest is not installed"
    made = {
        "tests": [
            Step(
                f"tests-{share}",
                (
                    *(python, "-m", "pytest", "-p", "shard", "-m", "gpu and not slow", "-v"),
                    # of the command line, which may need an extra, only what is run beside them
                    *("--ignore-glob=*/test_cli_*.py", "--tb=short", "-p", "no:cacheprovider"),
                    *(f"--junitxml={out / f'tests-{share}.xml'}", "tests"),
                ),
                limit,
                # of a machine's other plugins none is asked for, and their warnings are errors
                {"FASTNORM_SHARD": f"{share}/{shares}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
                absent,
            )
            for share in range(shares)
        ],
        "verify": [
            Step(name, (*_command("verify", out / name, limit), *options), limit)
            for name, options in {
                "verify": (),
                "verify-eager": ("--backend", "eager", "--jobs", "2"),  # nothing is compiled
            }.items()
        ],
        "sanitize": _sanitizers(python, limit),
    }
    return [step for name, found in made.items() if name in steps for step in found]


def _sanitizers(python: str, limit: float) -> list[Step]:
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
            limit,
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # an allocation each: bounds are seen
        )
        for tool in tools
    ]


def alone(out: Path, limit: float, steps: Sequence[str] = STEPS) -> list[Step]:
    """The step that needs the GPU to itself."""
    return [Step("bench", _command("bench", out / "bench", limit), limit)] * ("bench" in steps)


def _command(name: str, out: Path, limit: float) -> tuple[str, ...]:
    """A command of fastnorm's that ends by itself before it is interrupted."""
    seconds = str(max(int(limit) - FINISHING, 1))
    command = (sys.executable, "-m", "fastnorm", name, "--quick", "--limit", seconds)
    return (*command, "--out", str(out))


def run(steps: Sequence[Step], out: Path) -> Iterator[Ending]:
    """Run the steps side by side, each into its own log, and tell of each when it has ended."""
    running: dict[str, tuple[Step, subprocess.Popen[bytes]]] = {}
    start = time.monotonic()
    for step in steps:
        if step.missing:
            yield Ending(step.name, f"left out: {step.missing}")
            continue
        with (out / f"{step.name}.log").open("w") as log:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env={**_environment(), **step.environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        running[step.name] = step, process
    late: set[str] = set()
    try:
        while running:
            time.sleep(0.1)
            now = time.monotonic() - start
            for name, (step, process) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    yield Ending(step.name, _ending(step, process.returncode, now), round(now, 1))
                elif now > step.limit + PATIENCE:
                    os.killpg(process.pid, signal.SIGKILL)
                elif now > step.limit and name not in late:
                    late.add(name)
                    # as Ctrl-C, so that pytest writes what it knows
                    os.killpg(process.pid, signal.SIGINT)
    finally:
        for _, process in running.values():
            os.killpg(process.pid, signal.SIGKILL)


def _ending(step: Step, status: int, seconds: float) -> str:
    if seconds > step.limit:
        return f"out of time after {step.limit:.0f} s"
    return "passed" if status == 0 else f"failed with status {status}"


def _environment() -> dict[str, str]:
    """The source tree, whether it is installed or not; what is printed is seen at once."""
    inherited = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "bench"), inherited)))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _doctor(out: Path) -> None:
    command = (sys.executable, "-m", "fastnorm", "doctor")
    with (out / "doctor.txt").open("w") as log:
        try:
            subprocess.run(
                command, cwd=ROOT, env=_environment(), stdout=log, stderr=log, timeout=60
            )
        except subprocess.TimeoutExpired:
            log.write("out of time\n")


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _write(out: Path, endings: Sequence[Ending], pack: Path | None) -> None:
    """`summary.json`, then the archive of the folder, each complete at any time."""
    summary = {"versions": _versions(), "steps": [asdict(ending) for ending in endings]}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    if pack is not None:
        partial = pack.with_name(f".{pack.name}")
        with tarfile.open(partial, "w:gz") as archive:
            archive.add(out, out.name)
        partial.replace(pack)


def _steps(text: str) -> tuple[str, ...]:
    steps = tuple(text.split(","))
    if unknown := [step for step in steps if step not in STEPS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(STEPS)}")
    return steps


def _phases(out: Path, steps: Sequence[str], shares: int, limit: float) -> Iterator[list[Step]]:
    """What runs side by side, then what runs alone, within `limit` seconds together."""
    others = any(step != "bench" for step in steps)
    bench = (BENCH_SHARE if others else 1.0) * limit * ("bench" in steps)
    if others:
        yield together(out, shares, limit - bench - PATIENCE, steps)
    if bench:
        yield alone(out, bench - PATIENCE, steps)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="a new folder")
    parser.add_argument(
        "--steps", type=_steps, default=STEPS, help=f"some of {','.join(STEPS)} (default: all)"
    )
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help=f"seconds for all of it (default: {LIMIT})"
    )
    parser.add_argument("--pack", type=Path, help="an archive of the folder, .tar.gz")
    parser.add_argument(
        "--shares",
        type=int,
        help="processes that divide the tests (default: a processor each; fewer beside others)",
    )
    options = parser.parse_args(arguments)
    spared = 6 if {"verify", "sanitize"} & {*options.steps} else 0
    shares = options.shares or max(1, (os.cpu_count() or 2) - spared)
    out: Path = options.out.resolve()
    if out.exists() and any(out.iterdir()):
        parser.error(f"argument --out: {out} has files in it")
    out.mkdir(parents=True, exist_ok=True)
    pack = None if options.pack is None else options.pack.resolve()
    if pack is not None:
        pack.parent.mkdir(parents=True, exist_ok=True)
    # in the background a shell has it ignored, here and in every process that is started
    signal.signal(signal.SIGINT, signal.default_int_handler)
    start = time.monotonic()
    _doctor(out)
    endings: list[Ending] = []
    limit = options.limit - (time.monotonic() - start)
    for phase in _phases(out, options.steps, shares, limit):
        for ending in run(phase, out):
            print(f"{ending.name}: {ending.ending} ({ending.seconds} s)", flush=True)
            endings.append(ending)
            _write(out, endings, pack)
    print(f"results in {out}")
    good = ("passed", "left out")
    return int(not all(ending.ending.startswith(good) for ending in endings))


if __name__ == "__main__":
    sys.exit(main())
