"""The lessons: what changes from a script to its child, with the notes of lesson.toml.

python -m docs.build_lesson   # docs/lesson*.md, and side by side docs/site/lesson*.html

A unit is a function, a method, the head of a class, a numbered step of main, the head of its loop or
a banner; comments go with what follows them. A note covers units, so that no diff runs from one into another.
"""

import ast
import html
import re
import tomllib
from difflib import SequenceMatcher
from pathlib import Path
from string import Template

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

DOCS = Path(__file__).resolve().parent
FREE = ("docstring", "imports")  # these may differ without a note


def pages() -> list[dict]:
    return tomllib.loads((DOCS / "lesson.toml").read_text())["lesson"]


def read(script: str) -> list[str]:
    return (DOCS.parent / script).read_text().splitlines()


def units(lines: list[str]) -> dict[str, range]:
    """{name: line numbers from 0}: in order, and together the file but for blank lines between."""
    ends, found, begin = {}, {}, 0
    for node in ast.parse("\n".join(lines)).body:
        name = getattr(node, "name", lines[node.lineno - 1].split(" =")[0])
        free = {"Expr": FREE[0], "Import": FREE[1], "ImportFrom": FREE[1]}
        name = free.get(type(node).__name__, name)
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                ends[f"{name}.{part.name}" if hasattr(part, "name") else name] = part.end_lineno
            continue
        for i in range(node.lineno, node.end_lineno if name == "main" else 0):
            if lines[i].startswith("    for update in "):
                ends[name], name = i, "main: start of an update"
            if step := re.match(r" +# --- [\d.]+ ([^:(]+?)( \(|:| -|$)", lines[i]):
                ends[name], name = i, f"main: {step[1]}"
        ends[name] = node.end_lineno
    for i, line in enumerate(lines):
        if banner := re.match("# ==== (.+?) =+$", line):
            ends[banner[1]] = next(k for k in range(i, len(lines)) if not lines[k].startswith("#"))
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        while not lines[begin].strip():
            begin += 1
        found[name], begin = range(begin, end), end
    return found


def pairs(a: list[str], b: list[str]) -> list[tuple[str, range, range]]:
    """(unit, its lines in the parent, its lines in the child); empty where it is new or gone."""
    old, new, found, end = units(a), units(b), [], 0
    names, others = list(old), list(new)
    for tag, i1, i2, j1, j2 in SequenceMatcher(None, names, others, False).get_opcodes():
        if tag == "equal":
            found += [(name, old[name], new[name]) for name in names[i1:i2]]
        else:
            found += [(name, old[name], range(end, end)) for name in names[i1:i2]]
            found += [(name, range(0), new[name]) for name in others[j1:j2]]
        end = found[-1][2].stop
    return found


def hunks(a: list[str], b: list[str], i: range, j: range) -> list[list[tuple[str, range, range]]]:
    """Groups of (tag, parent's lines, child's lines): changes, and three equal lines around."""
    matcher = SequenceMatcher(None, a[i.start : i.stop], b[j.start : j.stop], False)
    return [
        [(tag, i[i1:i2], j[j1:j2]) for tag, i1, i2, j1, j2 in group]
        for group in matcher.get_grouped_opcodes()
    ]


def sections(page: dict, a: list[str], b: list[str]) -> list[tuple[dict, list]]:
    """[(note, its pairs)] in the page's order; last the pairs that have no note."""
    every = pairs(a, b)
    differ = {name for name, i, j in every if hunks(a, b, i, j)}
    noted = [name for note in page["note"] for name in note["units"]]
    wrong = {
        "differs and has no note": differ - {*noted, *FREE},
        "has a note and does not differ": set(noted) - differ,
        "has two notes": {name for name in noted if noted.count(name) > 1},
    }
    for what, names in wrong.items():
        if names:
            raise SystemExit(f"lesson.toml, {page['child']}: {', '.join(sorted(names))} {what}")
    others = [name for name, *_ in every if name not in noted]
    rest = {"title": "Docstring, imports and what is equal", "note": "", "units": others}
    return [
        (note, [pair for name in note["units"] for pair in every if pair[0] == name])
        for note in [*page["note"], rest]
    ]


