"""The wheel and the sdist: built from what is committed, installed elsewhere, and used."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastnorm

ROOT = Path(__file__).parents[1]


def run(*command, cwd=None, **environment):
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd), **environment},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(the folder of the archives, sdist, wheel), built without downloads."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, cwd=ROOT, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in files:
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=source)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return folder, sdist, wheel


def modules():
    """Every module of the source tree, as a path in a wheel."""
    found = {path.relative_to(ROOT) for path in (ROOT / "fastnorm").glob("**/*.py")}
    found |= {
        Path("fastnorm") / path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")
    }
    return {path.as_posix() for path in found}


@pytest.mark.slow
def test_the_wheel_holds_the_library_alone(built):
    _, _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"fastnorm-{fastnorm.__version__}.dist-info"
    assert wheel.name == f"fastnorm-{fastnorm.__version__}-py3-none-any.whl"
    assert {name for name in names if name.endswith(".py")} == modules()
    assert {"fastnorm/py.typed", f"{info}/licenses/LICENSE"} <= names
    assert {name.split("/")[0] for name in names} == {"fastnorm", info}


@pytest.mark.slow
def test_the_sdist_can_be_built_again(built):
    _, sdist, _ = built
    stem = f"fastnorm-{fastnorm.__version__}"
    with tarfile.open(sdist) as archive:
        names = set(archive.getnames())
    assert {f"{stem}/kernels/launch.py", f"{stem}/pyproject.toml", f"{stem}/LICENSE"} <= names


SMOKE = """
import importlib, json, os, pathlib, pkgutil, sys
os.environ["TRITON_INTERPRET"] = "1"
import torch, fastnorm
assert pathlib.Path(fastnorm.__file__).is_relative_to(sys.prefix), fastnorm.__file__
assert pathlib.Path(fastnorm.__file__).with_name("py.typed").exists()
names = [module.name for module in pkgutil.walk_packages(fastnorm.__path__, "fastnorm.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
x = torch.randn(4, 6, dtype=torch.float64)
results = {}
for backend in ("eager", "triton"):
    with fastnorm.use_backend(backend):
        y = fastnorm.LayerNorm(6, dtype=torch.float64)(x)
    torch.testing.assert_close(y, torch.nn.LayerNorm(6, dtype=torch.float64)(x))
    results[backend] = True
print(json.dumps({"modules": len(names), **results}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installed_elsewhere(built, kind, tmp_path):
    """A new environment: of the one that runs this, only its packages are seen, as torch is one."""
    _, sdist, wheel = built
    home = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=tmp_path)
    python = home / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # a path alone: what lies there is imported, its own .pth files are not read
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    archive = wheel if kind == "wheel" else sdist
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install"), *options, archive,
        cwd=tmp_path,
    )  # fmt: skip
    says = json.loads(run(python, "-I", "-c", SMOKE, cwd=tmp_path))
    assert says["eager"]
    assert says["triton"]
    assert says["modules"] > 50
    doctor = subprocess.run(
        [home / "bin" / "fastnorm", "doctor"], capture_output=True, text=True, cwd=tmp_path
    )
    assert re.search(rf"^fastnorm +{re.escape(fastnorm.__version__)}$", doctor.stdout, re.MULTILINE)
    if kind == "sdist":
        return  # the same files: seen above
    out = run(
        *(home / "bin" / "fastnorm", "verify", "--quick", "--device", "cpu", "--out", "results"),
        cwd=tmp_path,
    )
    assert "the contract is kept" in out


def test_versions_and_license_agree():
    """They are written in three places."""
    citation = (ROOT / "CITATION.cff").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    assert f"\nversion: {fastnorm.__version__}\n" in citation
    assert f'\nversion = "{fastnorm.__version__}"\n' in project
    assert "\nlicense: MIT\n" in citation
    assert '\nlicense = "MIT"\n' in project
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


def test_the_workflow_runs_what_lands():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "- run: .ci/run\n" in text
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
