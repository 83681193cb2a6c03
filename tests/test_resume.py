"""Stages that are killed at any point, and go on: the same files in the end, bit for bit.

python -m pytest tests/test_resume.py --kills 200    # the long run
"""

import itertools
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import DATA, DISTILL, EVALUATE, EXPERTS, STUDENT, TEACHER, start

import common

MKDT = [*DISTILL, "--init", "random", "--iters", "30"]
KRR_ST = [*DATA, *STUDENT, *"--method krr_st --fraction 0.1 --pool_size 2 --pool_steps 9".split()]
RUNS = {  # stage and options, long enough to be killed within; what is not there, for it is to be made
    "teacher": ("train_teacher", [*TEACHER, "--epochs", "12"], "te*.pt ta*.pt train_teacher*"),
    "experts": ("train_experts", [*EXPERTS, "--epochs", "12", "--augment", "flip_crop"],
                "experts train_experts*"),
    "experts_ssl": ("train_experts", [*EXPERTS, "--objective", "simclr"], "experts train_experts*"),
    "mkdt": ("distill", [*MKDT, *"--name x --lr_targets 1 --log_lr".split()], ""),
    "mkdt_auto": ("distill", [*MKDT, *"--name x --lr_init auto --decay 0.1 --augment flip_crop".split()], ""),
    "krr_st": ("distill", [*KRR_ST, *"--batch_real 50 --iters 60 --lr_img 0.02".split()], ""),
    "evaluate": ("evaluate", [*EVALUATE, *"--epochs 30 --augment flip_crop".split()], "results* evaluate*"),
}


def contents(folder):
    """{path: bytes} of all that a run has made; of logs the records, from the last start at step 0 on."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path in folder.glob("*.jsonl"):
        records = common.read_records(path)
        begin = max((i for i, record in enumerate(records) if record.get("step") == 0), default=None)
        if path.name == "train_experts.jsonl":  # each is written when it is made, some perhaps twice
            begin = 0
            records.sort(key=lambda record: record.get("expert", -1))
            records = [records[0], *(b for a, b in itertools.pairwise(records) if a != b)]
        assert begin is not None or path.name == "results.jsonl"
        found[path.name] = [record for record in records[begin:] if "command" not in record]
    return found


@pytest.fixture
def prepared(run_dir, tmp_path):
    """prepared("name", "*.x *.y"): a new copy of a run, without these."""
    return lambda name, without: Path(
        shutil.copytree(run_dir, tmp_path / name, ignore=shutil.ignore_patterns(*without.split())))


def killed_behind(n, checkpoint=False):
    """Makes a process kill itself behind its n-th operation on files, or when it has written a checkpoint."""
    left = [n]

    def counted(function):
        def call(*words, **more):
            result = function(*words, **more)
            left[0] -= not checkpoint or str(words[-1]).endswith(".checkpoint")
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    os.replace = counted(os.replace)
    if not checkpoint:
        os.truncate, os.unlink, common.append = map(counted, (os.truncate, os.unlink, common.append))


@pytest.mark.parametrize("which", RUNS)
def test_killed_at_any_point(which, prepared, request):
    """Behind one operation on files after another; then by three signals at random points."""
    name, options, makes = RUNS[which]

    def begin(folder, *more, **how):
        return start(name, [*options, "--out_dir", folder, *more], **how)

    whole, began = prepared("whole", makes), time.time()
    process = begin(whole)
    process.join()
    seconds, expected = time.time() - began, contents(whole)
    assert process.exitcode == 0 and not [*whole.rglob("*.checkpoint"), *whole.rglob("*.tmp")]

    folder = prepared("behind", makes)
    for n in itertools.count():
        process = begin(folder, prepare=lambda n=n: killed_behind(max(n, 1), checkpoint=n == 0))
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert n > 4 and contents(folder) == expected

    draws, kills, done, runs = random.Random(which), request.config.getoption("kills"), 0, 0
    while done < kills:
        folder, ended = prepared(f"killed_{runs}", makes), False
        while not ended:
            process = begin(folder, "--checkpoint_minutes", draws.choice(["0", "0.002", "5"]))
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
    print(f"{which}: {n} and {done} kills in {runs + 1} runs, which all ended in an undisturbed one's files")


@pytest.mark.parametrize("number, count, piped", [
    (signal.SIGTERM, 1, False), (signal.SIGTERM, 2, False), (signal.SIGINT, 1, True)])
def test_signals(number, count, piped, prepared, tmp_path):
    """The step ends and is saved, also if what it is piped to is gone, or a second one comes."""
    folder, student_loss, calls = prepared("run", "experts"), common.student_loss, []

    def loss(*words):
        sys.stderr.reconfigure(line_buffering=True)  # as that of a process of its own
        calls.append(1)
        for _ in range(count if len(calls) == 4 else 0):
            os.kill(os.getpid(), number)
        return student_loss(*words)

    def prepare():
        common.student_loss = loss
        if piped:
            read, write = os.pipe()
            os.dup2(write, 1), os.dup2(write, 2), os.close(read)

    argv = [*EXPERTS, "--out_dir", folder, "--first_expert", "1", "--checkpoint_minutes", "0"]
    process = start("train_experts", argv, tmp_path / "said", prepare)
    process.join()
    assert process.exitcode == 128 + number
    said = f"stopped by {number.name}: the same command goes on\n"
    assert (tmp_path / "said").read_text() == ("" if piped else said)
    assert common.load(folder / "experts/0001.checkpoint", {}, "")["step"] == 4


@pytest.mark.parametrize("module, name", [(torch, "save"), (os, "fsync"), (os, "replace")])
def test_killed_while_a_file_is_written(module, name, tmp_path):
    """The old one stays, whole; the next one leaves no trace of what was begun."""
    path = tmp_path / "x.pt"
    common.save(path, {"a": 1})

    def end(contents, file=None, *words):
        if name == "save":  # in the middle
            file.write(bytes(100))
            file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def prepare():
        setattr(module, name, end)
        common.save(path, {"a": 2})

    process = start("distill", [], prepare=prepare)
    process.join()
    assert process.exitcode == -signal.SIGKILL and common.load(path, {"a": None}, "") == {"a": 1}
    common.save(path, {"a": 3})
    assert common.load(path, {"a": None}, "") == {"a": 3} and list(tmp_path.iterdir()) == [path]
