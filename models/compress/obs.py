"""Optimal brain surgeon over blocks that share their columns.

A linear's weight `W [out, in]` is replaced by a block-sparse one whose products with inputs
`x` are nearest to targets `t` in squares, over the tokens of a calibration set:

    minimise  sum_tokens |t - W x|^2 + damping |W - W0|^2

With `A = sum x x^T + damping` and `G = sum t x^T + damping W0` the best weight on columns S is
`G_S A_SS^-1`, and taking columns g away from it costs `w_g (A_SS^-1)_gg^-1 w_g^T` (Hassibi and
Stork, "Second order derivatives for network pruning", 1993). The rows of one `rows x cols` block
row keep the same columns, so one inverse serves them all, and it can be carried along exactly
while columns leave: no order of columns has to be fixed beforehand as in SparseGPT
(arXiv 2301.00774), which keeps one inverse for all rows whatever columns each of them has lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsec.errors import InvalidInput

# Share of its columns that a block row loses before saliencies are computed again.
STEP_SHARE = 1 / 8
# Damping in units of the mean of the Hessian's diagonal, as SparseGPT's.
DAMPING = 0.01
# Inverses of so many bytes are carried along at once.
CHUNK_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Problem:
    """The least squares problem of one linear, float64 on one device.

    `hessian [in, in]` is A, `cross [out, in]` is G, both with their damping.
    """

    hessian: torch.Tensor
    cross: torch.Tensor

    @staticmethod
    def of(
        weight: torch.Tensor,
        hessian: torch.Tensor,
        cross: torch.Tensor | None = None,
        damping: float = DAMPING,
    ) -> Problem:
        """Damp `sum x x^T` and `sum t x^T`; without `cross` the targets are `weight`'s own.

        `damping` is in units of the mean of the Hessian's diagonal.
        """
        a = hessian.double().clone()
        w = weight.detach().to(a)
        g = w @ a if cross is None else cross.double().clone()
        # A column that never sees an input gets the damping 1, so that A has an inverse.
        amount = damping * float(a.diagonal().mean()) or 1.0
        a.diagonal().add_(amount)
        return Problem(a, g + amount * w)


def obs_scores(
    problem: Problem,
    rows: int,
    cols: int,
    *,
    kept: torch.Tensor | None = None,
    step_share: float = STEP_SHARE,
) -> torch.Tensor:
    """Return what each block's leaving costs, float64 `[out / rows, in / cols]`.

    Every block row is emptied, the cheapest `step_share` of its blocks at a time, and refitted
    after each step; a block's score is its saliency when it left, and at least that of those
    that left before it. So the highest scores of a row are its support at any sparsity, and
    rows (and layers) can be compared. Blocks outside of `kept` score -1.
    """
    blocks = block_grid(problem.cross.shape, rows, cols)
    if kept is None:
        kept = torch.ones(blocks, dtype=torch.bool, device=problem.cross.device)
    if tuple(kept.shape) != blocks:
        raise InvalidInput(f"kept blocks have shape {tuple(kept.shape)}, the weight's {blocks}")
    width = int(kept.sum(1).max()) * cols
    chunk = _rows_at_once(width)
    shared = _inverse(problem.hessian[None])[0] if bool(kept.all()) else None
    parts = []
    for start in range(0, blocks[0], chunk):
        chosen = slice(start, start + chunk)
        rows_here = slice(start * rows, (start + chunk) * rows)
        part = _Elimination.start(problem, rows_here, kept[chosen], shared)
        parts.append(part.scores(step_share))
    return torch.cat(parts).masked_fill(~kept, -1.0)


def keep_best(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Return the bool mask of the best scores that leaves `sparsity` of all blocks empty.

    Equal scores are kept in their order. Raises `InvalidInput` when blocks that are already
    gone (score -1) would have to come back.
    """
    count = scores.numel() - round(sparsity * scores.numel())
    present = int((scores >= 0).sum())
    if count > present:
        raise InvalidInput(
            f"a sparsity of {sparsity:g} keeps {count} blocks, but only {present} are left; "
            "choose a sparsity that is not below the present one"
        )
    best = torch.argsort(scores.flatten(), descending=True, stable=True)[:count]
    kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[best] = True
    return kept.view(scores.shape)


def refit(problem: Problem, kept: torch.Tensor) -> torch.Tensor:
    """Return the best weight `[out, in]`, float64, that is zero outside of the `kept` blocks."""
    out, depth = problem.cross.shape
    rows, cols = out // kept.shape[0], depth // kept.shape[1]
    cross = problem.cross.view(-1, rows, depth)
    weight = torch.zeros_like(cross)
    counts = kept.sum(1)
    order = counts.argsort()  # those that are solved together have about as many columns
    chunk = _rows_at_once(int(counts.max()) * cols)
    for chosen in order.split(chunk):
        columns, alive = _support(kept[chosen], cols)
        factor = torch.linalg.cholesky(_principal(problem.hessian, columns, alive))
        wanted = _take(cross[chosen], columns, 2) * alive[:, None]
        half = torch.linalg.solve_triangular(factor, wanted.mT, upper=False)
        solved = torch.linalg.solve_triangular(factor.mT, half, upper=True).mT
        here = torch.zeros_like(cross[chosen])
        weight[chosen] = here.scatter_(2, columns[:, None].expand(-1, rows, -1), solved)
    return weight.view(out, depth)


def block_grid(shape: tuple[int, ...], rows: int, cols: int) -> tuple[int, int]:
    """Return how many `rows x cols` blocks a weight of `shape` has down and across."""
    out, depth = shape
    if out % rows or depth % cols:
        raise InvalidInput(
            f"blocks of {rows}x{cols} (output x input) do not divide a weight of {out}x{depth}; "
            f"choose divisors of {out} and {depth}"
        )
    return out // rows, depth // cols


