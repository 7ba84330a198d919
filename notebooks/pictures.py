"""What only the notebooks draw. They import this file; the modules can be read without it.

    notebook   functions
    1 and 6    draw_triangle, draw_map    a map from three logits to three weights
    2          draw_tree                  the tree of all paths
    3 and 4    draw_supernet, animate     all three levels, at one moment and over time
    5          draw_field                 our networks among published ones

All of them draw on a matplotlib axis that they are handed; only `animate` takes a whole figure.
Pictures of a run's results (`draw_architecture`, `draw_levels`) are in the modules.
"""
import csv
from pathlib import Path

import numpy as np
import torch
from matplotlib.animation import FuncAnimation

from search_space import COLOURS, OPERATIONS, OUTPUT_PIXELS, Space
from supernet import Weights, live_choices

# --- 1. Maps from three logits to three weights --------------------------------------------------

# The plane of the triangle, seen from the front and true to scale, its centre at (0, 0). What is
# lost is the mean of the logits, which no map of sparsestmax.py looks at.
_PLANE = ((-0.5 ** 0.5, 0.5 ** 0.5, 0.0), (-(1 / 6) ** 0.5, -(1 / 6) ** 0.5, (2 / 3) ** 0.5))


def to_plane(z):
    """Logits or weights (..., 3) -> points (..., 2)."""
    return z @ torch.tensor(_PLANE, dtype=z.dtype).T


def from_plane(xy):
    """Points (..., 2) -> the logits (..., 3) of mean 0 that `to_plane` puts there."""
    return xy @ torch.tensor(_PLANE, dtype=xy.dtype)


def draw_triangle(axis, progress=0.0):
    """The simplex, its centre, and the ball that sparsestmax forbids at this progress."""
    corners = to_plane(torch.eye(3))  # (3, 2)
    axis.plot(*corners[[0, 1, 2, 0]].T.numpy(), color="black", linewidth=1.5)
    angles = torch.linspace(0, 6.2832, 200)
    ball = progress * (2 / 3) ** 0.5 * torch.stack([angles.cos(), angles.sin()])  # (2, 200)
    axis.plot(*ball.numpy(), color="black", linestyle="--", linewidth=1)
    axis.plot(0, 0, "+", color="black")
    for k, (x, y) in enumerate(corners.tolist()):
        axis.annotate(f"$e_{k + 1}$", (x, y), (x * 1.16, y * 1.16), ha="center", va="center",
                      fontsize=12)
    axis.set(aspect="equal", xlim=(-1.15, 1.15), ylim=(-1.15, 1.15))
    axis.set_axis_off()


def draw_map(axis, activation, progress=0.0, ball=0.0, reach=1.3):
    """Where `activation` sends the plane.

    Shades tell how many candidates survive. Threads tie logits to their weights, the dots.
    ball: the progress at which to draw the ball that sparsestmax forbids; 0 for maps without one.
    reach: how far from the centre logits are drawn.
    """
    side = torch.linspace(-reach, reach, 241)
    xy = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1)  # (241, 241, 2)
    with torch.no_grad():
        alive = (activation(from_plane(xy), progress) > 0).sum(-1)  # (241, 241)
        points = xy[8::15, 8::15].reshape(-1, 2)
        images = to_plane(activation(from_plane(points), progress))  # (points, 2)
    axis.imshow(alive.numpy(), origin="lower", extent=(-reach, reach, -reach, reach), cmap="Greys",
                vmin=-1, vmax=7)
    threads = torch.stack([points, images], 1)  # (points, 2 ends, 2)
    axis.plot(*threads.permute(2, 1, 0).numpy(), color="#56B4E9", linewidth=0.6, alpha=0.8)
    axis.plot(*images.T.numpy(), "o", color="#0072B2", markersize=3)
    draw_triangle(axis, ball)
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach))


# --- 2. The tree of paths ------------------------------------------------------------------------

def tree_layout(space: Space) -> dict[str, tuple[float, float]]:
    """Where to draw each node: x is its depth, the root's is 1; y such that no branches cross."""
    leaves = {leaf: float(-i) for i, leaf in enumerate(space.leaves)}

    def height(node):
        below = [height(child) for child in space.nodes if child[:-1] == node]
        return sum(below) / len(below) if below else leaves[node]
    return {node: (len(node), height(node)) for node in space.nodes}


def draw_tree(axis, space: Space):
    """The path tree. A circle is an exit.

    A line is as thick as what it leads to costs, the mean over all choices. In a small tree this
    is written on it, for a 1280x720 output.
    """
    position = np.mean([operation.weights(c, d) for operation in OPERATIONS.values()
                        for c in space.widths for d in space.widths])
    weights = {"c": space.positions * position, "u": 9 * space.channels ** 2}  # each used per pixel
    places, lr_pixels = tree_layout(space), OUTPUT_PIXELS // space.scale ** 2
    for node, (x, y) in places.items():
        cost = weights[node[-1]] * lr_pixels * space.magnification(node) ** 2 / 1e9
        x0, y0 = places.get(node[:-1], (0, y))  # the parent's
        colour = COLOURS["residual"] if node[-1] == "c" else COLOURS["up"]
        axis.plot([x0, x], [y0, y], color=colour, linewidth=0.5 + 0.25 * cost,
                  solid_capstyle="butt", zorder=1)
        if len(space.nodes) < 20:
            axis.annotate(f"{cost:.3g}G", ((x0 + x) / 2, (y0 + y) / 2), ha="center", va="center",
                          backgroundcolor="white")
        axis.plot(x, y, "o", markersize=13, color="white", markeredgecolor=colour,
                  markeredgewidth=1.5, zorder=2)
        axis.annotate(node[-1], (x, y), ha="center", va="center_baseline", fontsize=10)
    axis.set_axis_off()


