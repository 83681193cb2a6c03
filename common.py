"""What the stages of MKDT must agree on: data sets, networks, SSL losses, views, the student as a vector, the
probe, several processes, files.

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
import hashlib
import importlib.metadata
import itertools
import json
import logging
import math
import os
import pickle
import platform
import shlex
import signal
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.datasets.utils import download_url, extract_archive
from torchvision.models.resnet import BasicBlock
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


_own_work = False  # whether this process does what no other does: see own_work


class Fatal(SystemExit):
    """The end of a program that had better not go on with other work, either: the disk is full, say."""


def fail(message, kind=SystemExit):
    """End the program with one line on stderr and exit status 2: for all that the user can put right."""
    if rank() > 0 and not _own_work:
        time.sleep(30)  # what all processes find the first one says, and torchrun ends the others meanwhile
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise kind(2)


# ------------------------------------------------------------------------------------------------------------
# Data sets
# ------------------------------------------------------------------------------------------------------------


class Dataset(NamedTuple):
    """A row of the table below."""

    size: int  # pixels; images are squashed to size x size, the aspect ratio is not kept (as the authors do)
    mean: tuple | None  # of the channels, in [0, 1]; None: measured on the training images
    std: tuple | None
    flip: bool = True  # whether a mirrored image is still an image of the same thing
    count: tuple | None = None  # images to train and to test: a set with others is not whole


# Sizes and statistics are those of the authors' code; every set is evaluated at its own size, also by an
# encoder that was pre-trained at another (the convolutions do not mind, the number of features F changes).
DATASETS = {
    "digits": Dataset(8, None, None, flip=False),
    "cifar10": Dataset(32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), count=(50_000, 10_000)),
    "cifar100": Dataset(32, (0.5071, 0.4865, 0.4409), (0.2009, 0.1984, 0.2023), count=(50_000, 10_000)),
    "tinyimagenet": Dataset(64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), count=(100_000, 10_000)),
    "aircraft": Dataset(32, (0.4804, 0.5116, 0.5349), (0.2021, 0.1953, 0.2297), count=(6_667, 3_333)),
    "cub2011": Dataset(32, (0.4857, 0.4995, 0.4324), (0.2145, 0.2098, 0.2496), count=(5_994, 5_794)),
    "dogs": Dataset(32, (0.4765, 0.4516, 0.3911), (0.2490, 0.2435, 0.2479), count=(12_000, 8_580)),
    "flowers": Dataset(32, (0.4329, 0.3820, 0.2965), (0.2828, 0.2333, 0.2615), count=(1_020, 6_149)),
    "imagefolder": Dataset(32, None, None),
}

DATASET_HELP = ", ".join(DATASETS) + ":DIR"

# The archives that torchvision has no class for: (URL, MD5).
ARCHIVES = {
    "tinyimagenet": [
        ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")
    ],
    "cub2011": [
        (
            "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
            "97eceeb196236b17998738112f37df78",
        )
    ],
    "dogs": [
        ("http://vision.stanford.edu/aditya86/ImageNetDogs/images.tar", "1bb1f2a596ae7057f99d7d75860002ef"),
        ("http://vision.stanford.edu/aditya86/ImageNetDogs/lists.tar", "edbb9f16854ec66506b5f09b583e0656"),
    ],
}

# Where torchvision's own classes look for what they download: (URL, folder below data_dir), for the error
# message.
TORCHVISION_ARCHIVES = {
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "."),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "."),
    "aircraft": (
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
        ".",
    ),
    "flowers": (
        "https://thor.robots.ox.ac.uk/flowers/102/102flowers.tgz (and imagelabels.mat, setid.mat beside it)",
        "flowers-102",
    ),
}


BROKEN = (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error)  # by an archive cut off

IN_MEMORY = 2**31  # bytes; files of more images are decoded once, into a file that is mapped into memory


class ImageSet(NamedTuple):
    """One split of a data set, on the CPU."""

    images: torch.Tensor  # (N, C, H, W) uint8
    labels: torch.Tensor  # (N,) int64
    mean: torch.Tensor  # (C,) of the pixels in [0, 1]; the training split's serve both splits
    std: torch.Tensor  # (C,)
    flip: bool = True  # whether views may be mirrored


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """--help with the docstring as it is and the default after each option that has one."""

    def _get_help_string(self, action):
        if action.default in (None, argparse.SUPPRESS) or "default" in action.help:
            return action.help
        return action.help + " (default: %(default)s)"


def at_least(low, kind=int, high=2**31 - 1):
    """The type of a numeric option: a number of this kind from low to high."""

    def parse(text):
        try:
            number = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of type {kind.__name__}") from None
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text} is not allowed; choose {low} or more, at most {high}")
        return number

    return parse


positive, natural, number = at_least(1), at_least(0), at_least(0, float, 1e30)


def device(text):
    """The type of --device: the name of one that works here; under torchrun "cuda" is each process's own."""
    if text == "cuda" and "LOCAL_RANK" in os.environ:
        text = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=text).item()
    except Exception as error:  # torch raises many kinds
        reason = str(error).strip().splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} does not work here ({reason}); choose cpu") from None
    return text


def parse_dataset(name, data_dir):
    """(key of DATASETS, folder of its files) of a data set's name; "imagefolder:DIR" names its own folder.

    Exits when the name is not in the table.
    """
    key, _, folder = name.partition(":")
    if key not in DATASETS or (folder and key != "imagefolder"):
        fail(f"data set {name!r} is unknown: choose one of {', '.join(DATASETS)} or imagefolder:DIR")
    return key, Path(folder or data_dir)


