"""What only the notebooks draw. They import this file; the modules can be read without it.

    notebook   functions
    1 and 6    draw_triangle, draw_map    a map from three logits to three weights
    2          draw_tree                  the tree of all paths
    3 and 4    draw_supernet, animate     all three levels, at one moment and over time
    5          draw_field                 our networks among published ones

All of them draw on a matplotlib axis that they are handed; only `animate` writes a file.
Pictures of a run's results (`draw_architecture`, `draw_levels`) are in the modules.
"""
import csv
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.transforms import Bbox
from PIL import Image

from search_space import COLOURS, OPERATIONS, OUTPUT_PIXELS, Architecture, Space, cells_on
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


SHADES = {3: "#A6A6A6", 2: "#CFCFCF", 1: "#F2F2F2"}  # of the plane: how many candidates survive


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
    axis.imshow(alive.numpy(), origin="lower", extent=(-reach, reach, -reach, reach),
                cmap=ListedColormap([SHADES[n] for n in (1, 2, 3)]), vmin=0.5, vmax=3.5)
    threads = torch.stack([points, images], 1)  # (points, 2 ends, 2)
    axis.plot(*threads.permute(2, 1, 0).numpy(), color="#56B4E9", linewidth=0.6, alpha=0.8)
    axis.plot(*images.T.numpy(), "o", color="#0072B2", markersize=3)
    draw_triangle(axis, ball)
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach))
    axis.legend(handles=[Patch(color=SHADES[n], label=f"{n} survive{'s' * (n == 1)}")
                         for n in (3, 2, 1)], loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3,
                fontsize=11, handlelength=1, columnspacing=1)


# --- 2. The tree of paths ------------------------------------------------------------------------

# What works on a picture that is so many times larger than LR, each way.
TINTS = {1: "white", 2: "#FFF3C4", 3: "#FFF3C4", 4: "#FFE08A"}


def tree_layout(space: Space) -> dict[str, tuple[float, float]]:
    """Where to draw each node: x is its depth, the root's is 1; y such that no branches cross."""
    leaves = {leaf: float(-i) for i, leaf in enumerate(space.leaves)}

    def height(node):
        below = [height(child) for child in space.nodes if child[:-1] == node]
        return sum(below) / len(below) if below else leaves[node]
    return {node: (len(node), height(node)) for node in space.nodes}


def draw_tree(axis, space: Space):
    """The path tree. A circle is an exit, and filled where it works on a larger picture than LR.

    A line is as thick as what it leads to costs, the mean over all choices. In a small tree this
    is written on it, for a 1280x720 output.
    """
    full = [space.channels]  # a cell begins and ends at full width
    sides = [full, *[space.widths] * (space.positions - 1), full]
    cell = sum(np.mean([operation.weights(c, d) for operation in OPERATIONS.values()
                        for c in before for d in after]) for before, after in pairwise(sides))
    weights = {"c": cell, "u": 9 * space.channels ** 2}  # each used per pixel
    places, lr_pixels = tree_layout(space), OUTPUT_PIXELS // space.scale ** 2
    for node, (x, y) in places.items():
        m = space.magnification(node)
        cost = weights[node[-1]] * lr_pixels * m ** 2 / 1e9
        x0, y0 = places.get(node[:-1], (0, y))  # the parent's
        colour = COLOURS["residual"] if node[-1] == "c" else COLOURS["up"]
        axis.plot([x0, x], [y0, y], color=colour, linewidth=0.5 + 0.25 * cost,
                  solid_capstyle="butt", zorder=1)
        if len(space.nodes) < 20:
            axis.annotate(f"{cost:.3g}G", ((x0 + x) / 2, (y0 + y) / 2), ha="center", va="center",
                          backgroundcolor="white", fontsize=12)
        axis.plot(x, y, "o", markersize=15, color=TINTS[m], markeredgecolor=colour,
                  markeredgewidth=1.5, zorder=2)
        axis.annotate(node[-1], (x, y), ha="center", va="center_baseline", fontsize=12)
    axis.legend(handles=[Patch(facecolor=TINTS[m], edgecolor="black", label=(
        f"works on {m * m} times the pixels" if m > 1 else "works on LR pixels"))
        for m in sorted(set(map(space.magnification, space.nodes)))], loc="lower left", fontsize=12)
    axis.set_axis_off()


