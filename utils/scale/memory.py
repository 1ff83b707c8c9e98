"""How the models use a machine's memory: layers computed again in the backward pass, prefixes read
once, weights divided."""

from collections.abc import Callable
from functools import partial

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from utils.errors import stop
from utils.scale import prefixes
from utils.scale.sharding import shard


def place(args, policy, reference, backbone: nn.Module | None = None) -> None:
    """What --gradient-checkpointing, --share-prefixes, --shard and --rollout-engine say, once all
    models are there; `backbone` is a critic's own, if it has one. Checkpointing keeps of each layer
    only the input, and the backward pass computes the rest again; transformers' own does so in
    training mode alone, in which there would be dropout."""
    models = [model for model in (policy, reference, backbone) if model is not None]
    prefixes.ON = args.share_prefixes
    if prefixes.ON:
        decoders = [model.get_decoder() for model in models if model is not backbone]
        decoders += [backbone] if backbone is not None else []
        prefixes.share(decoders, policy.generation_config.pad_token_id)
    if args.gradient_checkpointing:
        for layer in [layer for model in models for layer in layers(model)]:
            layer.forward = partial(recomputed, layer.forward)
    if args.shard:
        shard(getattr(torch, args.dtype), layers, *models)
    if args.rollout_engine == "vllm":
        from utils.scale.engine import start_engine

        start_engine(policy, args)


def layers(model: nn.Module) -> list[nn.Module]:
    """What transformers knows as the layers of a model."""
    kind = transformers.modeling_layers.GradientCheckpointingLayer
    found = [part for part in model.modules() if isinstance(part, kind)]
    if not found:
        stop(
            f"--gradient-checkpointing, --shard: the layers of {type(model).__name__} are not known"
        )
    return found


def recomputed(forward: Callable, *args, **kwargs):
    """What a layer gives, its activations thrown away."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, **kwargs, use_reentrant=False, preserve_rng_state=False)
