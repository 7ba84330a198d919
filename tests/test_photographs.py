"""Which files are photographs, and how a picture file is enlarged: no wrong number in silence."""
import json
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import evaluate
import search
from evaluate import crop_to, dead_leaves, degrade, find_photos, load_photos, sets_in
from test_evaluate import Doubler, run  # noqa: F401 (run is a fixture)
from test_robustness import refused

RNG = np.random.default_rng(0)
LEAVES = [crop_to(dead_leaves(72, RNG)[:60 + 12 * (k % 2)], 12) for k in range(3)]


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


# --- Which files count --------------------------------------------------------------------------

# How others lay out a benchmark: files of HR, of LR and of results, of picture {k} at scale {s}.
LAYOUTS = {
    "ours": ("Set/HR/{k}.png", "Set/LRbicx{s}/{k}.png"),
    "EDSR": ("Set/HR/{k}.png", "Set/LR_bicubic/X{s}/{k}x{s}.png"),
    "BasicSR": ("Set/GTmod12/{k}.png", "Set/LRbicx{s}/{k}.png"),
    "BasicSR, uncropped": ("Set/original/{k}.png", "Set/LRbicx{s}/{k}.png",
                           "Set/GTmod12/{k}.png"),
    "SelfExSR": ("Set/image_SRF_{s}/img_00{k}_SRF_{s}_HR.png",
                 "Set/image_SRF_{s}/img_00{k}_SRF_{s}_LR.png",
                 "Set/image_SRF_{s}/img_00{k}_SRF_{s}_bicubic.png",
                 "Set/image_SRF_{s}/img_00{k}_SRF_{s}_SelfExSR.png"),
    "RCAN": ("HR/Set/x{s}/{k}_HR_x{s}.png", "LR/LRBI/Set/x{s}/{k}_LRBI_x{s}.png"),
    "lower case": ("Set/hr/{k}.png", "Set/lr_x{s}/{k}.png"),
    "GT": ("Set/GT/{k}.png", "Set/SRCNN/x{s}/{k}.png"),
    "flat": ("Set/{k}.png",),
    "flat, named": ("Set/{k}_HR.png", "Set/{k}_LRx{s}.png"),
    "beside a small folder": ("Set/{k}.png", "LR/Set/{k}x{s}.png")}


def lay_out(folder, layout, scales=(2, 3, 4)):
    large, *others = layout
    for k, hr in enumerate(LEAVES):
        for s in scales:
            save(hr, folder / large.format(k=k, s=s))
            for name in others:
                small = "LR" in name or "lr" in name
                save(degrade(hr, s) if small else hr, folder / name.format(k=k, s=s))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_benchmarks(tmp_path, layout, capsys):
    lay_out(tmp_path, layout)
    for folder in tmp_path, tmp_path / "Set":
        for scale in (2, 3, 4) if folder.is_dir() else ():
            sets = sets_in([folder], scale)
            assert list(sets) == ["Set"]
            large = {layout[0].format(k=k, s=scale) for k in range(3)}
            assert {str(path.relative_to(tmp_path)) for path in sets["Set"]} == large
    others = len(layout) > 1
    assert ("passed over" in capsys.readouterr().err) == others


def test_div2k_as_it_unpacks(tmp_path, capsys):
    for part, first in ("train", 1), ("valid", 801):
        for k, hr in enumerate(LEAVES, first):
            save(hr, tmp_path / f"DIV2K_{part}_HR/{k:04d}.png")
            for s in 2, 3, 4:
                save(degrade(hr, s), tmp_path / f"DIV2K_{part}_LR_bicubic/X{s}/{k:04d}x{s}.png")
                save(degrade(hr, s), tmp_path / f"DIV2K_{part}_LR_mild/{k:04d}x{s}m.png")
    (tmp_path / "readme.txt").touch()
    pairs = load_photos(tmp_path, 2, 8, 0)
    megapixels = sum(hr.shape[0] * hr.shape[1] for _, hr in pairs) / 1e6
    error = capsys.readouterr().err
    assert len(pairs) == 6 and f"6 photographs, {megapixels:.3g} megapixels, from " in error
    assert f"3 in {tmp_path}/DIV2K_train_LR_bicubic/X2" in error
    assert "1 files of other kinds" in error


