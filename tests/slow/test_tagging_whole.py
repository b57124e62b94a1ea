"""The long half of the tests of tags; `./run_tests.sh --slow` runs it."""

import re
import subprocess
import sys

from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tagging import (  # noqa: F401
    TEXTS,
    Tagger,
    assert_equal_to_reference,
    first_rows,
    flags,
    flags_in,
    nlp,
    pipeline,
    sample_sentences,
    tag_cache,
    tag_flags,
    tagged_flags,
    tagger,
    tags_of,
    trained,
)


def test_all_sentences_of_the_sample_agree_with_the_reference(
    pipeline, nlp, minilm_tokenizer, sample_sentences  # noqa: F811
):
    found = tags_of(Tagger(pipeline), minilm_tokenizer, sample_sentences)
    assert_equal_to_reference(found, sample_sentences, nlp, minilm_tokenizer)


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXTS, min_size=10, max_size=10))
def test_many_texts_agree_with_the_reference(tagger, nlp, minilm_tokenizer, texts):  # noqa: F811
    """2,000 texts, or more."""
    found = tags_of(tagger, minilm_tokenizer, texts)
    assert_equal_to_reference(found, texts, nlp, minilm_tokenizer)


def test_the_next_process_needs_no_spacy(tagged_flags, trained):  # noqa: F811
    code = """
import sys, multitask_classifier as mc
assert mc.main(sys.argv[1:]) == 0
assert "spacy" not in sys.modules
"""
    command = [sys.executable, "-c", code, *tagged_flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\[CLS\] \w+/[A-Z]+", first_rows(tagged_flags))
