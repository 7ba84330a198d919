"""Is every map in sparsestmax.py the map its docstring defines, and does it behave on bad days?

Three kinds of evidence: digits worked by hand; slow algorithms that share no idea with the fast
ones; and laws that must hold for any logits, tried on many draws and on a list of nasty ones.
"""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.autograd import gradcheck
from torch.func import jacfwd, jacrev, vmap

from sparsestmax import ACTIVATIONS, gumbel, softmax, sparsemax, sparsestmax, sparsestmax_released

INF, NAN = float("inf"), float("nan")
EXACT = ["sparsestmax", "sparsestmax_released", "sparsemax", "softmax"]  # a gradient of their own
CLOSING = ["sparsestmax", "sparsestmax_released", "gumbel"]  # one-hot at progress 1


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def radius(p):
    """Distance from the centre of the simplex.

    Taken with deviations: ||p||^2 - 1/K would lose half the digits.
    """
    return (p - 1 / p.shape[-1]).norm(dim=-1)


def circumradius(size):
    return (1 - 1 / size) ** .5


@pytest.mark.parametrize("f, z, r, expected", [
    (sparsestmax, [.3, .1, -.1], .00, [.5333, .3333, .1333]),
    (sparsestmax, [.3, .1, -.1], .28, [.5333, .3333, .1333]),
    (sparsestmax, [.3, .1, -.1], .40, [.6162, .3333, .0505]),
    (sparsestmax, [.3, .1, -.1], .50, [.7041, .2959, 0]),
    (sparsestmax, [.3, .1, -.1], .70, [.9021, .0979, 0]),
    (sparsestmax, [.3, .1, -.1], (2 / 3) ** .5, [1, 0, 0]),
    (sparsestmax, [.3, .28, .22, .2], .25, [.4016, .3410, .1590, .0984]),
    (sparsestmax, [.3, .28, .22, .2], .55, [.6620, .3380, 0, 0]),
    (sparsestmax, [.9, .8, -.5], .30, [.55, .45, 0]),
    (sparsestmax, [.9, .8, -.5], .60, [.8109, .1891, 0]),
    (sparsestmax_released, [.9, .8, -.5], .30, [.7121, .2879, 0]),
    (sparsemax, [.9, .8, -.5], .60, [.55, .45, 0]),
    (softmax, [.3, .1, -.1], .60, [.4018, .3289, .2693]),
])
def test_worked_digits(f, z, r, expected):
    p = f(torch.tensor(z), r / circumradius(len(z)))
    expected = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(p, expected, atol=6e-5, rtol=0)
    assert torch.equal(p == 0, expected == 0)  # zeros are exact


def enumerate_supports(z, r):
    """Nearest point of {p in simplex: ||p - u|| >= r}, by trying all 2^K - 1 sets of survivors.

    In the plane of one face, the nearest permitted point is either the nearest point of the plane
    or a point of the circle in which the plane cuts the sphere, straight out from the face's
    centre. Off the simplex, or inside the ball: discarded. z: (N, K), r: (N,) -> (N, K).
    """
    best, best_cost, size = torch.full_like(z, NAN), torch.full_like(r, INF), z.shape[-1]
    for survivors in list(itertools.product([0., 1.], repeat=size))[1:]:  # not the empty set
        mask = torch.tensor(survivors, dtype=z.dtype)
        centre = mask / mask.sum()  # (K,)
        q = (z - (z * centre).sum(-1, keepdim=True)) * mask  # (N, K)
        rho = (r ** 2 - (centre - 1 / size).square().sum()).clamp(min=0).sqrt()
        out = q / q.norm(dim=-1, keepdim=True).clamp(min=1e-300)
        for p in (centre + q, centre + rho[:, None] * out):
            permitted = (p >= 0).all(-1) & (radius(p) >= r - 1e-9)
            cost = torch.where(permitted, (p - z).square().sum(-1), INF)
            best = torch.where((cost < best_cost)[:, None], p, best)
            best_cost = torch.minimum(cost, best_cost)
    return best


@pytest.mark.parametrize("size", range(2, 8))
def test_sparsestmax_against_enumeration(size):
    for scale in (.01, .3, 3.):
        z = scale * draw(500, size, seed=size)
        progress = torch.rand(500, generator=torch.Generator().manual_seed(size), dtype=z.dtype)
        fast = vmap(sparsestmax)(z, progress)  # a progress of its own for each row
        slow = enumerate_supports(z, progress * circumradius(size))
        torch.testing.assert_close(fast, slow, atol=1e-10, rtol=0)


