"""Small tokenizers of three kinds, whose tokens are parts of words and of characters."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saesteer.features.words import Pieces


def sentencepiece() -> PreTrainedTokenizerFast:
    """'▁' before a word, bytes for what is not in the vocabulary, as in Llama."""
    words = ["<unk>", "▁", "▁a", "a", "▁bo", "at", "▁boat", "▁the", ".", "▁The", "n", "'", "t"]
    vocab = {w: i for i, w in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    merges = [("▁", "a")]
    inner = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def byte_level() -> PreTrainedTokenizerFast:
    """'Ġ' for a space, as in GPT-2."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {w: i for i, w in enumerate([*letters, "Ġbo", "at", "Ġboat", "Ġthe", "Ċ"])}
    inner = Tokenizer(models.BPE(vocab, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def wordpiece() -> PreTrainedTokenizerFast:
    """'##' before what goes on with a word, as in BERT."""
    words = ["[UNK]", "a", "bo", "##at", "boat", "the", "."]
    inner = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


TOKENIZERS = {
    "sentencepiece": (sentencepiece, ["▁the", "▁bo", "at", "▁boat"]),
    "byte-level": (byte_level, ["Ġthe", "Ġbo", "at", "Ġboat"]),
    "wordpiece": (wordpiece, ["the", "bo", "##at", "boat"]),
}
CASES = {kind: (Pieces(make()), len(make())) for kind, (make, _) in TOKENIZERS.items()}
