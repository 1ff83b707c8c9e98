"""A reward of your own: --reward-fn MODULE:FUNCTION.

What goes wrong in it is told in one sentence, with its file and line: our traceback would not help.
"""

import importlib
import inspect
import os
import reprlib
import sys
import traceback
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn

from utils.errors import first_line, stop

WANTED = "give MODULE:FUNCTION, such as rewards:short for short() in ./rewards.py"


class Refusal(Exception):
    """Why the user's function gives no reward."""


class RewardFunction:
    """`function(question, answer, completions) -> float`, by its name MODULE:FUNCTION."""

    def __init__(self, name: str):
        self.name = name
        try:
            self.function = find(name)
        except Refusal as refusal:
            self.stop(refusal)

    def stop(self, refusal: Refusal | str) -> NoReturn:
        stop(f"--reward-fn {self.name}: {refusal}")

    def scores(self, episodes: list[tuple[str, str, list[str]]]) -> list[float] | str:
        """A number for every (question, answer, completions); or why there is none, in words, as
        all processes stop where the first one has asked."""
        try:
            return [self.score(*episode) for episode in episodes]
        except Refusal as refusal:
            return str(refusal)

    def score(self, question: str, answer: str, completions: list[str]) -> float:
        try:
            found = self.function(question, answer, list(completions))
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # it is a program of others
            raise Refusal(blame(error)) from error
        number = found.item() if getattr(found, "ndim", None) == 0 else found  # numpy, torch
        if not isinstance(number, Real) or not abs(number) < 3e38:  # float32; NaN is not below it
            kind, text = type(found).__name__, " ".join(reprlib.repr(found).split())
            raise Refusal(f"{begin(self.function)}returned {text} ({kind}), not a finite number")
        return float(number)


def find(name: str) -> Callable:
    """The function; its module may lie in the current directory."""
    module, _, attribute = name.partition(":")
    if not attribute or not all(part.isidentifier() for part in module.split(".")):
        raise Refusal(WANTED)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):  # it, not what it imports
            raise Refusal(f"there is no module {module}; {WANTED}") from error
        raise Refusal(blame(error)) from error
    except (Exception, SystemExit) as error:
        raise Refusal(blame(error)) from error
    if not callable(function):
        raise Refusal(f"{module} has no function {attribute}")
    try:
        inspect.signature(function).bind("question", "answer", ["completion"])
    except TypeError as error:
        called = f"{attribute}(question, answer, completions)"
        raise Refusal(f"{begin(function)}cannot be called as {called} ({error})") from error
    except ValueError:  # a builtin that does not tell
        pass
    return function


def blame(error: BaseException) -> str:
    """What was raised, and the user's line that it came through last."""
    said = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{place(error.filename, error.lineno)}{said}"
    frames = traceback.extract_tb(error.__traceback__)
    frames = [f for f in frames if f.filename != __file__ and "importlib" not in f.filename]
    own = [f for f in frames if f.filename == frames[0].filename]
    return f"{place(own[-1].filename, own[-1].lineno) if own else ''}{said}"


def begin(function: Any) -> str:
    """Where a function begins, if that is known."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return place(code.co_filename, code.co_firstlineno) if code else ""


def place(file: str, line: int | None) -> str:
    path = Path(file)
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return f"{path}, line {line}: "
