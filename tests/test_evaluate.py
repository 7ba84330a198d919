"""evaluate.py: MATLAB's pixels, published baselines, closed forms, and clean failures."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from search_space import Network, Space, load_run, write_whole

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = Path(os.environ.get("TRILEVEL_BENCHMARK", "nowhere"))
needs_benchmark = pytest.mark.skipif(
    not (BENCHMARK / "Set5/HR").is_dir(),
    reason="no photographs: set TRILEVEL_BENCHMARK to a folder with Set5/HR, ...")


def picture(height, width, *channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)


class Doubler(torch.nn.Module):
    """A stand-in network of scale 2 whose receptive field has radius 3.

    Whole numbers, so float32 sums are exact.
    """
    architecture = SimpleNamespace(scale=2, radius=3)

    def forward(self, x):
        generator = torch.Generator().manual_seed(0)
        taps = torch.randint(-2, 3, (12, 3, 7, 7), generator=generator).float()
        y = torch.nn.functional.conv2d((x * 255).round(), taps, padding=3)
        return torch.nn.functional.pixel_shuffle(y / 64 / 255 + 0.5, 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a small untrained network."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    network = Network(Space(scale=2, channels=24, cells=1, positions=2).random(random.Random(0)))
    (folder / "architecture.json").write_text(network.architecture.to_json())
    torch.save(network.state_dict(), folder / "network.pt")
    return folder


# --- Bicubic --------------------------------------------------------------------------------------
def slow_rows(image, scale):
    """The first axis by the formula, pixel by pixel: other code for the same definition."""
    def kernel(t):
        t = abs(t)
        if t <= 1:
            return 1 - t * t * (5 - 3 * t) / 2
        return (4 - 8 * t + 5 * t * t - t**3) / 2 if t < 2 else 0
    height, wide = image.shape[0], max(1, 1 / scale)
    out = np.zeros((math.ceil(height * scale), *image.shape[1:]), np.uint8)
    for i in range(len(out)):
        centre = (i + Fraction(1, 2)) / scale - Fraction(1, 2)
        total, weights = 0, 0
        for j in range(math.floor(centre - 2 * wide), math.ceil(centre + 2 * wide) + 1):
            weight = kernel((centre - j) / wide)  # a Fraction: exact
            mirrored = j % (2 * height)
            mirrored = mirrored if mirrored < height else 2 * height - 1 - mirrored
            total, weights = total + weight * image[mirrored].astype(object), weights + weight
        out[i] = [math.floor(min(255, max(0, value / weights)) + Fraction(1, 2)) for value in total]
    return out


@pytest.mark.parametrize("scale", [Fraction(1, 2), Fraction(1, 4), Fraction(2, 3), 2, 3, 4])
@pytest.mark.parametrize("shape", [(9, 14), (3, 5), (1, 1)])
def test_resize_is_the_formula(scale, shape):
    image = picture(*shape)
    expected = slow_rows(slow_rows(image, Fraction(scale)).T, Fraction(scale)).T
    np.testing.assert_array_equal(evaluate.resize(image, scale), expected)


def test_resize_shapes_and_errors():
    assert evaluate.resize(picture(7, 10, 3), 1 / 3).shape == (3, 4, 3)  # rounded up
    assert evaluate.degrade(picture(7, 10, 3), 3).shape == (2, 3, 3)  # cropped first
    np.testing.assert_array_equal(evaluate.resize(picture(5, 6, 3), 1), picture(5, 6, 3))
    colour = picture(8, 9, 3)
    green = evaluate.resize(colour[..., 1], 2)
    np.testing.assert_array_equal(evaluate.resize(colour, 2)[..., 1], green)
    large = picture(700, 650)  # more than one block of rows
    part = evaluate.resize(large[190:410], Fraction(1, 2))[5:105]
    np.testing.assert_array_equal(evaluate.resize(large, Fraction(1, 2))[100:200], part)
    for image, scale in ((picture(4, 4), 0), (picture(4, 4) / 255, 2), (picture(0, 4), 2),
                         (picture(4, 4), math.inf), (picture(4, 4), math.nan)):
        with pytest.raises(ValueError):
            evaluate.resize(image, scale)


@needs_benchmark
@pytest.mark.parametrize("name", ["Set5", "Set14"])
def test_resize_gives_the_stored_files(name):
    for hr in evaluate.sets_in([BENCHMARK / name], 2)[name]:
        for scale in (2, 3, 4):
            stored = evaluate.read_photo(BENCHMARK / name / f"LRbicx{scale}" / hr.name)
            np.testing.assert_array_equal(evaluate.degrade(evaluate.read_photo(hr), scale), stored)


# --- Metrics --------------------------------------------------------------------------------------
@needs_benchmark
@pytest.mark.parametrize("name, expected", [("Set5", (33.67, 30.40, 28.43)),
                                            ("Set14", (30.23, 27.54, 25.99)),
                                            ("B100", (29.56, 27.21, 25.96))])
def test_bicubic_baselines(name, expected):
    for scale, published in zip((2, 3, 4), expected):
        rows = evaluate.measure(lambda lr: evaluate.resize(lr, scale), BENCHMARK / name, scale)
        assert np.mean([row[1] for row in rows]) == pytest.approx(published, abs=0.01)


def test_luma_and_psnr():
    ends = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 0, 255]]], np.uint8)
    np.testing.assert_allclose(evaluate.luma(ends), [[16, 235, 16 + 65.481, 16 + 24.966]])
    flat = np.full((40, 40, 3), 100, np.uint8)
    for offset in (1, 5, 40):
        expected = 20 * math.log10(255 / (offset * 219 / 255))
        assert evaluate.psnr(flat, flat + np.uint8(offset), 2) == pytest.approx(expected)
        grey = flat[..., 0]
        expected = 20 * math.log10(255 / offset)
        assert evaluate.psnr(grey, grey + np.uint8(offset), 2) == pytest.approx(expected)
    assert evaluate.psnr(flat, flat, 4) == math.inf
    framed = flat.copy()
    framed[:2] = framed[:, -2:] = 0  # errors in the border do not count
    assert evaluate.psnr(flat, framed, 2) == math.inf and evaluate.psnr(flat, framed, 1) < 40
    for a, b in ((flat, flat[:-1]), (flat / 255, flat / 255), (flat[:4], flat[:4])):
        with pytest.raises(ValueError):
            evaluate.psnr(a, b, 2)


def test_ssim_against_a_plain_loop_over_windows():
    a = picture(17, 20, 3)
    b = np.uint8(np.clip(a + picture(17, 20, 3, seed=1) / 4.0, 0, 255))
    y, x = np.mgrid[-5:6, -5:6]
    window = np.exp(-(y**2 + x**2) / 4.5)
    window /= window.sum()
    la, lb = evaluate.luma(a)[2:-2, 2:-2], evaluate.luma(b)[2:-2, 2:-2]
    values = []
    for i, j in np.ndindex(la.shape[0] - 10, la.shape[1] - 10):
        p, q = la[i:i + 11, j:j + 11], lb[i:i + 11, j:j + 11]
        mp, mq = (window * p).sum(), (window * q).sum()
        vp, vq, pq = ((window * d).sum() for d in ((p - mp)**2, (q - mq)**2, (p - mp) * (q - mq)))
        means = (2 * mp * mq + 6.5025) / (mp**2 + mq**2 + 6.5025)
        values.append(means * (2 * pq + 58.5225) / (vp + vq + 58.5225))
    assert evaluate.ssim(a, b, 2) == pytest.approx(np.mean(values), abs=1e-12)
    assert evaluate.ssim(a, a, 2) == pytest.approx(1, abs=1e-12)
    with pytest.raises(ValueError):
        evaluate.ssim(a[:12], b[:12], 2)


# --- The network ----------------------------------------------------------------------------------
def test_tiled_equals_untiled(run):
    lr = picture(45, 38, 3)
    whole = evaluate.super_resolve(Doubler(), lr, tile=64)
    for tile in (7, 16, 45):
        np.testing.assert_array_equal(evaluate.super_resolve(Doubler(), lr, tile), whole)
    assert whole.shape == (90, 76, 3) and whole.std() > 20
    network = load_run(run)  # real weights: sums may round apart
    small, large = (evaluate.super_resolve(network, lr, tile).astype(int) for tile in (16, 64))
    gap = np.abs(small - large)
    assert gap.max() <= 1 and gap.mean() < 1e-3


# --- Pictures in and out --------------------------------------------------------------------------
def files_of_all_kinds(folder):
    """Yield (path, the mode to be kept, the RGB values to be read)."""
    rgb, alpha = picture(6, 8, 3), picture(6, 8, seed=2)
    grey, grey3 = rgb[..., 0], np.repeat(rgb[..., :1], 3, 2)
    palette, colours = Image.fromarray(grey // 64).convert("P"), picture(4, 3, seed=3)
    palette.putpalette(colours.ravel().tolist())
    for name, image, mode, expected, options in (
            ("rgb.png", rgb, "RGB", rgb, {}), ("grey.png", grey, "L", grey3, {}),
            ("rgba.png", np.dstack([rgb, alpha]), "RGBA", rgb, {}),
            ("la.png", np.dstack([grey, alpha]), "LA", grey3, {}),
            ("deep.png", grey.astype(np.uint16) * 257, "L", grey3, {}),
            ("binary.png", grey > 127, "L", np.where(grey3 > 127, 255, 0), {}),
            ("cmyk.tif", Image.fromarray(rgb).convert("CMYK"), "RGB", rgb, {}),
            ("palette.png", palette, "RGB", colours[grey // 64], {}),
            ("clear.png", palette, "RGBA", colours[grey // 64], {"transparency": 1})):
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        image.save(folder / name, **options)
        yield folder / name, mode, expected


def test_every_mode_is_read_and_kept(tmp_path, capsys):
    for path, mode, expected in files_of_all_kinds(tmp_path):
        photo, enlarged = evaluate.open_photo(path), tmp_path / f"x2_{path.name}"
        np.testing.assert_array_equal(evaluate.read_photo(path), expected, err_msg=path.name)
        evaluate.run_upscale(Doubler(), path, enlarged)
        with Image.open(enlarged) as out:
            assert (photo.mode, out.mode, out.size) == (mode, mode, (16, 12)), path.name
            if mode.endswith("A"):
                alpha = evaluate.resize(np.array(photo.getchannel("A")), 2)
                np.testing.assert_array_equal(np.array(out.getchannel("A")), alpha)
        assert ("16 bits" in capsys.readouterr().out) == (path.name == "deep.png")


def test_exif_listing_and_unreadable_files(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(picture(4, 7, 3)).save(tmp_path / "turned.png", exif=exif)
    upright = np.rot90(picture(4, 7, 3), -1)
    np.testing.assert_array_equal(evaluate.read_photo(tmp_path / "turned.png"), upright)
    (tmp_path / "below").mkdir()
    (tmp_path / "below/B.JPEG").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "below/loop").symlink_to(tmp_path)
    assert [photo.path.name for photo in evaluate.find_photos(tmp_path, 2)[0]] == \
        ["B.JPEG", "turned.png"]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # turned.png is now a "bomb"
    for bad in ("below/B.JPEG", "notes.txt", "missing.png", "below", "turned.png"):
        with pytest.raises(ValueError, match=r"\Acannot read [^\n]*\Z"):
            evaluate.read_photo(tmp_path / bad)
    monkeypatch.undo()
    assert evaluate.read_photo(evaluate.sample_photo()).shape == (600, 512, 3)


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail(temporary):
        Path(temporary).write_bytes(b"half")
        raise OSError("disk full")
    (tmp_path / "out.png").write_bytes(b"old")
    with pytest.raises(OSError):
        write_whole(tmp_path / "out.png", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    assert (tmp_path / "out.png").read_bytes() == b"old"


# --- The command line -----------------------------------------------------------------------------
def test_benchmark_prints_a_table_and_saves_crops(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "Tiny/HR").mkdir(parents=True)
    Image.fromarray(picture(60, 50, 3)).save(tmp_path / "Tiny/HR/colour.png")
    Image.fromarray(picture(40, 41)).save(tmp_path / "Tiny/HR/grey.png")
    evaluate.main([str(run), "--benchmark", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    network = load_run(run)
    assert lines[0] == "### Tiny, x2, 2 photographs" and "1280x720" in lines[2]
    assert lines[4].startswith("| bicubic | - | - |")
    assert lines[5].startswith(f"| ours | {network.architecture.parameters():,} | ")
    assert Image.open(run / "crops_Tiny.png").size > (500, 300)
    shutil.copytree(tmp_path / "Tiny", tmp_path / "Again")
    # What was measured before stays.
    evaluate.main([str(run), "--benchmark", str(tmp_path / "Again")])
    means = json.loads((run / "benchmark.json").read_text())
    assert list(means) == ["Tiny", "Again"] and means["Tiny"] == means["Again"]
    for name in "$_$.png", "x\udcff.png":  # titles of crops
        Image.fromarray(picture(60, 50, 3)).save(tmp_path / "Again/HR" / name)
    Image.new("RGB", (50, 60), "red").save(tmp_path / "Again/HR/red.png")
    evaluate.main([str(run), "--benchmark", str(tmp_path / "Again")])
    out, error = capsys.readouterr()
    assert "### Again, x2, 4 photographs" in out and "red.png is of one colour" in error
    scores = json.loads((run / "benchmark.json").read_text())["Again"].values()
    assert all(math.isfinite(score["psnr"]) for score in scores)
    measure = evaluate.compare_with_bicubic

    def meanwhile(*args):
        (run / "benchmark.json").write_text(json.dumps({"Other": means["Tiny"]}))
        return measure(*args)
    monkeypatch.setattr(evaluate, "compare_with_bicubic", meanwhile)
    evaluate.main([str(run), "--benchmark", str(tmp_path / "Tiny")])
    assert sorted(json.loads((run / "benchmark.json").read_text())) == ["Other", "Tiny"]
    (run / "benchmark.json").write_text("[3")
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(run), "--benchmark", str(tmp_path)])
    assert stop.value.code == 2
    assert "benchmark.json is damaged; delete it" in capsys.readouterr().err
    (run / "benchmark.json").unlink()


def test_mistakes_are_one_line_and_status_2(run, tmp_path, tmp_path_factory, capsys):
    Image.fromarray(picture(6, 8, 4)).save(tmp_path / "in.png")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/architecture.json").write_bytes((run / "architecture.json").read_bytes())
    (tmp_path / "damaged/network.pt").write_bytes((run / "network.pt").read_bytes()[:500])
    # Black, were it taken for 16 bits; and 66000 pixels are too many for a JPEG.
    Image.fromarray(np.full((9, 9), 200, np.int32)).save(tmp_path / "deep.tif")
    Image.new("L", (33000, 1)).save(tmp_path / "wide.png")
    sets = tmp_path_factory.mktemp("sets")
    for name in "a/Set", "b/Set", "c/Set/HR", "d/Set/HR":
        (sets / name).mkdir(parents=True)
        Image.fromarray(picture(20, 20, 3)).save(sets / name / "in.png")
    photo, good = tmp_path / "in.png", tmp_path / "out.png"
    before = sorted(tmp_path.rglob("*"))
    for folder, *rest in (
            (tmp_path / "none", "--upscale", photo, "-o", good),
            (tmp_path / "damaged", "--upscale", photo, "-o", good),
            (run, "--benchmark", tmp_path / "empty"), (run, "--benchmark", tmp_path / "none"),
            (run, "--benchmark", tmp_path), (run, "--benchmark", sets / "a/Set", sets / "b/Set"),
            (run, "--benchmark", sets / "c/Set/HR", sets / "d/Set/HR"),
            (run, "--upscale", tmp_path / "text.png", "-o", good),
            (run, "--upscale", tmp_path / "deep.tif", "-o", good),
            (run, "--upscale", tmp_path / "wide.png", "-o", tmp_path / "wide.jpg"),
            (run, "--upscale", tmp_path, "-o", good), (run, "--upscale", "", "-o", good),
            (run, "--upscale", photo, "-o", photo), (run, "--upscale", photo, "-o", ""),
            (run, "--upscale", photo, "-o", tmp_path / "x.gif"),
            (run, "--upscale", photo, "-o", tmp_path / "none/x.png"),
            (run, "--upscale", photo, "-o", tmp_path / "alpha.jpg"),
            (run, "--upscale", photo, "-o", good, "--device", "toaster"),
            (run, "--time", "--device", "meta"), (run, "--export", ""),
            (run, "--export", tmp_path / "none/x.pt2"),
            (run, "--export", tmp_path / "x.pt2", "--device", "cuda")):
        with pytest.raises(SystemExit) as stop:
            evaluate.main([str(folder), *map(str, rest)])
        message = capsys.readouterr().err
        *others, last = message.splitlines()
        assert stop.value.code == 2 and last.startswith("evaluate.py: error: "), rest
        assert all(line.startswith("skipped: ") for line in others), rest
    assert sorted(tmp_path.rglob("*")) == before
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", tmp_path / "none",
                           "--benchmark", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "architecture.json is missing" in done.stderr
    with pytest.raises(SystemExit):  # as the message of somebody's exception may be
        evaluate.CommandLine("evaluate.py").error("two\nlines")
    assert capsys.readouterr().err == "evaluate.py: error: two lines\n"


def test_a_network_is_timed_and_exported(run, tmp_path, capsys):
    evaluate.main([str(run), "--time"])
    a = load_run(run).architecture
    multiply_adds = re.escape(f"{a.multiply_adds() / 1e9:.4g}G multiply-adds: ")
    assert re.fullmatch(r"[\d.e+]+ ms for a 1280x720 output, " + multiply_adds
                        + r".* a second \(cpu, \d+ threads, float32, median\)",
                        capsys.readouterr().out.strip())
    evaluate.main([str(run), "--export", str(tmp_path / "a.pt2")])
    assert "loaded again, largest difference" in capsys.readouterr().out
    program, network = torch.export.load(tmp_path / "a.pt2").module(), load_run(run)
    image = torch.rand(2, 3, 13, 50)
    y = program(image).detach().numpy()  # as the docstring of run_export says
    with torch.no_grad():
        torch.testing.assert_close(y, network(image).numpy(), rtol=0, atol=1e-5)
    for arguments in (["--export", str(tmp_path / "a.tflite")],
                      ["--export", str(tmp_path / "none/a.pt2")]):
        with pytest.raises(SystemExit) as stop:
            evaluate.main([str(run), *arguments])
        assert stop.value.code == 2 and capsys.readouterr().err.startswith("evaluate.py: error: ")


def without(*packages):
    """A program in which these cannot be imported, before it runs evaluate.py."""
    return ("import sys; sys.modules.update(dict.fromkeys(" + repr(packages) + ")); "
            "import evaluate; evaluate.main(sys.argv[1:])")


def test_onnx_names_the_packages_that_it_misses(run, tmp_path):
    done = subprocess.run([sys.executable, "-c", without("onnx", "onnxscript"), run, "--export",
                           tmp_path / "a.onnx"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not any(tmp_path.iterdir())
    assert done.stderr.splitlines() == ["evaluate.py: error: a .onnx needs two more packages: "
                                        "pip install onnx onnxscript"]


@pytest.mark.parametrize("scale", (2, 3, 4))
@pytest.mark.parametrize("output", ("skip", "tanh"))
def test_onnx_computes_the_same(scale, output, tmp_path, capsys):
    """In onnxruntime, at sizes the export never saw; and it says how to feed it."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    space = Space(scale, 16, 2, 2, output=output)
    network = Network(space.random(random.Random(scale))).eval()
    torch.nn.init.normal_(network.tail.conv.weight, std=0.1)  # near zero it would hide differences
    evaluate.run_export(network, tmp_path / "a.onnx")
    assert "loaded again, largest difference" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    image = torch.rand(2, 3, 13, 50)
    with torch.no_grad():
        expected = network(image).numpy()
    np.testing.assert_allclose(session.run(None, {"lr": image.numpy()})[0], expected, atol=1e-4)
    meta = session.get_modelmeta().custom_metadata_map
    assert meta["scale"] == str(scale) and "uint8" in meta["input"] and "clip" in meta["output"]
