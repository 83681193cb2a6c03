"""Stage 1: train the teacher with SSL and write its representations of the training images, the targets.

A ResNet-18 learns from two random views of each image (Barlow Twins, paper eq. 1 and 6, or SimCLR). Labels,
where there are any, are only used at the end, by the linear probe that says how good its features are.

Reads:  the data set.
Writes: OUT/teacher.pt   {encoder: state dict}
        OUT/targets.pt   {targets (N, D) float32, in the order of the data set; images_id}
                         with --target_dim also {mean (D',), components (D, D'), scale}, so that other images
                         can be given targets: scale (f_T(x) - mean) components^T
        OUT/train_teacher.jsonl, and while it runs OUT/train_teacher.checkpoint: the same command goes on

The targets are the features f_T(x) before the projector, in eval mode, of images without augmentation. With
--encoder they are those of a network that was trained elsewhere; then there is no teacher.pt.

    python train_teacher.py                                      # CIFAR-10, the paper's setting
    python train_teacher.py --encoder torchvision:resnet50       # of a network trained on ImageNet
    python train_teacher.py --target_dim 256     # 256 principal components instead (not the paper)
"""

import math
import re
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import Problem, natural, number, positive

# Barlow Twins: paper, appendix A.1, epochs and warm-up from the recipe that it names (mix-bt, without its
# mixed samples). SimCLR: appendix A.1.
RECIPES = {
    "barlow_twins": dict(epochs=1000, batch_size=256, lr=1e-2),
    "simclr": dict(epochs=400, batch_size=512, lr=1e-3),
}


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    ssl = parser.add_argument_group("self-supervised learning (L_SSL, eq. 6)")
    ssl.add_argument("--ssl", choices=RECIPES, default="barlow_twins", help="loss")
    ssl.add_argument("--epochs", type=natural, help="default: 1000, simclr 400")
    ssl.add_argument("--batch_size", type=common.at_least(2), help="default: 256, simclr 512")
    ssl.add_argument("--lr", type=number, help="of Adam, cosine decay (default: 0.01, simclr 0.001)")
    ssl.add_argument("--warmup_epochs", type=natural, default=10, help="the lr grows; a tenth of all at most")
    ssl.add_argument("--weight_decay", type=number, default=1e-6, help="of Adam")
    ssl.add_argument("--bt_lambda", type=number, default=8 / 1024, help="lambda (tinyimagenet: 1/1024)")
    ssl.add_argument("--projection_dim", type=positive, default=1024, help="d, the projector's output")
    ssl.add_argument("--view_size", type=common.at_least(1, int, 4096), help="pixels (default: the images')")
    ssl.add_argument("--min_crop", type=common.at_least(0, float, 1), default=0.08, help="smallest crop area")
    net = parser.add_argument_group("teacher f_T and its targets")
    net.add_argument("--width", type=positive, default=64, help="of ResNet-18's first stage; D = 8 width")
    kinds = "torchvision:NAME, hub:OWNER/REPO[:BRANCH]:NAME or hub:DIR:NAME"
    net.add_argument("--encoder", help=f"{kinds}: a network that was trained elsewhere")
    components = "D: the mean is taken out, so many principal components are left (the paper: 0, as they are)"
    net.add_argument("--target_dim", type=natural, default=0, help=components)
    parser.add_argument("--seed", type=natural, default=0, help="of everything that is drawn")
    parser.add_run_options()
    args = parser.parse_args(argv)
    if args.encoder is not None:
        vars(args).update({a.dest: a.default for a in ssl._group_actions})  # not of what would be trained
        args.epochs = 0
        if not re.fullmatch("torchvision:.+|hub:.+:.+", args.encoder):
            raise Problem(f"--encoder {args.encoder}: give {kinds}")
    vars(args).update({k: v for k, v in RECIPES[args.ssl].items() if getattr(args, k) is None})
    if args.epochs and args.batch_size % common.world_size():
        raise Problem(f"--batch_size {args.batch_size}: choose a multiple of {common.world_size()} processes")
    return args


# ---- One batch over several processes ----------------------------------------------------------------------


def gather(x):
    """The rows of all processes, x (B / G, ...) each: (B, ...). Each process then has the whole loss."""
    if common.world_size() == 1:
        return x
    from torch.distributed.nn.functional import all_gather  # differentiable

    rows = torch.cat(all_gather(x))
    if rows.requires_grad:
        rows.register_hook(torch.Tensor.contiguous)  # the processes exchange memory as it lies
    return rows


