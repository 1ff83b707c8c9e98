"""How a program ends that cannot go on: in one sentence, on stderr.

A traceback is for what is wrong in the program; a full disk, a closed pipe or Ctrl-C is not.
"""

import contextlib
import errno
import os
import re
import signal
import sys
from typing import NoReturn

# what moves a terminal's cursor, colours it or turns its text round
CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
OUTSIDE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EPIPE,
    errno.EMFILE, errno.ENFILE,
}  # fmt: skip
NO_MEMORY = re.compile("out of memory|allocate memory|not enough memory", re.IGNORECASE)


def visible(text: str) -> str:
    """Text from data as a terminal may show it, control characters spelled out."""
    return CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def stop(message: str) -> NoReturn:
    """Leave with one sentence on stderr and exit status 1. Of several processes, which all come to
    the same refusal, one says it."""
    said = f"error: {visible(message)}"
    raise SystemExit(said if os.environ.get("RANK", "0") == "0" else 1)


def say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr may be gone too
        print(visible(line), file=sys.stderr, flush=True)


def silence() -> None:
    """Nobody reads stdout any more: what is still written there goes nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def begin() -> None:
    """What a command does first: SIGTERM is one line, as Ctrl-C is; a character that the terminal
    does not have is no reason to end; and a stdout that cannot be written shows at once."""
    signal.signal(signal.SIGTERM, leave)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace", line_buffering=True)


def leave(number: int, _frame: object = None) -> NoReturn:
    """Leave with one line, as signal `number` asks; the next signal ends what is left to do."""
    unhandled()
    say(f"stopped by {signal.Signals(number).name}")
    raise SystemExit(128 + number)


def unhandled() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def one_sentence(kind: type, error: BaseException, trace: object) -> None:
    """`sys.excepthook`. (After Ctrl-C Python ends itself by SIGINT, which a shell shows as 130.)"""
    if issubclass(kind, KeyboardInterrupt):
        unhandled()
        say("stopped by SIGINT")
    elif isinstance(error, OSError) and error.errno in OUTSIDE:
        if error.errno != errno.EPIPE:  # a reader who has left knows why
            say(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror}")
    elif isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
        say(
            f"error: not enough memory ({str(error).strip()[:200] or kind.__name__}); a smaller "
            "--micro-batch-size, --rollout-batch-size or model needs less"
        )
    else:
        sys.__excepthook__(kind, error, trace)
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        silence()


sys.excepthook = one_sentence
