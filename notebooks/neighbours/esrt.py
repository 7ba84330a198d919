"""ESRT: an attention that fits into memory, as a fifth operation (Lu et al., arXiv 2108.11084).

    python notebooks/neighbours/esrt.py                                # search; generated pictures
    python notebooks/neighbours/esrt.py --data DIR --benchmark DIR     # search; photographs
    python notebooks/neighbours/esrt.py --price 0                      # what if cost did not count?

*The problem.* In attention each of N tokens looks at all others: N x N numbers in every head, far
too many where each pixel is a token. ESRT, a hand-made network, cuts the tokens into four segments
that attend within themselves. Four matrices of (N/4)^2 instead of one of N^2: a quarter.

*Its efficient transformer* at c channels (ESRT: 32; here 24). A token is a pixel's neighbourhood:

    tokens = unfold 3x3                                     N tokens of d = 9c numbers
    tokens = tokens + attention(LayerNorm(tokens))
    tokens = tokens + MLP(LayerNorm(tokens))                d -> d/4 -> d
    result = fold: each pixel is the *sum* of its places in the tokens: 9, or 6 or 4 at the border

    attention:  linear d -> d/2;  linear d/2 -> q, k, v of d/2 each;  heads of 18 numbers;
                softmax(q k' / 6) v within each segment;  linear d/2 -> d

The 6 is the root of 36, a head's width before it was halved. Segments follow the raster order: they
are stripes, of floor(N/4) tokens each. What is left over is a fifth.

*What it costs.* 2.25 d^2 + d N/4 multiply-adds a pixel. The second part grows with the picture, so
large pictures are cut into tiles. With c = 24 and tiles of 24x24 it is 104,976 + 31,104, which is
26 times conv3x3. The matrices shrink to 1/4, but the backward pass needs more than them. Kept in
all, how many times less than undivided (every run measures this again, by `memory_saved`):

    side of the tile    the matrices    all of the attention    all of the block
    24                  4.00            2.60                    2.11
    48                  4.00            3.46                    3.11

*What is relaxed by what.* All that follows is ours; the paper searches nothing. Is attention worth
26 convolutions, and where? On a fixed path of two cells, of two positions each, every position
chooses among Trilevel's four operations and "attention", all at full width, by sparsestmax. That
makes 5^4 = 625 networks. The loss of the logits is

    L1 on a half of the photographs  +  price * expected cost / cost of the dearest network

With the default sizes and seed 0, on 200 photographs, no attention is left after three quarters of
the search, not even at price 0. Our guess: a short search rewards what learns fast.

*Where this comes from.* The released code, of which the block was rebuilt with the same counts, and
of the paper the abstract. It claims 4,191M of GPU memory where a plain transformer takes 16,057M,
3.83 times; in which setting, could not be found out. In ESRT (677,783 parameters at x2) the block
stands once, behind three blocks of convolutions, which are not built here. *Ours* besides: only the
attention is done in tiles, unfolding sees across their borders; the folded sum is divided by its 9,
6 or 4 places, since no other operation of a cell enlarges its input so; a ReLU ends it, as it ends
them all.
"""
import torch
import torch.nn.functional as F
from torch import nn

from common import (arguments, count, finish, main as run, photographs, progress_bar, psnr_of_batch,
                    timed, train)
from search import checked
from search_space import OPERATIONS, Tail, conv, enlarge
from sparsestmax import sparsestmax

CHANNELS, CELLS, POSITIONS = 24, 2, 2
TILE, PARTS = 24, 4  # side of a tile, and segments in it
WARM = 0.1  # for this part of the search progress is 0 and the logits rest
LOGITS_RATE = 3e-3


# --- 1. The efficient transformer --------------------------------------------------------------

def cut(length: int, size: int) -> list[int]:  # 60 cut by 24: [24, 24, 12]
    return [min(size, length - start) for start in range(0, length, size)]


