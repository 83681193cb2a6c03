"""What the stages of MKDT must agree on: data sets, networks, SSL losses and views, the probe, files.

A definition stands here when two stages would stop fitting together without it, or when it is an equation of
the paper (Joshi, Ni, Mirzasoleiman, "Dataset Distillation via Knowledge Distillation", ICLR 2025). The
training loops are in the scripts.

Letters in shapes: N real images, S synthetic images, B images of a batch, C channels, H x W pixels, D
dimension of the targets (the teacher's representation), F student features, P student parameters, E expert
epochs, K experts.
"""

import argparse
import contextlib
import ctypes
import datetime
import errno
import functools
import glob
import hashlib
import itertools
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# torchvision, scikit-learn and Pillow are imported where they are used: --help need not wait for them.


class Problem(Exception):
    """What the user can put right; ends in one line on stderr and exit status 2 (see run)."""


def seed_of(*key):
    """A seed that follows from the key alone, numbers and words: (seed, "views", step)."""
    words = [int.from_bytes(part.encode(), "big") if isinstance(part, str) else part for part in key]
    # With the length in front, for SeedSequence does not count zeros at the end.
    return int(np.random.SeedSequence([len(key), *words]).generate_state(1)[0])


def generator(device, *key):
    """A generator that follows from the key alone: a run that is resumed at a step needs no state of it."""
    return torch.Generator(device).manual_seed(seed_of(*key))


def seed_dropout(device, *key):
    """What a student draws by itself, by the global generators, follows from the key alone from here on."""
    torch.default_generator.manual_seed(seed_of(*key))  # torch.manual_seed takes 0.1 ms
    if not device.startswith("cpu"):
        getattr(torch, torch.device(device).type).manual_seed(seed_of(*key))


def shuffled(n, batch_size, *key, start=0, smallest=1):
    """Yields index tensors (B,) without end, from batch number `start` on: passes over range(n).

    The order of a pass follows from (key, its number). The last batch of a pass may be smaller than
    batch_size; one of fewer than `smallest` is left out. n and batch_size must be at least `smallest`.
    """
    per_pass = n // batch_size + (n % batch_size >= smallest)
    for number in itertools.count(start):
        epoch, i = divmod(number, per_pass)
        if i == 0 or number == start:
            order = torch.randperm(n, generator=generator("cpu", *key, epoch))
        yield order[i * batch_size : (i + 1) * batch_size]


# ---- Data sets ---------------------------------------------------------------------------------------------


class Dataset(NamedTuple):
    """A row of the table below."""

    size: int  # pixels; images are squashed to size x size, the aspect ratio is not kept (as the authors do)
    mean: tuple | None = None  # of the channels, in [0, 1]; None: measured on the images
    std: tuple | None = None
    count: tuple | None = None  # images to train and to test: a set with others is not whole
    archives: tuple = ()  # (URL, MD5) each; without MD5 torchvision has a class that knows it
    flip: bool = True  # whether a mirrored image is still an image of the same thing


# Sizes and statistics are those of the authors' code; every set is evaluated at its own size, also by an
# encoder that was pre-trained at another (the convolutions do not mind, the number of features F changes).
DATASETS = {
    "digits": Dataset(8, flip=False),
    "cifar10": Dataset(32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), (50_000, 10_000),
        [("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", None)]),
    "cifar100": Dataset(32, (0.5071, 0.4865, 0.4409), (0.2009, 0.1984, 0.2023), (50_000, 10_000),
        [("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", None)]),
    "tinyimagenet": Dataset(64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (100_000, 10_000),
        [("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")]),
    "aircraft": Dataset(32, (0.4804, 0.5116, 0.5349), (0.2021, 0.1953, 0.2297), (6_667, 3_333),
        [("https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz", None)]),
    "cub2011": Dataset(32, (0.4857, 0.4995, 0.4324), (0.2145, 0.2098, 0.2496), (5_994, 5_794),
        [("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
          "97eceeb196236b17998738112f37df78")]),
    "dogs": Dataset(32, (0.4765, 0.4516, 0.3911), (0.2490, 0.2435, 0.2479), (12_000, 8_580),
        [("http://vision.stanford.edu/aditya86/ImageNetDogs/images.tar", "1bb1f2a596ae7057f99d7d75860002ef"),
         ("http://vision.stanford.edu/aditya86/ImageNetDogs/lists.tar", "edbb9f16854ec66506b5f09b583e0656")]),
    "flowers": Dataset(32, (0.4329, 0.3820, 0.2965), (0.2828, 0.2333, 0.2615), (1_020, 6_149),
        [(f"https://thor.robots.ox.ac.uk/flowers/102/{name} (in the folder flowers-102)", None)
         for name in ("102flowers.tgz", "imagelabels.mat", "setid.mat")]),
    "imagefolder": Dataset(32),
    "images": Dataset(32),
}
DEPTH_HELP = "blocks (default: 2 at 16 px, 3 at 32 px, 4 at 64 px)"
DATASET_HELP = f"{', '.join(list(DATASETS)[:-2])}, imagefolder:DIR, or images:DIR, which has no labels"
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")  # of image files


class ImageSet(NamedTuple):
    """One split of a data set, on the CPU; the stages have mean and std on the device, for normalise."""

    images: torch.Tensor  # (N, C, H, W) uint8; of image files, mapped from DATA_DIR/decoded
    labels: torch.Tensor | None  # (N,) int64; None: there are none
    mean: torch.Tensor  # (C,) of the pixels in [0, 1]
    std: torch.Tensor  # (C,)
    flip: bool = True  # whether views may be mirrored


def parse_dataset(name, data_dir):
    """(key of DATASETS, folder of its files) of a data set's name; raises Problem if there is no such set."""
    key, _, folder = name.partition(":")
    if key not in DATASETS or (folder and key not in ("imagefolder", "images")):
        raise Problem(f"data set {name!r} is unknown: choose one of {DATASET_HELP}")
    return key, Path(folder or data_dir)


