"""The data sets: digits as it is, the others from small archives of the real layout, made here."""

import fcntl
import hashlib
import multiprocessing
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
import urllib.error
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, refuses
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.io import savemat

import common


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in the tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def colour(i):
    """A colour of its own for image i, that JPEG keeps within a few levels."""
    return (40 + 10 * i, 200 - 10 * i, 100)


def write_image(path, i=0, size=(50, 40), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour(i)).save(path, quality=95, **options)


def write_lines(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))


def load(folder, split="train", name="imagefolder", **options):
    return common.load_images(f"{name}:{folder}", split, folder.parent / "data", **options)


# ---- Archives ----------------------------------------------------------------------------------------------

# A maker writes archives into data_dir, of images 0 to 4, three to train and two to test (CIFAR: two a file),
# and returns the MD5 of those that have one in common.DATASETS. CIFAR's classes are i % 10.
CLASSES = [1, 2, 2, 2, 1]


def pack(archive, folder):
    """An archive of everything in folder; its MD5."""
    kind = {".zip": "zip", ".tar": "tar"}.get(archive.suffix, "gztar")
    Path(shutil.make_archive(archive.parent / "made", kind, folder)).rename(archive)
    return md5(archive)


def make_cifar(make, data_dir, monkeypatch, name):
    cls, i = getattr(torchvision.datasets, name.upper()), 0
    folder, key = make / cls.base_folder, "labels" if name == "cifar10" else "fine_labels"
    folder.mkdir(parents=True)

    def dump(name, contents):
        (folder / name).write_bytes(pickle.dumps(contents))
        return name, md5(folder / name)

    for part in ("train_list", "test_list"):
        files = []
        for file, _ in getattr(cls, part):
            rows = np.repeat([colour(i), colour(i + 1)], 1024, axis=1).astype(np.uint8)
            files.append(dump(file, {"data": rows, key: [i % 10, (i + 1) % 10]}))
            i += 2
        monkeypatch.setattr(cls, part, files)
    _, digest = dump(cls.meta["filename"], {cls.meta["key"]: [str(c) for c in range(10)]})
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": digest})
    monkeypatch.setattr(cls, "tgz_md5", pack(data_dir / cls.filename, make))


def make_aircraft(make, data_dir, monkeypatch, name):
    folder, variants = make / "fgvc-aircraft-2013b/data", ["707-320", "727-200"]
    for i in range(5):
        write_image(folder / f"images/{i:07d}.jpg", i)
    write_lines(folder / "variants.txt", *variants)
    rows = [f"{i:07d} {variants[c - 1]}" for i, c in enumerate(CLASSES)]
    write_lines(folder / "images_variant_trainval.txt", *rows[:3])
    write_lines(folder / "images_variant_test.txt", *rows[3:])
    pack(data_dir / "fgvc-aircraft-2013b.tar.gz", make)


def make_flowers(make, data_dir, monkeypatch, name):
    for i in range(5):
        write_image(make / f"jpg/image_{i + 1:05d}.jpg", i)
    folder = data_dir / "flowers-102"
    folder.mkdir()
    pack(folder / "102flowers.tgz", make)
    savemat(folder / "imagelabels.mat", {"labels": np.array([CLASSES])})
    parts = {"trnid": [1, 2, 3], "valid": [3], "tstid": [4, 5]}
    savemat(folder / "setid.mat", {part: np.array([ids]) for part, ids in parts.items()})
    names = {"image": "102flowers.tgz", "label": "imagelabels.mat", "setid": "setid.mat"}
    files = {key: (file, md5(folder / file)) for key, file in names.items()}
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_file_dict", files)


def make_tinyimagenet(make, data_dir, monkeypatch, name):
    folder, names = make / "tiny-imagenet-200", ["n01", "n02"]
    for i, c in enumerate(CLASSES):
        path = f"train/{names[c - 1]}/images/{i}.JPEG" if i < 3 else f"val/images/val_{i}.JPEG"
        write_image(folder / path, i, (64, 64))
    write_lines(folder / "wnids.txt", "n02", "n01")  # not sorted, as in the real file
    rows = [f"val_{i}.JPEG\t{names[CLASSES[i] - 1]}\t0\t0\t62\t62" for i in (3, 4)]
    write_lines(folder / "val/val_annotations.txt", *rows)
    return [pack(data_dir / "tiny-imagenet-200.zip", make)]


