"""Activations and gates on values in registers, as the kernels that end with one share them.

Knows functions by their Hugging Face names (ops/linear.py has the same list). It must not know what was multiplied.
"""

import triton
import triton.language as tl

ACTIVATIONS = ("silu", "swish", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh")


@triton.jit
def activated(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """The activation of fp32 x by its Hugging Face name (ops/linear.py has the same list)."""
    if ACTIVATION == "silu" or ACTIVATION == "swish":
        result = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "relu":
        result = tl.maximum(x, 0.0)
    elif ACTIVATION == "gelu":
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        # gelu's tanh form: (1 + tanh z) / 2 is the logistic function of 2 z.
        z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        result = x / (1.0 + tl.exp(-2.0 * z))
    return result


@triton.jit
def gated(gates: tl.tensor, ups: tl.tensor, ACTIVATION: tl.constexpr, like: tl.tensor) -> tl.tensor:
    """activation(gates) * ups of fp32 values, rounded to like's dtype wherever the reference rounds."""
    kind = like.dtype.element_ty
    hot = activated(gates.to(kind).to(tl.float32), ACTIVATION).to(kind).to(tl.float32)
    return (hot * ups.to(kind).to(tl.float32)).to(kind)
