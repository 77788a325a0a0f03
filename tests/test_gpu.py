"""benchmarks/gpu.py, every part of which runs on a CPU too."""

import re

import pytest
from conftest import HERE, python

from benchmarks import gpu


@pytest.mark.slow
def test_every_part_of_the_report_runs_on_a_cpu(tmp_path):
    words = "--tiny", "--minutes", 15
    said = python(HERE / "benchmarks" / "gpu.py", *words, cwd=tmp_path, timeout=1000)
    report = tmp_path / "gpu-report"
    assert (report / "report.md").read_text() == said
    assert re.findall(r"^## (.*)", said, re.M) == [part.__name__ for part in gpu.PARTS]
    assert "failed" not in said and "skipped" not in said
    assert {path.suffix for path in report.iterdir()} == {".md", ".txt", ".log"}
    assert "| float32 | 0.0e+00 |" in said  # the gradient
    steps = re.findall(r"^\| batch .* \| ([\d.]+) \| ([\d.]+) \| [\d.]+ \|", said, re.M)
    assert len(steps) == 3
    for ms, hours in steps:
        assert float(hours) == pytest.approx(800_000 * float(ms) / 3.6e6, abs=0.01)
    for kind, bound in {"torch": 0.03, "float32.onnx": 1e-5, "float16.onnx": 0.01}.items():
        (errors,) = re.findall(rf"^\| {kind} \|((?: [\d.e+-]+ \|){{5}})$", said, re.M)
        assert all(float(error) < bound for error in errors.replace("|", "").split())


def test_failures_and_hanging_programs_leave_the_other_rows(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    gpu.row("division", lambda: 1 / 0)
    for name, limit, code in (
        ("sleep", 2, "import time; print('begun', flush=True); time.sleep(60)"),
        ("crash", 60, "raise ValueError"),
        ("sum", 60, "print(1 + 1)"),
    ):
        gpu.row(name, gpu.program, name, "-c", code, limit=limit)
    monkeypatch.setattr(gpu, "END", 0)
    gpu.row("late", lambda: "never")
    said, errors = capfd.readouterr()
    assert (tmp_path / "report.md").read_text() == said
    lines = said.splitlines()
    assert lines[0] == "| division | failed: ZeroDivisionError: division by zero |"
    assert lines[1].startswith("| sleep | failed: RuntimeError: sleep was stopped after 2 s")
    assert lines[2].startswith("| crash | failed: RuntimeError: crash ended with status 1")
    assert re.fullmatch(r"\| sum \| \d+ s \| 2 \|", lines[3])
    assert lines[4] == "| late | skipped: no time left |"
    assert "1 / 0" in errors
