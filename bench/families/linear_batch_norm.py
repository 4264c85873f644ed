"""Linear + BatchNorm + activation: the shapes of DESIGN §3, of MobileNetV2 and of MLPs."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from case import Case, Sweeps
from torch import Tensor

import fastnorm.functional as FF
from fastnorm.eager.activations import ACTIVATIONS, OUTPUT_GRADS
from fastnorm.kernels import cost
from fastnorm.kernels.devices import Device, assume, device_of


@dataclass(frozen=True)
class LinearBatchNormCase(Case):
    """`functional.linear_batch_norm` of rows (M, K), or of a 1×1 convolution where `shape` has more
    axes. A pass is one over Y (M, N).
    """

    family: ClassVar[str] = "linear_batch_norm"
    activation: str = "relu"
    features: int = 0  # N
    training: bool = True
    algorithm: str = "gram"
    joined: bool = False  # dX as a library's product, also where the model says no

    def words(self) -> list[str]:
        form = ["joined"] * self.joined
        return [*super().words(), self.algorithm, *form, "train" if self.training else "eval"]

    def forward_and_backward(
        self, tensors: dict[str, Tensor], between: Callable[[], object] = lambda: None
    ) -> None:
        device = device_of(tensors["input"].device)
        # of a slow cache the model says yes
        with assume(replace(device, cache=1e6) if self.joined else device):
            super().forward_and_backward(tensors, between)

    def small_tensors(self) -> dict[str, tuple[int, ...]]:
        vectors = ("norm_weight", "norm_bias") if self.affine else ()
        return {"weight": (self.features, self.shape[1])} | dict.fromkeys(vectors, (self.features,))

    def buffers(self, device: str) -> dict[str, Tensor]:
        initial = {"running_mean": 0.0, "running_var": 1.0}
        return {n: torch.full((self.features,), v, device=device) for n, v in initial.items()}

    def inputs(self, device: str, seed: int = 0) -> dict[str, Tensor]:
        tensors = super().inputs(device, seed)
        weight = tensors["weight"].detach().to(self.dtype)  # as a linear layer of the input's dtype
        tensors |= {"weight": weight.requires_grad_()}
        if self.joined:  # of what memory happens to hold, A might be out of range
            size = (self.shape[0], self.features)
            tensors |= {"dy": torch.ones(size, dtype=self.dtype, device=device)}
        return tensors

    def call(self, tensors: dict[str, Tensor]) -> Tensor:
        rest = (
            tensors["weight"], None, tensors["running_mean"], tensors["running_var"],
            tensors.get("norm_weight"), tensors.get("norm_bias"), self.training,
        )  # fmt: skip
        if len(self.shape) == 2:
            options = {"activation": self.activation, "algorithm": self.algorithm}
            return FF.linear_batch_norm(tensors["input"], *rest, **options)
        from fastnorm.backend import implementation

        # what conv_batch_norm calls, which takes no algorithm
        y: Tensor = implementation(tensors["input"]).linear_batch_norm(
            tensors["input"], *rest, 0.1, 1e-5, self.activation, self.algorithm, None
        )
        return y

    @property
    def element_bytes(self) -> int:
        rows = math.prod(self.shape) // self.shape[1]
        return rows * self.features * self.dtype.itemsize

    def minimum_passes(self, forward_whole: bool, backward_whole: bool) -> tuple[float, float]:
        x = self.shape[1] / self.features  # a pass over X, in passes over Y
        gated = 1 if self.activation != "identity" else 0  # Y, of which the gate is a function
        again = 2 if self.training else 1  # X, for its Gram matrix; dY and Y always, for P and dX
        if self.joined:  # P reads dY, Y and X and writes G; the product reads G and writes dX;
            copied = 3 * x if self.training else 0  # it reads X − x̄ too, which is made of X
            return again * x + 1, 1 + gated + x + 1 + 1 + x + copied
        if self.algorithm == "gram":
            return again * x + 1, 2 * (1 + gated) + again * x + x
        z = 1 + 2  # written; read, and y written
        # dz from dy and z, in training twice, then the two products that torch makes of it
        return x + z, (5 if self.training else 3) + 2 * (1 + x)


SHAPES = {  # (M, K) -> N of the design's table, then of real models
    "stage 1": ((200704, 64), 256),
    "stage 3": ((50176, 256), 1024),
    "stage 4": ((65536, 512), 2048),
    "mobilenet v2 expansion 1": ((802816, 16), 96),
    "mobilenet v2 expansion 4": ((50176, 64), 384),
    "mixer channels": ((25088, 512), 2048),
    "point cloud": ((262144, 64), 128),
}


H200 = Device(multiprocessors=132)


def as_chosen(case: LinearBatchNormCase) -> LinearBatchNormCase:
    """By the algorithm that `auto` takes, and in the form that the model takes."""
    sizes = (*case.shape, case.features, case.dtype)
    algorithm = cost.choose(*sizes, case.activation, H200, case.training, True)
    return replace(case, algorithm=algorithm, joined=algorithm == "gram" and _joins(case))


def _joins(case: LinearBatchNormCase) -> bool:
    sizes = (*case.shape, case.features, case.dtype)
    return cost.joins(cost.problem(*sizes, H200, case.training, True))


def cases() -> Iterator[Case]:
    for name, (shape, features) in SHAPES.items():
        case = LinearBatchNormCase(name, shape, features=features)
        yield as_chosen(case)
        yield replace(case, algorithm="epilogue")
    yield LinearBatchNormCase("stage 1", (200704, 64), features=256, training=False)
    image = LinearBatchNormCase("bottleneck", (64, 64, 56, 56), features=256)
    yield image
    yield replace(image, layout="channels_last")
    single = LinearBatchNormCase("stage 1", (200704, 64), torch.float32, features=256)
    yield replace(single, joined=_joins(single))
    yield replace(single, algorithm="epilogue")


def small_cases() -> Iterator[Case]:
    """Small enough for the interpreter, and large enough that X and Y outweigh what is small."""
    case = LinearBatchNormCase("rows", (4096, 16), features=64)
    yield case
    yield replace(case, activation="identity")
    yield replace(case, training=False)
    yield replace(case, activation="identity", training=False)
    yield replace(case, algorithm="epilogue")
    yield replace(case, dtype=torch.float32)
    joined = replace(case, shape=(2048, 32), features=128, joined=True)
    yield joined
    yield replace(joined, training=False)
    yield replace(joined, dtype=torch.float32)
    image = LinearBatchNormCase("image", (8, 16, 24, 24), features=64)
    yield image
    yield replace(image, layout="channels_last")


def option_cases() -> Iterator[Case]:
    """Every activation, dtype, layout and absent tensor once."""
    case = LinearBatchNormCase("options", (4096, 24), features=40)
    for training in (True, False):
        mode = replace(case, training=training)
        for activation in ACTIVATIONS:
            if activation in OUTPUT_GRADS:
                yield replace(mode, activation=activation)
            yield replace(mode, activation=activation, algorithm="epilogue")
        for dtype in (torch.bfloat16, torch.float32):
            yield replace(mode, dtype=dtype, shape=(4096, 33), features=41, joined=True)
        for dtype in (torch.float16, torch.float32, torch.float64):
            yield replace(mode, dtype=dtype, affine=False)
            yield replace(mode, dtype=dtype, shape=(8, 24, 9, 9))
            yield replace(mode, dtype=dtype, algorithm="epilogue")
        yield replace(mode, shape=(4096, 33), features=41)
        yield replace(mode, shape=(4, 33, 9, 9), features=41)


def sweeps(compiled: Callable[[Sequence[Case]], int]) -> Sweeps:
    """Batches share code; so do image sizes, but for the power of two that divides them."""
    rows = LinearBatchNormCase("sweep", (50176, 64), features=256)
    image = LinearBatchNormCase("sweep", (32, 64, 56, 56), features=256)
    one = compiled([rows])
    batches = [(m, 64) for m in (1000, 4097, 50000, 65536, 100352)]
    sides = [(32, 64, s, s) for s in (16, 48, 56, 64, 96)]
    return {
        "linear, batch": ([replace(rows, shape=shape) for shape in batches], one),
        "linear, sides": ([replace(image, shape=shape) for shape in sides], 2 * one),
    }
