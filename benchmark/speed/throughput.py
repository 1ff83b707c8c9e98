"""Seconds of an update: our GRPO against TRL's GRPOTrainer, and PPO, VRPO, DVPO and robust PPO, on
the same work, and where they go.

    pip install trl==1.16.0                                  # optional: without it --systems grpo ppo vrpo
    python benchmark/speed/throughput.py                           # embedded model and SmolLM2-135M, about 40 minutes on two cores
    python benchmark/speed/throughput.py --models embedded --rounds 7
    python benchmark/speed/throughput.py --models words --large-model runs/start --large-dataset DIR --rounds 3 --out throughput_words
    python benchmark/speed/throughput.py --against ../old          # the same scripts of another checkout beside these

Every system runs in a process of its own, which waits while another has its turn: one update each,
in turn, so that a machine whose speed drifts is unfair to nobody (with a large model in the groups
of GROUPS). The same work: same model, prompts, sampling noise, epochs, minibatches, precision and
rewards; the learning rate is 0, so all systems sample from the same policy in every update, and in
float32 they get the same completions to the token, and the same rewards (checked). Neither side
computes a KL term.

`words` is an update of a run on word problems, but without LoRA: a model of benchmark/studies/supervised.py,
the problems of benchmark/studies/equations.py. There the scripts share prefixes, and `grpo-unshared`
is GRPO without that.

`trl` is TRL as it comes: its generation is transformers', without vLLM; with several epochs it
makes a pass for the old log-probabilities; in bfloat16 it casts the weights anew for every decoded
token. `trl-malloc` is the same with the setting of the C library's allocator that the scripts use
(`keep_freed_memory`).

Parts are timed by wrapping the scripts' own functions, FLOPs are counted by torch in the first
update, which is not timed (on a CPU without those of attention). Writes
benchmark/results/throughput.csv (every update) and throughput.md (medians and range)."""

import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmark" / "results"
SCRIPTS = {
    "grpo": "grpo_baseline",
    "grpo-unshared": "grpo_baseline",
    "ppo": "ppo_baseline",
    "vrpo": "vrpo_math",
    "dvpo": "dvpo_math",
    "robust": "robust_ppo_baseline",
}
SYSTEMS = ("trl", "trl-malloc", *SCRIPTS)
PARTS = ("generation", "log-probabilities", "critic", "backward", "optimizer")  # and the rest
WORK = {
    "embedded": {"prompts_per_update": 64, "samples_per_prompt": 4, "max_new_tokens": 48, "epochs": 2, "minibatch_size": 64,
                 "micro_batch_size": 16},
    "135m": {"prompts_per_update": 4, "samples_per_prompt": 4, "max_new_tokens": 64, "epochs": 2, "minibatch_size": 8, "micro_batch_size": 4,
             "max_prompt_tokens": 160, "prompt_template": 'Answer in one sentence and end with "The answer is" and the number. {question}'},
    "words": {"prompts_per_update": 16, "samples_per_prompt": 8, "max_new_tokens": 24, "epochs": 1, "minibatch_size": 128, "micro_batch_size": 16,
              "max_prompt_tokens": 160, "system_prompt": "Answer with one equation.", "rollout_batch_size": 128, "share_prefixes": True},
}  # fmt: skip
COMMON = {"seed": 1, "temperature": 1.0, "learning_rate": 0.0, "kl_coef": 0.0, "noise": "symmetric"}
# systems that are measured together: four processes of a large model would need more than 24 GB
# (of `words` TRL's peaks at 13 GB, GRPO's at 5)
GROUPS = {
    "embedded": [[system for system in SYSTEMS if system != "grpo-unshared"]],
    "135m": [["trl", "trl-malloc", "grpo"], ["ppo", "vrpo"]],
    "words": [["trl", "grpo"], ["trl-malloc", "grpo-unshared"], ["ppo", "vrpo"]],
}
VERSIONS = ("torch", "transformers", "trl", "accelerate")


@dataclass
class Args:
    models: tuple[Literal["embedded", "135m", "words"], ...] = ("embedded", "135m")
    """which of the workloads"""
    systems: tuple[Literal[SYSTEMS], ...] = SYSTEMS
    """what to measure, where it is in the workload's GROUPS"""
    rounds: int = 5
    """timed updates of each system, in turn"""
    large_model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """the model of the workloads 135m and words: a Hugging Face folder or hub id"""
    large_dataset: str = "openai/gsm8k"
    """its problems"""
    dtype: tuple[Literal["float32", "bfloat16"], Literal["float32", "bfloat16"]] = (
        "float32",
        "bfloat16",
    )
    """precision of the forward passes, with the embedded model and with a large one"""
    device: str = "cpu"
    """cpu or cuda"""
    against: tuple[Path, ...] = ()
    """further checkouts whose scripts are measured beside these"""
    out: str = "throughput"
    """name of the results: benchmark/results/<out>.csv and .md"""
    one: str | None = None
    """used by the command itself: one system, as a JSON object"""


