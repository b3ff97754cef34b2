"""The C++ libraries of ptq_kernels.cpu: every instruction set of this machine against float64; layout."""

import copy
import gc
import mmap

import ptq_kernels
import pytest
import torch
from cpu_libraries import current_libraries
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_weights import UNIT, Case, dense_float64, random_case, random_rows, worst_error
from ptq_kernels import layouts
from ptq_kernels.cpu import library, strips
from ptq_kernels.layouts import PackedWeight

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BFLOAT16 = UNIT[torch.bfloat16]
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65, 100, 129, 300)
SETS = tuple(library.SETS)


@pytest.fixture(scope="module", autouse=True)
def libraries(tmp_path_factory: pytest.TempPathFactory):
    yield from current_libraries(tmp_path_factory)


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> str:
    if reason := library.refuse(request.param):
        pytest.skip(reason)
    return request.param


def packed(case: Case) -> PackedWeight:
    return PackedWeight(*case.tensors, case.bits, case.group_size, case.codes.shape[1])


def product(x: torch.Tensor, case: Case, bias: torch.Tensor | None, isa: str) -> torch.Tensor:
    prepared = ptq_kernels.prepare(*case.tensors, impl=f"cpu-{isa}", **case.sized)
    assert prepared.layout == "strips"
    rest = (*case.tensors[1:], bias)
    return ptq_kernels.matmul(x, prepared.qweight, *rest, layout="strips", impl=prepared.impl, **case.scheme)


def rounded(isa: str, dtype: torch.dtype, rows: int) -> float:
    """What bfloat16 products may lose: x unless it is bfloat16, then the weight, once each."""
    if isa not in ("amx", "avx512bf16") or dtype == torch.float32 or rows <= 2:
        return 0.0
    return (1 + BFLOAT16) ** (1 if dtype == torch.bfloat16 else 2) * (1 + BFLOAT16) - 1


SHAPES = [  # N, K, group size: whole, ragged N, groups padded, per channel, several panels and blocks of depth
    *((64, 128, 32), (48, 256, 64), (100, 256, 128), (1, 64, 32), (33, 480, 96), (40, 1536, 256)),
    *((17, 60, 60), (35, 1000, 1000), (288, 96, 48), (272, 4608, 512)),
]


