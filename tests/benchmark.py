"""What a search costs: time and memory, side by side in one process.

    python tests/benchmark.py          # step times, memory, sparsestmax: a few minutes on a laptop
    python tests/benchmark.py --whole  # and a whole run against training its network alone
    python tests/benchmark.py --preset full --scale 4 --patch 32 --rounds 1  # the full space:
                                       # minutes a step on a CPU

Times are medians, with the quartiles beside them. Contenders take turns within each round, so that
a slow minute of the machine slows all of them, and ratios are taken within the table. The table,
with versions and hardware, is saved to --out, after each part. Other options are search.py's.
"""
import argparse
import ctypes
import os
import platform
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import search
from evaluate import CommandLine, check_folder_of, crop_to, dead_leaves, degrade, usable
from search_space import OPERATIONS, Network, cells_on, cost_in_words, keep_memory, write_whole
from sparsestmax import sparsestmax
from supernet import live_choices

PROGRESS = 1e-3, 0.25, 0.5, 0.75, 1.0  # at 0 itself, the warm-up, a step leaves the logits alone
NOWHERE = Path(os.devnull, "nothing")  # the folder of a run that saves nothing


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def race(contenders: dict, rounds: int) -> dict:
    """Call each contender once a round; -> seconds, name: (rounds,) array.

    The first round warms up and is not counted. On a GPU nor is the second: `Replayed` records.
    """
    seconds, uncounted = {name: [] for name in contenders}, 1 + torch.cuda.is_available()
    for i in range(uncounted + rounds):
        for name, contender in contenders.items():
            synchronize()
            start = time.perf_counter()
            contender()
            synchronize()
            if i >= uncounted:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(s) for name, s in seconds.items()}


def in_words(seconds: np.ndarray, against: np.ndarray) -> str:
    low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75)) * 1e3
    return f"{middle:.4g} ms | {low:.4g} to {high:.4g} | {middle / np.median(against) / 1e3:.2f}"


