"""Stage 3: distil a small synthetic set by matching the experts' trajectories (MKDT), or make a baseline's.

In every iteration, a student starts from an expert's weights at epoch t, takes N SGD steps on the synthetic
set, and should arrive where the expert was after M more epochs on the real data. The gradient of the distance
(paper, eq. 4) moves the synthetic images and their learning rate.

Experts of another objective (train_experts.py --objective) are matched by students with the same, which their
files name: MTT on labels, or naively on SSL (section 4.1).

Baselines: a plain subset (random, high-loss or SAS: --iters 0), and KRR-ST (--method krr_st), which learns
images and targets by kernel ridge regression on the features of students that train on them.

Reads:  OUT/targets.pt, OUT/experts/*.pt (MKDT, high-loss subset) and the data set.
Writes: OUT/sets/NAME.pt    {images (S, C, H, W) float32, normalised by mean (C,) and std (C,); targets (S, D)
                             float32; lr: a float; indices (S,) int64 of the real images at the start}
                             With --stored_size images are smaller: image_size is what they are enlarged to
        OUT/sets/NAME.png   some of the images, start above result
        OUT/sets/NAME.checkpoint, until then: started again, the same command goes on from there

    python distill.py                             # 2 % of CIFAR-10, from the high-loss subset: mkdt_high_loss
    python distill.py --init random --iters 0     # the random subset itself, a baseline: subset_random
    python distill.py --init random --iters 0 --lr_from mkdt_high_loss    # with the lr that MKDT learnt
    python distill.py --method krr_st             # the baseline KRR-ST: krr_st_random
    python distill.py --seed 1                    # a second set of the method: mkdt_high_loss_seed1
    python distill.py --recipe best               # our recipe instead of the paper's: best_random
    torchrun --nproc_per_node 4 distill.py        # four experts an iteration, on a GPU each: see --segments
"""

import argparse
import collections
import functools
import itertools
import math
import re
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from sklearn.cluster import KMeans

import common
from common import natural, number, positive

