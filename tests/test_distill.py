"""student_steps against plain autograd through the loop, its memory, the matching loss, a set's start."""

import argparse
import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import refuses

import common
import distill

OBJECTIVES = [*common.LOSSES, *common.SSL]
# Seven steps: images come back in later batches, one comes twice in a batch, the last batches are small.
BATCHES = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [3, 1, 0, 9], [2, 2, 5], [7, 6], [11]]
BATCHES = [torch.tensor(batch) for batch in BATCHES]
momenta = pytest.mark.parametrize("momentum", [0.0, 0.9])


def kd_loss(net):
    return lambda theta, x, z, n: common.mse_loss(common.forward_flat(net, theta, x), z)


def problem(dtype=torch.float64, size=8, width=4, images=12):
    """A small student and a synthetic set: (loss_fn, theta, images, targets)."""
    torch.manual_seed(0)
    net = common.ConvNet(5, image_size=size, channels=2, width=width, depth=2).to(dtype)
    x, z = torch.randn(images, 2, size, size, dtype=dtype), torch.randn(images, 5, dtype=dtype)
    return kd_loss(net), common.flatten(net), x, z


def plain_steps(loss_fn, theta, images, targets, lr, batches, momentum=0.0):
    """The same loop for autograd to unroll, as in MTT: the graphs of all steps are kept."""
    velocity = torch.zeros_like(theta)
    for n, batch in enumerate(batches):
        (g,) = torch.autograd.grad(loss_fn(theta, images[batch], targets[batch], n), theta, create_graph=True)
        velocity = momentum * velocity + g
        theta = theta - lr * velocity
    return theta


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10 * max(1, expected.abs().max().item()))


def assert_exact(loss_fn, theta, images, targets, momentum, lr=0.3, batches=BATCHES, functions=None,
                 unused=(), view=None):
    """student_steps gives what plain_steps gives, and its gradient in theta, images, targets and lr."""
    goal, results, views = theta + 0.1 * torch.randn_like(theta), [], {"view": view} if view else {}
    seen = (lambda theta, x, z, n: loss_fn(theta, *view(x, z, n), n)) if view else loss_fn
    for steps in (lambda _, *words: plain_steps(seen, *words),
                  functools.partial(distill.student_steps, functions=functions, **views)):
        leaves = [torch.as_tensor(t, dtype=theta.dtype).clone() for t in (theta, images, targets, lr)]
        leaves = dict(zip(("theta", "images", "targets", "lr"), (leaf.requires_grad_() for leaf in leaves)))
        end = steps(loss_fn, *leaves.values(), batches, momentum)
        loss = distill.matching_loss(end, theta, goal)
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        results.append({"end": end.detach(), **dict(zip(leaves, grads))})
    for name, expected in results[0].items():
        assert (expected.abs().max() > 0) == (name not in unused)
        close(results[1][name], expected)


# ---- The inner loop ----------------------------------------------------------------------------------------


@momenta
def test_student_steps_is_exact(momentum):
    assert_exact(*problem(), momentum)


@momenta
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_steps_of_every_objective_are_exact(objective, momentum):
    """With views that each step draws by its own seed."""
    torch.manual_seed(0)
    net, mean = common.ConvNet(5, image_size=8, channels=3, width=4, depth=2).double(), torch.full((3,), 0.5)
    data = common.ImageSet(None, None, mean.double(), mean.double() / 2)
    images = common.normalise(torch.rand(12, 3, 8, 8).double() * 0.8 + 0.1, data)
    targets = torch.eye(5).double()[torch.arange(12) % 5]
    args = argparse.Namespace(objective=objective, seed=0, device="cpu", precision="fp32")
    loss_fn, unused = distill.make_step_loss(args, net, data, 3), ["targets"] * (objective in common.SSL)
    assert_exact(loss_fn, common.flatten(net), images, targets, momentum, 0.05, BATCHES[:5], unused=unused)


@momenta
@pytest.mark.parametrize("kind", common.AUGMENT)
def test_steps_on_views_are_exact(kind, momentum):
    """Mirrored, cropped and mixed by the step's seed: the way back sees what the way there saw."""
    args = distill.parse_args(["--augment", kind, "--device", "cpu"])
    _, _, images, targets = case = problem()
    view = distill.make_view(args, common.ImageSet(None, None, None, None), 5)
    (once, mixed), (again, _), (other, _) = (view(images, targets, n) for n in (1, 1, 0))
    assert torch.equal(once, again)
    assert torch.equal(once, images) == torch.equal(once, other) == (kind == "none")
    assert torch.equal(mixed, targets) == (kind != "flip_crop_mix")
    assert_exact(*case, momentum, view=view)


