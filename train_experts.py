"""Stage 2: train K students on the teacher's targets and keep their weights after every epoch: the experts.

Each student starts from its own random weights and minimises the MSE between its output and the targets
(knowledge distillation, paper eq. 5 and 7) on the real images, without augmentation.

Reads:  OUT/targets.pt and the data set.
Writes: OUT/experts/0000.pt ...   one file an expert,
            {trajectory (E + 1, P) float32: its weights at the start and after each epoch,
             example_loss (N,) float32: each image's loss after the first epoch}
        OUT/experts/0000.checkpoint, until then: started again, the same command goes on from there

    python train_experts.py                                          # K = 100, the paper's CIFAR-10 setting
    python train_experts.py --first_expert 50 --num_experts 50       # the second half, on another machine
    torchrun --nproc_per_node 4 train_experts.py                     # on four GPUs, each its experts

Started several times in one folder at once, the processes share the experts, and end when all are made.

The paper trains for 20 epochs. Distillation reads the weights of epochs 0 to T+ - 1 + M only, and the lr is
constant, so the default is to stop there, at 3 of 20: the same trajectories for a seventh of the work.

What section 4.1 sets KD against: --objective supervised (MTT: cross-entropy to the labels), and barlow_twins
or simclr (naive MTT-SSL: the loss of two random views, by Adam). They need no teacher, and a folder each:

    python train_experts.py --objective simclr --same_init --num_experts 5 --out_dir runs/cifar10_simclr

Not in the paper: --ema 0.99 stores a running average of each student's weights in their place, and
--sam 0.05 trains it towards flat minima, the aim of flat trajectory distillation (FTD, Du et al., CVPR 2023):

    python train_experts.py --ema 0.99 --out_dir runs/cifar10_ema    # with targets.pt copied there

The log ends in the variance of the trajectories, which with --same_init comes from the order of the data (and
the views) alone, and has the variance of the gradient at the start and at the end of expert 0.
"""

import argparse
import contextlib
import time
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import common
from common import natural, number, positive

RECIPES = {  # defaults that depend on the objective: of appendix A.1 for KD, of A.2 for the others
    "kd": dict(batch_size=256, lr=0.1, momentum=0.9, weight_decay=1e-4),
    "supervised": dict(batch_size=256, lr=0.01, momentum=0.0, weight_decay=0.0),
    "barlow_twins": dict(batch_size=1024, lr=1e-3, weight_decay=1e-6, out_dim=1024),
    "simclr": dict(batch_size=1024, lr=1e-3, weight_decay=1e-6, out_dim=128),
}
GRADIENTS = 32  # mini-batches that the variance of the gradient is taken over


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
    net.add_argument("--depth", type=positive, help="blocks (default: 2 at 16 px, 3 at 32 px, 4 at 64 px)")
    kd = parser.add_argument_group("expert trajectories (eq. 7)")
    objectives = "the students' loss: the paper's, kd, or what section 4.1 sets it against"
    kd.add_argument("--objective", choices=RECIPES, default="kd", help=objectives)
    kd.add_argument("--num_experts", type=positive, default=100, help="K")
    kd.add_argument("--first_expert", type=natural, default=0, help="the first's number (to split K up)")
    kd.add_argument("--same_init", action="store_true", help="all start from the weights that expert 0 draws")
    kd.add_argument("--epochs", type=positive, default=3, help="E, at least T+ - 1 + M (paper: 20)")
    kd.add_argument("--batch_size", type=positive, help="images a step (default: 256, SSL 1024)")
    kd.add_argument("--lr", type=number, help="constant (default: SGD 0.1, supervised 0.01; SSL, Adam 1e-3)")
    kd.add_argument("--momentum", type=number, help="of SGD (default: 0.9, supervised 0)")
    kd.add_argument("--weight_decay", type=number, help="default: 1e-4, supervised 0, SSL 1e-6")
    average = "store a running average of the weights, of which a step keeps this share (the paper: 0, none)"
    kd.add_argument("--ema", type=common.at_least(0, float, 0.9999), default=0.0, help=average)
    flat = "radius of sharpness-aware minimisation: flat trajectories, twice the time (the paper: 0, none)"
    kd.add_argument("--sam", type=number, default=0.0, metavar="RHO", help=flat)
    kd.add_argument("--out_dim", type=positive, help="SSL: outputs (default: Barlow Twins 1024, SimCLR 128)")
    parser.add_argument("--seed", type=natural, default=0, help="expert k is seeded by seed + k")
    common.add_run_options(parser)
    fused = "fuse the student's operations by torch.compile: faster, after a minute"
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help=fused)
    args = parser.parse_args(argv)
    for name in ("momentum", "out_dim"):
        if getattr(args, name) is not None and name not in RECIPES[args.objective]:
            common.fail(f"--{name}: --objective {args.objective} has none; leave it out")
    for name, value in RECIPES[args.objective].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out_dir = args.out_dir or Path("runs") / common.run_name(args.dataset)
    return args


