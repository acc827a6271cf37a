"""The ids that a reader downloads from the page are those that the command line leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from modules import fit
from test_cli import Digits, Net

from lightning_influence import InfluenceCallback, InfluenceReport
from lightning_influence.cli import main


def test_the_table_that_is_downloaded_is_cleaned(
    browser: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, scores, page = tmp_path / "log", tmp_path / "s.safetensors", tmp_path / "r.html"
    fit(Net(), Digits().train_dataloader(), InfluenceCallback(log, record="replay"))
    known = ["--model=test_cli.Net", "--data=test_cli.Digits", "--progress=false"]
    assert main(["attribute", str(log), *known, "--curvature=none", f"--out={scores}"]) == 0
    assert main(["report", str(scores), "--data=test_cli.Digits", f"--out={page}"]) == 0
    shown = browser.new_page()
    shown.goto(page.as_uri())
    shown.get_by_role("button", name="Harmful", exact=True).click()
    with shown.expect_download() as got:
        shown.click("#save")
    got.value.save_as(tmp_path / "found.csv")
    shown.close()
    capsys.readouterr()
    assert main(["clean", f"--log={log}", *known, f"--samples={tmp_path / 'found.csv'}", "--dry_run=true"]) == 0, (
        capsys.readouterr().err
    )
    left_out = capsys.readouterr().out.rstrip().rsplit("\n", 1)[1].removeprefix("left out: ").split()
    report = InfluenceReport.load(scores)
    assert {int(z) for z in left_out} == set(report.sample_ids[report.mean < 0].tolist())
    assert 0 < len(left_out) < 40
