"""Stage 2: train K students on the teacher's targets and keep their weights after every epoch: the experts.

Each student starts from its own random weights and minimises the MSE between its output and the targets
(knowledge distillation, paper eq. 5 and 7) on the real images, or by --augment on views of them.

Reads:  OUT/targets.pt and the data set.
Writes: OUT/experts/0000.pt ...   one file an expert,
            {trajectory (E + 1, P) float32: its weights at the start and after each epoch,
             example_loss (N,) float32: each image's loss after the first epoch}
        OUT/train_experts.jsonl (with --first_expert 50 train_experts_50.jsonl), and while an expert is
            trained OUT/experts/0000.checkpoint

    python train_experts.py                                          # K = 100, the paper's CIFAR-10 setting
    python train_experts.py --first_expert 50 --num_experts 50       # the second half, on another machine

The paper trains for 20 epochs. Distillation reads the weights of epochs 0 to T+ - 1 + M only, and the lr is
constant, so the default is to stop there, at 3 of 20: the same trajectories for a seventh of the work.

What section 4.1 sets KD against: --objective supervised (MTT: cross-entropy to the labels), and barlow_twins
or simclr (naive MTT-SSL: the loss of two random views, by Adam). They need no teacher, and a folder each.
"""

import torch

import common
from common import Problem, natural, number, positive

RECIPES = {  # defaults that depend on the objective: of appendix A.1 for KD, of A.2 for the others
    "kd": dict(batch_size=256, lr=0.1, momentum=0.9, weight_decay=1e-4),
    "supervised": dict(batch_size=256, lr=0.01, momentum=0.0, weight_decay=0.0),
    "barlow_twins": dict(batch_size=1024, lr=1e-3, weight_decay=1e-6, out_dim=1024),
    "simclr": dict(batch_size=1024, lr=1e-3, weight_decay=1e-6, out_dim=128),
}


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    parser.add_student_options()
    kd = parser.add_argument_group("expert trajectories (eq. 7)")
    kd.add_argument("--objective", choices=RECIPES, default="kd", help="loss (others: section 4.1)")
    kd.add_argument("--num_experts", type=positive, default=100, help="K")
    kd.add_argument("--first_expert", type=natural, default=0, help="the first's number (to split K up)")
    kd.add_argument("--same_init", action="store_true", help="all start from the weights that expert 0 draws")
    kd.add_argument("--epochs", type=positive, default=3, help="E, T+ - 1 + M at least (paper: 20)")
    kd.add_argument("--batch_size", type=positive, help="images a step (default: 256, SSL 1024)")
    kd.add_argument("--lr", type=number, help="constant (default: SGD 0.1, supervised 0.01; SSL, Adam 1e-3)")
    kd.add_argument("--momentum", type=number, help="of SGD (default: 0.9, supervised 0)")
    kd.add_argument("--weight_decay", type=number, help="default: 1e-4, supervised 0, SSL 1e-6")
    kd.add_argument("--out_dim", type=positive, help="SSL: outputs (default: Barlow Twins 1024, SimCLR 128)")
    parser.add_argument("--seed", type=natural, default=0, help="expert k draws from (seed, k)")
    parser.add_run_options(compile=True)
    args = parser.parse_args(argv)
    for name in ("momentum", "out_dim"):
        if getattr(args, name) is not None and name not in RECIPES[args.objective]:
            raise Problem(f"--{name}: --objective {args.objective} has none; leave it out")
    vars(args).update({k: v for k, v in RECIPES[args.objective].items() if getattr(args, k) is None})
    return args


