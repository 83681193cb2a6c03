"""Stage 4: pre-train encoders on each set and judge them by linear probes with few labels.

For each set and seed, a fresh student is trained on (images, targets) with the set's learning rate (paper,
eq. 9), its head is dropped, and a linear classifier is fitted to its features of a small random part of a
downstream data set's labelled images (eq. 3). One encoder a seed serves all downstream sets; the labelled
images of a seed are the same for all sets, and a smaller fraction is part of a larger.

Reads:  OUT/sets/*.pt, OUT/targets.pt (for "full") and the data sets.
Writes: OUT/results.jsonl   one record an accuracy; a stage that is started again only adds what is missing
        OUT/results.md      the table, mean and standard deviation over the seeds
        OUT/results.png     the same as a figure, if matplotlib is installed

    python evaluate.py         # none, every set in OUT/sets, full; probed on CIFAR-10. As in Table 1:
    python evaluate.py --downstream cifar10 cifar100 tinyimagenet aircraft cub2011 dogs flowers

The set "none" is the student's random initialisation, "full" the real images with the teacher's targets.
"""

import argparse
import json
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
    "subset_random_lr_from_mkdt_random": "random subset, lr of MKDT",
    "mkdt_random": "MKDT (random init)",
    "mkdt_high_loss": "MKDT",
    "full": "full data",
}

SSL = {  # SSL objectives of the encoder's outputs for two views; weights as in train_teacher.py
    "barlow_twins": lambda z1, z2: common.barlow_twins_loss(z1, z2, off_diagonal=8 / 1024),
    "simclr": lambda z1, z2: common.simclr_loss(z1, z2, temperature=0.5),
}
SEEDS = 1_000_000  # encoder seeds start here, far from those of the experts


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.HelpFormatter)
    parser.error = common.fail
    data = parser.add_argument_group("data and files")
    data.add_argument("--dataset", default="cifar10", help="D_real: " + common.DATASET_HELP)
    data.add_argument("--data_dir", default="data", help="of downloads; DIR of a plain --dataset imagefolder")
    data.add_argument("--image_size", type=positive, help="pixels (default: the data set's, imagefolder 32)")
    data.add_argument("--limit", type=positive, help="use only so many images of each split, evenly spaced")
    data.add_argument("--out_dir", type=Path, help="folder of this run (default: runs/DATASET)")
    data.add_argument("--sets", nargs="+", help="of OUT/sets, none, full (default: none, all, full)")
    net = parser.add_argument_group("encoder f_S, as in train_experts.py, or a larger one (Table 5)")
    net.add_argument("--arch", choices=["convnet", "resnet10", "resnet18"], default="convnet", help="network")
    net.add_argument(
        "--norm", choices=["batch", "instance"], default="batch", help="of a ResNet (paper: batch)"
    )
    net.add_argument("--width", type=positive, help="channels (default: 128; of a ResNet's first stage 64)")
    net.add_argument("--depth", type=positive, help="blocks of the ConvNet (default: 3 at 32 px, 4 at 64 px)")
    pre = parser.add_argument_group("pre-training (eq. 9)")
    objectives = "kd: MSE to the set's targets; or SSL on its images alone, a row each"
    pre.add_argument("--pretrain", nargs="+", choices=["kd", *SSL], default=["kd"], help=objectives)
    pre.add_argument("--epochs", type=positive, default=20, help="over the set")
    pre.add_argument("--batch_size", type=positive, default=256, help="images a step")
    pre.add_argument("--lr", type=number, default=0.1, help="for full data; a set brings its own, alpha_syn")
    pre.add_argument("--momentum", type=number, default=0.9, help="of SGD")
    pre.add_argument("--weight_decay", type=number, default=1e-4, help="of SGD")
    pre.add_argument("--ssl_lr", type=number, default=1e-3, help="of Adam, for SSL (appendix A.2)")
    probe = parser.add_argument_group("linear probe (eq. 3)")
    probe.add_argument("--downstream", nargs="+", help="D_d, its data sets (default: --dataset)")
    probe.add_argument("--fractions", type=float, nargs="+", default=[0.01, 0.05], help="labelled part")
    probe.add_argument("--seeds", type=natural, nargs="+", default=[0, 1, 2], help="of weights and labels")
    probe.add_argument(
        "--label_draw", choices=["uniform", "balanced"], default="uniform", help="paper: uniform"
    )
    val = "val: on every fifth training image, whose labels are held out; to choose options by"
    probe.add_argument("--split", choices=["test", "val"], default="test", help=val)
    parser.add_argument("--device", type=common.device, default=common.best_device(), help="where to run")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's choice)")
    args = parser.parse_args(argv)
    args.out_dir = args.out_dir or Path("runs") / common.run_name(args.dataset)
    args.downstream = args.downstream or [args.dataset]
    for option in (
        "pretrain",
        "downstream",
        "fractions",
        "seeds",
    ):  # each once, or the table would count it twice
        setattr(args, option, list(dict.fromkeys(getattr(args, option))))
    args.width = args.width or (128 if args.arch == "convnet" else 64)
    return args


