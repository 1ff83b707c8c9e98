"""Answer checking: find the final answer of a completion and compare it with the reference.

Here stands what math-verify does not know; docs/answers.md gives the reason of every rule."""

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache
from string import ascii_uppercase as LETTERS

from utils.world.verifier import same_mathematics

LONGEST, LONGEST_ANSWER = 5_000, 400  # characters that are read: the last of a text, of an answer
# fmt: off
SIGNS = {"°": r"^\circ ", "∞": r"\infty ", "·": r"\cdot ", "∈": r"\in ", "−": "-", "’": "'"}
KINDS = {"Sc": "", "So": "", "Cf": "", "Pi": "", "Pf": "", "Pd": "-"}  # currencies, emoji, quotes
FONT = r"\\(?:text\w*|math(?:rm|bf|it|sf)|mbox|emph|bm|boldsymbol|ce) *\{([^{}]*)\}"
DEGREES = r"(\\(?:sin|cos|tan)[ ({]*)([\d.]+)[ )}]*\^ *(?:\\circ|\{\\circ *\})"
SPELLINGS = [(re.compile(pattern), new) for pattern, new in (  # in this order
    (r"\\(?:!|left(?!a)|right(?!a))|(?<![\w)])(?:\*\*|__)|(?:\*\*|__)(?![\w(])|[\"`]", ""),
    (r"\\(?:begin|end)\{(?:equation|align|gather)(?:ed)?\*?\}|(?<=\n) *[-*•>] +", ""),  # bullets
    (FONT, r" \1"), (r"(?<!\\)\\[,;: ]|~|\\q?quad\b", " "), (r"(?<=\S)[ \t]{2,}", " "),
    (r"\\\$|\b[A-Z]{1,2}\$(?=\d)|\b(?:USD|EUR|GBP|CHF|Rs\.?) ?(?=\d)", ""),  # US$5
    (r"\$\$?(?=[^\s$])([^$]*[^\s$])\$\$?(?!\d)", r"\\(\1\\)"), (r"\$", ""),  # pandoc's rule; money
    (r"(?<![\\A-Za-z])(pi|sin|cos|tan|log)(?![A-Za-z])", r"\\\1"), (DEGREES, r"\1{(\2\\pi/180)}"),
    (r"(?:√|\\?sqrt) ?(?:\(([^()]*)\)|(\d+|[a-z]))", r"\\sqrt{\1\2}"), (r"[ \\]*%| percent\b", "%"),
    (r"\\\{ *\w *(?:\\in *\\mathbb\{\w\} *)?(?:[:|]|\\mid)([^{}]*)\\\}", r"\1"),  # {x : x > 3}
    (r"(?<![\d.,/])\d{1,3}(?: \d{3})+(?![\d/])", lambda m: m[0].replace(" ", "")),  # 7 500
    (r"(?<![\d./])(\d{1,9}) (\d{1,9}/[1-9]\d{0,8})\b", lambda m: f"{int(m[1]) + Fraction(m[2])}"),
    (r"\b(\d{1,9}\.\d{0,9})\\(?:overline|bar|dot) *\{?(\d{1,9})\}?",
        lambda m: str(Fraction(m[1] + m[2] * 40).limit_denominator(10**18))),
    (r"(?<=\d) ?(?:[x×*]|\\times|\\cdot) *(?=10\^)", r"\\times"), (r"\\varnothing", r"\\emptyset "),
    (r"\b([aApP])\.?[mM]\b(?:\.(?!\w))?", lambda m: m[1].lower() + "m"),
)]
COUNTS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"""
COUNTS = dict(zip(COUNTS.split(), [*range(20), *range(20, 100, 10)], strict=True))
TIMES = dict(hundred=100, dozen=12, thousand=10**3, million=10**6, billion=10**9, trillion=10**12)
TIMES |= dict(half="1/2", third="1/3", quarter="1/4", fifth="1/5", eighth="1/8", tenth="1/10")
SPELLED, AND = rf"(?:{'|'.join([*sorted(COUNTS)[::-1], *TIMES])})s?\b", "[ -](?:and )?(?:an? )?"
SPELLED = rf"(?i)^(?:\d+(?:\.\d+)?(?={AND}{SPELLED})|(?:an? )?{SPELLED})(?:{AND}{SPELLED})*"
FRACTION, POWER = r"\\[dt]?frac(?:\{(\d+)\}\{(\d+)\}|(\d)(\d))", r"\\times10\^[{(]?([-+]?\d+)[)}]?"
NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d*)?(?:/0*[1-9]\d*|[eE][-+]?\d{1,3})?%?"
LIMIT = r"(?i:\b(?:or|than|no|least|most|up to|over|under|above|below)\b|n['o]t\b|[<>≤≥]|\\[lg]e)"
UNIT = rf"(.*[\d)}}%])(?:(?<=%)| +)((?!and\b|.*{LIMIT})(?i:[a-z]{{2}}|[mgshl])[A-Za-z /^{{}}23]*|)"
WORD = r"(?<![\\{^\w])(?!and\b)(?:(?=\w*[aeiou])[a-z]{3,}|[ap]m\b|[A-Z](?:[a-z]{2}|[A-Z]))|\d_"
CASED = re.compile(r"(?:([a-zA-Z])(?i:\1))+|[A-Z]{2}|(?=.*[a-z])(?=.*[A-Z].*[A-Z])\w+")  # Rr, CO
SIDES = r"^(?:(?:[^=<>, ]|,(?=\d)| (?!or|and))*=(?! *[a-zA-Z]$))+ *(?=\S)|(?<=[\d}]) *= *[a-zA-Z]$"
# --- where an answer stands and where it ends ---
BOX = r"(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]{0,99}\}){0,99}\}){0,99}\}){0,400}"
BOX = rf"\\(?:boxed|fbox|framebox(?:\[\w*\])?)\s*(?:\{{({BOX})\}}|(-?[\d.,]*\d|\w))"
BOXES = rf"{BOX}(?:(?:\\[()\[\]]|\s)*(?:,|and|or)(?:\\[()\[\]]|\s|and|or)*{BOX})*"
MARK = (r"(?im)^[\W_]{0,9}(?:\w+ ){0,2}(?:answer|result)\W{0,9}$\s*|(?<!th[ai][st] )\banswers?"
    r"(?:(?:\s(?!is\b|are\b|not|never|cannot)\w+){0,6}\s(?:is|are|be|equals)\b|\W{0,4}[:=])[\s:*]*")
VALUE = r"(?i:(?:\\[(\[]|\s|\w+ly |about )*(?=[-+(\[{|]*\s*(?:\\[a-z{|]|\.?\d)|[a-z]\s*[=^+*/(-]))"
BEFORE = re.compile(rf"^(?:{VALUE}|[A-Za-z][^\d\\]* (?=(?:[-+(]?\.?\d|\\[a-z])\S*(?: [^\d\\]*)?$))")
WHY = r"(?:which|who|because|since|as|so|where|when|if|due to)\b"
REASON = r"(?i)\n\W{0,9}(?:explanation|reason|because|since|note|it|this|that)\b"
ASIDE = r",\s+(?:which|who|because|since)\b[^.\n]*|\s\([^()]*[A-Za-z]{2}[^()]*\)"
WHOLE = r"\\\(.{1,200}?\\\)|\\\[.{1,200}?\\\]|[(\[{][^()\[\]{}]{1,99}[)\]}]"
REST = re.compile(r"\n|[.!?]\s+(?=(?:I|[A-Z]\S*)\s+[a-z])|(?<=\w{4})[.!?]\s|(?<=[\d)}\]%])(?:[.!?]"
    r"\s|[,;]\s+(?!and\b|or\b|at\b)(?=[A-Za-z]{2}))|\s\((?=[^()]*[A-Za-z]{2})|\s--?\s(?=[a-z]{2})"
    rf"|[,;:]\s(?:{WHY}|(?:for|but|it|that|not)\b|(?:an?|the)\b(?!.*\band\b))|\s{WHY}\s")
JUNK = re.compile(r"^[\s*_'~:≈→]+|[\s.,;:*_'~\ufe0f]+$")
# --- options ---
LETTER = r"(?i:(?:the )?(?:\w+ )?(?:option|choice) (?:is )?)?(?!I,)[(\[{]?([A-Z])\b(?!')(.*)"
SEVERAL = r"\)?\s*(?:,?\s*(?:or|and|&|/)|,(?=\s*\(?[A-Z]\)?(?!\s+[a-z])))\s*\(?[A-Z]\b"
TAKEN = (r"[)\]}](?! (?:is|are|was|has|does|can)(?:\b|n))|[)\]}]?(?:\s*[-.,:;!?]|$| (?:for\b|"
    rf"and not\b|{WHY}|(?:is|must be) (?:the |my )?(?:right|correct|best|answer)))")
LEAD = (r"(?i)[.,;!?\n]\s+|\b(?:so|therefore|thus|hence|it is|it's|(?:must|should) be|choose|pick"
    r"|with|option|choice|but|is(?= \(?(?-i:[A-Z])\b)|and(?= \(?[A-Z]\)? is))\b[:,]?\s*")
# fmt: on


@lru_cache(maxsize=10_000)
def plain(text: str) -> str:
    """The same in one spelling: LaTeX for other characters, no fonts, no currencies."""
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻]+", r"^{\g<0>}", text[-LONGEST:])
    text = re.sub("[₀-₉]+", r"_{\g<0>}", re.sub("[¼-¾⅐-⅞]", r" \g<0> ", text))
    text = unicodedata.normalize("NFKC", text).replace("⁄", "/")
    text = "".join(SIGNS.get(c, KINDS.get(c != "$" and unicodedata.category(c), c)) for c in text)
    for pattern, new in SPELLINGS:
        text = pattern.sub(new, text)
    return text.strip()


def spelled(match: re.Match) -> str:
    """Number words in digits: "twenty-one", "5 million", "2 and a half"."""
    terms = [Fraction(0)]
    for new, word in re.findall(r"(and )?(?:an? )?([\d.]+|[a-z]+)", match[0].lower()):
        factor = Fraction(COUNTS.get(word, TIMES.get(word.removesuffix("s"), word)))
        terms += [factor] if new or word in COUNTS else [(terms.pop() or 1) * factor]
    return str(sum(terms))


@lru_cache(maxsize=10_000)
def quantity(text: str) -> tuple[Fraction | None, str, set[str]]:
    """The number that an answer is (50% is 50) or None, the rest without unit, the unit's words."""
    text = re.sub(SPELLED, spelled, plain(text)[:99])
    text, unit = match.groups() if (match := re.fullmatch(UNIT, text)) else (text, "")
    digits = re.sub(POWER, r"e\1", re.sub(FRACTION, r" \1\3/\2\4", text))
    digits = re.fullmatch(NUMBER, plain(digits).replace(" ", "").rstrip("."))
    number = Fraction(digits[0].replace(",", "").rstrip("%")) if digits else None
    return number, text, {word.rstrip("s") for word in unit.lower().split()}


