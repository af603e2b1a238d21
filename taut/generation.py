"""Text from a prompt: the tokenizer around a compiled engine, with what it took."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any, Protocol

from taut.checkpoint import BadInput, Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from taut.machine import Progress
    from taut.runtime.engine import Engine


@dataclass
class Spent:
    """What a text took. `seconds` are those of the tokens behind the first, which comes with the prompt's."""

    prompt_tokens: int = 0
    tokens: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0
    bytes: float = 0.0
    slack: float | None = None
    compression: float = 1.0
    ended: str = "stop"

    @property
    def tokens_per_second(self) -> float:
        return (self.tokens - 1) / self.seconds if self.tokens > 1 else 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes of weights and caches read a second."""
        return self.bytes / self.seconds if self.tokens > 1 else 0.0

    def as_dict(self) -> dict[str, Any]:
        return vars(self) | {"tokens_per_second": self.tokens_per_second, "bandwidth": self.bandwidth}

    def __str__(self) -> str:
        if self.tokens < 2:
            return f"{self.tokens} tokens"
        said = f"{self.tokens} tokens, {self.tokens_per_second:.1f} tokens/s"
        if not self.bytes:
            return said
        said += f", {self.bandwidth / 1e9:.1f} GB/s"
        said += f" of weights compressed to {self.compression:.0%}, " if self.compression < 1 else ", "
        if self.slack is None:
            return said + "slack not known: run `taut machines --measure` once"
        why = " (a cache helped, or memory was slow when it was measured)" if self.slack < 1 else ""
        return said + f"slack {self.slack:.2f}{why}"


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


@dataclass
class Writer:
    """Writes texts: `stream` yields pieces as they come; `spent` then says what the last one took."""

    engine: Engine
    tokenizer: Tokenizer
    folder: Path
    spent: Spent = field(default_factory=Spent)

    def stream(self, ids: list[int], max_new_tokens: int, **sampling: Any) -> Iterator[str]:
        """Pieces of text. Raises BadInput before the first of them, as `Engine.generate`."""
        tokens = self.engine.generate(ids, max_new_tokens, **sampling)
        self.spent = Spent(len(ids), compression=self.engine.compression)
        return pieces(self._counted(tokens, max_new_tokens), self.tokenizer)

    def _counted(self, tokens: Iterator[int], most: int) -> Iterator[int]:
        spent, begun, first_bytes = self.spent, time.perf_counter(), 0
        for token in tokens:
            now = time.perf_counter()
            if not spent.tokens:
                spent.prompt_seconds, begun, first_bytes = now - begun, now, self.engine.bytes_a_step()
            spent.tokens += 1
            spent.seconds = now - begun
            spent.bytes = (spent.tokens - 1) * (first_bytes + self.engine.bytes_a_step()) / 2
            yield token
        full = self.engine.lengths[0] >= self.engine.max_length
        spent.ended = "length" if spent.tokens == most else "window" if full else "stop"


def pieces(tokens: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text that each token adds; a character of several tokens comes with the last of them."""
    ids: list[int] = []
    start = read = 0
    for token in tokens:
        ids.append(token)
        before, after = tokenizer.decode(ids[start:read]), tokenizer.decode(ids[start:])
        if len(after) > len(before) and not after.endswith("\ufffd"):
            yield after[len(before) :]
            start, read = read, len(ids)
    rest = tokenizer.decode(ids[start:])[len(tokenizer.decode(ids[start:read])) :]
    if rest:
        yield rest


