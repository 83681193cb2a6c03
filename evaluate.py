"""Stage 4: pre-train encoders on each set and judge them with few labels, by linear probes or fine-tuning.

For each set and seed, a fresh student is trained on (images, targets) with the set's learning rate (paper,
eq. 9), its head is dropped, and a linear classifier is fitted to its features of a small random part of a
downstream data set's labelled images (eq. 3). One encoder a seed serves all downstream sets; the labelled
images of a seed are the same for all sets, and a smaller fraction is part of a larger.

Reads:  OUT/sets/*.pt and the data sets; OUT/targets.pt for the row "full" alone.
Writes: OUT/results.jsonl   a record a cell: {set, pretrain, seed, steps, downstream, fraction, accuracy (null
                            where it failed), ids of set and images, options}; only missing ones are measured
        OUT/NAME.md         the tables, drawn from the records: mean, std, paired difference to a base
        OUT/NAME.png        the same as a figure, if matplotlib is installed
        OUT/evaluate.jsonl, and OUT/evaluate_*.checkpoint of encoders until the run ends

    python evaluate.py         # none, every set in OUT/sets, full; probed on CIFAR-10
    python evaluate.py --sets none subset_random subset_random:simclr --downstream cifar10 cifar100
    python evaluate.py --probe_at 20 80 320 --name curve    # accuracy against steps of pre-training

The set "none" is the student's random initialisation, "full" the real images with the teacher's targets. Sets
whose names differ by _seedN only are one row. What cannot be measured is said in a line, and exit status 2.
"""

import copy
import csv
import itertools
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import Problem, natural, number, positive

