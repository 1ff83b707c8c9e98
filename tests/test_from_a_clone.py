"""What a clone promises: one list of requirements, extras beside it, a notebook that runs."""

import json
import re
import runpy
import shlex
import sys
import tomllib

import yaml

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PIN = r"[a-z0-9-]+==[0-9.]+"


def test_every_requirement_is_pinned_in_one_place():
    """pyproject.toml reads those of the scripts from requirements.txt, so neither can drift; tools
    and trackers are extras, and the Makefile installs both by name."""
    project, extras = PROJECT["project"], PROJECT["project"]["optional-dependencies"]
    assert "dependencies" not in project and project["dynamic"] == ["dependencies"]
    dynamic = PROJECT["tool"]["setuptools"]["dynamic"]
    assert dynamic == {"dependencies": {"file": ["requirements.txt"]}}
    pins = (ROOT / "requirements.txt").read_text().split("\n")[:-1]
    pins += [pin for extra in extras.values() for pin in extra]
    assert all(re.fullmatch(PIN, pin) for pin in pins)
    names = [pin.split("==")[0] for pin in pins]
    assert len(set(names)) == len(names)
    assert {"pytest", "ruff"} < {pin.split("==")[0] for pin in extras["dev"]}
    assert {pin.split("==")[0] for pin in extras["track"]} == {"wandb", "trackio"}
    installs = re.findall(r"pip install --quiet (.*)", (ROOT / "Makefile").read_text())
    assert sorted(installs) == ["-e '.[dev,track]'", "-e '.[docs]'", "-r requirements.txt"]


def test_the_python_of_the_readme_is_that_of_the_project():
    assert PROJECT["project"]["requires-python"] == ">=3.11"
    for page in ("README.md", "docs/README.md"):
        assert "Python 3.11 or newer" in (ROOT / page).read_text()
    pins = (ROOT / "requirements.txt").read_text()
    assert re.search(r"^torch==(.*)$", pins, re.M)[1] in (ROOT / "docs" / "README.md").read_text()


def test_the_task_for_lm_evaluation_harness():
    """Its file is there, and its pattern finds the answer in a solution as the model writes it."""
    task = yaml.safe_load((ROOT / "assets" / "lm_eval" / "tiny_math.yaml").read_text())
    lines = (ROOT / task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    last_number, _ = task["filter_list"][0]["filter"]
    for row in map(json.loads, lines):
        found = re.findall(last_number["regex_pattern"], row["answer"])
        assert found[last_number["group_select"]] == row["answer"].split("#### ")[1]


def test_the_notebook(tmp_path, monkeypatch):
    """Its code cells in their order, in one namespace and without Jupyter, nor new processes for
    lines with !; the run is a small one."""
    for path in [*ROOT.glob("*.py"), ROOT / "utils", ROOT / "assets"]:
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    small = "--updates 1 --prompts-per-update 4 --eval-size 8 --value-samples 2"
    monkeypatch.setenv("TOUR_FLAGS", small)
    monkeypatch.setattr("utils.args.begin", lambda: None)
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    names = {}
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        *lines, rest = re.split(r"^!(.*)$", "".join(cell["source"]), flags=re.M)
        for code, line in zip(lines[::2], lines[1::2], strict=True):
            exec(code, names)
            python, *words = shlex.split(line.format(**names))
            assert python == sys.executable
            run = runpy.run_module if words[0] == "-m" else runpy.run_path
            monkeypatch.setattr(sys, "argv", words[words[0] == "-m" :])
            run(sys.argv[0], run_name="__main__")
        exec(rest, names)
    assert len(names["metrics"]) == 2 and (tmp_path / "runs" / "tour" / "tokens.html").exists()
