"""Malicious servers and silos against the real state machines of the aggregation."""
