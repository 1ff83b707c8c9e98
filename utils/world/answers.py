"""Answer checking: find the final answer of a completion and compare it with the reference.

math-verify reads and compares mathematics; here stands what it does not know. docs/answers.md gives
the reason of every rule."""

import faulthandler
import json
import re
import subprocess
import sys
import threading
import time
import unicodedata
import warnings
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LONGEST, LONGEST_ANSWER = 5_000, 400  # characters that are read: the last of a text, of an answer
TIME_LIMIT, ALLOWANCE, REFUND = 3.0, 10.0, 0.1  # seconds: a comparison, all, back for each

# fmt: off
# --- one spelling for what can be written in several ways ---
SIGNS = r"×\times ÷\div ·\cdot ⋅\cdot ≤\le ≥\ge ≠\ne ∞\infty ∪\cup ∩\cap ∅\emptyset ±\pm ∈\in"
SIGNS = (SIGNS + r' °^\circ −- –- ‐- —-- “ ” „ « » " `').split()
SIGNS = {sign[0]: sign[1:] + " " * (len(sign) > 2) for sign in SIGNS}
FONT = r"\\(?:text\w*|math(?:rm|bf|it|sf)|mbox|emph|bm|boldsymbol|ce) *\{([^{}]*)\}"
TRIG = r"(\\(?:sin|cos|tan)(?:\^\{?\d\}?)?[ ({]*)([\d.]+|[a-z])[ )}]*\^ *(?:\\circ|\{\\circ *\})"
PERIOD = r"\b(\d{1,9})\.(\d{0,9})\\(?:overline|bar|dot) *(?:\{(\d{1,9})\}|(\d))"
ROOT = r"\\sqrt\{(?:(\w+)/(\w+)|\\frac\{([^{}]*)\}\{([^{}]*)\})\}"
SPELLINGS = [(re.compile(pattern), new) for pattern, new in (  # in this order
    (r"</?[a-z]{1,6}>|\\(?:!|left(?!a)|right(?!a))|(?<![\w)])(?:\*\*|__)|(?:\*\*|__)(?![\w(])", ""),
    (r"\\(?:begin|end)\{(?:equation|align|gather)(?:ed)?\*?\}|(?<=\n) *[-*•>] +", ""),  # bullets
    (rf"(?<=[\d}}]){FONT}", r" \1"), (FONT, r"\1"), (r"(?<=\S)[ \t]{2,}", " "), (r"[€£¥₹₩₽₱¢]", ""),
    (TRIG, r"\1{(\2\\pi/180)}"), (r"(?<![\\A-Za-z])(?=(?:pi|sin|cos|tan|log)(?![A-Za-z]))", r"\\"),
    (r"√ ?(\d+|[a-z])|(?:√|\\?sqrt) ?\(([^()]*)\)", r"\\sqrt{\1\2}"),
    (ROOT, r"\\frac{\\sqrt{\1\3}}{\\sqrt{\2\4}}"), (r"\\varnothing", r"\\emptyset "),
    (r"\\\$|\b[A-Z]{1,2}\$(?=\d)|\b(?:USD|EUR|GBP|CHF|Rs\.?) ?(?=\d)|\\(?:pounds|euro)\b", ""),
    (r"\$\$?(?=[^\s$])([^$]*[^\s$])\$\$?(?!\d)", r"\\(\1\\)"), (r"\$", ""),  # pandoc's rule; money
    (r"(?<!\\)\\[,;: ]|~|\\q?quad\b", " "), (r" ?\\?%| per ?cent\b", "%"),
    (r"\\\{ *\w *(?:\\in *\\mathbb\{\w\} *)?(?:[:|]|\\mid)([^{}]*)\\\}", r"\1"),  # {x : x > 3}
    (r"(?<![\d.,/])\d{1,3}(?: \d{3})+(?![\d/])", lambda m: m[0].replace(" ", "")),  # 7 500
    (r"(?<![\d./])(\d{1,9}) (\d{1,9}/[1-9]\d{0,8})\b", lambda m: f"{int(m[1]) + Fraction(m[2])}"),
    (r"(\.\d{0,9}?)(\d{1,9}?)\2{2,9}(?:\.\.\.|\\l?dots)", r"\1\\overline{\2}"),  # 0.333...
    (PERIOD, lambda m: str(Fraction(int(m[1] + m[2] + (m[3] or m[4])) - int(m[1] + m[2]),
        int("9" * len(m[3] or m[4]) + "0" * len(m[2]))))),
    (r"(?<=\d) ?(?:x|\*|\\times|\\cdot) *(?=10 ?\^)", r"\\times"), (r" \(?base (\w+)\)?", r"_{\1}"),
    (r"\b(?:an? )?(\w+) (?:of|by) (\d[\d.]*%)", r"\2 \1"),  # an increase of 50%
    (r"\b([aApP])\.?[mM]\b(?:\.(?!\w))?", lambda m: m[1].lower() + "m"),
)]
COUNTS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"""
COUNTS = dict(zip(COUNTS.split(), [*range(20), *range(20, 100, 10)], strict=True))
TIMES = dict(hundred=100, dozen=12, thousand=10**3, million=10**6, billion=10**9, trillion=10**12)
TIMES |= dict(half="1/2", third="1/3", quarter="1/4", fifth="1/5", eighth="1/8", tenth="1/10")
SPELLED, AND = rf"(?:{'|'.join([*sorted(COUNTS)[::-1], *TIMES])})s?\b", "[ -](?:and )?(?:an? )?"
SPELLED = rf"(?i)^(?:\d+(?:\.\d+)?(?={AND}{SPELLED})|(?:an? )?{SPELLED})(?:{AND}{SPELLED})*"
FRACTION = r"\\[dt]?frac(?:\{(\d+)\}\{(\d+)\}|(\d)(\d))"
POWER = r"\\times10 ?\^ ?[{(]?([-+]?\d+)[)}]?"
NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d*)?(?:/0*[1-9]\d*|[eE][-+]?\d{1,3})?%?"
UNIT = r"(.*[\d)}%])(?:(?<=%)| +)((?!and\b)(?:[A-Za-z]{2,}|[mgshl])[A-Za-z /]*(?:\^\{?[23]\}?)?|)"
LIMIT = re.compile(r"(?i)\b(?:or|than|but|except|impossible|unlikely|not?|never|cannot|between"
    r"|least|most|up to|over|under|above|below|exceeds|m(?:in|ax)imum)\b|n't\b|[<>]|\\[lg]e\b")
WORD = re.compile(r"(?<![\\A-Za-z{\d^_])(?!and\b)(?:(?=[a-z]*[aeiou])[a-z]{3,}|[ap]m\b"
    r"|[A-Z](?:[a-z]{2}|[A-Z]))|\d_\{?\(?\w")  # what is no product; numerals to a base
CASED = re.compile(r"(?:([a-zA-Z])(?i:\1))+|[A-Z]{2}|(?=.*[a-z])(?=.*[A-Z].*[A-Z])\w+")  # Rr, CO
SIDES = (r"^(?:(?:\s*[A-Za-z\\][\w{}\\ ]*(?:\([^()=]{1,20}\))? *|(?:\\times|\\div|\\frac"
    r"|[\d\s.,+*/(){}%^-])+)=(?!\s*[a-zA-Z]\s*$))+\s*(?=\S)|(?<=[\d}])\s*=\s*[a-zA-Z]\s*$")
# --- where an answer stands and where it ends ---
BOX = r"(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]{0,99}\}){0,99}\}){0,99}\}){0,400}"
BOX = rf"\\(?:boxed|fbox|framebox(?:\[\w*\])?)\s*(?:\{{({BOX})\}}|(-?[\d.,]*\d|\w))"
BOXES = rf"{BOX}(?:(?:\\[()\[\]]|\s)*,?\s*(?:,|and|or)(?:\\[()\[\]]|\s)*{BOX})*"
HEADING = r"(?im)^[\W_]{0,9}(?:the |my )?(?:(?:final )?answer|final result)\W{0,9}$(?:\s|[-=]{3,})*"
MARK = re.compile(HEADING + r"|(?<!this )(?<!that )\banswers?(?:(?:\s(?!(?:is|are|not|never|cannot)"
    r"\b)\w+){0,6}\s(?:is|are|was|be|equals)\b|\W{0,4}[:=])[\s:*]*")
VALUE = r"(?i)(?:\\[(\[]|\s|\w+ly |about )*(?=[-+(\[{|]*\s*(?:\\[a-z{|]|\.?\d)|[a-z]\s*[=^+*/(-])"
INNER = r"[A-Za-z][^\d\\]* ((?:[-+(]?\.?\d|\\[a-z])\S*(?: [^\d\\]*)?)"  # that she has 12 left
REASON = r"(?i)\n\W{0,9}(?:explanation|reason|because|since|note|it|this|that)\b"
ASIDE = r",\s+(?:which|who|because|since)\b[^.\n]*|\s\([^()]*[A-Za-z]{2}[^()]*\)"
WHOLE = r"\\\(.{1,200}?\\\)|\\\[.{1,200}?\\\]|[(\[{][^()\[\]{}]{1,99}[)\]}]"
REST = re.compile(r"\n|[.!?]\s+(?=(?:I|[A-Z]\S*)\s+[a-z])|(?<=\w{4})[.!?]\s|(?<=[\d)}\]%])(?:[.!?]"
    r"\s|[,;]\s+(?!and\b|or\b|at\b)(?=[A-Za-z]{2}))|[,;:]\s(?:which|who|as|because|since|so|but|it"
    r"|that|for|not|where|i\.e|(?:an?|the)\b(?!.*\band\b))\b|\s\((?=[^()]*[A-Za-z]{2})|\s*--\s"
    r"|\s-\s(?=[a-z]{2})|\s(?:where|due to|because|since|which|as|so|if|when)\s")
JUNK = re.compile(r"^[\s*_'~:≈→]+|[\s.,;:*_'~\u2600-\u27bf\U0001f000-\U0001faff\ufe0f]+$")
# --- options ---
CALLED = r"(?i)^(?:the )?(?:(?:correct|best|right) )?(?:option|choice) (?:is )?"
LETTER = r"(?!I,)[(\[{]?([A-Z])\b(?!')(.*)|\(?([a-z])(?:[).:](?=\s|$)|$)"
SEVERAL = r"\)?\s*(?:,?\s*(?:or|and|&|/)|,(?=\s*\(?[A-Z]\)?(?!\s+[a-z])))\s*\(?[A-Z]\b"
TAKEN = (r"$|[.,:;!?]|\s*-|[)\]}](?! (?:is|are|was|has|does|can)(?:\b|n't|not))|\)? (?:because|as"
    r"|since|for|and not)\b|\)? (?:is|must be|would be) (?:the |my )?(?:right|correct|best|answer)")
LEAD = (r"(?i)[.,;!?\n]\s+|\b(?:so|therefore|thus|hence|it is|it's|(?:must|should) be|choose|pick"
    r"|with|option|choice|but|is(?= \(?(?-i:[A-Z])\b)|and(?= \(?[A-Z]\)? is))\b[:,]?\s*")
# fmt: on


@lru_cache(maxsize=10_000)
def plain(text: str) -> str:
    """The same in one spelling: LaTeX for other characters, no fonts, no currencies."""
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻]+", lambda m: "^{" + m[0] + "}", text[-LONGEST:])
    text = re.sub("[₀-₉]+", r"_{\g<0>}", re.sub("[¼-¾⅐-⅞]", r" \g<0> ", text))
    text = unicodedata.normalize("NFKC", text).replace("⁄", "/").translate(str.maketrans(SIGNS))
    for pattern, new in SPELLINGS:
        text = pattern.sub(new, text)
    return text.strip()


def spelled(match: re.Match) -> str:
    """Number words in digits: "twenty-one", "5 million", "2 and a half"."""
    terms: list[Fraction] = []
    for new, word in re.findall(r"(and )?(?:an? )?([\d.]+|[a-z]+)", match[0].lower()):
        factor = Fraction(COUNTS.get(word, TIMES.get(word.removesuffix("s"), word)))
        if terms and word not in COUNTS and not new:
            terms[-1] *= factor
        else:
            terms.append(factor)
    return str(sum(terms))


@lru_cache(maxsize=10_000)
def quantity(text: str) -> tuple[Fraction | None, str, set[str]]:
    """The number that an answer is (None: no plain number; 50% is 50), the answer without its unit,
    and the words of the unit."""
    text = re.sub(SPELLED, spelled, plain(text)[:99])
    match = re.fullmatch(UNIT, text)
    text, unit = match.groups() if match and not LIMIT.search(match[2]) else (text, "")
    digits = re.sub(POWER, r"e\1", re.sub(FRACTION, r" \1\3/\2\4", text))
    digits = re.fullmatch(NUMBER, plain(digits).replace(" ", "").rstrip("."))
    number = Fraction(digits[0].replace(",", "").rstrip("%")) if digits else None
    return number, text, {word.rstrip("s") for word in unit.lower().split()}


def after_thinking(text: str) -> str:
    """What follows the last `</think>`; nothing where a thought was begun and not ended."""
    text = text.rpartition("</think>")[2]
    return "" if "<think>" in text else text[-LONGEST:].strip()


def claims(text: str) -> list[str]:
    """The answers that a text marks, the surest first: in the line after the last `####`, in the
    last box, after "answer is", "answer:" or a heading (values before words), in a tag."""
    tags = re.findall(r"(?is)<(?:final_?)?answer>\s*(\S.*?)(?:</|$)", text)[-1:]
    text = plain((tags or [text])[0])
    hashed = re.sub(HEADING, "", text.rpartition("####")[2].lstrip(), count=1)
    hashes = "####" in text and not MARK.search(hashed) and "boxed" not in hashed
    runs = [["".join(b).strip() for b in re.findall(BOX, m[0])] for m in re.finditer(BOXES, text)]
    found = [", ".join(filter(None, run)) for run in runs if any(run)][-1:]
    marks = [text[mark.end() :].rstrip("! ") for mark in MARK.finditer(text)][:-50:-1]
    found += sorted(marks, key=lambda claim: not re.match(VALUE, claim)) + [text] * len(tags)
    found = [hashed] * hashes + [claim for claim in found if claim.strip()]
    return [claim.strip()[:LONGEST_ANSWER] for claim in found]


def bare(claim: str) -> str:
    """An answer without formula signs and remarks."""
    claim = re.sub(r"\\[()\[\]]", " ", claim[:LONGEST_ANSWER]).strip()
    return JUNK.sub("", JUNK.sub("", REST.split(claim)[0]))


def extract(text: str, words: bool = False) -> str | None:
    """The final answer of a solution: the one that it marks, else its last number or formula (with
    `words`, its last line); None where there is none, or a denial or an unfinished sum."""
    text = after_thinking(text)
    if found := claims(text) or [plain(re.split(REASON, text)[0].rsplit("\n", 1)[-1])] * words:
        claim = bare(found[0])
        if not words and not LIMIT.search(claim):
            start, inner = re.match(VALUE, claim), re.fullmatch(INNER, claim)
            claim = claim[start.end() :] if start else inner[1] if inner else claim
        return claim or None
    text = re.sub(WHOLE, lambda m: re.sub(r"\s", "~", m[0]), re.sub(ASIDE, "", plain(text)))
    last = [m.start() for m in re.finditer(r"\S+", text) if re.search(r"\d|\\[(\[]", m[0])][-1:]
    if not last or LIMIT.search(re.split(r"[.,;:!?\n]", text[: last[0]][-200:])[-1]):
        return None
    claim = bare(text[last[0] :].rstrip("! "))
    return None if re.match(r"\\f?boxed|[\d.]+(?:[-+*][\d.]+)+(?!\S)", claim) else claim or None


def same_answer(given: str, wanted: str, words: bool = False) -> bool:
    """Whether two final answers are equal: as numbers where both are plain numbers, in their words
    where one has words, else as mathematics. 50% is 50 and 0.5."""
    pair = [plain(text)[:LONGEST_ANSWER] for text in (given, wanted)]
    labels = [re.fullmatch(r"(\(([A-Z])\))?[\s.:]*(.*)", text, re.S).groups() for text in pair]
    if any(label for label, _, _ in labels):  # \textbf{(D)}\ 12
        (a, x, given), (b, y, wanted) = labels
        return (x or given) == (y or wanted) or not (a and b) and same_answer(given, wanted)
    if ("=" in given) != ("=" in wanted):
        pair = [re.sub(SIDES, "", text) for text in pair]
    (a, x, unit), (b, y, other) = map(quantity, pair)
    if not (unit <= other or other <= unit):
        return False
    if a is not None and b is not None:
        return a == b or ("%" in x) != ("%" in y) and a * 100 ** ("%" in y) == b * 100 ** ("%" in x)
    if words or WORD.search(x) or WORD.search(y):
        return normal(given) == normal(wanted) != ""
    x, y = x if a is None else str(a), y if b is None else str(b)
    return x == y != "" or same_mathematics(x, y)


def is_correct(completion: str, answer: str, words: bool = False) -> bool:
    """Whether the completion's final answer is the reference's. `answer` may be a bare answer or a
    worked solution that ends in one (`#### n` or `\\boxed{}`)."""
    given, wanted = extract(completion, words), bare((claims(answer) or [plain(answer)])[0])
    return given is not None and same_answer(given, wanted, words)


@lru_cache(maxsize=10_000)
def normal(words: str) -> str:
    """Words without articles, punctuation, LaTeX and surplus blanks, and without case except where
    it is the answer (Rr, CO)."""
    words = re.sub(r"\^\{?(\d*[-+])\}?|_\{?([^\W_]+)\}?", r"\1\2", plain(words)[:LONGEST_ANSWER])
    words = re.sub(r"\b(?:an?|[Tt]he)\s+(?=\w)|^An?\s+(?=[a-z])", "", words)
    words = re.sub(r"(?<=[a-z])-(?=[a-z])|[^\w\s.%/+<>=^|\u2190-\u22ff-]|[.](?!\d)", " ", words)
    words = re.sub(r"\s*([-+<>=/^→])\s*", r"\1", words).split()
    return " ".join(word if CASED.fullmatch(word) else word.lower() for word in words)


def named(claim: str, options: list[str]) -> str | None:
    """The letter of the option that a claim names; "" where it names several, None where none."""
    letters = LETTERS[: len(options)]
    claim = JUNK.sub("", re.sub(r"\\[()\[\]]", " ", claim[:LONGEST_ANSWER].split("\n")[0]))
    claim = re.sub(CALLED, "", claim)
    for words in (claim, bare(claim)):
        for form in (str, normal, lambda text: quantity(text)[0]):
            texts = [form(text.rstrip(".")) for text in options]
            lone = re.fullmatch(rf"[{letters}]|\(?\w\)", words)  # is a letter, even if also a text
            if not lone and form(words) and texts.count(form(words)) == 1:
                return letters[texts.index(form(words))]
    match = re.match(LETTER, claim)
    letter, rest = ((match[1] or match[3]).upper(), match[2] or "") if match else (" ", "")
    if letter not in letters or re.match(SEVERAL, rest):
        return "" if letter in letters else None
    right = normal(rest) == normal(options[letters.index(letter)])
    return letter if right or re.match(TAKEN, rest) else None


def choose(text: str, options: list[str]) -> str | None:
    """The letter of the option that a completion takes, None where it takes none or several."""
    text, options = after_thinking(text), [plain(option)[:LONGEST_ANSWER] for option in options]
    first, *others = plain(text).split("\n")
    listed = len(first) > 4 and any(re.match(r"\(?[A-Z][).] ", line) for line in others)
    marked = [named(claim, options) for claim in claims(text)]
    found = [named(first, options) or None] if len(first) < 100 and not listed else []
    found += [named(piece, options) for piece in reversed(re.split(LEAD, plain(text)))]
    return next((letter for letter in marked or found if letter is not None), None) or None


# --- mathematics beyond plain numbers, in a process of its own ---
lock, verdicts, state = threading.Lock(), {}, {"left": ALLOWANCE, "process": None}


def same_mathematics(given: str, wanted: str) -> bool:
    """Whether two expressions are equal as mathematics (math-verify). What takes longer than
    TIME_LIMIT is not, and nothing is once ALLOWANCE is spent: so a batch is bounded as a whole."""
    with lock:
        state["left"] = min(ALLOWANCE, state["left"] + REFUND)
        if (given, wanted) in verdicts:
            return verdicts[given, wanted]
        if state["left"] < 0.5:
            warnings.warn("mathematics took too long too often: answers are refused", stacklevel=2)
            return False
        if len(verdicts) == 100_000:
            verdicts.clear()
        process = state["process"]
        if process is None or process.poll() is not None:
            process = state["process"] = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True, start_new_session=True,  # Ctrl-C is the run's
            )  # fmt: skip
            if not process.stdout.readline():
                raise RuntimeError(f"{sys.executable} {__file__}: math-verify does not start")
        begin = time.monotonic()
        with suppress(BrokenPipeError):
            request = given, wanted, min(TIME_LIMIT, state["left"])
            print(json.dumps(request), file=process.stdin, flush=True)
        verdicts[given, wanted] = (process.stdout.readline() or process.wait()) == "true\n"
        state["left"] -= time.monotonic() - begin + (process.poll() is not None)  # 1 s for another
        return verdicts[given, wanted]


def serve() -> None:
    """The process of `same_mathematics`: a pair of expressions and its time limit a line on stdin,
    true or false on stdout. It ends with its parent, whose end closes stdin, and by itself at the
    limit, whatever it is doing."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr, FiniteSet

    with suppress(ImportError, ValueError, OSError):  # other systems than Linux know no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))  # bytes
    rules = NormalizationConfig(malformed_operators=True, nits=True)  # its units are letters too
    read = {"extraction_config": [LatexExtractionConfig(normalization_config=rules)]}
    read |= {"fallback_mode": "no_fallback", "parsing_timeout": None}
    how = {"numeric_precision": 400, "allow_set_relation_comp": True, "timeout_seconds": None}
    print("ready", flush=True)
    for line in sys.stdin:
        *pair, limit = json.loads(line)
        faulthandler.dump_traceback_later(limit, exit=True)
        verdict = False
        with suppress(Exception):
            a, b = (parse(rf"\boxed{{{text}}}", **read)[0] for text in pair)
            some = [x for x in (a, b) if isinstance(x, Expr | FiniteSet)]
            sizes = {len(getattr(x, "_unsorted_args", "1")) for x in some}  # 1, 1, 2 is not 1, 2
            verdict = (len(sizes) < 2 or "{" in pair[0]) and verify(b, a, **how)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    serve()
