"""Make the embedded science default again: a small closed world (`assets/data/tiny_science`) and
the tiny model that starts on it.

    python -m assets.make.tiny_science                     # about 12 minutes on two cores, same bytes every time
    python -m assets.make.tiny_science --out /tmp/other --steps 500

The world: things of nine topics (animals, materials, rocks, ...), each of some kind, and facts that
hold for a kind. A question needs one step (a whale is a mammal) or two (a mammal breathes with
lungs), or a comparison (wax that melts at 60 degrees is solid at 20). Two in three are multiple
choice, the others want a short answer. The model is a Llama of 1.1 M parameters, trained by
next-token prediction on the answers of a *pupil with misconceptions*, who more often than not holds
a whale for a fish, stops after the first step, knows no southern winter, and often looks at two
options of four or overhears "not". The mistakes stand written in the answer, so a critic can see
them, and each spoils many questions, so what is learnt on one helps with others."""

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from assets.make.tiny_math import Row, Training, answer_rows, make_tokenizer, train
from utils.world.answers import LETTERS
from utils.world.data import lay_out


@dataclass(frozen=True)
class Fact:
    """Something that holds for kinds of things: `values` by kind, and what the pupil believes of
    some kinds instead."""

    ask: str
    find: str
    values: dict[str, str]
    mistaken: dict[str, str]


@dataclass(frozen=True)
class Topic:
    """Things by kind, the kinds that the pupil puts some of them in instead, and facts about the
    kinds."""

    noun: str
    kinds: dict[str, str]
    mistaken: dict[str, str]
    facts: tuple[Fact, ...]

    def kind(self, thing: str) -> str:
        return next(kind for kind, things in self.kinds.items() if thing in things.split())

    def things(self) -> list[str]:
        return [thing for things in self.kinds.values() for thing in things.split()]