def writer(
    model: str | Path,
    *,
    device: str = "cpu",
    weights: str | None = None,
    max_length: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Writer:
    """A checkpoint, compiled, with its tokenizer. Raises BadInput as `taut.compile`, and without a tokenizer."""
    from taut.runtime.compiling import compile

    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    folder = open_checkpoint(model, **options).path
    tokenizer = tokenizer_of(folder)
    engine = compile(model, device, max_length=max_length, weights=weights, progress=progress, **options)
    return Writer(engine, tokenizer, folder)


def generate(
    model: str | Path, prompt: str, *, chat: bool = False, max_new_tokens: int = 128, **options: Any
) -> Iterator[str]:
    """The text behind a prompt, in pieces as they come.

    `options` are those of `writer` (device, weights, max_length, revision, trust_remote_code, progress) and of
    `Engine.generate` (temperature, top_k, top_p, min_p, seed, stop). `chat` puts the prompt into the model's chat
    template. Raises BadInput with the cause and the cure.
    """
    own = ("device", "weights", "max_length", "revision", "trust_remote_code", "progress")
    made = writer(model, **{name: options.pop(name) for name in own if name in options})
    yield from made.stream(encode(made.folder, made.tokenizer, prompt, chat), max_new_tokens, **options)


def encode(folder: Path, tokenizer: Tokenizer, prompt: str, chat: bool) -> list[int]:
    """Token ids of a prompt. Raises BadInput where there are none, or no chat template in the checkpoint's folder."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of an argument that are no text in the system's encoding
        raise BadInput("the prompt is no text: it cannot be encoded", "set a UTF-8 locale (LC_ALL=C.UTF-8)") from error
    if not chat:
        ids = list(tokenizer.encode(prompt))
    else:
        whole = _transformers_tokenizer(folder)
        if not getattr(whole, "chat_template", None):
            raise BadInput(f"{folder}: the tokenizer has no chat template", "leave --chat out")
        said = whole.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = whole.encode(said, add_special_tokens=False)
    if not ids:
        cause = "the tokenizer knows nothing of the prompt" if prompt else "the prompt is empty"
        raise BadInput(cause, "give other text" if prompt else "give some text with --prompt")
    return ids


def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer in a checkpoint's folder; its tokenizer.json alone if there is one. Raises BadInput without any."""
    if (folder / "tokenizer.json").is_file():
        return _Fast(folder / "tokenizer.json")
    return _transformers_tokenizer(folder)


class _Fast:
    """A tokenizer.json, which needs no transformers."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self.own = Tokenizer.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        return self.own.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self.own.decode(ids)


def _transformers_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(
            f"{folder}: there is no tokenizer that can be read: {first}", "add the tokenizer's files"
        ) from error


def with_transformers(
    checkpoint: Checkpoint,
    ids: list[int],
    tokenizer: Tokenizer,
    max_new_tokens: int,
    spent: Spent,
    device: str = "cpu",
    weights: str | None = None,
    max_length: int | None = None,
    **options: Any,
) -> Iterator[str]:
    """The same from transformers' own generate, for models whose step taut cannot compile.

    Raises BadInput for a checkpoint in taut form, which transformers cannot load, for a model that is not causal, for
    `weights` that it does not have, and for a prompt that leaves no room in `max_length`.
    """
    from taut.coded import DTYPES
    from taut.runtime.runner import check_window

    path, most = checkpoint.path, max_new_tokens
    if weights is not None and weights not in DTYPES:
        raise BadInput(f"transformers, which would generate, has no weights {weights!r}", f"take {', '.join(DTYPES)}")
    if max_length is not None:
        check_window(len(ids), max_length - 1, max_length)
        most = min(most, max_length - len(ids))
    if ((checkpoint.prior.record or {}).get("plan") or {}).get("form") == "taut":
        raise BadInput(f"{path} is in taut form, which transformers cannot load", "generate from the original")
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(options.pop("seed", 0))
    drawn = {name: value for name, value in options.items() if value is not None}
    sampling = {"do_sample": True, **drawn} if drawn.get("temperature") else {"do_sample": False}
    trusted = checkpoint.trust_remote_code
    try:
        dtype = DTYPES[weights] if weights else "auto"
        own: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=trusted).eval()
    except ValueError as error:
        raise BadInput(f"{path}: transformers has no causal language model for it", "name one that is") from error
    own.to(device)
    given = {"inputs": torch.tensor([ids], device=device), "max_new_tokens": most, **sampling}
    tokens = _streamed(lambda streamer: own.generate(**given, streamer=streamer))
    spent.prompt_tokens = len(ids)
    yield from pieces(_timed(itertools.islice(tokens, len(ids), None), most, spent), tokenizer)


def _streamed(run: Callable[[Any], Any]) -> Iterator[int]:
    """The tokens that transformers' generate hands to a streamer, the prompt's first; it runs in a thread."""
    from transformers.generation.streamers import BaseStreamer

    found: Queue[Any] = Queue()

    class Streamer(BaseStreamer):
        def put(self, value: Any) -> None:
            for token in value.flatten().tolist():
                found.put(token)

        def end(self) -> None:
            pass

    def work() -> None:
        try:
            run(Streamer())
            found.put(None)
        except Exception as error:
            found.put(error)

    threading.Thread(target=work, daemon=True).start()
    while isinstance(token := found.get(), int):
        yield token
    if token is not None:
        raise token


def _timed(tokens: Iterator[int], most: int, spent: Spent) -> Iterator[int]:
    begun = time.perf_counter()
    for token in tokens:
        now = time.perf_counter()
        if not spent.tokens:
            spent.prompt_seconds, begun = now - begun, now
        spent.tokens += 1
        spent.seconds = now - begun
        yield token
    spent.ended = "length" if spent.tokens == most else "stop"
