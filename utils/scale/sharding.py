"""--shard: each process holds a part of every weight, its gradient and its moments, and gathers a
layer's weights when its turn comes (FSDP2)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from utils.scale.processes import RANKS, by_first, is_sharded


class Head(nn.Module):
    """An LM head whose weights the decoder holds and gathers: by itself it would gather them, and
    divide their gradient, for every chunk of logits, of which the processes have different
    numbers."""

    def __init__(self, linear: nn.Linear, decoder: nn.Module):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        embedding = decoder.get_input_embeddings()
        is_tied = linear.weight is embedding.weight and linear.bias is None
        if not is_tied:
            decoder.lm_head = linear
        self.own = (embedding if is_tied else linear,)  # no module of this one

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.own[0].weight, getattr(self.own[0], "bias", None))


def shard(dtype: torch.dtype, layers: Callable[[nn.Module], list], *models: nn.Module) -> None:
    """Divide the weights of causal LMs or their decoders among the processes, on their devices. A
    layer's are gathered for its pass, in `dtype`; embedding, last norm and head, in float32, from a
    pass of the decoder to the end of the backward pass."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cuda" if dist.get_backend() == "nccl" else "cpu", (RANKS,))
    half = dtype if dtype != torch.float32 else None
    how = MixedPrecisionPolicy(half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for model in models:
        decoder = model.get_decoder() if hasattr(model, "lm_head") else model
        if decoder is not model:
            model.lm_head = Head(model.lm_head, decoder)
        for layer in layers(decoder):
            fully_shard(layer, mesh=mesh, mp_policy=how)
        fully_shard(decoder, mesh=mesh, reshard_after_forward=False)
        for part in sharded_parts(model):  # losses are sums over the processes: so are gradients
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no other
            part.stays = part is decoder


def sharded_parts(model: nn.Module) -> list[nn.Module]:
    return [part for part in model.modules() if hasattr(part, "unshard")]


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """All its weights in every process: in decoding each has as many steps as its answers are long."""
    parts = sharded_parts(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        part.set_reshard_after_forward(not part.stays, recurse=False)
        part.reshard()


def whole(state: Any) -> Any:
    """A state with its sharded tensors in one piece, on the first process's CPU: all ask for it."""
    to_cpu = by_first(Tensor.cpu)
    return tree_map(lambda x: to_cpu(x.full_tensor()) if is_sharded(x) else x, state)


def like(x: Tensor, own: Tensor) -> Tensor:
    """A tensor in one piece, which all processes have, divided as `own` is."""
    if not is_sharded(own):
        return x
    from torch.distributed.tensor import distribute_tensor

    place = (own.device_mesh, own.placements)
    return distribute_tensor(x.to(own.device), *place, src_data_rank=None)