class Attention(nn.Module):
    """ESRT's multi-head attention. parts: segments in a tile; 1: undivided."""
    def __init__(self, d: int, heads: int, tile: int = TILE, parts: int = PARTS):
        super().__init__()
        self.heads, self.tile, self.parts = heads, tile, parts
        self.scale = (d // heads) ** -0.5
        self.reduce, self.qkv = nn.Linear(d, d // 2, False), nn.Linear(d // 2, 3 * d // 2, False)
        self.out = nn.Linear(d // 2, d)

    def forward(self, tokens):  # (B, H, W, d) -> the same
        qkv = self.qkv(self.reduce(tokens))  # (B, H, W, 3d/2)
        rows = [torch.cat([self.attend(tile) for tile in row.split(self.tile, 2)], 2)
                for row in qkv.split(self.tile, 1)]
        return self.out(torch.cat(rows, 1))

    def attend(self, tile):  # (B, h, w, 3d/2) -> (B, h, w, d/2)
        B, h, w, _ = tile.shape
        qkv = tile.reshape(B, h * w, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        size, mixed = self.segment(h * w), []
        for q, k, v in zip(*(each.split(size, 2) for each in qkv)):  # (B, heads, size, 18) each
            matrix = (q @ k.transpose(2, 3) * self.scale).softmax(-1)  # (B, heads, size, size)
            mixed.append(matrix @ v)  # (B, heads, size, 18)
        return torch.cat(mixed, 2).transpose(1, 2).reshape(B, h, w, -1)

    def segment(self, tokens: int) -> int:
        return max(1, tokens // self.parts)

    def extra_multiply_adds(self, tokens) -> int:
        """Of the two matrix products, which are no layers: d/2 * n^2 each, in every segment."""
        _, H, W, d = tokens.shape
        tiles = [h * w for h in cut(H, self.tile) for w in cut(W, self.tile)]
        return d * sum(n * n for N in tiles for n in cut(N, self.segment(N)))


class EfficientTransformer(nn.Module):
    def __init__(self, c: int, tile: int = TILE, parts: int = PARTS):
        super().__init__()
        d = 9 * c
        self.attention = Attention(d, c // 4, tile, parts)  # heads of 9c/2 / (c/4) = 18
        self.mlp = nn.Sequential(nn.Linear(d, d // 4), nn.ReLU(), nn.Linear(d // 4, d))
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x):  # (B, c, H, W) -> the same, up to 9 times as large
        (B, _, H, W), fold = x.shape, dict(kernel_size=3, padding=1)
        tokens = F.unfold(x, **fold).transpose(1, 2).reshape(B, H, W, -1)  # (B, H, W, 9c)
        tokens = tokens + self.attention(self.norm1(tokens))
        tokens = tokens + self.mlp(self.norm2(tokens))
        return F.fold(tokens.flatten(1, 2).transpose(1, 2), (H, W), **fold)


class AttentionOperation(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.block = EfficientTransformer(c)

    def forward(self, x):  # (B, c, H, W) -> the same
        ones = x.new_ones(1, 1, *x.shape[2:])
        places = F.conv2d(ones, x.new_ones(1, 1, 3, 3), padding=1)  # (1, 1, H, W): 9, 6 or 4
        return F.relu(self.block(x) / places)  # the mean of a pixel's places, not their sum


def kept_for_backward(module, x) -> tuple[int, int]:
    """Bytes that module(x) keeps for the backward pass beside its parameters: matrices, all."""
    own, kept = {p.data_ptr() for p in module.parameters()}, {}

    def note(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in own:  # two views of one memory count once
            square = tensor.dim() > 2 and tensor.shape[-1] == tensor.shape[-2]
            kept[memory.data_ptr()] = memory.nbytes(), square
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = module(x)
    del y  # it held all that was kept, so no memory was used twice
    return sum(n for n, square in kept.values() if square), sum(n for n, _ in kept.values())


def memory_saved(c: int, side: int) -> dict[str, float]:
    """How many times more undivided attention keeps, for a picture of one tile."""
    kept = []
    for parts in (1, PARTS):
        block = EfficientTransformer(c, side, parts)
        matrices, attention = kept_for_backward(block.attention, torch.rand(1, side, side, 9 * c))
        _, whole = kept_for_backward(block, torch.rand(1, c, side, side))
        kept.append((matrices, attention, whole))
    names = "matrices", "attention", "block"
    return {name: undivided / split for name, undivided, split in zip(names, *kept)}


# --- 2. The space and its networks -------------------------------------------------------------

CANDIDATES = {name: lambda c, make=operation.module: make(c, c)
              for name, operation in OPERATIONS.items()} | {"attention": AttentionOperation}
SPACE_SIZE = len(CANDIDATES) ** (CELLS * POSITIONS)
# For each cell, for each position: the names of its candidates; one or, in the supernet, all five.
Architecture = tuple[tuple[tuple[str, ...], ...], ...]


class Cell(nn.Module):
    def __init__(self, positions):
        super().__init__()
        self.positions = nn.ModuleList(nn.ModuleDict({name: CANDIDATES[name](CHANNELS)
                                                      for name in names}) for names in positions)

    def forward(self, x, alpha):  # (B, c, H, W) -> the same; alpha: (positions, candidates)
        y = x
        for candidates, row in zip(self.positions, alpha):
            y = sum(weight * operation(y) for weight, operation in zip(row, candidates.values())
                    if weight != 0)  # a dead operation is not computed
        return x + 0.2 * y


class Network(nn.Module):
    """(B, 3, h, w) -> (B, 3, scale h, scale w); it learns what bicubic enlargement misses."""
    def __init__(self, architecture: Architecture, scale: int):
        super().__init__()
        self.architecture, self.scale = architecture, scale
        self.head, self.tail = conv(3, CHANNELS, 3, bias=True), Tail(CHANNELS, scale)
        self.cells = nn.ModuleList(map(Cell, architecture))

    def forward(self, x, alpha=None):
        y = self.head(x)  # (B, c, h, w)
        for i, cell in enumerate(self.cells):
            y = cell(y, [[1]] * POSITIONS if alpha is None else alpha[i])
        return self.tail(y) + enlarge(x, self.scale)


def multiply_adds(architecture: Architecture, scale: int) -> int:  # for 1280x720
    return count(Network(architecture, scale), scale)[1]


class Supernet(Network):
    """All candidates at all positions, each with kernels of its own."""
    def __init__(self, scale: int):
        super().__init__(((tuple(CANDIDATES),) * POSITIONS,) * CELLS, scale)
        self.alpha = nn.Parameter(1e-3 * torch.randn(CELLS, POSITIONS, len(CANDIDATES)))
        # Costs: what is fixed, and each operation's. A network of a single position shows it.
        alone = torch.tensor([multiply_adds((((name,),),), scale) for name in CANDIDATES]).double()
        self.fixed = alone[0] - CHANNELS ** 2 * (1280 // scale) * (720 // scale)  # no skip1x1
        self.prices = alone - self.fixed  # (candidates,)
        self.dearest = self.fixed + CELLS * POSITIONS * self.prices.max()

    def weights(self, progress: float) -> torch.Tensor:
        """THE place where logits become weights: (cells, positions, candidates)."""
        return sparsestmax(self.alpha, progress)

    def cost(self, alpha) -> torch.Tensor:  # expected, for 1280x720: 0-d, float64
        return self.fixed + (alpha.double() @ self.prices).sum()

    def derive(self, alpha) -> Architecture:
        """The candidate with the largest weight at every position."""
        names = tuple(CANDIDATES)
        return tuple(tuple((names[k],) for k in cell) for cell in alpha.argmax(-1).tolist())

    def inherit(self, architecture: Architecture) -> Network:
        """The derived network with our kernels. At one-hot weights it computes what we compute."""
        network, ours = Network(architecture, self.scale), self.state_dict()
        network.load_state_dict({name: ours[name] for name in network.state_dict()})
        return network


# --- 3. The search -----------------------------------------------------------------------------

def search(net: Supernet, data, args) -> tuple[list, dict]:
    """args.search steps. Returns the rows of history.csv and the arrays of distributions.npz."""
    generator, history, snapshots = torch.Generator().manual_seed(args.seed), [], []
    kernels = [*net.parameters()][1:]  # alpha comes first
    optimiser = torch.optim.Adam(kernels, args.rate, (0.9, 0.99), fused=True)
    logits_optimiser = torch.optim.Adam([net.alpha], LOGITS_RATE, (0.5, 0.999), fused=True)
    for step in progress_bar(range(args.search), "search"):
        progress = max(0.0, (step / args.search - WARM) / (1 - WARM))  # from 0 to 1
        alpha = net.weights(progress)
        fixed = alpha.detach()
        # 1. The kernels learn from one half of the photographs, the choices as they stand.
        lr, hr = data.half_a.batch(args.batch, generator)
        loss = F.l1_loss(net(lr, fixed), hr)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        # 2. The logits learn from the other half, and from what the candidates cost.
        if progress > 0:
            lr, hr = data.half_b.batch(args.batch, generator)
            price = args.price * (net.cost(alpha) / net.dearest).float()
            logits_optimiser.zero_grad()
            (F.l1_loss(net(lr, alpha), hr) + price).backward(inputs=[net.alpha])
            logits_optimiser.step()
        # 3. Keep books.
        history.append(dict(step=step + 1, loss=loss.item(), live_operations=live(fixed),
                            attention=fixed[..., -1].sum().item(), cost=net.cost(fixed).item()))
        snapshots.append(fixed)
    return history, dict(alpha=torch.stack(snapshots).numpy())


def live(alpha) -> float:  # operations a position, on average
    return (alpha > 0).sum(-1).float().mean().item()


# --- 4. The command line -----------------------------------------------------------------------

def whole_run(args):
    saved, data, seconds = memory_saved(CHANNELS, TILE), photographs(args), {}
    net = Supernet(args.scale).to(memory_format=torch.channels_last)
    with timed(seconds, "search"):
        history, arrays = search(net, data, args)
    with torch.no_grad():
        alpha = net.weights(1.0)
        network = net.inherit(net.derive(alpha))
    lost = (psnr_of_batch(lambda lr: net(lr, alpha), data.half_b, args)
            - psnr_of_batch(network, data.half_b, args))
    with timed(seconds, "training"):
        train(network, data.whole, args, args.steps - args.search, history)
    finish(args, network, dict(operations=network.architecture), history, arrays, seconds,
           live=f"{live(alpha):.1f} of 5 operations a position", lost=lost, kept=True,
           memory=saved)


def main(argv=None):
    parser = arguments("esrt", "ESRT's attention as a fifth operation of Trilevel's cells.",
                       steps=2000, search=120, batch=4, patch=24, rate=2e-3)
    fits = checked(float, lambda p: 0 <= p < 1, "a price, a number from 0 to 1")
    parser.add_argument("--price", type=fits, default=3e-4, help="of the dearest network, as loss")
    run(parser, whole_run, argv)


if __name__ == "__main__":
    main()
