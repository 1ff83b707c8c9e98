"""Find and compare final answers: what math-verify does not know. docs/answers.md has the why."""

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache, reduce
from string import ascii_uppercase as LETTERS

from utils.world.verifier import same_mathematics

LONGEST, LONGEST_ANSWER = 5_000, 400  # characters that are read: the last of a text, of an answer
SIGNS = {"°": r"^\circ ", "∞": r"\infty ", "·": r"\cdot ", "∈": r"\in ", "±": r"\pm ", "’": "'"}
KINDS = {"Sc": "", "So": "", "Cf": "", "Pi": "", "Pf": "", "Pd": "-"}  # currencies, emoji, quotes
FONT = r"\\(?:text\w*|math(?:rm|bf|it|sf)|mbox|emph|bm|boldsymbol|ce) *\{([^{}]*)\}"
DEGREES = r"(\\(?:sin|cos|tan)[ ({]*)([\d.]+)[ )}]*\^ *(?:\\circ|\{\\circ *\})"
SPELLINGS = [(re.compile(pattern), new) for pattern, new in (  # in this order
    (r"(?<=\d) ?([千万亿])(?![克米瓦卡])", lambda m: rf"\times10^{'...千万...亿'.index(m[1])} "), (r"⁄", "/"),
    (r"[至最][少多]|超过|不[到足]|[大小多少]于", r" than \g<0>"), (r"因为", " because "), (r"不[是选]", " not "),
    (r"以[上下]|或", " or "), (r"答案?", "answer "), (r"[是为]", " is "), (r"选[择项]?", "choose "),
    (r"(?<=[぀-鿿])(?=[\w\\$*(-])(?![぀-鿿])|(?<![぀-鿿\s])(?=[぀-鿿])", " "), (r"。", ".\n"), (r"、", ","),
    (r"(?m)^ *\|[-| :]+$", ""), (r"(?m)^ *\|(.+ \| .+)\| *$", lambda m: m[1].replace(" | ", ": ")),
    (r"\\(?:!|left(?!a)|right(?!a))|(?<![\w)])(?:\*\*|__)|(?:\*\*|__)(?![\w(])|[\"`]", ""),
    (r"\\(?:begin|end)\{(?:equation|align|gather)(?:ed)?\*?\}|(?<=\n) *[-*•>] +|<<[^<>]*>>", ""),
    (FONT, r" \1"), (r"(?<!\\)\\[,;: ]|~|\\q?quad\b", " "), (r"(?<=\S)[ \t]{2,}", " "), (r"−", "-"),
    (r"\\\$|\b[A-Z]{1,2}\$(?=\d)|\b(?:USD|EUR|GBP|CHF|Rs\.?) ?(?=\d)", ""), (r"π", r"\\pi "),
    (r"\$\$?(?=[^\s$])([^$]*[^\s$])\$\$?(?!\d)", r"\\(\1\\)"), (r"\$", ""),  # pandoc's rule; money
    (r"(?<![\\A-Za-z])(pi|sin|cos|tan|log)(?![A-Za-z])", r"\\\1"), (DEGREES, r"\1{(\2\\pi/180)}"),
    (r"(?:√|\\?sqrt) ?(?:\(([^()]*)\)|(\d+|[a-z]))", r"\\sqrt{\1\2}"), (r"[ \\]*%| percent\b", "%"),
    (r"\\\{ *\w *(?:\\in *\\mathbb\{\w\} *)?(?:[:|]|\\mid)([^{}]*)\\\}", r"\1"),  # {x : x > 3}
    (r"(?<![\d.,/])\d{1,3}(?: \d{3})+(?![\d/])", lambda m: m[0].replace(" ", "")),  # 7 500
    (r"(?<![\d./])(\d{1,9}) (\d{1,9}/[1-9]\d{0,8})\b", lambda m: f"{int(m[1]) + Fraction(m[2])}"),
    (r"\b(\d{1,9}\.\d{0,9})\\(?:overline|bar|dot) *\{?(\d{1,9})\}?",
        lambda m: str(Fraction(m[1] + m[2] * 40).limit_denominator(10**18))),
    (r"(?<=\d) ?(?:[x×*]|\\times|\\cdot) *(?=10\^)", r"\\times"), (r"\\varnothing", r"\\emptyset "),
    (r"\b([aApP])\.?[mM]\b(?:\.(?!\w))?", lambda m: m[1].lower() + "m"))]  # fmt: skip
