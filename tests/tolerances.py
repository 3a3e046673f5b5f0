"""Every tolerance of the tests, in one table, each with its reason. Nats, unless it says relative."""

TIMES_OWN = 4.0
"""How many times as far from float64 as the unwrapped model a path of ours may be, over a floor (`condition.py`). Both round as
often, in another order; the largest of some hundred errors is a matter of luck within a factor of 2 or 3."""
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
BF16_LOSS = 1e-3
"""A logged loss of a bf16 run against the oracle's, over three steps; measured up to 1.7e-4 on the tiny models here (logits of
the order of 0.1, kernels of a CPU with AVX512-BF16)."""
BF16_LOGIT = 3 * 2.0**-9
"""Relative to the sum of the products' absolute values: bf16 keeps 8 bits, so rounding each of two operands and then the
product is off by 2⁻⁹ three times. A log-prob is off by at most twice the largest error of a logit."""
BF16_HEAD_GRADIENT = 1e-2
"""Relative: gradient through the bf16 head against float64; measured up to 2.8e-3."""
BF16_PREFERENCE_LOSS = 0.03
"""Relative: a logged preference loss of a bf16 run on sharpened models against the oracle's; measured up to 0.01. Logits of the
order of 3 are off by 0.01 each, and answers of ten tokens add that up."""
BF16_ATTENTION = 1e-2
"""Relative: value and gradients of bf16 attention against float64; measured up to 6e-3."""
BF16_EXPERTS = 1.5e-2
"""Relative: value and gradients of bf16 experts against fp32, the same tokens going to the same ones; measured up to 8e-3."""
BF16_CACHED_LOGPROB = 5e-3
"""Per token of an answer: reference log-probs out of the cache, asked in rows of another size, against live ones in bf16;
measured up to 9e-4 (3 and 4 layers of 256 channels, on a CPU with AVX512-BF16)."""
GOLDEN = 2e-5
"""Of a logged number of at least 1 relative, of a smaller one absolute: 20 steps on another kind of processor. With torch's,
oneDNN's and MKL's kernels held to SSE4.2 and AVX2 on one with AVX-512 the numbers of the golden runs moved by up to 4.7e-6."""
GOLDEN_MUON = 5e-3
"""The same with Muon, whose orthogonalisation is in bf16: other rounding moves an update by 2⁻⁹; measured up to 4.7e-4."""
