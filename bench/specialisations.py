"""Count how many kernels a sweep of sizes compiles: launches are recorded, nothing is run.

A training job changes its batch size (the last batch) and its image or sequence size; neither may
compile another kernel for each value. What may differ is said by each family's `sweeps`.
"""

import json
from collections.abc import Sequence

from case import Case
from grid import FAMILIES
from launches import TARGETS, recording


def compiled(cases: Sequence[Case]) -> int:
    """Distinct specialisations over the forward and backward of all the cases."""
    keys = set()
    for case in cases:
        with recording() as launches:
            case.forward_and_backward(case.inputs("meta"))
        keys |= {launched.key(TARGETS["sm_90"]) for launched in launches}
    return len(keys)


if __name__ == "__main__":
    counts = {}
    for family in FAMILIES:
        for name, (cases, most) in family.sweeps(compiled).items():
            counts[name] = (compiled(cases), most)
    print(json.dumps(counts))