def load_images(name, split, data_dir, image_size=None, limit=None, device="cpu"):
    """One split of a data set as an ImageSet; raises Problem where the files cannot be had or read.

    Args:
        name: a key of DATASETS, or imagefolder:DIR or images:DIR (DIR defaults to data_dir).
        split: "train" or "test"; data_dir: where downloads and decoded images go.
        image_size: pixels, if not the table's; images of another size are squashed to it by Lanczos' filter.
        limit: keep only so many images, evenly spaced over the split; device: of mean and std.
    """
    key, folder = parse_dataset(name, data_dir)
    own_size, mean, std, count, _, flip = DATASETS[key]
    size, wanted = image_size or own_size, count and count[split == "test"]
    images, labels = samples(key, split, folder)
    advice = f"remove what {folder} has of {key}, and try again" if count else "replace or remove them"
    if wanted and len(images) != wanted:
        raise Problem(f"{folder}: has {len(images)} of {wanted} {split} images of {key}; {advice}")
    limit = min(limit or len(images), len(images))
    keep = [i * len(images) // limit for i in range(limit)]
    images = [np.asarray(images[i]) if torch.is_tensor(images) else images[i] for i in keep]
    labels = None if labels is None else torch.tensor([int(labels[i]) for i in keep])
    if labels is not None and labels.min() < 0:
        raise Problem(f"{name}: has the label {labels.min()}; they count from 0: leave unlabelled images out")
    arrays = isinstance(images[0], np.ndarray)
    images = torch.from_numpy(np.stack([squash(image, size) for image in images]) if arrays
                              else decode(images, size, Path(data_dir) / "decoded", advice))
    if limit > 1 and all(torch.equal(image, images[0]) for image in images):
        raise Problem(f"{name}: all {limit} {split} images are the same at {size} px; look at the files")
    if mean is None:
        parts = (part.float() / 255 for part in images.split(200))
        sums = sum(torch.stack([x, x.square()]).sum((1, 3, 4), dtype=torch.float64) for x in parts)
        mean, square = sums * images.shape[1] / images.numel()
        std = (square - mean.square()).clamp(min=1e-4).sqrt()
    mean, std = (torch.as_tensor(moment).float().to(device) for moment in (mean, std))
    return ImageSet(images, labels, mean, std, flip)


def samples(key, split, folder):
    """The images of a split, N arrays (H, W[, C]) uint8 or N paths, and their labels (N,), or None."""
    train = split == "train"
    if key == "digits":  # in the order of its writers, so that the test digits are by other hands
        from sklearn.datasets import load_digits

        digits, part = load_digits(), slice(1297) if train else slice(1297, None)
        return np.round(digits.images[part] * (255 / 16)).astype(np.uint8), list(digits.target[part])
    if key == "images":
        return find_images(folder), None
    if key == "imagefolder":
        return image_folder(split, folder)
    try:
        with one_at_a_time(folder):  # the first process downloads and unpacks, the others find it
            from torchvision import datasets

            if key in ("cifar10", "cifar100"):
                part = getattr(datasets, key.upper())(folder, train, download=True)
                return part.data, part.targets
            if key == "aircraft":  # 6,667 images: "trainval", labels by variant
                part = datasets.FGVCAircraft(folder, "trainval" if train else "test", download=True)
                return part._image_files, part._labels
            if key == "flowers":  # 1,020 images: "train" without "val", as the authors do
                part = datasets.Flowers102(folder, split, download=True)
                return part._image_files, part._labels
            return archived(key, split, unpack(key, folder))
    except Exception as error:  # torchvision, archives and lists raise many kinds
        urls = " and ".join(url + (f" (MD5 {md5})" if md5 else "") for url, md5 in DATASETS[key].archives)
        raise Problem(f"data set {key} is not in {folder}, or not whole there, and could not be downloaded "
                      f"({type(error).__name__}); remove what is there of it, and put there {urls}") from None


def unpack(key, data_dir):
    """The folder data_dir/KEY with the archives unpacked; what is not in data_dir yet is downloaded."""
    from torchvision.datasets.utils import download_and_extract_archive

    root = Path(data_dir) / key
    if not root.exists():
        partial = root.with_name(key + ".partial")  # moved into place when whole
        for url, md5 in DATASETS[key].archives:
            download_and_extract_archive(url, data_dir, partial, md5=md5)  # no download of one that is whole
        partial.rename(root)
    return root


def archived(key, split, root):
    """(paths, labels) of a split of a data set that torchvision has no class for, unpacked in root."""

    def column(path, number):
        return [line.split()[number] for line in path.read_text().splitlines()]

    if key == "dogs":
        from scipy.io import loadmat  # a dependency of scikit-learn

        lists = loadmat(root / f"{split}_list.mat", squeeze_me=True)
        return [root / "Images" / str(name) for name in lists["file_list"]], list(lists["labels"] - 1)
    if key == "cub2011":
        root = root / "CUB_200_2011"
        files = ("images.txt", "image_class_labels.txt", "train_test_split.txt")
        rows = zip(*(column(root / name, 1) for name in files), strict=True)
        rows = [(root / "images" / name, int(label) - 1) for name, label, part in rows
                if part == ("1" if split == "train" else "0")]
        return [path for path, _ in rows], [label for _, label in rows]
    root = root / "tiny-imagenet-200"
    classes = sorted(column(root / "wnids.txt", 0))
    if split == "train":
        paths = [path for name in classes for path in sorted((root / "train" / name / "images").iterdir())]
        return paths, [classes.index(path.parts[-3]) for path in paths]
    names, labels = (column(root / "val/val_annotations.txt", i) for i in (0, 1))
    return [root / "val/images" / name for name in names], [classes.index(label) for label in labels]


def image_folder(split, folder):
    """(paths, labels) of DIR/{train,test}/CLASS/*, or of DIR/val where there is no test.

    The classes are the folders of DIR/train in alphabetical order, but for hidden ones (.ipynb_checkpoints).
    """
    part = folder / split
    if split == "test" and not part.is_dir() and (folder / "val").is_dir():
        part = folder / "val"
        print(f"{folder}: has no folder test, so the images of val are taken", flush=True)
    for where in (folder / "train", part):
        if not where.is_dir():
            raise Problem(f"{where}: no such folder; imagefolder:DIR is DIR/train/CLASS/*, DIR/test/CLASS/* "
                          "or DIR/val/CLASS/*; for images without labels give images:DIR")
    classes = sorted(p.name for p in (folder / "train").iterdir() if p.is_dir() and p.name[0] != ".")
    paths = find_images(part)
    names = [Path(path).relative_to(part).parts[0] for path in paths]
    wrong = set(names) - set(classes) or (set(classes) - set(names) if split == "train" else set())
    if wrong:
        raise Problem(f"{part}: {min(wrong)!r} is no folder of DIR/train with images of a class; put it "
                      "right, or give images:DIR for images without labels")
    return paths, [classes.index(name) for name in names]


def find_images(folder):
    """The paths of the image files at any depth below a folder, in order; says how many others there are.

    Hidden files and folders are passed over. Links are followed, but not to a folder that the given one is
    in, and within a folder of it (a class) each is walked once. Raises Problem if there is no image.
    """
    images, others, hidden = [], [], 0
    above, walked = {os.path.realpath(parent) for parent in (folder, *folder.absolute().parents)}, set()

    def is_new(path):
        where = os.path.relpath(path, folder).split(os.sep)[0], os.path.realpath(path)
        new = where not in walked and where[1] not in above
        walked.add(where)
        return new

    def fail(error):
        raise Problem(f"{error.filename}: {error.strerror}; give another folder, or change its permissions")

    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        hidden += sum(name[0] == "." for name in folders + names)
        folders[:] = [n for n in sorted(folders) if n[0] != "." and is_new(os.path.join(root, n))]
        for path in (os.path.join(root, name) for name in sorted(names) if name[0] != "."):
            (images if path.lower().endswith(ENDINGS) else others).append(path)
    found = " ".join(sorted({os.path.splitext(path)[1] or "none" for path in others})[:9]) or "no files"
    if not images:
        raise Problem(f"{folder}: has no images; endings there: {found}; those read: {' '.join(ENDINGS)}")
    if hidden or others:
        print(f"{folder}: passed over {hidden} hidden files or folders, and {len(others)} files with endings "
              f"that are none of images ({found})", flush=True)
    return images


# Pillow's transposition that turns an image upright, by its orientation in EXIF.
UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}