COUNTS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"""
COUNTS = dict(zip(COUNTS.split(), [*range(20), *range(20, 100, 10)], strict=True))
TIMES = dict(hundred=100, dozen=12, thousand=10**3, million=10**6, billion=10**9, trillion=10**12)
TIMES |= dict(half="1/2", third="1/3", quarter="1/4", fifth="1/5", eighth="1/8", tenth="1/10")
SPELLED, AND = rf"(?:{'|'.join([*sorted(COUNTS)[::-1], *TIMES])})s?\b", "[ -](?:and )?(?:an? )?"
SPELLED = rf"(?i)^(?:\d+(?:\.\d+)?(?={AND}{SPELLED})|(?:an? )?{SPELLED})(?:{AND}{SPELLED})*"
FRACTION, POWER = r"\\[dt]?frac(?:\{(\d+)\}\{(\d+)\}|(\d)(\d))", r"\\times10\^[{(]?([-+]?\d+)[)}]?"
NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d*)?(?:/0*[1-9]\d*|[eE][-+]?\d{1,3})?%?"
BOUND = (r"(?i:(?:\b(?:or|than|no|least|most|up to|over|under|above|below)|n['o]t(?: (?!(?:are|were"
    r"|so|but|and)\b)\w+){0,3}|[<>≤≥]|\\[lg]eq?)(?:\s|\\[(\[]|about|[぀-鿿]{1,3}|(?:or )?equal to)*|"
    r"\bat(?: the very)? (?:least|most) (?!one|two|half|a )[^\d.,;:!?\n]*)")  # fmt: skip
UNIT = re.compile(r"(.*(?:[\d)}%!]|\\pi|(?:^|[\d}]|\\pi ?)[b-hj-z]{1,2}))(?:(?<=%)| +)((?!(?:and|"
    r"or|if|(?:is|can) ?n[o']t|is wrong)\b|.*\b(?:or|at (?:least|most))\b)(?:(?i:an? )?[A-Za-z]{2}"
    r"|[぀-鿿]|(?<=pi )m|(?i:(?<=[\d)}%] )(?<!\^\d )[mgshl]))[A-Za-z぀-鿿' /^{}23]*|)")  # fmt: skip
WORD = r"(?<![\\{^\w])(?!and\b)(?:(?=\w*[aeiou])[a-z]{3,}|[ap]m\b|[A-Z](?:[a-z]{2}|[A-Z]))|\d_"
CASED = re.compile(r"(?:([a-zA-Z])(?i:\1))+|[A-Z]{2}|(?=.*[a-z])(?=.*[A-Z].*[A-Z])\w+")  # Rr, CO
SIDES = r"^(?:(?:[^=<>, ]|,(?=\d)| (?!or|and))*=(?! *[a-zA-Z]$))+ *(?=\S)|(?<=[\d}]) *= *[a-zA-Z]$"
BOX = r"(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]{0,99}\}){0,99}\}){0,99}\}){0,400}"
BOX = rf"\\(?:boxed|fbox|framebox(?:\[\w*\])?)\s*(?:\{{({BOX})\}}|(-?[\d.,]*\d|\w))"
BOXES = rf"{BOX}(?:(?:\\[()\[\]]|\s)*(?:,|and|or)(?:\\[()\[\]]|\s|and|or)*{BOX})*"
MARK = (r"(?im)^[\W_]{0,9}(?:\w+ ){0,2}(?:answer|result)\W{0,9}$\s*|(?<!th[ai][st] )\banswers?(?:"
    r"(?:\s(?!is\b|are\b|not|never|cannot)\w+){0,6}\s(?:is|are|be|equals)\b|\W{0,4}[:=])[\s:*]*(?:"
    r"(?:not|neither)\b.{1,60}?(?:\sbut|[.,;] (?:it )?(?:it's|is|must be))\s[\s:*]*)?")  # fmt: skip
VALUE = r"(?i:(?:\\[(\[]|\s|\w+ly |about )*(?=[-+(\[{|]*\s*(?:\\[a-z{|]|\.?\d)|[a-z]\s*[=^+*/(-]))"
BEFORE = rf"^(?!\D*{BOUND}\d)(?:{VALUE}|[^\W\d][^\d\\]* (?=(?:[-+(.]*\d|\\)\S*(?: [^\d\\]*)?$))"
WHY = r"(?:which|who|because|since|as|so|where|when|if|due to)\b"
REASON = r"(?i)\n\W{0,9}(?:explanation|reason|because|since|note|it|this|that)\b"
ASIDE = (r",\s(?:which(?! (?:leaves|makes|gives))|who|because|since|not)\b[^.\n]*|\s\([^()]*"
    r"[A-Za-z]{2}[^()]*\)|(\d[^\s,;]{,9}(?: (?!and |or |is )[a-z'-]+){,5} (?:than|over|under|above)"
    r"\b)[^.,;:\n]*|(\d[^.,;:\n]{,60}), \S+ (?:\w+ ){,3}(?:than|as \w+ as)\b[^.\n]*")  # fmt: skip
FORMULA = r"\\[(\[]((?s:.){1,400}?)\\[)\]]|\\[()\[\]]"
WHOLE = rf"{FORMULA}|[(\[{{](?:[^()\[\]{{}}A-Za-z]|\\?[A-Za-z](?![A-Za-z])|\\[a-z]+){{1,99}}[)\]}}]"
REST = re.compile(r"\n|[.!?]\s+(?:I|[A-Z]\S*)\s+[a-z]|(?<=\w{4})[.!?]\s|(?<=[\d)}\]%])(?:[.?]\s"
    r"|!\s(?!\s*[a-z=])|[,;]\s+(?!and\b|or\b|at\b)[A-Za-z]{2})|\s\([^()]*(?<![\\A-Za-z])[A-Za-z]{2}"
    rf"|\s--?\s[a-z]{{2}}|[,;:]\s(?:{WHY}|(?:for|but|it|that|not?|\S+ (?:\w+ ){{0,2}}than)\b"
    rf"|(?:an?|the)\b(?!.*\band\b))|\s{WHY}\s")  # fmt: skip
TAIL = re.compile(rf"\W*(?:because|since|which)\b|(?!\W*(?:if|whe))(?=.*?{WORD})[^\d\\=<>^+!]*$")
JUNK = re.compile(r"^(?:[\s*_'~:≈→]|\|\s)+|(?:[\s.,;:*_'~\ufe0f]|(?<=\s)\|)+$")
TURN = r"(?<=[^\s:>])\s*\n[\s#*>]{0,9}(?i:question|human|user|q|问题|用户)(?: \d+)?\**\s?[:：].*"
LETTER = (r"(?i:(?:\w+ )*(?:option|cho\w+) )?(?!I,)[(\[]?([A-Z]|[a-z](?=\W?$|[).:]\s))\b(?!')(\)?"
    r"\s*(?:,?\s*(?:or|and|&|/)|,(?=\s*\(?[A-Z]\)?(?!\s+[a-z])))\s*\(?[A-Z]\b)?(.*)")  # fmt: skip
TAKEN = (r"[)\]}](?! (?:is|are|was|has|does|can)(?:\b|n))|[)\]}]?(?:\s*[-.,:;!?]|$| (?:for\b|and "
    rf"not\b|{WHY}|(?:is|must be) (?:the |my )?(?:right|correct|best|answer|正确)))")  # fmt: skip
LEAD = (r"(?i)[.,;!?\n]\s+|\b(?:so|therefore|thus|hence|it is|it's|be|choose|pick|with|option|"
    r"choice|but|is(?= \(?(?-i:[A-Z])\b)|and(?= \(?[A-Z]\)? is))\b[:,]?\s*")  # fmt: skip


@lru_cache(maxsize=10_000)
def plain(text: str) -> str:
    """The same in one spelling: LaTeX for other characters, no fonts, no currencies."""
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻]+", r"^{\g<0>}", re.sub("[₀-₉]+", r"_{\g<0>}", text[-LONGEST:]))
    text = unicodedata.normalize("NFKC", re.sub("[¼-¾⅐-⅞]", r" \g<0> ", text))
    text = "".join(SIGNS.get(c, KINDS.get(c != "$" and unicodedata.category(c), c)) for c in text)
    return reduce(lambda text, rule: rule[0].sub(rule[1], text), SPELLINGS, text).strip()


def quantity(text: str) -> tuple[Fraction | None, str, set[str]]:
    """The number that an answer is (50% is 50) or None, the rest without unit, the unit's words."""
    text, terms = plain(text)[:99], [Fraction(0)]
    if spelled := re.match(SPELLED, text):
        for new, word in re.findall(r"(and )?(?:an? )?([\d.]+|[a-z]+)", spelled[0].lower()):
            factor = Fraction(COUNTS.get(word, TIMES.get(word.removesuffix("s"), word)))
            terms += [factor] if new or word in COUNTS else [(terms.pop() or 1) * factor]
        text = f"{sum(terms)}{text[spelled.end() :]}"
    text, unit = match.groups() if (match := UNIT.fullmatch(text)) else (text, "")
    digits = re.sub(POWER, r"e\1", re.sub(FRACTION, r" \1\3/\2\4", text))
    digits = re.fullmatch(NUMBER, plain(digits).replace(" ", "").rstrip("."))
    number = Fraction(digits[0].replace(",", "").rstrip("%")) if digits else None
    return number, text, {word.rstrip("s") for word in unit.lower().split()}


