"""The store survives being killed, and never gives a wrong answer from damaged bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lightning_influence.errors import LogCorrupted, LogError
from lightning_influence.store import StoreReader, StoreWriter

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
        assert sorted(reader.names(step)) == sorted(tensors_of(step))
        for name, tensor in tensors_of(step).items():
            read = reader.tensor(step, name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)
    return len(reader)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / "s", 9)
    check(tmp_path / "s", 9)
    reader = StoreReader(tmp_path / "s")
    assert reader.manifest == {"name": "test", "steps": 9}
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
    import lightning_influence.store as store

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


def test_a_directory_deleted_while_writing_is_loud(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s")
    writer.append(0, {}, {})
    writer.flush()
    shutil.rmtree(tmp_path / "s")
    writer.append(1, {}, {})
    with pytest.raises(LogError, match="could not be written"):
        writer.close()


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
        assert reader.manifest == {"name": "test", "steps": 4}
    except LogError:
        return
    assert path.name == "index.jsonl"
    assert length < 4, "a damaged tail of the index is a shorter log"


def test_hostile_headers_do_not_allocate(tmp_path: Path) -> None:
    write(tmp_path / "s", 1)
    shard = tmp_path / "s" / "rank-0" / "step-00000000.safetensors"
    content = bytearray(shard.read_bytes())
    content[:8] = (2**62).to_bytes(8, "little")
    shard.write_bytes(content)
    with pytest.raises(LogCorrupted, match="impossible length"):
        StoreReader(tmp_path / "s").meta(0)


WRITER = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_store import tensors_of
from lightning_influence.store import StoreWriter
with StoreWriter({path!r}) as writer:
    writer.write_manifest({{}})
    print("ready", flush=True)
    for step in range(100000):
        writer.append(step, tensors_of(step), {{"step": step, "lr": 0.1 / (step + 1)}})
"""


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_writer_leaves_its_complete_steps(seed: int, tmp_path: Path) -> None:
    script = WRITER.format(tests=str(Path(__file__).parent), path=str(tmp_path / "s"))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    time.sleep(random.Random(seed).uniform(0.05, 0.3))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    steps = check(tmp_path / "s")
    with StoreWriter(tmp_path / "s", existing="resume") as writer:
        assert len(writer) == steps
        writer.append(steps, tensors_of(steps), {"step": steps, "lr": 0.1 / (steps + 1)})
    check(tmp_path / "s", steps + 1)
