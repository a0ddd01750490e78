"""The front door: what the package's top level offers, in functions of plain arguments.

Everything here is a few lines over the rooms behind it, and does what the command line does. Paths
may be strings. Errors are :class:`~securefedcollm.errors.SecureFedCoLLMError` with a ``hint``.
"""
