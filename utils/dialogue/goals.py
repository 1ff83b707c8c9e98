"""What the simulated users of task-oriented dialogue want: goals over a schema in the format of
Schema-Guided Dialogue (https://github.com/google-research-datasets/dstc8-schema-guided-dialogue),
drawn from the schema or read from its dialogues.

A schema is a folder that holds one folder for each split, as the original does, or is itself the
only one. A split is `schema.json` and, optionally, `dialogues_*.json`. With dialogues, their
annotation gives the goals and the users' own words; without, goals are drawn from the schema's
categorical values."""

import hashlib
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.errors import stop

DRAWN = {"train": 2048, "test": 384}  # goals drawn from a schema without dialogues
ANY = "any"  # the value of a slot about which the user does not care
UNSEEN = (
    "unseen"  # group of the test goals that use a service which the training split does not have
)
# The five domains and the services, or families of services, that belong to them.
DOMAINS = {
    "life": ("Restaurants", "Services_1", "Homes", "Hotels", "Weather", "Calendar", "Alarm"),
    "transport": ("Buses", "Flights", "RideSharing", "RentalCars", "Trains"),
    "health": ("Services_2", "Services_3", "Services_4"),
    "social": ("Events", "Movies", "Music", "Media", "Messaging", "Travel"),
    "finance": ("Banks", "Payment"),
}


@dataclass(frozen=True)
class Intent:
    """Something that a service can do, carried out by a call. A transactional call cannot be taken
    back."""

    name: str
    service: str
    description: str
    transactional: bool
    required: tuple[str, ...]
    optional: tuple[str, ...]
    results: tuple[str, ...]

    @property
    def signature(self) -> str:
        """`Name(required, ...; optional, ...)`, as the assistant's prompt lists it."""
        return f"{self.name}({', '.join(self.required)}{'; ' if self.optional else ''}{', '.join(self.optional)})"


@dataclass(frozen=True)
class Subgoal:
    """One intent with the values that the user wants, each a tuple of spellings of which the user
    says the first.

    `volunteered`: slots that the user fills unasked, with the statement of the intent. `change`: a
    slot and the value that the user names first and takes back later. `results`: what the service
    returns; `requests`: those of them that the user asks for."""

    intent: Intent
    values: dict[str, tuple[str, ...]]
    volunteered: tuple[str, ...] = ()
    change: tuple[str, str] | None = None
    results: dict[str, str] = field(default_factory=dict)
    requests: tuple[str, ...] = ()


@dataclass(frozen=True)
class Goal:
    """All that a user wants in one dialogue. `calls`: the intents that the assistant may call, by
    name; `values`: the possible values of categorical slots; `words`: the user's own words for an
    act, where a corpus gives them (see `own_words`)."""

    key: str
    group: str
    subgoals: tuple[Subgoal, ...]
    calls: dict[str, Intent]
    values: dict[str, tuple[str, ...]]
    words: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """The calls that would complete the goal, with the results to be told and what is taken
        back."""
        lines = []
        for s in self.subgoals:
            line = f"{s.intent.name}({', '.join(f'{slot}={values[0]}' for slot, values in s.values.items())})"
            line += f", first {s.change[0]}={s.change[1]}" if s.change else ""
            lines.append(line + (f", tell {' and '.join(s.requests)}" if s.requests else ""))
        return "\n".join(lines)


@dataclass(frozen=True)
class Service:
    name: str
    intents: dict[str, Intent]
    values: dict[str, tuple[str, ...]]


def domain(service: str) -> str:
    """The domain of a service by its name or its name before the underscore; `other` where none
    lists it."""
    for name, members in DOMAINS.items():
        if service in members or service.rsplit("_", 1)[0] in members:
            return name
    return "other"


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        stop(f"schema {file}: not readable as JSON ({error})")


def load_schema(folder: Path) -> dict[str, Service]:
    """The services of `folder`/schema.json by name. Stops with one sentence where a field is
    missing."""
    services = {}
    try:
        for row in read_json(folder / "schema.json"):
            name = row["service_name"]
            intents = {
                i["name"]: Intent(
                    i["name"], name, i["description"], bool(i["is_transactional"]), tuple(i["required_slots"]),
                    tuple(i["optional_slots"]), tuple(i["result_slots"]),
                )
                for i in row["intents"]
            }  # fmt: skip
            values = {
                s["name"]: tuple(s["possible_values"]) for s in row["slots"] if s["is_categorical"]
            }
            services[name] = Service(name, intents, values)
    except (KeyError, TypeError) as error:
        stop(
            f"schema {folder / 'schema.json'}: not in the format of Schema-Guided Dialogue (missing {error})"
        )
    return services


