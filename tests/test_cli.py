"""The command lines: --help, the commands of the READMEs and of run_all.sh, and how run_all.sh ends."""

import os
import re
import shlex
import stat
import subprocess
import sys

import pytest
from conftest import ROOT, refuses

import common

sys.path.append(str(ROOT / "results"))  # of figure1.py
STAGES = ["train_teacher", "train_experts", "distill", "evaluate"]
README = (ROOT / "README.md").read_text()
OLD = "# old code: git checkout 096dcec\n"  # the first line of a block of commands for an earlier version


def parse(command):
    """(name, options) of a line like "python distill.py --init random"."""
    launcher = r"^(torchrun|python -m torch.distributed.run)( --standalone)? --nproc_per_node \d+"
    python, script, *words = shlex.split(re.sub(launcher, "python", command), comments=True)
    scripts = [*(f"{name}.py" for name in STAGES), "results/figure1.py", "tests/benchmark.py"]
    assert python == "python" and script in scripts, command
    name = script.rpartition("/")[2].removesuffix(".py")
    return name, __import__(name).parse_args(words)


def run_all(*words, **variables):
    env = {**os.environ, "PYTHON": sys.executable, **variables}
    command = ["bash", ROOT / "run_all.sh", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)


def dry_run(*words, **variables):
    """(the finished process, the commands that it prints)."""
    done = run_all(*words, **{"DRY_RUN": "1", "PYTHON": "python", **variables})
    return done, [line[2:] for line in done.stdout.splitlines() if line.startswith("+ ")]


def commands(*words, **variables):
    """The stages' options of a run_all.sh call, as {name: [options of each call]}."""
    done, lines = dry_run(*words, **variables)
    assert done.returncode == 0 and done.stderr == "" and lines, done.stderr
    calls = {}
    for name, options in map(parse, lines):
        calls.setdefault(name, []).append(options)
    return calls


# -- each script ---------------------------------------------------------------------------------------------


def test_defaults_are_the_paper():
    def have(args, **values):
        assert {name: getattr(args, name) for name in values} == values

    teacher, experts, distill, evaluate = every = [__import__(name).parse_args([]) for name in STAGES]
    have(teacher, ssl="barlow_twins", epochs=1000, batch_size=256, lr=0.01, weight_decay=1e-6, target_dim=0)
    have(experts, num_experts=100, batch_size=256, lr=0.1, momentum=0.9, weight_decay=1e-4)
    have(distill, syn_steps=40, expert_epochs=2, max_start_epoch=2, batch_syn=256, inner_momentum=0)
    have(distill, iters=5000, fraction=0.02, init="high_loss", lr_init=0.1, log_lr=False, lr_img=1000)
    have(distill, lr_lr=1e-4, lr_targets=0, momentum=0.5, decay=1, clip_grad=None)
    have(evaluate, epochs=20, lr=0.1, fractions=[0.01, 0.05], seeds=[0, 1, 2])
    assert experts.epochs == distill.max_start_epoch - 1 + distill.expert_epochs
    have(__import__("train_teacher").parse_args(["--ssl", "simclr"]), epochs=400, batch_size=512, lr=1e-3)
    assert {str(args.out_dir) for args in every} == {"runs/cifar10"}


@pytest.mark.parametrize("name", STAGES)
def test_help_and_wrong_options(name, capsys):
    parse_args = __import__(name).parse_args
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    assert stop.value.code == 0 and "Writes:" in capsys.readouterr().out
    for wrong in ("--no_such_option", "--device", "--seeds x" if name == "evaluate" else "--seed x"):
        refuses(lambda wrong=wrong: parse_args(wrong.split()), wrong.split()[0])
    refuses(lambda: common.set_up(parse_args(["--device", "banana"])), "--device banana", "choose cpu")


