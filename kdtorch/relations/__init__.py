"""Relational losses: losses between pairs of samples."""
