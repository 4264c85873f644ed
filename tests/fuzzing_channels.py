"""Random calls of norms by channel: batch norm, group norm, instance norm."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from fuzzing import Bounds, Call, near_a_kink
from torch import Tensor

import fastnorm

if torch.cuda.is_available():
    checked = contextlib.nullcontext
else:
    from checker import checked

WAYS = ("shipped", "small", "small, many programs", "huge")
"""All but the first with constants that make small tensors take the ways of large ones."""


@contextlib.contextmanager
def constants(way: str, *eager: tuple[object, Mapping[str, object]]) -> Iterator[None]:
    """Within it those of `eager` modules, and of the launch policy, that belong to a `way`."""
    with contextlib.ExitStack() as stack:

        def put(owner: object, values: Mapping[str, object]) -> None:
            for name, value in values.items():
                stack.enter_context(mock.patch.object(owner, name, value))

        if way != "shipped":
            for owner, values in eager:
                put(owner, values)
        if way != "shipped" and fastnorm.backend_for(torch.ones(1)) == "triton":
            from fastnorm.kernels import (
                batch_norm,
                channel_plans,
                devices,
                group_norm,
                group_plans,
                launch,
                run_plans,
            )

            for plans in (channel_plans, group_plans):
                put(plans, {"TILE_BYTES": 512, "WHOLE_BYTES": 1024})
            put(launch, {"TILE_BYTES": 512})
            put(channel_plans, {"PLANE_COLUMNS": (8, 64)})
            put(group_plans, {"GROUP_LANES": 32})
            put(run_plans, {"WHOLE_BYTES": 1024, "TILE_BYTES": 256})
            put(run_plans, {"RUN_BYTES": 2048, "RUN_BYTES_BACKWARD": 1024})
            put(run_plans, {"KEPT_RUN": 32, "WIDEST_ROW": 128, "WIDEST_ROW_BACKWARD": 64})
            put(batch_norm, {"MERGE_PARTIALS": 4})
            put(group_norm, {"GROUP_MERGE_PARTIALS": 4, "MERGE_PARTIALS": 4})
            programs = 64 if way == "small, many programs" else 2
            stack.enter_context(devices.assume(devices.Device(programs)))
        yield


class ChannelCall(Call, ABC):
    """The tensors of a case, the call, and what float64 says."""

    def __init__(self, case: Any, device: torch.device) -> None:
        super().__init__(case, device)
        C = case.shape[1]
        self.x = self.large(self.draw(*case.shape) + case.offset, case.dtype, case.layout)
        self.weight = self.vector(self.draw(C) * 0.5 + 1, case.weight, case.vector_layout)
        self.bias = self.vector(self.draw(C), case.bias, case.vector_layout)
        # a buffer of which all elements are one cannot be written
        layout = "sliced" if case.vector_layout == "expanded" else case.vector_layout
        self.mean = self.vector(self.draw(C), case.running, layout)
        self.var = self.vector(self.draw(C).abs() + 0.5, case.running, layout)
        self.residual = None
        if isinstance(case.residual, torch.dtype):
            values = self.draw(*case.shape) * 2
            self.residual = self.large(values, case.residual, case.residual_layout)
        elif case.residual == "x":
            self.residual = self.x
        self.y_dtype = case.dtype
        if self.residual is not None:
            self.y_dtype = torch.promote_types(case.dtype, self.residual.dtype)
        self.dy = self.large(self.draw(*case.shape), self.y_dtype, case.dy_layout)

    def takes_kernels(self, device: torch.device) -> bool:
        """On Triton's backend, a float64 residual of a narrower input is left to eager."""
        narrow = self.y_dtype is torch.float64 is not self.case.dtype
        return fastnorm.backend_for(torch.ones(1, device=device)) == "triton" and not narrow

    @abstractmethod
    def normalize(self, leaves: dict[str, Tensor], residual: Tensor | None) -> Tensor:
        """The function that is tested."""

    @abstractmethod
    def exact(
        self, leaves: dict[str, Tensor], residual: Tensor | None, activation: str
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Output and buffers in float64."""

    def ours(self) -> dict[str, Tensor]:
        """Output, wanted gradients and buffers; the arguments are unchanged but for the buffers."""
        leaves = {
            n: t.detach().requires_grad_(n in self.case.wanted) for n, t in self.leaves().items()
        }
        before = {n: t.detach().clone() for n, t in (leaves | {"dy": self.dy}).items()}
        y = self.normalize(leaves, self._residual(leaves))
        assert y.requires_grad == bool(self.wanted())
        found = self._found(leaves, y, self.mean, self.var, self.dy)
        for name, tensor in before.items():
            now = self.dy if name == "dy" else leaves[name].detach()
            assert torch.equal(now, tensor), f"{name} was written to"
        return found

    def want(self) -> dict[str, Tensor]:
        """The same in float64."""
        leaves = {n: t.detach().double().requires_grad_() for n, t in self.leaves().items()}
        y, mean, var = self.exact(leaves, self._residual(leaves), self.case.activation)
        return self._found(leaves, y, mean, var, self.dy.double())

    def z(self) -> Tensor:
        """What the activation sees, in float64."""
        leaves = {n: t.detach().double() for n, t in self.leaves().items()}
        return self.exact(leaves, self._residual(leaves), "identity")[0]

    def _residual(self, leaves: dict[str, Tensor]) -> Tensor | None:
        return leaves["x"] if self.residual is self.x else leaves.get("residual")

    def _found(
        self,
        leaves: dict[str, Tensor],
        y: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        dy: Tensor,
    ) -> dict[str, Tensor]:
        found = {"y": y.detach(), "running_mean": mean, "running_var": var}
        names = self.wanted()
        if names:
            gradients = torch.autograd.grad(y, [leaves[n] for n in names], dy)
            found |= {f"d{n}": g for n, g in zip(names, gradients, strict=True)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


class ChannelBounds(Bounds, ABC):
    """With what is stored in between, by the kernels or by torch's operators."""

    def __init__(self, call: ChannelCall, kernels: bool) -> None:
        super().__init__(call)
        case = call.case
        if kernels:
            if call.residual is not None and case.activation != "identity":
                self.between_dz = torch.finfo(call.y_dtype).eps
        elif case.dtype in (torch.float16, torch.bfloat16):
            eps = torch.finfo(case.dtype).eps
            self.between = 0.0 if case.way == "shipped" else 2 * eps
            self.between_dz = 3 * eps

    def columns(self, each: Tensor, ndim: int) -> Tensor:
        """(C,) or (N, C), to broadcast over (N, C, *)."""
        each = each if each.ndim == 2 else each[None]
        return each.reshape(*each.shape, *[1] * (ndim - 2))

    @abstractmethod
    def allowed(self, name: str, got: Tensor, want: dict[str, Tensor]) -> Tensor:
        """Absolute error of each channel, or of each sample and channel."""


def avoid_kinks(call: ChannelCall, bounds: ChannelBounds) -> None:
    """Set dy to 0 where z is so near a kink that rounding decides."""
    z = call.z()
    band = bounds.uncertainty() + 2 * torch.finfo(call.y_dtype).smallest_normal
    near = near_a_kink(call.case.activation, z, bounds.columns(band, z.ndim))
    if near.any():
        if call.case.dy_layout == "expanded":
            call.dy = call.dy.contiguous()
        call.dy[near] = 0


def judge(
    call: ChannelCall,
    bounds: ChannelBounds,
    taking: Callable[[str], contextlib.AbstractContextManager[None]],
) -> None:
    """Run the call; compare values, dtypes, shapes and memory format."""
    case = call.case
    avoid_kinks(call, bounds)
    want = call.want()
    with taking(case.way), checked():
        got = call.ours()
    assert got.keys() == want.keys()
    assert got["y"].dtype is call.y_dtype
    for name, leaf in call.leaves().items():
        if f"d{name}" in got:
            assert got[f"d{name}"].dtype is leaf.dtype, name
            assert got[f"d{name}"].shape == leaf.shape, name
    for kind in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d):
        ndim = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(kind, len(case.shape))
        if ndim == len(case.shape) and call.x.is_contiguous(memory_format=kind):
            assert got["y"].is_contiguous(memory_format=kind), "the memory format is kept"
    for name, value in got.items():
        allowed = bounds.allowed(name, value, want)
        if value.ndim > 1:
            allowed = bounds.columns(allowed, value.ndim)
        worst = bounds.worst(value, want[name], allowed)
        assert worst <= 1, f"{name}: error {worst:.3g} times what is allowed"
