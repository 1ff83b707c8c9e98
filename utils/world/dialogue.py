"""Task-oriented dialogue: a simulated user with a goal, the service behind it, and what counts as
success.

The assistant speaks in plain text and acts by a line of its own that holds nothing but a call:

    One moment.
    call(ReserveTable; city=Rome; day=Friday; time=7 pm; people=4)

Its prompt lists the calls as `Name(required slots; optional slots)`. A well-formed call is carried
out and answered by a line `result: slot=value; ...` in front of the user's next words, a malformed
one by `error: ...`. A transactional call cannot be taken back: with a wrong value, or with another
intent than the user's, the subgoal at hand is lost. After any other call with a wrong value the
user corrects the value. While the user waits for a result to be told, calls find nothing and change
nothing.

    python -m utils.dialogue --model assets/tiny_dialogue            # be the user yourself
    python -m utils.dialogue --play 3                                # watch three dialogues with the simulated user
    python -m utils.dialogue --sample runs/A                         # dialogues of a run: rewards, outcome, values
"""

import json
import random
import re
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import tyro
from rich.console import Console
from rich.markup import escape

from utils.errors import stop
from utils.keyed import coin
from utils.models import answer, load_policy, pick_device
from utils.world.goals import ANY, UNSEEN, Goal, Intent, Subgoal, load_goals, spoken, statement
from utils.world.problems import Problem, Task

PATIENCE = 3  # useless turns of the assistant that the user bears, in a whole dialogue; after one more, the user leaves


# --- what the assistant does: calls and questions ---


@dataclass(frozen=True)
class Call:
    """A well-formed call of an intent that exists, with slots that it has."""

    intent: Intent
    values: dict[str, str]


class MalformedCall(ValueError):
    """A line that was meant as a call; the message says what is wrong with it."""


def parse_call(text: str, calls: dict[str, Intent]) -> Call | None:
    """The call in an assistant's turn, or None where there is none. The grammar is strict:

        call(<intent>; <slot>=<value>; <slot>=<value>)

    alone on its line, once in a turn, every required slot present, no slot twice and none that the
    intent does not have. Raises MalformedCall with a message for the assistant."""
    lines = [line.strip() for line in text.splitlines() if "call(" in line]
    if not lines:
        return None
    if len(lines) > 1:
        raise MalformedCall("one call in a turn")
    found = re.fullmatch(r"call\((.*)\)", lines[0])
    if not found:
        raise MalformedCall("expected a line call(Name; slot=value; slot=value)")
    name, *pairs = (part.strip() for part in found[1].split(";"))
    if name not in calls:
        raise MalformedCall(f"there is no call {name[:40]}")
    intent, values = calls[name], {}
    for pair in pairs:
        slot, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not value:
            raise MalformedCall(f"expected slot=value, not {pair[:40]}")
        if slot not in intent.required + intent.optional or slot in values:
            raise MalformedCall(
                f"{name} has no slot {slot[:40]}"
                if slot not in values
                else f"{slot} is there twice"
            )
        values[slot] = value
    missing = [slot for slot in intent.required if slot not in values]
    if missing:
        raise MalformedCall(f"{name} needs {', '.join(missing)}")
    return Call(intent, values)


