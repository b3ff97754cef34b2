"""Quantizing any PyTorch module, without Hugging Face; a model of transformers can be saved as a checkpoint."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ptq.block import quantize_block
from ptq.config import AWQConfig, GPTQConfig, RefineConfig, RunConfig, matches, scheme_for, unused_patterns
from ptq.errors import ConfigError
from ptq.formats.checks import FLOATS
from ptq.formats.codec import WIDTHS, Scheme
from ptq.grid import resolve_group_size
from ptq.half_products import fast_half_products
from ptq.integration.made import attach_made
from ptq.models.structure import linears, require_memory, weight_shape
from ptq.nn.swap import replace_module, take_hooks, to_quant_linear
from ptq.passed_over import passed_over, warn_passed_over
from ptq.plain_runs import Probe, eagerly, evaluating, float_twin, runner
from ptq.schema import build
from ptq.task import BlockTask, ModuleResult


@torch.no_grad()
def quantize_linears(
    module: nn.Module,
    calibration_batches: Iterable[Any] = (),
    *,
    method: Literal["gptq", "awq", "rtn"] = "gptq",
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    exclude: Iterable[str] = (),
    gptq: GPTQConfig | None = None,
    awq: AWQConfig | None = None,
    refine: RefineConfig | None = None,
) -> dict[str, dict[str, object]]:
    """Quantize the ``nn.Linear`` layers of a module in place: each becomes a `ptq.nn.QuantLinear`.

    A weight that a Linear shares with another module (an embedding, say) stays float there. Nothing is written into
    memory that a weight has in common with other tensors (views, arrays, mapped files): it gets its own first. Hooks on
    a Linear's forward and backward pass go over to the layer that replaces it. ``save_pretrained`` of a model of
    transformers writes a checkpoint afterwards, which `ptq.load` reads.

    What multiplies without being an ``nn.Linear`` (experts in stacks, subclasses with a forward of their own) stays in
    float, with a warning unless ``exclude`` names it.

    Args:
        module: any module; it is run on the calibration batches, once for each group of layers that share an input, so
            that later layers are calibrated on what the quantized earlier ones put out. ``awq`` runs it once, and a
            float32 copy of it on the first batch to prove which scales can be folded into norms and other Linears; it
            needs an output with floating-point tensors to do so.
        calibration_batches: arguments of ``module``: a tensor, a tuple (positional) or a dict (keywords) each. Every
            pass gets a copy of them, unless something in them cannot be copied. What is compiled runs uncompiled then.
        method: ``gptq``, ``awq`` or ``rtn`` (which needs no batches).
        bits: 2, 3, 4 or 8.
        group_size: input features that share a scale; -1: all of a row.
        symmetric: keep the zero point in the middle.
        exclude: path patterns of layers to leave alone (see `ptq.config.matches`).
        gptq: options of that method.
        awq: options of that method.
        refine: options of the refinement after the method, which then needs batches whatever it is.

    Returns:
        For each quantized layer's path its losses and settings. Of several threads that call this one works at a time.

    Raises:
        ConfigError: an unknown method, option or pattern; a group size that does not divide a layer; no batches; a
            module that is a Linear itself or holds none; a parametrized weight or bias; for ``awq``, no output to
            prove by; ``meta`` as torch's default device.
        NumericsError: NaN or infinity in weights or activations, or weights too large for any scale. (Weights too
            small for one become zero, with a relative loss of 1.) Weights are looked at before anything is changed;
            after an error about activations, layers may hold the values of their codes: load the module anew.
        UnsupportedModelError: a layer that the batches do not reach, ``awq``: that the first one does not reach; one
            that is called with anything but a dense tensor.
    """
    config = _config({
        "method": method, "bits": bits, "group_size": group_size, "symmetric": symmetric, "exclude": exclude,
        "gptq": _options("gptq", gptq, GPTQConfig), "awq": _options("awq", awq, AWQConfig),
        "refine": _options("refine", refine, RefineConfig),
    })  # fmt: skip
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"module must be a torch.nn.Module, found a {type(module).__name__}; for a checkpoint there is ptq.quantize"
        )
    left = passed_over(module, [linear for _, linear in linears(module)])
    schemes = _schemes(module, config, [path for each in left for path in each.paths])
    warn_passed_over(module, left, config.exclude, stacklevel=3)  # above this function there is torch.no_grad's
    batches = _batches(calibration_batches, config)
    _untie(module, schemes, folds=method == "awq")
    with evaluating(module), eagerly():
        weight = module.get_parameter(f"{next(iter(schemes))}.weight")
        probe = Probe(module, batches) if method == "awq" else None
        runs = [runner(module, batch, index) for index, batch in enumerate(batches)]
        twin = float_twin(module, batches) if config.follows_float else None
        task = BlockTask("", schemes, config, weight.dtype, probe, twin, branching=True)
        with fast_half_products(weight.device):
            results = quantize_block(module, runs, task)
    _swap(module, results)
    attach_made(module)
    return {path: result.row for path, result in results.items()}


def _config(given: dict[str, Any]) -> RunConfig:
    """The settings of a run that a module can have."""
    bits, exclude = given["bits"], given["exclude"]
    if not isinstance(bits, int) or bits not in WIDTHS:
        raise ConfigError(
            f"bits must be 2, 3, 4 or 8, found {bits!r}; a budget needs a language model: python -m ptq.gptq"
        )
    if isinstance(exclude, str) or not isinstance(exclude, Iterable):
        raise ConfigError(
            f"exclude must be a list of patterns, found {exclude!r}: write exclude=['...'], or leave it out"
        )
    require_memory("ptq.quantize_linears")
    config = build(RunConfig, {"model": "module", "output": "module", **given, "exclude": list(exclude)})
    if config.refine.model_steps:
        raise ConfigError(
            "refine.model_steps must be 0 for a module, which predicts no tokens; use refine.steps, or python -m "
            "ptq.gptq for a language model"
        )
    if config.gptq.gradient_tokens:
        raise ConfigError(
            "gptq.gradient_tokens must be 0 for a module, which predicts no tokens; python -m ptq.gptq takes it for a "
            "language model"
        )
    return config


def _batches(given: Any, config: RunConfig) -> list[Any]:
    one = isinstance(given, str | bytes | Mapping)
    if one or not (hasattr(given, "__iter__") or hasattr(given, "__getitem__")):
        raise ConfigError(
            "calibration_batches must be an iterable of batches, each a tensor, a tuple or a dict; found one "
            f"{type(given).__name__}: put it into a list"
        )
    batches = list(given)
    if config.solves_with_text and not batches:
        wants = f"method {config.method}" if config.method != "rtn" else "refine"
        raise ConfigError(
            f"{wants} needs calibration batches; found none: pass them, or use method='rtn' without refine"
        )
    return batches


def _options(name: str, given: Any, kind: type[Any]) -> dict[str, Any]:
    if given is not None and not isinstance(given, kind):
        raise ConfigError(
            f"{name} must be a ptq.config.{kind.__name__}, found a {type(given).__name__}: write "
            f"{name}={kind.__name__}(...) with the keys as arguments"
        )
    return asdict(given or kind())


def _schemes(module: nn.Module, config: RunConfig, others: Collection[str]) -> dict[str, Scheme]:
    """How each Linear that is not excluded will be quantized; patterns may also mean ``others``, which stay anyway."""
    found = dict(linears(module))
    if "" in found:
        raise ConfigError(
            f"the module must hold its Linears, to be replaced in it; found a bare {type(module).__name__}: wrap it, "
            "as in nn.Sequential(linear)"
        )
    for pattern in unused_patterns(config, [*found, *others]):
        known = f"none of {', '.join(found)}"
        for path, child in module.named_modules(remove_duplicate=False):
            if matches(pattern, path):
                known = next(
                    (f"another name of {first}: write that" for first in found if found[first] is child), known
                )
        raise ConfigError(f"a pattern in exclude must match a Linear; {pattern!r} matches {known}")
    schemes = {path: s for path in found if (s := scheme_for(config, path)) is not None}
    if not schemes:
        raise ConfigError(f"the module must hold a Linear that is not excluded; {type(module).__name__} holds none")
    for path, scheme in schemes.items():
        _check_weight(path, found[path].weight)
        _check_own(path, found[path])
        _check_no_adapter(module, path)
        resolve_group_size(scheme, weight_shape(found[path])[1], path)
    return schemes


def _check_no_adapter(module: nn.Module, path: str) -> None:
    """The Linear must be neither below an adapter of PEFT nor one of its matrices, whatever it lies over."""
    owners = path.split(".")
    for depth in range(1, len(owners)):
        owner = ".".join(owners[:depth])
        # by name, as PEFT need not be here; ptq's own layer over packed weights is a subclass elsewhere
        kinds = {
            (base.__module__.partition(".")[0], base.__name__) for base in type(module.get_submodule(owner)).__mro__
        }
        if ("peft", "BaseTunerLayer") not in kinds:
            continue
        if owners[depth:] == ["base_layer"]:
            raise ConfigError(
                f"an adapter goes over packed layers, which nothing can be merged into; {path} has one of PEFT over it "
                "already: merge or unload that, quantize, and make the next one with ptq.adapters.lora_config"
            )
        raise ConfigError(
            f"the matrices of an adapter must stay float; {path} is one of PEFT's, in {owner}: quantize before there "
            f"is an adapter, or exclude '{owner}.*'"
        )


def _check_own(path: str, linear: nn.Module) -> None:
    """A bias may also be a tensor that is no parameter, unless pruning computes it before each call."""
    tensors = {"weight": linear._parameters, "bias": {**linear._parameters, **linear._buffers, **vars(linear)}}
    for name, kept in tensors.items():
        computed = name not in kept or f"{name}_orig" in linear._parameters
        if computed and getattr(linear, name, None) is not None:
            raise ConfigError(
                f"the {name} of a Linear must be a parameter of its own; {path} computes it from others (a weight norm "
                "or another parametrization): remove that first, or exclude the layer"
            )


def _check_weight(path: str, weight: Any) -> None:
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ConfigError(f"the weight of a Linear must have its shape; {path} has none yet: run the module once first")
    if weight.dtype not in FLOATS or weight.is_meta or not weight.numel():
        kind = "on the meta device" if weight.is_meta else f"of dtype {weight.dtype} and shape {tuple(weight.shape)}"
        raise ConfigError(
            "the weight of a Linear must be float32, bfloat16 or float16, with at least one row and column, and in "
            f"memory; that of {path} is {kind}: convert it, or exclude the layer"
        )
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        raise ConfigError(
            f"the weight of a Linear must be one that can be changed; that of {path} was made in torch.inference_mode: "
            "quantize in that mode as well, or make the module outside of it"
        )


def _untie(module: nn.Module, paths: Collection[str], folds: bool) -> None:
    """Give each of these Linears a weight of its own."""
    users: dict[int, int] = {}
    for owner in module.modules():
        for parameter in owner.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    for path in paths:
        linear = module.get_submodule(path)
        weight = linear.get_parameter("weight")
        if users[id(weight)] > 1:
            linear.weight = nn.Parameter(weight.clone(), requires_grad=weight.requires_grad)
    _own_memory(module, paths, folds)


def _own_memory(module: nn.Module, paths: Iterable[str], folds: bool) -> None:
    """Copies of the parameters that are written into and whose memory is not theirs alone.

    Views of something larger, tensors over arrays and mapped files, memory of several parameters or processes. Besides
    the weights, AWQ's folds write into norms and other Linears.
    """
    written = [module.get_parameter(f"{path}.weight") for path in paths]
    if folds:
        others = [linear.weight for _, linear in linears(module) if isinstance(linear.weight, nn.Parameter)]
        written += [*others, *(p for p in module.parameters() if _address(p) and p.dim() < 2)]
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    users = Counter(map(_address, tensors.values()))
    for parameter in {id(p): p for p in written}.values():
        if not _address(parameter) or (parameter.is_inference() and not torch.is_inference_mode_enabled()):
            continue
        storage = parameter.untyped_storage()
        alone = users[storage.data_ptr()] == 1 and storage.nbytes() == parameter.numel() * parameter.itemsize
        if not (alone and (parameter.is_cuda or (storage.resizable() and not parameter.is_shared()))):
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def _address(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 of one that has none of its own: on meta, without a shape yet, of a wrapper."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (ValueError, RuntimeError, NotImplementedError):
        return 0


def _swap(module: nn.Module, results: Mapping[str, ModuleResult]) -> None:
    """Put the packed layers in, at every path where a Linear stands."""
    paths: dict[nn.Module, list[str]] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        paths.setdefault(child, []).append(path)
    for path, result in results.items():
        old = module.get_submodule(path)
        bias, weight = old.bias, old.get_parameter("weight")
        new = to_quant_linear(result.quantized, bias if isinstance(bias, Tensor) else None, weight.dtype)
        new.to(weight.device).prepare_().train(old.training)
        take_hooks(new, old)
        if isinstance(bias, nn.Parameter):
            new.bias = bias  # an optimizer may hold it, or another module
        for each in paths[old]:
            replace_module(module, each, new)
