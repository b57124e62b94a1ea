"""Several models as one, both orders of a pair, and the answers from Python, against plain averages of
what single models say about one padded text at a time."""

import csv
import os
import shutil

import numpy as np
import pytest
import torch
from checkpoints import KINDS, load_pretrained, make_checkpoint_fixture  # noqa: F401

import multitask_classifier as mc
import predict
import predictor
from base_bert import BertConfig
from bert import BertModel
from checkpoint import checkpoint_content, write_checkpoint
from options import parse_options
from predictor import Predictor
from tasks import TASKS, Task
from tokenizer import BertTokenizer, word_piece_backend
from utils import UserError, seed_everything

SENTENCES = ["good", "one two three", "a, b.", "the film is not bad", "x"]
PAIRS = [("good", "bad"), ("one two", "three four five six"), ("c", "c"), ("it is a dog", "a film")]


@pytest.fixture(scope="module")
def other_encoder(tmp_path_factory):
    """Of another size, and with another vocabulary, than the tiny BERT."""
    letters = [chr(code) for code in range(ord("z"), ord("a") - 1, -1)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "film", *letters]
    pieces += ["##" + letter for letter in letters]
    seed_everything(3)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=256,
    )
    directory = tmp_path_factory.mktemp("other")
    BertModel(config).save_pretrained(directory)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    BertTokenizer(word_piece_backend(vocabulary, {}), 256).save_pretrained(directory)
    return directory


@pytest.fixture
def checkpoints(make_checkpoint, other_encoder):
    """kinds, "other" in front of those with the other encoder -> paths"""

    def make(*kinds):
        return [
            (
                make_checkpoint(kind.removeprefix("other "), other_encoder)
                if kind.startswith("other ")
                else make_checkpoint(kind)
            )
            for kind in kinds
        ]

    return make


@torch.no_grad()
def ask_alone(path, name, text, orders=1):
    """Return the probabilities of the classes, or the number, of one model for one text. With two orders
    the logarithms of the probabilities, or the numbers before they are clamped, are averaged."""
    model, tokenizer, _ = mc.load_checkpoint(path)
    model.eval()
    outputs = []
    for sentences in [text, text[::-1]][:orders]:
        inputs = []
        for sentence in sentences:
            batch = tokenizer([sentence], return_tensors="pt")
            inputs += [batch["input_ids"], batch["attention_mask"]]
        if len(sentences) == 1:
            output = model.heads[name](model.embed(*inputs))
        else:
            output = model._predict_pair(name, *inputs)
        outputs.append(output[0].double())
    if not model.tasks[name].classes:
        return float(np.clip(np.mean(outputs), *model.tasks[name].range))
    logs = np.mean([(o - o.exp().sum().log()).numpy() for o in outputs], axis=0)
    return np.exp(logs) / np.exp(logs).sum()


def average_alone(paths, name, text):
    """Return the mean of what the models say that know the task."""
    answers = []
    for path in paths:
        saved = mc.load_checkpoint(path).content["options"]
        if name in saved["tasks"]:
            twice = saved["both_orders"] and saved["tasks"][name].encoding != "bi"
            answers.append(ask_alone(path, name, text, 2 if twice and len(text) == 2 else 1))
    return np.mean(answers, axis=0)


def close_to(value):
    return pytest.approx(value, abs=2e-5)


GROUPS = [
    ["plain"],
    ["plain", "cross"],
    ["cross", "plain", "only sts"],
    ["plain", "other both", "only sts"],
    ["other plain", "hard", "soft"],
    ["plain", "orders"],
    ["orders", "other plain", "cross"],
    ["only sts", "plain", "only para cross"],
]


@pytest.mark.parametrize("kinds", GROUPS, ids=", ".join)
def test_several_models_answer_with_the_mean(checkpoints, kinds):
    paths = checkpoints(*kinds)
    texts = [*SENTENCES, *PAIRS]
    spread = []
    for text, answer in zip(texts, Predictor(paths).predict(texts), strict=True):
        if isinstance(text, str):
            shares = average_alone(paths, "sst", (text,))
            classes = TASKS["sst"].classes
            assert answer.sentiment == classes[shares.argmax()]
            found = answer.probabilities["sentiment"]
            assert list(found) == list(classes) and list(found.values()) == close_to(shares)
        else:
            assert answer.paraphrase == close_to(average_alone(paths, "para", text)[1])
            assert answer.similarity == close_to(average_alone(paths, "sts", text))
            spread.append([answer.paraphrase, answer.similarity])
    assert np.std(spread, axis=0).min() > 1e-3  # else equal answers would mean nothing


