"""What transformers itself, without ptq, does with compressed-tensors files, where that depends on a model's class."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ptq.models.conversion import Conversions
from ptq.models.experts import experts_of
from ptq.models.names import SourceNames
from ptq.models.structure import is_transposed


def left_out(model: nn.Module, names: SourceNames, packed: Iterable[str]) -> str:
    """The first packed Linear of an expert that transformers reads past, "" where it takes all.

    It puts the stacked parameters of a class together from one tensor for each expert only where its own conversions
    say so. Where they do not, the stacked parameters count as missing, and get random numbers.
    """
    from transformers.quantizers import base

    # Classes that its quantizers replace by a list of experts, of which each is read for itself.
    replaced: dict[str, Any] = getattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
    stacked = [path for path, pool in experts_of(model).items() if type(pool).__name__ not in replaced]
    conversions = Conversions(model)
    for name in packed:
        if name.startswith(tuple(f"{path}." for path in stacked)):
            spelled = names.of_module(name)
            if not conversions.gathers(f"{spelled}.weight"):
                return spelled
    return ""


def initialization_error(model: nn.Module, packed: Iterable[str]) -> str:
    """What the class's own `_init_weights` says about Linears whose weight is packed; "" where it passes them.

    transformers calls it on every module once the files are read, to fill in what they lack. ``model`` is a skeleton
    on meta: nothing is computed, and it is as it was afterwards but for flags that only transformers' loading reads.
    """
    inside = {id(child) for pool in experts_of(model).values() for child in pool.modules() if child is not pool}
    initialize: Any = getattr(model, "initialize_weights", lambda: None)
    found = {name: model.get_submodule(name) for name in packed}
    # Experts are one module there, and what packs Linears does not know a Conv1D.
    taken = [module for module in found.values() if id(module) not in inside and not is_transposed(module)]
    weights = [module._parameters.pop("weight") for module in taken]
    try:
        for module in model.modules():
            vars(module)["_is_hf_initialized"] = id(module) in inside
        initialize()
    except Exception as error:  # noqa: BLE001  (what else a class stumbles over on meta is no matter of packed weights)
        return str(error) if str(error).endswith("has no attribute 'weight'") else ""
    finally:
        for linear, weight in zip(taken, weights, strict=True):
            linear._parameters["weight"] = weight
    return ""