def markdown(page: dict) -> str:
    """The lesson as GitHub shows it: every note above its diff."""
    a, b = read(page["parent"]), read(page["child"])
    names = [f"[{p['name']}]({p['file']}.md)" if p != page else p["name"] for p in pages()]
    side = f"`python -m docs.build_lesson`, then open docs/site/{page['file']}.html"
    picture = f"![{page['caption']}]({page['picture']})\n\n" if "picture" in page else ""
    out = [
        f"# {page['title']}\n\n{picture}{page['lead']}\n",
        f"Lessons: {' · '.join(names)}. Side by side in a browser: {side}.",
    ]
    for count, (note, parts) in enumerate(sections(page, a, b)[:-1], 1):
        out.append(f"\n## {count}. {note['title']}\n\n{note['note'].strip()}\n\n```diff")
        for name, i, j in parts:
            for group in hunks(a, b, i, j):
                out.append(f"@@ {name} @@")
                for tag, k, m in group:
                    if tag == "equal":
                        out += [f" {a[n]}".rstrip() for n in k]
                    else:
                        out += [f"-{a[n]}" for n in k] + [f"+{b[n]}" for n in m]
        out.append("```")
    return "\n".join(out) + "\n"


def website(page: dict) -> str:
    """The lesson side by side, the parent left; a strip shows where in the child it changes."""
    a, b = read(page["parent"]), read(page["child"])
    lexer, formatter = PythonLexer(stripnl=False), HtmlFormatter(nowrap=True, style="friendly")
    old, new = (highlight("\n".join(lines), lexer, formatter).split("\n") for lines in (a, b))
    main, strip = [], []

    def prose(text: str) -> str:
        return re.sub("`(.*?)`", r"<code>\1</code>", html.escape(text, quote=False))

    def both(tag: str, i: range, j: range) -> str:
        left = "".join(f"<i data-n={n + 1}>{old[n]}\n</i>" for n in i)
        right = "".join(f"<i data-n={n + 1}>{new[n]}\n</i>" for n in j)
        return f"<div class='pair {tag}'><pre class=l>{left}</pre><pre class=r>{right}</pre></div>"

    def fold(label: str, i: range, j: range) -> str:
        summary = f"<summary>{label}{len(i)} equal line{'s' * (len(i) > 1)}</summary>"
        if len(i) < 2 and not label:
            return both("equal", i, j) if i else ""
        return f"<details>{summary}{both('equal', i, j)}</details>"

    for count, (note, parts) in enumerate(sections(page, a, b), 1):
        title = html.escape(note["title"])
        title = f"{count}. {title}" if note["note"] else title  # numbered as in the .md
        main.append(f"<section id=n{count}><h2>{title}</h2><p>{prose(note['note'])}</p>")
        for name, i, j in parts:
            groups = hunks(a, b, i, j)
            main.append(f"<h3>{name}</h3>" if groups else fold(f"{name}, ", i, j))
            for group in groups:
                (_, k, m), (_, last_k, last_m) = group[0], group[-1]
                main.append(fold("", i[: k.start - i.start], j[: m.start - j.start]))
                main += [both(*change) for change in group]
                i, j = i[last_k.stop - i.start :], j[last_m.stop - j.start :]
                for tag, _, at in group:
                    where = f"top:{at.start / len(b):.2%};height:{len(at) / len(b):.2%}"
                    link = f"<a class={tag} href=#n{count} title='{title}' style='{where}'></a>"
                    strip.append(link if tag != "equal" else "")
            main.append(fold("", i, j) if groups else "")
        main.append("</section>")
    picture = ""
    if "picture" in page:
        alt = html.escape(page["caption"])
        picture = f'<p><img src="../{page["picture"]}" alt="{alt}"></p>'
    names = [
        f"<a href={p['file']}.html>{p['name']}</a>" if p != page else p["name"] for p in pages()
    ]
    return Template((DOCS / "lesson.template.html").read_text()).substitute(
        {key: page[key] for key in ("title", "parent", "child")},
        picture=picture,
        lead=prose(page["lead"]),
        lessons=" · ".join(names),
        strip="".join(strip),
        main="".join(main),
        colors=formatter.get_style_defs("pre"),
    )


if __name__ == "__main__":
    (DOCS / "site").mkdir(exist_ok=True)
    for page in pages():
        (DOCS / f"{page['file']}.md").write_text(markdown(page))
        (DOCS / "site" / f"{page['file']}.html").write_text(website(page))
        print(f"docs/{page['file']}.md and docs/site/{page['file']}.html")
