"""The README's Python runs as it stands, from the first block to the last, as a reader would paste it."""

import re

import pytest
from fresh_process import ROOT

import dsconv_cuda
from bench import readme_table

README = (ROOT / "README.md").read_text()


def blocks():
    return re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_every_python_block_runs(capsys):
    assert len(blocks()) >= 5
    names = {}
    for number, block in enumerate(blocks(), 1):
        exec(compile(block, f"README.md, Python block {number}", "exec"), names)
    assert "bytes kept for backward" in capsys.readouterr().out


def test_every_activation_is_named():
    from dsconv_cuda.activations import ACTIVATIONS

    row = next(line for line in README.splitlines() if line.startswith("| activations"))
    for name in ACTIVATIONS:
        assert re.search(rf"\b{name}\b", row), name


def test_every_switch_of_build_and_run_is_named():
    from dsconv_cuda import _build, info

    for name in {*_build.SWITCHES, *info.SWITCHES}:
        assert f"`{name}" in README, name


def test_every_path_in_the_tree_exists():
    tree = README.split("## The source")[1].split("```")[1]
    folder = ROOT
    for line in tree.splitlines():
        indented, first = line.startswith("  "), line.split("  ")[0] or line.strip().split("  ")[0]
        for name in first.split(", "):
            if not indented:
                folder = ROOT / name
            path = folder if not indented else folder / name
            assert list(path.parent.glob(path.name)), path


def test_every_public_name_exists():
    for name in re.findall(r"\bdsconv_cuda\.([A-Za-z_]\w*)", README):
        if name not in ("info", "py"):
            assert hasattr(dsconv_cuda, name), name


def test_the_performance_table_is_that_of_the_committed_run():
    source = ROOT / "bench" / "results" / "quick.json"
    if not source.exists():
        assert "No run is committed yet." in README
        return
    assert readme_table.table(source) in README


def test_writing_the_table_twice_changes_nothing():
    once = readme_table.replace(README, "| a |")
    assert readme_table.replace(once, "| a |") == once
    assert "| a |" in once
    with pytest.raises(ValueError, match="markers"):
        readme_table.replace("no markers", "| a |")
