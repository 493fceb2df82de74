"""Least squares in closed form: a linear layer that stands before a cut takes over what was cut.

    h = r + M            hidden states before the cut: residual stream r, MLP result M = a W
    z                    hidden states that the removed blocks made of h

    T = argmin |r + M T - z|^2 + ridge           W <- W T           no new parameters

The sums that this needs (a' a, a' y, y' y) are gathered batch by batch, in fp64; so are those of
rows held out, on which the ridge is chosen. The error on these is exact, from the sums alone.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import torch

from deltafold.linalg.matrices import products
from deltafold.running.devices import here, put

RIDGES = (0.3, 1.0, 3.0, 10.0)
"""Shares of the mean of the diagonal of a' a, the weakest first."""
WORTH = 0.05
"""A stronger ridge is taken if it makes the held-out error smaller by this share."""


@dataclass
class Sums:
    """Sums over rows of inputs x (n, i) and of what they shall make, y (n, o)."""

    gram: torch.Tensor
    cross: torch.Tensor
    square: float = 0.0
    rows: int = 0

    @classmethod
    def empty(cls, i: int, o: int) -> Sums:
        at = here()
        return cls(
            torch.zeros(i, i, dtype=torch.float64, device=at),
            torch.zeros(i, o, dtype=torch.float64, device=at),
        )

    def add(self, x: torch.Tensor, y: torch.Tensor, mixed: bool = False) -> None:
        """Take in rows x (n, i) and y (n, o). Products in their dtype, sums over batches in fp64.

        With `mixed` products of fp32 are made in bf16 and summed in fp32, where that is faster.
        """
        x, y = put(x), put(y)
        with products("medium") if mixed else contextlib.nullcontext():
            self.gram += x.T @ x
            self.cross += x.T @ y
        self.square += float(y.double().square().sum())
        self.rows += len(x)

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.gram + other.gram,
            self.cross + other.cross,
            self.square + other.square,
            self.rows + other.rows,
        )

    def error(self, solution: torch.Tensor) -> float:
        """|x S - y|^2 over all rows, S (i, o): tr(S' G S) - 2 tr(S' C) + |y|^2, at least 0."""
        bent = ((self.gram @ solution) * solution).sum() - 2 * (solution * self.cross).sum()
        return max(0.0, float(bent) + self.square)

    def solve(self, ridge: float) -> torch.Tensor:
        """S (i, o) with the least |x S - y|^2 + l |S|^2, where l = ridge * mean of the diagonal of G."""
        damped = self.gram.clone()
        damped.diagonal().add_(ridge * self.gram.diagonal().mean().clamp_min(1e-30))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:  # rows so alike that rounding makes the matrix indefinite
            return torch.linalg.solve(damped, self.cross)
        return torch.cholesky_solve(self.cross, factor)


@dataclass(frozen=True)
class Fit:
    """A solution S (i, o), on the CPU, the ridge, and the squared error on held-out rows.

    The error after is that of a solution from the other rows alone.
    """

    solution: torch.Tensor
    ridge: float | None
    before: float
    after: float


