"""Tags of word pieces, with a pipeline of a few labels that is trained here."""

import importlib.util
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sqlite3
import sys
import time
import types
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import spacy
import torch
from conftest import SAMPLE, TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import multitask_classifier as mc
import tagging
from base_bert import BertConfig
from bert import BertModel
from datasets import read_examples
from tagging import Pipeline, Tagger
from tasks import SPLITS, TASKS
from utils import UserError


@pytest.fixture(scope="session")
def pipeline(pipeline_directory):
    return Pipeline.find(str(pipeline_directory))


@pytest.fixture(scope="session")
def tagger(pipeline):
    return Tagger(pipeline)


@pytest.fixture(scope="session")
def nlp(pipeline_directory):
    return spacy.load(pipeline_directory)


@pytest.fixture
def loaded_spacy(monkeypatch, nlp):
    """Spares taggers the time to load the pipeline."""
    monkeypatch.setattr(tagging, "load_spacy", lambda pipeline: nlp)


@pytest.fixture
def no_spacy(monkeypatch):
    """Makes taggers fail that would load a pipeline."""
    monkeypatch.setattr(tagging, "load_spacy", None)


@pytest.fixture(scope="session")
def sample_sentences():
    """All distinct sentences of the sample."""
    return list(
        dict.fromkeys(
            sentence
            for task in TASKS.values()
            for split in SPLITS
            for file in getattr(task, split)
            for example in read_examples(SAMPLE / file, task, split)
            for sentence in example.sentences
        )
    )


def tags_of(tagger, tokenizer, sentences, max_length=512):
    """Return (pieces, their tags as pairs of labels) of each sentence."""
    ids, lengths = tokenizer.packed_ids(sentences, max_length)
    starts = tokenizer.packed_starts(sentences, max_length)
    tags = tagger.tags_of_pieces(sentences, lengths, starts)
    pos, ner = tagger.pipeline.pos_labels, tagger.pipeline.ner_labels
    labels = [(pos[a], ner[b]) for a, b in tags.T]
    pieces, ends = tokenizer.pieces_of(ids), np.cumsum(lengths)
    return [
        (pieces[end - n : end], labels[end - n : end]) for n, end in zip(lengths, ends, strict=True)
    ]


# ----------------------------------------------------------------------------------- the reference


def basic_tokens(text):
    """Do BERT's basic tokenization (Devlin et al. 2018), one character after the other. Return words
    as lists of (character, where it comes from in the text)."""
    words, word = [], []

    def end_word():
        if word:
            words.append(list(word))
        word.clear()

    for place, character in enumerate(text):
        category = unicodedata.category(character)
        if character in "\t\n\r" or character.isspace() and category[0] == "Z":
            end_word()
        elif category[0] == "C" or character == "\ufffd":
            continue
        else:
            code = ord(character)
            chinese = any(first <= code <= last for first, last in CHINESE)
            for part in unicodedata.normalize("NFD", character):
                for lower in part.lower() if unicodedata.category(part) != "Mn" else "":
                    ascii_mark = lower.isascii() and not lower.isalnum()
                    if chinese or ascii_mark or unicodedata.category(lower)[0] == "P":
                        end_word()
                        words.append([(lower, place)])
                    else:
                        word.append((lower, place))
    end_word()
    return words


CHINESE = [(0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F)]
CHINESE += [(0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)]


def word_pieces(text, vocabulary):
    """Yield the greedy longest matches: (piece, where its first character comes from)."""
    for word in basic_tokens(text):
        pieces, start = [], 0
        while start < len(word) and len(word) <= 100:
            for end in range(len(word), start, -1):
                piece = "".join(character for character, _ in word[start:end])
                piece = f"##{piece}" if start else piece
                if piece in vocabulary:
                    pieces.append((piece, word[start][1]))
                    start = end
                    break
            else:
                break
        yield from pieces if start == len(word) else [("[UNK]", word[0][1])]


def reference(doc, vocabulary):
    """Return (pieces, their tags as pairs of labels) of a sentence that spaCy has read."""
    pieces, tags = ["[CLS]"], [("none", "none")]
    for piece, place in word_pieces(doc.text, vocabulary):
        covering = [
            (token.tag_ or "none", token.ent_type_ or "none")
            for token in doc
            if token.idx <= place < token.idx + len(token.text)
        ]
        assert len(covering) == 1
        pieces.append(piece)
        tags += covering
    return pieces + ["[SEP]"], tags + [("none", "none")]


