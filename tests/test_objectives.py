"""Experts of other objectives than KD, the variance of gradients and of trajectories, figure 1."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import DATA, STUDENT
from test_cli import commands
from test_data import write_image
from test_stages import N, read, refuses

import common
import distill
import train_experts

EXPERTS = [*DATA, *STUDENT, "--num_experts", "3", "--epochs", "2", "--batch_size", "50", "--same_init"]
DISTILL = [*DATA, *STUDENT, "--fraction", "0.1", "--syn_steps", "3", "--batch_syn", "7", "--lr_img", "10"]
DISTILL += ["--init", "random", "--iters", "2", "--max_start_epoch", "1"]
OUT_DIM = {"supervised": 10, "barlow_twins": 1024, "simclr": 128}  # 10 digits


def log(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{objective: the folder of a run in which its experts and a set are made}, without a teacher."""
    folders = {}
    for objective in OUT_DIM:
        folders[objective] = tmp_path_factory.mktemp(objective)
        out = ["--out_dir", str(folders[objective])]
        train_experts.main(train_experts.parse_args([*EXPERTS, *out, "--objective", objective]))
        distill.main(distill.parse_args([*DISTILL, *out, "--max_experts", "2"]))
    return folders


@pytest.fixture
def copy(runs, tmp_path):
    """copy(objective): a copy of its run that a test may change."""
    return lambda objective: shutil.copytree(runs[objective], tmp_path / objective)


@pytest.mark.parametrize("objective", OUT_DIM)
def test_experts_of_an_objective(runs, objective):
    experts = [read(path) for path in sorted((runs[objective] / "experts").glob("*.pt"))]
    assert len(experts) == 3
    trajectories = torch.stack([expert["trajectory"] for expert in experts])
    assert (trajectories[:, 0] == trajectories[0, 0]).all()  # the same start ...
    assert (
        len({tuple(t[1, :50].tolist()) for t in trajectories}) == 3
    )  # ... and the order makes the difference
    net = common.ConvNet(OUT_DIM[objective], 8, 1, 8, 2)
    assert trajectories.shape == (3, 3, common.flatten(net).numel())
    losses = experts[0]["example_loss"]
    assert losses.shape == (N,) and (losses.unique().numel() > 1) == (objective == "supervised")
    # The log has the variance of these very trajectories, and of the gradient at the start and the end.
    records = log(runs[objective] / "train_experts.jsonl")
    variance = trajectories.double().numpy().var(axis=0, ddof=1).sum(1)
    np.testing.assert_allclose(records[-1]["trajectory_variance"], variance, rtol=1e-4)
    travelled = (trajectories - trajectories[:, :1]).double().square().sum(2).mean(0).numpy()
    assert records[-1]["relative_variance"][0] is None
    np.testing.assert_allclose(
        records[-1]["relative_variance"][1:], (variance / np.maximum(travelled, 1e-30))[1:], rtol=1e-4
    )
    first = [record for record in records if "gradient_variance" in record]
    assert [record["expert"] for record in first] == [0]
    assert len(first[0]["gradient_variance"]) == 2
    assert all(value is None or value > 0 for value in first[0]["gradient_variance"])


def test_supervised_example_loss(runs):
    """Cross-entropy to the label, each image's, after the first epoch."""
    expert = read(runs["supervised"] / "experts/0001.pt")
    train = common.load_images("digits", "train", "data", limit=N)
    net = common.ConvNet(10, 8, 1, 8, 2)
    outputs = common.forward_flat(
        net, expert["trajectory"][1], common.normalise(train.images, train.mean, train.std)
    )
    expected = nn.functional.cross_entropy(outputs, train.labels, reduction="none")
    torch.testing.assert_close(expert["example_loss"], expected, rtol=1e-4, atol=1e-5)


def test_an_objective_of_ones_own(run_dir, tmp_path, stage, monkeypatch):
    """A line in LOSSES and one in RECIPES: experts and sets of it, on the teacher's targets."""

    def cosine(outputs, targets, reduction="mean"):
        losses = 1 - nn.functional.cosine_similarity(outputs, targets)
        return losses if reduction == "none" else losses.mean()

    monkeypatch.setitem(common.LOSSES, "cosine", cosine)
    monkeypatch.setattr(common, "OBJECTIVES", (*common.LOSSES, *common.SSL))
    monkeypatch.setitem(train_experts.RECIPES, "cosine", train_experts.RECIPES["kd"])
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(run_dir / "targets.pt", run)
    stage("train_experts", [*EXPERTS, "--out_dir", run, "--objective", "cosine"])
    expert = read(run / "experts/0000.pt")
    assert not torch.equal(expert["trajectory"][0], expert["trajectory"][1])
    assert 0 < expert["example_loss"].min() and expert["example_loss"].max() <= 2
    stage("distill", [*DISTILL, "--out_dir", run, "--init", "high_loss"])
    contents = read(run / "sets/mkdt_high_loss.pt")
    assert torch.equal(contents["targets"], read(run / "targets.pt")["targets"][contents["indices"]])
    stage("evaluate", ["--figure1", run])
    assert json.loads((tmp_path / "figure1.jsonl").read_text())["curve"] == "cosine, batch 50"


