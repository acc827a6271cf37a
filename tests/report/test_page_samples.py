"""What the page holds of every sample, and what opens when one is clicked."""

from __future__ import annotations

import base64
import csv
import json
import re
from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_report import images, some_report
from test_report_page import Opened, written
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceReport
from lightning_influence.core.scores import RowScores
from lightning_influence.errors import ConfigurationError
from lightning_influence.report import arrays as module
from lightning_influence.report import page as page_module
from lightning_influence.report.arrays import arrays, packed
from lightning_influence.report.groups import Groups
from lightning_influence.report.numbers import signed
from lightning_influence.report.tokens import TokenScores
from lightning_influence.run.losses import Dynamics
from lightning_influence.trust.dynamics import TrainingDynamics, visit_numbers


def unpacked(part: dict[str, str]) -> list[float]:
    return np.frombuffer(base64.b64decode(part["data"]), dtype="<" + part["type"]).tolist()


def visited(n: int, epochs: int, classes: int = 10) -> TrainingDynamics:
    """Dynamics of samples that are seen in another order in each epoch."""
    g = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.randperm(n, generator=g) for _ in range(epochs)])
    logs = torch.randn(n * epochs, classes, generator=g).mul(2).log_softmax(1)
    labels = ids % classes
    own = logs.gather(1, labels[:, None])[:, 0]
    other = logs.scatter(1, labels[:, None], -torch.inf).max(1)
    visits = Dynamics(-own, own - other.values, own, labels, other.indices, logs.half())
    return TrainingDynamics.of(ids, visit_numbers(ids), visits)


