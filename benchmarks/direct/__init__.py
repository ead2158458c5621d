"""Each loss as its formula is written, in eager PyTorch: the baseline of the benchmarks, not a thing to use.

The arrays that a formula names are built, the loops that it writes are run. Arguments and results are those of the
function of the same name in kdtorch, without masks and reductions. A loss has a file here where its speed is claimed;
the functions of all files are attributes of this package.
"""

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_file.name}")
    globals().update({name: x for name, x in vars(_module).items() if name.endswith("_loss") or name == _file.name})
