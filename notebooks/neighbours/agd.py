"""AGD (AutoGAN-Distiller), its super-resolution part: operations by softmax, widths by Gumbel.

    python notebooks/neighbours/agd.py                            # generated pictures, no download
    python notebooks/neighbours/agd.py --data DIR --benchmark SET5 --budget 13G --out runs/agd
    python notebooks/neighbours/agd.py --network 1 --data DIR --out runs/agd-1       # no search

Source: Fu et al., *AutoGAN-Distiller: Searching to Compress Generative Adversarial Networks* (arXiv
2006.08198). No figure of the paper was within our reach, so none is quoted.

*The problem.* ESRGAN enlarges four times, but is large: find a small network nearly as good. It has
cells as in Trilevel (five operations in a row, four candidates for each, four widths between them,
out = x + 0.2 f(x)) inside a fixed *shell*. The path is not searched:

    LR --head--> [ 5 cells ] --trunk--> + head's output --up, up--> --HR--> --last--> SR

*What is relaxed by what?* Each level has its own map from logits to weights.

    operations  alpha   softmax: a mixture of all four
    widths      beta    "straight-through" Gumbel: g = -log(-log(uniform)), p = softmax(beta),
                        y = softmax(log p + g), used as the one-hot of y's largest, with y's slope

Forward, exactly one width is used, and each as often as softmax says: E[one-hot] = p. Backward,
all widths learn. As every draw sees another network, each loss is a *sandwich*, which keeps both
ends in order:

    loss = |Gumbel's widths| + |all widest| + |all narrowest|          (each the distance to HR)

and in a first part, the pretraining, |widest| + |narrowest| + two random ones, without the logits.

*Where the price is.* At x4 with 64 channels the shell alone takes 80.26 G for 1280x720, the whole
space 81.64 to 186.42 G. A path that upsamples elsewhere could be cheaper: Trilevel's third level.

*What the public code does* (as read), *and what we do*:
    target   a frozen ESRGAN's output, L1 .01 + L1 of VGG19 features; ours: the photograph HR, L1
    cost     a term 2/7 F(alpha; widest) + 5/7 F(widths; alpha uniform), but of weight *0*, so there
             is no pressure at all; ours: COST log(cells' cost / aim)^2, on average over the chances
             (so the one network that `derive` takes may cost more, or less)
    slope    the output is multiplied by r_in r_out (both 1), which carries the widths' gradient;
             ours: supernet.py's staircase mask, by which all widths are evaluated
    logits   100 epochs after 100 of pretraining, Adam 3e-4; ours: 2/3 of the search, Adam 3e-2
    derive   argmax, 900 + 1,800 epochs from scratch; ours: argmax, and from scratch, too. "Lost" is
             measured with the supernet's weights, before they are thrown away
    sizes    5 cells of 64 channels; ours: 3 of 24 with 3 operations each, and + bicubic at the end
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
from search import budget
from search_space import OPERATIONS, UPSAMPLINGS, Architecture, Cell, Space, Up, conv, enlarge
from sparsestmax import gumbel, softmax
from supernet import COST, MixedCell, Side, Weights, leading, live_choices

LESSON = dict(channels=24, cells=3, positions=3)
FULL = dict(channels=64, cells=5, positions=5)
LOGITS_RATE, PRETRAINING = 3e-2, 1 / 3  # (of the search)


# --- The space ---------------------------------------------------------------------------------
# Architecture is Trilevel's, with the one path "ccc...u...". The shell has two more convolutions.

def size(space: Space) -> int:
    """How many networks, all of one path: 1.07e29 at full size."""
    in_a_cell = len(OPERATIONS) ** space.positions * len(space.widths) ** (space.positions - 1)
    return in_a_cell ** space.cells


def spell(space: Space, operations, widths) -> Architecture:
    """From the numbers of the candidates, a row for each cell."""
    return space.architecture("c" * space.cells + "u" * len(UPSAMPLINGS[space.scale]),
                              [[tuple(OPERATIONS)[k] for k in cell] for cell in operations],
                              [[space.widths[w] for w in cell] for cell in widths])


def pixels(scale: int) -> int:
    return (1280 // scale) * (720 // scale)  # of LR, for an output of 1280x720


def shell_cost(nf: int, scale: int) -> int:
    """Multiply-adds of what no choice changes."""
    total, m = 27 * nf + 9 * nf * nf, 1  # head, trunk
    for factor in UPSAMPLINGS[scale]:
        m *= factor
        total += 9 * nf * nf * m ** 2
    return pixels(scale) * (total + (9 * nf * nf + 27 * nf) * m ** 2)  # HR, last


def multiply_adds(a: Architecture) -> int:
    cells = sum(layer.weights for layer in a.layers() if layer.kind in OPERATIONS)
    return shell_cost(a.channels, a.scale) + pixels(a.scale) * cells


# Operations and widths by number, read in a work that builds on AGD's.
PUBLISHED = {"1": ("00000 33212 00000 13332 00000", "0000 0040 0000 1100 0000"),
             "2": ("33332 32001 00000 33332 00000", "1130 0110 0000 1300 0000")}


def published(name: str) -> Architecture:
    return spell(Space(4, **FULL), *([[*map(int, cell)] for cell in rows.split()]
                                     for rows in PUBLISHED[name]))


# --- The networks ------------------------------------------------------------------------------

class Shell(nn.Module):
    """What is around the cells, in the supernet and in a found network."""
    def __init__(self, channels: int, scale: int):
        super().__init__()
        self.scale, nf = scale, channels
        self.head, self.trunk = conv(3, nf, 3, bias=True), conv(nf, nf, 3, bias=True)
        self.ups = nn.Sequential(*(Up(nf, factor) for factor in UPSAMPLINGS[scale]))
        self.hr, self.last = conv(nf, nf, 3, bias=True), conv(nf, 3, 3, bias=True)
        nn.init.normal_(self.last.weight, std=1e-3)  # near zero: training starts at bicubic

    def forward(self, x, cells):  # (B, 3, h, w) -> (B, 3, scale h, scale w)
        h = self.head(x)  # (B, nf, h, w)
        y = self.ups(h + self.trunk(cells(h)))  # (B, nf, scale h, scale w)
        return self.last(F.leaky_relu(self.hr(y), 0.2)) + enlarge(x, self.scale)


class Network(nn.Module):
    """A found network."""
    def __init__(self, a: Architecture):
        super().__init__()
        self.architecture, self.shell = a, Shell(a.channels, a.scale)
        self.cells = nn.Sequential(*(Cell(a.channels, *cell)
                                     for cell in zip(a.operations, a.widths)))

    def forward(self, x):  # (B, 3, h, w) -> (B, 3, scale h, scale w)
        return self.shell(x, self.cells)


class Supernet(nn.Module):
    """All operations and widths, in the cells of supernet.py."""
    def __init__(self, space: Space):
        super().__init__()
        self.space, cells, n, widths = space, space.cells, space.positions, space.widths
        self.alpha = nn.Parameter(1e-3 * torch.randn(cells, n, len(OPERATIONS)))
        self.beta = nn.Parameter(1e-3 * torch.randn(cells, n - 1, len(widths)))
        self.shell = Shell(space.channels, space.scale)
        self.cells = nn.ModuleList(MixedCell(space) for _ in range(cells))
        # (widths, nf): 1[ch < w]; and an operation's weights for each pair of widths.
        self.stairs = (torch.arange(space.channels) < torch.tensor(widths)[:, None]).float()
        self.table = torch.tensor([[[operation.weights(c, d) for d in widths] for c in widths]
                                   for operation in OPERATIONS.values()], dtype=torch.float64)

    def weights(self, progress: float) -> Weights:
        """THE place where logits become weights, with a map for each level.

        Neither has a schedule: temperature 1 to the end, where (progress 1) the noise is off.
        """
        return Weights(torch.ones(1), softmax(self.alpha, progress),
                       gumbel(self.beta, float(progress == 1)))

    def expected(self) -> Weights:
        """The same without a draw: the chance of each width instead of a one-hot."""
        return Weights(torch.ones(1), softmax(self.alpha), softmax(self.beta))

    def all_widths(self, which) -> torch.Tensor:
        """One-hot, like beta. which: -1 the widest everywhere, 0 the narrowest, None random."""
        places, widths = self.beta.shape[:2], len(self.space.widths)
        index = torch.randint(widths, places) if which is None else torch.full(places, which)
        return F.one_hot(index % widths, widths).float()

    def with_ends(self, beta):  # (cells, positions - 1, widths) -> (cells, positions + 1, widths)
        end = torch.eye(beta.shape[-1])[-1:].to(beta).expand(len(beta), 1, -1)  # full width
        return torch.cat([end, beta, end], 1)

    def forward(self, x, weights: Weights):  # (B, 3, h, w) -> (B, 3, scale h, scale w)
        beta = self.with_ends(weights.beta)
        masks = (beta[..., None] * self.stairs).sum(-2)  # (cells, positions + 1, nf)
        agrees = (beta[:, :-1] * beta[:, 1:]).sum(-1)  # (cells, positions)
        # Plain numbers say what may be skipped. A width that was not drawn has a gradient all the
        # same: where one is wanted, nothing reads as 0 or 1, so all widths are evaluated.
        values = np.full(beta.shape, 0.5) if beta.requires_grad else beta.numpy()

        def cells(h):  # (B, nf, h, w) -> the same
            for c, cell in enumerate(self.cells):
                sides = [Side(mask, v, self.space.widths[np.flatnonzero(v)[-1]], p) for mask, v, p
                         in zip(masks[c], values[c], [None, *agrees[c].split(1)])]
                h = cell(h, weights.alpha[c], weights.alpha[c].detach().numpy(), sides)
            return h
        return self.shell(x, cells)

    def cost(self, weights: Weights) -> torch.Tensor:
        """What the cells are expected to cost, float64. With `shell_cost`, to the last unit."""
        alpha, beta = weights.alpha.double(), self.with_ends(weights.beta.double())
        cells = torch.einsum("cpk,cpi,kij,cpj->", alpha, beta[:, :-1], self.table, beta[:, 1:])
        return pixels(self.space.scale) * cells

    def cost_range(self) -> tuple[float, float]:
        """The cheapest and the dearest cells: everywhere one operation, narrowest or widest."""
        costs = [self.cost(Weights(None, F.one_hot(torch.full(self.alpha.shape[:2], k), 4),
                                   self.all_widths(w))).item() for k in range(4) for w in (0, -1)]
        return min(costs), max(costs)

    def inherit(self, a: Architecture) -> Network:
        """The network with our weights. (Only to see what is lost: AGD trains it from scratch.)"""
        network = Network(a)
        network.shell.load_state_dict(self.shell.state_dict())
        with torch.no_grad():
            for cell, mixed, names in zip(network.cells, self.cells, a.operations):
                for op, candidates, name in zip(cell.ops, mixed.ops, names):
                    for key, parameter in op.named_parameters():
                        parameter.copy_(leading(candidates[name].get_parameter(key), parameter))
        return network


# --- The search --------------------------------------------------------------------------------

def sandwich(net, patches, args, generator, weights, pretraining: bool) -> torch.Tensor:
    """The loss of one batch: of the drawn widths, or two random ones, and of both ends."""
    lr, hr = patches.batch(args.batch, generator)
    passes = [weights._replace(beta=net.all_widths(which)) for which in
              ((-1, 0, None, None) if pretraining else (-1, 0))]
    return sum(F.l1_loss(net(lr, w), hr) for w in passes + [weights] * (not pretraining))


def search(args, data, net, target, history, snapshots):
    """`target`: what the cells are to cost."""
    generator = torch.Generator().manual_seed(args.seed)
    logits_adam = torch.optim.Adam([net.alpha, net.beta], LOGITS_RATE, (0.5, 0.999))
    adam = torch.optim.Adam([*net.shell.parameters(), *net.cells.parameters()], args.rate)

    def descend(optimiser, loss):
        optimiser.zero_grad()
        loss.backward(inputs=optimiser.param_groups[0]["params"])
        optimiser.step()

    for step in common.progress_bar(range(args.search), "search"):
        progress, pretraining = step / args.search, step < PRETRAINING * args.search
        # 1. The logits learn from one half of the photographs. (Not in the pretraining.)
        if not pretraining:
            loss = sandwich(net, data.half_b, args, generator, net.weights(progress), False)
            off = torch.log(net.cost(net.expected()) / target).float()
            descend(logits_adam, loss + COST * off ** 2)
        # 2. The convolutions learn from the other half.
        fixed = Weights(*(w.detach() for w in net.weights(progress)))
        descend(adam, loss := sandwich(net, data.half_a, args, generator, fixed, pretraining))
        # 3. Keep books. (A softmax is never 0, so all choices stay alive to the end.)
        with torch.no_grad():
            chances = net.expected()
            cost = shell_cost(net.space.channels, args.scale) + net.cost(chances).item()
        _, operations, widths = live_choices(chances)
        history.append(dict(step=step + 1, loss=loss.item(), live_operations=operations,
                            live_widths=widths, multiply_adds=cost))
        snapshots.append(chances)


def derive(net: Supernet) -> Architecture:
    """The likeliest operation and width everywhere."""
    return spell(net.space, *(w.argmax(-1).tolist() for w in net.weights(1.0)[1:]))


# --- The command line --------------------------------------------------------------------------

def whole_run(args):
    history, snapshots, seconds, distributions = [], [], {}, {}
    if args.network:
        if args.scale != 4:
            raise ValueError("the published networks enlarge four times: --scale 4")
        a, args.search, report = published(args.network), 0, dict(live="no search")
        data = common.photographs(args)
    else:
        net = Supernet(Space(args.scale, **LESSON)).to(memory_format=torch.channels_last)
        shell, (low, high) = shell_cost(LESSON["channels"], args.scale), net.cost_range()
        target, unit = args.budget or (shell + (low + high) / 2, "multiply-adds")
        if unit == "ms" or not .999 * (shell + low) <= target <= 1.001 * (shell + high):
            raise ValueError(f"--budget must be {(shell + low) / 1e9:.4g}G to "
                             f"{(shell + high) / 1e9:.4g}G: the shell has {shell / 1e9:.4g}G")
        data = common.photographs(args)
        with common.timed(seconds, "search"):
            search(args, data, net, target - shell, history, snapshots)
            a = derive(net)
            before, after = (common.psnr_of_batch(model, data.half_b, args) for model in
                             (lambda lr: net(lr, net.weights(1.0)), net.inherit(a)))
        report = dict(live="all: 4 operations, 3 widths", lost=before - after, kept=False)
        every = max(1, args.search // 100)
        distributions = {name: np.array([getattr(w, name).numpy() for w in snapshots[::every]])
                         for name in ("alpha", "beta")}
    network = Network(a)
    with common.timed(seconds, "training"):
        common.train(network, data.whole, args, args.steps - args.search, history)
    architecture = dict(path=a.path, operations=a.operations, widths=a.widths)
    common.finish(args, network, architecture, history, distributions, seconds, **report)


def main(argv=None):
    parser = common.arguments("agd", "Operations by softmax, widths by Gumbel, the path is fixed.",
                              scales=(4, 2, 3), steps=900, search=150, batch=8, patch=16, rate=2e-3)
    parser.add_argument("--budget", type=budget, help="multiply-adds to aim at, as 13G (default: "
                        "halfway between the cheapest and the dearest network)")
    parser.add_argument("--network", choices=PUBLISHED, help="no search: train this published one")
    common.main(parser, whole_run, argv)


if __name__ == "__main__":
    main()
