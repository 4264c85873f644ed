"""Compiled kernels without a GPU: the emulator of bench/emulate refuses what a device would, and
finds the contract kept. Every instruction here is compared with what its manual says."""

import json

import numpy as np
import pytest
import torch
from emulate import parameters_of, run
from emulate.memory import AccessError
from emulate.warpgroup import addresses
from test_codegen import python

pytestmark = pytest.mark.unchecked  # nothing is interpreted

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<99>; .reg .b64 %rd<99>;
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_1];
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;            // bytes of a word a thread
    cvt.u64.u32 %rd3, %r2;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
"""


def ran(body: str, x: torch.Tensor, threads: int = 32, shared: int = 0, **options) -> torch.Tensor:
    """A word a thread of what `body` leaves; %rd4 points to the thread's word of x, %rd5 of y."""
    y = torch.zeros(threads, dtype=x.dtype if x.element_size() == 4 else torch.int32)
    text = HEAD + body + "\nret;\n}\n"
    run(text, (1,), threads // 32, [x.data_ptr(), y.data_ptr()], [x, y], shared, **options)
    return y


def elementwise(instruction: str, x: torch.Tensor, **options) -> torch.Tensor:
    """%r4 of an instruction of %r3, a word of x."""
    body = f"ld.global.b32 {{%r3}}, [%rd4 + 0]; {instruction}; st.global.b32 [%rd5 + 0], {{%r4}};"
    return ran(body, x, **options)


def floats() -> torch.Tensor:
    x = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 10
    x[:6] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40])
    return x


def flushed(x: torch.Tensor) -> torch.Tensor:
    """Subnormal numbers as zeros of their sign."""
    return torch.where(x.abs() < 1e-38, torch.zeros_like(x).copysign(x), x)


def integers() -> torch.Tensor:
    x = torch.randint(-(2**31), 2**31, (32,), generator=torch.Generator().manual_seed(0))
    return x.to(torch.int32)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.f32 %r4, %r3, 0f3F800000", lambda x: x + 1),
        ("fma.rn.f32 %r4, %r3, %r3, 0fBF800000",
         lambda x: (x.double() * x.double() - 1).float()),
        ("max.f32 %r4, %r3, 0f00000000", lambda x: x.nan_to_num(nan=0, posinf=torch.inf).relu()),
        ("max.NaN.f32 %r4, %r3, 0f00000000", torch.relu),
        ("abs.ftz.f32 %r4, %r3", lambda x: torch.where(x.abs() < 1e-38, 0, x.abs())),
        ("neg.f32 %r4, %r3", torch.neg),
        ("div.full.f32 %r4, %r3, 0f40400000", lambda x: x / 3),
        ("sqrt.approx.ftz.f32 %r4, %r3", lambda x: flushed(x).double().sqrt().float()),
        ("rsqrt.approx.ftz.f32 %r4, %r3", lambda x: flushed(x).double().rsqrt().float()),
        ("cvt.rni.f32.f32 %r4, %r3", torch.round),
        ("{ .reg .b32 half; cvt.rn.bf16x2.f32 half, %r3, 0f3F800000; mov.b32 %r4, half; }",
         lambda x: x.bfloat16().view(torch.int16).to(torch.int32).bitwise_left_shift(16)
         .bitwise_or(0x3F80).view(torch.float32)),
        ("setp.gtu.f32 %p1, %r3, 0f00000000; selp.f32 %r4, 0f3F800000, 0f00000000, %p1",
         lambda x: (~(x <= 0)).float()),
        ("shfl.sync.bfly.b32 %r4, %r3, 3, 31, -1", lambda x: x[torch.arange(32) ^ 3]),
        ("shfl.sync.idx.b32 %r4, %r3, 7, 31, -1", lambda x: x[torch.full((32,), 7)]),
    ],
)  # fmt: skip
def test_instructions_on_floats(instruction, expected):
    x = floats()
    torch.testing.assert_close(
        elementwise(instruction, x), expected(x), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.s32 %r4, %r3, 2147483647", lambda x: x + 2**31 - 1),
        ("add.s16x2 %r4, %r3, %r3",
         lambda x: (2 * (x >> 16) % 2**16 << 16) + 2 * (x % 2**16) % 2**16),
        ("mul.lo.s32 %r4, %r3, 12345", lambda x: x * 12345),
        ("div.s32 %r4, %r3, 7", lambda x: np.trunc(x / 7).astype(np.int64)),  # C's, not Python's
        ("rem.s32 %r4, %r3, 7", np.vectorize(lambda x: int(np.fmod(x, 7)))),
        ("div.u32 %r4, %r3, 7", lambda x: (x % 2**32) // 7),
        ("shr.s32 %r4, %r3, 5", lambda x: x >> 5),
        ("shr.u32 %r4, %r3, 5", lambda x: (x % 2**32) >> 5),
        ("shl.b32 %r4, %r3, 40", lambda x: x * 0),
        ("bfe.u32 %r4, %r3, 4, 9", lambda x: (x >> 4) & 511),
        ("bfe.s32 %r4, %r3, 4, 1", lambda x: -((x >> 4) & 1)),
        ("popc.b32 %r4, %r3", lambda x: np.bitwise_count(x.astype(np.uint32))),
        ("min.u32 %r4, %r3, 9", lambda x: np.minimum(x % 2**32, 9)),
        ("prmt.b32 %r4, %r3, %r3, 0x0123U", lambda x: x.astype(np.uint32).byteswap()),
        ("setp.lt.s32 %p1, %r3, 0; @%p1 mov.b32 %r4, 1; @!%p1 mov.b32 %r4, 2",
         lambda x: np.where(x < 0, 1, 2)),
        ("mul.wide.s32 %rd9, %r3, 3; shr.s64 %rd9, %rd9, 1; cvt.u32.u64 %r4, %rd9",
         lambda x: x * 3 >> 1),
        ("redux.sync.max.s32 %r4, %r3, -1", lambda x: np.full(32, x.max())),
    ],
)  # fmt: skip
def test_instructions_on_integers(instruction, expected):
    x = integers()
    want = np.asarray(expected(x.numpy().astype(np.int64))).astype(np.int64) % 2**32
    got = elementwise(instruction, x).numpy().astype(np.int64) % 2**32
    np.testing.assert_array_equal(got, want)


