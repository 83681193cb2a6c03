"""Each stage, tiny: what it writes, the same seed the same file, what it says of files that do not fit."""

import functools
import json
import math
import shutil
import sys

import pytest
import torch
from conftest import DATA, DISTILL, EVALUATE, EXPERTS, TEACHER, refuses

import common
import distill
import evaluate
import train_experts

N, S, D = 150, 15, 32  # real images, images of a set, dimension of the targets


def read(path):
    return torch.load(path, weights_only=True)


# -- what the files hold -------------------------------------------------------------------------------------


def test_teacher_files(run_dir):
    teacher, targets = read(run_dir / "teacher.pt"), read(run_dir / "targets.pt")
    assert set(teacher) == {"encoder", "options", "images_id", "torch_version"}
    assert set(targets) == {"targets", "mean", "options", "images_id", "torch_version"}
    assert targets["targets"].shape == (N, D) and targets["targets"].dtype == torch.float32
    assert targets["options"]["train_teacher"]["ssl"] == "barlow_twins"
    # The targets are the saved encoder's features of the un-augmented images, in eval mode, in order.
    encoder = common.ResNet(channels=1, width=4)
    encoder.load_state_dict(teacher["encoder"])
    train = common.load_images("digits", "train", "data", limit=N)
    features = common.encode(encoder.eval(), train.images, train.mean, train.std)
    torch.testing.assert_close(features, targets["targets"])
    log = [json.loads(line) for line in (run_dir / "train_teacher.jsonl").read_text().splitlines()]
    assert 0 <= log[-1]["probe_accuracy"] <= 100


def test_expert_files(run_dir):
    paths = sorted((run_dir / "experts").iterdir())
    assert [p.name for p in paths] == ["0000.pt", "0001.pt", "0002.pt"]
    expert = read(paths[1])
    assert set(expert) == {
        "trajectory",
        "example_loss",
        "options",
        "images_id",
        "targets_id",
        "torch_version",
    }
    net = common.ConvNet(D, 8, 1, 8, 2)
    assert expert["trajectory"].shape == (4, common.flatten(net).numel()) and expert[
        "example_loss"
    ].shape == (N,)
    assert set(expert["options"]) == {"train_teacher", "train_experts"}
    # No two snapshots are the same, and the first is the seeded initialisation.
    assert all((a != b).any() for a, b in zip(expert["trajectory"], expert["trajectory"][1:]))
    torch.manual_seed(1)
    assert torch.equal(expert["trajectory"][0], common.flatten(common.ConvNet(D, 8, 1, 8, 2)))
    # example_loss is that of the weights after the first epoch.
    train, targets, _ = common.load_targets(run_dir, "digits", "data", limit=N)
    torch.nn.utils.vector_to_parameters(expert["trajectory"][1], net.parameters())
    outputs = common.encode(net, train.images, train.mean, train.std)
    torch.testing.assert_close(expert["example_loss"], (outputs - targets).square().mean(1))


def test_set_files(run_dir):
    names = {"subset_random", "subset_high_loss", "mkdt_random", "mkdt_high_loss"}
    assert {p.name for p in (run_dir / "sets").iterdir()} == {
        f"{n}{e}" for n in names for e in (".pt", ".png")
    }
    train, targets, _ = common.load_targets(run_dir, "digits", "data", limit=N)
    for name in names:
        contents = read(run_dir / "sets" / f"{name}.pt")
        assert set(contents) == {
            "images",
            "targets",
            "lr",
            "image_size",
            "indices",
            "mean",
            "std",
            "options",
            "images_id",
            "targets_id",
            "torch_version",
        }
        assert contents["images"].shape == (S, 1, 8, 8) and contents["images"].dtype == torch.float32
        assert contents["targets"].shape == (S, D) and contents["indices"].shape == (S,)
        assert isinstance(contents["lr"], float) and contents["lr"] > 0
        assert torch.equal(
            contents["targets"], targets[contents["indices"]]
        )  # Z_syn is not learnt by default
        real = common.normalise(train.images[contents["indices"]], train.mean, train.std)
        if name.startswith("subset"):
            assert torch.equal(contents["images"], real) and contents["lr"] == pytest.approx(0.1)
        else:  # one iteration has moved images and lr, and the last update is in the file
            assert (contents["images"] != real).any() and contents["lr"] != pytest.approx(0.1, abs=1e-12)
    losses = torch.stack([read(p)["example_loss"] for p in sorted((run_dir / "experts").iterdir())]).mean(0)
    expected = losses.argsort(descending=True)[:S]
    assert torch.equal(read(run_dir / "sets/mkdt_high_loss.pt")["indices"], expected)


def test_results(run_dir):
    records = [json.loads(line) for line in (run_dir / "results.jsonl").read_text().splitlines()]
    sets = {"none", "full", "subset_random", "subset_high_loss", "mkdt_random", "mkdt_high_loss"}
    assert {(r["set"], r["fraction"], r["seed"]) for r in records} == {
        (s, f, seed) for s in sets for f in (0.2, 0.4) for seed in (0, 1)
    }
    assert len(records) == 24 and all(0 <= r["accuracy"] <= 100 for r in records)
    table = [line.strip("| ").split(" | ") for line in (run_dir / "results.md").read_text().splitlines()[:8]]
    assert table[0] == [
        "pre-training set; labels of digits", "n", "20 % labels", "difference", "40 % labels", "difference"
    ]  # fmt: skip
    assert [line[0] for line in table[2:]] == [
        "no pre-training", "random subset", "high-loss subset", "MKDT (random init)", "MKDT", "full data"
    ]  # fmt: skip
    values = {
        name: torch.tensor([r["accuracy"] for r in records if r["set"] == name and r["fraction"] == 0.2])
        for name in ("none", "subset_random")
    }
    none, d = values["none"], values["none"] - values["subset_random"]
    expected = ["2", f"{none.mean():.2f} ± {none.std():.2f}", f"{d.mean():+.2f} ± {d.std() / 2**0.5:.2f}"]
    assert table[2][1:4] == expected


def test_figure(copy, stage, capsys, monkeypatch):
    (copy / "results.png").unlink(missing_ok=True)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)  # not installed
        stage("evaluate", [*EVALUATE, "--out_dir", copy])
    assert "matplotlib" in capsys.readouterr().out and not (copy / "results.png").exists()
    pytest.importorskip("matplotlib")
    stage("evaluate", [*EVALUATE, "--out_dir", copy])
    assert (copy / "results.png").read_bytes()[:4] == b"\x89PNG"


def test_logs(run_dir):
    for stage in ("train_teacher", "train_experts", "distill_mkdt_random", "evaluate"):
        first, *rest = [json.loads(line) for line in (run_dir / f"{stage}.jsonl").read_text().splitlines()]
        assert {"command", "options", "time", "torch", "device"} <= set(first)
    record = [json.loads(line) for line in (run_dir / "distill_mkdt_random.jsonl").read_text().splitlines()][
        -1
    ]
    assert record["iteration"] == 1 and record["matching_loss"] > 0 and record["pixel_change"] > 0


def test_centred_targets(copy, stage):
    """--centre takes the mean out of the targets; a teacher that is there is not trained again."""
    before = read(copy / "targets.pt")
    weights = (copy / "teacher.pt").read_bytes()
    assert before["mean"].abs().max() == 0 and before["targets"].mean(0).abs().max() > 0.01
    shutil.move(copy / "targets.pt", copy / "raw.pt")
    stage("train_teacher", [*TEACHER, "--out_dir", copy, "--centre"])
    after = read(copy / "targets.pt")
    torch.testing.assert_close(after["targets"] + after["mean"], before["targets"])
    assert after["targets"].mean(0).abs().max() < 1e-5
    assert (copy / "teacher.pt").read_bytes() == weights
    teacher = read(copy / "teacher.pt")  # as a run with --centre writes it
    teacher["options"]["train_teacher"]["centre"] = True
    torch.save(teacher, copy / "teacher.pt")
    (copy / "targets.pt").unlink()
    stage("train_teacher", [*TEACHER, "--out_dir", copy])
    assert torch.equal(read(copy / "targets.pt")["targets"], before["targets"])


