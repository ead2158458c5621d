"""`python -m kdlosses` lists the losses and says which package has them; `… show NAME` prints the page of one."""

import sys

from kdlosses import pages

if __name__ == "__main__":
    sys.exit(pages.main("kdlosses", ["kdjax", "kdtorch"]))
