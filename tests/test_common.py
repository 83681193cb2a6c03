"""Networks, losses, views, the probe and files, each against a plain reference."""

import argparse
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

import common


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_progress_at_most_every_few_seconds(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(common.time, "time", lambda: now[0])
    progress = common.Progress("epoch", 4, 1000, "images")
    for done in range(1, 40):
        now[0] += 1
        progress(done / 10, loss=torch.tensor(0.5), set="x", pixels_moved=0.25)
    now[0] += 1
    progress(4, loss=0.125)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8  # every five of 40 seconds, the last at its end
    assert lines[0] == "epoch 0.5/4: loss 0.5000, set x, pixels moved 0.2500, 100 images/s, 35 s left"
    assert lines[-1] == "epoch 4/4: loss 0.1250, 100 images/s, 40 s in all"


def test_precision():
    net, images = common.ConvNet(4, 8, 1, 8, 2), torch.rand(5, 1, 8, 8)
    data = common.ImageSet(None, None, torch.zeros(1), torch.ones(1))
    losses = [
        common.make_objective("kd", data, precision)(net, images, torch.ones(5, 4))
        for precision in ("fp32", "tf32", "bf16")
    ]
    assert all(loss.dtype == torch.float32 for loss in losses) and losses[0] == losses[1]
    assert 0 < (losses[2] - losses[0]).abs() < 0.05 * losses[0]
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    for precision, allowed in (("tf32", True), ("fp32", False)):
        common.set_up(
            argparse.Namespace(threads=None, precision=precision, device="cpu", deterministic=False)
        )
        found = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        assert found == (allowed, allowed)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


# -- networks ------------------------------------------------------------------------------------------------


def test_convnet_of_the_paper():
    net = common.ConvNet(512)
    x = torch.randn(2, 3, 32, 32)
    assert net(x).shape == (2, 512) and net.features(x).shape == (2, 2048)
    assert common.flatten(net).shape == (1_348_608,)
    assert not list(net.buffers())
    tiny = common.ConvNet(512, image_size=64, depth=4)
    assert tiny.features(torch.randn(2, 3, 64, 64)).shape == (2, 2048)
    assert common.flatten(tiny).shape == (1_496_448,)
    assert [common.default_depth(s) for s in (8, 16, 28, 32, 64, 128)] == [2, 2, 3, 3, 4, 5]


def test_convnet_features_of_another_size():
    assert common.ConvNet(10).features(torch.randn(2, 3, 64, 64)).shape == (2, 8192)


def test_instance_norm_of_convnet():
    net = common.ConvNet(5, image_size=8, channels=1, width=4, depth=1)
    x = torch.randn(3, 1, 8, 8)
    convolved = net.body[0](x)
    torch.testing.assert_close(net.body[1](convolved), F.instance_norm(convolved))


@pytest.mark.parametrize("blocks, parameters", [((2, 2, 2, 2), 11_168_832), ((1, 1, 1, 1), 4_898_112)])
def test_resnet(blocks, parameters):
    net = common.ResNet(blocks)
    assert sum(p.numel() for p in net.parameters()) == parameters
    x = torch.randn(2, 3, 32, 32)
    assert net.eval()(x).shape == (2, 512)
    assert torch.equal(net(x), net.features(x))
    assert net.layer4(net.layer3(net.layer2(net.layer1(net.conv1(x))))).shape == (2, 512, 4, 4)
    narrow = common.ResNet(blocks, out_dim=7, channels=1, width=8).eval()
    assert narrow(torch.randn(2, 1, 16, 16)).shape == (2, 7) and narrow.features(
        torch.randn(2, 1, 16, 16)
    ).shape == (2, 64)


def test_flat_forward_is_the_module_bit_for_bit():
    net = common.ConvNet(5, image_size=16, channels=1, width=8)
    x = torch.randn(4, 1, 16, 16)
    theta = common.flatten(net)
    assert torch.equal(common.forward_flat(net, theta, x), net(x))
    other = common.ConvNet(
        5, image_size=16, channels=1, width=8
    )  # theta counts, not the module's own weights
    assert torch.equal(common.forward_flat(other, theta, x), net(x))


def test_flatten_is_a_copy():
    net = nn.Linear(2, 1, bias=False)  # a single parameter: nothing to concatenate, still a copy
    before = common.flatten(net)
    kept = before.clone()
    net.weight.data.add_(1)
    assert torch.equal(before, kept)


def test_flatten_refuses_buffers():
    with pytest.raises(ValueError, match="BatchNorm"):
        common.flatten(nn.BatchNorm2d(3))


# -- losses --------------------------------------------------------------------------------------------------


def test_barlow_twins_against_a_double_loop():
    z1, z2 = torch.randn(2, 6, 4, generator=generator(), dtype=torch.float64)
    a, b = ((z.numpy() - z.numpy().mean(0)) / z.numpy().std(0) for z in (z1, z2))
    expected = 0.0
    for i in range(4):
        for j in range(4):
            f = sum(a[n, i] * b[n, j] for n in range(6)) / 6
            expected += (1 - f) ** 2 if i == j else 0.3 * f**2
    assert common.barlow_twins_loss(z1, z2, 0.3).item() == pytest.approx(expected, rel=1e-9)


def test_barlow_twins_is_zero_for_decorrelated_equal_views():
    z = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    assert common.barlow_twins_loss(z, z, 1.0).item() == pytest.approx(0, abs=1e-9)


def test_simclr_against_the_formula():
    z1, z2 = torch.randn(2, 5, 3, generator=generator(), dtype=torch.float64)
    z = [v / v.norm() for v in [*z1, *z2]]
    expected = 0.0
    for i in range(10):
        logits = [math.exp((z[i] @ z[j]).item() / 0.5) for j in range(10) if j != i]
        expected -= math.log(math.exp((z[i] @ z[(i + 5) % 10]).item() / 0.5) / sum(logits)) / 10
    assert common.simclr_loss(z1, z2, 0.5).item() == pytest.approx(expected, rel=1e-9)


# -- views ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "channels, size, extra", [(3, 32, {}), (1, 16, dict(flip=False)), (3, 64, dict(blur=0.5, solarize=0.2))]
)
def test_views_shape_range_and_seed(channels, size, extra):
    images = torch.randint(0, 256, (6, channels, size, size), dtype=torch.uint8, generator=generator())
    view = common.random_view(images, generator(1), **extra)
    assert view.shape == images.shape and view.dtype == torch.float32
    assert view.min() >= 0 and view.max() <= 1 and view.std() > 0
    assert torch.equal(view, common.random_view(images, generator(1), **extra))
    assert not torch.equal(view, common.random_view(images, generator(2), **extra))


