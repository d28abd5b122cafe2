"""Triton kernels: imported only where they run, since `import seqkern` loads no Triton.

attention.py launches (attention_forward, attention_weights, attention_backward); forward.py, weights.py,
backward.py
and tiles.py hold the kernels; config.py says in what tiles they work and tunes that. additive.py has additive
attention's kernels and launchers, crf.py the conditional random field's.
"""

from seqkern.triton.additive import additive_backward, additive_forward
from seqkern.triton.attention import attention_backward, attention_forward, attention_weights
from seqkern.triton.config import Config, tune, use_tuned
from seqkern.triton.crf import crf_backward, crf_decode, crf_forward
from seqkern.triton.tiles import INTERPRET

__all__ = [
    "INTERPRET",
    "Config",
    "additive_backward",
    "additive_forward",
    "attention_backward",
    "attention_forward",
    "attention_weights",
    "crf_backward",
    "crf_decode",
    "crf_forward",
    "tune",
    "use_tuned",
]
