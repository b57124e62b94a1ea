"""Runs that are stopped, in all the ways they can be, and go on."""

import contextlib
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import batches
import checkpoint
import evaluation
import multitask_classifier as mc
import optimizer
from checkpoint import read_state
from tasks import TASKS, Task
from training import Training
from utils import UserError, lock_files

OPTIMIZERS = {
    "adamw": [
        "--scheduler",
        "linear",
        "--ema",
        "0.9",
        "--para_encoding",
        "both",
        "--rdrop",
        "1,0,0",
    ],
    "sophiah": ["--optimizer", "sophiah", "--hess_interval", "3"],
    "adamw, learned weights": ["--loss_weights", "learned", "--ema", "0.9"],
    "adamw, pcgrad": ["--gradient_surgery", "pcgrad"],
    "adamw, float16": ["--precision", "float16"],
    "sophiag": ["--optimizer", "sophiag", "--hess_interval", "3", "--unfreeze_interval", "1"],
}
OFTEN = ["--save_interval", "1e-9"]  # after each step


def test_every_optimizer_is_resumed_here():
    assert {name.split(",")[0] for name in OPTIMIZERS} == set(optimizer.OPTIMIZERS)


class Killed(BaseException):
    """Ends a run like `kill -9`: nothing in the run answers it."""


def outcome(folder, files="*-*.csv", n_files=6):
    """(weights of the best model, predictions, TensorBoard's scalars)"""
    (checkpoint,) = (folder / "models_dir").glob("*.pt")
    predictions = {path.name: path.read_bytes() for path in folder.glob(files)}
    assert n_files in (None, len(predictions))
    log = EventAccumulator(str(folder / "logdir" / checkpoint.stem)).Reload()
    scalars = {
        tag: sorted({(event.step, event.value) for event in log.Scalars(tag)})
        for tag in log.Tags()["scalars"]
        if tag != "tokens_per_second"
    }
    return torch.load(checkpoint, weights_only=True)["model"], predictions, scalars


def assert_same(one, other):
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert one[1] == other[1]
    assert one[2] == other[2]


@pytest.fixture(scope="session")
def outcomes():
    """The outcomes of uninterrupted runs, by their flags."""
    return {}


@pytest.fixture
def uninterrupted(flags, tmp_path, outcomes):
    """The outcome of a run with these flags that nothing interrupts."""

    def run(*more):
        if more not in outcomes:
            folder = tmp_path / "uninterrupted"
            elsewhere = [flag.replace(str(tmp_path), str(folder)) for flag in (*flags, *more)]
            assert mc.main(elsewhere) == 0
            outcomes[more] = outcome(folder)
        return outcomes[more]

    return run


def nth_call(n, function, before):
    """`function`, but its nth call is killed, before or after it does its work."""
    count = itertools.count(1)

    def call(*args, **kwargs):
        killed = next(count) == n
        if killed and before:
            raise Killed
        result = function(*args, **kwargs)
        if killed:
            raise Killed
        return result

    return call


PLACES = {
    "in a step": (mc, "training_step", 6, False),
    "while saving": (torch, "save", 5, False),
    "in the evaluation": (evaluation, "outputs", 2, True),
    "in the second evaluation": (evaluation, "outputs", 5, False),
    "while predicting": (evaluation, "write_predictions", 2, False),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_killed_run_resumes_to_the_same_numbers(
    flags, tmp_path, uninterrupted, optimizer, monkeypatch, capsys
):
    chosen = flags + OPTIMIZERS[optimizer]
    expected = uninterrupted(*OPTIMIZERS[optimizer])
    for module, name, call, before in PLACES.values():
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, name, nth_call(call, getattr(module, name), before))
            mc.main(chosen + OFTEN + ["--resume", "auto"])
        torch.rand(3)  # another process would not have this one's random state either
    assert mc.main(chosen + ["--resume", "auto"]) == 0
    assert_same(outcome(tmp_path), expected)
    shown = capsys.readouterr().out
    assert shown.count("has no run with these options; this is a new one") == 1
    assert shown.count("resumed after") == len(PLACES)