def after_thinking(text: str) -> str:
    """What follows the last `</think>`, up to another turn; nothing where a thought stays open."""
    return re.sub(rf"(?s)\A(?:.*</think>)?(?:.*<think>.*)?|{TURN}", "", text)[-LONGEST:].strip()


def claims(text: str) -> list[str]:
    """The answers that a text marks, the surest first: after ####, in a box, after "answer is"."""
    text = plain(re.sub(r"(?is).*<(?:final_?)?answer>\s*(\S.*?)(?:</|$).*", r"Answer: \1", text))
    hashed = [rest for rest in text.split("####")[1:][-1:] if not re.search(rf"{MARK}|boxed", rest)]
    runs = [["".join(b).strip() for b in re.findall(BOX, m[0])] for m in re.finditer(BOXES, text)]
    found = [bare(", ".join(filter(None, run)), True) for run in runs if any(run)][-1:]
    marks = [text[mark.end() :].rstrip("! ") for mark in re.finditer(MARK, text)][:-50:-1]
    found += sorted(marks, key=lambda claim: not re.match(VALUE, claim))
    return [claim.strip()[:LONGEST_ANSWER] for claim in hashed + [x for x in found if x.strip()]]


def bare(claim: str, formula: bool = False) -> str:
    """An answer without formula signs and remarks, of a formula only such as are all words."""
    claim = re.sub(FORMULA, lambda m: f" {bare(m[1] or '', True)} ", claim[:LONGEST_ANSWER]).strip()
    ends = (m.start() for m in REST.finditer(claim) if not formula or TAIL.match(claim, m.start()))
    claim = JUNK.sub("", claim[: next(ends, None)])
    return "~".join(claim.split()) if formula else claim.replace("~", " ")