def make_cub2011(make, data_dir, monkeypatch, name):
    folder = make / "CUB_200_2011"
    for i, c in enumerate(CLASSES):
        write_image(folder / f"images/00{c}.Bird/{i}.jpg", i)
    write_lines(folder / "images.txt", *(f"{i + 1} 00{c}.Bird/{i}.jpg" for i, c in enumerate(CLASSES)))
    write_lines(folder / "image_class_labels.txt", *(f"{i + 1} {c}" for i, c in enumerate(CLASSES)))
    write_lines(folder / "train_test_split.txt", *(f"{i + 1} {int(i < 3)}" for i in range(5)))
    return [pack(data_dir / "CUB_200_2011.tgz", make)]


def make_dogs(make, data_dir, monkeypatch, name):
    files = np.array([f"n0{c}-Dog/{i}.jpg" for i, c in enumerate(CLASSES)], dtype=object)[:, None]
    for i, (file,) in enumerate(files):
        write_image(make / "images/Images" / file, i)
    (make / "lists").mkdir()
    for split, part in (("train", slice(3)), ("test", slice(3, 5))):
        lists = {"file_list": files[part], "labels": np.array(CLASSES)[part, None]}
        savemat(make / f"lists/{split}_list.mat", lists)
    return [pack(data_dir / f"{part}.tar", make / part) for part in ("images", "lists")]


MAKERS = {"cifar10": make_cifar, "cifar100": make_cifar, "aircraft": make_aircraft, "flowers": make_flowers,
          "tinyimagenet": make_tinyimagenet, "cub2011": make_cub2011, "dogs": make_dogs}
COUNTS = {name: (3, 2) for name in MAKERS} | {"cifar10": (10, 2), "cifar100": (2, 2)}


