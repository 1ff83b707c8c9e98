"""Seconds of an update: our GRPO against TRL's GRPOTrainer, and PPO, VRPO, DVPO and robust PPO, on
the same work, and where they go.

    pip install trl==1.16.0                                  # optional: without it --systems grpo ppo vrpo
    python benchmark/speed/throughput.py                           # embedded model and SmolLM2-135M, about 40 minutes on two cores
    python benchmark/speed/throughput.py --models embedded --rounds 7
    python benchmark/speed/throughput.py --against ../old          # the same scripts of another checkout beside these

Every system runs in a process of its own, which waits while another has its turn: one update each,
in turn, so that a machine whose speed drifts is unfair to nobody (with the large model in two
groups, TRL and GRPO, PPO and VRPO). The same work: same model, prompts, sampling noise, epochs,
minibatches, precision and rewards; the learning rate is 0, so all systems sample from the same
policy in every update, and in float32 they get the same completions to the token (checked). Neither
side computes a KL term.

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
    "ppo": "ppo_baseline",
    "vrpo": "vrpo_math",
    "dvpo": "dvpo_math",
    "robust": "robust_ppo_baseline",
}
PARTS = (
    "generation",
    "log-probabilities",
    "critic",
    "backward",
    "optimizer",
)  # and everything else
WORK = {
    "embedded": {"prompts_per_update": 64, "samples_per_prompt": 4, "max_new_tokens": 48, "minibatch_size": 64, "micro_batch_size": 16},
    "135m": {"prompts_per_update": 4, "samples_per_prompt": 4, "max_new_tokens": 64, "minibatch_size": 8, "micro_batch_size": 4,
             "max_prompt_tokens": 160, "prompt_template": 'Answer in one sentence and end with "The answer is" and the number. {question}'},
}  # fmt: skip
PAIRS = (
    ("trl", "trl-malloc", "grpo"),
    ("ppo", "vrpo"),
)  # four processes of the large model at once would need more than 24 GB
VERSIONS = ("torch", "transformers", "trl", "accelerate")
COMMON = {
    "seed": 1,
    "epochs": 2,
    "temperature": 1.0,
    "learning_rate": 0.0,
    "kl_coef": 0.0,
    "noise": "symmetric",
}


@dataclass
class Args:
    models: tuple[Literal["embedded", "135m"], ...] = ("embedded", "135m")
    """which of the two workloads"""
    systems: tuple[Literal["trl", "trl-malloc", "grpo", "ppo", "vrpo", "dvpo", "robust"], ...] = (
        "trl",
        "trl-malloc",
        "grpo",
        "ppo",
        "vrpo",
        "dvpo",
        "robust",
    )
    """what to measure (dvpo and robust with the embedded model alone)"""
    rounds: int = 5
    """timed updates of each system, in turn"""
    large_model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """the model of the workload 135m: a Hugging Face folder or hub id"""
    large_dataset: str = "openai/gsm8k"
    """its problems"""
    dtype: tuple[Literal["float32", "bfloat16"], Literal["float32", "bfloat16"]] = (
        "float32",
        "bfloat16",
    )
    """precision of the forward passes, of the embedded model and of the large one"""
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
    flags = {**COMMON, **WORK[spec["work"]], "dtype": spec["dtype"], "device": spec["device"]}
    if spec["work"] == "135m":
        return flags | {"model": spec["model"], "dataset": spec["dataset"]}
    return flags | {
        "model": str(ROOT / "assets/tiny_math"),
        "dataset": str(ROOT / "assets/data/tiny_math"),
    }


def run_script(spec: dict) -> None:
    """A script's own main(), which stops at the end of every update until it is told to go on."""
    sys.path.insert(0, spec["root"])
    sys.argv = [f"{SCRIPTS[spec['system']]}.py"]
    module = importlib.import_module(SCRIPTS[spec["system"]])
    clock = Clock(spec["device"])
    turns = Turns(clock)
    heads = []  # LM heads of critics
    clock.wrap(module, "rollout", "generation")
    clock.wrap(module, "hidden_states", "log-probabilities")
    clock.wrap(
        module,
        "logprobs_and_entropy",
        lambda head, *_: "critic" if any(head is x for x in heads) else "log-probabilities",
    )
    if hasattr(module, "Critic"):
        begin = module.Critic.__init__

        def init(self, *args):
            begin(self, *args)
            heads.append(getattr(self, "lm_head", None))

        module.Critic.__init__ = init
        clock.wrap(
            module.Critic,
            "quantiles" if hasattr(module.Critic, "quantiles") else "values",
            "critic",
        )
        if hasattr(module, "critic_loss"):
            clock.wrap(module, "critic_loss", "critic")
        features = module.Critic.features

        def critic_features(self, *args):  # its hidden_states() is the critic's, not the policy's
            inner, module.hidden_states = module.hidden_states, module.hidden_states.__wrapped__
            try:
                return features(self, *args)
            finally:
                module.hidden_states = inner

        module.Critic.features = critic_features
        clock.wrap(module.Critic, "features", "critic")
    clock.wrap(torch.Tensor, "backward", "backward")
    clock.wrap(torch.nn.utils, "clip_grad_norm_", "optimizer")
    clock.wrap(torch.optim.AdamW, "step", "optimizer")
    pack = module.pack

    def noticed(episodes, *rest):
        answers = [[t for t, c in zip(e.tokens, e.chosen, strict=True) if c] for e in episodes]
        prompts = [len(e.tokens) - len(a) for e, a in zip(episodes, answers, strict=True)]
        turns.report = {
            "answers": [len(a) for a in answers],
            "prompts": prompts,
            "digest": digest(answers),
        }
        return pack(episodes, *rest)

    module.pack = noticed
    module.Run.log = lambda self, update, metrics: turns.end()
    flags = {
        **flags_of(spec),
        "updates": 1000,
        "eval_every": 1000,
        "save_every": 1000,
        "eval_size": 1,
    }
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        module.main(module.Args(**flags))


