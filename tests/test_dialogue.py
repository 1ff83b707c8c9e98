"""The dialogue environment: call grammar, simulated user, outcome on hand-written dialogues, goals,
Schema-Guided Dialogue."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vrpo_dialogue
from assets.make.tiny_dialogue import clerk, talk, training_goals
from benchmark.checks import sgd
from tests.conftest import ROOT
from utils.dialogue import talk as viewer
from utils.dialogue.goals import (
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
from utils.dialogue.task import DialogueTask
from utils.dialogue.user import (
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
from utils.models import load_policy
from utils.tensors import turn_ends
from utils.world.environment import Environment

SCHEMA = ROOT / "assets" / "data" / "tiny_dialogue"
FIND = Intent("FindTable", "Food_1", "find a table", False, ("city",), (), ("price",))
BOOK = Intent(
    "BookTable", "Food_1", "book a table", True, ("city", "time", "people"), ("seating",), ("code",)
)
CALLS = {"FindTable": FIND, "BookTable": BOOK}
VALUES = {"city": ("Rome", "Oslo"), "seating": ("indoor", "outdoor")}
WANTED = {"city": ("Rome",), "time": ("7 pm", "19:00"), "people": ("4",)}
FOUND = "call(FindTable; city=Rome)"
BOOKED = "call(BookTable; city=Rome; time=7 pm; people=4)"
SEARCH = Subgoal(FIND, {"city": ("Rome",)})


def goal(*subgoals: Subgoal, **words: str) -> Goal:
    return Goal("g", "life", subgoals or (Subgoal(BOOK, WANTED),), CALLS, VALUES, words)


def rates(g: Goal, *turns: str) -> tuple[float, float, float]:
    o = outcome(g, list(turns), 1)
    return o.tcr, o.acr, o.gcr


def opened(g: Goal | None = None) -> User:
    user = User(g or goal(), 1)
    user.open()
    return user


def perfect(user: User, rng: random.Random) -> list[str]:
    """The turns of an assistant without mistakes."""
    turns = []
    user.open()
    while user.ended is None:
        turns.append(clerk(user, rng, careful=True))
        user.hear(turns[-1])
    return turns


# --- the call grammar ---


def test_calls():
    spaced = (
        "One moment.\n  call( BookTable ; city = Rome;time=7 pm ; people=4 )  \nDone.",
        BOOKED,
    )
    for text in spaced:
        values = {"city": "Rome", "time": "7 pm", "people": "4"}
        assert parse_call(text, CALLS).values == values
    for text in ("Which city?", "", "I will call you.", "recall the city"):
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
    user = opened()
    assert user.hear(text).startswith("error: ") and user.useless == 1 and user.ended is None


def test_a_call_in_a_thought_is_not_carried_out():
    aloud, thought = opened(), opened()
    assert aloud.hear("call(BookTable; x=1)\nWhich one?").startswith("error")
    assert not thought.hear("<think>call(BookTable; x=1)</think>Which one?").startswith("error")


# --- what the user understands ---


def test_questions_are_understood():
    for text, asked in (
        ("Which city?", ["city"]),
        ("Fine. Which city and what time?", ["city", "time"]),
        ("When?", ["time"]),
        ("How many people?", ["people"]),
        ("The city is nice.", []),
        ("I like cities. What time?", ["time"]),
        ("Hello?", []),
    ):
        assert asked_slots(text, ("city", "time", "people")) == asked
    for text, slot in (
        ("What is the party size?", "party_size"),
        ("What is the name of the restaurant?", "restaurant_name"),
    ):
        assert asked_slots(text, (slot,)) == [slot]
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
    asked, wrong = "Which city and time?", BOOKED.replace("4", "5")
    assert rates(goal(), asked, BOOKED) == (1.0, pytest.approx(2 / 3), 1.0)
    assert rates(goal(), asked, wrong, BOOKED) == (0.0, pytest.approx(2 / 3), 0.0)
    assert play(goal(), [asked, wrong], 1)[0].ended == "failed"


def test_a_search_with_a_wrong_value_is_corrected_and_may_be_repeated():
    turns = ["call(FindTable; city=Oslo)", FOUND]
    user, said = play(goal(SEARCH), turns, 1)
    assert says(said[1], "Rome") and user.ended == "thanks" and user.useless == 1
    assert rates(goal(SEARCH), *turns) == (1.0, 0.0, 1.0)


def test_the_wrong_intent():
    assert rates(goal(SEARCH), BOOKED) == (0.0, 0.0, 0.0)
    assert rates(goal(), FOUND, "What time, city and how many people?") == (0.0, 0.0, 0.0)


def test_two_subgoals_are_halves_of_a_task_rate_and_both_needed_for_the_goal():
    g = goal(SEARCH, Subgoal(BOOK, WANTED))
    turns = ["Where?", FOUND]
    assert rates(g, *turns) == (0.5, 0.25, 0.0)
    turns += ["Which city, time and how many people?", BOOKED]
    assert rates(g, *turns) == (1.0, 1.0, 1.0)
    assert outcome(g, turns, 1).turns == 4


def test_a_lost_first_subgoal_leaves_the_second():
    g = goal(Subgoal(BOOK, WANTED, results={"code": "K7"}, requests=("code",)), SEARCH)
    turns = [BOOKED.replace("4", "5"), "Which city?", FOUND]
    user, said = play(g, turns, 1)
    assert "find a table" in said[1] and user.ended == "failed"
    assert rates(g, *turns) == (0.5, 0.25, 0.0)


def test_optional_slots_that_were_told_belong_into_the_call():
    g = goal(SEARCH, Subgoal(BOOK, WANTED | {"seating": ("indoor",)}, ("seating",)))
    _, said = play(g, [FOUND], 1)
    assert says(said[1], "indoor")
    for more, complete in (("; seating=indoor)", 1.0), (")", 0.5), ("; seating=outdoor)", 0.5)):
        assert rates(g, FOUND, BOOKED.replace(")", more))[0] == complete


def test_a_change_of_mind():
    g = goal(Subgoal(BOOK, WANTED, change=("city", "Oslo")))
    user, said = play(g, ["Which city?", "What time?"], 1)
    assert says(said[1], "Oslo") and user.useless == 0
    assert says(said[2], "Rome") and says(said[2], "7 pm")
    asked, in_oslo = (
        ["Which city?", "What time?", "How many people?"],
        BOOKED.replace("Rome", "Oslo"),
    )
    assert rates(g, *asked, BOOKED)[0] == 1.0 and rates(g, *asked, in_oslo)[0] == 0.0
    assert rates(g, "Which city?", in_oslo)[0] == 1.0, "not taken back yet"


def test_a_question_to_confirm_is_answered_once():
    user = opened()
    user.hear("Which city?")
    assert user.hear("The city is Rome?").startswith("Yes") and user.useless == 0
    user.hear("The city is Rome?")
    assert user.useless == 1, "it was told and confirmed"
    assert says(user.hear("Is the time 8 pm?"), "7 pm")
    denied = opened().hear("Is the city Oslo?")
    assert re.match(r"(No|That is wrong), the city is Rome", denied)


def test_a_list_to_choose_from_is_not_answered_with_yes():
    for question in ("Which city, Rome or Oslo?", "Is the city Oslo or Rome?"):
        assert says(opened().hear(question), "Rome")
    many = opened()
    many.hear("Which city and time?")
    agreed = many.hear("The city is Rome and the time is 7 pm?")
    assert agreed in ("Yes.", "Yes, right.", "Yes. Yes, right.", "Yes, right. Yes.")


def test_results_are_told_in_natural_words():
    for text, value, told in (
        ("Yes, it has wifi.", "True", True),
        ("Wifi is there.", "True", True),
        ("No, there is no wifi.", "True", False),
        ("No wifi, sorry.", "False", True),
        ("They don't.", "False", True),
        ("Yes.", "False", False),
        ("Fine.", "True", False),
        ("It is 4 dollars.", "4", True),
        ("It is 40 dollars.", "4", False),
    ):
        assert tells(text, "has_wifi", value) == told, text


def test_several_results_may_be_told_at_once_and_calls_meanwhile_change_nothing():
    results = {"price": "cheap", "name": "Lotus"}
    g = goal(Subgoal(FIND, {"city": ("Rome",)}, results=results, requests=("price", "name")))
    assert rates(g, FOUND, "Lotus is cheap.") == (1.0, 0.0, 1.0)
    other = "call(BookTable; city=Oslo; time=1; people=2)"
    user, said = play(g, [FOUND, other, "It is Lotus."], 1)
    assert said[2].startswith("result: nothing found")
    assert user.waiting == ["price"] and user.useless == 1


def test_impatience():
    user, said = play(goal(), ["Nice."] * 10, 1)
    assert user.ended == "impatient" and user.turn == PATIENCE + 1 and len(said) == PATIENCE + 2
    assert outcome(goal(), ["Nice."] * 10, 1).impatient
    assert rates(goal(), *["Nice."] * 10, BOOKED)[0] == 0.0, "nobody listens"


def test_own_words_are_used_where_they_fit():
    words = {
        "open BookTable": "Table!",
        "inform BookTable city": "It has to be Rome.",
        "inform BookTable time": "At 9 pm.",  # not the value of the goal
        "thanks": "Ciao.",
    }
    _, said = play(replace(goal(), words=words), ["Which city?", "What time?", BOOKED], 1)
    assert said[0] == "Table!" and said[1] == "It has to be Rome." and says(said[2], "7 pm")
    assert said[3].endswith("Ciao.")


# --- invariants ---

GOALS = load_goals(SCHEMA, "train", "test")
PIECES = st.sampled_from([
    "Which city?", "What day and time?", "call(", "call(BookDoctor; day=Monday)", "yes",
    "The code is A2.", "\n", "; ", "=",
])  # fmt: skip
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
    user = User(GOALS["train"][index], 1)
    o = outcome(user.goal, perfect(user, random.Random(seed)), 1)
    assert (o.tcr, o.acr, o.gcr, o.impatient) == (1.0, 1.0, 1.0, False) and user.useless == 0


def test_wording_depends_on_the_seed():
    openings = {User(GOALS["train"][0], seed).open() for seed in range(20)}
    assert len(openings) > 1


# --- goals ---


def test_embedded_goals_are_held_out_and_cover_the_domains():
    train, test = GOALS["train"], GOALS["test"]

    def combinations(goals):
        subgoals = [s for g in goals if g.group != UNSEEN for s in g.subgoals]
        return {json.dumps([s.intent.name, s.values], sort_keys=True) for s in subgoals}

    assert not combinations(train) & combinations(test)
    # nor does the warm start see the test combinations
    assert all(side(g) == "train" for g in training_goals(100, 3))
    assert {g.group for g in train} == set(DOMAINS)
    groups = [g.group for g in test]  # of which any first part has all
    assert set(groups) == {*DOMAINS, UNSEEN} and len(set(groups[:6])) == 6
    unseen = {s.intent.service for g in test if g.group == UNSEEN for s in g.subgoals}
    assert unseen == {"Hotels_1", "Trains_1", "Services_4"}
    assert not unseen & {s.intent.service for g in train for s in g.subgoals}
    assert len({g.key for g in train + test}) == len(train) + len(test)
    names = ("Banks_2", "Services_1", "Services_3", "Flights_4", "Nothing_1")
    assert [domain(n) for n in names] == ["finance", "life", "health", "transport", "other"]


def test_most_careless_dialogues_go_wrong_somewhere():
    rng = random.Random(1)
    done = [outcome(g, talk(g, rng), 1).gcr for g in GOALS["train"][:200]]
    assert 0.2 < sum(done) / len(done) < 0.8


def test_measure_leaves_unseen_services_out_of_the_average():
    task = DialogueTask.load(SCHEMA, "train", "test", 1)
    pairs = [(p, []) for p in task.test[:12]]
    found = task.measure(pairs)  # what is volunteered is obtained
    assert found["turns"] == found["tcr"] == found["gcr"] == 0 < found["acr"]
    assert {"tcr_unseen", "acr_life", "gcr_finance"} <= set(found)
    known = next(p for p in task.test[:12] if p.answer.group == UNSEEN)
    turns = perfect(User(known.answer, 1), random.Random(1))
    found = task.measure([*pairs, (known, turns)])
    assert found["gcr"] == 0 and found["gcr_unseen"] == pytest.approx(1 / 3)


# --- Schema-Guided Dialogue ---


def frame(service, *actions, state=None, **more):
    acts = [
        {"act": act, "slot": slot, "values": list(values), "canonical_values": []}
        for act, slot, *values in actions
    ]
    state = {"state": state} if state else {}
    return {"service": service, "actions": acts, "slots": [], **state, **more}


def state(intent, requested=(), **slots):
    values = {slot: x if isinstance(x, list) else [x] for slot, x in slots.items()}
    return {"active_intent": intent, "requested_slots": list(requested), "slot_values": values}


OURS, RESULT = "Restaurants_1", {"name": "Lotus", "price": "cheap", "city": "Rome"}
SAID = [
    ("USER", "Find me Thai food in Rome.", frame(
        OURS, ("INFORM_INTENT", "intent", "Find"), ("INFORM", "city", "Rome"),
        ("INFORM", "cuisine", "Thai"), state=state("Find", city="Rome", cuisine="Thai"))),
    ("SYSTEM", "How about Lotus?", frame(
        OURS, ("OFFER", "name", "Lotus"),
        service_results=[{**RESULT, "a": "1", "b": "2", "c": "3"}])),
    ("USER", "Rather in Milan. What does it cost?", frame(
        OURS, ("INFORM", "city", "Milan"), ("REQUEST", "price"),
        state=state("Find", ["price"], city=["Milan", "Milano"], cuisine="Thai"))),
    ("SYSTEM", "It is cheap. Shall I book?", frame(OURS, ("INFORM", "price", "cheap"))),
    ("USER", "Yes, please.", frame(
        OURS, ("AFFIRM_INTENT", ""), state=state("Book", city="Milan", name="Lotus"))),
    ("SYSTEM", "What time?", frame(OURS, ("REQUEST", "time"))),
    ("USER", "Quarter past 7 pm suits me.", frame(
        OURS, ("INFORM", "time", "7 pm"),
        state=state("Book", city="Milan", name="Lotus", time="7 pm"))),
    ("SYSTEM", "Done.", frame(OURS, ("NOTIFY_SUCCESS", ""))),
    ("USER", "Many thanks!", frame(OURS, ("THANK_YOU", ""), state=state("NONE"))),
]  # fmt: skip
DIALOGUE = {
    "dialogue_id": "1_00000",
    "services": [OURS],
    "turns": [{"speaker": who, "utterance": text, "frames": [f]} for who, text, f in SAID],
}


def slot(name: str, *values: str) -> dict:
    is_one_of = {"is_categorical": bool(values), "possible_values": list(values)}
    return {"name": name, "description": "", **is_one_of}


SERVICES = [{
    "service_name": OURS, "description": "",
    "slots": [slot("cuisine", "Thai", "Greek"), *map(slot, ("city", "name", "time"))],
    "intents": [
        {"name": "Find", "description": "Find a restaurant", "is_transactional": False,
         "required_slots": ["cuisine", "city"], "optional_slots": {},
         "result_slots": ["name", "price"]},
        {"name": "Book", "description": "Book a table", "is_transactional": True,
         "required_slots": ["name", "time"], "optional_slots": {"people": "2"},
         "result_slots": []},
    ],
}]  # fmt: skip
PLAYED = [
    "call(Find; cuisine=Thai; city=Rome)", "It is cheap.", "What time?",
    "call(Book; name=Lotus; time=7 pm)",
]  # fmt: skip


def write_corpus(folder: Path, dialogues: list, services=SERVICES) -> Path:
    folder.mkdir(parents=True)
    (folder / "schema.json").write_text(json.dumps(services))
    (folder / "dialogues_001.json").write_text(json.dumps(dialogues))
    return folder


def test_goals_of_annotated_dialogues(tmp_path):
    write_corpus(tmp_path / "train", [DIALOGUE])
    other = json.loads(json.dumps(SERVICES + SERVICES).replace(OURS, "Hotels_9", 1))
    elsewhere = json.loads(json.dumps(DIALOGUE).replace(OURS, "Hotels_9"))
    write_corpus(tmp_path / "dev", [elsewhere], other)
    goals = load_goals(tmp_path, "train", "dev")
    assert [g.group for g in goals["train"] + goals["test"]] == ["life", UNSEEN]
    g = goals["train"][0]
    find, book = g.subgoals
    assert find.values == {"cuisine": ("Thai",), "city": ("Milan", "Milano")}
    assert find.change == ("city", "Rome") and set(find.volunteered) == {"city", "cuisine"}
    assert find.requests == ("price",) and find.results["price"] == "cheap"
    assert "city" not in find.results and len(find.results) == 3
    # the name was returned by the search: the booking may use it unasked
    assert book.values == {"name": ("Lotus",), "time": ("7 pm",)} and book.volunteered == ("name",)
    assert list(g.calls) == ["Find", "Book"] and rates(g, *PLAYED) == (1.0, 1.0, 1.0)
    turns = [*PLAYED[:2], "Is the name Lotus?", *PLAYED[2:]]
    user, said = play(g, turns, 1)
    assert said[0] == "Find me Thai food in Rome." and "ook a table" in said[2]
    assert said[4] == "Quarter past 7 pm suits me." and said[5] == "result: done\nMany thanks!"
    assert rates(g, *turns) == (1.0, 1.0, 1.0)


def test_indifference_takes_any_value(tmp_path):
    dialogue = json.loads(json.dumps(DIALOGUE).replace("Lotus", "dontcare"))
    free = load_goals(write_corpus(tmp_path / "b", [dialogue]).parent, "b", "b")["train"][0]
    assert free.subgoals[1].values["name"] == ("any",)
    assert rates(free, *PLAYED[:3], "call(Book; name=Anything; time=7 pm)")[0] == 1.0


def test_the_check_of_a_corpus_counts_what_can_be_completed_and_heard(tmp_path, capsys):
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
    ("file", "contents", "message"),
    [
        ("schema", None, "there is no .*schema.json"),
        ("schema", "{", "not readable as JSON"),
        ("schema", '[{"service_name": "A"}]', "missing 'intents'"),
        ("dialogues_001", '[{"dialogue_id": "1"}]', "not in the format"),
        ("dialogues_001", "[]", "no goal"),
        ("dialogues_001", None, "has no possible values"),
        ("dialogues_001", "null", "not in the format"),
    ],
)
def test_a_bad_schema_is_refused_with_one_sentence(tmp_path, file, contents, message):
    write_corpus(tmp_path / "train", [DIALOGUE])
    write_corpus(tmp_path / "test", [DIALOGUE])
    broken = tmp_path / "train" / f"{file}.json"
    broken.unlink() if contents is None else broken.write_text(contents)
    with pytest.raises(SystemExit, match=message):
        load_goals(tmp_path, "train", "test")


def test_a_schema_from_which_nothing_can_be_drawn(tmp_path):
    """And intents may need nothing."""
    service = {**SERVICES[0], "slots": [slot("a", "x", "y")]}
    one = {**SERVICES[0]["intents"][0], "required_slots": ["a"], "result_slots": []}
    for services, message in (
        ([], "0 of 2048"),
        ([{**service, "intents": []}], "0 of 2048"),
        ([{**service, "intents": [one]}], "too few different goals"),
    ):
        (tmp_path / "schema.json").write_text(json.dumps(services))
        with pytest.raises(SystemExit, match=message):
            load_goals(tmp_path, "train", "test")
    service["intents"] = [one | {"required_slots": [], "optional_slots": {"a": "x"}}]
    schema = load_schema(write_corpus(tmp_path / "s", [], [service]))
    draw_goal(schema[OURS], "life", "k", random.Random(1))


# --- the tools ---


def test_the_viewer_plays_with_simulated_user_and_with_a_person(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    viewer.main(viewer.Args(play=2))
    text = capsys.readouterr().out
    assert text.count("gcr") == 2 and "assistant" in text
    words = iter(["I want to find a hotel.", "Rome", "", ""])
    monkeypatch.setattr("rich.console.Console.input", lambda self, prompt: next(words))
    viewer.main(viewer.Args())
    assert "You are the user" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no readable transcripts"):
        viewer.main(viewer.Args(sample=Path("nowhere")))
    with pytest.raises(SystemExit, match="must be at least 1"):
        viewer.main(viewer.Args(play=-1))


# --- in a rollout ---


def test_a_rollout_is_the_conversation_and_its_mask_the_assistants_words(monkeypatch):
    """Prompt and tokens of an episode are the chat template's rendering of its messages; those
    chosen are the assistant's turns."""
    monkeypatch.chdir(ROOT)
    args = vrpo_dialogue.Args(max_turns=5)
    policy, chat = load_policy(args.model, torch.device("cpu"))
    env = Environment(args, chat, torch.device("cpu"))
    torch.manual_seed(1)
    episodes = vrpo_dialogue.rollout(policy, env, env.task.train[:12], args, 1.0)
    assert max(len(e.completions) for e in episodes) > 2
    for e in episodes:
        messages = env.task.messages(e.problem, e.completions)
        assert messages[0]["content"].startswith("calls: ")
        rendered = chat.tokenizer.apply_chat_template(messages, tokenize=False)
        whole = rendered if e.finished else rendered.removesuffix("<|end|>")
        assert chat.tokenizer.decode(e.prompt + e.tokens) == whole
        turns = [[]]
        is_end = turn_ends(torch.tensor([e.chosen]))[0].tolist()
        for token, chosen, end in zip(e.tokens, e.chosen, is_end, strict=True):
            turns[-1] += [token] * chosen
            turns += [[]] * end
        assert [chat.decode(ids) for ids in turns] == [*e.completions, ""]
        assert all(ids[-1] in chat.eos_ids for ids in turns[:-2])
        over = env.task.reply(e.problem, e.completions) is None
        assert over or len(e.completions) == 5 or not e.finished
        for k in range(1, len(e.completions)):  # or the user was done, yet the episode went on
            assert env.task.reply(e.problem, e.completions[:k]) == messages[2 * k]["content"]
