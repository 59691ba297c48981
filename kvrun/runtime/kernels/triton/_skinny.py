"""The device's side of `skinny.py`: `fma` and `dot`."""

import triton
import triton.language as tl

from kvrun.runtime.kernels.triton._overlap import release, wait
from kvrun.runtime.kernels.triton.gated import _act


@triton.jit
def _row(n, N, GATED: tl.constexpr):
    """The row of the matrix whose product stands at n of all tiles: its n-th, or, GATED, a gate and
    then its up."""
    n = tl.minimum(n, N - 1)
    if GATED != "":
        n = n // 2 + n % 2 * (N // 2)
    return n.to(tl.int64)


@triton.jit
def _prefetch(
    w, n0, N, stride, AHEAD: tl.constexpr, BLOCK_N: tl.constexpr, THREADS: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """Asks for AHEAD columns of BLOCK_N rows into L2; every few threads, one asks for its row."""
    share: tl.constexpr = THREADS // BLOCK_N
    size: tl.constexpr = AHEAD * w.dtype.element_ty.primitive_bitwidth // 8
    thread = tl.arange(0, THREADS)
    at = (w + _row(n0 + thread // share, N, GATED) * stride).to(tl.int64)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.eq.s32 p, $2, 0; "
        "@p cp.async.bulk.prefetch.L2.global [$1], $3; mov.b32 $0, 0; }",
        "=r,l,r,r",
        [at, thread % share, tl.full([THREADS], size, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _load(at, inside, EVEN: tl.constexpr):
    return tl.load(at) if EVEN else tl.load(at, mask=inside, other=0)


@triton.jit
def _input(at, inside, K: tl.constexpr, ACT: tl.constexpr, EVEN: tl.constexpr):
    """x, or act(gate) · up in fp32."""
    x = _load(at, inside, EVEN)
    if ACT != "":
        x = _act(x.to(tl.float32), ACT) * _load(at + K, inside, EVEN).to(tl.float32)
    return x


@triton.jit
def _finish(
    y, m, n, bias, add, out, M, N, add_stride, out_stride, BIAS: tl.constexpr, ADD: tl.constexpr
):
    """Stores y + bias + add at rows m and columns n, which broadcast to y's shape."""
    inside = (m < M) & (n < N)
    if BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if ADD:
        y += tl.load(add + m * add_stride + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + m * out_stride + n, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _finish_gated(y, m, n, out, M, N, out_stride, GATED: tl.constexpr):
    """`_finish` for tiles of gates and ups, neighbours along the dimension of n: stores
    act(gate) · up."""
    if n.shape[0] == 1:
        pairs = tl.reshape(y, [y.shape[0], y.shape[1] // 2, 2])
        n = tl.reshape(n, [1, n.shape[1] // 2, 2])
    else:
        pairs = tl.permute(tl.reshape(y, [y.shape[0] // 2, 2, y.shape[1]]), (0, 2, 1))
        n = tl.permute(tl.reshape(n, [n.shape[0] // 2, 2, 1]), (0, 2, 1))
    gate, up = tl.split(pairs)
    even, _ = tl.split(n)
    inside = (m < M) & (even < N)
    y = _act(gate, GATED) * up
    tl.store(out + m * out_stride + even // 2, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _widen(tile, dtype: tl.constexpr, PACKED: tl.constexpr):
    """A tile in fp32 [ROWS, BLOCK_N, BLOCK_K]; PACKED, it holds pairs of 16 bits in 32.

    Loaded in pairs, a tile stays in half the registers until its turn.
    """
    if not PACKED:
        return tile.to(tl.float32)
    else:  # noqa: RET505 - what follows must not be compiled
        if dtype == tl.bfloat16:
            low = (tile << 16).to(tl.float32, bitcast=True)
            high = (tile & -65536).to(tl.float32, bitcast=True)
        else:
            low = tile.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
            high = (tile >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        return tl.reshape(tl.join(low, high), [tile.shape[0], tile.shape[1], 2 * tile.shape[2]])


@triton.jit
def _fold(x):
    """Sums over the 8 neighbouring columns that one thread holds."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 8, 8]), 3)


@triton.jit
def _turn(
    sums, squares, tile, x, norm, k, w,
    K: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """Adds one tile's products, and squares of x, at columns k."""
    row = _input(x + k, k < K, K, ACT, EVEN).to(tl.float32)
    if NORM:
        squares += _fold(row * row)
        # Loaded for every row, though the same: a tensor of one row would get another layout.
        row *= _load(norm + k, k < K, EVEN)
    return sums + _fold(row * _widen(tile, w.dtype.element_ty, PACKED)), squares


@triton.jit(do_not_specialize=["M"])
def fma(
    x, w, bias, add, norm, out, M, N, x_stride, w_stride, add_stride, out_stride, eps,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    STAGES: tl.constexpr, PACKED: tl.constexpr,
    AHEAD: tl.constexpr, EARLY: tl.constexpr, THREADS: tl.constexpr, GATED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One tile of outputs [ROWS, BLOCK_N]; three dimensions, so that x and w share a layout.

    A thread holds 8 neighbouring columns of every row, sums over them as it goes, and threads
    meet at the end.
    """
    if EARLY:
        release(PDL)
    n0 = tl.program_id(0) * BLOCK_N
    if PDL and AHEAD:
        _prefetch(w, n0, N, w_stride, AHEAD, BLOCK_N, THREADS, GATED)
    n = n0 + tl.arange(0, BLOCK_N)
    EVEN: tl.constexpr = K % BLOCK_K == 0
    FOLD: tl.constexpr = 2 if PACKED else 1
    j = tl.arange(0, BLOCK_K // FOLD)[None, None, :]
    weights = w + _row(n, N, GATED)[None, :, None] * w_stride
    if PACKED:
        weights = weights.to(tl.pointer_type(tl.int32))
    weights += j
    sums = tl.zeros([ROWS, BLOCK_N, BLOCK_K // 8], tl.float32)
    squares = tl.zeros([ROWS, 1, BLOCK_K // 8], tl.float32)
    m = tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, BLOCK_K)[None, None, :] + m[:, :, None] * 0  # as many rows as x
    x += tl.minimum(m, M - 1)[:, :, None] * x_stride
    if STAGES == 0:
        # The first weights before the wait, and each turn's while the one before it computes.
        tile = tl.load(weights, mask=j < K // FOLD, other=0, eviction_policy="evict_first")
        wait(PDL)
        for k0 in range(0, K, BLOCK_K):
            later = (k0 + BLOCK_K) // FOLD
            following = tl.load(
                weights + later, mask=later + j < K // FOLD, other=0, eviction_policy="evict_first"
            )
            sums, squares = _turn(
                sums, squares, tile, x, norm, k0 + k, w, K, NORM, ACT, PACKED, EVEN
            )
            tile = following
    else:
        wait(PDL)
        for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            tile = _load(weights + k0 // FOLD, k0 // FOLD + j < K // FOLD, EVEN)
            sums, squares = _turn(
                sums, squares, tile, x, norm, k0 + k, w, K, NORM, ACT, PACKED, EVEN
            )
    if not EARLY:
        release(PDL)
    y = tl.sum(sums, 2)
    if NORM:
        y *= tl.rsqrt(tl.sum(squares, 2) / K + eps)
    if GATED != "":
        _finish_gated(y, m, n[None, :], out, M, N, out_stride, GATED)
    else:
        _finish(y, m, n[None, :], bias, add, out, M, N, add_stride, out_stride, BIAS, ADD)


@triton.jit
def _scale(rows, eps, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """1 / rms of each row [ROWS, 1]."""
    squares = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        inside = k0 + tl.arange(0, BLOCK_K)[None, :] < K
        row = _load(rows + k0, inside, K % BLOCK_K == 0).to(tl.float32)
        squares += row * row
    return tl.rsqrt(tl.sum(squares, 1)[:, None] / K + eps)


@triton.jit
def _arrive(sums, square, part, counter, BLOCK_N: tl.constexpr, ROWS: tl.constexpr):
    """Leaves this program's part for the last one; says how many came before."""
    m = tl.arange(0, ROWS)
    tl.store(part + tl.arange(0, BLOCK_N)[:, None] * ROWS + m, sums)
    tl.store(part + BLOCK_N * ROWS + m, square)
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")


@triton.jit
def _collect(parts, counter, splits, BLOCK_N: tl.constexpr, ROWS: tl.constexpr):
    """All parts in their order, and the counter ready for the next launch."""
    m = tl.arange(0, ROWS)
    at = parts + tl.arange(0, BLOCK_N)[:, None] * ROWS + m
    sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    square = tl.zeros([ROWS], tl.float32)
    for split in range(splits):
        part = split * ((BLOCK_N + 1) * ROWS)
        sums += tl.load(at + part, cache_modifier=".cg")
        square += tl.load(parts + part + BLOCK_N * ROWS + m, cache_modifier=".cg")
    tl.store(counter, 0)
    return sums, square


@triton.jit
def _multiply(
    rows, weights, norm, first, last, scale, k,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, ACT: tl.constexpr, SCALED: tl.constexpr, STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Weights · rows transposed [BLOCK_N, ROWS] over columns first to last; squares of rows."""
    even: tl.constexpr = K % BLOCK_K == 0
    sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    squares = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for k0 in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        inside = k0 + k < K
        weight = _load(weights + k0, inside, even)
        row = _input(rows + k0, inside, K, ACT, even)
        if NORM:
            row = row.to(tl.float32)
            if SCALED:
                row = row * scale
            else:
                squares += row * row
            row = row * _load(norm + k0 + k, inside, even)
        row = row.to(weight.dtype)
        if WIDE:
            weight, row = weight.to(tl.float32), row.to(tl.float32)
        sums = tl.dot(weight, tl.trans(row), sums, input_precision="ieee")
    return sums, tl.sum(squares, 1)


@triton.jit(do_not_specialize=["M", "splits"])
def dot(
    x, w, bias, add, norm, out, parts, counters,
    M, N, x_stride, w_stride, add_stride, out_stride, eps, span, splits,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
    AHEAD: tl.constexpr, EARLY: tl.constexpr, THREADS: tl.constexpr, GATED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One tile of outputs, transposed [BLOCK_N, ROWS], over columns `span` · split and on."""
    if EARLY:
        release(PDL)
    tile, split = tl.program_id(0), tl.program_id(1)
    first = split * span
    if PDL and AHEAD:
        _prefetch(w + first, tile * BLOCK_N, N, w_stride, AHEAD, BLOCK_N, THREADS, GATED)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    m = tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)[None, :]
    weights = w + _row(n, N, GATED) * w_stride + k
    rows = x + tl.minimum(m, M - 1)[:, None] * x_stride + k
    wait(PDL)
    # Unscaled, x · norm may be beyond fp16.
    SCALED: tl.constexpr = NORM and x.dtype.element_ty == tl.float16
    scale = 1.0
    if SCALED:
        scale = _scale(rows, eps, K, ROWS, BLOCK_K)
    last = tl.minimum(first + span, K)
    y, square = _multiply(
        rows, weights, norm, first, last, scale, k,
        K, ROWS, BLOCK_N, BLOCK_K, NORM, ACT, SCALED, STAGES, WIDE,
    )  # fmt: skip
    if not EARLY:
        release(PDL)
    if SPLIT:
        parts += tile * splits * ((BLOCK_N + 1) * ROWS)
        part = parts + split * ((BLOCK_N + 1) * ROWS)
        if _arrive(y, square, part, counters + tile, BLOCK_N, ROWS) < splits - 1:
            return
        y, square = _collect(parts, counters + tile, splits, BLOCK_N, ROWS)
    if NORM and not SCALED:
        y *= tl.rsqrt(square / K + eps)[None, :]
    if GATED != "":
        _finish_gated(y, m[None, :], n, out, M, N, out_stride, GATED)
    else:
        _finish(y, m[None, :], n, bias, add, out, M, N, add_stride, out_stride, BIAS, ADD)
