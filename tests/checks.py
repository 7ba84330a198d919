"""What must hold for a map onto the simplex: for every entry of ACTIVATIONS, and for yours.

Each check takes a map f(logits, progress) and raises Failed, which prints input / yours / expected.
They hold no closed forms: what a map must be is said by laws, or by the optimisation problem that
defines it, solved slowly. TRILEVEL_GRADE_SEED changes all random logits and some of their shapes,
so that a class can be graded on cases it has not seen.
"""
import builtins
import os
from io import BytesIO
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from sparsestmax import off_simplex

SEED = int(os.environ.get("TRILEVEL_GRADE_SEED", 0))
PROGRESS = (0.0, 0.15, 0.4, 0.7, 0.95, 1.0)


class Failed(AssertionError):
    def __init__(self, law, z, progress, yours, expected):
        super().__init__(f"\n{law}\n  input     {shown(z)}, progress {progress}\n"
                         f"  yours     {shown(yours)}\n  expected  {shown(expected)}")


def shown(x):
    if not isinstance(x, torch.Tensor):
        return str(x)
    if x.numel() > 24:
        return f"{type(x).__name__} of shape {tuple(x.shape)}"
    rows = [[round(v, 5) for v in row]
            for row in x.detach().double().reshape(-1, x.shape[-1]).tolist()]
    return str(rows if x.dim() > 1 else rows[0])


def logits(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1000 * SEED + seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def cases():
    """(logits, progress): random ones of several sizes and scales, then nasty ones."""
    for i, progress in enumerate(PROGRESS):
        for size in (1, 2, 3, 4 + SEED % 3, 9 + SEED % 6):
            for scale in (0.01, 0.5, 5.0):
                yield scale * logits(100 * i + size, 4, size), progress
        nasty = [[0., 0., 0.], [1., 1., 0.], [1., 1., 1 + 1e-9], [1e4, -1e4, 0.], [1e-5, 0., -1e-5]]
        yield torch.tensor(nasty, dtype=torch.float64), progress


def close(law, z, progress, yours, expected, tolerance):
    """Row by row, so that a failure shows the one row that is wrong."""
    size = z.shape[-1]
    rows = (x.reshape(-1, size) for x in (z, yours, expected))
    for row, mine, other in zip(*rows):
        if not torch.allclose(mine.double(), other.double(), atol=tolerance, rtol=0):
            raise Failed(law, row, progress, mine, other)


def seeded(f):
    """A map that draws at random draws the same at each call, so that two calls can be compared."""
    def g(z, progress):
        torch.manual_seed(SEED)
        return f(z, progress)
    return g


# --- The laws -------------------------------------------------------------------------------------

def on_the_simplex(f):
    for z, progress in cases():
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5),
                                 (torch.bfloat16, 0.02)):
            p = f(z.to(dtype), progress)
            complaint = off_simplex(z.to(dtype), p, tolerance)
            if complaint:
                row = slice(None)
                if complaint.startswith("row"):
                    row = int(complaint.split()[1].rstrip(","))
                rows = isinstance(p, torch.Tensor) and p.shape == z.shape
                raise Failed(f"weights are not negative, and sum to 1 ({dtype}): {complaint}",
                             z[row], progress, p[row] if rows else p, "a point of the simplex")


def one_candidate_has_all_the_weight(f):
    for progress in PROGRESS:
        z = logits(1, 5, 1)
        close("K = 1", z, progress, f(z, progress), torch.ones(5, 1), 1e-12)


def leading_shapes(f):
    """A batch of any shape is its rows, each by itself.

    (What a random map draws depends on the shape.)
    """
    for shape in ((5,), (3, 4), (2, 3, 2, 5 + SEED % 4)):
        z = logits(2, *shape)
        for progress in PROGRESS:
            p = f(z, progress)
            if "deterministic" in f.promises:
                rows = torch.stack([f(row, progress) for row in z.reshape(-1, shape[-1])])
                rows = rows.reshape(shape)
                close("a batch is its rows, each by itself", z, progress, p, rows, 1e-9)


