"""Every operation moves the bytes its mathematics needs, and hardly more: no hidden pass."""

import models
import pytest
import torch
import traffic
from grid import FAMILIES, SMALL_CASES

import fastnorm
import fastnorm.functional as FF
from fastnorm.kernels.launch import ON_A_FLAG

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter"),
    pytest.mark.unchecked,  # it fills what is allocated, and that would be counted
]


def marked(case):
    """One width, and of the rows of two families one each with and without a residual, is enough
    where a minute counts."""
    twin = case.residual == (case.family == "rms_norm") and case.family in (
        "rms_norm",
        "layer_norm",
    )
    often = case.dtype is torch.bfloat16 and not twin
    return case if often else pytest.param(case, marks=pytest.mark.slow)


@pytest.mark.parametrize("case", [marked(case) for case in SMALL_CASES], ids=str)
def test_bytes_are_near_the_minimum(case):
    for count in traffic.count(case):
        assert 1.0 <= count.ratio <= count.bound, count


@pytest.mark.slow
def test_cases_cover_one_launch_and_several():
    """Or the bounds would say nothing about one of the two."""
    both = set(traffic.BOUNDS.values())
    bounds: dict[str, set[float]] = {}
    for case in SMALL_CASES:
        found = bounds.setdefault(case.family, set())
        if found != both and case.dtype is torch.bfloat16 and not case.residual:
            found.update(c.bound for c in traffic.count(case))
    second = {"rms_norm", "instance_norm"}  # of their families
    assert set(bounds) == {family.__name__.split(".")[-1] for family in FAMILIES} | second
    for family, found in bounds.items():
        assert found == both, family


def test_models_count_a_kernel_once():
    """A launcher is no operator besides: a whole step moves what its launches move."""
    model = fastnorm.BatchNorm2d(8, activation="relu")
    x = torch.randn(4, 8, 6, 6)
    found = models.step(model, lambda model: model(x), "triton")
    large = x.numel() * x.element_size()
    assert found.bytes < 5.5 * large + x.numel() * 4  # x, y; dy, x, and ones to start from
    eager = models.step(
        torch.nn.Sequential(torch.nn.BatchNorm2d(8), torch.nn.ReLU()),
        lambda model: model(x),
        "eager",
    )
    assert found.launches < eager.launches


def test_an_extra_pass_is_caught(monkeypatch):
    """A copy of the input, and a kernel run twice, each break the bound."""
    case = SMALL_CASES[0]
    original = FF.batch_norm

    def with_copy(x, *args, **kwargs):
        return original(x.clone(), *args, **kwargs)

    def twice(*args, **kwargs):
        original(*args, **kwargs)
        return original(*args, **kwargs)

    for slower in (with_copy, twice):
        monkeypatch.setattr(FF, "batch_norm", slower)
        forward, _ = traffic.count(case)
        assert forward.ratio > 1.3


def test_launches_that_wait_for_a_flag_move_nothing():
    """So the shares below leave them out."""
    import interpreter

    case = next(c for c in SMALL_CASES if c.family == "linear_batch_norm" and c.joined)
    tensors = case.inputs("cpu")
    with fastnorm.use_backend("triton"), interpreter.trace() as launches:
        case.forward_and_backward(tensors)
    waiting = [n for n in launches if any(name in n.tensors for name in ON_A_FLAG)]
    assert len(waiting) == 4  # the Gram matrix in two launches, its fold, dX
    for launch in waiting:
        moved = sum(loaded + stored for loaded, stored, *_ in launch.traffic().values())
        vectors = 8 if "fold" in launch.kernel else 0  # the buffers move where S is as it was
        assert moved <= 64 + 8 * vectors * case.features, launch


def test_parameters_and_partials_are_few():
    """At the benchmark's shapes, from the launches' arguments."""
    shares = traffic.planned()
    assert shares
    for case, (small, large) in shares.items():
        if large > 4 * traffic.SMALL_SHARE_FROM:
            assert small / (small + large) < traffic.SMALL_SHARE, case
