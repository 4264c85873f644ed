"""SyncBatchNorm: processes with parts of a batch against float64 with all of it."""

import pytest
import ranks
import sync_cases
import torch
from cases import assert_close, compute_dtype

TWO = [sync_cases.results_of_cases]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return ranks.run(2, TWO, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return ranks.run(4, [sync_cases.results_of_cases], tmp_path_factory.mktemp("four"))


def assert_as_one(results, processes, backend, name):
    case = sync_cases.shared_cases(processes)[name]
    found = [rank["results_of_cases"][backend, name] for rank in results]
    want = sync_cases.expected(case)
    terms = want["y"].numel() // want["y"].shape[1]
    intermediate = max(abs(case.mean), 1.0)
    for key in ("y", *sync_cases.names_of_gradients(found[0])):
        got = sync_cases.whole(found, key)
        roundings = 1 + (case.residual and case.activation != "identity")
        assert_close(got, want[key], terms, f"{key}", roundings, compute_dtype(case.dtype))
    for key in ("running_mean", "running_var"):
        if case.tracked:
            assert_close(found[0][key], want[key], terms, key, intermediate=intermediate)
            for other in found[1:]:
                assert torch.equal(found[0][key], other[key]), "the same bits on all ranks"
    for part in found:
        assert part["count"].item() == 5
        backward = ["all_reduce"] if "dx" in part else []
        assert part["collectives"] == ["all_gather", *backward]


@pytest.mark.parametrize("name", sync_cases.shared_cases(2))
@pytest.mark.parametrize("backend", ranks.backends())
def test_two_processes(two, backend, name):
    assert_as_one(two, 2, backend, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sync_cases.shared_cases(4))
@pytest.mark.parametrize("backend", ranks.backends())
def test_four_processes(four, backend, name):
    assert_as_one(four, 4, backend, name)