TOPICS = (
    Topic(
        "animal",
        {
            "mammal": "dog cow horse mouse whale dolphin bat seal",
            "bird": "robin eagle owl duck penguin ostrich",
            "fish": "trout salmon carp shark eel seahorse",
            "insect": "ant bee beetle fly moth",
            "arachnid": "spider scorpion tick mite",
            "reptile": "snake lizard turtle crocodile",
            "amphibian": "frog toad newt salamander",
        },
        {
            "whale": "fish", "dolphin": "fish", "bat": "bird", "seal": "fish", "penguin": "mammal", "ostrich": "mammal",
            "shark": "mammal", "eel": "reptile", "seahorse": "reptile", "spider": "insect", "tick": "insect",
            "mite": "insect", "turtle": "amphibian", "crocodile": "amphibian", "newt": "reptile", "salamander": "reptile",
        },
        (
            Fact("What does a {} breathe with?", "Which of these breathes with {}?",
                 {"mammal": "lungs", "bird": "lungs", "reptile": "lungs", "fish": "gills", "insect": "air tubes"},
                 {"reptile": "gills"}),
            Fact("What covers a {}?", "Which of these is covered with {}?",
                 {"mammal": "hair", "bird": "feathers", "fish": "scales", "insect": "a shell", "amphibian": "wet skin"},
                 {"amphibian": "scales"}),
            Fact("How many legs does a {} have?", "Which of these has {} legs?",
                 {"bird": "two", "insect": "six", "arachnid": "eight"}, {}),
            Fact("Is the blood of a {} warm or cold?", "Which of these has {} blood?",
                 {"mammal": "warm", "bird": "warm", "fish": "cold", "reptile": "cold", "amphibian": "cold"},
                 {"bird": "cold"}),
        ),
    ),
    Topic(
        "thing",
        {
            "metal": "nail coin wire key spoon", "glass": "window bottle lens jar", "plastic": "ruler bag toy comb",
            "wood": "plank log pencil chair", "rubber": "tire eraser balloon", "wool": "sweater scarf blanket",
        },
        {"pencil": "metal", "balloon": "plastic", "eraser": "plastic", "lens": "plastic", "bag": "rubber"},
        (
            Fact("What is a {} made from at first?", "Which of these is made from {} at first?",
                 {"metal": "ore", "glass": "sand", "plastic": "oil", "wood": "trees", "rubber": "sap", "wool": "sheep"},
                 {"glass": "ore", "plastic": "sap"}),
            Fact("Does a {} let electricity pass or block it?", "Which of these makes electricity {}?",
                 {"metal": "pass", "glass": "block", "plastic": "block", "wood": "block", "rubber": "block"},
                 {"glass": "pass"}),
        ),
    ),
    Topic(
        "rock",
        {
            "igneous": "granite basalt obsidian pumice", "sedimentary": "limestone sandstone shale chalk",
            "metamorphic": "marble slate quartzite gneiss",
        },
        {"obsidian": "metamorphic", "pumice": "sedimentary", "marble": "igneous", "slate": "sedimentary", "chalk": "metamorphic"},
        (
            Fact("What does {} form from?", "Which of these forms from {}?",
                 {"igneous": "melted rock", "sedimentary": "pressed layers", "metamorphic": "heated rock"},
                 {"metamorphic": "melted rock"}),
        ),
    ),
    Topic(
        "source of energy",
        {"renewable": "wind sunlight tides rivers", "fossil": "coal oil gas peat", "nuclear": "uranium plutonium"},
        {"gas": "renewable", "peat": "renewable", "tides": "nuclear", "sunlight": "nuclear"},
        (
            Fact("Will {} run out or last?", "Which of these will {}?",
                 {"renewable": "last", "fossil": "run out", "nuclear": "run out"}, {"nuclear": "last"}),
            Fact("Does {} give smoke or none?", "Which of these gives {}?",
                 {"renewable": "none", "fossil": "smoke", "nuclear": "none"}, {"nuclear": "smoke"}),
        ),
    ),
    Topic(
        "body in space",
        {
            "rocky planet": "Mercury Venus Mars", "gas giant": "Jupiter Saturn", "ice giant": "Uranus Neptune",
            "star": "Sirius Vega Sol", "moon": "Titan Europa Io", "dwarf planet": "Pluto Ceres Eris",
        },
        {"Sol": "gas giant", "Pluto": "rocky planet", "Titan": "gas giant", "Europa": "rocky planet", "Uranus": "gas giant"},
        (
            Fact("What does {} go around?", "Which of these goes around {}?",
                 {"rocky planet": "the sun", "gas giant": "the sun", "ice giant": "the sun", "moon": "a planet",
                  "star": "the galaxy"}, {"star": "the sun"}),
            Fact("Does {} make light of its own or reflect it?", "Which of these can {} light?",
                 {"rocky planet": "reflect", "gas giant": "reflect", "ice giant": "reflect", "moon": "reflect", "star": "make"},
                 {"moon": "make"}),
        ),
    ),
    Topic(
        "part of the body",
        {
            "circulation": "heart veins blood", "nerves": "brain spine eyes", "digestion": "stomach liver gut",
            "breathing": "lungs windpipe", "waste": "kidneys bladder", "frame": "ribs skull hips",
        },
        {"liver": "circulation", "kidneys": "digestion", "windpipe": "digestion", "spine": "frame", "eyes": "frame"},
        (
            Fact("What do the {} serve for?", "Which of these serves to {}?",
                 {"circulation": "move blood", "nerves": "carry signals", "digestion": "break down food",
                  "breathing": "take in oxygen", "waste": "clean blood", "frame": "hold us up"},
                 {"waste": "move blood", "breathing": "move blood"}),
        ),
    ),
    Topic(
        "living thing",
        {
            "flowering plant": "apple rose oak bean", "conifer": "pine spruce larch", "fungus": "mushroom yeast mould",
            "alga": "kelp seaweed plankton", "bacterium": "salmonella anthrax",
        },
        {"mushroom": "flowering plant", "yeast": "bacterium", "larch": "flowering plant", "kelp": "flowering plant", "mould": "alga"},
        (
            Fact("How does {} spread?", "Which of these spreads by {}?",
                 {"flowering plant": "fruit", "conifer": "cones", "fungus": "spores", "bacterium": "division"},
                 {"fungus": "division"}),
            Fact("Where does {} get food from?", "Which of these gets food from {}?",
                 {"flowering plant": "light", "conifer": "light", "alga": "light", "fungus": "dead matter"},
                 {"alga": "dead matter", "flowering plant": "soil"}),
        ),
    ),
    Topic(
        "change",
        {"physical": "melting freezing boiling cutting dissolving", "chemical": "burning rusting cooking rotting digesting"},
        {"dissolving": "chemical", "boiling": "chemical", "rusting": "physical", "digesting": "physical"},
        (
            Fact("Does {} make a new substance or none?", "Which of these makes {} substance?",
                 {"physical": "no new", "chemical": "a new"}, {}),
            Fact("Can {} be undone or not?", "Which of these can {} be undone?",
                 {"physical": "easily", "chemical": "hardly"}, {}),
        ),
    ),
    Topic(
        "food",
        {"protein": "meat eggs beans fish", "starch": "bread rice potatoes pasta", "fat": "butter oil nuts cream"},
        {"beans": "starch", "nuts": "protein", "cream": "protein", "potatoes": "fat", "eggs": "fat"},
        (
            Fact("What does the body use {} for?", "Which of these does the body use for {}?",
                 {"protein": "growth", "starch": "quick energy", "fat": "stores"}, {"fat": "quick energy"}),
        ),
    ),
)  # fmt: skip
SUBSTANCES = ("Wax", "Tin", "Zinc", "Sulfur", "Iodine", "Camphor", "Lead", "Phenol")
SOUTH = ("Sydney", "Lima", "Perth", "Durban", "Santiago")
NORTH = ("Oslo", "Tokyo", "Boston", "Cairo", "Delhi")
SEASONS = ("winter", "spring", "summer", "autumn")
MONTHS = ("January", "April", "July", "October")
CHAINS = (("grass", "rabbits", "foxes"), ("algae", "snails", "crabs"), ("leaves", "deer", "wolves"), ("seeds", "mice", "owls"),
          ("clover", "sheep", "lions"), ("plankton", "krill", "whales"))  # fmt: skip

