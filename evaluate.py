"""Stage 4: pre-train encoders on each set and judge them with few labels, by linear probes or fine-tuning.

For each set and seed, a fresh student is trained on (images, targets) with the set's learning rate (paper,
eq. 9), its head is dropped, and a linear classifier is fitted to its features of a small random part of a
downstream data set's labelled images (eq. 3). One encoder a seed serves all downstream sets; the labelled
images of a seed are the same for all sets, and a smaller fraction is part of a larger.

Reads:  OUT/sets/*.pt, OUT/targets.pt (for "full") and the data sets.
Writes: OUT/results.jsonl   one record an accuracy; a stage that is started again only adds what is missing
        OUT/evaluate_*.checkpoint, until an encoder is judged: the same command goes on from there
        OUT/NAME.md         the tables: mean, standard deviation, paired difference to the random subset
        OUT/NAME.png        the same as a figure, if matplotlib is installed

    python evaluate.py         # none, every set in OUT/sets, full; probed on CIFAR-10. As in Table 1:
    python evaluate.py --downstream cifar10 cifar100 tinyimagenet aircraft cub2011 dogs flowers --paper table1
    python evaluate.py --sets none subset_random subset_random:simclr krr_st_random:krr_st full
    python evaluate.py --protocol finetune        # full fine-tuning on all labels (appendix B)
    python evaluate.py --probe_at 20 80 320 --name curve    # accuracy against steps of pre-training
    python evaluate.py --figure1 runs/a runs/b    # or: the paper's figure 1, from the logs of other stages
    torchrun --nproc_per_node 4 evaluate.py       # on four GPUs, each its sets and seeds

The set "none" is the student's random initialisation, "full" the real images with the teacher's targets. Sets
whose names differ by _seedN only are repetitions of one distillation, and one row. What cannot be measured is
said in a line, shows as "failed" or "not run" in the table, and makes the exit status 2.

--figure1 compares trajectories and their matching over runs of train_experts.py --same_init and distill.py
that differ in the objective: OUT/NAME.png, the numbers in OUT/NAME.jsonl, and OUT/NAME.md, which reads them.
"""

import argparse
import contextlib
import copy
import csv
import itertools
import json
import math
import re
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import natural, number, positive