def test_help_waits_for_no_library_that_it_does_not_need():
    program = f"""import sys
for name in {STAGES}:
    try: __import__(name).parse_args(["--help"])
    except SystemExit: pass
print(*{{"torchvision", "sklearn", "scipy", "PIL", "matplotlib"}} & {{*sys.modules}}, file=sys.stderr)"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.count("Writes:") == 4 and done.stderr.strip() == ""


@pytest.mark.parametrize("name", [*STAGES, "figure1"])
def test_commands_of_the_docstrings_parse(name):
    lines = [line.strip() for line in __import__(name).__doc__.splitlines()]
    found = [parse(line)[0] for line in lines if line.startswith(("python ", "torchrun "))]
    assert found and set(found) == {name}


def commands_of(text):
    """Yields (words, variables) of each command in a README's blocks, without those of an earlier version."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        lines, shell = re.split(r"\n|&&", block.replace("\\\n", " ")), {}
        for line in lines if not block.startswith(OLD) else []:
            for name, value in shell.items():
                line = line.replace(f"${name}", value)
            words, variables = shlex.split(line, comments=True), {}
            while words and re.match(r"[A-Z_]+=", words[0]):
                name, value = words.pop(0).split("=", 1)
                variables[name] = value
            if words:
                yield words, variables
            else:
                shell.update(variables)


def test_commands_of_the_readmes_parse():
    found = set()
    for words, variables in commands_of(README + (ROOT / "results/README.md").read_text()):
        found.add(words[0])
        if words[:3] == ["python", "-m", "pytest"]:
            assert all((ROOT / word).exists() for word in words if word.endswith(".py"))
        elif words[0] in ("python", "torchrun"):
            parse(shlex.join(words))
        elif words[:2] == ["bash", "run_all.sh"]:
            commands(*words[2:], **variables)
    assert {"python", "bash", "torchrun"} <= found


def test_ci_runs_the_readme_command():
    (command,) = re.findall(r"^pip install .*pytest.*$", README, re.MULTILINE)
    assert command in (ROOT / ".ci/run").read_text().splitlines()


# -- what run_all.sh runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", ["0.02", "0.05"])
@pytest.mark.parametrize("preset", ["cifar10", "cifar100", "tinyimagenet"])
def test_presets_are_the_paper(preset, fraction):
    calls, tiny = commands(preset, FRACTION=fraction), preset == "tinyimagenet"
    (teacher,), (experts,), (evaluate,) = (calls[name] for name in STAGES if name != "distill")
    expected = (10, 2, 2, 1e5) if tiny else (40, 2, 2, 1e3) if fraction == "0.02" else (40, 2, 5, 1e4)
    assert [d.name for d in calls["distill"]] == [
        "subset_random", "subset_sas", "subset_high_loss", "mkdt_random", "mkdt_high_loss",
        "subset_random_auto", "best_random"]
    for d in calls["distill"]:
        iters = {"s": 0, "m": 5000, "b": 100}[d.name[0]]
        assert d.fraction == float(fraction) and d.iters == iters
        if d.name.startswith("mkdt"):
            assert (d.syn_steps, d.expert_epochs, d.max_start_epoch, d.lr_img) == expected
            assert experts.epochs == d.max_start_epoch - 1 + d.expert_epochs
    assert len(evaluate.downstream) == 7 and teacher.bt_lambda == (1 / 1024 if tiny else 8 / 1024)
    assert str(teacher.out_dir) == f"runs/{preset}"  # which serves all sizes of sets
    folders = {str(args.out_dir) for args in (experts, *calls["distill"], evaluate)}
    assert folders == {f"runs/{preset}" if fraction == "0.02" else f"runs/{preset}_0.05"}


