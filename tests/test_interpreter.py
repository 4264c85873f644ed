"""The mended interpreter against numbers that a GPU gives, and traces of known kernels."""

import resource
import time
import warnings
from pathlib import Path

import accesses
import interpreter
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

pytestmark = [
    pytest.mark.unchecked,
    pytest.mark.skipif(
        not triton.knobs.runtime.interpret, reason="kernels are compiled where there is a GPU"
    ),
]
interpreter.mend()

EPS32 = torch.finfo(torch.float32).eps


@triton.jit
def cast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.zeros(x.numel(), dtype=dtype)
    block = min(x.numel(), 65536)
    cast_kernel[(x.numel() // block,)](x, y, BLOCK=block)
    return y


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    integer = {2: torch.int16, 4: torch.int32}[want.element_size()]
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got[~nan].view(integer), want[~nan].view(integer))


@pytest.mark.parametrize("low", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], ids=hex)
def test_float32_rounds_to_bf16_as_torch_does(low):
    """Every upper half (denormals, maxima, infinities, NaN) with lower halves around the tie."""
    bits = (torch.arange(2**16) << 16) + low
    x = bits.to(torch.uint32).view(torch.float32)
    assert_same_bits(cast(x, torch.bfloat16), x.to(torch.bfloat16))


def test_every_bf16_survives_float32():
    x = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)
    assert torch.equal(cast(x, torch.float32).view(torch.int32), x.float().view(torch.int32))
    assert_same_bits(cast(cast(x, torch.float32), torch.bfloat16), x)


def test_every_fp16_as_torch_converts_it():
    x = torch.arange(2**16).to(torch.uint16).view(torch.float16)
    assert_same_bits(cast(x, torch.float32), x.float())
    assert_same_bits(cast(x, torch.bfloat16), x.to(torch.bfloat16))
    wide = torch.randn(2**16, generator=torch.manual_seed(0)) * 2.0 ** torch.randint(-30, 18, (1,))
    assert_same_bits(cast(wide, torch.float16), wide.half())


def test_float64_rounds_to_bf16_once():
    above_a_tie = 1 + 2**-8 + 2**-40  # float32 would make it the tie, and the tie goes to 1
    below_a_tie = 1 + 3 * 2**-8 - 2**-40
    top = (2 - 2**-8) * 2.0**127  # from here on the nearest bf16 is infinite
    inf, nan, least = float("inf"), float("nan"), 2.0**-133
    rounded = {
        above_a_tie: 1 + 2**-7,
        below_a_tie: 1 + 2**-7,
        -above_a_tie: -1 - 2**-7,
        top: inf,
        top * (1 - 2**-50): (2 - 2**-7) * 2.0**127,
        1e39: inf,
        -1e300: -inf,
        0.0: 0.0,
        -1e-300: -0.0,
        least / 2: 0.0,
        least / 2 * (1 + 2**-50): least,
        least * 1.5: 2 * least,
        inf: inf,
        -inf: -inf,
        nan: nan,
        3.0: 3.0,
    }
    x, want = (torch.tensor(list(v), dtype=torch.float64) for v in (rounded, rounded.values()))
    assert_same_bits(cast(x, torch.bfloat16), want.to(torch.bfloat16))
    random = torch.randn(4096, dtype=torch.float64, generator=torch.manual_seed(0))
    assert_same_bits(cast(random, torch.bfloat16), random.to(torch.bfloat16))


def test_integers_become_bf16_values():
    x = torch.arange(-2048, 2048, dtype=torch.int32) * 37
    assert_same_bits(cast(x, torch.bfloat16), x.to(torch.bfloat16))


