"""Hold what `fastnorm verify` holds a GPU to, against the compiled kernels, without a GPU.

`make emulate` compiles every launch of verify's cases and emulates it, beside torch.nn on the CPU
and float64. Status 1 where the contract is broken. Four minutes where Triton's cache has the
kernels, ten where it has not. With --liger it examines the cases that liger-kernel takes, and its
kernels on them besides.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import triton
from markdown import paragraph, table

from emulate import emulating, liger
from fastnorm.verify.cases import cases
from fastnorm.verify.run import Examined, examined, summaries

TARGETS = ("sm_90", "sm_80")


def report(found: Sequence[Examined], target: str, seed: int | None) -> str:
    """Markdown: a row for each operation and dtype."""
    wrong = sum(bool(one.wrong) for one in found)
    rows = [
        (
            s.operation, s.dtype, str(s.cases), str(s.wrong),
            "-" if s.typical_ratio is None else f"{s.typical_ratio:.2f}",
            s.worst.result, f"{s.worst.share:.2f}",
        )
        for s in summaries(found)
    ]  # fmt: skip
    lead = f"""Triton {triton.__version__}'s PTX for {target}, run by bench/emulate, beside
        torch.nn of torch {torch.__version__}: no GPU was involved, and nothing is said of time.
        Remake with `make emulate`. Approximate instructions err at random, by up to what their
        manual allows, and products and sums are contracted (seed {seed}). Ratio: of our error to
        torch.nn's, in the geometric mean. Of allowed: the share of what the contract of
        docs/numerics.md allows that the worst result takes."""
    results = sum(len(one.findings) for one in found)
    columns = ("operation", "dtype", "cases", "broken", "ratio", "worst", "of allowed")
    return "\n".join([
        "# The contract, kept by compiled kernels", "", paragraph(lead), "",
        f"{len(found)} cases, {results} results, {wrong} cases broken.", "",
        table(columns, rows, left=2), "",
    ])  # fmt: skip


def _named(one: Examined) -> str:
    """A case that breaks the contract, and by what."""
    words, first = one.case.words(), one.wrong[0]
    told = first.wrong
    if first.torchs is not None:
        told = f"{first.result} is off by {first.ours:.1e}, {first.allowed:.1e} is allowed"
    names = ("operation", "dtype", "shape", "layout", "values")
    return f"{', '.join(words[name] for name in names)}: {told}"


def comparison(
    own: Sequence[Examined], theirs: Sequence[Examined], target: str, seed: int | None
) -> str:
    """Markdown: a row for each operation and dtype, with our results and liger-kernel's."""
    rows = [
        (
            a.operation, a.dtype, str(a.cases), str(a.wrong), str(b.wrong),
            *("-" if s.typical_ratio is None else f"{s.typical_ratio:.2f}" for s in (a, b)),
        )
        for a, b in zip(summaries(own), summaries(theirs), strict=True)
    ]  # fmt: skip
    lead = f"""Kernels of fastnorm and of liger-kernel {liger.version()}, compiled by Triton
        {triton.__version__} for {target} and run by bench/emulate on verify's cases, those without
        an activation, beside torch.nn of torch {torch.__version__} on a CPU: no GPU was involved,
        and nothing is said of time. Remake with `make emulate`. Approximate instructions err at
        random, as in emulated.md (seed {seed}). Ratio: of the error to torch.nn's, in the geometric
        mean."""
    columns = ("operation", "dtype", "cases", "broken", "liger broken", "ratio", "liger ratio")
    broken = [f"- {_named(one)}" for one in theirs if one.wrong]
    return "\n".join([
        "# The contract, and liger-kernel", "", paragraph(lead), "", table(columns, rows, left=2),
        "", "What liger-kernel breaks, one result a case:", "", *broken, "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, default=TARGETS[0])
    parser.add_argument("--seed", type=int, default=0, help="negative: every result is exact")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each Nth case alone")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="… from case K on")
    parser.add_argument("--out", type=Path, help="where to write the Markdown")
    parser.add_argument("--liger", action="store_true", help="compare with liger-kernel")
    parser.add_argument("--json", action="store_true", help="print what is broken, in JSON")
    options = parser.parse_args()
    seed = None if options.seed < 0 else options.seed
    listed = cases(quick=True)[options.first :: options.every]
    if options.liger:
        listed = [case for case in listed if liger.takes(case)]
    torch.use_deterministic_algorithms(True)  # uninitialized memory is NaN
    with emulating(options.target, seed=seed):
        found = list(examined(listed, torch.device("cpu"), backend="triton"))
    broken = [f"{one.case}: {finding}" for one in found for finding in one.wrong]
    if options.json:
        print(json.dumps({"cases": len(found), "broken": broken}))
        return
    text = report(found, options.target, seed)
    if options.liger:
        with emulating(options.target, seed=seed), liger.in_our_place():
            theirs = list(examined(listed, torch.device("cpu"), backend="triton"))
        text = comparison(found, theirs, options.target, seed)
    if options.out:
        options.out.write_text(text)
    print(text, *broken, sep="\n")
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    main()
