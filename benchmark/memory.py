"""Peak memory of log-probabilities and entropy, forward and backward, with all logits at once and in the scripts' chunks.

    python benchmark/memory.py                               # about 3 minutes on a CPU; with --device cuda the allocator's peak

Each figure comes from a process of its own: the peak above what it held before (resident memory on a CPU). The head is that of
SmolLM2-135M (49 k) and of Qwen2.5-0.5B (152 k), the hidden states are random. Writes benchmark/results/memory.md.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ppo_baseline as ppo  # noqa: E402

HEADS = {"SmolLM2-135M": (49_152, 576), "Qwen2.5-0.5B": (151_936, 896)}


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
    ppo.LOGITS_AT_ONCE = at_once
    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False).to(device)
    head.weight.grad = torch.zeros_like(head.weight)
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), device=device)
    held, start = ppo.peak_memory_gb(device), time.perf_counter()
    logprobs, entropy = ppo.logprobs_and_entropy(head, hidden, targets, 1.0)
    (logprobs.mean() + entropy.mean()).backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {"gb": ppo.peak_memory_gb(device) - held, "seconds": time.perf_counter() - start}


def main(args: Args) -> None:
    if args.one:
        name, tokens, at_once = args.one.split(",")
        print(json.dumps(measure(name, int(tokens), int(at_once), torch.device(args.device))))
        return
    lines = [
        "| head | vocabulary | answer tokens | all at once: peak | seconds | in chunks: peak | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (vocabulary, _) in HEADS.items():
        for tokens in args.tokens:
            cells = []
            for at_once in (2**60, ppo.LOGITS_AT_ONCE):
                command = [sys.executable, __file__, "--device", args.device, "--one", f"{name},{tokens},{at_once}"]
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
