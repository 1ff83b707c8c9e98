"""Exercises: the script as it is does not pass, the recipe of the same name does."""

import pytest

from tests.conftest import ROOT
from utils.recipe import derive
from utils.report import exercise

PAGE_FILE = ROOT / "docs" / "exercises.md"
PAGE = PAGE_FILE.read_text()


@pytest.mark.parametrize("name", exercise.CHANGES)
def test_a_changed_script(name, tmp_path, capsys):
    skeleton, solution = tmp_path / "my_skeleton.py", tmp_path / "my_solution.py"
    skeleton.write_text((ROOT / "ppo_baseline.py").read_text())
    solution.write_text(derive("ppo_baseline.py", [name]))
    with pytest.raises(SystemExit) as left:
        exercise.main(exercise.Args(name, str(skeleton)))
    said = capsys.readouterr().out
    assert left.value.code == 1 and said.startswith("not yet: at ") and "should be" in said
    exercise.main(exercise.Args(name, str(solution)))
    cases = len(exercise.CHANGES[name].cases)
    assert capsys.readouterr().out == f"right in all {cases} cases\n"


@pytest.mark.parametrize(
    "line",
    ["loss = (-torch.min(ratio * advantages, clipped * advantages) * weights).sum().detach()",
     "loss = -torch.min(ratio * advantages, clipped * advantages).mean()",
     "loss = loss * float('nan')"],
)  # fmt: skip
def test_a_change_that_teaches_nothing_does_not_pass(line, tmp_path, capsys):
    script = tmp_path / "my_script.py"
    text = derive("ppo_baseline.py", ["clip_higher"])
    before = "    outside = clipped != ratio\n"
    assert before in text
    script.write_text(text.replace(before, f"    {line}\n{before}"))
    with pytest.raises(SystemExit):
        exercise.main(exercise.Args("clip_higher", str(script)))
    assert capsys.readouterr().out.startswith("not yet: ")


@pytest.mark.parametrize(
    "name, right",
    [("horizon", 0.3074), ("noise_share", 0.64), ("best_critic", 0.36), ("price", 2.333)],
)
def test_a_number(name, right, capsys):
    exercise.main(exercise.Args(name, f"{right}"))
    assert capsys.readouterr().out.startswith("right: ")
    with pytest.raises(SystemExit) as left:
        exercise.main(exercise.Args(name, f"{1.02 * right}"))
    assert left.value.code == 1 and exercise.NUMBERS[name].hint in capsys.readouterr().out


def test_what_is_no_solution_is_refused_in_one_sentence(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("def policy_loss(*given):\n    return given[9]\n")
    for given, said in (
        (("nothing",), "nothing is no exercise; there are horizon, "),
        (("price", "dear"), "dear: price asks for a number such as 0.25"),
        (("price", "nan"), "nan: price asks for a number such as 0.25"),
        (("huber", str(PAGE_FILE)), "exercises.md: no script"),
        (("huber", "no_such.py"), "no_such.py: no script"),
        (("clip_higher", str(broken)), "ratio 1.25, advantage 1: tuple index out of range"),
    ):
        with pytest.raises(SystemExit) as left:
            exercise.main(exercise.Args(*given))
        assert said in str(left.value)


def test_the_page_and_the_list_have_all_of_them(capsys):
    exercise.main(exercise.Args())
    said = capsys.readouterr().out
    for name in exercise.NUMBERS | exercise.CHANGES:
        assert f"{name}: " in said and f"| `{name}` |" in PAGE
