"""Fixtures. Our datasets.py has the name of a PyPI package that transformers looks for, so
transformers is imported, and decides that the package is not there, before our root is on the path.
"""

import csv
import os
import random
import sys
import tempfile
from pathlib import Path

# Code of exported models is copied there; processes that test at the same time would disturb each other.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

import transformers  # noqa: E402
from transformers.utils import is_datasets_available  # noqa: E402

TRANSFORMERS_SEES_DATASETS = is_datasets_available()  # it remembers the answer

sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

import utils  # noqa: E402
from base_bert import BertConfig  # noqa: E402
from bert import BertModel  # noqa: E402
from pretrained import minilm_directory  # noqa: E402
from tasks import TASKS, read_task_file  # noqa: E402
from tokenizer import BertTokenizer, word_piece_backend  # noqa: E402
from utils import seed_everything  # noqa: E402

# Its effects would outlast a test, and hypothesis needs denormal numbers.
utils.flush_denormals = lambda: None

settings.register_profile("thorough", max_examples=2000)  # for pytest --hypothesis-profile

# Models of a few thousand weights: more threads only wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

SAMPLE = ROOT / "data" / "sample"

# Every size differs from every other, so that a swapped axis cannot pass.
TINY = dict(
    vocab_size=99,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=37,
    max_position_embeddings=41,
    type_vocab_size=2,
)


@pytest.fixture
def root():
    return ROOT


@pytest.fixture(autouse=True)
def same_seed():
    seed_everything(1)


@pytest.fixture(scope="session")
def minilm_path():
    return minilm_directory()


@pytest.fixture(scope="session")
def minilm_tokenizer():
    return BertTokenizer.from_pretrained("minilm")


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory):
    """A random two-layer BERT with a vocabulary of letters, in Hugging Face layout."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    pieces += ["##" + letter for letter in letters] + list(",.?!:'\"-;")
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    directory = tmp_path_factory.mktemp("tiny")
    seed_everything(2)
    config = BertConfig(
        vocab_size=len(pieces) + 3,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=37,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(directory)
    BertTokenizer(word_piece_backend(vocabulary, {}), 128).save_pretrained(directory)
    return directory


TAGGED_WORDS = {  # word -> its tags in the training sentences of the tiny pipeline
    "the": ("DT", "O"),
    "a": ("DT", "O"),
    "film": ("NN", "O"),
    "dog": ("NN", "O"),
    "is": ("VBZ", "O"),
    "seems": ("VBZ", "O"),
    "good": ("JJ", "O"),
    "Anna": ("NNP", "B-PERSON"),
    "Obama": ("NNP", "B-PERSON"),
    "Paris": ("NNP", "B-GPE"),
    "in": ("IN", "O"),
    ".": (".", "O"),
}


@pytest.fixture(scope="session")
def pipeline_directory(tmp_path_factory):
    """A spaCy pipeline with a tagger and an entity recogniser, of a few seconds of training."""
    import spacy
    from spacy.tokens import Doc
    from spacy.training import Example

    random.seed(0)
    spacy.util.fix_random_seed(0)
    nlp = spacy.blank("en", meta={"name": "tiny", "version": "1.2.3"})
    width = {"width": 16, "depth": 1, "embed_size": 200}
    model = {"@architectures": "spacy.HashEmbedCNN.v2", "pretrained_vectors": None} | width
    model |= {"window_size": 1, "maxout_pieces": 2, "subword_features": True}
    for name in ("tagger", "ner"):
        nlp.add_pipe(name, config={"model": {"tok2vec": model}})
    examples = []
    for _ in range(60):
        words = random.choices(list(TAGGED_WORDS), k=random.randint(3, 8))
        tags, entities = zip(*(TAGGED_WORDS[word] for word in words))
        doc = Doc(nlp.vocab, words=words, tags=tags, ents=list(entities))
        examples.append(Example(nlp.make_doc(doc.text), doc))
    optimizer = nlp.initialize(lambda: examples)
    for _ in range(60):
        nlp.update(examples, sgd=optimizer)
    directory = tmp_path_factory.mktemp("spacy") / "tiny"
    nlp.to_disk(directory)
    return directory


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """The first rows of each file of the sample."""
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS.values():
        for split, n_rows in {"train": 64, "dev": 40, "test": 40}.items():
            (name,) = getattr(task, split)
            lines = (SAMPLE / name).read_text(encoding="utf-8").splitlines(keepends=True)
            (folder / name).write_text("".join(lines[: n_rows + 1]), encoding="utf-8")
    return folder


@pytest.fixture
def flags(tiny_directory, small_data, tmp_path):
    """Flags of a run of a second, with all that it writes under tmp_path."""
    flags = ["--bert_model", str(tiny_directory), "--data_dir", str(small_data)]
    for name in ("models_dir", "logdir", "cache_dir"):
        flags += [f"--{name}", str(tmp_path / name)]
    for name in TASKS:
        for split in ("dev", "test"):
            flags += [f"--{name}_{split}_out", str(tmp_path / f"{name}-{split}.csv")]
    return flags + ["--epochs", "2", "--samples_per_epoch", "64", "--batch_size", "16"]


OWN_TASKS = """
[emotion]
train = "emotion.csv"
sentences = "text"
label = "emotion"
classes = ["anger", "disgust", "fear", "joy"]
weight = 2

