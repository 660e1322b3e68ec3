"""The compiled passes of the CPU swap kernel (numba), and the vector loops they rest on.

LLVM does not find full vector code for a running minimum over the rows of a tile, nor for an
arg-min. These loops are spelled out as operations on vectors of 64 numbers, which it splits
into whatever registers the processor has.

All in one file: numba's cache notices changes only in the file of the function it compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

Array = npt.NDArray[Any]

LANES = 64
"""Length of a vector. Rows are padded to whole vectors, with weight 0."""

TILE = 128
"""Rows of the Gram matrix in a tile; with 64 float32 columns it fits in the first-level cache."""

BIG = 1e30
_KNOTS = 6
_MARGIN = 32
"""Multiple of a row's noise, itself d roundings of its size, that covers those of the bound."""

_FAST = {"nnan", "ninf", "nsz", "contract", "reassoc"}
_INDEX, _PLACE = ir.IntType(64), ir.IntType(32)


class Grams(NamedTuple):
    """The Gram matrix, and what is derived from it.

    ``exact`` is float64 ``[d, d]``; ``scan``, in the dtype that pairs are scanned in, holds the
    vectors of its padded rows, ``[d_padded / LANES, d, LANES]`` with ``scan[v, i]`` vector v of
    row i. ``diagonal``, ``root`` of it and ``rho``, the largest absolute correlation with
    another input, are ``[d]``.
    """

    exact: Array
    scan: Array
    diagonal: Array
    root: Array
    rho: Array


class Block(NamedTuple):
    """Some rows: ``weight``, ``linear`` float64 and ``keep`` bool ``[rows, d]``.

    Further per row: ``noise`` (see `ScaledRows`), and what the passes report: how many they
    were and how many pairs they evaluated (both counted on), the loss, and the best change left.
    """

    weight: Array
    linear: Array
    keep: Array
    noise: Array
    passes: Array
    pairs: Array
    loss: Array
    best_left: Array


class Scratch(NamedTuple):
    """Working arrays of a block; all but ``c``, ``scalar`` and ``listed`` in the dtype of the scan.

    ``rows`` is that of the block or more. Padding has weight 0 and large costs, always.

    ``c`` float64 ``[rows, d]``. ``w`` and ``cost`` (of flipping an entry) ``[rows, d_padded]``.
    As vectors, ``[d_padded / LANES, rows, LANES]``: ``twice`` the weights, and ``best``, for each
    index the least of ``cost_s - 2 w_s w_j G_sj`` over its partners s.

    ``scalar`` int32 ``[tiles, rows, TILE]``: the indices s to look at in each tile, ``listed`` of
    them; ``terms``, ``[tiles, rows, 2 * TILE]``: their ``w_s`` and ``cost_s`` in turn. All that a
    sweep reads lies in the order in which it is read.

    Of the row at work, ``[d_padded]``: ``inner`` and ``outer``, the costs of the scalar and the
    vector side, `BIG` elsewhere; ``alpha``; ``lower``, a bound on the pairs of an index;
    ``value`` of the best pair of an index.
    """

    c: Array
    w: Array
    cost: Array
    twice: Array
    best: Array
    scalar: Array
    terms: Array
    listed: Array
    inner: Array
    outer: Array
    alpha: Array
    lower: Array
    value: Array


def _compiled(function: Callable[..., Any]) -> Any:
    return njit(nogil=True, cache=True, fastmath=_FAST)(function)


