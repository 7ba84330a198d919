"""From logits to weights: how a continuous search makes its discrete choices.

    python sparsestmax.py          # one row of logits while progress goes from 0 to 1

The problem
-----------
A search keeps one logit z_k for each of K candidates (operations, widths, paths) and mixes the
candidates with weights p_k >= 0 that sum to 1. Training wants p to be smooth in z, so that it has a
gradient. The network at the end must use one candidate alone. Softmax never gets there: its weights
stay positive, so every candidate is computed at every step, and the final argmax throws away
branches that the rest has learned to rely on. We want a map from logits to weights that

  * gives weights that are *exactly* zero, so that a dropped candidate costs nothing, and
  * is steered by one number, `progress`, from "mix freely" at 0 to "exactly one candidate" at 1.

Geometry
--------
All such weights together are the *simplex*: for K = 3 a triangle, whose corners e_1, e_2, e_3 are
the decisions. Its centre u = (1/K, ..., 1/K) is "no opinion". The distance from u says how decided
p is:

    ||p - u|| = 0                   all weights are equal
    ||p - u|| = 1/sqrt(K (K-1))     inscribed radius: a ball around u first touches the boundary
    ||p - u|| = sqrt((K-1)/K)       circumradius r_c: only the corners are that far away

**Sparsemax** [1] is the point of the simplex nearest to the logits. **Sparsestmax** [2] first
forbids a ball around the centre, and takes the nearest point of what is left:

    minimise ||p - z||^2   over p in the simplex with ||p - u|| >= r.                         (*)

r = 0 forbids nothing: sparsemax. As r grows, the ball pushes p outwards, to an edge of the triangle
and along it into a corner. `progress` is r / r_c, so that a choice among 4 and one among 55 finish
together. The ball drops nobody before it touches the boundary, at progress 1/(K-1) (.33 for K = 4,
.02 for K = 55); what sparsemax drops is gone from the start.

The closed form
---------------
Sparsemax subtracts one number tau from all logits and cuts at zero: p = max(z - tau, 0). If m
candidates survive, they are the m largest. With q = (their logits) - (their mean), which sums to 0,

    p = 1/m + q      on the survivors:  the centre of their face of the simplex, plus a step q.

(A face is the part of the simplex where only certain candidates have weight: for K = 3 the
triangle, its edges, its corners.) Now the ball. Look at sparsemax(t z) for t >= 1, larger and
larger logits. Unless the largest logits tie (see Conventions), its distance from u grows, without a
jump, until only a corner is left. So some t reaches r, and (*) is solved by

    sparsestmax(z) = sparsemax(t z)   with the smallest t >= 1 whose distance is at least r.

*Why.* If t = 1 will do, that point is the best of the whole simplex. Else take the t whose distance
is exactly r, and put lambda = 1 - 1/t, so that 0 < lambda < 1. On the simplex ||p - u||^2 is
||p||^2 - 1/K, and completing the square gives, for every p in it,

    ||p - z||^2 - lambda (||p - u||^2 - r^2)  =  (1 - lambda) ||p - t z||^2 + a constant.

As lambda < 1, the right side is least at p = sparsemax(t z). There ||p - u||^2 - r^2 is 0, so the
left side is just ||p - z||^2. For any other permitted p it is >= 0, and as lambda > 0 the left side
is ||p - z||^2 or less. So no permitted p has a smaller ||p - z||^2. (That (*) is not convex does
not matter.)

*A formula for t.* The line from u to the centre of a face is perpendicular to the face, and its
length squared is 1/m - 1/K. So by Pythagoras the points of the face at distance r from u are those
at distance rho_m from its centre, rho_m^2 = max(0, r^2 - (1/m - 1/K)). A step t q is that long if
t = rho_m / ||q||, so with m survivors

    t_m = max(1, rho_m / ||q||),   p = 1/m + t_m q.

In words: stay in the face, keep the direction, walk until the distance is right.

*Which m?* Take the m largest logits, their q, and its smallest entry s. That 1/m + t s is positive
says: sparsemax(t z) keeps m or more. If the walk ends with m survivors, this holds at t = t_m.
Conversely, if it holds at t_m, then m or more are alive there; and if only m are left at some later
t, the distance r is reached by then, so the walk ends with m or more. Hence: sort, try every m at
once, keep the largest that passes. (In the code `last` is s, `t` is t_m, `survives` "passes".)

Digits for z = (.3, .1, -.1), K = 3, r_c = .8165:

    r     progress   weights                 what happens
    0     0          .5333  .3333  .1333     sparsemax; its own distance is .2828
    .4    .4899      .6162  .3333  .0505     pushed outwards along q = (.2, 0, -.2), t = 1.414
    .5    .6124      .7041  .2959  0         the third is gone, the step goes on along the edge
    .8165 1          1      0      0         a corner

The Jacobian, and why a choice locks
------------------------------------
Differentiate p = 1/m + rho_m n, with n = q / ||q||. For the survivors (all others have slope zero;
1 is the vector of ones, ' transposes):

    not pushed by the ball   dp/dz = I - 11'/m                          (sparsemax)
    on its surface           dp/dz = (rho_m / ||q||) (I - 11'/m - nn')

-11'/m: adding a constant to all logits changes nothing. -nn': stretching q changes nothing, as the
distance is prescribed. That leaves m - 2 directions, so

  * on the surface three survivors can turn in one direction, two in **none**: on an edge the
    radius alone fixes the point, and no gradient can reverse the order of the last two.
  * the gain rho_m / ||q|| grows without bound as the survivors' logits become equal; at equality
    the map jumps, and no formula can save the slope. So the code divides by max(||q||, eps), where
    eps is the rounding step of the logits' dtype next to 1. The slope may still reach 8e6 in
    float32: start logits with some spread, and use an optimiser that bounds the step, like Adam.

Conventions
-----------
  * Equal logits: if the largest tie, perhaps no t reaches r; then every point of the ball's surface
    in their face solves (*). We take the one towards the *first* of them: K equal logits give
    (1-progress) u + progress e_1.
  * A logit of -inf says "not allowed": weight 0, gradient 0, and the row acts as if it had only the
    others (K counts allowed entries). A row with NaN or +inf, or with nothing allowed, is all NaN.
  * float16 and bfloat16 are computed in float32 and rounded at the end.
  * First derivatives only: autograd gets the Jacobian above, whose own derivative reads as zero.

Sources
-------
[1] Martins & Astudillo, From Softmax to Sparsemax, ICML 2016, arXiv 1602.02068.
[2] Shao et al., SSN: Learning Sparse Switchable Normalization via SparsestMax, CVPR 2019,
    arXiv 1903.03793.
[3] Wu et al., Trilevel Neural Architecture Search for Efficient Single Image Super-Resolution,
    arXiv 2101.06658: sparsestmax at network, cell and kernel level.
[4] Jang, Gu & Poole, Categorical Reparameterization with Gumbel-Softmax, ICLR 2017,
    arXiv 1611.01144. In its hard form in Fu et al., AutoGAN-Distiller, ICML 2020, arXiv 2006.08198.
"""
import runpy
from pathlib import Path