def extract(text: str, words: bool = False) -> str | None:
    """The final answer: what is marked as such, else its last number or formula (words: line)."""
    text = after_thinking(text)
    if found := claims(text) or [plain(re.split(REASON, text)[0].rsplit("\n", 1)[-1])] * words:
        return (bare(found[0]) if words else re.sub(BEFORE, "", bare(found[0]), count=1)) or None
    text = re.sub(ASIDE, r"\1\2", re.sub(WHOLE, lambda m: "~".join(m[0].split()), plain(text)))
    last = [m.start() for m in re.finditer(r"\S+", text) if re.search(r"\d|\\[(\[]", m[0])][-1:]
    if not last or re.search(BOUND + "$", text[: last[0]][-200:]):
        return None
    claim = bare(text[last[0] :].rstrip("! "))
    return None if re.match(r"\\f?boxed|[\d.]+(?:[-+*][\d.]+)+(?!\S)", claim) else claim or None


def same_answer(given: str, wanted: str, words: bool = False) -> bool:
    """Whether two final answers are equal, as numbers, in their words or as mathematics."""
    pair = [plain(text)[:LONGEST_ANSWER] for text in (given, wanted)]
    a, b = (re.fullmatch(r"(?:\(([A-Z])\))?[\s.:]*(.*)", text, re.S).groups() for text in pair)
    if a[0] or b[0]:  # \textbf{(D)}\ 12
        return (a[0] or a[1]) == (b[0] or b[1]) or not (a[0] and b[0]) and same_answer(a[1], b[1])
    sides = SIDES * (("=" in given) != ("=" in wanted))
    (a, x, unit), (b, y, other) = (quantity(re.sub(sides, "", text)) for text in pair)
    if not (unit <= other or other <= unit):
        return False
    if a is not None and b is not None:
        return a == b or ("%" in x) != ("%" in y) and a * 100 ** ("%" in y) == b * 100 ** ("%" in x)
    if words or re.search(WORD, x) or re.search(WORD, y):
        return normal(given) == normal(wanted) != ""
    x, y = x if a is None else str(a), y if b is None else str(b)
    x, y = (", ".join(dict.fromkeys(z.replace(r"\pm", sign) for sign in "+-")) for z in (x, y))
    return x == y != "" or same_mathematics(x, y)


