"""Independent oracles: dense float64 linear algebra, QP and LP solvers, the paper's own formulas.

Nothing here is computed with the code under test.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import quadprog
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp, nnls
from torch import Tensor, nn

import frfx

Array = NDArray[Any]


class Apply(nn.Module):
    """A network that is one function of its input `x`, and of parameters if it is given some."""

    def __init__(self, function: Callable[..., Tensor], **tensors: Tensor) -> None:
        super().__init__()
        self.function = function
        self.names = tuple(tensors)
        for name, value in tensors.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """Return `function(x, **tensors)`."""
        return self.function(x, **{name: getattr(self, name) for name in self.names})


def invert(
    function: Callable[..., Tensor], policy: frfx.policy.Policy | str = "minimal", **tensors: Tensor
) -> frfx.Inverse:
    """Return the inverse of a network that is one function, down to its input."""
    return frfx.invert(Apply(function, **tensors).eval(), "x", policy=policy)


def reconstruct(
    function: Callable[..., Tensor],
    x: Tensor,
    target: Tensor,
    policy: frfx.policy.Policy | str = "minimal",
    **tensors: Tensor,
) -> Tensor:
    """Return the input that a network of one function should have had, by `frfx.invert`."""
    return invert(function, policy, **tensors)(x, target)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return standard normal numbers that depend on the seed and the shape only."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def integers(seed: int, *shape: int, low: int = -3, high: int = 3) -> Tensor:
    """Return small whole numbers in float64, among which ties are common."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).double()


def relative(actual: Tensor | Array, expected: Tensor | Array) -> float:
    """Return the relative difference of two arrays in the 2-norm, in float64."""
    a, e = (np.asarray(v, dtype=np.float64).ravel() for v in (actual, expected))
    scale = np.linalg.norm(e)
    return float(np.linalg.norm(a - e) / (scale if scale > 0 else 1))


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Array:
    """Return the Jacobian of a function of the whole batch as a dense float64 matrix."""
    x = x.double()
    rows = torch.autograd.functional.jacobian(function, x)
    return rows.reshape(-1, x.numel()).numpy()


def minimal_affine_preimage(
    function: Callable[[Tensor], Tensor], x: Tensor, target: Tensor, rcond: float | None = None
) -> Array:
    """Return `x + J+ (y* - f(x))` for an affine f, by NumPy's pseudo-inverse of its Jacobian."""
    x = x.double()
    residual = (target.double() - function(x)).detach().numpy().ravel()
    cutoff = 1e-15 if rcond is None else rcond  # NumPy's own
    step = np.linalg.pinv(jacobian(function, x), rcond=cutoff) @ residual
    return x.detach().numpy() + step.reshape(x.shape)


def damped_least_squares(matrix: Array, residual: Array, damping: float) -> Array:
    """Return `argmin |A d - r|^2 + damping s^2 |d|^2` as an augmented least-squares problem."""
    columns = matrix.shape[1]
    weight = np.sqrt(damping) * np.linalg.svd(matrix, compute_uv=False).max()
    augmented = np.vstack([matrix, weight * np.eye(columns)])
    right = np.concatenate([residual, np.zeros((columns, *residual.shape[1:]))])
    return np.linalg.lstsq(augmented, right, rcond=None)[0]


def circulant(kernel: Array, size: tuple[int, ...]) -> Array:
    """Return the circular convolution with the flipped kernel as a dense matrix.

    It maps features (C_in, *size), flattened, to (C_out, *size): `sum_s K~(s) d(p - s)`, indices
    modulo the size.
    """
    rows, columns, *window = kernel.shape
    flipped = kernel[(..., *[slice(None, None, -1)] * len(window))]
    count = int(np.prod(size))
    matrix = np.zeros((rows, count, columns, count))
    for offset in np.ndindex(*window):
        for to, place in enumerate(np.ndindex(*size)):
            source = tuple((p - s) % n for p, s, n in zip(place, offset, size, strict=True))
            start = np.ravel_multi_index(source, size)
            matrix[:, to, :, start] += flipped[(slice(None), slice(None), *offset)]
    return matrix.reshape(rows * count, columns * count)


def pad_left(residual: Array, size: tuple[int, ...]) -> Array:
    """Return (N, C, *valid) with zeros on the left and top up to the size."""
    margins = [(n - valid, 0) for n, valid in zip(size, residual.shape[2:], strict=True)]
    return np.pad(residual, [(0, 0), (0, 0), *margins])


