"""benchmarks/gpu.py, every part of which runs on a CPU too."""

import re

import pytest
from conftest import HERE, python
from PIL import Image

from benchmarks import gpu


@pytest.mark.slow
def test_every_part_of_the_report_runs_on_a_cpu(tmp_path):
    said = python(HERE / "benchmarks" / "gpu.py", "--tiny", cwd=tmp_path, timeout=600)
    assert re.findall(r"^## (.*)", said, re.M) == [part.__name__ for part in gpu.PARTS]
    assert "failed" not in said and "skipped" not in said
    assert (tmp_path / "gpu-report" / "report.md").read_text() == said
    assert len(re.findall(r"^\| batch .* \| [\d.]+ \|", said, re.M)) == 7
    assert "| float32 | 0.0e+00 |" in said  # the gradient
    assert len(re.findall(r"^\| train.py, (interrupted|resumed) \| \d+ s \|", said, re.M)) == 2
    plain, threaded = re.findall(r"^\| float32, .* \| [\d.]+ \| (-?[\d.]+) \|", said, re.M)
    assert plain == threaded
    for kind in ("float32", "float16"):
        assert Image.open(tmp_path / "gpu-report" / f"samples-{kind}.png").width > 64


def test_failures_and_hanging_programs_leave_the_other_rows(tmp_path, capsys):
    report = gpu.Report(tmp_path, minutes=1)
    report.row("division", lambda: 1 / 0)
    for name, limit, code in (
        ("sleep", 2, "import time; print('begun', flush=True); time.sleep(60)"),
        ("crash", 9, "raise ValueError"),
        ("sum", 9, "print(1 + 1)"),
    ):
        report.row(name, report.program, name, limit, "-c", code)
    report.end = 0
    report.row("late", lambda: "never")
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert lines == capsys.readouterr().out.splitlines()
    assert lines[0] == "| division | failed: ZeroDivisionError: division by zero |"
    assert lines[1].startswith("| sleep | failed: RuntimeError: sleep was stopped after 2 s")
    assert lines[2].startswith("| crash | failed: RuntimeError: crash ended with status 1")
    assert re.fullmatch(r"\| sum \| \d s \| 2 \|", lines[3])
    assert lines[4] == "| late | skipped: no time left |"
    assert report.failed == ["division", "sleep", "crash"]
    assert (tmp_path / "sleep.log").read_text() == "begun\n"
    assert "1 / 0" in (tmp_path / "errors.txt").read_text()