def test_parameters_are_the_bits_that_a_kernel_reads():
    x = torch.zeros(2)
    signature = {"x": "*fp32", "eps": "fp32", "wide": "fp64", "N": "i32", "BLOCK": "constexpr"}
    values = {"x": x, "eps": 1e-5, "wide": 1e-5, "N": 3, "BLOCK": 4}
    eps, wide = np.float32(1e-5).view(np.uint32), np.float64(1e-5).view(np.uint64)
    assert parameters_of(signature, values) == [x.data_ptr(), eps, wide, 3, 0, 0]


def test_a_grid_of_several_axes():
    """Each program has its place in it, the first axis running fastest."""
    x, y = torch.zeros(32), torch.zeros(2 * 3 * 5, dtype=torch.int32)
    body = """
        mov.u32 %r3, %ctaid.x; mov.u32 %r4, %ctaid.y; mov.u32 %r5, %ctaid.z;
        mad.lo.s32 %r6, %r5, 3, %r4; mad.lo.s32 %r6, %r6, 2, %r3;    // its number
        mad.lo.s32 %r7, %r5, 100, %r3; mad.lo.s32 %r7, %r4, 10, %r7; // its place
        mul.wide.s32 %rd9, %r6, 4; add.s64 %rd9, %rd2, %rd9; st.global.b32 [%rd9 + 0], {%r7};
    """
    run(HEAD + body + "\nret;\n}\n", (2, 3, 5), 1, [x.data_ptr(), y.data_ptr()], [x, y])
    assert y.tolist() == [
        100 * c + 10 * b + a for c in range(5) for b in range(3) for a in range(2)
    ]


def test_doubles_are_fused_exactly():
    """x² − round(x²) is what rounding has lost, and not 0."""
    x = (1 + torch.arange(32, dtype=torch.float64) / 2**40).view(torch.int32).clone()
    body = """
        add.s64 %rd6, %rd4, %rd3; ld.global.b64 {%rd7}, [%rd6 + 0];
        mul.rn.f64 %rd8, %rd7, %rd7; neg.f64 %rd8, %rd8; fma.rn.f64 %rd9, %rd7, %rd7, %rd8;
        cvt.rn.f32.f64 %r4, %rd9; st.global.b32 [%rd5 + 0], {%r4};
    """
    exact = [float(i) ** 2 * 2.0**-80 for i in range(32)]
    torch.testing.assert_close(ran(body, x).view(torch.float32), torch.tensor(exact))


def test_threads_meet_again_after_rare_blocks_at_the_end():
    """Half of the lanes jump behind the program's end and back before they exchange."""
    body = """
        ld.global.b32 {%r3}, [%rd4 + 0];
        setp.lt.s32 %p1, %r3, 0; @%p1 bra $rare;
        add.s32 %r4, %r3, 1;
    $join:
        shfl.sync.bfly.b32 %r4, %r4, 1, 31, -1;
        st.global.b32 [%rd5 + 0], {%r4}; ret;
    $rare:
        add.s32 %r4, %r3, 2; bra.uni $join;
    """
    x = integers()
    want = torch.where(x < 0, x + 2, x + 1)[torch.arange(32) ^ 1]
    torch.testing.assert_close(ran(body, x), want)