ROWS = {  # names of the table's rows, in its order; other sets follow under their file's name
    "none": "no pre-training",
    "subset_random": "random subset",
    "subset_sas": "SAS subset",
    "subset_high_loss": "high-loss subset",
    "krr_st_random": "KRR-ST",
    "mkdt_random": "MKDT (random init)",
    "mkdt_high_loss": "MKDT",
    "mkdt_high_loss_1000": "MKDT, 1000 iterations",
    "mkdt_raised_random": "MKDT, raised rates (random init)",
    "mkdt_raised_high_loss": "MKDT, raised rates",
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
PAPER = Path(__file__).parent / "results" / "paper.csv"
NAME = r"\w[\w.+-]*"  # of a set or a table
BASES = [("subset_random", "kd"), ("subset_random_auto", "kd")]  # others are compared with the first there


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    sets = "rows: NAME, or NAME:OBJECTIVE (kd, krr_st, simclr, barlow_twins); default: none, sets, full"
    parser.add_argument("--sets", nargs="+", help=sets)
    parser.add_argument("--name", default="results", help="of the table and the figure")
    paper = "table1 ... table7: also show the paper's figures, from results/paper.csv"
    parser.add_argument("--paper", choices=[f"table{i}" for i in range(1, 8)], metavar="TABLE", help=paper)
    net = parser.add_argument_group("encoder f_S, as in train_experts.py, or a larger one (Table 5)")
    net.add_argument("--arch", choices=["convnet", "resnet10", "resnet18"], default="convnet", help="network")
    net.add_argument("--width", type=positive, help="channels (default: 128; of a ResNet's first stage 64)")
    net.add_argument("--depth", type=positive, help=common.DEPTH_HELP)
    pre = parser.add_argument_group("pre-training (eq. 9)")
    pre.add_argument("--epochs", type=positive, default=20, help="over the set")
    pre.add_argument("--probe_at", type=positive, nargs="+", metavar="STEPS", help="instead of --epochs")
    pre.add_argument("--krr_st_epochs", type=positive, default=1000, help="the same with KRR-ST's recipe")
    pre.add_argument("--batch_size", type=positive, default=256, help="images a step")
    pre.add_argument("--lr", type=number, default=0.1, help="for full data; a set brings its own, alpha_syn")
    pre.add_argument("--momentum", type=number, default=0.9, help="of SGD")
    pre.add_argument("--weight_decay", type=number, default=1e-4, help="of SGD")
    pre.add_argument("--augment", choices=common.AUGMENT, default="none", help=common.AUGMENT_HELP)
    probe = parser.add_argument_group("linear probe (eq. 3), or full fine-tuning (appendix B)")
    protocols = "finetune: as MKDT's authors; _slow: with a tenth of the lr for the body; _krr_st: as KRR-ST"
    probe.add_argument("--protocol", choices=["linear", *FINETUNE], default="linear", help=protocols)
    probe.add_argument("--finetune_steps", type=positive, help="default: 50 epochs; krr_st 10000 or 5000")
    probe.add_argument("--downstream", nargs="+", help="D_d, its data sets (default: --dataset)")
    labelled = "labelled part (default: 0.01 0.05; fine-tuning: 1)"
    probe.add_argument("--fractions", type=common.at_least(1e-9, float, 1), nargs="+", help=labelled)
    probe.add_argument("--seeds", type=natural, nargs="+", default=[0, 1, 2], help="of weights and labels")
    probe.add_argument("--split", choices=["test", "val"], default="test", help="val: held-out train images")
    parser.add_run_options()
    args = parser.parse_args(argv)
    args.downstream = args.downstream or [args.dataset]
    args.fractions = args.fractions or ([0.01, 0.05] if args.protocol == "linear" else [1.0])
    args.probe_at = sorted(args.probe_at or []) or [None]  # None: by --epochs
    for option in ("sets", "downstream", "fractions", "seeds", "probe_at"):  # each once
        setattr(args, option, list(dict.fromkeys(getattr(args, option) or [])))
    for row in args.sets:
        if not re.fullmatch(rf"{NAME}(:({'|'.join(OBJECTIVES)}))?", row):
            raise Problem(f"--sets {row!r}: choose NAME or NAME:OBJECTIVE, of {', '.join(OBJECTIVES)}")
    for name in args.downstream:
        if common.parse_dataset(name, args.data_dir)[0] == "images":
            raise Problem(f"{name} has no labels: name labelled sets by --downstream")
    if not re.fullmatch(NAME, args.name):
        raise Problem(f"--name {args.name!r}: choose letters, digits, and . + - _ within")
    args.width = args.width or (128 if args.arch == "convnet" else 64)
    return args


# ---- Pre-training ------------------------------------------------------------------------------------------


def make_encoder(args, out_dim, image_size, channels):
    """A fresh encoder with features(x) and a head to out_dim."""
    if args.arch == "convnet":
        return common.make_student(out_dim, image_size, channels, args.width, args.depth)
    blocks = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2)}[args.arch]
    return common.ResNet(blocks, out_dim, channels, args.width)


def pretrain(net, objective, images, targets, data, lr, args, seed, steps=None, checkpoint_of=None):
    """Train net in place on a set: by SGD on the MSE to its targets (objective "kd", eq. 9), or by SSL.

    "krr_st" is "kd" by KRR-ST's recipe; SSL sees two random views, and trains by Adam (appendix A.2).
    images (S, C, H, W) are normalised by the mean and std of data, an ImageSet, or uint8. steps: not by
    --epochs; checkpoint_of(net=net, optimizer=optimizer) makes the encoder's Checkpoint.
    """
    ssl = objective in common.SSL
    ours = dict(lr=lr, momentum=args.momentum, weight_decay=args.weight_decay)
    optimizer = torch.optim.SGD(net.parameters(), **(KRR_ST if objective == "krr_st" else ours))
    if ssl:
        optimizer = torch.optim.Adam(net.parameters(), 1e-3, weight_decay=1e-6)
    smallest = 2 if ssl or args.arch != "convnet" else 1  # to contrast, or for BatchNorm
    if min(len(images), args.batch_size) < smallest:
        raise Problem(f"{len(images)} images in batches of {args.batch_size}: {objective} wants two at least")
    per_epoch = len(images) // args.batch_size + (len(images) % args.batch_size >= smallest)
    steps = steps or per_epoch * (args.krr_st_epochs if objective == "krr_st" else args.epochs)
    checkpoint = checkpoint_of(net=net, optimizer=optimizer) if checkpoint_of else None
    done = checkpoint.step if checkpoint else 0
    batches = common.shuffled(len(images), args.batch_size, seed, "pretrain", start=done, smallest=smallest)
    progress = common.Progress("pre-training: step", steps, done)
    f, loss_name = common.in_precision(net, args.precision), "kd" if objective == "krr_st" else objective
    net.train()

    for step in range(done, steps):
        batch = next(batches)
        x, z = common.fetch(images, batch, args.device), common.fetch(targets, batch, args.device)
        draws = common.generator(args.device, seed, "pretrain", "views", step)
        common.seed_dropout(args.device, seed, "pretrain", "dropout", step)
        loss = common.student_loss(loss_name, f, x, z, data, draws, args.augment)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step + 1 < steps:
            progress(step + 1, seed=seed, loss=loss)
        if checkpoint:
            checkpoint.tick(step + 1, last=step + 1 == steps)


