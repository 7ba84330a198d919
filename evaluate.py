"""How super-resolution is measured, and how a found network is used.

    python evaluate.py RUN --benchmark data/Set5 data/Set14   # a Markdown table for each
    python evaluate.py RUN --benchmark data                   # the same for every set below
    python evaluate.py RUN --upscale photo.jpg -o large.png   # your own picture, of any size
    python evaluate.py RUN --time                             # milliseconds for a 1280x720 output
    python evaluate.py RUN --export network.pt2               # one file, none of our code needed
    python evaluate.py RUN --export network.onnx              # the same for onnxruntime and others

RUN is a folder that search.py has written; all of this runs on a laptop's CPU. --benchmark also
leaves benchmark.json and crops_Set5.png, ... in RUN.

A method is scored by shrinking a photograph (HR) by a known rule, enlarging the small one (LR)
again, and comparing with the original. A tenth of a decibel counts as a result in this field, and
a slip in one of the conventions below can cost more than that, so here is every one of them:

LR       HR is cropped to a multiple of the scale and shrunk like MATLAB's `imresize`: bicubic, the
         kernel stretched by the scale against aliasing, the picture mirrored at its border. First
         the height, rounded to 8 bits; then the width, rounded again. `resize` gives MATLAB's own
         files to the last pixel. Other libraries' bicubics differ, most of all at the border.
result   rounded to 8 bits before it is scored, as a file would hold it.
luma     only brightness counts: Y of BT.601 in television's range, 16..235. In full range every
         error is 255/219 times as large, and every figure 1.32 dB lower.
border   `scale` pixels are cropped off each side: nobody knows what lies beyond the frame.
PSNR-Y   20 log10(255 / root mean square error), in dB; higher is better. A set's figure is the mean
         over its images.
SSIM     compares means, variances and covariance under an 11x11 Gaussian (sigma 1.5); 1 is best.
where    float64 numpy on the CPU. The network runs on the CPU too unless told otherwise: on a GPU
         the last digits differ, as it adds in another order and may round to 10 bits (TF32).

The floor is bicubic enlargement. This file gives, in dB (published tables agree within 0.01):

         x2      x3      x4
Set5    33.67   30.40   28.43
Set14   30.23   27.54   25.99
B100    29.56   27.21   25.96
"""
import argparse
import io
import json
import logging
import math
import os
import re
import stat
import sys
import tempfile
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

if "OMP_WAIT_POLICY" not in os.environ:  # OpenMP's threads spin while they wait for one another,
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # which starves a busy machine; so, not long

import matplotlib.cbook
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from tqdm import tqdm

from search_space import load_run, shown, time_network, write_whole

PHOTOS = ".png", ".jpg", ".jpeg", ".webp", ".bmp"
OUTPUTS = ".png", ".tif", ".tiff", ".jpg", ".jpeg"  # no WebP: no grey, at most 16383 pixels


# --- Bicubic -----------------------------------------------------------------------------------

