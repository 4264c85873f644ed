"""`fastnorm bench`: what it measures, writes and says, and how it ends."""

import io
import itertools
import json
import math
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fastnorm
from fastnorm.bench import ceilings, harness, libraries, shapes, suite
from fastnorm.bench.layers import FORMATS, PASSES, Layer
from fastnorm.cli import bench, bench_plots, bench_report, main
from fastnorm.cli.bench_groups import geometric
from fastnorm.cli.measure import peak_memory
from fastnorm.cli.progress import is_over

CPU = torch.device("cpu")
REAL_LAYERS, REAL_MEASURE = shapes.layers, ceilings.measure
LAYERS = [
    Layer("small call", "BatchNorm1d", (4,), (8, 4), quick=True),
    Layer("block", "BatchNorm2d", (4,), (2, 4, 6, 6), "channels_last", "relu", residual=True),
    Layer("block", "GroupNorm", (2, 4), (2, 4, 6, 6), activation="silu"),
    Layer("block", "InstanceNorm3d", (4,), (2, 4, 3, 4, 4), "channels_last_3d", quick=True),
    Layer("hidden size", "RMSNorm", (16,), (6, 16)),
    Layer("pre-norm", "AddLayerNorm", (16,), (6, 16), residual=True),
    Layer("stage", "LinearBatchNorm", (8, 12), (32, 8), activation="relu"),
    Layer("bottleneck", "Conv2dBatchNorm", (4, 6, 1), (2, 4, 5, 5), "channels_last", "relu"),
]
TOP = ceilings.Ceilings({1 << 20: 1e9, 1 << 28: 2e9}, {"float32": 1e10, "bfloat16": 4e10})


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Layers that take no time, below ceilings that were not measured."""
    monkeypatch.setattr(shapes, "layers", lambda device: LAYERS)
    monkeypatch.setattr(ceilings, "measure", lambda device, quick: TOP)
    monkeypatch.setattr(suite, "cache_bytes", lambda device: 1 << 12)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run over all the small layers: (folder, what it printed, its progress)."""
    folder = tmp_path_factory.mktemp("bench") / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "layers", lambda device: LAYERS)
        patch.setattr(ceilings, "measure", lambda device, quick: TOP)
        patch.setattr(suite, "cache_bytes", lambda device: 1 << 12)
        patch.setattr(sys, "stdout", io.StringIO())
        patch.setattr(sys, "stderr", io.StringIO())
        options = ["--peers", "none", "--rounds", "2", "--device", "cpu"]
        assert main(["bench", *options, "--out", str(folder)]) == 0
        return folder, sys.stdout.getvalue(), sys.stderr.getvalue()


def case(layer=LAYERS[1], dtype=torch.float32, kind="step"):
    return suite.Case(layer, dtype, kind)


