"""Sums under pairwise masks (Bonawitz et al., CCS 2017)."""
