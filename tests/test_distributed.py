"""Several processes share a run.

Oracles: the same run by one process, up to the order in which sums are added up; statistics in float64; after a death
the bytes of a run of as many processes that was left alone.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import rank_runs
import torch
from crashes import checksums, small_run
from safetensors.torch import load_file

import ptq.distributed
from ptq import distributed
from ptq.awq.block import _clip_and_round
from ptq.config import GPTQConfig, RefineConfig, RunConfig, dump
from ptq.distributed import ALONE, Ranks, joined
from ptq.errors import ConfigError, RankError
from ptq.formats.codec import Scheme
from ptq.gptq.block import choose_codes
from ptq.gptq.solver import factorize
from ptq.pipeline import quantize
from ptq.task import BlockTask

HERE = Path(__file__).resolve().parent
LOST = "RankError: all 2 processes of a run must stay to its end; another one has ended: the same command goes on"
ABSENT = "RankError: all 2 processes of a run must join; one could not be reached"


def environment():
    paths = [str(HERE), str(HERE.parent), str(HERE.parent / "kernels")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("ranks")
    subprocess.run([sys.executable, str(HERE / "rank_runs.py"), str(place)], check=True, env=environment(), timeout=400)
    return place


@pytest.fixture(scope="module")
def found(place):
    return torch.load(place / "found.pt", weights_only=False)


def bound(X, Y):
    """Of the error of ``Y^T X / T`` in float32, elementwise, in whatever order the T products are added up.

    Each product is rounded once, and so is each of the sums it goes through, T at most. Up to 3 more roundings a batch
    weigh the batches before it by their tokens, 3 join the processes, and 2 belong to Y itself: n in all, each off by
    at most u = 2^-24 of what it rounds, which gives the factor n u / (1 - n u) on the sum of magnitudes.
    """
    n = len(X) + 3 * len(rank_runs.ROWS) + 5
    u = 2.0**-24
    return n * u / (1 - n * u) * (Y.abs().T @ X.abs()) / len(X)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_statistics_of_all_processes(size, found):
    """Float64 on all tokens at once; every process has the very same numbers."""
    one, other = rank_runs.batches(0), rank_runs.batches(1)
    X, F, routed = torch.cat(one).double(), torch.cat(other).double(), torch.cat(one[::2]).double()
    everyone = found["statistics"][size]
    assert len(everyone) == size
    for dense, few, again, drift in everyone:
        for stats, x in ((dense, X), (few, routed), (again, X)):
            assert stats.tokens == len(x)
            assert ((stats.hessian - x.T @ x / len(x)).abs() <= bound(x, x)).all()
            if stats is again:  # nothing asks for the magnitude there
                continue
            ones = torch.ones(len(x), 1, dtype=torch.float64)
            assert ((stats.magnitude - x.abs().mean(0)).abs() <= bound(x, ones)[0]).all()
        assert few.routed == len(routed)
        assert ((drift - (F - X).T @ X / len(X)).abs() <= bound(X, F - X)).all()
    for mine in everyone[1:]:
        for a, b in zip(everyone[0], mine, strict=True):
            for x, y in zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]:
                assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_a_router_that_differs_in_one_process_ends_the_correction_in_all(found):
    assert [drift for _, drift in found["unpaired"]] == [None, None]


def test_what_is_exchanged(found):
    sentence = "ConfigError: every process needs a calibration sequence; found 2 for 3 processes: start fewer, or raise"
    for *stacked, total, told, few in found["exchanges"]:
        assert stacked == [True] * 4
        assert total == [3.0, 3]
        assert told == 0
        assert few.startswith(sentence)


def timeless(value):
    """A report without what differs from run to run: times, memory and the output's name."""
    if isinstance(value, dict):
        left_out = ("seconds", "peak_bytes", "memory", "prediction", "output", "processes", "resumed", "files")
        return {key: timeless(each) for key, each in value.items() if key not in left_out}
    return [timeless(each) for each in value] if isinstance(value, list | tuple) else value


def assert_alike(one, other, key=""):
    """Losses are sums over codes; see `test_results_equal_those_of_one_process`."""
    if isinstance(one, dict):
        assert list(one) == list(other)
        for name, each in one.items():
            assert_alike(each, other[name], name)
    elif isinstance(one, float) and "loss" in key:
        assert other == pytest.approx(one, rel=0.05)
    else:
        assert one == other, key


