"""InitReport: what was done to every parameter, and why."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from fastnorm import tables


@dataclass(frozen=True)
class Initialized:
    """What was done to a layer, or to a parameter of a module that has no rule.

    `fan` is the number that the variance was divided by, `std` the standard deviation asked for
    (after `lsuv`: of the layer's output, measured); NaN where there is none.

    >>> import torch, fastnorm
    >>> report = fastnorm.init.initialize(torch.nn.Linear(4, 4))
    >>> report.rows[0].scheme, report.rows[0].std
    ('xavier uniform', 0.5)
    """

    layer: str
    scheme: str
    fan: float
    std: float
    reason: str


@dataclass
class InitReport:
    """One row for each layer, in the order of the model; printed, a table.

    >>> import torch, fastnorm
    >>> report = fastnorm.init.initialize(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    >>> report["0"].reason
    'no activation follows'
    """

    rows: list[Initialized] = field(default_factory=list)

    def __iter__(self) -> Iterator[Initialized]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, layer: str) -> Initialized:
        """The row of a layer, by its name."""
        for row in self.rows:
            if row.layer == layer:
                return row
        raise KeyError(layer)

    def table(self) -> str:
        """Plain text, a line for each row."""
        rows = [
            (row.layer or "(model)", row.scheme, _number(row.fan), _number(row.std), row.reason)
            for row in self.rows
        ]
        return tables.text(("layer", "scheme", "fan", "std", "reason"), rows, ("scheme", "reason"))

    def __str__(self) -> str:
        return self.table()


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"