@triton.jit
def compare_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    less = tl.load(x_ptr + i) < tl.load(y_ptr + i)
    less = less & (tl.load(x_ptr) < 1e30)  # a scalar truth, spread over the block
    tl.store(out_ptr + i, less.to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_comparison_gives_a_truth_value(dtype):
    x, y = torch.randn(2, 256, generator=torch.manual_seed(0)).to(dtype)
    out = torch.zeros(256, dtype=torch.bfloat16)
    compare_kernel[(1,)](x, y, out, BLOCK=256)
    assert torch.equal(out.bool(), x < y)
    assert set(out.tolist()) == {0.0, 1.0}


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, x + y)
    tl.store(out_ptr + BLOCK + i, x * y)
    tl.store(out_ptr + 2 * BLOCK + i, -x)
    tl.store(out_ptr + 3 * BLOCK + i, tl.full((BLOCK,), 1.5, tl.bfloat16))
    tl.store(out_ptr + 4 * BLOCK + i, tl.sum(x).to(tl.bfloat16))


def test_bf16_arithmetic_is_on_values():
    x, y = torch.randn(2, 64, generator=torch.manual_seed(0)).to(torch.bfloat16)
    out = torch.zeros(5, 64, dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](x, y, out, BLOCK=64)
    total = x.float().sum().to(torch.bfloat16)
    want = torch.stack([x + y, x * y, 0 - x, torch.full_like(x, 1.5), total.expand(64)])
    assert torch.equal(out, want)


@triton.jit
def dot_kernel(
    a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + k[:, None] * M + tl.arange(0, M)[None, :])  # stored transposed
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    c = tl.dot(tl.trans(a), b, input_precision=PRECISION)
    tl.store(c_ptr + m * N + n[None, :], c)


def dot_error(dtype: torch.dtype, precision: str, scale: float = 1.0) -> float:
    """Largest error in units of Σ|a·b|."""
    M, N, K = 32, 16, 64
    gen = torch.manual_seed(0)
    a, b = (scale * torch.randn(M, K, generator=gen)).to(dtype), torch.randn(K, N).to(dtype)
    c = torch.zeros(M, N)
    dot_kernel[(1,)](a.t().contiguous(), b, c, M=M, N=N, K=K, PRECISION=precision)
    error = (c.double() - a.double() @ b.double()).abs() / (a.double().abs() @ b.double().abs())
    return error.max().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dot_accumulates_in_float32(dtype):
    assert dot_error(dtype, "ieee") < 64 * EPS32
    assert dot_error(dtype, "ieee", scale=1e4) < 64 * EPS32  # sums beyond fp16's range


def test_dot_reads_tf32():
    assert 2**-14 < dot_error(torch.float32, "tf32") < 2**-9


@triton.jit
def short_dot_kernel(x_ptr, K: tl.constexpr):
    m, k = tl.arange(0, 16), tl.arange(0, K)
    a = tl.load(x_ptr + m[:, None] * K + k[None, :])
    tl.store(x_ptr + m[:, None] * 16 + m[None, :], tl.dot(a, tl.trans(a)))


def test_dot_refuses_what_the_compiler_refuses():
    x = torch.zeros(16, 16)
    with pytest.raises(Exception, match="K >= 16"):
        short_dot_kernel[(1,)](x, K=8)


@triton.jit
def shape_kernel(y_ptr, SIZE: tl.constexpr):
    x = tl.full((2, SIZE), 1.0, tl.float32)
    tl.static_assert(x.type.numel == 2 * SIZE and x.type.shape[1] == SIZE)
    tl.static_assert(x.type == tl.block_type(tl.float32, [2, SIZE]))
    tl.static_assert(x.type != tl.block_type(tl.float32, [SIZE, 2]))
    tl.store(y_ptr, tl.sum(x) + x.shape[0] + x.numel)


def test_shapes_are_what_the_compiler_takes():
    y = torch.zeros(1)
    for _ in range(2):  # made, and found again
        shape_kernel[(1,)](y, SIZE=4)
        assert y.item() == 8 + 2 + 8
        for size, error in ((3, "power of 2"), (4.0, "must have type")):
            with pytest.raises(triton.runtime.interpreter.InterpreterError, match=error):
                shape_kernel[(1,)](y, SIZE=size)
            with pytest.raises((TypeError, ValueError), match=error):
                tl.block_type(tl.float32, [2, size])


@triton.jit
def fma_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.fma(x, x, -(x * x)))


