"""Files from strangers: whatever is in them, an InfluenceError or an answer, within bounds on memory and time."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from modules import Classifier, digits, fit, forged, loader

from lightning_influence import InfluenceCallback, InfluenceReport, attribute
from lightning_influence.errors import InfluenceError
from lightning_influence.log.format import FINAL
from lightning_influence.log.shard import sealed
from lightning_influence.report.files import _TENSORS, FORMAT
from lightning_influence.trust.results import Results

BUDGET = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # to shrink what fails takes no fixed time
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
MEMORY = 2**30
SECONDS = 60  # that one file may take, on a machine that is busy; an honest one takes less than one

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(
        [2**40, -(2**70), 10**400, "fisher", "finite", "rerun", "0.5 [0.1, 0.9]", "=1+1", "\ud800", "<b>"]
    )
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
EDITS = st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=6), st.integers(0, 12)), min_size=1, max_size=4)


def edited(data: bytes, edits: list[tuple[int, bytes, int]]) -> bytes:
    """Each edit puts bytes in the place of some others."""
    for place, new, old in edits:
        at = place % (len(data) + 1)
        data = data[:at] + new + data[at + old :]
    return data


class TooLong(BaseException):
    """No error that the library could take for one of a file's."""


@contextmanager
def bounded() -> Iterator[None]:
    """What would need more memory or time than the bounds fails, with another error than ours."""

    def too_long(*_: Any) -> None:
        raise TooLong(f"took more than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    handler = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def use_report(path: Path) -> None:
    """Everything that can be done with a report alone."""
    with bounded(), suppress(InfluenceError):
        report = InfluenceReport.load(path)
        repr(report), report._repr_html_(), report.suspects(), report.top(3), report.mean
        report.to_html(path.with_suffix(".html"))
        report.to_csv(path.with_suffix(".csv"))
        report.plot.over_time()
        report.save(path.with_suffix(".again"))


def test_the_bound_on_memory_holds() -> None:
    with bounded(), pytest.raises((MemoryError, RuntimeError)):
        torch.zeros(2 * MEMORY, dtype=torch.uint8)


def test_the_bound_on_time_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 0.05)
    with pytest.raises(TooLong, match="more than 0.05 s"), bounded():
        time.sleep(30)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0), "no alarm is left"


# -- reports ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("report") / "report"
    metadata = {"curvature": "fisher", "response": "finite", "errors": {"config": 0.5}, "removals": {"verified": 3}}
    InfluenceReport.from_rows(torch.arange(6), torch.arange(6), torch.randn(6, 2), metadata=metadata).save(path)
    return path.read_bytes()


@BUDGET
@given(edits=EDITS)
def test_edited_reports(report_bytes: bytes, tmp_path: Path, edits: list[tuple[int, bytes, int]]) -> None:
    wrong = edited(report_bytes, edits)
    (tmp_path / "report").write_bytes(wrong)
    use_report(tmp_path / "report")
    if wrong != report_bytes:
        with pytest.raises(InfluenceError):
            InfluenceReport.load(tmp_path / "report")


PARTS = {
    "coverage": ("fraction", "kept", "parameters", "excluded"),
    "removals": ("by", "reason", "verified", "largest_error"),
    "errors": ("config", "system", "=x"),
    "ceiling": ("value", "low", "high"),
    "replay_drift": ("4", "x"),
}
TEXTS = ("versions", "agreement", "conclusion", "module", "curvature", "response", "optimizer", "optimizer_assumption")
METADATA = st.fixed_dictionaries(
    {},
    optional={part: st.dictionaries(st.sampled_from(keys), JSON, max_size=4) | JSON for part, keys in PARTS.items()}
    | dict.fromkeys((*TEXTS, "memory_window", "steps", "target"), JSON),
)
LABELS = st.lists(st.text(max_size=3) | st.integers(), max_size=3)
DTYPES = st.sampled_from(
    [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float64, torch.float32, torch.bfloat16]
)
VALUES = st.sampled_from([0.0, 1.0, -2.5, 1e-30, 1e29, -1e29])
WRONG = st.sampled_from([-1.0, 2.0**39, 2.0**62, -(2.0**63), 1e31, float("inf"), float("nan")])


