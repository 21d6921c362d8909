"""What the notebooks share: where things are, and figures that come with words for those who cannot see them."""

import io
import sys
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]
for message in (".*deprecated.*", "IProgress not found"):
    warnings.filterwarnings("ignore", message=message)
torch.manual_seed(0)
torch.set_printoptions(precision=4, sci_mode=False)

COLORS = ["#c62828", "#1565c0", "#2e7d32", "#8e24aa", "#b85a00", "#00798a"]
plt.rcParams.update({"figure.facecolor": "white", "font.size": 9, "axes.titlesize": 10, "axes.grid": False})


def show(fig, alt: str) -> None:
    """Put a figure under the cell, with a text that says what is to be seen on it."""
    fig.savefig(data := io.BytesIO(), format="png", dpi=90, bbox_inches="tight", metadata={"Software": None})
    plt.close(fig)
    show_image(Image.open(data), alt)


def show_image(image: Image.Image, alt: str, width: int | None = None) -> None:
    try:
        from IPython.display import Image as Shown
        from IPython.display import display
    except ImportError:
        return  # run as a script: there is no page to put it on
    image.save(data := io.BytesIO(), "PNG", optimize=True)
    display(Shown(data.getvalue(), alt=alt, width=width))


def table(rows: list[tuple], header: tuple) -> None:
    """Aligned columns, numbers to the right."""
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


def overlay(axes, picture: Image.Image, weights: torch.Tensor, title: str = "") -> None:
    """A picture with weights (rows, columns) over it: bright where they are large, dark elsewhere."""
    weights = weights / weights.max()
    side = Image.fromarray((weights.numpy() * 255).astype("uint8")).resize(
        picture.size, Image.Resampling.BICUBIC
    )
    dark = Image.new("RGB", picture.size, "black")
    axes.imshow(Image.composite(picture, dark, side.point(lambda v: 120 + v * 135 // 255)))
    axes.set_title(title)
    axes.axis("off")


def reference(folder: Path | str = ROOT / "tiny"):
    """transformers' Kosmos-2 with the same weights, in eval mode."""
    from transformers import Kosmos2ForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return Kosmos2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
