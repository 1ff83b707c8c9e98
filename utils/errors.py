"""How a program ends that cannot go on: in one line on stderr.

A traceback is for what is wrong in the program; a full disk, a closed pipe or Ctrl-C is not.
"""

import contextlib
import errno
import os
import re
import signal
import sys
import time
from typing import NoReturn

# what moves a terminal's cursor, colours it or turns its text round
CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
OUTSIDE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.EPIPE, errno.EMFILE, errno.ENFILE,
}  # fmt: skip
RANK = os.environ.get("RANK", "0")  # under torchrun
PATIENCE = 10  # seconds
NO_MEMORY = re.compile("out of memory|allocate memory|not enough memory", re.IGNORECASE)


def visible(text: str) -> str:
    """Text from data as a terminal may show it, control characters spelled out."""
    return CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def stop(message: str) -> NoReturn:
    """Leave with one sentence on stderr and exit status 1. Of several processes, which mostly come
    to the same refusal, the first says it; torchrun then ends the others, which wait for that. What
    one of them meets alone it says itself."""
    said = f"error: {visible(message)}"
    if RANK != "0":
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(1))
        time.sleep(PATIENCE)
        said += f" (process {RANK})"
    raise SystemExit(said)


def say(line: str) -> None:
    """On the stderr that the program began with, past any progress bar."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it may be gone too
        print(visible(line), file=sys.__stderr__, flush=True)


def silence() -> None:
    """Nobody reads stdout any more: what is still written there goes nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave(number: int, _frame: object = None) -> NoReturn:
    """Leave at once with one line, as signal `number` asks. No exception does it: one that is
    raised in a destructor is lost, and the program goes on."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if sys.__stdout__.isatty():
            print("\x1b[?25h", file=sys.__stdout__)  # a progress bar has hidden the cursor
        sys.__stdout__.flush()
    if RANK == "0":
        say(f"stopped by {signal.Signals(number).name}")
    os._exit(128 + number)


def one_sentence(kind: type, error: BaseException, trace: object) -> None:
    """`sys.excepthook` of a command."""
    if isinstance(error, OSError) and error.errno in OUTSIDE:
        if error.errno != errno.EPIPE:  # a reader who has left knows why
            say(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror}")
    elif isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
        say(
            f"error: not enough memory ({str(error).strip()[:200] or kind.__name__}); a smaller "
            "--micro-batch-size, --rollout-batch-size or model needs less"
        )
    elif isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("utils"):
        say(f"error: {error} (pip install -r requirements.txt)")
    else:
        sys.__excepthook__(kind, error, trace)
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        silence()


def begin() -> None:
    """What a command does first: Ctrl-C and SIGTERM are one line; a character
    that the terminal lacks is no reason to end; a stdout that cannot be written shows at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    sys.excepthook = one_sentence


def first_line(error: Exception) -> str:
    """What an error says, or at least its kind."""
    words = re.sub(r"\s+", " ", str(error).strip().split("\n", 1)[0])[:300]
    return words or type(error).__name__
