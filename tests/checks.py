"""What must hold for a map onto the simplex: for every entry of ACTIVATIONS, and for yours.

Each check takes a map f(logits, progress) and raises Failed, which prints input / yours / expected.
They hold no closed forms: what a map must be is said by laws, or by the optimisation problem that
defines it, solved slowly. TRILEVEL_GRADE_SEED changes all random logits and some of their shapes,
so that a class can be graded on cases it has not seen.
"""
import builtins
import os
import traceback
from functools import wraps
from io import BytesIO
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.autograd.functional import jacobian
from torch.utils._python_dispatch import TorchDispatchMode

from sparsestmax import off_simplex

SEED = int(os.environ.get("TRILEVEL_GRADE_SEED", 0))
PROGRESS = (0.0, 0.15, 0.4, 0.7, 0.95, 1.0)
OFFSETS = (3.25, 1e3, -1e4, 1e4)  # numbers added to all logits


class Failed(AssertionError):
    def __init__(self, law, z, progress, yours, expected):
        super().__init__(f"{law}\n  input     {shown(z)}, progress {progress}\n"
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
    """(logits, progress): random ones of several sizes and scales, far from 0, nasty ones."""
    for i, progress in enumerate(PROGRESS):
        for size in (1, 2, 3, 4 + SEED % 3, 9 + SEED % 6):
            for scale in (0.01, 0.5, 5.0):
                yield scale * logits(100 * i + size, 4, size), progress
        for offset in OFFSETS:
            near = torch.tensor([[.9, .5, -.1, -.4]], dtype=torch.float64)
            yield torch.cat([near, logits(100 * i, 3, 4)]) + offset, progress
        nasty = [[0., 0., 0.], [1., 1., 0.], [1., 1., 1 + 1e-9], [1e4, -1e4, 0.], [1e-5, 0., -1e-5]]
        yield torch.tensor(nasty, dtype=torch.float64), progress


def close(law, z, progress, yours, expected, tolerance):
    """Row by row, so that a failure shows the one row that is wrong. tolerance: one, or for each.

    How far off it is stands in the sentence, as the digits shown may be too few to see it.
    """
    off = (yours.double() - expected.double()).abs()
    tolerance = torch.as_tensor(tolerance).expand_as(off)
    rows = (x.reshape(-1, z.shape[-1]) for x in (z, yours, expected, off, tolerance))
    for row, mine, other, off, allowed in zip(*rows):
        if not (off <= allowed).all():  # so written, NaN fails too
            raise Failed(f"{law}; a weight is off by {off.max():.2g}", row, progress, mine, other)


def seeded(f):
    """A map that draws at random draws the same at each call, so that two calls can be compared."""
    def g(z, progress):
        torch.manual_seed(SEED)
        return f(z, progress)
    return g


def in_words(law):
    """`law`, with a sentence also for what goes wrong before the law itself can be tried.

    The map gets a copy of the logits: it cannot spoil ours, and whether it changed them is seen.
    (A clone hands gradients through.) What it returns must be a tensor like the logits; and an
    error, of the map or of the way back through it, is told with the logits that it came with.
    """
    @wraps(law)
    def tried(f):
        last = ["-", "-"]  # logits and progress of the latest call

        @wraps(f)
        def guarded(z, progress):
            last[:] = z, progress
            given = z.clone()
            p = f(given, progress)
            if not torch.equal(given, z):
                raise Failed("your map changed its input (by +=, x[...] = or a function whose name "
                             "ends in _)", z, progress, given, "logits that stay as they are")
            if not isinstance(p, torch.Tensor) or (p.shape, p.dtype) != (z.shape, z.dtype):
                lost = "the gradient is lost: " if "numpy" in str(type(p)) else ""
                yours = f"{tuple(p.shape)}, {p.dtype}" if isinstance(p, torch.Tensor) else type(p)
                raise Failed(lost + off_simplex(z, p), z, progress, yours,
                             f"a tensor like the logits: {tuple(z.shape)}, {z.dtype}")
            return p
        try:
            law(guarded)
        except Failed:
            raise
        except Exception as error:  # it is somebody's code: anything may happen
            if isinstance(error, NotImplementedError) and "not implemented for" not in str(error):
                raise  # a task that is not solved yet; the other is torch's, for some dtypes
            yours = f"{type(error).__name__}: {error}".splitlines()[0]
            frames = traceback.extract_tb(error.__traceback__)
            if "numpy" in str(error) or any("numpy" in frame.line or
                                            "numpy" in Path(frame.filename).parts
                                            for frame in frames):
                wrong = "the gradient is lost: torch cannot follow NumPy"
                yours, expected = "NumPy inside the map", "torch's own functions all the way"
            elif "inplace" in yours.replace("-", ""):
                wrong = "the gradient is lost: what the way back needs was changed in place"
                yours = "+=, /=, x[...] = or a function whose name ends in _"
                expected = "new tensors: p = p / s, not p /= s"
            else:
                wrong = f"your map fails on {last[0].dtype} logits of shape {tuple(last[0].shape)}"
                expected = ("f(logits (..., K), progress) -> weights (..., K), for any shape: the "
                            "candidates are along the last dimension, dim=-1")
            raise Failed(wrong, *last, yours, expected) from error
    return tried


def sound(z, progress, p, tolerance):
    """Every row of p is a point of the simplex."""
    if complaint := off_simplex(z, p, tolerance):
        size, expected = z.shape[-1], "a point of the simplex"
        row = int(complaint.split()[1].rstrip(","))
        logits, weights = z.reshape(-1, size)[row], p.reshape(-1, size)[row]
        other = [d for d in range(z.dim() - 1) if ((p.sum(d) - 1).abs() <= tolerance).all()]
        if other:
            expected += f" along dim=-1, the candidates (yours sums to 1 along dim={other[0]})"
        elif weights.sum() > 1.1 and (logits == logits.max()).sum() > 1:
            expected += ": where several logits are largest, only the first of them is the largest"
        elif logits.abs().max() > 50:
            expected += ": subtract the row's largest logit first, as only differences count"
        elif not weights.isfinite().all():
            expected += ": no exp of a large number, no 0 / 0, no root of a negative number"
        raise Failed(f"weights are not negative, and sum to 1 ({z.dtype}): {complaint}", logits,
                     progress, weights, expected)


# --- The laws -------------------------------------------------------------------------------------

@in_words
def on_the_simplex(f):
    for z, progress in cases():
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5),
                                 (torch.bfloat16, 0.02)):
            sound(z.to(dtype), progress, f(z.to(dtype), progress), tolerance)


