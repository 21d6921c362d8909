"""Shared by the notebooks: paths, figures with alternative text, tables, the reference."""

import io
import sys
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from matplotlib.colors import LinearSegmentedColormap  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
for message in (".*deprecated.*", "IProgress not found"):
    warnings.filterwarnings("ignore", message=message)
torch.manual_seed(0)
torch.set_printoptions(precision=4, sci_mode=False)

COLORS = ["#c62828", "#1565c0", "#2e7d32", "#8e24aa", "#b85a00", "#00798a"]
plt.rcParams.update({"figure.facecolor": "white", "font.size": 9, "axes.titlesize": 10, "axes.grid": False})


def show(fig, alt: str) -> None:
    """Show a figure below the cell, with an alt text."""
    fig.savefig(data := io.BytesIO(), format="png", dpi=90, bbox_inches="tight", metadata={"Software": None})
    plt.close(fig)
    show_image(Image.open(data), alt)


def show_image(image: Image.Image, alt: str, width: int | None = None) -> None:
    try:
        from IPython.display import Image as Shown
        from IPython.display import display
    except ImportError:
        return  # run as a script
    image.save(data := io.BytesIO(), "PNG", optimize=True)
    display(Shown(data.getvalue(), alt=alt, width=width))


def show_answers(image: Image.Image, *answers) -> None:
    """Show captions as hyperlinks below their image: hovering a phrase highlights its boxes."""
    try:
        from IPython.display import HTML, display
    except ImportError:
        return  # run as a script
    from inference.page import HTML_HEAD, html_figure
    from sample import Request, as_json

    lines = [as_json(Request((), ""), answer, image.size) for answer in answers]
    display(HTML(HTML_HEAD + html_figure(image, lines)))


def table(rows: list[tuple], header: tuple) -> None:
    """Print aligned columns, numbers to the right."""
    cells = [[str(c) for c in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [all(not isinstance(row[i], str) for row in rows) for i in range(len(header))]
    for n, row in enumerate(cells):
        print(
            "  ".join(
                c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)
            ).rstrip()
        )
        if n == 0:
            print("  ".join("-" * w for w in widths))


CLEAR_TO_RED = LinearSegmentedColormap.from_list("clear to red", ["#c6282800", "#c62828ff"])


def overlay(axes, image: Image.Image, weights: torch.Tensor, title: str = "") -> None:
    """A faded image with weights (rows, columns) over it: red where they are large. Each panel is scaled
    to its own maximum."""
    extent = (0, image.width, image.height, 0)
    axes.imshow(image, extent=extent, alpha=0.5)
    axes.imshow(weights, extent=extent, cmap=CLEAR_TO_RED, vmin=0)
    axes.set_title(title)
    axes.axis("off")


def reference(folder: Path | str = ROOT / "tiny"):
    """transformers' Kosmos-2 with the same weights, in eval mode."""
    from transformers import Kosmos2ForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return Kosmos2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
