"""Report the machine code of every kernel, in each specialisation the launchers choose, per target.

`python bench/codegen.py --out bench/results/codegen.md` needs no device: launches of the benchmark
grid are recorded on meta tensors and the very same constants, dtypes and divisibilities compiled.
"""

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from case import Case
from grid import CASES, LARGE, OPTION_CASES
from launches import DEVICES, TARGETS, Recorded, recording

# Per multiprocessor: registers, shared memory in bytes, threads.
LIMITS = {
    "sm_80": (65536, 164 << 10, 2048),
    "sm_90": (65536, 228 << 10, 2048),
    "sm_100": (65536, 228 << 10, 2048),
    "sm_120": (65536, 100 << 10, 1536),
    "gfx942": (131072 * 4, 64 << 10, 2048),
}

READ_ALONE = ("dy_ptr", "x_ptr", "residual_ptr")  # large arguments that no kernel writes


@dataclass(frozen=True)
class Code:
    """What one compiled kernel costs and how it moves memory."""

    kernel: str
    case: str
    target: str
    programs: int  # of the launch
    tiles: int  # of a program
    warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    occupancy: float
    widths: dict[str, list[int]]  # argument -> bytes of each of its loads and stores, ascending
    narrow: dict[str, tuple[int, int]]  # large argument -> (bytes found, bytes alignment allows)
    features: list[str]


def specialisations(cases: Iterable[Case], target: str) -> list[tuple[Case, Recorded]]:
    """The launches of the cases' forward and backward that need code of their own."""
    found: dict[str, tuple[Case, Recorded]] = {}
    for case in cases:
        tensors = case.inputs("meta")
        with recording(DEVICES[target]) as launches:
            case.forward_and_backward(tensors)
        for launched in launches:
            found.setdefault(launched.key(TARGETS[target]), (case, launched))
    return list(found.values())


def inspect(case: Case, launched: Recorded, target: str) -> Code:
    compiled = launched.compiled(TARGETS[target])
    read = read_cubin if "cubin" in compiled.asm else _read_amd
    registers, stack, spills = read(compiled)
    text = compiled.asm["ptx"] if "ptx" in compiled.asm else compiled.asm["amdgcn"]
    pointers = [name for name, value in launched.arguments.items() if hasattr(value, "data_ptr")]
    widths = access_widths(text, pointers) if "ptx" in compiled.asm else _amd_widths(text)
    metadata = compiled.metadata
    return Code(
        launched.name, str(case), target, math.prod(launched.grid),
        launched.arguments.get("tiles_per_program", 1), metadata.num_warps, registers, stack,
        spills, metadata.shared,
        _occupancy(target, registers, metadata.shared, metadata.num_warps),
        widths,
        _narrow(launched, widths),
        [word for word in ("wgmma", "mma.sync", "cp.async", "max.NaN", "atom") if word in text],
    )  # fmt: skip


def access_widths(ptx: str, pointers: list[str]) -> dict[str, list[int]]:
    """Bytes of each global load and store, by the pointer argument its address comes from.

    Registers inherit the origins of their operands, until nothing changes: an address has one
    pointer among its ancestors.
    """
    origins: dict[str, set[int]] = {}
    lines = [line.strip() for line in ptx.splitlines()]
    moves = "(?:mov|add|cvta|selp|mad|sub)"
    changed = True
    while changed:
        changed = False
        for line in lines:
            parameter = re.match(r"ld\.param\.[bu]64\s+(%rd\d+), \[\w+_param_(\d+)\]", line)
            if parameter:
                register, found = parameter[1], {int(parameter[2])}
            else:
                move = re.match(rf"(?:@%p\d+ )?{moves}\S*\s+(%rd\d+), (.*);", line)
                if not move:
                    continue
                register = move[1]
                found = set().union(
                    *(origins.get(r, set()) for r in re.findall(r"%rd\d+", move[2]))
                )
            if not found <= origins.get(register, set()):
                origins.setdefault(register, set()).update(found)
                changed = True
    widths: dict[str, list[int]] = {}
    for line in lines:
        # of an asynchronous copy to shared memory, the second address is global memory's
        access = re.match(
            r"(?:@!?%p\d+ )?(?:(?:ld|st)\.global|cp\.async\.c[ag]\.)\S*\s.*\[ ?(%rd\d+)", line
        )
        if not access:
            continue
        for origin in origins.get(access[1], set()):
            if origin < len(pointers):
                widths.setdefault(pointers[origin], []).append(_bytes_of(line))
    return {name: sorted(found) for name, found in widths.items()}


def _bytes_of(instruction: str) -> int:
    copied = re.search(r"cp\.async.*\], (0x\w+|\d+)", instruction)
    if copied:
        return int(copied[1], 0)
    vector = re.search(r"\.v(\d+)", instruction)
    bits = re.search(r"\.[bfsu](8|16|32|64|128)\b", instruction)
    assert bits, instruction
    return int(bits[1]) // 8 * int(vector[1] if vector else 1)


