"""Programs of a launch, all threads in step: each register is an array with a number a thread.

Threads that part at a branch go on in fragments; the one that is furthest behind goes first, and
meets the others where they wait.
"""

from collections.abc import Callable, Sequence

import numpy as np

from emulate.arithmetic import Rounding
from emulate.memory import AccessError, Copy, Global, Shared
from emulate.numbers import POISON, REGISTERS, Array, literal, of_bits
from emulate.parse import Instruction, Program

CONTROL = ("bra", "ret")


def register_type(name: str) -> type:
    return REGISTERS[name.rstrip("0123456789")]


class Machine:
    """The state of some programs of a launch."""

    def __init__(
        self,
        first: int,
        programs: int,
        grid: Sequence[int],
        threads: int,
        parameters: Sequence[int],
        memory: Global,
        shared_bytes: int,
        rounding: Rounding,
    ) -> None:
        lanes = np.arange(programs * threads)
        self.lanes, self.threads = len(lanes), threads
        self.memory, self.rounding, self.parameters = memory, rounding, parameters
        self.shared = Shared(programs, shared_bytes, threads)
        self.active = np.ones(self.lanes, bool)
        self.all_active = True
        self.registers: dict[str, Array] = {
            "%tid.x": (lanes % threads).astype(np.uint32),
            "global_smem": np.zeros(self.lanes, np.uint32),
        }
        program = first + lanes // threads
        for axis, size in zip("xyz", (*grid, 1, 1), strict=False):
            self.registers[f"%ctaid.{axis}"] = (program % size).astype(np.uint32)
            program = program // size
        self.products: dict[str, tuple[Array, Array]] = {}  # factors of what a register has
        self.copies: list[list[Copy]] = [[]]  # groups of asynchronous copies, the last one open

    def bits(self, operand: str, kind: str) -> Array:
        """The bits of a register, or of a number, which has one for all lanes."""
        if operand in self.registers:
            return self.registers[operand]
        if operand.startswith("%"):  # nobody has written it
            width = np.dtype(register_type(operand))
            return np.full(self.lanes, POISON % 2 ** (8 * width.itemsize), width)
        return literal(operand, kind)

    def value(self, operand: str, kind: str) -> Array:
        return of_bits(self.bits(operand, kind), kind)

    def of_each(self, operand: str, kind: str) -> Array:
        return np.broadcast_to(self.bits(operand, kind), (self.lanes,))

    def write(self, name: str, bits: Array) -> None:
        """Of the lanes that are here."""
        if name == "_":
            return
        self.products.pop(name, None)
        width = register_type(name)
        if bits.dtype != width:
            bits = bits.astype(width)
        if bits.shape != (self.lanes,):
            bits = np.broadcast_to(bits, (self.lanes,))
        if not self.all_active:
            bits = np.where(self.active, bits, self.bits(name, ""))
        self.registers[name] = bits

    def write_some(self, name: str, lanes: Array, bits: Array) -> None:
        """Of the lanes with these numbers alone."""
        if name == "_":
            return
        if len(lanes) < self.lanes:
            every = self.bits(name, "").copy()
            every[lanes] = bits
            bits = every
        self.products.pop(name, None)
        self.registers[name] = bits.astype(register_type(name), copy=False)

    def guarded(self, instruction: Instruction) -> Array:
        """Lanes that are here, and whose guard lets them."""
        if instruction.guard is None:
            return self.active
        guard = self.bits(instruction.guard, "pred") ^ instruction.unless
        return guard if self.all_active else guard & self.active

    def only(self, instruction: Instruction, step: "Step") -> None:
        """A step of the lanes whose guard lets them."""
        here, everywhere = self.active, self.all_active
        self.active = self.guarded(instruction)
        if self.active.any():
            self.all_active = bool(self.active.all())
            step(self)
        self.active, self.all_active = here, everywhere

    def whole_warps(self, instruction: Instruction) -> None:
        warps = self.active.reshape(-1, 32)
        if not self.all_active and (warps.any(1) & ~warps.all(1)).any():
            raise AccessError(f"not all lanes of a warp come to: {instruction.text}")

    def barrier(self, instruction: Instruction) -> None:
        here = self.active.reshape(-1, self.threads)
        whole = here.all(1)
        if (here.any(1) & ~whole).any():
            raise AccessError(f"not all threads of a program come to: {instruction.text}")
        self.shared.barrier(whole)

    def run(self, program: Program, steps: Sequence["Step | None"]) -> None:
        """Until every lane has returned. `steps` are the program's, None where control flows."""
        waiting = {0: self.active}
        end = len(steps)
        while waiting:
            at = min(waiting)
            self.active = waiting.pop(at)
            self.all_active = bool(self.active.all())
            limit = min(waiting, default=end)
            while at < limit:
                step = steps[at]
                at += 1
                if step is not None:
                    step(self)
                    continue
                jump = program.instructions[at - 1]
                taken = self.guarded(jump)
                if not taken.any():
                    continue
                if jump.opcode == "bra":
                    _join(waiting, program.labels[jump.operands[0]], taken)
                rest = self.active & ~taken
                if rest.any():
                    _join(waiting, at, rest)
                break
            else:
                _join(waiting, at, self.active)


Step = Callable[[Machine], None]


def _join(waiting: dict[int, Array], at: int, lanes: Array) -> None:
    waiting[at] = waiting[at] | lanes if at in waiting else lanes
