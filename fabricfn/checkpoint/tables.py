"""What a checkpoint has in it, as a table of its tree. No torch."""

from collections.abc import Iterator, Sequence

from fabricfn.checkpoint.contents import Contents
from fabricfn.checkpoint.format.manifest import MANIFEST, Leaf, Node, plain_value
from fabricfn.checkpoint.listing import plain_text

Row = tuple[str, str, str, str]
"""Name, what it is, bytes, files."""


def table(found: Contents, depth: float) -> str:
    """The lines of a table, this many levels deep; above them who wrote it, and its files."""
    arrays = [leaf for leaf in found.leaves if leaf.dtype]
    total = sum(size for _, size in found.files)
    head = [
        f"{found.path}: {found.writer}",
        f"{len(arrays):,} tensors, {len(found.leaves) - len(arrays):,} other values; {total:,} bytes in"
        f" {len(found.files)} file{'s' * (len(found.files) != 1)}",
    ]
    # the manifest holds no arrays, so it has no number
    names = [(name, size) for name, size in found.files if name != MANIFEST]
    if len(names) > 1:
        width = max(len(name) for name, _ in names)
        head += [f"  {number}: {name:{width}}  {size:>13,} bytes" for number, (name, size) in enumerate(names)]
    rows = list(_rows(found.tree, found.leaves, "", "", depth, len(names) > 1))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    table = [
        f"{name:{widths[0]}}  {what:{widths[1]}}  {size:>{widths[2]}}  {where}".rstrip()
        for name, what, size, where in rows
    ]
    return "\n".join([*head, "", *table])


def _rows(
    node: Node | int | None, leaves: Sequence[Leaf], name: str, indent: str, depth: float, several: bool
) -> Iterator[Row]:
    if node is None:
        return
    if type(node) is int:
        yield indent + (name or "."), *_leaf_row(leaves[node], several)
        return
    assert not isinstance(node, int)
    below = [leaves[number] for number in _numbers(node)]
    if name:
        kind = node.name if node.kind == "record" else f"{node.kind} of {len(node.children)}"
        size = sum(piece.size for leaf in below for piece in leaf.pieces)
        yield indent + name, kind, f"{size:,}" if any(leaf.dtype for leaf in below) else "", ""
        indent += "  "
    if depth > 0:
        for key, child in zip(node.keys or range(len(node.children)), node.children, strict=True):
            yield from _rows(child, leaves, str(key), indent, depth - 1, several)


def _leaf_row(leaf: Leaf, several: bool) -> tuple[str, str, str]:
    if not leaf.dtype:
        if leaf.kind == "object":
            return f"<{leaf.value}>", "", ""
        return f"{plain_text(plain_value(leaf)):.60}", "", ""
    what = f"{leaf.dtype}{list(leaf.shape)}"
    if leaf.alias is not None:
        return what, "0", "the same array as one above"
    files = ", ".join(str(number) for number in sorted({piece.file for piece in leaf.pieces}))
    parts = f"{len(leaf.pieces)} shards" if len(leaf.pieces) > 1 else ""
    where = f"file{'s' * (',' in files)} {files}" if several and files else ""
    return what, f"{sum(piece.size for piece in leaf.pieces):,}", " in ".join(filter(None, (parts, where)))


def _numbers(node: Node | int | None) -> Iterator[int]:
    if isinstance(node, int):
        yield node
    elif node is not None:
        for child in node.children:
            yield from _numbers(child)
