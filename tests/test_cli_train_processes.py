"""`fastnorm train` under torchrun: processes share each batch, the first prints and writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastnorm.cli import main, training
from fastnorm.cli.data import digits
from fastnorm.cli.models import MODELS
from fastnorm.cli.training import Plan, batches, start

ROOT = Path(__file__).parents[1]


def torchrun(folder, *options):
    """(status, stdout, stderr) of `torchrun --nproc-per-node 2 -m fastnorm train`."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "fastnorm", "train", "--device", "cpu", *options, "--out", str(folder),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """With --sync-bn the losses are those of one process with the whole batch."""
    options = ("--epochs", "1", "--batch-size", "65")  # parts of 33 and 32
    status, out, err = torchrun(tmp_path / "two", *options, "--sync-bn")
    assert status == 0, err
    assert out.count("results in") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two"]
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert two["arguments"]["sync_bn"] is True
    assert two["arguments"]["processes"] == 2
    assert main(["train", *options, "--device", "cpu", "--out", str(tmp_path / "one")]) == 0
    one = json.loads((tmp_path / "one" / "result.json").read_text())
    steps = 1437 // 65
    ours, alone = (result["fastnorm"]["steps"]["loss"] for result in (two, one))
    assert len(ours) == len(alone) == steps
    differences = [abs(a - b) for a, b in zip(ours, alone, strict=True)]
    assert differences[0] < 1e-5
    assert max(differences) < 1e-2
    theirs = two["torch"]["steps"]["loss"]  # its statistics are of the parts
    apart = [abs(a - b) for a, b in zip(theirs, one["torch"]["steps"]["loss"], strict=True)]
    assert apart[0] > 100 * differences[0]


@pytest.mark.slow
def test_errors_are_said_once(tmp_path):
    status, out, err = torchrun(tmp_path / "two", "--sync-bn", "--batch-size", "3")
    assert status != 0
    assert out == ""
    assert err.count("argument --batch-size: invalid value '3' (allowed: a whole number, 4") == 1
    assert not list(tmp_path.iterdir())


def test_sync_bn_needs_processes(capsys):
    assert main(["train", "--sync-bn"]) == 2
    assert "argument --sync-bn: there is only one process" in capsys.readouterr().err


def test_one_process_trains_on_whole_batches():
    plan = Plan(MODELS["mlp"], digits(), 1, 64, 0.05, 0, torch.float32)
    _, run = start(plan)
    images, labels = next(batches(plan, torch.Generator()))
    assert torch.equal(training.ALONE.part(images), images)
    assert run.gradients(images, labels) == run.loss(images, labels)[0]
    assert training.ALONE.mean(0.1) == 0.1
