"""Each stage, tiny: what it writes, the same seed the same file, what it says of files that do not fit."""

import functools
import gc
import json
import math
import os
import re
import shutil
import stat
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import DATA, DISTILL, EVALUATE, EXPERTS, ROOT, TEACHER, refuses
from conftest import run_stage as stage
from PIL import Image

import common
import distill
import evaluate

N, S, D = 150, 15, 32  # real images, images of a set, dimension of the targets
OPTIONS = {"train_teacher": TEACHER, "train_experts": EXPERTS, "distill": DISTILL, "evaluate": EVALUATE}
TWO_CELLS = "--seeds 0 --sets none mkdt_random"  # of evaluate.py; two labelled fractions each


def read(path):
    return torch.load(path, weights_only=True)


def log(path):
    """The records of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(name, folder, options=""):
    """A stage in a folder; the options are words of a text, and override those of conftest.py."""
    stage(name, [*OPTIONS[name], "--out_dir", folder, *options.split()])


def refused(name, folder, options, *words):
    return refuses(lambda: run(name, folder, options), *words, what=options)


def fails(capsys, folder, options, *words):
    """evaluate.py ends with status 2 and a line an error; each of the words is in one of them."""
    capsys.readouterr()
    try:
        run("evaluate", folder, options)
    except SystemExit as stop:
        status = stop.code
    gc.collect()  # what a Problem's traceback holds, with the lock of the log
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and all(line.startswith("error: ") for line in lines)
    for word in words:
        assert sum(str(word) in line for line in lines) == 1, (word, lines)


def rows(path):
    """{title: the other cells} of the rows of a table, with its head."""
    lines = [line.strip("|").split("|") for line in path.read_text().splitlines() if line.startswith("|")]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines if line[0] != "---"}


def accuracies(folder, *sets):
    """(sets, seeds 0 and 1) of results.jsonl, at 20 % of the labels."""
    found = {(r["set"], r["fraction"], r["seed"]): r["accuracy"] for r in log(folder / "results.jsonl")}
    return np.array([[found[name, 0.2, seed] for seed in (0, 1)] for name in sets])


def digits():
    return common.load_images("digits", "train", "data", limit=N)


def student():
    return common.ConvNet(D, 8, 1, 8, 2)


# -- what the files hold -------------------------------------------------------------------------------------


def test_teacher_files(run_dir):
    teacher, targets = read(run_dir / "teacher.pt"), read(run_dir / "targets.pt")
    assert set(teacher) == {"encoder", "options", "images_id"}
    assert set(targets) == {"targets", "options", "images_id"}
    assert targets["targets"].shape == (N, D) and targets["targets"].dtype == torch.float32
    assert targets["options"]["train_teacher"]["ssl"] == "barlow_twins"
    # The targets are the saved encoder's features of the un-augmented images, in eval mode, in order.
    encoder, train = common.ResNet(channels=1, width=4), digits()
    encoder.load_state_dict(teacher["encoder"])
    features = evaluate.encode(encoder.eval(), train.images, train, "cpu")
    torch.testing.assert_close(features, targets["targets"])
    assert not [*run_dir.glob("features*")]
    assert 0 <= log(run_dir / "train_teacher.jsonl")[-1]["probe_accuracy"] <= 100


def test_expert_files(run_dir):
    paths = sorted((run_dir / "experts").iterdir())
    assert [p.name for p in paths] == ["0000.pt", "0001.pt", "0002.pt"]
    first, expert = read(paths[0]), read(paths[1])
    keys = {"trajectory", "example_loss", "options", "images_id", "targets_id"}
    assert set(expert) == keys and set(expert["options"]) == {"train_teacher", "train_experts"}
    net, t = student(), expert["trajectory"]
    assert t.shape == (4, common.flatten(net).numel()) and expert["example_loss"].shape == (N,)
    assert all((a != b).any() for a, b in zip(t, t[1:]))  # no two snapshots are the same,
    assert (t[0] != first["trajectory"][0]).any()  # and no two experts
    # example_loss is that of the weights after the first epoch.
    nn.utils.vector_to_parameters(t[1], net.parameters())
    train = digits()
    outputs = evaluate.encode(net, train.images, train, "cpu")
    squares = (outputs - read(run_dir / "targets.pt")["targets"]) ** 2
    torch.testing.assert_close(expert["example_loss"], squares.mean(1))


def test_an_expert_by_hand(copy):
    """An epoch of plain SGD on the shuffled images."""
    shutil.rmtree(copy / "experts")
    run("train_experts", copy, "--num_experts 2 --epochs 1 --momentum 0 --weight_decay 0")
    start, end = read(copy / "experts/0001.pt")["trajectory"]
    net, train, targets = student(), digits(), read(copy / "targets.pt")["targets"]
    x, batches = common.normalise(train.images, train), common.shuffled(N, 50, 0, "expert", 1)
    for _ in range(3):
        batch, theta = next(batches), start.requires_grad_()
        loss = F.mse_loss(common.forward_flat(net, theta, x[batch]), targets[batch])
        start = (theta - 0.1 * torch.autograd.grad(loss, theta)[0]).detach()
    torch.testing.assert_close(start, end)


def test_set_files(run_dir):
    names = {"subset_random", "subset_high_loss", "mkdt_random", "mkdt_high_loss"}
    files = {f"{name}{ending}" for name in names for ending in (".pt", ".png")}
    assert {p.name for p in (run_dir / "sets").iterdir()} == files
    train, targets = digits(), read(run_dir / "targets.pt")["targets"]
    keys = {"images", "targets", "lr", "indices", "mean", "std", "options", "images_id", "targets_id"}
    for name in names:
        contents = read(run_dir / "sets" / f"{name}.pt")
        assert ("experts_id" in contents) == (name != "subset_random")  # which needs none
        contents.pop("experts_id", None)
        images, indices, lr = (contents[key] for key in ("images", "indices", "lr"))
        assert set(contents) == keys and images.shape == (S, 1, 8, 8) and images.dtype == torch.float32
        assert isinstance(lr, float) and lr > 0 and indices.shape == (S,)
        assert torch.equal(contents["targets"], targets[indices])  # Z_syn is not learnt by default
        real = common.normalise(train.images[indices], train)
        if name.startswith("subset"):
            assert torch.equal(images, real) and lr == pytest.approx(0.1)
        else:  # one iteration has moved images and lr, and the last update is in the file
            assert (images != real).any() and lr != pytest.approx(0.1, abs=1e-12)
    losses = sum(read(path)["example_loss"] for path in (run_dir / "experts").iterdir())
    hardest = read(run_dir / "sets/mkdt_high_loss.pt")["indices"].tolist()
    assert set(hardest) == set(losses.argsort(descending=True)[:S].tolist())


def test_results(run_dir):
    records = log(run_dir / "results.jsonl")
    sets = {"none", "full", "subset_random", "subset_high_loss", "mkdt_random", "mkdt_high_loss"}
    cells = {(s, f, seed) for s in sets for f in (0.2, 0.4) for seed in (0, 1)}
    assert {(r["set"], r["fraction"], r["seed"]) for r in records} == cells
    assert len(records) == 24 and all(0 <= r["accuracy"] <= 100 for r in records)
    table = rows(run_dir / "results.md")
    assert table["pre-training set; labels of digits"] == [
        "n", "20 % labels", "difference", "40 % labels", "difference"]
    assert list(table)[1:] == [
        "no pre-training", "random subset", "high-loss subset", "MKDT (random init)", "MKDT", "full data"]
    none, base = accuracies(run_dir, "none", "subset_random")
    std, error = none.std(ddof=1), (none - base).std(ddof=1) / 2**0.5
    expected = ["2", f"{none.mean():.2f} ± {std:.2f}", f"{(none - base).mean():+.2f} ± {error:.2f}"]
    assert table["no pre-training"][:3] == expected and table["random subset"][2] == ""


def test_figure(copy, capsys, monkeypatch):
    """Without matplotlib there is none, and all else is as with it."""
    (copy / "results.png").unlink(missing_ok=True)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)  # not installed
        run("evaluate", copy)
    assert "matplotlib" in capsys.readouterr().out and not (copy / "results.png").exists()
    with monkeypatch.context() as patch:
        def invalid(*words):
            raise ValueError("Key backend: 'module://x'\nis no")  # as with MPLBACKEND of a notebook

        patch.setattr(evaluate, "save_figure", invalid)
        run("evaluate", copy)
    said = capsys.readouterr().out
    assert "no pre-training" in said and "it needs matplotlib: Key backend: 'module://x'\n" in said
    pytest.importorskip("matplotlib")
    run("evaluate", copy)
    assert (copy / "results.png").read_bytes()[:4] == b"\x89PNG"


def test_a_log_without_git(run_dir, tmp_path, monkeypatch):
    """The first record of a start says how it was made all the same."""
    monkeypatch.setenv("PATH", "")
    shutil.copy(run_dir / "targets.pt", tmp_path)
    run("distill", tmp_path, "--init random --iters 0")
    (record,) = log(tmp_path / "distill_subset_random.jsonl")
    assert record["step"] == 0 and {"command", "options", "torch", "time"} <= set(record)


def test_files_can_be_read_by_others(run_dir):
    os.umask(umask := os.umask(0))
    for path in run_dir.rglob("*.*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path


def test_same_seed_same_files(run_dir, tmp_path):
    def same(path, *keys):
        again, before = read(tmp_path / path), read(run_dir / path)
        return all(torch.equal(torch.as_tensor(again[key]), torch.as_tensor(before[key])) for key in keys)

    run("train_teacher", tmp_path)
    run("train_experts", tmp_path, "--first_expert 2 --num_experts 1")  # alone as among many
    refused("train_experts", tmp_path, "--lr 0.3", "0002.pt", "--lr 0.3")  # distill.py wants all alike
    run("train_experts", tmp_path)
    run("distill", tmp_path, "--iters 1")
    run("evaluate", tmp_path, "--sets none mkdt_high_loss")
    assert same("targets.pt", "targets") and same("sets/mkdt_high_loss.pt", "images", "lr")
    assert all(same(f"experts/000{k}.pt", "trajectory", "example_loss") for k in range(3))
    before = log(run_dir / "results.jsonl")
    assert all(record in before for record in log(tmp_path / "results.jsonl"))


def test_a_finished_stage_is_not_run_again(copy):
    def everything():
        files = [*copy.glob("*.pt"), *copy.glob("*/*.pt"), copy / "results.jsonl"]
        return {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in files}

    before = everything()
    for name in OPTIONS:
        run(name, copy, "--iters 1" if name == "distill" else "")
    assert everything() == before


def test_only_what_is_missing_or_failed_is_measured(copy):
    """Whose record is cut off, broken, or says that it failed: the last of a cell counts."""
    path, table = copy / "results.jsonl", (copy / "results.md").read_text()
    before = log(path)
    path.write_text(path.read_text()[:-40])  # killed while writing the last record
    run("evaluate", copy)
    assert common.read_records(path) == before
    for accuracy in (None, 1e9, [1], "x"):
        with open(path, "ab") as file:
            for record in ({**before[0], "accuracy": accuracy}, {**before[0], "set": [1]}, {}, 3):
                file.write(json.dumps(record).encode() + b"\n\xff\xfe\n")
        n = len(path.read_bytes().splitlines())
        run("evaluate", copy)
        assert len(path.read_bytes().splitlines()) == n + 1
        assert common.read_records(path)[-1] == before[0] and (copy / "results.md").read_text() == table


def test_a_cell_that_failed(copy, monkeypatch, capsys):
    """It is a record without accuracy and shows in the table; the next start measures it again."""
    table, probe = (copy / "results.md").read_text(), evaluate.probe
    (copy / "results.jsonl").unlink()

    def broken(net, train, test, fractions, args, seed, name):
        if seed == 1:
            raise common.Problem("the probe broke")
        return probe(net, train, test, fractions, args, seed, name)

    monkeypatch.setattr(evaluate, "probe", broken)
    fails(capsys, copy, "--sets none subset_random")
    failed = [record for record in log(copy / "results.jsonl") if record["accuracy"] is None]
    assert len(failed) == 4
    n, accuracy, difference, *_ = rows(copy / "results.md")["no pre-training"]
    assert n == "2" and accuracy.endswith(" (1 failed)") and difference == ""
    monkeypatch.setattr(evaluate, "probe", probe)
    run("evaluate", copy)
    assert len(log(copy / "results.jsonl")) == 8 + 20 and (copy / "results.md").read_text() == table


def test_a_probe_that_is_not_finite(copy, monkeypatch, capsys):
    """It is a failed cell, one line for all seeds; the table of before stays where nothing was measured."""
    features = common.ConvNet.features
    for size in (1e12, 1e30, math.inf):
        with monkeypatch.context() as patch:
            patch.setattr(common.ConvNet, "features", lambda self, x, size=size: features(self, x) * size)
            (copy / "results.jsonl").unlink()
            before = (copy / "results.md").read_text()
            fails(capsys, copy, "--sets none", "none, seed 0: the linear probe")
        assert [record["accuracy"] for record in log(copy / "results.jsonl")] == [None] * 4
        assert (copy / "results.md").read_text() == before


def test_one_line_for_a_cause(copy, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "probe", Mock(side_effect=common.Problem("the probe broke")))
    (copy / "results.jsonl").unlink()
    with pytest.raises(SystemExit):
        run("evaluate", copy, "--sets none subset_random")
    causes = [f"error: {name}, seed 0: the probe broke" for name in ("none", "subset_random")]
    assert sorted(capsys.readouterr().err.splitlines()) == causes


def test_a_mistake_and_sets_that_are_no_row(copy, capsys):
    """A network that cannot be is refused before anything is written; sets made otherwise fail."""
    before = {path: path.read_bytes() for path in copy.glob("results.*")}
    refused("evaluate", copy, "--depth 9", "--depth 9")
    assert before == {path: path.read_bytes() for path in copy.glob("results.*")}
    run("distill", copy, "--init random --iters 1 --seed 1 --fraction 0.2")
    fails(capsys, copy, "--sets mkdt_random",
          "mkdt_random_seed1.pt: was made with --fraction 0.2, now --fraction 0.1; sets of a row")
    assert "(2 failed)" in (copy / "results.md").read_text()


def test_other_sets_and_images_are_measured_again(copy, monkeypatch):
    """What an accuracy was measured on counts, whatever its name."""
    def measured():
        run("evaluate", copy, "--sets none mkdt_random")
        return len(log(copy / "results.jsonl"))

    path, load_images, before = copy / "sets/mkdt_random.pt", common.load_images, measured()
    contents = read(path)
    torch.save({**contents, "lr": contents["lr"] / 2}, path)
    assert measured() == before + 4

    def darker(name, split, *rest):
        part = load_images(name, split, *rest)
        return part._replace(images=part.images // 2) if split == "test" else part

    monkeypatch.setattr(common, "load_images", darker)
    assert measured() == before + 12


@pytest.mark.parametrize("dim, left", [(5, 5), (100, D)])
def test_principal_components_as_targets(copy, dim, left):
    """--target_dim: so many components of the features, without their mean, at one scale."""
    raw, teacher = read(copy / "targets.pt")["targets"], (copy / "teacher.pt").read_bytes()
    refused("train_teacher", copy, f"--target_dim {dim}", "targets.pt", f"--target_dim {dim}")
    (copy / "targets.pt").unlink()
    run("train_teacher", copy, f"--target_dim {dim}")
    found = read(copy / "targets.pt")
    targets, components = found["targets"], found["components"]
    assert targets.shape == (N, left) and components.shape == (left, D)
    torch.testing.assert_close(targets, found["scale"] * (raw - found["mean"]) @ components.T)
    assert targets.square().mean().item() == pytest.approx(1, rel=1e-4)
    assert targets.mean(0).abs().max() < 1e-4 and (targets.var(0).diff() <= 1e-6).all()
    # The teacher was not trained again, either way.
    (copy / "targets.pt").unlink()
    run("train_teacher", copy)
    assert torch.equal(read(copy / "targets.pt")["targets"], raw)
    assert (copy / "teacher.pt").read_bytes() == teacher
    assert sum("epoch" in record for record in log(copy / "train_teacher.jsonl")) == 1


def test_own_teacher(run_dir, tmp_path):
    """A ResNet-18 that is put into the folder as teacher.pt gives the targets, and is not trained."""
    weights, own = read(run_dir / "teacher.pt")["encoder"], tmp_path / "teacher.pt"
    torch.save({"encoder": {**weights, "fc.weight": torch.zeros(3, D)}}, own)
    before = own.read_bytes()
    run("train_teacher", tmp_path)
    ours = read(tmp_path / "targets.pt")["targets"]
    torch.testing.assert_close(ours, read(run_dir / "targets.pt")["targets"])
    assert own.read_bytes() == before
    (tmp_path / "targets.pt").unlink()
    refused("train_teacher", tmp_path, "--width 8", own, "--width 8")
    poisoned = {name: value * float("nan") for name, value in weights.items()}
    for wrong in ([1], {1: torch.ones(2)}, 3, torch.ones(2), poisoned):
        torch.save({"encoder": wrong}, own)
        refused("train_teacher", tmp_path, "", own)
    assert not (tmp_path / "targets.pt").exists()


HUBCONF = """
import collections
import torch
def tiny():
    body = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    return torch.nn.Sequential(collections.OrderedDict(body=body, fc=torch.nn.Linear(3, 1000)))
