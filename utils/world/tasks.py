"""Tasks: questions and goals turned into prompts, and graded."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from utils.chat import Chat
from utils.errors import stop
from utils.world.answers import choose, extract, is_correct, normal, quantity, same_answer
from utils.world.data import load_split, split_name
from utils.world.problems import Problem, Task

EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=(-?\d+)")  # a line of a worked solution


class MathTask(Task):
    """Questions with one final answer, that of the last completion: a number or other mathematics,
    or the letter of an option."""

    words = False  # whether an answer without options is words

    def __init__(self, *args):
        super().__init__(*args)
        self.voted: dict[str, list[str]] = {}  # final answers by problem, no two of them equal

    def grade(self, problem: Problem, completions: list[str]) -> float:
        """1.0 for a right final answer, 0.0 for a wrong one, NaN where no reference is known."""
        if problem.answer is None:
            return float("nan")
        if problem.options:
            return float(choose(completions[-1], problem.options) == problem.answer)
        return float(is_correct(completions[-1], problem.answer, self.words))

    def asked(self, problem: Problem) -> tuple[str, str]:
        """Question and reference, of options the letter, as --reward-fn is given them; "" where no
        reference is known."""
        return problem.key, "" if problem.answer is None else str(problem.answer)

    def final_answer(self, problem: Problem, completion: str) -> str:
        """The final answer in a form in which equal letters, numbers, words or expressions are
        equal strings: of equal answers the first that came. 50% is not 0.5 here, for it may be 50:
        the sign stays, and so do units. "" where there is none."""
        if problem.options:
            return choose(completion, problem.options) or ""
        found = extract(completion, self.words)
        if not found:
            return ""
        number, text, unit = quantity(found)
        if number is not None and not unit:
            found = str(number) + "%" * ("%" in text)
        elif self.words:
            found = normal(found)
        known = self.voted.setdefault(problem.key, [])
        alike = [answer for answer in known if ("%" in answer) == ("%" in found)]
        equal = [answer for answer in alike if same_answer(found, answer, self.words)]
        known += [] if equal else [found]
        return (equal or [found])[0]

    def reply(self, problem: Problem, completions: list[str]) -> str | None:
        """The user's next message after the given answers, or None where the episode is over. After
        a question the user has but one thing to say, and only where --max-turns allows another
        turn."""
        return "Check your work and answer again."

    def show(self, problem: Problem, completions: list[str]) -> dict[str, str]:
        """An episode as the columns of a table."""
        return {
            "question": problem.key,
            "completion": completions[-1],
            "reference": str(problem.answer),
        }

    def messages(self, problem: Problem, completions: list[str]) -> list[dict[str, str]]:
        """The conversation up to the last answer, without the prompt template."""
        turns = [{"role": "user", "content": problem.key}]
        for i, text in enumerate(completions):
            turns += (
                [{"role": "user", "content": self.reply(problem, completions[:i])}] if i else []
            )
            turns.append({"role": "assistant", "content": text})
        return turns

    def measure(self, pairs: list[tuple[Problem, list[str]]]) -> dict[str, float]:
        """The share of right answers."""
        return {"accuracy": sum(self.grade(p, texts) for p, texts in pairs) / len(pairs)}


class ScienceTask(MathTask):
    """Questions whose answers are short and in words, or the letter of an option."""

    words = True


class LongTask(MathTask):
    """Chains of calculations, one equation a line, each with the result of the one before: of those
    the right steps are counted too."""

    def measure(self, pairs: list[tuple[Problem, list[str]]]) -> dict[str, float]:
        """The share of right answers, and of the steps that are right."""
        shares = [right_steps(texts[-1], str(problem.answer)) for problem, texts in pairs]
        return super().measure(pairs) | {"right_steps": sum(shares) / len(pairs)}


def right_steps(said: str, solution: str) -> float:
    """The share of a worked solution's lines whose step the answer takes: the equation in its place
    does the same, without a slip, to what the answer had come to there, right or wrong. So one
    wrong step costs one line. NaN where the solution has no equations."""
    found, asked = EQUATION.findall(said), EQUATION.findall(solution)
    if not asked:
        return float("nan")
    before, right = asked[0][0], 0
    for (left, op, operand, result), (_, *step, _) in zip(found, asked, strict=False):
        right += left == before and [op, operand] == step and result == calculate(left, op, operand)
        before = result
    return right / len(asked)


def calculate(left: str, op: str, right: str) -> str:
    """What stands behind `=`; "" where nothing can."""
    a, b = int(left), int(right)
    if op == "/":
        return str(a // b) if b and a % b == 0 else ""
    return str({"+": a + b, "-": a - b, "*": a * b}[op])


def load_task(args, chat: Chat) -> Task:
    """Both splits as the flags under "the task" say, as prompts. Drops what is too long, what of
    train is in test and what has no reference and needs one, and stops with one
    sentence where something does not fit."""
    if "{question}" not in args.prompt_template:
        stop(f"--prompt-template {args.prompt_template!r}: it must contain {{question}}")
    if args.task == "dialogue":
        from utils.dialogue.task import load_dialogues as load
    else:
        load = load_questions
    kind, rows, lost = load(args)
    splits: dict[str, list[Problem]] = {"test": [], "train": []}
    dropped: dict[str, int] = {}
    for name, problems in splits.items():
        open_label = name == "train" and unlabelled(args)
        known = [row for row in rows[name] if row[2] is not None or open_label]
        asked = [
            Problem(key, a, prompt(chat, args.prompt_template, q), options)
            for key, q, a, options in known
        ]
        short = [p for p in asked if len(p.prompt_ids) <= args.max_prompt_tokens]
        held_out = {p.key for p in splits["test"]}
        problems += [p for p in short if p.key not in held_out]
        counts = {
            **lost[name],
            "without a reference": len(rows[name]) - len(known),
            "with too long a prompt": len(asked) - len(short),
        }
        counts["also in test"] = len(short) - len(problems)
        dropped |= {f"{name} problems {reason}": n for reason, n in counts.items() if n}
        if not problems:
            split = getattr(args, f"{name}_split") or name
            total = len(rows[name]) + sum(lost[name].values())
            stop(
                f"--{name}-split {split}: no problem is left of {total} (dropped: {dropped}); see --max-prompt-tokens"
            )
    check_context(chat, splits["train"] + splits["test"], args.max_new_tokens)
    # args.json then tells of how many problems a score is the mean
    args.eval_size = min(args.eval_size, len(splits["test"]))
    return kind(splits["train"], splits["test"], dropped)


def unlabelled(args) -> bool:
    """Whether training needs no references: votes make their own, a reward function may need none."""
    return args.noise == "majority-vote" or getattr(args, "reward_fn", None) is not None


def prompt(chat: Chat, template: str, asked: str | list[dict[str, str]]) -> list[int]:
    """Tokens of a question, or of a conversation that ends with one, the template around it."""
    turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    question = template.replace("{question}", turns[-1]["content"])
    return chat.conversation_ids([*turns[:-1], {"role": "user", "content": question}])


def check_context(chat: Chat, problems: list[Problem], max_new_tokens: int) -> None:
    """Stop where a prompt and an answer are more than the model has positions for."""
    longest = max(len(p.prompt_ids) for p in problems)
    if chat.context is not None and longest + max_new_tokens > chat.context:
        stop(
            f"--max-new-tokens {max_new_tokens}: behind the longest prompt of {longest} tokens that is more than "
            f"the model's {chat.context} positions; lower it or --max-prompt-tokens"
        )


QUESTIONS = {"math": MathTask, "science": ScienceTask, "long": LongTask}

# For "train" and "test": key, first message or conversation, what counts as right, options; and
# what has been left out, by reason.
Rows = dict[str, list[tuple[str, str | list[dict[str, str]], Any, tuple[str, ...]]]]
Lost = dict[str, Counter]


def load_questions(args) -> tuple[Callable, Rows, Lost]:
    """Questions and reference answers of the data sets. The key of a problem is its question with
    the options."""
    lost: Lost = {"train": Counter(), "test": Counter()}

    def problems(part: str, name: str, split: str | None, unlabelled: bool):
        found = load_split(args, *split_name(name), split, part, unlabelled, lost[part])
        return [(q.message, q.conversation, q.answer, q.options) for q in found]

    loaded = {
        "test": problems("test", args.test_dataset or args.dataset, args.test_split, False),
        "train": problems("train", args.dataset, args.train_split, unlabelled(args)),
    }
    return QUESTIONS[args.task], loaded, lost
