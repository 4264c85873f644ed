"""Model how near to a copy's speed each kernel comes on an H200, from its machine code.

`python bench/flight.py --out bench/results/flight.md` needs no device, and measures nothing. By
Little's law a multiprocessor that is to move B bytes a second, each of which takes a latency to
come, must have B · latency of them under way at all times. Whether it has is in the code: how many
programs registers and shared memory leave resident, what each of them loads before it waits for
the first of it, and how much it computes in between.

The model walks one warp through its program, with the launch's number of tiles: an instruction
takes PACE cycles; what is loaded is there LATENCY later, or FROM_CACHE where the program has loaded
all its bytes before and the cache holds those of all that are resident; whoever reads it waits.
What may be jumped over is, unless it moves bytes, and not only loads again what it has: it mends
rare values. Of two ways the longer is for tiles that reach beyond their row, and taken for as many
as do. Programs that are resident together take as long as the slowest of three: that walk; the
instructions of all their warps, one a cycle and scheduler; their bytes at a copy's speed. The
multiprocessor with most programs takes one round of these after the other, the last perhaps of few.
Share is the time of all bytes at a copy's speed, evenly spread, over that.

Left out: bank conflicts, replays, what a store costs, warps that wait for each other, what other
launches left in the cache, and launches' own time. It compares variants of a kernel. How fast one
is, only a device says.
"""

import argparse
import functools
import math
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from case import Case
from codegen import LIMITS, read_cubin
from grid import CASES, LARGE
from launches import DEVICES, TARGETS, Recorded, recording

TARGET = "sm_90"
MULTIPROCESSORS = DEVICES[TARGET].multiprocessors
SCHEDULERS = 4
CLOCK = 1.75e9
COPY = 4.3e12 / MULTIPROCESSORS / CLOCK  # bytes a cycle, read and written
CACHE = 50 << 20  # bytes of the second level
LATENCY, FROM_CACHE, ON_CHIP = 1300, 300, 30  # cycles; the first is 740 ns, under load
START = 500  # cycles from a program's end to the next one's first instruction
PACE = 2  # cycles from one instruction of a warp to the next
WALKED, STEADY = 16, 12  # trips of a loop; the others take as long as the last of these on average
LARGE_FROM = 64 << 20  # bytes of the input, from which the goals are set
LISTED_FROM = 8 << 20
LONGEST = 1_000_000  # instructions of a walk: one that takes more does not end


@dataclass(frozen=True)
class Walk:
    """One program: its cycles where nobody else delays it, its instructions, bytes it loaded."""

    cycles: float
    instructions: float
    loaded: float


@dataclass(frozen=True)
class Flight:
    """One launch."""

    kernel: str
    case: str
    input_bytes: int
    registers: int
    shared: int
    programs: int  # of a multiprocessor
    resident: int  # of these at a time
    under_way: float  # bytes of loads of a multiprocessor, on average
    limit: str  # what takes longest where all that fit are resident
    ideal: float  # cycles of all bytes at a copy's speed, spread evenly
    cycles: float

    @property
    def share(self) -> float:
        return self.ideal / self.cycles


