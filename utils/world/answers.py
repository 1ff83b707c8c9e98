"""Answer checking: find the final answer in a completion and compare it with the reference.

Three kinds of answers: mathematics (`is_correct`), options with letters (`choose`) and short
answers in words (`same_words`). `python benchmark/checks/answers.py` counts what they get wrong.
"""

import atexit
import json
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?|-?\.\d+")
PLAIN = re.compile(
    r"(?P<sign>[-+\u2212]?)\s*(?P<mixed>\d+\s+(?=\d+/))?(?P<whole>\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?P<decimals>\.\d+)?"
    r"(?:/(?P<below>\d+))?(?:[eE](?P<power>[-+]?\d{1,3}))?(?P<percent>\s*(?:%|percent))?(?P<unit>\s+[a-zA-Z]{1,}[A-Za-z ]*(?:\^?[23])?)?"
)  # fmt: skip
DECORATION = re.compile(
    r"\\?\$|\\?(?=%)|\\(?:text|mathrm|mbox)\{([^}]*)\}|\\[,;! ]|\^?\\circ|°|(?<=\d)\{,\}(?=\d)"
)
# Words behind a number that are no unit: they go on with the expression.
NO_UNIT = re.compile(
    r"\b(?:[a-zA-Z]|pi|sqrt|plus|minus|times|over|or|and|to|hundred|thousand|million|billion|trillion|am|pm|[ap]m)\b",
    re.I,
)
UNIT_LETTERS = {"m", "g", "s", "h", "l"}  # units of one letter
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
QUOTES = "$*\"'` \n"
LETTER = r"\(?\s*\**([A-Z])\**"
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
TIME_LIMIT = 5.0  # seconds for one comparison; only pathological expressions need more than a few milliseconds


def after_thinking(text: str) -> str:
    """What follows the last `</think>`; nothing where a thought was begun and not ended."""
    return "" if "<think>" in text.rsplit("</think>", 1)[-1] else text.rsplit("</think>", 1)[-1]


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


def hashed(text: str) -> bool:
    """Whether the last `####` marks an answer; before a box or an "answer:" it is a heading."""
    return "####" in text and not re.search(
        r"boxed\{|answer(?:\s+is\b|\W{0,3}:)", text.rsplit("####", 1)[1], re.IGNORECASE
    )


def stated(text: str) -> str | None:
    r"""The final answer of a solution as it marks it: the line after the last `####`, else the last
    `\boxed{}`, else what follows the last "answer is" or "answer:". None where nothing is marked,
    "" where nothing follows."""
    if hashed(text):
        return text.rsplit("####", 1)[1].strip().split("\n", 1)[0].strip()
    if (found := boxed(text)) is not None:
        return found.strip()
    marks = list(re.finditer(r"answer(?:\s+is\b|\W{0,3}:)[\s:*]*", text, flags=re.IGNORECASE))
    return text[marks[-1].end() :].split("\n", 1)[0].strip().rstrip("*").strip() if marks else None


def extract(text: str) -> str | None:
    """The final answer of a solution in mathematics: the one that it marks, else its last number;
    None where there is none."""
    text = after_thinking(text)
    claim = stated(text)
    if claim is None:
        numbers = NUMBER.findall(text)
        return numbers[-1] if numbers else None
    if hashed(text) or "\\boxed{" in text:
        return claim or None
    claim = claim.strip("* ")
    formula = re.match(
        r"\$+(.+?)\$+|\\\((.+?)\\\)|\\\[(.+?)\\\]", claim
    )  # "$12$. I hope it is correct."
    if formula:
        return next(group for group in formula.groups() if group is not None).strip()
    claim = claim.rstrip("$ ").rstrip(".").strip("* ")
    number = re.match(
        rf"({NUMBER.pattern})(?=$|%|[.,;:!]?\s|[.!]$)", claim
    )  # "19. I checked it" is 19; "3x+2" is not 3
    rest = claim[number.end() :] if number else ""
    goes_on = r"\s*(?:[-+*/^=(\\\u00d7\u00b7]|x\s*10|\d+/\d|\$?\\)|\s+(?:or|and|pi|to)\b"
    if number and not re.match(goes_on, rest):
        return number[1] + "%" * bool(re.match(r"%| percent", claim[number.end() :]))
    numbers = NUMBER.findall(claim)
    if len(numbers) == 1 and "\\" not in claim and len(re.findall(r"[A-Za-z]{2,}", claim)) > 1:
        return numbers[0]  # a sentence: "that he has 12 left"
    return claim or None