class _Vectors:
    """Emits operations on vectors of an array's dtype."""

    def __init__(self, context: Any, builder: Any, kind: Any) -> None:
        self._context, self._builder = context, builder
        self._bytes = kind.dtype.bitwidth // 8
        self.type = ir.VectorType(context.get_value_type(kind.dtype), LANES)
        self.places = ir.VectorType(_PLACE, LANES)

    def address(self, kind: Any, array: Any, *indices: Any) -> Any:
        """Of ``array[indices]``, whatever its strides."""
        found = self._context.make_array(kind)(self._context, self._builder, array)
        at = self._builder.ptrtoint(found.data, _INDEX)
        for k, index in enumerate(indices):
            stride = self._builder.extract_value(found.strides, k)
            at = self._builder.add(at, self._builder.mul(stride, index))
        return self._builder.inttoptr(at, found.data.type)

    def load(self, address: Any) -> Any:
        loaded = self._builder.load(self._builder.bitcast(address, self.type.as_pointer()))
        loaded.align = self._bytes
        return loaded

    def store(self, vector: Any, address: Any) -> None:
        target = self._builder.bitcast(address, self.type.as_pointer())
        self._builder.store(vector, target).align = self._bytes

    def splat(self, number: Any) -> Any:
        none = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
        first = self._builder.insert_element(none, number, _PLACE(0))
        return self._builder.shuffle_vector(first, none, ir.Constant(self.places, [0] * LANES))

    def minus(self, one: Any, factor: Any, other: Any) -> Any:
        """``one - factor * other``, fused where possible."""
        product = self._builder.fmul(factor, other, flags=("contract",))
        return self._builder.fsub(one, product, flags=("contract",))

    def less(self, one: Any, other: Any) -> Any:
        return self._builder.fcmp_ordered("<", one, other, flags=("nnan",))

    def smaller(self, one: Any, other: Any) -> Any:
        return self._builder.select(self.less(one, other), one, other)

    def reduced(self, operation: str, vector: Any) -> Any:
        """One number from a vector, by ``llvm.vector.reduce.operation``."""
        element = vector.type.element
        suffix = {"float": "f32", "double": "f64", "i32": "i32"}[str(element)]
        name = f"llvm.vector.reduce.{operation}.v{LANES}{suffix}"
        module = self._builder.module
        function = module.globals.get(name)
        if function is None:
            function = ir.Function(module, ir.FunctionType(element, [vector.type]), name)
        flags = () if suffix == "i32" else ("nnan",)
        return self._builder.call(function, [vector], fastmath=flags)

    def loop(
        self, begin: Any, end: Any, step: int, state: list[Any], body: Callable[..., list[Any]]
    ) -> list[Any]:
        """``state = body(k, *state)`` for k from ``begin`` to ``end``, at least once."""
        builder, entry = self._builder, self._builder.block
        block = builder.append_basic_block("loop")
        builder.branch(block)
        builder.position_at_end(block)
        k = builder.phi(_INDEX)
        carried = [builder.phi(value.type) for value in state]
        after = body(k, *carried)
        following = builder.add(k, _INDEX(step))
        for phi, first, next_ in zip(
            [k, *carried], [begin, *state], [following, *after], strict=True
        ):
            phi.add_incoming(first, entry)
            phi.add_incoming(next_, block)
        done = builder.append_basic_block("done")
        builder.cbranch(builder.icmp_signed("<", following, end), block, done)
        builder.position_at_end(done)
        return after

    def first_least(self, length: Any, value: Callable[[Any], Any]) -> Any:
        """Where the vectors ``value(0), value(LANES), ...`` are least, the first if several are."""
        builder = self._builder

        def body(at: Any, least: Any, place: Any) -> list[Any]:
            new = value(at)
            less = self.less(new, least)
            here = self.splat(builder.trunc(at, _PLACE))
            return [builder.select(less, new, least), builder.select(less, here, place)]

        start = [
            ir.Constant(self.type, [4 * BIG] * LANES),
            ir.Constant(self.places, [0] * LANES),
        ]
        least, place = self.loop(_INDEX(0), length, LANES, start, body)
        is_least = builder.fcmp_ordered("==", least, self.splat(self.reduced("fmin", least)))
        place = builder.add(place, ir.Constant(self.places, list(range(LANES))))
        other = ir.Constant(self.places, [2**31 - 1] * LANES)
        found = self.reduced("umin", builder.select(is_least, place, other))
        return builder.zext(found, _INDEX)