def test_loops_of_different_length_meet_behind_the_loop():
    body = """
        ld.global.b32 {%r3}, [%rd4 + 0]; mov.b32 %r4, 0;
    $again:
        add.s32 %r4, %r4, 2; add.s32 %r3, %r3, -1;
        setp.gt.s32 %p1, %r3, 0; @%p1 bra $again;
        shfl.sync.bfly.b32 %r4, %r4, 1, 31, -1; st.global.b32 [%rd5 + 0], {%r4};
    """
    x = torch.arange(1, 33, dtype=torch.int32)
    torch.testing.assert_close(ran(body, x), 2 * x[torch.arange(32) ^ 1])


THROUGH_SHARED = """
    ld.global.b32 {{%r3}}, [%rd4 + 0]; st.shared.b32 [%r2 + 0], %r3;
    {barrier}
    xor.b32 %r5, %r2, {distance}; ld.shared.b32 %r4, [%r5 + 0];
    {after}
    st.global.b32 [%rd5 + 0], {{%r4}};
"""


def through_shared(barrier: str = "bar.sync 0;", distance: int = 128, after: str = ""):
    body = THROUGH_SHARED.format(barrier=barrier, distance=distance, after=after)
    return ran(body, torch.arange(64, dtype=torch.int32), threads=64, shared=256)


def test_words_of_shared_memory_pass_a_barrier():
    torch.testing.assert_close(through_shared(), torch.arange(64).roll(32).to(torch.int32))


def test_what_another_warp_writes_is_not_read_before_a_barrier():
    with pytest.raises(AccessError, match="another warp writes what is read"):
        through_shared(barrier="")


def test_a_warp_alone_needs_no_barrier():
    want = torch.arange(64).reshape(32, 2).flip(1).reshape(64).to(torch.int32)
    torch.testing.assert_close(through_shared(barrier="", distance=4), want)


def test_what_another_warp_reads_is_not_overwritten_before_a_barrier():
    with pytest.raises(AccessError, match="another warp reads what is written"):
        through_shared(after="st.shared.b32 [%r2 + 0], %r1;")


def test_warps_do_not_write_different_numbers_to_a_word():
    body = "mov.b32 %r5, 0; {} st.shared.b32 [%r5 + 0], %r6;"
    x = torch.zeros(64, dtype=torch.int32)
    ran(body.format("mov.b32 %r6, 7;"), x, threads=64, shared=16)  # nor do they here
    with pytest.raises(AccessError, match="two warps write different numbers"):
        ran(body.format("shr.u32 %r6, %r1, 5;"), x, threads=64, shared=16)


def test_a_barrier_is_for_all_threads():
    with pytest.raises(AccessError, match="not all threads"):
        ran("setp.lt.s32 %p1, %r1, 40; @%p1 bra $out; bar.sync 0;\n$out:",
            torch.zeros(64, dtype=torch.int32), threads=64)  # fmt: skip


def test_an_exchange_is_for_all_lanes():
    with pytest.raises(AccessError, match="not all lanes"):
        ran("setp.lt.s32 %p1, %r1, 9; @%p1 bra $out; shfl.sync.idx.b32 %r4, %r1, 0, 31, -1;\n$out:",
            torch.zeros(32, dtype=torch.int32))  # fmt: skip


@pytest.mark.parametrize(
    ("access", "why"),
    [
        ("ld.global.b32 {%r3}, [%rd4 + 4];", "no tensor's"),
        ("st.global.b32 [%rd4 + -4], {%r1};", "no tensor's"),
        ("ld.global.v2.b32 {%r3, %r4}, [%rd4 + 0];", "misaligned"),
        ("ld.shared.b32 %r3, [%r2 + 128];", "beyond shared memory"),
        ("ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r2 + 0];", "misaligned"),
    ],
)
def test_accesses_are_within_bounds_and_aligned(access, why):
    with pytest.raises(AccessError, match=why):
        ran(access, torch.zeros(32, dtype=torch.int32), shared=128)


COPY = """
    cp.async.ca.shared.global [%r2 + 0], [%rd4 + 0], 0x4; cp.async.commit_group;
    {}
    ld.shared.b32 %r4, [%r2 + 0]; st.global.b32 [%rd5 + 0], {{%r4}};
"""


