"""Post-training quantization of causal language models: calibrate, solve, pack, run, measure."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptq.config import load_config as load_config
    from ptq.integration import register as register
    from ptq.integration.quantizer import PtqConfig as PtqConfig
    from ptq.pipeline import quantize as quantize
    from ptq.plain import quantize_linears as quantize_linears
    from ptq.runtime import load as load

_PUBLIC = {
    "PtqConfig": "ptq.integration.quantizer",
    "load": "ptq.runtime",
    "load_config": "ptq.config",
    "quantize": "ptq.pipeline",
    "quantize_linears": "ptq.plain",
    "register": "ptq.integration",
}

__all__ = ["PtqConfig", "load", "load_config", "quantize", "quantize_linears", "register"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in {"adapters", "evaluate", "gptq", "awq", "formats", "nn"}:
        return import_module(f"ptq.{name}")
    raise AttributeError(f"module 'ptq' has no attribute {name!r}; it offers {', '.join(__all__)}")


# From here on transformers knows where packed checkpoints are read; nothing of it is imported.
import_module("ptq.integration").install()