import numpy as np
import torch


# --- The map -----------------------------------------------------------------------------------

def sparsestmax(logits, progress=0.0, dim=-1):
    """The point of the simplex nearest to the logits, with a ball around the centre forbidden.

    The problem (*) above, solved exactly for every row along `dim`. Weights become exactly zero one
    after another as progress grows; at progress 1 the result is one-hot, at the largest logit (the
    first of them).

    Args:
        logits: (..., K) float tensor, any leading shape; -inf marks an entry that is not allowed.
        progress: float or 0-d tensor in [0, 1], r / r_c. Does not receive a gradient.
        dim: the dimension of length K.
    Returns:
        Weights, of the shape, dtype and device of `logits`.
    Raises:
        ValueError: logits that are not floats; a float progress outside [0, 1]. (A tensor's value
            is not looked at.)
    Source:
        Shao et al., arXiv 1903.03793, section 3, as a definition; the closed form is derived above.

    >>> z, r_c = torch.tensor([.3, .1, -.1]), (2 / 3) ** .5
    >>> sparsestmax(z, .28 / r_c)                       # sparsemax's point is outside the ball
    tensor([0.5333, 0.3333, 0.1333])
    >>> sparsestmax(z, .4 / r_c)
    tensor([0.6162, 0.3333, 0.0505])
    >>> sparsestmax(z, .5 / r_c)
    tensor([0.7041, 0.2959, 0.0000])
    >>> sparsestmax(z, 1.0)
    tensor([1., 0., 0.])
    >>> sparsestmax(torch.tensor([.3, .28, -torch.inf, .22, .2]), .25 / .75 ** .5)    # four allowed
    tensor([0.4016, 0.3410, 0.0000, 0.1590, 0.0984])
    """
    def rows(z, progress):
        radius2 = progress ** 2 * (1 - 1 / _count_allowed(z))  # (..., 1)
        return _Project.apply(z, radius2, torch.finfo(logits.dtype).eps)[0]
    return _apply(rows, logits, progress, dim)


