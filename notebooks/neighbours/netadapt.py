"""NetAdaptV2: train all widths at once, one per image; then shrink, and look after every shrinking.

    python notebooks/neighbours/netadapt.py                          # generated pictures
    python notebooks/neighbours/netadapt.py --data DIR --benchmark Set5
    python notebooks/neighbours/netadapt.py --scale 4 --data DIR --budget 2G

Yang, Liao and Sze, *NetAdaptV2* (arXiv 2104.00031). How many layers should a network have, and how
wide should each be? Trilevel mixes all answers, weighed by logits. Here there are no logits:
**nothing is relaxed**. One network is trained so that it still works when its layers are made
narrower, and a search then tries narrower ones and measures them. Four ideas (paper, abstract):

*Depth and width are one question* (sec. 2.2, the channel-level bypass). A layer of C channels has
width w if only its first w filters are left. Where a filter is missing, the *input* channel of the
same number takes its place (as we recall it; only the paper's introduction could be read):

    y = m op(x) + (1 - m) x          m[ch] = 1 if ch < w, else 0

At w = C that is the plain layer. At w = 0 it is y = x: the layer is gone. So one number per layer
says how wide it is and whether it exists. A layer's input always keeps C channels, hence a 3x3
convolution costs 9 C w multiply-adds a pixel, in proportion to w.

*Several networks per pass* (sec. 2.3, ordered dropout). Each *image* of a batch is given widths of
its own, drawn afresh. What is dropped are always the last channels, so that narrow layers are the
leading part of wide ones. One forward and backward pass trains B networks, one for each image, and
exactly so: loss and gradients are those of the B narrow networks, each on its image
(tests/test_netadapt.py). With the widths 0, 8, 16 and 24 equally likely, as here, the first third
of the channels learns from 3/4 of the images, the second from 1/2, the last from 1/4. (Hence the
widest network, whose last channels learn least, need not be the best one of them.)

*Several layers per step* (sec. 2.4), the multi-layer coordinate descent. From the current network
make J samples; for each, L random layers are narrowed together until a target of cost is met. Score
all, keep the best, go on from there with a lower target. The ancestor, NetAdapt (arXiv 1804.03230),
narrowed one layer at a time and trained every sample a little before scoring it. Its targets:

    target_i = current cost - 2.5 % of the first cost * 0.96^(i - 1)

*Any measure will do.* Nothing is differentiated by the widths, so cost may come from a table or a
clock, and quality may be rounded. We score PSNR *after rounding to 8 bits*, as a picture file has
it, on photographs that the weights have not seen. (Rounding has no gradient: no logit could learn
from it.)

The paper claims (abstract) a search up to 5.8 times as fast on ImageNet and 2.4 times on NYU Depth
V2, and 1.8 % more top-1 accuracy than MobileNetV3 at equal latency. We know of no public code.

**Ours:** the network (cells of 3x3 convolutions, Trilevel's head, tail and bicubic skip; the paper
adapts other networks to other tasks), the widths 0, 8, 16, 24, L = 2, J = 16, a first reduction of
L times NetAdapt's (two layers do it together), and multiply-adds for cost. The found network keeps
its weights and trains on. (What the paper does there we could not read.)
"""
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import arguments, finish, main as run_main, photographs, progress_bar
from common import psnr_of_batch, timed, train
from search import budget
from search_space import Tail, conv, cost_in_words, enlarge
from supernet import leading

CHANNELS = 24
WIDTHS = 0, 8, 16, 24
BUDGETS = {2: 6e9, 3: 3e9, 4: 2e9}  # multiply-adds; what Trilevel's lesson runs may cost
FIRST, DECAY = 0.025, 0.96  # NetAdapt's reductions: the first, as a part of all, and how they fall
LAYERS, SAMPLES = 2, 16  # L and J of the descent
HELD_OUT = 64  # patches that a sample is scored on


# --- The space ---------------------------------------------------------------------------------

