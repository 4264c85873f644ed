"""Batch norm against layer and group norm, at batches of 2 to 256."""

import torch

from fastnorm.cli.progress import Progress
from fastnorm.cli.report import Table, png
from fastnorm.cli.studies.outcome import COLOURS, Outcome, Settings, figure, line, mean, spread
from fastnorm.cli.studies.training import NORMS, accuracy, batches, convnet, train

NAMES = ("batch", "layer", "group")
SIZES, QUICK_SIZES = (2, 4, 8, 16, 32, 64, 128, 256), (16, 128)
IMAGES, QUICK_IMAGES = 3 * 1437, 1437
LEAST, QUICK_LEAST = 100, 20
"""Steps, where that many images are fewer: else large batches would hardly train."""
RATE, RATE_BATCH, HIGHEST, MOMENTUM = 0.03, 32, 0.1, 0.9
"""At other batches in proportion (Goyal et al. 2017), but never above the highest."""

Found = dict[tuple[str, int], list[tuple[float, float]]]


def sizes(settings: Settings) -> tuple[int, ...]:
    return QUICK_SIZES if settings.quick else SIZES


def steps(settings: Settings) -> int:
    return len(NAMES) * len(sizes(settings)) * settings.seeds


def run(settings: Settings, progress: Progress) -> Outcome:
    """Trains each norm at each size on equally many images."""
    found: Found = {}
    for size in sizes(settings):
        for norm in NAMES:
            for seed in range(settings.seeds):
                result = _train(settings, norm, size, seed)
                found.setdefault((norm, size), []).append(result)
                progress.advance(f"{norm}, batch {size}: {result[0]:.1%}")
    return Outcome(
        [_table(found, sizes(settings))],
        [("Test accuracy by batch", "batch-size.png", _plot(found, sizes(settings)))],
        [_sentence(found, norm, sizes(settings)) for norm in NAMES],
        {f"{norm}, {size}": values for (norm, size), values in found.items()},
    )


def _train(settings: Settings, norm: str, size: int, seed: int) -> tuple[float, float]:
    """Test accuracy: (in evaluation, by the test images' own statistics)."""
    torch.manual_seed(seed)
    images = settings.images
    model = convnet(NORMS[norm], images)
    seen, least = (QUICK_IMAGES, QUICK_LEAST) if settings.quick else (IMAGES, LEAST)
    count = max(seen // size, least)
    rate = min(RATE * size / RATE_BATCH, HIGHEST)
    for _ in train(model, batches(images, size, seed), rate, count, MOMENTUM):
        pass
    return accuracy(model, images), accuracy(model, images, training=True)


def _values(found: Found, norm: str, size: int, which: int = 0) -> list[float]:
    return [values[which] for values in found[norm, size]]


def _table(found: Found, sizes: tuple[int, ...]) -> Table:
    rows = []
    for size in sizes:
        cells = [spread(_values(found, norm, size), scale=100) for norm in NAMES]
        own = spread(_values(found, "batch", size, 1), scale=100)
        rows.append((str(size), cells[0], own, *cells[1:]))
    note = (
        f"Test accuracy in %, mean ± deviation over seeds, after {IMAGES:,} digits but at least "
        f"{LEAST} steps ({QUICK_IMAGES:,} and {QUICK_LEAST} with --quick), by SGD with momentum "
        f"{MOMENTUM:g} and a learning rate of {RATE:g} at {RATE_BATCH}, in proportion to the batch "
        f"up to {HIGHEST:g}. The second column of batch norm takes the 360 test images' own "
        "statistics, not the running averages."
    )
    columns = ("batch", "batch norm", "own statistics", "layer norm", "group norm")
    return Table("Accuracy by batch size", columns, rows, note)


def _plot(found: Found, sizes: tuple[int, ...]) -> bytes:
    drawn, (panel,) = figure(1, 1)
    for norm, colour in zip(NAMES, COLOURS, strict=False):
        values = [[100 * v for v in _values(found, norm, size)] for size in sizes]
        line(panel, sizes, values, f"{norm} norm", colour)
    panel.set_xscale("log", base=2)
    panel.set(xlabel="batch", ylabel="test accuracy, %")
    panel.legend(frameon=False, fontsize=8)
    return png(drawn)


def _sentence(found: Found, norm: str, sizes: tuple[int, ...]) -> str:
    accuracies = {size: 100 * mean(_values(found, norm, size)) for size in sizes}
    best = max(accuracies, key=lambda size: accuracies[size])
    smallest = sizes[0]
    return (
        f"{norm.capitalize()} norm: best at batches of {best} with {accuracies[best]:.1f} %; at "
        f"{smallest} it reached {accuracies[smallest]:.1f} %, "
        f"{accuracies[best] - accuracies[smallest]:.1f} points less."
    )
