"""Tasks from a file: docs/tasks.md is true, and the whole run follows from a table."""

import csv
import functools
import json
import math
import random
import re
import tomllib
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import test_resume
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutated
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import OFTEN, Killed, assert_same, nth_call

import experiments
import multitask_classifier as mc
import predict
import report
from batches import collate
from bert import BertModel
from datasets import SMOKETEST_ROWS, Example, TaskDataset, load_data, read_examples
from evaluation import Evaluation, confusion_figure
from options import changed_options, parse_options
from result_tables import BUDGETS, Budget
from streams import complain
from tasks import READERS, TASKS, read_task_file
from tokenizer import BertTokenizer
from utils import UserError

PAGE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
EXAMPLE, *WELL_KNOWN = re.findall(r"^```toml\n(.*?)^```", PAGE, re.M | re.S)
NONE = math.nan
# As the default, but a change of the page cannot become a change of the test.
EMOTIONS = ["anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise"]

# ---------------------------------------------------------------------- files of well-known shapes


def lines(*rows):
    """A text file with tabs where `rows` have |."""
    return "".join(row.replace("|", "\t") + "\n" for row in rows).encode()


def json_lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def snli(gold, first, second, number):
    row = {"annotator_labels": [gold], "captionID": "3416050480.jpg#4", "gold_label": gold}
    return row | {"pairID": f"3416050480.jpg#4r{number}", "sentence1": first, "sentence2": second}