def cubic(x):
    """Keys' interpolation kernel with a = -1/2: 1 at 0, 0 at every other integer, 0 beyond 2."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resize_rows(image, scale):
    """Resize the first axis only: uint8 (H, N) -> uint8 (ceil(H * scale), N).

    Every output row is a weighted sum of the input rows under a kernel around its centre, which for
    output row i is (i + 1/2) / scale - 1/2. With scale = p / q the pattern repeats: row i + p has
    the weights of row i, on input rows q further down. So p sets of weights are enough.
    """
    (height, _), (p, q) = image.shape, scale.as_integer_ratio()
    shrink = min(float(scale), 1.0)  # the kernel is widened by 1 / shrink
    centres = (np.arange(p)[:, None] + 0.5) * q / p - 0.5  # (p, 1)
    reach = math.ceil(2 / shrink)
    taps = np.floor(centres).astype(int) + np.arange(-reach, reach + 2)  # (p, taps)
    weights = cubic(shrink * (centres - taps))  # (p, taps)
    weights /= weights.sum(1, keepdims=True)  # a grey area stays as grey as it is
    used = (weights != 0).any(0)
    taps, weights = taps[:, used], weights[:, used]

    out = np.arange(math.ceil(height * scale))
    rows = taps[out % p] + q * (out // p)[:, None]  # (out, taps): which input rows
    rows %= 2 * height  # mirrored at the border: c b a | a b c | c b a
    rows = np.where(rows < height, rows, 2 * height - 1 - rows)
    result = np.empty((len(out), image.shape[1]), np.uint8)
    for part in np.array_split(out, math.ceil(result.size / 2**17)):  # as much as a cache holds
        total = np.full((len(part), image.shape[1]), 0.5)  # + 1/2: cutting the fraction then rounds
        for tap in range(taps.shape[1]):
            total += weights[part % p, tap, None] * image[rows[part, tap]]  # (part, N)
        result[part[0]:part[-1] + 1] = total.clip(0, 255)
    return result


def resize(image, scale):
    """MATLAB's bicubic `imresize`: uint8 (H, W) or (H, W, C), each side times scale, rounded up.

    scale: a Fraction, an int or a float above 0 (a float is taken for the nearest fraction with a
    denominator up to 1000). ValueError for another scale, another dtype, or an empty image.

    >>> resize(np.array([[0, 0, 200, 200]], np.uint8), 2)    # note the overshoot beside the edge
    array([[  0,   0,   0,  41, 159, 214, 205, 200],
           [  0,   0,   0,  41, 159, 214, 205, 200]], dtype=uint8)
    """
    scale = Fraction(scale).limit_denominator(1000) if math.isfinite(scale) else 0
    if scale <= 0:
        raise ValueError("resize: the scale must be a number above 0")
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.size == 0:
        raise ValueError(f"resize: expected a uint8 image (H, W) or (H, W, C), got {image.dtype} "
                         f"{image.shape}")
    for _ in range(2):  # the rows; then, transposed, the columns
        rows = resize_rows(image.reshape(len(image), -1), scale)
        image = np.ascontiguousarray(rows.reshape(-1, *image.shape[1:]).swapaxes(0, 1))
    return image


def crop_to(image, scale):
    """Cut the right and lower edge so that both sides are multiples of `scale`."""
    height, width = image.shape[:2]
    return image[:height - height % scale, :width - width % scale]


def degrade(hr, scale):
    """The LR image every benchmark starts from: (H, W, C) -> (H // scale, W // scale, C)."""
    return resize(crop_to(hr, scale), Fraction(1, scale))


# --- Metrics -----------------------------------------------------------------------------------

def luma(image):
    """Brightness as float64 (H, W): BT.601's Y, 16..235, of uint8 RGB (H, W, 3).

    A grey picture (H, W) is its own brightness.
    """
    if image.dtype != np.uint8:
        raise ValueError("only images of 8 bits are measured: round first, as a file would")
    if image.ndim == 2:
        return image.astype(np.float64)
    # Red, green, blue: green looks brightest. Together 219, so that white is 235.
    return image @ np.array([65.481, 128.553, 24.966]) / 255 + 16


def inner_luma(a, b, border):
    """The luma of both images without the border; ValueError where that leaves nothing."""
    if a.shape != b.shape:
        raise ValueError(f"images of different sizes cannot be compared: {a.shape} and {b.shape}")
    inside = np.s_[border:a.shape[0] - border, border:a.shape[1] - border]
    if min(a[inside].shape) < 1:
        raise ValueError(f"an image of {a.shape[1]}x{a.shape[0]} has nothing left inside a border "
                         f"of {border}")
    return luma(a)[inside], luma(b)[inside]


def psnr(a, b, border):
    """PSNR-Y in dB of two uint8 images of one shape, `border` pixels cropped off each side.

    inf where they are equal. One level of difference everywhere is 219/255 of a level of luma,
    which gives 20 log10(255 * 255 / 219):

    >>> black = np.zeros((32, 32, 3), np.uint8)
    >>> round(psnr(black, black + np.uint8(1), border=2), 3)
    49.453
    """
    a, b = inner_luma(a, b, border)
    error = np.mean((a - b)**2)
    return math.inf if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(a, b, border):
    """Structural similarity (Wang et al., 2004) of two uint8 images, on the same luma as `psnr`."""
    a, b = inner_luma(a, b, border)
    if min(a.shape) < 11:
        raise ValueError("SSIM's window needs 11 pixels inside the border")
    gauss = np.exp(-np.arange(-5, 6)**2 / (2 * 1.5**2))
    gauss /= gauss.sum()

    def mean(x):  # under the window: (H, W) -> (H - 10, W - 10)
        for _ in range(2):  # a Gaussian is separable: 11 rows, 11 columns
            x = sum(weight * x[k:len(x) - 10 + k] for k, weight in enumerate(gauss)).T
        return x

    mean_a, mean_b = mean(a), mean(b)
    # E[x^2] - E[x]^2 is a small difference of large numbers: one more reason for float64.
    variances = mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255)**2, (0.03 * 255)**2  # they keep flat regions from dividing 0 by 0
    # At every place two factors, each 1 where the windows agree: brightness; contrast and pattern.
    return float(np.mean((2 * mean_a * mean_b + c1) * (2 * covariance + c2)
                         / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))))


# --- A network on a picture, a set of pictures, against the clock ------------------------------

@torch.inference_mode()
def super_resolve(network, lr, tile=256):
    """uint8 RGB (H, W, 3) -> uint8 RGB (s H, s W, 3), on the device of the network's parameters.

    The picture is cut in tiles of `tile` x `tile` LR pixels, so memory does not grow with it. Each
    tile is computed with a margin of `architecture.radius` pixels, the farthest that an output
    pixel sees, and the margin's output is thrown away: what is left is what the whole picture would
    have given. At the picture's own border the margin ends, and the network pads as it would.
    """
    scale, margin = network.architecture.scale, network.architecture.radius
    device = next(network.parameters(), torch.empty(0)).device
    height, width = lr.shape[:2]
    result = np.empty((scale * height, scale * width, 3), np.uint8)
    tiles = [(top, left) for top in range(0, height, tile) for left in range(0, width, tile)]
    for top, left in tqdm(tiles, "tiles", leave=False, disable=None if len(tiles) > 8 else True):
        # From the margin's corner (y, x), or the picture's, to beyond the tile's lower right.
        y, x = max(0, top - margin), max(0, left - margin)
        bottom, right = min(height, top + tile), min(width, left + tile)
        patch = np.ascontiguousarray(lr[y:bottom + margin, x:right + margin])  # (h, w, 3)
        patch = torch.from_numpy(patch).to(device).permute(2, 0, 1)[None].float() / 255
        out = network(patch)[0].permute(1, 2, 0)  # (s h, s w, 3)
        out = out[scale * (top - y):scale * (bottom - y),
                  scale * (left - x):scale * (right - x)]  # without the margin
        out = (out.float().clamp(0, 1) * 255 + 0.5).to(torch.uint8)  # rounded
        result[scale * top:scale * bottom, scale * left:scale * right] = out.cpu().numpy()
    return result


