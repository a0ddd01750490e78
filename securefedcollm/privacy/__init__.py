"""Clip and quantise, exact noise, accounting, and the budget ledger (see ``docs/privacy.md``)."""
