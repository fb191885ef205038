"""Muon's orthogonalisation: replace a matrix by the nearest one whose singular values are all alike.

Muon (Jordan et al. 2024) does so with a few steps of an odd polynomial; the coefficients here are those of the Polar
Express (Amsel et al. 2025, arXiv 2505.16932), each the best one for the interval that its predecessor left.

Two ways to the same result. `iterate` applies each polynomial to the matrix X itself. `gram_polar` sees only the
Gram matrix G = X X^T: p(X) = (a + b G + c G^2) X, so all polynomials together are one factor Q(G), and the matrix need
be multiplied only once, when Q is known (Gram Newton-Schulz, Zhang, Amsel, Chen & Dao 2026, in the repository
Dao-AILab/gram-newton-schulz). `orthogonalize` takes what is less work: the second for matrices at least twice as long
as wide. On an [8192, 2048] matrix that is 1.8 times less work, 2.6 times with the symmetry
of all that is multiplied, and X may stay in pieces and in bfloat16. Squaring costs half of the digits, so Q is computed
in float32; half precision would need restarts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from braniac.model.tiers import is_input_major

# Odd polynomials a x + b x^3 + c x^5.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
SAFETY = 1.01  # rounding may lift a singular value above the interval; the paper shrinks the argument by this much
_TINY = 1e-7
_LARGE = 256  # from here on a product of symmetric matrices is computed by blocks


def orthogonalize(matrices: Tensor) -> Tensor:
    """Nearest (semi-)orthogonal matrices to a batch [n, rows, cols]: singular values end near 1, zeros stay zero."""
    rows, cols = matrices.shape[-2:]
    wide: Tensor = matrices.mT if rows > cols else matrices  # the smaller Gram matrix
    long = max(rows, cols) >= 2 * min(rows, cols)
    turned: Tensor = gram_polar(wide @ wide.mT) @ wide if long else iterate(wide)
    return turned.mT if rows > cols else turned


def iterate(matrices: Tensor) -> Tensor:
    """What `orthogonalize` gives, to all digits, of matrices that are not longer than wide."""
    x: Tensor = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) * SAFETY + _TINY)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b / SAFETY**3, alpha=c / SAFETY**5)
        x = torch.baddbmm(x, gram, x, beta=a / SAFETY)
    return x


def gram_polar(gram_BNN: Tensor) -> Tensor:
    """Factors Q [B, N, N] such that Q X is what `iterate` makes of X, from X X^T, float32 [B, N, N].

    Destroys its argument. For X^T X, the result is X Q. It takes room for two more such matrices and a quarter of one.
    """
    squared_norm_B11 = gram_BNN.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    scale_B11 = 1 / (squared_norm_B11.clamp_min(0).sqrt() * SAFETY + _TINY)
    r, p, q = gram_BNN.mul_(scale_B11.square()), torch.empty_like(gram_BNN), torch.empty_like(gram_BNN)
    for step, (a, b, c) in enumerate(POLAR_EXPRESS):
        # X becomes P X, hence its Gram matrix P R P. All are polynomials of one matrix: symmetric, in any order.
        p.copy_(r)
        _multiply_(r, p)
        p.mul_(c / SAFETY**5).add_(r, alpha=b / SAFETY**3)
        p.diagonal(dim1=-2, dim2=-1).add_(a / SAFETY)
        if step == 0:
            q.copy_(p)
        else:
            _multiply_(p, q)
        if step < len(POLAR_EXPRESS) - 1:
            _multiply_(p, r)
            _multiply_(p, r)
    return q.mul_(scale_B11)


def add_gram_(gram_NN: Tensor, x_MN: Tensor) -> None:
    """gram += x^T x, but only the blocks from the diagonal to the right; `mirror_` completes it."""
    for at in _blocks(len(gram_NN)):
        gram_NN[at, at.start :].addmm_(x_MN[:, at].mT, x_MN[:, at.start :])


def mirror_(matrix_NN: Tensor) -> None:
    """Complete a symmetric matrix of which only the blocks from the diagonal to the right are there."""
    for at in _blocks(len(matrix_NN)):
        matrix_NN[at.stop :, at] = matrix_NN[at, at.stop :].mT


def _multiply_(a_BNN: Tensor, b_BNN: Tensor) -> None:
    """b becomes a @ b, which is symmetric as both are: 5/8 of the work, if the matrices are large enough to matter."""
    if a_BNN.shape[-1] < _LARGE:
        b_BNN.copy_(torch.bmm(a_BNN, b_BNN))
        return
    for a_NN, b_NN in zip(a_BNN, b_BNN, strict=True):
        for at in _blocks(len(b_NN)):  # columns of the product need no other columns of b
            b_NN[: at.stop, at] = a_NN[: at.stop] @ b_NN[:, at]
        mirror_(b_NN)


def _blocks(size: int) -> list[slice]:
    """Four blocks of rows of a large matrix, one of a small one."""
    side = -(-size // 4) if size >= _LARGE else size
    return [slice(start, min(start + side, size)) for start in range(0, size, side)]


def width_scale(name: str, rows: int, cols: int) -> float:
    """sqrt(max(1, fan_out / fan_in)) of a parameter's independent map, either of which is its rows.

    With it one neuron's row of `up` moves by the same length whether the FFN has h or h/8 neurons, and one learning
    rate serves every tier (after Large et al. 2024, Modula, arXiv 2405.14813).
    """
    fan_out, fan_in = (cols, rows) if is_input_major(name) else (rows, cols)
    return float(max(1.0, fan_out / fan_in) ** 0.5)
