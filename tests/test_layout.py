"""oneDNN corrupts memory in some layouts on some processors: networks as the stages run them, in processes of
their own, with an allocator that checks.

python -m pytest tests/test_layout.py --sweep    # all widths, sizes and instruction sets: some 40 min
"""

import itertools
import json
import os
import subprocess
import sys

import pytest
from conftest import DATA, start

import common

CHECKED = {"MALLOC_CHECK_": "3", "LD_PRELOAD": "libc_malloc_debug.so.0"}  # without the library a warning
WIDTHS = [4, 5, 6, 7, 8, 9, 10, 12, 14, 15, 16, 20, 24, 31, 32, 33, 40, 48, 64]
KINDS = ["teacher", "teacher, bf16", "expert", "student", "student, bf16"]
SIZES = [8, 16, 24, 32, 48, 64, 96, 128]


def test_a_narrow_teacher_at_64_px(tmp_path):
    """The rehearsal of Tiny-ImageNet, which the rule "8 channels or more" ended by a segmentation fault."""
    argv = [*DATA, *"--image_size 64 --width 8 --epochs 1 --batch_size 32".split(), "--out_dir", tmp_path]
    process = start("train_teacher", argv)
    process.join()
    assert process.exitcode == 0 and (tmp_path / "targets.pt").exists()


@pytest.mark.parametrize("isa", ["", "AVX2", "SSE41"])
def test_no_network_crashes(isa, request):
    """Forwards and backwards, teachers and experts, and students twice backwards, each in its layout."""
    if not (whole := request.config.getoption("sweep")) and isa:
        pytest.skip("with --sweep alone")
    few = ["teacher", "student, bf16"], [8, 32], [64], [7]
    kinds, widths, sizes, batches = (KINDS, WIDTHS, SIZES, [7, 32]) if whole else few
    kinds = [kind for kind in kinds if "bf16" not in kind or isa != "SSE41"]  # which takes minutes a step
    cases = list(itertools.product(kinds, widths, sizes, batches))
    environment = {**os.environ, **CHECKED, **({"ONEDNN_MAX_CPU_ISA": isa} if isa else {})}
    done = subprocess.run([sys.executable, __file__, json.dumps(cases)], env=environment, capture_output=True)
    assert done.returncode == 0 and done.stdout == b"%d cases\n" % len(cases), done


def run_case(kind, width, px, batch):
    """A step of a network; kind: as the stages have it."""
    import torch

    import distill

    layout, x = common.layout(width), torch.randn(batch, 3, px, px)
    precision = kind.partition(", ")[2] or "fp32"
    if kind.startswith("student"):  # in distill.py
        net = common.make_student(32, px, 3, width)
        _, reverse = distill.step_functions(
            lambda theta, x, z, n: common.mse_loss(common.forward_flat(net, theta, x, layout, precision), z))
        theta = common.flatten(net)
        return reverse(theta, x, torch.randn(batch, 32), 0, torch.randn_like(theta))
    net = common.make_student(32, px, 3, width) if kind == "expert" else common.ResNet(width=width)
    net = net.to(memory_format=layout)
    for _ in range(2):
        common.in_precision(net, precision)(x.contiguous(memory_format=layout)).square().mean().backward()
    net.eval()(x)


def main(cases):
    """Forks a process a case, and prints those that a signal ended."""
    import torch
    import torchvision  # noqa: F401  before the forks

    import distill  # noqa: F401

    for kind, width, px, batch in cases:
        if not (child := os.fork()):
            torch.set_num_threads(1 + (batch == 7))
            run_case(kind, width, px, batch)
            os._exit(0)
        if status := os.waitpid(child, 0)[1]:
            print(f"{kind}: width {width}, {px} px, {batch} images: {status}", flush=True)
    print(f"{len(cases)} cases")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
