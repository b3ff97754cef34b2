"""How errors of a Linear's outputs meet again at the model's end: one pass of the float model there and back.

For each Linear this is ``G = E[g g^T]``, g the gradient, with respect to its outputs, of the log likelihood of a token
that the model itself predicts (drawn, so that G is the Fisher information and errors weigh as in KL divergence). The
pass goes block by block: hidden states wait in files, and on the way back each block runs once more, with gradients.
What `ptq.gptq.outputs` needs of G is on disk afterwards, beside the journal: a run that was cut short goes on with it.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ptq.errors import FormatError, UnsupportedModelError
from ptq.float_stream import float_stream
from ptq.formats.assembly import Piece, damage, read_tensor, write_part
from ptq.formats.sealed import seal, unseal
from ptq.gptq.outputs import add_moments, row_blocks, settled
from ptq.grid import check_finite
from ptq.half_products import plain_products
from ptq.hidden import Batch, HiddenFile, described, opened
from ptq.journal_directory import MEASURED
from ptq.models.block_call import hidden_of
from ptq.models.streamed import StreamedModel
from ptq.models.structure import linears, weight_shape
from ptq.plan import Plan

RECORD = Path(MEASURED).name


class OutputMoments(NamedTuple):
    """Diagonal blocks of G (`ptq.gptq.outputs.row_blocks`) of the Linears of every block, in files."""

    directory: Path
    pieces: Sequence[Mapping[str, Piece]]  # of each block's file
    tokens: int

    def of(self, index: int, linear: str) -> list[Tensor]:
        """Of one Linear, by its block and its path below that: float32 ``[n, n]`` on the CPU; none if it has none."""
        names = [name for name in self.pieces[index] if name.rpartition(":")[0] == linear]
        return [read_tensor(_file(self.directory, index), name) for name in names]


def output_moments(plan: Plan, batches: Sequence[Tensor], directory: Path) -> OutputMoments:
    """Measure on the tokens that `gptq.gradient_tokens` asks for.

    Args:
        plan: ``gptq.gradient_tokens`` says how many tokens to take, in whole sequences; all if there are fewer.
        batches: calibration tokens ``int64 [B, T]``.
        directory: for the files; whatever else is in it goes.

    Raises:
        NumericsError: a gradient is not finite.
        UnsupportedModelError: a block passes no gradient on, or overwrites what that needs.
        PtqError: the disk is full.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    rows = _sequences(batches, plan.config.gptq.gradient_tokens)
    stream = float_stream(plan)
    with plain_products():
        kept = _there(stream, rows, directory)
        pieces = _back(plan, stream, rows, kept, directory)
    tokens = sum(row.numel() for row in rows)
    seal(directory / RECORD, {"tokens": tokens, "pieces": pieces})
    return OutputMoments(directory, pieces, tokens)


def opened_moments(directory: Path, blocks: int) -> OutputMoments | None:
    """What an earlier process of the same run has measured, if every byte of it is as it was written."""
    try:
        content, _ = unseal(directory / RECORD)
    except (FormatError, OSError):
        return None
    pieces = [{name: Piece(dtype, tuple(shape), checksum) for name, (dtype, shape, checksum) in each.items()}
              for each in content["pieces"]]  # fmt: skip
    if len(pieces) != blocks or any(damage(_file(directory, i), each) for i, each in enumerate(pieces)):
        return None
    return OutputMoments(directory, pieces, content["tokens"])


def _file(directory: Path, index: int) -> Path:
    return directory / f"{index:04d}.safetensors"


def _hidden(directory: Path, index: int) -> Path:
    return directory / f"hidden-{index}"