def test_sparsemax_against_bisection():
    z = 2 * draw(2000, 9)
    low, high = z.amin(-1, keepdim=True) - 1, z.amax(-1, keepdim=True)  # tau lies between
    for _ in range(80):
        tau = (low + high) / 2
        too_much = (z - tau).clamp(min=0).sum(-1, keepdim=True) > 1
        low, high = torch.where(too_much, tau, low), torch.where(too_much, high, tau)
    torch.testing.assert_close(sparsemax(z), (z - tau).clamp(min=0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [3, 5, 8])
def test_released_variant_is_the_definition_on_the_support_of_sparsemax(size):
    z, r = 1.5 * draw(100, size, seed=size), .4
    for row, p in zip(z, sparsestmax_released(z, r / circumradius(size))):
        kept = sparsemax(row) > 0
        own = circumradius(int(kept.sum()))  # 0 if sparsemax has decided alone
        torch.testing.assert_close(p[kept], sparsestmax(row[kept], min(1., r / own) if own else 0.))
        assert (p[~kept] == 0).all()


def test_gumbel_draws_with_the_probabilities_of_softmax():
    torch.manual_seed(0)
    z = torch.tensor([.5, 0., -1., -INF])
    draws = gumbel(z.expand(40000, 4), .3)
    assert ((draws == 1).sum(-1) == 1).all() and ((draws == 0).sum(-1) == 3).all()
    torch.testing.assert_close(draws.mean(0), softmax(z), atol=.01, rtol=0)
    assert gumbel.dense and not any(getattr(ACTIVATIONS[name], "dense", False) for name in EXACT)
    one_hot = torch.tensor([1., 0, 0, 0])
    assert torch.equal(gumbel(z.expand(50, 4), 1.), one_hot.expand(50, 4))  # noise off


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("progress", [0., .3, .55, .8, 1.])
def test_gradcheck(name, progress):
    for size in (1, 2, 3, 6):  # random logits: a kink within 1e-6 would be bad luck
        z = draw(6, size, seed=size).requires_grad_()
        assert gradcheck(lambda z: ACTIVATIONS[name](z, progress), z)


@pytest.mark.parametrize("progress", [0., .2, .4, .6, .8])
def test_jacobian_is_the_closed_form(progress):
    size, locked, r = 5, 0, progress * circumradius(5)
    for z in .3 * draw(60, size, seed=3):
        live = (sparsestmax(z, progress) > 0).double()
        m = live.sum()
        expected = torch.diag(live) - torch.outer(live, live) / m
        if radius(sparsemax(z)) < r:
            q = (z - (z * live).sum() / m) * live
            gain = (r ** 2 - 1 / m + 1 / size).sqrt() / q.norm()
            expected = gain * (expected - torch.outer(q, q) / q.dot(q))
            locked += m == 2
        jacobian = jacrev(lambda z: sparsestmax(z, progress))(z)
        torch.testing.assert_close(jacobian, expected, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(jacfwd(lambda z: sparsestmax(z, progress))(z), jacobian)
    assert locked > 0 or progress < .7  # some rows had two survivors


def test_two_survivors_are_locked_and_the_dead_get_nothing():
    for dtype in (torch.float32, torch.float64):
        z = draw(2000, 6, dtype=dtype).requires_grad_()
        p = sparsestmax(.1 * z, .7)
        grad, = torch.autograd.grad(p, z, draw(2000, 6, seed=1, dtype=dtype))
        alive = (p > 0).sum(-1)
        assert {2, 3} <= set(alive.tolist())
        assert (grad[alive <= 2] == 0).all() and (grad[p == 0] == 0).all()  # to the last bit
        assert (grad[alive >= 3].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("progress", [0., .1, .35, .6, .9, 1.])
@pytest.mark.parametrize("name", EXACT)
def test_laws(name, progress):
    f = ACTIVATIONS[name]
    for size, scale in itertools.product((2, 3, 7, 55), (.01, 1., 100.)):
        z = scale * draw(40, size, seed=size)
        p = f(z, progress)
        permutation = draw(size).argsort()
        same = dict(atol=1e-7, rtol=0)  # a shift of 5 costs logits of 0.01 some of their digits
        assert (p >= 0).all() and torch.allclose(p.sum(-1), p.new_ones(()), atol=1e-12)
        torch.testing.assert_close(f(z[:, permutation], progress), p[:, permutation], **same)
        torch.testing.assert_close(f(z + 5, progress), p, **same)
        torch.testing.assert_close(torch.stack([f(row, progress) for row in z]), p, **same)
        torch.testing.assert_close(f(z.T, progress, dim=0).T, p, **same)
        again = f(z.view(2, 4, 5, size), torch.tensor(progress)).view(40, size)
        torch.testing.assert_close(again, p, **same)
        torch.testing.assert_close(vmap(lambda row: f(row, progress))(z), p, **same)
        ranked = p.gather(-1, z.argsort(-1))
        assert (ranked.diff(dim=-1) >= -1e-15).all()  # a larger logit never gets less
        if name == "sparsestmax":
            assert (radius(p) >= progress * circumradius(size) - 1e-12).all()
        if progress == 1 and name in CLOSING:
            assert torch.equal(p, (z == z.amax(-1, keepdim=True)).double())


NASTY = [
    [0., 0., 0.], [0., 0., 0., 0., 0.], [.5, .5, .1], [.1, .5, .5], [.3, .3, -.2, -.2],  # ties
    [0., 1e-6, 0.], [1., 1 + 1e-6, 1.], [1e-6, 0., -3.], [.2, .2 + 1e-6, .2 - 1e-6, .1],
    [1e-30, 0., -1e-30],
    [1e-20, 0., -1.], [7.], [0.], [1., 2.], [3., 3.], [0., 1e-7],  # K = 1, K = 2
    [1e-5, 2e-5, -1e-5], [1e4, -1e4, 0.], [1e4, 1e4, 9999.], [1e4, 1e4 - .01, 0.],
    [-1e4, -1e4, -1e4 - 1],
    [1., 0., 0.], [2., 1., 1., 0.], [0.] * 64, [1.] + [0.] * 63, [.01 * k for k in range(64)],
    [-INF, .2, .1, 0.], [-INF, 0., 0., -INF], [-INF, 4.], [0., -INF, -1e4, 1e-6],  # not allowed
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nasty_logits(name, dtype):
    for row, progress in itertools.product(NASTY, (0., 1e-6, .1, .6, 1 - 1e-7, 1.)):
        z = torch.tensor(row, dtype=dtype, requires_grad=True)
        p = ACTIVATIONS[name](z, progress)
        message = f"{name}({row}, {progress}) = {p}"
        tolerance = torch.finfo(dtype).eps * max(8, len(row))
        assert p.dtype == dtype and p.shape == z.shape, message
        assert (p >= 0).all() and abs(p.double().sum() - 1) <= tolerance, message
        assert (p[z == -INF] == 0).all(), message
        if name == "sparsestmax" and dtype.itemsize >= 4:
            size = sum(v > -INF for v in row)
            least = progress * circumradius(size)
            assert radius(p[z > -INF].double()) >= least - 4 * tolerance, message
        if name in CLOSING and progress == 1:
            assert p.argmax() == z.argmax(), message  # first index at a tie
            assert p.max() == 1 and p.sum() == 1, message
        if name != "gumbel":
            ranked = p[z.argsort(descending=True)]
            assert (ranked.diff() <= 0).all() or len(set(z.tolist())) < len(row), message
        for k in {0, len(row) - 1}:
            grad, = torch.autograd.grad(p[k], z, retain_graph=True)
            assert grad.isfinite().all(), f"{message}, gradient {grad}"
            assert (grad[z == -INF] == 0).all(), f"{message}, gradient {grad}"


def test_equal_logits_go_towards_the_first():
    torch.testing.assert_close(sparsestmax(torch.zeros(4), .6), torch.tensor([.7, .1, .1, .1]))
    p = sparsestmax(torch.tensor([0., .4, .4]), .9)
    assert p[0] == 0 and p[1] > p[2] > 0


@pytest.mark.parametrize("name", EXACT)
def test_not_allowed_means_not_there(name):
    z, weight, where = draw(50, 6, seed=5), draw(50, 9, seed=6), torch.tensor([0, 2, 3, 5, 7, 8])
    padded = torch.full((50, 9), -INF, dtype=z.dtype).index_copy(1, where, z).requires_grad_()
    z.requires_grad_()
    for progress in (0., .3, .7, 1.):
        p, short = ACTIVATIONS[name](padded, progress), ACTIVATIONS[name](z, progress)
        torch.testing.assert_close(p[:, where], short)
        grad, = torch.autograd.grad(p, padded, weight)
        expected, = torch.autograd.grad(short, z, weight[:, where])
        torch.testing.assert_close(grad[:, where], expected)
        assert p.sum(-1).allclose(p.new_ones(())) and (grad[padded == -INF] == 0).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_broken_rows_are_nan_and_stay_alone(name):
    z = draw(6, 4, dtype=torch.float32)
    z[1, 2], z[3, 0], z[4] = NAN, INF, -INF
    z, broken = z.requires_grad_(), torch.tensor([False, True, False, True, True, False])
    for progress in (0., .5, 1.):
        p = ACTIVATIONS[name](z, progress)
        assert p[broken].isnan().all() and p[~broken].isfinite().all()
        assert torch.autograd.grad(p[~broken].square().sum(), z)[0].isfinite().all()
        if name != "gumbel":
            torch.testing.assert_close(p[~broken], ACTIVATIONS[name](z[~broken], progress))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("progress", [-.01, 1.0001, NAN, INF])
def test_progress_outside_its_range(name, progress):
    with pytest.raises(ValueError, match=r"progress must lie in \[0, 1\]"):
        ACTIVATIONS[name](torch.zeros(3), progress)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool,
                                   torch.complex64])
def test_logits_that_are_not_floats(name, dtype):
    with pytest.raises(ValueError, match=f"logits must be floats, got {dtype}"):
        ACTIVATIONS[name](torch.ones(2, 3, dtype=dtype), 0.5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_compiles_once_for_all_values_of_progress(name):
    z, values = draw(4, 5), [.1, .3, .47, .62, .9]
    for kind, limit in ((torch.tensor, 1), (float, 2)):  # a float first counts as a constant
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(ACTIVATIONS[name], backend=counter, fullgraph=True)
        for value in values:
            p = compiled(z, kind(value))
            assert name == "gumbel" or torch.allclose(p, ACTIVATIONS[name](z, value))
        assert counter.frame_count <= limit