# --- The projection ----------------------------------------------------------------------------

class _Project(torch.autograd.Function):
    """Solves (*) for rows in standard form, and hands autograd the Jacobian J.

    z: (..., K); radius2 = r^2: (..., 1); eps: that of the caller's dtype, which bounds the slope.
    Returns p: (..., K), and two tensors that J is made of. One sort, and cumulative sums for all m
    at once: O(K log K).
    """

    @staticmethod
    def forward(z, radius2, eps):
        allowed = _count_allowed(z)  # (..., 1), the K of the text
        near = torch.finfo(z.dtype).eps  # survivors whose q is shorter than this count as equal
        # A logit 1 below the best gets weight 0 in sparsemax already. So cutting at -2 changes
        # nothing, and keeps large numbers and -inf away.
        x = z.clamp(min=-2)
        first = _first_of_largest(x)  # (..., K)

        # Every m at once. `last` is the m-th logit minus the mean of the top m, the text's s.
        # From m - 1 to m, ||q||^2 grows by last^2 m/(m-1) (Welford): all terms are positive,
        # nothing cancels, so near ties keep their digits.
        ranked = _ranked(x)  # (..., K)
        m = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)  # (K,)
        last = ranked - ranked.cumsum(-1) / m  # (..., K), <= 0
        q2 = (last ** 2 * (m / (m - 1).clamp(min=1))).cumsum(-1)  # (..., K), ||q||^2
        rho2 = radius2 - (1 / m - 1 / allowed)  # (..., K)
        t = (rho2 / q2.clamp(min=near ** 2)).clamp(min=1).sqrt()  # (..., K)
        survives = (1 / m + t * last).relu().sign()  # (..., K), always 1 at m = 1
        # The smallest logit that survives for some m. Compared with it, equal logits stay together.
        support = (x >= (ranked * survives).amin(-1, keepdim=True)).to(z.dtype)  # (..., K)

        # The chosen face: its centre plus a step along q, which is computed afresh, without the
        # rounding of cumulative sums.
        m = support.sum(-1, keepdim=True)  # (..., 1)
        centre = support / m  # (..., K)
        rho = (radius2 - (1 / m - 1 / allowed)).clamp(min=0).sqrt()  # (..., 1)
        q = _centred(x, support)  # (..., K)
        q_norm = q.norm(dim=-1, keepdim=True)  # (..., 1)
        # Equal survivors have no q: take the direction to the first (in x as well, for n below).
        to_first = (q_norm <= near).to(z.dtype) * (first - centre)  # (..., K)
        x, q = x + to_first, q + to_first
        # The length is t_m ||q|| = max(||q||, rho).
        step = torch.maximum(rho, q_norm) / q.norm(dim=-1, keepdim=True).clamp(min=near)
        p = (centre + q * step).clamp(min=0)  # (..., K)
        at_corner = (radius2 >= 1 - 1 / allowed).to(z.dtype)  # r >= r_c: the corner, to the
        p = p.lerp(first, at_corner)  # last bit

        # What J is made of: on the ball's surface n, and as `gain` rho / ||q||; else 0 and 1.
        live = p.sign()
        n = _centred(x, live)
        n = n / n.norm(dim=-1, keepdim=True).clamp(min=near)  # (..., K), unit length
        gain = rho / q_norm.clamp(min=eps)  # (..., 1)
        gain = gain * (live.sum(-1, keepdim=True) > 2)  # two survivors: locked
        on_surface = rho > q_norm
        return p, n * on_surface.to(z.dtype), torch.where(on_surface, gain, 1.0)

    @staticmethod
    def times_jacobian(v, p, n, gain):
        """J v = gain (I - 11'/m - nn') v among the survivors, 0 elsewhere. Symmetric: also J'v."""
        v = _centred(v, p.sign())
        return gain * (v - n * (n * v).sum(-1, keepdim=True))

    # The wiring that torch asks for: gradients, forward-mode derivatives, and torch.func.vmap.
    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.save_for_backward(*outputs)
        ctx.save_for_forward(*outputs)

    @staticmethod
    def backward(ctx, gradient, *_):
        return _Project.times_jacobian(gradient, *ctx.saved_tensors), None, None

    jvp = backward  # as J is symmetric; and there are as many inputs as outputs

    @staticmethod
    def vmap(info, dims, *inputs):  # any leading shape will do: put the mapped one first
        inputs = [x if not isinstance(x, torch.Tensor) else
                  x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
                  for x, dim in zip(inputs, dims)]
        return _Project.apply(*inputs), (0, 0, 0)


