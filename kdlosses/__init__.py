"""What kdjax and kdtorch share and what needs neither framework: trees of arrays, the file format, layers, pages.

`python -m kdlosses` lists the losses and says which package has them. The losses themselves are in `kdjax` and `kdtorch`.
"""

import importlib.metadata

try:
    __version__ = importlib.metadata.version("kdlosses")
except importlib.metadata.PackageNotFoundError:  # a tree that is not installed
    __version__ = "unknown"