def test_every_image_has_its_own_draw():
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=generator())
    views = common.random_view(image.expand(16, -1, -1, -1), generator(1))
    assert len({tuple(v.flatten().tolist()) for v in views}) == 16


def test_views_of_a_part_are_those_of_the_batch():
    images = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8, generator=generator())
    options = {"blur": 0.5, "solarize": 0.5}
    whole = common.random_view(images, generator(1), **options)
    parts = [
        common.random_view(images[i : i + 3], generator(1), **options, part_of=(9, i)) for i in (0, 3, 6)
    ]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_view_without_any_change_is_the_image():
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator())
    same = common.random_view(images, generator(), min_crop=1.0, flip=False, jitter=(0, 0, 0, 0))
    grey = (same - same.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-3  # a fifth of the views is grey
    # A whole-area crop may still have another aspect ratio; a mild one keeps the mean colour.
    assert not grey.all()
    torch.testing.assert_close(
        same[~grey].mean((2, 3)), images[~grey].float().mean((2, 3)) / 255, atol=0.03, rtol=0
    )


def test_greyscale_keeps_luma():
    x = torch.rand(200, 3, 8, 8, generator=generator())
    views = common.random_view(x, generator(3), min_crop=1.0, flip=False, jitter=(0, 0, 0, 0))
    spread = (views.amax(1) - views.amin(1)).flatten(1).amax(1)
    assert 20 < (spread < 2e-3).sum() < 60  # probability 0.2


def test_colour_jitter_against_torchvision():
    """Brightness, contrast and saturation as torchvision has them, where no value leaves [0, 1]."""
    from torchvision.transforms import functional as TF

    x = torch.rand(1, 3, 8, 8, generator=generator()) * 0.4 + 0.3
    torch.manual_seed(0)
    for jitter, function in [((0.2, 0, 0, 0), TF.adjust_brightness), ((0, 0.2, 0, 0), TF.adjust_contrast),
                             ((0, 0, 0.2, 0), TF.adjust_saturation)]:  # fmt: skip
        base = None
        for seed in range(40):
            plain = common.random_view(x, generator(seed), min_crop=1.0, flip=False, jitter=(0, 0, 0, 0))
            view = common.random_view(x, generator(seed), min_crop=1.0, flip=False, jitter=jitter)
            if (plain.amax(1) - plain.amin(1)).max() < 2e-3 or torch.equal(plain, view):
                continue  # grey, or not jittered
            base = plain
            factors = torch.linspace(0.8, 1.2, 401)
            distance = min((function(base, f.item()) - view).abs().max().item() for f in factors)
            assert distance < 2e-3
        assert base is not None


def test_views_are_differentiable():
    x = torch.rand(3, 3, 16, 16, generator=generator(), requires_grad=True)
    common.random_view(x, generator()).sum().backward()
    assert x.grad.abs().sum() > 0


def test_denormalise_inverts_normalise():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, generator=generator())
    stats = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
    torch.testing.assert_close(
        common.denormalise(common.normalise(images, *stats), *stats) * 255, images.float()
    )


