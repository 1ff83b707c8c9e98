"""The pages that show what a critic sees, token by token."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.conftest import ROOT
from utils.report import tokens

FLAGS = {"model": str(ROOT / "assets" / "tiny_math"), "max_new_tokens": 32, "noise_rate": 0.5}
FLAGS |= {"updates": 1, "eval_size": 1}


def records(folder):
    return [json.loads(line) for line in (folder / "transcripts.jsonl").read_text().splitlines()]


def check_transcript(row: dict) -> None:
    """The tokens behind the prompt are the conversation, the reward stands on the last of them, and
    numbers for all of them."""
    table, policy = row["tokens"], AutoTokenizer.from_pretrained(FLAGS["model"])
    numbers = {"values", "advantages", "entropy", "rewards"}
    assert set(table) == {"ids", "text", "chosen"} | numbers and table["chosen"][0]
    assert {len(column) for column in table.values()} == {len(table["text"])}
    assert row["messages"][1]["content"] in "".join(table["text"])
    assert table["text"] == [policy.decode(i) for i in table["ids"]]
    assert row["messages"][0]["content"] in policy.decode(row["prompt"])
    assert table["rewards"][-1] == row["rewards"][-1] and not any(table["rewards"][:-1])
    assert table["values"][-1] == pytest.approx(row["values"][-1], abs=1e-4)


class Page(HTMLParser):
    """A page taken apart: texts by tag, classes, attributes of the tokens, all tags."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self.classes, self.boxes, self.open = set(), {}, [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        self.open += [tag] if tag not in ("input", "meta") else []
        self.classes.append(attrs.get("class"))
        self.texts.setdefault(tag, []).append("")
        self.boxes += [attrs] if tag == "i" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in self.texts:
            self.texts[self.open[-1]][-1] += data


def test_page_and_picture(run_main, tmp_path):
    """One line for every run, in all colours at once; GRPO has no values; questions with a wrong
    reward come first."""
    runs = [run_main(name, **FLAGS) for name in ("ppo_baseline", "grpo_baseline")]
    check_transcript(records(runs[0])[0])
    out = tmp_path / "tokens.html"
    tokens.main(tokens.Args(runs=tuple(runs), out=out, rows=2, update=1, color="entropy"))
    page = Page(out.read_text())
    assert len(page.texts["h2"]) == 2 and page.texts["b"] == ["ppo_baseline", "grpo_baseline"] * 2
    assert page.texts["label"] == [" entropy", " values", " advantages"]
    assert page.classes.count("legend values") == 3  # the colour bar, and twice that GRPO has none
    assert "verdict wrong" in page.classes
    groups = tokens.pick({run.name: tokens.read_rows(run) for run in runs}, 1, 8)
    rows = [row for _, by_run in groups[:2] for row in by_run.values()]
    assert len(page.boxes) == sum(sum(row["tokens"]["chosen"]) for row in rows)
    for box in page.boxes:
        shown = re.findall(r"(\w+) -?\d+\.\d{3}", box["data-numbers"])
        assert shown in (["entropy", "values", "advantages"], ["entropy", "advantages"])
        assert re.findall(r"--(\w+):#[0-9a-f]{6}(?:;|$)", box["style"]) == shown
    assert (tmp_path / "tokens.png").stat().st_size > 5000
    wrong = [
        any(tokens.observed(r) != tokens.clean(r) for r in rows.values()) for _, rows in groups
    ]
    assert wrong[0] and len(groups) >= 2
    assert [q for q, _ in groups] == list(dict.fromkeys(q for q, _ in groups))


HOSTILE = "</pre><script>alert('x')</script> \" onload='y' & <b> &amp; </style>"


def test_whatever_is_said_is_text():
    """Question (in a dialogue it names the slots), run and tokens of both sides, escaped."""
    table = {"text": [HOSTILE, HOSTILE + "2", "a\nb", ""], "chosen": [True, False, True, True]}
    table |= {key: [0.1, 0.0, 0.3, 0.2] for key in ("values", "advantages", "entropy", "rewards")}
    row = {"update": 1, "tokens": table, "outcome": {"average": 1.0}}
    page = Page(tokens.page([(HOSTILE + "3", {HOSTILE + "4": row})], list(tokens.COLORS)))
    known = "html meta title style header label input div span h2 b pre i"
    assert page.tags == set(known.split())
    assert page.texts["h2"] == [HOSTILE + "3"] and page.texts["b"] == [HOSTILE + "4"]
    assert page.texts["i"] == [HOSTILE, "a⏎b", "·"] and HOSTILE + "2" in page.texts["span"]
    assert all(set(box) == {"tabindex", "data-numbers", "style"} for box in page.boxes)