def read_image(path):
    """An image file of any mode as a PIL image, 8 bits RGB, upright, transparency laid over white.

    Raises Problem, or as Pillow does.
    """
    from PIL import Image

    if not os.path.isfile(path):
        raise Problem("not a file")
    with open(path, "rb") as file, Image.open(file) as image:
        image.load()  # which turns a TIFF upright
        bits, kinds, ink = (getattr(image, "tag_v2", {}).get(tag, ()) for tag in (258, 339, 262))  # of a TIFF
        odd = {*bits} - {1, 2, 4, 8, 16} or {*kinds} - {1} or (16 in bits and ink == 0)
        if image.mode == "F" or odd:
            raise Problem("pixels that are no unsigned integers of up to 8 bits, or 16: of unknown range")
        with contextlib.suppress(Exception):  # no orientation, or no sound one; other tags are not looked at
            image = image.transpose(UPRIGHT[image.getexif()[274]])
        if image.mode.startswith("I"):  # 16 bits; convert would make all above 255 white
            values = np.asarray(image).clip(0, 2**16 - 1) // 256
            values[np.asarray(image) == image.info.get("transparency", -1)] = 255
            return Image.fromarray(values.astype(np.uint8)).convert("RGB")
        if "transparency" in image.info or "A" in image.getbands():
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def reason(error):
    """Why an image file was not read, in a few words."""
    if pixels := re.match(r"Image size \((\d+) pixels\) exceeds limit of (\d+)", f"{error}"):
        return f"{pixels[1]} pixels, more than {pixels[2]}"
    text = "a text longer than Pillow reads" if "MAX_TEXT" in f"{error}" else "cut off, or no image"
    return f"{error}" if isinstance(error, Problem) else getattr(error, "strerror", None) or text


def squash(image, size):
    """An image, of PIL or (H, W[, C]) uint8, as (C, size, size) uint8."""
    from PIL import Image

    array = isinstance(image, np.ndarray)
    if (image.shape[:2] if array else image.size) != (size, size):
        image = Image.fromarray(image) if array else image
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def decode(paths, size, folder, advice):
    """The images of files, (N, 3, size, size) uint8, mapped from folder/DIGEST.npy, made if not there.

    DIGEST follows from the paths, sizes and times of the images. Raises Problem with those it cannot read.
    """
    digest = hashlib.sha256(str(size).encode())
    for path in paths:
        with contextlib.suppress(OSError):  # a file that is not there is named below
            info = os.stat(path)
            name = os.fsencode(os.path.abspath(path))
            digest.update(b"%s %d %d\n" % (name, info.st_size, info.st_mtime_ns))
    target = folder / f"{digest.hexdigest()[:16]}.npy"

    def read(path):
        try:
            return squash(read_image(path), size).tobytes()
        except Exception as error:  # Pillow raises many kinds
            broken.append(f"{path} ({reason(error)})")
        return b""

    broken, progress = [], Progress("decoding image", len(paths))
    with contextlib.ExitStack() as stack:
        for first in (True, False):  # the second time for what another process has made meanwhile
            with contextlib.suppress(OSError, ValueError, EOFError):  # not there, or cut off
                return np.load(target, mmap_mode="c")
            stack.enter_context(one_at_a_time(folder) if first else contextlib.nullcontext())
        with replacing(target) as temporary, ThreadPoolExecutor() as pool, open(temporary, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), 3, size, size)}
            np.lib.format.write_array_header_1_0(file, header)
            for first in range(0, len(paths), 500):  # Pillow decodes outside the interpreter's lock
                file.writelines(pool.map(read, paths[first : first + 500]))
                progress(min(first + 500, len(paths)), into=target)
            if broken:
                more = ["..."] if len(broken) > 10 else []
                raise Problem(f"{len(broken)} of {len(paths)} images cannot be read: "
                              f"{', '.join(sorted(broken)[:10] + more)}; {advice}")
    return np.load(target, mmap_mode="c")


def normalise(images, data):
    """(B, C, H, W) uint8, or float in [0, 1], to float, less the mean of data (an ImageSet), by its std."""
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    return (x - data.mean.view(-1, 1, 1).to(x)) / data.std.view(-1, 1, 1).to(x)


def denormalise(images, data):
    """The inverse of normalise; not cut to [0, 1], so that pixels outside keep their gradient."""
    return images * data.std.view(-1, 1, 1).to(images) + data.mean.view(-1, 1, 1).to(images)


# ---- Networks ---------------------------------------------------------------------------------------------


def make_student(out_dim, image_size, channels, width=128, depth=None):
    """A fresh student f_S for images of image_size px: the network of experts, distillation and evaluation.

    One of your own goes here: a module with forward(x) -> (B, out_dim) and features(x) -> (B, F), without
    running statistics (BatchNorm). It is made with the global generator, which the caller has seeded.
    """
    return ConvNet(out_dim, image_size, channels, width, depth)


class ConvNet(nn.Module):
    """The paper's student: depth x [3x3 convolution, instance norm, ReLU, 2x2 average pooling], then a head.

    Instance norm is GroupNorm with a group a channel: no running statistics, so the parameters are the whole
    network, P = 1,348,608 with out_dim 512 at 32 px. features(x) is what the probe sees (appendix A). The
    depth is 3 at 32 px and 4 at 64 px, for a last map of 4 x 4; never less than 2.
    """

    def __init__(self, out_dim, image_size=32, channels=3, width=128, depth=None):
        super().__init__()
        depth = depth or max(2, round(math.log2(image_size / 4)))
        if depth > math.log2(image_size):
            raise Problem(f"--depth {depth} halves images of {image_size} px to nothing; choose less")
        blocks = []
        for i in range(depth):
            blocks += [nn.Conv2d(channels if i == 0 else width, width, 3, padding=1),
                       nn.GroupNorm(width, width), nn.ReLU(), nn.AvgPool2d(2)]
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(width * (image_size // 2**depth) ** 2, out_dim)

    def features(self, x):
        """(B, C, H, W) -> (B, F), the flattened last map; F = 2,048 at 32 px and depth 3."""
        if x.shape[-1] < 2 ** (depth := len(self.body) // 4):
            raise Problem(f"--depth {depth} halves images of {x.shape[-1]} px to nothing; choose less")
        return self.body(x).flatten(1)

    def forward(self, x):
        """(B, C, H, W) -> (B, out_dim)."""
        return self.head(self.features(x))


class ResNet(nn.Sequential):
    """torchvision's ResNet of basic blocks for small images: 3x3 stem of stride 1, no max-pooling, any width.

    blocks (2, 2, 2, 2) is ResNet-18 (the teacher), (1, 1, 1, 1) ResNet-10. out_dim None: no head, forward(x)
    is features(x).
    """

    def __init__(self, blocks=(2, 2, 2, 2), out_dim=None, channels=3, width=64, norm_layer=nn.BatchNorm2d):
        from torchvision.models.resnet import BasicBlock

        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1, self.relu, inputs = norm_layer(width), nn.ReLU(inplace=True), width
        for i, (n, stride) in enumerate(zip(blocks, (1, 2, 2, 2))):
            outputs, shortcut = width * 2**i, None
            if stride > 1 or inputs != outputs:
                shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                shortcut = nn.Sequential(shortcut, norm_layer(outputs))
            layer = [BasicBlock(inputs, outputs, stride, shortcut, norm_layer=norm_layer)]
            layer += [BasicBlock(outputs, outputs, norm_layer=norm_layer) for _ in range(n - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*layer))
            inputs = outputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.avgpool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Identity() if out_dim is None else nn.Linear(8 * width, out_dim)

    def features(self, x):
        """(B, C, H, W) -> (B, 8 width), averaged over the last map."""
        return nn.Sequential(*list(self)[:-1])(x)


def layout(width):
    """The memory format for networks of this width: channels_last is a seventh faster on a CPU."""
    # oneDNN of torch 2.14.1 corrupts memory in the backward pass of narrow ResNets in channels_last, with
    # AVX2 below 8 channels, with AVX-512 below 16 (tests/test_layout.py); 32 leaves room.
    return torch.channels_last if width >= 32 else torch.contiguous_format


def flatten(net):
    """All parameters of net as one new vector (P,), in the order of net.parameters().

    Raises Problem if the vector would not be the whole network: running statistics, frozen parameters.
    """
    for name, _ in net.named_buffers():
        raise Problem(f"the student's {name} is a buffer, which no trajectory holds: take nn.GroupNorm or "
                      "nn.LayerNorm for BatchNorm")
    for name, p in net.named_parameters():
        if not p.requires_grad:
            raise Problem(f"the student's {name} is frozen: set its requires_grad, or leave it out")
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])  # cat copies; a view would train on


def forward_flat(net, theta, x, memory_format=torch.contiguous_format, precision="fp32"):
    """net(x) with the parameters theta (P,) in place of net's own; twice differentiable in theta and x.

    memory_format: of x and of the convolutions' weights; precision "bf16": of what is computed, not of theta.
    """
    if precision == "bf16":
        return forward_flat(net, theta.bfloat16(), x.bfloat16(), memory_format).float()
    names, shapes = zip(*((name, p.shape) for name, p in net.named_parameters()))
    parts = [part.view(s) for part, s in zip(theta.split([s.numel() for s in shapes]), shapes)]
    parts = [p.contiguous(memory_format=memory_format) if p.ndim == 4 else p for p in parts]
    x = x.contiguous(memory_format=memory_format)
    # The fused kernels of attention have no second derivative.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.func.functional_call(net, dict(zip(names, parts)), (x,))


# ---- Self-supervised losses and views ---------------------------------------------------------------------


def barlow_twins_loss(z1, z2, off_diagonal):
    """Barlow Twins (paper, eq. 1): sum_i (1 - F_ii)^2 + off_diagonal sum_{i != j} F_ij^2, for z1, z2 (B, d).

    F is the cross-correlation of the batch; 0 if both views agree and the dimensions are uncorrelated. The
    standard deviation divides by B, not B - 1, or F_ii of two equal views would be (B - 1) / B.
    """
    z1, z2 = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-12).sqrt() for z in (z1, z2))
    correlation = z1.T @ z2 / len(z1)  # (d, d)
    diagonal = correlation.diagonal()
    off = correlation.square().sum() - diagonal.square().sum()
    return (1 - diagonal).square().sum() + off_diagonal * off


