"""What the documents say exists: every command's flags, every name of the code, every link."""

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import model
import sample

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted(ROOT.glob("docs/*.md"))]
MARKED = {"run", "tests", "nano", "gallery"}  # blocks of README.md that other programs find by their comment

# Stand-ins for the programs that the documents start. They write their arguments down; srun starts what it is given.
RECORD = '#!/usr/bin/env bash\nprintf "%s\\x1f" "$@" >>"$CALLS"\nprintf "\\x1e" >>"$CALLS"\n'
SRUN = '#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
NOTHING = "#!/usr/bin/env bash\n"
STAND_INS = {
    "python": RECORD,
    "torchrun": RECORD,
    "srun": SRUN,
    "python3": NOTHING,
    "pip": NOTHING,
    "hf": NOTHING,
    "scontrol": NOTHING,
}


def fenced(page, language):
    """The contents of a page's code blocks in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """calls(text): the arguments of every python and torchrun that this bash text starts."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in STAND_INS.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    activate = tmp_path / ".venv/bin/activate"
    activate.parent.mkdir(parents=True)
    activate.write_text("")
    record = tmp_path / "calls"
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(record)}
    monkeypatch.chdir(tmp_path)

    def calls(text):
        record.write_text("")
        subprocess.run(["bash", "-ec", text], env=environment, check=True, capture_output=True)
        return [call.split("\x1f")[:-1] for call in record.read_text().split("\x1e")[:-1]]

    return calls


class Parsed(Exception):
    """Raised as soon as the flags are parsed, so that the script does not run."""


def parse_flags(words, monkeypatch):
    """Run the parser of the script that a command line starts. An unknown flag ends in SystemExit."""
    position = next(i for i, word in enumerate(words) if word.endswith(".py"))
    path = ROOT / words[position]
    assert path.is_file(), words
    if not words[position + 1 :]:
        return  # no flags
    monkeypatch.syspath_prepend(path.parent)
    script = importlib.import_module(path.stem)
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *args, **options):
        parse_args(parser, *args, **options)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", words[position:])
        if hasattr(script, "parse") and script.__name__ != "data":
            script.parse()  # which also checks flags against each other
            return
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(Parsed):
            script.main()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_has_flags_that_its_script_knows(page, calls, monkeypatch):
    for block in fenced(page, "bash"):
        for words in calls(block):
            if any(word.endswith(".py") for word in words):
                parse_flags(words, monkeypatch)


def write_inputs():
    """The files that README's table of orders names, in the working directory."""
    depth = np.linspace(1, 2, 32 * 32, dtype=np.float32).reshape(32, 32)
    millimetres = (1000 * depth).astype(np.uint16)
    measured = np.where(np.arange(32) % 5 == 0, millimetres, 0).astype(np.uint16)
    Image.new("RGB", (32, 32), "gray").save("photo.jpg")
    Image.fromarray(millimetres).save("sketch.png")
    Image.fromarray(measured).save("lidar.png")
    np.save("depth.npy", depth)


def test_every_row_of_the_table_of_orders_is_sampled(tmp_path, monkeypatch):
    table = (ROOT / "README.md").read_text().split("| `python sample.py ...` |")[1].split("\n\n")[0]
    rows = table.splitlines()[2:]
    assert len(rows) >= 9
    monkeypatch.chdir(tmp_path)
    write_inputs()
    for i, row in enumerate(rows):
        flags = shlex.split(row.split(" | ")[1].strip("`"))
        quick = ["--checkpoint", str(ROOT / "assets/nano.pt"), "--count", "1", "--steps", "1", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["sample.py", *flags, *quick, "--out", f"{i}"])
        sample.main()
        assert Path(f"{i}/grid.png").is_file()


def test_an_unknown_flag_is_found(calls, monkeypatch):
    (words,) = calls("for x in 1; do torchrun --nproc-per-node 2 train_t2i.py --no-such-flag $x; done")
    with pytest.raises(SystemExit):
        parse_flags(words, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_of_the_code_and_every_link_exists(page):
    text = page.read_text()
    for module, name in re.findall(r"`(model|data|evaluate|sample)\.(?!py\b|safetensors\b)([A-Za-z_][\w.]*)", text):
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    headings = [re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in text.splitlines()]
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        file, _, anchor = link.partition("#")
        assert (page.parent / file).exists(), link
        assert file or anchor in headings, link
    for test in re.findall(r"`(test_\w+)`", text):
        assert any(f"def {test}(" in path.read_text() for path in (ROOT / "tests").glob("*.py")), test


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_python(page):
    for block in fenced(page, "python"):
        compile(block, page.name, "exec")


def test_readme_is_short_and_keeps_its_marked_blocks():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert set(re.findall(r"^<!-- (\w+) -->\n```bash\n", text, re.MULTILINE)) == MARKED


def test_the_table_of_networks_is_counted():
    """docs/gpu-node.md lists every preset with its parameters and FLOPs."""
    rows = re.findall(
        r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\S+) \| (\S+) \|$",
        (ROOT / "docs/gpu-node.md").read_text(),
        re.M,
    )
    assert {row[0] for row in rows} == set(model.PRESETS)
    for name, width, blocks, patch, size, parameters, gflop in rows:
        config = model.PRESETS[name]
        assert [config.width, config.depth, config.patch, config.size] == [
            int(width),
            int(blocks),
            int(patch),
            int(size),
        ]
        counted, flops = model.training_cost(config, (config.size, config.size))
        unit = {"M": 1e6, "B": 1e9}[parameters[-1]]
        assert counted == pytest.approx(float(parameters[:-1]) * unit, rel=0.04)
        assert flops == pytest.approx(float(gflop) * 1e9, rel=0.02)


def test_results_are_what_the_report_writes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests/claims")
    report = importlib.import_module("report")
    monkeypatch.setattr(report, "chart", lambda *args: None)
    text = (ROOT / "RESULTS.md").read_text()
    sections = [line for number, claim in enumerate(report.CLAIMS, 1) for line in report.section(number, claim)]
    assert report.replace_between(text, "overview", report.overview()) == text
    assert report.replace_between(text, "claims", sections) == text
