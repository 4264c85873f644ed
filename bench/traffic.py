"""Count the bytes that every operation moves, over the minimum of its mathematics.

`python bench/traffic.py --out bench/results/traffic.md` runs the small cases of the grid in
Triton's interpreter and counts what every launch loads and stores: distinct addresses per launch
(what must come from memory), raw beside them (what caches absorb), and what torch operators move.
For the benchmark's own shapes, too large to interpret, the bytes of parameters, statistics and
partial sums are added up from the launches' arguments.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from case import Case
from grid import CASES, LARGE, SMALL_CASES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastnorm.kernels.launch import ON_A_FLAG

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # where the interpreter's support lives

BOUNDS = {True: 1.05, False: 1.10}  # one program an index set; split
SMALL_SHARE = (
    0.05  # of the total, for parameters, statistics and partials of the benchmark's shapes
)
SMALL_SHARE_FROM = 1 << 20  # bytes of the input: below, launches and not bytes cost the time


@dataclass(frozen=True)
class Count:
    """Bytes of one direction of one case."""

    case: str
    direction: str
    launches: int
    large: int  # distinct bytes of the tensors of the input's size
    raw: int  # the same with repeated reads
    small: int  # distinct bytes of parameters, statistics and partials
    between: int  # moved by torch operators
    minimum: int
    bound: float

    @property
    def ratio(self) -> float:
        return (self.large + self.between) / self.minimum


class Operators(TorchDispatchMode):
    """Bytes that torch operators other than views and allocations read and write.

    A mode that counts is no graph being recorded: launchers are called as for anyone else. As
    operators of torch.library they would be counted again, and their own products not be seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._unseen = mock.patch("fastnorm.eager.native.observed", return_value=False)

    def __enter__(self) -> "Operators":
        self._unseen.start()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._unseen.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(("empty", "new_empty")) and name != "detach":
            out = (kwargs or {}).get("out")  # given, but not read
            for leaf in [*tree_leaves((args, kwargs)), *tree_leaves(result)]:
                if isinstance(leaf, torch.Tensor) and leaf is not out:
                    self.bytes += leaf.numel() * leaf.element_size()
            if out is not None:
                self.bytes += out.numel() * out.element_size()
        return result


def count(case: Case) -> list[Count]:
    """Forward and backward of one case, in the interpreter."""
    import interpreter

    import fastnorm

    tensors = case.inputs("cpu")
    halves: list[tuple[list[Any], int]] = []

    def half() -> None:
        halves.append((list(launches), operators.bytes))
        launches.clear()
        operators.bytes = 0

    with fastnorm.use_backend("triton"), interpreter.trace() as launches, Operators() as operators:
        case.forward_and_backward(tensors, between=half)
        half()
    whole = [_is_whole(done) for done, _ in halves]
    minimum = [passes * case.element_bytes for passes in case.minimum_passes(*whole)]
    return [
        _count(case, direction, done, moved, least, one)
        for direction, (done, moved), least, one in zip(
            ("forward", "backward"), halves, minimum, whole, strict=True
        )
    ]


def _is_whole(launches: list[Any]) -> bool:
    """Whether one launch does everything to the large tensors."""
    return sum(any(name in LARGE for name in launch.traffic()) for launch in launches) == 1


def _count(
    case: Case, direction: str, launches: list[Any], between: int, minimum: int, whole: bool
) -> Count:
    large = raw = small = 0
    for launch in launches:
        for name, (loaded, stored, raw_loaded, raw_stored) in launch.traffic().items():
            if name in LARGE:
                large += loaded + stored
                raw += raw_loaded + raw_stored
            else:
                small += loaded + stored
    return Count(
        str(case), direction, len(launches), large, raw, small, between, minimum, BOUNDS[whole]
    )


def planned_share(case: Case) -> tuple[int, int]:
    """(bytes of small arguments, bytes of large ones) of a case's launches, without running them.

    A tensor counts whole for each launch that is given it, at least what it loads or stores; but a
    launch that waits for a flag moves nothing where that is down, as it nearly always is.
    """
    from launches import recording

    tensors = case.inputs("meta")
    with recording() as launches:
        case.forward_and_backward(tensors)
    small = large = 0
    for launched in launches:
        if any(launched.arguments.get(name) is not None for name in ON_A_FLAG):
            continue
        for name, value in launched.arguments.items():
            if isinstance(value, torch.Tensor):
                size = value.numel() * value.element_size()
                small, large = (small, large + size) if name in LARGE else (small + size, large)
    return small, large


def planned() -> dict[str, tuple[int, int]]:
    """`planned_share` of every benchmark case, in a process whose Triton does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__, "--planned"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    shares: dict[str, tuple[int, int]] = json.loads(done.stdout)
    return shares


def report(counts: list[Count], shares: dict[str, tuple[int, int]]) -> str:
    import triton

    lines = [
        "# Bytes moved",
        "",
        f"Counted in Triton's interpreter (torch {torch.__version__}, triton "
        f"{triton.__version__}); no GPU was involved. Remake with `make traffic`.",
        "Ratio: distinct bytes of the large tensors and of torch operators in between, over the",
        "minimum (`Case.minimum_passes` in bench/grid.py). Raw: with repeated reads.",
        "",
        "| case | direction | launches | large | raw | small | between | minimum | ratio | bound |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for c in counts:
        lines.append(
            f"| {c.case} | {c.direction} | {c.launches} | {c.large} | {c.raw} | {c.small} "
            f"| {c.between} | {c.minimum} | {c.ratio:.3f} | {c.bound} |"
        )
    lines += [
        "",
        "## Parameters, statistics and partials at the benchmark's shapes",
        "",
        "From the launch configurations on a device of 132 multiprocessors, forward and backward.",
        "",
        "| case | small bytes | large bytes | share |",
        "|---|---|---|---|",
    ]
    for case, (small, large) in shares.items():
        lines.append(f"| {case} | {small} | {large} | {small / (small + large):.2%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the Markdown report here")
    parser.add_argument("--planned", action="store_true", help="print the planned shares as JSON")
    arguments = parser.parse_args()
    if arguments.planned:
        print(json.dumps({str(case): planned_share(case) for case in CASES}))
        return
    os.environ["TRITON_INTERPRET"] = "1"
    counts = [found for case in SMALL_CASES for found in count(case)]
    text = report(counts, planned())
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
