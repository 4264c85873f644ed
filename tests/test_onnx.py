"""Every module as an ONNX model: what ONNX Runtime computes is what the module does.

Both of torch's exporters. The example has other sizes than what is computed, where they may vary.
"""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from twins import randomize

import fastnorm

pytest.importorskip("onnx", reason="torch.onnx writes its models")
pytest.importorskip("onnxscript", reason="torch.onnx imports it")
runtime = pytest.importorskip("onnxruntime", reason="it computes them")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of exporters, about themselves
]

F = fastnorm
ACTIVATED = ("relu", "relu6", "leaky_relu", "elu", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid")
IMAGE = (3, 4, 6, 5)
CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "BatchNorm1d": (F.BatchNorm1d(4), (3, 4)),
    "BatchNorm1d of sequences": (F.BatchNorm1d(4), (3, 4, 6)),
    "BatchNorm2d": (F.BatchNorm2d(4, activation="hardswish"), IMAGE),
    "BatchNorm2d without parameters": (F.BatchNorm2d(4, affine=False), IMAGE),
    "BatchNorm3d": (F.BatchNorm3d(4), (3, 4, 2, 3, 3)),
    "SyncBatchNorm": (F.SyncBatchNorm(4), IMAGE),
    "InstanceNorm1d": (F.InstanceNorm1d(4), (3, 4, 6)),
    "InstanceNorm2d": (F.InstanceNorm2d(4, affine=True, activation="silu"), IMAGE),
    "InstanceNorm2d with buffers": (F.InstanceNorm2d(4, track_running_stats=True), IMAGE),
    "InstanceNorm3d": (F.InstanceNorm3d(4), (3, 4, 2, 3, 3)),
    "GroupNorm": (F.GroupNorm(2, 4, activation="silu"), IMAGE),
    "GroupNorm of one channel each": (F.GroupNorm(4, 4), IMAGE),
    "LayerNorm": (F.LayerNorm(5), IMAGE),
    "LayerNorm of two axes": (F.LayerNorm((6, 5), bias=False), IMAGE),
    "RMSNorm": (F.RMSNorm(5), IMAGE),
    "RMSNorm, activated": (F.RMSNorm(5, eps=1e-6, activation="gelu"), IMAGE),
    "AddLayerNorm": (F.AddLayerNorm(5), IMAGE),
    "AddRMSNorm": (F.AddRMSNorm(5), IMAGE),
    "LinearBatchNorm": (F.LinearBatchNorm(4, 6), (3, 4)),
    "LinearBatchNorm of sequences": (F.LinearBatchNorm(4, 6, bias=True), (3, 5, 4)),
    "Conv1dBatchNorm": (F.Conv1dBatchNorm(4, 6, 3, padding="same"), (3, 4, 6)),
    "Conv2dBatchNorm": (F.Conv2dBatchNorm(4, 6, 3, stride=2, groups=2), IMAGE),
    "Conv2dBatchNorm, 1x1": (F.Conv2dBatchNorm(4, 6, 1, activation="silu"), IMAGE),
    "Conv3dBatchNorm": (F.Conv3dBatchNorm(4, 6, 1), (3, 4, 2, 3, 3)),
    **{act: (F.BatchNorm2d(4, activation=act), IMAGE) for act in ACTIVATED},
}
each_exporter = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "trace"])


def made(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    module, shape = copy.deepcopy(CASES[name])
    randomize(module)
    return module.eval(), shape


def check(module: nn.Module, inputs: tuple[Tensor, ...], dynamo: bool) -> None:
    """Export with these inputs, and compute with a batch of one more."""
    written = io.BytesIO()
    if dynamo:
        vary = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
        program = torch.onnx.export(module, inputs, dynamo=True, dynamic_shapes=vary, verbose=False)
        program.save(written)
    else:
        names = [f"x{i}" for i in range(len(inputs))]
        vary = {name: {0: "batch"} for name in names}
        mode = torch.onnx.TrainingMode.PRESERVE
        torch.onnx.export(
            module, inputs, written, dynamo=False, input_names=names, dynamic_axes=vary,
            training=mode, do_constant_folding=not module.training,
        )  # fmt: skip
    session = runtime.InferenceSession(written.getvalue(), providers=["CPUExecutionProvider"])
    inputs = tuple(torch.cat([x, x[:1] / 2]) for x in inputs)
    given = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    with torch.no_grad():
        want = copy.deepcopy(module)(*inputs)
    want = want if isinstance(want, tuple) else (want,)
    for y, expected in zip(session.run(None, given), want, strict=False):  # then new buffers
        torch.testing.assert_close(torch.from_numpy(y), expected, atol=1e-4, rtol=1e-4)


@each_exporter
@pytest.mark.parametrize("name", CASES)
def test_modules(name, dynamo):
    module, shape = made(name)
    inputs = tuple(torch.randn(shape) + 1 for _ in range(2 if name.startswith("Add") else 1))
    check(module, inputs, dynamo)


@each_exporter
@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d", "GroupNorm", "Conv2dBatchNorm"])
def test_channels_last(name, dynamo):
    module, shape = made(name)
    x = torch.randn(shape).to(memory_format=torch.channels_last)
    check(module, (x,), dynamo)


@each_exporter
@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d", "GroupNorm"])
def test_residuals(name, dynamo):
    module, shape = made(name)
    check(module, (torch.randn(shape), torch.randn(shape)), dynamo)


@pytest.mark.parametrize(
    "name", ["BatchNorm2d", "InstanceNorm2d", "GroupNorm", "LinearBatchNorm", "Conv2dBatchNorm"]
)
def test_in_training(name):
    """By tracing alone: torch's other exporter evaluates batch norms."""
    module, shape = made(name)
    check(module.train(), (torch.randn(shape),), dynamo=False)
