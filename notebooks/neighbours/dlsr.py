"""DLSR: a light network of distillation cells, found by softmax (Huang et al., arXiv 2105.03939).

    python notebooks/neighbours/dlsr.py                                # search; generated pictures
    python notebooks/neighbours/dlsr.py --data DIR --benchmark DIR     # search; photographs
    python notebooks/neighbours/dlsr.py --network tiny --data DIR      # no search: a published one

*The problem.* In an *information distillation* cell each step sets a thin copy of its features
aside and works on. DLSR keeps this frame, with six cells of three steps, and asks two questions.
Together they have 9^3 * (1 * 3 * 6 * 10) = 131,220 answers.

    cell      which operation in each step? (The same in all cells.)    one of nine
    network   which two earlier cells feed cells 3, 4, 5, 6?            one of 1, 3, 6, 10 pairs

*What is relaxed by what.* Both by softmax, of the logits alpha (3, 9) and beta (2 + 3 + 4 + 5):

    step i:   x <- LeakyReLU(sum_k alpha_ik op_k(x) + x)
    cell j:   input = LeakyReLU(conv1x1(concatenate(beta_j1 y_1, ..., beta_j,j-1 y_j-1)))

Softmax never reaches zero: all nine operations are computed to the last step, and to decide is to
throw away much of what the supernet does. The report says how many dB that costs.

*The losses*, for pictures with values from 0 to 255 (ours are in [0, 1], so we divide by 255):

    kernels   L1 + 0.2 HFEN
    logits    the same on a batch of either half of the photographs, + sum softmax(alpha) p / sum p

HFEN compares edges: L1 of the Laplacians of the blurred pictures, each divided by its maximum. It
is a thousandth of a trained network's loss. p are the operations' sizes.

*Where this comes from.* The released code, which was rebuilt with the same outputs, and of the
paper the abstract alone. It claims 68 G multiply-adds at x2 and 18 G at x4, which is what the
PUBLISHED networks have; they were read off the released weights. In its code all channels go on,
and the size term is computed in numpy, so it *moves no logit*. Ours does, but not by much: a search
as short as ours finds large convolutions.

*Ours* are 18 channels in a search (theirs: 48), the logits' rate, their rest in the first tenth
(theirs: 22 of 1,000 epochs), equal halves of the photographs (theirs: 3,000 and 450). What is found
trains by L1, as with all neighbours, and keeps its weights where theirs starts from scratch: a
cell's two betas, scaled to sum 1, are folded into the 1x1 behind them.
"""
import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from common import (arguments, count, finish, main as run, photographs, progress_bar, psnr_of_batch,
                    sound, timed, train)
from sparsestmax import softmax

CELLS, STEPS = 6, 3
CHANNELS = 18  # of what is searched; an even number
WARM = 0.1  # for this part of the search the logits rest
LOGITS_RATE = 3e-2  # theirs is 3e-4, for a million steps
HFEN, SIZE = 0.2 / 255, 1 / 255  # weights in the loss


# --- 1. The space ------------------------------------------------------------------------------

