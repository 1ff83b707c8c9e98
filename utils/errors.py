"""The one way in which a run refuses bad input."""

import os
from typing import NoReturn


def stop(message: str) -> NoReturn:
    """Leave with one sentence on stderr and exit status 1. Of several processes, which all come to
    the same refusal, one says it."""
    raise SystemExit(f"error: {message}" if os.environ.get("RANK", "0") == "0" else 1)
