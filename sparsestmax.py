"""From logits to weights: how a continuous search makes its discrete choices.

    python sparsestmax.py          # a small table: one row of logits, progress 0 to 1

The problem
-----------
A search keeps one logit z_k for each of K candidates (operations, widths, paths) and mixes the candidates with
weights p(z) >= 0 that sum to 1. Training wants p to be smooth enough to carry a gradient; the network at the end
must use one candidate alone. Softmax never gets there: all its weights stay positive, every candidate is computed
at every step, and the final argmax throws away branches that the other weights had learned to rely on.
So we want a map onto the simplex which

  * gives weights that are *exactly* zero, so that a dropped candidate costs nothing at all, and
  * is steered by one number, `progress`, from "mix freely" at 0 to "exactly one candidate" at 1.

Geometry
--------
The weights live on the simplex: for K = 3 a triangle whose corners are the one-hot choices e_1, e_2, e_3.
Its centre is u = (1/K, ..., 1/K), "no opinion". Decidedness is the distance from there:

    ||p - u|| = 0                   all weights are equal
    ||p - u|| = 1/sqrt(K (K-1))     inscribed radius: a ball around u first touches the boundary
    ||p - u|| = sqrt((K-1)/K)       circumradius r_c: only the K corners are that far away

**Sparsemax** [1] is the point of the simplex nearest to the logits. **Sparsestmax** [2] forbids a ball around the
centre first, and asks for the nearest point of what is left:

    minimise ||p - z||^2   over p in the simplex with ||p - u|| >= r.                                        (*)

r = 0 forbids nothing: sparsemax. As r grows, the ball pushes p outwards, to an edge of the triangle and along it into
a corner. `progress` is r / r_c, so that choices among 4 and among 55 candidates come to a close together. A ball
inside the simplex drops nobody: zeros that sparsemax did not have appear at progress 1/(K-1) at the earliest
(.33 for K = 4, .02 for K = 55).

The closed form, and why it holds
---------------------------------
Sparsemax first. It subtracts one number from all logits and cuts at zero, p = max(z - tau, 0). If m candidates
survive, they are the m largest logits, and with q = (those logits) - (their mean), which sums to 0,

    p = 1/m + q      on the survivors:   the centre of their face of the simplex, plus a step along q.

The ball makes (*) non-convex, but a multiplier undoes that. For any 0 <= lambda < 1,

    ||p - z||^2 - lambda (||p - u||^2 - r^2)  =  (1 - lambda) ||p - t z||^2 + const,   t = 1 / (1 - lambda) >= 1,

because ||p - u||^2 is ||p||^2 - 1/K on the simplex. Its minimum is sparsemax(t z); say that this point has radius
exactly r. For a permitted p the bracket is not negative, so ||p - z||^2 is at least the left side, which is at least
its minimum; and there, with a bracket of 0, the left side *is* ||p - z||^2. So no permitted p costs less, and that
point solves (*): with no convexity needed,

    sparsestmax(z) = sparsemax(t z),   with the smallest t >= 1 that brings it to radius r, or farther.

(Farther at t = 1 only, where sparsemax is outside the ball by itself. Only where several logits are the largest may
there be no such t: see Conventions.)

It is sparsemax at a temperature 1/t that each row picks for itself. And t has a formula. By Pythagoras the ball
cuts the face of m survivors in a ball around *its* centre, whose squared radius is

    rho_m^2 = max(0, r^2 - (1/m - 1/K)),   so with m survivors   t_m = max(1, rho_m / ||q||),   p = 1/m + t_m q.

In words: stay in the face, keep the direction, walk radially until the distance is right. Fewer survive as t
grows, hence the rule: sort, try every m at once, and keep the largest m whose smallest weight, 1/m + t_m q_m, is
still positive. (Why the largest? Suppose that an m above the true one passed. Then m or more survive at t_m, fewer at
the true t, so the true t is larger. At the first t on the way with at most m survivors the radius is r or more, since
t >= t_m. But the true t is the smallest to reach r: a contradiction.)

Digits for z = (.3, .1, -.1), K = 3, r_c = .8165:

    r     progress   weights                 what happens
    0     0          .5333  .3333  .1333     sparsemax; its own radius is .2828
    .4    .4899      .6162  .3333  .0505     pushed outwards along q = (.2, 0, -.2), t = 1.414
    .5    .6124      .7041  .2959  0         the third is gone, the step goes on along the edge
    .8165 1          1      0      0         a corner

The Jacobian, and why a choice locks
------------------------------------
Differentiate p = 1/m + rho_m n with n = q / ||q||. Survivors only, zero for everybody else (1 is the vector of ones, '
transposes):

    inside the free region   dp/dz = I - 11'/m                          (sparsemax)
    on the sphere            dp/dz = (rho_m / ||q||) (I - 11'/m - nn')

11'/m: adding a constant to all logits changes nothing. nn': stretching q changes nothing, the radius is
prescribed. What is left are m - 2 directions, so

  * three survivors can turn in one direction, two in **none**: the Jacobian of two survivors is zero. On an edge
    of the triangle the radius alone fixes the point. The ranking of the last two is decided while three are alive.
  * the gain rho_m / ||q|| explodes when the survivors' logits are nearly equal. Of course: seen from the centre
    all directions are equally near, and a breath of wind decides. At equal logits the map jumps, so no formula
    can save the slope. Two logits closer than the rounding step eps of their dtype (relative to 1) cannot
    sensibly be told apart, so the slope divides by max(||q||, eps): finite always, exact above eps. That
    bound is generous (8e6 in float32); start logits with some spread, and bound the step (Adam does).

Conventions
-----------
  * Equal logits: all points of the sphere (in the face of the equal survivors) solve (*); we take the one
    towards the *first* of them. So K equal logits give (1 - progress) u + progress e_1.
  * A logit of -inf says "not allowed": weight 0, gradient 0, and the row acts as if it had the others only
    (K counts allowed entries). A row with NaN or +inf, or with nothing allowed, comes out as NaN in all entries.
  * float16 and bfloat16 are computed in float32 and rounded at the end.
  * First derivatives only, backward or forward: autograd is handed the Jacobian above, and its own derivative reads as zero.

Sources
-------
[1] Martins & Astudillo, From Softmax to Sparsemax, ICML 2016, arXiv 1602.02068.
[2] Shao et al., SSN: Learning Sparse Switchable Normalization via SparsestMax, CVPR 2019, arXiv 1903.03793.
[3] Wu et al., Trilevel Neural Architecture Search for Efficient Single Image Super-Resolution, arXiv 2101.06658:
    the relaxation this repository implements, with sparsestmax at network, cell and kernel level.
[4] Jang, Gu & Poole, Categorical Reparameterization with Gumbel-Softmax, ICLR 2017, arXiv 1611.01144.
[5] Fu et al., AutoGAN-Distiller, ICML 2020, arXiv 2006.08198: searches widths with the hard form of [4].
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch


# ---------------------------------------------------------------- what all maps share

def _apply(rows, logits, progress, dim):
    """Bring `logits` into a standard form, call `rows(z, progress)`, and undo the standard form.

    `rows` sees z: (..., K), float32 or float64, shifted so that each row's largest entry is exactly 0 (all maps
    here ignore a shift, and small differences between large logits survive), -inf where not allowed, never NaN;
    and `progress` as a 0-d tensor. Nothing in here or below waits for a device: rows of every kind take the same
    path, and masks pick.
    """
    if not isinstance(progress, torch.Tensor):
        # Written so that NaN fails too. A tensor is not looked at: reading it would stall a GPU.
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must lie in [0, 1], got {progress}")
        # A tensor from here on, so that a compiled graph serves every value.
        progress = torch.full((), progress, dtype=torch.float64, device=logits.device)
    z = logits.movedim(dim, -1)                                         # (..., K)
    if z.dtype in (torch.float16, torch.bfloat16):
        z = z.float()
    top = z.detach().amax(-1, keepdim=True)                             # (..., 1)
    bad = ~top.isfinite()                       # NaN and +inf carry over to the maximum; -inf: nothing allowed
    z = torch.where(bad, 0.0, z - top)          # bad rows take part as harmless zeros, so gradients stay finite
    p = rows(z, progress.detach().to(z))                                # (..., K)
    return (p + 0 * top).to(logits.dtype).movedim(-1, dim)              # 0 * top is NaN where it is not finite


# On a CPU bools take five to thirty times as long as floats. So yes and no are 1.0 and 0.0 below, made with `sign` where that
# is the same.

def _first_of_largest(z):
    """(..., K), largest entry 0 -> (..., K): 1 at the first of the entries that are 0, else 0."""
    largest = 1 + z.sign()
    return largest * (2 - largest.cumsum(-1)).relu()


def _count_allowed(z):
    """(..., K) -> (..., 1): how many entries are not -inf. In the dtype of z: 1 / integer would be float32."""
    return (z > -torch.inf).sum(-1, keepdim=True).to(z.dtype)


def _centred(x, mask):
    """x minus its mean where `mask` is 1, and 0 where it is 0: what of x moves within one face of the simplex."""
    x = x * mask
    return x - mask * (x.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True))


def _ranked(x):
    """x sorted, largest first. On a CPU by numpy, which uses vector instructions: ten times as fast as torch at K = 64."""
    return torch.from_numpy(-np.sort(-x.numpy(), -1)) if x.is_cpu else x.sort(-1, descending=True).values


# ---------------------------------------------------------------- the projection

class _Project(torch.autograd.Function):
    """Solves (*) for rows in standard form, and applies its Jacobian J to whatever is differentiated.

    z: (..., K); allowed, the K of the text, and radius2 = r^2: (..., 1); eps: the resolution of the caller's logits, which
    bounds the slope. Returns p: (..., K), and two tensors for J. The module's docstring derives each step. One sort, and
    cumulative sums for all m at once: O(K log K).
    """

    @staticmethod
    def forward(z, allowed, radius2, eps):
        floor = (torch.finfo(z.dtype).tiny / torch.finfo(z.dtype).eps) ** 0.5       # squares underflow: counts as equal
        # Whoever trails the best by 1 is out already in sparsemax. Cut at 2: out for certain, and all numbers small.
        x = z.clamp(min=-2)
        first = _first_of_largest(x)                                    # (..., K)

        # Every m at once. `last` is the m-th logit minus the mean of the top m. The sums ||q||^2 grow from m - 1 to m
        # by last^2 m/(m-1) (Welford): all terms positive, nothing cancels, so near ties keep their digits.
        ranked = _ranked(x)                                             # (..., K)
        m = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)        # (K,)
        last = ranked - ranked.cumsum(-1) / m                           # (..., K), <= 0
        q2 = (last ** 2 * (m / (m - 1).clamp(min=1))).cumsum(-1)        # (..., K)
        rho2 = radius2 - (1 / m - 1 / allowed)                          # (..., K)
        t = (rho2 / q2.clamp(min=floor ** 2)).clamp(min=1).sqrt()            # (..., K)
        survives = (1 / m + t * last).relu().sign()                     # (..., K), 1 at m = 1
        # The smallest logit that survives for some m: comparing with it keeps equal logits together.
        support = (x >= (ranked * survives).amin(-1, keepdim=True)).to(z.dtype)     # (..., K)

        # The chosen face: its centre plus a step along q. All of q is computed afresh, without cumulative rounding.
        m = support.sum(-1, keepdim=True)                               # (..., 1)
        centre = support / m                                            # (..., K)
        rho = (radius2 - (1 / m - 1 / allowed)).clamp(min=0).sqrt()     # (..., 1)
        q = _centred(x, support)                                        # (..., K)
        q_norm = q.norm(dim=-1, keepdim=True)                           # (..., 1)
        equal = (q_norm <= floor).to(z.dtype)                           # survivors that point nowhere:
        nudge = equal * (first - centre)                                # towards the first
        x, q = x + nudge, q + nudge
        p = centre + q * (torch.maximum(rho, q_norm) / q.norm(dim=-1, keepdim=True).clamp(min=floor))
        closed = (radius2 >= 1 - 1 / allowed).to(z.dtype)               # at the circumradius, or past it:
        p = p.clamp(min=0).lerp(first, closed)                          # (..., K), a corner to the last bit

        # What J is made of. On the sphere n is q's direction and `gain` is rho / ||q||; inside, 0 and 1.
        live = p.sign()
        n = _centred(x, live)
        n = n / n.norm(dim=-1, keepdim=True).clamp(min=floor)           # (..., K), unit length
        gain = rho / q_norm.clamp(min=eps)                              # (..., 1)
        gain = gain * (live.sum(-1, keepdim=True) > 2)                  # two survivors: locked, to the last bit
        on_sphere = rho > q_norm
        return p, n * on_sphere.to(z.dtype), torch.where(on_sphere, gain, 1.0)

    @staticmethod
    def times_jacobian(v, p, n, gain):
        """J v = gain (I - 11'/m - nn') v among the survivors, 0 for the others. J is symmetric, so this is J'v as well."""
        v = _centred(v, p.sign())
        return gain * (v - n * (n * v).sum(-1, keepdim=True))

    # What follows is the wiring that torch asks for: gradients, forward-mode derivatives, and torch.func.vmap.
    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.save_for_backward(*outputs)
        ctx.save_for_forward(*outputs)

    @staticmethod
    def backward(ctx, gradient, *_):
        return _Project.times_jacobian(gradient, *ctx.saved_tensors), None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return _Project.times_jacobian(tangent, *ctx.saved_tensors), None, None

    @staticmethod
    def vmap(info, dims, *inputs):                                      # any leading shape will do: put the mapped one first
        inputs = [x if not isinstance(x, torch.Tensor) else x.expand(info.batch_size, *x.shape) if dim is None
                  else x.movedim(dim, 0) for x, dim in zip(inputs, dims)]
        return _Project.apply(*inputs), (0, 0, 0)


