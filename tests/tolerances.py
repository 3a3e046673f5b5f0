"""Every tolerance of the tests, in one table, each with its reason. Nats, unless it says relative."""

TIMES_OWN = 4.0
"""How many times as far from float64 as the unwrapped model a path of ours may be, over a floor (`condition.py`). Both round as
often, in another order; the largest of some hundred errors is a matter of luck within a factor of 2 or 3."""
TIMES_OWN_NORM = 2.0
"""The same of a norm or a sum of absolute values over many errors, in which luck averages out."""
TOKEN_LOGPROB = 1e-5
"""fp32 fast path against the float64 oracle, per token."""
LOSS = 1e-5
"""A logged loss (a mean of such tokens, or of pairs) against the oracle's, at every step."""
GRADIENT = 1e-4
"""Relative, of the whole gradient vector, fp32 against float64."""
WEIGHT = 2e-5
"""Absolute, of any weight after three AdamW steps; weights here are of the order of 0.1."""
SPLIT_GRADIENT = 1e-6
"""Relative: the same gradient from other micro-batches or ranks; only the order of fp32 additions differs."""
SPLIT_LOSS = 2e-6
"""Relative, of a logged loss: the same loss from other micro-batches or ranks."""
SPLIT_WEIGHT = 1e-6
"""Absolute, of any weight after three steps in other micro-batches or on other ranks."""
LN_2 = 1e-6
"""The preference loss before the first update."""
FP32_ROUNDING = 2.0**-24
BF16_ROUNDING = 2.0**-9
"""Relative: fp32 keeps 24 bits, bf16 8."""
BF16_LOGIT = 3 * BF16_ROUNDING
"""Relative to the sum of the products' absolute values: rounding each of two operands and then the product. A log-prob is off
by at most twice the largest error of a logit."""
BF16_ON_CUDA = 0.03
"""Log-probs in nats and gradients relative, of a whole tiny model on a GPU against fp32 there."""
GOLDEN = 2e-5
"""Of a logged number of at least 1 relative, of a smaller one absolute: 20 steps on another kind of processor. With torch's,
oneDNN's and MKL's kernels held to SSE4.2 and AVX2 on one with AVX-512 the numbers of the golden runs moved by up to 4.7e-6."""
GOLDEN_MUON = 5e-3
"""The same with Muon, whose orthogonalisation is in bf16: other rounding moves an update by 2⁻⁹; measured up to 4.7e-4."""
