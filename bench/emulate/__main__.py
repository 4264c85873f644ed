"""Hold what `fastnorm verify` holds a GPU to, against the compiled kernels, without a GPU.

`make emulate` compiles every launch of verify's cases and emulates it, beside torch.nn on the CPU
and float64. Status 1 where the contract is broken. Four minutes where Triton's cache has the
kernels, ten where it has not.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import triton
from markdown import paragraph, table

from emulate import emulating
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, default=TARGETS[0])
    parser.add_argument("--seed", type=int, default=0, help="negative: every result is exact")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each Nth case alone")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="… from case K on")
    parser.add_argument("--out", type=Path, help="where to write the Markdown")
    parser.add_argument("--json", action="store_true", help="print what is broken, in JSON")
    options = parser.parse_args()
    seed = None if options.seed < 0 else options.seed
    listed = cases(quick=True)[options.first :: options.every]
    torch.use_deterministic_algorithms(True)  # uninitialized memory is NaN
    with emulating(options.target, seed=seed):
        found = list(examined(listed, torch.device("cpu"), backend="triton"))
    broken = [f"{one.case}: {finding}" for one in found for finding in one.wrong]
    if options.json:
        print(json.dumps({"cases": len(found), "broken": broken}))
        return
    text = report(found, options.target, seed)
    if options.out:
        options.out.write_text(text)
    print(text, *broken, sep="\n")
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    main()