def sparsestmax(logits, progress=0.0, dim=-1):
    """Nearest point of the simplex at least `progress` times its circumradius away from its centre.

    The problem (*) above, solved exactly for every row along `dim`. Weights become exactly zero one after
    another as progress grows; at progress 1 the result is one-hot, at the (first) largest logit.

    Args:
        logits: (..., K) float tensor, any leading shape; -inf marks an entry that is not allowed.
        progress: float or 0-d tensor in [0, 1], r / r_c. Does not receive a gradient.
        dim: the dimension of length K.
    Returns:
        Weights, of the shape, dtype and device of `logits`.
    Raises:
        ValueError: a float progress outside [0, 1]. (A tensor is not checked: that would stall a GPU.)
    Source:
        Shao et al., arXiv 1903.03793, section 3, as a definition; the closed form is the derivation above.

    >>> z, r_c = torch.tensor([.3, .1, -.1]), (2 / 3) ** .5
    >>> sparsestmax(z, .28 / r_c)                       # sparsemax's point is outside the ball
    tensor([0.5333, 0.3333, 0.1333])
    >>> sparsestmax(z, .4 / r_c)
    tensor([0.6162, 0.3333, 0.0505])
    >>> sparsestmax(z, .5 / r_c)
    tensor([0.7041, 0.2959, 0.0000])
    >>> sparsestmax(z, 1.0)
    tensor([1., 0., 0.])
    >>> sparsestmax(torch.tensor([.3, .28, -torch.inf, .22, .2]), .25 / .75 ** .5)      # four allowed entries
    tensor([0.4016, 0.3410, 0.0000, 0.1590, 0.0984])
    """
    def rows(z, progress):
        allowed = _count_allowed(z)
        return _Project.apply(z, allowed, progress ** 2 * (1 - 1 / allowed), torch.finfo(logits.dtype).eps)[0]
    at_the_end = not isinstance(progress, torch.Tensor) and progress == 1           # a corner: nothing to solve
    return _apply((lambda z, _: _first_of_largest(z)) if at_the_end else rows, logits, progress, dim)