def report_of(n: int, q: int, epochs: int = 1) -> InfluenceReport:
    g = torch.Generator().manual_seed(1)
    ids = torch.cat([torch.randperm(n, generator=g) for _ in range(epochs)]) * 3 + 5
    scores = torch.randn(len(ids), q, generator=g)
    return InfluenceReport.from_rows(ids, torch.arange(len(ids)) // 8, scores)


# -- arrays -----------------------------------------------------------------------------------------------------


def test_vectors_come_back_bit_for_bit() -> None:
    for values in (torch.randn(7), torch.randn(7).double(), torch.tensor([0, 3, 2**31 - 1]), torch.tensor([2**40, 5])):
        assert unpacked(packed(values)) == values.tolist()
    assert packed(torch.arange(3))["type"] == "i4" and packed(torch.tensor([2**40]))["type"] == "f8"


def test_every_sample_has_its_own_numbers() -> None:
    report, order = report_of(20, 3, epochs=2), torch.randperm(20, generator=torch.Generator().manual_seed(2))
    labels = {int(z): f"class {int(z) % 2}" for z in report.sample_ids[:-1]}
    codes = torch.arange(20) % 3
    groups = [(name, (codes == c).nonzero()[:, 0]) for c, name in enumerate("abc")]
    found = arrays(report, order, labels=labels, groups=groups, dynamics=None)
    ids = unpacked(found["ids"])
    assert ids == report.sample_ids[order].tolist() and found["m"] == 20
    assert unpacked(found["score"]) == report.mean[order].float().tolist()
    assert np.reshape(unpacked(found["scores"]), (20, 3)).tolist() == report.scores[order].tolist()
    named = [found["labels"]["names"][int(c)] if c >= 0 else None for c in unpacked(found["labels"]["codes"])]
    assert named == [labels.get(int(z)) for z in ids] and None in named
    assert unpacked(found["groups"]["codes"]) == codes[order].tolist()
    starts, rows = unpacked(found["rows"]["starts"]), report.rows
    for i, z in enumerate(ids):
        own, here = rows.sample_ids == z, slice(int(starts[i]), int(starts[i + 1]))
        assert unpacked(found["rows"]["steps"])[here] == rows.steps[own].tolist()
        assert unpacked(found["rows"]["scores"])[here] == pytest.approx(rows.scores[own].mean(1).tolist(), rel=1e-6)


def test_a_sample_may_be_in_several_groups_or_in_none() -> None:
    report, order = report_of(6, 1), torch.tensor([5, 2, 0, 1, 4, 3])
    found = arrays(report, order, labels={}, groups=[("a", torch.tensor([1, 2, 5])), ("b", torch.tensor([0, 2]))])[
        "groups"
    ]
    starts, codes = unpacked(found["starts"]), unpacked(found["codes"])
    own = [codes[int(a) : int(b)] for a, b in pairwise(starts)]
    assert own == [[0], [0, 1], [1], [0], [], []] and found["names"] == ["a", "b"]
    assert arrays(report, order, labels={})["groups"] is None


def test_every_label_in_doubt_is_known_beyond_the_details(monkeypatch: pytest.MonkeyPatch) -> None:
    dynamics, order = visited(40, 4), torch.arange(39, -1, -1)
    monkeypatch.setattr(module, "_NUMBERS", 50)
    found = arrays(some_report(), order, labels={}, dynamics=dynamics)["dynamics"]
    table = dynamics.suspects(40).set_index("sample_id").loc[order.tolist()]
    assert len(unpacked(found["starts"])) - 1 < 40
    for column in ("suspicion", "loss", "share"):
        assert unpacked(found[column]) == pytest.approx(table[column].tolist(), rel=1e-6)
    assert unpacked(found["suggested"]) == table.suggested.tolist()


def test_losses_are_those_of_the_sample_at_each_visit() -> None:
    dynamics = visited(30, 4)
    ids = torch.tensor([3, 29, 30, 7])  # the run did not see 30
    rows = InfluenceReport.from_rows(ids, torch.arange(4), torch.randn(4, 1))
    found = arrays(rows, torch.arange(4), labels={}, dynamics=dynamics)["dynamics"]
    starts, table = unpacked(found["starts"]), dynamics.suspects(30).set_index("sample_id")
    for i, z in enumerate([3, 7, 29, 30]):
        losses = unpacked(found["losses"])[int(starts[i]) : int(starts[i + 1])]
        assert losses == dynamics.visits.losses[dynamics.owner == z].tolist() and len(losses) == (0 if z == 30 else 4)
        if z != 30:
            assert unpacked(found["suggested"])[i] == table.suggested[z]
            assert unpacked(found["suspicion"])[i] == pytest.approx(table.suspicion[z], rel=1e-6)
    assert unpacked(found["suggested"])[3] == -1


def test_details_are_those_of_the_first_samples_within_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    report, order = report_of(20, 3, epochs=2), torch.arange(19, -1, -1)
    monkeypatch.setattr(module, "_NUMBERS", 36)  # 3 scores and 2 steps with theirs: 7 a sample
    found = arrays(report, order, labels={})
    assert found["m"] == 5 and len(unpacked(found["score"])) == 20
    assert np.reshape(unpacked(found["scores"]), (5, 3)).tolist() == report.scores[order[:5]].tolist()
    assert len(unpacked(found["rows"]["starts"])) == 6


def test_a_large_report_is_a_small_page(tmp_path: Path) -> None:
    """50,000 samples in a few megabytes, all of which are there."""
    n = 50_000
    report = InfluenceReport.from_rows(
        torch.arange(n), torch.arange(n) // 64, torch.randn(n, 16, generator=torch.Generator().manual_seed(0))
    )
    text = written(report, tmp_path)
    assert len(text) < 5e6
    data = json.loads(re.search(r"const data = (\{.*\});", text).group(1))  # type: ignore[union-attr]
    assert sorted(unpacked(data["ids"])) == list(range(n)) and 20_000 < data["m"] < n


# -- in the page ------------------------------------------------------------------------------------------------


def test_labels_in_doubt_are_told_with_what_is_suggested(tmp_path: Path) -> None:
    report, dynamics = some_report(), visited(40, 4)
    text = written(report, tmp_path, data=images(), dynamics=dynamics, classes=[f"digit-{c}" for c in range(10)])
    part = text.split('id="mislabelled"')[1].split("</section>")[0]
    table = dynamics.suspects(8)
    assert [int(z) for z in re.findall(r">sample (\d+)<", part)] == table.sample_id.tolist()
    assert re.findall(r">rather digit-(\d)<", part) == [str(c) for c in table.suggested]
    assert re.findall(r">loss ([\d.]+)<", part) == [f"{loss:.3g}" for loss in table.loss]
    assert 'id="mislabelled"' not in written(report, tmp_path, data=images())


class Unlabelled(list[Any]):
    """Samples whose labels nothing tells without reading them, and the reading is counted."""

    def __init__(self, samples: Any) -> None:
        super().__init__(samples)
        self.read: set[int] = set()

    def __getitem__(self, i: Any) -> Any:
        self.read.add(i)
        return super().__getitem__(i)


def test_labels_are_those_that_were_trained_on_where_the_data_does_not_tell_them(tmp_path: Path) -> None:
    n, dynamics = 1400, visited(1400, 2)
    report = InfluenceReport.from_rows(torch.arange(n), torch.arange(n) // 8, torch.linspace(-1, 2, n)[:, None])
    names = [f"digit-{c}" for c in range(10)]
    data = Unlabelled(torch.rand(n, 8, 8))
    for options in ({"data": data}, {}):
        text = written(report, tmp_path, dynamics=dynamics, classes=names, **options)
        found = json.loads(re.search(r"const data = (\{.*\});", text).group(1))  # type: ignore[union-attr]
        codes = [found["labels"]["names"][int(c)] for c in unpacked(found["labels"]["codes"])]
        assert codes == [f"digit-{int(z) % 10}" for z in unpacked(found["ids"])], "of all samples"
        assert re.findall(r'<option value="\d+">([^<]*)</option>', text) == names, "to filter by"
    assert len(data.read) < n, "no sample is read for its label"
    own = TensorDataset(torch.rand(n, 8, 8), torch.full((n,), 3))
    assert 'class="label">label 3<' in written(report, tmp_path, data=own, dynamics=dynamics), "the data's come first"


def test_samples_of_several_labels_are_doubtful_without_a_suggestion(tmp_path: Path) -> None:
    """As texts are, whose tokens are the labels."""
    seen = visited(40, 2)
    nothing = torch.full_like(seen.visits.labels, -1)
    visits = replace(seen.visits, labels=nothing, others=nothing, log_probabilities=torch.zeros(80, 0))
    dynamics = TrainingDynamics.of(seen.sample_ids[seen.owner], seen.numbers, visits)
    text = written(some_report(), tmp_path, dynamics=dynamics)
    part = text.split('id="mislabelled"')[1].split("</section>")[0]
    assert (
        part.count(">doubtful<") == 8 == part.count(">loss ") and "rather" not in part and 'class="label"' not in part
    )
    table = text.split('id="table"')[1].split("</table>")[0]
    rows = [re.findall(r'data-value="([^"]*)"', row) for row in table.split("<tr>")[2:]]
    assert all(row[1] == row[-2] == "" and float(row[-1]) > 0 for row in rows), "no label, no suggestion, but a loss"


def test_what_to_check_first_is_told_with_loss_and_label(tmp_path: Path) -> None:
    report, dynamics = some_report(), visited(40, 4)
    text = written(report, tmp_path, k=30, data=images(), dynamics=dynamics, classes=[f"digit-{c}" for c in range(10)])
    notes = re.findall(r">(harms [^<]*)</div>", text.split('<section id="suspects">')[1].split("</section>")[0])
    table, first = dynamics.suspects(40).set_index("sample_id"), report.suspects(30)
    for note, row in zip(notes, first.itertuples(), strict=True):
        doubt = table.loc[row.sample_id]
        rather = f", rather digit-{int(doubt.suggested)}" if doubt.suspicion > 0 else ""
        assert note == f"harms {row.harmed:.0%} of the queries, loss {doubt.loss:.3g}{rather}"
    assert 0 < sum("rather" in note for note in notes) < 30
    alone = written(report, tmp_path, k=30, data=images()).split('<section id="suspects">')[1].split("</section>")[0]
    assert re.findall(r">(harms [^<]*)</div>", alone) == [f"harms {h:.0%} of the queries" for h in first.harmed]


def test_the_table_holds_loss_and_suspicion(tmp_path: Path) -> None:
    dynamics = visited(30, 4)  # of 40 samples
    table = dynamics.suspects(30).set_index("sample_id")
    text = written(some_report(), tmp_path, dynamics=dynamics).split('id="table"')[1].split("</table>")[0]
    rows = [re.findall(r'data-value="([^"]*)"', row) for row in text.split("<tr>")[2:]]
    assert len(rows) == 40
    for row in rows:
        z, (suspicion, suggested, loss) = int(row[0]), row[-3:]
        if z >= 30:
            assert suspicion == suggested == loss == ""
            continue
        assert (float(suspicion), float(loss)) == (table.suspicion[z], table.loss[z])
        assert suggested == (str(table.suggested[z]) if table.suspicion[z] > 0 else "")


def test_many_rows_have_a_small_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the table beyond the ones that are shown in full, as far as there is room."""
    n = 1100
    report = InfluenceReport.from_rows(torch.arange(n), torch.arange(n) // 8, torch.linspace(1, 2, n)[:, None])
    data = torch.rand(n, 1, 100, 120, generator=torch.Generator().manual_seed(0))

    def sides() -> list[int]:
        held = written(report, tmp_path, data=list(data)).split('<template id="contents">')[1].split("</template>")[0]
        images = [base64.b64decode(text) for text in re.findall('base64,([^"]*)', held)]
        return [max(Image.open(BytesIO(image)).size) for image in images]

    monkeypatch.setattr(page_module, "_CHARACTERS", 10**8)
    assert sorted(sides()) == [68] * (1000 - 208) + [120] * 208
    monkeypatch.setattr(page_module, "_CHARACTERS", 2_500_000)
    some = sides()
    assert 208 < len(some) < 1000 and some.count(120) == 208
    monkeypatch.setattr(page_module, "_CHARACTERS", 1000)
    assert len(sides()) == 208, "as many as before, small or not"


def test_one_column_says_what_it_does_not_show(tmp_path: Path) -> None:
    told = "leave out <code>target=</code> in <code>attribute</code> for a column of each query"
    for target, name in (("mean", "the mean loss of the queries"), ("weighted sum", "a weighted sum of the queries")):
        one = InfluenceReport.from_rows(
            torch.arange(4), torch.arange(4), torch.ones(4, 1), metadata={"target": target}, query_ids=["mean"]
        )
        text = written(one, tmp_path)
        assert f"One column was asked for ({name})" in text and told in text
        assert "This is the query" not in written(one, tmp_path, queries=images(1)), "one of its queries, perhaps"
    several = some_report()
    several.metadata["target"] = None
    assert told not in written(several, tmp_path)
    single = InfluenceReport.from_rows(torch.arange(4), torch.arange(4), torch.ones(4, 1))
    text = written(single, tmp_path, queries=images(1))
    assert text == written(single, tmp_path, queries=[next(iter(DataLoader(images(1))))]), "or a batch of it"
    assert told not in text and "This is the query (0)." in text, "the only query is shown"


def test_whole_groups_are_told_where_a_report_has_them(tmp_path: Path) -> None:
    report = some_report()
    scores = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, -0.5]])
    rows = RowScores(torch.arange(2), torch.zeros(2, dtype=torch.int64), scores, scores)
    report.groups = Groups(["web", "book"], [30, 10], rows, report.query_ids)
    part = written(report, tmp_path).split('id="groups"')[1].split("</section>")[0]
    found = [re.findall(r'data-value="([^"]*)"', row) for row in part.split("<tr>")[2:]]
    assert [(name, int(n), float(score)) for name, n, score in found] == [("web", 30, 2.0), ("book", 10, -0.5)]
    assert "removed as a whole" in part
    assert part.count("rank only</td>") == 2, "nothing was looked at"
    for bend, reading in ((0.5, "rank only"), (1.5, "nothing")):
        report.groups = Groups(["web", "book"], [30, 10], rows, report.query_ids, bends=[0.01, bend])
        part = written(report, tmp_path).split('id="groups"')[1].split("</section>")[0]
        assert re.findall(r"<td>(a size|rank only|nothing)</td>", part) == ["a size", reading]
    assert all("<button" in head for head in re.findall(r"<th .*?</th>", part)), (
        "the page's script sorts by every heading"
    )


def test_numbers_without_a_tokenizer_suggest_one(tmp_path: Path) -> None:
    report = some_report()
    ids = [{"input_ids": torch.arange(9), "labels": torch.arange(9)} for _ in range(40)]
    assert "tokenizer=" in written(report, tmp_path, data=ids)
    spelt = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    for options in ({"data": ids, "tokenizer": spelt}, {"data": images()}, {"data": ids, "show": str}, {}):
        assert "tokenizer=" not in written(report, tmp_path, **options)


def spelt(tokens: list[int]) -> str:
    return "".join("<&ab"[t] for t in tokens)


def some_tokens() -> TokenScores:
    scores = [torch.tensor([[0.5], [-1.0], [0.25]]), torch.tensor([[2.0], [0.0]])]
    return TokenScores(
        torch.tensor([3, 17]),
        [torch.tensor([0, 1, 2]), torch.tensor([3, 3])],
        [torch.arange(3), torch.arange(2)],
        scores,
    )


def test_texts_are_shaded_by_their_tokens(tmp_path: Path) -> None:
    text = written(some_report(), tmp_path, tokens=some_tokens(), tokenizer=SimpleNamespace(decode=spelt))
    part = text.split('<section id="tokens">')[1].split("</section>")[0]
    found = re.findall(r'<span class="(\w+)" style="--share: ([\d.]+)%" title="([^"]+)">([^<]*)</span>', part)
    assert found == [
        ("help", "35.0", "+0.500", "&lt;"),
        ("harm", "70.0", "−1.00", "&amp;"),
        ("help", "17.5", "+0.250", "a"),
        ("help", "70.0", "+2.00", "b"),
        ("harm", "0.0", "+0.00", "b"),
    ]
    assert [signed(-0.25), signed(2.0)] == re.findall(r'<strong class="number \w+">([^<]+)<', part)
    bare = written(some_report(), tmp_path, tokens=some_tokens())
    assert ">0 </span>" in bare and "tokenizer=" in bare, "token ids as numbers, and what to do about it"
    few = InfluenceReport.from_rows(torch.arange(4), torch.arange(4), torch.randn(4, 1))
    with pytest.raises(ConfigurationError, match="tokens has scores of sample 17, which is not in the report"):
        written(few, tmp_path, tokens=some_tokens())


# -- in a browser -----------------------------------------------------------------------------------------------


def opened(shown: Opened) -> str:
    return str(shown.page.locator("#sample").inner_text())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    report = some_report()
    return report.to_html(tmp_path / "report.html", data=images(), queries=images(3), dynamics=visited(40, 4))


def test_a_row_opens_its_sample(browser: Any, path: Path) -> None:
    report, shown = some_report(), Opened(browser, path)
    assert not shown.page.locator("#sample").is_visible()
    shown.page.locator("#table tbody tr").nth(4).click()
    z = int(shown.column(1)[4])
    text = opened(shown)
    assert f"Sample {z}" in text and signed(float(report.mean[z])) in text and shown.column(1)[4] == str(z)
    titles = shown.page.locator("#sample svg title").all_text_contents()
    assert f"step {z // 8}: {signed(float(report.mean[z]))}" in titles
    assert [t for t in titles if t.startswith("query")] == [
        f"query {k}: {signed(float(report.scores[z, k]))}" for k in range(3)
    ]
    losses = visited(40, 4)
    own = losses.visits.losses[losses.owner == z].tolist()
    assert [float(t.split()[-1]) for t in titles if t.startswith("visit")] == pytest.approx(own, rel=5e-3)
    image = shown.page.locator("#sample-body > .content img").get_attribute("src")
    assert image == shown.page.locator("#table tbody tr img").nth(4).get_attribute("src")
    shown.page.click("#close")
    assert not shown.page.locator("#sample").is_visible()
    assert shown.problems == []


def test_neighbours_have_the_most_similar_scores(browser: Any, path: Path) -> None:
    report, shown = some_report(), Opened(browser, path)
    shown.page.locator("#view-0 .card").first.click()
    z = int(report.top(1).sample_id[0])
    assert f"Sample {z}" in opened(shown)
    unit = torch.nn.functional.normalize(report.scores, dim=1)
    alike = unit @ unit[z]
    alike[z] = -2
    listed = shown.page.locator("#sample [data-open]").evaluate_all("cards => cards.map(c => c.dataset.open)")
    assert [int(i) for i in listed] == alike.argsort(descending=True)[:6].tolist()
    shown.page.locator("#sample [data-open]").nth(2).click()
    assert f"Sample {listed[2]}" in opened(shown) and shown.problems == []


def test_what_a_sample_helps_and_harms(browser: Any, path: Path) -> None:
    report, shown = some_report(), Opened(browser, path)
    z = next(i for i in range(40) if int((report.scores[i] > 0).sum()) == 2)
    shown.page.fill("#search", str(z))
    shown.page.locator("#table tbody tr").first.click()
    for title, sign in (("Helps most", 1), ("Harms most", -1)):
        part = shown.page.locator("#sample .part", has_text=title)
        own = sign * report.scores[z]
        wanted = [int(k) for k in own.argsort(descending=True) if own[k] > 0]
        assert [int(t) for t in re.findall(r"query (\d+)", part.inner_text())] == wanted
        assert part.locator("img").count() == len(wanted), "the queries are shown"


def test_samples_beyond_the_table_are_found_sorted_and_opened(browser: Any, tmp_path: Path) -> None:
    n = 3000
    scores = torch.randn(n, 1, generator=torch.Generator().manual_seed(0))
    report = InfluenceReport.from_rows(torch.arange(n), torch.arange(n) // 8, scores)
    shown = Opened(browser, report.to_html(tmp_path / "many.html", data=list(torch.rand(n, 8, 8))))
    last = int(report.mean.abs().argmin())
    shown.page.fill("#search", str(last))
    assert shown.column(1)[0] == str(last), "the very number comes first"
    assert shown.page.locator("#table tbody tr").first.locator("td").nth(2).inner_text() == signed(float(scores[last]))
    shown.page.locator("#table tbody tr").first.click()
    assert f"It is sample {last} of the training dataset." in opened(shown)
    shown.page.fill("#search", "")
    assert len(shown.column(1)) == 1000
    shown.page.click("#more")
    shown.page.click("#more")
    assert len(shown.column(1)) == n and not shown.page.locator("#more").is_visible()
    for _ in range(2):
        shown.page.locator("#table th button").first.click()
    assert shown.column(1) == [str(z) for z in range(1000)]
    assert shown.problems == []


def test_what_is_found_can_be_downloaded(browser: Any, tmp_path: Path) -> None:
    report, groups = some_report(), ["=web" if z % 2 else "book" for z in range(40)]
    shown = Opened(browser, report.to_html(tmp_path / "r.html", data=[(1.0, g) for g in groups], groups=groups))
    shown.page.select_option("#group", label="=web")
    shown.page.get_by_role("button", name="Harmful", exact=True).click()
    with shown.page.expect_download() as got:
        shown.page.click("#save")
    lines = list(csv.DictReader(Path(got.value.path()).read_text().splitlines()))
    wanted = {z for z in range(40) if z % 2 and report.mean[z] < 0}
    assert {int(line["sample_id"]) for line in lines} == wanted == {int(z) for z in shown.column(1)}
    for line in lines:
        z = int(line["sample_id"])
        assert np.float32(line["score"]) == np.float32(report.mean[z]) and line["label"] == "'=web"
        assert [np.float32(line[str(k)]) for k in range(3)] == report.scores[z].tolist()
    assert [p for p in shown.problems if not p.startswith("blob:")] == []


def test_groups_filter_whoever_is_in_them(browser: Any, tmp_path: Path) -> None:
    report, groups = some_report(), {"few": [3, 5, 8], "some": range(5, 15), "10": [0]}
    shown = Opened(browser, report.to_html(tmp_path / "r.html", groups=groups))
    for name, ids in groups.items():
        shown.page.select_option("#group", label=name)
        assert {int(z) for z in shown.column(1)} == set(ids)
    shown.page.select_option("#group", "")
    for z, told in ((5, "groups\nfew, some\n"), (3, "group\nfew\n"), (39, None)):
        shown.page.fill("#search", str(z))
        shown.page.locator("#table tbody tr").first.click()
        assert told in opened(shown) if told else "group" not in opened(shown)
    assert shown.problems == []


def test_all_labels_in_doubt_are_listed(browser: Any, tmp_path: Path) -> None:
    report, dynamics = some_report(), visited(30, 4)
    names = [f"digit-{c}" for c in range(10)]
    shown = Opened(browser, report.to_html(tmp_path / "r.html", data=images(), dynamics=dynamics, classes=names))
    doubted = dynamics.suspects()
    assert 8 < len(doubted) < 30
    shown.page.fill("#search", "nothing like it")
    shown.page.select_option("#group", label="digit-4")
    assert f"Show all {len(doubted)}" in shown.page.locator("#doubted").inner_text()
    shown.page.click("#doubted")
    assert shown.column(1) == [str(z) for z in doubted.sample_id], "the most suspicious first"
    assert shown.column(6) == [names[c] for c in doubted.suggested]
    with shown.page.expect_download() as got:
        shown.page.click("#save")
    lines = list(csv.DictReader(Path(got.value.path()).read_text().splitlines()))
    for line, row in zip(lines, doubted.itertuples(), strict=True):
        assert int(line["sample_id"]) == row.sample_id and line["suggested"] == names[row.suggested]
        assert np.float32(line["suspicion"]) == np.float32(row.suspicion)
        assert np.float32(line["loss"]) == np.float32(row.loss)
    for name in ("All", "Suspects"):  # which sorts no second time
        shown.page.get_by_role("button", name=name, exact=True).click()
    assert shown.column(1) == [str(z) for z in doubted.sample_id]
    shown.page.get_by_role("button", name="All", exact=True).click()
    assert [int(z) for z in shown.column(1)[30:]] == sorted(range(30, 40), key=lambda z: -abs(float(report.mean[z])))
    with shown.page.expect_download() as got:
        shown.page.click("#save")
    never = [x for x in csv.DictReader(Path(got.value.path()).read_text().splitlines()) if int(x["sample_id"]) >= 30]
    assert [(x["suspicion"], x["suggested"], x["loss"]) for x in never] == [("", "", "")] * 10
    shown.page.locator("#table th button", has_text="loss").click()
    losses = [float(v) for v in shown.column(7) if v]
    assert len(losses) == 30 and losses == sorted(losses, reverse=True)
    assert [p for p in shown.problems if not p.startswith("blob:")] == []


def removed(report: InfluenceReport, members: Any) -> Groups:
    """Groups with known members, whose scores are 1, -2, 3, ..."""
    n = len(members)
    scores = torch.arange(1.0, n + 1)[:, None] * (-1) ** torch.arange(n)[:, None] * torch.ones(1, len(report.query_ids))
    rows = RowScores(torch.arange(n), torch.zeros(n, dtype=torch.int64), scores, scores)
    return Groups(
        list(members), [len(m) for m in members.values()], rows, report.query_ids, None, list(members.values())
    )


def test_the_page_knows_who_was_removed_as_a_whole(browser: Any, tmp_path: Path) -> None:
    report = some_report()
    report.groups = removed(report, {"web": [1, 2, 30], "book": [2, 3], "elsewhere": [77]})
    shown = Opened(browser, report.to_html(tmp_path / "r.html", data=images()))
    headings = shown.page.locator("#group optgroup").evaluate_all("parts => parts.map(part => part.label)")
    assert headings == ["removed as a whole", "labels"]
    for name, ids in (("web", {1, 2, 30}), ("book", {2, 3}), ("elsewhere", set())):
        shown.page.select_option("#group", label=name)
        assert {int(z) for z in shown.column(1)} == ids
    digits = images().tensors[1]
    shown.page.select_option("#group", label="4")
    assert {int(z) for z in shown.column(1)} == set((digits == 4).nonzero()[:, 0].tolist())
    shown.page.select_option("#group", label="book")
    shown.page.locator('#table td:first-child[data-value="2"]').click()
    assert "groups\nweb, book\n" in opened(shown) and shown.problems == []
    labels = {str(c): (digits == c).nonzero()[:, 0].tolist() for c in range(10)}
    report.groups = removed(report, labels)
    text = written(report, tmp_path, data=images())
    assert "<optgroup" not in text and text.count("<option") == 1 + 10 + 4, "once, where the groups are the labels"


def test_what_users_bring_is_text_in_an_opened_sample(browser: Any, tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=document.title='owned'>"
    report = InfluenceReport.from_rows(
        torch.arange(4),
        torch.arange(4),
        torch.randn(4, 2, generator=torch.Generator().manual_seed(0)),
        query_ids=[evil, "b"],
    )
    data = [{"text": evil, "label": evil}] * 4
    path = report.to_html(
        tmp_path / "r.html", data=data, groups=[evil] * 4, queries=data[:2], classes=None, title="safe"
    )
    shown = Opened(browser, path)
    for row in range(4):
        shown.page.locator("#table tbody tr").nth(row).click()
        assert evil in opened(shown)
    assert shown.page.title() == "safe" and shown.problems == []


@pytest.mark.parametrize(
    ("value", "digits"),
    [(0.14, 3), (-1.5e-7, 3), (123.4, 3), (-2.0, 3), (1e12, 3), (0.0, 3), (9.996, 3), (0.00012345, 2)],
)
def test_the_script_prints_numbers_as_python_does(browser: Any, path: Path, value: float, digits: int) -> None:
    assert Opened(browser, path).page.evaluate(f"signed({value!r}, {digits})") == signed(value, digits)


def test_a_text_opens_with_its_tokens(browser: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokens": some_tokens(), "tokenizer": SimpleNamespace(decode=spelt)}
    shown = Opened(browser, some_report().to_html(tmp_path / "r.html", data=["text"] * 40, **options))
    shown.page.locator(".texts > li").nth(1).click()
    assert "Sample 17" in opened(shown) and shown.page.locator("#sample .tokens span").all_inner_texts() == ["b", "b"]
    green, clear = shown.page.locator("#sample .tokens span").evaluate_all(
        "spans => spans.map(s => getComputedStyle(s).backgroundColor)"
    )
    assert green != clear and shown.problems == []


def test_no_table_is_cut_off(browser: Any, tmp_path: Path) -> None:
    report = some_report()
    report.groups = removed(report, {"web": [1, 2, 30], "book": [2, 3]})
    path = report.to_html(tmp_path / "report.html", data=images(), queries=images(3), dynamics=visited(40, 4))
    for width in (360, 1100):
        shown = Opened(browser, path, width=width)
        cut = (
            "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).map(e => e.ariaLabel)"
        )
        assert shown.page.evaluate(cut) == [], width
        assert shown.page.locator("#by-suspicion").is_visible() == (width > 360)
        shown.page.locator("#table tbody tr").first.click()
        assert shown.page.evaluate(cut) == [], f"with a sample opened beside it, {width}"
        assert shown.page.locator("#table th", has_text="suggested").is_visible() and shown.problems == []


def test_a_phone_shows_an_opened_sample(browser: Any, path: Path) -> None:
    shown = Opened(browser, path, width=360)
    shown.page.locator("#view-0 .card").first.click()
    assert shown.page.locator("#sample").is_visible()
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= 360
    assert shown.problems == []