# ==== a worker: one system, one update for every line on its standard input ===========================================


class Clock:
    """Seconds and FLOPs by part. Time inside a part that begins within another is the inner one's
    alone."""

    def __init__(self, device: str):
        self.device, self.stack, self.flops_now = device, [], lambda: 0
        self.seconds: Counter = Counter()
        self.flops: Counter = Counter()

    def switch(self) -> None:
        """Charge what has passed since the last call to the part on top of the stack."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        now, flops = time.perf_counter(), self.flops_now()
        if self.stack:
            self.seconds[self.stack[-1]] += now - self.since
            self.flops[self.stack[-1]] += flops - self.flops_since
        self.since, self.flops_since = now, flops

    def wrap(self, owner, name: str, part) -> None:
        """Charge calls of owner.name to `part`, a name or a function of the call's arguments."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args, **kwargs):
            self.switch()
            self.stack.append(part(*args) if callable(part) else part)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self.stack.pop()

        setattr(owner, name, timed)


class Turns:
    """The worker's side of the conversation: `end()` reports an update and waits for the parent's
    next word."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # progress bars and tables go nowhere
        self.report: dict = {}
        self.counter: FlopCounterMode | None = None
        self.began = 0.0

    def end(self) -> None:
        self.clock.switch()
        seconds = time.perf_counter() - self.began
        if self.counter:
            self.counter.__exit__(None, None, None)
        parts = {part: self.clock.seconds[part] for part in PARTS}
        flops = {part: self.clock.flops[part] for part in PARTS}
        json.dump({"seconds": seconds, "parts": parts, "flops": flops, **self.report}, self.out)
        self.out.write("\n")
        self.out.flush()
        word = sys.stdin.readline().strip()
        if not word:  # the parent is done, or gone
            os._exit(0)
        self.counter, self.clock.flops_now = None, lambda: 0
        if word == "count":
            self.counter = FlopCounterMode(display=False)
            self.counter.__enter__()
            self.clock.flops_now = self.counter.get_total_flops
        self.clock.seconds.clear()
        self.clock.flops.clear()
        self.began = self.clock.since = time.perf_counter()


def flags_of(spec: dict) -> dict:
    flags = COMMON | WORK[spec["work"]]
    flags |= {name: spec[name] for name in ("model", "dataset", "dtype", "device")}
    return flags | ({"share_prefixes": False} if spec["system"] == "grpo-unshared" else {})


def watch(module, clock: Clock, turns) -> None:
    """Time a script's parts, and have what it samples and is rewarded for in the turns' report."""
    critics = []

    def owner(model, *_) -> str:
        of_critics = [x for c in critics for x in (c.backbone, getattr(c, "lm_head", None))]
        return "critic" if any(model is x for x in of_critics) else "log-probabilities"

    clock.wrap(module, "rollout", "generation")
    clock.wrap(module, "hidden_states", owner)
    clock.wrap(module, "logprobs_and_entropy", owner)
    if hasattr(module, "Critic"):
        begin = module.Critic.__init__

        def init(self, *args):
            begin(self, *args)
            critics.append(self)

        module.Critic.__init__ = init
        clock.wrap(module, "score_tokens", "critic")
        clock.wrap(module, "critic_loss", "critic")
    clock.wrap(torch.Tensor, "backward", "backward")
    clock.wrap(torch.nn.utils, "clip_grad_norm_", "optimizer")
    clock.wrap(torch.optim.AdamW, "step", "optimizer")
    observe = module.observe

    def noticed(args, scores, episodes, update):
        observed = observe(args, scores, episodes, update)
        answers = [
            [token for token, mine in zip(e.tokens, e.chosen, strict=True) if mine]
            for e in episodes
        ]
        done = [(*ids, r) for ids, r in zip(answers, observed.tolist(), strict=True)]
        turns.report = {
            "answers": [len(ids) for ids in answers],
            "prompts": [len(e.problem.prompt_ids) for e in episodes],
            "digest": hash(tuple(done)),
        }
        return observed

    module.observe = noticed


def run_script(spec: dict) -> None:
    """A script's own main(), which stops at the end of every update until it is told to go on."""
    sys.path.insert(0, spec["root"])
    sys.argv = [f"{SCRIPTS[spec['system']]}.py"]
    module = importlib.import_module(SCRIPTS[spec["system"]])
    clock = Clock(spec["device"])
    turns = Turns(clock)
    watch(module, clock, turns)
    module.Run.log = lambda self, update, metrics: turns.end()
    flags = {"updates": 1000, "eval_every": 1000, "save_every": 1000, "eval_size": 1}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        module.main(module.Args(**flags_of(spec), **flags))


