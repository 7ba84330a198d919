"""The found network among the field's, all trained alike: is it better, or only trained less?

    python tests/field.py RUN --data DIR --benchmark SETS --out field.csv     # goes on where it was
    python tests/field.py RUN --data DIR --benchmark SETS --seeds 1 --steps 100 --out try.csv

RUN is a folder of search.py. Its network is trained afresh, beside

    DLSR tiny, and DLSR with fewer channels, as near to the found one's multiply-adds as can be
    FSRCNN (arXiv 1608.00367), its 1 plane made 3: it enlarges RGB here, and all others do
    SESR-M5 and M11 (arXiv 2103.09404), in RGB, in the shape that they have after training
    residual blocks as one would stack them by hand, of the found network's multiply-adds

with the same photographs, steps, pixels in a step, and recipe (search.py's after the hand-over,
in bfloat16: Muon for the kernels between the first and the last convolution, Adam for the rest; it
was chosen with a found network, and no rival has a rate of its own), each with 16 patches of 24x24
and with 4 of 48x48: attention pools over a patch, and may want the larger. Seed 0 trains each with
both, and judges on the first set; the other seeds take the better, or both where they are within
.05 dB. The table has the shape of the better mean. It is printed, and written beside FILE.csv as
FILE.md (FILE.json says what it was made with). Workers are processes with one thread each.
"""
import argparse
import copy
import itertools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks" / "neighbours")]
import common
import dlsr
import search
from chance import CACHE, advance, by_hand, forks, spread, start
from evaluate import means, measure, named
from networks import options, prepare, read, work
from search_space import Network, Space, features, load_run, milliseconds, write_whole

SHAPES = (16, 24), (4, 48)  # patches, and pixels of their side
CLOSE = 0.05  # dB between shapes that one seed does not tell apart


# --- The rivals --------------------------------------------------------------------------------
# Each has a head, a body and a tail, as `search.Run.become` wants it.

