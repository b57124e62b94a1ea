"""Tokenizers of other people: the ids of transformers.AutoTokenizer, or one line."""

import json

import pytest
import tokenizers
import transformers
from tokenizer_folders import SENTENCES, SPECIAL, random_folder

from tokenizer import BertTokenizer
from utils import UserError

SEEDS, SEEDS_A_TEST = 300, 30


def ids_of(tokenizer, sentences=SENTENCES):
    return tokenizer(sentences)["input_ids"]


def assert_reads_as_transformers(folder):
    """Return whether we read the folder. If so, the ids are those of transformers, also after a round
    trip through a checkpoint and through an export."""
    try:
        ours = BertTokenizer.from_pretrained(folder)
    except UserError as error:
        assert str(folder) in str(error) and "\n" not in str(error) and len(str(error)) <= 300
        return False
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = ids_of(theirs)
    assert ids_of(ours) == expected
    cut = theirs(SENTENCES, truncation=True, max_length=9)["input_ids"]
    assert ours.packed_ids(SENTENCES, 9)[0].tolist() == [number for ids in cut for number in ids]
    assert ids_of(BertTokenizer.from_json(ours.to_json())) == expected
    export = folder.parent / f"{folder.name}-export"
    export.mkdir()
    ours.save_pretrained(export)
    (export / "config.json").write_text('{"model_type": "bert"}')
    assert ids_of(BertTokenizer.from_pretrained(export)) == expected
    assert ids_of(transformers.AutoTokenizer.from_pretrained(export)) == expected
    return True


@pytest.mark.parametrize("start", range(0, SEEDS, SEEDS_A_TEST))
def test_random_folders(tmp_path, start):
    read = 0
    for seed in range(start, start + SEEDS_A_TEST):
        random_folder(tmp_path / str(seed), seed)
        read += assert_reads_as_transformers(tmp_path / str(seed))
    assert read >= SEEDS_A_TEST / 3  # of 300 folders, 160 or so


PIECES = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz", *("##" + c for c in "abcdefghijklmnoprstuvwxyz")]
PIECES += ["Film", "film", "Très", "très", "tres", "##漢", "漢", "字", "."]


def write(folder, **files):
    """Write files; the underscore in their names is a dot."""
    folder.mkdir()
    files = {"config.json": {"model_type": "bert"}} | {
        ".".join(name.rsplit("_", 1)): content for name, content in files.items()
    }
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8", newline="")
    return folder


def plain_json(lowercase=True):
    from tokenizer import word_piece_backend

    ids = {piece: number for number, piece in enumerate(PIECES)}
    return json.loads(word_piece_backend(ids, {"do_lower_case": lowercase}).to_str())


LINES = "\n".join(PIECES)
ODD_VOCABULARIES = {
    "blank last line": LINES + "\n\n",
    "blank last lines": LINES + "\n\n\n\n",
    "blank line in between": LINES.replace("\nfilm", "\n\nfilm"),
    "no end of line": LINES,
    "Windows": LINES.replace("\n", "\r\n") + "\r\n",
    "repeated piece": LINES + "\nfilm\n",
    "repeated pieces": LINES + "\nfilm\nfilm\na\n",
    "special token repeated": LINES + "\n[SEP]\nzz\n",
    "line of spaces": LINES + "\n  \nzz\n",
    "no-break space": LINES + "\n\u00a0\nzz\n",
    "line separators": LINES + "\na\u2028b\nc\x85d\n\x0b\n\x1e\nzz\n",
    "spaces at the end": LINES + "\nzz  \n",
    "special tokens last": "\n".join(PIECES[5:] + PIECES[:5]),
}


@pytest.mark.parametrize("name", ODD_VOCABULARIES)
def test_odd_vocabularies(tmp_path, name):
    assert assert_reads_as_transformers(write(tmp_path / "a", vocab_txt=ODD_VOCABULARIES[name]))


CONFLICTS = [
    {"do_lower_case": False},
    {"do_lower_case": True},
    {"strip_accents": False},
    {"do_lower_case": False, "strip_accents": True},
    {"tokenize_chinese_chars": False},
    {"additional_special_tokens": ["<ent>", "film"]},
    {"extra_special_tokens": ["<ent>"], "do_lower_case": False},
    {"model_max_length": 10**30, "mask_token": "<mask>"},
    {"added_tokens_decoder": {"0": {"content": "[PAD]", "special": True, "lstrip": True}}},
    {"bos_token": "[CLS]", "eos_token": "<ent>"},
]


@pytest.mark.parametrize(
    "kind", ["BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast", None]
)
@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("settings", CONFLICTS, ids=str)
def test_settings_in_conflict_with_tokenizer_json(tmp_path, kind, lowercase, settings):
    settings = settings | ({"tokenizer_class": kind} if kind else {})
    for name, more in {"json": {}, "both": {"vocab_txt": LINES.replace("film", "flim")}}.items():
        files = {"tokenizer_json": plain_json(lowercase), "tokenizer_config_json": settings}
        assert assert_reads_as_transformers(write(tmp_path / name, **files, **more))


