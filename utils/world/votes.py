"""Majority-vote pseudo-labels: what the initial policy answers most often takes the place of the
reference."""

import json
from collections import Counter
from collections.abc import Callable

from utils.keyed import seed_torch
from utils.run import Run
from utils.world.problems import Problem, Task


def majority_vote(
    play: Callable[[list[Problem]], list], task: Task, problems: list[Problem], args, run: Run
) -> dict[str, str]:
    """Labels by the key of their problem: the most frequent final answer of `--vote-samples`
    episodes, sampled by `play`; "" where none of them has one. Reports the share of votes that the
    labels have (agreement), and of right labels among the problems whose reference is known.
    pseudo_labels.jsonl in the run's folder keeps the votes, batch by batch: what stands there is
    not sampled again."""
    file = run.folder / "pseudo_labels.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    rows = {row["key"]: row for row in (json.loads(line) for line in lines if line.endswith("\n"))}
    problems = list({problem.key: problem for problem in problems}.values())
    todo = [problem for problem in problems if problem.key not in rows]
    file.write_text(
        "".join(json.dumps(row) + "\n" for row in rows.values())
    )  # without a line that was cut off
    batch = max(1, args.rollout_batch_size // args.vote_samples)
    for start in range(0, len(todo), batch):
        run.doing(f"majority vote: {start} of {len(todo)} prompts")
        some = todo[start : start + batch]
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
        }
        with file.open("a") as out:
            out.writelines(json.dumps(row) + "\n" for row in new.values())
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


def winner(votes: Counter) -> str:
    """The most frequent answer, the first one that came where several are; no answer is no vote."""
    given = Counter({answer: n for answer, n in votes.items() if answer})
    return given.most_common(1)[0][0] if given else ""
