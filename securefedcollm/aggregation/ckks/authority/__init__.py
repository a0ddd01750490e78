"""CKKS under keys that a separate party, the authority, holds."""