def load_images(name, split, data_dir, image_size=None, limit=None):
    """Read one split of a data set into memory as uint8.

    Args:
        name: a key of DATASETS, or "imagefolder:DIR" for DIR/{train,test}/CLASS/* (DIR defaults to data_dir).
        split: "train" or "test".
        data_dir: where downloads go.
        image_size: pixels, if not the table's; images of another size are squashed to it by Lanczos' filter.
        limit: keep only so many images, evenly spaced over the split (to rehearse a run).

    Returns an ImageSet. Exits with one line when the files cannot be had, naming the URL and their folder.
    Files of images that need more than IN_MEMORY are decoded into data_dir/decoded, and mapped from there.
    """
    key, folder = parse_dataset(name, data_dir)
    size = image_size or DATASETS[key].size
    with one_at_a_time(folder if key in (*ARCHIVES, *TORCHVISION_ARCHIVES) else None):
        samples = _open_dataset(key, split, folder)
    count = DATASETS[key].count
    again = f"remove what was unpacked of {key} in {folder}, to have it unpacked again"
    if count and len(samples) != count[split == "test"]:
        fail(f"{folder}: has {len(samples)} of {key}'s {count[split == 'test']} {split} images; {again}")
    keep = range(len(samples))
    if limit and limit < len(samples):
        keep = [i * len(samples) // limit for i in range(limit)]
    channels = 1 if key == "digits" else 3
    shape = (len(keep), channels, size, size)

    def decode(i):
        try:
            image, label = samples[i]
        except Exception as error:  # PIL raises many kinds
            where = samples.paths[i] if isinstance(samples, _Files) else f"image {i} of {name}"
            raise ValueError(f"{where}: cannot be read as an image ({error})") from None
        if image.size != (size, size):
            image = TF.resize(image, [size, size], interpolation=InterpolationMode.LANCZOS)
        return TF.pil_to_tensor(image), label

    def parts():
        """(images (n, C, H, W), labels) of some hundred at a time, so that nobody need hold them all."""
        progress = Progress("image", len(keep), 1, "images")
        with ThreadPoolExecutor() as pool:  # PIL decodes outside the interpreter's lock
            for start in range(0, len(keep), 500):
                try:
                    decoded = list(pool.map(decode, keep[start : start + 500]))
                except ValueError as error:
                    pool.shutdown(cancel_futures=True)
                    fail(f"{error}; {again if count else 'replace it or take it away'}")
                yield torch.stack([image for image, _ in decoded]), [label for _, label in decoded]
                progress(min(start + 500, len(keep) - 1), reading=name)

    if isinstance(samples, _Files) and math.prod(shape) > IN_MEMORY:
        images = _mapped_images(samples, keep, shape, Path(data_dir) / "decoded", parts)
        labels = torch.tensor([samples.labels[i] for i in keep])
    else:
        images, labels = torch.empty(shape, dtype=torch.uint8), torch.empty(len(keep), dtype=torch.int64)
        done = 0
        for part, part_labels in parts():
            images[done : done + len(part)] = part
            labels[done : done + len(part)] = torch.tensor(part_labels)
            done += len(part)
    _, mean, std, flip, _ = DATASETS[key]
    if mean is None:
        # From the counts of the 256 values, so that no float copy of the images is made.
        counts = torch.zeros(channels, 256, dtype=torch.float64)
        for part in images.split(1000):
            counts += torch.stack(
                [torch.bincount(part[:, c].flatten(), minlength=256) for c in range(channels)]
            )
        share = counts * channels / images.numel()
        values = torch.arange(256).double() / 255
        mean = share @ values
        std = (share @ values.square() - mean.square()).clamp(min=1e-4).sqrt()
    return ImageSet(images, labels, torch.as_tensor(mean).float(), torch.as_tensor(std).float(), flip)


def normalise(images, mean, std):
    """(B, C, H, W) uint8, or float in [0, 1], to float with the data set's mean and std taken out."""
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    return (x - mean.view(-1, 1, 1).to(x.device)) / std.view(-1, 1, 1).to(x.device)


def images_id(images):
    """The fingerprint of a data set's training images, from at most some 1,000 of them and their number."""
    return fingerprint(torch.tensor(len(images)), images[:: max(1, len(images) // 1000)])


def denormalise(images, mean, std):
    """The inverse of normalise; not cut to [0, 1], so that pixels outside keep their gradient."""
    return images * std.view(-1, 1, 1).to(images.device) + mean.view(-1, 1, 1).to(images.device)


def enlarge(images, size):
    """(B, C, h, h) to (B, C, size, size), by bilinear interpolation; as they are if they have that size."""
    return images if images.shape[-1] == size else F.interpolate(images, (size, size), mode="bilinear")


def read_image(path):
    """An image file of any mode as a PIL image, 8 bits RGB; raises what Pillow raises, or ValueError."""
    with open(path, "rb") as file, Image.open(file) as image:
        if image.mode.startswith("I"):  # 16 bits; convert would make all above 255 white
            values = np.asarray(image).clip(0, 2**16 - 1) // 256
            return Image.fromarray(values.astype(np.uint8)).convert("RGB")
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers of any range; save it in 8 or 16 bits")
        if "transparency" in image.info:  # of a palette, which convert would warn of
            image = image.convert("RGBA")
        return image.convert("RGB")


class _Files:
    """A sequence of (PIL image, label) from paths and labels."""

    def __init__(self, paths, labels):
        self.paths, self.labels = paths, labels

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return read_image(self.paths[i]), self.labels[i]


def _mapped_images(samples, keep, shape, folder, parts):
    """The decoded images of files, as a tensor that is mapped from a file in the folder, made if not there.

    The file is named by paths, sizes and times of the images, so that one that has changed is decoded anew.
    """
    digest = hashlib.sha256(repr(shape).encode())
    for i in keep:
        stat = os.stat(samples.paths[i])
        digest.update(os.fsencode(os.path.abspath(samples.paths[i])))
        digest.update(f" {stat.st_size} {stat.st_mtime_ns}\n".encode())
    path = folder / f"{digest.hexdigest()[:16]}.uint8"

    def there():
        return path.exists() and path.stat().st_size == math.prod(shape)

    while int(os.environ.get("LOCAL_RANK", 0)) > 0 and not there():
        time.sleep(0.5)  # of the processes of a machine, the first decodes
    with one_at_a_time(folder):
        if not there():
            print(f"decoding {len(keep)} images of {shape[-1]} px into {path}", flush=True)
            room = f"give a --data_dir that can be, with room for {math.prod(shape) / 2**20:.0f} MiB"
            with replacing(path, room) as temporary, open(temporary, "wb") as file:
                for images, _ in parts():
                    file.write(images.numpy())
    return torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=torch.uint8).view(shape)


@contextlib.contextmanager
def one_at_a_time(folder):
    """Processes pass here one after another, for the first to make what the others find; None: all at once.

    Where the folder cannot be locked (it may be read-only, with all in it) they do not wait.
    """
    with contextlib.ExitStack() as stack:
        if folder and fcntl:
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(folder / ".lock", "a"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the file is closed
                except BlockingIOError:
                    print(f"waiting for another process, which holds {file.name}", flush=True)
                    fcntl.flock(file, fcntl.LOCK_EX)
        yield


# Images beyond what a device holds stay on the host.


def place(tensors, device):
    """The tensors on the device, if they take less than a third of its free memory, or as they are."""
    if str(device).startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if sum(tensor.nbytes for tensor in tensors) > free / 3:
            return tensors
    return [tensor.to(device) for tensor in tensors]


def fetch(tensors, batches, device):
    """An iterator of the rows of all the tensors, on the device, for each index tensor (or slice) of batches.

    Those of tensors on the host come one batch ahead.
    """
    if all(tensor.device.type == torch.device(device).type for tensor in tensors):
        return ([tensor[batch] for tensor in tensors] for batch in batches)
    return _fetch_ahead(tensors, batches, device)


def _fetch_ahead(tensors, batches, device):
    """A thread gathers and pins the rows; a stream of their own copies them while the device computes."""
    cuda = torch.device(device).type == "cuda"
    stream = torch.cuda.Stream(device) if cuda else None

    def copy(batch):
        rows = [tensor[batch] for tensor in tensors]
        if not cuda:
            return [row.to(device) for row in rows], None
        with torch.cuda.stream(stream):
            rows = [row if row.is_cuda else row.pin_memory().to(device, non_blocking=True) for row in rows]
            return rows, stream.record_event()

    batches = iter(batches)
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(copy, batch) for batch in itertools.islice(batches, 1)]
        while ahead:
            ahead += [pool.submit(copy, batch) for batch in itertools.islice(batches, 1)]
            rows, copied = ahead.pop(0).result()
            if copied:
                torch.cuda.current_stream(device).wait_event(copied)
                for row in rows:  # so that their memory is not given away while the device still reads
                    row.record_stream(torch.cuda.current_stream(device))
            yield rows


def _open_dataset(key, split, folder):
    """A data set's split as a sequence of (PIL image, label)."""
    if key == "digits":
        return _digits(split)
    if key == "imagefolder":
        return _image_folder(split, folder)
    if key in ARCHIVES:
        root = _unpack(key, folder)
        try:
            return {"tinyimagenet": _tiny_imagenet, "cub2011": _cub2011, "dogs": _dogs}[key](split, root)
        except Exception as error:  # of the lists, which may be cut off, text or scipy's
            fail(
                f"{root}: {key} is not complete there ({error}); remove that folder to have it unpacked again"
            )
    train = split == "train"
    tv = torchvision.datasets
    try:
        if key == "cifar10":
            return tv.CIFAR10(folder, train, download=True)
        if key == "cifar100":
            return tv.CIFAR100(folder, train, download=True)
        if key == "aircraft":
            # 6,667 images: "trainval", labels by variant.
            return tv.FGVCAircraft(folder, "trainval" if train else "test", "variant", download=True)
        # 1,020 images: "train" without "val", as the authors do.
        return tv.Flowers102(folder, split, download=True)
    except (*BROKEN, RuntimeError, ValueError, KeyError, IndexError) as error:
        url, place = TORCHVISION_ARCHIVES[key]
        fail(
            f"data set {key} is not in {folder}, or not whole, and its download failed ({error}); put {url} "
            f"into {folder / place}, and remove what is there of {key}"
        )


def _digits(split):
    """scikit-learn's 1,797 digits of 8 x 8 pixels: the first 1,297 to train, the last 500 to test.

    The set is in the order of its writers, so the test digits are by other hands.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    part = slice(0, 1297) if split == "train" else slice(1297, None)
    images = np.round(bunch.images[part] * (255 / 16)).astype(np.uint8)
    return [(TF.to_pil_image(image), int(label)) for image, label in zip(images, bunch.target[part])]


def _image_folder(split, folder):
    """DIR/{train,test}/CLASS/*, classes in alphabetical order of the training folder."""
    for part in ("train", split):
        if not (folder / part).is_dir():
            fail(
                f"{folder / part}: no such folder; an image folder is DIR/train/CLASS/* and DIR/test/CLASS/*"
            )
    try:
        files = torchvision.datasets.ImageFolder(folder / split)
        classes, _ = files.find_classes(folder / "train")
    except (FileNotFoundError, OSError) as error:
        fail(f"{folder / split}: {error}; an image folder is DIR/train/CLASS/* and DIR/test/CLASS/*")
    unknown = sorted(set(files.classes) - set(classes))
    if unknown:
        fail(
            f"{folder / split}: class {unknown[0]!r} has no folder in {folder / 'train'}; add it there or "
            "remove it"
        )
    index = [classes.index(name) for name in files.classes]
    return _Files([path for path, _ in files.samples], [index[label] for _, label in files.samples])


def _unpack(key, data_dir):
    """data_dir/KEY with the archives unpacked; downloads what is not in data_dir yet, checks every MD5."""
    root = Path(data_dir) / key
    if not root.exists():
        partial = root.with_name(key + ".partial")  # moved into place when whole
        for url, md5 in ARCHIVES[key]:
            name = url.rsplit("/", 1)[1]
            try:
                download_url(url, data_dir, name, md5)  # does nothing when the archive is there and whole
                extract_archive(os.path.join(data_dir, name), partial)
            except (*BROKEN, RuntimeError) as error:
                fail(
                    f"data set {key} is not in {data_dir} and the download of {url} failed ({error}); put "
                    f"{name} (MD5 {md5}) into {data_dir}"
                )
        partial.rename(root)
    return root


def _tiny_imagenet(split, root):
    root = root / "tiny-imagenet-200"
    classes = {wnid: i for i, wnid in enumerate(sorted((root / "wnids.txt").read_text().split()))}
    if split == "train":
        paths = [path for wnid in classes for path in sorted((root / "train" / wnid / "images").iterdir())]
        return _Files(paths, [classes[path.parts[-3]] for path in paths])
    rows = [line.split("\t")[:2] for line in (root / "val/val_annotations.txt").read_text().splitlines()]
    return _Files([root / "val/images" / name for name, _ in rows], [classes[wnid] for _, wnid in rows])


def _cub2011(split, root):
    root = root / "CUB_200_2011"
    columns = [
        [line.split()[1] for line in (root / name).read_text().splitlines()]
        for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    ]
    wanted = "1" if split == "train" else "0"
    rows = [(root / "images" / path, int(label) - 1) for path, label, part in zip(*columns) if part == wanted]
    return _Files([path for path, _ in rows], [label for _, label in rows])


def _dogs(split, root):
    from scipy.io import loadmat  # a dependency of scikit-learn

    lists = loadmat(root / f"{split}_list.mat", squeeze_me=True)
    paths = [root / "Images" / str(name) for name in lists["file_list"]]
    return _Files(paths, [int(label) - 1 for label in lists["labels"]])


# ------------------------------------------------------------------------------------------------------------
# Networks
# ------------------------------------------------------------------------------------------------------------


def default_depth(image_size):
    """The paper's depth of the ConvNet: 3 at 32 px, 4 at 64 px (a last map of 4 x 4); never less than 2."""
    return max(2, round(math.log2(image_size / 4)))


class ConvNet(nn.Module):
    """The student: depth x [3x3 convolution, instance norm, ReLU, 2x2 average pooling], then a linear head to
    out_dim.

    Instance norm is GroupNorm with a group a channel: no running statistics, so the parameters are the whole
    network. With out_dim 512 at 32 px it has P = 1,348,608 parameters. features(x) is what the probe sees
    (paper, appendix A).
    """

    def __init__(self, out_dim, image_size=32, channels=3, width=128, depth=3):
        super().__init__()
        if depth > math.log2(image_size):
            fail(f"--depth {depth} halves images of {image_size} px to nothing; choose a smaller one")
        blocks = []
        for i in range(depth):
            blocks += [
                nn.Conv2d(channels if i == 0 else width, width, 3, padding=1),
                nn.GroupNorm(width, width),
                nn.ReLU(),
                nn.AvgPool2d(2),
            ]
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(width * (image_size // 2**depth) ** 2, out_dim)

    def features(self, x):
        """(B, C, H, W) -> (B, F), the flattened last map; F = 2,048 at 32 px and depth 3."""
        return self.body(x).flatten(1)

    def forward(self, x):
        """(B, C, H, W) -> (B, out_dim)."""
        return self.head(self.features(x))


class ResNet(torchvision.models.ResNet):
    """torchvision's ResNet of basic blocks for small images: 3x3 stem of stride 1, no max-pooling, any width.

    blocks (2, 2, 2, 2) is ResNet-18 (the teacher), (1, 1, 1, 1) is ResNet-10. out_dim None: no head,
    forward(x) is features(x), (B, 8 width). strides are those of the four stages.
    """

    def __init__(
        self,
        blocks=(2, 2, 2, 2),
        out_dim=None,
        channels=3,
        width=64,
        norm_layer=nn.BatchNorm2d,
        strides=(1, 2, 2, 2),
    ):
        super().__init__(BasicBlock, blocks, norm_layer=norm_layer)
        self.inplanes = width
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = norm_layer(width)
        self.maxpool = nn.Identity()
        for i, (n, stride) in enumerate(zip(blocks, strides)):
            setattr(self, f"layer{i + 1}", self._make_layer(BasicBlock, width * 2**i, n, stride))
        for module in self.modules():  # torchvision's initialisation, for the layers just made
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.fc = nn.Identity() if out_dim is None else nn.Linear(8 * width, out_dim)

    def features(self, x):
        """(B, C, H, W) -> (B, 8 width), averaged over the last map."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(x).flatten(1)

    def forward(self, x):
        return self.fc(self.features(x))


# A network as one vector: what trajectories hold, and what distillation differentiates.


def flatten(net):
    """All parameters of net as one new vector (P,), in the order of net.parameters().

    Raises ValueError if net has buffers (BatchNorm's running statistics): a trajectory would not hold them.
    """
    if any(True for _ in net.buffers()):
        raise ValueError(
            "a student with buffers (BatchNorm?) cannot be a trajectory: use a norm without running "
            "statistics"
        )
    return torch.cat(
        [p.detach().reshape(-1) for p in net.parameters()]
    )  # cat copies; a view would go on training


def layout(width):
    """The memory format for networks of this width on a CPU: channels_last, a seventh faster, from 8 channels on.

    oneDNN as torch 2.14.1 ships it corrupts memory on processors with AVX2 and no AVX-512 in the backward pass
    of a strided 1x1 convolution with 4 input channels in channels_last; 8 channels, or contiguous, are fine.
    """
    return torch.channels_last if width >= 8 else torch.contiguous_format


def forward_flat(net, theta, x, memory_format=torch.contiguous_format):
    """net(x) with the parameters theta (P,) in place of net's own; differentiable in theta and x.

    memory_format: of x and of the convolutions' weights.
    """
    names, shapes = zip(*((name, p.shape) for name, p in net.named_parameters()))
    parts = [part.view(s) for part, s in zip(theta.split([s.numel() for s in shapes]), shapes)]
    parts = [p.contiguous(memory_format=memory_format) if p.ndim == 4 else p for p in parts]
    x = x.contiguous(memory_format=memory_format)
    return torch.func.functional_call(net, dict(zip(names, parts)), (x,))


@torch.no_grad()
def encode(function, images, mean, std, device=None, rows=None, batch_size=500):
    """function(normalised images) over images (N, C, H, W) uint8, in batches; (N, ...) on the device.

    device: that of the function's network, if the images are on another; rows: of these images only, (n,).
    """
    parts = (slice(i, i + batch_size) for i in range(0, len(images), batch_size))
    batches = fetch([images], parts if rows is None else rows.split(batch_size), device or images.device)
    return torch.cat([function(normalise(batch, mean, std)) for (batch,) in batches])


# ------------------------------------------------------------------------------------------------------------
# Self-supervised losses and views
# ------------------------------------------------------------------------------------------------------------


def barlow_twins_loss(z1, z2, off_diagonal):
    """Barlow Twins (paper, eq. 1): sum_i (1 - F_ii)^2 + off_diagonal sum_{i != j} F_ij^2, for z1, z2 (B, d).

    F is the cross-correlation of the batch; 0 if both views agree and the dimensions are uncorrelated. The
    standard deviation divides by B, not B - 1, or F_ii of two equal views would be (B - 1) / B.
    """
    z1 = (z1 - z1.mean(0)) / (z1.var(0, correction=0) + 1e-12).sqrt()
    z2 = (z2 - z2.mean(0)) / (z2.var(0, correction=0) + 1e-12).sqrt()
    correlation = z1.T @ z2 / len(z1)  # (d, d)
    diagonal = correlation.diagonal()
    return (1 - diagonal).square().sum() + off_diagonal * (
        correlation.square().sum() - diagonal.square().sum()
    )


def simclr_loss(z1, z2, temperature):
    """SimCLR's NT-Xent for z1, z2 (B, d): cross-entropy of finding the other view among 2 B - 1 images."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
    other = torch.arange(len(z), device=z.device).roll(len(z1))
    return F.cross_entropy(similarity, other)


def random_view(
    images,
    generator,
    min_crop=0.08,
    flip=True,
    jitter=(0.4, 0.4, 0.4, 0.1),
    blur=0.0,
    solarize=0.0,
    part_of=None,
):
    """One random view of each image, every image by its own draw, computed as a batch on the images' device.

    Random resized crop, mirror, colour jitter (with probability 0.8) and greyscale (0.2), then blur and
    solarize.

    Args:
        images: (B, C, H, W) uint8, or float in [0, 1]; with C = 1 only brightness and contrast are jittered.
        generator: a torch.Generator of the images' device.
        min_crop: smallest crop, as a share of the image's area.
        flip: mirror half of the images.
        jitter: strength of brightness, contrast, saturation, and hue (in turns).
        blur, solarize: probabilities.
        part_of: (B', first): the images are those from `first` on of a batch of B', and get its draws.

    Returns (B, C, H, W) in [0, 1], float32 or of the images' own precision, differentiable in images.

    differs: torchvision jitters in a random order, cuts to [0, 1] after each change and turns the hue in HSV.
    Here the hue is a rotation in YIQ; then brightness, contrast, saturation and hue commute, and one 3x3
    matrix and an offset an image are all of them, greyscale (saturation 0) included.
    """
    b, channels = images.shape[:2]
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    device, dtype = x.device, x.dtype
    total, first = part_of or (b, 0)

    def draw():  # in float32, so that a draw does not depend on the precision
        return torch.rand(total, generator=generator, device=device)[first : first + b]

    def uniform(low, high):
        return draw().to(dtype) * (high - low) + low

    def chance(p):
        return draw() < p

    # Crop and mirror: an affine grid in [-1, 1]. Where torchvision draws again, sides above 1 are cut to 1.
    area, log_ratio = uniform(min_crop, 1), uniform(math.log(3 / 4), math.log(4 / 3))
    w, h = (area * log_ratio.exp()).sqrt().clamp(max=1), (area / log_ratio.exp()).sqrt().clamp(max=1)
    affine = torch.zeros(b, 2, 3, device=device, dtype=dtype)
    affine[:, 0, 0] = w * (1 - 2 * chance(0.5).to(dtype)) if flip else w
    affine[:, 1, 1] = h
    affine[:, 0, 2], affine[:, 1, 2] = uniform(-1, 1) * (1 - w), uniform(-1, 1) * (1 - h)
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)

    # Colours: y = gain * M x + (1 - contrast) * mean luma of the image.
    on = chance(0.8).to(dtype)
    brightness, contrast = (1 + on * uniform(-s, s) for s in jitter[:2])
    saturation = 1 + on * uniform(-jitter[2], jitter[2])
    angle = on * uniform(-jitter[3], jitter[3]) * 2 * math.pi
    saturation = saturation * (~chance(0.2)).to(dtype)
    if channels == 3:
        to_yiq = torch.tensor(
            [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]],
            device=device,
            dtype=dtype,
        )
        cos, sin = saturation * angle.cos(), saturation * angle.sin()
        turn = torch.zeros(b, 3, 3, device=device, dtype=dtype)
        turn[:, 0, 0], turn[:, 1, 1], turn[:, 2, 2], turn[:, 1, 2], turn[:, 2, 1] = 1, cos, cos, -sin, sin
        matrix = to_yiq.inverse() @ turn @ to_yiq
        luma = to_yiq[0]
    else:
        matrix = torch.eye(channels, device=device, dtype=dtype).expand(b, -1, -1)
        luma = torch.full((channels,), 1 / channels, device=device, dtype=dtype)
    mean_luma = (luma.view(-1, 1, 1) * x).sum(1).mean((1, 2))  # (B,)
    matrix = matrix * (brightness * contrast).view(-1, 1, 1)
    offset = ((1 - contrast) * brightness * mean_luma).view(-1, 1, 1)
    x = (torch.bmm(matrix, x.flatten(2)) + offset).view_as(x).clamp(0, 1)

    if blur > 0:  # a Gaussian of its own width an image, as one grouped convolution a direction
        radius = max(1, x.shape[-1] // 20)
        at = torch.arange(-radius, radius + 1, device=device)
        kernel = (-at.square() / (2 * uniform(0.1, 2).square().view(-1, 1))).exp()
        kernel = kernel / kernel.sum(1, keepdim=True)
        kernel = torch.where(chance(blur).view(-1, 1), kernel, (at == 0).to(dtype))
        kernel = kernel.repeat_interleave(channels, 0).view(b * channels, 1, 1, -1)
        flat = F.pad(x, [radius] * 4, mode="reflect").flatten(0, 1).unsqueeze(0)
        flat = F.conv2d(flat, kernel, groups=b * channels)
        x = F.conv2d(flat, kernel.transpose(2, 3), groups=b * channels).view_as(x)
    if solarize > 0:
        x = torch.where(chance(solarize).view(-1, 1, 1, 1) & (x >= 0.5), 1 - x, x)
    return x


# ------------------------------------------------------------------------------------------------------------
# Objectives of students
# ------------------------------------------------------------------------------------------------------------


def mse_loss(outputs, targets, reduction="mean"):
    """F.mse_loss, which torch.func cannot differentiate forwards in one of its arguments (--compile)."""
    squares = (outputs - targets).square()
    return squares.mean() if reduction == "mean" else squares


LOSSES = {"kd": mse_loss, "supervised": F.cross_entropy}  # of the student's outputs and the targets
SSL = {  # of the student's outputs for two views; weights as in train_teacher.py
    "barlow_twins": lambda z1, z2: barlow_twins_loss(z1, z2, off_diagonal=8 / 1024),
    "simclr": lambda z1, z2: simclr_loss(z1, z2, temperature=0.5),
}
OBJECTIVES = (*LOSSES, *SSL)


def make_objective(name, data, precision="fp32"):
    """The loss of a student on a batch: a function (f, x, z, generator) -> scalar.

    "kd" is the MSE of f(x) to the targets z (eq. 5), "supervised" the cross-entropy to one-hot labels z, both
    without augmentation. SSL compares f of two random views of x, and z is not looked at.

    Args:
        name: one of OBJECTIVES.
        data: the ImageSet whose mean and std the student sees images by, and whose views may be mirrored.
        precision: "bf16" for f in bfloat16 where autocast allows it; the loss itself stays in float32.

    Args of the function: f, images (B, C, H, W) -> (B, D); x, (B, C, H, W) uint8, or float and normalised;
    z, (B, D); generator, a torch.Generator for the views, on the images' device.
    """
    stats = (data.mean, data.std)

    def loss(f, x, z, generator=None):
        f = autocast(f, x.device, precision)
        if name in SSL:
            x = x if x.dtype == torch.uint8 else denormalise(x, *stats)
            views = [random_view(x, generator, flip=data.flip) for _ in range(2)]
            return SSL[name](*(f(normalise(view, *stats)) for view in views))
        return LOSSES[name](f(normalise(x, *stats) if x.dtype == torch.uint8 else x), z)

    return loss


# ------------------------------------------------------------------------------------------------------------
# Linear probe
# ------------------------------------------------------------------------------------------------------------


def linear_probe(features, labels, num_classes, weight_decay=1e-3, iterations=100):
    """The linear classifier of eq. 3, minimising mean cross-entropy + weight_decay ||W||^2 by L-BFGS.

    Args:
        features: (N, F); labels: (N,) int64 in [0, num_classes).
        iterations: at most 20 steps each, as the paper's appendix A counts them; ends early at the optimum.

    Returns weight (num_classes, F) and bias (num_classes,); the bias is not penalised.
    """
    # The mean is taken out of the features and put back into the bias: the same optimum (the bias is free),
    # reached in a fraction of the steps, because ReLU features are all positive.
    centre = features.mean(0)
    x = features - centre
    weight = torch.zeros(num_classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=20 * iterations,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, labels) + weight_decay * weight.square().sum()
        loss.backward()
        return loss

    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False  # --precision is the networks'
    optimizer.step(closure)
    torch.backends.cuda.matmul.allow_tf32 = allowed
    return weight.detach(), (bias - weight @ centre).detach()


def probe_accuracy(train_features, train_labels, test_features, test_labels):
    """Test accuracy in percent of the linear probe fitted to the training features."""
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    weight, bias = linear_probe(train_features, train_labels, num_classes)
    return 100 * ((test_features @ weight.T + bias).argmax(1) == test_labels).float().mean().item()


# ------------------------------------------------------------------------------------------------------------
# Devices and processes
# ------------------------------------------------------------------------------------------------------------


def best_device():
    """ "cuda" if there is one, else "mps", else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


PRECISION_HELP = (
    "tf32: products on a GPU are rounded to 10 bits; bf16: networks in bfloat16, the rest in tf32"
)


def add_run_options(parser, precisions=("fp32", "tf32", "bf16"), precision_help=PRECISION_HELP):
    """The options of how a stage runs, which are the same in all; of them, only --precision counts for what
    it makes (see recipe)."""
    run = parser.add_argument_group("how to run")
    run.add_argument("--device", type=device, default=best_device(), help="where to run")
    run.add_argument("--threads", type=positive, help="CPU threads (default: torch's choice)")
    run.add_argument("--precision", choices=precisions, default="fp32", help=precision_help)
    same = "on a GPU, too, the same command makes the same files, bit for bit; slower"
    run.add_argument("--deterministic", action="store_true", help=same)
    often = "a checkpoint, from which the same command goes on, is written so often; 0: after every step"
    run.add_argument("--checkpoint_minutes", type=at_least(0, float, 1e6), default=5.0, help=often)
    anew = "begin anew in spite of a checkpoint, each time it is given; what is finished stays"
    run.add_argument("--restart", action="store_true", help=anew)


def set_up(args):
    """What every stage does first: threads and precision, and joining the other processes of torchrun."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which torch asks for
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    if world_size() > 1 and not torch.distributed.is_initialized():
        if args.device not in ("cpu", f"cuda:{os.environ.get('LOCAL_RANK')}"):
            fail(f"--device {args.device}: each process wants a device of its own; give cuda, or cpu")
        forever = datetime.timedelta(days=30)  # a process that is done waits for the slowest
        try:
            if args.device == "cpu":
                torch.distributed.init_process_group("gloo", timeout=forever)
            else:
                torch.cuda.set_device(args.device)
                own = torch.device(args.device)
                torch.distributed.init_process_group("nccl", timeout=forever, device_id=own)
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            fail(
                f"WORLD_SIZE={world_size()}: the processes do not meet ({reason}); use torchrun, or unset it"
            )
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the first process speaks for all


def autocast(function, device, precision):
    """The function, a network, in this precision: "bf16" by autocast, with float32 outputs; else as it is."""
    if precision != "bf16":
        return function

    def rounded(x):
        with torch.autocast(device.type, torch.bfloat16):
            return function(x).float()

    return rounded


def rank():
    """This process's number among those that torchrun started, from 0."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdigit() else 0


def world_size():
    """How many processes torchrun started; 1 without it. Exits if the environment says nonsense."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdigit() or int(text) <= rank():
        fail(f"WORLD_SIZE={text}, RANK={os.environ.get('RANK')}: make no sense; use torchrun, or unset them")
    return int(text)


@contextlib.contextmanager
def own_work():
    """Within, a process does what no other does, and says its errors at once."""
    global _own_work
    _own_work = True
    try:
        yield
    finally:
        _own_work = False


def of_first():
    """For a line of progress, which is of the first process's own work."""
    return f"first of {world_size()} processes: " if world_size() > 1 else ""


def wait_for_all():
    """Returns when all processes have come here."""
    if world_size() > 1:
        torch.distributed.barrier()


def average(*tensors):
    """Replace each of the tensors by its mean over the processes."""
    for tensor in tensors if world_size() > 1 else ():
        torch.distributed.all_reduce(tensor)
        tensor /= world_size()


# ------------------------------------------------------------------------------------------------------------
# Files and logs
# ------------------------------------------------------------------------------------------------------------


def fingerprint(*tensors):
    """Sixteen hex digits that tell tensors apart: how a file names the targets that it was made from."""
    digest = hashlib.sha256()
    for tensor in tensors:
        tensor = torch.as_tensor(tensor).detach().cpu().contiguous()
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy())  # without a copy
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def replacing(path, otherwise="make room there, or choose another --out_dir"):
    """Yields the path of a temporary file that takes the place of path in the end, whole or not at all.

    Exits where it cannot be written, and path is as it was; otherwise: what to do then.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")  # a killed run may have left it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # it might be a link to another file
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # or a machine that loses its power may be left with an empty file
        os.replace(temporary, path)
    except OSError as error:
        fail(f"{path}: cannot be written ({error.strerror or error}); {otherwise}", Fatal)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def append(path, record):
    """Add a JSON record to a file, as a line of its own, or nothing: exits if there is no room for it."""
    path = Path(path)
    line = json.dumps(record, default=str) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            if file.read(1) not in (b"", b"\n"):
                line = "\n" + line  # the last line was not written to its end
            if file.write(line.encode()) < len(line.encode()):
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        fail(f"{path}: cannot be written ({error.strerror}); make room, or choose another --out_dir", Fatal)


def read_records(path):
    """The lines of a .jsonl file, [(bytes before it, record)]; the record is None where a line is broken."""
    records, place = [], 0
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        records.append((place, record if isinstance(record, dict) else None))
        place += len(line)
    return records


_claimed = None


def claim(out_dir, path):
    """Whether path, of a run in out_dir, is this process's alone to make, until it claims another or ends.

    On file systems without locks it always is.
    """
    global _claimed
    try:
        if _claimed:
            _claimed.close()  # gives the last claim up
        for folder in (Path(out_dir), Path(path).parent):
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):  # not after hours of work
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        _claimed = open(Path(out_dir) / ".claims", "ab")  # noqa: SIM115  one file, a byte of it a path
    except OSError as error:
        fail(f"{out_dir}: cannot be written ({error.strerror}); choose another --out_dir")
    try:
        name = str(Path(path).relative_to(out_dir)).encode()
        place = int.from_bytes(hashlib.sha256(name).digest()[:7], "big")
        if fcntl:
            fcntl.lockf(_claimed, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def save(path, contents, then=None):
    """Write a dict of tensors and plain Python to path, whole or not at all; adds the torch version.

    The same contents make the same file, bit for bit. then() is called when all is written, just before the
    file takes its place.
    """
    with replacing(path) as temporary:
        try:
            with open(temporary, "wb") as file:  # torch would write the name of a path into the file
                torch.save({**contents, "torch_version": str(torch.__version__)}, file)
        except RuntimeError as error:  # how torch may say that the disk is full
            raise OSError(errno.ENOSPC, f"{str(error).splitlines()[0]}: is the disk full?") from None
        if then:
            then()


def load(path, keys, made_by, mmap=False):
    """Read what save wrote, with weights_only=True: a file cannot run code. Exits if it is not such a file.

    Args:
        keys: what it must have, {key: kind}; kind is the number of dimensions of a float32 tensor of finite
            values, float for a number above 0, or None for anything.
        made_by: the command to name when the file is missing or of another kind.
        mmap: leave the tensors on disk until they are read.
    """
    again = f"move it away and make it again with {made_by}"
    if not Path(path).is_file():
        found = "is not a file" if Path(path).exists() else "not found"
        fail(f"{path}: {found}; make it with {made_by}")
    try:
        whole = zipfile.is_zipfile(path)
        with zipfile.ZipFile(path) if whole else contextlib.nullcontext() as archive:
            damaged = archive.testzip() if whole else None  # torch itself does not look at the checksums
        if damaged:
            raise ValueError(f"its part {damaged} is damaged")
        if mmap and not whole:  # else it may be of an old version of torch
            raise ValueError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused anyway
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        ids = [contents.get(name, "") for name in ("images_id", "targets_id")]
        options = contents.get("options", {})
        plain = json.dumps([options, ids]) and all(isinstance(name, str) for name in ids)
        if not plain or not all(isinstance(made, dict) for made in options.values()):
            raise TypeError
    except (AttributeError, TypeError):
        fail(f"{path}: is another kind of file; {again}")
    except pickle.UnpicklingError:
        fail(f"{path}: is damaged, or holds more than tensors and plain values: code, maybe; {again}")
    except Exception as error:  # torch raises many kinds for a broken file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        reason = reason if whole else "it was cut off, or is of another kind"
        fail(f"{path}: is not a .pt file that can be read ({reason}); {again}")
    for key, kind in keys.items():
        if key not in contents:
            fail(f"{path}: has no {key!r}, so it is another kind of file; {again}")
        value = contents[key]
        if kind is float:
            if not isinstance(value, (int, float)) or not 0 < value < 1e30:
                fail(f"{path}: {key!r} is {value}, not a number above 0; {again}")
        elif kind is not None:
            plain = isinstance(value, torch.Tensor) and value.layout == torch.strided
            if not plain or value.dtype != torch.float32 or value.ndim != kind:
                fail(f"{path}: {key!r} is not a float32 tensor of {kind} dimensions; {again}")
            if not all(part.isfinite().all() for part in value.split(10_000)):
                fail(f"{path}: {key!r} holds numbers that are not finite; {again}")
            contents[key] = value.detach()
    return contents


def load_targets(out_dir, dataset, data_dir, image_size=None, limit=None, objective="kd"):
    """The targets of a run with the training images that they belong to, for the stages after the teacher.

    Returns (train ImageSet, targets (N, D) float32, made): made is what the next file carries of its origin,
    {options of the earlier stages, images_id, targets_id}. The targets stay on disk until they are read.
    Exits if targets and images do not belong together. A fork's targets.pt needs no more than {targets}. It
    is not read for two kinds of objectives: the targets of "supervised" are the labels, one-hot, and SSL has
    none, (N, 0).
    """
    if objective == "supervised" or objective in SSL:
        train = load_images(dataset, "train", data_dir, image_size, limit)
        num_classes = int(train.labels.max()) + 1
        if objective == "supervised" and num_classes < 2:
            fail(f"--objective supervised: {dataset} has one class, so no labels to learn; choose another")
        one_hot = F.one_hot(train.labels, num_classes).float()
        targets = one_hot if objective == "supervised" else one_hot[:, :0]
        here = images_id(train.images)
        targets_id = fingerprint(targets, *here.encode())
        return train, targets, {"options": {}, "images_id": here, "targets_id": targets_id}
    path = Path(out_dir) / "targets.pt"
    made_by = f"train_teacher.py --dataset {dataset} --out_dir {out_dir}"
    contents = load(path, {"targets": 2}, made_by, mmap=True)
    targets = contents["targets"]
    train = load_images(dataset, "train", data_dir, image_size, limit)
    n, px, here = len(train.images), train.images.shape[-1], images_id(train.images)
    if len(targets) != n:
        fail(
            f"{path}: has {len(targets)} targets, but --dataset {dataset} has {n} training images; give the "
            "--dataset, --data_dir and --limit that they were made with, or another --out_dir"
        )
    if contents.get("images_id", here) != here:
        fail(
            f"{path}: was made from other images than --dataset {dataset} at {px} px; give the --dataset, "
            "--data_dir and --image_size that it was made with, or another --out_dir"
        )
    made = {"options": contents.get("options", {}), "images_id": here, "targets_id": fingerprint(targets)}
    return train, targets, made


ADDED = dict(  # what files from before these options were made with
    centre=False, ema=0.0, sam=0.0, log_lr=False, distance="elements", stored_size=None
)  # fmt: skip


def with_added(options):
    """A file's options, {stage: {option: value}}, with ADDED where it is older than these."""
    filled = {}
    for stage, made in options.items():
        decay = 1e-3 if made.get("method") == "krr_st" else 1.0
        filled[stage] = {**ADDED, "decay": decay, **made} if made else {}
    return filled


def differing(options, others):
    """The first option in which two differ: (its name, the one value, the other), or None.

    Both are {stage: {option: value}}; what one of them does not name is no difference.
    """
    for stage, made in options.items():
        other = others.get(stage, {})
        for name, value in made.items():
            if name in other and other[name] != value:
                return name, value, other[name]
    return None


def is_done(path, stage, options, keys, made=()):
    """Whether path is there, made by these options of the stage and from load_targets' made; exits if not so.

    A file that exists is a piece of work done: so a stage that is started again goes on where it stopped.
    """
    if not Path(path).exists():
        return False
    contents = load(path, keys, f"{stage}.py", mmap=True)
    differ = differing({stage: options}, with_added(contents.get("options", {})))
    if differ:
        name, now, then = differ
        fail(
            f"{path}: exists, made with --{name} {then}, now --{name} {now}; move it away, or choose another "
            "--out_dir"
        )
    check_origin(path, contents, made)
    return True


def check_origin(path, contents, made):
    """Exits if a file's contents are of other targets or images than the run's; a fork's file may not say."""
    for name, what in {"targets_id": "targets than those in targets.pt", "images_id": "images"}.items():
        if name in made and contents.get(name, made[name]) != made[name]:
            fail(f"{path}: was made from other {what} now; move one of them away")


def run_name(dataset):
    """The default folder's name of a run on a data set: "cifar10", or the last part of "imagefolder:DIR"."""
    key, _, folder = dataset.partition(":")
    return Path(folder).resolve().name if folder else key


def recipe(options):
    """Those of a stage's options that its result depends on; the others may differ from run to run.

    Of "imagefolder:DIR" the folder is left out: images are known by their images_id, wherever they are. Of
    --recipe, too: the options that it stands for are among the others.
    """
    free = ["data_dir", "out_dir", "name", "recipe", "device", "threads", "compile", "micro_batch"]
    free += ["num_experts", "first_expert", "deterministic", "checkpoint_minutes", "restart"]
    made = {name: value for name, value in options.items() if name not in free}
    return {**made, "dataset": made["dataset"].partition(":")[0]}


def keep_memory():
    """Keep the memory of large tensors that are freed for the next ones, instead of handing it back.

    glibc gives large blocks back to the system at once, and page by page they are asked for again: on the
    CPU that can be more than half of a student's step (tests/benchmark.py). Elsewhere it does nothing.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks from the heap, too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink it
    except (OSError, TypeError, AttributeError):
        pass  # another C library


def compiled(function):
    """torch.compile(function) for the few shapes that it sees; exits in its first call if that fails."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses CUDA on a CPU
    warnings.filterwarnings("ignore", ".*torch.jit.script.*", FutureWarning)  # of torch itself
    fast = torch.compile(function, dynamic=False)

    def call(*args):
        try:
            return fast(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            fail(f"--compile does not work here ({reason}); it needs a C++ compiler; give --no-compile")

    return call


# A stage that is stopped goes on from its checkpoint when the same command is given again.


def versions():
    """What the results may depend on: {python, torch, ...: version, commit: of these scripts, or None}."""
    packages = {"torch": str(torch.__version__), "torchvision": torchvision.__version__}
    packages |= {"numpy": np.__version__, "scikit-learn": importlib.metadata.version("scikit-learn")}
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
        commit = done.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {"commit": commit, "python": platform.python_version(), **packages}


class Log:
    """OUT_DIR/STAGE.jsonl, a JSON record a line; the first record of each start says how it was made.

    Args:
        args: the options of the stage.
        ids: what else the results depend on: {images_id, targets_id, ...}, plain values.
        options: those that the results depend on, if they are not recipe's.
    """

    def __init__(self, out_dir, stage, args, ids, options=None):
        self.path, self.args = Path(out_dir) / f"{stage}.jsonl", args
        # What tells this run from others; as it is read again from a file.
        self.run = json.loads(json.dumps({**(options or recipe(vars(args))), **ids}, default=str))
        self.begun, self.stale = False, None

    def begin(self, resumed=None):
        """Write the record of a start, of several processes the first; resumed: {epoch: ...} of a checkpoint.

        Later calls do nothing.
        """
        if self.begun or rank() > 0:
            return
        self.begun = True
        launcher = ["torchrun", f"--nproc_per_node={world_size()}"] if world_size() > 1 else ["python"]
        where = self.args.device
        self.write(
            command=shlex.join([*launcher, *sys.argv]),
            options=vars(self.args),
            run=self.run,
            resumed=resumed or {},
            time=time.strftime("%Y-%m-%d %H:%M:%S"),
            **versions(),
            device=torch.cuda.get_device_name(where) if where.startswith("cuda") else where,
            threads=torch.get_num_threads(),
            processes=world_size(),
        )

    def write(self, **record):
        self.begin()
        append(self.path, record)

    def earlier(self):
        """(records of this run, place where it begins, or None if the log ends in another run)."""
        records, begins, own = [], None, False
        for place, record in read_records(self.path):
            if record and "options" in record:
                own = record.get("run") == self.run
                begins = (place if begins is None else begins) if own else None
            elif record and own:
                records.append(record)
        return records, begins

    def cut(self, place, digest):
        """Take away what came after a checkpoint; digest: of the log until there. Not if it has changed."""
        data = self.path.read_bytes() if self.path.is_file() else b""
        if hashlib.sha256(data[:place]).hexdigest() != digest:
            print(f"warning: {self.path} has changed since the checkpoint: nothing is cut off it", flush=True)
        elif place < len(data):
            os.truncate(self.path, place)

    def of_this_start(self):
        """The bytes of the log without what earlier starts of the same run have written, if it is stale."""
        data, (begins, ends) = self.path.read_bytes(), self.stale or (0, 0)
        return data[:begins] + data[ends:]

    def replace_earlier(self):
        """Take that away, when the present start has its first checkpoint."""
        if self.stale:
            data = self.of_this_start()
            with replacing(self.path) as temporary:
                temporary.write_bytes(data)
            self.stale = None

    def has(self, **values):
        """Whether a start of the same run has written a record with these values."""
        values = json.loads(json.dumps(values, default=str))
        return any(all(r.get(name) == v for name, v in values.items()) for r in self.earlier()[0])


_checkpoint = None  # the one that ticks: a signal then waits for the end of the step
_signal, _signal_at = None, 0.0  # the number of the signal that came, and when


class Checkpoint:
    """A file with the state of a stage that is under way, from which the same command goes on, bit for bit.

    Args:
        path: of the file; it is replaced as a whole, and taken away by remove when the results are written.
        args: the stage's, with checkpoint_minutes and restart.
        log: the stage's. It begins here, cut back to the checkpoint; if there is none, what earlier starts of
            the run have written goes when the first is written. With own it stays, for others write it, too.
        diverged: what to say, with advice, of a state that is not finite.
        at: where a beginning is, {epoch: 0, ...}: numbers and tensors.
        own: the work is this process's own; else the first of several processes writes for all.
        parts: what is restored, each a module, an optimizer, a schedule, a generator or a list of such, or a
            tensor, which is filled in place. The generators of torch itself are always among them.

    After it, at is as given, or what it was when the file was written. Exits if the file is of another run
    than the log (other options or ids), unless --restart is given.
    """

    def __init__(self, path, args, log, diverged, at, own=False, **parts):
        self.path, self.log, self.diverged, self.at = Path(path), log, diverged, at
        self.parts = {**parts, "torch": torch.default_generator}
        self.writes, self.minutes = own or rank() == 0, args.checkpoint_minutes
        self.anew, self.own = args.restart, own
        self.resumed = self.path.exists() and not self.anew
        if self.resumed:
            contents = read_checkpoint(self.path, log.run)
            try:
                for name, value in at.items():
                    if _kind(contents["at"][name]) != _kind(value):
                        raise ValueError(f"{name} is {contents['at'][name]!r}")
                for name, part in self.parts.items():
                    _restore(part, contents["parts"][name])
                for i, state in enumerate(contents["cuda"][: torch.cuda.device_count()]):
                    torch.cuda.set_rng_state(state, i)
                self.at = contents["at"]
            except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
                reason = " ".join(str(error).split())[:160]
                fail(f"{self.path}: does not fit ({reason}); begin anew with --restart", Fatal)
        if not own:
            wait_for_all()  # before the first writes the next
        numbers = {name: value for name, value in self.at.items() if type(value) is int}
        if self.resumed:
            text = ", ".join(f"{name} {value}" for name, value in numbers.items())
            print(f"going on from {self.path}: {text}", flush=True)
        if not own and rank() == 0 and self.resumed:
            log.cut(*contents["log"])
        elif not own and rank() == 0:
            begins, ends = log.earlier()[1], log.path.stat().st_size if log.path.exists() else 0
            log.stale = None if begins is None else (begins, ends)
        log.begin(numbers if self.resumed else None)
        self.saved = time.monotonic()

    def tick(self, last=False, **at):
        """To be called after each step, with what has changed of at; saves if it is time.

        Where a signal came in the meantime, it saves and exits. last: no step follows.
        """
        global _checkpoint
        self.at.update(at)
        stop = _signal is not None and self.writes
        if self.writes and (last or stop or time.monotonic() - self.saved >= 60 * self.minutes):
            self.save()
        _checkpoint = None if last else self
        if stop:
            command = "the same command without --restart" if self.anew else "the same command"
            _stop(f"{command} goes on from {self.path}")

    def save(self):
        """Write the file; exits if a number of the state is not finite, and the one before it stays."""
        data = b"" if self.own else self.log.of_this_start()
        contents = {
            "parts": {name: _state(part) for name, part in self.parts.items()},
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            "at": self.at,
            "log": [len(data), hashlib.sha256(data).hexdigest()],
            "run": self.log.run,
        }
        if not _finite(contents):
            fail(f"{self.diverged}; {self.kept()}")
        save(self.path, {**contents, "seal": _seal(contents)}, then=self.log.replace_earlier)
        self.saved = time.monotonic()

    def kept(self):
        """A clause that says what is there after an error."""
        return f"{self.path} holds the last good state" if self.path.exists() else "no checkpoint was due yet"

    def remove(self):
        """Take the file away, when the results are there; not while others may still read it."""
        if self.writes:
            self.path.unlink(missing_ok=True)


def read_checkpoint(path, run):
    """The contents of a checkpoint; exits if its run, {option or id: value}, is another."""
    names = ("parts", "cuda", "at", "log", "run")
    contents = load(path, dict.fromkeys((*names, "seal")), "--restart")
    then = contents["run"] if isinstance(contents["run"], dict) else {}
    for name in {**then, **run}:
        if then.get(name) != run.get(name):
            fail(
                f"{path}: was begun with --{name} {then.get(name)}, now --{name} {run.get(name)}; give what "
                "it was begun with, or begin anew with --restart"
            )
    if not _finite(contents) or contents["seal"] != _seal({name: contents[name] for name in names}):
        fail(f"{path}: was changed after it was written; begin anew with --restart")
    return contents


def _seal(state, digest=None):
    """A digest of nested dicts and lists of tensors and plain values; what was changed does not go on."""
    seal = digest or hashlib.sha256()
    if isinstance(state, torch.Tensor):
        seal.update(f"{state.dtype} {tuple(state.shape)}".encode())
        seal.update(state.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    elif isinstance(state, dict):
        for name, value in state.items():
            seal.update(repr(name).encode())
            _seal(value, seal)
    elif isinstance(state, (list, tuple)):
        seal.update(f"{type(state)} {len(state)}".encode())
        for value in state:
            _seal(value, seal)
    else:
        seal.update(repr(state).encode())
    return seal.hexdigest()


def _kind(value):
    return (type(value), *((value.shape, value.dtype) if isinstance(value, torch.Tensor) else ()))


def _state(part):
    if isinstance(part, list):
        return [_state(p) for p in part]
    if isinstance(part, torch.Tensor):
        return part.detach()
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def _restore(part, state):
    if isinstance(part, list):
        for p, s in zip(part, state, strict=True):
            _restore(p, s)
    elif isinstance(part, torch.Tensor):
        if part.shape != state.shape:
            raise ValueError(f"{tuple(state.shape)} where {tuple(part.shape)} should be")
        part.data.copy_(state)
    elif isinstance(part, torch.Generator):
        if len(state) == len(part.get_state()):
            part.set_state(state)
        else:  # that of another kind of device
            part.manual_seed(int(state.sum()))
    else:
        part.load_state_dict(state)


def _finite(state):
    if isinstance(state, torch.Tensor):
        real = state.layout == torch.strided and not state.is_meta
        return real and bool(state.isfinite().all())
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else []
    return all(_finite(part) for part in parts)


def first_not_finite(losses):
    """The index of the first loss of losses (n,) that is not finite; None if all are."""
    bad = (~losses.isfinite()).nonzero()
    return bad[0].item() if len(bad) else None


def _on_signal(number, frame):
    """SIGTERM and Ctrl-C: the step under way is finished, for tick to save; a later Ctrl-C does not wait."""
    global _signal, _signal_at
    later = _signal is not None and number == signal.SIGINT and time.monotonic() - _signal_at > 1
    if _signal is None:  # run_all.sh passes Ctrl-C on as SIGTERM
        _signal, _signal_at = number, time.monotonic()
    if _checkpoint is None or later:
        _stop("give the same command again")


def _stop(text):
    """Exit as a signal demands, with a line on stderr, if there is still somebody to read it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is sys.stderr and rank() == 0:
                print(f"stopped by {signal.Signals(_signal).name}: {text}", file=stream)
            stream.flush()
        except (OSError, RuntimeError):  # what it was piped to was stopped, too; or it was in use just then
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    raise SystemExit(128 + _signal)


def run(main, args, smaller="a smaller --batch_size or --width"):
    """main(args), for the command line: what the machine refuses ends in one line too.

    smaller: what to choose where there is not enough memory.
    """
    keep_memory()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)
    sys.stdout.reconfigure(errors="replace")  # a terminal without "±" is no reason to stop
    try:
        main(args)
        if world_size() > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if world_size() > 1 and ("gloo" in text or isinstance(error, torch.distributed.DistError)):
            fail(f"process {rank()}: another one ended; what it said, or torchrun's report, tells why")
        if "deterministic implementation" in text:
            fail(f"--deterministic: {text.split('.')[0]}; leave it out")
        signs = ("allocate memory", "out of memory", "bad_alloc", "ALLOC_FAILED")
        if not isinstance(error, MemoryError) and not any(sign in text for sign in signs):
            raise
        where = "the device" if isinstance(error, torch.OutOfMemoryError) else "the machine"
        kept = f"; {_checkpoint.kept()}" if _checkpoint else ""
        fail(f"{where} is out of memory ({(text or 'MemoryError').splitlines()[0]}); choose {smaller}{kept}")
    except OSError as error:
        fail(f"{error.filename or 'a file'}: {error.strerror or error}")


class Progress:
    """Says how far a stage is, in a line at most every `interval` seconds, and at its end.

    Args:
        what: is counted: "epoch".
        total: how many there will be.
        size, unit: of one of them, for the speed: 50,000 "images".
        before: how many an earlier start has done.
    """

    def __init__(self, what, total, size, unit, interval=5.0, before=0):
        self.what, self.total, self.size, self.unit, self.interval = what, total, size, unit, interval
        self.started = self.said = time.time()
        self.before, self.then, self.ended = before, before, False

    def __call__(self, done, **values):
        """done of total, also between two: 3.4 epochs; values: what else to show, {name: text or number}.

        Returns whether it said something.
        """
        now = time.time()
        if self.ended or _signal or (now - self.said < self.interval and done < self.total):
            return False  # after a signal, too: what it goes to may be gone
        self.ended = done >= self.total
        if self.ended:  # the speed of the whole; before, that of the last seconds
            self.then, self.said = self.before, self.started
        rate = (done - self.then) / max(now - self.said, 1e-9)
        speed, left = rate * self.size, (self.total - done) / max(rate, 1e-9)
        texts = {k: f"{v:.4f}" if isinstance(v, (float, torch.Tensor)) else v for k, v in values.items()}
        shown = [f"{name.replace('_', ' ')} {text}" for name, text in texts.items()]
        shown += [f"{speed:,.0f} {self.unit}/s" if speed >= 10 else f"{speed:.2g} {self.unit}/s"]
        shown += [f"{now - self.started:.0f} s in all"] if self.ended else []
        shown += (
            [f"{left:.0f} s left" if left < 600 else f"{left / 60:.0f} min left"] if left and rate else []
        )
        at = f"{done:.1f}" if done != int(done) else f"{int(done)}"
        print(f"{self.what} {at}/{self.total}: {', '.join(shown)}", flush=True)
        self.said, self.then = now, done
        return True
