"""How fast and how large, beside the authors' way: ratios measured side by side. pytest leaves it alone.

    python tests/benchmark.py                  # on the CPU
    python tests/benchmark.py --device cuda
    python tests/benchmark.py --only iteration experts
    python tests/benchmark.py --scale          # instead: how time and memory grow with sizes, a table
    python tests/benchmark.py --device fake    # instead: what an iteration asks of a GPU, counted without one

Each measurement has two processes, which are warmed up and then run in turn, so that both see the same load
of the machine; shown are medians, and the median of the ratios. The baselines are written here, after the
paper and MTT's way: eager PyTorch in float32, a DataLoader, autograd through the unrolled inner loop. The
network is the paper's ConvNet of depth 3 and width 128 at 32 px, D = 512. Prints a line a task, and puts them
into results/benchmark.json, in place of earlier ones of the task on the device.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.transforms import functional as TF

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import distill  # noqa: E402
import train_experts  # noqa: E402
import train_teacher  # noqa: E402

DATA = common.ImageSet(None, None, torch.full((3,), 0.5), torch.full((3,), 0.25))


def unrolled_steps(loss_fn, theta, images, targets, lr, batches):
    """The inner loop for autograd to unroll, which keeps the graphs of all steps."""
    for n, batch in enumerate(batches):
        (g,) = torch.autograd.grad(loss_fn(theta, images[batch], targets[batch], n), theta, create_graph=True)
        theta = theta - lr * g
    return theta


def iteration(side, device):
    """One distillation iteration: N inner steps, the matching loss, its gradient in pixels and lr."""
    steps, batch = (10, 128) if device == "cpu" else (40, 256)
    to = dict(dtype=torch.float64 if side == "exact" else torch.float32)
    to["device"] = "cpu" if device == "fake" else device
    net = common.ConvNet(512)
    theta = common.flatten(net)
    goal = (theta + 0.01 * torch.randn_like(theta)).to(**to)
    net, theta = net if device == "fake" else net.to(**to), theta.to(**to)
    images, targets = torch.randn(1000, 3, 32, 32).to(**to).requires_grad_(), torch.randn(1000, 512).to(**to)
    lr = torch.tensor(0.1, requires_grad=True, **to)
    used = 896 if device == "cpu" else 1000  # 896 are whole batches of 128
    batches = list(itertools.islice(common.shuffled(used, batch, 0), steps))
    batches = [b.to(to["device"]) for b in batches]
    our = side in ("ours", "bf16")
    how = dict(memory_format=torch.channels_last if our else torch.contiguous_format,
               precision="bf16" if side == "bf16" else "fp32")

    def loss_fn(theta, x, z, n):
        f = functools.partial(common.forward_flat, net, theta, **how)
        return common.student_loss("kd", f, x, z, DATA)

    fused = our and device != "fake"
    functions = distill.step_functions(loss_fn, compile=True) if fused else None

    def run():
        if our or side == "exact":
            end = distill.student_steps(loss_fn, theta, images, targets, lr, batches, 0.0, functions)
        else:
            end = unrolled_steps(loss_fn, theta.clone().requires_grad_(), images, targets, lr, batches)
        return torch.autograd.grad(distill.matching_loss(end, theta, goal), (images, lr))

    return run


def iteration_bf16(side, device):
    """The same iteration by --precision bf16; the baseline: ours in float32."""
    return iteration({"ours": "bf16", "baseline": "ours"}.get(side, side), device)


class Counter(TorchDispatchMode):
    """Counts what the operations within would ask of a GPU; to be used with fake tensors."""

    def __init__(self):
        super().__init__()
        self.kernels = self.library_calls = self.traffic = self.live = self.peak = 0

    def release(self, size):
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        given, made = ([t for t in torch.utils._pytree.tree_leaves(part) if torch.is_tensor(t)]
                       for part in ((args, kwargs), results))
        known = {t.untyped_storage()._cdata for t in given}
        new = [t for t in made if t.untyped_storage()._cdata not in known]
        for t in new:
            self.live += (size := t.untyped_storage().nbytes())
            weakref.finalize(t.untyped_storage(), self.release, size)
        self.peak = max(self.peak, self.live)
        name = function.__name__.partition(".")[0]
        if (new or function._schema.is_mutable) and not name.startswith(("empty", "new_empty")):  # no view
            library = name in ("convolution", "convolution_backward", "mm", "addmm", "bmm")
            self.library_calls += library
            self.kernels += not library
            self.traffic += sum(t.nbytes for t in (*given, *made))
        return results


def count():
    """Prints what an iteration at the paper's CIFAR-10 setting asks of a GPU: computed, not measured."""
    for side in ("ours", "baseline"):
        with FakeTensorMode(), FlopCounterMode(display=False) as flops, Counter() as counter:
            run, before = iteration(side, "fake"), counter.live
            counter.kernels = counter.library_calls = counter.traffic = counter.peak = 0
            operations = flops.get_total_flops()
            run()
        print(f"{side}: peak memory {counter.peak / 2**30:.2f} GiB ({before / 2**30:.2f} before); "
              f"{counter.kernels:,} kernels and {counter.library_calls:,} calls of libraries; "
              f"{(flops.get_total_flops() - operations) / 1e12:.1f} TFLOP; "
              f"{counter.traffic / 2**30:.0f} GiB read or written", flush=True)


