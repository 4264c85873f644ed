"""Which implementation serves a tensor: the environment, the context manager, threads, backward."""

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

import fastnorm
import fastnorm.functional as FF
from fastnorm import backend_for, cli, use_backend

ROOT = Path(__file__).parents[1]
HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def release(package: str) -> tuple[int, ...]:
    return tuple(map(int, version(package).split(".")[:2]))


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """A fresh interpreter without the variables that this one was started with."""
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("FASTNORM_BACKEND", "TRITON_INTERPRET")
    }
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=inherited | environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def output(device: torch.device = DEVICE) -> Tensor:
    return FF.batch_norm(X.clone().to(device).requires_grad_(), None, None, training=True)


# ---- the environment variable --------------------------------------------------------------------
SHOW = """
    import torch, fastnorm
    x = torch.ones(2, 3)
    try:
        print(fastnorm.backend_for(x), fastnorm.BatchNorm1d(3)(x).shape)
    except RuntimeError as error:
        print("RuntimeError:", error)
    with fastnorm.use_backend("eager"):
        print(fastnorm.backend_for(x))
    print(fastnorm.backend_for(x[:0]), fastnorm.backend_for(x.long()))
"""


@pytest.mark.parametrize("value", [None, "auto", "eager"])
def test_environment_chooses_eager_on_a_cpu(value):
    done = run(SHOW, **({} if value is None else {"FASTNORM_BACKEND": value}))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["eager torch.Size([2, 3])", "eager", "eager eager"]