@pytest.mark.parametrize("large, small, advice", [
    ("{k}.png", "{k}_small.png", "into a folder HR"), ("{k}.png", "{k}x2.png", "into a folder HR"),
    ("a/{k}.png", "b/{k}.jpg", "pass "), ("{k}-big.png", "{k}-little.png", "into a folder HR"),
    ("full/{k}.png", "half/{k}.PNG", "pass ")])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_small_copies_that_no_name_tells_apart_are_refused(tmp_path, large, small, advice, scale):
    for k, hr in enumerate(LEAVES):
        save(hr, tmp_path / large.format(k=k))
        save(degrade(hr, scale), tmp_path / small.format(k=k))
    for use in (lambda: sets_in([tmp_path], 2)), (lambda: load_photos(tmp_path, 2, 8, 0)):
        with pytest.raises(ValueError, match=r"\A[^\n]*is a small copy of [^\n]*\Z") as error:
            use()
        assert advice in str(error.value) and ".png" in str(error.value)


def test_photographs_of_like_names_or_sizes_stay(tmp_path):
    for k in range(12):  # img_1 and img_11; sides in the ratio 2; a.png and a.jpg
        save(dead_leaves(64 if k % 2 else 32, RNG), tmp_path / f"img_{k}.png")
    save(dead_leaves(64, RNG), tmp_path / "a.png")
    save(dead_leaves(32, RNG), tmp_path / "a.jpg")
    save(dead_leaves(32, RNG), tmp_path / "a_b.jpg")
    save(dead_leaves(32, RNG), tmp_path / "other/a.jpg")
    assert len(find_photos(tmp_path, 2)[0]) == 16


@pytest.mark.parametrize("names", [
    "HR001 HR002 HR003", "original1 original2 original3", "gt1 gt2 beach", "original beach city",
    "1_HR 10 11 2", "img_HR img2 imgother", "a_original apple b", "HR/pix1 HR/pix2 HR/pix3",
    "HR/tile_x0_y1 HR/tile_x2_y1 HR/tile_x3_y1 HR/tile_x24_y1 HR/tile_x25_y1"])
def test_names_that_only_look_like_versions(tmp_path, names):
    for name in names.split():
        save(dead_leaves(64, RNG), tmp_path / f"{name}.png")
    assert len(find_photos(tmp_path, 2)[0]) == len(names.split())


def test_sets_whose_names_end_in_x2_are_two(tmp_path):
    for name in "mix2/a", "mix3/b", "Set5x2/HR/a", "LRbicx2/a":
        save(dead_leaves(64, RNG), tmp_path / f"{name}.png")
    sets = {name: len(paths) for name, paths in sets_in([tmp_path], 2).items()}
    assert sets == {"mix2": 1, "mix3": 1, "Set5": 1}


def test_of_a_folder_hr_with_copies_by_scale_the_photograph_stays(tmp_path):
    for name in "a", "a_x2", "b_HR_x2", "b_HR", "c", "cx2":
        save(dead_leaves(64, RNG), tmp_path / f"HR/{name}.png")
    assert [p.path.stem for p in find_photos(tmp_path, 2)[0]] == ["a", "b_HR", "c"]


def test_sets_left_out_hidden_linked_and_small_ones(tmp_path, capsys):
    for k, hr in enumerate(LEAVES):
        save(hr, tmp_path / f"data/Set5/HR/{k}.png")
        save(hr, tmp_path / f"data/Urban100/{k}.png")
        save(hr, tmp_path / f"elsewhere/{k + 10}.png")
        save(hr, tmp_path / f"data/Set5/HR/.ipynb_checkpoints/{k}-checkpoint.png")
        save(hr, tmp_path / f"data/.trash/{k}.png")
    save(LEAVES[0], tmp_path / "data/Set5/HR/.hidden.png")
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/Set5/HR/round").symlink_to(tmp_path / "data")
    sets = sets_in([tmp_path / "data"], 2)
    assert {name: len(paths) for name, paths in sets.items()} == \
        {"Set5": 3, "Urban100": 3, "linked": 3}
    assert len(load_photos(tmp_path / "data", 2, 8, 0)) == 9
    lay_out(tmp_path / "B", LAYOUTS["EDSR"])
    for name in "B/Set/LR_bicubic", "B/Set/LR_bicubic/X2":  # figures of Set, from its small copies
        with pytest.raises(ValueError, match="folder of small copies"):
            sets_in([tmp_path / name], 2)
    shutil.rmtree(tmp_path / "B/Set/HR")
    with pytest.raises(ValueError, match="small copies .LR. alone"):
        sets_in([tmp_path / "B"], 2)


