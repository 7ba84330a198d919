"""The report of the course: maps from logits to weights, compared over several searches each.

    python notebooks/compare.py runs/theirs* runs/mine*               # a table, and comparison.png
    python notebooks/compare.py runs/theirs* runs/mine* -o report.png

Each argument is a folder that search.py has written. The runs may differ in activation and seed,
and in nothing else. The table has a row for each activation: mean ± standard deviation over its
seeds. The columns are

    seeds                   how many runs there are with this activation
    sample, Set5, ... (dB)  PSNR-Y of the found network: on the sets that `evaluate.py --benchmark`
                            has measured for all runs, or on the sample photograph of search.py
    multiply-adds (G)       what the found network costs, in 1e9 for a 1280x720 output
    lost by deciding (dB)   at the end of the search: PSNR on a batch of the supernet as it stood,
                            minus that of the network derived from it
    minutes                 search and training together

The figure shows two things over the search, at each level: the entropy of the weights, and how many
candidates of a choice are alive. A line is a run.
"""
import json
import math
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the five modules are

from evaluate import CommandLine, check_folder_of, named
from search_space import load_run, write_whole

LEVELS = {"gamma": "network: exits", "alpha": "cell: operations", "beta": "kernel: widths"}


def entropy(weights):
    """How undecided the choices are on average: 1 among equals, 0 if decided. (T, ..., K) -> (T,).

    It is - sum_k p_k log p_k, in units of its largest value, log K.
    """
    p = weights.reshape(len(weights), -1, weights.shape[-1])  # (T, choices, K)
    return -(p * np.log(np.maximum(p, 1e-30))).sum(-1).mean(-1) / math.log(p.shape[-1])


def alive(weights):
    """How many candidates of a choice have a weight, on average: (T, ..., K) -> (T,)."""
    return (weights > 0).sum(-1).reshape(len(weights), -1).mean(-1)


# --- One run -------------------------------------------------------------------------------------

def read_run(run):
    """What a finished run's folder says of it; ValueError, in one line, if it is none."""
    run = Path(run)
    try:
        settings = json.loads((run / "settings.json").read_text())["settings"]
        results = json.loads((run / "results.json").read_text())
        quality = {"sample": results["sample"]} if results["sample"] else {}
        if (run / "benchmark.json").exists():
            quality = json.loads((run / "benchmark.json").read_text())
        hand_over, curves = results["hand_over"], {}
        with np.load(run / "distributions.npz") as file:
            steps = file["steps"]  # (T,)
            for level in LEVELS:
                weights = file[level]  # (T, ..., K)
                if len(weights) != len(steps):
                    raise ValueError(f"{len(weights)} {level} at {len(steps)} steps")
                if weights.size:  # with one position there is no inner width
                    curves[level] = entropy(weights), alive(weights)
        return dict(run=run, settings=dict(settings), activation=str(settings["activation"]),
                    scale=settings["scale"], steps=steps, curves=curves,
                    quality={name: float(each["ours"]["psnr"]) for name, each in quality.items()},
                    cost=load_run(run).architecture.multiply_adds() / 1e9,
                    lost=hand_over["psnr_supernet"] - hand_over["psnr_network"],
                    minutes=sum(results["seconds"].values()) / 60)
    except Exception as error:  # damaged files make readers raise anything
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{run} is no finished run of search.py: {words}") from error


def comparable(runs):
    """The sets that all runs are measured on; ValueError where a comparison would mean nothing."""
    first = runs[0]
    sets = [name for name in first["quality"] if all(name in run["quality"] for run in runs)]
    if not sets:
        raise ValueError("the runs are not measured on the same photographs: --benchmark them all, "
                         "or none")
    seen = {}
    for run in runs:
        other = seen.setdefault((run["activation"], str(run["settings"].get("seed"))), run)
        if other is not run:
            raise ValueError(f"{other['run']} and {run['run']} are of the same activation and "
                             "seed, and tell nothing of chance: leave out one, or change --seed")
        different = [f"--{name}" for name, value in first["settings"].items()
                     if name not in ("activation", "seed", "device")
                     and run["settings"].get(name) != value]
        if different:
            raise ValueError("the runs differ in more than activation and seed: "
                             + ", ".join(different))
    return sets


# --- All runs together ---------------------------------------------------------------------------

def table(groups, sets):
    """Markdown, a row for each activation. groups: {activation: its runs}."""
    def spread(values):
        if len(values) == 1:
            return f"{values[0]:.2f}"
        return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    heads = ["activation", "seeds", *(f"{name} (dB)" for name in sets), "multiply-adds (G)",
             "lost by deciding (dB)", "minutes"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for name, runs in groups.items():
        columns = [[run["quality"][each] for run in runs] for each in sets]
        columns += [[run[column] for run in runs] for column in ("cost", "lost", "minutes")]
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(map(spread, columns)) + " |")
    return "\n".join(lines)


def draw(groups):
    """A figure: a column for each level; above the entropy, below the live candidates."""
    figure = Figure(figsize=(15, 7.5), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    for i, (name, runs) in enumerate(groups.items()):
        look = dict(color=f"C{i}", linestyle=("-", "--", ":", "-.")[i % 4], linewidth=1.5)
        for k, run in enumerate(runs):
            for level, column in zip(LEVELS, axes.T):
                for axis, curve in zip(column, run["curves"].get(level, ())):
                    axis.plot(run["steps"], curve, **look, label=name if k == 0 else None)
    for column, title in zip(axes.T, LEVELS.values()):
        column[0].set(title=title, ylim=(-0.03, 1.03))
        column[1].set(xlabel="training step", ylim=0)
    axes[0, 0].set_ylabel("entropy (1: undecided, 0: decided)")
    axes[1, 0].set_ylabel("alive in a choice")
    axes[0, 0].legend()
    return figure


def main(argv=None):
    parser = CommandLine(prog="compare.py", description="Compare activations over searches.")
    add = parser.add_argument
    add("runs", type=named, metavar="RUN", nargs="+", help="folders written by search.py")
    add("-o", "--output", metavar="FILE", type=named, default="comparison.png",
        help="where the figure is written (default: comparison.png)")
    args = parser.parse_args(argv)
    output = Path(args.output)
    with parser.guard():
        check_folder_of(output)
        runs, groups = list(map(read_run, args.runs)), {}
        for run in runs:
            groups.setdefault(run["activation"], []).append(run)
        sets = comparable(runs)
        print(f"x{runs[0]['scale']}: mean ± standard deviation over seeds. Lost by deciding: PSNR "
              "on a batch of the supernet as it stood, minus that of the network derived from it.",
              end="\n\n")
        print(table(groups, sets))
        if min(map(len, groups.values())) < 3:
            print("\nFewer than three seeds of an activation: too few to tell a difference from "
                  "chance.")
        write_whole(output, draw(groups).savefig)
        print(f"\nEntropy and live choices over the search: {output}")


if __name__ == "__main__":
    main()
