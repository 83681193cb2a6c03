"""Several processes (torchrun) against one: here two on the CPU, which gloo connects."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
from conftest import DATA, DISTILL, EVALUATE, EXPERTS, ROOT, TEACHER, refuses, run_stage, start

import common
import distill
import evaluate
import train_teacher

SSL = ["barlow_twins", "simclr"]
MKDT = [*DISTILL, "--init", "random", "--lr_targets", "1", "--checkpoint_minutes", "0"]


def teacher_step(ssl):
    """The loss of one batch of 12 images, in float64, with its gradient and BatchNorm's statistics."""
    args = train_teacher.parse_args(["--ssl", ssl, "--device", "cpu"])
    torch.manual_seed(0)
    norms = [torch.nn.BatchNorm2d, torch.nn.BatchNorm1d]  # torch's own are the judge
    norms = norms if common.world_size() == 1 else [train_teacher.SyncBatchNorm] * 2
    projector = train_teacher.make_projector(ssl, 64, 16, norms[1])
    encoder = common.ResNet(width=8, norm_layer=norms[0]).to(memory_format=torch.channels_last)
    net = torch.nn.Sequential(encoder, projector).double()
    images = torch.rand(12, 3, 8, 8, dtype=torch.float64)
    first, share = common.rank() * 6, 12 // common.world_size()
    data = common.ImageSet(images, None, torch.full((3,), 0.5), torch.full((3,), 0.25))
    view = {"part_of": (12, first)}
    draws = torch.Generator().manual_seed(1)
    loss = train_teacher.ssl_loss(net, images[first : first + share], draws, data, view, args)
    (loss / common.world_size()).backward()
    common.add_up(*(p.grad for p in net.parameters()))
    gradients = {name: p.grad for name, p in net.named_parameters()}
    return {"loss": loss.detach(), **gradients, **dict(net.named_buffers())}


def stopped(name, argv, call):
    """Run a stage whose processes all stop when they add up their gradients for this time; then go on."""
    add_up, calls = common.add_up, []

    def broken(*tensors):
        calls.append(1)
        if len(calls) == call:
            raise common.Problem("stopped")
        add_up(*tensors)

    common.add_up = broken
    refuses(lambda: run_stage(name, argv), "stopped")
    common.add_up, common.Checkpoint.under_way = add_up, None  # as in a process of its own
    run_stage(name, argv)


