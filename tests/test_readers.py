"""Who reads a checkpoint, and how it is split among GPUs.

Oracles: the table in ptq/readers.py, case by case; splits against codecs encoding the shares.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from format_examples import random_weight

from ptq.formats import CODECS, Scheme
from ptq.readers import LOADS, REFUSES, SLOWER, UNKNOWN, Facts, verdicts
from ptq.tensor_parallel import split_problems

ROOT = Path(__file__).resolve().parent.parent
S4, S8, A4 = Scheme(4, 128, True), Scheme(8, 32, True), Scheme(4, 128, False)
LINEARS = [f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                                 "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]  # fmt: skip
EXPERTS = [f"model.layers.0.mlp.experts.{index}.{name}" for index in range(2) for name in ("up_proj", "down_proj")]


def facts(codec: str, scheme: Scheme, **changes: Any) -> Facts:
    names = changes.pop("names", LINEARS)
    schemes = {**dict.fromkeys(names, scheme), **changes.pop("others", {})}
    settings_ = CODECS[codec].quantization_config({**schemes, "lm_head": None}, damping=None, version="0")
    settings_ = {key: value for key, value in (settings_ | changes.pop("set", {})).items() if value != "absent"}
    shapes = dict.fromkeys(schemes, changes.pop("shape", (256, 256)))
    found = Facts(codec, settings_, schemes, shapes, (), frozenset(), {}, (8, 4))
    return found._replace(**changes)


def written(codec: str, scheme: Scheme, floats: list[str]) -> Facts:
    """As our writer says that ``floats`` are not packed."""
    schemes = {name: scheme for name in LINEARS if name not in floats}
    settings_ = CODECS[codec].quantization_config({**schemes, **dict.fromkeys(floats)}, damping=None, version="0")
    return facts(codec, scheme, names=list(schemes), floats=tuple(floats), set=settings_)


# Facts, and (status, part of the reason) of transformers, vLLM, SGLang: the table in ptq/readers.py, case by case.
OK, MARLIN = (LOADS, ""), (REFUSES, "4 or 8 bits")
GPTQMODEL, DENSE, ZEROS = (LOADS, "gptqmodel"), (SLOWER, "expanded to dense"), (REFUSES, "must be symmetric")
CASES: dict[str, tuple[Facts, tuple[str, str], tuple[str, str], tuple[str, str]]] = {
    "gptq": (facts("gptq", S4), GPTQMODEL, OK, OK),
    "gptq 3 bits": (facts("gptq", Scheme(3, 128, True)), GPTQMODEL, MARLIN, MARLIN),
    "gptq v2": (facts("gptq_v2", A4), GPTQMODEL, ZEROS, ZEROS),
    "gptq v2 symmetric": (facts("gptq_v2", S4), GPTQMODEL, OK, OK),
    "gptq v1 asymmetric": (
        facts("gptq", S4)._replace(schemes=dict.fromkeys(LINEARS, A4)), (REFUSES, "gptqmodel itself"),
        ZEROS, ZEROS,
    ),
    "gptq v1 asymmetric of gptqmodel": (
        facts("gptq", S4, set={"meta": {"quantizer": ["gptqmodel:7"]}})._replace(schemes=dict.fromkeys(LINEARS, A4)),
        GPTQMODEL, ZEROS, ZEROS,
    ),
    "gptq mixed": (
        facts("gptq", S4, others={"model.layers.0.mlp.down_proj": Scheme(8, 128, True)}),
        (REFUSES, "`dynamic` is dropped"), OK, OK,
    ),
    "gptq with a silent float": (
        facts("gptq", S4, floats=("model.layers.0.extra",)), GPTQMODEL, OK, (REFUSES, "does not say so (1 such"),
    ),
    "gptq with a skipped float": (
        facts("gptq", S4, floats=("model.layers.0.extra",), set={"dynamic": {r"-:.*extra": {}}}),
        (REFUSES, "`dynamic` is dropped"), OK, OK,
    ),
    "gptq with a float elsewhere": (
        facts("gptq", S4, floats=("model.tower.fc1",), set={"dynamic": {"-:.*tower": {}}}),
        GPTQMODEL, OK, OK,
    ),
    "gptq below a tower's neighbour": (
        facts("gptq", S4, names=["model.language_model.layers.0.mlp.down_proj"]),
        (REFUSES, "model.layers.*, not for model.language_model.layers.0.mlp.down_proj"), OK, OK,
    ),
    "gptq in named blocks": (
        facts("gptq", S4, names=["model.text.layers.0.fc"], set={"block_name_to_quantize": "model.text.layers"}),
        GPTQMODEL, OK, OK,
    ),
    "gptq experts": (facts("gptq", S4, names=EXPERTS), (REFUSES, "packed experts"), OK, OK),
    "gptq experts of 3 bits": (
        facts("gptq", Scheme(3, 128, True), names=EXPERTS), (REFUSES, "packed experts"), MARLIN, MARLIN,
    ),
    "gptq experts of another width": (
        facts("gptq", S4, others=dict.fromkeys(EXPERTS, Scheme(8, 128, True))), (REFUSES, "packed experts"), OK,
        (REFUSES, "gives model.layers.0.mlp.experts other settings than model.layers.0.mlp.experts.0.up_proj"),
    ),
    "gptq without sym": (
        facts("gptq", S4, set={"sym": "absent"}), GPTQMODEL, (REFUSES, "must have `sym`"), (REFUSES, "must have `sym`"),
    ),
    "gptq with strange damping": (facts("gptq", S4, set={"damp_percent": 1.5}), (REFUSES, "between 0 and 1"), OK, OK),
    "gptq in groups of 16": (
        facts("gptq", Scheme(4, 16, True)), GPTQMODEL, (UNKNOWN, "found 16"), (REFUSES, "found 16"),
    ),
    "gptq in odd shapes": (
        facts("gptq", S4, shape=(96, 256)), GPTQMODEL, (SLOWER, "96 x 256 (6 such"), (SLOWER, "96 x 256"),
    ),
    "one of three differs": (
        facts("compressed-tensors", S4, others={LINEARS[1]: Scheme(8, 128, True)}), DENSE,
        (REFUSES, "q_proj is fused with"), (REFUSES, "q_proj is fused with"),
    ),
    "one expert differs": (
        facts("compressed-tensors", S4, names=EXPERTS, others={EXPERTS[3]: Scheme(8, 128, True)}), DENSE,
        (REFUSES, "fused with"), (REFUSES, "fused with"),
    ),
    "awq": (facts("awq", A4), GPTQMODEL, OK, OK),
    "awq without zeros": (
        facts("awq", S4, set={"zero_point": False}), GPTQMODEL, (SLOWER, "Marlin is not used"), (SLOWER, "float16"),
    ),
    "awq experts without zeros": (
        facts("awq", S4, names=EXPERTS, set={"zero_point": False}), (REFUSES, "packed experts"), (SLOWER, "Marlin"),
        (REFUSES, "without experts"),
    ),
    "awq that skips a fragment": (
        facts("awq", A4, set={"modules_to_not_convert": ["gate"]}), GPTQMODEL, (REFUSES, "has 'gate'"),
        (REFUSES, "has 'gate'"),
    ),
    "awq with a silent float": (
        facts("awq", A4, floats=("model.layers.0.extra",)), GPTQMODEL, OK, (REFUSES, "does not say so"),
    ),
    "awq with float members of a fused module": (
        facts("awq", A4, names=LINEARS[3:], floats=tuple(LINEARS[:3]), set={"modules_to_not_convert": LINEARS[:3]}),
        GPTQMODEL, OK, (REFUSES, "gives model.layers.0.self_attn.qkv_proj other settings than"),
    ),
    "awq with a float fused module": (written("awq", A4, LINEARS[:3]), GPTQMODEL, OK, OK),
    "awq with float experts": (written("awq", A4, EXPERTS), GPTQMODEL, OK, OK),
    "awq as AutoAWQ spells it": (
        facts("awq", Scheme(4, 64, False), set={"group_size": "absent", "q_group_size": 64}),
        (REFUSES, "q_group_size is ignored"), OK, OK,
    ),
    "compressed-tensors": (facts("compressed-tensors", S4), DENSE, OK, (LOADS, "not on CPUs")),
    "compressed-tensors with float members of a fused module": (
        facts("compressed-tensors", S4, names=LINEARS[3:], floats=tuple(LINEARS[:3]), set={"ignore": LINEARS[:3]}),
        DENSE, OK, (UNKNOWN, "gives model.layers.0.self_attn.qkv_proj other settings than"),
    ),
    "compressed-tensors with a float fused module": (
        written("compressed-tensors", S4, LINEARS[:3]), DENSE, OK, (LOADS, "not on CPUs"),
    ),
    "compressed-tensors with a fused module of 8 bits": (
        facts("compressed-tensors", S4, others=dict.fromkeys(LINEARS[:3], Scheme(8, 128, True))), DENSE,
        (LOADS, "only 4 bits"), (LOADS, "not on CPUs"),
    ),
    "gpt2": (facts("compressed-tensors", S4, transposed=True), (UNKNOWN, "Conv1D"), (UNKNOWN, ""), (UNKNOWN, "")),
    "compressed-tensors 3 bits": (facts("compressed-tensors", Scheme(3, 128, True)), DENSE, OK, MARLIN),
    "compressed-tensors asymmetric": (facts("compressed-tensors", A4), (SLOWER, "dequantize=True"), OK, OK),
    "compressed-tensors asymmetric 3 bits": (
        facts("compressed-tensors", Scheme(3, 128, False)), (SLOWER, "dequantize=True"), MARLIN, MARLIN,
    ),
    "compressed-tensors asymmetric mixed": (
        facts("compressed-tensors", A4, others={LINEARS[5]: Scheme(8, 128, False)}),
        (REFUSES, "takes one scheme"), OK, OK,
    ),
    "experts that the class leaves out": (
        facts("compressed-tensors", S4, names=EXPERTS, left_out=EXPERTS[0]), (REFUSES, f"({EXPERTS[0]})"),
        (UNKNOWN, EXPERTS[0]), (UNKNOWN, EXPERTS[0]),
    ),
    "gptq experts that the class leaves out": (
        facts("gptq", S4, names=EXPERTS, left_out=EXPERTS[0]), (REFUSES, "packed experts"), (UNKNOWN, EXPERTS[0]),
        (UNKNOWN, EXPERTS[0]),
    ),
    "a class that wants weights": (
        facts("compressed-tensors", S4, init_error="no weight"), (SLOWER, "dequantize=True), as the class stops"),
        OK, OK,
    ),
    "a class that wants weights, mixed": (
        facts("compressed-tensors", S4, init_error="no weight", others={LINEARS[5]: Scheme(8, 128, True)}),
        (REFUSES, "the class (no weight) loads with dequantize=True only"), OK, OK,
    ),
    "compressed-tensors asymmetric experts": (
        facts("compressed-tensors", A4, names=EXPERTS), (REFUSES, "zero points of experts"),
        (UNKNOWN, "asymmetric experts"), OK,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_readers(case: str) -> None:
    given, *expected = CASES[case]
    for verdict, (status, reason) in zip(verdicts(given), expected, strict=True):
        assert (verdict.status, reason in verdict.reason) == (status, True), verdict


SPLITS = [("gptq", S4), ("gptq", Scheme(3, 32, True)), ("gptq_v2", Scheme(8, 32, False)), ("awq", Scheme(4, 32, False)),
          ("compressed-tensors", Scheme(3, 32, True)), ("compressed-tensors", Scheme(4, 64, False)),
          ("compressed-tensors", Scheme(5, -1, False))]  # fmt: skip


@pytest.mark.parametrize(("codec", "scheme"), SPLITS)
@pytest.mark.parametrize("role", ["column", "row"])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_split_is_a_cut_through_the_packed_tensors(codec: str, scheme: Scheme, role: str, parts: int) -> None:
    """A share encoded for itself must be what cutting the whole's tensors gives, wherever no problem is named."""
    n, k = 256, 256  # encoders of GPTQ want shares of 32 rows at least
    given = facts(codec, scheme, names=["x"], shape=(n, k), roles={"x": role}, heads=(8, 8))
    whole = random_weight(n, k, scheme.bits, scheme.group_size, symmetric=scheme.symmetric)
    packed = CODECS[codec].encode("x", whole, torch.float32)
    if split_problems(given, parts):
        return
    if role == "column":
        share = whole._replace(codes=whole.codes[: n // parts], scales=whole.scales[: n // parts],
                               zeros=whole.zeros[: n // parts])  # fmt: skip
    else:
        groups = max(1, whole.scales.shape[1] // parts)
        size = (k // parts) // groups
        share = whole._replace(codes=whole.codes[:, : k // parts], scales=whole.scales[:, :groups],
                               zeros=whole.zeros[:, :groups], group_size=size)  # fmt: skip
    for name, tensor in CODECS[codec].encode("x", share, torch.float32).items():
        if name.endswith(("g_idx", "weight_shape")):
            continue  # counted, not cut
        assert torch.equal(tensor, packed[name][tuple(slice(0, size) for size in tensor.shape)]), name
        cut = [have // want for have, want in zip(packed[name].shape, tensor.shape, strict=True)]
        assert set(cut) <= {1, parts}, name


@pytest.mark.parametrize(
    ("codec", "scheme", "role", "shape", "parts", "problem"),
    [
        ("gptq", S4, "row", (256, 768), 4, "768 / 4 = 192 columns are no whole groups of 128"),
        ("gptq", S4, "row", (256, 769), 2, "769 columns do not divide by 2"),
        ("gptq", Scheme(3, 16, True), "row", (256, 64), 4, "64 / 4 = 16 columns of 3 bits are no whole words"),
        ("gptq", S4, "column", (257, 256), 2, "257 rows do not divide by 2"),
        ("awq", A4, "column", (24, 256), 8, "24 / 8 = 3 rows of 4 bits are no whole words"),
        ("compressed-tensors", S4, "column", (24, 256), 8, None),
        ("compressed-tensors", A4, "column", (24, 256), 8, "24 / 8 = 3 rows of 4 bits"),
        ("gptq", Scheme(4, -1, True), "row", (256, 768), 4, None),
    ],
)
def test_splits(codec: str, scheme: Scheme, role: str, shape: tuple[int, int], parts: int, problem: str | None) -> None:
    found = split_problems(facts(codec, scheme, names=["x"], shape=shape, roles={"x": role}, heads=(8, 8)), parts)
    assert found == [] if problem is None else problem in found[0]


@pytest.mark.parametrize(
    ("codec", "written", "before", "reason"),
    [
        ("gptq", r"(?:.+\.)?", r"model\.language_model\.",
         "as vLLM calls it, language_model.model.layers.0.mlp.down_proj (1 such)"),
        ("compressed-tensors", r"re:(?:.+\.)?lm_head$", "lm_head", "must name the packed lm_head by a pattern"),
    ],
)  # fmt: skip
def test_names_beside_a_tower_that_are_none_to_vllm(codec: str, written: str, before: str, reason: str) -> None:
    """Oracle: vLLM 0.32, which loads what is written now, and did not load what was written before."""
    schemes = dict.fromkeys([f"model.language_model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")], S4)
    schemes["lm_head" if codec == "compressed-tensors" else "model.language_model.layers.0.mlp.down_proj"] = S8
    tower: dict[str, Scheme | None] = {"model.visual.blocks.0.fc": None}
    settings = CODECS[codec].quantization_config({**schemes, **tower}, damping=None, version="0")
    text = json.dumps(settings)
    old = text.replace(json.dumps(written)[1:-1], json.dumps(before)[1:-1])
    assert old != text
    found = [verdicts(facts(codec, S4)._replace(settings=json.loads(t), schemes=schemes))[1] for t in (text, old)]
    assert [verdict.status for verdict in found] == [LOADS, REFUSES]
    assert reason in found[1].reason


def test_few_keys_are_repeated() -> None:
    """Two heads of keys on eight GPUs: each holds one whole head, 16 rows, though 32 / 8 rows are no word."""
    name = "model.layers.0.self_attn.k_proj"
    given = facts("gptq", Scheme(4, 32, True), names=[name], shape=(32, 256), roles={name: "column"}, heads=(8, 2))
    assert split_problems(given, 8) == []
    assert split_problems(given._replace(heads=(8, 8)), 8) == [f"{name}: 32 / 8 = 4 rows of 4 bits are no whole words"]


@pytest.mark.parametrize("document", ["README.md", "docs/formats.md"])
@pytest.mark.parametrize("codec", ["gptq", "gptq_v2", "awq"])
def test_the_tables_name_every_package_that_transformers_needs(document: str, codec: str) -> None:
    rows = (ROOT / document).read_text(encoding="utf-8").splitlines()
    row = next(row for row in rows if row.startswith(f"| `{codec}`") and "gptqmodel" in row)
    reason = verdicts(facts(codec, A4 if codec == "awq" else S4))[0].reason
    assert [name in row for name in ("gptqmodel", "optimum")] == [name in reason for name in ("gptqmodel", "optimum")]


@pytest.mark.parametrize(("codec", "experts"), [("awq", True), ("compressed-tensors", False)])
def test_what_engines_fuse_is_listed_beside_its_members(codec: str, experts: bool) -> None:
    """The experts for AWQ alone: compressed-tensors' are looked up one by one, and transformers has such a module."""
    settings_ = written(codec, S4, [*LINEARS[:4], *EXPERTS]).settings  # gate without up
    listed = settings_["modules_to_not_convert" if codec == "awq" else "ignore"]
    fused = ["model.layers.0.self_attn.qkv_proj", *["model.layers.0.mlp.experts"] * experts]
    assert listed == [*LINEARS[:4], *EXPERTS, *fused]


def test_the_guide_to_budgets_says_which_widths_engines_refuse() -> None:
    guide = " ".join((ROOT / "docs/compare.md").read_text(encoding="utf-8").split())
    assert "vLLM and SGLang refuse GPTQ weights of 2 and 3 bits, and SGLang compressed-tensors ones as well" in guide
    for codec, reader in (("gptq", 1), ("gptq", 2), ("compressed-tensors", 2)):
        found = {bits: verdicts(facts(codec, Scheme(bits, 128, True)))[reader].status for bits in (2, 3, 4, 8)}
        assert [bits for bits, status in found.items() if status == REFUSES] == [2, 3]
