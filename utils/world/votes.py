"""Majority-vote pseudo-labels: what the initial policy answers most often takes the place of the
reference."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from utils.errors import stop
from utils.files import read_rows, write_atomically, writing
from utils.keyed import seed_torch
from utils.scale import processes
from utils.world.problems import Problem, Task


def majority_vote(
    play: Callable[[list[Problem]], list], task: Task, problems: list[Problem], args, run
) -> dict[str, str]:
    """Labels by the key of their problem: the most frequent final answer of `--vote-samples`
    episodes, sampled by `play`; "" where none of them has one. Reports the share of votes that the
    labels have (agreement), and of right labels among the problems whose reference is known.
    pseudo_labels.jsonl in the run's folder keeps the votes, batch by batch: a batch that stands
    there is not sampled again, and one that was cut off gives the same votes once more."""
    file = run.folder / "pseudo_labels.jsonl"
    rows = processes.from_first(lambda: read_votes(file, args.vote_samples))
    problems = list({problem.key: problem for problem in problems}.values())
    write = processes.by_first(write_atomically)
    write(file, "".join(json.dumps(row) + "\n" for row in rows.values()))
    batch = max(1, args.rollout_batch_size // args.vote_samples)
    for start in range(0, len(problems), batch):
        some = problems[start : start + batch]
        if all(problem.key in rows for problem in some):
            continue
        run.doing(f"majority vote: {start} of {len(problems)} prompts")
        seed_torch(args.seed, "votes", some[0].key)
        votes: dict[str, Counter] = {problem.key: Counter() for problem in some}
        for episode in play([problem for problem in some for _ in range(args.vote_samples)]):
            answer = (
                episode.completions[-1] if episode.finished or args.truncated != "wrong" else ""
            )
            votes[episode.problem.key][task.final_answer(episode.problem, answer)] += 1
        new = {
            key: {"key": key, "label": winner(count), "votes": dict(count)}
            for key, count in votes.items()
            if key not in rows
        }
        append(file, new)
        rows |= new
    labels = {problem.key: rows[problem.key]["label"] for problem in problems}
    agreement = [
        rows[key]["votes"].get(label, 0) / sum(rows[key]["votes"].values())
        for key, label in labels.items()
        if label
    ]
    known = [problem for problem in problems if problem.answer is not None]
    right = [task.grade(problem, [f"#### {labels[problem.key]}"]) for problem in known]
    accuracy = (
        f"label accuracy {sum(right) / len(right):.3f}"
        if known
        else "no references to compare with"
    )
    run.print(
        f"majority vote: {args.vote_samples} samples for each of {len(problems)} prompts; agreement "
        f"{sum(agreement) / max(1, len(agreement)):.3f}, {accuracy}, {sum(not label for label in labels.values())} without an answer"
    )
    return labels


@processes.by_first
def append(file: Path, rows: dict[str, dict]) -> None:
    with writing(file), file.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows.values())


def read_votes(file: Path, samples: int) -> dict[str, dict]:
    """The rows of pseudo_labels.jsonl by the key of their problem."""
    try:
        rows = {row["key"]: row for row in read_rows(file)} if file.exists() else {}
        counts = {sum(row["votes"].values()) for row in rows.values()}
        if not all(isinstance(row["label"], str) for row in rows.values()):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        stop(f"{file}: damaged; move it away, and the votes are taken again")
    if counts - {samples}:
        stop(f"--vote-samples {samples}: the votes in {file} are of {max(counts)} samples each")
    return rows


def winner(votes: Counter) -> str:
    """The most frequent answer, the first one that came where several are; no answer is no vote."""
    given = Counter({answer: n for answer, n in votes.items() if answer})
    return given.most_common(1)[0][0] if given else ""
