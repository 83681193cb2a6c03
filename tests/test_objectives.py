"""Experts of other objectives than KD, the variance of gradients and of trajectories, figure 1."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import DATA, STUDENT, refuses
from conftest import run_stage as stage
from test_cli import commands
from test_stages import N, digits, log, read

import common
import train_experts

EXPERTS = [*DATA, *STUDENT, "--num_experts", "3", "--epochs", "2", "--batch_size", "50", "--same_init"]
DISTILL = [*DATA, *STUDENT, "--fraction", "0.1", "--syn_steps", "3", "--batch_syn", "7", "--lr_img", "10",
           "--init", "random", "--iters", "2", "--max_start_epoch", "1"]  # batches of 7, 7 and 1
OPTIONS = {"train_experts": EXPERTS, "distill": DISTILL}
OUT_DIM = {"supervised": 10, "barlow_twins": 1024, "simclr": 128}  # 10 digits


def run(name, folder, options=""):
    """A stage in a folder; the options are words of a text, and override those above."""
    stage(name, [*OPTIONS[name], "--out_dir", folder, *options.split()])


def refused(name, folder, options, *words):
    return refuses(lambda: run(name, folder, options), *words, what=options)


def figure1(*words):
    stage("figure1", words)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{objective: the folder of a run in which its experts and a set are made}, without a teacher."""
    folders = {}
    for objective in OUT_DIM:
        folders[objective] = tmp_path_factory.mktemp(objective)
        run("train_experts", folders[objective], f"--objective {objective}")
        run("distill", folders[objective], "--max_experts 2")
    return folders


@pytest.fixture
def copy(runs, tmp_path):
    """copy(objective): a copy of its run that a test may change."""
    return lambda objective: shutil.copytree(runs[objective], tmp_path / objective)


@pytest.mark.parametrize("objective", OUT_DIM)
def test_experts_of_an_objective(runs, objective):
    experts = [read(path) for path in sorted((runs[objective] / "experts").glob("*.pt"))]
    trajectories = torch.stack([expert["trajectory"] for expert in experts])
    assert (trajectories[:, 0] == trajectories[0, 0]).all()  # the same start, and another order each
    assert len({tuple(trajectory[1, :50].tolist()) for trajectory in trajectories}) == 3
    net = common.ConvNet(OUT_DIM[objective], 8, 1, 8, 2)
    assert trajectories.shape == (3, 3, common.flatten(net).numel())
    losses = experts[0]["example_loss"]
    assert losses.shape == (N,) and (losses.unique().numel() > 1) == (objective == "supervised")


def test_supervised_example_loss(runs):
    """Cross-entropy to the label, each image's, after the first epoch."""
    expert, train = read(runs["supervised"] / "experts/0001.pt"), digits()
    net, x = common.ConvNet(10, 8, 1, 8, 2), common.normalise(train.images, train)
    outputs = common.forward_flat(net, expert["trajectory"][1], x)
    expected = F.cross_entropy(outputs, train.labels, reduction="none")
    torch.testing.assert_close(expert["example_loss"], expected, rtol=1e-4, atol=1e-5)


def test_an_objective_of_ones_own(run_dir, tmp_path, monkeypatch):
    """A line in LOSSES and one in RECIPES: experts and sets of it, on the teacher's targets."""
    def cosine(outputs, targets, reduction="mean"):
        losses = 1 - F.cosine_similarity(outputs, targets)
        return losses if reduction == "none" else losses.mean()

    monkeypatch.setitem(common.LOSSES, "cosine", cosine)
    monkeypatch.setitem(train_experts.RECIPES, "cosine", train_experts.RECIPES["kd"])
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(run_dir / "targets.pt", folder)
    run("train_experts", folder, "--objective cosine")
    expert = read(folder / "experts/0000.pt")
    assert not torch.equal(expert["trajectory"][0], expert["trajectory"][1])
    assert 0 < expert["example_loss"].min() and expert["example_loss"].max() <= 2
    run("distill", folder, "--init high_loss")
    contents = read(folder / "sets/mkdt_high_loss.pt")
    assert torch.equal(contents["targets"], read(folder / "targets.pt")["targets"][contents["indices"]])
    figure1("--out_dir", tmp_path, folder)
    assert log(tmp_path / "figure1.jsonl")[0]["curve"] == "cosine, batch 50"


