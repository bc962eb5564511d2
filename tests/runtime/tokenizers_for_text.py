"""Small tokenizers of each kind, and what the text of their tokens must be by definition."""

from collections.abc import Iterator, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

REPLACEMENT = "\ufffd"
CORPUS = ["the three of them met at the harbour  before\n sunrise", "視𠜎 é 🙂 视觉 ✓✓ ��"] * 4


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE: a character may be split at any byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    return _with_specials(tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    """Unigram and Metaspace: the first space of a text is not shown."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=80, unk_token="<unk>", show_progress=False)
    )
    return _with_specials(tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """The decoder of Llama 2's: bytes in a row are a text together, or each of them is U+FFFD."""
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "<unk>", "▁", "a", "b", "▁the", "視", "ab"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=256, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_specials(tokenizer)


def _with_specials(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken("<|begin|>"), AddedToken("<|end|>")])
    tokenizer.add_tokens([AddedToken("<plain added>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def decode(tokenizer: PreTrainedTokenizerFast, token_ids: Sequence[int], skip_special: bool) -> str:
    return tokenizer.backend_tokenizer.decode(list(token_ids), skip_special_tokens=skip_special)


def text_by_difference(
    tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int], generated: Sequence[int], skip_special: bool
) -> str:
    """decode(prompt + generated) without decode(prompt), where no character is split."""
    before = decode(tokenizer, prompt, skip_special)
    whole = decode(tokenizer, [*prompt, *generated], skip_special)
    assert whole.startswith(before)
    return whole[len(before) :]


def text_of_bytes(
    tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int], generated: Sequence[int], skip_special: bool
) -> str:
    """The characters whose first byte was generated, of a byte-level tokenizer."""
    before = b"".join(bytes_of(tokenizer, token, skip_special) for token in prompt)
    whole = before + b"".join(bytes_of(tokenizer, token, skip_special) for token in generated)
    return "".join(character for start, character in characters_of(whole) if start >= len(before))


def characters_of(data: bytes) -> Iterator[tuple[int, str]]:
    """Each character with its first byte; bytes that are none are U+FFFD."""
    start = 0
    while start < len(data):
        try:
            valid, bad_end = data[start:].decode(), 0
        except UnicodeDecodeError as error:
            valid, bad_end = data[start : start + error.start].decode(), start + error.end
        for character in valid:
            yield start, character
            start += len(character.encode())
        if bad_end:
            yield start, REPLACEMENT
            start = bad_end


def bytes_of(tokenizer: PreTrainedTokenizerFast, token: int, skip_special: bool) -> bytes:
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().get(token)
    if added is not None:
        return b"" if added.special and skip_special else added.content.encode()
    text = tokenizer.backend_tokenizer.id_to_token(token)
    return b"" if text is None else bytes(LETTERS[letter] for letter in text)


def _letters() -> dict[str, int]:
    """Letter -> byte, of the alphabet of byte-level tokenizers."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(rest)}


LETTERS = _letters()
