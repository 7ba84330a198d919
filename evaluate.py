"""How super-resolution is measured, and used.

A method is scored by shrinking a photograph (HR) by a known rule, enlarging the small one (LR) again, and comparing with
the original. A tenth of a decibel counts as a result in this field, and a slip in one of the conventions below can cost
more than that, so all of them are spelled out:

LR       HR cropped to a multiple of the scale, then MATLAB's `imresize`: a bicubic whose kernel is widened by the scale
         (so that it does not alias), mirrored border, rows first, rounded to 8 bits, then columns, rounded again. `resize`
         gives MATLAB's own files to the last pixel. Other libraries' bicubics differ, most of all at the border.
result   rounded to 8 bits before it is scored, as a file would hold it.
luma     only the brightness Y of BT.601 counts, in television's range 16..235. In full range every error is 255/219 times
         as large, and every figure 1.32 dB lower. A picture that is grey on disk (Set14's `bridge`) keeps its raw values.
border   `scale` pixels are cropped off each side: nobody knows what lies beyond the frame.
PSNR-Y   20 log10(255 / root mean square error), in dB, higher is better. A set's figure is the mean over its images.
SSIM     compares local means, variances and covariance under an 11x11 Gaussian (sigma 1.5) where it fits; 1 is best.
where    float64 numpy on the CPU. The network too runs on the CPU unless told otherwise: a GPU adds in another order, and
         rounds what it multiplies to 10 bits (TF32), and that shows in a figure's last digits.

The floor is bicubic enlargement. This file gives, in dB (published tables agree within 0.01):

         x2      x3      x4
Set5    33.67   30.40   28.43
Set14   30.23   27.54   25.99
B100    29.56   27.21   25.96

Commands, all of them for a laptop's CPU (RUN is a folder that search.py has written):

    python evaluate.py RUN --benchmark data/Set5 data/Set14   # a Markdown table for each; also benchmark.json
                                                              # and crops_Set5.png, ... in RUN
    python evaluate.py RUN --benchmark data                   # the same for all sets in data (data/Set5/HR, ...)
    python evaluate.py RUN --upscale photo.jpg -o large.png   # enlarge your own picture, of any size
    python evaluate.py RUN --time                             # milliseconds for a 1280x720 output, on this machine
    python evaluate.py RUN --export network.pt2               # for torch.export.load: one file, no code of ours needed
    python evaluate.py --compare RUN RUN RUN ...              # activations over seeds: a table and comparison.png
"""

import argparse
import io
import json
import math
import os
import stat
import sys
import warnings
import zipfile
from fractions import Fraction
from pathlib import Path

import matplotlib.cbook
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from tqdm import tqdm

from search_space import Architecture, Network, features, milliseconds

PHOTOS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
OUTPUTS = (".png", ".tif", ".tiff", ".jpg", ".jpeg")       # no WebP: it has no grey, and ends at 16383 pixels


warnings.simplefilter("ignore", Image.DecompressionBombWarning)      # `open_photo` refuses them itself


