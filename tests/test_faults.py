"""What can go wrong: broken and hostile files, disks, options, divergence, memory. One line, exit status 2,
and everything on disk as it was."""

import ctypes
import fcntl
import gc
import io
import math
import os
import pickle
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import DISTILL, EVALUATE, EXPERTS, ROOT, TEACHER, refuses, run_stage, start

import common

pytestmark = pytest.mark.filterwarnings("ignore:(Validating sparse|Detected pickle):UserWarning")


def snapshot(folder):
    """{path: lines} of all files in a folder; of logs without the starts, of results without the failures."""
    found = {p: p.read_bytes().splitlines() for p in folder.rglob("*") if p.is_file()}
    for path in folder.glob("*.jsonl"):
        passing = b'{"command":', b'"accuracy": null'
        found[path] = [line for line in found[path] if not any(words in line for words in passing)]
    return {path: lines for path, lines in found.items() if lines or path.suffix != ".jsonl"}


@pytest.fixture
def run(capsys):
    """run("distill", [...], folder): the stage; what evaluate.py says of a cell is a Problem here, too."""

    def run(name, argv, folder):
        if name == "evaluate":  # a run before that failed may still have its log
            gc.collect()
        try:
            run_stage(name, [*argv, "--out_dir", folder])
        except SystemExit as end:
            message = capsys.readouterr().err
            assert end.code == 2 and message.startswith("error: ") and message.count("\n") == 1, message
            raise common.Problem(message) from None

    gc.freeze()  # or it would take long
    yield run
    gc.unfreeze()


def refused_process(name, argv, prepare=lambda: None, lines=1):
    """The stage in a process of its own ends with exit status 2 and a line on stderr, which is returned."""
    read, write = os.pipe()  # a limit on the size of files is none on a pipe's
    process = start(name, argv, f"/dev/fd/{write}", prepare)
    os.close(write)
    with os.fdopen(read) as pipe:
        message = pipe.read()
    process.join()
    assert process.exitcode == 2 and 1 <= message.count("\n") <= lines, message
    assert all(line.startswith("error: ") for line in message.splitlines()), message
    return message


# ---- Files -------------------------------------------------------------------------------------------------


def packed(contents):
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getvalue()


def changed(contents, path, value):
    """contents with another value at path, a tuple of keys; value None: without it."""
    value = changed(contents[path[0]], path[1:], value) if len(path) > 1 else value
    contents = {**contents, path[0]: value}
    return contents if value is not None else {key: contents[key] for key in contents if key != path[0]}


