"""CKKS under keys that one party of its own holds."""
