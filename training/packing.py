"""From documents to contexts: tokenised in batches and packed without padding."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from saesteer.errors import TextError

_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 512, 1 << 18
# A tokenizer needs about 100 bytes a character while it works, so longer documents (a whole corpus
# without separators, say) are tokenised in pieces.
_PIECE_CHARACTERS = 1 << 22


@dataclass(frozen=True)
class Context:
    """One packed piece of text, as long as every other.

    tokens: [context_size] token ids.
    documents: [context_size] index of the document each token came from, in reading order; -1 for
        the BOS that packing adds.
    """

    tokens: NDArray[np.int32]
    documents: NDArray[np.int32]


def pack(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    context_size: int,
    *,
    prepend_bos: bool = True,
    n_contexts: int | None = None,
) -> Iterator[Context]:
    """Cuts the stream of all documents' tokens into contexts of `context_size`.

    A context is BOS and the next context_size - 1 tokens of the stream; without BOS, where
    `prepend_bos` is False or the tokenizer has none, it is the next context_size tokens. In the
    stream, documents are separated by BOS where the tokenizer has one, else EOS, else nothing;
    a separator belongs to the document that follows it. Where a context's own BOS comes just before
    a BOS separator, it stands for both. Nothing is padded; the last short piece is dropped.
    Documents of over four million characters are tokenised in pieces that end with a line, or else
    before a space.

    n_contexts: stop after so many; None for all there are.

    Raises TextError where context_size < 2 or n_contexts < 1, and, at the end of the text, where
    it was shorter than one context.
    """
    if context_size < 2:
        raise TextError(f"context_size is {context_size}; expected 2 or more, such as 128")
    if n_contexts is not None and n_contexts < 1:
        raise TextError(f"the text was to give {n_contexts} contexts; expected 1 or more")
    bos = tokenizer.bos_token_id
    separator = tokenizer.eos_token_id if bos is None else bos
    contexts = _cut(
        _streamed(documents, tokenizer, separator), context_size, bos if prepend_bos else None
    )
    return itertools.islice(contexts, n_contexts)


def _streamed(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, separator: int | None
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]]:
    """(tokens, document of each, whether it is a separator) of the stream, a batch at a time."""
    index, first = -1, True
    for batch in _batches(documents):
        flat: list[int] = []
        lengths, separators, owners = [], [], []
        for ids, begins in zip(
            _token_ids(tokenizer, [text for text, _ in batch]),
            (begins for _, begins in batch),
            strict=True,
        ):
            start = len(flat)
            if begins:
                index, separated = index + 1, first
            # A document without tokens (the tokenizer may drop what it holds) needs no separator.
            if ids and not separated and separator is not None:
                separators.append(start)
                flat.append(separator)
            flat.extend(ids)
            separated = separated or bool(ids)
            first = first and not ids
            lengths.append(len(flat) - start)
            owners.append(index)
        is_separator = np.zeros(len(flat), dtype=np.bool_)
        is_separator[separators] = True
        owner = np.repeat(np.array(owners, dtype=np.int32), lengths)
        yield np.array(flat, dtype=np.int32), owner, is_separator


def _batches(documents: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Texts to tokenise together, and of each whether a document begins with it."""
    batch: list[tuple[str, bool]] = []
    characters = 0
    for document in documents:
        for number, piece in enumerate(_pieces(document)):
            batch.append((piece, number == 0))
            characters += len(piece)
            if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _pieces(document: str) -> Iterator[str]:
    start = 0
    while len(document) - start > _PIECE_CHARACTERS:
        end = start + _PIECE_CHARACTERS
        if (line := document.rfind("\n", start, end)) > start:
            end = line + 1
        elif (space := document.rfind(" ", start + 1, end)) > start:
            end = space
        yield document[start:end]
        start = end
    yield document[start:]


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, unpadded, uncut, without special tokens."""
    # A call switches off the truncation and padding that a tokenizer.json may have set; they are
    # put back, so that the caller's tokenizer is as it was.
    inner = getattr(tokenizer, "backend_tokenizer", None)
    truncation, padding = (inner.truncation, inner.padding) if inner is not None else (None, None)
    try:
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
    finally:
        if inner is not None and truncation is not None:
            inner.enable_truncation(**truncation)
        if inner is not None and padding is not None:
            inner.enable_padding(**padding)
    return encoded["input_ids"]


def _cut(
    stream: Iterable[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]],
    context_size: int,
    bos: int | None,
) -> Iterator[Context]:
    """Contexts from the stream's batches; bos: the id each begins with, or None."""
    lead = 0 if bos is None else 1
    body = context_size - lead
    waiting: list[tuple[NDArray[Any], ...]] = []  # joined only once they make a context
    n_waiting = n_read = 0
    found = False
    for part in stream:
        waiting.append(part)
        n_waiting += len(part[0])
        n_read += len(part[0])
        if n_waiting < body:
            continue
        tokens, owners, is_separator = (
            np.concatenate(arrays) for arrays in zip(*waiting, strict=True)
        )
        at = 0
        while at < len(tokens):
            start = at + (1 if bos is not None and is_separator[at] else 0)
            if start + body > len(tokens):
                break
            at = start + body
            context = Context(np.empty(context_size, np.int32), np.empty(context_size, np.int32))
            context.tokens[:lead] = 0 if bos is None else bos
            context.documents[:lead] = -1
            context.tokens[lead:] = tokens[start:at]
            context.documents[lead:] = owners[start:at]
            found = True
            yield context
        waiting = [(tokens[at:], owners[at:], is_separator[at:])]
        n_waiting = len(tokens) - at
    if not found:
        works = n_read + lead
        raise TextError(
            f"the text has {n_read} tokens, too few for one context of {context_size}"
            f"{'' if bos is None else ' (one of them BOS)'}; "
            + (f"use a context size of {works} or less, or more text" if works > 1 else "add text")
        )
