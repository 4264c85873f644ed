"""torch.jit.script of every module: torch.nn's can be scripted, so ours can in their place."""

import copy
import io

import pytest
import torch
from test_compile import CASES, everything, inputs_of, module_of
from torch import Tensor, nn

import fastnorm
from fastnorm.eager.activations import ACTIVATIONS

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.(script|save|load)` is deprecated")
CPU = torch.device("cpu")


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(module), file)
    file.seek(0)
    return torch.jit.load(file)


def assert_alike(got: list[Tensor], want: list[Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", CASES)
def test_every_module(case, training):
    """Outputs, gradients, buffers and the state dict, of batches of several sizes."""
    module = module_of(case, CPU, training)
    scripted = saved_and_loaded(copy.deepcopy(module))
    assert scripted.state_dict().keys() == module.state_dict().keys()
    for batch in (5, 8):
        inputs = inputs_of(case, CPU, batch)
        if case == "SyncBatchNorm" and training:
            with pytest.raises(torch.jit.Error, match="no processes: call eval"):
                scripted(*inputs)
            continue
        assert_alike(everything(scripted, scripted, inputs), everything(module, module, inputs))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    norm = fastnorm.BatchNorm1d(4, activation=activation).eval()
    x = torch.linspace(-7, 7, 40).view(10, 4)
    for residual in (None, x.flip(0)):
        torch.testing.assert_close(torch.jit.script(norm)(x, residual), norm(x, residual))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.last = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.norm(self.conv(x))))


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "not fused"])
def test_a_converted_model(fuse):
    """It is scripted as it was written, and the model itself keeps its layers."""
    model, x = Block().eval(), torch.randn(2, 3, 6, 6)
    want = model(x)
    fastnorm.convert(model, fuse=fuse)
    assert ("fused" in fastnorm.summary(model)) == fuse
    torch.testing.assert_close(saved_and_loaded(model)(x), want)
    assert type(model.norm) is fastnorm.BatchNorm2d
    assert type(model.last) is fastnorm.GroupNorm
    torch.testing.assert_close(model(x), want)


def test_inputs_that_torchs_refuse():
    scripted = torch.jit.script(fastnorm.BatchNorm2d(3))
    with pytest.raises(torch.jit.Error, match="expected 4D input"):
        scripted(torch.ones(2, 3))
