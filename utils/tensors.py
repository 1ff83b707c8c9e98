"""Episodes as tensors. There is one layout, for every task and every script:

    inputs   P  P  P  a  b  .     (B, L)  episodes without their last token; padding on the right
    tokens            a  b  E  .  (B, T)  what follows the prompt: answers a b and their EOS E, and
                                          in a dialogue what the user says between them
    mask              1  1  1  0  (B, T)  the policy chose this token

Every number per token is (B, T), and its column t belongs to the t-th token after the prompt.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from utils.scale import prefixes, processes

Batch = dict[str, Tensor]
HALF = False  # --dtype bfloat16: forward passes are autocast
LOGITS_AT_ONCE = 2**23  # 32 MB in float32
ON_A_GPU = 32  # times as many, 1 GB: smaller pieces would leave it idle
RATIO_CAP = 2.0  # most that a token of another engine's weighs


def pack(episodes: list, pad_id: int, device: torch.device) -> Batch:
    """Episodes as a batch: `inputs`, `tokens`, `mask` as in the picture above;

    `prompt`, `last` (B, 1): tokens of the prompt, and the column of the episode's last token;
    `logprobs`, `entropy` (B, T): of the policy that sampled, 0 where it chose nothing;
    `sampler` (B, T): a token's weight in the policy's loss: pi_old / pi_engine, at most RATIO_CAP,
    where another engine has sampled (truncated importance sampling, Ionides 2008); 0 where
    --truncated mask leaves an answer out; as a rule 1."""

    def grid(rows: list[list], filler) -> Tensor:
        width = max(map(len, rows))
        return torch.tensor([row + [filler] * (width - len(row)) for row in rows], device=device)

    return {
        "inputs": grid([(e.prompt + e.tokens)[:-1] for e in episodes], pad_id),
        "prompt": grid([[len(e.prompt)] for e in episodes], 0),
        "tokens": grid([e.tokens for e in episodes], pad_id),
        "last": grid([[len(e.tokens) - 1] for e in episodes], 0),
        "mask": grid([e.chosen for e in episodes], False),
        "logprobs": grid([e.logprobs for e in episodes], 0.0),
        "entropy": grid([e.entropy for e in episodes], 0.0),
        "sampler": grid([e.gap for e in episodes], 0.0).clamp(max=math.log(RATIO_CAP)).exp(),
    }


def micro_batches(batch: Batch, size: int) -> Iterator[tuple[Tensor, Batch]]:
    """The batch in parts of at most `size` rows, as (row numbers, part). Rows of similar length
    stand together, and a part lacks the columns that are padding in all its rows. `cells` (n,) of a
    part are the places of its chosen tokens when (b, T) is flattened.

    Several processes have some of the parts each (`processes.share_parts`)."""
    device, mask = batch["mask"].device, batch["mask"].cpu()  # the one wait for a GPU
    prompts, regions = batch["prompt"].cpu().squeeze(1), batch["last"].cpu().squeeze(1) + 1
    order = (prompts + regions).argsort(stable=True)
    if prefixes.ON:  # then rows that begin alike stand together
        order = prefixes.in_order(batch["inputs"])
    for rows, counts in processes.share_parts(order.split(size)):
        places = {rows.device: rows}  # the rows' seeds stay on the CPU
        places[device] = rows.to(device, non_blocking=device.type == "cuda")
        T, L = int(regions[rows].max()), int((prompts + regions)[rows].max()) - 1
        cut = {name: L if name == "inputs" else T for name in batch}
        part = {name: x[places[x.device], : cut[name]] for name, x in batch.items()}
        part["cells"] = mask[rows, :T].flatten().nonzero().squeeze(1).to(device)
        if not counts:
            part = {k: x[:0] if k == "cells" else torch.zeros_like(x) for k, x in part.items()}
        yield places[device], part


def precision(device: torch.device) -> torch.autocast:
    """The precision of forward passes, as --dtype says."""
    return torch.autocast(device.type, torch.bfloat16, enabled=HALF)


def hidden_states(transformer: nn.Module, part: Batch) -> Tensor:
    """(b, T, D) in float32: the state before each token, the transformer's last hidden state there.
    Padding is on the right and attention is causal, so no attention mask is needed."""
    inputs = part["inputs"]
    with precision(inputs.device):
        hidden = transformer(input_ids=inputs, use_cache=False).last_hidden_state  # (b, L, D)
    columns = torch.arange(part["mask"].shape[1], device=inputs.device)
    before = (part["prompt"] - 1 + columns).clamp(0, inputs.shape[1] - 1)  # (b, T)
    return hidden.take_along_dim(before.unsqueeze(-1), dim=1).float()


def logprobs_and_entropy(
    head: nn.Module, hidden: Tensor, part: Batch, temperature: float
) -> tuple[Tensor, Tensor]:
    """log pi of the chosen tokens and the entropy of pi, (b, T) each, from hidden states (b, T, D)
    and pi = softmax(head(h) / temperature); 0 where nothing was chosen. Logits are the largest
    tensors there are, so only some of them exist at a time: each chunk's are computed again in the
    backward pass."""

    def chunk(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        with precision(hidden.device):
            logits = head(hidden)
        logprobs = (logits.float() / temperature).log_softmax(-1)  # (n, V)
        chosen = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return chosen, -(logprobs.exp() * logprobs).sum(-1)

    cells = part["cells"]
    states, tokens = hidden.flatten(0, 1)[cells], part["tokens"].flatten()[cells]
    rows = rows_at_once(head, hidden.device)
    if len(cells) <= rows:
        found = chunk(states, tokens)
    else:
        how = {"use_reentrant": False, "preserve_rng_state": False}
        pairs = zip(states.split(rows), tokens.split(rows), strict=True)
        found = map(torch.cat, zip(*(checkpoint(chunk, *x, **how) for x in pairs), strict=True))
    empty = torch.zeros(part["tokens"].numel(), device=hidden.device)
    return tuple(empty.index_put((cells,), x).view(part["tokens"].shape) for x in found)


def rows_at_once(head: nn.Module, device: torch.device) -> int:
    """How many states may have their logits in memory at the same time."""
    most = LOGITS_AT_ONCE * (ON_A_GPU if device.type == "cuda" else 1)
    return max(1, most // head.out_features)


def row_normal(seeds: Tensor, mask: Tensor, samples: int, width: int) -> Tensor:
    """Standard normal noise (samples, b, T, width) for the chosen tokens of some rows, 0 elsewhere.
    A row's depends on its seed (b, 1) alone, so it does not matter which rows stand together, or in
    which process."""
    device, chosen = mask.device, mask.cpu()  # a wait for a GPU
    noise = torch.zeros((samples, *mask.shape, width), device=device)
    for i, seed in enumerate(seeds.flatten().tolist()):
        own, columns = torch.Generator(device).manual_seed(seed), chosen[i].nonzero().squeeze(1)
        shape = (samples, len(columns), width)
        noise[:, i, columns.to(device)] = torch.randn(shape, generator=own, device=device)
    return noise


def turn_ends(mask: Tensor) -> Tensor:
    """(B, T) bool: the last token of every turn, its EOS unless the turn was cut off."""
    following = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    return mask & ~following
