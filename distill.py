"""Stage 3: distil a small synthetic set by matching the experts' trajectories (MKDT), or make a baseline's.

In every iteration a student starts from an expert's weights at epoch t, takes N SGD steps on the synthetic
set, and should arrive where the expert was after M more epochs on the real data. The gradient of the distance
(paper, eq. 4) moves the synthetic images and their learning rate.

Experts of another objective (train_experts.py --objective) are matched by students with the same (section
4.1). Baselines: plain subsets, and KRR-ST, which learns images and targets by kernel ridge regression on the
features of students that train on them.

Reads:  OUT/targets.pt, OUT/experts/*.pt (MKDT, high-loss subset, --lr_init auto) and the data set.
Writes: OUT/sets/NAME.pt    {images (S, C, H, W) float32, normalised by mean (C,) and std (C,); targets (S, D)
                             float32; lr: a float; indices (S,) int64 of the real images at the start}
        OUT/sets/NAME.png   some of the images, start above result
        OUT/distill_NAME.jsonl, and while it runs OUT/sets/NAME.checkpoint: the same command goes on

    python distill.py                             # 2 % of CIFAR-10, from the high-loss subset: mkdt_high_loss
    python distill.py --init random --iters 0     # the random subset itself, a baseline: subset_random
    python distill.py --init random --iters 0 --lr_init auto    # at the lr that suits it: subset_random_auto
    python distill.py --init FILE.pt              # from a finished set, or images of one's own: FILE_on
    python distill.py --method krr_st             # the baseline KRR-ST: krr_st_random
    python distill.py --seed 1                    # a second set of the method: mkdt_high_loss_seed1
"""

import itertools
import math
import re
import statistics
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import Problem, natural, number, positive

