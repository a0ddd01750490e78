"""Sums under homomorphic encryption (CKKS): the common parts of both key models."""