def damaged(data):
    """{what: bytes} of a file's bytes that were cut, or had a bit turned where it counts."""
    draws, ends = random.Random(0), [0, 1, *(len(data) * i // 50 for i in (1, 5, 12, 25, 37, 45, 49)), -1]
    found = {f"cut at {end}": data[:end] for end in ends}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = archive.infolist()
        for info in draws.sample(parts, min(12, len(parts))):
            if info.file_size and not info.filename.endswith((".format_version", "serialization_id")):
                lengths = data[info.header_offset + 26 : info.header_offset + 30]  # of name and extra field
                begin = info.header_offset + 30 + lengths[0] + lengths[2] + 256 * (lengths[1] + lengths[3])
                turned = bytearray(data)
                turned[begin + draws.randrange(info.file_size)] ^= 1 << draws.randrange(8)
                found[f"a bit of {info.filename} turned"] = bytes(turned)
    for head in (b"PK\x01\x02", b"PK\x05\x06", b"PK\x03\x04"):  # of the directory, of the end, of the parts
        found[f"{head} overwritten"] = data.replace(head, b"PK\x01\x03")
    found["zeros in the middle"] = data[: len(data) // 2] + bytes(200) + data[len(data) // 2 + 200 :]
    return {**found, "random": draws.randbytes(len(data))}


def foreign(witness):
    """{what: bytes} of files of other kinds, some with code in them that would make the file witness."""

    class Code:  # runs when it is unpickled
        def __reduce__(self):
            return os.system, (f"touch {witness}",)

    array, archive = io.BytesIO(), io.BytesIO()
    np.savez(array, images=np.zeros(3))
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("hello.txt", "hello")
    return {
        "text": b"hello\n", "JSON": b'{"images": [1, 2]}', "HTML": b"<!DOCTYPE html><html></html>",
        "PNG": b"\x89PNG\r\n\x1a\n" + bytes(50), "numpy": array.getvalue(), "zip": archive.getvalue(),
        "a plain pickle": pickle.dumps({"images": 1}), "a pickle with code": pickle.dumps(Code()),
        "code": packed({"images": Code(), "step": 1}), "code alone": packed(Code()),
        "a module": packed(torch.nn.Linear(2, 2)), "a list": packed([1, 2]),
        "a tensor": packed(torch.zeros(3)), "nothing": packed({}), "None": packed(None),
    }


def mistaken(contents, path):
    """{what: bytes} of the right kind of file with wrong contents; path: the keys of a tensor in it."""
    tensor = contents
    for name in path:
        tensor = tensor[name]
    wrong = {"missing": None, "text": "x", "empty": tensor.view(-1)[:0], "a dict": {}, "a number": 1.0}
    wrong |= {"without values": torch.empty(3, device="meta"), "sparse": tensor.to_sparse()}
    found = [(path, what, value) for what, value in wrong.items()]
    if "step" in contents:  # a checkpoint
        found += [((name,), "missing", None) for name in ("step", "log_size", *path[:1])]
        found += [(("step",), "text", "x"), (("step",), "a list", [1]), ((path[0],), "a list", [1])]
        found += [(("optimizer",), what, value) for what, value in {"a list": [1], "empty": {}}.items()]
    else:
        for value in (math.nan, math.inf):
            spoiled = tensor.clone()
            spoiled.view(-1)[-1] = value
            found.append((path, value, spoiled))
        ids = ["images_id"] + ["targets_id"] * ("images" not in contents)  # a set's: by "full"
        found += [((name,), what, value) for name in ids for what, value in
                  {"another": "0123456789abcdef", "a tensor": torch.zeros(1), "a number": 3}.items()]
        found += [(("lr",), value, value) for value in (0, -1.0, math.nan, "x", True)]
        found += [(path, "nothing in it", tensor[:, :0])] if tensor.ndim == 2 else []
    found += [(("options",), "a list", [1]), (("options",), "tensors", {"x": {"y": torch.ones(2)}})]
    known = [(keys, what, value) for keys, what, value in found if keys[0] in contents]
    return {f"{'.'.join(k)}: {what}": packed(changed(contents, k, value)) for k, what, value in known}


EXPERT = [*EXPERTS, "--first_expert", "1", "--num_experts", "1"]
MKDT = [*DISTILL, "--init", "random", "--iters", "1"]
SETS = [*EVALUATE, "--sets", "mkdt_random", "--seeds", "0"]
KINDS = {  # file: (stage that reads it, its options, files that are not there, a tensor in it that counts)
    "targets.pt": ("train_experts", EXPERT, ["experts/0001.pt"], ("targets",)),
    "teacher.pt": ("train_teacher", TEACHER, ["targets.pt"], ("encoder", "conv1.weight")),
    "experts/0001.pt": ("distill", [*MKDT, "--name", "new"], [], ("trajectory",)),
    "sets/mkdt_random.pt": ("evaluate", SETS, ["results.jsonl"], ("images",)),
    "train_teacher.checkpoint": (
        "train_teacher", TEACHER, ["teacher.pt", "targets.pt"], ("net", "0.conv1.weight")),
    "experts/0001.checkpoint": ("train_experts", EXPERT, ["experts/0001.pt"], ("net", "head.bias")),
    "sets/mkdt_random.checkpoint": ("distill", MKDT, ["sets/mkdt_random.pt"], ("syn", "images")),
    "evaluate_convnet_mkdt_random_kd_0_None.checkpoint": (
        "evaluate", SETS, ["results.jsonl", "results.md"], ("net", "head.bias")),
}
CHECKPOINTS = {kind[0]: file for file, kind in KINDS.items() if file.endswith(".checkpoint")}
LOGS = {"train_teacher": "train_teacher", "train_experts": "train_experts_1",
        "distill": "distill_mkdt_random", "evaluate": "evaluate"}


@pytest.fixture
def unmade(copy, run, monkeypatch):
    """unmade(file): (the options of its stage, its path, the path of what the stage makes, not there now).

    killed: a checkpoint is there as if the stage had been killed.
    """

    def unmade(file, killed=False):
        name, options, missing, _ = KINDS[file]
        unlink = Path.unlink
        for again in (killed, False):
            for path in missing:
                (copy / path).unlink(missing_ok=True)
            if again:
                with monkeypatch.context() as patch:
                    patch.setattr(Path, "unlink", lambda p, **k: p.suffix == ".checkpoint" or unlink(p, **k))
                    run(name, options, copy)
        return [*options], copy / file, copy / (missing or ["-"])[0]

    monkeypatch.setattr("evaluate.write_tables", lambda *words: None)  # which show what failed
    return unmade


@pytest.mark.parametrize("file", KINDS)
def test_broken_hostile_and_mistaken_files(file, copy, run, unmade, tmp_path):
    """At least 30 ways to spoil a file: none is taken, none runs code or changes anything on disk."""
    others = {p: (copy / p).read_bytes() for p in KINDS if p.endswith(".pt") and p != file}
    name, witness = KINDS[file][0], tmp_path / "witness"
    argv, path, _ = unmade(file, killed=file.endswith(".checkpoint"))
    data = path.read_bytes()
    contents = torch.load(io.BytesIO(data), weights_only=True)
    tried = {**damaged(data), **foreign(witness), **mistaken(contents, KINDS[file][3]), **others}
    assert len(tried) >= 30
    for what, wrong in tried.items():
        path.write_bytes(wrong)
        before = snapshot(copy)
        refuses(lambda: run(name, argv, copy), path, what=what)
        assert snapshot(copy) == before and not witness.exists(), what
    print(f"{file}: {len(tried)} mutilations refused")
    path.write_bytes(data)
    run(name, argv, copy)  # and the right one is taken


def test_other_peoples_files_and_what_is_no_file(copy, run, tmp_path):
    witness, new = tmp_path / "witness", tmp_path / "new"
    path = new / "teacher.pt"
    new.mkdir()
    for what, wrong in foreign(witness).items():
        path.write_bytes(wrong)
        refuses(lambda: run("train_teacher", TEACHER, new), path, what=what)
    assert not witness.exists() and not (new / "targets.pt").exists()
    os.mkfifo(copy / "sets/fifo.pt")
    refuses(lambda: run("evaluate", [*EVALUATE, "--sets", "fifo"], copy), "fifo.pt", "is not a file")
    path.write_text("precious")
    (copy / "sets/new.pt.tmp").symlink_to(path)
    run("distill", [*MKDT, "--name", "new"], copy)
    assert path.read_text() == "precious" and not (copy / "sets/new.pt").is_symlink()


@pytest.mark.parametrize("name, option, value", [
    ("train_teacher", "--lr", "0.02"), ("train_experts", "--momentum", "0.5"),
    ("distill", "--lr_img", "11.0"), ("evaluate", "--momentum", "0.5")])
def test_the_wrong_checkpoint(name, option, value, copy, run, capsys, unmade):
    """It says which option differs, then and now; what does not count may differ."""
    argv, path, _ = unmade(CHECKPOINTS[name], killed=True)
    for expert in copy.glob("experts/*.pt") if name == "train_experts" else ():
        expert.unlink()  # those of a folder are all alike
    before, data, words = snapshot(copy), path.read_bytes(), (f"now {option} {value}", "remove it")
    message = refuses(lambda: run(name, [*argv, option, value], copy), path, *words)
    assert message.count(f"{option} ") == 2 and snapshot(copy) == before
    capsys.readouterr()
    run(name, [*argv, "--checkpoint_minutes", "7", "--threads", "1", "--device", "cpu"], copy)
    assert "going on from" in capsys.readouterr().out and not path.exists()
    unmade(CHECKPOINTS[name])
    path.write_bytes(data)
    path.unlink()
    run(name, [*argv, option, value], copy)
    assert "going on" not in capsys.readouterr().out and not path.exists()


def test_other_experts_are_another_run(copy, run, unmade):
    argv, path, _ = unmade("sets/mkdt_random.checkpoint", killed=True)
    (copy / "experts/0003.pt").write_bytes((copy / "experts/0000.pt").read_bytes())
    refuses(lambda: run("distill", argv, copy), path, "max_experts 3", "max_experts 4")
    (copy / "experts/0003.pt").replace(copy / "experts/0000.pt")
    (copy / "experts/0001.pt").replace(copy / "experts/0002.pt")
    shutil.copy(copy / "experts/0002.pt", copy / "experts/0001.pt")
    refuses(lambda: run("distill", argv, copy), path, "other experts than those there now")


def test_a_teacher_under_way_stays_beside_another(copy, run, unmade):
    """Nor do targets of one's own cost it its checkpoint."""
    argv, path, _ = unmade("train_teacher.checkpoint", killed=True)
    (copy / "hubconf.py").write_text("import torch\ndef f(): return torch.nn.AdaptiveAvgPool2d(1)\n")
    run("train_teacher", [*argv, "--encoder", f"hub:{copy}:f"], copy)
    assert path.exists()
    torch.save({"targets": torch.randn(150, 3)}, copy / "targets.pt")
    run("train_teacher", argv, copy)
    assert path.exists()


# ---- Disks, rights, a second run ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("size", [0, 100, 3000, 9000])
def test_full_disk(name, size, copy, unmade):
    """No file can grow beyond `size` bytes: what was there stays, and of what is new all is whole."""
    argv, _, made = unmade(CHECKPOINTS[name])
    for log in copy.glob("*.jsonl"):
        log.unlink()
    before = snapshot(copy)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
    lines = 2 if name == "evaluate" else 1  # that of a set, and that of the table
    message = refused_process(name, [*argv, "--out_dir", copy], limit, lines)
    assert "cannot be written" in message and str(copy) in message and "--out_dir" in message
    after = snapshot(copy)
    assert {path: after.get(path) for path in before} == before and made not in after
    assert not [*copy.rglob("*.tmp")]
    for path in copy.rglob("*.jsonl"):
        assert len(common.read_records(path)) == len(path.read_bytes().splitlines())
    for path in [*copy.rglob("*.pt"), *copy.rglob("*.checkpoint")]:
        common.load(path, {}, "")


def without_rights():
    """Root writes wherever it likes, unless it gives up that capability (CAP_DAC_OVERRIDE)."""
    libc, header, data = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    for i in (0, 1, 2):  # effective, permitted, inheritable
        data[i] &= ~0b10
    assert libc.capset(header, data) == 0


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_read_only_folder(name, copy, unmade):
    argv, _, _ = unmade(CHECKPOINTS[name])
    before, paths = snapshot(copy), [copy, *copy.rglob("*")]
    for path in paths:
        path.chmod(0o555)
    try:
        message = refused_process(name, [*argv, "--out_dir", copy], without_rights)
        assert "Permission denied" in message and str(copy) in message and "--out_dir" in message
        assert snapshot(copy) == before
    finally:
        for path in paths:
            path.chmod(0o755)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_second_run_in_the_same_folder(name, copy, run, unmade):
    """While one run has the log, no other writes to it; another set is another matter."""
    argv, _, _ = unmade(CHECKPOINTS[name])
    before, log = snapshot(copy), copy / f"{LOGS[name]}.jsonl"
    first = common.Log(log, None)
    assert f"{log}: another run" in refused_process(name, [*argv, "--out_dir", copy])
    assert snapshot(copy) == before
    if name == "distill":
        run(name, [*argv, "--name", "other"], copy)
    del first
    run(name, argv, copy)


def test_experts_made_anew_after_a_set(copy, run):
    """Under the same names: the set was made from others."""
    run("distill", MKDT, copy)  # nothing to do
    shutil.copy(copy / "experts/0002.pt", copy / "experts/0001.pt")
    before = snapshot(copy)
    refuses(lambda: run("distill", MKDT, copy), copy / "sets/mkdt_random.pt", "other experts than those")
    assert snapshot(copy) == before


@pytest.mark.parametrize("which", ["pipe", "disk"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_nobody_reads_what_it_says(name, which, copy, run, unmade):
    """`| head -1`, a log on a full disk: after the step all is saved, with a line; it goes on from there."""
    argv, path, made = unmade(CHECKPOINTS[name])
    argv += {**LONGER, "train_teacher": ["--epochs", "2"], "evaluate": ["--epochs", "4"]}.get(name, [])

    def prepare():
        read, write = os.pipe()
        os.close(read)
        os.dup2(write if which == "pipe" else os.open("/dev/full", os.O_WRONLY), 1)
        call, calls = common.Progress.__call__, []

        def second(self, *words, **values):  # is said at once
            self.said -= 9 * (len(calls) == 1)
            calls.append(1)
            call(self, *words, **values)

        common.Progress.__call__ = second

    process = start(name, [*argv, "--out_dir", copy], copy.parent / "errors", prepare)
    process.join()
    why = "Broken pipe" if which == "pipe" else "No space left on device"
    said = f"stopped by {why} of standard output: the same command goes on\n"
    assert process.exitcode == 128 + signal.SIGPIPE and (copy.parent / "errors").read_text() == said
    assert common.load(path, {}, "")["step"] == 2 and not made.exists()
    run(name, argv, copy)
    assert made.exists() and not path.exists()


@pytest.mark.parametrize("stdout", [None, io.StringIO()])
def test_a_stdout_that_is_closed_or_a_notebooks(stdout, tmp_path):
    def prepare():
        signal.signal(signal.SIGTERM, handler)
        run = common.run

        def wrapped(*words):
            sys.stdout = stdout
            run(*words)
            assert signal.getsignal(signal.SIGTERM) is handler  # as before, for the notebook goes on

        common.run = wrapped

    def handler(*words):
        pass

    process = start("train_teacher", [*TEACHER, "--out_dir", tmp_path], tmp_path / "errors", prepare)
    process.join()
    assert process.exitcode == 0 and (tmp_path / "targets.pt").exists()
    assert (tmp_path / "errors").read_text() == ""


def test_no_file_takes_the_place_of_a_closed_descriptor():
    """What C code writes to stderr would get into it."""
    script = "import common, os; common.run(lambda args: None, list); print(os.open(os.devnull, 0))"
    shell = f"{shlex.quote(sys.executable)} -c {shlex.quote(script)}"
    done = subprocess.run(f"{shell} <&- 2>&-", shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) >= 3


def test_names_that_are_not_utf_8(copy, tmp_path):
    folder = tmp_path / os.fsdecode(b"\xe4pfel")
    copy.rename(folder)
    for path, name, argv in [
        ("targets.pt", "train_teacher", TEACHER), ("experts/0001.pt", "train_experts", EXPERTS),
        ("sets/mkdt_random.pt", "distill", MKDT), ("results.jsonl", "evaluate", SETS),
    ]:
        (folder / path).unlink()
        process = start(name, [*argv, "--out_dir", folder], tmp_path / "errors")
        process.join()
        assert process.exitcode == 0 and (folder / path).exists(), (tmp_path / "errors").read_text()


def test_a_file_system_without_locks(copy, run, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(38, "Function not implemented")))
    run("distill", [*MKDT, "--name", "new"], copy)


# ---- Divergence and memory ---------------------------------------------------------------------------------

# The call of the loss behind the first step (of distill.py: three of a student, there and back).
CALLS = {"train_teacher": 2, "train_experts": 2, "distill": 7, "evaluate": 2}
LONGER = {"distill": ["--iters", "9"]}


def spoil(patch, call, how):
    """Losses are spoiled by how(loss) from this call on, counted from 1."""
    calls = []

    def spoiled(function):
        def loss(*words):
            calls.append(1)
            return how(function(*words)) if len(calls) >= call else function(*words)

        return loss

    for name in ("student_loss", "barlow_twins_loss"):
        patch.setattr(common, name, spoiled(getattr(common, name)))
    patch.setattr(common.Checkpoint, "under_way", None)  # as in a process of its own


@pytest.mark.parametrize("minutes", [0, 5])
@pytest.mark.parametrize("name", CALLS)
def test_divergence(name, minutes, copy, run, unmade, monkeypatch):
    """It names the option to lower, and the checkpoint from before is there, and is good."""
    argv, path, made = unmade(CHECKPOINTS[name])
    argv += [*LONGER.get(name, []), "--checkpoint_minutes", minutes]
    with monkeypatch.context() as patch:
        spoil(patch, CALLS[name], lambda loss: loss * math.inf)
        message = refuses(lambda: run(name, argv, copy), "smaller --lr")
    assert f"{path} holds" in message if minutes == 0 else "no checkpoint" in message
    assert minutes or common.load(path, {}, "")["step"] == 1
    assert name == "evaluate" or not made.exists()
    run(name, argv, copy)  # goes on from there, and says so in the log
    assert made.exists() and not path.exists()
    steps = [r["step"] for r in common.read_records(copy / f"{LOGS[name]}.jsonl") if "command" in r]
    assert steps[-2:] == [0, int(minutes == 0 and name in ("train_teacher", "distill"))]


CUDA = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 ..."))
HOST = (lambda loss: loss + torch.empty(2**50).sum(), lambda loss: np.empty(2**50))


@pytest.mark.parametrize("how", [*HOST, CUDA])
@pytest.mark.parametrize("name", CALLS)
def test_out_of_memory(name, how, copy, unmade):
    """A real allocation that the host refuses, or as on a GPU: the options to change, and the checkpoint."""
    argv, path, _ = unmade(CHECKPOINTS[name])
    argv += [*LONGER.get(name, []), "--checkpoint_minutes", "0", "--out_dir", copy]
    message = refused_process(name, argv, lambda: spoil(pytest.MonkeyPatch(), CALLS[name], how))
    assert "out of memory" in message and "--width" in message and f"{path} holds" in message
    assert common.load(path, {}, "")["step"] == 1


def test_the_first_record_of_a_log(run_dir):
    for name in ("train_teacher", "train_experts", "distill_mkdt_random", "evaluate"):
        first = common.read_records(run_dir / f"{name}.jsonl")[0]
        assert {"command", "options", "commit", "time", "python", "torchvision", "scikit-learn"} <= set(first)
        assert torch.__version__.startswith(first["torch"]) and first["numpy"] == np.__version__
        assert (first["device"], first["threads"], first["processes"], first["step"]) == ("cpu", 1, 1, 0)


def test_a_log_that_was_cut_off(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"b": ')
    common.append(path, {"c": 3})
    assert path.read_text() == '{"a": 1}\n{"b": \n{"c": 3}\n'
    assert common.read_records(path) == [{"a": 1}, {"c": 3}]
