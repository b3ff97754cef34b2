"""Where a quantized checkpoint loads: what transformers, vLLM and SGLang accept, as rules on plain facts.

Evidence of a rule, in brackets: [run] checked by running the reader, [source] read in its source, [thread] said in a
public discussion. transformers 5.24 was run, and vLLM 0.32 on a CPU; of SGLang 0.5.23 what loads the files, without
kernels of GPUs; vLLM on GPUs was read in mid-2026. They change: look again before relying on a row for another release.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from ptq.formats import CODECS
from ptq.formats.capability import is_head
from ptq.formats.codec import EXPERTS, Config, Scheme, fused_modules, spellings

LOADS, SLOWER, UNKNOWN, REFUSES = "loads", "loads slower", "not known", "does not load"
# Where optimum looks for blocks, unless the configuration names them.
OPTIMUM_BLOCKS = ("transformer.h.", "model.decoder.layers.", "gpt_neox.layers.", "model.layers.")
_WORSE = (LOADS, SLOWER, UNKNOWN, REFUSES)
MARLIN_GROUPS = {-1, 32, 64, 128}


class Facts(NamedTuple):
    """What decides where a checkpoint loads."""

    codec: str  # key of `ptq.formats.CODECS`
    settings: Config  # quantization_config
    schemes: Mapping[str, Scheme]  # of packed Linears, by module
    shapes: Mapping[str, tuple[int, int]]  # (N, K) of packed Linears
    floats: tuple[str, ...]  # Linears that are not packed, but for heads
    permuted: frozenset[str]  # packed Linears whose groups are not contiguous (act-order)
    roles: Mapping[str, str]  # "column" or "row" parallel, for the Linears of which the model's class says so
    heads: tuple[int, int]  # of queries, of keys and values
    transposed: bool = False  # some packed Linears are transformers' Conv1D (GPT-2)
    # Of the model's class in transformers (`ptq.models.stock`); "" where there is nothing to say.
    left_out: str = ""  # a packed Linear of an expert that it reads past
    init_error: str = ""  # what it raises once Linears hold packed weights
    spelled: Mapping[str, str] = {}  # what the file calls Linears, where that differs

    @property
    def experts(self) -> bool:
        """Whether packed Linears belong to experts."""
        return any(EXPERTS.match(name) for name in self.schemes)

    @property
    def mixed(self) -> bool:
        """Whether packed Linears differ in their scheme."""
        return len(set(self.schemes.values())) > 1

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the middle code."""
        return all(scheme.symmetric for scheme in self.schemes.values())

    @property
    def bits(self) -> set[int]:
        """Widths."""
        return {scheme.bits for scheme in self.schemes.values()}


class Verdict(NamedTuple):
    """What one reader does with a checkpoint."""

    reader: str
    status: str  # LOADS, SLOWER, UNKNOWN or REFUSES
    reason: str


Finding = tuple[str, str]  # status, reason


def verdicts(facts: Facts) -> list[Verdict]:
    """One verdict for each reader: its worst finding counts, and every reason of that kind is said."""
    readers: dict[str, Callable[[Facts], Iterator[Finding]]] = {
        "transformers": _transformers, "vLLM": _vllm, "SGLang": _sglang
    }  # fmt: skip
    found = []
    for reader, rules in readers.items():
        findings = list(rules(facts))
        if facts.transposed:
            findings.append((UNKNOWN, "GPT-2 keeps Linears as Conv1D, which no evidence covers"))
        worst = max((status for status, _ in findings), key=_WORSE.index, default=LOADS)
        reasons = [reason for status, reason in findings if status == worst]
        found.append(Verdict(reader, worst, "; ".join(reasons)))
    return found


