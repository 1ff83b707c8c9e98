"""--reward-fn: what a function is given, what its number becomes, and how its errors are told."""

import importlib
import shutil
import sys
from types import SimpleNamespace

import pandas as pd
import pytest

from tests.conftest import ROOT, bare_world
from utils.args import check_flags, parse_args
from utils.checkpoints import complete_checkpoints
from utils.dialogue.task import DialogueTask
from utils.world.environment import Episode
from utils.world.problems import Problem
from utils.world.reward_fn import RewardFunction
from utils.world.tasks import ScienceTask

REWARDS = """
from fractions import Fraction
import numpy, torch
asked = []
def quarter(question, answer, completions):
    asked.append((question, answer, completions))
    return 0.25
def length(q, a, c): return len(c[-1])
def true(q, a, c): return True
def fraction(q, a, c): return Fraction(1, 2)
def array(q, a, c): return numpy.float64(0.5)
def switch(q, a, c): return numpy.bool_(True)
def tensor(q, a, c): return torch.tensor(2)
class Judge:
    def __call__(self, question, answer, completions, scale=3): return scale
judge = Judge()
def none(q, a, c): pass
def text(q, a, c): return "1.0"
def several(q, a, c): return [1.0]
def row(q, a, c): return torch.ones(1)
def nan(q, a, c): return float("nan")
def infinite(q, a, c): return -numpy.inf
def huge(q, a, c): return 10**400
def wide(q, a, c): return 1e39
def imaginary(q, a, c): return 1j
async def later(q, a, c): return 1.0
def few(question, answer): return 1.0
def inner(x): return x[9]
def deep(q, a, c):
    return inner(c)
def leaves(q, a, c): raise SystemExit(3)
number = 7
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, with user_rewards.py; what it imports is forgotten afterwards."""
    (tmp_path / "user_rewards.py").write_text(REWARDS.lstrip())
    (tmp_path / "user_broken.py").write_text("x = 1\ny = (\n")
    (tmp_path / "user_lacking.py").write_text("\nimport not_installed\n")
    (tmp_path / "user_quits.py").write_text("import sys\nsys.exit(2)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("user_")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "name, number",
    {
        "quarter": 0.25, "length": 3.0, "true": 1.0, "fraction": 0.5, "array": 0.5, "switch": 1.0, "tensor": 2.0,
        "judge": 3.0,
    }.items(),
)  # fmt: skip
def test_what_counts_as_a_number(name, number, folder):
    found = RewardFunction(f"user_rewards:{name}").scores([("q", "a", ["x", "abc"])])
    assert found == [number] and type(found[0]) is float


def line_of(start: str) -> int:
    return next(i for i, line in enumerate(REWARDS.splitlines()) if line.startswith(start))


REFUSED = {
    "user_rewards": "give MODULE:FUNCTION, such as rewards:short",
    "user_rewards:": "give MODULE:FUNCTION",
    ":quarter": "give MODULE:FUNCTION",
    "./user_rewards.py:quarter": "give MODULE:FUNCTION",
    "user_rewards.py:quarter": "there is no module user_rewards.py; give MODULE:FUNCTION",
    "user_nowhere:quarter": "there is no module user_nowhere",
    "user_broken:f": "user_broken.py, line 2: SyntaxError",
    "user_lacking:f": "user_lacking.py, line 2: ModuleNotFoundError: No module named 'not_installed'",
    "user_quits:f": "user_quits.py, line 2: SystemExit: 2",
    "user_rewards:typo": "user_rewards has no function typo",
    "user_rewards:number": "user_rewards has no function number",
    "user_rewards:few": f"user_rewards.py, line {line_of('def few')}: cannot be called as few(qu",
    "user_rewards:deep": f"user_rewards.py, line {line_of('def inner')}: IndexError: list index",
    "user_rewards:leaves": f"user_rewards.py, line {line_of('def leaves')}: SystemExit: 3",
    "math:cos": "cannot be called as cos(question, answer, completions)",
}
for wrong in ("none", "text", "several", "row", "nan", "infinite", "huge", "wide", "imaginary"):
    REFUSED[f"user_rewards:{wrong}"] = f"user_rewards.py, line {line_of(f'def {wrong}')}: returned "