@pytest.fixture
def threads(monkeypatch):
    """Prepare batches and write checkpoints in threads, as for a GPU."""
    monkeypatch.setattr(batches, "WORK_IN_THREADS", {"cpu"})


def test_a_killed_run_with_threads_resumes_to_the_same_numbers(
    flags, tmp_path, uninterrupted, threads, monkeypatch, capsys
):
    """To those that a run without threads has."""
    expected = uninterrupted(*OPTIMIZERS["adamw"])
    main_thread, chosen = threading.get_ident(), flags + OPTIMIZERS["adamw"]
    writers, makers = set(), set()
    save, collate = torch.save, batches.collate
    monkeypatch.setattr(torch, "save", lambda *a: writers.add(threading.get_ident()) or save(*a))
    monkeypatch.setattr(
        batches, "collate", lambda *a: makers.add(threading.get_ident()) or collate(*a)
    )
    for module, name, call, before in PLACES.values():
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, name, nth_call(call, getattr(module, name), before))
            mc.main(chosen + OFTEN + ["--resume", "auto"])
    assert mc.main(chosen + ["--resume", "auto"]) == 0
    assert_same(outcome(tmp_path), expected)
    assert writers and main_thread not in writers
    assert makers - {main_thread}  # the rows of dev are put together by the main thread
    assert capsys.readouterr().out.count("resumed after") == len(PLACES)


def test_a_checkpoint_holds_what_was_to_be_written_not_what_came_later(tmp_path, monkeypatch):
    """The thread is slower than training."""
    atomic_write, go_on = checkpoint.atomic_write, threading.Event()

    def late(path):
        assert go_on.wait(60)
        return atomic_write(path)

    monkeypatch.setattr(checkpoint, "atomic_write", late)
    weight, steps, writer = torch.zeros(3), [1, 2], checkpoint.Writer(in_thread=True)
    content = {"weights": [weight, {"steps": steps}]}
    writer.write(tmp_path / "a.pt", content, pytest.fail)
    weight.add_(1)
    steps.append(3)
    content["late"] = True
    assert not (tmp_path / "a.pt").exists()
    go_on.set()
    writer.wait()
    written = torch.load(tmp_path / "a.pt", weights_only=True)
    assert written["weights"][0].tolist() == [0, 0, 0] and len(written) == 1
    assert written["weights"][1] == {"steps": [1, 2]}


@pytest.mark.parametrize("seconds", [0, 0.2])  # until it fails: before or behind the state's turn
def test_a_state_is_not_written_behind_a_model_that_could_not_be(
    flags, tmp_path, threads, monkeypatch, capsys, seconds
):
    """Training goes on, and the next epoch's model is kept though it is not better."""
    atomic_write, tried, means = checkpoint.atomic_write, [], iter([0.5, 0.4])

    @contextlib.contextmanager
    def full_at_first(path):
        tried.append(path.suffix)
        if len(tried) == 1:
            time.sleep(seconds)
            raise UserError(f"cannot write {path}: No space left on device")
        with atomic_write(path) as temporary:
            yield temporary

    monkeypatch.setattr(evaluation, "mean_score", lambda *_: next(means, 0.4))
    monkeypatch.setattr(checkpoint, "atomic_write", full_at_first)
    assert mc.main([*flags, "--epochs", "2"]) == 0
    assert tried == [".pt", ".pt", ".resume", ".resume"]
    assert "warning: the model of epoch 1 is not saved: cannot write" in capsys.readouterr().err
    (path,) = (tmp_path / "models_dir").glob("*.pt")
    assert torch.load(path, weights_only=True)["epoch"] == 2