def _transformers(facts: Facts) -> Iterator[Finding]:
    if facts.codec == "compressed-tensors":
        yield from _transformers_compressed(facts)
        return
    # [source] transformers has no kernels of its own for these; its quantizers import gptqmodel (GPTQ: and optimum).
    yield LOADS, f"needs gptqmodel{'' if facts.codec == 'awq' else ' and optimum'}"
    if facts.experts:
        # [source] optimum and gptqmodel replace Linears; transformers 5 keeps experts in stacked parameters.
        yield REFUSES, "packed experts are read from compressed-tensors only"
    if facts.codec == "awq":
        # [run] the spellings of AutoAWQ are ignored without a word, and the defaults are 4 bits and groups of 128.
        if "group_size" not in facts.settings and facts.settings.get("q_group_size", 128) != 128:
            yield REFUSES, "q_group_size is ignored, groups of 128 are assumed; write group_size"
        return
    # [source] optimum replaces the Linears whose name begins so, and no other.
    named = facts.settings.get("block_name_to_quantize")
    blocks = (f"{named}.",) if named else OPTIMUM_BLOCKS
    outside = [name for name in facts.schemes if not name.startswith(blocks)]
    if outside:
        yield REFUSES, f"optimum looks for packed Linears in {', '.join(f'{b}*' for b in blocks)}, not for {outside[0]}"
    left = any(rule.startswith("-:") for rule in facts.settings.get("dynamic") or {})
    if facts.mixed or (left and any(name.startswith(blocks) for name in facts.floats)):
        # [run] `dynamic` is dropped while the configuration is parsed; optimum then replaces every Linear alike.
        yield REFUSES, "`dynamic` is dropped: every Linear of a block must have one scheme"
    damping = facts.settings.get("damp_percent")
    if damping is not None and not 0 < damping < 1:
        yield REFUSES, f"damp_percent must be between 0 and 1, found {damping}"  # [run]
    if facts.codec == "gptq" and not facts.symmetric and not _written_by_gptqmodel(facts.settings):
        # [source] gptqmodel takes asymmetric v1 only from itself: the stored zero - 1 is ambiguous.
        yield REFUSES, "asymmetric GPTQ v1 is taken from gptqmodel itself only; write gptq_v2"


def _transformers_compressed(facts: Facts) -> Iterator[Finding]:
    # [run] integer weights are expanded, when they are loaded or at the first forward pass; needs compressed-tensors.
    yield SLOWER, "needs compressed-tensors; expanded to dense weights, so no memory is saved"
    if _regroups(facts.settings):
        yield REFUSES, "compressed-tensors 0.20 refuses actorder 'group'"  # [run]
    if facts.left_out:
        # [run] it lists them as unexpected and the stacks as missing, and goes on.
        left = f"does not gather experts that are stored one by one ({facts.left_out}) and gives its own random numbers"
        yield REFUSES, f"the model's class {left}; use ptq.load, or `import ptq` before from_pretrained"
    if facts.symmetric and not facts.init_error:
        return
    what = "asymmetric weights load" if not facts.symmetric else f"the class ({facts.init_error}) loads"
    if facts.experts and not facts.symmetric:
        yield REFUSES, "zero points of experts never reach what unpacks them"  # [run]
    elif facts.mixed:
        yield REFUSES, f"{what} with dequantize=True only, which takes one scheme for all"  # [run]
    else:
        why = f", as the class stops at packed weights ({facts.init_error})" if facts.init_error else ""
        yield SLOWER, f"pass quantization_config=CompressedTensorsConfig(dequantize=True){why}"  # [run]


def _vllm(facts: Facts) -> Iterator[Finding]:
    yield from _engine(facts)
    yield from _listed_otherwise(facts)
    yield from _beside_a_tower(facts)
    if facts.codec.startswith("gptq"):
        # [run] its table of types has 4 and 8 bits, symmetric; on a CPU only the first is computed.
        if not facts.symmetric:
            yield REFUSES, "GPTQ must be symmetric"
        if not facts.bits <= {4, 8}:
            yield REFUSES, f"GPTQ must have 4 or 8 bits, found {_listed(facts.bits)}"
        yield from _vllm_on_cpus(facts)
        yield from _marlin(facts)
    elif facts.codec == "awq":
        if facts.settings.get("zero_point") is False:
            yield SLOWER, "without zero_point Marlin is not used"  # [source] its 4-bit type without zeros is GPTQ's
        yield from _marlin(facts)
    else:
        if _regroups(facts.settings):
            yield UNKNOWN, "actorder 'group' is no longer written; which releases read it is not known"
        asymmetric = {scheme.bits for scheme in facts.schemes.values() if not scheme.symmetric}
        if not asymmetric <= {4, 8}:
            # [thread] support of other widths was proposed when this was written.
            yield REFUSES, f"asymmetric compressed-tensors must have 4 or 8 bits, found {_listed(asymmetric)}"
        if asymmetric and facts.experts:
            yield UNKNOWN, "asymmetric experts depend on the release"  # [thread]
        yield from _vllm_on_cpus(facts)


