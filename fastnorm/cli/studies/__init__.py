"""The studies of `fastnorm study`: small real networks, trained or run, one file each.

A study is a module with `steps(settings) -> int`, the steps that its progress bar counts, and
`run(settings, progress) -> Outcome`.
"""

STUDIES = {
    "init": "signal and gradient through 100 layers, by how the weights start",
    "normalization": "none, batch, layer, group and instance norm at a ladder of learning rates",
    "batch-size": "batch norm against layer and group norm, at batches of 2 to 256",
    "residual": "depth with and without skips, scaled or zero at the start",
    "train-eval": "running averages against batch statistics, by momentum and batch",
}
