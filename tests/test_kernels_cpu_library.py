"""The C++ libraries of ptq_kernels.cpu: every instruction set of this machine against float64; layout; loader."""

import copy
import ctypes
import gc
import json
import logging
import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import ptq_kernels
import pytest
import torch
from cpu_libraries import current_libraries
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_weights import UNIT, Case, dense_float64, random_case, random_rows, worst_error
from ptq_kernels import bench_cpu, build, layouts
from ptq_kernels.cpu import library, strips
from ptq_kernels.layouts import PackedWeight

BFLOAT16 = UNIT[torch.bfloat16]
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65, 100, 129, 300)
SETS = tuple(library.SETS)
LEAST = "neon" if build.on_arm() else "avx2"


@pytest.fixture(scope="module", autouse=True)
def libraries(tmp_path_factory: pytest.TempPathFactory):
    yield from current_libraries(tmp_path_factory)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is filled with NaN, so an element that nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


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


THREADS = """
import os, torch, ptq_kernels
from ptq_kernels.cpu import library
from pathlib import Path
from packed_weights import random_case, random_rows
library._DIRECTORY = Path({directory!r})
def runtimes():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {{line.split()[-1] for line in lines if any(n in line for n in ("gomp", "iomp", "libomp"))}}
case = random_case(1024, 1024, 128, symmetric=False)
prepared = ptq_kernels.prepare(*case.tensors, impl="cpu-{isa}", **case.sized)
rows = [random_rows(m, 1024, torch.bfloat16) for m in (1, 9, 200)]
def products():
    return [ptq_kernels.matmul(x, prepared.qweight, *case.tensors[1:], layout="strips", impl=prepared.impl,
                               **case.scheme) for x in rows]
torch.ones(1 << 20).add(1)
threads = lambda: len(os.listdir("/proc/self/task"))
openmp, before = runtimes(), threads()
torch.set_num_threads(1)
one = products()
assert threads() == before, (threads(), before)
torch.set_num_threads(3)
three = products()
assert threads() == before + 2, (threads(), before)
assert runtimes() == openmp, (runtimes(), openmp)
assert all(torch.equal(a, b) for a, b in zip(one, three))
"""


def test_threads_are_those_of_torch(isa: str, libraries: Path) -> None:
    code = THREADS.format(directory=str(libraries), isa=isa)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr


def test_the_best_set_serves_and_is_named(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    best = next(name for name in library.preferred() if library.refuse(name) is None)
    library.forget()
    monkeypatch.setattr(ptq_kernels.dispatch, "_chosen", {})
    case, x = random_case(48, 64, 32), random_rows(3, 64, torch.bfloat16)
    with caplog.at_level(logging.INFO, logger="ptq_kernels"):
        for _ in range(2):
            prepared = ptq_kernels.prepare(*case.tensors, **case.sized)
            ptq_kernels.matmul(x, prepared.qweight, *case.tensors[1:], layout=prepared.layout, **case.scheme)
    assert caplog.text.count(f"products on the CPU use the C++ library for {best}") == 1
    assert ptq_kernels.chosen() == {"cpu on cpu, 4 bits, layout strips": f"C++ library for {best}"}


def test_a_processor_takes_what_it_can_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = f"processor : 0\nvendor_id : AuthenticAMD\nflags : {' '.join(library.SETS['avx512bf16'])}\n"
    monkeypatch.setattr(library, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    library.forget()
    assert "lacks" in library.refuse("avx2")  # no such file: no such processor
    (tmp_path / "cpuinfo").write_text(text)
    library.forget()
    assert library.preferred()[:2] == ("amx", "avx512bf16")
    assert library.refuse("amx") == "this processor lacks amx_bf16, amx_int8, amx_tile"
    monkeypatch.undo()
    library.forget()


def another_library(path: Path, source: str) -> None:
    path.with_suffix(".cpp").write_text(source)
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, "-shared", "-fPIC", path.with_suffix(".cpp"), "-o", path], check=True)


