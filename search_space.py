"""What can be found: operations, widths, paths, and the networks they spell.

Trilevel asks three questions of a super-resolution network at once (arXiv 2101.06658, section 3):

    level     question                               written as
    network   in which order cells and upsamplings?  a path such as "cccu"
    cell      which operation at each position?      one of OPERATIONS
    kernel    how wide is each convolution?          one of Space.widths

This file holds the *discrete* side only: `Space` says what may be chosen, `Architecture` is one choice, and
`Network` is that choice as a plain torch module with nothing of the search left in it. supernet.py
relaxes the same three levels to weights on simplices.

All of them enlarge a low-resolution image, LR, by the scale, to SR. In shapes B is the batch and nf is `Space.channels`.

    LR image --head 3x3--> [ cell | up ] --> ... --tail 3x3, PixelShuffle--> + bicubic(LR) = SR image

*Path tree.* A path is a string over {c, u}: "c" is a cell (some operations f in a row, out = x + 0.2 f(x)),
"u" an upsampling; the first letter is always "c". Every prefix of a path is itself a network (an *exit*), so all paths
together form a tree; at x4 with five cells it has 55 nodes, of which 35 are cells, 20 are upsamplings, and 15 are
complete paths (leaves).

*Two meanings of "u"*, both in the paper. With `upsample="early"`, "u" really enlarges (nearest neighbour, 3x3
convolution, LeakyReLU): a cell behind one x2 "u" then works on four times the pixels and costs four times as
much, so *where* a path upsamples decides its price. With `upsample="plain"`, "u" is a 3x3 convolution at LR size.
Either way the tail shuffles by whatever factor remains, so any path can be completed to the scale.

*Two meanings of the output.* `output="skip"`, the default, adds the bicubic enlargement of the input, so that the
network learns only what bicubic misses and starts from its quality; this converges far faster. The published
networks below predate that habit: they end in (tanh + 1) / 2, kept as `output="tanh"`.

*Cost.* One multiply-add (MAC) is counted per weight and pixel, biases and activations are free, and totals are
for a 1280x720 *output*, as the field quotes them. Bicubic enlargement has no weights and is not counted. Or cost is
milliseconds for such an output, on the machine at hand: the two do not order networks alike (`Costs`).

    python search_space.py        # the published networks rebuilt, and how large the space is; seconds on any CPU
"""
import ctypes
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.utils.benchmark import Timer

OUTPUT_PIXELS = 1280 * 720                                     # the size for which multiply-adds are quoted
UPSAMPLINGS = {2: (2,), 3: (3,), 4: (2, 2)}                    # scale -> the factors its "u"s enlarge by
CHANNEL_LIMIT, PATH_LIMIT, CELL_LIMIT = 512, 64, 16            # refuse absurd files before memory is taken


# --- Operations: the cell level's candidates -----------------------------------------------------------------------
# No bias and no normalisation (batch norm costs SR networks accuracy: Lim et al., EDSR, arXiv 1707.02921), and every
# operation ends in a ReLU. A narrower operation is the leading slice of a wider one (see supernet.py), which is why
# the layers of the supernet and of the found network carry the same names.

