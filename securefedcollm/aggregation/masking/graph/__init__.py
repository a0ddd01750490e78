"""Pairwise masks between neighbours in a random graph: for cohorts beyond a complete graph."""