@in_words
def one_candidate_has_all_the_weight(f):
    for progress in PROGRESS:
        z = logits(1, 5, 1)
        close("K = 1: a candidate that is alone has weight 1", z, progress, f(z, progress),
              torch.ones(5, 1), 1e-12)


@in_words
def leading_shapes(f):
    """A batch of any shape is its rows, each by itself.

    (What a random map draws depends on the shape.)
    """
    for shape in ((5,), (3, 4), (2, 3, 2, 5 + SEED % 4)):
        z = logits(2, *shape)
        for progress in PROGRESS:
            p = f(z, progress)
            sound(z, progress, p, 1e-9)
            if "deterministic" in f.promises:
                rows = torch.stack([f(row, progress) for row in z.reshape(-1, shape[-1])])
                rows = rows.reshape(shape)
                close("a batch is its rows, each by itself", z, progress, p, rows, 1e-9)


@in_words
def deterministic(f):
    for z, progress in cases():
        close("the same weights at each call", z, progress, f(z, progress), f(z, progress), 0)


@in_words
def permutation(f):
    """Candidates have no names: to reorder the logits is to reorder the weights."""
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        z, order = logits(seed, 6, 7), torch.randperm(7, generator=generator)
        for progress in PROGRESS:
            yours, expected = f(z[:, order], progress), f(z, progress)[:, order]
            close("reordered logits give reordered weights", z[:, order], progress, yours, expected,
                  1e-9)


@in_words
def shift(f):
    """Only differences of logits count, also where few digits are left for them.

    Next to 10,000 float32 numbers are 1e-3 apart: adding 10,000 rounds the logits by as much. No
    map can help that, so the rounding is done first, and the number then taken off again, which
    is exact. With it and without it the weights must now agree. Leave is given for one such step
    in each logit: who divides by a temperature before subtracting the maximum rounds once more. How
    much that may change the weights, the map itself says.
    """
    g = seeded(f)
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-5)):
        steps = torch.finfo(dtype).eps * torch.eye(5, dtype=dtype)
        for offset in OFFSETS:
            for seed in range(2):
                shifted = (logits(seed, 12, 5) + offset).to(dtype)
                z = shifted - offset
                for progress in PROGRESS:
                    yours, expected = g(shifted, progress), g(z, progress)
                    leave = sum((g(z + abs(offset) * step, progress) - expected).abs()
                                for step in steps)
                    close(f"a number added to all logits changes nothing ({dtype})", shifted,
                          progress, yours, expected, leave + tolerance)


@in_words
def order(f):
    """A larger logit never has a smaller weight."""
    for z, progress in cases():
        ranked = z.sort(-1, descending=True).values
        p = f(ranked, progress)
        worse = p.diff(dim=-1).clamp(min=0)
        if (worse > 1e-9).any():
            row = int((worse > 1e-9).any(-1).nonzero()[0])
            raise Failed(f"a larger logit has no smaller weight; one is {worse.max():.2g} smaller",
                         ranked[row], progress, p[row], p[row].sort(descending=True).values)