def assert_equal_to_reference(found, sentences, nlp, tokenizer):
    vocabulary = tokenizer.backend.get_vocab()
    for doc, pieces_and_tags in zip(nlp.pipe(sentences), found, strict=True):
        assert pieces_and_tags == reference(doc, vocabulary)


def test_tags_of_the_sample_agree_with_the_reference(
    tagger, nlp, minilm_tokenizer, sample_sentences
):
    """One sentence in ten; tests/slow has all of them."""
    sentences = sample_sentences[::10]
    found = tags_of(tagger, minilm_tokenizer, sentences)
    assert_equal_to_reference(found, sentences, nlp, minilm_tokenizer)
    seen = {labels for _, tags in found for labels in tags}
    assert len(seen) > 5  # the pipeline does not give everything the same tags


def is_old(character):
    """Return whether Unicode 3.2 knows the character as today's does: then all programs agree."""
    category = unicodedata.ucd_3_2_0.category(character)
    return category == unicodedata.category(character) not in ("Cn", "Cs")


TEXTS = st.lists(
    st.one_of(
        st.characters(min_codepoint=32, max_codepoint=0xFFFF).filter(is_old),
        st.sampled_from(
            [" ", "  ", " ", "\t", "\n", ".", "'", "Anna", "Obama", "the film", "Paris's"]
        ),
        st.sampled_from(
            ["é", "e\u0301", "İ", "ß", "Å", "ﬁ", "한", "東京", "😀", "\u200b", "don't", "\x00"]
        ),
    ),
    max_size=30,
).map("".join)


@settings(max_examples=40, deadline=None)
@given(st.lists(TEXTS, min_size=10, max_size=10))
def test_tags_of_any_text_agree_with_the_reference(tagger, nlp, minilm_tokenizer, texts):
    """400 texts; tests/slow has 2,000."""
    found = tags_of(tagger, minilm_tokenizer, texts)
    assert_equal_to_reference(found, texts, nlp, minilm_tokenizer)


def test_special_sentences(tagger, nlp, minilm_tokenizer):
    long = "Anna " * 600
    sentences = ["", "   ", "\n", "😀 😀", "Anna", long, "a [SEP] b [MASK]", "x" * 200]
    found = tags_of(tagger, minilm_tokenizer, sentences)
    none = ("none", "none")
    for pieces, tags in found[:3]:
        assert (pieces, tags) == (["[CLS]", "[SEP]"], [none] * 2)
    assert found[3][0] == ["[CLS]", "[UNK]", "[UNK]", "[SEP]"] and found[3][1][1] != none
    assert found[4][1] == [none, ("NNP", "PERSON"), none]
    assert len(found[5][0]) == 512
    expected = [none] + [(token.tag_, token.ent_type_ or "none") for token in nlp(long)[:510]]
    assert found[5][1] == expected + [none]
    special = [
        tag for piece, tag in zip(*found[6], strict=True) if piece in ("[CLS]", "[SEP]", "[MASK]")
    ]
    assert special == [none] * 4
    assert found[7][0] == ["[CLS]", "[UNK]", "[SEP]"] and found[7][1][1] != none


def test_characters_that_spacy_does_not_read_have_no_tags(
    pipeline, loaded_spacy, minilm_tokenizer, monkeypatch
):
    monkeypatch.setattr(tagging, "MAX_CHARACTERS", 10)
    ((pieces, tags),) = tags_of(Tagger(pipeline), minilm_tokenizer, ["Anna Anna Anna Anna"])
    assert [tag[0] != "none" for tag in tags] == [False, True, True, False, False, False]


def test_several_processes_give_what_one_gives(
    pipeline, loaded_spacy, minilm_tokenizer, sample_sentences, monkeypatch
):
    sentences, found = sample_sentences[:500], []
    monkeypatch.setattr(tagging, "CHUNK", 50)
    for cores in (1, 3):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
        found.append(tags_of(Tagger(pipeline), minilm_tokenizer, sentences))
    assert found[0] == found[1]


# ----------------------------------------------------------------------------------- the pipeline


def test_labels_are_spacys_own(pipeline, nlp):
    assert pipeline.pos_labels == ("none", *nlp.get_pipe("tagger").labels)
    assert pipeline.ner_labels == ("none", *nlp.get_pipe("ner").labels)
    assert (pipeline.name, pipeline.version) == ("en_tiny", "1.2.3")


@pytest.fixture
def copied(pipeline_directory, tmp_path):
    return Path(shutil.copytree(pipeline_directory, tmp_path / "copy"))


def test_a_pipeline_is_its_content_not_its_place(pipeline, copied):
    assert Pipeline.find(str(copied)) == pipeline
    model = copied / "tagger" / "model"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    assert Pipeline.find(str(copied)) != pipeline


