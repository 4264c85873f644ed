"""Running averages against batch statistics, one sample at a time, by momentum and batch."""

import math

import torch
from torch import nn

from fastnorm import signals
from fastnorm.cli.data import Images
from fastnorm.cli.progress import Progress
from fastnorm.cli.report import Table, png
from fastnorm.cli.studies.outcome import COLOURS, Outcome, Settings, figure, line, mean, spread
from fastnorm.cli.studies.training import NORMS, accuracy, batches, convnet, train

MOMENTA: tuple[float | None, ...] = (0.001, 0.01, 0.1, 0.5, None)
QUICK_MOMENTA: tuple[float | None, ...] = (0.001, 0.1)
SIZES, QUICK_SIZES = (4, 16, 64), (16,)
STEPS, QUICK_STEPS, RATE = 200, 60, 0.1
ALONE = 60
"""Test images that are shown one at a time."""


class Seen:
    """One training: test accuracies, and how far the running averages are off."""

    def __init__(self, model: nn.Module, images: Images) -> None:
        self.running = accuracy(model, images)
        self.batch = accuracy(model, images, training=True)
        self.alone_eval, self.alone_batch = _alone(model, images)
        gaps = _gaps(model, images)
        self.mean_gap, self.var_gap = max(g[0] for g in gaps), max(g[1] for g in gaps)


Found = dict[tuple[float | None, int], list[Seen]]


def settings_of(settings: Settings) -> list[tuple[float | None, int]]:
    momenta = QUICK_MOMENTA if settings.quick else MOMENTA
    sizes = QUICK_SIZES if settings.quick else SIZES
    return [(momentum, size) for size in sizes for momentum in momenta]


def steps(settings: Settings) -> int:
    return len(settings_of(settings)) * settings.seeds


def run(settings: Settings, progress: Progress) -> Outcome:
    """Trains with each momentum and batch, and tests in every way."""
    found: Found = {}
    for momentum, size in settings_of(settings):
        for seed in range(settings.seeds):
            seen = _train(settings, momentum, size, seed)
            found.setdefault((momentum, size), []).append(seen)
            progress.advance(f"momentum {momentum}, batch {size}: {seen.running:.1%}")
    return Outcome(
        [_table(found)],
        [("Accuracy by momentum", "train-eval.png", _plot(found))],
        _sentences(found),
        {
            f"momentum {momentum}, batch {size}": [vars(seen) for seen in runs]
            for (momentum, size), runs in found.items()
        },
    )


def _train(settings: Settings, momentum: float | None, size: int, seed: int) -> Seen:
    torch.manual_seed(seed)
    images = settings.images
    model = convnet(NORMS["batch"], images)
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    count = QUICK_STEPS if settings.quick else STEPS
    for _ in train(model, batches(images, size, seed), RATE, count):
        pass
    return Seen(model, images)


@torch.no_grad()
def _alone(model: nn.Module, images: Images) -> tuple[float, float]:
    """Accuracy on single images: (by running averages, by the image's own statistics)."""
    labels = images.test_labels[:ALONE]
    results = []
    for training in (False, True):
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        model.train(training)
        scores = torch.cat([model(images.test_images[i : i + 1]) for i in range(ALONE)])
        results.append(float((scores.argmax(1) == labels).double().mean()))
        for buffer, value in buffers:
            buffer.copy_(value)
    model.train()
    return results[0], results[1]


@torch.no_grad()
def _gaps(model: nn.Module, images: Images) -> list[tuple[float, float]]:
    """By layer, the gaps that fastnorm.signals sees on the test images, in evaluation."""
    model.eval()
    with signals.record(model) as recorded:
        model(images.test_images)
    model.train()
    found = [(layer.mean_gap, layer.var_gap) for layer in recorded.layers]
    return [gap for gap in found if not math.isnan(gap[0])]


def _values(seen: list[Seen], what: str) -> list[float]:
    return [getattr(one, what) for one in seen]


def _table(found: Found) -> Table:
    rows = []
    for (momentum, size), seen in found.items():
        cells = [
            spread(_values(seen, what), scale=100)
            for what in ("running", "batch", "alone_eval", "alone_batch")
        ]
        gap = spread(_values(seen, "mean_gap"), ".2f")
        rows.append((f"batch {size}, {_name(momentum)}", *cells, gap))
    columns = ("", "running", "batch", "alone", "alone, own", "gap")
    note = (
        "Rows: batch and momentum, 1/n where it is None, the cumulative average. "
        f"Test accuracy in %, mean ± deviation over seeds, after {STEPS} steps ({QUICK_STEPS} with "
        f"--quick) at rate {RATE:g}: by running averages; by the statistics of all test images; "
        f"for {ALONE} images one at a time, by running averages and by their own. gap: mean "
        "distance of the test images' means from the running ones, in running deviations, at the "
        "worst layer."
    )
    return Table("Batch norm in training and evaluation", columns, rows, note)


def _name(momentum: float | None) -> str:
    return "1/n" if momentum is None else f"{momentum:g}"


def _plot(found: Found) -> bytes:
    drawn, (panel,) = figure(1, 1)
    momenta = list(dict.fromkeys(momentum for momentum, _ in found))
    places = list(range(len(momenta)))
    for size, colour in zip(dict.fromkeys(size for _, size in found), COLOURS, strict=False):
        running = [[100 * v for v in _values(found[m, size], "running")] for m in momenta]
        own = [100 * mean(_values(found[m, size], "batch")) for m in momenta]
        line(panel, places, running, f"batch {size}, running averages", colour)
        panel.plot(places, own, ":", color=colour, label=f"batch {size}, batch statistics")
    panel.set_xticks(places, [_name(momentum) for momentum in momenta])
    panel.set(xlabel="momentum", ylabel="test accuracy, %")
    panel.legend(frameon=False, fontsize=8)
    return png(drawn)


def _sentences(found: Found) -> list[str]:
    loss = {
        key: 100 * (mean(_values(seen, "batch")) - mean(_values(seen, "running")))
        for key, seen in found.items()
    }
    worst = max(loss, key=lambda key: loss[key])
    least = min(loss, key=lambda key: loss[key])
    alone = 100 * mean(v for seen in found.values() for v in _values(seen, "alone_batch"))
    steady = 100 * mean(v for seen in found.values() for v in _values(seen, "alone_eval"))
    return [
        f"Running averages cost most with momentum {_name(worst[0])} and batches of {worst[1]}: "
        f"{loss[worst]:.1f} points below batch statistics; least with momentum {_name(least[0])} "
        f"and batches of {least[1]}: {loss[least]:.1f} points.",
        f"One image at a time, over all settings: {steady:.1f} % by running averages, {alone:.1f} "
        "% by the image's own statistics.",
    ]