def smaller_rates(args):
    return f"a smaller --lr than {args.lr}" + (f" or --sam than {args.sam}" if args.sam else "")


@contextlib.contextmanager
def uphill(parameters, rho):
    """Within it, the weights are those within rho where the loss is highest, to first order; restored after.

    parameters: a list, with their gradient g at the weights w: w + rho g / ||g|| (SAM, Foret et al., ICLR
    2021, eq. 2).
    """
    before = [p.detach().clone() for p in parameters]
    scale = rho / torch.cat([p.grad.flatten() for p in parameters]).norm().clamp_min(1e-12)
    with torch.no_grad():
        for p in parameters:
            p.add_(scale * p.grad)
    yield
    with torch.no_grad():
        for p, w in zip(parameters, before):
            p.copy_(w)


def train_expert(net, loss_fn, images, targets, stats, args, seed, forward=None, tick=None, resume=None):
    """Train one student; returns its trajectory (E + 1, P), example losses (N,) and last loss, on the CPU.

    net is on the device, images (N, C, H, W) uint8 and targets (N, D) there too or on the CPU; loss_fn is
    make_objective's, stats are the data set's mean and std; forward: net, compiled; tick(share done, loss) is
    called in every step; resume(at, optimizer=optimizer, ...) makes the expert's Checkpoint. SSL has no loss
    of a single example: 0. With --ema trajectory and example losses are those of the averaged weights.
    """
    forward, parameters = forward or net, list(net.parameters())
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(args.ema)) if args.ema else None
    stored = average.module if average else net
    order = torch.Generator().manual_seed(seed)
    draws = torch.Generator(args.device).manual_seed(seed)
    ssl = args.objective in common.SSL
    if ssl:
        optimizer = torch.optim.Adam(net.parameters(), args.lr, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.SGD(net.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    at = {"epoch": 0, "step": 0, "loss": 0.0, "example_loss": torch.zeros(len(images))}
    at["trajectory"] = common.flatten(net).cpu().repeat(args.epochs + 1, 1)  # the rows to come are filled in
    parts = dict(optimizer=optimizer, draws=draws, average=[average] if average else [])
    checkpoint = resume(at, **parts) if resume else None
    at = checkpoint.at if checkpoint else at
    for epoch in range(args.epochs):
        batches = torch.randperm(len(images), generator=order).split(args.batch_size)
        if ssl:  # its loss depends on how many there are in a batch
            batches = [batch for batch in batches if len(batch) == args.batch_size]
        if epoch < at["epoch"]:
            continue
        losses, done = torch.zeros(len(batches), device=args.device), at["step"]
        for i, (x, z) in enumerate(common.fetch([images, targets], batches[done:], args.device), done):
            views = draws.get_state() if args.sam else None  # both gradients of a step are of the same
            loss = loss_fn(forward, x, z, draws)
            optimizer.zero_grad()
            loss.backward()
            if args.sam:
                draws.set_state(views)
                with uphill(parameters, args.sam):
                    again = loss_fn(forward, x, z, draws)
                    optimizer.zero_grad()
                    again.backward()
            optimizer.step()
            if average:
                average.update_parameters(net)
            losses[i] = loss.detach()
            if tick:
                tick((epoch + (i + 1) / len(batches)) / args.epochs, loss)
            if checkpoint and i + 1 < len(batches):
                checkpoint.tick(step=i + 1)
        bad = common.first_not_finite(losses)
        if bad is not None:
            common.fail(
                f"the loss of expert {seed - args.seed} is {losses[bad]} in step {bad + 1} of epoch "
                f"{epoch + 1}: choose {smaller_rates(args)}"
            )
        at["trajectory"][epoch + 1] = common.flatten(stored).cpu()
        if epoch == 0 and not ssl:
            at["example_loss"] = example_losses(stored, images, targets, stats, args).cpu()
        at.update(epoch=epoch + 1, step=0, loss=losses[-1].item())
        if checkpoint:
            checkpoint.tick(last=epoch + 1 == args.epochs)
    return at["trajectory"], at["example_loss"], at["loss"]


@torch.no_grad()
def example_losses(net, images, targets, stats, args):
    """The loss of each image, (N,), in batches: the outputs (N, D) of all of them are never held."""
    parts = (slice(i, i + 500) for i in range(0, len(images), 500))
    losses = []
    for x, z in common.fetch([images, targets], parts, args.device):
        of_outputs = common.LOSSES[args.objective](net(common.normalise(x, *stats)), z, reduction="none")
        losses.append(of_outputs.view(len(x), -1).mean(1))
    return torch.cat(losses)


def gradient_variance(net, loss_fn, images, targets, batch_size, seed, count=GRADIENTS):
    """E||g_B - E g_B||^2 / ||E g_B||^2 at net's weights, g_B the gradient on a mini-batch B (section 4.1).

    Both are unbiased estimates from `count` independent batches: the variance has the divisor count - 1, and
    the squared norm of the mean gradient has variance / count taken off. None where nothing then remains, for
    the gradient cannot be told from noise.
    """
    order = torch.Generator().manual_seed(seed)
    device = next(net.parameters()).device
    draws = torch.Generator(device).manual_seed(seed)
    batches = (torch.randperm(len(images), generator=order)[:batch_size] for _ in range(count))
    total, squares = 0.0, 0.0
    for x, z in common.fetch([images, targets], batches, device):
        loss = loss_fn(net, x, z, draws)
        g = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])
        total, squares = total + g, squares + g.square().sum().item()
    of_mean = (total / count).square().sum().item()
    variance = (squares - count * of_mean) / (count - 1)
    signal = of_mean - variance / count
    return variance / signal if signal > 0 else None


