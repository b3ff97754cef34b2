"""Which tensor of a checkpoint holds which parameter of a model."""

import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Protocol

from torch import Tensor, nn

from ptq.errors import FormatError
from ptq.formats.codec import Scheme
from ptq.models.conversion import Conversions, Piece, is_one_tensor_each, put_together
from ptq.models.experts import experts_of


class Tensors(Protocol):
    """Where tensors are read from."""

    def tensor(self, name: str) -> Tensor: ...  # noqa: D102


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


def unplaced(model: nn.Module, names: "SourceNames", stored: Iterable[str]) -> list[str]:
    """Tensors of a checkpoint that nothing of a model is read from, but for those its class leaves out anyway."""
    persistent = set(model.state_dict())
    used = {found for name, _ in model.named_buffers() if name in persistent and (found := names.find(name))}
    for name, _ in model.named_parameters(remove_duplicate=False):
        used.update(names.sources(name))
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq$"]
    left = sorted(set(stored) - used - set(tied_names(model)))
    return [name for name in left if not any(re.search(pattern, name) for pattern in ignored)]


class SourceNames:
    """Names of a model's parameters and modules as a checkpoint spells them.

    They agree but for the base model's prefix, which some checkpoints leave out or add, and for what transformers
    itself renames and puts together on the way in. An expert's weight may be a tensor of its own or lie in a fused one.
    """

    def __init__(self, model: nn.Module, source: Iterable[str]) -> None:
        self._model = model
        self._tied = tied_names(model)
        self._sharing: dict[str, list[str]] = {}
        for name, origin in self._tied.items():
            self._sharing.setdefault(origin, []).append(name)
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._known = {name for name, _ in model.named_modules(remove_duplicate=False)} - {""}
        self._prefix = str(getattr(model, "base_model_prefix", "") or "") + "."
        self._experts = experts_of(model)
        # Parameter of an expert -> the fused parameter it was cut out of, and how.
        self._cuts: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {}
        for path, experts in self._experts.items():
            for local, fused, cut in experts.slices():
                self._cuts[f"{path}.{local}"] = f"{path}.{fused}", cut
        self._fused = {f"{path}.{name}" for path, experts in self._experts.items() for name in experts.shapes}
        self._tensors: dict[str, str] = {}
        self._modules: dict[str, str] = {}
        self._pieces: dict[str, list[Piece]] = {}
        self._latest: tuple[str, Tensor] | None = None
        conversions = Conversions(model)
        for stored in sorted(source):  # what a damaged file is told must not depend on the order of a set
            self._place(stored, conversions)
        self.conversions = conversions.used()  # what transformers itself would remember of reading these names

    def _place(self, stored: str, conversions: Conversions) -> None:
        renamed = conversions.rename(stored)
        piece = conversions.piece(stored, renamed)
        name = self._parameter(stored) or self._parameter(renamed)
        if piece is not None and name not in self._cuts and self._take_piece(piece):
            return
        name = (
            name or self._member(stored) or self._member(renamed) or self._packed_expert(stored, renamed, conversions)
        )
        if name is not None:
            self._keep(name, stored)

    def _keep(self, name: str, stored: str) -> None:
        self._tensors.setdefault(name, stored)
        module, _, leaf = name.rpartition(".")
        if stored.endswith(f".{leaf}"):
            self._modules.setdefault(module, stored.removesuffix(f".{leaf}"))

    def _take_piece(self, piece: Piece) -> bool:
        """Note a tensor that is part of a parameter; where it is all of one expert's Linear, as that Linear's own."""
        own = self._expert_module(piece)
        if own is not None:
            self._keep(f"{own}.weight", piece.stored)
            return True
        targets = [self._whole(target) for target in piece.targets]
        for target in targets:
            if target is not None:
                self._pieces.setdefault(target, []).append(piece)
        return any(targets)

    def _expert_module(self, piece: Piece) -> str | None:
        fused = self._whole(piece.targets[0])
        if fused is None or piece.expert is None or not is_one_tensor_each(piece):
            return None
        path, _, leaf = fused.rpartition(".")
        experts = self._experts.get(path)
        if experts is None or not experts.one_tensor_each:
            return None
        return f"{path}.{experts.member(leaf, piece.part, piece.expert)}"

    def _packed_expert(self, stored: str, renamed: str, conversions: Conversions) -> str | None:
        """The name of a part of a packed weight that stands where a checkpoint has one expert's weight."""
        head, _, leaf = renamed.rpartition(".")
        piece = conversions.piece(stored, f"{head}.weight") if self._experts else None
        module = self._expert_module(piece) if piece is not None else None
        return f"{module}.{leaf}" if module is not None else None

    def _spellings(self, name: str) -> tuple[str, ...]:
        return name, self._prefix + name, name.removeprefix(self._prefix)

    def _whole(self, name: str) -> str | None:
        """The parameter of the model, or of the model before its experts were taken apart, that a name means."""
        return next((n for n in self._spellings(name) if n in self._parameters or n in self._fused), None)

    def _parameter(self, name: str) -> str | None:
        """The parameter of the model that a name means."""
        return next((known for known in self._spellings(name) if known in self._parameters), None)

    def _member(self, name: str) -> str | None:
        """A name below one of the model's modules: a buffer, or a part of a packed weight."""
        return next((known for known in self._spellings(name) if known.rpartition(".")[0] in self._known), None)

    def of_module(self, path: str) -> str:
        """A module's name as the checkpoint spells it."""
        return self._modules.get(path, path)

    def both_spellings(self, schemes: Mapping[str, Scheme | None], *, whole: bool) -> dict[str, Scheme | None]:
        """Schemes of Linears for a configuration that other programs read, float ones (None) also as the file has them.

        Which names an engine's modules have is not known here. A tower may be ``model.vision_tower.encoder`` in
        transformers' tree, and ``vision_tower.vision_model.encoder`` in the files and in the engines made for these.
        Where readers take an entry wherever it is part of a name, not ``whole``, one that would cover a packed Linear
        is left out.
        """
        left = [self.of_module(path) for path, scheme in schemes.items() if scheme is None]
        packed = [path for path, scheme in schemes.items() if scheme is not None and not whole]
        packed += [self.of_module(path) for path in packed]
        return {**schemes, **{n: None for n in left if n not in schemes and not any(n in each for each in packed)}}

    def find(self, name: str) -> str | None:
        """The one tensor that holds a parameter or buffer as it is, None where there is no such tensor."""
        origin = self._tied.get(name, name)
        return next((self._tensors[n] for n in (origin, *self._sharing.get(origin, ())) if n in self._tensors), None)

    def sources(self, name: str) -> tuple[str, ...]:
        """All tensors of which a parameter is made; none where the checkpoint lacks it."""
        found = self.find(name)
        if found is not None:
            return (found,)
        name = self._tied.get(name, name)
        if name in self._pieces:
            return tuple(piece.stored for piece in self._pieces[name])
        return self.sources(self._cuts[name][0]) if name in self._cuts else ()

    def written_as(self, name: str, apart: Iterable[str]) -> str | None:
        """The name under which a parameter goes into a result that keeps it; None: its tensors are copied as they are.

        ``apart`` are the experts modules that the result holds expert by expert.
        """
        found = self.find(name)
        if found is not None:
            return found
        cut = name in self._cuts and any(name.startswith(f"{path}.") for path in apart)
        owner, _, leaf = name.rpartition(".")
        return f"{self.of_module(owner)}.{leaf}" if cut else None

    def require(self, name: str) -> None:
        """Raise unless the checkpoint has what a parameter is made of.

        Raises:
            FormatError: a tensor is missing.
        """
        if self.sources(name):
            return
        near = get_close_matches(name, self._tensors, n=1)
        hint = f"; the nearest name in it is {self._tensors[near[0]]}" if near else ""
        raise FormatError(
            f"the checkpoint must hold every parameter of the model; {name} is missing{hint}: "
            "the download may be incomplete, or the checkpoint belongs to another architecture"
        )

    def of_parameter(self, name: str) -> str:
        """The tensor that holds a parameter, or the first of those it is made of.

        Raises:
            FormatError: the checkpoint has no such tensor.
        """
        self.require(name)
        return self.sources(name)[0]

    def read(self, name: str, source: Tensors) -> Tensor:
        """A parameter, put together from or cut out of what the checkpoint has.

        Raises:
            FormatError: a tensor is missing.
        """
        self.require(name)
        stored = self.find(name)
        if stored is not None:
            return source.tensor(stored)
        name = self._tied.get(name, name)
        if name in self._pieces:
            return put_together(self._model, name, self._pieces[name], source.tensor)
        fused, cut = self._cuts[name]
        if self._latest is None or self._latest[0] != fused:  # all experts are cut from one tensor, one after another
            self._latest = fused, self.read(fused, source)
        return cut(self._latest[1])

    def forget(self) -> None:
        """Let go of the fused tensor that was read last."""
        self._latest = None

    def is_tied(self, name: str) -> bool:
        """Whether the parameter shares another one's storage."""
        return name in self._tied