def worker(out, rank, port):
    """What each of the two processes does: a teacher's step, then all stages, in copies of a run's folder."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=f"{port}", WORLD_SIZE="2", RANK=f"{rank}")
    sys.stdout = open(out / f"said_{rank}", "w")  # noqa: SIM115
    common.set_up(train_teacher.parse_args(TEACHER))
    steps = {ssl: teacher_step(ssl) for ssl in SSL}
    rows = torch.arange(48.0).view(3, 4, 2, 2).to(memory_format=torch.channels_last)
    steps["gather"] = train_teacher.gather(rows + 100 * common.rank())
    if common.rank() == 0:
        torch.save(steps, out / "steps.pt")
    run = ["--out_dir", out / "run"]
    teacher = [*TEACHER, "--checkpoint_minutes", "0"]
    run_stage("train_teacher", [*teacher, "--out_dir", out / "teacher"])
    stopped("train_teacher", [*teacher, "--out_dir", out / "again"], 3)
    run_stage("train_experts", [*EXPERTS, *run])
    run_stage("distill", [*MKDT, *run, "--iters", "1", "--name", "one"])
    run_stage("distill", [*MKDT, *run, "--iters", "3", "--name", "whole"])
    stopped("distill", [*MKDT, *run, "--iters", "3", "--name", "again"], 2)
    common.wait_for_all()
    errors, rows = open(out / f"errors_{rank}", "w"), ["none", "subset_random", "broken", "full"]  # noqa: SIM115
    with contextlib.redirect_stderr(errors), contextlib.suppress(SystemExit):
        run_stage("evaluate", [*EVALUATE, *run, "--name", "two", "--sets", *rows])
    errors.close()
    common.wait_for_all()


@pytest.fixture(scope="module")
def two(run_dir, tmp_path_factory):
    """The folder in which two processes have run worker(); one process has made run_dir."""
    out = tmp_path_factory.mktemp("two")
    (out / "run/sets").mkdir(parents=True)
    for name in ("targets.pt", "sets/subset_random.pt"):
        shutil.copy(run_dir / name, out / "run" / name)
    (out / "run/sets/broken.pt").touch()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=worker, args=(out, rank, port), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    return out


def read(path):
    return torch.load(path, weights_only=True)


def test_logs_and_what_is_said(two):
    for name in ("teacher/train_teacher", "run/train_experts", "run/distill_one", "run/evaluate"):
        first, *rest = common.read_records(two / f"{name}.jsonl")
        assert first["processes"] == 2 and not any("options" in record for record in rest)
    first, second = [(two / f"said_{rank}").read_text() for rank in range(2)]
    assert "wrote" in first and "expert 2: step" in first and second == ""


def test_the_teachers_step_is_that_of_one_process(two):
    steps = read(two / "steps.pt")
    for ssl in SSL:
        alone = teacher_step(ssl)
        assert list(steps[ssl]) == list(alone) and any("running_var" in name for name in alone)
        for name in (name for name in alone if "num_batches_tracked" not in name):  # which nothing reads
            torch.testing.assert_close(steps[ssl][name], alone[name], rtol=1e-8, atol=1e-10, msg=name)
    rows = torch.arange(48.0).view(3, 4, 2, 2)
    assert torch.equal(steps["gather"], torch.cat([rows, rows + 100]))


@pytest.mark.parametrize("path", ["{}/targets.pt", "{}/teacher.pt", "run/sets/{}.pt"])
def test_two_processes_that_were_stopped_go_on_bit_for_bit(path, two):
    whole, again = two / path.format("whole" if "sets" in path else "teacher"), two / path.format("again")
    assert whole.read_bytes() == again.read_bytes() and not list(again.parent.glob("*.checkpoint"))


def test_experts_are_bit_for_bit_those_of_one_process(two, run_dir):
    for path in sorted((run_dir / "experts").iterdir()):
        assert path.read_bytes() == (two / "run/experts" / path.name).read_bytes()
    records = common.read_records(two / "run/train_experts.jsonl")
    assert sorted(record["expert"] for record in records if "expert" in record) == [0, 1, 2]


def test_every_process_matches_its_own_expert(two, run_dir):
    """One iteration moves the set by the mean of both processes' gradients."""
    args = distill.parse_args([*MKDT, "--out_dir", str(run_dir)])
    args.objective = "kd"
    data, targets, _ = common.load_targets(args)
    trajectories = [read(path)["trajectory"] for path in sorted((run_dir / "experts").iterdir())]
    begin = read(run_dir / "sets/subset_random.pt")
    leaves = [torch.as_tensor(begin[name]).requires_grad_() for name in ("images", "targets", "lr")]
    net, drawn = common.make_student(targets.shape[1], 8, 1, args.width), []
    for rank in (0, 1):
        start, goal, batches, said = distill.draw(args, len(begin["images"]), trajectories, 0, rank)
        step_loss = distill.make_step_loss(args, net, data, 0, rank)
        theta = distill.student_steps(step_loss, start, *leaves, batches)
        (distill.matching_loss(theta, start, goal) / 2).backward()
        drawn.append((said, [batch.tolist() for batch in batches]))
    assert drawn[0] != drawn[1]
    found, rates = read(two / "run/sets/one.pt"), {"images": 10.0, "targets": 1.0, "lr": 1e-4}
    for leaf, (name, rate) in zip(leaves, rates.items()):
        moved = torch.as_tensor(found[name]) - leaf.detach()
        torch.testing.assert_close(moved, -rate * leaf.grad, rtol=1e-3, atol=1e-7, msg=name)
        assert moved.abs().max() > 1e-6