def score(upscale, path, scale):
    """One photograph through a method: (HR, the method's result), both uint8, ready for `psnr`.

    upscale: from uint8 LR (h, w, 3) to uint8 (scale h, scale w, 3).
    """
    # The photograph is the answer; what the method gets to see is made from it.
    photo = open_photo(path)
    hr = crop_to(np.array(photo.convert("RGB")), scale)
    result = upscale(degrade(hr, scale))
    # Luma is for colours. What is grey on disk (Set14's `bridge`) is compared as it is.
    if photo.mode.startswith("L"):
        hr, result = (np.array(Image.fromarray(image).convert("L")) for image in (hr, result))
    return hr, result


def measure(upscale, photos, scale):
    """[(name, PSNR-Y, SSIM)] of a method over one set. upscale: as for `score`.

    photos: a set's folder, or a list of files as `sets_in` gives it. The LR images are made here,
    so no set needs to bring them; where one does, they are the same in every pixel.
    """
    rows = []
    photos = photos if isinstance(photos, list) else [*sets_in([photos], scale).values()][0]
    for path in tqdm(photos, desc=f"{photos[0].parent} x{scale}", leave=False, disable=None):
        hr, result = score(upscale, path, scale)
        rows.append((path.stem, psnr(hr, result, scale), ssim(hr, result, scale)))
    return rows


def compare_with_bicubic(network, title, photos):
    """A set through bicubic and the network: (Markdown table, {method: rows of `measure`})."""
    a = network.architecture
    # Bicubic first: what a network adds to it is what it is worth.
    rows = {"bicubic": measure(lambda lr: resize(lr, a.scale), photos, a.scale),
            "ours": measure(lambda lr: super_resolve(network, lr), photos, a.scale)}
    sizes = {"bicubic": "- | -",
             "ours": f"{a.parameters():,} | {a.multiply_adds() / 1e9:.2f} G"}
    lines = [f"### {title}", "",
             "| method | parameters | multiply-adds for a 1280x720 output | PSNR-Y (dB) | SSIM |",
             "|---|---:|---:|---:|---:|"]
    for name, each in rows.items():
        mean = means(each)
        lines.append(f"| {name} | {sizes[name]} | {mean['psnr']:.2f} | {mean['ssim']:.4f} |")
    return "\n".join(lines) + "\n", rows


def means(rows):
    """The figures of a set: {"psnr": dB, "ssim": ...}, from the rows of `measure`."""
    return dict(zip(("psnr", "ssim"), np.mean([row[1:] for row in rows], axis=0)))


# --- Photographs in ----------------------------------------------------------------------------

# Photographs (HR) often lie beside small copies of them (LR), and whoever takes these for
# photographs gets a wrong figure. Words in the names of folders and files tell versions apart.
LARGE = "hr", "highres", "original", "originals", "gt", "gtmod"  # of several the first is taken
SMALL = re.compile("lr(bi|bic|bd|dn|blur)?|bicubic|lowres|thumb(nail)?s?")
# (An x behind a letter belongs to the word, as in "mix2", unless that word is one of those above:
# hence their endings, for "LRbicx2".)
SCALE = re.compile(r"(?:image_)?srf_?([234])|(?:(?<![a-z])|(?<=lr|hr|gt|ic|bi|bd|dn|ur))"
                   r"x([2348])(?:[mdw]\d?)?(?![a-z0-9])", re.IGNORECASE)


def version(name):
    """A name without the words on versions; and what they say: a word of LARGE, "small" or None.

    >>> version("DIV2K_train_LR_bicubic"), version("img_001_SRF_2_HR"), version("0001x2")
    (('DIV2K_train', 'small'), ('img_001', 'hr'), ('0001', None))
    """
    rest, said = [], None
    for word in re.findall("[^ _-]+", SCALE.sub("", name)):
        kind = word.lower().rstrip("0123456789")  # GTmod12 is a gtmod
        if SMALL.fullmatch(kind):
            said = "small"
        elif kind in LARGE:
            said = said or kind
        else:
            rest.append(word)
    return "_".join(rest), said


class Photo(NamedTuple):
    """A picture file. Versions of one picture have `home` and `name` in common."""
    path: Path
    home: tuple  # names of the folders on the way to it, without words on versions
    name: str
    said: str | None  # see `version`: by its own name, or else by the nearest folder's
    rank: tuple  # the version with the least is taken


def as_photo(path, folder, scale):
    """What the names on the way from `folder` to a picture file say of it."""
    inside = path.relative_to(folder)
    names, says = zip(*map(version, [*inside.parts[:-1], path.stem]))
    said = next(filter(None, says[::-1]), None)
    scales = {digit for found in SCALE.findall(str(inside)) for digit in found if digit}
    rank = (bool(scales - {str(scale)}), LARGE.index(said) if said in LARGE else 0,
            path.with_suffix(""))
    # (Of a file's name an x behind any letter counts, for "babyx2" beside "baby".)
    bare = re.sub("[xX][2348]$", "", names[-1])
    name = bare or "".join(re.findall(r"\d+", path.stem))  # HR001, HR002 are two pictures
    return Photo(path, tuple(filter(None, names[:-1])), name, said, rank)


