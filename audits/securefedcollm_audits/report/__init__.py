"""The privacy report of a run: every number with its evidence entry."""