BELIEF = 0.6  # probability that the pupil holds on to a misconception
DEAF = 0.45  # ... overhears "not"
HASTY = 0.55  # ... stops after the first step: names the kind
LAZY = 0.45  # ... looks at no more than the first two options
Errs = Callable[[float], bool]


@dataclass(frozen=True)
class Question:
    """`options` is empty where a short answer is wanted. `solve(errs)` gives the lines of an answer
    and the answer in words, with a mistake wherever `errs(rate)` says so. `key` is what a question
    is about, whatever its wording and order."""

    text: str
    options: list[str]
    solve: Callable[[Errs], tuple[list[str], str]]
    key: str


def believed(topic: Topic, thing: str, errs: Errs) -> str:
    """The kind of a thing; with a misconception, the one that the pupil puts it in."""
    return topic.mistaken[thing] if thing in topic.mistaken and errs(BELIEF) else topic.kind(thing)


def about_kind(topic: Topic, rng: random.Random, choice: bool) -> Question:
    """What kind of animal is a whale?"""
    thing = pick_thing(topic, topic.things(), rng)
    options = (
        sample_with(topic.kind(thing), list(topic.kinds), topic.mistaken.get(thing), rng)
        if choice
        else []
    )
    text = rng.choice(["What kind of {0} is {1}?", "{1}: what kind of {0} is that?"]).format(
        topic.noun, thing
    )

    def solve(errs: Errs) -> tuple[list[str], str]:
        kind = believed(topic, thing, errs)
        return [f"{thing}: {kind}"], kind

    return Question(text, options, solve, f"kind {thing} {choice}")


def about_fact(topic: Topic, rng: random.Random, choice: bool) -> Question:
    """What does a whale breathe with?"""
    fact = rng.choice(topic.facts)
    thing = pick_thing(topic, [t for t in topic.things() if topic.kind(t) in fact.values], rng)
    kind, values = topic.kind(thing), list(dict.fromkeys(fact.values.values()))
    wrong = fact.mistaken.get(kind) or fact.values.get(topic.mistaken.get(thing, ""))
    options = sample_with(fact.values[kind], values, wrong, rng) if choice else []

    def solve(errs: Errs) -> tuple[list[str], str]:
        held = believed(topic, thing, errs)
        value = (
            fact.mistaken[held] if held in fact.mistaken and errs(BELIEF) else fact.values.get(held)
        )
        if value is None or errs(HASTY):
            return [f"{thing}: {held}"], held
        return [f"{thing}: {held}", f"{held}: {value}"], value

    return Question(fact.ask.format(thing), options, solve, f"fact {fact.ask} {thing} {choice}")


def find_thing(topic: Topic, rng: random.Random, _choice: bool) -> Question:
    """Which of these is a mammal? Which of these breathes with gills?"""
    fact = rng.choice([None, *topic.facts])
    thing = pick_thing(
        topic, [t for t in topic.things() if fact is None or topic.kind(t) in fact.values], rng
    )

    def true(t: str) -> str | None:
        return topic.kind(t) if fact is None else fact.values.get(topic.kind(t))

    wanted = true(thing)
    others = [t for t in topic.things() if true(t) not in (wanted, None)]
    options = shuffled([thing, *rng.sample(others, 3)], rng)
    text = f"Which of these is of the kind {wanted}?" if fact is None else fact.find.format(wanted)

    def solve(errs: Errs) -> tuple[list[str], str]:
        lines = []
        for option in options[:2] if errs(LAZY) else options:
            held = believed(topic, option, errs)
            value = held if fact is None else fact.values.get(held, "?")
            if fact is not None and held in fact.mistaken and errs(BELIEF):
                value = fact.mistaken[held]
            fits = value == wanted
            lines.append(
                f"{option}: {held if fact is None else f'{held}: {value}'}, {'yes' if fits else 'no'}"
            )
            if fits:
                break
        return lines, option

    return Question(text, options, solve, f"find {text} {sorted(options)}")


