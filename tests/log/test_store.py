"""The store survives being killed, and never gives a wrong answer from damaged bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import struct
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack, suppress
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lightning_influence.errors import LogCorrupted, LogError
from lightning_influence.log import shard
from lightning_influence.log.format import FINAL, FORMAT, IndexEntry, index_line, read_index
from lightning_influence.log.reader import StoreReader
from lightning_influence.log.writer import StoreWriter

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    found = {f"a/{d}": torch.randint(0, 2, (3, step % 4), generator=generator).to(d) for d in DTYPES}
    return found | {"scalar": torch.tensor(float(step)), "transposed": torch.rand(4, 3, generator=generator).T}


def write(path: Path, steps: int, **options: object) -> None:
    with StoreWriter(path, **options) as writer:  # type: ignore[arg-type]
        writer.write_manifest({"name": "test", "steps": steps})
        writer.save("layout", {"index": torch.arange(5)}, {"kind": "mask"})
        for step in range(steps):
            writer.append(step, tensors_of(step), {"step": step, "lr": 0.1 / (step + 1)})


def check(path: Path, expected: int | None = None) -> int:
    reader = StoreReader(path)
    assert expected is None or len(reader) == expected
    for step in range(len(reader)):
        assert reader.meta(step) == {"step": step, "lr": 0.1 / (step + 1)}
        assert list(reader.names(step)) == list(tensors_of(step)), "in the order given"
        for name, tensor in tensors_of(step).items():
            read = reader.tensor(step, name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)
    return len(reader)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / "s", 9)
    check(tmp_path / "s", 9)
    reader = StoreReader(tmp_path / "s")
    assert reader.manifest == {"name": "test", "steps": 9, "ranks": 1}
    assert reader.artifacts() == ["layout"]
    assert reader.artifact_meta("layout") == {"kind": "mask"}
    assert reader.artifact("layout", "index").tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(IndexError):
        reader.tensor(9, "scalar")
    with pytest.raises(LogError, match="no artifact 'snapshot'.*layout"):
        reader.artifact("snapshot", "x")


def test_any_safetensors_tool_reads_a_shard(tmp_path: Path) -> None:
    write(tmp_path / "s", 2)
    read = load_file(tmp_path / "s" / "rank-0" / "step-00000001.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors_of(1).items())


def test_existing_stores(tmp_path: Path) -> None:
    write(tmp_path / "s", 3)
    with pytest.raises(LogError, match="already holds a log of 3 steps"):
        StoreWriter(tmp_path / "s")
    with StoreWriter(tmp_path / "s", existing="resume") as writer:
        assert len(writer) == 3
        writer.truncate(2)
        writer.append(2, tensors_of(2), {"step": 2, "lr": 0.1 / 3})
        with pytest.raises(LogError, match="the next step .* is 3"):
            writer.append(5, {}, {})
        with pytest.raises(LogError, match="taken after step 7"):
            writer.truncate(7)
    check(tmp_path / "s", 3)
    write(tmp_path / "s", 1, existing="overwrite")
    check(tmp_path / "s", 1)


def test_artifacts_after_a_truncation_are_dropped(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s") as writer:
        writer.write_manifest({})
        for step in range(4):
            writer.save(f"snapshot-{step}", {}, {})
            writer.append(step, {}, {})
        writer.truncate(2)
    assert StoreReader(tmp_path / "s").artifacts() == ["snapshot-0", "snapshot-1", "snapshot-2"]


def test_two_runs_cannot_write_one_store(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s"), pytest.raises(LogError, match="another run"):
        StoreWriter(tmp_path / "s", existing="resume")


def test_a_worker_that_outlives_the_run_does_not_lock_the_store(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s")
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    writer.close()
    StoreWriter(tmp_path / "s", existing="resume").close()
    worker.kill()
    worker.join()


def test_steps_of_all_ranks(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s", ranks=2) as first, StoreWriter(tmp_path / "s", rank=1, ranks=2) as second:
        first.write_manifest({})
        for step in range(3):
            first.append(step, {"x": torch.tensor(step)}, {})
        second.append(0, {"x": torch.tensor(10)}, {})
    reader = StoreReader(tmp_path / "s")
    assert len(reader) == 1
    assert reader.ranks == 2
    assert int(reader.tensor(0, "x", rank=1)) == 10


def write_ranks(path: Path, steps: tuple[int, ...], *, ended: bool = False) -> None:
    with ExitStack() as stack:
        writers = [stack.enter_context(StoreWriter(path, rank=rank, ranks=len(steps))) for rank in range(len(steps))]
        writers[0].write_manifest({})
        for writer, count in zip(writers, steps, strict=True):
            for step in range(count):
                writer.append(step, {}, {})
        if ended:
            writers[0].save(FINAL, {}, {})


def test_all_ranks_have_to_be_there_and_no_other(tmp_path: Path) -> None:
    write_ranks(tmp_path / "s", (3, 3, 3))
    shutil.copytree(tmp_path / "s" / "rank-1", tmp_path / "s" / "rank-1 (copy)")
    with pytest.raises(LogCorrupted, match="rank-1 .copy.*says ranks=3"):
        StoreReader(tmp_path / "s")
    with pytest.raises(LogError, match="holds rank-1 .copy., which a log of 3 processes does not"):
        StoreWriter(tmp_path / "s", ranks=3, existing="resume")
    shutil.rmtree(tmp_path / "s" / "rank-1")
    for _ in range(2):
        with pytest.raises(LogCorrupted, match="says ranks=3"):
            StoreReader(tmp_path / "s")
        shutil.rmtree(tmp_path / "s" / "rank-1 (copy)", ignore_errors=True)
    write(tmp_path / "s", 2, existing="overwrite")
    check(tmp_path / "s", 2)


def test_the_ranks_of_a_killed_run_may_differ_but_not_of_one_that_ended(tmp_path: Path) -> None:
    write_ranks(tmp_path / "killed", (3, 2))
    assert len(StoreReader(tmp_path / "killed")) == 2
    write_ranks(tmp_path / "ended", (3, 3), ended=True)
    assert len(StoreReader(tmp_path / "ended")) == 3
    index = tmp_path / "ended" / "rank-1" / "index.jsonl"
    whole = index.read_bytes()
    index.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    with pytest.raises(LogCorrupted, match="rank-1/index.jsonl holds 2 steps, but the run ended after 3"):
        StoreReader(tmp_path / "ended")
    index.write_bytes(whole[:-4] + bytes([whole[-4] ^ 1]) + whole[-3:])
    with pytest.raises(LogCorrupted, match="line 3, is not what was written"):
        StoreReader(tmp_path / "ended")
    index.unlink()
    with pytest.raises(LogCorrupted, match="rank-1 has no index.jsonl"):
        StoreReader(tmp_path / "ended")


def test_a_run_that_goes_on_has_not_ended(tmp_path: Path) -> None:
    write_ranks(tmp_path / "s", (3,), ended=True)
    with StoreWriter(tmp_path / "s", existing="resume") as writer:
        writer.truncate(3)
    assert StoreReader(tmp_path / "s").artifacts() == []


def test_the_backlog_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = StoreWriter._write

    def write_slowly(self: StoreWriter, *args: object) -> None:
        time.sleep(0.01)
        assert self._pending <= 3000
        slow(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(StoreWriter, "_write", write_slowly)
    with StoreWriter(tmp_path / "s", max_pending_bytes=3000) as writer:
        writer.write_manifest({})
        for step in range(20):
            writer.append(step, {"x": torch.zeros(250)}, {})
    assert len(StoreReader(tmp_path / "s")) == 20


def test_a_disk_that_fails_is_loud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning_influence.log.writer as store

    write(tmp_path / "s", 2)
    replace = store._replace

    def full(path: Path, data: bytes) -> None:
        if path.name == "step-00000003.safetensors":
            raise OSError(28, "No space left on device")
        replace(path, data)

    writer = StoreWriter(tmp_path / "s", existing="resume")
    monkeypatch.setattr(store, "_replace", full)
    writer.append(2, tensors_of(2), {"step": 2, "lr": 0.1 / 3})
    writer.append(3, tensors_of(3), {})
    with pytest.raises(LogError, match="No space left.*last complete step"):
        writer.flush()
    with pytest.raises(LogError, match="No space left"):
        writer.append(4, {}, {})
    with pytest.raises(LogError, match="No space left"):
        writer.close()
    check(tmp_path / "s", 3)


LOSSES: dict[str, Callable[[Path], None]] = {
    "directory deleted": shutil.rmtree,
    "manifest deleted": lambda log: (log / "manifest.json").unlink(),
    "index deleted": lambda log: (log / "rank-0" / "index.jsonl").unlink(),
    "index replaced": lambda log: os.replace(log / "manifest.json", log / "rank-0" / "index.jsonl"),
    "index cut": lambda log: os.truncate(log / "rank-0" / "index.jsonl", 3),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("later", [False, True])
def test_what_is_lost_while_writing_is_loud(loss: str, later: bool, tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s")
    writer.write_manifest({})
    writer.append(0, {}, {})
    writer.flush()
    LOSSES[loss](tmp_path / "s")
    if later:
        writer.append(1, {}, {})
        with pytest.raises(LogError, match="deleted, replaced or cut"):
            writer.flush()
    with pytest.raises(LogError, match="deleted, replaced or cut") as raised:
        writer.close()
    assert "last complete step" not in str(raised.value)


def test_a_disk_that_is_full_at_the_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning_influence.log.writer as store

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    write(tmp_path / "s", 2)
    replace = store._replace
    monkeypatch.setattr(store, "_replace", full)
    for existing in ("resume", "overwrite"):
        with pytest.raises(LogError, match=f"cannot write a log to {tmp_path}.*No space left"):
            StoreWriter(tmp_path / "s", existing=existing)
    monkeypatch.setattr(store, "_replace", replace)
    with StoreWriter(tmp_path / "s", existing="resume") as writer:
        monkeypatch.setattr(store, "_replace", full)
        with pytest.raises(LogError, match=f"cannot write a log to {tmp_path}.*No space left"):
            writer.write_manifest({})
        with pytest.raises(LogError, match=f"cannot write a log to {tmp_path}.*No space left"):
            writer.truncate(0)


def test_a_writer_that_cannot_start_holds_nothing(tmp_path: Path) -> None:
    write(tmp_path / "s", 3)
    index = tmp_path / "s" / "rank-0" / "index.jsonl"
    index.write_bytes(b"x" + index.read_bytes())
    with pytest.raises(LogCorrupted, match="line 1") as raised:
        StoreWriter(tmp_path / "s", existing="resume")
    write(tmp_path / "s", 2, existing="overwrite")
    check(tmp_path / "s", 2)
    del raised  # its traceback held the writer


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LogError, match="cannot write a log to"):
        StoreWriter(tmp_path / "file" / "s")


def test_not_a_log(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="no such directory"):
        StoreReader(tmp_path / "nowhere")
    with pytest.raises(LogError, match="not a log"):
        StoreReader(tmp_path)
    write(tmp_path / "s", 1)
    body = json.loads((tmp_path / "s" / "manifest.json").read_text())
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(body | {"version": 99}))
    with pytest.raises(LogCorrupted):
        StoreReader(tmp_path / "s")


@pytest.mark.parametrize("name", ["../escape", "a/b", "step-00000000", "", ".hidden"])
def test_artifact_names_stay_inside(name: str, tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s") as writer, pytest.raises(LogError, match="cannot name an artifact"):
        writer.save(name, {}, {})


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pristine") / "s"
    write(path, 4)
    (path / "rank-0" / "lock").unlink()
    return path


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_detected_never_answered(pristine: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Any byte of any file flipped, any file cut anywhere: an error, or a shorter log that is right."""
    damaged = tmp_path / "damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(pristine, damaged)
    files = sorted(p for p in damaged.rglob("*") if p.is_file())
    path = data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3, unique=True)):
            content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        length = check(damaged)
        reader = StoreReader(damaged)
        if "layout" in reader.artifacts():
            assert reader.artifact("layout", "index").tolist() == [0, 1, 2, 3, 4]
            assert reader.artifact_meta("layout") == {"kind": "mask"}
        assert reader.manifest == {"name": "test", "steps": 4, "ranks": 1}
    except LogError:
        return
    assert path.name == "index.jsonl"
    assert length < 4, "a damaged tail of the index is a shorter log"


