"""securefedcollm: federated co-tuning of a server's LLM and its silos' SLMs, privacy checkable.

The rooms, in the order in which one update walks through them: ``study`` (what everybody agreed),
``tuning`` (the only one with torch), ``privacy``, ``aggregation``, ``evidence`` and ``federation``
(the loops that join them). See ``docs/`` for the threat model and the protocol.
"""

__version__ = "0.1.0"