class Fsrcnn(nn.Module):
    """5x5 to d channels, 1x1 to s, m convolutions, 1x1 to d, and a 9x9 transposed one to SR."""
    def __init__(self, scale, d=56, s=12, m=4):
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, d, 5, padding=2), nn.PReLU(d))
        shapes = [(d, s, 1), *[(s, s, 3)] * m, (s, d, 1)]
        self.body = nn.Sequential(*itertools.chain.from_iterable(
            (nn.Conv2d(c, n, k, padding=k // 2), nn.PReLU(n)) for c, n, k in shapes))
        self.tail = nn.ConvTranspose2d(d, 3, 9, scale, 4, output_padding=scale - 1)

    def forward(self, x):  # (B, 3, h, w) -> (B, 3, scale h, scale w)
        return self.tail(self.body(self.head(x)))


class Sesr(nn.Module):
    """5x5, m 3x3 with a short skip each, a long skip, 5x5, PixelShuffle.

    The picture, each pixel repeated, is added before the shuffle. (Its training with wide linear
    blocks, which are folded to these convolutions, is a recipe of its own, and not taken over.)
    """
    def __init__(self, scale, m, f=16):
        super().__init__()
        self.scale, self.head = scale, nn.Sequential(nn.Conv2d(3, f, 5, padding=2), nn.PReLU(f))
        self.body = nn.ModuleList(nn.Conv2d(f, f, 3, padding=1) for _ in range(m))
        self.act = nn.ModuleList(nn.PReLU(f) for _ in range(m))
        self.tail = nn.Conv2d(f, 3 * scale ** 2, 5, padding=2)

    def forward(self, x):  # (B, 3, h, w) -> (B, 3, scale h, scale w)
        y = first = self.head(x)  # (B, f, h, w)
        for conv, act in zip(self.body, self.act):
            y = act(conv(y) + y)
        y = self.tail(y + first) + x.repeat_interleave(self.scale ** 2, 1)
        return F.pixel_shuffle(y, self.scale)


def with_body(network: dlsr.Network) -> nn.Module:
    # Not a child: its modules are children already, and `common.count` would spoil a network that
    # has them twice.
    vars(network)["body"] = nn.ModuleList(module for name, module in network.named_children()
                                          if name not in ("head", "tail"))
    return network


def rivals(found) -> dict:
    """{name: a function that builds the network afresh}"""
    scale, cost = found.scale, found.multiply_adds()
    space = Space(scale, found.channels, 5, 5)
    sizes = [dlsr.PUBLISHED["sep3-sep5-sep5"]._replace(channels=n) for n in range(8, 50, 2)]
    scaled = min(sizes, key=lambda a: abs(dlsr.multiply_adds(a, scale) - cost))
    return {"found": lambda: Network(found),
            "residual blocks": lambda: Network(by_hand(space, cost)),
            "FSRCNN": lambda: Fsrcnn(scale), "SESR-M5": lambda: Sesr(scale, 5),
            "SESR-M11": lambda: Sesr(scale, 11),
            "DLSR tiny": lambda: with_body(dlsr.Network(dlsr.PUBLISHED["tiny"], scale)),
            f"DLSR, {scaled.channels} channels": lambda: with_body(dlsr.Network(scaled, scale))}


# --- All alike ---------------------------------------------------------------------------------

def row_of(settings, found, name, shape, seed) -> list[dict]:
    """Train one, measure it: a row of the table, in a list."""
    batch, patch = shape
    run = start(argparse.Namespace(**vars(settings) | dict(batch=batch, patch=patch)), seed)
    patches = copy.copy(run.data.whole)
    patches.patch = patch
    run.data = run.data._replace(whole=patches)
    torch.manual_seed(seed)
    run.become(rivals(found)[name]())
    advance(run)
    network = run.network.eval()
    parameters, macs = common.count(network, found.scale)
    row = dict(name=name, number=list(rivals(found)).index(name), batch=batch, patch=patch,
               seed=seed, parameters=parameters, multiply_adds=macs, milliseconds=round(
                   milliseconds(network, features(3, 1, found.scale, "cpu")), 1))
    for title, photos in CACHE["sets"].items():
        mean = means(measure(lambda lr: common.super_resolve(network, lr), photos, found.scale))
        row |= {f"{title}_psnr": round(mean["psnr"], 4), f"{title}_ssim": round(mean["ssim"], 5)}
    return [row]


def shapes(rows, sets) -> dict:
    """{name: {side of the patches: PSNR on the first set, mean over the seeds there are}}"""
    of = {}
    for row in rows:
        psnrs = of.setdefault(row["name"], {}).setdefault(int(row["patch"]), [])
        psnrs.append(float(row[f"{sets[0]}_psnr"]))
    return {name: {patch: np.mean(psnrs) for patch, psnrs in each.items()}
            for name, each in of.items()}


def better_shapes(rows, sets) -> dict:
    """{name: side of the patches with the better mean}, of those that all seeds have tried"""
    worth = shapes_worth(rows, sets)
    return {name: max((patch for patch in each if (name, patch) in worth), key=each.get)
            for name, each in shapes(rows, sets).items()}


def shapes_worth(rows, sets) -> set:
    """(name, side of the patches) that seed 0 found best, or close to it."""
    first = [row for row in rows if int(row["seed"]) == 0]
    return {(name, patch) for name, each in shapes(first, sets).items()
            for patch, psnr in each.items() if psnr > max(each.values()) - CLOSE}


def table_of(rows, sets) -> str:
    """Markdown: a line for each network, at the better of its shapes; mean ± spread over seeds."""
    heads = ["network", "patches", "parameters", "multiply-adds", "ms", *sets]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 2)]
    better, of = better_shapes(rows, sets), {}
    for row in rows:
        if int(row["patch"]) == better[row["name"]]:
            of.setdefault(row["name"], []).append(row)
    for name, some in of.items():
        row = some[0]
        cells = [name, f"{row['batch']} of {row['patch']}x{row['patch']}",
                 f"{int(row['parameters']):,}",
                 f"{int(row['multiply_adds']) / 1e9:.2f} G",
                 f"{np.median([float(row['milliseconds']) for row in some]):.0f}",
                 *(spread([float(row[f"{each}_psnr"]) for row in some]) for each in sets)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def compare(args):
    rows, found = read(args.out, "name", "patch", "seed"), load_run(args.run).architecture
    settings = prepare(args, found.scale, "--patch", max(patch for _, patch in SHAPES), "--search",
                       max(1, args.steps // 20),  # nobody searches: so long the rate rises
                       found=repr(found))
    sets = list(CACHE["sets"])
    with forks(args.workers) as pool:
        for seeds in range(1), range(1, args.seeds):
            worth = shapes_worth(rows, sets)
            done = {(row["name"], int(row["patch"]), int(row["seed"])) for row in rows}
            work(pool, [(row_of, settings, found, name, shape, seed) for seed in seeds
                        for name in rivals(found) for shape in SHAPES
                        if (seed == 0 or (name, shape[1]) in worth)
                        and (name, shape[1], seed) not in done], rows, args.out)
    text = table_of(read(args.out), sets)
    print(text)
    write_whole(args.out.with_suffix(".md"), text)


def main(argv=None):
    parser = options("field.py", __doc__, steps=5000)
    add = parser.add_argument
    add("run", type=named, metavar="RUN", help="folder of search.py: whose network is compared")
    add("--seeds", type=search.positive, default=3, help="seeds 0 to N - 1 of each")
    args = parser.parse_args(argv)
    with parser.guard("; try fewer --workers"):
        compare(args)


if __name__ == "__main__":
    main()