def load_goals(folder: Path, train_split: str, test_split: str) -> dict[str, list[Goal]]:
    """Goals for "train" and "test", from the split folders below `folder` or, if it has none, from
    `folder` itself, where the digest of a goal's values says to which of the two it belongs."""
    if not folder.is_dir():
        stop(f"schema {folder}: no such folder")
    single = (folder / "schema.json").exists()
    folders = {
        "train": folder if single else folder / train_split,
        "test": folder if single else folder / test_split,
    }
    for flag, split in folders.items():
        if not (split / "schema.json").exists():
            stop(f"schema {folder}, --{flag}-split: there is no {split / 'schema.json'}")
    seen = load_schema(folders["train"])
    goals: dict[str, list[Goal]] = {}
    for split, where in folders.items():
        services = load_schema(where)
        files = sorted(where.glob("dialogues_*.json"))
        if files:
            found = [goal for file in files for goal in annotated_goals(file, services, seen)]
            random.Random(f"goals {split}").shuffle(
                found
            )  # the files go service by service; any part is to have all
            goals[split] = [g for g in found if not single or (side(g) == split)]
        else:
            goals[split] = draw_goals(services, seen, split, DRAWN[split])
        if not goals[split]:
            stop(f"schema {where}: no goal could be made of it")
    return goals


def side(goal: Goal) -> str:
    """train, test or mixed: on which side the value combinations of a goal's subgoals fall. One in
    eight is held out."""
    sides = set()
    for subgoal in goal.subgoals:
        named = (
            f"{subgoal.intent.name} {sorted((slot, v[0]) for slot, v in subgoal.values.items())}"
        )
        sides.add("test" if hashlib.sha256(named.encode()).digest()[0] < 32 else "train")
    return sides.pop() if len(sides) == 1 else "mixed"


# --- goals drawn from a schema ---


def draw_goals(
    services: dict[str, Service], seen: dict[str, Service], split: str, count: int
) -> list[Goal]:
    """`count` goals, going round the domains and, in the test split, the unseen services. No value
    combination of a seen service is in both splits."""
    groups: dict[str, list[Service]] = {}
    for service in (s for s in services.values() if s.intents):
        groups.setdefault(domain(service.name) if service.name in seen else UNSEEN, []).append(
            service
        )
    rng, goals = random.Random(f"goals {split}"), []
    names = sorted(groups)
    for _ in range(100 * count if names else 0):
        if len(goals) == count:
            break
        group = names[len(goals) % len(names)]
        goal = draw_goal(rng.choice(groups[group]), group, f"{split} {len(goals)}", rng)
        if group == UNSEEN or side(goal) == split:
            goals.append(goal)
    if len(goals) < count:
        stop(
            f"schema: too few different goals for {split} can be drawn from its services: {len(goals)} of {count}"
        )
    return goals


def draw_goal(service: Service, group: str, key: str, rng: random.Random) -> Goal:
    """A goal of one or, in two cases of five, two subgoals of a service."""
    intents = rng.sample(
        list(service.intents.values()), min(len(service.intents), rng.choice([1, 1, 1, 2, 2]))
    )
    intents.sort(key=lambda i: i.transactional)  # one looks first and books then
    return Goal(
        key,
        group,
        tuple(draw_subgoal(i, service, rng) for i in intents),
        service.intents,
        service.values,
    )


def draw_subgoal(intent: Intent, service: Service, rng: random.Random) -> Subgoal:
    for slot in (*intent.required, *intent.optional, *intent.results):
        if not service.values.get(slot):
            stop(
                f"schema: slot {slot} of {service.name} has no possible values to draw from, and there are no dialogues"
            )
    slots = intent.required + tuple(s for s in intent.optional if rng.random() < 0.5)
    values = {slot: (rng.choice(service.values[slot]),) for slot in slots}
    volunteered = tuple(s for s in slots if s in intent.optional or rng.random() < 0.25)
    change = None
    if rng.random() < 0.25 and intent.required:
        slot = rng.choice(intent.required)
        others = [v for v in service.values[slot] if v != values[slot][0]]
        change = (slot, rng.choice(others)) if others else None
    results = {slot: rng.choice(service.values[slot]) for slot in intent.results}
    requests = (rng.choice(intent.results),) if intent.results and rng.random() < 0.6 else ()
    return Subgoal(intent, values, volunteered, change, results, requests)


# --- goals annotated in Schema-Guided Dialogue ---


def annotated_goals(
    file: Path, services: dict[str, Service], seen: dict[str, Service]
) -> list[Goal]:
    """The goals of the users in a file of dialogues. A dialogue that asks for nothing is left
    out."""
    goals = []
    try:
        for dialogue in read_json(file):
            goal = annotated_goal(
                dialogue, services, seen, f"{file.parent.name} {dialogue['dialogue_id']}"
            )
            goals += [goal] if goal else []
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        stop(
            f"schema {file}: not in the format of Schema-Guided Dialogue ({type(error).__name__}: {error})"
        )
    return goals


