"""The tests need no network, no GPU and no accuracy: tiny nets on scikit-learn's digits."""

import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)  # small tensors, and machines that do other things too

# A whole run in seconds: 150 digits of 8 px, a ResNet-18 of width 4, students of width 8.
DATA = ["--dataset", "digits", "--limit", "150", "--device", "cpu"]
STUDENT = ["--width", "8"]
TEACHER = [*DATA, "--width", "4", "--epochs", "1", "--batch_size", "50", "--projection_dim", "32"]
EXPERTS = [*DATA, *STUDENT, "--num_experts", "3", "--batch_size", "50"]
DISTILL = [*DATA, *STUDENT, "--fraction", "0.1", "--syn_steps", "3", "--batch_syn", "8", "--lr_img", "10"]
EVALUATE = [*DATA, *STUDENT, "--fractions", "0.2", "0.4", "--seeds", "0", "1", "--epochs", "2"]


def start(name, argv, stderr=os.devnull, prepare=lambda: None):
    """The stage in a process of its own, as from the command line; forked, for torch is imported then.

    stderr: path of a file for its errors; prepare: called in the process, before.
    """

    def target():
        for descriptor, path in ((1, os.devnull), (2, stderr)):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # not pytest's
        prepare()
        import common

        module = __import__(name)
        common.run(module.main, module.parse_args([str(a) for a in argv]))

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


@pytest.fixture
def stage():
    """stage("distill", [...]) parses the options as the command line would and runs the stage here."""

    def run(name, argv):
        module = __import__(name)
        return module.main(module.parse_args([str(a) for a in argv]))

    return run


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    """An output folder in which every stage has run once; tests that write go to a copy of it."""
    import distill
    import evaluate
    import train_experts
    import train_teacher

    out = ["--out_dir", str(tmp_path_factory.mktemp("run"))]
    train_teacher.main(train_teacher.parse_args(TEACHER + out))
    train_experts.main(train_experts.parse_args(EXPERTS + out))
    for init in ("random", "high_loss"):
        for iters in ("0", "1"):
            distill.main(distill.parse_args([*DISTILL, *out, "--init", init, "--iters", iters]))
    evaluate.main(evaluate.parse_args(EVALUATE + out))
    return Path(out[1])


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=4, help="how often each stage is killed in test_resume.py")
