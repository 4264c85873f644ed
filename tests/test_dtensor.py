"""DTensor: sequences sharded over processes, parameters replicated, as torch's SequenceParallel."""

import dtensor_work
import pytest
import ranks
import torch

import fastnorm


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return ranks.run(2, [dtensor_work.results], tmp_path_factory.mktemp("two"))


@pytest.mark.xdist_group("dtensor")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", dtensor_work.DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", dtensor_work.NORMS)
@pytest.mark.parametrize("backend", ranks.backends())
def test_sequence_parallel(two, backend, name, dtype):
    with fastnorm.use_backend("eager"):
        want = dtensor_work.want(name, dtype)
    step = 4 * torch.finfo(dtype).eps
    for rank in two:
        found = rank["results"][backend, name, dtype]
        assert found.keys() == want.keys()
        for key, tensor in want.items():
            size = max(tensor.abs().max().item(), 1.0)
            torch.testing.assert_close(
                found[key], tensor, rtol=step, atol=step * size, msg=lambda m, k=key: f"{k}: {m}"
            )
