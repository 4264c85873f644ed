"""Networks as people write them, small: what convert, fuse and fold are tried on."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """ResNet-50's block: three convolutions, one activation module for all, a sum in place."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int = 1):
        super().__init__()
        out = width * self.expansion
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet50(nn.Module):
    """He et al. 2016, with stages of `depths` blocks."""

    def __init__(self, width: int = 64, depths: tuple[int, ...] = (3, 4, 6, 3), classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels, stages = width, []
        for stage, depth in enumerate(depths):
            inner = width << stage
            blocks = []
            for block in range(depth):
                stride = 2 if stage and not block else 1
                blocks.append(Bottleneck(channels, inner, stride))
                channels = inner * Bottleneck.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = stage(x)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class ConvNormActivation(nn.Sequential):
    """A Sequential with a name, as torchvision's."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(
            nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU6(inplace=True),
        )


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, expand: int):
        super().__init__()
        hidden = channels * expand
        self.use_res_connect = stride == 1 and channels == out
        layers: list[nn.Module] = [ConvNormActivation(channels, hidden, 1)] * (expand != 1)
        layers += [
            ConvNormActivation(hidden, hidden, 3, stride, hidden),
            nn.Conv2d(hidden, out, 1, bias=False),
            nn.BatchNorm2d(out),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


class MobileNetV2(nn.Module):
    """Sandler et al. 2018, with fewer blocks."""

    def __init__(self, width: int = 8, classes: int = 10):
        super().__init__()
        blocks = [(1, width, 1), (6, width, 2), (6, width, 1), (6, 2 * width, 2)]
        features: list[nn.Module] = [ConvNormActivation(3, width, 3, 2)]
        channels = width
        for expand, out, stride in blocks:
            features.append(InvertedResidual(channels, out, stride, expand))
            channels = out
        self.features = nn.Sequential(*features, ConvNormActivation(channels, 4 * width, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(4 * width, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class DenseLayer(nn.Module):
    """Norm and activation before the convolution, of all features so far."""

    def __init__(self, channels: int, growth: int, drop_rate: float):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        self.drop_rate = drop_rate

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        x = self.conv2(self.relu2(self.norm2(x)))
        if self.drop_rate > 0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x


class DenseBlock(nn.ModuleDict):
    """A ModuleDict with a forward, as torchvision's."""

    def __init__(self, layers: int, channels: int, growth: int, drop_rate: float):
        super().__init__()
        for i in range(layers):
            self.add_module(
                f"denselayer{i + 1}", DenseLayer(channels + i * growth, growth, drop_rate)
            )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for _, layer in self.items():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """Huang et al. 2017, two blocks."""

    def __init__(self, growth: int = 4, drop_rate: float = 0.0, classes: int = 10):
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, 8, 3, padding=1, bias=False))
        self.features.add_module("norm0", nn.BatchNorm2d(8))
        self.features.add_module("relu0", nn.ReLU(inplace=True))
        channels = 8
        for i in range(2):
            self.features.add_module(f"block{i}", DenseBlock(2, channels, growth, drop_rate))
            channels += 2 * growth
            transition = nn.Sequential()
            transition.add_module("norm", nn.BatchNorm2d(channels))
            transition.add_module("relu", nn.ReLU(inplace=True))
            transition.add_module("conv", nn.Conv2d(channels, channels // 2, 1, bias=False))
            transition.add_module("pool", nn.AvgPool2d(2, 2))
            self.features.add_module(f"transition{i}", transition)
            channels //= 2
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.features(x), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class DoubleConv(nn.Module):
    """Activations as functions."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(2, out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return F.silu(self.norm2(self.conv2(x)))


class UNet(nn.Module):
    """Ronneberger et al. 2015, two levels."""

    def __init__(self, width: int = 4, classes: int = 2):
        super().__init__()
        self.down1 = DoubleConv(3, width)
        self.down2 = DoubleConv(width, 2 * width)
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.up_norm = nn.BatchNorm2d(width)
        self.merge = DoubleConv(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(self.pool(first))
        up = F.leaky_relu(self.up_norm(self.up(second)), 0.01)
        return self.head(self.merge(torch.cat([first, up], 1)))


def resnet50() -> nn.Module:
    """ResNet-50's blocks and rules, narrow and with fewer of them."""
    return ResNet50(8, (1, 2, 1, 1))


SMALL = {"ResNet-50": resnet50, "MobileNetV2": MobileNetV2, "DenseNet": DenseNet, "U-Net": UNet}


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of NCHW, as timm has it."""

    def __init__(self, num_channels: int, eps: float = 1e-6, affine: bool = True):
        super().__init__(num_channels, eps=eps, elementwise_affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ByHandLayerNorm2d(nn.Module):
    """The same by hand; its output is contiguous."""

    def __init__(self, num_channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(var + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class RootMeanSquare(nn.Module):
    """RMSNorm in float32, as Llama's family; `offset` 1 as Gemma's."""

    def __init__(self, size: int, eps: float = 1e-6, offset: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size))
        self.variance_epsilon = eps
        self.offset_of_weight = offset

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        if self.offset_of_weight:
            return ((self.offset_of_weight + self.weight.float()) * x).to(dtype)
        return self.weight * x.to(dtype)


class UnbiasedLayerNorm(nn.Module):
    """Almost a LayerNorm: divides by the unbiased standard deviation, eps outside the root."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return self.weight * (x - mean) / (std + self.eps) + self.bias


class UnbiasedVarianceLayerNorm(UnbiasedLayerNorm):
    """Nearer still: only the variance is unbiased."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True)
        return self.weight * (x - mean) / (var + self.eps).sqrt() + self.bias