def after_thinking(text: str) -> str:
    """What follows the last `</think>`; nothing where a thought was begun and not ended."""
    text = re.sub(r"(?s)\A(?:.*</think>)?(?:.*<think>.*)?", "", text, count=1)
    return text[-LONGEST:].strip()


def claims(text: str) -> list[str]:
    """The answers that a text marks, the surest first: after ####, in a box, after "answer is"."""
    tags = re.findall(r"(?is)<(?:final_?)?answer>\s*(\S.*?)(?:</|$)", text)[-1:]
    text = plain((tags or [text])[0])
    hashed = [rest for rest in text.split("####")[1:][-1:] if not re.search(rf"{MARK}|boxed", rest)]
    runs = [["".join(b).strip() for b in re.findall(BOX, m[0])] for m in re.finditer(BOXES, text)]
    found = [", ".join(filter(None, run)) for run in runs if any(run)][-1:]
    marks = [text[mark.end() :].rstrip("! ") for mark in re.finditer(MARK, text)][:-50:-1]
    found += sorted(marks, key=lambda claim: not re.match(VALUE, claim)) + [text] * len(tags)
    return [claim.strip()[:LONGEST_ANSWER] for claim in hashed + [x for x in found if x.strip()]]


def bare(claim: str) -> str:
    """An answer without formula signs and remarks."""
    claim = re.sub(r"\\[()\[\]]", " ", claim[:LONGEST_ANSWER]).strip()
    return JUNK.sub("", REST.split(claim)[0])


