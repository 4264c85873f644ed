"""The cost model of Linear + BatchNorm: what it must say where the answer is known."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fastnorm
import fastnorm.functional as FF
from fastnorm.eager.activations import ACTIVATIONS, OUTPUT_GRADS
from fastnorm.kernels import cost
from fastnorm.kernels.devices import Device, described

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
