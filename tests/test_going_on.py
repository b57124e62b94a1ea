"""A new run from the model of another one (--init_from), and how long a run goes on (--patience,
--select)."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint_fixture  # noqa: F401
from checkpoints import load_pretrained
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data
from test_resume import OFTEN, Killed, assert_same, nth_call, outcome

import evaluation
import multitask_classifier as mc
from options import changed_options, parse_options

# -------------------------------------------------------------------------------------- --init_from


@pytest.mark.parametrize(
    "kind, flags, kept",
    [
        ("plain", [], "heads.sst heads.para"),
        ("plain", ["--para"], "heads.para"),
        ("cross", [], "heads.sst"),
        ("cross", ["--para_encoding", "both", "--sts_encoding", "both"], "heads.sst joint_heads"),
        ("both", ["--sts_encoding", "both"], "heads.sst joint_heads.sts"),
        ("only sts", ["--tasks", "sst,sts"], "nothing"),
        ("only para cross", ["--para_encoding", "cross"], "joint_heads.para"),
        ("soft", ["--moe", "soft"], "heads.sst heads.para"),
        ("hard", ["--moe", "hard", "--sst"], "heads.sst"),
    ],
)
def test_weights_that_fit_are_those_of_the_checkpoint(make_checkpoint, kind, flags, kept, capsys):
    path = make_checkpoint(kind)
    saved, tokenizer, _ = mc.load_checkpoint(path)
    options = parse_options([*flags, "--init_from", str(path)])
    model, same_tokenizer, tagger = load_pretrained(options)
    assert same_tokenizer.to_json() == tokenizer.to_json() and tagger is None
    assert list(model.tasks) == list(options.tasks)
    fresh = mc.MultitaskBERT(saved.bert, options.tasks).state_dict()
    old, new = saved.state_dict(), model.state_dict()
    assert set(new) == set(fresh)
    taken = {name for name in new if name in old and torch.equal(old[name], new[name])}
    starts = ("bert.", "attention_layer.", *kept.split())
    # The biases of all new heads are zero; the others' may be too.
    weights = {name for name in new if not name.endswith("bias")}
    assert taken & weights == {name for name in weights if name.startswith(starts)}
    assert all(new[name].requires_grad is False for name in new)
    shown = capsys.readouterr().out
    heads = [[], []]
    joint = [(f"{name} in one sequence", "joint_heads", name) for name in model.joint_heads]
    for label, kind_of_head, name in [(n, "heads", n) for n in model.heads] + joint:
        there = name in getattr(saved, kind_of_head)
        if there or name not in saved.tasks:
            hint = ""
        else:
            was, now = saved.tasks[name].encoding, options.tasks[name].encoding
            hint = f" (was trained with --{name}_encoding {was})" if was != now else ""
        heads[0 if there else 1].append(label + hint)
    assert shown.strip() == (
        f"{path}: encoder, pooling and heads kept: {', '.join(heads[0]) or 'none'}; "
        f"new heads: {', '.join(heads[1]) or 'none'}"
    )


def test_a_task_of_the_same_name_with_other_classes_or_range_gets_its_own_head(make_checkpoint):
    """A similarity has no weights, but another range is another answer."""
    options = parse_options(["--init_from", str(make_checkpoint("plain"))])
    tasks = dict(options.tasks)
    three = {"classes": ("no", "perhaps", "yes"), "texts": ("0", "1", "2")}
    tasks["para"] = dataclasses.replace(tasks["para"], metrics=("accuracy",), **three)
    tasks["sts"] = dataclasses.replace(tasks["sts"], range=(1.0, 10.0))
    model, _, _ = load_pretrained(changed_options(options, tasks=tasks))
    assert model.heads["para"].out.out_features == 3
    vector = torch.randn(2, 24)
    assert model.heads["sts"](vector, vector).tolist() == pytest.approx([10, 10])
    assert model.heads["sts"](vector, -vector).tolist() == pytest.approx([-8, -8])


def test_first_one_task_then_all(flags, tmp_path, monkeypatch, capsys):
    """Resumed to the same numbers, also when the first model is gone."""
    first = [*flags, "--para", "--epochs", "1", "--models_dir", str(tmp_path / "first")]
    assert mc.main(first) == 0
    (start,) = (tmp_path / "first").glob("*.pt")
    one = torch.load(start, weights_only=True)["model"]
    for path in tmp_path.glob("para-*.csv"):
        path.unlink()
    more = [*flags[2:], "--init_from", str(start), "--lr", "1e-4"]
    whole = [flag.replace(str(tmp_path), str(tmp_path / "whole")) for flag in more]
    whole[whole.index("--data_dir") + 1] = more[more.index("--data_dir") + 1]
    whole[whole.index("--init_from") + 1] = str(start)
    steps, training_step = [], mc.training_step

    def note(model, *arguments):
        if not steps:
            state = model.state_dict()
            steps.extend(name for name in one if not torch.equal(one[name], state[name]))
            steps.append("first")
        return training_step(model, *arguments)

    monkeypatch.setattr(mc, "training_step", note)
    assert mc.main(whole) == 0
    assert steps == [
        "first"
    ]  # all weights of the first model are in the second before its first step
    assert "heads kept: para; new heads: sst, sts" in capsys.readouterr().out
    for call in (3, 6):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(mc, "training_step", nth_call(call, mc.training_step, False))
            mc.main([*more, *OFTEN, "--resume", "auto"])
    start.unlink()
    assert mc.main([*more, "--resume", "auto"]) == 0
    assert_same(outcome(tmp_path), outcome(tmp_path / "whole"))
    (path,) = (tmp_path / "models_dir").glob("*.pt")
    assert mc.load_checkpoint(path).content["options"]["init_from"] == str(start)
    log = EventAccumulator(str(tmp_path / "logdir" / path.stem)).Reload()
    content = log.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    recorded = parse_session_start_info_plugin_data(content).hparams
    assert recorded["init_from"].string_value == str(start)


def test_a_run_from_a_model_with_tags_has_tags(make_checkpoint, pipeline_directory, capsys):
    path = make_checkpoint("tags")
    flags = ["--additional_input", "--spacy_model", str(pipeline_directory)]
    model, _, tagger = load_pretrained(parse_options(["--init_from", str(path), *flags]))
    saved = mc.load_checkpoint(path).model.state_dict()
    assert tagger and all(torch.equal(saved[n], v) for n, v in model.state_dict().items())


@pytest.mark.parametrize(
    "kind, flags, message",
    [
        (
            "plain",
            ["--bert_model", "minilm"],
            "--init_from brings its encoder, leave --bert_model out",
        ),
        ("plain", ["--moe", "soft"], "{path}: was trained without --moe; leave it out"),
        ("hard", ["--moe", "soft"], "{path}: was trained with --moe hard; give the same"),
        ("hard", [], "{path}: was trained with --moe hard; give the same"),
        ("tags", [], "{path}: was trained with --additional_input; give the same"),
        ("plain", ["--additional_input"], "{path}: was trained without --additional_input; leave"),
        ("plain", ["--max_length", "500"], "--max_length 500 is more than this encoder's 128"),
        (
            "plain",
            ["--select", "sst", "--para"],
            "--select sst: this task is not trained, or has no",
        ),
        ("plain", ["--select", "nli"], "argument --select: invalid choice: 'nli'"),
        ("plain", ["--patience", "0"], "argument --patience:"),
    ],
)
def test_what_does_not_fit_is_one_line(
    make_checkpoint, small_data, tmp_path, capsys, kind, flags, message
):
    path = make_checkpoint(kind)
    base = ["--init_from", str(path), "--data_dir", str(small_data)]
    base += ["--models_dir", str(tmp_path), "--logdir", str(tmp_path)]
    base += ["--predictions_dir", str(tmp_path), "--cache_dir", str(tmp_path)]
    try:
        assert mc.main([*base, *flags]) == 1
    except SystemExit as end:
        assert end.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert message.format(path=path) in line and len(line) < 300


def test_a_task_without_dev_rows_cannot_select(own_tasks, capsys):
    with pytest.raises(SystemExit):
        parse_options([*own_tasks, "--select", "emotion"])
    assert "--select emotion: this task is not trained, or has no dev" in capsys.readouterr().err


def test_files_of_no_use_are_one_line(make_checkpoint, tmp_path, capsys):
    content = torch.load(make_checkpoint("plain"), weights_only=True)
    finished = {key: content[key] for key in ("format", "options", "tags")}
    torch.save(finished | {"training": "finished"}, tmp_path / "run.resume")
    one_type = content | {"bert_config": content["bert_config"] | {"type_vocab_size": 1}}
    name = "bert.embeddings.token_type_embeddings.weight"
    one_type["model"] = content["model"] | {name: content["model"][name][:1]}
    torch.save(one_type, tmp_path / "one.pt")
    cases = {
        "absent.pt: no such file": ["absent.pt"],
        "run.resume: only says that this run is finished; its model is": ["run.resume"],
        "one.pt: this encoder does not tell two sentences": ["one.pt", "--sts_encoding", "cross"],
    }
    for message, (file, *flags) in cases.items():
        base = ["--models_dir", str(tmp_path), "--predictions_dir", str(tmp_path)]
        assert mc.main(["--init_from", str(tmp_path / file), *flags, *base]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {tmp_path}/{message}") and error.count("\n") == 1


# --------------------------------------------------------------------------- --patience and --select


def epochs_of(scores, patience):
    """Return (how many epochs a run has, which of them is the best) with these scores."""
    best, best_epoch = -math.inf, 0
    for epoch, score in enumerate(scores, start=1):
        if epoch == 1 or score > best:
            best, best_epoch = (-math.inf if math.isnan(score) else score), epoch
        if epoch - best_epoch == patience:
            return epoch, best_epoch
    return len(scores), best_epoch


SHORT = ["--sts", "--samples_per_epoch", "8", "--batch_size", "8", "--dev_rows", "5"]


@pytest.mark.parametrize("seed", range(6))
def test_a_run_ends_when_nothing_improves(flags, tmp_path, monkeypatch, capsys, seed):
    rng = np.random.default_rng(seed)
    scores = rng.choice([0.1, 0.2, 0.3, 0.4, math.nan], 7).tolist()
    patience = int(rng.integers(1, 4))
    given = iter(scores)
    monkeypatch.setattr(evaluation, "mean_score", lambda *_: next(given, 0.0))
    chosen = [*SHORT, "--epochs", "7", "--patience", str(patience)]
    assert mc.main([*flags, *chosen]) == 0
    n_epochs, best = epochs_of(scores, patience)
    shown = capsys.readouterr().out
    assert re.findall(r"^epoch (\d+): ", shown, re.M) == [str(n + 1) for n in range(n_epochs)]
    (path,) = (tmp_path / "models_dir").glob("*.pt")
    assert mc.load_checkpoint(path).content["epoch"] == best
    ended = f"no better model for {patience} epochs; the run ends here" in shown
    assert ended == (n_epochs - best == patience)


def test_both_ends_are_among_those_runs():
    """Those that patience ends, and those that it does not."""
    lengths = set()
    for seed in range(6):
        rng = np.random.default_rng(seed)
        scores = rng.choice([0.1, 0.2, 0.3, 0.4, math.nan], 7).tolist()
        lengths.add(epochs_of(scores, int(rng.integers(1, 4)))[0])
    assert len(lengths) > 2


def test_patience_is_exact_on_resume(flags, tmp_path, monkeypatch, capsys):
    """Scores that never change: the third epoch is the last, whatever interrupts the run."""
    more = [*SHORT, "--epochs", "6", "--patience", "2", "--lr", "1e-12", "--resume", "auto", *OFTEN]
    places = [
        (mc, "training_step", 2, False),
        (torch, "save", 2, False),
        (evaluation, "write_predictions", 1, True),
    ]
    for module, name, call, before in places:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, name, nth_call(call, getattr(module, name), before))
            mc.main([*flags, *more])
    assert mc.main([*flags, *more]) == 0
    shown = capsys.readouterr().out
    assert {int(epoch) for epoch in re.findall(r"^epoch (\d+): ", shown, re.M)} == {1, 2, 3}
    assert "resumed after 3 epochs and 0 steps" in shown
    (path,) = (tmp_path / "models_dir").glob("*.pt")
    assert mc.load_checkpoint(path).content["epoch"] == 1


@pytest.mark.parametrize("select, best", [(None, 1), ("sst", 1), ("para", 3), ("sts", 2)])
def test_the_selected_task_decides(flags, tmp_path, monkeypatch, capsys, select, best):
    by_epoch = {"sst": [0.9, 0.1, 0.2], "para": [0.3, 0.2, 0.5], "sts": [0.5, 0.8, 0.6]}
    epoch, evaluate = itertools.count(), evaluation.evaluate

    def scripted(*arguments):
        results, number = evaluate(*arguments), next(epoch)
        for name, result in results.items():
            if number < 3:
                result.scores[next(iter(result.scores))] = by_epoch[name][number]
        return results

    monkeypatch.setattr(evaluation, "evaluate", scripted)
    short = ["--samples_per_epoch", "8", "--batch_size", "8", "--dev_rows", "5", "--epochs", "3"]
    assert mc.main([*flags, *short, *(["--select", select] if select else [])]) == 0
    (path,) = (tmp_path / "models_dir").glob("*.pt")
    assert mc.load_checkpoint(path).content["epoch"] == best
    decisive = by_epoch[select] if select else np.mean([*by_epoch.values()], axis=0)
    shown = re.findall(rf"{select or 'mean'} dev score ([\d.]+)", capsys.readouterr().out)
    assert list(map(float, shown)) == pytest.approx(list(decisive), abs=1e-4)
