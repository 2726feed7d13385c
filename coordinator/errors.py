"""Errors of the coordinator; each says whether what was asked for may have happened."""

from __future__ import annotations


class CoordinatorError(Exception):
    """Base of everything the coordinator raises on purpose."""


class Unavailable(CoordinatorError):
    """Raised when Redis cannot be reached, refuses writes or answers too late.

    Whether what was asked for was done is not known.
    """


class SealError(CoordinatorError):
    """Raised when sealed bytes were not made by this fleet, or not for this purpose. Carries no detail on purpose."""


class FrameError(CoordinatorError):
    """Raised when bytes inside a sealed envelope are no frames; a peer of another version, or a bug."""
