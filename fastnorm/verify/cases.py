"""The list of cases: everything crossed, or each thing met at least once."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from fastnorm.eager.activations import ACTIVATIONS, OUTPUT_GRADS
from fastnorm.verify import inputs
from fastnorm.verify.case import Case
from fastnorm.verify.channels import ChannelCase
from fastnorm.verify.products import ProductCase
from fastnorm.verify.rows import RowCase

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EPS = (1e-12, 1.0)  # beside the default
WEIGHTS = (0.0, 1e-30)

IMAGES = (  # a shape that one program takes, and one that programs share
    ((250, 24), "contiguous"),
    ((6, 6, 37), "contiguous"),
    ((6, 6, 37), "sliced"),
    ((4, 6, 9, 11), "contiguous"),
    ((4, 6, 9, 11), "channels_last"),
    ((4, 6, 9, 11), "strided"),
    ((2, 6, 4, 5, 6), "contiguous"),
    ((2, 6, 4, 5, 6), "channels_last_3d"),
)
SPLIT = (
    ((3001, 33), "contiguous"),
    ((9, 6, 60, 60), "contiguous"),
    ((9, 36, 20, 20), "channels_last"),
)
ROWS = (
    ((3, 1), "contiguous"),
    ((300, 64), "contiguous"),
    ((17, 127), "contiguous"),
    ((17, 127), "sliced"),
    ((17, 127), "strided"),
    ((2, 3, 1000), "contiguous"),
)
LONG = (((3, 20000), "contiguous"), ((2, 70001), "contiguous"))
PRODUCTS = (((7, 5), 3), ((127, 33), 40), ((260, 72), 150))
"""(M, K) -> N."""
KERNELS = (
    ((5, 12, 9, 7), "contiguous", 1),
    ((5, 12, 9, 7), "channels_last", 1),
    ((3, 8, 7, 6), "contiguous", 3),
)


def channels(operation: str) -> Iterator[Case]:
    """One case for each shape, layout and mode."""
    modes = (True, False) if operation != "group_norm" else (True,)
    for shape, layout in (*IMAGES, *SPLIT):
        if operation == "instance_norm" and len(shape) == 2:
            continue  # a set of one element
        for training in modes:
            if operation == "group_norm":
                groups = 3 if shape[1] % 3 == 0 else 1
                yield ChannelCase(operation, shape, layout=layout, num_groups=groups)
            else:
                yield ChannelCase(operation, shape, layout=layout, training=training)


def rows(operation: str) -> Iterator[Case]:
    for shape, layout in (*ROWS, *LONG):
        yield RowCase(operation, shape, layout=layout)


def linear(operation: str) -> Iterator[Case]:
    for shape, features in PRODUCTS:
        for algorithm in ("gram", "epilogue", "unfused"):
            for training in (True, False):
                yield ProductCase(
                    operation, shape, training=training, features=features, algorithm=algorithm
                )


def convolutions(operation: str) -> Iterator[Case]:
    for shape, layout, kernel in KERNELS:
        for training in (True, False):
            yield ProductCase(
                operation, shape, layout=layout, training=training, features=40, kernel=kernel
            )


OPERATIONS = {
    "batch_norm": channels,
    "instance_norm": channels,
    "group_norm": channels,
    "layer_norm": rows,
    "rms_norm": rows,
    "add_layer_norm": rows,
    "add_rms_norm": rows,
    "linear_batch_norm": linear,
    "conv_batch_norm": convolutions,
}


def cases(quick: bool) -> list[Case]:
    """All cases; `quick`: each pair of dtype with layout, and each other value, at least once."""
    found: list[Case] = []
    for operation, plain in OPERATIONS.items():
        bases = list(plain(operation))
        found += _quick(bases) if quick else _crossed(bases)
    return found


def _crossed(bases: list[Case]) -> Iterator[Case]:
    """Layout × mode × dtype × activation × residual; and every adversarial value."""
    for dtype in DTYPES:
        for base in bases:
            for activation in _activations(base):
                case = replace(base, dtype=dtype, activation=activation)
                yield case
                if _takes_residual(case):
                    yield replace(case, residual=True)
            yield from _adversarial(replace(base, dtype=dtype))


def _quick(bases: list[Case]) -> Iterator[Case]:
    """Each base in two dtypes; activations, residuals and values in turns over bases and dtypes."""
    turns = 0
    for position, base in enumerate(bases):
        for shift in (0, 1 + position % 3):
            yield replace(base, dtype=DTYPES[(position + shift) % len(DTYPES)])
    small = [base for base in bases if base.shape not in _LARGE]
    for name in ACTIVATIONS:
        for dtype in (torch.float32, torch.bfloat16):
            able = [b for b in small if name in _activations(b)]
            case = replace(able[turns % len(able)], dtype=dtype, activation=name)
            turns += 1
            yield replace(case, residual=_takes_residual(case) and bool(turns % 2))
    several = [base for base in small if base.shape[-1] > 1 and base.training]
    for turn, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16)):
        for case in _adversarial(replace(several[turn % len(several)], dtype=dtype)):
            yield case


_LARGE = {shape for shape, _ in (*SPLIT, *LONG)}


def _adversarial(base: Case) -> Iterator[Case]:
    if isinstance(base, ProductCase) and base.algorithm == "gram" and base.dtype is torch.float64:
        return  # it has no wider dtype for its second moment, so "auto" never takes it there
    for name in inputs.ADVERSARIAL:
        if inputs.fits(name, base.dtype):
            yield replace(base, values=name)
    for eps in EPS:
        yield replace(base, eps=eps)
    for weight in WEIGHTS:
        yield replace(base, weight=weight)


def _activations(case: Case) -> tuple[str, ...]:
    """Those that the case can end with."""
    gram = isinstance(case, ProductCase) and case.algorithm == "gram"
    return tuple(OUTPUT_GRADS) if gram else tuple(ACTIVATIONS)


def _takes_residual(case: Case) -> bool:
    return isinstance(case, ChannelCase)
