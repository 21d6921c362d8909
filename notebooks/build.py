"""Run the notebooks and write them with their outputs: NAME.py -> NAME.ipynb.

    python notebooks/build.py [NAME ...]

The .py files (jupytext's percent format) are the source; edit those. Run nothing else meanwhile: notebook 9 measures
times. A notebook that fails is named on stderr, and the others are still built. Needs requirements-dev.txt.
"""

import argparse
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent


def build(source: Path) -> nbformat.NotebookNode:
    """Run a notebook; ValueError where a cell fails, warns, or shows a path of this machine."""
    notebook = jupytext.read(source)
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    try:
        NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}
        ).execute()
    except CellExecutionError as error:
        raise ValueError(f"{source.name}: {error}") from None
    notebook.metadata.pop("language_info", None)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number:02}", {}
        for output in cell.get("outputs", []):
            output.pop("metadata", None) if output.output_type == "stream" else None
            if output.get("name") == "stderr" or str(HERE.parent) in str(output):
                raise ValueError(f"{source.name}: a cell warns or shows a path of this machine:\n{output}")
    return notebook


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="such as 01_vision; without any: all")
    names = parser.parse_args().names or sorted(path.stem for path in HERE.glob("[0-9]*.py"))
    failed = 0
    for name in names:
        start = time.perf_counter()
        try:
            notebook = build(HERE / f"{Path(name).stem}.py")
        except ValueError as error:
            print(error, file=sys.stderr)
            failed = 1
            continue
        file = HERE / f"{Path(name).stem}.ipynb"
        nbformat.write(notebook, file)
        print(
            f"{file.name}: {time.perf_counter() - start:.0f} s, {file.stat().st_size / 2**20:.2f} MB",
            flush=True,
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
