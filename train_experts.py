"""Stage 2: train K students on the teacher's targets and keep their weights after every epoch: the experts.

Each student starts from its own random weights and minimises the MSE between its output and the targets
(knowledge distillation, paper eq. 5 and 7) on the real images, without augmentation.

Reads:  OUT/targets.pt and the data set.
Writes: OUT/experts/0000.pt ...   one file an expert,
            {trajectory (E + 1, P) float32: its weights at the start and after each epoch,
             example_loss (N,) float32: each image's MSE after the first epoch}

    python train_experts.py                                          # K = 100, the paper's CIFAR-10 setting
    python train_experts.py --first_expert 50 --num_experts 50       # the second half, on another machine

The paper trains for 20 epochs. Distillation reads the weights of epochs 0 to T+ - 1 + M only, and the lr is
constant, so the default is to stop there, at 3 of 20: the same trajectories for a seventh of the work.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import common
from common import natural, number, positive


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.HelpFormatter)
    parser.error = common.fail
    data = parser.add_argument_group("data and files")
    data.add_argument("--dataset", default="cifar10", help="D_real: " + common.DATASET_HELP)
    data.add_argument("--data_dir", default="data", help="of downloads; DIR of a plain --dataset imagefolder")
    data.add_argument("--image_size", type=positive, help="pixels (default: the data set's, imagefolder 32)")
    data.add_argument("--limit", type=positive, help="use only so many images of each split, evenly spaced")
    data.add_argument("--out_dir", type=Path, help="folder of this run (default: runs/DATASET)")
    net = parser.add_argument_group("student f_S")
    net.add_argument("--width", type=positive, default=128, help="channels of the ConvNet")
    net.add_argument("--depth", type=positive, help="blocks of the ConvNet (default: 3 at 32 px, 4 at 64 px)")
    kd = parser.add_argument_group("expert trajectories (eq. 7)")
    kd.add_argument("--num_experts", type=positive, default=100, help="K")
    kd.add_argument("--first_expert", type=natural, default=0, help="the first's number (to split K up)")
    kd.add_argument("--epochs", type=positive, default=3, help="E, at least T+ - 1 + M (paper: 20)")
    kd.add_argument("--batch_size", type=positive, default=256, help="images a step")
    kd.add_argument("--lr", type=number, default=0.1, help="of SGD, constant")
    kd.add_argument("--momentum", type=number, default=0.9, help="of SGD")
    kd.add_argument("--weight_decay", type=number, default=1e-4, help="of SGD")
    parser.add_argument("--seed", type=natural, default=0, help="expert k is seeded by seed + k")
    parser.add_argument("--device", type=common.device, default=common.best_device(), help="where to run")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's choice)")
    args = parser.parse_args(argv)
    args.out_dir = args.out_dir or Path("runs") / common.run_name(args.dataset)
    return args


def train_expert(net, images, targets, stats, args, seed):
    """Train one student; returns its trajectory (E + 1, P) and example losses (N,), on the CPU.

    net is on the device, images (N, C, H, W) uint8 and targets (N, D) too; stats are the data set's mean and
    std.
    """
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    trajectory, example_loss = [common.flatten(net).cpu()], None
    for epoch in range(args.epochs):
        for batch in torch.randperm(len(images), generator=order).to(images.device).split(args.batch_size):
            loss = F.mse_loss(net(common.normalise(images[batch], *stats)), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        trajectory.append(common.flatten(net).cpu())
        if epoch == 0:
            outputs = common.encode(net, images, *stats)  # (N, D)
            example_loss = (outputs - targets).square().mean(1).cpu()
    return torch.stack(trajectory), example_loss, loss.item()


def main(args):
    if args.threads:
        torch.set_num_threads(args.threads)
    train, targets, made = common.load_targets(
        args.out_dir, args.dataset, args.data_dir, args.image_size, args.limit
    )
    channels, size = train.images.shape[1:3]
    args.depth = args.depth or common.default_depth(size)
    options = common.recipe(vars(args))
    images, targets = train.images.to(args.device), targets.to(args.device)
    log = common.Log(args.out_dir, "train_experts", vars(args))

    for i in range(args.num_experts):
        k = args.first_expert + i
        path = args.out_dir / "experts" / f"{k:04d}.pt"
        keys = {"trajectory": 2, "example_loss": 1}
        if common.is_done(path, "train_experts", options, keys, made["targets_id"]):
            continue
        start = time.time()
        torch.manual_seed(args.seed + k)
        net = common.ConvNet(targets.shape[1], size, channels, args.width, args.depth).to(args.device)
        trajectory, example_loss, loss = train_expert(
            net, images, targets, (train.mean, train.std), args, seed=args.seed + k
        )
        if not math.isfinite(loss) or not trajectory.isfinite().all():
            common.fail(f"the loss of expert {k} is {loss}: choose a smaller --lr than {args.lr}")
        common.save(path, {
            "trajectory": trajectory,
            "example_loss": example_loss,
            **made,
            "options": {**made["options"], "train_experts": options},
        })  # fmt: skip
        speed = args.epochs * len(images) / (time.time() - start)
        log.write(expert=k, loss=loss, images_per_second=round(speed))
        log.say(f"expert {log.progress(i + 1, args.num_experts)}: loss {loss:.4f}, {speed:.0f} images/s")
    print(
        f"{args.out_dir / 'experts'}: experts {args.first_expert} to "
        f"{args.first_expert + args.num_experts - 1}, {args.epochs} epochs each"
    )


if __name__ == "__main__":
    common.run(main, parse_args())
