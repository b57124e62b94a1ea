"""What a run says: its heading, its progress, its table of epochs, TensorBoard, where predictions go."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cross_entropy, mse_loss

import checkpoint
import multitask_classifier as mc
import run_log
from checkpoint import link_latest, name_predictions
from options import changed_options, parse_options
from tasks import TASKS


@pytest.fixture
def in_folder(flags, tmp_path, monkeypatch):
    """Flags of a run whose predictions have the default place, with the current folder there."""
    monkeypatch.chdir(tmp_path)
    keep = [not flag.endswith("_out") and not flag.endswith(".csv") for flag in flags]
    return [flag for flag, kept in zip(flags, keep, strict=True) if kept]


@pytest.fixture
def said(in_folder, capsys, monkeypatch):
    """Run with an own recipe; return what it printed, and its name."""
    monkeypatch.setattr(run_log, "PROGRESS_SECONDS", 0.0)
    Path("mine.json").write_text('{"lr": 0.001, "rdrop": {"sst": 2}}')
    assert mc.main([*in_folder, "--config", "mine.json", "--weight_decay", "0.1"]) == 0
    shown = capsys.readouterr()
    (path,) = Path("models_dir").glob("*.pt")
    return shown, path.stem


def test_a_heading_has_six_entries(said):
    """Run, device, data, model, flags that differ from their defaults, and where it writes."""
    shown, run = said
    heading = re.sub(r"\n {8}", " ", shown.out).splitlines()[:6]
    starts = [line.split()[0] for line in heading]
    assert starts == ["run", "device", "data", "model", "flags", "writes"]
    assert heading[0].endswith(run) and f"models_dir/{run}.pt, predictions/{run}," in heading[5]
    assert "sst 64 training rows, 40 dev, 40 test;" in heading[2]
    given = heading[4].split(maxsplit=1)[1]
    assert given.startswith("--config mine.json ")
    for flag in ("--lr 0.001", "--rdrop sst=2,para=0,sts=0", "--weight_decay 0.1", "--epochs 2"):
        assert flag in given
    assert not re.search(r"--(seed|clip|bert_model|sst_train)", given)


def test_a_log_file_gets_lines_and_no_bars(said):
    """64 rows of each task in four steps: lines at 25, 50 and 75 per cent, and no bar."""
    shown, _ = said
    lines = re.findall(r"^epoch (\d): (\d+)%, ([\d,]+) rows/s, 0:00:\d\d left$", shown.out, re.M)
    assert [(epoch, share) for epoch, share, _ in lines] == [
        (epoch, share) for epoch in "12" for share in ("20", "50", "70")
    ]
    assert "\r" not in shown.out + shown.err and "it/s" not in shown.err


@pytest.mark.parametrize("seconds, lines", [(0.0, 9), (1e9, 1)])
def test_progress_is_shown_every_tenth_at_most(seconds, lines, monkeypatch, capsys):
    monkeypatch.setattr(run_log, "PROGRESS_SECONDS", seconds)
    progress = run_log.Progress(3, 0, 1000)
    for done in range(1, 1001):
        progress.update(done)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in shown] == [f"epoch 3: {10 * n}%" for n in range(1, 10)][
        :lines
    ]


def test_the_table_of_epochs_has_the_scores_of_each(said):
    shown, run = said
    table = shown.out.partition("train/dev scores after each epoch\n")[2].splitlines()[:3]
    assert table[0].split() == ["epoch", "seconds", *TASKS, "mean"]
    (folder,) = Path("logdir").iterdir()
    log = EventAccumulator(str(folder)).Reload()
    scores = {tag: [event.value for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
    for epoch, line in enumerate(table[1:]):
        cells = line.split()
        assert cells[0] == str(epoch + 1)
        for cell, (name, task) in zip(cells[2:5], TASKS.items(), strict=True):
            values = [
                scores[f"{split}/{name}_{task.metrics[0]}"][epoch] for split in ("train", "dev")
            ]
            assert cell == "/".join(f"{value:.3f}" for value in values)
        assert float(cells[5]) == pytest.approx(scores["dev/mean"][epoch], abs=1e-4)
    best = int(np.argmax(scores["dev/mean"]))
    assert [line.endswith("best") for line in table[1:]] == [number == best for number in (0, 1)]
    assert scores["best/mean"] == pytest.approx([max(scores["dev/mean"])])


def test_a_stop_in_the_first_epoch_says_that_there_is_no_model(in_folder, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(mc, "training_step", interrupted)
    assert mc.main(in_folder) == 130
    assert "no epoch is done yet, so there is no model; continue with" in capsys.readouterr().err


def test_tensorboard_has_texts_dev_losses_norms_and_speed(said):
    """The loss of dev is that of the predictions' own formula on the model's outputs."""
    _, run = said
    log = EventAccumulator(str(Path("logdir") / run)).Reload()
    tags = log.Tags()
    assert {"options/text_summary", "first rows/text_summary"} <= set(tags["tensors"])
    text = log.Tensors("options/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "lr: 0.001" in text and "commit: " in text
    norms = [event.value for event in log.Scalars("gradients/norm")]
    assert len(norms) == 8 and min(norms) > 0
    assert all(event.value > 0 for event in log.Scalars("tokens_per_second"))
    options = checkpoint.options_of(["--evaluate", f"models_dir/{run}.pt"])
    options = changed_options(options, cache_dir="cache")
    member = mc.load_trained(f"models_dir/{run}.pt", options)
    best = member.content["epoch"] - 1
    for name, (data, outputs) in mc.outputs_of_models([member], "dev", torch.device("cpu")).items():
        labels = torch.from_numpy(data.labels)
        loss = cross_entropy(outputs, labels.long()) if name != "sts" else mse_loss(outputs, labels)
        assert log.Scalars(f"dev_loss/{name}")[best].value == pytest.approx(float(loss), rel=1e-4)


def test_predictions_have_a_folder_for_each_run(said, in_folder):
    """`latest` leads to the last one; an evaluation writes to the folder of its checkpoint."""
    _, first = said
    files = {f"{name}-{split}-output.csv" for name in TASKS for split in ("dev", "test")}
    assert mc.main([*in_folder, "--epochs", "1"]) == 0
    runs = {path.stem for path in Path("models_dir").glob("*.pt")}
    (second,) = runs - {first}
    assert {path.name for path in Path("predictions").iterdir()} == {first, second, "latest"}
    assert Path("predictions/latest").readlink() == Path(second)
    models = [f"models_dir/{run}.pt" for run in (first, second)]
    before = {path: path.read_bytes() for path in Path("predictions", first).glob("*.csv")}
    assert {path.name for path in before} == files
    assert mc.main([*in_folder, "--evaluate", models[0]]) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert Path("predictions/latest").readlink() == Path(first)
    assert mc.main([*in_folder, "--evaluate", *models]) == 0
    assert Path("predictions/latest").readlink() == Path(f"{first}+1")
    assert {path.name for path in Path("predictions/latest").glob("*.csv")} == files


def test_given_places_get_the_predictions(in_folder):
    assert mc.main([*in_folder, "--epochs", "1", "--predictions_dir", "here", "--sst"]) == 0
    assert len(list(Path("here").glob("*.csv"))) == 2 and not Path("predictions").exists()


def test_without_links_a_warning_says_so(tmp_path, monkeypatch, capsys):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.chdir(tmp_path)
    options = name_predictions(parse_options([]), "run")
    Path("predictions/run").mkdir(parents=True)
    monkeypatch.setattr(Path, "symlink_to", refused)
    link_latest(options)
    warned = capsys.readouterr().err
    assert warned.startswith("warning: predictions/latest does not lead to run") and not warned[
        :-1
    ].count("\n")