RECIPES = {  # defaults that depend on the method
    "mkdt": dict(init="high_loss", iters=5000, lr_img=1e3, decay=1.0),
    "krr_st": dict(init="random", iters=160_000, lr_img=1e-4, decay=1e-3),
}
BEST = dict(  # --recipe best: not the paper's; how it was chosen: see the README
    init="random", inner_momentum=0.9, log_lr=True, lr_init=1.0, lr_lr=0.05, lr_img=1e4, clip_grad=0.003,
    decay=0.1,
)  # fmt: skip
INITS = ["high_loss", "random", "sas"]
OF_LEARNING = (  # options that a plain subset does not depend on
    "lr_img syn_steps expert_epochs max_start_epoch batch_syn inner_momentum lr_lr lr_targets momentum "
    "clip_grad log_lr distance decay pool_size pool_steps batch_real ridge precision".split()
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.HelpFormatter)
    parser.error = common.fail
    data = parser.add_argument_group("data and files")
    data.add_argument("--dataset", default="cifar10", help="D_real: " + common.DATASET_HELP)
    data.add_argument("--data_dir", default="data", help="of downloads; DIR of a plain --dataset imagefolder")
    data.add_argument("--image_size", type=positive, help="pixels (default: the data set's, imagefolder 32)")
    data.add_argument("--limit", type=positive, help="use only so many images of each split, evenly spaced")
    data.add_argument("--out_dir", type=Path, help="folder of this run (default: runs/DATASET)")
    data.add_argument("--name", help="of the set (default: METHOD_INIT or subset_INIT, and _seedN if not 0)")
    net = parser.add_argument_group("student f_S, as in train_experts.py")
    net.add_argument("--width", type=positive, default=128, help="channels of the ConvNet")
    net.add_argument("--depth", type=positive, help="blocks (default: 2 at 16 px, 3 at 32 px, 4 at 64 px)")
    syn = parser.add_argument_group("synthetic set D_syn, Z_syn")
    syn.add_argument("--method", choices=RECIPES, default="mkdt", help="how it is learnt")
    recipe = "best: ours, for targets of train_teacher.py --centre; the set is then best_INIT"
    syn.add_argument("--recipe", choices=["paper", "best"], default="paper", help=recipe)
    syn.add_argument("--fraction", type=number, default=0.02, help="|D_syn| / |D_real|")
    stored = "keep images of so many pixels, which students see enlarged, and more of them: the same bytes"
    syn.add_argument("--stored_size", type=positive, metavar="PX", help=stored)
    inits = "start of D_syn (default: high_loss, krr_st random)"
    syn.add_argument("--init", choices=INITS, help=inits)
    syn.add_argument("--num_latent_classes", type=positive, help="SAS: of k-means (default: the data set's)")
    syn.add_argument("--latent_classes", metavar="FILE", help="SAS: .pt with {latent_classes (N,) int64}")
    syn.add_argument("--iters", type=natural, help="S (default: 5000, krr_st 160000); 0: the plain subset")
    lrs = "of the pixels (default: 1e3; 5 %%: 1e4; tiny: 1e5; krr_st, with the targets: 1e-4, tiny: 1e-5)"
    syn.add_argument("--lr_img", type=number, help=lrs)
    decay = "of all rates, linear, to this share in the end (default: 1, none; krr_st 1e-3)"
    syn.add_argument("--decay", type=common.at_least(0, float, 1), help=decay)
    syn.add_argument(
        "--lr_init",
        type=common.at_least(1e-12, float, 1e12),
        default=0.1,
        help="start of alpha_syn; lr of a plain subset",
    )
    syn.add_argument("--lr_from", metavar="NAME", help="take it from OUT/sets/NAME.pt instead")
    match = parser.add_argument_group("trajectory matching (eq. 4 and 8)")
    match.add_argument("--syn_steps", type=positive, default=40, help="N, steps on D_syn (tinyimagenet: 10)")
    segments = "experts an iteration, whose gradients are averaged (default: 1, torchrun: one a process)"
    match.add_argument("--segments", type=positive, help=segments)
    match.add_argument("--max_experts", type=positive, help="match the first so many alone (default: all)")
    match.add_argument("--expert_epochs", type=positive, default=2, help="M, epochs of the expert to match")
    match.add_argument("--max_start_epoch", type=positive, default=2, help="T+ > t (5 %% of cifar: 5)")
    match.add_argument("--batch_syn", type=positive, default=256, help="synthetic images a step")
    parts = "go through these in parts of so many: less memory, the same gradient (default: all at once)"
    match.add_argument("--micro_batch", type=positive, help=parts)
    match.add_argument("--inner_momentum", type=number, default=0.0, help="of the N steps (the paper: none)")
    match.add_argument("--lr_lr", type=number, default=1e-4, help="lr of alpha_syn")
    logarithm = "learn log alpha_syn, which --lr_lr is then the lr of (the paper: alpha_syn itself)"
    match.add_argument("--log_lr", action="store_true", help=logarithm)
    distances = "each parameter tensor counts alike, or all their elements (the paper)"
    match.add_argument("--distance", choices=["elements", "tensors"], default="elements", help=distances)
    match.add_argument("--lr_targets", type=number, default=0.0, help="lr of Z_syn (authors' code: 1)")
    match.add_argument("--momentum", type=number, default=0.5, help="of the SGD on pixels, lr, Z_syn")
    clip = "largest norm of the pixels' gradient: if more, all gradients shrink in proportion (paper: any)"
    match.add_argument("--clip_grad", type=number, help=clip)
    krr = parser.add_argument_group("KRR-ST (Lee et al., ICLR 2024)")
    krr.add_argument("--pool_size", type=positive, default=10, help="students in the pool")
    krr.add_argument("--pool_steps", type=positive, default=1000, help="steps on D_syn until one starts anew")
    krr.add_argument("--batch_real", type=positive, default=1024, help="real images an iteration")
    krr.add_argument("--ridge", type=number, default=1e-6, help="lambda, as a share of the kernel's trace")
    parser.add_argument("--seed", type=natural, default=0, help="of everything that is drawn")
    precision = "tf32: products on a GPU are rounded to 10 bits; in bf16 the gradient would be 8 %% off"
    common.add_run_options(parser, ("fp32", "tf32"), precision)
    fused = "fuse a student's step by torch.compile (not with SSL): faster, after a minute or two"
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help=fused)
    args = parser.parse_args(argv)
    best = args.recipe == "best"
    if best:
        if args.method != "mkdt":
            common.fail("--recipe best: is for --method mkdt; leave one of them out")
        parser.set_defaults(**BEST)
        args = parser.parse_args(argv)
    for option in ("name", "lr_from"):
        name = getattr(args, option)
        if name is None:
            continue
        if re.fullmatch(r"(none|full)?(_seed\d+)?", name) or not re.fullmatch(r"\w[\w.+-]*", name):
            common.fail(f"--{option} {name!r}: choose letters, digits, and . + - _ within; not none or full")
    for option, default in (("stored_size", None), ("log_lr", False), ("distance", "elements")):
        if args.method != "mkdt" and getattr(args, option) != default:
            common.fail(f"--{option}: --method {args.method} has none; leave it out")
    for name, value in RECIPES[args.method].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out_dir = args.out_dir or Path("runs") / common.run_name(args.dataset)
    args.segments = args.segments or common.world_size()
    if args.segments % common.world_size():
        common.fail(f"--segments {args.segments}: choose a multiple of the {common.world_size()} processes")
    if not args.name:
        args.name = f"{('best' if best else args.method) if args.iters else 'subset'}_{args.init}"
        args.name += f"_lr_from_{args.lr_from}" if args.lr_from else ""
        seed = f"_seed{args.seed}" if args.seed else ""
        args.name = args.name.removesuffix(seed) + seed
    return args


# ------------------------------------------------------------------------------------------------------------
# The inner loop, differentiated in constant memory
# ------------------------------------------------------------------------------------------------------------