@pytest.mark.parametrize("kinds", [("tags", "plain"), ("plain", "tags")], ids=", ".join)
def test_a_model_with_tags_and_one_without_answer_together(checkpoints, kinds):
    paths, texts = checkpoints(*kinds), [(sentence,) for sentence in SENTENCES]
    alone = [Predictor(path).answers(texts) for path in paths]
    for answer, *singles in zip(Predictor(paths).answers(texts), *alone, strict=True):
        shares = [single["sentiment_probabilities"] for single in singles]
        assert not np.allclose(*shares, atol=1e-3)
        assert answer["sentiment_probabilities"] == close_to(np.mean(shares, axis=0))


def test_one_model_three_times_is_that_model(checkpoints):
    (path,) = checkpoints("both")
    one, three = (Predictor([path] * n).answers([(s,) for s in SENTENCES] + PAIRS) for n in (1, 3))
    for single, mean in zip(one, three, strict=True):
        for key, value in single.items():
            np.testing.assert_allclose(mean[key], value, atol=2e-6)


@pytest.mark.parametrize(
    "kinds, n_calls",
    [
        (["plain", "cross", "both"], 2),  # --max_length 40 of "cross" cuts elsewhere
        (["plain", "orders", "only sts"], 1),
        (["plain", "other plain", "both", "other both"], 2),
    ],
)
def test_text_is_tokenized_once_for_equal_tokenizers(checkpoints, kinds, n_calls, monkeypatch):
    model = Predictor(checkpoints(*kinds))
    calls, tokenize = [], predictor.tokenize_cached
    monkeypatch.setattr(
        predictor, "tokenize_cached", lambda *args: calls.append(args[0]) or tokenize(*args)
    )
    model.predict(PAIRS)
    assert calls == n_calls * [[text for column in zip(*PAIRS, strict=True) for text in column]]


@pytest.mark.parametrize("kinds", [["orders"], ["orders", "only para cross"]])
def test_the_order_of_a_pair_does_not_count_with_both_orders(checkpoints, kinds):
    """It does for a model that was not trained with them."""
    model, (single,) = Predictor(checkpoints(*kinds)), checkpoints("cross")
    differ = []
    for pair in PAIRS:
        one, other = (vars(answer) for answer in model.predict([pair, pair[::-1]]))
        assert one == {key: close_to(value) for key, value in other.items()}
        one, other = Predictor(single, tasks=["para"]).predict([pair, pair[::-1]])
        differ.append(abs(one.paraphrase - other.paraphrase))
    assert max(differ) > 1e-3
    asked = Predictor(single, both_orders=True)
    for pair in PAIRS:
        one, other = (vars(answer) for answer in asked.predict([pair, pair[::-1]]))
        assert one == {key: close_to(value) for key, value in other.items()}


def test_both_orders_are_refused_where_no_task_takes_them(checkpoints):
    with pytest.raises(UserError, match="both_orders: no task reads a pair as one sequence"):
        Predictor(checkpoints("plain")[0], both_orders=True)


def test_a_pair_whose_order_counts_is_not_exchanged(tiny_directory, tmp_path):
    rows = 'train = "a.csv"\ndev = "a.csv"\nsentences = ["one", "two"]\nlabel = "label"\n'
    rows += 'classes = ["no", "perhaps", "yes"]\nencoding = "cross"\n'
    (tmp_path / "my.toml").write_text(f"[follows]\n{rows}[same]\n{rows}symmetric = true\n")
    flags = ["--task_file", str(tmp_path / "my.toml"), "--bert_model", str(tiny_directory)]
    flags += ["--both_orders", "--same_encoding", "cross", "--follows_encoding", "cross"]
    options = parse_options(flags)
    model, tokenizer, _ = load_pretrained(options)
    path = tmp_path / "model.pt"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    write_checkpoint(path, checkpoint_content(model, tokenizer, options, 1, {}))
    differ = []
    for pair in PAIRS:
        answers = Predictor(path).predict([pair, pair[::-1]])
        shares = [{key: [*p.values()] for key, p in a.probabilities.items()} for a in answers]
        assert shares[0]["same"] == close_to(shares[1]["same"])
        assert shares[0]["same"] == close_to(ask_alone(path, "same", pair, 2))
        for order, text in enumerate((pair, pair[::-1])):
            assert shares[order]["follows"] == close_to(ask_alone(path, "follows", text))
        differ.append(np.abs(np.subtract(shares[0]["follows"], shares[1]["follows"])).max())
    assert max(differ) > 1e-2


