"""BertTokenizer: text to word-piece ids, on the `tokenizers` library."""

import json
import reprlib
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from pretrained import find_pretrained, read_json_table
from utils import UserError, atomic_write, one_line

SPECIAL_TOKENS = "[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"
# Keys of a `tokenizer_config.json` that name special tokens, in the order of `transformers`.
ROLES: dict[str, str | None] = {"bos_token": None, "eos_token": None}
ROLES |= {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
# Values of `tokenizer_class`, without "Fast". For the first, `transformers` takes only the vocabulary
# and the added tokens from a tokenizer.json; for the others, the whole file.
BERT_CLASSES = "BertTokenizer", "ElectraTokenizer"
JSON_CLASSES = "PreTrainedTokenizer", "TokenizersBackend"
# Other settings that change the ids. They must not be there, or be right or empty.
UNSUPPORTED = (
    *("truncation_side", "split_special_tokens", "auto_map", "fast_tokenizer_files"),
    *("init_inputs", "model_specific_special_tokens"),
)
EXTRA, OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"
# Files that can be next to a tokenizer.json or vocab.txt.
TABLES = "config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
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
        # A hieroglyph is in no vocabulary: this fails here, not in training, if [UNK] is missing.
        if any(backend.encode("a \U00013000").type_ids):
            raise UserError("this vocabulary gives a text other token types than 0")
        if backend.encode("").ids != [self.special_ids[token] for token in ("[CLS]", "[SEP]")]:
            raise UserError("this vocabulary does not put [CLS] and [SEP] around a text")

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, local_files_only: bool = False) -> Self:
        """Read a tokenizer; it gives the ids that `transformers.AutoTokenizer` gives for these files.
        The arguments are those of `BertModel.from_pretrained`. Raises UserError if there is no
        vocabulary, if a file is damaged, or for a tokenizer that is not supported."""

        def find(filename: str) -> Path | None:
            return find_pretrained(name_or_path, filename, local_files_only)

        path = find("tokenizer.json") or find("vocab.txt")
        if path is None:
            raise UserError(f"{name_or_path}: no tokenizer.json and no vocab.txt found")
        tables = {name: read_json_table(find(name)) for name in TABLES}
        try:
            return cls(_read_backend(path, tables), _max_length(tables["tokenizer_config.json"]))
        except KeyboardInterrupt:
            raise
        # For a damaged file, the library raises a bare Exception, or panics with a BaseException.
        except BaseException as error:
            problem = "" if isinstance(error, UserError) else "not a readable vocabulary: "
            reason = textwrap.shorten(one_line(error), 150, placeholder=" ...")
            raise UserError(f"{path}: {problem}{reason}") from error

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
        """Write `tokenizer.json` and `tokenizer_config.json` for `transformers`."""
        added = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        settings = {
            # `transformers` takes the file as it is, whatever is in it.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
            "model_max_length": self.max_length,
        }
        # To name a token that is no added token would make it one.
        settings |= {role: token for role, token in ROLES.items() if token in added}
        texts = {
            "tokenizer.json": self.to_json(),
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


def word_piece_backend(
    vocabulary: dict[str, int], settings: Mapping[str, Any], added: Sequence[AddedToken] = ()
) -> tokenizers.Tokenizer:
    """Make BERT's tokenizer (Devlin et al. 2018) for a vocabulary. Its settings are those of a
    `tokenizer_config.json`; `added` are its added tokens."""
    unknown, cls, sep = (
        str(_added_token(settings.get(role, ROLES[role])))
        for role in ("unk_token", "cls_token", "sep_token")
    )
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    names = {role: token for role, token in ROLES.items() if token in vocabulary}
    _add_tokens(backend, {**names, **settings}, added)
    # If one is missing, the constructor of BertTokenizer says which.
    if {cls, sep} <= backend.get_vocab().keys():
        backend.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(token, backend.token_to_id(token)) for token in (cls, sep)],
        )
    return backend


