"""How samples lie to each other: losses between pairs of samples."""
