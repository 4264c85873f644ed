"""Activations that a norm can end with, as pairs of small functions.

    act(z)           the activation
    act_grad(dy, z)  dy · act′(z), from the pre-activation

Gradients take dy so that a closed gate gives 0 even for an infinite dy, as torch's do. Comparisons
are written so that a NaN takes the branch it takes in torch. Kernels receive these as constexprs.
"""

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
GELU_CUBIC = tl.constexpr(0.044715)
LEAKY_SLOPE = tl.constexpr(0.01)
ONE_THIRD = tl.constexpr(1.0 / 3.0)
ONE_SIXTH = tl.constexpr(1.0 / 6.0)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """exp(x); of float32, 0 where that is below 2⁻¹²⁶: a GPU takes three instructions to tell."""
    return tl.exp(x) if x.dtype == tl.float64 else tl.exp2(x * LOG2_E)


@triton.jit
def exp_minus(x):
    """exp(−x), whose sign costs nothing."""
    return tl.exp(-x) if x.dtype == tl.float64 else tl.exp2(x * -LOG2_E)


@triton.jit
def inverse(x):
    """1 / x for x ≥ 1. A GPU guards a division against what is near the ends of the range."""
    if x.dtype == tl.float64:
        return 1.0 / x
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def expm1(x):
    """exp(x) - 1 without cancellation near 0: a Taylor polynomial for |x| < 1/2."""
    DEGREE: tl.constexpr = 18 if x.dtype == tl.float64 else 9
    series = tl.full(x.shape, 1.0, x.dtype)
    for k in tl.static_range(DEGREE - 1):
        series = series * x * (1.0 / (DEGREE - k)) + 1.0
    return tl.where(tl.abs(x) < 0.5, x * series, exp(x) - 1.0)


@triton.jit
def tanh_(z):
    t = expm1(-2.0 * tl.abs(z))  # in (-1, 0]: no overflow, and exact to the last bits near 0
    magnitude = -t * inverse(t + 2.0)
    return tl.where(z < 0.0, -magnitude, magnitude)


@triton.jit
def identity(z):
    return z


@triton.jit
def identity_grad(dy, z):
    return dy


@triton.jit
def relu(z):
    # max.f32 would turn NaN into 0 on a GPU; torch keeps it
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu_grad(dy, z):
    return tl.where(z <= 0.0, 0.0, dy)


@triton.jit
def relu6(z):
    low = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(low, 6.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu6_grad(dy, z):
    return tl.where((z <= 0.0) | (z >= 6.0), 0.0, dy)


@triton.jit
def leaky_relu(z):
    return tl.where(z > 0.0, z, z * LEAKY_SLOPE)


@triton.jit
def leaky_relu_grad(dy, z):
    return tl.where(z > 0.0, dy, dy * LEAKY_SLOPE)


@triton.jit
def elu(z):
    return tl.where(z <= 0.0, expm1(z), z)


@triton.jit
def elu_grad(dy, z):
    return tl.where(z <= 0.0, dy * exp(z), dy)


@triton.jit
def sigmoid(z):
    return inverse(1.0 + exp_minus(z))


@triton.jit
def sigmoid_grad(dy, z):
    y = sigmoid(z)
    return dy * (y * (1.0 - y))


@triton.jit
def tanh_grad(dy, z):
    y = tanh_(z)
    return dy * (1.0 - y * y)


@triton.jit
def silu(z):
    return z * sigmoid(z)


@triton.jit
def silu_grad(dy, z):
    s = sigmoid(z)
    return dy * (s * (1.0 + z * (1.0 - s)))


@triton.jit
def gelu(z):
    return 0.5 * z * (1.0 + tl.erf(z * SQRT_HALF))


@triton.jit
def gelu_grad(dy, z):
    cdf = 0.5 * (1.0 + tl.erf(z * SQRT_HALF))
    return dy * (cdf + z * (exp(-0.5 * z * z) * INV_SQRT_2PI))


@triton.jit
def gelu_tanh_cdf(z):
    """(σ, σ (1 − σ)) of 2u, where (1 + tanh u) / 2 = σ(2u): nothing cancels, as 1 − tanh² does."""
    u = (z + z * z * z * GELU_CUBIC) * SQRT_2_OVER_PI
    e = exp_minus(2.0 * tl.abs(u))
    large = inverse(1.0 + e)
    small = e * large
    return tl.where(u < 0.0, small, large), small * large


@triton.jit
def gelu_tanh(z):
    cdf, _ = gelu_tanh_cdf(z)
    return z * cdf


@triton.jit
def gelu_tanh_grad(dy, z):
    cdf, density = gelu_tanh_cdf(z)
    du = (1.0 + z * z * (3.0 * GELU_CUBIC)) * SQRT_2_OVER_PI
    return dy * (cdf + 2.0 * z * density * du)


@triton.jit
def hardswish(z):
    return z * (relu6(z + 3.0) * ONE_SIXTH)  # exactly z from 3 on


@triton.jit
def hardswish_grad(dy, z):
    return tl.where(z <= -3.0, 0.0, tl.where(z < 3.0, dy * (z * ONE_THIRD + 0.5), dy))


ACTIVATIONS = {
    "identity": (identity, identity_grad),
    "relu": (relu, relu_grad),
    "relu6": (relu6, relu6_grad),
    "leaky_relu": (leaky_relu, leaky_relu_grad),
    "elu": (elu, elu_grad),
    "silu": (silu, silu_grad),
    "gelu": (gelu, gelu_grad),
    "gelu_tanh": (gelu_tanh, gelu_tanh_grad),
    "tanh": (tanh_, tanh_grad),
    "sigmoid": (sigmoid, sigmoid_grad),
    "hardswish": (hardswish, hardswish_grad),
}

# Gates that only ask for the sign of z, which y shows whatever its rounding: act_grad(dy, y).
# (y of relu6, tanh or elu would do in exact arithmetic; a bfloat16 y rounds to 6 or 1 too early.)
SIGN_GATES = frozenset({"relu", "leaky_relu"})


# Gates from the stored output alone, act_grad(dy, y) with both in y's dtype; what they return is in
# that, or in float32. relu6, elu, tanh and sigmoid see y as it was rounded, as torch's do.
@triton.jit
def widened(t):
    return t.to(tl.float32) if t.dtype.primitive_bitwidth == 16 else t


@triton.jit
def relu_output_grad(dy, y):
    if y.dtype.primitive_bitwidth == 16:  # all bits but the sign's: no conversion of bfloat16
        return tl.where((y.to(tl.int16, bitcast=True) & 0x7FFF) == 0, 0.0, dy)
    else:
        return tl.where(y <= 0.0, 0.0, dy)


@triton.jit
def relu6_output_grad(dy, y):
    return relu6_grad(dy, widened(y))


@triton.jit
def leaky_relu_output_grad(dy, y):
    return leaky_relu_grad(widened(dy), widened(y))


@triton.jit
def elu_output_grad(dy, y):
    y = widened(y)
    return tl.where(y <= 0.0, widened(dy) * (y + 1.0), widened(dy))


@triton.jit
def tanh_output_grad(dy, y):
    y = widened(y)
    return widened(dy) * (1.0 - y * y)


@triton.jit
def sigmoid_output_grad(dy, y):
    y = widened(y)
    return widened(dy) * ((1.0 - y) * y)


OUTPUT_GRADS = {
    "identity": identity_grad,
    "relu": relu_output_grad,
    "relu6": relu6_output_grad,
    "leaky_relu": leaky_relu_output_grad,
    "elu": elu_output_grad,
    "tanh": tanh_output_grad,
    "sigmoid": sigmoid_output_grad,
}
