"""The simulated user of task-oriented dialogues: a goal, the service behind it, what is success.

The assistant speaks in plain text and acts by a line of its own that holds nothing but a call:

    One moment.
    call(ReserveTable; city=Rome; day=Friday; time=7 pm; people=4)

Its prompt lists the calls as `Name(required slots; optional slots)`. A well-formed call is carried
out and answered by a line `result: slot=value; ...` in front of the user's next words, a malformed
one by `error: ...`. A transactional call cannot be taken back: with a wrong value, or with another
intent than the user's, the subgoal at hand is lost. After any other call with a wrong value the
user corrects the value. While the user waits for a result to be told, calls find nothing and change
nothing.
"""

import re
from dataclasses import dataclass, field

from utils.dialogue.goals import ANY, Goal, Intent, Subgoal, spoken, statement
from utils.keyed import coin
from utils.world.answers import after_thinking

# useless turns of the assistant that the user bears in a dialogue; after one more, the user leaves
PATIENCE = 3


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
        was a call. Thoughts are not heard."""
        text = after_thinking(text)
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


def first_message(goal: Goal, opening: str) -> str:
    return f"calls: {' '.join(intent.signature for intent in goal.calls.values())}\n{opening}"
