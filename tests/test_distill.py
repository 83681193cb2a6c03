"""student_steps against plain autograd through the loop, its memory, the matching loss, a set's start."""

import functools

import numpy as np
import pytest
import torch
import torch.nn as nn

import common
import distill


def problem(dtype=torch.float64, size=8, width=4, images=12):
    """A small student and a synthetic set: (loss_fn, theta, images, targets)."""
    torch.manual_seed(0)
    net = common.ConvNet(5, image_size=size, channels=2, width=width, depth=2).to(dtype)
    theta = common.flatten(net)
    x, z = torch.randn(images, 2, size, size, dtype=dtype), torch.randn(images, 5, dtype=dtype)
    return lambda theta, x, z, n: common.mse_loss(common.forward_flat(net, theta, x), z), theta, x, z


def plain_steps(loss_fn, theta, images, targets, lr, batches, momentum=0.0):
    """The same loop for autograd to unroll, as in MTT: the graphs of all steps are kept."""
    velocity = torch.zeros_like(theta)
    for n, batch in enumerate(batches):
        (g,) = torch.autograd.grad(loss_fn(theta, images[batch], targets[batch], n), theta, create_graph=True)
        velocity = momentum * velocity + g
        theta = theta - lr * velocity
    return theta


@pytest.mark.parametrize("momentum, micro_batch", [(0.0, None), (0.9, None), (0.9, 3)])
def test_student_steps_is_exact(momentum, micro_batch):
    loss_fn, theta, images, targets = problem()
    lr = torch.tensor(0.3, dtype=torch.float64)
    # 7 steps; images come back in later batches, one comes twice in a batch, the last batch is small
    batches = [
        torch.tensor(b)
        for b in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [3, 1, 0, 9], [2, 2, 5], [7, 6], [11])
    ]
    goal = theta + 0.1 * torch.randn_like(theta)
    results = []
    for steps in (plain_steps, functools.partial(distill.student_steps, micro_batch=micro_batch)):
        leaves = [t.clone().requires_grad_() for t in (theta, images, targets, lr)]
        end = steps(loss_fn, *leaves, batches, momentum)
        loss = distill.matching_loss(end, theta, goal)
        results.append([end.detach(), *torch.autograd.grad(loss, leaves)])
    for expected, ours in zip(*results):
        assert expected.abs().max() > 0
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10 * max(1, expected.abs().max().item()))


def test_compiled_steps_are_exact(monkeypatch):
    """--compile: forward over reverse gives the same gradient; fused, benchmark.py compares it."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    loss_fn, theta, images, targets = problem()
    lr, batches = torch.tensor(0.3, dtype=torch.float64), [torch.arange(4), torch.arange(8, 12)]
    results = []
    for functions in (None, distill.step_functions(loss_fn, compile=True)):
        leaves = [t.clone().requires_grad_() for t in (theta, images, targets, lr)]
        end = distill.student_steps(loss_fn, *leaves, batches, 0.9, functions)
        results.append([end.detach(), *torch.autograd.grad(end.square().sum(), leaves)])
    for expected, ours in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10 * max(1, expected.abs().max().item()))


def test_student_steps_is_sgd():
    """The forward pass is torch.optim.SGD on the module."""
    torch.manual_seed(0)
    net = common.ConvNet(5, image_size=8, channels=1, width=4, depth=2)
    theta, images, targets = common.flatten(net), torch.randn(6, 1, 8, 8), torch.randn(6, 5)
    batches = [torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5]), torch.tensor([1, 5])]

    def loss_fn(theta, x, z, n):
        return nn.functional.mse_loss(common.forward_flat(net, theta, x), z)

    end = distill.student_steps(loss_fn, theta, images, targets, 0.2, batches, momentum=0.9)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    for batch in batches:
        optimizer.zero_grad()
        nn.functional.mse_loss(net(images[batch]), targets[batch]).backward()
        optimizer.step()
    torch.testing.assert_close(end, common.flatten(net))


def test_no_steps_leave_the_student_where_it_is():
    loss_fn, theta, images, targets = problem()
    images.requires_grad_()
    end = distill.student_steps(loss_fn, theta, images, targets, torch.tensor(0.1, dtype=torch.float64), [])
    assert torch.equal(end, theta)


def peak_bytes(function):
    """Most bytes allocated on the CPU at a time while function runs, beyond what there was before."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        function()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    assert events
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def test_memory_does_not_grow_with_the_steps():
    loss_fn, theta, images, targets = problem(torch.float32, size=16, width=8, images=32)
    images.requires_grad_(), theta.requires_grad_()
    lr = torch.tensor(0.1, requires_grad=True)

    def peak(steps, n):
        batches = [torch.arange(32)] * n
        used = peak_bytes(
            lambda: steps(loss_fn, theta, images, targets, lr, batches).square().sum().backward()
        )
        return used - (n + 1) * theta.numel() * theta.element_size()

    few, many = peak(distill.student_steps, 5), peak(distill.student_steps, 40)
    assert many < 1.15 * few
    assert peak(functools.partial(distill.student_steps, micro_batch=8), 5) < 0.5 * few
    assert peak(plain_steps, 40) > 4 * many  # what it is all for, and that the measure measures