def test_a_row_says_how_it_is_made():
    """By the paper's options, by raised rates, or by our recipe, in one folder and with the same targets."""
    rows = [f"{way}_random" for way in ("mkdt", "mkdt_raised", "best")]
    calls = commands("cifar10", SETS=" ".join([*rows, "best_sas_7", "subset_random_auto"]))
    found = {d.name: (d.iters, d.syn_steps, d.batch_syn, d.lr_img, d.lr_lr, d.clip_grad, d.inner_momentum,
                      d.log_lr, d.lr_init, d.decay) for d in calls["distill"]}
    ours = 20, 128, 1e4, 0.05, 0.003, 0.9, True, "auto", 0.1
    assert found == {
        "mkdt_random": (5000, 40, 256, 1e3, 1e-4, None, 0, False, 0.1, 1),
        "mkdt_raised_random": (100, 20, 128, 3e4, 0.01, 0.003, 0, False, 0.1, 1),
        "best_random": (100, *ours), "best_sas_7": (7, *ours),
        "subset_random_auto": (0, 40, 256, None, 1e-4, None, 0.9, False, "auto", None)}
    assert {d.init for d in calls["distill"]} == {"random", "sas"}
    assert len({str(args.out_dir) for name in STAGES for args in calls[name]}) == 1
    assert set(__import__("evaluate").ROWS) >= set(rows)


def test_the_default_table():
    """Digits: principal components as targets, and our recipe beside; tables have plain targets."""
    calls, table = commands(), commands("table1", "digits")
    rows = calls["evaluate"][0].sets
    assert {"none", "subset_random", "subset_random_auto", "mkdt_random", "best_random", "full"} < set(rows)
    assert [args.target_dim for args in calls["train_teacher"] + table["train_teacher"]] == [64, 0]
    assert len({str(args.out_dir) for c in (calls, table) for name in STAGES for args in c[name]}) == 2
    assert not [name for name in table["evaluate"][0].sets if "best" in name]


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
        found = evaluate.seeds, evaluate.epochs, len(evaluate.downstream)
        assert found == ([0, 1, 2], 20, 7)
        if table == "appendix_b":
            assert evaluate.protocol in ("finetune_krr_st", "finetune", "finetune_slow")
        assert evaluate.fractions == labels
        assert evaluate.paper == (table if table.startswith("table") else None)
        # Every row has its set, and the paper's rows are among them.
        made = {d.name for d in calls["distill"] if d.out_dir == evaluate.out_dir}
        rows = {row.partition(":")[0] for row in evaluate.sets}
        assert rows - {"none", "full"} == made
        paper = __import__("evaluate").read_paper(table, evaluate.dataset, evaluate.arch)
        assert {row for row, _, _ in paper} <= rows
    if table == "table5":
        assert [(a.arch, a.name) for a in calls["evaluate"]] == [
            ("resnet10", "table5_resnet10"), ("resnet18", "table5_resnet18")]
        assert [d.iters for d in calls["distill"]] == [0, 1000]
    shrunk = commands(table, "rehearse")
    assert {a.dataset for args in shrunk.values() for a in args} == {"digits"}  # no network
    expected = [row.replace(":barlow_twins", ":simclr") for row in calls["evaluate"][0].sets]
    assert shrunk["evaluate"][0].sets == expected and max(d.iters for d in shrunk["distill"]) <= 3


@pytest.mark.parametrize("words", [["digits"], ["digits", "rehearse"], ["cifar10", "rehearse"],
                                   ["table1", "imagefolder", "a b/c/"], ["images", "a b/c"]])
def test_the_stages_of_a_preset_agree(words):
    """On what they read and where, on the student, and on the epochs of experts."""
    calls = commands(*words, **({"DOWNSTREAM": "imagefolder:d"} if "images" in words else {}))
    every = [args for name in STAGES for args in calls[name]]
    assert len({(a.dataset, a.image_size, a.limit, str(a.out_dir)) for a in every}) == 1
    assert len({(a.width, a.depth) for name in STAGES[1:] for a in calls[name]}) == 1
    (experts,), (evaluate,) = calls["train_experts"], calls["evaluate"]
    learnt = [d for d in calls["distill"] if d.iters and d.method == "mkdt"]
    assert all(d.max_start_epoch - 1 + d.expert_epochs <= experts.epochs for d in learnt)
    judges = {"digits": ["digits"], "table1": ["imagefolder:a b/c"], "images": ["imagefolder:d"]}
    assert evaluate.downstream == judges.get(words[0], evaluate.downstream)
    krr_st = [d for d in calls["distill"] if d.method == "krr_st" and words[0] == "table1"]
    assert {(d.iters, d.lr_img, d.pool_size, d.pool_steps) for d in krr_st} <= {(160_000, 1e-4, 10, 1000)}