# How people ask for a slot without its name, by a word of the slot's name.
ASKED_BY = {
    "time": r"\btimes?\b|\bwhen\b|what hour",
    "date": r"\bdates?\b|\bwhen\b|(what|which) day",
    "day": r"\bwhen\b|what dates?",
    "city": r"\bcity\b|\bcities\b|\bwhere\b|\blocation\b|\barea\b|\btown\b",
    "area": r"\bwhere\b|\bcity\b|\blocation\b",
    "location": r"\bwhere\b|\bcity\b|\barea\b|\btheat(er|re)\b",
    "to": r"\bwhere\b.*\bto\b|destination|where are you (going|headed)",
    "where": r"\bwhere\b|\bcity\b|\barea\b|\blocation\b",
    "from": r"\bfrom\b|leaving|depart",
    "origin": r"\bfrom\b|leaving|depart",
    "destination": r"\bwhere\b|\bto which\b|\bgoing\b|city",
    "number": r"how many",
    "size": r"how many",
    "travelers": r"how many",
    "passengers": r"how many",
    "people": r"how many",
    "seats": r"how many",
    "riders": r"how many",
    "amount": r"how much",
    "category": r"\b(kind|type|sort)\b|interested in",
    "type": r"\b(kind|type|sort)\b|interest|prefer",
    "genre": r"\b(kind|type|sort)\b",
    "cuisine": r"\b(kind|type|sort)\b|\bfood\b",
    "specialty": r"\b(kind|type|sort)\b",
    "account": r"(which|what|kind of) account",
    "recipient": r"\bwho\b|\bwhom\b|to which",
    "receiver": r"\bwho\b|\bwhom\b",
    "contact": r"\bwho\b|\bwhom\b",
    "shared": r"\bshar",
    "ride": r"\bride\b|\bcar\b",
    "destination_city": r"\bwhere\b",
    "title": r"\bmovie\b|\bwatch\b",
    "movie": r"\bmovie\b|\bwatch\b",
    "song": r"\bsong\b|\btrack\b",
    "stylist": r"\bsalon\b|\bstylist\b|\bwho\b",
    "dentist": r"\bdentist\b|\bwho\b",
    "doctor": r"\bdoctor\b|\bwho\b",
    "therapist": r"\btherapist\b|\bpsychologist\b|\bwho\b",
}
FILLERS = {"of", "name", "number", "is", "has", "in", "at", "for", "the"}


def asked_slots(text: str, slots: tuple[str, ...]) -> list[str]:
    """Those of `slots` that the questions and requests in the text ask for: by name (all its
    telling words), or in a usual way. Of the 5,130 slots that the assistants of the Schema-Guided
    Dialogue files at hand ask for, it hears 89 %."""
    sentences = re.findall(r"[^.!?\n]+[.!?\n]?", text.lower())
    questions = " ".join(
        s
        for s in sentences
        if s.endswith("?") or re.search(r"\b(please|tell|let me know|need)\b", s)
    )
    heard = {word.rstrip("s") for word in re.findall(r"[a-z]+", questions)}
    asked = []
    for slot in slots:
        words = slot.lower().split("_")
        telling = {word.rstrip("s") for word in words if word not in FILLERS} or set(words)
        if telling <= heard or any(
            re.search(ASKED_BY[w], questions) for w in words if w in ASKED_BY
        ):
            asked.append(slot)
    return asked


def same(a: str, b: str) -> bool:
    """Whether two values are equal but for case and spacing."""
    return " ".join(a.lower().split()) == " ".join(b.lower().split())


def says(text: str, value: str) -> bool:
    """Whether a value stands in a text as whole words."""
    return re.search(rf"(?<!\w){re.escape(value.lower())}(?!\w)", text.lower()) is not None


def tells(text: str, slot: str, value: str) -> bool:
    """Whether a text tells the value of a slot: in its words or, if it is True or False, by a yes
    or no or a sentence about it."""
    if says(text, value) or value not in ("True", "False"):
        return says(text, value)
    denied = re.search(r"\b(no|not|none|neither|cannot|without)\b|n't", text.lower()) is not None
    about = any(
        re.search(rf"\b{word[:5]}", text.lower())
        for word in slot.lower().split("_")
        if word not in FILLERS
    )
    affirmed = about or re.search(r"\b(yes|yeah|yep|sure|correct)\b", text.lower()) is not None
    return denied if value == "False" else affirmed and not denied


# --- the user ---

WORDS = {
    "open": ("Hi, I want to {0}.", "I would like to {0}.", "Hello. Can you {0}?", "I need to {0}."),
    "next": ("I also want to {0}.", "Next I want to {0}.", "Can you also {0}?"),
    "inform": ("The {0} is {1}.", "{1}.", "{1}, please.", "{0}: {1}."),
    "yes": ("Yes.", "Yes, right."),
    "correct": ("No, the {0} is {1}.", "That is wrong, the {0} is {1}."),
    "change": ("Actually, make the {0} {1}.", "Sorry, I want the {0} to be {1}."),
    "request": ("What is the {0}?", "Can you tell me the {0}?", "And the {0}?"),
    "repeat": ("I asked for the {0}.", "But what is the {0}?"),
    "again": ("I do not understand.", "What do you mean?"),
    "wrong": ("That is not what I wanted.", "No, that is wrong."),
    "thanks": ("Thank you, bye.", "Great, thanks."),
    "leave": ("Never mind. Bye.", "Then forget it. Bye."),
    "impatient": ("This takes too long. Bye.", "I give up. Bye."),
}