@dataclass(slots=True)
class _Elimination:
    """Some block rows while they lose their columns; all hold equally many.

    `names [b, g]`: which block column each group of columns is; `inverse [b, g c, g c]` of the
    Hessian there; `weight [b, rows, g c]`, refitted. A block row that starts with fewer
    columns than others is filled up with columns of weight 0, apart from all others: they
    leave first and change nothing. float32: the last refit is done anew.
    """

    names: torch.Tensor
    inverse: torch.Tensor
    weight: torch.Tensor
    total: int

    @staticmethod
    def start(
        problem: Problem, rows: slice, kept: torch.Tensor, shared: torch.Tensor | None
    ) -> _Elimination:
        """`shared` is the inverse of the whole Hessian where nothing has left yet."""
        count, total = kept.shape
        cross = problem.cross[rows]
        cols = cross.shape[1] // total
        cross = cross.reshape(count, -1, cross.shape[1])
        columns, alive = _support(kept, cols)
        if shared is not None:
            inverse = shared.expand(count, -1, -1)
        else:
            inverse = _inverse(_principal(problem.hessian, columns, alive))
        weight = (_take(cross, columns, 2) * alive[:, None]) @ inverse
        names = columns[:, ::cols] // cols
        return _Elimination(names, inverse.float(), weight.float(), total)

    def scores(self, step_share: float) -> torch.Tensor:
        """Empty all block rows; see `obs_scores`."""
        found = torch.zeros(len(self.names), self.total, device=self.weight.device)
        least = torch.zeros(len(self.names), 1, device=self.weight.device)
        while (groups := self.names.shape[1]) > 0:
            saliency = self._saliency()
            order = torch.argsort(saliency, dim=1, stable=True)
            leaving = order[:, : max(1, round(groups * step_share))]
            cost = torch.maximum(saliency.gather(1, leaving), least)
            found.scatter_(1, self.names.gather(1, leaving), cost)
            least = cost.amax(1, keepdim=True)
            self._remove(leaving, order[:, leaving.shape[1] :].sort(dim=1).values)
        return found.double()

    def _saliency(self) -> torch.Tensor:
        count, rows, width = self.weight.shape
        groups = self.names.shape[1]
        cols = width // groups
        if cols == 1:
            return self.weight.square().sum(1) / self.inverse.diagonal(dim1=1, dim2=2)
        blocks = self.inverse.view(count, groups, cols, groups, cols)
        corner = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # [b, g, c, c]
        weight = self.weight.view(count, rows, groups, cols).permute(0, 2, 3, 1)
        factor = torch.linalg.cholesky(corner)
        half = torch.linalg.solve_triangular(factor, weight, upper=False)
        return half.square().sum((2, 3))

    def _remove(self, leaving: torch.Tensor, staying: torch.Tensor) -> None:
        cols = self.weight.shape[2] // self.names.shape[1]
        gone, left = _columns(leaving, cols), _columns(staying, cols)
        across = _take(self.inverse, gone, 1)  # [b, gone, all]
        factor = torch.linalg.cholesky(_take(across, gone, 2))
        sides = torch.cat([_take(across, left, 2), _take(self.weight, gone, 2).mT], dim=2)
        half = torch.linalg.solve_triangular(factor, sides, upper=False)
        side, values = half.split([left.shape[1], self.weight.shape[1]], dim=2)
        inverse = _take(_take(self.inverse, left, 1), left, 2)
        self.inverse = inverse.baddbmm_(side.mT, side, alpha=-1)
        self.weight = _take(self.weight, left, 2).baddbmm_(values.mT, side, alpha=-1)
        self.names = self.names.gather(1, staying)


def _rows_at_once(width: int) -> int:
    """How many float32 matrices `[width, width]` make CHUNK_BYTES, at least one."""
    return max(1, CHUNK_BYTES // max(4 * width * width, 1))


def _support(kept: torch.Tensor, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the columns `[b, k]` of each row of blocks that it keeps, and bool which those are.

    k is that of the fullest row; others are filled up with columns that they do not keep.
    """
    names = torch.argsort((~kept).byte(), dim=1, stable=True)[:, : int(kept.sum(1).max())]
    return _columns(names, cols), kept.gather(1, names).repeat_interleave(cols, dim=1)


def _principal(hessian: torch.Tensor, columns: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """Return the Hessian `[b, k, k]` on the columns that are `alive`, ones for the others."""
    found = hessian[columns[:, :, None], columns[:, None, :]]
    found.masked_fill_(~(alive[:, :, None] & alive[:, None, :]), 0.0)
    found.diagonal(dim1=1, dim2=2).masked_fill_(~alive, 1.0)
    return found


def _inverse(matrices: torch.Tensor) -> torch.Tensor:
    """Return the inverses of symmetric positive matrices `[b, k, k]`."""
    return torch.cholesky_inverse(torch.linalg.cholesky(matrices))


def _columns(groups: torch.Tensor, cols: int) -> torch.Tensor:
    """Return the columns `[b, g c]` of groups `[b, g]` of `cols` columns each."""
    inner = torch.arange(cols, device=groups.device)
    return (groups[:, :, None] * cols + inner).flatten(1)


def _take(values: torch.Tensor, index: torch.Tensor, axis: int) -> torch.Tensor:
    """Return the entries `index [b, k]` of `values [b, ., .]` along axis 1 or 2."""
    if axis == 1:
        return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))
    return values.gather(2, index[:, None].expand(-1, values.shape[1], -1))