def test_accuracies_of_processes_are_those_of_one_process(two, run_dir):
    """Each is measured once; of a set that is broken one process says so."""
    records, alone = (common.read_records(path / "results.jsonl") for path in (two / "run", run_dir))
    found = {evaluate.key(r): r["accuracy"] for r in records if r["set"] != "broken"}
    assert len(found) == 12 and len(records) == 16
    assert found.items() <= {evaluate.key(r): r["accuracy"] for r in alone}.items()
    table, errors = (two / "run/two.md").read_text(), [(two / f"errors_{i}").read_text() for i in range(2)]
    assert "random subset" in table and "nan" not in table and table.count("| failed |") == 2
    assert [text.count("error: ") for text in errors] == [1, 0] and "broken.pt" in errors[0]


def test_torchrun_says_what_is_wrong_once(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [ROOT / "train_experts.py", *DATA, "--out_dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1 and "targets.pt: not found" in lines[0]


def test_a_batch_that_does_not_split(monkeypatch):
    for name, value in zip(common.TORCHRUN, ("0", "3", "localhost", "29500")):
        monkeypatch.setenv(name, value)
    refuses(lambda: train_teacher.parse_args(TEACHER), "--batch_size 50", "a multiple of 3 processes")


@pytest.mark.parametrize("variables", [
    {"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2"}, {"LOCAL_RANK": "1", "RANK": "1"},
    dict(zip(common.TORCHRUN, ("2", "2", "localhost", "29500"))),
    dict(zip(common.TORCHRUN, ("0", "2", "localhost", "x"))),
    dict(zip(common.TORCHRUN, ("0", "9" * 20, "localhost", "29500")))])
def test_variables_that_a_job_scheduler_left(variables, tmp_path, monkeypatch, capsys):
    """What torchrun would not set is passed over, and said; all the work is done."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    run_stage("train_teacher", [*TEACHER, "--out_dir", tmp_path])
    said = capsys.readouterr().out
    assert f"passed over RANK={variables['RANK']}" in said if "RANK" in variables else "passed over" in said
    assert (tmp_path / "targets.pt").exists() and (common.rank(), common.world_size()) == (0, 1)


def test_a_process_whose_others_do_not_come(tmp_path):
    """It says for how many it waits; a signal ends it, or after some minutes an error."""
    processes = {}
    for how in ("SIGTERM", "SIGINT", "patience"):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]

        def prepare(how=how, port=port):
            os.environ.update(zip(common.TORCHRUN, ("0", "2", "localhost", f"{port}")))
            common.MEET_MINUTES = 0.1 if how == "patience" else 5
            os.dup2(os.open(tmp_path / f"said_{how}", os.O_CREAT | os.O_WRONLY), 1)

        argv = [*TEACHER, "--out_dir", tmp_path / how]
        processes[how] = start("train_teacher", argv, tmp_path / f"errors_{how}", prepare)
    processes["patience"].join(60)
    for how, process in processes.items():
        assert (tmp_path / f"said_{how}").read_text().startswith("waiting for 1 more process (RANK=0 WORLD_S")
        if how != "patience":
            os.kill(process.pid, getattr(signal, how))
            process.join(10)
            assert process.exitcode == -getattr(signal, how)
    error = (tmp_path / "errors_patience").read_text()
    assert processes["patience"].exitcode == 2 and error.startswith("error: another process")
    assert "WORLD_SIZE" in error and error.count("\n") == 1


def test_a_port_in_use(tmp_path):
    with socket.socket() as used:
        used.bind(("localhost", 0))
        used.listen()

        def prepare():
            os.environ.update(zip(common.TORCHRUN, ("0", "2", "localhost", f"{used.getsockname()[1]}")))

        process = start("train_teacher", [*TEACHER, "--out_dir", tmp_path], tmp_path / "errors", prepare)
        process.join()
    error = (tmp_path / "errors").read_text()
    assert process.exitcode == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert "MASTER_PORT" in error