def test_files_from_before_an_option(copy, stage, capsys):
    """A file that does not name an option of today was made without it."""
    contents = read(copy / "targets.pt")
    del contents["options"]["train_teacher"]["centre"]
    torch.save(contents, copy / "targets.pt")
    stage("train_teacher", [*TEACHER, "--out_dir", copy])
    refuses(capsys, lambda: stage("train_teacher", [*TEACHER, "--out_dir", copy, "--centre"]), "--centre")


# -- the same seed, the same file; a finished stage is left alone --------------------------------------------


def test_same_seed_same_files(run_dir, tmp_path, stage):
    out = ["--out_dir", tmp_path]
    stage("train_teacher", [*TEACHER, *out])
    assert torch.equal(read(tmp_path / "targets.pt")["targets"], read(run_dir / "targets.pt")["targets"])
    stage(
        "train_experts", [*EXPERTS, *out, "--first_expert", "2", "--num_experts", "1"]
    )  # alone as among many
    assert torch.equal(
        read(tmp_path / "experts/0002.pt")["trajectory"], read(run_dir / "experts/0002.pt")["trajectory"]
    )
    stage("train_experts", [*EXPERTS, *out])
    stage("distill", [*DISTILL, *out, "--iters", "1"])
    again, before = read(tmp_path / "sets/mkdt_high_loss.pt"), read(run_dir / "sets/mkdt_high_loss.pt")
    assert torch.equal(again["images"], before["images"]) and again["lr"] == before["lr"]
    stage("evaluate", [*EVALUATE, *out, "--sets", "none", "mkdt_high_loss"])
    before = [json.loads(line) for line in (run_dir / "results.jsonl").read_text().splitlines()]
    for line in (tmp_path / "results.jsonl").read_text().splitlines():
        assert json.loads(line) in before


def test_another_seed_another_expert(run_dir):
    a, b = (read(run_dir / f"experts/000{k}.pt")["trajectory"] for k in (0, 1))
    assert (a[0] != b[0]).any()


def test_a_finished_stage_is_not_run_again(copy, stage):
    def everything():
        files = [*copy.glob("*.pt"), *copy.glob("*/*.pt"), copy / "results.jsonl"]
        return {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in files}

    before = everything()
    stage("train_teacher", [*TEACHER, "--out_dir", copy])
    stage("train_experts", [*EXPERTS, "--out_dir", copy])
    stage("distill", [*DISTILL, "--out_dir", copy, "--iters", "1"])
    stage("evaluate", [*EVALUATE, "--out_dir", copy])
    assert everything() == before


def test_a_broken_result_is_measured_again(copy, stage):
    path = copy / "results.jsonl"
    text = path.read_text()
    path.write_text(text[:-40])  # killed while writing the last record
    stage("evaluate", [*EVALUATE, "--out_dir", copy])
    assert sorted(path.read_text().splitlines()[-1:]) == sorted(text.splitlines()[-1:])


def test_broken_records_are_left_out_with_a_warning(copy, stage, capsys):
    path = copy / "results.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    wrong = [{**first, "accuracy": a} for a in ("x", None, [1], 1e9)] + [{**first, "set": [1]}, {}, 3]
    with open(path, "ab") as file:
        file.write("".join(json.dumps(record) + "\n" for record in wrong).encode() + b"\xff\xfe\n")
    table = (copy / "results.md").read_text()
    stage("evaluate", [*EVALUATE, "--out_dir", copy])
    assert capsys.readouterr().out.count("is broken and left out") == 8
    assert (copy / "results.md").read_text() == table


def test_a_set_made_again_is_measured_again(copy, stage):
    path = copy / "sets/mkdt_random.pt"
    contents = read(path)
    torch.save({**contents, "lr": contents["lr"] / 2}, path)
    before = len((copy / "results.jsonl").read_text().splitlines())
    stage("evaluate", [*EVALUATE, "--out_dir", copy])
    assert len((copy / "results.jsonl").read_text().splitlines()) == before + 4


# -- distillation --------------------------------------------------------------------------------------------


def test_every_expert_and_start_epoch_is_used(copy, stage):
    stage("distill", [*DISTILL, "--out_dir", copy, "--iters", "40", "--syn_steps", "1", "--name", "long"])
    records = [json.loads(line) for line in (copy / "distill_long.jsonl").read_text().splitlines()][1:]
    assert {(r["expert"], r["start_epoch"]) for r in records} == {(k, t) for k in range(3) for t in range(2)}


def test_learnt_targets_and_inner_momentum(copy, stage):
    options = ["--iters", "1", "--lr_targets", "1", "--inner_momentum", "0.9", "--name", "authors"]
    stage("distill", [*DISTILL, "--out_dir", copy, *options])
    contents, targets = read(copy / "sets/authors.pt"), read(copy / "targets.pt")["targets"]
    assert (contents["targets"] != targets[contents["indices"]]).any()


def test_subset_with_the_learnt_lr(copy, stage):
    stage(
        "distill",
        [*DISTILL, "--out_dir", copy, "--init", "random", "--iters", "0", "--lr_from", "mkdt_random"],
    )
    contents = read(copy / "sets/subset_random_lr_from_mkdt_random.pt")
    assert contents["lr"] == read(copy / "sets/mkdt_random.pt")["lr"]
    assert torch.equal(contents["images"], read(copy / "sets/subset_random.pt")["images"])


def test_sas_subset(copy, stage, capsys):
    run = [*DISTILL, "--out_dir", copy, "--init", "sas", "--iters", "0"]
    stage("distill", run)
    assert len(set(read(copy / "sets/subset_sas.pt")["indices"].tolist())) == S
    classes = torch.arange(N) % 3
    given = [*run, "--latent_classes", copy / "classes.pt"]
    torch.save({"latent_classes": classes}, copy / "classes.pt")
    stage("distill", [*given, "--name", "given"])
    assert classes[read(copy / "sets/given.pt")["indices"]].bincount().tolist() == [5, 5, 5]
    torch.save({"latent_classes": classes[1:]}, copy / "classes.pt")
    refuses(capsys, lambda: stage("distill", [*given, "--name", "x"]), "classes.pt", "150")
    many = [*run, "--num_latent_classes", "151", "--name", "x"]
    refuses(capsys, lambda: stage("distill", many), "--num_latent_classes 151", "150")


def test_krr_st(copy, stage, monkeypatch):
    """Images and targets are learnt, the loss falls, and students start anew after --pool_steps steps."""
    made, init = [], distill.PoolStudent.__init__
    monkeypatch.setattr(distill.PoolStudent, "__init__", lambda *words: (made.append(words), init(*words))[1])
    pool = ["--pool_size", "2", "--pool_steps", "5", "--batch_real", "100", "--lr_img", "0.02"]
    run = [*DATA, "--width", "8", "--fraction", "0.1", "--out_dir", copy, "--method", "krr_st", *pool]
    stage("distill", [*run, "--iters", "40"])
    contents, real = read(copy / "sets/krr_st_random.pt"), read(copy / "targets.pt")["targets"]
    assert (contents["targets"] != real[contents["indices"]]).any() and contents["lr"] == pytest.approx(0.1)
    records = [json.loads(line) for line in (copy / "distill_krr_st_random.jsonl").read_text().splitlines()]
    losses = [r["regression_loss"] for r in records[1:]]
    assert len(losses) == 40 and sum(losses[-10:]) < sum(losses[:10])
    # The counter is reset: it runs up to 5 and starts again at 0, in every student of the pool.
    steps = {k: [r["steps"] for r in records[1:] if r["student"] == k] for k in (0, 1)}
    for counts in steps.values():
        assert all(b == (a + 1) % 6 for a, b in zip(counts, counts[1:]))
    assert len(made) == 2 + sum(r["steps"] == 5 for r in records[1:]) > 4
    assert len({words[2] for words in made}) == len(made)  # each with a seed of its own


