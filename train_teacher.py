"""Stage 1: train the teacher with SSL and write its representations of the training images, the targets.

A ResNet-18 learns from two random views of each image (Barlow Twins, paper eq. 1 and 6, or SimCLR); labels
are only used at the end, by the linear probe that says how good its features are.

Reads:  the data set.
Writes: OUT/teacher.pt   {encoder: state dict}
        OUT/targets.pt   {targets (N, D) float32, in the order of the data set; images_id; mean (D,), taken
                         out of them or 0}
        OUT/train_teacher.checkpoint, until then: started again, the same command goes on from there

The targets are the features before the projector, in eval mode, of images without augmentation; with
--centre without their mean, which a student's head learns by its bias and its features need not know of.

    python train_teacher.py                                      # CIFAR-10, the paper's setting
    python train_teacher.py --init_from resnet18.pt --epochs 0   # targets from your own ResNet-18
    python train_teacher.py --centre             # with targets.pt moved away: of teacher.pt, centred
    torchrun --nproc_per_node 4 train_teacher.py                 # on four GPUs, each a quarter of a batch
"""

import argparse
import hashlib
import math
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import natural, number, positive

# Barlow Twins: paper, appendix A.1, epochs and warm-up from the recipe that it names (mix-bt, without its
# mixed samples). SimCLR: appendix A.1.
RECIPES = {
    "barlow_twins": dict(epochs=1000, batch_size=256, lr=1e-2),
    "simclr": dict(epochs=400, batch_size=512, lr=1e-3),
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.HelpFormatter)
    parser.error = common.fail
    data = parser.add_argument_group("data and files")
    data.add_argument("--dataset", default="cifar10", help="D_real: " + common.DATASET_HELP)
    data.add_argument("--data_dir", default="data", help="of downloads; DIR of a plain --dataset imagefolder")
    data.add_argument("--image_size", type=positive, help="pixels (default: the data set's, imagefolder 32)")
    data.add_argument("--limit", type=positive, help="use only so many images of each split, evenly spaced")
    data.add_argument("--out_dir", type=Path, help="folder of this run (default: runs/DATASET)")
    ssl = parser.add_argument_group("self-supervised learning (L_SSL, eq. 6)")
    ssl.add_argument("--ssl", choices=RECIPES, default="barlow_twins", help="loss")
    ssl.add_argument("--epochs", type=natural, help="default: 1000, simclr 400")
    ssl.add_argument("--batch_size", type=common.at_least(2), help="default: 256, simclr 512")
    ssl.add_argument("--lr", type=number, help="of Adam, cosine decay (default: 0.01, simclr 0.001)")
    ssl.add_argument("--warmup_epochs", type=natural, default=10, help="of linear growth of the lr")
    ssl.add_argument("--weight_decay", type=number, default=1e-6, help="of Adam")
    ssl.add_argument("--bt_lambda", type=number, default=8 / 1024, help="lambda (tinyimagenet: 1/1024)")
    ssl.add_argument("--projection_dim", type=positive, default=1024, help="d, the projector's output")
    ssl.add_argument("--temperature", type=number, default=0.5, help="of SimCLR")
    ssl.add_argument("--min_crop", type=number, default=0.08, help="smallest random crop, share of the area")
    net = parser.add_argument_group("teacher f_T")
    net.add_argument("--width", type=positive, default=64, help="of ResNet-18's first stage; D = 8 width")
    centre = "take their mean out of the targets: students learn features sooner (the paper: no)"
    net.add_argument("--centre", action="store_true", help=centre)
    net.add_argument("--init_from", help="state dict of a ResNet-18 with a 3x3 stem, or a teacher.pt")
    parser.add_argument("--seed", type=natural, default=0, help="of everything that is drawn")
    common.add_run_options(parser)
    args = parser.parse_args(argv)
    for name, value in RECIPES[args.ssl].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out_dir = args.out_dir or Path("runs") / common.run_name(args.dataset)
    return args