def observed_rewards(script, args, env, completions: list[list[int]], update: int) -> list[float]:
    """What a script's optimiser sees of completions (token ids) to the problems of an update."""
    from utils.generation import Answer

    episodes = [script.Episode(problem) for problem in env.problems(update)]
    for episode, ids in zip(episodes, completions, strict=True):
        episode.say(Answer(ids, *[[0.0] * len(ids)] * 3), env.chat)
    scores = env.score(episodes, env.grade(episodes))
    return script.observe(args, scores, episodes, update).tolist()


def run_trl(spec: dict) -> None:
    """TRL's GRPOTrainer on the prompts that the scripts draw, with their rewards, stopped every
    update's worth of optimizer steps."""
    from datasets import Dataset
    from transformers import TrainerCallback, masking_utils
    from trl import GRPOConfig, GRPOTrainer

    clock = Clock(spec["device"])
    turns = Turns(clock)
    sys.path.insert(0, str(ROOT))
    own = dict(vars(masking_utils))
    import grpo_baseline as script
    from utils.keyed import seed_torch
    from utils.scale.allocator import keep_freed_memory

    if spec["system"] == "trl-malloc":
        keep_freed_memory()
    args = script.Args(**flags_of(spec))
    device = torch.device(args.device)
    policy, chat = script.start_policy(args, device)
    vars(masking_utils).update(own)  # without what the scripts change in transformers
    env = script.Environment(args, chat, device)
    texts = [
        chat.tokenizer.decode(problem.prompt_ids, clean_up_tokenization_spaces=False)
        for update in range(1, spec["rounds"] + 3)
        for problem in env.problems(update)[:: args.samples_per_prompt]
    ]
    episodes = args.prompts_per_update * args.samples_per_prompt
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=args.minibatch_size // args.micro_batch_size, generation_batch_size=episodes,
        num_generations=args.samples_per_prompt, num_iterations=args.epochs, max_completion_length=args.max_new_tokens,
        temperature=args.temperature, top_k=0, beta=0.0, epsilon=args.clip_range, loss_type="dapo", scale_rewards="group",
        learning_rate=0.0, lr_scheduler_type="constant", max_grad_norm=args.max_grad_norm, optim="adamw_torch_fused",
        bf16=args.dtype == "bfloat16", gradient_checkpointing=False, shuffle_dataset=False, use_cpu=args.device == "cpu",
        dataloader_pin_memory=False, report_to="none", save_strategy="no", logging_strategy="steps", logging_steps=8,
        disable_tqdm=True, max_steps=10**6, seed=args.seed,
    )  # fmt: skip
    update = 0

    class Stop(TrainerCallback):
        def on_train_begin(self, *_, **__):
            turns.end()

        def on_step_end(self, arguments, state, *_, **__):
            if state.global_step % (episodes // args.minibatch_size * args.epochs) == 0:
                turns.end()

    watch(script, clock, turns)
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=lambda completion_ids, **_: observed_rewards(
            script, args, env, completion_ids, update
        ),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=chat.tokenizer,
        callbacks=[Stop()],
    )
    tokenize = trainer._tokenize_prompts

    def checked(prompts):
        nonlocal update
        update += 1
        found = tokenize(prompts)
        expected = [problem.prompt_ids for problem in env.problems(update)]
        assert found[0] == expected, "TRL reads other prompts than the scripts"
        seed_torch(args.seed, "rollout", update)
        return found

    trainer._tokenize_prompts = checked
    clock.wrap(trainer, "_generate_single_turn", "generation")
    clock.wrap(trainer, "_get_per_token_logps_and_entropies", "log-probabilities")
    trainer.train()


# ==== the parent ======================================================================================================


