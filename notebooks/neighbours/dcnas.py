"""DCNAS: which earlier cells does a cell read? A dense lattice, of which each step draws a part.

    python notebooks/neighbours/dcnas.py --scale 2                      # generated pictures
    python notebooks/neighbours/dcnas.py --scale 2 --data DIR --benchmark DIR/Set5
    python notebooks/neighbours/dcnas.py --sizes 1 2 2 1 --paths 3      # two cells at half the size

Zhang et al., arXiv 2003.11883: a search for *segmentation*. A network that labels pixels wants fine
and coarse features; which to join, and in what order? Instead of a few ways through a grid of
cells, a dense lattice: every cell, at any size of features, may read *all* cells before it.

    input_j = sum_{i < j} w_ij align_ij(y_i)      w = softmax of row j's logits
    y_j     = sum_k alpha_jk op_k(input_j)        alpha = softmax, too

align is the identity if both have one size, else a 1x1 convolution and a bilinear resizing. Node 0
is the head; four cells have 1 + 2 + 3 + 4 = 10 edges. So dense a supernet is dear. Two draws keep
it small enough to be searched on the real pictures:

*Paths.* In each step a cell reads `--paths` k of its inputs, drawn without replacement, one after
the other, in proportion to w. The sum is over these, their weights divided by what they sum to.
What nobody reads is not computed. To draw so is to add a Gumbel variable to each logit and to take
the k largest (Kool et al., arXiv 1903.06059). For p = (.4, .3, .2, .1) and k = 2 the candidates
are among the drawn with chance .7159, .6083, .4413, .2345: not 2 p, but still in p's order. (k = 1
would not do: an input alone weighs 1, whatever its logit, which would learn nothing.) With k = 2 a
step keeps four fifths of the features that all inputs would need.

*Channels.* A quarter of the channels passes the mixture, the rest is copied (PC-DARTS, arXiv
1907.05737). A full convolution has 1/16 of its multiply-adds then: 324 instead of 5,184 a pixel
for 3x3 at 24 channels, and a step of all channels keeps 2.9 times as many features. Cell j takes
the j-th quarter, so that each is taken.

*Deriving.* A cell keeps its two largest w, divided by their sum, and its best operation: 18 wirings
times 4^4 operations. Cells that lead nowhere are left out. The found network passes *all* channels
through its cells, so it starts from scratch. `lost` compares the supernet, every input read, with
the derived network while it still has a quarter of the channels, and the supernet's weights.

The paper claims (abstract) 84.3 % on Cityscapes, 86.9 % on VOC 2012 and 47.12 on ADE20K. There is
no public code, and its body was not at hand. From the abstract: the dense lattice over several
sizes, its learnable weights, and the sampling of paths and channels (its fusion module and mixture
layer). Recalled, not checked: the sum above. Ours: all that is said of a step, a draw and deriving;
Trilevel's operations, head and tail; four cells, by default all at LR's size; enlarging pictures.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
from search import positive
from search_space import OPERATIONS, Tail, conv, enlarge
from sparsestmax import softmax

CELLS = 4
CHANNELS = 24
SHARE = 4  # while searching, one of so many parts of the channels passes a cell
KEEP = 2  # inputs of a found cell
LOGITS_RATE = 5e-3
LISTEN = 0.2  # in this first part of the search the logits rest
NAMES = tuple(OPERATIONS)


# --- 1. The space ------------------------------------------------------------------------------

def wirings() -> int:
    """How many ways there are to keep KEEP inputs of each cell, or all if it has fewer."""
    return math.prod(math.comb(j, min(j, KEEP)) for j in range(1, CELLS + 1))


def size() -> int:
    """How many networks: wirings, and an operation for each cell."""
    return wirings() * len(NAMES) ** CELLS


# --- 2. The networks ---------------------------------------------------------------------------

class Cell(nn.Module):
    """The j-th cell: one of `share` parts of the channels passes its operations."""
    def __init__(self, j: int, share: int, names: list[str]):
        super().__init__()
        part, before = CHANNELS // share, (j - 1) % share
        self.parts = before * part, part, (share - 1 - before) * part  # copied, passed, copied
        self.ops = nn.ModuleDict({name: OPERATIONS[name].module(part, part) for name in names})

    def forward(self, x, alpha):
        """(B, CHANNELS, H, W) -> the same. alpha: weights of all operations, (4,)."""
        left, x, right = x.split(self.parts, 1)  # (B, part, H, W) in the middle
        y = sum(alpha[NAMES.index(name)] * op(x) for name, op in self.ops.items())
        return torch.cat([left, y, right], 1)


class Align(nn.Module):
    """Features of one size to another: 1x1 convolution, then resized."""
    def __init__(self):
        super().__init__()
        self.conv = conv(CHANNELS, CHANNELS, 1)

    def forward(self, y, to):  # (B, CHANNELS, h, w) -> (B, CHANNELS, *to)
        return F.interpolate(self.conv(y), to, mode="bilinear")


def read_by_the_last(edges) -> list[int]:
    """The nodes that the last cell reads, directly or through others, and itself, in order.

    >>> read_by_the_last([[1, 0, 0], [.5, .5, 0], [.5, 0, .5]])         # three cells
    [0, 1, 2, 3]
    >>> read_by_the_last([[1, 0, 0], [.5, .5, 0], [.5, .5, 0]])         # nobody reads cell 2
    [0, 1, 3]
    """
    found = {len(edges)}
    for j in range(len(edges), 0, -1):
        if j in found:
            found |= {i for i, weight in enumerate(edges[j - 1]) if weight}
    return sorted(found)


class Network(nn.Module):
    """A found network, or the body of the supernet: they differ in what exists.

    sizes: of the cells; at 2 the features are half as high and wide as LR. edges: weights w, a row
    for each cell, 0 where it does not read. names: for each cell, its operations.
    """
    def __init__(self, scale: int, sizes: list[int], share: int, edges, names):
        super().__init__()
        self.scale, self.edges, self.sizes = scale, edges, (1, *sizes, 1)  # of head, cells, tail
        self.head, self.tail = conv(3, CHANNELS, 3, bias=True), Tail(CHANNELS, scale)
        self.cells, self.aligns = nn.ModuleDict(), nn.ModuleDict()
        _, *cells = read_by_the_last(edges)
        pairs = [(i, j) for j in cells for i in range(j) if edges[j - 1][i]]
        for j in cells:
            self.cells[str(j)] = Cell(j, share, names[j - 1])
        for i, j in [*pairs, (CELLS, CELLS + 1)]:
            if self.sizes[i] != self.sizes[j]:
                self.aligns[f"{i}_{j}"] = Align()

    def forward(self, x, edges=None, alpha=None):
        """(B, 3, h, w) -> (B, 3, scale h, scale w). edges, alpha: (4, 4) each; None: as built."""
        values = self.edges if edges is None else edges.tolist()  # plain numbers, to look at
        edges = values if edges is None else edges
        alpha = [[1] * len(NAMES)] * CELLS if alpha is None else alpha
        ys = {0: self.head(x)}  # features of each node that is read: (B, CHANNELS, H, W)

        def aligned(i, j):
            if self.sizes[i] == self.sizes[j]:
                return ys[i]
            to = [math.ceil(side / self.sizes[j]) for side in x.shape[2:]]
            return self.aligns[f"{i}_{j}"](ys[i], to)
        for j in read_by_the_last(values)[1:]:
            inputs = [edges[j - 1][i] * aligned(i, j) for i in range(j) if values[j - 1][i]]
            ys[j] = self.cells[str(j)](sum(inputs), alpha[j - 1])
        return self.tail(aligned(CELLS, CELLS + 1)) + enlarge(x, self.scale)


def draw(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Mask (..., K) of k candidates, drawn without replacement in proportion to softmax(logits).

    Of a row that has fewer, all. A logit of -inf is no candidate.
    """
    gumbel = -torch.empty_like(logits).exponential_().log()
    best = (logits + gumbel).topk(min(k, logits.shape[-1])).indices
    return torch.zeros_like(logits).scatter(-1, best, 1).bool() & (logits > -torch.inf)


