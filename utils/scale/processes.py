"""One run in several processes: `torchrun --nproc-per-node 8 ppo_baseline.py ...`.

The processes share the work, and know the whole: each holds the models and the whole batch, decodes
its share of the prompts and computes its share of the micro-batches; what they find is gathered or
summed. So rewards, advantages, minibatches and metrics are those of one process. Without torchrun
nothing here does anything.
"""

import atexit
import os
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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


def share_parts(parts: Sequence[Tensor]) -> list[tuple[Tensor, bool]]:
    """The parts of a batch that this process works on, and whether they count. Under --shard all
    processes have as many, as they gather weights together: some end with a row of another one's,
    which does not count."""
    some = [(rows, True) for rows in parts[RANK::RANKS]]
    if SHARDED and 0 < len(parts) % RANKS <= RANK:
        some.append((parts[-1][:1], False))
    return some


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


def is_sharded(x: Any) -> bool:
    return hasattr(x, "full_tensor")


def full(x: Tensor) -> Tensor:
    """A sharded tensor in one piece, everywhere."""
    return x.full_tensor() if is_sharded(x) else x