def odd_one(topic: Topic, rng: random.Random, _choice: bool) -> Question:
    """Which of these is not a mammal?"""
    kinds = {
        kind: things.split() for kind, things in topic.kinds.items() if len(things.split()) >= 3
    }
    kind = rng.choice(list(kinds))
    thing = pick_thing(topic, [t for t in topic.things() if topic.kind(t) != kind], rng)
    options = shuffled([thing, *rng.sample(kinds[kind], 3)], rng)

    def solve(errs: Errs) -> tuple[list[str], str]:
        lines, deaf = [], errs(DEAF)
        for option in options:
            held = believed(topic, option, errs)
            fits = (held == kind) == deaf
            lines.append(f"{option}: {held}, {'yes' if fits else 'no'}")
            if fits:
                break
        return lines, option

    text = f"Which of these is not of the kind {kind}?"
    return Question(text, options, solve, f"odd {kind} {sorted(options)}")


def state(_topic: Topic, rng: random.Random, choice: bool) -> Question:
    """Tin melts at 32 degrees and boils at 70 degrees. What is it at 50 degrees?"""
    melts, boils = rng.randint(11, 50), rng.randint(55, 95)
    at = rng.choice(
        [rng.randint(1, melts - 1), rng.randint(melts + 1, boils - 1), rng.randint(boils + 1, 99)]
    )
    substance = rng.choice(SUBSTANCES)
    text = f"{substance} melts at {melts} degrees and boils at {boils} degrees. What is it at {at} degrees?"

    def solve(errs: Errs) -> tuple[list[str], str]:
        if at < melts:
            name = "liquid" if errs(BELIEF) else "solid"
            return [f"{at} is below {melts}: {name}"], name
        if at < boils:
            name = "gas" if errs(0.1) else "liquid"
            return [f"{at} is above {melts} and below {boils}: {name}"], name
        name = "liquid" if errs(BELIEF) else "gas"
        return [f"{at} is above {boils}: {name}"], name

    return Question(
        text,
        shuffled(["solid", "liquid", "gas"], rng) if choice else [],
        solve,
        f"state {melts} {boils} {at}",
    )


def season(_topic: Topic, rng: random.Random, choice: bool) -> Question:
    """What season is it in Sydney in January?"""
    city, month = rng.choice([*SOUTH, *SOUTH, *NORTH]), rng.choice(MONTHS)

    def solve(errs: Errs) -> tuple[list[str], str]:
        south = city in SOUTH and not errs(BELIEF)
        name = SEASONS[(MONTHS.index(month) + 2 * south) % 4]
        return [f"{city}: {'south' if south else 'north'}", f"{month}: {name}"], name

    text = rng.choice(
        ["What season is it in {} in {}?", "In {}, which season does {} belong to?"]
    ).format(city, month)
    return Question(
        text, shuffled(SEASONS, rng) if choice else [], solve, f"season {city} {month} {choice}"
    )


def chain(_topic: Topic, rng: random.Random, choice: bool) -> Question:
    """Grass feeds rabbits, rabbits feed foxes. If the foxes die out, will there be more or fewer
    rabbits?"""
    links = rng.choice(CHAINS)
    cause = rng.randrange(3)
    effect = rng.choice([i for i in range(3) if i != cause])
    text = (
        f"The {links[0]} feed the {links[1]}, and the {links[1]} feed the {links[2]}. "
        f"If the {links[cause]} die out, will there be more or fewer {links[effect]}?"
    )

    def solve(errs: Errs) -> tuple[list[str], str]:
        if effect > cause or (cause - effect == 1 and errs(BELIEF)):
            return [f"{links[cause]} go: {links[effect]} are hungry: fewer"], "fewer"
        spared = f"{links[cause]} go: {links[cause - 1]} are not eaten: more"
        if cause - effect == 1 or errs(BELIEF):
            return [spared], "more"
        return [spared, f"{links[1]} grow: {links[0]} are eaten: fewer"], "fewer"

    return Question(
        text,
        shuffled(["more", "fewer", "the same"], rng) if choice else [],
        solve,
        f"{text} {choice}",
    )