# ---- Judging -----------------------------------------------------------------------------------------------


def label_order(n, seed):
    """An order of n images by the seed, the labelled ones first, whatever their number and their labels."""
    return torch.randperm(n, generator=common.generator("cpu", seed, "labels"))


@torch.no_grad()
def encode(function, images, data, device):
    """function(normalised images) over images (N, C, H, W) uint8, in batches; (N, ...) on the device."""
    return torch.cat([function(common.normalise(part.to(device), data)) for part in images.split(500)])


def probe(net, train, test, fractions, args, seed, name):
    """Test accuracy in percent of linear probes on net's features (eq. 3), {labelled fraction: accuracy}."""
    n = len(train.labels)
    order = label_order(n, seed)[: int(max(fractions) * n)]
    net.eval()  # for both splits; the authors take the training features in train mode
    features = encode(net.features, train.images[order], train, args.device)
    test_features = encode(net.features, test.images, train, args.device)
    if features.ndim != 2:
        raise Problem(f"the encoder's features are {tuple(features.shape)}: its features(x) must give (B, F)")
    labels, test_labels = train.labels[order].to(args.device), test.labels.to(args.device)
    counts = {f: int(f * n) for f in fractions}
    return {f: common.probe_accuracy(features[:m], labels[:m], test_features, test_labels)
            for f, m in counts.items()}


