"""Peak memory: of log-probabilities and entropy with all logits at once and in the scripts' chunks,
and of whole updates.

    python benchmark/speed/memory.py                               # about 5 minutes on a CPU; with --device cuda the allocator's peak

Each figure comes from a process of its own. Of the head (that of SmolLM2-135M and of Qwen2.5-0.5B,
on random hidden states) it is the peak of a forward and backward pass above what the process held
before (resident memory on a CPU). Of updates it is the peak that vrpo_math.py logs, whole and less
what weights, gradients and Adam's moments take by arithmetic, for random models that differ in the
vocabulary alone and for several micro-batches. Writes benchmark/results/memory.md and
memory_updates.md."""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from utils import tensors  # noqa: E402
from utils.metrics import peak_memory_gb  # noqa: E402

HEADS = {"SmolLM2-135M": (49_152, 576), "Qwen2.5-0.5B": (151_936, 896)}
UPDATES = [
    (1_024, 16),
    (8_192, 16),
    (49_152, 16),
    (151_936, 16),
    (49_152, 4),
    (49_152, 64),
]  # vocabulary, micro-batch


@dataclass
class Args:
    tokens: tuple[int, ...] = (512, 1024, 2048)
    """answer tokens in a micro-batch"""
    device: str = "cpu"
    """cpu or cuda"""
    one: str | None = None
    """used by the command itself: one measurement, as HEAD,TOKENS,LOGITS_AT_ONCE"""


def measure(head_name: str, tokens: int, at_once: int, device: torch.device) -> dict[str, float]:
    vocabulary, width = HEADS[head_name]
    tensors.LOGITS_AT_ONCE, tensors.ON_A_GPU = at_once, 1
    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False).to(device)
    head.weight.grad = torch.zeros_like(head.weight)
    hidden = torch.randn(1, tokens, width, device=device, requires_grad=True)
    part = {"tokens": torch.randint(vocabulary, (1, tokens), device=device)}
    part["cells"] = torch.arange(tokens, device=device)
    held, start = peak_memory_gb(device), time.perf_counter()
    logprobs, entropy = tensors.logprobs_and_entropy(head, hidden, part, temperature=1.0)
    (logprobs.mean() + entropy.mean()).backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {"gb": peak_memory_gb(device) - held, "seconds": time.perf_counter() - start}


def measure_update(vocabulary: int, micro_batch_size: int, device: str) -> tuple[int, float]:
    """Parameters of a random Llama, and peak GB of an update of vrpo_math.py with it."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "tiny_math")
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model = LlamaForCausalLM(config)
        model.save_pretrained(f"{folder}/model")
        tokenizer.save_pretrained(f"{folder}/model")
        flags = {
            "model": f"{folder}/model", "dataset": ROOT / "assets/data/tiny_math", "updates": 1, "max-new-tokens": 48, "eval-size": 16, "prompts-per-update": 16,
            "truncated": "grade", "rollout-batch-size": 256, "micro-batch-size": micro_batch_size, "run-name": "memory", "device": device,
        }  # fmt: skip
        words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        command = [sys.executable, ROOT / "vrpo_math.py", *words]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        peaks = pd.read_csv(f"{folder}/runs/memory/metrics.csv")["charts/peak_memory_gb"]
    return model.num_parameters(), peaks.max()


def measure_updates(args: Args) -> None:
    lines = [
        "| vocabulary | micro-batch | parameters | peak of the run | less weights, gradients, moments |",
        "|---|---|---|---|---|",
    ]
    for vocabulary, micro_batch_size in UPDATES:
        parameters, peak = measure_update(vocabulary, micro_batch_size, args.device)
        # policy and critic: weights, gradients and two moments; the reference; the critic's frozen
        # head
        held = 4 * (9 * parameters + vocabulary * 64) / 1e9
        cells = [
            f"{vocabulary:,}",
            micro_batch_size,
            f"{parameters / 1e6:.1f} M",
            f"{peak:.2f} GB",
            f"{peak - held:.2f} GB",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
        print(lines[-1], flush=True)
    (ROOT / "benchmark" / "results" / "memory_updates.md").write_text("\n".join(lines) + "\n")


def main(args: Args) -> None:
    if args.one:
        name, tokens, at_once = args.one.split(",")
        print(json.dumps(measure(name, int(tokens), int(at_once), torch.device(args.device))))
        return
    measure_updates(args)
    lines = [
        "| head | vocabulary | answer tokens | all at once: peak | seconds | in chunks: peak | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (vocabulary, _) in HEADS.items():
        for tokens in args.tokens:
            cells = []
            chunk = tensors.LOGITS_AT_ONCE * (tensors.ON_A_GPU if args.device == "cuda" else 1)
            for at_once in (2**60, chunk):
                command = [
                    sys.executable,
                    __file__,
                    "--device",
                    args.device,
                    "--one",
                    f"{name},{tokens},{at_once}",
                ]
                found = subprocess.run(command, capture_output=True, text=True)
                if found.returncode:  # out of memory
                    cells += ["does not fit", ""]
                    continue
                figures = json.loads(found.stdout.splitlines()[-1])
                cells += [f"{figures['gb']:.2f} GB", f"{figures['seconds']:.1f}"]
            lines.append(f"| {name} | {vocabulary:,} | {tokens:,} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    (ROOT / "benchmark" / "results" / "memory.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