class Transformer(nn.Module):
    """A small vision transformer of four tokens."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm, self.head = nn.Conv2d(2, 8, 4, 4), nn.LayerNorm(8), nn.Linear(8, 5)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.head(self.norm(self.layer(self.patches(x).flatten(2).transpose(1, 2))).mean(1))


def dropout():
    """A student that draws."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Dropout(0.4), nn.Flatten(), nn.Linear(144, 5))


@pytest.mark.parametrize("depth", [2, 3])
def test_bf16_rounds_the_networks_alone(depth):
    """theta, the sums over steps and the gradients stay float32, and are near those without it."""
    torch.manual_seed(0)
    net = common.ConvNet(5, image_size=16, channels=2, width=16, depth=depth)
    theta, x, z, results = common.flatten(net), torch.randn(12, 2, 16, 16), torch.randn(12, 5), []
    goal = theta + 0.01 * torch.randn_like(theta)
    for precision in ("fp32", "bf16"):
        args = distill.parse_args(["--precision", precision, "--device", "cpu"])
        args.objective = "kd"
        leaves = [leaf.clone().requires_grad_() for leaf in (x, torch.tensor(0.1))]
        loss_fn = distill.make_step_loss(args, net, None, 0)
        end = distill.student_steps(loss_fn, theta, leaves[0], z, leaves[1], BATCHES, 0.9)
        results.append([end - theta, *torch.autograd.grad(distill.matching_loss(end, theta, goal), leaves)])
        assert {part.dtype for part in results[-1]} == {torch.float32}
    for exact, rounded in zip(*results):
        cosine = F.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0).item()
        assert cosine > 0.9 and not torch.equal(exact, rounded)


@momenta
@pytest.mark.parametrize("make_net", [dropout, Transformer])
def test_steps_of_other_students_are_exact(make_net, momentum):
    _, _, images, targets = problem()
    net, args = make_net().double(), distill.parse_args(["--seed", "1", "--device", "cpu"])
    args.objective = "kd"
    loss_fn, theta = distill.make_step_loss(args, net, None, 3, 0), common.flatten(net)
    assert_exact(loss_fn, theta, images, targets, momentum)
    losses = [loss_fn(theta, images, targets, n).item() for n in (0, 1, 0)]
    assert losses[0] == losses[2] and (losses[0] != losses[1]) == (make_net is dropout)


def test_students_that_no_vector_holds():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    refuses(lambda: common.flatten(net), "1.running_mean", "BatchNorm")
    net[1] = nn.GroupNorm(3, 3).requires_grad_(False)
    refuses(lambda: common.flatten(net), "1.weight", "frozen")


def test_compiled_steps_are_exact(monkeypatch):
    """--compile: forward over reverse gives the same gradient."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    functions = distill.step_functions(problem()[0], compile=True)
    assert_exact(*problem(), momentum=0.9, batches=BATCHES[:2], functions=functions)


@momenta
def test_student_steps_is_sgd(momentum):
    """The forward pass is torch.optim.SGD on the module."""
    torch.manual_seed(0)
    net = common.ConvNet(5, image_size=8, channels=1, width=4, depth=2)
    images, targets = torch.randn(12, 1, 8, 8), torch.randn(12, 5)
    end = distill.student_steps(kd_loss(net), common.flatten(net), images, targets, 0.2, BATCHES, momentum)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=momentum)
    for batch in BATCHES:
        optimizer.zero_grad()
        F.mse_loss(net(images[batch]), targets[batch]).backward()
        optimizer.step()
    torch.testing.assert_close(end, common.flatten(net))


def test_no_steps_leave_the_student_where_it_is():
    loss_fn, theta, images, targets = problem()
    end = distill.student_steps(loss_fn, theta, images.requires_grad_(), targets, 0.1, [])
    assert torch.equal(end, theta)


def peak_bytes(function):
    """Most bytes allocated on the CPU at a time while function runs, beyond what there was before."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        function()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def test_memory_does_not_grow_with_the_steps():
    loss_fn, *leaves = problem(torch.float32, size=16, width=8, images=32)
    leaves = [leaf.requires_grad_() for leaf in (*leaves, torch.tensor(0.1))]

    def peak(steps, n):
        end = lambda: steps(loss_fn, *leaves, [torch.arange(32)] * n)  # noqa: E731
        return peak_bytes(lambda: end().square().sum().backward()) - (n + 1) * leaves[0].nbytes

    few, many = peak(distill.student_steps, 5), peak(distill.student_steps, 40)
    assert many < 1.15 * few
    assert peak(plain_steps, 40) > 4 * many  # what it is all for, and that the measure measures