def experts(side, device, precision="fp32"):
    """An epoch of expert training on 2,048 images in batches of 256."""
    images, targets = torch.randint(0, 256, (2048, 3, 32, 32), dtype=torch.uint8), torch.randn(2048, 512)
    net = common.ConvNet(512).to(device)
    if side == "ours":
        args = train_experts.parse_args(["--epochs", "1", "--device", device, "--precision", precision])
        images, targets = images.to(device), targets.to(device)
        net = net.to(memory_format=torch.channels_last)
        forward = common.compiled(lambda x: net(x.contiguous(memory_format=torch.channels_last)))
        train_experts.example_losses = lambda *_: torch.zeros(1)  # in this process: the baseline has none
        return lambda: train_experts.train_expert(net, forward, DATA, images, targets, args, 0, Nothing)[0]
    loader = DataLoader(TensorDataset(common.normalise(images, DATA), targets), 256, shuffle=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

    def run():
        for x, z in loader:
            loss = F.mse_loss(net(x.to(device)), z.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return common.flatten(net)

    return run


def experts_bf16(side, device):
    """The same epoch by --precision bf16; the baseline: ours in float32."""
    return experts("ours", device, "bf16" if side == "ours" else "fp32")


def views(side, device):
    """Two augmented views of 512 images."""
    images = torch.randint(0, 256, (512, 3, 32, 32), dtype=torch.uint8)
    if side == "ours":
        images, draws = images.to(device), torch.Generator(device).manual_seed(0)
        return lambda: torch.stack([common.random_view(images, draws) for _ in range(2)])
    jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    view = transforms.Compose([
        transforms.ToPILImage(), transforms.RandomResizedCrop(32), transforms.RandomHorizontalFlip(),
        jitter, transforms.RandomGrayscale(0.2), transforms.ToTensor(),
    ])  # fmt: skip
    return lambda: torch.stack([torch.stack([view(image) for image in images]) for _ in range(2)]).to(device)


def teacher(side, device):
    """Two steps of Barlow Twins on ResNet-18; the baseline: forward and backward only, on ready views."""
    batch = 256 if device.startswith("cuda") else 64
    words = ["--device", device, "--batch_size", str(batch), "--epochs", "1"]
    args = train_teacher.parse_args(words)
    images = torch.randint(0, 256, (2 * batch, 3, 32, 32), dtype=torch.uint8).to(device)
    encoder = common.ResNet().to(device, memory_format=torch.channels_last)
    if side == "ours":
        return lambda: train_teacher_on(encoder, images, args)
    projector = train_teacher.make_projector(args.ssl, 512, args.projection_dim)
    net = torch.nn.Sequential(encoder, projector).to(device).train()

    def step():
        for x in images.split(batch):
            z1, z2 = (net(common.normalise(x, DATA)) for _ in range(2))
            common.barlow_twins_loss(z1, z2, args.bt_lambda).backward()
        return []

    return step


class Nothing:
    """In place of a stage's log, and of its Checkpoint."""

    step = 0

    def __init__(self, **parts):
        pass

    def write(self, **record):
        pass

    def tick(self, step, last=False):
        pass


def train_teacher_on(encoder, images, args):
    """An epoch of the teacher's own loop, without log and checkpoint."""
    checkpoint, common.Checkpoint = common.Checkpoint, lambda *words, **parts: Nothing()
    train_teacher.train(encoder, DATA._replace(images=images), args, {}, Nothing(), None)
    common.Checkpoint = checkpoint
    return []


def probe(side, device, n=2500):
    """The linear probe of n features of 2,048 dimensions, 100 classes; the same optimum."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 100, n)
    centres = generator.normal(size=(100, 2048))
    features = np.maximum(centres[labels] * 0.3 + generator.normal(size=(n, 2048)), 0).astype(np.float32)
    if side == "ours":
        x, y = torch.from_numpy(features).to(device), torch.from_numpy(labels).to(device)
        return lambda: common.linear_probe(x, y, 100)[:1]
    from sklearn.linear_model import LogisticRegression

    def run():
        model = LogisticRegression(C=1 / (2 * 1e-3 * n), tol=1e-6, max_iter=10_000).fit(features, labels)
        return [torch.from_numpy(model.coef_)]

    return run


def large_probe(side, device):
    """The same for 50,000 features."""
    return probe(side, device, 50_000)


TASKS = {  # name -> (function, whether both sides compute the same numbers)
    "iteration": (iteration, True),
    "iteration_bf16": (iteration_bf16, True),
    "experts": (experts, False),
    "experts_bf16": (experts_bf16, False),
    "teacher": (teacher, False),
    "views": (views, False),
    "probe": (probe, True),
    "large_probe": (large_probe, True),
}
EXACT = ("iteration", "iteration_bf16")  # compared with float64, too


# ------------------------------------------------------------------------------------------------------------
# How time and memory grow (--scale): small networks, the shapes of the curves
# ------------------------------------------------------------------------------------------------------------


def random_images(n, px):
    return torch.randint(0, 256, (n, 3, px, px), dtype=torch.uint8)


def scale_load(device, N=20_000, mapped=False):
    """Reading an image folder of N images of 64 px; mapped: when another process has decoded it."""
    held = tempfile.TemporaryDirectory()
    folder = Path(held.name)
    for split, count in (("train", N), ("test", 1)):
        (folder / split / "a").mkdir(parents=True)
        for i in range(count):
            path = folder / split / "a" / f"{i}.jpg"
            if i < 100:
                TF.to_pil_image(random_images(1, 64)[0]).save(path)
            else:
                path.hardlink_to(folder / split / "a" / f"{i % 100}.jpg")
    name = f"imagefolder:{folder}"
    if mapped:
        if os.fork() == 0:
            common.load_images(name, "train", folder, 64)
            os._exit(0)
        os.wait()
    return lambda: (common.load_images(name, "train", folder, 64), held)  # which goes with the process


def scale_distill(device, S=500, steps=10, px=32, batch=64):
    """An iteration of distillation (width 32)."""
    net = common.ConvNet(128, px, 3, 32).to(device)
    theta = common.flatten(net)
    goal = theta + 0.01 * torch.randn_like(theta)
    images, targets = (
        torch.randn(S, 3, px, px, device=device).requires_grad_(),
        torch.randn(S, 128).to(device),
    )
    batches = list(itertools.islice(common.shuffled(S, batch, 0), steps))

    def run():
        end = distill.student_steps(
            lambda theta, x, z, n: common.mse_loss(common.forward_flat(net, theta, x), z),
            theta, images, targets, torch.tensor(0.1, device=device), batches,
        )  # fmt: skip
        torch.autograd.grad(distill.matching_loss(end, theta, goal), images)

    return run


SCALES = {  # name -> (function, {quantity: its values})
    "reading": (scale_load, {"N": [10_000, 30_000, 100_000]}),
    "opening what was decoded": (functools.partial(scale_load, mapped=True),
                                 {"N": [10_000, 30_000, 100_000]}),
    "distillation": (scale_distill, {"S": [500, 1000, 2000], "steps": [10, 20, 40], "batch": [64, 128, 256],
                                     "px": [16, 32, 64]}),
}

# ------------------------------------------------------------------------------------------------------------

STATE = {}  # of a process: what it runs


def memory(device):
    """The peak of memory so far, in bytes."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def begin(args, keep_memory, function, *words, **sizes):
    """The start of a process: makes what it will run, and looks at the memory before."""
    if keep_memory:
        common.keep_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # as the stages have it
    torch.manual_seed(0)
    STATE.update(run=function(*words, device=args.device, **sizes), device=args.device)
    STATE["before"] = memory(args.device)


def once(keep=False):
    """(seconds, peak of memory beyond what was there at the start, results if they are to be kept)."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(None):
        STATE["result"] = STATE["run"]()
    if STATE["device"].startswith("cuda"):
        torch.cuda.synchronize(STATE["device"])
    seconds, more = time.perf_counter() - start, memory(STATE["device"]) - STATE["before"]
    return seconds, more, [part.detach().cpu().numpy() for part in STATE["result"]] if keep else None


def process(*words, **sizes):
    """A process of its own, in which begin has run."""
    first = functools.partial(begin, *words, **sizes)
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), first)


def scale(args):
    """Measures SCALES, each point in a process of its own; prints a table, returns its records."""
    records = []
    print("| stage | | values | seconds | MiB beyond the data | grows as: time | memory |")
    print("|---|---|---|---|---|---|---|")
    for name, quantity in ((row, q) for row in args.scale or SCALES for q in SCALES[row][1]):
        function, sizes, points = SCALES[name][0], SCALES[name][1][quantity], []
        for size in sizes:
            with process(args, True, function, **{quantity: size}) as pool:
                # A second reading beside the first would count twice.
                found = [pool.submit(once).result() for _ in range(3 if name == "distillation" else 1)]
            points.append({"seconds": statistics.median(part[0] for part in found), "bytes": found[-1][1]})
        records.append({"stage": name, "quantity": quantity, "values": sizes, "points": points})
        seconds, mib = ([point[key] for point in points] for key in ("seconds", "bytes"))
        powers = [math.log(max(part[-1], 1e-9) / max(part[0], 1e-9)) / math.log(sizes[-1] / sizes[0])
                  for part in (seconds, mib)]
        columns = [name, quantity, ", ".join(f"{v:,}" for v in sizes), ", ".join(f"{s:.3g}" for s in seconds),
                   ", ".join(f"{b / 2**20:.0f}" for b in mib), *(f"{quantity}^{p:.1f}" for p in powers)]
        print(f"| {' | '.join(columns)} |", flush=True)
    return records


def compare(task, args):
    """Both sides of a task in turn: a record of its medians."""
    function, same = TASKS[task]

    def difference(a, b):
        return max(float(np.linalg.norm(x - y) / np.linalg.norm(x)) for x, y in zip(a, b))

    with (process(args, task == "teacher" or "bf16" in task, function, "baseline") as baseline,
          process(args, True, function, "ours") as ours):
        pairs = [tuple(pool.submit(once, same and i == 0).result() for pool in (baseline, ours))
                 for i in range(args.repeats + 1)]  # the first warms up, and compiles
    seconds = [[side[0] for side in pair] for pair in pairs[1:]]
    (*_, theirs), (warm_up, _, our) = pairs[0]
    record = {
        "task": task,
        "what": " ".join(function.__doc__.split()),
        "baseline_seconds": statistics.median(a for a, _ in seconds),
        "our_seconds": statistics.median(b for _, b in seconds),
        "times_as_fast": statistics.median(a / b for a, b in seconds),
        "baseline_bytes": pairs[-1][0][1],
        "our_bytes": pairs[-1][1][1],
        "warm_up_seconds": warm_up,
        "repeats": args.repeats,
    }
    if same:
        record["difference"] = difference(theirs, our)
    if task in EXACT:  # beside the same in float64: what of the difference is float32's own
        with process(args, True, function, "exact") as pool:
            *_, exact = pool.submit(once, True).result()
        record["errors"] = {"baseline": difference(exact, theirs), "ours": difference(exact, our)}
    return record


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.HelpFormatter)
    parser.add_argument("--device", default="cpu", help="where to run")
    parser.add_argument("--threads", type=common.natural, help="CPU threads (default: torch's choice)")
    parser.add_argument("--repeats", type=common.positive, default=5, help="of each side")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), help="tasks")
    rows = "how time and memory grow, instead: of these rows, or all"
    parser.add_argument("--scale", nargs="*", choices=SCALES, metavar="ROW", help=rows)
    return parser.parse_args(argv)


def keep(key, records, same):
    """Puts records under a key of results/benchmark.json, in place of those with the same names as these."""
    path = ROOT / "results/benchmark.json"
    contents = json.loads(path.read_text()) if path.exists() else {}
    new = [[record[name] for name in same] for record in records]
    contents[key] = [r for r in contents.get(key, []) if [r[name] for name in same] not in new] + records
    with common.replacing(path) as temporary:
        temporary.write_text(json.dumps(contents, indent=1) + "\n")


def main():
    args = parse_args()
    if args.device == "fake":
        return count()
    where = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "cpu"
    made = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "device": where,
            "threads": args.threads or torch.get_num_threads()}
    if args.scale is not None:
        return keep("scale", [{**record, **made} for record in scale(args)], ("stage", "quantity", "device"))
    for task in args.only:
        record = compare(task, args)
        keep("tasks", [{**record, **made}], ("task", "device", "threads"))
        theirs, ours = (record[f"{side}_bytes"] / 2**20 for side in ("baseline", "our"))
        print(f"{task}: {record['times_as_fast']:.2f} times as fast ({record['baseline_seconds']:.3f} s, "
              f"ours {record['our_seconds']:.3f} s), memory {theirs:.0f} MiB, ours {ours:.0f} MiB, "
              f"difference {record.get('difference', 'not compared')}, "
              f"from float64: {record.get('errors', 'not compared')}", flush=True)


if __name__ == "__main__":
    main()
