"""Running checkpoints: ``ptq.load`` puts a whole model in memory, `open_stream` runs one block at a time."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ptq.errors import ConfigError, FormatError
from ptq.formats.checkpoint import CheckpointReader
from ptq.formats.codec import Codec, Scheme
from ptq.models.classes import require_prediction, require_text_alone
from ptq.models.loading import build_skeleton, load_module, locate, model_dtype, read_config, unload_module
from ptq.models.names import SourceNames
from ptq.models.streamed import StreamedModel
from ptq.models.structure import find_blocks, output_head, require_memory
from ptq.nn.fuse import fuse_linears
from ptq.nn.head import check_head, pack_head
from ptq.nn.linear import QuantLinear
from ptq.nn.swap import replace_module
from ptq.packed import Packed, empty_linear, place_packed, read_packed, require_described, require_multiplied, with_bias


class Checkpoint(NamedTuple):
    """An opened model directory, float or quantized; nothing but names and shapes is in memory."""

    directory: Path
    hf_config: Any
    reader: CheckpointReader
    model: nn.Module  # parameters on meta; QuantLinears (also on meta) where the file holds packed weights
    blocks: str  # path of the decoder blocks
    names: SourceNames
    codec: Codec | None  # None: a float checkpoint
    schemes: dict[str, Scheme]
    dtype: torch.dtype
    packed: Packed | None


def open_checkpoint(
    path: str | Path, *, revision: str | None = None, dtype: str | torch.dtype = "auto", trust_remote_code: bool = False
) -> Checkpoint:
    """Open a model directory or hub model without reading weights.

    Raises:
        ConfigError: no such model.
        FormatError: damaged files, or a quantization this project cannot read.
    """
    directory = locate(str(path), revision)
    hf_config = read_config(directory, trust_remote_code=trust_remote_code)
    settings = getattr(hf_config, "quantization_config", None)
    if settings is not None and not isinstance(settings, dict):
        settings = settings.to_dict()
    working = model_dtype(hf_config, dtype)
    # The float model is built; transformers must not look for its own quantizer.
    if settings is not None:
        del hf_config.quantization_config
    model = build_skeleton(hf_config, working, trust_remote_code=trust_remote_code)
    blocks = find_blocks(model)
    reader = CheckpointReader(directory)
    if settings is None:
        require_described(directory, reader.names())
        names = SourceNames(model, reader.names())
        return Checkpoint(directory, hf_config, reader, model, blocks, names, None, {}, working, None)
    packed = place_packed(model, reader, settings, partial(empty_linear, dtype=working))
    return Checkpoint(
        directory, hf_config, reader, model, blocks, packed.names, packed.codec, packed.schemes, working, packed
    )


def load_weights(checkpoint: Checkpoint, path: str, device: torch.device, *, without: str | None = None) -> None:
    """Read what lies below one module, but not below ``without``; packed weights become QuantLinears.

    Raises:
        FormatError: a tensor is missing, or of the wrong dtype or shape.
    """
    model = checkpoint.model
    packed = [n for n in checkpoint.schemes if _below(n, path) and not _below(n, without)]
    inside = tuple(f"{name}." for name in packed)
    load_module(
        model, path, checkpoint.reader, checkpoint.names, device=device, dtype=checkpoint.dtype,
        skip=lambda name: _below(name, without) or (name.startswith(inside) and not name.endswith(".bias")),
    )  # fmt: skip
    for name in packed:
        _load_packed(checkpoint, name, device)


def _below(name: str, path: str | None) -> bool:
    """Whether a name is that of a module or of something in it; everything is in "", nothing in None."""
    return path is not None and (not path or name == path or name.startswith(f"{path}."))


def _load_packed(checkpoint: Checkpoint, name: str, device: torch.device) -> None:
    assert checkpoint.packed is not None  # there are schemes only where there are packed weights
    old = checkpoint.model.get_submodule(name)
    assert isinstance(old, QuantLinear)
    new = read_packed(checkpoint.packed, checkpoint.reader, name, (old.out_features, old.in_features), old.weight_dtype)
    replace_module(checkpoint.model, name, with_bias(new, old.bias).to(device))


def unload_weights(module: nn.Module) -> None:
    """Give back the memory of a module, packed weights included."""
    unload_module(module)
    for child in module.modules():
        if isinstance(child, QuantLinear):
            child.to_empty(device="meta")


def open_stream(checkpoint: Checkpoint, device: torch.device) -> StreamedModel:
    """The checkpoint as a model that runs one block at a time.

    Raises:
        ConfigError: packed layers in float64.
        UnsupportedModelError: a class that predicts no text, or needs more than text.
    """
    if checkpoint.packed is not None:
        require_multiplied(checkpoint.dtype)
    model = checkpoint.model
    require_prediction(model, "what is measured on text")
    require_text_alone(model)

    def load(_model: nn.Module, path: str) -> None:
        load_weights(checkpoint, path, device, without=None if path else checkpoint.blocks)

    return StreamedModel(model, checkpoint.blocks, load, unload_weights, device)


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    impl: str = "auto",
    activation: str | None = None,
    dtype: str | torch.dtype = "auto",
    fuse: bool = False,
    head_bits: int | None = None,
    compile: bool = False,
    warmup: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A causal language model with packed weights, ready for ``generate``.

    Args:
        path: directory or hub name; this project's checkpoints, GPTQ, AWQ, compressed-tensors and AutoRound ones of
            others (docs/load.md says which); float checkpoints too.
        device: where to put it, a torch.device or ``auto``, ``cpu``, ``cuda``, ``cuda:N``; default CUDA where there is
            one.
        impl: kernel to use (``auto``, ``reference``, ``triton``, ``cpu``); an explicit one that cannot run raises.
        activation: "int8" rounds the inputs of packed Linears to 8 bits, row by row, which is faster on CPUs with
            AVX512-VNNI or AMX and costs about 1 % of their outputs; RuntimeError where that cannot run.
        dtype: of everything that is not packed, by name or as a torch.dtype; ``auto`` as config.json says. Beside
            packed weights bfloat16, float16 or float32.
        fuse: run q, k, v and gate, up as one product each; for inference only.
        head_bits: 4 or 8 rounds a float output head to that many bits as it is loaded, in groups of 128 with searched
            scales (see `ptq.nn.head.pack_head`): not calibrated, so measure what it costs. It is read once a token,
            and with a large vocabulary it is most of what a float head leaves to read. An embedding that shares its
            weight stays in float, beside the packed copy. Such a model cannot be saved.
        compile: let ``generate`` run its decoding step through torch.compile where it is given
            ``cache_implementation="static"``, whatever the architecture. On a CPU most of a step of a small model is
            Python otherwise; a C++ compiler is needed there. The first call for a length of the cache compiles, for a
            minute or more (kept on disk by torch).
        warmup: on a GPU, compile every kernel that any number of rows needs and make the workspaces, so that the first
            forward pass waits for nothing and CUDA graphs can be captured at once. The first load on a machine takes
            seconds longer; compiled kernels are cached on disk. Nothing happens on a CPU.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        A ``PreTrainedModel`` in eval mode, as ``from_pretrained`` of transformers gives it after ``import ptq``, except
        that no parameter requires a gradient; ``save_pretrained`` writes the format that was read; with `fuse` or
        `head_bits` it raises PtqError.

    Raises:
        ConfigError: no such model or device, an unknown implementation or dtype, one that packed layers cannot compute
            in, a head that `head_bits` cannot be for, a switch that is no bool, or ``meta`` as torch's default device.
        FormatError: a damaged or unreadable checkpoint.
    """
    from ptq.plan import resolve_device

    target = resolve_device("auto" if device is None else device)
    require_memory("ptq.load")
    _check_switches(fuse=fuse, compile=compile, warmup=warmup)
    checkpoint = open_checkpoint(path, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
    model = checkpoint.model
    if head_bits is not None:
        check_head(output_head(model), head_bits)
    if head_bits is not None or checkpoint.packed is not None:
        require_multiplied(checkpoint.dtype)
    with torch.inference_mode(False):  # tensors made in it can never be saved for a gradient to pass
        load_weights(checkpoint, "", target)
        if head_bits is not None:
            _replace_head(model, head_bits)
        if fuse:
            fuse_linears(model)
        _prepare(model, impl, activation)
    if warmup:
        warm_up(model, checkpoint.dtype)
    _add_generation_config(model, checkpoint.directory)
    if compile:
        _compile_decoding(model, target)
    if head_bits is not None or checkpoint.packed is not None:
        from ptq.integration.quantizer import attach

        attach(model, checkpoint.packed)
    return model


def _replace_head(model: nn.Module, bits: int) -> None:
    head = output_head(model)
    assert isinstance(head, nn.Linear)  # check_head has seen it
    path = next(path for path, module in model.named_modules() if module is head)
    replace_module(model, path, pack_head(head, bits))


def _check_switches(**switches: object) -> None:
    for name, value in switches.items():
        if not isinstance(value, bool):  # "no" would count as True
            raise ConfigError(f"{name} must be True or False, found {value!r}")


def _prepare(model: nn.Module, impl: str, activation: str | None) -> None:
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            module.impl, module.activation = impl, activation
            prepare_linear(name, module)


def prepare_linear(path: str, linear: QuantLinear) -> None:
    """Lay out the packed weight at ``path`` for its implementation. Raises RuntimeError where that cannot run."""
    try:
        linear.prepare_()
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # memory ran out, say
            raise
        raise RuntimeError(f"{path} cannot be prepared: {error}") from error


def warm_up(model: nn.Module, dtype: torch.dtype) -> None:
    """Make ready what forward passes with rows of `dtype` need, once for each kind of QuantLinear."""
    kinds: dict[tuple[object, ...], QuantLinear] = {}
    for linear in quant_linears(model):
        if linear.qweight.is_meta:  # it waits elsewhere for its turn
            continue
        shape = (linear.out_features, linear.in_features, linear.bits, linear.group_size, linear.symmetric)
        scales, options = linear.scales, (linear.bias is None, linear.perm is None, linear.layout, linear.impl)
        kinds.setdefault((*shape, scales.dtype, scales.device, *options), linear)
    for linear in kinds.values():
        linear.warmup(dtype)


def quant_linears(model: nn.Module) -> Iterable[QuantLinear]:
    """Every QuantLinear of a model."""
    return (module for module in model.modules() if isinstance(module, QuantLinear))


def _add_generation_config(model: Any, directory: Path) -> None:
    from transformers import GenerationConfig

    file = directory / "generation_config.json"
    if file.is_file() and hasattr(model, "generation_config"):
        try:
            model.generation_config = GenerationConfig.from_pretrained(directory)
        except (ValueError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise FormatError(
                f"{file} must hold settings of generation; transformers refuses it: {' '.join(str(error).split())}: "
                "correct it, fetch it again, or delete it for the defaults"
            ) from error


def _compile_decoding(model: Any, device: torch.device) -> None:
    from transformers import CompileConfig

    config = CompileConfig()
    if device.type == "cpu":
        # A wrapper in C++: with one in Python each of a step's hundreds of calls costs microseconds.
        config = CompileConfig(mode=None, options={"cpp_wrapper": True})
        config._compile_all_devices = True  # otherwise on accelerators only
    model.generation_config.compile_config = config