def make_encoder(args, out_dim, image_size, channels):
    """A fresh encoder with features(x) and a head to out_dim."""
    if args.arch == "convnet":
        depth = args.depth or common.default_depth(image_size)
        return common.ConvNet(out_dim, image_size, channels, args.width, depth)
    blocks = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2)}[args.arch]
    norm_layer = nn.BatchNorm2d if args.norm == "batch" else lambda width: nn.GroupNorm(width, width)
    return common.ResNet(blocks, out_dim, channels, args.width, norm_layer)


def pretrain(net, objective, images, targets, stats, lr, args, seed):
    """Train net in place on a set: by SGD on the MSE to its targets (objective "kd", eq. 9), or by SSL.

    SSL sees the images alone, in two random views, and trains by Adam, as the paper does (appendix
    A.2). images (S, C, H, W) are normalised by stats, the data set's mean and std, or uint8.
    """
    net.train()
    order = torch.Generator().manual_seed(seed)
    draws = torch.Generator(args.device).manual_seed(seed)
    flip = common.DATASETS[args.dataset.partition(":")[0]].flip
    if objective == "kd":
        optimizer = torch.optim.SGD(net.parameters(), lr, args.momentum, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.Adam(net.parameters(), args.ssl_lr, weight_decay=1e-6)

    def loss_fn(x, z):
        if objective == "kd":
            return F.mse_loss(net(common.normalise(x, *stats) if x.dtype == torch.uint8 else x), z)
        x = x if x.dtype == torch.uint8 else common.denormalise(x, *stats)
        views = [common.random_view(x, draws, flip=flip) for _ in range(2)]
        return SSL[objective](*(net(common.normalise(view, *stats)) for view in views))

    for _ in range(args.epochs):
        for batch in torch.randperm(len(images), generator=order).to(images.device).split(args.batch_size):
            if objective != "kd" and len(batch) < 2:
                continue  # nothing to contrast it with
            loss = loss_fn(images[batch], targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def label_order(labels, label_draw, seed):
    """An order of the images (N,) by the seed: the first n are the labelled ones, whatever n is.

    "uniform" draws without regard to the labels (N,), as the authors do; "balanced" takes one image of each
    class in turn, as long as there are any.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    if label_draw == "balanced":
        one_hot = F.one_hot(labels[order])
        # 1 for the first image of its class, 2 for the second ...
        turn = (one_hot.cumsum(0) * one_hot).sum(1)
        order = order[turn.argsort(stable=True)]
    return order


def probe(net, train, test, fractions, label_draw, seed):
    """Test accuracy in percent of linear probes on net's features (eq. 3), {labelled fraction: accuracy}."""
    order = label_order(train.labels, label_draw, seed)[: int(max(fractions) * len(train.labels))]
    net.eval()  # for both splits; the authors take the training features in train mode
    features = common.encode(net.features, train.images[order], train.mean, train.std)
    test_features = common.encode(net.features, test.images, train.mean, train.std)
    accuracies = {}
    for fraction in fractions:
        n = int(fraction * len(train.labels))
        accuracies[fraction] = common.probe_accuracy(
            features[:n], train.labels[order[:n]], test_features, test.labels
        )
    return accuracies


def load_set(path, channels, image_size, out_dim, targets_id):
    """A set's (images, targets, lr); exits if it does not fit the student or is of other targets."""
    contents = common.load(path, {"images": 4, "targets": 2, "lr": float}, "distill.py")
    images, targets = contents["images"], contents["targets"]
    shape = (channels, image_size, image_size)
    if images.shape[1:] != shape or len(images) != len(targets):
        common.fail(
            f"{path}: has {tuple(images.shape)} images and {len(targets)} targets, but the data set's images "
            f"are {shape}; give the --dataset and --image_size that it was made with"
        )
    if targets.shape[1] != out_dim:
        common.fail(
            f"{path}: has targets of D = {targets.shape[1]}, targets.pt of D = {out_dim}; make it again"
        )
    common.check_targets_id(path, contents, targets_id)
    if not (images.isfinite().all() and targets.isfinite().all()):
        common.fail(f"{path}: images and targets are not all finite; make it again with distill.py")
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
    if train.images.shape[1] != channels:
        common.fail(
            f"--downstream {name}: has {train.images.shape[1]} colour channels, the student {channels}"
        )
    for fraction in args.fractions:
        if not 0 < fraction <= 1 or int(fraction * len(train.images)) < 1:
            common.fail(
                f"--fractions {fraction}: is none of the {len(train.images)} labelled images of {name}, or "
                "more than all; choose one above 0, at most 1"
            )
    return tuple(part._replace(images=part.images.to(args.device), labels=part.labels.to(args.device))
                 for part in (train, test))  # fmt: skip


def key(record):
    """What an accuracy in results.jsonl belongs to, besides the options."""
    names = ("set", "set_id", "pretrain", "downstream", "data_id", "fraction", "seed")
    return tuple(record[name] for name in names)


def read_results(path):
    """The records of results.jsonl; a line that is broken (a run was killed while writing it) is left out."""
    records, text = [], path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if text and not text.endswith("\n"):
        with open(path, "a") as file:  # so that the next record starts a line of its own
            file.write("\n")
    for i, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
            usable = hash(key(record)) and record["options"] and 0 <= record["accuracy"] <= 100
        except (ValueError, KeyError, TypeError):
            usable = False
        if usable:
            records.append(record)
        else:
            print(f"warning: {path}: line {i} is broken and left out", flush=True)
    return records


def row_title(row):
    """The table's name of a pair (set, objective)."""
    name, objective = row
    return ROWS.get(name, name) + (f", {objective}" if objective in SSL else "")


def make_table(cells, sets, downstream, fractions, seeds):
    """Markdown, a row a set, a column a data set and fraction: mean ± std (divisor n - 1) over the seeds.

    Below it, each set's difference to the random subset, paired by seed, mean ± standard error: both see the
    same labelled images, whose draw makes most of the std.
    sets are pairs (name, objective); cells: {(set, downstream, fraction, seed): accuracy in percent}.
    """
    columns = [(d, f) for d in downstream for f in fractions]
    titles = [f"{common.run_name(d)}, {100 * f:g} % labels" for d, f in columns]

    def table(head, rows, cell):
        lines = [f"| {head} | " + " | ".join(titles) + " |", "|---|" + "---|" * len(columns)]
        for row in rows:
            lines.append(f"| {row_title(row)} | " + " | ".join(cell(row, *c) for c in columns) + " |")
        return "\n".join(lines) + "\n"

    def values(row, d, f):
        return torch.tensor([cells[row, d, f, seed] for seed in seeds])

    def accuracy(row, d, f):
        v = values(row, d, f)
        return f"{v.mean():.2f} ± {v.std():.2f}" if len(v) > 1 else f"{v.mean():.2f}"

    base = ("subset_random", "kd")

    def difference(row, d, f):
        v = values(row, d, f) - values(base, d, f)
        return f"{v.mean():+.2f} ± {v.std() / len(v) ** 0.5:.2f}" if len(v) > 1 else f"{v.mean():+.2f}"

    tables = table("pre-training set", sets, accuracy)
    if base in sets:
        others = [row for row in sets if row != base]
        tables += "\n" + table("difference to random subset", others, difference)
    return tables


def save_figure(path, cells, rows, downstream, fractions, seeds):
    """Accuracy against the labelled fraction, a line and its std over the seeds a row, a panel a data set."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} is left out: it needs matplotlib (pip install matplotlib)")
        return
    figure = Figure(figsize=(4 * len(downstream) + 2, 4), layout="constrained")
    fractions = sorted(fractions)
    percent = [100 * f for f in fractions]
    for panel, d in zip(figure.subplots(1, len(downstream), squeeze=False)[0], downstream):
        for row in rows:
            values = torch.tensor([[cells[row, d, f, seed] for seed in seeds] for f in fractions])
            spread = values.std(1) if len(seeds) > 1 else None
            panel.errorbar(percent, values.mean(1), spread, label=row_title(row), capsize=3)
        panel.set(
            title=common.run_name(d), xlabel="labelled images in %", ylabel="accuracy in %", xscale="log"
        )
        panel.set_xticks(percent, [f"{p:g}" for p in percent])
        panel.minorticks_off()
    panel.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    temporary = path.with_name("results.tmp.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)


def main(args):
    if args.threads:
        torch.set_num_threads(args.threads)
    train, all_targets, made = common.load_targets(
        args.out_dir, args.dataset, args.data_dir, args.image_size, args.limit
    )
    channels, px = train.images.shape[1:3]
    stats = (train.mean, train.std)

    # What is compared: name -> (images, targets, lr), or None for a student that is not pre-trained.
    names = args.sets or ["none", *(path.stem for path in (args.out_dir / "sets").glob("*.pt")), "full"]
    order = list(ROWS)  # other sets come before full data
    names = sorted(
        set(names), key=lambda name: (order.index(name) if name in order else len(order) - 1.5, name)
    )
    sets = {}
    for name in names:
        if name == "none":
            sets[name] = None
        elif name == "full":
            sets[name] = (train.images, all_targets, args.lr)
        else:
            sets[name] = load_set(
                args.out_dir / "sets" / f"{name}.pt", channels, px, all_targets.shape[1], made["targets_id"]
            )
    downstream = {}  # name -> (train ImageSet, test ImageSet)
    for name in args.downstream:
        downstream[name] = load_downstream(name, args, channels)
    data_id = {
        name: common.fingerprint(*(tensor for part in parts for tensor in (part.images, part.labels)))
        for name, parts in downstream.items()
    }

    # An accuracy is known if results.jsonl has it for these options, this very set and these very images.
    results = args.out_dir / "results.jsonl"
    of_cell = ("dataset", "sets", "lr", "pretrain", "downstream", "fractions", "seeds")  # the record's
    options = {name: value for name, value in common.recipe(vars(args)).items() if name not in of_cell}
    options["targets_id"] = made["targets_id"]
    known = {
        key(record): record["accuracy"] for record in read_results(results) if record["options"] == options
    }
    log = common.Log(args.out_dir, "evaluate", vars(args))
    rows = [(name, objective) for name in sets for objective in (args.pretrain if sets[name] else ["none"])]
    cells, done = {}, 0
    for name, objective in rows:
        contents = sets[name]
        set_id = common.fingerprint(*contents) if contents else "none"
        for seed in args.seeds:
            cell = {"set": name, "set_id": set_id, "pretrain": objective, "seed": seed}
            records = {
                (d, f): {**cell, "downstream": d, "data_id": data_id[d], "fraction": f}
                for d in downstream
                for f in args.fractions
            }
            missing = [d for d in downstream if any(key(records[d, f]) not in known for f in args.fractions)]
            if missing:
                # Not the seeds of the experts, or an encoder would start where an expert did.
                torch.manual_seed(SEEDS + seed)
                net = make_encoder(args, all_targets.shape[1], px, channels).to(args.device)
                if contents:
                    images, targets = (tensor.to(args.device) for tensor in contents[:2])
                    pretrain(net, objective, images, targets, stats, contents[2], args, SEEDS + seed)
                if not all(p.isfinite().all() for p in net.parameters()):
                    lr = args.ssl_lr if objective in SSL else contents[2]
                    common.fail(
                        f"pre-training on {name} by {objective} diverged: its lr, {lr:.3g}, is too large"
                    )
            for d in missing:
                for f, accuracy in probe(net, *downstream[d], args.fractions, args.label_draw, seed).items():
                    record = records[d, f]
                    if key(record) not in known:
                        known[key(record)] = accuracy
                        line = json.dumps({**record, "accuracy": accuracy, "options": options})
                        with open(results, "a", encoding="utf-8") as file:
                            file.write(line + "\n")
            for (d, f), record in records.items():
                cells[(name, objective), d, f, seed] = known[key(record)]
            done += 1
            log.say(f"encoder {log.progress(done, len(rows) * len(args.seeds))}: {name}, seed {seed}")

    table = make_table(cells, rows, list(downstream), args.fractions, args.seeds)
    caption = (
        f"Linear-probe accuracy in % on the {args.split} split, mean ± std (divisor n - 1) over n = "
        f"{len(args.seeds)} seeds; differences are paired by seed, ± standard error. Pre-training on "
        f"{common.run_name(args.dataset)} for {args.epochs} epochs."
    )
    temporary = args.out_dir / "results.md.tmp"
    temporary.write_text(f"{table}\n{caption}\n", encoding="utf-8")
    temporary.replace(args.out_dir / "results.md")
    save_figure(args.out_dir / "results.png", cells, rows, list(downstream), args.fractions, args.seeds)
    print(f"\n{table}\n{caption}\nwrote {args.out_dir / 'results.md'} and results.jsonl")


if __name__ == "__main__":
    common.run(main, parse_args())