def test_empty_names_are_refused(run, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    save(LEAVES[0], tmp_path / "here.png")
    for main, *options in ((evaluate.main, run, "--benchmark", ""), (evaluate.main, "", "--time"),
                           (evaluate.main, run, "--upscale", "here.png", "-o", ""),
                           (search.main, "--data", ""), (search.main, "--out", "")):
        assert "the name is empty" in refused(main, *options)
    with pytest.raises(ValueError, match="is empty"):
        load_photos("", 2, 8, 0)
    assert "search.py wrote" in refused(evaluate.main, run / "network.pt", "--time")


# --- Enlarging ----------------------------------------------------------------------------------

class Colours(torch.nn.Module):
    """A stand-in network of scale 2 that colours its input, and sees its neighbours."""
    architecture = Doubler.architecture

    def forward(self, x):
        x = torch.nn.functional.avg_pool2d(x, 7, 1, 3) * torch.tensor([1, 0.9, 0.8]).view(3, 1, 1)
        return torch.nn.functional.interpolate(x, scale_factor=2)


def enlarged(path, tmp_path, name="large.png", network=Colours()):
    evaluate.run_upscale(network, path, tmp_path / name)
    return Image.open(tmp_path / name)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_does_not_colour_the_rim(tmp_path, mode):
    y, x = np.mgrid[:64, :64]
    disc = np.uint8(255 * ((x - 30) ** 2 + (y - 33) ** 2 < 400))  # white on transparent black
    image = Image.fromarray(np.dstack([disc] * 4)).convert(mode)
    image.save(tmp_path / "disc.png")

    def whole(x):  # a network that only blurs
        return torch.nn.functional.interpolate(
            torch.nn.functional.avg_pool2d(x, 7, 1, 3, count_include_pad=False), scale_factor=2)
    network = Doubler()
    network.forward = whole
    large = enlarged(tmp_path / "disc.png", tmp_path, network=network)
    assert large.mode == mode
    white = Image.new("RGBA", large.size, "white")
    white.alpha_composite(large.convert("RGBA"))
    assert np.asarray(white).min() == 255
    Image.new("RGBA", (20, 20), (9, 9, 9, 0)).save(tmp_path / "nothing.png")  # nothing is visible
    assert enlarged(tmp_path / "nothing.png", tmp_path, network=network).size == (40, 40)


def png(kind, values, *chunks):
    """A PNG with 16 bits per value, which Pillow cannot write for all kinds."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(
            ">I", zlib.crc32(name + data))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunk(*c) for c in chunks) +
            chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_sixteen_bits_keep_what_eight_keep(tmp_path):
    values = RNG.integers(0, 65536, (9, 8, 4))
    values[0, 0] = 1000, 2000, 3000, 4000
    profile = b"iCCP", b"p\0\0" + zlib.compress(b"a profile")
    for name, data, mode in (
            ("grey", png(0, values[..., 0], profile), "L"),
            ("clear grey", png(0, values[..., 0], profile,
                               (b"tRNS", struct.pack(">H", 1000))), "LA"),
            ("grey + alpha", png(4, values[..., :2], profile), "LA"),
            ("colours", png(2, values[..., :3], profile), "RGB"),
            ("clear colours", png(2, values[..., :3], profile,
                                  (b"tRNS", struct.pack(">HHH", 1000, 2000, 3000))), "RGBA"),
            ("colours + alpha", png(6, values, profile), "RGBA")):
        (tmp_path / "deep.png").write_bytes(data)
        small, large = evaluate.open_photo(tmp_path / "deep.png"), enlarged(tmp_path / "deep.png",
                                                                            tmp_path)
        assert (small.mode, large.mode) == (mode, mode), name
        assert large.info["icc_profile"] == b"a profile", name
        if name.startswith("clear"):
            alpha = np.array(small.getchannel("A"))
            assert alpha[0, 0] == 0 and (alpha[1:] == 255).all(), name


def test_grey_stays_grey_however_it_is_stored(tmp_path):
    grey = np.repeat(dead_leaves(40, RNG)[..., :1], 3, 2)
    for name, image in ("rgb", grey), ("rgba", np.dstack([grey, grey[..., 0]])):
        save(image, tmp_path / f"{name}.png")
        large = enlarged(tmp_path / f"{name}.png", tmp_path)
        assert large.mode == name.upper()
        colours = np.asarray(large).astype(int)[..., :3]
        assert (colours == colours[..., :1]).all() and colours.std() > 5
    save(dead_leaves(40, RNG), tmp_path / "colours.png")
    colours = np.asarray(enlarged(tmp_path / "colours.png", tmp_path)).astype(int)
    assert (colours[..., 0] != colours[..., 2]).any()


def test_a_jpeg_has_all_its_colours(tmp_path):
    stripes = np.zeros((40, 60, 3), np.uint8)
    stripes[:, ::2, 0] = stripes[:, 1::2, 2] = 255
    save(stripes, tmp_path / "stripes.png")

    def same(lr):
        return torch.nn.functional.interpolate(lr, scale_factor=2)
    network = Doubler()
    network.forward = same
    a, b = (np.asarray(enlarged(tmp_path / "stripes.png", tmp_path, name, network)).astype(float)
            for name in ("a.png", "a.jpg"))
    assert 10 * np.log10(255 ** 2 / np.mean((a - b) ** 2)) > 35


def test_more_pictures_in_a_file_are_named_and_oddities_read(tmp_path, capsys):
    first, *others = [Image.fromarray(each) for each in LEAVES]
    others = [each.resize(first.size) for each in others]
    for name, options in ("a.png", dict(save_all=True)), ("a.tif", dict(save_all=True)):
        first.save(tmp_path / name, append_images=others, **options)
        enlarged(tmp_path / name, tmp_path)
        assert "holds 3 pictures; only the first is enlarged" in capsys.readouterr().out
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "long " * 10 ** 6, zip=True)
    first.save(tmp_path / "text.png", pnginfo=text)
    first.save(tmp_path / "exif.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff damaged")
    for name in "text.png", "exif.jpg":
        assert enlarged(tmp_path / name, tmp_path).width == 2 * first.width
        assert "note" not in capsys.readouterr().out


def test_photographs_of_phones_are_read(tmp_path):
    Image.new("L", (16384, 12500), 7).save(tmp_path / "large.png")  # 205 megapixels
    assert evaluate.open_photo(tmp_path / "large.png").size == (16384, 12500)


def test_figures_are_shown_where_they_cannot_be_saved(run, tmp_path, monkeypatch,  # noqa: F811
                                                       capsys):
    for name in "One", "Two":
        save(dead_leaves(64, RNG), tmp_path / name / "a.png")

    def fail(*args, **options):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(evaluate, "write_whole", fail)
    evaluate.main([str(run), "--benchmark", str(tmp_path)])
    out, error = capsys.readouterr()
    assert "### One" in out and "### Two" in out and "not saved" in error
    monkeypatch.setattr(evaluate.tempfile, "TemporaryFile", fail)
    photo, large = tmp_path / "One/a.png", tmp_path / "b.png"
    line = refused(evaluate.main, run, "--upscale", photo, "-o", large)
    assert "cannot write into the folder" in line


# --- A run and its photographs ------------------------------------------------------------------

def test_a_run_keeps_what_it_saw_and_says_when_that_changed(tmp_path, capsys):
    from test_search import run as search_run
    for k in range(4):
        save(dead_leaves(48, RNG), tmp_path / f"photos/{k}.png")
    out = search_run(tmp_path / "a", "--data", tmp_path / "photos", "--budget", "2G")
    kept = json.loads((out / "settings.json").read_text())["photographs"]
    assert kept["photographs"] == 4 and kept["pixels"] == 4 * 48 * 48
    assert f"4 photographs, 0.00922 megapixels, from {tmp_path}/photos" in kept["said"]
    os.rename(tmp_path / "photos", tmp_path / "moved")
    capsys.readouterr()
    assert "not a folder" in refused(search.main, "--resume", "--out", out)
    search.main(["--resume", "--out", str(out), "--data", str(tmp_path / "moved"),
                 "--device", "cpu"])
    assert "not the photographs" not in capsys.readouterr().err
    settings = json.loads((out / "settings.json").read_text())["settings"]
    assert settings["data"] == str(tmp_path / "moved")
    save(dead_leaves(48, RNG), tmp_path / "moved/0.png")  # as many pixels
    search.main(["--resume", "--out", str(out)])
    assert "not the photographs of before: then 4, 9216 pixels" in capsys.readouterr().err
    save(dead_leaves(64, RNG), tmp_path / "moved/more.png")
    search.main(["--resume", "--out", str(out)])
    assert "now 5, 13312" in capsys.readouterr().err
