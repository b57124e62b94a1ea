import argparse
import json
import math
import re

import pytest
from conftest import ROOT

from options import build_parser, deciding, fill_defaults, parse_options
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
    predictions_dir="predictions",
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
    sst_train="data/ids-sst-train.csv",
    para_test="data/quora-test-student.csv",
    sts_dev_out="predictions/sts-dev-output.csv",
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
        (["--loss_weights", "qqp=1"], "task 'qqp' is none of sst, para, sts, in 'qqp=1'"),
        (["--loss_weights", "sst=1,sst=2"], "task 'sst' is named twice, in 'sst=1,sst=2'"),
        (["--rdrop", "sst=1,2"], "task '2' is none of sst, para, sts, in 'sst=1,2'"),
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
        (["--batch_shares", "1,0,1"], "must be a number above 0, not '0'"),
        (["--batch_shares", "1,1,0.01"], "0.01 of 64 rows is less than one row of sts a step"),
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
    source = (ROOT / "options.py").read_text()
    assert not re.search(r"flag\(|group\.add_argument(?!\(name, \*\*settings\))", source)
    with pytest.raises(TypeError, match="not callable"):
        build_parser().flags("more")("--new", help="a flag without a word on it")
    parser = build_parser()
    free = {action.dest for action in parser._actions} - parser.deciding
    assert {"models_dir", "resume", "sst_dev_out", "hpo_trials", "profiler"} <= free
    assert {"lr", "sst", "sst_train", "batch_size", "seed", "use_gpu"} <= parser.deciding
    assert deciding({"lr": 1, "tasks": ["sst"], "logdir": "x"}) == {"lr": 1, "tasks": ["sst"]}


def test_options_are_not_changed_when_defaults_are_filled_in():
    raw = build_parser().parse_args(["--optimizer", "sophiag"])
    before = dict(vars(raw))
    filled = fill_defaults(raw, [])
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
        (["--hpo_resume", "auto"], "--hpo_resume: only with --hpo"),
        (["--hpo", "--resume", "auto"], "--hpo is neither --resume"),
        (["--hpo", "--evaluate", "m.pt"], "--hpo is neither --resume"),
        (["--hpo", "--hpo_gpus", "1"], "--hpo_gpus: only with --use_gpu"),
        (
            ["--hpo", "--lr=1", "--weight_decay=0", "--clip=1", "--hidden_dropout_prob=0"]
            + ["--batch_size=8", "--scheduler=none"],
            "--hpo: every flag that could be searched is given",
        ),
    ],
)
def test_flags_that_do_not_fit_together(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_options(flags)
    assert message in capsys.readouterr().err
