"""What a run is predicted to need. Oracle: the run's own peak, sizes on disk, and sums worked out by hand."""

import dataclasses
import io
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from crashes import small_parent, small_run
from tiny_models import run

from ptq import cli, predict_time
from ptq.allocator import give_back
from ptq.config import CalibrationConfig, GPTQConfig, RefineConfig, RunConfig, scheme_for
from ptq.distributed import Ranks
from ptq.formats import CODECS
from ptq.models.loading import build_skeleton
from ptq.models.names import SourceNames
from ptq.models.structure import find_blocks, linears, weight_shape
from ptq.pipeline import quantize
from ptq.plan import Plan, make_plan
from ptq.predict import SHARE_OF_GPU, compared, describe_prediction, home_of, predict
from ptq.predict_memory import Block, Stage, block_work, gradient_work, largest_block, vocabulary, width
from ptq.predict_time import Rates, measure_rates
from ptq.progress import Progress
from ptq.report import PeakMemory, anonymous_bytes

RATES = Rates(products=1e12, native=4e12, elements=1e10, disk=1e9)
GPU = 24 * 2**30
LARGE = {  # hidden, intermediate, blocks, heads, key-value heads
    "8B": (4096, 14336, 32, 32, 8),
    "70B": (8192, 28672, 80, 64, 8),
    "405B": (16384, 53248, 126, 128, 8),
}


class Headers:
    """What a reader says of a checkpoint that holds a skeleton's parameters in bfloat16."""

    def __init__(self, skeleton):
        self._shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters()}

    def names(self):
        return tuple(self._shapes)

    def spec(self, name):
        return torch.bfloat16, self._shapes[name]

    def files(self):
        return {"model.safetensors": sum(2 * torch.Size(shape).numel() for shape in self._shapes.values())}


def large_plan(size: str, device: str, **changes) -> Plan:
    """A plan for a Llama of that size, without a file."""
    from transformers import LlamaConfig

    hidden, inner, depth, heads, kv = LARGE[size]
    shape = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=depth, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=128256, tie_word_embeddings=False,
    )  # fmt: skip
    skeleton = build_skeleton(shape, torch.bfloat16)
    config = RunConfig(model="m", output="o", method="gptq", calibration=CalibrationConfig(batch_size=1), **changes)
    found = dict(linears(skeleton))
    headers = Headers(skeleton)
    return Plan(
        config, Path("m"), shape, skeleton, find_blocks(skeleton), {p: scheme_for(config, p) for p in found},
        {p: weight_shape(m) for p, m in found.items()}, CODECS["gptq"], headers,
        SourceNames(skeleton, headers.names()), torch.bfloat16, torch.device(device),
    )  # fmt: skip


@pytest.mark.parametrize("size", LARGE)
def test_large_models_on_a_gpu_of_24_gib(size):
    """Blocks, hidden states, second moments and files by hand; the rest is work space."""
    hidden, inner, depth, heads, kv = LARGE[size]
    plan = large_plan(size, "cuda")
    home = home_of(plan, GPU)
    found = predict(plan, RATES, home=home)
    linear = hidden * hidden * (2 + 2 * kv / heads) + 3 * hidden * inner
    block = 2 * int(linear + 2 * hidden)
    assert found.memory["block"] == found.memory["float block"] == block
    assert found.host["hidden states"] == 2 * 128 * 2048 * hidden * 2
    # What down_proj reads: second moment, factor, and the drift's product with its weight.
    moments = 4 * (2 * inner**2 + hidden * inner)
    assert home.type == ("cpu" if size == "405B" else "cuda")
    assert (found.host if home.type == "cpu" else found.memory)["second moments"] == moments
    assert found.disk["output"] > depth * linear / 2  # four bits a weight
    assert found.peak == sum(found.memory.values()) < GPU
    text = describe_prediction(found)
    assert [line.split()[0] for line in text.splitlines()] == ["memory", "host", "disk", "time"]