def test_a_wrong_reward_is_marked():
    """The chip says what the optimiser observed and what is true, and stands out if they differ."""
    rows = {name: made_up("q", *pair) for name, pair in {"a": (1.0, 0.0), "b": (0.0, 0.0)}.items()}
    page = tokens.page([("q", rows)], list(tokens.COLORS))
    assert "<span class='verdict wrong'>observed 1, truth 0</span>" in page
    assert "<span class='verdict'>observed 0, truth 0</span>" in page


def test_what_cannot_be_shown_is_said(run_main, tmp_path):
    with pytest.raises(SystemExit, match="no readable transcripts"):
        tokens.read_rows(tmp_path)
    (tmp_path / "transcripts.jsonl").write_text(json.dumps({"update": 1, "messages": []}) + "\n")
    with pytest.raises(SystemExit, match="have no tokens"):
        tokens.read_rows(tmp_path)
    run = run_main("ppo_baseline", truncated="grade")
    with pytest.raises(SystemExit, match=r"--update 9: the runs have \[1, 2\]"):
        tokens.main(tokens.Args(runs=(run,), update=9, out=tmp_path / "x.html"))
    with pytest.raises(SystemExit, match="the runs have no update in common"):
        tokens.pick({"a": {1: {}}, "b": {2: {}}}, None, 3)
    with pytest.raises(SystemExit, match="at least one run"):
        tokens.main(tokens.Args())
    for name in ("page.png", "page"):  # the picture would take the page's place
        with pytest.raises(SystemExit, match=f"--out {name}: give a name that ends in .html"):
            tokens.main(tokens.Args(runs=(run,), out=Path(name)))
    rows = records(run)
    for row in rows:
        row["messages"][0]["content"] += " And why?"
    (tmp_path / "transcripts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="no question in common"):
        tokens.main(tokens.Args(runs=(run, tmp_path), out=tmp_path / "x.html"))


def test_names_are_what_differs():
    for paths, names in (
        (["runs/a__s__1", "runs/bc__s__1"], ["a", "bc"]),
        (["runs/a__s__1", "old/a__t__1"], ["runs__s", "old__t"]),
        (["x/a", "y/z/b"], ["a", "b"]),
        (["x/a", "y/z/a"], ["x/a", "y/z/a"]),
        (["runs/a"], ["a"]),
        (["runs/a", "runs/a"], ["runs/a", "runs/a"]),
        # when they began is said only if nothing else differs
        (["runs/a__1__20250101-093000", "runs/b__1__20250101-101500"], ["a", "b"]),
        (["runs/a__1__20250101-093000", "runs/a__1__20250101-101500"], ["20250101-093000", "20250101-101500"]),
    ):  # fmt: skip
        assert tokens.short_names(paths) == names


def made_up(prompt: str, observed: float, clean: float, text: str = "x") -> dict:
    table = {"text": [text], "chosen": [True], "entropy": [0.1], "advantages": [0.2]}
    return {
        "update": 1, "messages": [{"content": prompt}], "outcome": {"accuracy": clean},
        "tokens": table | {"rewards": [observed]},
    }  # fmt: skip


def write(folder, rows):
    folder.mkdir()
    (folder / "transcripts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_one_misjudged_answer_among_many_does_not_hide_the_others(tmp_path):
    run = write(tmp_path / "a", [made_up(f"q{i}", 1.0, float(i != 7)) for i in range(20)])
    groups = tokens.pick({"a": tokens.read_rows(run)}, None, 8)
    assert [q for q, _ in groups] == ["q7", "q0", "q1", "q2", "q3", "q4", "q5", "q6"]


def test_odd_rows_are_shown(tmp_path):
    """Equal prompts, mathematics and dollars in a token, no reference, no values."""
    rows = [
        made_up("Is $\\frac{1}{2$ it?\nYes", 1.0, float("nan"), "$x^$"),
        made_up("same", 0.0, 1.0),
        made_up("same", 1.0, 1.0),
    ]
    run = write(tmp_path / "a", rows)
    assert list(tokens.read_rows(run)[1])[1:] == ["same", "same (2)"]
    tokens.main(tokens.Args(runs=(run,), out=tmp_path / "odd.html", color="entropy"))
    assert "observed 1, truth nan" in (tmp_path / "odd.html").read_text()
    assert (tmp_path / "odd.png").stat().st_size > 3000
