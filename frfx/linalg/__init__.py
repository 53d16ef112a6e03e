"""Linear operators and the solvers that factor them once and apply the factor to every batch."""

from frfx.linalg.auto import Solver
from frfx.linalg.dense import Dense
from frfx.linalg.iterative import Iterative
from frfx.linalg.operators import Convolution, Diagonal, Matrix, Transposed
from frfx.linalg.pseudo_inverse import Factor
from frfx.linalg.separable import Separable
from frfx.linalg.spectral import Spectral

__all__ = [
    "Convolution",
    "Dense",
    "Diagonal",
    "Factor",
    "Iterative",
    "Matrix",
    "Separable",
    "Solver",
    "Spectral",
    "Transposed",
]
