"""Is kdjax equal to kdtorch, and both to the formula? And is anybody's function in JAX equal to its port in PyTorch?

`python -m parity` compares every loss of the table (`cases`) in both packages with each other and with the oracle.
`compare`, `assert_parity` and `compare_modules` do so for any pair of functions or models.
"""

from parity.compare import Comparison, Difference
from parity.functions import assert_parity, compare
from parity.modules import compare_modules

__all__ = ["Comparison", "Difference", "assert_parity", "compare", "compare_modules"]