def test_a_killed_run_with_tasks_of_a_file_resumes_to_the_same_numbers(
    flags, own_tasks, tmp_path, monkeypatch, capsys
):
    """Also without the file: the state has the tasks. Not with a file that says something else."""
    more = [*own_tasks, "--sampling", "annealed", "--dev_rows", "10", "--nli_encoding", "both"]
    models = [tmp_path / "whole" / "models", tmp_path / "models_dir"]
    whole = ["--models_dir", models[0], "--predictions_dir", tmp_path / "whole"]
    killed = ["--models_dir", models[1], "--predictions_dir", tmp_path / "killed", *OFTEN]
    assert mc.main([*flags, *more, *map(str, whole)]) == 0
    for call, resume in ((6, []), (1, ["--resume", "auto"])):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(mc, "training_step", nth_call(call, mc.training_step, False))
            mc.main([*flags, *more, *map(str, killed), *resume])
    (state,) = models[1].glob("*.resume")
    toml = Path(own_tasks[1])
    toml.write_text(toml.read_text().replace("samples = 24", "samples = 25"))
    assert mc.main([*flags, *more, "--resume", str(state)]) == 1
    assert f"{state}: this run has other values of --task_file" in capsys.readouterr().err
    toml.unlink()
    assert mc.main(["--resume", str(state)]) == 0
    (one,), (other,) = ([torch.load(path) for path in folder.glob("*.pt")] for folder in models)
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    assert one["dev_scores"] == other["dev_scores"] and one["epoch"] == other["epoch"]
    files = {path.name: path.read_text() for path in (tmp_path / "whole").glob("*.csv")}
    assert files == {path.name: path.read_text() for path in (tmp_path / "killed").glob("*.csv")}
    assert len(files) == 4