def conv(c, d, k, bias=True, groups=1, dilation=1):  # k x k: (B, c, H, W) -> (B, d, H, W)
    return nn.Conv2d(c, d, k, 1, dilation * (k // 2), dilation, groups, bias)


def separable(n, k, dilation=1):  # k x k on each channel alone, 1x1 across the channels
    return [nn.ReLU(), conv(n, n, k, False, n, dilation), conv(n, n, 1, False)]


# Name -> module on n channels. No biases, and no activation behind a plain convolution.
OPERATIONS = {
    **{f"conv{k}": partial(lambda k, n: conv(n, n, k, False), k) for k in (1, 3, 5, 7)},
    **{f"sep{k}": partial(lambda k, n: nn.Sequential(*separable(n, k), *separable(n, k)), k)
       for k in (3, 5, 7)},
    **{f"dil{k}": partial(lambda k, n: nn.Sequential(*separable(n, k, 2)), k) for k in (3, 5)}}
# The p of the size term: thousands of weights at 50 channels, in the same order.
THOUSANDS = 2.5, 22.5, 62.5, 122.5, 5.9, 7.5, 9.9, 2.95, 3.75


class Architecture(NamedTuple):
    channels: int
    operations: tuple[tuple[str, ...], ...]  # each step's: one or, in a supernet, all nine
    inputs: tuple[tuple[int, ...], ...]  # the cells before cells 3 to 6: two or, there, all


ALL = (tuple(OPERATIONS),) * STEPS, tuple(tuple(range(1, j)) for j in range(3, CELLS + 1))
SPACE_SIZE = len(OPERATIONS) ** STEPS * math.prod(math.comb(len(inputs), 2) for inputs in ALL[1])
LATER = (1, 2), (2, 3), (2, 4), (4, 5)
PUBLISHED = {
    "sep3-sep5-sep5": Architecture(48, (("sep3",), ("sep5",), ("sep5",)),
                                   ((2, 1), (3, 2), (4, 3), (1, 3))),
    "conv1-sep7-sep5": Architecture(48, (("conv1",), ("sep7",), ("sep5",)), LATER),
    "tiny": Architecture(18, (("conv1",), ("sep7",), ("sep5",)), LATER)}


# --- 2. The networks ---------------------------------------------------------------------------

leaky = partial(F.leaky_relu, negative_slope=0.05)


class Attention(nn.Module):
    """ESA: x times a map between 0 and 1, made on a coarse grid. H and W must be 15 or more."""
    def __init__(self, n: int):
        super().__init__()
        f = n // 4
        self.first, self.straight, self.last = conv(n, f, 1), conv(f, f, 1), conv(f, n, 1)
        self.shrink = nn.Conv2d(f, f, 3, stride=2)  # no padding
        self.coarse = nn.Sequential(conv(f, f, 3), nn.ReLU(),
                                    conv(f, f, 3), nn.ReLU(), conv(f, f, 3))

    def forward(self, x):  # (B, n, H, W) -> the same
        a = self.first(x)  # (B, f, H, W)
        b = F.max_pool2d(self.shrink(a), 7, stride=3)  # (B, f, about H / 6, about W / 6)
        b = F.interpolate(self.coarse(b), x.shape[2:], mode="bilinear")  # (B, f, H, W)
        return x * torch.sigmoid(self.last(b + self.straight(a)))


class Cell(nn.Module):
    def __init__(self, n: int, operations):
        super().__init__()
        self.distil = nn.ModuleList(conv(n, n // 2, 1) for _ in operations)
        self.steps = nn.ModuleList(nn.ModuleDict({name: OPERATIONS[name](n) for name in names})
                                   for names in operations)
        self.last, self.fuse, self.attention = conv(n, n // 2, 3), conv(2 * n, n, 1), Attention(n)

    def forward(self, x, alpha):  # (B, n, H, W) -> the same; alpha: (steps, candidates)
        aside = []
        for distil, candidates, row in zip(self.distil, self.steps, alpha):
            aside.append(leaky(distil(x)))  # (B, n / 2, H, W)
            mixed = (weight * op(x) for weight, op in zip(row, candidates.values()))
            x = leaky(sum(mixed, x))  # (B, n, H, W): all channels go on
        aside.append(leaky(self.last(x)))
        return self.attention(self.fuse(torch.cat(aside, 1)))


class Network(nn.Module):
    """(B, 3, h, w) -> (B, 3, scale h, scale w). No bicubic picture is added, as in the original."""
    def __init__(self, architecture: Architecture, scale: int):
        super().__init__()
        self.architecture, self.scale = architecture, scale
        n, operations, self.inputs = architecture
        self.head, self.tail = conv(3, n, 3), conv(n, 3 * scale ** 2, 3)
        self.cells = nn.ModuleList(Cell(n, operations) for _ in range(CELLS))
        self.joins = nn.ModuleList(conv(len(inputs) * n, n, 1) for inputs in self.inputs)
        self.fuse, self.smooth = conv(CELLS * n, n, 1), conv(n, n, 3)

    def forward(self, x, weights=None):  # None: nothing to weigh
        alpha, beta = weights or ([[1]] * STEPS, [[1] * CELLS] * CELLS)
        head = self.head(x)  # (B, n, h, w)
        y = [self.cells[0](head, alpha)]  # of each cell (B, n, h, w)
        y.append(self.cells[1](y[0], alpha))
        for j, (cell, join, inputs) in enumerate(zip(self.cells[2:], self.joins, self.inputs)):
            parts = [beta[j][i - 1] * y[i - 1] for i in inputs]
            y.append(cell(leaky(join(torch.cat(parts, 1))), alpha))
        y = self.smooth(leaky(self.fuse(torch.cat(y, 1)))) + head  # (B, n, h, w)
        return F.pixel_shuffle(self.tail(y), self.scale)


def multiply_adds(architecture: Architecture, scale: int) -> int:  # for 1280x720
    return count(Network(architecture, scale), scale)[1]


class Weights(NamedTuple):
    """Each row sums to 1. beta is 0 where a cell is not before the one it would feed."""
    alpha: torch.Tensor  # (steps, operations)
    beta: torch.Tensor  # (cells - 2, cells - 1): a row for each of cells 3 to 6

    def live(self):  # operations a step, inputs a cell, on average
        return [(w > 0).sum(-1).float().mean().item() for w in self]


class Supernet(Network):
    """All candidates at once, and the logits that weigh them."""
    def __init__(self, channels: int, scale: int):
        super().__init__(Architecture(channels, *ALL), scale)
        self.alpha = nn.Parameter(1e-3 * torch.randn(STEPS, len(OPERATIONS)))
        self.beta = nn.Parameter(1e-3 * torch.randn(sum(map(len, self.inputs))))
        self.earlier = torch.ones(CELLS - 2, CELLS - 1, dtype=torch.bool).tril(1)
        # Expected cost: what is fixed (wiring costs nothing), and each operation's, in six cells.
        sizes = [sum(p.numel() for p in op.parameters()) for op in self.cells[0].steps[0].values()]
        self.prices = CELLS * (1280 // scale) * (720 // scale) * torch.tensor(sizes).double()
        cheapest = Architecture(channels, (("conv1",),) * STEPS, LATER)
        self.fixed = multiply_adds(cheapest, scale) - STEPS * self.prices[0].item()

    def weights(self, progress: float) -> Weights:
        """THE place where logits become weights. Softmax does not look at progress."""
        beta = self.beta.new_full(self.earlier.shape, -torch.inf)  # -inf: no candidate, weight 0
        beta = beta.masked_scatter(self.earlier, self.beta)
        return Weights(softmax(self.alpha, progress), softmax(beta, progress))

    def cost(self, weights: Weights) -> torch.Tensor:  # expected, for 1280x720: 0-d, float64
        return self.fixed + (weights.alpha.double() @ self.prices).sum()

    def derive(self, weights: Weights) -> Architecture:
        """The operation with the largest weight in each step, the two largest inputs of a cell."""
        operations = tuple((tuple(OPERATIONS)[k],) for k in weights.alpha.argmax(-1).tolist())
        pairs = (weights.beta.topk(2).indices + 1).sort().values.tolist()
        return Architecture(self.architecture.channels, operations, tuple(map(tuple, pairs)))

    def inherit(self, found: Architecture, weights: Weights) -> Network:
        """The derived network with our kernels. Equal to us at one-hot alpha and two-point beta."""
        n, ours, network = found.channels, self.state_dict(), Network(found, self.scale)
        state = {name: ours[name] for name in network.state_dict()}
        for j, inputs in enumerate(found.inputs):
            beta = weights.beta[j, [i - 1 for i in inputs]]  # (2,)
            columns = [share * ours[f"joins.{j}.weight"][:, (i - 1) * n:i * n]
                       for i, share in zip(inputs, beta / beta.sum())]
            state[f"joins.{j}.weight"] = torch.cat(columns, 1)  # (n, 2n, 1, 1)
        network.load_state_dict(state)
        return network


# --- 3. The search -----------------------------------------------------------------------------

def edges(x):  # Laplacian of blurred pictures: (B, 3, H, W) -> (B, 1, H - 4, W - 4)
    bell = torch.exp(-(torch.arange(5.0) - 2) ** 2 / (2 * 1.5 ** 2))
    blur = torch.outer(bell, bell) / bell.sum() ** 2
    laplacian = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])
    return F.conv2d(F.conv2d(x, blur.expand(1, 3, 5, 5)), laplacian.expand(1, 1, 3, 3), padding=1)


def hfen(sr, hr):
    """High-frequency error norm; each side is divided by the largest value in its batch."""
    return F.l1_loss(*(e / e.max().clamp(min=1e-6) for e in (edges(sr), edges(hr))))


def size_term(alpha):  # weights, not logits: (steps, operations)
    return (alpha @ alpha.new_tensor(THOUSANDS)).sum() / sum(THOUSANDS)


def search(net: Supernet, data, args) -> tuple[list, dict]:
    """args.search steps. Returns the rows of history.csv and the arrays of distributions.npz."""
    generator, history, snapshots = torch.Generator().manual_seed(args.seed), [], []
    logits = [net.alpha, net.beta]
    kernels = [*net.parameters()][len(logits):]  # logits come first
    optimiser = torch.optim.Adam(kernels, args.rate, (0.9, 0.99), fused=True)
    logits_optimiser = torch.optim.Adam(logits, LOGITS_RATE, (0.5, 0.999), fused=True)

    def loss(lr, hr, weights):
        sr = net(lr, weights)
        return F.l1_loss(sr, hr) + HFEN * hfen(sr, hr)

    for step in progress_bar(range(args.search), "search"):
        progress = max(0.0, (step / args.search - WARM) / (1 - WARM))
        weights = net.weights(progress)
        fixed = Weights(*(w.detach() for w in weights))
        # 1. The kernels learn from one half of the photographs, the choices as they stand.
        batch = data.half_a.batch(args.batch, generator)
        error = loss(*batch, fixed)
        optimiser.zero_grad()
        error.backward()  # (fixed weights: no logit hears of it)
        optimiser.step()
        # 2. The logits learn from that batch, from one of the other half, and from the sizes.
        if progress > 0:
            both = loss(*batch, weights) + loss(*data.half_b.batch(args.batch, generator), weights)
            logits_optimiser.zero_grad()
            (both + SIZE * size_term(weights.alpha)).backward(inputs=logits)
            logits_optimiser.step()
        # 3. Keep books.
        operations, inputs = fixed.live()
        history.append(dict(step=step + 1, loss=error.item(), live_operations=operations,
                            live_inputs=inputs, cost=net.cost(fixed).item()))
        snapshots.append(fixed)
    levels = zip(Weights._fields, zip(*snapshots))
    return history, {level: torch.stack(over_time).numpy() for level, over_time in levels}


# --- 4. The command line -----------------------------------------------------------------------

def whole_run(args):
    if args.patch < 15:
        raise ValueError(f"--patch {args.patch}: the attention needs patches of 15 or more")
    data, seconds, history, arrays, report = photographs(args), {}, [], {}, {}
    if args.network:
        network, args.search = Network(PUBLISHED[args.network], args.scale), 0
    else:
        net = Supernet(CHANNELS, args.scale).to(memory_format=torch.channels_last)
        with timed(seconds, "search"):
            history, arrays = search(net, data, args)
        with torch.no_grad():
            weights = sound(net).weights(1.0)
            network = net.inherit(net.derive(weights), weights)
        lost = (psnr_of_batch(lambda lr: net(lr, weights), data.half_b, args)
                - psnr_of_batch(network, data.half_b, args))
        live = "{:.1f} of 9 operations a step, {:.1f} of 3.5 inputs a cell".format(*weights.live())
        report = dict(live=live, lost=lost, kept=True)
    with timed(seconds, "training"):
        train(network, data.whole, args, args.steps - args.search, history)
    finish(args, network, network.architecture._asdict(), history, arrays, seconds, **report)


def main(argv=None):
    parser = arguments("dlsr", "DLSR: distillation cells and their wiring, found by softmax.",
                       steps=1000, search=80, batch=8, patch=16, rate=2e-3)
    parser.add_argument("--network", choices=PUBLISHED, help="train this one instead of searching")
    run(parser, whole_run, argv)


if __name__ == "__main__":
    main()
