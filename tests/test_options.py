import argparse
import dataclasses
import json
import math
import re

import pytest
from conftest import ROOT, SAMPLE

from flags import build_parser
from options import deciding, fill_defaults, parse_options
from run_log import changed_flags
from tasks import TASKS, read_task_file
from utils import UserError


def parse(*flags):
    return parse_options(list(flags))


DEFAULTS = dict(
    option="finetune",
    epochs=10,
    lr=8e-5,
    optimizer="adamw",
    clip=0.25,
    seed=11711,
    bert_model="bert-base-uncased",
    logdir="logdir",
    models_dir="models",
    local_files_only=False,
    grad_accumulation=1,
    evaluate=None,
    resume=None,
    save_interval=10.0,
    max_bad_steps=10,
    predictions_dir=None,
    batch_size=64,
    samples_per_epoch=10000,
    weight_decay=0.05,
    scheduler="plateau",
    hidden_dropout_prob=None,
    use_gpu=False,
    data_dir="data",
    tensorboard_subfolder=None,
    smoketest=False,
    max_length=None,
    loss_weights={"sst": 1.0, "para": 1.0, "sts": 1.0},
    cache_dir=str(ROOT / ".cache"),
    sampling="equal",
    dev_rows=None,
    task_file=None,
    tasks=TASKS,
    sst_train=["data/ids-sst-train.csv"],
    para_test=["data/quora-test-student.csv"],
    sts_dev_out=None,
)


def test_defaults():
    parsed = vars(parse())
    assert {name: parsed[name] for name in DEFAULTS} == DEFAULTS
    assert parse("--option", "pretrain").lr == 1e-3
    assert parse("--option", "pretrain", "--lr", "0.3").lr == 0.3


def test_every_flag_is_explained_with_its_default():
    """In --help, and so in docs/flags.md, which is made from it (tests/test_docs.py)."""
    for action in build_parser()._actions:
        assert action.help, action.option_strings
        default = action.default
        if action.nargs == 0 or default in (None, 0, argparse.SUPPRESS):
            continue
        if isinstance(default, dict):
            (shown,) = {f"{value:g}" for value in default.values()}
        else:
            shown = f"{default:g}" if isinstance(default, float) else str(default)
        shown = ".cache of the checkout" if action.dest == "cache_dir" else shown
        assert f"default: {shown}" in action.help, action.option_strings


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--epochs", "0"], "argument --epochs: must be a whole number above 0, not '0'"),
        (["--lr", "nan"], "--lr: must be a number of at least 0"),
        (["--hidden_dropout_prob", "1.5"], "must be a number from 0 to below 1"),
        (["--loss_weights", "1,2"], "must be sst=X,para=X,sts=X, not '1,2'"),
        (["--loss_weights", "1,2,x"], "must be a number of at least 0, not 'x'"),
        (["--loss_weights", "para=x"], "must be a number of at least 0, not 'x'"),
        (["--loss_weights", "qqp=1"], "there is no task 'qqp'; known: sst, para, sts"),
        (["--loss_weights", "prara=1"], "there is no task 'prara'; did you mean 'para'?"),
        (["--loss_weights", "sst=1,sst=2"], "task 'sst' is named twice"),
        (["--rdrop", "sst=1,2"], "there is no task '2'; known: sst, para, sts"),
        (["--tasks", "ssts"], "--tasks: there is no task 'ssts'; did you mean 'sts'?"),
        (["--tasks", "sst,,sts"], "--tasks: there is no task ''; known: sst, para, sts"),
        (["--tasks", "sst,sst"], "--tasks: task 'sst' is named twice"),
        (["--tasks", "sst,sts", "--sst"], "--tasks or the flags of single tasks, not both"),
        (["--sampling", "even"], "--sampling: invalid choice: 'even'"),
        (["--dev_rows", "0"], "--dev_rows: must be a whole number above 0"),
        (["--sst_train"], "--sst_train: expected at least one argument"),
        (["--unfreeze_interval", "1", "--option", "pretrain"], "--option pretrain does not"),
        (["--seed", "-1"], "must be a whole number from 0 to 2**32 - 1"),
        (["--cache_dir", ""], "--cache_dir must not be empty"),
        (["--optimizer", "sgd"], "invalid choice: 'sgd'"),
        (["--optimizer", "sophiah", "--hess_interval", "0"], "must be a whole number above 0"),
        (["--optimizer", "sophiag", "--rho", "-1"], "--rho: must be a number above 0, not '-1'"),
        (["--hess_interval", "50"], "--hess_interval: only for --optimizer sophiah and sophiag"),
        (["--resume", "auto", "--evaluate", "x.pt"], "--evaluate does not train"),
        (["--save_interval", "0"], "--save_interval: must be a number above 0"),
        (["--rho", "1", "--hess_interval", "9"], "--rho: only for"),
        (
            ["--rho", "1", "--warmup", "0.1"],
            "--warmup: only with --scheduler linear or cosine; --rho",
        ),
        (["--warmup", "0.1"], "--warmup: only with --scheduler linear or cosine"),
        (["--both_orders"], "only with --para_encoding or --sts_encoding cross or both"),
        (["--layer_lr_decay", "1.1"], "must be a number above 0, up to 1"),
        (["--betas", "0.9"], "--betas: must be two numbers such as 0.9,0.99, not '0.9'"),
        (["--betas", "0.9,0.99,0.999"], "--betas: must be two numbers such as 0.9,0.99"),
        (["--betas", "0.9,1"], "--betas: must be a number from 0 to below 1, not '1'"),
        (["--betas", "-0.1,0.9"], "--betas: expected one argument"),
        (["--betas", "x,0.9"], "--betas: must be a number from 0 to below 1, not 'x'"),
        (["--batch_shares", "1,0,1"], "must be a number above 0, not '0'"),
        (["--conf", "some.json"], "unrecognized arguments: --conf some.json"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*flags)
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, weights",
    [
        ("1,0,2.5", {"sst": 1.0, "para": 0.0, "sts": 2.5}),
        ("para=2", {"sst": 1.0, "para": 2.0, "sts": 1.0}),
        ("sts=0.5,para=2", {"sst": 1.0, "para": 2.0, "sts": 0.5}),
    ],
)
def test_numbers_by_task_are_a_mapping(text, weights, tmp_path):
    assert parse("--loss_weights", text).loss_weights == weights
    config = write_config(tmp_path / "c.json", {"loss_weights": weights})
    assert parse(*config).loss_weights == weights