@pytest.fixture
def data_dir(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture
def make(tmp_path, data_dir, monkeypatch):
    """make(name): the archives of a data set of a few images, in data_dir, which count as the whole set."""

    def make(name):
        row, digests = common.DATASETS[name], MAKERS[name](tmp_path / "make", data_dir, monkeypatch, name)
        archives = [(url, digest) for (url, _), digest in zip(row.archives, digests or [])]
        row = row._replace(count=COUNTS[name], archives=archives or row.archives)
        monkeypatch.setitem(common.DATASETS, name, row)

    return make


def load_both(name, data_dir):
    return [common.load_images(name, split, data_dir) for split in ("train", "test")]


@pytest.mark.parametrize("name", MAKERS)
def test_archives_of_the_real_layout(name, make, data_dir, monkeypatch):
    whole = common.DATASETS[name].count
    make(name)
    first, size = 0, 64 if name == "tinyimagenet" else 32
    for part, count in zip(load_both(name, data_dir), COUNTS[name]):
        indices, first = range(first, first + count), first + count
        assert part.images.shape == (count, 3, size, size) and part.images.dtype == torch.uint8
        labels = [i % 10 if name.startswith("cifar") else CLASSES[i] - 1 for i in indices]
        assert part.labels.tolist() == labels and part.labels.dtype == torch.int64
        colours = torch.tensor([colour(i) for i in indices]).float()
        torch.testing.assert_close(part.images.float().mean((2, 3)), colours, atol=4, rtol=0)
        torch.testing.assert_close(part.mean, torch.tensor(common.DATASETS[name].mean))
    again = common.load_images(name, "train", data_dir, image_size=8, limit=2)  # unpacked already
    assert again.images.shape == (2, 3, 8, 8)
    # A few images do not pass for the whole data set.
    monkeypatch.setitem(common.DATASETS, name, common.DATASETS[name]._replace(count=whole))
    message = f"has {COUNTS[name][0]} of {whole[0]} train images of {name}"
    refuses(lambda: common.load_images(name, "train", data_dir), message)


@pytest.mark.parametrize("name", MAKERS)
def test_without_network_and_files(name, data_dir):
    refuses(lambda: common.load_images(name, "train", data_dir), "http", data_dir, name)


@pytest.mark.parametrize("name", ["tinyimagenet", "cub2011", "dogs"])
def test_a_broken_archive_is_no_data_set(name, make, data_dir):
    make(name)
    archive = data_dir / common.DATASETS[name].archives[0][0].rsplit("/", 1)[1]
    archive.write_bytes(archive.read_bytes()[:-20])
    for _ in range(2):
        refuses(lambda: common.load_images(name, "train", data_dir), archive.name)


def test_a_download_that_breaks_off(data_dir, monkeypatch):
    """What has come is not taken for an archive, now or the next time."""

    def broken(url, root, filename, md5):
        (data_dir / filename).write_bytes(b"the first bytes")
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", broken)
    for _ in range(2):
        refuses(lambda: common.load_images("cub2011", "train", data_dir), "CUB_200_2011.tgz")
    assert not (data_dir / "cub2011").exists()


@pytest.mark.parametrize("name", MAKERS)
def test_a_data_set_that_was_unpacked_in_part(name, make, data_dir):
    """One file of what was unpacked is gone, or cut off: refused in one line, whatever the file."""
    make(name)
    archives = {path for path in data_dir.rglob("*.*") if path.is_file()}
    load_both(name, data_dir)
    unpacked = {path for path in data_dir.rglob("[!.]*") if path.is_file() and path.suffix != ".npy"}
    for path in archives:
        if path.suffix != ".mat":  # nothing to be unpacked again from
            path.unlink()
    assert unpacked - archives
    for path in unpacked - archives:
        data = path.read_bytes()
        for part in (None, b"", data[: len(data) // 2]):
            path.unlink() if part is None else path.write_bytes(part)
            try:
                assert [len(part.images) for part in load_both(name, data_dir)] == list(COUNTS[name])
            except common.Problem as problem:
                assert f"{data_dir}" in f"{problem}"
            path.write_bytes(data)


def test_digits():
    train, test = load_both("digits", "data")
    assert train.images.shape == (1297, 1, 8, 8) and test.images.shape == (500, 1, 8, 8)
    assert set(train.labels.tolist()) == set(range(10))
    x = common.normalise(train.images, train)
    assert x.mean().item() == pytest.approx(0, abs=1e-4) and x.std().item() == pytest.approx(1, abs=1e-3)
    assert train.images.max() == 255 and train.images.min() == 0
    few = common.load_images("digits", "train", "data", limit=10)  # evenly spaced
    assert torch.equal(few.images, train.images[[i * 1297 // 10 for i in range(10)]])


# ---- Image folders -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for split, classes in [("train", "abc"), ("test", "ac")]:
        for i, c in enumerate(classes):
            write_image(tmp_path / f"own/{split}/{c}/0.png", i, (20, 30))
    return tmp_path / "own"


@pytest.mark.parametrize("part", ["test", "val"])
def test_image_folder(folder, part, capsys):
    train = load(folder)
    assert train.images.shape == (3, 3, 32, 32) and train.labels.tolist() == [0, 1, 2]
    expected = torch.tensor([colour(i) for i in range(3)]) / 255
    torch.testing.assert_close(train.mean, expected.mean(0), atol=1e-3, rtol=0)
    torch.testing.assert_close(train.std[:2], expected.std(0, correction=0)[:2], atol=1e-3, rtol=0)
    (folder / "test").rename(folder / part)
    test = load(folder, "test", image_size=16)
    assert test.images.shape == (2, 3, 16, 16)
    assert test.labels.tolist() == [0, 2]  # numbered by the training classes, though b is not there
    assert ("images of val are taken" in capsys.readouterr().out) == (part == "val")


def test_images_without_labels(folder, capsys):
    sizes = {"größe/ü/1.png": (1, 1), "größe/图像.PNG": (3000, 2), "a b'\"$.jpeg": (31, 33),
             "train/a/1.bmp": (9, 9)}
    for i, (name, size) in enumerate(sizes.items(), 5):
        write_image(folder / name, i, size)
    for name in (".ipynb_checkpoints/0.png", "größe/._x.png", "größe/notes.txt"):
        write_image(folder / name, format="PNG")
    for split in ("train", "test"):
        found = load(folder, split, "images")
        assert found.labels is None
        expected = torch.tensor([colour(i) for i in (7, 6, 5, 0, 1, 0, 8, 1, 2)]).float()
        torch.testing.assert_close(found.images.float().mean((2, 3)), expected, atol=4, rtol=0)
        assert "passed over 2 hidden files or folders, and 1 files with" in capsys.readouterr().out


def test_hidden_folders_are_no_classes(folder, capsys):
    for name in ("train/.ipynb_checkpoints/0.png", "test/.ipynb_checkpoints/0.png", "train/b/._0.png"):
        write_image(folder / name)
    (folder / "train/c").rename(folder / "train/Ćć 类")
    (folder / "test/c").rename(folder / "test/Ćć 类")
    assert load(folder).labels.tolist() == [0, 1, 2] and load(folder, "test").labels.tolist() == [0, 2]
    assert "train: passed over 2 hidden files or folders" in capsys.readouterr().out


def test_links(folder, tmp_path):
    """Those to files and other folders are followed, but for those to a folder that one came from."""
    for name in ("else/0.png", "else/where/1.png", "single.png"):
        write_image(tmp_path / name, 9)
    links = {"up": "own", "here": "own/train/b", "2.png": "single.png", "3": "else/where", "../d": "else"}
    for name, target in links.items():
        (folder / "train/b" / name).symlink_to(tmp_path / target)
    assert load(folder).labels.tolist() == [0, 1, 1, 1, 2, 3, 3]
    assert len(load(folder, name="images").images) == 2 + 6  # what several links lead to is there once


def test_images_are_decoded_once(folder, tmp_path, monkeypatch):
    """Into a file, which is mapped; anew when an image has changed."""
    opened, read = [], common.read_image
    monkeypatch.setattr(common, "read_image", lambda path: opened.append(path) or read(path))
    first, second = load(folder), load(folder)
    assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4])) and len(opened) == 3
    write_image(folder / "train/a/0.png", 7)
    changed = load(folder).images
    assert torch.equal(changed[1:], first.images[1:]) and len(opened) == 6
    assert changed[0].flatten(1).float().mean(1).tolist() == list(colour(7))
    load(folder, image_size=8), load(folder, limit=2)
    assert len(opened) == 11 and len(list((tmp_path / "data/decoded").glob("[!.]*"))) == 4



@pytest.mark.parametrize("size", [100, 3000, 0])
def test_a_decoded_file_that_was_cut_off(folder, tmp_path, size):
    expected = load(folder).images.clone()
    os.truncate(*(tmp_path / "data/decoded").glob("*.npy"), size)
    assert torch.equal(load(folder).images, expected)


@pytest.mark.parametrize("count", [3, 12])
def test_broken_images_are_all_named(folder, tmp_path, count):
    """Ten of them at most; nothing is left behind."""
    broken = [folder / f"train/b/broken {i:02}.png" for i in range(count)]
    for i, path in enumerate(broken):
        path.write_bytes((b"", b"no image", (folder / "train/a/0.png").read_bytes()[:60])[i % 3])
    message = refuses(lambda: load(folder), f"{count} of {3 + count} images", *broken[:10])
    assert (str(broken[-1]) in message) == ("..." not in message) == (count <= 10)
    assert [path.name for path in (tmp_path / "data/decoded").iterdir()] == [".lock"]


@pytest.mark.parametrize("what", ["cut off", "floats", "a bomb", "a FIFO", "a broken link"])
def test_files_that_are_no_images(what, folder):
    path = folder / f"train/b/größe.{'tiff' if what == 'floats' else 'jpg'}"
    if what == "cut off":
        write_image(path, 3, (300, 200))
        os.truncate(path, path.stat().st_size - 300)
    elif what == "floats":
        Image.fromarray(np.ones((4, 4), np.float32)).save(path)
    elif what == "a bomb":  # 2^30 pixels in a few bytes
        header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (2**15).to_bytes(4, "big") * 2 + b"\x08\0\0\0\0"
        path.write_bytes(header + zlib.crc32(header[12:]).to_bytes(4, "big"))
    else:
        os.mkfifo(path) if what == "a FIFO" else path.symlink_to("nowhere.jpg")
    refuses(lambda: load(folder), path, "1 of 4 images")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1"])
def test_modes_of_images(folder, mode):
    image = Image.new("RGB", (9, 9), (200, 200, 200)).convert(mode)
    image.save(folder / f"train/a/x.{'jpg' if mode == 'CMYK' else 'png'}")
    assert load(folder).images[1].float().mean() > 150


def test_images_of_sixteen_bits(folder):
    """A ramp of 16 bits keeps its shades, where PIL's convert makes all above 255 white."""
    ramp = np.linspace(0, 2**16 - 1, 32).round().astype(np.uint16)
    for name in ("x.png", "y.tiff"):
        Image.fromarray(np.tile(ramp, (32, 1))).save(folder / f"train/a/{name}")
    Image.fromarray(np.tile(ramp, (32, 1))).save(folder / "train/a/z.png", transparency=0)
    expected = torch.from_numpy((ramp // 256).astype(np.uint8)).repeat(3, 3, 32, 1)
    expected[2, :, :, 0] = 255  # the shade 0 is transparent there
    assert torch.equal(load(folder).images[1:4], expected)


def test_transparency_is_laid_over_white(folder, recwarn):
    """In each mode that has it: a colour that lets 127 of 255 parts of white through, or all of it."""
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.save(folder / "train/a/1.png", transparency=bytes([0, 128]))
    Image.new("RGBA", (9, 9), (10, 200, 30, 128)).save(folder / "train/a/2.png")
    Image.new("LA", (9, 9), (40, 128)).save(folder / "train/a/3.png")
    for i, (mode, colour) in enumerate([("RGB", (10, 200, 30)), ("L", 40), ("1", 1)], 4):
        Image.new(mode, (9, 9), colour).save(folder / f"train/a/{i}.png", transparency=colour)
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(folder / "train/a/7.webp", lossless=True)
    found = load(folder).images[1:8].flatten(2).float().mean(2).tolist()
    assert found == [[132, 227, 142], [132, 227, 142], [147] * 3, *[[255] * 3] * 4] and not recwarn.list


def test_images_are_turned_upright(folder):
    image, exif = Image.new("RGB", (32, 32)), Image.Exif()
    image.paste((255, 255, 255), (0, 0, 16, 32))  # white at the left, which orientation 6 has at the top
    exif[0x0112] = 6
    for name in ("x.png", "y.jpg"):
        image.save(folder / f"train/a/{name}", exif=exif)
    for upright in load(folder).images[1:3].float():
        assert upright[:, :16].min() > 200 and upright[:, 16:].max() < 50


@pytest.mark.parametrize("tag, text, pointer", [(5, b"0\0", 0x8825), (282, b"72\0", None)])
def test_other_tags_do_not_count(folder, tag, text, pointer):
    """A sound JPEG with orientation 6 and another tag, in the part `pointer`, that is text by mistake."""
    turn, odd = struct.pack("<HHIHH", 274, 3, 1, 6, 0), struct.pack("<HHI4s", tag, 2, len(text), text)
    first = odd if pointer is None else struct.pack("<HHII", pointer, 4, 1, 38)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + turn + first + bytes(4)
    exif += b"" if pointer is None else struct.pack("<H", 1) + odd + bytes(4)
    image = Image.new("RGB", (32, 32))
    image.paste((255, 255, 255), (0, 0, 16, 32))
    image.save(folder / "train/a/x.jpg", exif=exif)
    upright = load(folder).images[1].float()
    assert upright[:, :16].min() > 200 and upright[:, 16:].max() < 50


def test_images_that_cannot_be_read_say_why(folder, monkeypatch):
    path = folder / "train/a/x.tif"
    for pixels in (np.zeros((9, 9), "i4"), np.full((9, 9), 255, "i4"), np.zeros((9, 9), "f4")):
        Image.fromarray(pixels).save(path)
        refuses(lambda: load(folder), "1 of 4 images", path, "of unknown range")
    for tag, value in ((258, 12), (339, 2), (262, 0)):  # bits, signed, white is 0
        Image.fromarray(np.zeros((9, 9), "u2")).save(path, tiffinfo={339: 1})
        begin = (data := path.read_bytes()).index(struct.pack("<H", tag))
        path.write_bytes(data[: begin + 8] + struct.pack("<H", value) + data[begin + 10 :])
        refuses(lambda: load(folder), path)
    text = PngInfo()
    text.add_text("comment", "x" * 2_000_000, zip=True)
    Image.new("RGB", (9, 9)).save(path, "PNG", pnginfo=text)
    refuses(lambda: load(folder), f"{path} (a text longer than Pillow reads)")
    Image.new("1", (90, 90)).save(path, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    refuses(lambda: load(folder), f"{path} (8100 pixels, more than 8000)")


def test_images_that_are_all_the_same(folder):
    for path in folder.rglob("*.png"):
        write_image(path)
    refuses(lambda: load(folder), f"imagefolder:{folder}: all 3 train images are the same at 32 px")
    assert len(load(folder, limit=1).images) == 1


def test_labels_of_any_kind(monkeypatch):
    """Lists, arrays and tensors, as torchvision's data sets have them; no -1, as STL10 has."""
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    for of_images in (np.asarray, torch.as_tensor):
        for of_labels in (list, np.asarray, torch.tensor):
            def samples(*words, of_images=of_images, of_labels=of_labels):
                return of_images(images), of_labels([0, 1, 2, 0, 1, 2])

            monkeypatch.setattr(common, "samples", samples)
            found = common.load_images("digits", "train", "data", limit=4)
            assert found.labels.tolist() == [0, 1, 0, 1] and found.labels.dtype == torch.int64
            assert torch.equal(found.images[:, 0], torch.from_numpy(images[[0, 1, 3, 4]]))
    monkeypatch.setattr(common, "samples", lambda *words: (images, [0, 1, -1, 0, 1, 2]))
    refuses(lambda: common.load_images("digits", "train", "data"), "digits: has the label -1")


def test_folders_that_link_to_each_other(tmp_path):
    """Nine, each with links to the others: each is walked once from each."""
    for i in range(9):
        write_image(tmp_path / f"nine/{i}/0.png", i)
        for j in range(9):
            (tmp_path / f"nine/{i}/to{j}").symlink_to(f"../{j}")
    assert len(common.find_images(tmp_path / "nine")) == 81


def test_processes_that_decode_at_the_same_time(folder, tmp_path, monkeypatch):
    """On a file system without locks, too: each makes a file of its own, and any one stays."""
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(37, "No locks available")))
    fork, expected = multiprocessing.get_context("fork"), load(folder, image_size=100).images.clone()
    meet = fork.Barrier(3)
    shutil.rmtree(tmp_path / "data")

    def decode():
        meet.wait()
        os._exit(0 if torch.equal(load(folder, image_size=100).images, expected) else 1)

    processes = [fork.Process(target=decode) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list((tmp_path / "data/decoded").glob("[!.]*"))) == 1


def test_waiting_for_who_decodes(folder, tmp_path, capsys, monkeypatch):
    """Not where the images are there; else it is said once."""
    load(folder)
    with open(tmp_path / "data/decoded/.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        load(folder)
        assert ": waiting" not in capsys.readouterr().out
        naps = []
        nap = lambda seconds: naps.append(1) or len(naps) > 2 and file.close()  # noqa: E731
        monkeypatch.setattr(time, "sleep", nap)
        load(folder, image_size=9)
    assert capsys.readouterr().out.count(f"{tmp_path / 'data/decoded'}: waiting") == 1 and len(naps) == 3


def test_folders_that_are_none(folder, tmp_path, capsys):
    write_image(folder / "test/zebra/0.png")
    refuses(lambda: load(folder, "test"), "zebra", "train")
    for name in ("letter.docx", "photo.heic", "none"):
        (folder / "train/empty").mkdir(exist_ok=True)
        (folder / "train/empty" / name).touch()
    refuses(lambda: load(folder), "train: 'empty'", "no folder of DIR/train with images")
    assert "3 files with endings that are none of images (.docx .heic none)" in capsys.readouterr().out
    refuses(lambda: load(folder / "train/empty", name="images"), "train/empty", ".docx .heic none", ".webp")
    write_image(folder / "train/loose.png")
    (folder / "train/empty/none").rename(folder / "train/empty/some.png")
    write_image(folder / "train/empty/some.png")
    refuses(lambda: load(folder), "train: 'loose.png'")
    (folder / "train").rename(folder / "training")
    refuses(lambda: load(folder), folder / "train", "no such folder")
    refuses(lambda: load(tmp_path / "nowhere", name="images"), tmp_path / "nowhere")


@pytest.mark.skipif(not shutil.which("unshare"), reason="no file system of one's own")
def test_decoding_on_a_full_disk(folder, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    call = f"common.load_images('images:{folder}', 'train', '{small}', 200)"
    script = f"import common\ntry: {call}\nexcept common.Problem as problem: print(problem)"
    shell = f"mount -t tmpfs -o size=64k none '{small}' && echo mounted && exec '{sys.executable}' -"
    command = ["unshare", "-rm", "sh", "-c", shell]
    done = subprocess.run(command, cwd=ROOT, input=script, capture_output=True, text=True)
    if "mounted" not in done.stdout:
        pytest.skip(done.stderr)
    assert done.returncode == 0 and "decoded" in done.stdout and "No space" in done.stdout
