"""The layers that are measured: those of real models, small calls, and a ladder of hidden sizes.

Batches are for a GPU. On a CPU they are what its memory moves in some tens of milliseconds, and
there are fewer layers: those that take another way through the eager path.
"""

from collections.abc import Iterator
from dataclasses import replace

from fastnorm.bench.layers import Layer

WIDTHS = (128, 256, 512, 768, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
CPU_WIDTHS = (768, 4096, 16384)
ROW_ELEMENTS = {"cuda": 1 << 26, "cpu": 1 << 22}
BOTH = {4: ("contiguous", "channels_last"), 5: ("contiguous", "channels_last_3d")}

Images = tuple[str, tuple[int, ...], int]  # name, shape on a GPU, batch on a CPU

RESNET50: tuple[Images, ...] = (
    ("ResNet-50 stem", (256, 64, 112, 112), 8),
    ("ResNet-50 stage 1", (256, 256, 56, 56), 4),
    ("ResNet-50 stage 2", (256, 512, 28, 28), 8),
    ("ResNet-50 stage 3", (256, 1024, 14, 14), 16),
    ("ResNet-50 stage 4", (256, 2048, 7, 7), 16),
)
CPU_STAGES = ("ResNet-50 stem", "ResNet-50 stage 1", "ResNet-50 stage 4")
DIFFUSION: tuple[Images, ...] = (
    ("Stable Diffusion", (16, 320, 64, 64), 2),
    ("Stable Diffusion", (16, 640, 32, 32), 4),
    ("Stable Diffusion", (16, 1280, 16, 16), 8),
)
# (rows on a GPU, on a CPU), in, out
PRODUCTS = {
    "stage 1": ((200704, 16384), 64, 256),
    "stage 3": ((50176, 4096), 256, 1024),
    "stage 4": ((65536, 2048), 512, 2048),
    "MobileNetV2 expansion 1": ((802816, 16384), 16, 96),
    "MobileNetV2 expansion 4": ((50176, 16384), 64, 384),
    "MLP-Mixer channels": ((25088, 2048), 512, 2048),
    "point cloud": ((262144, 16384), 64, 128),
    "narrowing": ((65536, 256), 4096, 1024),
}
CPU_PRODUCTS = ("stage 1", "stage 4")


def layers(device: str) -> list[Layer]:
    """For a device of this type: "cuda" or "cpu"."""
    return [
        *_batch_norms(device),
        *_group_norms(device),
        *_instance_norms(device),
        *_row_norms(device),
        *_products(device),
    ]


def _scaled(shape: tuple[int, ...], cpu_batch: int, device: str) -> tuple[int, ...]:
    return shape if device == "cuda" else (cpu_batch, *shape[1:])


def _batch_norms(device: str) -> Iterator[Layer]:
    yield Layer("small call", "BatchNorm1d", (64,), (8, 64))
    yield Layer("small call", "BatchNorm2d", (16,), (2, 16, 4, 4))
    yield Layer("small call", "BatchNorm3d", (8,), (2, 8, 2, 4, 4))
    yield Layer("MLP", "BatchNorm1d", (1024,), (8192, 1024), quick=True)
    shape = _scaled((64, 256, 1000), 8, device)
    yield Layer("speech", "BatchNorm1d", (256,), shape)
    for name, full, batch in RESNET50:
        if device == "cpu" and name not in CPU_STAGES:
            continue
        for layout in BOTH[4]:
            shape = _scaled(full, batch, device)
            layer = Layer(name, "BatchNorm2d", shape[1:2], shape, layout)
            yield replace(layer, quick=name.endswith("stage 1"))
            if name.endswith("stage 1"):
                yield replace(layer, activation="relu")
                yield replace(layer, activation="relu", residual=True)
    for layout in BOTH[5]:
        shape = _scaled((2, 32, 128, 128, 128), 1, device)
        shape = shape if device == "cuda" else (1, 32, 32, 64, 64)
        yield Layer("U-Net 3d", "BatchNorm3d", (32,), shape, layout)


def _group_norms(device: str) -> Iterator[Layer]:
    yield Layer("small call", "GroupNorm", (4, 16), (2, 16, 4, 4))
    for layout in BOTH[4]:
        for name, full, batch in DIFFUSION[:: 1 if device == "cuda" else 2]:
            shape = _scaled(full, batch, device)
            layer = Layer(name, "GroupNorm", (32, shape[1]), shape, layout)
            yield replace(layer, quick=shape[1] == 320)
            if device == "cuda" or shape[1] == 320:
                yield replace(layer, activation="silu")
        shape = _scaled((112, 64, 512, 512), 1, device)
        yield Layer("large groups", "GroupNorm", (8, 64), shape, layout)


def _instance_norms(device: str) -> Iterator[Layer]:
    yield Layer("small call", "InstanceNorm1d", (16,), (2, 16, 16))
    yield Layer("small call", "InstanceNorm2d", (16,), (2, 16, 4, 4))
    yield Layer("small call", "InstanceNorm3d", (8,), (2, 8, 2, 4, 4))
    yield Layer("speech", "InstanceNorm1d", (256,), _scaled((64, 256, 1000), 8, device))
    for layout in BOTH[4]:
        shape = _scaled((4, 64, 256, 256), 2, device)
        layer = Layer("style transfer", "InstanceNorm2d", (64,), shape, layout)
        yield replace(layer, quick=layout == "contiguous")
    for layout in BOTH[5]:
        shape = (2, 32, 128, 128, 128) if device == "cuda" else (1, 32, 32, 64, 64)
        yield Layer("3d medical", "InstanceNorm3d", (32,), shape, layout)


def _row_norms(device: str) -> Iterator[Layer]:
    elements = ROW_ELEMENTS[device]
    for kind in ("LayerNorm", "RMSNorm"):
        yield Layer("small call", kind, (64,), (8, 64), quick=kind == "LayerNorm")
        for width in WIDTHS if device == "cuda" else CPU_WIDTHS:
            shape = (elements // width, width)
            yield Layer("hidden size", kind, (width,), shape, quick=width == 4096)
        yield Layer("with activation", kind, (4096,), (elements // 4096, 4096), activation="silu")
    for kind in ("AddLayerNorm", "AddRMSNorm"):
        for width in (1024, 4096, 16384) if device == "cuda" else (4096,):
            shape = (elements // width, width)
            yield Layer("pre-norm", kind, (width,), shape, residual=True)


def _products(device: str) -> Iterator[Layer]:
    for name, (rows, inputs, outputs) in PRODUCTS.items():
        if device == "cpu" and name not in CPU_PRODUCTS:
            continue
        matrix = (rows[device != "cuda"], inputs)
        layer = Layer(name, "LinearBatchNorm", (inputs, outputs), matrix, activation="relu")
        yield replace(layer, quick=name == "stage 1")
    for layout in BOTH[4]:
        shape = _scaled((64, 64, 56, 56), 4, device)
        yield Layer("bottleneck", "Conv2dBatchNorm", (64, 256, 1), shape, layout, activation="relu")