# --- 3 and 4. The supernet -----------------------------------------------------------------------

def pale(colour, strength):
    """The colour mixed with white: strength 1 leaves it as it is, 0 is white."""
    return 1 - strength * (1 - np.array(to_rgb(colour)))


def draw_supernet(axis, space: Space, weights: Weights, only: str | None = None):
    """All three levels at one moment. weights: tensors or numpy arrays. only: draw just this path.

    Network: a line is as thick, and a cell as dark, as the weight of all exits behind it; a ring's
    size is an exit's own weight. Tinted is what works on a picture larger than LR.
    Cell: a row of columns, one per position, coloured in proportion to the operations' weights.
    Kernel: a column is as tall as the expected width behind it.
    """
    gamma, alpha, beta = (np.asarray(w) for w in weights)
    places, exits = tree_layout(space), dict(zip(space.nodes, gamma))
    for node, (x, y) in places.items():
        if only and not only.startswith(node):
            continue
        behind = sum(weight for exit, weight in exits.items() if exit.startswith(node))
        x0, y0 = places.get(node[:-1], (0, y))  # the parent's
        axis.plot([x0, x], [y0, y], color="black", linewidth=6 * behind, zorder=1,
                  solid_capstyle="butt")
        if behind == 0:
            axis.plot([x0, x], [y0, y], color="#BBBBBB", linewidth=0.5, zorder=0)
        if (m := space.magnification(node)) > 1:
            axis.bar(x + 0.05, 0.92, 0.96, y - 0.46, color=TINTS[m], zorder=-1)
        strength = 0.12 + 0.88 * min(1, 2 * behind)
        if node[-1] == "u":
            axis.bar(x, 0.44, 0.3, y - 0.22, color=pale(COLOURS["up"], strength), zorder=2)
        else:
            c = space.cell_of[node]
            draw_cell(axis, x, y, space, alpha[c], beta[c], strength)
        if exits[node] > 0:
            axis.plot(x + 0.42, y, "o", markersize=3 + 9 * exits[node], markerfacecolor="white",
                      markeredgecolor="black", zorder=3)
    axis.set_xlim(-0.1, max(map(len, space.nodes)) + 0.6)
    axis.set_ylim(1 - len(space.leaves) - 0.6, 0.6)
    axis.set_axis_off()


def explain_supernet(figure, space: Space, columns: int):
    """The legend of `draw_supernet`, below all of a figure's axes. columns: of the legend."""
    handles = [Patch(color=COLOURS[name], label=name) for name in (*OPERATIONS, "up")]
    handles += [Line2D([], [], marker="o", linestyle="", color="white", markeredgecolor="black",
                       markersize=9, label="exit")]
    handles += [Patch(color=TINTS[m], label=f"behind an upsampling: {m * m} times the pixels")
                for m in sorted(set(map(space.magnification, space.nodes)) - {1})]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False,
                  fontsize=12, columnspacing=1.5, handlelength=1.5)


def draw_cell(axis, x, y, space: Space, alpha, beta, strength):
    """One cell around (x, y). alpha: (positions, operations); beta: (positions - 1, widths)."""
    # The expected width behind each position, as a part of the full one, which a cell ends in.
    widths = [*(beta @ np.array(space.widths) / space.channels), 1.0]
    for p, width in enumerate(widths):
        left, bottom = x - 0.3 + 0.6 * p / space.positions, y - 0.36 * width
        for weight, name in zip(alpha[p], OPERATIONS):
            height = 0.72 * width * weight
            axis.bar(left, height, 0.54 / space.positions, bottom, align="edge",
                     color=pale(COLOURS[name], strength), zorder=2)
            bottom += height


def certain(space: Space, found: Architecture) -> Weights:
    """The weights that leave nothing but `found`: 1 for what it has chosen, else 0. (numpy)"""
    cells, operations = len(space.cell_of), list(OPERATIONS)
    weights = Weights(np.zeros(len(space.nodes)),
                      np.zeros((cells, space.positions, len(operations))),
                      np.zeros((cells, space.positions - 1, len(space.widths))))
    weights.gamma[space.nodes.index(found.path)] = 1
    for node, names, widths in zip(cells_on(found.path), found.operations, found.widths):
        c = space.cell_of[node]
        weights.alpha[c, range(len(names)), [operations.index(name) for name in names]] = 1
        weights.beta[c, range(len(widths)), [space.widths.index(width) for width in widths]] = 1
    return weights