[nli]
title = "entailment"
train = "nli.csv"
dev = "nli.csv"
test = "nli.csv"
sentences = ["premise", "hypothesis"]
label = "relation"
classes = ["entailment", "neutral", "contradiction"]
metrics = ["matthews", "accuracy"]

[rating]
train = "rating.csv"
dev = "rating.csv"
test = "rating.csv"
sentences = "text"
label = "stars"
range = [1, 5]
samples = 24
"""
OWN_ROWS = {"emotion": 40, "nli": 24, "rating": 32}


@pytest.fixture
def own_tasks(tmp_path):
    """Flags of a run with tasks of a file: one without dev rows, a pair whose order counts, and a number
    for a sentence."""
    folder, path = tmp_path / "own", tmp_path / "my.toml"
    folder.mkdir()
    path.write_text(OWN_TASKS)
    rng = np.random.default_rng(3)
    for name, task in read_task_file(str(path)).items():
        rows = [[*task.sentences, task.label]]
        for _ in range(OWN_ROWS[name]):
            sizes = rng.integers(1, 9, len(task.sentences))
            label = rng.choice(task.classes) if task.classes else f"{rng.uniform(1, 5):.2f}"
            rows.append([*(" ".join(rng.choice(list("abcdefgh"), n)) for n in sizes), label])
        with open(folder / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
    return ["--task_file", str(path), "--data_dir", str(folder)]


@pytest.fixture
def padded_batch():
    """Rows of 9, 2, 5, 1, 5 and 9 real tokens, in no order."""
    lengths = [9, 2, 5, 1, 5, 9]
    input_ids = torch.randint(1, TINY["vocab_size"], (len(lengths), max(lengths)))
    mask = torch.tensor([[1] * length + [0] * (9 - length) for length in lengths])
    return input_ids * mask, mask


def hugging_face_twin(config: BertConfig, dtype=torch.float32, **changes):
    """(our BERT, transformers' BERT) with the same random weights, in evaluation mode."""
    ours = BertModel(config).to(dtype).eval()
    values = {name: getattr(config, name) for name in config.__dataclass_fields__} | changes
    theirs = transformers.BertModel(transformers.BertConfig(**values)).to(dtype).eval()
    with torch.no_grad():
        for parameter in ours.parameters():  # bigger than the initial ones, biases too
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.fixture
def twins():
    return hugging_face_twin


@pytest.fixture
def tiny_config():
    return BertConfig(**TINY)
