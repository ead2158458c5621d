"""Check that kdjax, kdtorch and the formula agree, and that your own function in JAX agrees with its port in PyTorch.

`python -m parity` compares every loss of the table (`cases`) in both packages with each other and with the oracle.
`compare`, `assert_parity` and `compare_modules` do the same for any pair of functions or models.
"""

from parity.compare import Comparison, Difference
from parity.functions import assert_parity, compare
from parity.modules import compare_modules

__all__ = ["Comparison", "Difference", "assert_parity", "compare", "compare_modules"]
