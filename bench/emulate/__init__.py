"""Run compiled kernels without a device: their PTX, instruction by instruction, on CPU tensors.

    with emulating():
        y = fastnorm.functional.layer_norm(x, (16,))

Triton's interpreter runs a kernel's source; this runs what Triton has made of it: layouts,
exchanges through shared memory, loads ahead, barriers, predicates, approximate instructions. It
refuses what compute-sanitizer would: an access beyond the launch's tensors, or not aligned to its
size; words of shared memory that two warps use without a barrier between them; a barrier that some
threads do not reach. What is copied asynchronously is NaN until it has been waited for.

Where PTX leaves a result open, a `seed` chooses: approximate instructions are wrong at random, by
no more than their manual allows, and a product and a sum that ptxas may contract are contracted.

Not modelled: the order of sums within a matrix product, products that are still under way, time.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from launches import DEVICES, TARGETS, Recorded, running
from torch import Tensor

from emulate import accesses, computing, warpgroup
from emulate.arithmetic import Rounding
from emulate.machine import CONTROL, Machine, Step
from emulate.memory import Global
from emulate.order import ordered
from emulate.parse import Instruction, Program, parse

LANES = 4096  # of a machine: arrays that the caches hold
REALS: dict[str, tuple[Any, type]] = {
    "fp32": (np.float32, np.uint32),
    "fp64": (np.float64, np.uint64),
}
_DECODERS = computing.DECODERS | accesses.DECODERS | warpgroup.DECODERS


def decode(i: Instruction) -> Step | None:
    """None for control flow, which a machine sees to itself."""
    if i.opcode in CONTROL:
        return None
    if i.opcode not in _DECODERS:
        raise NotImplementedError(f"the emulator does not know: {i.text}")
    step = _DECODERS[i.opcode](i)
    return step if i.guard is None else lambda m: m.only(i, step)


@functools.lru_cache(256)
def decoded(ptx: str) -> tuple[Program, list[Step | None]]:
    program = ordered(parse(ptx))
    return program, [decode(i) for i in program.instructions]


def parameters_of(signature: dict[str, str], arguments: dict[str, Any]) -> list[int]:
    """The bits of each parameter of an entry; two pointers to scratch memory end them."""
    found = []
    for name, kind in signature.items():
        if kind == "constexpr":
            continue
        value = arguments[name]
        if isinstance(value, Tensor):
            value = value.data_ptr()
        elif kind in REALS:
            number, bits = REALS[kind]
            value = int(number(value).view(bits))
        found.append(value)
    return [*found, 0, 0]


def run(
    ptx: str,
    grid: Sequence[int],
    warps: int,
    parameters: Sequence[int],
    tensors: Sequence[Tensor],
    shared: int = 0,
    seed: int | None = None,
) -> None:
    """Run a kernel on the memory of some tensors, and on `shared` bytes a program."""
    program, steps = decoded(ptx)
    memory, threads = Global(tensors), 32 * warps
    together, programs = max(LANES // threads, 1), math.prod(grid)
    with np.errstate(all="ignore"):
        for first in range(0, programs, together):
            machine = Machine(
                first, min(together, programs - first), grid, threads, parameters, memory, shared,
                Rounding(seed),
            )  # fmt: skip
            machine.run(program, steps)


def emulate(launched: Recorded, target: str, seed: int | None) -> None:
    """Compile a launch, and run it on the memory of its tensors."""
    compiled = launched.compiled(TARGETS[target])
    run(
        compiled.asm["ptx"],
        launched.grid,
        compiled.metadata.num_warps,
        parameters_of(compiled.src.signature, launched.arguments),
        [value for value in launched.arguments.values() if isinstance(value, Tensor)],
        compiled.metadata.shared,
        seed,
    )


@contextlib.contextmanager
def emulating(
    target: str = "sm_90", multiprocessors: int = 2, seed: int | None = 0
) -> Iterator[None]:
    """Within the block kernels run here, as on a GPU of so many multiprocessors."""

    def launch(launched: Recorded) -> None:
        emulate(launched, target, seed)

    with running(launch, replace(DEVICES[target], multiprocessors=multiprocessors)):
        yield