def step_functions(loss_fn, compile=False):
    """What a student's step is made of: (gradient, reverse), two functions of (theta, x, z, n).

    gradient(theta, x, z, n) is g = dL/dtheta of loss_fn(theta, x, z, n); reverse(theta, x, z, n, r) is (s,
    ds/dtheta, ds/dx, ds/dz) of s = <g, r>. compile: the same through torch.func and torch.compile, for a loss
    that does not depend on n. Eagerly, s is differentiated backwards a second time. Compiled, the loss and
    its gradients are differentiated forwards, along r, which gives the same, for second derivatives commute:
    that needs no graph of g, nor g itself, and fuses better.
    """

    def gradient(theta, x, z, n):
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            return torch.autograd.grad(loss_fn(theta, x, z, n), theta)[0]

    def reverse(theta, x, z, n, r):
        with torch.enable_grad():
            theta, x, z = (leaf.detach().requires_grad_() for leaf in (theta, x, z))
            (g,) = torch.autograd.grad(loss_fn(theta, x, z, n), theta, create_graph=True)
            s = torch.dot(g, r)
            return s.detach(), *torch.autograd.grad(s, (theta, x, z), materialize_grads=True)

    if not compile:
        return gradient, reverse

    def along(theta, x, z, r):
        function = torch.func.grad_and_value(loss_fn, argnums=(0, 1, 2))
        _, (derivatives, s) = torch.func.jvp(lambda theta: function(theta, x, z, 0), (theta,), (r,))
        return s, *derivatives

    fast_gradient = common.compiled(lambda theta, x, z: torch.func.grad(loss_fn)(theta, x, z, 0))
    fast_along = common.compiled(along)
    # A new number n in every step would be compiled anew.
    return (lambda theta, x, z, n: fast_gradient(theta, x, z)), (lambda *args: fast_along(*args[:3], args[4]))


class _StudentSteps(torch.autograd.Function):
    """N SGD steps forward; backward, the adjoint of one step after another, from its theta_n alone."""

    @staticmethod
    def forward(ctx, theta, images, targets, lr, gradient, reverse, batches, momentum, micro_batch):
        images, targets, thetas, velocity = images.detach(), targets.detach(), [], torch.zeros_like(theta)
        for n, batch in enumerate(batches):
            thetas.append(theta.detach())
            velocity = momentum * velocity
            for part in batch.split(micro_batch):  # the gradient is the mean of those of parts of the batch
                share = len(part) / len(batch)
                velocity = velocity + share * gradient(thetas[n], images[part], targets[part], n)
            theta = theta - lr * velocity
        ctx.save_for_backward(images, targets, lr, *thetas)
        ctx.reverse, ctx.batches, ctx.momentum, ctx.micro_batch = reverse, batches, momentum, micro_batch
        return theta if batches else theta.clone()  # autograd wants no input returned as it is

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, lam):
        images, targets, lr, *thetas = ctx.saved_tensors
        d_images, d_targets, d_lr = torch.zeros_like(images), torch.zeros_like(targets), torch.zeros_like(lr)
        r = torch.zeros_like(lam)
        for n in reversed(range(len(thetas))):
            batch = ctx.batches[n]
            r = lam + ctx.momentum * r  # dL/dg_n = - lr r: g_n goes into every later velocity
            for part in batch.split(ctx.micro_batch):
                share = len(part) / len(batch)
                s, ds_dtheta, ds_dx, ds_dz = ctx.reverse(thetas[n], images[part], targets[part], n, r)
                d_images.index_add_(0, part, -lr * share * ds_dx)
                d_targets.index_add_(0, part, -lr * share * ds_dz)
                d_lr -= share * s
                lam = lam - lr * share * ds_dtheta
        return lam, d_images, d_targets, d_lr, None, None, None, None, None


def student_steps(
    loss_fn, theta, images, targets, lr, batches, momentum=0.0, functions=None, micro_batch=None
):
    """Train a student on the synthetic set (eq. 8): theta_{n+1} = theta_n - lr v_{n+1}.

    v_{n+1} = momentum v_n + g_n with v_0 = 0, and g_n is the gradient in theta_n of
    loss_fn(theta_n, images[batches[n]], targets[batches[n]], n). The result is exactly differentiable in
    theta, images, targets and lr. Autograd through the loop would hold the activations of all N steps; here
    the forward pass keeps theta_n only, and the backward pass walks back. With lam_N = dL/dtheta_N, r_N = 0
    and, for n = N-1 ... 0,

        r_n = lam_{n+1} + momentum r_{n+1},   s_n = <g_n, r_n>,   lam_n = lam_{n+1} - lr ds_n/dtheta_n

    (r_n held fixed in s_n) it sums dL/dimages -= lr ds_n/dimages, dL/dtargets -= lr ds_n/dtargets, dL/dlr -=
    s_n, and ends in dL/dtheta = lam_0. The memory is that of one step and N + 1 vectors theta_n.

    Args:
        loss_fn: (theta (P,), images (B, C, H, W), targets (B, D), n) -> scalar; a function of these alone,
            for it is called again on the way back: what is random in it must follow from the step's n.
        theta: (P,); images: (S, C, H, W); targets: (S, D); lr: a scalar.
        batches: N index tensors into images and targets.
        functions: step_functions of the loss_fn, if they are compiled.
        micro_batch: go through a batch in parts of so many images, which bounds the memory of a step; for a
            loss_fn that is a mean over the images.

    Returns theta_N (P,).
    """
    lr = torch.as_tensor(lr, dtype=theta.dtype, device=theta.device)
    batches = [batch.to(images.device) for batch in batches]
    gradient, reverse = functions or step_functions(loss_fn)
    micro_batch = micro_batch or len(images)
    return _StudentSteps.apply(theta, images, targets, lr, gradient, reverse, batches, momentum, micro_batch)


