"""Finding the decoder blocks and the Linears of any causal language model from its module tree alone."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ptq.errors import ConfigError, UnsupportedModelError

PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # of weights that are no packed ones


def find_blocks(model: nn.Module) -> str:
    """Dotted path of the decoder blocks: the outermost ModuleList that holds the most parameters.

    Where a model says which of its parts is the text decoder (beside a vision tower), it is looked for there.

    Raises:
        UnsupportedModelError: no ModuleList holds a Linear.
    """
    best, most = "", 0
    prefix = _decoder(model)
    for path, module in _outermost_lists(model.get_submodule(prefix), f"{prefix}." if prefix else ""):
        if any(True for _ in linears(module)):
            size = sum(p.numel() for p in module.parameters())
            if size > most:
                best, most = path, size
    if not best:
        raise UnsupportedModelError(
            f"a model must hold its decoder blocks in a ModuleList with Linears; {type(model).__name__} has none: "
            "quantize it as plain PyTorch with ptq.quantize_linears"
        )
    return best


def _decoder(model: nn.Module) -> str:
    """Path of the text decoder, as the model itself says; "" where it does not, or the decoder has no blocks."""
    ask: Callable[[], object] = getattr(model, "get_decoder", lambda: None)
    decoder = ask()
    found = next((path for path, module in model.named_modules() if module is decoder), "")
    lists = _outermost_lists(model.get_submodule(found))
    return found if any(True for _, each in lists for _ in linears(each)) else ""


def _outermost_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            yield path, child
        else:
            yield from _outermost_lists(child, path + ".")


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that puts out the logits, as the model itself says; None where it does not."""
    ask: Callable[[], nn.Module | None] = getattr(model, "get_output_embeddings", lambda: None)
    return ask()


def is_transposed(module: nn.Module) -> bool:
    """Whether a Linear keeps its weight as ``[K, N]`` (GPT-2's ``Conv1D``)."""
    return type(module).__name__ == "Conv1D"


def linears(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Dotted path and module of every dense Linear below ``root`` (``nn.Linear`` and ``Conv1D``), in tree order.

    A subclass with a forward of its own is one if that proves to be the product alone (`_is_product`).
    """
    for path, module in root.named_modules():
        plain = isinstance(module, nn.Linear) and (type(module).forward is nn.Linear.forward or _is_product(module))
        if plain or (is_transposed(module) and hasattr(module, "nf")):
            yield path, module


@torch.no_grad()
def _is_product(module: nn.Linear) -> bool:
    """Whether the forward of a subclass of ``nn.Linear`` gives what ``nn.Linear`` gives, on small random numbers.

    In float64, so that a forward which casts shows it by its dtype. A small copy runs, with the module's plain
    attributes and nothing else of it: the module may be on ``meta``, and nothing that it holds is changed.
    """
    held = {name for name, parameter in module._parameters.items() if parameter is not None}
    if not {"weight"} <= held <= {"weight", "bias"} or module._buffers or module._modules:
        return False  # more than a product, or another weight than a matrix of floats
    if type(module.weight) is not nn.Parameter or module.weight.dtype not in PLAIN_DTYPES:
        return False
    n, k, kinds = 6, 8, (bool, int, float, str, type(None))
    # In a model that is built under torch.device("meta"), or works in another dtype by default.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        generator = torch.Generator("cpu").manual_seed(0)
        weight, bias, x = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((n, k), (n,), (2, 3, k)))
        x[0] *= torch.tensor([[1e-6], [1.0], [1e6]], dtype=torch.float64)  # what clips or rounds shows it somewhere
        small = type(module).__new__(type(module))
        nn.Module.__init__(small)
        small.__dict__.update({name: value for name, value in vars(module).items() if type(value) in kinds})
        small.in_features, small.out_features = k, n
        small._parameters.update(weight=nn.Parameter(weight), bias=nn.Parameter(bias) if "bias" in held else None)
        expected = [nn.functional.linear(rows, weight, small._parameters["bias"]) for rows in (x, x[0])]
        try:
            found = [type(module).forward(small, rows.clone()) for rows in (x, x[0])]
        except Exception:  # noqa: BLE001  (whatever the forward of a stranger needs, a product needs the input alone)
            return False
    return all(
        isinstance(one, Tensor) and one.dtype == other.dtype and one.shape == other.shape
        # float64 sums of a few products in another order
        and torch.allclose(one, other, rtol=1e-9, atol=1e-12)
        for one, other in zip(found, expected, strict=True)
    )  # fmt: skip


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a Linear as ``[N, K]``, a view."""
    weight = module.weight.data
    if not isinstance(weight, Tensor):
        raise UnsupportedModelError(f"a Linear must have a weight tensor; {type(module).__name__} has {weight!r}")
    return weight.t() if is_transposed(module) else weight


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """``(N, K)`` of a Linear."""
    n, k = weight_of(module).shape
    return int(n), int(k)


@torch.no_grad()
def set_weight(module: nn.Module, weight_NK: Tensor) -> None:
    """Overwrite the weight of a Linear in place, in its own dtype and layout."""
    weight_of(module).copy_(weight_NK)


def require_memory(caller: str) -> None:
    """Raise ConfigError where torch makes new tensors on ``meta``, without memory."""
    if torch.empty(0).is_meta:
        raise ConfigError(
            f"tensors must be made in memory; torch's default device is meta here: call {caller} outside of "
            "`with torch.device('meta')` and without torch.set_default_device('meta')"
        )
