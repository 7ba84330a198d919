"""One phase: a supernet trains, melts into one network, and that network goes on training.

    python search.py --scale 2                            # laptop: lesson preset, generated pictures, no download
    python search.py --scale 2 --data DIR                 # the same on a folder of photographs
    python search.py --scale 4 --data DIR --budget 18G    # with a CUDA GPU: full preset, as in the paper
    python search.py --scale 2 --budget 80ms              # a network that is this fast on this machine
    python search.py --resume --out runs/x2               # go on after an interruption
    torchrun --nproc-per-node 4 search.py --scale 4 ...   # the same run, each batch split over four GPUs

Two things have weights: the convolutions, and the candidates (`Weights` in supernet.py, which follow from the logits).
Both are learned together (arXiv 2101.06658, section 3.3; first-order, as in DARTS, arXiv 1806.09055): a batch from one
half of the photographs moves the convolutions, a batch from the other half moves the logits (but for a short warm-up,
in which only convolutions learn: what random ones say of an architecture is noise). Meanwhile `progress` rises from 0
to 1 and sparsestmax turns ever more of the candidates' weights into exact zeros, whose branches are no longer
computed. At progress 1 what is left *is* one network: it leaves the supernet with its convolutions and with Adam's
memory of them, computes the same function (unless the budget demands another choice; see below), and the same loop
goes on with all photographs.

    loss = L1(SR, HR)  +  COST * sum over exits of [gamma] * off^2
                       +  PRICE * sum over exits of gamma * max(0, [off])
                       +  ORDER * sum over edges of max(0, child - parent)

    off  = log(expected cost of the exit / target)  +  [progress * log(cost if we stopped now / mean expected cost)]

What stands in [brackets] is detached: to the gradient it is a constant. The second term draws operations and widths
towards a target, 90 % of the budget (multiply-adds or milliseconds). It asks this of *each* exit: were only their mean
to meet the target, an exit far too dear could hide behind cheap ones. The third makes exits pay for what they exceed
the target by. Without it a path with an upsampling wins while its cells are still rich, and then has to starve them to
1x1 convolutions (seen at x2, 12G). It asks nothing of exits that are still too cheap: their cells can grow. Exits that
cannot come down to the target, or cannot use 80 % of the budget, are forbidden. The fourth is the paper's "sorting": a
deeper exit must earn its depth. Should the last choices to close have missed the budget, `Supernet.derive` changes
those that the search was least sure of, so every run ends within its budget and uses at least 80 % of it.

A run's folder holds settings.json (command line, versions, hardware), history.csv, distributions.npz (all weights over
time), levels.png, architecture.png, architecture.json, network.pt, results.md and .json, and for --resume checkpoint.pt
and the one before it. With a budget in milliseconds also the table of what each operation takes.

Should a loss ever be infinite or not a number, its step is not taken, and the run goes back to its last checkpoint, at half
the learning rate; the fourth time it gives up.
"""
import argparse
import copy
import csv
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

from evaluate import (crop_to, degrade, format_table, is_out_of_memory, list_photos, load_tensors, out_of_memory, printable, psnr,
                      read_photo, resize, sample_photo, save_tensors, ssim, super_resolve, usable, write_whole)
from search_space import (OPERATIONS, Architecture, Costs, Network, Space, cost_in_words, counted_costs, draw_architecture,
                          features, measured_costs, milliseconds, sum_of_parts)
from sparsestmax import ACTIVATIONS, get_activation
from supernet import Supernet, Weights, draw_levels, leading, live_choices

# A batch is `batch` patches of patch x patch LR pixels. The first `search` of all `steps` are the supernet's, and far
# dearer than the others. rate: the highest learning rate of the weights. Budgets by scale.
PRESETS = {
    "lesson": dict(channels=24, cells=3, positions=3, batch=16, patch=24, steps=8000, search=300, rate=3e-3, bfloat16=False,
                   budget={2: 6e9, 3: 3e9, 4: 2e9}),
    "full": dict(channels=64, cells=5, positions=5, batch=16, patch=48, steps=300_000, search=4000, rate=1e-3, bfloat16=True,
                 budget={2: 68e9, 3: 31e9, 4: 18e9}),          # the multiply-adds of DLSR at each scale
}
WARM = 0.1                     # progress stays 0 for this part of the search, until the weights mean something
LEAST = 0.8                    # a found network uses at least this part of its budget
LOGITS_RATE = 3e-3             # of the logits: Adam with betas (.5, .999), constant
COST = 0.03                    # weight of the cost of cells
PRICE = 0.03                   # weight of the excess of exits
ORDER = 1e-3                   # weight of the order term
BLOCK = 8                      # side, in LR pixels, of the blocks by whose detail patches are drawn
SAVE_SECONDS = 60              # a killed run loses at most this much
HALVINGS = 3                   # how often a run that diverges is tried again
CHECKPOINTS = "checkpoint.pt", "checkpoint.before.pt"
DAMAGED = "checkpoint.damaged.pt"                              # put aside, should a run go on from the second of them
MILLISECONDS = "milliseconds.json"                             # what each operation takes; see `costs_of`
BEGUN = "settings.json", MILLISECONDS, ".*.part.*"             # all that a run killed before its first checkpoint leaves behind
# torchrun starts WORLD processes and numbers them. All hold the same weights and logits; each computes its share of a batch,
# and gradients are averaged. Process 0 alone writes and prints.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


# --- 1. Photographs ------------------------------------------------------------------------------------------------

