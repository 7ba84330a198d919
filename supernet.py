"""The relaxation: every network of the space at once, weighted, melting into one.

search_space.py spells finished networks. Here each of the three questions becomes a point on a
simplex, made from learnable logits by *one* function f(logits, progress) of sparsestmax.py
(arXiv 2101.06658, section 3):

    level     logits  shape (full x4 space)  what the weights mix
    network   gamma   (55,)                  the exits:  SR = sum_i gamma_i exit_i
    cell      alpha   (35, 5, 4)             a position's operations:  y = sum_k alpha_k op_k(x)
    kernel    beta    (35, 4, 5)             the widths between two positions: one mask, below

*One mask for all widths.* A kernel of width w is the leading slice of the widest kernel. So mixing
widths needs no pass per width: channel ch belongs to every width above ch, so its total weight is

    m[ch] = sum_w beta_w 1[ch < w]        a staircase that falls from 1

and one convolution at the widest live width, times m, is the whole mixture.

*Widths inside an operation* are masked too. That is an approximation: a ReLU of masked sums is not
the mixture of the ReLUs. dws has four hidden channels per input channel, so its mask is the
input's, each step four times as long. Between the two convolutions of residual the output's mask
is used. A shortcut is the identity if the two widths agree and a 1x1 convolution if not; with p the
chance that they agree, it becomes p x + (1 - p) conv(x). At one-hot weights (1 for one candidate, 0
for the others) each of these *is* the operation of search_space.py. That is why the found network
can take over its kernels as they are, and need not start again.

*Zeros are free.* Sparse maps give weights that are exactly zero, and such a zero gets no gradient.
So a dead operation is not computed, channels past the widest live width are sliced off, and a node
of the path tree is computed only if a live exit lies at or below it. This changes no number
(tests/test_supernet.py compares with a *dense* evaluation, which computes all). A map whose zeros
do carry a gradient, such as the straight-through gumbel, says so by an attribute `dense = True` and
is evaluated in full.

    >>> net = Supernet(Space(scale=2, channels=16, cells=2, positions=2), sparsestmax)
    >>> weights = net.weights(progress=1.0)          # at the end of the schedule: all one-hot
    >>> found = net.inherit(net.derive(weights))
    >>> x = torch.rand(1, 3, 8, 8)
    >>> (found(x) - net(x, weights)).abs().max().item() < 1e-5
    True
"""
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import nn
from torch.utils.checkpoint import checkpoint

from search_space import (OPERATIONS, Architecture, Costs, Network, Space, Tail, Up, cells_on, conv,
                          counted_costs, enlarge)
from sparsestmax import sparsestmax

# The network level runs through its schedule this much faster than the others. Nearly all the work
# of a dense supernet is in paths that will be dropped, and a cell's operations are better chosen
# once it is known on whose path it lies.
LEAD = 2.0
COST, PRICE, ORDER = 0.03, 0.03, 1e-3  # weights of what is added to the loss, see `penalty`


class Weights(NamedTuple):
    """A point on every simplex: the candidates' weights. Along the last dimension they sum to 1.

    (Also holds the same as plain numbers, see `Supernet.read`, or over time, see `draw_levels`.)
    """
    gamma: torch.Tensor  # (nodes,)
    alpha: torch.Tensor  # (cells, positions, operations)
    beta: torch.Tensor  # (cells, positions - 1, widths)


def live_choices(weights: Weights) -> tuple[int, float, float]:
    """How many exits have a weight, and how many operations and widths per choice (on average)."""
    gamma, alpha, beta = (w > 0 for w in weights)
    widths = beta.sum(-1).float().mean().nan_to_num(1.0)  # no choice at all where positions == 1
    return int(gamma.sum()), alpha.sum(-1).float().mean().item(), widths.item()


# --- One cell of the supernet ------------------------------------------------------------------
# The weights exist twice in what follows: as tensors, which carry the gradient, and as plain
# numbers called `values`, at which Python looks to decide what to skip.

