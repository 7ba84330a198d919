"""The continuous relaxation: every network of the space at once, weighted, melting into one.

search_space.py spells discrete networks; here each of the three questions becomes a point on a simplex, produced
from learnable logits by *one* activation f(logits, progress) of sparsestmax.py (arXiv 2101.06658, section 3):

    level     logits  shape (full x4 space)  what the weights mix
    network   gamma   (55,)                  the exits: SR = sum_i gamma_i exit_i
    cell      alpha   (35, 5, 4)             the operations of a position: y = sum_k alpha_k op_k(x)
    kernel    beta    (35, 4, 5)             the widths between two positions: one staircase mask, below

*Widths by one mask.* A kernel of width w is the leading slice of the widest one, so the mixture over widths needs no
pass per width: channel number ch survives in every width larger than ch, hence its total weight is the staircase

    m[ch] = sum_w beta_w 1[ch < w]

and one convolution at the widest live width, times m, is the whole mixture. Where a width shows up inside an operation
the same rule is applied, though behind a ReLU it is no longer the exact mixture: the hidden channels of "dws" are four
for each input channel, so their staircase is the input's, each step four times as long; between the two convolutions
of "residual" lies the output's staircase; and a shortcut is p x + (1 - p) conv(x), p being the probability that the
two widths agree. At one-hot weights each of these *is* the operation of search_space.py. That is why inheriting is an
identity and needs no retraining.

*Zeros are free.* Sparse activations give weights that are exactly zero, and a zero gets no gradient. So a
dead operation is not computed, channels past the widest live width are sliced off, and a node of the path tree is
computed only if a live exit lies at or below it. None of this changes a number (tests/test_supernet.py compares with
the dense evaluation, values and gradients). An activation whose zeros do carry a gradient, such as the
straight-through gumbel, says so by an attribute `dense = True` and is evaluated in full.

    >>> net = Supernet(Space(scale=2, channels=16, cells=2, positions=2), sparsestmax)
    >>> weights = net.weights(progress=1.0)                    # at the end of the schedule: all one-hot
    >>> found = net.inherit(net.derive(weights))
    >>> x = torch.rand(1, 3, 8, 8)
    >>> (found(x) - net(x, weights)).abs().max().item() < 1e-5
    True
"""
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure
from torch import nn
from torch.utils.checkpoint import checkpoint

from search_space import (COLOURS, OPERATIONS, Architecture, Costs, Network, Space, Tail, cells_on, conv, cost_in_words,
                          counted_costs, enlarge, magnification, make_up, sum_of_parts, tree_layout)
from sparsestmax import sparsestmax


# The network level runs through its schedule this much faster than the others. Nearly all the work of a dense supernet
# is in paths that will be dropped, and the operations of a cell are better chosen once it is known on whose path it lies.
LEAD = 2.0


class Weights(NamedTuple):
    """A point on every simplex, the candidates' weights (not the convolutions'); the last dimension of each sums to 1."""
    gamma: torch.Tensor                                        # (nodes,)
    alpha: torch.Tensor                                        # (cells, positions, operations)
    beta: torch.Tensor                                         # (cells, positions - 1, widths)


def live_choices(weights: Weights) -> tuple[int, float, float]:
    """Exits with a weight, then operations and widths with a weight per choice (on average)."""
    gamma, alpha, beta = (w > 0 for w in weights)
    return int(gamma.sum()), alpha.sum(-1).float().mean().item(), beta.sum(-1).float().mean().nan_to_num(1.0).item()


# --- One cell of the supernet --------------------------------------------------------------------------------------

def decided(values: np.ndarray) -> bool:
    """Are all these weights 0 or 1? Then nothing needs weighing. (A dense evaluation passes NaN, which is neither.)"""
    return ((values == 0) | (values == 1)).all()               # np.isin would take ten times as long


class Side(NamedTuple):
    """What lies between two positions of a cell, or at its end: some channels, of a width that may be uncertain."""
    mask: torch.Tensor                                         # (nf,), the staircase
    values: np.ndarray                                         # (widths,): their weights in numpy, to decide what to skip
    live: int                                                  # channels up to the widest live width

    def masked(self, x: torch.Tensor, repeat: int = 1) -> torch.Tensor:
        """x (B, repeat * live, H, W) times the staircase."""
        if decided(self.values):
            return x                                           # all that is left of the staircase are ones
        mask = self.mask[:self.live].repeat_interleave(repeat)                     # (repeat * live,)
        return x * mask.to(x.dtype).view(1, -1, 1, 1)