# ------------------------------------------------------------------------------------- evaluations


def evaluate(paths, data, folder):
    """Run --evaluate and return the rows of its predictions: (task, split) -> [[id, value], ...]."""
    flags = ["--data_dir", str(data), "--predictions_dir", str(folder)]
    assert mc.main(["--evaluate", *map(str, paths), *flags, "--cache_dir", str(folder)]) == 0
    rows = {}
    for name in TASKS:
        for split in ("dev", "test"):
            with open(folder / f"{name}-{split}-output.csv", newline="") as file:
                _, *rows[name, split] = csv.reader(file, delimiter="\t")
    return rows


@pytest.mark.parametrize(
    "kinds", [["plain", "other both", "orders"], ["only sts", "orders", "plain"]], ids=", ".join
)
def test_an_evaluation_of_three_is_that_of_the_mean(checkpoints, kinds, small_data, tmp_path):
    paths = checkpoints(*kinds)
    found = evaluate(paths, small_data, tmp_path)
    for name, task in TASKS.items():
        with open(small_data / task.dev[0], newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))[:10]
        for row, (id, value) in zip(rows, found[name, "dev"], strict=False):
            assert id == row["id"]
            mean = average_alone(paths, name, tuple(row[column] for column in task.sentences))
            if task.classes:
                assert int(value) == mean.argmax()
            else:
                assert float(value) == close_to(mean)


def test_a_pattern_names_several(checkpoints, small_data, tmp_path):
    paths = checkpoints("plain", "both", "only sts")
    folder = tmp_path / "models"
    folder.mkdir()
    for path in paths:
        shutil.copy(path, folder)
    pattern, found = str(folder / "*.pt"), sorted(folder.iterdir())
    by_pattern = evaluate([pattern], small_data, tmp_path / "pattern")
    assert by_pattern == evaluate(found, small_data, tmp_path / "names")
    assert by_pattern != evaluate(found[:1], small_data, tmp_path / "one")
    lines, answers = tmp_path / "lines.txt", []
    lines.write_text("good\ngood\tbad\n")
    for number, names in enumerate([[pattern], found]):
        output = tmp_path / f"{number}.jsonl"
        # The file may stand behind the checkpoints.
        command = ["--checkpoint", *map(str, names), str(lines), "--json", "--output", str(output)]
        assert predict.main(command) == 0
        answers.append(output.read_text())
    assert answers[0] == answers[1] and answers[0].count("\n") == 2


# ------------------------------------------------------------------------------------- from Python


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tags"])
def test_vectors_are_those_of_the_model(checkpoints, kind):
    (path,) = checkpoints(kind)
    model, tokenizer, content = mc.load_checkpoint(path)
    model.eval()
    texts = [*SENTENCES, "a longer sentence with many words, too many for some"]
    vectors = Predictor(path, batch_size=2).embed(texts)
    assert vectors.shape == (6, 24) and vectors.dtype == np.float32
    for text, vector in zip(texts, vectors, strict=True):
        longest = content["options"]["max_length"]
        batch = tokenizer([text], truncation=True, max_length=longest, return_tensors="pt")
        with torch.no_grad():
            expected = model.embed(batch["input_ids"], batch["attention_mask"])[0]
        np.testing.assert_allclose(vector, expected, atol=1e-5)
    assert Predictor(path).embed([]).shape == (0, 24) and Predictor(path).predict([]) == []


def test_it_takes_a_path_or_several_and_some_of_the_tasks(checkpoints):
    (path,) = checkpoints("plain")
    expected = Predictor([path]).predict(PAIRS)
    assert expected == Predictor(path).predict(PAIRS) == Predictor(str(path)).predict(PAIRS)
    (answer,) = Predictor(path, tasks=["sts"]).predict(PAIRS[:1])
    assert vars(answer) == {"similarity": expected[0].similarity}
    assert Predictor(path, tasks="sts").predict(PAIRS[:1]) == [answer]
    (cut,) = Predictor(checkpoints("cut")).predict(["a b c d e f g h i j"])
    assert cut.cut and not hasattr(expected[0], "cut")


def test_it_needs_no_data_and_no_arguments_of_the_program(checkpoints, tmp_path, monkeypatch):
    (path,) = checkpoints("plain")
    content = torch.load(path, weights_only=True)
    content["options"]["data_dir"] = str(tmp_path / "gone")
    torch.save(content, tmp_path / "model.pt")
    monkeypatch.setattr("sys.argv", ["a_program.py", "--of_another", "program"])
    assert Predictor(tmp_path / "model.pt").predict(PAIRS) == Predictor(path).predict(PAIRS)


