"""benchmarks/gpu.py, every part of which runs on a CPU too, and what other benchmarks save."""

import math
import os
import re
import runpy
import sys

import pytest
import torch
from conftest import HERE, python
from PIL import Image

from benchmarks import compare, gpu, table2


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


@pytest.fixture
def page(monkeypatch, tmp_path):
    """Where a benchmark saves its page, on a machine without what macOS and Windows lack."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--out", str(tmp_path / "page.md")])
    return tmp_path / "page.md"


def fail(*_):
    raise ZeroDivisionError


def test_comparison_saves_each_table_before_the_next(page, monkeypatch):
    monkeypatch.setattr(compare, "matmul_flops", lambda _: 1.0)
    monkeypatch.setattr(compare.export, "write_onnx", lambda *_: None)
    monkeypatch.setattr(compare, "training_table", lambda *_: "the first table")
    monkeypatch.setattr(compare, "network_table", fail)
    with pytest.raises(ZeroDivisionError):
        compare.main()
    assert page.read_text().endswith("the first table")


def test_on_rocm_onnx_runtime_has_only_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for hip, kind in ((None, "cuda"), ("7.1", "cpu")):
        monkeypatch.setattr(torch.version, "hip", hip)
        assert runpy.run_path(compare.__file__)["ONNX"] == kind


def test_memory_is_measured_before_the_times_and_not_on_a_mac(page, monkeypatch):
    """There, no /proc says it."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(compare, "read_folder", lambda *_: [compare.np.zeros(1)])
    for name in ("train_py", "diffusers_loop"):
        monkeypatch.setattr(compare, name, lambda *_: lambda: None)
    monkeypatch.setattr(compare, "lucidrains_loop", lambda *_: (lambda: None, 1, 1))
    monkeypatch.setattr(compare, "in_turn", lambda steps, *_, **__: dict.fromkeys(steps, 1.0))
    monkeypatch.setattr(compare, "peak_memory", fail)
    assert compare.training_table(page, 1, 1, 1.0).count(" |  |\n") == 4
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(compare, "in_turn", None)
    with pytest.raises(ZeroDivisionError):
        compare.training_table(page, 1, 1, 1.0)


def test_table2_saves_each_row_before_the_next(page, monkeypatch):
    def train_and_judge(predicts, *_):
        return {"right": 7, "bits": 2.5} if predicts == "mean" else fail()

    monkeypatch.setattr(table2, "train_and_judge", train_and_judge)
    with pytest.raises(ZeroDivisionError):
        table2.main()
    assert page.read_text().count("| 7, 7, 7 | 2.50, 2.50, 2.50 (mean 2.50) |") == 2