def sliced(layer: nn.Conv2d, x: torch.Tensor, d: int) -> torch.Tensor:
    """`layer` as if it had only x's channels and `d` outputs: (B, c, H, W) -> (B, d, H, W)."""
    if layer.groups > 1:                                       # depthwise: a kernel and a group for each channel left
        return F.conv2d(x, layer.weight[:d], padding=layer.padding, groups=d)
    return F.conv2d(x, layer.weight[:d, :x.shape[1]], padding=layer.padding)


def mixed_shortcut(layer: nn.Conv2d, x: torch.Tensor, inner: Side, outer: Side, p: torch.Tensor) -> torch.Tensor:
    """p x + (1 - p) conv(x), where p = sum_w beta_in(w) beta_out(w) is the chance that the widths agree."""
    d = outer.live
    if (inner.values * outer.values).sum() == 0:               # no width is possible on both sides: p is 0
        return sliced(layer, x, d)
    same = x[:, :d] if x.shape[1] >= d else F.pad(x, (0, 0, 0, 0, 0, d - x.shape[1]))       # (B, d, H, W)
    if decided(inner.values) and decided(outer.values):
        return same
    return p * same + (1 - p) * sliced(layer, x, d)


def mixed_operation(name: str, op: nn.Module, x: torch.Tensor, inner: Side, outer: Side, p: torch.Tensor):
    """The operation `name` between two interfaces of uncertain width; (B, inner.live, H, W) -> (B, outer.live, H, W).

    Line for line the forward pass of search_space.py, with each layer sliced and each new width masked. The mask on the
    result is left to the caller, since it is the same for all operations of a position.
    """
    d = outer.live
    if name in ("skip1x1", "conv3x3"):
        return F.relu(sliced(op.conv, x, d))
    if name == "residual":
        hidden = outer.masked(F.relu(sliced(op.conv1, x, d)))                      # (B, d, H, W)
        y = sliced(op.conv2, hidden, d)
    elif name == "dws":
        hidden = inner.masked(F.relu(sliced(op.expand, x, 4 * inner.live)), repeat=4)   # (B, 4c, H, W)
        y = sliced(op.project, F.relu(sliced(op.depthwise, hidden, 4 * inner.live)), d)
    return F.relu(y + mixed_shortcut(op.shortcut, x, inner, outer, p))             # (B, d, H, W)


class MixedCell(nn.Module):
    """All operations at all positions, at full width, with weights of their own."""
    def __init__(self, space: Space):
        super().__init__()
        nf = space.channels
        self.ops = nn.ModuleList(nn.ModuleDict({name: make(nf, nf) for name, (make, *_) in OPERATIONS.items()})
                                 for _ in range(space.positions))
        for position in self.ops:                              # between equal widths a shortcut is the identity, but a
            for op in position.values():                       # mixture of widths may need its 1x1 convolution as well
                if hasattr(op, "shortcut"):
                    op.shortcut = conv(nf, nf, 1)

    def forward(self, x, alpha, alpha_values, sides, agreements):
        """x (B, nf, H, W) -> the same. alpha: (positions, operations); alpha_values: the same as plain numbers.

        sides: one more than positions; agreements: (positions,), the chance that the widths on both sides agree.
        """
        y = x
        for i, position in enumerate(self.ops):
            inner, outer, terms = sides[i], sides[i + 1], []
            for k, (name, op) in enumerate(position.items()):
                if alpha_values[i, k] != 0:                    # a dead operation costs nothing
                    z = mixed_operation(name, op, y, inner, outer, agreements[i])
                    terms.append(z if decided(alpha_values[i]) else alpha[i, k] * z)            # (B, outer.live, H, W)
            y = outer.masked(sum(terms[1:], terms[0]))         # sum(terms) would begin by adding 0 to all of it
        return x + 0.2 * y


# --- The whole tree ------------------------------------------------------------------------------------------------

