"""How fast and how large, beside the authors' way: ratios measured side by side. pytest leaves it alone.

    python tests/benchmark.py                  # on the CPU
    python tests/benchmark.py --device cuda
    python tests/benchmark.py --only iteration experts

Each measurement has two processes, which are warmed up and then run in turn, so that both see the same load
of the machine; shown are medians, and the median of the ratios. The baselines are written here, after the
paper and MTT's way: eager PyTorch in float32, a DataLoader, autograd through the unrolled inner loop. The
network is the paper's ConvNet of depth 3 and width 128 at 32 px, D = 512. Prints a line a task, and writes
results/benchmark.json.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import distill  # noqa: E402
import train_experts  # noqa: E402

STATS = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.25, 0.25, 0.25])


def unrolled_steps(loss_fn, theta, images, targets, lr, batches):
    """The inner loop for autograd to unroll, which keeps the graphs of all steps."""
    for n, batch in enumerate(batches):
        (g,) = torch.autograd.grad(loss_fn(theta, images[batch], targets[batch], n), theta, create_graph=True)
        theta = theta - lr * g
    return theta


def iteration(side, device):
    """One distillation iteration: N inner steps, the matching loss, its gradient in pixels and lr."""
    steps, batch = (40, 256) if device.startswith("cuda") else (10, 128)
    net = common.ConvNet(512).to(device)
    theta = common.flatten(net)
    goal = theta + 0.01 * torch.randn_like(theta)
    images = torch.randn(1000, 3, 32, 32).to(device).requires_grad_()
    targets, lr = torch.randn(1000, 512).to(device), torch.tensor(0.1, device=device, requires_grad=True)
    batches = distill.draw_batches(896, batch, steps, torch.Generator().manual_seed(0))  # whole ones alone
    batches = [b.to(device) for b in batches]

    memory_format = torch.channels_last if side == "ours" else torch.contiguous_format

    def loss_fn(theta, x, z, n):
        return F.mse_loss(common.forward_flat(net, theta, x, memory_format), z)

    functions = distill.step_functions(loss_fn, compile=True) if side == "ours" else None

    def run():
        if side == "ours":
            end = distill.student_steps(loss_fn, theta, images, targets, lr, batches, 0.0, functions)
        else:
            end = unrolled_steps(loss_fn, theta.clone().requires_grad_(), images, targets, lr, batches)
        gradient = torch.autograd.grad(distill.matching_loss(end, theta, goal), (images, lr))
        return torch.cat([g.flatten() for g in gradient])

    return run


def keep_memory(side, device):
    """The baseline's iteration on both sides, ours with common.keep_memory, as all of ours."""
    return iteration("baseline", device)


