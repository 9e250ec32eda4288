"""Engines: the contract, the backends, and how a name becomes one."""