def own_rows(x):
    """This process's part of the rows of all."""
    share = len(x) // common.world_size()
    return x.narrow(0, common.rank() * share, share)


class SyncBatchNorm(nn.SyncBatchNorm):
    """BatchNorm with the statistics of the batch over all processes, on CPUs too, where torch has none."""

    def forward(self, x):
        if x.is_cuda or not self.training or common.world_size() == 1:
            return super().forward(x)  # which in one process is BatchNorm
        x = F.batch_norm(gather(x), self.running_mean, self.running_var, self.weight, self.bias, True,
                         self.momentum, self.eps)
        return own_rows(x)


# ---- Networks, loss, targets -------------------------------------------------------------------------------


def make_projector(ssl, in_dim, projection_dim, norm_layer=SyncBatchNorm):
    """SSL's head, in_dim -> 512 -> projection_dim (Barlow Twins), or in_dim -> in_dim -> 128 (SimCLR)."""
    if ssl == "barlow_twins":
        layers = [nn.Linear(in_dim, 512, bias=False), norm_layer(512), nn.ReLU(),
                  nn.Linear(512, projection_dim)]
    else:
        layers = [nn.Linear(in_dim, in_dim, bias=False), norm_layer(in_dim), nn.ReLU(),
                  nn.Linear(in_dim, 128, bias=False), norm_layer(128, affine=False)]
    return nn.Sequential(*layers)


def load_pretrained(name, device):
    """--encoder: a network that was trained elsewhere, as f: images (B, C, H, W) uint8 -> features (B, D).

    The last layer of its classifier is taken off, where it has one. torchvision's models bring their own
    preprocessing; those of torch.hub may have a method preprocess(x), or get the usual one of ImageNet, at
    224 px. Raises Problem if network or weights cannot be had, or do not take images.
    """
    from torchvision import models

    source, _, rest = name.partition(":")
    repo, _, model = rest.rpartition(":")
    url = f"https://github.com/{repo.partition(':')[0]}"
    advice = f"see {repo}/hubconf.py; {url} can be unpacked into a folder, hub:DIR:{model}"

    def refusal(error):
        reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        return Problem(f"--encoder {name}: does not work ({reason}); {advice}")

    try:
        preprocess = models.get_model_weights("resnet18").DEFAULT.transforms()
        if source == "hub":
            if not (there := Path(repo).is_dir()) and Path(repo).parent.is_dir():
                raise FileNotFoundError(f"there is no folder {repo}")
            kind, ours = "local" if there else "github", sys.modules.pop("common")
            try:  # the repository may have a module common of its own
                net = torch.hub.load(repo, model, source=kind, trust_repo=True, verbose=False)
            finally:
                sys.modules["common"] = ours
            preprocess = getattr(net, "preprocess", preprocess)
        else:
            advice = "choose a classifier of torchvision.models.list_models()"
            weights = models.get_model_weights(rest).DEFAULT
            advice = f"{weights.url} belongs into {torch.hub.get_dir()}/checkpoints"
            net, preprocess = models.get_model(rest, weights=weights), weights.transforms()
        last = [name for name, module in net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
                and name.partition(".")[0] in ("fc", "classifier", "head", "heads")]
        if last:
            net.set_submodule(last[-1], nn.Identity())
        net = net.to(device).eval()
    except (Exception, SystemExit) as error:  # whatever the code of a repository raises
        raise refusal(error) from None

    def f(x):
        try:
            return net(preprocess(x.expand(-1, 3, -1, -1))).flatten(1)  # grey images as red, green and blue
        except (Exception, SystemExit) as error:
            raise refusal(error) from None

    return f