def trajectory_variance(trajectories):
    """How much K trajectories, each (E + 1, P), differ (section 4.1): (variance, relative), E + 1 numbers.

    The variance E||theta - E theta||^2 over the experts at each epoch (divisor K - 1), and the same as a
    share of the mean squared distance travelled, E||theta - theta_0||^2 (None at epoch 0).
    """
    variance, relative = [], []
    for epoch in range(len(trajectories[0])):
        origin = trajectories[0][epoch]  # (P,), near the mean: what all share is taken out before squaring
        mean = sum(trajectory[epoch] - origin for trajectory in trajectories) / len(trajectories)
        squares = [(trajectory[epoch] - origin - mean).square().sum().item() for trajectory in trajectories]
        travelled = [(trajectory[epoch] - trajectory[0]).square().sum().item() for trajectory in trajectories]
        variance.append(sum(squares) / (len(trajectories) - 1))
        relative.append(variance[-1] * len(travelled) / sum(travelled) if sum(travelled) else None)
    return variance, relative


def main(args):
    common.set_up(args)
    train, targets, made = common.load_targets(
        args.out_dir, args.dataset, args.data_dir, args.image_size, args.limit, args.objective
    )
    n, channels, size = train.images.shape[:3]
    if args.batch_size > n:
        common.fail(f"--batch_size {args.batch_size}: there are {n} training images; choose {n} or less")
    if args.objective in common.SSL and args.batch_size < 2:
        common.fail(f"--batch_size {args.batch_size}: {args.objective} contrasts images; choose 2 or more")
    args.depth = args.depth or common.default_depth(size)
    options = common.recipe(vars(args))
    loss_fn = common.make_objective(args.objective, train, args.precision)
    images, targets = common.place([train.images, targets], args.device)
    log = common.Log(args.out_dir, "train_experts", args, {k: made[k] for k in ("images_id", "targets_id")})

    def make_net():
        out_dim = args.out_dim or targets.shape[1]
        return common.ConvNet(out_dim, size, channels, args.width, args.depth).to(args.device)

    net = make_net()
    forward = net
    if args.compile:  # once, for all experts
        layout = common.layout(args.width)
        net = net.to(memory_format=layout)
        forward = common.compiled(lambda x: net(x.contiguous(memory_format=layout)))
    experts = range(args.first_expert, args.first_expert + args.num_experts)
    paths = {k: args.out_dir / "experts" / f"{k:04d}.pt" for k in experts}
    keys = {"trajectory": 2, "example_loss": 1}

    def is_done(k):
        done = common.is_done(paths[k], "train_experts", options, keys, made)
        if done:  # and where it was killed just then
            paths[k].with_suffix(".checkpoint").unlink(missing_ok=True)
        return done

    missing = [k for k in experts if not is_done(k)]
    if common.world_size() > 1:  # before others write into it
        log.begin()
    common.wait_for_all()  # or one would find the first file of another
    mine = missing[common.rank() :: common.world_size()]
    progress = common.Progress(common.of_first() + "expert", len(mine), args.epochs * n, "images")

    def to_make(left):
        """Those left in turn, but for what other runs make; it waits for these, which may be killed."""
        while left:
            tried, left = left, []
            for k in tried:
                if not common.claim(args.out_dir, paths[k]):
                    left += [] if paths[k].exists() else [k]
                elif not is_done(k):
                    yield k
            if left and left == tried:
                time.sleep(1)
            elif left:
                print(f"experts {', '.join(map(str, left))}: another run makes them; waiting", flush=True)

    for i, k in enumerate(to_make(mine)):
        seed, found = args.seed + k, {}
        torch.manual_seed(args.seed if args.same_init else seed)
        net.load_state_dict(make_net().state_dict())
        of_gradient = (net, loss_fn, images, targets, args.batch_size, seed)
        if k == 0:
            found["gradient_variance"] = [gradient_variance(*of_gradient)]  # at the start and at the end
        start, path = time.time(), paths[k].with_suffix(".checkpoint")
        diverged = f"expert {k} diverged: choose {smaller_rates(args)}"

        def resume(at, path=path, diverged=diverged, **parts):
            return common.Checkpoint(path, args, log, diverged, at, own=True, net=net, **parts)

        with common.own_work():
            trajectory, example_loss, loss = train_expert(
                net, loss_fn, images, targets, (train.mean, train.std), args, seed, forward,
                lambda share, loss, i=i: progress(i + share, loss=loss), resume,
            )  # fmt: skip
        speed = args.epochs * n / (time.time() - start)
        if k == 0:
            found["gradient_variance"].append(gradient_variance(*of_gradient))
        if not log.has(expert=k, loss=loss):  # killed here, the next start has the record, but not the file
            log.write(expert=k, loss=loss, images_per_second=round(speed), **found)
        common.save(paths[k], {
            "trajectory": trajectory,
            "example_loss": example_loss,
            **made,
            "options": {**made["options"], "train_experts": options},
        })  # fmt: skip
        path.unlink(missing_ok=True)
    common.wait_for_all()
    if common.rank() > 0:
        return
    print(f"{args.out_dir / 'experts'}: experts {experts[0]} to {experts[-1]}, {args.epochs} epochs each")
    if args.num_experts > 1:
        trajectories = [
            common.load(path, {"trajectory": 2}, "train_experts.py", mmap=True)["trajectory"]
            for path in paths.values()
        ]
        shape = (args.epochs + 1, common.flatten(net).numel())
        for path, trajectory in zip(paths.values(), trajectories):
            if trajectory.shape != shape:
                common.fail(f"{path}: is not a trajectory of this student; move it away and run again")
        variance, relative = trajectory_variance(trajectories)
        # Of several runs that end at once, one has the claim.
        if common.claim(args.out_dir, args.out_dir / "experts") and not log.has(trajectory_variance=variance):
            log.write(trajectory_variance=variance, relative_variance=relative)
        share = f", {relative[-1]:.3f} of their squared distance from the start" if relative[-1] else ""
        print(f"variance of the trajectories after {args.epochs} epochs: {variance[-1]:.4g}{share}")


if __name__ == "__main__":
    common.run(main, parse_args(), "a smaller --batch_size or --width, or --precision bf16")
