"""The command lines: --help, the commands of the README and of run_all.sh, and run_all.sh itself."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ["train_teacher", "train_experts", "distill", "evaluate"]
README = (ROOT / "README.md").read_text()


def parse(command):
    """The options of a line like "python distill.py --init random", or SystemExit."""
    command = re.sub(r"^torchrun (--standalone )?--nproc_per_node \d+", "python", command)
    words = shlex.split(command, comments=True)
    name = words[1].removesuffix(".py").removeprefix("tests/")
    assert words[0] == "python" and name in [*STAGES, "benchmark"], command
    return __import__(name).parse_args(words[2:])


def run_all(*words, **variables):
    return subprocess.run(
        ["bash", str(ROOT / "run_all.sh"), *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, **variables},
    )


def commands(*words, **variables):
    """The stages' options of a run_all.sh call, as {script: [options of each call]}."""
    done = run_all(*words, DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    calls = {}
    for line in done.stdout.splitlines():
        assert line.startswith(("+ python ", "+ torchrun "))
        name = re.search(r"(\w+)\.py", line)[1]
        calls.setdefault(name, []).append(parse(line[2:]))
    assert list(calls) == STAGES
    return calls


def test_defaults_are_the_paper():
    teacher, experts, distill, evaluate = (__import__(s).parse_args([]) for s in STAGES)
    assert (teacher.ssl, teacher.batch_size, teacher.lr, teacher.weight_decay) == (
        "barlow_twins",
        256,
        0.01,
        1e-6,
    )
    assert (experts.num_experts, experts.lr, experts.momentum, experts.weight_decay) == (100, 0.1, 0.9, 1e-4)
    assert experts.batch_size == 256 and experts.epochs == distill.max_start_epoch - 1 + distill.expert_epochs
    assert (distill.syn_steps, distill.expert_epochs, distill.max_start_epoch, distill.lr_img) == (
        40,
        2,
        2,
        1000,
    )
    assert (distill.iters, distill.fraction, distill.init, distill.lr_init) == (5000, 0.02, "high_loss", 0.1)
    assert (distill.lr_lr, distill.lr_targets, distill.momentum, distill.batch_syn) == (1e-4, 0, 0.5, 256)
    assert (evaluate.epochs, evaluate.lr, evaluate.fractions, evaluate.seeds) == (
        20,
        0.1,
        [0.01, 0.05],
        [0, 1, 2],
    )
    simclr = __import__("train_teacher").parse_args(["--ssl", "simclr"])
    assert (simclr.epochs, simclr.batch_size, simclr.lr) == (400, 512, 1e-3)
    assert all(str(a.out_dir) == "runs/cifar10" for a in (teacher, experts, distill, evaluate))


@pytest.mark.parametrize("name", STAGES)
def test_help_and_wrong_options(name, capsys):
    module = __import__(name)
    with pytest.raises(SystemExit) as stop:
        module.parse_args(["--help"])
    assert stop.value.code == 0 and "Writes:" in capsys.readouterr().out
    for wrong in (["--no_such_option"], ["--device"], ["--seed" if name != "evaluate" else "--seeds", "x"]):
        with pytest.raises(SystemExit) as stop:
            module.parse_args(wrong)
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1


@pytest.mark.parametrize("name", STAGES)
def test_commands_of_the_docstrings_parse(name):
    lines = [line.strip() for line in __import__(name).__doc__.splitlines()]
    commands = [line for line in lines if line.startswith(("python ", "torchrun "))]
    assert commands
    for command in commands:
        parse(command)


@pytest.mark.parametrize("name", STAGES)
def test_a_device_that_is_not_there(name, capsys):
    with pytest.raises(SystemExit) as stop:
        __import__(name).parse_args(["--device", "banana"])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "--device" in message and message.count("\n") == 1


def test_our_recipe(capsys):
    """It sets the options that are not given, and its rows never carry the paper's names."""
    parse_args = __import__("distill").parse_args
    ours = parse_args(["--recipe", "best", "--lr_img", "7"])
    assert (ours.name, ours.init, ours.lr_img, ours.lr_init) == ("best_random", "random", 7, 1)
    assert ours.log_lr and not parse_args([]).log_lr and parse_args([]).name == "mkdt_high_loss"
    assert vars(parse_args(["--recipe", "paper"])) == vars(parse_args([]))
    for wrong in (["--recipe", "best", "--method", "krr_st"], ["--recipe", "worst"]):
        with pytest.raises(SystemExit) as stop:
            parse_args(wrong)
        assert stop.value.code == 2 and "--recipe" in capsys.readouterr().err
    calls = commands("cifar10", RECIPE="best")
    (teacher,) = calls["train_teacher"]
    (evaluate,) = calls["evaluate"]
    assert teacher.centre and str(teacher.out_dir) == "runs/cifar10_best"
    assert not commands("cifar10")["train_teacher"][0].centre
    assert not [name for name in evaluate.sets if "mkdt" in name]
    assert {"best_random", "best_high_loss", "subset_random_lr_from_best_random"} <= set(evaluate.sets)
    assert {d.name for d in calls["distill"]} == set(evaluate.sets) - {"none", "full"}
    assert "RECIPE" in run_all("digits", RECIPE="worst", DRY_RUN="1").stderr


def test_presets_are_the_paper():
    for preset, fraction, expected in [
        ("cifar10", "0.02", (40, 2, 2, 1e3)), ("cifar10", "0.05", (40, 2, 5, 1e4)),
        ("cifar100", "0.02", (40, 2, 2, 1e3)), ("cifar100", "0.05", (40, 2, 5, 1e4)),
        ("tinyimagenet", "0.02", (10, 2, 2, 1e5)), ("tinyimagenet", "0.05", (10, 2, 2, 1e5)),
    ]:  # fmt: skip
        calls = commands(preset, FRACTION=fraction)
        (experts,) = calls["train_experts"]
        assert [d.name for d in calls["distill"]] == [
            "subset_random",
            "subset_sas",
            "subset_high_loss",
            "mkdt_random",
            "mkdt_high_loss",
            "subset_random_lr_from_mkdt_random",
            "subset_high_loss_lr_from_mkdt_high_loss",
        ]
        for d in calls["distill"]:
            assert (d.syn_steps, d.expert_epochs, d.max_start_epoch) == expected[:3]
            assert d.lr_img == expected[3] or not d.iters  # a subset's pixels are not learnt
            assert d.fraction == float(fraction) and d.iters == (0 if d.name.startswith("subset") else 5000)
            assert experts.epochs == d.max_start_epoch - 1 + d.expert_epochs
        assert len(calls["evaluate"][0].downstream) == 7
        assert calls["train_teacher"][0].bt_lambda == (1 / 1024 if preset == "tinyimagenet" else 8 / 1024)


TABLES = {  # table: (data sets, fraction of the set, SSL of the teacher, labelled fractions)
    "table1": (["cifar10"], 0.02, "barlow_twins", [0.01, 0.05]),
    "table2": (["cifar100"], 0.02, "barlow_twins", [0.01, 0.05]),
    "table3": (["tinyimagenet"], 0.02, "barlow_twins", [0.01, 0.05]),
    "table4": (["cifar10", "cifar100", "tinyimagenet"], 0.05, "barlow_twins", [0.01, 0.05]),
    "table5": (["cifar100"], 0.05, "barlow_twins", [0.05]),
    "table6": (["cifar10", "cifar100"], 0.02, "simclr", [0.01, 0.05]),
    "table7": (["cifar10", "cifar100", "tinyimagenet"], 0.02, "barlow_twins", [0.1, 0.5]),
    "appendix_b": (["cifar100"], 0.02, "barlow_twins", [1.0]),
}


@pytest.mark.parametrize("table", TABLES)
def test_tables_are_the_paper(table):
    datasets, fraction, ssl, labels = TABLES[table]
    calls = commands(table)
    assert [a.dataset for a in calls["train_teacher"]] == datasets
    assert {a.ssl for a in calls["train_teacher"]} == {ssl}
    assert {d.fraction for d in calls["distill"]} == {fraction}
    for evaluate in calls["evaluate"]:
        assert evaluate.fractions == labels and evaluate.seeds == [0, 1, 2] and len(evaluate.downstream) == 7
        assert evaluate.label_draw == "uniform" and evaluate.epochs == 20
        assert evaluate.paper == (table if table.startswith("table") else None)
        # Every row has its set, and the paper's rows are among them.
        made = {d.name for d in calls["distill"] if d.out_dir == evaluate.out_dir}
        rows = {row.partition(":")[0] for row in evaluate.sets}
        assert rows - {"none", "full"} == made
        paper = __import__("evaluate").read_paper(table, evaluate.dataset, evaluate.arch)
        assert {row for _, row, _, _ in paper} <= rows
    if table == "table5":
        archs = [(a.arch, a.norm, a.name) for a in calls["evaluate"]]
        assert archs[0] == ("resnet10", "batch", "table5_resnet10_batch") and len(set(archs)) == 4
        assert [d.iters for d in calls["distill"]] == [0, 1000]
    if table == "appendix_b":
        assert [a.protocol for a in calls["evaluate"]] == ["finetune_krr_st", "finetune", "finetune_slow"]
    shrunk = commands(table, "rehearse")
    assert {a.dataset for args in shrunk.values() for a in args} == {"digits"}  # no network
    assert [a.sets for a in shrunk["evaluate"]][0] == [
        row.replace(":barlow_twins", ":simclr") for row in calls["evaluate"][0].sets
    ]
    assert max(d.iters for d in shrunk["distill"]) <= 3


def test_table_of_ones_own_images():
    calls = commands("table1", "imagefolder", "a b/c")
    assert calls["evaluate"][0].downstream == ["imagefolder:a b/c"] and calls["evaluate"][0].paper == "table1"
    krr_st = [d for d in calls["distill"] if d.method == "krr_st"]
    assert [(d.iters, d.lr_img, d.pool_size, d.pool_steps) for d in krr_st] == [(160_000, 1e-4, 10, 1000)]


def test_seeds_and_rows():
    rows = (
        "none subset_high_loss mkdt_random mkdt_sas_70:simclr subset_random_lr_from_mkdt_random krr_st_random"
    )
    calls = commands("digits", SETS=rows, DISTILL_SEEDS="0 2", SEEDS="5", STUDENT="--width 9")
    assert [(d.name, d.seed) for d in calls["distill"]] == [
        ("subset_high_loss", 0),  # not of the seed
        ("mkdt_random", 0), ("mkdt_random_seed2", 2), ("mkdt_sas_70", 0), ("mkdt_sas_70_seed2", 2),
        ("krr_st_random", 0), ("krr_st_random_seed2", 2),
        ("subset_random_lr_from_mkdt_random", 0), ("subset_random_lr_from_mkdt_random_seed2", 2),
    ]  # fmt: skip
    assert [d.lr_from for d in calls["distill"][-2:]] == ["mkdt_random", "mkdt_random_seed2"]
    assert calls["distill"][3].iters == 70
    calls = commands("digits", SETS="subset_high_loss\nmkdt_random", DISTILL_SEEDS="01 2", FRACTION="0.050")
    names = [d.name for d in calls["distill"]]
    assert names == ["subset_high_loss", "mkdt_random_seed1", "mkdt_random_seed2"]
    assert {str(d.out_dir) for d in calls["distill"]} == {"runs/digits"}
    calls = commands("digits", SETS=rows, DISTILL_SEEDS="0 2", SEEDS="5", STUDENT="--width 9")
    assert calls["evaluate"][0].seeds == [5] and calls["evaluate"][0].sets == rows.split()
    assert {a.width for name in STAGES[1:] for a in calls[name]} == {9}


def test_run_all_with_several_processes():
    for distill, launcher in (("", "python"), ("--segments 2", "torchrun --standalone --nproc_per_node 2")):
        done = run_all("digits", DRY_RUN="1", PROCESSES="2", DISTILL=distill)
        lines = [line for line in done.stdout.splitlines() if "distill.py" in line]
        assert lines and all(line.startswith(f"+ {launcher} distill.py") for line in lines)
        assert done.stdout.startswith("+ torchrun --standalone --nproc_per_node 2 train_teacher.py")


@pytest.mark.parametrize("size, rank", [("x", "0"), ("0", "0"), ("2", "2"), ("-1", "0")])
def test_an_environment_that_makes_no_sense(size, rank, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(SystemExit) as stop:
        __import__("distill").parse_args([])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and f"WORLD_SIZE={size}" in message and message.count("\n") == 1


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_run_all_passes_signals_on(number, status, tmp_path):
    """A signal to run_all.sh alone ends the stage, which may write a checkpoint, and then run_all.sh."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\ntrap 'sleep 0.3; echo written > $DIR/checkpoint; exit 143' TERM\n"
        "echo > $DIR/started\nwhile :; do sleep 0.05; done\n"
    )
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python), "DIR": str(tmp_path), "OUT": str(tmp_path / "runs")}

    def heard():  # in the background of a shell, as by nohup, Ctrl-C would be ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    words = ["bash", ROOT / "run_all.sh"]
    with subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, preexec_fn=heard) as run:
        try:
            while not (tmp_path / "started").exists():
                time.sleep(0.02)
            run.send_signal(number)
            assert run.wait(20) == status and (tmp_path / "checkpoint").exists()
        finally:
            run.kill()


def test_run_all_refuses():
    calls = [(["mnist"], {}), (["imagefolder"], {}), (["imagefolder", ""], {}), (["digits", "fast"], {})]
    calls += [(["table8"], {}), (["table1", "mnist"], {}), (["table1", "rehearse", "digits"], {})]
    calls += [([], {"FRACTION": f}) for f in ("abc", "5%", "0,05", "1/20", "-1")]
    calls += [([], {"SEEDS": "0,1"}), ([], {"DISTILL_SEEDS": "a"}), ([], {"SEEDS": "99999999999"})]
    calls += [([], {"DOWNSTREAM": "digits mnist"}), ([], {"FRACTION": "0.0"})]
    calls += [([], {"PROCESSES": "two"}), ([], {"PROCESSES": "0"})]
    calls += [([], {"OUT": __file__}), ([], {"PYTHON": "/no/python"}), ([], {"SSL": "byol"})]
    calls += [([], {"SETS": s}) for s in ("mkdt", "gan_random", "mkdt_random:gan", "none:kd", "subset_easy")]
    for words, variables in calls:
        done = run_all(*words, **variables)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words", [["digits"], ["digits", "rehearse"], ["cifar10", "rehearse"], ["imagefolder", "a b/c/"]]
)
def test_every_preset_parses(words):
    calls = commands(*words)
    data = {(a.dataset, a.image_size, a.limit, str(a.out_dir)) for args in calls.values() for a in args}
    assert len(data) == 1  # the stages agree on what they read and where
    students = {(a.width, a.depth) for name in STAGES[1:] for a in calls[name]}
    assert len(students) == 1
    assert all(
        a.max_start_epoch - 1 + a.expert_epochs <= calls["train_experts"][0].epochs
        for a in calls["distill"]
        if a.iters
    )


def test_every_command_of_the_readme_parses():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines = [part.strip() for line in lines for part in line.split("&&")]
    found, shell = {"python": 0, "bash": 0, "torchrun": 0}, {}
    for line in lines:
        line = re.sub(r"\$([A-Z]+)\b", lambda match: shell.get(match[1], match[0]), line)
        words = shlex.split(line, comments=True)
        variables = {}
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        if not words:
            shell.update(variables)
        if words[:3] == ["python", "-m", "pytest"]:
            assert all((ROOT / word).exists() for word in words if word.endswith(".py"))
        elif words[:1] in (["python"], ["torchrun"]) and any(word.endswith(".py") for word in words):
            parse(shlex.join(words))
            found[words[0]] += 1
        elif words[:2] == ["bash", "run_all.sh"]:
            commands(*words[2:], **variables)
            found["bash"] += 1
    assert found["python"] >= 4 and found["bash"] >= 5 and found["torchrun"] >= 1


def test_ci_runs_the_readme_command():
    (command,) = re.findall(r"^pip install .*pytest.*$", README, re.MULTILINE)
    assert command in (ROOT / ".ci/run").read_text().splitlines()


def test_table1_rehearsal(tmp_path, rehearsal):
    """The whole pipeline by its shell script, with every baseline, and a set that cannot be made."""
    first, out = rehearsal
    first.wait()
    stdout, stderr = ((out.parent / name).read_text() for name in ("stdout", "stderr"))
    assert first.returncode == 2 and stderr.count("--lr_img") == 1, stderr
    run = out / "digits_rehearsal"
    for file in ("teacher.pt", "targets.pt", "experts/0001.pt", "results.jsonl", "sets/mkdt_high_loss.png"):
        assert (run / file).stat().st_size > 0
    table = (out / "table1_rehearsal.md").read_text()
    for row in ("no pre-training", "random subset", "SAS subset", "high-loss subset", "MKDT", "full data"):
        assert f"| {row} | 2 | " in table and f"| {row} | " in stdout
    assert "| KRR-ST | 0 | not run | " in table
    again = run_all("table1", "rehearse", OUT=str(out), SETS="none krr_st_random")
    assert again.returncode == 0, again.stderr
    assert "| KRR-ST | 2 | " in (out / "table1_rehearsal.md").read_text()
    # A set that is there with other options stops the run: no table is made of a set that stands for another.
    before = (out / "table1_rehearsal.md").read_text(), (run / "table1.md").stat().st_mtime_ns
    # In the place of python, for it costs seconds of imports less, something that as distill.py refuses.
    refuses = tmp_path / "python"
    refuses.write_text('#!/bin/sh\ncase $1 in distill.py) echo "error: no" >&2; exit 2 ;; esac\n')
    refuses.chmod(0o755)
    other = run_all("table1", "rehearse", OUT=str(out), SETS="none subset_random", PYTHON=str(refuses))
    assert other.returncode == 2 and other.stderr == "error: no\n" and "evaluate.py" not in other.stdout
    assert before == ((out / "table1_rehearsal.md").read_text(), (run / "table1.md").stat().st_mtime_ns)
