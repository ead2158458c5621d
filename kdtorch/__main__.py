"""`python -m kdtorch` lists the losses, `python -m kdtorch show NAME` prints the page of one."""

import sys

from kdlosses import pages

if __name__ == "__main__":
    sys.exit(pages.main("kdtorch", ["kdtorch"]))