# -- probe ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, f", [(300, 20), (60, 200)])
def test_probe_is_scikit_learns_logistic_regression(n, f):
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(n) % 4)
    features = np.maximum(
        rng.normal(size=(n, f)) + 0.5 * rng.normal(size=(4, f))[labels], 0
    )  # as after a ReLU
    x, y = torch.tensor(features, dtype=torch.float32), torch.tensor(labels)
    weight, bias = common.linear_probe(x, y, 4)
    ours = (x @ weight.T + bias).softmax(1).numpy()
    # mean CE + 1e-3 ||W||^2 is, times n, scikit-learn's C sum CE + ||W||^2 / 2 with C = 1 / (2e-3 n)
    reference = LogisticRegression(C=1 / (2e-3 * n), tol=1e-8, max_iter=10_000).fit(features, labels)
    assert np.abs(ours - reference.predict_proba(features)).max() < 1e-3


def test_probe_accuracy_with_a_class_not_seen():
    x = torch.eye(3).repeat(4, 1)
    y = torch.arange(3).repeat(4)
    seen = y < 2
    assert common.probe_accuracy(x[seen], y[seen], x, y) == pytest.approx(100 * 8 / 12, abs=1e-3)


# -- files ---------------------------------------------------------------------------------------------------


def test_save_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.pt"
    common.save(path, {"x": torch.ones(2)})
    with pytest.raises(Exception):  # noqa: B017 - whatever pickle says of a lambda
        common.save(path, {"x": lambda: 0})
    assert torch.equal(common.load(path, {"x": 1}, "nobody")["x"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(
    "content", [b"", b"not a file of torch", None, {"y": 1}, {"x": 1}, {"x": torch.ones(2, 2)}, [1]]
)
def test_load_says_what_to_do(tmp_path, capsys, content):
    path = tmp_path / "a.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(SystemExit) as stop:
        common.load(path, {"x": 1}, "train_teacher.py")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert str(path) in message and "train_teacher.py" in message


def test_load_runs_no_code(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (print, ("code was run",))

    torch.save({"x": Evil()}, tmp_path / "a.pt")
    with pytest.raises(SystemExit):
        common.load(tmp_path / "a.pt", {"x": None}, "nobody")
    assert "code was run" not in capsys.readouterr().out


def test_fingerprint():
    a = torch.arange(6.0)
    assert common.fingerprint(a) == common.fingerprint(a.clone())
    assert common.fingerprint(a) != common.fingerprint(a.view(2, 3))
    assert common.fingerprint(a) != common.fingerprint(a + 1)
