"""Bit budgets: the choice itself, what it is based on, and the checkpoints that come out.

Oracles: brute force over all choices; a solver's measured losses; KL divergences of models changed by hand;
transformers with compressed-tensors.
"""

import io
import itertools
import json
import random
from fractions import Fraction

import pytest
import torch
from tiny_models import build, divergence, logits, run, save, settings, tokens

import ptq
from ptq import cli
from ptq.budget import Item, allocate, capacity, check_budget
from ptq.budget_measure import measure
from ptq.calibration.data import calibration_batches
from ptq.config import BitBudget, RunConfig, SchemeOverride, dump, load_config
from ptq.errors import ConfigError
from ptq.formats.codec import Scheme
from ptq.models.loading import load_tokenizer
from ptq.nn import QuantLinear
from ptq.plan import make_plan
from ptq.plan_size import describe
from ptq.progress import Progress


def brute_force(items: list[Item], budget: str) -> tuple[float, int] | None:
    """Least loss within the budget and, among equals, the most bits: every choice is tried."""
    room = Fraction(budget) * sum(item.weights for item in items)
    best = None
    for choice in itertools.product(*(item.losses for item in items)):
        cost = sum(bits * item.weights for bits, item in zip(choice, items, strict=True))
        loss = sum(item.losses[bits] for bits, item in zip(choice, items, strict=True))
        if cost <= room and (best is None or (loss, -cost) < best):
            best = loss, -cost
    return best


def random_items(seed: int, count: int, *, convex: bool) -> list[Item]:
    rng = random.Random(seed)
    items = []
    for _ in range(count):
        scale = 10 ** rng.uniform(-3, 1)
        losses = {b: scale * (4.0**-b if convex else rng.random()) for b in rng.sample((2, 3, 4, 8), rng.randint(1, 4))}
        items.append(Item(rng.choice([1, 2, 3, 7, 16, 17, 64]), losses))
    return items


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_best_there_is(seed: int, convex: bool) -> None:
    items = random_items(seed, 6, convex=convex)
    budget = random.Random(seed).choice(["2", "2.7", "3.5", "4.25", "6"])
    best = brute_force(items, budget)
    if best is None:
        with pytest.raises(ConfigError, match=r"bits.budget must be at least"):
            allocate(items, float(budget))
        return
    chosen = allocate(items, float(budget))
    cost = sum(bits * item.weights for bits, item in zip(chosen, items, strict=True))
    loss = sum(item.losses[bits] for bits, item in zip(chosen, items, strict=True))
    assert cost <= Fraction(budget) * sum(item.weights for item in items)
    # The sums are formed in another order: six additions, each rounded to half a unit in the last place.
    assert loss == pytest.approx(best[0], rel=6 * 2.0**-53)


def test_hundreds_of_awkward_sizes_stay_quick_and_fill_the_budget() -> None:
    rng = random.Random(0)
    items = [Item(rng.randint(10**6, 10**7), {b: rng.random() * 4.0**-b for b in (2, 3, 4, 8)}) for _ in range(300)]
    total = sum(item.weights for item in items)
    chosen = allocate(items, 3.3)
    spent = sum(bits * item.weights for bits, item in zip(chosen, items, strict=True))
    assert spent <= Fraction("3.3") * total
    # What is left does not pay for the cheapest further step.
    steps = [
        item.weights * min(b - bits for b in item.losses if b > bits)
        for bits, item in zip(chosen, items, strict=True)
        if bits < 8
    ]
    assert Fraction("3.3") * total - spent < min(steps)


def test_a_decimal_budget_is_taken_at_its_word() -> None:
    """The float 3.3 is a little less than 3.3, and floor(3.3 * 10) would be 32 in exact arithmetic on it."""
    assert capacity(3.3, 10) == 33
    assert allocate([Item(7, {3: 1.0, 4: 0.5}), Item(3, {3: 1.0, 4: 0.9})], 3.3) == [3, 4]


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return save(build("llama", torch.bfloat16), tmp_path_factory.mktemp("budget") / "parent")


@pytest.fixture(scope="module")
def measured(parent, tmp_path_factory):
    config = settings(parent, tmp_path_factory.mktemp("m") / "out", bits=BitBudget(3.5), format="compressed-tensors")
    plan = make_plan(config)
    batches = calibration_batches(config.calibration, load_tokenizer(plan.directory, False))
    return plan, batches, measure(plan, batches, Progress(io.StringIO()))


def test_groups_are_those_that_share_an_input(measured) -> None:
    _, _, groups = measured
    short = [tuple(name.rpartition(".")[2] for name in group.members) for group in groups]
    assert short == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)] * 2
    assert [group.weights for group in groups[:4]] == [64 * (64 + 32 + 32), 64 * 64, 2 * 64 * 128, 64 * 128]
    for group in groups:
        assert group.widths == (2, 3, 4, 8)
        for losses in group.losses.values():
            assert losses[2] > losses[3] > losses[4] > losses[8] > 0