def find_photos(folder, scale):
    """What lies below a folder: (photographs, pictures passed over, number of other files).

    The first two are lists of Photo. ValueError if there is no photograph, or if one picture is a
    small copy of another and no name says so.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder" if str(folder) else
                         "the name of a folder is empty: is a variable unset?")
    folder, files = Path(folder), walk(folder)
    top = folder.resolve()
    own = [top.name] if version(top.name)[0] else [top.name, top.parent.name]  # X2 in LR_bicubic
    if any(version(name)[1] == "small" for name in own):
        raise ValueError(f"{folder} is by its name a folder of small copies (LR): pass the "
                         "photographs (HR), or call it something else")
    every = [as_photo(path, folder, scale) for path in files if path.suffix.lower() in PHOTOS]
    # 1. No small copies, and of several large versions the first.
    kept, best = [photo for photo in every if photo.said != "small"], {}
    for p in kept:
        best[p.home, p.name] = min(p.rank, best.get((p.home, p.name), p.rank))
    # (Side by side, tile_x2 and tile_x3 are two pictures, unless there is a tile or tile_HR, too.)
    kept = [p for p in kept if not p.said or p.rank == (first := best[p.home, p.name]) or
            p.path.parent == first[-1].parent and first[-1].name != p.name and
            not version(p.path.stem)[1]]
    # 2. Nothing that lies beside a folder HR, nor what others made of x beside x_HR.png.
    beside = {p.path.parents[1] for p in kept
              if p.path.parent != folder and version(p.path.parent.name) == ("", p.said)}
    made_of = [(p.path.parent, p.name) for p in kept if version(p.path.stem)[1]]
    kept = [p for p in kept if p.said or not (
        beside.intersection(p.path.parents) or
        any(p.path.parent == place and f"{p.name}_".startswith(f"{name}_")
            for place, name in made_of))]
    # 3. Copies that names do not tell apart: the same but for an ending, as a.png and a_small.png.
    alike = {}
    for p in kept:
        for name in {p.name, re.sub(r"[ _.-](?!\d+$)[^ _.-]+$", "", p.name)}:
            alike.setdefault(name.lower(), []).append(p)
    for group in alike.values():
        for small, large in permutations(group, 2) if len(group) < 50 else ():
            if not small.said and small in kept and is_small_copy(small.path, large.path):
                if not large.said:
                    here = small.path.parent == large.path.parent
                    raise ValueError(f"{small.path} is a small copy of {large.path}, and names do "
                                     "not say which pictures are the photographs: " +
                                     ("move these into a folder HR" if here else
                                      f"pass {large.path.parent}, or call it HR"))
                kept.remove(small)
    if every and not kept:
        raise ValueError(f"{folder} holds small copies (LR) alone, not the photographs (HR)")
    if not kept:
        raise ValueError(f"{folder} holds no usable photograph ({' '.join(PHOTOS)})")
    chosen = {photo.path for photo in kept}
    return kept, [p for p in every if p.path not in chosen], len(files) - len(every)


def printable(text):
    """Names of files may hold bytes that are no characters; these are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def to_stderr(line):
    print(printable(line), file=sys.stderr)


def walk(folder):
    """All files below a folder, sorted, but hidden ones. Links are followed, nowhere twice."""
    seen, files = set(), []
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__MACOSX")
        if os.path.realpath(root) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        files += [Path(root, name) for name in names if name[0] != "."]
    return sorted(files)


def is_small_copy(a, b):
    """Is the picture file a the picture file b, shrunk to a half, a third or a quarter?"""
    def size(path):
        with Image.open(path) as image:
            return np.array(image.size)

    def glance(path):  # 8 x 8 grey squares
        return np.asarray(Image.fromarray(read_photo(path)).convert("L").resize((8, 8), 4), float)
    try:
        ratios = [r for r in (2, 3, 4) if (abs(size(b) - r * size(a)) < r).all()]
        return bool(ratios) and np.abs(glance(a) - glance(b)).mean() < 12  # of 255
    except Exception:  # not to be read: named later
        return False


def sets_in(folders, scale):
    """The sets below some folders: {name: list of photographs that can be measured}.

    A set is a folder with pictures, or with folders of versions of them (Set5/HR, Set5/GTmod12).
    What is passed over is named on stderr. ValueError for a set without photographs.
    """
    sets = {}
    for folder in folders:
        photos, passed, _ = find_photos(folder, scale)
        if passed:
            to_stderr(f"passed over in {folder}: {in_words(passed)}")
        found = {}
        for photo in photos:
            found.setdefault(photo.home, []).append(photo.path)
        for home, paths in found.items():
            top = Path(folder).resolve()
            name = home[-1] if home else (version(top.name)[0] or top.parent.name)
            if name in sets:
                raise ValueError(f"two sets are called {name}, and so would be their figures and "
                                 "crops: measure them one by one")
            sets[name] = [path for path in paths if can_be_measured(path, scale)]
            if not sets[name]:
                raise ValueError(f"the set {name} in {folder} holds no usable photographs")
    return sets


def in_words(passed):
    """Pictures that were passed over, counted by folder."""
    counts = Counter(str(photo.path.parent) for photo in passed)
    places = ", ".join(f"{n} in {place}" for place, n in counts.items())
    return passed and f"small copies, or other versions of the photographs: {places}"