def test_seeds_and_rows():
    rows = "none subset_high_loss mkdt_random mkdt_sas_70:simclr subset_random_auto "
    rows += "krr_st_random"
    calls = commands("digits", SETS=rows, DISTILL_SEEDS="0 2", SEEDS="5", STUDENT="--width 9")
    assert list(dict.fromkeys((d.name, d.seed) for d in calls["distill"])) == [
        ("subset_high_loss", 0),  # not of the seed
        ("mkdt_random", 0), ("mkdt_random_seed2", 2), ("mkdt_sas_70", 0), ("mkdt_sas_70_seed2", 2),
        ("subset_random_auto", 0), ("subset_random_auto_seed2", 2),
        ("krr_st_random", 0), ("krr_st_random_seed2", 2)]
    assert {(d.init, d.iters) for d in calls["distill"] if "_70" in d.name} == {("sas", 70)}
    assert calls["evaluate"][0].seeds == [5] and calls["evaluate"][0].sets == rows.split()
    assert {a.width for name in STAGES[1:] for a in calls[name]} == {9}
    calls = commands("digits", SETS="subset_high_loss\nmkdt_random", DISTILL_SEEDS="01 2")
    names = {(d.name, d.seed) for d in calls["distill"]}
    assert names == {("subset_high_loss", 0), ("mkdt_random_seed1", 1), ("mkdt_random_seed2", 2)}


def test_a_set_of_ones_own_is_a_row(tmp_path):
    (tmp_path / "digits/sets").mkdir(parents=True)
    (tmp_path / "digits/sets/easy.pt").touch()
    calls = commands("digits", SETS="none easy easy:simclr subset_random", OUT=str(tmp_path))
    assert [d.name for d in calls["distill"]] == ["subset_random"]
    assert calls["evaluate"][0].sets == ["none", "easy", "easy:simclr", "subset_random"]
    out = tmp_path / "my [runs]"  # no pattern
    (tmp_path / "digits").rename(out.mkdir() or out / "digits")
    assert commands("digits", SETS="easy", OUT=str(out), SEEDS=" ")["evaluate"][0].seeds == list(range(10))
    for row in ("hard", "easy:gan"):
        assert is_refused(dry_run("digits", SETS=row, OUT=str(tmp_path))[0]), row


def test_run_all_with_several_processes():
    launcher = "python -m torch.distributed.run --standalone --nproc_per_node 2 "
    for words in (["digits"], ["figure1", "digits"]):
        _, lines = dry_run(*words, PROCESSES="2")
        alone = [line for line in lines if not line.startswith(launcher)]
        one = ("python distill.py ", "python results/figure1.py ")
        assert alone and alone == [line for line in lines if line.startswith(one)]


# -- how run_all.sh ends -------------------------------------------------------------------------------------


def is_refused(done):
    return done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


