"""The losses, one a file: the formula in NumPy with plain loops, and the rows of the table of losses.

A formula takes arrays of examples (no leading axes, no mask) and returns one value for each example, and the next state
if it has one. It imports neither package. It is written so that complex numbers pass through: a derivative is the
imaginary part of the value at an input moved by a tiny imaginary step, which has no rounding error of a difference. What
is constant to the gradient goes through `constant` of `parity.losses._plain`.

`LOSSES` is the rows of all files of this folder, in the order of their names.
"""

import importlib
import pkgutil

from parity.row import Loss

_FILES = sorted(file.name for file in pkgutil.iter_modules(__path__) if not file.name.startswith("_"))

LOSSES: tuple[Loss, ...] = tuple(row for name in _FILES for row in importlib.import_module(f"{__name__}.{name}").ROWS)
