"""What a checkpoint has in it, as a table of its tree. No torch."""

from collections.abc import Iterator

from fabricfn.checkpoint.contents import Contents
from fabricfn.checkpoint.format.manifest import MANIFEST, Leaf, Node, path_text, paths_of, plain_value
from fabricfn.checkpoint.listing import plain_text

Row = tuple[str, str, str, str]
"""Name, what it is, bytes, files."""


def table(found: Contents, depth: float) -> str:
    """The lines of a table, this many levels deep; above them who wrote it, and its files."""
    num_arrays = sum(1 for leaf in found.leaves if leaf.dtype)
    total = sum(size for _, size in found.files)
    head = [
        f"{found.path}: {found.writer}",
        f"{num_arrays:,} tensors, {len(found.leaves) - num_arrays:,} other values; {total:,} bytes in"
        f" {len(found.files)} file{'s' * (len(found.files) != 1)}",
    ]
    # the manifest holds no arrays, so pieces do not count it
    files = [(name, size) for name, size in found.files if name != MANIFEST]
    if len(files) > 1:
        width = max(len(name) for name, _ in files)
        head += [f"  {number}: {name:{width}}  {size:>13,} bytes" for number, (name, size) in enumerate(files)]
    rows = list(_Table(found, len(files) > 1).rows(found.tree, "", "", depth))
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines = (f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows)
    return "\n".join([*head, "", *lines])


class _Table:
    def __init__(self, found: Contents, several: bool) -> None:
        self.leaves, self.several = found.leaves, several
        self.paths = paths_of(found.tree)

    def rows(self, node: Node | int | None, name: str, indent: str, depth: float) -> Iterator[Row]:
        """The rows of a node and what is below it."""
        if type(node) is int:
            yield indent + _printable(name or "."), *self.leaf(self.leaves[node])
        if type(node) is not Node:
            return
        if name:
            below = [self.leaves[number] for number in paths_of(node)]
            kind = _printable(node.name) if node.kind == "record" else f"{node.kind} of {len(node.children)}"
            size = f"{sum(map(_bytes, below)):,}" if any(leaf.dtype for leaf in below) else ""
            yield indent + _printable(name), kind, size, ""
            indent += "  "
        if depth > 0:
            for key, child in zip(node.keys or range(len(node.children)), node.children, strict=True):
                yield from self.rows(child, str(key) or "''", indent, depth - 1)

    def leaf(self, leaf: Leaf) -> tuple[str, str, str]:
        """What it is, its bytes, where they are."""
        if leaf.kind == "object":
            return f"<{_printable(leaf.value)}>", "", ""
        if not leaf.dtype:
            return f"{plain_text(plain_value(leaf)):.60}", "", ""
        what = f"{leaf.dtype}{list(leaf.shape)}"
        if leaf.alias is not None:
            return what, "0", f"the same array as {_printable(path_text(self.paths[leaf.alias]))}"
        numbers = sorted({piece.file for piece in leaf.pieces})
        shards = f"{len(leaf.pieces)} shards" if len(leaf.pieces) > 1 else ""
        where = f"file{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}" if self.several and numbers else ""
        return what, f"{_bytes(leaf):,}", " in ".join(filter(None, (shards, where)))


def _bytes(leaf: Leaf) -> int:
    return sum(piece.size for piece in leaf.pieces)


def _printable(text: str) -> str:
    """A name of a stranger's file holds no escape sequences for the terminal."""
    return text if text.isprintable() else repr(text)[1:-1]
