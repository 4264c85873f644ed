"""The cost model of Linear + BatchNorm: what it must say where the answer is known."""

import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

import fastnorm
import fastnorm.functional as FF
from fastnorm.eager.activations import ACTIVATIONS, OUTPUT_GRADS
from fastnorm.kernels import cost
from fastnorm.kernels.devices import Device, assume, described

H200 = Device(multiprocessors=132)
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def chosen(M, K, N, dtype=BF16, device=H200, activation="relu", step=True, **options):
    return cost.choose(M, K, N, dtype, activation, device, True, step, **options)


@pytest.mark.parametrize(
    "shape", [(200704, 64, 256), (50176, 256, 1024), (802816, 16, 96), (50176, 64, 384)]
)
def test_expansions_take_gram(shape):
    assert chosen(*shape) == "gram"


@pytest.mark.parametrize(
    "shape", [(65536, 4096, 1024), (8192, 1024, 1024), (256, 64, 256), (2, 1, 1), (64, 512, 512)]
)
def test_wide_and_small_problems_do_not(shape):
    """2 M K² flops more do not pay where K is as wide as N, nor launches where M is small."""
    assert chosen(*shape) != "gram"
    assert chosen(*shape, dtype=F32, device=cost.CPU) == "unfused"


def properties(**changed):
    """What torch says of an H200, or of another GPU."""
    h200 = {
        "multi_processor_count": 132, "major": 9, "minor": 0, "clock_rate": 1_980_000,
        "memory_clock_rate": 3_201_000, "memory_bus_width": 6144,
        "shared_memory_per_block_optin": 227 << 10,
    }  # fmt: skip
    return SimpleNamespace(**(h200 | changed))


A100 = properties(
    multi_processor_count=108, major=8, clock_rate=1_410_000,
    memory_clock_rate=1_593_000, memory_bus_width=5120,
)  # fmt: skip
RTX_5090 = properties(
    multi_processor_count=170, major=12, clock_rate=2_407_000,
    memory_clock_rate=14_001_000, memory_bus_width=512,
)  # fmt: skip
MI300X = properties(
    multi_processor_count=304, clock_rate=2_100_000, gcnArchName="gfx942:sramecc+:xnack-",
)  # fmt: skip


def test_rates_are_the_devices_own():
    """In the proportions of the vendors' peaks; what torch does not say is an H200's."""
    h200 = described(properties(), hip=False)
    assert replace(h200, memory=H200.memory) == H200
    assert h200.memory == pytest.approx(H200.memory, rel=0.01)
    assert described(properties(clock_rate=0, memory_bus_width=0), hip=False) == H200
    assert described(properties(major=99), hip=False) == replace(h200, wgmma=False)
    peaks = {  # TFLOP/s half, single, double; TB/s
        "A100": (described(A100, hip=False), 312, 19.5, 19.5, 2.04),
        "RTX 5090": (described(RTX_5090, hip=False), 209.5, 104.8, 1.64, 1.79),
        "MI300X": (described(MI300X, hip=True), 1307, 163.4, 163.4, 4.9),
    }
    for name, (device, *peak) in peaks.items():
        got = device.half, device.single, device.double, device.memory
        theirs = zip(got, (h200.half, h200.single, h200.double, h200.memory), strict=True)
        found = [a / b * c for (a, b), c in zip(theirs, (1070, 66.9, 66.9, 4.917), strict=True)]
        assert found == pytest.approx(peak, rel=0.02), name
        assert not device.wgmma


def test_float64_is_dear_on_a_consumers_gpu():
    """Where its S would take float64 at a 64th of the speed, float32 leaves gram."""
    shape, consumers = (1_000_000, 32, 64), described(RTX_5090, hip=False)
    assert chosen(*shape, F32) == "gram"
    assert chosen(*shape, F32, replace(consumers, double=consumers.single)) == "gram"
    assert chosen(*shape, F32, consumers) != "gram"
    assert chosen(*shape, BF16, consumers) == "gram"


