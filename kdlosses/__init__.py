"""What kdjax and kdtorch share: trees, names and axes of weights, files, pages on a terminal. It imports neither framework."""
