"""Answer checking: find the final answer in a completion and compare it with the reference."""

import re
import threading
from fractions import Fraction

from math_verify import parse, verify

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?|-?\.\d+")
DECORATION = re.compile(r"\\?[$%]|\\(?:text|mathrm|mbox)\{[^}]*\}|\\[,;! ]|°")


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, nested braces included."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for end in range(begin, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[begin:end]
    return None


def extract(text: str) -> str | None:
    r"""The final answer of a solution: after the last `####`, else in the last `\boxed{}`, else after the last "answer is",
    else the last number. None where there is nothing of the kind."""
    if "####" in text:
        found = text.rsplit("####", 1)[1].strip().split("\n", 1)[0]
        return found.strip() or None
    found = boxed(text)
    if found is not None:
        return found.strip() or None
    stated = re.findall(r"answer(?: is|:)\s*:?\s*([^\n]+)", text, flags=re.IGNORECASE)
    if stated:
        claim = stated[-1].strip().strip("*$ ").rstrip(".")
        number = re.match(
            rf"({NUMBER.pattern})(?=$|[.,;:!]?\s|[.!]$)", claim
        )  # "19. I checked it" is 19; "3x+2" is not 3
        return number[1] if number and not re.match(r"\s*[-+*/^=(]", claim[number.end() :]) else claim or None
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else None


def to_number(text: str) -> Fraction | None:
    """The value of a plain number ("1,234", "$12.50", "3/4", "15 apples", "7."); None for anything else."""
    text = DECORATION.sub("", text).strip().strip("*").rstrip(".").strip()
    match = re.fullmatch(r"(-?)\s*(\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(\.\d+)?(?:/(\d+))?(?:\s+[A-Za-z][A-Za-z ]*)?", text)
    if match is None:
        return None
    sign, whole, decimals, denominator = match.groups()
    value = Fraction((whole.replace(",", "") or "0") + (decimals or ""))
    if denominator is not None:
        if int(denominator) == 0:
            return None
        value /= int(denominator)
    return -value if sign else value


def same_answer(given: str, wanted: str) -> bool:
    """Whether two final answers are equal: as numbers where both are plain numbers, else as mathematics (math-verify)."""
    given_value, wanted_value = to_number(given), to_number(wanted)
    if given_value is not None and wanted_value is not None:
        return given_value == wanted_value
    if given.strip() == wanted.strip():
        return True
    # math-verify limits its time with a signal, which Python only allows in the main thread
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    gold, guess = (parse(f"\\boxed{{{x}}}", parsing_timeout=limit) for x in (wanted, given))
    return bool(gold and guess) and bool(verify(gold, guess, timeout_seconds=limit))


def is_correct(completion: str, answer: str) -> bool:
    """Whether the completion's final answer is the reference's. `answer` may be a bare answer or a worked solution that
    ends in one (`#### n` or `\\boxed{}`)."""
    given = extract(completion)
    if given is None:
        return False
    marked = "####" in answer or "\\boxed{" in answer
    wanted = extract(answer) if marked else answer.strip()
    return bool(wanted) and same_answer(given, wanted)
