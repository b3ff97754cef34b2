"""Parents that the examples lack: random models of two blocks, a mixture of experts and one with a vision tower."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

IMAGE = "<image>"
TEXT = {"vocab_size": 8256, "bos_token_id": 0, "eos_token_id": 1, "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
        "max_position_embeddings": 1024, "tie_word_embeddings": False, "initializer_range": 0.06}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
TOWER = {"model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
         "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "projection_dim": 128}  # fmt: skip
# What the processor of LLaVA is made of; vLLM asks for it, though no image is shown.
IMAGES = {
    "preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32},
                                 "crop_size": {"height": 32, "width": 32}},
    "processor_config.json": {"processor_class": "LlavaProcessor", "image_token": IMAGE, "patch_size": 8,
                              "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
}  # fmt: skip


def make(name: str, tokenizer: Path, place: Path) -> Path:
    """Write ``mixtral`` or ``llava``, in bfloat16, where it is not there yet; the tokenizer is another model's."""
    from transformers import AutoTokenizer

    if place.is_dir():
        return place
    unfinished = place.with_name(f"{place.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    tokens = AutoTokenizer.from_pretrained(tokenizer)
    tokens.add_special_tokens({"additional_special_tokens": [IMAGE]})
    torch.manual_seed(0)
    _model(name, tokens.convert_tokens_to_ids(IMAGE)).to(torch.bfloat16).save_pretrained(unfinished)
    tokens.save_pretrained(unfinished)
    if name == "llava":
        _as_published(unfinished / "model.safetensors")
        for file, content in IMAGES.items():
            (unfinished / file).write_text(json.dumps(content))
    return unfinished.rename(place)


def _model(name: str, image: int) -> Any:
    import transformers

    if name == "mixtral":
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**TEXT, **EXPERTS))
    text = {"model_type": "llama", **TEXT}
    config = transformers.LlavaConfig(text_config=text, vision_config=TOWER, image_token_index=image)
    return transformers.LlavaForConditionalGeneration(config)


def _as_published(shard: Path) -> None:
    """The tower's names as files on the hub have them, and vLLM's modules."""
    renamed = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in load_file(shard).items()}
    save_file(renamed, shard, {"format": "pt"})
