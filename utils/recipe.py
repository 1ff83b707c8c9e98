"""Writes a script with recipes applied to it. A recipe is an idea as a patch: recipes/NAME.patch.

    python -m utils.recipe --list                                    # what there is
    python -m utils.recipe critic_warmup value_clip -o my_ppo.py
    python -m utils.recipe critic_warmup --on vrpo_math.py -o my_vrpo.py

docs/recipes.md has a table of them, and how to write one.
"""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from utils.args import command
from utils.errors import first_line, stop
from utils.files import writing

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
FIELDS = ("Title", "Idea", "Source", "Scripts", "Expect")
Hunk = tuple[list[str], list[str]]  # lines, and what takes their place


class Recipe(NamedTuple):
    about: dict[str, str]
    """the header, by FIELDS"""
    diffs: list[list[Hunk]]
    """one, or several of which the first that fits a script is meant for it"""

    @property
    def scripts(self) -> list[str]:
        return re.split(r"[,\s]+", self.about["Scripts"])


def known() -> list[str]:
    return sorted(file.stem for file in RECIPES.glob("*.patch"))


def read(name: str) -> Recipe:
    """recipes/NAME.patch: a header, then unified diffs, of which file names and line numbers do not
    count. Stops where there is none, or where it is none."""
    if name not in known():
        near = [f"did you mean {near}? There" for near in get_close_matches(name, known(), 1)]
        stop(f"no recipe is called {name}; {(near or ['there'])[0]} are {', '.join(known())}")
    text = (RECIPES / f"{name}.patch").read_text(encoding="utf-8")
    header, *diffs = re.split(r"^--- .*\n\+\+\+ .*\n", text, flags=re.M)
    fields = re.findall(r"^(\w+): *(.*\n(?:[ \t]+.*\n)*)", header, flags=re.M)
    about = {key: " ".join(words.split()) for key, words in fields}
    if lacking := [field for field in FIELDS if not about.get(field)]:
        stop(f"recipes/{name}.patch: its header says nothing of {', '.join(lacking)}")
    found = [[hunk(part) for part in re.split(r"^@@.*\n", d, flags=re.M)[1:]] for d in diffs]
    placed = all(hunks and all(old for old, _ in hunks) for hunks in found)
    if not found or not placed or any(re.search(r"^[^-+ @\\\n]", d, flags=re.M) for d in diffs):
        stop(f"recipes/{name}.patch: it is no unified diff with lines of context")
    return Recipe(about, found)


def hunk(text: str) -> Hunk:
    """The old and the new lines of a hunk. An empty line is one that has lost its blank."""
    lines = [line or " " for line in text.removesuffix("\n").split("\n")]
    old, new = ([line[1:] for line in lines if line[0] in kind] for kind in (" -", " +"))
    return old, new


def replaced(text: str, recipe: Recipe) -> tuple[str, str | None]:
    """The text with the new lines in place of the old ones, which must stand there exactly once;
    and, where they do not, the line at which the first diff fails: of those that it looks for one
    that is nowhere, else the first."""
    sought = None
    for hunks in recipe.diffs:
        lines = text.split("\n")
        for old, new in hunks:
            size = len(old)
            places = [i for i in range(len(lines)) if lines[i : i + size] == old]
            if len(places) != 1:
                words = [line for line in old if line.strip()]
                lost = [line for line in words if line not in lines]
                sought = sought or (lost or words or [""])[0].strip()
                break
            lines[places[0] : places[0] + size] = new
        else:
            return "\n".join(lines), None
    return text, sought


def goes(text: str, names: Sequence[str]) -> bool:
    """Whether recipes can be applied in this order."""
    for name in names:
        text, sought = replaced(text, read(name))
        if sought is not None:
            return False
    return True


def derive(script: str, names: Sequence[str]) -> str:
    """The text of a script with recipes applied to it, one after the other."""
    try:
        original = text = (ROOT / script).read_text(encoding="utf-8")
    except OSError as error:
        stop(f"--on {script}: it could not be read in {ROOT} ({error.strerror})")
    for before, name in enumerate(names):
        recipe = read(name)
        if script not in recipe.scripts:
            stop(f"--on {script}: the recipe {name} is for {', '.join(recipe.scripts)}")
        text, sought = replaced(text, recipe)
        if sought is not None:
            if replaced(original, recipe)[1] is None:
                others, first = " or ".join(names[:before]), [name, *names[:before]]
                stop(
                    f"{name} collides with {others}: the line `{sought}` is no longer there just once"
                    + f"; name {name} first, that goes" * goes(original, first)
                )
            stop(f"{name} does not fit {script}: its line `{sought}` is not there just once")
    try:
        ast.parse(text)
    except SyntaxError as error:
        stop(f"{script} with {', '.join(names)} would be no Python ({first_line(error)})")
    title = f"{script} with the recipe{'s' * (len(names) > 1)} {', '.join(names)}"
    title = f'"""{title} (python -m utils.recipe).'
    if text.startswith('"""'):
        return f"{title}\n\n{text[3:]}"
    return f'{title}"""\n\n{text}'


@dataclass
class Args:
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """recipes, applied in this order"""
    list: bool = False
    """what there is"""
    on: str | None = None
    """the script that they change; default: the first that all of them name"""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """the script to write, beside the others"""


def main(args: Args) -> None:
    if args.list:
        for name in known():
            about = read(name).about
            print(f"{name}: {about['Title']}\n    {about['Idea']}\n    {about['Scripts']}\n")
        return
    if not args.names or args.out is None:
        stop(f"give recipes and -o; there are {', '.join(known())} (--list says more)")
    first, *others = [read(name).scripts for name in args.names]
    common = [script for script in first if all(script in scripts for scripts in others)]
    if not common:
        stop(f"there is no script that all of {', '.join(args.names)} are for")
    out, script = args.out, Path(args.on).name if args.on else common[0]
    if out.suffix != ".py" or not out.stem.isidentifier():
        stop(f"-o {out}: give a name such as my_{script}")
    if not (out.parent / "utils").is_dir():
        stop(f"-o {out}: no utils/ lies beside it, which the script needs; write it to {ROOT}")
    text = derive(script, args.names)
    if out.exists():
        stop(f"-o {out}: it is there already; give another name or delete it")
    with writing(out):
        out.write_text(text, encoding="utf-8", newline="\n")
    print(f"{out}: see `diff {script} {out}`, run it with `python {out}`")


if __name__ == "__main__":
    main(command(Args, "python -m utils.recipe", __doc__))