# --- What all maps share -----------------------------------------------------------------------

def _apply(rows, logits, progress, dim):
    """Bring `logits` into a standard form, call `rows(z, progress)`, and undo the standard form.

    `rows` sees z: (..., K), float32 or float64, shifted so that each row's largest entry is exactly
    0 (all maps here ignore a shift, and small differences between large logits survive), -inf where
    not allowed, never NaN; and `progress` as a 0-d tensor. No map looks at a tensor's values, which
    would stall a GPU: rows of every kind take the same path, and masks pick.
    """
    if not logits.is_floating_point():  # weights of that dtype would all be rounded to 0
        raise ValueError(f"logits must be floats, got {logits.dtype}: pass logits.float()")
    if not isinstance(progress, torch.Tensor):
        if not 0 <= progress <= 1:  # so written, NaN fails too
            raise ValueError(f"progress must lie in [0, 1], got {progress}")
        # A tensor from here on, so that a compiled graph serves every value.
        progress = torch.full((), progress, dtype=torch.float64, device=logits.device)
    z = logits.movedim(dim, -1)  # (..., K)
    if z.dtype in (torch.float16, torch.bfloat16):
        z = z.float()
    top = z.detach().amax(-1, keepdim=True)  # (..., 1)
    bad = ~top.isfinite()  # NaN and +inf reach the maximum; -inf: nothing allowed
    z = torch.where(bad, 0.0, z - top)  # bad rows take part as zeros, so gradients stay finite
    p = rows(z, progress.detach().to(z))  # (..., K)
    return (p + 0 * top).to(logits.dtype).movedim(-1, dim)  # 0 * top: NaN where top is bad


# On a CPU bools take five to thirty times as long as floats. So for whole rows yes and no are 1.0
# and 0.0 below, made with `sign` where that is the same.

def _first_of_largest(z):
    """(..., K), largest entry 0 -> (..., K): 1 at the first of the entries that are 0, else 0."""
    largest = 1 + z.sign()
    return largest * (2 - largest.cumsum(-1)).relu()


def _count_allowed(z):
    """(..., K) -> (..., 1): how many entries are not -inf, in the dtype of z."""
    return (z > -torch.inf).sum(-1, keepdim=True).to(z.dtype)


def _centred(x, mask):
    """x minus its mean over the entries where `mask` is 1, and 0 at the others."""
    x = x * mask
    return x - mask * (x.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True))


def _ranked(x):
    """x sorted, largest first. On a CPU by numpy, at K = 64 ten times as fast as torch."""
    if x.is_cpu:
        return torch.from_numpy(-np.sort(-x.numpy(), -1))
    return x.sort(-1, descending=True).values


# --- Its relatives, for comparison -------------------------------------------------------------