# --- 3 and 4. The supernet -----------------------------------------------------------------------

def draw_supernet(axis, space: Space, weights: Weights):
    """All three levels at one moment. weights: tensors or numpy arrays.

    Network: a line is as thick, and a cell as dark, as the weight of all exits behind it; a ring's
    size is an exit's own weight.
    Cell: a row of columns, one per position, coloured in proportion to the operations' weights.
    Kernel: a column is as tall as the expected width behind it.
    """
    gamma, alpha, beta = (np.asarray(w) for w in weights)
    places, exits = tree_layout(space), dict(zip(space.nodes, gamma))
    for node, (x, y) in places.items():
        behind = sum(weight for exit, weight in exits.items() if exit.startswith(node))
        x0, y0 = places.get(node[:-1], (0, y))  # the parent's
        axis.plot([x0, x], [y0, y], color="black", linewidth=6 * behind, zorder=1,
                  solid_capstyle="butt")
        if behind == 0:
            axis.plot([x0, x], [y0, y], color="#DDDDDD", linewidth=0.5, zorder=0)
        fade = float(0.12 + 0.88 * min(1, 2 * behind))
        if node[-1] == "u":
            axis.bar(x, 0.44, 0.3, y - 0.22, color=COLOURS["up"], alpha=fade, zorder=2)
        else:
            c = space.cell_of[node]
            draw_cell(axis, x, y, space, alpha[c], beta[c], fade)
        if exits[node] > 0:
            axis.plot(x + 0.42, y, "o", markersize=3 + 9 * exits[node], markerfacecolor="white",
                      markeredgecolor="black", zorder=3)
    handles = [axis.bar(0, 0, color=COLOURS[name], label=name) for name in (*OPERATIONS, "up")]
    handles += axis.plot([], [], "o", color="white", markeredgecolor="black", label="exit")
    axis.legend(handles=handles, loc="lower left", ncols=len(handles), frameon=False,
                bbox_to_anchor=(0, -0.12), fontsize=9)
    axis.set_xlim(-0.1, max(map(len, space.nodes)) + 0.6)
    axis.set_ylim(1 - len(space.leaves) - 0.6, 0.6)
    axis.set_axis_off()


def draw_cell(axis, x, y, space: Space, alpha, beta, fade):
    """One cell around (x, y). alpha: (positions, operations); beta: (positions - 1, widths)."""
    # The expected width behind each position, as a part of the full one, which a cell ends in.
    widths = [*(beta @ np.array(space.widths) / space.channels), 1.0]
    for p, width in enumerate(widths):
        left, bottom = x - 0.3 + 0.6 * p / space.positions, y - 0.36 * width
        for weight, name in zip(alpha[p], OPERATIONS):
            height = 0.72 * width * weight
            axis.bar(left, height, 0.54 / space.positions, bottom, align="edge", alpha=fade,
                     color=COLOURS[name], zorder=2)
            bottom += height


def animate(figure, space: Space, steps, weights: Weights, frames: int = 80) -> FuncAnimation:
    """`draw_supernet` over time. steps: (T,); weights: numpy, a leading dimension T each."""
    axis = figure.subplots()
    chosen = np.unique(np.linspace(0, len(steps) - 1, frames).round().astype(int))
    chosen = np.append(chosen, [chosen[-1]] * (frames // 6))  # rest on the last picture

    def draw(t):
        axis.clear()
        now = Weights(*(level[t] for level in weights))
        draw_supernet(axis, space, now)
        exits, operations, widths = live_choices(Weights(*map(torch.from_numpy, now)))
        axis.set_title(f"step {steps[t]}: alive are {exits} of {len(space.nodes)} exits, "
                       f"{operations:.1f} operations and {widths:.1f} widths a choice", fontsize=11)
    return FuncAnimation(figure, draw, chosen, interval=100)


# --- 5. Our networks among published ones --------------------------------------------------------

# A row is a published network at one scale; results/README.md says what the columns mean.
FIELD = Path(__file__).parent / "results" / "field.csv"


def draw_field(axis, scale, ours, against="multiply-adds"):
    """PSNR-Y on Set5 against cost: the networks of field.csv in grey, ours as stars.

    ours: {name: (thousands of parameters, 1e9 multiply-adds, dB)}.
    against: "multiply-adds" or "parameters".
    """
    unit, name, place = {
        "parameters": ("thousands of parameters", "kparams", 0),
        "multiply-adds": ("multiply-adds (G) for a 1280x720 output", "gmacs", 1)}[against]
    with open(FIELD, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["scale"] == str(scale)]
    field = [(float(row[name]), float(row["Set5"]), row["name"]) for row in rows
             if row[name] and row["Set5"]]
    for i, (cost, quality, label) in enumerate(sorted(field)):
        axis.plot(cost, quality, "o", color="#999999", markersize=8)
        above_or_below = (0, (8, -16)[i % 2])  # neighbours take turns
        axis.annotate(label, (cost, quality), above_or_below, textcoords="offset points",
                      ha="center", fontsize=10)
    for label, numbers in ours.items():
        point = numbers[place], numbers[2]
        axis.plot(*point, "*", color="#D55E00", markersize=15)
        axis.annotate(label, point, (9, -4), textcoords="offset points", fontsize=10,
                      color="#D55E00")
    axis.margins(0.12)
    axis.set(xscale="log", xlabel=unit, ylabel="PSNR-Y (dB) on Set5", title=f"x{scale}")
    low, high = axis.get_xlim()
    ticks = [k * 10 ** e for e in range(5) for k in (1, 2, 5) if low < k * 10 ** e < high]
    axis.set_xticks(ticks, ticks)
    axis.minorticks_off()