def test_fma_rounds_once():
    x = torch.randn(64, generator=torch.manual_seed(0))
    y = torch.zeros(64)
    fma_kernel[(1,)](x, y, BLOCK=64)
    assert torch.equal(y, (x.double() ** 2 - (x * x).double()).float())
    assert y.abs().min() > 0 or y.count_nonzero() > 32


@triton.jit
def nan_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr, NAN: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.maximum(x, 0.0, propagate_nan=NAN))
    tl.store(y_ptr + BLOCK + i, tl.minimum(0.0, x, propagate_nan=NAN))
    tl.store(y_ptr + 2 * BLOCK + i, tl.clamp(x, -1.0, 1.0, propagate_nan=NAN))
    tl.store(y_ptr + 3 * BLOCK + i, tl.max(x, 0))
    tl.store(y_ptr + 4 * BLOCK + i, tl.min(x, 0))


def test_nan_is_dropped_unless_asked_for():
    nan = float("nan")
    x = torch.tensor([nan, -3.0, 2.0, nan])
    y = torch.zeros(5, 4)
    nan_kernel[(1,)](x, y, BLOCK=4, NAN=tl.PropagateNan.NONE)
    assert y.tolist() == [[0, 0, 2, 0], [0, -3, 0, 0], [-1, -1, 1, -1], [2.0] * 4, [-3.0] * 4]
    nan_kernel[(1,)](x, y, BLOCK=4, NAN=tl.PropagateNan.ALL)
    assert torch.equal(y[:3].isnan(), x.isnan().expand(3, 4))
    assert torch.equal(y[:3, 1:3], torch.tensor([[0.0, 2.0], [-3.0, 0.0], [-1.0, 1.0]]))
    nan_kernel[(1,)](torch.full((4,), nan), y, BLOCK=4, NAN=tl.PropagateNan.NONE)
    assert y[3:].isnan().all()


@triton.jit
def masked_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < N))
    tl.store(y_ptr + BLOCK + i, tl.load(x_ptr + i, mask=i < N, other=0))
    one = tl.load(x_ptr + N, mask=N < 0, other=0)
    tl.store(y_ptr + 2 * BLOCK + i, one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32], ids=str)
def test_masked_lanes_are_undefined_without_other(dtype):
    x, y = torch.ones(8, dtype=dtype), torch.zeros(3, 8, dtype=dtype)
    masked_kernel[(1,)](x, y, 5, BLOCK=8)
    undefined = y[0, 5:].isnan() if dtype.is_floating_point else y[0, 5:] == 0x5A5A5A5A
    assert undefined.all()
    assert y[0, :5].eq(1).all()
    assert y[1].tolist() == [1] * 5 + [0] * 3
    assert y[2].eq(0).all()


@triton.jit
def arguments_kernel(y_ptr, eps, eps64: tl.float64, flag, N, N64: tl.int64):
    tl.store(y_ptr, eps.to(tl.float64))
    tl.store(y_ptr + 1, eps64.to(tl.float64))
    tl.store(y_ptr + 2, tl.where(flag, 1.0, 0.0))
    tl.store(y_ptr + 3, (N * N).to(tl.float64))
    tl.store(y_ptr + 4, (N64 * N64).to(tl.float64))


def test_scalar_arguments_have_the_compilers_types():
    y = torch.zeros(5, dtype=torch.float64)
    arguments_kernel[(1,)](y, 1e-5, 1e-5, True, 2**16 + 1, 2**16 + 1)
    square = (2**16 + 1) ** 2
    want = [float(np.float32(1e-5)), 1e-5, 1.0, square - 2**32, square]
    assert y.tolist() == want
    arguments_kernel[(1,)](y, 1e-5, 1e-5, False, 2**31, 1)  # an int64, NumPy said uint32
    assert y[2:4].tolist() == [0.0, 2.0**62]


@triton.jit
def loop_kernel(y_ptr, start, N, WIDE: tl.constexpr, TL: tl.constexpr):
    first = start.to(tl.int64) if WIDE else start
    if TL:
        for row in tl.range(first, start + 1, num_stages=2):
            tl.store(y_ptr, (row * N).to(tl.int64))
    else:
        for row in range(first, start + 1):
            for same in range(row, row + 1):
                tl.store(y_ptr, (same * N).to(tl.int64))


