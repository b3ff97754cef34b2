"""Running checkpoints: ``ptq.load`` puts a whole model in memory, `open_stream` runs one block at a time."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ptq.errors import FormatError
from ptq.formats import codec_for_config
from ptq.formats.checkpoint import CheckpointReader
from ptq.formats.codec import Codec, Scheme
from ptq.models.loading import build_skeleton, load_module, locate, model_dtype, read_config, unload_module
from ptq.models.names import SourceNames
from ptq.models.streamed import StreamedModel
from ptq.models.structure import find_blocks, linears, weight_shape
from ptq.nn.fuse import fuse_linears
from ptq.nn.linear import QuantLinear
from ptq.nn.swap import replace_module, to_quant_linear


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


def open_checkpoint(
    path: str | Path, *, revision: str | None = None, dtype: str = "auto", trust_remote_code: bool = False
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
    codec, schemes = None, {}
    if settings is not None:
        codec = codec_for_config(settings)
        found = dict(linears(model))
        parsed = codec.parse_config(settings, list(found))
        schemes = {name: scheme for name, scheme in parsed.items() if scheme is not None}
        # No codec has a tensor called weight: where there is one, the Linear was left in float.
        stored = set(reader.names())
        names = SourceNames(model, stored)
        schemes = {n: s for n, s in schemes.items() if f"{names.of_module(n)}.weight" not in stored}
        for name, scheme in schemes.items():
            replace_module(model, name, _empty(found[name], scheme, working))
    names = SourceNames(model, reader.names())
    return Checkpoint(directory, hf_config, reader, model, blocks, names, codec, schemes, working)


def _empty(linear: nn.Module, scheme: Scheme, dtype: torch.dtype) -> QuantLinear:
    n, k = weight_shape(linear)
    return QuantLinear.empty(k, n, scheme, getattr(linear, "bias", None) is not None, dtype)


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
    codec, scheme = checkpoint.codec, checkpoint.schemes[name]
    assert codec is not None
    stored = checkpoint.names.of_module(name)
    tensors = checkpoint.reader.tensors(codec.tensor_names(stored, scheme))
    quantized = codec.decode(stored, tensors, scheme)
    old = checkpoint.model.get_submodule(name)
    assert isinstance(old, QuantLinear)
    if tuple(quantized.codes.shape) != (old.out_features, old.in_features):
        raise FormatError(
            f"{stored} must be a packed {old.out_features} x {old.in_features} weight; the checkpoint holds "
            f"{tuple(quantized.codes.shape)}: config.json and the shards do not belong together"
        )
    new = to_quant_linear(quantized, old.bias).to(device)
    replace_module(checkpoint.model, name, new)


def unload_weights(module: nn.Module) -> None:
    """Give back the memory of a module, packed weights included."""
    unload_module(module)
    for child in module.modules():
        if isinstance(child, QuantLinear):
            child.to_empty(device="meta")


def open_stream(checkpoint: Checkpoint, device: torch.device) -> StreamedModel:
    """The checkpoint as a model that runs one block at a time."""
    model = checkpoint.model

    def load(_model: nn.Module, path: str) -> None:
        load_weights(checkpoint, path, device, without=None if path else checkpoint.blocks)

    return StreamedModel(model, checkpoint.blocks, load, unload_weights, device)


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    impl: str = "auto",
    dtype: str = "auto",
    fuse: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A causal language model with packed weights, ready for ``generate``.

    Args:
        path: directory or hub name; this project's checkpoints and other GPTQ, AWQ and compressed-tensors ones
            without a run-time permutation; float checkpoints too.
        device: where to put it; default CUDA where there is one.
        impl: kernel to use (``auto``, ``reference``, ``triton``, ``cpu``); an explicit one that cannot run raises.
        dtype: of everything that is not packed; ``auto`` as stored.
        fuse: run q, k, v and gate, up as one product each; for inference only.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        A ``PreTrainedModel`` in eval mode.

    Raises:
        ConfigError: no such model, or an unknown implementation.
        FormatError: a damaged or unreadable checkpoint.
    """
    from ptq.plan import resolve_device

    target = torch.device(device) if device is not None else resolve_device("auto")
    checkpoint = open_checkpoint(path, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
    load_weights(checkpoint, "", target)
    model = checkpoint.model
    if fuse:
        fuse_linears(model)
    for module in quant_linears(model):
        module.impl = impl
        module.prepare_()
    _add_generation_config(model, checkpoint.directory)
    return model


def quant_linears(model: nn.Module) -> Iterable[QuantLinear]:
    """Every QuantLinear of a model."""
    return (module for module in model.modules() if isinstance(module, QuantLinear))


def _add_generation_config(model: Any, directory: Path) -> None:
    from transformers import GenerationConfig

    if (directory / "generation_config.json").is_file() and hasattr(model, "generation_config"):
        model.generation_config = GenerationConfig.from_pretrained(directory)
