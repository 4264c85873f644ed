"""`fastnorm study`: what each study leaves, says and computes."""

import io
import json
import math
import re
import sys
from itertools import islice

import pytest
import torch
from torch import nn

from fastnorm.cli import main, study
from fastnorm.cli.progress import progress
from fastnorm.cli.studies import STUDIES, batch_size, init, normalization, residual, train_eval
from fastnorm.cli.studies.outcome import Settings, deviation, geometric, listed, mean, spread
from fastnorm.cli.studies.training import NORMS, accuracy, batches, convnet, train

# Those that train for tens of seconds where cores are shared are slow.
QUICK = [
    pytest.param(
        name,
        marks=[
            pytest.mark.xdist_group(f"study {name}"),
            *([pytest.mark.slow] if name in ("normalization", "batch-size") else []),
        ],
    )
    for name in STUDIES
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def settings():
    return Settings(quick=True, seeds=2)


@pytest.fixture(scope="module", params=QUICK)
def finished(request, tmp_path_factory):
    """A quick run of each study: (its name, folder, what it printed)."""
    folder = tmp_path_factory.mktemp("study") / request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        patch.setattr(sys, "stderr", io.StringIO())
        assert main(["study", request.param, "--quick", "--out", str(folder)]) == 0
        return request.param, folder, sys.stdout.getvalue(), sys.stderr.getvalue()


def refused(capsys, *options):
    """The only line that a command with bad arguments prints."""
    assert main(["study", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


# What a finished study leaves.


def test_files_and_what_they_hold(finished):
    name, folder, out, err = finished
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [f"{name}.png", "report.html", "result.json"]
    )
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n")
    text = (folder / "result.json").read_text()
    result = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert result["arguments"] == {"study": name, "seeds": 2, "quick": True}
    assert result["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert result["machine"]["threads"] == 1
    assert all(len(seeds) == 2 for seeds in result["results"].values())
    page = (folder / "report.html").read_text("utf-8")
    assert re.findall(r'src="([^"]{15})', page) == ["data:image/png;"]
    prose = re.sub(r'"data:image/png;base64,[^"]*"', "", page)
    assert not re.search(r"https?:|href|<script|@import|url\(", prose)
    shown = " ".join(out.split())
    assert result["seen"]
    for sentence in result["seen"]:
        assert " ".join(sentence.split()) in shown
        assert sentence.split(",")[0].replace("'", "&#x27;") in page
    assert "±" in out
    assert str(folder) in out.replace("\n", "")
    assert re.search(rf"^{name} 100%", err.splitlines()[-1])
    assert len(err.splitlines()) <= 10


def test_seeds_are_heeded_and_decide(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(residual, "QUICK_STEPS", 3)
    monkeypatch.setattr(residual, "QUICK_BLOCKS", (1, 2))

    def results(seeds):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        assert main(["study", "residual", "--quick", "--seeds", seeds, "--out", str(folder)]) == 0
        return json.loads((folder / "result.json").read_text())["results"]

    two = results("2")
    assert results("1") == {key: values[:1] for key, values in two.items()}
    assert all(one != other for one, other in two.values())


def test_every_study_counts_its_steps():
    for name in STUDIES:
        module = study._module(name)
        quick, default = (module.steps(Settings(q, 3)) for q in (True, False))
        assert 0 < quick <= default
        assert module.steps(Settings(True, 6)) == 2 * quick


# Arguments.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["STUDY: missing", "init, normalization, batch-size, residual, train-eval"]),
        (["dropout"], ["STUDY", "'dropout'", "init, normalization"]),
        (["init", "--seeds", "0"], ["--seeds", "'0'", "1 to 100"]),
        (["init", "--fast"], ["--fast", "--quick"]),
        (["init", "residual"], ["residual", "unknown"]),
        (["init", "--out"], ["--out", "a new or an empty folder"]),
    ],
)
def test_bad_arguments_are_named(options, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, *options)
    assert line.startswith("fastnorm study: argument ")
    for word in words:
        assert word in line
    assert list(tmp_path.iterdir()) == []


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["study", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for word in (*STUDIES, "--quick", "--seeds", "--out", "3, 2 with --quick"):
        assert word in shown


def test_an_interrupted_study_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(settings, shown):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(residual, "run", interrupted)
    torch.set_num_threads(2)
    assert main(["study", "residual"]) == 130
    assert list(tmp_path.iterdir()) == []
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


# The pieces.


def test_batches_are_shuffled_epochs(settings):
    images = settings.images
    one, same, other = (
        list(islice(batches(images, 479, seed), 6))
        for seed in (0, 0, 1)  # 3 · 479 = 1437
    )
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0][0], other[0][0])
    for epoch in (one[:3], one[3:]):
        assert sum(labels.sum() for _, labels in epoch) == images.train_labels.sum()


def test_training_ends_where_the_loss_does(settings):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    data = batches(settings.images, 64, 0)
    losses = list(train(model, data, 0.1, 20))
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    losses = list(train(model, data, 1e38, 20))
    assert len(losses) < 20
    assert not math.isfinite(losses[-1])


@pytest.mark.parametrize("norm", NORMS)
def test_the_test_set_teaches_nothing(norm, settings):
    torch.manual_seed(0)
    model = convnet(NORMS[norm], settings.images)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for training in (False, True):
        assert 0 <= accuracy(model, settings.images, training) <= 1
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    norms = [module for module in model if not isinstance(module, nn.Conv2d | nn.Linear | nn.ReLU)]
    assert isinstance(norms[0], type(NORMS[norm](16)))


@pytest.mark.parametrize("norm", sorted(set(NORMS) - {"none"}))
def test_norms_are_ours_and_compute_what_torch_s_do(norm):
    ours = NORMS[norm](4)
    theirs = {
        "batch": nn.BatchNorm2d(4),
        "layer": nn.GroupNorm(1, 4),
        "group": nn.GroupNorm(4, 4),
        "instance": nn.InstanceNorm2d(4, affine=True),
    }[norm]
    assert type(ours).__module__.startswith("fastnorm.")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(8, 4, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x))