def test_matching_loss():
    loss_fn, theta, images, targets = problem()
    batches = distill.draw_batches(len(images), 5, 9, torch.Generator().manual_seed(0))
    expert = plain_steps(
        loss_fn, theta.requires_grad_(), images, targets, 0.1, batches
    ).detach()  # an expert that is plain SGD

    def loss(lr):
        end = distill.student_steps(
            loss_fn, theta, images, targets, torch.tensor(lr, dtype=torch.float64), batches
        )
        return distill.matching_loss(end, theta, expert).item()

    assert loss(0.0) == pytest.approx(1, abs=1e-12)
    assert loss(0.1) == pytest.approx(0, abs=1e-12)
    assert 0 < loss(0.05) < 1


def test_matching_loss_by_tensors():
    """Each tensor's share of its way is weighed alike, whatever its scale; one that hardly moves is not."""
    start, sizes = torch.zeros(6, dtype=torch.float64), [3, 2, 1]
    target = torch.tensor([100.0, 0, 0, 1, 0, 1e-9], dtype=torch.float64)
    halfway = torch.tensor([50.0, 0, 0, 1, 0, 0], dtype=torch.float64)  # of the large one, all of the small
    assert distill.matching_loss(start, start, target, sizes) == pytest.approx(1)
    assert distill.matching_loss(target, start, target, sizes) == 0
    assert distill.matching_loss(halfway, start, target) == pytest.approx(0.25, abs=1e-3)
    small = 1 / (1 + 10)  # 1 of its own, and a thousandth of 10,001
    assert distill.matching_loss(halfway, start, target, sizes) == pytest.approx(0.25 / (1 + small), rel=1e-2)


def test_batches_pass_over_the_set():
    batches = distill.draw_batches(10, 4, 7, torch.Generator().manual_seed(0))
    assert [len(b) for b in batches] == [4, 4, 2, 4, 4, 2, 4]
    for i in (0, 3):
        assert sorted(torch.cat(batches[i : i + 3]).tolist()) == list(range(10))
    assert not torch.equal(batches[0], batches[3])


def test_high_loss_subset():
    losses = torch.tensor([[1.0, 9, 2, 3, 0], [3.0, 1, 2, 5, 0]])  # two experts; means 2 5 2 4 0
    assert distill.high_loss_indices(losses, 2).tolist() == [1, 3]
    assert set(distill.high_loss_indices(losses, 4).tolist()) == {0, 1, 2, 3}


# -- SAS ----------------------------------------------------------------------------------------------------


def sas_gain(similarity, chosen, i):
    return similarity[i].sum() - sum(similarity[i, j] for j in chosen)


