"""Depth with and without skips, shortcuts or branches scaled, branches zero at first."""

import torch
from torch import Tensor, nn

from fastnorm import init, signals
from fastnorm.cli.progress import Progress
from fastnorm.cli.report import Table, png
from fastnorm.cli.studies.outcome import (
    COLOURS,
    Outcome,
    Settings,
    figure,
    geometric,
    line,
    mean,
    spread,
)
from fastnorm.cli.studies.training import accuracy, batches, loss_of, train

WIDTH, BATCH, RATE = 64, 64, 0.01
BLOCKS, QUICK_BLOCKS = (1, 4, 16, 48), (1, 8)
STEPS, QUICK_STEPS = 200, 60


class Block(nn.Module):
    """shortcut·x + W₂ relu(W₁ x), or without the first term."""

    def __init__(self, shortcut: float) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.shortcut = shortcut

    def forward(self, input: Tensor) -> Tensor:
        branch: Tensor = self.last(nn.functional.relu(self.first(input)))
        if self.shortcut == 0:
            return nn.functional.relu(branch)
        if self.shortcut == 1:
            return input + branch
        return self.shortcut * input + branch


# By name: the factor of the shortcut, and the residual rule of fastnorm.init.initialize.
KINDS = {
    "no skip": (0.0, "none"),
    "skip": (1.0, "none"),
    "skip × 0.5": (0.5, "none"),
    "branch / √(2·blocks)": (1.0, "depth"),
    "branch 0 at first": (1.0, "zero"),
}


class Seen:
    """One training: its accuracy, and the signal before its first step."""

    def __init__(self, accuracy: float, std: float, gradient: float) -> None:
        self.accuracy, self.std, self.gradient = accuracy, std, gradient


Found = dict[tuple[str, int], list[Seen]]


def blocks(settings: Settings) -> tuple[int, ...]:
    return QUICK_BLOCKS if settings.quick else BLOCKS


def steps(settings: Settings) -> int:
    return len(KINDS) * len(blocks(settings)) * settings.seeds


def run(settings: Settings, progress: Progress) -> Outcome:
    """Trains every kind at every depth, without any norm."""
    found: Found = {}
    for depth in blocks(settings):
        for kind in KINDS:
            for seed in range(settings.seeds):
                seen = _train(settings, kind, depth, seed)
                found.setdefault((kind, depth), []).append(seen)
                progress.advance(f"{kind}, {depth} blocks: {seen.accuracy:.1%}")
    depths = blocks(settings)
    return Outcome(
        [_table(found, depths), _signals(found, depths)],
        [("Test accuracy by depth", "residual.png", _plot(found, depths))],
        _sentences(found, depths),
        {
            f"{kind}, {depth}": [vars(seen) for seen in runs]
            for (kind, depth), runs in found.items()
        },
    )


def build(settings: Settings, kind: str, depth: int) -> nn.Sequential:
    shortcut, rule = KINDS[kind]
    images = settings.images
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(images.shape.numel(), WIDTH),
        *(Block(shortcut) for _ in range(depth)),
        nn.Linear(WIDTH, images.classes),
    )
    init.initialize(model, residual=rule)
    return model


def _train(settings: Settings, kind: str, depth: int, seed: int) -> Seen:
    torch.manual_seed(seed)
    model = build(settings, kind, depth)
    data = batches(settings.images, BATCH, seed)
    with signals.record(model) as recorded:
        loss_of(model, *next(data)).backward()  # type: ignore[no-untyped-call]
    linear = [layer for layer in recorded.layers if layer.kind == "Linear"]
    count = QUICK_STEPS if settings.quick else STEPS
    for _ in train(model, data, RATE, count):
        pass
    return Seen(accuracy(model, settings.images), linear[-1].std, linear[0].gradient_norm)


def _accuracies(found: Found, kind: str, depth: int) -> list[float]:
    return [seen.accuracy for seen in found[kind, depth]]


def _table(found: Found, depths: tuple[int, ...]) -> Table:
    rows = [
        (kind, *(spread(_accuracies(found, kind, depth), scale=100) for depth in depths))
        for kind in KINDS
    ]
    note = (
        f"Test accuracy in %, mean ± deviation over seeds, after {STEPS} steps "
        f"({QUICK_STEPS} with --quick) of plain SGD at rate {RATE:g} on digits; blocks of two "
        f"Linear layers of {WIDTH} units and a ReLU, He's weights, no norm."
    )
    return Table("Accuracy by depth", ("", *(f"{depth} blocks" for depth in depths)), rows, note)


def _signals(found: Found, depths: tuple[int, ...]) -> Table:
    rows = []
    for kind in KINDS:
        runs = [found[kind, depth] for depth in (depths[0], depths[-1])]
        stds = [f"{geometric(seen.std for seen in run):.1e}" for run in runs]
        gradients = [f"{geometric(seen.gradient for seen in run):.1e}" for run in runs]
        rows.append((kind, *stds, *gradients))
    first, last = depths[0], depths[-1]
    columns = ("", f"std, {first}", f"std, {last}", f"|dy|, {first}", f"|dy|, {last}")
    note = (
        "Geometric means over seeds, for the fewest and the most blocks: the standard deviation of "
        "the scores, and the norm of the gradient at the first layer."
    )
    return Table("Before the first step", columns, rows, note)


def _plot(found: Found, depths: tuple[int, ...]) -> bytes:
    drawn, (panel,) = figure(1, 1)
    for kind, colour in zip(KINDS, COLOURS, strict=False):
        values = [[100 * v for v in _accuracies(found, kind, depth)] for depth in depths]
        line(panel, depths, values, kind, colour)
    panel.set_xscale("log", base=2)
    panel.set(xlabel="blocks", ylabel="test accuracy, %")
    panel.legend(frameon=False, fontsize=8)
    return png(drawn)


def _sentences(found: Found, depths: tuple[int, ...]) -> list[str]:
    first, last = depths[0], depths[-1]
    result = {
        kind: tuple(100 * mean(_accuracies(found, kind, depth)) for depth in (first, last))
        for kind in KINDS
    }
    best = max(KINDS, key=lambda kind: result[kind][1])
    words = ", ".join(f"{kind} {result[kind][1]:.1f} %" for kind in KINDS)
    scores = {kind: geometric(seen.std for seen in found[kind, last]) for kind in KINDS}
    loudest = max(KINDS, key=lambda kind: scores[kind])
    return [
        f"With {last} blocks: {words}; best is {best}, {result[best][1]:.1f} % against "
        f"{result[best][0]:.1f} % with {first}.",
        f"Before training the scores' deviation with {last} blocks was largest with {loudest}, "
        f"{scores[loudest]:.1e}.",
    ]