@dataclass
class User:
    """An agenda-based user in the middle of a dialogue. `hear` takes the assistant's next turn and
    answers it; after the last answer `ended` says why: "thanks", "failed" (a subgoal was lost) or
    "impatient".

    The user is a function of seed, goal and what the assistant has said: nothing else is drawn.
    """

    goal: Goal
    seed: int
    index: int = 0
    """subgoal at hand"""
    turn: int = 0
    useless: int = 0
    ended: str | None = None
    told: dict[str, str] = field(default_factory=dict)
    """slots of the subgoal at hand and the values that the user has given"""
    asked_again: set[str] = field(default_factory=set)
    waiting: list[str] = field(default_factory=list)
    """results that the user still wants to know"""
    obtained: list[int] = field(default_factory=list)
    """of every subgoal begun, the required slots told before the first call that was carried out"""
    acted: bool = False
    done: list[bool] = field(default_factory=list)
    """of every subgoal that is over, whether it was completed"""
    unanswered: int = 0
    """results asked for and never told, of the subgoals that are over"""

    def say(self, act: str, *words: str) -> str:
        """A phrase for an act, in one of its wordings."""
        wordings = WORDS[act]
        draw = coin(self.seed, self.goal.key, self.turn, act, words)
        return wordings[int(draw * len(wordings))].format(*words)

    @property
    def subgoal(self) -> Subgoal:
        return self.goal.subgoals[self.index]

    def value(self, slot: str) -> str:
        """What the user says the value of a slot to be: what was said last, and at first what will
        be taken back."""
        if slot in self.told:
            return self.told[slot]
        change = self.subgoal.change
        return change[1] if change and change[0] == slot else self.subgoal.values[slot][0]

    def right(self, slot: str, value: str) -> bool:
        """Whether a value is the one that the user wants, as far as the user has said."""
        change = self.subgoal.change
        if ANY in self.subgoal.values[slot]:
            return True
        if (
            change
            and change[0] == slot
            and not same(self.told.get(slot, ""), self.subgoal.values[slot][0])
        ):
            return same(value, change[1])  # not taken back yet
        return any(same(value, spelling) for spelling in self.subgoal.values[slot])

    def open(self) -> str:
        """Begin the subgoal at hand: state the intent, with the slots that are volunteered."""
        intent = self.subgoal.intent
        self.told, self.asked_again, self.acted = {}, set(), False
        self.waiting = list(self.subgoal.requests)
        self.told = {slot: self.value(slot) for slot in self.subgoal.volunteered}
        self.obtained.append(sum(slot in self.told for slot in intent.required))
        if f"open {intent.name}" in self.goal.words:
            return self.goal.words[f"open {intent.name}"]
        wish = intent.description[:1].lower() + intent.description[1:]
        statements = [statement(slot, value) for slot, value in self.told.items()]
        return " ".join([self.say("next" if self.index else "open", wish), *statements])

    def tell(self, slot: str) -> str:
        self.told[slot] = value = self.value(slot)
        if not self.acted:
            self.obtained[-1] = sum(slot in self.told for slot in self.subgoal.intent.required)
        own = self.goal.words.get(f"inform {self.subgoal.intent.name} {slot}")
        if own and says(own, value):
            return own
        return self.say("inform", spoken(slot), value)

    def hear(self, text: str) -> str:
        """The user's answer to the assistant's turn, with the service's line in front where there
        was a call."""
        self.turn += 1
        try:
            call = parse_call(text, self.goal.calls)
        except MalformedCall as error:
            return self.lose_patience(f"error: {error}\n" + self.say("again"))
        if call:
            return self.see_call(call)
        if (
            self.done and len(self.done) > self.index
        ):  # the call was right, and a result is still to be told
            return self.hear_result(text)
        return self.hear_question(text)

    def see_call(self, call: Call) -> str:
        intent, self.acted = self.subgoal.intent, True
        over = len(self.done) > self.index
        wrong = [
            slot for slot in self.subgoal.values if not self.right(slot, call.values.get(slot, ""))
        ]
        extra = [s for s in call.values if s not in self.subgoal.values]
        if call.intent == intent and not wrong and not extra and not over:
            self.done.append(True)
            line = (
                "; ".join(f"{slot}={value}" for slot, value in self.subgoal.results.items())
                or "done"
            )
            return f"result: {line}\n" + self.go_on()
        if call.intent.transactional and not over:
            self.done.append(False)
            self.unanswered += len(self.waiting)
            self.waiting = []
            return "result: done\n" + self.lose_patience(self.say("wrong"), go_on=True)
        if call.intent == intent and wrong and not over:
            said = self.say("correct", spoken(wrong[0]), self.value(wrong[0]))
            self.told.setdefault(wrong[0], self.value(wrong[0]))
        else:
            said = self.say("wrong")
        return self.lose_patience("result: nothing found\n" + said)

    def hear_result(self, text: str) -> str:
        left = [slot for slot in self.waiting if not tells(text, slot, self.subgoal.results[slot])]
        if left != self.waiting:
            self.waiting = left
            return self.go_on()
        return self.lose_patience(self.say("repeat", spoken(self.waiting[0])))

    def hear_question(self, text: str) -> str:
        asked = asked_slots(text, tuple(self.subgoal.values))
        new = [slot for slot in asked if slot not in self.told]
        again = [slot for slot in asked if slot in self.told and slot not in self.asked_again]
        self.asked_again |= set(again)
        before = dict(self.told)
        said = [self.answer(text, slot) for slot in (new or again)]
        change = self.subgoal.change
        if (
            new and change and before.get(change[0]) == change[1]
        ):  # said earlier, and now taken back
            self.told[change[0]] = self.subgoal.values[change[0]][0]
            said.append(self.say("change", spoken(change[0]), self.told[change[0]]))
        if new or any(
            says(text, before[slot]) for slot in again
        ):  # asking to confirm, once, is not useless
            return " ".join(dict.fromkeys(said))
        return self.lose_patience(" ".join(dict.fromkeys(said)) or self.say("again"))

    def answer(self, text: str, slot: str) -> str:
        """To a question about a slot: yes to the right value, a correction of another possible one,
        else the value."""
        told = slot in self.told
        named = [
            v
            for v in self.goal.values.get(slot, ())
            if says(text, v) and not same(v, self.value(slot))
        ]
        if not named and says(text, self.value(slot)):
            self.tell(slot)
            return self.say("yes")
        if len(named) == 1 and not says(
            text, self.value(slot)
        ):  # several are a list to choose from
            self.tell(slot)
            return self.say("correct", spoken(slot), self.value(slot))
        return self.tell(slot) if not told else self.say("inform", spoken(slot), self.value(slot))

    def go_on(self) -> str:
        """After a subgoal's call: ask for a result, begin the next subgoal, or take leave."""
        if self.waiting:
            own = self.goal.words.get(f"request {self.subgoal.intent.name} {self.waiting[0]}")
            return own or self.say("request", spoken(self.waiting[0]))
        if self.index + 1 < len(self.goal.subgoals):
            self.index += 1
            return self.open()
        self.ended = "thanks" if all(self.done) else "failed"
        if self.ended == "failed":
            return self.say("leave")
        return self.goal.words.get("thanks") or self.say("thanks")

    def lose_patience(self, said: str, go_on: bool = False) -> str:
        self.useless += 1
        if self.useless > PATIENCE:
            self.ended = "impatient"
            return self.say("impatient")
        return f"{said} {self.go_on()}" if go_on else said