def sparsestmax_released(logits, progress=0.0, dim=-1):
    """Sparsestmax as the authors of [2] and [3] published it in code: another map, kept for comparison.

    It starts from the *support* of sparsemax and measures the same radius r from the centre of that face, not
    from the centre of the simplex. As long as sparsemax drops nobody the two are one; once it does, this one is
    further along for the same r. (What their code did at ties, NaN among it, is not imitated.)

    Arguments, result and errors: see `sparsestmax`.

    >>> z, r_c = torch.tensor([.9, .8, -.5]), (2 / 3) ** .5
    >>> sparsestmax(z, .3 / r_c)                        # the edge's middle is .41 from the centre: far enough
    tensor([0.5500, 0.4500, 0.0000])
    >>> sparsestmax_released(z, .3 / r_c)               # .3 from the edge's middle
    tensor([0.7121, 0.2879, 0.0000])
    """
    def rows(z, progress):
        allowed, eps = _count_allowed(z), torch.finfo(logits.dtype).eps
        radius2 = progress ** 2 * (1 - 1 / allowed)                     # (..., 1)
        z = z.masked_fill(_Project.apply(z, allowed, 0 * radius2, eps)[0] == 0, -torch.inf)
        allowed = _count_allowed(z)
        return _Project.apply(z, allowed, radius2.clamp(max=1 - 1 / allowed), eps)[0]
    return _apply(rows, logits, progress, dim)