def start(flags, *more):
    command = [sys.executable, "-u", ROOT / "multitask_classifier.py", *flags, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_training(run):
    """Wait until the first line about the progress of an epoch appears."""
    shown = ""
    while not re.search(r"epoch \d+: ", shown):
        character = run.stdout.read(1)
        assert character, shown
        shown += character


def kill_often(flags, times, longest):
    """Kill a run so many times at random moments of its training, and then let it finish. Return the
    epochs in which it was killed."""
    moments = random.Random(4)
    killed = []
    while len(killed) < times:
        run = start(flags, *OFTEN, "--resume", "auto")
        wait_for_training(run)
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(moments.uniform(0, longest))
        assert run.poll() in (None, 0), run.stderr.read()
        run.kill()
        run.communicate()
        if run.returncode == 0:  # it finished first; the other moments come too late
            break
        states = Path(flags[flags.index("--models_dir") + 1]).glob("*.resume")
        killed += [read_state(path)["epoch"] for path in states] or [0]
    last = start(flags, "--resume", "auto")  # TensorBoard's files are ordered by the second
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    return killed


def test_kill_9(flags, tmp_path, uninterrupted):
    """Once; tests/endurance kills 20 times."""
    assert len(kill_often(flags, 1, 0.5)) == 1
    assert_same(outcome(tmp_path), uninterrupted())
    assert not list((tmp_path / "models_dir").glob(".*.tmp"))


def test_a_second_interrupt_waits_for_the_save_of_the_first(flags, tmp_path, monkeypatch, capsys):
    step, save = mc.training_step, mc.Training.save

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return step(*args)

    def interrupted_again(run, **more):
        signal.raise_signal(signal.SIGINT)
        return save(run, **more)

    monkeypatch.setattr(mc, "training_step", interrupted)
    monkeypatch.setattr(mc.Training, "save", interrupted_again)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    assert mc.main(flags) == 130
    signal.signal(signal.SIGINT, before)
    shown = capsys.readouterr().err
    assert "continue with --resume" in shown and "nothing new was saved" not in shown
    assert len([*(tmp_path / "models_dir").glob("*.resume")]) == 1


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_saves_where_it_stands(
    flags, tmp_path, uninterrupted, number, code, monkeypatch
):
    expected = uninterrupted()
    monkeypatch.chdir(tmp_path)  # a message with the long paths of tests would be cut
    flags = [flag.replace(f"{tmp_path}/", "") for flag in flags]
    run = start(flags)
    wait_for_training(run)
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == code and "Traceback" not in errors
    resume = re.search(r"continue with --resume (\S+);", errors)[1]
    free = flags[flags.index("--models_dir") :][:8] + flags[-18:-6]  # where outputs go
    assert mc.main(["--resume", resume, *free]) == 0
    assert_same(outcome(tmp_path), expected)


@pytest.fixture
def stopped(flags, monkeypatch, tmp_path):
    """The state of a run that was killed in its sixth step."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(mc, "training_step", nth_call(6, mc.training_step, True))
        mc.main(flags + OFTEN)
    (path,) = (tmp_path / "models_dir").glob("*.resume")
    return path


def test_half_written_files_of_a_killed_run_are_removed(flags, tmp_path):
    """By the next run, but not those of a run that is still running."""
    models = tmp_path / "models_dir"
    models.mkdir()
    dead = [models / f".dead-12ab.{end}.x1y2.tmp" for end in ("pt", "resume")]
    live = models / ".live-12ab.resume.x1y2.tmp"
    for path in (*dead, live):
        path.touch()
    code = (
        "import filelock, sys; it = filelock.FileLock(sys.argv[1]); it.acquire(); print(); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-uc", code, models / ".live-12ab.resume.lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        other.stdout.readline()
        assert mc.main(flags + ["--epochs", "1"]) == 0
        other.communicate("\n")
    assert live.exists() and not any(path.exists() for path in dead)


def test_how_often_a_run_saves(flags, monkeypatch):
    saves = []
    save = Training.save
    monkeypatch.setattr(Training, "save", lambda self: saves.append(self.n_windows) or save(self))
    assert mc.main(flags) == 0
    assert saves == [0, 0]  # after each of the two epochs
    saves.clear()
    assert mc.main(flags + OFTEN) == 0
    assert saves == [1, 2, 3, 4, 0] * 2


def test_a_resumed_run_may_write_elsewhere(flags, stopped, tmp_path):
    outputs = [f"--{name}_{split}_out" for name in TASKS for split in ("dev", "test")]
    assert all(output in flags for output in outputs)
    state = torch.load(stopped, weights_only=True)
    for output in outputs:
        state["options"][output[2:]] = f"predictions/{output[2:-4].replace('_', '-')}-output.csv"
    state["options"]["predictions_dir"] = "predictions"
    torch.save(state, stopped)
    target = tmp_path / "other"
    assert mc.main(["--resume", str(stopped), "--predictions_dir", str(target)]) == 0
    assert len(list(target.glob("*-output.csv"))) == 6


def test_a_run_of_one_task_resumes_by_its_path_alone(flags, tmp_path, monkeypatch):
    """The options of tasks that are not trained are None."""
    outputs = {f"--{name}_{split}_out" for name in TASKS for split in ("dev", "test")}
    skipped = {i + k for i, flag in enumerate(flags) if flag in outputs for k in (0, 1)}
    own = [flag for i, flag in enumerate(flags) if i not in skipped]
    target = tmp_path / "predictions"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(mc, "training_step", nth_call(3, mc.training_step, False))
        mc.main([*own, "--sst", "--predictions_dir", str(target), *OFTEN])
    (state,) = (tmp_path / "models_dir").glob("*.resume")
    assert mc.main(["--resume", str(state)]) == 0
    assert len(list(target.glob("sst-*-output.csv"))) == 2


def test_flags_that_change_the_numbers_are_refused(flags, stopped, capsys):
    assert mc.main(flags + ["--resume", str(stopped), "--lr", "0.1", "--seed", "3"]) == 1
    assert f"error: {stopped}: this run has other values of --lr, --seed" in capsys.readouterr().err


def test_a_run_of_a_version_with_fewer_flags_goes_on(flags, tmp_path, monkeypatch, capsys):
    """Its state says nothing of the new ones, which is to say that they have their defaults."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(mc, "training_step", nth_call(6, mc.training_step, False))
        mc.main(flags + OFTEN)
    (path,) = (tmp_path / "models_dir").glob("*.resume")
    state = torch.load(path, weights_only=True)
    for flag in ("ema", "rdrop", "para_encoding", "precision"):
        del state["options"][flag]
    torch.save(state, path)
    assert mc.main(flags + ["--resume", str(path), "--rdrop", "1,0,0"]) == 1
    assert "has other values of --rdrop" in capsys.readouterr().err
    assert mc.main(flags + ["--resume", "auto"]) == 0
    assert "resumed after" in capsys.readouterr().out


def test_auto_starts_anew_with_other_flags_and_passes_over_damaged_states(
    flags, stopped, capsys, tmp_path
):
    assert mc.main(flags + ["--resume", "auto", "--lr", "0.1", "--epochs", "1"]) == 0
    assert "no run with these options" in capsys.readouterr().out
    damaged = stopped.with_name("newer.resume")
    damaged.write_bytes(stopped.read_bytes()[:-100])
    assert mc.main(flags + ["--resume", "auto"]) == 0
    shown = capsys.readouterr()
    assert f"warning: --resume auto passes over {damaged}: damaged" in shown.err
    assert "resumed after 1 epochs and 1 steps" in shown.out


def test_a_finished_run_writes_its_predictions_again(flags, tmp_path, capsys):
    assert mc.main(flags) == 0
    expected = outcome(tmp_path)
    for path in tmp_path.glob("*-*.csv"):
        path.unlink()
    assert mc.main(flags + ["--resume", "auto"]) == 0
    assert "is finished; its predictions are written again" in capsys.readouterr().out
    assert outcome(tmp_path)[1] == expected[1]
    (state,) = (tmp_path / "models_dir").glob("*.resume")
    assert mc.main(flags + ["--evaluate", str(state)]) == 1
    assert f"its model is {state.with_suffix('.pt')}" in capsys.readouterr().err


def test_states_of_no_use_are_one_clear_line(flags, stopped, tmp_path, capsys):
    whole = stopped.read_bytes()
    content = torch.load(stopped, weights_only=True)
    training = dict(content["training"])
    del training["samplers"]
    changed = bytearray(whole)
    changed[whole.index(b"/data/3") + 2000] ^= 4  # one bit of the weights

    def write(data):
        stopped.write_bytes(data)

    def save(changes):
        torch.save(content | changes, stopped)

    cases = {
        "damaged, or not a file that torch.save wrote": lambda: write(whole[:9000]),
        "damaged, or": lambda: write(b""),
        "damaged, or not": lambda: write(bytes(changed)),
        "not a checkpoint of multitask_classifier.py": lambda: torch.save([1], stopped),
        "has checkpoint format 1, this version reads": lambda: save({"format": 1}),
        "a damaged state of a run": lambda: save({"training": training}),
        "a damaged state of a": lambda: save({"training": {"data": {}}}),
        "holds no state of a run to continue": lambda: save({"training": None}),
        "no such file": lambda: stopped.unlink(),
    }
    for message, damage in cases.items():
        damage()
        assert mc.main(flags + ["--resume", str(stopped)]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {stopped}: ") and message in error
    model = tmp_path / "model.pt"
    torch.save({key: each for key, each in content.items() if key != "training"}, model)
    assert mc.main(flags + ["--resume", str(model)]) == 1
    assert "holds no state of a run to continue; give a models/RUN.resume" in (
        capsys.readouterr().err
    )


def test_a_changed_training_file_is_noticed(flags, tmp_path, monkeypatch, capsys, stopped):
    state = torch.load(stopped, weights_only=True)
    state["training"]["data"]["para_train"] = "0" * 64
    torch.save(state, stopped)
    assert mc.main(flags + ["--resume", str(stopped)]) == 1
    assert "the files of --para_train have changed since this run began" in capsys.readouterr().err


def test_a_live_run_holds_its_predictions_and_its_state(flags, tmp_path, capsys):
    flags += ["--epochs", "1000"]
    run = start(flags, *OFTEN)
    wait_for_training(run)
    models = tmp_path / "models_dir"
    while not list(models.glob("*.resume")):
        time.sleep(0.05)
    (state,) = models.glob("*.resume")
    assert mc.main(flags) == 1
    assert "sst-dev.csv: a run that is still running will write it" in capsys.readouterr().err
    assert mc.main(flags + ["--resume", str(state)]) == 1
    assert f"error: {state}: is the state of a run that is still running" in capsys.readouterr().err
    run.kill()
    run.communicate()
    assert mc.main(flags + ["--epochs", "1"]) == 0


# --------------------------------------------------------------------------------- bad numbers


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_too_many_of_them_end_the_run(flags, optimizer, monkeypatch, capsys, tmp_path):
    known = Task.loss

    def loss(task, outputs, *arguments):
        return known(task, outputs, *arguments) * (torch.nan if task.name == "sts" else 1)

    monkeypatch.setattr(Task, "loss", loss)
    more = ["--max_bad_steps", "2", *OPTIMIZERS[optimizer]]
    assert mc.main(flags + more) == 1
    shown = capsys.readouterr().err
    error = shown.splitlines()[-1]
    (state,) = (tmp_path / "models_dir").glob("*.resume")
    assert error.startswith("error: 2 steps in a row were not finite (loss nan, norm of the")
    assert f"--resume {state}" in error and len(error.replace(str(state), "")) < 200
    ids = re.search("rows of the last step, by id: (.*)", shown)[1]
    named = {part.split()[0]: part.split()[1:] for part in ids.split("; ")}
    assert {name: len(each) for name, each in named.items()} == dict(sst=16, para=16, sts=16)
    model, _, _ = mc.load_checkpoint(state)
    assert all(each.isfinite().all() for each in model.parameters())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_flags_that_help(flags, error, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(mc, "training_step", fail)
    assert mc.main(flags) == 1
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith("error: out of memory; ")
    assert all(flag in shown for flag in ("--batch_size", "--grad_accumulation", "--max_length"))


def test_other_errors_are_not_called_out_of_memory(flags, monkeypatch):
    monkeypatch.setattr(mc, "training_step", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size|size mismatch"):
        mc.main(flags)


# --------------------------------------------------------------------------------- full disks


LIMITED = """
import resource, signal, sys
sys.path.insert(0, {root!r})
import evaluation
import multitask_classifier as mc
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.exit(mc.main(sys.argv[1:]))
"""


def run_with_limit(limit, flags):
    """As on a full disk: no file can grow beyond `limit` bytes."""
    code = LIMITED.format(root=str(ROOT), limit=limit)
    command = [sys.executable, "-c", code, *flags]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"MPLBACKEND": "agg"}
    )


def test_a_full_disk_does_not_end_the_run(flags, tmp_path, uninterrupted):
    """There is room for the model, not for the state."""
    done = run_with_limit(200_000, flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: cannot write") == 2 and "the run continues" in done.stderr
    assert_same(outcome(tmp_path), uninterrupted())
    assert not list((tmp_path / "models_dir").glob(".*.tmp"))


def test_a_log_that_cannot_be_written_does_not_end_the_run(
    flags, tmp_path, uninterrupted, monkeypatch, capsys
):
    expected = uninterrupted()
    import torch.utils.tensorboard as tensorboard

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    for name in ("add_scalar", "add_figure", "add_hparams", "flush"):
        monkeypatch.setattr(tensorboard.SummaryWriter, name, fail)
    assert mc.main(flags) == 0
    assert capsys.readouterr().err.count("TensorBoard's log ends here") == 1
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*-*.csv")} == expected[1]


def test_no_room_for_any_model_is_said_at_the_end(flags, tmp_path):
    done = run_with_limit(105_000, [*flags, "--epochs", "1"])
    assert done.returncode == 1
    assert re.search(r"epoch 1: .*, not saved$", done.stdout, re.M)
    assert re.search(
        r"^warning: the model of epoch 1 is not saved: cannot .*\.pt", done.stderr, re.M
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "could not be written" in last
    assert "Traceback" not in done.stderr


def test_a_lock_is_released(tmp_path):
    path = Path(tmp_path / "file")
    with lock_files([path], "is held"):
        with pytest.raises(UserError, match="file: is held"), lock_files([path], "is held"):
            pass
    with lock_files([path], "is held"):
        pass
