"""The tests need no network, no GPU and no accuracy: tiny nets on scikit-learn's digits."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # small tensors, and machines that do other things too

import common  # noqa: E402

# A whole run in seconds: 150 digits of 8 px, a ResNet-18 of width 4, students of width 8.
DATA = ["--dataset", "digits", "--limit", "150", "--device", "cpu"]
STUDENT = ["--width", "8"]
TEACHER = [*DATA, "--width", "4", "--epochs", "1", "--batch_size", "50", "--projection_dim", "32"]
EXPERTS = [*DATA, *STUDENT, "--num_experts", "3", "--batch_size", "50"]
DISTILL = [*DATA, *STUDENT, "--fraction", "0.1", "--syn_steps", "3", "--batch_syn", "8", "--lr_img", "10"]
EVALUATE = [*DATA, *STUDENT, "--fractions", "0.2", "0.4", "--seeds", "0", "1", "--epochs", "2"]


def run_stage(name, argv):
    """Run a stage in this process, its options parsed as from the command line; a Problem passes through."""
    module = __import__(name)
    module.main(module.parse_args([str(a) for a in argv]))


def start(name, argv, stderr=os.devnull, prepare=lambda: None):
    """The stage in a process of its own, as from the command line; forked, for torch is imported then.

    stderr: path of a file for its errors; prepare: called in the process, before.
    """

    def target():
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for descriptor, path in ((1, os.devnull), (2, stderr)):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
        prepare()
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # not pytest's
        module = __import__(name)
        common.run(module.main, lambda: module.parse_args([str(a) for a in argv]))

    process = multiprocessing.get_context("fork").Process(target=target)
    # A signal in the middle of a fork would be pytest's, which the process still is.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    process.start()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return process


@pytest.fixture
def stage():
    """stage("distill", [...]) runs a stage here."""
    return run_stage


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    """An output folder in which every stage has run once; tests that write go to a copy of it."""
    folder = tmp_path_factory.mktemp("run")
    out = ["--out_dir", folder]
    run_stage("train_teacher", [*TEACHER, *out])
    run_stage("train_experts", [*EXPERTS, *out])
    for init in ("random", "high_loss"):
        for iters in ("0", "1"):
            run_stage("distill", [*DISTILL, *out, "--init", init, "--iters", iters])
    run_stage("evaluate", [*EVALUATE, *out])
    return folder


@pytest.fixture
def copy(run_dir, tmp_path):
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(run_dir, tmp_path / "copy"))


def refuses(function, *words, what=""):
    """function() raises a Problem whose line holds the words; returns the line. what: is tried."""
    try:
        function()
    except common.Problem as problem:
        message = " ".join(f"{problem}".split())
    else:
        pytest.fail(f"not refused: {what}")
    for word in words:
        assert str(word) in message, (what, message)
    return message


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=4, help="how often each stage is killed in test_resume.py")
    parser.addoption("--sweep", action="store_true", help="all cases of test_layout.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "rehearsal" in item.fixturenames)  # last: it runs beside the others


@pytest.fixture(scope="session", autouse=True)
def beside(request, tmp_path_factory):
    """(process, its OUT) of a run_all.sh that takes a minute, for the last test; its output is beside OUT."""
    if not any("rehearsal" in item.fixturenames for item in request.session.items):
        yield None
        return
    out = tmp_path_factory.mktemp("rehearsal") / "runs"
    variables = {"PYTHON": sys.executable, "OUT": str(out), "KRR_ST": "--lr_img 1e30", "OMP_NUM_THREADS": "1"}
    with open(out.parent / "stdout", "w") as stdout, open(out.parent / "stderr", "w") as stderr:
        command = ["bash", ROOT / "run_all.sh", "table1", "rehearse"]
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **variables}, stdout=stdout, stderr=stderr
        )
    yield process, out
    process.kill()


@pytest.fixture
def rehearsal(beside):
    return beside