def can_be_measured(path, scale):
    """Is the file a picture whose PSNR and SSIM are numbers? Says on stderr why not."""
    least = 11 + 3 * scale  # SSIM's window and the border must fit
    try:
        image = open_photo(path)
        if min(image.size) < least:
            raise ValueError(f"{path} is too small to be measured at x{scale}: it needs {least} "
                             "pixels each way")
        if all(low == high for low, high in image.convert("RGB").getextrema()):
            raise ValueError(f"{path} is of one colour: enlarged without an error, its PSNR is no "
                             "number")
        return True
    except ValueError as error:
        to_stderr(f"skipped: {error}")
        return False


# Pillow refuses a picture of twice this size, and warns of one above it: no help, as phones make
# 200 megapixels.
Image.MAX_IMAGE_PIXELS = 2 ** 27
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
PngImagePlugin.MAX_TEXT_CHUNK = 2 ** 26  # bytes; a long text in a PNG does no harm


def open_photo(path):
    """A Pillow image in mode L, LA, RGB or RGBA, whatever the file holds, upright as its EXIF says.

    Values of 16 bits become 8: grey is divided by 257, of colours, and of grey with alpha, Pillow
    keeps the upper 8 bits.
    image.info has "deep": whether there were 16; "pictures": how many the file holds (this is the
    first); and "icc_profile", if there is one.
    ValueError if it cannot be read, or has more than 2^28 pixels: a small file may claim any size.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would keep us waiting
            raise ValueError("it is not a file")
        with Image.open(path) as image:
            # (A PNG or PGM in mode I has 16 bits; a TIFF really has 32.)
            if image.mode == "F" or image.mode == "I" and image.format == "TIFF":
                raise ValueError("its values have 32 bits, of unknown range: convert it to 8 bits "
                                 "first")
            raw = " ".join(str(tile[3]) for tile in image.tile)  # how the file stores its values
            info = dict(icc_profile=image.info.get("icc_profile"), deep=";16" in raw,
                        pictures=getattr(image, "n_frames", 1))
            clear = image.info.get("transparency")  # the value that stands for "nothing here"
            image.load()
            with suppress(Exception):  # a damaged remark does not spoil a sound picture
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):
                info["deep"], deep = True, np.asarray(image).astype(np.float64)
                image = Image.fromarray(np.uint8(np.clip(deep / 257 + 0.5, 0, 255)))
                if clear is not None:
                    image.putalpha(Image.fromarray(np.uint8(255 * (deep != clear))))
            elif info["deep"] and isinstance(clear, tuple):  # Pillow keeps the upper 8 bits
                image.info["transparency"] = tuple(value >> 8 for value in clear)
            if image.mode in ("CMYK", "LAB"):  # its profile describes inks, not our RGB values
                info["icc_profile"] = None
            grey = image.mode in ("1", "L", "LA", "La") or "LA;16" in raw
            image = image.convert(("L" if grey else "RGB") +
                                  ("A" if image.has_transparency_data else ""))
            image.info = info
            return image
    except Exception as error:  # damaged files make decoders raise anything
        reason = (getattr(error, "strerror", None) or " ".join(str(error).split())
                  or type(error).__name__)
        raise ValueError(f"cannot read {path} as a picture: {reason}") from error


def read_photo(path):
    """Any picture file as uint8 RGB (H, W, 3). Grey fills three channels; alpha is dropped."""
    return np.array(open_photo(path).convert("RGB"))


def sample_photo():
    """The file of a photograph that is on every machine with matplotlib: 512x600, no download."""
    return Path(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))


def load_photos(folder, scale, patch, seed, say=to_stderr):
    """Training pairs [(LR, HR)], uint8 (h, w, 3) and (scale h, scale w, 3), two or more.

    Of the photographs in `folder` (see `find_photos`) or, if that is None, of generated pictures
    (`dead_leaves`). say: called with a line for each file that cannot be read or is smaller than a
    patch, and with lines that count what is used and what not. ValueError if none is left.
    """
    def pair(source):
        try:
            hr = crop_to(read_photo(source) if isinstance(source, Path) else source, scale)
            if min(hr.shape[:2]) < scale * patch:
                raise ValueError(f"{source} is smaller than a patch of "
                                 f"{scale * patch}x{scale * patch}")
            return degrade(hr, scale), hr
        except (ValueError, OSError) as error:
            say(f"skipped: {error}")

    passed, others = [], 0
    if folder is None:
        rng = np.random.default_rng(seed)
        sources = [dead_leaves(max(256, scale * patch), rng) for _ in range(32)]
    else:
        photos, passed, others = find_photos(folder, scale)
        sources = [photo.path for photo in photos]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding and resizing leave Python's lock
        pairs = list(tqdm(pool.map(pair, sources), "photographs", len(sources), leave=False,
                          disable=None))
    pairs = [p for p in pairs if p is not None]
    if not pairs:
        raise ValueError(f"{folder} holds no usable photograph ({' '.join(PHOTOS)}; at least "
                         f"{scale * patch} pixels each way)")
    pixels = sum(hr.shape[0] * hr.shape[1] for _, hr in pairs)
    say((f"{len(pairs)} generated pictures, " if folder is None else
         f"{len(pairs)} photograph{'s'[:len(pairs) > 1]}, ") +
        f"{pixels / 1e6:.3g} megapixels" + (f", from {folder}" if folder else ""))
    if passed or others:
        say("passed over: " + "; ".join(filter(None, (
            in_words(passed), others and f"{others} files of other kinds"))))
    if len(pairs) == 1:  # a search wants two
        pairs = cut_in_two(pairs)
        if min(side for lr, _ in pairs for side in lr.shape[:2]) < patch:
            raise ValueError(f"{folder}: the only photograph is too small to be cut in two; add "
                             "one or lower --patch")
    return pairs


def cut_in_two(pairs):
    """The two halves of a single photograph, across its longer side."""
    (lr, hr), = pairs
    axis = int(lr.shape[1] > lr.shape[0])
    middle, scale = lr.shape[axis] // 2, hr.shape[0] // lr.shape[0]
    return list(zip(np.split(lr, [middle], axis), np.split(hr, [scale * middle], axis)))


def dead_leaves(size, rng):
    """A picture of random discs in front of one another, uint8 (size, size, 3).

    No photograph, yet with the edges and scales of one: radii follow a power law, so the picture
    looks alike at every scale (Lee, Mumford & Huang, Occlusion models for natural images, 2001).
    """
    canvas = Image.new("RGB", (2 * size, 2 * size))  # drawn twice as large, then averaged
    draw, count, low, high = ImageDraw.Draw(canvas), 6000, 4.0, float(size)
    radii = 1 / np.sqrt(rng.uniform(1 / high ** 2, 1 / low ** 2, count))  # density r^-3
    centres = rng.uniform(-0.1, 1.1, (count, 2)) * 2 * size
    colours = np.clip(rng.normal(0, 24, (count, 3)) + rng.uniform(0, 255, (count, 1)), 0, 255)
    for r, (x, y), colour in zip(radii, centres, colours.astype(int)):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(colour))
    return np.array(canvas.reduce(2))


# --- The command line --------------------------------------------------------------------------

def save_crops(path, photos, network, side=96):
    """A row per photograph: HR, bicubic, ours, cut out where bicubic and ours differ most.

    The figures above the crops are the whole picture's.
    """
    scale = network.architecture.scale
    figure = Figure(figsize=(9, 3.2 * len(photos)), layout="constrained")
    for photo, axes in zip(photos, figure.subplots(len(photos), 3, squeeze=False)):
        hr, a = score(lambda lr: resize(lr, scale), photo, scale)
        _, b = score(lambda lr: super_resolve(network, lr), photo, scale)
        edge, gap = min(side, *hr.shape[:2]), np.abs(luma(a) - luma(b))
        corners = [(y, x) for y in range(0, len(gap) - edge + 1, 8)
                   for x in range(0, gap.shape[1] - edge + 1, 8)]
        y, x = max(corners, key=lambda corner: gap[corner[0]:, corner[1]:][:edge, :edge].sum())
        titles = (photo.stem, f"bicubic, {psnr(hr, a, scale):.2f} dB",
                  f"ours, {psnr(hr, b, scale):.2f} dB")
        for axis, image, title in zip(axes, (hr, a, b), titles):
            axis.imshow(image[y:y + edge, x:x + edge], cmap="gray", vmin=0, vmax=255,
                        interpolation="nearest")
            axis.set_title(printable(title), parse_math=False)
            axis.axis("off")
    write_whole(path, figure.savefig)


def figures_in(report):
    """What a run's benchmark.json holds: {set: {method: means}}. ValueError if it is damaged."""
    try:
        return dict(json.loads(report.read_text())) if report.exists() else {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{report} is damaged; delete it to measure again") from error


def run_benchmark(network, run, folders):
    """Print a table per set; save the figures, and crops of the two photographs that gain most.

    Sets that were measured before stay in benchmark.json.
    """
    scale, report = network.architecture.scale, Path(run) / "benchmark.json"
    # What is damaged or missing, among all sets and their photographs, ends here, before the long
    # work.
    figures_in(report)
    for name, photos in sets_in(folders, scale).items():
        table, rows = compare_with_bicubic(network, f"{name}, x{scale}, {len(photos)} photographs",
                                           photos)
        figures = figures_in(report)  # anew: another process may have measured sets meanwhile
        figures[name] = {method: means(each) for method, each in rows.items()}
        gains = [ours[1] - floor[1] for ours, floor in zip(rows["ours"], rows["bicubic"])]
        best = [photos[k] for k in np.argsort(gains)[::-1][:2]]
        try:  # a folder that can only be read is no reason to lose the figures
            write_whole(report, json.dumps(figures, indent=1) + "\n")
            save_crops(Path(run) / f"crops_{name}.png", best, network)
        except (OSError, RuntimeError) as error:  # (matplotlib may miss LaTeX)
            why = (str(error) or type(error).__name__).splitlines()[0]
            to_stderr(f"note: figures or crops of {name} are not saved: {why}")
        print(table, flush=True)


def check_folder_of(output):
    """ValueError if nothing can be written beside `output`: better now than after the work."""
    try:
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise ValueError(f"cannot write into the folder {output.parent}: "
                         f"{error.strerror}") from None


def fill_under_alpha(image):
    """Spread the visible colours of an LA or RGBA picture under its fully transparent pixels.

    Nobody sees what colour is there, but a network does, and would let it leak into the rim of what
    is visible. Half the size, where visible pixels alone count, is filled in the same way, and
    enlarged wherever this size has nothing.
    """
    alpha = image.getchannel("A").point(lambda a: 255 * (a > 0))
    if alpha.getextrema() != (0, 255):  # nothing to fill, or nothing to fill it with
        return image
    image = image.copy()
    image.putalpha(alpha)
    larger = fill_under_alpha(image.reduce(2)).resize(image.size, Image.Resampling.BILINEAR)
    return Image.composite(image, larger, alpha)


def run_upscale(network, photo, output):
    """Enlarge a picture file: grey stays grey, alpha (by bicubic) and colour profile are kept.

    Whatever forbids it is found before the work.
    """
    output, suffix = Path(output), Path(output).suffix.lower()
    if os.path.isdir(photo):
        raise ValueError(f"{photo} is a folder: --upscale takes one picture at a time")
    image, scale, jpeg = open_photo(photo), network.architecture.scale, suffix in (".jpg", ".jpeg")
    if suffix not in OUTPUTS:
        raise ValueError(f"{output} must end in one of {' '.join(OUTPUTS)}")
    check_folder_of(output)
    if output.is_dir() or output.exists() and os.path.samefile(photo, output):
        raise ValueError(f"{output} is {'a folder' if output.is_dir() else 'the input itself'}: "
                         "choose another name")
    if image.mode.endswith("A") and jpeg:
        raise ValueError(f"{photo} has an alpha channel, which {suffix} cannot hold: write a .png")
    if scale * max(image.size) > 65500 and jpeg:
        raise ValueError(f"the result has {scale * image.width}x{scale * image.height} pixels, and "
                         f"{suffix} holds 65500 each way: write a .png")
    if image.info["deep"]:
        print(f"note: {photo} has 16 bits per value; it is scaled to 8, and so is the result")
    if image.info["pictures"] > 1:
        print(f"note: {photo} holds {image.info['pictures']} pictures; only the first is enlarged")
    mode, profile, alpha = image.mode, image.info["icc_profile"], None
    if mode.endswith("A"):
        alpha = Image.fromarray(resize(np.array(image.getchannel("A")), scale))
        image = fill_under_alpha(image)
    rgb = np.array(image.convert("RGB"))
    grey = all((rgb[..., 0] == rgb[..., k]).all() for k in (1, 2))  # also if stored as colour
    # Tiles of 512 pixels of the *result*: a cell at full size needs the same memory at every scale.
    result = Image.fromarray(super_resolve(network, rgb, tile=512 // scale))
    if grey:
        result = result.convert("L")
    result = result.convert(mode.removesuffix("A"))
    if alpha:
        result.putalpha(alpha)
    # quality, subsampling: of JPEG; 0 is colour at full resolution.
    write_whole(output, lambda path: result.save(path, quality=95, subsampling=0,
                                                 icc_profile=profile))
    print(f"{output}: {result.width}x{result.height}, {result.mode}")


def run_time(network, device):
    took, macs = time_network(network, device), network.architecture.multiply_adds()
    kind = (f"{torch.get_num_threads()} threads, float32" if torch.device(device).type == "cpu"
            else "float32 or TF32")
    print(f"{took:.4g} ms for a 1280x720 output, {macs / 1e9:.4g}G multiply-adds: "
          f"{macs / took / 1e6:.3g}G a second ({device}, {kind}, median)")


def run_export(network, path):
    """Write the network as one file, of torch (.pt2) or ONNX, and check the file against it.

    It takes float RGB (B, 3, h, w) in [0, 1], with any B, h and w, and gives
    (B, 3, scale h, scale w), not clipped. To enlarge uint8 RGB `pixels` (h, w, 3) with it:

        x = np.float32(pixels).transpose(2, 0, 1)[None] / 255
        y = torch.export.load("x2.pt2").module()(torch.from_numpy(x)).detach().numpy()  # either
        y, = onnxruntime.InferenceSession("x2.onnx").run(None, {"lr": x})               # or
        large = (y[0].clip(0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)  # (s h, s w, 3)
    """
    if path.suffix not in EXPORTS:
        raise ValueError(f"{path} must end in .pt2 (torch.export's own format) or .onnx")
    check_folder_of(path)
    content, again = EXPORTS[path.suffix](network, torch.rand(2, 3, 24, 32))
    difference = 0.0
    with torch.inference_mode():
        for shape in ((1, 3, 17, 40), (3, 3, 64, 31)) if again else ():  # sizes it never saw
            image = torch.rand(shape)
            difference = max(difference, (again(image) - network(image)).abs().max().item())
    if difference > 1e-4:
        raise ValueError("what was exported computes something else than the network "
                         f"(largest difference {difference:.1e}): {path} is not written")
    write_whole(path, lambda temporary: temporary.write_bytes(content))
    print(f"{path}: {len(content) / 1e3:.0f} kB; " + (
        f"loaded again, largest difference {difference:.1e}" if again else
        "not compared with the network, as onnxruntime is not installed"))


def as_pt2(network, example):
    """(the file's bytes, what it computes as a function)"""
    free, buffer = torch.export.Dim.AUTO, io.BytesIO()  # by way of memory, as in `save_tensors`
    torch.export.save(torch.export.export(network, (example,), dynamic_shapes=(
        {0: free, 2: free, 3: free},)), buffer)
    return buffer.getvalue(), torch.export.load(io.BytesIO(buffer.getvalue())).module()


def as_onnx(network, example):
    """The same; the function is None where there is no onnxruntime."""
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch's exporter wants it)
    except ImportError:
        raise ValueError("a .onnx needs two more packages: pip install onnx onnxscript") from None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, we do not
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(network, (example,), dynamo=True, verbose=False,
                                    input_names=["lr"], output_names=["sr"],
                                    dynamic_shapes=({0: "batch", 2: "height", 3: "width"},))
    model = program.model_proto
    onnx.helper.set_model_props(model, dict(
        scale=str(network.architecture.scale), input="RGB, planes first, uint8 / 255: 0 to 1",
        output="the same, not clipped: clip to 0..1, times 255, round, to uint8"))
    content = model.SerializeToString()
    try:
        from onnxruntime import InferenceSession
    except ImportError:
        return content, None
    session = InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda x: torch.from_numpy(session.run(None, {"lr": x.numpy()})[0])


EXPORTS = {".pt2": as_pt2, ".onnx": as_onnx}


class CommandLine(argparse.ArgumentParser):
    """Mistakes are one line, with status 2 and without the usage."""
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).splitlines())}\n")

    @contextmanager
    def guard(self, advice="", kept=str):
        """Around the work: what goes wrong there is one line, too.

        advice: what to do where memory is used up. kept(): what a failing disk has left us.
        """
        with shown():
            try:
                yield
            except BrokenPipeError:
                raise  # nobody reads on: see `shown`
            except OSError as error:  # a full disk, a vanished folder
                self.error(f"{error}{kept()}")
            except ValueError as error:
                self.error(error)
            except (MemoryError, RuntimeError) as error:
                self.error(out_of_memory(error) + advice)
            except KeyboardInterrupt:  # Ctrl-C; a run of search.py has more to say, and says it
                self.exit(130, "interrupted\n")


