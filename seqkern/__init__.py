"""The layers of the classic sequence models as drop-ins for torch.nn, each on a kernel written for it.

seqkern.LSTM, GRU, RNN and their cells: torch.nn's constructors, parameters, results and gradients.
"""

import warnings

from seqkern import _extension, nn, ops, reference
from seqkern.info import info
from seqkern.nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from seqkern.ops import use_backend

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "__version__",
    "info",
    "nn",
    "ops",
    "reference",
    "use_backend",
]

if not _extension.AVAILABLE:
    warnings.warn(f"seqkern runs on its eager backend only: {_extension.WHY_NOT}", stacklevel=2)
