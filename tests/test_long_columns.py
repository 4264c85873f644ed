"""Channels of a million values each, innermost in memory: torch's CPU kernels lose three digits."""

import pytest
import torch

import fastnorm
from fastnorm.eager import native

NORMS = {
    "batch": (lambda: fastnorm.BatchNorm3d(8, affine=False), 1),
    "instance": (lambda: fastnorm.InstanceNorm3d(8), 1),
    "group": (lambda: fastnorm.GroupNorm(2, 8, affine=False), 4),
}


@pytest.mark.skipif(native._libc() is None, reason="no tensor is huge where pages are")
@pytest.mark.parametrize("mean", [0.5, 300.0])
@pytest.mark.parametrize("norm", NORMS)
def test_sums_are_short(norm, mean):
    make, together = NORMS[norm]
    torch.manual_seed(0)
    x = torch.randn(1, 128, 64, 129, 8).add_(mean)  # 33 MB, rows that do not divide evenly
    double = x.double().view(-1, 8 // together, together)
    var, average = torch.var_mean(double, (0, 2), correction=0, keepdim=True)
    want = ((double - average) / torch.sqrt(var + 1e-5)).view(x.shape)
    with fastnorm.use_backend("eager"):
        got = make()(x.movedim(-1, 1)).movedim(1, -1)
    # float32's own part of it: two roundings of a mean, over the standard deviation
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6 + mean * 2**-22)
