"""What can be found: operations, widths, paths, and the networks they spell.

    python search_space.py        # the published networks rebuilt, and the size of the space

Trilevel asks three questions about a super-resolution network at once (arXiv 2101.06658, sec. 3):

    level     question                               the answer is
    network   in which order cells and upsamplings?  a path such as "cccu"
    cell      which operation at each position?      one of OPERATIONS
    kernel    how wide is each convolution?          one of Space.widths

This file knows only finished answers. `Space` says what may be chosen, `Architecture` is one choice
on paper, `Network` is that choice as a plain torch module. (supernet.py mixes all choices at once.)

Every network turns a small picture LR into a larger one SR. In shapes, B is the batch, nf is the
number of feature channels (`Space.channels`), and the scale is 2, 3 or 4:

    LR --3x3 head--> [ cell | up ] ... --3x3 tail, PixelShuffle--> + bicubic(LR) = SR

*Paths.* A path is a word over {c, u}. "c" is a cell: some operations f in a row,
out = x + 0.2 f(x). "u" upsamples. The first letter is always "c". A network may end after any
letter, so every prefix of a path is a path too: an *exit*. Together they form a tree, a node for
each exit. At x4 with five cells it has 55 nodes, of which 35 end in "c" and 20 in "u"; 15 of the 55
cannot go on (leaves).

*Where to upsample decides the price.* With `upsample="early"`, "u" really enlarges (nearest
neighbour, 3x3 convolution, LeakyReLU). A cell behind one x2 "u" then works on four times the pixels
and costs four times as much. With `upsample="plain"`, the paper's version B, "u" is a 3x3
convolution at LR size. In both, the tail enlarges by whatever factor is still missing.

*What is added at the end.* By default (`output="skip"`) a network adds its output to the bicubic
enlargement of LR, so it learns only what bicubic misses. The published networks below end in
(tanh + 1) / 2 instead, which is kept as `output="tanh"`.

*Cost.* One multiply-add (MAC) per weight and pixel; biases, activations and the bicubic
enlargement are free. Totals are for a 1280x720 *output*, as the field quotes them. Cost can also
be milliseconds for such an output on your machine (`Costs`): the two do not always rank networks
alike.
"""
import ctypes
import io
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.utils.benchmark import Timer

try:
    import fcntl  # for a lock
except ImportError:  # Windows
    fcntl = None

OUTPUT_PIXELS = 1280 * 720  # costs are quoted for an output of this size
UPSAMPLINGS = {2: (2,), 3: (3,), 4: (2, 2)}  # scale -> the factors its "u"s enlarge by
# A file from somebody else may claim any size. Refuse absurd ones before memory is taken.
CHANNEL_LIMIT, PATH_LIMIT, CELL_LIMIT = 512, 64, 16


# --- Level 2, the cell: which operation? -------------------------------------------------------
# Operations have no bias, and no batch norm, which costs SR networks accuracy (Lim et al., EDSR,
# arXiv 1707.02921). All end in a ReLU. A narrow operation is the first channels of a wide one, so
# the supernet gives its layers the same names, and kernels can be copied.