class Supernet(Network):
    def __init__(self, scale: int, sizes: list[int], share: int = SHARE):
        before = torch.ones(CELLS, CELLS).tril()  # cell j reads nodes 0 to j - 1
        super().__init__(scale, sizes, share, before.tolist(), [NAMES] * CELLS)
        self.register_buffer("before", before.bool())
        # Spread, so that no choice is a tie, and little, so that none has a lead.
        self.reading = nn.Parameter(1e-3 * torch.randn(CELLS, CELLS))
        self.alpha = nn.Parameter(1e-3 * torch.randn(CELLS, len(NAMES)))

    def weights(self, progress: float, paths: int | None = None):
        """(w, alpha). paths: w of as many drawn inputs of each cell; None: of all.

        Softmax over the drawn *is* softmax over all, divided by what the drawn sum to. The others
        weigh exactly 0 and get no gradient. (Neither depends on progress.)
        """
        logits = self.reading.masked_fill(~self.before, -torch.inf)
        if paths:
            logits = logits.masked_fill(~draw(logits.detach(), paths), -torch.inf)
        return softmax(logits, progress), softmax(self.alpha, progress)


# --- 3. Deciding -------------------------------------------------------------------------------

def derive(edges: torch.Tensor, alpha: torch.Tensor) -> dict:
    """What the found network reads and does: the arguments `edges` and `names` of Network."""
    kept = edges.where(edges >= edges.topk(KEEP).values[:, -1:], 0)
    kept = kept / kept.sum(-1, keepdim=True)
    return dict(edges=kept.tolist(), names=[[NAMES[k]] for k in alpha.argmax(-1)])


