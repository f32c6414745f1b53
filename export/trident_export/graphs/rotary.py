"""Rotary embeddings that the attention operator computes, where the model's are ones that it knows.

transformers' models rotate queries and keys with a function of their own module, `apply_rotary_pos_emb`, by cosines
and sines that a rotary module computes from positions. A first run with numbers shows, call by call, whether the
function did what the operator does with `do_rotary`: rotate the first numbers of each head as two halves (Su et al.,
RoFormer, 2021, in GPT-NeoX's layout), or pair by pair (in GPT-J's). While the model is traced, such a call hands
queries and keys on unchanged. Every call is looked at by itself: some models rotate with other frequencies in some
layers, and not at all in others. Heads of a size that the operator refuses are rotated by the graph.

Longrope has two rotations: one of texts within the model's original context, and one of texts that go beyond it,
whose every token it rotates. Where a graph is for both, its tables hold the rows of the first one and then those of
the second, and each token says which rotation it has; the engine runs a text again that grows beyond the original
context (decision 0040). Dynamic scaling has a rotation for every length, and is served within the original context.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FUNCTION = "apply_rotary_pos_emb"
_COMPLEX_FUNCTION = "apply_rotary_emb"
MULTIPLE = 16  # of a head's size and of its rotated numbers, which the operator wants if it rotates

Tables = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, repr=False, eq=False)  # the exporter writes arguments of an operator into names
class Rotation:
    """What the operator needs to rotate.

    Attributes:
        cos: float32 [positions, rotated numbers of a head / 2], and `sin` too.
        interleaved: pairs are neighbours, not numbers of two halves.
        by_row: the tables hold more than one rotation, and a token's row is not its position.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool
    by_row: bool