@pytest.mark.parametrize(("method", "device"), [("gptq", "cpu"), ("awq", "cuda"), ("rtn", "cuda")])
def test_second_moments_stay_where_nothing_is_gained(method, device):
    plan = large_plan("405B", device)
    config = RunConfig(model="m", output="o", method=method, calibration=plan.config.calibration)
    assert home_of(plan._replace(config=config), room=1) == plan.device


@pytest.mark.parametrize(
    "changes", [{"gptq": GPTQConfig(gradient_tokens=8192)}, {"refine": RefineConfig(model_steps=1)}]
)
def test_second_moments_stay_where_only_other_passes_need_more(changes):
    plan = large_plan("8B", "cuda")
    peak = predict(plan, RATES).peak
    larger = plan._replace(config=dataclasses.replace(plan.config, **changes))
    assert predict(larger, RATES).peak > peak
    assert home_of(larger, room=int(peak / SHARE_OF_GPU) + 1).type == "cuda"


@pytest.mark.parametrize(("fits", "home"), [([True, True], "cuda"), ([True, False], "cpu")])
def test_second_moments_of_several_processes_lie_in_one_place(fits, home, monkeypatch):
    """Another GPU may have less room: sums of a tensor on a GPU and one on the host would wait for each other."""
    monkeypatch.setattr(Ranks, "gather", lambda _, own: [own, *fits[1:]])
    assert home_of(large_plan("70B", "cuda"), GPU, Ranks(0, 2)).type == home


def test_rounding_needs_no_hidden_states():
    plan = large_plan("70B", "cpu")
    found = predict(plan._replace(config=RunConfig(model="m", output="o", method="rtn")), RATES)
    assert "hidden states" not in found.memory
    assert found.disk["journal of hidden states"] == 0
    assert found.seconds["forward passes"] == 0


@pytest.mark.parametrize(("method", "tokens"), [("gptq", 0), ("gptq", 32), ("awq", 0), ("rtn", 0)])
def test_predicted_against_actual(method, tokens, tmp_path):
    """Of a small run most memory is the process's own, so 25 % says little; that the figures are there is tested."""
    parent = small_parent(tmp_path / "parent")
    config = small_run(parent, tmp_path / "out", method, exclude=("lm_head", "gate_proj", "up_proj", "down_proj"),
                       gptq=GPTQConfig(gradient_tokens=tokens))  # fmt: skip
    plan = make_plan(config)
    found = predict(plan, RATES, anonymous_bytes())
    document = run(config).document["prediction"]
    assert document["memory"]["actual"] == pytest.approx(found.peak, rel=0.25)
    assert document["seconds"]["predicted"] > 0
    assert document["seconds"]["actual"] > 0
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert found.disk["output"] == pytest.approx(written, rel=0.25)  # headers weigh much in files of 12 KB


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_packed_head_of_many_tokens(method, tmp_path):
    """It is larger than all blocks together. Oracle: the run's own peak, beyond what the process held before."""
    parent = small_parent(tmp_path / "parent", vocab_size=131072, hidden_size=128)
    config = small_run(parent, tmp_path / "out", method, exclude=(), format="compressed-tensors", max_shard_size="5GB")
    give_back()
    base = anonymous_bytes()
    needed = predict(make_plan(config), RATES, base).peak - base
    used = run(config).document["prediction"]["memory"]["actual"] - base
    assert 0.5 * needed < used < 1.1 * needed


def test_a_run_says_before_it_solves_that_the_disk_may_run_full(tmp_path, monkeypatch):
    monkeypatch.setattr("ptq.predict.free_disk", lambda output: 0)
    said = io.StringIO()
    quantize(small_run(small_parent(tmp_path / "parent"), tmp_path / "out", "rtn"), progress=Progress(said))
    before = said.getvalue().partition("block 1/")[0]
    assert "at its peak, 0.00 GB are free; should it run full, the same command goes on once there is space" in before
    assert (tmp_path / "out" / "report.json").is_file()


