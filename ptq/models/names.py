"""Which tensor of a checkpoint holds which parameter of a model."""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import NamedTuple

from torch import nn

from ptq.errors import FormatError, UnsupportedModelError

Rename = Callable[[str], str]


class _Renamings(NamedTuple):
    """What transformers does to names when it reads a checkpoint of this architecture."""

    rename: Rename
    # Target of a tensor that is only a part of a parameter (one expert of a fused stack), or the name itself.
    merge: Rename


def tied_names(model: nn.Module) -> Mapping[str, str]:
    """Parameters that share another parameter's storage: name to the name it is loaded under."""
    tied = getattr(model, "all_tied_weights_keys", None)
    return dict(tied) if isinstance(tied, Mapping) else {}


def retie(model: nn.Module) -> None:
    """Let tied parameters share storage again: only one of them is read."""
    for name, origin in tied_names(model).items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._parameters:  # a packed head has no weight to share
            module._parameters[leaf] = model.get_parameter(origin)


def _renamings(model: nn.Module) -> _Renamings:
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping

    transforms = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []

    def applied(kind: bool) -> Rename:
        chosen = [t for t in transforms if hasattr(t, "operations") == kind]

        def rename(name: str) -> str:
            for transform in chosen:
                name = str(transform.rename_source_key(name)[0])
            return name

        return rename

    return _Renamings(applied(False), applied(True))


class SourceNames:
    """Names of a model's parameters and modules as a checkpoint spells them.

    They agree but for the base model's prefix, which some checkpoints leave out or add, and for what transformers
    itself renames on the way in.
    """

    def __init__(self, model: nn.Module, source: Iterable[str]) -> None:
        self._tied = tied_names(model)
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._known = {name for name, _ in model.named_modules(remove_duplicate=False)} - {""}
        self._prefix = str(getattr(model, "base_model_prefix", "") or "") + "."
        self._tensors: dict[str, str] = {}
        self._modules: dict[str, str] = {}
        self._parts: dict[str, str] = {}
        renamings = _renamings(model)
        for stored in source:
            self._place(stored, renamings)

    def _place(self, stored: str, renamings: _Renamings) -> None:
        renamed = renamings.rename(stored)
        name = self._parameter(stored) or self._parameter(renamed) or self._member(stored) or self._member(renamed)
        if name is not None:
            self._tensors.setdefault(name, stored)
            module, _, leaf = name.rpartition(".")
            if stored.endswith(f".{leaf}"):
                self._modules.setdefault(module, stored.removesuffix(f".{leaf}"))
            return
        whole = self._parameter(renamings.merge(renamed))
        if whole is not None:
            self._parts.setdefault(whole, stored)

    def _spellings(self, name: str) -> tuple[str, ...]:
        return name, self._prefix + name, name.removeprefix(self._prefix)

    def _parameter(self, name: str) -> str | None:
        """The parameter of the model that a name means."""
        return next((known for known in self._spellings(name) if known in self._parameters), None)

    def _member(self, name: str) -> str | None:
        """A name below one of the model's modules: a buffer, or a part of a packed weight."""
        return next((known for known in self._spellings(name) if known.rpartition(".")[0] in self._known), None)

    def of_module(self, path: str) -> str:
        """A module's name as the checkpoint spells it."""
        return self._modules.get(path, path)

    def find(self, name: str) -> str | None:
        """The tensor that holds a parameter or buffer, None where the checkpoint has none."""
        origin = self._tied.get(name, name)
        sharing = [tied for tied, source in self._tied.items() if source == origin]
        return next((self._tensors[each] for each in (origin, *sharing) if each in self._tensors), None)

    def of_parameter(self, name: str) -> str:
        """The tensor that holds a parameter.

        Raises:
            FormatError: the checkpoint has no such tensor.
            UnsupportedModelError: the parameter is put together from several tensors.
        """
        found = self.find(name)
        if found is not None:
            return found
        if name in self._parts:
            raise UnsupportedModelError(
                f"every parameter must be one tensor of the checkpoint; {name} is put together from several, "
                f"{self._parts[name]} among them, as fused experts are: this architecture is not supported"
            )
        near = get_close_matches(name, self._tensors, n=1)
        hint = f"; the nearest name in it is {self._tensors[near[0]]}" if near else ""
        raise FormatError(
            f"the checkpoint must hold every parameter of the model; {name} is missing{hint}: "
            "the download may be incomplete, or the checkpoint belongs to another architecture"
        )

    def is_tied(self, name: str) -> bool:
        """Whether the parameter shares another one's storage."""
        return name in self._tied