def test_an_installed_pipeline_is_found_by_name(pipeline, copied, monkeypatch):
    """The layout of spaCy's packages: the pipeline in a folder of its own."""
    package = copied.parent / "en_tiny"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('need not be imported')")
    (package / "meta.json").write_text((copied / "meta.json").read_text())
    copied.rename(package / "en_tiny-1.2.3")
    monkeypatch.syspath_prepend(str(copied.parent))
    assert Pipeline.find("en_tiny") == pipeline
    assert Pipeline.find(str(package)) == pipeline


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def disable(copied, name):
    config = copied / "config.cfg"
    text = config.read_text()
    config.write_text(text.replace("disabled = []", f'disabled = ["{name}"]'))
    assert config.read_text() != text


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda copied: disable(copied, "ner"), "this spaCy pipeline has no entity recogniser"),
        (lambda copied: disable(copied, "tagger"), "this spaCy pipeline has no tagger"),
        (
            lambda copied: (copied / "meta.json").unlink(),
            "not a spaCy pipeline, it has no meta.json",
        ),
        (lambda copied: (copied / "config.cfg").unlink(), "not a spaCy pipeline, it has no config"),
        (lambda copied: (copied / "meta.json").write_text("{"), "meta.json: damaged"),
        (lambda copied: (copied / "meta.json").write_text("[]"), "meta.json: damaged"),
        (lambda copied: (copied / "config.cfg").write_text("[nlp"), "config.cfg: damaged"),
        (lambda copied: edit_json(copied / "meta.json", lambda v: v.pop("labels")), "damaged"),
        (lambda copied: shutil.rmtree(copied), "no such directory"),
    ],
)
def test_a_pipeline_of_no_use_is_one_clear_line(copied, damage, message):
    damage(copied)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        Pipeline.find(str(copied))
    assert "\n" not in str(error.value) and str(copied) in str(error.value)


@pytest.mark.parametrize("name", ["en_core_web_sm", "no_such_thing", "__main__", "datasets"])
def test_a_missing_pipeline_names_the_command_that_installs_it(name, flags, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    hide = {"en_core_web_sm": None}  # it may be installed here
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: hide[name] if name in hide else find_spec(name)
    )
    assert mc.main(flags + ["--additional_input", "--spacy_model", name]) == 1
    assert f"run: python -m spacy download {name}\n" in capsys.readouterr().err


def test_a_damaged_component_is_one_clear_line(copied, minilm_tokenizer):
    (copied / "ner" / "model").write_bytes(b"x")
    with pytest.raises(UserError, match="spaCy cannot load it"):
        tags_of(Tagger(Pipeline.find(str(copied))), minilm_tokenizer, ["Anna"])


@pytest.mark.parametrize("cores", [1, 2])
def test_a_component_that_fails_is_one_clear_line(
    pipeline, nlp, minilm_tokenizer, monkeypatch, cores
):
    """Sentences that were tagged before keep their tags."""

    def pipe(texts):
        for text in texts:
            if text == "fail":
                raise ValueError("[E999] no good")
            yield nlp(text)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.setattr(tagging, "CHUNK", 2)
    tagger = Tagger(pipeline)
    tagger._nlp = types.SimpleNamespace(pipe=pipe, vocab=nlp.vocab, pipeline=nlp.pipeline)
    with pytest.raises(UserError, match=r"spaCy cannot tag \(\[E999\] no good\)"):
        tags_of(tagger, minilm_tokenizer, ["a", "b", "c", "fail", "d"])
    tagger.rest()
    tags_of(tagger, minilm_tokenizer, ["a", "b"])
    assert tagger._nlp is None


def test_a_package_brings_its_own_code(copied, minilm_tokenizer, monkeypatch):
    """The package is like those of `spacy package --code`: only its code knows one component."""
    package = copied.parent / "en_shouting"
    package.mkdir()
    code = """
from spacy.language import Language
@Language.component("shout")
def shout(doc):
    return doc
"""
    (package / "__init__.py").write_text(code)
    edit_json(copied / "meta.json", lambda values: values.update(name="shouting"))
    (package / "meta.json").write_text((copied / "meta.json").read_text())
    config = (copied / "config.cfg").read_text()
    config = config.replace('["tagger","ner"]', '["tagger","ner","shout"]')
    (copied / "config.cfg").write_text(config + '\n[components.shout]\nfactory = "shout"\n')
    copied.rename(package / "en_shouting-1.2.3")
    monkeypatch.syspath_prepend(str(copied.parent))
    ((_, tags),) = tags_of(Tagger(Pipeline.find("en_shouting")), minilm_tokenizer, ["Anna"])
    assert tags[1] == ("NNP", "PERSON")