def finetune(net, train, test, fractions, args, seed, name):
    """Test accuracy in percent after training net and a new head (appendix B), {labelled fraction: accuracy}.

    net itself is left as it is. name: of the data set; KRR-ST takes more steps for CIFAR and Tiny-ImageNet.
    """
    recipe, accuracies, n = FINETUNE[args.protocol], {}, len(train.labels)
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    order = label_order(n, seed)
    for fraction in fractions:
        labelled = order[: int(fraction * n)]
        smallest = 1 if args.arch == "convnet" else 2  # BatchNorm's statistics want two
        if len(labelled) < smallest:
            raise Problem(f"--fractions {fraction:g}: one labelled image cannot tune a {args.arch}")
        body = copy.deepcopy(net).eval()
        torch.manual_seed(common.seed_of(seed, "finetune"))
        width = encode(body.features, train.images[:1], train, args.device).shape[1]
        head, body = nn.Linear(width, num_classes).to(args.device), body.train()
        parts = [{"params": body.parameters(), "lr": recipe["lr"] * recipe["backbone"]}]
        parts += [{"params": head.parameters(), "lr": recipe["lr"]}]
        optimizer = torch.optim.SGD(parts, momentum=0.9, weight_decay=recipe["weight_decay"])
        large = name in ("cifar10", "cifar100", "tinyimagenet")
        steps = recipe["steps"] // (1 if large else 2) if "steps" in recipe else 0
        steps = args.finetune_steps or steps or recipe["epochs"] * math.ceil(len(labelled) / 256)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        f = common.in_precision(body.features, args.precision)
        batches = common.shuffled(len(labelled), 256, seed, "finetune", smallest=smallest)
        progress = common.Progress("fine-tuning: step", steps)
        for step, batch in enumerate(itertools.islice(batches, steps)):
            x = common.fetch(train.images, labelled[batch], args.device)
            if recipe["augment"]:
                draws = common.generator(args.device, seed, "crop", step)
                x, _ = common.augment(x, None, "flip_crop", train.flip, draws)
            y = common.fetch(train.labels, labelled[batch], args.device)
            loss = F.cross_entropy(head(f(common.normalise(x, train))), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step + 1 < steps:
                progress(step + 1, loss=loss)
        body.eval()
        scores = head(encode(body.features, test.images, train, args.device))
        if not scores.isfinite().all():
            raise Problem(f"{args.protocol} diverged: its lr is {recipe['lr']:.3g}")
        accuracies[fraction] = 100 * (scores.argmax(1).cpu() == test.labels).float().mean().item()
    return accuracies


# ---- Sets, downstream data, cells --------------------------------------------------------------------------

CELL = ("set", "set_id", "pretrain", "seed", "steps", "downstream", "data_id", "fraction")


def attempt(function, *arguments, said=None, what="", seed=""):
    """function(*arguments); None after a Problem, which is said in a line if it is not in `said` yet."""
    try:
        return function(*arguments)
    except (Problem, OSError) as problem:
        if said is not None and (what, f"{problem}") not in said:
            said.add((what, f"{problem}"))
            print("error: " + " ".join(f"{what}{seed}{problem}".split()), file=sys.stderr, flush=True)


def load_set(path, data, ids, row):
    """(images, targets, lr) of a set; raises Problem if they do not fit data, an ImageSet.

    ids: {images_id, targets_id} of the table's other sets, row: options of those of its row. It must have the
    same, as far as it names them, and adds its own.
    """
    contents = common.load_set(path, data)
    advice = "sets of a row or table go together: move it to a folder of its own, or make it again"
    common.check_same(path, contents, "distill", {**ids, **row}, advice)
    ids |= {name: contents[name] for name in ("images_id", "targets_id") if name in contents}
    row |= {k: v for k, v in contents.get("options", {}).get("distill", {}).items() if k != "seed"}
    return contents["images"], contents["targets"], contents["lr"]


def load_downstream(name, args, channels):
    """(train, test, id of both) of a downstream data set; for --split val, of its training images alone."""
    size = args.image_size if name == args.dataset else None
    train = test = common.load_images(name, "train", args.data_dir, size, args.limit, args.device)
    n = len(train.images)
    if train.images.shape[1] != channels:
        raise Problem(f"--downstream {name}: has {train.images.shape[1]} channels, the students {channels}")
    if args.split == "val":
        if n < 5:
            raise Problem(f"--split val: {name} has {n} training images, and every fifth is held out")
        held_out = torch.arange(n) % 5 == 4
        test = train._replace(images=train.images[held_out], labels=train.labels[held_out])
        train = train._replace(images=train.images[~held_out], labels=train.labels[~held_out])
    else:
        test = common.load_images(name, "test", args.data_dir, size, args.limit)
    if (test.labels == test.labels[0]).all():
        raise Problem(f"--downstream {name}: its {args.split} images are of one class, nothing to tell apart")
    if int(min(args.fractions) * len(train.images)) < 1:
        n = len(train.images)
        raise Problem(f"--fractions {min(args.fractions):g}: is none of the {n} labelled images of {name}; "
                      f"choose {math.ceil(1e6 / n) / 1e6:g} or more")
    return train, test, common.fingerprint(train.images, train.labels, test.images, test.labels)


def find_rows(folder, asked, full=True):
    """The table's rows in its order, {(name, objective): names of its sets}.

    NAME, NAME_seed1, NAME_seed2 ... are one row; a set asked for by its own seed stands for itself. asked:
    NAME or NAME:OBJECTIVE each, there or not; nothing for all; full: whether the targets of full data are.
    """
    there = sorted(path.stem for path in folder.glob("*.pt"))
    for name in [n for n in there if n in ("none", "full") or not re.fullmatch(NAME, n)]:
        print(f"{folder / name}.pt: is left out; choose letters, digits, . + - _, and not none or full")
        there.remove(name)
    if not (asked or there or full):
        raise Problem(f"{folder}: has no sets; make some with distill.py, or give --sets none")
    asked = asked or ["none", *(re.sub(r"_seed\d+$", "", name) for name in there), *["full"] * full]
    order = list(ROWS)

    def place(row):
        name = row.partition(":")[0]
        known = name.removesuffix("_auto")
        return order.index(known) if known in order else len(order) - 1.5, name  # others before full data

    rows = {}
    for row in sorted(dict.fromkeys(asked), key=place):
        name, _, objective = row.partition(":")
        seeds = r"(_seed\d+)?" if name not in ("none", "full") else ""
        sets = [s for s in there if re.fullmatch(re.escape(name) + seeds, s)] or [name]
        rows[name, "none" if name == "none" else objective or "kd"] = sets
    return rows


def list_cells(args, rows, sets, downstream):
    """{(row, downstream, fraction, steps): cells, a dict of CELL for each of its sets and seeds}.

    A cell whose set or data set is None will fail; of a row whose sets are not there, there is none.
    """
    ids = {name: common.fingerprint(*part) if part and name != "none" else "none"
           for name, part in sets.items()}
    return {(row, d, f, steps): [
                dict(zip(CELL, (name, ids[name], row[1], seed, steps, d, part and part[2], f)))
                for name in members if name in sets for seed in args.seeds]
            for row, members in rows.items() for steps in args.probe_at
            for d, part in downstream.items() for f in args.fractions}


def key(record):
    """What an accuracy in results.jsonl belongs to, besides the options."""
    return tuple(record.get(name) for name in CELL)


def read_accuracies(path, options):
    """{key: accuracy in percent} of the records with these options; NaN where one failed, the last counts."""
    found = {}
    for record in common.read_records(path):
        plain = all(isinstance(part, (str, int, float, type(None))) for part in key(record))
        if plain and record.get("options") == options:
            accuracy = record.get("accuracy")
            fine = type(accuracy) in (int, float) and 0 <= accuracy <= 100
            found[key(record)] = accuracy if fine else math.nan
    return found


def checkpoint_path(args, cell):
    """Where the encoder of a cell is while it is pre-trained, and until it is judged."""
    job = "_".join(str(cell[name]) for name in ("set", "pretrain", "seed", "steps"))
    return args.out_dir / f"evaluate_{args.arch}_{job}.checkpoint"


def make_pretrained(args, cell, the_set, data, options):
    """A fresh encoder, pre-trained on the_set as the cell says."""
    images, targets, lr = the_set
    torch.manual_seed(common.seed_of(cell["seed"], "encoder"))
    out_dim = 1 if targets is None else targets.shape[1]
    net = make_encoder(args, out_dim, data.images.shape[-1], data.images.shape[1]).to(args.device)
    if images is not None:
        images, targets = (common.place(part, args.device) for part in (images, targets))
        judging = dict.fromkeys(("protocol", "finetune_steps", "split"))  # an encoder depends on none
        now = {**options, **judging, "lr": lr, "set_id": cell["set_id"]}
        path = checkpoint_path(args, cell)
        pretrain(net, cell["pretrain"], images, targets, data, lr, args, cell["seed"], cell["steps"],
                 lambda **parts: common.Checkpoint(path, args, now, **parts))
    return net


def measure(args, cells, sets, downstream, data, options, said):
    """Pre-trains the encoder of these cells, and yields (cell, accuracy, or None where it failed)."""
    name, seed, net = cells[0]["set"], cells[0]["seed"], None
    the_set, says = sets[name], {"said": said, "what": f"{name}, ", "seed": f"seed {seed}: "}
    if the_set and any(downstream[cell["downstream"]] for cell in cells):
        net = attempt(make_pretrained, args, cells[0], the_set, data, options, **says)
    judge = probe if args.protocol == "linear" else finetune
    for d in dict.fromkeys(cell["downstream"] for cell in cells):
        part, accuracies = [cell for cell in cells if cell["downstream"] == d], None
        if net and downstream[d]:
            fractions = [cell["fraction"] for cell in part]
            accuracies = attempt(judge, net, *downstream[d][:2], fractions, args, seed, d, **says)
        for cell in part:
            yield cell, accuracies and accuracies[cell["fraction"]]


# ---- Tables and figure, drawn from the records -------------------------------------------------------------


def row_title(row):
    """The table's name of a pair (set, objective)."""
    name, how = row[0].removesuffix("_auto"), OBJECTIVES.get(row[1])
    auto = ", lr by --lr_init auto" if name in ROWS and name != row[0] else ""
    return (ROWS[name] + auto if name in ROWS else row[0]) + (f", {how}" if how else "")


def accuracy_text(a):
    """Mean ± std of accuracies a (sets, seeds) in percent; NaN where one failed, None if there is no set.

    A set is one distillation, a seed one evaluation. std (divisor n - 1) is that over the seeds, within a
    set; with several sets, the std of their means follows.
    """
    if a is None:
        return "not run"
    failed = np.isnan(a).sum()
    if failed:
        a = a[~np.isnan(a).all(1)]
        a = a[:, ~np.isnan(a).any(0)]
    if a.size == 0:
        return "failed"
    text = f"{a.mean():.2f}"
    text += f" ± {np.sqrt(a.var(1, ddof=1).mean()):.2f}" if a.shape[1] > 1 else ""
    text += f", sets ± {a.mean(1).std(ddof=1):.2f}" if a.shape[0] > 1 else ""
    return text + (f" ({failed} failed)" if failed else "")


def difference_text(a, base, paired):
    """Mean difference of two rows (sets, seeds) ± standard error; nothing where one failed.

    It is paired by the seed of the evaluation, and by that of the distillation if the sets are paired. The
    squared standard error adds what seeds and sets, each taken for random draws, contribute: the variance of
    the seeds' means / seeds, and those of the sets' means / sets.
    """
    if a is None or base is None or np.isnan(a).any() or np.isnan(base).any():
        return ""
    by_seed = a.mean(0) - base.mean(0)
    by_set = [(a - base).mean(1)] if paired and len(a) == len(base) else [a.mean(1), base.mean(1)]
    spread = [v.var(ddof=1) / len(v) for v in (by_seed, *by_set) if len(v) > 1]  # a single one shows none
    return f"{by_seed.mean():+.2f}" + (f" ± {sum(spread) ** 0.5:.2f}" if spread else "")


def read_paper(table, dataset, arch):
    """A table of the paper for its pre-training set, {(row, downstream, fraction): (mean ± std, source)}."""
    with open(PAPER, newline="", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file)
                 if (line["table"], line["pretraining_set"], line["arch"]) == (table, dataset, arch)]
    return {(line["row"], d, float(line["labels"])): (line[d], line["source"])
            for line in lines for d in common.DATASETS if line.get(d)}