def matching_loss(theta, start, target, sizes=None):
    """||theta - target||^2 / ||start - target||^2 (eq. 4): 1 if the student stood still, 0 if it arrived.

    sizes: numbers of elements of theta's parameter tensors, to weigh each tensor l by 1 / (its own squared
    distance from start to target + a thousandth of all of theta's) in both (differs). Most of the distance is
    the head's, which the probe drops; weighed so, each convolution counts as much. The thousandth is for
    tensors that should hardly move, such as biases before a norm.
    """
    off, way = (theta - target).square(), (start - target).square()
    if sizes:
        off, way = (torch.stack([part.sum() for part in x.split(sizes)]) for x in (off, way))
        weights = 1 / (way + way.sum() / 1000)
        off, way = weights * off, weights * way
    return off.sum() / way.sum()


def draw_batches(size, batch_size, steps, generator, smallest=1):
    """`steps` index tensors (B,): passes over range(size) in ever new orders; a pass's last may be small.

    One of less than `smallest` images, which size and batch_size may not be, is left out.
    """
    batches = []
    while len(batches) < steps:
        order = torch.randperm(size, generator=generator)
        batches += [batch for batch in order.split(batch_size) if len(batch) >= smallest]
    return batches[:steps]


def alpha_syn(args, lr):
    """The synthetic set's learning rate, from what is learnt of it: lr itself, or its logarithm."""
    return lr.exp() if args.log_lr else lr


def trajectory_losses(args, net, loss_fn, px, images, targets, lr, trajectories, generator):
    """MKDT: yields (matching loss, what was drawn, None) without end, differentiable in the synthetic set.

    net gives the shape of the students, which see images of px pixels; loss_fn is make_objective's, in the
    paper eq. 5; images (S, C, H, W), targets (S, D) and lr are the set as it is now; trajectories are
    load_experts'. Every process yields its own of an iteration's --segments.
    """
    draws = torch.Generator(args.device)
    ssl, functions = args.objective in common.SSL, None
    sizes = [p.numel() for p in net.parameters()] if args.distance == "tensors" else None

    if args.compile and not ssl:  # the views of SSL are new in every step

        def fused_loss(theta, x, z, n):
            return loss_fn(lambda x: common.forward_flat(net, theta, x, common.layout(args.width)), x, z)

        functions = step_functions(fused_loss, compile=True)

    def draw_segment():
        """An expert, its start epoch, the batches of N steps, and a seed for SSL's views."""
        k = torch.randint(len(trajectories), (), generator=generator).item()
        t = torch.randint(args.max_start_epoch, (), generator=generator).item()
        # One image has nothing to be contrasted with.
        batches = draw_batches(len(images), args.batch_syn, args.syn_steps, generator, 2 if ssl else 1)
        return k, t, batches, torch.randint(2**31, (), generator=generator).item() if ssl else 0

    # Every process draws all segments of an iteration, so that the generators stay alike, and takes its own.
    iterations = ([draw_segment() for _ in range(args.segments)] for _ in itertools.count())
    mine = (segments[common.rank() :: common.world_size()] for segments in iterations)
    for k, t, batches, seed in itertools.chain.from_iterable(mine):
        start = trajectories[k][t].to(args.device)
        goal = trajectories[k][t + args.expert_epochs].to(args.device)

        def step_loss(theta, x, z, n, seed=seed):
            draws.manual_seed(seed + n)  # on the way back, step n sees its views again
            return loss_fn(lambda x: common.forward_flat(net, theta, x), x, z, draws)

        seen = common.enlarge(images, px)
        theta = student_steps(
            step_loss, start, seen, targets, alpha_syn(args, lr), batches, args.inner_momentum, functions,
            args.micro_batch,
        )  # fmt: skip
        yield matching_loss(theta, start, goal, sizes), {"expert": k, "start_epoch": t}, None


# ------------------------------------------------------------------------------------------------------------
# KRR-ST: kernel ridge regression on self-supervised targets
# ------------------------------------------------------------------------------------------------------------


