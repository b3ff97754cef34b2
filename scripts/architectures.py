"""Every causal language model class of transformers, as a tiny random model: does ptq find, quantize and load it?

Configurations are shrunk by the names of their fields. What a model type needs beyond that is data (EXCEPTIONS). Each
class is tried in a process of its own, with a time limit; nothing in ptq knows what is tried here.
"""

import argparse
import datetime
import fcntl
import importlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCUMENT = ROOT / "scripts/architectures.json", ROOT / "docs/architectures.md"
SECONDS = 240
# Relative distance of two sets of logits that float32 arithmetic in another order may give.
EQUAL = 2e-4

# Field name -> value, the first pattern that matches; None leaves the field out. Only numbers are replaced.
FIELDS: tuple[tuple[str, Any], ...] = (
    (r"((unpadded_)?vocab_size|vocabulary_size|vocab_size_per_layer_input)", 288),
    (r"(num_hidden_layers|n_layers?|num_layers|(num_)?(encoder|decoder)_layers)", 2),
    (r"(num_attention_heads|n_heads?|num_heads|(num_)?(encoder|decoder)_attention_heads)", 4),
    (r"(num_key_value_heads|n_head_kv|num_kv_heads|n_kv_heads|swa_num_key_value_heads)", 2),
    (r"(num_global_key_value_heads|swa_num_attention_heads)", 4),
    (r"(hidden_size|d_model|n_embd|embed_dim|word_embed_proj_dim|(input_)?embedding_size|dim_model|emb_dim)", 32),
    (r"(moe_intermediate_size|expert_ffn_hidden_size|ffn_hidden_size|shared_intermediate_size)", 32),
    (r"(.*intermediate_size.*|.*ffn_dim|d_ff|n_inner|dim_ff|ffn_size|.*_mlp_hidden_size|lru_width|block_ff_dim)", 64),
    (r"(.*head_dim|head_size|kv_channels|d_kv)", 8),
    (r".*(lora_rank|_rank|lora_dim)", 16),
    (r"((original_)?max_position_embeddings|n_positions|n_ctx|max_(sequence_length|target_positions|seq_len))", 64),
    (r"(seq_length|max_source_positions)", 64),
    (r"(num_local_experts|n_routed_experts|num_experts|moe_num_experts)", 4),
    (r"(num_experts_per_tok|moe_topk|moe_k|num_experts_per_token|top_k_experts|moe_top_k)", 2),
    (r"(n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts|moe_num_shared_experts)", 1),
    (r"(first_k_dense_replace|num_dense_layers|moe_layer_start_index|first_num_dense_layers)", 1),
    (r"(sliding_window|attention_window|local_attention|window_size|attention_chunk_size)", 16),
    (r"(pad_token_id|decoder_start_token_id)", 0),
    (r"bos_token_id", 256),
    (r"eos_token_id", 257),
    (r"(hidden_size_per_layer_input|rotary_dim)", 8),
    (r"dff", 64),
    (r"(num_kv_shared_layers|num_nextn_predict_layers|mtp_num_layers)", 0),
)  # fmt: skip
# What else one model type needs: fields, nested ones with a dot; "is_decoder" makes an encoder class causal.
MIXTURE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "cohere_compass_text": {
        "rope_parameters": {
            k: {"rope_type": "default", "rope_theta": 1e4} for k in ("full_attention", "sliding_attention")
        }
    },
    "deepseek_v2": MIXTURE,
    "dory": {
        "layer_types": ["sliding_attention", "full_attention"],
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 0,
    },
    "dots1": MIXTURE,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "inkling2_loop_text": {
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "head_dim": 8, "qk_head_dim": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "ngram_vocab_size_base": 512,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}
DECODER = {"is_decoder": True}
# Attention to an encoder that is not there, and projections used without being called: they stay in float.
NOT_CALLED = ("*encoder_attn*", "*crossattention*", "*cross_attn*", "*.dt_proj")
TEXT_FILE = "calibration.txt"