def run_trl(spec: dict) -> None:
    """TRL's GRPOTrainer on the prompts that the scripts draw, with their rewards, stopped every
    update's worth of optimizer steps."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    clock = Clock(spec["device"])
    turns = Turns(clock)
    sys.path.insert(0, str(ROOT))
    import grpo_baseline as script
    from utils.keyed import seed_torch
    from utils.models import keep_freed_memory

    if spec["system"] == "trl-malloc":
        keep_freed_memory()
    args = script.Args(**flags_of(spec))
    policy, chat = script.load_policy(args.model, torch.device(args.device))
    task = script.load_task(args, chat)
    problems = [
        p
        for update in range(spec["rounds"] + 2)
        for p in task.batch(args.seed, update + 1, args.prompts_per_update)
    ]
    texts = [
        chat.tokenizer.decode(p.prompt_ids, clean_up_tokenization_spaces=False) for p in problems
    ]
    data = Dataset.from_dict({"prompt": texts, "index": list(range(len(problems)))})
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

    def reward(prompts, completions, completion_ids, index, **_):
        clean = [
            task.grade(problems[i], [chat.decode(ids)] if ids[-1] in chat.eos_ids else [""])
            for i, ids in zip(index, completion_ids, strict=True)
        ]
        lengths = [len(ids) for ids in completion_ids]
        turns.report = {
            "answers": lengths,
            "prompts": [len(problems[i].prompt_ids) for i in index],
            "digest": digest(completion_ids),
        }
        return script.observe(args, clean, [problems[i].key for i in index], lengths, update)

    class Stop(TrainerCallback):
        def on_train_begin(self, *_, **__):
            turns.end()

        def on_step_end(self, arguments, state, *_, **__):
            if state.global_step % (episodes // args.minibatch_size * args.epochs) == 0:
                turns.end()

    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=reward,
        args=config,
        train_dataset=data,
        processing_class=chat.tokenizer,
        callbacks=[Stop()],
    )
    generate, tokenize = policy.generate, trainer._tokenize_prompts

    def seeded(*a, **k):
        nonlocal update
        update += 1
        seed_torch(args.seed, "rollout", update)
        return generate(*a, **k)

    def checked(prompts):
        found = tokenize(prompts)
        expected = [problems[texts.index(p)].prompt_ids for p in prompts]
        assert found[0] == expected, "TRL reads other prompts than the scripts"
        return found

    policy.generate, trainer._tokenize_prompts = seeded, checked
    clock.wrap(trainer, "_generate_single_turn", "generation")
    clock.wrap(trainer, "_get_per_token_logps_and_entropies", "log-probabilities")
    clock.wrap(torch.Tensor, "backward", "backward")
    clock.wrap(trainer.accelerator, "clip_grad_norm_", "optimizer")
    clock.wrap(torch.optim.AdamW, "step", "optimizer")
    trainer.train()


def digest(rows: list[list[int]]) -> int:
    return sum(hash(tuple(row)) for row in rows) % 2**32


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

    dtype = args.dtype[list(WORK).index(work)]
    systems = {name: str(ROOT) for name in args.systems}
    for root in args.against:
        systems |= {
            f"{name} ({root.resolve().name})": str(root.resolve())
            for name in args.systems
            if name in SCRIPTS
        }
    config = AutoConfig.from_pretrained(
        str(ROOT / "assets/tiny_math") if work == "embedded" else args.large_model
    )
    rows, flops, digests = [], {}, {}
    together = (
        [list(systems)]
        if work == "embedded"
        else [[s for s in systems if s.split()[0] in pair] for pair in PAIRS]
    )
    for names in (group for group in together if group):
        workers = {}
        for name in names:
            spec = {
                "system": name.split()[0],
                "root": systems[name],
                "work": work,
                "dtype": dtype,
                "device": args.device,
                "rounds": args.rounds,
            }
            spec |= {"model": args.large_model, "dataset": args.large_dataset}
            for key in ("model", "dataset"):
                spec[key] = (
                    str(Path(spec[key]).resolve()) if Path(spec[key]).exists() else spec[key]
                )
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
    middle = statistics.median
    tokens = [
        sum(r[key] for r in rows) / sum(r["completions"] for r in rows)
        for key in ("prompt_tokens", "answer_tokens")
    ]
    lines = [
        f"**{work}**, {dtype}: {rows[0]['completions']} completions an update (prompt {tokens[0]:.0f}, answer {tokens[1]:.0f} tokens on average), "
        f"{COMMON['epochs']} epochs; completions {'identical' if same else 'not identical token by token'} in all systems; "
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