def test_a_copy_is_there_when_it_has_been_waited_for():
    x = floats()
    y = ran(COPY.format("cp.async.wait_group 0;"), x, shared=128)
    torch.testing.assert_close(y, x, equal_nan=True)
    assert ran(COPY.format("cp.async.wait_group 1;"), x, shared=128).isnan().all()


def test_what_is_copied_may_not_change_under_way():
    with pytest.raises(AccessError, match="changes under way"):
        ran(COPY.format("st.global.b32 [%rd4 + 0], {%r1}; cp.async.wait_group 0;"),
            floats(), shared=128)  # fmt: skip


def test_approximations_err_as_far_as_allowed_and_always_alike():
    x = floats().abs().nan_to_num(1, 1) + 0.1
    exact, *wrong = (
        elementwise("div.full.f32 %r4, %r3, 0f40400000", x, seed=seed) for seed in (None, 0, 1, 1)
    )
    for y in wrong:
        ulps = (y - exact).abs() / (torch.nextafter(exact, exact * 2) - exact)
        assert 0 < ulps.max() <= 2
    assert torch.equal(wrong[1], wrong[2])
    assert not torch.equal(wrong[0], wrong[1])
    powers = torch.arange(32.0)
    torch.testing.assert_close(
        elementwise("ex2.approx.ftz.f32 %r4, %r3", powers, seed=0), powers.exp2(), rtol=0, atol=0
    )


def test_a_product_and_a_sum_may_be_contracted():
    """x · x − x² is 0 where the product is rounded, and what that has lost where it is not."""
    x = 1 + torch.arange(32) / 4096
    body = "mul{0}.f32 %r5, %r3, %r3; mul.rn.f32 %r6, %r3, %r3; sub{0}.f32 %r4, %r5, %r6"
    lost = (x.double() ** 2 - (x * x).double()).float()
    assert lost.any()
    torch.testing.assert_close(elementwise(body.format(""), x, seed=0), lost)
    assert not elementwise(body.format(".rn"), x, seed=0).any()
    assert not elementwise(body.format(""), x, seed=None).any()


MATRIX = """
    ld.global.b32 {%r3}, [%rd4 + 0]; st.shared.b32 [%r2 + 0], %r3; bar.warp.sync -1;
    and.b32 %r5, %r1, 7; shl.b32 %r5, %r5, 4;
    ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r6}, [%r5];
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r5], {%r6};
    bar.warp.sync -1; ld.shared.b32 %r4, [%r2 + 0]; st.global.b32 [%rd5 + 0], {%r4};
"""


def test_matrices_of_shared_memory_are_transposed():
    x = torch.arange(64, dtype=torch.int16)
    y = ran(MATRIX, x.view(torch.int32), shared=128)
    assert torch.equal(y.view(torch.int16).reshape(8, 8), x.reshape(8, 8).T)


def product_of_a_warp(a, b, c):
    """A · B + C by mma.sync; a lane's registers as the manual has them."""
    g, t = torch.arange(32) // 4, torch.arange(32) % 4
    pair = torch.stack([2 * t, 2 * t + 1], 1)
    rows = [g, g + 8, g, g + 8]
    columns = [pair, pair, pair + 8, pair + 8]
    of_a = [a[r[:, None], k] for r, k in zip(rows, columns, strict=True)]
    of_b = [b[k, g[:, None]] for k in (pair, pair + 8)]
    of_c = [c[r, pair[:, i]] for r in (g, g + 8) for i in (0, 1)]
    words = [t.contiguous().view(torch.int32).reshape(32) for t in (*of_a, *of_b)]
    words += [t.contiguous().view(torch.int32) for t in of_c]
    loads = "".join(f"ld.global.b32 {{%r{10 + i}}}, [%rd4 + {128 * i}];" for i in range(10))
    body = (
        loads
        + """
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r30, %r31, %r32, %r33},
            {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%r16, %r17, %r18, %r19};
        mov.b32 %r4, %r3X; st.global.b32 [%rd5 + 0], {%r4};
    """.replace("\n            ", " ")
    )
    found = torch.empty(16, 8)
    for i, r in enumerate((g, g, g + 8, g + 8)):
        y = ran(body.replace("%r3X", f"%r{30 + i}"), torch.cat(words))
        found[r, pair[:, i % 2]] = y.view(torch.float32)
    return found


