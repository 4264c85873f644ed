"""`fastnorm train` from the command line: what it writes, what it says, and how it ends."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fastnorm
from fastnorm.cli import comparison, main, train, training
from fastnorm.cli.comparison import largest_difference
from fastnorm.cli.data import digits
from fastnorm.cli.measure import peak_memory
from fastnorm.cli.models import MODELS
from fastnorm.cli.output import default_folder, results_folder
from fastnorm.cli.progress import progress
from fastnorm.cli.training import Plan, Run, batches, start


class Noon(datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 2, 12)


TORCH_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)
OUR_NORMS = (fastnorm.BatchNorm1d, fastnorm.BatchNorm2d)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Small networks gain nothing from a second thread, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(
    scope="module",
    params=[pytest.param(m, marks=pytest.mark.xdist_group(f"train {m}")) for m in sorted(MODELS)],
)
def finished(request, tmp_path_factory):
    """A short run of each model: (its folder, what it printed)."""
    folder = tmp_path_factory.mktemp("train") / request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        patch.setattr(sys, "stderr", io.StringIO())
        options = ["--model", request.param, "--epochs", "2", "--device", "cpu", "--seed", "3"]
        assert main(["train", *options, "--out", str(folder)]) == 0
        return folder, sys.stdout.getvalue(), sys.stderr.getvalue()


def plan(model="mlp", **changes):
    """A small training on the CPU."""
    settings = {"epochs": 1, "batch_size": 64, "lr": 0.05, "seed": 0, "dtype": torch.float32}
    return Plan(MODELS[model], digits(), **(settings | changes))


def refused(capsys, *options):
    """The only line that a command with bad arguments prints."""
    assert main(["train", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


# What a finished run leaves.


def test_json_holds_both_runs(finished):
    folder, _, _ = finished
    result = json.loads((folder / "result.json").read_text())
    steps = 2 * (1437 // 64)
    for name in ("torch", "fastnorm"):
        run = result[name]
        assert [len(run["steps"][key]) for key in ("loss", "seconds")] == [steps, steps]
        assert len(run["epochs"]) == 2
        assert run["test_accuracy"] == run["epochs"][-1]["test_accuracy"]
        assert run["epochs"][1]["train_loss"] < run["epochs"][0]["train_loss"]
        assert 0.3 < run["test_accuracy"] <= 1
        assert run["test_accuracy"] * 360 == pytest.approx(round(run["test_accuracy"] * 360))
        assert run["step_seconds_best"] == min(run["steps"]["seconds"])
        assert run["step_seconds_best"] <= run["step_seconds_median"]
        assert run["samples_per_second"] == pytest.approx(64 / run["step_seconds_median"])
        assert run["peak_memory_bytes"] > 64 * 64 * 4
    assert result["arguments"]["model"] == folder.name
    assert result["arguments"]["seed"] == 3
    assert result["arguments"]["lr"] == MODELS[folder.name].lr
    assert result["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert result["machine"]["device"] == "cpu"
    assert result["machine"]["backend"] == fastnorm.backend_for(torch.ones(2, 2))


def test_both_runs_see_the_same_losses(finished):
    folder, _, _ = finished
    result = json.loads((folder / "result.json").read_text())
    one, other = (result[name]["steps"]["loss"] for name in ("torch", "fastnorm"))
    differences = [abs(a - b) for a, b in zip(one, other, strict=True)]
    assert differences[0] < 1e-5
    assert max(differences) < 0.05
    assert result["loss_difference"]["first_step"] == differences[0]
    assert result["loss_difference"]["largest"] == max(differences)


def test_report_needs_no_other_file(finished):
    folder, _, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == [
        "loss.png",
        "report.html",
        "result.json",
    ]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'src="([^"]{15})', page) == ["data:image/png;"]
    text = re.sub(r'"data:image/png;base64,[^"]*"', "", page)  # in which any word may occur
    assert not re.search(r"https?:|href|<script|@import|url\(", text)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    version = torch.__version__.split("+")[0]  # a package need not say for which device it is
    for text in ("test accuracy", "time per step", "peak memory", version):
        assert text in page


def test_table_and_plain_lines(finished):
    folder, out, err = finished
    result = json.loads((folder / "result.json").read_text())
    for name in ("test accuracy", "test loss", "time per step", "samples/s", "peak memory"):
        assert name in out
    assert "largest loss difference" in out
    assert f"{result['fastnorm']['test_accuracy']:.2%}".replace("%", " %") in out
    assert str(folder) in out.replace("\n", "")
    lines = err.splitlines()
    assert len(lines) == 10
    assert re.match(rf"{folder.name} 100%  44/44 .* loss torch \d[.\d]*, fastnorm \d", lines[-1])
    assert "\x1b" not in out + err
    assert "\r" not in out + err


def test_a_run_that_diverges_is_reported(tmp_path, capsys):
    options = ["--model", "mlp", "--lr", "1e30", "--epochs", "1", "--batch-size", "700"]
    assert main(["train", *options, "--out", str(tmp_path / "x")]) == 0
    assert "nan" in capsys.readouterr().out
    text = (tmp_path / "x" / "result.json").read_text()
    result = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert result["fastnorm"]["test_loss"] is None
    assert result["loss_difference"]["largest"] is None


def test_options_are_heeded(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "loss_curves", lambda runs: b"")  # a second each

    def losses(*options):
        folder = default_folder(str(tmp_path / "run"))
        options = ("--model", "mlp", "--epochs", "1", "--batch-size", "400", *options)
        assert main(["train", *options, "--out", str(folder)]) == 0
        return json.loads((folder / "result.json").read_text())["fastnorm"]["steps"]["loss"]

    base = losses()
    assert len(base) == 3
    assert losses() == base
    assert losses("--lr", "0.01")[0] == base[0]
    assert losses("--lr", "0.01")[1:] != base[1:]
    assert losses("--seed", "1")[0] != base[0]
    assert losses("--dtype", "bfloat16")[0] != base[0]
    assert losses("--dtype", "bfloat16")[0] == pytest.approx(base[0], rel=0.05)
    assert losses("--device", "cpu") == base
    assert len(losses("--batch-size", "1437")) == 1
    assert len(losses("--epochs", "2")) == 6


@pytest.mark.parametrize(
    "options",
    [
        [],
        *(
            pytest.param([*model, "--seed", seed], marks=pytest.mark.slow)
            for model in ([], ["--model", "resnet"])
            for seed in ("0", "1", "2")
        ),
    ],
    ids=lambda options: " ".join(options) or "none",
)
def test_defaults_reach_95_percent(options, tmp_path):
    assert main(["train", *options, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["torch"]["test_accuracy"] >= 0.95
    assert result["fastnorm"]["test_accuracy"] >= 0.95


# The two runs are the same but for the layers.


@pytest.mark.parametrize("model", sorted(MODELS))
def test_runs_differ_in_their_layers_alone(model):
    torch_run, fastnorm_run = start(plan(model))
    ours = [module for module in fastnorm_run.model.modules() if isinstance(module, TORCH_NORMS)]
    assert ours
    assert all(isinstance(module, OUR_NORMS) for module in ours)
    assert not any(isinstance(module, OUR_NORMS) for module in torch_run.model.modules())
    theirs, mine = torch_run.model.state_dict(), fastnorm_run.model.state_dict()
    assert list(theirs) == list(mine)
    assert all(torch.equal(theirs[key], mine[key]) for key in theirs)
    assert {value.data_ptr() for value in theirs.values()}.isdisjoint(
        value.data_ptr() for value in mine.values()
    )


@pytest.mark.parametrize("model", sorted(MODELS))
def test_gradients_agree(model):
    torch_run, fastnorm_run = start(plan(model))
    images, labels = next(batches(torch_run.plan, torch.Generator().manual_seed(0)))
    for run in (torch_run, fastnorm_run):
        run.gradients(images, labels)
    pairs = zip(torch_run.model.named_parameters(), fastnorm_run.model.parameters(), strict=True)
    for (name, one), other in pairs:
        error = (one.grad - other.grad).norm() / one.grad.norm()
        assert error < 1e-4, name


def test_steps_alternate_who_goes_first(monkeypatch):
    seen = []

    def step(run, images, labels):
        seen.append((run.name, images.sum().item()))
        run.losses.append(0.0)

    monkeypatch.setattr(Run, "step", step)
    monkeypatch.setattr(Run, "finish_epoch", lambda run: None)
    monkeypatch.setattr(training, "peak_memory", lambda work, device: None)
    small = plan(batch_size=400, epochs=2)
    with progress("", 6, Console(file=io.StringIO())) as shown:
        training.train(small, start(small), shown)
    first, second = seen[::2], seen[1::2]
    assert [name for name, _ in first] == ["torch", "fastnorm"] * 3
    assert [name for name, _ in second] == ["fastnorm", "torch"] * 3
    assert [batch for _, batch in first] == [batch for _, batch in second]
    assert len({batch for _, batch in first}) == 6


def test_the_test_set_teaches_nothing():
    for run in start(plan()):
        run.losses.append(2.0)
        before = {key: value.clone() for key, value in run.model.state_dict().items()}
        run.finish_epoch()
        after = run.model.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert run.model.training
        scores = run.model.eval()(run.plan.images.test_images)
        right = (scores.argmax(1) == run.plan.images.test_labels).sum().item()
        assert run.epochs[0].test_accuracy == pytest.approx(right / 360)
        assert run.epochs[0].train_loss == 2.0


def test_an_epoch_shows_each_image_once():
    small = plan(batch_size=479)  # 3 * 479 = 1437
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.cat([images for images, _ in batches(small, generator)]) for _ in range(2))
    assert not torch.equal(one, other)
    everything = {image.numpy().tobytes() for image in small.images.train_images}
    assert {image.numpy().tobytes() for image in one} == everything


def test_digits_are_split_by_class_and_standardized_by_the_training_set():
    images = digits()
    assert images.train_images.shape == (1437, 1, 8, 8)
    assert images.test_images.shape == (360, 1, 8, 8)
    counts = images.test_labels.bincount()
    assert counts.sum() == 360
    assert counts.min() >= 34
    assert images.train_images.mean(0).abs().max() < 1e-5
    spread = images.train_images.std(0, correction=0)
    assert spread.max() == pytest.approx(1, abs=1e-5)
    assert images.test_images.mean(0).abs().max() > 1e-3
    assert torch.equal(digits().test_images, images.test_images)


def test_peak_memory_counts_what_is_held_at_once():
    def work():
        for _ in range(3):
            torch.empty(1000).fill_(0)  # 4,000 bytes, freed each time
        return torch.empty(500), torch.empty(1500)

    assert 8000 <= peak_memory(work, torch.device("cpu")) < 8200


def test_largest_difference_finds_the_step():
    def runs(one, other):
        return tuple(Run(name, torch.nn.Linear(1, 1), plan(), losses) for name, losses in
                     (("torch", one), ("fastnorm", other)))  # fmt: skip

    assert largest_difference(runs([1.0, 2.0, 3.0], [1.0, 2.5, 2.75])) == (0.5, 2)
    largest, step = largest_difference(runs([1.0, 2.0, 3.0], [9.0, math.nan, 3.0]))
    assert math.isnan(largest)
    assert step == 2


# Bad arguments.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "vgg"], ["--model", "'vgg'", "mlp, resnet"]),
        (["--model"], ["--model", "mlp, resnet"]),
        (["--data", "cats"], ["--data", "'cats'", "digits"]),
        (["--epochs", "0"], ["--epochs", "'0'", "1 or more"]),
        (["--epochs", "-3"], ["--epochs", "1 or more"]),
        (["--epochs", "2.5"], ["--epochs", "'2.5'", "whole number"]),
        (["--batch-size", "1"], ["--batch-size", "'1'", "2 or more"]),
        (["--batch-size", "1438"], ["--batch-size", "'1438'", "2 to 1437"]),
        (["--lr", "0"], ["--lr", "'0'", "above 0"]),
        (["--lr", "inf"], ["--lr", "'inf'", "above 0"]),
        (["--lr", "fast"], ["--lr", "'fast'", "above 0"]),
        (["--seed", "-1"], ["--seed", "0 to"]),
        (["--seed", str(2**63)], ["--seed", "0 to"]),
        (["--device", "tpu"], ["--device", "'tpu'", "auto, cpu"]),
        (["--device", "cuda:99"], ["--device", "'cuda:99'", "auto, cpu"]),
        (["--dtype", "int8"], ["--dtype", "'int8'", "float32, bfloat16"]),
        (["--speed", "9"], ["--speed", "--epochs", "--out"]),
        (["--epoch", "9"], ["--epoch:", "--epochs"]),
        (["fast"], ["fast", "--epochs", "--out"]),
    ],
)
def test_bad_arguments_are_named(options, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, *options)
    assert line.startswith("fastnorm train: argument ")
    for word in words:
        assert word in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("arguments", "word"), [([], "missing"), (["trian"], "'trian'")])
def test_unknown_commands_are_named(arguments, word, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(rf"fastnorm: argument COMMAND: .*{word}.*allowed: train.*\n", err)


def test_cuda_on_a_machine_without(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "auto, cpu; no CUDA device found" in refused(capsys, "--device", "cuda")


def test_cuda_devices_are_offered_where_they_are(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "auto, cpu, cuda, cuda:0, cuda:1)" in refused(capsys, "--device", "cuda:2")
    assert train.parser().parse(["--device", "cuda:1"]).device == "cuda:1"


def test_the_out_folder_must_be_empty(tmp_path, capsys):
    (tmp_path / "mine").write_text("dear")
    assert "has files in it" in refused(capsys, "--out", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_out_folder_must_be_writable(tmp_path, capsys):
    (tmp_path / "file").write_text("dear")
    for place in ("file", "file/below"):
        line = refused(capsys, "--out", str(tmp_path / place))
        assert "--out" in line
        assert "a new or an empty folder" in line
    assert "--out" in refused(capsys, "--out", "")
    assert (tmp_path / "file").read_text() == "dear"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_without_permission(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert "Permission denied" in refused(capsys, "--out", str(tmp_path / "new"))
    assert "Permission denied" in refused(capsys, "--out", str(tmp_path))


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert 'pip install "fastnorm[cli]"' in refused(capsys, "--epochs", "1")


def test_an_impossible_backend_is_named(capsys, monkeypatch, tmp_path):
    def backend_for(tensor):
        raise RuntimeError("triton cannot\nserve cpu")

    monkeypatch.setattr(fastnorm, "backend_for", backend_for)
    line = refused(capsys, "--out", str(tmp_path / "new"))
    assert "FASTNORM_BACKEND: triton cannot serve cpu" in line
    assert list(tmp_path.iterdir()) == []


def test_help_names_each_option_and_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for option in ("--model", "--data", "--epochs", "--batch-size", "--lr", "--seed", "--device"):
        assert option in shown
    assert "20 for mlp, 10 for resnet" in shown
    assert "a new or an empty folder" in shown
    assert main(["--help"]) == 0
    assert "train" in capsys.readouterr().out


# The results folder.


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_is_filled_at_the_end(exists, tmp_path):
    folder = tmp_path / "a" / "b"
    if exists:
        folder.mkdir(parents=True)
    with results_folder(folder) as staging:
        (staging / "x").write_text("1")
        assert not (folder / "x").exists()
    assert [path.name for path in folder.iterdir()] == ["x"]
    assert [path.name for path in folder.parent.iterdir()] == ["b"]


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_folder_is_not_left_half_filled(exists, error, tmp_path):
    folder = tmp_path / "a" / "b"
    if exists:
        folder.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))

    def work():
        with results_folder(folder) as staging:
            (staging / "x").write_text("1")
            raise error

    with pytest.raises(error):
        work()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_parent_that_another_run_uses_stays(tmp_path):
    def work():
        with results_folder(tmp_path / "runs" / "one"):
            (tmp_path / "runs" / "two").mkdir()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["two"]


def test_two_runs_do_not_share_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastnorm.cli.output.datetime", Noon)
    first = default_folder("train-mlp")
    assert first == Path("runs/train-mlp-20260102-120000")
    with results_folder(first):
        assert "another run is writing" in refused(capsys, "--out", str(first))
        assert default_folder("train-mlp") == Path("runs/train-mlp-20260102-120000-2")
    assert default_folder("train-mlp") == Path("runs/train-mlp-20260102-120000-2")


# Progress, and how a run ends early.


def test_a_terminal_gets_a_bar():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=60, _environ={"TERM": "xterm"})
    with progress("mlp", 3, console) as shown:
        for step in range(3):
            shown.advance(f"note {step}, " + 40 * "x")
    assert "\x1b[" in screen.getvalue()
    assert "3/3" in screen.getvalue()
    assert "note 2" in screen.getvalue()


@pytest.mark.parametrize(("total", "lines"), [(1, 1), (7, 7), (10, 10), (995, 10)])
def test_elsewhere_a_line_at_each_tenth(total, lines):
    screen = io.StringIO()
    with progress("mlp", total, Console(file=screen)) as shown:
        for step in range(total):
            shown.advance(f"note {step + 1}")
    written = screen.getvalue().splitlines()
    assert len(written) == lines
    assert written[-1].startswith(f"mlp 100%  {total}/{total} ")
    assert written[-1].endswith(f"note {total}")


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 128 + signal.SIGTERM),
        (signal.SIGHUP, 128 + signal.SIGHUP),
    ],
)
def test_a_signal_leaves_nothing(number, status, tmp_path, monkeypatch, capsys):
    """In this process: the signal arrives between two steps."""
    monkeypatch.chdir(tmp_path)
    finish = Run.finish_epoch

    def interrupted(run):
        finish(run)
        assert list(Path("runs").iterdir())  # staging is there, and must go
        signal.raise_signal(number)

    monkeypatch.setattr(Run, "finish_epoch", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        ended = main(["train", "--model", "mlp", "--batch-size", "400"])
    except SystemExit as exit:
        ended = exit.code
    finally:
        assert signal.signal(signal.SIGHUP, hangup) is signal.SIG_DFL
    assert ended == status
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_in_a_process_of_its_own(tmp_path):
    arguments = "-m fastnorm train --model mlp --epochs 100000"
    process = subprocess.Popen(
        [sys.executable, *arguments.split()],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "runs").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert out == ""
    assert err == "fastnorm train: interrupted, nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_a_string_is_run(tmp_path):
    """As in the making of a dataclass, which an import does at any time."""
    (tmp_path / "interrupted.py").write_text(
        "import sys\n"
        "from fastnorm import cli\n"
        "wait = 'import signal, time; signal.raise_signal(signal.SIGINT); time.sleep(9)'\n"
        "cli._dispatch = lambda arguments: exec(wait)\n"
        "sys.exit(cli.main(['doctor']))\n"
    )
    command = [sys.executable, "-m", "interrupted"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == "fastnorm doctor: interrupted, nothing was written\n"


def test_the_library_does_not_import_the_extra():
    code = (
        "import sys, fastnorm, fastnorm.cli\n"
        "print({'rich', 'matplotlib', 'sklearn'} & {name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
