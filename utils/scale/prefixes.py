"""--share-prefixes: what rows have in common from their first token on is read once.

Attention is causal, so a state depends on the tokens up to it and on nothing else: rows that begin
alike have the same states until they part. The rows of a micro-batch are a tree whose nodes are
their distinct beginnings; the transformer reads the tree as one row, every node attending to the
nodes on its way from the root. Episodes of one prompt share it, and prompts of one template its
beginning."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from utils.errors import stop

ON = False  # then `tensors.micro_batches` puts rows that begin alike next to each other


def share(decoders: list[nn.Module], pad_id: int) -> None:
    """From now on these decoders read the beginnings of their rows once, in passes without a cache.
    Stops where a layer is not plain attention: its states cannot be told which tokens to see."""
    for decoder in decoders:
        cache = DynamicCache(config=decoder.config)
        if not all(type(layer) is DynamicLayer for layer in cache.layers):
            stop(f"--share-prefixes: {type(decoder).__name__} has other layers than full attention")
        decoder.forward = partial(read_once, decoder.forward, pad_id)


def in_order(inputs: Tensor) -> Tensor:
    """The rows (B, T), those that begin alike next to each other: indices (B,), on the CPU."""
    rows = inputs.tolist()
    return torch.tensor(sorted(range(len(rows)), key=rows.__getitem__), dtype=torch.long)


def tree(rows: list[list[int]]) -> tuple[list[int], list[int], list[list[int]]]:
    """The distinct beginnings of some rows: of each node the last token and its position, and of
    each row its path, the nodes of its beginnings."""
    nodes, tokens, positions, paths = {}, [], [], []
    for row in rows:
        path, node = [], -1
        for position, token in enumerate(row):
            node = nodes.setdefault((node, token), len(nodes))
            if node == len(tokens):
                tokens.append(token)
                positions.append(position)
            path.append(node)
        paths.append(path)
    return tokens, positions, paths


def read_once(forward: Callable, pad_id: int, *args, **kwargs):
    """A decoder's `forward`. Of inputs (B, T) without a cache, padded on the right with EOS, it
    gives the same last hidden states (B, T, D); those of padding are others, and nobody's."""
    if args or set(kwargs) != {"input_ids", "use_cache"} or kwargs["use_cache"]:
        return forward(*args, **kwargs)
    inputs = kwargs["input_ids"]
    rows = inputs.tolist()
    for row in rows:
        while row[-2:] == [pad_id, pad_id]:  # after an answer's EOS nothing is chosen
            row.pop()
    tokens, positions, paths = tree(rows)
    sees = torch.zeros((len(tokens), len(tokens)), dtype=torch.bool)
    places = torch.zeros(inputs.shape, dtype=torch.long)
    for i, path in enumerate(torch.tensor(path) for path in paths):
        sees[path[:, None], path] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
        places[i, : len(path)] = path
    states = forward(
        input_ids=inputs.new_tensor([tokens]),
        attention_mask=sees[None, None].to(inputs.device),
        position_ids=inputs.new_tensor([positions]),
        use_cache=False,
    ).last_hidden_state[0]
    return BaseModelOutputWithPast(last_hidden_state=states[places.to(inputs.device)])
