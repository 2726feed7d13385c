"""Leasehold: a distributed MCP session pool. Any worker answers any request."""

__version__ = "0.1.0"