@intrinsic  # type: ignore[untyped-decorator]
def _sweep(
    _typing: Any, scan: Any, twice: Any, best: Any, scalar: Any, terms: Any, count: Any,
    vector: Any, tile: Any, row: Any,
) -> Any:  # fmt: skip
    """``best_j = min(best_j, min_s cost_s - w_s (2 w_j G_sj))`` for one vector of a row.

    Over the ``count > 0`` indices s that a tile lists for the row.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        vectors = _Vectors(context, builder, kinds[0])
        scan, twice, best, scalar, terms, count, vector, tile, row = arguments
        target = vectors.address(kinds[2], best, vector, row)
        weight = vectors.load(vectors.address(kinds[1], twice, vector, row))
        rows = vectors.address(kinds[0], scan, vector)
        indices = vectors.address(kinds[3], scalar, tile, row)
        pair = vectors.address(kinds[4], terms, tile, row)

        def body(k: Any, least: Any) -> list[Any]:
            s = builder.zext(builder.load(builder.gep(indices, [k])), _INDEX)
            gram = vectors.load(builder.gep(rows, [builder.mul(s, _INDEX(LANES))]))
            at = builder.add(k, k)
            w_s = vectors.splat(builder.load(builder.gep(pair, [at])))
            cost_s = vectors.splat(builder.load(builder.gep(pair, [builder.add(at, _INDEX(1))])))
            value = vectors.minus(cost_s, w_s, builder.fmul(weight, gram))
            return [vectors.smaller(value, least)]

        least = vectors.loop(_INDEX(0), count, 1, [vectors.load(target)], body)[0]
        vectors.store(least, target)
        return context.get_dummy_value()

    return types.void(scan, twice, best, scalar, terms, count, vector, tile, row), generate


@intrinsic  # type: ignore[untyped-decorator]
def _best_partner(
    _typing: Any, inner: Any, w: Any, scan: Any, row: Any, j: Any
) -> Any:  # fmt: skip
    """The i of least ``inner_i - 2 w_i w_j G_ij``, the first if several are."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        vectors = _Vectors(context, builder, kinds[0])
        inner, w, scan, row, j = arguments
        w_j = builder.load(vectors.address(kinds[1], w, row, j))
        twice = vectors.splat(builder.fadd(w_j, w_j))

        def value(at: Any) -> Any:
            vector = builder.udiv(at, _INDEX(LANES))
            gram = vectors.load(vectors.address(kinds[2], scan, vector, j, _INDEX(0)))
            weight = vectors.load(vectors.address(kinds[1], w, row, at))
            cost = vectors.load(vectors.address(kinds[0], inner, at))
            return vectors.minus(cost, weight, builder.fmul(twice, gram))

        array = context.make_array(kinds[0])(context, builder, inner)
        return vectors.first_least(builder.extract_value(array.shape, 0), value)

    return types.int64(inner, w, scan, row, j), generate


@intrinsic  # type: ignore[untyped-decorator]
def _arg_min(_typing: Any, values: Any) -> Any:
    """Where ``values`` are least, the first if several are."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (kind,), (values,) = signature.args, arguments
        vectors = _Vectors(context, builder, kind)
        array = context.make_array(kind)(context, builder, values)
        length = builder.extract_value(array.shape, 0)
        return vectors.first_least(
            length, lambda at: vectors.load(vectors.address(kind, values, at))
        )

    return types.int64(values), generate


@intrinsic  # type: ignore[untyped-decorator]
def _least(_typing: Any, values: Any, slopes: Any, t: Any) -> Any:
    """``min_j values_j - t * slopes_j``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        vectors = _Vectors(context, builder, kinds[0])
        values, slopes, t = arguments
        t = vectors.splat(t)

        def body(at: Any, least: Any) -> list[Any]:
            value = vectors.load(vectors.address(kinds[0], values, at))
            slope = vectors.load(vectors.address(kinds[1], slopes, at))
            return [vectors.smaller(vectors.minus(value, t, slope), least)]

        array = context.make_array(kinds[0])(context, builder, values)
        length = builder.extract_value(array.shape, 0)
        start = ir.Constant(vectors.type, [4 * BIG] * LANES)
        least = vectors.loop(_INDEX(0), length, LANES, [start], body)[0]
        return vectors.reduced("fmin", least)

    return values.dtype(values, slopes, t), generate