def _sequences(batches: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """Sequences ``[1, T]`` of that many tokens in all, spread over the calibration text."""
    rows = [row for batch in batches for row in batch.split(1)]
    count, total = 0, 0
    while count < len(rows) and total < tokens:
        total += rows[count].numel()
        count += 1
    return [rows[i * len(rows) // count] for i in range(count)]


def _there(stream: StreamedModel, rows: Sequence[Tensor], directory: Path) -> list[list[Batch]]:
    """What every block reads, and last what the exit reads, of each sequence: in files, of which two are open."""
    hidden = stream.enter(rows, HiddenFile(_hidden(directory, 0)).keep)
    kept = [described(hidden)]
    for index in range(len(stream.blocks)):
        keep = HiddenFile(_hidden(directory, index + 1)).keep
        with stream.block(index):
            hidden = [keep(stream.run_block(index, i, each).cpu()) for i, each in enumerate(hidden)]
        kept.append(described(hidden))
    return kept


def _taken(directory: Path, kept: list[list[Batch]]) -> list[Tensor]:
    """The last of what is kept; it is gone from the directory."""
    batches = kept.pop()
    path = _hidden(directory, len(kept))
    tensors = opened(path, batches)
    path.unlink()
    return tensors


def _back(
    plan: Plan, stream: StreamedModel, rows: Sequence[Tensor], kept: list[list[Batch]], directory: Path
) -> list[dict[str, Piece]]:
    """Gradients from the last block to the first; each block's moments are on disk before the next one is loaded."""
    draws = torch.Generator().manual_seed(plan.config.calibration.seed)
    with stream.outer():
        ends = zip(rows, _taken(directory, kept), strict=True)
        gradients = [_at_the_end(stream, row, hidden, draws) for row, hidden in ends]
    pieces: list[dict[str, Piece]] = []
    for index in reversed(range(len(stream.blocks))):
        path = stream.block_path(index)
        with stream.block(index) as block:
            names = {name: module for name, module in linears(block) if f"{path}.{name}" in plan.targets}
            sums = {name: _Sum(weight_shape(module)[0], stream.device) for name, module in names.items()}
            with _gradients_of(names, {name: each.add for name, each in sums.items()}):
                for i, hidden in enumerate(_taken(directory, kept)):
                    gradients[i] = _through(stream, index, i, hidden, gradients[i])
        tensors = {}
        for name, total in sums.items():
            for i, each in enumerate(total.blocks):
                check_finite(each, f"the gradients of the outputs of {path}.{name}")
                tensors[f"{name}:{i}"] = settled(each, total.tokens).cpu()
        pieces.append(dict(write_part(_file(directory, index), tensors).pieces))
    return pieces[::-1]


class _Sum:
    """Of ``g g^T`` over what one Linear puts out."""

    def __init__(self, outputs: int, device: torch.device) -> None:
        sizes = [rows.stop - rows.start for rows in row_blocks(outputs)]
        self.blocks = [torch.zeros(size, size, device=device) for size in sizes]
        self.tokens = 0

    def add(self, gradients_TN: Tensor) -> None:
        add_moments(self.blocks, gradients_TN)
        self.tokens += len(gradients_TN)


@contextmanager
def _gradients_of(modules: Mapping[str, nn.Module], seen: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Call each module's function with the gradient ``[T, N]`` of what it puts out, whenever there is one."""

    def hook(add: Callable[[Tensor], None]) -> Callable[..., None]:
        def after(_module: nn.Module, _args: object, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda g: add(g.reshape(-1, g.shape[-1])))

        return after

    handles = [module.register_forward_hook(hook(seen[name])) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _at_the_end(stream: StreamedModel, row: Tensor, hidden: Tensor, draws: torch.Generator) -> Tensor:
    """Gradient of the log likelihoods of drawn tokens, with respect to what the exit reads."""
    with torch.enable_grad():
        start = hidden.to(stream.device).requires_grad_()
        logits = stream.forward(row, lambda index, *args, **kwargs: stream.wrap(start.clone())).logits
    gradient = logits.detach().float().softmax(-1)
    # From numbers of the CPU's generator, which are the same whatever computes the rest.
    levels = torch.rand(gradient.shape[:-1], generator=draws).unsqueeze(-1).to(gradient.device)
    drawn = (gradient.cumsum(-1) < levels).sum(-1, keepdim=True).clamp(max=gradient.shape[-1] - 1)
    gradient.scatter_add_(-1, drawn, gradient.new_full(drawn.shape, -1.0))
    return _gradient(logits, start, gradient.to(logits.dtype), "the model's exit")


def _through(stream: StreamedModel, index: int, batch: int, hidden: Tensor, gradient: Tensor) -> Tensor:
    """From the gradient of what a block puts out to that of what it reads."""
    call = stream.calls[index][batch]
    with torch.enable_grad():
        start = hidden.to(stream.device).requires_grad_()
        end = hidden_of(stream.blocks[index](start.clone(), *call.args, **call.kwargs))  # may be changed in place
    return _gradient(end, start, gradient.to(stream.device), stream.block_path(index))


def _gradient(end: Tensor, start: Tensor, gradient: Tensor, where: str) -> Tensor:
    if not end.requires_grad:
        raise UnsupportedModelError(
            f"gptq.gradient_tokens needs gradients through the whole model; {where} passes none on: set it to 0"
        )
    try:
        return torch.autograd.grad(end, start, gradient)[0].cpu()
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise UnsupportedModelError(
            f"gptq.gradient_tokens needs gradients through the whole model; {where} changes in place what its gradient "
            "is computed from: set it to 0"
        ) from error