RECIPES = {  # defaults that depend on the method
    "mkdt": dict(init="high_loss", iters=5000, lr_img=1e3, decay=1.0),
    "krr_st": dict(init="random", iters=160_000, lr_img=1e-4, decay=1e-3),
}
INITS = ["high_loss", "random", "sas"]


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    parser.add_argument("--name", help="of the set (default: METHOD_INIT, subset_INIT[_auto], _seedN)")
    parser.add_student_options()
    syn = parser.add_argument_group("synthetic set D_syn, Z_syn")
    syn.add_argument("--method", choices=RECIPES, default="mkdt", help="how it is learnt")
    syn.add_argument("--fraction", type=number, help="|D_syn| / |D_real| (default: 0.02)")
    start = "high_loss, random, sas, or images, targets, lr of FILE.pt (default: high_loss, krr_st random)"
    syn.add_argument("--init", help=start)
    syn.add_argument("--num_latent_classes", type=positive, help="SAS: of k-means (default: the data set's)")
    syn.add_argument("--iters", type=natural, help="S (default: 5000, krr_st 160000); 0: the plain subset")
    start = "of alpha_syn (default: 0.1, or FILE.pt's); auto: sought, by the matching loss of fresh students"
    rate = common.at_least(1e-12, float, 1e12)
    syn.add_argument("--lr_init", type=lambda t: t if t == "auto" else rate(t), help=start)
    learn = parser.add_argument_group("learning")
    lrs = "of pixels (default: 1e3, krr_st, with targets: 1e-4; paper at 5 %%: 1e4, tiny: 1e5, krr_st 1e-5)"
    learn.add_argument("--lr_img", type=number, help=lrs)
    learn.add_argument("--lr_lr", type=number, default=1e-4, help="lr of alpha_syn")
    learn.add_argument("--log_lr", action="store_true", help="learn log alpha_syn (the paper: itself)")
    learn.add_argument("--lr_targets", type=number, default=0.0, help="lr of Z_syn (authors' code: 1)")
    learn.add_argument("--momentum", type=number, default=0.5, help="of the SGD on pixels, lr, Z_syn")
    learn.add_argument("--decay", type=common.at_least(0, float, 1),
                       help="of all rates, linear, to this share in the end (default: 1, none; krr_st 1e-3)")
    learn.add_argument("--clip_grad", type=rate, help="largest norm of the pixels' gradient (paper: any)")
    match = parser.add_argument_group("trajectory matching (eq. 4 and 8)")
    match.add_argument("--syn_steps", type=positive, default=40, help="N, steps on D_syn (tinyimagenet: 10)")
    match.add_argument("--expert_epochs", type=positive, default=2, help="M, epochs of the expert to match")
    match.add_argument("--max_start_epoch", type=positive, default=2, help="T+ > t (5 %% of cifar: 5)")
    line = "start on the line from an epoch to the next, so does the goal; wants an epoch more (paper: no)"
    match.add_argument("--between_epochs", action="store_true", help=line)
    match.add_argument("--max_experts", type=positive, help="use the first so many only (default: all)")
    match.add_argument("--batch_syn", type=positive, default=256, help="synthetic images a step")
    momentum = "of the N steps (the paper: none; --lr_init auto of a plain subset: 0.9, as pre-training has)"
    match.add_argument("--inner_momentum", type=number, default=0.0, help=momentum)
    krr = parser.add_argument_group("KRR-ST (Lee et al., ICLR 2024)")
    krr.add_argument("--pool_size", type=positive, default=10, help="students in the pool")
    krr.add_argument("--pool_steps", type=positive, default=1000, help="steps on D_syn until one starts anew")
    krr.add_argument("--batch_real", type=positive, default=1024, help="real images an iteration")
    krr.add_argument("--ridge", type=number, default=1e-6, help="lambda, as a share of the kernel's trace")
    parser.add_argument("--seed", type=natural, default=0, help="of everything that is drawn")
    parser.add_run_options(compile=True)
    args = parser.parse_args(argv)
    vars(args).update({k: v for k, v in RECIPES[args.method].items() if getattr(args, k) is None})
    if args.init in INITS:
        args.lr_init = args.lr_init or 0.1
        args.fraction = 0.02 if args.fraction is None else args.fraction
    elif args.fraction is not None or not args.init.endswith(".pt"):
        raise Problem(f"--init {args.init}: choose {', '.join(INITS)}, or FILE.pt, without --fraction")
    auto = args.lr_init == "auto"
    if not args.iters:  # a plain subset does not depend on how it would be learnt
        args.method = "mkdt"
        for group in (learn, krr) if auto else (learn, krr, match):
            for action in group._group_actions:
                if (args.init, action.dest) != ("high_loss", "max_experts"):
                    setattr(args, action.dest, action.default)
        args.inner_momentum, args.between_epochs = 0.9 if auto else 0.0, False  # as pre-training has
        args.precision, args.augment = (args.precision, args.augment) if auto else ("fp32", "none")
    if not args.name:
        args.name = f"{args.method if args.iters else 'subset'}_{args.init}"
        args.name = args.name if args.init in INITS else f"{Path(args.init).stem}_on"
        args.name += "_auto" if auto and not args.iters else ""
        args.name += f"_seed{args.seed}" if args.seed else ""
    if re.fullmatch(r"(none|full)(_seed\d+)?", args.name) or not re.fullmatch(r"\w[\w.+-]*", args.name):
        raise Problem(f"--name {args.name!r}: choose letters, digits, . + - _ within; not none or full")
    return args


# ---- The inner loop, differentiated in constant memory -----------------------------------------------------


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
    def forward(ctx, theta, images, targets, lr, gradient, reverse, batches, momentum, view):
        images, targets, thetas, velocity = images.detach(), targets.detach(), [], torch.zeros_like(theta)
        for n, batch in enumerate(batches):
            thetas.append(theta.detach())
            velocity = momentum * velocity + gradient(thetas[n], *view(images[batch], targets[batch], n), n)
            theta = theta - lr * velocity
        ctx.save_for_backward(images, targets, lr, *thetas)
        ctx.reverse, ctx.batches, ctx.momentum, ctx.view = reverse, batches, momentum, view
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
            with torch.enable_grad():
                seen = ctx.view(x := images[batch].requires_grad_(), z := targets[batch].requires_grad_(), n)
            s, ds_dtheta, *ds_dseen = ctx.reverse(thetas[n], *(part.detach() for part in seen), n, r)
            for total, part in zip((d_images, d_targets), torch.autograd.grad(seen, (x, z), ds_dseen)):
                total.index_add_(0, batch, -lr * part)
            d_lr -= s
            lam = lam - lr * ds_dtheta
        return lam, d_images, d_targets, d_lr, None, None, None, None, None