def _fourier(values: Array, size: tuple[int, ...], offset: tuple[int, ...]) -> Array:
    """Transform the last axes by the plain sum of Eq. 12-14, entry k standing at k + offset."""
    dims = len(size)
    spectrum = values.astype(np.complex128)
    for axis, (n, shift) in enumerate(zip(size, offset, strict=True), start=values.ndim - dims):
        places = np.arange(values.shape[axis]) + shift
        phases = np.exp(-2j * np.pi * np.outer(np.arange(n), places) / n)
        spectrum = np.moveaxis(np.tensordot(phases, spectrum, (1, axis)), 0, axis)
    return spectrum


def paper_convolution(kernel: Array, bias: Array, feature: Array, target: Array) -> Array:
    """Return `a*` by Eq. 10-20 as they are printed, in complex128, in any number of dimensions.

    `G` is built from the forward feature by the boundary sets of Eq. 15; then every sample and
    every frequency has its own system: Eq. 19 for C_in >= C_out, the least squares of Eq. 20 for
    C_in < C_out. Indices count from 0. The stationarity condition of Eq. 18 over the complex
    numbers takes the conjugate transpose of F(K~) where Eq. 19 prints the transpose.
    """
    (n_out, n_in), window = kernel.shape[:2], kernel.shape[2:]
    size = feature.shape[2:]
    dims = len(size)
    none = (0,) * dims
    flipped = kernel[(..., *[slice(None, None, -1)] * dims)]  # Eq. 10
    kernels = _fourier(flipped, size, none)  # Eq. 12
    features = _fourier(feature, size, none)  # Eq. 13
    unbiased = target - bias.reshape(-1, *[1] * dims)
    targets = _fourier(unbiased, size, tuple(k - 1 for k in window))  # padded as in Eq. 14

    boundary = np.zeros((len(feature), n_out, n_in, *size), dtype=np.complex128)  # G of Eq. 15
    for s in np.ndindex(*window):
        counted = np.zeros(size, dtype=bool)
        counted[tuple(slice(k - 1 - o, n - o) for k, o, n in zip(window, s, size, strict=True))] = 1
        moved = _fourier(np.where(counted, 0, feature), size, none)
        for axis, (n, o) in enumerate(zip(size, s, strict=True)):
            phase = np.exp(-2j * np.pi * np.arange(n) * o / n)
            moved = moved * phase.reshape([-1 if a == axis else 1 for a in range(dims)])
        weights = flipped[(slice(None), slice(None), *s)].reshape(n_out, n_in, *none_to_one(dims))
        boundary += weights * moved[:, None]

    found = np.zeros_like(features)
    for x, frequency in itertools.product(range(len(feature)), np.ndindex(*size)):
        at = (slice(None), *frequency)
        matrix = kernels[(slice(None), *at)]
        right = targets[(x, *at)] + boundary[(x, slice(None), *at)].sum(1)
        if n_in >= n_out:  # Eq. 19
            system = np.block([[np.eye(n_in), matrix.conj().T], [matrix, np.zeros((n_out, n_out))]])
            known = np.concatenate([features[(x, *at)], right])
            found[(x, *at)] = np.linalg.solve(system, known)[:n_in]
        else:  # Eq. 20
            found[(x, *at)] = np.linalg.lstsq(matrix, right, rcond=None)[0]
    result = _fourier(found.conj(), size, none).conj() / np.prod(size)
    assert np.abs(result.imag).max() <= 1e-8 * (1 + np.abs(result.real).max())
    return result.real


def none_to_one(dims: int) -> tuple[int, ...]:
    """Return as many ones as there are dimensions, for broadcasting."""
    return (1,) * dims


def embedding_by_quadprog(logits: Array, label: int, margin: float) -> Array:
    """Return the projection of logits on `{a_y >= a_i + margin}` by a QP solver."""
    count = len(logits)
    if count == 1:
        return logits.copy()
    others = [i for i in range(count) if i != label]
    constraints = np.zeros((count, count - 1))
    constraints[label] = 1
    constraints[others, range(count - 1)] = -1
    bounds = np.full(count - 1, float(margin))
    return quadprog.solve_qp(np.eye(count), logits.astype(np.float64), constraints, bounds)[0]


