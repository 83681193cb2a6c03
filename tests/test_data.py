"""The data sets: digits as it is, the others from small archives of the real layout, made here."""

import hashlib
import pickle
import tarfile
import urllib.error
import zipfile
import zlib

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
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


def write_image(path, i, size=(50, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour(i)).save(path, quality=95)


def pack(archive, folder):
    """An archive of everything in folder."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in folder.rglob("*"):
                file.write(path, path.relative_to(folder))
    else:
        with tarfile.open(archive, "w:gz" if archive.suffix in (".tgz", ".gz") else "w") as file:
            for path in folder.iterdir():
                file.add(path, path.name)


def make_cifar(tmp_path, data_dir, monkeypatch, name):
    cls = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    folder = tmp_path / "make" / cls.base_folder
    folder.mkdir(parents=True)
    key = "labels" if name == "cifar10" else "fine_labels"
    i = 0
    for lists in ("train_list", "test_list"):
        for file, _ in getattr(cls, lists):
            images = np.stack([np.broadcast_to(np.array(colour(i))[:, None], (3, 1024)) for i in (i, i + 1)])
            with open(folder / file, "wb") as f:
                pickle.dump(
                    {"data": images.reshape(2, 3072).astype(np.uint8), key: [i % 10, (i + 1) % 10]}, f
                )
            i += 2
    with open(folder / cls.meta["filename"], "wb") as f:
        pickle.dump({cls.meta["key"]: [str(c) for c in range(10)]}, f)
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5(folder / cls.meta["filename"])})
    for lists in ("train_list", "test_list"):
        monkeypatch.setattr(cls, lists, [[file, md5(folder / file)] for file, _ in getattr(cls, lists)])
    pack(data_dir / cls.filename, tmp_path / "make")
    monkeypatch.setattr(cls, "tgz_md5", md5(data_dir / cls.filename))


def make_aircraft(tmp_path, data_dir, monkeypatch, name):
    folder = tmp_path / "make/fgvc-aircraft-2013b/data"
    for i in range(5):
        write_image(folder / f"images/{i:07d}.jpg", i)
    (folder / "variants.txt").write_text("707-320\n727-200\n")
    (folder / "images_variant_trainval.txt").write_text("0000000 707-320\n0000001 727-200\n0000002 727-200\n")
    (folder / "images_variant_test.txt").write_text("0000003 727-200\n0000004 707-320\n")
    pack(data_dir / "fgvc-aircraft-2013b.tar.gz", tmp_path / "make")


def make_flowers(tmp_path, data_dir, monkeypatch, name):
    for i in range(5):
        write_image(tmp_path / f"make/jpg/image_{i + 1:05d}.jpg", i)
    target = data_dir / "flowers-102"
    target.mkdir()
    pack(target / "102flowers.tgz", tmp_path / "make")
    savemat(target / "imagelabels.mat", {"labels": np.array([[1, 2, 2, 2, 1]])})
    savemat(
        target / "setid.mat",
        {"trnid": np.array([[1, 2, 3]]), "valid": np.array([[3]]), "tstid": np.array([[4, 5]])},
    )
    names = {"image": "102flowers.tgz", "label": "imagelabels.mat", "setid": "setid.mat"}
    monkeypatch.setattr(
        torchvision.datasets.Flowers102,
        "_file_dict",
        {key: (file, md5(target / file)) for key, file in names.items()},
    )


def patch_archives(monkeypatch, name, paths):
    rows = [(url, md5(path)) for (url, _), path in zip(common.ARCHIVES[name], paths, strict=True)]
    monkeypatch.setitem(common.ARCHIVES, name, rows)


def make_tinyimagenet(tmp_path, data_dir, monkeypatch, name):
    folder = tmp_path / "make/tiny-imagenet-200"
    for i, wnid in enumerate(["n01", "n02", "n02"]):
        write_image(folder / f"train/{wnid}/images/{wnid}_{i}.JPEG", i, (64, 64))
    for i in (3, 4):
        write_image(folder / f"val/images/val_{i}.JPEG", i, (64, 64))
    (folder / "wnids.txt").write_text("n02\nn01\n")  # not sorted, as in the real file
    (folder / "val/val_annotations.txt").write_text(
        "val_3.JPEG\tn02\t0\t0\t62\t62\nval_4.JPEG\tn01\t0\t0\t62\t62\n"
    )
    pack(data_dir / "tiny-imagenet-200.zip", tmp_path / "make")
    patch_archives(monkeypatch, name, [data_dir / "tiny-imagenet-200.zip"])


def make_cub2011(tmp_path, data_dir, monkeypatch, name):
    folder = tmp_path / "make/CUB_200_2011"
    classes = [1, 2, 2, 2, 1]
    for i, c in enumerate(classes):
        write_image(folder / f"images/00{c}.Bird/{i}.jpg", i)
    (folder / "images.txt").write_text(
        "".join(f"{i + 1} 00{c}.Bird/{i}.jpg\n" for i, c in enumerate(classes))
    )
    (folder / "image_class_labels.txt").write_text("".join(f"{i + 1} {c}\n" for i, c in enumerate(classes)))
    (folder / "train_test_split.txt").write_text("1 1\n2 1\n3 1\n4 0\n5 0\n")
    pack(data_dir / "CUB_200_2011.tgz", tmp_path / "make")
    patch_archives(monkeypatch, name, [data_dir / "CUB_200_2011.tgz"])


def make_dogs(tmp_path, data_dir, monkeypatch, name):
    for i, c in enumerate([1, 2, 2, 2, 1]):
        write_image(tmp_path / f"make/Images/n0{c}-Dog/{i}.jpg", i)
    pack(data_dir / "images.tar", tmp_path / "make")
    lists = tmp_path / "lists"
    lists.mkdir()
    for split, rows in [("train", [(0, 1), (1, 2), (2, 2)]), ("test", [(3, 2), (4, 1)])]:
        files = np.empty((len(rows), 1), dtype=object)
        files[:, 0] = [f"n0{c}-Dog/{i}.jpg" for i, c in rows]
        savemat(lists / f"{split}_list.mat", {"file_list": files, "labels": np.array([[c] for _, c in rows])})
    pack(data_dir / "lists.tar", lists)
    patch_archives(monkeypatch, name, [data_dir / "images.tar", data_dir / "lists.tar"])


MAKERS = {
    "cifar10": make_cifar,
    "cifar100": make_cifar,
    "aircraft": make_aircraft,
    "flowers": make_flowers,
    "tinyimagenet": make_tinyimagenet,
    "cub2011": make_cub2011,
    "dogs": make_dogs,
}


@pytest.fixture
def data_dir(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.mark.parametrize("name", MAKERS)
def test_archives_of_the_real_layout(name, tmp_path, data_dir, monkeypatch, capsys):
    MAKERS[name](tmp_path, data_dir, monkeypatch, name)
    with pytest.raises(SystemExit):  # a few images do not pass for the whole data set
        common.load_images(name, "train", data_dir)
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"of {name}'s" in message and "unpacked again" in message
    count = (10 if name == "cifar10" else 2, 2) if name.startswith("cifar") else (3, 2)
    monkeypatch.setitem(common.DATASETS, name, common.DATASETS[name]._replace(count=count))
    train, test = (common.load_images(name, split, data_dir) for split in ("train", "test"))
    size = 64 if name == "tinyimagenet" else 32
    if name.startswith("cifar"):
        n = 10 if name == "cifar10" else 2
        expected = list(range(n)), [i % 10 for i in range(n)], [n, n + 1], [n % 10, (n + 1) % 10]
    else:
        expected = [0, 1, 2], [0, 1, 1], [3, 4], [1, 0]
    for part, images, labels in [(train, *expected[:2]), (test, *expected[2:])]:
        assert part.images.shape == (len(images), 3, size, size) and part.images.dtype == torch.uint8
        assert part.labels.tolist() == labels
        colours = torch.tensor([colour(i) for i in images]).float()
        torch.testing.assert_close(part.images.float().mean((2, 3)), colours, atol=4, rtol=0)
        torch.testing.assert_close(part.mean, torch.tensor(common.DATASETS[name].mean))
    again = common.load_images(name, "train", data_dir, image_size=8, limit=2)  # unpacked already
    assert again.images.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("name", MAKERS)
def test_without_network_and_files(name, data_dir, capsys):
    with pytest.raises(SystemExit) as stop:
        common.load_images(name, "train", data_dir)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert "http" in message and str(data_dir) in message and name in message


@pytest.mark.parametrize("name", ["tinyimagenet", "cub2011", "dogs"])
def test_a_broken_archive_is_no_data_set(name, tmp_path, data_dir, monkeypatch, capsys):
    MAKERS[name](tmp_path, data_dir, monkeypatch, name)
    archive = data_dir / common.ARCHIVES[name][0][0].rsplit("/", 1)[1]
    archive.write_bytes(archive.read_bytes()[:-20])
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            common.load_images(name, "train", data_dir)
        assert stop.value.code == 2 and archive.name in capsys.readouterr().err


def test_digits():
    train, test = (common.load_images("digits", split, "data") for split in ("train", "test"))
    assert train.images.shape == (1297, 1, 8, 8) and test.images.shape == (500, 1, 8, 8)
    assert set(train.labels.tolist()) == set(range(10))
    x = common.normalise(train.images, train.mean, train.std)
    assert x.mean().item() == pytest.approx(0, abs=1e-4) and x.std().item() == pytest.approx(1, abs=1e-3)
    assert train.images.max() == 255 and train.images.min() == 0


def test_limit_is_spread_over_the_set():
    train = common.load_images("digits", "train", "data")
    few = common.load_images("digits", "train", "data", limit=10)
    assert torch.equal(few.images, train.images[[i * 1297 // 10 for i in range(10)]])


# -- image folders -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for split, classes in [("train", "abc"), ("test", "ac")]:
        for i, c in enumerate(classes):
            write_image(tmp_path / f"own/{split}/{c}/0.png", i, (20, 30))
    return tmp_path / "own"


def test_image_folder(folder):
    train = common.load_images("imagefolder", "train", folder)
    assert train.images.shape == (3, 3, 32, 32) and train.labels.tolist() == [0, 1, 2]
    test = common.load_images(f"imagefolder:{folder}", "test", "elsewhere", image_size=16)
    assert test.images.shape == (2, 3, 16, 16)
    assert test.labels.tolist() == [0, 2]  # numbered by the training classes, though b is not there
    expected = torch.tensor([colour(i) for i in range(3)]) / 255
    torch.testing.assert_close(train.mean, expected.mean(0), atol=1e-3, rtol=0)
    torch.testing.assert_close(train.std, expected.std(0, correction=0).clamp(min=0.01), atol=2e-3, rtol=0)


def test_images_mapped_from_a_file(folder, tmp_path, monkeypatch, capsys):
    """What does not fit in memory is decoded once, is the same, and is decoded anew when a file changes."""
    inside = common.load_images("imagefolder", "train", folder)
    monkeypatch.setattr(common, "IN_MEMORY", 0)
    name, opened, loader = f"imagefolder:{folder}", [], common.read_image
    monkeypatch.setattr(common, "read_image", lambda path: opened.append(path) or loader(path))
    for times in (3, 3):  # the second time no image is opened
        mapped = common.load_images(name, "train", tmp_path / "data")
        assert all(torch.equal(a, b) for a, b in zip(mapped[:4], inside[:4])) and len(opened) == times
    assert capsys.readouterr().out.count("decoding 3 images") == 1
    (path,) = (tmp_path / "data/decoded").glob("*.uint8")
    assert path.stat().st_size == inside.images.numel()
    path.write_bytes(b"cut off")
    assert torch.equal(common.load_images(name, "train", tmp_path / "data").images, inside.images)
    (broken,) = (folder / "train/a").iterdir()
    broken.write_bytes(b"no image")
    with pytest.raises(SystemExit):
        common.load_images(name, "train", tmp_path / "data")
    assert str(broken) in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "data/decoded").iterdir() if p.name != ".lock"] == [path.name]


def test_a_folder_that_cannot_be_locked(tmp_path):
    (tmp_path / ".lock").mkdir()
    with common.one_at_a_time(tmp_path):
        pass


@pytest.mark.parametrize("ahead", [False, True])
def test_rows_are_fetched_in_order(ahead):
    images, targets = torch.arange(12).view(6, 2), torch.arange(6)
    batches = [torch.tensor([4, 1]), slice(0, 3), torch.tensor([], dtype=torch.int64), torch.tensor([5])]
    fetch = common._fetch_ahead if ahead else common.fetch
    found = list(fetch([images, targets], iter(batches), "cpu"))
    assert len(found) == 4
    for batch, (x, z) in zip(batches, found):
        assert torch.equal(x, images[batch]) and torch.equal(z, targets[batch])
    with pytest.raises(IndexError):  # an error of the thread is the reader's
        list(fetch([images], [torch.tensor([9])], "cpu"))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1"])
def test_modes_of_images(folder, mode):
    Image.new("RGB", (9, 9), (200, 200, 200)).convert(mode).save(
        folder / f"train/a/x.{'jpg' if mode == 'CMYK' else 'png'}"
    )
    assert common.load_images("imagefolder", "train", folder).images[1].float().mean() > 150


def test_images_of_sixteen_bits(folder):
    """A ramp of 16 bits keeps its shades, where PIL's convert makes all above 255 white."""
    ramp = np.linspace(0, 2**16 - 1, 32).round().astype(np.uint16)
    expected = torch.from_numpy((ramp // 256).astype(np.int64))
    for name in ("x.png", "y.tiff"):
        Image.fromarray(np.tile(ramp, (32, 1))).save(folder / f"train/a/{name}")
    images = common.load_images("imagefolder", "train", folder).images[1:3]
    assert torch.equal(images.long(), expected.expand(2, 3, 32, 32))


def test_a_palette_with_transparency_does_not_warn(folder, recwarn):
    image = Image.new("P", (9, 9), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.save(folder / "train/a/x.png", transparency=bytes([0, 128]))
    images = common.load_images("imagefolder", "train", folder).images
    assert images[1].flatten(1).float().mean(1).tolist() == [10, 200, 30] and not recwarn.list


def test_images_of_all_sizes_and_names(folder):
    sizes = {"größe ü.png": (1, 1), "图像.PNG": (3000, 2), "a b'\"$.jpeg": (31, 33)}
    for i, (name, size) in enumerate(sizes.items()):
        write_image(folder / f"train/b/{name}", 10 + i, size)
    (folder / "train/c").rename(folder / "train/Ćć 类")
    (folder / "test/c").rename(folder / "test/Ćć 类")
    train = common.load_images("imagefolder", "train", folder)
    assert train.images.shape == (6, 3, 32, 32) and sorted(train.labels.tolist()) == [0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("what", ["cut off", "zero bytes", "text", "floats", "a bomb"])
def test_images_that_are_none(what, folder, capsys):
    """Each is refused by its name, in one line, and so is the data set."""
    path = folder / f"train/b/größe.{'tiff' if what == 'floats' else 'jpg'}"
    write_image(folder / "whole.jpg", 3, (300, 200))
    wrong = {"cut off": (folder / "whole.jpg").read_bytes()[:-300], "zero bytes": b"", "text": b"hello\n"}
    if what == "floats":
        Image.fromarray(np.ones((4, 4), np.float32)).save(path)
    elif what == "a bomb":  # 2^30 pixels in a few bytes
        header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (2**15).to_bytes(4, "big") * 2 + b"\x08\0\0\0\0"
        path.write_bytes(header + zlib.crc32(header[12:]).to_bytes(4, "big"))
    else:
        path.write_bytes(wrong[what])
    with pytest.raises(SystemExit) as stop:
        common.load_images("imagefolder", "train", folder)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and str(path) in message


@pytest.mark.parametrize("name", MAKERS)
def test_a_data_set_that_was_unpacked_in_part(name, tmp_path, data_dir, monkeypatch, capsys):
    """One file of what was unpacked is gone, or cut off: refused in one line, whatever the file."""
    MAKERS[name](tmp_path, data_dir, monkeypatch, name)
    count = (10 if name == "cifar10" else 2, 2) if name.startswith("cifar") else (3, 2)
    monkeypatch.setitem(common.DATASETS, name, common.DATASETS[name]._replace(count=count))
    archives = {path for path in data_dir.rglob("*") if path.is_file()}
    for split in ("train", "test"):
        common.load_images(name, split, data_dir)
    unpacked = [p for p in data_dir.rglob("*") if p.is_file() and p not in archives and p.name != ".lock"]
    for path in archives:
        if path.suffix != ".mat":  # nothing to be unpacked again from
            path.unlink()
    assert unpacked
    for path in unpacked:
        data = path.read_bytes()
        for part in (None, b"", data[: len(data) // 2]):
            path.unlink() if part is None else path.write_bytes(part)
            capsys.readouterr()
            try:
                sets = [common.load_images(name, split, data_dir) for split in ("train", "test")]
            except SystemExit as stop:
                assert stop.code == 2 and capsys.readouterr().err.count("\n") == 1
            else:  # a file that is not needed
                assert [len(part.images) for part in sets] == list(count)
            path.write_bytes(data)


def test_a_download_that_breaks_off(data_dir, monkeypatch, capsys):
    """What has come is not taken for an archive, now or the next time."""

    def broken(url, root, filename, md5):
        (data_dir / filename).write_bytes(b"the first bytes")
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(common, "download_url", broken)
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            common.load_images("cub2011", "train", data_dir)
        assert stop.value.code == 2 and "CUB_200_2011.tgz" in capsys.readouterr().err
    assert not (data_dir / "cub2011").exists()


def test_bad_image_folders(folder, capsys):
    def refuses(*words, split="train"):
        with pytest.raises(SystemExit) as stop:
            common.load_images("imagefolder", split, folder)
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.count("\n") == 1
        for word in words:
            assert word in message

    write_image(folder / "test/zebra/0.png", 0)
    refuses("zebra", "train", split="test")
    (folder / "train/a/broken.png").write_bytes(b"not an image")
    refuses("broken.png")
    (folder / "train/a/broken.png").write_bytes((folder / "train/a/0.png").read_bytes()[:60])
    refuses("broken.png")
    (folder / "train/empty").mkdir()
    refuses("empty")
    (folder / "train").rename(folder / "training")
    refuses("no such folder", "train")