REFUSED["user_rewards:later"] = f"line {line_of('async def later')}: returned <coroutine"


@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.parametrize("name", REFUSED)
def test_errors_are_one_sentence_with_file_and_line(name, folder):
    with pytest.raises(SystemExit) as caught:
        function = RewardFunction(name)
        function.stop(function.scores([("q", "a", ["x"])]))
    sentence = caught.value.code
    assert sentence.startswith(f"error: --reward-fn {name}: ") and REFUSED[name] in sentence
    assert "\n" not in sentence and str(folder) not in sentence and len(sentence) < 300


def played(problem: Problem, *completions: str, finished: bool = True) -> Episode:
    return Episode(problem, completions=list(completions), finished=finished)


def test_what_a_function_is_given_in_each_task(folder, monkeypatch):
    """Maths and science: question with its options, reference or letter. Dialogue: the first
    message, the goal, every turn of the assistant; the user's turns are not said."""
    dialogue = DialogueTask.load(ROOT / "assets" / "data" / "tiny_dialogue", "train", "test", 1)
    goal = dialogue.train[0]
    cases = [
        (None, Problem("1 + 1?", "2", []), "1 + 1?", "2"),
        (ScienceTask([], [], {}), Problem("Q\nA) x\nB) y", "B", [], ("x", "y")), "Q\nA) x\nB) y", "B"),
        (dialogue, goal, dialogue.first_message(goal), str(goal.answer)),
    ]  # fmt: skip
    for task, problem, question, answer in cases:
        env = bare_world(SimpleNamespace(truncated="wrong"), None, task)
        env.reward_fn = RewardFunction("user_rewards:quarter")
        scores = env.score([played(problem, "one", "two")], None)
        assert scores.tolist() == [0.25]
        assert sys.modules["user_rewards"].asked.pop() == (question, answer, ["one", "two"])


def test_an_answer_that_was_cut_off_has_at_most_zero(folder):
    problem = Problem("q", "2", [])
    episodes = [played(problem, "123"), played(problem, "123", finished=False)]
    for truncated, wanted in (("wrong", [3.0, 0.0]), ("grade", [3.0, 3.0]), ("mask", [3.0, 3.0])):
        env = bare_world(SimpleNamespace(truncated=truncated), None)
        env.reward_fn = RewardFunction("user_rewards:length")
        assert env.score(episodes, None).tolist() == wanted


def test_the_first_process_asks_and_all_stop(folder, monkeypatch):
    env = bare_world(SimpleNamespace(truncated="grade"), None)
    env.reward_fn = RewardFunction("user_rewards:quarter")
    sent = [[0.5], "--reward-fn x: why"]  # what another process has found
    monkeypatch.setattr("utils.world.environment.from_first", lambda find: sent.pop(0))
    episodes = [played(Problem("q", "2", []), "x")]
    assert env.score(episodes, None).tolist() == [0.5] and not sys.modules["user_rewards"].asked
    with pytest.raises(SystemExit, match="why"):
        env.score(episodes, None)


def test_it_is_the_reward_and_nothing_else(folder, run_main):
    """Observed is the function's number through the channel; what is clean, evaluation included, is
    as it was. A resumed run has the flag."""
    flags = {"truncated": "grade", "learning_rate": 0.0, "updates": 1}
    plain = pd.read_csv(run_main("grpo_baseline", noise="none", **flags) / "metrics.csv")
    flags |= {"reward_fn": "user_rewards:quarter", "noise_rate": 1.0}
    for noise, wanted in {"none": 0.25, "symmetric": 0.75, "group": 0.75}.items():
        run = run_main("grpo_baseline", run_name=noise, noise=noise, **flags)
        frame = pd.read_csv(run / "metrics.csv")
        assert frame["reward/observed"][1] == pytest.approx(wanted)
        for key in ("reward/clean", "eval/accuracy"):
            assert frame[key].equals(plain[key])
    module = importlib.import_module("grpo_baseline")
    sys.argv[1:] = ["--resume", str(run), "--updates", "2"]
    args = parse_args(module.Args, None)
    assert args.reward_fn == "user_rewards:quarter"
    module.main(args)
    assert pd.read_csv(run / "metrics.csv")["reward/observed"][2] == pytest.approx(0.75)


