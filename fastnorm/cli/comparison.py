"""What `fastnorm train` says of its two runs: a table, a picture of the losses, JSON and HTML."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from fastnorm.cli import report
from fastnorm.cli.environment import describe, versions
from fastnorm.cli.training import Run

Runs = tuple[Run, Run]  # with torch.nn's layers, with fastnorm's


def table(title: str, runs: Runs) -> report.Table:
    """The table at the end: a column for each run, and fastnorm's against torch's."""
    last = [run.epochs[-1] for run in runs]
    steps = len(runs[0].losses)
    largest, step = largest_difference(runs)
    rows = [
        _differ("test accuracy", [100 * epoch.test_accuracy for epoch in last], ".2f", " %"),
        _differ("test loss", [epoch.test_loss for epoch in last], ".4f"),
        _differ("training loss, last epoch", [epoch.train_loss for epoch in last], ".4f"),
        (
            *("largest loss difference", "", ""),
            f"{largest:.1e} (step {step} of {steps})" if largest else "0 at every step",
        ),
        _relate("time per step, median", [1e3 * run.median_seconds for run in runs], ".2f", " ms"),
        _relate("time per step, best", [1e3 * min(run.seconds) for run in runs], ".2f", " ms"),
        _relate("samples/s", [run.samples_per_second for run in runs], ",.0f"),
    ]
    memory = [run.peak_memory / 2**20 for run in runs if run.peak_memory is not None]
    if len(memory) == len(runs):
        rows.append(_relate("peak memory of a step", memory, ".2f", " MiB"))
    note = (
        f"Steps: {steps}, each of {runs[0].plan.batch_size} images, the two runs in turns. Memory: "
        "the most that torch holds in one forward and backward, beyond weights, optimizer and data."
    )
    columns = ("", "torch.nn", "fastnorm", "fastnorm to torch.nn")
    return report.Table(title, columns, rows, note)


def loss_curves(runs: Runs) -> bytes:
    """A PNG: both losses by step, and below it what lies between them."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    steps = range(1, len(runs[0].losses) + 1)
    upper.plot(steps, runs[0].losses, color="#9ecae1", linewidth=4, label="torch.nn")
    upper.plot(steps, runs[1].losses, color="#08306b", linewidth=1, label="fastnorm")
    upper.set(ylabel="training loss", yscale="log")
    upper.legend(frameon=False)
    lower.plot(steps, _differences(runs), color="#cb181d", linewidth=1)
    lower.set(xlabel="step", ylabel="difference of the losses")
    for axes in (upper, lower):
        axes.grid(color="#e5e5e5")
        axes.spines[["top", "right"]].set_visible(False)
    return report.png(figure)


def write(
    folder: Path, asked: Mapping[str, object], backend: str, runs: Runs, shown: report.Table
) -> None:
    """Writes `result.json`, `loss.png` and `report.html`, with the arguments and the machine."""
    machine = {**describe(runs[0].plan.device), "backend": backend}
    packages = versions()
    curves = loss_curves(runs)
    largest, step = largest_difference(runs)
    result = {
        "command": "train",
        "arguments": asked,
        "machine": machine,
        "versions": packages,
        **{run.name: _result(run) for run in runs},
        "loss_difference": {
            "first_step": _differences(runs)[0],
            "largest": largest,
            "largest_at_step": step,
        },
    }
    setting = [(name, str(value)) for name, value in machine.items()]
    setting += [(name, version or "not installed") for name, version in packages.items()]
    parts = (
        shown.in_html(),
        report.picture("Training loss by step", curves),
        report.Table("Machine and versions", ("", ""), setting).in_html(),
    )
    lead = ", ".join(f"{name} {value}" for name, value in asked.items())
    report.write_json(folder / "result.json", result)
    (folder / "loss.png").write_bytes(curves)
    (folder / "report.html").write_text(report.page("fastnorm train", lead, parts), "utf-8")


def largest_difference(runs: Runs) -> tuple[float, int]:
    """(the largest |loss - loss| of the two runs at one step, that step counted from 1)."""
    differences = _differences(runs)
    # NaN, of a run that diverged, counts as the largest: it is unequal to itself.
    step = max(
        range(len(differences)), key=lambda i: (differences[i] != differences[i], differences[i])
    )
    return differences[step], step + 1


def _differences(runs: Runs) -> list[float]:
    return [abs(one - other) for one, other in zip(runs[0].losses, runs[1].losses, strict=True)]


def _differ(name: str, values: list[float], form: str, unit: str = "") -> tuple[str, ...]:
    """A row that ends with fastnorm's value minus torch's."""
    one, other = values
    return (name, *(format(value, form) + unit for value in values), f"{other - one:+{form}}{unit}")


def _relate(name: str, values: list[float], form: str, unit: str = "") -> tuple[str, ...]:
    """A row that ends with fastnorm's value over torch's."""
    one, other = values
    return (name, *(format(value, form) + unit for value in values), f"{other / one:.2f}x")


def _result(run: Run) -> dict[str, object]:
    """What `result.json` says of one run."""
    return {
        **asdict(run.epochs[-1]),
        "step_seconds_median": run.median_seconds,
        "step_seconds_best": min(run.seconds),
        "samples_per_second": run.samples_per_second,
        "peak_memory_bytes": run.peak_memory,
        "epochs": [asdict(epoch) for epoch in run.epochs],
        "steps": {"loss": run.losses, "seconds": run.seconds},
    }