def test_optimizers_are_named_in_any_case():
    assert parse("--optimizer", "SophiaH").optimizer == "sophiah"


def test_every_flag_says_whether_it_decides_a_runs_numbers():
    """A flag is added by `decides` or by `free`; there is no third way."""
    source = (ROOT / "flags.py").read_text()
    assert not re.search(r"flag\(|group\.add_argument(?!\(name, \*\*settings\))", source)
    with pytest.raises(TypeError, match="not callable"):
        build_parser().flags("more")("--new", help="a flag without a word on it")
    parser = build_parser()
    free = {action.dest for action in parser._actions} - parser.deciding
    assert {"models_dir", "resume", "sst_dev_out", "hpo_trials", "profiler"} <= free
    assert {"lr", "sst", "sst_train", "batch_size", "seed", "use_gpu"} <= parser.deciding
    assert {"tasks", "sampling", "dev_rows"} <= parser.deciding and "task_file" in free
    assert deciding({"lr": 1, "tasks": ["sst"], "logdir": "x"}) == {"lr": 1, "tasks": ["sst"]}


def test_options_are_not_changed_when_defaults_are_filled_in():
    raw = build_parser().parse_args(["--optimizer", "sophiag"])
    before = dict(vars(raw))
    filled = fill_defaults(raw, [*TASKS.values()])
    assert vars(raw) == before and raw.lr is None
    assert (filled.lr, filled.rho, filled.hess_interval) == (1.2e-3, 0.02, 50)


