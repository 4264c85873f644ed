"""The kernel checker against small wrong kernels, each caught by name, and right ones that pass."""

import re

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from checker import KernelFault, checked

pytestmark = [
    pytest.mark.unchecked,
    pytest.mark.skipif(
        not triton.knobs.runtime.interpret, reason="kernels are compiled where there is a GPU"
    ),
]


@pytest.fixture
def verdict():
    """Runs a launcher of this module under the checker."""

    def judge(launcher, *args, **kwargs):
        with checked(modules=(__name__,), **kwargs):
            return launcher(*args)

    return judge


def says(*parts: str) -> str:
    return ".*".join(re.escape(part) for part in parts)


# One kernel, right for PAST = BEFORE = SHIFT = SHORT = 0: y = 2x, a program owns BLOCK elements.
@triton.jit
def double_kernel(
    x_ptr,
    y_ptr,
    N,
    PAST: tl.constexpr,
    BEFORE: tl.constexpr,
    SHIFT: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + own - BEFORE, mask=own < N + PAST, other=0.0)
    i = own - SHIFT * tl.program_id(0)
    tl.store(y_ptr + i, (2 * x).to(y_ptr.dtype.element_ty), mask=i < N - SHORT)


def double(x, y=None, past=0, before=0, shift=0, short=0, block=32):
    y = torch.empty_like(x) if y is None else y
    N = x.numel()
    double_kernel[(triton.cdiv(N, block),)](
        x, y, N, PAST=past, BEFORE=before, SHIFT=shift, SHORT=short, BLOCK=block
    )
    return y


def test_a_right_kernel_passes(verdict):
    x = torch.randn(10, 10)
    assert torch.equal(verdict(double, x), 2 * x)


def test_load_past_the_end(verdict):
    with pytest.raises(KernelFault) as fault:
        verdict(double, torch.ones(10, 10), None, 1)
    assert re.search(
        says("double_kernel, program (3, 0, 0): loads element 100 [10, 0] of x_ptr", "ends before"),
        str(fault.value),
    )


def test_load_before_the_start(verdict):
    with pytest.raises(
        KernelFault, match=says("program (0, 0, 0): loads element -1 [-1, 9] of x_ptr", "begins")
    ):
        verdict(double, torch.ones(10, 10), None, 0, 1)


def test_store_past_the_end(verdict):
    guard = torch.zeros(101)
    x, y = torch.ones(101), torch.empty(0).set_(guard[:100].clone().untyped_storage())
    with pytest.raises(
        KernelFault, match=says("program (3, 0, 0): stores element 100 [100] of y_ptr", "bounds")
    ):
        verdict(double, x, y)


def test_load_of_an_element_that_ends_past_the_end(verdict):
    x = torch.empty(0).set_(torch.zeros(5, dtype=torch.bfloat16).untyped_storage(), 0, (2,))
    assert verdict(double, x).eq(0).all()
    with pytest.raises(KernelFault, match=says("loads element 2 [2] of x_ptr", "10 bytes ends")):
        verdict(double, x, None, 1)


def test_memory_is_not_touched_by_what_is_out_of_bounds(verdict):
    """A wild offset would end the process, not the test."""
    with pytest.raises(KernelFault, match=says("loads element -1099511627776", "of x_ptr")):
        verdict(double, torch.ones(4), None, 0, 2**40)
    with pytest.raises(KernelFault, match=says("loads an address", "no argument is near")):
        verdict(double, torch.ones(4), None, 0, 2**55)


def test_overlapping_tiles(verdict):
    with pytest.raises(
        KernelFault,
        match=says(
            "double_kernel, program (0, 0, 0): stores element 31 [3, 1] of y_ptr",
            "which program (1, 0, 0) stores",
        ),
    ):
        verdict(double, torch.ones(10, 10), None, 0, 0, 1)


