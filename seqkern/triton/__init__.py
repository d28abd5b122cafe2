"""Triton kernels: imported only where they run, since `import seqkern` loads no Triton.

attention.py launches (attention_forward, attention_weights, attention_backward); forward.py, weights.py,
backward.py
and tiles.py hold the kernels; config.py says in what tiles they work and tunes that. additive.py has additive
attention's kernels and launchers.
"""

from seqkern.triton.additive import additive_backward, additive_forward
from seqkern.triton.attention import INTERPRET, attention_backward, attention_forward, attention_weights
from seqkern.triton.config import Config, tune, use_tuned

__all__ = [
    "INTERPRET",
    "Config",
    "additive_backward",
    "additive_forward",
    "attention_backward",
    "attention_forward",
    "attention_weights",
    "tune",
    "use_tuned",
]
