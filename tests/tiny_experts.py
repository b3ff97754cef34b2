"""Small random mixtures of experts of every layout that transformers has."""

from types import SimpleNamespace

import torch
from tiny_models import GROUPED, randomize

EXPERTS = 4
USUAL = {**GROUPED, "intermediate_size": 64, "num_experts_per_tok": 2}
MLA = {
    **USUAL,
    "num_key_value_heads": 4,
    "n_routed_experts": EXPERTS,
    "moe_intermediate_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
}
CONFIGS = {
    "mixtral": ("MixtralConfig", {**USUAL, "num_local_experts": EXPERTS}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**USUAL, "num_experts": EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**USUAL, "num_experts": EXPERTS, "moe_intermediate_size": 32, "head_dim": 16}),
    "deepseek_v2": ("DeepseekV2Config", MLA),
    "deepseek_v3": ("DeepseekV3Config", {**MLA, "n_group": 2, "topk_group": 1}),
    "gpt_oss": ("GptOssConfig", {**USUAL, "num_local_experts": EXPERTS, "head_dim": 16}),
    "llama4": (
        "Llama4TextConfig",
        {**USUAL, "num_local_experts": EXPERTS, "intermediate_size_mlp": 64, "head_dim": 16},
    ),
}  # fmt: skip
# Of those classes that the tests of calibration need not see, what transformers' own reader is asked about.
OTHERS = {
    "granitemoe": ("GraniteMoeConfig", {**USUAL, "num_local_experts": EXPERTS}),
    "aria": ("AriaTextConfig", {**USUAL, "moe_num_experts": EXPERTS, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "olmoe": ("OlmoeConfig", {**USUAL, "num_experts": EXPERTS}),
    "phimoe": ("PhimoeConfig", {**USUAL, "num_local_experts": EXPERTS}),
}  # fmt: skip


def build(name, **changes):
    import transformers

    config, options = (CONFIGS | OTHERS)[name]
    made = getattr(transformers, config)(**{**options, **changes}, dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        flat = {}
        for key, parameter in model.named_parameters():
            if parameter.dim() == 3 or key.endswith("proj_bias"):  # not what `randomize` knows
                scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 3 else 0.1
                flat[key] = torch.randn(parameter.shape, generator=generator) * scale
        randomize(without(model, flat))
        model.load_state_dict(flat, strict=False)
    return model


def without(model, names):
    """The same parameters but some, as something that has named_parameters and get_submodule."""
    rest = [(key, p) for key, p in model.named_parameters() if key not in names]
    return SimpleNamespace(named_parameters=lambda: rest, get_submodule=model.get_submodule)
