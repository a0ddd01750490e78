"""Sums under homomorphic encryption (CKKS): parameters, polynomials, keys."""