def test_clipped_gradient(copy, stage):
    """--clip_grad bounds the norm of the pixels' gradient, which the log holds as it was; alpha's follows."""
    run = [*DISTILL, "--out_dir", copy, "--iters", "1", "--init", "random", "--lr_img", "1", "--log_lr"]
    run += ["--lr_lr", "1"]
    start = read(copy / "sets/subset_random.pt")["images"]
    moved, factor = {}, {}
    for name, more in {"free": [], "clipped": ["--clip_grad", "1e-5"]}.items():
        stage("distill", [*run, *more, "--name", name])
        made = read(copy / f"sets/{name}.pt")
        moved[name], factor[name] = (made["images"] - start).norm().item(), math.log(made["lr"] / 0.1)
        record = json.loads((copy / f"distill_{name}.jsonl").read_text().splitlines()[-1])
        assert record["gradient_norm"] == pytest.approx(moved["free"], rel=1e-2)
    assert moved["free"] > 2e-5 and moved["clipped"] == pytest.approx(1e-5, rel=1e-1)
    shrunk = moved["clipped"] / moved["free"]
    assert abs(factor["free"]) > 1e-3 and factor["clipped"] == pytest.approx(shrunk * factor["free"], rel=0.2)


def test_lr_stays_positive(copy, stage):
    stage(
        "distill",
        [*DISTILL, "--out_dir", copy, "--iters", "4", "--lr_lr", "10", "--lr_img", "0", "--name", "wild"],
    )
    assert all(
        json.loads(line)["lr"] > 0 for line in (copy / "distill_wild.jsonl").read_text().splitlines()[1:]
    )
    assert read(copy / "sets/wild.pt")["lr"] > 0


def test_the_logarithm_of_alpha_is_learnt(copy, stage):
    """A step of its SGD is a factor: no step makes alpha_syn negative, and a rate of 0 leaves it alone."""
    run = [*DISTILL, "--out_dir", copy, "--init", "random", "--iters", "3", "--lr_init", "0.2", "--log_lr"]
    for rate, name in [("0", "still"), ("1", "fast")]:
        stage("distill", [*run, "--lr_lr", rate, "--lr_img", "0", "--name", name])
    still, fast = (read(copy / f"sets/{name}.pt")["lr"] for name in ("still", "fast"))
    assert still == pytest.approx(0.2) and fast > 0 and abs(math.log(fast / 0.2)) > 1e-3
    logs = [(copy / f"distill_{name}.jsonl").read_text().splitlines()[1:] for name in ("still", "fast")]
    assert [json.loads(logs[1][-1])["lr"], json.loads(logs[0][0])["lr"]] == [fast, still]


def test_smaller_images_and_more_of_them(copy, stage, capsys):
    """--stored_size: no more numbers than the plain set has, and what students see is the enlarged image."""
    run = [*DISTILL, "--out_dir", copy, "--init", "random", "--iters"]
    stage("distill", [*run, "2", "--stored_size", "4", "--name", "small"])
    stage("distill", [*run, "0", "--stored_size", "4", "--name", "small_subset"])
    small, subset, plain = (read(copy / f"sets/{n}.pt") for n in ("small", "small_subset", "mkdt_random"))
    assert small["image_size"] == plain["image_size"] == 8 and small["images"].shape[2:] == (4, 4)
    numbers = [s["images"].numel() + s["targets"].numel() for s in (small, plain)]
    assert numbers[1] - 16 - D < numbers[0] <= numbers[1] and len(small["images"]) > S
    train = common.load_images("digits", "train", "data", limit=N)
    real = common.normalise(train.images[subset["indices"]], train.mean, train.std)
    assert torch.allclose(subset["images"], torch.nn.functional.avg_pool2d(real, 2), atol=1e-6)
    assert not torch.equal(small["images"], subset["images"])
    made = {"images_id": plain["images_id"], "targets_id": plain["targets_id"]}
    images, targets, lr = evaluate.load_set(copy / "sets/small.pt", 1, 8, D, made)
    assert images.shape == (len(targets), 1, 8, 8) and lr == small["lr"]
    assert torch.equal(images, common.enlarge(small["images"], 8))
    stage("evaluate", [*EVALUATE, "--out_dir", copy, "--sets", "small", "small_subset"])
    for wrong in ({"image_size": torch.tensor([8, 8])}, {"images": torch.zeros(len(targets), 1, 0, 0)}):
        torch.save(small | wrong, copy / "sets/edited.pt")
        load = functools.partial(evaluate.load_set, copy / "sets/edited.pt", 1, 8, D, made)
        refuses(capsys, load, "edited.pt")
    run[-1:] = ["--iters", "1", "--name", "new", "--stored_size"]
    refuses(capsys, lambda: stage("distill", [*run, "8"]), "--stored_size 8", "8 px")
    refuses(capsys, lambda: stage("distill", [*run, "4", "--method", "krr_st"]), "--stored_size", "krr_st")
    line = refuses(capsys, lambda: stage("distill", [*run, "4", "--fraction", "1"]), "--fraction 1")
    least, _, most = line.split()[-3:]  # what it advises is allowed
    assert 0 < float(least) < float(most) < 1
    for share in (least, most):
        stage("distill", [*run, "4", "--fraction", share, "--iters", "0"])
        assert 1 <= len(read(copy / "sets/new.pt")["images"]) <= N
        (copy / "sets/new.pt").unlink()


@pytest.mark.parametrize("centred", [False, True])
def test_our_recipe_wants_centred_targets(copy, stage, capsys, centred):
    """It says so of targets whose mean is large, and makes the set all the same."""
    targets = read(copy / "targets.pt")["targets"].abs()
    torch.save({"targets": targets - targets.mean(0) if centred else targets}, copy / "targets.pt")
    shutil.rmtree(copy / "experts")
    stage("train_experts", [*EXPERTS, "--out_dir", copy])
    run = [*DISTILL, "--out_dir", copy, "--iters", "1", "--recipe", "best"]
    stage("distill", run)
    said = capsys.readouterr().err
    assert ("warning" in said and "--centre" in said) != centred and (copy / "sets/best_random.pt").exists()


def test_a_fork_needs_targets_only(copy, stage):
    targets = read(copy / "targets.pt")["targets"]
    shutil.rmtree(copy / "experts"), shutil.rmtree(copy / "sets")
    torch.save({"targets": targets[:, :7]}, copy / "targets.pt")
    stage("train_experts", [*EXPERTS, "--out_dir", copy])
    stage("distill", [*DISTILL, "--out_dir", copy, "--iters", "1"])
    stage("evaluate", [*EVALUATE, "--out_dir", copy, "--sets", "mkdt_high_loss"])
    assert read(copy / "sets/mkdt_high_loss.pt")["targets"].shape == (S, 7)


# -- encoders and labels of the evaluation ------------------------------------------------------------


@pytest.mark.parametrize("options", [["resnet10"], ["resnet18", "--norm", "instance"]])
def test_larger_encoders(copy, stage, options):
    run = [*EVALUATE, "--out_dir", copy, "--width", "4", "--image_size", "8", "--sets", "none", "mkdt_random"]
    before = (copy / "results.jsonl").read_text()
    stage("evaluate", [*run, "--arch", *options])
    records = [json.loads(line) for line in (copy / "results.jsonl").read_text()[len(before) :].splitlines()]
    assert len(records) == 8 and {r["options"]["arch"] for r in records} == {
        options[0]
    }  # nothing of the ConvNet


def test_ssl_on_the_images_of_a_set(copy, stage, capsys):
    """Both objectives of a set as rows of one table; no pre-training stays one row."""
    before = (copy / "results.jsonl").read_text()
    run = [*EVALUATE, "--out_dir", copy, "--sets", "none", "subset_random", "full"]
    stage("evaluate", [*run, "--pretrain", "kd", "simclr", "barlow_twins"])
    assert (copy / "results.jsonl").read_text().startswith(before)
    table = (copy / "results.md").read_text()
    for row in (
        "no pre-training",
        "random subset",
        "random subset, pre-trained by SimCLR",
        "full data, pre-trained by Barlow Twins",
    ):
        assert f"| {row} | " in table
    assert table.count("| no pre-training") == 1 and "no pre-training," not in table
    stage("evaluate", [*EVALUATE, "--out_dir", copy, "--sets", "none", "full", "subset_random:simclr"])
    rows = [line.split(" | ")[0].strip("| ") for line in (copy / "results.md").read_text().splitlines()[2:5]]
    assert rows == ["no pre-training", "random subset, pre-trained by SimCLR", "full data"]
    run = [*EVALUATE, "--out_dir", copy, "--sets", "subset_random:gan"]
    refuses(capsys, lambda: stage("evaluate", run), "--sets", "subset_random:gan", "simclr")