def _narrow(launched: Recorded, widths: dict[str, list[int]]) -> dict[str, tuple[int, int]]:
    """Large arguments with an access narrower than alignment and the program's share allow."""
    arguments = launched.arguments
    if not any(name in arguments for name in LARGE):
        return {}
    if "ALIGN" not in arguments:
        return _narrow_products(launched, widths)
    tile = {axis: arguments.get(f"BLOCK_{axis}", 1) for axis in "MNSC"}
    # the innermost axis in memory: channels, positions, or the columns of rows
    inner = "C" if arguments.get("COLUMNS") else "S" if "BLOCK_S" in arguments else "N"
    threads = 32 * launched.options["num_warps"]
    found = {}
    for name in LARGE:
        if name in widths:
            size = arguments[name].element_size()
            each = max(math.prod(tile.values()) // threads, 1)
            read = name in READ_ALONE or (name == "y_ptr" and "bwd" in launched.name)
            align = max(arguments["ALIGN"], arguments.get("LEAD", 1) if read else 1)
            allowed = min(16, size * min(align, each, tile[inner]))
            if widths[name][0] < allowed:
                found[name] = (widths[name][0], allowed)
    return found


def _narrow_products(
    launched: Recorded, widths: dict[str, list[int]]
) -> dict[str, tuple[int, int]]:
    """The same for the operands of a product, whose rows are (b, s)."""
    arguments = launched.arguments
    rows = arguments.get("BLOCK_B", 1) * arguments.get("BLOCK_S", 0)
    found = {}
    axes = (("x", "K"), ("dx", "K"), ("dy", "N"), ("y", "N"), ("z", "N"), ("h", "N"), ("h", "K"))
    for name, axis in axes:
        if rows and f"{name}_ptr" in widths and f"BLOCK_{axis}" in arguments:
            inner = axis if arguments.get("COLUMNS", True) else "S"
            size = arguments[f"{name}_ptr"].element_size()
            each = rows * arguments[f"BLOCK_{axis}"] // (32 * launched.options["num_warps"])
            fitting = min(arguments[f"ALIGN_{inner}"], arguments[f"BLOCK_{inner}"])
            allowed = min(16, size * min(fitting, max(each, 1)))
            if widths[f"{name}_ptr"][0] < allowed:
                found[f"{name}_ptr"] = (widths[f"{name}_ptr"][0], allowed)
    return found


def read_cubin(compiled: Any) -> tuple[int, int, int]:
    """(registers, stack bytes, bytes that a thread spills) as cuobjdump reports them.

    What is spilled is what stores to local memory, a part of the stack, write: the report's LOCAL
    stays 0.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        numbers = {name: int(n) for name, n in re.findall(r"(REG|STACK):(\d+)", usage)}
        code = _cuobjdump("-sass", file.name) if numbers["STACK"] else ""
    spilled = re.findall(r"\bSTL(?:\.(64|128))?\s", code)
    return numbers["REG"], numbers["STACK"], sum(int(bits or 32) // 8 for bits in spilled)


def _cuobjdump(*arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _read_amd(compiled: Any) -> tuple[int, int, int]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    return number("vgpr_count"), number("private_segment_fixed_size"), number("vgpr_spill_count")


def _amd_widths(text: str) -> dict[str, list[int]]:
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2}
    found = re.findall(r"(?:global|buffer)_(?:load|store)_(\w+?)(?:_d16\w*)?\s", text)
    return {"any": sorted(sizes[name] for name in found if name in sizes)}


def _occupancy(target: str, registers: int, shared: int, warps: int) -> float:
    """Share of a multiprocessor's threads that registers and shared memory leave resident."""
    per_sm, shared_limit, threads = LIMITS[target]
    size = 64 if target.startswith("gfx") else 32
    granule = -(-max(registers, 1) // 8) * 8
    programs = per_sm // (granule * size * warps)
    if shared:
        programs = min(programs, shared_limit // (shared + 1024))
    return min(programs * warps * size / threads, 1.0)


def report(codes: list[Code]) -> str:
    """A Markdown table a target."""
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    lines = [
        "# Generated code",
        "",
        f"Compiled without a device by {versions} on {platform.machine()}, for the launches that",
        "the benchmark grid makes on a device of 132 multiprocessors. Remake with `make codegen`.",
        "Widths: bytes of each load and store instruction of the large tensors × how many.",
        "",
    ]
    for target in dict.fromkeys(code.target for code in codes):
        lines += [
            f"## {target}",
            "",
            "| kernel | first used by | warps | registers | stack | spills | shared | occupancy "
            "| widths | features |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for code in sorted((c for c in codes if c.target == target), key=lambda c: c.kernel):
            large = {n: w for n, w in code.widths.items() if n in LARGE or n == "any"}
            widths = "; ".join(
                f"{name.removesuffix('_ptr')} "
                + " ".join(f"{size}×{count}" for size, count in sorted(Counter(w).items()))
                for name, w in large.items()
            )
            lines.append(
                f"| {code.kernel} | {code.case} | {code.warps} | {code.registers} | {code.stack} "
                f"| {code.spills} | {code.shared} | {code.occupancy:.0%} | {widths} "
                f"| {' '.join(code.features)} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--families", nargs="+", help="only these (default: all)")
    parser.add_argument(
        "--options", action="store_true", help="each option of each operation, not real shapes"
    )
    parser.add_argument("--first", action="store_true", help="each kernel once, in its first case")
    parser.add_argument("--out", type=Path, help="write the Markdown report here")
    parser.add_argument("--json", type=Path, help="write every figure here")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("codegen.py compiles: unset TRITON_INTERPRET")
    chosen = OPTION_CASES if arguments.options else CASES
    cases = [c for c in chosen if not arguments.families or c.family in arguments.families]
    codes = []
    for target in arguments.targets:
        found = specialisations(cases, target)
        if arguments.first:
            found = list({launch.name: (case, launch) for case, launch in reversed(found)}.values())
        codes += [inspect(case, launched, target) for case, launched in found]
    text = report(codes)
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(code) for code in codes], indent=1))


if __name__ == "__main__":
    main()