def sparsestmax_released(logits, progress=0.0, dim=-1):
    """Sparsestmax as the authors of [2] and [3] published it in code: another map.

    It starts from the *support* of sparsemax and measures the radius r from the centre of that
    face, not from the centre of the simplex. As long as sparsemax drops nobody the two are one;
    once it does, this one is further along for the same r. (What their code did at ties, NaN among
    it, is not imitated.) Arguments, result and errors: see `sparsestmax`.

    >>> z, r_c = torch.tensor([.9, .8, -.5]), (2 / 3) ** .5
    >>> sparsestmax(z, .3 / r_c)                        # the edge's middle is .41 from the centre
    tensor([0.5500, 0.4500, 0.0000])
    >>> sparsestmax_released(z, .3 / r_c)               # .3 from the edge's middle
    tensor([0.7121, 0.2879, 0.0000])
    """
    def rows(z, progress):
        radius2 = progress ** 2 * (1 - 1 / _count_allowed(z))  # (..., 1)
        z = z.masked_fill(sparsemax(z) == 0, -torch.inf)
        return _Project.apply(z, radius2, torch.finfo(logits.dtype).eps)[0]
    return _apply(rows, logits, progress, dim)


def sparsemax(logits, progress=0.0, dim=-1):
    """The point of the simplex nearest to the logits. Exact zeros, but `progress` is ignored.

    It is sparsestmax with a ball of radius 0. Arguments, result and errors: see `sparsestmax`.
    Source: Martins & Astudillo, arXiv 1602.02068.

    >>> sparsemax(torch.tensor([.3, .1, -.1]))
    tensor([0.5333, 0.3333, 0.1333])
    >>> sparsemax(torch.tensor([.9, .8, -.5]))
    tensor([0.5500, 0.4500, 0.0000])
    """
    return _apply(lambda z, progress: sparsestmax(z, 0 * progress), logits, progress, dim)


def softmax(logits, progress=0.0, dim=-1):
    """p proportional to exp(z); it maximises <p, z> + entropy(p). Never zero, no schedule.

    Arguments, result and errors: see `sparsestmax`.

    >>> softmax(torch.tensor([.3, .1, -.1]))
    tensor([0.4018, 0.3289, 0.2693])
    """
    return _apply(lambda z, progress: z.softmax(-1), logits, progress, dim)