def to_number(text: str) -> Fraction | None:
    """The value of a plain number ("1,234", "$12.50", "3/4", "1 1/2", "1e3", "15 apples", "7.";
    "50%" is 50); None for anything else."""
    text = DECORATION.sub(lambda m: m[1] or "", text).strip().strip("*").rstrip(".").strip()
    match = PLAIN.fullmatch(text) if len(text) < 100 else None
    if match is None or not is_unit(match["unit"] or ""):
        return None
    value = Fraction((match["whole"].replace(",", "") or "0") + (match["decimals"] or ""))
    if match["below"] is not None:
        if int(match["below"]) == 0:
            return None
        value = int(match["mixed"] or 0) + value / int(match["below"])
    value *= Fraction(10) ** int(match["power"] or 0)
    return -value if match["sign"] in ("-", "\u2212") else value


def is_unit(words: str) -> bool:
    """Whether the words behind a number can be its unit, and not the rest of an expression ("2 pi",
    "3 or 4", "5 million")."""
    return words.strip() in UNIT_LETTERS or not NO_UNIT.search(words)


def unit(text: str) -> str:
    """The unit behind a plain number, in lower case and the singular; "" where there is none."""
    found = re.search(r"\d\s+([A-Za-z][A-Za-z ]*)", DECORATION.sub(lambda m: m[1] or "", text))
    return found[1].strip().lower().rstrip("s") if found else ""


def same_answer(given: str, wanted: str) -> bool:
    """Whether two final answers are equal: as numbers where both are plain numbers, else as
    mathematics (math-verify, within TIME_LIMIT). 50% is 50 and 0.5."""
    values = to_number(given), to_number(wanted)
    if None not in values:
        percent = ["%" in text or "percent" in text for text in (given, wanted)]
        units = [unit(text) for text in (given, wanted)]
        if "" not in units and units[0] != units[1] and "percent" not in units:
            return False
        scaled = [
            value / 100 if is_percent else value
            for value, is_percent in zip(values, percent, strict=True)
        ]
        return values[0] == values[1] or (percent[0] != percent[1] and scaled[0] == scaled[1])
    return given.strip() == wanted.strip() or same_mathematics(given.strip(), wanted.strip())


def is_correct(completion: str, answer: str) -> bool:
    """Whether the completion's final answer is the reference's. `answer` may be a bare answer or a
    worked solution that ends in one (`#### n` or `\\boxed{}`)."""
    given = extract(completion)
    if given is None:
        return False
    marked = "####" in answer or "\\boxed{" in answer
    wanted = extract(answer) if marked else answer.strip()
    return bool(wanted) and same_answer(given, wanted)


def normal(words: str) -> str:
    """Words without case, articles, punctuation, LaTeX wrapping and surplus blanks."""
    words = re.sub(r"\\(?:text|mathrm|mbox|textbf)\{([^}]*)\}", r"\1", words).lower()
    return " ".join(ARTICLES.sub(" ", re.sub(r"[^\w\s.%/+<>=-]|[.](?!\d)", " ", words)).split())


def same_words(given: str, wanted: str) -> bool:
    """Whether two short answers are equal: as plain numbers, else in their words."""
    values = to_number(given), to_number(wanted)
    if None not in values and not (unit(given) and unit(wanted)):
        return values[0] == values[1]
    return bool(normal(wanted)) and normal(given) == normal(wanted)


def short_answer(text: str) -> str | None:
    """The short answer of a completion: the one that it marks, without the remarks behind it, else
    its last line."""
    text = after_thinking(text).strip()
    claim = stated(text)
    if claim is None:
        claim = text.rsplit("\n", 1)[-1]
    elif not hashed(text) and "\\boxed{" not in text:
        claim = re.split(r"[.!;](?:\s|$)", claim, maxsplit=1)[0]
    return claim.strip("*$\"' ").rstrip(".").strip() or None