# ------------------------------------------------------------------------------------------------------------
# One batch over several processes
# ------------------------------------------------------------------------------------------------------------


class _Sum(torch.autograd.Function):
    """The sum over the processes, differentiated as such: the gradients of all processes' losses add up."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return _Sum.forward(ctx, gradient)


def gather(x):
    """The rows of all processes, x (B, d) each, in their order: (G B, d), differentiable."""
    if common.world_size() == 1:
        return x
    start = common.rank() * len(x)
    return _Sum.apply(F.pad(x, (0, 0, start, common.world_size() * len(x) - start - len(x))))


class SyncBatchNorm(nn.SyncBatchNorm):
    """BatchNorm with the statistics of the batch over all processes, on CPUs too, where torch has none."""

    def forward(self, x):
        if x.is_cuda or not self.training or common.world_size() == 1:
            return super().forward(x)  # which in one process is BatchNorm
        dtype, x = x.dtype, x.float() if x.dtype == torch.bfloat16 else x
        others = [0, *range(2, x.ndim)]
        count = common.world_size() * x.numel() / x.shape[1]
        mean = _Sum.apply(x.sum(others, keepdim=True)) / count
        x = x - mean
        variance = _Sum.apply(x.square().sum(others, keepdim=True)) / count
        self.running_mean.lerp_(mean.detach().flatten(), self.momentum)
        self.running_var.lerp_(variance.detach().flatten() * count / (count - 1), self.momentum)
        self.num_batches_tracked += 1
        x = x * (variance + self.eps).rsqrt()
        if self.affine:
            x = x * self.weight.view(mean.shape) + self.bias.view(mean.shape)
        return x.to(dtype)


# ------------------------------------------------------------------------------------------------------------
# Networks, loss and training
# ------------------------------------------------------------------------------------------------------------


def make_projector(ssl, in_dim, projection_dim, norm_layer=SyncBatchNorm):
    """SSL's head, in_dim -> 512 -> projection_dim (Barlow Twins), or in_dim -> in_dim -> 128 (SimCLR)."""
    if ssl == "barlow_twins":
        return nn.Sequential(
            nn.Linear(in_dim, 512, bias=False), norm_layer(512), nn.ReLU(), nn.Linear(512, projection_dim)
        )
    return nn.Sequential(
        nn.Linear(in_dim, in_dim, bias=False), norm_layer(in_dim), nn.ReLU(),
        nn.Linear(in_dim, 128, bias=False), norm_layer(128, affine=False),
    )  # fmt: skip


def load_encoder(encoder, path, made):
    """Copy a ResNet-18's weights into encoder; a classifier's last layer in the file is left out.

    made: what a teacher.pt of this run must be made from, {images_id}.
    """
    contents = common.load(path, {}, "torch.save(encoder.state_dict(), FILE)")
    common.check_origin(path, contents, made)
    try:
        weights = contents.get("encoder", contents)
        encoder.load_state_dict({k: v for k, v in weights.items() if not k.startswith("fc.")})
        if not all(v.isfinite().all() for v in encoder.state_dict().values()):
            raise ValueError("its numbers are not all finite")
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        common.fail(f"{path}: does not fit a ResNet-18 of --width {encoder.conv1.out_channels} ({reason})")


