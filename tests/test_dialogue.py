"""The dialogue environment: call grammar, simulated user, outcome on hand-written dialogues, goals,
Schema-Guided Dialogue."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vrpo_dialogue
from assets.make.tiny_dialogue import clerk, talk, training_goals
from tests.conftest import CRITICS, ROOT
from utils.models import load_policy
from utils.tensors import turn_ends
from utils.world.environment import Environment
from utils.world.goals import (
    DOMAINS,
    UNSEEN,
    Goal,
    Intent,
    Subgoal,
    domain,
    draw_goal,
    load_goals,
    load_schema,
    side,
)
from utils.world.tasks import DialogueTask
from utils.world.user import (
    PATIENCE,
    MalformedCall,
    User,
    asked_slots,
    outcome,
    parse_call,
    play,
    says,
    tells,
)

SCHEMA = ROOT / "assets" / "data" / "tiny_dialogue"
FIND = Intent("FindTable", "Food_1", "find a table", False, ("city",), (), ("price",))
BOOK = Intent(
    "BookTable", "Food_1", "book a table", True, ("city", "time", "people"), ("seating",), ("code",)
)
CALLS = {"FindTable": FIND, "BookTable": BOOK}
VALUES = {"city": ("Rome", "Oslo"), "seating": ("indoor", "outdoor")}
WANTED = {"city": ("Rome",), "time": ("7 pm", "19:00"), "people": ("4",)}


def goal(*subgoals: Subgoal, **words: str) -> Goal:
    return Goal("g", "life", subgoals or (Subgoal(BOOK, WANTED),), CALLS, VALUES, words)


def rates(g: Goal, *turns: str) -> tuple[float, float, float]:
    o = outcome(g, list(turns), 1)
    return o.tcr, o.acr, o.gcr


# --- the call grammar ---


@pytest.mark.parametrize(
    "text",
    [
        "call(BookTable; city=Rome; time=7 pm; people=4)",
        "One moment.\n  call( BookTable ; city = Rome;time=7 pm ; people=4 )  \nDone.",
    ],
)
def test_well_formed_calls(text):
    assert parse_call(text, CALLS).values == {"city": "Rome", "time": "7 pm", "people": "4"}


@pytest.mark.parametrize("text", ["Which city?", "", "I will call you.", "recall the city"])
def test_no_call(text):
    assert parse_call(text, CALLS) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Sure: call(FindTable; city=Rome)", "expected a line"),
        ("call(FindTable; city=Rome", "expected a line"),
        ("call(FindTable; city=Rome) now", "expected a line"),
        ("call(FindTable; city=Rome)\ncall(FindTable; city=Oslo)", "one call"),
        ("call()", "no call"),
        ("call(findtable; city=Rome)", "no call findtable"),
        ("call(FindTable; city)", "expected slot=value"),
        ("call(FindTable; city=)", "expected slot=value"),
        ("call(FindTable; city=Rome;)", "expected slot=value"),
        ("call(FindTable; town=Rome)", "no slot town"),
        ("call(FindTable; city=Rome; city=Oslo)", "twice"),
        ("call(BookTable; city=Rome)", "needs time, people"),
    ],
)
def test_malformed_calls_say_why(text, message):
    with pytest.raises(MalformedCall, match=message):
        parse_call(text, CALLS)
    user = User(goal(), 1)
    user.open()
    assert user.hear(text).startswith("error: ") and user.useless == 1 and user.ended is None


# --- what the user understands ---


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("Which city?", ["city"]),
        ("Fine. Which city and what time?", ["city", "time"]),
        ("When?", ["time"]),
        ("How many people?", ["people"]),
        ("The city is nice.", []),
        ("I like cities. What time?", ["time"]),
        ("Hello?", []),
    ],
)
def test_questions_are_understood(text, asked):
    assert asked_slots(text, ("city", "time", "people")) == asked


def test_names_of_several_words_and_values_as_whole_words():
    assert asked_slots("What is the party size?", ("party_size",)) == ["party_size"]
    assert asked_slots("What is the name of the restaurant?", ("restaurant_name",)) == [
        "restaurant_name"
    ]
    assert says("It is 40.", "40") and not says("It is 405.", "40") and says("ROME", "rome")


# --- the user's side of hand-written dialogues ---


def test_a_perfect_dialogue():
    g = goal(Subgoal(BOOK, WANTED, results={"code": "K7"}, requests=("code",)))
    turns = [
        "Which city and time?",
        "How many people?",
        "call(BookTable; city=Rome; time=19:00; people=4)",
        "It is K7.",
    ]
    user, said = play(g, turns, 1)
    assert user.ended == "thanks" and user.useless == 0 and len(said) == 5
    assert says(said[1], "Rome") and says(said[1], "7 pm") and says(said[2], "4")
    assert said[3].startswith("result: code=K7\n") and "code" in said[3]
    assert rates(g, *turns) == (1.0, 1.0, 1.0)
    assert rates(g, *turns[:3]) == (1.0, 1.0, 0.0), "the result is still to be told"
    assert rates(g, *turns[:2]) == (0.0, 1.0, 0.0)
    assert rates(g, turns[0]) == (0.0, pytest.approx(2 / 3), 0.0)
    assert rates(g) == (0.0, 0.0, 0.0)


def test_a_guessed_value_is_not_obtained_and_a_wrong_one_loses_a_transaction():
    lucky, wrong = (f"call(BookTable; city=Rome; time=7 pm; people={n})" for n in (4, 5))
    assert rates(goal(), "Which city and time?", lucky) == (1.0, pytest.approx(2 / 3), 1.0)
    assert rates(goal(), "Which city and time?", wrong, lucky) == (0.0, pytest.approx(2 / 3), 0.0)
    assert play(goal(), ["Which city and time?", wrong], 1)[0].ended == "failed"


def test_a_search_with_a_wrong_value_is_corrected_and_may_be_repeated():
    g = goal(Subgoal(FIND, {"city": ("Rome",)}))
    user, said = play(g, ["call(FindTable; city=Oslo)", "call(FindTable; city=Rome)"], 1)
    assert says(said[1], "Rome") and user.ended == "thanks" and user.useless == 1
    assert rates(g, "call(FindTable; city=Oslo)", "call(FindTable; city=Rome)") == (1.0, 0.0, 1.0)


def test_the_wrong_intent():
    g = goal(Subgoal(FIND, {"city": ("Rome",)}))
    assert rates(g, "call(BookTable; city=Rome; time=7 pm; people=4)") == (0.0, 0.0, 0.0)
    assert rates(goal(), "call(FindTable; city=Rome)", "What time, city and how many people?") == (
        0.0,
        0.0,
        0.0,
    )


def test_two_subgoals_are_halves_of_a_task_rate_and_both_needed_for_the_goal():
    g = goal(Subgoal(FIND, {"city": ("Rome",)}), Subgoal(BOOK, WANTED))
    turns = ["Where?", "call(FindTable; city=Rome)"]
    assert rates(g, *turns) == (0.5, 0.25, 0.0)
    turns += [
        "Which city, time and how many people?",
        "call(BookTable; city=Rome; time=7 pm; people=4)",
    ]
    assert rates(g, *turns) == (1.0, 1.0, 1.0)
    assert outcome(g, turns, 1).turns == 4


def test_a_lost_first_subgoal_leaves_the_second():
    g = goal(
        Subgoal(BOOK, WANTED, results={"code": "K7"}, requests=("code",)),
        Subgoal(FIND, {"city": ("Rome",)}),
    )
    turns = [
        "call(BookTable; city=Rome; time=7 pm; people=5)",
        "Which city?",
        "call(FindTable; city=Rome)",
    ]
    user, said = play(g, turns, 1)
    assert "find a table" in said[1] and user.ended == "failed"
    assert rates(g, *turns) == (0.5, 0.25, 0.0)


def test_optional_slots_that_were_told_belong_into_the_call():
    g = goal(
        Subgoal(FIND, {"city": ("Rome",)}),
        Subgoal(BOOK, WANTED | {"seating": ("indoor",)}, ("seating",)),
    )
    _, said = play(g, ["call(FindTable; city=Rome)"], 1)
    assert says(said[1], "indoor")
    base = "call(BookTable; city=Rome; time=7 pm; people=4"
    for call, complete in (
        (base + "; seating=indoor)", 1.0),
        (base + ")", 0.5),
        (base + "; seating=outdoor)", 0.5),
    ):
        assert rates(g, "call(FindTable; city=Rome)", call)[0] == complete


def test_a_change_of_mind():
    g = goal(Subgoal(BOOK, WANTED, change=("city", "Oslo")))
    user, said = play(g, ["Which city?", "What time?"], 1)
    assert (
        says(said[1], "Oslo")
        and says(said[2], "Rome")
        and says(said[2], "7 pm")
        and user.useless == 0
    )
    calls = {
        city: f"call(BookTable; city={city}; time=7 pm; people=4)" for city in ("Oslo", "Rome")
    }
    assert rates(g, "Which city?", "What time?", "How many people?", calls["Rome"])[0] == 1.0
    assert rates(g, "Which city?", "What time?", "How many people?", calls["Oslo"])[0] == 0.0
    assert rates(g, "Which city?", calls["Oslo"])[0] == 1.0, "not taken back yet"


def test_a_question_to_confirm_is_answered_once():
    user = User(goal(), 1)
    user.open()
    user.hear("Which city?")
    assert user.hear("The city is Rome?").startswith("Yes") and user.useless == 0
    user.hear("The city is Rome?")
    assert user.useless == 1, "it was told and confirmed"
    assert says(user.hear("Is the time 8 pm?"), "7 pm")
    other = User(goal(), 1)
    other.open()
    assert re.match(r"(No|That is wrong), the city is Rome", other.hear("Is the city Oslo?"))


def test_a_list_to_choose_from_is_not_answered_with_yes():
    for question in ("Which city, Rome or Oslo?", "Is the city Oslo or Rome?"):
        user = User(goal(), 1)
        user.open()
        assert says(user.hear(question), "Rome")
    many = User(goal(), 1)
    many.open()
    many.hear("Which city and time?")
    assert many.hear("The city is Rome and the time is 7 pm?") in (
        "Yes.",
        "Yes, right.",
        "Yes. Yes, right.",
        "Yes, right. Yes.",
    )


@pytest.mark.parametrize(
    ("text", "value", "told"),
    [
        ("Yes, it has wifi.", "True", True), ("Wifi is there.", "True", True), ("No, there is no wifi.", "True", False),
        ("No wifi, sorry.", "False", True), ("They don't.", "False", True), ("Yes.", "False", False), ("Fine.", "True", False),
        ("It is 4 dollars.", "4", True), ("It is 40 dollars.", "4", False),
    ],
)  # fmt: skip
def test_results_are_told_in_natural_words(text, value, told):
    assert tells(text, "has_wifi", value) == told


def test_several_results_may_be_told_at_once_and_calls_meanwhile_change_nothing():
    g = goal(
        Subgoal(
            FIND,
            {"city": ("Rome",)},
            results={"price": "cheap", "name": "Lotus"},
            requests=("price", "name"),
        )
    )
    assert rates(g, "call(FindTable; city=Rome)", "Lotus is cheap.") == (1.0, 0.0, 1.0)
    user, said = play(
        g,
        [
            "call(FindTable; city=Rome)",
            "call(BookTable; city=Oslo; time=1; people=2)",
            "It is Lotus.",
        ],
        1,
    )
    assert (
        said[2].startswith("result: nothing found")
        and user.waiting == ["price"]
        and user.useless == 1
    )


def test_impatience():
    user, said = play(goal(), ["Nice."] * 10, 1)
    assert user.ended == "impatient" and user.turn == PATIENCE + 1 and len(said) == PATIENCE + 2
    assert outcome(goal(), ["Nice."] * 10, 1).impatient
    assert (
        rates(goal(), *["Nice."] * 10, "call(BookTable; city=Rome; time=7 pm; people=4)")[0] == 0.0
    ), "nobody listens"


def test_own_words_are_used_where_they_fit():
    words = {
        "open BookTable": "Table!",
        "inform BookTable city": "It has to be Rome.",
        "thanks": "Ciao.",
    }
    words["inform BookTable time"] = "At 9 pm."  # not the value of the goal
    g = replace(goal(), words=words)
    _, said = play(
        g, ["Which city?", "What time?", "call(BookTable; city=Rome; time=7 pm; people=4)"], 1
    )
    assert said[0] == "Table!" and said[1] == "It has to be Rome." and says(said[2], "7 pm")
    assert said[3].endswith("Ciao.")


# --- invariants ---

GOALS = load_goals(SCHEMA, "train", "test")
PIECES = st.sampled_from(
    [
        "Which city?",
        "What day and time?",
        "call(",
        "call(BookDoctor; day=Monday)",
        "yes",
        "The code is A2.",
        "\n",
        "; ",
        "=",
    ]
)
TEXTS = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=6).map("".join))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 383), st.lists(TEXTS, min_size=1, max_size=8), st.integers(0, 3))
def test_no_text_crashes_the_user_and_every_dialogue_ends(index, texts, seed):
    g = GOALS["test"][index]
    most = sum(2 * len(s.values) + len(s.requests) + 1 for s in g.subgoals) + PATIENCE + 1
    turns = (texts * most)[:most]
    user, said = play(g, turns, seed)
    assert user.ended in ("thanks", "failed", "impatient")
    assert all(isinstance(text, str) and text for text in said)
    o = outcome(g, turns, seed)
    assert all(0 <= rate <= 1 for rate in (o.tcr, o.acr, o.gcr)) and o.turns <= most
    assert o.gcr <= o.tcr
    assert play(g, turns, seed)[1] == said, "deterministic"


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2047), st.integers(0, 10**6))
def test_a_clerk_without_mistakes_completes_every_goal(index, seed):
    user, rng, turns = User(GOALS["train"][index], 1), random.Random(seed), []
    user.open()
    while user.ended is None:
        turns.append(clerk(user, rng, careful=True))
        user.hear(turns[-1])
    o = outcome(user.goal, turns, 1)
    assert (o.tcr, o.acr, o.gcr, o.impatient) == (1.0, 1.0, 1.0, False) and user.useless == 0


def test_wording_depends_on_the_seed():
    openings = {User(GOALS["train"][0], seed).open() for seed in range(20)}
    assert len(openings) > 1


# --- goals ---


def test_embedded_goals_are_held_out_and_cover_the_domains():
    def combinations(goals):
        return {
            json.dumps([s.intent.name, s.values], sort_keys=True)
            for g in goals
            if g.group != UNSEEN
            for s in g.subgoals
        }

    assert not combinations(GOALS["train"]) & combinations(GOALS["test"])
    assert {g.group for g in GOALS["train"]} == set(DOMAINS)
    groups = [g.group for g in GOALS["test"]]
    assert set(groups) == {*DOMAINS, UNSEEN} and len(set(groups[:6])) == 6, (
        "any first part has all groups"
    )
    unseen = {s.intent.service for g in GOALS["test"] if g.group == UNSEEN for s in g.subgoals}
    assert unseen == {"Hotels_1", "Trains_1", "Services_4"}
    assert not unseen & {s.intent.service for g in GOALS["train"] for s in g.subgoals}
    assert len({g.key for g in GOALS["train"] + GOALS["test"]}) == len(GOALS["train"]) + len(
        GOALS["test"]
    )
    assert all(side(g) == "train" for g in training_goals(100, 3)), (
        "nor does the warm start see the test combinations"
    )
    assert {domain(n) for n in ("Banks_2", "Services_1", "Services_3", "Flights_4", "Nothing_1")} == {
        "finance", "life", "health", "transport", "other",
    }  # fmt: skip


def test_most_careless_dialogues_go_wrong_somewhere():
    rng = random.Random(1)
    done = [outcome(g, talk(g, rng), 1).gcr for g in GOALS["train"][:200]]
    assert 0.2 < sum(done) / len(done) < 0.8


def test_measure_leaves_unseen_services_out_of_the_average():
    task = DialogueTask.load(SCHEMA, "train", "test", 1)
    pairs = [(p, []) for p in task.test[:12]]
    found = task.measure(pairs)
    assert found["turns"] == found["tcr"] == found["gcr"] == 0 < found["acr"], (
        "what is volunteered is obtained"
    )
    assert {"tcr_unseen", "acr_life", "gcr_finance"} <= set(found)
    perfect = [p for p in task.test[:12] if p.answer.group == UNSEEN][0]
    user, turns = User(perfect.answer, 1), []
    user.open()
    while user.ended is None:
        turns.append(clerk(user, random.Random(1), careful=True))
        user.hear(turns[-1])
    found = task.measure([*pairs, (perfect, turns)])
    assert found["gcr"] == 0 and found["gcr_unseen"] == pytest.approx(1 / 3)


# --- Schema-Guided Dialogue ---


def frame(service, *actions, state=None, **more):
    acts = [
        {"act": act, "slot": slot, "values": list(values), "canonical_values": []}
        for act, slot, *values in actions
    ]
    return {
        "service": service,
        "actions": acts,
        "slots": [],
        **({"state": state} if state else {}),
        **more,
    }


def state(intent, requested=(), **slots):
    slots = {
        slot: values if isinstance(values, list) else [values] for slot, values in slots.items()
    }
    return {"active_intent": intent, "requested_slots": list(requested), "slot_values": slots}


def turn(speaker, utterance, *frames):
    return {"speaker": speaker, "utterance": utterance, "frames": list(frames)}


DIALOGUE = {
    "dialogue_id": "1_00000",
    "services": ["Restaurants_1"],
    "turns": [
        turn("USER", "Find me Thai food in Rome.", frame(
            "Restaurants_1", ("INFORM_INTENT", "intent", "Find"), ("INFORM", "city", "Rome"), ("INFORM", "cuisine", "Thai"),
            state=state("Find", city="Rome", cuisine="Thai"))),
        turn("SYSTEM", "How about Lotus?", frame(
            "Restaurants_1", ("OFFER", "name", "Lotus"),
            service_results=[{"name": "Lotus", "price": "cheap", "city": "Rome", "a": "1", "b": "2", "c": "3"}])),
        turn("USER", "Rather in Milan. What does it cost?", frame(
            "Restaurants_1", ("INFORM", "city", "Milan"), ("REQUEST", "price"),
            state=state("Find", ["price"], city=["Milan", "Milano"], cuisine="Thai"))),
        turn("SYSTEM", "It is cheap. Shall I book?", frame("Restaurants_1", ("INFORM", "price", "cheap"))),
        turn("USER", "Yes, please.", frame(
            "Restaurants_1", ("AFFIRM_INTENT", ""), state=state("Book", city="Milan", name="Lotus"))),
        turn("SYSTEM", "What time?", frame("Restaurants_1", ("REQUEST", "time"))),
        turn("USER", "Quarter past 7 pm suits me.", frame(
            "Restaurants_1", ("INFORM", "time", "7 pm"), state=state("Book", city="Milan", name="Lotus", time="7 pm"))),
        turn("SYSTEM", "Done.", frame("Restaurants_1", ("NOTIFY_SUCCESS", ""))),
        turn("USER", "Many thanks!", frame("Restaurants_1", ("THANK_YOU", ""), state=state("NONE"))),
    ],
}  # fmt: skip
SERVICES = [
    {
        "service_name": "Restaurants_1", "description": "", "slots": [
            {"name": "cuisine", "description": "", "is_categorical": True, "possible_values": ["Thai", "Greek"]},
            *({"name": n, "description": "", "is_categorical": False, "possible_values": []} for n in ("city", "name", "time")),
        ],
        "intents": [
            {"name": "Find", "description": "Find a restaurant", "is_transactional": False, "required_slots": ["cuisine", "city"],
             "optional_slots": {}, "result_slots": ["name", "price"]},
            {"name": "Book", "description": "Book a table", "is_transactional": True, "required_slots": ["name", "time"],
             "optional_slots": {"people": "2"}, "result_slots": []},
        ],
    }
]  # fmt: skip


def write_corpus(folder: Path, dialogues: list, services=SERVICES) -> Path:
    folder.mkdir(parents=True)
    (folder / "schema.json").write_text(json.dumps(services))
    (folder / "dialogues_001.json").write_text(json.dumps(dialogues))
    return folder


def test_goals_of_annotated_dialogues(tmp_path):
    write_corpus(tmp_path / "train", [DIALOGUE])
    other = json.loads(json.dumps(SERVICES + SERVICES).replace("Restaurants_1", "Hotels_9", 1))
    write_corpus(
        tmp_path / "dev",
        [json.loads(json.dumps(DIALOGUE).replace("Restaurants_1", "Hotels_9"))],
        other,
    )
    goals = load_goals(tmp_path, "train", "dev")
    assert [g.group for g in goals["train"] + goals["test"]] == ["life", UNSEEN]
    g = goals["train"][0]
    find, book = g.subgoals
    assert find.values == {"cuisine": ("Thai",), "city": ("Milan", "Milano")} and find.requests == (
        "price",
    )
    assert find.change == ("city", "Rome") and set(find.volunteered) == {"city", "cuisine"}
    assert (
        find.results["price"] == "cheap" and "city" not in find.results and len(find.results) == 3
    )
    assert book.values == {"name": ("Lotus",), "time": ("7 pm",)} and book.volunteered == ("name",)
    assert list(g.calls) == ["Find", "Book"]
    turns = ["call(Find; cuisine=Thai; city=Rome)", "It is cheap.", "Is the name Lotus?", "What time?",
             "call(Book; name=Lotus; time=7 pm)"]  # fmt: skip
    user, said = play(g, turns, 1)
    assert said[0] == "Find me Thai food in Rome." and "Book a table"[1:] in said[2]
    assert said[4] == "Quarter past 7 pm suits me." and said[5] == "result: done\nMany thanks!"
    assert rates(g, *turns) == (1.0, 1.0, 1.0)


def test_the_check_of_a_corpus_counts_what_can_be_completed_and_heard(tmp_path, capsys):
    from benchmark.checks import sgd

    for split in ("train", "dev"):
        write_corpus(tmp_path / split, [DIALOGUE])
    sgd.main(sgd.Args(schema=tmp_path))
    text = capsys.readouterr().out
    assert text.count("1 of 1 goals") == 2 and "heard: 2 of 2 requested" in text


def test_one_folder_for_both_splits_is_divided_by_value_combinations(tmp_path):
    dialogues = []
    for i in range(80):
        text = json.dumps(DIALOGUE["turns"][:2]).replace("Rome", f"City{i}")
        dialogues.append({**DIALOGUE, "dialogue_id": f"1_{i}", "turns": json.loads(text)})
    goals = load_goals(write_corpus(tmp_path / "all", dialogues), "train", "test")
    assert len(goals["train"]) + len(goals["test"]) == 80 and 2 <= len(goals["test"]) <= 25


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "train" / "schema.json").unlink(), "there is no .*schema.json"),
        (lambda f: (f / "train" / "schema.json").write_text("{"), "not readable as JSON"),
        (
            lambda f: (f / "train" / "schema.json").write_text('[{"service_name": "A"}]'),
            "missing 'intents'",
        ),
        (
            lambda f: (f / "train" / "dialogues_001.json").write_text('[{"dialogue_id": "1"}]'),
            "not in the format",
        ),
        (lambda f: (f / "train" / "dialogues_001.json").write_text("[]"), "no goal"),
        (lambda f: (f / "train" / "dialogues_001.json").unlink(), "has no possible values"),
        (lambda f: (f / "train" / "dialogues_001.json").write_text("null"), "not in the format"),
    ],
)
def test_a_bad_schema_is_refused_with_one_sentence(tmp_path, break_it, message):
    write_corpus(tmp_path / "train", [DIALOGUE])
    write_corpus(tmp_path / "test", [DIALOGUE])
    break_it(tmp_path)
    with pytest.raises(SystemExit, match=message):
        load_goals(tmp_path, "train", "test")


@pytest.mark.parametrize("services", [[], [{**SERVICES[0], "intents": []}]])
def test_a_schema_from_which_nothing_can_be_drawn(tmp_path, services):
    (tmp_path / "schema.json").write_text(json.dumps(services))
    with pytest.raises(SystemExit, match="0 of 2048"):
        load_goals(tmp_path, "train", "test")


def test_a_schema_with_too_few_values_is_refused_and_intents_may_need_nothing(tmp_path):
    service = json.loads(json.dumps(SERVICES[0]))
    service["slots"] = [
        {"name": "a", "description": "", "is_categorical": True, "possible_values": ["x", "y"]}
    ]
    service["intents"] = [{**service["intents"][0], "required_slots": ["a"], "result_slots": []}]
    (tmp_path / "schema.json").write_text(json.dumps([service]))
    with pytest.raises(SystemExit, match="too few different goals"):
        load_goals(tmp_path, "train", "test")
    service["intents"][0] |= {"required_slots": [], "optional_slots": {"a": "x"}}
    draw_goal(
        load_schema(write_corpus(tmp_path / "s", [], [service]))["Restaurants_1"],
        "life",
        "k",
        random.Random(1),
    )


def test_values_known_from_earlier_and_indifference(tmp_path):
    """The name of the restaurant was returned by the search: the booking may use it unasked.
    `dontcare` takes any value."""
    dialogue = json.loads(json.dumps(DIALOGUE).replace("Lotus", "dontcare"))
    goals = load_goals(write_corpus(tmp_path / "a", [DIALOGUE]).parent, "a", "a")["train"]
    find, book = goals[0].subgoals
    assert (
        find.results["price"] == "cheap"
        and "name" in find.results
        and book.volunteered == ("name",)
    )
    turns = [
        "call(Find; cuisine=Thai; city=Rome)",
        "It is cheap.",
        "What time?",
        "call(Book; name=Lotus; time=7 pm)",
    ]
    assert rates(goals[0], *turns) == (1.0, 1.0, 1.0)
    free = load_goals(write_corpus(tmp_path / "b", [dialogue]).parent, "b", "b")["train"][0]
    assert free.subgoals[1].values["name"] == ("any",)
    assert rates(free, *turns[:3], "call(Book; name=Anything; time=7 pm)")[0] == 1.0


# --- the tools ---


def test_the_viewer_plays_with_simulated_user_and_with_a_person(monkeypatch, capsys):
    import utils.world.dialogue as module

    monkeypatch.chdir(ROOT)
    module.main(module.Args(play=2))
    text = capsys.readouterr().out
    assert text.count("gcr") == 2 and "assistant" in text
    words = iter(["I want to find a hotel.", "Rome", "", ""])
    monkeypatch.setattr("rich.console.Console.input", lambda self, prompt: next(words))
    module.main(module.Args())
    assert "You are the user" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no readable transcripts"):
        module.main(module.Args(sample=Path("nowhere")))
    with pytest.raises(SystemExit, match="must be at least 1"):
        module.main(module.Args(play=-1))


def test_the_conversation_that_a_reward_model_reads():
    task = DialogueTask.load(SCHEMA, "train", "test", 1)
    messages = task.messages(task.train[0], ["Which city?", "Nice."])
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant"]
    assert messages[0]["content"].startswith("calls: ") and messages[-1]["content"] == "Nice."
    episode = SimpleNamespace(problem=task.train[0], completions=["Which city?", "Nice."])
    assert task.reply(episode.problem, episode.completions[:1]) == messages[2]["content"]


# --- in a rollout ---


def test_a_rollout_is_the_conversation_and_its_mask_the_assistants_words(script, monkeypatch):
    """The tokens of an episode are the chat template's rendering of its messages; those chosen are
    the assistant's turns."""
    monkeypatch.chdir(ROOT)
    args = script.Args(
        task="dialogue", model="assets/tiny_dialogue", noise="none", max_turns=5, max_new_tokens=48
    )
    policy, chat = load_policy(args.model, torch.device("cpu"))
    env = Environment(args, chat, torch.device("cpu"))
    task = env.task
    torch.manual_seed(1)
    episodes = script.rollout(policy, env, task.train[:12], args, 1.0)
    assert max(len(e.completions) for e in episodes) > 2
    for e in episodes:
        messages = task.messages(e.problem, e.completions)
        rendered = chat.tokenizer.apply_chat_template(messages, tokenize=False)
        assert chat.tokenizer.decode(e.tokens) == (
            rendered if e.finished else rendered.removesuffix("<|end|>")
        )
        ends = turn_ends(torch.tensor([e.chosen]))[0]
        turns, begin = [], 0
        for end in ends.nonzero().flatten().tolist():
            turns.append(
                [
                    i
                    for i, c in zip(
                        e.tokens[begin : end + 1], e.chosen[begin : end + 1], strict=True
                    )
                    if c
                ]
            )
            begin = end + 1
        assert [chat.decode(ids) for ids in turns] == e.completions and not any(e.chosen[begin:])
        assert all(ids[-1] in chat.eos_ids for ids in turns[:-1])
        over = task.reply(e.problem, e.completions) is None
        assert over or len(e.completions) == 5 or not e.finished
        for k in range(1, len(e.completions)):
            assert task.reply(e.problem, e.completions[:k]) is not None, (
                "the user was done, yet the episode went on"
            )