def peak_memory(action) -> float:
    """Bytes that `action` needed at its peak above what was there before.

    NaN where the system does not tell.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return torch.cuda.max_memory_allocated() - before
    try:  # Linux: a high-water mark that can be set back
        ctypes.CDLL(None).malloc_trim(0)  # hand back what earlier actions left behind
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return float("nan")

    def resident(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        line, = (line for line in lines if line.startswith(field))
        return int(line.split()[1]) * 1024
    before = resident("VmRSS:")
    action()
    return resident("VmHWM:") - before


# --- Runs -----------------------------------------------------------------------------------------

def make_run(settings, pairs, costs) -> search.Run:
    """A Run on generated pictures whose supernet leans a little, as in a search.

    It leans towards one network within the budget. costs: those of another Run, so that nothing
    is timed twice.
    """
    run = search.Run(settings, NOWHERE, costs)
    whole = search.Patches(pairs, settings.patch, run.device)
    run.data = search.Data(whole, whole, whole, {})
    run.save = lambda: None
    net = run.supernet
    lean(net, net.derive(net.weights(1.0), (search.LEAST * settings.budget, settings.budget)), 0.02)
    return run


@torch.no_grad()
def lean(net, architecture, by: float):
    """Add `by` to every logit of `net` that speaks for this architecture."""
    a, space = architecture, net.space
    net.gamma[space.nodes.index(a.path)] += by
    for cell, names, widths in zip(cells_on(a.path), a.operations, a.widths):
        c = net.cell_of[cell]
        for position, name in enumerate(names):
            net.alpha[c, position, list(OPERATIONS).index(name)] += by
        for position, width in enumerate(widths):
            net.beta[c, position, space.widths.index(width)] += by


def become_network(run, architecture=None):
    """Hand over at once, to `architecture` if it is given: then `run` only trains."""
    run.hand_over()
    if architecture:
        run.become(Network(architecture))
    return run


def evaluated(run, how: str):
    """Let `run`'s supernet compute all, some, or little.

    how: "ours", what is alive; "dense", all of every exit that the budget allows; "tree", all.
    """
    net = run.supernet
    net.__dict__.pop("read", None)
    if how != "ours":
        read = net.read

        def read_all(weights):
            live = read(weights, dense=True)
            if how == "dense":
                live.gamma[np.setdiff1d(np.arange(len(live.gamma)), net.allowed.cpu())] = 0
            return live
        net.read = read_all


def weights_half(run, progress, how="ours"):
    """The half of a search step that trains the weights.

    It is what a step of the lone network is to be compared with.
    """
    evaluated(run, how)
    with torch.no_grad():
        weights = run.supernet.weights(progress)
    loss = run.loss(run.supernet, run.batch(run.data.whole), weights)
    run.descend("weights", search.slope(run.learned, loss))


def whole_step(run, progress, how="ours"):
    """A step of the search: weights, then logits."""
    evaluated(run, how)
    run.search_step(progress)


def step_times(settings, pairs, costs, rounds):
    run = make_run(settings, pairs, costs)
    lone = become_network(make_run(settings, pairs, costs))
    # Or the run would drift away from the network that `lone` has.
    run.logits_optimiser.param_groups[0]["lr"] = 0.0
    contenders = {"derived network, a training step": lone.training_step}
    if run.device.type == "cuda":  # what does a replay save?
        slow = become_network(make_run(settings, pairs, costs))
        muon = slow.optimisers[1]
        slow.network_slope, muon.direction = slow.network_slope.action, muon.direction.action
        contenders["the same, launched kernel by kernel"] = slow.training_step
    for name, step in ("weights only", weights_half), ("whole step", whole_step):
        contenders[f"the whole tree, {name}"] = partial(step, run, PROGRESS[0], "tree")
        contenders[f"dense, {name}"] = partial(step, run, PROGRESS[0], "dense")
        contenders |= {f"ours at progress {p}, {name}": partial(step, run, p) for p in PROGRESS}
    seconds = race(contenders, rounds)
    rows = ["| step | median | quartiles | x derived network | x dense |",
            "|---|---:|---:|---:|---:|"]
    for name, s in seconds.items():
        dense = seconds["dense, whole step" if "whole step" in name else "dense, weights only"]
        rows.append(f"| {name} | {in_words(s, seconds['derived network, a training step'])} | "
                    f"{np.median(s) / np.median(dense):.2f} |")
    assert run.supernet.derive(run.supernet.weights(1.0)) == lone.network.architecture
    live = {p: live_choices(run.supernet.weights(p)) for p in PROGRESS}
    alive = "; ".join(f"{p}: {e}, {o:.1f}, {w:.1f}" for p, (e, o, w) in live.items())
    rows.append("\nDense: all of every exit that the budget allows; the whole tree: of those that "
                f"it forbids, too. Alive (exits, operations, widths): {alive}.")
    return rows


def memory(settings, pairs, costs):
    rows = ["| step | peak memory above the model's own |", "|---|---:|"]
    run = make_run(settings, pairs, costs)
    lone = become_network(make_run(settings, pairs, costs))
    whole_step(run, PROGRESS[0], "dense")  # gradients and moments of weights are there by now
    contenders = {"dense, whole step": partial(whole_step, run, PROGRESS[0], "dense")}
    contenders |= {f"ours at progress {p}, whole step": partial(whole_step, run, p)
                   for p in PROGRESS}
    contenders["derived network, a training step"] = lone.training_step
    for name, action in contenders.items():
        rows.append(f"| {name} | {peak_memory(action) / 2**20:,.0f} MiB |")
    own = sum(p.numel() * p.element_size() for p in run.supernet.parameters())
    return rows + [f"\nThe supernet's parameters take {own / 2**20:.1f} MiB, with gradients and "
                   "Adam's moments four times that."]


def whole_run(settings, pairs, costs):
    run = make_run(settings, pairs, costs)
    torch.manual_seed(settings.seed)
    for logits in run.supernet.logits():  # no leaning: a search as search.py does it
        torch.nn.init.normal_(logits, std=1e-3)
    run.run()
    longer = argparse.Namespace(**vars(settings) | dict(steps=settings.steps + settings.search))
    alone = become_network(make_run(longer, pairs, costs), run.network.architecture)
    alone.step = settings.search  # the search is behind it; `steps` steps of training are left
    alone.run()
    together, training = sum(run.seconds.values()), alone.seconds["training"]
    return ["| run | seconds | x training alone |", "|---|---:|---:|",
            f"| {settings.search} steps of search | {run.seconds['search']:.1f} | |",
            f"| {settings.steps - settings.search} steps of training | "
            f"{run.seconds['training']:.1f} | |",
            f"| search and training | {together:.1f} | {together / training:.2f} |",
            f"| {settings.steps} steps of training the found network alone | {training:.1f} | 1 |"]


# --- The map --------------------------------------------------------------------------------------

def maps(rounds, device):
    keep_memory()  # or pages that come and go are half of the time, for all alike
    rows = ["| forward + backward | shape | median | quartiles | x torch.softmax |",
            "|---|---|---:|---:|---:|"]
    candidates = {"torch.softmax": lambda z: z.softmax(-1),
                  "sparsestmax at .5": lambda z: sparsestmax(z, 0.5),
                  "sparsestmax at .5, row by row":
                      lambda z: torch.stack([sparsestmax(row, 0.5) for row in z])}
    try:
        from entmax import sparsemax
        candidates["entmax.sparsemax"] = lambda z: sparsemax(z, -1)
    except ImportError:
        rows.append("| entmax.sparsemax | is not installed | | | |")
    for shape in (4096, 64), (175, 4):
        z = torch.randn(shape, device=device, requires_grad=True)
        g = torch.randn(shape, device=device)
        row_by_row, at_once = {}, {}
        for name, f in candidates.items():
            those = row_by_row if "row by" in name else at_once
            those[name] = lambda f=f: f(z).backward(g)
        seconds = race(at_once, 5 * rounds)
        seconds |= race(row_by_row, min(rounds, 3))  # it takes a second
        for name, s in seconds.items():
            rows.append(f"| {name} | {shape} | {in_words(s, seconds['torch.softmax'])} |")
    return rows


# --- The command line -----------------------------------------------------------------------------

def check_out(file: Path):
    """ValueError if `file` cannot be written: better now than after the work."""
    try:
        check_folder_of(file)
    except ValueError as error:
        raise ValueError(f"{error}; make it first, or choose another --out") from None
    if file.is_dir():
        raise ValueError(f"--out {file} is a folder: name a file in it")


def report(args):
    """Measure, print and save what was asked for; what cannot be is found before the work."""
    parts, rounds, out = args.parts + ["whole"] * args.whole, args.rounds, args.out
    for name in ("parts", "rounds", "whole"):  # the others are search.py's
        delattr(args, name)
    args.out = NOWHERE
    settings, _ = search.settings_of(args)
    usable(settings.device)
    if out is None:
        out = Path("runs/benchmark.md")
        out.parent.mkdir(exist_ok=True)
    check_out(out)
    costs = search.Run(settings, NOWHERE).costs
    rng = np.random.default_rng(0)
    pictures = [dead_leaves(max(256, settings.scale * settings.patch), rng) for _ in range(8)]
    pictures = [crop_to(picture, settings.scale) for picture in pictures]
    pairs = [(degrade(hr, settings.scale), hr) for hr in pictures]
    s = vars(settings)
    lines = [f"# x{s['scale']}, {s['channels']} channels, {s['cells']} cells of {s['positions']}, "
             f"{s['batch']} patches of {s['patch']}x{s['patch']}, "
             f"budget {cost_in_words(s['budget'], s['unit'])}, "
             f"{'bfloat16' if s['bfloat16'] else 'float32'}\n",
             f"Python {platform.python_version()}, torch {torch.__version__}, "
             f"{torch.get_num_threads()} threads, "
             f"{search.describe(settings, {})['hardware']} ({processor()}), {rounds} rounds.\n"]
    print("\n".join(lines))
    measured = {"steps": lambda: step_times(settings, pairs, costs, rounds),
                "memory": lambda: memory(settings, pairs, costs),
                "maps": lambda: maps(rounds, settings.device),
                "whole": lambda: whole_run(settings, pairs, costs)}
    for name in parts:
        part = [f"\n## {name}\n", *measured[name]()]
        print("\n".join(part), flush=True)
        lines += part
        write_whole(out, "\n".join(lines) + "\n")


def main(argv=None):
    parser = CommandLine(prog="benchmark.py", description=__doc__.split("\n")[0],
                         parents=[search.arguments()], conflict_handler="resolve")
    add = parser.add_argument_group("the benchmark").add_argument
    add("--whole", action="store_true",
        help="also a whole run, and the training of its network alone")
    add("--rounds", type=search.positive, default=10, help="(default: 10)")
    add("--parts", nargs="+", choices=("steps", "memory", "maps"),
        default=["steps", "memory", "maps"], help="(default: all three)")
    add("--out", type=Path, metavar="FILE.md", help="(default: runs/benchmark.md)")
    args = parser.parse_args(argv)
    if args.resume:
        parser.error("--resume is for a run of search.py: leave it out, all is measured anew")
    if args.data is not None:
        parser.error("--data is for a run of search.py: leave it out, pictures are generated here")
    with parser.guard("; try a smaller --batch or --patch"):
        report(args)


def processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = (line.split(": ")[1] for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


if __name__ == "__main__":
    main()
