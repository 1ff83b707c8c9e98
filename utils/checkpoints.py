"""Checkpoints that survive a kill at any moment: written to a temporary name, checked by digest,
renamed. And the critics in them, from which another run may start."""

import hashlib
import importlib
import inspect
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from utils.errors import first_line, stop
from utils.files import parse
from utils.models import has_adapters, save_merged, save_policy
from utils.scale import processes
from utils.scale.processes import by_first
from utils.scale.sharding import like, whole


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
    run: Path,
    update: int,
    policy,
    critic,
    tokenizer,
    state: dict[str, Any],
    made_by: dict[str, Any],
    card: str,
    keep: int = 2,
) -> None:
    """Write checkpoints/<update>: `policy/` in Hugging Face format with its model card; where there
    is a critic, `critic/`, made by the script and flags `made_by`; `state.pt` and a manifest; keep
    the newest `keep`. With LoRA the policy's adapters are in the state, and merged into the weights
    of `policy/`. Where those are rounded to a source's bfloat16, the weights that are trained are
    in the state as well. What is sharded is gathered."""
    folder = run / "checkpoints" / f"{update:06d}"
    weights = whole({held_elsewhere(key): x for key, x in policy.state_dict().items()})
    heads, state = whole(trained_state(critic)) if critic else {}, whole(state)
    adapters = {name: x for name, x in weights.items() if "lora_" in name}
    if not adapters and policy.source_dtype != policy.dtype:
        state["policy"] = weights

    def write(into: Path) -> None:
        save_policy(policy, into / "policy", weights)
        tokenizer.save_pretrained(into / "policy")
        (into / "policy" / "README.md").write_text(card, encoding="utf-8")
        if critic is not None:
            save_critic(critic, heads, into / "critic", {"update": update, **made_by})
        torch.save({**state, "adapters": adapters}, into / "state.pt")
        if not complete_checkpoints(run):  # the first one is read back: better now than after a day
            saved_policy(into / "policy", "auto")
            kept = kept_weights(into / "critic", critic) if critic else {}
            if shapes(kept) != shapes(heads):
                raise RuntimeError("the critic's weights do not come back as they are")

    write_whole(folder, write, keep)


def held_elsewhere(name: str) -> str:
    """The name in the files of a weight of `processes.Head`, which is the decoder's."""
    return re.sub(r"^.*\.lm_head\.", "lm_head.", name)


@by_first
def write_whole(folder: Path, write: Callable[[Path], None], keep: int) -> None:
    """A checkpoint's folder as `write` fills it, or, whatever happens, none; of its run's older ones
    the newest stay, `keep` in all."""
    run, temporary = folder.parents[1], folder.with_name(f"tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write(temporary)
        (temporary / "manifest.json").write_text(json.dumps(digests(temporary)))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        for old in complete_checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        stop(
            f"{folder}: the checkpoint could not be written ({first_line(error)}); what was saved "
            f"before is whole, and --resume {run} goes on from it"
        )


def restore(
    folder: Path, state: dict[str, Any], policy, critic, optimizer
) -> tuple[dict[str, Any], int]:
    """Give policy, critic and optimizer what `load_checkpoint` found; returns the scales of the
    rewards, and how many problems have been drawn. Stops with one sentence where a checkpoint, whole
    as it may be, is another run's, or an older version's."""
    try:
        restore_policy(policy, folder, state)
        if critic is not None:
            restore_critic(critic, kept_weights(folder.with_name("critic"), critic))
        restore_optimizer(optimizer, state["optimizer"])
        scales = state["scale"].items()
        scales = {name: pair and (float(pair[0]), float(pair[1])) for name, pair in scales}
        return scales, int(state["problems"])
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
        saved = saved_policy(folder)
    own = {name: like(saved[held_elsewhere(name)], x) for name, x in mine.items()}
    policy.load_state_dict(own)


def saved_policy(folder: Path, dtype: torch.dtype | str = torch.float32) -> dict[str, Tensor]:
    """The weights in a checkpoint's policy/."""
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    if lacks := sorted(told["missing_keys"]):
        raise ValueError(f"its policy lacks {', '.join(lacks[:3])}")
    return model.state_dict()


def restore_critic(critic: nn.Module, saved: dict[str, Tensor]) -> None:
    """Give the critic the trained weights of a checkpoint."""
    if shapes(saved) != shapes(trained_state(critic)):
        stop(
            "--resume: the run's critic has other parts or sizes; leave the critic's flags as they were"
        )
    own = dict(critic.named_parameters())
    critic.load_state_dict({k: like(x, own[k]) for k, x in saved.items()}, strict=False)


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """`load_state_dict`, which looks at the number of parameters alone, and a look at the rest. The
    learning rates are those of the flags, which may be other ones now."""
    before = [dict(group) for group in optimizer.param_groups]
    parameters = [parameter for group in before for parameter in group["params"]]
    for i, moments in saved["state"].items() if processes.SHARDED else ():
        moments |= {key: like(x, parameters[i]) for key, x in moments.items() if x.dim()}
    optimizer.load_state_dict(saved)
    for mine, group in zip(before, optimizer.param_groups, strict=True):
        settings = mine.keys() - {"params", "lr"}
        if any(group.get(key, mine[key]) != mine[key] for key in settings):
            raise ValueError("its optimizer has other settings")
        group["lr"] = mine["lr"]
    if len({frozenset(moments) for moments in optimizer.state.values()}) > 1:
        raise ValueError("its optimizer lacks moments")
    for parameter, moments in optimizer.state.items():
        if any(x.dim() and x.shape != parameter.shape for x in moments.values()):
            raise ValueError("its optimizer's moments have other sizes than the parameters")


def trained_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state of the parameters that are trained: what is frozen is loaded again from where it
    came."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def buffers(module: nn.Module) -> dict[str, Tensor]:
    """What a model keeps beside its parameters, such as the biases of a mixture's router."""
    parameters = {name for name, _ in module.named_parameters()}
    return {name: x for name, x in module.state_dict().items() if name not in parameters}


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in state.items()}


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