def extract(text: str, words: bool = False) -> str | None:
    """The final answer: what is marked as such, else its last number or formula (words: line)."""
    text = after_thinking(text)
    if found := claims(text) or [plain(re.split(REASON, text)[0].rsplit("\n", 1)[-1])] * words:
        claim = bare(found[0])
        return (claim if words or re.search(LIMIT, claim) else BEFORE.sub("", claim, 1)) or None
    text = re.sub(WHOLE, lambda m: re.sub(r"\s", "~", m[0]), re.sub(ASIDE, "", plain(text)))
    last = [m.start() for m in re.finditer(r"\S+", text) if re.search(r"\d|\\[(\[]", m[0])][-1:]
    if not last or re.search(LIMIT, re.split(r"[.,;:!?\n]", text[: last[0]][-200:])[-1]):
        return None
    claim = bare(text[last[0] :].rstrip("! "))
    return None if re.match(r"\\f?boxed|[\d.]+(?:[-+*][\d.]+)+(?!\S)", claim) else claim or None


def same_answer(given: str, wanted: str, words: bool = False) -> bool:
    """Whether two final answers are equal, as numbers, in their words or as mathematics."""
    pair = [plain(text)[:LONGEST_ANSWER] for text in (given, wanted)]
    a, b = (re.fullmatch(r"(?:\(([A-Z])\))?[\s.:]*(.*)", text, re.S).groups() for text in pair)
    if a[0] or b[0]:  # \textbf{(D)}\ 12
        return (a[0] or a[1]) == (b[0] or b[1]) or not (a[0] and b[0]) and same_answer(a[1], b[1])
    if ("=" in given) != ("=" in wanted):
        pair = [re.sub(SIDES, "", text) for text in pair]
    (a, x, unit), (b, y, other) = map(quantity, pair)
    if not (unit <= other or other <= unit):
        return False
    if a is not None and b is not None:
        return a == b or ("%" in x) != ("%" in y) and a * 100 ** ("%" in y) == b * 100 ** ("%" in x)
    if words or re.search(WORD, x) or re.search(WORD, y):
        return normal(given) == normal(wanted) != ""
    x, y = x if a is None else str(a), y if b is None else str(b)
    return x == y != "" or same_mathematics(x, y)


