"""The page: what it shows, that it is safe to open, and what a browser makes of it."""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Iterator
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from modules import Classifier, digits, fit, loader
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_report import images, some_report
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceReport
from lightning_influence.errors import ConfigurationError
from lightning_influence.report.numbers import signed
from lightning_influence.report.rendering import as_html, as_image, default_render, label_of, labels_of


def written(report: InfluenceReport, folder: Path, **options: Any) -> str:
    return report.to_html(folder / "report.html", **options).read_text()


class Outline(HTMLParser):
    """Tags that are opened, and whether all are closed."""

    void = frozenset({"meta", "img", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# -- what is shown ----------------------------------------------------------------------------------------------


def test_page_shows_the_extremes_of_every_query(tmp_path: Path) -> None:
    report = some_report()
    text = written(report, tmp_path / "deep", data=images())
    views = re.split(r'<div class="view"', text.split('id="suspects"')[0])[1:]
    assert len(views) == 4
    for query, view in zip([None, 0, 1, 2], views, strict=True):
        for table in (report.top(8, query), report.bottom(8, query)):
            for row in table.itertuples():
                assert f">sample {row.sample_id}<" in view and signed(row.score) in view
    assert sum(view.count("data:image/png;base64,") for view in views) == 4 * 16
    suspects = text.split('id="suspects"')[1].split('id="scores"')[0]
    assert [int(z) for z in re.findall(r">sample (\d+)<", suspects)] == report.suspects(8).sample_id.tolist()


def test_page_is_whole_and_alone(tmp_path: Path) -> None:
    outline = Outline(written(some_report(), tmp_path, data=images(), queries=images(3)))
    assert outline.open == []
    for tag, attributes in outline.seen:
        assert tag not in ("link", "iframe", "object", "base"), tag
        for name in ("src", "href", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    ids = [a["id"] for _, a in outline.seen if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"] for t, a in outline.seen if t == "a"} <= {f"#{i}" for i in ids}


def test_every_sample_is_in_the_table_with_its_own_numbers(tmp_path: Path) -> None:
    report, data = some_report(), images()
    table = written(report, tmp_path, data=data).split('id="table"')[1].split("</table>")[0]
    rows = [re.findall(r'data-value="([^"]*)"', row) for row in table.split("<tr>")[2:]]
    assert sorted(int(row[0]) for row in rows) == list(range(40))
    for z, label, score, harmed in rows:
        own = report.scores[int(z)]
        assert label == str(int(data[int(z)][1]))
        assert float(score) == pytest.approx(float(own.mean()), rel=1e-5)
        assert float(harmed) == pytest.approx(float((own < 0).sum()) / 3)


def test_groups_are_the_labels_unless_given(tmp_path: Path) -> None:
    report, data = some_report(), images()
    mean = report.scores.double().mean(1)
    for options, names, of in (
        ({}, [str(c) for c in range(10)], data.tensors[1]),
        ({"classes": [f"digit-{c}" for c in range(10)]}, [f"digit-{c}" for c in range(10)], data.tensors[1]),
        ({"groups": ["web" if z % 2 else "book" for z in range(40)]}, ["book", "web"], torch.arange(40) % 2),
    ):
        part = written(report, tmp_path, data=data, **options).split('id="groups"')[1].split("</section>")[0]
        rows = [re.findall(r'data-value="([^"]*)"', row) for row in part.split("<tr>")[2:]]
        assert [row[0] for row in rows] == names
        for i, row in enumerate(rows):
            assert int(row[1]) == int((of == i).sum())
            assert float(row[4]) == pytest.approx(float(mean[of == i].sum()), rel=1e-6)
    assert 'id="groups"' not in written(report, tmp_path)


def test_trust_says_what_is_known_and_what_is_not(tmp_path: Path) -> None:
    report = some_report()
    bare = written(report, tmp_path)
    assert "not measured" in bare and "Estimated from the logged gradients" in bare
    report.metadata |= {
        "coverage": {"fraction": 0.25, "parameters": {"net.0.weight": 0.25}, "excluded": ["head.*"]},
        "replay_drift": {"4": 2e-6, "8": 1e-7},
        "optimizer_assumption": "sgd",
        "errors": {"config": 0.75},
        "ceiling": "0.930 [0.900, 0.950]",
        "conclusion": "Rely on the extremes only.",
        "versions": {"torch": "2.99"},
    }
    text = re.sub(r"\s+", " ", written(report, tmp_path))
    for told in ("25 %", "SGD assumed", "Config error", "75 %", "0.930 [0.900, 0.950]", "Rely on the extremes only."):
        assert told in text, told
    assert "2.0×10⁻⁶" in text and "net.0.weight" in text and "Excluded: head.*" in text and "2.99" in text
    assert "not measured" not in text


def test_a_report_of_one_query_or_of_zeros_is_a_page(tmp_path: Path) -> None:
    one = InfluenceReport.from_rows(torch.arange(3), torch.arange(3), torch.tensor([[1.0], [0.0], [-2.0]]))
    text = written(one, tmp_path)
    assert 'id="view"' not in text and 'id="suspects"' not in text and text.count(">sample 2<") == 1
    zeros = InfluenceReport.from_rows(torch.arange(2), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2))
    text = written(zeros, tmp_path)
    assert "No sample helps." in text and "No sample harms." in text and "nan" not in text


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    report = some_report()
    with pytest.raises(ConfigurationError, match="3 samples, but sample 39"):
        written(report, tmp_path, groups=[1, 2, 3])
    with pytest.raises(ConfigurationError, match="classes has 2 names, but there is a label 2"):
        written(report, tmp_path, data=images(), classes=["zero", "one"])
    with pytest.raises(ConfigurationError, match="7 queries to show for 3 columns"):
        written(report, tmp_path, queries=images(7))


def test_queries_are_shown_in_every_form_that_attribute_takes(tmp_path: Path) -> None:
    class Module(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            raise AssertionError("queries are not training samples")

        def val_dataloader(self) -> Any:
            return DataLoader(images(3), 2)

    report, of_dataset = some_report(), None
    for queries in (
        images(3),
        DataLoader(images(3), 2),
        list(DataLoader(images(3), 2)),
        list(DataLoader(images(3), 1)),
        Module(),
        Module().val_dataloader,
    ):
        text = written(report, tmp_path, queries=queries)
        assert "query 2" in text and of_dataset in (None, text)
        of_dataset = text
    assert of_dataset != written(report, tmp_path), "the examples are shown"
    with pytest.raises(ConfigurationError, match="2 queries to show for 3 columns"):
        written(report, tmp_path, queries=list(DataLoader(images(7), 4)))


def test_an_empty_report_or_one_without_queries_is_a_page(tmp_path: Path) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    for report in (
        InfluenceReport.from_rows(none, none, torch.zeros(0, 1)),
        InfluenceReport.from_rows(none, none, torch.zeros(0, 3)),
        InfluenceReport.from_rows(torch.arange(3), torch.arange(3), torch.zeros(3, 0)),
    ):
        text = written(report, tmp_path, data=images(), groups=[0] * 40)
        for told in (text, report._repr_html_()):
            assert Outline(told).open == [] and "nan" not in told
        assert "No sample helps." in text
        report.plot.histogram(), report.plot.over_time()


def test_metadata_of_another_kind_is_passed_over(tmp_path: Path) -> None:
    report = some_report()
    names = ("coverage", "versions", "errors", "replay_drift")
    for part in (None, "much", ["much"]):
        report.metadata |= dict.fromkeys(names, part)
        assert "InfluenceReport(40 samples" in repr(report)
        assert "40" in written(report, tmp_path) and "40 samples" in report._repr_html_()
    report.metadata["errors"] = {"config": None}
    assert "Config error" not in written(report, tmp_path)


def test_data_is_a_dataset_or_what_holds_one(tmp_path: Path) -> None:
    class Module(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(images(), 4)

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(images())

    report = some_report()
    shown = written(report, tmp_path, data=images(), queries=images(3))
    assert written(report, tmp_path, data=DataLoader(images(), 4), queries=DataLoader(images(3), 1)) == shown
    assert written(report, tmp_path, data=Module(), queries=images(3)) == shown
    assert written(report, tmp_path, data=Stream()) == written(report, tmp_path), "nothing to show of a stream"
    with pytest.raises(ConfigurationError, match="give a LightningDataModule, a DataLoader or a dataset with indices"):
        written(report, tmp_path, data=iter(images()))
    with pytest.raises(ConfigurationError, match="data has 30 samples, but sample 39 is in the report"):
        written(report, tmp_path, data=images(30))
    with pytest.raises(ConfigurationError, match="data has 30 samples, but sample 39 is in the report"):
        report.plot.samples(images(30))
    with pytest.raises(ConfigurationError, match="Stream has no indices"):
        report.plot.samples(Stream())
    assert len(report.plot.samples(DataLoader(images(), 4), k=2).axes) == 4


def test_groups_by_sample_id(tmp_path: Path) -> None:
    report = some_report()
    names = ["web" if z % 2 else "book" for z in range(40)]
    by_id = dict(enumerate(names))
    assert written(report, tmp_path, groups=by_id) == written(report, tmp_path, groups=names)
    del by_id[7]
    with pytest.raises(ConfigurationError, match="groups names 39 samples, but sample 7 is in the report"):
        written(report, tmp_path, groups=by_id)


def totals(report: InfluenceReport, folder: Path, groups: Any) -> dict[str, tuple[int, float]]:
    """Samples and total of each group on the page."""
    part = written(report, folder, groups=groups).split('id="groups"')[1].split("</section>")[0]
    rows = [re.findall(r'data-value="([^"]*)"', row) for row in part.split("<tr>")[2:]]
    return {row[0]: (int(row[1]), float(row[4])) for row in rows}


def test_groups_overlap_and_leave_samples_out(tmp_path: Path) -> None:
    """In every form that `attribute` takes."""
    report = some_report()
    mean = report.scores.double().mean(1)
    groups = {"b": range(5, 20), "a": torch.arange(10), "10": [7], "beyond": [3, 99]}
    found = totals(report, tmp_path, groups)
    assert list(found) == ["10", "a", "b", "beyond"]
    for name, ids in (("a", range(10)), ("b", range(5, 20)), ("10", [7]), ("beyond", [3])):
        assert found[name] == (len(ids), pytest.approx(float(mean[list(ids)].sum()), rel=1e-6)), name
    assert "a sample of several counts in each" in written(report, tmp_path, groups={"a": range(30), "b": range(30)})
    labels = ["first" if z < 10 else None for z in range(40)]
    assert totals(report, tmp_path, labels) == totals(report, tmp_path, {"first": range(10)})
    assert totals(report, tmp_path, torch.arange(40) % 2) == totals(
        report, tmp_path, {"0": range(0, 40, 2), "1": range(1, 40, 2)}
    )


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": [100], "b": [40]}, "groups names samples of which none is in the report"),
        ({}, "names no group"),
        ({"a": 3}, "group 'a' does not hold sample ids"),
        ({"a": "web"}, "group 'a' does not hold sample ids"),
        ({"a": [-1]}, "count from 0"),
        ([None] * 40, "names no group"),
        (["a"] * 39, "groups names 39 samples, but sample 39 is in the report"),
    ],
)
def test_groups_of_nobody_are_refused(groups: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        written(some_report(), tmp_path, groups=groups)


def test_what_users_bring_is_escaped(tmp_path: Path) -> None:
    evil = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>"
    scores = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    report = InfluenceReport.from_rows(
        torch.arange(40),
        torch.arange(40),
        scores,
        query_ids=[evil, "plain"],
        metadata={
            "module": evil,
            "ceiling": evil,
            "conclusion": evil,
            "errors": {evil: 0.1},
            "versions": {evil: evil},
            "coverage": {"fraction": 1.0, "parameters": {evil: 1.0}, "excluded": [evil]},
        },
    )
    data = [{"text": evil, "label": evil}] * 20 + [{"a": evil, evil: 1}] * 20
    text = written(report, tmp_path, data=data, queries=[evil, evil], groups=[evil] * 40, title=evil)
    outline = Outline(text)
    assert sum(tag == "script" for tag, _ in outline.seen) == 1 and not any(tag == "img" for tag, _ in outline.seen)
    assert not any(name.startswith("on") for _, attributes in outline.seen for name in attributes)
    assert Outline(report._repr_html_()).open == []


# -- samples as what they are -----------------------------------------------------------------------------------


def test_images_are_shown_exactly_or_as_thumbnails() -> None:
    render = default_render()
    small = torch.rand(3, 9, 7)
    for sample in ((small, 3), {"image": small}, small, {"pixel_values": small.numpy()}):
        html = as_html(render(sample))
        assert 'class="crisp"' in html
    decoded = Image.open(BytesIO(b64decode(html.split("base64,")[1].split('"')[0])))
    torch.testing.assert_close(
        torch.tensor(np.asarray(decoded)).permute(2, 0, 1) / 255, small, atol=0.5 / 255 + 1e-6, rtol=0
    )
    large = as_html(Image.new("P", (1000, 500)))
    assert 'class="photo"' in large and len(large) < 20_000
    dark = torch.full((1, 5, 5), 0.25)
    assert np.asarray(as_image(dark)).tolist() == [[64] * 5] * 5, "brightness within [0, 1] is left alone"
    assert np.asarray(as_image(torch.tensor([[-1.0, 3.0]] * 4))).tolist() == [[0, 255]] * 4
    assert np.asarray(as_image(torch.full((4, 4), 7, dtype=torch.uint8))).max() == 7


def test_texts_tokens_and_features() -> None:
    class Tokens:
        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode()

    render = default_render(Tokens())
    hello = list(b"hello")
    for sample in ({"input_ids": torch.tensor(hello)}, {"input_ids": hello, "labels": hello}, (torch.tensor(hello), 1)):
        assert render(sample) == "hello"
    assert as_html(default_render()("plain & simple")) == "<pre>plain &amp; simple</pre>"
    assert len(as_html("x" * 5000)) < 700
    row = as_html(default_render()({"age": 31, "income": 1234.5678, "x": 2.0, "label": 1}))
    assert re.findall(r"<th>(.*?)</th><td>(.*?)</td>", row) == [("age", "31"), ("income", "1235"), ("x", "2")]
    many = as_html(default_render()((torch.arange(64.0), 1)))
    assert many.count("<tr>") == 12 and "and 52 more" in many
    with pytest.raises(TypeError, match="render returned int"):
        as_html(3)  # type: ignore[arg-type]


def test_images_of_every_layout_are_images() -> None:
    render = default_render()
    for shape in ((9, 7), (1, 9, 7), (3, 9, 7), (4, 9, 7), (9, 7, 1), (9, 7, 3), (9, 7, 4), (4, 4, 3), (3, 4, 4)):
        channels = [c for c in shape if c in (1, 3, 4)]
        values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        for sample in (values, torch.from_numpy(values), values[..., ::-1, :] if len(shape) == 3 else values[::-1]):
            shown = render((sample, 1))
            assert isinstance(shown, torch.Tensor), shape
            image = as_image(shown)
            assert (
                image.mode
                == {1: "L", 3: "RGB", 4: "RGBA"}[
                    channels[0] if len(shape) == 3 and shape != (4, 4, 3) else 1 if len(shape) == 2 else 3
                ]
            )
    hwc = torch.rand(9, 7, 3)
    assert np.asarray(as_image(hwc)).tolist() == np.asarray(as_image(hwc.permute(2, 0, 1))).tolist()
    assert isinstance(render(np.zeros((8, 8), dtype=">f4")), torch.Tensor), "bytes in another order"
    for mode in ("F", "CMYK", "HSV", "LA", "I;16", "1"):
        assert "base64" in as_html(Image.new(mode, (8, 8))) and "base64" in as_html(Image.new(mode, (80, 80)))
    assert as_html(np.zeros((8, 8, 3), dtype=np.uint8)) == as_html(torch.zeros(3, 8, 8))
    for wrong in (
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, 8, 8),
        torch.zeros(8, 8, dtype=torch.complex64),
        np.array(["a"]),
    ):
        with pytest.raises(TypeError, match="render returned an image of shape"):
            as_html(wrong)


def test_nested_rows_and_batches_of_one() -> None:
    class Tokens:
        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode()

    render = default_render(Tokens())
    hello = torch.tensor([list(b"hello")])
    assert render({"input_ids": hello, "labels": hello}) == "hello" == render(({"input_ids": hello[0]}, 1))
    assert isinstance(render(torch.tensor(3)), dict), "a number is no text"
    image = torch.rand(3, 8, 8)
    assert render({"inputs": {"image": image}, "y": 1}) is image is render(((image, 2), 1))
    row = {"person": {"age": 31, "home": {"city": "Ulm"}}, "label": 1}
    told = [("person.age", "31"), ("person.home.city", "Ulm")]
    assert re.findall(r"<th>(.*?)</th><td>(.*?)</td>", as_html(render(row))) == told
    assert ("a.b", "1") in re.findall(r"<th>(.*?)</th><td>(.*?)</td>", as_html({"a": {"b": 1}}))
    for odd in ((), [2**70, 1, 2], torch.eye(3).to_sparse(), torch.zeros(2, dtype=torch.complex64)):
        assert as_html(render(odd))


def test_rows_of_a_table_and_broken_texts(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {"age": range(40), "job": ["cook"] * 40, "label": [z % 3 for z in range(40)]}, index=range(7, 47)
    )
    text = written(some_report(), tmp_path, data=table)
    best = int(some_report().top(1).sample_id[0])
    card = text.split('<li class="card">')[1].split("</li>")[0]
    assert f"<td>{best}</td>" in card and "<td>cook</td>" in card and f"label {best % 3}<" in card
    assert "a\\ud800b" in written(some_report(), tmp_path, data=["a\ud800b"] * 40)


def test_labels_are_found_where_they_are() -> None:
    samples = ((1, torch.tensor(7)), {"label": "cat"}, (1, np.int64(2)), 3, {"labels": [1, 2]}, (1, torch.ones(4)))
    assert [label_of(sample) for sample in samples] == ["7", "cat", "2", "", "", ""]
    data = images(6)
    assert labels_of(Subset(data, [4, 1])) == [str(int(data[i][1])) for i in (4, 1)]
    assert labels_of(TensorDataset(torch.rand(3, 2), torch.rand(3, 2))) is None
    assert labels_of(["a", "b"]) is None

    class Odd(list):  # type: ignore[type-arg]
        targets: Any = None

    for odd in ({"a": 0}, lambda: 3):
        data = Odd([0])
        data.targets = odd
        assert labels_of(data) is None

    class Folder(list):  # type: ignore[type-arg]
        targets = ("cat", "dog")

    assert labels_of(Folder([0, 0])) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.14, "+0.140"), (-1.5e-7, "−1.50×10⁻⁷"), (123.4, "+123"), (-2.0, "−2.00"), (1e12, "+1.00×10¹²")],
)
def test_numbers_in_print(value: float, text: str) -> None:
    assert signed(value) == text


