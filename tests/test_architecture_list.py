"""docs/architectures.md says what scripts/architectures found. Oracles: its results; three classes, tried again."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import architectures  # noqa: E402


def test_the_document_is_the_one_of_the_results():
    results = json.loads(architectures.RESULTS.read_text())
    assert architectures.DOCUMENT.read_text() == architectures.document(results)


def test_a_row_is_in_the_table_of_what_it_reached():
    done = {
        "cls": "A", "step": "done", "blocks": "b", "linears": 2, "folds": {"folded": 1, "modules": 2},
        "gptq": {"modules": 2, "loss_to_rounding": 0.5}, "awq": {"modules": 2, "loss_to_rounding": 0.25},
    }  # fmt: skip
    half = {**done, "cls": "B", "step": "AWQ", "gptq_reload": 0.0, "reason": "one | two"}
    none = {"step": "building the model", "reason": "no"}
    text = architectures.document({"transformers": "5", "date": "d", "classes": {"a": done, "b": half, "c": none}})
    assert "| a | A | `b` | 2 | 0.50 | 0.25 | 1 of 2 |" in text
    assert "**1 model types (1 classes) work** with GPTQ and AWQ, 1 more with GPTQ." in text
    gptq_only, failing = text.partition("## GPTQ only")[2].split("## Not working")
    assert "| b | B | AWQ | one \\| two |" in gptq_only
    assert "| c |  | building the model | no |" in failing


def test_classes_that_work_still_do():
    # a process of its own: it forks, and starts without the threads of this one
    kinds = ["llama", "mixtral", "bert"]
    code = (
        "import sys; sys.path[:0] = ['scripts', 'tests', 'kernels']; import architectures as a, tiny_models\n"
        "from transformers import LlamaForCausalLM, MixtralForCausalLM\n"  # once, not in each fork
        f"for kind in {kinds}: row = a.tried(kind, 200); print(kind, row['step'], row.get('reason', ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    found = [line.strip() for line in done.stdout.splitlines()]
    assert found == [f"{kind} done" for kind in kinds], done.stdout + done.stderr


def test_configurations_shrink_by_the_names_of_their_fields():
    found = architectures.shrunk(
        {"hidden_size": 4096, "num_key_value_heads": 8, "num_attention_heads": 32, "kv_lora_rank": 512, "rope": 0.5,
         "text_config": {"num_hidden_layers": 40}, "layer_types": ["a", "a", "b"], "bos_token_id": None}
    )  # fmt: skip
    assert found == {
        "hidden_size": 32, "num_key_value_heads": 4, "num_attention_heads": 4, "kv_lora_rank": 16,
        "text_config": {"num_hidden_layers": 2}, "layer_types": ["a", "b"], "bos_token_id": 256,
    }  # fmt: skip


def test_a_process_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(architectures, "attempt", lambda kind, connection: __import__("time").sleep(60))
    assert architectures.tried("llama", 0.2) == {"step": "starting", "reason": "not finished after 0 s"}


def test_a_process_that_dies_says_so(monkeypatch):
    monkeypatch.setattr(architectures, "attempt", lambda kind, connection: __import__("os")._exit(3))
    assert architectures.tried("llama", 30) == {"step": "starting", "reason": "the process ended with 3"}
