"""The paper's figure 1 from the files of runs: how much trajectories vary, how well they are matched.

    python results/figure1.py --out_dir runs runs/digits/figure1/kd runs/digits/figure1/simclr

Reads:  RUN/experts/*.pt and the log of train_experts.py --same_init, their data set and targets, and the one
        RUN/distill_*.jsonl that matched them.
Writes: OUT/NAME.md (a table), OUT/NAME.jsonl (its numbers, a curve a line), OUT/NAME.png (with matplotlib)
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch  # noqa: E402

import common  # noqa: E402

TITLES = {"kd": "KD", "supervised": "MTT-SL", "barlow_twins": "MTT-SSL (Barlow Twins)",
          "simclr": "MTT-SSL (SimCLR)"}
PANELS = {  # key of a curve: (title, x)
    "trajectory_variance": ("1a: variance of trajectories", "epoch"),
    "relative_variance": ("relative to the squared distance", "epoch"),
    "matching_loss": ("1b: matching loss", "iteration"),
    "pixel_change": ("1c: mean change of the pixels", "iteration"),
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.HelpFormatter)
    parser.error = common.Parser.error.__get__(parser)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs, a curve each")
    parser.add_argument("--out_dir", type=Path, default=Path("runs"), help="where the figure goes")
    parser.add_argument("--name", default="figure1", help="of the figure and the table")
    return parser.parse_args(argv)


def trajectory_variance(trajectories):
    """How much K trajectories, each (E + 1, P), differ (section 4.1): (variance, relative), E + 1 numbers.

    The variance E||theta - E theta||^2 over the experts at each epoch (divisor K - 1), and the same as a
    share of the mean squared distance travelled, E||theta - theta_0||^2 (None at epoch 0).
    """
    variance, relative = [], []
    for epoch in range(len(trajectories[0])):
        origin = trajectories[0][epoch]  # (P,), near the mean: what all share is taken out before squaring
        mean = sum(trajectory[epoch] - origin for trajectory in trajectories) / len(trajectories)
        squares = [(trajectory[epoch] - origin - mean).square().sum().item() for trajectory in trajectories]
        travelled = statistics.mean((t[epoch] - t[0]).square().sum().item() for t in trajectories)
        variance.append(sum(squares) / (len(trajectories) - 1))
        relative.append(variance[-1] / travelled if travelled else None)
    return variance, relative


def gradient_variance(net, data, images, targets, args, *key, count=32):
    """E||g_B - E g_B||^2 / ||E g_B||^2 at net's weights, g_B the gradient on a mini-batch B (section 4.1).

    Both are unbiased estimates from `count` independent batches: the variance has the divisor count - 1, and
    the squared norm of the mean gradient has variance / count taken off. None where nothing then remains, for
    the gradient cannot be told from noise.
    """
    total, squares = 0.0, 0.0
    for i in range(count):
        order = common.generator("cpu", args.seed, "variance", *key, i)
        batch = torch.randperm(len(images), generator=order)[: args.batch_size]
        x, z = common.fetch(images, batch, args.device), common.fetch(targets, batch, args.device)
        draws = common.generator(args.device, args.seed, "variance", "views", *key, i)
        common.seed_dropout(args.device, args.seed, "variance", "dropout", *key, i)
        loss = common.student_loss(args.objective, net, x, z, data, draws)
        g = torch.autograd.grad(loss, list(net.parameters()), materialize_grads=True)
        g = torch.cat([part.flatten() for part in g])
        total, squares = total + g, squares + g.square().sum().item()
    of_mean = (total / count).square().sum().item()
    variance = (squares - count * of_mean) / (count - 1)
    signal = of_mean - variance / count
    return variance / signal if signal > 0 else None


def start_and_end(run, trajectory):
    """gradient_variance at the first and the last weights of an expert (E + 1, P), on its run's images."""
    begin = next(r for r in common.read_records(run / "train_experts.jsonl") if "options" in r)
    args = argparse.Namespace(**{**begin["options"], "out_dir": run})
    data, targets, _ = common.load_targets(args, args.objective)
    channels, size = data.images.shape[1:3]
    net = common.make_student(args.out_dim or targets.shape[1], size, channels, args.width, args.depth)
    net, variances = net.to(args.device), []
    for where in ("start", "end"):
        weights = trajectory[0 if where == "start" else -1]
        torch.nn.utils.vector_to_parameters(weights.to(args.device), net.parameters())
        variances.append(gradient_variance(net, data, data.images, targets, args, 0, where))
    return variances