def refused(capsys, *options):
    """The only line that a command with bad arguments prints."""
    assert main(["bench", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("fastnorm bench: ")
    return err


# What a finished run leaves.


def test_json_has_every_case(finished):
    folder, _, _ = finished
    text = (folder / "result.json").read_text()
    result = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    found = {
        (r["kind"], tuple(r["shape"]), r["layout"], r["dtype"], r["pass"])
        for r in result["results"]
    }
    wanted = {
        (layer.kind, layer.shape, layer.layout, dtype, kind)
        for layer in LAYERS
        for dtype in ("float32", "bfloat16")
        for kind in (PASSES if "BatchNorm" in layer.kind else PASSES[1:])
    }
    assert found == wanted
    assert result["arguments"] == {"quick": False, "only": None, "rounds": 2}
    assert result["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])
    assert result["machine"]["device"] == "cpu"
    assert result["peers"] == []
    assert result["absent"]["quack"] == "not installed"


def test_json_numbers_agree(finished):
    folder, _, _ = finished
    result = json.loads((folder / "result.json").read_text())
    for line in result["results"]:
        ours, theirs = (line["costs"][name] for name in ("fastnorm", "torch.nn"))
        assert set(line["costs"]) == {"fastnorm", "torch.nn"}
        assert line["backend"] == "eager"
        assert ours["speedup"] == ours["median_speedup"] == 1
        assert theirs["speedup"] == pytest.approx(theirs["best_s"] / ours["best_s"])
        least = max(
            line["bytes"] / result["ceilings"]["memory_bytes_per_s"],
            line["flops"] / result["ceilings"]["flop_per_s"][line["dtype"]],
        )
        assert ours["of_ceiling"] == pytest.approx(least / ours["best_s"])
        assert ours["best_s"] <= ours["median_s"]
        assert ours["launches"] is None
        assert ours["peak_bytes"] > 0
        assert line["noise"] >= 0


def test_pictures_and_a_page_that_needs_no_other_file(finished):
    folder, _, _ = finished
    pictures = ["bandwidth.png", "roofline.png", "speedup.png"]
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted([*pictures, "report.html", "result.json"])
    for name in pictures:
        assert (folder / name).read_bytes().startswith(b"\x89PNG\r\n")
    page = (folder / "report.html").read_text("utf-8")
    assert re.findall(r'src="([^"]{15})', page) == ["data:image/png;"] * 3
    prose = re.sub(r'"data:image/png;base64,[^"]*"', "", page)
    assert not re.search(r"https?:|href|<script|@import|url\(", prose)


def test_published_figures_stand_beside_a_gpus(finished, tmp_path):
    folder, out, _ = finished
    assert "published" not in out + (folder / "report.html").read_text("utf-8"), "on a CPU"
    result = json.loads((folder / "result.json").read_text())
    (line,) = (
        r
        for r in result["results"]
        if (r["operation"], r["dtype"], r["pass"]) == ("RMSNorm", "bfloat16", "forward")
    )
    line |= {"backend": "triton", "shape": [16384, 4096], "bytes": 1 << 28}
    line["costs"]["fastnorm"]["best_s"] = (1 << 28) / 1.5e9
    table = bench_report.tables(result)[1]
    assert table.rows == [("4096", "2 (75%)", "2900 (87%)", "2904 (87%)", "2303 (69%)")]
    bench_report.write(tmp_path, result)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "2900 (87%)" in page
    assert "Every case" in page


def test_what_is_printed(finished):
    folder, out, err = finished
    assert "Ceilings measured here: copies at 2 GB/s" in out
    assert "quack (not installed)" in out
    assert out.endswith(f"results in {folder}\n")
    assert "block: GroupNorm + silu 2×4×6×6 contiguous" in out
    assert err.splitlines()[-1].startswith("bench 100%  40/40")
    assert "\x1b" not in out + err


def made_up():
    """A result of four cases: speeds of ours over torch.nn's and a peer's that are known."""

    def line(name, step, refused, **speeds):
        times = {"fastnorm": 1.0} | {n.replace("_", "."): s for n, s in speeds.items()}
        costs = {
            other: {
                "best_s": 2e-3 * speed, "speedup": speed, "median_speedup": 7.0,
                "of_ceiling": 0.5 / speed, "launches": None, "host_s": None,
                "peak_bytes": 100 if other == "fastnorm" else 400,
            }
            for other, speed in times.items()
        }  # fmt: skip
        return {
            "name": name, "operation": "BatchNorm2d", "shape": [2, 4, 6, 6], "pass": step,
            "layout": "contiguous", "dtype": "float32", "backend": "eager", "bytes": 4_000_000,
            "flops": 8_000_000, "noise": 0.01, "costs": costs, "refused": refused,
        }  # fmt: skip

    lines = [
        line("stage", "forward", {}, torch_nn=2.0, liger=8.0),
        line("stage", "eval", {"liger": "no"}, torch_nn=0.5),
        line("stage", "step", {"liger": "no"}, torch_nn=3.0),
        line("small call", "forward", {}, torch_nn=4.0),
    ]
    ceilings = bench_report.ceilings_in_json(TOP)
    return {"results": lines, "peers": ["liger"], "absent": {}, "ceilings": ceilings}


def test_what_the_tables_say():
    summary, every = bench_report.tables(made_up())
    assert summary.columns == (
        "", "cases", "torch.nn, forward", "torch.nn, step", "liger, forward", "liger, step",
        "least, torch.nn",
    )  # fmt: skip
    assert summary.rows == [
        ("BatchNorm2d", "3", "1.00", "3.00", "8.00", "–", "0.50"),
        ("small calls", "1", "4.00", "–", "–", "–", "4.00"),
    ]
    assert every.rows[0] == (
        "stage: BatchNorm2d 2×4×6×6 contiguous", "float32", "forward", "2,000", "2", "50%",
        "2.00", "8.00", "0.25", "1.0%",
    )  # fmt: skip
    assert len(every.columns) == len(every.rows[0])
    said = bench_report.sentences(made_up())
    assert said[1:] == ["Left out: liger, BatchNorm2d, 2 cases: no"]


def test_what_the_pictures_show(monkeypatch):
    monkeypatch.setattr(bench_plots, "png", lambda figure: figure)
    bandwidth, bars, roofline = (found for _, _, found in bench_plots.pictures(made_up()))
    theirs, ours, copy = (line.get_xydata().tolist() for line in bandwidth.axes[0].lines)
    assert ours == [[4e6, pytest.approx(2.0)]] * 4
    assert theirs == [[4e6, pytest.approx(2.0 / speed)] for speed in (2.0, 0.5, 3.0, 4.0)]
    assert copy == [[1 << 20, 1.0], [1 << 28, 2.0]]
    (axes,) = bars.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["BatchNorm2d, forward", "BatchNorm2d, step", "small calls, forward"]
    assert [bar.get_width() for bar in axes.patches[:3]] == pytest.approx([1.0, 3.0, 4.0])
    assert axes.patches[3].get_width() == pytest.approx(8.0)
    single, half, theirs, ours = (line.get_xydata().tolist() for line in roofline.axes[0].lines)
    assert ours == [[2.0, pytest.approx(4.0)]] * 3, "small calls cost the call"
    assert theirs == [[2.0, pytest.approx(4.0 / speed)] for speed in (2.0, 0.5, 3.0)]
    for roof, top in ((single, 10.0), (half, 40.0)):
        (low, bottom), (corner, height), (_, end) = roof
        assert (bottom, height, end) == pytest.approx((2.0 * low, top, top))
        assert corner == pytest.approx(top / 2.0)


def test_quick_takes_one_dtype_of_the_chosen_layers(tmp_path):
    folder = tmp_path / "results"
    options = ["--quick", "--peers", "none", "--rounds", "1", "--device", "cpu"]
    assert main(["bench", *options, "--only", "Norm", "--out", str(folder)]) == 0
    result = json.loads((folder / "result.json").read_text())
    found = [(line["kind"], line["dtype"], line["pass"]) for line in result["results"]]
    assert found == [
        (kind, "float32", step)
        for kind in ("BatchNorm1d", "InstanceNorm3d")
        for step in ("forward", "step")
    ]


# How it ends.


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--peers", "cudnn"], ["--peers", "'cudnn'", "compile", "quack"]),
        (["--peers", "quack"], ["--peers", "quack: not installed", "none, compile"]),
        (["--only", "Dropout"], ["--only", "'Dropout'"]),
        (["--only", " "], ["--only", "' '"]),
        (["--rounds", "0"], ["--rounds", "'0'", "1 to 10000"]),
        (["--device", "tpu"], ["--device", "'tpu'"]),
        (["--fast"], ["--fast", "--quick"]),
    ],
)
def test_bad_arguments_end_with_one_line(tmp_path, capsys, options, named):
    line = refused(capsys, *options, "--out", str(tmp_path / "results"))
    assert all(word in line for word in named), line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("options", "asked"), [(["--quick"], (5, False)), ([], (15, True))])
