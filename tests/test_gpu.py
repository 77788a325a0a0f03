"""benchmarks/gpu.py, every part of which runs on a CPU too."""

import re

import pytest
from conftest import HERE, python
from PIL import Image


@pytest.mark.slow
def test_every_part_of_the_report_runs_on_a_cpu(tmp_path):
    said = python(HERE / "benchmarks" / "gpu.py", "--tiny", cwd=tmp_path, timeout=600)
    parts = ["machine", "gradients", "steps", "training", "sampling", "two_cards"]
    assert re.findall(r"^## (.*)", said, re.M) == parts and "Traceback" not in said
    assert len(re.findall(r"^\| batch .* \| [\d.]+ \|", said, re.M)) == 8
    assert "| gradient, float32 | relative error 0.0e+00 |" in said
    assert "stopped at step" in said and said.count("is at step 60") == 1
    for kind in ("float32", "float16"):
        assert Image.open(tmp_path / "gpu-report" / f"samples-{kind}.png").width > 64
