"""Mixtures of experts as ordinary Linears.

transformers keeps all experts of a layer in three-dimensional parameters. Here such a module is taken apart in place:
one child for each expert with ``gate_proj``, ``up_proj`` and ``down_proj``, so that everything downstream sees Linears.
How a class lays its parameters out is not looked up: each possible layout is tried on small random numbers against the
forward of the class itself, and the one that gives the same result is taken.
"""

import copy
import inspect
import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, SupportsIndex, cast

import torch
from torch import Tensor, nn

from ptq import routing
from ptq.errors import UnsupportedModelError

# Below this size the last two dimensions of a parameter are not those of a weight (convolutions, scales, states).
SMALLEST = 8


class Layout(NamedTuple):
    """How a class keeps and uses its experts."""

    gated: bool  # gate and up in one parameter, or up alone
    transposed: bool  # [E, K, N], not [E, N, K]
    interleaved: bool  # gate and up alternate, not gate first
    own_gate: bool  # the class joins gate and up itself (`_apply_gate`), not act(gate) * up
    normed: bool  # a norm follows each expert
    routed: bool  # called with indices and weights; otherwise with one batch of rows for each expert
    passes: bool = False  # indices beyond its experts stand for some that return what they get (LongCat-Flash)


class Expert(nn.Module):
    """The Linears of one expert."""

    def __init__(self, hidden: int, inner: int, layout: Layout, bias: tuple[bool, bool], dtype: torch.dtype) -> None:
        """On ``meta``; ``bias`` of the first Linears and of the last one."""
        super().__init__()
        if layout.gated:
            self.gate_proj = nn.Linear(hidden, inner, bias[0], device="meta", dtype=dtype)
        self.up_proj = nn.Linear(hidden, inner, bias[0], device="meta", dtype=dtype)
        self.down_proj = nn.Linear(inner, hidden, bias[1], device="meta", dtype=dtype)