def named(text):
    """A type for argparse: the name of a file or folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty: is a variable unset?")
    return text


def checked(read, fits, what: str):
    """A type for argparse: read(text) if it `fits`, else one line that says what was wanted."""
    def convert(text):
        try:
            value = read(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value
    return convert


whole = checked(int, lambda n: 0 <= n < 1e9, "a whole number up to 999999999")
positive = checked(int, lambda n: 0 < n < 1e9, "a positive whole number up to 999999999")


def usable(name):
    """The torch.device called `name`, made the current one; ValueError if it does not work here."""
    try:
        device = torch.empty(1, device=name).device
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        if device.type == "cuda":
            torch.cuda.set_device(device)  # timers and generators mean the current one
        return device
    except (RuntimeError, AssertionError) as error:  # Assertion: a torch without CUDA
        why = str(error).splitlines()[0]
        raise ValueError(f"--device {name} does not work here: {why}") from None


def emulates_bfloat16(name):
    """Is bfloat16 slower than float32 on this device? On GPUs before Ampere, on many laptops' CPUs.

    (Of a CPU only a private function of torch knows; one that emulates takes ten times as long.)
    """
    if name.startswith("cuda"):
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    return not (torch.backends.mkldnn.is_available()
                and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def note_bfloat16(settings):
    """Tell whoever asks for bfloat16 where it is only emulated; settings: of search.py."""
    if settings.bfloat16 and emulates_bfloat16(settings.device):
        print(f"note: this {settings.device} only emulates bfloat16, far slower than without "
              "--bfloat16", file=sys.stderr)


def is_out_of_memory(error):
    """Does this error say that memory is used up, on any device?"""
    said = "out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED"
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or any(words in str(error) for words in said))


def out_of_memory(error):
    """One line for an error that says that memory is used up; raises every other error again."""
    if not is_out_of_memory(error):
        raise error
    return f"out of memory: {' '.join(str(error).split())[:200]}"


def main(argv=None):
    parser = CommandLine(prog="evaluate.py", description="Measure a found network, or use it.")
    add = parser.add_argument
    add("run", type=named, metavar="RUN",
        help="folder written by search.py (architecture.json, network.pt)")
    add("-o", "--output", type=named, metavar="FILE",
        help=f"where --upscale writes ({' '.join(OUTPUTS)})")
    add("--device", default="cpu", help="where it runs (default: cpu, for figures that repeat)")
    task = parser.add_mutually_exclusive_group(required=True).add_argument
    task("--benchmark", type=named, nargs="+", metavar="DIR",
         help="sets: pictures in DIR, DIR/HR (or GT, ...) or DIR/*/HR")
    task("--upscale", type=named, metavar="PHOTO", help="picture to enlarge")
    task("--time", action="store_true", help="time the network for a 1280x720 output")
    task("--export", type=named, metavar="FILE",
         help="write it for any picture size, with torch.export (.pt2) or as .onnx")
    args = parser.parse_args(argv)
    if (args.upscale is None) != (args.output is None):
        parser.error("--upscale PHOTO and -o FILE go together")
    if args.device != "cpu" and args.export is not None:
        parser.error("--device is for --benchmark, --upscale and --time")
    with parser.guard():
        if os.path.isfile(args.run):
            raise ValueError(f"{args.run} is a file: RUN is the folder that search.py wrote, "
                             f"{os.path.dirname(args.run) or '.'}")
        network = load_run(args.run).to(usable(args.device))
        if args.benchmark:
            run_benchmark(network, args.run, args.benchmark)
        elif args.time:
            run_time(network, args.device)
        elif args.export is not None:
            run_export(network, Path(args.export))
        else:
            run_upscale(network, args.upscale, args.output)


if __name__ == "__main__":
    main()
