"""Over how many GPUs an engine can split a checkpoint's packed Linears: whole words and whole groups for each.

Evidence stands in brackets, as in `ptq.readers`.
"""

from ptq.formats.capability import is_head
from ptq.formats.codec import Scheme
from ptq.readers import Facts


def split_problems(facts: Facts, parts: int) -> list[str]:
    """Why the packed Linears cannot be split over ``parts`` GPUs; empty where they can.

    A column-parallel Linear gives each GPU N / parts rows, a row-parallel one K / parts columns: whole words and whole
    groups [source: the loaders of vLLM and SGLang narrow the packed tensors]. Linears without a known role are left out
    (`unknown_roles`).
    """
    found = []
    queries, keys = facts.heads
    if queries and queries % parts:
        found.append(f"{queries} attention heads")
    for name, role in facts.roles.items():
        if name not in facts.schemes:
            continue
        scheme, (n, k) = facts.schemes[name], facts.shapes[name]
        if role == "row":
            problem = _row_problem(facts, name, k, parts)
        else:
            # [source] keys and values are repeated where there are fewer of their heads than GPUs.
            repeated = name.endswith((".k_proj", ".v_proj")) and keys and parts % keys == 0
            problem = _column_problem(facts, scheme, n, min(parts, keys) if repeated else parts)
        if problem:
            found.append(f"{name}: {problem}")
    return found


def _row_problem(facts: Facts, name: str, columns: int, parts: int) -> str | None:
    scheme = facts.schemes[name]
    each, rest = divmod(columns, parts)
    if rest:
        return f"{columns} columns do not divide by {parts}"
    if name in facts.permuted:
        return "its groups are not contiguous (act-order), so a share of its columns needs all scales"
    if scheme.group_size != -1 and each % scheme.group_size:
        return f"{columns} / {parts} = {each} columns are no whole groups of {scheme.group_size}"
    if facts.codec != "awq" and each * scheme.bits % 32:  # AWQ packs along N
        return f"{columns} / {parts} = {each} columns of {scheme.bits} bits are no whole words"
    return None


def _column_problem(facts: Facts, scheme: Scheme, rows: int, parts: int) -> str | None:
    each, rest = divmod(rows, parts)
    if rest:
        return f"{rows} rows do not divide by {parts}"
    packed = facts.codec != "compressed-tensors" or not scheme.symmetric  # zeros are packed along N
    if packed and each * scheme.bits % 32:
        return f"{rows} / {parts} = {each} rows of {scheme.bits} bits are no whole words"
    return None


def unknown_roles(facts: Facts) -> list[str]:
    """Packed Linears of which the model's class does not say how they are split."""
    return [name for name in facts.schemes if name not in facts.roles and not is_head(name)]