# --- the outcome ---


@dataclass(frozen=True)
class Outcome:
    """What a dialogue has come to. The three rates are in [0, 1]."""

    tcr: float
    """task completion rate: subgoals whose intent was carried out with all the right values"""
    acr: float
    """ask completion rate: required slots that the user had told before the assistant acted"""
    gcr: float
    """goal completion rate: 1 if all subgoals are complete and every result asked for was told"""
    turns: int
    impatient: bool

    @property
    def average(self) -> float:
        return (self.tcr + self.acr + self.gcr) / 3


def play(goal: Goal, completions: list[str], seed: int) -> tuple[User, list[str]]:
    """The user after the assistant's turns, and all that the user has said. Turns after the user's
    end are not heard."""
    user = User(goal, seed)
    said = [user.open()]
    for text in completions:
        if user.ended is None:
            said.append(user.hear(text))
    return user, said


def outcome(goal: Goal, completions: list[str], seed: int) -> Outcome:
    user, _ = play(goal, completions, seed)
    required = sum(len(s.intent.required) for s in goal.subgoals)
    return Outcome(
        tcr=sum(user.done) / len(goal.subgoals),
        acr=sum(user.obtained) / required if required else 1.0,
        gcr=float(
            sum(user.done) == len(goal.subgoals) and not user.waiting and not user.unanswered
        ),
        turns=user.turn,
        impatient=user.ended == "impatient",
    )