WRONG = [  # words, variables, and what a script says as it reads its options; "": run_all.sh itself refuses
    *((words, {}, "") for words in (
        "mnist", "imagefolder", "imagefolder /no/folder", "images", f"images {ROOT}", "digits fast", "table8",
        "table1 mnist", "table1 rehearse digits")),
    *(("", {name: value}, said) for said, name, *values in (
        ("", "DISTILL_SEEDS", "a", "99999999999"), ("", "PROCESSES", "two", "0"),
        ("", "SETS", "mkdt", "gan_random", "subset_easy", "mkdt_random_auto", "mkdt_random_0"),
        ("", "SETS", "subset_random_9", "mkdt_random:gan", "best_raised_random", "mkdt_raised"),
        ("", "SETS", "best_random_9999999999"),
        ("", "FRACTION", "abc", "5%", "0,05", "1/20", "-1", "7", ".", "0.0"),
        ("", "DOWNSTREAM", "digits mnist", "digits imagefolder:/no/folder", "images:/tmp", "images"),
        ("", "DISTILL", "--iters 3 --fraction 0.1", "--seed=1", "--iters 3\n--seed\t5"),
        ("", "KRR_ST", "--init sas"), ("", "TEACHER", "--dataset digits"), ("", "STUDENT", "--out_dir=x"),
        ("--seeds", "SEEDS", "0,1", "99999999999"), ("--ssl", "SSL", "byol")) for value in values),
]


@pytest.mark.parametrize("words, variables, said", WRONG)
def test_words_and_variables_that_cannot_be(words, variables, said):
    for_real = words or "DOWNSTREAM" in variables
    for_real = {"DRY_RUN": "", "PYTHON": "true"} if for_real else {"OUT": "/no/folder"}
    done, lines = dry_run(*words.split(), **variables, **for_real)
    if said and done.returncode == 0:
        refuses(lambda: [parse(line) for line in lines], said)
    else:
        assert is_refused(done), done


@pytest.fixture
def stub(tmp_path):
    """stub(script): a program in the place of python, of which the imports cost seconds, or of another."""

    def write(script, name="python"):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return str(path)

    return write


def test_a_table_of_several_data_sets_stays_whole(stub, tmp_path):
    """In a dry run, and where a data set fails that was there before."""
    for name in ("cifar10", "cifar100", "tinyimagenet"):
        (tmp_path / f"{name}_0.05").mkdir()
        (tmp_path / f"{name}_0.05/table4.md").write_text(f"of {name}")
    table = tmp_path / "table4.md"
    assert dry_run("table4", OUT=str(tmp_path))[0].returncode == 0 and not table.exists()
    python = stub('case "$*" in *"dataset cifar100"*) echo error: no >&2; exit 2 ;; esac\n'
                  f'mkdir -p {tmp_path}/cifar10 {tmp_path}/tinyimagenet\n'
                  f'echo same | tee {tmp_path}/cifar10/targets.pt > {tmp_path}/tinyimagenet/targets.pt')
    done = run_all("table4", OUT=str(tmp_path), SETS="none", PYTHON=python)
    assert done.returncode == 2 and done.stderr == "error: no\n"
    assert all(f"of {name}\n" in table.read_text() for name in ("cifar10", "cifar100", "tinyimagenet"))


def test_targets_of_another_folder_stay(stub, tmp_path):
    """Sets of another size have the targets in a folder of their own, where none are overwritten."""
    base, own = tmp_path / "digits/targets.pt", tmp_path / "digits_0.1/targets.pt"
    base.parent.mkdir()
    base.write_text("the teacher's")
    words = dict(OUT=str(tmp_path), FRACTION=".10", SETS="none", PYTHON=stub("exit 0"))
    for _ in range(2):
        assert run_all("digits", **words).returncode == 0 and own.read_text() == "the teacher's"
    own.write_text("one's own")
    assert is_refused(run_all("digits", **words)) and own.read_text() == "one's own"


@pytest.mark.parametrize("stage, status, calls", [
    ("train_teacher.py", 2, 1), ("train_experts.py", 2, 2), ("distill.py", 2, 5), ("evaluate.py", 2, 5),
    ("train_experts.py", 143, 2), ("distill.py", 130, 3), ("evaluate.py", 143, 5)])
