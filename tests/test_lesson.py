"""The lessons show the scripts as they are: every difference noted, every line the file's."""

import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from docs import build_lesson as build

PAGES = build.pages()
each_lesson = pytest.mark.parametrize("page", PAGES, ids=lambda page: page["child"])


class Page(HTMLParser):
    """What a page holds: the lines of each side by number, links, ids, tags still open."""

    def __init__(self, text: str):
        super().__init__()
        self.sides, self.links, self.ids, self.open = {"l": {}, "r": {}}, [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "pre":
            self.side = self.sides[attrs["class"]]
        if "data-n" in attrs:
            self.number = int(attrs["data-n"])
            assert self.number not in self.side, "a line stands twice"
            self.side[self.number] = ""
        self.links += [attrs["href"]] if tag == "a" else []
        self.ids += [attrs["id"]] if "id" in attrs else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "pre" in self.open:
            self.side[self.number] += data


@each_lesson
def test_markdown_is_the_built_one(page):
    built = build.markdown(page)
    assert (build.DOCS / f"{page['file']}.md").read_text() == built, (
        "run: python -m docs.build_lesson"
    )
    assert built.count("\n## ") == len(page["note"]) and built.count("```diff\n@@ ") == len(
        page["note"]
    )


@each_lesson
def test_notes_and_hunks_belong_together(page):
    """Every unit that differs has one note, and the diff under it leads from parent to child."""
    a, b = build.read(page["parent"]), build.read(page["child"])
    sections = build.sections(page, a, b)
    differing = [name for name, i, j in build.pairs(a, b) if build.hunks(a, b, i, j)]
    assert sorted(set(differing) - set(build.FREE)) == sorted(
        name for note, _ in sections[:-1] for name in note["units"]
    )
    diffs = re.findall(r"^```diff\n(.*?)^```", build.markdown(page), flags=re.M | re.S)
    for (note, parts), diff in zip(sections[:-1], diffs, strict=True):
        assert 1 <= len(re.findall(r"[.?!](?: |$)", note["note"])) <= 3
        old, new = (Counter(x[n] for p in parts for n in p[k]) for k, x in ((1, a), (2, b)))
        gone, come = (Counter(re.findall(rf"^[{c}](.*)$", diff, flags=re.M)) for c in "-+")
        assert gone <= old and come <= new and old - gone == new - come


@each_lesson
def test_page_shows_both_files(page):
    """Side by side stand all lines of both files, once each, but for blank ones between units."""
    shown = Page(build.website(page))
    assert shown.open == ["html"]
    for side, script in (("l", page["parent"]), ("r", page["child"])):
        lines = dict(enumerate(build.read(script), 1))
        assert all(text == lines[n] + "\n" for n, text in shown.sides[side].items())
        assert not any(text.strip() for n, text in lines.items() if n not in shown.sides[side])
    inside = [link[1:] for link in shown.links if link.startswith("#")]
    assert set(inside) == set(shown.ids)  # the strip leads to every section
    others = {f"{other['file']}.html" for other in PAGES if other is not page}
    assert {link for link in shown.links if not link.startswith("#")} == others


def test_the_method_comes_first():
    """The flags come last; VRPO's page begins with its critic, as a picture and as lines."""
    for page in PAGES:
        assert "MethodArgs" in page["note"][-1]["units"]
    text = build.markdown(PAGES[0])
    assert re.match(r"# .*\n\n!\[.+\]\(pictures/critic\.svg\)\n", text)
    shown = list(dict.fromkeys(re.findall(r"^@@ (\w+).* @@$", text, flags=re.M)))
    assert shown[:4] == ["Critic", "gaussian_kl", "semantic_losses", "critic_loss"]


SCRIPT = '''"""What it is."""

import os

# ==== 1. Args ====
# a picture


class Args:
    a: int = 1


class Critic:
    """V."""

    def values(self):
        return 1


# why
@property
def loss():
    return 2


LIMIT = 3


def main(args):
    seed()
    # --- 7.1 models ---
    load()

    for update in range(2):
        start()
        # --- 7.2 rollout ---
        play()

        # --- 7.3 update: micro-batches ---
        learn()

        # --- 7.4 log (a page), evaluate ---
        log()


if __name__ == "__main__":
    main(Args())
'''


def test_units_are_the_file():
    lines = SCRIPT.splitlines()
    found = build.units(lines)
    assert list(found) == [
        "docstring", "imports", "1. Args", "Args", "Critic", "Critic.values", "loss", "LIMIT",
        "main", "main: models", "main: start of an update", "main: rollout", "main: update", "main: log",
        "if __name__",
    ]  # fmt: skip
    assert (
        lines[found["loss"].start] == "# why" and lines[found["1. Args"].stop - 1] == "# a picture"
    )
    covered = [n for numbers in found.values() for n in numbers]
    assert covered == sorted(set(covered))
    assert not any(lines[n] for n in set(range(len(lines))) - set(covered))


def test_what_is_new_gone_or_changed(monkeypatch):
    """Differences are found unit by unit; a note missing or too many is told in a sentence."""
    child = SCRIPT.replace("return 2", "return 3").replace("LIMIT = 3\n\n\n", "")
    child = child.replace("# why", "def price():\n    return 1 < 2\n\n\n# why")
    scripts = {"a.py": SCRIPT.splitlines(), "b.py": child.splitlines()}
    monkeypatch.setattr(build, "read", scripts.get)
    a, b = scripts.values()
    differing = {p[0]: p for p in build.pairs(a, b) if build.hunks(a, b, *p[1:])}
    assert set(differing) == {"price", "loss", "LIMIT"}
    assert not differing["price"][1] and not differing["LIMIT"][2] and differing["loss"][1]
    page = {"file": "x", "name": "X", "parent": "a.py", "child": "b.py", "title": "T", "lead": "L"}
    page["note"] = [
        {"title": "N's <b>", "note": "Of `1 < 2`.", "units": ["loss", "price", "LIMIT"]}
    ]
    assert (
        "@@ loss @@\n # why\n @property\n def loss():\n-    return 2\n+    return 3\n@@ price"
        in (build.markdown(page))
    )
    text = build.website(page)
    assert (
        "N&#x27;s &lt;b&gt;" in text
        and "<code>1 &lt; 2</code>" in text
        and "<b>" not in text.split("<h2")[1]
    )
    for names, said in (
        (["loss", "price"], "LIMIT differs and has no note"),
        (["loss", "price", "LIMIT", "main"], "main has a note and does not differ"),
        (["loss", "price", "LIMIT", "loss"], "loss has two notes"),
    ):
        page["note"][0]["units"] = names
        with pytest.raises(SystemExit, match=f"b.py: {said}"):
            build.markdown(page)