@triton.jit
def fill_kernel(read_flags_ptr, y_ptr, LEAVE: tl.constexpr):
    if read_flags_ptr is not None and tl.load(read_flags_ptr) == 0:
        return
    lane = tl.arange(0, 4)
    tl.store(y_ptr + lane, lane + 1.0, mask=lane < 4 - LEAVE)


def fill(flag, leave):
    y = torch.empty(4)
    flags = None if flag is None else torch.tensor([flag])
    fill_kernel[(1,)](flags, y, LEAVE=leave)
    return y


def test_a_launch_that_waits_for_a_flag(verdict):
    """Where that is down it need not write anything; where it is up, or there is none, it must."""
    verdict(fill, 0, 0)
    assert verdict(fill, 1, 0).tolist() == verdict(fill, None, 0).tolist() == [1, 2, 3, 4]
    for flag, leave in ((1, 1), (None, 4)):
        with pytest.raises(KernelFault, match="y_ptr of fill_kernel was never written"):
            verdict(fill, flag, leave)


def test_missing_store(verdict):
    with pytest.raises(
        KernelFault,
        match=says(
            "element 99 [9, 9] of y_ptr of double_kernel was never written", "1 of 100 elements"
        ),
    ):
        verdict(double, torch.ones(10, 10), None, 0, 0, 0, 1)


def test_read_of_a_neighbour_that_is_rewritten(verdict):
    x = torch.arange(64.0)
    with pytest.raises(
        KernelFault,
        match=says(
            "program (1, 0, 0): loads element 31 [31] of x_ptr", "which program (0, 0, 0) stores"
        ),
    ):
        verdict(shifted_in_place, x)


def shifted_in_place(x):
    return double(x[1:], x[1:], before=1)


def test_in_place_by_its_own_program_passes(verdict):
    x = torch.arange(64.0)
    verdict(double, x, x)
    assert torch.equal(x, 2 * torch.arange(64.0))


def test_arguments_that_share_a_storage(verdict):
    base = torch.zeros(96)
    verdict(double, base[:48], base[48:])  # apart
    with pytest.raises(
        KernelFault, match=says("program (1, 0, 0): loads element 32 [32] of x_ptr", "(0, 0, 0)")
    ):
        verdict(double, base[:64], base[32:])


def test_race_between_two_widths(verdict):
    """A float32 that one program reads is two bf16 elements that another writes."""
    x = torch.zeros(64)
    y = x.view(torch.bfloat16)[3:67]  # the second program writes from the upper half of x[17] on
    with pytest.raises(
        KernelFault, match=says("program (0, 0, 0): loads element 17 [17] of x_ptr", "(1, 0, 0)")
    ):
        verdict(double, x, y)


def test_atomics(verdict):
    y = torch.zeros(4)
    with pytest.raises(
        KernelFault,
        match=says("add_kernel, program (0, 0, 0): updates element 2 [2] of y_ptr by an atomic"),
    ):
        verdict(lambda: add_kernel[(1,)](y, CAS=False))
    with pytest.raises(KernelFault, match="atomic"):
        verdict(lambda: add_kernel[(1,)](y, CAS=True))
    assert y.eq(0).all()


@triton.jit
def add_kernel(y_ptr, CAS: tl.constexpr):
    if CAS:
        tl.atomic_cas(y_ptr + 2, 0.0, 1.0)
    else:
        tl.atomic_add(y_ptr + 2, 1.0)


@triton.jit
def accumulate_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    y = tl.load(y_ptr + i, mask=i < N, other=0)
    tl.store(y_ptr + i, y + tl.load(x_ptr + i, mask=i < N, other=0), mask=i < N)


def accumulated(x, prepare):
    y = torch.empty_like(x)
    prepare(y)
    accumulate_kernel[(1,)](x, y, x.numel(), BLOCK=16)
    accumulate_kernel[(1,)](x, y, x.numel(), BLOCK=16)
    return y


DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.int8,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_read_before_written(verdict, dtype):
    x = torch.ones(10, dtype=dtype)
    with pytest.raises(
        KernelFault,
        match=says("accumulate_kernel, program (0, 0, 0): loads element 0 [0] of y_ptr", "before"),
    ):
        verdict(accumulated, x, lambda y: None)
    with pytest.raises(KernelFault, match=says("loads element 9 [9] of y_ptr", "read before")):
        verdict(accumulated, x, lambda y: y[:9].zero_())
    assert verdict(accumulated, x, torch.Tensor.zero_).eq(2).all()  # torch's writing counts


@pytest.mark.parametrize(
    ("allocated", "used"),
    [(torch.uint8, torch.float32), (torch.float32, torch.bfloat16), (torch.int64, torch.int8)],
    ids=str,
)
def test_memory_used_in_another_width(verdict, allocated, used):
    x = torch.ones(32, dtype=used)

    def launcher(short, first):
        y = torch.empty(32 * used.itemsize // allocated.itemsize, dtype=allocated).view(used)
        if first:
            double(x, y, short=short, block=8)
        accumulate_kernel[(1,)](x, y, 32 - short, BLOCK=32)
        return y

    assert verdict(launcher, 0, True).eq(3).all()
    with pytest.raises(KernelFault, match=says("loads element 0 [0] of y_ptr", "read before")):
        verdict(launcher, 0, False)
    with pytest.raises(KernelFault, match=says("of y_ptr of double_kernel was never written")):
        verdict(launcher, 8, True)


def test_a_wide_store_writes_each_of_its_bytes(verdict):
    """The stored bytes are those that mark what was not written."""
    marks = torch.tensor([0x5A5A5A5A] * 16).to(torch.uint32).view(torch.float32)

    def launcher():
        y = torch.empty(64, dtype=torch.uint8)
        return double(marks / 2, y.view(torch.float32))

    assert verdict(launcher).view(torch.uint8).eq(0x5A).all()


@triton.jit
def bytes_kernel(y_ptr, again_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, i.to(y_ptr.dtype.element_ty))
    tl.store(again_ptr + i, tl.load(y_ptr + i))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16], ids=str)
def test_any_value_may_be_written(verdict, dtype):
    """All bytes, also those that mark what was not written."""

    def launcher():
        y, again = torch.empty(256, dtype=dtype), torch.empty(256, dtype=dtype)
        bytes_kernel[(1,)](y, again, BLOCK=256)
        bytes_kernel[(1,)](again, y, BLOCK=256)
        return y

    assert torch.equal(verdict(launcher), torch.arange(256).to(dtype))


def test_bool_output(verdict):
    def launcher(short):
        y = torch.empty(40, dtype=torch.bool)
        return double(torch.ones(40), y, short=short)

    assert verdict(launcher, 0).all()
    with pytest.raises(KernelFault, match=says("element 39 [39] of y_ptr", "never written")):
        verdict(launcher, 1)


# A program owns a row and stores its sum; then one program adds the sums.
@triton.jit
def partial_sum_kernel(x_ptr, partial_ptr, N, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * N + i, mask=i < N, other=0.0)
    tl.store(partial_ptr + row, tl.sum(x))


@triton.jit
def total_kernel(partial_ptr, y_ptr, M, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr, tl.sum(tl.load(partial_ptr + i, mask=i < M, other=0.0)))


def total(x, programs, summed):
    M, N = x.shape
    partial = x.new_empty(M)
    y = torch.empty((), dtype=x.dtype)
    partial_sum_kernel[(1, programs)](x, partial, N, BLOCK=16)
    total_kernel[(1,)](partial, y, summed, BLOCK=16)
    return y