def test_what_gram_cannot_do():
    assert set(OUTPUT_GRADS) == cost.FROM_OUTPUT
    for activation in ACTIVATIONS:
        algorithm = chosen(200704, 64, 256, activation=activation)
        assert (algorithm == "gram") == (activation in OUTPUT_GRADS)
    assert chosen(200704, 64, 256, dtype=F64) != "gram", "fewer digits than torch's"


def test_who_can_do_epilogue():
    assert chosen(200704, 64, 256, activation="gelu") == "epilogue"
    assert chosen(200704, 64, 256, activation="gelu", columns=False) == "unfused"
    assert chosen(200704, 64, 256, F32, cost.CPU, activation="gelu") == "unfused"


def joined(M, K, N, dtype=BF16, device=H200, training=True, **options):
    return cost.joins(cost.problem(M, K, N, dtype, device, training, True, **options))


def test_wide_k_stores_g_for_a_librarys_product():
    """Each tile of a fused dX loads dY and Y again: with enough of them, storing G costs less."""
    for training in (True, False):
        assert joined(65536, 512, 2048, training=training)
        assert joined(25088, 512, 2048, training=training)
        assert not joined(200704, 64, 256, training=training)
        assert not joined(802816, 16, 96, training=training)
    assert not joined(50176, 256, 1024)
    assert not joined(65536, 512, 2048, device=replace(H200, cache=1e15)), "nothing to save"
    assert joined(50176, 256, 1024, device=replace(H200, cache=H200.cache / 2))
    assert not joined(65536, 512, 2048, device=replace(H200, memory=H200.memory / 4)), "G's bytes"
    assert not joined(64, 512, 512), "launches"