def conv(c: int, d: int, size: int, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    """A size x size convolution c -> d that keeps height and width; He initialisation, since ReLUs follow."""
    layer = nn.Conv2d(c, d, size, padding=size // 2, groups=groups, bias=bias)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def shortcut(c: int, d: int) -> nn.Module | None:
    """Identity (None) where the widths agree, else a 1x1 convolution."""
    return None if c == d else conv(c, d, 1)


def add_shortcut(y: torch.Tensor, x: torch.Tensor, layer: nn.Module | None) -> torch.Tensor:
    return y + (x if layer is None else layer(x))              # (B, d, H, W)


class Skip1x1(nn.Module):
    """A 1x1 convolution: mixes channels, sees no neighbours."""
    def __init__(self, c: int, d: int):
        super().__init__()
        self.conv = conv(c, d, 1)

    def forward(self, x):                                      # (B, c, H, W) -> (B, d, H, W)
        return F.relu(self.conv(x))


class Conv3x3(nn.Module):
    """A 3x3 convolution."""
    def __init__(self, c: int, d: int):
        super().__init__()
        self.conv = conv(c, d, 3)

    def forward(self, x):                                      # (B, c, H, W) -> (B, d, H, W)
        return F.relu(self.conv(x))


class Residual(nn.Module):
    """Two 3x3 convolutions with a shortcut around them."""
    def __init__(self, c: int, d: int):
        super().__init__()
        self.conv1, self.conv2, self.shortcut = conv(c, d, 3), conv(d, d, 3), shortcut(c, d)

    def forward(self, x):                                      # (B, c, H, W) -> (B, d, H, W)
        return F.relu(add_shortcut(self.conv2(F.relu(self.conv1(x))), x, self.shortcut))


class DepthwiseSeparable(nn.Module):
    """1x1 to 4c channels, 3x3 depthwise, 1x1 to d, with a shortcut (the bottleneck of MobileNetV2, arXiv 1801.04381)."""
    def __init__(self, c: int, d: int):
        super().__init__()
        self.expand, self.depthwise = conv(c, 4 * c, 1), conv(4 * c, 4 * c, 3, groups=4 * c)
        self.project, self.shortcut = conv(4 * c, d, 1), shortcut(c, d)

    def forward(self, x):                                      # (B, c, H, W) -> (B, d, H, W)
        hidden = F.relu(self.depthwise(F.relu(self.expand(x))))     # (B, 4c, H, W)
        return F.relu(add_shortcut(self.project(hidden), x, self.shortcut))


class Operation(NamedTuple):
    """A candidate. Without biases each weight is used exactly once per pixel, so `weights` is also the multiply-adds per pixel."""
    module: type[nn.Module]                                    # module(c, d): from c to d channels
    weights: Callable[[int, int], int]                         # weights(c, d): how many it has
    radius: int                                                # in pixels, of what one output pixel sees


# A new one needs a line here, its branch in `mixed_operation` of supernet.py, and a colour in COLOURS.
OPERATIONS = {
    "skip1x1": Operation(Skip1x1, lambda c, d: c * d, 0),
    "conv3x3": Operation(Conv3x3, lambda c, d: 9 * c * d, 1),
    "residual": Operation(Residual, lambda c, d: 9 * c * d + 9 * d * d + (c * d if c != d else 0), 2),
    "dws": Operation(DepthwiseSeparable, lambda c, d: 4 * c * c + 36 * c + 4 * c * d + (c * d if c != d else 0), 1),
}


# --- Widths: the kernel level's candidates -------------------------------------------------------------------------

def widths_of(channels: int) -> tuple[int, ...]:
    """The widths a kernel may have: 1/3, 1/2, 2/3, 5/6 and 1 of `channels`, rounded half up to a multiple of 8.

    >>> widths_of(64), widths_of(24)                           # fewer where two multipliers round to the same
    ((24, 32, 40, 56, 64), (8, 16, 24))
    """
    if type(channels) is not int or channels % 8 or not 16 <= channels <= CHANNEL_LIMIT:
        raise ValueError(f"channels must be a multiple of 8 from 16 to {CHANNEL_LIMIT}, not {channels!r}")
    # a / b, rounded half up, is (2 a + b) // (2 b), exact in integers; here a is `sixths * channels`, and b is 6 * 8.
    return tuple(sorted({8 * ((2 * sixths * channels + 48) // 96) for sixths in (2, 3, 4, 5, 6)}))


# --- Paths: the network level's candidates -------------------------------------------------------------------------

def magnification(of, path: str) -> int:
    """How many times larger than the LR image, in each direction, the features behind `path` of a Space or Architecture are."""
    return math.prod(UPSAMPLINGS[of.scale][:path.count("u")]) if of.upsample == "early" else 1


@dataclass(frozen=True)
class Space:
    """Everything the search may choose from.

    scale: 2, 3 or 4. channels: width of every cell's input and output, and the widest inner width.
    cells: the most cells on a path. positions: operations in each cell. upsample, output: see the module's docstring.
    Raises ValueError where one of them makes no sense.
    """
    scale: int = 2
    channels: int = 64
    cells: int = 5
    positions: int = 5
    upsample: str = "early"
    output: str = "skip"

    def __post_init__(self):
        check_setting(self)
        if not (1 <= self.cells <= CELL_LIMIT and 1 <= self.positions <= CELL_LIMIT):
            raise ValueError(f"a space has 1 to {CELL_LIMIT} cells and positions, not {self.cells} and {self.positions}")

    @cached_property
    def widths(self) -> tuple[int, ...]:
        return widths_of(self.channels)

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """All prefixes of all paths, each parent before its children, "c" before "u" (the tree in preorder).

        >>> Space(scale=2, cells=2).nodes
        ('c', 'cc', 'ccu', 'cu', 'cuc')
        """
        def below(prefix):
            yield prefix
            if prefix.count("c") < self.cells:
                yield from below(prefix + "c")
            if prefix.count("u") < len(UPSAMPLINGS[self.scale]):
                yield from below(prefix + "u")
        return tuple(below("c"))

    @cached_property
    def cell_of(self) -> dict[str, int]:
        """Node -> row of alpha and beta, for the nodes that are cells."""
        return {node: i for i, node in enumerate(n for n in self.nodes if n[-1] == "c")}

    @cached_property
    def leaves(self) -> tuple[str, ...]:
        """The complete paths: those with every cell and every upsampling."""
        return tuple(n for n in self.nodes if not any(m.startswith(n) and m != n for m in self.nodes))

    @cached_property
    def size(self) -> int:
        """How many different networks the space holds.

        >>> Space(scale=2, cells=1, positions=1).size          # exits c and cu, four operations, no inner width
        8
        """
        in_a_cell = len(OPERATIONS) ** self.positions * len(self.widths) ** (self.positions - 1)
        return sum(in_a_cell ** node.count("c") for node in self.nodes)

    def architecture(self, path: str, operations, widths) -> "Architecture":
        """The network of this space with this path, these operation names and these widths (one row per cell)."""
        return Architecture(self.scale, self.channels, path, tuple(map(tuple, operations)),
                            tuple(map(tuple, widths)), self.upsample, self.output)

    def random(self, rng: random.Random) -> "Architecture":
        """A network with a uniformly drawn exit, operations and widths."""
        path = rng.choice(self.nodes)
        cells = range(path.count("c"))
        return self.architecture(path, [rng.choices(tuple(OPERATIONS), k=self.positions) for _ in cells],
                                 [rng.choices(self.widths, k=self.positions - 1) for _ in cells])


def cells_on(path: str) -> list[str]:
    """The nodes on `path` that are cells.

    >>> cells_on("cuc")
    ['c', 'cuc']
    """
    return [path[:i + 1] for i, letter in enumerate(path) if letter == "c"]


def check_setting(thing) -> None:
    """What a Space and an Architecture must both get right; raises ValueError."""
    if thing.scale not in UPSAMPLINGS or type(thing.scale) is not int:
        raise ValueError(f"scale must be 2, 3 or 4, not {thing.scale!r}")
    if thing.upsample not in ("early", "plain"):
        raise ValueError(f'upsample must be "early" or "plain", not {thing.upsample!r}')
    if thing.output not in ("skip", "tanh"):
        raise ValueError(f'output must be "skip" or "tanh", not {thing.output!r}')
    widths_of(thing.channels)


# --- One network ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Architecture:
    """One network of a space (a *genotype*), as plain data; anything impossible is a ValueError at once.

    path: "c" and "u" in the order the image meets them. operations: for each cell, the name at each position.
    widths: for each cell, the channels between its positions (one fewer than positions).

    >>> a = Architecture(2, 64, "cu", (("conv3x3", "dws"),), ((24,),))
    >>> a.parameters(), a.multiply_adds()
    (65123, 41648947200)
    >>> Architecture.from_json(a.to_json()) == a
    True
    """
    scale: int
    channels: int
    path: str
    operations: tuple[tuple[str, ...], ...]
    widths: tuple[tuple[int, ...], ...]
    upsample: str = "early"
    output: str = "skip"

    def __post_init__(self):
        check_setting(self)
        path, limit = self.path, len(UPSAMPLINGS[self.scale])
        if not isinstance(path, str) or len(path) > PATH_LIMIT:
            raise ValueError(f'path must be a string like "cccu" of at most {PATH_LIMIT} letters')
        if not path.startswith("c") or set(path) - {"c", "u"}:
            raise ValueError(f'path must be made of "c" and "u" and begin with "c", not {path!r}')
        if path.count("u") > limit:
            raise ValueError(f"path {path!r} cannot reach scale {self.scale}: it upsamples {path.count('u')} times, "
                             f"at most {limit} allowed")
        if not len(self.operations) == len(self.widths) == path.count("c"):
            raise ValueError(f"path {path!r} has {path.count('c')} cells, but operations are given for "
                             f"{len(self.operations)} and widths for {len(self.widths)}")
        for cell, (names, widths) in enumerate(zip(self.operations, self.widths), 1):
            if not 1 <= len(names) <= PATH_LIMIT or len(widths) != len(names) - 1:
                raise ValueError(f"cell {cell}: {len(names)} operations need one width between each two of them, "
                                 f"not {len(widths)}")
            for name in names:
                if name not in OPERATIONS:
                    raise ValueError(f"cell {cell}: unknown operation {name!r}; known are {', '.join(OPERATIONS)}")
            for width in widths:
                if type(width) is not int or width not in widths_of(self.channels):
                    raise ValueError(f"cell {cell}: width {width!r} is not one of {widths_of(self.channels)}")

    def parts(self) -> Iterator[tuple[int, list[tuple[str, int, int]] | None]]:
        """For each letter of the path: the magnification behind it, and a cell's operations as (name, channels in, channels
        out); None for a "u"."""
        cells = iter(zip(self.operations, self.widths))
        for i, letter in enumerate(self.path):
            m = magnification(self, self.path[:i + 1])
            if letter == "u":
                yield m, None
            else:
                names, widths = next(cells)
                ends = (self.channels, *widths, self.channels)                     # a cell keeps its outer width
                yield m, list(zip(names, ends, ends[1:]))

    # Counting. Each layer is (weights, biases, pixels it runs on for one LR pixel); the rest is sums.
    def layers(self) -> list[tuple[int, int, int]]:
        nf = self.channels
        rows = [(9 * 3 * nf, nf, 1)]                                               # head
        for m, cell in self.parts():
            if cell is None:
                rows.append((9 * nf * nf, nf, m * m))
            else:
                rows += [(OPERATIONS[name].weights(c, d), 0, m * m) for name, c, d in cell]
        return rows + [(9 * nf * self.tail_channels, self.tail_channels, m * m)]   # tail

    @property
    def remaining(self) -> int:
        """The factor that the path leaves for the tail to shuffle."""
        return self.scale // magnification(self, self.path)

    @property
    def tail_channels(self) -> int:
        return 3 * self.remaining ** 2

    def parameters(self) -> int:
        """Weights and biases."""
        return sum(weights + biases for weights, biases, _ in self.layers())

    def multiply_adds(self, lr_pixels: int | None = None) -> int:
        """Multiply-adds for an input of `lr_pixels` pixels; by default the one whose output is 1280x720."""
        if lr_pixels is None:
            lr_pixels = OUTPUT_PIXELS // self.scale ** 2
        return lr_pixels * sum(weights * pixels for weights, _, pixels in self.layers())

    @property
    def radius(self) -> int:
        """An output pixel depends on no LR pixel farther than this: the overlap that makes tiled equal to untiled."""
        radius = 1.0                                                               # the head's 3x3
        for m, cell in self.parts():                                               # a pixel here is 1 / m LR pixels
            radius += (sum(OPERATIONS[name].radius for name, *_ in cell) if cell else 1) / m
        return max(math.ceil(radius + 1), 3)                                       # the tail's 3x3; bicubic sees 3

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Architecture":
        """The inverse of to_json; ValueError in one line for anything that is not an architecture."""
        try:
            fields = json.loads(text)
            fields["operations"] = tuple(map(tuple, fields["operations"]))
            fields["widths"] = tuple(map(tuple, fields["widths"]))
            return cls(**fields)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:    # missing, superfluous or misshapen
            raise ValueError(f"not the description of an architecture: {error}") from None


class Cell(nn.Module):
    """Operations in sequence; out = x + 0.2 f(x), the damped residual of ESRGAN (arXiv 1809.00219)."""
    def __init__(self, channels: int, names, widths):
        super().__init__()
        ends = (channels, *widths, channels)
        self.ops = nn.ModuleList(OPERATIONS[name].module(c, d) for name, c, d in zip(names, ends, ends[1:]))

    def forward(self, x):                                      # (B, nf, H, W) -> the same
        y = x
        for op in self.ops:
            y = op(y)                                          # (B, width, H, W)
        return x + 0.2 * y


class Up(nn.Module):
    """The letter "u": enlarge by `factor` (1: "plain", a convolution only), then a 3x3 convolution."""
    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.factor, self.conv = factor, conv(channels, channels, 3, bias=True)

    def forward(self, x):                                      # (B, nf, H, W) -> (B, nf, factor H, factor W)
        if self.factor == 1:
            return self.conv(x)
        return F.leaky_relu(self.conv(F.interpolate(x, scale_factor=self.factor, mode="nearest")), 0.2)


class Tail(nn.Module):
    """An exit: 3x3 convolution to 3 r^2 channels, shuffled to an image r times larger (arXiv 1609.05158)."""
    def __init__(self, channels: int, remaining: int):
        super().__init__()
        self.remaining, self.conv = remaining, conv(channels, 3 * remaining ** 2, 3, bias=True)
        nn.init.normal_(self.conv.weight, std=1e-3)            # near zero: training starts at bicubic, not at noise

    def forward(self, x):                                      # (B, nf, h, w) -> (B, 3, r h, r w)
        return F.pixel_shuffle(self.conv(x), self.remaining)


def enlarge(x: torch.Tensor, scale: int) -> torch.Tensor:
    """Bicubic enlargement of the input, the base that `output="skip"` adds to; (B, 3, h, w) -> (B, 3, sh, sw)."""
    # (.contiguous(): on a CPU this takes three times as long in channels_last, 2 ms of a small network's training step of 30.)
    return F.interpolate(x.contiguous(), scale_factor=scale, mode="bicubic", align_corners=False)


def make_up(space, prefix: str) -> Up:
    """The layer of a path that ends in "u", for a Space or an Architecture."""
    grown = magnification(space, prefix)
    return Up(space.channels, grown // magnification(space, prefix[:-1]))


class Network(nn.Module):
    """The plain discrete network: (B, 3, h, w) in [0, 1] -> (B, 3, scale h, scale w), not clipped."""
    def __init__(self, architecture: Architecture):
        super().__init__()
        a = self.architecture = architecture
        self.head = conv(3, a.channels, 3, bias=True)
        cells = iter(zip(a.operations, a.widths))
        self.body = nn.ModuleList(Cell(a.channels, *next(cells)) if letter == "c" else make_up(a, a.path[:i + 1])
                                  for i, letter in enumerate(a.path))
        self.tail = Tail(a.channels, a.remaining)

    def forward(self, x):
        y = self.head(x)                                       # (B, nf, h, w)
        for layer in self.body:
            y = layer(y)                                       # (B, nf, h, w), larger after each early "u"
        y = self.tail(y)                                       # (B, 3, scale h, scale w)
        if self.architecture.output == "tanh":
            return (torch.tanh(y) + 1) / 2
        return y + enlarge(x, self.architecture.scale)


# --- What the parts of a network cost ------------------------------------------------------------------------------
# The search needs the cost of every candidate before it has any network, so a cost must be a sum over layers. For
# multiply-adds it is one. For time nearly: what a layer takes depends a little on what lies in the cache before it, so a
# table of milliseconds is scaled until it is right for whole networks.

@dataclass
class Costs:
    """Parts' costs for a 1280x720 output, in one unit ("multiply-adds" or "ms").

    A key of the dicts is the magnification: how many times larger than the LR image the features are that a part gives.
    operations[m][k, i, j]: the k-th operation from the i-th to the j-th width. cell[m]: what a cell takes besides its operations.
    up[m]: one upsampling. tail[m]: an exit, with the enlargement of the input. head: the first convolution.
    """
    unit: str
    operations: dict[int, np.ndarray]
    cell: dict[int, float]
    up: dict[int, float]
    tail: dict[int, float]
    head: float


def magnifications(space: Space) -> list[int]:
    return sorted({magnification(space, node) for node in space.nodes})


def counted_costs(space: Space) -> Costs:
    """Multiply-adds: exact, on any machine."""
    nf, widths, lr = space.channels, space.widths, OUTPUT_PIXELS // space.scale ** 2
    table = np.array([[[count(c, d) for d in widths] for c in widths] for _, count, _ in OPERATIONS.values()], float)
    pixels = {m: lr * m ** 2 for m in magnifications(space)}
    return Costs("multiply-adds", {m: n * table for m, n in pixels.items()}, {m: 0.0 for m in pixels},
                 {m: 9.0 * nf * nf * n for m, n in pixels.items()},
                 {m: 27.0 * nf * (space.scale // m) ** 2 * n for m, n in pixels.items()}, 27.0 * nf * lr)


def keep_memory():
    """Let this process keep what it frees (glibc only; elsewhere nothing happens).

    Features of a large picture take tens of megabytes. glibc hands such blocks back to the system at each turn and gets them
    again page by page, more of them or fewer depending on what the process did before: the same network took 128 ms, or 235,
    or 300. Kept, they cost nothing, and a time means the network's arithmetic.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(-1, 2 ** 31 - 1)                                   # M_TRIM_THRESHOLD: keep the end of the heap
    mallopt(-4, 0)                                             # M_MMAP_MAX: no blocks outside of the heap


@torch.inference_mode()
def milliseconds(module, *inputs: torch.Tensor, seconds: float = 0.3) -> float:
    """The median time of module(*inputs), called for `seconds` but at least twice; a GPU is waited for."""
    keep_memory()
    module(*inputs)                                            # the first call sets things up
    timer = Timer("module(*inputs)", globals=dict(module=module, inputs=inputs), num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=seconds).median


def features(channels: int, m: int, scale: int, device) -> torch.Tensor:
    """(1, channels, 720 m / scale, 1280 m / scale), stored as a network running on pictures has them."""
    return torch.rand(1, channels, 720 * m // scale, 1280 * m // scale, device=device).contiguous(
        memory_format=torch.channels_last)


def measured_costs(space: Space, device, say=print) -> Costs:
    """Milliseconds on this device and with this number of threads, each part timed alone at the size of its use.

    Then three random networks are timed as a whole, and all parts scaled by the (median) ratio of whole to sum.
    say: called with lines for the reader. Takes half a minute for a small space; nothing else should run meanwhile.
    """
    def time(make, channels, m):
        module = make().to(device, memory_format=torch.channels_last)
        return milliseconds(module, features(channels, m, space.scale, device))
    nf, widths, costs = space.channels, space.widths, Costs("ms", {}, {}, {}, {}, 0.0)
    costs.head = time(lambda: conv(3, nf, 3, bias=True), 3, 1)
    image = features(3, 1, space.scale, device)
    enlarging = milliseconds(lambda x: enlarge(x, space.scale), image)
    ups = {magnification(space, node): node for node in space.nodes if node[-1] == "u"}
    say(f"milliseconds of each operation for a 1280x720 output, x{space.scale}, on {device}: at a width kept")
    for m in magnifications(space):
        costs.operations[m] = np.array([[[time(lambda: make(c, d), c, m) for d in widths] for c in widths]
                                        for make, *_ in OPERATIONS.values()])
        x = features(nf, m, space.scale, device)
        costs.cell[m] = milliseconds(lambda x: x + 0.2 * x, x)
        costs.tail[m] = time(lambda: Tail(nf, space.scale // m), nf, m) + enlarging
        if m in ups:
            up = make_up(space, ups[m])
            costs.up[m] = time(lambda: up, nf, m // up.factor)
        say(f"  features {x.shape[3]}x{x.shape[2]}".ljust(22) + "".join(f"{w:>9d}" for w in widths))
        for name, table in zip(OPERATIONS, costs.operations[m]):
            say(f"    {name:18s}" + "".join(f"{t:9.2f}" for t in np.diagonal(table)))
    rng, ratios = random.Random(0), []
    for _ in range(3):
        a = space.random(rng)
        network = Network(a).to(device, memory_format=torch.channels_last)
        ratios.append(milliseconds(network, image) / sum_of_parts(a, costs))
    ratio = float(np.median(ratios))
    say(f"  whole networks take {ratio:.2f} times the sum of their parts ({min(ratios):.2f} to {max(ratios):.2f})")
    scaled = [{m: ratio * cost for m, cost in part.items()} for part in (costs.operations, costs.cell, costs.up, costs.tail)]
    return Costs("ms", *scaled, ratio * costs.head)


def sum_of_parts(a: Architecture, costs: Costs) -> float:
    """What `a` costs by the table, in its unit. Counted, this is `a.multiply_adds()`.

    >>> a = Architecture(2, 64, "cu", (("conv3x3", "dws"),), ((24,),))
    >>> sum_of_parts(a, counted_costs(Space(scale=2))) == a.multiply_adds()
    True
    """
    names, widths, total = list(OPERATIONS), widths_of(a.channels), costs.head
    for m, cell in a.parts():
        if cell is None:
            total += costs.up[m]
        else:
            total += costs.cell[m] + sum(costs.operations[m][names.index(name), widths.index(c), widths.index(d)]
                                         for name, c, d in cell)
    return float(total + costs.tail[m])


def cost_in_words(value: float, unit: str) -> str:
    return f"{value / 1e9:.4g}G multiply-adds" if unit == "multiply-adds" else f"{value:.4g} ms"


# --- Pictures ------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, told apart by the colour-blind too.
COLOURS = {"skip1x1": "#999999", "conv3x3": "#56B4E9", "residual": "#0072B2", "dws": "#E69F00", "up": "#009E73",
           "ends": "#DDDDDD"}


def draw_architecture(architecture: Architecture, axis=None):
    """Draw the network from left to right: a bar for each layer, as tall as its output is wide. Returns the figure.

    axis: matplotlib axes to draw on; a new figure if None.
    """
    a = architecture
    bars = [("head", "ends", a.channels)]
    for _, cell in a.parts():                                  # None: a gap
        bars += [None, *((name, name, d) for name, _, d in cell or [("up", None, a.channels)])]
    bars += [None, ("tail", "ends", a.tail_channels)]
    if axis is None:
        axis = Figure(figsize=(max(6, 0.45 * len(bars)), 3), layout="constrained").subplots()
    for x, bar in enumerate(bars):
        if bar:
            text, colour, width = bar
            axis.bar(x, width, width=0.9, bottom=-width / 2, color=COLOURS[colour], edgecolor="black", linewidth=0.5)
            axis.text(x, 0, f"{text} {width}", rotation=90, ha="center", va="center", fontsize=9,
                      color="white" if text == "residual" else "black")
    axis.set_title(f"x{a.scale}, path {a.path}: {a.parameters():,} parameters, {a.multiply_adds() / 1e9:.2f}G "
                   f"multiply-adds for a 1280x720 output", fontsize=10)
    axis.set_ylim(-0.55 * a.channels, 0.55 * a.channels)
    axis.set_axis_off()
    return axis.figure


def tree_layout(space: Space) -> dict[str, tuple[float, float]]:
    """Where to draw each node: x is its depth, y such that no two branches cross; the root of all is at x = 1."""
    leaves = {leaf: float(-i) for i, leaf in enumerate(space.leaves)}

    def height(node):
        below = [height(child) for child in space.nodes if child[:-1] == node]
        return sum(below) / len(below) if below else leaves[node]
    return {node: (len(node), height(node)) for node in space.nodes}


def draw_tree(axis, space: Space):
    """The path tree: every circle is an exit, every line as thick as what it leads to costs (the mean over all choices)."""
    in_a_cell = sum(sum(operation.weights(c, d) for operation in OPERATIONS.values()) / len(OPERATIONS)
                    for c in space.widths for d in space.widths) / len(space.widths) ** 2 * space.positions
    costs = {"c": in_a_cell, "u": 9 * space.channels ** 2}
    places, unit = tree_layout(space), OUTPUT_PIXELS // space.scale ** 2 / 1e9
    for node, (x, y) in places.items():
        pixels = magnification(space, node) ** 2
        cost = costs[node[-1]] * pixels * unit
        x0, y0 = places.get(node[:-1], (0, y))
        colour = COLOURS["residual"] if node[-1] == "c" else COLOURS["up"]
        axis.plot([x0, x], [y0, y], color=colour, linewidth=0.5 + 0.25 * cost, solid_capstyle="butt", zorder=1)
        if len(space.nodes) < 20:
            axis.annotate(f"{cost:.3g}G", ((x0 + x) / 2, (y0 + y) / 2), ha="center", va="center", backgroundcolor="white")
        axis.plot(x, y, "o", markersize=13, color="white", markeredgecolor=colour, markeredgewidth=1.5, zorder=2)
        axis.annotate(node[-1], (x, y), ha="center", va="center_baseline", fontsize=10)
    axis.set_axis_off()
    return axis.figure


# --- The published networks ----------------------------------------------------------------------------------------
# As the authors print them: operation ids in the order of OPERATIONS, width ids into (24, 32, 40, 56, 64).
# name: (upsample, path, operations, widths, parameters in millions, multiply-adds in 1e9 for a 256x256 input).
PUBLISHED = {
    "B-1": ("plain", "ccc", "30333 30131 20000", "1102 0300 4000", 0.234, 15.35),
    "B-2": ("plain", "cccccu", "00330 32311 10103 33113 31111", "1040 1232 4401 4300 1440", 0.509, 33.36),
    "B-3": ("plain", "ccuu", "00020 33110", "2033 4310", 0.264, 17.33),
    "A-1": ("early", "cccucu", "01001 33312 00103 11011", "4000 1140 4421 0411", 0.335, 78.5),
    "A-2": ("early", "cccccuu", "33333 01313 33323 33322 13332", "3042 4440 1122 2242 2000", 0.666, 88.9),
}


def published(name: str) -> Architecture:
    """One of the paper's x4 networks, by the name it has there.

    >>> published("B-1").operations[2]
    ('residual', 'skip1x1', 'skip1x1', 'skip1x1', 'skip1x1')
    """
    upsample, path, operations, widths, *_ = PUBLISHED[name]
    names, space = tuple(OPERATIONS), Space(scale=4, upsample=upsample, output="tanh")
    return space.architecture(path, [[names[int(i)] for i in cell] for cell in operations.split()],
                              [[space.widths[int(i)] for i in cell] for cell in widths.split()])


def main():
    print("The paper's x4 networks, rebuilt; multiply-adds in 1e9 for a 256x256 input (1024x1024 output)\n")
    print("name path      parameters  published   MACs  + biases  published")
    for name in PUBLISHED:
        a = published(name)
        # The authors' tool counts one operation for each value a bias is added to. Adding just those gives the
        # published figure to its last digit, so nothing else is missing; the field's convention leaves them out.
        with_biases = a.multiply_adds(256 ** 2) + 256 ** 2 * sum(biases * pixels for _, biases, pixels in a.layers())
        *_, parameters, gmacs = PUBLISHED[name]
        print(f"{name}  {a.path:9s} {a.parameters():9,d}   {parameters:.3f} M  {a.multiply_adds(256 ** 2) / 1e9:7.3f} "
              f"{with_biases / 1e9:8.3f}  {gmacs:8}")
    print("\nThe full space\n\nscale  exits  cells  ups  complete paths  networks")
    for scale in UPSAMPLINGS:
        space = Space(scale)
        print(f"x{scale} {len(space.nodes):9d} {sum(n[-1] == 'c' for n in space.nodes):6d} "
              f"{sum(n[-1] == 'u' for n in space.nodes):4d} {len(space.leaves):15d}  {space.size:.1e}")


if __name__ == "__main__":
    main()
