"""Is kdjax equal to kdtorch, and both to the formula? A table of cases, an oracle, a runner and a comparer."""
