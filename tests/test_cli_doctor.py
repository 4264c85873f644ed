"""`fastnorm doctor`: what it looks at, and a remedy for each thing amiss."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastnorm
import fastnorm.functional as FF
from fastnorm import environment
from fastnorm.cli import doctor, main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def examined(capsys):
    def look(status=None):
        got = main(["doctor"])
        out, err = capsys.readouterr()
        assert err == ""
        assert got == int("AMISS" in out)
        assert status in (None, got)
        return out

    return look


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one GPU, as far as torch says."""
    found = SimpleNamespace(
        name="NVIDIA T4", major=7, minor=5, multi_processor_count=40, total_memory=16 << 30
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(doctor, "_device", lambda: torch.device("cpu"))
    return found


def line_of(out, thing):
    (line,) = (line for line in out.splitlines() if line.startswith(f"{thing} "))
    return line


def remedy_of(out, thing):
    words = out.split(f"AMISS {thing}: ", 1)
    assert len(words) == 2, out
    return words[1].splitlines()[1]


def test_this_machine(examined):
    out = examined()
    assert torch.__version__ in line_of(out, "torch")
    assert sys.version.split()[0] in line_of(out, "python")
    for thing in ("fastnorm", "triton", "rich", "matplotlib", "scikit-learn", "kernel cache"):
        assert line_of(out, thing)
    for operation in FF.__all__:
        line = line_of(out, operation)
        assert line.split() == [operation, *[fastnorm.backend_for(torch.ones(1))] * 4]


@pytest.mark.parametrize("name", ["eager", "triton"])
def test_the_backend_that_was_asked_for(name, examined):
    if torch.cuda.is_available():
        pytest.skip("the interpreter was not asked for")
    with fastnorm.use_backend(name):
        out = examined()
    assert line_of(out, "backend").split()[1] == name
    assert line_of(out, "group_norm").split() == ["group_norm", *[name] * 4]
    assert f"on cpu: {name}: it was asked for by name" in out


def test_a_backend_that_cannot_be_had(examined, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("it can")
    monkeypatch.setattr(environment, "interpreting", False)
    with fastnorm.use_backend("triton"):
        out = examined(status=1)
    assert "TRITON_INTERPRET=1" in remedy_of(out, "backend")
    assert line_of(out, "layer_norm").split() == ["layer_norm", *["raises"] * 4]


def test_an_old_gpu(gpu, examined):
    out = examined(status=1)
    assert "NVIDIA T4, capability 7.5, 40 multiprocessors, 16 GiB" in line_of(out, "cuda:0")
    assert "FASTNORM_BACKEND=eager" in remedy_of(out, "cuda:0")


def test_a_gpu_that_serves(gpu, examined, monkeypatch):
    gpu.major, gpu.minor = 9, 0
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "AMISS cuda:0" not in examined()


def test_a_gpu_without_triton(gpu, examined, monkeypatch):
    monkeypatch.setattr(environment, "has_triton", False)
    out = examined(status=1)
    assert "pip install 'triton" in remedy_of(out, "triton")
    assert "kernel cache" not in out


def test_an_interpreter_beside_a_gpu(gpu, examined, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "unset TRITON_INTERPRET" in remedy_of(examined(status=1), "triton")


@pytest.mark.parametrize("asked", [None, "nocc"])
def test_no_compiler(asked, gpu, examined, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    if asked:
        monkeypatch.setenv("CC", asked)
    out = examined(status=1)
    assert (asked or "neither gcc nor clang") in line_of(out, "C compiler")
    assert "CC" in remedy_of(out, "C compiler")


def test_no_headers(gpu, examined, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "-dev" in remedy_of(examined(status=1), "Python.h")


def test_no_compiler_is_needed_without_a_gpu(examined, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "_unwritable", lambda folder: "")
    assert "AMISS C compiler" not in examined()


@pytest.mark.parametrize("files", [True, False])
@pytest.mark.parametrize("built", ["13.0", None])
def test_a_gpu_that_torch_cannot_use(built, files, examined, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("torch can use it")
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(doctor, "_has_gpu_files", lambda: files)
    out = examined()
    assert ("built for 13.0" if built else "built for CPUs alone") in line_of(out, "GPU")
    if files:
        assert ("driver" if built else "pytorch.org") in remedy_of(out, "GPU")
    else:
        assert "AMISS GPU" not in out


def test_a_cache_that_cannot_be_written(examined, monkeypatch, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(blocker / "cache"))
    out = examined(status=1)
    assert str(blocker) in line_of(out, "kernel cache")
    assert "TRITON_CACHE_DIR" in remedy_of(out, "kernel cache")


def test_an_old_torch(examined, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.8.1+cu129")
    assert "torch>=2.9" in remedy_of(examined(status=1), "torch")


def test_versions_are_compared_as_numbers():
    assert not doctor._older("2.13.0+cpu", (2, 9))
    assert not doctor._older("3.0", (2, 9))
    assert not doctor._older("git", (2, 9))
    assert doctor._older("2.8.9", (2, 9))


def test_without_the_extra():
    """It says what is missing, and runs."""
    code = (
        "import sys; absent = ['rich', 'matplotlib', 'sklearn', 'triton'];"
        "import importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name in absent else find(name, *a);"
        "sys.modules.update(dict.fromkeys(absent));"
        "from fastnorm.cli import main; sys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    for package in ("rich", "matplotlib", "scikit-learn"):
        assert "fastnorm[cli]" in remedy_of(done.stdout, package)


@pytest.mark.slow
def test_verify_without_the_extra(tmp_path):
    """It needs torch alone, too."""
    code = (
        "import sys; absent = ['rich', 'matplotlib', 'sklearn'];"
        "import importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name in absent else find(name, *a);"
        "sys.modules.update(dict.fromkeys(absent));"
        "from fastnorm.cli import main, verify; all = verify.cases;"
        "verify.cases = lambda quick: all(quick)[::97];"
        "sys.exit(main(['verify', '--quick', '--device', 'cpu', '--out', sys.argv[1]]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verify 100%" in done.stderr
    assert (tmp_path / "o" / "report.html").exists()


def test_bad_arguments(capsys):
    assert main(["doctor", "--all"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "fastnorm doctor: argument --all: unknown (allowed: none)\n"


@pytest.mark.parametrize("words", [["doctor"], ["--help"]])
def test_a_reader_that_has_seen_enough(words):
    """As `| head -1` is: no traceback, and the status of a program that SIGPIPE ended."""
    program = subprocess.Popen(
        [sys.executable, "-c", "import fastnorm.cli as c; raise SystemExit(c.main())", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True,
    )  # fmt: skip
    program.stdout.close()
    assert (program.stderr.read(), program.wait()) == ("", 141)
    program.stderr.close()
