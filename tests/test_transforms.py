"""torch.func, forward-mode AD and second derivatives of every operation, against float64."""

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeAlias

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastnorm
import fastnorm.functional as FF

# of the input and the parameters
Function: TypeAlias = Callable[..., Tensor]


def ignore_torchs_warnings(test: Any) -> Any:
    for message in ("`torch.jit.script` is deprecated", "Attempted to insert a get_attr Node"):
        test = pytest.mark.filterwarnings(f"ignore:{message}")(test)
    return test


MEAN = torch.tensor([0.3, -1.0], dtype=torch.float64)
VAR = torch.tensor([0.7, 2.0], dtype=torch.float64)
SMALL, VECTOR = (3, 2, 2), (2,)


def _batch_norm(training: bool, activation: str) -> tuple[Function, Function]:
    def ours(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        buffers = (None, None) if training else (MEAN.to(x.device), VAR.to(x.device))
        return FF.batch_norm(
            x, *buffers, weight, bias, training, residual=residual, activation=activation
        )

    def theirs(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        options = (training, 0.1, 1e-5, residual, activation)
        return reference.batch_norm(x, MEAN, VAR, weight, bias, *options)[0]

    return ours, theirs


def _instance_norm() -> tuple[Function, Function]:
    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.instance_norm(
            x, None, None, weight, bias, True, 0.1, 1e-5, None, "sigmoid"
        )[0]

    return lambda x, w, b: FF.instance_norm(x, None, None, w, b, activation="sigmoid"), theirs


def _added(ours: Any, center: bool) -> tuple[Function, Function]:
    def both(x: Tensor, residual: Tensor, *parameters: Tensor) -> Tensor:
        y, total = ours(x, residual, VECTOR, *parameters, eps=1e-3, activation="tanh")
        return y * total

    def theirs(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        total = x + residual
        return reference.layer_norm(total, 1, weight, bias, 1e-3, "tanh", center) * total

    return both, theirs


def _linear(algorithm: str, training: bool) -> tuple[Function, Function]:
    def ours(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        buffers = (None, None) if training else (MEAN.to(x.device), VAR.to(x.device))
        return FF.linear_batch_norm(
            x, weight, bias, *buffers, gamma, beta, training,
            activation="tanh", algorithm=algorithm,
        )  # fmt: skip

    def theirs(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return reference.linear_batch_norm(
            x, weight, bias, MEAN, VAR, gamma, beta, training, 0.1, 1e-5, "tanh"
        )[0]

    return ours, theirs


def _convolution() -> tuple[Function, Function]:
    def ours(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return FF.conv_batch_norm(
            x, weight, None, None, None, gamma, beta, True, activation="sigmoid"
        )

    def theirs(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        z = F.conv1d(x, weight)
        return reference.batch_norm(z, None, None, gamma, beta, True, 0.1, 1e-5, None, "sigmoid")[0]

    return ours, theirs


LINEAR = ((4, 3), (2, 3), VECTOR, VECTOR, VECTOR)
OPERATIONS: dict[str, tuple[tuple[Function, Function], tuple[tuple[int, ...], ...]]] = {
    "batch_norm": (_batch_norm(True, "tanh"), (SMALL, VECTOR, VECTOR, SMALL)),
    "batch_norm, relu": (_batch_norm(True, "relu"), (SMALL, VECTOR, VECTOR, SMALL)),
    "batch_norm, eval": (_batch_norm(False, "gelu"), (SMALL, VECTOR, VECTOR, SMALL)),
    "instance_norm": (_instance_norm(), ((2, 2, 3), VECTOR, VECTOR)),
    "group_norm": (
        (
            lambda x, w, b, r: FF.group_norm(x, 2, w, b, residual=r, activation="elu"),
            lambda x, w, b, r: reference.group_norm(x, 2, w, b, 1e-5, r, "elu"),
        ),
        ((2, 4, 2), (4,), (4,), (2, 4, 2)),
    ),
    "layer_norm": (
        (
            lambda x, w, b: FF.layer_norm(x, w.shape, w, b, activation="gelu_tanh"),
            lambda x, w, b: reference.layer_norm(x, w.ndim, w, b, 1e-5, "gelu_tanh"),
        ),
        ((3, 4), (4,), (4,)),
    ),
    "rms_norm": (
        (
            lambda x, w: FF.rms_norm(x, w.shape, w, 1e-3, activation="hardswish"),
            lambda x, w: reference.layer_norm(x, w.ndim, w, None, 1e-3, "hardswish", False),
        ),
        ((3, 2, 2), (2, 2)),
    ),
    "add_layer_norm": (_added(FF.add_layer_norm, True), ((4, 2), (4, 2), VECTOR, VECTOR)),
    "add_rms_norm": (_added(FF.add_rms_norm, False), ((4, 2), (4, 2), VECTOR)),
    **{
        f"linear_batch_norm, {algorithm}": (_linear(algorithm, True), LINEAR)
        for algorithm in ("auto", "gram", "epilogue", "unfused")
    },
    "linear_batch_norm, gram, eval": (_linear("gram", False), LINEAR),
    "linear_batch_norm, epilogue, eval": (_linear("epilogue", False), LINEAR),
    "conv_batch_norm": (_convolution(), ((2, 2, 4), (2, 2, 2), VECTOR, VECTOR)),
    "conv_batch_norm, 1": (_convolution(), ((2, 2, 3), (2, 2, 1), VECTOR, VECTOR)),
}


# ---- what is done with a function, and gives tensors ---------------------------------------------
def _scalar(f: Function) -> Function:
    return lambda *a: f(*a).sin().sum()


def _everything(a: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(a)))


def _tangents(a: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.cos(3 * t) for t in a)


def _copies(a: tuple[Tensor, ...], batched: tuple[bool, ...]) -> tuple[Tensor, ...]:
    return tuple(
        torch.stack([t, t * 1.5 - 0.2, 0.3 - t]) if many else t
        for t, many in zip(a, batched, strict=True)
    )


def _vmap(f: Callable[..., Any], a: tuple[Tensor, ...], batched: tuple[bool, ...]) -> Any:
    return torch.func.vmap(f, tuple(0 if many else None for many in batched))(*_copies(a, batched))


def _first(a: tuple[Tensor, ...]) -> tuple[bool, ...]:
    return (True, *[False] * (len(a) - 1))


def _leaves(a: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.clone().requires_grad_() for t in a)


def _duals(f: Function, a: tuple[Tensor, ...]) -> Any:
    """Forward mode, and the gradient of its result."""
    leaves = _leaves(a)
    with forward_ad.dual_level():
        pairs = zip(leaves, _tangents(a), strict=True)
        y = forward_ad.unpack_dual(f(*(forward_ad.make_dual(t, v) for t, v in pairs)))
        mixed = (y.primal * 2 + y.tangent).sin().sum()
        return y.tangent, torch.autograd.grad(mixed, leaves)


def _dual_through_backward(f: Function, a: tuple[Tensor, ...]) -> Any:
    """The forward is done before; the gradient that arrives has a tangent."""
    leaves = _leaves(a)
    y = f(*leaves)
    with forward_ad.dual_level():
        dy = forward_ad.make_dual(y.detach().cos(), y.detach() + 1)
        gradients = torch.autograd.grad(y, leaves, dy)
        tangents = [forward_ad.unpack_dual(g).tangent for g in gradients]
    return [torch.zeros_like(t) if v is None else v for t, v in zip(a, tangents, strict=True)]


def _many_gradients(f: Function, a: tuple[Tensor, ...]) -> Any:
    """Those of several dy at a time, as torch.autograd.functional.jacobian asks for them."""
    leaves = _leaves(a)
    y = f(*leaves)
    dys = torch.stack([y.detach().cos(), y.detach() + 1])
    return torch.autograd.grad(y, leaves, dys, is_grads_batched=True)


def _second(f: Function, a: tuple[Tensor, ...]) -> Any:
    leaves = _leaves(a)
    found = torch.autograd.grad(_scalar(f)(*leaves), leaves, create_graph=True)
    loss = sum((g * v).sum() for g, v in zip(found, _tangents(a), strict=True))
    return torch.autograd.grad(loss, leaves)


def _second_of_dependent(f: Function, a: tuple[Tensor, ...]) -> Any:
    """Each argument is computed from the one before it; then from the one after it."""

    def chained(*b: Tensor) -> Tensor:
        return f(*(t + 0.5 * b[i - 1].mean() if i else t for i, t in enumerate(b)))

    def reverse(*b: Tensor) -> Tensor:
        return f(*(t + 0.5 * u.mean() for t, u in pairwise(b)), b[-1])

    return [*_second(chained, a), *_second(reverse, a), *_many_gradients(chained, a)]


TRANSFORMS: dict[str, Callable[[Function, tuple[Tensor, ...]], Any]] = {
    "grad": lambda f, a: torch.func.grad(_scalar(f), _everything(a))(*a),
    "vjp": lambda f, a: torch.func.vjp(f, *a)[1](f(*a).detach().cos()),
    "jvp": lambda f, a: torch.func.jvp(f, a, _tangents(a)),
    "linearize": lambda f, a: torch.func.linearize(f, *a)[1](*_tangents(a)),
    "jacrev": lambda f, a: torch.func.jacrev(f, _everything(a))(*a),
    "jacfwd": lambda f, a: torch.func.jacfwd(f, _everything(a))(*a),
    "hessian": lambda f, a: torch.func.hessian(_scalar(f), _everything(a))(*a),
    "vmap over inputs": lambda f, a: _vmap(f, a, _first(a)),
    "vmap over parameters": lambda f, a: _vmap(f, a, tuple(not i for i in _first(a))),
    "vmap of grad": lambda f, a: _vmap(
        torch.func.grad(_scalar(f), _everything(a)), a, tuple(True for _ in a)
    ),
    "grad of vmap": lambda f, a: torch.func.grad(
        lambda *b: _vmap(f, b, _first(b)).sin().sum(), _everything(a)
    )(*a),
    "jvp of grad": lambda f, a: torch.func.jvp(
        torch.func.grad(_scalar(f), _everything(a)), a, _tangents(a)
    ),
    "dual numbers": _duals,
    "dual numbers through the backward": _dual_through_backward,
    "many gradients": _many_gradients,
    "second gradients": _second,
    "second gradients of dependent arguments": _second_of_dependent,
}


SLOW = {  # much like another one
    "batch_norm, relu",
    "add_rms_norm",
    "linear_batch_norm, auto",
    "linear_batch_norm, epilogue",
    "linear_batch_norm, unfused",
    "linear_batch_norm, epilogue, eval",
    "conv_batch_norm",
}
# torch's own, of an operator that ran before there were dual numbers: refused, not wrong
REFUSED = {(o, "dual numbers through the backward") for o in ("group_norm", "instance_norm")}


@ignore_torchs_warnings
@pytest.mark.parametrize(
    "operation", [pytest.param(o, marks=[pytest.mark.slow] * (o in SLOW)) for o in OPERATIONS]
)
def test_transforms(backend, operation):
    (ours, theirs), shapes = OPERATIONS[operation]
    generator = torch.Generator().manual_seed(0)
    arguments = tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    here = tuple(t.to(backend) for t in arguments)
    for name, transform in TRANSFORMS.items():
        if (operation, name) in REFUSED and fastnorm.backend_for(here[0]) == "eager":
            with pytest.raises(NotImplementedError, match="forward AD with aten"):
                transform(ours, here)
            continue
        torch.testing.assert_close(
            transform(ours, here), transform(theirs, arguments), rtol=1e-9, atol=1e-11,
            check_device=False, msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


# ---- backwards of our own on a CPU ---------------------------------------------------------------
LARGE: dict[str, tuple[Function, tuple[int, ...], tuple[int, ...], Any]] = {
    "batch_norm": (
        lambda x, w: FF.batch_norm(x, None, None, w, None, True, activation="relu"),
        (2, 4, 1 << 15), (4,), None,
    ),
    "group_norm": (
        lambda x, w: FF.group_norm(x, 2, w, activation="leaky_relu"),
        (2, 4, 128, 128), (4,), torch.channels_last,
    ),
    "instance_norm": (
        lambda x, w: FF.instance_norm(x, None, None, w), (2, 4, 96, 96), (4,), torch.channels_last
    ),
    "rms_norm": (lambda x, w: FF.rms_norm(x, w.shape, w, 1e-3), (512, 256), (256,), None),
    "linear_batch_norm": (
        lambda x, w: FF.linear_batch_norm(x, w, training=True, algorithm="gram"),
        (64, 8), (4, 8), None,
    ),
}  # fmt: skip


@ignore_torchs_warnings
@pytest.mark.parametrize("name", LARGE)
def test_backwards_of_large_tensors(name):
    """A gradient is linear in dy: that is its tangent, and its batch."""
    function, shape, parameter, memory_format = LARGE[name]
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    weight = torch.randn(parameter, generator=generator).requires_grad_()
    x = (x if memory_format is None else x.to(memory_format=memory_format)).requires_grad_()
    y = function(x, weight)
    assert "norm" in y.grad_fn.name().lower() or name != "rms_norm"
    leaves, dy = (x, weight), torch.randn(y.shape, generator=generator)
    want = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    dys = torch.stack([dy, torch.zeros_like(dy)])
    many = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
    with forward_ad.dual_level():
        found = torch.autograd.grad(y, leaves, forward_ad.make_dual(torch.zeros_like(dy), dy))
        tangents = [forward_ad.unpack_dual(g).tangent for g in found]
    for exact, batch, tangent in zip(want, many, tangents, strict=True):
        scale = exact.abs().max().item()
        for got in (batch[0], tangent):
            torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5 * scale)
        assert not batch[1].any()
        assert not exact.requires_grad
        assert not tangent.requires_grad


@pytest.mark.unchecked  # whose torch.empty is none of those that torch.device knows
@pytest.mark.parametrize("name", LARGE)
def test_large_tensors_elsewhere_than_on_the_default_device(name):
    """What is allocated on the way is where the input is, as in torch's operators."""
    function, shape, parameter, memory_format = LARGE[name]
    x, weight = torch.randn(shape), torch.randn(parameter).requires_grad_()
    x = (x if memory_format is None else x.to(memory_format=memory_format)).requires_grad_()
    dy, found = torch.randn_like(function(x, weight)), []
    for device in ("cpu", "meta"):
        with torch.device(device):
            y = function(x, weight)
            found.append([y, *torch.autograd.grad(y, (x, weight), dy)])
    assert all(map(torch.equal, *found))


class _Constant(torch.autograd.Function):
    """Its output does not depend on its input, as far as autograd is told."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


@pytest.mark.parametrize("name", [*OPERATIONS, *(f"{name}, large" for name in LARGE)])
def test_gradients_where_nothing_depends_on_the_output(backend, name):
    """None, as torch's, not zeros: an optimizer passes over a parameter without a gradient."""
    if name in OPERATIONS:
        (function, _), shapes = OPERATIONS[name]
        memory_format = None
    else:
        function, *shapes, memory_format = LARGE[name.removesuffix(", large")]
        if fastnorm.backend_for(torch.ones(1, device=backend)) == "triton":
            pytest.skip("large for a CPU's operators, and for the interpreter")
    x, *parameters = _leaves(tuple(torch.randn(shape, device=backend) for shape in shapes))
    y = function(x if memory_format is None else x.to(memory_format=memory_format), *parameters)
    leaves = (x, *parameters)
    found = torch.autograd.grad(_Constant.apply(y).sum(), leaves, allow_unused=True)
    assert found == (None,) * len(leaves)


# ---- modules -------------------------------------------------------------------------------------
MODULES: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    "BatchNorm1d": (lambda: fastnorm.BatchNorm1d(3), lambda: nn.BatchNorm1d(3)),
    "not tracking": (
        lambda: fastnorm.BatchNorm1d(3, track_running_stats=False),
        lambda: nn.BatchNorm1d(3, track_running_stats=False),
    ),
    "InstanceNorm1d": (
        lambda: fastnorm.InstanceNorm1d(3, affine=True, track_running_stats=True),
        lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
    ),
    "GroupNorm": (lambda: fastnorm.GroupNorm(3, 3), lambda: nn.GroupNorm(3, 3)),
    "LayerNorm": (lambda: fastnorm.LayerNorm(5), lambda: nn.LayerNorm(5)),
    "RMSNorm": (lambda: fastnorm.RMSNorm([3, 5]), lambda: nn.RMSNorm([3, 5])),
    "Conv1dBatchNorm": (
        lambda: fastnorm.Conv1dBatchNorm(3, 3, 1, activation="identity"),
        lambda: nn.Sequential(
            OrderedDict(conv=nn.Conv1d(3, 3, 1, bias=False), norm=nn.BatchNorm1d(3))
        ),
    ),
}


def outcomes(kind: Callable[[], nn.Module], x: Tensor, training: bool) -> list[Any]:
    """What each transform gives, or the type of its error, and how it leaves the buffers."""
    modules = [kind().to(x.device, torch.float64).train(training) for _ in range(len(x))]
    for i, module in enumerate(modules):
        torch.manual_seed(i)
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.detach().copy_(torch.rand(tensor.shape) + 1)
    stacked = torch.func.stack_module_state(modules)
    single = [{k: v[0].detach().clone() for k, v in state.items()} for state in stacked]

    def call(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(modules[0], (parameters, buffers), (x,))

    def loss(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        return call(parameters, buffers, x).sin().sum()

    def captured(parameters: Any, x: Tensor) -> Tensor:
        return loss(parameters, {}, x)

    transformed: list[tuple[Callable[..., Any], Any]] = [
        (torch.func.vmap(call), (*stacked, x)),
        (torch.func.vmap(call, (0, 0, None)), (*stacked, x[0])),
        (torch.func.vmap(torch.func.grad(loss)), (*stacked, x)),
        (torch.func.vmap(call, (None, None, 0)), (*single, x)),
        (torch.func.grad(loss), (*single, x[0])),
        (torch.func.grad(captured), (single[0], x[0])),
        (torch.func.vmap(modules[1]), (x,)),
    ]
    found: list[Any] = []
    for function, arguments in transformed:
        try:
            found.append(function(*arguments))
        except Exception as error:
            found.append(type(error))
        found += [dict(state) for state in (stacked[1], single[1])]
    return [*found, *(dict(module.named_buffers()) for module in modules[:2])]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_modules_under_transforms(backend, name, training):
    """Inputs, ensembles of parameters and buffers, and gradients: torch's, or refused as torch's.

    Buffers that move must be as many as the inputs are.
    """
    x = torch.randn(3, 2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = [outcomes(kind, x.to(backend), training) for kind in MODULES[name]]
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        if isinstance(want, type):
            assert got is want, i
        else:
            torch.testing.assert_close(
                got, want, rtol=1e-10, atol=1e-11, msg=lambda text, i=i: f"{i}: {text}"
            )


@pytest.mark.parametrize("function", [FF.batch_norm, FF.instance_norm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_that_are_no_arguments_move(backend, function, dtype):
    x = torch.randn(4, 3, 5, device=backend).bfloat16()
    for momentum in (0.25, torch.tensor(0.25, device=backend)):
        moved, captured = torch.ones(2, 2, 3, dtype=dtype, device=backend)

        def call(t: Tensor, buffers: Tensor, momentum: Any = momentum) -> Tensor:
            y: Tensor = function(t, *buffers, None, None, True, momentum)
            return y.sum()

        call(x, moved)
        torch.func.grad(lambda t, buffers=captured, call=call: call(t, buffers))(x)
        torch.testing.assert_close(captured, moved)


def test_evaluation_of_16_bits_under_vmap(backend):
    """torch's rule for vmap takes one dtype alone."""
    x = torch.randn(2, 4, 3, 5, device=backend).bfloat16()
    mean, var = torch.randn(3, device=backend), torch.rand(3, device=backend)
    for buffers in ((mean, var), (mean.bfloat16(), var.bfloat16())):
        for function in (FF.batch_norm, FF.instance_norm):
            y = torch.func.vmap(lambda t, f=function, b=buffers: f(t, *b, None, None, False))(x)
            torch.testing.assert_close(y[1], function(x[1], *buffers, None, None, False))


def test_an_ensemble_with_cumulative_averages(backend):
    """torch's reads the count on the host, and refuses; ours stays on the device."""
    x = torch.randn(3, 4, 2, dtype=torch.float64, device=backend)
    modules = [fastnorm.BatchNorm1d(2, momentum=None).to(x) for _ in range(3)]
    for i, module in enumerate(modules):
        module.num_batches_tracked += i
    _, buffers = torch.func.stack_module_state(modules)

    def call(buffers: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(modules[0], buffers, (x,))

    y = torch.func.vmap(call)(buffers, x)
    for i, module in enumerate(modules):
        torch.testing.assert_close(y[i], module(x[i]))
        for name, buffer in module.named_buffers():
            torch.testing.assert_close(buffers[name][i], buffer, msg=name)
