"""Comparisons of runs: all rows of an experiment over several seeds, or finished runs."""
