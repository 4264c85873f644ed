"""The machine code of every kernel: compiles for each target, spills nothing, loads in vectors."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_backend import release

BENCH = Path(__file__).parents[1] / "bench"
NO_STACK = ("sm_80", "sm_90", "sm_100")
# bytes: of what Triton 3.6 makes of this kernel, ptxas spills up to four words a thread
STACK = {("sm_100", "batch_norm_bwd_kernel"): 16} if release("triton") < (3, 7) else {}

SPILLED = {  # bytes of a thread, of options that no shape of the benchmarks has
    "linear_batch_norm_bwd_input_kernel": 512,  # odd sizes: each element has an address of its own
    "batch_norm_bwd_reduce_kernel": 256,  # tanh, gelu and their like in channels_last
    "batch_norm_bwd_apply_kernel": 128,
    "layer_norm_fwd_kernel": 384,  # 16384 elements of float32 fill a multiprocessor's registers
}


def python(*arguments: object) -> str:
    """What Python prints, in a process whose Triton compiles instead of interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(BENCH), *filter(None, [environment.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


def run(script: str, *arguments: str) -> str:
    return python(BENCH / script, *arguments)


@pytest.fixture(scope="module")
def codes(request, tmp_path_factory) -> list[dict]:
    """Of every case of the benchmarks, or, to be quick, of the first of each kernel."""
    path = tmp_path_factory.mktemp("codegen") / "codes.json"
    run("codegen.py", "--targets", *request.param.split(), "--json", str(path))
    return json.loads(path.read_text())


def _target(words: str) -> object:
    """One worker compiles what all tests of a target look at."""
    slow = [] if "--first" in words else [pytest.mark.slow]
    return pytest.param(words, marks=[pytest.mark.xdist_group(f"codegen {words}"), *slow])


TARGETS = ("sm_90 --first", "sm_90", "sm_80", "sm_100", "sm_120", "gfx942")
targets = pytest.mark.parametrize("codes", [_target(words) for words in TARGETS], indirect=True)


@targets
def test_every_kernel_compiles(codes):
    source = "".join(p.read_text() for p in (BENCH.parent / "kernels").glob("*.py"))
    kernels = set(re.findall(r"def (\w+_kernel)\(", source))
    assert {code["kernel"] for code in codes} == kernels, "a kernel without a case in bench/grid.py"


@targets
def test_no_spills_and_no_stack(codes):
    for code in codes:
        if code["target"] in NO_STACK:
            assert code["stack"] <= STACK.get((code["target"], code["kernel"]), 0), code
            assert code["spills"] == 0, code


@targets
def test_programs_have_the_shared_memory_that_they_ask_for(codes):
    """A launch that asks for more fails."""
    most = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
    for code in codes:
        assert code["shared"] <= most[code["target"]] << 10, code


@targets
def test_large_tensors_move_in_16_bytes(codes):
    """Or in what alignment allows: a mask whose bound is not a known multiple makes them scalar."""
    wide = 0
    for code in codes:
        assert not code["narrow"], code
        wide += any(16 in widths for widths in code["widths"].values())
    assert wide > len(codes) / 2


@targets
def test_loops_over_tiles_load_ahead(codes):
    """Asynchronously, where vectors are wide enough, whatever else the loop computes."""
    loops = tuple(
        f"{family}_norm_{kernel}"
        for family in ("batch", "group")
        for kernel in ("fwd_moments", "fwd_apply", "bwd_reduce", "bwd_apply")
    )
    found = [c for c in codes if c["target"].startswith("sm") and c["kernel"].startswith(loops)]
    # rows are as wide as they are: elsewhere shared memory has no room for some
    rows = ("layer_norm_fwd_kernel", "layer_norm_bwd_kernel", "group_norm_fwd_rows_kernel")
    found += [c for c in codes if c["target"] in ("sm_90", "sm_100") and c["kernel"] in rows]
    wide = [c for c in found if 16 in c["widths"].get("dy_ptr", c["widths"].get("x_ptr", []))]
    for code in wide:
        assert "cp.async" in code["features"], code
    assert wide or not found


@targets
def test_programs_that_own_many_rows_are_resident_together(codes):
    """One that has to wait for another's end would double the time of the launch."""
    rows = [c for c in codes if re.fullmatch(r"layer_norm_(fwd|bwd)_kernel", c["kernel"])]
    many = [c for c in rows if c["tiles"] > 1 and "huge" not in c["case"]]  # those own columns
    assert many
    for code in many:
        if code["target"] in NO_STACK:  # of as many registers and threads as an H200
            together = int(code["occupancy"] * 64 / code["warps"])
            assert code["programs"] <= together * 132, code


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
@pytest.mark.xdist_group("codegen sm_90")  # the worker that launches them all, too
def test_every_option_compiles(tmp_path):
    """The interpreter runs what the compiler refuses: every activation, dtype and absent tensor."""
    path = tmp_path / "codes.json"
    run("codegen.py", "--options", "--targets", "sm_90", "--json", str(path))
    codes = json.loads(path.read_text())
    assert len(codes) > 50
    for code in codes:
        assert code["spills"] <= SPILLED.get(code["kernel"], 32), code


def test_narrow_access_is_seen():
    """The width reader itself: a scalar access in a PTX text is found under its argument."""
    script = """
from codegen import access_widths
ptx = '''
ld.param.b64 %rd1, [k_param_0];
ld.param.b64 %rd2, [k_param_1];
mul.wide.s32 %rd9, %r1, 2;
add.s64 %rd3, %rd1, %rd9;
add.s64 %rd4, %rd2, %rd9;
@%p1 ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [ %rd3 + 0 ];
@%p1 st.global.b16 [ %rd4 + 0 ], {%rs1};
'''
print(access_widths(ptx, ["x_ptr", "y_ptr"]))
"""
    assert python("-c", script) == "{'x_ptr': [16], 'y_ptr': [2]}"


def test_spills_are_seen():
    """What reads them: a kernel that is left too few registers has some."""
    script = """
from codegen import read_cubin
from grid import OPTION_CASES
from launches import TARGETS, recording

case = next(c for c in OPTION_CASES if c.family == "layer_norm")
with recording() as launches:
    case.forward_and_backward(case.inputs("meta"))
launched = next(x for x in launches if x.name == "layer_norm_bwd_kernel")
for limit in (None, 24):
    launched.options["maxnreg"] = limit
    registers, stack, spilled = read_cubin(launched.compiled(TARGETS["sm_90"]))
    print(stack > 0, spilled > 0)
"""
    assert python("-c", script) == "False False\nTrue True"


def test_flight_waits_for_what_was_loaded():
    """The model of bench/flight.py: a loop that loads what it needs next waits for less."""
    script = """
from flight import LATENCY, PACE, walk

def period(*loop):
    code = [(16 * i, *line) for i, line in enumerate((*loop, ("@BRA", "0x0"), ("EXIT", "")))]
    few, many = (walk(code, 128, (trips, 1), float("inf")).cycles for trips in (20, 40))
    return (many - few) / 20

load, use = ("LDG.E.128", "R4, desc[UR4][R2.64]"), ("FADD", "R8, R8, R4")
work = [("FADD", "R9, R9, R9")] * 100
copy = [("LDGSTS.E.BYPASS.128", "[R1], desc[UR4][R2.64]"), ("LDGDEPBAR", "")]
late = period(load, use, *work)
ahead = period(use, load, *work)
three_ahead = period(("DEPBAR.LE", "SB0, 0x2"), *copy, *work)
assert late > LATENCY + 100 * PACE and LATENCY < ahead < LATENCY + 10 * PACE, (late, ahead)
assert LATENCY / 3 < three_ahead < LATENCY / 3 + 10 * PACE, three_ahead
"""
    python("-c", script)


def test_flight_jumps_over_what_is_rare_and_ends():
    """Over a branch that loads nothing new; and a walk that does not end is an error."""
    script = """
from flight import walk

def instructions(own, *lines):
    code = [(16 * i, *line) for i, line in enumerate(lines)]
    return walk(code, 128, (5, 1), float("inf"), own).instructions

load, use = ("LDG.E.128", "R4, desc[UR4][R2.64]"), ("FADD", "R8, R8, R4")
rare = [load, ("@BRA", "0x40"), load, use, ("EXIT", "")]
assert instructions(float("inf"), *rare) == 5  # it has more to load
assert instructions(128 * 16, *rare) == 3
assert instructions(0, use, ("@EXIT", ""), ("BRA", "0x0"), ("BRA", "0x30")) == 15  # five trips
try:
    instructions(0, ("BRA", "0x0"))
except RuntimeError as error:
    print(error)
"""
    assert python("-c", script) == "the walk does not end"


def test_flight_takes_the_longer_way_for_tiles_that_reach_beyond_their_row():
    script = """
from flight import walk

def instructions(partial, *ways):
    first, second = ([("FADD", "R8, R8, R8")] * count for count in ways)
    lines = [("@BRA", hex(16 * (len(first) + 2))), *first]
    lines += [("BRA", hex(16 * (len(lines) + 1 + len(second)))), *second]
    lines += [("@BRA", "0x0"), ("EXIT", "")]
    code = [(16 * i, *line) for i, line in enumerate(lines)]
    return walk(code, 128, (8, 1), float("inf"), partial=partial).instructions

for partial, long in ((0.0, 0), (0.25, 2), (1.0, 8)):
    assert instructions(partial, 5, 2) == 1 + 8 * 2 + 8 * 2 + long * (5 + 1 - 2)
    assert instructions(partial, 2, 5) == 1 + 8 * 2 + 8 * 3 + long * (5 - 1 - 2)
"""
    python("-c", script)


def test_sizes_do_not_recompile():
    """Batch and image sizes share code, but for the classes that `sweeps` of each family names."""
    counts = json.loads(run("specialisations.py"))
    for sweep, (kernels, allowed) in counts.items():
        assert kernels <= allowed, (sweep, kernels, allowed)
