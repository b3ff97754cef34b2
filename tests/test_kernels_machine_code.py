"""The machine code of the kernels, compiled here for GPUs that need not be here."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton")

from ptq_kernels.triton import aot, configs, sass

needs_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compilation needs Triton without its interpreter"
)


@needs_compiler
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(
    ("capability", "span", "rows", "name"),
    [(90, 128, 16, "16x128x128"), (90, 128, 32, "32x128x128"), (90, 128, 64, "64x256x128"), (90, 128, 64, "64x128x128"),
     (90, 128, 16, "16x128x128 raised"),
     (90, 128, 512, "128x128x128"), (90, 128, 512, "64x256x128 folded"), (90, 64, 16, "16x128x128"),
     (90, 128, 512, "128x256x64 pipelined"), (90, 64, 64, "64x256x128 pipelined"),
     (80, 128, 16, "16x128x128")],
)  # fmt: skip
def test_machine_code(capability: int, span: int, rows: int, name: str, asymmetric: bool) -> None:
    """Of what most products run as; `test_machine_code_of_every_tile` has the rest."""
    key = (4, span, rows, name)
    (found,) = [t for t in configs.tiles(capability) if (t.bits, t.span, t.rows, t.name) == key]
    form = aot.Form(found, capability, "bf16", asymmetric)
    report = check_machine_code(form)
    if capability == 90 and span == 128 and rows <= 64:
        assert report.per_weight <= 3.0


@needs_compiler
@pytest.mark.parametrize("name", ["16x128x128", "64x256x128 folded", "64x128x128 pipelined"])
def test_machine_code_of_a_kernel_that_begins_early(name: str) -> None:
    found = next(t for t in configs.tiles(90) if (t.bits, t.span, t.name) == (4, 128, name))
    check_machine_code(aot.Form(found, 90, early=True))


@needs_compiler
@pytest.mark.skipif(not sass.available(), reason="this triton wheel brings no cuobjdump")
def test_the_dequantizer_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the limit of `test_machine_code_of_the_dequantizer`."""
    assert aot.main(["--capabilities", "90", "--match", "dequantizer"]) == 0
    found = re.search(r"sm90-4bit-g128-dequantizer-bf16-symmetric +(\d\.\d\d)", capsys.readouterr().out)
    assert found is not None
    assert 2 < float(found[1]) <= 4.6


def test_a_pattern_that_fits_no_form_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        aot.main(["--capabilities", "80", "--match", "nothing-like-it"])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert re.search(r"--match must fit one of \d+ forms, as sm80-4bit.*; 'nothing-like-it' fits none", printed.err)
    assert printed.out == ""
    with pytest.raises(SystemExit) as ended:
        aot.main(["--match", "("])
    assert ended.value.code == 2
    assert "--match must be a regular expression, '(' is none: missing )" in capsys.readouterr().err


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 80, 89])
def test_machine_code_of_every_tile(capability: int) -> None:
    for form in aot.forms([capability]):
        check_machine_code(form)