STUB = """extern "C" { int qmm_version() { return %d; } int qmm_start() { return %d; }
void qmm_set_parallel_for(void*) {} void qmm_set_torch(void*) {} void qmm_boxed() {} void qmm_pack() {}
void qmm_unpack() {} int qmm_matmul() { return 0; } void qmm_solve_columns() {} void qmm_descend_columns() {} }"""
BROKEN = {
    "missing": (None, rf"_qmm_{LEAST}.so was not built; build it with `python -m ptq_kernels.build`"),
    "foreign": ("", rf"_qmm_{LEAST}.so cannot be loaded \(.*file too short\); rebuild it"),
    "another": ("int f() { return 0; }", rf"_qmm_{LEAST}.so cannot be loaded \(.*qmm_version\); rebuild it"),
    "old": (
        'extern "C" int qmm_version() { return 0; }',
        rf"_qmm_{LEAST}.so cannot be loaded \(it has version 0, {library.VERSION} is required\); rebuild it with",
    ),
    "no permission": (STUB % (library.VERSION, 1), "does not grant this process the AMX tile registers"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_without_a_usable_library_torch_runs_and_the_log_says_why(
    how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, reason = BROKEN[how]
    if source is not None:
        path = tmp_path / build.file_name(LEAST)
        another_library(path, source) if source else path.write_bytes(b"")
    case, x = random_case(48, 64, 32), random_rows(3, 64, torch.bfloat16)
    strip_weight = layouts.convert(packed(case), "strips")
    monkeypatch.setattr(library, "_DIRECTORY", tmp_path)
    library.forget()
    try:
        with caplog.at_level(logging.WARNING, logger="ptq_kernels"):
            prepared = [ptq_kernels.prepare(*case.tensors, **case.sized) for _ in range(2)]
        assert caplog.text.count("use torch only, which is slower") == 1
        assert {p.layout for p in prepared} <= {"aten_int4", "canonical"}
        y = ptq_kernels.matmul(x, *case.tensors, impl="cpu", **case.scheme)
        assert worst_error(y, x, case, None, BFLOAT16) <= 1
        with pytest.raises(RuntimeError, match=f"impl='cpu-{LEAST}' cannot run here: .*{reason}"):
            ptq_kernels.matmul(x, *case.tensors, impl=f"cpu-{LEAST}", **case.scheme)
        with pytest.raises(ValueError, match="cannot hold this weight: no C\\+\\+ library can be used here"):
            layouts.convert(packed(case), "strips")
        with pytest.raises(RuntimeError, match=f"CPU library for {LEAST} is required and cannot be used: .*{reason}"):
            layouts.convert(strip_weight, "canonical")
    finally:
        monkeypatch.undo()
        library.forget()


def test_torch_without_its_parallel_loop_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        def __init__(self, path: str) -> None:
            self.path = path

    real = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda path: Core(path) if "libtorch" in path else real(path))
    library.forget()
    assert "torch_parallel_for" in (library.refuse(LEAST) or "")
    monkeypatch.undo()
    library.forget()


@pytest.mark.parametrize(
    ("case", "reason"), [(random_case(32, 60, 12), "multiple of 32"), (random_case(32, 63, 21), "multiple of 32")]
)
def test_small_groups_are_not_padded(case: Case, reason: str) -> None:
    assert ptq_kernels.prepare(*case.tensors, **case.sized).layout == "canonical"
    with pytest.raises(ValueError, match=f"'strips' cannot hold this weight: groups are padded to a {reason}"):
        layouts.convert(packed(case), "strips")
    with pytest.raises(ValueError, match="it is for the CPU, this weight is on meta"):
        layouts.convert(packed(random_case(32, 64, 32))._replace(qweight=torch.empty(32, 8, device="meta")), "strips")


def test_a_width_that_the_library_does_not_know_is_refused() -> None:
    weight = layouts.convert(packed(random_case(32, 64, 32)), "strips")
    with pytest.raises(RuntimeError, match="bits must be one of .* the library got 5"):
        strips.matmul(torch.ones(1, 64), weight._replace(bits=5), None, strips.any_library())


def test_the_build_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "SOURCE", tmp_path / "library.cpp")
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    assert build.main() == 1
    assert capsys.readouterr().out.count("a C++ compiler is required") == len(build.of_this_machine())
    monkeypatch.setenv("CXX", "c++")
    (tmp_path / "library.cpp").write_text("not C++")
    name = build.of_this_machine()[-1]
    with pytest.raises(RuntimeError, match=f"could not compile library.cpp for {name} .*use gcc 12"):
        build.compile_library(name, tmp_path)
    (tmp_path / "library.cpp").write_text("int f() { return 0; }")
    assert build.main() == 0
    assert {path.name for path in tmp_path.glob("*.so*")} == {build.file_name(n) for n in build.of_this_machine()}
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert build.main() == 1
    said = capsys.readouterr().out
    assert (
        "no CPU libraries: they are for Linux on x86_64 and aarch64 and for macOS on arm64, this is linux on ri" in said
    )


@pytest.mark.parametrize(
    ("system", "machine", "expected"),
    [("linux", "aarch64", ("neon",)), ("darwin", "arm64", ("neon",)), ("darwin", "x86_64", ()), ("linux", "i686", ())],
)
def test_the_instruction_sets_of_a_machine(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str, expected: tuple[str, ...]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(sys, "platform", system)
    assert build.of_this_machine() == expected
    assert (build.refuse() is None) == bool(expected)
    if expected:
        monkeypatch.setattr(library, "_processor", library._processor.__wrapped__)
        assert library.preferred() == expected
        assert all(library.SETS[name] <= library._processor().flags for name in expected)


def test_the_bench_measures_what_it_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new process with pinned threads prints the table; here only that every column is there and was right."""
    path = tmp_path / "cells.json"
    assert bench_cpu.main(["128x64"], [1, 20], [1, 2], str(path), seconds=0.001) == 0
    cells = json.loads(path.read_text())["cells"]
    assert {(cell["rows"], cell["threads"]) for cell in cells} == {(m, t) for m in (1, 20) for t in (1, 2)}
    assert {"dense bf16", "dense fp32", "torch only"} <= {cell["column"] for cell in cells}
    assert all(0 < cell["best_ms"] <= cell["median_ms"] for cell in cells)
    assert all(cell["error"] < (2e-2 if cell["column"] == bench_cpu.INT8 else 1e-2) for cell in cells)
    best = library.best()
    with_int8 = best is not None and best.name in library.WITH_INT8
    assert (bench_cpu.INT8 in {cell["column"] for cell in cells}) == with_int8
    monkeypatch.setattr(bench_cpu, "_CACHES", tmp_path)
    layer = bench_cpu.Layer("128x64", compiled=False)
    layer.dense.neg_()
    with pytest.raises(RuntimeError, match="dense bf16 of 128x64 with 2 rows must be within 0.01 of float64"):
        bench_cpu.measure(layer, 2, 1, 0.0)
