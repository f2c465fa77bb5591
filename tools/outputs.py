"""Refresh what git keeps of the notebooks' outputs: the checked cells', and the book's picture.

Run by `make outputs`, after the notebooks have been executed; nbstripout then strips the rest.
"""

import base64

import nbformat

import executed
from fresh import ROOT

#: The figure that stands for the book, on its first page and in the README.
PICTURE = ("fig-two-ways", ROOT / "book" / "assets" / "signature.png")


def save_picture(cell) -> None:
    """Write the picture when this is the executed cell that draws it."""
    name, path = PICTURE
    if cell.metadata.get("mystnb", {}).get("figure", {}).get("name") != name:
        return
    images = (output.get("data", {}).get("image/png") for output in cell.outputs)
    path.write_bytes(base64.b64decode(next(image for image in images if image)))
    print(f"  {path.relative_to(ROOT)}")


def main() -> None:
    cache = executed.cache_of(ROOT)
    for path in executed.notebooks(ROOT):
        source = nbformat.read(path, as_version=4)
        result = executed.executed(path, cache)
        for cell, done in zip(source.cells, result.cells, strict=True):
            if cell.cell_type != "code":
                continue
            save_picture(done)
            keep = "keep_output" in cell.metadata.get("tags", ())
            cell.outputs = done.outputs if keep else []
            cell.execution_count = done.execution_count if keep else None
        nbformat.write(source, path)
        print(f"  {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
