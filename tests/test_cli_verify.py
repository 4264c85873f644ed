"""`fastnorm verify`: what it covers, what it leaves, and that it can fail."""

import ast
import io
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

import fastnorm
import fastnorm.functional as FF
from fastnorm import environment
from fastnorm.cli import main, verify
from fastnorm.eager.activations import ACTIVATIONS
from fastnorm.verify import cases as listing
from fastnorm.verify import inputs, reference
from fastnorm.verify.case import Stages
from fastnorm.verify.cases import OPERATIONS, cases
from fastnorm.verify.channels import ChannelCase
from fastnorm.verify.judge import Finding, _ambiguous, _judge, examine
from fastnorm.verify.products import ProductCase
from fastnorm.verify.rows import RowCase
from fastnorm.verify.run import examined, interprets, left_out, summaries

CPU = torch.device("cpu")
ONE_OF_EACH = [
    ChannelCase("batch_norm", (6, 6, 7), activation="relu", residual=True),
    ChannelCase("instance_norm", (2, 6, 3, 5), torch.float16, training=False),
    ChannelCase("group_norm", (2, 6, 4, 5), layout="channels_last", num_groups=3),
    RowCase("layer_norm", (5, 33), torch.float64, layout="strided"),
    RowCase("rms_norm", (5, 33), torch.bfloat16, activation="silu"),
    RowCase("add_layer_norm", (5, 33), torch.float16),
    RowCase("add_rms_norm", (5, 33), values="outliers"),
    ProductCase("linear_batch_norm", (40, 9), features=12, algorithm="gram", activation="relu"),
    ProductCase("conv_batch_norm", (3, 5, 6, 6), features=8, kernel=3, training=False),
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The quick list on the eager path: (status, folder, what it printed)."""
    folder = tmp_path_factory.mktemp("verify") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        patch.setattr(sys, "stderr", io.StringIO())
        options = ["--quick", "--device", "cpu", "--backend", "eager", "--out", str(folder)]
        status = main(["verify", *options])
        return status, folder, sys.stdout.getvalue(), sys.stderr.getvalue()


@pytest.fixture
def few(monkeypatch):
    """The list is one case of each operation."""
    monkeypatch.setattr(verify, "cases", lambda quick: ONE_OF_EACH)


def verified(folder, backend="eager"):
    """(status, result.json) of a run."""
    status = main(["verify", "--device", "cpu", "--backend", backend, "--out", str(folder)])
    return status, json.loads((folder / "result.json").read_text())


# What is covered.


@pytest.mark.parametrize("quick", [True, False], ids=["quick", "full"])
def test_everything_is_met(quick):
    listed = cases(quick)
    assert {case.operation for case in listed} == set(OPERATIONS) == set(FF.__all__)
    for operation in OPERATIONS:
        mine = [case for case in listed if case.operation == operation]
        assert {case.activation for case in mine} == set(ACTIVATIONS)
        assert {case.dtype for case in mine} == set(listing.DTYPES)
        assert {case.values for case in mine} == {"normal", *inputs.ADVERSARIAL}
        layouts = {case.layout for case in mine}
        if isinstance(mine[0], ChannelCase):
            assert {case.residual for case in mine} == {True, False}
            assert layouts == {*inputs.FORMATS, "sliced", "strided"}
            modes = {True} if operation == "group_norm" else {True, False}
            assert {case.training for case in mine} == modes
        elif isinstance(mine[0], RowCase):
            assert layouts == {"contiguous", "sliced", "strided"}
        else:
            assert {case.training for case in mine} == {True, False}
    made = [case.algorithm for case in listed if case.operation == "linear_batch_norm"]
    assert set(made) == {"gram", "epilogue", "unfused"}


def test_full_is_crossed():
    listed = cases(quick=False)
    images = [c for c in listed if c.operation == "batch_norm" and c.values == "normal"]
    crossed = [c for c in images if c.eps == 1e-5 and c.weight is None]
    shapes = len(listing.IMAGES) + len(listing.SPLIT)
    assert len(crossed) == len(set(crossed)) == shapes * 2 * 4 * len(ACTIVATIONS) * 2


def test_gram_of_float64_is_asked_for_normal_values_alone():
    """It has no wider type for its second moment: docs/numerics.md."""
    gram = [c for c in cases(quick=False) if getattr(c, "algorithm", "") == "gram"]
    for dtype in (torch.float32, torch.float64):
        values = {c.values for c in gram if c.dtype is dtype}
        assert (values == {"normal"}) == (dtype is torch.float64)


def test_layouts_are_what_they_are_called():
    x = torch.arange(2.0 * 6 * 4 * 5).reshape(2, 6, 4, 5)
    for layout in ("contiguous", "channels_last", "sliced", "strided"):
        assert torch.equal(inputs.laid_out(x, layout), x)
    assert inputs.laid_out(x, "channels_last").is_contiguous(memory_format=torch.channels_last)
    assert inputs.laid_out(x, "sliced").stride() == (192, 32, 8, 1)
    assert inputs.laid_out(x, "strided").stride(-1) == 2


def test_the_oracle_stands_alone():
    """It imports torch alone, and of that no norm and no activation of torch.nn."""
    tree = ast.parse(Path(reference.__file__).read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    froms = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names == {"math", "torch"}
    assert froms == {"torch", "collections.abc"}
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not used & {"nn", "functional", "batch_norm", "layer_norm", "group_norm", "rms_norm"}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_oracles_activations_are_torchs(activation):
    z = torch.cat([torch.linspace(-8, 8, 64), torch.tensor([0.0, 6.0, torch.nan])]).double()
    z.requires_grad_()
    want, got = ACTIVATIONS[activation](z), reference.ACTIVATIONS[activation](z)
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-12, atol=1e-14)
    # at a NaN torch's own gradients differ
    gradients = [torch.autograd.grad(y.sum(), z)[0][:-1] for y in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-13)


def test_every_result_is_judged(backend):
    for case in ONE_OF_EACH:
        findings = {finding.result: finding for finding in examine(case, backend)}
        want = {"y", "dinput", "dweight"}
        want |= {"sum"} if case.operation.startswith("add") else set()
        want |= {"dresidual"} if case.residual or "add" in case.operation else set()
        want |= set() if "rms" in case.operation else {"dbias"}
        if case.operation.startswith(("batch", "instance", "linear", "conv")):
            want |= {"running_mean", "running_var"}
        if isinstance(case, ProductCase):
            want |= {"dnorm_weight", "dnorm_bias"}
        assert set(findings) == want
        for finding in findings.values():
            assert not finding.wrong, (case, finding)
            exact = finding.result == "dbias" and case.training and isinstance(case, ProductCase)
            assert 0 <= finding.ours <= (0 if exact else min(finding.allowed, 0.05))
            assert finding.torchs is not None


@pytest.mark.parametrize("values", ["mean 1e4, std 1e-2", "all equal", "outliers"])
@pytest.mark.parametrize("operation", ["rms_norm", "add_rms_norm", "layer_norm"])
def test_long_rows_on_the_eager_path(operation, values):
    """A sum of 70001 squares, none of which takes from another."""
    case = RowCase(operation, (2, 70001), values=values)
    with fastnorm.use_backend("eager"):
        assert not [finding for finding in examine(case, CPU) if finding.wrong]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "strided"])
def test_bias_of_instance_norm_in_16_bits(backend, layout, training):
    """Its gradient is float32, and no 16-bit sum."""
    for dtype in (torch.bfloat16, torch.float16):
        case = ChannelCase("instance_norm", (4, 6, 9, 11), dtype, layout, training=training)
        assert not [finding for finding in examine(case, backend) if finding.wrong]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("values", ["mean 1e3, std 1", "near the maximum"])
@pytest.mark.parametrize("size", [20, 40], ids=["copied to planes", "sample by sample"])
def test_instance_norm_in_channels_last(size, values, dtype):
    """As precise as torch's own, which is a batch norm of planes with sums in double."""
    case = ChannelCase(
        "instance_norm", (3, 36, size, size), dtype, layout="channels_last", values=values
    )
    with fastnorm.use_backend("eager"):
        assert not [finding for finding in examine(case, CPU) if finding.wrong]


@pytest.mark.parametrize(
    "case",
    [
        ChannelCase("batch_norm", (250, 24), values="outliers"),
        ChannelCase("group_norm", (40, 256), values="outliers", num_groups=1),
    ],
    ids=lambda case: case.operation,
)
def test_the_first_is_an_outlier(case):
    if torch.cuda.is_available():
        pytest.skip("the interpreter was not asked for")
    with fastnorm.use_backend("triton"):
        assert not [finding for finding in examine(case, CPU) if finding.wrong]


# What a run leaves.


def test_quick_on_the_eager_path_keeps_the_contract(finished):
    status, folder, out, _ = finished
    result = json.loads((folder / "result.json").read_text())
    broken = [
        (case["operation"], case["dtype"], case["shape"], case["values"], name)
        for case in result["cases"]
        for name, one in case["results"].items()
        if one["verdict"] != "kept"
    ]
    assert broken == []
    assert status == 0
    assert result["kept"] is True
    assert f"the contract is kept: {len(cases(True))} cases" in out


def test_files_and_what_they_hold(finished):
    _, folder, out, err = finished
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "result.json"]
    text = (folder / "result.json").read_text()
    result = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    asked = {"device": "cpu", "backend": "eager", "jobs": None, "quick": True, "limit": None}
    assert result["arguments"] == asked
    assert result["machine"]["backend"] == "eager"
    assert result["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert len(result["cases"]) == len(cases(True))
    page = (folder / "report.html").read_text("utf-8")
    assert not re.search(r"https?:|href|<script|@import|url\(|src=", page)
    for operation in OPERATIONS:
        assert re.search(rf"^{operation} float32 +\d+ ", out, re.MULTILINE)
        assert f"<summary>{operation}: " in page
    assert str(folder) in out
    assert re.search(r"^verify 100%", err.splitlines()[-1])
    assert len(err.splitlines()) <= 10


# That it can fail.


def scaled(by):
    def wrong(original):
        def call(*args, **kwargs):
            y = original(*args, **kwargs)
            return (y[0] * by, y[1]) if isinstance(y, tuple) else y * by

        return call

    return wrong


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_small_error_is_seen(operation, few, tmp_path, monkeypatch, capsys):
    """A few units in the last place, in each dtype."""
    (case,) = (case for case in ONE_OF_EACH if case.operation == operation)
    by = (4 if case.dtype.itemsize == 2 else 64) * torch.finfo(case.dtype).eps
    monkeypatch.setattr(FF, operation, scaled(1 + by)(getattr(FF, operation)))
    status, result = verified(tmp_path / "out")
    assert status == 1
    assert result["kept"] is False
    for one in result["cases"]:
        wrong = {n for n, r in one["results"].items() if r["verdict"] != "kept"}
        assert ("y" in wrong) == (one["operation"] == operation)
    out = capsys.readouterr().out
    assert f"BROKEN {operation} " in out
    assert "1 of 9 cases break the contract" in out
    assert "worse than the contract allows" in (tmp_path / "out" / "report.html").read_text("utf-8")


class _Spoiled(torch.autograd.Function):
    """The identity, whose gradient has one element that is a little off."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        dy = dy.clone()
        dy.view(-1)[3] += 1e-3
        return dy


def test_a_wrong_gradient_is_seen(monkeypatch):
    original = FF.layer_norm
    monkeypatch.setattr(FF, "layer_norm", lambda *a, **k: _Spoiled.apply(original(*a, **k)))
    wrong = {f.result for f in examine(RowCase("layer_norm", (4, 20)), CPU) if f.wrong}
    assert wrong == {"dinput", "dweight", "dbias"}


def test_a_buffer_that_does_not_move_is_seen(monkeypatch):
    original = FF.batch_norm

    def still(x, mean, var, *args, **kwargs):
        return original(x, mean.clone(), var, *args, **kwargs)

    monkeypatch.setattr(FF, "batch_norm", still)
    wrong = {f.result for f in examine(ChannelCase("batch_norm", (6, 3)), CPU) if f.wrong}
    assert wrong == {"running_mean"}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda y: y.double(), "torch.float64 [4, 20], expected torch.float32 [4, 20]"),
        (lambda y: y[None], "RuntimeError: Mismatch in shape"),
        (lambda y: torch.where(y > 1, torch.inf, y), "NaN, infinite or finite where torch's"),
        (lambda y: torch.where(y > 1, torch.nan, y), "NaN, infinite or finite where torch's"),
    ],
    ids=["dtype", "shape", "infinity", "NaN"],
)
def test_other_faults_are_seen(spoil, says, monkeypatch):
    original = FF.rms_norm
    monkeypatch.setattr(FF, "rms_norm", lambda *a, **k: spoil(original(*a, **k)))
    found = examine(RowCase("rms_norm", (4, 20)), CPU)[0]
    assert says in found.wrong
    assert found.share >= 1


def test_a_nan_that_is_swallowed_is_seen(monkeypatch):
    original = FF.rms_norm
    monkeypatch.setattr(FF, "rms_norm", lambda *a, **k: original(*a, **k).nan_to_num())
    findings = examine(RowCase("rms_norm", (4, 20), values="a NaN"), CPU)
    assert "20 elements NaN" in next(f.wrong for f in findings if f.result == "y")


def test_other_bits_on_a_second_call_are_seen(monkeypatch):
    original, calls = FF.rms_norm, []

    def drifting(*args, **kwargs):
        calls.append(None)
        return original(*args, **kwargs) * (1 + 1e-7 * len(calls))

    monkeypatch.setattr(FF, "rms_norm", drifting)
    case = RowCase("rms_norm", (4, 20))
    assert not any(finding.wrong for finding in examine(case, CPU))
    (one,) = examined([case], CPU)
    assert "other bits on a second call" in {finding.wrong for finding in one.wrong}


def test_what_is_allowed():
    """Twice torch's error, a NaN where torch has one, and what is flushed to zero."""
    one, none = torch.ones(4, dtype=torch.float64), [0.0] * 4

    def wrong(ours, theirs):
        got, others = (one.float() + torch.tensor(errors) for errors in (ours, theirs))
        return _judge("y", got, others, one, one, 0.0).wrong

    assert not wrong([1.9e-3, *none[1:]], [0.0, 1e-3, *none[2:]])
    assert wrong([2.1e-3, *none[1:]], [0.0, 1e-3, *none[2:]])
    assert not wrong([math.nan, *none[1:]], [math.nan, *none[1:]])
    assert wrong([math.nan, *none[1:]], [0.0, math.nan, *none[2:]])
    assert not _judge("y", torch.zeros(4), None, 1e-39 * one, 0 * one, 0.0).wrong
    for value, size, right in (
        (math.inf, 1e5, True),
        (math.inf, 6e4, False),
        (math.nan, 1e5, False),
    ):
        got = torch.tensor([value, *none[1:]]).half()
        assert right is not bool(
            _judge("y", got, got.nan_to_num(0, 0), 0 * one, size * one, 1.0).wrong
        )
    assert "[1, 4], expected" in _judge("y", one.float()[None], None, one, one, 0.0).wrong


def test_what_a_rounding_decides_is_not_asked():
    """Elements that lie at a jump of the derivative have no upstream gradient."""
    z = torch.tensor([1e-8, 1e-3, 6 - 1e-8, 3.0], dtype=torch.float64)
    stages = Stages(z, *[torch.ones_like(z)] * 4)
    for activation, near in (("relu6", [1, 0, 1, 0]), ("relu", [1, 0, 0, 0]), ("silu", [0] * 4)):
        case = RowCase("layer_norm", (4,), activation=activation)
        assert _ambiguous(case, stages).tolist() == [bool(n) for n in near]


def test_shares_and_ratios():
    """What is wrong uses up all that is allowed, however small the error."""
    assert Finding("y", 0.0, 1.0, 4.0, "other bits").share == 1
    assert Finding("y", 2.0, 1.0, 4.0).share == 0.5
    assert Finding("y", 2.0, 1.0, 4.0).ratio == 2
    assert Finding("y", 2.0, 0.0, 4.0).ratio == math.inf
    assert Finding("y", 0.0, 0.0, 4.0).ratio == 1


def test_a_call_that_raises_is_a_finding(few, tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(FF, "group_norm", broken)
    status, result = verified(tmp_path / "out")
    assert status == 1
    (case,) = (case for case in result["cases"] if case["operation"] == "group_norm")
    says = "RuntimeError: no kernel image is available"
    assert case["results"]["call"]["verdict"] == says
    assert says in capsys.readouterr().out


def test_a_limit(few, tmp_path, monkeypatch, capsys):
    """The report says how many cases are left out."""
    asked = iter(range(100))
    monkeypatch.setattr(verify, "is_over", lambda limit, start: next(asked) >= (limit == 7) * 2)
    options = ["--device", "cpu", "--backend", "eager", "--limit", "7"]
    assert main(["verify", *options, "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert len(result["cases"]) == 3
    left = f"{len(ONE_OF_EACH) - 3} cases left out: the limit of 7 s was over"
    assert result["left_out"] == left
    assert left in capsys.readouterr().out


def test_torch_without_the_operator(monkeypatch):
    """Ours is then held to roundings alone."""

    def absent(*args, **kwargs):
        raise NotImplementedError("not implemented for 'Half'")

    monkeypatch.setattr(torch.nn.functional, "group_norm", absent)
    findings = examine(ChannelCase("group_norm", (2, 6, 5), num_groups=3), CPU)
    assert all(f.torchs is None and f.ratio is None and not f.wrong for f in findings)
    assert "-" in verify._cells(findings[0], "kept")


@pytest.mark.slow
def test_processes_share_the_cases():
    found = list(examined(ONE_OF_EACH[:5], CPU, backend="eager", jobs=2))
    assert found == list(examined(ONE_OF_EACH[:5], CPU, backend="eager"))
    assert not any(one.wrong for one in found)


def test_summaries():
    found = list(examined([ONE_OF_EACH[3], ONE_OF_EACH[3], ONE_OF_EACH[4]], CPU))
    one, other = summaries(found)
    assert (one.operation, one.dtype, one.cases, one.wrong) == ("layer_norm", "float64", 2, 0)
    assert (other.operation, other.dtype, other.cases) == ("rms_norm", "bfloat16", 1)
    assert one.worst == max(found[0].findings, key=lambda finding: finding.share)


# In the interpreter, and arguments.


def test_in_the_interpreter(few, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("the interpreter was not asked for")
    status, result = verified(tmp_path / "out", "triton")
    assert status == 0
    assert result["machine"]["backend"] == "triton"
    assert result["left_out"] == ""


def test_what_the_interpreter_cannot_do_is_left_out(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the interpreter was not asked for")
    assert not interprets(CPU)
    with fastnorm.use_backend("triton"):
        assert interprets(CPU)
        assert left_out(ONE_OF_EACH, CPU) == (ONE_OF_EACH, "")
        original = FF.linear_batch_norm
        monkeypatch.setattr(FF, "linear_batch_norm", lambda *a, **k: original(*a, **k) + 1)
        kept, reason = left_out(ONE_OF_EACH, CPU)
    assert [c for c in ONE_OF_EACH if c not in kept] == [ONE_OF_EACH[4]]
    assert reason.startswith("1 cases left out: Triton's interpreter")


@pytest.mark.slow
def test_quick_in_the_interpreter(tmp_path):
    """A third of the list without its large shapes, judged by the checker too."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter was not asked for")
    rows = [case for case in cases(True) if case.shape[0] < 250 and case.dtype != torch.float64]
    for one in examined(rows[::3], CPU, backend="triton"):
        assert not one.wrong, (one.case, one.wrong)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--backend", "cuda"], ["--backend", "'cuda'", "auto, triton, eager"]),
        (["--device", "tpu"], ["--device", "'tpu'", "auto, cpu"]),
        (["--jobs", "0"], ["--jobs", "'0'", "1 to 64"]),
        (["--fast"], ["--fast", "--quick"]),
        (["--out", ""], ["--out", "a new or an empty folder"]),
    ],
)
def test_bad_arguments_are_named(options, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["verify", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("fastnorm verify: argument ")
    for word in words:
        assert word in err
    assert list(tmp_path.iterdir()) == []


def test_a_backend_that_cannot_serve(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "has_triton", False)
    assert main(["verify", "--device", "cpu", "--backend", "triton"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastnorm verify: argument --backend: ")
    assert "triton is not installed" in err
    assert list(tmp_path.iterdir()) == []