@dataclass
class Watched:
    """Calls of the model's rotating function in a run with numbers.

    Attributes:
        places: rows of the run's tokens in the tables, int64 [tokens]; their positions, but for a second rotation.
        positions: how many rows the tables have.
        by_row: see `Rotation`.
        rotations: for each call what the operator would need to do the same, or None.
    """

    places: torch.Tensor
    positions: int
    by_row: bool = False
    rotations: list[Rotation | None] = field(default_factory=list)
    _results: list[Tables] = field(default_factory=list)
    _tables: list[Tables] = field(default_factory=list)

    def call_of(self, query: torch.Tensor, key: torch.Tensor) -> int | None:
        """The call whose results these heads begin with; None where there is none or the operator can't do it."""
        for call, results in enumerate(self._results):
            if self.rotations[call] is not None and all(map(_begins, (query, key), results)):
                return call
        return None

    def rotate(self, function: Callable[..., Tables], *arguments: Any, **options: Any) -> Tables:
        """Call the function, and note what it did."""
        result = function(*arguments, **options)
        self._results.append(result)
        self.rotations.append(self._rotation(arguments, result))
        return result

    def add_tables(self, module: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Cosines and sines of all positions as a rotary module gives them."""
        places = torch.arange(self.positions)[None]
        options = {name: places if name == "position_ids" else value for name, value in options.items()}
        arguments = (arguments[0], places, *arguments[2:]) if len(arguments) > 1 else arguments
        try:
            cos, sin = module.forward(*arguments, **options)  # not the module itself: its hook is what calls this
        except Exception:  # one that is called in another way is traced
            return
        if cos.ndim == 3:
            self._tables.append((cos[0].float(), sin[0].float()))

    def _rotation(self, arguments: tuple[Any, ...], result: Tables) -> Rotation | None:
        if len(arguments) < 4 or any(not isinstance(value, torch.Tensor) for value in arguments[:4]):
            return None
        query, key, cos, sin = arguments[:4]
        size = cos.shape[-1]
        if query.ndim != 4 or cos.ndim != 3 or size % MULTIPLE or query.shape[-1] % MULTIPLE:
            return None
        for table_cos, table_sin in self._tables:
            if not torch.equal(table_cos[self.places], cos[0]) or not torch.equal(table_sin[self.places], sin[0]):
                continue
            for interleaved in (False, True):
                for columns in (slice(0, size // 2), slice(0, size, 2)):
                    half = cos[0, :, columns], sin[0, :, columns]
                    expected = (_rotated(tensor, *half, interleaved=interleaved) for tensor in (query, key))
                    if all(torch.allclose(a, b, atol=1e-5) for a, b in zip(result, expected, strict=True)):
                        found = [table[:, columns].contiguous() for table in (table_cos, table_sin)]
                        return Rotation(found[0], found[1], interleaved, self.by_row)
        return None


@contextmanager
def watched(model: PreTrainedModel, places: torch.Tensor, positions: int, *, by_row: bool = False) -> Iterator[Watched]:
    """While this holds, one run of the model with tokens at these places is noted; see `Watched`."""
    seen = Watched(places, positions, by_row)

    def hook(module: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        if isinstance(output, tuple) and len(output) == 2:
            seen.add_tables(module, arguments, options)

    with ExitStack() as stack:
        for module in _modules(model):
            stack.enter_context(_removed(module.register_forward_hook(hook, with_kwargs=True)))
        stack.enter_context(_replaced(model, lambda function: lambda *a, **o: seen.rotate(function, *a, **o)))
        yield seen


@contextmanager
def left_to_operator(model: PreTrainedModel, calls: set[int]) -> Iterator[None]:
    """While this holds, these calls of the rotating function in each run hand queries and keys on unchanged."""
    made = 0

    def replace(function: Callable[..., Tables]) -> Callable[..., Tables]:
        def call(*arguments: Any, **options: Any) -> Tables:
            nonlocal made
            made += 1
            return (arguments[0], arguments[1]) if made - 1 in calls else function(*arguments, **options)

        return call

    def restart(*_: Any) -> None:
        nonlocal made
        made = 0

    with _removed(model.register_forward_pre_hook(restart)), _replaced(model, replace):
        yield


def longest_context(model: PreTrainedModel) -> int | None:
    """Positions up to which the frequencies of dynamic scaling stay the same; None where the model has none."""
    return _limit(model, "dynamic")


def original_context(model: PreTrainedModel) -> int | None:
    """Tokens of a text up to which longrope has its first rotation; None where the model has none."""
    return _limit(model, "longrope")


def _limit(model: PreTrainedModel, kind: str) -> int | None:
    config = model.config.get_text_config()
    settings = getattr(config, "rope_parameters", None) or {}
    each = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    variable = [value for value in each if value.get("rope_type") == kind]
    limits = [value.get("original_max_position_embeddings") for value in variable]
    if variable and None in limits:
        limits.append(getattr(config, "max_position_embeddings", None))
    return min((int(limit) for limit in limits if limit), default=None)


@contextmanager
def with_fixed_frequencies(model: PreTrainedModel) -> Iterator[None]:
    """While this holds, rotary modules don't look at the length of a text."""
    with ExitStack() as stack:
        for module in _modules(model):
            forward = type(module).forward
            if inspect.unwrap(forward) is not forward:
                module.forward = partial(inspect.unwrap(forward), module)
                stack.callback(vars(module).pop, "forward", None)
                if hasattr(module, "original_inv_freq"):
                    module.inv_freq = module.original_inv_freq
        yield


@contextmanager
def with_both_rotations(model: PreTrainedModel, original: int, positions: int) -> Iterator[None]:
    """While this holds, rotary modules take rows of tables in place of positions.

    The first `original` rows are positions of a text of at most so many tokens, the others those of a longer one.

    Args:
        positions: how many positions the second part has, more than `original`.
    """
    with ExitStack() as stack:
        for module in _modules(model):
            module.forward = _Rows(module.forward, original, positions)
            stack.callback(vars(module).pop, "forward", None)
        yield


class _Rows:
    """A rotary module's function over rows. Its tables are made at its first call, which must not be traced."""

    def __init__(self, forward: Callable[..., Tables], original: int, positions: int) -> None:
        self._forward = forward
        self._lengths = (original, positions)
        self._tables: dict[Any, Tables] = {}

    def __call__(self, numbers: torch.Tensor, position_ids: torch.Tensor, *more: Any, **options: Any) -> Tables:
        key = (more, tuple(sorted(options.items())))  # the type of a layer, where types differ
        if key not in self._tables:
            each = [self._forward(numbers, torch.arange(n)[None], *more, **options) for n in self._lengths]
            cos, sin = (torch.cat([part[0].float() for part in parts]) for parts in zip(*each, strict=True))
            self._tables[key] = cos, sin
        cos, sin = self._tables[key]
        return cos[position_ids], sin[position_ids]


def _modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]