def test_row_reduction(verdict):
    x = torch.arange(60.0).reshape(5, 12)
    assert verdict(total, x, 5, 5) == x.sum()
    with pytest.raises(
        KernelFault,
        match=says("total_kernel, program (0, 0, 0): loads element 4 [4] of partial_ptr", "before"),
    ):
        verdict(total, x, 4, 5)
    with pytest.raises(
        KernelFault,
        match=says("element 4 [4] of partial_ptr of partial_sum_kernel was never written"),
    ):
        verdict(total, x, 4, 4)
    with pytest.raises(
        KernelFault, match=says("partial_sum_kernel, program (0, 5, 0): loads element 60 [5, 0]")
    ):
        verdict(total, x, 6, 5)


def test_scratch_may_stay_partly_unwritten(verdict):
    x = torch.arange(60.0).reshape(5, 12)
    assert verdict(total, x, 4, 4, scratch=("partial_ptr",)) == x[:4].sum()
    with pytest.raises(KernelFault, match="read before written"):
        verdict(total, x, 4, 5, scratch=("partial_ptr",))


@triton.jit
def strided_kernel(x_ptr, y_ptr, M, N, stride_x, stride_y, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_x + i, mask=i < N, other=0.0)
    tl.store(y_ptr + row * stride_y + i, x, mask=i < N)


def strided(x, columns, y=None):
    M = x.shape[0]
    y = torch.empty_strided(x.shape, (x.shape[1] + 3, 1)) if y is None else y
    strided_kernel[(M,)](x, y, M, columns, x.stride(0), y.stride(0), BLOCK=16)
    return y


def test_strided_views(verdict):
    """The gaps of a strided output need no store; in them an access is still in its storage."""
    x = torch.randn(6, 20)[1:5, 4:12]
    assert torch.equal(verdict(strided, x, 8), x)
    verdict(strided, x, 10, torch.zeros(5, 11)[:4, :8])
    with pytest.raises(KernelFault, match=says("element 7 [0, 7] of y_ptr", "4 of 32 elements")):
        verdict(strided, x, 7)
    last = torch.randn(6, 20)[3:, 12:]
    with pytest.raises(
        KernelFault,
        match=says("program (2, 0, 0): loads element 48 [2, 8] of x_ptr, outside its shape (3, 8)"),
    ):
        verdict(strided, last, 9)


def test_channels_last_names_the_index(verdict):
    x = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)
    with pytest.raises(KernelFault, match=says("element 119 [1, 2, 3, 4] of y_ptr", "1 of 120")):
        verdict(double, x, None, 0, 0, 0, 1)
    with pytest.raises(KernelFault, match=says("element 79 [1, 0, 3, 4] of y_ptr", "3 of 120")):
        verdict(double, x, None, 0, 0, 0, 3)


@triton.jit
def optional_kernel(x_ptr, w_ptr, y_ptr, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < N, other=0.0)
    if w_ptr is not None:
        x *= tl.load(w_ptr + i, mask=i < N, other=0.0)
    tl.store(y_ptr + i, x, mask=i < N)


def test_none_and_empty_arguments(verdict):
    def launcher(x, w, n):
        y = torch.empty_like(x)
        optional_kernel[(1,)](x, w, y, n, BLOCK=8)
        return y

    assert verdict(launcher, torch.ones(5), None, 5).eq(1).all()
    assert verdict(launcher, torch.ones(0), torch.ones(0), 0).shape == (0,)
    assert verdict(launcher, torch.ones(9)[3:3], None, 0).shape == (0,)
    with pytest.raises(KernelFault, match=says("loads element 0 [0] of w_ptr, outside its shape")):
        verdict(launcher, torch.ones(5), torch.ones(5)[5:], 5)
    with checked():
        optional_kernel[(0,)](torch.ones(1), None, torch.ones(1), 1, BLOCK=8)  # no program at all


