"""HiNAS: which operation on each edge, how wide each layer? Softmax on both, then the best path.

    python notebooks/neighbours/hinas.py --scale 2            # generated pictures, no download
    python notebooks/neighbours/hinas.py --scale 2 --data DIR --benchmark DIR/Set5
    python notebooks/neighbours/hinas.py --task denoise --sigma 50 --patch 48 --data DIR

Zhang et al., arXiv 2012.13212 (denoising first in 1909.08228). Two questions are asked at once:

    inner   what does each edge of a cell do?   alpha (layers, edges, 7)   mixed by softmax
    outer   how wide is the next layer?         beta (rows, 3)             mixed by softmax

*Inner.* A cell has two input states and a few nodes. Node i takes all i + 2 states before it:

    state_i = sum_j sum_k softmax(alpha_ij)_k op_k(state_j)        output: all nodes, side by side

*Outer.* A layer exists in those of the widths F, 1.5 F, 2 F that steps of one reach from F. A 1x1
convolution, a *route*, leads from each cell to the narrower, the same and the wider width of the
next layer. Routes into one width are weighted, summed, and only then pass the cell there:

    input_l(w) = sum_v softmax(beta_{l-1}(v))_w route_vw(cell_{l-1}(v))

So there is a cell for each layer and width, not one for each route. Its second input is the summed
input one layer back. All widths of a layer share one alpha; their weights are their own.

*Deriving.* Each node keeps the two edges whose best operation other than "none" weighs most. The
widths are the path with the largest *product* of weights (Viterbi); greedy steps may miss it. The
loss is (L1 + .6 s) / 2, s = -log10 of the mean SSIM, and has no cost in it. For denoising it is
MSE + .5 s, on grey pictures, sigma 30, 50, 70 (of 255) mixed, the noise not clipped.

The paper claims (abstract) a search in 1 hour on BSD500, 3.5 on DIV2K, with one GTX 1080Ti. Read in
its code: SGD, .025 to .001, for 100 epochs; logits from 1, by Adam, 1e-3, from epoch 21, decay
1e-3; x4, whose cells serve every scale; batch norm; supernets end in sigmoid(bilinear + output),
found networks in bicubic + output; these are twice as wide (F = 16 after 8) and start afresh. With
its own decoder the x2 supernet has 405,648 weights. No found network is published.

Ours: the decoder (from each last width a 3x3 convolution and a shuffle), no batch norm, Adam for
the weights, L1 after the search as for all neighbours, one denoiser for all sigmas; where the layer
before lacks a cell's width, the cell takes its own input twice; logits without decay, as with it
all fell together and hardly moved apart (seen). `lost`: by keeping the weights.
"""
import math
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
from search import positive
from search_space import enlarge
from sparsestmax import softmax

LOGITS_RATE = 5e-3  # a search of minutes; theirs takes hours, with 1e-3
LISTEN = 0.5  # in this first part of the search the logits rest; theirs .2 of many more steps


# --- 1. The space ------------------------------------------------------------------------------

class Space(NamedTuple):
    layers: int
    base: int  # F of the supernet
    found: int  # F of the found network
    nodes: int  # of a cell

    def widths(self, layer: int) -> range:  # 0, 1, 2 for F, 1.5 F, 2 F. Layer 0 is the head.
        return range(min(layer + 1, 3))

    @property
    def edges(self) -> list[tuple[int, int]]:  # (node, state before it): alpha's rows
        return [(node, state) for node in range(self.nodes) for state in range(node + 2)]

    @property
    def rows(self) -> list[tuple[int, int]]:  # (layer, width) that routes leave: beta's rows
        return [(layer, w) for layer in range(self.layers) for w in self.widths(layer)]

    @property
    def size(self) -> int:
        """Two edges a node, one of 6 operations on each; times the paths of widths."""
        cell, paths = math.prod(math.comb(i + 2, 2) * 6 ** 2 for i in range(self.nodes)), [1]
        for layer in range(1, self.layers + 1):  # paths: how many lead to each width
            paths = [sum(paths[max(0, w - 1):w + 2]) for w in self.widths(layer)]
        return cell ** self.layers * sum(paths)


