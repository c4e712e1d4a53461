"""What a user is told."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line for the user."""