@dataclass(frozen=True)
class Space:
    """A width for every layer. An answer, `widths`, is a tuple with a row per cell.

    >>> one_cell = Space(cells=1)
    >>> one_cell.size, [Space.weights([[w]]) for w in WIDTHS]
    (64, [0, 1728, 3456, 5184])
    """
    scale: int = 2
    cells: int = 3
    positions: int = 3  # layers in a cell

    @property
    def size(self) -> int:
        return len(WIDTHS) ** (self.cells * self.positions)

    @property
    def widest(self) -> tuple:
        return ((CHANNELS,) * self.positions,) * self.cells

    @staticmethod
    def weights(widths) -> int:
        """Of all layers: 9 C w each. Used once a pixel, they are multiply-adds too."""
        return 9 * CHANNELS * sum(map(sum, widths))

    def multiply_adds(self, widths) -> int:
        """For a 1280x720 output."""
        ends = 27 * CHANNELS + 27 * CHANNELS * self.scale ** 2  # head and tail
        return (1280 // self.scale) * (720 // self.scale) * (ends + self.weights(widths))


# --- The networks ------------------------------------------------------------------------------

class Layer(nn.Module):
    """Width w: the first w channels are convolved, the others pass by."""
    def __init__(self, width: int):
        super().__init__()
        self.conv = conv(CHANNELS, width, 3)  # no bias, so a channel that is masked is all 0

    def forward(self, x):  # (B, C, H, W) -> the same
        y = F.relu(self.conv(x))  # (B, w, H, W)
        return torch.cat([y, x[:, y.shape[1]:]], 1)


class Network(nn.Module):
    """With these widths: (B, 3, h, w) in [0, 1] -> (B, 3, scale h, scale w), not clipped."""
    def __init__(self, scale: int, widths):
        super().__init__()
        self.scale = scale
        self.head = conv(3, CHANNELS, 3, bias=True)
        self.cells = nn.ModuleList(
            nn.ModuleList(Layer(w) if w else nn.Identity() for w in row) for row in widths)
        self.tail = Tail(CHANNELS, scale)

    def forward(self, x):
        y = self.head(x)  # (B, C, h, w)
        for cell in self.cells:
            z = y
            for layer in cell:
                z = layer(z)  # (B, C, h, w)
            y = y + 0.2 * z  # (a cell without layers is y + 0.2 y)
        return self.tail(y) + enlarge(x, self.scale)


class Supernet(Network):
    """The widest network, able to act as every other one, and as another for each image."""
    def __init__(self, space: Space):
        super().__init__(space.scale, space.widest)
        self.space = space

    def forward(self, x, widths):
        """widths: int (B, cells, positions), or (cells, positions) for all images alike."""
        masks = mask(widths).expand(len(x), -1, -1, -1)  # (B, cells, positions, C)
        masks = masks[..., None, None]  # the same for all pixels
        y = self.head(x)  # (B, C, h, w)
        for c, cell in enumerate(self.cells):
            z = y
            for p, layer in enumerate(cell):
                z = torch.where(masks[:, c, p], layer(z), z)  # m op(z) + (1 - m) z
            y = y + 0.2 * z
        return self.tail(y) + enlarge(x, self.scale)


def mask(widths) -> torch.Tensor:
    """m[ch] = 1[ch < w]: int (..., cells, positions) -> bool (..., cells, positions, C)."""
    return torch.arange(CHANNELS) < torch.as_tensor(widths)[..., None]


# --- The search --------------------------------------------------------------------------------

def train_supernet(net: Supernet, patches, args, history: list) -> None:
    """args.search steps, in each of which every image trains another network."""
    space, generator = net.space, torch.Generator().manual_seed(args.seed)
    net.to(memory_format=torch.channels_last)
    optimiser = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99), fused=True)
    mean_cost = np.mean([space.multiply_adds([[w] * space.positions] * space.cells)
                         for w in WIDTHS])  # (cost is linear in the widths)
    recent = []
    for step in progress_bar(range(args.search), "supernet"):
        # 1. Widths for each image, all equally likely, in all of the search.
        shape = args.batch, space.cells, space.positions
        widths = torch.tensor(WIDTHS)[torch.randint(len(WIDTHS), shape, generator=generator)]
        # 2. One pass, and one step for all these networks together.
        lr, hr = patches.batch(args.batch, generator)
        loss = F.l1_loss(net(lr, widths), hr)
        optimiser.param_groups[0]["lr"] = args.rate * min(1.0, (step + 1) / 100)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        # 3. Keep books. All widths of a layer are alive, as none has been decided on.
        recent.append(loss.item())
        if (step + 1) % max(1, args.search // 100) == 0:
            history.append(dict(step=step + 1, loss=float(np.mean(recent)), live=len(WIDTHS),
                                cost=float(mean_cost)))
            recent = []


@torch.no_grad()
def score(net: Supernet, widths, batch) -> float:
    """PSNR (dB, of RGB) with these widths on a batch, after rounding to 8 bits."""
    lr, hr = batch
    sr = (net(lr, torch.tensor(widths)).clamp(0, 1) * 255).round() / 255
    return -10 * F.mse_loss(sr, hr).log10().item()


def shrunk(space: Space, widths, target: float, rng: random.Random) -> tuple:
    """`widths` with LAYERS random layers narrowed, a notch at a time, until the target is met.

    (Others help where these are gone before.)
    """
    widths = [list(row) for row in widths]
    layers = [(row, p) for row in widths for p, w in enumerate(row) if w > 0]
    chosen = rng.sample(layers, min(LAYERS, len(layers)))
    while space.multiply_adds(widths) > target:
        row, p = rng.choice([(row, p) for row, p in chosen if row[p] > 0]
                            or [(row, p) for row, p in layers if row[p] > 0])
        row[p] = WIDTHS[WIDTHS.index(row[p]) - 1]
    return tuple(map(tuple, widths))


def descend(space: Space, score, most: float, rng: random.Random):
    """Yields (widths, score) from the widest network down to one that costs at most `most`.

    score: called with widths. ValueError if no network is that cheap.
    """
    current, least = space.widest, space.multiply_adds([[0]])
    if most < least:
        raise ValueError(f"without any layer there are {cost_in_words(least, 'multiply-adds')} "
                         f"left: --budget {most / 1e9:.4g}G is too little")
    yield current, score(current)
    reduction = LAYERS * FIRST * space.multiply_adds(current)
    while (cost := space.multiply_adds(current)) > most:
        # 1. How cheap the next network must be. (Not cheaper than was asked for.)
        target = max(cost - reduction, most)
        reduction *= DECAY
        # 2. Samples, each with a few layers narrowed together.
        samples = [shrunk(space, current, target, rng) for _ in range(SAMPLES)]
        # 3. Measure them as they are, with the supernet's weights. 4. Go on from the best.
        best, current = max((score(widths), widths) for widths in samples)
        yield current, best


def derive(net: Supernet, widths) -> Network:
    """The narrow network, with its filters. It computes what the supernet computes as it."""
    network = Network(net.scale, widths)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(leading(net.get_parameter(name), parameter))
    return network


# --- The command line --------------------------------------------------------------------------

def whole_run(args):
    space, history, seconds = Space(args.scale), [], {}
    most, unit = args.budget or (BUDGETS[args.scale], "multiply-adds")
    if unit == "ms":
        raise ValueError("--budget is in multiply-adds here, as 6G")
    next(descend(space, lambda _: 0.0, most, None))  # what is impossible ends before the long work
    data = photographs(args)
    net = Supernet(space)
    with timed(seconds, "search"):
        train_supernet(net, data.half_a, args, history)
        held_out = data.half_b.batch(HELD_OUT, torch.Generator().manual_seed(args.seed))
        way = list(descend(space, lambda widths: score(net, widths, held_out), most,
                           random.Random(args.seed)))
    costs = [space.multiply_adds(widths) for widths, _ in way]
    # Before the descent all widths are alive. On the way, a layer's own and the smaller ones.
    alive = [np.mean(np.searchsorted(WIDTHS, widths) + 1) for widths, _ in way]
    history += [dict(step=args.search, psnr=psnr, live=float(live), cost=cost)
                for (_, psnr), live, cost in zip(way, alive, costs)]
    widths = way[-1][0]
    network = derive(net, widths)
    # Deciding costs what the found network has less than the widest, with the same weights.
    lost = (psnr_of_batch(lambda lr: net(lr, torch.tensor(space.widest)), data.half_b, args)
            - psnr_of_batch(network, data.half_b, args))
    with timed(seconds, "training"):
        train(network, data.whole, args, args.steps - args.search, history)
    chosen = np.array([w for w, _ in way])[..., None] == np.array(WIDTHS)
    finish(args, network, dict(scale=args.scale, widths=widths), history,
           dict(cost=np.array(costs), psnr=np.array([psnr for _, psnr in way]),
                widths=chosen.astype(np.float32)),  # (T, cells, positions, candidates)
           seconds, live=len(WIDTHS), lost=round(lost, 3), kept=True, networks=space.size,
           budget=cost_in_words(most, unit), widths=widths)


def main(argv=None):
    parser = arguments("netadapt", "One network for all widths, then a descent to a budget.",
                       steps=5000, search=1500, batch=16, patch=24, rate=3e-3)
    parser.add_argument("--budget", type=budget, help="most multiply-adds for a 1280x720 output, "
                        "as 6G (default: 6G, 3G, 2G at x2, x3, x4)")
    run_main(parser, whole_run, argv)


if __name__ == "__main__":
    main()
