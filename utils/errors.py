"""The one way in which a run refuses bad input."""

from typing import NoReturn


def stop(message: str) -> NoReturn:
    """Leave with one sentence on stderr and exit status 1."""
    raise SystemExit(f"error: {message}")