GLUE_MNLI = (
    "index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse|sentence1_parse|"
    "sentence2_parse|sentence1|sentence2|label1|gold_label"
)
# task -> file -> its content, and the examples that it has for the split of the table.
SHAPES = {
    "sst2": {
        "SST-2/train.tsv": (
            lines("sentence|label", 'a "tense film |0', "goes to absurd lengths |1"),
            [Example(('a "tense film ',), 0, "1"), Example(("goes to absurd lengths ",), 1, "2")],
        ),
        "SST-2/dev.tsv": (
            lines("sentence|label", "it 's fine .|1", '" so-so|'),
            [Example(("it 's fine .",), 1, "1"), Example(('" so-so',), NONE, "2")],
        ),
        "SST-2/test.tsv": (
            lines("index|sentence", "0|no label here", '1|"'),
            [Example(("no label here",), NONE, "1"), Example(('"',), NONE, "2")],
        ),
    },
    "qqp": {
        "QQP/train.tsv": (
            lines(
                "id|qid1|qid2|question1|question2|is_duplicate",
                '133273|213221|213222|What is a "noun?|And a "verb"?|0',
                "402555|536040|536041|How do I, if at all, cook?|How to cook?|1",
                "7|8|9|Too few cells?",
            ),
            [
                Example(('What is a "noun?', 'And a "verb"?'), 0, "1"),
                Example(("How do I, if at all, cook?", "How to cook?"), 1, "2"),
            ],
        ),
    },
    "stsb": {
        "STS-B/train.tsv": (
            lines(
                "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2|score",
                "0|main-captions|MSRvid|2012test|0001|none|none|A plane.|An air plane.|5.000",
                '7|main-news|headlines|2013|0003|none|none|"Stocks rise|Stocks, fall|1.6',
            ),
            [
                Example(("A plane.", "An air plane."), 5, "0"),
                Example(('"Stocks rise', "Stocks, fall"), 1.6, "7"),
            ],
        ),
    },
    "mnli": {
        "MNLI/train.tsv": (
            lines(
                GLUE_MNLI,
                "0|31193|31193n|government|(a)|(b)|(A)|(B)|One, two.|Two dimensions|neutral|neutral",
                '2|5|5e|fiction|( "c )|( d )|(C)|(D)|He said "yes|He agreed|entailment|entailment',
            ),
            [
                Example(("One, two.", "Two dimensions"), 1, "31193n"),
                Example(('He said "yes', "He agreed"), 0, "5e"),
            ],
        ),
        "MNLI/dev_matched.tsv": (
            lines(
                GLUE_MNLI.replace("|gold_label", "|label2|label3|label4|label5|gold_label"),
                "0|9|9c|slate|a|b|c|d|It is.|It is not.|neutral|neutral|contradiction|neutral|"
                "neutral|contradiction",
                "1|9|9x|slate|a|b|c|d|It is.|Is it?|neutral|entailment|neutral|entailment|x|-",
            ),
            [
                Example(("It is.", "It is not."), 2, "9c"),
                Example(("It is.", "Is it?"), NONE, "9x"),
            ],
        ),
    },
    "cola": {
        "CoLA/train.tsv": (
            lines(
                "gj04|1||Our friends won't, I, you, and he, buy it.", 'gj04|0|*|They "drank the.'
            ),
            [
                Example(("Our friends won't, I, you, and he, buy it.",), 1, "1"),
                Example(('They "drank the.',), 0, "2"),
            ],
        ),
        "CoLA/test.tsv": (
            lines("index|sentence", "0|Bill whistled past the house.", "1|The car, honked."),
            [
                Example(("Bill whistled past the house.",), NONE, "1"),
                Example(("The car, honked.",), NONE, "2"),
            ],
        ),
    },
    "quora": {
        "quora/train.tsv": (
            lines(
                '"id"|"qid1"|"qid2"|"question1"|"question2"|"is_duplicate"',
                '"0"|"1"|"2"|"What is ""it""?"|"What, is it?"|"0"',
                '"105796"|"9"|"8"|"How?\n\nAnd why?\n"|"How, why?"|"1"',
                '"3"|"4"|"5"|"Last"|"One"|"0"',
            ),
            [
                Example(('What is "it"?', "What, is it?"), 0, "1"),
                Example(("How?\n\nAnd why?\n", "How, why?"), 1, "2"),
                Example(("Last", "One"), 0, "3"),
            ],
        ),
    },
    "sick": {
        "SICK_train.txt": (
            lines(
                "pair_ID|sentence_A|sentence_B|relatedness_score|entailment_judgment",
                "1|A group of kids is playing|A group of boys, too|4.5|NEUTRAL",
                "2|A man|Two dogs|1|CONTRADICTION",
            ),
            [
                Example(("A group of kids is playing", "A group of boys, too"), 4.5, "1"),
                Example(("A man", "Two dogs"), 1, "2"),
            ],
        ),
    },
    "stsbenchmark": {
        "stsbenchmark/sts-train.csv": (
            lines(
                "main-captions|MSRvid|2012test|0001|5.000|A plane, red, is off.|An air plane.",
                'main-news|headlines|2015|0144|0.4|"Two killed|A cat|http://a.b|c, d, e, f, g',
            ),
            [
                Example(("A plane, red, is off.", "An air plane."), 5, "1"),
                Example(('"Two killed', "A cat"), 0.4, "2"),
            ],
        ),
    },
    "snli": {
        "snli_1.0_train.jsonl": (
            json_lines(
                snli("neutral", "A person on a horse.", "A person at\ta\nshow.", "1n"),
                snli("-", "A person.", "No one agreed.", "2x"),
                snli("contradiction", "Zwölf Bäume, «quoted»", 'A "diner".', "3c"),
            ),
            [
                Example(
                    ("A person on a horse.", "A person at\ta\nshow."), 1, "3416050480.jpg#4r1n"
                ),
                Example(("Zwölf Bäume, «quoted»", 'A "diner".'), 2, "3416050480.jpg#4r3c"),
            ],
        ),
        "snli_1.0_dev.jsonl": (
            json_lines(snli("-", "A.", "B.", "1n"), snli("entailment", "C.", "D.", "2e")),
            [
                Example(("A.", "B."), NONE, "3416050480.jpg#4r1n"),
                Example(("C.", "D."), 0, "3416050480.jpg#4r2e"),
            ],
        ),
    },
    "spreadsheet": {
        "Answers.CSV": (  # as Excel saves "CSV UTF-8"
            '\ufeffNo.,Points,Answer text\r\n1,7.5,"Well, ""it"" is\no."\r\n2,10,Naïve\r\n'.encode(),
            [Example(('Well, "it" is\no.',), 7.5, "1"), Example(("Naïve",), 10, "2")],
        ),
        "Answers dev.CSV": (  # where numbers have a decimal comma
            'Answer text;Points\r\n"One, two; three";3\r\nYes, no;4\r\n'.encode(),
            [Example(("One, two; three",), 3, "1"), Example(("Yes, no",), 4, "2")],
        ),
    },
    "news": {
        "train-00000-of-00001.parquet": (
            {
                "text": ["Cup,\nfinal", "Shares\tfell", ""],
                "label": [1, 2, 0],
                "more": [None, 0.5, 1],
            },
            [Example(("Cup,\nfinal",), 1, "1"), Example(("Shares\tfell",), 2, "2")],
        ),
        "test-00000-of-00001.parquet": (
            {"text": ["A probe", "?"], "label": [3, None]},
            [Example(("A probe",), 3, "1"), Example(("?",), NONE, "2")],
        ),
    },
}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        pd.DataFrame(content).to_parquet(path)
    else:
        path.write_bytes(content)


@pytest.fixture
def page_tasks(tmp_path):
    path = tmp_path / "page.toml"
    path.write_text("\n".join([EXAMPLE, *WELL_KNOWN]), encoding="utf-8")
    return read_task_file(str(path))


def test_every_table_of_the_page_is_tried_here(page_tasks):
    assert page_tasks.keys() == SHAPES.keys() | tomllib.loads(EXAMPLE).keys()


@pytest.mark.parametrize("task, file", [(task, file) for task in SHAPES for file in SHAPES[task]])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_page_reads_files_of_this_shape(task, file, page_tasks, tmp_path):
    task = page_tasks[task]
    (split,) = [split for split in ("train", "dev", "test") if file in getattr(task, split)]
    content, expected = SHAPES[task.name][file]
    write(tmp_path / file, content)
    found = read_examples(tmp_path / file, task, split)
    assert [example[::2] for example in found] == [example[::2] for example in expected]
    labels = zip(found, expected, strict=True)
    assert all(one.label == other.label or one.label != one.label for one, other in labels)