def is_correct(completion: str, answer: str, words: bool = False) -> bool:
    """Whether a completion's final answer is `answer`, or the one that a solution `answer` has."""
    given, wanted = extract(completion, words), claims(answer) or [bare(plain(answer), not words)]
    return given is not None and same_answer(given, bare(wanted[0]), words)


def normal(words: str) -> str:
    """Words without articles, punctuation and LaTeX, and without case except in Rr, CO and NaCl."""
    words = re.sub(r"[\^_{}]|\b(?:an?|[Tt]he)\s+(?=\w)|^An?\s+(?=[a-z])", "", plain(words))
    words = re.sub(r"(?<=[a-z])-(?=[a-z])|[^\w\s.%/+<>=^|×÷±\u2190-\u22ff-]|[.](?!\d)", " ", words)
    words = re.sub(r"\s*([-+<>=/^→])\s*", r"\1", words).split()
    return " ".join(word if CASED.fullmatch(word) else word.lower() for word in words)


def named(claim: str, options: list[str]) -> str | None:
    """The letter of the option that a claim names; "" where it names several, None where none."""
    letters = LETTERS[: len(options)]
    claim = JUNK.sub("", re.sub(r"\\[()\[\]]|~", " ", claim[:LONGEST_ANSWER].split("\n")[0]))
    for text in (claim, bare(claim)) * (not re.fullmatch(rf"[{letters}]|\(?\w\)", claim)):
        equal = [x for x, option in zip(letters, options, strict=True) if same_answer(text, option)]
        if len({options[LETTERS.index(letter)] for letter in equal}) == 1:
            return equal[0]
    letter, several, rest = m.groups() if (m := re.match(LETTER, claim)) else (" ", "", "")
    if (letter := letter.upper()) not in letters or several:
        return "" if letter in letters else None
    return letter if re.match(TAKEN, rest) or named(rest.lstrip(")]}"), options) == letter else None


def choose(text: str, options: list[str]) -> str | None:
    """The letter of the option that a completion takes, None where it takes none or several."""
    known = [plain(option)[:LONGEST_ANSWER] for option in options]
    repeated = r"\W{0,9}(?:(?:and|or|\w)\b\W{0,9}){0,2}".join(map(re.escape, known))
    text = re.sub(rf"(?:\b\w\W{{1,3}})?{repeated}", "", plain(after_thinking(text))).strip()
    rest = re.sub(r"(?m)(?:^\(?[A-Z][).] .*\n*){2,}", "", text)  # a list names none
    found = claims(text) or rest.split("\n")[:1] + re.split(LEAD, rest)[:-99:-1]
    letter = next((x for x in (named(claim, known) for claim in found) if x is not None), None)
    return LETTERS[options.index(options[LETTERS.index(letter)])] if letter else None