def read_curve(run):
    """{curve: title, experts: K, gradient_variance, and a list for each of PANELS} of a run's folder."""
    keys = {"trajectory": 2, "options": None}
    paths = sorted(run.glob("experts/*.pt"))
    experts = [common.load(path, keys, "train_experts.py", mmap=True) for path in paths]
    made = [expert["options"].get("train_experts", {}) for expert in experts]
    if len(experts) < 2 or not all(m == made[0] and m.get("same_init") for m in made):
        raise common.Problem(f"{run}: wants two experts or more of train_experts.py --same_init, made alike")
    logs = [common.read_records(path) for path in run.glob("distill_*.jsonl")]
    matched = [log for log in logs if any("matching_loss" in record for record in log)]
    if len(matched) != 1:
        raise common.Problem(f"{run}: has {len(matched)} matched sets of distill.py; leave one there")
    begins = max((i for i, record in enumerate(matched[0]) if record.get("step") == 0), default=0)
    steps = [record for record in matched[0][begins:] if "matching_loss" in record]
    if not steps:
        raise common.Problem(f"{run}: its set is not finished; give the command of distill.py again")
    variance, relative = trajectory_variance([expert["trajectory"] for expert in experts])
    return {
        "curve": f"{TITLES.get(made[0]['objective'], made[0]['objective'])}, batch {made[0]['batch_size']}",
        "experts": len(experts),
        "gradient_variance": start_and_end(run, experts[0]["trajectory"]),
        "trajectory_variance": variance,
        "relative_variance": relative,
        **{key: [step[key] for step in steps] for key in ("matching_loss", "pixel_change")},
    }


def make_table(curves):
    """A table in markdown; trajectories are compared at the last epoch that all curves have."""
    epoch = min(len(curve["trajectory_variance"]) for curve in curves) - 1
    heads = ["curve", "K", "gradient's variance: start", "end", f"trajectories' variance: epoch {epoch}",
             "relative", "matching loss: first", "last ten", "pixels moved"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for c in curves:
        numbers = [*c["gradient_variance"], c["trajectory_variance"][epoch], c["relative_variance"][epoch],
                   c["matching_loss"][0], statistics.mean(c["matching_loss"][-10:]), c["pixel_change"][-1]]
        texts = ["" if number is None else f"{number:.3g}" for number in numbers]
        lines.append(f"| {' | '.join([c['curve'], str(c['experts']), *texts])} |")
    return "\n".join(lines) + "\n"


def save_figure(path, curves):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(19, 4), layout="constrained")
    for panel, (key, (title, x)) in zip(figure.subplots(1, len(PANELS)), PANELS.items()):
        for curve in curves:
            values = [value or float("nan") for value in curve[key]]  # no logarithm of 0, at epoch 0
            first = 1 if x == "iteration" else 0
            panel.plot(range(first, len(values) + first), values, label=curve["curve"])
        panel.set(title=title, xlabel=x, yscale="log" if x == "epoch" else "linear")
    figure.axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    with common.replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def main(args):
    curves = [read_curve(run) for run in args.runs]
    path, table = args.out_dir / f"{args.name}.md", make_table(curves)
    for suffix, text in ((".md", table), (".jsonl", "".join(json.dumps(curve) + "\n" for curve in curves))):
        with common.replacing(path.with_suffix(suffix)) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"{table}wrote {path} and .jsonl", flush=True)
    try:
        save_figure(path.with_suffix(".png"), curves)
    except Exception as error:  # whatever is wrong with matplotlib: the table is there
        print(f"{path.with_suffix('.png')} is left out; it needs matplotlib, to be had by pip ({error})")


if __name__ == "__main__":
    common.run(main, parse_args)