def deterministic(f):
    for z, progress in cases():
        close("the same weights at each call", z, progress, f(z, progress), f(z, progress), 0)


def permutation(f):
    """Candidates have no names: to reorder the logits is to reorder the weights."""
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        z, order = logits(seed, 6, 7), torch.randperm(7, generator=generator)
        for progress in PROGRESS:
            yours, expected = f(z[:, order], progress), f(z, progress)[:, order]
            close("reordered logits give reordered weights", z[:, order], progress, yours, expected,
                  1e-9)


def shift(f):
    """Only differences of logits count."""
    g = seeded(f)
    for seed in range(8):
        z = logits(seed, 6, 5)
        for progress in PROGRESS:
            yours, expected = g(z + 3.25, progress), g(z, progress)
            close("a number added to all logits changes nothing", z + 3.25, progress, yours,
                  expected, 1e-7)


def order(f):
    """A larger logit never has a smaller weight."""
    for z, progress in cases():
        ranked = z.sort(-1, descending=True).values
        p = f(ranked, progress)
        worse = p.diff(dim=-1).clamp(min=0)
        if (worse > 1e-9).any():
            row = int((worse > 1e-9).any(-1).nonzero()[0])
            raise Failed("a larger logit has no smaller weight", ranked[row], progress, p[row],
                         p[row].sort(descending=True).values)


def one_hot_at_the_end(f):
    for z, _ in cases():
        expected = torch.zeros_like(z)
        for i, row in enumerate(z):
            first = row.tolist().index(row.max().item())  # where several are largest
            expected[i, first] = 1
        close("at progress 1 the first of the largest logits has weight 1, exactly", z, 1.0,
              f(z, 1.0), expected, 0)


def gradient(f):
    """Autograd against finite differences, in double precision, away from kinks."""
    for seed in range(4):
        for progress in (0.0, 0.3, 0.6, 0.9):
            z = logits(seed, 3, 3 + (SEED + seed) % 4).requires_grad_()
            try:
                gradcheck(lambda z: f(z, progress), z, eps=1e-7, atol=1e-5, nondet_tol=0)
            except NotImplementedError:  # which is a RuntimeError too
                raise
            except RuntimeError as error:
                raise Failed("autograd's gradient is the slope of the map", z, progress,
                             str(error)[:600], "the numerical column") from None


def finite_gradient(f):
    for z, progress in cases():
        z = z.float().requires_grad_()
        p = f(z, progress)
        if p.requires_grad:  # a corner may be a constant
            (p * torch.arange(z.shape[-1])).sum().backward()
        if z.grad is not None and not z.grad.isfinite().all():
            raise Failed("the gradient is finite, at ties too", z, progress, z.grad,
                         "finite numbers")


def learns(f):
    """While candidates are close and the schedule is young, the weights answer to the logits.

    Or no search learns anything.
    """
    for seed in range(4):
        z = 0.1 * logits(seed, 3)
        for progress in (0.0, 0.15, 0.3):
            J = torch.autograd.functional.jacobian(lambda z: f(z, progress), z)
            if J.abs().max() < 1e-6:
                raise Failed("three close candidates answer to their logits", z, progress, J,
                             "slopes that are not all zero")


def thaws(f):
    """With two survivors left and progress below 1, their ranking still answers to the logits."""
    seen = 0
    for gap in (0.1 + 0.5 * logits(4, 4).abs()).tolist():
        z = torch.tensor([gap, 0., -9.], dtype=torch.float64)
        for progress in (0.3, 0.6, 0.9):
            p = f(z, progress)
            if int((p > 0).sum()) == 2:
                J = torch.autograd.functional.jacobian(lambda z: f(z, progress), z)
                seen += 1
                if not (J[0, 0] > 1e-4 and J[1, 0] < -1e-4):
                    raise Failed("the last two survivors still learn", z, progress, J,
                                 "d p_1 / d z_1 > 0 > d p_2 / d z_1")
    if not seen:
        raise Failed("the last two survivors still learn", "(gap, 0, -9), four gaps from .1 on",
                     "0.3, 0.6, 0.9", "never exactly two survivors",
                     "two of them in one case at least")


