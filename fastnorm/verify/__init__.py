"""Every operation against float64, on this machine: what `fastnorm verify` runs.

`reference.py` has the formulas, `inputs.py` the values on which norms go wrong, `channels.py`,
`rows.py` and `products.py` the calls of each family, `cases.py` the list, and `judge.py` the
contract: our error is at most torch.nn's own in that dtype, or a few roundings.
"""
