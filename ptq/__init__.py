"""Post-training quantization of causal language models: calibrate, solve, pack, run, measure."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptq.config import load_config as load_config
    from ptq.pipeline import quantize as quantize
    from ptq.plain import quantize_linears as quantize_linears
    from ptq.runtime import load as load

_PUBLIC = {
    "load": "ptq.runtime",
    "load_config": "ptq.config",
    "quantize": "ptq.pipeline",
    "quantize_linears": "ptq.plain",
}

__all__ = ["load", "load_config", "quantize", "quantize_linears"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in {"evaluate", "gptq", "awq", "formats", "nn"}:
        return import_module(f"ptq.{name}")
    raise AttributeError(f"module 'ptq' has no attribute {name!r}; it offers {', '.join(__all__)}")