def kernel_ridge(features, targets, queries, ridge):
    """The targets that kernel ridge regression predicts for the queries: K_qs (K_ss + lambda I)^-1 Z_s.

    features (S, F), targets (S, D), queries (B, F) -> (B, D). The kernel is linear, with a constant feature
    for the bias; lambda = ridge tr(K_ss), held fixed in the gradient (Lee et al., ICLR 2024, and their code).
    """
    features, queries = F.pad(features, (0, 1), value=1.0), F.pad(queries, (0, 1), value=1.0)
    kernel = features @ features.T
    penalty = (
        ridge * kernel.trace().detach() * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    )
    return queries @ features.T @ torch.linalg.solve(kernel + penalty, targets)


class PoolStudent:
    """A student of KRR-ST's pool: trained on the synthetic set, full batch, a step each time it was used."""

    def __init__(self, make_net, seed):
        torch.manual_seed(seed)
        self.net, self.steps = make_net(), 0
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)

    def train(self, images, targets, steps=1):
        for _ in range(steps):
            loss = F.mse_loss(self.net(images.detach()), targets.detach())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.steps += steps

    def state_dict(self):
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), "steps": self.steps}

    def load_state_dict(self, state):
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]


def make_pool(args, make_net, generator):
    """The students of KRR-ST's pool, fresh ones."""
    return [new_student(make_net, generator) for _ in range(args.pool_size)]


def new_student(make_net, generator):
    return PoolStudent(make_net, torch.randint(2**31, (), generator=generator).item())


def train_pool(args, pool, images, targets, generator):
    """Bring each student of the pool to another point of its training."""
    progress = common.Progress("student of KRR-ST's pool", args.pool_size, 1, "students")
    for i, student in enumerate(pool, 1):
        student.train(images, targets, torch.randint(args.pool_steps, (), generator=generator).item())
        progress(i)


def regression_losses(args, make_net, pool, images, targets, train, all_targets, generator):
    """KRR-ST: yields (loss, what was drawn, then) without end, differentiable in the set.

    The loss is the error of kernel_ridge on a batch of real images, with the features of a student of the
    pool. then() is to be called when the set has been updated: the student takes a step on it, or after
    --pool_steps starts anew, as does its counter (differs: in the authors' code the counter stays, and the
    student is new each time from then on).
    make_net() is a fresh student, pool is make_pool's; train is the ImageSet with all_targets (N, D).
    """
    real = common.place([train.images, all_targets], args.device)
    exact = torch.float32 if args.device.startswith("mps") else torch.float64  # lambda is small

    def train_student(k):
        if pool[k].steps < args.pool_steps:
            pool[k].train(images, targets)
        else:
            pool[k] = new_student(make_net, generator)

    while True:
        k = torch.randint(len(pool), (), generator=generator).item()
        batch = torch.randperm(len(train.images), generator=generator)[: args.batch_real]
        ((x, z),) = common.fetch(real, [batch], args.device)
        with torch.no_grad():
            queries = pool[k].net.features(common.normalise(x, train.mean, train.std)).to(exact)
        features = pool[k].net.features(images).to(exact)
        try:
            predicted = kernel_ridge(features, targets.to(exact), queries, args.ridge)
        except torch.linalg.LinAlgError:
            common.fail(f"the kernel of student {k} is singular: choose a --ridge above {args.ridge:g}")
        drawn = {"student": k, "steps": pool[k].steps}
        yield F.mse_loss(predicted, z.to(exact)), drawn, functools.partial(train_student, k)


# ------------------------------------------------------------------------------------------------------------
# The start of the set, and its experts
# ------------------------------------------------------------------------------------------------------------


def high_loss_indices(example_losses, size):
    """The `size` images with the highest loss, (size,), hardest first; example_losses: K times (N,).

    The losses are averaged over the experts (section 4.2, "Initializing Synthetic Data"); no labels, no
    balancing.
    """
    return sum(example_losses).topk(size).indices


def greedy_gains(features, size):
    """The `size` first images of SAS in one latent class, (size,), by greedy maximisation; features (n, D).

    Joshi & Mirzasoleiman, ICML 2023: with A_ij the cosine similarity of images i and j, or 0 if that is
    negative, the gain of adding i to S is sum_j A_ij - sum_{j in S} A_ij: near to much, not to what is in S.
    One pick lowers all gains by one column of A, so the gains are kept up to date, and A is never stored.
    """
    x = F.normalize(features, dim=1)
    gains = torch.cat([(block @ x.T).clamp(min=0).sum(1) for block in x.split(1000)])  # (n,)
    chosen = []
    for _ in range(size):
        chosen.append(gains.argmax().item())
        gains -= (x @ x[chosen[-1]]).clamp(min=0)
        gains[chosen[-1]] = -torch.inf
    return torch.tensor(chosen, dtype=torch.int64)