def cosine_lr(step, steps, warmup):
    """Share of the lr at a step: linear growth for `warmup` steps, then a half cosine to a thousandth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def ssl_loss(forward, x, draws, stats, view, args):
    """L_SSL of two random views of a batch (eq. 6): of x (B / G, C, H, W) uint8, this process's part of it.

    forward is encoder and projector. Each of G processes has the loss of all B images, and the gradient of
    its part, G-fold: their mean is the gradient of the batch.
    """
    views = [common.random_view(x, draws, **view) for _ in range(2)]
    z1, z2 = (gather(forward(common.normalise(v, *stats))) for v in views)  # (B, d) each
    if args.ssl == "barlow_twins":
        return common.barlow_twins_loss(z1, z2, args.bt_lambda)
    return common.simclr_loss(z1, z2, args.temperature)


def train(encoder, images, stats, view, args, log):
    """Train the encoder in place on images (N, C, H, W) uint8 (eq. 6); returns the checkpoint of its end.

    view holds random_view's options, stats the data set's mean and std. Several processes each take a part of
    every batch, and the step that one process would take with the whole.
    """
    n = len(images)
    projector = make_projector(args.ssl, 8 * args.width, args.projection_dim)
    net = nn.Sequential(encoder, projector).to(args.device)
    optimizer = torch.optim.Adam(net.parameters(), weight_decay=args.weight_decay)
    forward = common.autocast(net, torch.device(args.device), args.precision)
    share = args.batch_size // common.world_size()
    first = common.rank() * share
    order = torch.Generator().manual_seed(args.seed)
    draws = torch.Generator(args.device).manual_seed(args.seed)
    path = args.out_dir / "train_teacher.checkpoint"
    diverged = f"the teacher diverged: choose a smaller --lr than {args.lr}"
    parts = dict(net=net, optimizer=optimizer, draws=draws)
    # The rest of a shuffle is dropped: BatchNorm and both losses want full batches.
    steps = n // args.batch_size
    at = {"epoch": 0, "step": 0, "losses": torch.zeros(steps, device=args.device)}
    checkpoint = common.Checkpoint(path, args, log, diverged, at, **parts)
    at = checkpoint.at
    progress = common.Progress("epoch", args.epochs, n, "images", before=at["epoch"])
    warmup = min(args.warmup_epochs, args.epochs // 10) * steps

    for epoch in range(args.epochs):
        net.train()
        batches = torch.randperm(n, generator=order).split(args.batch_size)[:steps]
        if epoch < at["epoch"]:
            continue
        losses, done, start = at["losses"].to(args.device), at["step"], time.time()
        mine = (batch[first : first + share] for batch in batches[done:])
        for i, (x,) in enumerate(common.fetch([images], mine, args.device), done):
            lr = args.lr * cosine_lr(epoch * steps + i, args.epochs * steps, warmup)
            optimizer.param_groups[0]["lr"] = lr
            loss = ssl_loss(forward, x, draws, stats, {**view, "part_of": (args.batch_size, first)}, args)
            optimizer.zero_grad()
            loss.backward()
            common.average(*(p.grad for p in net.parameters()))
            optimizer.step()
            losses[i] = loss.detach()
            if progress(epoch + (i + 1) / steps, loss=loss) or i + 1 == steps:
                bad = common.first_not_finite(losses)
                if bad is not None:
                    common.fail(
                        f"the {args.ssl} loss is {losses[bad]} in step {bad + 1} of epoch {epoch + 1}: "
                        f"choose a smaller --lr than {args.lr}, or more --warmup_epochs; {checkpoint.kept()}"
                    )
            if i + 1 < steps:
                checkpoint.tick(epoch=epoch, step=i + 1, losses=losses)
        speed = (steps - done) * args.batch_size / (time.time() - start)
        if common.rank() == 0:
            log.write(epoch=epoch + 1, loss=losses.mean().item(), lr=lr, images_per_second=round(speed))
        checkpoint.tick(epoch + 1 == args.epochs, epoch=epoch + 1, step=0, losses=torch.zeros_like(losses))
    return checkpoint


def main(args):
    common.set_up(args)
    if args.batch_size % common.world_size():
        common.fail(
            f"--batch_size {args.batch_size}: choose a multiple of the {common.world_size()} processes"
        )
    options = common.recipe(vars(args))
    if args.init_from:  # by its contents: another file of the same name is another teacher
        common.load(args.init_from, {}, "torch.save(encoder.state_dict(), FILE)")
        options["init_from"] = hashlib.sha256(Path(args.init_from).read_bytes()).hexdigest()[:16]
    teacher_path, targets_path = args.out_dir / "teacher.pt", args.out_dir / "targets.pt"
    under_way = (args.out_dir / "train_teacher.checkpoint").exists()  # which is the last thing to go
    there = common.is_done(targets_path, "train_teacher", options, {"targets": 2})
    if there and not under_way:
        print(f"{targets_path} is there: nothing to do")
        return
    of_teacher = {name: value for name, value in options.items() if name != "centre"}
    trained = common.is_done(teacher_path, "train_teacher", of_teacher, {"encoder": None}) and not under_way
    if common.rank() == 0 and not common.claim(args.out_dir, targets_path):
        common.fail(f"{targets_path}: another run is making it; wait for it, or choose another --out_dir")

    key, folder = common.parse_dataset(args.dataset, args.data_dir)
    images = common.load_images(args.dataset, "train", args.data_dir, args.image_size, args.limit)
    n, channels, px = images.images.shape[:3]
    stats = (images.mean, images.std)
    if args.epochs and args.batch_size > n:
        common.fail(f"--batch_size {args.batch_size}: there are {n} training images; choose {n} or less")
    torch.manual_seed(args.seed)
    encoder = common.ResNet(channels=channels, width=args.width, norm_layer=SyncBatchNorm)
    made = {"options": {"train_teacher": options}, "images_id": common.images_id(images.images)}
    if trained:
        load_encoder(encoder, teacher_path, made)
    elif args.init_from:  # a teacher of other images is welcome
        load_encoder(encoder, args.init_from, {})
    encoder = encoder.to(args.device, memory_format=common.layout(args.width))
    (train_images,) = common.place([images.images], args.device)
    ids = {"images_id": made["images_id"], "init_from": options["init_from"]}
    log = common.Log(args.out_dir, "train_teacher", args, ids)

    checkpoint = None
    if trained:
        log.begin()
    else:
        view = {"min_crop": args.min_crop, "flip": images.flip}
        if px >= 64:  # as in Barlow Twins' recipe for large images
            view |= {"blur": 0.5, "solarize": 0.1}
        checkpoint = train(encoder, train_images, stats, view, args, log)

    if common.rank() > 0:
        return  # what follows is one's work
    encoder.eval()
    targets = common.encode(encoder, train_images, *stats, args.device)  # (N, D)
    if not targets.isfinite().all():
        common.fail(
            "the teacher's representations are not finite; choose a smaller --lr, or another --init_from"
        )
    if not trained:
        weights = {name: value.cpu().contiguous() for name, value in encoder.state_dict().items()}
        common.save(teacher_path, {"encoder": weights, **made})
    if not there:
        mean = targets.mean(0) if args.centre else torch.zeros_like(targets[0])
        common.save(targets_path, {"targets": (targets - mean).cpu(), "mean": mean.cpu(), **made})
    print(f"wrote {teacher_path} and {targets_path}: {n} targets of D = {targets.shape[1]}")
    # Labels exist unless an image folder has one class only, or no test images.
    if images.labels.max() > 0 and (key != "imagefolder" or (folder / "test").is_dir()):
        test = common.load_images(args.dataset, "test", args.data_dir, args.image_size, args.limit)
        features = common.encode(encoder, test.images, *stats, args.device)
        labels = images.labels.to(args.device), test.labels.to(args.device)
        accuracy = common.probe_accuracy(targets, labels[0], features, labels[1])
        log.write(probe_accuracy=accuracy)
        print(f"linear probe of the teacher's features, all labels: {accuracy:.2f} % test accuracy")
    if checkpoint:
        checkpoint.remove()


if __name__ == "__main__":
    common.run(main, parse_args(), "a smaller --batch_size or --width, or --precision bf16")
