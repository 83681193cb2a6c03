"""Randomness, networks, losses, views, the probe and files, each against a plain reference."""

import argparse
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import refuses
from sklearn.linear_model import LogisticRegression

import common
import train_teacher


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator())


def image_set(mean, std):
    return common.ImageSet(None, None, torch.tensor(mean), torch.tensor(std))


# ---- What is drawn -----------------------------------------------------------------------------------------


def test_seeds_follow_from_their_key():
    keys = [(0,), (1,), (1, 2), (2, 1), ("views",), ("views", 1), (1, "views"), (1, "crop"), (1, "views", 2),
            (1, 0), (1, 0, 0), (1, "views", 0)]  # zeros at the end count, too
    assert len({common.seed_of(*key) for key in keys}) == len(keys)
    assert common.seed_of(1, "views", 2) == common.seed_of(1, "views", 2)
    draws = [torch.rand(3, generator=common.generator("cpu", *key)) for key in (keys[6], keys[6], keys[7])]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("n, size, smallest, sizes", [
    (10, 4, 1, [4, 4, 2]), (10, 4, 3, [4, 4]), (10, 5, 1, [5, 5]), (3, 8, 1, [3]), (9, 4, 2, [4, 4])])
def test_shuffled(n, size, smallest, sizes):
    def batches(seed=7, start=0):
        drawn = common.shuffled(n, size, seed, "order", start=start, smallest=smallest)
        return [batch.tolist() for batch in itertools.islice(drawn, 4 * len(sizes) - start)]

    whole = batches()
    assert [len(batch) for batch in whole] == 4 * sizes
    passes = [sum(whole[i : i + len(sizes)], []) for i in range(0, len(whole), len(sizes))]
    for order in passes:
        assert len(set(order)) == sum(sizes) and set(order) <= set(range(n))
        assert len(order) < n or sorted(order) == list(range(n))
    assert len({tuple(order) for order in passes}) > 1 and batches(8) != whole
    for start in range(len(whole)):
        assert batches(start=start) == whole[start:]


# ---- Progress, precision -----------------------------------------------------------------------------------


