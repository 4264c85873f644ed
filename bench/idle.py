"""A GPU that is not there: Triton binds, compiles and launches as for it, and nothing runs.

    python bench/idle.py [--all]

runs a case of each family, or every option case, forward and backward on meta tensors, and prints
each kernel with its number of launches. What a launch is given is held against what was compiled:
a tensor's dtype, a number's kind and range. Whoever launches on a real GPU takes this very way.
"""

import argparse
import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from launches import TARGETS
from triton.backends.driver import DriverBase
from triton.runtime import driver

import fastnorm
from fastnorm import backend

TARGET = TARGETS["sm_90"]
DTYPES = {
    "*fp16": torch.float16, "*bf16": torch.bfloat16, "*fp32": torch.float32,
    "*fp64": torch.float64, "*i32": torch.int32, "*i64": torch.int64,
}  # fmt: skip
RANGES = {"i32": 31, "i64": 63}
REALS = ("fp32", "fp64")

Launch = Callable[[str, tuple[int, ...]], None]


def fits(value: object, kind: str) -> bool:
    """Whether a launcher in C can pass `value` where the compiled kernel has a `kind`."""
    if kind == "constexpr":
        return True
    if kind in DTYPES:
        return isinstance(value, torch.Tensor) and value.dtype is DTYPES[kind]
    if kind in RANGES:
        return type(value) is int and -(2 ** RANGES[kind]) <= value < 2 ** RANGES[kind]
    return kind in REALS and type(value) is float


def _launcher(launched: Launch) -> type:
    class Launcher:
        def __init__(self, source: Any, metadata: object) -> None:
            self.name, self.signature = source.fn.__name__, source.signature

        def __call__(self, *arguments: Any) -> None:
            x, y, z, _stream, _function, *_metadata_and_hooks = arguments[: -len(self.signature)]
            given = arguments[-len(self.signature) :]
            for (name, kind), value in zip(self.signature.items(), given, strict=True):
                if not fits(value, kind):
                    raise TypeError(f"{self.name}: {name} is compiled as {kind}, got {value!r}")
            if not (0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16):
                raise ValueError(f"{self.name}: no device takes a grid of {(x, y, z)}")
            launched(self.name, (x, y, z))

    return Launcher


class _Utils:
    """What Triton asks of a binary: its handles, registers, spills and threads."""

    def load_binary(self, *arguments: object) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32}


class IdleDriver(DriverBase):
    """Calls `launched` with the name of each kernel and its grid."""

    def __init__(self, launched: Launch) -> None:
        self.utils, self.launcher_cls = _Utils(), _launcher(launched)

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> Any:
        return TARGET

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing runs here, and so nothing can be timed")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _allowed(tensor: torch.Tensor) -> None:
    """No mock, which would take its time in each call that bench_calls.py measures."""


@contextlib.contextmanager
def idle(launched: Launch = lambda name, grid: None) -> Iterator[None]:
    """Within the block CPU and meta tensors take the kernels, as far as their launch."""
    before = driver._active
    driver.set_active(IdleDriver(launched))
    try:
        with (
            mock.patch.object(backend, "_require_triton", _allowed),
            fastnorm.use_backend("triton"),
        ):
            yield
    finally:
        driver._active = before


def main() -> None:
    from grid import OPTION_CASES, SMALL_CASES

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--all", action="store_true", help="every option case")
    cases = OPTION_CASES
    if not parser.parse_args().all:
        cases = tuple({case.family: case for case in reversed(SMALL_CASES)}.values())
    found: Counter[str] = Counter()

    def launched(name: str, grid: tuple[int, ...]) -> None:
        found[name] += 1

    with idle(launched):
        for case in cases:
            case.forward_and_backward(case.inputs("meta"))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