SPACES = {"enlarge": Space(2, 8, 16, 3), "denoise": Space(3, 10, 20, 4)}
NAMES = "conv3", "sep3", "sep5", "dil3", "dil5", "skip", "none"  # none is zero: not computed


# --- 2. The networks ---------------------------------------------------------------------------

def conv(c: int, d: int, size: int, dilation: int = 1, groups: int = 1, slope: float = 1):
    layer = nn.Conv2d(c, d, size, 1, dilation * (size // 2), dilation, groups, bias=False)
    # Behind LeakyReLU of this slope it keeps the variance. Else skip is loudest and wins (seen).
    nn.init.kaiming_normal_(layer.weight, a=slope)
    return layer


def operation(name: str, c: int) -> nn.Module:
    """(B, c, H, W) -> the same. sep: twice, first each channel alone, then a 1x1."""
    if name == "skip":
        return nn.Identity()
    kind, size, relu = name[:-1], int(name[-1]), nn.LeakyReLU(0.2)
    if kind == "sep":
        return nn.Sequential(relu, conv(c, c, size, groups=c, slope=0.2), conv(c, c, 1),
                             relu, conv(c, c, size, groups=c, slope=0.2), conv(c, c, 1))
    return nn.Sequential(relu, conv(c, c, size, 2 if kind == "dil" else 1, slope=0.2))


class Cell(nn.Module):
    """names: the operations on each edge: six in the supernet, one or none in a found network."""
    def __init__(self, space: Space, c: int, names: list[list[str]]):
        super().__init__()
        self.space, self.edges = space, nn.ModuleList(
            nn.ModuleDict({name: operation(name, c) for name in edge}) for edge in names)

    def forward(self, s0, s1, alpha):
        """(B, c, H, W) twice -> (B, nodes c, H, W). alpha: (edges, 7)."""
        states = [s0, s1] + [0] * self.space.nodes
        for (node, state), ops, weights in zip(self.space.edges, self.edges, alpha):
            for name, op in ops.items():
                y = weights[NAMES.index(name)] * op(states[state])  # (B, c, H, W)
                states[node + 2] = states[node + 2] + y
        return torch.cat(states[2:], 1)


class Network(nn.Module):
    """A found network, or the supernet's body. widths: each layer's, the head's first."""
    def __init__(self, space: Space, scale: int, base: int, widths, names):
        super().__init__()
        self.space, self.scale, self.widths = space, scale, widths
        self.planes = 1 if scale == 1 else 3  # grey is denoised, colour is enlarged
        channels = base, 3 * base // 2, 2 * base
        self.head = nn.Conv2d(self.planes, base, 3, padding=1)
        self.routes, self.cells, self.tails = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for layer, (here, there) in enumerate(pairwise(widths)):
            for w in there:
                self.cells[f"{layer}_{w}"] = Cell(space, channels[w], names[layer])
                for v in set(here) & {w - 1, w, w + 1}:
                    inside = channels[v] * (space.nodes if layer else 1)
                    self.routes[f"{layer}_{v}_{w}"] = conv(inside, channels[w], 1)
        for w in widths[-1]:
            tail = nn.Conv2d(space.nodes * channels[w], self.planes * scale ** 2, 3, padding=1)
            nn.init.normal_(tail.weight, std=1e-3)  # near zero: training starts at the skip
            self.tails[str(w)] = tail

    def forward(self, x, weights=None):
        """(B, planes, h, w) -> (B, planes, scale h, scale w). None: all weights are 1."""
        space, rows = self.space, self.space.rows
        alpha, beta = weights or ([[[1] * 7] * len(space.edges)] * space.layers,
                                  [[1] * 3] * len(rows))
        before = out = {0: self.head(x)}  # by width: a layer's summed input, and its output
        for layer, widths in enumerate(self.widths[1:]):
            summed = {w: sum(beta[rows.index((layer, v))][w - v + 1]
                             * self.routes[f"{layer}_{v}_{w}"](y)  # (B, c, h, w)
                             for v, y in out.items() if abs(v - w) <= 1) for w in widths}
            before, out = summed, {  # (B, nodes c, h, w)
                w: self.cells[f"{layer}_{w}"](before.get(w, s), s, alpha[layer])
                for w, s in summed.items()}
        y = sum(self.tails[str(w)](h) for w, h in out.items())  # (B, planes scale^2, h, w)
        skip = x if self.scale == 1 else enlarge(x, self.scale)
        return skip + F.pixel_shuffle(y, self.scale)


class Supernet(Network):
    def __init__(self, space: Space, scale: int):
        super().__init__(space, scale, space.base, [*map(space.widths, range(space.layers + 1))],
                         [[NAMES[:-1]] * len(space.edges)] * space.layers)
        self.alpha = nn.Parameter(torch.ones(space.layers, len(space.edges), len(NAMES)))
        self.beta = nn.Parameter(torch.ones(len(space.rows), 3))
        self.register_buffer("exists", torch.tensor(  # no route leads beyond F and 2 F
            [[w in space.widths(layer + 1) for w in (v - 1, v, v + 1)] for layer, v in space.rows]))

    def weights(self, progress: float):  # alpha, beta (softmax: the same at every progress)
        beta = self.beta.masked_fill(~self.exists, -torch.inf)
        return softmax(self.alpha, progress), softmax(beta, progress)


# --- 3. What is minimised ----------------------------------------------------------------------

def log_ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """-log10 of the mean SSIM of pictures (B, planes, H, W) in [0, 1]; 0 where they are equal."""
    gauss = torch.exp(-torch.arange(-5, 6, dtype=torch.double) ** 2 / (2 * 1.5 ** 2))
    window = gauss.outer(gauss).expand(4, 1, 11, 11) / gauss.sum() ** 2
    a, b = (x.double().reshape(-1, *x.shape[2:]) for x in (a, b))  # (B planes, H, W)
    x = torch.stack([a, b, a * a + b * b, a * b], 1)  # (B planes, 4, H, W)
    a, b, squares, both = F.conv2d(x, window, groups=4).unbind(1)  # means under the window
    values = ((2 * a * b + 1e-4) * (2 * (both - a * b) + 9e-4)
              / ((a * a + b * b + 1e-4) * (squares - a * a - b * b + 9e-4)))
    return -values.mean().clamp(min=1e-3).log10().float()  # (SSIM may be negative)


def search_loss(output, target, task: str) -> torch.Tensor:
    if task == "denoise":
        return F.mse_loss(output, target) + 0.5 * log_ssim(output, target)
    return (F.l1_loss(output, target) + 0.6 * log_ssim(output, target)) / 2


# --- 4. Deciding -------------------------------------------------------------------------------

def best_path(space: Space, beta) -> tuple[float, tuple[int, ...]]:
    """Viterbi: the largest product of weights, and the widths of the layers on its way."""
    best = {0: (1.0, ())}  # by width: the best product that leads there, and its path
    for layer in range(space.layers):
        further = {}
        for v, w in product(best, space.widths(layer + 1)):
            if abs(v - w) <= 1:
                weight = float(beta[space.rows.index((layer, v))][w - v + 1])
                way = best[v][0] * weight, (*best[v][1], w)
                further[w] = max(further.get(w, way), way)
        best = further
    return max(best.values())


def derive(space: Space, alpha, beta):
    """The widths and the names of the found network, as `Network` takes them."""
    names = [[[] for _ in space.edges] for _ in alpha]
    for layer, node in product(range(space.layers), range(space.nodes)):
        value, best = alpha[layer, :, :-1].max(-1)  # (edges,) each
        edges = [e for e, (to, _) in enumerate(space.edges) if to == node]
        for e in sorted(edges, key=lambda e: -value[e])[:2]:
            names[layer][e] = [NAMES[best[e]]]
    return [[0], *([w] for w in best_path(space, beta)[1])], names


# --- 5. The search, and the whole run ----------------------------------------------------------

def search(net: Supernet, data, args, history: list[dict]) -> list:
    """Trains weights and logits in turn. -> snapshots (step, alpha, beta)."""
    generator, logits = torch.Generator().manual_seed(args.seed), [net.alpha, net.beta]
    kernels = [p for name, p in net.named_parameters() if name not in ("alpha", "beta")]
    adam = torch.optim.Adam(kernels, args.rate, (0.9, 0.99), fused=True)
    logits_adam = torch.optim.Adam(logits, LOGITS_RATE, (0.5, 0.999), fused=True)
    snapshots, every = [], max(1, args.search // 100)
    for step in common.progress_bar(range(1, args.search + 1), "search"):
        # 1. The weights learn from one half of the photographs, the logits as they stand.
        weights = net.weights(step / args.search)
        fixed = [w.detach() for w in weights]
        x, target = data.half_a.batch(args.batch, generator)
        loss = search_loss(net(x, fixed), target, args.task)
        adam.zero_grad()
        loss.backward()
        adam.step()
        # 2. The logits learn from the other half, the weights as they stand.
        if step > LISTEN * args.search:
            x, target = data.half_b.batch(args.batch, generator)
            logits_adam.zero_grad()
            search_loss(net(x, weights), target, args.task).backward(inputs=logits)
            logits_adam.step()
        # 3. Keep books. The cost is that of the network which would be derived now.
        if step % every == 0:
            now = [w.detach() for w in net.weights(step / args.search)]
            found = Network(net.space, args.scale, net.space.found, *derive(net.space, *now))
            live = [(w > 0).sum(-1).float().mean().item() for w in now]  # of a choice, on average
            history.append(dict(step=step, loss=loss.item(), live_operations=live[0],
                                live_widths=live[1], cost=common.count(found, args.scale)[1]))
            snapshots.append((step, *now))
    return snapshots


def whole_run(args):
    space, history, seconds, noise = SPACES[args.task], [], {}, args.task == "denoise"
    args.scale = 1 if noise else args.scale
    if args.patch * args.scale < 11:
        raise ValueError(f"--patch {args.patch}: SSIM's window needs 11 pixels of HR")
    data = common.photographs(args)
    if noise:
        data = type(data)(*(common.Noisy(patches, args.sigma) for patches in data))
    # 1. The search.
    net = Supernet(space, args.scale).to(memory_format=torch.channels_last)
    with common.timed(seconds, "search"):
        steps, alpha, beta = map(np.stack, zip(*search(net, data, args, history)))
    # 2. The decision, and what it would lose: the supernet's weights in the derived network.
    weights = [w.detach() for w in net.weights(1.0)]
    widths, names = derive(space, *weights)
    derived = Network(space, args.scale, space.base, widths, names)
    derived.load_state_dict(net.state_dict(), strict=False)  # what both have has the same name
    before, after = (common.psnr_of_batch(model, data.half_b, args)
                     for model in (lambda x: net(x, weights), derived))
    # 3. The found network, twice as wide, from scratch.
    found = dict(scale=args.scale, base=space.found, widths=widths, names=names)
    network = Network(space, **found)
    with common.timed(seconds, "training"):
        common.train(network, data.whole, args, args.steps - args.search, history)
    common.finish(args, network, found, history, dict(steps=steps, alpha=alpha, beta=beta), seconds,
                  common.denoised(network, args) if noise else None, lost=round(before - after, 3),
                  live=f"{(alpha[-1] > 0).sum(-1).mean():g} operations an edge", kept=False)


def main(argv=None):
    parser = common.arguments("hinas", "Operations and widths by softmax, then the best path.",
                              steps=2000, search=100, batch=8, patch=24, rate=3e-3)
    parser.add_argument("--task", choices=SPACES, default="enlarge", help="what to search for")
    parser.add_argument("--sigma", type=positive, nargs="+", default=[30, 50, 70], help="of noise")
    common.main(parser, whole_run, argv)


if __name__ == "__main__":
    main()
