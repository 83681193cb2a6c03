"""What can go wrong: broken and hostile files, disks, options, divergence, memory. One line, exit status 2,
and everything on disk as it was."""

import fcntl
import io
import json
import math
import os
import pickle
import random
import resource
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, DISTILL, EVALUATE, EXPERTS, STUDENT, TEACHER, refuses, start

import common


def snapshot(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".claims"}


# -- files ---------------------------------------------------------------------------------------------------


class Code:
    """Runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def packed(contents):
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getvalue()


def changed(contents, path, value):
    """contents with another value at path, a tuple of keys; value None: without it."""
    contents = dict(contents)
    if len(path) > 1:
        contents[path[0]] = changed(contents[path[0]], path[1:], value)
    elif value is None:
        del contents[path[0]]
    else:
        contents[path[0]] = value
    return contents


def damaged(data):
    """{what: bytes} of a file's bytes that were cut, or had a bit turned where it counts."""
    found = {"empty": b"", "one byte": data[:1], "without its last byte": data[:-1]}
    for share in (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        found[f"cut at {share}"] = data[: int(share * len(data))]
    draws, turned = random.Random(0), bytearray(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = archive.infolist()
        for info in draws.sample(parts, min(12, len(parts))):
            if info.file_size and not info.filename.endswith((".format_version", "serialization_id")):
                lengths = data[info.header_offset + 26 : info.header_offset + 30]  # of name and extra field
                begin = info.header_offset + 30 + lengths[0] + lengths[2] + 256 * (lengths[1] + lengths[3])
                at = begin + draws.randrange(info.file_size)
                turned = bytearray(data)
                turned[at] ^= 1 << draws.randrange(8)
                found[f"a bit of {info.filename} turned"] = bytes(turned)
    found["the directory overwritten"] = data.replace(b"PK\x01\x02", b"PK\x01\x03")
    found["the end overwritten"] = data.replace(b"PK\x05\x06", b"PK\x05\x07")
    found["the head of a part overwritten"] = data.replace(b"PK\x03\x04", b"PK\x03\x05", 2)
    found["zeros in the middle"] = data[: len(data) // 2] + bytes(200) + data[len(data) // 2 + 200 :]
    found["random"] = random.Random(1).randbytes(len(data))
    return found


def foreign(witness):
    """{what: bytes} of files of other kinds, some with code in them that would make the file witness."""
    array, archive = io.BytesIO(), io.BytesIO()
    np.savez(array, images=np.zeros(3))
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("hello.txt", "hello")
    return {
        "text": b"hello\n", "JSON": b'{"images": [1, 2]}', "HTML": b"<!DOCTYPE html><html></html>",
        "PNG": b"\x89PNG\r\n\x1a\n" + bytes(50), "numpy": array.getvalue(), "zip": archive.getvalue(),
        "a plain pickle": pickle.dumps({"images": 1}), "a pickle with code": pickle.dumps(Code(witness)),
        "code": packed({"images": Code(witness), "at": 1}), "code alone": packed(Code(witness)),
        "a module": packed(torch.nn.Linear(2, 2)), "a list": packed([1, 2]),
        "a tensor": packed(torch.zeros(3)), "nothing": packed({}), "None": packed(None),
    }  # fmt: skip


def mistaken(contents, tensors):
    """{what: bytes} of the right kind of file with wrong contents; tensors: the paths of those that count."""
    found = {}
    for path in tensors:
        tensor = contents
        for name in path:
            tensor = tensor[name]
        name = ".".join(map(str, path))
        for value in (float("nan"), float("inf")):
            wrong = tensor.clone()
            wrong.view(-1)[-1] = value
            found[f"{name} with {value}"] = packed(changed(contents, path, wrong))
        found[f"without {name}"] = packed(changed(contents, path, None))
        others = {"text": "x", "empty": tensor.view(-1)[:0], "a dict": {}, "sparse": tensor.to_sparse()}
        for what, wrong in others.items():
            found[f"{name}: {what}"] = packed(changed(contents, path, wrong))
    for name, wrong in {"options": [1], "targets_id": 3, "images_id": torch.zeros(1)}.items():
        if name in contents:
            found[f"{name} of another kind"] = packed({**contents, name: wrong})
    if "at" in contents:  # well formed, but not what was written
        for name, value in contents["at"].items():
            if type(value) is int:
                for wrong in (value + 1, -1, 2**62):
                    found[f"at {wrong} in {name}"] = packed(changed(contents, ("at", name), wrong))
        for wrong in ([0, ""], None, [2**62, contents["log"][1]]):
            found[f"log {wrong}"] = packed({**contents, "log": wrong})
        meta = changed(contents, tensors[0], torch.empty(3, device="meta"))
        found["a tensor without values"] = packed(meta)
        if "optimizer" in contents["parts"]:
            found["no momentum"] = packed(changed(contents, ("parts", "optimizer", "state"), {}))
    if "options" in contents:
        of_tensors = {"train_experts": {"x": torch.ones(2)}}
        found["options with tensors"] = packed({**contents, "options": of_tensors})
    for name in ("targets_id", "images_id"):
        if name in contents:
            found[f"another {name}"] = packed({**contents, name: "0123456789abcdef"})
    return found


SETS = [*EVALUATE, "--sets", "mkdt_random"]
MKDT = [*DISTILL, "--init", "random", "--iters", "1"]
NET = ("parts", "net", "0.conv1.weight")
KINDS = {  # file: (stage that reads it, its options, files that are not there, tensors that count)
    "targets.pt": ("train_experts", EXPERTS, ["experts/0001.pt"], [("targets",)]),
    "teacher.pt": ("train_teacher", TEACHER, ["targets.pt"], [("encoder", "conv1.weight")]),
    "experts/0001.pt": ("distill", [*MKDT, "--name", "new"], [], [("trajectory",), ("example_loss",)]),
    "sets/mkdt_random.pt": ("evaluate", SETS, ["results.jsonl"], [("images",), ("targets",)]),
    "train_teacher.checkpoint": (
        "train_teacher", TEACHER, ["targets.pt", "teacher.pt"], [NET, ("at", "losses")]
    ),
    "experts/0001.checkpoint": (
        "train_experts", EXPERTS, ["experts/0001.pt"], [("parts", "net", "head.bias"), ("at", "trajectory")]
    ),
    "sets/mkdt_random.checkpoint": ("distill", MKDT, ["sets/mkdt_random.pt"], [("parts", "images")]),
    "evaluate_*.checkpoint": ("evaluate", SETS, ["results.jsonl"], [("parts", "net", "head.bias")]),
}  # fmt: skip


def under_way(run, file, stage, monkeypatch):
    """The path of a file of KINDS in a run, of which a checkpoint is left as if the stage had been killed."""
    name, options, missing, _ = KINDS[file]
    for path in missing:
        os.remove(run / path)
    if file.endswith(".checkpoint"):
        unlink = Path.unlink
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", lambda p, **k: p.suffix == ".checkpoint" or unlink(p, **k))
            stage(name, [*options, "--out_dir", run])
        for path in missing:
            os.remove(run / path)
    return sorted(run.glob(file))[0]


@pytest.mark.parametrize("file", KINDS)
def test_broken_and_hostile_files(file, copy, stage, capsys, tmp_path, monkeypatch):
    """At least 30 ways to spoil a file: none is taken, none runs code or changes anything on disk."""
    name, options, _, tensors = KINDS[file]
    path, witness = under_way(copy, file, stage, monkeypatch), tmp_path / "witness"
    data = path.read_bytes()
    contents = torch.load(io.BytesIO(data), weights_only=True)
    tried = {**damaged(data), **foreign(witness), **mistaken(contents, tensors)}
    assert len(tried) >= 30
    for what, wrong in tried.items():
        path.write_bytes(wrong)
        before = snapshot(copy)
        refuses(capsys, lambda: stage(name, [*options, "--out_dir", copy]), str(path), what=what)
        assert snapshot(copy) == before and not witness.exists()
    print(f"{file}: {len(tried)} mutilations refused")
    path.write_bytes(data)
    stage(name, [*options, "--out_dir", copy])  # and the right one is taken


def test_one_bad_expert_is_named_with_the_way_to_make_it_again(copy, stage, capsys):
    path = copy / "experts/0001.pt"
    data = path.read_bytes()
    path.write_bytes(data[:-1000])
    run = [*MKDT, "--out_dir", copy, "--name", "new"]
    refuses(capsys, lambda: stage("distill", run), str(path), "move it away", "train_experts.py")
    path.rename(copy / "bad")
    stage("train_experts", [*EXPERTS, "--out_dir", copy])
    assert path.read_bytes() == data  # bit for bit
    stage("distill", run)


def test_init_from_and_latent_classes(copy, stage, capsys, tmp_path):
    """The files of people's own, too."""
    witness, path = tmp_path / "witness", tmp_path / "own.pt"
    calls = {
        "train_teacher": [*TEACHER, "--out_dir", tmp_path / "new", "--init_from", path],
        "distill": [*MKDT, "--out_dir", copy, "--init", "sas", "--name", "x", "--latent_classes", path],
    }
    for name, argv in calls.items():
        for what, wrong in foreign(witness).items():
            path.write_bytes(wrong)
            refuses(capsys, lambda name=name, argv=argv: stage(name, argv), str(path), what=what)
    assert not witness.exists() and not (tmp_path / "new/teacher.pt").exists()


# -- the wrong checkpoint ------------------------------------------------------------------------------------


OTHERS = {  # options that change the result of what is under way
    "train_teacher.checkpoint": ["--lr", "0.02"],
    "experts/0001.checkpoint": ["--momentum", "0.5"],
    "sets/mkdt_random.checkpoint": ["--lr_img", "11"],
    "evaluate_*.checkpoint": ["--weight_decay", "0.01"],
}


@pytest.mark.parametrize("file", OTHERS)
def test_the_wrong_checkpoint(file, copy, stage, capsys, monkeypatch):
    """It says which option differs, then and now; --restart begins anew; what does not count may differ."""
    name, options, _, _ = KINDS[file]
    path = under_way(copy, file, stage, monkeypatch)
    argv, before = [*options, "--out_dir", copy], snapshot(copy)
    option, value = OTHERS[file]
    other = [*argv, option, value]
    if name == "train_experts":  # the other experts are made with the first option, and say so first
        for k in (0, 2):
            os.remove(copy / f"experts/000{k}.pt")
        before = snapshot(copy)
        other += ["--first_expert", "1", "--num_experts", "1"]
        argv += ["--first_expert", "1", "--num_experts", "1"]
    message = refuses(capsys, lambda: stage(name, other), str(path), f"{option} ", "now", value, "--restart")
    assert message.count(option) == 2 and snapshot(copy) == before
    stage(name, [*argv, "--checkpoint_minutes", "7", "--threads", "1"])
    assert "going on from" in capsys.readouterr().out and not path.exists()


def test_restart(copy, stage, capsys, monkeypatch):
    path = under_way(copy, "sets/mkdt_random.checkpoint", stage, monkeypatch)
    stage("distill", [*MKDT, "--out_dir", copy, "--lr_img", "11", "--restart"])
    assert "going on" not in capsys.readouterr().out and not path.exists()
    made = common.load(copy / "sets/mkdt_random.pt", {}, "")["options"]["distill"]
    assert made["lr_img"] == 11 and not {"restart", "checkpoint_minutes", "deterministic"} & set(made)
    before = (copy / "sets/mkdt_random.pt").read_bytes()
    other = [*MKDT, "--out_dir", copy, "--lr_img", "12", "--restart"]  # what is finished stays
    refuses(capsys, lambda: stage("distill", other), "mkdt_random.pt", "--lr_img 11", "--lr_img 12")
    assert (copy / "sets/mkdt_random.pt").read_bytes() == before


def test_more_experts_are_another_run(copy, stage, capsys, monkeypatch):
    path = under_way(copy, "sets/mkdt_random.checkpoint", stage, monkeypatch)
    shutil.copy(copy / "experts/0000.pt", copy / "experts/0003.pt")
    refuses(capsys, lambda: stage("distill", [*MKDT, "--out_dir", copy]), str(path), "experts 3", "experts 4")


def test_a_log_that_was_changed_is_not_cut(copy, stage, capsys, monkeypatch):
    path = under_way(copy, "sets/mkdt_random.checkpoint", stage, monkeypatch)
    log = copy / "distill_mkdt_random.jsonl"
    text = '{"note": "mine"}\n' + log.read_text() + '{"note": "precious"}\n'
    log.write_text(text)
    stage("distill", [*MKDT, "--out_dir", copy])
    assert "has changed" in capsys.readouterr().out and log.read_text().startswith(text) and not path.exists()


def test_a_failure_at_the_start_leaves_the_log(copy, stage, monkeypatch):
    """What an earlier start of the same run has logged goes when there is something in its place."""
    log = copy / "train_teacher.jsonl"
    for file in ("targets.pt", "teacher.pt"):
        os.remove(copy / file)
    before = [record for _, record in common.read_records(log)]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *words: common.fail("no room"))
        with pytest.raises(SystemExit):
            stage("train_teacher", [*TEACHER, "--out_dir", copy])
    assert [record for _, record in common.read_records(log)][: len(before)] == before
    stage("train_teacher", [*TEACHER, "--out_dir", copy])
    assert len(common.read_records(log)) == len(before)


def test_files_that_are_no_files(copy, stage, capsys):
    os.mkfifo(copy / "sets/fifo.pt")
    run = [*EVALUATE, "--out_dir", copy, "--sets", "fifo"]
    refuses(capsys, lambda: stage("evaluate", run), "is not a file")
    (copy / "precious").write_text("precious")
    (copy / "sets/new.pt.tmp").symlink_to(copy / "precious")
    stage("distill", [*MKDT, "--out_dir", copy, "--name", "new"])
    assert (copy / "precious").read_text() == "precious" and not (copy / "sets/new.pt").is_symlink()


# -- disks, rights, a second run -----------------------------------------------------------------------------


WRITERS = {  # stage: its options, and the files that it is to make
    "train_teacher": (TEACHER, ["teacher.pt", "targets.pt"]),
    "train_experts": (EXPERTS, ["experts/0001.pt"]),
    "distill": (MKDT, ["sets/mkdt_random.pt"]),
    "evaluate": (EVALUATE, ["results.jsonl", "results.md"]),
}


def refused_process(name, argv, tmp_path, prepare):
    """A stage in a process of its own ends with exit status 2 and one line on stderr, which is returned."""
    said = tmp_path / "stderr"
    said.write_text("")
    process = start(name, argv, said, prepare)
    process.join()
    message = said.read_text()
    assert process.exitcode == 2 and message.startswith("error: ") and message.count("\n") == 1, message
    return message


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("size", [0, 100, 3000, 9000])
def test_full_disk(name, size, copy, tmp_path):
    """No file can grow beyond `size` bytes: one line, what was there stays, no half files."""
    options, missing = WRITERS[name]
    for path in missing:
        (copy / path).unlink()
    log = copy / f"{name}{'_mkdt_random' if name == 'distill' else ''}.jsonl"
    log.unlink()
    before = snapshot(copy)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    # The limit is on all files, so errors go to a pipe.
    read, write = os.pipe()
    process = start(name, [*options, "--out_dir", copy], f"/dev/fd/{write}", limit)
    os.close(write)
    message = os.fdopen(read).read()
    process.join()
    assert process.exitcode == 2 and message.startswith("error: ") and message.count("\n") == 1, message
    assert "cannot be written" in message and str(copy) in message and "--out_dir" in message
    after = snapshot(copy)
    assert not [path for path in after if path.suffix == ".tmp"]
    assert {path: data for path, data in after.items() if path in before} == before
    for path in set(after) - set(before):  # of what is new, all is whole
        if path.suffix == ".jsonl":
            assert all(isinstance(json.loads(line), dict) for line in path.read_text().splitlines())
        elif path.suffix in (".pt", ".checkpoint"):
            common.load(path, {}, "")
    for path in missing[:1]:
        assert path not in {str(p) for p in after}


def without_rights():
    """Root writes wherever it likes, unless it gives up that capability (CAP_DAC_OVERRIDE)."""
    import ctypes

    class Header(ctypes.Structure):
        _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

    data = (ctypes.c_uint32 * 6)()
    libc, header = ctypes.CDLL(None), Header(0x20080522, 0)
    assert libc.capget(ctypes.byref(header), data) == 0
    for i in (0, 1, 2):  # effective, permitted, inheritable
        data[i] &= ~0b10
    assert libc.capset(ctypes.byref(header), data) == 0


@pytest.mark.parametrize("name", WRITERS)
def test_read_only_folder(name, copy, tmp_path):
    options, missing = WRITERS[name]
    for path in missing:
        (copy / path).unlink()
    folders = [copy, copy / "experts", copy / "sets"]
    before = snapshot(copy)
    for folder in folders:
        folder.chmod(0o555)
    try:
        message = refused_process(name, [*options, "--out_dir", copy], tmp_path, without_rights)
        assert "Permission denied" in message and str(copy) in message and "--out_dir" in message
        assert snapshot(copy) == before
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_a_second_run_in_the_same_folder(copy, tmp_path):
    """While this process holds the claim on what a stage makes, another process does not get it."""
    for name in ("evaluate", "distill", "train_teacher"):  # each without what the later ones make
        options, missing = WRITERS[name]
        for path in missing:
            (copy / path).unlink()
        before = snapshot(copy)
        assert common.claim(copy, copy / missing[-1 if name == "train_teacher" else 0])
        message = refused_process(name, [*options, "--out_dir", copy], tmp_path, lambda: None)
        assert "another run" in message and "--out_dir" in message and snapshot(copy) == before
        if name == "distill":  # another set is another matter
            process = start("distill", [*MKDT, "--out_dir", copy, "--name", "other"])
            process.join()
            assert process.exitcode == 0 and (copy / "sets/other.pt").exists()


def test_experts_of_several_processes(copy, run_dir):
    """Started thrice at once, train_experts.py shares the experts: each is made once, and logged once."""
    shutil.rmtree(copy / "experts")
    (copy / "train_experts.jsonl").unlink()
    run = [*EXPERTS, "--num_experts", "6", "--out_dir", copy]
    processes = [start("train_experts", run) for _ in range(3)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(p.name for p in (copy / "experts").iterdir()) == [f"000{k}.pt" for k in range(6)]
    for k in range(3):
        assert (copy / f"experts/000{k}.pt").read_bytes() == (run_dir / f"experts/000{k}.pt").read_bytes()
    records = [json.loads(line) for line in (copy / "train_experts.jsonl").read_text().splitlines()]
    assert sorted(record["expert"] for record in records if "expert" in record) == list(range(6))


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert common.claim(tmp_path, tmp_path / "x.pt")


# -- divergence and memory -----------------------------------------------------------------------------------


def spoiled(monkeypatch, step, how):
    """The loss of students is spoiled by how(loss) from this call on, counted from 1."""
    make, calls = common.make_objective, []

    def make_spoiled(*arguments):
        loss_fn = make(*arguments)

        def loss(*arguments):
            calls.append(1)
            return how(loss_fn(*arguments)) if len(calls) >= step else loss_fn(*arguments)

        return loss

    monkeypatch.setattr(common, "make_objective", make_spoiled)


def test_divergence(copy, stage, capsys, monkeypatch):
    """It names the iteration and the likely cause, and the checkpoint from before is there, and is good."""
    every = ["--out_dir", copy, "--checkpoint_minutes", "0"]
    path = copy / "sets/new.checkpoint"
    with monkeypatch.context() as patch:
        spoiled(patch, 7, lambda loss: loss * math.nan)  # three steps an iteration, there and back
        run = [*MKDT, *every, "--iters", "9", "--name", "new"]
        refuses(capsys, lambda: stage("distill", run), "iteration 2", "--lr_img", "--lr_lr", str(path))
    assert common.load(path, {}, "")["at"]["iteration"] == 1
    assert not (copy / "sets/new.pt").exists()
    stage("distill", run)  # goes on from there
    assert (copy / "sets/new.pt").exists()

    os.remove(copy / "experts/0001.pt")
    with monkeypatch.context() as patch:
        spoiled(patch, 5, lambda loss: loss * math.inf)  # three steps an epoch
        refuses(capsys, lambda: stage("train_experts", [*EXPERTS, *every]), "expert 1", "--lr")
    kept = common.load(copy / "experts/0001.checkpoint", {}, "")["at"]
    assert (kept["epoch"], kept["step"]) == (1, 1) and not (copy / "experts/0001.pt").exists()

    for file in ("targets.pt", "teacher.pt"):
        os.remove(copy / file)
    wild = [*TEACHER, *every, "--ssl", "simclr", "--lr", "1e30", "--epochs", "3"]
    refuses(capsys, lambda: stage("train_teacher", wild), "--lr")
    assert not (copy / "teacher.pt").exists()


def test_a_matching_that_ran_off_is_said(copy, stage, capsys):
    stage("distill", [*MKDT, "--out_dir", copy, "--iters", "10", "--lr_init", "30", "--name", "off"])
    message = capsys.readouterr().err
    assert message.startswith("warning: ") and "--lr_img" in message and message.count("\n") == 1


@pytest.mark.parametrize("name, step", [("train_experts", 5), ("distill", 12), ("evaluate", 2)])
def test_out_of_memory(name, step, copy, tmp_path, monkeypatch):
    """A real allocation that the host refuses, some steps on: the options to change, and the checkpoint."""
    options, missing = WRITERS[name]
    for path in missing:
        (copy / path).unlink()

    def limit():
        spoiled(pytest.MonkeyPatch(), step, lambda loss: loss + torch.empty(2**50).sum())

    argv = [*options, "--out_dir", copy, "--checkpoint_minutes", "0"]
    message = refused_process(name, argv + (["--iters", "9"] if name == "distill" else []), tmp_path, limit)
    assert "out of memory" in message and "--width" in message
    checkpoints = list(copy.rglob("*.checkpoint"))
    assert checkpoints and str(checkpoints[0]) in message
    common.load(checkpoints[0], {}, "")


def test_out_of_memory_on_a_device(capsys):
    """As torch says it, for there may be no device here."""

    def main(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")

    refuses(capsys, lambda: common.run(main, None, "a smaller --micro_batch"), "device", "--micro_batch")


# -- the log -------------------------------------------------------------------------------------------------


def test_the_first_record_of_a_log(run_dir):
    for name in ("train_teacher", "train_experts", "distill_mkdt_random", "evaluate"):
        first = json.loads((run_dir / f"{name}.jsonl").read_text().splitlines()[0])
        assert {"command", "options", "commit", "device", "threads", "time"} <= set(first)
        assert first["torch"] == torch.__version__ and first["numpy"] == np.__version__
        assert first["python"] and first["torchvision"] and first["scikit-learn"]


def test_a_log_that_was_cut_off(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"b": ')
    common.append(path, {"c": 3})
    assert [record for _, record in common.read_records(path)] == [{"a": 1}, None, {"c": 3}]
    assert [place for place, _ in common.read_records(path)] == [0, 9, 16]


def test_deterministic(tmp_path, run_dir, stage):
    """The same files, bit for bit, as on the CPU they are anyway."""
    try:
        stage("train_teacher", [*TEACHER, "--out_dir", tmp_path, "--deterministic"])
        assert torch.are_deterministic_algorithms_enabled()
        stage("train_experts", [*EXPERTS, "--out_dir", tmp_path, "--deterministic"])
        for run in ([*DATA, *STUDENT, "--fraction", "0.1", "--iters", "0", "--init", "random"], MKDT):
            stage("distill", [*run, "--out_dir", tmp_path, "--deterministic"])
    finally:
        torch.use_deterministic_algorithms(False)
    for file in ("targets.pt", "teacher.pt", "experts/0002.pt", "sets/mkdt_random.pt"):
        assert (tmp_path / file).read_bytes() == (run_dir / file).read_bytes()
