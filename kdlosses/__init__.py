"""The code that kdjax and kdtorch share and that needs neither framework: trees of arrays, files, layers, pages.

`python -m kdlosses` lists the losses and says which package has them. The losses themselves are in `kdjax` and `kdtorch`.
"""

import importlib.metadata

try:
    __version__ = importlib.metadata.version("kdlosses")
except importlib.metadata.PackageNotFoundError:  # the source tree is not installed
    __version__ = "unknown"
