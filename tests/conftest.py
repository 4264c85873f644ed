"""Without a GPU every kernel runs in Triton's interpreter, chosen before triton is imported.

There each launch is also judged by the checker (checker.py). With a GPU the same tests run
compiled: they take the `backend` fixture, which says where tensors live. FASTNORM_EMULATE=1 has
them compiled without one, and their machine code emulated (bench/emulate).
"""

import importlib.util
import inspect
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from probes import EMULATED, HAS_GPU, INTERPRETED

import fastnorm


def like_print(*args: object, sep: str = " ", end: str = "\n") -> None:
    """What `print` takes."""


HAS_HYPOTHESIS = importlib.util.find_spec("hypothesis") is not None
collect_ignore = [
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if not HAS_HYPOTHESIS
    and re.search(r"^(import|from) (hypothesis|fuzzing)\b", path.read_text(), re.MULTILINE)
]
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # a worker a core: more threads would wait for each other
if INTERPRETED:
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("triton was imported before the interpreter could be asked for")
    os.environ["TRITON_INTERPRET"] = "1"
    if sys.version_info < (3, 11):  # before, print has no signature, and Triton asks for it
        signature = inspect.signature
        with mock.patch.object(
            inspect, "signature", lambda f, **o: signature(like_print if f is print else f, **o)
        ):
            import triton.experimental.gluon  # noqa: F401
    import interpreter
    import torch._dynamo  # imports triton
    from checker import checked

    interpreter.mend()
    # Dynamo and torch.device list torch's functions at first use; the checker, while on, has some
    # replaced by its own, and the lists would lack the true ones.
    torch._dynamo.trace_rules.get_torch_obj_rule_map()
    torch.utils._device._device_constructors()


def pytest_configure() -> None:
    """A shell's background job ignores Ctrl-C, and so would what the tests start and interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str | None:
    if HAS_HYPOTHESIS:
        return None
    return f"hypothesis is not installed: {', '.join(sorted(collect_ignore))} left out"


def pytest_runtest_setup() -> None:
    """A test may change what plans are made from."""
    launch = sys.modules.get("fastnorm.kernels.launch")
    if launch is not None:
        launch.forget()


@pytest.fixture(autouse=True)
def _judged(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every kernel that a test launches in the interpreter is checked."""
    if not INTERPRETED or request.node.get_closest_marker("unchecked"):
        yield
        return
    with checked():
        yield


@pytest.fixture(
    params=["eager", "interpreted", pytest.param("compiled", marks=pytest.mark.gpu)],
)
def backend(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Run the test on each backend; the value is the device for its tensors."""
    kind = request.param
    if kind == "interpreted" and HAS_GPU:
        pytest.skip("with a GPU the kernels run compiled: see the same test there")
    if EMULATED:
        from emulate import emulating

        with emulating():
            yield torch.device("cpu")
        return
    with fastnorm.use_backend("eager" if kind == "eager" else "triton"):
        yield torch.device("cuda" if kind == "compiled" else "cpu")


@pytest.fixture
def small_tiles(backend: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of 512 bytes, no planes side by side, and a device of two multiprocessors."""
    if fastnorm.backend_for(torch.ones(1, device=backend)) == "eager":
        yield
        return
    from fastnorm.kernels import channel_plans, devices, group_plans, launch

    for plans in (launch, channel_plans, group_plans):
        monkeypatch.setattr(plans, "TILE_BYTES", 512)
    monkeypatch.setattr(channel_plans, "PLANE_COLUMNS", (0, 0))
    with devices.assume(devices.Device(2)):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if EMULATED:
        items[:] = [item for item in items if _backend_of(item) == "compiled"]
    if not INTERPRETED:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def _backend_of(item: pytest.Item) -> object:
    """The parameter of the `backend` fixture that a test runs with, if it has one."""
    return getattr(item, "callspec", None) and item.callspec.params.get("backend")