def test_linked_folders_count(pipeline, copied):
    elsewhere = copied.parent / "elsewhere"
    (copied / "ner").rename(elsewhere)
    (copied / "ner").symlink_to(elsewhere)
    assert Pipeline.find(str(copied)) == pipeline
    (elsewhere / "model").write_bytes(b"other")
    assert Pipeline.find(str(copied)) != pipeline


def test_labels_that_are_not_listed_are_named(copied, minilm_tokenizer):
    edit_json(copied / "meta.json", lambda values: values["labels"]["ner"].remove("PERSON"))
    tagger = Tagger(Pipeline.find(str(copied)))
    with pytest.warns(UserWarning, match=r"does not list PERSON \(2 times\): taken as none"):
        ((_, tags),) = tags_of(tagger, minilm_tokenizer, ["Anna Obama"])
    assert tags[1:-1] == [("NNP", "none")] * 2


# -------------------------------------------------------------------------------------- the cache


@pytest.fixture
def spacy_runs(monkeypatch):
    """How many sentences spaCy has read, call by call."""
    runs = []

    def run(nlp, pipeline, sentences):
        runs.append(len(sentences))
        return run_spacy(nlp, pipeline, sentences)

    run_spacy = tagging.run_spacy
    monkeypatch.setattr(tagging, "run_spacy", run)
    return runs


def test_each_sentence_is_read_once(
    pipeline, loaded_spacy, minilm_tokenizer, sample_sentences, tmp_path, spacy_runs
):
    sentences = sample_sentences[:700]
    first = tags_of(Tagger(pipeline, tmp_path), minilm_tokenizer, sentences + sentences[:50])
    tagger = Tagger(pipeline, tmp_path)
    assert tags_of(tagger, minilm_tokenizer, sentences) == first[:700]
    assert tagger._nlp is None
    tags_of(tagger, minilm_tokenizer, sample_sentences[600:800])
    assert spacy_runs == [700, 100]


def test_another_pipeline_has_a_cache_of_its_own(
    pipeline, loaded_spacy, copied, minilm_tokenizer, tmp_path, spacy_runs
):
    edit_json(copied / "meta.json", lambda values: values.update(version="1.2.4"))
    for chosen in (pipeline, Pipeline.find(str(copied)), pipeline):
        tags_of(Tagger(chosen, tmp_path / "cache"), minilm_tokenizer, ["Anna", "Paris"])
    assert spacy_runs == [2, 2]


def flip(path, offsets):
    content = bytearray(path.read_bytes())
    for offset in offsets:
        content[offset % len(content)] ^= 0x55
    path.write_bytes(content)


class Cache(NamedTuple):
    sentences: list[str]
    expected: list[tuple]  # their pieces and tags
    name: str
    content: bytes

    def write(self, folder):
        path = folder / self.name
        path.write_bytes(self.content)
        return path


def fill_cache(pipeline, tokenizer, sentences, folder):
    expected = tags_of(Tagger(pipeline, folder), tokenizer, sentences)
    (path,) = folder.glob("tags-*.sqlite")
    return Cache(sentences, expected, path.name, path.read_bytes())


@pytest.fixture(scope="module")
def large_cache(pipeline, minilm_tokenizer, sample_sentences, tmp_path_factory):
    folder = tmp_path_factory.mktemp("large_cache")
    return fill_cache(pipeline, minilm_tokenizer, sample_sentences[:300], folder)