def test_a_stage_that_ends(stage, status, calls, stub, tmp_path):
    """By an error: without teacher or experts all ends, else the rest goes on. By a signal: all ends."""
    python = stub(f"echo >> {tmp_path}/calls; [ $1 != {stage} ] || {{ echo error: no >&2; exit {status}; }}")
    done = run_all("digits", OUT=str(tmp_path / "runs"), SETS="subset_random mkdt_random", PYTHON=python)
    assert done.returncode == status and set(done.stderr.splitlines()) == {"error: no"}
    assert (tmp_path / "calls").read_text().count("\n") == calls


def test_names_with_spaces(stub, tmp_path):
    """Of python, and of a folder that judges."""
    (tmp_path / "a b").mkdir()
    stub(f'for word; do echo "$word"; done >> {tmp_path}/words', "a b/python")
    done = run_all("digits", OUT=str(tmp_path / "o"), SETS="none", PYTHON=f"{tmp_path}/a b/python",
                   DOWNSTREAM=f"'imagefolder:{tmp_path}/a b' digits")
    assert done.returncode == 0 and done.stderr == ""
    words = (tmp_path / "words").read_text().splitlines()
    assert words[-3:] == ["--downstream", f"imagefolder:{tmp_path}/a b", "digits"]


def test_other_sizes_of_sets_have_the_same_targets(stub, tmp_path):
    """They are copied once, also where cp -n is an error if the file is there (coreutils 9.2)."""
    stub('for to; do :; done; [ "$1" != -n ] || [ ! -e $to/targets.pt ] || exit 1; exec /bin/cp "$@"', "cp")
    python = stub('while [ "$2" ]; do [ $1 != --out_dir ] || out=$2; shift; done\n'
                  'mkdir -p $out; [ -f $out/targets.pt ] || echo targets > $out/targets.pt')
    variables = {"OUT": f"{tmp_path}/runs", "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": python}
    for _ in range(2):
        done = run_all("digits", SETS="none", FRACTION="0.3", **variables)
        assert done.returncode == 0 and done.stderr == "" and " evaluate.py " in done.stdout
    assert (tmp_path / "runs/digits_0.3/targets.pt").read_text() == "targets\n"


def test_table1_rehearsal(tmp_path, rehearsal, stub):
    """The whole pipeline by its shell script, with every baseline, and a set that cannot be made."""
    first, out = rehearsal
    first.wait()
    stdout, stderr = ((out.parent / name).read_text() for name in ("stdout", "stderr"))
    assert first.returncode == 2 and stderr.count("--lr_img") == 1, stderr
    assert stderr.count("\n") == 2 and "krr_st_random.pt: not found" in stderr  # and no warning
    run, table = out / "digits_plain_rehearsal", out / "table1_digits_rehearsal.md"
    for file in ("teacher.pt", "targets.pt", "experts/0001.pt", "results.jsonl", "sets/mkdt_high_loss.png"):
        assert (run / file).stat().st_size > 0
    text = table.read_text()
    for row in ("no pre-training", "random subset", "SAS subset", "high-loss subset", "MKDT", "full data"):
        assert f"| {row} | 2 | " in text and f"| {row} | " in stdout
    assert "| KRR-ST | 0 | not run | " in text
    os.umask(umask := os.umask(0))
    assert stat.S_IMODE(table.stat().st_mode) == 0o666 & ~umask  # others can read it
    again = run_all("table1", "rehearse", OUT=str(out), SETS="none krr_st_random")
    assert again.returncode == 0, again.stderr
    assert "| KRR-ST | 2 | " in table.read_text()
    # A set that is there with other options stops the run: no table is made of a set that stands for another.
    before = table.read_text(), (run / "table1.md").stat().st_mtime_ns
    refuses = stub('case $1 in distill.py) echo "error: no" >&2; exit 2 ;; esac')
    other = run_all("table1", "rehearse", OUT=str(out), SETS="none subset_random", PYTHON=refuses)
    assert other.returncode == 2 and other.stderr == "error: no\n" and "evaluate.py" not in other.stdout
    assert before == (table.read_text(), (run / "table1.md").stat().st_mtime_ns)
