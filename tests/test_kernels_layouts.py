"""Layouts: canonical and back, bit for bit, and the discovery of torch's CPU int4 layout."""

import os
import subprocess
import sys

import ptq_kernels
import pytest
import torch
from packed_weights import UNIT, random_case, random_rows, worst_error
from ptq_kernels import layouts
from ptq_kernels.cpu import aten_int4
from ptq_kernels.layouts import PackedWeight

needs_operator = pytest.mark.skipif(
    aten_int4.placement(64) is None, reason="torch's CPU int4 operator is absent or its layout is unknown here"
)


def packed(case) -> PackedWeight:
    return PackedWeight(*case.tensors, case.bits, case.group_size, case.codes.shape[1])


@needs_operator
@pytest.mark.parametrize("n", [16, 32, 48, 64, 80, 96, 112, 128, 208, 1040])
def test_aten_layout_inverts_exactly(n: int) -> None:
    case = random_case(n, 96, 96, symmetric=False)
    prepared = ptq_kernels.prepare(*case.tensors, impl="cpu-torch", **case.sized)
    assert (prepared.layout, prepared.impl) == ("aten_int4", "cpu-torch")
    assert prepared.qweight.dtype == torch.uint8
    back = ptq_kernels.canonical(prepared.qweight, *case.tensors[1:], layout=prepared.layout, **case.sized)
    assert torch.equal(back, case.qweight)
    dense = [
        ptq_kernels.dequantize(q, *case.tensors[1:], layout=name, **case.sized)
        for q, name in ((prepared.qweight, prepared.layout), (case.qweight, "canonical"))
    ]
    assert torch.equal(*dense)


@needs_operator
@pytest.mark.parametrize("n", [16, 48, 64, 176])
def test_aten_layout_is_what_torch_packs(n: int) -> None:
    case = random_case(n, 64, 32)
    converted = layouts.convert(packed(case), "aten_int4").qweight.view(-1)
    want = torch.ops.aten._convert_weight_to_int4pack_for_cpu(case.codes.int(), 1).view(-1)
    assert torch.equal(converted[: want.numel()], want)


@needs_operator
@pytest.mark.parametrize("group", [32, 64, 96, 128, 160, 256, 384, 512, 3840])
def test_group_sizes_the_operator_does_not_know_are_emulated(group: int) -> None:
    case, x = random_case(32, 3840 if 3840 % group == 0 else 4 * group, group, symmetric=False), None
    x = random_rows(2, case.codes.shape[1], torch.bfloat16)
    weight = layouts.convert(packed(case), "aten_int4")
    y = aten_int4.matmul(x, weight)
    assert worst_error(y, x, case, None, 3 * UNIT[torch.bfloat16]) <= 1  # scale, offset and weight in bfloat16


CHECK = """
import torch
from packed_weights import random_case, random_rows, worst_error
import ptq_kernels
from ptq_kernels.cpu import aten_int4
print(torch.backends.cpu.get_cpu_capability(), aten_int4.placement(64))
for n in (16, 48, 96, 176):
    case = random_case(n, 128, 64, symmetric=False)
    prepared = ptq_kernels.prepare(*case.tensors, impl="cpu-torch", **case.sized)
    assert prepared.layout == "aten_int4", prepared.layout
    rest = case.tensors[1:]
    back = ptq_kernels.canonical(prepared.qweight, *rest, layout=prepared.layout, **case.sized)
    assert torch.equal(back, case.qweight)
    for rows in (1, 50):
        x = random_rows(rows, 128, torch.bfloat16)
        y = ptq_kernels.matmul(x, prepared.qweight, *rest, layout=prepared.layout, **case.scheme)
        assert worst_error(y, x, case, None, 3 * 2.0**-8) <= 1
"""


@needs_operator
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_this_machine_has(capability: str) -> None:
    if capability == "avx512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this processor has no AVX-512")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (random_case(32, 64, 32, bits=8), "4-bit weights"),
        (random_case(24, 64, 32), "multiple of 16, found 24"),
        (random_case(32, 60, 12), "multiple of 32, found 12"),
    ],
)
def test_what_does_not_fit_stays_canonical(case, reason: str) -> None:
    assert ptq_kernels.prepare(*case.tensors, impl="cpu-torch", **case.sized).layout == "canonical"
    with pytest.raises(ValueError, match=f"cannot hold this weight: .*{reason}.*keep it canonical"):
        layouts.convert(packed(case), "aten_int4")


def test_unknown_order_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(64, 64, 32)
    weight = layouts.convert(packed(case), "aten_int4") if aten_int4.placement(64) else None
    monkeypatch.setattr(aten_int4, "placement", lambda rows: None)
    assert ptq_kernels.prepare(*case.tensors, impl="cpu-torch", **case.sized).layout == "canonical"
    with pytest.raises(ValueError, match="unknown order"):
        layouts.convert(packed(case), "aten_int4")
    if weight is not None:
        with pytest.raises(RuntimeError, match="needs a known order of 64 rows.*canonical layout"):
            layouts.convert(weight, "canonical")


@needs_operator
def test_discovery_refuses_another_order_or_another_product(monkeypatch: pytest.MonkeyPatch) -> None:
    real = aten_int4._operator_bytes
    discover = aten_int4.placement.__wrapped__
    monkeypatch.setattr(aten_int4, "_operator_bytes", lambda codes: real(codes).flip(0))
    assert discover(64) is None
    monkeypatch.setattr(aten_int4, "_operator_bytes", real)
    product = aten_int4._product
    monkeypatch.setattr(aten_int4, "_product", lambda *arguments: product(*arguments) * 2)
    assert discover(64) is None


def test_discovery_without_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        pass

    monkeypatch.setattr(torch.ops, "aten", Nothing())
    assert aten_int4.placement.__wrapped__(64) is None


def test_reference_runs_a_prepared_weight() -> None:
    case, x = random_case(64, 64, 32), random_rows(3, 64, torch.float32)
    prepared = ptq_kernels.prepare(*case.tensors, **case.sized)
    y = ptq_kernels.matmul(
        x, prepared.qweight, *case.tensors[1:], layout=prepared.layout, impl="reference", **case.scheme
    )
    assert worst_error(y, x, case, None, 0.0) <= 1


def test_unknown_layout_is_refused_and_registered_ones_are_listed() -> None:
    assert set(layouts.names()) >= {"canonical", "aten_int4"}
    with pytest.raises(ValueError, match="layout must be one of"):
        layouts.convert(packed(random_case(16, 64, 32)), "rows")
