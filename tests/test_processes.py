"""Several processes (torchrun) against one: here two on the CPU, which gloo connects."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DATA, DISTILL, EVALUATE, EXPERTS, TEACHER

import common
import distill
import evaluate
import train_experts
import train_teacher

ROOT = Path(__file__).parent.parent
SSL = ["barlow_twins", "simclr"]
SEGMENTS = [*DISTILL, "--init", "random", "--iters", "2", "--lr_targets", "1", "--segments", "2"]


def teacher_step(ssl):
    """The loss of one batch of 12 images, in float64, with its gradient and BatchNorm's statistics."""
    args = train_teacher.parse_args(["--ssl", ssl, "--projection_dim", "16", "--device", "cpu"])
    torch.manual_seed(0)
    several = common.world_size() > 1
    norm_layers = (
        [train_teacher.SyncBatchNorm] * 2 if several else [torch.nn.BatchNorm2d, torch.nn.BatchNorm1d]
    )
    encoder = common.ResNet(channels=3, width=4, norm_layer=norm_layers[0])
    projector = train_teacher.make_projector(ssl, 32, 16, norm_layers[1])
    net = torch.nn.Sequential(encoder, projector).to(torch.float64, memory_format=torch.channels_last)
    images = torch.rand(12, 3, 8, 8, dtype=torch.float64)
    share = 12 // common.world_size()
    first = common.rank() * share
    stats = torch.full((3,), 0.5), torch.full((3,), 0.25)
    view = {"blur": 0.5, "solarize": 0.5, "part_of": (12, first)}
    draws = torch.Generator().manual_seed(1)
    loss = train_teacher.ssl_loss(net, images[first : first + share], draws, stats, view, args)
    loss.backward()
    common.average(*(p.grad for p in net.parameters()))
    gradients = {name: p.grad for name, p in net.named_parameters()}
    return {"loss": loss.detach(), **gradients, **dict(net.named_buffers())}


def worker(out):
    """What each of the two processes does: a teacher's step, then all stages in copies of a run's folder."""
    torch.set_num_threads(1)
    common.set_up(train_teacher.parse_args(TEACHER))
    steps = {ssl: teacher_step(ssl) for ssl in SSL}
    x = torch.arange(6.0).view(3, 2) + 10 * common.rank()
    steps["gather"] = train_teacher.gather(x)
    if common.rank() == 0:
        torch.save(steps, out / "steps.pt")
    stages = [
        ("teacher", train_teacher, TEACHER),
        ("run", train_experts, EXPERTS),
        ("run", distill, SEGMENTS),
    ]
    for folder, module, argv in [*stages, ("run", evaluate, [*EVALUATE, "--name", "two"])]:
        module.main(module.parse_args([*argv, "--out_dir", str(out / folder)]))
        common.wait_for_all()


@pytest.fixture(scope="module")
def two(run_dir, tmp_path_factory):
    """The folder in which two processes have run worker(); one process has made run_dir and "one" there."""
    out = tmp_path_factory.mktemp("two")
    for name in ("one", "run"):
        shutil.copytree(run_dir, out / name)
    distill.main(distill.parse_args([*SEGMENTS, "--name", "segments", "--out_dir", str(out / "one")]))
    shutil.rmtree(out / "run/experts")
    for path in [*(out / "run").glob("*.jsonl"), out / "run/sets/mkdt_random.pt"]:
        path.unlink()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, __file__, str(out)]
    processes = [
        subprocess.Popen(command, env={**env, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    (out / "said.json").write_text(json.dumps(said))
    return out


def read(path):
    return torch.load(path, weights_only=True)


def test_logs_begin_with_how_they_were_made(two):
    for name in ("train_experts", "distill_mkdt_random", "evaluate"):
        first, *rest = [json.loads(line) for line in (two / f"run/{name}.jsonl").read_text().splitlines()]
        assert first["processes"] == 2 and not any("options" in record for record in rest)


def test_the_teachers_step_is_that_of_one_process(two):
    steps = read(two / "steps.pt")
    for ssl in SSL:
        alone = teacher_step(ssl)
        assert list(steps[ssl]) == list(alone)
        for name, value in alone.items():
            torch.testing.assert_close(steps[ssl][name], value, rtol=1e-8, atol=1e-10, msg=f"{ssl} {name}")
    rows = torch.arange(6.0).view(3, 2)
    assert torch.equal(steps["gather"], torch.cat([rows, rows + 10]))


def test_the_teachers_files(two, run_dir):
    found, alone = read(two / "teacher/teacher.pt"), read(run_dir / "teacher.pt")
    assert found["options"] == alone["options"] and list(found["encoder"]) == list(alone["encoder"])
    logs = [
        [json.loads(line) for line in (folder / "train_teacher.jsonl").read_text().splitlines()]
        for folder in (two / "teacher", run_dir)
    ]
    assert [list(record) for record in logs[0]] == [list(record) for record in logs[1]]
    assert logs[0][0]["processes"] == 2 and logs[1][0]["processes"] == 1
    assert logs[0][1]["loss"] == pytest.approx(logs[1][1]["loss"], rel=1e-2)  # Adam makes much of rounding


def test_experts_are_bit_for_bit_those_of_one_process(two, run_dir):
    for path in sorted((run_dir / "experts").iterdir()):
        alone, found = read(path), read(two / "run/experts" / path.name)
        assert torch.equal(alone["trajectory"], found["trajectory"]) and alone["options"] == found["options"]
        assert torch.equal(alone["example_loss"], found["example_loss"])
    records = [json.loads(line) for line in (two / "run/train_experts.jsonl").read_text().splitlines()]
    assert sum("command" in record for record in records) == 1
    assert sorted(record["expert"] for record in records if "expert" in record) == [0, 1, 2]
    assert "trajectory_variance" in records[-1]


def test_segments_of_processes_are_those_of_one_process(two):
    alone, found = read(two / "one/sets/segments.pt"), read(two / "run/sets/mkdt_random.pt")
    torch.testing.assert_close(found["images"], alone["images"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["targets"], alone["targets"], rtol=1e-4, atol=1e-5)
    assert found["lr"] == pytest.approx(alone["lr"], rel=1e-5)
    assert (found["images"] - read(two / "one/sets/subset_random.pt")["images"]).abs().max() > 1e-3
    logs = [two / "one/distill_segments.jsonl", two / "run/distill_mkdt_random.jsonl"]
    losses = [
        [json.loads(line).get("matching_loss") for line in log.read_text().splitlines()] for log in logs
    ]
    assert losses[0][1:] == pytest.approx(losses[1][1:], rel=1e-4) and len(losses[0]) == 3


def test_accuracies_of_processes_are_those_of_one_process(two, run_dir):
    def accuracies(folder):
        records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        found = {evaluate.key(record): record["accuracy"] for record in records}
        assert len(found) == len(records)  # nothing is measured twice
        return {key: value for key, value in found.items() if key[0] != "mkdt_random"}  # another set

    assert accuracies(two / "run") == accuracies(run_dir)
    table = (two / "run/two.md").read_text()
    assert "random subset" in table and "nan" not in table and "failed" not in table


def test_the_first_process_speaks_for_all(two):
    first, second = json.loads((two / "said.json").read_text())
    assert "wrote" in first and "expert 2/2" in first and second == ""


def test_torchrun_says_what_is_wrong_once(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "train_experts.py"), *DATA, "--out_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1 and "targets.pt: not found" in lines[0]


def test_a_batch_that_does_not_split(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        distill.parse_args(["--segments", "3"])
    assert "--segments 3: choose a multiple of the 2 processes" in capsys.readouterr().err


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