def experts(side, device):
    """An epoch of expert training on 2,048 images in batches of 256."""
    images, targets = torch.randint(0, 256, (2048, 3, 32, 32), dtype=torch.uint8), torch.randn(2048, 512)
    net = common.ConvNet(512).to(device)
    if side == "ours":
        args = train_experts.parse_args(["--epochs", "1", "--device", device])
        loss_fn = common.make_objective("kd", common.ImageSet(images, None, *STATS))
        images, targets, net = (
            images.to(device),
            targets.to(device),
            net.to(memory_format=torch.channels_last),
        )
        forward = common.compiled(lambda x: net(x.contiguous(memory_format=torch.channels_last)))
        common.encode = lambda *_: targets  # in this process: the example losses are not compared
        return lambda: train_experts.train_expert(net, loss_fn, images, targets, STATS, args, 0, forward)[0]
    loader = DataLoader(TensorDataset(common.normalise(images, *STATS), targets), 256, shuffle=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

    def run():
        for x, z in loader:
            loss = F.mse_loss(net(x.to(device)), z.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return common.flatten(net)

    return run


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


def probe(side, device, n=2500):
    """The linear probe of n features of 2,048 dimensions, 100 classes; the same optimum."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 100, n)
    centres = generator.normal(size=(100, 2048))
    features = np.maximum(centres[labels] * 0.3 + generator.normal(size=(n, 2048)), 0).astype(np.float32)
    if side == "ours":
        x, y = torch.from_numpy(features).to(device), torch.from_numpy(labels).to(device)
        return lambda: common.linear_probe(x, y, 100)[0].flatten()
    from sklearn.linear_model import LogisticRegression

    def run():
        model = LogisticRegression(C=1 / (2 * 1e-3 * n), tol=1e-6, max_iter=10_000).fit(features, labels)
        return torch.from_numpy(model.coef_).flatten()

    return run


def large_probe(side, device):
    """The same for 50,000 features."""
    return probe(side, device, 50_000)


TASKS = {  # name -> (function, whether both sides compute the same numbers)
    "iteration": (iteration, True),
    "keep_memory": (keep_memory, True),
    "experts": (experts, False),
    "views": (views, False),
    "probe": (probe, True),
    "large_probe": (large_probe, True),
}


def worker(task, side, device, threads, path):
    """Runs a task once a line on stdin; prints seconds, and at the end the peak of memory beyond the data."""
    if side == "ours":
        common.keep_memory()
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    run = TASKS[task][0](side, device)

    def memory():
        if device.startswith("cuda"):
            return torch.cuda.max_memory_allocated()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = memory()
    for line in sys.stdin:
        start = time.perf_counter()
        result = run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if line.strip() == "save":
            torch.save(result.detach().cpu(), path)
        print(json.dumps({"seconds": seconds, "bytes": memory() - before}), flush=True)


def compare(task, args, folder):
    """Both sides of a task in turn: a record of its medians."""
    sides, found = {}, {"baseline": [], "ours": []}
    for side in found:
        words = ["--device", args.device, "--threads", str(args.threads or 0), "--worker", task, side]
        command = [sys.executable, __file__, *words, str(folder / side)]
        sides[side] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for i in range(args.repeats + 1):  # the first warms up, and compiles
        for side, process in sides.items():
            process.stdin.write("save\n" if i == 0 else "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"{task}: the {side} process failed")
            found[side].append(json.loads(line))
    for process in sides.values():
        process.stdin.close()
        process.wait()
    seconds = {side: [record["seconds"] for record in records[1:]] for side, records in found.items()}
    record = {
        "task": task,
        "what": " ".join(TASKS[task][0].__doc__.split()),
        "baseline_seconds": statistics.median(seconds["baseline"]),
        "our_seconds": statistics.median(seconds["ours"]),
        "times_as_fast": statistics.median(a / b for a, b in zip(seconds["baseline"], seconds["ours"])),
        "baseline_bytes": found["baseline"][-1]["bytes"],
        "our_bytes": found["ours"][-1]["bytes"],
        "warm_up_seconds": found["ours"][0]["seconds"],
        "repeats": args.repeats,
    }
    if TASKS[task][1]:
        a, b = torch.load(folder / "baseline"), torch.load(folder / "ours")
        record["difference"] = ((a - b).norm() / a.norm()).item()
    return record


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.HelpFormatter)
    parser.add_argument("--device", type=common.device, default="cpu", help="where to run")
    parser.add_argument("--threads", type=common.natural, help="CPU threads (default: torch's choice)")
    parser.add_argument("--repeats", type=common.positive, default=5, help="of each side")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), help="tasks")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main():
    args = parse_args()
    if args.worker:
        task, side, path = args.worker
        return worker(task, side, args.device, args.threads, path)
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for task in args.only:
            record = compare(task, args, Path(folder))
            records.append(record)
            theirs, ours = (record[f"{side}_bytes"] / 2**20 for side in ("baseline", "our"))
            print(
                f"{task}: {record['times_as_fast']:.2f} times as fast ({record['baseline_seconds']:.3f} s, "
                f"ours {record['our_seconds']:.3f} s), memory {theirs:.0f} MiB, ours {ours:.0f} MiB, "
                f"difference {record.get('difference', 'not compared')}",
                flush=True,
            )
    where = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "cpu"
    contents = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "device": where,
        "threads": args.threads or torch.get_num_threads(),
        "share_of_expert_epochs": train_experts.parse_args([]).epochs / 20,
        "tasks": records,
    }
    (ROOT / "results/benchmark.json").write_text(json.dumps(contents, indent=1) + "\n")


if __name__ == "__main__":
    main()