def student_steps(loss_fn, theta, images, targets, lr, batches, momentum=0.0, functions=None,
                  view=lambda x, z, n: (x, z)):
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
        view: (images (B, C, H, W), targets (B, D), n) -> what step n sees of them; it follows from n, too.

    Returns theta_N (P,).
    """
    lr = torch.as_tensor(lr, dtype=theta.dtype, device=theta.device)
    batches = [common.send(batch, images.device) for batch in batches]
    gradient, reverse = functions or step_functions(loss_fn)
    return _StudentSteps.apply(theta, images, targets, lr, gradient, reverse, batches, momentum, view)


def matching_loss(theta, start, goal):
    """||theta - goal||^2 / ||start - goal||^2 (eq. 4): 1 if the student stood still, 0 if it arrived."""
    return (theta - goal).square().sum() / (start - goal).square().sum()


def make_step_loss(args, net, data, *key):
    """The loss_fn of student_steps for students like net; what is random in step n follows from (key, n)."""
    ssl = args.objective in common.SSL

    def step_loss(theta, x, z, n):
        common.seed_dropout(args.device, args.seed, "dropout", *key, n)
        draws = common.generator(args.device, args.seed, "views", *key, n) if ssl else None
        f = lambda x: common.forward_flat(net, theta, x, precision=args.precision)  # noqa: E731
        return common.student_loss(args.objective, f, x, z, data, draws)

    return step_loss


def make_view(args, data, *key):
    """The view of student_steps (--augment), by (key, n); made outside of what is compiled."""
    draws = lambda n: common.generator(args.device, args.seed, "augment", *key, n)  # noqa: E731
    return lambda x, z, n: common.augment(x, z, args.augment, data.flip, draws(n))


def compiled_functions(args, net, data):
    """step_functions for --compile; None without it, and for SSL, whose views are new in every step."""
    if not args.compile or args.objective in common.SSL:
        return None
    x, layout = torch.randn(2, *data.images.shape[1:], device=args.device), common.layout(args.width)
    if not torch.equal(net(x), net(x)):
        raise Problem("--compile: the student draws (dropout?), fused steps do not repeat that; --no-compile")

    def loss_fn(theta, x, z, n):
        f = lambda x: common.forward_flat(net, theta, x, layout, args.precision)  # noqa: E731
        return common.student_loss(args.objective, f, x, z, data)

    return step_functions(loss_fn, compile=True)


def draw(args, size, trajectories, *key, max_start=None):
    """What follows from (seed, key): (start (P,), goal (P,), the batches of N steps, what the log says).

    start is an expert k at an epoch t < max_start (default: T+), by --between_epochs at t + u with u < 1, on
    the line from epoch to epoch; goal the same expert M epochs later.
    """
    draws = common.generator("cpu", args.seed, *key)
    k = torch.randint(len(trajectories), (), generator=draws).item()
    t = torch.randint(max_start or args.max_start_epoch, (), generator=draws).item()
    smallest = 2 if args.objective in common.SSL else 1  # one image has nothing to be contrasted with
    batches = common.shuffled(size, args.batch_syn, args.seed, *key, smallest=smallest)
    u = torch.rand((), generator=draws).item() if args.between_epochs and not max_start else 0
    at = lambda e: torch.lerp(*trajectories[k][e : e + 2], u) if u else trajectories[k][e]  # noqa: E731
    start, goal = (common.send(at(epoch), args.device) for epoch in (t, t + args.expert_epochs))
    return start, goal, list(itertools.islice(batches, args.syn_steps)), {"expert": k, "start_epoch": t + u}


def find_rate(args, images, targets, net, data, trajectories, functions=None):
    """--lr_init auto: (the rate at which the set, as it starts, matches the experts best, {rate: loss}).

    The inner loop runs forward alone, four times from an expert's fresh weights, as pre-training does, at
    rates a factor of 2 apart, from 0.1 as far down and up as the least mean matching loss asks.
    """
    tried = {}

    def mean_loss(rate):
        losses = []
        for i in range(4):
            start, goal, batches, _ = draw(args, len(images), trajectories, "rate", i, max_start=1)
            step_loss = make_step_loss(args, net, data, "rate", i)
            with torch.no_grad():
                theta = student_steps(step_loss, start, images, targets, rate, batches, args.inner_momentum,
                                      functions, make_view(args, data, "rate", i))
            losses.append(matching_loss(theta, start, goal).item())
        return statistics.mean(losses) if all(map(math.isfinite, losses)) else math.inf

    best, untried = 0.1, [0.1]
    while untried and len(tried) < 40:
        tried[untried[0]] = mean_loss(untried[0])
        best = min(tried, key=lambda rate: (tried[rate], rate))  # the least of those that diverge
        untried = [rate for rate in (best / 2, best * 2) if rate not in tried]
    said = ", ".join(f"{rate:.3g}: {loss:.3g}" for rate, loss in sorted(tried.items()))
    print(f"--lr_init auto: {best:.3g}; matching loss by rate: {said}")
    if not math.isfinite(tried[best]):
        raise Problem("--lr_init auto: the matching loss is finite at no rate; do the experts move? Train "
                      "them with a larger --lr, or give a number")
    return best, tried


# ---- KRR-ST: kernel ridge regression on self-supervised targets --------------------------------------------


def kernel_ridge(features, targets, queries, ridge):
    """The targets that kernel ridge regression predicts for the queries: K_qs (K_ss + lambda I)^-1 Z_s.

    features (S, F), targets (S, D), queries (B, F) -> (B, D). The kernel is linear, with a constant feature
    for the bias; lambda = ridge tr(K_ss), held fixed in the gradient (Lee et al., ICLR 2024, and their code).
    """
    features, queries = F.pad(features, (0, 1), value=1.0), F.pad(queries, (0, 1), value=1.0)
    kernel = features @ features.T
    identity = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    penalty = ridge * kernel.trace().detach() * identity
    return queries @ features.T @ torch.linalg.solve(kernel + penalty, targets)


# ---- The start of the set, and its experts -----------------------------------------------------------------


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
    largest = (exact - quota).argsort(descending=True, stable=True)  # remainders
    quota[largest[: size - quota.sum()]] += 1
    members = [(latent_classes == c).nonzero().flatten() for c in classes]
    return torch.cat([m[greedy_gains(features[m], q)] for m, q in zip(members, quota.tolist())])


def find_latent_classes(args, features, labels):
    """SAS's latent classes, (N,) int64, by k-means on the teacher's features (N, D).

    Of the labels (or None) only the number of classes is used, without --num_latent_classes.
    """
    from sklearn.cluster import KMeans

    count = args.num_latent_classes or (0 if labels is None else len(labels.unique()))
    if not 0 < count <= len(features):
        raise Problem(f"--init sas: --num_latent_classes {count}, of {len(features)} images; give another")
    return torch.from_numpy(KMeans(count, n_init=1, random_state=args.seed).fit(features).labels_).long()


def find_experts(args):
    """(paths of the experts, their options): objective and out_dim are those of the students, too.

    Raises Problem if there are not enough, or if --init does not go with them.
    """
    folder = args.out_dir / "experts"
    paths = sorted(path for path in folder.glob("*.pt") if re.fullmatch(r"\d{4,}", path.stem))
    if len(paths) < (args.max_experts or 1):
        raise Problem(f"{folder}: has {len(paths)} of {args.max_experts or 1} experts; run train_experts.py")
    options = common.load(paths[0], {}, "train_experts.py", mmap=True).get("options", {})
    objective = (made := options.get("train_experts", {})).get("objective", "kd")
    inits = INITS if objective in common.LOSSES else ["random"]  # SSL has no loss of single images
    if objective == "supervised":  # without a teacher, whose targets KRR-ST and SAS want
        inits = ["random"] if args.method == "krr_st" else ["high_loss", "random"]
    known = args.init in inits or args.init not in INITS and objective in common.LOSSES  # SSL: no targets
    if objective not in (*common.LOSSES, *common.SSL) or not known:
        raise Problem(f"--init {args.init}: the experts in {folder} are {objective!r}; choose "
                      f"{' or '.join(inits)}, or make experts that are known")
    return paths[: args.max_experts], made


def load_experts(paths, num_images, num_parameters, made):
    """The experts of a run: (trajectories (E + 1, P), example losses (N,) of each, options so far).

    Both stay on disk until they are read. Raises Problem if a file does not belong to the others, to these
    targets (made is load_targets') or to this student.
    """
    trajectories, losses, options = [], [], {}
    for path in paths:
        expert = common.load(path, {"trajectory": 2, "example_loss": 1}, "train_experts.py", mmap=True)
        trajectory, loss = expert["trajectory"], expert["example_loss"]
        if not trajectories:
            options, shape = expert.get("options", {}), trajectory.shape
        if trajectory.shape[1] != num_parameters:
            raise Problem(f"{path}: has students of P = {trajectory.shape[1]} parameters, here P = "
                          f"{num_parameters}; give the --width, --depth and --image_size of train_experts.py")
        if loss.shape != (num_images,) or trajectory.shape != shape:
            raise Problem(f"{path}: has {len(loss)} example losses and {len(trajectory) - 1} epochs, here "
                          f"{num_images} and {shape[0] - 1}; make it again with train_experts.py")
        advice = f"as {paths[0]}; make them all again with the same options, or move one kind away"
        common.check_same(path, expert, "train_experts", {**options.get("train_experts", {}), **made}, advice)
        trajectories.append(trajectory)
        losses.append(loss)
    return trajectories, losses, {**made["options"], **options}


def start_indices(args, data, all_targets, example_losses):
    """The real images from which the set starts, (S,) int64; example_losses: K times (N,)."""
    n, least = len(all_targets), 2 if args.objective in common.SSL else 1  # SSL contrasts images
    size = int(args.fraction * n)
    if args.batch_syn < least:
        raise Problem(f"--batch_syn {args.batch_syn}: {args.objective} contrasts images; choose 2 or more")
    if not least <= size <= n:
        raise Problem(f"--fraction {args.fraction:g}: makes a set of {size} of {n} images; choose one from "
                      f"{math.ceil(1e4 * least / n) / 1e4:g} to 1, for run_all.sh by FRACTION")
    if args.init == "high_loss":  # section 4.2: over all experts, hardest first; no labels, no balancing
        return sum(example_losses).topk(size).indices
    if args.init == "sas":
        return sas_indices(all_targets, find_latent_classes(args, all_targets, data.labels), size)
    return torch.randperm(n, generator=common.generator("cpu", args.seed, "subset"))[:size]


def save_picture(path, start, result, data, count=30, columns=10):
    """Write the first `count` images, rows of `columns`, each of the start (S, C, H, W) above its result."""
    from torchvision.utils import save_image

    starts = range(0, min(count, len(start)), columns)
    rows = [part[i : i + columns].cpu() for i in starts for part in (start, result)]
    images = common.denormalise(torch.cat(rows), data)
    images = F.interpolate(images, scale_factor=max(1, 48 // images.shape[-1]), mode="nearest")
    with common.replacing(path) as temporary:
        save_image(images, temporary, format="png", nrow=columns, padding=2, pad_value=1.0)


class SyntheticSet(nn.Module):
    """What is learnt: images D_syn (S, C, H, W), targets Z_syn (S, D), and alpha_syn or its logarithm."""

    def __init__(self, images, targets, lr, log_lr):
        super().__init__()
        self.images, self.targets, self.log_lr = nn.Parameter(images), nn.Parameter(targets), log_lr
        self.register_buffer("start", images.clone())  # (S, C, H, W), for the picture
        rates = torch.tensor([lr, max(lr / 1000, 1e-30)])  # alpha_syn stays positive
        rate, least = (rates.log() if log_lr else rates).to(images.device)
        self.rate = nn.Parameter(rate.clone())
        self.register_buffer("least", least.clone())

    def lr(self):
        return self.rate.exp() if self.log_lr else self.rate


def save_set(path, syn, indices, data, made):
    """OUT/sets/NAME.pt and NAME.png of a SyntheticSet, made of the real images indices (S,)."""
    save_picture(path.with_suffix(".png"), syn.start, syn.images.detach(), data)
    images, targets, lr = syn.images.detach().cpu(), syn.targets.detach().cpu(), syn.lr().item()
    common.save(path, {"images": images, "targets": targets, "lr": lr, "indices": indices,
                       "mean": data.mean.cpu(), "std": data.std.cpu(), **made})
    print(f"wrote {path} and .png: {len(images)} images, lr {lr:.4f}")


# ---- The two methods ---------------------------------------------------------------------------------------


def distil_mkdt(args, syn, net, data, trajectories, functions, checkpoint_of, log):
    """Trajectory matching (eq. 4 and 8): --iters steps of SGD on the set syn, in place.

    net: a student, for its shape; trajectories: load_experts'; functions: compiled_functions';
    checkpoint_of(optimizer=...): the Checkpoint.
    """
    groups = [{"params": [syn.images], "lr": args.lr_img}, {"params": [syn.rate], "lr": args.lr_lr},
              {"params": [syn.targets], "lr": args.lr_targets}]
    optimizer = torch.optim.SGD(groups, momentum=args.momentum)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, args.decay, args.iters)
    checkpoint = checkpoint_of(optimizer=optimizer, schedule=schedule)
    progress = common.Progress(f"{args.name}: iteration", args.iters, checkpoint.step)

    for it in range(checkpoint.step, args.iters):
        key = (it, common.rank())  # each process matches an expert of its own
        start, goal, batches, drawn = draw(args, len(syn.images), trajectories, *key)
        theta = student_steps(make_step_loss(args, net, data, *key), start, syn.images, syn.targets, syn.lr(),
                              batches, args.inner_momentum, functions, make_view(args, data, *key))
        loss = matching_loss(theta, start, goal)
        optimizer.zero_grad()
        (loss / common.world_size()).backward()
        common.add_up(*(p.grad for p in syn.parameters()))
        norm = syn.images.grad.norm()
        if args.clip_grad and norm > args.clip_grad:  # what drives the pixels off drives alpha_syn off, too
            for p in syn.parameters():
                p.grad *= args.clip_grad / norm
        optimizer.step()
        schedule.step()
        syn.rate.data.clamp_(min=syn.least)

        record(args, log, checkpoint, syn, it, norm, matching_loss=loss.item(), **drawn)
        progress(it + 1, matching_loss=loss, lr=syn.lr().item())
        checkpoint.tick(it + 1, last=it + 1 == args.iters)


def distil_krr_st(args, syn, make_net, data, all_targets, checkpoint_of, log):
    """KRR-ST: AdamW on the error of kernel_ridge on real images, with the features of a student of a pool.

    The student then takes a step on the set, or after --pool_steps starts anew, as does its counter.
    """
    optimizer = torch.optim.AdamW([syn.images, syn.targets], args.lr_img, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, args.decay, args.iters)
    pool = nn.ModuleList(make_net() for _ in range(args.pool_size))
    inner = torch.optim.SGD(pool.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)  # of one at a time
    steps = torch.zeros(args.pool_size, dtype=torch.int64)  # of each student on the set, in full batches

    def begin(k, *key):
        torch.manual_seed(common.seed_of(args.seed, "student", k, *key))
        pool[k].load_state_dict(make_net().state_dict())
        for p in pool[k].parameters():
            inner.state.pop(p, None)
        steps[k] = 0

    def train(k, count=1):
        for _ in range(count):
            f = common.in_precision(pool[k], args.precision)
            loss = F.mse_loss(f(syn.images.detach()), syn.targets.detach())
            inner.zero_grad()
            loss.backward()
            inner.step()
        steps[k] += count

    checkpoint = checkpoint_of(optimizer=optimizer, schedule=schedule, inner=inner, pool=pool, steps=steps)
    exact = torch.float32 if args.device.startswith("mps") else torch.float64  # lambda is small
    images = common.place(data.images, args.device)
    if checkpoint.step == 0:  # each student begins at another point of its training
        for k in range(args.pool_size):
            begin(k)
            common.seed_dropout(args.device, args.seed, "pool", "dropout", k)
            train(k, common.seed_of(args.seed, "pool", k) % args.pool_steps)
    progress = common.Progress(f"{args.name}: iteration", args.iters, checkpoint.step)

    for it in range(checkpoint.step, args.iters):
        draws = common.generator("cpu", args.seed, it)
        common.seed_dropout(args.device, args.seed, "dropout", it)
        k = torch.randint(len(pool), (), generator=draws).item()
        batch = torch.randperm(len(images), generator=draws)[: args.batch_real]
        x, z = common.fetch(images, batch, args.device), common.fetch(all_targets, batch, args.device)
        features_of = common.in_precision(pool[k].features, args.precision)
        with torch.no_grad():
            queries = features_of(common.normalise(x, data)).to(exact)
        features = features_of(syn.images).to(exact)
        try:
            predicted = kernel_ridge(features, syn.targets.to(exact), queries, args.ridge)
        except torch.linalg.LinAlgError:
            raise Problem(f"student {k}: the kernel is singular; choose a larger --ridge") from None
        loss = F.mse_loss(predicted, z.to(exact))
        optimizer.zero_grad()
        loss.backward(inputs=[syn.images, syn.targets])  # not in the student
        optimizer.step()
        schedule.step()
        taken = steps[k].item()
        if taken < args.pool_steps:
            train(k)
        else:
            begin(k, it)

        record(args, log, checkpoint, syn, it, syn.images.grad.norm(), regression_loss=loss.item(), student=k,
               steps=taken)
        progress(it + 1, regression_loss=loss)
        checkpoint.tick(it + 1, last=it + 1 == args.iters)


def record(args, log, checkpoint, syn, it, norm, **values):
    """Log an iteration; raises Problem if its loss, the set or its lr is not finite."""
    values |= {"lr": syn.lr().item(), "pixel_change": (syn.images - syn.start).abs().mean().item()}
    if not all(map(math.isfinite, values.values())):
        raise Problem(f"the set diverged in iteration {it + 1} ({values}): choose a smaller --lr_img than "
                      f"{args.lr_img:g}, or a smaller --lr_lr or --lr_init; {checkpoint.kept()}")
    log.write(iteration=it + 1, **values, gradient_norm=norm.item())


def main(args):
    common.set_up(args)
    matching, paths, of_experts = args.method == "mkdt" and args.iters > 0, [], {}
    follows = matching or args.lr_init == "auto"  # trajectories
    if follows or args.init == "high_loss":
        paths, of_experts = find_experts(args)
    args.objective = of_experts.get("objective", "kd")
    args.augment = args.augment if follows and args.objective in common.LOSSES else "none"  # SSL has its own
    data, all_targets, made = common.load_targets(args, args.objective)
    n, channels, px = data.images.shape[:3]
    folder = args.out_dir / "sets"
    options, path = common.recipe(args, ["max_experts"]), folder / f"{args.name}.pt"
    unfinished = folder / f"{args.name}.checkpoint"
    log = common.Log(args.out_dir / f"distill_{args.name}.jsonl", args)

    def make_net():
        out = of_experts.get("out_dim") or all_targets.shape[1]
        return common.make_student(out, px, channels, args.width, args.depth).to(args.device)

    net = make_net()
    trajectories, example_losses, made["options"] = load_experts(paths, n, common.flatten(net).numel(), made)
    ids = {"experts_id": common.fingerprint(*(t[-1] for t in trajectories))} if paths else {}
    if args.init not in INITS:
        found = common.load_set(args.init, data, all_targets.shape[1])
        common.check_same(args.init, found, "", {"targets_id": made["targets_id"]}, "give another set")
        images, targets, indices = found["images"], found["targets"], found["indices"]
        lr, options["init"] = args.lr_init or found["lr"], Path(args.init).name
        ids["init_id"] = common.fingerprint(images, targets, found["lr"], indices)
    now = {**options, "images_id": made["images_id"], "targets_id": made["targets_id"]}
    made_by = {"distill": now, "train_experts": of_experts, "": ids}
    if common.is_done(path, made_by, {"images": 4, "targets": 2 if all_targets.shape[1] else None, "lr": 0}):
        unfinished.unlink(missing_ok=True)  # of a run that was killed just before its end
        print(f"{path} is there: nothing to do")
        return
    needed = args.expert_epochs + (args.max_start_epoch - 1 + args.between_epochs if matching else 0)
    if follows and (epochs := len(trajectories[0]) - 1) < needed:
        raise Problem(f"--max_start_epoch {args.max_start_epoch}, --expert_epochs {args.expert_epochs}: read "
                      f"the epochs 0 to {needed} of experts, which have {epochs}; train them for {needed}")
    if args.init in INITS:
        indices = start_indices(args, data, all_targets, example_losses)
        images, targets, lr = common.normalise(data.images[indices], data), all_targets[indices], args.lr_init
    images, targets, tried = images.to(args.device), targets.to(args.device), {}
    functions = compiled_functions(args, net, data) if follows else None
    if lr == "auto" and unfinished.exists():
        lr = 0.1  # the checkpoint has the rate
    elif lr == "auto":
        lr, tried = find_rate(args, images, targets, net, data, trajectories, functions)
    syn = SyntheticSet(images, targets, lr, args.log_lr)
    now |= {"max_experts": len(paths), **ids}

    def checkpoint_of(**parts):
        checkpoint = common.Checkpoint(unfinished, args, now, log, syn=syn, indices=indices, **parts)
        if tried:
            log.write(rates_tried=tried)
        return checkpoint

    if matching:
        distil_mkdt(args, syn, net, data, trajectories, functions, checkpoint_of, log)
    elif args.iters:
        distil_krr_st(args, syn, make_net, data, all_targets, checkpoint_of, log)
    else:
        checkpoint_of()  # begins the log
    if common.rank() == 0:
        made["options"] = {**made["options"], "distill": options}
        save_set(path, syn, indices, data, {**made, **ids})
        unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
    common.run(main, parse_args)