@pytest.mark.parametrize("objective", ["kd", "krr_st", "simclr", "barlow_twins"])
def test_pretraining_lowers_its_loss(objective):
    args = evaluate.parse_args([*DATA, "--width", "8", "--epochs", "30", "--krr_st_epochs", "30"])
    torch.manual_seed(0)
    net = evaluate.make_encoder(args, D, 8, 1)
    images, targets = torch.randn(40, 1, 8, 8), torch.randn(40, D)
    stats = torch.tensor([0.5]), torch.tensor([0.3])

    def loss():
        if objective in ("kd", "krr_st"):
            return torch.nn.functional.mse_loss(net(images), targets).item()
        x = common.denormalise(images, *stats)
        views = [common.random_view(x, torch.Generator().manual_seed(i), flip=False) for i in range(2)]
        return common.SSL[objective](*(net(common.normalise(view, *stats)) for view in views)).item()

    before = loss()
    data = common.ImageSet(None, None, *stats, flip=False)
    evaluate.pretrain(net, objective, images, targets, data, 0.1, args, seed=0)
    assert loss() < before


def test_a_curve_of_accuracy_against_steps(copy, stage):
    """A point is what a training of that length gives; untrained weights give the same at every one."""
    run = [*EVALUATE, "--out_dir", copy, "--sets", "none", "mkdt_random", "--seeds", "0"]
    (copy / "results.jsonl").unlink()
    stage("evaluate", [*run, "--epochs", "3"])  # of one step each
    stage("evaluate", [*run, "--probe_at", "5", "3", "1", "--name", "curve"])
    records = [json.loads(line) for line in (copy / "results.jsonl").read_text().splitlines()]
    found = {(r["set"], r.get("steps"), r["fraction"]): r["accuracy"] for r in records}
    assert len(records) == len(found) == 16  # two sets and fractions, at the end and three points
    for f in (0.2, 0.4):
        assert found["mkdt_random", 3, f] == found["mkdt_random", None, f]
        assert {found["none", steps, f] for steps in (1, 3, 5)} == {found["none", None, f]}
    table = (copy / "curve.md").read_text()
    heads = [f" {p} % labels, {steps} steps " for p in (20, 40) for steps in (1, 3, 5)]
    assert table.splitlines()[0].split("|")[3:-1] == heads and "for the steps that are said" in table
    before = (copy / "results.jsonl").read_bytes()
    stage("evaluate", [*run, "--probe_at", "1", "3", "--name", "curve"])
    assert (copy / "results.jsonl").read_bytes() == before  # these are known


def test_a_curve_goes_on_with_its_own_points_only(copy, stage, capsys, monkeypatch):
    """A checkpoint beyond the first points does not serve other fractions, which would miss some."""
    run = [*EVALUATE, "--out_dir", copy, "--sets", "mkdt_random", "--seeds", "0", "--checkpoint_minutes", "0"]
    run += ["--probe_at", "1", "4", "--name", "curve", "--fractions", "0.2"]
    (copy / "results.jsonl").unlink()
    real = evaluate.probe

    def dies(*args):
        if (copy / "results.jsonl").exists():
            raise SystemExit(143)
        return real(*args)

    monkeypatch.setattr(evaluate, "probe", dies)
    with pytest.raises(SystemExit):
        stage("evaluate", run)
    monkeypatch.setattr(evaluate, "probe", real)
    before = (copy / "results.jsonl").read_text()
    assert before.count("accuracy") == 1 and list(copy.glob("evaluate_*.checkpoint"))
    refuses(capsys, lambda: stage("evaluate", [*run, "0.4"]), "checkpoint", "fractions")
    stage("evaluate", run)
    records = [json.loads(line) for line in (copy / "results.jsonl").read_text().splitlines()]
    assert [r["steps"] for r in records] == [1, 4] and not list(copy.glob("evaluate_*.checkpoint"))


def test_encoders_are_those_asked_for():
    for options, parameters in [([], 1_348_608), (["--arch", "resnet10"], 4_898_112 + 512 * 513)]:
        args = evaluate.parse_args(options)
        net = evaluate.make_encoder(args, 512, 32, 3)
        assert sum(p.numel() for p in net.parameters()) == parameters
    instance = evaluate.make_encoder(
        evaluate.parse_args(["--arch", "resnet18", "--norm", "instance"]), 512, 32, 3
    )
    assert not list(instance.buffers())


@pytest.mark.parametrize("protocol", ["finetune", "finetune_slow", "finetune_krr_st"])
def test_full_finetuning(copy, stage, protocol):
    run = [*DATA, "--width", "8", "--out_dir", copy, "--protocol", protocol, "--seeds", "0", "--epochs", "2"]
    before = (copy / "results.jsonl").read_text()
    for steps in ("1", "150"):
        stage("evaluate", [*run, "--sets", "none", "mkdt_random", "--finetune_steps", steps, "--name", steps])
        assert f"full fine-tuning ({protocol})" in (copy / f"{steps}.md").read_text()
    records = [json.loads(line) for line in (copy / "results.jsonl").read_text()[len(before) :].splitlines()]
    assert [(r["set"], r["fraction"], r["options"]["finetune_steps"]) for r in records] == [
        ("none", 1.0, 1), ("mkdt_random", 1.0, 1), ("none", 1.0, 150), ("mkdt_random", 1.0, 150)
    ]  # fmt: skip
    accuracies = [r["accuracy"] for r in records]
    assert min(accuracies[2:]) > max(accuracies[:2])


def test_finetuning_leaves_the_encoder_alone():
    args = evaluate.parse_args([*DATA, "--width", "8", "--protocol", "finetune", "--finetune_steps", "3"])
    train = common.load_images("digits", "train", "data", limit=N)
    net = evaluate.make_encoder(args, D, 8, 1)
    before = common.flatten(net)
    evaluate.finetune(net, "digits", train, train, [0.5, 1.0], args, 0)
    assert torch.equal(common.flatten(net), before)


