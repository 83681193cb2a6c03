"""student_steps against plain autograd through the loop, its memory, the matching loss, a set's start."""

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
    return lambda theta, x, z: nn.functional.mse_loss(common.forward_flat(net, theta, x), z), theta, x, z


def plain_steps(loss_fn, theta, images, targets, lr, batches, momentum=0.0):
    """The same loop for autograd to unroll, as in MTT: the graphs of all steps are kept."""
    velocity = torch.zeros_like(theta)
    for batch in batches:
        (g,) = torch.autograd.grad(loss_fn(theta, images[batch], targets[batch]), theta, create_graph=True)
        velocity = momentum * velocity + g
        theta = theta - lr * velocity
    return theta


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_student_steps_is_exact(momentum):
    loss_fn, theta, images, targets = problem()
    lr = torch.tensor(0.3, dtype=torch.float64)
    # 7 steps; images come back in later batches, one comes twice in a batch, the last batch is small
    batches = [
        torch.tensor(b)
        for b in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [3, 1, 0, 9], [2, 2, 5], [7, 6], [11])
    ]
    goal = theta + 0.1 * torch.randn_like(theta)
    results = []
    for steps in (plain_steps, distill.student_steps):
        leaves = [t.clone().requires_grad_() for t in (theta, images, targets, lr)]
        end = steps(loss_fn, *leaves, batches, momentum)
        loss = distill.matching_loss(end, theta, goal)
        results.append([end.detach(), *torch.autograd.grad(loss, leaves)])
    for expected, ours in zip(*results):
        assert expected.abs().max() > 0
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10 * max(1, expected.abs().max().item()))


def test_student_steps_is_sgd():
    """The forward pass is torch.optim.SGD on the module."""
    torch.manual_seed(0)
    net = common.ConvNet(5, image_size=8, channels=1, width=4, depth=2)
    theta, images, targets = common.flatten(net), torch.randn(6, 1, 8, 8), torch.randn(6, 5)
    batches = [torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5]), torch.tensor([1, 5])]

    def loss_fn(theta, x, z):
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