class UnfusedExperts(nn.Module):
    """Mixed into the class of an experts module that was taken apart; its children ``0``, ``1``... are the experts."""

    layout: Layout
    num_unfused: int
    shapes: dict[str, torch.Size]  # of the parameters that were taken apart
    # Of the class that this is mixed into, as far as it has them.
    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]

    def __getattr__(self, name: str) -> Any:
        """A fused parameter, on ``meta``: transformers asks for its shape when it converts what a file holds."""
        shape = self.__dict__.get("shapes", {}).get(name)
        if shape is None:
            return super().__getattr__(name)
        return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """A class that is made at run time is found under no name: a pickle holds the one that it was made of."""
        _, _, *state = cast("tuple[Any, ...]", super().__reduce_ex__(max(2, operator.index(protocol))))
        return _bare, (_own(type(self)),), *state

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Same arguments and result as the class's own forward."""
        bound = inspect.signature(_eager(type(self))).bind(self, *args, **kwargs)
        hidden, *given = [value for name, value in bound.arguments.items()][1:]
        rows = hidden.reshape(-1, hidden.shape[-1])
        mode = routing.current()
        if mode is not None and not mode.adding:
            self._visit(rows, mode)
            return torch.zeros_like(hidden)
        result = self._route(rows, *given) if self.layout.routed else self._each(rows)
        if mode is not None:
            for index in range(self.num_unfused):
                result = result + self.run_expert(index, rows)
        return result.view(hidden.shape)

    def _visit(self, rows: Tensor, mode: routing.Routing) -> None:
        if not self.layout.routed:
            rows = rows[rows.any(-1)]
        for index in range(self.num_unfused):
            if any(linear._forward_pre_hooks for linear in self.expert(index).children()):
                mode.running = id(self)
                self.run_expert(index, rows[: mode.rows].clone())  # a tensor of its own: no two experts share an input
                mode.running = None

    def expert(self, index: int) -> Expert:
        """One expert."""
        found = self._modules[str(index)]
        assert isinstance(found, Expert)
        return found

    def run_expert(self, index: int, rows: Tensor) -> Tensor:
        """What one expert makes of ``[T, K]``, before it is weighted."""
        expert, layout = self.expert(index), self.layout
        up = expert.up_proj(rows)
        if not layout.gated:
            inner = self.act_fn(up)
        elif not layout.own_gate:
            inner = self.act_fn(expert.gate_proj(rows)) * up
        else:
            gate = expert.gate_proj(rows)
            joined = torch.stack((gate, up), -1).flatten(-2) if layout.interleaved else torch.cat((gate, up), -1)
            inner = self._apply_gate(joined)
        out: Tensor = expert.down_proj(inner)
        return self.post_expert_norm(out) if layout.normed else out

    def _route(self, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        result = torch.zeros_like(rows)
        for expert in torch.unique(index).tolist():
            stored = expert < self.num_unfused  # else, mostly, it marks a slot that is not used
            if stored or self.layout.passes:
                place, token = torch.where(index.t() == expert)
                out = self.run_expert(expert, rows[token]) if stored else rows[token]
                result.index_add_(0, token, (out * weights[token, place, None]).to(result.dtype))
        return result

    def _each(self, rows: Tensor) -> Tensor:
        parts = rows.view(self.num_unfused, -1, rows.shape[-1])
        result = torch.zeros_like(parts)
        for index, part in enumerate(parts):
            # Rows of zeros are tokens that the router sent elsewhere; without biases they stay zero.
            sent = part.any(-1) if self._keeps_zero(index) else torch.ones_like(part[:, 0], dtype=torch.bool)
            if bool(sent.any()):
                result[index, sent] = self.run_expert(index, part[sent])
        return result.view(rows.shape)

    def _keeps_zero(self, index: int) -> bool:
        return self.layout.gated and all(linear.bias is None for linear in self.expert(index).children())

    def member(self, fused: str, part: int, expert: int) -> str:
        """Path of the Linear below this module that is part ``part`` of a fused parameter."""
        leaf = ("gate_proj", "up_proj")[part] if fused.startswith("gate_up_proj") else fused.removesuffix("_bias")
        return f"{expert}.{leaf}"

    def slices(self) -> Iterator[tuple[str, str, Callable[[Tensor], Tensor]]]:
        """For every parameter of every expert its path, the fused parameter, and how to cut it out of that."""
        for index in range(self.num_unfused):
            for path, _ in self.expert(index).named_parameters():
                name, _, kind = path.partition(".")
                fused = name if name == "down_proj" or not self.layout.gated else "gate_up_proj"
                fused = fused if kind == "weight" else f"{fused}_bias"
                # a partial, not a closure: what a model remembers of its files is pickled with it
                yield f"{index}.{path}", fused, partial(_cut, self.layout, index, name, kind)

    @property
    def one_tensor_each(self) -> bool:
        """Whether an expert's tensor, as checkpoints hold it one by one, is the weight of its Linear as it is."""
        return not self.layout.transposed and not self.layout.interleaved


def _cut(layout: Layout, index: int, name: str, kind: str, fused: Tensor) -> Tensor:
    part = fused[index]
    if kind == "weight" and layout.transposed:
        part = part.t()
    if layout.gated and name != "down_proj":
        second = name == "up_proj"
        part = part[int(second) :: 2] if layout.interleaved else part.chunk(2)[int(second)]
    return part


def _eager(cls: type[nn.Module]) -> Callable[..., Any]:
    """A class's own loop over its experts, below what transformers wraps around it."""
    eager: Callable[..., Any] = inspect.unwrap(getattr(_own(cls), "forward"))  # noqa: B009  (mypy sees no Module here)
    return eager


def _own(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that transformers has, of one that may have been made of it."""
    return next(base for base in cls.__mro__ if issubclass(base, nn.Module) and not issubclass(base, UnfusedExperts))


def experts_of(root: nn.Module) -> dict[str, UnfusedExperts]:
    """Path and module of all experts below ``root`` that were taken apart."""
    return {path: module for path, module in root.named_modules() if isinstance(module, UnfusedExperts)}


def routers(root: nn.Module) -> dict[str, nn.Module]:
    """What stands beside experts and weighs them: modules with one row of weights an expert, or a single one."""
    found = {}
    for path, pool in experts_of(root).items():
        parent = path.rpartition(".")[0]
        for name, module in root.get_submodule(parent).named_modules():
            full = f"{parent}.{name}" if parent and name else name or parent
            weight = module._parameters.get("weight")
            a_matrix = weight is not None and weight.dim() == 2
            # A stack may have a place for experts that hold nothing as well.
            choices = {1, pool.num_unfused, *(shape[0] for shape in pool.shapes.values())}
            if a_matrix and len(module.weight) in choices and not full.startswith(f"{path}."):
                found[full] = module
    return found


def is_lazy(parameter: Tensor) -> bool:
    """Whether a parameter gets its shape in the first forward pass."""
    return isinstance(parameter, nn.parameter.UninitializedParameter)


def stacks(root: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Path and values of every parameter that holds a stack of matrices, as those of experts."""
    for path, module in root.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not is_lazy(parameter) and _is_stack(module, parameter):
                yield f"{path}.{name}" if path else name, parameter


def unfuse_experts(root: nn.Module) -> None:
    """Take every fused experts module below ``root`` apart, in place; weights that are there come along.

    Raises:
        UnsupportedModelError: a module holds stacks of weights in a way that is not understood.
    """
    size = sum(parameter.numel() for parameter in root.parameters())
    for path, module in list(root.named_modules()):
        stacked = [name for name, p in module.named_parameters(recurse=False) if _is_stack(module, p)]
        if stacked and not isinstance(module, UnfusedExperts):
            with torch.device("cpu"):  # whatever the program around it builds its tensors on
                layout = _find_layout(module)
            # Small stacks are gates of recurrent layers and the like; where most of the weights are, they matter.
            held = sum(module.get_parameter(name).numel() for name in stacked) * _alike(root, module)
            if layout is None and 2 * held <= size:
                continue
            if layout is None:
                raise UnsupportedModelError(
                    "experts must be a module of gate_up_proj (or up_proj) and down_proj with a known layout; "
                    f"{type(module).__name__} at {path} holds {', '.join(stacked)} in another one: this architecture "
                    "is not supported"
                )
            _take_apart(module, layout)


def _alike(root: nn.Module, module: nn.Module) -> int:
    return sum(type(other) is type(module) for other in root.modules())


def _is_stack(module: nn.Module, parameter: Tensor) -> bool:
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    return parameter.dim() == 3 and not convolution and min(parameter.shape[1:]) >= SMALLEST and len(parameter) > 1


def _take_apart(module: nn.Module, layout: Layout) -> None:
    first = module.get_parameter("gate_up_proj" if layout.gated else "up_proj")
    last = module.get_parameter("down_proj")
    hidden, inner = _sizes(last, layout)
    bias = (any(name.endswith("up_proj_bias") for name in module._parameters), "down_proj_bias" in module._parameters)
    fused = {name: module._parameters.pop(name) for name in list(module._parameters) if "_proj" in name}
    module.__class__ = _unfused_class(type(module))
    assert isinstance(module, UnfusedExperts)
    module.layout, module.num_unfused = layout, len(last)
    module.shapes = {name: stack.shape for name, stack in fused.items() if stack is not None}
    for index in range(len(last)):
        module.add_module(str(index), Expert(hidden, inner, layout, bias, first.dtype).train(module.training))
    for path, name, cut in list(module.slices()):
        stack = fused[name]
        assert stack is not None
        if not stack.is_meta:
            owner, _, leaf = path.rpartition(".")
            value = nn.Parameter(cut(stack.detach()).clone().contiguous(), requires_grad=stack.requires_grad)
            module.get_submodule(owner)._parameters[leaf] = value


_unfused_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _unfused_class(cls: type[nn.Module]) -> type[nn.Module]:
    made = type(cls.__name__, (UnfusedExperts, cls), {"__module__": cls.__module__})
    return _unfused_classes.setdefault(cls, made)


def _bare(cls: type[nn.Module]) -> nn.Module:
    """A module of the class made of another one, before its state is put in."""
    made = _unfused_class(cls)
    return made.__new__(made)


def _sizes(down: Tensor, layout: Layout) -> tuple[int, int]:
    """Hidden and inner size of an expert."""
    n, k = down.shape[1:]
    return (k, n) if layout.transposed else (n, k)


def _find_layout(module: nn.Module) -> Layout | None:
    own = module._parameters
    down, gated = own.get("down_proj"), "gate_up_proj" in own
    first = own.get("gate_up_proj" if gated else "up_proj")
    arguments = len(inspect.signature(_eager(type(module))).parameters) - 1
    if down is None or first is None or arguments not in (1, 3):
        return None
    normed = bool(getattr(module, "has_post_expert_norm", False))
    # A class that joins gate and up itself gives the same result however they are cut: its own word decides.
    interleaved = gated and not getattr(module, "is_concatenated", True)
    for own_gate in (False, True) if gated and hasattr(module, "_apply_gate") else (False,):
        for transposed in (False, True):
            layout = Layout(gated, transposed, interleaved, own_gate, normed, arguments == 3)
            hidden, inner = _sizes(down, layout)
            wanted = (inner * (1 + gated), hidden)
            if tuple(first.shape[1:]) == (wanted[::-1] if transposed else wanted) and _proven(module, layout):
                return layout._replace(passes=layout.routed and _passes(module, layout))
    return None


@torch.no_grad()
def _proven(module: nn.Module, layout: Layout) -> bool:
    """Whether a small copy with random weights computes the same once it is taken apart."""
    small = _shrunk(module, layout)
    experts = small.get_parameter("down_proj").shape[0]
    hidden, _ = _sizes(small.get_parameter("down_proj"), layout)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2 * experts, hidden, generator=generator, dtype=torch.float32)
    x[:2] = 0
    index = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in x])
    given = (x, index, torch.rand(index.shape, generator=generator, dtype=torch.float32)) if layout.routed else (x,)
    try:
        expected = _eager(type(module))(small, *given)
        _take_apart(small, layout)
        found = small(*given)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False
    # float32 sums of a few products; a wrong layout is off by the numbers themselves
    return isinstance(expected, Tensor) and bool(torch.allclose(found, expected, rtol=1e-3, atol=1e-4))


