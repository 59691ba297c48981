"""Rows of words as columns."""

from collections.abc import Sequence


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their heads; those whose cells begin with a digit stand to the right."""
    columns = list(zip(heads, *rows, strict=True))
    cells = []
    for column in columns:
        width = max(map(len, column))
        filled = [cell for cell in column[1:] if cell]
        right = bool(filled) and all(cell[0].isdigit() for cell in filled)
        cells.append([cell.rjust(width) if right else cell.ljust(width) for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*cells, strict=True))
