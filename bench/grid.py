"""The benchmark grid: every operation of the library, at the shapes of real models.

Byte counts, generated code, specialisation counts and benchmarks all walk these. Adding a family is
adding its file to families/, and its name here.
"""

from case import Case
from families import batch_norm, group_norm, layer_norm, linear_batch_norm, processes

FAMILIES = (batch_norm, layer_norm, group_norm, linear_batch_norm)

# Names of kernel arguments that are as large as the input; the others are parameters, statistics
# and partial sums.
LARGE = (
    "dy_ptr", "x_ptr", "y_ptr", "z_ptr", "residual_ptr", "dx_ptr", "dz_ptr", "sum_ptr", "dsum_ptr",
    "h_ptr",
)  # fmt: skip

SOURCES = (*FAMILIES, processes)  # those of SyncBatchNorm are BatchNorm's
CASES: tuple[Case, ...] = tuple(case for source in SOURCES for case in source.cases())
OPTION_CASES: tuple[Case, ...] = tuple(case for source in SOURCES for case in source.option_cases())
SMALL_CASES: tuple[Case, ...] = tuple(case for source in SOURCES for case in source.small_cases())