@pytest.mark.parametrize("objective", OUT_DIM)
def test_sets_of_an_objective(runs, objective):
    contents = read(runs[objective] / "sets/mkdt_random.pt")
    labels = F.one_hot(digits().labels[contents["indices"]], 10).float()
    assert torch.equal(contents["targets"], labels if objective == "supervised" else labels[:, :0])
    assert contents["images"].isfinite().all()
    assert {contents["options"][name]["objective"] for name in ("distill", "train_experts")} == {objective}
    start, *steps = log(runs[objective] / "distill_mkdt_random.jsonl")
    assert [step["iteration"] for step in steps] == [1, 2]
    assert all(step["matching_loss"] > 0 and step["pixel_change"] > 0 for step in steps)


@pytest.mark.parametrize("objective", ["supervised", "simclr"])
def test_same_seed_same_set(copy, objective):
    folder = copy(objective)
    more = "--augment flip" if objective == "simclr" else ""  # SSL takes its own views
    for _ in range(2):  # the second time there is nothing to do
        run("distill", folder, f"--max_experts 2 --name again {more}")
    again, before = (read(folder / f"sets/{name}.pt")["images"] for name in ("again", "mkdt_random"))
    assert torch.equal(again, before)


def test_high_loss_subset_and_max_experts(copy):
    folder = copy("supervised")
    run("distill", folder, "--init high_loss --iters 9 --max_experts 1")
    loss = read(folder / "experts/0000.pt")["example_loss"]
    assert torch.equal(read(folder / "sets/mkdt_high_loss.pt")["indices"], loss.topk(N // 10).indices)
    assert {step["expert"] for step in log(folder / "distill_mkdt_high_loss.jsonl")[1:]} == {0}
    run("distill", folder, "--init high_loss --iters 0 --max_experts 1")
    subset = read(folder / "sets/subset_high_loss.pt")
    assert torch.equal(subset["indices"], loss.topk(N // 10).indices)
    all_three = "--init high_loss --iters 0 --name all"
    run("distill", folder, all_three)
    shutil.copy(folder / "experts/0000.pt", folder / "experts/0003.pt")
    refused("distill", folder, all_three, "all.pt", "other experts")
    run("distill", folder, f"{all_three} --max_experts 3")  # as before the fourth


# -- the variance of gradients -------------------------------------------------------------------------------


@pytest.fixture
def variance(monkeypatch):
    """variance(x, seed, count): of the gradients of mean(theta x) over batches of 8 of x (N, 3)."""
    net = nn.Linear(3, 1, bias=False)
    monkeypatch.setitem(common.LOSSES, "linear", lambda outputs, z: outputs.mean())

    def variance(x, seed=0, **count):
        args = argparse.Namespace(objective="linear", seed=seed, batch_size=8, device="cpu")
        return __import__("figure1").gradient_variance(net, None, x, x, args, **count)

    return variance


def test_gradient_variance_of_a_linear_loss(variance):
    """Its gradient on a batch is the batch's mean, of which the variance is known."""
    x = torch.randn(40, 3, generator=common.generator("cpu", 0)) + torch.tensor([1.0, 0.0, 0.5])
    of_mean = x.var(0).sum().item() / 8 * (1 - 8 / 40)  # drawn without replacement
    assert variance(x, count=1500) == pytest.approx(of_mean / x.mean(0).square().sum().item(), rel=0.1)
    assert variance(x[:1].expand(40, -1)) == pytest.approx(0, abs=1e-5)


def test_gradient_variance_without_a_signal(variance):
    """Gradients that are noise alone: there is no such number."""
    x = torch.randn(40, 3, generator=common.generator("cpu", 0))
    values = [variance(x - x.mean(0), seed) for seed in range(20)]
    assert None in values and all(value is None or value > 1 for value in values)


# -- figure 1 ------------------------------------------------------------------------------------------------


def write_log(folder, *parts):
    """A log of matching: each part is (step of its start, matching losses)."""
    lines = []
    for step, losses in parts:
        lines.append({"command": [], "options": {}, "step": step})
        lines += [{"iteration": i, "matching_loss": loss, "pixel_change": i / 100}
                  for i, loss in enumerate(losses, step + 1)]
    (folder / "distill_any.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def curves(tmp_path, monkeypatch):
    """Two runs of two experts whose numbers are known: {objective: folder}."""
    folders = {"supervised": tmp_path / "supervised", "simclr": tmp_path / "simclr"}
    monkeypatch.setattr("figure1.start_and_end", lambda run, trajectory: [trajectory[1, 0].item() / 2, None])
    for scale, (objective, folder) in enumerate(folders.items(), 1):
        options = {"train_experts": {"objective": objective, "batch_size": 64, "same_init": True}}
        for k in (0, 1):
            trajectory = scale * torch.tensor([[0.0, 0.0], [1.0 + 2 * k, 0.0]])
            common.save(folder / f"experts/000{k}.pt", {
                "trajectory": trajectory, "options": options})
        write_log(folder, (0, [9.0, 9.0]), (0, [1.0, 0.2, 0.2]), (3, [0.2 * scale] * 10))
        (folder / "distill_subset_random.jsonl").write_text('{"options": {}, "step": 0}\n')
    return folders


def test_figure_1_reads_the_numbers(curves, tmp_path, capsys):
    """Of the last begin at step 0, and where that went on; 2 and 8 are the variances of 1, 3 and 2, 6."""
    figure1("--out_dir", tmp_path / "out", "--name", "both", *curves.values())
    text, numbers = (tmp_path / "out/both.md").read_text(), log(tmp_path / "out/both.jsonl")
    assert text in capsys.readouterr().out
    assert "trajectories' variance: epoch 1" in text and "last ten" in text
    assert "| MTT-SL, batch 64 | 2 | 0.5 |  | 2 | 0.4 | 1 | 0.2 | 0.13 |" in text
    assert "| MTT-SSL (SimCLR), batch 64 | 2 | 1 |  | 8 | 0.4 | 1 | 0.4 | 0.13 |" in text
    assert [len(curve["matching_loss"]) for curve in numbers] == [13, 13]
    assert numbers[0]["trajectory_variance"] == [0, 2] and numbers[0]["relative_variance"] == [None, 0.4]
    pytest.importorskip("matplotlib")
    assert (tmp_path / "out/both.png").read_bytes().startswith(b"\x89PNG")


def test_figure_1_of_real_runs(runs, tmp_path):
    figure1("--out_dir", tmp_path, *runs.values())
    curves = log(tmp_path / "figure1.jsonl")
    names = ["MTT-SL", "MTT-SSL (Barlow Twins)", "MTT-SSL (SimCLR)"]
    assert [curve["curve"] for curve in curves] == [f"{name}, batch 50" for name in names]
    for folder, curve in zip(runs.values(), curves):
        experts = [read(path) for path in sorted((folder / "experts").glob("*.pt"))]
        t = np.stack([expert["trajectory"].double() for expert in experts])
        variance, travelled = t.var(0, ddof=1).sum(1), ((t - t[:, :1]) ** 2).sum(2).mean(0)
        np.testing.assert_allclose(curve["trajectory_variance"], variance, rtol=1e-4)
        np.testing.assert_allclose(curve["relative_variance"][1:], (variance / travelled.clip(1e-30))[1:],
                                   rtol=1e-4)
        assert len(curve["gradient_variance"]) == 2  # None: not to be told from noise
        assert all(value is None or value > 0 for value in curve["gradient_variance"])
        assert (curve["experts"], len(curve["matching_loss"]), len(curve["pixel_change"])) == (3, 2, 2)


def test_figure_1_of_files_that_do_not_fit(curves, tmp_path):
    folder = curves["simclr"]
    expert = folder / "experts/0001.pt"
    contents, made = read(expert), read(expert)["options"]["train_experts"]
    (tmp_path / "good.pt").write_bytes(expert.read_bytes())

    def fails(*words):
        before = sorted(tmp_path.rglob("*"))
        refuses(lambda: figure1("--out_dir", tmp_path / "out", *curves.values()), *words)
        assert sorted(tmp_path.rglob("*")) == before
        expert.write_bytes((tmp_path / "good.pt").read_bytes())
        write_log(folder, (0, [1.0, 0.5]))

    for other in ({"same_init": False}, {"batch_size": 9}):
        torch.save({**contents, "options": {"train_experts": {**made, **other}}}, expert)
        fails("simclr", "--same_init")
    torch.save({key: contents[key] for key in ("trajectory",)}, expert)
    fails("0001.pt", "train_experts.py")
    torch.save({**contents, "trajectory": contents["trajectory"] * float("nan")}, expert)
    fails("0001.pt", "train_experts.py")
    expert.unlink()
    fails("simclr", "two experts")
    for losses in ([], [1.0, 0.5]):  # not begun, or begun anew, and stopped at once
        write_log(folder, (0, losses), (0, []))
        fails("simclr", "distill.py")
    shutil.copy(folder / "distill_any.jsonl", folder / "distill_other.jsonl")
    fails("simclr", "2 matched sets")
    refuses(lambda: figure1("--out_dir", tmp_path), "RUN")


@pytest.mark.parametrize("preset", [[], ["digits"], ["imagefolder", "a b/c"], ["rehearse"]])
def test_figure_1_is_the_papers(preset):
    """Appendix A.2: the settings of experts and sets, KD beside them, and SSL with four times the batch."""
    calls = commands("figure1", *preset)
    experts, sets, (figure,), ssl = *(calls[s] for s in list(calls)[1:]), calls["train_teacher"][0].ssl
    assert [e.objective for e in experts] == ["kd", "supervised", ssl, ssl]
    assert all(e.same_init and e.num_experts == 5 and e.epochs >= 4 for e in experts)
    assert experts[3].batch_size == 4 * experts[2].batch_size
    assert [e.out_dir for e in experts] == [d.out_dir for d in sets] == figure.runs
    assert len({d.out_dir for d in sets}) == 4 and len({(d.lr_img, d.fraction) for d in sets}) == 1
    assert [(d.syn_steps, d.expert_epochs) for d in sets] == [(20, 2), (20, 4), (10, 2), (10, 2)]
    iters = 3 if preset == ["rehearse"] else 100
    assert {(d.max_experts, d.max_start_epoch, d.iters) for d in sets} == {(1, 1, iters)}
    assert len({(a.limit, a.width, a.image_size, a.dataset) for a in (*sets, *experts)}) == 1
    names = {"": "cifar100", "digits": "digits_plain", "a b/c": "c", "rehearse": "digits_plain_rehearsal"}
    assert figure.name == "figure1_" + names[preset[-1] if preset else ""]
    assert all(e.batch_size <= (e.limit or 50_000) for e in experts)
    if not preset:
        assert (sets[0].dataset, sets[0].fraction, sets[0].lr_img) == ("cifar100", 0.01, 1000)
        assert [e.batch_size for e in experts] == [256, 256, 1024, 4096]
        paper = [(0.01, 0, 0), (1e-3, None, 1e-6)]
        assert [(e.lr, e.momentum, e.weight_decay) for e in experts[1:3]] == paper


# -- what does not go together -------------------------------------------------------------------------------


def test_experts_of_another_objective(copy):
    folder = copy("supervised")
    path = folder / "experts/0000.pt"
    before = path.read_bytes()
    refused("train_experts", folder, "--objective simclr", path, "--objective supervised, now --objective")
    refused("train_experts", folder, "", "targets.pt")  # kd: there is no teacher
    words = [*EXPERTS[:-1], "--out_dir", folder, "--objective", "supervised"]
    refuses(lambda: stage("train_experts", words), path, "--same_init")
    assert path.read_bytes() == before
    shutil.copy(copy("simclr") / "experts/0001.pt", folder / "experts/0001.pt")
    refused("distill", folder, "--name x", "0001.pt")
    expert = read(path)
    expert["options"]["train_experts"]["objective"] = "gan"
    torch.save(expert, path)
    refused("distill", folder, "--name x", folder / "experts", "gan")
    assert [path.name for path in (folder / "sets").glob("*.pt")] == ["mkdt_random.pt"]


def test_options_that_do_not_go_with_an_objective(copy, tmp_path):
    new, simclr, supervised = tmp_path / "new", copy("simclr"), copy("supervised")
    for options in ("simclr --momentum 0.9", "supervised --out_dim 7", "kd --out_dim 7"):
        objective, option, _ = options.split()
        refused("train_experts", new, f"--objective {options}", option, objective)
    for options in ("simclr --batch_size 1", "simclr --batch_size 151"):
        refused("train_experts", new, f"--objective {options}", options.partition(" ")[2], "150")
    assert not new.exists()
    for init in ("high_loss", "sas", simclr / "sets/mkdt_random.pt"):
        refused("distill", simclr, f"--init {init}", f"--init {init}", "simclr", "random")
    refused("distill", supervised, "--init sas", "--init sas", "supervised", "high_loss")
    refused("distill", supervised, "--init high_loss --method krr_st", "--init high_loss", "supervised")
    refused("distill", simclr, "--name x --batch_syn 1", "--batch_syn 1", "simclr")
    refused("distill", simclr, "--name x --fraction 0.007", "--fraction", "1 of 150")
    refused("distill", simclr, "--name x --max_experts 4", "experts: has 3 of 4")
    refused("distill", simclr, "--name x --width 9", "0000.pt", "--width")


def test_other_images_or_labels(copy, monkeypatch):
    """Images of one class have no labels to learn; other images under the same name are other images."""
    folder, load = copy("simclr"), common.load_images
    one_class = lambda *words: (data := load(*words))._replace(labels=data.labels * 0)  # noqa: E731
    inverted = lambda *words: (data := load(*words))._replace(images=255 - data.images)  # noqa: E731
    monkeypatch.setattr(common, "load_images", one_class)
    refused("train_experts", folder / "new", "--objective supervised", "--objective supervised", "no labels")
    monkeypatch.setattr(common, "load_images", inverted)
    refused("distill", folder, "--name x", "0000.pt", "other images")
