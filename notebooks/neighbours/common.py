"""What the neighbours share: the command line, a training loop, counting, and the run's folder.

A neighbour's file holds its idea: space, networks, search, `derive`. Around that it calls

    args = arguments(...)                    options, of the same names and meanings as search.py's
    data = photographs(args)                 whole, half_a, half_b: search.py's patches
    train(network, data.whole, args, ...)    the found network: L1, Adam, half a cosine
    finish(args, network, ...)               measures it and writes the folder of the run

So all are trained and measured alike, on the patches that Trilevel would see.
"""
import argparse
import csv
import io
import json
import math
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where the five modules are

from evaluate import (CommandLine, means, measure, named, open_photo, psnr, resize,
                      sample_photo, sets_in, ssim)
from search import Patches, describe, load_data, positive, rate, whole
from search_space import alone_in, on_signals, save_tensors, stop, write_whole


# --- Counting ----------------------------------------------------------------------------------

@torch.no_grad()
def count(network: nn.Module, scale: int, pixels=(720, 1280)) -> tuple[int, int]:
    """Parameters, and multiply-adds for an output of 1280x720 (at x3 of 1278x720).

    A convolution has its weights times its *output* pixels, a transposed one times its *input*
    pixels, a linear layer times its tokens. A module that multiplies otherwise (attention) says how
    much by a method `extra_multiply_adds(*inputs)`. Nothing is computed: a copy of the network
    runs on the meta device, where tensors have shapes and no numbers. Pictures have three planes,
    or as many as the network's attribute `planes` says.
    """
    total = 0

    def add(module, inputs, output):
        nonlocal total
        if isinstance(module, nn.ConvTranspose2d):
            total += module.weight.numel() * inputs[0][0, 0].numel()
        elif isinstance(module, nn.Conv2d):
            total += module.weight.numel() * output[0, 0].numel()
        elif isinstance(module, nn.Linear):
            total += module.weight.numel() * (inputs[0].numel() // inputs[0].shape[-1])
        if hasattr(module, "extra_multiply_adds"):
            total += module.extra_multiply_adds(*inputs)

    hooks = [module.register_forward_hook(add) for module in network.modules()]
    try:
        shadow = {name: p.to("meta") for name, p in [*network.named_parameters(),
                                                     *network.named_buffers()]}
        x = torch.empty(1, getattr(network, "planes", 3), pixels[0] // scale, pixels[1] // scale,
                        device="meta")
        torch.func.functional_call(network, shadow, (x,))
    finally:
        for hook in hooks:
            hook.remove()
    return sum(p.numel() for p in network.parameters()), total


# --- Training and measuring --------------------------------------------------------------------

def photographs(args):
    """`search.Data` of --data: patches of all photographs, and of two random halves.

    Writes settings.json: what is asked, and what is found.
    """
    data = load_data(args)
    settings = argparse.Namespace(**{name: str(value) if isinstance(value, Path) else value
                                     for name, value in vars(args).items()})
    write_whole(args.out / "settings.json",
                json.dumps(describe(settings, data.found), indent=1) + "\n")
    return data


class Noisy(NamedTuple):
    """Patches (at scale 1) turned into grey ones with noise, each of one of the sigmas, of 255."""
    patches: Patches
    sigmas: list[int]

    def batch(self, size: int, generator: torch.Generator):
        """(noisy, clean), (B, 1, patch, patch) each. The noise is not clipped."""
        _, hr = self.patches.batch(size, generator)  # (B, 3, patch, patch)
        grey = (hr * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        drawn = torch.randint(len(self.sigmas), (size, 1, 1, 1), generator=generator)
        sigma = torch.tensor(self.sigmas)[drawn] / 255  # (B, 1, 1, 1)
        return grey + sigma * torch.randn(grey.shape, generator=generator), grey


def psnr_of_batch(model, patches, args) -> float:
    """PSNR (dB, of RGB) of model(lr) on one batch that is the same at each call."""
    lr, hr = patches.batch(args.batch, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return -10 * math.log10(F.mse_loss(model(lr).clamp(0, 1), hr).item())


def train(network, patches, args, steps, history=None, generator=None):
    """`steps` steps of L1 by Adam, args.rate falling on half a cosine. Appends to `history`."""
    generator = generator or torch.Generator().manual_seed(args.seed)
    network.train().to(memory_format=torch.channels_last)
    optimiser = torch.optim.Adam(network.parameters(), betas=(0.9, 0.99), fused=True)
    recent = []
    for step in progress_bar(range(steps), "training"):
        warm = min(1.0, (step + 1) / 100)
        cosine = 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2
        optimiser.param_groups[0]["lr"] = args.rate * warm * cosine
        lr, hr = patches.batch(args.batch, generator)
        loss = F.l1_loss(network(lr), hr)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        recent.append(loss.item())
        if history is not None and ((step + 1) % max(1, steps // 100) == 0 or step + 1 == steps):
            history.append(dict(step=args.search + step + 1, loss=float(np.mean(recent))))
            recent = []
    return sound(network).eval()


def sound(network):
    """The network itself; ValueError if its weights are no numbers."""
    if not all(p.isfinite().all() for p in network.parameters()):
        raise ValueError("the training diverged: try a lower --rate")
    return network


def progress_bar(steps, what):
    return tqdm(steps, what, leave=False, dynamic_ncols=True,
                mininterval=0.1 if sys.stderr.isatty() else 30)


@torch.inference_mode()
def super_resolve(network, lr):
    """uint8 RGB (H, W, 3) -> uint8 RGB (s H, s W, 3), whole: not every neighbour bears tiles."""
    x = torch.from_numpy(np.ascontiguousarray(lr)).permute(2, 0, 1)[None].float() / 255
    return (network(x)[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


# --- The run's folder --------------------------------------------------------------------------

def finish(args, network, architecture: dict, history: list[dict], distributions: dict,
           seconds: dict, measured=None, **report):
    """Measure the found network, write the folder of the run, print its table.

    architecture: the found choices, as plain data (architecture.json). history: rows of
    history.csv. distributions: arrays with time as their first axis (distributions.npz).
    seconds: {"search": ..., "training": ...}. measured: pairs like those of `enlarged`, which is
    used if None, with another floor than bicubic. report: what else results.json and results.md
    say, in words or numbers: live (choices alive at the end), lost (dB, by deciding), kept (whether
    the weights of the search could be kept), ...
    """
    def write(name, content):
        write_whole(args.out / name, content)
    write("architecture.json", json.dumps(architecture, indent=1) + "\n")
    write("network.pt", partial(save_tensors, network.state_dict()))
    keys = list(dict.fromkeys(key for row in history for key in row))
    text = io.StringIO()
    table = csv.DictWriter(text, keys, lineterminator="\n")
    table.writeheader()
    table.writerows(history)
    write("history.csv", text.getvalue())
    write("distributions.npz", partial(np.savez_compressed, **distributions))
    parameters, macs = count(network, args.scale)
    numbers = dict(parameters=parameters, multiply_adds=macs, seconds=seconds, **report, sets={})
    lines = []
    for title, rows in measured or enlarged(network, args):
        mean = {name: means(each) for name, each in rows.items()}
        numbers["sets"][title] = mean
        (floor, low), (_, ours) = mean.items()
        lines.append(f"| {title} | {low['psnr']:.2f} | {ours['psnr']:.2f} | {ours['ssim']:.4f} |")
    lines[:0] = [f"| x{args.scale} | {floor}, PSNR-Y (dB) | ours | SSIM |", "|---|---:|---:|---:|"]
    lines += ["", f"{parameters:,} parameters, {macs / 1e9:.2f} G multiply-adds for a 1280x720 "
              "output; " + ", ".join(f"{what} {t:.0f} s" for what, t in seconds.items()) + ".",
              *(f"{name}: {value}" for name, value in report.items())]
    write("results.json", json.dumps(numbers, indent=1) + "\n")
    write("results.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    return numbers


def enlarged(network, args):
    """Pairs (title, {"bicubic": rows of `measure`, "ours": rows}), of the sets in turn."""
    for title, photos in sets_of(args).items():
        yield title, {
            "bicubic": measure(lambda lr: resize(lr, args.scale), photos, args.scale),
            "ours": measure(lambda lr: super_resolve(network, lr), photos, args.scale)}


@torch.inference_mode()
def denoised(network, args):
    """The same for a denoiser, with "noisy" in place of "bicubic": each set with each args.sigma.

    PSNR and SSIM are those of the whole picture, in grey, 0 to 255.
    """
    for title, photos in sets_of(args).items():
        for sigma in args.sigma:
            rows, noise = {"noisy": [], "ours": []}, np.random.default_rng(args.seed)
            for path in photos:
                grey = np.array(open_photo(path).convert("L"))  # (H, W)
                x = torch.from_numpy((grey + noise.normal(0, sigma, grey.shape)) / 255).float()
                for method, y in ("noisy", x), ("ours", network(x[None, None])[0, 0]):
                    y = (y.clamp(0, 1) * 255).round().byte().numpy()  # as a file would hold it
                    rows[method].append((path.stem, psnr(grey, y, 0), ssim(grey, y, 0)))
            yield f"{title}, sigma {sigma}", rows


def sets_of(args) -> dict:
    """The sample photograph, and the sets of --benchmark: {name: list of files}."""
    return {"sample": [sample_photo()]} | sets_in(args.benchmark or [], args.scale)


@contextmanager
def timed(seconds: dict, what: str):
    """Adds to seconds[what] what the block takes."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - start


# --- The command line --------------------------------------------------------------------------

class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # "(default: None)" would tell nothing
        return action.help if action.default is None else super()._get_help_string(action)


def arguments(name: str, description: str, scales=(2, 3, 4), **defaults) -> CommandLine:
    """A parser with the options that all have. defaults: steps, search, batch, patch, rate."""
    parser = CommandLine(prog=f"{name}.py", description=description, formatter_class=Help)
    add = parser.add_argument
    add("--scale", type=int, choices=scales, default=scales[0], help="enlargement")
    add("--data", type=named, metavar="DIR", default=argparse.SUPPRESS,
        help="photographs, searched recursively (default: generated)")
    add("--benchmark", type=named, nargs="+", metavar="DIR", default=argparse.SUPPRESS,
        help="sets to measure on, as evaluate.py takes them")
    add("--out", type=named, metavar="DIR", default=f"runs/{name}", help="folder of the run")
    add("--seed", type=whole, default=0, help="of weights, choices, data split and patches")
    add("--steps", type=positive, default=defaults["steps"],
        help="training steps, those of the search among them")
    add("--search", type=positive, default=defaults["search"],
        help="how many of them, from the first on, search")
    add("--batch", type=positive, default=defaults["batch"], help="patches in a batch")
    add("--patch", type=positive, default=defaults["patch"], help="side of an LR patch, in pixels")
    add("--rate", type=rate, default=defaults["rate"], help="highest learning rate")
    return parser


def main(parser: CommandLine, whole_run, argv=None):
    """Options -> whole_run(args). What cannot be ends in one line, with status 2."""
    args = argparse.Namespace(data=None, benchmark=None, device="cpu")
    args = parser.parse_args(argv, args)
    args.out = Path(args.out)
    if getattr(args, "network", None):  # a published one, only trained
        args.search = 0
    with on_signals(stop), parser.guard():
        try:
            if args.search >= args.steps:
                raise ValueError(f"--steps {args.steps} must be more than --search {args.search}, "
                                 "its first part")
            with alone_in(args.out):
                if any(args.out.iterdir()):
                    raise ValueError(f"{args.out} is not empty: choose another --out, or delete it")
                sets_of(args)  # what is missing ends here, before the long work
                torch.manual_seed(args.seed)
                whole_run(args)
        except KeyboardInterrupt as stopped:
            parser.exit(128 + stopped.args[0], "interrupted; nothing can be resumed\n")
