"""None, batch, layer, group and instance norm, at a ladder of learning rates."""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastnorm.cli.progress import Progress
from fastnorm.cli.report import Table, png
from fastnorm.cli.studies.outcome import COLOURS, Outcome, Settings, figure, line, mean, spread
from fastnorm.cli.studies.training import NORMS, accuracy, batches, convnet, loss_of, train

BATCH, STEPS, TEST_EVERY = 64, 180, 5
GOAL = 0.9
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
QUICK_RATES, QUICK_STEPS = (0.1, 1.0), 40
SMOOTH_RATE, SMOOTH_EVERY = 0.1, 10
DISTANCES = (0.5, 1.0, 2.0, 4.0)
"""Along the gradient, in steps of the learning rate, after Santurkar et al. 2018."""


@dataclass
class Run:
    """One training: its losses, when it reached the goal, and how smooth the loss was."""

    losses: list[float] = field(default_factory=list)
    reached: float = math.nan
    ranges: list[float] = field(default_factory=list)
    """Largest minus smallest loss along the gradient."""
    slopes: list[float] = field(default_factory=list)
    """Largest ‖∇L(w + d) − ∇L(w)‖ / ‖d‖ along the gradient: how fast it turns."""

    @property
    def stable(self) -> bool:
        """Whether the loss stayed finite and ended below chance, log(classes)."""
        last = self.losses[-10:]
        return all(map(math.isfinite, self.losses)) and statistics.fmean(last) < math.log(10)


Runs = dict[tuple[str, float], list[Run]]


def rates(settings: Settings) -> tuple[float, ...]:
    return QUICK_RATES if settings.quick else RATES


def steps(settings: Settings) -> int:
    return len(NORMS) * len(rates(settings)) * settings.seeds


def run(settings: Settings, progress: Progress) -> Outcome:
    """Trains every norm at every rate, from every seed."""
    runs: Runs = {}
    for norm in NORMS:
        for rate in rates(settings):
            for seed in range(settings.seeds):
                found = _train(settings, norm, rate, seed)
                runs.setdefault((norm, rate), []).append(found)
                progress.advance(f"{norm} at {rate:g}: loss {found.losses[-1]:.3f}")
    return Outcome(
        [_table(runs)],
        [("Steps to 90 %, and smoothness", "normalization.png", _plot(runs))],
        _sentences(runs),
        {
            f"{norm} at {rate:g}": [
                {"losses": r.losses, "reached": r.reached, "range": r.ranges, "slope": r.slopes}
                for r in found
            ]
            for (norm, rate), found in runs.items()
        },
    )


def _train(settings: Settings, norm: str, rate: float, seed: int) -> Run:
    torch.manual_seed(seed)
    images = settings.images
    model = convnet(NORMS[norm], images)
    data = batches(images, BATCH, seed)
    found = Run()
    smooth = rate == SMOOTH_RATE
    probes = _probes(model, data) if smooth else iter(())
    count = QUICK_STEPS if settings.quick else STEPS
    for step, loss in enumerate(train(model, data, rate, count), 1):
        found.losses.append(loss)
        test = step % TEST_EVERY == 0 and math.isnan(found.reached)
        if test and accuracy(model, images) >= GOAL:
            found.reached = step
        if smooth and step % SMOOTH_EVERY == 0 and math.isfinite(loss):
            width, slope = next(probes)
            found.ranges.append(width)
            found.slopes.append(slope)
    return found


def _probes(
    model: nn.Module, data: Iterator[tuple[Tensor, Tensor]]
) -> Iterator[tuple[float, float]]:
    """(range of the loss, how fast its gradient turns) along the gradient, from where it is now."""
    parameters = list(model.parameters())
    while True:
        batch = next(data)
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        loss, gradient = _gradient(model, parameters, batch)
        losses, slope = [loss], 0.0
        length = math.sqrt(sum(float(g.square().sum()) for g in gradient))
        here = [parameter.detach().clone() for parameter in parameters]
        for distance in DISTANCES:
            with torch.no_grad():
                for parameter, start, direction in zip(parameters, here, gradient, strict=True):
                    parameter.copy_(start - distance * SMOOTH_RATE * direction)
            loss, there = _gradient(model, parameters, batch)
            turned = sum(
                float((a - b).square().sum()) for a, b in zip(there, gradient, strict=True)
            )
            losses.append(loss)
            slope = max(slope, math.sqrt(turned) / max(distance * SMOOTH_RATE * length, 1e-30))
        with torch.no_grad():
            for parameter, start in zip(parameters, here, strict=True):
                parameter.copy_(start)
            for buffer, before in buffers:
                buffer.copy_(before)
        yield max(losses) - min(losses), slope