def shrunk(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of a configuration by the rules, those of nested text configurations too."""
    small: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and name.endswith("_config"):
            small[name] = shrunk(value)
        elif name in ("layer_types", "layers_block_type", "block_types", "mlp_layer_types") and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            small[name] = (kinds * 2)[:2]
        elif type(value) is int:
            rule = next((new for pattern, new in FIELDS if re.fullmatch(pattern, name)), value)
            small[name] = rule
        elif value is None and name in ("bos_token_id", "eos_token_id"):
            small[name] = {"bos_token_id": 256, "eos_token_id": 257}[name]
    small.pop("transformers_version", None)
    if "kv_lora_rank" in values and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]  # latent attention has no groups
    return small


def tiny_config(model_type: str) -> Any:
    """A configuration of two small layers."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    default = cls()
    fields = shrunk(default.to_dict())
    if hasattr(default, "is_decoder"):
        fields |= DECODER
    for name, value in EXCEPTIONS.get(model_type, {}).items():
        place, *inner = name.split(".")
        if inner:
            fields.setdefault(place, {})[inner[0]] = value
        elif value is None:
            fields.pop(name, None)
        else:
            fields[name] = value
    return cls(**fields)


def randomize(model: Any) -> None:
    """Weights that carry signals, and norms with a few large channels; anything else keeps the model's own values."""
    import torch

    from ptq.models.structure import linears, weight_of

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, module in linears(model):
            weight = weight_of(module)
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 3 and "expert" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
            elif "embed" in name and parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            elif "norm" in name and name.endswith("weight") and parameter.dim() == 1:
                gains = torch.exp(torch.randn(parameter.shape, generator=generator) * 0.3)
                gains[: max(1, len(gains) // 16)] *= 4
                parameter.mul_(gains)


def distance(one: Any, other: Any) -> float:
    """Root mean square difference, relative to the second."""
    return float((one - other).square().mean().sqrt() / other.square().mean().sqrt().clamp(min=1e-30))


def attempt(model_type: str, connection: Any) -> None:
    """Try one class and send what was found, step by step, so that a crash leaves the last step."""
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.simplefilter("ignore")
    sys.stderr = sys.stdout = io.StringIO()
    row: dict[str, Any] = {}

    def tell(**facts: Any) -> None:
        row.update(facts)
        connection.send(dict(row))

    with tempfile.TemporaryDirectory() as directory:
        try:
            _attempt(model_type, Path(directory), tell)
        except Exception as error:  # noqa: BLE001  (whatever a model does, the table says so)
            lines = str(error).strip().splitlines() or [""]
            tell(reason=f"{type(error).__name__}: {lines[0][:300]}")


def _attempt(model_type: str, place: Path, tell: Any) -> None:
    import tiny_models
    import torch
    from transformers import AutoModelForCausalLM

    import ptq
    from ptq.config import matches
    from ptq.evaluate import streamed
    from ptq.models.structure import find_blocks, linears
    from ptq.runtime import open_checkpoint, open_stream

    torch.set_num_threads(1)
    tell(step="building the model")
    config = tiny_config(model_type)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model)
    batch = tiny_models.tokens(2, 24, 1)
    tell(cls=type(model).__name__, step="running the model itself")
    logits = tiny_models.logits(model, batch)
    tell(step="finding the blocks")
    blocks = find_blocks(model)
    tell(blocks=blocks, linears=sum(1 for _ in linears(model.get_submodule(blocks))), step="saving the model")
    parent = tiny_models.save(model, place / "parent")
    (parent / TEXT_FILE).write_text(tiny_models.TEXT.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    tell(step="running it block by block")
    found = torch.stack([*streamed(open_stream(open_checkpoint(parent), torch.device("cpu")))([batch])])
    error = distance(found.float(), logits)
    tell(streamed=error)
    if not error < EQUAL:
        raise AssertionError(f"block by block the logits are off by {error:.1e}")
    names = [path for path, _ in linears(model)]
    exclude = ("lm_head", *(pattern for pattern in NOT_CALLED if any(matches(pattern, name) for name in names)))
    for method in ("gptq", "awq"):
        tell(step=method.upper())
        report = tiny_models.run(settings(parent, place / method, method, exclude))
        rows = report.modules.values()
        gain = sum(r["loss_to_rounding"] for r in rows) / len(rows)
        tell(**{method: {"modules": len(rows), "loss_to_rounding": gain}})
        if method == "awq":
            kept = [r for r in rows if r["fold"]]
            dropped = sorted({text for r in rows for text in r["rescues"] if text.startswith("folds")})
            tell(folds={"folded": len(kept), "modules": len(rows), "dropped": dropped})
        tell(step=f"loading the {method.upper()} checkpoint")
        loaded = ptq.load(place / method, device="cpu", warmup=False)
        error = distance(tiny_models.logits(loaded, batch), tiny_models.logits(dense(parent, loaded), batch))
        tell(**{f"{method}_reload": error})
        if not error < EQUAL:
            raise AssertionError(f"the loaded {method.upper()} checkpoint is off by {error:.1e}")
    tell(step="done")


def dense(parent: Path, loaded: Any) -> Any:
    """The parent with the weights of a loaded checkpoint as dense ones."""
    import torch

    import ptq
    from ptq.models.structure import linears, set_weight
    from ptq.nn import QuantLinear

    model = ptq.load(parent, device="cpu")
    packed = {path: module for path, module in loaded.named_modules() if isinstance(module, QuantLinear)}
    for path, module in linears(model):
        if path in packed:
            set_weight(module, packed[path].dequantize(torch.float32))
    model.load_state_dict(loaded.state_dict(), strict=False)
    return model


def settings(parent: Path, output: Path, method: str, exclude: tuple[str, ...]) -> Any:
    """A run of 8 sequences of 24 tokens, 4 bits, one group a row: fits any shape."""
    import tiny_models

    from ptq.config import AWQConfig, CalibrationConfig, DatasetConfig

    text = DatasetConfig(files=(str(parent / TEXT_FILE),))
    calibration = CalibrationConfig(dataset=text, samples=8, sequence_length=24, batch_size=8)
    return tiny_models.settings(
        parent, output, method, group_size=-1, format="compressed-tensors", calibration=calibration,
        awq=AWQConfig(grid=2), exclude=exclude,
    )  # fmt: skip


def tried(model_type: str, seconds: float) -> dict[str, Any]:
    """Try one class in a process of its own."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=attempt, args=(model_type, theirs))
    process.start()
    theirs.close()
    row: dict[str, Any] = {"step": "starting"}
    limit = datetime.datetime.now() + datetime.timedelta(seconds=seconds)
    while True:
        left = (limit - datetime.datetime.now()).total_seconds()
        try:
            if left <= 0 or not mine.poll(left):
                row["reason"] = f"not finished after {seconds:.0f} s"
                break
            row = mine.recv()
        except EOFError:
            break
    if process.is_alive() and "reason" in row:
        process.kill()
    process.join()
    if row.get("step") != "done" and "reason" not in row:
        row["reason"] = f"the process ended with {process.exitcode}"
    return row


def works(row: dict[str, Any]) -> bool:
    """Found, quantized both ways, loaded back."""
    return row.get("step") == "done"


def document(results: dict[str, Any]) -> str:
    """The text of docs/architectures.md."""
    rows = results["classes"]
    good = {kind: row for kind, row in rows.items() if works(row)}
    part = {kind: row for kind, row in rows.items() if kind not in good and "gptq_reload" in row}
    bad = {kind: row for kind, row in rows.items() if kind not in good and kind not in part}
    lines = [
        "# Architectures", "",
        f"A tiny random model of {len(rows)} model types for which transformers "
        f"{results['transformers']} has a causal language model class, tried on {results['date']} by",
        "", "    scripts/architectures", "",
        "which writes this page. Tried are: finding the decoder blocks; running block by block (logits equal the "
        "model's own); GPTQ and AWQ at 4 bits; AWQ's folds, each proven on the block; loading the checkpoint back "
        "(logits equal those of the dequantized weights). Nothing in `ptq` knows these names: what works, works by "
        "structure. Attention to an encoder that is not there and projections that are used without being called, "
        f"{' '.join(f'`{each}`' for each in NOT_CALLED)}, were in `exclude`, as the error says that names them.", "",
        "A model type is tried by its causal class alone. Llama 3.2 Vision (`mllama`) is listed by that of its text "
        "model; its class with a vision tower skips its cross-attention blocks where there is no image, and is not "
        "supported.", "",
        f"**{len(good)} model types ({len({r['cls'] for r in good.values()})} classes) work** with GPTQ and AWQ, "
        f"{len(part)} more with GPTQ.", "",
        "`loss` is the mean of each Linear's loss as a share of what plain rounding loses, on random weights. `folds` "
        "is how many Linears got channel scales.", "",
        "| model type | class | blocks | Linears | GPTQ loss | AWQ loss | folds |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for kind, row in sorted(good.items()):
        folds = f"{row['folds']['folded']} of {row['folds']['modules']}"
        lines.append(
            f"| {kind} | {row['cls']} | `{row['blocks']}` | {row['gptq']['modules']} | "
            f"{row['gptq']['loss_to_rounding']:.2f} | {row['awq']['loss_to_rounding']:.2f} | {folds} |"
        )
    for title, chosen in (("GPTQ only", part), ("Not working", bad)):
        lines += ["", f"## {title}", "", "| model type | class | failed at | reason |", "|---|---|---|---|"]
        for kind, row in sorted(chosen.items()):
            reason = row["reason"].replace("|", "\\|")
            lines.append(f"| {kind} | {row.get('cls', '')} | {row['step']} | {reason} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    """Try the model types named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--document", action="store_true", help="only write docs/architectures.md")
    parser.add_argument("--missing", action="store_true", help="only those that do not work yet")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--share", default="0/1", help="i/n: every n-th model type, from the i-th")
    chosen = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT / "tests"))
    if not chosen.document:
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        for each in ("tiny_models", "ptq.runtime", "torch._dynamo"):  # loaded once, before the processes are forked
            importlib.import_module(each)
        transformers.logging.set_verbosity_error()
        which, of = map(int, chosen.share.split("/"))
        done = json.loads(RESULTS.read_text())["classes"] if chosen.missing and RESULTS.exists() else {}
        kinds = chosen.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)[which::of]
        kinds = [kind for kind in kinds if kind not in done or not works(done[kind])]
        for kind in kinds:
            row = tried(kind, chosen.seconds)
            with open(RESULTS, "a+", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # several shares may run at once
                file.seek(0)
                results = json.loads(file.read() or '{"classes": {}}')
                results |= {"transformers": transformers.__version__, "date": str(datetime.date.today())}
                results["classes"] = dict(sorted((results["classes"] | {kind: row}).items()))
                file.truncate(0)
                file.write(json.dumps(results, indent=1) + "\n")
            print(kind, "works" if works(row) else f"{row['step']}: {row.get('reason')}", flush=True)
    DOCUMENT.write_text(document(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main(sys.argv[1:])