def is_correct(completion: str, answer: str, words: bool = False) -> bool:
    """Whether a completion's final answer is `answer`, or the one that a solution `answer` has."""
    given, wanted = extract(completion, words), bare((claims(answer) or [plain(answer)])[0])
    return given is not None and same_answer(given, wanted, words)


def normal(words: str) -> str:
    """Words without articles, punctuation and LaTeX, and without case except in Rr, CO and NaCl."""
    words = re.sub(r"[\^_{}]|\b(?:an?|[Tt]he)\s+(?=\w)|^An?\s+(?=[a-z])", "", plain(words))
    words = re.sub(r"(?<=[a-z])-(?=[a-z])|[^\w\s.%/+<>=^|×÷±\u2190-\u22ff-]|[.](?!\d)", " ", words)
    words = re.sub(r"\s*([-+<>=/^→])\s*", r"\1", words).split()
    return " ".join(word if CASED.fullmatch(word) else word.lower() for word in words)


def named(claim: str, options: list[str]) -> str | None:
    """The letter of the option that a claim names; "" where it names several, None where none."""
    letters = LETTERS[: len(options)]
    claim = JUNK.sub("", re.sub(r"\\[()\[\]]", " ", claim[:LONGEST_ANSWER].split("\n")[0]))
    lone = re.fullmatch(rf"[{letters}]|\(?\w\)", claim)  # is a letter, even if also a text
    for text in (claim, bare(claim)) * (not lone):
        equal = [x for x, option in zip(letters, options, strict=True) if same_answer(text, option)]
        if len(equal) == 1:
            return equal[0]
    claim = re.sub(r"^\(?[a-z](?=[).:]\s|[).:]?$)", lambda m: m[0].upper(), claim)
    letter, rest = match.groups() if (match := re.match(LETTER, claim)) else (" ", "")
    if letter not in letters or re.match(SEVERAL, rest):
        return "" if letter in letters else None
    return letter if re.match(TAKEN, rest) or named(rest.lstrip(")]}"), options) == letter else None


def choose(text: str, options: list[str]) -> str | None:
    """The letter of the option that a completion takes, None where it takes none or several."""
    text, options = after_thinking(text), [plain(option)[:LONGEST_ANSWER] for option in options]
    listed = len(re.findall(r"(?m)^\(?[A-Z][).] ", plain(text))) > 1
    found = plain(text).split("\n")[:1] * (not listed) + re.split(LEAD, plain(text))[::-1]
    letters = (named(claim, options) for claim in claims(text) or found)
    return next((letter for letter in letters if letter is not None), None) or None
