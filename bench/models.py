"""Count the launches and bytes of a training step of whole models, before and after `convert`.

`python bench/models.py --out bench/results/models.md` runs one forward and backward of small models
on a CPU. A torch operator other than a view or an allocation counts as one launch that reads its
operands and writes its results once; a kernel, in Triton's interpreter, with the distinct addresses
that it loads and stores. So what is compared is one pass per operator against what our kernels do.
"""

import argparse
import copy
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from traffic import Operators

sys.path.append(
    str(Path(__file__).parents[1] / "tests")
)  # the models, and the interpreter's support


class _Counted(Operators):
    """Also how many operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.bytes
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.calls += self.bytes > before
        return result


@dataclass(frozen=True)
class Step:
    """One forward and backward."""

    launches: int
    bytes: int


def step(model: nn.Module, call: Any, backend: str) -> Step:
    import interpreter

    import fastnorm

    model.train()
    for parameter in model.parameters():
        parameter.grad = None
    with fastnorm.use_backend(backend), interpreter.trace() as launches, _Counted() as operators:
        y = call(model)
        y.backward(torch.ones_like(y))
    loaded = sum(loads + stores for one in launches for loads, stores, *_ in one.traffic().values())
    return Step(len(launches) + operators.calls, loaded + operators.bytes)


def models() -> dict[str, tuple[nn.Module, Any]]:
    from architectures import SMALL
    from zoo import ZOO

    torch.manual_seed(0)
    image = torch.randn(2, 3, 32, 32)
    ours = {name: (make(), lambda model: model(image)) for name, make in SMALL.items()}
    return ours | {name: (model.make(), model.call()) for name, model in ZOO.items()}


def report(counts: dict[str, tuple[Step, Step]]) -> str:
    lines = [
        "# Whole models, before and after `convert`",
        "",
        f"One forward and backward of small models (torch {torch.__version__}), counted on a CPU:",
        "no GPU was involved, and no time is claimed. Remake with `make models`. Before: an",
        "operator is one launch that reads its operands and writes its results once, also where",
        "torch needs several passes. After: our kernels in Triton's interpreter, every launch and",
        "every distinct address of it, and torch's operators as before. Convolutions, products and",
        "attention are the same on both sides, and so a floor under the ratio.",
        "",
        "| model | launches before | after | bytes before | after | bytes after / before |",
        "|---|---|---|---|---|---|",
    ]
    for name, (before, after) in counts.items():
        lines.append(
            f"| {name} | {before.launches} | {after.launches} | {before.bytes} | {after.bytes} "
            f"| {after.bytes / before.bytes:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the Markdown report here")
    arguments = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.simplefilter("ignore")  # those of the models' libraries
    import interpreter

    import fastnorm

    interpreter.mend()
    counts = {}
    for name, (model, call) in models().items():
        converted = fastnorm.convert(copy.deepcopy(model))
        call(converted)  # traces the way that this model is called
        counts[name] = step(model, call, "eager"), step(converted, call, "triton")
    text = report(counts)
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
