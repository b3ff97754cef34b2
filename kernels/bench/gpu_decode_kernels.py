"""What lies between the products when a Llama decodes a token, as an engine would run it: four kernels a block.

Each begins early where it is asked to, like the products (``ptq_kernels.triton.ahead``): such short kernels otherwise
spend much of a token beginning and ending. They serve the dense model and the quantized one alike.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (the arguments of a kernel are Triton's, and triton.jit carries no annotations)

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from ptq_kernels.triton import w4a16
from ptq_kernels.triton.ahead import ask_for, depend
from torch import Tensor

EPSILON = 1e-5  # of the norm
QUERY_ROWS = 16  # the queries of one key head are padded to what tensor cores take
KEYS = 64  # that a step of the attention reads
PROGRAMS = 256  # of the attention, about two a multiprocessor
COLUMNS = 1024  # of a program of the activation


@triton.jit
def _add_norm_kernel(
    x_ptr,  # [., WIDTH]
    token_ptr,  # int64 [rows]; which rows of x; not read unless LOOKUP
    more_ptr,  # [rows, WIDTH]; not read unless MORE
    norm_ptr,  # [WIDTH]
    sum_ptr,  # [rows, WIDTH]
    normed_ptr,  # [rows, WIDTH]
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EPSILON: tl.constexpr,
    LOOKUP: tl.constexpr,
    MORE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The residual sum of a row, and its RMSNorm."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    norm = tl.load(norm_ptr + at, mask=inside, other=0.0).to(tl.float32)  # no kernel writes it
    if EARLY:
        depend()
    source = tl.load(token_ptr + row) if LOOKUP else row
    x = tl.load(x_ptr + source * WIDTH + at, mask=inside, other=0.0)
    if MORE:
        more = tl.load(more_ptr + row * WIDTH + at, mask=inside, other=0.0)
        x = (x.to(tl.float32) + more.to(tl.float32)).to(x.dtype)  # what the next block adds to is rounded
    values = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / WIDTH + EPSILON)
    tl.store(sum_ptr + row * WIDTH + at, x, mask=inside)
    tl.store(normed_ptr + row * WIDTH + at, (values * scale * norm).to(x.dtype), mask=inside)


@triton.jit
def _rotated(pointers, mask, cos, sin, HALF: tl.constexpr):
    """Both halves of rows under the rotary embedding, rounded."""
    first = tl.load(pointers, mask=mask, other=0.0)
    a, b = first.to(tl.float32), tl.load(pointers + HALF, mask=mask, other=0.0).to(tl.float32)
    return (a * cos - b * sin).to(first.dtype), (b * cos + a * sin).to(first.dtype)


@triton.jit
def _product(a, b, FLOAT32: tl.constexpr):
    if FLOAT32:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b)


@triton.jit
def _attend_kernel(
    qkv_ptr,  # [batch, (QUERIES + 2) * KV_HEADS * 2 * HALF]: the heads of q, then those of k, then those of v
    keys_ptr,  # [batch, KV_HEADS, CACHED, 2 * HALF]; the row of `position` is replaced
    values_ptr,  # as keys
    position_ptr,  # int64 [1]
    cos_ptr,  # [CACHED, HALF]
    sin_ptr,
    parts_ptr,  # float32 [batch * KV_HEADS, SPLITS, ROWS, 2 * HALF + 2]
    counters_ptr,  # int32 [batch * KV_HEADS], 0 before and after
    y_ptr,  # [batch, KV_HEADS * QUERIES * 2 * HALF]
    KV_HEADS: tl.constexpr,
    QUERIES: tl.constexpr,  # heads of q for each head of k
    HALF: tl.constexpr,  # of the width of a head
    CACHED: tl.constexpr,  # a multiple of SPLITS * KEYS
    SPLITS: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
    FLOAT32: tl.constexpr,  # the interpreter multiplies the bit patterns of bfloat16
):
    """The attention of one sequence and one head of k over a part of the cache; the last program adds the parts."""
    WIDTH: tl.constexpr = 2 * HALF
    pair = tl.program_id(0)
    split = tl.program_id(1)
    cache = pair.to(tl.int64) * (CACHED * WIDTH)
    first = split * (CACHED // SPLITS)
    if EARLY:
        line = cache + first * WIDTH + 64 * tl.arange(0, KEYS * WIDTH // 64)  # 128 bytes each
        ask_for(keys_ptr + line)
        ask_for(values_ptr + line)
        depend()
    head = pair % KV_HEADS
    row, at, half = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, HALF)
    position = tl.load(position_ptr).to(tl.int32)
    cos = tl.load(cos_ptr + position * HALF + half).to(tl.float32)
    sin = tl.load(sin_ptr + position * HALF + half).to(tl.float32)
    own_ptr = qkv_ptr + (pair // KV_HEADS) * ((QUERIES + 2) * KV_HEADS * WIDTH)
    q_ptrs = own_ptr + ((head * QUERIES + row) * WIDTH)[:, None] + half[None, :]
    qa, qb = _rotated(q_ptrs, (row < QUERIES)[:, None], cos[None, :], sin[None, :], HALF)
    k_ptr = own_ptr + (QUERIES * KV_HEADS + head) * WIDTH
    ka, kb = _rotated(k_ptr + half, half < HALF, cos, sin, HALF)
    new_value = tl.load(k_ptr + KV_HEADS * WIDTH + at)
    factor = 1.4426950408889634 / tl.sqrt(WIDTH * 1.0)  # for powers of two
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(first, first + CACHED // SPLITS, KEYS):
        key = start + tl.arange(0, KEYS)
        new = key == position  # it is not in memory yet
        k_ptrs = keys_ptr + cache + key[None, :] * WIDTH + half[:, None]
        cached_a, cached_b = tl.load(k_ptrs), tl.load(k_ptrs + HALF)
        values = tl.load(values_ptr + cache + key[:, None] * WIDTH + at[None, :])
        scores = _product(qa, tl.where(new[None, :], ka[:, None], cached_a), FLOAT32)
        scores += _product(qb, tl.where(new[None, :], kb[:, None], cached_b), FLOAT32)
        scores *= factor
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(most - higher)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.where(new[:, None], new_value[None, :], values)
        acc = acc * shrink[:, None] + _product(weights.to(values.dtype), values, FLOAT32)
        most = higher
    if (position >= first) & (position < first + CACHED // SPLITS):
        tl.store(keys_ptr + cache + position * WIDTH + half, ka)
        tl.store(keys_ptr + cache + position * WIDTH + HALF + half, kb)
        tl.store(values_ptr + cache + position * WIDTH + at, new_value)
    part_ptr = parts_ptr + (pair * SPLITS) * (ROWS * (WIDTH + 2))
    own_part = part_ptr + split * (ROWS * (WIDTH + 2)) + row * (WIDTH + 2)
    tl.store(own_part[:, None] + at[None, :], acc)
    tl.store(own_part + WIDTH, most)
    tl.store(own_part + WIDTH + 1, total)
    tl.debug_barrier()  # the part of all threads is written before the one atomic below publishes it
    arrived = tl.atomic_add(counters_ptr + pair, 1, sem="acq_rel", scope="gpu")
    if arrived == SPLITS - 1:
        part = tl.arange(0, SPLITS)
        each = part_ptr + part[:, None] * (ROWS * (WIDTH + 2)) + row[None, :] * (WIDTH + 2) + WIDTH
        highs = tl.load(each, cache_modifier=".cg")
        high = tl.max(highs, 0)
        whole = tl.sum(tl.load(each + 1, cache_modifier=".cg") * tl.exp2(highs - high[None, :]), 0)
        y = tl.zeros((ROWS, WIDTH), tl.float32)
        for i in tl.static_range(SPLITS):
            i_ptr = part_ptr + i * (ROWS * (WIDTH + 2)) + row * (WIDTH + 2)
            weight = tl.exp2(tl.load(i_ptr + WIDTH, cache_modifier=".cg") - high)
            y += tl.load(i_ptr[:, None] + at[None, :], cache_modifier=".cg") * weight[:, None]
        y_ptrs = y_ptr + (pair * QUERIES + row).to(tl.int64)[:, None] * WIDTH + at[None, :]
        tl.store(y_ptrs, (y / whole[:, None]).to(y_ptr.dtype.element_ty), mask=(row < QUERIES)[:, None])
        tl.store(counters_ptr + pair, 0)


@triton.jit
def _activate_kernel(gate_up_ptr, y_ptr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """silu(gate) * up of some columns of a row of ``[rows, 2 * HIDDEN]``."""
    if EARLY:
        depend()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = at < HIDDEN
    gate = tl.load(gate_up_ptr + row * 2 * HIDDEN + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * HIDDEN + HIDDEN + at, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * HIDDEN + at, y.to(y_ptr.dtype.element_ty), mask=inside)


class Cache(NamedTuple):
    """Of one block."""

    keys: Tensor  # [batch, kv_heads, cached, width]
    values: Tensor

    @property
    def splits(self) -> int:
        """How many programs share a head of k: as many as fill a GPU, each with at least one step."""
        batch, kv_heads, cached, _ = self.keys.shape
        most = max(min(PROGRAMS // (batch * kv_heads), cached // KEYS), 1)
        return int(2 ** (most.bit_length() - 1))


class Between:
    """The kernels, with the memory that they share."""

    def __init__(self, cache: Cache, early: bool) -> None:
        batch, kv_heads, cached, width = cache.keys.shape
        if cached % (cache.splits * KEYS):
            raise ValueError(f"the cache must have a multiple of {cache.splits * KEYS} positions, it has {cached}")
        self.early, self.splits = early, cache.splits
        self.options: dict[str, Any] = {"launch_pdl": True} if early else {}
        device = cache.keys.device
        self.parts = torch.empty(batch * kv_heads * cache.splits * QUERY_ROWS * (width + 2), device=device)
        self.counters = torch.zeros(batch * kv_heads, dtype=torch.int32, device=device)

    def add_norm(
        self, x: Tensor, norm: Tensor, more: Tensor | None = None, token: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x + more, its RMSNorm), of the rows of x that `token` names or of all."""
        rows, width = len(x) if token is None else len(token), x.shape[1]
        total, normed = torch.empty(2, rows, width, dtype=x.dtype, device=x.device)
        _add_norm_kernel[(rows,)](
            x, norm if token is None else token, norm if more is None else more, norm, total, normed,
            width, triton.next_power_of_2(width), EPSILON, token is not None, more is not None, self.early,
            num_warps=8, **self.options,
        )  # fmt: skip
        return total, normed

    def attend(self, qkv: Tensor, cache: Cache, position: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The attention of new rows ``[batch, heads]``; their k and v, k turned, take `position` of the cache."""
        batch, kv_heads, cached, width = cache.keys.shape
        queries = qkv.shape[1] // (kv_heads * width) - 2
        if queries > QUERY_ROWS:
            raise ValueError(f"a head of k must serve at most {QUERY_ROWS} heads of q, it serves {queries}")
        y = torch.empty(batch, queries * kv_heads * width, dtype=qkv.dtype, device=qkv.device)
        _attend_kernel[(batch * kv_heads, self.splits)](
            qkv, *cache, position, cos, sin, self.parts, self.counters, y, kv_heads, queries, width // 2, cached,
            self.splits, KEYS, QUERY_ROWS, self.early, w4a16.interpreted(),
            num_warps=4, num_stages=min(cached // (self.splits * KEYS), 3), **self.options,
        )  # fmt: skip
        return y

    def activate(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up."""
        rows, hidden = gate_up.shape[0], gate_up.shape[1] // 2
        y = torch.empty(rows, hidden, dtype=gate_up.dtype, device=gate_up.device)
        grid = (triton.cdiv(hidden, COLUMNS), rows)
        _activate_kernel[grid](gate_up, y, hidden, COLUMNS, self.early, num_warps=4, **self.options)
        return y
