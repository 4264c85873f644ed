"""Mean and spread that can be merged in any order, at any magnitude.

A partial statistic is (count, mean, rest, std): the mean as two numbers of working precision, since
one float32 is not enough for |mean| ≫ std, and the spread as std = √(m2 / count), since m2
overflows for elements near 1e30. Sums of squares are formed in a unit, `scale`, which is 1 unless
the elements are that large. Merging follows Chan et al. 1979; never E[x²] − E[x]².
"""

import triton
import triton.language as tl

from fastnorm.kernels.device.tiles import fold, unfold

# Sums of squares of anything below HUGE stay far from float32's maximum, and so do those of
# anything above it in UNITs; a power of two, so nothing is rounded.
HUGE = tl.constexpr(2.0**48)
UNIT = tl.constexpr(2.0**80)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def finite_or_zero(x):
    return tl.where(is_finite(x), x, 0.0)


@triton.jit
def sqrt(x):
    """Square root to about half an ulp: a GPU's approximation, corrected by its exact residual.

    The correctly rounded instruction is a subroutine there, and its call costs a stack.
    """
    root = tl.sqrt(x)
    if x.dtype == tl.float64:
        return root
    corrected = root + tl.fma(-root, root, x) / (2.0 * root)
    return tl.where((root > 0.0) & is_finite(root), corrected, root)


@triton.jit
def rsqrt(x):
    """1 / √x for a normal x to about an ulp, likewise: by one step of Newton's method."""
    if x.dtype == tl.float64:
        return 1.0 / tl.sqrt(x)
    guess = tl.rsqrt(x)
    corrected = tl.fma(0.5 * guess, tl.fma(-x * guess, guess, 1.0), guess)
    return tl.where((guess > 0.0) & is_finite(guess), corrected, guess)


@triton.jit
def quotient(a, b):
    """a / b for a b ≥ 1, likewise: n times a number, over n, is that number. NaN for infinities."""
    if a.dtype == tl.float64:
        return a / b
    inverse = 1.0 / b
    guess = a * inverse
    return tl.fma(tl.fma(-guess, b, a), inverse, guess)


@triton.jit
def scale_of(size):
    """(unit, 1 / unit) in which numbers up to `size` are squared. A division might be inexact."""
    large = size > HUGE
    one = tl.full(size.shape, 1.0, size.dtype)
    return tl.where(large, UNIT, one), tl.where(large, 1.0 / UNIT, one)


@triton.jit
def two_sum(a, b):
    """a + b as (high, rest), exactly (Knuth); rest is 0 where the sum is not finite."""
    high = a + b
    b_part = high - a
    rest = (a - (high - b_part)) + (b - b_part)
    return high, tl.where(is_finite(high), rest, 0.0)


@triton.jit
def pivot_of(first, x, inside, share):
    """A number near those of each column, to take them relative to: their mean, 0 if not finite.

    The first of them would do, were it not an outlier. But by way of that: the pivot of numbers
    that are all equal is the very same.
    """
    first = finite_or_zero(first)
    d = tl.where(inside, x - first[None, :], 0.0)
    return finite_or_zero(first + tl.sum(d * share, axis=0))


@triton.jit
def fold_moments(d, inside, count, FOLD: tl.constexpr, RUN: tl.constexpr):
    """(mean, m2) of each group of FOLD lanes that one thread owns, in two passes.

    `inside` is None where all of them are, or 0: a comparison and two choices an element cost more
    than the sums.
    """
    if inside is not None:
        d = tl.where(inside, d, 0.0)
    mean = fold(d, FOLD, RUN) * (1.0 / tl.maximum(count, 1.0))
    d -= unfold(mean, FOLD, RUN)
    if inside is not None:
        d = tl.where(inside, d, 0.0)
    return mean, fold(d * d, FOLD, RUN)


@triton.jit
def merge_counted(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """Merge two partial statistics in the form (count, mean, m2); either count may be 0."""
    count = count_a + count_b
    share = count_b / tl.maximum(count, 1.0)
    d = mean_b - mean_a
    # an average, not mean_a + d · share: an infinite mean stays infinite, as in a plain sum
    mean = mean_a * (1.0 - share) + mean_b * share
    return count, mean, m2_a + m2_b + d * d * (count_a * share)


@triton.jit
def merge_lanes(count, mean, m2):
    """(count, mean, std) over axis 0 of lane statistics; a lane's count may be 0."""
    total = tl.sum(count, axis=0)
    grand = tl.sum(count * mean, axis=0) / total
    d = mean - grand[None, :]
    return total, grand, sqrt(tl.sum(m2 + count * d * d, axis=0) / total)


@triton.jit
def merge_partials(count, mean, std):
    """(count, mean, std) over axis 0 of partial statistics; count is (partials, 1), may be 0."""
    total = tl.sum(count, axis=0)
    # before the product with the mean, which may be near the maximum
    share = count / tl.maximum(total, 1.0)[None, :]
    grand = tl.sum(share * mean, axis=0)
    d = tl.where(count > 0.0, mean - grand[None, :], 0.0)
    scale, unit = scale_of(tl.max(tl.maximum(tl.abs(d), std), axis=0))
    a, e = std * unit[None, :], d * unit[None, :]
    squares = a * a + e * e
    return total, grand, sqrt(tl.sum(share * squares, axis=0)) * scale


@triton.jit
def merge_two(count_a, mean_a, std_a, count_b, mean_b, std_b):
    """Merge two partial statistics; count_a may be 0."""
    count = count_a + count_b
    share = quotient(count_b, count)  # never above 1: var would be negative
    d = mean_b - mean_a
    scale, unit = scale_of(tl.maximum(tl.abs(d), tl.maximum(std_a, std_b)))
    a, b, e = std_a * unit, std_b * unit, d * unit
    var = a * a * (1.0 - share) + b * b * share + e * e * (share * (1.0 - share))
    return count, mean_a * (1.0 - share) + mean_b * share, sqrt(var) * scale


@triton.jit
def rstd_of_var(var, unit, eps):
    """1 / √(std² + eps), where var = (std · unit)²."""
    eps = tl.full((), eps, var.dtype)
    return unit * rsqrt(var + eps * unit * unit)


@triton.jit
def rstd_of(std, eps):
    """1 / √(std² + eps), also where std² overflows."""
    _, unit = scale_of(std)
    return rstd_of_var(std * unit * (std * unit), unit, eps)
