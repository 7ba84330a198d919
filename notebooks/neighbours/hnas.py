"""HNAS: a controller draws whole networks, and learns from how well each one did.

    python notebooks/neighbours/hnas.py                           # generated pictures, no download
    python notebooks/neighbours/hnas.py --data DIR --benchmark SET5 --out runs/hnas
    python notebooks/neighbours/hnas.py --network A --data DIR --out runs/hnas-A     # no search

Source: Guo et al., *Hierarchical Neural Architecture Search for Single Image Super-Resolution*
(arXiv 2003.04619). Its abstract claims no figures.

*The problem.* A network is a row of layers: one upsampling cell, the others normal cells, all of a
kind alike. Each of a cell's four nodes needs two inputs, and an operation for each. The upsampling
cell needs a position, which decides the price: behind it there are scale * scale times the pixels.

*What is relaxed by what?* Nothing. Each choice has logits, a *controller* draws one candidate with
chance p = softmax(logits), and the drawn network is judged as it is. Its reward R has no slope, so
the logits learn by REINFORCE: make likelier what did better than usual. "Usual" is b, the running
mean of R. It takes noise away and leaves the expectation as it is.

    gradient of E[R] = E[(R - b) * gradient of log p(drawn)]
    R    = 0.2 PSNR - 0.8 cost / 2         cost: multiply-adds for 48x48 LR pixels, in 1e8
    b   <- 0.95 b + 0.05 R
    loss = -(log p_normal + log p_up + 10 log p_position) (R - b)
           - ENTROPY (H_normal + H_up + 10 H_position)

H, the entropy of the choices, keeps the controller curious. All networks share weights, a set for
each layer (and edge, operation, stride: ours), so none is trained before it is judged.

*What the public code does* (as read and run), *and what we do*:
    controller  three LSTMs, 348,323 parameters, Adam 3e-4, decay 5e-4; ours: logits, Adam 3e-2
    ENTROPY     1 in its README, which freezes the controller; ours: .01
    cost        another sample's, with unused modules, no deconvolutions; ours: the network's own
    steps       1,000 of each kind by turns, 400 times, b anew; ours: one of each, after a warm-up
    derive      best PSNR of ten samples on the *test* set; ours: on the controller's photographs
    batch norm  in the search network only; ours: never, so the weights of the search are kept
    output      + mean colour; ours: + bicubic. PSNR in our R is what exceeds bicubic's
    sizes       12 layers of 64 channels; ours: 5 of 8. At x3 it deconvolves n to 3n - 2 pixels
"""
import math
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical

import common
from search_space import enlarge
from sparsestmax import softmax

LESSON, FULL = dict(layers=5, channels=8), dict(layers=12, channels=64)
EDGES = 8  # in a cell: two for each of the nodes 2, 3, 4, 5; the nodes 0 and 1 are its inputs
ENTROPY, POSITION = 0.01, 10  # what curiosity is worth; how much more the position counts
WARM, LOGITS_RATE = 0.25, 3e-2  # the controller rests for this part of the search
DECONV = {1: (3, 1, 1, 0), 2: (3, 2, 1, 1), 3: (5, 3, 1, 0), 4: (5, 4, 1, 1)}  # by stride


# --- The space ---------------------------------------------------------------------------------