@pytest.mark.parametrize("task, file", [(task, file) for task in SHAPES for file in SHAPES[task]])
def test_predict_reads_these_files_like_the_task(task, file, page_tasks, tmp_path):
    """With `--task`, also those without a header or quotes. Rows without a label are answered."""
    content, expected = SHAPES[task][file]
    write(tmp_path / file, content)
    chunks = predict.read_table_queries(str(tmp_path / file), [page_tasks[task]])
    sentences = [query.sentences for chunk in chunks for query in chunk if not query.problem]
    assert [s for s in sentences if s in [e.sentences for e in expected]] == [
        example.sentences for example in expected
    ]


def test_the_page_lists_every_key():
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| .* \|$", PAGE.split("## Heads")[0], re.M)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(READERS)


# ------------------------------------------------------------------------------- the whole way

WORDS = "the a film dog is seems good bad red blue quick slow".split()


def sentence(rng):
    return " ".join(rng.choices(WORDS, k=rng.randint(2, 7)))


@pytest.fixture(scope="session")
def my_data(tmp_path_factory):
    """Files for the example of the page, with cells that a comma-separated file quotes, and a sample of
    the built-in tasks' files."""
    folder, rng = tmp_path_factory.mktemp("my_data"), random.Random(5)
    for task in TASKS.values():
        for file in (*task.train, *task.dev, *task.test):
            text = (ROOT / "data" / "sample" / file).read_text(encoding="utf-8")
            rows = text.splitlines(keepends=True)[: SMOKETEST_ROWS + 1]
            (folder / file).write_text("".join(rows), encoding="utf-8")
    tables = tomllib.loads(EXAMPLE)
    assert tables["emotion"]["classes"] == EMOTIONS
    for split in ("train", "dev", "test"):
        with open(folder / tables["emotion"][split], "w", newline="", encoding="utf-8-sig") as file:
            rows = csv.writer(file)
            rows.writerow(["writer", "text", "emotion"])
            # The seventh class is among the rows.
            rows.writerows(
                [f"w{n}", f"{sentence(rng)}, {sentence(rng)}", EMOTIONS[(6 * n) % 7]]
                for n in range(40)
            )
    relations = tables["nli"]["classes"]
    for split in ("train", "dev"):
        rows = [
            {"premise": sentence(rng), "hypothesis": sentence(rng), "relation": relations[n % 3]}
            for n in range(40)
        ]
        write(folder / tables["nli"][split], json_lines(*rows))
    for file in (*tables["rating"]["train"], tables["rating"]["dev"]):
        content = {"stars": [1 + 0.25 * (n % 17) for n in range(20)]}
        write(folder / file, content | {"review": [sentence(rng) for _ in range(20)]})
    return folder


@pytest.fixture
def run_flags(tiny_directory, my_data, tmp_path):
    flags = ["--bert_model", str(tiny_directory), "--data_dir", str(my_data), "--smoketest"]
    for name in ("models_dir", "logdir", "cache_dir", "predictions_dir"):
        flags += [f"--{name}", str(tmp_path / name)]
    return flags + ["--epochs", "2"]


@pytest.fixture
def my_toml(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(EXAMPLE, encoding="utf-8")
    return str(path)


outcome = functools.partial(test_resume.outcome, files="predictions_dir/*.csv", n_files=None)


ALL = ["--tasks", "emotion,nli,rating,sst,para,sts"]
OPTIMIZER = {"adamw": [], "sophiag": ["--optimizer", "sophiag", "--hess_interval", "2"]}


def predicted(path):
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file, delimiter="\t")
    return header, rows