@pytest.mark.parametrize(
    "shape",
    [
        (200704, 64, 256), (50176, 256, 1024), (65536, 512, 2048), (802816, 16, 96),
        (50176, 64, 384), (262144, 64, 128),
    ],
)  # fmt: skip
def test_programs_that_share_rows(shape):
    """One wave; fewer save bytes, and cost the product less than a fifth more by the model."""
    M, K, N = shape
    products = pytest.importorskip("fastnorm.kernels.products")
    blocks = -(-N // 128) * -(-K // 256)
    read = 2 * M * (2 * N + K)
    cached = 2 * M * (2 * N * -(-K // 256) + K * -(-N // 128))
    for narrow in (True, False):
        total = products.Sum(blocks, 4 * N * K, read, narrow)
        most = H200.multiprocessors // blocks

        def seconds(sharers, blocks=blocks):
            flops = 2 * M * N * K / H200.half * H200.multiprocessors / (sharers * blocks)
            partial = sharers * 8 * N * K
            return max(flops, read / H200.memory, cached / H200.cache) + partial / H200.memory

        found = products.sharers(total, 1, H200)
        assert 0.5 * most < found <= most
        assert narrow or found == most
        assert seconds(found) < 1.2 * seconds(most)
        assert products.sharers(total, 2, H200) >= found
    small = products.Sum(1000, 4, 1 << 30, True)
    assert products.sharers(small, 1, H200) == 1, "more tiles than multiprocessors"


def test_where_g_is_never_stored():
    for options in ({"dtype": torch.float16}, {"dtype": F64}, {"columns": False}):
        assert not joined(65536, 512, 2048, **options)
    assert not joined(65536, 512, 2048, F32, cost.CPU)


def test_float32_without_tensor_cores_is_a_librarys():
    """Ours reach half of its rate; with tensor cores both are alike."""
    assert joined(200704, 64, 256, F32)
    assert not joined(200704, 64, 256, F32, precision="tf32")


def test_the_choice_counts_in_the_algorithms_time():
    p = cost.problem(65536, 512, 2048, BF16, H200, True, True)
    assert cost.gated(p, join=True) < cost.gated(p)
    saved = cost.gram(p._replace(joins=False)) - cost.gram(p)
    assert saved == pytest.approx(cost.gated(p) - cost.gated(p, join=True))
    assert chosen(65536, 512, 2048) == "gram"


@pytest.mark.parametrize("sizes", [(0, 4, 3), (5, 0, 3), (5, 4, 0)])
def test_nothing_to_do(sizes):
    assert chosen(*sizes) == "unfused"


def test_cpu_takes_gram_where_k_is_narrow():
    assert chosen(50176, 16, 96, F32, cost.CPU) == "gram"
    assert chosen(50176, 256, 1024, F32, cost.CPU) == "unfused"


def test_rates_decide():
    """More bytes a second make passes cheap; more flops a second make the extra products cheap."""
    shape = (50176, 256, 512)
    assert chosen(*shape, device=replace(H200, memory=1e15, cache=1e15)) != "gram"
    assert chosen(*shape, device=replace(H200, half=1e18, double=1e18, cache=1e15)) == "gram"
    assert chosen(200704, 64, 256, device=replace(H200, launch=1e-3)) != "gram"


def test_model_grows_with_the_problem():
    for algorithm in (cost.unfused, cost.epilogue, cost.gram):
        for larger in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
            M, K, N = (s * f for s, f in zip((50176, 256, 1024), larger, strict=True))
            small = cost.problem(50176, 256, 1024, BF16, H200, True, True)
            large = cost.problem(M, K, N, BF16, H200, True, True)
            assert algorithm(large) > algorithm(small)
        with_backward = cost.problem(50176, 256, 1024, BF16, H200, True, True)
        alone = cost.problem(50176, 256, 1024, BF16, H200, True, False)
        assert algorithm(with_backward) > 2 * algorithm(alone)


def test_auto_does_what_the_model_says(monkeypatch):
    """The eager path asks it with the sizes, dtype and gradients of the call."""
    asked = []

    def choose(*args, **kwargs):
        asked.append(args)
        return "gram"

    monkeypatch.setattr(cost, "choose", choose)
    monkeypatch.setattr(cost, "SMALL", 1 << 18)
    x, w = torch.randn(8192, 16), torch.randn(64, 16, requires_grad=True)
    with fastnorm.use_backend("eager"):
        y = FF.linear_batch_norm(x, w, training=True, activation="tanh")
        assert "GramFunction" in y.grad_fn.name()
        with torch.no_grad():
            FF.linear_batch_norm(x, w, None, torch.zeros(64), torch.ones(64))
        FF.linear_batch_norm(x[:100], w, training=True)
    assert asked == [
        (8192, 16, 64, F32, "tanh", cost.CPU, True, True),
        (8192, 16, 64, F32, "relu", cost.CPU, False, False),
    ], "small problems are not worth a question"


AMPERE = replace(H200, multiprocessors=108, wgmma=False, shared=163 << 10)
CONSUMERS = replace(AMPERE, multiprocessors=170, shared=99 << 10)


@pytest.mark.parametrize("device", [H200, AMPERE, CONSUMERS], ids=["H200", "A100", "RTX"])
@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=str)
def test_tiles_of_products(dtype, device):
    """Tensor cores take them, and shared memory holds what their loops have under way."""
    products = pytest.importorskip("fastnorm.kernels.products")

    x = torch.empty(0, dtype=dtype)
    for C, N, columns, S in product((5, 64, 600), (3, 96, 256), (True, False), (1, 49, 3136)):
        view = products.ChannelView(32, C, S, columns)
        with assume(device):
            forward, out = products.output_tiles(x, view, N, 256)
            backward, into = products.input_tiles(x, view, N)
        for plan, tile in ((forward, out), (backward, into)):
            rows = plan.block_b * plan.block_s
            sizes = (rows, tile["BLOCK_N"], tile["BLOCK_K"])
            assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
            assert plan.block_s < 2 * S, "lanes without a position"
            assert plan.tiles == -(-32 // plan.block_b) * -(-S // plan.block_s)
            # X and W; dY, Y and W
            step = rows * sizes[2] if plan is forward else 2 * rows * sizes[1]
            step = (step + sizes[1] * sizes[2]) * dtype.itemsize
            assert 1 <= plan.num_stages <= max(device.shared // step, 1)
            assert plan.num_stages > 1 or 2 * step > device.shared
        widest = 256 if dtype is BF16 and columns and device.wgmma and N == 256 else 128
        assert out["BLOCK_N"] <= widest
        assert widest == 128 or out["BLOCK_N"] == 256
        if not device.wgmma:  # registers hold 128 × 64 of dX
            assert rows * into["BLOCK_K"] <= 128 * 64


def test_numbers_of_rows_share_compiled_code():
    """Vectors run along channels where those are innermost: how many rows there are is nothing."""
    products = pytest.importorskip("fastnorm.kernels.products")
    views = [products.ChannelView(1, 64, rows, True) for rows in (1, 33, 64, 4096)]
    found = [products.aligns(view, 96, 20) for view in views]
    assert found == [{"ALIGN_N": 8, "ALIGN_K": 4, "ALIGN_S": 1, "COLUMNS": True}] * 4
    planes = (products.ChannelView(2, 64, S, False) for S in (49, 196, 3136))
    assert [products.aligns(view, 96, 20)["ALIGN_S"] for view in planes] == [1, 4, 8]


def test_partial_sums_of_programs_are_few_bytes():
    """Written and read they are a sixteenth of what a narrow product reads, or fewer share it."""
    products = pytest.importorskip("fastnorm.kernels.products")
    read = 1 << 30
    for share, found in ((0.9, 132), (1.1, 79)):
        total = products.Sum(1, round(share * read / 16 / (2 * 132)), read, True)
        assert products.sharers(total, 1, H200) == found
        assert products.sharers(total._replace(narrow=False), 1, H200) == 132


@pytest.mark.parametrize("num_warps", [4, 8])
def test_programs_that_sum_over_rows(num_warps):
    """All run at a time, two of four warps a multiprocessor, and each has as many tiles."""
    products = pytest.importorskip("fastnorm.kernels.products")

    together = 2 if num_warps == 4 else 1
    total = products.Sum(3, 1 << 10, 1 << 30, True)
    for rows in (1, 64, 5000, 1 << 20):
        view = products.ChannelView(1, 64, rows, True)
        plan = products.product_plan(view, 64, 1, H200, total, num_warps=num_warps)
        most = together * H200.multiprocessors // 3
        assert plan.programs <= most
        assert plan.programs * plan.tiles_per_program >= plan.tiles
        assert (plan.programs - 1) * plan.tiles_per_program < plan.tiles
        assert plan.programs > 0.9 * min(most, plan.tiles)


IDEAL = Device(
    multiprocessors=1, half=math.inf, tf32=math.inf, single=math.inf, double=math.inf,
    memory=math.inf, cache=math.inf, launch=0.0,
)  # fmt: skip
M, K, N = 1290, 320, 512
X, W, Y = M * K, N * K, M * N


def counted(dtype=BF16, training=True, step=True, precision="ieee", fused=True, **limited):
    """Seconds of the unfused operators, of epilogue, of gram and of its joined P and dX.

    On a device that does at once whatever is not `limited`: to one flop, byte or launch a second.
    """
    device = replace(IDEAL, fused=fused, **limited)
    p = cost.problem(M, K, N, dtype, device, training, step, precision)._replace(joins=False)
    return cost.unfused(p), cost.epilogue(p), cost.gram(p), cost.gated(p, join=True)


def test_elements_that_each_algorithm_moves():
    """The norm's passes are of Z, which is as large as Y; gram has none, and reads X once more."""
    bf16, f32 = {"memory": 2.0}, {"memory": 4.0, "dtype": F32}
    for options in (bf16, f32):
        assert counted(**options) == (
            3 * X + 3 * W + 11 * Y, 3 * X + 3 * W + 10 * Y, 5 * X + W + 5 * Y,
            5 * X + W + 4 * Y,
        )  # fmt: skip
    assert counted(training=False, **bf16) == (
        3 * X + 3 * W + 8 * Y, 3 * X + 3 * W + 8 * Y, 3 * X + W + 5 * Y, 2 * X + W + 4 * Y,
    )  # fmt: skip
    forward = counted(step=False, **bf16)[:3]
    assert forward == (X + W + 4 * Y, X + W + 3 * Y, 2 * X + W + Y)
    forward = counted(step=False, training=False, **bf16)[:3]
    assert forward == (X + W + 3 * Y, X + W + 3 * Y, X + W + Y)
    unfused, _, gram, _ = counted(fused=False, **f32)
    assert (unfused, gram) == (3 * X + 3 * W + 16 * Y, 6 * X + W + 3 * Y), "the activation's passes"


def test_flops_of_each_algorithm_by_the_rate_they_take():
    """Of gram in training S, of whose tiles half is enough, and X's part of dX are more."""
    product, square = 2 * M * N * K, 2 * M * K * K
    half_of_square = square * (0.5 + 32 / K)
    assert counted(half=1.0)[:3] == pytest.approx(
        (3 * product, 3 * product, 3 * product + square + half_of_square)
    )
    assert counted(half=1.0, training=False)[:3] == (3 * product,) * 3
    fold = 2 * N * K * K  # W S, W S Wᵀ and their like, float64 in every dtype
    assert counted(double=1.0)[:3] == (0, 0, 3 * fold)
    assert counted(double=1.0, training=False)[2] == fold
    # float32: the digits of S and P are float64's; ours reach half of a library's rate elsewhere
    assert counted(F32, double=1.0)[2] == pytest.approx(3 * fold + half_of_square + product)
    assert counted(F32, single=1.0)[:3] == pytest.approx(
        (3 * product, 4 * product, 4 * product + 2 * square)
    )
    # on tensor cores P is as accurate as they are
    tf32 = counted(F32, precision="tf32", tf32=1.0)[:3]
    assert tf32 == pytest.approx((3 * product, 3 * product, 3 * product + square))
    assert counted(F32, precision="tf32", double=1.0)[2] == pytest.approx(3 * fold + half_of_square)
    assert counted(F32, precision="tf32", single=1.0)[:3] == (0, 0, 0)
    # a CPU's S is a library's product in float64, of both halves
    assert counted(fused=False, double=1.0)[2] == 3 * fold + square
    assert counted(F32, fused=False, single=1.0)[2] == 3 * product + square
    assert counted(F64, double=1.0)[0] == 3 * product


def loads(rows, columns, depth, block_rows, block_columns):
    """Elements of both operands that the tiles of a product load, one tile after the other."""
    return sum(
        depth * (min(block_rows, rows - i) + min(block_columns, columns - j))
        for i in range(0, rows, block_rows)
        for j in range(0, columns, block_columns)
    )


def test_elements_that_tiles_load_from_the_cache():
    """Each tile of a product loads its part of both operands, and dY goes with Y to mask it."""
    wide, narrow = loads(M, N, K, 128, 256), loads(M, N, K, 128, 128)
    moments = X * -(-K // 64)
    sums = loads(N, K, M, 128, 256) + Y * -(-K // 256)
    inputs = loads(M, K, N, 128, 128) + Y * -(-K // 128) + X * -(-K // 128)
    assert counted(cache=2.0) == (0, narrow, wide + moments + sums + inputs, sums + Y)
    assert counted(cache=2.0, step=False, wgmma=False)[2] == narrow + moments
    assert counted(F32, cache=4.0, step=False)[2] == narrow + moments
    assert counted(cache=2.0, training=False)[2] == wide + sums + inputs - X * -(-K // 128)


def test_launches_of_each_algorithm():
    assert counted(launch=1.0) == (7, 7, 16, 4)
    assert counted(launch=1.0, training=False) == (5, 5, 9, 2)
    assert counted(launch=1.0, step=False)[:3] == (3, 3, 9)
    blocks = -(-4 * Y // (1 << 20))
    unfused, _, gram, _ = counted(launch=1.0, fused=False)
    assert (unfused, gram) == (9, 91 + 16 * blocks), "a CPU's operators, a block at a time"


@pytest.mark.parametrize(("device", "share"), [(H200, 0.95), (cost.CPU, 0.85)], ids=["GPU", "CPU"])
def test_another_algorithm_has_to_be_clearly_faster(monkeypatch, device, share):
    for factor, name in ((0.99, "gram"), (1.01, "unfused")):
        monkeypatch.setattr(cost, "gram", lambda p, f=factor: f * share * cost.unfused(p))
        asked = replace(device, launch=device.launch * factor)  # of which no answer is remembered
        assert chosen(50176, 64, 256, F32, asked, columns=False) == name