def decided(values: np.ndarray) -> bool:
    """Are all these weights 0 or 1? Then nothing needs weighing."""
    return ((values == 0) | (values == 1)).all()  # np.isin would take ten times as long


class Side(NamedTuple):
    """What lies between two positions of a cell, or at its ends: channels of an uncertain width."""
    mask: torch.Tensor  # (nf,), the staircase
    values: np.ndarray  # (widths,)
    live: int  # channels up to the widest live width
    agrees: torch.Tensor | None  # (1,), chance to be as wide as the side before

    def masked(self, x: torch.Tensor, repeat: int = 1) -> torch.Tensor:
        """x (B, repeat * live, H, W) times the staircase, each step `repeat` times as long."""
        if decided(self.values):
            return x  # all that is left of the staircase are ones
        mask = self.mask[:self.live].repeat_interleave(repeat)  # (repeat * live,)
        return x * mask.to(x.dtype).view(1, -1, 1, 1)


def sliced(layer: nn.Conv2d, x: torch.Tensor, d: int) -> torch.Tensor:
    """`layer` as if it had only x's channels and `d` outputs: (B, c, H, W) -> (B, d, H, W)."""
    if layer.groups > 1:  # depthwise: a kernel for each channel
        return F.conv2d(x, layer.weight[:d], padding=layer.padding, groups=d)
    return F.conv2d(x, layer.weight[:d, :x.shape[1]], padding=layer.padding)


def mixed_shortcut(layer: nn.Conv2d, x: torch.Tensor, inner: Side, outer: Side) -> torch.Tensor:
    """p x + (1 - p) conv(x), where p is the chance that the widths on both sides agree."""
    d, p = outer.live, outer.agrees[0]  # 0-d
    if (inner.values * outer.values).sum() == 0:  # no width is possible on both sides: p is 0
        return sliced(layer, x, d)
    missing = max(0, d - x.shape[1])  # channels that the identity does not have: 0
    same = F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x[:, :d]  # (B, d, H, W)
    if decided(inner.values) and decided(outer.values):
        return same
    return p * same + (1 - p) * sliced(layer, x, d)


def mixed_operation(name: str, op: nn.Module, x: torch.Tensor, inner: Side, outer: Side):
    """The operation `name` between two sides: (B, inner.live, H, W) -> (B, outer.live, H, W).

    Line for line the forward pass of search_space.py, each layer sliced, each new width masked.
    Only the mask on the result is left to the caller, as it is the same for all operations of a
    position.
    """
    d = outer.live
    if name in ("skip1x1", "conv3x3"):
        return F.relu(sliced(op.conv, x, d))
    if name == "residual":
        hidden = outer.masked(F.relu(sliced(op.conv1, x, d)))  # (B, d, H, W)
        y = sliced(op.conv2, hidden, d)
    elif name == "dws":
        c4 = 4 * inner.live
        hidden = inner.masked(F.relu(sliced(op.expand, x, c4)), repeat=4)  # (B, 4c, H, W)
        y = sliced(op.project, F.relu(sliced(op.depthwise, hidden, c4)), d)
    return F.relu(y + mixed_shortcut(op.shortcut, x, inner, outer))  # (B, d, H, W)


class MixedCell(nn.Module):
    """All operations at all positions, at full width, each with kernels of its own."""
    def __init__(self, space: Space):
        super().__init__()
        nf = space.channels
        self.ops = nn.ModuleList(
            nn.ModuleDict({name: make(nf, nf) for name, (make, *_) in OPERATIONS.items()})
            for _ in range(space.positions))
        for position in self.ops:  # between equal widths a shortcut has no weights,
            for op in position.values():  # but a mixture of widths needs its convolution
                if hasattr(op, "shortcut"):
                    op.shortcut = conv(nf, nf, 1)

    def forward(self, x, alpha, values, sides):
        """x (B, nf, H, W) -> the same. alpha: (positions, operations); values: alpha in numpy.

        sides: of type Side, positions + 1 of them.
        """
        y = x
        for i, position in enumerate(self.ops):
            inner, outer, terms = sides[i], sides[i + 1], []
            for k, (name, op) in enumerate(position.items()):
                if values[i, k] != 0:  # a dead operation costs nothing
                    z = mixed_operation(name, op, y, inner, outer)  # (B, outer.live, H, W)
                    terms.append(z if decided(values[i]) else alpha[i, k] * z)
            y = outer.masked(sum(terms[1:], terms[0]))  # sum(terms) alone would begin with 0 + x
        return x + 0.2 * y


