"""Verify a bundle offline: without torch, the server, or anybody who ran the study."""
