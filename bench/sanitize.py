"""Run one small case of each kernel, for compute-sanitizer: few launches, every kernel.

    compute-sanitizer --tool memcheck python bench/sanitize.py

Launches are recorded first, on tensors without memory, and the fewest cases that together launch
every kernel are run. `--list` prints them and runs nothing.
"""

import argparse
import importlib
import pkgutil

import torch
from case import Case
from families.group_norm import GroupNormCase
from families.layer_norm import LayerNormCase
from families.linear_batch_norm import LinearBatchNormCase
from grid import SMALL_CASES
from launches import recording
from triton.runtime.jit import JITFunction

import fastnorm.kernels

LISTED = (
    *SMALL_CASES,
    LayerNormCase("looped rows", (192, 20000)),
    GroupNormCase("looped groups", (64, 64, 32, 33), num_groups=8),
    LinearBatchNormCase("joined", (4096, 33), features=41, joined=True),
)
"""Small cases, rows and groups too long for one tile but too many to be shared by programs, and a
product of the library's."""


def kernels() -> set[str]:
    """The names of all kernels of the library."""
    names = set()
    for module in pkgutil.iter_modules(fastnorm.kernels.__path__):
        if not module.ispkg:
            found = vars(importlib.import_module(f"fastnorm.kernels.{module.name}"))
            names |= {
                name
                for name, value in found.items()
                if isinstance(value, JITFunction) and name.endswith("_kernel")
            }
    return names


def chosen(cases: tuple[Case, ...] = LISTED) -> dict[Case, set[str]]:
    """Cases, each with the kernels that it is the first to launch, until none is left."""
    launched: dict[Case, set[str]] = {}
    for case in cases:
        with recording() as launches:
            case.forward_and_backward(case.inputs("meta"))
        launched[case] = {one.name for one in launches}
    found: dict[Case, set[str]] = {}
    left = set.union(*launched.values())
    while left:
        best = max(launched, key=lambda case: len(launched[case] & left))
        found[best] = launched[best] & left
        left -= launched[best]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="say which cases, and run none")
    options = parser.parse_args()
    for case, names in chosen().items():
        print(f"{case}: {', '.join(sorted(names))}", flush=True)
        if not options.list:
            case.forward_and_backward(case.inputs("cuda"))
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