class Bare(Logger):
    """A logger that takes numbers and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, float] = {}

    name, version = "bare", 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.told |= metrics

    def log_hyperparams(self, *_: Any) -> None: ...


def test_the_callback_writes_the_page_and_logs_it(tmp_path: Path) -> None:
    x, y = digits(60).tensors
    val = DataLoader(TensorDataset(x[40:], y[40:]), 20)
    influence = InfluenceCallback(tmp_path / "log", record="replay", report=True)
    shared = CSVLogger(tmp_path / "tb")  # in the same directory as TensorBoard's
    bare, loggers = Bare(), [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb"), shared]
    train = loader(TensorDataset(x[:40], y[:40]), 8)
    fit(Classifier(), train, influence, val=val, logger=[bare, *loggers], log_every_n_steps=1)
    report = influence.report
    assert report is not None and len(report.sample_ids) == 40
    assert 'id="mislabelled"' in (tmp_path / "log" / "report.html").read_text(), "labels in doubt, from the log"
    assert InfluenceReport.load(tmp_path / "log" / "report.safetensors").scores.shape == (40, 1)
    assert bare.told["influence/most_harmful"] == pytest.approx(float(report.scores.min()))
    assert "influence/most_harmful" in (tmp_path / "csv/lightning_logs/version_0/metrics.csv").read_text()
    for folder in (tmp_path / "csv/lightning_logs/version_0", tmp_path / "tb/lightning_logs/version_0"):
        assert (folder / "report.html").read_text() == (tmp_path / "log" / "report.html").read_text()
        assert pd.read_csv(folder / "influence.csv").sample_id.tolist() == list(range(40))
    events = EventAccumulator(str(tmp_path / "tb/lightning_logs/version_0")).Reload()
    assert set(events.Tags()["images"]) == {"influence/histogram", "influence/over_time"}
    (table,) = events.Tensors("influence/samples/text_summary")
    text = table.tensor_proto.string_val[0].decode()
    rows = re.findall(r"^\| (\d+) \| \S+ \| (\d+) \|", text, re.M)
    assert [int(up) for up, _ in rows] == report.top(10).sample_id.tolist()
    assert [int(down) for _, down in rows] == report.bottom(10).sample_id.tolist()


def test_a_dry_run_is_reported_too(tmp_path: Path) -> None:
    influence = InfluenceCallback(tmp_path / "log", record="replay", report=True)
    fit(Classifier(), loader(digits(8)), influence, val=DataLoader(digits(8), 4), fast_dev_run=True)
    assert influence.report is not None


# -- in a browser -----------------------------------------------------------------------------------------------


class Opened:
    """A page in a browser, with what went wrong in it."""

    def __init__(self, browser: Any, path: Path, width: int = 1100, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 850}, color_scheme=scheme)
        self.problems: list[str] = []
        self.page.on("console", lambda m: self.problems.append(m.text))
        self.page.on("pageerror", lambda e: self.problems.append(str(e)))
        self.page.on("request", lambda r: self.problems.append(r.url) if not r.url.startswith(_LOCAL) else None)
        self.page.goto(path.as_uri())

    def column(self, number: int) -> list[str]:
        cells = self.page.locator(f"#table tbody tr:visible td:nth-child({number})")
        return [str(v) for v in cells.evaluate_all("cells => cells.map(cell => cell.dataset.value)")]


_LOCAL = ("file:", "data:")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return some_report().to_html(tmp_path / "report.html", data=images(), queries=images(3))


def test_a_browser_sorts(browser: Any, path: Path) -> None:
    shown = Opened(browser, path)
    head = shown.page.locator("#table th").nth(2)
    head.locator("button").focus()
    shown.page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    down = [float(v) for v in shown.column(3)]
    assert len(down) == 40 and down == sorted(down, reverse=True)
    shown.page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "ascending"
    assert [float(v) for v in shown.column(3)] == down[::-1]
    for _ in range(2):
        shown.page.locator("#table th button").first.click()
    assert shown.column(1) == [str(z) for z in range(40)], "numbers, not text"
    assert head.get_attribute("aria-sort") is None
    shown.page.locator("#groups th button").nth(4).click()
    totals = shown.page.locator("#groups tbody td:nth-child(5)").evaluate_all("c => c.map(x => +x.dataset.value)")
    assert len(totals) == 10 and totals == sorted(totals, reverse=True)
    assert shown.problems == []


def test_a_browser_searches(browser: Any, path: Path) -> None:
    shown, mean = Opened(browser, path), some_report().scores.mean(1)
    count = shown.page.locator("#count")
    assert count.inner_text() == "40 of 40"
    shown.page.fill("#search", "17")
    assert shown.column(1) == ["17"] and count.inner_text() == "1 of 40"
    shown.page.fill("#search", "nothing like it")
    assert shown.column(1) == [] and shown.page.locator("#nothing").is_visible()
    shown.page.fill("#search", "")
    shown.page.get_by_role("button", name="Harmful", exact=True).click()
    assert {int(z) for z in shown.column(1)} == set((mean < 0).nonzero()[:, 0].tolist())
    card = shown.page.locator("#view-0 .id").first
    wanted = str(card.get_attribute("data-sample"))
    card.click()
    assert shown.column(1) == [wanted] and shown.page.locator("#search").input_value() == wanted
    assert shown.page.evaluate("document.activeElement.id") == "search"
    assert shown.problems == []


def test_a_card_leads_to_its_sample(browser: Any, tmp_path: Path) -> None:
    """Whatever number begins like it, and however small its mean score is in a report of many samples."""
    scores = torch.randn(2500, 4, generator=torch.Generator().manual_seed(0))
    report = InfluenceReport.from_rows(torch.arange(2500), torch.arange(2500) // 8, scores)
    shown = Opened(browser, report.to_html(tmp_path / "many.html"))
    cards = shown.page.locator(".card .id").evaluate_all("cards => cards.map(c => c.dataset.sample)")
    beyond = set(cards) - set(map(str, report.mean.abs().argsort(descending=True)[:1000].tolist()))
    assert beyond
    assert shown.page.locator("#count").inner_text() == "2,500 of 2,500", "all can be found, in the table or not"
    for wanted in [*beyond, min(cards, key=len)]:
        shown.page.locator(f'.card .id[data-sample="{wanted}"]').first.evaluate("card => card.click()")
        assert shown.column(1) == [wanted] and shown.page.locator("#search").input_value() == wanted
    shown.page.fill("#search", "1")
    assert len(shown.column(1)) > 100, "typing searches as before"
    assert shown.problems == []


def test_a_browser_goes_from_query_to_query(browser: Any, path: Path) -> None:
    shown = Opened(browser, path)

    def visible() -> list[str]:
        return [str(v) for v in shown.page.locator(".view:visible").evaluate_all("views => views.map(v => v.id)")]

    shown.page.select_option("#view", "2")
    assert visible() == ["view-2"]
    shown.page.click("#next")
    assert visible() == ["view-3"] and shown.page.locator("#next").is_disabled()
    shown.page.click("#previous")
    assert visible() == ["view-2"]
    assert shown.page.locator("#view-2 .asked img").is_visible()
    assert shown.problems == []


def test_a_phone_and_the_dark(browser: Any, path: Path) -> None:
    papers = []
    for width, scheme in ((360, "light"), (360, "dark"), (1100, "dark")):
        shown = Opened(browser, path, width, scheme)
        assert shown.page.evaluate("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
        inner = (
            "[...document.querySelectorAll('#all .scroll, #groups .scroll')].every(e => e.scrollWidth <= e.clientWidth)"
        )
        assert shown.page.evaluate(inner), "a table is cut off"
        papers.append(shown.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert shown.problems == []
    assert papers[0] != papers[1] == papers[2]


def test_colours_can_be_read(browser: Any, path: Path) -> None:
    """Contrast of at least 4.5 with what is behind, by the formula of WCAG 2.2."""
    for scheme in ("light", "dark"):
        page = Opened(browser, path, scheme=scheme).page
        style = "name => getComputedStyle(document.documentElement).getPropertyValue(name).trim()"
        for ink in ("--ink", "--soft", "--help", "--harm", "--warn"):
            for paper in ("--paper", "--card"):
                bright, faint = sorted((_luminance(page.evaluate(style, name)) for name in (ink, paper)), reverse=True)
                assert (bright + 0.05) / (faint + 0.05) >= 4.5, (scheme, ink, paper)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