ROWS = {  # names of the table's rows, in its order; other sets follow under their file's name
    "none": "no pre-training",
    "subset_random": "random subset",
    "subset_sas": "SAS subset",
    "subset_high_loss": "high-loss subset",
    "krr_st_random": "KRR-ST",
    "subset_random_lr_from_mkdt_random": "random subset, lr of MKDT (random init)",
    "subset_high_loss_lr_from_mkdt_high_loss": "high-loss subset, lr of MKDT",
    "subset_random_lr_from_best_random": "random subset, lr of our recipe (random init)",
    "subset_high_loss_lr_from_best_high_loss": "high-loss subset, lr of our recipe (high-loss init)",
    "mkdt_random": "MKDT (random init)",
    "mkdt_high_loss": "MKDT",
    "mkdt_high_loss_1000": "MKDT, 1000 iterations",
    "best_random": "our recipe (random init)",
    "best_high_loss": "our recipe (high-loss init)",
    "full": "full data",
}
OBJECTIVES = {  # of the pre-training, and how a row says it
    "kd": "",
    "krr_st": "pre-trained as in KRR-ST",
    "barlow_twins": "pre-trained by Barlow Twins",
    "simclr": "pre-trained by SimCLR",
}
KRR_ST = dict(lr=0.1, momentum=0.9, weight_decay=1e-3)  # its own recipe, for any set's targets
FINETUNE = {  # recipes of full fine-tuning, all SGD with momentum 0.9 and cosine decay, batches of 256
    "finetune": dict(epochs=50, lr=0.05, backbone=1.0, weight_decay=0.0, augment=False),  # MKDT's authors
    "finetune_slow": dict(epochs=50, lr=0.05, backbone=0.1, weight_decay=0.0, augment=False),  # before that
    "finetune_krr_st": dict(steps=10_000, lr=0.01, backbone=1.0, weight_decay=5e-4, augment=True),
}
FIGURE1 = {  # titles of its curves
    "kd": "KD",
    "supervised": "MTT-SL",
    "barlow_twins": "MTT-SSL (Barlow Twins)",
    "simclr": "MTT-SSL (SimCLR)",
}
PAPER = Path(__file__).parent / "results" / "paper.csv"
SEEDS = 1_000_000  # encoder seeds start here, far from those of the experts


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.HelpFormatter)
    parser.error = common.fail
    data = parser.add_argument_group("data and files")
    data.add_argument("--dataset", default="cifar10", help="D_real: " + common.DATASET_HELP)
    data.add_argument("--data_dir", default="data", help="of downloads; DIR of a plain --dataset imagefolder")
    data.add_argument("--image_size", type=positive, help="pixels (default: the data set's, imagefolder 32)")
    data.add_argument("--limit", type=positive, help="use only so many images of each split, evenly spaced")
    data.add_argument("--out_dir", type=Path, help="of this run (default: runs/DATASET; figure1: beside RUN)")
    sets = "rows: NAME or NAME:OBJECTIVE, of OUT/sets, none, full (default: none, all, full)"
    data.add_argument("--sets", nargs="+", help=sets)
    data.add_argument("--name", help="of the table and the figure (default: results, or figure1)")
    figure1 = "folders of the runs; nothing is trained, and no other option but --out_dir and --name counts"
    data.add_argument("--figure1", type=Path, nargs="+", metavar="RUN", help=figure1)
    paper = "table1 ... table7: also show the paper's figures, from results/paper.csv"
    data.add_argument("--paper", choices=[f"table{i}" for i in range(1, 8)], metavar="TABLE", help=paper)
    net = parser.add_argument_group("encoder f_S, as in train_experts.py, or a larger one (Table 5)")
    net.add_argument("--arch", choices=["convnet", "resnet10", "resnet18"], default="convnet", help="network")
    net.add_argument(
        "--norm", choices=["batch", "instance"], default="batch", help="of a ResNet (paper: batch)"
    )
    net.add_argument("--width", type=positive, help="channels (default: 128; of a ResNet's first stage 64)")
    net.add_argument("--depth", type=positive, help="blocks (default: 2 at 16 px, 3 at 32 px, 4 at 64 px)")
    pre = parser.add_argument_group("pre-training (eq. 9)")
    objectives = "kd: MSE to the targets; krr_st: that with KRR-ST's recipe; or SSL on the images; a row each"
    pre.add_argument("--pretrain", nargs="+", choices=OBJECTIVES, default=["kd"], help=objectives)
    pre.add_argument("--epochs", type=positive, default=20, help="over the set")
    steps = "a curve: probe after each of these numbers of steps, the last instead of --epochs"
    pre.add_argument("--probe_at", type=positive, nargs="+", metavar="STEPS", help=steps)
    pre.add_argument("--krr_st_epochs", type=positive, default=1000, help="the same with KRR-ST's recipe")
    pre.add_argument("--batch_size", type=positive, default=256, help="images a step")
    pre.add_argument("--lr", type=number, default=0.1, help="for full data; a set brings its own, alpha_syn")
    pre.add_argument("--momentum", type=number, default=0.9, help="of SGD")
    pre.add_argument("--weight_decay", type=number, default=1e-4, help="of SGD")
    pre.add_argument("--ssl_lr", type=number, default=1e-3, help="of Adam, for SSL (appendix A.2)")
    probe = parser.add_argument_group("linear probe (eq. 3), or full fine-tuning (appendix B)")
    protocols = "finetune: as MKDT's authors; _slow: with a tenth of the lr for the body; _krr_st: as KRR-ST"
    probe.add_argument("--protocol", choices=["linear", *FINETUNE], default="linear", help=protocols)
    probe.add_argument("--finetune_steps", type=positive, help="default: 50 epochs; krr_st 10000 or 5000")
    probe.add_argument("--downstream", nargs="+", help="D_d, its data sets (default: --dataset)")
    labelled = "labelled part (default: 0.01 0.05; fine-tuning: 1)"
    probe.add_argument("--fractions", type=number, nargs="+", help=labelled)
    probe.add_argument("--seeds", type=natural, nargs="+", default=[0, 1, 2], help="of weights and labels")
    probe.add_argument("--label_seed", type=natural, help="one draw of labels for all (default: by --seeds)")
    probe.add_argument(
        "--label_draw", choices=["uniform", "balanced"], default="uniform", help="paper: uniform"
    )
    val = "val: on every fifth training image, whose labels are held out; to choose options by"
    probe.add_argument("--split", choices=["test", "val"], default="test", help=val)
    common.add_run_options(parser)
    args = parser.parse_args(argv)
    beside = args.figure1[0].parent if args.figure1 else Path("runs") / common.run_name(args.dataset)
    args.out_dir = args.out_dir or beside
    args.downstream = args.downstream or [args.dataset]
    args.fractions = args.fractions or ([0.01, 0.05] if args.protocol == "linear" else [1.0])
    if args.probe_at:
        args.probe_at = sorted(args.probe_at)
    for option in ("sets", "pretrain", "downstream", "fractions", "seeds", "probe_at"):  # each once
        if getattr(args, option):
            setattr(args, option, list(dict.fromkeys(getattr(args, option))))
    for fraction in args.fractions:
        if not 0 < fraction <= 1:
            common.fail(f"--fractions {fraction:g}: choose parts of the labels above 0, at most 1")
    for row in args.sets or []:
        if not re.fullmatch(rf"\w[\w.+-]*(:({'|'.join(OBJECTIVES)}))?", row):
            common.fail(f"--sets {row!r}: choose NAME or NAME:OBJECTIVE, that one of {', '.join(OBJECTIVES)}")
    for name in args.downstream:
        common.parse_dataset(name, args.data_dir)
    args.name = args.name or ("figure1" if args.figure1 else "results")
    if not re.fullmatch(r"\w[\w.+-]*", args.name):
        common.fail(f"--name {args.name!r}: choose letters, digits, and . + - _ within")
    if args.figure1 and re.match(r"(results|evaluate|train_\w+)$|distill_", args.name):
        common.fail(f"--name {args.name}: OUT/{args.name}.jsonl is a log; choose another for the figure")
    args.width = args.width or (128 if args.arch == "convnet" else 64)
    return args


def make_encoder(args, out_dim, image_size, channels):
    """A fresh encoder with features(x) and a head to out_dim."""
    if args.arch == "convnet":
        depth = args.depth or common.default_depth(image_size)
        return common.ConvNet(out_dim, image_size, channels, args.width, depth)
    blocks = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2)}[args.arch]
    if args.norm == "batch":
        return common.ResNet(blocks, out_dim, channels, args.width)
    # A last map of 1 x 1 would be 0 under instance norm: images below 16 px are halved once less.
    strides = (1, 2, 2, 2 if image_size >= 16 else 1)
    return common.ResNet(blocks, out_dim, channels, args.width, lambda w: nn.GroupNorm(w, w), strides)


