"""Each loss written directly from its formula in eager PyTorch: the baseline of the benchmarks, not meant for use.

A direct form builds all arrays of the formula and runs its loops. Arguments and results are those of the function of
the same name in kdtorch, without masks and reductions. A loss has a file in this folder if a speed is claimed for it.
The functions of all files are attributes of this package.
"""

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_file.name}")
    globals().update({name: x for name, x in vars(_module).items() if name.endswith("_loss") or name == _file.name})