# ---- Matching ----------------------------------------------------------------------------------------------


def test_matching_loss():
    loss_fn, theta, images, targets = problem()
    steps = functools.partial(distill.student_steps, loss_fn, theta, images, targets, batches=BATCHES)
    expert = steps(lr=0.1)  # an expert that is plain SGD
    still, half, there = (distill.matching_loss(steps(lr=lr), theta, expert) for lr in (0.0, 0.05, 0.1))
    assert still.item() == pytest.approx(1, abs=1e-12) and there.item() == pytest.approx(0, abs=1e-12)
    assert 0 < half < 1


def matching_args(**options):
    always = dict(seed=0, objective="kd", device="cpu", width=8, compile=False, inner_momentum=0.0,
                  precision="fp32", augment="none", between_epochs=False)
    return argparse.Namespace(**{**always, **options})


def test_what_an_iteration_draws():
    args = matching_args(batch_syn=4, syn_steps=7, max_start_epoch=3, expert_epochs=2)
    trajectories, seen = [10 * k + torch.arange(6.0).view(6, 1) for k in range(4)], set()
    for it in range(60):
        start, goal, batches, drawn = distill.draw(args, 10, trajectories, it, 0)
        seen.add((drawn["expert"], drawn["start_epoch"]))
        assert start.item() == 10 * drawn["expert"] + drawn["start_epoch"] and goal == start + 2
        assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2, 4]
        assert sorted(torch.cat(batches[:3]).tolist()) == list(range(10))
    assert seen == set(itertools.product(range(4), range(3)))


def test_starts_between_epochs():
    """Anywhere up to the next epoch, the goal as far on; the rate is sought from fresh students."""
    args = matching_args(batch_syn=4, syn_steps=1, max_start_epoch=3, expert_epochs=2, between_epochs=True)
    trajectories, seen = [(10 * k + torch.arange(6.0)).view(6, 1) for k in range(4)], []
    for it in range(60):
        start, goal, _, drawn = distill.draw(args, 10, trajectories, it, 0)
        seen.append(drawn["start_epoch"])
        assert start.item() == pytest.approx(10 * drawn["expert"] + seen[-1], abs=1e-4)
        assert goal.item() == pytest.approx(start.item() + 2, abs=1e-4)
        assert distill.draw(args, 10, trajectories, it, 0, max_start=1)[3]["start_epoch"] == 0
    assert len(set(seen)) == 60 and 0 < min(seen) < 0.5 and 2.5 < max(seen) < 3



@pytest.mark.parametrize("wanted", [0.2, 0.05, 0.0125])
def test_the_rate_found_is_the_best_of_those_tried(wanted):
    """A linear student of which one direction diverges above 2 / curvature, the others are slow."""
    net, curvature = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)), 1.9 / wanted
    images = (4 * curvature * torch.tensor([1, 0.01, 0.01, 0.01]).diag()).sqrt().view(4, 1, 2, 2)
    targets, trajectories = images.flatten(1) @ torch.ones(4, 2), [torch.tensor([[0.0], [1.0]]).expand(2, 8)]
    data = common.ImageSet(images, None, None, None)
    args = matching_args(batch_syn=8, syn_steps=50, max_start_epoch=1, expert_epochs=1)
    best, tried = distill.find_rate(args, images, targets, net, data, trajectories)
    assert best == pytest.approx(wanted) and tried[best] == min(tried.values()) < 1
    assert {best / 2, best * 2, 0.1} <= set(tried) and tried[best * 2] == float("inf")


# ---- The start of the set ----------------------------------------------------------------------------------


def hardest(losses, size):
    n = len(losses[0])
    args = argparse.Namespace(init="high_loss", objective="kd", batch_syn=1, fraction=size / n)
    return distill.start_indices(args, None, torch.zeros(n, 1), losses)