@pytest.mark.parametrize("tl_range", [False, True])
def test_loop_variable_has_its_bounds_type(tl_range):
    y = torch.zeros(1, dtype=torch.int64)
    loop_kernel[(1,)](y, 2**20, 2**12, WIDE=True, TL=tl_range)
    assert y.item() == 2**32
    loop_kernel[(1,)](y, 2**20, 2**12 - 1, WIDE=False, TL=tl_range)
    assert y.item() == -(2**20)  # as on a GPU, where int32 wraps


@triton.jit
def steps_kernel(y_ptr, N):
    total = 0
    for i in range(N):
        total += i
    for i in range(N, 0, -2):
        total += 100 * i
    for i in tl.static_range(3):
        total += 10000 * i
    tl.store(y_ptr, total)


def test_loops_step_as_in_python():
    y = torch.zeros(1, dtype=torch.int32)
    steps_kernel[(1,)](y, 5)
    assert y.item() == 10 + 900 + 30000


def test_grid_has_a_gpus_limits():
    y = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="65535"):
        steps_kernel[(1, 65536)](y, 1)


@triton.jit
def merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    count = count_a + count_b
    delta = mean_b - mean_a
    mean = mean_a + delta * (count_b / count)
    return count, mean, m2_a + m2_b + delta * delta * (count_a * count_b / count)


@triton.jit
def first_of(a, b):
    return a


@triton.jit
def larger(a, b):
    if a > b:  # control flow: no tree of blocks can do it
        b = a
    return b


@triton.jit
def moments_kernel(x_ptr, y_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    i, j = tl.arange(0, ROWS), tl.arange(0, COLS)
    x = tl.load(x_ptr + i[:, None] * COLS + j[None, :])
    one = tl.full((ROWS, COLS), 1.0, tl.float32)
    count, mean, m2 = tl.reduce((one, x, x * 0.0), 1, merge)
    tl.store(y_ptr + i, mean)
    tl.store(y_ptr + ROWS + i, m2 / count)
    tl.store(y_ptr + 2 * ROWS + i, tl.sum(tl.reduce(x, 1, first_of, keep_dims=True), axis=1))
    tl.store(y_ptr + 3 * ROWS + i, tl.reduce(x, -1, larger))
    tl.store(y_ptr + 4 * ROWS + i, tl.argmax(x, 1).to(tl.float32))
    tl.store(y_ptr + 5 * ROWS + i, tl.reduce(x, None, first_of))


def test_custom_reductions():
    x = torch.randn(4, 64, generator=torch.manual_seed(0)) + 10
    y = torch.zeros(6, 4)
    moments_kernel[(1,)](x, y, ROWS=4, COLS=64)
    torch.testing.assert_close(y[0], x.mean(1), rtol=8 * EPS32, atol=0)
    torch.testing.assert_close(y[1], x.var(1, correction=0), rtol=1e3 * EPS32, atol=0)
    want = [x[:, 0], x.amax(1), x.argmax(1).float(), x[0, 0].expand(4)]
    assert torch.equal(y[2:], torch.stack(want))


@triton.jit
def warnings_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x / (x - x) + tl.log(-x) + tl.exp(x * 1e30) + tl.max(x / 0.0 - x / 0.0, 0))