# --- Pictures in and out ----------------------------------------------------------------------------------------------
def list_photos(folder):
    """All photographs below a folder, sorted. Links to folders are not followed, as they could lead round in a loop."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder")
    return sorted(Path(root, name) for root, _, names in os.walk(folder)
                  for name in names if name.lower().endswith(PHOTOS))


def printable(path):
    """A path as text that any terminal takes: file names may hold bytes that are no characters."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def open_photo(path):
    """A Pillow image in mode L, LA, RGB or RGBA, whatever the file holds, turned upright as its EXIF tag says.

    Values of 16 bits become 8 (65535 / 257 = 255), and `image.info["deep"]` tells. ValueError if it cannot be read, or
    has more than 89 million pixels: a small file may claim any size.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):   # a pipe would keep us waiting
            raise ValueError("it is not a file")
        with Image.open(path) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"it claims {image.width}x{image.height} pixels, more than {Image.MAX_IMAGE_PIXELS:,}")
            deep = image.mode.startswith("I") or any(";16" in str(tile[3]) for tile in image.tile)
            if image.mode == "F" or image.mode == "I" and image.format == "TIFF":      # (a PNG or PGM in mode I has 16 bits)
                raise ValueError("its values have 32 bits, of unknown range: convert it to 8 bits first")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                image = Image.fromarray(np.uint8(np.clip(np.asarray(image, np.float64) / 257 + 0.5, 0, 255)))
            if image.mode in ("CMYK", "LAB"):
                image.info.pop("icc_profile", None)   # it describes the inks, not the RGB values we go on with
            mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
            image = image.convert(mode + "A" if image.has_transparency_data else mode)
            image.info["deep"] = deep
            return image
    except Exception as error:                        # damaged files make decoders raise nearly anything
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot read {printable(path)} as a picture: {reason}") from error


def read_photo(path):
    """Any picture file as uint8 RGB (H, W, 3). Grey fills all three channels; alpha is dropped, not blended."""
    return np.array(open_photo(path).convert("RGB"))


def sample_photo():
    """A photograph that is on every machine with matplotlib: (600, 512, 3), for measuring without a download."""
    return read_photo(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))


def usable(name):
    """The torch.device called `name`, made the current one; ValueError if it does not work here."""
    try:
        device = torch.empty(1, device=name).device
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        if device.type == "cuda":
            torch.cuda.set_device(device)             # timers and random generators mean the current one
        return device
    except (RuntimeError, AssertionError) as error:   # Assertion: a torch without CUDA
        raise ValueError(f"--device {name} does not work here: {str(error).splitlines()[0]}") from None


def is_out_of_memory(error):
    """Does this error say that memory is used up, on any device?"""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error) or "not enough memory" in str(error)


def out_of_memory(error):
    """One line for an error that says that memory is used up; raises every other error again."""
    if not is_out_of_memory(error):
        raise error
    return f"out of memory: {' '.join(str(error).split())[:200]}"


def check_folder_of(output):
    """ValueError if there is no folder to write `output` into: better before the work than after it."""
    if not output.parent.is_dir():
        raise ValueError(f"there is no folder {output.parent} to write into: make it first")


def write_whole(path, save, keep=None):
    """Call `save(temporary path)`, then move the file into place: `path` is written whole or not at all.

    keep: the name under which the file that was there before is kept. At any moment one of the two is whole.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        save(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())                   # on the disk before it takes the name: a power cut finds one or the other
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(state, path):
    """torch.save by way of memory, so that a full disk is an OSError (torch's own writer raises whatever)."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    Path(path).write_bytes(buffer.getbuffer())


def load_tensors(path, device="cpu"):
    """What `save_tensors` wrote. Raises for anything else, be it made to harm: ValueError, or what torch raises.

    weights_only: no code in the file is run. Nothing is compressed in an honest one, so it cannot swell in memory.
    """
    with zipfile.ZipFile(path) as file:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
            raise ValueError(f"{path} was not written by this program: it is compressed")
    tensors = torch.load(path, map_location=device, weights_only=True)
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} was not written by this program: it holds a {type(tensors).__name__}")
    return tensors


# --- Bicubic ----------------------------------------------------------------------------------------------------------
def cubic(x):
    """Keys' interpolation kernel with a = -1/2: 1 at 0, 0 at every other integer, 0 beyond 2."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resize_rows(image, scale):
    """Resize the first axis only: uint8 (H, N) -> uint8 (ceil(H * scale), N).

    Let scale = p / q. The centre of output row i lies at (i + 1/2) q/p - 1/2 in the input, so rows i and i + p see the
    same pattern, q input rows apart. There are only p patterns of weights, and each weight multiplies a strided *slice*
    of the input: no index arrays, and numpy lets other threads run meanwhile.
    """
    p, q = scale.numerator, scale.denominator
    height = math.ceil(image.shape[0] * scale)
    shrink = min(float(scale), 1.0)                   # the kernel is widened by 1 / shrink
    patterns = []                                     # (input rows, their weights) of output rows 0 .. p-1
    for row in range(min(p, height)):
        centre = (row + 0.5) * q / p - 0.5
        taps = np.arange(math.floor(centre - 2 / shrink), math.ceil(centre + 2 / shrink) + 1)
        weights = cubic(shrink * (centre - taps))
        live = weights != 0
        patterns.append((taps[live], weights[live] / weights.sum()))

    groups = math.ceil(height / p)                    # a group: p output rows, made around q input rows
    first = min(taps[0] for taps, _ in patterns)
    last = max(taps[-1] for taps, _ in patterns)
    before, after = max(0, -first), max(0, q * (groups - 1) + last + 1 - image.shape[0])
    padded = np.pad(image, ((before, after), (0, 0)), mode="symmetric")    # mirrored: c b a | a b c
    result = np.empty((height, image.shape[1]), np.uint8)
    block = max(1, 2**17 // (p * image.shape[1]))     # groups at a time: what the processor's cache holds
    for start in range(0, groups, block):
        stop = min(start + block, groups)
        window = padded[q * start:q * (stop - 1) + before + last + 1].astype(np.float64)
        for row, (taps, weights) in enumerate(patterns):
            rows = result[p * start + row:p * stop:p]                      # (n, N), a view
            total, product = np.full(rows.shape, 0.5), np.empty(rows.shape)   # + 1/2: cutting the fraction then rounds
            for tap, weight in zip(taps + before, weights):
                total += np.multiply(window[tap::q][:len(rows)], weight, out=product)
            rows[...] = np.clip(total, 0, 255, out=total)
    return result


def resize(image, scale):
    """MATLAB's bicubic `imresize`: uint8 (H, W) or (H, W, C) -> uint8 (ceil(H * scale), ceil(W * scale)) or with C.

    scale: a Fraction, an int or a float > 0 (a float is taken for the nearest fraction with a denominator up to 1000).

    >>> resize(np.array([[0, 0, 200, 200]], np.uint8), 2)         # note the overshoot on either side of the edge
    array([[  0,   0,   0,  41, 159, 214, 205, 200],
           [  0,   0,   0,  41, 159, 214, 205, 200]], dtype=uint8)
    """
    scale = Fraction(scale).limit_denominator(1000)
    if scale <= 0:
        raise ValueError("resize: the scale must be above 0")
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.size == 0:
        raise ValueError(f"resize: expected a uint8 image (H, W) or (H, W, C), got {image.dtype} {image.shape}")
    for _ in range(2):                                # the rows; then, transposed, the columns
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


# --- Metrics ----------------------------------------------------------------------------------------------------------
def luma(image):
    """Brightness as float64 (H, W): BT.601's Y, 16..235, of uint8 RGB (H, W, 3); the raw values of a grey (H, W)."""
    if image.dtype != np.uint8:
        raise ValueError("only images of 8 bits are measured: round first, as a file would")
    return image.astype(np.float64) if image.ndim == 2 else image @ np.array([65.481, 128.553, 24.966]) / 255 + 16


def inner_luma(a, b, border):
    """The luma of both images without the border."""
    if a.shape != b.shape:
        raise ValueError(f"images of different sizes cannot be compared: {a.shape} and {b.shape}")
    inside = np.s_[border:a.shape[0] - border, border:a.shape[1] - border]
    if min(a[inside].shape) < 1:
        raise ValueError(f"an image of {a.shape[1]}x{a.shape[0]} has nothing left inside a border of {border}")
    return luma(a)[inside], luma(b)[inside]


def psnr(a, b, border):
    """PSNR-Y in dB of two uint8 images of one shape, `border` pixels cropped off each side; inf if they are equal.

    One level of difference everywhere is 219/255 of a level of luma, so 20 log10(255 * 255 / 219):

    >>> black = np.zeros((32, 32, 3), np.uint8)
    >>> round(psnr(black, black + np.uint8(1), border=2), 3)
    49.453
    """
    a, b = inner_luma(a, b, border)
    error = np.mean((a - b)**2)
    return math.inf if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(a, b, border):
    """Structural similarity (Wang et al., 2004) of two uint8 images of one shape, on the same cropped luma as `psnr`."""
    a, b = inner_luma(a, b, border)
    if min(a.shape) < 11:
        raise ValueError("SSIM's window needs 11 pixels inside the border")
    gauss = np.exp(-np.arange(-5, 6)**2 / (2 * 1.5**2))
    gauss /= gauss.sum()

    def mean(x):                                      # under the window, wherever it fits: (H, W) -> (H - 10, W - 10)
        for _ in range(2):                            # a Gaussian is separable: 11 rows, then 11 columns
            x = sum(weight * x[k:len(x) - 10 + k] for k, weight in enumerate(gauss)).T
        return x

    mean_a, mean_b = mean(a), mean(b)
    # E[x^2] - E[x]^2 is a small difference of large numbers: one more reason for float64.
    variances = mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255)**2, (0.03 * 255)**2         # they keep flat regions from dividing 0 by 0
    return float(np.mean((2 * mean_a * mean_b + c1) * (2 * covariance + c2)
                         / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))))