def pretrain(net, objective, images, targets, data, lr, args, seed, tick=None, resume=None, judge=None):
    """Train net in place on a set: by SGD on the MSE to its targets (objective "kd", eq. 9), or by SSL.

    "krr_st" is "kd" with the recipe of KRR-ST (Lee et al., ICLR 2024). SSL sees the images alone, in two
    random views, and trains by Adam, as the paper does (appendix A.2). images (S, C, H, W) are normalised by
    the mean and std of data, an ImageSet, or uint8. tick(share done, loss) is called in every step;
    resume(at, optimizer=optimizer, draws=draws) makes the encoder's Checkpoint; judge(net, steps) is called
    after each of the numbers of steps --probe_at, the last of which ends the training.
    """
    epochs = args.krr_st_epochs if objective == "krr_st" else args.epochs
    net.train()
    order = torch.Generator().manual_seed(seed)
    draws = torch.Generator(args.device).manual_seed(seed)
    loss_fn = common.make_objective("kd" if objective == "krr_st" else objective, data, args.precision)
    if objective in common.SSL:
        optimizer = torch.optim.Adam(net.parameters(), args.ssl_lr, weight_decay=1e-6)
    elif objective == "krr_st":
        momentum, weight_decay = KRR_ST["momentum"], KRR_ST["weight_decay"]
        optimizer = torch.optim.SGD(net.parameters(), KRR_ST["lr"], momentum, weight_decay=weight_decay)
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr, args.momentum, weight_decay=args.weight_decay)

    checkpoint = resume({"step": 0}, optimizer=optimizer, draws=draws) if resume else None
    smallest = 2 if objective in common.SSL or args.arch != "convnet" else 1  # to contrast, or for BatchNorm
    full, left_over = divmod(len(images), args.batch_size)
    steps = (full if args.batch_size >= smallest else 0) + (left_over >= smallest)  # of an epoch
    if not steps:
        common.fail(f"{len(images)} images in batches of {args.batch_size}: {objective} needs two in a batch")
    steps = args.probe_at[-1] if args.probe_at else epochs * steps
    done = checkpoint.at["step"] if checkpoint else 0
    passes = (torch.randperm(len(images), generator=order).split(args.batch_size) for _ in itertools.count())
    batches = (batch for batch in itertools.chain.from_iterable(passes) if len(batch) >= smallest)
    batches = itertools.islice(batches, done, steps)
    for step, (x, z) in enumerate(common.fetch([images, targets], batches, args.device), done + 1):
        loss = loss_fn(net, x, z, draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if tick:
            tick(step / steps, loss)
        if step in (args.probe_at or ()):
            judge(net, step)
            net.train()
        if checkpoint:
            checkpoint.tick(last=step == steps, step=step)


def label_order(labels, label_draw, seed):
    """An order of the images (N,) by the seed: the first n are the labelled ones, whatever n is.

    "uniform" draws without regard to the labels (N,), as the authors do; "balanced" takes one image of each
    class in turn, as long as there are any.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    if label_draw == "balanced":
        one_hot = F.one_hot(labels.cpu()[order])
        # 1 for the first image of its class, 2 for the second ...
        turn = (one_hot.cumsum(0) * one_hot).sum(1)
        order = order[turn.argsort(stable=True)]
    return order


def probe(net, train, test, fractions, args, seed):
    """Test accuracy in percent of linear probes on net's features (eq. 3), {labelled fraction: accuracy}."""
    order = label_order(train.labels, args.label_draw, seed if args.label_seed is None else args.label_seed)
    order = order[: int(max(fractions) * len(order))]
    net.eval()  # for both splits; the authors take the training features in train mode
    features = common.encode(net.features, train.images, train.mean, train.std, args.device, order)
    test_features = common.encode(net.features, test.images, train.mean, train.std, args.device)
    if not max(features.abs().max(), test_features.abs().max()) < 1e15:
        common.fail("the encoder's features are not finite, or nearly so: its pre-training diverged")
    accuracies = {}
    for fraction in fractions:
        n = int(fraction * len(train.labels))
        accuracies[fraction] = common.probe_accuracy(
            features[:n], train.labels[order[:n]], test_features, test.labels
        )
    return accuracies


def random_crop(images, generator, flip):
    """Each image (B, C, H, W), padded by an eighth, cut at a random place; half of them mirrored if flip."""
    b, _, size, _ = images.shape
    padding = size // 8  # 4 at 32 px
    x = F.pad(images, [padding] * 4)
    top, left = torch.randint(2 * padding + 1, (2, b, 1), generator=generator, device=x.device)
    at = torch.arange(size, device=x.device)  # (H,)
    columns = left + at  # (B, W)
    if flip:
        mirrored = torch.rand(b, 1, generator=generator, device=x.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    index = torch.arange(b, device=x.device).view(b, 1, 1)
    return x[index, :, (top + at)[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def finetune(net, name, train, test, fractions, args, seed):
    """Test accuracy in percent after training net and a new head (appendix B), {labelled fraction: accuracy}.

    name is the downstream set's; net itself is left as it is. Labels are drawn as for the probe.
    """
    recipe = FINETUNE[args.protocol]
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    order = label_order(train.labels, args.label_draw, seed if args.label_seed is None else args.label_seed)
    stats = (train.mean, train.std)
    accuracies = {}
    for fraction in fractions:
        labelled = order[: int(fraction * len(order))]
        torch.manual_seed(SEEDS + seed)
        body = copy.deepcopy(net).eval()
        some = common.encode(body.features, train.images[:1], *stats, args.device)
        head = nn.Linear(some.shape[1], num_classes)
        head.to(args.device)
        parts = [
            {"params": body.parameters(), "lr": recipe["lr"] * recipe["backbone"]},
            {"params": head.parameters(), "lr": recipe["lr"]},
        ]
        optimizer = torch.optim.SGD(parts, momentum=0.9, weight_decay=recipe["weight_decay"])
        if "steps" in recipe:  # half as many for the small sets
            steps = recipe["steps"] // (1 if name in ("cifar10", "cifar100", "tinyimagenet") else 2)
        else:
            steps = recipe["epochs"] * math.ceil(len(labelled) / 256)
        steps = args.finetune_steps or steps
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        draws = torch.Generator(args.device).manual_seed(SEEDS + seed)
        order_draws = torch.Generator().manual_seed(SEEDS + seed)
        forward = common.autocast(body.features, torch.device(args.device), args.precision)
        body.train()
        if len(labelled) < 2 and args.arch != "convnet":
            common.fail(f"--fractions {fraction:g}: one labelled image of {name} cannot tune a {args.arch}")
        batches = []
        while len(batches) < steps:
            batches += labelled[torch.randperm(len(labelled), generator=order_draws)].split(256)
        for x, y in common.fetch([train.images, train.labels], batches[:steps], args.device):
            if len(x) < 2 and args.arch != "convnet":
                continue  # BatchNorm's statistics want two
            if recipe["augment"]:
                x = random_crop(x, draws, train.flip)
            loss = F.cross_entropy(head(forward(common.normalise(x, *stats))), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        body.eval()
        scores = head(common.encode(body.features, test.images, *stats, args.device))
        if not scores.isfinite().all():
            common.fail(f"{args.protocol} on {name} diverged: its lr is {recipe['lr']:.3g}")
        accuracies[fraction] = 100 * (scores.argmax(1) == test.labels).float().mean().item()
    return accuracies


def load_set(path, channels, image_size, out_dim, made):
    """A set's (images, targets, lr); exits if it does not fit the student or is of another origin."""
    contents = common.load(path, {"images": 4, "targets": 2, "lr": float}, "distill.py")
    images, targets = contents["images"], contents["targets"]
    meant, (_, c, height, width) = contents.get("image_size"), images.shape
    if type(meant) is int and meant == image_size and c == channels and 0 < height == width < image_size:
        images = common.enlarge(images, image_size)  # they are stored smaller
    shape = (channels, image_size, image_size)
    if images.shape[1:] != shape or len(images) != len(targets) or len(images) == 0:
        common.fail(
            f"{path}: has {tuple(images.shape)} images and {len(targets)} targets, but the data set's images "
            f"are {shape}; give the --dataset and --image_size that it was made with"
        )
    if targets.shape[1] != out_dim:
        common.fail(
            f"{path}: has targets of D = {targets.shape[1]}, targets.pt of D = {out_dim}; make it again"
        )
    common.check_origin(path, contents, made)
    return images, targets, contents["lr"]


def load_downstream(name, args, channels):
    """(train, test) ImageSets of a downstream data set on the device; for --split val, of its train."""
    size = args.image_size if name == args.dataset else None
    train = test = common.load_images(name, "train", args.data_dir, size, args.limit)
    n = len(train.images)
    if args.split == "val":
        if n < 5:
            common.fail(f"--split val: {name} has {n} training images, and every fifth is held out")
        held_out = torch.arange(n) % 5 == 4
        test = train._replace(images=train.images[held_out], labels=train.labels[held_out])
        train = train._replace(images=train.images[~held_out], labels=train.labels[~held_out])
    else:
        test = common.load_images(name, "test", args.data_dir, size, args.limit)
    px = train.images.shape[-1]
    if args.arch == "convnet" and args.depth and args.depth > math.log2(px):
        common.fail(f"--downstream {name}: --depth {args.depth} halves its images of {px} px to nothing")
    if train.images.shape[1] != channels:
        common.fail(
            f"--downstream {name}: has {train.images.shape[1]} colour channels, the student {channels}"
        )
    placed = [common.place([part.images, part.labels], args.device) for part in (train, test)]
    return tuple(
        part._replace(images=images, labels=labels.to(args.device))
        for part, (images, labels) in zip((train, test), placed)
    )


def num_labelled(name, fraction, train):
    """How many images of a downstream set a fraction is; exits if none."""
    n = int(fraction * len(train.images))
    if n < 1:
        common.fail(
            f"--fractions {fraction:g}: is none of the {len(train.images)} labelled images of {name}; choose "
            f"{1 / len(train.images):.2g} or more"
        )
    return n


def key(record):
    """What an accuracy in results.jsonl belongs to, besides the options."""
    names = ("set", "set_id", "pretrain", "downstream", "data_id", "fraction", "seed")
    return *(record[name] for name in names), record.get("steps")


def read_results(path):
    """The records of results.jsonl; a line that is broken (a run was killed while writing it) is left out."""
    records = []
    for i, (_, record) in enumerate(common.read_records(path), 1):
        try:
            plain = type(record["accuracy"]) in (int, float)
            usable = plain and hash(key(record)) and isinstance(record["options"], dict)
            usable = usable and 0 <= record["accuracy"] <= 100
        except (KeyError, TypeError):
            usable = False
        if usable:
            records.append(record)
        else:
            print(f"warning: {path}: line {i} is broken and left out", flush=True)
    return records


def find_rows(folder, asked, objectives):
    """The table's rows in its order, {(name, objective): names of its sets}.

    The sets NAME, NAME_seed1, NAME_seed2 ... are one row; a set asked for by its own seed stands for itself.
    asked: NAME or NAME:OBJECTIVE each (a set of the name need not be there), or None for all that are there;
    objectives: those of rows that name none.
    """
    there = sorted(path.stem for path in folder.glob("*.pt"))
    asked = asked or ["none", *(re.sub(r"_seed\d+$", "", name) for name in there), "full"]
    order = list(ROWS)

    def place(row):
        name = row.partition(":")[0]
        return order.index(name) if name in order else len(order) - 1.5, name  # others before full data

    rows = {}
    for row in sorted(dict.fromkeys(asked), key=place):
        name, _, objective = row.partition(":")
        seeds = r"(_seed\d+)?" if name not in ("none", "full") else ""
        sets = [s for s in there if re.fullmatch(re.escape(name) + seeds, s)] or [name]
        for o in [objective] if objective else objectives:
            rows[name, "none" if name == "none" else o] = sets
    return rows


# ------------------------------------------------------------------------------------------------------------
# Tables and figure
# ------------------------------------------------------------------------------------------------------------


def row_title(row):
    """The table's name of a pair (set, objective)."""
    name, objective = row
    how = OBJECTIVES.get(objective)
    return ROWS.get(name, name) + (f", {how}" if how else "")


def complete(values):
    """(sets, seeds) without the sets that failed (NaN) altogether, then without seeds that failed in any."""
    values = values[~values.isnan().all(1)]
    return values[:, ~values.isnan().any(0)]


def accuracy_text(values):
    """Mean ± std of accuracies (sets, seeds); NaN where one failed, None if there is no such set.

    A set is one distillation, a seed one evaluation. std (divisor n - 1) is that over the seeds, within a
    set; with several sets, the std of their means follows.
    """
    if values is None:
        return "not run"
    there = complete(values)
    if there.numel() == 0:
        return "failed"
    text = f"{there.mean():.2f}"
    text += f" ± {there.var(1).mean().sqrt():.2f}" if there.shape[1] > 1 else ""
    text += f", sets ± {there.mean(1).std():.2f}" if there.shape[0] > 1 else ""
    for what, left, asked in zip(("sets", "seeds"), there.shape, values.shape):
        text += f" ({asked - left} of {asked} {what} failed)" if left < asked else ""
    return text


def difference_text(values, base, same_sets):
    """Mean difference of two rows' accuracies (sets, seeds) ± standard error.

    It is paired by the seed of the evaluation, and by that of the distillation if both have the same_sets.
    The squared standard error adds what sets and seeds, each taken for random draws, contribute: the
    variance of the seeds' means / seeds, and those of the sets' means / sets.
    """
    if values is None or base is None:
        return ""
    values, base = values[~values.isnan().all(1)], base[~base.isnan().all(1)]
    seeds = ~(values.isnan().any(0) | base.isnan().any(0))
    values, base = values[:, seeds], base[:, seeds]
    if values.numel() == 0 or base.numel() == 0:
        return ""
    by_seed, by_set = values.mean(0) - base.mean(0), [values.mean(1), base.mean(1)]
    if same_sets and len(values) == len(base):
        by_set = [(values - base).mean(1)]
    known = [v for v in (by_seed, *by_set) if len(v) > 1]  # a single one does not show its spread
    error = sum(v.var() / len(v) for v in known) ** 0.5
    return f"{by_seed.mean():+.2f}" + (f" ± {error:.2f}" if known else "")


def read_paper(table, dataset, arch):
    """A table of the paper, {(pre-training set, row, downstream, fraction): (mean ± std, source)}.

    They are those of the run's own pre-training set; or, for digits and one's own images, which the paper
    does not have, those of the table's first, to stand beside. Of Tables 3 and 4 there are none.
    """
    try:
        with open(PAPER, newline="", encoding="utf-8") as file:
            lines = [line for line in csv.DictReader(file) if line["table"] == table and line["arch"] == arch]
        for line in lines:
            line["labels"] = float(line["labels"])
            if None in line.values() or None in line:
                raise ValueError("a line of another length")
    except (OSError, ValueError, KeyError, csv.Error) as error:
        common.fail(
            f"{PAPER}: cannot be read ({error!r}); get it again from the repository, or leave --paper out"
        )
    own = dataset.partition(":")[0] in ("digits", "imagefolder")
    wanted = lines[0]["pretraining_set"] if own and lines else dataset
    return {
        (wanted, line["row"], d, line["labels"]): (line[d], line["source"])
        for line in lines
        for d in common.DATASETS
        if line["pretraining_set"] == wanted and line.get(d)
    }


def budget_text(budget):
    """The head of a column: the labelled fraction, and the steps of the pre-training if they are said."""
    fraction, steps = budget
    return f"{100 * fraction:g} % labels" + (f", {steps:,} steps" if steps else "")


def make_tables(cells, rows, downstream, budgets, paper, dataset):
    """Markdown, a table a downstream set, a row a (set, objective), columns for each budget, a pair (labelled
    fraction, steps of pre-training, which are None if --epochs counts): accuracy, mean ± std; difference to
    the random subset, paired by seed, ± standard error, for both see the same labelled images, whose draw
    makes most of the std; the paper's figure, if it has one.

    rows: find_rows'; cells: {(row, downstream, budget): (sets, seeds) accuracies in percent, NaN where one
    failed, or None if there is no such set}; paper: read_paper's, dataset: the run's pre-training set.
    """
    base = ("subset_random", "kd")

    def accuracy(row, d, budget):
        return accuracy_text(cells[row, d, budget])

    def difference(row, d, budget):
        seeds = [[name.removeprefix(r[0]) for name in rows[r]] for r in (row, base)]
        values = cells[row, d, budget], cells[base, d, budget]
        return difference_text(*values, seeds[0] == seeds[1]) if row != base else ""

    def published(where):
        """A column of paper, where = (pre-training set, downstream, fraction)."""

        def text(row, *_):
            figure, _ = paper.get((where[0], row[0], *where[1:]), ("", ""))
            return figure if row[1] in ("kd", "none") else ""

        return text

    def title(d):
        same = [other for other in downstream if common.run_name(other) == common.run_name(d)]
        return common.run_name(d) if len(same) == 1 else d

    tables = []
    for d in downstream:
        columns = []  # (head, function of (row, d, budget), budget)
        known = {(where[0], *where[2:]): source for where, (_, source) in paper.items()}
        for budget in budgets:
            columns.append((budget_text(budget), accuracy, budget))
            if base in rows and len(rows) > 1:
                columns.append(("difference", difference, budget))
            where = (dataset, d, budget[0])
            if where in known and not budget[1]:
                columns.append((known[where], published(where), budget))
        for where, source in known.items():
            if d == dataset and where[0] == where[1] != dataset:  # to stand beside
                columns.append((f"{source}: {where[0]}, {100 * where[2]:g} %", published(where), None))
        heads = [f"pre-training set; labels of {title(d)}", "n", *(head for head, _, _ in columns)]
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for row in rows:
            values = cells[row, d, budgets[0]]
            num_sets, seeds = (0, 0) if values is None else values.shape
            n = f"{num_sets} x {seeds}" if num_sets > 1 else f"{seeds}"
            texts = [row_title(row), n, *(text(row, d, budget) for _, text, budget in columns)]
            lines.append(f"| {' | '.join(texts)} |")
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def new_figure(path, panels):
    """(figure, its panels in a row, colours) of matplotlib; without it None, which a line says."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} is left out: it needs matplotlib (pip install matplotlib)")
        return None
    figure = Figure(figsize=(4 * panels + 3, 4), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0], colormaps["tab20"].colors


def write_figure(path, figure, lines):
    """Write a figure with the legend of lines, {title: line}, at its right."""
    figure.axes[-1].legend(
        lines.values(), lines, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5)
    )
    with common.replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def write_text(path, text):
    """Write a text file, whole or not at all."""
    with common.replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def save_figure(path, cells, rows, downstream, budgets):
    """Accuracy, a line and its std over the seeds a row: against the labelled fraction, a panel a data set;
    or, with --probe_at, against the steps of pre-training, a panel a data set and fraction.
    """
    curve = budgets[0][1] is not None
    panels = [
        (d, sorted(budget for budget in budgets if not curve or budget[0] == f))
        for d in downstream
        for f in (dict.fromkeys(f for f, _ in budgets) if curve else [None])
    ]  # (downstream set, budgets) each
    drawing = new_figure(path, len(panels))
    if not drawing:
        return
    figure, axes, colours = drawing
    lines = {}  # title of a row -> its line
    for panel, (d, shown) in zip(axes, panels):
        x = [steps if curve else 100 * f for f, steps in shown]
        for row, colour in zip(rows, itertools.cycle(colours)):
            values = [cells[row, d, budget] for budget in shown]
            if any(v is None or complete(v).numel() == 0 for v in values):
                continue
            values = [complete(v) for v in values]
            means = torch.stack([v.mean() for v in values])
            one = min(v.shape[1] for v in values) == 1
            stds = None if one else torch.stack([v.var(1).mean().sqrt() for v in values])
            lines[row_title(row)] = panel.errorbar(x, means, stds, capsize=3, color=colour)
        title = common.run_name(d).replace("$", r"\$")
        title += f", {100 * shown[0][0]:g} % labels" if curve else ""
        what = "steps of pre-training" if curve else "labelled images in %"
        panel.set(title=title, xlabel=what, ylabel="accuracy in %", xscale="log")
        panel.set_xticks(x, [f"{tick:g}" for tick in x])
        panel.minorticks_off()
    write_figure(path, figure, lines)


def write_tables(args, cells, rows, budgets, paper):
    """OUT/NAME.md and OUT/NAME.png; prints the tables."""
    tables = make_tables(cells, rows, args.downstream, budgets, paper, args.dataset)
    judged = "linear probe" if args.protocol == "linear" else f"full fine-tuning ({args.protocol})"
    drawn = "order and labels" if args.label_seed is None else f"order (labels: seed {args.label_seed})"
    long = f"{args.epochs} epochs (as in KRR-ST: {args.krr_st_epochs})"
    long = "the steps that are said" if args.probe_at else long
    caption = (
        f"Accuracy in % on the {args.split} split, {judged} of {args.arch} encoders pre-trained on "
        f"{common.run_name(args.dataset)} for {long}. "
        f"Mean ± std (divisor n - 1) over n seeds of weights, {drawn}, or sets x seeds. Differences to the "
        "random subset: paired by seed, ± standard error. Rows that name no other way are pre-trained by MSE "
        "to the set's targets (KD)."
    )
    if args.precision != "fp32":
        caption += f" Precision: {args.precision}."
    if args.paper:
        figures = "three seeds, std with divisor n, from results/paper.csv" if paper else "not known here"
        caption += f" The paper's figures: {figures}."
    path = args.out_dir / f"{args.name}.md"
    write_text(path, f"{tables}\n{caption}\n")
    save_figure(args.out_dir / f"{args.name}.png", cells, rows, args.downstream, budgets)
    print(f"\n{tables}\n{caption}\nwrote {path} and results.jsonl")


# ------------------------------------------------------------------------------------------------------------
# Figure 1: how far trajectories of an objective vary, and how well they can be matched
# ------------------------------------------------------------------------------------------------------------


def read_curve(run):
    """What figure 1 shows of a run's folder, from its logs; exits if they do not have it.

    {curve: its title; experts: K; gradient_variance: [start, end]; trajectory_variance, relative_variance:
    an entry an epoch; matching_loss, pixel_change: an entry an iteration}.
    """

    def read(path):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not records or not all(isinstance(record, dict) for record in records):
            raise ValueError(f"{path.name} is no log")
        return records

    def numbers(values, none=False):
        for value in values if isinstance(values, list) and values else [math.nan]:
            if not (none and value is None) and not (type(value) in (int, float) and 0 <= value < 1e300):
                raise ValueError(f"{value!r:.40} where a number should be")
        return values

    try:
        found, recipe = {}, {}  # of the last start of train_experts.py, and of earlier ones with its options
        for record in read(run / "train_experts.jsonl"):
            if "options" in record and common.recipe(record["options"]) != recipe:
                found, recipe = {}, common.recipe(record["options"])
            found |= record
        options = found["options"]
        name, batch_size, experts = (options[key] for key in ("objective", "batch_size", "num_experts"))
        if not str(name).isidentifier() or type(batch_size) is not int or type(experts) is not int:
            raise ValueError("options of another kind")
        if options["same_init"] is not True:
            common.fail(
                f"--figure1 {run}: its experts start apart; make them with train_experts.py --same_init"
            )
        steps = []  # of the only set that was matched
        for path in run.glob("distill_*.jsonl"):
            records = read(path)
            starts = (i for i, r in enumerate(records) if "options" in r and not r.get("resumed"))
            last = max(starts)  # of the stage
            matched = [record for record in records[last:] if "matching_loss" in record]
            if matched and steps:
                common.fail(
                    f"--figure1 {run}: has more than one matching; move {path.name} or the other away"
                )
            if matched and records[last]["options"].get("objective", name) != name:
                common.fail(
                    f"--figure1 {run}: {path.name} is of other experts than {name}; make the set again"
                )
            steps = steps or matched
        if not steps:
            raise KeyError("matching_loss")
        curve = {
            "curve": f"{FIGURE1.get(name, name)}, batch {batch_size}",
            "experts": experts,
            "gradient_variance": numbers(found.get("gradient_variance", [None, None]), none=True),
            "trajectory_variance": numbers(found["trajectory_variance"]),
            "relative_variance": numbers(found["relative_variance"], none=True),
            **{key: numbers([step[key] for step in steps]) for key in ("matching_loss", "pixel_change")},
        }
        epochs = {len(curve[key]) for key in ("trajectory_variance", "relative_variance")}
        if len(curve["gradient_variance"]) != 2 or len(epochs) != 1:
            raise ValueError("lists of other lengths")
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        common.fail(
            f"--figure1 {run}: its logs do not have what is shown ({error!r}); make two experts or more with "
            "train_experts.py there, and a set with distill.py"
        )
    return curve


def read_figure(curves):
    """Three lines and a table in markdown, computed from read_curve's: what figure 1 shows."""
    epoch = min(len(curve["trajectory_variance"]) for curve in curves) - 1
    values = {  # column -> a number a curve
        "gradient's variance: start": [curve["gradient_variance"][0] for curve in curves],
        "end": [curve["gradient_variance"][1] for curve in curves],
        f"trajectories' variance: epoch {epoch}": [curve["trajectory_variance"][epoch] for curve in curves],
        "relative": [curve["relative_variance"][epoch] for curve in curves],
        "matching loss: first": [curve["matching_loss"][0] for curve in curves],
        "last": [statistics.mean(curve["matching_loss"][-10:]) for curve in curves],
        "pixels moved": [curve["pixel_change"][-1] for curve in curves],
    }
    lines = [f"| curve | K | {' | '.join(values)} |", "|---" * (len(values) + 2) + "|"]
    for i, curve in enumerate(curves):
        numbers = ["" if column[i] is None else f"{column[i]:.3g}" for column in values.values()]
        lines.append(f"| {curve['curve']} | {curve['experts']} | {' | '.join(numbers)} |")

    def extremes(numbers):
        """ "most for X, n times as much as for Y, the least"."""
        order = sorted((value or 0.0, curve["curve"]) for value, curve in zip(numbers, curves))
        (low, least), (high, most) = order[0], order[-1]
        factor = high / max(low, 1e-30)
        times = f"{factor:,.0f}" if factor >= 100 else f"{factor:.2g}"
        return f"most for {most}, {times} times as much as for {least}, the least"

    _, _, absolute, relative, first, last, moved = values.values()
    ends = sorted((b, f"{c['curve']} from {a:.3f} to {b:.3f}") for a, b, c in zip(first, last, curves))
    reading = [
        f"1. At epoch {epoch} the trajectories vary {extremes(absolute)}; relative to the squared distance "
        f"travelled, {extremes(relative)}.",
        "2. The matching loss went, from the first iteration to the mean of the last ten, lowest end first: "
        + "; ".join(text for _, text in ends)
        + ".",
        f"3. The pixels moved {extremes(moved)}.",
    ]
    return "\n".join([*reading, "", *lines]) + "\n"


def figure1(args):
    """The paper's figure 1 from the logs of the runs: OUT/NAME.png, NAME.jsonl (its numbers) and NAME.md."""
    curves = [read_curve(run) for run in args.figure1]
    path = args.out_dir / f"{args.name}.md"
    reading = read_figure(curves)
    write_text(path.with_suffix(".jsonl"), "".join(json.dumps(curve) + "\n" for curve in curves))
    write_text(path, reading)
    parts = [  # key, title, x
        ("trajectory_variance", "1a: variance of trajectories", "epoch"),
        ("relative_variance", "relative to the squared distance", "epoch"),
        ("matching_loss", "1b: matching loss", "iteration"),
        ("pixel_change", "1c: mean change of the pixels", "iteration"),
    ]
    drawing = new_figure(path.with_suffix(".png"), len(parts))
    if drawing:
        figure, panels, colours = drawing
        lines = {}
        for panel, (what, title, x) in zip(panels, parts):
            for curve, colour in zip(curves, itertools.cycle(colours[::2])):
                values = [value or math.nan for value in curve[what]]  # no logarithm of 0, at epoch 0
                at = range(x == "iteration", len(values) + (x == "iteration"))
                (lines[curve["curve"]],) = panel.plot(at, values, color=colour)
            panel.set(title=title, xlabel=x, yscale="log" if x == "epoch" else "linear")
        write_figure(path.with_suffix(".png"), figure, lines)
    print(f"{reading}wrote {path}, .jsonl" + (" and .png" if drawing else ""))


def main(args):
    if args.figure1:
        return figure1(args) if common.rank() == 0 else None
    common.set_up(args)
    as_paper = args.paper and args.protocol == "linear" and (args.arch == "convnet" or args.norm == "batch")
    paper = read_paper(args.paper, args.dataset, args.arch) if as_paper else {}
    train, all_targets, made = common.load_targets(
        args.out_dir, args.dataset, args.data_dir, args.image_size, args.limit
    )
    channels, px = train.images.shape[1:3]
    failures = []

    def attempt(function, *arguments, own=False):
        """function(*arguments), or None where it exits with an error: its line is said, the rest goes on.

        own: this process's own work; otherwise all processes do the same, and the first one says the line.
        """
        stderr = sys.stderr if own or common.rank() == 0 else sys.stdout
        try:
            with common.own_work(), contextlib.redirect_stderr(stderr):
                return function(*arguments)
        except SystemExit as error:
            if error.code != 2 or isinstance(error, common.Fatal):  # a signal, a full disk
                raise
            failures.append(error)
            return None

    folder = args.out_dir / "sets"
    rows = find_rows(folder, args.sets, args.pretrain)
    sets = {"none": (None, None, None), "full": (train.images, all_targets, args.lr)}
    for name in sum(rows.values(), []):
        if name not in sets:
            path = folder / f"{name}.pt"
            sets[name] = attempt(load_set, path, channels, px, all_targets.shape[1], made)
    set_id = {name: common.fingerprint(*parts) for name, parts in sets.items() if parts and name != "none"}
    downstream, fractions = {}, {}  # name -> (train ImageSet, test ImageSet); name -> labelled parts
    for d in args.downstream:
        parts = attempt(load_downstream, d, args, channels)
        if parts:
            downstream[d] = parts
            fractions[d] = [f for f in args.fractions if attempt(num_labelled, d, f, parts[0])]
    if not any(fractions.values()) or not any(sets[name] for members in rows.values() for name in members):
        raise SystemExit(2)  # nothing is left to measure
    data_id = {
        name: common.fingerprint(*(tensor for part in parts for tensor in (part.images, part.labels)))
        for name, parts in downstream.items()
    }

    # An accuracy is known if results.jsonl has it for these options, this very set and these very images.
    results = args.out_dir / "results.jsonl"
    of_cell = ("dataset", "sets", "lr", "pretrain", "downstream", "fractions", "seeds", "paper", "probe_at")
    options = {name: value for name, value in common.recipe(vars(args)).items() if name not in of_cell}
    if args.probe_at:  # which end the training
        options |= {"epochs": None, "krr_st_epochs": None}
    options["targets_id"] = made["targets_id"]

    def read_known():
        records = read_results(results)
        older = {"precision": "fp32"}  # what they do not say
        return {key(r): r["accuracy"] for r in records if older | r["options"] == options}

    # A checkpoint of a curve is beyond its first points: they must be those that are asked for now.
    at = {k: getattr(args, k) for k in ("probe_at", "fractions", "downstream") if args.probe_at}
    log = common.Log(args.out_dir, "evaluate", args, at, options)
    for path in args.out_dir.glob("evaluate_*.checkpoint") if not args.restart else ():
        common.read_checkpoint(path, log.run)
    if common.rank() == 0 and not common.claim(args.out_dir, results):
        common.fail(f"{results}: another run adds to it; wait for it, or choose another --out_dir")
    if common.world_size() > 1:  # before others write into it
        log.begin()
        common.wait_for_all()
    known = read_known()

    def checkpoint_path(name, objective, seed):
        return args.out_dir / f"evaluate_{set_id.get(name)}_{objective}_{seed}.checkpoint"

    def encoder(name, objective, seed, tick, judge):
        """A fresh encoder, pre-trained on a set."""
        images, targets, lr = sets[name]
        torch.manual_seed(SEEDS + seed)  # not the experts' seeds: one would start where an expert did
        net = make_encoder(args, all_targets.shape[1], px, channels).to(args.device)
        if images is not None:
            images, targets = common.place([images, targets], args.device)

            rate = {"kd": lr, "krr_st": KRR_ST["lr"]}.get(objective, args.ssl_lr)
            diverged = f"pre-training on {name} by {objective}, seed {seed}, diverged: its lr is {rate:.3g}"

            def resume(at, **parts):
                path = checkpoint_path(name, objective, seed)
                return common.Checkpoint(path, args, log, diverged, at, own=True, net=net, **parts)

            pretrain(net, objective, images, targets, train, lr, args, SEEDS + seed, tick, resume, judge)
        return net

    def records(name, objective, seed):
        """What results.jsonl says of a set and a seed, {(downstream, (fraction, steps)): record}."""
        cell = {"set": name, "set_id": set_id.get(name, "none"), "pretrain": objective, "seed": seed}
        return {
            (d, (f, steps)): {**cell, "downstream": d, "data_id": data_id[d], "fraction": f}
            | ({"steps": steps} if steps else {})
            for d in downstream
            for f, steps in itertools.product(fractions[d], args.probe_at or [None])
        }

    def accuracy(name, objective, seed, d, budget):
        record = records(name, objective, seed).get((d, budget)) if sets[name] else None
        return known.get(key(record), math.nan) if record else math.nan

    def measure(name, objective, seed, tick):
        """Adds to results.jsonl and to known what is missing there of a set and a seed."""
        cells, began = records(name, objective, seed), time.time()

        def missing(steps):
            """The downstream sets without an accuracy after one of these numbers of steps."""
            return dict.fromkeys(
                d for (d, (_, s)), record in cells.items() if s in steps and key(record) not in known
            )

        def judge(net, *steps):
            for d in missing(steps):
                if args.protocol == "linear":
                    accuracies = probe(net, *downstream[d], fractions[d], args, seed)
                else:
                    accuracies = finetune(net, d, *downstream[d], fractions[d], args, seed)
                for (f, value), s in itertools.product(accuracies.items(), steps):
                    record = cells[d, (f, s)]
                    if key(record) not in known:
                        common.append(results, {**record, "accuracy": value, "options": options})
                        known[key(record)] = value

        every = args.probe_at or [None]
        if missing(every):
            net = encoder(name, objective, seed, tick, judge)
            said = {"set": name, "set_id": set_id.get(name), "pretrain": objective, "seed": seed}
            if not args.probe_at and not log.has(**said):
                log.write(**said, pretrain_seconds=round(time.time() - began, 3))
            if name == "none" or not args.probe_at:
                judge(net, *every)
        checkpoint_path(name, objective, seed).unlink(missing_ok=True)

    work = [
        (name, objective, seed)
        for (_, objective), members in rows.items()
        for name, seed in itertools.product([name for name in members if sets[name]], args.seeds)
    ][common.rank() :: common.world_size()]
    progress = common.Progress(common.of_first() + "encoder", len(work), 1, "encoders")
    for done, (name, objective, seed) in enumerate(work):

        def tick(share, loss, done=done, name=name, seed=seed):
            progress(done + share, set=name, seed=seed, loss=loss)

        attempt(measure, name, objective, seed, tick, own=True)
        progress(done + 1, set=name, seed=seed)
    failed = torch.tensor(float(len(failures)), device=args.device)
    common.average(failed)  # of all processes, which are then done
    if common.rank() > 0:
        return
    if common.world_size() > 1:
        known = read_known()
    cells, budgets = {}, list(itertools.product(args.fractions, args.probe_at or [None]))
    for (row, objective), members in rows.items():
        there = [name for name in members if name in ("none", "full") or (folder / f"{name}.pt").exists()]
        for d, budget in itertools.product(args.downstream, budgets):
            values = [[accuracy(name, objective, seed, d, budget) for seed in args.seeds] for name in members]
            cells[(row, objective), d, budget] = torch.tensor(values) if there else None

    write_tables(args, cells, rows, budgets, paper)
    if failed > 0:
        raise SystemExit(2)


if __name__ == "__main__":
    common.run(main, parse_args(), "a smaller --batch_size or --width, or fewer --fractions")