def test_kernels_do_not_warn_and_the_host_still_does():
    x = torch.ones(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings_kernel[(1,)](x, torch.zeros(4), BLOCK=4)
        with pytest.raises(RuntimeWarning):
            np.ones(1) / np.zeros(1)


@triton.jit
def twice(x):
    return x + x


@triton.jit
def device_call_kernel(x_ptr, FAIL: tl.constexpr):
    x = twice(tl.load(x_ptr))
    tl.static_assert(not FAIL)
    tl.store(x_ptr, x)


@pytest.mark.parametrize("fail", [False, True])
def test_the_language_is_the_compilers_again_after_a_launch(fail):
    originals = tl.range, tl.tensor.__dict__.get("__bool__"), tl.reduce
    x = torch.ones(1)
    if fail:
        with pytest.raises(Exception, match="AssertionError"):
            device_call_kernel[(1,)](x, FAIL=True)
    else:
        device_call_kernel[(1,)](x, FAIL=False)
    assert x.item() == (1 if fail else 2)
    assert tl.core.is_builtin(tl.arange)
    assert tl.core.is_builtin(tl.core.load)
    assert originals == (tl.range, tl.tensor.__dict__.get("__bool__"), tl.reduce)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("traced", [False, True])
def test_a_huge_untouched_storage_stays_untouched(traced):
    N = 2**32  # bf16 elements: 2³³ bytes
    x, y = torch.empty(N, dtype=torch.bfloat16), torch.zeros(32)
    x[:16] = x[-16:] = 3
    before, start = resident_bytes(), time.perf_counter()
    if traced:
        with interpreter.trace() as launches:
            ends_kernel[(1,)](x, y, N, BLOCK=16)
        assert launches[0].bytes_loaded() == 64
    else:
        ends_kernel[(1,)](x, y, N, BLOCK=16)
    assert y.eq(3).all()
    assert time.perf_counter() - start < 1
    assert resident_bytes() - before < 2**25


@triton.jit
def ends_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + (N - BLOCK) + i).to(tl.float32))
    tl.store(y_ptr + BLOCK + i, tl.load(x_ptr + i).to(tl.float32))


@triton.jit
def scale_kernel(x_ptr, w_ptr, y_ptr, N, scale, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0), tl.arange(0, BLOCK)
    mask = cols < N
    y = tl.load(x_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32) * scale
    if w_ptr is not None:
        y *= tl.load(w_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * N + cols, y, mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trace_counts_a_shared_weight_once(dtype):
    M, N, size = 5, 100, dtype.itemsize
    x, w = torch.ones(M, N, dtype=dtype), torch.ones(N)
    y = torch.empty_like(x)
    with interpreter.trace() as launches:
        scale_kernel[(M,)](x, w, y, N, 2.0, BLOCK=128, num_warps=4)
    (launch,) = launches
    assert launch.traffic() == {
        "x_ptr": (M * N * size, 0, M * N * size, 0),
        "w_ptr": (N * 4, 0, M * N * 4, 0),
        "y_ptr": (0, M * N * size, 0, M * N * size),
    }
    assert launch.bytes_loaded() == M * N * size + N * 4
    assert launch.bytes_loaded(distinct=False) == M * N * (size + 4)
    assert launch.bytes_stored() == launch.bytes_stored(distinct=False) == M * N * size


def test_numbering_needs_no_array_over_a_gap():
    address = np.array([2**40, 4, 8, 2**40], np.uint64)
    number, count = accesses.numbered(address, 4)
    assert count <= 4
    assert number[0] == number[3]
    assert len({*number.tolist()}) == 3


def test_trace_knows_what_was_launched():
    base = torch.zeros(4, 6)
    x, y = base[1:3, :4], torch.zeros(2, 4)
    with interpreter.trace() as launches:
        scale_kernel[lambda meta: (2,)](x, None, y, 4, 0.5, BLOCK=4, num_warps=2)
        scale_kernel[(1,)](y, y, y, N=4, scale=2.0, BLOCK=4)
    first, second = launches
    assert (first.kernel, first.module) == ("scale_kernel", __name__)
    assert (first.grid, second.grid) == ((2, 1, 1), (1, 1, 1))
    assert first.constants == {"w_ptr": None, "BLOCK": 4}
    assert first.scalars == {"N": 4, "scale": 0.5}
    assert first.options == {"num_warps": 2}
    argument = first.tensors["x_ptr"]
    assert (argument.data_ptr, argument.shape, argument.stride) == (x.data_ptr(), (2, 4), (6, 1))
    assert (argument.storage_ptr, argument.storage_bytes) == (base.data_ptr(), 96)
    assert argument.dtype is torch.float32
    want = x.data_ptr() + 4 * np.arange(8, dtype=np.uint64)  # the kernel takes rows of 4
    assert np.array_equal(first.loads["address"], want)
    assert first.loads["program"].tolist() == [0] * 4 + [1] * 4
    # one tensor given three times: each access counts for the argument it was made through
    assert second.traffic() == {
        "x_ptr": (16, 0, 16, 0),
        "w_ptr": (16, 0, 16, 0),
        "y_ptr": (0, 16, 0, 16),
    }
    assert second.bytes_loaded() == 16
    assert second.bytes_loaded(distinct=False) == 32


def test_trace_is_over_when_its_context_is():
    x = torch.ones(1, 4)
    with interpreter.trace() as launches:
        pass
    scale_kernel[(1,)](x, None, x, 4, 2.0, BLOCK=4)
    assert launches == []
    assert x.eq(2).all()


@triton.jit
def widths_kernel(x_ptr, half_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i) + tl.load(half_ptr + i).to(tl.float32))