def _gradient(
    model: nn.Module, parameters: list[nn.Parameter], batch: tuple[Tensor, Tensor]
) -> tuple[float, tuple[Tensor, ...]]:
    loss = loss_of(model, *batch)
    return float(loss.detach()), torch.autograd.grad(loss, parameters)


def _of(runs: Runs, norm: str) -> dict[float, list[Run]]:
    return {rate: found for (name, rate), found in runs.items() if name == norm}


def _highest(runs: Runs, norm: str) -> float:
    """The highest rate at which every seed was stable; NaN where there is none."""
    stable = [rate for rate, found in _of(runs, norm).items() if all(r.stable for r in found)]
    return max(stable, default=math.nan)


def _fastest(runs: Runs, norm: str) -> tuple[float, list[float]]:
    """(rate, steps to the goal by seed) where most seeds reach it, and they soonest."""
    found = _of(runs, norm)

    def order(rate: float) -> tuple[int, float]:
        missed = sum(math.isnan(r.reached) for r in found[rate])
        return missed, mean(r.reached for r in found[rate])

    best = min(found, key=order)
    return best, [r.reached for r in found[best]]


def _smooth(runs: Runs, norm: str, what: str) -> list[float]:
    """By seed, the median over the training."""
    found = _of(runs, norm).get(SMOOTH_RATE, [])
    values = [getattr(r, what) for r in found]
    return [statistics.median(v) if v else math.nan for v in values]


def _table(runs: Runs) -> Table:
    rows = []
    for norm in NORMS:
        rate, reached = _fastest(runs, norm)
        highest = _highest(runs, norm)
        rows.append(
            (
                norm,
                spread(reached, ".0f"),
                f"{rate:g}",
                f"{highest:g}" if math.isfinite(highest) else "–",
                spread(_smooth(runs, norm, "ranges"), ".2f"),
                spread(_smooth(runs, norm, "slopes"), ".1f"),
            )
        )
    columns = ("", "steps to 90 %", "rate", "stable to", "loss range", "slope")
    note = (
        f"Five convolutions on digits, batches of {BATCH}, plain SGD, He's weights. Steps to 90 % "
        "test accuracy at the rate where they are fewest; the highest rate of the ladder at which "
        f"every seed ends below chance; along the gradient at rate {SMOOTH_RATE:g}, up to "
        f"{DISTANCES[-1]:g} steps far: how much the loss varies, and how fast its gradient turns."
    )
    return Table("Normalization", columns, rows, note)


def _plot(runs: Runs) -> bytes:
    drawn, (left, right) = figure(1, 2)
    for norm, colour in zip(NORMS, COLOURS, strict=False):
        found = _of(runs, norm)
        reached = [(rate, [r.reached for r in f]) for rate, f in found.items()]
        shown = [(rate, values) for rate, values in reached if math.isfinite(mean(values))]
        line(left, [rate for rate, _ in shown], [values for _, values in shown], norm, colour)
        slopes = [r.slopes for r in found.get(SMOOTH_RATE, [])]
        length = min(map(len, slopes), default=0)
        places = [SMOOTH_EVERY * (index + 1) for index in range(length)]
        values = [[one[index] for one in slopes] for index in range(length)]
        line(right, places, values, norm, colour)
    left.set(xscale="log", xlabel="learning rate", ylabel="steps to 90 % test accuracy")
    right.set(yscale="log", xlabel="step", ylabel="how fast the gradient turns")
    left.legend(frameon=False, fontsize=8)
    return png(drawn)


def _sentences(runs: Runs) -> list[str]:
    highest = {norm: _highest(runs, norm) for norm in NORMS}
    order = sorted(NORMS, key=lambda norm: -(highest[norm] if highest[norm] > 0 else 0))
    stable = ", ".join(f"{norm} {highest[norm]:g}" for norm in order)
    fastest = {norm: _fastest(runs, norm) for norm in NORMS}
    reached = [norm for norm in NORMS if all(map(math.isfinite, fastest[norm][1]))]
    first = f"Highest stable learning rate: {stable}."
    if reached:
        best = min(reached, key=lambda norm: mean(fastest[norm][1]))
        rate, taken = fastest[best]
        first += f" Fewest steps to 90 %: {best}, {spread(taken, '.0f')} at rate {rate:g}."
    slopes = {norm: mean(_smooth(runs, norm, "slopes")) for norm in NORMS}
    ordered = sorted(NORMS, key=lambda norm: slopes[norm])
    words = ", ".join(f"{norm} {slopes[norm]:.2g}" for norm in ordered)
    second = f"At rate {SMOOTH_RATE:g} the gradient turned, from slowest to fastest: {words}."
    return [first, second]
