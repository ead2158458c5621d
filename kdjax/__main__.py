"""`python -m kdjax` lists the losses, `python -m kdjax show NAME` prints the page of one."""

import sys

from kdlosses import pages

if __name__ == "__main__":
    sys.exit(pages.main("kdjax", ["kdjax"]))