def test_a_quick_run_takes_fewer_rounds_once(tmp_path, monkeypatch, options, asked):
    found = []

    def measure(*args, rounds, again, peak_memory):
        found.append((rounds, again))
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "measure", measure)
    options = [*options, "--peers", "none", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(["bench", *options]) == 130
    assert found == [asked]


def test_the_interpreter_is_not_timed(tmp_path, capsys):
    with fastnorm.use_backend("triton"):
        line = refused(capsys, "--device", "cpu", "--out", str(tmp_path / "results"))
    assert "FASTNORM_BACKEND" in line


def test_a_limit(tmp_path, capsys, monkeypatch):
    """The case that is running is finished; the report names those that are not begun."""
    asked = iter(range(100))
    monkeypatch.setattr(bench, "is_over", lambda limit, start: next(asked) >= (limit == 15) * 2)
    options = ["--peers", "none", "--rounds", "1", "--device", "cpu", "--limit", "15"]
    assert main(["bench", *options, "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    cases = [str(one) for one in suite.cases(CPU, False)]
    assert len(result["results"]) == 3  # after the third it is over
    assert result["left_out"] == cases[3:]
    assert f"Left out, since the limit was over: {cases[3]};" in capsys.readouterr().out


def test_an_interrupted_case_with_a_limit_is_left_out(tmp_path, monkeypatch):
    """What was measured before it is written: it may be all there will ever be."""
    cases = [str(one) for one in suite.cases(CPU, False)]

    def interrupted(one, *rest, measure=suite.measure, **options):
        if str(one) == cases[1]:
            raise KeyboardInterrupt
        return measure(one, *rest, **options)

    monkeypatch.setattr(suite, "measure", interrupted)
    options = ["--peers", "none", "--rounds", "1", "--device", "cpu", "--limit", "100"]
    assert main(["bench", *options, "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert len(result["results"]) == 1
    assert result["left_out"] == cases[1:]


def test_when_a_limit_is_over():
    now = time.monotonic()
    assert [is_over(limit, now - 10) for limit in (None, 5, 3600)] == [False, True, False]


def test_a_case_that_fails_is_named(tmp_path, capsys, monkeypatch):
    """And keeps no other from being timed; the status tells."""
    first, *others = (str(one) for one in suite.cases(CPU, True))

    def fails(one, *rest, measure=suite.measure, **options):
        if str(one) == first:
            raise RuntimeError("no such layout\nand more")
        return measure(one, *rest, **options)

    monkeypatch.setattr(suite, "measure", fails)
    options = ["--quick", "--peers", "none", "--rounds", "1", "--device", "cpu"]
    assert main(["bench", *options, "--out", str(tmp_path / "out")]) == 1
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["failed"] == {first: "RuntimeError: no such layout"}
    assert len(result["results"]) == len(others)
    assert f"Failed: {first}: RuntimeError: no such layout" in capsys.readouterr().out


def test_where_nothing_can_be_timed_it_says_why(tmp_path, monkeypatch):
    """And does not go on to the last case when the limit is over."""
    tried = []

    def fails(one, *rest, **options):
        tried.append(one)
        raise RuntimeError("no such device")

    monkeypatch.setattr(suite, "measure", fails)
    monkeypatch.setattr(bench, "is_over", lambda limit, start: len(tried) > 1)
    with pytest.raises(RuntimeError, match="no such device"):
        main(["bench", "--peers", "none", "--device", "cpu", "--out", str(tmp_path / "out")])
    assert len(tried) == 2
    assert not list(tmp_path.iterdir())


def test_launches_are_not_counted_where_nobody_can(monkeypatch):
    monkeypatch.setattr(torch.profiler, "supported_activities", set)
    assert suite.launches(None, [], torch.device("cuda")) is None


def test_an_interrupted_run_leaves_nothing(tmp_path, capsys, monkeypatch):
    done = []

    def interrupted(one, *rest, measure=suite.measure, **options):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(one)
        return measure(one, *rest, **options)

    monkeypatch.setattr(suite, "measure", interrupted)
    options = ["--peers", "none", "--rounds", "1", "--device", "cpu"]
    assert main(["bench", *options, "--out", str(tmp_path / "a" / "results")]) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Peers.


class Twice(torch.nn.Module):
    """Wrong by a factor."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, *tensors):
        return 2 * self.norm(*tensors)


def test_peers_are_checked_before_they_are_timed(monkeypatch):
    entered = []

    @contextmanager
    def within():
        entered.append(True)
        yield

    def fails(layer):
        raise RuntimeError("no such layout\nand more")

    peers = {
        "twin": libraries.Peer("torch", "torch", libraries.torch_nn, cpu=True, within=within),
        "wrong": libraries.Peer(
            "torch", "torch", lambda layer: Twice(libraries.torch_nn(layer)), cpu=True
        ),
        "broken": libraries.Peer("torch", "torch", fails, cpu=True),
        "without": libraries.Peer("torch", "torch", lambda layer: None, cpu=True),
    }
    monkeypatch.setattr(libraries, "PEERS", peers)
    found = suite.measure(case(), peers, CPU, TOP, rounds=2, again=False)
    assert set(found.costs) == {"torch.nn", "fastnorm", "twin"}
    assert found.refused["wrong"].startswith("differs from torch.nn by 1.0e+00")
    assert found.refused["broken"] == "RuntimeError: no such layout"
    assert "without" not in found.refused
    assert len(entered) >= 4  # the check, the warm-up and each round


def test_a_wrong_fastnorm_is_not_timed(monkeypatch):
    monkeypatch.setattr(libraries, "ours", lambda layer: Twice(libraries.torch_nn(layer)))
    with pytest.raises(AssertionError, match=r"fastnorm differs from torch\.nn by"):
        suite.measure(case(), [], CPU, TOP, rounds=1)


@pytest.mark.parametrize("name", libraries.PEERS)
def test_a_peer_says_why_it_is_absent(name, monkeypatch):
    peer = libraries.PEERS[name]
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda module: None)
    assert peer.absence(CPU) == "not installed"
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda module: object())
    assert peer.absence(CPU) == (None if name == "compile" else "needs a GPU")
    assert peer.absence(torch.device("cuda")) is None


def test_peers_get_arguments_as_they_take_them(monkeypatch):
    """Of libraries that need a GPU: the layer's, eps, and nothing that writes over an input."""
    made = []

    class Library:
        def __getattr__(self, name):
            return lambda *args, **options: made.append((name, args, options))

    monkeypatch.setattr(libraries, "importlib", SimpleNamespace(import_module=lambda _: Library()))
    group = Layer("", "GroupNorm", (8, 64), (2, 64, 4, 4))
    row = Layer("", "RMSNorm", (16,), (6, 16))
    for name, layer in (("liger", group), ("apex", replace(group, activation="silu"))):
        libraries.PEERS[name].make(layer)
    for name in ("liger", "apex", "xformers"):
        libraries.PEERS[name].make(row)
    libraries.PEERS["liger"].make(replace(row, kind="AddRMSNorm", residual=True))
    eps = {"eps": 1e-5}
    assert made == [
        ("LigerGroupNorm", (64, 8), eps), ("GroupNorm", (8, 64), eps | {"act": "silu"}),
        ("LigerRMSNorm", (16,), eps | {"in_place": False}), ("FusedRMSNorm", (16,), eps),
        ("RMSNorm", (16,), eps), ("LigerFusedAddRMSNorm", (16,), eps | {"in_place": False}),
    ]  # fmt: skip
    made.clear()
    for name in ("liger", "quack", "apex", "xformers", "flash-attn"):
        for other in (replace(row, activation="relu"), Layer("", "BatchNorm1d", (4,), (8, 4))):
            if (name, other.kind) != ("liger", "BatchNorm1d"):  # asked of the library itself
                assert libraries.PEERS[name].make(other) is None
    assert made == []


def test_peers_that_are_functions_get_every_tensor(monkeypatch):
    """With a sum before the norm it is returned too."""
    calls = []

    def function(*args, **options):
        calls.append((args, options))

    names = SimpleNamespace(rmsnorm=function, layer_norm_fn=function)
    monkeypatch.setattr(libraries, "importlib", SimpleNamespace(import_module=lambda _: names))
    x, residual = torch.randn(2, 6, 16)
    for kind in ("RMSNorm", "AddLayerNorm"):
        added = residual if kind.startswith("Add") else None
        layer = Layer("", kind, (16,), (6, 16), residual=added is not None)
        for name in ("quack", "flash-attn"):
            module = libraries.PEERS[name].make(layer)
            if module is None:
                assert (name, kind) == ("quack", "AddLayerNorm")
                continue
            module(x, added)
            args, options = calls.pop()
            assert args[:2] == (x, module.weight)
            assert options["residual"] is added
            assert options["prenorm"] is (added is not None)
            assert options["eps"] == 1e-5
            if name == "flash-attn":
                assert options["is_rms_norm"] is (kind == "RMSNorm")
                assert args[2] is module.bias
                assert (module.bias is None) == (kind == "RMSNorm")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_torch_compile_takes_part():
    for kind in ("forward", "step"):
        found = suite.measure(case(kind=kind), ["compile"], CPU, TOP, rounds=1, again=False)
        assert not found.refused
        assert found.costs["compile"].best_s > 0


# What is measured.


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_library_gets_the_same_layer(layer, dtype):
    """Inputs in the layout, gradients of all of them and of as many parameters."""
    torch.manual_seed(0)
    for kind in layer.passes:
        calls, inputs, _ = suite.prepare(case(layer, dtype, kind), [], CPU)
        assert inputs[0][0].is_contiguous(memory_format=FORMATS[layer.layout])
        one, other = (calls[name](*inputs[0]) for name in (suite.BASELINE, suite.OURS))
        if isinstance(one, torch.Tensor):
            one, other = [one], [other]
        assert [t.dtype for t in one] == [t.dtype for t in other]
        if kind == "step":
            assert len(one) == 1 + layer.residual + len(
                list(libraries.torch_nn(layer).parameters())
            )


@pytest.mark.parametrize(
    ("layer", "kind", "passes"),
    [
        (Layer("", "BatchNorm2d", (64,), (32, 64, 56, 56)), "eval", 2),
        (Layer("", "BatchNorm2d", (64,), (32, 64, 56, 56)), "forward", 3),
        (Layer("", "BatchNorm2d", (64,), (32, 64, 56, 56)), "step", 8),
        (Layer("", "BatchNorm1d", (64,), (32, 64)), "step", 5),
        (
            Layer("", "BatchNorm2d", (64,), (32, 64, 56, 56), "channels_last", "relu", True),
            "step",
            4 + 7,
        ),
        (Layer("", "BatchNorm2d", (64,), (32, 64, 56, 56), residual=True), "step", 4 + 5),
        (Layer("", "GroupNorm", (32, 320), (2, 320, 16, 16)), "step", 5),
        (Layer("", "GroupNorm", (8, 64), (2, 64, 45, 45)), "step", 2 + 5),  # 64 KB fit once
        (Layer("", "GroupNorm", (32, 64), (2, 64, 8, 8), "channels_last"), "step", 5),
        (Layer("", "GroupNorm", (32, 64), (2, 64, 16, 16), "channels_last"), "step", 8),
        (Layer("", "InstanceNorm2d", (64,), (2, 64, 256, 256)), "step", 8),
        (Layer("", "LayerNorm", (4096,), (64, 4096)), "step", 5),
        (Layer("", "LayerNorm", (12288,), (64, 12288)), "step", 2 + 5),
        (Layer("", "RMSNorm", (32768,), (64, 32768)), "step", 3 + 5),
        (Layer("", "AddRMSNorm", (4096,), (64, 4096), residual=True), "step", 4 + 4),
    ],
)
def test_fewest_bytes(layer, kind, passes):
    """The table of the fewest bytes of each operation."""
    size = math.prod(layer.shape)
    assert layer.fewest_bytes(torch.float32, kind) == 4 * size * passes


def test_rows_of_float64_that_fit_are_half_as_long():
    layer = Layer("", "LayerNorm", (16384,), (64, 16384))
    assert layer.fewest_bytes(torch.float32, "forward") == 4 * 64 * 16384 * 2
    assert layer.fewest_bytes(torch.float64, "forward") == 8 * 64 * 16384 * 3


def test_fewest_bytes_and_flops_of_a_product():
    layer = Layer("", "LinearBatchNorm", (64, 256), (1000, 64))
    x, y = 64000, 256000
    assert layer.fewest_bytes(torch.bfloat16, "forward") == 2 * (x + y)
    assert layer.fewest_bytes(torch.bfloat16, "step") == 6 * (x + y)
    assert layer.flops("step") - layer.flops("forward") == 2 * 2 * 1000 * 64 * 256 + 12 * y
    assert layer.flops("forward") - layer.flops("eval") == 4 * y


def test_buffers_outgrow_the_cache(monkeypatch):
    size = LAYERS[1].fewest_bytes(torch.float32, "forward")
    for cache, copies in ((size // 4, 1), (size, 2), (100 * size, suite.MOST_COPIES)):
        monkeypatch.setattr(suite, "cache_bytes", lambda device, cache=cache: cache)
        _, inputs, _ = suite.prepare(case(), [], CPU)
        assert len(inputs) == copies


def test_no_two_calls_in_a_row_get_the_same_buffers():
    """Whoever makes them: a cache must not hold what a candidate's predecessor touched."""
    seen = []
    calls = dict.fromkeys(("a", "b"), seen.append)
    harness.compare(calls, "a", inputs=[(k,) for k in range(3)], rounds=4, min_sample=1e-9)
    assert seen == [k % 3 for k in range(len(seen))]
    assert len(seen) == 3 * 2 + 3 * 2 + 4 * 3 * 2  # warm-up, length of a call, rounds


def test_candidates_take_turns(monkeypatch):
    """In each direction, and each of them first; the baseline, as the gauge, twice a round."""
    begun = []

    def candidate(name, *seconds):
        times = itertools.cycle(seconds)

        def call():
            begun.append(name)
            return next(times)

        return call

    monkeypatch.setattr(harness, "_sample_cpu", lambda call, rotation, calls: call())
    calls = {"a": candidate("a", 4.0), "b": candidate("b", 1.0, 2.0, 8.0, 1.0, 2.0, 16.0)}
    found = harness.compare(calls, "a", rounds=5)
    rounds = [begun[i : i + 3] for i in range(3 + 3, len(begun), 3)]  # after what is not counted
    assert ["".join(names) for names in rounds] == ["aba", "aba", "baa", "aab", "aab"]
    assert found.samples["b"] == [2.0, 8.0, 1.0, 2.0, 16.0]
    assert found["b"] == harness.Timing(best=1.0, median=2.0, ratio=4.0, median_ratio=2.0)
    assert found[harness.GAUGE] == harness.Timing(4.0, 4.0, 1.0, 1.0)


def test_a_sample_is_the_best_of_long_calls_and_the_mean_of_short_ones(monkeypatch):
    now = 0.0

    def call(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: now))
    for seconds, want in (((3e-3, 1e-3, 8e-3), 1e-3), ((3e-6, 1e-6, 8e-6), 4e-6)):
        found = harness._sample_cpu(call, iter([(s,) for s in seconds]), 3)
        assert found == pytest.approx(want)


def test_a_table_in_plain_text():
    rows = [("a", 1.5), ("longer", 10.25), ("b", 3)]
    want = ["name         x", "a        1.500", "longer  10.250", "b            3"]
    assert harness.table(("name", "x"), rows).splitlines() == want


def test_the_quick_cases_are_of_the_dtype_that_a_device_is_used_with():
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        quick = suite.cases(torch.device(device), True)
        assert {one.dtype for one in quick} == {dtype}
        assert {one.kind for one in quick} == {"forward", "step"}


@pytest.mark.parametrize("layer", LAYERS[:2], ids=str)
def test_evaluation_is_of_running_statistics_and_records_nothing(layer):
    torch.manual_seed(0)
    for kind in ("eval", "forward"):
        calls, inputs, _ = suite.prepare(case(layer, kind=kind), [], CPU)
        for call in (calls[suite.BASELINE], calls[suite.OURS]):
            y = call(*inputs[0])
            assert not y.requires_grad
            x, *rest = inputs[0]
            shape = (1, -1) + (1,) * (x.ndim - 2)
            mean, var = torch.zeros(4), torch.ones(4)
            if kind == "forward":
                axes = [0, *range(2, x.ndim)]
                mean, var = x.mean(axes), x.var(axes, correction=0)
            small = torch.linspace(0.5, 1.5, 4).view(shape)  # weight and bias
            want = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt() * small + small
            want = (want + rest[0]).relu() if layer.residual else want
            torch.testing.assert_close(y, want)


def test_the_paired_speed_is_a_median_over_rounds():
    samples = {suite.BASELINE: [4.0, 2.0, 9.0], suite.OURS: [2.0, 4.0, 3.0]}
    result = harness.Comparison({}, samples, calls=1, threads=1, device="")
    assert suite._paired(result, suite.BASELINE) == 2.0
    assert suite._paired(result, suite.OURS) == 1.0


def test_the_difference_is_that_of_the_worst_output():
    x, y = torch.full((4,), 2.0), torch.tensor([3.0, 4.0])
    assert suite._difference((x, y), (x, y)) == 0
    assert suite._difference((2 * x, y), (x, y)) == 1
    assert suite._difference((x, y + torch.tensor([0.0, 1.0])), (x, y)) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        suite._difference((x, y), x)


def test_a_noisy_measurement_is_taken_again(monkeypatch):
    taken = []

    def compare(*args, real=harness.compare, **kwargs):
        found = real(*args, **kwargs)
        gauge = found.timings[harness.GAUGE]
        ratio, median = ((1.1, 1.5), (1.01, 1.0))[len(taken)]
        found.timings[harness.GAUGE] = replace(gauge, ratio=ratio, median_ratio=median)
        taken.append(ratio)
        return found

    monkeypatch.setattr(suite, "compare", compare)
    assert suite.measure(case(), [], CPU, TOP, rounds=1).noise == pytest.approx(0.01)
    assert taken == [1.1, 1.01]
    taken.clear()
    noisy = suite.measure(case(), [], CPU, TOP, rounds=1, again=False)
    assert noisy.noise == pytest.approx(0.5)


def test_layers_cover_every_norm_of_torch():
    """Each in both layouts, where torch has two, and as a small call."""
    found = REAL_LAYERS("cpu")
    for kind, layouts in {
        "BatchNorm1d": ("contiguous",),
        "BatchNorm2d": ("contiguous", "channels_last"),
        "BatchNorm3d": ("contiguous", "channels_last_3d"),
        "GroupNorm": ("contiguous", "channels_last"),
        "InstanceNorm1d": ("contiguous",),
        "InstanceNorm2d": ("contiguous", "channels_last"),
        "InstanceNorm3d": ("contiguous", "channels_last_3d"),
        "LayerNorm": ("contiguous",),
        "RMSNorm": ("contiguous",),
    }.items():
        plain = [layer for layer in found if layer.operation == kind]
        assert {layer.layout for layer in plain} == set(layouts)
        assert any(layer.name == "small call" for layer in plain)
    kinds = {layer.kind for layer in found}
    assert kinds >= {"AddLayerNorm", "AddRMSNorm", "LinearBatchNorm", "Conv2dBatchNorm"}
    assert {layer.kind for layer in REAL_LAYERS("cuda")} == kinds
    assert len({str(layer) for layer in found}) == len(found)


def test_ceilings_are_this_machines(monkeypatch):
    monkeypatch.setattr(ceilings, "SIZES", (1 << 16, 1 << 20))
    monkeypatch.setattr(ceilings, "ORDER", {"cpu": 64})
    monkeypatch.setattr(ceilings, "MIB", 1 << 14)  # 64 of them are the largest
    found = REAL_MEASURE(CPU, True)
    assert set(found.copy) == {1 << 17, 1 << 21}
    assert found.memory == found.copy[1 << 21] > 1e6
    assert all(rate > 1e6 for rate in found.products.values())


def test_ceilings_count_what_is_read_and_written(monkeypatch):
    """And the products and sums of a square product, over the time of a call."""
    monkeypatch.setattr(ceilings, "SIZES", (1 << 10,))
    monkeypatch.setattr(ceilings, "ORDER", {"cpu": 16})
    monkeypatch.setattr(ceilings, "MIB", 1 << 6)  # 64 of them are the largest
    monkeypatch.setattr(ceilings, "best_seconds", lambda call, device: 0.5)
    found = REAL_MEASURE(CPU, True)
    assert found.copy == {1 << 11: 1 << 12, 1 << 13: 1 << 14}
    assert found.products == {"float32": 4 * 16**3, "bfloat16": 4 * 16**3}


@pytest.mark.parametrize(("seconds", "timed"), [(0.125, 8), (0.5, 5)])
def test_a_call_is_timed_as_long_as_its_budget_lasts(monkeypatch, seconds, timed):
    """Five times at least, and once before."""
    now, done = 0.0, 0

    def call():
        nonlocal now, done
        done += 1
        now += seconds if done != 3 else seconds / 2

    monkeypatch.setattr(ceilings, "time", SimpleNamespace(perf_counter=lambda: now))
    assert ceilings.best_seconds(call, CPU, budget=1.0 - seconds / 2) == seconds / 2
    assert done == 1 + timed


@pytest.mark.parametrize(("said", "size"), [("1024K\n", 1 << 20), ("?\n", 32 << 20)])
def test_the_cache_is_what_the_system_says(monkeypatch, said, size):
    monkeypatch.setattr(ceilings, "open", lambda path: io.StringIO(said), raising=False)
    assert ceilings.cache_bytes(CPU) == size


def test_peak_memory_is_the_most_that_is_held_at_a_time():
    def work():
        first = torch.ones(1 << 18)
        del first
        second, third = torch.ones(1 << 18), torch.ones(1 << 16)
        del second, third
        return torch.ones(1)

    found = peak_memory(work, CPU)
    if found is None:
        pytest.skip("this torch counts no memory on a CPU")
    assert 5 << 18 <= found < (5 << 18) + 4096


def test_memory_speed_is_of_a_copy_beyond_the_cache():
    copy = {1 << 10: 9e9, 1 << 20: 3e9, 1 << 30: 2e9}
    assert ceilings.Ceilings(copy, {}, cache=1 << 18).memory == 3e9
    assert ceilings.Ceilings(copy, {}, cache=1 << 28).memory == 2e9
    assert ceilings.Ceilings(copy, {}, cache=1 << 30).memory == 2e9


def test_geometric_mean():
    assert geometric([1, 4]) == pytest.approx(2)
    assert math.isnan(geometric([]))