def smallest_l1_distance(logits: Array, label: int, margin: float) -> float:
    """Return the L1 distance of logits from `{a_y >= a_i + margin}` by an LP solver.

    The variables are the shifts up and down, both at least 0.
    """
    count = len(logits)
    rows, bounds = [], []
    for other in range(count):
        if other != label:
            shift = np.zeros(count)
            shift[other], shift[label] = 1, -1
            rows.append(np.concatenate([shift, -shift]))
            bounds.append(logits[label] - logits[other] - margin)
    if not rows:
        return 0.0
    solution = linprog(np.ones(2 * count), A_ub=np.array(rows), b_ub=bounds, method="highs")
    assert solution.status == 0
    return float(solution.fun)


def window_distance(window: Array, value: float) -> float:
    """Return how far a window is from the nearest one whose maximum is the value.

    Brute force: any entry may be the maximum, the others are clipped to it.
    """
    clipped = np.maximum(window - value, 0) ** 2
    raised = (window - value) ** 2
    return float(np.sqrt((clipped.sum() - clipped + raised).min()))


def windows_of(pool: Callable[[Tensor], Tensor], size: tuple[int, ...]) -> Array:
    """Return which entries of an image a max pooling op reads for every value, by trying each.

    Returns:
        Booleans (values, entries).
    """
    count = int(np.prod(size))
    images = torch.eye(count, dtype=torch.float64).view(count, 1, *size)
    return pool(images).flatten(1).T.numpy() > 0


def pooled(windows: Array, image: Array) -> Array:
    """Return the largest entry of every window of a flat image."""
    return np.where(windows, image, -np.inf).max(1)


def bounds_of(windows: Array, target: Array) -> Array:
    """Return the least target among the windows that read each entry; infinite if none does."""
    return np.where(windows, target[:, None], np.inf).min(0, initial=np.inf)


def nearest_max_unpool(windows: Array, image: Array, target: Array) -> float:
    """Return the squared distance of a flat image from those whose windows have these maxima.

    An integer program chooses the entries that are raised; infinite if there is no such image.
    """
    bound = bounds_of(windows, target)
    served = windows & (bound[None] == target[:, None])
    if not served.any(1).all():
        return float("inf")
    lowered = np.maximum(image - bound, 0) ** 2
    raised = np.maximum(np.where(served.any(0), bound, image) - image, 0) ** 2
    chosen = milp(
        raised,
        constraints=LinearConstraint(served.astype(float), 1, np.inf),
        integrality=np.ones_like(raised),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    assert chosen.status == 0
    return float(lowered.sum() + raised[chosen.x > 0.5].sum())


def least_pooling_residual(windows: Array, target: Array) -> float:
    """Return the least squared distance of the maxima of any image from a target.

    Brute force: every window names the entry that is its maximum, so the windows that read that
    entry have at least its value. Given the names, the values are the projection on a cone.
    """
    readers = [frozenset(np.flatnonzero(column)) for column in windows.T]
    options = []
    for window in windows:
        mine = {readers[entry] for entry in np.flatnonzero(window)}
        options.append([r for r in mine if not any(other < r for other in mine)])
    least = np.inf
    for named in itertools.product(*options):
        pairs = sorted({(j, k) for j, r in enumerate(named) for k in r if k != j})
        if not pairs:
            return 0.0
        cone = np.zeros((len(target), len(pairs)))
        for column, (low, high) in enumerate(pairs):
            cone[low, column], cone[high, column] = -1, 1
        least = min(least, ((cone @ nnls(cone, -target)[0]) ** 2).sum())
    return float(least)


def nearest_crossing(
    grid: Array, values: Array, y: float, x: float, jump: float | None = None
) -> float:
    """Return a bound on the distance from x to the nearest preimage of y, by looking at a grid.

    Every interval at whose ends `values - y` changes its sign holds a preimage, unless the function
    jumps there; so does a grid point where it is zero. Infinite if the grid shows none.
    """
    side = values - y
    hits = np.abs(grid[side == 0] - x)
    left, right = grid[:-1], grid[1:]
    crosses = side[:-1] * side[1:] < 0
    if jump is not None:
        crosses &= ~((left <= jump) & (jump <= right))
    ends = np.maximum(np.abs(left - x), np.abs(right - x))[crosses]
    return float(np.concatenate([hits, ends, [np.inf]]).min())