def _read_backend(path: Path, tables: Mapping[str, dict[str, Any]]) -> tokenizers.Tokenizer:
    """Make the tokenizer that `transformers` makes of a tokenizer.json or vocab.txt, with the tables of
    the files next to it."""
    settings, whole = dict(tables["tokenizer_config.json"]), path.name == "tokenizer.json"
    config = tables["config.json"]
    name = settings.get("tokenizer_class", config.get("tokenizer_class"))
    if name is None and whole and not config.get("model_type", not config):
        raise UserError('config.json names no model_type; add "model_type": "bert"')
    kind = BERT_CLASSES[0] if name is None else str(name).removesuffix("Fast")
    if kind not in (BERT_CLASSES + JSON_CLASSES if whole else BERT_CLASSES):
        problem = "is not supported" if whole else "is not supported with a vocab.txt"
        raise UserError(f"tokenizer_class {reprlib.repr(name)} {problem}")
    added = _read_added_tokens(settings, tables, read_json_table(path) if whole else {})
    if not whole:
        return word_piece_backend(models.WordPiece.read_file(str(path)), settings, added)
    backend = tokenizers.Tokenizer.from_file(str(path))
    if (backend.truncation or {}).get("direction") == "left":
        raise UserError("to cut a text at its start is not supported")
    if kind in JSON_CLASSES:
        # `transformers` takes the token of a baked-in padding for a special one.
        names = {"pad_token": (backend.padding or {}).get("pad_token")}
        _add_tokens(backend, names | settings, added)
        return backend
    if not isinstance(backend.model, models.WordPiece):
        raise UserError(f"{kind} needs a WordPiece model")
    return word_piece_backend(backend.get_vocab(with_added_tokens=False), settings, added)


def _read_added_tokens(
    settings: dict[str, Any], tables: Mapping[str, dict[str, Any]], whole: dict[str, Any]
) -> list[AddedToken]:
    """Return the added tokens in the order of their ids, and put other special tokens into the
    settings. Where the settings do not list added tokens, older files and the `whole` tokenizer.json
    do; then special_tokens_map.json replaces what the settings say."""
    extra = settings.get(EXTRA) or settings.get(OLD_EXTRA)
    added = settings.get("added_tokens_decoder")
    if added is None:
        older = tables["special_tokens_map.json"]
        if EXTRA in older:
            extra = [*(extra or []), *map(_as_special, older[EXTRA])]
        elif not {EXTRA, OLD_EXTRA} & settings.keys():
            extra = older.get(OLD_EXTRA)
        settings |= {role: _as_special(value) for role, value in older.items()}
        special = set(map(str, [*map(settings.get, ROLES), *(extra or [])]))
        added = {
            number: AddedToken(token, normalized=token not in special, special=token in special)
            for token, number in tables["added_tokens.json"].items()
        }
        added |= {token["id"]: token for token in whole.get("added_tokens", [])}
    for key, value in settings.items():
        is_token = isinstance(value, (str, dict, AddedToken)) and key.endswith("_token")
        is_other = key in UNSUPPORTED or key == EXTRA and isinstance(value, dict)
        if is_token and key not in ROLES or is_other and value and value != "right":
            raise UserError(f"{key} {reprlib.repr(value)} is not supported")
    settings[EXTRA] = extra
    return [_added_token(added[number]) for number in sorted(added, key=int)]


def _add_tokens(
    backend: tokenizers.Tokenizer, settings: Mapping[str, Any], added: Sequence[AddedToken]
) -> None:
    """Add tokens, then the special tokens that are not among them."""
    by_text = {token.content: token for token in added}
    named = [_added_token(settings[role]) for role in ROLES if settings.get(role) is not None]
    named = [by_text.get(token.content, token) for token in named]
    extra = [_added_token(token) for token in settings.get("extra_special_tokens") or []]
    known = by_text.keys() | map(str, backend.get_added_tokens_decoder().values())
    new = [token for token in named + extra if token.content not in known]
    backend.add_tokens([*added, *new])
    ids = backend.get_vocab()
    has_new = len(ids) > backend.get_vocab_size(with_added_tokens=False)
    if has_new and sorted(ids.values()) != list(range(len(ids))):
        raise UserError("its ids have gaps, so that added tokens would not keep theirs")


def _added_token(value: str | dict[str, Any] | AddedToken) -> AddedToken:
    if isinstance(value, dict):
        return AddedToken(**{key: value[key] for key in value.keys() - {"__type", "id"}})
    return AddedToken(value, special=True) if isinstance(value, str) else value


def _as_special(value: Any) -> Any:
    return _added_token(value | {"special": True}) if isinstance(value, dict) else value


def _max_length(settings: Mapping[str, Any]) -> int:
    length = settings.get("model_max_length", settings.get("max_len"))
    # "No limit" is written as 1e30.
    if length is None or isinstance(length, (int, float)) and length > 1_000_000:
        return DEFAULT_MAX_LENGTH
    if type(length) is not int or length < 3:
        raise UserError(f"model_max_length must be a number above 2, not {reprlib.repr(length)}")
    return length
