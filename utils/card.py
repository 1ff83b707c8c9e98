"""The model card of a saved policy: from what, by which command, under which noise, with what
result."""

import dataclasses
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from utils.args import defaults, words
from utils.errors import visible

SCORES = {
    "eval/accuracy": "clean held-out accuracy",
    "eval/average": "held-out mean of TCR, ACR and GCR",
}
RATES = {  # the flags that a noise listens to
    "symmetric": ("noise_rate",), "persistent": ("noise_rate",), "group": ("noise_rate",),
    "length": ("noise_rate",), "asymmetric": ("false_negative_rate", "false_positive_rate"),
    "gaussian": ("noise_rate",), "majority-vote": ("vote_samples",),
}  # fmt: skip
TEXT = """---
{data}
---

# {name}

`{model}` after {update} updates of `{script}`. All flags that differ from the script's defaults:

```
{command}
```

| | |
|---|---|
| base model | {model} |
| task and data | {task} |
| reward | {reward} |
| noise | {noise} |
| made with | {versions} |

{scores}
"""


def model_card(args: Any, name: str, update: int, rows: list[dict[str, Any]], problems: int) -> str:
    """README.md of the policy of run `name`, whose metrics are `rows` and which has `problems` held
    out, with the front matter of the Hugging Face hub. A model in a local folder has no id there,
    so that it is named in the text alone."""
    from huggingface_hub import ModelCardData  # takes a while: imported where it is used

    script = Path(sys.argv[0]).name
    data = ModelCardData(
        base_model=None if os.path.isdir(args.model) else args.model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["reinforcement-learning", Path(script).stem],
    )
    noise = [
        f"--{rate.replace('_', '-')} {getattr(args, rate)}" for rate in RATES.get(args.noise, ())
    ]
    packages = ["torch", "transformers", *["peft"] * bool(args.lora_rank)]
    versions = [f"Python {platform.python_version()}", *(f"{x} {version(x)}" for x in packages)]
    text = TEXT.format(
        data=data.to_yaml(),
        name=name,
        model=args.model,
        update=update,
        script=script,
        command=command(args, script),
        task=f"{args.task}, {args.dataset}",
        reward=args.reward_fn or args.reward_model or "the task's own rule",
        noise=", ".join([args.noise, *noise]),
        versions=", ".join(versions),
        scores=scores(rows, problems),
    )
    return visible(text)


def command(args: Any, script: str) -> str:
    """The command line of a new run with these flags, those that are the defaults left out."""
    usual = vars(type(args)(**defaults(type(args), args.task))) | {"task": type(args).task}
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(args)}
    differing = {
        k: x for k, x in given.items() if x != usual[k] and k not in ("run_name", "resume")
    }
    return shlex.join(["python", script, *words(differing)])


def scores(rows: list[dict[str, Any]], problems: int) -> str:
    """A table of the first and the last evaluation."""
    key = next((key for key in SCORES if any(key in row for row in rows)), None)
    if key is None:
        return "It has not been evaluated."
    found = [row for row in rows if key in row]
    lines = [f"| greedy, n = {problems} | update | {SCORES[key]} |", "|---|---|---|"]
    for when, row in (("before", found[0]), ("after", found[-1])):
        lines.append(f"| {when} | {row['update']} | {float(row[key]):.3f} |")
    return "\n".join(lines)