# -- logs from a stranger -----------------------------------------------------------------------------------


def signed(text: str) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(text.encode()), text.encode())


def forge_manifest(log: Path, content: Any, **body: Any) -> None:
    body = {"format": FORMAT, "version": 1, "content": content, **body}
    body["crc32"] = zlib.crc32(json.dumps(body, sort_keys=True).encode())
    (log / "manifest.json").write_text(json.dumps(body))


def forge_shard(log: Path, header: Any, **entry: Any) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text
    entry = {"step": 0, "file": "s.safetensors", "bytes": len(data), "header": zlib.crc32(data), **entry}
    (log / "rank-0" / "index.jsonl").write_bytes(signed(json.dumps(entry)))
    (log / "rank-0" / "s.safetensors").write_bytes(data)


def forge_index(log: Path, *lines: str) -> None:
    (log / "rank-0" / "index.jsonl").write_bytes(b"".join(map(signed, lines)))


SUMS = {"meta": "{}", "crc32": '{"a": 0}'}
FORGERIES: dict[str, Callable[[Path], object]] = {
    "manifest of a list": lambda log: forge_manifest(log, [1, 2]),
    "manifest of nothing": lambda log: forge_manifest(log, {}),
    "manifest of a version in words": lambda log: forge_manifest(log, {"ranks": 1}, version="x"),
    "manifest of many ranks": lambda log: forge_manifest(log, {"ranks": 10**12}),
    "manifest of ranks in words": lambda log: forge_manifest(log, {"ranks": "one"}),
    "deep manifest": lambda log: (log / "manifest.json").write_text("[" * 200_000),
    "huge manifest": lambda log: os.truncate(log / "manifest.json", 2**36),
    "index of a list": lambda log: forge_index(log, "[1, 2]"),
    "index of no JSON": lambda log: forge_index(log, "no"),
    "deep index": lambda log: forge_index(log, "[" * 4000),
    "long index": lambda log: forge_index(log, " " * 10**6),
    "huge index": lambda log: os.truncate(log / "rank-0" / "index.jsonl", 2**36),
    "entry without size": lambda log: forge_index(log, '{"step": 0, "file": "step-00000000.safetensors"}'),
    "entry outside": lambda log: forge_shard(log, {"__metadata__": SUMS}, file="../../s.safetensors"),
    "artifact of a list": lambda log: forge_index(
        log, '{"artifact": ["a"], "after": 0, "file": "a", "bytes": 3, "header": 1}'
    ),
    "header without metadata": lambda log: forge_shard(log, {}),
    "header of a list": lambda log: forge_shard(log, [1]),
    "header of no JSON": lambda log: forge_shard(log, b"{" * 50),
    "header of deep metadata": lambda log: forge_shard(log, {"__metadata__": {**SUMS, "meta": "[" * 100_000}}),
    "header of meta in words": lambda log: forge_shard(log, {"__metadata__": {**SUMS, "meta": '"x"'}}),
    "header of sums in a list": lambda log: forge_shard(log, {"__metadata__": {**SUMS, "crc32": "[]"}}),
    "tensor that is not there": lambda log: forge_shard(log, {"__metadata__": SUMS}),
    "tensor beyond the file": lambda log: forge_shard(
        log, {"__metadata__": SUMS, "a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    ),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_log_is_corrupted(forgery: str, tmp_path: Path) -> None:
    """Its checksums agree, and still it says nothing that a writer says."""
    write(tmp_path / "s", 1)
    FORGERIES[forgery](tmp_path / "s")
    with pytest.raises(LogCorrupted):
        StoreReader(tmp_path / "s").tensor(0, "a")


def test_a_manifest_that_says_too_little(tmp_path: Path) -> None:
    write(tmp_path / "s", 1)
    with pytest.raises(LogCorrupted, match="manifest.json does not say 'coverage'"):
        StoreReader(tmp_path / "s").manifest["coverage"]


@pytest.mark.parametrize("name", ["manifest.json", "rank-0", "rank-0/index.jsonl", "rank-0/step-00000000.safetensors"])
def test_the_reader_follows_no_link(name: str, tmp_path: Path) -> None:
    write(tmp_path / "s", 1)
    os.replace(tmp_path / "s" / name, tmp_path / "elsewhere")
    (tmp_path / "s" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LogCorrupted, match=f"{name} is a link"):
        StoreReader(tmp_path / "s").meta(0)


@pytest.mark.parametrize("existing", ["overwrite", "resume"])
@pytest.mark.parametrize("name", ["rank-0", "rank-0/lock", "rank-0/index.jsonl", "rank-0/.index.jsonl.tmp", "rank-1"])
def test_the_writer_follows_no_link(name: str, existing: str, tmp_path: Path) -> None:
    write(tmp_path / "s", 1)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("precious")
    link = tmp_path / "s" / name
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "precious" if link.name.startswith("rank") else tmp_path / "precious" / "file")
    with suppress(LogError):
        write(tmp_path / "s", 1, existing=existing)
    assert [path.name for path in (tmp_path / "precious").iterdir()] == ["file"]
    assert (tmp_path / "precious" / "file").read_text() == "precious"


def test_the_manifest_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    with StoreWriter(tmp_path / "s") as writer:
        for name in ("manifest.json", ".manifest.json.tmp"):
            (tmp_path / "s" / name).symlink_to(tmp_path / "precious")
        writer.write_manifest({})
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "s" / "manifest.json").is_symlink()


@pytest.mark.parametrize("name", ["manifest.json", "rank-0/index.jsonl", "rank-0/step-00000000.safetensors"])
def test_a_file_that_may_not_be_read_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidding(path: Path, mode: str) -> IO[Any]:
        if path == tmp_path / "s" / name:
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, mode)

    write(tmp_path / "s", 1)
    for module in ("format", "reader", "shard"):  # root may read everything
        monkeypatch.setattr(f"lightning_influence.log.{module}.open", forbidding, raising=False)
    with pytest.raises(LogError, match=f"cannot be read.*{name}"):
        StoreReader(tmp_path / "s").meta(0)