@functools.cache
def disassembled(cubin: bytes) -> list[tuple[int, str, str]]:
    """(address, opcode, operands) of each instruction; "@" before what has a predicate."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tools / "cuobjdump", "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([\w.]+)\s*([^;]*);", text)
    return [(int(at, 16), "@" * bool(p) + op, rest) for at, p, op, rest in found]


def walk(
    code: list[tuple[int, str, str]],
    threads: int,
    trips: tuple[int, int],
    distinct: float,
    own: float = math.inf,
    partial: float = 0.0,
) -> Walk:
    """Walk a program that has `own` bytes to load; trips of its inner and outer loops.

    `distinct`: the bytes after which what it loads comes from the cache. `partial`: the share of
    tiles that reach beyond their row.
    """
    # where tiles are loaded ahead, what is not is the parameters of all programs
    small = "LDG" if any("LDGSTS" in op for _, op, _ in code) else None
    index = {address: i for i, (address, _, _) in enumerate(code)}
    jumps = {address: _target(rest) for address, op, rest in code if op.endswith("BRA")}
    loops = {address: target for address, target in jumps.items() if target < address}
    ready: dict[int, float] = {}  # register -> when what is loaded into it is there
    groups: list[float] = []  # of asynchronous copies: when each is there
    turns: dict[int, list[tuple[float, ...]]] = defaultdict(list)
    now = instructions = loaded = group = owed = 0.0
    i = 0
    while i < len(code):
        address, op, operands = code[i]
        i += 1
        name = op.lstrip("@").split(".")[0]
        registers = [int(r) for r in re.findall(r"\bR(\d+)", operands)]
        if instructions > LONGEST:
            raise RuntimeError("the walk does not end")
        now = max([now, *(ready.pop(r) for r in registers if r in ready)]) + PACE
        instructions += 1
        if name in ("LDG", "LDGSTS", "LDS", "SHFL", "MUFU"):
            width = _width(op)
            later = ON_CHIP
            if name == small:
                later = FROM_CACHE
            elif name.startswith("LDG"):
                later = LATENCY if loaded < distinct else FROM_CACHE
                loaded += width * threads
            if name == "LDGSTS":
                group = now + later
            elif registers:
                words = range(registers[0], registers[0] + -(-width // 4))
                ready |= dict.fromkeys(words, now + later)
        elif name == "LDGDEPBAR":
            groups.append(group)
        elif name == "DEPBAR" and "SB0" in operands:
            left = int(operands.split(",")[1], 16)
            done = groups[: max(len(groups) - left, 0)]
            now = max([now, *done])
            groups = groups[len(done) :]
        elif op == "EXIT":
            break
        elif op.endswith("BRA") and address not in loops:
            target = index[jumps[address]]
            moved = {o.lstrip("@")[:3] for _, o, _ in code[i:target] if _moves(o)}
            jumped = op == "BRA" or not moved or (moved == {"LDG"} and loaded >= own)
            end, last, _ = code[target - 1]
            if op != "BRA" and not moved and last == "BRA" and jumps[end] > end:  # two ways
                owed += partial
                longer = target - i > index[jumps[end]] - target
                jumped = longer != (owed >= 1.0)
                owed -= owed >= 1.0
            if jumped:
                i = target
        elif address in loops:
            outer = any(loops[address] <= other < address for other in loops)
            turn = turns[address]
            turn.append((now, instructions, loaded))
            if len(turn) < min(trips[outer], WALKED):
                i = index[loops[address]]
                continue
            if trips[outer] > WALKED:
                more = (trips[outer] - WALKED) / STEADY
                now, instructions, loaded = (
                    b + more * (b - a) for a, b in zip(turn[-STEADY - 1], turn[-1], strict=True)
                )
                ready, groups = {}, [now] * len(groups)
            turn.clear()
            if op == "BRA" and code[i - 2][1] == "@EXIT":  # the loop is the program's end
                break
    return Walk(now, instructions, loaded)


def _partial(arguments: dict[str, Any]) -> float:
    """The share of a launch's tiles that reach beyond their row, at its end or, led, its begin."""
    length, block = arguments.get("S", 1), arguments.get("BLOCK_S", 1)
    lead = arguments.get("LEAD", 1)
    ends = 2 - 1 / lead if lead > 1 else length % block > 0
    return min(ends / -(-(length + lead - 1) // block), 1.0)


def _target(operands: str) -> int:
    return int(operands.split("0x")[-1].split()[0], 16)


def _moves(op: str) -> bool:
    return op.lstrip("@").startswith(("LDG", "STG"))


def _width(op: str) -> int:
    found = re.search(r"\.(128|64|[US]16|[US]8)\b", op)
    return int(found[1].strip("US")) // 8 if found else 4


def flight(case: Case, launched: Recorded) -> Flight | None:
    """The model of one launch; None where it moves no tensor of the input's size."""
    arguments = launched.arguments
    sizes = {
        name: t.numel() * t.element_size()
        for name, t in arguments.items()
        if isinstance(t, torch.Tensor)
    }
    if not any(name in LARGE for name in sizes):
        return None
    grid = launched.grid[0]
    stored = {"dx_ptr", "dz_ptr", "sum_ptr", "y_ptr" if "fwd" in launched.name else ""}
    read = sum(size for name, size in sizes.items() if name in LARGE and name not in stored)
    compiled = launched.compiled(TARGETS[TARGET])
    used, _, _ = read_cubin(compiled)
    warps = compiled.metadata.num_warps
    inner = arguments.get("tiles_per_program", arguments.get("tiles", 1))
    trips = inner, arguments.get("blocks_per_program", 1)
    sass = disassembled(compiled.asm["cubin"])

    registers, shared, threads = LIMITS[TARGET]
    programs = -(-grid // MULTIPROCESSORS)
    resident = min(
        registers // (-(-used // 8) * 8 * 32 * warps),
        shared // (compiled.metadata.shared + 1024),
        threads // (32 * warps),
        32,
        programs,
    )
    cached = resident * MULTIPROCESSORS * read / grid < CACHE
    own = read / grid
    try:
        one = walk(sass, 32 * warps, trips, own if cached else math.inf, own, _partial(arguments))
    except RuntimeError as error:
        raise RuntimeError(f"{launched.name}, {case}: {error}") from error
    again = 1 if cached else max(int(one.loaded * grid / read), 1)  # but for lanes outside
    loaded = again * read / grid
    each = (sum(sizes.values()) - read) / grid + loaded

    def times(together: int) -> dict[str, float]:
        return {
            "bytes": together * each / COPY,
            "latency": START + one.cycles,
            "issue": together * warps * one.instructions / SCHEDULERS,
        }

    full, rest = divmod(programs, resident)
    cycles = full * max(times(resident).values()) + (max(times(rest).values()) if rest else 0.0)
    return Flight(
        launched.name, f"{case}, {'×'.join(map(str, case.shape))}", case.element_bytes,
        used, compiled.metadata.shared, programs, resident,
        under_way=programs * loaded * LATENCY / cycles,
        limit=max(times(resident).items(), key=lambda item: item[1])[0],
        ideal=grid / MULTIPROCESSORS * each / COPY,
        cycles=cycles,
    )  # fmt: skip


def flights(cases: Sequence[Case]) -> list[Flight]:
    found = []
    for case in cases:
        with recording(DEVICES[TARGET]) as launches:
            case.forward_and_backward(case.inputs("meta"))
        found += [f for launched in launches if (f := flight(case, launched))]
    return found


def report(found: list[Flight]) -> str:
    needed = COPY * LATENCY
    lines = [
        "# Bytes under way",
        "",
        "A model from generated code, not a measurement: see bench/flight.py for what it assumes.",
        f"Compiled for {TARGET} by triton {triton.__version__}. An H200's multiprocessor needs",
        f"about {needed / 1024:.0f} KiB of loads and stores under way. Remake with `make flight`.",
        "",
        "## Share of a copy's speed, by case",
        "",
        f"Inputs of at least {LARGE_FROM >> 20} MiB; all launches of a direction together.",
        "",
        *_shares([f for f in found if f.input_bytes >= LARGE_FROM]),
        "",
        f"## Smaller inputs, from {LISTED_FROM >> 20} MiB",
        "",
        *_shares([f for f in found if f.input_bytes < LARGE_FROM]),
        "",
        "## Launches",
        "",
        "| kernel | case | registers | shared | programs | resident | KiB under way | limit "
        "| share |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for f in sorted(found, key=lambda f: f.kernel):
        lines.append(
            f"| {f.kernel} | {f.case} | {f.registers} | {f.shared} | {f.programs} | {f.resident} "
            f"| {f.under_way / 1024:.1f} | {f.limit} | {f.share:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _shares(found: Sequence[Flight]) -> list[str]:
    """A table of cases; ideal and modelled time of all launches of a direction."""
    lines = ["| case | forward | backward |", "|---|---|---|"]
    for case in dict.fromkeys(f.case for f in found):
        shares = []
        for direction in ("fwd", "bwd"):
            of = [f for f in found if f.case == case and direction in f.kernel]
            slowest = sum(f.cycles for f in of)
            shares.append(f"{sum(f.ideal for f in of) / slowest:.2f}" if of else "")
        lines.append(f"| {case} | {' | '.join(shares)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", help="only these (default: all but products)")
    parser.add_argument("--out", type=Path, help="write the Markdown report here")
    arguments = parser.parse_args()
    cases = [case for case in CASES if case.element_bytes >= LISTED_FROM]
    if arguments.families:
        cases = [case for case in cases if case.family in arguments.families]
    else:  # products are bound by their arithmetic
        cases = [case for case in cases if case.family != "linear_batch_norm"]
    text = report(flights(cases))
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