def sas_indices(features, latent_classes, size):
    """The SAS subset of `size` images, (size,): each latent class in proportion to its number of images.

    features: (N, D) of the teacher; latent_classes: (N,) int64.
    """
    classes, counts = latent_classes.unique(return_counts=True)
    exact = counts * size / len(latent_classes)
    quota = exact.long()
    quota[(exact - quota).argsort(descending=True, stable=True)[: size - quota.sum()]] += (
        1  # largest remainders
    )
    members = [(latent_classes == c).nonzero().flatten() for c in classes]
    return torch.cat([m[greedy_gains(features[m], q)] for m, q in zip(members, quota.tolist())])


def find_latent_classes(args, features, labels):
    """SAS's latent classes, (N,) int64: those of the file given, or k-means on the teacher's features (N, D).

    Of the labels, only the number of classes is used, and only if --num_latent_classes is not given.
    """
    if args.latent_classes:
        made_by = "torch.save({'latent_classes': classes}, FILE)"
        classes = common.load(args.latent_classes, {"latent_classes": None}, made_by)["latent_classes"]
        if (
            not isinstance(classes, torch.Tensor)
            or classes.shape != labels.shape
            or classes.is_floating_point()
        ):
            common.fail(
                f"--latent_classes {args.latent_classes}: must hold {len(labels)} integers, one an image"
            )
        return classes.long()
    count = args.num_latent_classes or len(labels.unique())
    if count > len(labels):
        common.fail(f"--num_latent_classes {count}: there are {len(labels)} images; choose fewer")
    return torch.from_numpy(KMeans(count, n_init=1, random_state=args.seed).fit_predict(features)).long()


def expert_paths(folder):
    """The experts' files in a folder, in the order of their numbers."""
    return sorted(path for path in folder.glob("*.pt") if re.fullmatch(r"\d{4,}", path.stem))


def students_objective(args, folder):
    """(objective, out_dim) of the experts in a folder, which are those of the students; out_dim None: as D.

    By the first of them, or "kd" if there are none. Exits if the options do not go with it.
    """
    objective, out_dim = "kd", None
    for path in expert_paths(folder)[:1]:
        made = (
            common.load(path, {}, "train_experts.py", mmap=True).get("options", {}).get("train_experts", {})
        )
        objective, out_dim = made.get("objective", "kd"), made.get("out_dim")
        if objective not in common.OBJECTIVES:
            common.fail(f"{path}: has the objective {objective!r}; make it again with train_experts.py")
        if out_dim is not None and (type(out_dim) is not int or not 0 < out_dim < 2**20):
            common.fail(f"{path}: has the out_dim {out_dim!r}; make it again with train_experts.py")
    inits = INITS
    if objective in common.SSL or (objective == "supervised" and args.method == "krr_st"):
        inits = ["random"]  # SSL has no loss of single examples, and KRR-ST wants a teacher's targets
    elif objective == "supervised":
        inits = ["high_loss", "random"]  # SAS wants a teacher's features
    if args.init not in inits:
        common.fail(
            f"--init {args.init}: the experts in {folder} are {objective}; choose {' or '.join(inits)}"
        )
    if objective in common.SSL and args.micro_batch:
        common.fail(f"--micro_batch {args.micro_batch}: {objective} contrasts all of a batch; leave it out")
    if objective in common.SSL and args.batch_syn < 2:
        common.fail(f"--batch_syn {args.batch_syn}: {objective} contrasts images; choose 2 or more")
    return objective, out_dim


def load_experts(folder, num_images, num_parameters, made, count=None):
    """The experts of a run: (trajectories (E + 1, P), example losses (N,) of each, options so far).

    Both stay on disk until they are read. count: the first so many, None for all. Exits if a file does not
    belong to the others, to these targets (made is load_targets') or to this student.
    """
    paths = expert_paths(folder)
    if not paths:
        common.fail(f"{folder}: has no experts; make them with train_experts.py")
    if count and count > len(paths):
        common.fail(f"--max_experts {count}: {folder} has {len(paths)}; choose {len(paths)} or less")
    trajectories, losses, first = [], [], None
    for path in paths[:count]:
        expert = common.load(path, {"trajectory": 2, "example_loss": 1}, "train_experts.py", mmap=True)
        trajectory, loss = expert["trajectory"], expert["example_loss"]
        options = expert.get("options", {})
        first = first or (trajectory.shape, options)
        differ = common.differing(common.with_added(options), common.with_added(first[1]))
        if trajectory.shape[1] != num_parameters:
            common.fail(
                f"{path}: students have P = {trajectory.shape[1]} parameters, here P = {num_parameters}; "
                "give the --width, --depth and --image_size of train_experts.py, or make the experts again"
            )
        if loss.shape != (num_images,):
            common.fail(f"{path}: does not hold {num_images} example losses; make it again")
        common.check_origin(path, expert, made)
        if differ or trajectory.shape != first[0]:
            name, own, others = differ or ("epochs", len(trajectory) - 1, first[0][0] - 1)
            common.fail(
                f"{path}: was made with --{name} {own}, {paths[0]} with {others}; make them all again with "
                "the same, or move one kind away"
            )
        trajectories.append(trajectory)
        losses.append(loss)
    return trajectories, losses, {**made["options"], **first[1]}