@triton.jit
def far_row_kernel(x_ptr, y_ptr, stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(y_ptr + row * BLOCK + i, tl.load(x_ptr + row * stride + i))


def test_an_offset_beyond_int32(verdict):
    """Four rows 2³⁰ elements apart, in memory that is reserved and hardly touched."""
    x = torch.empty(3 * 2**30 + 4, dtype=torch.bfloat16).as_strided((4, 4), (2**30, 1))
    x[:] = torch.arange(16.0).reshape(4, 4)

    def launcher(wide):
        y = torch.empty(4, 4, dtype=torch.bfloat16)
        far_row_kernel[(4,)](x, y, 2**30, WIDE=wide, BLOCK=4)
        return y

    assert torch.equal(verdict(launcher, True), x)
    with pytest.raises(
        KernelFault, match=says("program (2, 0, 0): loads element -2147483648 [-2, 0] of x_ptr")
    ):
        verdict(launcher, False)


@triton.jit
def choice_kernel(a_ptr, b_ptr, y_ptr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = (a_ptr + i).to(tl.int64), (b_ptr + i + SHIFT).to(tl.int64)
    chosen = tl.where(i % 2 == 0, a, b).to(tl.pointer_type(tl.float32))
    tl.store(y_ptr + i, tl.load(chosen, mask=i != 4, other=-1.0))


def test_lanes_that_reach_several_arguments(verdict):
    def launcher(shift):
        y = torch.empty(8)
        choice_kernel[(1,)](torch.zeros(8), torch.arange(8.0), y, SHIFT=shift, BLOCK=8)
        return y

    with interpreter.trace() as launches:
        assert verdict(launcher, 0).tolist() == [0, 1, 0, 3, -1, 5, 0, 7]
    assert [bytes_[0] for bytes_ in launches[0].traffic().values()] == [12, 16, 0]
    with pytest.raises(KernelFault, match=says("loads element 8 [8] of b_ptr", "out of bounds")):
        verdict(launcher, 1)


def test_only_the_named_modules_are_remembered():
    with checked():
        double(torch.ones(10), short=1)
    with checked(modules=("fastnorm.kernels", __name__ + "_not")):
        double(torch.ones(10), short=1)
    with pytest.raises(KernelFault, match="out of bounds"), checked():
        double(torch.ones(32), past=1, block=64)


def test_an_allocation_that_no_kernel_received_is_not_judged(verdict):
    verdict(lambda: torch.empty(4))


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(6),
        lambda: torch.empty_like(torch.ones(6)),
        lambda: torch.empty_strided((6,), (1,)),
        lambda: torch.empty_permuted((2, 3), (1, 0)),
        lambda: torch.ones(1).new_empty(6),
        lambda: torch.ones(1).new_empty_strided((6,), (2,)),
    ],
    ids=["empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "strided"],
)
def test_every_allocator_is_filled(allocate):
    with checked(modules=(__name__,)):
        assert allocate().isnan().all()


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")  # a builtin, behind a mock
def test_allocations_can_still_be_traced(verdict):
    compiled = torch.compile(
        lambda x: torch.empty_like(x).fill_(3), fullgraph=True, backend="eager"
    )
    assert verdict(compiled, torch.ones(4)).eq(3).all()


def test_everything_is_as_before_afterwards(verdict):
    def allocators():
        return torch.empty, torch.empty_like, vars(torch.Tensor).get("new_empty")

    before = allocators()

    def launcher():
        double(torch.ones(10), short=1)  # a fault, but the error below is the one to see
        return 1 / 0

    with pytest.raises(ZeroDivisionError):
        verdict(launcher)
    assert allocators() == before
    double(torch.ones(10), torch.ones(12), shift=1, block=4)


def test_a_fault_inside_a_device_function_keeps_its_type(verdict):
    with pytest.raises(KernelFault, match=says("nested_kernel, program (0, 0, 0): loads element")):
        verdict(lambda: nested_kernel[(1,)](torch.ones(4)))


@triton.jit
def read_past(x_ptr):
    return tl.load(x_ptr + 4)


@triton.jit
def nested_kernel(x_ptr):
    tl.store(x_ptr, read_past(x_ptr))
