"""What kdjax and kdtorch share when something crosses between them: trees, names and axes of weights, files. NumPy alone."""