def animate(path, space: Space, steps, weights: Weights, found: Architecture, frames: int = 40,
            dpi: int = 120):
    """Write `draw_supernet` over time as a GIF, which ends on the network that was found.

    steps: (T,); weights: numpy, a leading dimension T each. dpi: 120 gives 1020x552 pixels.
    """
    figure = Figure(figsize=(8.5, 4.6), dpi=dpi, layout="constrained")
    canvas, axis, pictures = FigureCanvasAgg(figure), figure.subplots(), []
    explain_supernet(figure, space, columns=4)

    def shoot(title, *what):
        axis.clear()
        draw_supernet(axis, space, *what)
        axis.set_title(title, fontsize=13)
        canvas.draw()
        pictures.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    for t in np.unique(np.linspace(0, len(steps) - 1, frames).round().astype(int)):
        now = Weights(*(level[t] for level in weights))
        exits, operations, widths = live_choices(Weights(*map(torch.from_numpy, now)))
        shoot(f"step {steps[t]}: alive are {exits} of {len(space.nodes)} exits, {operations:.1f} "
              f"operations and {widths:.1f} widths a choice", now)
    shoot(f"the network that was found: path {found.path}, {found.multiply_adds() / 1e9:.1f}G "
          "multiply-adds", certain(space, found), found.path)
    # One palette of 64 colours for all, so that what does not change need not be stored again.
    some = np.concatenate([*map(np.asarray, pictures[::max(1, frames // 5)]), pictures[-1]])
    palette = Image.fromarray(some).quantize(64, Image.Quantize.MAXCOVERAGE)
    first, *others = (each.quantize(palette=palette, dither=Image.Dither.NONE)
                      for each in pictures)
    first.save(path, save_all=True, append_images=others, loop=0,
               duration=[120] * len(others) + [4000])


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
    points = [(float(row[name]), float(row["Set5"]), row["name"], "#666666") for row in rows
              if row[name] and row["Set5"]]
    points += [(each[place], each[2], label, "#D55E00") for label, each in ours.items()]
    for cost, quality, _, colour in points:
        star = colour == "#D55E00"
        axis.plot(cost, quality, "*" if star else "o", color=colour, markersize=15 if star else 8)
    axis.margins(0.16)
    axis.set(xscale="log", xlabel=unit, ylabel="PSNR-Y (dB) on Set5", title=f"x{scale}")
    low, high = axis.get_xlim()
    ticks = [k * 10 ** e for e in range(5) for k in (1, 2, 5) if low < k * 10 ** e < high]
    axis.set_xticks(ticks, ticks)
    axis.minorticks_off()
    place_labels(axis, points)


def place_labels(axis, points):
    """Write a label beside each point (x, y, label, colour), where it covers the least.

    One after the other takes the first of its places that touches no point and no label before it,
    or else the one that touches the fewest.
    """
    axis.figure.canvas.draw()  # (only a drawn figure knows how large a text is)
    spots = [Bbox.from_bounds(*(axis.transData.transform(p[:2]) - 6), 12, 12) for p in points]
    taken = [axis.get_window_extent().frozen()]
    for x, y, label, colour in points:
        best = None
        for dx, dy in ((0, 8), (0, -20), (9, -6), (-9, -6), (9, 8), (-9, 8), (9, -20), (-9, -20),
                       (0, 22), (0, -34), (12, 20), (-12, 20), (12, -32), (-12, -32)):
            text = axis.annotate(label, (x, y), (dx, dy), textcoords="offset points", fontsize=11,
                                 ha=("left", "center", "right")[1 - np.sign(dx)], color=colour)
            box = text.get_window_extent().padded(1)
            covers = sum(box.overlaps(other) for other in spots + taken[1:])
            covers += not all(taken[0].contains(*corner) for corner in (box.min, box.max))
            if best is None or covers < best[0]:
                if best:
                    best[1].remove()
                best = covers, text, box
            else:
                text.remove()
        taken.append(best[2])