def test_random_crop():
    """Every result is a window of the padded image or of its mirror image; all windows occur."""
    image = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8)
    crops = evaluate.random_crop(image.expand(500, -1, -1, -1), torch.Generator().manual_seed(0), flip=True)
    padded = torch.nn.functional.pad(image, [1] * 4)
    windows = [padded[0, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    windows += [window.flip(2) for window in windows]
    counts = [sum(torch.equal(crop, window) for crop in crops) for window in windows]
    assert sum(counts) == 500 and min(counts) > 0
    still = evaluate.random_crop(image.expand(50, -1, -1, -1), torch.Generator().manual_seed(0), flip=False)
    assert all(any(torch.equal(crop, window) for window in windows[:9]) for crop in still)


def test_balanced_labels():
    labels = torch.tensor([0] * 50 + [1] * 6 + [2] * 2)
    order = evaluate.label_order(labels, "balanced", seed=0)
    assert sorted(order.tolist()) == list(range(58))
    assert labels[order[:3]].sort().values.tolist() == [0, 1, 2]
    assert labels[order[:6]].bincount().tolist() == [2, 2, 2]
    assert labels[order[:10]].bincount().tolist() == [4, 4, 2]  # class 2 has no more
    uniform = evaluate.label_order(labels, "uniform", seed=0)
    assert sorted(uniform.tolist()) == list(range(58)) and not torch.equal(order, uniform)
    assert not torch.equal(order, evaluate.label_order(labels, "balanced", seed=1))


def test_seed_of_the_labels(copy, stage, monkeypatch):
    """--label_seed draws the same labels for all seeds; without it each seed draws its own."""
    seeds, label_order = [], evaluate.label_order
    monkeypatch.setattr(
        evaluate, "label_order", lambda *words: (seeds.append(words[2]), label_order(*words))[1]
    )
    run = [*EVALUATE, "--out_dir", copy, "--sets", "none"]
    stage("evaluate", [*run, "--label_seed", "7"])
    assert seeds == [7, 7]
    stage("evaluate", [*run, "--seeds", "5", "6"])
    assert seeds == [7, 7, 5, 6]


# -- tables ------------------------------------------------------------------------------------------------


def test_several_sets_of_a_method_are_one_row(copy, stage):
    for seed in ("1", "2"):
        for iters in ("0", "1"):
            more = ["--out_dir", copy, "--iters", iters, "--init", "random", "--seed", seed]
            stage("distill", [*DISTILL, *more])
    assert (
        read(copy / "sets/mkdt_random_seed1.pt")["images"] != read(copy / "sets/mkdt_random.pt")["images"]
    ).any()
    stage("evaluate", [*EVALUATE, "--out_dir", copy])
    lines = [line.strip("| ").split(" | ") for line in (copy / "results.md").read_text().splitlines()]
    rows = {line[0]: line for line in lines if len(line) > 2}
    assert rows["MKDT (random init)"][1] == "3 x 2" and rows["MKDT"][1] == "2"
    records = [json.loads(line) for line in (copy / "results.jsonl").read_text().splitlines()]

    def matrix(name):
        a = {(r["set"], r["seed"]): r["accuracy"] for r in records if r["fraction"] == 0.2}
        return torch.tensor([[a[f"{name}{s}", seed] for seed in (0, 1)] for s in ("", "_seed1", "_seed2")])

    x = matrix("mkdt_random")
    within = (x.var(1).sum() / 3).sqrt()
    assert rows["MKDT (random init)"][2] == f"{x.mean():.2f} ± {within:.2f}, sets ± {x.mean(1).std():.2f}"
    d = x - matrix("subset_random")
    error = (d.mean(0).var() / 2 + d.mean(1).var() / 3).sqrt()
    assert rows["MKDT (random init)"][3] == f"{d.mean():+.2f} ± {error:.2f}"
    stage("evaluate", [*EVALUATE, "--out_dir", copy, "--sets", "mkdt_random_seed1"])
    assert "| mkdt_random_seed1 | 2 | " in (copy / "results.md").read_text()


def test_rows_that_failed_or_were_not_run(copy, stage, capsys):
    """They show as such, with a line each; the rest is measured, and the exit status is 2."""
    (copy / "sets/mkdt_high_loss.pt").write_bytes(b"not a set")
    capsys.readouterr()
    run = [*EVALUATE, "--out_dir", copy, "--sets", "none", "mkdt_high_loss", "krr_st_random", "full"]
    with pytest.raises(SystemExit) as stop:
        stage("evaluate", [*run, "--fractions", "0.001", "0.2", "--downstream", "digits", "imagefolder:/no"])
    messages = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and all(message.startswith("error: ") for message in messages)
    for words in ("mkdt_high_loss.pt", "krr_st_random.pt", "--fractions 0.001", "/no/train"):
        assert sum(words in message for message in messages) == 1
    lines = (copy / "results.md").read_text().splitlines()
    assert lines[2].startswith("| no pre-training | 2 | failed | ") and "±" in lines[2]
    assert "| KRR-ST | 0 | not run | not run |" in lines and "| MKDT | 2 | failed | failed |" in lines
    assert "| pre-training set; labels of no | n | 0.1 % labels | 20 % labels |" in lines  # shown, all failed
    assert lines.count("| full data | 2 | failed | failed |") == 1


def test_the_papers_figures(copy, stage):
    """Each has one place in results/paper.csv; a run on other images shows those of the first set beside."""
    paper = evaluate.read_paper("table1", "cifar10", "convnet")
    assert paper["cifar10", "mkdt_high_loss", "cifar10", 0.01] == ("44.36 ± 1.61", "paper")
    assert paper["cifar10", "full", "flowers", 0.05] == ("6.37 ± 0.67", "paper") and len(paper) == 84
    assert len(evaluate.read_paper("table2", "cifar100", "convnet")) == 16 * 7
    larger = evaluate.read_paper("table5", "cifar100", "resnet18")
    assert larger["cifar100", "mkdt_high_loss_1000", "cifar10", 0.05][0] == "46.10 ± 0.60"
    assert evaluate.read_paper("table3", "tinyimagenet", "convnet") == {}  # not known
    assert evaluate.read_paper("table7", "tinyimagenet", "convnet") == {}
    stage("evaluate", [*EVALUATE, "--out_dir", copy, "--paper", "table1", "--name", "table1"])
    lines = (copy / "table1.md").read_text().splitlines()
    assert lines[0].endswith(" | paper: cifar10, 1 % | paper: cifar10, 5 % |")
    (row,) = [line for line in lines if line.startswith("| MKDT |")]
    assert row.endswith(" | 44.36 ± 1.61 | 53.08 ± 0.13 |")


def test_table_of_the_papers_own_sets():
    """The paper's column stands right of ours; rows pre-trained in another way have none."""
    rows = {(name, "kd"): [name] for name in ("subset_random", "mkdt_high_loss")}
    rows["subset_random", "simclr"] = ["subset_random"]
    rows = dict(sorted(rows.items(), reverse=True))
    sets = ["cifar10", "dogs"]
    cells = {(row, d, (0.01, None)): torch.tensor([[40.0, 42.0, 44.0]]) for row in rows for d in sets}
    cells[("mkdt_high_loss", "kd"), "cifar10", (0.01, None)] = torch.tensor([[45.0, float("nan"), 47.0]])
    paper = evaluate.read_paper("table1", "cifar10", "convnet")
    text = evaluate.make_tables(cells, rows, sets, [(0.01, None)], paper, "cifar10")
    first, second = text.split("\n\n")
    assert first.splitlines() == [
        "| pre-training set; labels of cifar10 | n | 1 % labels | difference | paper |",
        "|---|---|---|---|---|",
        "| random subset, pre-trained by SimCLR | 3 | 42.00 ± 2.00 | +0.00 ± 0.00 |  |",
        "| random subset | 3 | 42.00 ± 2.00 |  | 36.35 ± 0.67 |",
        "| MKDT | 3 | 46.00 ± 1.41 (1 of 3 seeds failed) | +4.00 ± 1.00 | 44.36 ± 1.61 |",
    ]
    assert second.splitlines()[4] == "| MKDT | 3 | 42.00 ± 2.00 | +0.00 ± 0.00 | 2.11 ± 0.28 |"


def test_standard_error_of_a_difference():
    """Sets of both rows count; those of the same distillation seeds are paired; what failed is left out."""
    torch.manual_seed(0)
    x, b = torch.randn(3, 4) * 5 + 50, torch.randn(3, 4) * 5 + 50

    def of_mean(v):
        return v.var() / len(v)

    seeds = of_mean(x.mean(0) - b.mean(0))
    paired = (seeds + of_mean((x - b).mean(1))) ** 0.5
    apart = (seeds + of_mean(x.mean(1)) + of_mean(b.mean(1))) ** 0.5
    d = x.mean() - b.mean()
    assert evaluate.difference_text(x, b, True) == f"{d:+.2f} ± {paired:.2f}"
    assert evaluate.difference_text(x, b, False) == f"{d:+.2f} ± {apart:.2f}"
    one = (of_mean(x[0] - b.mean(0)) + of_mean(b.mean(1))) ** 0.5  # "full" against several subsets
    assert evaluate.difference_text(x[:1], b, False) == f"{x[0].mean() - b.mean():+.2f} ± {one:.2f}"
    assert evaluate.difference_text(x[:1, :1], b[:1, :1], True) == f"{x[0, 0] - b[0, 0]:+.2f}"
    broken = x.clone()
    broken[1], broken[0, 2] = float("nan"), float("nan")
    rest, base = x[[0, 2]][:, [0, 1, 3]], b[:, [0, 1, 3]]
    error = of_mean(rest.mean(0) - base.mean(0)) + of_mean(rest.mean(1)) + of_mean(base.mean(1))
    text = f"{rest.mean() - base.mean():+.2f} ± {error**0.5:.2f}"
    assert evaluate.difference_text(broken, b, True) == text
    assert evaluate.accuracy_text(broken).endswith("(1 of 3 sets failed) (1 of 4 seeds failed)")
    assert evaluate.difference_text(broken * float("nan"), b, True) == ""
    assert evaluate.accuracy_text(None) == "not run" and evaluate.accuracy_text(b * float("nan")) == "failed"


def test_one_broken_set_of_several_shows(copy, stage, capsys):
    stage("distill", [*DISTILL, "--out_dir", copy, "--iters", "0", "--init", "random", "--seed", "1"])
    (copy / "sets/subset_random_seed1.pt").write_bytes(b"broken")
    run = [*EVALUATE, "--out_dir", copy, "--sets", "none", "subset_random"]
    refuses(capsys, lambda: stage("evaluate", run), "subset_random_seed1.pt", "move it away")
    table = (copy / "results.md").read_text()
    assert "| random subset | 2 x 2 | " in table and "(1 of 2 sets failed)" in table


def test_none_and_full_have_one_meaning(copy, stage):
    """A set with the name of a repetition of theirs is not theirs."""
    shutil.copy(copy / "sets/subset_random.pt", copy / "sets/full_seed1.pt")
    table = (copy / "results.md").read_text().splitlines()
    stage("evaluate", [*EVALUATE, "--out_dir", copy, "--sets", "none", "full"])
    again = (copy / "results.md").read_text().splitlines()
    assert [line.split(" | ")[2] for line in again[2:4]] == [
        line.split(" | ")[2] for line in (table[2], table[7])
    ]


def test_sets_that_are_too_small(copy, stage, capsys):
    contents = read(copy / "sets/subset_random.pt")
    few = {name: contents[name][:1].clone() for name in ("images", "targets")}
    torch.save({**contents, **few}, copy / "sets/one.pt")
    run = [*EVALUATE, "--out_dir", copy, "--seeds", "0", "--sets"]
    stage("evaluate", [*run, "one"])
    refuses(capsys, lambda: stage("evaluate", [*run, "one:simclr"]), "1 images in batches of 256", "simclr")
    resnet = ["--arch", "resnet10", "--norm", "instance", "--width", "2"]
    refuses(capsys, lambda: stage("evaluate", [*run, "one", *resnet]), "1 images in batches of 256", "kd")
    empty = {name: contents[name][:0].clone() for name in ("images", "targets")}
    torch.save({**contents, **empty}, copy / "sets/one.pt")
    refuses(capsys, lambda: stage("evaluate", [*run, "one"]), "one.pt", "0 targets")


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("protocol", ["linear", "finetune"])
def test_last_batches_of_one_image(copy, stage, protocol, norm):
    """ResNets leave them out; their last map of 8 px images keeps what instance norm needs."""
    run = [*EVALUATE, "--out_dir", copy, "--seeds", "0", "--width", "4", "--sets", "subset_random"]
    more = ["--batch_size", "7", "--protocol", protocol, "--finetune_steps", "2", "--fractions", "0.2"]
    stage("evaluate", [*run, *more, "--arch", "resnet10", "--norm", norm])
    net = evaluate.make_encoder(
        evaluate.parse_args(["--arch", "resnet10", "--norm", norm, "--width", "4"]), D, 8, 1
    )
    features = net.eval().features(torch.randn(2, 1, 8, 8))
    assert features.shape == (2, 32) and (features[0] != features[1]).any()


def test_encoders_that_diverged_have_no_accuracy(copy, stage, capsys):
    run = [*EVALUATE, "--out_dir", copy, "--seeds", "0", "--sets", "full", "--lr", "1e15", "--epochs", "1"]
    for protocol in ("linear", "finetune"):
        stop = lambda p=protocol: stage("evaluate", [*run, "--batch_size", "200", "--protocol", p])  # noqa: E731
        refuses(capsys, stop, "diverged")
        assert "| full data | 1 | failed |" in (copy / "results.md").read_text()


@pytest.mark.parametrize("text", [b"\xff\xfe", b"a,b\n1,2\n", b"table,arch\ntable1,convnet\n"])
def test_broken_file_of_the_papers_figures(tmp_path, monkeypatch, capsys, text):
    (tmp_path / "paper.csv").write_bytes(text)
    monkeypatch.setattr(evaluate, "PAPER", tmp_path / "paper.csv")
    refuses(capsys, lambda: evaluate.read_paper("table1", "cifar10", "convnet"), "paper.csv", "--paper")


# -- the teacher ---------------------------------------------------------------------------------------------


def test_targets_of_a_finished_teacher(copy, stage):
    """Stopped between the two files: the teacher is not trained again."""
    before = read(copy / "targets.pt")["targets"]
    teacher = (copy / "teacher.pt").read_bytes()
    (copy / "targets.pt").unlink()
    stage("train_teacher", [*TEACHER, "--out_dir", copy])
    assert torch.equal(read(copy / "targets.pt")["targets"], before)
    assert (copy / "teacher.pt").read_bytes() == teacher


def test_simclr_teacher(tmp_path, stage):
    stage("train_teacher", [*TEACHER, "--ssl", "simclr", "--out_dir", tmp_path])
    assert read(tmp_path / "targets.pt")["targets"].isfinite().all()


def test_own_teacher(run_dir, tmp_path, stage, capsys):
    """--init_from with --epochs 0 gives another encoder's targets, of a teacher.pt or a plain state dict."""
    weights = read(run_dir / "teacher.pt")["encoder"]
    torch.save({**weights, "fc.weight": torch.zeros(3, D)}, tmp_path / "own.pt")
    for i, source in enumerate([run_dir / "teacher.pt", tmp_path / "own.pt"]):
        stage(
            "train_teacher",
            [*TEACHER, "--epochs", "0", "--init_from", source, "--out_dir", tmp_path / str(i)],
        )
        ours = read(tmp_path / str(i) / "targets.pt")["targets"]
        torch.testing.assert_close(ours, read(run_dir / "targets.pt")["targets"])
    wide = [
        *TEACHER,
        "--width",
        "8",
        "--epochs",
        "0",
        "--init_from",
        tmp_path / "own.pt",
        "--out_dir",
        tmp_path / "2",
    ]
    refuses(capsys, lambda: stage("train_teacher", wide), "own.pt", "--width 8")
    for wrong in ([1], {1: torch.ones(2)}, {"encoder": 3}, torch.ones(2)):
        torch.save(wrong, tmp_path / "own.pt")
        refuses(capsys, lambda: stage("train_teacher", wide), "own.pt")
    poisoned = {name: value * float("nan") for name, value in weights.items()}
    torch.save(poisoned, tmp_path / "own.pt")
    run = [*TEACHER, "--epochs", "0", "--init_from", tmp_path / "own.pt", "--out_dir", tmp_path / "2"]
    refuses(capsys, lambda: stage("train_teacher", run), "finite")
    assert not (tmp_path / "2/teacher.pt").exists()


def test_compile(copy, stage, monkeypatch, capsys):
    """--compile makes the same experts and set, up to rounding; a finished run does not mind it."""
    before = read(copy / "experts/0001.pt")["trajectory"], read(copy / "sets/mkdt_random.pt")["images"]
    compile = torch.compile
    # aot_eager is no good here: that of torch 2.14 mistakes the strides of one channel.
    monkeypatch.setattr(torch, "compile", functools.partial(compile, backend="eager"))
    stage("train_experts", [*EXPERTS, "--out_dir", copy, "--compile"])  # nothing to do
    set_run = [*DISTILL, "--out_dir", copy, "--init", "random", "--iters", "1", "--compile"]
    stage("distill", set_run)
    assert torch.equal(before[0], read(copy / "experts/0001.pt")["trajectory"])
    (copy / "experts/0001.pt").unlink()
    (copy / "sets/mkdt_random.pt").unlink()
    stage("train_experts", [*EXPERTS, "--out_dir", copy, "--compile"])
    stage("distill", set_run)
    torch.testing.assert_close(read(copy / "experts/0001.pt")["trajectory"], before[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(read(copy / "sets/mkdt_random.pt")["images"], before[1], rtol=1e-3, atol=1e-4)

    def no_compiler(graph, inputs):
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(torch, "compile", functools.partial(compile, backend=no_compiler))
    (copy / "sets/mkdt_random.pt").unlink()
    refuses(capsys, lambda: stage("distill", set_run), "--compile", "C++ compiler", "--no-compile")


@pytest.mark.parametrize("width", [4, 8])
def test_layout_of_narrow_networks(copy, stage, monkeypatch, width):
    """No convolution with fewer than 8 channels sees channels_last, in which oneDNN corrupts memory."""
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
    stage("train_teacher", [*TEACHER, "--out_dir", copy, "--width", width])
    assert any(seen) == (width == 8)
    seen.clear()
    shutil.rmtree(copy / "experts")
    student = ["--width", width, "--out_dir", copy, "--compile"]
    stage("train_experts", [*EXPERTS, *student])
    stage("distill", [*DISTILL, *student, "--init", "random", "--iters", "1", "--name", "new"])
    assert seen and any(seen) == (width == 8)


# -- files that do not belong together, and options that cannot be -------------------------------------------


def test_missing_files(tmp_path, stage, capsys):
    out = ["--out_dir", tmp_path]
    for name, options in [("train_experts", EXPERTS), ("distill", DISTILL), ("evaluate", EVALUATE)]:
        refuses(capsys, lambda n=name, o=options: stage(n, [*o, *out]), "targets.pt", "train_teacher.py")


def test_no_experts(copy, stage, capsys):
    shutil.rmtree(copy / "experts")
    refuses(
        capsys,
        lambda: stage("distill", [*DISTILL, "--out_dir", copy, "--name", "x"]),
        "experts",
        "train_experts.py",
    )


def test_other_length_and_other_images(copy, stage, capsys):
    other = [*EXPERTS, "--out_dir", copy, "--limit", "100"]
    refuses(capsys, lambda: stage("train_experts", other), "150 targets", "100 training images")
    other = [*EXPERTS, "--out_dir", copy, "--image_size", "16"]
    refuses(capsys, lambda: stage("train_experts", other), "other images", "16 px")


def test_broken_targets(copy, stage, capsys):
    torch.save({"targets": torch.full((N, D), float("nan"))}, copy / "targets.pt")
    refuses(capsys, lambda: stage("train_experts", [*EXPERTS, "--out_dir", copy]), "targets.pt", "finite")


def test_other_options_do_not_overwrite(copy, stage, capsys):
    before = (copy / "experts/0000.pt").read_bytes()
    run = [*EXPERTS, "--out_dir", copy, "--lr", "0.05"]
    refuses(capsys, lambda: stage("train_experts", run), "experts/0000.pt", "--lr 0.1", "--lr 0.05")
    assert (copy / "experts/0000.pt").read_bytes() == before
    run = [*TEACHER, "--out_dir", copy, "--seed", "5"]
    refuses(capsys, lambda: stage("train_teacher", run), "targets.pt", "--seed 0", "--seed 5")
    run = [*DISTILL, "--out_dir", copy, "--iters", "1", "--lr_img", "7"]
    refuses(capsys, lambda: stage("distill", run), "mkdt_high_loss.pt", "--lr_img")


def test_experts_of_another_network(copy, stage, capsys):
    run = [*DISTILL, "--out_dir", copy, "--width", "12", "--name", "x"]
    refuses(capsys, lambda: stage("distill", run), "experts/0000.pt", "--width")


def test_mixed_experts(copy, stage, capsys):
    """Refused by the option that differs; an expert from before an option was there goes with its default."""
    path, run = copy / "experts/0002.pt", [*DISTILL, "--out_dir", copy, "--iters", "1", "--name"]
    expert = read(path)
    made = expert["options"]["train_experts"]
    for option, value in (("lr", 0.05), ("ema", 0.9)):
        torch.save({**expert, "options": {"train_experts": {**made, option: value}}}, path)
        refuses(capsys, lambda: stage("distill", [*run, "x"]), "0002.pt", f"--{option} {value}", "0000.pt")
    older = {name: made[name] for name in made if name not in ("ema", "sam")}
    torch.save({**expert, "options": {"train_experts": older}}, path)
    stage("distill", [*run, "x"])
    first = read(copy / "experts/0000.pt")
    averaged = {"train_experts": {**made, "ema": 0.9}}
    torch.save({**first, "options": averaged}, copy / "experts/0000.pt")
    torch.save({**read(copy / "experts/0001.pt"), "options": averaged}, copy / "experts/0001.pt")
    refuses(capsys, lambda: stage("distill", [*run, "y"]), "0002.pt", "--ema 0.0", "with 0.9")


def test_everything_is_of_the_targets_there_now(copy, stage, capsys):
    targets = read(copy / "targets.pt")
    torch.save({**targets, "targets": targets["targets"] + 1}, copy / "targets.pt")
    out = ["--out_dir", copy]
    refuses(capsys, lambda: stage("train_experts", [*EXPERTS, *out]), "0000.pt", "other targets")
    refuses(
        capsys,
        lambda: stage("distill", [*DISTILL, *out, "--iters", "1"]),
        "mkdt_high_loss.pt",
        "other targets",
    )
    refuses(capsys, lambda: stage("distill", [*DISTILL, *out, "--name", "x"]), "0000.pt", "other targets")
    run = [*EVALUATE, *out, "--sets", "mkdt_random"]
    refuses(capsys, lambda: stage("evaluate", run), "sets/mkdt_random.pt", "other targets")


def test_encoders_do_not_start_where_experts_did(run_dir):
    starts = [read(path)["trajectory"][0] for path in sorted((run_dir / "experts").iterdir())]
    for seed in range(3):
        torch.manual_seed(evaluate.SEEDS + seed)
        args = evaluate.parse_args(["--width", "8"])
        encoder = common.flatten(evaluate.make_encoder(args, D, 8, 1))
        assert not any(torch.equal(encoder, start) for start in starts)


def test_accuracies_are_of_the_images_there_now(copy, stage, monkeypatch):
    """Other test images under the same name are measured anew."""
    load_images = common.load_images

    def darker(name, split, *rest):
        part = load_images(name, split, *rest)
        return part._replace(images=part.images // 2) if split == "test" else part

    before = len((copy / "results.jsonl").read_text().splitlines())
    monkeypatch.setattr(common, "load_images", darker)
    stage("evaluate", [*EVALUATE, "--out_dir", copy, "--sets", "none"])
    assert len((copy / "results.jsonl").read_text().splitlines()) == before + 4


@pytest.mark.parametrize("lr", [0.0, -0.1, float("nan"), float("inf"), "0.1", None, torch.ones(2)])
def test_lr_of_a_set(copy, stage, capsys, lr):
    contents = read(copy / "sets/mkdt_random.pt")
    torch.save({**contents, "lr": lr}, copy / "sets/mkdt_random.pt")
    run = [*EVALUATE, "--out_dir", copy, "--sets", "mkdt_random"]
    refuses(capsys, lambda: stage("evaluate", run), "mkdt_random.pt", "'lr'")
    run = [*DISTILL, "--out_dir", copy, "--iters", "0", "--lr_from", "mkdt_random"]
    refuses(capsys, lambda: stage("distill", run), "mkdt_random.pt", "'lr'")


def test_lr_from_a_set_that_was_made_again(copy, stage, capsys):
    run = [*DISTILL, "--out_dir", copy, "--init", "random", "--iters", "0", "--lr_from", "mkdt_random"]
    stage("distill", run)
    contents = read(copy / "sets/mkdt_random.pt")
    torch.save({**contents, "lr": 0.7}, copy / "sets/mkdt_random.pt")
    refuses(capsys, lambda: stage("distill", run), "lr_from_mkdt_random.pt", "--lr_init")


def test_names_of_sets_by_their_seed():
    names = [
        ([], "mkdt_high_loss"), (["--seed", "3"], "mkdt_high_loss_seed3"),
        (["--iters", "0"], "subset_high_loss"),
        (["--method", "krr_st"], "krr_st_random"), (["--method", "krr_st", "--init", "sas"], "krr_st_sas"),
        (["--iters", "0", "--init", "random", "--seed", "1", "--lr_from", "mkdt_random_seed1"],
         "subset_random_lr_from_mkdt_random_seed1"),
    ]  # fmt: skip
    for options, name in names:
        assert distill.parse_args(options).name == name


@pytest.mark.parametrize("name", ["..", "a/b", "none", "full", "", "-x", "full_seed1", "_seed1"])
def test_names_of_sets(name, tmp_path, stage, capsys):
    refuses(capsys, lambda: stage("distill", [*DISTILL, "--out_dir", tmp_path, f"--name={name}"]), "--name")


def test_nan_in_experts(copy, stage, capsys):
    expert = read(copy / "experts/0001.pt")
    torch.save({**expert, "example_loss": expert["example_loss"] * float("nan")}, copy / "experts/0001.pt")
    run = [*DISTILL, "--out_dir", copy, "--name", "x"]
    refuses(capsys, lambda: stage("distill", run), "0001.pt", "finite")
    torch.save({**expert, "trajectory": expert["trajectory"] * float("nan")}, copy / "experts/0001.pt")
    refuses(capsys, lambda: stage("distill", [*run, "--iters", "20"]), "0001.pt", "finite")


def test_pretraining_that_diverges(copy, stage, capsys):
    contents = read(copy / "sets/mkdt_random.pt")
    torch.save({**contents, "lr": 1e20}, copy / "sets/mkdt_random.pt")
    run = [*EVALUATE, "--out_dir", copy, "--sets", "none", "mkdt_random", "--seeds", "0"]
    refuses(capsys, lambda: stage("evaluate", run), "mkdt_random", "lr")
    lines = (copy / "results.md").read_text().splitlines()
    assert "| MKDT (random init) | 1 | failed | failed |" in lines  # and the rest of the table stands
    assert lines[2].startswith("| no pre-training | 1 | ") and "failed" not in lines[2]


def test_files_can_be_read_by_others(run_dir):
    import os
    import stat

    umask = os.umask(0)
    os.umask(umask)
    for path in run_dir.rglob("*.pt"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_too_few_expert_epochs(copy, stage, capsys):
    run = [*DISTILL, "--out_dir", copy, "--max_start_epoch", "3", "--name", "x"]
    refuses(capsys, lambda: stage("distill", run), "--max_start_epoch 3", "0 to 4", "have 3")


@pytest.mark.parametrize("fraction", ["0", "1.5", "0.001"])
def test_fraction_of_the_set(copy, stage, capsys, fraction):
    run = [*DISTILL, "--out_dir", copy, "--fraction", fraction, "--name", "x"]
    refuses(capsys, lambda: stage("distill", run), f"--fraction {float(fraction)}")


def test_sets_that_do_not_fit(copy, stage, capsys):
    contents = read(copy / "sets/mkdt_random.pt")
    run = [*EVALUATE, "--out_dir", copy]
    torch.save({**contents, "images": contents["images"].expand(-1, 3, -1, -1)}, copy / "sets/mkdt_random.pt")
    refuses(capsys, lambda: stage("evaluate", run), "mkdt_random.pt", "(15, 3, 8, 8)")
    torch.save({**contents, "targets": contents["targets"][:, :3]}, copy / "sets/mkdt_random.pt")
    refuses(capsys, lambda: stage("evaluate", run), "mkdt_random.pt", "D = 3")
    refuses(
        capsys,
        lambda: stage("evaluate", [*run, "--sets", "nothing"]),
        "nothing.pt",
        "not found",
        "distill.py",
    )


def test_label_fractions(copy, stage, capsys):
    run = [*EVALUATE, "--out_dir", copy, "--fractions"]
    for fraction in ("0", "0.001", "1.1"):
        refuses(capsys, lambda f=fraction: stage("evaluate", [*run, f]), "--fractions")


def test_divergence_is_said(copy, stage, capsys):
    run = [*DISTILL, "--out_dir", copy, "--iters", "9", "--lr_img", "1e30", "--name", "x"]
    refuses(capsys, lambda: stage("distill", run), "--lr_img")
    assert not (copy / "sets/x.pt").exists()
    run = [*EXPERTS, "--out_dir", copy, "--first_expert", "7", "--lr", "1e20"]
    refuses(capsys, lambda: stage("train_experts", run), "--lr")
    refuses(capsys, lambda: stage("train_experts", [*run[:-2], "--sam", "1e30"]), "--lr", "--sam than 1e+30")
    assert not (copy / "experts/0007.pt").exists()


def test_teacher_batch_larger_than_the_set(tmp_path, stage, capsys):
    run = [*TEACHER, "--out_dir", tmp_path, "--batch_size", "151"]
    refuses(capsys, lambda: stage("train_teacher", run), "--batch_size 151", "150")


def test_unknown_data_set(tmp_path, stage, capsys):
    run = [*DATA, "--dataset", "mnist", "--out_dir", tmp_path]
    refuses(capsys, lambda: stage("train_teacher", run), "mnist", "cifar10")


def by_hand():
    """A small student and its twin, 20 images, their targets, mean and std, and KD's loss."""
    torch.manual_seed(0)
    net = common.ConvNet(4, 16, 1, 4, 3)
    twin = common.ConvNet(4, 16, 1, 4, 3)
    twin.load_state_dict(net.state_dict())
    images, targets = torch.randint(0, 256, (20, 1, 16, 16), dtype=torch.uint8), torch.randn(20, 4)
    stats = torch.tensor([0.5]), torch.tensor([0.3])
    return (
        net,
        twin,
        images,
        targets,
        stats,
        common.make_objective("kd", common.ImageSet(images, None, *stats)),
    )


def test_train_expert_returns_its_trajectory():
    """One epoch of plain SGD by hand gives the same weights."""
    net, twin, images, targets, stats, loss_fn = by_hand()
    args = train_experts.parse_args(
        ["--epochs", "1", "--batch_size", "8", "--momentum", "0", "--weight_decay", "0"]
    )
    trajectory, _, _ = train_experts.train_expert(net, loss_fn, images, targets, stats, args, seed=3)
    theta, order = common.flatten(twin), torch.randperm(20, generator=torch.Generator().manual_seed(3))
    end = distill.student_steps(
        lambda theta, x, z, n: torch.nn.functional.mse_loss(common.forward_flat(twin, theta, x), z),
        theta, common.normalise(images, *stats), targets, torch.tensor(0.1), order.split(8),
    )  # fmt: skip
    torch.testing.assert_close(trajectory[1], end)


@pytest.mark.parametrize("ema, sam", [(0.9, 0.0), (0.0, 0.5), (0.9, 0.5)])
def test_averaged_and_flat_trajectories(ema, sam):
    """--ema and --sam by hand: the gradient is that of rho uphill, and the weights' average is stored."""
    net, twin, images, targets, stats, loss_fn = by_hand()
    options = ["--epochs", "2", "--batch_size", "8", "--momentum", "0", "--weight_decay", "0"]
    args = train_experts.parse_args([*options, "--ema", str(ema), "--sam", str(sam)])
    stored = train_experts.train_expert(net, loss_fn, images, targets, stats, args, seed=3)
    theta, order = common.flatten(twin), torch.Generator().manual_seed(3)
    average, expected = None, [theta]

    def gradient(theta, batch):
        theta = theta.detach().requires_grad_()
        outputs = common.forward_flat(twin, theta, common.normalise(images[batch], *stats))
        return torch.autograd.grad(torch.nn.functional.mse_loss(outputs, targets[batch]), theta)[0]

    for _ in range(2):
        for batch in torch.randperm(20, generator=order).split(8):
            g = gradient(theta, batch)
            theta = theta - 0.1 * gradient(theta + sam * g / g.norm(), batch)
            average = theta if average is None else ema * average + (1 - ema) * theta
        expected.append(average)
    torch.testing.assert_close(stored[0], torch.stack(expected))
    torch.testing.assert_close(common.flatten(net), theta)  # the student itself is not averaged
    outputs = common.forward_flat(twin, expected[1], common.normalise(images, *stats))
    torch.testing.assert_close(stored[1], (outputs - targets).square().mean(1))


def test_segments_count_where_they_are_matched(copy, stage, capsys):
    """A subset is done whatever the segments; a matched set is another with other segments."""
    words = [*DISTILL, "--out_dir", copy, "--init", "random", "--segments", "2"]
    stage("distill", [*words, "--iters", "0"])
    assert "is there: nothing to do" in capsys.readouterr().out
    refuses(capsys, lambda: stage("distill", [*words, "--iters", "1"]), "--segments 1, now --segments 2")
    stage("distill", [*words, "--iters", "1", "--name", "two", "--micro_batch", "3"])
    (record,) = [
        json.loads(line)
        for line in (copy / "distill_two.jsonl").read_text().splitlines()
        if "iteration" in line and "matching_loss" in line
    ]
    assert len(record["segments"]) == 2 and set(record["segments"][0]) == {"expert", "start_epoch"}
