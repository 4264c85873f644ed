"""Every operation moves the bytes its mathematics needs, and hardly more: no hidden pass."""

import pytest
import torch
import traffic
from families import batch_norm
from grid import SMALL_CASES

import fastnorm.functional as FF
from fastnorm.kernels import launch

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter"),
    pytest.mark.unchecked,  # it fills what is allocated, and that would be counted
]


def marked(case):
    return case if case.dtype is torch.bfloat16 else pytest.param(case, marks=pytest.mark.slow)


@pytest.mark.parametrize("case", [marked(case) for case in SMALL_CASES], ids=str)
def test_bytes_are_near_the_minimum(case):
    for count in traffic.count(case):
        assert 1.0 <= count.ratio <= count.bound, count


def test_batch_norm_cases_cover_one_program_and_split():
    """Or the bounds would say nothing about one of the two."""
    plans = set()
    for case in batch_norm.small_cases():
        columns = case.layout != "contiguous" or len(case.shape) == 2
        positions = torch.Size(case.shape[2:]).numel()
        N, S = (1, case.shape[0] * positions) if columns else (case.shape[0], positions)
        size = case.dtype.itemsize
        plan = launch.channel_plan(N, case.shape[1], S, columns, size, launch.INTERPRETER)
        plans.add((plan.whole, columns))
        assert plan.whole == case.name.startswith("whole"), case
    assert len(plans) == 4


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


def test_parameters_and_partials_are_few():
    """At the benchmark's shapes, from the launches' arguments."""
    shares = traffic.planned()
    assert shares
    for case, (small, large) in shares.items():
        if large > 4 * traffic.SMALL_SHARE_FROM:
            assert small / (small + large) < traffic.SMALL_SHARE, case
