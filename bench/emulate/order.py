"""Put the blocks of a program where threads that part meet again.

Threads that are furthest behind go first (machine.py). Compilers put rare blocks at the end, from
where they jump back: whoever goes there would be ahead of all others. Here a block comes after all
that lead to it, and what is behind a loop comes after the loop.
"""

from emulate.parse import Instruction, Program, instruction


def ordered(program: Program) -> Program:
    starts = _starts(program)
    blocks = {
        start: program.instructions[start:end]
        for start, end in zip(starts, [*starts[1:], len(program.instructions)], strict=True)
    }
    ends = {start: start + len(block) for start, block in blocks.items()}
    following = {s: _following(program, block, ends[s]) for s, block in blocks.items()}
    order = _order(following)
    code: list[Instruction] = []
    places: dict[int, int] = {}
    for start, after in zip(order, [*order[1:], None], strict=True):
        places[start] = len(code)
        code += blocks[start]
        falls = not _ends(blocks[start][-1])
        if falls and ends[start] != after:
            code.append(instruction(f"bra at_{ends[start]}"))
    labels = {name: places[at] for name, at in program.labels.items() if at in places}
    labels |= {f"at_{start}": place for start, place in places.items()}
    return Program(tuple(code), labels)


def _ends(last: Instruction) -> bool:
    return last.opcode in ("bra", "ret") and last.guard is None


def _starts(program: Program) -> list[int]:
    count = len(program.instructions)
    jumps = [i for i, one in enumerate(program.instructions) if one.opcode in ("bra", "ret")]
    targets = {program.labels[program.instructions[i].operands[0]] for i in jumps
               if program.instructions[i].opcode == "bra"}  # fmt: skip
    return sorted({0, *targets, *(i + 1 for i in jumps if i + 1 < count)})


def _following(program: Program, block: tuple[Instruction, ...], end: int) -> list[int]:
    last = block[-1]
    found = [program.labels[last.operands[0]]] if last.opcode == "bra" else []
    return found if _ends(last) else [*found, end]


def _order(following: dict[int, list[int]]) -> list[int]:
    """Reverse postorder, in which what leads back to a block is left last, and so comes first."""
    reachable = {start: _reachable(following, start) for start in following}
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(_exits_first(0, following, reachable)))]
    while stack:
        start, left = stack[-1]
        for after in left:
            if after not in seen:
                seen.add(after)
                stack.append((after, iter(_exits_first(after, following, reachable))))
                break
        else:
            order.append(start)
            stack.pop()
    return order[::-1]


def _exits_first(
    start: int, following: dict[int, list[int]], reachable: dict[int, set[int]]
) -> list[int]:
    return sorted(following[start], key=lambda after: start in reachable[after])


def _reachable(following: dict[int, list[int]], start: int) -> set[int]:
    """Blocks that come after, `start` itself if it is in a loop."""
    found: set[int] = set()
    left = [start]
    while left:
        for after in following[left.pop()]:
            if after not in found:
                found.add(after)
                left.append(after)
    return found
