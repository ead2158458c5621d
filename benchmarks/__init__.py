"""Speed and memory of the losses beside the direct form, measured in the same run: `python -m benchmarks`."""