@pytest.fixture(scope="module")
def small_cache(pipeline, minilm_tokenizer, tmp_path_factory):
    sentences = ["Anna is good", "the film", "Paris"]
    folder = tmp_path_factory.mktemp("small_cache")
    return fill_cache(pipeline, minilm_tokenizer, sentences, folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"x" * 5000),
        lambda path: path.write_bytes(path.read_bytes()[:-3000]),
        lambda path: path.write_bytes(path.read_bytes()[:2000]),
        lambda path: flip(path, [5]),
        lambda path: flip(path, range(4096, 4200)),
        lambda path: flip(path, range(100, 10**6, 997)),
        lambda path: flip(path, range(6000, 10**6, 30_011)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*damaged; its sentences are tagged again")
def test_a_damaged_cache_is_mended(
    pipeline, loaded_spacy, minilm_tokenizer, large_cache, tmp_path, damage
):
    sentences, expected, *_ = large_cache
    damage(large_cache.write(tmp_path))
    for _ in range(2):
        assert tags_of(Tagger(pipeline, tmp_path), minilm_tokenizer, sentences) == expected
    tagger = Tagger(pipeline, tmp_path)
    tags_of(tagger, minilm_tokenizer, sentences)
    assert tagger._nlp is None  # it is whole again


@pytest.mark.filterwarnings("ignore:.*damaged; its sentences are tagged again")
def test_any_changed_bit_is_mended(
    pipeline, nlp, no_spacy, minilm_tokenizer, small_cache, tmp_path
):
    path, whole = tmp_path / small_cache.name, small_cache.content
    rng = random.Random(0)
    used = [offset for offset, byte in enumerate(whole) if byte]  # most of the pages is empty
    for offset in rng.sample(used, min(len(used), 150)) + rng.sample(range(len(whole)), 100):
        changed = bytearray(whole)
        changed[offset] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        for known in (nlp, None):  # the second tagger would have to load spaCy
            tagger = Tagger(pipeline, tmp_path)
            tagger._nlp = known
            found = tags_of(tagger, minilm_tokenizer, small_cache.sentences)
            assert found == small_cache.expected, offset


def test_a_damaged_value_is_read_again(
    pipeline, loaded_spacy, minilm_tokenizer, small_cache, tmp_path, spacy_runs
):
    with sqlite3.connect(small_cache.write(tmp_path)) as connection:
        connection.execute(
            "UPDATE tags SET tokens = substr(tokens, 1, 40) "
            "WHERE sentence = (SELECT max(sentence) FROM tags)"
        )
    found = tags_of(Tagger(pipeline, tmp_path), minilm_tokenizer, small_cache.sentences)
    assert found == small_cache.expected
    assert spacy_runs == [1]


def test_a_cache_that_cannot_be_written_is_a_warning(
    pipeline, loaded_spacy, minilm_tokenizer, tmp_path
):
    expected = tags_of(Tagger(pipeline), minilm_tokenizer, ["Anna is good"])
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="so tags are not kept there"):
        tagger = Tagger(pipeline, tmp_path / "file")
    for _ in range(2):
        assert tags_of(tagger, minilm_tokenizer, ["Anna is good"]) == expected


def test_a_cache_without_a_lock_is_a_warning(
    pipeline, loaded_spacy, minilm_tokenizer, tmp_path, monkeypatch
):
    def refuse(store):
        raise PermissionError("Permission denied")

    expected = tags_of(Tagger(pipeline), minilm_tokenizer, ["Anna is good"])
    monkeypatch.setattr(tagging.TagStore, "lock", refuse)
    tagger = Tagger(pipeline, tmp_path)
    with pytest.warns(UserWarning, match="Permission denied, so tags are not kept there"):
        assert tags_of(tagger, minilm_tokenizer, ["Anna is good"]) == expected


def test_a_full_disk_is_a_warning_and_nothing_is_tagged_twice(
    pipeline, loaded_spacy, minilm_tokenizer, tmp_path, monkeypatch, spacy_runs
):
    opened = tagging.TagStore._open

    def small(store):
        result = opened(store)
        store.connection.execute("PRAGMA max_page_count = 8")
        return result

    monkeypatch.setattr(tagging, "CHUNK", 50)
    sentences = [f"the film {number}" for number in range(500)]
    expected = tags_of(Tagger(pipeline), minilm_tokenizer, sentences)
    monkeypatch.setattr(tagging.TagStore, "_open", small)
    tagger = Tagger(pipeline, tmp_path)
    with pytest.warns(UserWarning, match="disk is full, so tags are not kept"):
        assert tags_of(tagger, minilm_tokenizer, sentences) == expected
    assert spacy_runs == [500, 500]


def tag_slowly(pipeline, nlp, cache_dir, sentences, listed):
    """Tag with a new tagger, with a pause after each chunk, and list how many sentences spaCy reads.
    Runs in a process of its own."""

    def run(nlp, pipeline, sentences):
        with open(listed, "a") as file:
            print(len(sentences), file=file)
        for part in run_spacy(nlp, pipeline, sentences):
            yield part
            time.sleep(0.01)  # else a fast machine is done before it can be killed

    run_spacy, tagging.run_spacy, tagging.CHUNK = tagging.run_spacy, run, 50
    tagger = Tagger(pipeline, cache_dir)
    tagger._nlp = nlp
    tagger._look_up_or_tag(sentences, "")


@pytest.fixture
def tag_elsewhere(pipeline, nlp, sample_sentences, tmp_path):
    """Start a process that tags sentences into tmp_path/cache."""

    def start():
        arguments = pipeline, nlp, tmp_path / "cache", sample_sentences[:1000], tmp_path / "listed"
        process = multiprocessing.get_context("fork").Process(target=tag_slowly, args=arguments)
        process.start()
        return process

    return start