def test_it_rewards_dialogues(folder, run_main, dialogue_flags):
    flags = dialogue_flags | {"reward_model": None, "reward_fn": "user_rewards:quarter"}
    flags |= {"max_turns": 2, "prompts_per_update": 2, "eval_size": 2}
    run = run_main("vrpo_dialogue", updates=1, truncated="grade", **flags)
    assert pd.read_csv(run / "metrics.csv")["reward/observed"][1] == pytest.approx(0.25)


def test_what_it_does_not_go_with():
    Args = importlib.import_module("vrpo_dialogue").Args
    for flags, words in (
        ({"reward_fn": "a:b"}, "--reward-fn a:b and --reward-model .*: one of them .*: --reward-model None leaves"),
        ({"reward_fn": "a:b", "reward_model": None, "task": "math", "noise": "majority-vote"},
         "--noise majority-vote: .* nor --reward-fn have"),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match=words):
            check_flags(Args(**flags))
    module = importlib.import_module("vrpo_dialogue")
    with pytest.raises(SystemExit, match="--reward-per turn: only a reward model judges turns"):
        module.main(Args(reward_fn="a:b", reward_model=None, reward_per="turn"))


LATER = """
calls = []
def later(q, a, c):
    calls.append(a)
    if len(calls) > 20:
        raise {error}("no net")
    return 0.5
"""


@pytest.mark.parametrize("error", ["ValueError", "KeyboardInterrupt"])
def test_a_function_that_fails_later_loses_no_update(error, run_main, folder):
    """Two updates are whole when it fails, and no checkpoint is due; it meets no references."""
    (folder / "user_later.py").write_text(LATER.format(error=error))
    rows = [f'{{"question": "{i} + 1?"}}' for i in range(40)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    (folder / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}')
    flags = {"reward_fn": "user_later:later", "dataset": str(folder), "save_every": 10}
    flags["truncated"] = "grade"
    with pytest.raises(SystemExit, match=f"user_later.py, line 6: {error}: no net"):
        run_main("ppo_baseline", updates=4, noise="none", **flags)
    run = folder / "runs" / "ppo_baseline"
    assert [path.name for path in complete_checkpoints(run)] == ["000002"]
    sys.modules["user_later"].calls.clear()
    run_main("ppo_baseline", updates=4, noise="none", resume=run, **flags)
    frame = pd.read_csv(run / "metrics.csv")
    assert frame["update"].tolist() == [0, 1, 2, 3, 4]
    assert frame["reward/observed"][1:].tolist() == [0.5] * 4
    assert "reward/clean" not in frame  # nobody knows the truth


def test_numbers_on_another_scale_teach_the_critic_as_much(run_main, folder):
    """The same function times 100 and times 10: the same run in units, resumed too; of a function
    that is the reward nothing is an error."""
    code = "\ndef wide(q, a, c): return 100.0 * len(c[-1])\ndef plain(q, a, c): return len(c[-1]) / 10\n"
    (folder / "user_wide.py").write_text(code)
    flags = {"noise": "none", "truncated": "grade", "learning_rate": 0.0}
    runs = {}
    for name in ("wide", "plain"):
        run = run_main("ppo_baseline", run_name=name, reward_fn=f"user_wide:{name}", **flags)
        shutil.rmtree(run / "checkpoints" / "000002")
        run_main("ppo_baseline", resume=run, reward_fn=f"user_wide:{name}", **flags)
        runs[name] = pd.read_csv(run / "metrics.csv")
    rate = runs["plain"]["reward/observed"] / runs["wide"]["reward/observed"]
    assert rate[1] == pytest.approx(rate[2]) and rate[1] in (pytest.approx(1), pytest.approx(0.1))
    assert runs["wide"]["reward/observed"][1:].abs().max() < 100
    same = "critic/explained_variance"
    assert runs["wide"][f"{same}_clean"].tolist() == pytest.approx(
        runs["wide"][same].tolist(), nan_ok=True
    )
