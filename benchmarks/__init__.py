"""Speed and memory of the losses compared with the direct forms, measured in the same run: `python -m benchmarks`."""