# ---- the critic ----


def save_critic(
    critic: nn.Module, state: dict[str, Tensor], folder: Path, made_by: dict[str, Any]
) -> None:
    """Write what of a critic is trained, `state`: its backbone, if it has one of its own, in Hugging Face
    format; the rest, heads and with LoRA the backbone's adapters, as head.safetensors; and
    critic.json: script, update and flags."""
    folder.mkdir()
    head = {name: x.cpu().contiguous() for name, x in state.items()}
    if "backbone" in dict(critic.named_children()):
        own = [name for name in head if name.startswith("backbone.") and "lora_" not in name]
        backbone = buffers(critic.backbone)
        backbone |= {name.removeprefix("backbone."): head.pop(name) for name in own}
        save_merged(critic.backbone, folder, torch.float32, backbone)
    save_file(head, folder / "head.safetensors")
    (folder / "critic.json").write_text(json.dumps(made_by, indent=1))


def kept_weights(folder: Path, critic: nn.Module) -> dict[str, Tensor]:
    """The trained weights of a kept critic by the names that they have in `critic`; of a backbone
    the adapters where `critic` has adapters, else all weights, adapters merged."""
    head = load_file(folder / "head.safetensors")
    if any("lora_" in name for name in trained_state(critic)):
        return head
    head = {name: x for name, x in head.items() if "lora_" not in name}
    if not (folder / "config.json").exists():
        return head
    backbone, told = transformers.AutoModel.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    if lacks := sorted(told["missing_keys"]):
        raise ValueError(f"its critic lacks {', '.join(lacks[:3])}")
    return head | {f"backbone.{name}": x.detach() for name, x in backbone.named_parameters()}


def origin(flag: str, folder: Path) -> dict[str, Any]:
    """What critic.json says: the script, the update, the flags."""
    try:
        found = parse((folder / "critic.json").read_text(encoding="utf-8"))
        if not isinstance(found["script"], str) or not isinstance(found["model"], str):
            raise ValueError("it names no script and model")
        return found
    except (OSError, ValueError, KeyError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        stop(
            f"{flag} {folder}: no critic is there ({reason}); give the folder "
            "checkpoints/<update>/critic of a run (GRPO and VinePPO have none)"
        )


def script_of(flag: str, folder: Path) -> ModuleType:
    """The script that made a critic, which alone knows how its values are read. It is imported when
    the program runs, by the name in critic.json: no module of utils/ needs a script to be there."""
    name = origin(flag, folder)["script"]
    if not name.isidentifier() or not (Path(__file__).parents[1] / f"{name}.py").is_file():
        stop(f"{flag} {folder}: it was made by {name}.py, which does not lie beside utils/")
    script = importlib.import_module(name)
    if not all(hasattr(script, part) for part in ("Args", "Critic", "score_tokens")):
        stop(f"{flag} {folder}: {name}.py has no Args, Critic and score_tokens to read it with")
    return script


def start_critic(critic: nn.Module, args: Any) -> nn.Module:
    """The critic, with --critic-init its weights those of a critic that a run has kept. One that
    --resume is going to restore is left as it is."""
    if args.critic_init is None or (args.resume and complete_checkpoints(args.resume)):
        return critic
    flag, folder = "--critic-init", Path(args.critic_init)
    made, script = origin(flag, folder), Path(sys.argv[0]).stem
    if made["script"] != script:
        other = script_of(flag, folder).Critic
        if inspect.getsource(other) != inspect.getsource(type(critic)):
            stop(f"{flag} {folder}: {made['script']}.py made it, whose Critic is not {script}.py's")
    same = ["quantile_heads", "quantiles"]  # of which the weights have the product alone
    for name in same + ["lora_rank", "model"] * bool(args.lora_rank):  # adapters to frozen weights
        if made.get(name) != getattr(args, name, None):
            stop(f"{flag} {folder}: it was made with --{name.replace('_', '-')} {made.get(name)}")
    fill(critic, flag, folder)
    return critic


def fill(critic: nn.Module, flag: str, folder: Path) -> None:
    """Give `critic` the weights of a kept one."""
    try:
        saved = kept_weights(folder, critic)
    except Exception as error:  # a foreign file can be anything
        stop(f"{flag} {folder}: could not be read ({first_line(error)})")
    there, wanted = shapes(saved), shapes(trained_state(critic))
    if differing := sorted(n for n in there | wanted if there.get(n) != wanted.get(n)):
        name = min(differing, key=lambda n: n.startswith("backbone."))  # a head says more
        stop(
            f"{flag} {folder}: it does not fit --model and the critic's flags: its {name} is "
            f"{there.get(name, 'missing')}, where {wanted.get(name, 'none')} is wanted"
        )
    critic.load_state_dict(saved, strict=False)
