"""A tensor on the wrong device shows here, on a machine without a GPU: the stages' inner functions run on
fake tensors, which have a device and no values.

Fake tensors of "cuda" itself have no backward pass on such a machine. So a device of another name is
registered, for good: hence a process of its own, which runs main().
"""

import contextlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed.fsdp  # noqa: F401  which would find no torch.Generator later
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import distill  # noqa: E402
import evaluate  # noqa: E402
import train_experts  # noqa: E402
import train_teacher  # noqa: E402

GPU = "cudasim"  # begins as the stages expect it of a GPU
ELSEWHERE = 2**40  # of the seeds of its generators, which are generators of the CPU


def test_no_tensor_is_on_the_wrong_device():
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr[-3000:]}"
    assert done.stdout.count("fine") == 18, done.stdout


# ---- The device --------------------------------------------------------------------------------------------


class Strict(TorchDispatchMode):
    """Refuses what fake tensors let pass: an index on the GPU into the host, another device's generator.

    waits: how often the host had to wait for the GPU, for a copy to it that is not pinned, or for a number.
    """

    waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        words = kwargs or {}
        if "index.Tensor" in f"{function}" or "index_put" in f"{function}":
            assert args[0].device.type == GPU or all(i is None or i.is_cpu for i in args[1]), "an index"
        if generator := words.get("generator"):
            there = torch.device(words.get("device") or "cpu").type == GPU
            assert (generator.initial_seed() >= ELSEWHERE) == there, "a generator"
        if "_to_copy" in f"{function}" and torch.device(words.get("device") or "cpu").type == GPU:
            self.waits += args[0].is_cpu and not words.get("non_blocking")
        return function(*args, **words)


def generator(device="cpu", make=torch.Generator):
    """In the place of torch.Generator: one whose seed tells its device."""
    more = ELSEWHERE * (torch.device(device).type == GPU)
    return SimpleNamespace(manual_seed=lambda seed: make().manual_seed(seed % ELSEWHERE + more))


def module_to(net, device=None, memory_format=None):
    """In the place of nn.Module.to, which would set the data of parameters."""
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None and device:
                module._parameters[name] = nn.Parameter(p.detach().to(device))
        for name, buffer in module._buffers.items():
            if buffer is not None and device:
                module._buffers[name] = buffer.to(device)
    return net


@contextlib.contextmanager
def gpu(free):
    """Within, GPU is a device with so many bytes free, and all tensors are fake."""
    strict = Strict()

    def number(value, whole):
        def read(x):
            strict.waits += not x.is_cpu
            return value if x.is_floating_point() else whole

        return read

    numbers = dict(item=number(1.0, 0), __float__=number(1.0, 1.0), __int__=number(1, 1))
    numbers |= dict(__bool__=number(True, True))
    with contextlib.ExitStack() as stack:
        for place, name, new in [
            (FakeTensorMode, "avoid_device_init", True), (torch, "Generator", generator),
            (nn.Module, "to", module_to),
            (torch.cuda, "mem_get_info", lambda device: (free, 0)),
            (evaluate.copy, "deepcopy", lambda net: net),
            (torch.optim.LBFGS, "step", lambda self, closure: closure()),
            (common, "seed_dropout", lambda *words: None), (common, "Progress", Stub),
        ]:
            stack.enter_context(patch.object(place, name, new))
        stack.enter_context(patch.multiple(torch.Tensor, pin_memory=lambda x: x, **numbers))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(strict)
        common.yiq.cache_clear()
        yield strict


# ---- What runs on it ---------------------------------------------------------------------------------------


def there(*tensors):
    assert {tensor.device.type for tensor in tensors} == {GPU}


def options(**more):
    """What a stage's options say, for sets of 6 images and students of width 8."""
    return SimpleNamespace(**{**dict(
        device=GPU, seed=0, objective="kd", ssl="simclr", lr=0.1, momentum=0.9, weight_decay=0,
        width=8, batch_size=8, epochs=1, krr_st_epochs=1, precision="fp32", arch="convnet",
        augment="flip_crop", bt_lambda=0.1, syn_steps=2, batch_syn=4, expert_epochs=1, max_start_epoch=1,
        inner_momentum=0.0, iters=2, finetune_steps=1, protocol="finetune_krr_st", name="x", lr_img=1.0,
        lr_lr=0.1, lr_targets=0.1, clip_grad=0.1, decay=1.0, pool_size=2, pool_steps=2, batch_real=8,
        ridge=0.1, checkpoint_minutes=5.0, warmup_epochs=0, projection_dim=8, min_crop=0.1,
        view_size=None, between_epochs=False), **more})


def images(count=24, px=16):
    """An ImageSet as the stages have it: images on the host, mean and std on the device."""
    return common.ImageSet(torch.zeros(count, 3, px, px, dtype=torch.uint8), torch.zeros(count).long(),
                           torch.zeros(3, device=GPU), torch.ones(3, device=GPU))


class Stub:
    """In the place of a Checkpoint, a Log, or the Progress, which formats no fake numbers."""

    step = 0

    def __init__(self, *words, **parts):
        pass

    __call__ = tick = write = kept = lambda self, *words, **values: ""


def a_student():
    return common.make_student(8, 16, 3, 8).to(GPU)


def experts(objective, count=24):
    """An epoch of an expert, and its losses."""
    data, net = images(count), a_student()
    x, z = common.place(data.images, GPU), common.place(torch.zeros(count, 8), GPU)
    train_experts.train_expert(net, net, data, x, z, options(objective=objective), 0, Stub)
    there(*net.parameters())