@pytest.mark.skipif(
    release("triton") < (3, 7) and release("numpy") >= (2, 5),
    reason="Triton 3.6's own interpreter asks an array for an index: NumPy 2.5 has none",
)
def test_environment_chooses_triton():
    done = run(SHOW, FASTNORM_BACKEND="triton", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["triton torch.Size([2, 3])", "eager", "eager eager"]


def test_triton_on_a_cpu_needs_its_interpreter():
    """Without TRITON_INTERPRET the call raises, and says what is missing."""
    done = run(SHOW, FASTNORM_BACKEND="triton")
    assert done.returncode == 0, done.stderr
    message, *rest = done.stdout.splitlines()
    assert message.startswith("RuntimeError:")
    for part in ("triton", "cpu", "TRITON_INTERPRET=1"):
        assert part in message
    assert rest == ["eager", "eager eager"]


def test_the_interpreter_must_be_asked_for_before_triton_is_imported():
    """What counts is how triton was imported, not what the environment says later."""
    done = run(
        """
        import os, torch, triton, fastnorm
        os.environ["TRITON_INTERPRET"] = "1"
        norm = fastnorm.BatchNorm1d(3)
        with fastnorm.use_backend("triton"):
            try:
                norm(torch.ones(2, 3))
            except RuntimeError as error:
                print(error)
        print(norm.num_batches_tracked.item(), norm.running_mean.tolist())
        """
    )
    assert done.returncode == 0, done.stderr
    message, buffers = done.stdout.splitlines()
    assert "before triton is imported" in message
    assert buffers == "0 [0.0, 0.0, 0.0]"


@pytest.mark.parametrize("value", ["Triton", ""])
def test_environment_nonsense(value):
    """A misspelt variable is an error at once, not a silent default."""
    done = run("import fastnorm", FASTNORM_BACKEND=value)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: FASTNORM_BACKEND")
    assert repr(value) in last
    for known in ("auto", "triton", "eager"):
        assert known in last


ONE_LINE = (
    "fastnorm {}: variable FASTNORM_BACKEND: invalid value 'nonsense' "
    "(allowed: auto, triton, eager)\n"
)


@pytest.mark.parametrize("way", ["module", "script"])
def test_environment_nonsense_ends_the_command_with_one_line(way, tmp_path):
    script = tmp_path / "fastnorm"  # what an installation puts on the path
    script.write_text("import sys\nfrom fastnorm.cli import main\nsys.exit(main())\n")
    start = {"module": ["-m", "fastnorm"], "script": [str(script)]}[way]
    environment = {"FASTNORM_BACKEND": "nonsense", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *start, "doctor"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ONE_LINE.format("doctor")


def test_environment_nonsense_in_a_package_that_is_run(tmp_path):
    """Whose name Python has not set either while the package imports us."""
    (tmp_path / "training").mkdir()
    for name in ("__init__", "__main__"):
        (tmp_path / "training" / f"{name}.py").write_text("import fastnorm\n")
    environment = {"FASTNORM_BACKEND": "nonsense", "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "training"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ValueError: FASTNORM_BACKEND" in done.stderr


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_environment_nonsense_ends_every_command(command, monkeypatch, capsys):
    monkeypatch.setattr(cli, "DEFAULT", "nonsense")
    assert cli.main([command]) == 2
    assert tuple(capsys.readouterr()) == ("", ONE_LINE.format(command))


# ---- the context manager -------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["nonsense", "EAGER", "", None, 1])
def test_unknown_backend(name):
    with pytest.raises(ValueError, match="auto, triton, eager") as caught:
        use_backend(name)
    assert repr(name) in str(caught.value)


def test_auto_is_eager_on_a_cpu():
    assert backend_for(X) == "eager"
    with use_backend("triton"), use_backend("auto"):
        assert backend_for(X) == "eager"


@pytest.mark.skipif(HAS_GPU, reason="the interpreter stands in for a GPU")
def test_blocks_nest():
    assert backend_for(X) == "eager"
    with use_backend("triton"):
        assert backend_for(X) == "triton"
        with use_backend("eager"):
            assert backend_for(X) == "eager"
            with use_backend("auto"):
                assert backend_for(X) == "eager"
            with use_backend("triton"):
                assert backend_for(X) == "triton"
            assert backend_for(X) == "eager"
        assert backend_for(X) == "triton"
    assert backend_for(X) == "eager"


@pytest.mark.gpu
def test_on_a_gpu():
    x = X.cuda()
    assert backend_for(x) == "triton"
    assert backend_for(X) == "eager"
    with use_backend("eager"):
        assert backend_for(x) == "eager"
        with use_backend("auto"):
            assert backend_for(x) == "triton"
    with use_backend("triton"):
        assert backend_for(x) == "triton"
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
            backend_for(X)


def test_an_exception_leaves_the_block():
    x = X.to(DEVICE)
    before = backend_for(x)
    with pytest.raises(KeyError), use_backend("triton"), use_backend("eager"):
        raise KeyError
    assert backend_for(x) == before
    with use_backend("eager"):
        with pytest.raises(ValueError, match="more than 1 value"), use_backend("triton"):
            FF.batch_norm(x[:1], None, None, training=True)
        assert backend_for(x) == "eager"
        with pytest.raises(ValueError, match="nonsense"), use_backend("nonsense"):
            pass
        assert backend_for(x) == "eager"


def test_the_block_does_not_swallow_or_return():
    with use_backend("eager") as value:
        assert value is None
    with pytest.raises(ZeroDivisionError), use_backend("eager"):
        _ = 1 / 0


def test_one_object_is_entered_again():
    """In turn and within itself, as torch.no_grad can be."""
    x, triton = X.to(DEVICE), use_backend("triton")
    default = backend_for(x)
    for _ in range(2):
        with triton:
            assert backend_for(x) == "triton"
        assert backend_for(x) == default
    with use_backend("eager"), triton:
        with use_backend("eager"), triton:
            with triton:
                assert backend_for(x) == "triton"
            assert backend_for(x) == "triton"
        assert backend_for(x) == "triton"
    assert backend_for(x) == default


def test_threads_start_with_the_default():
    x = X.to(DEVICE)
    default = backend_for(x)
    other = "eager" if default == "triton" else "triton"
    with use_backend(other), ThreadPoolExecutor(1) as pool:
        assert pool.submit(backend_for, x).result() == default
        assert backend_for(x) == other


def test_threads_do_not_see_one_another():
    x, barrier = X.to(DEVICE), threading.Barrier(2, timeout=30)

    def work(names: list[str]) -> list[str]:
        seen = []
        for name in names:
            with use_backend(name):
                barrier.wait()
                seen.append(backend_for(x))
                barrier.wait()
        return seen

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(work, ["triton", "eager", "triton"])
        second = pool.submit(work, ["eager", "triton", "eager"])
        assert first.result() == ["triton", "eager", "triton"]
        assert second.result() == ["eager", "triton", "eager"]


def test_one_object_shared_by_threads():
    """Each thread finds again what it had, in whatever order they leave."""
    x, shared, entered, left = (
        X.to(DEVICE),
        use_backend("triton"),
        threading.Event(),
        threading.Event(),
    )

    def work() -> str:
        with use_backend("eager"):
            with shared:
                entered.set()
                left.wait(30)
            return backend_for(x)

    with ThreadPoolExecutor(1) as pool, use_backend("triton"):
        with shared:
            future = pool.submit(work)
            entered.wait(30)
        mine = backend_for(x)
        left.set()
        assert (mine, future.result()) == ("triton", "eager")


# ---- which tensors -------------------------------------------------------------------------------
@pytest.mark.skipif(HAS_GPU, reason="the interpreter stands in for a GPU")
@pytest.mark.parametrize("name", ["auto", "triton", "eager"])
def test_backend_for_each_kind_of_tensor(name):
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    others = (torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e5m2)
    with use_backend(name):
        for dtype in floats:
            assert backend_for(torch.ones(2, 3).to(dtype)) == (
                "triton" if name == "triton" else "eager"
            )
            assert backend_for(torch.ones(0, 3).to(dtype)) == "eager"
        for dtype in others:
            assert backend_for(torch.ones(2, 3).to(dtype)) == "eager"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_what_is_not_strided_is_served_by_eager():
    rows = [torch.randn(3, 4), torch.randn(2, 4)]
    nested = torch.nested.nested_tensor(rows, device=DEVICE)
    dense = torch.randn(3, 4, device=DEVICE)
    norm = fastnorm.LayerNorm(4).to(DEVICE)
    with use_backend("triton"):
        for tensor in (nested, dense.to_sparse(), dense.to_sparse_csr()):
            assert backend_for(tensor) == "eager"
        for got, want in zip(norm(nested).unbind(), map(norm, nested.unbind()), strict=True):
            torch.testing.assert_close(got, want)


def test_triton_by_name_where_no_kernel_runs():
    with use_backend("triton"):
        assert backend_for(torch.ones(0, 3, device="meta")) == "eager"
        with pytest.raises(RuntimeError, match="meta"):
            backend_for(torch.ones(2, 3, device="meta"))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use of it
def test_transforms_are_served_by_eager():
    """vmap, grad, jvp and dual numbers do not hold the caller's memory."""
    x, seen = X.to(DEVICE), []

    def look(t: Tensor) -> Tensor:
        seen.append(backend_for(t))
        return (t**2).sum()

    with use_backend("triton"):
        torch.func.vmap(look)(x)
        torch.func.grad(look)(x)
        torch.func.jvp(look, (x,), (x,))
        with torch.autograd.forward_ad.dual_level():
            look(x)
            look(torch.autograd.forward_ad.make_dual(x, x))
        assert seen == ["eager"] * 5
        assert backend_for(x) == "triton"


@pytest.mark.filterwarnings("ignore:`torch.jit.trace(_method)?` is deprecated")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of sizes that are checked
@pytest.mark.parametrize("kind", ["BatchNorm1d", "GroupNorm", "LayerNorm", "LinearBatchNorm"])
def test_traces_of_torchscript_are_served_by_eager(kind):
    """A trace knows torch's operators only, and outlives the choice."""
    arguments = {"GroupNorm": (2, 4), "LinearBatchNorm": (4, 3)}.get(kind, (4,))
    module = getattr(fastnorm, kind)(*arguments).to(DEVICE).eval()
    x = torch.randn(5, 4, device=DEVICE)
    with use_backend("triton"):
        traced = torch.jit.trace(module, x)
        for again in (2 * x, x[:3]):
            torch.testing.assert_close(traced(again), module(again))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace(_method)?` is deprecated")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "module",
    [
        fastnorm.GroupNorm(2, 4),
        fastnorm.InstanceNorm2d(4),
        fastnorm.InstanceNorm2d(4, track_running_stats=True),
    ],
    ids=str,
)
def test_traces_of_images(module, last):
    """A trace, which records sizes, does not tell them, but has the layout of its example."""
    module = module.to(DEVICE)
    x = torch.randn(2, 4, 3, 3, device=DEVICE)
    x = x.to(memory_format=torch.channels_last) if last else x
    traced = torch.jit.trace(module, x, check_trace=False)
    for again in (2 * x, x[:1]):
        y = traced(again)
        torch.testing.assert_close(y, module(again))
        assert y.stride() == x.stride()


@pytest.mark.filterwarnings("ignore:`torch.jit.trace(_method)?` is deprecated")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_holds_what_onnx_knows():
    """An InstanceNorm, and no group norm of a number of groups that was recorded; no RMS norm."""
    traced = torch.jit.trace(fastnorm.InstanceNorm2d(4), torch.randn(2, 4, 3, 3))
    assert "aten::instance_norm" in str(traced.inlined_graph)
    traced = torch.jit.trace(fastnorm.RMSNorm(4), torch.randn(2, 4))
    assert "aten::rms_norm" not in str(traced.inlined_graph)


# ---- the backward follows the forward ------------------------------------------------------------
def launches_of(call: Callable[[], Any]) -> list[str]:
    """The kernels that a call launches in the interpreter."""
    from interpreter import trace

    with trace() as launches:
        call()
    return [launch.kernel for launch in launches]


interpreted = pytest.mark.skipif(HAS_GPU, reason="launches are counted in the interpreter")


def backward(y: Tensor) -> None:
    y.backward(torch.ones_like(y))


@interpreted
def test_forward_runs_where_it_was_asked_to():
    with use_backend("triton"):
        assert launches_of(output)
    with use_backend("eager"):
        assert not launches_of(output)


@interpreted
@pytest.mark.parametrize("chosen", ["triton", "eager"])
@pytest.mark.parametrize("later", ["triton", "eager", "auto", None])
def test_backward_follows_the_forward(chosen, later):
    with use_backend(chosen):
        y = output()
    if later is None:
        launches = launches_of(lambda: backward(y))
    else:
        with use_backend(later):
            launches = launches_of(lambda: backward(y))
    assert bool(launches) == (chosen == "triton")


@interpreted
@pytest.mark.parametrize("chosen", ["triton", "eager"])
def test_backward_in_another_thread(chosen):
    with use_backend(chosen):
        y = output()

    def elsewhere() -> None:
        with use_backend("eager" if chosen == "triton" else "triton"):
            backward(y)

    with ThreadPoolExecutor(1) as pool:
        launches = launches_of(lambda: pool.submit(elsewhere).result())
    assert bool(launches) == (chosen == "triton")


@interpreted
@pytest.mark.parametrize("chosen", ["triton", "eager"])
def test_gradients_agree_whoever_runs_the_backward(chosen):
    results = []
    for later in ("triton", "eager"):
        leaf = X.clone().requires_grad_()
        with use_backend(chosen):
            y = FF.batch_norm(leaf, None, None, training=True, activation="silu")
        with use_backend(later):
            results.append(torch.autograd.grad(y, leaf, X)[0])
    assert torch.equal(*results)


@interpreted
def test_two_graphs_of_two_backends_in_one_backward():
    leaf = X.clone().requires_grad_()
    with use_backend("triton"):
        first = FF.batch_norm(leaf, None, None, training=True)
    with use_backend("eager"):
        second = FF.batch_norm(leaf, None, None, training=True)
    launches = launches_of(lambda: backward(first + second))
    assert len(launches) == len({*launches}) == 1
    assert leaf.grad is not None


@interpreted
def test_modules_follow_the_block_too():
    for module, x in (
        (fastnorm.LinearBatchNorm(3, 2), X),
        (fastnorm.Conv1dBatchNorm(3, 2, 1), X[..., None]),
        (fastnorm.BatchNorm1d(3), X),
    ):
        with use_backend("triton"):
            assert launches_of(lambda module=module, x=x: module(x))
        with use_backend("eager"):
            assert not launches_of(lambda module=module, x=x: module(x))


@interpreted
def test_a_checkpointed_block_gives_the_same_gradient():
    """The recomputation inside the backward takes the backend of that moment."""
    norm = fastnorm.BatchNorm1d(3, activation="relu")
    gradients = []
    for checkpointed in (False, True):
        leaf = X.clone().requires_grad_()
        with use_backend("triton"):
            if checkpointed:
                y = torch.utils.checkpoint.checkpoint(norm, leaf, use_reentrant=False)
            else:
                y = norm(leaf)
            gradients.append(torch.autograd.grad(y, leaf, X)[0])
    assert torch.equal(*gradients)
    assert norm.num_batches_tracked.item() == 3, "as torch's, counted again when recomputed"
