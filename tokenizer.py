"""BertTokenizer: text to word-piece ids, on the `tokenizers` library."""

import json
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from utils import UserError, atomic_write, find_pretrained, one_line

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
DEFAULT_MAX_LENGTH = 512
# Texts that are tokenized per call: enough for all cores, few enough for a progress bar.
CHUNK = 8192


class BertTokenizer:
    """Splits text into BERT's word pieces: `[CLS]`, the pieces, `[SEP]`.

    Args:
        backend: a `tokenizers.Tokenizer` with a word-piece model. Its own padding and truncation
            are switched off; the arguments of a call decide.
        max_length: length at which `truncation=True` cuts, special tokens included.
    """

    def __init__(self, backend: tokenizers.Tokenizer, max_length: int = DEFAULT_MAX_LENGTH):
        vocabulary = backend.get_vocab()
        missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
        if missing:
            raise UserError(f"this vocabulary has no {', '.join(missing)}; not one of a BERT")
        self.backend = backend
        self.max_length = max_length
        self.special_ids = {token: vocabulary[token] for token in SPECIAL_TOKENS}
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        self._set_limits(None, padding=False)
        if backend.encode("").ids != [self.special_ids[token] for token in ("[CLS]", "[SEP]")]:
            raise UserError("this vocabulary does not put [CLS] and [SEP] around a text")

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, local_files_only: bool = False) -> Self:
        """Read `tokenizer.json`, or else `vocab.txt`, and `tokenizer_config.json` if there is one.
        The arguments are those of `BertModel.from_pretrained`. Raises UserError if there is no
        vocabulary, or if a file is damaged."""

        def find(filename: str) -> Path | None:
            return find_pretrained(name_or_path, filename, local_files_only)

        settings = _read_settings(find("tokenizer_config.json"))
        max_length = settings.get("model_max_length", DEFAULT_MAX_LENGTH)
        # "No limit" is written as 1e30.
        if not isinstance(max_length, int) or max_length > 1_000_000:
            max_length = DEFAULT_MAX_LENGTH
        path = find("tokenizer.json") or find("vocab.txt")
        if path is None:
            raise UserError(f"{name_or_path}: no tokenizer.json and no vocab.txt found")
        try:
            if path.name == "tokenizer.json":
                backend = tokenizers.Tokenizer.from_file(str(path))
            else:
                backend = word_piece_backend(read_vocabulary(path), settings)
            return cls(backend, max_length)
        except KeyboardInterrupt:
            raise
        # For a damaged file, the library raises a bare Exception, or panics with a BaseException.
        except BaseException as error:
            reason = textwrap.shorten(one_line(error), 150, placeholder=" ...")
            raise UserError(f"{path}: not a readable vocabulary: {reason}") from error

    @classmethod
    def from_json(cls, text: str, max_length: int = DEFAULT_MAX_LENGTH) -> Self:
        """Make the tokenizer of which `to_json` gave the text."""
        return cls(tokenizers.Tokenizer.from_str(text), max_length)

    def to_json(self) -> str:
        """Return the whole tokenizer as the text of a `tokenizer.json`."""
        self._set_limits(None, padding=False)
        return self.backend.to_str()

    def __call__(
        self,
        texts: list[str],
        padding: bool = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> dict[str, Any]:
        """Tokenize a list of texts.

        Args:
            padding: pad all texts to the longest one.
            truncation: cut at `max_length`, by default the tokenizer's own.
            return_tensors: "pt" for tensors [B, S] (needs `padding` if lengths differ), None for
                lists.

        Returns:
            `input_ids`, `token_type_ids` (all 0) and `attention_mask` (1 for a real token).
        """
        if isinstance(texts, str):
            raise TypeError("give a list of texts, not one text")
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors must be None or 'pt', not {return_tensors!r}")
        self._set_limits((max_length or self.max_length) if truncation else None, padding)
        encodings = self.backend.encode_batch(texts)
        batch = {
            "input_ids": [encoding.ids for encoding in encodings],
            "token_type_ids": [encoding.type_ids for encoding in encodings],
            "attention_mask": [encoding.attention_mask for encoding in encodings],
        }
        if return_tensors is None:
            return batch
        return {name: torch.tensor(rows, dtype=torch.long) for name, rows in batch.items()}

    def packed_ids(
        self,
        texts: list[str],
        max_length: int,
        progress: Callable[[range], Iterable[int]] = lambda chunks: chunks,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize texts, cut at `max_length`, into one array: a quarter of the memory of lists.

        `progress` wraps the iterator over chunks of texts, for example with a tqdm bar.

        Returns:
            ids [n_tokens] int32, one text after the other, and lengths [n_texts] int64.
        """
        self._set_limits(max_length, padding=False)
        ids, lengths = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        for start in progress(range(0, len(texts), CHUNK)):
            encodings = self.backend.encode_batch_fast(texts[start : start + CHUNK])
            ids.append(np.concatenate([np.array(text.ids, np.int32) for text in encodings]))
            lengths.append(np.array([len(text) for text in encodings], np.int64))
        return np.concatenate(ids), np.concatenate(lengths)

    def packed_starts(self, texts: list[str], max_length: int) -> np.ndarray:
        """Return where the word piece of each id that `packed_ids` gives starts in its text:
        [n_tokens] int64 positions of characters, -1 for special tokens."""
        self._set_limits(max_length, padding=False)
        special = [self.special_ids[token] for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")]
        starts = [np.empty(0, np.int64)]
        for start in range(0, len(texts), CHUNK):
            for encoding in self.backend.encode_batch(texts[start : start + CHUNK]):
                first = np.array([first for first, _ in encoding.offsets], np.int64)
                starts.append(np.where(np.isin(encoding.ids, special), -1, first))
        return np.concatenate(starts)

    def pieces_of(self, ids: Iterable[int]) -> list[str]:
        """Return the word pieces with these ids, for people to read."""
        return [self.backend.id_to_token(int(number)) or "[UNK]" for number in ids]

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `tokenizer.json`, `vocab.txt` and `tokenizer_config.json` for `transformers`."""
        normalizer = json.loads(self.to_json())["normalizer"]
        vocabulary = sorted(self.backend.get_vocab().items(), key=lambda item: item[1])
        settings = {
            "tokenizer_class": "BertTokenizer",
            "model_max_length": self.max_length,
            "do_lower_case": normalizer["lowercase"],
            "strip_accents": normalizer["strip_accents"],
            "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
        }
        texts = {
            "tokenizer.json": self.to_json(),
            "vocab.txt": "".join(f"{token}\n" for token, _ in vocabulary),
            "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        }
        for filename, text in texts.items():
            with atomic_write(Path(directory) / filename) as temporary:
                temporary.write_text(text, encoding="utf-8", newline="\n")

    def _set_limits(self, max_length: int | None, padding: bool) -> None:
        if max_length is None:
            self.backend.no_truncation()
        else:
            self.backend.enable_truncation(max_length)
        if padding:
            self.backend.enable_padding(pad_id=self.special_ids["[PAD]"])
        else:
            self.backend.no_padding()


def read_vocabulary(path: Path) -> dict[str, int]:
    """Read a `vocab.txt`, one word piece a line: word piece -> id."""
    pieces = path.read_text(encoding="utf-8").split("\n")
    if pieces[-1] == "":
        pieces.pop()
    pieces = [piece.removesuffix("\r") for piece in pieces]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise UserError("it has a word piece twice")
    return vocabulary


def word_piece_backend(vocabulary: dict[str, int], settings: dict) -> tokenizers.Tokenizer:
    """Make BERT's tokenizer (Devlin et al. 2018) for a vocabulary. Its settings are those of a
    `tokenizer_config.json`."""
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    # If one is missing, the constructor of BertTokenizer says which.
    if all(token in vocabulary for token in SPECIAL_TOKENS):
        backend.add_special_tokens(list(SPECIAL_TOKENS))
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
        )
    return backend


def _read_settings(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable JSON ({one_line(error)})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: holds no table of settings")
    return settings