@in_words
def one_hot_at_the_end(f):
    for z, _ in cases():
        expected = torch.zeros_like(z)
        for i, row in enumerate(z):
            first = row.tolist().index(row.max().item())  # where several are largest
            expected[i, first] = 1
        close("at progress 1 the first of the largest logits has weight 1, exactly", z, 1.0,
              f(z, 1.0), expected, 0)


@in_words
def gradient(f):
    """Autograd against finite differences, in double precision, away from kinks."""
    for seed in range(4):
        for progress in (0.0, 0.3, 0.6, 0.9):
            size, h = 3 + (SEED + seed) % 4, 1e-7
            z = logits(seed, 3, size)
            # Rows do not see one another, so their weights can be summed, and all be moved at once.
            yours = jacobian(lambda z: f(z, progress).sum(0), z)  # (weight, row, logit)
            expected = torch.stack([(f(z + e, progress) - f(z - e, progress)) / (2 * h)
                                    for e in h * torch.eye(size, dtype=z.dtype)], -1).movedim(1, 0)
            wrong = ~((yours - expected).abs() <= 1e-5 + 1e-3 * expected.abs())
            if wrong.any():
                i, row, j = wrong.nonzero()[0].tolist()
                lost = ", and it is lost" if not yours.any() else ""
                raise Failed(f"autograd's gradient is the slope of the map{lost}: no .detach(), "
                             ".item(), .data or NumPy on the way", z[row], progress,
                             f"weight {i} changes by {yours[i, row, j]:.4g} per unit of logit {j}",
                             f"by {expected[i, row, j]:.4g}, as finite differences say")


@in_words
def finite_gradient(f):
    for z, progress in cases():
        z = z.float().requires_grad_()
        p = f(z, progress)
        if p.requires_grad:  # a corner may be a constant
            (p * torch.arange(z.shape[-1])).sum().backward()
        if z.grad is not None and not z.grad.isfinite().all():
            row = int((~z.grad.isfinite()).any(-1).nonzero()[0])
            raise Failed("the gradient is finite, at ties too", z[row], progress, z.grad[row],
                         "finite numbers")


@in_words
def learns(f):
    """While candidates are close and the schedule is young, the weights answer to the logits.

    Or no search learns anything.
    """
    for seed in range(4):
        z = 0.1 * logits(seed, 3)
        for progress in (0.0, 0.15, 0.3):
            if not f(z.requires_grad_(), progress).requires_grad:
                raise Failed("the gradient is lost: torch sees no way from the weights back to the "
                             "logits", z, progress, ".detach(), .data, .item(), NumPy, no_grad, "
                             "argmax or torch.tensor(...) on the way", "torch alone, on tensors")
            J = jacobian(lambda z: f(z, progress), z)
            if J.abs().max() < 1e-6:
                raise Failed("three close candidates answer to their logits", z, progress,
                             "slopes that are all zero", "some that are not")


@in_words
def thaws(f):
    """With two survivors left and progress below 1, their ranking still answers to the logits."""
    seen = 0
    for gap in (0.1, *(0.1 + 0.5 * logits(4, 4).abs()).tolist()):
        z = torch.tensor([gap, 0., -9.], dtype=torch.float64)
        for progress in (0.3, 0.6, 0.9):
            p = f(z, progress)
            if int((p > 0).sum()) == 2:
                first, second = jacobian(lambda z: f(z, progress), z)[:2, 0].tolist()
                seen += 1
                if not (first > 1e-4 and second < -1e-4):
                    raise Failed("the last two survivors still learn", z, progress,
                                 f"d p_1 / d z_1 = {first:.2g}, d p_2 / d z_1 = {second:.2g}",
                                 "one above 1e-4, the other below -1e-4")
    if not seen:
        raise Failed("the last two survivors still learn", "(gap, 0, -9), five gaps from .1 on",
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
    unknown = set(promises) - {"deterministic", *PROMISED}
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
    high = z.abs().max() + 100
    low = -high
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if weights_at(z, tau).sum() > 1 else (low, tau)
    return weights_at(z, tau)


def against(weights_at, law):
    """A check of f against a slow specification.

    weights_at(z, tau, progress), with tau such that the weights sum to 1.
    """
    @in_words
    def specification(f):
        for z, progress in cases():
            slow = torch.stack([by_bisection(lambda z, tau: weights_at(z, tau, progress), row)
                                for row in z])
            close(law, z, progress, f(z, progress), slow, 1e-7)
    return specification


@in_words
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
