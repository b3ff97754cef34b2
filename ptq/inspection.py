"""``ptq inspect``: what a checkpoint holds, from its headers alone."""

from collections import Counter
from typing import Any

from ptq.formats.codec import Scheme
from ptq.models.structure import linears
from ptq.nn.linear import QuantLinear
from ptq.page_report import report_page
from ptq.report import read_report
from ptq.runtime import Checkpoint, open_checkpoint

NAMED = 4  # of the Linears that stay in float


def inspect(path: str, *, modules: bool = False, trust_remote_code: bool = False) -> str:
    """A description of a checkpoint; with ``modules`` one line for each quantized Linear.

    Raises:
        ConfigError: no such model.
        FormatError: damaged files.
    """
    opened = open_checkpoint(path, trust_remote_code=trust_remote_code)
    size = sum(opened.reader.files().values())
    lines = [
        f"checkpoint  {opened.directory}",
        f"model       {type(opened.model).__name__}, {opened.dtype}",
        f"files       {len(opened.reader.files())}, {size / 1e6:.1f} MB",
    ]
    if opened.codec is None:
        return "\n".join([*lines, "quantized   no: a float checkpoint"])
    packed = {n: m for n, m in opened.model.named_modules() if isinstance(m, QuantLinear)}
    left = [name for name, _ in linears(opened.model)]
    weights = sum(m.in_features * m.out_features for m in packed.values())
    lines.append(f"format      {opened.codec.name}")
    bits = packed_bits(opened) / weights
    lines.append(f"quantized   {len(packed)} Linears, {weights / 1e6:.1f} M weights, {bits:.3f} bits each")
    for scheme, count in Counter(opened.schemes.values()).most_common():
        lines.append(f"            {count:4d} x {_words(scheme)}")
    more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
    lines.append(f"float       {len(left)} Linears{': ' + ', '.join(left[:NAMED]) if left else ''}{more}")
    if modules:
        for name, m in packed.items():
            lines.append(f"  {name}  {m.out_features} x {m.in_features}, {_words(opened.schemes[name])}")
    return "\n".join(lines)


def inspection_page(path: str, *, trust_remote_code: bool = False) -> str:
    """What a checkpoint holds as an HTML page: its report where it comes with one, else what its headers say.

    Raises:
        ConfigError: no such model.
        FormatError: damaged files, or a report that `read_report` refuses.
    """
    opened = open_checkpoint(path, trust_remote_code=trust_remote_code)
    if (opened.directory / "report.json").is_file():
        return report_page(opened.directory.name, read_report(opened.directory / "report.json"))
    packed = {n: m for n, m in opened.model.named_modules() if isinstance(m, QuantLinear)}
    size: dict[str, Any] = {"after": sum(opened.reader.files().values())}
    if packed:
        size["bits_per_weight"] = packed_bits(opened) / sum(m.in_features * m.out_features for m in packed.values())
    rows = {name: {"bits": scheme.bits, "group_size": scheme.group_size} for name, scheme in opened.schemes.items()}
    left = [name for name, _ in linears(opened.model)]
    return report_page(opened.directory.name, {"size": size, "modules": rows, "kept_in_float": left})


def packed_bits(opened: Checkpoint) -> int:
    """Bits that the packed weights take on disk, scales and zeros included."""
    total = 0
    stored = set(opened.reader.names())  # what a codec can read may be optional
    for name, scheme in opened.schemes.items():
        assert opened.codec is not None
        for tensor in stored.intersection(opened.codec.tensor_names(opened.names.of_module(name), scheme)):
            dtype, shape = opened.reader.spec(tensor)
            count = 1
            for extent in shape:
                count *= extent
            total += 8 * dtype.itemsize * count
    return total


def _words(scheme: Scheme) -> str:
    group = "one group a row" if scheme.group_size == -1 else f"groups of {scheme.group_size}"
    return f"{scheme.bits} bits, {group}, {'symmetric' if scheme.symmetric else 'asymmetric'}"