def test_without_same_init_every_expert_has_its_start(tmp_path, stage):
    words = [word for word in EXPERTS if word != "--same_init"]
    stage("train_experts", [*words, "--out_dir", tmp_path, "--objective", "supervised"])
    starts = [read(path)["trajectory"][0] for path in (tmp_path / "experts").glob("*.pt")]
    assert not torch.equal(starts[0], starts[1])
    assert log(tmp_path / "train_experts.jsonl")[-1]["trajectory_variance"][0] > 0


@pytest.mark.parametrize("objective", OUT_DIM)
def test_sets_of_an_objective(runs, objective):
    contents = read(runs[objective] / "sets/mkdt_random.pt")
    train = common.load_images("digits", "train", "data", limit=N)
    labels = nn.functional.one_hot(train.labels[contents["indices"]], 10).float()
    assert torch.equal(contents["targets"], labels if objective == "supervised" else labels[:, :0])
    assert contents["options"]["distill"]["objective"] == objective
    assert contents["options"]["train_experts"]["objective"] == objective
    steps = [record for record in log(runs[objective] / "distill_mkdt_random.jsonl") if "iteration" in record]
    assert [step["iteration"] for step in steps] == [1, 2]
    assert all(step["matching_loss"] > 0 and step["pixel_change"] > 0 for step in steps)


@pytest.mark.parametrize("objective", ["supervised", "simclr"])
def test_same_seed_same_set(copy, stage, objective):
    run = copy(objective)
    before = read(run / "sets/mkdt_random.pt")["images"]
    (run / "sets/mkdt_random.pt").unlink()
    stage("distill", [*DISTILL, "--out_dir", run, "--max_experts", "2"])
    assert torch.equal(before, read(run / "sets/mkdt_random.pt")["images"])