def choose(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a completion takes, None where it takes none or several. Looked
    for in this order: in the answer that it marks, a letter ("(B)", "B.", "B: gills") or the words
    of one option; the same in the whole text, if that is short; "option B", "(B)", the last of
    them."""
    text = after_thinking(text).strip()
    letters = LETTERS[: len(options)]
    claim = stated(text)
    whole = text if claim is None else claim
    whole = re.sub(r"\\(?:text|mathrm|mbox|textbf)\{([^}]*)\}", r"\1", whole).strip(QUOTES)
    whole = re.sub(
        r"^(?:the )?(?:(?:correct|best|right) )?(?:option|choice|answer)\s+(?:is\s+)?",
        "",
        whole,
        flags=re.IGNORECASE,
    )
    whole = whole.rstrip(".").strip(QUOTES)
    first = short_answer(text) if claim is not None else whole
    if len(whole) > 1:  # a lone letter is a letter, even where an option reads like it
        for words in (first or "", whole):
            for form in (
                str,
                str.lower,
                normal,
            ):  # the closest reading that belongs to one option alone
                fitting = [
                    letter
                    for letter, option in zip(letters, options, strict=False)
                    if form(option.strip().rstrip(".")) == form(words)
                ]
                if len(fitting) == 1 and form(words):
                    return fitting[0]
    brief = claim is not None or ("\n" not in text and len(text) < 100)
    match = re.match(rf"(?!I,){LETTER}\s*(?:[).:,;]|$|(?=\u2014| - ))", whole) or re.fullmatch(
        r"\(?([a-z])[).]?", whole
    )
    if match and brief and match[1].upper() in letters:
        other = re.match(rf"\s*(?:or|and|/|,)?\s*{LETTER}(?![A-Za-z])", whole[match.end() :])
        return None if other else match[1].upper()
    match = re.fullmatch(rf"{LETTER}\s+(.+)", whole, flags=re.DOTALL)  # "B lungs"
    if (
        match
        and match[1] in letters
        and normal(match[2]) == normal(options[letters.index(match[1])]) != ""
    ):
        return match[1]
    if (
        match := re.match(rf"{LETTER}(?:\s+because|\s+since|\s+is\s+(?:right|correct))\b", whole)
    ) and brief:
        return match[1] if match[1] in letters else None
    found = re.findall(
        r"\b(?:[Oo]ption|[Cc]hoice)\s+\(?([A-Z])\b|\(([A-Z])\)(?![\w-])|\b(?:[Tt]herefore,?|[Ss]o,?|[Hh]ence,?)\s+([A-Z])\b(?! \w+s\b)",
        text,
    )
    found = [a or b or c for a, b, c in found if (a or b or c) in letters]
    return found[-1] if found else None


# --- mathematics beyond plain numbers, in a process of its own, which can be killed ---


class Verifier:
    """math-verify behind a pipe. A comparison that takes longer than TIME_LIMIT is false and its
    process is killed, whatever it is doing; so this works from any thread, where limits by signals
    do not, and also inside long integer arithmetic."""

    def __init__(self):
        self.lock, self.process = threading.Lock(), None

    def start(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        code = f"import sys; sys.path[0] = {root!r}; from utils.world.answers import serve; serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,  # Ctrl-C in the terminal is for the run, not for this process
        )  # fmt: skip
        if not self.process.stdout.readline():  # importing is not part of the limit
            raise RuntimeError("the process that compares mathematics could not be started")

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def __call__(self, given: str, wanted: str) -> bool:
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.start()
            timer = threading.Timer(TIME_LIMIT, self.process.kill)
            timer.start()
            try:
                self.process.stdin.write(json.dumps([given, wanted]) + "\n")
                self.process.stdin.flush()
                verdict = self.process.stdout.readline()  # "" once it is killed
            except OSError:
                verdict = ""
            timer.cancel()
            if not verdict:
                self.stop()
            return verdict.strip() == "true"


verifier = Verifier()
atexit.register(verifier.stop)


@lru_cache(maxsize=100_000)
def same_mathematics(given: str, wanted: str) -> bool:
    """Whether two expressions are equal as mathematics (math-verify)."""
    return max(len(given), len(wanted)) < 1000 and verifier(given, wanted)


def serve() -> None:
    """The verifier's process: a pair of expressions a line on stdin, true or false on stdout."""
    import logging

    from math_verify import parse, verify

    logging.disable(logging.WARNING)  # it warns that its own limits are off
    print("ready", flush=True)
    for line in sys.stdin:
        guess, gold = (parse(f"\\boxed{{{x}}}", parsing_timeout=None) for x in json.loads(line))
        print(
            json.dumps(bool(gold and guess) and bool(verify(gold, guess, timeout_seconds=None))),
            flush=True,
        )