def train_expert(net, forward, data, images, targets, args, k, checkpoint_of):
    """Train student net in place as expert k (eq. 7); returns (trajectory (E + 1, P), example losses (N,)).

    forward is net, or net compiled; images (N, C, H, W) uint8 and targets (N, D) are those of data, an
    ImageSet, on the device or on the host; checkpoint_of(optimizer=..., ...) makes the Checkpoint.
    """
    n, ssl = len(images), args.objective in common.SSL
    if ssl:  # as the paper (appendix A.1 and A.2)
        optimizer = torch.optim.Adam(net.parameters(), args.lr, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.SGD(net.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    smallest = args.batch_size if ssl else 1  # SSL's loss depends on how many there are in a batch
    per_epoch = n // args.batch_size + (n % args.batch_size >= smallest)
    trajectory = common.flatten(net).cpu().repeat(args.epochs + 1, 1)  # (E + 1, P); the rows are filled in
    example_loss, losses = torch.zeros(n), torch.zeros(per_epoch, device=args.device)
    parts = dict(trajectory=trajectory, example_loss=example_loss, losses=losses)
    checkpoint = checkpoint_of(net=net, optimizer=optimizer, **parts)
    key = (args.seed, "expert", k)
    batches = common.shuffled(n, args.batch_size, *key, start=checkpoint.step, smallest=smallest)
    progress = common.Progress(f"expert {k}: step", args.epochs * per_epoch, checkpoint.step)
    f = common.in_precision(forward, args.precision)

    for step in range(checkpoint.step, args.epochs * per_epoch):
        batch = next(batches)
        x, z = common.fetch(images, batch, args.device), common.fetch(targets, batch, args.device)
        draws = common.generator(args.device, *key, "views", step)
        common.seed_dropout(args.device, *key, "dropout", step)
        loss = common.student_loss(args.objective, f, x, z, data, draws, args.augment)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        losses[step % per_epoch] = loss.detach()
        epoch = (step + 1) // per_epoch
        if (step + 1) % per_epoch == 0:
            trajectory[epoch] = common.flatten(net).cpu()
            if epoch == 1 and not ssl:
                example_loss.copy_(example_losses(net, data, images, targets, args))
        progress(step + 1, loss=loss)
        checkpoint.tick(step + 1, last=step + 1 == args.epochs * per_epoch)
    return trajectory, example_loss, losses.mean().item()


@torch.no_grad()
def example_losses(net, data, images, targets, args):
    """The loss of each image, (N,), without dropout; in batches, for outputs (N, D) may not fit in memory."""
    net.eval()
    losses = []
    for i in range(0, len(images), 500):
        x, z = (common.fetch(tensor, slice(i, i + 500), args.device) for tensor in (images, targets))
        of_outputs = common.LOSSES[args.objective](net(common.normalise(x, data)), z, reduction="none")
        losses.append(of_outputs.view(len(x), -1).mean(1))
    net.train()
    return torch.cat(losses)


def main(args):
    common.set_up(args)
    train, targets, made = common.load_targets(args, args.objective)
    n, channels, size = train.images.shape[:3]
    if args.objective in common.SSL and not 2 <= args.batch_size <= n:  # which contrasts whole batches
        raise Problem(f"--batch_size {args.batch_size}: choose from 2 to {n}, the number of images")
    options = common.recipe(args)
    now = {**options, "images_id": made["images_id"], "targets_id": made["targets_id"]}
    images, targets = common.place(train.images, args.device), common.place(targets, args.device)

    def make_net(k):
        torch.manual_seed(common.seed_of(args.seed, "expert", 0 if args.same_init else k, "weights"))
        out_dim = args.out_dim or targets.shape[1]
        return common.make_student(out_dim, size, channels, args.width, args.depth).to(args.device)

    net = forward = make_net(0)
    common.flatten(net)  # refuses a student that is more than its parameters
    if args.compile:  # once, for all experts
        layout = common.layout(args.width)
        net = net.to(memory_format=layout)
        forward = common.compiled(lambda x: net(x.contiguous(memory_format=layout)))
    part = f"_{args.first_expert}" if args.first_expert else ""  # a log for each part of K
    log = common.Log(args.out_dir / f"train_experts{part}.jsonl", args)
    experts = range(args.first_expert, args.first_expert + args.num_experts)
    paths = {k: args.out_dir / "experts" / f"{k:04d}.pt" for k in experts}
    keys = {"trajectory": 2, "example_loss": 1}
    for path in sorted(paths[experts[0]].parent.glob("[0-9]" * 4 + ".pt"))[:1]:  # distill.py wants all alike
        common.is_done(path, {"train_experts": now}, keys)
    missing = [k for k in experts if not common.is_done(paths[k], {"train_experts": now}, keys)]
    common.wait_for_all()  # or one would find the first file of another
    if missing:
        log.begin()

    for k in missing[common.rank() :: common.world_size()]:
        if common.is_done(paths[k], {"train_experts": now}, keys):
            continue  # by another part of K that overlaps
        net.load_state_dict(make_net(k).state_dict())
        trajectory, example_loss, loss = train_expert(
            net, forward, train, images, targets, args, k,
            lambda k=k, **parts: common.Checkpoint(paths[k].with_suffix(".checkpoint"), args, now, **parts),
        )
        common.append(log.path, {"expert": k, "loss": loss})
        common.save(paths[k], {"trajectory": trajectory, "example_loss": example_loss, **made,
                               "options": {**made["options"], "train_experts": options}})
        paths[k].with_suffix(".checkpoint").unlink(missing_ok=True)
    common.wait_for_all()
    if common.rank() == 0:  # what a kill between the two lines above has left
        for path in paths.values():
            path.with_suffix(".checkpoint").unlink(missing_ok=True)
    print(f"{args.out_dir / 'experts'}: experts {experts[0]} to {experts[-1]}, {args.epochs} epochs each")


if __name__ == "__main__":
    common.run(main, parse_args)