def test_gae_and_rewards_across_turns_by_hand(script):
    """Two turns of two tokens and one, a user turn between them: rewards 1 and 2, gamma 1/2, lambda
    1/2, values 1."""
    mask = torch.tensor([[0, 1, 1, 0, 0, 1]]).bool()
    rewards = vrpo_dialogue.place_rewards(torch.tensor([[1.0, 2.0]]), mask)
    assert rewards.tolist() == [[0, 0, 1, 0, 0, 2]]
    assert script.place_rewards(torch.tensor([2.0]), mask).tolist() == [[0, 0, 0, 0, 0, 2]]
    if script.__name__ not in CRITICS:
        return  # no gae, or one from line to line
    values = torch.tensor([[9.0, 1.0, 1.0, 9.0, 9.0, 1.0]])
    # last: 2 - 1 = 1;  before: 1 + 1/2 - 1 = 1/2, + 1/4 * 1 = 3/4;  first: 0 + 1/2 - 1 = -1/2, +
    # 1/4 * 3/4 = -5/16
    assert script.gae(rewards, values, mask, 0.5, 0.5).tolist() == [[0, -5 / 16, 3 / 4, 0, 0, 1]]


def test_a_call_in_a_thought_is_not_carried_out():
    goal = load_goals(SCHEMA, "train", "test")["train"][0]
    calls = [f"call({goal.subgoals[0].intent.name}; x=1)", "Which one?"]
    aloud, thought = User(goal, 1), User(goal, 1)
    aloud.open(), thought.open()
    assert aloud.hear("\n".join(calls)).startswith("error")
    assert not thought.hear(f"<think>{calls[0]}</think>{calls[1]}").startswith("error")