def _listed_otherwise(facts: Facts) -> Iterator[Finding]:
    """Floats whose names a list has only as transformers spells them.

    vLLM changes the starts of listed names [source]. What a file's name has within, as the ``vision_model`` of CLIP and
    SigLIP towers that transformers 5 left away, its modules have as well, and no change of a start puts it there.
    """
    if facts.codec.startswith("gptq"):  # what the file holds in float it sees by itself
        return
    parse = CODECS[facts.codec].parse_config
    inner = [name for name in facts.floats if {*facts.spelled.get(name, name).split(".")} - {*name.split(".")}]
    as_stored = parse(facts.settings, [facts.spelled[name] for name in inner])
    as_named = parse(facts.settings, inner)
    left = [name for name in inner if as_named[name] is None and as_stored[facts.spelled[name]] is not None]
    if left:
        said = f"quantization_config names {left[0]}, which is in float, not as {facts.spelled[left[0]]}"
        yield REFUSES, f"{said}, as the file and vLLM call it ({len(left)} such Linears)"


def _beside_a_tower(facts: Facts) -> Iterator[Finding]:
    """Packed Linears that a list does not mean by the names vLLM has for them beside a vision tower [run].

    GPTQ's `dynamic` it takes as it is; of compressed-tensors' targets it changes the starts of those with a dot.
    """
    start = "model.language_model."
    there = {
        name: f"language_model.model.{name.removeprefix(start)}" for name in facts.schemes if name.startswith(start)
    }
    if there and facts.codec.startswith("gptq"):
        found = CODECS[facts.codec].parse_config(facts.settings, there.values())
        left = [name for name, other in there.items() if found[other] != facts.schemes[name]]
        if left:
            yield REFUSES, f"no rule of `dynamic` means {left[0]} as vLLM calls it, {there[left[0]]} ({len(left)} such)"
    if there and facts.codec == "compressed-tensors":
        groups = (group.get("targets") or () for group in (facts.settings.get("config_groups") or {}).values())
        for head in {*filter(is_head, facts.schemes)} & {target for targets in groups for target in targets}:
            if "." not in head:
                yield REFUSES, f"config_groups must name the packed {head} by a pattern, as re:.*{head}$"


def _vllm_on_cpus(facts: Facts) -> Iterator[Finding]:
    if facts.bits != {4}:
        yield LOADS, "on GPUs; on CPUs only 4 bits"  # [run]


def _sglang(facts: Facts) -> Iterator[Finding]:
    yield from _engine(facts)
    yield from _named_floats(facts)
    yield from _fused_otherwise(facts)
    if facts.codec.startswith("gptq"):
        # [source] Marlin takes what vLLM's does and no zeros, of either version; the plain kernels are gone.
        if not facts.symmetric:
            yield REFUSES, "GPTQ must be symmetric (0.5.23 has no kernels but Marlin)"
        if not facts.bits <= {4, 8}:
            yield REFUSES, f"GPTQ must have 4 or 8 bits, found {_listed(facts.bits)} (0.5.23 has no kernels but Marlin)"
        yield from _marlin(facts, REFUSES)
    elif facts.codec == "awq":
        if facts.settings.get("zero_point") is False:
            # [source] falls to kernels for float16, which have no experts.
            yield (REFUSES if facts.experts else SLOWER), "without zero_point only float16 kernels without experts run"
        yield from _marlin(facts)
    elif _regroups(facts.settings):
        yield UNKNOWN, "actorder 'group' is no longer written; which releases read it is not known"
    elif not facts.bits <= {4, 8}:
        yield REFUSES, f"compressed-tensors must have 4 or 8 bits, found {_listed(facts.bits)}"  # [source]
    elif facts.symmetric:
        yield LOADS, "on GPUs; not on CPUs"  # [source]


