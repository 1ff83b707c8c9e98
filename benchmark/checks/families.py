"""Training sees the log-probabilities of decoding, or the model is refused: a tiny random model of
each family answers, and the training pass reads the answers again.

    python benchmark/checks/families.py

Prints the largest difference in nats; in float32 on a CPU it is rounding, about 1e-5.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from utils import tensors  # noqa: E402
from utils.generation import generate  # noqa: E402
from utils.models import check_model  # noqa: E402

EOS, PROMPTS = 2, [[5, 6, 7, 8, 9], [11, 12, 13]] * 2
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS, "initializer_range": 0.3,
}  # fmt: skip
HEAD, WINDOW = {"head_dim": 16}, {"sliding_window": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_layers": 2, "n_head": 2, "n_heads": 2, "d_model": 32}
MIXED = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
FOUR = MIXED | {"num_experts": 4}
ROUTED = MIXED | {
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}  # fmt: skip
LINEAR = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}  # fmt: skip
SHARED = FOUR | {"shared_expert_intermediate_size": 16}
STATES = {"num_heads": 4, "n_groups": 1, "state_size": 8}
CONVOLVED = {"layer_types": ["conv", "full_attention"]}
FAMILIES = {
    "Bloom": GPT, "Cohere": {}, "Cohere2": WINDOW, "DeepseekV2": ROUTED | LATENT,
    "DeepseekV3": ROUTED | LATENT, "Ernie4_5": HEAD, "Exaone4": WINDOW, "Falcon": {}, "Gemma": HEAD,
    "Gemma2": HEAD | WINDOW, "Glm": HEAD, "Glm4": HEAD, "Glm4Moe": ROUTED | HEAD, "GPTNeoX": {},
    "GptOss": MIXED | HEAD | WINDOW | {"num_local_experts": 4}, "Granite": {},
    "HunYuanDenseV1": HEAD, "Lfm2": CONVOLVED,
    "Lfm2Moe": FOUR | CONVOLVED | {"num_dense_layers": 1}, "Llama": {}, "Mamba2": HEAD | STATES,
    "MiniMaxM2": MIXED | HEAD | {"num_local_experts": 4}, "Mistral": WINDOW,
    "Mixtral": {"num_local_experts": 4}, "Mpt": GPT, "Nemotron": {}, "Olmo": {}, "Olmo2": {},
    "Olmo3": WINDOW, "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "Phi": {}, "Phi3": {},
    "Qwen2": {}, "Qwen2Moe": SHARED, "Qwen3": HEAD, "Qwen3Moe": FOUR | HEAD,
    "Qwen3Next": SHARED | HEAD | LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
    "SmolLM3": {}, "StableLm": {}, "Starcoder2": {},
}  # fmt: skip


@torch.no_grad()
def gap(name: str) -> float:
    """The largest |log pi in decoding - log pi in training| of some sampled answers; stops where the
    scripts would refuse the model."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | FAMILIES[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    check_model(model, name, [EOS])
    answers = generate(model, SimpleNamespace(pad_id=0, eos_ids=[EOS]), PROMPTS, 24, 1.0)
    rows = [
        SimpleNamespace(prompt=prompt, chosen=[True] * len(answer.tokens), **answer._asdict())
        for prompt, answer in zip(PROMPTS, answers, strict=True)
    ]
    (_, part), *_ = tensors.micro_batches(tensors.pack(rows, 0, model.device), len(rows))
    hidden = tensors.hidden_states(model.get_decoder(), part)
    logprobs, _ = tensors.logprobs_and_entropy(model.lm_head, hidden, part, 1.0)
    return ((logprobs - part["logprobs"]) * part["mask"]).abs().max().item()


def main() -> None:
    for name in FAMILIES:
        try:
            print(f"{name:16} {gap(name):.0e}", flush=True)
        except SystemExit as refusal:
            print(f"{name:16} {refusal}", flush=True)


if __name__ == "__main__":
    main()
