"""How close is close enough, derived once; and the shapes that are worth a test.

A result is compared with the float64 reference of the very same (rounded) inputs. Its error has two
sources: the one rounding at the store, half an ulp of the output's dtype, and the float32 (float64)
arithmetic before, a few roundings of intermediate size plus sums of `terms` numbers whose rounding
errors grow like √terms. Intermediates are as large as the largest element of the result. Where a
value is stored in between, that is one more rounding, of something about that large.
"""

import pytest
import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OFTEN = (torch.bfloat16, torch.float32)
each_dtype = pytest.mark.parametrize(
    "dtype",
    [d if d in OFTEN else pytest.param(d, marks=pytest.mark.slow) for d in FLOATS],
    ids=lambda d: str(d)[6:],
)
"""Those of the kernels' paths that differ, and the others where there is time."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def tolerance(
    dtype: torch.dtype,
    want: Tensor,
    terms: int = 1,
    roundings: int = 1,
    compute: torch.dtype | None = None,
    intermediate: float = 1.0,
) -> dict[str, float]:
    """rtol and atol of a result of `dtype` whose reference is `want`, computed in `compute`.

    `intermediate`: size of what is subtracted, where the result is what little is left of it.
    """
    store = torch.finfo(dtype).eps / 2
    step = torch.finfo(compute or compute_dtype(dtype)).eps
    scale = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 0.0
    # 8: roundings between the load and the store; a denormal step for outputs that small
    absolute = 8 * step * terms**0.5 + 2 * store * (roundings - 1)
    return {
        "rtol": store + 8 * step,
        "atol": absolute * max(scale, intermediate) + torch.finfo(dtype).smallest_normal,
    }


def assert_close(
    got: Tensor,
    want: Tensor,
    terms: int = 1,
    name: str = "",
    roundings: int = 1,
    compute: torch.dtype | None = None,
    intermediate: float = 1.0,
) -> None:
    torch.testing.assert_close(
        got.double(),
        want.double(),
        **tolerance(got.dtype, want, terms, roundings, compute, intermediate),
        equal_nan=True,
        msg=lambda text: f"{name}: {text}",
    )


def memory_formats(ndim: int) -> list[torch.memory_format]:
    """The formats a tensor of this rank can have."""
    channels_last = {4: [torch.channels_last], 5: [torch.channels_last_3d]}
    return [torch.contiguous_format, *channels_last.get(ndim, [])]