def cosine_lr(step, steps, warmup):
    """Share of the lr at a step: linear growth for `warmup` steps, then a half cosine to a thousandth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def ssl_loss(forward, x, draws, data, view, args):
    """L_SSL of two random views of a batch (eq. 6): of x (B / G, C, H, W) uint8, this process's part of it.

    forward is encoder and projector; view holds random_view's options.
    """
    views = [common.random_view(x, draws, **view) for _ in range(2)]
    z1, z2 = (gather(forward(common.normalise(v, data))) for v in views)  # (B, d) each
    if args.ssl == "barlow_twins":
        return common.barlow_twins_loss(z1, z2, args.bt_lambda)
    return common.simclr_loss(z1, z2, temperature=0.5)


def principal_components(features, dim):
    """(mean (D',), components (D, D'), scale) of features (N, D'): the D = dim leading ones, D' at most.

    scale (features - mean) components^T has a mean square of 1. By the covariance, summed up in batches: the
    features may lie on disk.
    """
    total = sum(part.double().sum(0) for part in features.split(10_000))
    mean = total / len(features)
    covariance = sum((x := part.double() - mean).T @ x for part in features.split(10_000)) / len(features)
    variances, vectors = torch.linalg.eigh(covariance)  # in ascending order
    variances, components = variances.flip(0)[:dim], vectors.T.flip(0)[:dim]
    if not variances.sum() > 0:
        raise Problem("the representations of all images are the same; choose another teacher")
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    components = components * largest.sign()  # eigenvectors have no sign of their own
    return mean.float(), components.float(), (len(components) / variances.sum()).sqrt().item()


def train(encoder, data, args, now, log, path):
    """Train the encoder in place on data, an ImageSet (eq. 6); path: of its checkpoint.

    Several processes each take a part of every batch, and the step that one would take with the whole.
    """
    n, size = len(data.images), args.batch_size
    first = common.rank() * size // common.world_size()  # of this process's rows
    view = dict(min_crop=args.min_crop, flip=data.flip, part_of=(size, first), size=args.view_size)
    projector = make_projector(args.ssl, 8 * args.width, args.projection_dim)
    net = nn.Sequential(encoder, projector).to(args.device).train()
    forward = common.in_precision(net, args.precision)
    optimizer = torch.optim.Adam(net.parameters(), weight_decay=args.weight_decay)
    images = common.place(data.images, args.device)
    per_epoch = n // size  # the rest is left out: BatchNorm and both losses want full batches
    steps, warmup = args.epochs * per_epoch, min(args.warmup_epochs, args.epochs // 10) * per_epoch
    losses = torch.zeros(per_epoch, device=args.device)
    checkpoint = common.Checkpoint(path, args, now, log, net=net, optimizer=optimizer, losses=losses)
    batches = common.shuffled(n, size, args.seed, "order", start=checkpoint.step, smallest=size)
    progress = common.Progress("teacher: step", steps, checkpoint.step)

    for step in range(checkpoint.step, steps):
        x = common.fetch(images, own_rows(next(batches)), args.device)
        draws = common.generator(args.device, args.seed, "views", step)
        optimizer.param_groups[0]["lr"] = args.lr * cosine_lr(step, steps, warmup)
        loss = ssl_loss(forward, x, draws, data, view, args)
        optimizer.zero_grad()
        (loss / common.world_size()).backward()  # for each process has the loss of all
        common.add_up(*(p.grad for p in net.parameters()))
        optimizer.step()

        losses[step % per_epoch] = loss.detach()
        if (step + 1) % per_epoch == 0:
            lr = optimizer.param_groups[0]["lr"]
            log.write(epoch=(step + 1) // per_epoch, loss=losses.mean().item(), lr=lr)
        progress(step + 1, epoch=step // per_epoch + 1, loss=loss)
        checkpoint.tick(step + 1, last=step + 1 == steps)


def make_teacher(data, args, made, log, checkpoint):
    """The encoder f_T in eval mode, of OUT/teacher.pt, which is made if it is not there."""
    path = args.out_dir / "teacher.pt"
    now = {**made["options"]["train_teacher"], "images_id": made["images_id"]}
    del now["target_dim"]  # the teacher is the same
    there = common.is_done(path, {"train_teacher": now}, {"encoder": None})
    there = None if checkpoint.exists() else there  # the log is cut back to it, too
    torch.manual_seed(common.seed_of(args.seed, "teacher"))
    encoder = common.ResNet(channels=data.images.shape[1], width=args.width, norm_layer=SyncBatchNorm)
    if there:
        try:
            encoder.load_state_dict({k: v for k, v in there["encoder"].items() if not k.startswith("fc.")})
        except (RuntimeError, AttributeError, TypeError, ValueError):
            raise Problem(f"{path}: is of no ResNet-18 with a 3x3 stem, --width {args.width} and the images' "
                          "colour channels; give its --width, or move it away") from None
        if not all(v.isfinite().all() for v in encoder.state_dict().values()):
            raise Problem(f"{path}: its numbers are not all finite; move it away")
    encoder = encoder.to(args.device, memory_format=common.layout(args.width))
    if there:
        log.begin()
    else:
        train(encoder, data, args, now, log, checkpoint)
        if common.rank() == 0:
            weights = {name: value.cpu().contiguous() for name, value in encoder.state_dict().items()}
            common.save(path, {"encoder": weights, **made})
    return encoder.eval()


@torch.no_grad()
def represent(f, images, batch, args):
    """The features f(x) of all images, (N, D') float32, on the host."""
    features, progress = None, common.Progress("encoded image", len(images))
    for i in range(0, len(images), batch):
        x = common.fetch(images, slice(i, i + batch), args.device)
        part = f(x).float().cpu()
        features = torch.empty(len(images), *part.shape[1:]) if features is None else features
        if part.shape != (len(x), *features.shape[1:]) or part.ndim != 2 or part.shape[1] == 0:
            raise Problem(f"--encoder {args.encoder}: gives {tuple(part.shape)} for {len(x)} images, not "
                          "(B, D); choose another")
        features[i : i + batch] = part
        progress(min(i + batch, len(images)))
    return features


def make_targets(features, dim):
    """The contents of targets.pt: features (N, D') as they are, or their dim principal components."""
    if not all(part.isfinite().all() for part in features.split(10_000)):
        raise Problem("the representations are not finite: choose a smaller --lr, or another teacher")
    if not dim:
        return {"targets": features}
    mean, components, scale = principal_components(features, dim)
    targets = torch.cat([scale * (part - mean) @ components.T for part in features.split(10_000)])
    return {"targets": targets, "mean": mean, "components": components, "scale": scale}


def main(args):
    common.set_up(args)
    options, targets_path = common.recipe(args), args.out_dir / "targets.pt"
    log = common.Log(args.out_dir / "train_teacher.jsonl", args)
    there = common.is_done(targets_path, {"train_teacher": options}, {"targets": 2})
    checkpoint = args.out_dir / "train_teacher.checkpoint"  # of a run killed before the probe
    if there and (args.encoder or not checkpoint.exists() or "options" not in there):
        print(f"{targets_path} is there: nothing to do")
        return
    source = args.dataset, "train", args.data_dir, args.image_size, args.limit
    data = common.load_images(*source, args.device)
    key, folder = common.parse_dataset(args.dataset, args.data_dir)
    judged = data.labels is not None and data.labels.max() > 0  # there are two classes to tell apart
    judged = judged and (key != "imagefolder" or any((folder / part).is_dir() for part in ("test", "val")))
    test = common.load_images(args.dataset, "test", *source[2:]) if judged else None  # faults show now
    if args.epochs and args.batch_size > len(data.images):
        raise Problem(f"--batch_size {args.batch_size}: there are {len(data.images)} images; choose less")
    made = {"options": {"train_teacher": options}, "images_id": common.fingerprint(data.images)}
    if not args.encoder:
        encoder = make_teacher(data, args, made, log, checkpoint)
        f, batch = lambda x: encoder(common.normalise(x, data)), 500
    if common.rank() > 0:  # what follows is one's work
        return common.wait_for_all()  # for NCCL ends with all
    if args.encoder:
        f, batch = load_pretrained(args.encoder, args.device), 64
        log.begin()

    features = represent(f, data.images, batch, args)
    contents = make_targets(features, args.target_dim)
    common.save(targets_path, {**contents, **made})
    try:  # which only informs
        if test:
            some = slice(0, None, math.ceil(len(features) / 50_000))  # more would not fit in memory
            parts = features[some], data.labels[some], represent(f, test.images, batch, args), test.labels
            accuracy = common.probe_accuracy(*(part.to(args.device) for part in parts))
            log.write(probe_accuracy=accuracy)
            print(f"linear probe of the teacher, {len(parts[1])} labels: {accuracy:.2f} % test accuracy")
    except Problem as problem:
        print(f"the teacher's features are not probed: {problem}")
    if not args.encoder:
        checkpoint.unlink(missing_ok=True)
    print(f"wrote {targets_path}: targets of {tuple(contents['targets'].shape)}")
    common.wait_for_all()


if __name__ == "__main__":
    common.run(main, parse_args)