@_compiled
def _correlate(block: Block, gram: Array, c: Array) -> None:
    """``c = G q`` of every row; a few rows of G at a time, used by all."""
    rows, d = block.keep.shape
    c[:rows] = 0.0
    step = 16
    some = np.zeros(step + 3, np.int64)
    for low in range(0, d, step):
        for r in range(rows):
            n = 0
            for j in range(low, min(low + step, d)):
                some[n] = j
                n += not block.keep[r, j]
            some[n : n + 3] = low
            weight = block.weight[r]
            for k in range(0, n, 4):
                w0 = weight[some[k]]
                w1 = weight[some[k + 1]] if k + 1 < n else 0.0
                w2 = weight[some[k + 2]] if k + 2 < n else 0.0
                w3 = weight[some[k + 3]] if k + 3 < n else 0.0
                _add_four(
                    c[r], w0, gram[some[k]], w1, gram[some[k + 1]],
                    w2, gram[some[k + 2]], w3, gram[some[k + 3]],
                )  # fmt: skip


@_compiled
def _add_four(
    c: Array, w0: float, g0: Array, w1: float, g1: Array, w2: float, g2: Array,
    w3: float, g3: Array,
) -> None:  # fmt: skip
    for i in range(len(g0)):
        c[i] += w0 * g0[i] + w1 * g1[i] + (w2 * g2[i] + w3 * g3[i])