def test_high_loss_subset():
    losses = torch.tensor([[1.0, 9, 2, 3, 0], [3.0, 1, 2, 5, 0]])  # two experts; means 2 5 2 4 0
    assert hardest(losses, 2).tolist() == [1, 3]
    assert set(hardest(losses, 4).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("seed", range(5))
def test_sas_against_brute_force(seed):
    """Each pick has the largest gain of all, counted from its definition."""
    x = torch.randn(15, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    unit = x / x.norm(dim=1, keepdim=True)
    similarity = (unit @ unit.T).clamp(min=0)
    chosen = distill.greedy_gains(x, 15).tolist()
    assert sorted(chosen) == list(range(15))
    for step in range(15):
        gains = [similarity[i].sum() - similarity[i, chosen[:step]].sum() for i in chosen[step:]]
        assert gains[0].item() == pytest.approx(max(gains).item())


@pytest.mark.parametrize("size, expected", [
    (10, [5, 3, 2]), (20, [10, 6, 4]), (1, [1, 0, 0]), (3, [1, 1, 1])])
def test_sas_quotas(size, expected):
    """Classes in proportion, the rest to the largest remainders, exactly the size asked for."""
    features = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([7] * 10 + [2] * 6 + [5] * 4)
    indices = distill.sas_indices(features, classes, size)
    assert len(indices) == len(set(indices.tolist())) == size
    assert [(classes[indices] == c).sum().item() for c in (7, 2, 5)] == expected


# ---- KRR-ST ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, dim", [(6, 9), (12, 4)])  # fewer and more images than features
def test_kernel_ridge_is_numpys(size, dim):
    """The dual solution equals that of the normal equations with the same lambda, solved by numpy."""
    torch.manual_seed(0)
    x, z, q = (torch.randn(*shape, dtype=torch.float64) for shape in ((size, dim), (size, 3), (5, dim)))
    ours = distill.kernel_ridge(x, z, q, ridge=1e-3).numpy()
    x1, q1 = (np.concatenate([a.numpy(), np.ones((len(a), 1))], 1) for a in (x, q))
    penalty = 1e-3 * np.trace(x1 @ x1.T)
    dual = q1 @ x1.T @ np.linalg.solve(x1 @ x1.T + penalty * np.eye(size), z.numpy())
    primal = q1 @ np.linalg.solve(x1.T @ x1 + penalty * np.eye(dim + 1), x1.T @ z.numpy())
    np.testing.assert_allclose(ours, dual, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(ours, primal, rtol=1e-9, atol=1e-12)
    if size < dim:  # with next to no ridge the set's own targets come back
        torch.testing.assert_close(distill.kernel_ridge(x, z, x, ridge=1e-12), z, rtol=0, atol=1e-8)


def test_gradient_of_krr_st():
    """In images and targets, float64: autograd through the solve against finite differences, lambda fixed."""
    torch.manual_seed(0)
    net = common.ConvNet(5, image_size=8, channels=1, width=3, depth=2).double()
    images, targets = torch.randn(4, 1, 8, 8).double(), torch.randn(4, 5).double()
    queries, wanted = net.features(torch.randn(7, 1, 8, 8).double()).detach(), torch.randn(7, 5).double()
    features = F.pad(net.features(images), (0, 1), value=1.0)
    penalty = 1e-2 * (features @ features.T).trace().item()

    def loss(images, targets):
        """The same with lambda as a number."""
        x, q = (F.pad(a, (0, 1), value=1.0) for a in (net.features(images), queries))
        kernel = x @ x.T + penalty * torch.eye(4, dtype=torch.float64)
        return F.mse_loss(q @ x.T @ kernel.inverse() @ targets, wanted)

    leaves = [images.requires_grad_(), targets.requires_grad_()]
    assert torch.autograd.gradcheck(loss, leaves)
    predicted = distill.kernel_ridge(net.features(images), targets, queries, ridge=1e-2)
    ours = torch.autograd.grad(F.mse_loss(predicted, wanted), leaves)
    for a, b in zip(ours, torch.autograd.grad(loss(*leaves), leaves)):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# ---- The numbers of an earlier version ---------------------------------------------------------------------

# Of inputs that are sines; steps: norm of theta_N, an element, the matching loss, the norms of its gradient
# in theta, images, targets and lr.
EXACT = {
    "steps_0.0": [3.78956860676132, -0.29473578378729975, 1.192010578392115, 1.5724513617095524,
                  0.04669753787263062, 0.1698283489413826, 1.072226221067088],
    "steps_0.9": [3.8442122710931375, -0.29473578378729975, 1.819892736953512, 2.2934173932390824,
                  0.2180070608477894, 0.6182149171903453, 2.0863184573001927],
    "barlow_twins": [4.250037337874295], "simclr": [2.926233826785486], "ridge": [3.9347780857195547],
    "indices": [3, 2, 29, 24, 15, 12, 18, 27, 14, 16, 12, 22, 28, 27, 5, 13, 17, 3, 2, 19, 4]}
SINGLE = {  # in float32
    "kd": 0.5319181680679321, "supervised": 1.7537386417388916, "barlow_twins": 8.730570793151855,
    "simclr": 3.2836966514587402, "view": 0.4402340054512024, "pixel": 0.004839221015572548,
    "probe": 1.0526904532224346}


def wave(*shape, step=0.7):
    return (torch.arange(torch.Size(shape).numel(), dtype=torch.float64) * step).sin().view(shape)


def test_the_numbers_of_an_earlier_version_in_float64():
    net = common.ConvNet(5, image_size=8, channels=2, width=4, depth=2).double()
    theta, images, targets = 0.3 * wave(325), wave(12, 2, 8, 8, step=1.3), wave(12, 5, step=0.9)
    goal, lr, found = theta + 0.1 * wave(325, step=2.1), torch.tensor(0.3, dtype=torch.float64), {}
    for momentum in (0.0, 0.9):
        leaves = [leaf.clone().requires_grad_() for leaf in (theta, images, targets, lr)]
        end = distill.student_steps(kd_loss(net), *leaves, BATCHES[:4] + BATCHES[5:], momentum)
        loss = distill.matching_loss(end, theta, goal)
        grads = torch.autograd.grad(loss, leaves)
        found[f"steps_{momentum}"] = [end.norm(), end[7], loss, *(g.norm() for g in grads)]
    z1, z2, features = wave(6, 4), wave(6, 4, step=1.1), wave(30, 4, step=1.7)
    found["barlow_twins"] = [common.barlow_twins_loss(z1, z2, 0.3)]
    found["simclr"] = [common.simclr_loss(z1, z2, 0.5)]
    predicted = distill.kernel_ridge(wave(6, 9), wave(6, 3, step=0.2), wave(5, 9, step=0.45), 1e-3)
    found["ridge"] = [predicted.norm()]
    sas = distill.sas_indices(features, torch.arange(30) ** 2 % 4, 9)
    hard = hardest([wave(20), wave(20, step=0.4)], 4)
    found["indices"] = [*distill.greedy_gains(features, 8), *sas, *hard]
    for name, expected in EXACT.items():
        assert [value.item() for value in found[name]] == pytest.approx(expected, rel=1e-9), name


def test_the_numbers_of_an_earlier_version_in_float32():
    data = common.ImageSet(None, None, torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25]))
    net, found = common.ConvNet(6, image_size=16, channels=3, width=4, depth=2), {}
    x, z = ((wave(10, 3, 16, 16, step=0.37) + 1) * 127).to(torch.uint8), wave(10, 6).float()
    theta = (0.3 * wave(common.flatten(net).numel())).float()
    for objective in OBJECTIVES:
        targets = torch.eye(6)[torch.arange(10) % 6] if objective == "supervised" else z
        f = lambda x: common.forward_flat(net, theta, x)  # noqa: E731
        draws = torch.Generator().manual_seed(5)
        found[objective] = common.student_loss(objective, f, x, targets, data, draws)
    view = common.random_view(x, torch.Generator().manual_seed(3))
    found["view"], found["pixel"] = view.mean(), view[4, 1, 7, 9]
    features, labels = wave(40, 6, step=0.31).clamp(min=0), torch.arange(40) % 3
    weight, bias = (part.double() for part in common.linear_probe(features.float(), labels, 3))
    found["probe"] = F.cross_entropy(features @ weight.T + bias, labels) + 1e-3 * weight.square().sum()
    for name, expected in SINGLE.items():
        rel = 1e-6 if name == "probe" else 1e-4  # a minimum is flat
        assert found[name].item() == pytest.approx(expected, rel=rel), name