class Supernet(nn.Module):
    """Every network of `space` at once.

    activation: any map of the form f(logits (..., K), progress in [0, 1]) -> weights (..., K), see sparsestmax.py.
    spread: standard deviation of the initial logits, small enough that no choice starts with a lead.
    recompute: run each cell a second time in the backward pass instead of keeping its activations; the same numbers, a
    third more time, and memory for one cell rather than for the whole tree.
    costs: what the parts cost, of search_space.py; counted in multiply-adds if None.
    """
    def __init__(self, space: Space, activation: Callable = sparsestmax, spread: float = 1e-3, recompute: bool = False,
                 costs: Costs | None = None):
        super().__init__()
        self.space, self.activation, self.recompute = space, activation, recompute
        self.costs = costs = costs or counted_costs(space)
        nodes, nf = space.nodes, space.channels
        self.cell_of = space.cell_of
        self.gamma = nn.Parameter(spread * torch.randn(len(nodes)))
        self.alpha = nn.Parameter(spread * torch.randn(len(self.cell_of), space.positions, len(OPERATIONS)))
        self.beta = nn.Parameter(spread * torch.randn(len(self.cell_of), space.positions - 1, len(space.widths)))
        self.register_buffer("allowed", torch.arange(len(nodes)))                   # the exits that can meet the budget

        # Two paths share what lies on their common prefix, and nothing else.
        self.head = conv(3, nf, 3, bias=True)
        self.body = nn.ModuleDict({n: MixedCell(space) if n[-1] == "c" else make_up(space, n) for n in nodes})
        self.tails = nn.ModuleDict({n: Tail(nf, space.scale // magnification(space, n)) for n in nodes})

        stairs = (torch.arange(nf) < torch.tensor(space.widths)[:, None]).float()
        self.register_buffer("stairs", stairs, persistent=False)                    # (widths, nf): one stair per width
        # Multiply-adds are integers far beyond float32's 24 bits, so every table of costs is float64. The cost of exit i
        # is fixed[i] + sum over cells c of on_path[i, c] * cost(c): what no choice changes, and the cells on the way.
        at = {n: magnification(space, n) for n in nodes}
        table = np.stack([costs.operations[at[n]] for n in self.cell_of])           # (cells, operations, widths, widths)
        fixed = [costs.head + costs.tail[at[n]] + sum((costs.cell if m[-1] == "c" else costs.up)[at[m]]
                                                      for m in nodes if n.startswith(m)) for n in nodes]
        on_path = [[n.startswith(m) for m in self.cell_of] for n in nodes]          # (nodes, cells)
        for name, numbers in ("table", table), ("fixed", fixed), ("on_path", on_path):
            self.register_buffer(name, torch.from_numpy(np.array(numbers, float)), persistent=False)
        self.register_buffer("parents", torch.tensor([nodes.index(n[:-1]) for n in nodes[1:]]), persistent=False)

    def logits(self) -> list[nn.Parameter]:
        return [self.gamma, self.alpha, self.beta]

    def weights(self, progress: float) -> Weights:
        """THE place where logits become weights. Forward pass, derivation, cost, logs and plots all read its result."""
        logits = self.gamma[self.allowed], self.alpha, self.beta
        schedule = min(1.0, LEAD * progress), progress, progress
        gamma, alpha, beta = map(self.activation, logits, schedule)
        return Weights(torch.zeros_like(self.gamma).index_copy(0, self.allowed, gamma), alpha, beta)

    def with_ends(self, beta):
        """(cells, positions - 1, widths) -> (cells, positions + 1, widths): a cell's two ends have the full width."""
        end = beta.new_zeros(len(beta), 1, beta.shape[-1])
        end[..., -1] = 1
        return torch.cat([end, beta, end], 1)

    def read(self, weights: Weights, dense: bool = False) -> Weights:
        """The weights as plain numbers (numpy; beta with a cell's ends), by which Python decides what to skip.

        A GPU is waited for here and nowhere else in a step. dense: all NaN, which is neither 0 nor 1, so that nothing is
        skipped or shortened; for activations whose zeros have a gradient, and for tests and benchmarks.
        """
        parts = weights.gamma, weights.alpha, self.with_ends(weights.beta)
        numbers = torch.cat([w.detach().flatten() for w in parts]).cpu().numpy()                # one transfer for all
        if dense or getattr(self.activation, "dense", False):
            numbers = np.full_like(numbers, np.nan)
        pieces = np.split(numbers, np.cumsum([w.numel() for w in parts[:-1]]))
        return Weights(*(piece.reshape(w.shape) for piece, w in zip(pieces, parts)))

    def forward(self, x: torch.Tensor, weights: Weights, live: Weights | None = None) -> torch.Tensor:
        """(B, 3, h, w) -> (B, 3, scale h, scale w): the weighted sum of all exits.

        weights: from `weights(progress)`. live: from `read(weights)` (numpy, and beta with a cell's two ends), which is called
        if it is None.
        """
        space, nodes = self.space, self.space.nodes
        beta = self.with_ends(weights.beta)                                         # (cells, positions + 1, widths)
        masks = (beta[..., None] * self.stairs).sum(-2)        # (cells, positions + 1, nf); @ would be cast by autocast
        agree = (beta[:, :-1] * beta[:, 1:]).sum(-1)                                # (cells, positions)
        gamma_v, alpha_v, beta_v = live or self.read(weights)
        needed = {exit[:i] for exit, g in zip(nodes, gamma_v) if g != 0 for i in range(1, len(exit) + 1)}
        trail = [self.head(x)] + [None] * max(map(len, nodes))                      # features on the way to a node
        images = []                                            # of the live exits
        for i, node in enumerate(nodes):                       # in preorder: trail[depth - 1] is the parent's
            if node not in needed:
                continue                                       # no live exit here or below
            h = trail[len(node) - 1]                                                # (B, nf, H, W)
            if node[-1] == "u":
                h = self.body[node](h)                                              # (B, nf, factor H, factor W)
            else:
                c = self.cell_of[node]
                sides = [Side(m, v, space.widths[np.flatnonzero(v)[-1]]) for m, v in zip(masks[c], beta_v[c])]
                arguments = h, weights.alpha[c], alpha_v[c], sides, agree[c]
                if self.recompute and torch.is_grad_enabled() and not decided(alpha_v[c]):
                    h = checkpoint(self.body[node], *arguments, use_reentrant=False, preserve_rng_state=False)
                else:
                    h = self.body[node](*arguments)
            trail[len(node)] = h
            if gamma_v[i] != 0:
                y = self.tails[node](h)                                             # (B, 3, scale h, scale w)
                if space.output == "tanh":
                    y = (torch.tanh(y) + 1) / 2
                images.append(y if decided(gamma_v) else weights.gamma[i] * y)
        out = sum(images[1:], images[0])
        return out if space.output == "tanh" else out + enlarge(x, space.scale)     # sum_i gamma_i = 1: the base once

    # --- What the search adds to the loss --------------------------------------------------------------------------
    def exit_costs(self, weights: Weights) -> torch.Tensor:
        """Expected cost of every exit, float64 (nodes,), in the unit of `costs`, for a 1280x720 output.

        The expectation over independent choices is exact, because the cost of an operation involves the widths on
        its two sides only: E = sum_k sum_ij alpha_k beta_in(i) beta_out(j) cost(k, i, j). At one-hot weights it is
        the cost of the derived network, to the last multiply-add.
        """
        alpha, beta = weights.alpha.double(), self.with_ends(weights.beta.double())
        cells = torch.einsum("cpk,cpi,ckij,cpj->c", alpha, beta[:, :-1], self.table, beta[:, 1:])
        return self.fixed + self.on_path @ cells

    def cost(self, weights: Weights) -> torch.Tensor:
        """Expected cost for a 1280x720 output: 0-d, float64, differentiable."""
        return weights.gamma.double() @ self.exit_costs(weights)

    def order_loss(self, weights: Weights) -> torch.Tensor:
        """The "sorted" of sorted sparsestmax: what a deeper exit weighs more than its parent, summed over the tree.

        A hinge on the weights: bounded, and zero where the order holds. Added to the loss it favours shallow exits.
        """
        return F.relu(weights.gamma[1:] - weights.gamma[self.parents]).sum()

    def order_loss_released(self) -> torch.Tensor:
        """The form in the authors' released code, for comparison: raw logits, no hinge, along each complete path.

        It telescopes: all that remains is (sum over leaves) - (number of leaves) * root, without a floor.
        """
        nodes = self.space.nodes
        paths = [[nodes.index(leaf[:i]) for i in range(1, len(leaf) + 1)] for leaf in self.space.leaves]
        return sum((self.gamma[path[1:]] - self.gamma[path[:-1]]).sum() for path in paths)

    # --- From weights to one network -------------------------------------------------------------------------------
    def derive(self, weights: Weights, budget: tuple[float, float] | None = None,
               mean: Weights | None = None) -> Architecture:
        """The architecture with the largest weight at every choice; if `budget` is given, the best one within it.

        budget: (least, most) cost for a 1280x720 output. mean: the weights averaged (or summed) over the whole
        search, `weights` if None. Where the decisions as they stand miss the budget, those are changed that the search
        was least sure of: to decide for b in place of a loses log(mean_a / mean_b), or nothing where b's mean is the
        larger, and the smallest total loss wins. Raises ValueError if no network is found within the budget.
        """
        weights, mean = ([w.detach().double().cpu().numpy() for w in each] for each in (weights, mean or weights))
        picks = [w.argmax(-1) for w in weights]
        architecture = self._spell(*picks)
        if budget is None or budget[0] <= sum_of_parts(architecture, self.costs) <= budget[1]:
            return architecture
        scores = []
        for w, pick in zip(mean, picks):
            w = np.log(np.maximum(w, 1e-9))
            # 0 for what is decided now, a loss for everything else
            scores.append(np.minimum(w - np.take_along_axis(w, np.expand_dims(pick, -1), -1), 0))
        scores[0][np.setdiff1d(np.arange(len(scores[0])), self.allowed.cpu())] = -np.inf
        return self._spell(*self._knapsack(*scores, *budget))

    def _spell(self, exit, operations, widths) -> Architecture:
        path, names = self.space.nodes[exit], tuple(OPERATIONS)
        cells = [self.cell_of[node] for node in cells_on(path)]
        return self.space.architecture(path, [[names[k] for k in operations[c]] for c in cells],
                                       [[self.space.widths[w] for w in widths[c]] for c in cells])

    def _knapsack(self, gamma, alpha, beta, least, most, buckets=2000):
        """argmax of gamma[exit] + sum alpha[op] + sum beta[width] among the networks that cost `least` to `most`.

        Along one path the operations form a chain, so dynamic programming is exact but for the rounding of costs to
        `buckets`: value[w, b] is the best score of a chain so far that ends in width w and has spent b buckets. Rounding
        must break no promise, so networks within a few buckets of either bound may be passed over. ValueError if none is left.
        """
        space, table = self.space, self.table.cpu().numpy()
        unit = most / buckets
        end = np.full((len(beta), 1, beta.shape[-1]), -np.inf)
        end[..., -1] = 0                                       # a cell begins and ends at full width
        beta = np.concatenate([end, beta, end], 1)             # (cells, positions + 1, widths)
        best, widest = (-np.inf, None), len(space.widths) - 1
        for exit, (fixed, on_path) in enumerate(zip(self.fixed.tolist(), self.on_path.tolist())):
            chain = [(c, p) for c, there in enumerate(on_path) if there for p in range(space.positions)]
            slack = len(chain) / 2 + 1                         # each rounding may be wrong by half a bucket
            low, high, start = int(np.ceil(least / most * buckets + slack)), int(buckets - slack), round(fixed / unit)
            if gamma[exit] == -np.inf or start > high or low > high:
                continue
            value = np.full((widest + 1, high + 1), -np.inf)
            value[widest, start] = gamma[exit]
            steps = []                                         # for each position: which (operation, width before) won
            for c, p in chain:
                costs = np.rint(table[c] / unit).astype(int)                        # (operations, widths, widths)
                new, won = np.full_like(value, -np.inf), np.zeros((*value.shape, 2), dtype=int)
                for (k, i, j), cost in np.ndenumerate(costs):
                    if cost <= high:
                        candidate = value[i, :high + 1 - cost] + alpha[c, p, k] + beta[c, p + 1, j]
                        better = candidate > new[j, cost:]
                        new[j, cost:][better] = candidate[better]
                        won[j, cost:][better] = k, i
                steps.append((c, p, costs, won))
                value = new
            bucket, width = low + int(value[widest, low:].argmax()), widest
            if value[width, bucket] > best[0]:
                operations, widths = np.zeros(alpha.shape[:2], int), np.zeros(beta.shape[:2], int)
                score = value[width, bucket]
                for c, p, costs, won in reversed(steps):       # walk back from the end of the chain
                    k, before = won[width, bucket]
                    operations[c, p], widths[c, p + 1] = k, width
                    bucket, width = bucket - costs[k, before, width], before
                best = score, (exit, operations, widths[:, 1:-1])
        if best[1] is None:
            raise ValueError(f"found no network of this space that costs {self._words(least)} to {self._words(most)} "
                             f"(in steps of {self._words(unit)}): change the budget or enlarge the space")
        return best[1]

    def cost_range(self) -> tuple[np.ndarray, np.ndarray]:
        """What the cheapest and the most expensive network at every exit cost, (nodes,) each."""
        table, bounds = self.table.cpu().numpy(), []           # (cells, operations, widths, widths)
        for better, worst in (np.minimum, np.inf), (np.maximum, -np.inf):
            value = np.full((len(table), table.shape[-1]), worst)
            value[:, -1] = 0                                   # value[c, w]: best total of a chain that ends in width w
            for _ in range(self.space.positions):
                value = better.reduce(value[:, None, :, None] + table, axis=(1, 2))
            bounds.append(self.fixed.cpu().numpy() + self.on_path.cpu().numpy() @ value[:, -1])
        return tuple(bounds)

    def _words(self, cost: float) -> str:
        return cost_in_words(cost, self.costs.unit)

    def restrict(self, least: float, target: float, most: float) -> None:
        """Forbid the exits whose networks all cost less than `least` or more than `target`; they are never computed.

        If no network is found between `least` and `target`, all up to the budget `most` is allowed instead.
        Raises ValueError, naming what is possible, if that leaves no network.
        """
        low, high = self.cost_range()
        if low.min() > most:
            raise ValueError(f"no network meets a budget of {self._words(most)}: the smallest of this space has "
                             f"{self._words(low.min())} (for a 1280x720 output)")
        if high.max() < least:
            raise ValueError(f"no network uses a budget of {self._words(most)}: the largest of this space has "
                             f"{self._words(high.max())} (for a 1280x720 output)")
        for dearest in max(target, low.min()), most:           # some spaces have nothing between `least` and `target`
            allowed = (low <= dearest) & (high >= least)
            self.allowed = torch.from_numpy(np.flatnonzero(allowed)).to(self.allowed.device)
            scores = [np.where(allowed, 0, -np.inf)] + [np.zeros(logits.shape) for logits in self.logits()[1:]]
            try:
                self._knapsack(*scores, least, most)           # is there really one?
                return
            except ValueError:
                if dearest == most:
                    raise

    def origins(self, network: Network):
        """Pairs (parameter of `network`, parameter of this supernet whose leading slice it is)."""
        a, mine = network.architecture, dict(self.named_parameters())
        for name, parameter in network.named_parameters():
            part, *rest = name.split(".")
            if part == "tail":
                source = ["tails", a.path, *rest]
            elif part == "body":
                i = int(rest[0])
                source = ["body", a.path[:i + 1], *rest[1:]]
                if a.path[i] == "c":                           # body.I.ops.POSITION... has one operation, ours has all
                    position = int(rest[2])
                    source.insert(4, a.operations[a.path[:i].count("c")][position])
            else:
                source = [part, *rest]
            yield parameter, mine[".".join(source)]

    def inherit(self, architecture: Architecture) -> Network:
        """The network with its learned weights. At one-hot weights it computes what this supernet computes."""
        network = Network(architecture).to(self.gamma.device)
        with torch.no_grad():
            for parameter, source in self.origins(network):
                parameter.copy_(leading(source, parameter))
        return network


def leading(source: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The leading slice of `source` that has the shape of `like`."""
    return source[tuple(map(slice, like.shape))]


# --- Pictures ------------------------------------------------------------------------------------------------------

def draw_supernet(axis, space: Space, weights: Weights):
    """All three levels at one moment. weights: tensors or numpy arrays.

    Network: lines are as thick, and cells as dark, as the weight of all exits behind them; a ring's size is an exit's own.
    Cell: a cell is a row of columns, one per position, divided into colours as the weight is among the operations.
    Kernel: a column is as tall as the expected width behind it.
    """
    gamma, alpha, beta = (np.asarray(w) for w in weights)
    places = tree_layout(space)
    mass = {node: sum(g for g, n in zip(gamma, space.nodes) if n.startswith(node)) for node in space.nodes}
    for node, (x, y) in places.items():
        x0, y0 = places.get(node[:-1], (0, y))
        axis.plot([x0, x], [y0, y], color="black", linewidth=6 * mass[node], zorder=1, solid_capstyle="butt")
        if mass[node] == 0:
            axis.plot([x0, x], [y0, y], color="#DDDDDD", linewidth=0.5, zorder=0)
        fade = float(0.12 + 0.88 * min(1, 2 * mass[node]))
        if node[-1] == "u":
            axis.bar(x, 0.44, 0.3, y - 0.22, color=COLOURS["up"], alpha=fade, zorder=2)
        else:
            c = space.cell_of[node]
            widths = [*(beta[c] @ np.array(space.widths) / space.channels), 1.0]
            for p, width in enumerate(widths):
                bottom, left = y - 0.36 * width, x - 0.3 + 0.6 * p / space.positions
                for weight, name in zip(alpha[c, p], OPERATIONS):
                    axis.bar(left, 0.72 * width * weight, 0.54 / space.positions, bottom, align="edge", alpha=fade,
                             color=COLOURS[name], zorder=2)
                    bottom += 0.72 * width * weight
        weight = gamma[space.nodes.index(node)]
        if weight > 0:
            axis.plot(x + 0.42, y, "o", markersize=3 + 9 * weight, markerfacecolor="white", markeredgecolor="black", zorder=3)
    handles = [axis.bar(0, 0, color=COLOURS[name], label=name) for name in (*OPERATIONS, "up")]
    handles += axis.plot([], [], "o", color="white", markeredgecolor="black", label="exit")
    axis.legend(handles=handles, loc="lower left", ncols=len(handles), frameon=False, bbox_to_anchor=(0, -0.12), fontsize=9)
    axis.set_xlim(-0.1, max(map(len, space.nodes)) + 0.6)
    axis.set_ylim(1 - len(space.leaves) - 0.6, 0.6)
    axis.set_axis_off()
    return axis.figure


def draw_levels(space: Space, path: str, steps, weights: Weights) -> Figure:
    """The three levels over training, as heat maps: all exits, and the operations and widths of the cells on `path`.

    Colour is weight; black is exactly zero.

    steps: (T,). weights: numpy arrays, those of Weights with a leading dimension T.
    """
    cells = [space.cell_of[node] for node in cells_on(path)]
    panels = [("network: all exits", weights.gamma, space.nodes)]
    levels = ("cell: operations", weights.alpha, OPERATIONS), ("kernel: widths", weights.beta, space.widths)
    for title, level, names in levels:
        rows = level[:, cells]                                         # (T, cells on the path, places, candidates)
        places = [f"{c + 1}.{p + 1}" for c in range(rows.shape[1]) for p in range(rows.shape[2])]
        labels = [f"{place}: {name}" for place in places for name in names]
        if labels:                                                     # with one position there is no inner width
            panels.append((f"{title} on the path {path}", rows.reshape(len(rows), len(labels)), labels))
    figure = Figure(figsize=(15, 2 + 0.16 * max(len(labels) for *_, labels in panels)), layout="constrained")
    for axis, (title, level, labels) in zip(figure.subplots(1, len(panels)), panels):
        edges = np.append(steps, steps[-1] + max(1, steps[-1] - steps[-2] if len(steps) > 1 else 1))
        axis.set_facecolor("black")                                    # what shows where nothing is drawn: at exactly zero
        mesh = axis.pcolormesh(edges, np.arange(len(labels) + 1), np.ma.masked_equal(level.T, 0), vmin=0, vmax=1, cmap="viridis")
        axis.set_title(title)
        axis.set_yticks(np.arange(len(labels)) + 0.5, labels, fontsize=7)
        axis.invert_yaxis()
        axis.set_xlabel("training step")
    figure.colorbar(mesh, ax=figure.axes, label="weight", fraction=0.02)
    return figure


def animate(figure, space: Space, steps, weights: Weights, frames: int = 80) -> FuncAnimation:
    """`draw_supernet` over time. figure: matplotlib's; steps: (T,); weights: numpy arrays with a leading dimension T."""
    axis = figure.subplots()
    chosen = np.unique(np.linspace(0, len(steps) - 1, frames).round().astype(int))
    chosen = np.append(chosen, [chosen[-1]] * (frames // 6))   # rest on the last picture before it begins again

    def draw(t):
        axis.clear()
        now = Weights(*(level[t] for level in weights))
        draw_supernet(axis, space, now)
        exits, operations, widths = live_choices(Weights(*map(torch.from_numpy, now)))
        axis.set_title(f"step {steps[t]}: alive are {exits} of {len(space.nodes)} exits, {operations:.1f} operations "
                       f"and {widths:.1f} widths a choice", fontsize=11)
    return FuncAnimation(figure, draw, chosen, interval=100)
