"""The networks of `fastnorm train`, each written once over a choice of layers.

Torch's and fastnorm's layers give the same state_dict keys, so that both start from one set of
weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

import fastnorm


class TorchLinearNorm(nn.Module):
    """act(BatchNorm1d(Linear(x))), from torch.nn, under the names of `fastnorm.LinearBatchNorm`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)
        self.norm = nn.BatchNorm1d(out_features)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.relu(self.norm(self.linear(input)), inplace=True)


class TorchNorm2d(nn.BatchNorm2d):
    """act(BatchNorm2d(x) + residual), the last two in place as torchvision's ResNet does them."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__(channels)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        output = super().forward(input)
        if residual is not None:
            output += residual
        return nn.functional.relu(output, inplace=True) if self.activation == "relu" else output


@dataclass(frozen=True)
class Layers:
    """The layers that a network takes from one library."""

    name: str
    linear_norm: Callable[[int, int], nn.Module]  # in_features, out_features; with ReLU
    norm_2d: Callable[[int, str], nn.Module]  # channels, activation; called with (input, residual)


TORCH = Layers("torch", TorchLinearNorm, TorchNorm2d)
FASTNORM = Layers(
    "fastnorm",
    fastnorm.LinearBatchNorm,
    lambda channels, activation: fastnorm.BatchNorm2d(channels, activation=activation),
)


def mlp(layers: Layers, shape: torch.Size, classes: int) -> nn.Module:
    """Three blocks of Linear, BatchNorm and ReLU, and a Linear to the classes."""
    width = 512
    return nn.Sequential(
        nn.Flatten(),
        layers.linear_norm(shape.numel(), width),
        layers.linear_norm(width, width),
        layers.linear_norm(width, width),
        nn.Linear(width, classes),
    )


class ResidualBlock(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)) (He et al., 2015)."""

    def __init__(self, layers: Layers, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = layers.norm_2d(channels, "relu")
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = layers.norm_2d(channels, "relu")
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False),
                layers.norm_2d(channels, "identity"),
            )

    def forward(self, input: Tensor) -> Tensor:
        output = self.norm1(self.conv1(input))
        output = self.conv2(output)
        return cast(Tensor, self.norm2(output, self.shortcut(input)))


def resnet(layers: Layers, shape: torch.Size, classes: int) -> nn.Module:
    """A stem, two stages of two residual blocks, 32 and 64 channels wide, and a Linear."""
    return nn.Sequential(
        nn.Conv2d(shape[0], 32, 3, padding=1, bias=False),
        layers.norm_2d(32, "relu"),
        ResidualBlock(layers, 32, 32, stride=1),
        ResidualBlock(layers, 32, 32, stride=1),
        ResidualBlock(layers, 32, 64, stride=2),
        ResidualBlock(layers, 64, 64, stride=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


@dataclass(frozen=True)
class Model:
    """How to build a network, and the training that suits it unless the user says otherwise."""

    build: Callable[[Layers, torch.Size, int], nn.Module]
    epochs: int
    batch_size: int
    lr: float


MODELS = {
    "mlp": Model(mlp, epochs=20, batch_size=64, lr=0.05),
    "resnet": Model(resnet, epochs=10, batch_size=64, lr=0.02),
}
