"""Record kernel launches without running them, and compile what was recorded for any target.

Works in a process in which Triton is not interpreting. Tensors are on the meta device, so a launch
of any size costs nothing; the launchers plan as for the device given to `devices.assume`.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, MockTensor, create_function_from_signature

from fastnorm import backend
from fastnorm.kernels import devices

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
H200 = devices.Device(multiprocessors=132)
DEVICES = {  # as large as an H200, so that targets differ by their architecture alone
    "sm_80": replace(H200, shared=163 << 10, wgmma=False),
    "sm_90": H200,
    "sm_100": replace(H200, wgmma=False),
    "sm_120": replace(H200, shared=99 << 10, wgmma=False),
    "gfx942": replace(H200, shared=64 << 10, wgmma=False, limits=False),
}


@dataclass
class Recorded:
    """One launch: the kernel, its grid, and its arguments by name."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def specialisation(self, target: GPUTarget) -> tuple[Any, ...]:
        """(options, signature, constexprs, attrs): what Triton itself would compile for."""
        maker = make_backend(target)
        binder = create_function_from_signature(self.kernel.signature, self.kernel.params, maker)
        mocked = {
            name: MockTensor(value.dtype) if isinstance(value, Tensor) and value.is_meta else value
            for name, value in self.arguments.items()
        }
        bound, kinds, options = binder(**mocked, **self.options)
        packed: tuple[Any, ...] = self.kernel._pack_args(
            maker, {**options, "debug": False}, bound, kinds, None
        )
        return packed

    def key(self, target: GPUTarget) -> str:
        """Equal for launches that share their compiled code."""
        options, signature, constexprs, attrs = self.specialisation(target)
        limit = getattr(options, "maxnreg", None)
        return repr((self.name, options.num_warps, limit, signature, constexprs, attrs))

    def compiled(self, target: GPUTarget) -> Any:
        options, signature, constexprs, attrs = self.specialisation(target)
        source = ASTSource(self.kernel, signature, constexprs, attrs)
        return triton.compile(source, target=target, options=options.__dict__)


@contextlib.contextmanager
def running(run: Callable[[Recorded], None], device: devices.Device) -> Iterator[None]:
    """Within the block tensors of any device take the kernels; `run` is given each launch."""

    def launch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [parameter.name for parameter in self.params]
        arguments = dict(zip(names, args, strict=False))
        arguments |= {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        run(Recorded(self, tuple(grid), arguments, kwargs))

    with (
        _replaced(JITFunction, "run", launch),
        _replaced(backend, "_require_triton", lambda tensor: None),
        backend.use_backend("triton"),
        devices.assume(device),
    ):
        yield


@contextlib.contextmanager
def recording(device: devices.Device = H200) -> Iterator[list[Recorded]]:
    """Within the block launches are listed instead of run."""
    launches: list[Recorded] = []
    with running(launches.append, device):
        yield launches


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