def test_means_over_seeds():
    assert spread([0.5, 0.7], scale=100) == "60.0 ± 14.1"
    assert spread([0.5, math.nan], ".2f") == "0.50 ± 0.00 (1 of 2)"
    assert spread([math.nan]) == "–"
    assert mean([1.0, 2.0, math.inf]) == 1.5
    assert deviation([1.0, 3.0]) == pytest.approx(math.sqrt(2))
    assert geometric([1e-40, 1e40]) == pytest.approx(1)
    assert geometric([0.0, 1.0]) == 0
    assert [listed(words) for words in ([], ["a"], ["a", "b", "c"])] == ["none", "a", "a, b and c"]


def test_smoothness_is_the_curvature(settings):
    """Of a loss with one known second derivative, along every direction; weights are put back."""

    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([3.0, -4.0]))

        def forward(self, x):
            return self.weight

    model = Quadratic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            normalization, "loss_of", lambda model, *batch: 3.5 * model(None).square().sum()
        )
        width, slope = next(normalization._probes(model, iter([(None, None)])))
    assert slope == pytest.approx(7, rel=1e-5)
    # the loss 87.5·(1 − 7·0.1·d)² at the distances d, from 87.5
    values = [87.5 * (1 - 0.7 * d) ** 2 for d in (0, *normalization.DISTANCES)]
    assert width == pytest.approx(max(values) - min(values), rel=1e-5)
    assert model.weight.tolist() == [3, -4]


def test_a_run_is_stable_where_it_learns():
    run = normalization.Run
    assert run([2.0] * 20).stable
    assert not run([2.0] * 20 + [math.nan]).stable
    assert not run([1.0] * 20 + [3.0] * 10).stable


def test_branches_start_as_their_kind_says(settings):
    x = torch.randn(5, residual.WIDTH)
    torch.manual_seed(0)
    models = {kind: residual.build(settings, kind, 8) for kind in residual.KINDS}
    assert torch.equal(models["branch 0 at first"][2](x), x)
    for kind, shortcut in (("skip", 1.0), ("skip × 0.5", 0.5), ("no skip", 0.0)):
        block = models[kind][2]
        branch = block.last(block.first(x).relu())
        want = branch + shortcut * x if shortcut else branch.relu()
        assert torch.equal(block(x), want)
    scaled, plain = (models[k][2].last.weight.std() for k in ("branch / √(2·blocks)", "skip"))
    assert (scaled / plain).item() == pytest.approx(0.25, rel=0.1)


# Sentences follow the numbers.


def seen(forward, gradient, problems=()):
    one = init.Seen.__new__(init.Seen)
    one.forward = [forward**k for k in range(init.DEPTH)]
    one.gradient = [gradient**k for k in range(init.DEPTH, 0, -1)]
    one.problems = list(problems)
    return [one]


def test_what_was_seen_of_init():
    found = {("tanh", scheme): seen(1.0, 1.0) for scheme in init.SCHEMES}
    found["tanh", "He"] = seen(0.9, 0.8)
    found["tanh", "zero"] = seen(1.0, 1.0, ["identical units"])
    sentence = init._sentence("tanh", found)
    kept, lost = sentence.split("These did not")
    assert "Xavier" in kept
    assert "zero (identical units)" in lost
    assert f"He (signal times {0.9**99:.0e}, gradient times {0.8**99:.0e})" in lost


