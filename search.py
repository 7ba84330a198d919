"""One phase: a supernet trains, melts into one network, and that network goes on training.

    python search.py --scale 2                            # laptop: generated pictures, no download
    python search.py --scale 2 --data DIR                 # the same on a folder of photographs
    python search.py --scale 4 --data DIR --budget 18G    # with a CUDA GPU: full size
    python search.py --scale 2 --budget 80ms              # a network this fast on this machine
    python search.py --resume --out runs/x2               # go on after an interruption
    torchrun --nproc-per-node 4 search.py --scale 4 ...   # each batch split over four GPUs

Two things are learned in turn (arXiv 2101.06658, section 3.3): the convolutions, and the logits
that weigh the candidates. A batch from one half of the photographs moves the convolutions with the
logits fixed, a batch from the other half moves the logits with the convolutions fixed (not in the
first tenth, the warm-up). Meanwhile `progress` rises from 0 to 1, and sparsestmax turns ever more
weights into exact zeros, whose branches are no longer computed. At progress 1 what is left *is* one
network. It walks out of the supernet with its kernels, and with the optimiser's memory of them, and
goes on training on all photographs, by Muon from there on (`KernelMuon`).

Both minimise the mean absolute difference between SR and HR; for the logits, `Supernet.penalty`
adds what the budget demands. A budget is in multiply-adds or milliseconds. A network may use 80 to
100 % of it; the target is the middle, 90 %. Exits that cannot fit are forbidden from the start, and
if the finished choices miss the budget, `Supernet.derive` changes the least certain of them. So
every run ends within its budget, as counted or by its table of milliseconds.

A run's folder holds settings.json (options, photographs, versions, hardware), history.csv,
distributions.npz (all weights over time), levels.png, architecture.png, architecture.json,
network.pt, results.md and .json, and for --resume two checkpoints.
"""
import argparse
import copy
import hashlib
import json
import math
import os
import platform
import shlex
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

if "OMP_WAIT_POLICY" not in os.environ:  # OpenMP's threads spin while they wait for one another,
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # which starves a busy machine; so, not long

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from tqdm import tqdm

from evaluate import (CommandLine, checked, compare_with_bicubic, emulates_bfloat16,
                      is_out_of_memory, load_photos, means, named, note_bfloat16, positive,
                      sample_photo, usable, whole)
from search_space import (SIGNALS, Architecture, Costs, Network, Replayed, Space, alone_in,
                          cost_in_words, counted_costs, draw_architecture, environment, heed,
                          load_tensors, measured_costs, meet_processes, note, on_signals,
                          read_budget, save_tensors, stop, time_network, write_whole)
from sparsestmax import ACTIVATIONS, get_activation
from supernet import Supernet, Weights, draw_levels, live_choices

# A batch is `batch` patches of patch x patch LR pixels. The first `search` of all `steps` belong
# to the supernet, and are far dearer than the others. rate: the highest learning rate of the
# convolutions. budget: multiply-adds at x2, x3, x4; those of "full" are DLSR's (arXiv 2105.03939).
PRESETS = {
    "lesson": dict(channels=24, cells=3, positions=3, batch=16, patch=24, steps=8000, search=300,
                   rate=6e-3, bfloat16=False, budget={2: 6e9, 3: 3e9, 4: 2e9}),
    "full": dict(channels=64, cells=5, positions=5, batch=16, patch=48, steps=300_000, search=4000,
                 rate=1e-3, bfloat16=True, budget={2: 68e9, 3: 31e9, 4: 18e9}),
}
WARM = 0.1  # progress stays 0 for this part of the search
LEAST = 0.8  # a found network uses at least this part of its budget
LOGITS_RATE = 3e-3  # learning rate of the logits, constant
BLOCK = 8  # patches are drawn by the detail of blocks of 8x8 LR pixels
SAVE_SECONDS = 60  # a killed run loses at most this much
HALVINGS = 3  # how often a run that diverges is tried again, at half the rate
CHECKPOINTS = "checkpoint.pt", "checkpoint.before.pt"
DAMAGED = "checkpoint.damaged.pt"  # a damaged checkpoint.pt is put aside

# torchrun starts WORLD processes and numbers them. All hold the same weights and logits; each
# computes its share of a batch, and gradients are averaged. Process 0 alone writes and prints.
RANK, WORLD = 0, 1  # `main` asks the environment


# --- 1. Schedules ------------------------------------------------------------------------------

def progress_at(step: int, search: int) -> float:
    """0 during the warm-up, then linear to 1 at the end of the search.

    >>> [progress_at(step, search=300) for step in (0, 30, 300, 8000)]
    [0.0, 0.0, 1.0, 1.0]
    """
    return min(1.0, max(0.0, (step / search - WARM) / (1 - WARM)))


def learning_rate_at(step: int, search: int, steps: int) -> float:
    """Of the convolutions, as a part of the highest.

    Half a cosine down to 1 %, times a linear rise over the search: the supernet learns gently, and
    the found network, which goes on from there, at the full rate.

    >>> [round(learning_rate_at(step, 300, 8000), 2) for step in (0, 150, 300, 4000, 8000)]
    [0.0, 0.5, 1.0, 0.51, 0.01]
    """
    cosine = (1 + math.cos(math.pi * step / steps)) / 2
    return min(1.0, (step + 1) / search) * (0.01 + 0.99 * cosine)


