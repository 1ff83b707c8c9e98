"""Randomness keyed by what it is for: the same key gives the same numbers, in any run and after any
resume, so there is no generator whose state would have to be saved, and methods that share a seed
share prompts, samples and noise."""

import hashlib

import torch
from torch import Tensor


def coin(*key: object) -> float:
    """A uniform number in (0, 1) that depends on the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") // 2**11 + 0.5) / 2**53


def seed_torch(*key: object) -> None:
    """Start torch's generator at a point that depends on the key alone."""
    torch.manual_seed(int(coin(*key) * 2**53))


def permutation(size: int, *key: object) -> Tensor:
    """A permutation of range(size), int64, that depends on the key alone."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(int(coin(*key) * 2**53)))


def generator(device: torch.device) -> torch.Generator:
    """The generator that draws on a device where none is named."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator


def row_seeds(mask: Tensor, *key: object) -> Tensor:
    """A seed for every row of a batch with that mask, (B, 1) int64 on the CPU: a column of it."""
    return torch.tensor([[int(coin(*key, row) * 2**53)] for row in range(len(mask))])
