"""Checkpoints that survive a kill at any moment: written to a temporary name, checked by digest,
renamed."""

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM

from utils import ranks
from utils.errors import stop
from utils.models import first_line, has_adapters, save_policy
from utils.ranks import by_first, like, whole


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, the manifest excepted."""
    result = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            with path.open("rb") as file:
                digest = hashlib.sha256()
                while block := file.read(1 << 20):
                    digest.update(block)
            result[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return result


def save_checkpoint(
    run: Path, update: int, policy, tokenizer, state: dict[str, Any], card: str, keep: int = 2
) -> None:
    """Write checkpoints/<update>: `policy/` in Hugging Face format with its model card, `state.pt`
    and a manifest; keep the newest `keep`. Of a module in `state` what is trained is kept; with
    LoRA the policy's adapters are in it too, and merged into the weights of `policy/`. Where those
    are rounded to a source's bfloat16, the weights that are trained are in `state.pt` as well. What
    is sharded is gathered."""
    state = {
        key: trained_state(value) if isinstance(value, nn.Module) else value
        for key, value in state.items()
    }
    weights = {held_elsewhere(key): x for key, x in policy.state_dict().items()}
    weights, state = whole(weights), whole(state)
    write_checkpoint(run, update, policy, weights, tokenizer, state, card, keep)


def held_elsewhere(name: str) -> str:
    """The name in the files of a weight of `ranks.Head`, which is the decoder's."""
    return re.sub(r"^.*\.lm_head\.", "lm_head.", name)


@by_first
def write_checkpoint(
    run: Path,
    update: int,
    policy,
    weights: dict,
    tokenizer,
    state: dict[str, Any],
    card: str,
    keep: int,
) -> None:
    folder = run / "checkpoints" / f"{update:06d}"
    temporary = folder.with_name(f"tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    adapters = {name: x for name, x in weights.items() if "lora_" in name}
    if not adapters and policy.source_dtype != policy.dtype:
        state["policy"] = weights
    try:
        save_policy(policy, temporary / "policy", weights)
        tokenizer.save_pretrained(temporary / "policy")
        (temporary / "policy" / "README.md").write_text(card, encoding="utf-8")
        torch.save({**state, "adapters": adapters}, temporary / "state.pt")
        (temporary / "manifest.json").write_text(json.dumps(digests(temporary)))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        for old in complete_checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        stop(
            f"{folder}: the checkpoint could not be written ({first_line(error)}); what was saved "
            f"before is whole, and --resume {run} goes on from it"
        )


def restore(folder: Path, state: dict[str, Any], policy, critic, optimizer) -> dict[str, Any]:
    """Give policy, critic and optimizer what `load_checkpoint` found; returns the scales of the
    reward models. Stops with one sentence where a checkpoint, whole as it may be, is another
    run's, or an older version's."""
    try:
        restore_policy(policy, folder, state)
        if critic is not None:
            restore_critic(critic, state)
        restore_optimizer(optimizer, state["optimizer"])
        scales = state["scale"].items()
        return {name: pair and (float(pair[0]), float(pair[1])) for name, pair in scales}
    except Exception as error:  # a foreign file can be anything
        what = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        stop(
            f"--resume: {folder.parent} does not fit this run ({what}); was it written by another "
            "model or an older version?"
        )


def restore_policy(policy, folder: Path, state: dict[str, Any]) -> None:
    """Give the policy the weights of a checkpoint; with LoRA its adapters."""
    adapters = state.get("adapters")
    if bool(adapters) != has_adapters(policy):
        stop(
            f"--lora-rank: the run was made {'with' if adapters else 'without'} LoRA and cannot go on otherwise"
        )
    mine = policy.state_dict()
    if adapters and any(mine[name].shape != x.shape for name, x in adapters.items()):
        stop(f"--lora-rank: the run was made with rank {min(next(iter(adapters.values())).shape)}")
    if adapters:
        policy.load_state_dict(adapters, strict=False)
        return
    saved = state.get("policy")
    if saved is None:
        model, told = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        if lacks := sorted(told["missing_keys"]):
            raise ValueError(f"its policy lacks {', '.join(lacks[:3])}")
        saved = model.state_dict()
    own = {name: like(saved[held_elsewhere(name)], x) for name, x in mine.items()}
    policy.load_state_dict(own)


def restore_critic(critic: nn.Module, state: dict[str, Any]) -> None:
    """Give the critic the trained weights of a checkpoint."""
    saved, own = (
        {name: x.shape for name, x in d.items()} for d in (state["critic"], trained_state(critic))
    )
    if saved != own:
        stop(
            "--resume: the run's critic has other parts or sizes; leave the critic's flags as they were"
        )
    own = dict(critic.named_parameters())
    critic.load_state_dict({k: like(x, own[k]) for k, x in state["critic"].items()}, strict=False)


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """`load_state_dict`, which looks at the number of parameters alone, and a look at the rest."""
    before = [dict(group) for group in optimizer.param_groups]
    own = [parameter for group in before for parameter in group["params"]]
    for i, moments in saved["state"].items() if ranks.SHARDED else ():
        moments |= {key: like(x, own[i]) for key, x in moments.items() if x.dim()}
    optimizer.load_state_dict(saved)
    for mine, group in zip(before, optimizer.param_groups, strict=True):
        own = mine.keys() - {"params", "lr"}
        if group["name"] != mine["name"] or any(group.get(k, mine[k]) != mine[k] for k in own):
            raise ValueError("its optimizer has other settings")
    if len({frozenset(moments) for moments in optimizer.state.values()}) > 1:
        raise ValueError("its optimizer lacks moments")
    for parameter, moments in optimizer.state.items():
        if any(x.dim() and x.shape != parameter.shape for x in moments.values()):
            raise ValueError("its optimizer's moments have other sizes than the parameters")


def trained_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state of the parameters that are trained: what is frozen is loaded again from where it
    came."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def complete_checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first; a folder still under its temporary name is
    none."""
    return sorted(p for p in (run / "checkpoints").glob("[0-9]*") if p.is_dir())


def load_checkpoint(
    run: Path | None, say: Callable[[str], None]
) -> tuple[int, Path | None, dict[str, Any] | None]:
    """The newest undamaged checkpoint: its update, the folder of its policy, its state, on the CPU: a
    GPU may have no room for it twice. Says so where it passes over a damaged one. (0, None, None),
    the beginning, for a fresh run (None) or one that was stopped before its first checkpoint."""
    if run is None:
        return 0, None, None
    folders = complete_checkpoints(run)
    for folder in reversed(folders):
        try:
            if digests(folder) != json.loads((folder / "manifest.json").read_text()):
                raise ValueError("its files do not match their digests")
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise ValueError("its state is no dictionary")
            return int(folder.name), folder / "policy", state
        except Exception as error:  # a damaged file can be anything
            reason = first_line(error)
            if isinstance(error, pickle.UnpicklingError):
                reason = "its state holds other things than numbers"
            say(f"checkpoint {folder} is damaged ({reason}); falling back to the one before it")
    if folders:
        stop(f"--resume {run}: no undamaged checkpoint in {run / 'checkpoints'}")
    say(f"{run} has no checkpoint yet: starting at the beginning")
    return 0, None, None
