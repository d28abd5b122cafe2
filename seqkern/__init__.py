"""The layers of the classic sequence models as drop-ins for torch.nn, each on a kernel written for it."""

import warnings

from seqkern import _extension
from seqkern.info import info

__version__ = "0.1.0"

__all__ = ["__version__", "info"]

if not _extension.AVAILABLE:
    warnings.warn(f"seqkern runs on its eager backend only: {_extension.WHY_NOT}", stacklevel=2)
