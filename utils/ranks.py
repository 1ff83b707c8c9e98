"""One run in several processes: `torchrun --nproc-per-node 8 ppo_baseline.py ...`.

The processes share the work, and know the whole: each holds the models and the whole batch, decodes
its share of the prompts and computes its share of the micro-batches; what they find is gathered or
summed. So rewards, advantages, minibatches and metrics are those of one process. Without torchrun
nothing here does anything. With --shard each holds a part of every weight, its gradient and its
moments, and gathers a layer's weights when its turn comes (FSDP2).
"""

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from utils.errors import stop
from utils.keyed import generator

RANK = int(os.environ.get("RANK", 0))
RANKS = int(os.environ.get("WORLD_SIZE", 1))
SHARDED = False  # --shard


def join(device: torch.device) -> torch.device:
    """Meet the other processes; of GPUs each process has its own."""
    if RANKS == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return device


def share(count: int) -> range:
    """The part of range(count) that this process works on; contiguous, so that the answers to one
    prompt stay together."""
    return range(count * RANK // RANKS, count * (RANK + 1) // RANKS)


def add_up(*found: Tensor) -> None:
    """Sums over the processes, in place."""
    for x in found if RANKS > 1 else ():
        dist.all_reduce(x)


def add_gradients(optimizer: torch.optim.Optimizer) -> None:
    """The gradients of all micro-batches of a minibatch, whoever had them. A process that had none
    adds zeros. Those of sharded weights have been added in the backward pass."""
    for group in optimizer.param_groups if RANKS > 1 else ():
        for parameter in group["params"]:
            if parameter.requires_grad and not is_sharded(parameter):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)


def gather(found: Any) -> list[Any]:
    """What each process has, in their order."""
    box = [found] * RANKS
    if RANKS > 1:
        dist.all_gather_object(box, found)
    return box


def from_first(find: Callable[[], Any]) -> Any:
    """What `find` gives in the first process, in all of them: a time limit, or a clock, may differ."""
    box = [find() if RANK == 0 else None]
    if RANKS > 1:
        dist.broadcast_object_list(box)
    return box[0]


def by_first(function: Callable) -> Callable:
    """Only the first process does it: writing files, showing something on the screen."""

    @wraps(function)
    def wrapped(*args, **kwargs):
        return function(*args, **kwargs) if RANK == 0 else None

    return wrapped


def adopt_generator(steps: int, device: torch.device) -> None:
    """Go on from where the generator of the process stands that has drawn for the most steps."""
    if RANKS == 1:
        return
    drawn = gather((steps, generator(device).get_state()))
    generator(device).set_state(max(drawn, key=lambda pair: pair[0])[1])


def check_sizes(args) -> None:
    """Refuse batches with fewer rows than there are processes, and --shard where it has no use;
    whoever loads a model asks for SHARDED."""
    global SHARDED
    SHARDED = args.shard
    if SHARDED and (RANKS == 1 or args.lora_rank > 0):
        stop("--shard: for several processes (torchrun), and without --lora-rank")
    sizes = {
        "--prompts-per-update x --samples-per-prompt": args.prompts_per_update
        * args.samples_per_prompt,
        "--minibatch-size": args.minibatch_size,
    }
    for flag, rows in sizes.items():
        if rows < RANKS:
            stop(f"{flag}: {rows} rows are fewer than the {RANKS} processes that share them")


def check_equal(*modules: torch.nn.Module | None) -> None:
    """Stop unless the processes hold the same weights, but for sharded ones: a sum of them, to the
    last bit."""
    parameters = [p for module in modules if module is not None for p in module.parameters()]
    parameters = [p for p in parameters if not is_sharded(p)]
    sums = gather(float(sum(p.detach().double().sum() for p in parameters)) if RANKS > 1 else 0.0)
    if len(set(sums)) > 1:
        stop(
            f"the processes' weights have come apart (sums {sums}): this is a bug, please report it"
        )


# ---- sharded weights ----


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


def is_sharded(x: Any) -> bool:
    return hasattr(x, "full_tensor")


def full(x: Tensor) -> Tensor:
    """A sharded tensor in one piece, everywhere."""
    return x.full_tensor() if is_sharded(x) else x


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
