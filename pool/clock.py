"""Monotonic time for idle and age limits; a test replaces it."""

from time import monotonic

__all__ = ["monotonic"]