def test_hostile_headers_do_not_allocate(tmp_path: Path) -> None:
    write(tmp_path / "s", 1)
    shard = tmp_path / "s" / "rank-0" / "step-00000000.safetensors"
    content = bytearray(shard.read_bytes())
    content[:8] = (2**62).to_bytes(8, "little")
    shard.write_bytes(content)
    with pytest.raises(LogCorrupted, match="impossible length"):
        StoreReader(tmp_path / "s").meta(0)


def keep_writing(path: Path, ready: Event) -> None:
    with StoreWriter(path) as writer:
        writer.write_manifest({})
        ready.set()
        for step in range(100000):
            writer.append(step, tensors_of(step), {"step": step, "lr": 0.1 / (step + 1)})


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_writer_leaves_its_complete_steps(seed: int, tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    process = fork.Process(target=keep_writing, args=(tmp_path / "s", ready))
    process.start()
    assert ready.wait(60)
    time.sleep(random.Random(seed).uniform(0.05, 0.3))
    process.kill()
    process.join()
    steps = check(tmp_path / "s")
    with StoreWriter(tmp_path / "s", existing="resume") as writer:
        assert len(writer) == steps
        writer.append(steps, tensors_of(steps), {"step": steps, "lr": 0.1 / (steps + 1)})
    check(tmp_path / "s", steps + 1)


@pytest.mark.parametrize("dtype", shard._DTYPES)
def test_every_type_of_tensor_is_written_as_safetensors_reads_it(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3, 2).to(dtype), "a": torch.ones(()).to(dtype), "empty": torch.ones(0, 2).to(dtype)}
    (tmp_path / "file").write_bytes(b"".join(shard.serialise({**tensors, "odd": torch.ones(3, dtype=torch.uint8)}, {})))
    read = load_file(tmp_path / "file")
    for name, tensor in tensors.items():
        assert read[name].dtype == dtype and read[name].shape == tensor.shape
        assert shard.bytes_of(read[name]).tobytes() == shard.bytes_of(tensor).tobytes()


# -- the format, as earlier versions wrote it --------------------------------------------------------------------

LINES = {
    b'a581472a {"bytes":120,"file":"step-00000003.safetensors","header":7,"step":3}\n': IndexEntry(
        "step-00000003.safetensors", 120, 7, step=3
    ),
    b'b36d3f25 {"after":4,"artifact":"final","bytes":64,"file":"final.safetensors","header":9}\n': IndexEntry(
        "final.safetensors", 64, 9, artifact="final", after=4
    ),
}


@pytest.mark.parametrize(("line", "entry"), LINES.items())
def test_an_index_line_is_what_it_was(line: bytes, entry: IndexEntry) -> None:
    assert index_line(entry) == line


def test_an_index_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    steps = [index_line(IndexEntry(f"step-0000000{i}.safetensors", 120, 7, step=i)) for i in range(3)]
    (tmp_path / "index.jsonl").write_bytes(b"".join([*steps, *LINES]))
    assert read_index(tmp_path / "index.jsonl")[3:] == list(LINES.values())
