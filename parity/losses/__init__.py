"""The losses, one per file: the formula in NumPy with plain loops, and the rows of the table of losses.

A formula takes arrays of examples (no leading axes, no mask) and returns one value for each example, and the next state
if it has one. It imports neither package. It must work with complex numbers: a derivative is the imaginary part of the
value after a tiny imaginary step of an input, which avoids the rounding error of a difference. Everything that is
constant for the gradient goes through `constant` of `parity.losses._plain`.

`LOSSES` contains the rows of all files in this folder, in the order of the file names.
"""

import importlib
import pkgutil

from parity.row import Loss

_FILES = sorted(file.name for file in pkgutil.iter_modules(__path__) if not file.name.startswith("_"))

LOSSES: tuple[Loss, ...] = tuple(row for name in _FILES for row in importlib.import_module(f"{__name__}.{name}").ROWS)