def conv(c: int, d: int, size: int, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    """size x size convolution, c -> d channels, height and width kept. He init, as ReLUs follow."""
    layer = nn.Conv2d(c, d, size, padding=size // 2, groups=groups, bias=bias)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def shortcut(c: int, d: int) -> nn.Module:
    """Identity where the widths agree, else a 1x1 convolution."""
    return nn.Identity() if c == d else conv(c, d, 1)


class Plain(nn.Module):
    """A convolution alone: "skip1x1" mixes channels and sees no neighbours, "conv3x3" sees them."""
    def __init__(self, c: int, d: int, size: int):
        super().__init__()
        self.conv = conv(c, d, size)

    def forward(self, x):  # (B, c, H, W) -> (B, d, H, W)
        return F.relu(self.conv(x))


class Residual(nn.Module):
    """Two 3x3 convolutions with a shortcut around them."""
    def __init__(self, c: int, d: int):
        super().__init__()
        self.conv1, self.conv2, self.shortcut = conv(c, d, 3), conv(d, d, 3), shortcut(c, d)

    def forward(self, x):  # (B, c, H, W) -> (B, d, H, W)
        y = self.conv2(F.relu(self.conv1(x)))  # (B, d, H, W)
        return F.relu(y + self.shortcut(x))


class DepthwiseSeparable(nn.Module):
    """"dws": 1x1 to 4c channels, 3x3 on each channel alone, 1x1 to d, with a shortcut.

    The bottleneck of MobileNetV2 (arXiv 1801.04381).
    """
    def __init__(self, c: int, d: int):
        super().__init__()
        self.expand, self.depthwise = conv(c, 4 * c, 1), conv(4 * c, 4 * c, 3, groups=4 * c)
        self.project, self.shortcut = conv(4 * c, d, 1), shortcut(c, d)

    def forward(self, x):  # (B, c, H, W) -> (B, d, H, W)
        hidden = F.relu(self.depthwise(F.relu(self.expand(x))))  # (B, 4c, H, W)
        return F.relu(self.project(hidden) + self.shortcut(x))


class Operation(NamedTuple):
    """A candidate for a position of a cell.

    module(c, d): builds the operation from c to d channels. weights(c, d): how many numbers its
    kernels have; without biases that is also its multiply-adds per pixel. radius: how far, in
    pixels, an output pixel sees.

    >>> {name: operation.weights(24, 24) for name, operation in OPERATIONS.items()}
    {'skip1x1': 576, 'conv3x3': 5184, 'residual': 10368, 'dws': 5472}
    >>> OPERATIONS["conv3x3"].weights(24, 8)            # a third of the width, a third of the price
    1728
    """
    module: Callable[[int, int], nn.Module]
    weights: Callable[[int, int], int]
    radius: int


# A new operation needs a line here, a branch in `mixed_operation` of supernet.py, and a colour
# below.
OPERATIONS = {
    "skip1x1": Operation(lambda c, d: Plain(c, d, 1), lambda c, d: c * d, 0),
    "conv3x3": Operation(lambda c, d: Plain(c, d, 3), lambda c, d: 9 * c * d, 1),
    "residual": Operation(Residual, lambda c, d: 9 * c * d + 9 * d * d + c * d * (c != d), 2),
    "dws": Operation(DepthwiseSeparable,
                     lambda c, d: 4 * c * c + 36 * c + 4 * c * d + c * d * (c != d), 1),
}


# --- Level 3, the kernel: how wide? ------------------------------------------------------------

def widths_of(channels: int) -> tuple[int, ...]:
    """The widths to choose from: 1/3, 1/2, 2/3, 5/6 and 1 of `channels`, as multiples of 8.

    Rounded half up. ValueError unless `channels` is a multiple of 8 from 16 to 512.

    >>> widths_of(64), widths_of(24)                 # fewer where two of them round to the same
    ((24, 32, 40, 56, 64), (8, 16, 24))
    """
    if type(channels) is not int or channels % 8 or not 16 <= channels <= CHANNEL_LIMIT:
        raise ValueError(f"channels must be a multiple of 8 from 16 to {CHANNEL_LIMIT}, "
                         f"not {channels!r}")
    # In sixths, so that all is integer: a / 48 rounded half up is (2 a + 48) // 96.
    return tuple(sorted({8 * ((2 * sixths * channels + 48) // 96) for sixths in (2, 3, 4, 5, 6)}))


# --- Level 1, the network: which path? ---------------------------------------------------------

def magnification(scale: int, upsample: str, path: str) -> int:
    """How many times larger than LR, each way, the features behind `path` are.

    >>> magnification(4, "early", "ccuc"), magnification(4, "plain", "ccuc")
    (2, 1)
    """
    return math.prod(UPSAMPLINGS[scale][:path.count("u")]) if upsample == "early" else 1


def cells_on(path: str) -> list[str]:
    """The nodes on `path` that are cells.

    >>> cells_on("cuc")
    ['c', 'cuc']
    """
    return [path[:i + 1] for i, letter in enumerate(path) if letter == "c"]


@dataclass(frozen=True)
class Space:
    """Everything the search may choose from. ValueError where a setting makes no sense.

    scale: 2, 3 or 4. channels: nf, the width of every cell's ends, and the widest inner width.
    cells: the most cells on a path. positions: operations in each cell.
    upsample, output: see the top of this file.
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
            raise ValueError(f"a space has 1 to {CELL_LIMIT} cells and positions, "
                             f"not {self.cells} and {self.positions}")

    @cached_property
    def widths(self) -> tuple[int, ...]:
        return widths_of(self.channels)

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """All prefixes of all paths, each parent before its children, "c" before "u".

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
        """Node -> row of alpha and beta in the supernet, for the nodes that are cells.

        >>> Space(scale=2, cells=2).cell_of
        {'c': 0, 'cc': 1, 'cuc': 2}
        """
        return {node: i for i, node in enumerate(n for n in self.nodes if n[-1] == "c")}

    @cached_property
    def leaves(self) -> tuple[str, ...]:
        """The complete paths: those with every cell and every upsampling.

        >>> Space(scale=2, cells=2).leaves
        ('ccu', 'cuc')
        """
        return tuple(n for n in self.nodes
                     if not any(m.startswith(n) and m != n for m in self.nodes))

    @cached_property
    def size(self) -> int:
        """How many different networks the space holds.

        Every cell on a path chooses for itself, so the number of networks that end at an exit is a
        power of the number of different cells.

        >>> Space(scale=2, cells=1, positions=1).size        # exits c and cu, four operations
        8
        """
        in_a_cell = len(OPERATIONS) ** self.positions * len(self.widths) ** (self.positions - 1)
        return sum(in_a_cell ** node.count("c") for node in self.nodes)

    def magnification(self, node: str) -> int:
        return magnification(self.scale, self.upsample, node)

    def parts(self) -> Iterator[tuple[str, int, int, int]]:
        """The fields kind, c, d and m of every `Layer` that its networks can have.

        (And of an "up" at the size of LR, which only a "plain" space has.)
        """
        nf = self.channels
        yield "head", 3, nf, 1
        for m in sorted(set(map(self.magnification, self.nodes))):
            yield from itertools.product(OPERATIONS, self.widths, self.widths, [m])
            yield "up", nf, nf, m
            yield "tail", nf, 3 * (self.scale // m) ** 2, m

    def architecture(self, path: str, operations, widths) -> "Architecture":
        """The network with this path, and one row of operation names and of widths per cell."""
        return Architecture(self.scale, self.channels, path, tuple(map(tuple, operations)),
                            tuple(map(tuple, widths)), self.upsample, self.output)

    def random(self, rng: random.Random) -> "Architecture":
        """A network with a uniformly drawn exit, operations and widths.

        >>> space, rng = Space(scale=4, channels=24), random.Random(0)
        >>> [space.random(rng).path for _ in range(3)]
        ['cuucccc', 'ccccc', 'cucc']
        """
        path = rng.choice(self.nodes)
        cells = range(path.count("c"))
        return self.architecture(
            path, [rng.choices(tuple(OPERATIONS), k=self.positions) for _ in cells],
            [rng.choices(self.widths, k=self.positions - 1) for _ in cells])


def check_setting(thing) -> None:
    """What a Space and an Architecture must both get right; raises ValueError."""
    if thing.scale not in UPSAMPLINGS or type(thing.scale) is not int:
        raise ValueError(f"scale must be 2, 3 or 4, not {thing.scale!r}")
    if thing.upsample not in ("early", "plain"):
        raise ValueError(f'upsample must be "early" or "plain", not {thing.upsample!r}')
    if thing.output not in ("skip", "tanh"):
        raise ValueError(f'output must be "skip" or "tanh", not {thing.output!r}')
    widths_of(thing.channels)


# --- One network on paper ----------------------------------------------------------------------

class Layer(NamedTuple):
    """One layer of a network on paper: what it is, where, and how large.

    node: the path up to it ("" for the head). kind: "head", "up", "tail" or an operation's name.
    c, d: channels in and out. m: its convolution works at m times the size of LR.
    """
    node: str
    kind: str
    c: int
    d: int
    m: int

    @property
    def weights(self) -> int:  # per pixel, each is used once
        if self.kind in OPERATIONS:
            return OPERATIONS[self.kind].weights(self.c, self.d)
        return 9 * self.c * self.d  # head, up and tail are 3x3 convolutions

    @property
    def biases(self) -> int:
        return 0 if self.kind in OPERATIONS else self.d


@dataclass(frozen=True)
class Architecture:
    """One network of a space (a *genotype*), as plain data. ValueError for what cannot be built.

    path: "c" and "u" in the order the picture meets them. operations: for each cell, the name at
    each position. widths: for each cell, the channels between its positions (one fewer).

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
        # 1. The path: at scale 4 two upsamplings, at 2 and 3 one.
        path, limit = self.path, len(UPSAMPLINGS[self.scale])
        if not isinstance(path, str) or len(path) > PATH_LIMIT:
            raise ValueError(f'path must be a string like "cccu" of at most {PATH_LIMIT} letters')
        if not path.startswith("c") or set(path) - {"c", "u"}:
            raise ValueError(f'path must be made of "c" and "u" and begin with "c", not {path!r}')
        if path.count("u") > limit:
            raise ValueError(f"path {path!r} cannot reach scale {self.scale}: it upsamples "
                             f"{path.count('u')} times, at most {limit} allowed")
        # 2. For each of its cells a row of operations, and one of widths.
        if not len(self.operations) == len(self.widths) == path.count("c"):
            raise ValueError(f"path {path!r} has {path.count('c')} cells, but operations are given "
                             f"for {len(self.operations)} and widths for {len(self.widths)}")
        for cell, (names, widths) in enumerate(zip(self.operations, self.widths), 1):
            if not 1 <= len(names) <= PATH_LIMIT or len(widths) != len(names) - 1:
                raise ValueError(f"cell {cell}: {len(names)} operations need one width between "
                                 f"each two of them, not {len(widths)}")
            for name in names:
                if name not in OPERATIONS:
                    raise ValueError(f"cell {cell}: unknown operation {name!r}; known are "
                                     f"{', '.join(OPERATIONS)}")
            for width in widths:
                if type(width) is not int or width not in widths_of(self.channels):
                    raise ValueError(f"cell {cell}: width {width!r} is not one of "
                                     f"{widths_of(self.channels)}")

    def magnification(self, node: str) -> int:
        return magnification(self.scale, self.upsample, node)

    def layers(self) -> Iterator[Layer]:
        """From the picture in to the picture out. All that follows is a sum over these.

        >>> a = Architecture(2, 24, "cu", (("conv3x3", "dws"),), ((8,),))
        >>> for layer in a.layers():
        ...     print(*layer, layer.weights, layer.weights * layer.m ** 2)   # price of an LR pixel
         head 3 24 1 648 648
        c conv3x3 24 8 1 1728 1728
        c dws 8 24 1 1504 1504
        cu up 24 24 2 5184 20736
        cu tail 24 3 2 648 2592
        """
        nf, cells, m = self.channels, zip(self.operations, self.widths), 1
        # 1. The head: red, green and blue become nf features.
        yield Layer("", "head", 3, nf, m)
        # 2. A letter after the other: an upsampling is one layer, a cell as many as it has
        #    positions.
        for i, letter in enumerate(self.path):
            node = self.path[:i + 1]
            m = self.magnification(node)
            if letter == "u":
                yield Layer(node, "up", nf, nf, m)
            else:
                names, widths = next(cells)
                ends = nf, *widths, nf  # a cell begins and ends at full width
                for name, c, d in zip(names, ends, ends[1:]):
                    yield Layer(node, name, c, d, m)
        # 3. The tail: three colours for each output pixel that one pixel here is enlarged to.
        yield Layer(self.path, "tail", nf, 3 * self.remaining ** 2, m)

    @property
    def remaining(self) -> int:
        """The factor that the path leaves for the tail to enlarge by."""
        return self.scale // self.magnification(self.path)

    def parameters(self) -> int:
        """Weights and biases."""
        return sum(layer.weights + layer.biases for layer in self.layers())

    def multiply_adds(self, lr_pixels: int | None = None) -> int:
        """For an input of so many pixels; by default the one whose output is 1280x720."""
        if lr_pixels is None:
            lr_pixels = OUTPUT_PIXELS // self.scale ** 2
        return lr_pixels * sum(layer.weights * layer.m ** 2 for layer in self.layers())

    @property
    def radius(self) -> int:
        """No output pixel depends on an LR pixel farther away than this.

        It is the overlap that makes a picture enlarged in tiles equal to one enlarged whole.

        >>> Architecture(2, 24, "c", (("residual", "residual"),), ((24,),)).radius
        6
        """
        radius = 1 + 1.0  # the 3x3 of head and tail
        for layer in self.layers():
            if layer.kind in OPERATIONS:  # a pixel there is 1 / m of an LR pixel
                radius += OPERATIONS[layer.kind].radius / layer.m
            elif layer.kind == "up":
                radius += 1 / layer.m
        return max(math.ceil(radius), 3)  # bicubic enlargement sees 2; one to spare

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Architecture":
        """The inverse of to_json. ValueError in one line for anything that is no architecture."""
        try:
            fields = json.loads(text)
            fields["operations"] = tuple(map(tuple, fields["operations"]))
            fields["widths"] = tuple(map(tuple, fields["widths"]))
            return cls(**fields)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not the description of an architecture: {error}") from None


# --- One network in memory ---------------------------------------------------------------------

class Cell(nn.Module):
    """Operations in sequence; out = x + 0.2 f(x), the damped residual of ESRGAN (1809.00219)."""
    def __init__(self, channels: int, names, widths):
        super().__init__()
        ends = channels, *widths, channels
        self.ops = nn.ModuleList(OPERATIONS[name].module(c, d)
                                 for name, c, d in zip(names, ends, ends[1:]))

    def forward(self, x):  # (B, nf, H, W) -> the same
        y = x
        for op in self.ops:
            y = op(y)  # (B, width, H, W)
        return x + 0.2 * y


class Up(nn.Module):
    """The letter "u": enlarge by `factor`, 3x3 convolution, LeakyReLU. (factor 1: no enlarging,
    no ReLU.)
    """
    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.factor, self.conv = factor, conv(channels, channels, 3, bias=True)

    def forward(self, x):  # (B, nf, H, W) -> (B, nf, factor H, factor W)
        if self.factor == 1:
            return self.conv(x)
        x = F.interpolate(x, scale_factor=self.factor, mode="nearest")
        return F.leaky_relu(self.conv(x), 0.2)


class Tail(nn.Module):
    """What ends a network: 3x3 convolution to 3 remaining^2 channels, shuffled to a larger picture.

    The shuffle computes nothing. It lays the values that one pixel has in remaining^2 channels side
    by side, as a square of remaining x remaining pixels (PixelShuffle, Shi et al., arXiv
    1609.05158). So enlarging costs no more than a convolution at the small size.
    """
    def __init__(self, channels: int, remaining: int):
        super().__init__()
        self.remaining = remaining
        self.conv = conv(channels, 3 * remaining ** 2, 3, bias=True)
        nn.init.normal_(self.conv.weight, std=1e-3)  # near zero: training starts at bicubic

    def forward(self, x):  # (B, nf, H, W) -> (B, 3, remaining H, remaining W)
        return F.pixel_shuffle(self.conv(x), self.remaining)


def enlarge(x: torch.Tensor, scale: int) -> torch.Tensor:
    """Bicubic, the base that `output="skip"` adds to: (B, 3, h, w) -> (B, 3, scale h, scale w)."""
    # torch's kernel (a = -.75), not the one that evaluate.py measures with. .contiguous(): in
    # channels_last it takes three times as long on a CPU.
    return F.interpolate(x.contiguous(), scale_factor=scale, mode="bicubic", align_corners=False)


class Network(nn.Module):
    """The plain network: (B, 3, h, w) in [0, 1] -> (B, 3, scale h, scale w), not clipped.

    >>> network = Network(published("B-3"))
    >>> [type(layer).__name__ for layer in network.body], network(torch.rand(1, 3, 8, 6)).shape
    (['Cell', 'Cell', 'Up', 'Up'], torch.Size([1, 3, 32, 24]))
    """
    def __init__(self, architecture: Architecture):
        super().__init__()
        a = self.architecture = architecture
        cells = zip(a.operations, a.widths)
        self.head = conv(3, a.channels, 3, bias=True)
        # A layer for each letter; `cells` has the operations and widths of the next "c".
        self.body = nn.ModuleList(
            Cell(a.channels, *next(cells)) if letter == "c" else
            Up(a.channels, a.magnification(a.path[:i + 1]) // a.magnification(a.path[:i]))
            for i, letter in enumerate(a.path))
        self.tail = Tail(a.channels, a.remaining)

    def forward(self, x):
        y = self.head(x)  # (B, nf, h, w)
        for layer in self.body:
            y = layer(y)  # (B, nf, h, w), larger after each early "u"
        y = self.tail(y)  # (B, 3, scale h, scale w)
        if self.architecture.output == "tanh":
            return (torch.tanh(y) + 1) / 2
        return y + enlarge(x, self.architecture.scale)


class Replayed:
    """An action that a GPU records at the second call, as a CUDA graph, and replays ever after.

    A step of a small network is hundreds of kernels of a few microseconds each, and Python needs
    longer to launch one than the GPU to run it. A replay launches all of them at once. So it must
    be the same work on the same tensors at every call: new arguments are copied into those of the
    second call, and the result of the next call overwrites this one's. A CPU simply acts.
    """
    def __init__(self, action):
        self.action, self.stream, self.graph = action, None, None

    def __call__(self, *inputs: torch.Tensor):
        if not inputs[0].is_cuda:
            return self.action(*inputs)
        now = torch.cuda.current_stream()
        # 1. The first call just acts, but on a stream of its own, as torch wants it before a
        #    recording. It makes what the recording must find: gradients, moments, handles.
        if not self.stream:
            self.stream = torch.cuda.Stream()
            self.stream.wait_stream(now)
            with torch.cuda.stream(self.stream):
                result = self.action(*inputs)
            now.wait_stream(self.stream)
            return result
        # 2. The second one records: kernels are noted down with the addresses they work on, and
        #    nothing is computed.
        if not self.graph:
            self.graph, self.inputs = torch.cuda.CUDAGraph(), inputs
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.result = self.action(*inputs)
        # 3. New values to the old addresses, and all kernels again.
        for mine, new in zip(self.inputs, inputs):
            mine.copy_(new)
        self.graph.replay()
        return self.result


# --- What the parts cost -----------------------------------------------------------------------
# The search needs the cost of every candidate before there is any network, so cost must be a sum
# over layers. Multiply-adds are one. Milliseconds nearly are: see `measured_costs`.

@dataclass
class Costs:
    """The cost of every part for a 1280x720 output, in one unit: "multiply-adds" or "ms".

    parts: {(kind, c, d, m): cost}, the last four fields of a `Layer`, for all of `Space.parts`. The
    bicubic enlargement is a part of the tail.
    """
    unit: str
    parts: dict[tuple[str, int, int, int], float]

    def of(self, a: Architecture) -> float:
        """What `a` costs by this table. Counted, that is `a.multiply_adds()`.

        >>> a = Architecture(2, 64, "cu", (("conv3x3", "dws"),), ((24,),))
        >>> counted_costs(Space(scale=2)).of(a) == a.multiply_adds()
        True
        """
        return sum(self.parts[layer[1:]] for layer in a.layers())

    def words(self, value: float) -> str:
        return cost_in_words(value, self.unit)


def cost_in_words(value: float, unit: str) -> str:
    return f"{value / 1e9:.4g}G multiply-adds" if unit == "multiply-adds" else f"{value:.4g} ms"


def read_budget(text: str) -> tuple[float, str]:
    """What a user writes as a cost -> the number, and its unit. ValueError for anything else.

    >>> read_budget("18G"), read_budget("750M"), read_budget("80ms")
    ((18000000000.0, 'multiply-adds'), (750000000.0, 'multiply-adds'), (80.0, 'ms'))
    """
    number, suffix = re.fullmatch("(.*?)(ms|g|m|)", text.lower(), re.DOTALL).groups()
    value = {"g": 1e9, "m": 1e6}.get(suffix, 1.0) * float(number)
    return value, "ms" if suffix == "ms" else "multiply-adds"


def counted_costs(space: Space) -> Costs:
    """Multiply-adds: exact, and the same on any machine.

    >>> parts = counted_costs(Space(2, 24)).parts
    >>> [parts["conv3x3", 24, 24, m] / 1e9 for m in (1, 2)]         # before and behind "u"
    [1.1943936, 4.7775744]
    """
    lr = OUTPUT_PIXELS // space.scale ** 2
    # Every weight is used once a pixel, so all prices are weights times pixels.
    return Costs("multiply-adds", {
        (kind, c, d, m): float(lr * m ** 2 * Layer("", kind, c, d, m).weights)
        for kind, c, d, m in space.parts()})


def keep_memory():
    """Let this process keep what it frees (glibc only; elsewhere nothing happens).

    Features of a large picture take tens of megabytes. glibc hands such blocks back to the system
    and fetches them again page by page, which made one network take 128, 235 or 300 ms. Keeping
    them makes times repeat.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: keep the end of the heap
    mallopt(-4, 0)  # M_MMAP_MAX: no blocks outside of the heap


@torch.inference_mode()
def milliseconds(module, *inputs, seconds=0.3):
    """Median time of module(*inputs), called for `seconds` but at least twice."""
    keep_memory()
    module(*inputs)  # the first call sets things up
    timer = Timer("module(*inputs)", globals=dict(module=module, inputs=inputs),
                  num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=seconds).median


def features(channels, m, scale, device):
    """(1, channels, 720 m / scale, 1280 m / scale), stored as a network on pictures has them."""
    x = torch.rand(1, channels, 720 * m // scale, 1280 * m // scale, device=device)
    return x.contiguous(memory_format=torch.channels_last)


def time_network(network, device):
    """Milliseconds for a 1280x720 output."""
    network = network.to(device, memory_format=torch.channels_last)
    return milliseconds(network, features(3, 1, network.architecture.scale, device), seconds=3)


def measured_costs(space, device, say=print):
    """A table of `Costs` in milliseconds, on this device and with this number of threads.

    Each part is timed alone at the size of its use. A whole network does not take exactly the sum
    of its parts, so three random ones are timed, and all parts multiplied by the median of
    time / sum. say: called with lines for the reader. Half a minute for a small space on a CPU;
    nothing else should run meanwhile.
    """
    scale, image = space.scale, features(3, 1, space.scale, device)
    enlarging = milliseconds(lambda x: enlarge(x, scale), image)

    def time(kind, c, d, m):
        factor = UPSAMPLINGS[scale][0] if kind == "up" and m > 1 else 1
        module = (conv(c, d, 3, bias=True) if kind == "head" else Up(c, factor) if kind == "up" else
                  Tail(c, scale // m) if kind == "tail" else OPERATIONS[kind].module(c, d))
        module = module.to(device, memory_format=torch.channels_last)
        took = milliseconds(module, features(c, m // factor, scale, device))
        return took + enlarging if kind == "tail" else took
    # 1. Every part that a network can have, alone.
    costs = Costs("ms", {})
    say(f"milliseconds of each operation for a 1280x720 output, x{scale}, on {device}, "
        "from a width to the same")
    for part in space.parts():
        costs.parts[part] = time(*part)
        kind, *_, m = part
        if kind == "tail":  # the last of this size
            size = f"  features {1280 * m // scale}x{720 * m // scale}"
            say(size.ljust(22) + "".join(f"{w:>9d}" for w in space.widths))
            for name in OPERATIONS:
                row = [costs.parts[name, w, w, m] for w in space.widths]
                say(f"    {name:18s}" + "".join(f"{t:9.2f}" for t in row))

    # 2. Whole networks against the sum of their parts: caches, and what lies between parts.
    rng, ratios = random.Random(0), []
    for _ in range(3):
        network = Network(space.random(rng)).to(device, memory_format=torch.channels_last)
        ratios.append(milliseconds(network, image) / costs.of(network.architecture))
    ratio = float(np.median(ratios))
    say(f"  whole networks take {ratio:.2f} times the sum of their parts ({min(ratios):.2f} to "
        f"{max(ratios):.2f})")
    return Costs("ms", {part: ratio * cost for part, cost in costs.parts.items()})


# --- The published networks --------------------------------------------------------------------
# As the authors print them: upsample, path, operation ids in the order of OPERATIONS, width ids
# into (24, 32, 40, 56, 64), parameters in millions, multiply-adds in 1e9 for a 256x256 input. They
# are here as a test of everything above: `python search_space.py` rebuilds them from these digits,
# and gets the authors' figures.
PUBLISHED = {
    "B-1": ("plain", "ccc", "30333 30131 20000", "1102 0300 4000", 0.234, 15.35),
    "B-2": ("plain", "cccccu", "00330 32311 10103 33113 31111", "1040 1232 4401 4300 1440",
            0.509, 33.36),
    "B-3": ("plain", "ccuu", "00020 33110", "2033 4310", 0.264, 17.33),
    "A-1": ("early", "cccucu", "01001 33312 00103 11011", "4000 1140 4421 0411", 0.335, 78.5),
    "A-2": ("early", "cccccuu", "33333 01313 33323 33322 13332", "3042 4440 1122 2242 2000",
            0.666, 88.9),
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


# --- One network on disk -----------------------------------------------------------------------

def write_whole(path: Path, content: str | Callable[[Path], object], keep: Path | None = None):
    """Write a file whole or not at all, also if the disk is full or the power fails meanwhile.

    content: text, or a function that writes to the path it is given. keep: the name under which the
    file that was there before is kept; one of the two is whole at any moment.
    """
    path = Path(path)
    # A rename is all or nothing, so write under another name in the same folder, then rename.
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        temporary.write_text(content) if isinstance(content, str) else content(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # on the disk before it takes the name
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(state: dict, path: Path) -> None:
    """Tensors, numbers and strings to a file. OSError where the disk is full."""
    buffer = io.BytesIO()  # torch's own writer raises whatever it likes
    torch.save(state, buffer)
    Path(path).write_bytes(buffer.getbuffer())


def load_tensors(path: Path, device="cpu") -> dict:
    """What `save_tensors` wrote. For any other file, made to harm or not, some exception.

    weights_only: no code in the file is run. Uncompressed, so that it cannot swell in memory.
    """
    with zipfile.ZipFile(path) as file:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
            raise ValueError(f"{path} was not written by this program: it is compressed")
    state = torch.load(path, map_location=device, weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"{path} was not written by this program: it holds a "
                         f"{type(state).__name__}")
    return state


def load_run(run: Path) -> Network:
    """The network that search.py left in the folder `run`, from architecture.json and network.pt.

    ValueError, in one line, where one of them is missing, damaged, or of another network.
    """
    # 1. The architecture, which is checked in every respect before anything is built by it.
    description, weights = Path(run, "architecture.json"), Path(run, "network.pt")
    for file in description, weights:
        if not file.is_file():
            raise ValueError(f"{run} holds no finished run: {file.name} is missing; "
                             f"search.py --out {run} writes it")
    try:
        architecture = Architecture.from_json(description.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{description}: {error}") from error
    # Before any memory is taken: a number has two bytes at least.
    if weights.stat().st_size < 2 * architecture.parameters():
        raise ValueError(f"{weights} is damaged or of another architecture: too small for "
                         f"{architecture.parameters():,} parameters")
    # 2. The weights: the right tensors, of real and finite numbers.
    network = Network(architecture)
    try:
        state = load_tensors(weights)
        if not all(tensor.is_floating_point() for tensor in state.values()):
            raise ValueError("weights must be real numbers")
        network.load_state_dict(state)
    except Exception as error:  # zip reader, unpickler, torch: each has its own
        raise ValueError(f"{weights} is damaged or of another architecture: copy it "
                         "again") from error
    for name, parameter in network.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{weights} holds weights that are not finite ({name}): it cannot be "
                             "used")
    return network.eval()


# --- One run: its folder, its signals, its processes -------------------------------------------

@contextmanager
def alone_in(out: Path):
    """Within, no other run may use the folder `out`. It is made, if need be, and not left empty.

    The lock is on the folder itself and ends with this process, however that ends. ValueError if
    another process holds it.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another --out")
    made = [place for place in (out, *out.parents) if not place.exists()]  # innermost first
    out.mkdir(parents=True, exist_ok=True)
    # A lock that the system keeps, not a file that says "locked": a crash leaves none behind.
    folder = os.open(out, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process is at work in {out}: wait for its end, or "
                                 "choose another --out") from None
            except OSError:  # a file system without locks
                pass
        yield
    finally:
        if fcntl:
            os.close(folder)
        for place in made:
            with suppress(OSError):  # it is not empty
                place.rmdir()


SIGNALS = []  # those that came
# A handler that only raises can be overheard: Python drops an exception that is raised inside some
# callbacks. So every signal is noted first, and every phase of a run asks.


@contextmanager
def on_signals(handler):
    """Within, SIGINT, SIGTERM and SIGHUP call `handler(number, frame)`."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    hang_up = getattr(signal, "SIGHUP", None)  # Windows has none, and nohup wants it ignored
    if hang_up and signal.getsignal(hang_up) != signal.SIG_IGN:
        numbers.append(hang_up)
    before = {number: signal.signal(number, handler) for number in numbers}
    # Python shows an exception that it drops, which would alarm the reader. If it is our own,
    # nothing is lost: the signal is in SIGNALS.
    hook = sys.unraisablehook

    def unless_ours(dropped):
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            hook(dropped)
    sys.unraisablehook = unless_ours
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, earlier in before.items():
            signal.signal(number, earlier)


def note(number, frame):
    SIGNALS.append(number)


def stop(number, frame):
    SIGNALS.append(number)
    raise KeyboardInterrupt(number)


def heed():
    """Raises KeyboardInterrupt(number) if a signal has come."""
    if SIGNALS:
        raise KeyboardInterrupt(SIGNALS[0])


@contextmanager
def shown():
    """Around a `main`: no trouble of the terminal's undoes its work.

    A name that the terminal cannot print is spelled with backslashes. A reader who has seen enough
    (`| head`) ends it quietly.
    """
    for stream in sys.stdout, sys.stderr:
        with suppress(AttributeError):  # a notebook's
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more


def environment(name: str, least: int, most: int) -> int:
    """A number from the environment, as torchrun sets it; ValueError for anything else."""
    text = os.environ.get(name, "")
    if not (text.isdecimal() and least <= int(text) <= most):
        raise ValueError(f"{name}={text!r} in the environment is no number from {least} to {most}; "
                         "if torchrun did not set it, unset it")
    return int(text)


def meet_processes(device: str, rank: int, world: int) -> None:
    """Wait until all `world` processes of torchrun are connected. ValueError if they cannot be.

    In a thread of its own: torch would wait for half an hour and not heed a signal.
    """
    def meet():
        try:
            # Gradients on a GPU go by NCCL, single numbers by gloo; left to itself, torch would
            # bring NCCL alone.
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in device else
                                                 "gloo")
        except Exception as error:
            failed.append(error)
    failed, thread = [], threading.Thread(target=meet, daemon=True)
    thread.start()
    # Three seconds are enough, if all goes well. Then say whom we wait for, and where.
    thread.join(3)
    if thread.is_alive():
        print(f"process {rank} waits for all {world} to meet at {os.environ.get('MASTER_ADDR')}, "
              f"port {os.environ.get('MASTER_PORT')}", file=sys.stderr)
    while thread.is_alive():
        thread.join(0.2)
        heed()
    if failed:
        raise ValueError(f"the {world} processes could not be connected: "
                         f"{str(failed[0]).splitlines()[0]}")


# --- Its picture -------------------------------------------------------------------------------

# Okabe and Ito's colours, told apart by the colour-blind too.
COLOURS = {"skip1x1": "#999999", "conv3x3": "#56B4E9", "residual": "#0072B2", "dws": "#E69F00",
           "up": "#009E73", "head": "#DDDDDD", "tail": "#DDDDDD"}


def draw_architecture(a: Architecture, axis=None) -> Figure:
    """A bar for each layer from left to right, as tall as its output is wide.

    Tinted is what works on more pixels than LR has.
    """
    layers = list(a.layers())
    if axis is None:
        figure = Figure(figsize=(max(6, 0.55 * len(layers)), 3), layout="constrained")
        axis = figure.subplots()
    # x goes on by one bar, and by a gap where the next letter of the path begins.
    x, before = 0, None
    for layer in layers:
        x += 1 if (layer.node, layer.kind == "tail") == before else 2
        before = layer.node, layer.kind == "tail"
        if layer.m > 1:  # it costs more there
            axis.axvspan(x - 0.5, x + 0.5, color="#FFF3D0", zorder=0, linewidth=0)
        axis.bar(x, layer.d, 0.9, -layer.d / 2, color=COLOURS[layer.kind], edgecolor="black",
                 linewidth=0.5)
        axis.text(x, 0, f"{layer.kind} {layer.d}", rotation=90, ha="center", va="center",
                  fontsize=10, color="white" if layer.kind == "residual" else "black")
    axis.set_title(f"x{a.scale}, path {a.path}: {a.parameters():,} parameters, "
                   f"{a.multiply_adds() / 1e9:.2f}G multiply-adds for a 1280x720 output",
                   fontsize=10)
    axis.set_ylim(-0.55 * a.channels, 0.55 * a.channels)
    axis.set_axis_off()
    return axis.figure


def main():
    print("The paper's x4 networks, rebuilt; multiply-adds in 1e9 for a 256x256 input\n")
    print("name path      parameters  published   MACs  + biases  published")
    for name in PUBLISHED:
        a = published(name)
        # The authors' tool also counts one operation for each value a bias is added to. With just
        # those we get the published figure to its last digit, so nothing else is missing.
        biases = 256 ** 2 * sum(layer.biases * layer.m ** 2 for layer in a.layers())
        macs, (*_, parameters, gmacs) = a.multiply_adds(256 ** 2), PUBLISHED[name]
        print(f"{name}  {a.path:9s} {a.parameters():9,d}   {parameters:.3f} M  {macs / 1e9:7.3f} "
              f"{(macs + biases) / 1e9:8.3f}  {gmacs:8}")
    print("\nThe full space\n\nscale  exits  cells  ups  complete paths  networks")
    for scale in UPSAMPLINGS:
        space = Space(scale)
        cells = len(space.cell_of)
        print(f"x{scale} {len(space.nodes):9d} {cells:6d} {len(space.nodes) - cells:4d} "
              f"{len(space.leaves):15d}  {space.size:.1e}")


if __name__ == "__main__":
    with shown():
        main()