# --- 4. The search, and the whole run ----------------------------------------------------------

def search(net: Supernet, data, args, history: list[dict]) -> list:
    """Trains weights and logits in turn. -> snapshots (step, w, alpha)."""
    generator, logits = torch.Generator().manual_seed(args.seed), [net.reading, net.alpha]
    kernels = [p for name, p in net.named_parameters() if name not in ("reading", "alpha")]
    adam = torch.optim.Adam(kernels, args.rate, (0.9, 0.99), fused=True)
    logits_adam = torch.optim.Adam(logits, LOGITS_RATE, (0.5, 0.999), fused=True)
    snapshots, every = [], max(1, args.search // 100)
    for step in common.progress_bar(range(1, args.search + 1), "search"):
        # 1. Draw some inputs of every cell. The weights of what is read learn from one half of
        #    the photographs, the logits as they stand.
        progress = step / args.search
        drawn = [w.detach() for w in net.weights(progress, args.paths)]
        lr, hr = data.half_a.batch(args.batch, generator)
        loss = F.l1_loss(net(lr, *drawn), hr)
        adam.zero_grad()
        loss.backward()
        adam.step()
        # 2. Draw again. The logits of what is read learn from the other half.
        if step > LISTEN * args.search:
            lr, hr = data.half_b.batch(args.batch, generator)
            logits_adam.zero_grad()
            F.l1_loss(net(lr, *net.weights(progress, args.paths)), hr).backward(inputs=logits)
            logits_adam.step()
        # 3. Keep books. The cost is that of the network which would be derived now.
        if step % every == 0:
            now = [w.detach() for w in net.weights(progress)]
            found = Network(args.scale, args.sizes, 1, **derive(*now))
            live = [(w > 0).sum(-1).float().mean().item() for w in now]  # of a choice, on average
            history.append(dict(step=step, loss=loss.item(), live_inputs=live[0],
                                live_operations=live[1], cost=common.count(found, args.scale)[1]))
            snapshots.append((step, *now))
    return snapshots


def whole_run(args):
    history, seconds = [], {}
    if args.paths == 1:
        raise ValueError("--paths 1: an input alone weighs 1, so no logit would learn")
    data = common.photographs(args)
    # 1. The search.
    net = Supernet(args.scale, args.sizes).to(memory_format=torch.channels_last)
    with common.timed(seconds, "search"):
        steps, edges, alpha = map(np.stack, zip(*search(net, data, args, history)))
    # 2. The decision, and what it would lose: the supernet's weights in the derived network.
    weights = [w.detach() for w in net.weights(1.0)]
    found, live = derive(*weights), history[-1]
    derived = Network(args.scale, args.sizes, SHARE, **found)
    derived.load_state_dict(net.state_dict(), strict=False)  # what both have has the same name
    before, after = (common.psnr_of_batch(model, data.half_b, args)
                     for model in (lambda lr: net(lr, *weights), derived))
    # 3. The found network, with all channels, from scratch.
    network = Network(args.scale, args.sizes, 1, **found)
    with common.timed(seconds, "training"):
        common.train(network, data.whole, args, args.steps - args.search, history)
    common.finish(
        args, network, dict(scale=args.scale, sizes=args.sizes, share=1, **found), history,
        dict(steps=steps, edges=edges, alpha=alpha), seconds, lost=round(before - after, 3),
        live=f"{live['live_inputs']:g} inputs and {live['live_operations']:g} operations a cell",
        kept=False, networks=size())


def main(argv=None):
    parser = common.arguments("dcnas", "Cells that read all cells before them, a few at a time.",
                              steps=3000, search=400, batch=16, patch=24, rate=2e-3)
    parser.add_argument("--paths", type=positive, default=2, metavar="K",
                        help="inputs that a cell reads in a step of the search")
    parser.add_argument("--sizes", type=positive, nargs=CELLS, default=[1] * CELLS, metavar="N",
                        help="each cell's features are N times smaller than LR")
    common.main(parser, whole_run, argv)


if __name__ == "__main__":
    main()