# --- The network ------------------------------------------------------------------------------------------------------
def load_run(run):
    """The network that search.py left in the folder `run`; ValueError if architecture.json or network.pt will not do."""
    run = Path(run)
    for name in ("architecture.json", "network.pt"):
        if not (run / name).is_file():
            raise ValueError(f"{run} holds no finished run: {name} is missing; search.py --out {run} writes it")
    try:
        architecture = Architecture.from_json((run / "architecture.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{run / 'architecture.json'}: {error}") from error
    if (run / "network.pt").stat().st_size < 2 * architecture.parameters():     # before any memory is taken
        raise ValueError(f"{run / 'network.pt'} is damaged or of another architecture: too small for "
                         f"{architecture.parameters():,} parameters")
    network = Network(architecture)
    try:
        state = load_tensors(run / "network.pt")
        if not all(tensor.is_floating_point() for tensor in state.values()):
            raise ValueError("weights must be real numbers")
        network.load_state_dict(state)
    except Exception as error:                        # zip reader, unpickler and torch each have their own
        raise ValueError(f"{run / 'network.pt'} is damaged or of another architecture: copy it again") from error
    for name, parameter in network.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{run / 'network.pt'} holds weights that are not finite ({name}): it cannot be used")
    return network.eval()


@torch.inference_mode()
def super_resolve(network, lr, tile=256):
    """uint8 RGB (H, W, 3) -> uint8 RGB (s*H, s*W, 3), on the device where the network's parameters are.

    The image is cut in tiles of `tile` x `tile` LR pixels, so that memory does not grow with it. Each tile is computed
    with a halo as wide as the network sees (the radius of its receptive field), and the halo's output is thrown away:
    what is left is what the whole image would have given. At the image's own border the halo ends, and the network pads
    as it would.
    """
    scale, halo = network.architecture.scale, network.architecture.radius
    device = next(network.parameters(), torch.empty(0)).device
    height, width = lr.shape[:2]
    result = np.empty((scale * height, scale * width, 3), np.uint8)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            y, x = max(0, top - halo), max(0, left - halo)
            bottom, right = min(height, top + tile), min(width, left + tile)
            patch = np.ascontiguousarray(lr[y:bottom + halo, x:right + halo])                    # (h, w, 3)
            patch = torch.from_numpy(patch).to(device).permute(2, 0, 1)[None].float() / 255      # (1, 3, h, w)
            out = network(patch)[0].permute(1, 2, 0)                                             # (s h, s w, 3)
            out = out[scale * (top - y):scale * (bottom - y), scale * (left - x):scale * (right - x)]
            out = (out.float().clamp(0, 1) * 255 + 0.5).to(torch.uint8)                          # rounded
            result[scale * top:scale * bottom, scale * left:scale * right] = out.cpu().numpy()
    return result


# --- The benchmarks ---------------------------------------------------------------------------------------------------
def sets_in(folder):
    """The folder itself or, where its subfolders are sets (Set5/HR, Set14/HR, ...), those."""
    return sorted(path.parent for path in Path(folder).glob("*/HR") if path.is_dir()) or [Path(folder)]


def photos_of(folder, scale):
    """The photographs of one set that can be measured, in its HR/ if it has one, else in the folder itself.

    The others are named on stderr. ValueError if none is left.
    """
    home, photos = Path(folder, "HR") if Path(folder, "HR").is_dir() else Path(folder), []
    for path in list_photos(home):
        try:
            image = open_photo(path)
            if min(image.size) < 11 + 3 * scale:
                raise ValueError(f"{printable(path)} is too small to be measured at x{scale}: it needs {11 + 3 * scale} pixels each way")
            if all(low == high for low, high in image.convert("RGB").getextrema()):
                raise ValueError(f"{printable(path)} is of one colour: enlarged without an error, its PSNR is no number")
            photos.append(path)
        except ValueError as error:
            print(f"skipped: {error}", file=sys.stderr)
    if not photos:
        raise ValueError(f"{home} holds no usable photographs ({' '.join(PHOTOS)})")
    return photos


def score(upscale, path, scale):
    """One photograph through a method: (HR, the method's result), both uint8 and ready for `psnr`."""
    photo = open_photo(path)
    hr = crop_to(np.array(photo.convert("RGB")), scale)
    result = upscale(degrade(hr, scale))
    if photo.mode.startswith("L"):                    # grey on disk: its raw values are compared, not the luma
        hr, result = (np.array(Image.fromarray(image).convert("L")) for image in (hr, result))
    return hr, result


def measure(upscale, photos, scale):
    """[(name, PSNR-Y, SSIM)] over one set, for any function from uint8 LR (h, w, 3) to uint8 (scale*h, scale*w, 3).

    photos: the folder of a set, or a list of files as `photos_of` gives it.

    The LR images are made here, so no set needs to bring them; where one does, they are the same in every pixel.
    The bicubic baseline is measure(lambda lr: resize(lr, scale), folder, scale).
    """
    rows = []
    photos = photos if isinstance(photos, list) else photos_of(photos, scale)
    for path in tqdm(photos, desc=f"{photos[0].parent} x{scale}", leave=False, disable=None):
        hr, result = score(upscale, path, scale)
        rows.append((path.stem, psnr(hr, result, scale), ssim(hr, result, scale)))
    return rows


def format_table(title, methods):
    """Markdown for one set. methods: [(name, Architecture or None, rows as `measure` gives them)]."""
    lines = [f"### {title}", "",
             "| method | parameters | multiply-adds for a 1280x720 output | PSNR-Y (dB) | SSIM |",
             "|---|---:|---:|---:|---:|"]
    for name, architecture, rows in methods:
        size, cost = "-", "-"
        if architecture is not None:
            size, cost = f"{architecture.parameters():,}", f"{architecture.multiply_adds() / 1e9:.2f} G"
        mean_psnr, mean_ssim = (float(np.mean([row[k] for row in rows])) for k in (1, 2))
        lines.append(f"| {name} | {size} | {cost} | {mean_psnr:.2f} | {mean_ssim:.4f} |")
    return "\n".join(lines) + "\n"


def save_crops(path, photos, bicubic, ours, scale, side=96):
    """Draw HR, bicubic and ours side by side, a row per photograph, at the spot where the two methods differ most, for
    good or ill. The figures above the crops are the whole image's."""
    figure = Figure(figsize=(9, 3.2 * len(photos)), layout="constrained")
    for photo, axes in zip(photos, figure.subplots(len(photos), 3, squeeze=False)):
        hr, a = score(bicubic, photo, scale)
        _, b = score(ours, photo, scale)
        edge = min(side, *hr.shape[:2])
        gap = np.abs(luma(a) - luma(b))
        corners = [(y, x) for y in range(0, len(gap) - edge + 1, 8) for x in range(0, gap.shape[1] - edge + 1, 8)]
        top, left = max(corners, key=lambda corner: gap[corner[0]:, corner[1]:][:edge, :edge].sum())
        titles = (photo.stem, f"bicubic, {psnr(hr, a, scale):.2f} dB", f"ours, {psnr(hr, b, scale):.2f} dB")
        for axis, image, title in zip(axes, (hr, a, b), titles):
            axis.imshow(image[top:top + edge, left:left + edge], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_title(printable(title), parse_math=False)             # file names may hold anything
            axis.axis("off")
    write_whole(path, figure.savefig)


# Published networks: thousands of parameters, 1e9 multiply-adds for a 1280x720 output, PSNR-Y on Set5, Set14, B100. FSRCNN was
# trained on T91 and General100, the others on DIV2K or more, most of them for days. Sources: arXiv 1803.08664 (FSRCNN, of
# 1608.00367), 1901.01074 (MoreMNAS), 2010.01073 (PAN), 2302.13800 (SAFMN), 1909.11856 (IMDN), 1901.07261 (FALSR); DLSR
# (2105.03939) is measured from its released weights.
FIELD = {
    2: {"FSRCNN": (12, 6.0, 37.00, 32.63, 31.53), "MoreMNAS-C": (25, 5.5, 37.06, 32.75, 31.50),
        "DLSR tiny": (56, 12.1, 37.71, 33.26, 31.98), "PAN": (261, 71, 38.00, 33.59, 32.18),
        "SAFMN": (228, 52, 38.00, 33.54, 32.16), "DLSR": (328, 68, 38.04, 33.62, 32.23),
        "IMDN": (694, 159, 38.00, 33.63, 32.19), "FALSR-A": (1021, 235, 37.82, 33.55, 32.12)},
    3: {"SAFMN": (233, 23, 34.34, 30.33, 29.08), "PAN": (261, 39, 34.40, 30.36, 29.11), "IMDN": (703, 72, 34.36, 30.32, 29.09)},
    4: {"FSRCNN": (12, 4.6, 30.71, 27.59, 26.98), "SAFMN": (240, 14, 32.18, 28.60, 27.58),
        "PAN": (272, 28, 32.13, 28.61, 27.59), "IMDN": (715, 41, 32.21, 28.58, 27.56)}}


def draw_field(axis, scale, ours, against="multiply-adds"):
    """PSNR-Y on Set5 against cost, with FIELD. ours: {name: (thousands of parameters, 1e9 multiply-adds, dB)}."""
    column = ("parameters", "multiply-adds").index(against)
    for points, marker, colour in (FIELD[scale], "o", "#999999"), (ours, "*", "#D55E00"):
        for i, (name, numbers) in enumerate(sorted(points.items(), key=lambda point: point[1][column])):
            axis.plot(numbers[column], numbers[2], marker, color=colour, markersize=8 if marker == "o" else 15)
            place, side = ((0, (8, -16)[i % 2]), "center") if marker == "o" else ((9, -4), "left")
            axis.annotate(name, (numbers[column], numbers[2]), place, textcoords="offset points", ha=side, fontsize=10,
                          color="black" if marker == "o" else colour)      # neighbours write above and below in turn
    unit = ("thousands of parameters", "multiply-adds (G) for a 1280x720 output")[column]
    axis.margins(0.12)
    axis.set(xscale="log", xlabel=unit, ylabel="PSNR-Y (dB) on Set5", title=f"x{scale}")
    low, high = axis.get_xlim()
    ticks = [k * 10 ** e for e in range(5) for k in (1, 2, 5) if low < k * 10 ** e < high]
    axis.set_xticks(ticks, ticks)
    axis.minorticks_off()


# --- Activations compared: the report of the course ------------------------------------------------------------------
def entropy(weights):
    """Mean over all choices, in units of a choice among equals (1: undecided, 0: decided); (T, ..., K) -> (T,)."""
    p = weights.reshape(len(weights), -1, weights.shape[-1])
    return -(p * np.log(np.maximum(p, 1e-30))).sum(-1).mean(-1) / math.log(p.shape[-1])


def read_report(run):
    """What a finished run's folder says of it; ValueError if it is none."""
    run = Path(run)
    try:
        settings, results = (json.loads((run / name).read_text()) for name in ("settings.json", "results.json"))
        quality = {"sample": results["sample"]}
        if (run / "benchmark.json").exists():
            quality = json.loads((run / "benchmark.json").read_text())
        with np.load(run / "distributions.npz") as file:
            over_time = {name: file[name] for name in ("steps", "gamma", "alpha", "beta")}
        return dict(settings=dict(settings["settings"]), activation=str(settings["settings"]["activation"]),
                    ours={name: float(scores["ours"]["psnr"]) for name, scores in quality.items()},
                    lost=results["hand_over"]["psnr_supernet"] - results["hand_over"]["psnr_network"],
                    cost=load_run(run).architecture.multiply_adds() / 1e9, seconds=sum(results["seconds"].values()), **over_time)
    except Exception as error:                            # damaged files make readers raise nearly anything
        raise ValueError(f"{run} is no finished run of search.py: {type(error).__name__}: {error}") from error


def compare(runs, picture):
    """A table with a row for each activation (mean and standard deviation over its seeds), and a figure."""
    check_folder_of(picture)
    groups = {}
    for run in runs:
        report = read_report(run)
        groups.setdefault(report["activation"], []).append(report)
    first = next(iter(groups.values()))[0]
    sets = [name for name in first["ours"] if all(name in r["ours"] for group in groups.values() for r in group)]
    if not sets:
        raise ValueError("the runs are not measured on the same photographs: --benchmark them all, or none")
    for group in groups.values():
        for report in group:
            different = [f"--{name}" for name, value in first["settings"].items()
                         if name not in ("activation", "seed", "device") and report["settings"].get(name) != value]
            if different:
                raise ValueError(f"the runs differ in more than activation and seed: {', '.join(different)}")

    def spread(values):
        return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")
    heads = ["activation", "seeds", *(f"{name} (dB)" for name in sets), "multiply-adds (G)", "lost by deciding (dB)",
             "minutes"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for name, group in groups.items():
        columns = [[r["ours"][each] for r in group] for each in sets]
        columns += [[r["cost"] for r in group], [r["lost"] for r in group], [r["seconds"] / 60 for r in group]]
        lines.append(f"| {name} | {len(group)} | " + " | ".join(map(spread, columns)) + " |")
    print(f"x{first['settings']['scale']}: mean ± standard deviation over seeds. Lost by deciding: PSNR on a batch of the "
          "supernet as it stood, minus that of the network derived from it.\n\n" + "\n".join(lines))
    if min(map(len, groups.values())) < 3:
        print("\nFewer than three seeds of an activation: too few to tell a difference from chance.")

    figure = Figure(figsize=(15, 7.5), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    styles = ["-", "--", ":", "-."]
    for i, (name, group) in enumerate(groups.items()):
        for column, level in zip(axes.T, ("gamma", "alpha", "beta")):
            for k, r in enumerate(group):
                look = dict(color=f"C{i}", linestyle=styles[i % 4], linewidth=1.5, label=name if k == 0 else None)
                if r[level].size:                             # with one position there is no inner width
                    column[0].plot(r["steps"], entropy(r[level]), **look)
                    column[1].plot(r["steps"], (r[level] > 0).sum(-1).reshape(len(r["steps"]), -1).mean(-1), **look)
    for column, title in zip(axes.T, ("network: exits", "cell: operations", "kernel: widths")):
        column[0].set(title=title, ylim=(-0.03, 1.03))
        column[1].set(xlabel="training step", ylim=0)
    axes[0, 0].set_ylabel("entropy (1: undecided, 0: decided)")
    axes[1, 0].set_ylabel("alive in a choice")
    axes[0, 0].legend()
    write_whole(picture, figure.savefig)
    print(f"\nEntropy and live choices over the search: {picture}")


# --- The command line -------------------------------------------------------------------------------------------------
def run_benchmark(network, run, folders):
    """Print a table per set, and save the figures and the crops of the two photographs that gain most."""
    scale, report = network.architecture.scale, Path(run) / "benchmark.json"
    bicubic, ours = lambda lr: resize(lr, scale), lambda lr: super_resolve(network, lr)
    sets, means = {}, {}
    if report.exists():                                    # sets that were measured before stay in it
        try:
            means = dict(json.loads(report.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{report} is damaged; delete it to measure again") from error
    for each in (each for folder in folders for each in sets_in(folder)):
        place = each.resolve()
        name = place.parent.name if place.name == "HR" else place.name
        if name in sets:
            raise ValueError(f"two sets are called {name}, and so would be their figures and crops: measure them one by one")
        sets[name] = photos_of(each, scale)                # a missing or empty folder ends here, before the long work
    for name, photos in sets.items():
        base, found = measure(bicubic, photos, scale), measure(ours, photos, scale)
        methods = [("bicubic", None, base), ("ours", network.architecture, found)]
        print(format_table(f"{name}, x{scale}, {len(photos)} photographs", methods), flush=True)
        means[name] = {method: dict(zip(("psnr", "ssim"), np.mean([row[1:] for row in rows], axis=0)))
                       for method, _, rows in methods}
        write_whole(report, lambda path: path.write_text(json.dumps(means, indent=1) + "\n"))
        gains = [row[1] - floor[1] for row, floor in zip(found, base)]
        best = [photos[k] for k in np.argsort(gains)[::-1][:2]]
        save_crops(Path(run) / f"crops_{name}.png", best, bicubic, ours, scale)


def run_upscale(network, photo, output):
    """Enlarge a picture file: grey stays grey, alpha is kept (bicubic). What forbids it is found before the work."""
    output, suffix = Path(output), Path(output).suffix.lower()
    if os.path.isdir(photo):
        raise ValueError(f"{photo} is a folder: --upscale takes one picture at a time")
    image, scale = open_photo(photo), network.architecture.scale
    if suffix not in OUTPUTS:
        raise ValueError(f"{output} must end in one of {' '.join(OUTPUTS)}")
    check_folder_of(output)
    if output.is_dir() or output.exists() and os.path.samefile(photo, output):
        raise ValueError(f"{output} is {'a folder' if output.is_dir() else 'the input itself'}: choose another name")
    if image.mode.endswith("A") and suffix in (".jpg", ".jpeg"):
        raise ValueError(f"{photo} has an alpha channel, which {suffix} cannot hold: write a .png")
    if suffix in (".jpg", ".jpeg") and scale * max(image.size) > 65500:
        raise ValueError(f"the result has {scale * image.width}x{scale * image.height} pixels, and {suffix} holds 65500 each way: "
                         "write a .png")
    if image.info["deep"]:
        print(f"note: {photo} has 16 bits per value; it is scaled to 8, and so is the result")
    # Tiles of 512 pixels of the *result*: a cell that works at full size then costs the same memory at every scale.
    result = Image.fromarray(super_resolve(network, np.array(image.convert("RGB")), tile=512 // scale))
    if image.mode.startswith("L"):
        result = result.convert("L")
    if image.mode.endswith("A"):
        result.putalpha(Image.fromarray(resize(np.array(image.getchannel("A")), scale)))
    colours = image.info.get("icc_profile")           # which colours the numbers stand for: unchanged
    write_whole(output, lambda temporary: result.save(temporary, quality=95, icc_profile=colours))
    print(f"{output}: {result.width}x{result.height}, {result.mode}")


def run_time(network, device):
    a, network = network.architecture, network.to(memory_format=torch.channels_last)
    took = milliseconds(network, features(3, 1, a.scale, device), seconds=3)
    arithmetic = f"{torch.get_num_threads()} threads, float32" if torch.device(device).type == "cpu" else "float32 or TF32"
    print(f"{took:.4g} ms for a 1280x720 output, {a.multiply_adds() / 1e9:.4g}G multiply-adds: "
          f"{a.multiply_adds() / took / 1e6:.3g}G a second ({device}, {arithmetic}, median)")


def run_export(network, path):
    """Write the network as a graph of torch's own operations, and load it again to see that it computes the same.

    The graph takes float (B, 3, h, w) in [0, 1], with any B, h and w, and gives (B, 3, scale h, scale w), not clipped. To
    enlarge uint8 RGB `pixels` (h, w, 3) with it, without this repository:

        network = torch.export.load("x2.pt2").module()
        large = network(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
        large = (large[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0)        # (scale h, scale w, 3)
    """
    if path.suffix != ".pt2":
        raise ValueError(f"{path} must end in .pt2, torch.export's own format")
    check_folder_of(path)
    network, example, free = network.cpu(), torch.rand(2, 3, 24, 32), torch.export.Dim.AUTO
    program = torch.export.export(network, (example,), dynamic_shapes=({0: free, 2: free, 3: free},))
    buffer = io.BytesIO()                                  # by way of memory, as in `save_tensors`
    torch.export.save(program, buffer)
    buffer.seek(0)
    again, largest = torch.export.load(buffer).module(), 0.0
    with torch.inference_mode():
        for shape in (1, 3, 17, 40), (3, 3, 64, 31):           # sizes that the export never saw
            image = torch.rand(shape)
            largest = max(largest, (again(image) - network(image)).abs().max().item())
    if largest > 1e-5:
        raise ValueError(f"what torch.export made computes something else than the network (largest difference {largest:.1e}): "
                         f"{path} is not written")
    write_whole(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB; loaded again, largest difference {largest:.1e}")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Measure a found network, or use it.")
    parser.error = lambda message: parser.exit(2, f"evaluate.py: error: {message}\n")      # one line, no usage
    parser.add_argument("run", metavar="RUN", nargs="?", help="folder written by search.py (architecture.json, network.pt)")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--benchmark", nargs="+", metavar="DIR", help="sets: photographs in DIR, DIR/HR or DIR/*/HR")
    task.add_argument("--upscale", metavar="PHOTO", help="picture to enlarge")
    task.add_argument("--time", action="store_true", help="time the network alone for a 1280x720 output")
    task.add_argument("--export", metavar="FILE.pt2", help="write the network with torch.export, for pictures of any size")
    task.add_argument("--compare", nargs="+", metavar="RUN", help="activations: a table and a figure (comparison.png, or -o)")
    parser.add_argument("-o", "--output", metavar="FILE", help=f"where --upscale writes ({' '.join(OUTPUTS)})")
    parser.add_argument("--device", default="cpu", help="where the network runs (default: cpu, for figures that repeat)")
    args = parser.parse_args(argv)
    if args.compare is None and (args.upscale is None) != (args.output is None):
        parser.error("--upscale PHOTO and -o FILE go together")
    if (args.run is None) != bool(args.compare):
        parser.error("name one RUN" if args.run is None else "the runs to compare stand behind --compare")
    if args.device != "cpu" and (args.compare or args.export is not None):
        parser.error("--device is for --benchmark, --upscale and --time")
    try:
        if args.compare:
            return compare(args.compare, Path(args.output or "comparison.png"))
        network = load_run(args.run).to(usable(args.device))
        if args.benchmark:
            run_benchmark(network, args.run, args.benchmark)
        elif args.time:
            run_time(network, args.device)
        elif args.export is not None:
            run_export(network, Path(args.export))
        else:
            run_upscale(network, args.upscale, args.output)
    except (ValueError, OSError) as error:
        parser.exit(2, f"evaluate.py: error: {error}\n")
    except (MemoryError, RuntimeError) as error:
        parser.exit(2, f"evaluate.py: error: {out_of_memory(error)}\n")


if __name__ == "__main__":
    main()