def dead_leaves(size: int, rng: np.random.Generator) -> np.ndarray:
    """A picture of random occluding discs, uint8 (size, size, 3): no photograph, yet with the edges and scales of one.

    Disc radii follow a power law, which makes the picture look alike at every scale, as photographs do (Lee, Mumford &
    Huang, Occlusion models for natural images, 2001). Drawn twice as large and averaged, so that edges are antialiased.
    """
    canvas = Image.new("RGB", (2 * size, 2 * size))
    draw = ImageDraw.Draw(canvas)
    count = 6000
    low, high = 4.0, float(size)                               # radii with density r^-3, by inverting its distribution
    radii = 1 / np.sqrt(rng.uniform(1 / high ** 2, 1 / low ** 2, count))
    centres = rng.uniform(-0.1, 1.1, (count, 2)) * 2 * size
    colours = np.clip(rng.normal(0, 24, (count, 3)) + rng.uniform(0, 255, (count, 1)), 0, 255).astype(int)
    for r, (x, y), colour in zip(radii, centres, colours):     # the first leaves end up at the bottom
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(colour))
    return np.array(canvas.reduce(2))


def load_photos(folder: str | None, scale: int, patch: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """[(LR, HR)] as uint8 (h, w, 3) and (scale h, scale w, 3), from a folder or, if it is None, generated.

    Unreadable and too small files are named on stderr and skipped; ValueError if none is left.
    """
    def pair(source):
        try:
            hr = crop_to(read_photo(source) if isinstance(source, Path) else source, scale)
            if min(hr.shape[:2]) < scale * patch:
                raise ValueError(f"{printable(source)} is smaller than a patch of {scale * patch}x{scale * patch}")
            return degrade(hr, scale), hr
        except (ValueError, OSError) as error:
            if RANK == 0:
                tqdm.write(f"skipped: {error}", file=sys.stderr)

    if folder is None:
        rng = np.random.default_rng(seed)
        sources = [dead_leaves(max(256, scale * patch), rng) for _ in range(32)]
    else:
        sources = list_photos(folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:           # decoding and resizing run outside Python's lock
        pairs = list(tqdm(pool.map(pair, sources), "photographs", len(sources), leave=False, disable=None))
    pairs = [p for p in pairs if p is not None]
    if not pairs:
        raise ValueError(f"{folder} holds no usable photograph (PNG, JPEG, WebP; at least {scale * patch} pixels each way)")
    return pairs


def detail(lr: np.ndarray, hr: np.ndarray) -> np.ndarray:
    """What shrinking took from each block: the mean difference of LR pixels (h, w, 3) from the HR pixels they stand for,
    in levels of green, summed over blocks: (ceil(h / BLOCK), ceil(w / BLOCK)) float64."""
    (h, w), s, green = lr.shape[:2], hr.shape[0] // lr.shape[0], lr[..., 1].astype(np.int16)
    lost = sum(np.abs(hr[y::s, x::s, 1] - green) for y in range(s) for x in range(s)) / s ** 2          # (h, w)
    lost = np.pad(lost + 0.1, ((0, -h % BLOCK), (0, -w % BLOCK)))      # + 0.1: what is flat is drawn, too, now and then
    return lost.reshape(len(lost) // BLOCK, BLOCK, -1, BLOCK).sum((1, 3))


class Patches:
    """Random patches from photographs that stay in memory as uint8, on the device where they are needed.

    Drawn where there is something to learn: in proportion to `detail`, and not more often from a photograph for being large.
    (Most pixels of photographs are smooth, and bicubic enlargement is right there already.)

    pairs: from load_photos; the list is emptied on the way, so that no photograph is held twice.
    All pixels of all photographs lie in one row, so a batch is cut, turned and mirrored by one gather, whatever their
    sizes; all a GPU is sent is five numbers a patch. All chance comes from the generator that `batch` is handed, on
    the CPU: its state is part of a checkpoint, so a run that is resumed sees the patches it would have seen.
    """

    def __init__(self, pairs, patch: int, device):
        self.patch, self.scale = patch, pairs[0][1].shape[0] // pairs[0][0].shape[0]
        self.sizes = torch.tensor([lr.shape[:2] for lr, _ in pairs])                # (photographs, 2), of the LR images
        self.areas = self.sizes.prod(1)
        self.starts = self.areas.cumsum(0) - self.areas        # where each LR image begins in the row of all pixels
        self.lr, self.hr = (np.empty((s * s * int(self.areas.sum()), 3), np.uint8) for s in (1, self.scale))
        chances = []
        for start, area in zip(self.starts.tolist(), self.areas.tolist()):
            pair = pairs.pop(0)
            for row, image, s in zip((self.lr, self.hr), pair, (1, self.scale)):
                row[s * s * start:s * s * (start + area)] = image.reshape(-1, 3)
            chances.append(torch.from_numpy(detail(*pair)).flatten() / area)
        self.lr, self.hr = (torch.from_numpy(row).to(device) for row in (self.lr, self.hr))
        self.blocks = torch.tensor([len(c) for c in chances])  # (photographs,): how many each has
        self.chances = torch.cat(chances)                      # (all blocks,), photograph after photograph, row after row
        self.up_to = self.chances.cumsum(0)                    # of a block and all before it

    def only(self, photos: torch.Tensor) -> "Patches":
        """Patches of these photographs alone, of the same pixels in memory."""
        part, there = copy.copy(self), torch.isin(torch.arange(len(self.areas)), photos)
        part.up_to = (self.chances * there.repeat_interleave(self.blocks)).cumsum(0)
        return part

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """LR (B, 3, patch, patch) and HR (B, 3, scale patch, scale patch) in [0, 1], turned and mirrored at random.

        Of N processes each draws the whole batch and cuts every N-th patch of it: B = size / N.
        """
        # A block, a pixel in it, and a patch that holds the pixel, somewhere, and keeps within the photograph.
        chance = torch.rand(size, generator=generator, dtype=torch.double) * self.up_to[-1]
        block, ends = torch.searchsorted(self.up_to, chance, right=True), self.blocks.cumsum(0)     # (size,), (photographs,)
        i = torch.searchsorted(ends, block, right=True)                                             # (size,): the photograph
        block, columns = block - (ends - self.blocks)[i], (self.sizes[i, 1] + BLOCK - 1) // BLOCK
        pixel = BLOCK * torch.stack([block // columns, block % columns], 1) + torch.randint(BLOCK, (size, 2), generator=generator)
        corner = pixel - torch.randint(self.patch, (size, 2), generator=generator)                  # (size, 2)
        top, left = torch.minimum(corner.clamp(min=0), self.sizes[i] - self.patch).T
        turn = torch.randint(8, (size,), generator=generator)
        numbers = torch.stack([self.starts[i], self.sizes[i, 1], top, left, turn])[:, RANK::WORLD].contiguous()     # (5, B)
        if self.lr.is_cuda:                                    # pinned memory is sent without waiting for the GPU
            numbers = numbers.pin_memory().to(self.lr.device, non_blocking=True)
        start, width, top, left, turn = numbers[..., None, None]                    # (B, 1, 1) each
        batch = []
        for row, s in (self.lr, 1), (self.hr, self.scale):
            n = s * self.patch
            y, x = torch.arange(n, device=row.device)[:, None], torch.arange(n, device=row.device)
            # The eight ways to lay a square on a square: mirror left to right, top to bottom, along the diagonal.
            x, y = torch.where((turn & 1) > 0, n - 1 - x, x), torch.where((turn & 2) > 0, n - 1 - y, y)
            x, y = torch.where((turn & 4) > 0, y, x), torch.where((turn & 4) > 0, x, y)                 # (B, n, n)
            pixels = row[s * s * start + (s * top + y) * (s * width) + s * left + x]                # (B, n, n, 3) uint8
            batch.append(pixels.permute(0, 3, 1, 2).div(255))  # so stored, this *is* channels_last
        return tuple(batch)


def cut_in_two(pairs):
    """The two halves of a single photograph, across its longer side, so that there are two to tell apart."""
    (lr, hr), = pairs
    axis = int(lr.shape[1] > lr.shape[0])
    middle, scale = lr.shape[axis] // 2, hr.shape[0] // lr.shape[0]
    return list(zip(np.split(lr, [middle], axis), np.split(hr, [scale * middle], axis)))


class Data(NamedTuple):
    """All photographs, and two random halves: for the weights and for the logits of a supernet.

    Why two halves? Were both steps to see the same data, the logits could favour whatever memorises it best. Why random?
    File names sort by subject and source, and the halves should differ in nothing but the photographs they hold.
    """
    whole: Patches
    half_a: Patches
    half_b: Patches


def load_data(s: argparse.Namespace) -> Data:
    pairs = load_photos(s.data, s.scale, s.patch, s.seed)
    if len(pairs) == 1:
        pairs = cut_in_two(pairs)
        if min(side for lr, _ in pairs for side in lr.shape[:2]) < s.patch:
            raise ValueError(f"{s.data}: the only photograph is too small to be cut in two; add one or lower --patch")
    whole = Patches(pairs, s.patch, s.device)
    order = torch.randperm(len(whole.areas), generator=torch.Generator().manual_seed(s.seed))
    return Data(whole, whole.only(order[::2]), whole.only(order[1::2]))


# --- 2. Schedules --------------------------------------------------------------------------------------------------

def progress_at(step: int, search: int) -> float:
    """0 during the warm-up, then linear to 1 at the end of the search."""
    return min(1.0, max(0.0, (step / search - WARM) / (1 - WARM)))


def learning_rate_at(step: int, search: int, steps: int) -> float:
    """Of the convolutions, as a part of the highest: half a cosine down to 1 %, times a linear rise over the search.

    So the supernet learns gently, and the found network, which goes on from there, at the full rate.
    """
    return min(1.0, (step + 1) / search) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)


# --- 3. Milliseconds -----------------------------------------------------------------------------------------------

def costs_of(s: argparse.Namespace, space: Space, out: Path) -> Costs:
    """What operations cost, in the unit of the budget: counted, or measured once and kept beside the runs' folders.

    A run keeps a copy and goes on with it, wherever it goes on.
    """
    if s.unit == "multiply-adds":
        return counted_costs(space)

    def read(path):
        try:
            tables = json.loads(path.read_text()) if path.exists() else {}
            return {key: Costs(**{name: {int(m): np.array(cost, float) for m, cost in part.items()} if isinstance(part, dict) else part
                                  for name, part in parts.items()}) for key, parts in tables.items()}
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged; delete it to measure again") from error
    device = torch.device(s.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    key = f"{space} on {platform.machine()}, {where}, torch {torch.__version__}"
    shared = out.parent / MILLISECONDS
    costs = read(out / MILLISECONDS).get(str(space))
    if costs is None:
        tables = read(shared)
        if key in tables:
            print(f"milliseconds as measured before, from {shared}; delete it to measure again")
        elif WORLD > 1:
            raise ValueError("processes would disturb one another: begin this run in one process "
                             f"(with OMP_NUM_THREADS={torch.get_num_threads()}), which leaves {shared}")
        else:
            tables[key] = measured_costs(space, device)
            shared.parent.mkdir(parents=True, exist_ok=True)
            write_tables(shared, tables)
        costs = tables[key]
    return costs


def write_tables(path: Path, tables: dict[str, Costs]):
    text = json.dumps({key: asdict(costs) for key, costs in tables.items()}, default=np.ndarray.tolist) + "\n"
    write_whole(path, lambda path: path.write_text(text))


# --- 4. The loop ---------------------------------------------------------------------------------------------------

def average(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its mean over all processes."""
    row = torch.cat([tensor.flatten() for tensor in tensors])          # one message instead of hundreds
    torch.distributed.all_reduce(row)
    for tensor, mean in zip(tensors, (row / WORLD).split([tensor.numel() for tensor in tensors])):
        tensor.copy_(mean.view_as(tensor))


def largest(number: int) -> int:
    """Of all processes' numbers the largest. Each has its own clock and its own signals, yet all must act after the same step."""
    number = torch.tensor(int(number))
    if WORLD > 1:
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
    return int(number)


class Run:
    """One search from the first step to the last.

    At any time there is either a supernet with two optimisers (weights, logits) or, after the hand-over, a network with
    one. Whatever a checkpoint must hold is an attribute.
    """

    def __init__(self, settings: argparse.Namespace, out: Path):
        s = self.settings = settings
        self.out, self.device = out, torch.device(s.device)
        self.space = Space(s.scale, s.channels, s.cells, s.positions)
        per_position = sum(operation.weights(s.channels, s.channels) for operation in OPERATIONS.values())
        weights = len(self.space.cell_of) * s.positions * per_position         # nearly all there are
        if weights > 1e9:
            raise ValueError(f"a supernet with {weights / 1e9:.3g} billion weights fits no memory: take fewer channels or cells")
        self.costs = costs_of(s, self.space, out)                      # (may build, and draw, operations to time them)
        torch.manual_seed(s.seed)
        self.generator = torch.Generator().manual_seed(s.seed)         # draws the patches
        self.step, self.seconds = 0, {"search": 0.0, "training": 0.0}
        self.halvings = 0                                              # of the learning rate, after divergence
        self.history = []                                              # rows of history.csv
        self.recent = []                                               # (step, "weights" or "logits", loss) since the last row
        self.snapshots, self.sum = [], None                            # (step, Weights) now and then; sum of all Weights
        self.hand_over_report = None
        self.supernet = Supernet(self.space, get_activation(s.activation), recompute=s.preset == "full", costs=self.costs)
        self.target = (1 + LEAST) / 2 * s.budget                       # the cost to aim at: midway in what is allowed
        self.supernet.restrict(LEAST * s.budget, self.target, s.budget)    # an impossible budget ends here, before any work
        self.supernet.to(self.device, memory_format=torch.channels_last)
        # Logits want other steps than weights: larger, since only their differences count and they must decide within the
        # search; and with less momentum (beta1 = .5), since every batch judges the candidates anew.
        logits = self.supernet.logits()
        self.logits_optimiser = torch.optim.Adam(logits, lr=LOGITS_RATE, betas=(0.5, 0.999), fused=True)
        self.optimiser = self.adam(p for p in self.supernet.parameters() if not any(p is l for l in logits))
        self.network = None                                            # the found one, once the supernet has melted
        self.data: Data | None = None                                  # from load_data

    def adam(self, parameters):
        return torch.optim.Adam(parameters, betas=(0.9, 0.99), fused=True)         # the loop sets the rate before each step

    def loss(self, model, patches: Patches, *weights) -> torch.Tensor:
        """L1 between the model's output on one batch and the truth (L1 rather than L2: Lim et al., arXiv 1707.02921)."""
        lr, hr = patches.batch(self.settings.batch, self.generator)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bfloat16):
            sr = model(lr, *weights)                                   # (B, 3, scale patch, scale patch)
        return F.l1_loss(sr.float(), hr)

    def search_step(self, progress: float) -> tuple[Weights, torch.Tensor]:
        """The supernet: its weights learn from one half of the photographs, its logits from the other.

        Returns the weights of the candidates as they stood, and their expected cost.
        """
        net = self.supernet
        weights = net.weights(progress)
        live = net.read(weights)                                       # the only time in a step that a GPU is waited for
        # a. The weights, under the architecture as it stands.
        fixed = Weights(*(w.detach() for w in weights))
        self.descend("weights", self.optimiser, self.loss(net, self.data.half_a, fixed, live))
        cost = net.cost(weights)
        if progress == 0:                                              # warm-up: what random weights say of an
            return fixed, cost.detach()                                # architecture is noise, and costs half a step
        # b. The architecture, under the weights as they stand. The log makes twice the target and half of it equally
        #    bad, at any budget.
        off_target = torch.log(net.exit_costs(weights) / self.target).float()     # (nodes,)
        #    What must meet the target in the end is one network, not the mean over networks. So this moves, as progress
        #    rises, from the mean's miss to that of the network found if we stopped now. Its cost has no slope; the mean's serves.
        with torch.no_grad():
            off_target += progress * torch.log(net.cost(net.weights(1.0)) / cost).float()
        cells = weights.gamma.detach() @ off_target ** 2                # moves operations and widths towards the target,
        exits = weights.gamma @ F.relu(off_target.detach())            # and this the path away from what is dearer
        penalty = COST * cells + PRICE * exits + ORDER * net.order_loss(weights)
        self.descend("logits", self.logits_optimiser, self.loss(net, self.data.half_b, weights, live) + penalty)
        return fixed, cost.detach()

    def training_step(self):
        """The found network, on all photographs."""
        self.descend("weights", self.optimiser, self.loss(self.network, self.data.whole))

    def descend(self, what: str, optimiser, loss: torch.Tensor):
        """One step down the slope of `loss`, for the optimiser's parameters only. what: "weights" or "logits", for the log."""
        optimiser.zero_grad()
        parameters = optimiser.param_groups[0]["params"]
        loss.backward(inputs=parameters)                               # no gradient for what does not move
        loss = loss.detach()
        if WORLD > 1:
            average([p.grad for p in parameters if p.grad is not None] + [loss])
        # Where this is 1, fused Adam leaves all as it was. So a bad step is not taken, and still no GPU is waited for.
        optimiser.found_inf = (~loss.isfinite()).float()
        optimiser.step()
        self.recent.append((self.step, what, loss))

    def settle(self):
        """Turn the recent losses into numbers; FloatingPointError if one of them, or what was learned, is not finite."""
        steps, whats, losses = zip(*self.recent)
        self.recent = list(zip(steps, whats, torch.stack([torch.as_tensor(x, device=self.device) for x in losses]).tolist()))
        who = "found network" if self.network else "supernet"
        for step, what, loss in self.recent:
            if not math.isfinite(loss):
                raise FloatingPointError(f"step {step}: the loss of the {who}'s {what} is {loss}")
        names, learned = zip(*(self.network or self.supernet).named_parameters())
        finite = torch.stack([p.isfinite().all() for p in learned]).tolist()
        if not all(finite):
            raise FloatingPointError(f"step {self.step}: the {who}'s {names[finite.index(False)]} is not finite any more")

    def hand_over(self):
        """The supernet has melted: the one network left walks out, with its weights and with Adam's memory of them."""
        s, net = self.settings, self.supernet
        if self.recent:
            self.settle()                                              # nobody decides by logits that are no numbers
        with torch.no_grad():
            weights = net.weights(1.0)
        architecture = net.derive(weights, (LEAST * s.budget, s.budget), self.sum)
        self.network = net.inherit(architecture).to(memory_format=torch.channels_last)
        # A fresh Adam would take its first steps blind, and the loss would jump. Its moments have the shape of the
        # weights, so they are sliced alike. (A layer that was never computed has none, and starts fresh.)
        optimiser = self.adam(self.network.parameters())
        for parameter, source in net.origins(self.network):
            optimiser.state[parameter] = {name: value.clone() if value.dim() == 0 else leading(value, parameter).clone()
                                          for name, value in self.optimiser.state[source].items()}
        # What did deciding cost? Nothing, if the activation had decided by itself and within the budget.
        lr, hr = self.data.half_b.batch(s.batch, torch.Generator().manual_seed(0))
        with torch.no_grad():
            before, after = net(lr, weights), self.network(lr)
        quality = [-10 * torch.log10(F.mse_loss(sr.clamp(0, 1), hr)).item() for sr in (before, after)]
        self.hand_over_report = dict(step=self.step, psnr_supernet=quality[0], psnr_network=quality[1],
                                     largest_difference=(before - after).abs().max().item())
        self.optimiser, self.supernet, self.logits_optimiser = optimiser, None, None

    def run(self):
        """All steps that are left. SIGINT and SIGTERM end it after the step in progress, with a checkpoint.

        Raises KeyboardInterrupt(signal) in that case, and FloatingPointError where the losses have become no numbers.
        """
        s = self.settings
        every_snapshot, every_row = max(1, s.search // 200), max(1, s.steps // 400)
        # A signal may come in the middle of a step, with half of the weights updated. It is only noted, and heeded after
        # the step; that is why stopping and resuming changes no bit.
        caught = []
        handlers = {n: signal.signal(n, lambda n, _: caught.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
        bar = tqdm(total=s.steps, initial=self.step, desc=f"x{s.scale}", unit="step", dynamic_ncols=True, disable=RANK > 0,
                   mininterval=0.1 if sys.stderr.isatty() else 30)     # a log file wants few lines
        last = saved = time.perf_counter()
        try:
            while self.step < s.steps and not largest(max(caught, default=0)):
                # 1. Where are we in the schedules?
                if self.step == s.search and self.network is None:
                    self.hand_over()
                progress = progress_at(self.step, s.search)
                for group in self.optimiser.param_groups:
                    group["lr"] = s.rate * learning_rate_at(self.step, s.search, s.steps) / 2 ** self.halvings
                # 2. One step, of the supernet or, from the hand-over on, of the network it has become.
                if self.network is None:
                    weights, cost = self.search_step(progress)
                    self.sum = weights if self.sum is None else Weights(*map(torch.add, self.sum, weights))
                    if self.step % every_snapshot == 0:
                        self.snapshots.append((self.step, weights))
                else:
                    self.training_step()
                # 3. Keep books. Losses leave the device only when they are shown or saved.
                phase, now = "search" if self.step < s.search else "training", time.perf_counter()
                self.seconds[phase] += now - last
                last = now
                self.step += 1
                if self.step % every_row == 0 or self.step == s.steps:
                    self.settle()
                    loss = float(np.mean([loss for _, what, loss in self.recent if what == "weights"]))
                    self.recent = []
                    live = (1, 1, 1) if self.network else live_choices(weights)
                    cost = sum_of_parts(self.network.architecture, self.costs) if self.network else cost.item()
                    self.history.append(dict(step=self.step, seconds=round(sum(self.seconds.values()), 2), progress=progress,
                                             loss=loss, live_exits=live[0], live_operations=live[1], live_widths=live[2],
                                             cost=cost))
                    bar.set_postfix_str(f"loss {loss:.4f}, live {live[0]} exits {live[1]:.1f} operations "
                                        f"{live[2]:.1f} widths, {cost_in_words(cost, s.unit)}", refresh=False)
                bar.update()
                # 4. Keep what would be lost by a crash.
                if largest(now - saved > SAVE_SECONDS):
                    self.save()
                    saved = time.perf_counter()
            self.save()
        except FloatingPointError:
            if number := largest(max(caught, default=0)):
                raise KeyboardInterrupt(number) from None              # the last sound checkpoint stands
            raise
        finally:
            bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.step < s.steps:
            raise KeyboardInterrupt(largest(max(caught, default=0)))

    # --- Checkpoints. Tensors, numbers and strings only: such a file loads with weights_only=True, that is, loading it
    # cannot run anybody's code. Beside weights and moments it holds the state of each random generator. ---
    PLAIN = "step", "seconds", "halvings", "recent", "history", "hand_over_report"

    def save(self):
        """Write checkpoint.pt, and keep the one before. FloatingPointError rather than a checkpoint that is not finite."""
        if self.recent:
            self.settle()
        if RANK > 0:
            return
        state = {name: getattr(self, name) for name in self.PLAIN} | dict(
            sum=self.sum and tuple(self.sum), snapshots=[(step, tuple(weights)) for step, weights in self.snapshots],
            random=[self.generator.get_state(), torch.get_rng_state()], optimiser=self.optimiser.state_dict())
        if self.device.type == "cuda":
            state["random"].append(torch.cuda.get_rng_state())
        if self.network:
            state |= dict(architecture=self.network.architecture.to_json(), network=self.network.state_dict())
        else:
            state |= dict(supernet=self.supernet.state_dict(), logits_optimiser=self.logits_optimiser.state_dict())
        newest, before = (self.out / name for name in CHECKPOINTS)
        write_whole(newest, partial(save_tensors, state), keep=before)

    def load(self, path: Path):
        """Go on from the checkpoint `path`; whatever is wrong with it is an exception, and leaves this Run unusable."""
        state = load_tensors(path, self.device)
        for name in self.PLAIN:
            setattr(self, name, state[name])
        self.sum = state["sum"] and Weights(*state["sum"])
        self.snapshots = [(step, Weights(*weights)) for step, weights in state["snapshots"]]
        if "network" in state:
            architecture = Architecture.from_json(state["architecture"])
            if architecture.parameters() > sum(p.numel() for p in self.supernet.parameters()):
                raise ValueError("its network is larger than the supernet")    # no checkpoint of ours: before memory is taken
            self.network = Network(architecture)
            self.network.load_state_dict(state["network"])
            self.network.to(self.device, memory_format=torch.channels_last)
            self.optimiser, self.supernet, self.logits_optimiser = self.adam(self.network.parameters()), None, None
        else:
            self.supernet.load_state_dict(state["supernet"])
            self.logits_optimiser.load_state_dict(state["logits_optimiser"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["random"][0].cpu())
        torch.set_rng_state(state["random"][1].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"][2].cpu())

    # --- What a run leaves behind ---
    def finish(self):
        """Write everything of the run's folder but the settings and the checkpoints, and print the table."""
        out, architecture = self.out, self.network.architecture
        steps, weights = zip(*self.snapshots)
        over_time = {name: torch.stack(each).cpu().numpy() for name, each in zip(Weights._fields, zip(*weights))}   # (T, ...)
        write_whole(out / "distributions.npz", partial(np.savez_compressed, steps=np.array(steps), **over_time))
        write_whole(out / "levels.png", draw_levels(self.space, architecture.path, steps, Weights(**over_time)).savefig)
        write_whole(out / "architecture.png", draw_architecture(architecture).savefig)
        write_whole(out / "architecture.json", lambda path: path.write_text(architecture.to_json() + "\n"))
        network = self.network.cpu().to(memory_format=torch.contiguous_format).eval()
        write_whole(out / "network.pt", partial(save_tensors, network.state_dict()))
        text = io.StringIO(newline="")
        rows = csv.DictWriter(text, self.history[0])
        rows.writeheader()
        rows.writerows(self.history)
        write_whole(out / "history.csv", lambda path: path.write_text(text.getvalue(), newline=""))
        # Measured on the CPU, where figures repeat, on a photograph that no training folder of ours holds.
        scale, hr = architecture.scale, crop_to(sample_photo(), architecture.scale)
        lr = degrade(hr, scale)
        methods = [("bicubic", None, resize(lr, scale)), ("ours", architecture, super_resolve(network, lr))]
        methods = [(name, a, [("sample", psnr(hr, sr, scale), ssim(hr, sr, scale))]) for name, a, sr in methods]
        numbers = dict(sample={name: dict(psnr=score[0][1], ssim=score[0][2]) for name, _, score in methods},
                       seconds=self.seconds, hand_over=self.hand_over_report, halvings=self.halvings)
        cost, s = sum_of_parts(architecture, self.costs), self.settings
        timed = ""
        if s.unit == "ms":                                             # does the table tell the truth? Time it on its own.
            network.to(self.device, memory_format=torch.channels_last)
            numbers["milliseconds"] = milliseconds(network, features(3, 1, scale, self.device), seconds=3)
            timed = f"Timed on its own it takes {numbers['milliseconds']:.4g} ms for a 1280x720 output; the table says {cost:.4g}.\n"
        write_whole(out / "results.json", lambda path: path.write_text(json.dumps(numbers, indent=1) + "\n"))
        report = self.hand_over_report
        text = (f"{format_table(f'The photograph that matplotlib ships, x{scale}', methods)}\n"
                f"{self.step} steps: search {self.seconds['search']:.0f} s, training {self.seconds['training']:.0f} s.\n"
                f"Path {architecture.path}, {cost / s.budget:.0%} of the budget of {cost_in_words(s.budget, s.unit)}.\n{timed}"
                f"Hand-over at step {report['step']}: the supernet had {report['psnr_supernet']:.2f} dB on a batch, the "
                f"network {report['psnr_network']:.2f} dB; largest difference {report['largest_difference']:.1e}.\n")
        write_whole(out / "results.md", lambda path: path.write_text(text))
        print(text)


# --- 5. The command line -------------------------------------------------------------------------------------------

def budget(text: str) -> tuple[float, str]:
    """"18G", "750M", "1.8e10" -> multiply-adds; "80ms" -> milliseconds. A positive number and its unit."""
    number, suffix = re.fullmatch("(.*?)(ms|g|m|)", text.lower(), re.DOTALL).groups()
    try:
        value = {"g": 1e9, "m": 1e6}.get(suffix, 1.0) * float(number)
    except ValueError:
        value = 0.0
    if 0 < value < math.inf:
        return value, "ms" if suffix == "ms" else "multiply-adds"
    raise argparse.ArgumentTypeError(f"{text!r} is not a budget: multiply-adds like 18G or 750M, or milliseconds like 80ms")


def whole(text: str, least: int = 0) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'positive ' * least}whole number up to 999999999")
    return int(text)


positive = partial(whole, least=1)


def rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a learning rate, a number between 0 and 1")
    return value


def arguments() -> argparse.ArgumentParser:
    # No defaults here: what was not given comes from the preset or, with --resume, from the run.
    parser = argparse.ArgumentParser(prog="search.py", description="Search, train, derive and measure an SR network.")
    parser.error = lambda message: parser.exit(2, f"search.py: error: {message}\n")        # one line, no usage
    add = parser.add_argument_group("the task").add_argument
    add("--scale", type=int, choices=(2, 3, 4), help="enlargement (default: 2)")
    add("--data", metavar="DIR", help="photographs, searched recursively (default: generated pictures)")
    add("--budget", type=budget, help="for a 1280x720 output: most multiply-adds, as 18G (default: the preset's), or most "
        "milliseconds on this machine, as 80ms")
    add("--activation", help="logits to weights: a name in sparsestmax.py's ACTIVATIONS (default: sparsestmax), or "
        "FILE.py:FUNCTION, which runs that file's code")
    add = parser.add_argument_group("the run").add_argument
    add("--out", type=Path, metavar="DIR", help="folder of the run (default: runs/x2, x3 or x4)")
    add("--resume", action="store_true", help="go on with the run in --out, with its settings")
    add("--seed", type=whole, help="of weights, logits, data split and patches (default: 0)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--preset", choices=PRESETS, help="sizes and steps (default: full on cuda, else lesson)")
    add = parser.add_argument_group("sizes (default: the preset's)").add_argument
    add("--steps", type=positive, help="training steps, those of the search among them")
    add("--search", type=positive, help="how many of them, from the first on, search")
    add("--channels", type=positive, help="width of a cell's ends, a multiple of 8")
    add("--cells", type=positive, help="most cells on a path")
    add("--positions", type=positive, help="operations in a cell")
    add("--batch", type=positive, help="patches in a batch")
    add("--patch", type=positive, help="side of an LR patch, in pixels")
    add("--rate", type=rate, help="highest learning rate of the weights")
    add("--bfloat16", action=argparse.BooleanOptionalAction, default=None, help="convolve in bfloat16")
    return parser


def resumable(out: Path) -> bool:
    """Is there a run to resume?"""
    return any(os.path.isfile(out / name) for name in CHECKPOINTS)     # (Path.is_file may raise where a name is too long)


def left_by_a_run(file: Path) -> bool:
    """Did a run leave this that was killed before its first checkpoint? Then another may be begun in its place."""
    if file.name == "settings.json":
        try:
            saved_settings(file)
        except ValueError:                                             # somebody else's, of the same name
            return False
    return any(file.match(name) for name in BEGUN)


def settings_of(args: argparse.Namespace) -> tuple[argparse.Namespace, Path]:
    """Command line -> complete settings and the run's folder; ValueError where they contradict each other or it."""
    given = {name: value for name, value in vars(args).items() if value is not None and name not in ("out", "resume")}
    if "budget" in given:
        given["budget"], given["unit"] = given["budget"]
    out = args.out
    if args.resume:
        if not resumable(out):
            raise ValueError(f"{out} holds no run to resume (no {CHECKPOINTS[0]}); start one without --resume")
        saved = saved_settings(out / "settings.json")
        if saved["activation"] not in ACTIVATIONS and "activation" not in given:
            raise ValueError("the activation of this run is code in a file; if you want it to run, add --activation "
                             + shlex.quote(saved["activation"]))
        different = {"budget" if name == "unit" else name for name, new in given.items() if saved[name] != new}
        if different:
            new, its = (each | ({"budget": cost_in_words(each["budget"], each["unit"])} if "budget" in each else {})
                        for each in (given, saved))
            raise ValueError("a run goes on with its own settings; leave out "
                             + ", ".join(f"--{name} {new[name]} (the run has {its[name]})" for name in sorted(different)))
        return argparse.Namespace(**saved), out
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another --out")
    if out.exists() and not all(map(left_by_a_run, out.iterdir())):
        raise ValueError(f"{out} is not empty: go on with --resume, choose another --out, or delete it")
    device = given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    preset = given.get("preset") or ("full" if device.startswith("cuda") else "lesson")
    settings = dict(scale=2, data=None, activation="sparsestmax", seed=0, device=device, preset=preset, unit="multiply-adds")
    settings |= PRESETS[preset] | given
    if device.startswith("cuda") and "bfloat16" not in given:          # GPUs older than Ampere convolve it without cuDNN, slowly
        settings["bfloat16"] &= torch.cuda.is_bf16_supported(including_emulation=False)
    if isinstance(settings["budget"], dict):
        settings["budget"] = settings["budget"][settings["scale"]]
    if settings["batch"] * (settings["patch"] * settings["scale"]) ** 2 > 2 ** 28:
        raise ValueError(f"--batch {settings['batch']} with --patch {settings['patch']}: so many pixels fit no memory")
    if settings["search"] >= settings["steps"]:
        raise ValueError(f"--steps {settings['steps']} must be more than --search {settings['search']}, its first part")
    return argparse.Namespace(**settings), out


def saved_settings(path: Path) -> dict:
    """The settings of a run, checked as a command line would be: the file may be anybody's. ValueError if they will not do."""
    def refuse(message):
        raise ValueError(message)
    try:
        saved, parser = json.loads(path.read_text())["settings"], arguments()
        parser.error = refuse
        text = saved | dict(budget=f"{saved['budget']}{'ms' * (saved['unit'] == 'ms')}", unit=None, bfloat16=None)
        options = ["--bfloat16" if saved["bfloat16"] else "--no-bfloat16"]
        options += [f"--{name}={value}" for name, value in text.items() if value is not None]
        read = vars(parser.parse_args(options))
        read["budget"], read["unit"] = read["budget"]
        del read["out"], read["resume"]
        if read != saved:
            raise ValueError("settings are missing, too many, or contradict one another")
        return read
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error


def describe(settings: argparse.Namespace) -> dict:
    device = torch.device(settings.device)
    return dict(settings=vars(settings), command=shlex.join(["python", *sys.argv]),
                versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__),
                hardware=torch.cuda.get_device_name(device) if device.type == "cuda" else
                f"{torch.get_num_threads()} of {os.cpu_count()} CPU cores")


def resumed(run: Run) -> Run:
    """The same run as its newest sound checkpoint has it. `run` itself is emptied: memory need not hold both."""
    run.supernet = run.network = run.optimiser = run.logits_optimiser = None
    for name in CHECKPOINTS:
        earlier = Run(run.settings, run.out)
        earlier.data = run.data
        try:
            earlier.load(run.out / name)
            newest = run.out / CHECKPOINTS[0]
            if RANK == 0 and name != newest.name and newest.exists():
                os.replace(newest, run.out / DAMAGED)                  # or the next save would keep it in place of this one
            return earlier
        except Exception as error:                                     # zip reader, unpickler, torch: each has its own
            if is_out_of_memory(error) or isinstance(error, PermissionError):      # which says nothing against the file
                raise
            if RANK == 0:
                print(f"{run.out / name} is missing or damaged: {str(error).splitlines()[0]}", file=sys.stderr)
    raise ValueError(f"no checkpoint in {run.out} can be read; start again in another --out")


def whole_run(args: argparse.Namespace):
    """The whole run, from the command line to the table of results."""
    settings, out = settings_of(args)
    if settings.batch % WORLD:
        raise ValueError(f"--batch {settings.batch} cannot be split evenly over {WORLD} processes")
    if WORLD > 1:
        # Small CPU tensors are reduced as well (`largest`); left to itself, torch would bring NCCL alone where CUDA is.
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if settings.device.startswith("cuda") else "gloo")
    usable(f"cuda:{os.environ['LOCAL_RANK']}" if WORLD > 1 and settings.device == "cuda" else settings.device)
    run = Run(settings, out)                                           # an impossible budget ends here, before any work
    run.data = load_data(settings)
    if WORLD > 1:
        torch.distributed.barrier()                                    # nobody writes before all have found --out empty
    if args.resume:
        run = resumed(run)
    elif RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(describe(settings), indent=1) + "\n"
        write_whole(out / "settings.json", lambda path: path.write_text(text))
        if settings.unit == "ms":
            write_tables(out / MILLISECONDS, {str(run.space): run.costs})
        run.save()                                                     # from here on there is something to resume
    while True:
        try:
            run.run()
            break
        except FloatingPointError as error:
            halvings = run.halvings + 1
            if halvings > HALVINGS:
                raise ValueError(f"{error}; halving the learning rate {HALVINGS} times did not help: try a lower --rate") from None
            run = resumed(run)
            run.halvings = halvings
            if RANK == 0:
                print(f"{error}: back to step {run.step}, at half the learning rate", file=sys.stderr)
            run.save()
    if RANK == 0:
        run.finish()
    if WORLD > 1:
        torch.distributed.barrier()                                    # who leaves early takes the connection along
        torch.distributed.destroy_process_group()


def main(argv=None):
    parser = arguments()
    args = parser.parse_args(argv)

    def stop(number, frame):
        raise KeyboardInterrupt(number)
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    out = args.out = args.out or Path("runs") / f"x{args.scale or 2}"
    code = ["--activation", args.activation] if args.activation and args.activation not in ACTIVATIONS else []
    way_on = f"go on with: {shlex.join(['python', 'search.py', '--resume', '--out', str(out), *code])}"
    try:
        whole_run(args)
    except KeyboardInterrupt as stopped:
        if RANK == 0:
            print("interrupted; " + (way_on if resumable(out) else "nothing was begun"), file=sys.stderr)
        sys.exit(128 + stopped.args[0])
    except OSError as error:                                           # a full disk, a vanished folder
        kept = f"; what is in {out} is whole, {way_on}" if resumable(out) else ""
        parser.exit(2, f"search.py: error: {error}{kept}\n")
    except ValueError as error:
        parser.exit(2, f"search.py: error: {error}\n")
    except (MemoryError, RuntimeError) as error:
        parser.exit(2, f"search.py: error: {out_of_memory(error)}; begin again with a smaller --batch or --patch, or fewer photographs\n")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
