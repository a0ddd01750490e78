"""Attacks on the noise, on a silo's updates and on the tuned model: each bounds ε from below."""