LAWS = {"on the simplex": on_the_simplex, "K = 1": one_candidate_has_all_the_weight,
        "leading shapes": leading_shapes, "shift": shift, "finite gradient": finite_gradient,
        "learns": learns}
OF_THE_DETERMINISTIC = {"deterministic": deterministic, "permutation": permutation, "order": order}
PROMISED = {"one-hot at progress 1": one_hot_at_the_end, "exact gradient": gradient, "thaws": thaws}


def laws_of(f):
    """{name: check} that a map must pass: those for all maps, and those for what it promises."""
    promises = getattr(f, "promises", None)
    if promises is None:
        raise Failed(f"{f.__name__} says what it promises", "-", "-", "nothing",
                     f'{f.__name__}.promises = {{"deterministic", ...}}')
    unknown = promises - {"deterministic", *PROMISED}
    if unknown:
        raise Failed("promises that can be checked", "-", "-", unknown,
                     {"deterministic", *PROMISED})
    promised = {name: law for name, law in PROMISED.items() if name in promises}
    return LAWS | (OF_THE_DETERMINISTIC if "deterministic" in promises else {}) | promised


def hold(f, name, law):
    """Check one law; if it fails, draw the map as well."""
    try:
        law(f)
    except Failed:
        try:
            draw(f, name)
        except Exception:  # a map that fails may fail here too
            pass
        raise


def check(f, **more):
    """All laws, and `more` checks (name=function of f); stops at the first that fails."""
    for name, law in (laws_of(f) | more).items():
        hold(f, name, law)
        print("passed:", name)


def draw(f, law):
    """The map on the triangle at three moments.

    In a notebook below the cell, else as a file in runs/.
    """
    from pictures import draw_map  # in notebooks/
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    for axis, progress in zip(figure.subplots(1, 3), (0.0, 0.5, 0.9)):
        draw_map(axis, f, progress)
        axis.set_title(f"{f.__name__} at progress {progress}")
    if "get_ipython" in vars(builtins):  # a notebook
        from IPython.display import Image, display
        figure.savefig(buffer := BytesIO(), dpi=65)
        display(Image(buffer.getvalue()))
    else:
        Path("runs").mkdir(exist_ok=True)
        figure.savefig(path := Path("runs") / f"failed {law}.png")
        print(f"the map is drawn in {path}")


# --- The tasks' specifications: what is to be solved, solved slowly -------------------------------

def by_bisection(weights_at, z):
    """Find tau with sum_k weights_at(z, tau)_k = 1, the sum falling in tau.

    z: (K,) float64 -> (K,).
    """
    low, high = z.min() - 100, z.max() + 100
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if weights_at(z, tau).sum() > 1 else (low, tau)
    return weights_at(z, tau)


def against(weights_at, law):
    """A check of f against a slow specification.

    weights_at(z, tau, progress), with tau such that the weights sum to 1.
    """
    def specification(f):
        for z, progress in cases():
            slow = torch.stack([by_bisection(lambda z, tau: weights_at(z, tau, progress), row)
                                for row in z])
            close(law, z, progress, f(z, progress), slow, 1e-7)
    return specification


def no_loop(f):
    """As many calls of torch for 5000 rows as for five."""
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))
    counts = []
    for rows in (5, 5000):
        with Count() as count:
            f(logits(3, rows, 6), 0.5)
        counts.append(count.calls)
    if counts[1] > counts[0]:
        raise Failed("all rows at once, without a loop", "5 and 5000 rows", 0.5,
                     f"{counts[0]} and {counts[1]} calls of torch", "equally many")