@pytest.mark.parametrize("index", [0, 3, 6])
def test_sensitivity_is_a_divergence_over_an_error(measured, index: int) -> None:
    """Oracle: a dense float32 model with the group rounded by ptq's own grid search, on the probe's tokens."""
    from ptq.budget_measure import PROBE_TOKENS, _nearest
    from ptq.calibration.capture import collect, trace_groups
    from ptq.loss import quadratic_loss

    _, batches, groups = measured
    model = build("llama", torch.float32)
    model.load_state_dict(build("llama", torch.bfloat16).state_dict())
    probe = batches[0][: max(1, PROBE_TOKENS // batches[0].shape[1])]
    modules = {name: model.get_submodule(name) for name in groups[index].members}
    runs = [lambda b=b: model(input_ids=b, use_cache=False) for b in batches]
    stats = collect(modules, trace_groups(modules, runs[:1]), runs)[0]
    before = logits(model, probe)
    error = 0.0
    with torch.no_grad():
        for module in modules.values():
            W = module.weight.clone()
            module.weight.copy_(_nearest(W, stats.hessian, Scheme(3, 32, True), torch.bfloat16))
            error += quadratic_loss(W - module.weight, stats.hessian) / quadratic_loss(W, stats.hessian)
    expected = divergence(before, logits(model, probe)) / error
    # float32 sums over blocks in another order; a KL of 1e-3 is the difference of logarithms good to 1e-6.
    assert groups[index].sensitivity == pytest.approx(expected, rel=2e-3)


def average_bits(report) -> float:
    groups = report.document["budget"]["groups"]
    return sum(g["bits"] * g["weights"] for g in groups) / sum(g["weights"] for g in groups)


def test_the_checkpoint_holds_what_was_chosen(parent, measured, tmp_path) -> None:
    """ptq and stock transformers read it alike; losses measured by the solver are near the predicted ones."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    pytest.importorskip("compressed_tensors")
    report = run(settings(parent, tmp_path / "out", bits=BitBudget(3.5), format="compressed-tensors"))
    document = report.document["budget"]
    assert document["widths"] == [2, 3, 4, 8]
    assert 3.3 < document["average_bits"] == average_bits(report) <= 3.5
    loaded = ptq.load(tmp_path / "out", device="cpu", impl="reference")
    packed = {name: m for name, m in loaded.named_modules() if isinstance(m, QuantLinear)}
    for group in document["groups"]:
        for name in group["modules"]:
            assert packed[name].bits == group["bits"] == report.modules[name]["bits"]
            row = report.modules[name]
            # A prediction, without coordinate descent and with damping: a factor of five says that its units are right
            # (8 bits lose some 250 times less than 4).
            assert 1 / 5 < row["predicted_relative_loss"] / row["relative_loss"] < 5
    assert len({module.bits for module in packed.values()}) > 1
    own = CompressedTensorsConfig()  # transformers' own reader, not the one ptq brings
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, quantization_config=own).eval()
    dense = ptq.load(parent, device="cpu")
    for name, module in packed.items():
        dense.get_submodule(name).weight.copy_(module.dequantize(torch.bfloat16))
    batch = tokens(2, 32, 5)
    assert torch.equal(logits(stock, batch), logits(dense, batch))


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_other_methods_and_fixed_modules(method: str, parent, tmp_path) -> None:
    """A width in overrides stays, is paid from the budget, and the members beside it are chosen without it."""
    config = settings(
        parent, tmp_path / "out", method, bits=BitBudget(3.5), format="gptq", exclude=(),
        overrides={"v_proj": SchemeOverride(bits=8), "lm_head": SchemeOverride(group_size=64)},
    )  # fmt: skip
    report = run(config)
    assert average_bits(report) <= 3.5
    chosen = {tuple(g["modules"]): g["bits"] for g in report.document["budget"]["groups"]}
    layer = "model.layers.0.self_attn"
    assert chosen[(f"{layer}.v_proj",)] == 8
    assert (f"{layer}.q_proj", f"{layer}.k_proj") in chosen
    assert ("lm_head",) in chosen
    assert report.document["calibration"]["tokens"] == 8 * 48
    loaded = ptq.load(tmp_path / "out", device="cpu")
    assert loaded.lm_head.bits == chosen[("lm_head",)]
    assert loaded.lm_head.group_size == 64


def test_a_report_brings_the_choice_back(measured) -> None:
    from ptq.budget_measure import as_chosen, spend

    plan, _, groups = measured
    chosen, document = spend(plan, groups)
    assert as_chosen(plan, {"budget": document}).schemes == chosen.schemes != plan.schemes
    assert as_chosen(plan, {}).schemes == plan.schemes


def test_more_bits_are_never_predicted_to_lose_more(measured) -> None:
    from ptq.budget_measure import spend

    plan, _, groups = measured
    losses = []
    for budget in (2.0, 2.5, 3.0, 3.5, 4.0, 6.0, 8.0):
        config = plan.config.__class__(**{**plan.config.__dict__, "bits": BitBudget(budget)})
        losses.append(spend(plan._replace(config=config), groups)[1]["predicted_kl"])
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(sum(group.predicted(2) for group in groups), rel=1e-12)
    assert losses[-1] == pytest.approx(sum(group.predicted(8) for group in groups), rel=1e-12)


def test_the_plan_says_what_a_budget_will_take(parent, tmp_path) -> None:
    config = settings(parent, tmp_path / "out", bits=BitBudget(3.5), format="compressed-tensors")
    plan = make_plan(config)
    text = describe(plan)
    assert "3.5 bits on average" in text
    assert "3 bits" not in text
    report = run(config)
    size = float(text.rpartition("-> ")[2].partition(" MB")[0]) * 1e6
    unspent = (3.5 - report.document["budget"]["average_bits"]) * 73728 / 8
    # printed to a tenth of a megabyte; tensor headers of some 160 bytes
    assert abs(size - unspent - report.document["size"]["after"]) < 0.05e6 + 60 * 160


@pytest.mark.parametrize(("format_", "symmetric"), [("gptq", True), ("gptq_v2", False), ("compressed-tensors", False)])
@pytest.mark.parametrize("fixed", [None, 8])
def test_the_plan_counts_zero_points_at_the_budget(parent, tmp_path, format_, symmetric, fixed) -> None:
    """Oracle: the bits a weight of the run's report; what was not spent takes its share of zero points along."""
    overrides = {} if fixed is None else {"v_proj": SchemeOverride(bits=fixed)}
    config = settings(parent, tmp_path / "out", "rtn", bits=BitBudget(3.5), format=format_, symmetric=symmetric,
                      overrides=overrides)  # fmt: skip
    planned = float(describe(make_plan(config)).partition(" bits a quantized weight")[0].rpartition(" ")[2])
    document = run(config).document
    unspent = 3.5 - document["budget"]["average_bits"]
    assert abs(planned - unspent * (1 + 1 / 16) - document["size"]["bits_per_weight"]) < 0.001 + 0.01 * unspent


WRONG = {
    "a uniform format": ({"format": "awq"}, "holds several widths; awq holds one"),
    "asymmetric in v1": ({"symmetric": False}, "gptq holds no asymmetric widths"),
    "too many fixed": ({"overrides": {"mlp": SchemeOverride(bits=8)}}, "must be at least 6"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_met_is_refused_before_a_weight_is_read(case: str, parent, tmp_path) -> None:
    changes, expected = WRONG[case]
    with pytest.raises(ConfigError, match=expected):
        make_plan(settings(parent, tmp_path / "out", bits=BitBudget(3.0), **changes))


def test_without_a_budget_nothing_is_checked() -> None:
    check_budget(RunConfig("m", "o", "gptq", format="awq"), {}, {})


def test_a_budget_in_a_file(tmp_path, parent) -> None:
    text = f"model: {parent}\noutput: out\nmethod: gptq\nformat: compressed-tensors\n"
    file = tmp_path / "run.yaml"
    file.write_text(text + "bits: {budget: 3.5}\n")
    config = load_config(file)
    assert config.bits == BitBudget(3.5)
    file.write_text(dump(config))
    assert load_config(file) == config
    for bits, expected in {
        "{budget: 9}": "bits.budget must be between 2 and 8, found 9.0",
        "{budgte: 3}": "unknown key bits.budgte; did you mean bits.budget",
        "{}": "bits.budget is required",
        "5": "bits must be 2, 3, 4 or 8, or {budget: average}, found 5",
        "null": "bits must be a whole number",
        "3.5": "bits must be a whole number",
    }.items():
        with pytest.raises(ConfigError) as error:
            load_config(file, [f"bits={bits}"])
        assert expected in str(error.value)


def test_the_command_line(parent, tmp_path, capsys) -> None:
    changes = [f"model={parent}", f"output={tmp_path}/out", "bits={budget: 3.5}", "group_size=32",
               "calibration.samples=2", "calibration.sequence_length=32", "evaluation=null"]  # fmt: skip
    assert cli.main(["quantize", "--config", "demo.yaml", *[f"--set={change}" for change in changes]]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["configuration"]["bits"] == {"budget": 3.5}
    assert 3.49 < report["budget"]["average_bits"] <= 3.5


def test_all_experts_of_a_layer_get_one_width(tmp_path) -> None:
    """Engines run them as one fused module."""
    test_moe = pytest.importorskip("test_moe")
    directory = save(test_moe.build("mixtral"), tmp_path / "parent")
    report = run(settings(directory, tmp_path / "out", "rtn", bits=BitBudget(3.5), format="compressed-tensors"))
    assert average_bits(report) <= 3.5
    experts = [g for g in report.document["budget"]["groups"] if "experts" in g["modules"][0]]
    assert [len(group["modules"]) for group in experts] == [3 * 4, 3 * 4]
    assert {report.modules[name]["bits"] for name in experts[0]["modules"]} == {experts[0]["bits"]}