def annotated_goal(
    dialogue: dict, services: dict[str, Service], seen: dict[str, Service], key: str
) -> Goal | None:
    """The subgoals are the intents in the order in which they become active, each with the last
    values of its slots. A slot whose value was another one when its intent was stated is a change
    of mind; a value that was told or returned under the same name earlier in the dialogue need not
    be asked for again."""
    found: dict[tuple[str, str], dict] = {}  # by service and intent
    words: dict[str, str] = {}
    current = None
    for turn in dialogue["turns"]:
        for frame in turn["frames"]:
            service, actions = frame["service"], frame["actions"]
            if turn["speaker"] == "SYSTEM":
                if current and service == current[0]:
                    results = found[current]["results"]
                    for row in frame.get("service_results", [])[:1]:
                        results.update({k: v for k, v in row.items() if k not in results})
                    results |= {
                        a["slot"]: a["values"][0]
                        for a in actions
                        if a["act"] in ("INFORM", "OFFER") and a["values"]
                    }
                continue
            state, intent = frame["state"], frame["state"]["active_intent"]
            if actions and all(a["act"] in ("THANK_YOU", "GOODBYE") for a in actions):
                words["thanks"] = turn["utterance"]
            if service not in services or intent not in services[service].intents:
                continue  # the intent NONE, with which a dialogue ends
            current, values = (
                (service, intent),
                {k: tuple(v) for k, v in state["slot_values"].items() if v},
            )
            if current not in found:
                told = {
                    a["slot"]: values[a["slot"]]
                    for a in actions
                    if a["act"] == "INFORM" and a["slot"] in values
                }
                found[current] = {"told": told, "results": {}, "requests": []}
                if any(a["act"] == "INFORM_INTENT" and intent in a["values"] for a in actions):
                    words[f"open {intent}"] = turn["utterance"]
            found[current]["values"] = values
            found[current]["requests"] += state["requested_slots"]
            if len(turn["frames"]) == 1:
                own_words(words, actions, turn["utterance"], intent)
    subgoals = []
    for (service, name), notes in found.items():
        intent, values = services[service].intents[name], notes["values"]
        if any(slot not in values for slot in intent.required):
            continue  # given up before it was complete
        values = {
            slot: values[slot] for slot in (*intent.required, *intent.optional) if slot in values
        }
        values = {
            s: (ANY,) if "dontcare" in v else v
            for s, v in values.items()
            if "dontcare" not in v or s in intent.required
        }
        told = {slot: said for slot, said in notes["told"].items() if slot in values}
        changed = [slot for slot, said in told.items() if said[0] not in values[slot]]
        if len(changed) > 1:
            words.pop(f"open {name}", None)
        earlier = [v for s in subgoals for v in ({k: x[0] for k, x in s.values.items()}, s.results)]
        known = [
            slot
            for slot in values
            if slot not in told and any(e.get(slot) in values[slot] for e in earlier)
        ]
        untold = [
            slot for slot in values if slot in intent.optional and slot not in (*told, *known)
        ]
        if f"open {name}" in words:
            words[f"open {name}"] += "".join(
                f" {statement(slot, values[slot][0])}" for slot in untold
            )
        results = {slot: value for slot, value in notes["results"].items() if slot not in values}
        requests = tuple(slot for slot in dict.fromkeys(notes["requests"]) if slot in results)
        shown = dict.fromkeys((*requests, *list(results)[:3]))  # a line, not a page
        change = (changed[0], told[changed[0]][0]) if len(changed) == 1 else None
        subgoals.append(
            Subgoal(
                intent,
                values,
                (*told, *untold, *known),
                change,
                {slot: results[slot] for slot in shown},
                requests,
            )
        )
    if not subgoals:
        return None
    used = list(dict.fromkeys(s.intent.service for s in subgoals))
    group = domain(used[0]) if all(name in seen for name in used) else UNSEEN
    calls = {name: intent for service in used for name, intent in services[service].intents.items()}
    categories = {
        slot: values for service in used for slot, values in services[service].values.items()
    }
    return Goal(key, group, tuple(subgoals), calls, categories, words)


def own_words(words: dict[str, str], actions: list[dict], utterance: str, intent: str) -> None:
    """Keep a user's utterance that does one thing only, under the name of what it does: `inform
    <intent> <slot>` tells one value, `request <intent> <slot>` asks for a result. (`open <intent>`
    and `thanks` are kept where the dialogue is read.)"""
    acts = [(a["act"], a["slot"]) for a in actions]
    if len(acts) == 1 and acts[0][0] in ("INFORM", "REQUEST"):
        words[f"{acts[0][0].lower()} {intent} {acts[0][1]}"] = utterance


def spoken(slot: str) -> str:
    """The name of a slot as people say it: `number_of_seats` is "number of seats"."""
    return slot.replace("_", " ")


def statement(slot: str, value: str) -> str:
    return f"The {spoken(slot)} is {value}."