@st.composite
def forged_tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Half of them as a sweep may give them; in the others one is wrong."""
    n, q = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    tensors = {"sample_ids": torch.arange(n) // 2, "steps": torch.arange(n)}
    for name in ("scores", "tangent", "interaction"):
        tensors[name] = torch.tensor(draw(st.lists(VALUES, min_size=n * q, max_size=n * q))).reshape(n, q)
    if draw(st.booleans()):
        name = draw(st.sampled_from(sorted(tensors)))
        shape = draw(st.sampled_from([(), (n,), (n, q), (0, 2**40), (2**40, 0), (n, q, 1)]))
        tensors[name] = draw(
            st.sampled_from(
                [
                    torch.zeros(shape, dtype=draw(DTYPES)),
                    torch.full_like(tensors[name].double(), draw(WRONG)).to(tensors[name]),
                ]
            )
        )
    return tensors


@settings(BUDGET, max_examples=5)
@given(tensors=forged_tensors())
def test_what_is_forged_has_the_tensors_of_a_report(tensors: dict[str, torch.Tensor]) -> None:
    """Or else it would be refused for those alone."""
    assert tensors.keys() == set(_TENSORS)


@BUDGET
@given(
    tensors=forged_tensors(),
    body=st.fixed_dictionaries({"metadata": METADATA, "query_ids": st.none()})
    | st.fixed_dictionaries({"metadata": METADATA | JSON, "query_ids": JSON | LABELS})
    | JSON,
)
def test_forged_reports(tmp_path: Path, tensors: dict[str, torch.Tensor], body: Any) -> None:
    """Their checksums agree."""
    (tmp_path / "report").write_bytes(sealed(tensors, body, format=FORMAT))
    use_report(tmp_path / "report")


# -- results of check_faithfulness ------------------------------------------------------------------------------

SUBJECT = {"baseline": [1.0, 2.0], "counterfactual": "drop", "target": None, "dtype": "torch.float64"}
WHOLE = [
    {"of": SUBJECT},
    *({"what": what, "removal": str(z), "effect": [0.1, -z]} for what in ("retraining", "ceiling") for z in range(3)),
]


def use_results(path: Path) -> None:
    with bounded(), suppress(InfluenceError):
        results = Results(path, SUBJECT)
        for effects in (results.done("retraining"), results.done("ceiling")):
            assert torch.tensor(list(effects.values()), dtype=torch.float64).isfinite().all()
        results.keep("retraining", "9", [0.0, 0.0])
        assert results.done("retraining")["9"] == [0.0, 0.0]


@BUDGET
@given(edits=EDITS)
def test_edited_results(tmp_path: Path, edits: list[tuple[int, bytes, int]]) -> None:
    data = b"".join(json.dumps(line).encode() + b"\n" for line in WHOLE)
    (tmp_path / "done").write_bytes(edited(data, edits))
    use_results(tmp_path / "done")


LINES = st.fixed_dictionaries(
    {}, optional={"what": st.just("retraining") | JSON, "removal": st.just("3") | JSON, "effect": JSON, "of": JSON}
)


@BUDGET
@given(first=st.just(WHOLE[0]) | st.fixed_dictionaries({"of": JSON}) | JSON, lines=st.lists(LINES | JSON, max_size=3))
def test_forged_results(tmp_path: Path, first: Any, lines: list[Any]) -> None:
    (tmp_path / "done").write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in [first, *lines]))
    use_results(tmp_path / "done")


# -- logs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, Path]:
    module, log = Classifier(width=4), tmp_path_factory.mktemp("log") / "log"
    fit(module, loader(digits(16), 8), InfluenceCallback(log, record="both"))
    return module, log


def use_log(module: Classifier, log: Path) -> dict[str, InfluenceReport]:
    """Scores from what was recorded, and from the run replayed, as far as there are any."""
    state = {name: value.clone() for name, value in module.state_dict().items()}
    asked: dict[str, Any] = {"queries": [digits(4).tensors], "model": module, "target": "mean", "progress": False}
    answers = {}
    for curvature in ("fisher", "hessian"):
        with bounded(), suppress(InfluenceError):
            answers[curvature] = attribute(log, curvature=curvature, **asked)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    return answers


@pytest.fixture(scope="module")
def right(recorded: tuple[Classifier, Path]) -> dict[str, InfluenceReport]:
    """The answers of the log as it was recorded."""
    answers = use_log(*recorded)
    assert len(answers) == 2
    return answers


@settings(BUDGET, max_examples=60)
@given(edits=EDITS, file=st.integers(0, 20))
def test_edited_logs(
    recorded: tuple[Classifier, Path],
    right: dict[str, InfluenceReport],
    tmp_path: Path,
    edits: list[tuple[int, bytes, int]],
    file: int,
) -> None:
    module, whole = recorded
    shutil.rmtree(tmp_path / "log", ignore_errors=True)
    shutil.copytree(whole, tmp_path / "log")
    files = sorted(path for path in (tmp_path / "log").rglob("*") if path.suffix in (".json", ".jsonl", ".safetensors"))
    path = files[file % len(files)]
    path.write_bytes(edited(path.read_bytes(), edits))
    for curvature, answer in use_log(
        module, tmp_path / "log"
    ).items():  # where what was edited says nothing, or says that the run was cut short
        n = len(answer.rows)
        assert n < len(right[curvature].rows) or torch.equal(answer.scores, right[curvature].scores)


@settings(BUDGET, max_examples=80)
@given(place=st.sampled_from(["manifest", "layout", "step", "snapshot-00000000", FINAL]), choices=st.data())
@pytest.mark.filterwarnings("ignore")
def test_forged_logs(recorded: tuple[Classifier, Path], tmp_path: Path, place: str, choices: st.DataObject) -> None:
    """Their checksums agree, and a value somewhere is another."""
    module, whole = recorded
    shutil.rmtree(tmp_path / "log", ignore_errors=True)

    def forge(name: str, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        if name != place:
            return
        if tensors and choices.draw(st.booleans()):
            replace_tensor(tensors, choices)
        else:
            replace_somewhere(meta, choices)

    use_log(module, forged(whole, tmp_path / "log", forge))


def replace_tensor(tensors: dict[str, torch.Tensor], choices: st.DataObject) -> None:
    """Another tensor in the place of one: gone, of another shape or type, or with another value in it."""
    name = choices.draw(st.sampled_from(sorted(tensors)))
    how = choices.draw(st.sampled_from(["gone", "another", "converted", "added", "one value"]))
    if how == "gone":
        del tensors[name]
    elif how == "another":
        shape = choices.draw(st.sampled_from([(), (3,), (0, 2**40), (8, 4), tuple(tensors[name].shape)]))
        tensors[name] = torch.zeros(shape, dtype=choices.draw(DTYPES))
    elif how == "converted":
        tensors[name] = tensors[name].to(choices.draw(DTYPES))
    elif how == "added":
        tensors[f"{name}x"] = torch.zeros(3)
    elif tensors[name].numel():
        values = tensors[name].clone().flatten()
        value = choices.draw(st.sampled_from([-1, 255, 2**39, 2**62, -(2.0**62), 1e31, float("inf"), float("nan")]))
        with suppress(RuntimeError, OverflowError, ValueError):  # another value than the type holds
            values[choices.draw(st.integers(0, len(values) - 1))] = value
        tensors[name] = values.view(tensors[name].shape)


def replace_somewhere(meta: dict[str, Any], choices: st.DataObject) -> None:
    """Another value in the place of one, or of a part of one."""
    key = choices.draw(st.sampled_from(sorted(meta))) if meta else "x"
    if isinstance(meta.get(key), dict) and meta[key] and choices.draw(st.booleans()):
        replace_somewhere(meta[key], choices)
    else:
        meta[key] = choices.draw(JSON)