def test_rates_are_positive_and_leave_nothing(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        rates = measure_rates(torch.device("cpu"), tmp_path, dtype)
        assert rates.products > 1e6
        assert rates.native > 1e6
        assert rates.elements > 1e6
        assert rates.disk > 1e3
    assert list(tmp_path.iterdir()) == []


def test_the_first_times_of_a_rate_do_not_count():
    """Threads, tables and memory are made for them: one product took ten times as long, and more than the sample."""
    pauses = iter([4 * predict_time.SAMPLE, 2 * predict_time.SAMPLE])

    def work():
        time.sleep(next(pauses, predict_time.SAMPLE / 50))
        return torch.ones(1)

    assert predict_time._a_second(work) > 1 / predict_time.SAMPLE


def test_a_peak_that_is_gone_again_is_seen():
    with PeakMemory(period=0.001) as peak:
        before = peak.bytes
        block = torch.ones(2**24)  # 64 MiB, touched
        torch.ones(2**22).cumsum(0)
        del block
    assert peak.bytes - before > 2**25


def test_what_is_freed_between_kept_tensors_goes_back():
    tensors = [torch.ones(2**19) for _ in range(32)]  # 2 MiB each
    before = anonymous_bytes()
    del tensors[::2]
    give_back()
    assert before - anonymous_bytes() > 15 * 2**21


def test_compared():
    found = predict(large_plan("70B", "cpu"), RATES)
    document = compared(found, 5, 2.5)
    assert document["memory"] == {"predicted": found.peak, "actual": 5}
    assert document["seconds"]["actual"] == 2.5
    assert document["seconds"]["predicted"] == pytest.approx(sum(document["stages"].values()), rel=0.01)


@pytest.mark.parametrize(("library", "candidate"), [("avx2", 4), (None, 22)])
def test_time_by_hand(library, candidate, monkeypatch):
    """Products and elements of a rounding run and of GPTQ's codes, with rates that make one of the two vanish."""
    monkeypatch.setattr(predict_time, "columns_library", lambda: library)
    plan = large_plan("70B", "cpu")
    hidden, inner, depth, heads, kv = LARGE["70B"]
    shapes = [(hidden, hidden)] * 2 + [(hidden * kv // heads, hidden)] * 2 + [(inner, hidden)] * 2 + [(hidden, inner)]
    weights, squares = sum(n * k for n, k in shapes), sum(n * k * k for n, k in shapes)
    products = predict(plan, Rates(1e12, 1e30, 1e30, 1e30)).seconds
    assert products["codes"] == pytest.approx(depth * (squares * (7 + 2 + 3 * 2 * 9 / 16) / (1.1 * 1e12) + 7 * 0.012))
    assert products["forward passes"] + products["Hessians"] + products["disk"] < 1e-6
    elements = predict(plan, Rates(1e30, 1e30, 1e10, 1e30)).seconds
    assert elements["codes"] == pytest.approx(
        depth * (weights * (candidate * 26 + 0.86 * 8 * 64 + 800) / 1e10 + 7 * 0.012)
    )
    assert elements["factorizations"] < 1e-6
    # float32 products of a processor that has no units for the model's dtype are not as slow as those in that dtype
    slow, even = (predict(plan, Rates(1e12, native, 1e30, 1e30)).seconds["Hessians"] for native in (1e9, 1e12))
    assert slow == pytest.approx(even)
    rounding = predict(plan._replace(config=RunConfig(model="m", output="o", method="rtn")), RATES).seconds
    assert {name for name, seconds in rounding.items() if seconds} == {"codes", "disk"}
    refined = predict(plan._replace(config=dataclasses.replace(plan.config, refine=RefineConfig(steps=9))), RATES)
    assert refined.seconds["refinement"] > 0
    # Of so much text no pass can wait: every input is reached anew.
    waiting = predict(plan, Rates(1e30, 1e12, 1e30, 1e30)).seconds["forward passes"]
    few = CalibrationConfig(samples=1, sequence_length=2048, batch_size=1)
    short = predict(
        plan._replace(config=dataclasses.replace(plan.config, calibration=few)), Rates(1e30, 1e12, 1e30, 1e30)
    )
    assert waiting > 128 * 1.5 * short.seconds["forward passes"]


def test_gradients_by_hand():
    """Of 8192 tokens of a 70B Llama: four passes in float32, files of what all blocks read and of what is kept."""
    plan = large_plan("70B", "cpu")
    config = dataclasses.replace(plan.config, gptq=GPTQConfig(gradient_tokens=8000))
    found = predict(plan._replace(config=config), RATES)
    hidden, inner, depth, heads, kv = LARGE["70B"]
    moments = 4 * 512 * (3 * hidden + 2 * hidden * kv // heads + 2 * inner)
    assert found.disk["gradients"] == depth * moments  # what blocks read, 21.7 GB, is gone before the output is there
    long = dataclasses.replace(config, gptq=GPTQConfig(gradient_tokens=131072))
    large = predict(plan._replace(config=long), RATES).disk
    assert sum(large.values()) == 4 * 131072 * hidden * (depth + 1) + depth * moments
    linear = hidden * hidden * (2 + 2 * kv / heads) + 3 * hidden * inner
    products = 4 * 2 * 8192 * (linear + 2 * 2048 * hidden) / 0.8 + 2 * 8192 * moments / 4 / 0.4
    head = 3 * 2 * 8192 * 128256 * hidden / 0.8
    assert predict(plan._replace(config=config), Rates(1e12, 1e30, 1e30, 1e30)).seconds["gradients"] == pytest.approx(
        (depth * products + head) / 1e12
    )
    none = Rates(1e30, 1e30, 1e30, 1e30)
    parts = 7 * 512 // 32  # every Linear has 512 outputs or more
    assert predict(plan._replace(config=config), none).seconds["codes"] == pytest.approx(depth * 0.012 * parts)
    # Where most is needed, at down_proj: moments of its outputs, their factors, and 2 ** 24 weights of two targets.
    block = largest_block(plan)
    alone, weighed = (block_work(plan._replace(config=c), block, apart=True)[1] for c in (plan.config, config))
    assert weighed["solver"] - alone["solver"] == 4 * 2 * (2**24 + 512 * hidden)
    assert "gradients" not in predict(plan, RATES).seconds
    assert "gradients" not in predict(plan, RATES).disk


@pytest.mark.parametrize(("name", "passed"), [("Qwen3MoeConfig", 8), ("LlamaConfig", 128)])
def test_gradients_of_experts_are_of_the_tokens_routed_to_them(name, passed):
    """Where the configuration says to how many of its experts a token goes."""
    import transformers

    shape = getattr(transformers, name)()
    plan = large_plan("8B", "cpu")._replace(hf_config=shape)
    stages = [Stage(2048, [768, 768], 128), Stage(768, [2048], 128), Stage(2048, [512], 1)]
    weights = [(n, stage.features) for stage in stages for n in stage.rows * stage.inputs]
    found = gradient_work(plan, Block(1 << 40, weights, stages, 0))
    assert found["activations"] == 4 * 4 * 2048 * (passed * (2 * 768 + 2048) + 512 + shape.hidden_size)


def test_the_command(tmp_path, capsys):
    assert cli.main(["plan", "--config", "demo.yaml", "--set", f"output={tmp_path / 'deep' / 'out'}"]) == 0
    printed = capsys.readouterr().out
    for word in ("quantize     16 x 128 x 256", "memory ", "disk ", "time ", "hidden states 0.03 GB"):
        assert word in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("without", ["hidden_size", "vocab_size"])
def test_a_configuration_with_other_names(without, tmp_path):
    """As code of a model's own has them. Oracle: the prediction where it has the usual ones."""
    plan = make_plan(small_run(small_parent(tmp_path / "parent"), tmp_path / "out"))
    rates = Rates(1e9, 1e9, 1e9, 1e9)
    usual = plan.hf_config.to_dict()
    unusual = SimpleNamespace(**{key: value for key, value in usual.items() if key != without})
    unusual.get_text_config = lambda: unusual
    other = plan._replace(hf_config=unusual)
    assert predict(other, rates, 0, torch.device("cpu")) == predict(plan, rates, 0, torch.device("cpu"))
    assert (width(other), vocabulary(other)) == (usual["hidden_size"], usual["vocab_size"])