def machine(device: str) -> dict[str, float]:
    """Measured rates: FLOP/s of a large matrix product in both precisions, bytes/s of a copy (read
    and write)."""

    def best(action, repeat: int) -> float:
        times = []
        for _ in range(repeat):
            began = time.perf_counter()
            action()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return min(times)

    size = 8192 if device == "cuda" else 1536
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, size, size, device=device, dtype=dtype)
        rates[str(dtype).split(".")[1]] = 2 * size**3 / best(lambda a=a, b=b: a @ b, 10)
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    rates["bytes"] = 2 * source.numel() * 4 / best(lambda: target.copy_(source), 10)
    return rates


def decoding_floor(
    config,
    answers: list[int],
    prompts: list[int],
    samples: int,
    rates: dict[str, float],
    dtype: str,
) -> float:
    """Seconds that decoding takes at least: every prompt read once, then per step the larger of the
    matrix products of the rows that are not finished, at the measured rate, and of their KV cache
    and all weights, read once at the measured bandwidth."""
    rate, bandwidth, bytes_each = rates[dtype], rates["bytes"], 4 if dtype == "float32" else 2
    head = config.vocab_size * config.hidden_size
    size = (
        config.head_dim
        if getattr(config, "head_dim", None)
        else config.hidden_size // config.num_attention_heads
    )
    kv_width = config.num_key_value_heads * size
    layer = (
        2 * config.hidden_size * (config.num_attention_heads * size + kv_width)
        + 3 * config.hidden_size * config.intermediate_size
    )
    body = config.num_hidden_layers * layer
    seconds = (
        2 * body * sum(prompts[::samples]) + 2 * head * len(answers)
    ) / rate  # the first tokens come with the prompts
    for step in range(1, max(answers)):
        live = [p + step for p, a in zip(prompts, answers, strict=True) if a > step]
        flops = 2 * (body + head) * len(live)
        read = bytes_each * (body + head + config.num_hidden_layers * 2 * kv_width * sum(live))
        seconds += max(flops / rate, read / bandwidth)
    return seconds