def pick_thing(topic: Topic, things: list[str], rng: random.Random) -> str:
    """One of the things; those about which the pupil is mistaken come up twice as often."""
    return rng.choices(things, weights=[2 if thing in topic.mistaken else 1 for thing in things])[0]


def sample_with(right: str, values: list[str], wrong: str | None, rng: random.Random) -> list[str]:
    """Up to four options in random order: the right one, the one that the pupil would take, and
    others."""
    kept = list(dict.fromkeys([right, *([wrong] if wrong else [])]))
    others = [value for value in values if value not in kept]
    return shuffled([*kept, *rng.sample(others, min(len(others), 4 - len(kept)))], rng)


def shuffled(values: list[str] | tuple[str, ...], rng: random.Random) -> list[str]:
    return rng.sample(list(values), len(values))


FORMS = {about_kind: 2, about_fact: 4, find_thing: 4, odd_one: 2, state: 2, season: 1, chain: 1}


def make_question(rng: random.Random) -> Question:
    """A question of some form about some topic; the wrong options, too, are wrong beyond doubt."""
    form = rng.choices(list(FORMS), weights=list(FORMS.values()))[0]
    return form(rng.choice(TOPICS), rng, rng.random() < 0.5)


def no_errors(_rate: float) -> bool:
    return False


def write_up(question: Question, errs: Errs) -> str:
    """An answer as text: its lines, then `#### ` and the answer in words, with options those of one
    of them."""
    lines, answer = question.solve(errs)
    return "\n".join([*lines, f"#### {answer}"])


def is_test(question: Question) -> bool:
    """Every question belongs to train or test by the digest of what it is about: no other wording
    or order is in both."""
    return hashlib.sha256(question.key.encode()).digest()[0] < 38


def make_data(folder: Path, train_size: int, test_size: int, seed: int) -> None:
    """Write train.jsonl and test.jsonl in the columns of allenai/ai2_arc; without choices,
    answerKey is the answer in words."""
    rng, seen = random.Random(seed), set()
    splits = {"train": (train_size, []), "test": (test_size, [])}
    while any(len(rows) < size for size, rows in splits.values()):
        question = make_question(rng)
        size, rows = splits["test" if is_test(question) else "train"]
        once = (question.text, *sorted(question.options))
        if len(rows) < size and once not in seen:
            seen.add(once)
            _, answer = question.solve(no_errors)
            key = LETTERS[question.options.index(answer)] if question.options else answer
            choices = {"text": question.options, "label": list(LETTERS[: len(question.options)])}
            rows.append({"question": question.text, "choices": choices, "answerKey": key})
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, rows) in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def pupil_examples(count: int, seed: int) -> list[tuple[str, str]]:
    """(prompt, the pupil's answer) pairs; no question of the test set among them."""
    rng, examples = random.Random(f"pupil {seed}"), []
    while len(examples) < count:
        question = make_question(rng)
        if not is_test(question):
            answer = write_up(question, lambda rate: rng.random() < rate)
            examples.append((lay_out(question.text, question.options), answer))
    return examples


@dataclass
class Args(Training):
    out: Path = Path("assets")
    """folder that receives data/tiny_science and tiny_science"""
    seed: int = 1
    """seed of the data, the initial weights and the training order"""
    train_size: int = 4096
    """questions in train.jsonl"""
    test_size: int = 512
    """questions in test.jsonl, none of which is in train.jsonl in other words or another order"""
    steps: int = 1500
    """supervised steps"""


def main(args: Args) -> None:
    start = time.time()
    torch.set_num_threads(
        2
    )  # the order of summation, and so the last bit of every weight, depends on it
    data, folder = args.out / "data" / "tiny_science", args.out / "tiny_science"
    make_data(data, args.train_size, args.test_size, args.seed)
    tokenizer = make_tokenizer([f"{q}\n{a}" for q, a in pupil_examples(4000, args.seed)])

    def examples(count: int, seed: int) -> list[Row]:
        return answer_rows(tokenizer, pupil_examples(count, seed))

    model = train(args, tokenizer, examples, lambda _: f"{time.time() - start:.0f} s")
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(
        f"{folder}: {model.num_parameters() / 1e6:.2f} M parameters, vocabulary {len(tokenizer)}; {time.time() - start:.0f} s"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