@contextmanager
def without_complex_numbers(model: PreTrainedModel) -> Iterator[None]:
    """While this holds, models that rotate by multiplying complex numbers, which ONNX lacks, compute the same in pairs.

    Their rotary modules then give cosines and sines as [batch, positions, size / 2, 2].
    """
    rotary = _modules(model)
    files = {type(module).__module__: sys.modules[type(module).__module__] for module in rotary}
    with ExitStack() as stack:
        for name, file in files.items():
            function = getattr(file, _COMPLEX_FUNCTION, None)
            if function is None or "freqs_cis" not in inspect.signature(function).parameters:
                continue
            setattr(file, _COMPLEX_FUNCTION, partial(_rotate_pairs, _puts_heads_first(function)))
            stack.callback(setattr, file, _COMPLEX_FUNCTION, function)
            for module in rotary:
                if type(module).__module__ == name:
                    module.forward = partial(_cos_and_sin, module)
                    stack.callback(vars(module).pop, "forward", None)
        yield


def _cos_and_sin(module: Any, numbers: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    angles = position_ids[..., None].float() * module.inv_freq.float()
    return torch.stack((angles.cos(), angles.sin()), -1) * float(module.attention_scaling)


def _rotate_pairs(heads_first: bool, query: torch.Tensor, key: torch.Tensor, freqs_cis: torch.Tensor) -> Tables:
    table = freqs_cis.unsqueeze(1 if heads_first else 2)
    cos, sin = table[..., 0], table[..., 1]

    def turned(tensor: torch.Tensor) -> torch.Tensor:
        first, second = tensor[..., ::2], tensor[..., 1::2]
        return torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)

    return turned(query), turned(key)


def _puts_heads_first(function: Callable[..., Any]) -> bool:
    """Whether such a function takes [batch, heads, positions, size], not [batch, positions, heads, size]."""
    heads = torch.zeros(1, 2, 3, 4)
    try:
        function(heads, heads, torch.zeros(1, 3, 2, dtype=torch.complex64))
    except RuntimeError:
        return False
    return True


@contextmanager
def _replaced(model: PreTrainedModel, make: Callable[[Callable[..., Tables]], Callable[..., Tables]]) -> Iterator[None]:
    names = sorted({type(module).__module__ for module in model.modules()})
    modules = [sys.modules[name] for name in names if hasattr(sys.modules[name], FUNCTION)]
    before = [getattr(module, FUNCTION) for module in modules]
    for module, function in zip(modules, before, strict=True):
        setattr(module, FUNCTION, make(function))
    try:
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            setattr(module, FUNCTION, function)


@contextmanager
def _removed(hook: Any) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()


def _begins(heads: torch.Tensor, numbers: torch.Tensor) -> bool:
    size = numbers.shape[-1]
    return heads.shape[:-1] == numbers.shape[:-1] and torch.equal(heads[..., :size], numbers)


def _rotated(tensor: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """What the operator does: the first numbers of a head are rotated, the others kept."""
    half = cos.shape[1]
    turned, rest = tensor[..., : 2 * half], tensor[..., 2 * half :]
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
        return torch.cat(
            (torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2), rest), -1
        )
    first, second = turned[..., :half], turned[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