# --- the task, as the scripts see it ---


class DialogueTask(Task):
    """Goals as problems. `answer` of a Problem is its Goal; a dialogue is right when its goal is
    completed."""

    def __init__(
        self, train: list[Problem], test: list[Problem], dropped: dict[str, int], seed: int
    ):
        super().__init__(train, test, dropped)
        self.seed = seed

    @classmethod
    def load(cls, schema: Path, train_split: str, test_split: str, seed: int) -> "DialogueTask":
        """The goals alone, without prompts in a model's tokens."""
        goals = load_goals(schema, train_split, test_split)
        return cls(
            *([Problem(g.key, g, []) for g in goals[split]] for split in ("train", "test")),
            {},
            seed,
        )

    def first_message(self, problem: Problem) -> str:
        return first_message(problem.answer, User(problem.answer, self.seed).open())

    def grade(self, problem: Problem, completions: list[str]) -> float:
        return outcome(problem.answer, completions, self.seed).gcr

    def reply(self, problem: Problem, completions: list[str]) -> str | None:
        user, said = play(problem.answer, completions, self.seed)
        return None if user.ended else said[-1]

    def show(self, problem: Problem, completions: list[str]) -> dict[str, str]:
        """An episode as the columns of a table; the dialogue has the user's last word too."""
        _, said = play(problem.answer, completions, self.seed)
        turns = [f"user: {said[0]}"]
        for text, reply in zip_longest(completions, said[1:], fillvalue=""):
            turns += [f"assistant: {text}", f"user: {reply}"]
        return {"goal": str(problem.answer), "dialogue": "\n".join(turns)}

    def messages(self, problem: Problem, completions: list[str]) -> list[dict[str, str]]:
        """The conversation up to the assistant's last turn, the first message without the prompt
        template."""
        _, said = play(problem.answer, completions, self.seed)
        turns = [("user", first_message(problem.answer, said[0]))]
        for i, text in enumerate(completions):
            turns += [("user", said[i])] if i else []
            turns.append(("assistant", text))
        return [{"role": role, "content": content} for role, content in turns]

    def measure(self, pairs: list[tuple[Problem, list[str]]]) -> dict[str, float]:
        """TCR, ACR, GCR, their average, turns and the share of impatient endings over all dialogues
        whose services are known from training; the three rates for each domain; and for the
        dialogues with unseen services."""
        outcomes = [(p.answer.group, outcome(p.answer, texts, self.seed)) for p, texts in pairs]
        known = [o for group, o in outcomes if group != UNSEEN] or [o for _, o in outcomes]
        names = ("tcr", "acr", "gcr", "average", "turns", "impatient")
        metrics = {name: sum(getattr(o, name) for o in known) / len(known) for name in names}
        for group in sorted({group for group, _ in outcomes}):
            members = [o for g, o in outcomes if g == group]
            for name in names[:3]:
                metrics[f"{name}_{group}"] = sum(getattr(o, name) for o in members) / len(members)
        return metrics


def first_message(goal: Goal, opening: str) -> str:
    return f"calls: {' '.join(intent.signature for intent in goal.calls.values())}\n{opening}"


# --- looking at dialogues ---


@dataclass
class Args:
    model: str = "assets/tiny_dialogue"
    """the assistant: a Hugging Face folder or a hub id"""
    play: int | None = None
    """watch so many dialogues with the simulated user, instead of being the user"""
    sample: Path | None = None
    """print dialogues of this run directory instead"""
    count: int = 3
    """how many of them, from the newest evaluation"""
    schema: Path = Path("assets/data/tiny_dialogue")
    """a folder in the format of Schema-Guided Dialogue"""
    train_split: str = "train"
    """its training split"""
    test_split: str = "test"
    """the split whose goals are played"""
    prompt_template: str = "{question}"
    """the user message around the calls and the opening words"""
    seed: int = 1
    """which goals, and in which words the simulated user speaks"""
    temperature: float = 0.0
    """sampling temperature of the assistant; 0 is greedy"""
    max_turns: int = 12
    """turns of a dialogue, at most"""
    max_new_tokens: int = 48
    """tokens of a turn, at most"""