def gumbel(logits, progress=0.0, dim=-1):
    """One candidate drawn with softmax's probabilities; a softmax's gradient stands in for its own.

    Add Gumbel noise, -log(-log(uniform)), to the logits: the argmax is k with probability
    softmax(z)_k. An argmax has no slope, so the backward pass uses that of
    softmax((z + noise) / temperature): the "straight-through" estimate, biased but practical. The
    temperature falls from 1 to .1 (geometrically) with progress. At progress 1 the noise is off, as
    a search's end must not be a draw: the largest logit, the first of them at a tie.

    Random: a new draw per call, from torch's global generator (under `torch.func.vmap` say
    randomness="different"). Its zero weights *do* carry a gradient, and `gumbel.dense = True` says
    so: who skips branches of weight zero has to compute them here.

    Arguments, result and errors: see `sparsestmax`. Source: [4]; the schedule is ours.

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
        return hard + (soft - soft.detach())  # value: one-hot; slope: that of `soft`
    return _apply(rows, logits, progress, dim)


gumbel.dense = True

# --- Maps by name ------------------------------------------------------------------------------

ACTIVATIONS = {
    "sparsestmax": sparsestmax,
    "sparsemax": sparsemax,
    "softmax": softmax,
    "gumbel": gumbel,
    "sparsestmax_released": sparsestmax_released,
}

# What each promises beyond being a map onto the simplex. tests/checks.py holds it to that.
softmax.promises = sparsemax.promises = {"deterministic", "exact gradient"}
sparsestmax.promises = {"deterministic", "exact gradient", "one-hot at progress 1"}
sparsestmax_released.promises = sparsestmax.promises
gumbel.promises = {"one-hot at progress 1"}


def get_activation(name: str):
    """The map of this name in ACTIVATIONS, or "FILE.py:FUNCTION", which runs that file's code.

    ValueError: no such name, file or function, or it is no map onto the simplex, or none by which a
    search would learn.
    """
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    file, _, function = name.rpartition(":")
    if not file.endswith(".py"):
        raise ValueError(f"{name!r} is neither one of {', '.join(ACTIVATIONS)} nor of the form "
                         "FILE.py:FUNCTION")
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file}")
    try:
        activation = runpy.run_path(file).get(function)
    except (Exception, SystemExit) as error:  # it is somebody's code: anything may happen
        raise ValueError(f"{file} does not run: {type(error).__name__}: {error}") from error
    if not callable(activation):
        raise ValueError(f"{file} has no function {function}")
    # Try it on shapes that a search has: a budget may leave one exit, few channels two widths.
    for z in (torch.tensor([[.3, .1, -.1], [0., 0., 0.], [9., -9., 0.]]), torch.zeros(2, 4, 5),
              torch.linspace(-2, 2, 55), torch.tensor([[.1, 0.]]), torch.zeros(2, 1)):
        for progress in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0):
            try:
                p = activation(z.clone().requires_grad_(), progress)
            except Exception as error:
                fails = ("is not solved yet" if isinstance(error, NotImplementedError) else
                         f"fails as f(logits of shape {tuple(z.shape)}, {progress}): "
                         f"{type(error).__name__}")
                raise ValueError(f"{name} {fails}: {error}") from error
            if complaint := off_simplex(z, p):
                raise ValueError(f"{name} at progress {progress}: {complaint}")
    # What has weight zero is left out of a step, gradient and all, so a map must not count on it.
    # (Tried while a search is young: near the end a map may rightly be a corner, and constant.)
    z = torch.linspace(-2, 2, 55, requires_grad=True)
    weights = [p for progress in (0.0, 0.25, 0.5) if (p := activation(z, progress)).requires_grad]
    if not weights:
        raise ValueError(f"{name}: the weights carry no gradient (detach, NumPy, argmax?), so a "
                         "search would learn nothing")
    try:
        slope, = torch.autograd.grad(sum((z.detach() * p)[p == 0].sum() for p in weights), z,
                                     materialize_grads=True)
    except Exception as error:
        raise ValueError(f"{name}: its gradient fails: {type(error).__name__}: {error}") from error
    if slope.any() and not getattr(activation, "dense", False):
        raise ValueError(f"{name}: weights that are zero carry a gradient, which a search leaves "
                         f"out: add a line {function}.dense = True, and it computes them as well")
    return activation


def off_simplex(z, p, tolerance=1e-4):
    """What keeps p from being weights for the logits z, in words; None if nothing does."""
    if not isinstance(p, torch.Tensor):
        return f"the result is no tensor but {'None' if p is None else 'a ' + type(p).__name__}"
    if p.shape != z.shape:
        return f"the result has shape {tuple(p.shape)}, the logits have {tuple(z.shape)}"
    if p.dtype != z.dtype:
        return f"the result is {p.dtype}, the logits are {z.dtype}"
    rows, inputs = (x.detach().reshape(-1, x.shape[-1]).tolist() for x in (p, z))
    for i, (row, z) in enumerate(zip(rows, inputs)):
        short = [round(value, 4) for value in z[:6]]
        # Six digits may look like 1 where it is not: how far off is said as well.
        for value in row:
            if not 0 <= value <= 1 + tolerance:  # so written, NaN fails too
                above = f" ({value - 1:.2g} above 1)" if value > 1 else ""
                return f"row {i}, logits {short}, has the weight {value:.6g}, not in [0, 1]{above}"
        off = sum(row) - 1
        if abs(off) > tolerance:
            return (f"row {i}, logits {short}, sums to {sum(row):.6g} "
                    f"({abs(off):.2g} {'above' if off > 0 else 'below'} 1)")
    return None


def main():
    z = torch.tensor([.3, .28, .22, .2])
    print("logits      ", "  ".join(f"{v:6.2f}" for v in z.tolist()))
    for progress in (0, .2, .3, .4, .5, .6, .7, .8, .9, 1.):
        p = sparsestmax(z, progress)
        digits = "  ".join(f"{v:6.4f}" for v in p.tolist())
        print(f"progress {progress:.1f}", digits, f"  {int((p > 0).sum())} alive")


if __name__ == "__main__":
    from search_space import shown
    with shown():
        main()