def test_products_of_warps():
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randint(-8, 8, size, generator=generator).float()
               for size in ((16, 16), (16, 8), (16, 8)))  # fmt: skip
    got = product_of_a_warp(a.bfloat16(), b.bfloat16(), c)
    torch.testing.assert_close(got, a @ b + c, rtol=0, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_layouts_of_descriptors_have_each_number_once(mode, transposed):
    """And in whole vectors of 16 bytes."""
    width = (16, 128, 64, 32)[mode]
    leading, stride = (128, 256) if mode == 0 else (1024, 8 * width)
    descriptor = mode << 62 | (stride >> 4) << 32 | (leading >> 4) << 16 | 4096 >> 4
    at = addresses(descriptor, width // 2 if transposed else 16, transposed)
    assert len(np.unique(at)) == at.size
    runs = at.T if transposed else at
    vectors = runs.reshape(*runs.shape[:-1], -1, 8)
    assert (np.diff(vectors, axis=-1) == 2).all()
    assert (vectors[..., 0] % 16 == 0).all()


EQUAL_ROWS = """
import torch, fastnorm.functional as FF
from emulate import emulating
with emulating(seed=1):
    for n in (3, 37, 100, 222, 1000, 20000):
        y = FF.layer_norm(torch.full((2, n), 0.1), (n,), eps=1e-30)
        print(y.abs().max().item())
"""


def test_rows_of_equal_elements_are_zero_however_a_device_divides():
    """A sum over its count is the element again, though a division is right to two ulps alone."""
    assert python("-c", EQUAL_ROWS).split() == ["0.0"] * 6


EQUAL_COLUMNS = """
import torch, fastnorm.functional as FF
from emulate import emulating
x, w = torch.zeros(7, 5).half(), torch.ones(3, 5).half()
bias = torch.tensor([0.64453125, -1.6416015625, 0.301513671875]).half()
for seed in range(8):
    with emulating("sm_80", seed=seed):
        y = FF.linear_batch_norm(x, w, bias, training=True, algorithm="epilogue")
        print(y.isfinite().all().item())
"""


def test_no_part_is_larger_than_the_whole_however_a_device_divides():
    """A count over itself above 1 made a variance negative, and its root NaN."""
    assert python("-c", EQUAL_COLUMNS).split() == ["True"] * 8


def test_products_of_tf32():
    """Their operands have 10 bits behind the point."""
    found = json.loads(python("-c", TF32))
    assert set(found) == {"sm_90", "sm_80"}
    assert all(2.0**-16 < error < 2.0**-9 for error in found.values()), found


TF32 = """
import json, torch, fastnorm.functional as FF
from emulate import emulating
torch.set_float32_matmul_precision("high")
x, w = torch.randn(200, 72), torch.randn(150, 72)
errors = {}
for target in ("sm_90", "sm_80"):
    with emulating(target):
        y = FF.linear_batch_norm(x, w, training=True, activation="identity", algorithm="epilogue")
    z = x.double() @ w.double().T
    want = (z - z.mean(0)) / z.var(0, unbiased=False).add(1e-5).sqrt()
    errors[target] = ((y - want).abs().max() / want.abs().max()).item()
print(json.dumps(errors))
"""


def verified(*options: object) -> dict:
    found = json.loads(python("-m", "emulate", "--json", *options))
    assert found["cases"]
    return found


def test_compiled_kernels_keep_the_contract():
    """A few cases of each operation, in a process whose Triton compiles."""
    assert not verified("--first", 11, "--every", 61)["broken"]


LIGER = """
import torch, fastnorm.functional as FF
from emulate import emulating, liger
from fastnorm.verify.cases import cases
from fastnorm.verify.run import examined
torch.use_deterministic_algorithms(True)
taken = [case for case in cases(quick=True) if liger.takes(case) and case.values == "normal"]
taken = list({(case.operation, case.dtype): case for case in reversed(taken)}.values())
ours = FF.layer_norm
with emulating(), liger.in_our_place():
    assert FF.layer_norm is liger.layer_norm
    found = list(examined(taken, torch.device("cpu"), backend="triton"))
assert FF.layer_norm is ours
assert sum(len(one.findings) for one in found) > 2 * len(found) > 10
print(*(f"{one.case}: {finding}" for one in found for finding in one.wrong), sep="\\n")
"""


def test_another_librarys_kernels_are_judged_likewise():
    """Of usual inputs those are right, too."""
    pytest.importorskip("liger_kernel")
    assert python("-c", LIGER).strip() == ""


@pytest.mark.slow
@pytest.mark.parametrize("share", range(2))
def test_every_compiled_kernel_keeps_the_contract(share):
    assert not verified("--first", share, "--every", 2)["broken"]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "seed"), [("sm_90", -1), ("sm_80", 1)])
def test_another_target_and_other_roundings_keep_it(target, seed):
    """-1: every instruction exact, nothing contracted."""
    assert not verified("--every", 7, "--target", target, "--seed", seed)["broken"]
