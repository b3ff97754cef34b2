"""``AutoModelForCausalLM.from_pretrained`` with packed weights on this project's kernels.

transformers decides in one place who reads a quantized checkpoint, `AutoHfQuantizer.merge_quantization_configs`. That
function is wrapped when transformers is imported: checkpoints of this project, calls with a `PtqConfig`, and after
`register(override=True)` all checkpoints in a layout that is read here go to `PtqQuantizer`; for everything else the
original is called. Nothing of transformers is imported here.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import wraps
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

TARGET = "transformers.quantizers.auto"
METHODS = ("gptq", "awq", "compressed-tensors", "auto-round")
_foreign = {"override": False}


def register(*, override: bool = True) -> None:
    """Let ``from_pretrained`` read checkpoints of other writers with this project's kernels as well.

    Without it transformers' own quantizers read them (which need gptqmodel, optimum or compressed-tensors), unless a
    call says ``quantization_config=ptq.PtqConfig()``. ``override=False`` goes back to that.
    """
    _foreign["override"] = override
    install()


def install() -> None:
    """Wrap transformers' choice of a quantizer, now or when transformers is imported."""
    module = sys.modules.get(TARGET)
    if module is not None:
        _wrap(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds one module as Python itself does, and has it wrapped once it is executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != TARGET:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _wrap(module)

            setattr(spec.loader, "exec_module", exec_module)  # noqa: B010  (mypy refuses to assign a method)
        return spec


def _wrap(module: Any) -> None:
    chooser = module.AutoHfQuantizer
    original = chooser.merge_quantization_configs
    if getattr(original, "__wrapped__", None) is not None:
        return

    @wraps(original)
    def merge(quantization_config: Any, quantization_config_from_args: Any = None) -> Any:
        stored = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
        asked = type(quantization_config_from_args).__name__ == "PtqConfig"
        if asked or (is_ours(stored) and _is_of_file(module, quantization_config_from_args, stored)):
            from ptq.integration.quantizer import PtqConfig

            wanted = quantization_config_from_args if asked else PtqConfig()
            return wanted.of_file(stored)
        return original(quantization_config, quantization_config_from_args)

    chooser.merge_quantization_configs = staticmethod(merge)


def _is_of_file(module: Any, given: Any, stored: Mapping[str, Any]) -> bool:
    """Whether an argument says no more than the file: there is none, or it was made of what the file says.

    lm-evaluation-harness hands back the configuration that it found.
    """
    if given is None:
        return True
    try:
        made = module.AutoQuantizationConfig.from_dict(dict(stored))
    except (ValueError, TypeError, ImportError):  # transformers does not know it
        return False
    return type(made) is type(given) and bool(made.to_dict() == given.to_dict())


def is_ours(settings: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this ``quantization_config`` is read here without being asked for."""
    writers = (settings.get("meta") or settings).get("quantizer") or ()
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")))
    return (_foreign["override"] and method in METHODS) or any(str(each).startswith("ptq:") for each in writers)