def pretraining(objective):
    """Pre-training, probe, fine-tuning."""
    data, net = images(), a_student()
    x, z = common.place(data.images, GPU), common.place(torch.zeros(24, 8), GPU)
    evaluate.pretrain(net, objective, x, z, data, 0.1, options(), 0, checkpoint_of=Stub)
    evaluate.probe(net, data, data, [1.0], options(), 0, "")
    evaluate.finetune(net, data, data, [1.0], options(), 0, "")


def a_set(log_lr=True):
    images, targets = torch.zeros(6, 3, 16, 16, device=GPU), torch.zeros(6, 8, device=GPU)
    return distill.SyntheticSet(images, targets, 0.1, log_lr)


def matching(objective, momentum, steps=2):
    """Two iterations of MKDT, with what is written, and the forward pass that auto tries rates with."""
    args = options(objective=objective, inner_momentum=momentum, syn_steps=steps)
    data, net = images(), a_student()
    syn = a_set()
    trajectories = [torch.zeros(2, common.flatten(net).numel())]  # on disk
    distill.distil_mkdt(args, syn, net, data, trajectories, None, Stub, Stub())
    there(syn.least, *syn.parameters(), *(p.grad for p in syn.parameters()))
    with patch.object(common, "save", saved), patch.object(distill, "save_picture", lambda *words: None):
        distill.save_set(Path("x.pt"), syn, torch.arange(6), data, {})
    start, _, batches, _ = distill.draw(args, 6, trajectories, "rate")
    with torch.no_grad():  # as find_rate
        step_loss = distill.make_step_loss(args, net, data, "rate")
        there(distill.student_steps(step_loss, start, syn.images, syn.targets, 0.1, batches[:1], momentum))


def saved(path, contents):
    tensors = [value for value in contents.values() if torch.is_tensor(value)]
    assert len(tensors) == 5 and all(tensor.is_cpu for tensor in tensors), "a file"


def krr_st():
    syn, data = a_set(False), images()
    with patch.object(common, "place", lambda tensor, device: tensor.to(device)):
        distill.distil_krr_st(options(), syn, a_student, data, torch.zeros(24, 8), Stub, Stub())
    there(*syn.parameters())


def checkpoint():
    """What is saved of the device, and read on the host, is on the device again."""
    net, files = a_student(), {}
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    losses = torch.zeros(3, device=GPU)
    sum(p.sum() for p in net.parameters()).backward()
    optimizer.step()
    path = SimpleNamespace(exists=lambda: bool(files))
    with patch.object(common, "save", lambda path, contents: files.update(contents)):
        common.Checkpoint(path, options(), {}, net=net, optimizer=optimizer, losses=losses).tick(1, last=True)
    on_host = torch.utils._pytree.tree_map(lambda leaf: leaf.cpu() if torch.is_tensor(leaf) else leaf, files)
    with patch.object(common, "load", lambda *words: {**on_host, "step": 1}):
        common.Checkpoint(path, options(), {}, net=net, optimizer=optimizer, losses=losses)
    there(losses, *net.parameters(), *(state["momentum_buffer"] for state in optimizer.state.values()))


def teacher(ssl, px, count=16):
    """An epoch of a narrow ResNet-18, and its targets."""
    args, data = options(ssl=ssl, width=4), images(count, px)
    encoder = common.ResNet(width=4, norm_layer=nn.BatchNorm2d).to(GPU)
    with (patch.object(common, "Checkpoint", Stub),
          patch.object(train_teacher, "make_projector", lambda *words: nn.Sequential(nn.Linear(32, 8)))):
        train_teacher.train(encoder, data, args, {}, Stub(), None)
    there(common.random_view(data.images[:4, :1].to(GPU), generator(GPU).manual_seed(0)))  # grey images
    features = train_teacher.represent(lambda x: encoder(common.normalise(x, data)), data.images, 8, args)
    assert features.is_cpu and train_teacher.make_targets(features, 4)["targets"].is_cpu


def no_step_waits():
    """The host waits as often in a loop of twice as many steps: not in a step."""
    loops = (experts, ["simclr"], 48), (matching, ["kd", 0.9], 4), (teacher, ["barlow_twins", 64], 32)
    for function, words, more in loops:
        waits = []
        for longer in ([], [more]):
            with gpu(2**40) as strict:
                function(*words, *longer)
            waits.append(strict.waits)
        assert waits[0] == waits[1] > 0, (function, waits)


def main():
    backend_registration._DummyBackendModule.manual_seed = lambda self, seed: None
    backend_registration._setup_privateuseone_for_python_backend(GPU)
    objectives = [*common.LOSSES, *common.SSL]
    cases = [(function, [name], free) for function in (experts, pretraining) for name in objectives
             for free in (1, 2**40)[name != "kd" :]]  # images stay on the host, or not
    cases += [(matching, words, 1) for words in (["kd", 0.0], ["kd", 0.9], ["simclr", 0.9])]
    cases += [(teacher, ["simclr", 16], 1), (teacher, ["barlow_twins", 64], 2**40)]
    cases += [(pretraining, ["krr_st"], 1), (krr_st, [], 1), (checkpoint, [], 1)]
    for function, words, free in cases:
        with gpu(free):
            function(*words)
        print(function.__name__, *words, "fine", flush=True)
    no_step_waits()


if __name__ == "__main__":
    main()
