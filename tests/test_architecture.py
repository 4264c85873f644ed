"""Imports point one way: modules -> functional -> backend -> ops/eager -> kernels -> device."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest's own dependency there

ROOT = Path(__file__).parents[1]
LAYERS = [  # top to bottom; a file may import only from its own layer and those below
    "fastnorm.__main__",
    "fastnorm.cli",
    "fastnorm.verify",
    "fastnorm.bench",
    "fastnorm.signals",
    "fastnorm.init",
    "fastnorm.existing",
    "fastnorm.structure",
    "fastnorm.tables",
    "fastnorm.modules",
    "fastnorm.functional",
    "fastnorm.checks",
    "fastnorm.backend",
    "fastnorm.environment",
    "fastnorm.ops",  # above eager: what a kernel cannot do is done there
    "fastnorm.eager",
    "fastnorm.distributed",
    "fastnorm.processor",
    "fastnorm.kernels",
    "fastnorm.kernels.launch",
    "fastnorm.kernels.devices",
    "fastnorm.kernels.device",
]
FILES = sorted([*ROOT.glob("fastnorm/**/*.py"), *ROOT.glob("kernels/**/*.py")])
FILES = [path for path in FILES if path.parts[-2] != "fastnorm" or path.name != "__init__.py"]


def layer(module: str) -> int:
    matches = [i for i, name in enumerate(LAYERS) if f"{module}.".startswith(f"{name}.")]
    return max(matches, default=-1)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("fastnorm", *parts) if parts[0] == "kernels" else parts)


def imports(path: Path) -> list[str]:
    """Every module or name that the file imports, in full."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    mine = module_name(path)
    assert layer(mine) >= 0, f"{mine} has no place in LAYERS"
    for target in imports(path):
        if target.startswith("fastnorm.") and layer(target) >= 0:
            assert layer(target) >= layer(mine), f"{mine} imports {target}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("kernels/device/*.py")), ids=lambda p: p.name)
def test_device_code_is_torch_free(path):
    assert not [name for name in imports(path) if name.split(".")[0] == "torch"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_kernels_import_triton_at_the_top(path):
    if module_name(path).startswith("fastnorm.kernels"):
        pytest.skip("kernels are written in Triton")
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import)]
    assert not [alias.name for node in top for alias in node.names if "triton" in alias.name]


def test_every_package_is_installed():
    """The wheel lists its packages by name, so a new one could be forgotten."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in [*FILES, ROOT / "fastnorm/__init__.py"]}
    expected = {module_name(folder / "__init__").removesuffix(".__init__") for folder in folders}
    assert set(listed) == expected


def test_import_needs_torch_alone():
    """Neither triton nor the command line's libraries are imported by `import fastnorm`."""
    code = (
        "import sys; absent = ['triton', 'rich', 'matplotlib', 'sklearn'];"
        "sys.modules.update(dict.fromkeys(absent));"
        "import fastnorm, torch; print(fastnorm.BatchNorm1d(3)(torch.ones(2, 3)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 3])" in done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_top_level_kernels(path):
    """A top-level package of that name would shadow another library's."""
    assert not [name for name in imports(path) if name.split(".")[0] == "kernels"]