def test_sas_against_brute_force():
    """Each pick has the largest gain of all, counted from its definition."""
    for seed in range(5):
        x = torch.randn(15, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        unit = x / x.norm(dim=1, keepdim=True)
        similarity = (unit @ unit.T).clamp(min=0)
        chosen = distill.greedy_gains(x, 15).tolist()
        assert sorted(chosen) == list(range(15))
        for step, i in enumerate(chosen):
            gains = [sas_gain(similarity, chosen[:step], j) for j in chosen[step:]]
            assert sas_gain(similarity, chosen[:step], i) == pytest.approx(max(gains))


def test_sas_quotas():
    """Classes in proportion, the rest to the largest remainders, exactly the size asked for."""
    features = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([7] * 10 + [2] * 6 + [5] * 4)
    for size, expected in [(10, [5, 3, 2]), (20, [10, 6, 4]), (1, [1, 0, 0]), (3, [1, 1, 1])]:
        indices = distill.sas_indices(features, classes, size)
        assert len(indices) == len(set(indices.tolist())) == size
        assert [(classes[indices] == c).sum().item() for c in (7, 2, 5)] == expected


# -- other objectives ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", common.OBJECTIVES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_of_every_objective_are_exact(objective, momentum):
    """With views that each step draws by its own seed: against plain autograd through the loop, float64."""
    torch.manual_seed(0)
    net = common.ConvNet(5, image_size=8, channels=3, width=4, depth=2).double()
    stats = torch.full((3,), 0.5).double(), torch.full((3,), 0.25).double()
    images = common.normalise(torch.rand(9, 3, 8, 8).double() * 0.8 + 0.1, *stats)
    targets = torch.eye(5).double()[torch.arange(9) % 5]
    objective_fn = common.make_objective(objective, common.ImageSet(None, None, *stats))

    def loss_fn(theta, x, z, n):
        draws = torch.Generator().manual_seed(n)
        return objective_fn(lambda x: common.forward_flat(net, theta, x), x, z, draws)

    theta, lr = common.flatten(net), torch.tensor(0.05, dtype=torch.float64)
    goal = theta + 0.1 * torch.randn_like(theta)
    batches = [torch.tensor(b) for b in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 0, 3], [2, 2, 5, 1])]
    results = []
    for steps in (plain_steps, distill.student_steps):
        leaves = [t.clone().requires_grad_() for t in (theta, images, targets, lr)]
        end = steps(loss_fn, *leaves, batches, momentum)
        loss = distill.matching_loss(end, theta, goal)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        results.append([end.detach(), *grads])
    for expected, ours in zip(*results):
        assert expected.abs().max() > 0 or (objective in common.SSL and ours.shape == targets.shape)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10 * max(1, expected.abs().max().item()))


# -- KRR-ST --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size,dim", [(6, 9), (12, 4)])  # fewer and more images than features
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


def test_kernel_ridge_interpolates():
    """With next to no ridge and more features than images, the set's own targets come back."""
    torch.manual_seed(0)
    x, z = torch.randn(6, 9, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    torch.testing.assert_close(distill.kernel_ridge(x, z, x, ridge=1e-12), z, rtol=0, atol=1e-8)


def test_gradient_of_krr_st():
    """In images and targets, float64: autograd through the solve against finite differences, lambda fixed."""
    torch.manual_seed(0)
    net = common.ConvNet(5, image_size=8, channels=1, width=3, depth=2).double()
    images, targets = torch.randn(4, 1, 8, 8).double(), torch.randn(4, 5).double()
    queries, wanted = net.features(torch.randn(7, 1, 8, 8).double()).detach(), torch.randn(7, 5).double()
    features = nn.functional.pad(net.features(images), (0, 1), value=1.0)
    penalty = 1e-2 * (features @ features.T).trace().item()

    def loss(images, targets):
        """The same with lambda as a number."""
        x, q = (nn.functional.pad(a, (0, 1), value=1.0) for a in (net.features(images), queries))
        kernel = x @ x.T + penalty * torch.eye(4, dtype=torch.float64)
        return nn.functional.mse_loss(q @ x.T @ kernel.inverse() @ targets, wanted)

    leaves = [images.requires_grad_(), targets.requires_grad_()]
    assert torch.autograd.gradcheck(loss, leaves)
    predicted = distill.kernel_ridge(net.features(images), targets, queries, ridge=1e-2)
    ours = torch.autograd.grad(nn.functional.mse_loss(predicted, wanted), leaves)
    for a, b in zip(ours, torch.autograd.grad(loss(*leaves), leaves)):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_pool_student_trains_on_the_set():
    student = distill.PoolStudent(lambda: common.ConvNet(5, 8, 1, 4, 2), seed=3)
    images, targets = torch.randn(6, 1, 8, 8, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    before = nn.functional.mse_loss(student.net(images), targets).item()
    student.train(images, targets, 20)
    assert student.steps == 20 and nn.functional.mse_loss(student.net(images), targets).item() < before
    assert images.grad is None and targets.grad is None
    again = distill.PoolStudent(lambda: common.ConvNet(5, 8, 1, 4, 2), seed=3)
    again.train(images, targets, 20)
    assert torch.equal(common.flatten(again.net), common.flatten(student.net))