@pytest.mark.parametrize("map_too", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_added_tokens_json_is_read(tmp_path, whole, map_too):
    files = {"tokenizer_json": plain_json()} if whole else {"vocab_txt": LINES}
    files["added_tokens_json"] = {"<ent>": len(PIECES), "New York": len(PIECES) + 1, "[MASK]": 4}
    if map_too:
        mask = {"content": "[MASK]", "lstrip": True, "rstrip": False, "normalized": True}
        files["special_tokens_map_json"] = {"mask_token": mask, "cls_token": "[CLS]"}
    folder = write(tmp_path / "a", **files)
    assert assert_reads_as_transformers(folder)
    assert BertTokenizer.from_pretrained(folder)(["<ent>"])["input_ids"] == [[2, len(PIECES), 3]]


OTHER_CLASSES = [
    "BertJapaneseTokenizer",
    "RobertaTokenizerFast",
    "AlbertTokenizer",
    "HerbertTokenizer",
]
OTHER_CLASSES += ["PhobertTokenizer", "BertweetTokenizer", "RoFormerTokenizer", "Unheard", 3, ["x"]]


@pytest.mark.parametrize("where", ["tokenizer_config_json", "config_json"])
@pytest.mark.parametrize("name", OTHER_CLASSES, ids=str)
def test_tokenizers_of_other_languages_are_refused(tmp_path, name, where):
    for files in ({"vocab_txt": LINES}, {"tokenizer_json": plain_json()}):
        value = {"model_type": "bert", "tokenizer_class": name}
        folder = write(tmp_path / next(iter(files)), **files, **{where: value})
        with pytest.raises(UserError, match="tokenizer_class .* is not supported"):
            BertTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["BertTokenizer", "PreTrainedTokenizerFast", "", None])
@pytest.mark.parametrize("lowercase", [True, False])
def test_config_without_a_model_type(tmp_path, kind, lowercase):
    settings = {"do_lower_case": not lowercase} | (
        {} if kind is None else {"tokenizer_class": kind}
    )
    files = {"tokenizer_json": plain_json(lowercase), "tokenizer_config_json": settings}
    folder = write(tmp_path / "a", config_json={"vocab_size": 99}, **files)
    assert assert_reads_as_transformers(folder) == bool(kind)
    if not kind:
        with pytest.raises(UserError, match="no model_type|tokenizer_class '' is not supported"):
            BertTokenizer.from_pretrained(folder)


REFUSED = {
    "truncation_side 'left'": {"truncation_side": "left"},
    "split_special_tokens True": {"split_special_tokens": True},
    "auto_map": {"auto_map": {"AutoTokenizer": ["a.B", None]}},
    "image_token '<img>' is not supported": {"image_token": "<img>"},
    "extra_special_tokens {'image_token'": {"extra_special_tokens": {"image_token": "<img>"}},
    "model_max_length must be a number above 2, not -1": {"model_max_length": -1},
    "model_max_length must be a number above 2, not 'x'": {"model_max_length": "x"},
    "does not put": {"cls_token": "<s>"},
    "does not put [CLS]": {"sep_token": None},
    "Missing [UNK]": {"unk_token": "<unk>"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_are_not_supported_are_named(tmp_path, message):
    settings = REFUSED[message] | {"tokenizer_class": "BertTokenizer"}
    folder = write(tmp_path / "a", tokenizer_json=plain_json(), tokenizer_config_json=settings)
    with pytest.raises(UserError) as caught:
        BertTokenizer.from_pretrained(folder)
    assert message in str(caught.value) and str(folder) in str(caught.value)


def test_token_types_other_than_0_are_refused(tmp_path):
    table = plain_json()
    table["post_processor"]["single"][1]["Sequence"]["type_id"] = 1
    files = {
        "tokenizer_json": table,
        "tokenizer_config_json": {"tokenizer_class": "TokenizersBackend"},
    }
    with pytest.raises(UserError, match="other token types than 0"):
        BertTokenizer.from_pretrained(write(tmp_path / "a", **files))


def test_ids_that_would_change_when_saved_are_refused(tmp_path):
    """With a gap in the ids, the library gives a new token an id, and another one on reading."""
    table = plain_json()
    table["model"]["vocab"]["zz"] = len(PIECES) + 5
    files = {"tokenizer_json": table, "tokenizer_config_json": {"bos_token": "<s>"}}
    folder = write(tmp_path / "a", **files)
    if not assert_reads_as_transformers(folder):
        with pytest.raises(UserError, match="ids"):
            BertTokenizer.from_pretrained(folder)


def test_lone_surrogates_are_no_text_for_either(tmp_path):
    folder = write(tmp_path / "a", vocab_txt=LINES)
    for tokenizer in (BertTokenizer, transformers.AutoTokenizer):
        with pytest.raises(TypeError):
            ids_of(tokenizer.from_pretrained(folder), ["a \ud800"])


@pytest.mark.parametrize("pad_token", ["[PAD]", "film", "[UNK]"])
def test_baked_in_padding_and_truncation_are_off(tmp_path, pad_token):
    backend = tokenizers.Tokenizer.from_str(json.dumps(plain_json()))
    backend.enable_padding(length=128, pad_token=pad_token)
    backend.enable_truncation(8)
    for kind in ("BertTokenizer", "PreTrainedTokenizerFast"):
        files = {
            "tokenizer_json": backend.to_str(),
            "tokenizer_config_json": {"tokenizer_class": kind},
        }
        folder = write(tmp_path / kind, **files)
        assert assert_reads_as_transformers(folder)
        assert len(BertTokenizer.from_pretrained(folder)(["a " * 300])["input_ids"][0]) == 302
