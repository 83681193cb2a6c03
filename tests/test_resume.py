"""Stages that are killed at random points, and go on: the same files in the end, bit for bit.

python -m pytest tests/test_resume.py --kills 200    # the long run; by default there are five kills a stage
"""

import json
import os
import random
import shutil
import signal
import time

import pytest
from conftest import DATA, DISTILL, EVALUATE, EXPERTS, STUDENT, TEACHER, start

MATCH = [*DISTILL, "--init", "random", "--iters", "30", "--lr_targets", "1", "--segments", "2"]
KRR_ST = [*DATA, *STUDENT, "--fraction", "0.1", "--method", "krr_st", "--pool_size", "2", "--pool_steps", "9"]
KRR_ST += ["--batch_real", "50", "--iters", "60", "--lr_img", "0.02"]
RUNS = {  # stage and options, long enough to be killed within; what an earlier stage must have made
    "teacher": ("train_teacher", [*TEACHER, "--epochs", "12"], []),
    "experts": ("train_experts", [*EXPERTS, "--epochs", "12"], ["targets.pt"]),
    "experts_flat": (
        "train_experts",
        [*EXPERTS, "--epochs", "3", *"--objective simclr --ema 0.9 --sam 0.05".split()],
        [],
    ),
    "mkdt": ("distill", MATCH, ["targets.pt", "experts"]),
    "krr_st": ("distill", KRR_ST, ["targets.pt"]),
    "evaluate": ("evaluate", [*EVALUATE, "--epochs", "30"], ["targets.pt", "sets"]),
}
TIMES = {"time", "images_per_second", "seconds", "pretrain_seconds"}  # what differs from run to run in a log


def run(name, argv):
    """Let a stage run to its end; returns the seconds that it took."""
    began = time.time()
    process = start(name, argv)
    process.join()
    assert process.exitcode == 0
    return time.time() - began


def contents(folder):
    """{path: bytes} of all that a run has made; of logs, the records without their times and their starts."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".claims"):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl" and path.name != "results.jsonl":
            records = [json.loads(line) for line in path.read_text().splitlines()]
            assert "options" in records[0] and "commit" in records[0] and not records[0]["resumed"]
            records = [r for r in records if not ("run" in r and "command" in r)]
            found[name] = [{k: v for k, v in r.items() if k not in TIMES} for r in records]
        else:
            found[name] = path.read_bytes()
    return found


def prepared(run_dir, folder, needs):
    folder.mkdir()
    for need in needs:
        (shutil.copytree if (run_dir / need).is_dir() else shutil.copy)(run_dir / need, folder / need)
    return folder


def test_stopped_with_what_it_is_piped_to(run_dir, tmp_path):
    """Ctrl-C ends "... | tee log" as a whole; the checkpoint is written even so, and the status is right."""
    folder = prepared(run_dir, tmp_path / "piped", ["targets.pt", "experts"])

    def broken_pipe():
        read, write = os.pipe()
        os.dup2(write, 1), os.dup2(write, 2)
        os.close(read), os.close(write)

    argv = [*MATCH, "--iters", "100000", "--checkpoint_minutes", "0", "--out_dir", str(folder)]
    process = start("distill", argv, prepare=broken_pipe)
    checkpoint = folder / "sets/mkdt_random.checkpoint"
    while not checkpoint.exists() and process.is_alive():
        time.sleep(0.02)
    checkpoint.unlink()
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130 and checkpoint.exists()


@pytest.mark.parametrize("which", RUNS)
def test_killed_at_random_points(which, run_dir, tmp_path, request):
    """SIGKILL, SIGTERM and Ctrl-C at random points, with a checkpoint after every step or seldom."""
    kills = request.config.getoption("kills")
    name, options, needs = RUNS[which]
    whole = prepared(run_dir, tmp_path / "whole", needs)
    seconds = run(name, [*options, "--out_dir", str(whole)])
    expected = contents(whole)
    assert not list(whole.rglob("*.checkpoint"))
    draws, done, runs = random.Random(which), 0, 0
    while done < kills:
        folder = prepared(run_dir, tmp_path / f"killed_{done}", needs)
        ended = False
        while not ended:
            argv = [*options, "--out_dir", str(folder)]
            argv += ["--checkpoint_minutes", draws.choice(["0", "0.002", "5"])]
            process = start(name, argv)
            process.join(draws.uniform(0, 1.2 * seconds) if done < kills else None)
            if process.exitcode is None:
                number = draws.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
                os.kill(process.pid, number)
                process.join()
                # It may just have come to its end, or not yet have begun to listen.
                assert process.exitcode in (0, 128 + number, -number, 1)
                done += process.exitcode != 0
            ended = process.exitcode == 0
        assert contents(folder) == expected
        shutil.rmtree(folder)
        runs += 1
    print(f"{which}: {done} kills in {runs} runs, which all ended in the files of an undisturbed one")