@_compiled
def _begin(block: Block, scratch: Scratch, r: int) -> bool:
    """A row's loss; whether the kept are its smaller side."""
    value, kept = 0.0, 0
    for j in range(block.keep.shape[1]):
        w = block.weight[r, j]
        scratch.w[r, j] = w
        scratch.twice[j // LANES, r, j % LANES] = 2 * w
        if block.keep[r, j]:
            kept += 1
        else:
            value += w * scratch.c[r, j] + block.linear[r, j]
    block.loss[r] = value
    return bool(2 * kept <= block.keep.shape[1])


@_compiled
def _flip_costs(
    w: Array, c: Array, linear: Array, diagonal: Array, keep: Array, cost: Array
) -> None:
    for j in range(len(keep)):
        gradient = 2 * w[j] * c[j] + linear[j]
        cost[j] = (gradient if keep[j] else -gradient) + w[j] * w[j] * diagonal[j]


@_compiled
def _only(values: Array, keep: Array, side: bool, out: Array) -> None:
    """``values`` where ``keep`` is ``side``, elsewhere `BIG`."""
    big = values.dtype.type(BIG)
    for j in range(len(keep)):
        out[j] = values[j] if keep[j] == side else big


@_compiled
def _choose(block: Block, grams: Grams, scratch: Scratch, r: int, side: bool) -> int:
    """Choose the scalar indices that may have an improving partner; how many they are.

    All pairs of s are at least ``cost_s + f(t_s)`` with ``t_s = 2 rho_s alpha_s`` and
    ``f(t) = min_j cost_j - t alpha_j`` over the vector side. f is concave, so its chords between
    a few knots are below it, and their minimum is too.
    """
    keep, cost = block.keep[r], scratch.cost[r]
    alpha, lower = scratch.alpha, scratch.lower
    kind = cost.dtype.type
    top = kind(0)
    for j in range(len(keep)):
        alpha[j] = abs(scratch.w[r, j]) * kind(grams.root[j])
    for j in range(len(keep)):
        lower[j] = 2 * alpha[j] * kind(grams.rho[j])
    for j in range(len(keep)):
        top = max(top, lower[j])
    slope, level = np.empty(_KNOTS, cost.dtype), np.empty(_KNOTS, cost.dtype)
    before, f_before = kind(0), _least(scratch.outer, alpha, kind(0))
    for k in range(_KNOTS):
        t = top * kind(((k + 1) / _KNOTS) ** 2)
        f = _least(scratch.outer, alpha, t)
        slope[k] = (f - f_before) / (t - before) if t > before else kind(0)
        level[k] = f_before - slope[k] * before
        before, f_before = t, f
    _chords(cost, keep, side, slope, level, lower)
    margin = kind(_MARGIN * block.noise[r])
    total = 0
    for t in range(len(scratch.listed)):
        scalar, terms = scratch.scalar[t, r], scratch.terms[t, r]
        n = 0
        for j in range(t * TILE, min((t + 1) * TILE, len(keep))):
            scalar[n] = j
            n += lower[j] < margin
        for k in range(n):
            terms[2 * k] = scratch.w[r, scalar[k]]
            terms[2 * k + 1] = cost[scalar[k]]
        scratch.listed[t, r] = n
        total += n
    return total


@_compiled
def _chords(cost: Array, keep: Array, side: bool, slope: Array, level: Array, lower: Array) -> None:
    """``lower_s = cost_s + min_k level_k + slope_k t_s`` from ``lower = t``; `BIG` off the side."""
    big = cost.dtype.type(BIG)
    a0, a1, a2, a3, a4, a5 = level[0], level[1], level[2], level[3], level[4], level[5]
    b0, b1, b2, b3, b4, b5 = slope[0], slope[1], slope[2], slope[3], slope[4], slope[5]
    for j in range(len(keep)):
        t = lower[j]
        f = min(min(a0 + b0 * t, a1 + b1 * t), min(a2 + b2 * t, a3 + b3 * t))
        f = min(f, min(a4 + b4 * t, a5 + b5 * t))
        lower[j] = cost[j] + f if keep[j] == side else big


@_compiled
def scan_tiles(
    scan: Array, twice: Array, best: Array, scalar: Array, terms: Array, count: Array,
    active: Array,
) -> None:  # fmt: skip
    """Best partners for all indices of the active rows; each tile of G is used by all of them."""
    for t in range(len(count)):
        for vector in range(len(scan)):
            for a in range(len(active)):
                r = active[a]
                if count[t, r] > 0:
                    _sweep(scan, twice, best, scalar, terms, count[t, r], vector, t, r)


@_compiled
def _scan_groups(
    keep: Array, w: Array, cost: Array, scan: Array, side: bool, width: int, value: Array
) -> int:
    """Best partners inside groups of ``width`` inputs; how many pairs were evaluated."""
    value[:] = value.dtype.type(BIG)
    pairs = 0
    for low in range(0, len(keep), width):
        for s in range(low, low + width):
            if keep[s] == side:
                factor = w.dtype.type(2) * w[s]
                for j in range(low, low + width):
                    if keep[j] != side:
                        gram = scan[j // LANES, s, j % LANES]
                        value[j] = min(value[j], cost[s] - factor * (w[j] * gram))
                        pairs += 1
    return pairs


@_compiled
def _partner_in_group(grams: Grams, scratch: Scratch, r: int, j: int, width: int) -> int:
    """Best partner of j in its group, where ``inner`` is not `BIG`."""
    inner, w = scratch.inner, scratch.w[r]
    factor = w.dtype.type(2) * w[j]
    low = j - j % width
    partner, least = low, inner.dtype.type(4 * BIG)
    for s in range(low, low + width):
        value = inner[s] - factor * (w[s] * grams.scan[s // LANES, j, s % LANES])
        if value < least:
            partner, least = s, value
    return partner


@_compiled
def _move(c: Array, w_u: float, g_u: Array, w_p: float, g_p: Array) -> None:
    for i in range(len(g_u)):
        c[i] += w_u * g_u[i] - w_p * g_p[i]


@_compiled
def _add(value: Array, cost: Array) -> None:
    for j in range(len(value)):
        value[j] += cost[j]


@_compiled
def _apply(
    block: Block, grams: Grams, scratch: Scratch, r: int, side: bool, width: int,
    candidates: int, threshold: float,
) -> int:  # fmt: skip
    """Apply the best of the pairs in ``value``, each against the current c; how many were.

    The order of the vector indices is that of the scan; partners are those of the current costs.
    If none is, the row's best change left is set.
    """
    w, keep, c, linear = block.weight[r], block.keep[r], scratch.c[r], block.linear[r]
    value, inner, gram = scratch.value, scratch.inner, grams.exact
    big = value.dtype.type(BIG)
    _only(scratch.cost[r], keep, side, inner)
    _only(scratch.cost[r], keep, not side, scratch.outer)
    _add(value, scratch.outer)
    applied, least = 0, 0.0
    for k in range(candidates):
        j = _arg_min(value)
        if k == 0:
            least = min(least, value[j])
        if not value[j] < threshold:
            break
        value[j] = big
        if width == len(keep):
            s = _best_partner(inner, scratch.w, grams.scan, r, j)
        else:
            s = _partner_in_group(grams, scratch, r, j, width)
        if inner[s] == big:
            continue
        u, p = (s, j) if side else (j, s)
        delta = (
            2 * w[u] * c[u] + w[u] * w[u] * gram[u, u] + linear[u]
            - 2 * w[p] * c[p] + w[p] * w[p] * gram[p, p] - linear[p]
            - 2 * w[u] * w[p] * gram[u, p]
        )  # fmt: skip
        if delta < threshold:
            keep[u], keep[p] = False, True
            _move(c, w[u], gram[u], w[p], gram[p])
            _flip_costs(w, c, linear, grams.diagonal, keep, scratch.cost[r])
            _only(scratch.cost[r], keep, side, inner)
            block.loss[r] += delta
            applied += 1
    if applied == 0:
        block.best_left[r] = least
    return applied


@_compiled
def improve(
    block: Block, grams: Grams, scratch: Scratch, width: int, candidates: int,
    max_passes: int, tolerance: float,
) -> int:  # fmt: skip
    """Passes over the rows of a block until none improves; the number of swaps."""
    rows, d = block.keep.shape
    big = scratch.best.dtype.type(BIG)
    whole = width == d
    active, n_active = np.empty(rows, np.int64), 0
    side = np.empty(rows, np.bool_)
    outer_size = np.empty(rows, np.int64)
    _correlate(block, grams.exact, scratch.c)
    for r in range(rows):
        side[r] = _begin(block, scratch, r)
        outer_size[r] = np.sum(block.keep[r] != side[r])
        block.best_left[r] = np.nan
        if block.passes[r] < max_passes:
            active[n_active] = r
            n_active += 1
    swaps = 0
    while n_active > 0:
        for a in range(n_active):
            r = active[a]
            keep, cost = block.keep[r], scratch.cost[r]
            _flip_costs(block.weight[r], scratch.c[r], block.linear[r], grams.diagonal, keep, cost)
            block.passes[r] += 1
            if whole:
                scratch.best[:, r] = big
                _only(cost, keep, not side[r], scratch.outer)
                n = _choose(block, grams, scratch, r, side[r])
                block.pairs[r] += n * outer_size[r]
        if whole:
            scan_tiles(
                grams.scan, scratch.twice, scratch.best, scratch.scalar, scratch.terms,
                scratch.listed, active[:n_active],
            )  # fmt: skip
        left = 0
        for a in range(n_active):
            r = active[a]
            if whole:
                for vector in range(len(scratch.best)):
                    low = vector * LANES
                    scratch.value[low : low + LANES] = scratch.best[vector, r]
            else:
                block.pairs[r] += _scan_groups(
                    block.keep[r], scratch.w[r], scratch.cost[r], grams.scan, side[r], width,
                    scratch.value,
                )  # fmt: skip
            threshold = -(tolerance * abs(block.loss[r]) + block.noise[r])
            applied = _apply(block, grams, scratch, r, side[r], width, candidates, threshold)
            swaps += applied
            if applied > 0 and block.passes[r] < max_passes:
                active[left] = r
                left += 1
        n_active = left
    return swaps