@torch.no_grad()
def _passes(module: nn.Module, layout: Layout) -> bool:
    """Whether the class itself returns rows as they are, weighted, that are sent to the first expert beyond its own."""
    small = _shrunk(module, layout)
    down = small.get_parameter("down_proj")
    x = torch.randn(3, _sizes(down, layout)[0], generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    index = torch.tensor([[len(down), 0]] * 3)  # two choices, of which one weighs nothing: some classes need several
    weights = torch.tensor([[0.5, 0.0], [1.0, 0.0], [2.0, 0.0]])
    try:
        found = _eager(type(module))(small, x, index, weights)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # there is none beyond
        return False
    return isinstance(found, Tensor) and torch.allclose(found, x * weights[:, :1])


def _shrunk(module: nn.Module, layout: Layout) -> nn.Module:
    """A copy with few channels and random weights, its own record of its sizes shrunk as well."""
    down = module.get_parameter("down_proj")
    hidden, inner = _sizes(down, layout)
    size = {hidden: 6} | {inner: 4}  # the same extent stays the same extent
    size[len(down)] = len(down)  # the number of experts stays, and whatever has the same extent
    small = module.__class__.__new__(module.__class__)
    small.__dict__.update(module.__dict__)
    small._modules = {name: _shrunk_child(child, size) for name, child in module._modules.items()}
    generator = torch.Generator().manual_seed(0)
    first = size[inner] * (1 + layout.gated)
    shapes = {"gate_up_proj": first, "up_proj": first, "down_proj": size[hidden]}
    small._parameters = {}
    for name, parameter in module._parameters.items():
        if parameter is not None:
            n = shapes.get(name.removesuffix("_bias"), 0)
            k = size[inner] if name == "down_proj" else size[hidden]
            shape = (n,) if name.endswith("_bias") else (k, n) if layout.transposed else (n, k)
            value = torch.randn(len(parameter), *shape, generator=generator, dtype=torch.float32)
            small._parameters[name] = nn.Parameter(value)
    for name, value in vars(module).items():
        if type(value) is int:
            small.__dict__[name] = size.get(value, value)
    return small


def _shrunk_child(child: nn.Module | None, size: dict[int, int]) -> nn.Module | None:
    if child is None or not any(True for _ in child.parameters()):
        return child
    small = copy.deepcopy(child)
    generator = torch.Generator().manual_seed(2)
    for module in small.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                shape = [size.get(extent, extent) for extent in parameter.shape]
                value = torch.rand(shape, generator=generator, dtype=torch.float32) + 0.5
                module._parameters[name] = nn.Parameter(value)
    return small