def short_names(downstream):
    """{name: the last part of "imagefolder:DIR", if no other has the same}."""
    short = {d: Path(d.partition(":")[2] or d).name for d in downstream}
    return {d: name if list(short.values()).count(name) == 1 else d for d, name in short.items()}


def make_tables(table, rows, downstream, budgets, paper, base):
    """Markdown, a table a downstream set: a row a (set, objective); for each budget, a pair (labelled
    fraction, steps, or None by --epochs), accuracy, difference to base (a row or None), the paper's figure.

    rows: find_rows'; table: accuracies (sets, seeds) or None, as main has them; paper: read_paper's.
    """
    tables, names = [], short_names(downstream)
    seeds = {row: [name.removeprefix(row[0]) for name in members] for row, members in rows.items()}
    for d in downstream:
        known = {f: source for (_, of, f), (_, source) in paper.items() if of == d and (f, None) in budgets}
        heads = [f"pre-training set; labels of {names[d]}", "n"]
        for f, steps in budgets:
            heads.append(f"{100 * f:g} % labels" + (f", {steps:,} steps" if steps else ""))
            heads += ["difference"] if base else []
        heads += [f"{source}: {100 * f:g} %" for f, source in known.items()]
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for row in rows:
            first = table[(row, d, *budgets[0])]
            sets, n = (0, 0) if first is None else first.shape
            texts = [row_title(row), f"{sets} x {n}" if sets > 1 else f"{n}"]
            for f, steps in budgets:
                a, paired = table[row, d, f, steps], seeds[row] == seeds.get(base)
                texts.append(accuracy_text(a))
                if base:
                    texts.append(difference_text(a, table[base, d, f, steps], paired) if row != base else "")
            plain = row[1] in ("kd", "none")  # the paper's other rows are pre-trained otherwise
            texts += [paper.get((row[0], d, f), ("",))[0] if plain else "" for f in known]
            lines.append(f"| {' | '.join(texts)} |")
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def save_figure(path, table, rows, downstream, fractions, steps):
    """Accuracy, a line and its std over the seeds a row: against the labelled fraction, a panel a data set;
    or, with several steps, against the steps of pre-training, a panel a data set and fraction.
    """
    from matplotlib import colormaps, rcParams
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # "$" is a dollar
    curve, names = steps[0] is not None, short_names(downstream)
    panels = list(itertools.product(downstream, fractions if curve else [None]))
    figure, lines = Figure(figsize=(4 * len(panels) + 3, 4), layout="constrained"), {}
    for panel, (d, f) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        x = steps if curve else sorted(fractions)
        for row, colour in zip(rows, itertools.cycle(colormaps["tab20"].colors)):
            values = [table[row, d, f, at] if curve else table[row, d, at, None] for at in x]
            if any(a is None or np.isnan(a).any() for a in values):
                continue
            stds = [np.sqrt(a.var(1, ddof=1).mean()) if a.shape[1] > 1 else 0 for a in values]
            means = [a.mean() for a in values]
            lines[row_title(row)] = panel.errorbar(x, means, stds, capsize=3, color=colour)
        title = names[d].encode("utf-8", "replace").decode() + (f", {100 * f:g} % labels" if curve else "")
        what = "steps of pre-training" if curve else "labelled images in %"
        panel.set(title=title, xlabel=what, ylabel="accuracy in %", xscale="log")
        panel.set_xticks(x, [f"{tick:g}" if curve else f"{100 * tick:g}" for tick in x])
        panel.minorticks_off()
    at_right = dict(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.axes[-1].legend(lines.values(), lines, **at_right)
    with common.replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def caption(args, rows, downstream, budgets, paper, base):
    """What the tables do not say of themselves."""
    judged = "linear probe" if args.protocol == "linear" else f"full fine-tuning ({args.protocol})"
    long = f"{args.epochs} epochs in batches of {args.batch_size}"
    long += f" (as in KRR-ST: {args.krr_st_epochs})" if any(o == "krr_st" for _, o in rows) else ""
    long = "the steps that are said" if args.probe_at[0] else long
    texts = [
        f"Accuracy in % on the {args.split} split, {judged} of {args.arch}s of width {args.width}, pre-"
        f"trained on {short_names([args.dataset])[args.dataset]} for {long}.",
        "Mean ± std (divisor n - 1) over n seeds of weights, order and labels, or sets x seeds.",
        "Rows that name no other way are pre-trained by MSE to the set's targets (KD).",
    ]
    if base:
        texts.append(f"Differences to the {row_title(base)}: paired by seed, ± standard error.")
    texts += [f"Pre-training with --augment {args.augment}."] * (args.augment != "none")
    texts += [f"Full data: lr {args.lr:g}."] * any(name == "full" for name, _ in rows)
    texts += [f"Precision: {args.precision}."] * (args.precision != "fp32")
    if args.paper:
        known = any(d in downstream and (f, None) in budgets for _, d, f in paper)
        known = "three seeds, std with divisor n, from results/paper.csv" if known else "not known here"
        texts.append(f"The paper's figures: {known}.")
    return " ".join(texts)


def write_tables(args, table, rows, downstream, paper):
    """OUT/NAME.md and OUT/NAME.png; prints the tables."""
    path, budgets = args.out_dir / f"{args.name}.md", list(itertools.product(args.fractions, args.probe_at))
    if path.exists() and all(a is None or np.isnan(a).all() for a in table.values()):
        return print(f"nothing could be measured: {path} stays as it is")
    base = next((row for row in BASES if row in rows and len(rows) > 1), None)
    text = make_tables(table, rows, args.downstream, budgets, paper, base)
    text += f"\n{caption(args, rows, downstream, budgets, paper, base)}\n"
    with common.replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    print(f"\n{text}wrote {path} and results.jsonl", flush=True)
    try:
        save_figure(path.with_suffix(".png"), table, rows, args.downstream, args.fractions, args.probe_at)
    except Exception as error:  # whatever is wrong with matplotlib: the figure is an extra
        print("the table's figure is left out, it needs matplotlib:", f"{error}".partition("\n")[0])


def main(args):
    common.set_up(args)
    paper = read_paper(args.paper, args.dataset, args.arch) if args.protocol == "linear" else {}
    folder = args.out_dir / "sets"
    rows = find_rows(folder, args.sets, full=(args.out_dir / "targets.pt").exists())
    full = any(name == "full" for name, _ in rows)
    data, all_targets, made = common.load_targets(args, "kd" if full else None)
    channels = data.images.shape[1]
    make_encoder(args, 1, data.images.shape[-1], channels)  # refused here, if it cannot be
    log, results = common.Log(args.out_dir / "evaluate.jsonl", args), args.out_dir / "results.jsonl"
    # What is a record's own, or in the id of its set (lr), is no option of it.
    options = common.recipe(args, ("sets", "lr", "downstream", "fractions", "seeds", "paper", "probe_at"))
    ids = {name: made[name] for name in ("images_id", "targets_id") if full or name == "images_id"}

    no_file = {"none": (None, None, None), "full": (data.images, all_targets, args.lr)}
    sets, said, options_of = {}, set(), {}  # of the sets of a row
    of_all = said if common.rank() == 0 else None  # the first process says what all find
    for name in dict.fromkeys(sum(rows.values(), [])):
        path, of_row = folder / f"{name}.pt", options_of.setdefault(re.sub(r"_seed\d+$", "", name), {})
        loaded = no_file.get(name) or attempt(load_set, path, data, ids, of_row, said=of_all)
        if path.exists() or loaded:  # or the row is not run
            sets[name] = loaded
    downstream = {d: attempt(load_downstream, d, args, channels, said=of_all) for d in args.downstream}
    if not any(downstream.values()) or not any(sets.values()):
        sys.exit(2)  # nothing can be measured; why is said
    cells = list_cells(args, rows, sets, downstream)
    every = {key(cell): cell for part in cells.values() for cell in part}  # a set in two rows counts once

    known, jobs = read_accuracies(results, options), {name[:5]: [] for name in every}
    for name, cell in every.items():
        if math.isnan(known.get(name, math.nan)):
            jobs[name[:5]].append(cell)  # an encoder's
    jobs = [job for job in jobs.values() if job]
    if jobs:
        log.begin()
    common.wait_for_all()
    mine = jobs[common.rank() :: common.world_size()]
    progress = common.Progress("encoder", len(mine))
    for i, part in enumerate(mine):
        for cell, accuracy in measure(args, part, sets, downstream, data, options, said):
            common.append(results, {**cell, "accuracy": accuracy, "options": options})
        progress(i + 1, set=part[0]["set"], seed=part[0]["seed"])
    common.wait_for_all()
    if common.rank() > 0:
        return

    known = read_accuracies(results, options)
    for name, cell in every.items():
        if not math.isnan(known.get(name, math.nan)):  # its encoder is judged
            checkpoint_path(args, cell).unlink(missing_ok=True)
    table = {where: np.array([known.get(key(cell), math.nan) for cell in part]).reshape(-1, len(args.seeds))
             if part else None for where, part in cells.items()}  # (sets, seeds), NaN where one failed
    write_tables(args, table, rows, downstream, paper)
    if any(a is None or np.isnan(a).any() for a in table.values()):
        sys.exit(2)


if __name__ == "__main__":
    common.run(main, parse_args)