def save_picture(path, start, result, stats, count=30, columns=10):
    """Write the first `count` images, rows of `columns`, each of the start (S, C, H, W) above its result."""
    starts = range(0, min(count, len(start)), columns)
    rows = [part[i : i + columns] for i in starts for part in (start, result)]
    images = common.denormalise(torch.cat([row.cpu() for row in rows]), *stats)
    images = F.interpolate(images, scale_factor=max(1, 48 // images.shape[-1]), mode="nearest")
    with common.replacing(path) as temporary:
        torchvision.utils.save_image(images, temporary, format="png", nrow=columns, padding=2, pad_value=1.0)


def main(args):
    common.set_up(args)
    folder, matching = args.out_dir / "experts", args.method == "mkdt"
    reads_experts = (matching and args.iters > 0) or args.init == "high_loss"
    args.objective, out_dim = students_objective(args, folder) if reads_experts else ("kd", None)
    ssl = args.objective in common.SSL
    train, all_targets, made = common.load_targets(
        args.out_dir, args.dataset, args.data_dir, args.image_size, args.limit, args.objective
    )
    if args.lr_from:
        source = args.out_dir / "sets" / f"{args.lr_from}.pt"
        args.lr_init = float(common.load(source, {"lr": float}, "distill.py")["lr"])
    options = common.recipe(vars(args))
    if not (matching and args.iters):
        del options["segments"]
    if not args.iters:  # a subset does not depend on how a set would be learnt
        options = {name: value for name, value in options.items() if name not in OF_LEARNING}
    path = args.out_dir / "sets" / f"{args.name}.pt"
    keys = {"images": 4, "targets": 2, "lr": float}
    if common.is_done(path, "distill", options, keys, made):
        path.with_suffix(".checkpoint").unlink(missing_ok=True)  # where it was killed just then
        print(f"{path} is there: nothing to do")
        return
    common.wait_for_all()  # or the others might find what the first has made
    if common.rank() == 0 and not common.claim(args.out_dir, path):
        common.fail(f"{path}: another run is making it; wait for it, or choose another --name or --out_dir")
    n, channels, px = train.images.shape[:3]
    stats, stored = (train.mean, train.std), args.stored_size or px
    if args.stored_size and stored >= px:
        common.fail(f"--stored_size {stored}: the images have {px} px; choose less")
    size = int(args.fraction * n)  # S
    dims = all_targets.shape[1]
    whole, small = (channels * side**2 + dims for side in (px, stored))  # numbers of an image and its target
    size = size * whole // small  # as many numbers in all
    if not 1 + ssl <= size <= n:
        least, most = -(-(1 + ssl) * small // whole) / n, ((n + 1) * small - 1) // whole / n
        common.fail(
            f"--fraction {args.fraction}: makes a set of {size} of {n} images; choose one from "
            f"{math.ceil(1e4 * least) / 1e4:g} to {math.floor(1e4 * most) / 1e4:g}"
        )
    if args.recipe == "best" and args.iters and common.rank() == 0:
        share = (all_targets.mean(0).square().sum() / all_targets.square().sum(1).mean()).item()
        if share > 0.1:
            print(
                f"warning: the mean of {args.out_dir / 'targets.pt'} is {share:.0%} of the targets' squared "
                "norm: --recipe best is for those of train_teacher.py --centre",
                file=sys.stderr,
            )
    shape = (
        out_dim or all_targets.shape[1],
        px,
        channels,
        args.width,
        args.depth or common.default_depth(px),
    )

    def make_net():
        return common.ConvNet(*shape).to(args.device)

    net, trajectories = make_net(), []
    if reads_experts:
        trajectories, example_losses, made["options"] = load_experts(
            folder, n, common.flatten(net).numel(), made, args.max_experts
        )
        epochs, needed = len(trajectories[0]) - 1, args.max_start_epoch - 1 + args.expert_epochs
        if matching and args.iters and epochs < needed:
            common.fail(
                f"--max_start_epoch {args.max_start_epoch} and --expert_epochs {args.expert_epochs} read "
                f"the epochs 0 to {needed} of the experts, which have {epochs}; train them for {needed}"
            )
    generator = torch.Generator().manual_seed(args.seed)
    if args.init == "high_loss":
        indices = high_loss_indices(example_losses, size)
    elif args.init == "sas":
        indices = sas_indices(all_targets, find_latent_classes(args, all_targets, train.labels), size)
    else:
        indices = torch.randperm(n, generator=generator)[:size]
    start_images = common.normalise(train.images[indices], *stats).to(args.device)
    if stored < px:
        start_images = F.interpolate(start_images, (stored, stored), mode="area")
    images = start_images.clone().requires_grad_()  # D_syn
    targets = all_targets[indices].to(args.device)  # Z_syn
    args.log_lr &= args.iters > 0
    lr = torch.tensor(math.log(args.lr_init) if args.log_lr else args.lr_init, device=args.device)
    pool = []
    if matching:
        groups = [{"params": images, "lr": args.lr_img}, {"params": lr.requires_grad_(), "lr": args.lr_lr}]
        if args.lr_targets > 0:
            groups.append({"params": targets.requires_grad_(), "lr": args.lr_targets})
        optimizer = torch.optim.SGD(groups, momentum=args.momentum)
        loss_fn = common.make_objective(args.objective, train, args.precision)
        losses = trajectory_losses(args, net, loss_fn, px, images, targets, lr, trajectories, generator)
    else:
        optimizer = torch.optim.AdamW([images, targets.requires_grad_()], args.lr_img, weight_decay=0)
        pool = make_pool(args, make_net, generator)
        losses = regression_losses(args, make_net, pool, images, targets, train, all_targets, generator)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, args.decay, max(1, args.iters))
    learnt = [leaf for group in optimizer.param_groups for leaf in group["params"]]
    ids = {k: made[k] for k in ("images_id", "targets_id")}
    ids |= {"experts": len(trajectories), "start": common.fingerprint(indices)}
    log = common.Log(args.out_dir, f"distill_{args.name}", args, ids)
    parts = dict(images=images, targets=targets, lr=lr, optimizer=optimizer, schedule=schedule)
    parts |= dict(generator=generator, pool=pool)
    diverged = f"the set diverged: choose a smaller --lr_img than {args.lr_img:g}"
    at = {"iteration": 0}
    checkpoint = common.Checkpoint(path.with_suffix(".checkpoint"), args, log, diverged, at, **parts)
    done = checkpoint.at["iteration"]
    if args.iters and not done:
        train_pool(args, pool, images, targets, generator)
    progress = common.Progress(f"{args.name}: iteration", args.iters, 1, "iterations", before=done)

    began, recent = time.time(), collections.deque(maxlen=10)
    own = args.segments // common.world_size() if matching else 1  # of this process
    for it in range(done + 1, args.iters + 1):
        optimizer.zero_grad()
        total, drawn, afterwards = torch.zeros((), device=args.device), [], []
        for loss, what, then in itertools.islice(losses, own):
            (loss / own).backward()
            total += loss.detach() / own
            drawn.append(what)
            afterwards += [then] if then else []
        common.average(total, *(leaf.grad for leaf in learnt))
        norm = torch.nn.utils.get_total_norm([images.grad]).item()
        if args.clip_grad and norm > args.clip_grad:  # what drives the pixels off drives alpha_syn off, too
            for leaf in learnt:
                leaf.grad *= args.clip_grad / norm
        optimizer.step()
        schedule.step()
        least = max(args.lr_init / 1000, 1e-30)  # alpha_syn stays positive
        lr.data.clamp_(min=math.log(least) if args.log_lr else least)
        for then in afterwards:
            then()

        value, alpha = total.item(), alpha_syn(args, lr).item()
        recent.append(value)
        if not (math.isfinite(value) and math.isfinite(alpha) and images.isfinite().all()):
            common.fail(
                f"the loss is {value} in iteration {it} (lr {alpha:.3g}): choose a smaller --lr_img than "
                f"{args.lr_img:g}, or a smaller --lr_lr or --lr_init; {checkpoint.kept()}"
            )
        moved = (images.detach() - start_images).abs().mean().item()
        kind = "matching_loss" if matching else "regression_loss"
        drawn = drawn[0] if own == 1 else {"segments": drawn}
        record = {"iteration": it, **drawn, kind: value, "lr": alpha, "pixel_change": moved}
        if common.rank() == 0:
            log.write(**record, gradient_norm=norm, seconds=round(time.time() - began, 4))
        began = time.time()
        progress(it, **{kind: value}, lr=alpha, pixels_moved=moved)
        checkpoint.tick(last=it == args.iters, iteration=it)

    if common.rank() > 0:
        return
    pictures = (common.enlarge(x, px) for x in (start_images, images.detach()))
    save_picture(path.with_suffix(".png"), *pictures, stats)
    common.save(path, {
        "images": images.detach().cpu(),
        "targets": targets.detach().cpu(),
        "lr": alpha_syn(args, lr).item(),
        "indices": indices,
        "mean": train.mean,
        "std": train.std,
        "image_size": px,
        **made,
        "options": {**made["options"], "distill": options},
    })  # fmt: skip
    checkpoint.remove()
    print(f"wrote {path} and .png: {size} images, lr {alpha_syn(args, lr).item():.4f}")
    if matching and len(recent) == recent.maxlen and statistics.mean(recent) > 2:  # not of a rehearsal
        print(
            f"warning: {path}: the matching loss ended at {statistics.mean(recent):.3g}, and a student that "
            "does not move has 1: the set ran off; choose a smaller --lr_img or --lr_init, or --clip_grad",
            file=sys.stderr,
        )


if __name__ == "__main__":
    smaller = "a smaller --micro_batch (the same result), --batch_syn or --width; KRR-ST: --batch_real"
    common.run(main, parse_args(), smaller)
