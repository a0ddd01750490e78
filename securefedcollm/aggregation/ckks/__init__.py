"""Sums under homomorphic encryption (CKKS): what both key models share."""