@pytest.mark.slow
def test_every_tile_with_two_versions_of_triton() -> None:
    """In environments of their own, which the script makes where there are none: 3.6, and the newest."""
    script = Path(__file__).resolve().parent.parent / "scripts" / "compile_check"
    run = subprocess.run([script], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "triton 3.6.0: " in run.stdout
    assert run.stdout.count("0 forms are not fit to ship") == 2


def check_machine_code(form):
    kernel = aot.compile_form(form)
    assert ("wgmma" in kernel.asm["ptx"]) == (form.capability == 90)
    if not sass.available():
        pytest.skip("this triton wheel brings no cuobjdump, so registers and machine code are not checked")
    report = aot.inspect(kernel, form)
    assert aot.violations(form, report) == [], form.name
    return report


@needs_compiler
@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize(
    ("scheme", "most"),
    [({}, 4.6), ({"asymmetric": True}, 4.5), ({"dtype": "fp16", "asymmetric": True, "group": 32}, 5.0),
     ({"asymmetric": True, "out": "fp16"}, 8.0), ({"asymmetric": True, "even": False}, 4.6)],
)  # fmt: skip
def test_machine_code_of_the_dequantizer(capability: int, scheme: dict[str, Any], most: float) -> None:
    """16-byte stores, no spills, no conversion of an integer, few instructions a weight."""
    kernel, warps = aot.compile_dequantizer(capability, **scheme)
    assert "st.global.v4.b32" in kernel.asm["ptx"]
    if sass.available():
        _, stack, lines = sass.machine_code(kernel)
        assert stack == 0
        assert not [line for _, line in lines if "I2F" in line]
        assert len(lines) <= most * 64 * 128 / (32 * warps)


def test_overwritten_operands_are_found() -> None:
    """Oracle: hand-written code; the second program waits before it writes."""
    product = "HGMMA.64x16x16.F32.BF16 R24, R32, gdesc[UR12], R24, gsb0"
    write, wait = "HADD2.BF16_V2 R33, R40, -136, -136", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    assert sass.early_overwrites([product, write, wait]) == [write]
    assert sass.early_overwrites([product, wait, write]) == []
    assert sass.early_overwrites([product, "LDS.128 R32, [R1]", wait]) == ["LDS.128 R32, [R1]"]
    assert sass.early_overwrites([product, "SHFL.BFLY PT, R35, R9, 0x1, 0x1f", wait]) != []
    assert sass.early_overwrites([product, "LOP3.LUT P0, R35, R9, 0xf, RZ, 0xc0, !PT", wait]) != []
    assert sass.early_overwrites([product, "LDSM.16.M88.2 R31, [R9]", wait]) != []
    assert sass.early_overwrites([product, "LDSM.16.M88 R31, [R9]", wait]) == []
    assert sass.early_overwrites([product, "ISETP.GE.AND P0, PT, R33, R32, PT", wait]) == []
    assert sass.early_overwrites([product, "R2P PR, R33, 0x7f", wait]) == []
    assert sass.early_overwrites([product, "STS [R33], R1", wait]) == []


def test_accesses_before_the_wait_are_found() -> None:
    """Oracle: hand-written code, of which a prefetch may come first."""
    wait, load, ask = "ACQBULK", "LDG.E.U16 R112, desc[UR16][R18.64]", "CCTL.E.PF2 [R6]"
    assert sass.hasty([ask, wait, load]) == []
    assert sass.hasty([ask, load, wait, load]) == [load]
    assert sass.hasty(["@!P0 STG.E desc[UR16][R2.64], RZ", wait]) == ["@!P0 STG.E desc[UR16][R2.64], RZ"]
    assert sass.hasty([load]) is None


def test_writes_to_where_others_send_are_found() -> None:
    """Oracle: hand-written PTX; before the barrier of the cluster memory is the kernel's own, and after the wait if all
    its warps meet first.
    """
    begin, send = (
        "st.shared.b32 [%r1], %r2;\nbarrier.cluster.arrive.relaxed.aligned;",
        "st.async.shared::cluster.f32 [a], %f1;",
    )
    wait, write = (
        "again: mbarrier.try_wait.parity.b64 p, [a], 0;",
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1], {%r2}",
    )
    assert aot.scratch_of("st.shared.b32 [%r1], %r2;", explicit=True) == []
    for explicit in (True, False):
        assert aot.scratch_of(begin + send + wait, explicit=explicit) == []
        assert aot.scratch_of(begin + write + ";" + send + wait, explicit=explicit) == [write]
        assert aot.scratch_of(begin + send + wait + write + ";", explicit=explicit) == [write]
        assert (
            aot.scratch_of(begin + send + wait + "bar.sync 0;" + write + ";", explicit=explicit) == [write] * explicit
        )


def test_a_tool_that_prints_something_else_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer:
        stdout = "nothing"

    class Kernel:
        asm = {"cubin": b""}  # noqa: RUF012

    monkeypatch.setattr(sass.subprocess, "run", lambda *arguments, **options: Answer())
    with pytest.raises(RuntimeError, match="must print REG and STACK, it printed 'nothing'"):
        sass.machine_code(Kernel())
