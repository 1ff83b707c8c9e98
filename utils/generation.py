"""Decoding: what transformers' `generate` would draw, in less time, with the probabilities of what
was drawn.

What is saved: a prompt that stands several times in a batch is read once; rows that have ended
leave the batch; the cache of keys and values grows in place; and as the log-probabilities are kept,
no further pass of the policy has to find them."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from utils.keyed import generator
from utils.scale import processes
from utils.scale.sharding import gathered
from utils.tensors import precision, rows_at_once

ROOM = 32  # tokens by which a cache grows at a time
EOS_EVERY = {"cuda": 8}  # steps between two looks at who has ended, which wait for the GPU; else 1
COMPACT_AT = 0.8  # the batch is compacted when no more than this share of its rows goes on


class Answer(NamedTuple):
    """Tokens up to and including the first EOS; for each its log-probability under the tempered
    policy, and that policy's entropy. A greedy answer is certain: both are 0. `gap`: by how much
    that log-probability exceeds the one with which the token was drawn; 0 but for another engine's
    (utils/scale/engine.py)."""

    tokens: list[int]
    logprobs: list[float]
    entropy: list[float]
    gap: list[float]


class RoomyLayer(DynamicLayer):
    """Keys and values (B, H, T, D) as the used part of buffers with room for more: a further token
    is written in place, where DynamicLayer copies the whole cache. Under autocast the rotation makes
    keys float32, which attention undoes: they are kept like the values. Made for `generate` below:
    nothing but these methods keeps the buffers in step."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = self.buffers = key_states[:, :, :0], value_states[:, :, :0]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        key_states = key_states.to(value_states.dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used = self.keys.shape[2]
        width = used + key_states.shape[2]
        if width > self.buffers[0].shape[2]:
            self.buffers = tuple(
                nn.functional.pad(x, (0, 0, 0, width + ROOM - used))
                for x in (self.keys, self.values)
            )
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, used:width] = new
        self.keys, self.values = (buffer[:, :, :width] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        width = self.keys.shape[2]
        self.buffers = tuple(buffer.index_select(0, indices) for buffer in self.buffers)
        self.keys, self.values = (buffer[:, :, :width] for buffer in self.buffers)


def exponential(rows: int, columns: int, device: torch.device) -> Tensor:
    """The Exp(1) noise (rows, columns) by which `torch.multinomial` chooses, argmax p / noise. On
    the CPU it is drawn by inversion, which gives the same numbers as `exponential_` in a third of
    the time."""
    if device.type == "cpu":
        return torch.rand((rows, columns), dtype=torch.float64).neg_().log1p_().neg_().float()
    return (
        torch.empty((rows, columns), device=device)
        .exponential_()
        .clamp_(min=torch.finfo(torch.float32).tiny)
    )


def choose(
    head: nn.Module, hidden: Tensor, rows: Tensor, batch: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Next token, its log-probability and the entropy, (N,) each, from the last hidden states (N,
    D) of the rows `rows` (N,) of a batch, in ascending order. Temperature 0 takes the likeliest
    token, with certainty.

    Noise is drawn for the whole batch, so that a row's token does not depend on which others have
    ended, and no more than `rows_at_once` have their logits in memory. On a CPU it is `generate`'s
    noise, however it is cut; on a GPU while a batch is one piece."""
    parts, size, ends = [], rows_at_once(head, hidden.device), [0, len(rows)]
    starts = range(0, batch, size)
    if len(starts) > 1:
        edges = torch.tensor([*starts, batch], device=rows.device)
        ends = torch.searchsorted(rows, edges).tolist()
    for start, first, last in zip(starts, ends, ends[1:], strict=False):
        logits = head(hidden[first:last]).float()
        if temperature == 0:
            zeros = torch.zeros(len(logits), device=logits.device)
            parts.append((logits.argmax(-1), zeros, zeros))
            continue
        probs = (logits / temperature).softmax(-1)
        noise = exponential(min(size, batch - start), probs.shape[1], probs.device)
        noise = noise if len(probs) == len(noise) else noise[rows[first:last] - start]
        tokens = noise.reciprocal_().mul_(probs).argmax(-1)
        chosen = probs.gather(1, tokens.unsqueeze(1)).squeeze(1)
        parts.append((tokens, chosen.log(), torch.special.entr(probs).sum(-1)))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def generate(
    policy,
    chat,
    prompts: list[list[int]],
    max_new_tokens: int | list[int],
    temperature: float,
    at_once: int | None = None,
) -> list[Answer]:
    """The policy's answer to every prompt, of at most max_new_tokens (each prompt may have a limit
    of its own); `at_once` prompts in a batch (default: all). Several processes decode a share of
    each batch."""
    answers = []
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    if prompts and hasattr(policy, "engine"):  # --rollout-engine
        return policy.engine.generate(policy, chat, prompts, limits, temperature)
    size = at_once or len(prompts) or 1
    whole = gathered(policy) if processes.SHARDED else nullcontext()
    with whole, precision(policy.device):
        for start in range(0, len(prompts), size):
            batch = range(start, min(start + size, len(prompts)))
            mine, found, steps = processes.share(len(batch)), [], 0
            if mine:
                places = torch.tensor(mine, device=policy.device)
                some, room = [prompts[start + i] for i in mine], [limits[start + i] for i in mine]
                found, steps = decode(policy, chat, some, places, len(batch), room, temperature)
            if processes.RANKS > 1:
                processes.adopt_generator(steps, policy.device)
                found = [answer for part in processes.gather(found) for answer in part]
            answers += found
    return answers


@torch.no_grad()
def decode(
    policy,
    chat,
    prompts: list[list[int]],
    places: Tensor,
    batch: int,
    limits: list[int],
    temperature: float,
) -> tuple[list[Answer], int]:
    """The answers to prompts that stand at `places` (N,) in a batch of `batch`, of at most `limits`
    (N) tokens, and the steps that it took."""
    decoder, device, noise = policy.get_decoder(), policy.device, generator(policy.device)
    cache = DynamicCache(config=policy.config)
    # rows can be taken out of caches of attention; a model with others decodes its batch as it
    # stands, to the end
    movable = all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )
    cache.layers = [
        RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    prompts = [tuple(prompt) for prompt in prompts]
    distinct = list(dict.fromkeys(prompts)) if movable else prompts
    width, most = max(map(len, distinct)), max(limits)
    tokens = torch.tensor(
        [(chat.pad_id,) * (width - len(p)) + p for p in distinct], device=device
    )  # padded on the left
    attention = torch.tensor(
        [[0] * (width - len(p)) + [1] * (len(p) + most) for p in distinct], device=device
    )
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    padding = [width - len(p) for p in distinct]

    def read(tokens: Tensor) -> Tensor:
        """The last hidden states (N, D) after further tokens (N, T) of every row: the prompts, then
        one token at a time."""
        nonlocal width
        mask = attention[:, :width] if any(padding) else None
        hidden = decoder(
            input_ids=tokens, attention_mask=mask, position_ids=positions[:, width - tokens.shape[1] : width],
            past_key_values=cache, use_cache=True,
        ).last_hidden_state[:, -1]  # fmt: skip
        width += 1
        return hidden

    def keep(some: Tensor) -> None:
        """Go on with some rows, in their order."""
        nonlocal attention, positions, padding
        padding = [padding[i] for i in some.tolist()]
        attention, positions = attention[some], positions[some]
        for layer in cache.layers:
            layer.batch_select_indices(some)

    hidden = read(tokens)
    rows = torch.arange(len(prompts), device=device)  # those that go on
    if len(distinct) < len(prompts):
        first = {prompt: i for i, prompt in enumerate(distinct)}
        copies = torch.tensor([first[prompt] for prompt in prompts], device=device)
        hidden = hidden[copies]
        keep(copies)
    answers = torch.full((len(prompts), most), chat.eos_ids[0], device=device)
    logprobs, entropy = torch.zeros(2, *answers.shape, device=device)
    going, eos = torch.ones_like(rows, dtype=torch.bool), torch.tensor(chat.eos_ids, device=device)
    room = torch.tensor(limits, device=device)
    # a row that was cut off may stay for a while, but not beyond the positions that a model learned
    last = torch.tensor([[len(p) + n - 1] for p, n in zip(prompts, limits, strict=True)])
    positions = positions.minimum(last.to(device))
    every, states = EOS_EVERY.get(device.type, 1), []
    for step in range(1, most + 1):
        new, logprob, uncertainty = choose(policy.lm_head, hidden, places[rows], batch, temperature)
        at = (rows, step - 1)
        answers[at], logprobs[at], entropy[at] = new, logprob, uncertainty
        states.append(noise.get_state())
        going = going & ~torch.isin(new, eos) & (step < room[rows])
        if step == most:
            break
        if step % every == 0:
            some = going.nonzero().squeeze(1)
            if len(some) == 0:
                break
            if movable and len(some) <= COMPACT_AT * len(rows):
                rows, new, going = rows[some], new[some], going[some]
                keep(some)
        hidden = read(new.unsqueeze(1))
    is_eos = torch.isin(answers, eos)
    lengths = torch.where(is_eos.any(1), is_eos.int().argmax(1) + 1, most).minimum(room)
    steps = int(lengths.max())
    noise.set_state(states[steps - 1])  # nobody has drawn what came after the last EOS
    columns = (answers.tolist(), logprobs.tolist(), entropy.tolist(), lengths.tolist())
    found = [Answer(a[:n], p[:n], e[:n], [0.0] * n) for a, p, e, n in zip(*columns, strict=True)]
    return found, steps


def answer(
    policy, chat, conversations: list[list[dict[str, str]]], tokens: int, temperature: float
) -> list[str]:
    """The policy's next turn in every conversation, as text."""
    rows = [chat.conversation_ids(messages) for messages in conversations]
    return [chat.decode(row.tokens) for row in generate(policy, chat, rows, tokens, temperature)]