def measure(args: Args, work: str, rates: dict[str, float]) -> tuple[list[dict], list[str]]:
    """All rounds of one workload: rows of the CSV, lines of the report."""
    from transformers import AutoConfig

    dtype = args.dtype[0 if work == "embedded" else 1]
    systems = {name: (name, ROOT) for name in args.systems}
    for root in (path.resolve() for path in args.against):
        systems |= {
            f"{name} ({root.name})": (name, root) for name in args.systems if name in SCRIPTS
        }
    files = (args.large_model, args.large_dataset)
    if work == "embedded":
        files = (ROOT / "assets/tiny_math", ROOT / "assets/data/tiny_math")
    model, dataset = (str(Path(x).resolve() if Path(x).exists() else x) for x in files)
    config = AutoConfig.from_pretrained(model)
    rows, flops, digests = [], {}, {}
    for group in GROUPS[work]:
        workers = {}
        for name, (system, root) in systems.items():
            if system not in group:
                continue
            spec = {
                "system": system, "root": str(root), "work": work, "model": model, "dataset": dataset, "dtype": dtype,
                "device": args.device, "rounds": args.rounds,
            }  # fmt: skip
            errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
            process = subprocess.Popen(
                [sys.executable, __file__, "--one", json.dumps(spec)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=errors, text=True, env=os.environ | {"PYTHONHASHSEED": "0", "PYTHONWARNINGS": "ignore"},
            )  # fmt: skip
            workers[name] = (process, errors)
            answer(*workers[name], name)  # ready; one starts at a time

        for round_ in range(args.rounds + 1):
            for name, (process, errors) in workers.items():
                process.stdin.write("count\n" if round_ == 0 else "go\n")
                process.stdin.flush()
                found = answer(process, errors, name)
                digests.setdefault(round_, {})[name] = found["digest"]
                if round_ == 0:
                    flops[name] = found["flops"]
                    continue
                row = {
                    "model": work,
                    "dtype": dtype,
                    "system": name,
                    "round": round_,
                    "seconds": found["seconds"],
                }
                row |= {
                    "completions": len(found["answers"]),
                    "answer_tokens": sum(found["answers"]),
                    "prompt_tokens": sum(found["prompts"]),
                }
                row |= found["parts"] | {
                    "everything else": found["seconds"] - sum(found["parts"].values())
                }
                lengths = found["answers"], found["prompts"]
                row["floor of generation"] = decoding_floor(
                    config, *lengths, WORK[work]["samples_per_prompt"], rates, dtype
                )
                rows.append(row)
                print(
                    f"{work:9} round {round_} {name:16} {found['seconds']:7.2f} s  {row['completions'] / row['seconds']:7.1f} completions/s",
                    flush=True,
                )
        for process, _ in workers.values():
            process.stdin.close()
            process.wait()

    same = all(len(set(found.values())) == 1 for found in digests.values())
    return rows, report(work, dtype, rows, flops, rates, same)


def answer(process, errors, name: str) -> dict:
    line = process.stdout.readline()
    if not line:
        errors.seek(0)
        sys.exit(f"{name} ended:\n{errors.read()[-3000:]}")
    return json.loads(line)


def report(
    work: str, dtype: str, rows: list[dict], flops: dict, rates: dict, same: bool
) -> list[str]:
    """Markdown: throughput of the systems, then the parts of an update beside their floors."""
    by_system: dict[str, list[dict]] = {}
    for row in rows:
        by_system.setdefault(row["system"], []).append(row)
    middle, epochs = statistics.median, WORK[work]["epochs"]
    tokens = [
        sum(r[key] for r in rows) / sum(r["completions"] for r in rows)
        for key in ("prompt_tokens", "answer_tokens")
    ]
    lines = [
        f"**{work}**, {dtype}: {rows[0]['completions']} completions an update (prompt {tokens[0]:.0f}, answer {tokens[1]:.0f} tokens on average), "
        f"{epochs} epoch{'s' * (epochs > 1)}; completions and rewards {'identical' if same else 'not identical token by token'} in all systems; "
        f"{len(by_system[rows[0]['system']])} rounds",
        "",
        "| system | completions/s, median (range) | seconds of an update | completions/s against TRL | seconds against GRPO | against PPO |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in by_system.items():
        rate = [r["completions"] / r["seconds"] for r in own]

        def against(other: str, invert: bool, own=own) -> str:
            if other not in by_system:
                return ""
            ratios = [
                a["seconds"] / b["seconds"] for a, b in zip(own, by_system[other], strict=True)
            ]
            ratios = [1 / x for x in ratios] if invert else ratios
            return f"{middle(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

        cells = [
            name,
            f"{middle(rate):.3g} ({min(rate):.3g} to {max(rate):.3g})",
            f"{middle(r['seconds'] for r in own):.2f}",
        ]
        lines.append(
            "| "
            + " | ".join(
                [*cells, against("trl", True), against("grpo", False), against("ppo", False)]
            )
            + " |"
        )
    head = [*PARTS, "everything else"]
    lines += ["", f"| seconds (floor) | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name, own in by_system.items():
        cells = []
        for part in head:
            seconds = middle(r[part] for r in own)
            least = flops[name].get(part, 0) / rates[dtype]
            if part == "generation":
                least = middle(r["floor of generation"] for r in own)
            cells.append(
                f"{seconds:.2f}" + (f" ({least:.2f})" if least >= 0.005 else "")
                if seconds >= 0.005
                else "–"
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def main(args: Args) -> None:
    if args.one:
        spec = json.loads(args.one)
        (run_script if spec["system"] in SCRIPTS else run_trl)(spec)
        return
    import pandas as pd

    if args.rounds < 1:
        sys.exit(f"--rounds {args.rounds}: must be at least 1")
    if any(name.startswith("trl") for name in args.systems) and not importlib.util.find_spec("trl"):
        sys.exit(
            "TRL is not installed: pip install trl==1.16.0, or leave it out with --systems grpo ppo vrpo"
        )
    rates = machine(args.device)
    print({key: f"{value / 1e9:.0f} G/s" for key, value in rates.items()}, flush=True)
    lines = [
        f"`python benchmark/speed/throughput.py` on {torch.get_num_threads()} threads ({args.device}): matrix products at {rates['float32'] / 1e9:.0f} GFLOP/s in "
        f"float32 and {rates['bfloat16'] / 1e9:.0f} in bfloat16, memory at {rates['bytes'] / 1e9:.0f} GB/s. Floors in brackets, estimates: FLOPs of a part (without attention's on a CPU) at that rate; "
        "for generation every distinct prompt once, then per token the weights and the KV cache of unfinished rows at the memory's rate or their FLOPs, whichever takes longer.",
        f"Versions: {', '.join(f'{x} {version(x)}' for x in VERSIONS if importlib.util.find_spec(x))}.",
        "",
    ]
    frames = []
    for work in args.models:
        rows, text = measure(args, work, rates)
        frames += rows
        lines += text
        RESULTS.mkdir(exist_ok=True)
        pd.DataFrame(frames).round(4).to_csv(RESULTS / f"{args.out}.csv", index=False)
        (RESULTS / f"{args.out}.md").write_text("\n".join(lines))
        print("\n".join(text))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
