"""What the peers write, as data, and what of ours they read."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Cell(NamedTuple):
    """A checkpoint. ``settings`` are arguments of the tool's driver in ``drivers/``; for ``ptq`` keys of ``--set``.

    ``parent`` is made by `benchmarks.foreign.parents`; without one it is the model of the examples.
    """

    tool: str
    label: str
    method: str
    settings: Mapping[str, Any]
    parent: str = ""


def _gptq(label: str, **settings: Any) -> Cell:
    return Cell("GPTQModel", label, "gptq", {"sym": True, "format": "gptq", **settings})


def _compressed(label: str, *groups: tuple[list[str], Mapping[str, Any]]) -> Cell:
    return Cell("llm-compressor", label, "gptq", {"groups": groups})


def _linear(bits: int, symmetric: bool, group_size: int | None, **more: Any) -> tuple[list[str], Mapping[str, Any]]:
    strategy = {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
    return ["Linear"], {"num_bits": bits, "symmetric": symmetric, **strategy, **more}


def _round(label: str, layout: str, **settings: Any) -> Cell:
    return Cell("AutoRound", label, "autoround", {"format": layout, "sym": True, "group_size": 128, **settings})


ACT_ORDER = {"desc_act": True, "act_group_aware": False}
FIRST_EIGHT_BITS = {"lm_head": {"bits": 16}, "model.layers.0.mlp.down_proj": {"bits": 8}}

WRITTEN = (
    _gptq("4-bit g128 sym v1", bits=4, group_size=128),
    _gptq("4-bit g32 sym v1, desc_act", bits=4, group_size=32, **ACT_ORDER),
    _gptq("4-bit channel sym v1, desc_act", bits=4, group_size=-1, **ACT_ORDER),
    _gptq("4-bit g128 asym v1", bits=4, group_size=128, sym=False),
    _gptq("4-bit g64 asym v2, desc_act", bits=4, group_size=64, sym=False, format="gptq_v2", **ACT_ORDER),
    _gptq("2-bit g64 sym v1", bits=2, group_size=64),
    _gptq("4-bit g128 sym v2", bits=4, group_size=128, format="gptq_v2"),
    _gptq("2-bit g64 asym v2", bits=2, group_size=64, sym=False, format="gptq_v2"),
    _gptq("8-bit g64 asym v2, desc_act", bits=8, group_size=64, sym=False, format="gptq_v2", **ACT_ORDER),
    _gptq("2-bit g64 asym v1", bits=2, group_size=64, sym=False),
    _gptq("3-bit g128 sym v1", bits=3, group_size=128),
    _gptq("3-bit g128 asym v1, desc_act", bits=3, group_size=128, sym=False, **ACT_ORDER),
    _gptq("3-bit g128 asym v2", bits=3, group_size=128, sym=False, format="gptq_v2"),
    _gptq("8-bit g128 sym v1", bits=8, group_size=128),
    _gptq("8-bit g128 asym v1", bits=8, group_size=128, sym=False),
    _gptq("4-bit, v_proj 8-bit, o_proj float", bits=4, group_size=128,
          dynamic={r"+:.*\.v_proj$": {"bits": 8, "group_size": 64}, r"-:.*\.o_proj$": {}}),
    Cell("GPTQModel", "AWQ GEMM g128", "awq", {"bits": 4, "group_size": 128, "sym": False, "format": "gemm"}),
    Cell("GPTQModel", "AWQ GEMM g128 sym", "awq", {"bits": 4, "group_size": 128, "sym": True, "format": "gemm"}),
    _compressed("4-bit g128 sym", _linear(4, True, 128)),
    _compressed("4-bit g128 asym", _linear(4, False, 128)),
    _compressed("4-bit g64 sym, actorder weight", _linear(4, True, 64, actorder="weight")),
    _compressed("4-bit g64 sym, actorder group", _linear(4, True, 64, actorder="group")),
    _compressed("4-bit g64 asym, actorder group", _linear(4, False, 64, actorder="group")),
    _compressed("4-bit channel sym", _linear(4, True, None)),
    _compressed("8-bit g128 asym", _linear(8, False, 128)),
    _compressed("8-bit channel sym", _linear(8, True, None)),
    _compressed("4-bit channel asym", _linear(4, False, None)),
    _compressed("3-bit g64 asym", _linear(3, False, 64)),
    _compressed("2-bit g32 sym", _linear(2, True, 32)),
    _compressed(
        "4-bit g128 sym, down_proj 8-bit channel asym",
        (["re:.*self_attn.*_proj$", "re:.*(gate|up)_proj$"], _linear(4, True, 128)[1]),
        (["re:.*down_proj$"], _linear(8, False, None)[1]),
    ),
    _round("auto_round, 4-bit sym", "auto_round", bits=4),
    _round("auto_round, 4-bit asym", "auto_round", bits=4, sym=False),
    _round("auto_round, 2-bit g64 asym", "auto_round", bits=2, group_size=64, sym=False),
    _round("auto_round, 3-bit sym", "auto_round", bits=3),
    _round("auto_round, mixed 4 and 8 bits", "auto_round", bits=4, layer_config=FIRST_EIGHT_BITS),
    _round("auto_round:auto_awq, asym", "auto_round:auto_awq", bits=4, sym=False),
    _round("auto_gptq, 4-bit sym", "auto_gptq", bits=4),
    _round("auto_gptq, 4-bit asym", "auto_gptq", bits=4, sym=False),
    _round("auto_awq, asym", "auto_awq", bits=4, sym=False),
    _round("auto_round:auto_gptq, 4-bit asym", "auto_round:auto_gptq", bits=4, sym=False),
)  # fmt: skip


def _ours(label: str, layout: str, bits: int, symmetric: bool, **more: Any) -> Cell:
    return Cell("ptq", label, layout, {"format": layout, "bits": bits, "symmetric": str(symmetric).lower(), **more})


GPTQ4, GPTQ3 = (_ours(f"gptq {bits}-bit sym", "gptq", bits, True) for bits in (4, 3))
GPTQ8, GPTQ2 = (_ours(f"gptq {bits}-bit sym", "gptq", bits, True) for bits in (8, 2))
HEAD = _ours("gptq 4-bit sym, packed head", "gptq", 4, True, exclude="[]")
V2 = _ours("gptq_v2 4-bit asym", "gptq_v2", 4, False)
AWQ, AWQ_SYMMETRIC = (_ours(f"awq {name}", "awq", 4, name == "sym") for name in ("asym", "sym"))
CT4, CT3 = (_ours(f"ct {bits}-bit sym", "compressed-tensors", bits, True) for bits in (4, 3))
CT4_ASYMMETRIC = _ours("ct 4-bit asym", "compressed-tensors", 4, False)
AWQ_HEAD = _ours("awq asym, packed head", "awq", 4, False, exclude="[]")
CT_HEAD = _ours("ct 4-bit sym, packed head", "compressed-tensors", 4, True, exclude="[]")
CT8_CHANNEL = _ours("ct 8-bit channel sym", "compressed-tensors", 8, True, group_size=-1)
AWQ_FLOAT, CT_FLOAT = (
    _ours(f"{name} 4-bit, float q, k, v", layout, 4, name == "ct", exclude="[lm_head, q_proj, k_proj, v_proj]")
    for name, layout in (("awq", "awq"), ("ct", "compressed-tensors"))
)
DOWN8 = "{mlp.down_proj: {bits: 8}}"
FIRST32 = "{'*language_model.layers.0.self_attn.[qkv]_proj': {group_size: 32}, down_proj: {group_size: 32}}"
GPTQ_MIXED = _ours("gptq 4-bit sym, down_proj 8-bit", "gptq", 4, True, overrides=DOWN8)
CT_MIXED = _ours("ct 4-bit sym, down_proj 8-bit", "compressed-tensors", 4, True, overrides=DOWN8)
# A mixture of experts; and a vision tower in float, beside which vLLM has other names than transformers and the files.
MADE = (
    *(_ours(f"mixtral, {layout} 4-bit", layout, 4, layout == "gptq")._replace(parent="mixtral")
      for layout in ("gptq", "awq")),
    *(cell._replace(label=f"llava, {cell.label}", parent="llava") for cell in (
        AWQ, AWQ_HEAD, HEAD, CT_HEAD,
        *(_ours(f"{name} 4-bit, first q, k, v and down_proj g32", layout, 4, True, overrides=FIRST32)
          for name, layout in (("gptq", "gptq"), ("ct", "compressed-tensors"))))),
)  # fmt: skip

# Who reads which of our checkpoints: the tool, and the settings of its driver.
READ: tuple[tuple[Cell, str, Mapping[str, Any]], ...] = (
    *((ours, "GPTQModel", {}) for ours in (GPTQ4, GPTQ3, GPTQ2, GPTQ8, HEAD, GPTQ_MIXED, V2, AWQ, AWQ_SYMMETRIC)),
    (AWQ._replace(label="awq asym, transformers"), "GPTQModel", {"through": "transformers"}),
    *((ours, "AutoRound", {"bits": ours.settings["bits"]}) for ours in (GPTQ4, GPTQ2, GPTQ3, GPTQ8, AWQ)),
    *((ours, "llm-compressor", {}) for ours in (CT4, CT3, CT8_CHANNEL, CT_MIXED)),
    (CT4_ASYMMETRIC, "llm-compressor", {"dequantize": True}),
    *((ours, "vLLM", {"greedy": 16})
      for ours in (GPTQ4, GPTQ8, HEAD, GPTQ_MIXED, AWQ, AWQ_SYMMETRIC, AWQ_HEAD, CT4, CT8_CHANNEL, CT_MIXED,
                   CT4_ASYMMETRIC, CT_HEAD, AWQ_FLOAT, CT_FLOAT, GPTQ3, V2, CT3, *MADE)),
)  # fmt: skip
