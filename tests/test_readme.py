"""The README is correct: paths, commands, outputs and numbers."""

import contextlib
import io
import re
import shlex

import pytest
from conftest import ROOT
from mutations import MUTATIONS

import sample as script
from tokenizer import PROMPTS

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    page: (ROOT / page).read_text(encoding="utf-8")
    for page in ("README.md", "tiny/README.md", "training/README.md")
}


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    folder, text = (ROOT / page).parent, PAGES[page]
    linked = [path for path in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in path]
    named = re.findall(r"(?:python|pip install -q -r) ((?:training/|tests/)?[\w-]+\.(?:py|txt))", text)
    assert linked and named
    assert [path for path in linked if not (folder / path).exists()] == []
    assert [path for path in named if not (ROOT / path).exists()] == []


def commands(text: str) -> list[list[str]]:
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines()
    runs = [re.split(r"\s#|\s>\s", line)[0] for line in lines if "sample.py" in line]
    return [shlex.split(run.split("sample.py", 1)[1]) for run in runs]


def test_example_commands_parse():
    found = [arguments for text in PAGES.values() for arguments in commands(text)]
    assert len(found) >= 10
    for arguments in found:
        assert script.parse_arguments(arguments)


def test_tasks_are_listed_with_their_prompts():
    listed = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", README, re.MULTILINE)
    assert [task for task, _ in listed] == script.TASKS
    assert all(PROMPTS[task] == prompt for task, prompt in listed if task in PROMPTS)


def test_the_number_of_mutations():
    assert f"applies {len(MUTATIONS)} mutations" in README
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