def write_config(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return ["--config", str(path)]


def test_a_config_gives_flags_and_the_command_line_wins(tmp_path):
    content = {"lr": 3e-4, "sst": True, "para": False, "loss_weights": [1, 2, 0.5], "epochs": 7}
    config = write_config(tmp_path / "c.json", content)
    options = parse_options(config + ["--epochs", "2"])
    given = ["--lr", "3e-4", "--sst", "--loss_weights", "1,2,0.5", "--epochs", "2"]
    assert vars(options) == vars(parse_options(given)) | {"config": str(tmp_path / "c.json")}


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\x00", "not JSON"),
        ([1], "holds no table of flags"),
        ({"rate": 1}, "there is no flag 'rate'"),
        ({"config": "c.json"}, "there is no flag 'config'"),
        ({"parents": "baseline"}, "there is no flag 'parents'"),
        ({"lr": "fast"}, "argument --lr: must be a number of at least 0"),
        ({"lr": math.nan}, "argument --lr: must be a number"),
        ({"lr": None}, "lr cannot be null"),
        ({"lr": True}, "lr cannot be true"),
        ({"lr": {"a": 1}}, "argument --lr: must be a number"),
        ({"sst": "yes"}, 'sst cannot be "yes"'),
        ({"sst": 1}, "sst cannot be 1"),
        ({"optimizer": "sgd"}, "argument --optimizer: invalid choice: 'sgd'"),
        ({"epochs": 1.5}, "argument --epochs: must be a whole number above 0"),
    ],
)
def test_a_damaged_config_is_one_clear_line(tmp_path, content, message):
    config = write_config(tmp_path / "c.json", content)
    with pytest.raises(UserError) as error:
        parse_options(config)
    assert str(error.value).startswith(f"--config {config[1]}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_config_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="c.json: cannot be read: No such file"):
        parse_options(["--config", str(tmp_path / "c.json")])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--moe_balance", "1"], "--moe_balance: only with --moe"),
        (["--moe", "soft", "--option", "pretrain"], "--moe has a gate to train"),
        (["--both_orders", "--tasks", "sst"], "--both_orders: only with --NAME_encoding cross"),
        (["--hpo_resume", "auto"], "--hpo_resume: only with --hpo"),
        (["--hpo", "--resume", "auto"], "--hpo is neither --resume"),
        (["--hpo", "--evaluate", "m.pt"], "--hpo is neither --resume"),
        (["--hpo", "--hpo_gpus", "1"], "--hpo_gpus: only with --use_gpu"),
    ],
)
def test_flags_that_do_not_fit_together(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_options(flags)
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- tasks

TASK_FILE = """
[nli]
train = ["a.csv", "b.csv"]
dev = "nli-dev.csv"
sentences = ["premise", "hypothesis"]
label = "relation"
classes = ["entailment", "neutral", "contradiction"]
encoding = "cross"
loss = "one_vs_all"
weight = 0.5

[rating]
train = "rating.csv"
dev = "rating-dev.csv"
test = "rating-test.csv"
sentences = "review"
label = "stars"
range = [1, 5]
"""


@pytest.fixture
def task_file(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(TASK_FILE)
    return ["--task_file", str(path)]


@pytest.mark.parametrize(
    "flags, names",
    [
        ("", "sst para sts"),
        ("--tasks sts", "sts"),
        ("--tasks sts,sst", "sts sst"),
        ("--sts --sst", "sst sts"),
        ("TASK_FILE", "nli rating"),
        ("TASK_FILE --tasks rating", "rating"),
        ("TASK_FILE --tasks sst,nli", "sst nli"),
        ("TASK_FILE --sst", "sst"),
    ],
)
def test_which_tasks_are_trained(flags, names, task_file):
    """Options of the others are None, or do not have them."""
    options = parse(*flags.replace("TASK_FILE", " ".join(task_file)).split())
    chosen = names.split()
    assert list(options.tasks) == chosen
    for numbers in (options.loss_weights, options.rdrop, options.batch_shares):
        assert list(numbers) == chosen
    for key, value in vars(options).items():
        name, _, end = key.partition("_")
        if name in {*TASKS, "nli", "rating"} and end in ("train", "dev", "test"):
            assert (value is not None) == (name in chosen), key


def test_an_unknown_task_of_a_file_names_the_nearest(task_file, capsys):
    for flags in (["--tasks", "sst,ratings"], ["--loss_weights", "ratings=2"]):
        with pytest.raises(SystemExit):
            parse(*task_file, *flags)
        assert "there is no task 'ratings'; did you mean 'rating'?" in capsys.readouterr().err


def test_flags_of_tasks_from_a_file_follow_from_their_rows(task_file):
    options = parse(*task_file)
    tasks = read_task_file(task_file[1])
    assert options.tasks == tasks
    assert (options.nli_encoding, options.nli_loss) == ("cross", "one_vs_all")
    assert options.loss_weights == {"nli": 0.5, "rating": 1.0}
    assert options.nli_train == ["data/a.csv", "data/b.csv"] and options.nli_test == []
    assert options.rating_test_out is None
    assert not hasattr(options, "rating_encoding") and not hasattr(options, "rating_loss")
    flags = ["--nli_encoding", "both", "--nli_loss", "ordinal", "--nli_train", "x", "y", "z"]
    changed = parse(*task_file, *flags)
    assert changed.tasks["nli"] == dataclasses.replace(
        tasks["nli"], encoding="both", loss_name="ordinal"
    )
    assert changed.nli_train == ["x", "y", "z"] and changed.rating_train == options.rating_train


def test_options_of_tasks_from_a_file_decide_a_runs_numbers(task_file):
    """All but the name of the file, and where predictions go."""
    options = parse(*task_file)
    kept = deciding(vars(options))
    assert {"nli_encoding", "nli_loss", "nli_train", "rating_dev", "tasks"} <= set(kept)
    assert not {"task_file", "nli_dev_out", "rating_test_out", "logdir"} & set(kept)
    for flags in (["--nli_encoding=bi"], ["--nli_train", "x"], ["--tasks", "nli"]):
        assert deciding(vars(parse(*task_file, *flags))) != kept, flags
    assert deciding(vars(parse(*task_file, "--nli_dev_out", "x", "--models_dir", "y"))) == kept
    path = task_file[1]
    with open(path, "a") as file:
        file.write("samples = 9\n")  # another row under the same name
    assert deciding(vars(parse("--task_file", path))) != kept


def test_a_checkpoint_is_not_evaluated_with_a_file_of_tasks(task_file, capsys):
    with pytest.raises(SystemExit):
        parse(*task_file, "--evaluate", "x.pt")
    assert "--task_file: a checkpoint has its own tasks, leave it out" in capsys.readouterr().err


def test_small_shares_of_a_batch_are_no_error():
    assert parse("--batch_shares", "1,1,0.01").batch_shares["sts"] == 0.01


def test_a_config_may_name_a_file_of_tasks_and_their_flags(task_file, tmp_path):
    values = {
        "task_file": task_file[1],
        "tasks": ["nli", "sst"],
        "nli_train": ["x", "y"],
        "nli_encoding": "bi",
        "loss_weights": {"nli": 3},
    }
    config = write_config(tmp_path / "c.json", values)
    given = ["--tasks", "nli,sst", "--nli_train", "x", "y", "--nli_encoding", "bi"]
    expected = vars(parse(*task_file, *given, "--loss_weights", "nli=3"))
    assert vars(parse(*config)) == expected | {"config": config[1]}
    assert vars(parse(*config, "--tasks", "sst"))["tasks"] == {"sst": TASKS["sst"]}


def test_files_of_a_task_are_in_the_folder_of_data_or_paths(tmp_path, monkeypatch):
    """A path is taken only if the folder does not have the file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.csv").touch()
    text = TASK_FILE.replace('"a.csv", "b.csv"', f'"here.csv", "{SAMPLE / "sts-dev.csv"}"')
    (tmp_path / "my.toml").write_text(text)
    flags = ["--task_file", "my.toml", "--data_dir", "folder"]
    assert parse(*flags).nli_train == ["here.csv", str(SAMPLE / "sts-dev.csv")]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "here.csv").touch()
    assert parse(*flags).nli_train == ["folder/here.csv", str(SAMPLE / "sts-dev.csv")]


def test_a_run_without_any_dev_file_is_refused(tmp_path, capsys):
    text = 'train = "t"\nsentences = "s"\nlabel = "l"\nclasses = 2\n'
    (tmp_path / "my.toml").write_text(f"[one]\n{text}[two]\n{text}")
    flags = ["--task_file", str(tmp_path / "my.toml")]
    with pytest.raises(SystemExit):
        parse(*flags)
    assert "no task has a dev file, so no epoch can be chosen" in capsys.readouterr().err
    options = parse(*flags, "--two_dev", "x")
    assert options.two_dev == ["x"] and "--two_dev x" in changed_flags(options)