def simclr_loss(z1, z2, temperature):
    """SimCLR's NT-Xent for z1, z2 (B, d): cross-entropy of finding the other view among 2 B - 1 images."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
    other = torch.arange(len(z), device=z.device).roll(len(z1))
    return F.cross_entropy(similarity, other)


def random_view(images, generator, min_crop=0.08, flip=True, jitter=(0.4, 0.4, 0.4, 0.1), part_of=None,
                size=None):
    """One random view of each image, every image by its own draw, computed as a batch on the images' device.

    Random resized crop, mirror, colour jitter (with probability 0.8) and greyscale (0.2).

    Args:
        images: (B, C, H, W) uint8, or float in [0, 1]; with C = 1 only brightness and contrast are jittered.
        generator: a torch.Generator of the images' device.
        min_crop: smallest crop, as a share of the image's area; flip: mirror half of the images.
        jitter: strength of brightness, contrast, saturation, and hue (in turns).
        part_of: (B', first): the images are those from `first` on of a batch of B', and get its draws.
        size: pixels of a view (default: the images').

    Returns (B, C, size, size) in [0, 1], float32 or of the images' own precision, differentiable in images.
    """
    b = len(images)
    total, first = part_of or (b, 0)
    x = images.float() / 255 if images.dtype == torch.uint8 else images

    def draw(low=0.0, high=1.0):  # (B,); in float32, so that a draw does not depend on the precision
        share = torch.rand(total, generator=generator, device=x.device)[first : first + b].to(x.dtype)
        return share * (high - low) + low

    x = random_crop(x, draw, min_crop, flip, size or x.shape[-1])
    return random_colours(x, draw, jitter)


AUGMENT = ["none", "flip", "flip_crop", "flip_crop_mix"]
AUGMENT_HELP = ("views of students: mirrored (digits never), cropped from the image padded by an eighth, "
                "mixed with another, as are the targets")


def augment(x, z, kind, flip, draws):
    """A random view of each image of x (B, C, H, W), and its target of z (B, D); kind: one of AUGMENT.

    flip: mirror half of them. Mixed (mixup: Zhang et al., ICLR 2018) is each with the one before it.
    """
    if kind == "none":
        return x, z
    size, padding = x.shape[-1], max(1, x.shape[-1] // 8) if "crop" in kind else 0  # 4 at 32 px
    half = torch.rand(len(x), 1, generator=draws, device=x.device) < (0.5 if flip else 0)
    at = torch.randint(2 * padding + 1, (len(x), 2, 1), generator=draws, device=x.device)
    i, j = (at + torch.arange(size, device=x.device)).unbind(1)  # (B, size) each: the rows, the columns
    width = size + 2 * padding
    where = i.unsqueeze(2) * width + torch.where(half, width - 1 - j, j).unsqueeze(1)
    flat = F.pad(x, [padding] * 4).flatten(2)
    x = flat.gather(2, where.view(len(x), 1, -1).expand(-1, x.shape[1], -1)).view_as(x)
    if kind == "flip_crop_mix":
        angle = math.pi / 2 * torch.rand(len(x), 1, generator=draws, device=x.device, dtype=x.dtype)
        share = angle.sin().square()  # of Beta(1/2, 1/2)
        x = torch.lerp(x.roll(1, 0), x, share.view(-1, 1, 1, 1))
        z = torch.lerp(z.roll(1, 0), z, share)
    return x, z


def random_crop(x, draw, min_crop, flip, size):
    """Random resized crop and mirror of x (B, C, H, W) to size, by an affine grid; draw(low, high): (B,).

    Where torchvision draws again, sides above 1 are cut to 1.
    """
    area, log_ratio = draw(min_crop, 1), draw(math.log(3 / 4), math.log(4 / 3))
    w, h = (area * log_ratio.exp()).sqrt().clamp(max=1), (area / log_ratio.exp()).sqrt().clamp(max=1)
    affine = torch.zeros(len(x), 2, 3, device=x.device, dtype=x.dtype)
    affine[:, 0, 0] = w * (1 - 2 * (draw() < 0.5).to(x.dtype)) if flip else w
    affine[:, 1, 1] = h
    affine[:, 0, 2], affine[:, 1, 2] = draw(-1, 1) * (1 - w), draw(-1, 1) * (1 - h)
    grid = F.affine_grid(affine, [*x.shape[:2], size, size], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


@functools.lru_cache
def yiq(device, dtype):
    """The matrix (3, 3) from RGB to YIQ and its inverse, once for a device."""
    matrix = [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]]
    matrix = torch.tensor(matrix, device=device, dtype=dtype)
    return matrix, matrix.inverse()


def random_colours(x, draw, jitter):
    """Colour jitter and greyscale of x (B, C, H, W), in [0, 1]: y = gain M x + (1 - contrast) mean luma.

    differs: torchvision jitters in a random order, cuts to [0, 1] after each change and turns the hue in HSV.
    Here the hue is a rotation in YIQ; then brightness, contrast, saturation and hue commute, and one 3x3
    matrix and an offset an image are all of them, greyscale (saturation 0) included.
    """
    b, channels = x.shape[:2]
    to = dict(device=x.device, dtype=x.dtype)
    on = (draw() < 0.8).to(x.dtype)
    brightness, contrast = (1 + on * draw(-s, s) for s in jitter[:2])
    saturation, angle = (on * draw(-s, s) for s in jitter[2:])
    saturation = (1 + saturation) * (draw() >= 0.2).to(x.dtype)
    if channels == 3:
        to_yiq, to_rgb = yiq(x.device, x.dtype)
        cos, sin = saturation * (angle * 2 * math.pi).cos(), saturation * (angle * 2 * math.pi).sin()
        turn = torch.zeros(b, 3, 3, **to)
        turn[:, 0, 0], turn[:, 1, 1], turn[:, 2, 2], turn[:, 1, 2], turn[:, 2, 1] = 1, cos, cos, -sin, sin
        matrix, luma = to_rgb @ turn @ to_yiq, to_yiq[0]
    else:
        matrix = torch.eye(channels, **to).expand(b, -1, -1)
        luma = torch.full((channels,), 1 / channels, **to)
    mean_luma = (luma.view(-1, 1, 1) * x).sum(1).mean((1, 2))  # (B,)
    matrix = matrix * (brightness * contrast).view(-1, 1, 1)
    offset = ((1 - contrast) * brightness * mean_luma).view(-1, 1, 1)
    return (torch.bmm(matrix, x.flatten(2)) + offset).view_as(x).clamp(0, 1)


# ---- Objectives of students -------------------------------------------------------------------------------


def mse_loss(outputs, targets, reduction="mean"):
    """F.mse_loss, which torch.func cannot differentiate forwards in one of its arguments (--compile)."""
    if not torch.is_tensor(outputs) or outputs.shape != targets.shape:
        shape = tuple(outputs.shape) if torch.is_tensor(outputs) else type(outputs).__name__
        raise Problem(f"the student's outputs are {shape}, the targets {tuple(targets.shape)}: its forward(x)"
                      " must return (B, out_dim)")
    squares = (outputs - targets).square()
    return squares.mean() if reduction == "mean" else squares


LOSSES = {"kd": mse_loss, "supervised": F.cross_entropy}  # of the student's outputs and the targets
SSL = {  # of the student's outputs for two views; weights as in train_teacher.py
    "barlow_twins": lambda z1, z2: barlow_twins_loss(z1, z2, off_diagonal=8 / 1024),
    "simclr": lambda z1, z2: simclr_loss(z1, z2, temperature=0.5),
}


def student_loss(objective, f, x, z, data, draws=None, kind="none"):
    """The loss of a student on a batch, a scalar.

    "kd" is the MSE of f(x) to the targets z (eq. 5), "supervised" the cross-entropy to one-hot labels z, of x
    as augment shows it. SSL compares f of two random views of x, and z is not looked at.

    Args:
        objective: a key of LOSSES or SSL; f: images (B, C, H, W) -> (B, D).
        x: (B, C, H, W), uint8, or float and normalised; z: (B, D).
        data: the ImageSet by whose mean and std the student sees images; its flip counts for views.
        draws: a torch.Generator on the images' device, for the views; kind: one of AUGMENT.
    """
    if objective in SSL:
        x = x if x.dtype == torch.uint8 else denormalise(x, data)
        views = [random_view(x, draws, flip=data.flip) for _ in range(2)]
        return SSL[objective](*(f(normalise(view, data)) for view in views))
    x = normalise(x, data) if x.dtype == torch.uint8 else x
    x, z = augment(x, z, kind, data and data.flip, draws)
    return LOSSES[objective](f(x), z)


# ---- Linear probe -----------------------------------------------------------------------------------------


def linear_probe(features, labels, num_classes, weight_decay=1e-3, iterations=100):
    """The linear classifier of eq. 3, minimising mean cross-entropy + weight_decay ||W||^2 by L-BFGS.

    features: (N, F); labels: (N,) int64 in [0, num_classes); iterations: at most 20 steps each, as appendix A
    counts them; ends early at the optimum. Returns weight (num_classes, F) and bias (num_classes,).
    """
    # The mean is taken out of the features and put back into the bias: the same optimum (the bias is free),
    # reached in a fraction of the steps, because ReLU features are all positive.
    centre = features.mean(0)
    x = features - centre
    weight = torch.zeros(num_classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=20 * iterations, history_size=20,
                                  tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, labels) + weight_decay * weight.square().sum()
        loss.backward()
        if not (loss.detach() + weight.grad.square().sum()).isfinite():
            raise Problem("the linear probe diverges: the features are not finite, or huge")
        return loss

    matmul = torch.backends.cuda.matmul
    allowed, matmul.allow_tf32 = matmul.allow_tf32, False  # --precision is the networks'
    try:
        optimizer.step(closure)
    finally:
        matmul.allow_tf32 = allowed
    return weight.detach(), (bias - weight @ centre).detach()


def probe_accuracy(train_features, train_labels, test_features, test_labels):
    """Test accuracy in percent of the linear probe fitted to the training features."""
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    weight, bias = linear_probe(train_features, train_labels, num_classes)
    scores = test_features @ weight.T + bias
    if not scores.isfinite().all():
        raise Problem("the linear probe is not finite: the features are not, or they are huge")
    return 100 * (scores.argmax(1) == test_labels).float().mean().item()


# ---- Command line ------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A stage's command line: --help shows the docstring as it is, a wrong option is a Problem."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)
        data = self.add_argument_group("data and files")
        data.add_argument("--dataset", default="cifar10", help="D_real: " + DATASET_HELP)
        data.add_argument("--data_dir", default="data", help="of downloads and of decoded images")
        data.add_argument("--image_size", type=at_least(1, int, 4096), help="pixels (default: the set's)")
        data.add_argument("--limit", type=positive, help="use so many images of each split, evenly spaced")
        data.add_argument("--out_dir", type=Path, help="folder of this run (default: runs/DATASET)")

    def add_student_options(self):
        net = self.add_argument_group("student f_S; --width and --depth are the same in all stages")
        net.add_argument("--width", type=positive, default=128, help="channels of the ConvNet")
        net.add_argument("--depth", type=positive, help=DEPTH_HELP)
        net.add_argument("--augment", choices=AUGMENT, default="none", help=AUGMENT_HELP)

    def add_run_options(self, compile=False):
        run = self.add_argument_group("how to run (of these only --precision counts for the result)")
        run.add_argument("--device", help="where to run (default: cuda if there is one, else cpu)")
        run.add_argument("--threads", type=at_least(1, int, 1024), help="CPU threads (default: torch's)")
        rounding = "tf32: a GPU rounds the factors of products to 10 bits; bf16: networks in bfloat16, too"
        run.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help=rounding)
        often = "from one checkpoint to the next, from which the same command goes on; 0: after each step"
        run.add_argument("--checkpoint_minutes", type=at_least(0, float, 1e6), default=5.0, help=often)
        if compile:
            run.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                             help="torch.compile a student's step (SSL: of experts only): faster")

    def error(self, message):
        raise Problem(message)

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        key, folder = parse_dataset(args.dataset, args.data_dir)
        args.out_dir = args.out_dir or Path("runs") / (folder.resolve().name if ":" in args.dataset else key)
        return args


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """--help with the docstring as it is and the default after each option that has one."""

    def _get_help_string(self, action):
        silent = any(action.default is none for none in (None, False, argparse.SUPPRESS))
        return action.help + ("" if silent or "default" in action.help else " (default: %(default)s)")


def at_least(low, kind=int, high=2**31 - 1):
    """The type of a numeric option: a number of this kind from low to high."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        whole = "whole " if kind is int else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not a {whole}number from {low} to {high}")

    return parse


positive, natural, number = at_least(1), at_least(0), at_least(0, float, 1e30)


def recipe(args, leave_out=()):
    """Those of a stage's options that its result depends on, {name: value}; the others may differ.

    Of imagefolder:DIR the folder is left out: images are known by their images_id, wherever they are.
    """
    free = {"data_dir", "out_dir", "name", "device", "threads", "compile", "num_experts",
            "first_expert", "checkpoint_minutes", *leave_out}
    made = {name: value for name, value in vars(args).items() if name not in free}
    return {**made, "dataset": args.dataset.partition(":")[0]}


# ---- Devices and processes ---------------------------------------------------------------------------------


def set_up(args):
    """What every stage does first: device, threads, precision, and meeting torchrun's other processes."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = args.device.startswith("cuda")
    if cuda and world_size() > 1:
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', rank())}"  # each process its own
    try:
        if cuda:
            torch.cuda.set_device(torch.device(args.device).index or 0)  # seed_dropout seeds this one
        torch.zeros(1, device=args.device).item()
    except Exception:  # torch raises many kinds
        raise Problem(f"--device {args.device}: does not work here; choose cpu, or another device") from None
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    variables = [f"{name}={os.environ[name]}" for name in TORCHRUN if name in os.environ]
    if variables and not torchrun():
        print(f"passed over {' '.join(variables)}, not set as by torchrun: works alone", flush=True)
    if world_size() > 1 and not torch.distributed.is_initialized():
        more = f"{world_size() - 1} more process{'es' * (world_size() > 2)} ({' '.join(variables)})"
        waiting = threading.Timer(3, print, [f"waiting for {more}"], {"flush": True})
        waiting.start()
        patience, forever = datetime.timedelta(minutes=MEET_MINUTES), datetime.timedelta(days=30)
        with on_signals(signal.SIG_DFL), contextlib.ExitStack() as stack:  # Python hears of none in C++
            stack.callback(waiting.cancel)
            store = next(torch.distributed.rendezvous("env://", timeout=patience))[0]
            torch.distributed.init_process_group(  # who is done waits for the slowest
                "nccl" if cuda else "gloo", store=store, rank=rank(), world_size=world_size(),
                timeout=forever, device_id=torch.device(args.device) if cuda else None)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the first process speaks for all


TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MEET_MINUTES = 5


def torchrun():
    """(this process's number, how many there are) if torchrun has started it, by its variables; else None."""
    with contextlib.suppress(KeyError, ValueError):
        number, count, port = (int(os.environ[name]) for name in TORCHRUN if name != "MASTER_ADDR")
        if 0 <= number < count < 2**31 and 0 < port < 2**16 and os.environ["MASTER_ADDR"].isascii():
            return number, count


def rank():
    """This process's number among those that torchrun started, from 0."""
    return (torchrun() or (0, 1))[0]


def world_size():
    """How many processes torchrun started; 1 without it."""
    return (torchrun() or (0, 1))[1]


def wait_for_all():
    """Returns when all processes have come here."""
    if world_size() > 1:
        torch.distributed.barrier()


def add_up(*tensors):
    """Replace each of the tensors by its sum over the processes, which exchange one vector."""
    if world_size() > 1:
        torch.distributed.all_reduce(flat := torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))


def in_precision(f, precision):
    """f, a network: for "bf16" by autocast, with float32 outputs; else as it is."""

    def rounded(x):
        with torch.autocast(x.device.type, torch.bfloat16):
            return f(x).float()

    return rounded if precision == "bf16" else f


def compiled(function):
    """torch.compile(function) for the few shapes that it sees; raises Problem in its first call."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses CUDA on a CPU
    warnings.filterwarnings("ignore", ".*torch.jit.script.*", FutureWarning)  # of torch itself
    fast = torch.compile(function, dynamic=False)

    def call(*args):
        try:
            return fast(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or os.environ.get("TMPDIR", "")
            if re.search("No working C|a working triton", f"{error}"):
                reason = f"needs a C++ compiler, on a GPU Triton ({reason})"
            elif " " in cache:
                reason += f"; {cache} has a space in its name: choose another TORCHINDUCTOR_CACHE_DIR"
            raise Problem(f"--compile: {reason}; or give --no-compile") from None

    return call


def place(tensor, device):
    """The tensor on the device if it takes less than a third of its free memory; else on the host."""
    large = str(device).startswith("cuda") and tensor.nbytes > torch.cuda.mem_get_info(device)[0] / 3
    return tensor if large else tensor.to(device)


def send(tensor, device):
    """The tensor on the device, which still computes meanwhile if it is a GPU: nothing waits for it."""
    if tensor.device.type == "cpu" and str(device).startswith("cuda"):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def fetch(tensor, rows, device):
    """tensor[rows] on the device; rows: an index tensor or a slice."""
    return send(tensor[send(rows, tensor.device) if torch.is_tensor(rows) else rows], device)


# ---- Files, log, checkpoint --------------------------------------------------------------------------------


def fingerprint(*tensors):
    """Sixteen hex digits that tell tensors apart: how a file names the targets that it was made from."""
    digest = hashlib.sha256()
    for tensor in tensors:
        tensor = torch.as_tensor(tensor).detach().cpu().contiguous()
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy())  # without a copy
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def writing(path):
    """Within, an error of the disk is a Problem that names path, whose folder is made if need be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise Problem(f"{path}: cannot be written ({error.strerror or error}); make room there, or choose "
                      "another --out_dir or --data_dir") from None


def lock(file):
    """Lock an open file until it is closed: True; False if another process has it; None: no locks here."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except (OSError, ImportError):
        return None


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path of one's own, whose file takes the place of path in the end, whole."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    with writing(path), contextlib.ExitStack() as stack:
        for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
            with contextlib.suppress(OSError), open(left, "ab") as file:
                if lock(file):  # a killed run has left it
                    left.unlink()
        if os.name == "posix":
            lock(stack.enter_context(open(temporary, "xb")))
        stack.callback(temporary.unlink, missing_ok=True)
        yield temporary
        if temporary.exists():
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())  # or a machine that loses its power may be left with an empty file
            os.replace(temporary, path)


@contextlib.contextmanager
def one_at_a_time(folder):
    """Processes pass here one after another, where there are locks, unless the folder is read-only."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / ".lock", "a"))
            if lock(file) is False:
                print(f"{folder}: waiting for another process that makes something there", flush=True)
                while lock(file) is False:
                    time.sleep(0.1)
        yield


def append(path, record):
    """Add a JSON record to a file as a line of its own, whole or not at all."""
    line = json.dumps(record, default=str).encode() + b"\n"
    with writing(path), open(path, "ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        line = line if file.read(1) in (b"", b"\n") else b"\n" + line  # behind the half line of a killed run
        if file.write(line) < len(line):
            file.truncate(size)
            raise OSError("no space is left")


def read_records(path):
    """The records of a .jsonl file, a dict a line; a line that is broken (a run was killed) is left out."""
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def save(path, contents):
    """Write a dict of tensors and plain Python to path, whole or not at all; same contents, same bytes."""
    with replacing(path) as temporary:
        try:
            with open(temporary, "wb") as file:  # torch would write the name of a path into the file
                torch.save(contents, file)
        except RuntimeError as error:  # how torch may say that the disk is full
            raise OSError(str(error).splitlines()[0]) from None


def load(path, keys, made_by, mmap=False):
    """Read what save wrote, with weights_only=True: a file cannot run code; Problem if it is no such file.

    Args:
        keys: what it must have, {key: dimensions of a float32 tensor of finite values (float16 is widened),
            or None for anything}; 0 dimensions: a number above 0.
        made_by: the command to name when the file is missing or of another kind.
        mmap: leave the tensors on disk until they are read.
    """
    path = Path(path)
    if not path.is_file():
        raise Problem(f"{path}: {'is not a file' if path.exists() else 'not found'}; make it with {made_by}")
    try:
        with open(path, "rb") as file:
            if zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip():
                raise ValueError("it is damaged")  # torch itself does not look at the checksums
            file.seek(0)
            mmap = mmap and os.path.exists("/dev/fd")
            source = f"/dev/fd/{file.fileno()}" if mmap else file  # torch takes no name that is not UTF-8
            contents = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
        contents = {f"{key}": v.detach() if torch.is_tensor(v) else v for key, v in contents.items()}
        json.dumps({name: {**made} for name, made in contents.get("options", {}).items()})  # plain values
        for key, ndim in keys.items():
            value = contents[key]
            if ndim and torch.is_tensor(value) and value.dtype == torch.float16:
                value = contents[key] = value.float()
            if ndim == 0 and not (type(value) in (int, float) and 0 < value <= 1e12):
                raise ValueError(f"its {key!r} is no number above 0, of 1e12 at most")
            found = f"{value.dtype} {tuple(value.shape)}" if torch.is_tensor(value) else type(value).__name__
            if ndim and not (torch.is_tensor(value) and (value.dtype, value.ndim) == (torch.float32, ndim)
                             and value.numel()
                             and all(part.isfinite().all() for part in value.split(10_000))):
                raise ValueError(f"its {key!r}, {found}, is no finite float32 tensor of {ndim} dimensions")
    except PermissionError:
        raise
    except Exception as error:  # torch raises many kinds
        reasons = {KeyError: f"it has no {error}", ValueError: f"{error}"}
        other = re.search(r"GLOBAL (\S+) was not", f"{error}")  # of the kind of what it holds
        other = f"holds {other[1]}, and so" if other else "is damaged, or"
        reason = reasons.get(type(error), f"it {other} no dict of tensors and plain values")
        raise Problem(f"{path}: {reason}; put it right, or move it away and make it with {made_by}") from None
    return contents


def load_targets(args, objective="kd"):
    """The training images of a run and the targets that belong to them, for the stages after the teacher.

    Returns (train ImageSet, targets (N, D) float32, made): made is what the next file carries of its origin,
    {options of the earlier stages, images_id, targets_id}. The targets stay on disk until they are read; a
    file needs no more than {targets}. Those of "supervised" are the labels, one-hot; SSL (or None) has none,
    (N, 0). Raises Problem if images and targets do not belong together.
    """
    contents, path = {}, args.out_dir / "targets.pt"
    if objective in LOSSES and objective != "supervised":  # before images, which may take minutes to decode
        made_by = f"train_teacher.py --dataset {args.dataset} --out_dir {args.out_dir}"
        contents = load(path, {"targets": 2}, made_by, mmap=True)
    train = load_images(args.dataset, "train", args.data_dir, args.image_size, args.limit, args.device)
    n, here = len(train.images), fingerprint(train.images)
    targets = contents.get("targets", torch.zeros(n, 0))
    if objective == "supervised":
        if train.labels is None or train.labels.max() == 0:
            raise Problem(f"--objective supervised: {args.dataset} has no labels to learn; choose another")
        targets = F.one_hot(train.labels).float()
    if len(targets) != n or contents.get("images_id", here) != here:
        raise Problem(f"{path}: has {len(targets)} targets, of other images than the {n} of {args.dataset} at"
                      f" {train.images.shape[-1]} px; give the --dataset, --data_dir, --image_size and "
                      "--limit that it was made with, or another --out_dir")
    made = {"options": contents.get("options", {}), "images_id": here, "targets_id": fingerprint(targets)}
    return train, targets, made


def load_set(path, data, dim=None):
    """What a set's file holds, its images normalised by the mean and std of data, an ImageSet.

    A file without mean and std is taken as it is. Raises Problem if it does not fit data, or a start D = dim.
    """
    found = load(path, {"images": 4, "targets": 2, "lr": 0}, "distill.py")
    size, shape = len(found["images"]), tuple(data.images.shape[1:])
    found = {"mean": data.mean, "std": data.std, "indices": torch.full((size,), -1), **found}
    fits = dict(images=(size, *shape), targets=(size, dim or found["targets"].shape[1]), mean=shape[:1])
    for name, fit in {**fits, "std": shape[:1], **({"indices": (size,)} if dim else {})}.items():
        there = tuple(getattr(found[name], "shape", ()))
        fine = there == fit and found[name].isfinite().all() and (name != "std" or found[name].min() > 0)
        if not fine or name == "indices" and found[name].dtype != torch.int64:
            raise Problem(f"{path}: its {name} {there} should be finite {fit}, std above 0, indices int64; "
                          "give another set, or the --dataset and --image_size that it was made with")
    if any(found[name].tolist() != getattr(data, name).tolist() for name in ("mean", "std")):
        theirs = data._replace(mean=found["mean"], std=found["std"])
        found["images"] = normalise(denormalise(found["images"], theirs), data)
    return found


def check_same(path, contents, stage, now, advice="move such files away or change --out_dir (OUT) or --name"):
    """Raises Problem if a file's contents were made by a stage with other options or ids than now has.

    now: {option or id: value}. What one does not name is no difference: a fork's file may say nothing.
    """
    ids = {name: value for name, value in contents.items() if name.endswith("_id")}
    then = {**ids, **contents.get("options", {}).get(stage, {})}
    for name in (name for name in now if name in then):
        if then[name] != now[name] and name.endswith("_id"):
            raise Problem(f"{path}: was made from other {name[:-3]} than those there now; {advice}")
        if then[name] != now[name]:
            raise Problem(f"{path}: was made with --{name} {then[name]}, now --{name} {now[name]}; {advice}")


def is_done(path, made_by, keys):
    """The contents of path if it is there, with these keys (see load); Problem if made with other options.

    made_by: {stage: what check_same compares}, the file's own stage first. A file that exists is a piece of
    work done: so a stage that is started again goes on where it stopped.
    """
    if path.exists():
        contents = load(path, keys, f"{next(iter(made_by))}.py", mmap=True)
        for stage, now in made_by.items():
            check_same(path, contents, stage, now)
        return contents


class Log:
    """OUT/NAME.jsonl, a JSON record a line; a run that has its log open keeps others off its files.

    The first record of each start says how it was made: command, options, commit, versions, and the step at
    which it goes on.
    """

    def __init__(self, path, args):
        self.path, self.args = path, args
        if rank() == 0:
            with writing(path):
                self.file = open(path, "ab")  # and so locked, until the run ends
            if lock(self.file) is False:
                raise Problem(f"{path}: another run is at work; wait, or choose another --out_dir")

    def begin(self, step=0):
        """Write the record of a start."""
        from importlib.metadata import version

        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
        commit = None
        with contextlib.suppress(OSError):  # no git
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        packages = {name: version(name) for name in ("torch", "torchvision", "numpy", "scikit-learn")}
        self.write(command=sys.argv, options=vars(self.args), step=step, commit=commit, **packages,
                   python=sys.version.split()[0], time=time.strftime("%Y-%m-%d %H:%M:%S"),
                   device=self.args.device, threads=torch.get_num_threads(), processes=world_size())

    def write(self, **record):
        if rank() == 0:
            append(self.path, record)


class Checkpoint:
    """The state of a run under way, in a file; the same command goes on from it, bit for bit.

    Args:
        path: of the file, which is replaced as a whole; the stage removes it when its result is written.
        args: the stage's, with checkpoint_minutes.
        now: what the state depends on, {option or id: value}.
        log: the run's Log, which begins here, cut back to where the file was written; None: the work is this
            process's own. Else the first of several processes writes for all.
        parts: whatever has a state_dict (modules, optimizers), and tensors, which are filled in place.

    After it, step says how many steps are done. What is drawn at random follows from seed and step. Raises
    Problem if the file is of a run with other options.
    """

    under_way = None  # the one that ticks: a signal then waits for the end of the step

    def __init__(self, path, args, now, log=None, **parts):
        self.path, self.now, self.log, self.parts = path, now, log, parts
        self.step, self.saved, self.minutes = 0, time.monotonic(), args.checkpoint_minutes
        self.writes = log is None or rank() == 0
        if path.exists():
            state = load(path, dict.fromkeys(("step", "log_size", *parts)), "the same command")
            check_same(path, state, "now", now, "give what it was begun with, or remove it to begin anew")
            try:
                for name, part in parts.items():
                    part.copy_(state[name]) if torch.is_tensor(part) else part.load_state_dict(state[name])
                self.step = int(state["step"])
                if log and self.writes and log.path.stat().st_size > state["log_size"]:
                    os.truncate(log.path, state["log_size"])  # what came after it will be written again
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
                raise Problem(f"{path}: does not fit this run; remove it to begin anew") from None
            print(f"going on from {path}, step {self.step}", flush=True)
        if log:
            log.begin(self.step)
            wait_for_all()  # the first process may write the next file when all have read this one

    def tick(self, step, last=False):
        """To be called after each step, with the number of those done; saves if it is time."""
        Checkpoint.under_way = None if last else self
        if self.writes and (last or stop.signal or time.monotonic() - self.saved >= 60 * self.minutes):
            state = {k: p if torch.is_tensor(p) else p.state_dict() for k, p in self.parts.items()}
            leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(state) if torch.is_tensor(leaf)]
            if not all(leaf.isfinite().all() for leaf in leaves):
                raise Problem(f"diverged at step {step}: choose a smaller --lr, or --lr_init for a set; "
                              f"{self.kept()}")
            log_size = self.log.path.stat().st_size if self.log else 0
            save(self.path, {**state, "step": step, "log_size": log_size, "options": {"now": self.now}})
            self.saved = time.monotonic()
        if stop.signal:
            stop(stop.signal)

    def kept(self):
        """A clause that says what is there after an error."""
        return f"{self.path} holds the last good state" if self.path.exists() else "no checkpoint was due yet"


class Progress:
    """Says how far a loop is, in a line at most every five seconds and at its end."""

    def __init__(self, what, total, before=0):
        self.what, self.total, self.before = what, total, before  # before: done by an earlier start
        self.started = self.said = time.monotonic()

    def __call__(self, done, **values):
        """done: of total; values: what else to show, {name: number or text}."""
        now = time.monotonic()
        if stop.signal or (done < self.total and now - self.said < 5):
            return  # after a signal, too: what it goes to may be gone
        self.said, spent = now, now - self.started
        texts = {n: f"{v:.4g}" if isinstance(v, float | torch.Tensor) else v for n, v in values.items()}
        shown = "".join(f"{name.replace('_', ' ')} {text}, " for name, text in texts.items())
        left = spent / max(done - self.before, 1) * (self.total - done)
        try:
            print(f"{self.what} {done}/{self.total}: {shown}{spent:.0f} s, {left:.0f} s left", flush=True)
        except OSError as error:
            stop(13, frame=True, why=f"{error.strerror} of standard output")  # as SIGPIPE would


def stop(number, frame=None, why=None):
    """SIGTERM and Ctrl-C: the step under way is finished, for tick to save; a later Ctrl-C does not wait."""
    stop.why = stop.why or why or signal.Signals(number).name
    later = number == signal.SIGINT and stop.signal and time.monotonic() - stop.at > 1
    if frame and Checkpoint.under_way and not later:  # run_all.sh passes Ctrl-C on as SIGTERM
        stop.signal, stop.at = stop.signal or number, stop.at or time.monotonic()
        return
    with contextlib.suppress(OSError, RuntimeError):  # what it is piped to may be gone, or be in use just now
        print(f"stopped by {stop.why}: the same command goes on", file=sys.stderr, flush=True)
    os._exit(128 + number)  # no traceback; all files are whole at any time


stop.signal, stop.at, stop.why = None, 0.0, None


def keep_memory():
    """Large tensors that are freed are kept for the next ones, which is twice as fast on a CPU."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # other C libraries than glibc
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: large blocks from the heap, too
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink it


@contextlib.contextmanager
def on_signals(handler):
    """Within, SIGTERM and Ctrl-C are handled so."""
    before = [(number, signal.signal(number, handler)) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


@on_signals(stop)
def run(main, parse_args):
    """main(parse_args()), for the command line: a Problem ends in one line on stderr and exit status 2."""
    keep_memory()
    warnings.filterwarnings("ignore", module=r"(PIL|sklearn)\.")  # what is wrong is said in a line
    while (free := os.open(os.devnull, os.O_RDWR)) < 3:  # one that is closed would be the next file's
        pass
    os.close(free)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    with contextlib.suppress(AttributeError):  # of a notebook
        sys.stdout.reconfigure(errors="replace")  # a terminal without "±" is no reason to stop
    try:
        main(parse_args())
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        sys.stdout.flush()
        return
    except Problem as error:
        text = f"{error}"
    except OSError as error:
        if not error.filename and error.errno in (errno.EPIPE, errno.ENOSPC):
            stop(13, why=f"{error.strerror} of standard output")
        text = f"{error.filename or 'a file'}: {error.strerror or error}"
    except (RuntimeError, MemoryError) as error:
        text = f"{error}".partition("\n")[0]
        hint = "out of memory: choose smaller batches or a smaller --width"
        if isinstance(error, torch.distributed.DistError) or re.search("gloo|NCCL|Connection", text):
            hint = "another process ended or cannot be reached; its message or torchrun's report says why; "
            hint += "without torchrun unset " + ", ".join(TORCHRUN)
        elif isinstance(error, RuntimeError) and not re.search("(allocate|out of) memory|ALLOC_FAILED", text):
            raise
        kept = f"; {Checkpoint.under_way.kept()}" if Checkpoint.under_way else ""
        text = f"{hint} ({text}){kept}"
    Checkpoint.under_way = None  # a signal ends the process at once
    if rank() > 0:
        time.sleep(30)  # what all processes find the first one says, and torchrun ends the others meanwhile
    with contextlib.suppress(OSError):
        print("error: " + " ".join(text.split()), file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:  # Python would try once more at its end, and say so
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(2)
