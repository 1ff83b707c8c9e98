"""Decoding by vLLM (--rollout-engine vllm), which has a copy of the policy and kernels of its own.

So what it samples from is the policy up to rounding. The policy reads every answer once more: its
log-probabilities are pi_old and its entropy is what vLLM does not tell. How far the two are apart is
`Answer.gap`, which is logged and which truncated importance weights correct for.
"""

import importlib.util
import os
from types import SimpleNamespace

import torch

from utils import tensors
from utils.errors import stop
from utils.generation import Answer
from utils.scale import processes

INSTALL = "pip install vllm==0.30.0, or without a GPU as docs/scaling.md says"
KV_CACHE = 2**31  # bytes
# nats a token, on average; rounding alone makes 1e-6 and 0.01, an update that is missed 0.002
MOST = {"float32": 0.005, "bfloat16": 0.05}
# one process, so that weights are handed over; not its own choice of threads, nor its reports
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip


def check_engine(args) -> None:
    """Refuse --rollout-engine vllm where it is not to be had."""
    if processes.RANKS > 1 or args.lora_rank > 0:
        stop("--rollout-engine vllm: for one process, and without --lora-rank")
    if importlib.util.find_spec("vllm") is None:
        stop(f"--rollout-engine vllm: it is not installed ({INSTALL})")


def start_engine(policy, args) -> None:
    """From now on whatever asks this policy for answers is answered by vLLM."""
    policy.engine = Engine(start_vllm(args), args.micro_batch_size, MOST[args.dtype])


def start_vllm(args):
    """vLLM with random weights of the model's shapes: the policy's are pushed before it samples."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        from vllm import LLM

        return LLM(
            args.model, dtype=args.dtype, load_format="dummy", skip_tokenizer_init=True,
            generation_config="vllm", logprobs_mode="processed_logprobs", seed=args.seed % 2**31,
            max_model_len=-1, max_num_seqs=args.rollout_batch_size,
            kv_cache_memory_bytes=KV_CACHE, enforce_eager=True,
        )  # fmt: skip
    except Exception as error:  # no kernels for this machine, an architecture that it lacks
        reason = " ".join(str(error).split())[:300]
        stop(f"--rollout-engine vllm: it did not start ({reason}); {INSTALL}")


class Engine:
    """`llm`, a vllm.LLM, in place of `utils.generation.generate`; `size` answers are read at once,
    and `most` is how far they may be off."""

    def __init__(self, llm, size: int, most: float):
        self.llm, self.size, self.most, self.pushed = llm, size, most, None

    def push(self, policy) -> None:
        """Give it the policy's weights, if they have moved. A tied LM head is among them by its own
        name too."""
        # the version that torch counts does not see a step of a fused optimizer
        sums = [p.detach().sum(dtype=torch.float64) for p in policy.parameters()]
        sums = torch.stack(sums).tolist()
        if sums != self.pushed:
            weights = ((name, x.detach()) for name, x in policy.state_dict().items())
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self.llm.reset_prefix_cache()
            self.pushed = sums

    def generate(
        self, policy, chat, prompts: list[list[int]], limits: list[int], temperature: float
    ) -> list[Answer]:
        """The policy's answer to every prompt, of at most `limits` tokens."""
        from vllm import SamplingParams

        common = {"temperature": temperature, "logprobs": 0, "detokenize": False}
        common |= {"stop_token_ids": chat.eos_ids, "ignore_eos": True}
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        with torch.autocast(policy.device.type, enabled=False):
            self.push(policy)
            some = [SamplingParams(max_tokens=limit, **common) for limit in limits]
            outputs = [x.outputs[0] for x in self.llm.generate(asked, some, use_tqdm=False)]
        drawn = [list(x.token_ids) for x in outputs]
        if temperature == 0:
            return [Answer(tokens, *[[0.0] * len(tokens)] * 3) for tokens in drawn]
        theirs = [
            [place[token].logprob for place, token in zip(x.logprobs, tokens, strict=True)]
            for x, tokens in zip(outputs, drawn, strict=True)
        ]
        return self.read(policy, chat, prompts, drawn, theirs, temperature)

    @torch.no_grad()
    def read(
        self, policy, chat, prompts: list[list[int]], drawn: list[list[int]],
        theirs: list[list[float]], temperature: float,
    ) -> list[Answer]:  # fmt: skip
        """Answers `drawn`, whose log-probabilities vLLM gives as `theirs`, as the policy has them.
        Stops where the two are further apart than rounding explains."""
        rows = []
        for prompt, tokens, logprobs in zip(prompts, drawn, theirs, strict=True):
            nothing = [0.0] * len(tokens)
            row = {"prompt": list(prompt), "tokens": tokens, "chosen": [True] * len(tokens)}
            rows.append(SimpleNamespace(**row, logprobs=logprobs, entropy=nothing, gap=nothing))
        batch = tensors.pack(rows, chat.pad_id, policy.device)
        own = torch.zeros(2, *batch["mask"].shape, device=policy.device)
        for where, part in tensors.micro_batches(batch, self.size):
            hidden = tensors.hidden_states(policy.get_decoder(), part)
            found = tensors.logprobs_and_entropy(policy.lm_head, hidden, part, temperature)
            own[:, where, : part["mask"].shape[1]] = torch.stack(found)
        gap = (own[0] - batch["logprobs"]) * batch["mask"]
        mean = gap[batch["mask"]].abs().mean().item()
        if not mean <= self.most:
            stop(
                f"--rollout-engine vllm: its log-probabilities are {mean:.3g} nats a token away from "
                f"the policy's, at most {self.most} is rounding: it samples from another model"
            )
        columns = [x.tolist() for x in (*own, gap)]
        return [
            Answer(tokens, *(column[i][: len(tokens)] for column in columns))
            for i, tokens in enumerate(drawn)
        ]