def broken():
    raise OSError("https://example.org/weights.pth is not to be reached\\nTraceback")
class Wrong(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f
    def forward(self, x):
        return self.f(x)
def twice(): return Wrong(lambda x: torch.zeros(2 * len(x), 3))
def constant(): return Wrong(lambda x: torch.ones(len(x), 3, dtype=torch.float64))
def a_dict(): return Wrong(lambda x: {"out": x})
def no_module(): return 3
def leaves(): raise SystemExit(3)
"""


def test_any_encoder(tmp_path, monkeypatch):
    """--encoder: torch.hub's of a folder, torchvision's with the weights that lie in its cache."""
    hub, out, cache = tmp_path / "hub", tmp_path / "out", tmp_path / "cache/hub/checkpoints"
    hub.mkdir()
    (hub / "hubconf.py").write_text(HUBCONF)
    run("train_teacher", out, f"--encoder hub:{hub}:tiny")
    targets, images = read(out / "targets.pt")["targets"], digits().images
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    middle = F.interpolate(images.float() / 255, 256, mode="bilinear", antialias=True)[..., 16:240, 16:240]
    torch.testing.assert_close(targets, (middle.mean((1, 2, 3)).view(-1, 1) - mean) / std, atol=0.02, rtol=0)
    assert not (out / "teacher.pt").exists()
    run("train_experts", out, "--num_experts 1 --epochs 1")  # goes on from there

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    file, option = "squeezenet1_1-b8a52dc0.pth", "torchvision:squeezenet1_1"

    def offline(url, *words, **more):
        raise OSError("no network")

    for name in ("download_url_to_file", "urlopen"):
        monkeypatch.setattr(torch.hub, name, offline)
    refused("train_teacher", tmp_path / "x", f"--encoder {option}", f"models/{file} belongs into {cache}")
    cache.mkdir(parents=True, exist_ok=True)
    net = torchvision.models.squeezenet1_1().eval()
    torch.save(net.state_dict(), cache / file)
    run("train_teacher", tmp_path / "x", f"--limit 20 --target_dim 8 --encoder {option}")
    contents = read(tmp_path / "x/targets.pt")
    assert contents["targets"].shape == (20, 8) and contents["components"].shape == (8, 512)
    net.classifier[1] = torch.nn.Identity()
    preprocess = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT.transforms()
    images = common.load_images("digits", "train", tmp_path, limit=20).images.expand(-1, 3, -1, -1)
    with torch.no_grad():
        features = net(preprocess(images)).flatten(1) - contents["mean"]
    expected = contents["scale"] * features @ contents["components"].T
    torch.testing.assert_close(contents["targets"], expected, atol=1e-3, rtol=1e-3)

    (hub / "common.py").write_text("import torch\ndef net(): return torch.nn.AdaptiveAvgPool2d(2)\n")
    (hub / "hubconf.py").write_text(HUBCONF + "import common\ndef own(): return common.net()\n")
    run("train_teacher", tmp_path / "own", f"--encoder hub:{hub}:own")
    assert read(tmp_path / "own/targets.pt")["targets"].shape == (N, 12) and sys.modules["common"] is common

    for option, *words in [("torchvision:nothing", "list_models"), ("timm:resnet50", "hub:DIR:NAME"),
                           (f"hub:{hub}:broken", "example.org/weights.pth"), (f"hub:{hub}:none", "none"),
                           (f"hub:{hub}:twice", "(128, 3) for 64 images"), (f"hub:{hub}:a_dict", "dict"),
                           (f"hub:{hub}:no_module", "int"), (f"hub:{hub}:leaves", "SystemExit"), ("hub:x",),
                           (f"hub:{hub}/lite:x", f"no folder {hub}/lite"),
                           ("hub:no/where:x", "https://github.com/no/where", "hub:DIR:x")]:
        refused("train_teacher", tmp_path / "y", f"--encoder {option}", f"--encoder {option}", *words)
    refused("train_teacher", tmp_path / "y", f"--encoder hub:{hub}:constant --target_dim 2", "are the same")
    assert not (tmp_path / "y/targets.pt").exists()


# -- distillation --------------------------------------------------------------------------------------------


def test_every_expert_and_start_epoch_is_used(copy):
    """Also with the options of the authors' code."""
    run("distill", copy, "--iters 40 --syn_steps 1 --lr_targets 1 --inner_momentum 0.9 --name long")
    records = log(copy / "distill_long.jsonl")[1:]
    assert {(r["expert"], r["start_epoch"]) for r in records} == {(k, t) for k in range(3) for t in range(2)}
    contents, targets = read(copy / "sets/long.pt"), read(copy / "targets.pt")["targets"]
    assert (contents["targets"] != targets[contents["indices"]]).any()


def test_the_learnt_alpha(copy):
    """It stays positive; learnt as a logarithm, a step is a factor, and a rate of 0 leaves it alone."""
    for name, rate in [("wild", "10"), ("still", "0 --log_lr"), ("fast", "1 --log_lr")]:
        run("distill", copy, f"--init random --iters 3 --lr_init 0.2 --lr_img 0 --name {name} --lr_lr {rate}")
    logs = {name: log(copy / f"distill_{name}.jsonl")[1:] for name in ("wild", "still", "fast")}
    rates = {name: [record["lr"] for record in records] for name, records in logs.items()}
    assert min(rates["wild"]) > 0 and rates["still"] == pytest.approx([0.2] * 3)
    assert abs(math.log(rates["fast"][-1] / 0.2)) > 1e-3
    assert all(read(copy / f"sets/{name}.pt")["lr"] == rates[name][-1] for name in rates)


def test_the_best_rate_of_the_start(copy):
    """--lr_init auto tries rates on the experts; a plain subset keeps the best, MKDT starts from it."""
    run("distill", copy, "--init random --iters 0 --lr_init auto")
    records = log(copy / "distill_subset_random_auto.jsonl")
    (record,) = [record for record in records if "rates_tried" in record]
    tried = {float(rate): loss for rate, loss in record["rates_tried"].items()}
    best = min(tried, key=tried.get)
    assert len(tried) >= 3 and {best / 2, best * 2} <= set(tried)  # a least loss, between higher ones
    assert read(copy / "sets/subset_random_auto.pt")["lr"] == pytest.approx(best)
    more = "--inner_momentum 0.9 --log_lr --lr_lr 0"  # momentum as the subset has
    run("distill", copy, f"--init random --iters 1 --lr_init auto {more} --name learnt")
    *_, tries, step = log(copy / "distill_learnt.jsonl")
    assert tries == record and step["lr"] == pytest.approx(best)
    run("distill", copy, "--init random --iters 0 --lr_init auto --max_start_epoch 9 --name x")
    shutil.rmtree(copy / "experts")
    refused("distill", copy, "--init random --iters 0 --lr_init auto --name y", "train_experts.py")
    run("distill", copy, "--init random --iters 0 --name y")  # wants none
    run("evaluate", copy, "--sets none subset_random_auto --seeds 0 --name auto")  # the base of differences
    text = (copy / "auto.md").read_text()
    assert "| difference |" in text and "Differences to the random subset, lr by --lr_init auto: " in text


def test_subsets_by_clusters(copy):
    run("distill", copy, "--init sas --iters 0")
    assert len(set(read(copy / "sets/subset_sas.pt")["indices"].tolist())) == S
    options = "--init sas --iters 0"
    many = "--num_latent_classes 151"
    refused("distill", copy, f"{options} {many} --name x", many, "150")


def test_krr_st(copy, monkeypatch):
    """Images and targets are learnt, the loss falls, and students start anew after --pool_steps steps."""
    options = "--method krr_st --iters 40 --pool_size 2 --pool_steps 5 --batch_real 100 --lr_img 0.02"
    run("distill", copy, f"{options} --augment flip")  # which it has no use for
    run("distill", copy, options)
    contents, real = read(copy / "sets/krr_st_random.pt"), read(copy / "targets.pt")["targets"]
    assert (contents["targets"] != real[contents["indices"]]).any() and contents["lr"] == pytest.approx(0.1)
    records = log(copy / "distill_krr_st_random.jsonl")[1:]
    losses = [record["regression_loss"] for record in records]
    assert len(losses) == 40 and sum(losses[-10:]) < sum(losses[:10])
    for k in (0, 1):  # the counter runs up to 5 and starts again at 0, in every student of the pool
        counts = [record["steps"] for record in records if record["student"] == k]
        assert all(b == (a + 1) % 6 for a, b in zip(counts, counts[1:]))
    assert sum(record["steps"] == 5 for record in records) > 2


def test_clipped_gradient(copy):
    """--clip_grad bounds the norm of the pixels' gradient, which the log holds as it was; alpha's follows."""
    start, moved, factor = read(copy / "sets/subset_random.pt")["images"], {}, {}
    for name, more in {"free": "", "clipped": "--clip_grad 1e-5"}.items():
        run("distill", copy, f"--iters 1 --init random --lr_img 1 --log_lr --lr_lr 1 --name {name} {more}")
        made = read(copy / f"sets/{name}.pt")
        moved[name], factor[name] = (made["images"] - start).norm().item(), math.log(made["lr"] / 0.1)
        norm = log(copy / f"distill_{name}.jsonl")[-1]["gradient_norm"]
        assert norm == pytest.approx(moved["free"], rel=1e-2)
    assert moved["free"] > 2e-5 and moved["clipped"] == pytest.approx(1e-5, rel=1e-1)
    shrunk = moved["clipped"] / moved["free"]
    assert abs(factor["free"]) > 1e-3 and factor["clipped"] == pytest.approx(shrunk * factor["free"], rel=0.2)


def test_compile(copy, monkeypatch):
    """--compile makes the same experts and set, up to rounding; a finished run does not mind it."""
    expert, made, compile = copy / "experts/0001.pt", copy / "sets/mkdt_random.pt", torch.compile

    def both(backend):
        monkeypatch.setattr(torch, "compile", functools.partial(compile, backend=backend))
        run("train_experts", copy, "--compile")
        run("distill", copy, "--init random --iters 1 --compile")
        return read(expert)["trajectory"], read(made)["images"]

    def no_compiler(graph, inputs):
        raise RuntimeError("No working C++ compiler found")

    def no_space(graph, inputs):
        raise RuntimeError("C++ compile error")

    before = both(no_compiler)  # nothing to do
    expert.unlink()
    made.unlink()
    for a, b in zip(both("eager"), before):  # aot_eager of torch 2.14 mistakes the strides of one channel
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    made.unlink()
    refuses(lambda: both(no_compiler), "--compile", "needs a C++ compiler", "--no-compile")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/a b/c")
    said = refuses(lambda: both(no_space), "--compile", "raised:; /a b/c has a space in its name")
    assert "needs" not in said


# -- students and data of a fork -----------------------------------------------------------------------------


VIT = {"nn": nn, "torch": torch, "F": F}  # the README's student: attention and dropout
exec(re.search(r"```python\n(class ViT.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1], VIT)


def without_dropout(net):
    for module in net.modules():
        if isinstance(module, (nn.Dropout, nn.MultiheadAttention)):
            setattr(module, "p" if isinstance(module, nn.Dropout) else "dropout", 0.0)


def test_the_set_to_take_away():
    """Is small, knows no images, and a network trains on it by the README's lines."""
    path, keys = ROOT / "results/lite0/32px/best_random.pt", {"images": 4, "targets": 2, "mean": 1, "lr": 0}
    found = torch.load(path, weights_only=True)
    assert path.stat().st_size < 7e6 and not {"images_id", "indices"} & set(found)
    assert found["images"].shape == (1000, 3, 32, 32) and found["images"].dtype == torch.float16
    assert common.load(path, keys, "")["targets"].dtype == torch.float32
    lines, names = re.search(r"```python\n(import.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1], {}
    for word, other in ((".split(250)", ".split(50)[:1]"), ("results/", f"{ROOT}/results/")):
        assert word in lines
        lines = lines.replace(word, other)
    exec(lines, names)
    assert any((p.grad != 0).any() for p in names["net"].parameters())


CHANGES = {  # of the README's ViT and of the paper's student
    "vit": lambda net: None,
    "attention": without_dropout,
    "dropout": lambda net: net.body.append(nn.Dropout(0.3)),
    "batch_norm": lambda net: setattr(net.body, "1", nn.BatchNorm2d(8)),
    "frozen": lambda net: net.head.bias.requires_grad_(False),
    "narrow": lambda net: setattr(net, "head", nn.Linear(net.head.in_features, 1)),
}


@pytest.fixture
def fork(copy, monkeypatch):
    """fork(kind): the folder of a run with a teacher, to which students of one's own come."""

    def fork(kind):
        def make_student(*words):
            vit = kind in ("vit", "attention")
            net = VIT["make_student"](*words) if vit else common.ConvNet(*words[:4], words[4] or 2)
            CHANGES[kind](net)
            return net

        monkeypatch.setattr(common, "make_student", make_student)
        shutil.rmtree(copy / "experts")
        return copy

    return fork


@pytest.mark.parametrize("kind", ["dropout", "attention", "vit"])
def test_a_student_of_ones_own(fork, kind):
    """With targets of one's own, of which the file needs no more."""
    folder = fork(kind)
    torch.save({"targets": read(folder / "targets.pt")["targets"][:, :7]}, folder / "targets.pt")
    run("train_experts", folder)
    assert read(folder / "experts/0000.pt")["trajectory"].isfinite().all()
    for name in ("fork", "again"):  # what is random follows from the seed
        run("distill", folder, f"--init random --iters 2 --name {name}")
    first, again = (read(folder / f"sets/{name}.pt") for name in ("fork", "again"))
    assert torch.equal(first["images"], again["images"]) and first["lr"] == again["lr"]
    assert (first["images"] != read(folder / "sets/subset_random.pt")["images"]).any()
    assert first["targets"].shape == (S, 7)
    run("evaluate", folder, "--sets none fork")
    assert {"no pre-training", "fork"} <= set(rows(folder / "results.md"))


@pytest.mark.parametrize("kind, words", [("batch_norm", "GroupNorm"), ("frozen", "head.bias is frozen"),
                                         ("narrow", "must return (B, out_dim)")])
def test_students_that_no_trajectory_holds(fork, kind, words):
    folder = fork(kind)
    refused("train_experts", folder, "", words)
    assert not list(folder.glob("experts/*"))


def test_students_of_ones_own_compiled(fork, monkeypatch):
    """Attention is fused like all else; a student that draws is refused."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    folder, options = fork("attention"), "--init random --iters 1 --name"
    run("train_experts", folder, "--compile")
    run("distill", folder, f"{options} plain")
    run("distill", folder, f"{options} compiled --compile")
    plain, compiled = (read(folder / f"sets/{name}.pt")["images"] for name in ("plain", "compiled"))
    torch.testing.assert_close(plain, compiled, rtol=1e-3, atol=1e-4)
    run("train_experts", fork("dropout"))
    refused("distill", folder, f"{options} x --compile", "--compile", "--no-compile")


@pytest.mark.parametrize("width", [8, 32])
def test_layout_of_narrow_networks(copy, monkeypatch, width):
    """No narrow convolution sees channels_last, in which oneDNN corrupts memory (test_layout.py)."""
    seen, forward = [], torch.nn.Conv2d._conv_forward

    def record(self, x, weight, bias):
        for tensor in (x, weight):  # one channel, or one pixel, has both layouts
            last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
            seen.append(last)
        return forward(self, x, weight, bias)

    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", record)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for path in ("targets.pt", "teacher.pt", "experts/0001.pt"):
        (copy / path).unlink()
    run("train_teacher", copy, f"--width {width}")
    assert any(seen) == (width == 32)
    seen.clear()
    shutil.rmtree(copy / "experts")
    run("train_experts", copy, f"--width {width} --compile")
    run("distill", copy, f"--width {width} --compile --init random --iters 1 --name new")
    assert seen and any(seen) == (width == 32)


def test_images_without_labels(tmp_path, capsys):
    """images:DIR through all stages, judged by a labelled folder, whose test images are of two classes."""
    def write(path, i):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)

    for i in range(30):
        write(tmp_path / f"photos/{i % 3}/{i}.png", i)
        write(tmp_path / f"judge/{'train' if i % 3 else 'test'}/{'ab'[i % 2]}/{i}.png", i)
    folder, judge = tmp_path / "run", f"imagefolder:{tmp_path / 'judge'}"
    photos = f"--dataset images:{tmp_path / 'photos'} --data_dir {tmp_path} --image_size 8"
    run("train_teacher", folder, f"{photos} --ssl simclr --batch_size 10")
    assert not any("probe_accuracy" in record for record in log(folder / "train_teacher.jsonl"))
    refused("train_experts", folder, f"{photos} --objective supervised", "supervised", "no labels")
    run("train_experts", folder, f"{photos} --batch_size 10")
    refused("distill", folder, f"{photos} --init sas --iters 0", "--init sas", "--num_latent_classes")
    run("distill", folder, f"{photos} --init sas --iters 0 --num_latent_classes 3")
    run("distill", folder, f"{photos} --iters 1 --batch_syn 2")
    options = [*EVALUATE, *photos.split(), "--out_dir", folder]
    refuses(lambda: evaluate.parse_args([str(word) for word in options]), "no labels", "--downstream")
    refused("evaluate", folder, f"{photos} --downstream images:{tmp_path / 'photos'}", "no labels")
    run("evaluate", folder, f"{photos} --downstream {judge}")
    titles = {"no pre-training", "SAS subset", "MKDT", "full data"}
    assert titles | {"pre-training set; labels of judge"} == set(rows(folder / "results.md"))
    shutil.rmtree(tmp_path / "judge/test/b")
    fails(capsys, folder, f"{photos} --downstream {judge}", "its test images are of one class")


@pytest.mark.parametrize("protocol", ["linear", "finetune"])
@pytest.mark.parametrize("options", ["resnet10", "resnet18"])
def test_larger_encoders(copy, options, protocol):
    """They leave out last batches of one image, for BatchNorm."""
    (copy / "results.jsonl").unlink()
    net = f"--width 4 --arch {options}"
    run("evaluate", copy, f"{TWO_CELLS} {net} --batch_size 7 --protocol {protocol} --finetune_steps 2")
    records = log(copy / "results.jsonl")
    assert len(records) == 4 and {r["options"]["arch"] for r in records} == {options.split()[0]}
    net = evaluate.make_encoder(evaluate.parse_args(net.split()), D, 8, 1)
    a, b = net.eval().features(torch.randn(2, 1, 8, 8))
    assert a.shape == (32,) and (a != b).any() and list(net.buffers())


def test_ssl_on_the_images_of_a_set(copy):
    """All objectives of a set as rows of one table; no pre-training stays one row."""
    before = (copy / "results.jsonl").read_text()
    every = [f"{name}:{o}" for name in ("subset_random", "full") for o in ("kd", "simclr", "barlow_twins")]
    run("evaluate", copy, f"--sets none {' '.join(every)}")
    assert (copy / "results.jsonl").read_text().startswith(before)
    base, full = ([name, f"{name}, pre-trained by SimCLR", f"{name}, pre-trained by Barlow Twins"]
                  for name in ("random subset", "full data"))
    assert list(rows(copy / "results.md"))[1:] == ["no pre-training", *base, *full]
    run("evaluate", copy, "--sets none full subset_random:simclr")
    assert list(rows(copy / "results.md"))[1:] == ["no pre-training", base[1], "full data"]
    refused("evaluate", copy, "--sets subset_random:gan", "--sets", "subset_random:gan", "simclr")


def test_mirrored_images():
    """--augment flip shows each image both ways, at random; digits as they are."""
    args = evaluate.parse_args([*DATA, "--augment", "flip", "--epochs", "40"])
    seen, images = [], torch.randn(2, 1, 8, 8)

    class Spy(nn.Linear):
        def forward(self, x):
            seen.extend((i, torch.equal(y, images[i]), torch.equal(y, images[i].flip(2)))
                        for y in x for i in (0, 1) if torch.equal(y.sort()[0], images[i].sort()[0]))
            return super().forward(x.flatten(1))

    for flip in (True, False):
        seen.clear()
        data, expected = digits()._replace(flip=flip), {(True, False), *[(False, True)] * flip}
        evaluate.pretrain(Spy(64, D), "kd", images, torch.zeros(2, D), data, 0.1, args, 0)
        for i in (0, 1):
            ways = [(plain, mirrored) for j, plain, mirrored in seen if j == i]
            assert len(ways) == 40 and set(ways) == expected


def test_augment_of_all_stages(copy):
    """Of experts, of distillation, of pre-training; files of other views are refused."""
    plain = read(copy / "experts/0000.pt")["trajectory"]
    refused("train_experts", copy, "--augment flip_crop", "0000.pt", "--augment none, now --augment flip")
    shutil.rmtree(copy / "experts")
    run("train_experts", copy, "--augment flip_crop")
    cropped = read(copy / "experts/0000.pt")["trajectory"]
    assert torch.equal(cropped[0], plain[0]) and not torch.equal(cropped[1], plain[1])
    run("distill", copy, "--init random --iters 2 --augment flip_crop --name views")
    run("distill", copy, "--init random --iters 2 --name plain")
    views, plain = (read(copy / f"sets/{name}.pt")["images"] for name in ("views", "plain"))
    assert not torch.equal(views, plain)
    run("evaluate", copy, "--sets views --augment flip_crop --seeds 0")
    assert "--augment flip_crop" in (copy / "results.md").read_text()


@pytest.mark.parametrize("objective", ["kd", "krr_st", "simclr", "barlow_twins"])
def test_pretraining_lowers_its_loss(objective):
    args = evaluate.parse_args([*DATA, "--width", "8", "--epochs", "30", "--krr_st_epochs", "30"])
    torch.manual_seed(0)
    net, images, targets = evaluate.make_encoder(args, D, 8, 1), torch.randn(40, 1, 8, 8), torch.randn(40, D)
    data = common.ImageSet(None, None, torch.tensor([0.5]), torch.tensor([0.3]), flip=False)

    def loss():
        name = "kd" if objective == "krr_st" else objective
        return common.student_loss(name, net, images, targets, data, common.generator("cpu", 0)).item()

    before = loss()
    evaluate.pretrain(net, objective, images, targets, data, 0.1, args, seed=0)
    assert loss() < before


def test_a_curve_of_accuracy_against_steps(copy):
    """A point is what a training of that length gives; untrained weights give the same at every one."""
    (copy / "results.jsonl").unlink()
    run("evaluate", copy, f"{TWO_CELLS} --epochs 3")  # of one step each
    run("evaluate", copy, f"{TWO_CELLS} --probe_at 5 3 1 --name curve")
    records = log(copy / "results.jsonl")
    found = {(r["set"], r["steps"], r["fraction"]): r["accuracy"] for r in records}
    assert len(records) == len(found) == 16  # two sets and fractions, at the end and three points
    for f in (0.2, 0.4):
        assert found["mkdt_random", 3, f] == found["mkdt_random", None, f]
        assert {found["none", steps, f] for steps in (1, 3, 5)} == {found["none", None, f]}
    heads = [f"{p} % labels, {steps} steps" for p in (20, 40) for steps in (1, 3, 5)]
    assert rows(copy / "curve.md")["pre-training set; labels of digits"] == ["n", *heads]
    run("evaluate", copy, f"{TWO_CELLS} --probe_at 1 3 --name curve")
    assert log(copy / "results.jsonl") == records and not list(copy.glob("evaluate_*.checkpoint"))


@pytest.mark.parametrize("protocol", ["finetune", "finetune_slow", "finetune_krr_st"])
def test_full_finetuning(copy, protocol):
    (copy / "results.jsonl").unlink()
    for steps in (1, 150):
        options = f"--protocol {protocol} --finetune_steps {steps} --fractions 1 --name steps{steps}"
        run("evaluate", copy, f"{TWO_CELLS} {options}")
        assert f"full fine-tuning ({protocol})" in (copy / f"steps{steps}.md").read_text()
    records = log(copy / "results.jsonl")
    expected = [(name, 1.0, steps) for steps in (1, 150) for name in ("none", "mkdt_random")]
    assert [(r["set"], r["fraction"], r["options"]["finetune_steps"]) for r in records] == expected
    accuracies = [r["accuracy"] for r in records]
    assert min(accuracies[2:]) > max(accuracies[:2])
    args = evaluate.parse_args([*DATA, "--width", "8", "--protocol", protocol, "--finetune_steps", "3"])
    net, train = evaluate.make_encoder(args, D, 8, 1), digits()
    before = common.flatten(net)
    evaluate.finetune(net, train, train, [0.5, 1.0], args, 0, "digits")
    assert torch.equal(common.flatten(net), before)  # which other fractions start from


def test_random_crop():
    """Every result is a window of the padded image or of its mirror image; all windows occur."""
    image = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8)
    padded = F.pad(image, [1] * 4)
    windows = [padded[0, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    for flip in (False, True):
        windows += [window.flip(2) for window in windows] if flip else []
        x, draws = image.expand(500, -1, -1, -1), common.generator("cpu", 0)
        crops, _ = common.augment(x, None, "flip_crop", flip, draws)
        counts = [sum(torch.equal(crop, window) for crop in crops) for window in windows]
        assert sum(counts) == 500 and min(counts) > 0


def test_mixed_images():
    """Image and target by the same share, each with the one before it; shares of Beta(1/2, 1/2)."""
    x, z = torch.randn(400, 1, 8, 8), torch.eye(400)
    crops, same = common.augment(x, z, "flip_crop", True, common.generator("cpu", 0))
    mixed, targets = common.augment(x, z, "flip_crop_mix", True, common.generator("cpu", 0))
    share = targets.diagonal().clone()
    assert torch.equal(same, z) and share.min() >= 0 and share.max() <= 1
    assert abs(share.mean() - 1 / 2) < 0.08 and abs(share.var() - 1 / 8) < 0.02  # four standard errors
    for result, parts in ((mixed, crops), (targets, z)):
        of = share.view(-1, *[1] * (parts.ndim - 1))
        torch.testing.assert_close(result, of * parts + (1 - of) * parts.roll(1, 0))


# -- tables --------------------------------------------------------------------------------------------------


def test_several_sets_of_a_method_are_one_row(copy, capsys):
    """With the std of their means; one that is broken shows."""
    for seed in (1, 2):
        for iters in (0, 1):
            run("distill", copy, f"--iters {iters} --init random --seed {seed}")
    shutil.copy(copy / "sets/subset_random.pt", copy / "sets/full_seed1.pt")  # is not one of full data
    run("evaluate", copy, "--sets mkdt_random_seed1 mkdt_random")  # a set of two rows is measured once
    measured = [evaluate.key(record) for record in log(copy / "results.jsonl")]
    assert len(measured) == len(set(measured))
    run("evaluate", copy)
    x, base = (accuracies(copy, *(f"{name}_random{seed}" for seed in ("", "_seed1", "_seed2")))
               for name in ("mkdt", "subset"))
    d, within = x - base, (x.var(1, ddof=1).sum() / 3) ** 0.5
    error = (d.mean(0).var(ddof=1) / 2 + d.mean(1).var(ddof=1) / 3) ** 0.5
    table = rows(copy / "results.md")
    assert table["MKDT"][0] == table["full data"][0] == "2"
    assert table["MKDT (random init)"][:3] == [
        "3 x 2", f"{x.mean():.2f} ± {within:.2f}, sets ± {x.mean(1).std(ddof=1):.2f}",
        f"{d.mean():+.2f} ± {error:.2f}"]
    (copy / "sets/mkdt_random_seed2.pt").write_bytes(b"broken")
    fails(capsys, copy, "--sets mkdt_random_seed1 mkdt_random", "move it away")
    table = rows(copy / "results.md")
    n, accuracy, *_ = table["MKDT (random init)"]
    assert table["mkdt_random_seed1"][0] == "2" and n == "3 x 2" and accuracy.endswith(" (2 failed)")


def test_rows_that_failed_or_were_not_run(copy, capsys):
    """They show as such, with a line each; the rest is measured, and the exit status is 2."""
    (copy / "sets/mkdt_high_loss.pt").write_bytes(b"not a set")
    sets = "--sets none subset_random mkdt_high_loss krr_st_random"
    where = "--downstream digits imagefolder:/no"
    fails(capsys, copy, f"{sets} {where}", "mkdt_high_loss.pt", "krr_st_random.pt", "/no/train")
    known, unknown = (copy / "results.md").read_text().split("\n\n")[:2]
    for text, title in ((known, "digits"), (unknown, "no")):
        assert text.startswith(f"| pre-training set; labels of {title} | n | 20 % labels | difference |")
        assert "| KRR-ST | 0 | not run |  | not run |  |" in text
        assert "| MKDT | 2 | failed |  | failed |  |" in text
    assert "| random subset | 2 | failed |  | failed |  |" in unknown and "±" in known
    fails(capsys, copy, f"{sets} --fractions 0.001 0.2", "mkdt_high_loss.pt", "krr_st", "--fractions 0.001")


def test_the_papers_figures(copy):
    """Each has one place in results/paper.csv; a run on other images shows those of the first set beside."""
    paper = evaluate.read_paper("table1", "cifar10", "convnet")
    assert paper["mkdt_high_loss", "cifar10", 0.01] == ("44.36 ± 1.61", "paper")
    assert paper["full", "flowers", 0.05] == ("6.37 ± 0.67", "paper") and len(paper) == 84
    larger = evaluate.read_paper("table5", "cifar100", "resnet18")
    assert larger["mkdt_high_loss_1000", "cifar10", 0.05][0] == "46.10 ± 0.60"
    assert len(evaluate.read_paper("table2", "cifar100", "convnet")) == 16 * 7
    assert evaluate.read_paper("table3", "tinyimagenet", "convnet") == {}  # not known
    run("evaluate", copy, "--paper table1 --name table1")
    assert "The paper's figures: not known here." in (copy / "table1.md").read_text()


def test_table_of_the_papers_own_sets():
    """The paper's column stands right of ours; rows pre-trained in another way have none."""
    members = {(name, "kd"): [name] for name in ("subset_random", "mkdt_high_loss")}
    members = {("subset_random", "simclr"): ["subset_random"], **members}
    sets = ["cifar10", "dogs"]
    table = {(row, d, 0.01, None): np.array([[40.0, 42.0, 44.0]]) for row in members for d in sets}
    table[("mkdt_high_loss", "kd"), "cifar10", 0.01, None] = np.array([[45.0, np.nan, 47.0]])
    paper = evaluate.read_paper("table1", "cifar10", "convnet")
    base = ("subset_random", "kd")
    text = evaluate.make_tables(table, members, sets, [(0.01, None)], paper, base)
    first, second = text.split("\n\n")
    assert first.splitlines() == [
        "| pre-training set; labels of cifar10 | n | 1 % labels | difference | paper: 1 % |",
        "|---|---|---|---|---|",
        "| random subset, pre-trained by SimCLR | 3 | 42.00 ± 2.00 | +0.00 ± 0.00 |  |",
        "| random subset | 3 | 42.00 ± 2.00 |  | 36.35 ± 0.67 |",
        "| MKDT | 3 | 46.00 ± 1.41 (1 failed) |  | 44.36 ± 1.61 |",
    ]
    assert second.splitlines()[4] == "| MKDT | 3 | 42.00 ± 2.00 | +0.00 ± 0.00 | 2.11 ± 0.28 |"


def test_titles_and_order_of_rows(tmp_path):
    asked = ["full", "mine_auto", "subset_sas", "subset_random_auto", "subset_random:simclr", "none"]
    assert [evaluate.row_title(row) for row in evaluate.find_rows(tmp_path, asked)] == [
        "no pre-training", "random subset, pre-trained by SimCLR", "random subset, lr by --lr_init auto",
        "SAS subset", "mine_auto", "full data"]


def test_standard_error_of_a_difference():
    """Sets of both rows count; those of the same distillation seeds are paired; none where one failed."""
    x, b = np.random.default_rng(0).normal(50, 5, (2, 3, 4))

    def of_mean(v):
        return v.var(ddof=1) / len(v)

    d, seeds = x.mean() - b.mean(), of_mean(x.mean(0) - b.mean(0))
    paired = (seeds + of_mean((x - b).mean(1))) ** 0.5
    apart = (seeds + of_mean(x.mean(1)) + of_mean(b.mean(1))) ** 0.5
    one = (of_mean(x[0] - b.mean(0)) + of_mean(b.mean(1))) ** 0.5  # "full" against several subsets
    assert evaluate.difference_text(x, b, True) == f"{d:+.2f} ± {paired:.2f}"
    assert evaluate.difference_text(x, b, False) == f"{d:+.2f} ± {apart:.2f}"
    assert evaluate.difference_text(x[:1], b, False) == f"{x[0].mean() - b.mean():+.2f} ± {one:.2f}"
    assert evaluate.difference_text(x[:1, :1], b[:1, :1], True) == f"{x[0, 0] - b[0, 0]:+.2f}"
    rest = evaluate.accuracy_text(x[[0, 2]][:, [0, 1, 3]])  # seeds that all sets have, of those that have any
    x[1] = x[0, 2] = np.nan
    assert evaluate.accuracy_text(x) == rest + " (5 failed)"
    assert evaluate.difference_text(x, b, True) == evaluate.difference_text(None, b, True) == ""
    assert evaluate.accuracy_text(None) == "not run" and evaluate.accuracy_text(b * np.nan) == "failed"


# -- files that do not belong together, and options that cannot be -------------------------------------------


def test_files_of_another_run(copy, tmp_path, capsys):
    """Missing, made with other options, or of other images or targets than those there now."""
    before = (copy / "experts/0000.pt").read_bytes()
    for name, options, *words in [
        ("train_teacher", "--seed 5", "targets.pt", "--seed 0", "--seed 5"),
        ("train_experts", "--lr 0.05", "experts/0000.pt", "--lr 0.1", "--lr 0.05"),
        ("train_experts", "--limit 100", "150 targets", "100 of digits"),
        ("train_experts", "--image_size 16", "other images", "16 px"),
        ("distill", "--iters 1 --lr_img 7", "mkdt_high_loss.pt", "--lr_img"),
        *((name, f"--out_dir {tmp_path}/new {more}", "targets.pt", "train_teacher.py") for name, more in (
            ("train_experts", ""), ("distill", "--init random --iters 0"), ("evaluate", "--sets full"))),
        ("evaluate", f"--out_dir {tmp_path}/new", "new/sets", "no sets", "distill.py"),
    ]:
        refused(name, copy, options, *words)
    assert (copy / "experts/0000.pt").read_bytes() == before
    targets = read(copy / "targets.pt")
    torch.save({**targets, "targets": targets["targets"] + 1}, copy / "targets.pt")
    for name, options, path in [("train_experts", "", "0000.pt"), ("distill", "--name x", "0000.pt"),
                                ("distill", "--iters 1 --init random", "experts/0000.pt")]:
        refused(name, copy, options, path, "other targets")
    fails(capsys, copy, "--sets full mkdt_random", "sets/mkdt_random.pt: was made from other targets")
    other = read(copy / "sets/mkdt_high_loss.pt")
    torch.save({**other, "targets_id": "x"}, copy / "sets/mkdt_high_loss.pt")
    fails(capsys, copy, "--sets mkdt_random mkdt_high_loss", "mkdt_high_loss.pt: was made from other targets")
    shutil.rmtree(copy / "experts")
    refused("distill", copy, "--name x", "experts", "train_experts.py")


def test_experts_that_do_not_fit(copy):
    """Of another network, too short, or made with an option that differs."""
    refused("distill", copy, "--width 12 --name x", "experts/0000.pt", "--width")
    refused("distill", copy, "--max_start_epoch 3 --name x", "--max_start_epoch 3", "0 to 4", "have 3")
    refused("distill", copy, "--between_epochs --name x", "--max_start_epoch 2", "0 to 4", "have 3")
    assert not distill.parse_args(["--iters", "0", "--lr_init", "auto", "--between_epochs"]).between_epochs
    path = copy / "experts/0002.pt"
    expert = read(path)
    expert["options"]["train_experts"]["lr"] = 0.05
    torch.save(expert, path)
    refused("distill", copy, "--name x", "0002.pt", "--lr 0.05", "0000.pt")
    del expert["options"]["train_experts"]["lr"]  # a file may say nothing
    torch.save(expert, path)
    run("distill", copy, "--iters 1 --name x")
    shutil.rmtree(copy / "experts")
    run("train_experts", copy, "--lr 0")
    refused("distill", copy, "--iters 0 --lr_init auto --name y", "--lr_init auto", "do the experts move")
    shutil.rmtree(copy / "experts")
    run("train_experts", copy, "--lr 0.05")
    refused("distill", copy, "--iters 1 --name x", "sets/x.pt", "now --lr 0.05")


def test_sets_that_do_not_fit(copy, capsys):
    path, run_one = copy / "sets/mkdt_random.pt", "--seeds 0 --sets mkdt_random"
    contents = read(path)
    images, targets = contents["images"], contents["targets"]

    def put(**parts):
        torch.save({**contents, **{name: part.clone() for name, part in parts.items()}}, path)

    put(images=images.expand(-1, 3, -1, -1))
    fails(capsys, copy, run_one, "(15, 3, 8, 8)")
    put(targets=targets[:3])
    fails(capsys, copy, run_one, "(3, 32)")
    put(images=images[:0], targets=targets[:0])
    fails(capsys, copy, run_one, "(0, 1, 8, 8)")
    fails(capsys, copy, "--sets nothing", "nothing.pt: not found; make it with distill.py")
    put(images=images[:1], targets=targets[:1])
    run("evaluate", copy, run_one)
    for lr in (0, -0.1, 2**64, 1e39, True):
        torch.save({**contents, "lr": lr}, path)
        fails(capsys, copy, run_one, "'lr'")
    torch.save({**contents, "lr": 1}, path)  # a whole number will do
    run("evaluate", copy, f"{run_one} --width 9")
    put(images=images[:1], targets=targets[:1])
    fails(capsys, copy, f"{run_one}:simclr", "1 images in batches of 256: simclr")
    fails(capsys, copy, f"{run_one} --arch resnet10 --width 2", "1 images in batches of 256: kd")


def test_what_a_row_needs(copy, tmp_path, capsys):
    """No pre-training: the data; a set: itself, of half precision and without ids."""
    name, out = "mkdt_random", tmp_path / "new"
    run("evaluate", copy, f"--sets none {name} --seeds 0")
    contents = read(copy / f"sets/{name}.pt")
    half = {"images": contents["images"].half(), "targets": contents["targets"].half(), "lr": contents["lr"]}
    (out / "sets").mkdir(parents=True)
    torch.save(half, out / "sets/half.pt")
    run("evaluate", out, "--seeds 0")
    there, found = log(copy / "results.jsonl"), log(out / "results.jsonl")
    assert found[0] in there and [record["set"] for record in found] == ["none", "none", "half", "half"]
    data, ids = digits(), {}
    loaded = evaluate.load_set(out / "sets/half.pt", data, ids, {})
    assert torch.equal(loaded[0], half["images"].float()) and loaded[1].dtype == torch.float32 and ids == {}


def test_files_whose_names_are_none_of_sets(copy, capsys):
    for name in ("none", "full", "my:set", "a|b"):
        shutil.copy(copy / "sets/subset_random.pt", copy / f"sets/{name}.pt")
    rows = evaluate.find_rows(copy / "sets", [])
    assert rows == {("none", "none"): ["none"], ("full", "kd"): ["full"],
                    **{(name, "kd"): [name] for name in
                       ("subset_random", "subset_high_loss", "mkdt_random", "mkdt_high_loss")}}
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and all("is left out" in line for line in said)


def test_names_of_sets():
    for options, name in [("", "mkdt_high_loss"), ("--seed 3", "mkdt_high_loss_seed3"),
                          ("--iters 0", "subset_high_loss"),
                          ("--method krr_st --iters 0", "subset_random"),
                          ("--method krr_st --init sas", "krr_st_sas"),
                          ("--iters 0 --lr_init auto --seed 1", "subset_high_loss_auto_seed1")]:
        assert distill.parse_args(options.split()).name == name
    for name in ("..", "a/b", "none", "full", "-x", "full_seed1"):
        refuses(lambda name=name: distill.parse_args([f"--name={name}"]), "--name", what=name)


@pytest.fixture
def start(copy, tmp_path):
    """distill.py --init FILE.pt, of a name in the folder of a test, with the size of the file."""
    at = OPTIONS["distill"].index("--fraction")
    words = [*OPTIONS["distill"][:at], *OPTIONS["distill"][at + 2 :], "--out_dir", copy]
    return lambda name, options="--iters 1": stage(
        "distill", [*words, "--init", tmp_path / "copy/sets" / f"{name}.pt", *options.split()])


def test_a_set_that_starts_from_another(copy, tmp_path, start):
    """--init FILE.pt: its images, targets, lr and indices, whatever its mean and std; with other options."""
    run("distill", copy, "--init random --iters 2 --lr_img 10 --name first")
    first = read(copy / "sets/first.pt")
    shutil.copy(copy / "sets/first.pt", copy / "sets/again.pt")
    start("first", "--iters 0")
    again = read(copy / "sets/first_on.pt")
    assert all(torch.equal(first[name], again[name]) for name in ("images", "targets", "indices"))
    assert again["lr"] == pytest.approx(first["lr"]) and again["options"]["distill"]["init"] == "first.pt"
    start("again", "--iters 1 --lr_init 0.3 --lr_lr 0 --inner_momentum 0.9")
    on = read(copy / "sets/again_on.pt")
    assert on["lr"] == pytest.approx(0.3) and on["images"].shape == first["images"].shape
    assert not torch.equal(on["images"], first["images"]) and torch.equal(on["indices"], first["indices"])
    # A finished set without ids or indices, of half precision, normalised otherwise.
    own, data = {name: first[name] for name in ("targets", "lr", "mean", "std")}, digits()
    own["images"] = ((first["images"] * data.std + data.mean - 0.5) / 0.25).half()
    torch.save({**own, "mean": torch.tensor([0.5]), "std": torch.tensor([0.25])}, tmp_path / "own.pt")
    start(tmp_path / "own", "--iters 0")
    found = read(copy / "sets/own_on.pt")
    torch.testing.assert_close(found["images"], first["images"], atol=5e-3, rtol=0)
    judged, _, _ = evaluate.load_set(tmp_path / "own.pt", data, {}, {})
    assert torch.equal(judged, found["images"])
    assert (found["indices"] == -1).all()
    torch.save({**own, "lr": 5.0}, tmp_path / "own.pt")
    refuses(lambda: start(tmp_path / "own", "--iters 0"), "own_on.pt", "other init")


def test_a_start_that_does_not_fit(copy, tmp_path, start):
    first = read(copy / "sets/mkdt_random.pt")
    for parts, *words in [
        ({"images": first["images"][:, :, :4]}, "(15, 1, 4, 8)"), ({"mean": torch.zeros(3)}, "mean (3,)"),
        ({"targets": first["targets"][:3]}, "(3, 32)"), ({"targets": first["targets"][:, :3]}, "(15, 3)"),
        ({"std": torch.zeros(1, 1)}, "std (1, 1)"), ({"std": torch.zeros(1)}, "above 0"),
        ({"targets_id": "x"}, "other targets"), ({"lr": -1}, "'lr'"),
        ({"indices": torch.zeros(3)}, "indices (3,)"), ({"indices": "x"}, "indices ()"),
        ({"indices": torch.zeros(15)}, "int64"), ({"mean": torch.tensor([math.nan])}, "finite")]:
        torch.save({**first, **{k: v.clone() if torch.is_tensor(v) else v for k, v in parts.items()}},
                   copy / "sets/x.pt")
        refuses(lambda: start("x"), "x.pt", *words, what=words)
    refuses(lambda: start("no"), "no.pt", "not found")
    for init, word in [("gan", "high_loss"), ("own.npz", "FILE.pt"), ("x.pt --fraction 0.1", "--fraction")]:
        refused("distill", copy, f"--init {init} --iters 1", init.partition(" ")[0], word)
    assert not (copy / "sets/x_on.pt").exists()


def test_options_that_cannot_be(copy, capsys):
    for name, options, *words in [
        *(("distill", f"--fraction {f} --name x", f"--fraction {f}") for f in ("0", "1.5", "0.001")),
        *(("evaluate", f"--fractions {f}", "--fractions") for f in ("0", "1.1")),
        ("train_teacher", f"--batch_size 151 --out_dir {copy}/new", "--batch_size 151", "150"),
        ("train_teacher", "--dataset mnist", "mnist", "cifar10"),
    ]:
        refused(name, copy, options, *words)
    fails(capsys, copy, "--fractions 0.001", "--fractions 0.001")
