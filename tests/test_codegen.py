"""The machine code of every kernel: compiles for each target, spills nothing, loads in vectors."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
NO_STACK = ("sm_80", "sm_90", "sm_100")


def run(script: str, *arguments: str) -> str:
    """Run a script in a process whose Triton compiles instead of interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, BENCH / script, *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def codes(request, tmp_path_factory) -> list[dict]:
    path = tmp_path_factory.mktemp("codegen") / "codes.json"
    run("codegen.py", "--targets", request.param, "--json", str(path))
    return json.loads(path.read_text())


def _target(name: str) -> object:
    """One worker compiles what all tests of a target look at."""
    slow = [] if name == "sm_90" else [pytest.mark.slow]
    return pytest.param(name, marks=[pytest.mark.xdist_group(f"codegen {name}"), *slow])


targets = pytest.mark.parametrize(
    "codes", [_target(t) for t in ("sm_90", "sm_80", "sm_100", "sm_120", "gfx942")], indirect=True
)


@targets
def test_every_kernel_compiles(codes):
    source = "".join(p.read_text() for p in (BENCH.parent / "kernels").glob("*.py"))
    kernels = set(re.findall(r"def (\w+_kernel)\(", source))
    assert {code["kernel"] for code in codes} == kernels, "a kernel without a case in bench/grid.py"


@targets
def test_no_spills_and_no_stack(codes):
    for code in codes:
        if code["target"] in NO_STACK:
            assert code["stack"] == code["spills"] == 0, code


@targets
def test_large_tensors_move_in_16_bytes(codes):
    """Or in what alignment allows: a mask whose bound is not a known multiple makes them scalar."""
    wide = 0
    for code in codes:
        assert not code["narrow"], code
        wide += any(16 in widths for widths in code["widths"].values())
    assert wide > len(codes) / 2


@targets
def test_no_atomics(codes):
    for code in codes:
        assert "atom" not in code["features"], code


@targets
def test_relu_keeps_nan(codes):
    """`max.f32` would turn NaN into 0."""
    found = [c for c in codes if "relu" in c["case"].split(", ") and "fwd" in c["kernel"]]
    for code in found:
        if code["target"].startswith("sm") and code["kernel"].endswith(
            ("apply_kernel", "fwd_kernel")
        ):
            assert "max.NaN" in code["features"], code


@pytest.mark.slow
def test_every_option_compiles(tmp_path):
    """The interpreter runs what the compiler refuses: every activation, dtype and absent tensor."""
    path = tmp_path / "codes.json"
    run("codegen.py", "--options", "--targets", "sm_90", "--json", str(path))
    codes = json.loads(path.read_text())
    assert len(codes) > 50
    assert not any(code["spills"] for code in codes)


def test_narrow_access_is_seen():
    """The width reader itself: a scalar access in a PTX text is found under its argument."""
    script = """
import sys; sys.path.insert(0, {bench!r})
from codegen import access_widths
ptx = '''
ld.param.b64 %rd1, [k_param_0];
ld.param.b64 %rd2, [k_param_1];
mul.wide.s32 %rd9, %r1, 2;
add.s64 %rd3, %rd1, %rd9;
add.s64 %rd4, %rd2, %rd9;
@%p1 ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [ %rd3 + 0 ];
@%p1 st.global.b16 [ %rd4 + 0 ], {{%rs1}};
'''
print(access_widths(ptx, ["x_ptr", "y_ptr"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script.format(bench=str(BENCH))],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "{'x_ptr': [16], 'y_ptr': [2]}"


def test_sizes_do_not_recompile():
    """Batch and image sizes share code, except for the classes of tile and of divisibility."""
    counts = json.loads(run("specialisations.py"))
    for sweep, (kernels, allowed) in counts.items():
        assert kernels <= allowed, (sweep, kernels, allowed)
