"""Runs that several processes share, forked from one that has imported everything.

``python rank_runs.py DIRECTORY`` does all `CASES` and keeps what they return in ``DIRECTORY/found.pt``; the processes
find each other by what torchrun would have told them.
"""

import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import tiny_models
import torch
from crashes import checksums, small_parent, small_run
from tiny_models import run
from torch import Tensor, nn

from ptq import journal, walk
from ptq.calibration.capture import InputGroup, collect, collect_drift
from ptq.config import AWQConfig, BitBudget, GPTQConfig, RunConfig
from ptq.distributed import ALONE, Ranks, joined
from ptq.errors import PtqError

ROWS = (5, 0, 7, 3, 9)  # tokens of batches
FEATURES = 6
MOST = ("lm_head",)
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("gptq", {"gptq": GPTQConfig(), "exclude": MOST}),
    "gptq, head": ("gptq", {"exclude": ("q_proj", "k_proj", "v_proj", "gate_proj")}),
    "awq": ("awq", {"exclude": MOST}),
    "awq, gptq codes": ("awq", {"awq": AWQConfig(grid=5, codes="gptq"), "exclude": MOST}),
    "rtn": ("rtn", {}),
    "budget": ("gptq", {"bits": BitBudget(4.0)}),
    "experts": ("gptq", {"exclude": MOST}),
    "given tokens": ("gptq", {"exclude": MOST}),
    "given texts": ("awq", {"exclude": MOST}),
}
# Data that a caller hands over in every process, for the runs of these names.
GIVEN: dict[str, Sequence[Any]] = {
    "given tokens": [*tiny_models.tokens(3, 16), [5, 6, 7, 8, 9]],
    "given texts": [tiny_models.TEXT.read_text(encoding="utf-8")[start : start + 300] for start in (0, 300, 600)],
}


def batches(seed: int) -> list[Tensor]:
    """Float32 inputs ``[T, K]`` of a Linear, in channels of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, FEATURES, generator=generator) * torch.arange(1, FEATURES + 1) for rows in ROWS]


def together(size: int, action: Callable[[Ranks], Any], place: Path) -> list[Any]:
    """What an action returns in each of ``size`` processes; an error as its class and message; None of a dead one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    files = [place / f"rank-{rank}.pt" for rank in range(size)]
    children = []
    for rank, file in enumerate(files):
        file.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            try:
                os.environ.update(RANK=f"{rank}", WORLD_SIZE=f"{size}", LOCAL_RANK=f"{rank}", MASTER_ADDR="localhost",
                                  MASTER_PORT=f"{port}")  # fmt: skip
                torch.save(_outcome(lambda _: action(joined()), Ranks()), file)
            except BaseException:  # noqa: BLE001  (a child must not go on as its parent)
                traceback.print_exc()
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def _outcome(action: Callable[[Ranks], Any], ranks: Ranks) -> Any:
    try:
        return action(ranks)
    except PtqError as error:
        return f"{type(error).__name__}: {error}"


def statistics(place: Path) -> Any:
    """By number of processes what the first and the last get of inputs that are split; the routed are few."""
    modules = {name: nn.Linear(FEATURES, 4) for name in ("dense", "routed", "float")}
    groups = [InputGroup(("dense",)), InputGroup(("routed",), pool=0)]
    inputs = list(zip(range(len(ROWS)), batches(0), batches(1), strict=True))

    def forward(index: int, x: Tensor) -> None:
        modules["dense"](x)
        if index % 2 == 0:  # of two processes the second has no such batch
            modules["routed"](x)

    def action(ranks: Ranks) -> Any:
        mine = inputs[ranks.rank :: ranks.size]
        stats = collect(modules, groups, [lambda i=i, x=x: forward(i, x) for i, x, _ in mine], ranks=ranks)
        pairs = [(lambda x=x: modules["dense"](x), lambda y=y: modules["float"](y)) for _, x, y in mine]
        return [*stats, *collect_drift(modules["dense"], modules["float"], 1, pairs, "dense", ranks)]

    return {size: together(size, action, place) for size in (1, 2, 3)}


