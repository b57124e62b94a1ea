"""BertTokenizer: text to word-piece ids, on the `tokenizers` library."""

import json
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from utils import UserError, atomic_write, find_pretrained, one_line

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
DEFAULT_MAX_LENGTH = 512
CHUNK = 8192  # sentences tokenized per call: enough for all cores, few enough for a progress bar


class BertTokenizer:
    """Splits text into BERT's word pieces: `[CLS]`, the pieces, `[SEP]`.

    Args:
        backend: a `tokenizers.Tokenizer` with a word-piece model. Padding and truncation that its
            file has baked in are switched off; the call decides.
        max_length: where `truncation=True` cuts, special tokens included.
    """

    def __init__(self, backend: tokenizers.Tokenizer, max_length: int = DEFAULT_MAX_LENGTH):
        missing = [token for token in SPECIAL_TOKENS if backend.token_to_id(token) is None]
        if missing:
            raise UserError(f"this vocabulary has no {', '.join(missing)}; not one of a BERT")
        self.backend = backend
        self.max_length = max_length
        self.vocab_size = max(backend.get_vocab().values()) + 1  # there may be gaps in the ids
        self._set_limits(None, padding=False)
        ends = [backend.token_to_id(token) for token in ("[CLS]", "[SEP]")]
        if backend.encode("").ids != ends:
            raise UserError("this vocabulary does not put [CLS] and [SEP] around a text")

    @classmethod
    def from_pretrained(cls, name_or_path: str, local_files_only: bool = False) -> "BertTokenizer":
        """Read `tokenizer.json`, else `vocab.txt`, each with `tokenizer_config.json` where there
        is one. Names as for `BertModel.from_pretrained`. UserError says what is missing."""

        def find(filename):
            return find_pretrained(name_or_path, filename, local_files_only)

        settings = _read_settings(find("tokenizer_config.json"))
        max_length = settings.get("model_max_length", DEFAULT_MAX_LENGTH)
        if not isinstance(max_length, int) or max_length > 1_000_000:  # "no limit" is written 1e30
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
        except Exception as error:  # the library raises bare Exception for a damaged file
            raise UserError(f"{path}: not a readable vocabulary: {one_line(error)}") from error

    @classmethod
    def from_json(cls, text: str, max_length: int = DEFAULT_MAX_LENGTH) -> "BertTokenizer":
        """The inverse of `to_json`."""
        return cls(tokenizers.Tokenizer.from_str(text), max_length)

    def to_json(self) -> str:
        """The whole tokenizer as the text of a `tokenizer.json`."""
        self._set_limits(None, padding=False)
        return self.backend.to_str()

    def __call__(
        self,
        texts: list[str],
        padding: bool = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> dict:
        """Tokenize a list of texts.

        Args:
            padding: pad all to the longest of the list.
            truncation: cut at `max_length`, by default the tokenizer's own.
            return_tensors: "pt" for tensors [B, S] (needs `padding` if lengths differ), None for
                lists.

        Returns:
            `input_ids`, `token_type_ids` (all 0) and `attention_mask` (1 is a real token).
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
        self, texts: list[str], max_length: int, progress=lambda chunks: chunks
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts one after the other, and the texts' lengths, cut at `max_length`.

        `progress` wraps the iterator over chunks of texts (a tqdm bar, say).

        Returns:
            ids [n_tokens] int32 and lengths [n_texts] int64: a quarter of a list of lists' memory.
        """
        self._set_limits(max_length, padding=False)
        ids, lengths = [np.empty(0, np.int32)], []
        for start in progress(range(0, len(texts), CHUNK)):
            encodings = self.backend.encode_batch_fast(texts[start : start + CHUNK])
            ids.append(np.concatenate([np.array(each.ids, np.int32) for each in encodings]))
            lengths.extend(len(each) for each in encodings)
        return np.concatenate(ids), np.array(lengths, np.int64)

    def packed_starts(self, texts: list[str], max_length: int) -> np.ndarray:
        """[n_tokens] int64, for the ids that `packed_ids` gives: where each piece's first character
        stands in its text, -1 for special tokens."""
        self._set_limits(max_length, padding=False)
        special = [
            self.backend.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
        ]
        starts = [np.empty(0, np.int64)]
        for start in range(0, len(texts), CHUNK):
            for encoding in self.backend.encode_batch(texts[start : start + CHUNK]):
                first = np.array([first for first, _ in encoding.offsets], np.int64)
                starts.append(np.where(np.isin(encoding.ids, special), -1, first))
        return np.concatenate(starts)

    def pieces_of(self, ids) -> list[str]:
        """The word pieces that these ids mean, for people to read."""
        return [self.backend.id_to_token(int(id)) for id in ids]

    def save_pretrained(self, directory: str) -> None:
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
            self.backend.enable_padding(pad_id=self.backend.token_to_id("[PAD]"))
        else:
            self.backend.no_padding()


def read_vocabulary(path: Path) -> dict[str, int]:
    """Word pieces, one a line, to their ids."""
    pieces = path.read_text(encoding="utf-8").split("\n")
    if pieces[-1] == "":
        pieces.pop()
    pieces = [piece.removesuffix("\r") for piece in pieces]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise UserError("a word piece stands in it twice")
    return vocabulary


def word_piece_backend(vocabulary: dict[str, int], settings: dict) -> tokenizers.Tokenizer:
    """BERT's tokenizer (Devlin et al. 2018) for a vocabulary; settings as in tokenizer_config."""
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    known = [token for token in SPECIAL_TOKENS if token in vocabulary]
    if len(known) == len(SPECIAL_TOKENS):  # else the constructor of BertTokenizer says what lacks
        backend.add_special_tokens(known)
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
        )
    return backend


def _read_settings(path: Path | None) -> dict:
    if path is None:
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable JSON ({one_line(error)})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: holds no table of settings")
    return settings