def test_runs_that_start_together_read_each_sentence_once(tag_elsewhere, tmp_path):
    runs = [tag_elsewhere() for _ in range(3)]
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert (tmp_path / "listed").read_text() == "1000\n"


def test_a_run_that_needs_no_tagging_does_not_wait(
    pipeline, no_spacy, minilm_tokenizer, small_cache, tmp_path
):
    small_cache.write(tmp_path)
    with Tagger(pipeline, tmp_path)._store.lock():
        found = tags_of(Tagger(pipeline, tmp_path), minilm_tokenizer, small_cache.sentences)
    assert found == small_cache.expected


def test_a_killed_run_keeps_its_tags_and_blocks_nobody(
    pipeline, loaded_spacy, minilm_tokenizer, tag_elsewhere, sample_sentences, tmp_path, spacy_runs
):
    sentences = sample_sentences[:1000]
    run = tag_elsewhere()
    paths = []
    while not paths or kept(paths[0]) < 200:
        paths = list((tmp_path / "cache").glob("tags-*.sqlite"))
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.join()
    found = tags_of(Tagger(pipeline, tmp_path / "cache"), minilm_tokenizer, sentences)
    assert len(spacy_runs) == 1 and spacy_runs[0] <= len(sentences) - 200
    assert found == tags_of(Tagger(pipeline), minilm_tokenizer, sentences)


def kept(path):
    try:
        with sqlite3.connect(path, timeout=60) as connection:
            return connection.execute("SELECT count(*) FROM tags").fetchone()[0]
    except sqlite3.OperationalError:  # no table yet
        return 0


# ------------------------------------------------------------------------------------- the encoder


TAGGED = BertConfig(**TINY, num_pos_tags=11, num_ner_tags=7)


@pytest.fixture
def tagged_batch(padded_batch):
    input_ids, mask = padded_batch
    tags = torch.stack([torch.randint(size, input_ids.shape) for size in (11, 7)])
    return input_ids, mask, tags * mask


def test_without_tags_it_is_exactly_bert(tiny_config):
    assert not any("tag" in name for name in BertModel(tiny_config).state_dict())
    assert not any("tag" in name for name in json.loads(tiny_config.to_json()))


def test_new_tag_embeddings_change_nothing(tagged_batch, tmp_path):
    plain = BertModel(BertConfig(**TINY)).eval()
    plain.save_pretrained(tmp_path)
    tagged = BertModel.from_pretrained(tmp_path, num_pos_tags=11, num_ner_tags=7).eval()
    input_ids, mask, tags = tagged_batch
    before, after = plain(input_ids, mask), tagged(input_ids, mask, tags=tags)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(
        not tensor.any()
        for tensor in BertModel(TAGGED).embeddings.state_dict().values()
        if len(tensor) in (11, 7)
    )


def test_tag_embeddings_are_added_to_those_of_words(tagged_batch, twins):
    """transformers' BERT has none, but it takes the sum in place of ids."""
    ours, theirs = twins(BertConfig(**TINY))
    tagged = BertModel(TAGGED).eval()
    tagged.load_state_dict(ours.state_dict(), strict=False)
    tables = [tagged.embeddings.pos_tag_embeddings, tagged.embeddings.ner_tag_embeddings]
    for table in tables:
        torch.nn.init.normal_(table.weight)
    input_ids, mask, tags = tagged_batch
    words = theirs.embeddings.word_embeddings(input_ids)
    for table, ids in zip(tables, tags, strict=True):
        words = words + table.weight[ids]
    expected = theirs(inputs_embeds=words, attention_mask=mask).last_hidden_state
    found = tagged(input_ids, mask, tags=tags)["last_hidden_state"]
    torch.testing.assert_close(found, expected * mask[..., None], atol=1e-5, rtol=1e-5)


def test_tags_and_tables_come_together(tagged_batch):
    input_ids, mask, tags = tagged_batch
    with pytest.raises(ValueError, match="this BERT needs tags"):
        BertModel(TAGGED)(input_ids, mask)
    with pytest.raises(ValueError, match="this BERT has no embeddings of tags"):
        BertModel(BertConfig(**TINY))(input_ids, mask, tags=tags)
    with pytest.raises(UserError, match="must both be 0, or neither"):
        BertConfig(**TINY, num_pos_tags=3)


