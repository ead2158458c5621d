"""`python -m kdtorch` lists the losses, `python -m kdtorch show NAME` prints the page of one."""

import sys

import kdtorch
from kdlosses import pages
from kdtorch.make_loss import PUBLISHED

if __name__ == "__main__":
    sys.exit(pages.main(kdtorch, PUBLISHED))
