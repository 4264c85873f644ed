"""A network, its training and its test: what the studies share."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import fastnorm
from fastnorm.cli.data import Images

# By name, a norm of so many channels. Layer norm of an image is group norm with one group (Wu & He
# 2018).
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda channels: nn.Identity(),
    "batch": fastnorm.BatchNorm2d,
    "layer": lambda channels: fastnorm.GroupNorm(1, channels),
    "group": lambda channels: fastnorm.GroupNorm(4, channels),
    "instance": lambda channels: fastnorm.InstanceNorm2d(channels, affine=True),
}


def convnet(norm: Callable[[int], nn.Module], images: Images, width: int = 16) -> nn.Sequential:
    """Five 3x3 convolutions, each with norm and ReLU, mean over positions, a Linear.

    He's weights, so that the norms differ in themselves alone; biases only where no norm has one.
    """
    layers: list[nn.Module] = []
    channels = images.shape[0]
    for stride in (1, 2, 1, 1, 1):
        after = norm(width)
        bias = isinstance(after, nn.Identity)
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=bias), after, nn.ReLU()]
        channels = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, images.classes)]
    model = nn.Sequential(*layers)
    fastnorm.init.initialize(model)
    return model


def batches(images: Images, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches without end, the same for the same seed; each epoch drops its remainder."""
    generator = torch.Generator().manual_seed(seed)
    count = len(images.train_labels)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            chosen = order[start : start + size]
            yield images.train_images[chosen], images.train_labels[chosen]


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images), labels)


def train(
    model: nn.Module,
    data: Iterator[tuple[Tensor, Tensor]],
    rate: float,
    steps: int,
    momentum: float = 0.0,
) -> Iterator[float]:
    """Gradient descent, a loss for each step; ends early where the loss is not finite."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    for _ in range(steps):
        images, labels = next(data)
        loss = loss_of(model, images, labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        value = float(loss.detach())
        yield value
        if not math.isfinite(value):
            return


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, training: bool = False) -> float:
    """The share of test images that `model` gets right, in evaluation unless `training`.

    In training a batch norm takes the test images' own statistics; its buffers are put back.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train(training)
    right = model(images.test_images).argmax(1) == images.test_labels
    model.train()
    for buffer, value in buffers:
        buffer.copy_(value)
    return float(right.double().mean())
