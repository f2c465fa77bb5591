"""Refresh the outputs that git keeps: those of the cells tagged `keep_output`.

Run by `make outputs`, after the notebooks have been executed; nbstripout then strips the rest.
"""

import nbformat

import executed
from fresh import ROOT


def main() -> None:
    cache = executed.cache_of(ROOT)
    for path in executed.notebooks(ROOT):
        source = nbformat.read(path, as_version=4)
        result = executed.executed(path, cache)
        for cell, done in zip(source.cells, result.cells, strict=True):
            if cell.cell_type != "code":
                continue
            keep = "keep_output" in cell.metadata.get("tags", ())
            cell.outputs = done.outputs if keep else []
            cell.execution_count = done.execution_count if keep else None
        nbformat.write(source, path)
        print(f"  {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
