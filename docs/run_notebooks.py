"""Run the notebooks of docs/notebooks, and store their outputs in them.

    python docs/run_notebooks.py                       # in place
    python docs/run_notebooks.py FOLDER [NAME ...]     # write these, or all, into a folder

Everything must be installed already: pip runs dry in the cell that installs, and needs no network.
"""

import os
import pathlib
import sys

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = pathlib.Path(__file__).parent / "notebooks"


def main(folder: str = str(NOTEBOOKS), *names: str) -> None:
    os.environ.pop("MPLBACKEND", None)  # pictures go into the notebook
    os.environ |= {"PIP_DRY_RUN": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}  # 0 means without
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if not names or path.stem in names:
            notebook = nbformat.read(path, as_version=4)
            place = {"metadata": {"path": str(NOTEBOOKS)}}
            NotebookClient(notebook, timeout=300, resources=place, record_timing=False).execute()
            notebook.metadata = {"kernelspec": notebook.metadata.kernelspec}  # without the metadata of this machine
            nbformat.write(notebook, pathlib.Path(folder, path.name))


if __name__ == "__main__":
    main(*sys.argv[1:])