@pytest.mark.parametrize("name", rank_runs.RUNS)
def test_results_equal_those_of_one_process(name, found, place):
    """Up to the order of summation.

    H and the losses differ by rounding errors of float32 alone, about 1e-6 of their size (`bound`). That moves a weight
    that GPTQ is about to round by 1e-6 / damping = 1e-4 of a step at most, so one weight in 5000 comes to lie on the
    other side of a tie; then the rest of its row, 32 columns here, may go another way: under 1 in 150 codes, of which
    most do not. A row's loss cannot tell the two ways apart, so the losses stay within a few percent.
    """
    one, first, second = found["runs"][name]
    assert second == {key: first[key] for key in second}
    assert (one["hardware"]["processes"], first["hardware"]["processes"]) == (1, 2)
    assert_alike(timeless(one), timeless(first))
    directories = [place / "runs" / f"{name} {size}" for size in (1, 2)]
    files = sorted(path.name for path in directories[0].iterdir())
    assert sorted(path.name for path in directories[1].iterdir()) == files
    same = total = 0
    for file in files:
        if file.endswith(".safetensors"):
            mine, theirs = (load_file(directory / file) for directory in directories)
            assert list(mine) == list(theirs)
            same += sum(int((mine[key] == theirs[key]).sum()) for key in mine if key.endswith("qweight"))
            total += sum(mine[key].numel() for key in mine if key.endswith("qweight"))
    assert total > 500
    assert same >= (1 - 8 / 150) * total  # words of eight codes


def test_processes_that_are_given_other_data(found):
    sentence = (
        "ConfigError: all processes of a run must have the same configuration, model and text; calibration text is"
    )
    assert all(said.startswith(sentence) for said in found["others"])


@pytest.mark.parametrize("offload", ["memory", "disk"])
def test_a_death_ends_the_run_and_the_same_command_goes_on(offload, found):
    """Where the hidden states of one process are damaged as well, from a block earlier."""
    death = found["deaths"][offload]
    assert death["dead"][0].startswith(LOST)
    assert death["dead"][1] is None
    streams = [f"{unit}-{stream}" for unit in ("0001", "0002") for stream in ("float", "quantized")]
    assert death["files"] == sorted(streams + [f"{stream}.1" for stream in streams])
    assert "machine.processes was 2 and is 1" in death["alone"]
    resumed = death["healed"][0]["resumed"]
    assert resumed["blocks"] == 1
    assert "hidden/0002-quantized.1 is damaged" in resumed["notes"][0]
    assert death["same"]
    assert death["left"] == []
    assert "exists; choose another `output`" in death["once more"][0]
    assert death["once more"][1].startswith((LOST, ABSENT))  # the first may have ended before the second had joined


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("refine.steps", {"refine": RefineConfig(steps=2)}),
        ("refine.model_steps", {"refine": RefineConfig(model_steps=2)}),
        ("gptq.gradient_tokens", {"gptq": GPTQConfig(gradient_tokens=2)}),
    ],
)
def test_what_one_process_does_alone_is_refused(name, changes, tmp_path):
    config = replace(small_run(tmp_path, tmp_path / "out"), **changes)
    sentence = f"{name} must be 0 where several processes share a run; found 2 with 3 processes: start one, or"
    with pytest.raises(ConfigError, match=sentence):
        quantize(config, ranks=Ranks(1, 3))


def torchrun(config, *program, size=2):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", *program]
    return subprocess.run(
        [*command, "--config", str(config)], env=environment(), capture_output=True, text=True, timeout=200
    )  # fmt: skip


def test_torchrun_and_a_process_that_is_killed(place, tmp_path):
    """Codes of the run that was left alone in `rank_runs.deaths`."""
    file = tmp_path / "run.yaml"
    file.write_text(dump(small_run(place / "deaths" / "parent-memory", tmp_path / "out")), encoding="utf-8")
    died = torchrun(file, str(HERE / "rank_killed.py"))
    assert died.returncode == 1
    said = [line for line in died.stderr.splitlines() if line.startswith("ptq: ")]
    assert len(said) == 1
    assert said[0].startswith("ptq: rank 0: ")
    assert said[0].endswith("another process has ended: the same command goes on from the last finished block") or (
        said[0].endswith("another one has ended: the same command goes on from the last finished block")
    )
    assert not (tmp_path / "out").exists()
    again = torchrun(file, "-m", "ptq.gptq")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("modules quantized") == 1
    assert json.loads((tmp_path / "out" / "report.json").read_text())["resumed"]["blocks"] == 2
    whole = checksums(place / "deaths" / "out-memory whole")
    changed = {name for name, each in checksums(tmp_path / "out").items() if each != whole[name]}
    assert changed == {"ptq_config.yaml"}  # which names the output