# ---------------------------------------------------------------- its relatives, for comparison

def sparsemax(logits, progress=0.0, dim=-1):
    """Nearest point of the simplex: minimise ||p - z||^2. Exact zeros, but no schedule: `progress` is ignored.

    It is sparsestmax with a ball of radius 0. Arguments, result and errors: see `sparsestmax`.
    Source: Martins & Astudillo, arXiv 1602.02068.

    >>> sparsemax(torch.tensor([.3, .1, -.1]))
    tensor([0.5333, 0.3333, 0.1333])
    >>> sparsemax(torch.tensor([.9, .8, -.5]))
    tensor([0.5500, 0.4500, 0.0000])
    """
    def rows(z, progress):
        allowed = _count_allowed(z)
        return _Project.apply(z, allowed, torch.zeros_like(allowed), torch.finfo(logits.dtype).eps)[0]
    return _apply(rows, logits, progress, dim)


def softmax(logits, progress=0.0, dim=-1):
    """Maximise <p, z> plus the entropy of p: p proportional to exp(z). Never zero; `progress` is ignored.

    Arguments, result and errors: see `sparsestmax`.

    >>> softmax(torch.tensor([.3, .1, -.1]))
    tensor([0.4018, 0.3289, 0.2693])
    """
    return _apply(lambda z, progress: z.softmax(-1), logits, progress, dim)