def _engine(facts: Facts) -> Iterator[Finding]:
    """What vLLM and SGLang have in common."""
    if facts.left_out:
        yield UNKNOWN, f"no evidence covers experts stored one by one ({facts.left_out}) of a class that stacks them"
    for members in fused_modules([*facts.schemes, *facts.floats]).values():
        if len({facts.schemes.get(name) for name in members}) > 1:
            # [source] both run these as one product, with one scheme; skip rules are looked up for all shards.
            yield REFUSES, f"{members[0]} is fused with {members[1]} and must have its scheme"
            break
    if facts.codec.startswith("gptq"):
        for key in ("desc_act", "sym"):
            if key not in facts.settings:
                yield REFUSES, f"quantization_config must have `{key}`"  # [source] from_config reads both
    if facts.codec == "awq":
        # [source] an entry counts wherever it is part of a module's name: "mlp.gate" also skips "mlp.gate_proj".
        for entry in facts.settings.get("modules_to_not_convert") or ():
            hit = next((name for name in facts.schemes if entry in name), None)
            if hit is not None:
                yield REFUSES, f"modules_to_not_convert has {entry!r}, which is part of the packed {hit}'s name"


def _named_floats(facts: Facts) -> Iterator[Finding]:
    """SGLang does not infer from dtypes which Linears are in float [source]; vLLM does where no list is given."""
    named = {name: spellings(name, facts.spelled) for name in facts.floats}
    if facts.codec == "awq":
        entries = facts.settings.get("modules_to_not_convert") or ()
        left = [n for n in facts.floats if not any(entry in each for entry in entries for each in named[n])]
    elif facts.codec.startswith("gptq"):
        rules = [rule.removeprefix("-:") for rule in facts.settings.get("dynamic") or {} if rule.startswith("-:")]
        left = [n for n in facts.floats if not any(re.match(rule, each) for rule in rules for each in named[n])]
    else:
        left = []
    if left:
        yield REFUSES, f"{left[0]} is in float and quantization_config does not say so ({len(left)} such Linears)"


def _fused_otherwise(facts: Facts) -> Iterator[Finding]:
    """Fused modules of which the configuration says something else than of their members.

    SGLang asks for the fused name [run]: what is packed by that and float by its members' stays empty without a word.
    compressed-tensors' lists it looks through for the members in classes that name these, and for experts [source].
    """
    codec, every = CODECS[facts.codec], {**facts.schemes, **dict.fromkeys(facts.floats)}
    modules = {name: each for name, each in fused_modules(every).items() if len({every[n] for n in each}) == 1}
    if facts.codec == "compressed-tensors":
        modules = {name: each for name, each in modules.items() if not EXPERTS.match(each[0])}
    stored = {
        name: next(iter(fused_modules(facts.spelled.get(n, n) for n in each)), name) for name, each in modules.items()
    }
    settings = facts.settings
    said = codec.parse_config(settings, modules, stored)
    if facts.codec.startswith("gptq"):  # [source] experts are given the default, whatever `dynamic` says
        said |= codec.parse_config({**settings, "dynamic": {}}, [n for n in modules if EXPERTS.match(modules[n][0])])
    wrong = [name for name, each in modules.items() if said[name] != every[each[0]]]
    if wrong:
        status = UNKNOWN if facts.codec == "compressed-tensors" else REFUSES
        what = f"gives {wrong[0]} other settings than {modules[wrong[0]][0]} and its siblings, which run as that"
        yield status, f"quantization_config {what} ({len(wrong)} such modules)"


def _marlin(facts: Facts, odd_groups: str = UNKNOWN) -> Iterator[Finding]:
    """Shapes of the fast kernel [source]: groups of 32, 64, 128 or a row, 64 rows, 128 columns."""
    groups = {scheme.group_size for scheme in facts.schemes.values()} - MARLIN_GROUPS
    if groups:
        yield odd_groups, f"Marlin has groups of 32, 64, 128 or a whole row, found {_listed(groups)}"
    odd = [name for name, (n, k) in facts.shapes.items() if n % 64 or k % 128]
    if odd:
        n, k = facts.shapes[odd[0]]
        shape = f"{odd[0]} is {n} x {k} ({len(odd)} such Linears)"
        yield SLOWER, f"Marlin wants multiples of 64 rows and 128 columns; {shape}, which newer releases pad"


def _regroups(settings: Config) -> bool:
    """Whether compressed-tensors weights come with an order of columns."""
    groups = (settings.get("config_groups") or {}).values()
    return any((group.get("weights") or {}).get("actorder") in ("group", "dynamic", True) for group in groups)


def _written_by_gptqmodel(settings: Config) -> bool:
    return "gptqmodel" in str((settings.get("meta") or {}).get("quantizer")).lower()


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(values)))
