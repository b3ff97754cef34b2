"""Compiles the kernels ahead of time for any GPU, without one, and reads what the assembler made of them.

``python -m ptq_kernels.triton.aot`` compiles every tile of the table and prints registers, spills, resident programs,
instructions a weight and every violation of `violations`; the exit status says whether there was one.

The longest backward branch around a tensor-core instruction counts as the main loop. The machine code is read as text,
with the opcodes that these kernels use (sass.py). No timing comes out of this.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ptq_kernels.triton import ahead, clusters, configs, dense, dequant, recipes, sass
from ptq_kernels.triton.configs import Tile

_MOST_SPILLED, _MOST_SPILLED_RARELY = 8, 24  # bytes
_MOST_LOCAL = 5  # instructions that read or write what was spilled
_SHARED_OF_SM = {80: 164, 86: 100, 89: 100, 90: 228}  # KiB; each resident program takes 1 KiB of it besides its own
_MOST_SHARED = {80: 163, 86: 99, 89: 99, 90: 227}  # KiB of one program
_RECORDED = (90, 80)  # whose programs and instructions the table of tiles records
_THREADS_OF_SM = {80: 2048, 86: 1536, 89: 1536, 90: 2048}
# Instructions a weight in the loop of at most 64 rows. An H200 can issue 3.6 to 4.0 while it reads 4-bit weights.
_MOST_FOR_FEW_ROWS = 3.0
_TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}


class Form(NamedTuple):
    """One specialisation of the kernel of a tile."""

    tile: Tile
    capability: int
    dtype: str = "bf16"
    asymmetric: bool = False
    splits: int = 2
    bias: bool = False
    even: bool = True  # the columns are a multiple of a step
    early: bool = False  # begins before the kernel before it has ended

    @property
    def name(self) -> str:
        """For tables and test ids."""
        t = self.tile
        kind = "asymmetric" if self.asymmetric else "symmetric"
        rest = {1: "-whole", 2: ""}.get(self.splits, f"-{self.splits}-splits")
        rest += "-bias" * self.bias + "-ragged" * (not self.even) + "-early" * self.early
        return f"sm{self.capability}-{t.bits}bit-g{t.span}-{t.name.replace(' ', '-')}-{self.dtype}-{kind}{rest}"


class Report(NamedTuple):
    """What the assembler made of a form."""

    registers: int  # a thread
    stack: int  # bytes a thread; anything but 0 is a spill
    own_shared: int  # bytes a program, for Triton
    shared: int  # with what a cluster needs
    resident: int  # programs on a multiprocessor
    loop: Counter[str]  # opcodes of the main loop
    from_registers: bool | None  # does wgmma take the weight from registers? None: there is no wgmma
    overwrites: list[str]  # instructions that write a register which an unfinished wgmma may still read
    weights: float  # a thread unpacks in one turn of the loop
    scratch: list[str]  # shared memory written while that of a cluster is for what its programs send
    hasty: list[str] | None  # accesses to memory before the wait for the kernel before; None: there is no wait

    @property
    def per_weight(self) -> float:
        """Instructions of the loop a weight."""
        return sum(self.loop.values()) / self.weights


def order_of(capability: int) -> int:
    """The layout that a capability uses."""
    return configs.Gpu(capability, 0).order


def cluster_of(form: Form) -> int:
    """How many programs of the form are a cluster; 1: none."""
    return recipes.cluster(configs.Gpu(form.capability, 0), form.tile, form.splits)


def compile_form(form: Form) -> Any:
    """The compiled kernel, specialised as the launcher does for sizes that are multiples of 16."""
    tile = form.tile
    constants = recipes.constants(
        tile,
        order=order_of(form.capability),
        group=tile.span,
        scales=_TYPES[form.dtype],
        asymmetric=form.asymmetric,
        bias=form.bias,
        splits=form.splits,
        cluster=cluster_of(form),
        even=form.even,
        early=ahead.BYTES if form.early else 0,
    )
    types = {"w_ptr": "*u8", "parts_ptr": "*fp32", "counters_ptr": "*i32"}
    types |= dict.fromkeys(("x_ptr", "b_ptr", "y_ptr"), "*" + form.dtype)
    if tile.kind == "pipelined":
        from ptq_kernels.triton.pipelined import q_layout, x_layout

        types["x_desc"] = f"tensordesc<{form.dtype}[{tile.block_m}, {tile.block_k}],{x_layout()!r}>"
        types["q_desc"] = f"tensordesc<i32[{tile.block_n // 64}, {8 * tile.block_k}],{q_layout()!r}>"
    options = recipes.options(tile, form.early)
    return _compile(recipes.kernel_of(tile), constants, types, form.capability, options)


def compile_dequantizer(
    capability: int,
    dtype: str = "bf16",
    *,
    out: str | None = None,
    asymmetric: bool = False,
    group: int = 128,
    even: bool = True,
) -> tuple[Any, int]:
    """The kernel that dequantizes 4 bits with scales of `dtype`, for rows of that one or of `out`; and its warps."""
    scheme = {
        "bits": 4,
        "order": order_of(capability),
        "group": group,
        "scales": _TYPES[dtype],
        "asymmetric": asymmetric,
    }
    rows = next(name for name, kind in dense.DTYPES.items() if kind == _TYPES[out or dtype])
    columns = dequant.BLOCK_K if even else dequant.BLOCK_K - 16
    made = dense.Dense(configs.Gpu(capability, 0), scheme, min(group, 128), (128, columns), rows)
    pointers = {"w_ptr": "*u8", "out_ptr": "*" + (out or dtype)}
    kernel = _compile(made.kernel, made.constants, pointers, capability, made.options)
    return kernel, int(made.options["num_warps"])


def _compile(
    kernel: Any, constants: dict[str, Any], types: dict[str, str], capability: int, chosen: dict[str, Any]
) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {*(name for name in types if name.endswith("_ptr")), "N", "K"}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned}
    kind_of_source: Any = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        kind_of_source = GluonASTSource
    source = kind_of_source(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=chosen)


def scratch_of(ptx: str, *, explicit: bool) -> list[str]:
    """What Triton writes to shared memory between the barrier of a cluster and the last read of what was sent.

    Not the sends; where layouts are not explicit, writes that follow a barrier of the program after that read.
    """
    part = ptx.partition("barrier.cluster.arrive")[2]
    if not explicit:
        before, wait, after = part.partition("again: mbarrier.try_wait")
        part = before + wait + after.partition("bar.sync")[0]
    return re.findall(r"\bst\.shared[^;]*|\bstmatrix[^;]*|\bcp\.async[^;]*", part)


def inspect(kernel: Any, form: Form) -> Report:
    """The report on what `compile_form` returned."""
    registers, stack, lines = sass.machine_code(kernel)
    first, last = sass.main_loop(lines)
    loop = [line for at, line in lines if first <= at <= last]
    wgmma = [line for _, line in lines if "HGMMA" in line]
    shared, threads = kernel.metadata.shared, 32 * form.tile.warps
    if cluster_of(form) > 1:
        shared = max(shared, clusters.bytes_needed(form.tile.block_m, form.tile.block_n))
    resident = min(
        65536 // (-(-registers // 8) * 8 * threads),  # registers are handed out eight at a time
        _SHARED_OF_SM[form.capability] * 1024 // (shared + 1024),
        _THREADS_OF_SM[form.capability] // threads,
    )
    return Report(
        registers,
        stack,
        kernel.metadata.shared,
        shared,
        resident,
        Counter(sass.opcode(line) for line in loop),
        all(re.search(r"R\d+, R\d+, gdesc", line) for line in wgmma) if wgmma else None,
        sass.early_overwrites(loop + loop) or sass.early_overwrites([line for _, line in lines]),
        form.tile.block_n * form.tile.block_k / threads,
        scratch_of(kernel.asm["ptx"], explicit=form.tile.explicit),
        sass.hasty([line for _, line in lines]),
    )


def violations(form: Form, report: Report) -> list[str]:
    """What of the report must not be shipped; empty if all is well."""
    tile, loop = form.tile, report.loop
    scales = max(tile.block_k // tile.span, 1)  # of a weight row in a step
    # scales and zeros of the two halves of a step may come by a matrix load each
    placed = 2 * (1 + form.asymmetric) * (tile.kind == "folded" and scales > 1)
    if tile.kind == "raised":
        placed = tile.block_k // 16  # the ones, of which no register has to be kept
    if tile.kind == "slim":
        placed = tile.block_k // tile.warps // 32 * (tile.block_m // 8) + 1  # x: eight rows, 32 columns each; scales
    wide = order_of(form.capability) == 90 and tile.kind != "slim"  # which has mma.sync
    resident = tile.resident if form.capability in _RECORDED else 1  # others have less shared memory
    rules = [
        (_spills_little(form, report), f"spills {report.stack} bytes"),
        (not report.overwrites, f"writes operands of unfinished wgmma: {report.overwrites[:3]}"),
        (loop["I2F"] + loop["I2FP"] == 0, "converts integers to floats in the loop"),
        (loop["LDSM"] <= placed or order_of(form.capability) != 90, "sends the weight through shared memory (LDSM)"),
        (loop["STS"] <= scales * (1 + form.asymmetric), f"{loop['STS']} stores to shared memory in the loop"),
        (loop["PRMT"] <= _most_permutations(form, report), f"{loop['PRMT']} byte permutations in the loop"),
        (report.from_registers is True if wide else loop["HMMA"] > 0, "the tensor cores do not read registers"),
        (report.shared <= _MOST_SHARED[form.capability] * 1024, f"needs {report.shared} bytes of shared memory"),
        (report.resident >= resident, f"{report.resident} programs resident, the table says {resident}"),
        # an arrival and a wait for each of the two products: the assembler may also wait after every instruction
        (tile.kind != "pipelined" or loop["WARPGROUP"] <= 4, "the tensor cores wait for each other's instructions"),
        (
            cluster_of(form) == 1 or clusters.has_room(report.own_shared, tile.block_m, tile.block_n),
            f"has {report.own_shared} bytes of shared memory, too few to receive more than Triton asks for",
        ),
        (not report.scratch, f"writes where programs of the cluster send to: {report.scratch[:3]}"),
        (report.hasty == ([] if form.early else None), f"before the wait for the kernel before: {report.hasty}"),
        (report.per_weight <= most_instructions(form), f"{report.per_weight:.2f} instructions a weight"),
    ]
    return [message for holds, message in rules if not holds]


def _spills_little(form: Form, report: Report) -> bool:
    """None by Triton 3.6; by later ones two registers around the loop, with a ragged last step, which is rare, six.

    3.7.1 and 3.9 do that in some forms, each in others. What only `tune` chooses, kernels that begin early and tiles
    that are not exact, may spill six with any, twelve if early or with a ragged last step; five instructions of the
    loop use them.
    """
    in_loop = report.loop["LDL"] + report.loop["STL"]
    if form.tile.kind != "exact" or form.early:
        most = _MOST_SPILLED_RARELY * (2 if form.early or not form.even else 1)
        return report.stack <= most and (in_loop <= _MOST_LOCAL or not form.even)
    if triton.__version__.startswith("3.6."):
        return report.stack == 0
    if not form.even:
        return report.stack <= _MOST_SPILLED_RARELY
    return report.stack <= _MOST_SPILLED and in_loop == 0


def _most_permutations(form: Form, report: Report) -> float:
    """A few a step place scales and zeros (moving the weight takes 64); 8 bits need one a weight, half with float16."""
    scales = max(form.tile.block_k // form.tile.span, 1)
    around = scales * (12 if form.asymmetric else 4)
    if form.tile.kind == "pipelined":  # two of each scale and zero, for the pairs of a register
        around = 8 * (1 + form.asymmetric)
    if form.tile.bits == 4:
        return around
    return around + report.weights * (1.0 if form.dtype == "bf16" else 0.5)


def most_instructions(form: Form) -> float:
    """Instructions a weight: 3.0 where few rows meet one scale a step, elsewhere 5 % over what was recorded.

    10 % where it was recorded for another capability, whose compiler orders them otherwise.
    """
    tile = form.tile
    recorded = configs.recorded_instructions(order_of(form.capability), tile, form.dtype, form.asymmetric)
    recorded *= 1.05 if form.capability in _RECORDED else 1.10
    few = (
        order_of(form.capability) == 90
        and tile.block_m <= 64
        and (tile.bits, tile.span, tile.kind) == (4, 128, "exact")
    )
    # the masks of a ragged last step are not counted: sizes that need them are rare, and none has them in each step
    return (min(recorded, _MOST_FOR_FEW_ROWS) if few else recorded) if form.even else float("inf")


def forms(capabilities: Sequence[int] = (90, 80)) -> list[Form]:
    """Every tile in both dtypes, symmetric and not, split; whole, with a bias and a ragged last step; and early."""
    found = []
    for capability in capabilities:
        # the same tile may serve several numbers of rows
        for tile in dict.fromkeys(each._replace(rows=0) for each in configs.tiles(order_of(capability))):
            whole = tile.kind == "slim"  # neither split nor with a ragged step
            joins = tile.kind != "exact" and not whole
            for asymmetric in (False, True):
                found += [Form(tile, capability, dtype, asymmetric, 1 if whole else 2) for dtype in ("bf16", "fp16")]
                found.append(Form(tile, capability, "bf16", asymmetric, splits=1, bias=True, even=whole))
                if joins and tile.block_m == 16:  # whose shares go by four rows or by two
                    found.append(Form(tile, capability, "bf16", asymmetric, splits=4))
                if capability >= ahead.LEAST_CAPABILITY:
                    most = 1 if whole else configs.CLUSTERS[-1] if joins else 2  # a share of each is compiled in
                    bias = tile.kind != "exact"
                    found.append(Form(tile, capability, "bf16", asymmetric, splits=most, bias=bias, early=True))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print a line for each form; 1 if one is not fit to ship, 2 if no form was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", type=int, nargs="+", default=[90, 80, 89])
    parser.add_argument("--match", default="", help="a regular expression that the name of a form must contain")
    chosen = parser.parse_args(arguments)
    known = forms(chosen.capabilities)
    dequantizers = {f"sm{each}-4bit-g128-dequantizer-bf16-symmetric": each for each in chosen.capabilities}
    try:
        wanted = [form for form in known if re.search(chosen.match, form.name)]
        dequantizers = {name: each for name, each in dequantizers.items() if re.search(chosen.match, name)}
    except re.error as error:
        parser.error(f"--match must be a regular expression, {chosen.match!r} is none: {error}")
    if not wanted and not dequantizers:
        parser.error(f"--match must fit one of {len(known)} forms, as {known[0].name}; {chosen.match!r} fits none")
    failed = 0
    print(f"triton {triton.__version__}: instructions a weight, registers, shared memory, resident programs")
    for form in wanted:
        report = inspect(compile_form(form), form)
        wrong = violations(form, report)
        failed += bool(wrong)
        figures = f"{report.per_weight:5.2f} {report.registers:4d} {report.shared:7d} {report.resident:2d}"
        print(f"{form.name:52s} {figures}  {'; '.join(wrong) or 'ok'}", flush=True)
    for name, capability in dequantizers.items():  # which has no loop: of all of it
        kernel, warps = compile_dequantizer(capability)
        registers, _, lines = sass.machine_code(kernel)
        per_weight = len(lines) * 32 * warps / (dequant.BLOCK_N * dequant.BLOCK_K)
        print(f"{name:52s} {per_weight:5.2f} {registers:4d} {kernel.metadata.shared:7d}", flush=True)
    print(f"{failed} forms are not fit to ship")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