def gumbel(logits, progress=0.0, dim=-1):
    """One candidate drawn with the probabilities of softmax; the gradient of a softmax stands in for its own.

    Adding Gumbel noise -log(-log(uniform)) to logits and taking the argmax draws k with probability softmax(z)_k.
    The argmax has no slope, so the backward pass uses that of softmax((z + noise) / temperature): the "straight-
    through" estimate, biased but practical. The temperature falls from 1 to 0.1 (geometrically) with progress.
    At progress 1 the noise is off: the largest logit, first index at a tie, as a search's end must not be a draw.

    Random: a new draw per call, from torch's global generator (`torch.manual_seed`; under `torch.func.vmap` say
    randomness="different"). Its zero weights *do* carry a gradient, and `gumbel.dense = True` says so: who skips
    branches of weight zero has to compute them here.

    Arguments, result and errors: see `sparsestmax`.
    Source: Jang et al., arXiv 1611.01144; in its hard form in AutoGAN-Distiller, arXiv 2006.08198. The schedule
    is ours.

    >>> _ = torch.manual_seed(0)
    >>> draws = gumbel(torch.tensor([.3, .1, -.1]).expand(10000, 3))
    >>> bool((draws.mean(0) - torch.tensor([.4018, .3289, .2693])).abs().max() < .02)
    True
    """
    def rows(z, progress):
        uniform = torch.rand_like(z).clamp(min=torch.finfo(z.dtype).tiny)
        noise = -(-uniform.log()).log()
        soft = ((z + torch.where(progress < 1, noise, 0.0)) / 0.1 ** progress).softmax(-1)
        hard = _first_of_largest((soft - soft.amax(-1, keepdim=True)).detach())
        return hard + (soft - soft.detach())           # value: one-hot; slope: that of `soft`
    return _apply(rows, logits, progress, dim)


