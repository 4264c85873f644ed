"""Count how many kernels a sweep of sizes compiles: launches are recorded, nothing is run.

A training job changes its batch size (the last batch) and its image size (augmentation); neither
may compile another kernel for each value. What may differ: one program a channel or several (two
sets of kernels), the power of two that divides the contiguous axis, up to 8 (four classes), and the
powers of two that cover a channel smaller than a tile.
"""

import json
from dataclasses import replace

import torch
from grid import Case
from launches import TARGETS, recording


def compiled(cases: list[Case]) -> int:
    """Distinct specialisations over the forward and backward of all the cases."""
    keys = set()
    for case in cases:
        with recording() as launches:
            case.forward_and_backward(case.inputs("meta"))
        keys |= {launched.key(TARGETS["sm_90"]) for launched in launches}
    return len(keys)


def sweeps() -> dict[str, tuple[list[Case], int]]:
    """Name -> (cases, how many specialisations they may need together)."""
    image = Case("batch_norm", "sweep", (32, 64, 56, 56), torch.bfloat16, activation="relu")
    last = replace(image, layout="channels_last")
    rows = replace(image, shape=(32, 64))
    one = compiled([image])
    batches = [16, 17, 24, 31, 32, 48, 64, 100, 128, 255, 256]
    sides = [48, 50, 52, 56, 58, 60, 62, 64, 72, 80, 96, 112, 128, 224]
    odd = [49, 51, 53, 55, 57, 61, 63, 65, 97]
    return {
        "batch, NCHW": ([replace(image, shape=(n, *image.shape[1:])) for n in batches], one),
        "batch, channels_last": ([replace(last, shape=(n, *last.shape[1:])) for n in batches], one),
        "batch, (N, C), split": (
            [replace(rows, shape=(n, 64)) for n in (3000, 4096, 5001, 8192, 65536)],
            one,
        ),
        # even sides: H·W is a multiple of 4 or of 8, which the two finalizing kernels do not see
        "sides, NCHW": ([replace(image, shape=(32, 64, s, s)) for s in sides], 2 * one - 2),
        "odd sides, NCHW": ([replace(image, shape=(32, 64, s, s)) for s in odd], one),
        "sides, channels_last": (
            [replace(last, shape=(32, 64, s, s)) for s in [*sides, *odd]],
            one,
        ),
    }


if __name__ == "__main__":
    print(json.dumps({name: (compiled(cases), most) for name, (cases, most) in sweeps().items()}))
