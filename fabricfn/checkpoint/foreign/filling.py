"""A template meets what another tool wrote: what to read for each place of it, and everything that does not fit."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from fabricfn.checkpoint.foreign.names import Rename, canonical, is_state_dict, only_one, renamed
from fabricfn.checkpoint.foreign.values import Keys, Refused, Stored, read, settled, tensor_text
from fabricfn.checkpoint.format.manifest import path_text
from fabricfn.errors import CheckpointError
from fabricfn.records import Model

Make = Callable[[list[Any]], Any]
"""From the values of all wanted tensors, one value of the result."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the caller says about names and dtypes."""

    prefix: str | None
    rename: Rename | None
    cast: bool
    strict: bool


class Filling:
    """Walks the template, and notes which tensors are wanted and what is wrong."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self.options, self.device = options, device
        self.wants: list[tuple[Stored, torch.Tensor | None, str]] = []
        self.problems: list[str] = []
        self.missing: list[str] = []
        self.rest: list[tuple[Keys, Make]] = []

    def problem(self, keys: Keys, text: str) -> Make:
        """Note what is wrong; the value is never made."""
        self.problems.append(f"{path_text(keys)}: {text}")
        return lambda values: None

    def want(self, stored: Stored, like: torch.Tensor | None, keys: Keys) -> Make:
        """The value of a tensor."""
        self.wants.append((stored, like, path_text(keys)))
        number = len(self.wants) - 1
        return lambda values: values[number]

    def absent(self, like: Any, keys: Keys, instead: str = "") -> Make:
        """What the file does not have."""
        self.missing.append(path_text(keys))
        if self.options.strict:
            self.problem(keys, f"is in the template, not in the file{instead}")
        return lambda values: like

    def further(self, item: Any, keys: Keys) -> None:
        """What the template does not have."""
        if self.options.strict:
            self.problem(keys, "is in the file, not in the template")
        else:
            self.rest.append((keys, self.plain(item, keys)))

    def plain(self, tree: Any, keys: Keys) -> Make:
        """Containers and values as the file has them, tensors on the device."""
        tree = settled(tree)
        if isinstance(tree, dict):
            items = cast("dict[Any, Any]", tree)
            made = {key: self.plain(item, (*keys, key)) for key, item in items.items()}
            return lambda values: {key: make(values) for key, make in made.items()}
        if isinstance(tree, list | tuple):
            row = cast("list[Any]", tree)
            parts = [self.plain(item, (*keys, index)) for index, item in enumerate(row)]
            kind: Any = list if isinstance(tree, list) else tuple
            return lambda values: kind(make(values) for make in parts)
        if type(tree) is Refused:
            return self.problem(keys, f"{tree.text}; leave it out with key=")
        if type(tree) is Stored:
            return self.want(tree, None, keys)
        return lambda values: tree

    def tensor(self, like: torch.Tensor, item: Any, keys: Keys) -> Make:
        """One tensor into the place of another."""
        item = settled(item)
        if type(item) is not Stored:
            text = item.text if type(item) is Refused else f"the template has a tensor, the file a {_kind(item)}"
            return self.problem(keys, text)
        castable = self.options.cast and item.dtype.is_floating_point and like.dtype.is_floating_point
        if item.shape != tuple(like.shape):
            return self.problem(keys, f"the template has {tensor_text(like)}, the file {tensor_text(item)}")
        if item.dtype != like.dtype and not castable:
            more = ". Write cast=True to convert it" if like.dtype.is_floating_point else ""
            return self.problem(keys, f"the template has {tensor_text(like)}, the file {tensor_text(item)}{more}")
        return self.want(item, like, keys)

    def model(self, like: Model, tree: Any, keys: Keys) -> Make:
        """A state dict into a Model, tied names resolved."""
        like.lease.check("Model")
        known = canonical(like)

        def useful(found: Any) -> bool:
            return any(new in known for new in self.names(found, known).values())

        try:
            at, found = only_one(tree, is_state_dict, "a state dict, name -> tensor", useful)
        except CheckpointError as error:
            return self.problem(keys, str(error))
        keys = (*keys, *at)
        items: dict[str, tuple[str, Any]] = {}
        twins: list[tuple[str, Any, str, Any]] = []
        for name, new in self.names(found, known).items():
            target, item = known.get(new), found[name]
            if target is None:
                self.further(item, (*keys, name))
            elif target not in items:
                items[target] = name, item
            else:
                other, first = items[target]
                twins.append((name, item, other, first))
        likes = {**like.params, **like.buffers}
        made = {
            name: self.tensor(value, items[name][1], (*keys, items[name][0])) if name in items
            else self.absent(value, (*keys, name))
            for name, value in likes.items()
        }  # fmt: skip
        agree = [self.twin(*twin, likes, known, keys) for twin in twins]
        params, buffers = tuple(like.params), tuple(like.buffers)

        def make(values: list[Any]) -> Model:
            for check in agree:
                check(values)
            return dataclasses.replace(
                like,
                params={name: made[name](values) for name in params},
                buffers={name: made[name](values) for name in buffers},
            )

        return make

    def names(self, found: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, str]:
        """The file's names as the module has them."""
        return renamed(found, self.options.rename, self.options.prefix, known)

    def twin(
        self,
        name: str,
        item: Any,
        other: str,
        first: Any,
        likes: Mapping[str, Any],
        known: Mapping[str, str],
        keys: Keys,
    ) -> Make:
        """Two names of the file for one tensor of the model: what they hold must be the same bits."""
        new = self.names({name: None, other: None}, known)
        if new[name] == new[other]:
            return self.problem(
                (*keys, name), f"and {other} both become {new[name]}. Say what is meant: prefix=... or rename=..."
            )
        if type(item) is not Stored or type(first) is not Stored or (item.same is not None and item.same == first.same):
            return lambda values: None
        like = likes[known[new[name]]]
        mine = self.tensor(like, item, (*keys, name))
        theirs = self.want(first, like, (*keys, other)) if item.shape == first.shape else self.problem(keys, "")

        def check(values: list[Any]) -> None:
            a, b = (getattr(make(values), "_local_tensor", make(values)) for make in (mine, theirs))
            if not _same_bits(a, b):
                raise CheckpointError(
                    f"{name} and {other} are tied in the model, and have different values in {item.file}. Untie them in"
                    " the module, or leave one of them out with rename=."
                )

        return check


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (value.detach().contiguous().reshape(-1).view(torch.uint8) for value in (a, b))
    return torch.equal(a, b)


def _kind(item: Any) -> str:
    return type(item).__name__


def values_of(filling: Filling, run: Callable[[Callable[[int], Any], list[int]], list[Any]]) -> list[Any]:
    """Read all wanted tensors; what is one array in the file and wanted without a template is one tensor."""
    first: dict[Any, int] = {}
    places: list[int] = []
    for number, (stored, like, _) in enumerate(filling.wants):
        shared = like is None and stored.same is not None
        places.append(first.setdefault((stored.file, stored.same), number) if shared else number)

    def one(number: int) -> torch.Tensor:
        stored, like, what = filling.wants[number]
        return read(stored, like, what, filling.device)

    chosen = sorted(set(places))
    by_number = dict(zip(chosen, run(one, chosen), strict=True))
    return [by_number[place] for place in places]
