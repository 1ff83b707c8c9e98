"""Episodes as tensors: the grid (B, T) on which everything lives, and batches without padding."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from utils import prefixes, ranks

LOGITS_AT_ONCE = 2**23  # 32 MB in float32
ON_A_GPU = 32  # times as many, 1 GB: smaller pieces would leave it idle
Batch = dict[str, Tensor]


def pack(episodes: list, pad_id: int, device: torch.device) -> Batch:
    """Episodes as `inputs`, `targets` (B, T) int64, `mask` (B, T) bool, `logprobs` and `entropy`
    (B, T) of the policy that sampled, and their `gap`; T is the longest episode minus one."""
    width = max(len(e.tokens) for e in episodes)

    def grid(name: str, filler) -> Tensor:
        rows = [getattr(e, name) for e in episodes]
        rows = [row + [filler] * (width - len(row)) for row in rows]
        return torch.tensor(rows, device=device)

    tokens = grid("tokens", pad_id)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "mask": grid("chosen", False)[:, 1:],
        "logprobs": grid("logprobs", 0.0)[:, 1:],
        "entropy": grid("entropy", 0.0)[:, 1:],
        "gap": grid("gap", 0.0)[:, 1:],
    }


def take(batch: Batch, rows: Tensor, mask: Tensor | None = None) -> Batch:
    """Some rows of a batch, without the columns that are padding in all of them. `rows` and the
    batch's `mask` are on the CPU, so that no size is waited for until a GPU knows it."""
    mask = (batch["mask"].cpu() if mask is None else mask)[rows]
    used = mask.any(0).nonzero()
    width = int(used.max()) + 1 if len(used) else 1
    places = {x.device: send(rows, x.device) for x in batch.values()}
    part = {key: x[places[x.device], :width] for key, x in batch.items()}
    found = mask[:, :width].nonzero(as_tuple=True)
    part["mask"].cells = tuple(send(x, part["mask"].device) for x in found)
    part["mask"].lengths = mask.sum(1).tolist()
    return part


def send(x: Tensor, device: torch.device) -> Tensor:
    """From the CPU to a device, without waiting until a GPU has it."""
    return x.to(device, non_blocking=device.type == "cuda")


def micro_batches(batch: Batch, size: int) -> Iterator[tuple[Tensor, Batch]]:
    """The batch in parts of at most `size` rows, as (row indices, part). Rows of similar length
    stand together, so that little is padding, or with --share-prefixes those that begin alike.
    Several processes have every so-manieth part each. With --shard all have as many, as they gather
    weights together: some have a part without tokens in the end."""
    mask = batch["mask"].cpu()
    order = mask.cumsum(1).argmax(1).argsort(stable=True)  # by the last column
    if prefixes.ON:
        order = prefixes.in_order(batch["inputs"])
    parts = order.split(size)
    for rows in parts[ranks.RANK :: ranks.RANKS]:
        yield send(rows, batch["mask"].device), take(batch, rows, mask)
    if ranks.SHARDED and 0 < len(parts) % ranks.RANKS <= ranks.RANK:
        rows = parts[-1][:1]  # another process's
        part = take(batch, rows, torch.zeros_like(mask))
        empty = {key: torch.zeros_like(x) for key, x in part.items()}
        empty["mask"].cells, empty["mask"].lengths = part["mask"].cells, [0]
        yield send(rows, batch["mask"].device), empty


def cells(mask: Tensor) -> tuple[Tensor, ...]:
    """Rows and columns (N,) where a mask (B, T) is true: x[cells(mask)] is x[mask], for which a GPU
    would be waited for each time. Of a part of a batch the CPU has known them; of others they are
    found once."""
    if not hasattr(mask, "cells"):
        mask.cells = mask.nonzero(as_tuple=True)
    return mask.cells


def lengths(mask: Tensor) -> list[int]:
    """The cells of every row of a mask (B, T)."""
    return mask.lengths if hasattr(mask, "lengths") else mask.sum(1).tolist()


def row_normal(seeds: Tensor, mask: Tensor, samples: int, width: int) -> Tensor:
    """Standard normal noise (samples, N, width) for the N masked tokens of some rows: each row's
    depends on its seed (rows, 1) alone, so it does not matter which rows stand together, or in
    which process."""
    noise = [torch.empty((samples, 0, width), device=mask.device)]
    for seed, length in zip(seeds.flatten().tolist(), lengths(mask), strict=True):
        own, shape = torch.Generator(mask.device).manual_seed(seed), (samples, length, width)
        noise.append(torch.randn(shape, generator=own, device=mask.device))
    return torch.cat(noise, dim=1)


def on_grid(values: Tensor, mask: Tensor) -> Tensor:
    """The inverse of x[mask]: values (N, ...) on the grid (B, T, ...), zero where the mask is."""
    return values.new_zeros((*mask.shape, *values.shape[1:])).index_put(cells(mask), values)


def put(grid: Tensor, rows: Tensor, values: Tensor, mask: Tensor) -> None:
    """Write values (N, ...) of the masked tokens of some rows into a grid (B, T, ...)."""
    grid[rows, : mask.shape[1]] = on_grid(values, mask)


def turn_ends(mask: Tensor) -> Tensor:
    """(B, T) bool: the last token of every turn, its EOS unless the turn was cut off."""
    following = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    return mask & ~following


def rows_at_once(head: nn.Module, device: torch.device) -> int:
    """How many states may have their logits in memory at the same time."""
    most = LOGITS_AT_ONCE * (ON_A_GPU if device.type == "cuda" else 1)
    return max(1, most // head.out_features)


def logprobs_and_entropy(
    head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """log pi(target) and the entropy of pi, (N,) each, from hidden states (N, D). Logits are the
    largest tensors there are, so only some of them exist at a time: each chunk's are computed again
    in the backward pass."""

    def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = (head(hidden).float() / temperature).log_softmax(-1)  # (n, V)
        chosen = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return chosen, -(logprobs.exp() * logprobs).sum(-1)

    rows = rows_at_once(head, hidden.device)
    if len(targets) <= rows:
        return chunk(hidden, targets)
    chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
    parts = [checkpoint(chunk, *c, use_reentrant=False, preserve_rng_state=False) for c in chunks]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))