def test_the_picture_names_what_it_cannot_show(monkeypatch):
    """Zero has no logarithm, and some curves are below the axis at every layer."""
    schemes = [(activation, scheme) for activation in init.ACTIVATIONS for scheme in init.SCHEMES]
    found = {key: seen(1.0, 1.0) for key in schemes}
    found["tanh", "zero"][0].forward = found["tanh", "zero"][0].gradient = [0.0] * init.DEPTH
    found["tanh", "constant"][0].gradient = [1e-18] * init.DEPTH
    found["relu", "too large"] = seen(10.0, 10.0)  # leaves the picture, but begins in it
    found["relu", "He"][0].forward = [math.nan] * init.DEPTH
    drawn = []
    monkeypatch.setattr(init, "png", lambda figure: drawn.append(figure) or b"")
    init._plot(found)
    words = [[text.get_text() for text in panel.texts] for panel in drawn[0].axes]
    assert words == [
        ["zero: 0 at every layer, not drawn"],
        ["He: outside of the picture, or not finite, at every layer"],
        ["zero: 0 at every layer, not drawn\nconstant: below 1e-12 at every layer, not drawn"],
        [""],
    ]
    for panel in drawn[0].axes:
        assert panel.get_ylim() == init.SHOWN


def test_what_was_seen_of_normalization():
    def runs(reached, slope, stable=True):
        losses = [2.0 if stable else 9.0] * 20
        return [normalization.Run(losses, reached, [0.1], [slope])] * 2

    found = {}
    for index, norm in enumerate(NORMS):
        found[norm, 0.1] = runs(50.0 + index, 1.0 + index)
        found[norm, 1.0] = runs(math.nan, 9.0, stable=norm == "group")
    first, second = normalization._sentences(found)
    assert first.startswith("Highest stable learning rate: group 1, none 0.1")
    assert "Fewest steps to 90 %: none, 50 ± 0 at rate 0.1" in first
    assert "from slowest to fastest: none 1, batch 2" in second
    found["none", 0.1] = runs(math.nan, 30.0)
    first, second = normalization._sentences(found)
    assert "Fewest steps to 90 %: batch, 51 ± 0" in first
    assert second.endswith("none 30.")


def test_what_was_seen_of_batches():
    found = {("batch", 2): [(0.5, 0.6)], ("batch", 8): [(0.9, 0.9)]}
    assert batch_size._sentence(found, "batch", (2, 8)) == (
        "Batch norm: best at batches of 8 with 90.0 %; at 2 it reached 50.0 %, 40.0 points less."
    )


def test_what_was_seen_of_residuals():
    found = {
        (kind, depth): [residual.Seen(0.5 + index / 10 * (depth > 2), 1.0 + index, 1.0)]
        for index, kind in enumerate(residual.KINDS)
        for depth in (2, 8)
    }
    first, second = residual._sentences(found, (2, 8))
    assert "best is branch 0 at first, 90.0 % against 50.0 % with 2" in first
    assert "largest with branch 0 at first, 5.0e+00" in second


def test_what_was_seen_of_running_averages():
    def one(running, batch):
        result = train_eval.Seen.__new__(train_eval.Seen)
        result.__dict__.update(running=running, batch=batch, alone_eval=0.9, alone_batch=0.2)
        return [result]

    found = {(0.001, 4): one(0.3, 0.8), (None, 64): one(0.9, 0.85)}
    first, second = train_eval._sentences(found)
    assert "cost most with momentum 0.001 and batches of 4: 50.0 points" in first
    assert "least with momentum 1/n and batches of 64: -5.0 points" in first
    assert "90.0 % by running averages, 20.0 % by the image's own" in second


def test_a_small_momentum_leaves_the_averages_behind(settings):
    """A real training of both kinds: the gap that the study reports is that of the buffers."""
    results = [train_eval._train(settings, momentum, 16, 0) for momentum in (0.001, 0.1)]
    assert results[0].mean_gap > 2 * results[1].mean_gap
    assert results[0].running < results[0].batch
    assert results[1].alone_eval > results[1].alone_batch


def test_progress_is_one_for_each_run(settings, monkeypatch):
    monkeypatch.setattr(residual, "QUICK_STEPS", 1)
    monkeypatch.setattr(residual, "QUICK_BLOCKS", (1, 2))
    screen = io.StringIO()
    from rich.console import Console

    with progress("residual", residual.steps(settings), Console(file=screen)) as shown:
        residual.run(settings, shown)
    assert f"{residual.steps(settings)}/{residual.steps(settings)}" in screen.getvalue()
