"""benchmarks/gpu.py, every part of which runs on a CPU too."""

import math
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
    assert "| float32 | 0.0e+00 |" in said  # the gradient
    steps = re.findall(r"^\| batch .* \| ([\d.]+) \| ([\d.]+) \| [\d.]+ \|", said, re.M)
    assert len(steps) == 4
    for ms, hours in steps:
        assert float(hours) == pytest.approx(800_000 * float(ms) / 3.6e6, abs=0.01)
    assert len(re.findall(r"^\| train.py, (interrupted|resumed) \| \d+ s \|", said, re.M)) == 2
    kinds = {"torch": 0.03, "float32.onnx": 1e-5, "float16.onnx": 0.01}
    for kind, bound in kinds.items():
        (errors,) = re.findall(rf"^\| {kind} \|((?: [\d.e-]+ \|){{5}})$", said, re.M)
        assert all(0 < float(error) < bound for error in errors.replace("|", "").split())
        name = f"samples-{kind.removesuffix('.onnx')}.png"
        assert Image.open(tmp_path / "gpu-report" / name).width > 64
    draws = re.findall(r"^\| (\S+), batch (\d+) \| ([\d.]+) \| ([\d.]+) \|$", said, re.M)
    assert [kind for kind, *_ in draws] == ["torch", *kinds]
    for _, batch, ms, hours in draws:
        batches = math.ceil(50_000 / int(batch))
        assert float(hours) == pytest.approx(batches * 1000 * float(ms) / 3.6e6, abs=0.01)


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