@pytest.mark.parametrize("bits", [4, 8, 3, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_matches_float64(isa: str, shape: tuple[int, int, int], bits: int) -> None:
    n, k, group = shape
    symmetric, scales = (k // group) % 2 == 0, FLOATS[n % 3]
    case = random_case(n, k, group, bits, symmetric, scales)
    prepared = ptq_kernels.prepare(*case.tensors, impl=f"cpu-{isa}", **case.sized)
    assert prepared.layout == "strips"
    for rows in ROWS if bits == 4 else ROWS[::3]:
        for dtype in FLOATS:
            x, bias = random_rows(rows, k, dtype), torch.linspace(-1, 1, n).to(dtype)
            y = ptq_kernels.matmul(
                *(x, prepared.qweight, *case.tensors[1:], bias), layout="strips", impl=prepared.impl, **case.scheme
            )
            assert y.dtype == dtype
            assert worst_error(y, x, case, bias, rounded(isa, dtype, rows)) <= 1, (rows, dtype)
            if dtype == torch.float32 and bits == 4 and isa == "amx":
                # that bound grows with K, and would not see a term of float32 rows missing: 2.3e-6 and more
                want = x.double() @ dense_float64(case).T
                assert (y.double() - bias.double() - want).norm() <= 1e-6 * want.norm() + 1e-6 * n**0.5, rows


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_shape_matches_float64(isa: str, data: st.DataObject) -> None:
    bits, dtype = data.draw(st.sampled_from([2, 3, 4, 8])), data.draw(st.sampled_from(FLOATS))
    # a group that padding to a multiple of 32 makes half as long again stays canonical
    sizes = st.integers(22, 160).filter(lambda size: -(-size // 32) * 32 <= 1.5 * size)
    group = data.draw(st.one_of(st.sampled_from([32, 64, 128]), sizes))
    groups, n = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 130))
    rows = data.draw(st.integers(1, 70))
    scales = data.draw(st.sampled_from(FLOATS))
    case = random_case(n, group * groups, group, bits, data.draw(st.booleans()), scales)
    bias = torch.linspace(-2, 2, n) if data.draw(st.booleans()) else None
    x = random_rows(rows, group * groups, dtype)
    y = product(x, case, bias, isa)
    assert worst_error(y, x, case, bias, rounded(isa, dtype, rows)) <= 1


def position(bits: int, k: int) -> list[tuple[int, int]]:
    """Oracle: (word, bit) of every bit of code k among the words of 32 codes, as codes.h describes them."""
    if bits == 8:
        return [(k // 4, 8 * (k % 4) + i) for i in range(8)]
    if bits == 3:
        return [*position(2, k), (2, (k // 2 + 16 * (k % 2) + 2) % 32)]
    per_word = 32 // bits
    start = 16 * (k % 2) + bits * (k % per_word // 2)
    return [(k // per_word, start + i) for i in range(bits)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_lie_where_the_description_says(bits: int) -> None:
    case = random_case(40, 96, 32, bits, symmetric=False, dtype=torch.float16)
    qweight = layouts.convert(packed(case), "strips").qweight
    words = qweight[: 64 * 96 * bits // 8].view(torch.int32).view(4, 3, bits, 16)  # strip, 32 codes, word, row
    for strip, unit in ((0, 0), (1, 2), (2, 1)):
        for column in range(16 if strip < 2 else 8):
            row, want = 16 * strip + column, [0] * bits
            for k in range(32):
                for i, (word, bit) in enumerate(position(bits, k)):
                    want[word] |= (int(case.codes[row, 32 * unit + k]) >> i & 1) << bit
            assert [int(w) & 0xFFFFFFFF for w in words[strip, unit, :, column]] == want
    scales, zeros = qweight[64 * 96 * bits // 8 :].split([64 * 3 * 2, 64 * 3])
    by_strip = scales.view(torch.float16).view(4, 3, 16), zeros.view(4, 3, 16)
    for got, given_ in zip(by_strip, (case.scales, case.zeros), strict=True):
        flat = got.transpose(1, 2).reshape(64, 3)
        assert torch.equal(flat[:40], given_)
        assert not flat[40:].any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("n", "k", "group"), [(1, 32, 32), (31, 96, 48), (33, 60, 60), (64, 256, 64), (100, 72, 24)])
def test_layout_inverts_exactly(isa: str, bits: int, n: int, k: int, group: int) -> None:
    case = random_case(n, k, group, bits, symmetric=False)
    prepared = ptq_kernels.prepare(*case.tensors, impl=f"cpu-{isa}", **case.sized)
    back = ptq_kernels.canonical(prepared.qweight, *case.tensors[1:], layout="strips", **case.sized)
    assert torch.equal(back, case.qweight)
    dense = ptq_kernels.dequantize(prepared.qweight, *case.tensors[1:], layout="strips", **case.sized)
    assert torch.equal(dense, dense_float64(case).float())


def test_a_large_weight_begins_with_a_huge_page() -> None:
    case = random_case(2050, 4096, 128, symmetric=False)
    weight = layouts.convert(packed(case), "strips")
    size = weight.qweight.numel()
    assert weight.qweight.untyped_storage().nbytes() == size > 2**22
    assert (weight.qweight.data_ptr() % 2**21 == 0) == hasattr(mmap, "MADV_HUGEPAGE")
    copied, part = copy.deepcopy(weight.qweight), weight.qweight[-1000:]
    del weight
    gc.collect()
    assert torch.equal(part, copied[-1000:])  # the memory lives as long as any part of it is used
    assert torch.equal(
        layouts.convert(packed(case)._replace(qweight=copied, layout="strips"), "canonical").qweight, case.qweight
    )


def test_without_room_for_huge_pages_torch_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(strips.mmap, "mmap", full)
    case = random_case(2050, 4096, 128)
    weight = layouts.convert(packed(case), "strips")
    assert torch.equal(layouts.convert(weight, "canonical").qweight, case.qweight)


def test_a_canonical_weight_is_converted_for_a_forced_set(isa: str) -> None:
    case, x = random_case(48, 64, 32), random_rows(5, 64, torch.float32)
    assert worst_error(ptq_kernels.matmul(x, *case.tensors, impl=f"cpu-{isa}", **case.scheme), x, case, None, 0.0) <= 1


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_rows_follow_the_precision_of_torch(isa: str, precision: str) -> None:
    case, x = random_case(64, 256, 64, symmetric=False), random_rows(40, 256, torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        y = product(x, case, None, isa)
    finally:
        torch.set_float32_matmul_precision(before)
    allowed = rounded(isa, torch.float16, 40)
    assert worst_error(y, x, case, None, allowed) <= 1
    # "high": two bfloat16 values for each of x's; what is lost, 2^-16, is less than 256 float32 additions may lose.
    as_float32 = precision != "medium" or not allowed
    assert (worst_error(y, x, case, None, 0.0) <= 1) == as_float32


@pytest.mark.parametrize("rows", [1, 3, 12, 40])
def test_values_that_are_not_finite_stay_in_their_row(isa: str, rows: int) -> None:
    case = random_case(48, 128, 32)
    for dtype in FLOATS:
        x = random_rows(rows, 128, dtype)
        clean = product(x, case, None, isa)
        for value in (float("nan"), float("inf")):
            x[rows // 2, 77] = value
            y = product(x, case, None, isa)
            assert not y[rows // 2].isfinite().any() or value == float("inf")
            assert y[rows // 2][case.codes[:, 77] != 8].isfinite().sum() == 0
            others = torch.arange(rows) != rows // 2
            assert torch.equal(y[others], clean[others])