def unpaired(place: Path) -> Any:
    """Drift where one process saw another number of rows in the float model."""
    module, other = nn.Linear(FEATURES, 4), nn.Linear(FEATURES, 4)
    x = batches(0)[2]

    def action(ranks: Ranks) -> Any:
        pairs = [(lambda: module(x), lambda: other(x[: len(x) - ranks.rank]))]
        return collect_drift(module, other, 1, pairs, "module", ranks)

    return together(2, action, place)


def exchanges(place: Path) -> Any:
    """Rows that are put together, where there are fewer than processes as well."""

    def action(ranks: Ranks) -> Any:
        found = []
        for count in (1, 2, 3, 7):
            rows = torch.arange(2 * count, dtype=torch.uint8).view(count, 2)
            found.append(torch.equal(ranks.stack(rows[ranks.rows(count)], count), rows))
        few = [torch.zeros(2, 4, dtype=torch.int64)]
        return [*found, ranks.total(1.0, ranks.rank), ranks.told(ranks.rank), _outcome(lambda r: r.share(few), ranks)]

    return together(3, action, place)


def runs(place: Path) -> Any:
    """The reports of every kind of run, of one process and of two."""
    parents = dict.fromkeys(RUNS, small_parent(place / "parent"))
    parents["experts"] = place / "experts"
    tiny_models.save(_experts(), parents["experts"])
    found = {}
    for name, (method, changes) in RUNS.items():
        one = small_run(parents[name], place / f"{name} 1", method, **changes)
        two = replace(one, output=str(place / f"{name} 2"))
        documents = together(2, partial(_document, two, GIVEN.get(name)), place)
        found[name] = [_document(one, GIVEN.get(name), ALONE), *documents]
    return found


def _document(config: RunConfig, given: Sequence[Any] | None, ranks: Ranks) -> Any:
    return run(config, ranks=ranks, calibration=given).document


def others(place: Path) -> Any:
    """Each process is given other data than the rest."""
    config = small_run(small_parent(place / "parent"), place / "out")
    return together(2, lambda ranks: _document(config, [tiny_models.tokens(4, 16, ranks.rank)], ranks), place)


def _experts() -> Any:
    import transformers

    sizes = {**tiny_models.GROUPED, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = transformers.MixtralConfig(**sizes, num_local_experts=3, num_experts_per_tok=1, dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tiny_models.randomize(model)
    return model


def deaths(place: Path) -> Any:
    """A process dies at the third block; then the run is tried otherwise, damaged, and finally made again."""
    found = {}
    for offload in ("memory", "disk"):
        config = small_run(small_parent(place / f"parent-{offload}"), place / f"out-{offload}")
        config = replace(config, calibration=replace(config.calibration, offload=offload))
        found[offload] = _death(config, place)
    return found


def _death(config: RunConfig, place: Path) -> dict[str, Any]:
    output = Path(config.output)
    unfinished = output.with_name(f".{output.name}.run")

    def again(ranks: Ranks) -> Any:
        return run(config, ranks=ranks).document

    def dying(ranks: Ranks) -> Any:
        real = walk.quantize_block

        def block(*arguments: Any) -> Any:
            if ranks.rank == 1 and arguments[2].name.endswith("2"):
                os._exit(9)
            return real(*arguments)

        walk.quantize_block = block
        return again(ranks)

    together(2, again, place)
    whole = checksums(output)
    output.rename(output.with_name(f"{output.name} whole"))
    found = {"dead": together(2, dying, place), "files": sorted(p.name for p in unfinished.glob("hidden/*"))}
    found["alone"] = _outcome(lambda _: run(config), Ranks())
    last = unfinished / "hidden" / "0002-quantized.1"
    last.write_bytes(last.read_bytes()[::-1])
    found["healed"] = together(2, again, place)
    found["same"] = checksums(output) == whole
    found["left"] = [path.name for path in output.parent.glob(".*")]
    found["once more"] = together(2, again, place)
    return found


CASES = (statistics, unpaired, exchanges, runs, others, deaths)


def main(directory: Path) -> None:
    """Each case in a directory of its own."""
    torch.set_num_threads(1)
    journal.SECONDS = 3600.0  # no commit is put off, however busy the machine is
    found = {}
    for case in CASES:
        place = directory / case.__name__
        place.mkdir()
        found[case.__name__] = case(place)
    torch.save(found, directory / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