# --- 2. The search: steps, hand-over, loop -----------------------------------------------------

class Run:
    """One search from the first step to the last.

    At any time there is either a supernet with two optimisers (convolutions, logits) or, after the
    hand-over, a network with two of its own (`become`). ValueError for a budget that no network of
    the space can meet.
    """

    def __init__(self, settings: argparse.Namespace, out: Path, costs: Costs | None = None):
        s, self.settings, self.out = settings, settings, out
        self.device = torch.device(s.device)
        space = self.space = Space(s.scale, s.channels, s.cells, s.positions)
        self.costs = costs or (measured_costs(space, self.device) if s.unit == "ms" else
                               counted_costs(space))
        self.target = (1 + LEAST) / 2 * s.budget  # midway in what is allowed
        self.data: Data | None = None  # from load_data
        torch.manual_seed(s.seed)
        self.generator = torch.Generator().manual_seed(s.seed)  # draws the patches
        self.supernet = Supernet(space, get_activation(s.activation),
                                 recompute=s.preset == "full", costs=self.costs)
        self.supernet.restrict(LEAST * s.budget, self.target, s.budget)
        self.supernet.to(self.device, memory_format=torch.channels_last)
        self.network = None  # once the supernet has melted
        # Logits want other steps than convolutions: larger, as only their differences count and
        # they must decide within the search; and with less momentum (beta1 = .5), as every batch
        # judges the candidates anew.
        logits = self.supernet.logits()
        self.logits_optimiser = torch.optim.Adam(logits, LOGITS_RATE, (0.5, 0.999), fused=True)
        self.learned = [*self.supernet.parameters()][len(logits):]  # (the logits come first)
        self.optimisers = [adam(self.learned)]
        self.step, self.seconds = 0, {"search": 0.0, "training": 0.0}
        self.halvings = 0  # of the rate, after divergence
        self.history = []  # rows of history.csv
        self.recent = []  # (step, whose, loss) since the last row
        self.snapshots, self.sum = [], None  # (step, *weights) now and then; sums over all
        self.hand_over_report = None

    def search_step(self, progress: float) -> tuple[Weights, torch.Tensor]:
        """One step of the supernet. Returns the candidates' weights, and their expected cost."""
        net = self.supernet
        weights = net.weights(progress)
        values = net.read(weights)  # the only time in a step that a GPU is waited for

        # a. The convolutions learn from one half of the photographs, the architecture as it stands.
        fixed = Weights(*(w.detach() for w in weights))
        loss = self.loss(net, self.batch(self.data.half_a), fixed, values)
        self.descend("weights", slope(self.learned, loss))
        cost = net.cost(fixed)
        if progress == 0:  # warm-up: what random convolutions say of an architecture is noise, and
            return fixed, cost  # listening to it costs half a step

        # b. The logits learn from the other half, the convolutions as they stand.
        extra = net.penalty(weights, self.target, progress)
        loss = self.loss(net, self.batch(self.data.half_b), weights, values)
        self.descend("logits", slope(net.logits(), loss + extra))
        return fixed, cost

    def training_step(self):
        """One step of the found network, on all photographs."""
        self.descend("weights", self.network_slope(*self.batch(self.data.whole)))

    def batch(self, patches: "Patches"):
        return patches.batch(self.settings.batch, self.generator)

    def loss(self, model, batch, *weights) -> torch.Tensor:
        """Mean |SR - HR| over a batch. (L1, not L2: Lim et al., EDSR, arXiv 1707.02921.)"""
        lr, hr = batch
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bfloat16):
            sr = model(lr, *weights)  # (B, 3, scale patch, scale patch)
        return F.l1_loss(sr.float(), hr)

    def descend(self, whose: str, loss: torch.Tensor):
        """One step down the `slope` that was taken. whose: "weights" (convolutions) or "logits"."""
        parameters, optimisers = ((self.learned, self.optimisers) if whose == "weights" else
                                  (self.supernet.logits(), [self.logits_optimiser]))
        loss = loss.clone()  # (the next replay overwrites it)
        if WORLD > 1:
            average([p.grad for p in parameters if p.grad is not None] + [loss])
        # Fused Adam skips a step whose `found_inf` is 1: a loss that is not finite changes nothing
        # in a supernet, and no GPU has to be waited for. (Muon spoils a network by it, but `settle`
        # finds out, and the run goes back.)
        for optimiser in optimisers:
            optimiser.found_inf = (~loss.isfinite()).float()
            optimiser.step()
        self.recent.append((self.step, whose, loss))

    def hand_over(self):
        """The supernet has melted: the one network left walks out."""
        s, net = self.settings, self.supernet
        self.settle()  # nobody decides by logits that are no numbers
        # 1. The network, with its kernels; and what the optimiser remembers of them.
        with torch.no_grad():
            weights = net.weights(1.0)
        found = net.inherit(net.derive(weights, (LEAST * s.budget, s.budget), self.sum))
        memory = net.memory_of(found, self.optimisers[0])
        self.become(found)
        # Adam goes on with what stays its own as if nothing had happened. Muon is new to its
        # kernels, but it needs no more than a mean gradient, and Adam has one.
        others, muon = self.optimisers
        others.state.update((p, memory[p]) for p in others.param_groups[0]["params"] if p in memory)
        for kernel, matrix in zip(muon.kernels, muon.param_groups[0]["params"]):
            if kernel in memory:
                muon.state[matrix]["momentum_buffer"] = as_matrix(memory[kernel]["exp_avg"])
        # 2. Quality just before and after, on one batch (PSNR of RGB). Equal, if all weights were
        #    one-hot and within the budget already.
        lr, hr = self.data.half_b.batch(s.batch, torch.Generator().manual_seed(0))
        with torch.no_grad():
            before, after = net(lr, weights), found(lr)
        psnr = [-10 * torch.log10(F.mse_loss(sr.clamp(0, 1), hr)).item() for sr in (before, after)]
        self.hand_over_report = dict(step=self.step, psnr_supernet=psnr[0], psnr_network=psnr[1],
                                     largest_difference=(before - after).abs().max().item(),
                                     changed=net.derive(weights) != found.architecture)

    def become(self, network: Network):
        """From here on there is this network alone, with fresh optimisers."""
        self.network = network.to(self.device, memory_format=torch.channels_last)
        # Muon for kernels that mix the channels of the body, Adam for the rest: head, tail, biases,
        # depthwise kernels.
        self.learned = [*self.network.parameters()]
        kernels = [p for p in self.network.body.parameters() if p.dim() == 4 and p.shape[1] > 1]
        inside = set(map(id, kernels))
        self.optimisers = [adam([p for p in self.learned if id(p) not in inside]),
                           KernelMuon(kernels)]
        self.network_slope = Replayed(lambda *batch: slope(
            self.learned, self.loss(self.network, batch)))
        self.supernet = self.logits_optimiser = None

    def run(self):
        """All steps that are left. A signal ends it after the step in progress, saved.

        Raises KeyboardInterrupt(signal) then, and FloatingPointError as `settle` does.
        """
        s, weights, cost = self.settings, None, None

        def stopped():  # by which signal, or 0
            return largest(max(SIGNALS, default=0))
        bar = tqdm(total=s.steps, initial=self.step, desc=f"x{s.scale}", unit="step",
                   dynamic_ncols=True, disable=RANK > 0,
                   mininterval=0.1 if sys.stderr.isatty() else 30)  # a log file wants few lines
        last = saved = time.perf_counter()
        # A signal may come in the middle of a step, with half of the weights updated. It is noted,
        # and heeded after the step: that is why stopping and resuming changes no bit.
        with bar, on_signals(note):
            try:
                while self.step < s.steps and not stopped():
                    # 1. Where are we in the schedules?
                    if self.step == s.search and self.network is None:
                        self.hand_over()
                    progress = progress_at(self.step, s.search)
                    rate = s.rate * learning_rate_at(self.step, s.search, s.steps)
                    for optimiser in self.optimisers:
                        optimiser.param_groups[0]["lr"] = rate / 2 ** self.halvings
                    # 2. One step, of the supernet or of the network it has become.
                    if self.network is None:
                        weights, cost = self.search_step(progress)
                        self.sum = tuple(map(torch.add, self.sum, weights) if self.sum else weights)
                        if self.step % max(1, s.search // 200) == 0:
                            self.snapshots.append((self.step, *weights))
                    else:
                        self.training_step()
                    # 3. Keep books.
                    now = time.perf_counter()
                    self.seconds["search" if self.step < s.search else "training"] += now - last
                    last = now
                    self.step += 1
                    if self.step % max(1, s.steps // 400) == 0 or self.step == s.steps:
                        bar.set_postfix_str(self.add_row(progress, weights, cost), refresh=False)
                    bar.update()
                    # 4. Keep what would be lost by a crash.
                    if largest(now - saved > SAVE_SECONDS):
                        self.save()
                        saved = time.perf_counter()
                self.save()
            except FloatingPointError:
                if not stopped():  # (else the last sound checkpoint stands)
                    raise
        if number := stopped():
            raise KeyboardInterrupt(number)

    def add_row(self, progress: float, weights: Weights, cost: torch.Tensor) -> str:
        """Add a row to history.csv: mean loss since the last row, what is alive. -> as text."""
        self.settle()  # (losses leave the device only when they are shown or saved)
        losses = [loss for _, whose, loss in self.recent if whose == "weights"]
        self.recent = []
        live = (1, 1, 1) if self.network else live_choices(weights)
        cost = self.costs.of(self.network.architecture) if self.network else cost.item()
        self.history.append(dict(
            step=self.step, seconds=round(sum(self.seconds.values()), 2), progress=progress,
            loss=float(np.mean(losses)), live_exits=live[0], live_operations=live[1],
            live_widths=live[2], cost=cost))
        return (f"loss {np.mean(losses):.4f}, live {live[0]} exits {live[1]:.1f} operations "
                f"{live[2]:.1f} widths, {self.costs.words(cost)}")

    def settle(self):
        """Recent losses become plain numbers; FloatingPointError if one is not finite.

        Or if a parameter is not. So no such thing is saved, shown or decided by.
        """
        self.recent = [(step, whose, float(loss)) for step, whose, loss in self.recent]
        who = "found network" if self.network else "supernet"
        for step, whose, loss in self.recent:
            if not math.isfinite(loss):
                raise FloatingPointError(f"step {step}: the loss of the {who}'s {whose} is {loss}")
        for name, parameter in (self.network or self.supernet).named_parameters():
            if not parameter.isfinite().all():
                raise FloatingPointError(f"step {self.step}: the {who}'s {name} is not finite any "
                                         "more")

    # --- Checkpoints: tensors, numbers and strings only, so loading one runs nobody's code -----

    PLAIN = ("step", "seconds", "halvings", "recent", "history", "snapshots", "sum",
             "hand_over_report")
    PARTS = "supernet", "logits_optimiser", "network"  # those there are at the time

    def generators(self):
        """Of random numbers: for patches; for initial weights and for maps that draw."""
        on_gpu = [torch.cuda.default_generators[torch.cuda.current_device()]
                  ] if self.device.type == "cuda" else []
        return [self.generator, torch.default_generator, *on_gpu]

    def save(self):
        """Write checkpoint.pt, and keep the one before."""
        self.settle()
        if RANK > 0:
            return
        state = {name: getattr(self, name) for name in self.PLAIN}
        state |= {name: getattr(self, name).state_dict() for name in self.PARTS
                  if getattr(self, name)}
        state |= dict(costs=asdict(self.costs), random=[g.get_state() for g in self.generators()],
                      optimisers=[each.state_dict() for each in self.optimisers])
        if self.network:
            state["architecture"] = self.network.architecture.to_json()
        newest, before = (self.out / name for name in CHECKPOINTS)
        write_whole(newest, partial(save_tensors, state), keep=before)

    def load(self, state: dict):
        """Go on from a checkpoint. If anything is wrong with it, it raises: drop this Run then."""
        # 1. Numbers, and what has been noted down so far.
        for name in self.PLAIN:
            setattr(self, name, state[name])
        if self.sum and [w.shape for w in self.sum] != [p.shape for p in self.supernet.logits()]:
            raise ValueError("it is of another space")
        # 2. After the hand-over: the found network in place of the supernet.
        if "network" in state:
            architecture = Architecture.from_json(state["architecture"])
            # Before memory is taken:
            if architecture.parameters() > sum(p.numel() for p in self.supernet.parameters()):
                raise ValueError("its network is larger than the supernet")
            self.become(Network(architecture))
        # 3. Weights, moments, and the state of chance: the next patch is the one that would have
        #    come.
        for name in self.PARTS:
            if getattr(self, name):
                getattr(self, name).load_state_dict(state[name])
        for optimiser, each in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(each)
        for generator, numbers in zip(self.generators(), state["random"]):
            generator.set_state(numbers.cpu())

    # --- What a run leaves behind --------------------------------------------------------------

    def finish(self):
        """Write the run's results into its folder, and print the table. The network comes first."""
        def write(name, content):
            write_whole(self.out / name, content)

        def attempt(what, action):
            """action() or, as a run can do without it, a note why there is no such thing."""
            heed()
            try:
                return action()
            except Exception as error:  # matplotlib may miss a font, LaTeX, its sample photograph
                why = (str(error) or type(error).__name__).splitlines()[0]
                print(f"note: no {what}: {why}", file=sys.stderr)
        # 1. The network, and how it was found.
        s, a = self.settings, self.network.architecture
        network = self.network.cpu().to(memory_format=torch.contiguous_format).eval()
        write("architecture.json", a.to_json() + "\n")
        write("network.pt", partial(save_tensors, network.state_dict()))
        rows = self.history[0].keys(), *map(dict.values, self.history)
        write("history.csv", "".join(",".join(map(str, row)) + "\n" for row in rows))
        steps, *levels = zip(*self.snapshots)
        levels = Weights(*(torch.stack(level).cpu().numpy() for level in levels))  # (T, ...) each
        write("distributions.npz", partial(np.savez_compressed, steps=np.array(steps),
                                           **levels._asdict()))
        # 2. Its quality, on the CPU, where figures repeat, on a photograph that no training folder
        #    holds. And pictures.
        table, scores = attempt("table of quality", lambda: compare_with_bicubic(
            network, f"The photograph that matplotlib ships, x{a.scale}", [sample_photo()])
        ) or ("", {})
        attempt("levels.png", lambda: write("levels.png", draw_levels(
            self.space, a.path, steps, levels).savefig))
        attempt("architecture.png", lambda: write("architecture.png", draw_architecture(a).savefig))
        # 3. All figures, for programs and for readers.
        report, cost, timed = self.hand_over_report, self.costs.of(a), ""
        numbers = dict(sample={method: means(rows) for method, rows in scores.items()},
                       seconds=self.seconds, hand_over=report, halvings=self.halvings)
        if s.unit == "ms":  # does the table of parts tell the truth?
            took = numbers["milliseconds"] = time_network(network, self.device)
            timed = (f"Timed on its own it takes {took:.4g} ms for a 1280x720 output; the table "
                     f"says {cost:.4g}.\n")
        write("results.json", json.dumps(numbers, indent=1) + "\n")
        why = " (choices were changed to keep the budget)" if report.get("changed") else ""
        text = (f"{table}\n"
                f"{self.step} steps: search {self.seconds['search']:.0f} s, "
                f"training {self.seconds['training']:.0f} s.\n"
                f"Path {a.path}, {cost / s.budget:.0%} of the budget of "
                f"{self.costs.words(s.budget)}.\n{timed}"
                f"Hand-over at step {report['step']}: the supernet had "
                f"{report['psnr_supernet']:.2f} dB on a batch, the network "
                f"{report['psnr_network']:.2f} dB; largest difference "
                f"{report['largest_difference']:.1e}{why}.\n")
        write("results.md", text)
        print(text)


def adam(parameters):  # (The loop sets the rate before each step.)
    return torch.optim.Adam(parameters, betas=(0.9, 0.99), fused=True)


def slope(parameters, loss: torch.Tensor) -> torch.Tensor:
    """Give the parameters, and nothing else, their gradient; -> the loss, without its history."""
    for parameter in parameters:
        parameter.grad = None
    loss.backward(inputs=parameters)
    return loss.detach()


def as_matrix(kernel: torch.Tensor) -> torch.Tensor:
    """A kernel (d, c, k, k) as a matrix (d, k k c): a view, where it is stored as channels_last."""
    return kernel.detach().permute(0, 2, 3, 1).flatten(1)


class KernelMuon(torch.optim.Muon):
    """torch's Muon, for convolutions: a kernel is a matrix from what it sees to what it says.

    The gradient of such a matrix has a few large singular values, and Adam's step follows them.
    Muon sets all of them to about 1, so that rare directions are learned as fast (K. Jordan, 2024).
    Its step is scaled to the size of Adam's (arXiv 2502.16982), so one rate does for both.
    """
    def __init__(self, kernels):
        self.kernels, self.direction = kernels, Replayed(self.at_rate_1)
        super().__init__([torch.zeros_like(as_matrix(kernel)) for kernel in kernels],
                         weight_decay=0, adjust_lr_fn="match_rms_adamw")

    def step(self):
        # torch's parameters are not our kernels but matrices of zeros: what is left in them after a
        # step of Muon's *is* the step.
        steps, rate = self.param_groups[0]["params"], self.param_groups[0]["lr"]
        self.direction(*(kernel.grad for kernel in self.kernels))
        torch._foreach_add_([*map(as_matrix, self.kernels)], steps, alpha=rate)

    def at_rate_1(self, *gradients):
        """Muon's step, from zero. The rate comes later: it changes, and a recording does not."""
        group, = self.param_groups
        for step, gradient in zip(group["params"], gradients):
            step.zero_().grad = as_matrix(gradient)
        rate, group["lr"] = group["lr"], 1.0
        super().step()
        group["lr"] = rate


def average(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its mean over all processes."""
    row = torch.cat([tensor.flatten() for tensor in tensors])  # one message instead of hundreds
    torch.distributed.all_reduce(row)
    for tensor, mean in zip(tensors, (row / WORLD).split([tensor.numel() for tensor in tensors])):
        tensor.copy_(mean.view_as(tensor))


def largest(number: int) -> int:
    """Of all processes' numbers the largest.

    Each has its own clock and its own signals, yet all must act after the same step.
    """
    number = torch.tensor(int(number))
    if WORLD > 1:
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
    return int(number)


# --- 3. Photographs ----------------------------------------------------------------------------

class Patches:
    """Random patches of photographs that stay in memory as uint8.

    They are drawn where there is something to learn: in proportion to `detail`, and not more often
    from a photograph for being large. (Most of a photograph is smooth, and bicubic enlargement is
    right there already.) All chance comes from the generator that `batch` is handed. Its state is
    in the checkpoint, so a resumed run sees the patches that it would have seen.

    pairs: [(LR, HR)], uint8, from load_photos.
    """

    def __init__(self, pairs, patch: int, device):
        self.pairs, self.patch, self.device = pairs, patch, device
        self.scale = pairs[0][1].shape[0] // pairs[0][0].shape[0]
        self.sizes = torch.tensor([lr.shape[:2] for lr, _ in pairs])  # (photographs, 2), of LR
        # A large photograph has more blocks, so each of its blocks gets less: detail / area.
        details = [torch.from_numpy(detail(*pair)) for pair in pairs]  # (rows, columns) of blocks
        areas = self.sizes.prod(1).tolist()
        # Of all blocks: photograph, row and column (blocks, 3); and chance (blocks,).
        self.blocks = torch.cat([F.pad(each.argwhere(), (1, 0), value=i)
                                 for i, each in enumerate(details)])
        self.chances = torch.cat([each.flatten() / area for each, area in zip(details, areas)])
        self.up_to = self.chances.cumsum(0)  # of a block and all before it

    def only(self, photos: torch.Tensor) -> "Patches":
        """Patches of these photographs alone, of the same pixels in memory."""
        part = copy.copy(self)
        part.up_to = (self.chances * torch.isin(self.blocks[:, 0], photos)).cumsum(0)
        return part

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """LR (B, 3, patch, patch) and HR (B, 3, scale patch, scale patch), in [0, 1].

        Of N processes each draws the whole batch and cuts every N-th patch of it: B = size / N.
        """
        places, batch = self.draw(size, generator)[RANK::WORLD].tolist(), []
        for image, s in (0, 1), (1, self.scale):  # LR, HR
            n = s * self.patch
            patches = [self.pairs[i][image][s * y:s * y + n, s * x:s * x + n]
                       for i, y, x, _ in places]
            patches = torch.from_numpy(np.stack(patches))  # (B, n, n, 3) uint8
            if "cuda" in str(self.device):  # pinned memory is sent without waiting for the GPU
                patches = patches.pin_memory().to(self.device, non_blocking=True)
            # Turned there: NumPy copies turned patches slowly.
            patches = torch.stack([turned(p, place[3]) for p, place in zip(patches, places)])
            batch.append(patches.permute(0, 3, 1, 2).div(255))  # so stored, this *is* channels_last
        return tuple(batch)

    def draw(self, size: int, generator: torch.Generator) -> torch.Tensor:
        """Where to cut: photograph, top, left and turn of each patch, (size, 4)."""
        # 1. A block by its chance: photograph and corner.
        chance = torch.rand(size, generator=generator, dtype=torch.double) * self.up_to[-1]
        block = self.blocks[torch.searchsorted(self.up_to, chance, right=True)]  # (size, 3)
        i, corner = block[:, 0], BLOCK * block[:, 1:]
        # 2. A pixel in the block, a patch that holds it somewhere, moved into the photograph.
        pixel = corner + torch.randint(BLOCK, (size, 2), generator=generator)  # (size, 2)
        corner = pixel - torch.randint(self.patch, (size, 2), generator=generator)
        top, left = torch.minimum(corner.clamp(min=0), self.sizes[i] - self.patch).T
        return torch.stack([i, top, left, torch.randint(8, (size,), generator=generator)], 1)


def turned(patch: torch.Tensor, turn: int) -> torch.Tensor:
    """One of the eight ways to lay a square on a square, `turn` 0 to 7: (n, n, 3) -> (n, n, 3)."""
    patch = patch.transpose(0, 1) if turn & 4 else patch  # along the diagonal
    patch = patch.flip(1) if turn & 1 else patch  # left to right
    return patch.flip(0) if turn & 2 else patch  # top to bottom


def detail(lr: np.ndarray, hr: np.ndarray) -> np.ndarray:
    """What shrinking took from each block of LR (h, w, 3): (ceil(h / BLOCK), ceil(w / BLOCK)).

    For each LR pixel the mean absolute difference, in green, from the scale x scale HR pixels that
    it stands for; summed over each block.
    """
    (h, w), s = lr.shape[:2], hr.shape[0] // lr.shape[0]
    lost = np.abs(hr[..., 1].reshape(h, s, w, s) - lr[:, None, :, None, 1].astype(np.int16))
    lost = lost.mean((1, 3)) + 0.1  # (h, w); + 0.1: what is flat is drawn, too, now and then
    lost = np.pad(lost, ((0, -h % BLOCK), (0, -w % BLOCK)))
    return lost.reshape(len(lost) // BLOCK, BLOCK, -1, BLOCK).sum((1, 3))


class Data(NamedTuple):
    """All photographs, and two random halves: for a supernet's convolutions and its logits.

    Why two halves? If both saw the same data, the logits could favour whatever memorises it best.
    Why random? File names sort by subject and source; the halves should differ in nothing of the
    kind.
    """
    whole: Patches
    half_a: Patches
    half_b: Patches
    found: dict  # what there is, for settings.json


def load_data(s: argparse.Namespace) -> Data:
    lines = []

    def say(line):
        lines.append(line)
        if RANK == 0:
            tqdm.write(line, file=sys.stderr)
    pairs = load_photos(s.data, s.scale, s.patch, s.seed, say)
    whole = Patches(pairs, s.patch, s.device)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(s.seed))
    some = b"".join(pairs[k][0].tobytes() for k in (0, len(pairs) // 2, -1))  # is enough
    found = dict(photographs=len(pairs), pixels=sum(hr.shape[0] * hr.shape[1] for _, hr in pairs),
                 digest=hashlib.sha256(some).hexdigest()[:16],
                 said=[line for line in lines if not line.startswith("skipped")])
    return Data(whole, whole.only(order[::2]), whole.only(order[1::2]), found)


# --- 4. The command line -----------------------------------------------------------------------

rate = checked(float, lambda r: 0 < r < 1, "a learning rate, a number between 0 and 1")
# (Not above 0 but above 1e-9: costs are divided by a budget.)
budget = checked(read_budget, lambda b: 1e-9 < b[0] < math.inf,
                 "a budget: multiply-adds like 18G or 750M, or milliseconds like 80ms")


def arguments() -> CommandLine:
    # No defaults here: what was not given comes from the preset or, with --resume, from the run.
    parser = CommandLine(prog="search.py", description="Search, train, derive and measure.")
    add = parser.add_argument_group("the task").add_argument
    add("--scale", type=int, choices=(2, 3, 4), help="enlargement (default: 2)")
    add("--data", type=named, metavar="DIR",
        help="photographs, searched recursively (default: generated)")
    add("--budget", type=budget, help="for a 1280x720 output: most multiply-adds, as 18G (default: "
        "the preset's), or most milliseconds on this machine, as 80ms")
    add("--activation", help="logits to weights: a name in sparsestmax.py's ACTIVATIONS (default: "
        "sparsestmax), or FILE.py:FUNCTION, which runs that file's code")
    add = parser.add_argument_group("the run").add_argument
    add("--out", type=named, metavar="DIR", help="folder of the run (default: runs/x2, x3 or x4)")
    add("--resume", action="store_true", help="go on with the run in --out, with its settings (a "
        "new --data or --device may be given)")
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
    add("--rate", type=rate, help="highest learning rate of the convolutions")
    add("--bfloat16", action=argparse.BooleanOptionalAction, help="convolve in bfloat16")
    return parser


def settings_of(args: argparse.Namespace) -> tuple[argparse.Namespace, Path]:
    """Command line -> complete settings and the run's folder; ValueError where they contradict."""
    # 1. What was given: with --resume the rest comes from the run, else from the preset.
    given = {name: value for name, value in vars(args).items()
             if value is not None and name not in ("out", "resume")}
    if "budget" in given:
        given["budget"], given["unit"] = given["budget"]
    out = Path(args.out)
    if args.resume:
        return settings_to_resume(given, out), out
    # 2. A new run wants a folder of its own.
    if out.exists() and not all(map(left_by_a_run, out.iterdir())):
        raise ValueError(f"{out} is not empty: go on with --resume, choose another --out, or "
                         "delete it")
    # 3. Defaults, then the preset, then what was given.
    device = given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    preset = given.get("preset") or ("full" if device.startswith("cuda") else "lesson")
    s = dict(scale=2, data=None, activation="sparsestmax", seed=0, device=device, preset=preset,
             unit="multiply-adds") | PRESETS[preset] | given
    if s["bfloat16"] and "bfloat16" not in given:
        s["bfloat16"] = not emulates_bfloat16(device)
    if isinstance(s["budget"], dict):
        s["budget"] = s["budget"][s["scale"]]
    # 4. What cannot be.
    if s["batch"] * (s["patch"] * s["scale"]) ** 2 > 2 ** 28:
        raise ValueError(f"--batch {s['batch']} with --patch {s['patch']}: so many pixels fit no "
                         "memory")
    if s["search"] >= s["steps"]:
        raise ValueError(f"--steps {s['steps']} must be more than --search {s['search']}, its "
                         "first part")
    return argparse.Namespace(**s), out


def settings_to_resume(given: dict, out: Path) -> argparse.Namespace:
    """The settings of the run in `out`. ValueError where the command line asks for others."""
    if not resumable(out):
        raise ValueError(f"{out} holds no run to resume (no {CHECKPOINTS[0]}); start one without "
                         "--resume")
    saved = saved_settings(out / "settings.json")
    # Code in a file is run only if it is asked for today: the folder may come from anybody.
    if saved["activation"] not in ACTIVATIONS and "activation" not in given:
        raise ValueError("this run's activation is code in a file: to run it, add "
                         f"--activation {shlex.quote(saved['activation'])}")

    def shown(s, name):
        return cost_in_words(s["budget"], s["unit"]) if name == "budget" else s[name]
    # Photographs and device may be others now, and a map's file may have moved.
    moved = {name: given.pop(name) for name in ("data", "device") if name in given}
    if Path(given.get("activation", "")).name == Path(saved["activation"]).name:
        moved["activation"] = given.pop("activation")
    different = sorted({"budget" if name == "unit" else name for name in given
                        if given[name] != saved[name]})
    if different:
        raise ValueError("a run goes on with its own settings; leave out " + ", ".join(
            f"--{name} {shown(given, name)} (the run has {shown(saved, name)})"
            for name in different))
    return argparse.Namespace(**saved | moved)


def saved_settings(path: Path) -> dict:
    """The settings of a run, read as a command line would be: the file may be anybody's.

    ValueError if they will not do.
    """
    def refuse(message):
        raise ValueError(message)
    try:
        # Spell them as options, parse these, and see if the same comes out.
        saved, parser = json.loads(path.read_text())["settings"], arguments()
        parser.error = refuse
        options = [f"--{name}={value}" for name, value in saved.items()
                   if value is not None and name not in ("unit", "budget", "bfloat16")]
        options += ["--bfloat16" if saved["bfloat16"] else "--no-bfloat16",
                    f"--budget={saved['budget']}{'ms' * (saved['unit'] == 'ms')}"]
        read = vars(parser.parse_args(options))
        read["budget"], read["unit"] = read["budget"]
        del read["out"], read["resume"]
        if read != saved:
            raise ValueError("settings are missing, too many, or contradict one another")
        return read
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error


def resumable(out: Path) -> bool:
    """Is there a run to resume? (Path.is_file may raise where a name is too long.)"""
    return any(os.path.isfile(out / name) for name in CHECKPOINTS)


def left_by_a_run(file: Path) -> bool:
    """May this file come from a run that was killed before its first checkpoint?

    If all files in a folder may, another run can be begun there.
    """
    if file.name != "settings.json":
        return file.match(".*.part.*")  # of `write_whole`
    try:
        return bool(saved_settings(file))
    except ValueError:  # somebody else's, of the same name
        return False


def describe(settings: argparse.Namespace, found: dict) -> dict:
    device = torch.device(settings.device)
    return dict(settings=vars(settings), photographs=found,
                command=shlex.join(["python", *sys.argv]),
                versions=dict(python=platform.python_version(), torch=torch.__version__,
                              numpy=np.__version__),
                hardware=torch.cuda.get_device_name(device) if device.type == "cuda" else
                f"{torch.get_num_threads()} of {os.cpu_count()} CPU cores")


def resumed(settings: argparse.Namespace, out: Path, data: Data) -> Run:
    """The run in `out` as its newest sound checkpoint has it."""
    # One run on trial: an error here is due to settings or map, not to a file. (Costs in
    # milliseconds are in the checkpoint.)
    get_activation(settings.activation)
    if settings.unit == "multiply-adds":
        Run(settings, out)
    newest = out / CHECKPOINTS[0]
    for path in (out / name for name in CHECKPOINTS):
        try:
            state = load_tensors(path, settings.device)
            # (What is counted is counted afresh: the file may be anybody's.)
            costs = Costs(**state["costs"]) if settings.unit == "ms" else None
            run = Run(settings, out, costs)
            run.data = data
            run.load(state)
            if RANK == 0 and path != newest and newest.exists():
                os.replace(newest, out / DAMAGED)  # or the next save would keep it instead of this
            return run
        except Exception as error:  # zip reader, unpickler, torch: each has its own
            elsewhere = PermissionError, torch.AcceleratorError
            if is_out_of_memory(error) or isinstance(error, elsewhere):
                raise  # which says nothing against the file
            if RANK == 0:
                why = (str(error) or type(error).__name__).splitlines()[0]
                print(f"{path} is missing or damaged: {why}", file=sys.stderr)
    raise ValueError(f"no checkpoint in {out} can be read; start again in another --out")


def keep_places(s: argparse.Namespace, out: Path, found: dict):
    """Keep in settings.json where a resumed run's photographs are; say if they are others."""
    path = out / "settings.json"
    record = json.loads(path.read_text())
    names = "photographs", "pixels", "digest"
    before, now = record.get("photographs"), [found[name] for name in names]
    if isinstance(before, dict) and (then := [before.get(name) for name in names]) != now:
        print(f"note: these are not the photographs of before: then {then[0]}, {then[1]} pixels in "
              f"all; now {now[0]}, {now[1]}. The run goes on with these", file=sys.stderr)
    if record["settings"] != vars(s) or before != found:
        write_whole(path, json.dumps(record | dict(settings=vars(s), photographs=found),
                                     indent=1) + "\n")


def whole_run(args: argparse.Namespace):
    """From the command line to the table of results."""
    s, out = settings_of(args)
    if s.batch % WORLD:
        raise ValueError(f"--batch {s.batch} cannot be split evenly over {WORLD} processes")
    if WORLD > 1:
        if s.device.startswith("cuda:"):
            raise ValueError(f"--device {s.device} is one GPU, and each of the {WORLD} processes "
                             "wants one of its own: pass --device cuda")
        if s.unit == "ms" and not args.resume:
            raise ValueError("processes would disturb one another's clocks: begin this run in one "
                             "process, stop it, and go on with torchrun and --resume")
        meet_processes(s.device, RANK, WORLD)
    several = WORLD > 1 and s.device == "cuda"  # a GPU for each
    usable(f"cuda:{environment('LOCAL_RANK', 0, WORLD - 1)}" if several else s.device)
    if RANK == 0:
        note_bfloat16(s)
    # 1. A run: from its last checkpoint, or a new one. What is impossible ends here, unwritten.
    if args.resume:
        data = load_data(s)
        heed()
        run = resumed(s, out, data)
        if RANK == 0:
            keep_places(s, out, data.found)
    else:
        run = Run(s, out)
        heed()
        run.data = load_data(s)
        heed()
        if WORLD > 1:
            torch.distributed.barrier()  # nobody writes before all have found --out empty
        if RANK == 0:
            write_whole(out / "settings.json",
                        json.dumps(describe(s, run.data.found), indent=1) + "\n")
            run.save()  # from here on there is something to resume
    # 2. All its steps; from the last checkpoint at half the rate, should it diverge.
    while True:
        try:
            run.run()
            break
        except FloatingPointError as error:
            halvings, data = run.halvings + 1, run.data
            if halvings > HALVINGS:
                raise ValueError(f"{error}; halving the learning rate {HALVINGS} times did not "
                                 "help: try a lower --rate" + (
                                     "" if s.activation in ACTIVATIONS else
                                     f", or look for NaN in {s.activation}")) from None
            vars(run).clear()  # memory need not hold both
            run = resumed(s, out, data)
            run.halvings = halvings
            if RANK == 0:
                print(f"{error}: back to step {run.step}, at half the learning rate",
                      file=sys.stderr)
            run.save()
    # 3. What it found.
    if RANK == 0:
        run.finish()
    if WORLD > 1:
        torch.distributed.barrier()  # who leaves early takes the connection along
        torch.distributed.destroy_process_group()


def main(argv=None):
    global RANK, WORLD
    parser = arguments()
    args = parser.parse_args(argv)
    out = args.out = Path(args.out or Path("runs") / f"x{args.scale or 2}")
    way_on = ["python", "search.py", "--resume", "--out", str(out)]
    if args.activation and args.activation not in ACTIVATIONS:
        way_on += ["--activation", args.activation]
    way_on = f"go on with: {shlex.join(way_on)}"

    def kept():
        return f"; what is in {out} is whole, {way_on}" if resumable(out) else ""
    SIGNALS.clear()
    with on_signals(stop), parser.guard("; begin again with a smaller --batch or --patch, or fewer "
                                        "photographs", kept):
        try:
            WORLD = environment("WORLD_SIZE", 1, 2 ** 20) if "WORLD_SIZE" in os.environ else 1
            # A lone process may carry the RANK of something else.
            RANK = environment("RANK", 0, WORLD - 1) if WORLD > 1 else 0
            with alone_in(out) if RANK == 0 else nullcontext():
                whole_run(args)
        except KeyboardInterrupt as stopped:
            if RANK == 0:
                print("interrupted; " + (way_on if resumable(out) else "nothing was begun"),
                      file=sys.stderr)
            sys.exit(128 + stopped.args[0])
        finally:
            SIGNALS.clear()


if __name__ == "__main__":
    main()