@dataclass
class Regression:
    """Rows for fitting and rows held out.

    What is fitted is a change that starts from nothing, S = 0: the stronger the ridge, the less is
    changed. Where no ridge makes the held-out error smaller, nothing is. Of ridges that do about as
    well the weakest is taken: the blocks after it then see states nearer to the model's own.
    """

    i: int
    o: int
    fitted: Sums = field(init=False)
    held: Sums = field(init=False)

    def __post_init__(self) -> None:
        self.fitted, self.held = Sums.empty(self.i, self.o), Sums.empty(self.i, self.o)

    def add(
        self, x: torch.Tensor, y: torch.Tensor, held: bool = False, mixed: bool = False
    ) -> None:
        """Take in rows x (n, i), y (n, o); see `Sums.add`."""
        (self.held if held else self.fitted).add(x, y, mixed)

    def fit(self, ridges: tuple[float, ...] = RIDGES) -> Fit:
        """The solution of all rows, with a ridge that does well on the rows held out.

        That ridge is found with the other rows alone. Where no rows are held out, the one in the
        middle of the table is taken.
        """
        nothing = torch.zeros_like(self.fitted.cross)
        if not self.held.rows:
            ridge = ridges[len(ridges) // 2]
            solution = self.fitted.solve(ridge)
            return Fit(solution.cpu(), ridge, self.fitted.square, self.fitted.error(solution))
        ridge, after = self._weakest(ridges)
        if after >= self.held.square:
            return Fit(nothing.cpu(), None, self.held.square, self.held.square)
        solution = (self.fitted + self.held).solve(ridge).cpu()
        return Fit(solution, ridge, self.held.square, after)

    def _weakest(self, ridges: tuple[float, ...]) -> tuple[float, float]:
        """(ridge, its held-out error): stronger ones only while each is WORTH it."""
        chosen, least = ridges[0], self.held.error(self.fitted.solve(ridges[0]))
        for ridge in ridges[1:]:
            error = self.held.error(self.fitted.solve(ridge))
            if error > (1 - WORTH) * least:
                break
            chosen, least = ridge, error
        return chosen, least


def replace_me(
    made: torch.Tensor, output: torch.Tensor, target: torch.Tensor, lam: float
) -> torch.Tensor:
    """T (w, w) = (M'M + lam I)^-1 M'(Z - Y + M): ReplaceMe (arXiv 2505.02819), eq. 8.

    M = `made`, what the MLP before the cut adds (n, w); Y = `output` of its block; Z = `target`, the
    output of the last removed block.
    """
    made, gap = put(made, torch.float64), put(target - output + made, torch.float64)
    eye = torch.eye(made.shape[1], dtype=torch.float64, device=made.device)
    return torch.linalg.solve(made.T @ made + lam * eye, made.T @ gap).cpu()


COSINE_RATE, COSINE_ROWS, COSINE_EPOCHS, COSINE_STEPS = 1e-3, 1024, 10, 1000
"""Adam's rate, rows a step, passes over the rows, and the least steps, of `replace_me_cosine`."""


def replace_me_cosine(
    made: torch.Tensor, output: torch.Tensor, target: torch.Tensor, key: int = 0
) -> torch.Tensor:
    """T (w, w) = argmin mean of 1 - cos(M T + Y - M, Z): ReplaceMe's cosine loss, eq. 9.

    By Adam from the identity, as its program has it where told to be accurate; otherwise that compares
    M T to Z - Y + M, which is worse. M, Y, Z (n, w) are those of `replace_me`. The program has some
    hundred times as many rows and a rate of 1e-4; fewer are gone over more often, at 1e-3.
    """
    made, rest, goal = (put(each.float()) for each in (made, output - made, target))
    turn = torch.eye(made.shape[1], device=made.device, requires_grad=True)
    adam = torch.optim.Adam([turn], lr=COSINE_RATE)
    generator = torch.Generator().manual_seed(key)
    steps = -(-len(made) // COSINE_ROWS)
    for _ in range(max(COSINE_EPOCHS, -(-COSINE_STEPS // steps))):
        for rows in torch.randperm(len(made), generator=generator).split(COSINE_ROWS):
            at = rows.to(made.device)
            found = made[at] @ turn + rest[at]
            near = torch.nn.functional.cosine_similarity(found, goal[at], dim=1)
            adam.zero_grad()
            (1 - near.mean()).backward()
            adam.step()
    return turn.detach().double().cpu()


def channel_scales(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Ratios (w,) of channel magnitudes, |after| / |before| summed over rows (n, w); 1 for dead ones."""
    top, low = after.double().abs().sum(0), before.double().abs().sum(0)
    return torch.where(low > 0, top / low.clamp_min(1e-300), 1.0)


def rotation(width: int) -> torch.Tensor:
    """An orthogonal matrix Q (w, w): Hadamard where the width is a power of two.

    Else the Kronecker product of the largest Hadamard matrix that divides it and a cosine transform.
    """
    size = width & -width
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < size:
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    rest = width // size
    at = torch.arange(rest, dtype=torch.float64)
    cosines = torch.cos(torch.pi * (at[None] + 0.5) * at[:, None] / rest) * (2 / rest) ** 0.5
    cosines[0] /= 2**0.5
    return torch.kron(hadamard / size**0.5, cosines)


def patch_scale(before: torch.Tensor, after: torch.Tensor) -> float:
    """The multiple of the identity nearest to LinearPatch's matrix (arXiv 2505.24680), eq. 5.

    P = Q diag(c) Q', x -> x P, with c the ratios of channel magnitudes after Q, of the states after the
    cut to those before it, both (n, w). The nearest is tr P / w, the mean of c.
    """
    turn = rotation(before.shape[1])
    return float(channel_scales(before.double() @ turn, after.double() @ turn).mean())


def folded_in(weight: torch.Tensor, change: torch.Tensor, transposed: bool) -> torch.Tensor:
    """A down projection followed by T: W (o, i) with y = x W' becomes T' W; (i, o) becomes W T.

    A bias (o,) is followed by T too. Experts in one tensor (e, ...) each are.
    """
    wide = weight.double()
    made = wide @ change if transposed or weight.dim() == 1 else change.T @ wide
    return made.float()