@pytest.mark.parametrize("optimizer", OPTIMIZER)
def test_tasks_from_a_file_go_the_whole_way(
    optimizer, run_flags, my_toml, my_data, tmp_path, monkeypatch, capsys
):
    chosen = [*run_flags, "--task_file", my_toml, *ALL, *OPTIMIZER[optimizer]]
    for place in ((mc, "training_step", 6), (mc.evaluation, "outputs", 9)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(*place[:2], nth_call(place[2], getattr(*place[:2]), before=False))
            mc.main([*chosen, *OFTEN, "--resume", "auto"])
    assert mc.main([*chosen, "--resume", "auto"]) == 0
    assert capsys.readouterr().out.count("resumed after") == 2
    elsewhere = [flag.replace(str(tmp_path), str(tmp_path / "whole")) for flag in chosen]
    elsewhere[elsewhere.index("--task_file") + 1] = my_toml
    assert mc.main(elsewhere) == 0
    interrupted = outcome(tmp_path)
    assert_same(interrupted, outcome(tmp_path / "whole"))
    weights, predictions, scalars = interrupted
    assert weights["heads.emotion.out.weight"].shape[0] == 7
    assert weights["heads.rating.out.weight"].shape[0] == 1
    assert {"heads.nli.out.weight", "joint_heads.nli.out.weight"} <= weights.keys()
    named = {f"{n}-{s}" for n in (*TASKS, "emotion") for s in ("dev", "test")}
    named |= {"nli-dev", "rating-dev"}
    assert predictions.keys() == {f"{name}-output.csv" for name in named}
    # TensorBoard has them all.
    for name, scores in {
        "emotion": "accuracy macro_f1",
        "nli": "accuracy",
        "rating": "spearman",
    }.items():
        assert {f"loss/{name}", f"rows/{name}"} <= scalars.keys()
        for score in scores.split():
            assert {f"{kind}/{name}_{score}" for kind in ("dev", "train", "best")} <= scalars.keys()
        assert [value for _, value in scalars[f"rows/{name}"]] == [32, 32]
    for name in ("emotion", "rating"):
        header, rows = predicted(tmp_path / "predictions_dir" / f"{name}-dev-output.csv")
        assert header == ["id", {"emotion": "predicted_emotion", "rating": "predicted_stars"}[name]]
        n_rows = {"emotion": 32, "rating": 20}[name]
        assert [id for id, _ in rows] == [str(n) for n in range(1, n_rows + 1)]
        values = [value for _, value in rows]
        assert all(v in EMOTIONS if name == "emotion" else 1 <= float(v) <= 5 for v in values)
    (checkpoint,) = map(str, (tmp_path / "models_dir").glob("*.pt"))
    log = tmp_path / "logdir" / Path(checkpoint).stem
    pictures = EventAccumulator(str(log), {"images": 0}).Reload().Tags()["images"]
    assert {f"dev/{name}_confusion" for name in ("emotion", "nli", "sst", "para")} == set(pictures)
    (projected,) = [path for path in log.rglob("metadata.tsv") if "emotion" in str(path)]
    labels = [line.split("\t")[1] for line in projected.read_text("utf-8").splitlines()[1:]]
    assert set(labels) == set(EMOTIONS)
    check_evaluation(checkpoint, predictions, tmp_path, capsys)
    check_predict(checkpoint, my_data, tmp_path, capsys)
    check_report_and_export(checkpoint, tmp_path)


def check_evaluation(checkpoint, predictions, tmp_path, capsys):
    """Without a flag for tasks or data."""
    capsys.readouterr()
    cache = ["--cache_dir", str(tmp_path / "cache_dir")]
    again = ["--evaluate", checkpoint, "--predictions_dir", str(tmp_path / "again"), "--smoketest"]
    assert mc.main([*again, *cache]) == 0
    shown = re.findall(r"^(\w+) +(\w+) +\d\.\d{4}$", capsys.readouterr().out, re.M)
    assert {("emotion", "macro_f1"), ("entailment", "accuracy"), ("rating", "pearson")} <= set(
        shown
    )
    assert shown[4] == ("rating", "spearman")  # the primary one comes first
    assert predictions == {
        path.name: path.read_bytes() for path in (tmp_path / "again").glob("*.csv")
    }


def check_predict(checkpoint, my_data, tmp_path, capsys):
    """A sentence and a pair, for people and for programs; each shape of table."""
    (tmp_path / "lines.txt").write_text("the film is good\na dog\ta red dog\n")
    arguments = ["--checkpoint", checkpoint, "--cache_dir", str(tmp_path / "cache_dir")]
    assert predict.main([*arguments, str(tmp_path / "lines.txt")]) == 0
    one, two = capsys.readouterr().out.splitlines()
    assert re.search(f"emotion ({'|'.join(EMOTIONS)}) ", one) and "rating" in one
    assert re.search("entailment (entailment|neutral|contradiction) ", two) and "similarity" in two
    assert predict.main([*arguments, "--json", str(tmp_path / "lines.txt")]) == 0
    one, two = map(json.loads, capsys.readouterr().out.splitlines())
    assert one.keys() == set(
        "line emotion emotion_probabilities rating sentiment sentiment_probabilities".split()
    )
    assert two.keys() == set(
        "line entailment entailment_probabilities paraphrase similarity".split()
    )
    assert one["emotion"] in EMOTIONS and len(one["emotion_probabilities"]) == 7
    files = {"emotion": "emotion-test.csv", "nli": "nli-dev.jsonl", "rating": "reviews-dev.parquet"}
    for name, file in files.items():
        more = ["--task", name, "--json", str(my_data / file)]
        assert predict.main([*arguments, *more]) == 0
        answers = list(map(json.loads, capsys.readouterr().out.splitlines()))
        title = "entailment" if name == "nli" else name
        target = tmp_path / "predictions_dir" / f"{name}-{'test' if name == 'emotion' else 'dev'}"
        _, rows = predicted(f"{target}-output.csv")
        assert len(answers) >= len(rows)
        for answer, (_, value) in zip(answers, rows):
            answer = answer[title]
            assert answer == value if name != "rating" else abs(answer - float(value)) < 1e-4


def check_report_and_export(checkpoint, tmp_path):
    arguments = ["--checkpoint", checkpoint, "--cache_dir", str(tmp_path / "cache_dir")]
    folder = tmp_path / "report"
    assert report.main([*arguments, "--output", str(folder), "--resamples", "20"]) == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    for text in (*EMOTIONS, "entailment", "rating", "spearman"):
        assert text in page
    assert predict.main(["--checkpoint", checkpoint, "--export", str(tmp_path / "exported")]) == 0
    card = (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    for row in ("| emotion | `", "| entailment | `", "| rating | `", "| spearman | "):
        assert row in card
    config = json.loads((tmp_path / "exported" / "config.json").read_text(encoding="utf-8"))
    assert config["multitask"]["tasks"]["emotion"]["classes"] == EMOTIONS


def test_the_built_in_tasks_get_the_same_numbers(run_flags, my_toml, tmp_path):
    assert mc.main(run_flags) == 0
    elsewhere = [flag.replace(str(tmp_path), str(tmp_path / "file")) for flag in run_flags]
    assert mc.main([*elsewhere, "--task_file", my_toml, "--tasks", "sst,para,sts"]) == 0
    assert_same(outcome(tmp_path), outcome(tmp_path / "file"))


def test_a_confusion_matrix_has_the_names_of_the_classes(my_toml, my_data, tiny_directory):
    task = read_task_file(my_toml)["emotion"]
    tokenizer = BertTokenizer.from_pretrained(tiny_directory)
    rows = TaskDataset([my_data / "emotion-dev.csv"], task, "dev", tokenizer, 64)
    predictions = np.roll(rows.labels, 1)
    figure = confusion_figure(Evaluation(rows, predictions, {}))
    axes = figure.axes[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == EMOTIONS
    # Rows are the true classes; sklearn counts otherwise.
    cells = [int(text.get_text()) for text in axes.texts]
    assert cells == [
        np.sum((rows.labels == true) & (predictions == predicted))
        for true in range(7)
        for predicted in range(7)
    ]


OTHERS = """
[nodev]
train = "emotion-train.csv"
sentences = "text"
label = "emotion"
classes = ["anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise"]

[seed]
train = ["nli-train.jsonl", "nli-dev.jsonl"]
dev = ["nli-dev.jsonl", "nli-train.jsonl"]
sentences = ["premise", "hypothesis"]
label = "relation"
classes = {entailment = "yes", neutral = "maybe", contradiction = "no"}
symmetric = true
encoding = "cross"
weight = 0.25
samples = 10
primary = "matthews"
"""


def test_a_run_with_what_the_example_lacks(run_flags, tmp_path, capsys):
    """No dev file, no test file, several files, samples, weight, primary, names of labels, both orders,
    and the name of a flag."""
    path = tmp_path / "others.toml"
    path.write_text(OTHERS, encoding="utf-8")
    flags = [*run_flags, "--task_file", str(path), "--both_orders"]
    assert mc.main(flags) == 0
    shown = capsys.readouterr().out
    assert "nodev: 32 rows, train accuracy" in shown and "; dev none\n" in shown
    assert "seed 32 training rows in both orders" in shown
    _, predictions, scalars = outcome(tmp_path)
    assert predictions.keys() == {"seed-dev-output.csv"}
    _, rows = predicted(tmp_path / "predictions_dir" / "seed-dev-output.csv")
    assert {value for _, value in rows} <= {"entailment", "neutral", "contradiction"}
    for name, n_rows in {"nodev": 32, "seed": 10}.items():
        assert [value for _, value in scalars[f"rows/{name}"]] == [n_rows, n_rows]
    assert scalars["dev/mean"] == scalars["dev/seed_matthews"]
    assert not any(tag.startswith("dev/nodev") for tag in scalars)
    steps = [dict(scalars[f"loss/{name}"]) for name in ("nodev", "seed", "sum")]
    assert len(steps[2]) == 8
    for step, total in steps[2].items():
        assert total == pytest.approx(steps[0][step] + 0.25 * steps[1].get(step, 0), rel=1e-5)
    with pytest.raises(SystemExit):
        parse_options(["--task_file", str(path), "--tasks", "nodev"])
    assert "no task has a dev file" in capsys.readouterr().err
    parse_options(["--task_file", str(path), "--tasks", "nodev", "--nodev_dev", "a.csv"])


def test_joined_files_have_rows_that_are_numbered_on(my_toml, my_data, tiny_directory):
    options = parse_options(["--task_file", my_toml, "--data_dir", str(my_data)])
    assert options.rating_train == [str(my_data / f"reviews-{n}.parquet") for n in (1, 2)]
    tokenizer = BertTokenizer.from_pretrained(tiny_directory)
    data = load_data(changed_options(options, cache_dir=None), tokenizer, 64, ("train", "test"))
    assert data["train"]["rating"].ids == [str(number) for number in range(1, 41)]
    texts = [pd.read_parquet(path)["review"].tolist() for path in options.rating_train]
    assert [e.sentences[0] for e in data["train"]["rating"].examples] == texts[0] + texts[1]
    assert data["test"].keys() == {"emotion"}


def test_a_file_that_is_not_in_the_data_folder_is_a_path(my_toml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nli-dev.jsonl").write_text("")
    (tmp_path / "nli-train.jsonl").write_text("")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "nli-dev.jsonl").write_text("")
    options = parse_options(["--task_file", my_toml, "--data_dir", "data"])
    assert options.nli_dev == ["data/nli-dev.jsonl"] and options.nli_train == ["nli-train.jsonl"]
    assert options.emotion_dev == ["data/emotion-dev.csv"]  # in neither; the message names this


def test_a_recipe_can_name_a_task_file(run_flags, my_toml, my_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(BUDGETS, "full", Budget(1, 32))
    Path("recipes").mkdir()
    recipe = {"task_file": "my.toml", "tasks": "sst,emotion,rating", "rdrop": {"rating": 0.1}}
    Path("recipes/mine.json").write_text(json.dumps(recipe))
    flags = [*run_flags[:4], "--smoketest", "--cache_dir", str(tmp_path / "cache_dir")]
    run = experiments.plan_run("mine", 11711, BUDGETS["full"], flags)
    folders = [f"--logdir={run.folder / 'logdir'}"]
    folders += [f"--predictions_dir={run.folder / 'predictions'}"]
    assert mc.main([*run.arguments, "--models_dir", str(run.folder), *folders]) == 0
    # What `train` adds to the output of the process.
    shown = capsys.readouterr().out
    run.log.write_text(f"{shown}\nprocess: status 0, 3 s, 5 MB, 1 at once\n")
    row = experiments.record(run)
    final = dict(re.findall(r"^(\w+) +(?:spearman|accuracy) +(\S+)$", shown, re.M))
    for column, title in {"sst_accuracy": "sentiment", "emotion_accuracy": "emotion"}.items():
        assert float(row[column]) == pytest.approx(float(final[title]), abs=1e-4)
    assert float(row["rating_spearman"]) == pytest.approx(float(final["rating"]), abs=1e-4)
    assert row["rows"] == "32/32/32"
    again = ["run", "mine", "--seeds", "1", *flags]
    assert experiments.main(again) == 0
    assert "1 runs, 1 of them done already" in capsys.readouterr().out
    assert experiments.main(["table"]) == 0 and experiments.main(["plot", "mine"]) == 0
    cells = set(re.findall(r"[\w.]+", capsys.readouterr().out))
    assert {"mine", f"{float(row['emotion_accuracy']):.3f}"} <= cells
    assert (tmp_path / "results" / "curves.png").stat().st_size > 1000
    # Another row of the task file is another run.
    Path(my_toml).write_text(EXAMPLE.replace("range = [1, 5]", "range = [0, 5]"))
    assert experiments.plan_run("mine", 11711, BUDGETS["full"], flags).digest != run.digest


# ------------------------------------------------------------------------------------- learning

HEADS = """
[word]
sentences = "text"
label = "label"
classes = ["w", "x", "y", "z"]

[larger]
sentences = ["first", "second"]
label = "label"
classes = ["the first", "the second"]

[larger_joint]
sentences = ["first", "second"]
label = "label"
classes = ["the first", "the second"]
encoding = "cross"

[alike]
sentences = ["first", "second"]
label = "label"
range = [-1, 3]

[alike_joint]
sentences = ["first", "second"]
label = "label"
range = [-1, 3]
encoding = "cross"

[level]
sentences = "text"
label = "label"
range = [100, 200]
"""


def learnable(name, rng):
    """Make a row of a task of HEADS; its sentences are letters, which are word pieces."""
    noise = rng.choices("klmnop", k=rng.randint(1, 4))
    if name == "word":  # the one of four letters that is in it
        label = rng.choice("wxyz")
        text = [*noise, label]
        rng.shuffle(text)
        return {"text": " ".join(text), "label": label}
    if name.startswith("larger"):  # which sentence has the later letter
        first, second = rng.sample("abcdef", 2)
        label = "the first" if first > second else "the second"
        return {"first": first, "second": second, "label": label}
    if name.startswith("alike"):  # how many of two letters are the same
        one, other = ([rng.choice("ab"), rng.choice("xy")] for _ in range(2))
        same = sum(a == b for a, b in zip(one, other, strict=True))
        return {"first": " ".join(one), "second": " ".join(other), "label": 2 * same - 1}
    n_high = rng.randint(0, 4)  # how many of four letters are a q
    text = ["q"] * n_high + ["r"] * (4 - n_high)
    rng.shuffle(text)
    return {"text": " ".join(text), "label": 100 + 25 * n_high}


@pytest.fixture(scope="module")
def learnable_data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("learnable"), random.Random(3)
    text = HEADS
    for name in tomllib.loads(HEADS):
        files = {"train": f"{name}-train.jsonl", "dev": f"{name}-dev.jsonl"}
        for split, n_rows in {"train": 600, "dev": 200}.items():
            write(folder / files[split], json_lines(*(learnable(name, rng) for _ in range(n_rows))))
        keys = "".join(f"{split} = '{file}'\n" for split, file in files.items())
        text = text.replace(f"[{name}]\n", f"[{name}]\n{keys}")
    (folder / "heads.toml").write_text(text)
    return folder


def test_every_head_learns(run_flags, learnable_data):
    flags = [flag for flag in run_flags if flag != "--smoketest"]
    flags += ["--data_dir", str(learnable_data), "--task_file", str(learnable_data / "heads.toml")]
    flags += "--samples_per_epoch 1920 --batch_size 24 --lr 5e-3 --scheduler linear".split()
    flags += "--warmup 0.1 --clip 1 --hidden_dropout_prob 0 --dev_rows 50".split()
    scores = mc.train_multitask(parse_options(flags))
    first = {name: next(iter(metrics.values())) for name, metrics in scores.items()}
    assert len(first) == 6 and min(first.values()) > 0.9, first


# -------------------------------------------------------------------------------------- mistakes

SCALARS = st.one_of(
    st.integers(-2, 12),
    st.sampled_from([10**400, 2.0, 0.5, -1.0, math.inf, math.nan, 1e308, True, False]),
    st.sampled_from(["", " ", "text", "emotion", "bi", "cross", "ordinal", "f1", "spearman", ";"]),
    st.sampled_from(
        ["matthews", "emotion-dev.csv", "a\tb", "%s", "%(prog)s", "{}", "ä" * 400, "\0"]
    ),
    st.sampled_from(["sst", "entailment", "..", "/", "stars", "premise", "\n", "-1", "--seed"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("01ab"), inner),
    max_leaves=5,
)
KEYS = st.sampled_from([*READERS, "name", "lable", "class", "texts", "x" * 300, "loss_name", "%"])
PLAUSIBLE = [
    {"title": "my % {title}"},
    {"weight": 0.5, "samples": 7},
    {"symmetric": True},
    {"encoding": "cross", "symmetric": False},
    {"loss": "ordinal"},
    {"separator": ","},
    {"quoting": False},
    {"primary": "macro_f1"},
    {"metrics": ["pearson"]},
    {"id": "text"},
    {"test": "sts-test-student.csv"},
    {"sentences": "hypothesis"},
    {"columns": ["writer", "text", "emotion"]},
    {"train": ["emotion-train.csv", "nli-train.jsonl"]},
]
NAMES = st.sampled_from(
    "sst seed lr help tasks x 9 A a-b para_encoding mean bert tasks_file".split()
)


def toml(value):
    """Write a value in TOML."""
    if isinstance(value, dict):
        pairs = (f"{json.dumps(str(key))} = {toml(item)}" for key, item in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, float):
        return repr(value)
    # TOML has no pairs of surrogates, which JSON writes for what is not ASCII.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "")


@st.composite
def task_files(draw):
    """The example of the page with changes in its tables, and sometimes in its bytes."""
    file = tomllib.loads(EXAMPLE)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(file)))
        change = draw(
            st.sampled_from([*["plausible"] * 5, "set", "set", "drop", "rename", "replace"])
        )
        if change == "rename":
            file[draw(NAMES)] = file.pop(name)
        elif change == "replace" or not isinstance(file[name], dict):
            file[draw(NAMES)] = draw(VALUES)
        elif change == "drop" and file[name]:
            del file[name][draw(st.sampled_from(sorted(file[name])))]
        elif change == "plausible":
            file[name] |= draw(st.sampled_from(PLAUSIBLE))
        else:
            file[name][draw(KEYS)] = draw(VALUES)
    # A value stands before all tables.
    content = "".join(
        f"{json.dumps(name)} = {toml(value)}\n"
        for name, value in file.items()
        if not isinstance(value, dict)
    )
    for name, table in file.items():
        if isinstance(table, dict):
            pairs = (f"{json.dumps(key)} = {toml(value)}\n" for key, value in table.items())
            content += f"\n[{json.dumps(name)}]\n{''.join(pairs)}"
    content = content.encode("utf-8", "surrogatepass")
    return draw(mutated(content)) if draw(st.integers(0, 3)) == 0 else content


def test_a_mutated_task_file_is_refused_in_one_line_or_read(
    tiny_directory, my_data, tmp_path, capsys
):
    path, outcomes = tmp_path / "mutated.toml", Counter()
    tokenizer = BertTokenizer.from_pretrained(tiny_directory)
    flags = ["--data_dir", str(my_data), "--smoketest", "--task_file", str(path)]

    @settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
    @given(content=task_files())
    def try_it(content):
        path.write_bytes(content)
        try:
            options = changed_options(parse_options(flags), cache_dir=None)
            data = load_data(options, tokenizer, 64, ("train", "dev", "test"))
            model = mc.MultitaskBERT(BertModel.from_pretrained(tiny_directory), options.tasks)
            model(collate({name: (rows, np.arange(1)) for name, rows in data["train"].items()}))
            outcomes["read"] += 1
        except UserError as error:
            complain(f"error: {error}")  # as the program does; a name of a file may be long or odd
            (line,) = capsys.readouterr().err.splitlines()
            assert line.isprintable() and len(line) <= 300, line
            outcomes["refused"] += 1
        except SystemExit:
            last = capsys.readouterr().err.splitlines()[-1]
            assert "error: " in last and len(last) <= 300, last
            outcomes["refused"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try_it()
    assert min(outcomes["read"], outcomes["refused"]) > 50


def changed(*changes):
    """The example of the page with texts replaced."""
    text = EXAMPLE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return text


REFUSED = {
    "a key": (
        [('label = "emotion"', 'lable = "emotion"')],
        "{file}: [emotion]: there is no key 'lable'; did you mean 'label'?",
    ),
    "a key that is unlike all": (
        [('title = "ent', 'zzz = "ent')],
        "{file}: [nli]: there is no key 'zzz'; known: title",
    ),
    "a file": (
        [('"nli-dev.jsonl"', '"nli-dew.jsonl"')],
        "{data}/nli-dew.jsonl: [nli]: no such file; did you mean 'nli-dev.jsonl'?",
    ),
    "a folder": (
        [('"nli-dev.jsonl"', '"nofolder/x.jsonl"')],
        "{data}/nofolder/x.jsonl: [nli]: no such file",
    ),
    "a column of text": (
        [('sentences = "text"', 'sentences = "texts"')],
        "{data}/emotion-train.csv: [emotion]: line 1 has no column 'texts'; did you mean 'text'?",
    ),
    "a column of JSON": (
        [('"hypothesis"', '"hypotesis"')],
        "{data}/nli-train.jsonl: [nli]: line 1 has no column 'hypotesis'; did you mean 'hypothesis'?",
    ),
    "a column of Parquet": (
        [('"stars"', '"star"')],
        "{data}/reviews-1.parquet: [rating]: line 1 has no column 'star'; did you mean 'stars'?",
    ),
    "a label": (
        [
            ('classes = ["ent', 'classes = ["x", "ent'),
            ('"entailment", "neutral", "contradiction"]', '"entailments", "neutrals"]'),
        ],
        "{data}/nli-train.jsonl: [nli]: not one usable row with a label (line 1: label 'entailment' is not a class; did you mean 'entailments'?",
    ),
    "a loss": (
        [('primary = "spearman"', 'loss = "ordinals"')],
        "{file}: [rating]: loss must be cross_entropy or one_vs_all or ordinal",
    ),
    "a loss of two classes": (
        [("range = [1, 5]", 'classes = 2\nloss = "ordinal"')],
        "{file}: [rating]: loss: only for three classes or more",
    ),
    "a metric": (
        [('primary = "spearman"', 'primary = "f1"')],
        "{file}: [rating]: metrics: 'f1' is not for this task; possible: pearson, spearman",
    ),
    "an encoding": (
        [('encoding = "both"', 'encoding = "all"')],
        "{file}: [nli]: encoding must be bi or cross or both",
    ),
    "both kinds of label": (
        [("range = [1, 5]", "range = [1, 5]\nclasses = 3")],
        "{file}: [rating]: give either classes (two or more) or range",
    ),
    "no kind of label": (
        [("range = [1, 5]\n", ""), ('primary = "spearman"\n', "")],
        "{file}: [rating]: give either classes (two or more) or range",
    ),
    "three sentences": (
        [('"premise", "hyp', '"premise", "x", "hyp')],
        "{file}: [nli]: sentences: name one column, or two for a pair",
    ),
    "the same title": (
        [('title = "entailment"', 'title = "emotion"')],
        "{file}: more than one task has the title 'emotion'",
    ),
    "a built-in title": (
        [('title = "entailment"', 'title = "similarity"')],
        "{file}: more than one task has the title 'similarity' (sst, para and sts have one too)",
    ),
    "a title of other entries": (
        [('title = "entailment"', 'title = "error"')],
        "{file}: [nli]: title 'error' is taken; choose another one",
    ),
    "a name of other entries": (
        [("[nli]", "[line]")],
        "{file}: [line]: this name is taken; choose another one",
    ),
    "one class": (
        [("range = [1, 5]", "classes = 1")],
        "{file}: [rating]: classes must be a number from 2 to 9999, or names",
    ),
    "a built-in name": (
        [("[nli]", "[sts]")],
        "{file}: [sts]: this name is taken; choose another one",
    ),
    "a name of losses": (
        [("[nli]", "[sum]")],
        "{file}: [sum]: this name is taken; choose another one",
    ),
    "a name with a hyphen": (
        [("[nli]", "[my-task]")],
        "{file}: [my-task]: a task's name has small letters",
    ),
    "no table": ([(EXAMPLE, "")], "{file}: has no table such as [mytask]"),
    "no TOML": ([("[nli]", "[nli")], "{file}: not TOML ("),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_line_that_names_the_place(case, run_flags, my_data, tmp_path, capsys):
    changes, expected = REFUSED[case]
    path = tmp_path / "wrong.toml"
    path.write_text(changed(*changes), encoding="utf-8")
    assert mc.main([*run_flags, "--task_file", str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    names = {"{file}": f"--task_file {path}", "{data}": str(my_data)}
    for short, long in names.items():
        expected = expected.replace(short, long)
    assert line.startswith(f"error: {expected}") and len(line) <= 300 + len(str(path))


def test_a_task_can_have_the_name_of_a_flag(tmp_path):
    """Its own flags are `--NAME_train` and the like. Those of the others stay what they are."""
    path, expected = tmp_path / "clash.toml", vars(parse_options([]))
    for name in sorted(expected.keys() - TASKS.keys()):
        path.write_text(EXAMPLE.replace("[nli]", f"[{name}]"), encoding="utf-8")
        flags = ["--task_file", str(path), "--tasks", f"sst,{name}", "--seed", "7", "--lr", "0.5"]
        options = vars(parse_options([*flags, f"--{name}_dev", "x"]))
        assert list(options["tasks"]) == ["sst", name] and options[f"{name}_dev"] == ["x"]
        own = {
            "left_open",
            "task_file",
            "tasks",
            "seed",
            "lr",
            "loss_weights",
            "rdrop",
            "batch_shares",
        }
        same = [key for key in expected.keys() - own if not key.startswith(("para_", "sts_"))]
        assert {key: options[key] for key in same} == {key: expected[key] for key in same}
        assert (options["seed"], options["lr"]) == (7, 0.5)