gumbel.dense = True

# What a search may ask for by name. A map of your own needs the same signature, and then nothing else.
ACTIVATIONS = {
    "sparsestmax": sparsestmax,
    "sparsemax": sparsemax,
    "softmax": softmax,
    "gumbel": gumbel,
    "sparsestmax_released": sparsestmax_released,
}

# What each promises beyond being a map onto the simplex; tests/checks.py holds it to that. Yours does it likewise.
softmax.promises = sparsemax.promises = {"deterministic", "exact gradient"}
sparsestmax.promises = sparsestmax_released.promises = {"deterministic", "exact gradient", "one-hot at progress 1"}
gumbel.promises = {"one-hot at progress 1"}


def get_activation(name):
    """The map of this name in ACTIVATIONS, or that of another file: "FILE.py:FUNCTION". That file's code is run.

    Raises ValueError, in one line: no such name, file or function, or a function that is no map onto the simplex.
    """
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    file, _, function = name.rpartition(":")
    if not file.endswith(".py"):
        raise ValueError(f"{name!r} is neither one of {', '.join(ACTIVATIONS)} nor of the form FILE.py:FUNCTION")
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file}")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:                                          # it is somebody's code: anything may happen
        raise ValueError(f"{file} does not run: {type(error).__name__}: {error}") from error
    activation = getattr(module, function, None)
    if not callable(activation):
        raise ValueError(f"{file} has no function {function}")
    for z in (torch.tensor([[.3, .1, -.1], [0., 0., 0.], [9., -9., 0.]]), torch.zeros(2, 4, 5), torch.linspace(-2, 2, 55),
              torch.tensor([[.1, 0.]]), torch.zeros(2, 1)):             # a budget may leave one exit, and few channels two widths
        for progress in (0.0, 0.5, 1.0):
            try:
                p = activation(z, progress)
            except NotImplementedError as error:
                raise ValueError(f"{name} is not solved yet: {error}") from error
            except Exception as error:
                raise ValueError(f"{name} fails as f(logits of shape {tuple(z.shape)}, {progress}): "
                                 f"{type(error).__name__}: {error}") from error
            complaint = off_simplex(z, p)
            if complaint:
                raise ValueError(f"{name} at progress {progress}: {complaint}")
    return activation