def print_sample(console: Console, run: Path, count: int) -> None:
    """Dialogues of a run with reward and value at the end of every turn, and the true outcome."""
    try:
        rows = [json.loads(line) for line in (run / "transcripts.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        stop(
            f"--sample {run}: no readable transcripts.jsonl there (a run writes it at every evaluation)"
        )
    if not rows:
        stop(f"--sample {run}: no evaluation yet")
    if "tcr" not in rows[0]["outcome"]:
        stop(f"--sample {run}: not a run with --task dialogue")
    for row in [row for row in rows if row["update"] == rows[-1]["update"]][:count]:
        console.rule(
            f"update {row['update']}: "
            + "  ".join(f"{k} {row['outcome'][k]:.2f}" for k in ("tcr", "acr", "gcr"))
        )
        turn = 0
        for message in row["messages"]:
            print_turn(console, message["role"], message["content"])
            if message["role"] == "assistant" and turn < len(row["rewards"]):
                value = f"  value {row['values'][turn]:+.2f}" if "values" in row else ""
                console.print(f"           [dim]reward {row['rewards'][turn]:+.2f}{value}[/dim]")
                turn += 1


def print_turn(console: Console, role: str, text: str) -> None:
    for i, line in enumerate(text.splitlines() or [""]):
        console.print(
            f"{role if i == 0 else '':>9}  {escape(line)}",
            style="bold" if role == "assistant" else None,
        )


def converse(console: Console, args: Args, policy, chat, problem: Problem, person: bool) -> None:
    """One dialogue about a goal. The simulated user always listens, to carry out calls and to
    judge; a person speaks in its place where `person` is set."""
    user = User(problem.answer, args.seed)
    said, turns, messages = user.open(), [], []
    console.rule(f"goal: {escape(str(problem.answer))}".replace("\n", "; then "))
    if person:
        console.print(
            f"You are the user (the simulated one would say: {escape(said)}). An empty line ends the dialogue."
        )
        said = console.input("     user  ")
    else:
        print_turn(console, "user", said)
    question = args.prompt_template.replace("{question}", first_message(problem.answer, said))
    while said and user.ended is None and len(turns) < args.max_turns:
        messages.append({"role": "user", "content": said if messages else question})
        turns += answer(policy, chat, [messages], args.max_new_tokens, args.temperature)
        messages.append({"role": "assistant", "content": turns[-1]})
        print_turn(console, "assistant", turns[-1])
        said = user.hear(turns[-1])
        service = said.splitlines()[0] if said.startswith(("result: ", "error: ")) else ""
        if person:
            print_turn(console, "service", service) if service else None
            words = console.input("     user  ")
            said = "\n".join(line for line in (service, words) if line) if words else ""
        else:
            print_turn(console, "user", said)
    o = outcome(problem.answer, turns, args.seed)
    console.print(
        f"[dim]{user.ended or 'not ended'}: tcr {o.tcr:.2f}  acr {o.acr:.2f}  gcr {o.gcr:.0f}  turns {o.turns}[/dim]"
    )


def main(args: Args) -> None:
    console = Console(highlight=False)
    if (
        min(args.count, args.max_turns, args.max_new_tokens, 1 if args.play is None else args.play)
        < 1
        or args.temperature < 0
    ):
        stop(
            "--play, --count, --max-turns and --max-new-tokens must be at least 1, --temperature at least 0"
        )
    if args.sample:
        print_sample(console, args.sample, args.count)
        return
    policy, chat = load_policy(args.model, pick_device("cpu"))
    task = DialogueTask.load(args.schema, args.train_split, args.test_split, args.seed)
    problems = random.Random(args.seed).sample(task.test, min(len(task.test), args.play or 1))
    try:
        for problem in problems:
            converse(console, args, policy, chat, problem, person=args.play is None)
    except (EOFError, KeyboardInterrupt):
        console.print()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
