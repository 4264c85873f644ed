"""What `make gpu` runs: steps with limits, shares of the tests, and every kernel once."""

import importlib
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import gpu
import pytest
import shard
from gpu import Ending, Step

ROOT = Path(__file__).parents[1]


def python(name, code, limit=30, **more):
    return Step(name, (sys.executable, "-c", code), limit, **more)


def test_steps_end_as_they_end(tmp_path):
    steps = [
        python("good", "import fastnorm, os; print(os.environ['MINE'])", environment={"MINE": "7"}),
        python("bad", "import sys; sys.exit(3)"),
        python("slow", "import time; print('begun', flush=True); time.sleep(60)", limit=8),
        Step("absent", missing="it is not installed"),
    ]
    found = {ending.name: ending for ending in gpu.run(steps, tmp_path)}
    assert found["good"].ending == "passed"
    assert found["bad"].ending == "failed with status 3"
    assert found["slow"].ending == "out of time after 8 s"
    assert found["slow"].seconds < gpu.PATIENCE
    assert list(found)[-1] == "slow", "each is told of when it ends"
    assert found["absent"] == Ending("absent", "left out: it is not installed")
    assert (tmp_path / "good.log").read_text() == "7\n"
    assert "KeyboardInterrupt" in (tmp_path / "slow.log").read_text(), "it may write what it knows"


def test_the_folder_and_the_status(tmp_path, monkeypatch):
    steps = [Step("tests-0", missing="pytest is not installed"), python("verify", "print(1)")]
    monkeypatch.setattr(gpu, "together", lambda out, shares, limit, asked: steps)
    bench = python("bench", "print(2)")
    monkeypatch.setattr(gpu, "alone", lambda out, limit, asked: [bench])
    assert gpu.main(["--out", str(tmp_path / "a" / "out")]) == 0
    folder = tmp_path / "a" / "out"
    names = ["bench.log", "doctor.txt", "summary.json", "verify.log"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert "kernel cache" in (folder / "doctor.txt").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert [one["name"] for one in summary["steps"]] == ["tests-0", "verify", "bench"]
    assert summary["versions"]["torch"]
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--out", str(folder)])
    steps[1] = python("verify", "raise SystemExit(1)")
    assert gpu.main(["--out", str(tmp_path / "again")]) == 1


def test_what_has_ended_is_packed_when_the_rest_is_killed(tmp_path, monkeypatch):
    """A machine may end it all at once: then the archive holds what was there before."""
    out, pack = tmp_path / "out", tmp_path / "there" / "out.tar.gz"

    def ends(*_: object) -> list[Step]:
        with tarfile.open(pack) as archive:
            found.append((archive.getnames(), archive.extractfile("out/summary.json").read()))
        raise KeyboardInterrupt

    found: list[tuple[list[str], bytes]] = []
    monkeypatch.setattr(gpu, "together", lambda *_: [python("verify", "print(1)")])
    monkeypatch.setattr(gpu, "alone", ends)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--out", str(out), "--pack", str(pack)])
    ((names, summary),) = found
    assert sorted(names) == [*("out", "out/doctor.txt", "out/summary.json", "out/verify.log")]
    assert json.loads(summary)["steps"][0]["ending"] == "passed"


def test_a_step_is_interrupted_where_a_shell_has_that_ignored(tmp_path):
    """As of what it starts in the background."""
    code = (
        "import gpu, json, sys; from pathlib import Path\n"
        "slow = gpu.Step('slow', (sys.executable, '-c', 'import time; time.sleep(60)'), 1)\n"
        "gpu.together = lambda *_: [slow]\n"
        "gpu.main(['--out', sys.argv[1], '--steps', 'tests'])"
    )
    subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'bench'}"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        capture_output=True,
        timeout=60,
    )
    assert "KeyboardInterrupt" in (tmp_path / "slow.log").read_text()


def test_steps_are_commands_that_exist(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: None)
    phases = list(gpu._phases(tmp_path, gpu.STEPS, 3, gpu.LIMIT))
    steps = {step.name: step for phase in phases for step in phase}
    assert list(steps) == [
        *("tests-0", "tests-1", "tests-2", "verify", "verify-eager", "memcheck", "racecheck"),
        "bench",
    ]
    assert steps["racecheck"].missing == "compute-sanitizer is not installed"
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: "/bin/sanitizer")
    (race,) = gpu.together(tmp_path, 1, 100, ["sanitize"])[1:]
    assert race.command[:3] == ("/bin/sanitizer", "--tool", "racecheck")
    assert (ROOT / race.command[-1]).exists()
    for name in ("verify", "verify-eager", "bench"):
        _, _, _, command, *options = steps[name].command
        parser = importlib.import_module(f"fastnorm.cli.{command}").parser()
        given = parser.parse_args(options)
        assert given.quick
        assert 0 < given.limit < steps[name].limit


@pytest.mark.parametrize("steps", [gpu.STEPS, ("tests", "verify"), ("bench",)], ids=str)
def test_all_of_it_ends_in_time(tmp_path, steps):
    """The steps that were asked for, with what they have to end, and no others."""
    phases = list(gpu._phases(tmp_path, steps, 1, gpu.LIMIT))
    longest = sum(max(s.limit for s in phase if not s.missing) + gpu.PATIENCE for phase in phases)
    assert gpu.LIMIT - 1 < longest <= gpu.LIMIT < 600
    names = " ".join(step.name for phase in phases for step in phase)
    assert [name for name in ("tests", "verify", "bench") if name in names] == [
        name for name in ("tests", "verify", "bench") if name in steps
    ]


def test_an_unknown_step_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--out", str(tmp_path / "out"), "--steps", "tests,nothing"])
    assert "'nothing' is none of tests, verify, sanitize, bench" in capsys.readouterr().err


def test_shares_are_everything_once(monkeypatch):
    class Hook:
        def pytest_deselected(self, items):
            dropped.append(len(items))

    class Config:
        hook = Hook()

    dropped, seen = [], []
    for share in range(3):
        monkeypatch.setenv("FASTNORM_SHARD", f"{share}/3")
        items = list(range(100))
        shard.pytest_collection_modifyitems(Config(), items)
        assert 20 < len(items) < 50
        seen += items
    assert sorted(seen) == list(range(100))
    assert sum(dropped) == 200


NO_GPU = """
import sys, sanitize
found = sanitize.chosen()
launched = set().union(*found.values())
missing = sorted(sanitize.kernels() - launched)
assert not missing, missing
assert len(found) < 16 < len(launched), (len(found), len(launched))
assert sum(map(len, found.values())) == len(launched)
"""


def test_every_kernel_is_launched_once():
    """In a process of its own: there nothing is interpreted."""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'bench'}", "PATH": ""}
    command = [sys.executable, "-c", NO_GPU]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


COLLECT = """
import sys, torch
torch.cuda.is_available = lambda: True
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hypothesis", "xdist", "pytest_benchmark", "rich"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
import importlib.util as u
find = u.find_spec
u.find_spec = lambda name, *a: None if name == "hypothesis" else find(name, *a)
import pytest
options = ["-m", "gpu and not slow", "--collect-only", "-q", "--ignore-glob=*/test_cli_*.py"]
sys.exit(pytest.main([*options, "-p", "shard", "tests"]))
"""


@pytest.mark.slow
def test_gpu_tests_are_collected_without_the_extras():
    path = f"{ROOT}:{ROOT / 'bench'}"
    environment = {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", COLLECT], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "[compiled" in done.stdout