def off_simplex(z, p, tolerance=1e-4):
    """What keeps p from being weights for the logits z, in words; None if nothing does."""
    if not isinstance(p, torch.Tensor):
        return f"the result is no tensor but a {type(p).__name__}"
    if p.shape != z.shape:
        return f"the result has shape {tuple(p.shape)}, the logits have {tuple(z.shape)}"
    if p.dtype != z.dtype:
        return f"the result is {p.dtype}, the logits are {z.dtype}"
    rows, inputs = p.detach().reshape(-1, p.shape[-1]), z.detach().reshape(-1, p.shape[-1])
    for i, (row, z) in enumerate(zip(rows.tolist(), inputs.tolist())):
        short = [round(value, 4) for value in z[:6]]
        for value in row:
            if not 0 <= value <= 1 + tolerance:                         # NaN fails too
                return f"row {i}, logits {short}, has the weight {value:.6g}, which is not in [0, 1]"
        if abs(sum(row) - 1) > tolerance:
            return f"row {i}, logits {short}, sums to {sum(row):.6g}, not 1"
    return None


# ---------------------------------------------------------------- pictures, for three candidates

# The plane of the triangle seen from the front, true to scale, its centre at (0, 0). What is lost is the mean of the
# logits, which no map here looks at.
_PLANE = ((-0.5 ** 0.5, 0.5 ** 0.5, 0.0), (-(1 / 6) ** 0.5, -(1 / 6) ** 0.5, (2 / 3) ** 0.5))


def to_plane(z):
    """Logits or weights (..., 3) -> points (..., 2)."""
    return z @ torch.tensor(_PLANE, dtype=z.dtype).T


def from_plane(xy):
    """Points (..., 2) -> the logits (..., 3) of mean 0 that `to_plane` puts there."""
    return xy @ torch.tensor(_PLANE, dtype=xy.dtype)


def draw_triangle(axis, progress=0.0):
    """The simplex, its centre, and the ball that sparsestmax forbids at this progress, on matplotlib's `axis`."""
    corners = to_plane(torch.eye(3))
    axis.plot(*corners[[0, 1, 2, 0]].T.numpy(), color="black", linewidth=1.5)
    angles = torch.linspace(0, 6.2832, 200)
    radius = progress * (2 / 3) ** 0.5
    axis.plot(*(radius * torch.stack([angles.cos(), angles.sin()])).numpy(), color="black", linestyle="--", linewidth=1)
    axis.plot(0, 0, "+", color="black")
    for k, (x, y) in enumerate(corners.tolist()):
        axis.annotate(f"$e_{k + 1}$", (x, y), (x * 1.16, y * 1.16), ha="center", va="center", fontsize=12)
    axis.set(aspect="equal", xlim=(-1.15, 1.15), ylim=(-1.15, 1.15))
    axis.set_axis_off()


def draw_map(axis, activation, progress=0.0, ball=0.0, reach=1.3):
    """Where `activation` sends the plane: shades tell how many candidates survive, threads tie logits to weights.

    ball: the progress at which to draw the ball that sparsestmax forbids; 0 for maps without one.
    """
    side = torch.linspace(-reach, reach, 241)
    xy = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1)     # (241, 241, 2)
    with torch.no_grad():
        alive = (activation(from_plane(xy), progress) > 0).sum(-1)      # (241, 241)
        points = xy[8::15, 8::15].reshape(-1, 2)
        images = to_plane(activation(from_plane(points), progress))
    axis.imshow(alive.numpy(), origin="lower", extent=(-reach, reach) * 2, cmap="Greys", vmin=-1, vmax=7)
    threads = torch.stack([points, images], 1)                          # (points, 2 ends, 2)
    axis.plot(*threads.permute(2, 1, 0).numpy(), color="#56B4E9", linewidth=0.6, alpha=0.8)
    axis.plot(*images.T.numpy(), "o", color="#0072B2", markersize=3)
    draw_triangle(axis, ball)
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach))


if __name__ == "__main__":
    z = torch.tensor([.3, .28, .22, .2])
    print("logits      ", "  ".join(f"{v:6.2f}" for v in z.tolist()))
    for progress in (0, .2, .3, .4, .5, .6, .7, .8, .9, 1.):
        p = sparsestmax(z, progress)
        print(f"progress {progress:.1f}", "  ".join(f"{v:6.4f}" for v in p.tolist()), f"  {int((p > 0).sum())} alive")