def test_high_loss_subset_and_max_experts(copy, stage):
    run = copy("supervised")
    stage(
        "distill", [*DISTILL, "--out_dir", run, "--init", "high_loss", "--iters", "9", "--max_experts", "1"]
    )
    loss = read(run / "experts/0000.pt")["example_loss"]
    assert torch.equal(read(run / "sets/mkdt_high_loss.pt")["indices"], loss.topk(N // 10).indices)
    steps = [record for record in log(run / "distill_mkdt_high_loss.jsonl") if "iteration" in record]
    assert {step["expert"] for step in steps} == {0}


# -- the variance of gradients -------------------------------------------------------------------------------


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x @ self.theta


def test_gradient_variance_of_a_linear_loss():
    """The loss mean(theta x) has the gradient mean(x): its variance over batches of B of N is known."""
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([1.0, 0.0, 0.5])
    found = train_experts.gradient_variance(
        Linear(), lambda f, x, z, generator: f(x).mean(), x, x, batch_size=8, seed=0, count=4000
    )
    of_mean = x.var(0).sum().item() / 8 * (1 - 8 / 40)  # drawn without replacement
    assert found == pytest.approx(of_mean / x.mean(0).square().sum().item(), rel=0.05)
    same = x[:1].expand(40, -1)
    assert train_experts.gradient_variance(
        Linear(), lambda f, x, z, generator: f(x).mean(), same, same, batch_size=8, seed=0
    ) == pytest.approx(0, abs=1e-5)


def test_gradient_variance_without_a_signal():
    """Gradients that are noise alone: there is no such number."""
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    x = x - x.mean(0)
    values = [
        train_experts.gradient_variance(
            Linear(), lambda f, x, z, generator: f(x).mean(), x, x, batch_size=8, seed=seed
        )
        for seed in range(20)
    ]
    assert None in values and all(value is None or value > 1 for value in values)


# -- figure 1 ------------------------------------------------------------------------------------------------


@pytest.fixture
def curves(tmp_path):
    """Two runs whose logs are known: {name: folder}."""
    folders = {}
    for name, scale, last in [("supervised", 1, 0.2), ("simclr", 4, 0.7)]:
        folders[name] = tmp_path / name
        folders[name].mkdir()
        options = {
            "objective": name,
            "dataset": "digits",
            "batch_size": 64,
            "num_experts": 5,
            "same_init": True,
        }
        experts = [
            {"options": {**options, "batch_size": 9}},  # an earlier start with other options
            {"expert": 0, "gradient_variance": [9.0, 9.0]},
            {"options": {**options, "num_experts": 2}},  # one with the same
            {"expert": 0, "gradient_variance": [0.5 * scale, None]},
            {"options": options},
            {"trajectory_variance": [0.0, 2.0 * scale], "relative_variance": [None, 0.25]},
        ]
        steps = [
            {"options": {}},
            {"iteration": 1, "matching_loss": 9.0, "pixel_change": 9.0},
            {"options": {}},
        ]
        for i, loss in enumerate([1.0] + 12 * [last], 1):
            steps.append({"iteration": i, "matching_loss": loss, "pixel_change": i * scale / 100})
        for file, records in [("train_experts", experts), ("distill_any", steps)]:
            text = "".join(json.dumps(record) + "\n" for record in records)
            (folders[name] / f"{file}.jsonl").write_text(text)
        (folders[name] / "distill_subset_random.jsonl").write_text('{"options": {}}\n')
    return folders


def test_figure_1_reads_the_numbers(curves, tmp_path, stage, capsys):
    out = tmp_path / "out"
    stage("evaluate", ["--out_dir", out, "--figure1", *curves.values()])
    text = (out / "figure1.md").read_text()
    lines = text.splitlines()
    assert text in capsys.readouterr().out
    assert "At epoch 1 " in lines[0]
    assert "vary most for MTT-SSL (SimCLR), batch 64, 4 times as much as for MTT-SL, batch 64" in lines[0]
    matching = "MTT-SL, batch 64 from 1.000 to 0.200; MTT-SSL (SimCLR), batch 64 from 1.000 to 0.700."
    assert lines[1].endswith(matching)
    assert "moved most for MTT-SSL (SimCLR), batch 64, 4 times" in lines[2] and lines[3] == ""
    assert "| MTT-SSL (SimCLR), batch 64 | 5 | 2 |  | 8 | 0.25 | 1 | 0.7 | 0.52 |" in lines
    numbers = log(out / "figure1.jsonl")
    assert [len(curve["matching_loss"]) for curve in numbers] == [13, 13]  # of the last start alone
    assert numbers[0]["trajectory_variance"] == [0.0, 2.0]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert not (out / "figure1.png").exists()
    else:
        assert (out / "figure1.png").read_bytes().startswith(b"\x89PNG")


def test_figure_1_of_real_logs(runs, tmp_path, stage):
    stage("evaluate", ["--out_dir", tmp_path, "--name", "all", "--figure1", *runs.values()])
    found = {curve["curve"]: curve for curve in log(tmp_path / "all.jsonl")}
    assert set(found) == {
        "MTT-SL, batch 50",
        "MTT-SSL (Barlow Twins), batch 50",
        "MTT-SSL (SimCLR), batch 50",
    }
    for objective, curve in zip(OUT_DIM, found.values()):
        experts = log(runs[objective] / "train_experts.jsonl")
        assert curve["trajectory_variance"] == experts[-1]["trajectory_variance"]
        assert len(curve["matching_loss"]) == 2 and curve["experts"] == 3


def test_figure_1_of_logs_that_do_not_fit(curves, tmp_path, stage, capsys):
    def fails(*words):
        before = sorted(tmp_path.rglob("*"))
        run = ["--out_dir", tmp_path / "out", "--figure1", *curves.values()]
        refuses(capsys, lambda: stage("evaluate", run), "--figure1", *words)
        assert sorted(tmp_path.rglob("*")) == before

    run = curves["simclr"]
    log_of_another = (run / "distill_any.jsonl").read_text()
    (run / "distill_other.jsonl").write_text(log_of_another)
    fails("simclr", "more than one")
    (run / "distill_other.jsonl").unlink()
    (run / "distill_any.jsonl").write_text(
        '{"options": {"objective": "kd"}}\n' + log_of_another.splitlines()[-1]
    )
    fails("simclr", "other experts")
    for wrong in ('"x"', "NaN", "-1", "null", "[]", "1e999"):
        (run / "distill_any.jsonl").write_text(log_of_another.replace("0.7,", f"{wrong},"))
        fails("simclr", "distill.py")
    (run / "distill_any.jsonl").write_text(log_of_another.splitlines()[0] + "\n")
    fails("simclr", "matching_loss", "distill.py")
    (run / "distill_any.jsonl").write_text(log_of_another + '{"iter')
    fails("simclr")
    (run / "distill_any.jsonl").write_text(log_of_another)
    experts = (run / "train_experts.jsonl").read_text().splitlines()
    (run / "train_experts.jsonl").write_text("\n".join(experts).replace("true", "false"))
    fails("simclr", "--same_init")
    (run / "train_experts.jsonl").write_text("\n".join(experts[:3]))
    fails("simclr", "trajectory_variance")
    for wrong in ("[0.0]", "[]", "5", '["a", 1]', "[[1], 2]", "{}", "null"):
        (run / "train_experts.jsonl").write_text("\n".join(experts).replace("[0.0, 8.0]", wrong))
        fails("simclr", "train_experts.py")
    (run / "train_experts.jsonl").unlink()
    fails("simclr", "train_experts")
    for name in ("results", "train_experts", "distill_any", "evaluate"):
        run = ["--name", name, "--figure1", curves["supervised"]]
        refuses(capsys, lambda run=run: stage("evaluate", run), f"--name {name}")


def test_figure_1_is_the_papers():
    """Appendix A.2: the settings of experts and sets, KD beside them, and SSL with four times the batch."""
    for preset in ([], ["digits"], ["imagefolder", "a b/c"]):
        calls = commands("figure1", *preset)
        experts, sets = calls["train_experts"], calls["distill"]
        ssl = calls["train_teacher"][0].ssl
        assert [e.objective for e in experts] == ["kd", "supervised", ssl, ssl]
        assert all(e.same_init and e.num_experts == 5 and e.epochs >= 4 for e in experts)
        assert experts[3].batch_size == 4 * experts[2].batch_size
        assert [e.out_dir for e in experts] == [d.out_dir for d in sets] == calls["evaluate"][0].figure1
        assert len({d.out_dir for d in sets}) == 4 and len({(d.lr_img, d.fraction) for d in sets}) == 1
        assert [(d.syn_steps, d.expert_epochs) for d in sets] == [(20, 2), (20, 4), (10, 2), (10, 2)]
        assert all((d.max_experts, d.max_start_epoch, d.iters) == (1, 1, 100) for d in sets)
        assert {(d.limit, d.width, d.image_size) for d in sets} == {
            (e.limit, e.width, e.image_size) for e in experts
        }
        assert sets[0].limit == calls["train_teacher"][0].limit
        if not preset:
            assert {d.dataset for d in sets} == {"cifar100"} and sets[0].fraction == 0.01
            assert {d.lr_img for d in sets} == {1000} and calls["evaluate"][0].name == "figure1"
            assert [e.batch_size for e in experts] == [256, 256, 1024, 4096]
            assert [(e.lr, e.momentum, e.weight_decay) for e in experts[1:3]] == [
                (0.01, 0, 0),
                (1e-3, None, 1e-6),
            ]
    assert calls["evaluate"][0].name == "figure1_c"
    shrunk = commands("figure1", "rehearse")
    assert max(d.iters for d in shrunk["distill"]) <= 3 and shrunk["evaluate"][0].name == "figure1_rehearsal"
    assert all(4 * e.batch_size <= 4 * e.limit for e in shrunk["train_experts"])


# -- what does not go together -------------------------------------------------------------------------------


def test_experts_of_another_objective(copy, stage, capsys):
    run = copy("supervised")
    words = [*EXPERTS, "--out_dir", run, "--objective", "simclr"]
    before = (run / "experts/0000.pt").read_bytes()
    refuses(
        capsys,
        lambda: stage("train_experts", words),
        "0000.pt",
        "--objective supervised",
        "--objective simclr",
    )
    refuses(capsys, lambda: stage("train_experts", words[:-2]), "targets.pt")  # kd: there is no teacher
    words = [
        word for word in [*EXPERTS, "--out_dir", run, "--objective", "supervised"] if word != "--same_init"
    ]
    refuses(capsys, lambda: stage("train_experts", words), "0000.pt", "--same_init")
    assert (run / "experts/0000.pt").read_bytes() == before
    shutil.copy(copy("simclr") / "experts/0001.pt", run / "experts/0001.pt")
    words = [*DISTILL, "--out_dir", run, "--name", "x"]
    refuses(capsys, lambda: stage("distill", words), "0001.pt")
    expert = read(run / "experts/0000.pt")
    for out_dim in (-1, "16", 1.5, True, 10**30):
        expert["options"]["train_experts"]["out_dim"] = out_dim
        torch.save(expert, run / "experts/0000.pt")
        refuses(capsys, lambda: stage("distill", words), "0000.pt", "out_dim")
    expert["options"]["train_experts"]["objective"] = "gan"
    torch.save(expert, run / "experts/0000.pt")
    refuses(capsys, lambda: stage("distill", words), "0000.pt", "gan")
    assert [path.name for path in (run / "sets").glob("*.pt")] == ["mkdt_random.pt"]


@pytest.mark.parametrize("init", ["high_loss", "sas"])
def test_starts_that_an_objective_does_not_have(copy, stage, capsys, init):
    run = ["--out_dir", copy("simclr"), "--init", init]
    refuses(capsys, lambda: stage("distill", [*DISTILL, *run]), f"--init {init}", "simclr", "random")
    run = ["--out_dir", copy("supervised"), "--init", init]
    if init == "sas":
        refuses(capsys, lambda: stage("distill", [*DISTILL, *run]), "--init sas", "supervised", "high_loss")
    else:
        run += ["--method", "krr_st"]
        refuses(capsys, lambda: stage("distill", [*DISTILL, *run]), "--init high_loss", "supervised")


def test_options_that_do_not_go_with_an_objective(copy, stage, capsys, tmp_path):
    out = ["--out_dir", tmp_path / "new"]
    for options in (
        ["simclr", "--momentum", "0.9"],
        ["supervised", "--out_dim", "7"],
        ["kd", "--out_dim", "7"],
    ):
        words = [*EXPERTS, *out, "--objective", *options]
        refuses(capsys, lambda w=words: stage("train_experts", w), options[1], options[0])
    words = [*EXPERTS, *out, "--objective", "simclr", "--batch_size", "1"]
    refuses(capsys, lambda: stage("train_experts", words), "--batch_size 1", "simclr")
    for objective in ("simclr", "supervised"):
        words = [*EXPERTS, *out, "--objective", objective, "--batch_size", "151"]
        refuses(capsys, lambda w=words: stage("train_experts", w), "--batch_size 151", "150")
    assert not (tmp_path / "new").exists()
    run = ["--out_dir", copy("simclr"), "--name", "x"]
    refuses(capsys, lambda: stage("distill", [*DISTILL, *run, "--batch_syn", "1"]), "--batch_syn 1", "simclr")
    refuses(
        capsys, lambda: stage("distill", [*DISTILL, *run, "--fraction", "0.007"]), "--fraction", "1 of 150"
    )
    refuses(
        capsys, lambda: stage("distill", [*DISTILL, *run, "--max_experts", "4"]), "--max_experts 4", "has 3"
    )
    refuses(capsys, lambda: stage("distill", [*DISTILL, *run, "--width", "9"]), "0000.pt", "--width")


def test_a_folder_without_labels(tmp_path, stage, capsys):
    for i in range(4):
        write_image(tmp_path / f"data/train/all/{i}.png", i)
    words = [
        "--dataset",
        f"imagefolder:{tmp_path / 'data'}",
        "--out_dir",
        tmp_path / "new",
        "--batch_size",
        "2",
    ]
    run = [*words, "--objective", "supervised", "--device", "cpu"]
    refuses(capsys, lambda: stage("train_experts", run), "--objective supervised", "one class")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "trajectory", [torch.full((3, 1786), math.nan), torch.zeros(2, 5), torch.zeros(0, 5)]
)
def test_variance_of_broken_trajectories(copy, stage, capsys, trajectory):
    run = copy("supervised")
    expert = read(run / "experts/0001.pt")
    torch.save({**expert, "trajectory": trajectory}, run / "experts/0001.pt")
    words = [*EXPERTS, "--out_dir", run, "--objective", "supervised"]
    refuses(capsys, lambda: stage("train_experts", words), "0001.pt", "trajectory")


def test_other_images_with_the_same_labels(copy, stage, capsys, monkeypatch):
    run, load = copy("simclr"), common.load_images
    inverted = lambda *words: (data := load(*words))._replace(images=255 - data.images)  # noqa: E731
    monkeypatch.setattr(common, "load_images", inverted)
    refuses(capsys, lambda: stage("distill", [*DISTILL, "--out_dir", run, "--name", "x"]), "0000.pt", "other")


def test_last_batch_of_one_image(copy, stage):
    """15 images in batches of 7 leave one, with which SSL has nothing to contrast."""
    batches = distill.draw_batches(15, 7, 6, torch.Generator().manual_seed(0), smallest=2)
    assert [len(batch) for batch in batches] == [7] * 6
    assert [len(b) for b in distill.draw_batches(15, 7, 3, torch.Generator(), smallest=1)] == [7, 7, 1]
    contents = read(copy("barlow_twins") / "sets/mkdt_random.pt")
    assert contents["images"].isfinite().all()
