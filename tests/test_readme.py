"""The README is correct: paths, commands, outputs and numbers."""

import contextlib
import io
import re
import shlex

import pytest
from conftest import ROOT
from mutations import MUTATIONS

import sample as script
from inference import batch
from tokenizer import PROMPTS

PAGES = {
    page: (ROOT / page).read_text(encoding="utf-8")
    for page in (
        "README.md",
        "inference/README.md",
        "tests/README.md",
        "tiny/README.md",
        "training/README.md",
    )
}
README = PAGES["README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    folder, text = (ROOT / page).parent, PAGES[page]
    linked = [path for path in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in path]
    scripts = re.findall(r"(?:python|pip install -q -r) ((?:tests/)?[\w-]+\.(?:py|txt))", text)
    modules = [
        name.replace(".", "/") + ".py" for name in re.findall(r"-m ((?:inference|training)\.\w+)", text)
    ]
    assert linked and scripts + modules
    assert [path for path in linked if not (folder / path).exists()] == []
    assert [path for path in scripts + modules if not (ROOT / path).exists()] == []


def commands(name: str) -> list[list[str]]:
    """The arguments of all example commands that call this script or module."""
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", "\n".join(PAGES.values()), re.DOTALL)).splitlines()
    runs = [re.split(r"\s#|\s>\s", line)[0] for line in lines if f"{name} " in f"{line} "]
    return [shlex.split(run.split(name, 1)[1]) for run in runs]


@pytest.mark.parametrize(
    "name, command, least", [("sample.py", script, 10), ("-m inference.batch", batch, 5)]
)
def test_example_commands_parse(name, command, least):
    found = commands(name)
    assert len(found) >= least
    for arguments in found:
        assert command.parse_arguments(arguments)


def test_the_readme_is_short():
    assert len(README.split()) <= 1500


def test_tasks_are_listed_with_their_prompts():
    listed = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", README, re.MULTILINE)
    assert [task for task, _ in listed] == script.TASKS
    assert all(PROMPTS[task] == prompt for task, prompt in listed if task in PROMPTS)


def test_the_number_of_mutations():
    assert f"applies {len(MUTATIONS)} mutations" in PAGES["tests/README.md"]
    files = {file: (ROOT / file).read_text(encoding="utf-8") for _, file, _, _ in MUTATIONS}
    assert [name for name, file, old, _ in MUTATIONS if files[file].count(old) != 1] == []


def test_the_output_of_the_first_command(capsys, tmp_path, monkeypatch):
    expected = re.search(r"<!-- output of: python sample.py -->\n```\n(.*?)```", README, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    assert script.main([]) == 0
    assert capsys.readouterr().out == expected


def test_the_python_example(monkeypatch):
    code, expected = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", README, re.DOTALL).groups()
    monkeypatch.chdir(ROOT)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    assert out.getvalue() == expected