def test_tagged_weights_come_back(tmp_path):
    model = BertModel(TAGGED)
    torch.nn.init.normal_(model.embeddings.pos_tag_embeddings.weight)
    model.save_pretrained(tmp_path)
    again = BertModel.from_pretrained(tmp_path)
    assert again.config == TAGGED
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(UserError, match="of the wrong shape: embeddings.pos_tag_embeddings"):
        BertModel.from_pretrained(tmp_path, num_pos_tags=12)


# ------------------------------------------------------------------------------------------- runs


class Run(NamedTuple):
    """A finished run. Tests change nothing in its folder."""

    folder: Path
    path: Path  # of its model


@pytest.fixture(scope="module")
def tag_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("tag_cache")


@pytest.fixture(scope="module")
def flags_in(tiny_directory, small_data, tag_cache):
    """The flags of a small run that writes into a folder; runs share the cache."""
    flags = ["--bert_model", tiny_directory, "--data_dir", small_data, "--cache_dir", tag_cache]
    flags += ["--epochs", 2, "--samples_per_epoch", 16, "--batch_size", 4]

    def add_outputs(folder):
        outputs = ["--models_dir", folder / "models_dir", "--logdir", folder / "logdir"]
        return [str(flag) for flag in [*flags, *outputs, "--predictions_dir", folder]]

    return add_outputs


@pytest.fixture
def flags(flags_in, tmp_path):
    return flags_in(tmp_path)


@pytest.fixture(scope="module")
def tag_flags(pipeline_directory):
    return ["--additional_input", "--spacy_model", str(pipeline_directory)]


@pytest.fixture
def tagged_flags(flags, tag_flags):
    return flags + tag_flags


def train(flags, folder):
    assert mc.main(flags) == 0
    (path,) = (folder / "models_dir").glob("*.pt")
    return Run(folder, path)