def test_progress_at_most_every_few_seconds(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    progress = common.Progress("epoch", 40)
    for done in range(1, 40):
        now[0] += 1
        progress(done, loss=torch.tensor(0.5), set="x", pixels_moved=0.25)
    now[0] += 1
    progress(40, loss=0.125)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8  # every five of 40 seconds, the last at its end
    assert lines[0] == "epoch 5/40: loss 0.5, set x, pixels moved 0.25, 5 s, 35 s left"
    assert lines[-1] == "epoch 40/40: loss 0.125, 40 s, 0 s left"


def test_precision():
    net, images, data = common.ConvNet(4, 8, 1, 8, 2), torch.rand(5, 1, 8, 8), image_set([0.0], [1.0])
    exact, tf32, bf16 = (
        common.student_loss("kd", common.in_precision(net, precision), images, torch.ones(5, 4), data)
        for precision in ("fp32", "tf32", "bf16"))
    assert exact == tf32 and bf16.dtype == torch.float32 and 0 < (bf16 - exact).abs() < 0.05 * exact
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    for precision, allowed in (("tf32", True), ("fp32", False)):
        common.set_up(argparse.Namespace(threads=None, precision=precision, device="cpu"))
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == allowed
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


# ---- Networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, depth, parameters", [(32, 3, 1_348_608), (64, 4, 1_496_448)])
def test_convnet_of_the_paper(size, depth, parameters):
    net, x = common.make_student(512, size, 3), torch.randn(2, 3, size, size)
    assert len(net.body) == 4 * depth and common.flatten(net).shape == (parameters,)
    assert net(x).shape == (2, 512) and net.features(x).shape == (2, 2048) and not list(net.buffers())
    assert net.features(torch.randn(1, 3, 96, 96)).shape == (1, 128 * (96 // 2**depth) ** 2)
    convolved = net.body[0](x)
    torch.testing.assert_close(net.body[1](convolved), F.instance_norm(convolved))
    assert [len(common.ConvNet(1, s).body) // 4 for s in (4, 8, 16, 28, 128)] == [2, 2, 2, 3, 5]
    refuses(lambda: common.ConvNet(5, image_size=8, depth=4), "--depth 4", "8 px")
    refuses(lambda: net.features(torch.randn(1, 3, 4, 4)), f"--depth {depth}", "4 px")  # of other images


@pytest.mark.parametrize("blocks, parameters", [((2, 2, 2, 2), 11_168_832), ((1, 1, 1, 1), 4_898_112)])
def test_resnet(blocks, parameters):
    net, x = common.ResNet(blocks).eval(), torch.randn(2, 3, 32, 32)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net(x).shape == (2, 512) and torch.equal(net(x), net.features(x))
    assert net.layer4(net.layer3(net.layer2(net.layer1(net.conv1(x))))).shape == (2, 512, 4, 4)
    narrow, x = common.ResNet(blocks, out_dim=7, channels=1, width=8).eval(), torch.randn(2, 1, 16, 16)
    assert narrow(x).shape == (2, 7) and narrow.features(x).shape == (2, 64)


def test_flat_forward_is_the_module_bit_for_bit():
    net, other = (common.ConvNet(5, image_size=16, channels=1, width=8) for _ in range(2))
    x, theta = torch.randn(4, 1, 16, 16), common.flatten(net)
    assert torch.equal(common.forward_flat(net, theta, x), net(x))
    assert torch.equal(common.forward_flat(other, theta, x), net(x))  # theta counts, not its own weights


def test_flatten_is_a_copy():
    net = nn.Linear(2, 1, bias=False)  # a single parameter: nothing to concatenate
    theta, before = common.flatten(net), net.weight.detach().clone()
    net.weight.data.add_(1)
    assert torch.equal(theta, before.flatten())


def test_principal_components_are_those_of_numpys_svd():
    features = torch.randn(50, 6, generator=generator()) * torch.tensor([3, 2, 1.5, 1, 0.5, 0.2]) + 4
    for dim in (1, 3, 6, 9):
        mean, components, scale = train_teacher.principal_components(features, dim)
        x = features.double().numpy()
        _, singular, rows = np.linalg.svd(x - x.mean(0), full_matrices=False)
        rows, singular = rows[:dim], singular[:dim]
        np.testing.assert_allclose(mean, x.mean(0), atol=1e-5)
        assert components.shape == (min(dim, 6), 6)
        np.testing.assert_allclose(components.T @ components, rows.T @ rows, atol=1e-5)  # the same subspace
        assert scale == pytest.approx((50 * len(rows) / (singular**2).sum()) ** 0.5, rel=1e-5)
        targets = train_teacher.make_targets(features, dim)["targets"]
        torch.testing.assert_close(targets, scale * (features - mean) @ components.T)
        assert targets.square().mean().item() == pytest.approx(1, rel=1e-4)


# ---- Losses ------------------------------------------------------------------------------------------------


def test_barlow_twins_against_a_double_loop():
    z1, z2 = torch.randn(2, 6, 4, generator=generator(), dtype=torch.float64)
    a, b = ((z.numpy() - z.numpy().mean(0)) / z.numpy().std(0) for z in (z1, z2))
    expected = 0.0
    for i, j in itertools.product(range(4), repeat=2):
        f = sum(a[n, i] * b[n, j] for n in range(6)) / 6
        expected += (1 - f) ** 2 if i == j else 0.3 * f**2
    assert common.barlow_twins_loss(z1, z2, 0.3).item() == pytest.approx(expected, rel=1e-9)
    z = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)  # equal and decorrelated
    assert common.barlow_twins_loss(z, z, 1.0).item() == pytest.approx(0, abs=1e-9)


def test_simclr_against_the_formula():
    z1, z2 = torch.randn(2, 5, 3, generator=generator(), dtype=torch.float64)
    z = [v / v.norm() for v in [*z1, *z2]]
    expected = 0.0
    for i in range(10):
        logits = [math.exp((z[i] @ z[j]).item() / 0.5) for j in range(10) if j != i]
        expected -= math.log(math.exp((z[i] @ z[(i + 5) % 10]).item() / 0.5) / sum(logits)) / 10
    assert common.simclr_loss(z1, z2, 0.5).item() == pytest.approx(expected, rel=1e-9)


# ---- Views -------------------------------------------------------------------------------------------------

UNCHANGED = dict(min_crop=1.0, flip=False, jitter=(0, 0, 0, 0))  # but for greyscale and the aspect ratio


@pytest.mark.parametrize("channels, size, extra", [
    (3, 32, {}), (1, 16, dict(flip=False)), (3, 64, dict(size=48))])
def test_views_shape_range_and_seed(channels, size, extra):
    images = pixels(6, channels, size, size)
    view = common.random_view(images, generator(1), **extra)
    assert view.shape == (6, channels, *[extra.get("size", size)] * 2) and view.dtype == torch.float32
    assert view.min() >= 0 and view.max() <= 1 and view.std() > 0
    assert torch.equal(view, common.random_view(images, generator(1), **extra))
    assert not torch.equal(view, common.random_view(images, generator(2), **extra))
    views = common.random_view(images[:1].expand(16, -1, -1, -1), generator(1), **extra)
    assert len({common.fingerprint(view) for view in views}) == 16  # every image has its own draw


def test_views_of_a_part_are_those_of_the_batch():
    images = pixels(9, 3, 16, 16)
    whole = common.random_view(images, generator(1))
    parts = [common.random_view(images[i:][:3], generator(1), part_of=(9, i)) for i in (0, 3, 6)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_view_without_any_change_is_the_image():
    images = pixels(200, 3, 8, 8)
    same = common.random_view(images, generator(), **UNCHANGED)
    grey = (same.amax(1) - same.amin(1)).amax((1, 2)) < 2e-3
    assert 20 < grey.sum() < 60  # with probability 0.2
    # A whole-area crop may still have another aspect ratio; a mild one keeps the mean colour.
    expected = images[~grey].float().mean((2, 3)) / 255
    torch.testing.assert_close(same[~grey].mean((2, 3)), expected, atol=0.1, rtol=0)


@pytest.mark.parametrize("i, name", [(0, "brightness"), (1, "contrast"), (2, "saturation")])
def test_colour_jitter_against_torchvision(i, name):
    """As torchvision has it, by a factor from 0.8 to 1.2, where no value leaves [0, 1]."""
    from torchvision.transforms import functional as TF

    x = torch.rand(1, 3, 8, 8, generator=generator()) * 0.4 + 0.3
    function, jitter, seen = getattr(TF, f"adjust_{name}"), [0, 0, 0, 0], 0
    jitter[i] = 0.2
    for seed in range(12):
        plain = common.random_view(x, generator(seed), **UNCHANGED)
        view = common.random_view(x, generator(seed), **{**UNCHANGED, "jitter": jitter})
        if (plain.amax(1) - plain.amin(1)).max() < 2e-3 or torch.equal(plain, view):
            continue  # grey, or not jittered
        factors = torch.linspace(0.8, 1.2, 401).tolist()
        assert min((function(plain, factor) - view).abs().max().item() for factor in factors) < 2e-3
        seen += 1
    assert seen


def test_denormalise_inverts_normalise():
    images, data = pixels(2, 3, 4, 4), image_set([0.4, 0.5, 0.6], [0.2, 0.3, 0.1])
    back = common.denormalise(common.normalise(images, data), data) * 255
    torch.testing.assert_close(back, images.float())


# ---- The probe ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, f", [(300, 20), (60, 200)])
def test_probe_is_scikit_learns_logistic_regression(n, f):
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(n) % 4)
    features = rng.normal(size=(n, f)) + 0.5 * rng.normal(size=(4, f))[labels]
    features = np.maximum(features, 0)  # as after a ReLU
    x, y = torch.tensor(features, dtype=torch.float32), torch.tensor(labels)
    weight, bias = common.linear_probe(x, y, 4)
    ours = (x @ weight.T + bias).softmax(1).numpy()
    # mean CE + 1e-3 ||W||^2 is, times n, scikit-learn's C sum CE + ||W||^2 / 2 with C = 1 / (2e-3 n)
    reference = LogisticRegression(C=1 / (2e-3 * n), tol=1e-8, max_iter=10_000).fit(features, labels)
    assert np.abs(ours - reference.predict_proba(features)).max() < 1e-3


def test_a_probe_that_diverges_leaves_the_precision_as_it_was():
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    refuses(lambda: common.linear_probe(torch.full((4, 2), math.nan), torch.arange(4), 4), "diverges")
    after, matmul.allow_tf32 = matmul.allow_tf32, before
    assert after


def test_probe_accuracy_with_a_class_not_seen():
    x, y = torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
    assert common.probe_accuracy(x[y < 2], y[y < 2], x, y) == pytest.approx(100 * 8 / 12, abs=1e-3)


# ---- Files -------------------------------------------------------------------------------------------------


def test_save_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.pt"
    common.save(path, {"x": torch.ones(2)})
    with pytest.raises(Exception):  # noqa: B017 - whatever pickle says of a lambda
        common.save(path, {"x": lambda: 0})
    assert torch.equal(common.load(path, {"x": 1}, "nobody")["x"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


GOOD = {"x": torch.ones(2), "lr": 0.1}


@pytest.mark.parametrize("content", [
    b"", b"not a file of torch", None, [1], {"lr": 0.1}, {**GOOD, "x": 1}, {**GOOD, "x": torch.ones(2, 2)},
    {**GOOD, "x": torch.ones(2).double()}, {**GOOD, "x": torch.tensor([1, math.nan])}, {**GOOD, "lr": 0.0},
    {**GOOD, "lr": math.inf}, {**GOOD, "lr": torch.ones(())}, {**GOOD, "options": {"x": torch.ones(2)}}])
def test_load_says_what_to_do(tmp_path, content):
    path = tmp_path / "a.pt"
    torch.save(GOOD, path)
    common.load(path, {"x": 1, "lr": 0}, "train_teacher.py")
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    refuses(lambda: common.load(path, {"x": 1, "lr": 0}, "train_teacher.py"), path, "train_teacher.py")


def test_load_runs_no_code(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (print, ("code was run",))

    torch.save({"x": Evil()}, tmp_path / "a.pt")
    refuses(lambda: common.load(tmp_path / "a.pt", {"x": None}, "nobody"), "a.pt", "nobody")
    assert "code was run" not in capsys.readouterr().out


def test_fingerprint():
    a = torch.arange(6.0)
    assert common.fingerprint(a) == common.fingerprint(a.clone())
    assert len({common.fingerprint(b) for b in (a, a.view(2, 3), a + 1, a.double())}) == 4


def test_a_folder_that_cannot_be_locked(tmp_path):
    (tmp_path / ".lock").mkdir()
    with common.one_at_a_time(tmp_path):
        pass


@pytest.mark.parametrize("rows", [torch.tensor([4, 1]), slice(0, 3), torch.tensor([], dtype=torch.int64)])
def test_fetch(rows):
    images = torch.arange(12).view(6, 2)
    assert torch.equal(common.fetch(common.place(images, "cpu"), rows, "cpu"), images[rows])
