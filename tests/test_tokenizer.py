import json
import shutil

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutated

from tokenizer import CHUNK, BertTokenizer
from utils import UserError

TEXTS = [
    "How are you, [MASK]?",
    "",
    "naïve café 漢字\u200b\t[SEP] x",
    "antidisestablishmentarianism",
]


@pytest.fixture(scope="module")
def theirs(minilm_path):
    return transformers.AutoTokenizer.from_pretrained(minilm_path)


def words():
    """Text that tends to break tokenizers, mixed with any Unicode."""
    hard = ["[CLS]", "[MASK]", "##ing", "İstanbul", "ﬁne", "a\u0301", "中文", "'s", "\u00a0", "🎈"]
    hard.append("x" * 101)
    return st.lists(st.one_of(st.text(), st.sampled_from(hard)), max_size=6).map(" ".join)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(words(), min_size=100, max_size=120))
def test_ids_equal_transformers(minilm_tokenizer, theirs, texts):
    """At least 2,500 strings; the long ones are cut."""
    ours = minilm_tokenizer(texts, truncation=True, max_length=30)
    expected = theirs(texts, truncation=True, max_length=30)
    assert ours["input_ids"] == expected["input_ids"]


def test_padding_and_truncation_baked_into_the_file_are_off(minilm_tokenizer, minilm_path):
    baked = json.loads((minilm_path / "tokenizer.json").read_text())
    assert baked["padding"] and baked["truncation"]["max_length"] == 128
    ids = minilm_tokenizer(["one", "word " * 300])["input_ids"]
    assert [len(row) for row in ids] == [3, 302]


@pytest.mark.parametrize("limit", [None, 9])
def test_tensors_equal_transformers(minilm_tokenizer, theirs, limit):
    arguments = dict(padding=True, truncation=True, max_length=limit, return_tensors="pt")
    ours, expected = minilm_tokenizer(TEXTS, **arguments), theirs(TEXTS, **arguments)
    assert set(ours) == set(expected)
    for name, tensor in ours.items():
        assert torch.equal(tensor, expected[name]), name


def test_truncation_is_at_512_by_default(minilm_tokenizer):
    assert len(minilm_tokenizer(["x " * 1000], truncation=True)["input_ids"][0]) == 512


def test_vocab_txt_alone_is_enough(tmp_path, minilm_path, theirs):
    shutil.copy(minilm_path / "vocab.txt", tmp_path)
    assert BertTokenizer.from_pretrained(tmp_path)(TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"]


def test_cased_settings_are_read(tmp_path, minilm_path):
    shutil.copy(minilm_path / "vocab.txt", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    ours = BertTokenizer.from_pretrained(tmp_path)
    assert ours(["Café cafe"])["input_ids"] == theirs(["Café cafe"])["input_ids"]
    pieces = ours.pieces_of(ours(["Café cafe"])["input_ids"][0])
    assert pieces == ["[CLS]", "[UNK]", "cafe", "[SEP]"]  # the vocabulary has no capitals


def test_transformers_opens_what_we_save(tmp_path, minilm_tokenizer):
    minilm_tokenizer.save_pretrained(tmp_path)
    ours = minilm_tokenizer(TEXTS)["input_ids"]
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert opened(TEXTS)["input_ids"] == ours
    assert BertTokenizer.from_pretrained(tmp_path)(TEXTS)["input_ids"] == ours
    pair = opened("a b", "c", padding="max_length", max_length=9)
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1, 0, 0, 0]
    assert pair["attention_mask"] == [1] * 6 + [0] * 3 and not any(pair["input_ids"][6:])


def test_json_round_trip(minilm_tokenizer):
    minilm_tokenizer(["x"], padding=True, truncation=True)
    again = BertTokenizer.from_json(minilm_tokenizer.to_json())
    assert again(TEXTS)["input_ids"] == minilm_tokenizer(TEXTS)["input_ids"]


def test_packed_ids_are_the_lists_in_a_row(minilm_tokenizer):
    n_repeats = 2 * CHUNK // len(TEXTS) + 1  # more than two chunks
    ids, lengths = minilm_tokenizer.packed_ids(TEXTS * n_repeats, max_length=7)
    rows = minilm_tokenizer(TEXTS, truncation=True, max_length=7)["input_ids"] * n_repeats
    assert lengths.tolist() == [len(row) for row in rows]
    assert ids.tolist() == [id for row in rows for id in row]


def test_no_texts(minilm_tokenizer):
    ids, lengths = minilm_tokenizer.packed_ids([], max_length=7)
    assert len(ids) == 0 and len(lengths) == 0


def test_one_string_is_refused(minilm_tokenizer):
    with pytest.raises(TypeError, match="list of texts"):
        minilm_tokenizer("one string")


@pytest.mark.parametrize(
    "filename, content, message",
    [
        ("tokenizer.json", "{", "not readable JSON"),
        ("tokenizer.json", "[]", "holds no table"),
        ("tokenizer.json", '{"added_tokens": []}', "not a readable vocabulary"),
        ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n", r"has no \[MASK\]"),
        ("other.txt", "", "no tokenizer.json and no vocab.txt"),
    ],
)
def test_a_vocabulary_of_no_use_is_one_clear_line(tmp_path, filename, content, message):
    (tmp_path / filename).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        BertTokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("kind", ["BertTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("filename", ["tokenizer.json", "vocab.txt", "tokenizer_config.json"])
def test_mutated_files_work_or_are_refused(tiny_directory, tmp_path, filename, kind, data):
    """A tokenizer that is not refused gives ids within the vocabulary, between [CLS] and [SEP]."""
    whole = (tiny_directory / "tokenizer.json").read_bytes()
    vocabulary = json.loads(whole)["model"]["vocab"]
    files = {
        "vocab.txt": "\n".join(sorted(vocabulary, key=vocabulary.get)).encode(),
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": kind, "model_max_length": 128, "do_lower_case": True}
        ).encode(),
    }
    if filename == "tokenizer.json":
        files[filename] = whole
    files[filename] = data.draw(mutated(files[filename]))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    try:
        tokenizer = BertTokenizer.from_pretrained(tmp_path)
    except UserError as error:
        text = str(error)
        assert text.startswith(str(tmp_path)) and "\n" not in text and len(text) <= 300
        return
    ids, lengths = tokenizer.packed_ids(["abc, def?", "", "\u6f22 \u00e9"], max_length=7)
    assert len(ids) == lengths.sum() and 0 <= ids.min() and ids.max() < tokenizer.vocab_size
    special = [tokenizer.special_ids[token] for token in ("[CLS]", "[SEP]")]
    assert ids[[0, lengths[0] - 1]].tolist() == special
