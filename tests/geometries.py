"""Convolutions of any geometry, drawn by hypothesis, and what they compute, by plain sums."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from numpy.typing import NDArray

from frfx.linalg import Convolution
from tests.oracles import normal

seeds = st.integers(0, 2**31)

NUMPY_MODES: dict[str, Any] = {
    "zeros": "constant",
    "circular": "wrap",
    "reflect": "reflect",
    "replicate": "edge",
}


@st.composite
def convolutions(draw, *, modes=tuple(NUMPY_MODES), padded=None, symmetric=False, dominant=0.0):
    """Draw a small convolution in 1 to 3 dimensions.

    Args:
        modes: The padding modes to draw from.
        padded: Whether something is added, or nothing; None for either.
        symmetric: Add as many entries before as after.
        dominant: What one tap of every kernel has beside noise: keeps it well conditioned.
    """
    dims = draw(st.sampled_from([1, 1, 2, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    most = 2 if dims == 3 or groups > 1 else 3
    n_in, n_out = draw(st.integers(1, most)), draw(st.integers(1, most))
    window = tuple(draw(st.integers(1, 3 if dims < 3 else 2)) for _ in range(dims))
    stride = tuple(draw(st.sampled_from([1, 1, 2, 3])) for _ in range(dims))
    dilation = tuple(draw(st.sampled_from([1, 1, 2])) for _ in range(dims))
    size = tuple(draw(st.integers(3, {1: 9, 2: 6, 3: 4}[dims])) for _ in range(dims))
    padding = ((0, 0),) * dims
    if draw(st.booleans()) if padded is None else padded:
        before = [draw(st.integers(0, 2)) for _ in range(dims)]
        after = before if symmetric else [draw(st.integers(0, 2)) for _ in range(dims)]
        padding = tuple(zip(before, after, strict=True))
        assume(not padded or any(map(any, padding)))
    kernel = normal(draw(seeds), groups * n_out, n_in, *window)
    if dominant:
        kernel *= 0.3
        middle = tuple(k // 2 for k in window)
        for out in range(groups * n_out):
            kernel[(out, out % n_in, *middle)] += dominant
    mode = draw(st.sampled_from(modes))
    operator = Convolution(kernel, size, stride, padding, dilation, groups, mode)
    assume(all(n >= 1 for n in operator.out_size))
    return operator


def plain_sum(operator: Convolution, x: NDArray[Any]) -> NDArray[Any]:
    """Return the convolution by NumPy's padding and the sum of Eq. 11 over every window."""
    padded = np.pad(x, [(0, 0), (0, 0), *operator.padding], NUMPY_MODES[operator.padding_mode])
    kernel = operator.kernel.numpy()
    taps = kernel.shape[2:]
    reach = [d * (k - 1) for d, k in zip(operator.dilation, taps, strict=True)]
    size = [
        (n - r - 1) // s + 1
        for n, r, s in zip(padded.shape[2:], reach, operator.stride, strict=True)
    ]
    by_group = kernel.reshape(operator.groups, -1, *kernel.shape[1:])
    result = np.zeros((len(x), *by_group.shape[:2], *size))
    for tap in np.ndindex(*taps):
        starts = [d * j for d, j in zip(operator.dilation, tap, strict=True)]
        places = tuple(
            slice(start, start + s * (n - 1) + 1, s)
            for start, s, n in zip(starts, operator.stride, size, strict=True)
        )
        read = padded[(..., *places)].reshape(len(x), operator.groups, -1, *size)
        weights = by_group[(..., *tap)]
        result += np.einsum("goc,ngc...->ngo...", weights, read)
    return result.reshape(len(x), len(kernel), *size)


def matrix_of(operator: Any) -> NDArray[Any]:
    """Return the matrix of a convolution by plain sums, or of its transpose."""
    if not isinstance(operator, Convolution):
        return matrix_of(operator.of).T
    count = int(np.prod(operator.in_shape))
    images = np.eye(count).reshape(count, *operator.in_shape)
    return plain_sum(operator, images).reshape(count, -1).T


def model_matrix(operator: Convolution, grid: tuple[int, ...]) -> NDArray[Any]:
    """Return the circular model on a grid of blocks of the stride, as a dense matrix.

    It maps (C_in, *(grid * stride)) to (C_out, *grid): the convolution, indices modulo the size.
    """
    image = tuple(g * s for g, s in zip(grid, operator.stride, strict=True))
    kernel = operator.kernel.numpy()
    rows, columns = operator.out_channels // operator.groups, kernel.shape[1]
    matrix = np.zeros((len(kernel), *grid, operator.in_channels, *image))
    before = [first for first, _ in operator.padding]
    axes = list(zip(operator.stride, operator.dilation, before, image, strict=True))
    for out, channel in np.ndindex(len(kernel), columns):
        source = out // rows * columns + channel
        for tap, place in itertools.product(np.ndindex(*kernel.shape[2:]), np.ndindex(*grid)):
            read = [
                (p * s + d * j - b) % n for p, j, (s, d, b, n) in zip(place, tap, axes, strict=True)
            ]
            matrix[(out, *place, source, *read)] += kernel[(out, channel, *tap)]
    return matrix.reshape(len(kernel) * int(np.prod(grid)), -1)
