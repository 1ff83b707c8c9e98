"""Loading and saving of models, LoRA, and the device."""

import copy
import os
import warnings

import torch
import transformers  # lazily: its parts are imported when they are used
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from utils import tensors
from utils.args import check_flags
from utils.chat import Chat, turn_ends
from utils.errors import first_line, stop
from utils.keyed import seed_torch
from utils.scale import processes
from utils.scale.allocator import keep_freed_memory

disable_progress_bar()
set_verbosity_error()


def load_policy(
    name: str, device: torch.device, lora_rank: int = 0, dtype: torch.dtype = torch.float32, system: str | None = None,
    thinking: bool = False,
) -> tuple[nn.Module, Chat]:  # fmt: skip
    """A causal LM with dropout off, and its chat format. Its weights are in float32; with
    `lora_rank` they are frozen, in `dtype`, and LoRA adapters on every linear layer but the LM head
    are what can be trained. Stops with one sentence if `name` does not load."""
    save_waits()
    looks_local = os.path.isdir(name) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not os.path.isfile(os.path.join(name, "config.json")):
        stop(
            f"--model {name}: no such folder with a config.json (give a Hugging Face folder or a hub id)"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype if lora_rank else torch.float32, output_loading_info=True
        )
        check_whole(f"--model {name}", model, tokenizer, found)
        if any("Classification" in kind for kind in model.config.architectures or []):
            stop(f"--model {name}: a classifier, whose head writes no tokens; give a causal LM")
        model.source_dtype = transformers.AutoConfig.from_pretrained(name).dtype or torch.float32
        eos_ids = eos_of(model, tokenizer)
        if not eos_ids:
            stop(
                f"--model {name}: neither its generation config nor its tokenizer names an EOS token"
            )
        check_model(model, name, eos_ids)
    except Exception as error:  # the files of others can be broken in any way
        stop(f"--model {name}: could not be loaded ({first_line(error)})")
    # nothing but EOS is inherited: a model's own top-k or repetition penalty would bias the ratios
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=eos_ids, pad_token_id=eos_ids[0]
    )
    if lora_rank:
        from peft import LoraConfig, get_peft_model  # takes seconds: imported only where it is used

        config = LoraConfig(
            r=lora_rank,
            lora_alpha=2 * lora_rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            model = get_peft_model(model, config)  # it reads an attribute by transformers' old name
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # Phi: beyond this all keys would be rotated otherwise,
        context = rope["original_max_position_embeddings"]  # and those in a cache are not
    for part in model.modules():  # learned positions end, rotary ones only grow unfamiliar
        if type(part) is nn.Embedding and part.num_embeddings == context:
            part.register_forward_pre_hook(refuse_further_positions)
    if not processes.SHARDED:  # what is to be divided goes to the GPU in parts (`memory.place`)
        model.to(device)
    return model.eval(), Chat(tokenizer, eos_ids, system, thinking, context)


def save_waits() -> None:
    """In every pass transformers asks whether a mask hides nothing, and whether rows are several
    sequences in one, and waits for the GPU to tell. Here a mask is given where it hides something;
    rows are one."""
    transformers.masking_utils.fast_all = lambda mask: False
    transformers.masking_utils.find_packed_sequence_indices = lambda position_ids: None


def refuse_further_positions(positions: nn.Embedding, inputs: tuple[torch.Tensor]) -> None:
    """Stop where a conversation of several turns has outgrown the learned positions."""
    if inputs[0].max() >= positions.num_embeddings:
        stop(
            f"--max-turns, --max-new-tokens: a conversation is longer than the {positions.num_embeddings} "
            "positions that the model has learned; lower them"
        )


def eos_of(model: nn.Module, tokenizer) -> list[int]:
    """Every token that ends a turn: those of the generation config, the tokenizer's, the
    template's."""
    named = [model.generation_config.eos_token_id, tokenizer.eos_token_id, turn_ends(tokenizer)]
    ids = {i for x in named if x is not None for i in (x if isinstance(x, list) else [x])}
    return sorted(i for i in ids if i < model.get_input_embeddings().num_embeddings)


def check_whole(what: str, model: nn.Module, tokenizer, found: dict) -> None:
    """Stop where the files lack weights of the model (`found` is what from_pretrained tells; the
    missing ones are random), or the model an embedding for a token."""
    missing = sorted(found["missing_keys"])
    if missing:
        stop(
            f"{what}: its files lack {len(missing)} weights of {type(model).__name__} ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}), which would be random; give a checkpoint that has them"
        )
    tokens = max(tokenizer.get_vocab().values()) + 1
    rows = model.get_input_embeddings().num_embeddings
    if tokens > rows:
        stop(
            f"{what}: its tokenizer has {tokens} tokens, its embedding {rows} rows; "
            "model.resize_token_embeddings adds the others"
        )


def twin(module: nn.Module) -> nn.Module:
    """A copy that has the module's frozen parameters in common with it: of a model with LoRA it
    copies no more than the adapters, of any other everything."""
    frozen = {id(p): p for p in module.parameters() if not p.requires_grad}
    return copy.deepcopy(module, frozen)


def frozen(module: nn.Module) -> nn.Module:
    """A twin that is not trained. Under --dtype bfloat16 its linear layers are in that: of what is
    not trained autocast keeps no casts, and would make them in every pass, of a head for every
    chunk of logits."""
    copied = twin(module).requires_grad_(False)
    for part in copied.modules() if tensors.HALF else ():
        for name, own in part.named_parameters(recurse=False):
            if type(part) is nn.Linear:  # an embedding stays as it is
                setattr(part, name, nn.Parameter(own.bfloat16(), requires_grad=False))
    return copied


def has_adapters(policy: nn.Module) -> bool:
    """Whether it was loaded with LoRA: then it is peft's wrapper of a transformers model, else that
    model itself."""
    return hasattr(policy, "get_base_model")


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def save_policy(policy: nn.Module, folder: str | os.PathLike, weights: dict | None = None) -> None:
    """Write the policy as plain transformers loads it, in the dtype that it came in. `weights`,
    where they are not to be asked of the policy."""
    model = policy.get_base_model() if has_adapters(policy) else policy
    save_merged(model, folder, policy.source_dtype, weights)


@torch.no_grad()
def save_merged(
    model: nn.Module,
    folder: str | os.PathLike,
    dtype: torch.dtype,
    weights: dict | None = None,
) -> None:
    """Write a transformers model, its adapters, if it has such, merged into the weights, layer by
    layer. The model itself stays as it is. `weights`, where they are not to be asked of it."""
    own = model.state_dict()
    if weights is None or any("lora_" in name for name in own):
        weights = own
    state = {
        name.replace(".base_layer", ""): x for name, x in weights.items() if "lora_" not in name
    }
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            part = getattr(layer, "parameter_name", "weight")  # all experts are one tensor
            weight = getattr(layer.get_base_layer(), part)
            state[f"{name.replace('.base_layer', '')}.{part}"] = (
                weight.float() + layer.get_delta_weight("default").float()
            ).to("cpu", dtype)
    copies = {}  # of each tensor one: transformers knows tied weights by their address
    for name, x in state.items():
        if x.data_ptr() not in copies:
            copies[x.data_ptr()] = x.to("cpu", dtype if x.is_floating_point() else x.dtype)
        state[name] = copies[x.data_ptr()]
    model.save_pretrained(folder, state_dict=state)
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.save_pretrained(folder)


@torch.no_grad()
def check_model(model: nn.Module, name: str, ids: list[int]) -> None:
    """Stop unless the model is what the scripts take it for: its logits are lm_head(hidden states),
    as they apply the head themselves, to chosen tokens only, and it decodes through transformers'
    DynamicCache, token by token."""
    kind = type(model).__name__
    tokens = torch.tensor([[*ids[:1], *range(5)]]).clamp(
        max=model.get_input_embeddings().num_embeddings - 1
    )
    if not hasattr(model, "lm_head"):
        stop(f"--model {name}: {kind} has no lm_head, which the scripts apply themselves")
    decoder = model.eval().get_decoder()
    hidden = decoder(input_ids=tokens).last_hidden_state
    if not torch.allclose(
        model.lm_head(hidden), model(input_ids=tokens).logits, rtol=1e-3, atol=1e-3
    ):
        stop(
            f"--model {name}: the logits of {kind} are not lm_head(hidden states), as the scripts compute them"
        )
    try:
        cache = DynamicCache(config=model.config)
        decoder(input_ids=tokens[:, :-1], past_key_values=cache, use_cache=True)
        cached = decoder(
            input_ids=tokens[:, -1:], past_key_values=cache, use_cache=True
        ).last_hidden_state
    except (AttributeError, TypeError, ValueError):
        cached = torch.full_like(hidden, torch.nan)
    scale = hidden[:, -1].abs().max()
    if (
        not (cached[:, -1] - hidden[:, -1]).abs().max()
        <= (0.1 if hidden.dtype == torch.bfloat16 else 1e-3) * scale
    ):
        stop(
            f"--model {name}: {kind} does not decode through transformers' DynamicCache, which the scripts use"
        )


def pick_device(name: str, deterministic: bool = False) -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU, where freed memory is kept for reuse. On a GPU
    products in float32 have mantissas of 10 bits (TF32), and take a fraction of the time; unless
    the same run twice is to be the same to the last bit, which is `deterministic`, and slower."""
    if name == "auto":
        others = [("cuda", torch.cuda), ("mps", torch.backends.mps)]
        name = next((kind for kind, there in others if there.is_available()), "cpu")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
        torch.use_deterministic_algorithms(True)
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        stop(f"--device {name}: not available here ({first_line(error)})")
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda" and not deterministic:
        torch.set_float32_matmul_precision("high")
    return processes.join(device)


def set_up(args) -> torch.device:
    """What a script does first: look at its flags, choose a device and a precision, meet the other
    processes."""
    check_flags(args)
    tensors.HALF = args.dtype == "bfloat16"
    return pick_device(args.device, args.deterministic)


def start_policy(args, device: torch.device) -> tuple[nn.Module, Chat]:
    """`load_policy`, as a script's flags say."""
    seed_torch(args.seed, "adapters")
    dtype = getattr(torch, args.dtype)
    return load_policy(args.model, device, args.lora_rank, dtype, args.system_prompt, args.thinking)