class Rcab(nn.Module):
    """Two 3x3 convolutions, times a factor for each channel that its mean decides; plus input."""
    def __init__(self, c: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(c, c, 3, 1, 1), nn.ReLU(), nn.Conv2d(c, c, 3, 1, 1))
        self.attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c // 3, 1), nn.ReLU(),
                                       nn.Conv2d(c // 3, c, 1), nn.Sigmoid())

    def forward(self, x):  # (B, C, H, W) -> the same
        y = self.body(x)
        return x + y * self.attention(y)  # times (B, C, 1, 1)


def separable(c, size, dilation):  # ReLU, size x size on each channel alone, 1x1 across channels
    return [nn.ReLU(), nn.Conv2d(c, c, size, 1, dilation * (size // 2), dilation, c, bias=False),
            nn.Conv2d(c, c, 1, bias=False)]


def sub_pixel(c: int, stride: int) -> nn.Module:
    """3x3 to c f^2 channels, shuffled to f times the size; at x4 twice, at stride 1 not at all."""
    return nn.Sequential(*sum(([nn.Conv2d(c, c * f * f, 3, padding=1), nn.PixelShuffle(f)]
                               for f in {1: (), 2: (2,), 3: (3,), 4: (2, 2)}[stride]), []))


# What builds an operation for c channels and stride s, and its multiply-adds for each *input* pixel
# (rcab's attention adds some once a picture). s is the scale at inputs of an upsampling cell, or 1.
OPERATIONS = {
    "normal": {
        "rcab": (lambda c, s: Rcab(c), lambda c, s: 18 * c * c),
        "skip": (lambda c, s: nn.Identity(), lambda c, s: 0),
        **{f"sep{k}": (lambda c, s, k=k: nn.Sequential(*separable(c, k, 1), *separable(c, k, 1)),
                       lambda c, s, k=k: 2 * (k * k * c + c * c)) for k in (3, 5)},
        **{f"dil{k}": (lambda c, s, k=k: nn.Sequential(*separable(c, k, 2)),
                       lambda c, s, k=k: k * k * c + c * c) for k in (3, 5)}},
    "up": {
        "sub": (sub_pixel, lambda c, s: {1: 0, 2: 36, 3: 81, 4: 180}[s] * c * c),
        "deconv": (lambda c, s: nn.ConvTranspose2d(c, c, *DECONV[s]),
                   lambda c, s: DECONV[s][0] ** 2 * c * c),
        **{mode: (lambda c, s, mode=mode: nn.Upsample(scale_factor=s, mode=mode), lambda c, s: 0)
           for mode in ("bilinear", "nearest", "area")}}}


def candidates(layers: int) -> list[int]:
    """How many each choice has: for each kind and edge an input and an operation; the position."""
    return [n for operations in OPERATIONS.values() for edge in range(EDGES)
            for n in (2 + edge // 2, len(operations))] + [layers]


def size(layers: int) -> int:
    """Of the space: 1.63e21 with 12 layers. (As a node's edges may be swapped, 1.0e19 differ.)"""
    return math.prod(candidates(layers))


class Architecture(NamedTuple):
    """One network on paper. A cell: eight edges (operation, input), two for each node."""
    position: int  # of the upsampling cell, counted from 0
    normal: tuple
    up: tuple

    def multiply_adds(self, layers: int, channels: int, scale: int, pixels=None) -> int:
        """For so many LR pixels; by default for an output of 1280x720, as `common.count` counts."""
        c, n = channels, pixels or (1280 // scale) * (720 // scale)
        total = 108 * c * n  # the stem
        for layer in range(layers):
            kind, s = ("up", scale) if layer == self.position else ("normal", 1)
            total += 8 * c * c * n  # the 1x1 convolutions on both inputs
            for name, source in getattr(self, kind):
                stride, inputs = (s, n) if source < 2 else (1, n * s * s)
                total += OPERATIONS[kind][name][1](c, stride) * inputs
                total += 2 * c * (c // 3) * (name == "rcab")
            n *= s * s
        return total + 108 * c * n  # the last convolution


PUBLISHED = {name: Architecture(position, *(
    tuple((edge[:-2], int(edge[-1])) for edge in cell.split() if edge != "|") for cell in cells))
    for name, position, *cells in (  # "operation:input", two for each of the nodes 2 | 3 | 4 | 5
        ("A", 9, "skip:1 sep5:1 | dil3:0 dil5:1 | skip:1 dil3:1 | dil5:1 sep3:4",
         "deconv:0 bilinear:0 | area:1 deconv:0 | area:3 bilinear:0 | bilinear:1 deconv:3"),
        ("B", 11, "dil3:0 rcab:1 | dil5:0 sep5:1 | sep3:1 dil3:0 | sep3:2 dil5:3",
         "sub:1 bilinear:1 | bilinear:1 sub:0 | sub:3 sub:3 | deconv:0 nearest:1"),
        ("C", 9, "rcab:1 skip:1 | dil3:1 skip:0 | dil5:0 rcab:3 | dil5:4 dil3:0",
         "sub:0 nearest:1 | deconv:2 nearest:0 | deconv:3 sub:2 | bilinear:0 area:0"))}


# --- The networks ------------------------------------------------------------------------------

class Cell(nn.Module):
    """Four nodes, each the sum of two operations on earlier ones. edges: of one cell; None: all."""
    def __init__(self, c: int, kind: str, scale: int, edges: tuple | None):
        super().__init__()
        self.scale = scale if kind == "up" else 1
        self.entries = nn.ModuleList(nn.Conv2d(4 * c, c, 1, bias=False) for _ in range(2))
        self.operations = nn.ModuleDict()
        for i in range(EDGES):
            for name, source in ([edges[i]] if edges else  # 0 and 2 stand for inputs and nodes
                                 product(OPERATIONS[kind], (0, 2) if i > 1 else (0,))):
                stride = self.scale if source < 2 else 1  # nodes are large already
                self.operations[f"{i} {name} {stride}"] = OPERATIONS[kind][name][0](c, stride)

    def forward(self, before, last, edges):  # (B, 4C, H, W) twice -> (B, 4C, scale H, scale W)
        states = [entry(F.relu(x)) for entry, x in zip(self.entries, (before, last))]
        for i, (name, source) in enumerate(edges):
            stride = self.scale if source < 2 else 1
            y = self.operations[f"{i} {name} {stride}"](states[source])  # (B, C, scale H, scale W)
            states.append(states.pop() + y if i % 2 else y)
        return torch.cat(states[2:], 1)


class Network(nn.Module):
    """A found network or, without architecture, the supernet: all operations, by the same names."""
    def __init__(self, layers: int, channels: int, scale: int, architecture=None):
        super().__init__()
        a, c = architecture, channels
        self.scale, self.architecture = scale, a
        self.stem = nn.Conv2d(3, 4 * c, 3, padding=1, bias=False)
        self.layers = nn.ModuleList(nn.ModuleDict(
            {kind: Cell(c, kind, scale, a and getattr(a, kind)) for kind in OPERATIONS
             if not a or (kind == "up") == (layer == a.position)}) for layer in range(layers))
        self.last = nn.Conv2d(4 * c, 3, 3, padding=1)
        for parameter in self.parameters():
            if parameter.dim() > 1:  # ReLUs halve the variance, but sums double it: no gain
                nn.init.kaiming_normal_(parameter, nonlinearity="linear")
        nn.init.normal_(self.last.weight, std=1e-3)  # near zero: training starts at bicubic

    def forward(self, x, architecture=None):  # (B, 3, h, w) -> (B, 3, scale h, scale w)
        a = architecture or self.architecture
        before = last = self.stem(x - 0.44)  # (B, 4C, h, w); theirs: minus a mean colour
        for layer, cells in enumerate(self.layers):
            if layer == a.position:  # what was before is too small for the layers behind
                before = last = cells["up"](before, last, a.up)  # (B, 4C, scale h, scale w)
            else:
                before, last = last, cells["normal"](before, last, a.normal)  # (B, 4C, H, W)
        return self.last(last) + enlarge(x, self.scale)


# --- The search --------------------------------------------------------------------------------

class Controller:
    """The logits, a row for each choice, as long as the longest. And how they learn."""
    def __init__(self, layers: int):
        n = torch.tensor(candidates(layers))  # (choices,)
        self.logits = nn.Parameter(torch.zeros(len(n), n.max()))
        self.forbidden = torch.arange(n.max()) >= n[:, None]  # what only fills up a row
        self.adam = torch.optim.Adam([self.logits], LOGITS_RATE, (0.5, 0.999))
        self.usual = None  # b

    def weights(self, progress):  # (choices, candidates): chances; softmax heeds no progress
        return softmax(self.logits.masked_fill(self.forbidden, -torch.inf), progress)

    def draw(self, progress: float) -> tuple[Architecture, torch.Tensor, torch.Tensor]:
        """A network; of each of its choices log p, and the entropy: (choices,) both."""
        chances = Categorical(self.weights(progress))
        drawn = chances.sample()  # (choices,)
        pick = iter(drawn.tolist())  # input, operation, input, operation, ...; the position
        cells = [tuple((tuple(operations)[k], source) for _, source, k in
                       zip(range(EDGES), pick, pick)) for operations in OPERATIONS.values()]
        return Architecture(next(pick), *cells), chances.log_prob(drawn), chances.entropy()

    def learn(self, reward, progress: float) -> None:
        """One step of REINFORCE, by the reward of one network. reward: Architecture -> R."""
        a, log_p, entropy = self.draw(progress)
        r = reward(a)
        self.usual = r if self.usual is None else 0.95 * self.usual + 0.05 * r
        worth = log_p * (r - self.usual) + ENTROPY * entropy
        self.adam.zero_grad()
        (-worth[:-1].sum() - POSITION * worth[-1]).backward()
        self.adam.step()


def search(args, data, history, snapshots):
    """-> the supernet and its controller."""
    size, generator = dict(**LESSON, scale=args.scale), torch.Generator().manual_seed(args.seed)
    net, controller = Network(**size), Controller(LESSON["layers"])
    adam = torch.optim.Adam(net.to(memory_format=torch.channels_last).parameters(), args.rate)

    def reward(a: Architecture) -> float:
        lr, hr = data.half_b.batch(args.batch, generator)
        with torch.no_grad():
            e = [1e-9 + F.mse_loss(y.clamp(0, 1), hr) for y in (enlarge(lr, net.scale), net(lr, a))]
        gain, cost = 10 * math.log10(e[0] / e[1]), a.multiply_adds(**size, pixels=48 * 48) / 1e8
        return 0.2 * gain - 0.8 * cost / 2

    for step in common.progress_bar(range(args.search), "search"):
        progress = step / args.search
        # 1. Draw a network. Its share of the weights learns, from one half of the photographs.
        a, _, entropy = controller.draw(progress)
        lr, hr = data.half_a.batch(args.batch, generator)
        loss = F.l1_loss(net(lr, a), hr)
        adam.zero_grad()
        loss.backward()
        adam.step()
        # 2. Draw another. The controller learns from its reward, on the other half.
        if progress >= WARM:
            controller.learn(reward, progress)
        # 3. Keep books. Live: so many equally likely candidates would be as uncertain.
        history.append(dict(step=step + 1, loss=loss.item(), live=entropy.exp().mean().item(),
                            multiply_adds=a.multiply_adds(**size)))
        snapshots.append(controller.weights(progress).detach().numpy())
    return net, controller


def derive(net: Network, controller: Controller, patches, args) -> tuple[Network, float]:
    """The best of ten samples, with its weights; and how much worse they are on average, in dB."""
    drawn = [controller.draw(1.0)[0] for _ in range(10)]
    scores = {a: common.psnr_of_batch(lambda lr: net(lr, a), patches, args) for a in drawn}
    best = max(scores, key=scores.get)
    network = Network(**LESSON, scale=net.scale, architecture=best)
    network.load_state_dict({name: net.state_dict()[name] for name in network.state_dict()})
    return network, sum(scores.values()) / len(scores) - scores[best]


# --- The command line --------------------------------------------------------------------------

def whole_run(args):
    data, history, snapshots, seconds = common.photographs(args), [], [], {}
    if args.network:
        args.search, report = 0, dict(live="no search")
        network = Network(**FULL, scale=args.scale, architecture=PUBLISHED[args.network])
    else:
        with common.timed(seconds, "search"):
            net, controller = search(args, data, history, snapshots)
            network, lost = derive(net, controller, data.half_b, args)
        report = dict(live=f"{history[-1]['live']:.1f} a choice", lost=lost, kept=True)
    with common.timed(seconds, "training"):
        common.train(network, data.whole, args, args.steps - args.search, history)
    weights = np.array(snapshots[::max(1, args.search // 100)])
    common.finish(args, network, network.architecture._asdict(), history, dict(weights=weights),
                  seconds, **report)


def main(argv=None):
    parser = common.arguments("hnas", "A controller draws networks, and learns from their rewards.",
                              steps=1200, search=500, batch=8, patch=24, rate=2e-3)
    parser.add_argument("--network", choices=PUBLISHED, help="no search: train this published one")
    common.main(parser, whole_run, argv)


if __name__ == "__main__":
    main()