def test_bytes_seen_in_two_widths_are_the_same_bytes():
    x, y = torch.ones(8), torch.zeros(8)
    with interpreter.trace() as launches:
        widths_kernel[(1,)](x, x.view(torch.bfloat16)[8:], y, BLOCK=8)
    assert launches[0].bytes_loaded() == 32
    assert launches[0].bytes_loaded(distinct=False) == 48


@triton.jit
def block_pointer_kernel(x_ptr, y_ptr, M, N, BLOCK: tl.constexpr):
    x = tl.make_block_ptr(x_ptr, (M, N), (N, 1), (0, 0), (BLOCK, BLOCK), (1, 0))
    y = tl.make_block_ptr(y_ptr, (M, N), (N, 1), (0, 0), (BLOCK, BLOCK), (1, 0))
    tl.store(y, tl.load(x, boundary_check=(0, 1), padding_option="zero"), boundary_check=(0, 1))


@triton.jit
def descriptor_kernel(x, y_ptr, M, N, BLOCK: tl.constexpr):
    y = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BLOCK, BLOCK])
    y.store([0, 0], x.load([0, 0]))


@triton.jit
def pairs_kernel(xs, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(xs[0] + i) + tl.load(xs[1] + i))


@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
def test_trace_sees_block_pointers_descriptors_and_tuples():
    x, y = torch.randn(5, 8, generator=torch.manual_seed(0)), torch.zeros(5, 8)
    with interpreter.trace() as launches:
        block_pointer_kernel[(1,)](x, y, 5, 8, BLOCK=8)
        assert torch.equal(x, y)
        y.zero_()
        described = triton.tools.tensor_descriptor.TensorDescriptor.from_tensor(x, [8, 8])
        descriptor_kernel[(1,)](described, y, 5, 8, BLOCK=8)
        assert torch.equal(x, y)
        pairs_kernel[(1,)]((x[0], x[1]), y, BLOCK=8)
    blocks, descriptors, pairs = (launch.traffic() for launch in launches)
    assert blocks == {"x_ptr": (160, 0, 160, 0), "y_ptr": (0, 160, 0, 160)}
    assert descriptors == {"x": (160, 0, 160, 0), "y_ptr": (0, 160, 0, 160)}
    assert pairs == {"xs[0]": (32, 0, 32, 0), "xs[1]": (32, 0, 32, 0), "y_ptr": (0, 32, 0, 32)}
    assert launches[1].scalars == {"M": 5, "N": 8}


@triton.jit
def count_kernel(y_ptr):
    tl.atomic_add(y_ptr, 1.0)
    tl.atomic_cas(y_ptr + 1, 0.0, 2.0)


def test_trace_counts_an_atomic_as_load_and_store():
    y = torch.zeros(2)
    with interpreter.trace() as launches:
        count_kernel[(3,)](y)
    assert y.tolist() == [3, 2]
    assert launches[0].traffic() == {"y_ptr": (8, 8, 24, 24)}
    assert launches[0].atomics["program"].tolist() == [0, 0, 1, 1, 2, 2]