@pytest.mark.parametrize(
    "texts, message",
    [
        ("good", "give a list of texts, such as"),
        (("a", "b"), "give a list of texts, such as"),
        (None, "give a list of texts, such as"),
        ([("a", "b"), ("a", "b", "c")], "texts[1] is ('a', 'b', 'c'); give one sentence (a str)"),
        (["good", ()], "texts[1] is (); give one sentence (a str) or a pair (two str)"),
        ([None], "texts[0] is None; give"),
        ([("a", 3)], "texts[0] is ('a', 3); give"),
        ([{"a": "b" * 1000}], "texts[0] is {'a': 'bb"),
    ],
)
def test_texts_of_no_use_are_one_line(checkpoints, texts, message):
    model = Predictor(checkpoints("plain"))
    for ask in (model.predict, model.embed):
        with pytest.raises(UserError) as caught:
            ask(texts)
        assert message in str(caught.value) and len(str(caught.value)) < 200


def test_a_text_that_no_task_takes_is_one_line(checkpoints):
    with pytest.raises(UserError, match=r"texts\[1\] has two sentences, where only sentiment"):
        Predictor(checkpoints("plain"), tasks="sst").predict(["good", ("a", "b")])
    with pytest.raises(UserError, match="only sentences have vectors"):
        Predictor(checkpoints("plain")).embed(["good", ("a", "b")])


def test_texts_without_an_answer_keep_their_place(checkpoints):
    model = Predictor(checkpoints("plain"))
    reasons = {"": "empty", "\ud800": "not UTF-8 text", "é" * 50_001: "longer than 100000 bytes"}
    texts = ["a b", *reasons, (" ", "\t"), ("a", ""), "x" * 100_000]
    answers = model.predict(texts)
    assert list(map(vars, answers[1:5])) == [
        {"error": reason} for reason in [*reasons.values(), "empty"]
    ]
    assert [answers[0], answers[5]] == model.predict(["a b", ("a", "")])
    assert answers[6].sentiment and not hasattr(answers[6], "error")
    tab, space = model.predict(["a\tb", "a b"])
    assert tab == space and tab.sentiment


def test_labels_with_zeros_before_them_stay_texts():
    """Whole numbers are numbers in JSON."""
    texts = ("01", "7", "10")
    task = Task(name="nli", sentences=("a", "b"), label="l", classes=("x", "y", "z"), texts=texts)
    answers = predictor.read_outputs(task, torch.eye(3))
    assert [answer["nli"] for answer in answers] == ["01", 7, 10]
    assert [predictor.name_classes(answer, [task]).nli for answer in answers] == ["x", "y", "z"]


def other_task(path, target, **changes):
    """Write a checkpoint whose task sts has another row."""
    content = torch.load(path, weights_only=True)
    content["options"]["tasks"]["sts"] |= changes
    torch.save(content, target)
    return target


def test_models_of_no_use_are_one_line(checkpoints, tmp_path, capsys):
    plain, sts, para = checkpoints("plain", "only sts", "only para cross")
    other = other_task(sts, tmp_path / "other.pt", range=[1.0, 10.0])
    cases = {
        f"{tmp_path}/no*.pt: no file has such a name": [f"{tmp_path}/no*.pt"],
        f"{tmp_path}/absent.pt: no such file": [plain, tmp_path / "absent.pt"],
        f"{para}: shares no task with {sts}, so they are not averaged": [sts, para],
        f"{other}: its task sts is another one than that of {plain}": [plain, other],
    }
    (tmp_path / "file").touch()
    for message, paths in cases.items():
        names = list(map(str, paths))
        with pytest.raises(UserError) as caught:
            Predictor(names)
        assert str(caught.value) == message
        commands = {
            mc.main: ["--evaluate", *names],
            predict.main: ["--checkpoint", *names, "--json", os.devnull],
        }
        for main, command in commands.items():
            assert main(command) == 1
            assert capsys.readouterr().err == f"error: {message}\n"
    with pytest.raises(UserError, match="no checkpoint is given"):
        Predictor([])
    with pytest.raises(UserError, match="'fp16': must be one of auto, float32, bfloat16"):
        Predictor(plain, precision="fp16")
    with pytest.raises(UserError, match="several models have no common vectors"):
        Predictor([plain, plain]).embed(SENTENCES)
    with pytest.raises(UserError, match="were not trained on 'nli'; known: sst, para, sts"):
        Predictor([sts, plain], tasks=["sts", "nli"])