@pytest.fixture(scope="module")
def trained(flags_in, tag_flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return train(flags_in(folder) + tag_flags, folder)


@pytest.fixture(scope="module")
def trained_without_tags(flags_in, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return train(flags_in(folder), folder)


def predictions(folder):
    found = {path.name: path.read_bytes() for path in folder.glob("*-*.csv")}
    assert len(found) == 6
    return found


def test_a_run_with_tags(trained, flags, pipeline, tmp_path):
    model, _, checkpoint = mc.load_checkpoint(trained.path)
    assert checkpoint["tags"] == pipeline.to_dict()
    embeddings = model.bert.embeddings
    for table in (embeddings.pos_tag_embeddings, embeddings.ner_tag_embeddings):
        assert table.weight[1:].any() and not table.weight[0].any()
    assert mc.main(flags + ["--evaluate", str(trained.path)]) == 0
    assert predictions(tmp_path) == predictions(trained.folder)


def test_the_next_run_needs_no_spacy(tagged_flags, trained, monkeypatch):
    """tests/slow has it in a new process."""
    assert not hasattr(tagging, "spacy")
    for name in list(sys.modules):
        if name.split(".")[0] == "spacy":
            monkeypatch.delitem(sys.modules, name)
    assert mc.main(tagged_flags) == 0
    assert "spacy" not in sys.modules
    assert re.search(r"\[CLS\] \w+/[A-Z]+", first_rows(tagged_flags))


def first_rows(flags):
    """The text in TensorBoard of the last run."""
    logdir = Path(flags[flags.index("--logdir") + 1])
    newest = max(logdir.iterdir(), key=lambda run: run.stat().st_mtime)
    log = EventAccumulator(str(newest)).Reload()
    return log.Tensors("first rows/text_summary")[0].tensor_proto.string_val[0].decode()


def test_tags_are_learned_from(trained, trained_without_tags):
    """The same seed: the losses of the first step are the same to the last bit, later ones not."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = []
    for run in (trained_without_tags, trained):
        (directory,) = (run.folder / "logdir").iterdir()
        log = EventAccumulator(str(directory)).Reload()
        logs.append([event.value for event in log.Scalars("loss/sum")])
    assert logs[0][0] == logs[1][0] and logs[0][1:] != logs[1][1:]


def test_a_run_with_tags_resumes(trained, tagged_flags, copied, tmp_path, monkeypatch):
    step, calls = mc.training_step, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(mc, "training_step", stop)
    assert mc.main(tagged_flags) == 130
    (state,) = (tmp_path / "models_dir").glob("*.resume")
    resume = tagged_flags[:-1] + [str(copied), "--resume", str(state)]  # the same, elsewhere
    assert mc.main(resume) == 0
    assert predictions(tmp_path) == predictions(trained.folder)


def last_line(capsys, arguments):
    assert mc.main(arguments) == 1
    return capsys.readouterr().err.splitlines()[-1]


def test_checkpoints_of_another_pipeline_are_one_clear_line(trained, flags, copied, capsys):
    edit_json(copied / "meta.json", lambda values: values.update(version="1.2.4"))
    evaluate = flags + ["--evaluate", str(trained.path)]
    message = last_line(capsys, evaluate + ["--spacy_model", str(copied)])
    assert re.search(r"trained with tags of en_tiny 1.2.3 \(\w{8}\), not of en_tiny 1.2.4", message)
    shutil.rmtree(copied)
    message = last_line(capsys, evaluate + ["--spacy_model", str(copied)])
    assert re.search(
        r"trained with tags of en_tiny 1.2.3 \(\w{8}\); name it with --spacy_model \(.*: no such",
        message,
    )
    assert mc.main(evaluate + ["--additional_input"]) == 0  # it knows its pipeline


def test_damaged_checkpoints_are_one_clear_line(trained, flags, tmp_path, capsys):
    path = tmp_path / "damaged.pt"
    evaluate = flags + ["--evaluate", str(path)]
    content = torch.load(trained.path, weights_only=True)
    for changed in (None, {}, [], 0, "", content["tags"] | {"ner_labels": ["none"]}):
        torch.save(content | {"tags": changed}, path)
        assert f"error: {path}: a damaged checkpoint" in last_line(capsys, evaluate)
    for changed in ({}, {"spacy_model": None}):
        options = {key: v for key, v in content["options"].items() if key != "spacy_model"}
        torch.save(content | {"options": options | changed}, path)
        assert f"error: {path}: a damaged checkpoint" in last_line(capsys, evaluate)


def test_checkpoints_without_tags_take_none(
    trained_without_tags, flags, tagged_flags, tmp_path, capsys
):
    plain = trained_without_tags.path
    message = last_line(capsys, tagged_flags + ["--evaluate", str(plain)])
    assert f"{plain}: was trained without tags; leave --additional_input and" in message
    content, path = torch.load(plain, weights_only=True), tmp_path / "damaged.pt"
    for changed in ({}, [], 0, ""):
        torch.save(content | {"tags": changed}, path)
        message = last_line(capsys, flags + ["--evaluate", str(path)])
        assert f"error: {path}: a damaged checkpoint" in message


def test_resume_auto_knows_pipelines_apart(
    trained, tagged_flags, loaded_spacy, copied, tmp_path, capsys
):
    shutil.copytree(trained.folder / "models_dir", tmp_path / "models_dir")
    again = tagged_flags + ["--resume", "auto"]
    assert mc.main(again) == 0
    assert "is finished; its predictions are written again" in capsys.readouterr().out
    edit_json(copied / "meta.json", lambda values: values.update(version="1.2.4"))
    assert mc.main(again + ["--spacy_model", str(copied)]) == 0
    assert "has no run with these options; this is a new one" in capsys.readouterr().out


def test_an_encoder_that_brings_tag_embeddings_is_refused(
    trained, flags, tagged_flags, tmp_path, capsys
):
    """Nobody knows which pipeline they belong to."""
    model, tokenizer, _ = mc.load_checkpoint(trained.path)
    for part in (model.bert, tokenizer):
        part.save_pretrained(tmp_path / "encoder")
    for chosen in (flags, tagged_flags):
        message = last_line(capsys, chosen + ["--bert_model", str(tmp_path / "encoder")])
        assert "this encoder has embeddings of tags already" in message


def test_tag_embeddings_train_while_the_encoder_is_frozen(tagged_flags, tiny_directory, tmp_path):
    run = train(tagged_flags + ["--unfreeze_interval", "5"], tmp_path)
    embeddings = mc.load_checkpoint(run.path).model.bert.embeddings
    assert embeddings.pos_tag_embeddings.weight.any()
    frozen = BertModel.from_pretrained(tiny_directory).embeddings.word_embeddings.weight
    assert torch.equal(embeddings.word_embeddings.weight, frozen)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--option", "pretrain"], "which --option pretrain does not train"),
        (["--spacy_model", ""], "--spacy_model must not be empty"),
    ],
)
def test_flags_that_do_not_fit(tagged_flags, more, message, capsys):
    with pytest.raises(SystemExit):
        mc.main(tagged_flags + more)
    assert message in capsys.readouterr().err


def test_spacy_model_alone_is_refused(flags, capsys):
    with pytest.raises(SystemExit):
        mc.main(flags + ["--spacy_model", "x"])
    assert "--spacy_model: only for --additional_input" in capsys.readouterr().err