def test_processes_that_cannot_be_reached(monkeypatch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in (("WORLD_SIZE", 2), ("RANK", 1), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, "PATIENCE", timedelta(seconds=2))
    with pytest.raises(RankError, match=r"must join; one could not be reached \(.+\): it has ended, or"):
        joined()


def test_one_process_joins_nobody(monkeypatch):
    """So that torchrun with one process is a plain run."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert joined() is ALONE
    batches = [torch.zeros(2, 4)]
    assert ALONE.share(batches)[0] is batches[0]
    assert ALONE.rows(5) == slice(0, 5)
    assert ALONE.stack(batches[0], 2) is batches[0]
    assert (ALONE.total(1.5), ALONE.told("a"), ALONE.gather(2)) == ([1.5], "a", [2])
    assert ALONE.said("no") == "no"


def test_sequences_are_dealt_out():
    """Lengths are kept apart, and nothing is lost or doubled."""
    batches = [torch.arange(20).view(5, 4)[:3], torch.arange(20).view(5, 4)[3:], torch.arange(100, 106).view(3, 2)]
    parts = [Ranks(rank, 3).share(batches) for rank in range(3)]
    assert [[tuple(b.shape) for b in part] for part in parts] == [[(2, 4), (1, 2)], [(2, 4), (1, 2)], [(1, 4), (1, 2)]]
    rows = sorted(tuple(row.tolist()) for part in parts for batch in part for row in batch)
    assert rows == sorted(tuple(row.tolist()) for batch in batches for row in batch)
    assert Ranks(1, 3).share([]) == []


def test_every_process_has_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert Ranks(3, 4, 1).device(torch.device("cuda")) == torch.device("cuda:1")
    assert chosen == [1]
    assert Ranks(1, 2, 1).device(torch.device("cpu")) == torch.device("cpu")
    assert ALONE.device(torch.device("cuda:1")) == torch.device("cuda:1")
    with pytest.raises(ConfigError, match=r"need a GPU each; this machine has 2 and at least 3 processes: start 2"):
        Ranks(2, 4, 2).device(torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"need a GPU each; device is cuda:1: use device: cuda or auto"):
        Ranks(1, 2, 1).device(torch.device("cuda:1"))


def test_more_processes_than_rows():
    """A process without a row has nothing to solve, but takes part."""
    scheme = Scheme(4, 8, True)
    for method in ("gptq", "awq"):
        task = BlockTask("", {}, RunConfig("m", "o", method), torch.float16, ranks=Ranks(0, 3))
        part = torch.randn(2, 16)[task.ranks.rows(2)]
        H = torch.eye(16)
        solved = choose_codes(part, H, factorize(H), scheme, task) if method == "gptq" else (
            _clip_and_round(part, H, scheme, task)
        )  # fmt: skip
        assert (solved.codes.shape, solved.codes.dtype, solved.loss) == ((0, 16), torch.uint8, 0.0)
        assert solved.grid.scales.shape == solved.grid.zeros.shape == (0, 2)


class Store:
    """Of words that processes leave each other."""

    def __init__(self):
        self.counts = {}

    def add(self, key, more):
        self.counts[key] = self.counts.get(key, 0) + more
        return self.counts[key]


class Gone:
    def add(self, *_):
        raise RuntimeError("Broken pipe")


def test_one_process_speaks():
    store = Store()
    members = [Ranks(rank, 3, rank, store) for rank in range(3)]
    assert [each.speaks() for each in members] == [True, False, False]
    assert members[2].said("why") == "rank 2: why"
    assert Ranks(1, 2, 1, Gone()).speaks()
    assert ALONE.speaks()


def test_memory_that_runs_out_is_no_death(monkeypatch):
    def fail(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ptq.distributed.dist, "all_reduce", fail)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        Ranks(0, 2).add_up(torch.zeros(1))