# --- The whole tree ----------------------------------------------------------------------------

class Supernet(nn.Module):
    """Every network of `space` at once.

    activation: f(logits (..., K), progress in [0, 1]) -> weights (..., K), see sparsestmax.py.
    spread: standard deviation of the initial logits, small so that no choice starts with a lead.
    recompute: run each cell once more in the backward pass instead of keeping its features: the
    same numbers, a third more time, and memory for one cell's features and every cell's input.
    costs: what the parts cost, of search_space.py; counted in multiply-adds if None.
    ValueError for a space so large that no memory would hold it.
    """
    def __init__(self, space: Space, activation: Callable = sparsestmax, spread: float = 1e-3,
                 recompute: bool = False, costs: Costs | None = None):
        super().__init__()
        self.space, self.activation, self.recompute = space, activation, recompute
        self.costs = costs = costs or counted_costs(space)
        nodes, nf, at = space.nodes, space.channels, space.magnification
        self.cell_of = space.cell_of  # node -> row of alpha and beta
        cells, positions = len(self.cell_of), space.positions
        kernels = cells * positions * sum(op.weights(nf, nf) for op in OPERATIONS.values())
        if kernels > 1e9:  # nearly all there is
            raise ValueError(f"a supernet with {kernels / 1e9:.3g} billion weights fits no memory: "
                             "take fewer channels or cells")
        # The logits are parameters, so they are saved, moved and counted with the rest.
        self.gamma = nn.Parameter(spread * torch.randn(len(nodes)))
        self.alpha = nn.Parameter(spread * torch.randn(cells, positions, len(OPERATIONS)))
        self.beta = nn.Parameter(spread * torch.randn(cells, positions - 1, len(space.widths)))
        self.register_buffer("allowed", torch.arange(len(nodes)))  # exits, see `restrict`

        # Two paths share what lies on their common prefix, and nothing else.
        self.head = conv(3, nf, 3, bias=True)
        self.body = nn.ModuleDict({n: MixedCell(space) if n[-1] == "c" else
                                   Up(nf, at(n) // at(n[:-1])) for n in nodes})
        self.tails = nn.ModuleDict({n: Tail(nf, space.scale // at(n)) for n in nodes})

        # Multiply-adds are integers far beyond float32's 24 bits, so all tables of costs are
        # float64. The cost of exit i is fixed[i] + sum over cells c of on_path[i, c] * cost(c):
        # first what no choice changes (head, tail, upsamplings), then the cells on the way.
        # table: (cells, operations, widths, widths); fixed: (nodes,); on_path: (nodes, cells)
        parts, widths, scale = costs.parts, space.widths, space.scale
        table = [[[[parts[name, c, d, at(n)] for d in widths] for c in widths]
                  for name in OPERATIONS] for n in self.cell_of]
        fixed = [parts["head", 3, nf, 1] + parts["tail", nf, 3 * (scale // at(n)) ** 2, at(n)] +
                 sum(parts["up", nf, nf, at(m)] for m in nodes if n.startswith(m) and m[-1] == "u")
                 for n in nodes]
        on_path = [[n.startswith(m) for m in self.cell_of] for n in nodes]
        for name, numbers in ("table", table), ("fixed", fixed), ("on_path", on_path):
            self.register_buffer(name, torch.from_numpy(np.array(numbers, float)), persistent=False)
        stairs = (torch.arange(nf) < torch.tensor(space.widths)[:, None]).float()
        parents = torch.tensor([nodes.index(n[:-1]) for n in nodes[1:]])
        self.register_buffer("stairs", stairs, persistent=False)  # (widths, nf): 1[ch < w]
        self.register_buffer("parents", parents, persistent=False)  # (nodes - 1,)

    def logits(self) -> list[nn.Parameter]:
        return [self.gamma, self.alpha, self.beta]

    def weights(self, progress: float) -> Weights:
        """THE place where logits become weights. All others read its result."""
        logits = self.gamma[self.allowed], self.alpha, self.beta
        schedule = min(1.0, LEAD * progress), progress, progress
        # (With one position in a cell there is no width to choose: beta is empty.)
        gamma, alpha, beta = (self.activation(z, t) if z.numel() else z
                              for z, t in zip(logits, schedule))
        gamma = torch.zeros_like(self.gamma).index_copy(0, self.allowed, gamma)
        return Weights(gamma, alpha, beta)

    def with_ends(self, beta):
        """(cells, positions - 1, widths) -> (cells, positions + 1, widths).

        Adds the two ends of each cell, where the full width has weight 1.
        """
        end = beta.new_zeros(len(beta), 1, beta.shape[-1])
        end[..., -1] = 1
        return torch.cat([end, beta, end], 1)

    def read(self, weights: Weights, dense: bool = False) -> Weights:
        """The same as plain numbers, in numpy, by which Python decides what to skip.

        Shapes as in Weights, but beta with the cells' ends: (cells, positions + 1, widths). A GPU
        is waited for here and nowhere else in a step. dense: all of them read as 1/2, neither dead
        nor decided, so nothing is skipped; for tests. So too for maps whose zeros have a gradient,
        but forbidden exits, which have no logit to move, stay zero.
        """
        parts = weights.gamma, weights.alpha, self.with_ends(weights.beta)
        numbers = torch.cat([w.detach().flatten() for w in parts]).cpu().numpy()  # one transfer
        if dense or getattr(self.activation, "dense", False):
            numbers = np.full_like(numbers, 0.5)
            if not dense:
                numbers[np.setdiff1d(np.arange(len(weights.gamma)), self.allowed.cpu())] = 0
        pieces = np.split(numbers, np.cumsum([w.numel() for w in parts[:-1]]))
        return Weights(*(piece.reshape(w.shape) for piece, w in zip(pieces, parts)))

    def forward(self, x: torch.Tensor, weights: Weights, values: Weights | None = None):
        """The weighted sum of all exits: (B, 3, h, w) -> (B, 3, scale h, scale w).

        weights: from `weights(progress)`. values: from `read(weights)`; called here if None.
        """
        space, nodes = self.space, self.space.nodes
        # 1. What the weights of the widths mean at every side of every cell: a mask, and the chance
        #    that the width is the same as at the side before.
        beta = self.with_ends(weights.beta)  # (cells, positions + 1, widths)
        masks = (beta[..., None] * self.stairs).sum(-2)  # (cells, positions + 1, nf)
        agrees = (beta[:, :-1] * beta[:, 1:]).sum(-1)  # (cells, positions)
        gamma_v, alpha_v, beta_v = values or self.read(weights)
        # 2. A node is needed if a live exit lies at it or below it.
        needed = {exit[:i] for exit, g in zip(nodes, gamma_v) if g != 0
                  for i in range(1, len(exit) + 1)}
        # 3. Walk the tree, parents first. trail[depth] holds the features at the node last visited
        #    at that depth, so trail[depth - 1] are its parent's, whatever branches came between.
        trail = [self.head(x)] + [None] * max(map(len, nodes))
        images = []  # of the live exits
        for i, node in enumerate(nodes):
            if node not in needed:
                continue
            h = trail[len(node) - 1]  # (B, nf, H, W)
            if node[-1] == "u":
                h = self.body[node](h)  # (B, nf, factor H, factor W)
            else:
                c = self.cell_of[node]
                sides = [Side(mask, v, space.widths[np.flatnonzero(v)[-1]], p)
                         for mask, v, p in zip(masks[c], beta_v[c], [None, *agrees[c].split(1)])]
                arguments = h, weights.alpha[c], alpha_v[c], sides
                # (A cell whose operations are decided has little to keep.)
                if self.recompute and torch.is_grad_enabled() and not decided(alpha_v[c]):
                    h = checkpoint(self.body[node], *arguments, use_reentrant=False,
                                   preserve_rng_state=False)
                else:
                    h = self.body[node](*arguments)
            trail[len(node)] = h
            if gamma_v[i] != 0:
                y = self.tails[node](h)  # (B, 3, scale h, scale w)
                if space.output == "tanh":
                    y = (torch.tanh(y) + 1) / 2
                images.append(y if decided(gamma_v) else weights.gamma[i] * y)
        # 4. The exits' weights sum to 1, so the bicubic base is added once.
        out = sum(images[1:], images[0])
        return out if space.output == "tanh" else out + enlarge(x, space.scale)

    # --- The budget ----------------------------------------------------------------------------
    # It acts three times. Before the search: `restrict` forbids the exits that cannot fit. During
    # the search: `penalty` pulls the expected cost to a target. After it: `derive` repairs the
    # choice, should it miss the budget all the same.

    def exit_costs(self, weights: Weights) -> torch.Tensor:
        """Expected cost of every exit, for a 1280x720 output: float64 (nodes,).

        The expectation over independent choices is exact, because an operation's cost involves the
        widths on its two sides only: E = sum_k sum_ij alpha_k beta_in(i) beta_out(j) cost(k, i, j).
        At one-hot weights the chosen exit's is that of the derived network, to the last unit.
        """
        alpha, beta = weights.alpha.double(), self.with_ends(weights.beta.double())
        cells = torch.einsum("cpk,cpi,ckij,cpj->c", alpha, beta[:, :-1], self.table, beta[:, 1:])
        return self.fixed + self.on_path @ cells

    def cost(self, weights: Weights) -> torch.Tensor:
        """Expected cost for a 1280x720 output: 0-d, float64, differentiable."""
        return weights.gamma.double() @ self.exit_costs(weights)

    def penalty(self, weights: Weights, target: float, progress: float) -> torch.Tensor:
        """What the budget and the order demand of the logits: 0-d, added to their loss.

        Say that exit i is expected to cost c_i. On a log scale, where twice the target and half of
        it are equally bad, it is off by

            off_i = log(c_i / target) + progress * log(cost at progress 1 / mean cost)

        At progress 1 one network is left (if the map decides). Were it that of today's logits, it
        might cost more or less than the mean does now. The second part, the same for all exits and
        without gradient, shifts every c_i by that ratio, more and more as progress rises. Then

            COST  * sum_i gamma_i off_i^2         moves operations and widths: exits to the target
            PRICE * sum_i gamma_i max(0, off_i)   moves the path: away from what is too dear
            ORDER * order_loss                    moves the path: a deeper exit must earn its depth

        Each exit is judged, not the mean cost: else one at twice the target and one at nothing
        would look right. Without the price the search picks a path with an early "u" while its
        cells are large, and then has to shrink them to 1x1 convolutions (seen at x2, 12G). The
        price asks nothing of exits that are cheaper than the target: their cells can grow.
        """
        costs = self.exit_costs(weights)  # (nodes,)
        off = torch.log(costs / target).float()
        with torch.no_grad():
            mean = weights.gamma.double() @ costs
            off += progress * torch.log(self.cost(self.weights(1.0)) / mean).float()
        # (Detached: each term moves what it is meant to move, and nothing else.)
        cells = weights.gamma.detach() @ off ** 2
        exits = weights.gamma @ F.relu(off.detach())
        return COST * cells + PRICE * exits + ORDER * self.order_loss(weights)

    def order_loss(self, weights: Weights) -> torch.Tensor:
        """How much exits outweigh their parents: max(0, child - parent), summed over all edges.

        What the paper calls sorting ("sorted sparsestmax"); it favours shallow exits. Bounded, and
        zero where no exit outweighs its parent. (A forbidden parent weighs 0, so its children
        always pay. The authors' released code sums child - parent of the raw logits along each
        complete path. All between the ends cancels: what is left is the sum over leaves minus
        their number times the root, without a floor; see tests/claims.py.)
        """
        return F.relu(weights.gamma[1:] - weights.gamma[self.parents]).sum()

    # --- From weights to one network -----------------------------------------------------------

    def derive(self, weights: Weights, budget: tuple[float, float] | None = None,
               mean: Weights | None = None) -> Architecture:
        """The candidate with the largest weight at every choice; within `budget`, if it is given.

        budget: (least, most) cost for a 1280x720 output. If the largest weights miss it, the least
        certain choices are changed: to take b in place of a loses
        log(mean weight of a / mean weight of b), or nothing where b's is the larger, and the
        changes of the smallest total loss win. mean: the weights summed or averaged over the whole
        search; `weights` if None. ValueError if no network is found within the budget.
        """
        weights, mean = ([w.detach().double().cpu().numpy() for w in each]
                         for each in (weights, mean or weights))
        # 1. As decided now, the largest weight at every choice. Nothing else to do if that will do.
        picks = [w.argmax(-1) for w in weights]
        architecture = self._spell(*picks)
        if budget is None or budget[0] <= self.costs.of(architecture) <= budget[1]:
            return architecture
        # 2. A score for every candidate: 0 for what is decided now, else minus what it loses.
        scores = []
        for w, pick in zip(mean, picks):
            w = np.log(np.maximum(w, 1e-9))
            scores.append(np.minimum(w - np.take_along_axis(w, np.expand_dims(pick, -1), -1), 0))
        # 3. The best total score among the networks within the budget.
        return self._spell(*self._knapsack(*scores, *budget))

    def inherit(self, architecture: Architecture) -> Network:
        """The network with its learned weights. At one-hot weights it computes what we compute."""
        network = Network(architecture).to(self.gamma.device)
        with torch.no_grad():
            for parameter, source in self.origins(network):
                parameter.copy_(leading(source, parameter))
        return network

    def memory_of(self, network: Network, adam: torch.optim.Adam) -> dict:
        """What Adam remembers of our kernels, for those of `network`: {parameter: its state}.

        For every number of a kernel Adam keeps a mean gradient and a mean square. Without them it
        would take its first steps blind, and the loss would jump. They have the kernel's shape, so
        they are cut to the leading slice as the kernel is; the count of steps is one number. (What
        was never computed has no memory, and starts afresh.)
        """
        return {parameter: {name: (value if name == "step" else leading(value, parameter)).clone()
                            for name, value in adam.state[source].items()}
                for parameter, source in self.origins(network) if adam.state.get(source)}

    def origins(self, network: Network):
        """Pairs (parameter of `network`, parameter of ours whose leading slice it is)."""
        a = network.architecture
        pairs = [(network.head, self.head), (network.tail, self.tails[a.path])]
        cells = iter(a.operations)
        for i, layer in enumerate(network.body):
            mine = self.body[a.path[:i + 1]]
            pairs += ([(layer, mine)] if a.path[i] == "u" else
                      [(op, ops[name]) for op, ops, name in zip(layer.ops, mine.ops, next(cells))])
        for layer, mine in pairs:
            for name, parameter in layer.named_parameters():
                yield parameter, mine.get_parameter(name)

    # --- Keeping a budget ----------------------------------------------------------------------

    def restrict(self, least: float, target: float, most: float) -> None:
        """Forbid exits that cannot fit, so that they are never computed.

        An exit is allowed if its cheapest network costs `target` or less (or is the cheapest of
        all), and its dearest `least` or more. If the knapsack finds no network from `least` to
        `most` there, all are allowed that can come down to `most`. ValueError, naming what is
        possible, if that leaves nothing.
        """
        # An exit may pass these bounds and still have no network just within the budget, so the
        # knapsack is asked whether there is one.
        low, high = self.cost_range()
        for dearest in max(target, low.min()), most:
            allowed = np.flatnonzero((low <= dearest) & (high >= least))
            self.allowed = torch.from_numpy(allowed).to(self.allowed.device)
            try:
                self._knapsack(*(np.zeros(p.shape) for p in self.logits()), least, most)
                return
            except ValueError:
                if dearest == most:
                    raise

    def cost_range(self) -> tuple[np.ndarray, np.ndarray]:
        """What the cheapest and the most expensive network at every exit cost, (nodes,) each.

        The same walk twice, with minimum and with maximum. value[c, w]: the cheapest (or dearest)
        way through the positions of cell c so far that ends in width w.
        """
        table, bounds = self.table.cpu().numpy(), []  # (cells, operations, widths, widths)
        for better, worst in (np.minimum, np.inf), (np.maximum, -np.inf):
            value = np.full((len(table), table.shape[-1]), worst)
            value[:, -1] = 0  # a cell begins at full width
            for _ in range(self.space.positions):
                value = better.reduce(value[:, None, :, None] + table, axis=(1, 2))
            bounds.append(self.fixed.cpu().numpy() + self.on_path.cpu().numpy() @ value[:, -1])
        return tuple(bounds)

    def _spell(self, exit, operations, widths) -> Architecture:
        """Candidates' numbers, for all cells -> the Architecture of the cells on `exit`'s path."""
        path, names = self.space.nodes[exit], tuple(OPERATIONS)
        cells = [self.cell_of[node] for node in cells_on(path)]
        return self.space.architecture(path, [[names[k] for k in operations[c]] for c in cells],
                                       [[self.space.widths[w] for w in widths[c]] for c in cells])

    def _knapsack(self, gamma, alpha, beta, least, most, buckets=2000):
        """argmax of gamma[exit] + sum alpha[op] + sum beta[width] among networks within the budget.

        Only at allowed exits. gamma, alpha, beta are scores of the candidates here. Every choice is
        an item with a price, and we look for the best selection that costs `least` to `most`: a
        knapsack. Along one path the positions form a chain, so dynamic programming solves it, with
        costs rounded to `buckets`. To be safe against the rounding we stay a few buckets inside
        both bounds, so a network just inside may be missed. ValueError if none is left.
        """
        table, unit = self.table.cpu().numpy(), most / buckets
        beta = np.pad(beta, ((0, 0), (0, 1), (0, 0)), constant_values=-np.inf)
        beta[:, -1, -1] = 0  # a cell ends (and begins) at full width
        best, widest = (-np.inf, None), beta.shape[-1] - 1
        for exit in self.allowed.tolist():
            fixed, on_path = self.fixed[exit].item(), self.on_path[exit].tolist()
            chain = [(c, p) for c, there in enumerate(on_path) if there
                     for p in range(self.space.positions)]
            slack = len(chain) / 2 + 1  # each rounding may be wrong by half a bucket
            low, high = int(np.ceil(least / most * buckets + slack)), int(buckets - slack)
            start = round(fixed / unit)
            if start > high or low > high:
                continue
            # 1. Along the chain. value[w, b]: the best score of all ways to come so far that end in
            #    width w and have spent b buckets.
            value = np.full((widest + 1, high + 1), -np.inf)
            value[widest, start] = gamma[exit]
            steps = []
            for c, p in chain:
                prices = np.rint(table[c] / unit).astype(int)  # (operations, widths, widths)
                value, won = one_further(value, prices, alpha[c, p], beta[c, p])
                steps.append((c, p, prices, won))
            # 2. The best end: at full width, within the budget. 3. If no exit before had a better
            #    one, walk back from there and note what was chosen on the way.
            bucket, width = low + int(value[widest, low:].argmax()), widest
            score = value[width, bucket]
            if score > best[0]:
                operations, widths = np.zeros((2, *alpha.shape[:2]), int)
                for c, p, prices, won in reversed(steps):
                    k, before = won[width, bucket]
                    operations[c, p], widths[c, p] = k, width
                    bucket, width = bucket - prices[k, before, width], before
                best = score, (exit, operations, widths[:, :-1])
        if best[1] is None:
            words, (low, high) = self.costs.words, self.cost_range()
            raise ValueError(f"no network was found that costs {words(least)} to {words(most)}: "
                             f"the smallest of this space has {words(low.min())}, the largest of "
                             f"this space has {words(high.max())} (for a 1280x720 output)")
        return best[1]


def one_further(value, prices, operation_scores, width_scores):
    """One position further along a chain: value[i, b] -> (value[j, b], won[j, b]).

    won: the (operation, width before) by which the best way to j with b buckets came.
    """
    new, won = np.full_like(value, -np.inf), np.zeros((*value.shape, 2), dtype=int)
    for (k, i, j), price in np.ndenumerate(prices):
        if price < value.shape[1]:
            candidate = value[i, :value.shape[1] - price] + operation_scores[k] + width_scores[j]
            better = candidate > new[j, price:]
            new[j, price:][better] = candidate[better]
            won[j, price:][better] = k, i
    return new, won


def leading(source: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The leading slice of `source` that has the shape of `like`."""
    return source[tuple(map(slice, like.shape))]


# --- Its picture -------------------------------------------------------------------------------

# Small weights are pale, large ones dark; no weight looks like none (grey, hatched) or like paper.
HEAT = ListedColormap(colormaps["YlGnBu"](np.linspace(0.25, 1, 256)))
ZERO = dict(facecolor="#EEEEEE", edgecolor="#AAAAAA", hatch="////")


def draw_heat(axis, steps, level: np.ndarray, labels):
    """Weights over time as a heat map, exact zeros hatched. level: (T, rows); labels: the rows'."""
    edges = np.append(steps, 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[-1] + 1)
    axis.patch.set(**ZERO)  # what shows where nothing is drawn
    mesh = axis.pcolormesh(edges, np.arange(len(labels) + 1), np.ma.masked_equal(level.T, 0),
                           vmin=0, vmax=1, cmap=HEAT)
    axis.set_yticks(np.arange(len(labels)) + 0.5, labels)
    axis.set_ylim(len(labels), 0)
    return mesh


def explain_heat(figure, mesh):
    """The colour bar of heat maps, and what is hatched."""
    bar = figure.colorbar(mesh, ax=figure.axes, location="top", label="weight", aspect=60,
                          shrink=0.6)
    bar.ax.legend(handles=[Patch(**ZERO, label="exactly 0")], loc="center left",
                  bbox_to_anchor=(1.02, 0.5), frameon=False)


def draw_levels(space: Space, path: str, steps, weights: Weights) -> Figure:
    """The three levels over time, as heat maps: all exits, then the cells on `path`.

    Colour is weight; hatched is exactly zero. steps: (T,). weights: numpy, a leading dimension T
    each.
    """
    cells = [space.cell_of[node] for node in cells_on(path)]
    panels = [("network:\nall exits", weights.gamma, space.nodes)]
    for title, level, names in (("cell: operations", weights.alpha, OPERATIONS),
                                ("kernel: widths", weights.beta, space.widths)):
        rows = level[:, cells]  # (T, cells on the path, places, candidates)
        labels = [f"{c + 1}.{p + 1}: {name}" for c in range(rows.shape[1])
                  for p in range(rows.shape[2]) for name in names]
        if labels:  # with one position there is no inner width
            panels.append((f"{title}\non the path {path}", rows.reshape(len(rows), -1), labels))
    height = 2.5 + 0.18 * max(len(labels) for *_, labels in panels)
    figure = Figure(figsize=(10, height), layout="constrained")
    for axis, (title, level, labels) in zip(figure.subplots(1, len(panels)), panels):
        mesh = draw_heat(axis, steps, level, labels)
        axis.set(title=title, xlabel="training step")
        axis.tick_params(labelsize=10)
    explain_heat(figure, mesh)
    return figure
