"""Files of a run: write, read, find, resume and lock them.

models/RUN.pt is the best model of a run, models/RUN.resume its state while it is not finished. Both
are checkpoints; only the state has the entry "training".
"""

import argparse
import contextlib
import dataclasses
import functools
import glob
import os
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from base_bert import BertConfig
from bert import BertModel, EncoderWithHeads
from datasets import TaskDataset
from flags import DEFAULT_SPACY_MODEL, build_parser
from options import (
    changed_options,
    deciding,
    find_data,
    given_flags,
    named_files,
    parse_options,
)
from processes import by_first, n_processes, rank
from streams import complain, file_to_replace
from tagging import Pipeline, Tagger
from tasks import SPLITS, TASKS, Task, plain_rows, tasks_of_rows
from tokenizer import BertTokenizer
from utils import (
    UserError,
    atomic_write,
    check_writable,
    current_versions,
    load_torch_file,
    lock_files,
    one_line,
)

CHECKPOINT_FORMAT = 4
PREDICTIONS = "predictions"  # the folder of those folders that are named after runs
STILL_RUNNING = "is the state of a run that is still running"


# --------------------------------------------------------------------------------- write and read


def checkpoint_content(
    model: EncoderWithHeads,
    tokenizer: BertTokenizer,
    options: argparse.Namespace,
    epoch: int,
    scores: Mapping[str, Mapping[str, float]],
    tagger: Tagger | None = None,
) -> dict[str, Any]:
    """Return everything that a later load needs. `epoch` counts finished epochs, `scores` are on dev."""
    return {
        "format": CHECKPOINT_FORMAT,
        "model": model.state_dict(),
        "bert_config": dataclasses.asdict(model.bert.config),
        "tokenizer": tokenizer.to_json(),
        "tags": tagger.pipeline.to_dict() if tagger else None,
        "options": plain(options),
        "epoch": epoch,
        "dev_scores": scores,
        "versions": current_versions(),
    }


def plain(options: argparse.Namespace) -> dict[str, Any]:
    """Return options as texts, numbers and tables of them."""
    return vars(options) | {"tasks": plain_rows(options.tasks)}


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically. Raises UserError if it cannot be written; then the previous file is
    still there."""
    try:
        with atomic_write(path) as temporary:
            torch.save(content, temporary)
    except RuntimeError as error:  # PyTorch's writer raises it for a full disk
        raise UserError(f"cannot write {path}: {one_line(error)}") from error


class Writer:
    """Writes checkpoints. `in_thread`, a write waits only for a copy of its content, and training goes
    on. Files are written in order. After one that fails, the waiting ones are left out, so that no state
    refers to a model that is missing."""

    def __init__(self, in_thread: bool):
        self.pool = ThreadPoolExecutor(1) if in_thread else None
        self.coming: list[Future] = []
        self.failure: Callable[[], Any] | None = None

    def write(self, path: Path, content: Any, failed: Callable[[UserError], Any]) -> None:
        """Write a checkpoint, in the first process. `failed` is called from here, or later from `wait`."""
        if rank():
            return
        if not self.pool:
            self._write(path, content, failed)
            self.wait()
            return
        if (len(self.coming) > 1 or all(future.done() for future in self.coming)) and self.wait():
            return  # the content was made before this failure was known
        self.coming.append(self.pool.submit(self._write, path, host_copy(content), failed))

    def _write(self, path: Path, content: Any, failed: Callable[[UserError], Any]) -> None:
        try:
            if not self.failure:
                write_checkpoint(path, content)
        except UserError as error:
            self.failure = functools.partial(failed, error)

    def wait(self) -> bool:
        """Wait until all is written. Return whether a write has failed."""
        for future in self.coming:
            future.result()
        self.coming.clear()
        failure, self.failure = self.failure, None
        if failure:
            failure()
        return failure is not None


def host_copy(content: Any) -> Any:
    """Copy tensors in tables and lists to the host, from a GPU to pinned memory in one pass."""

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        target = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return target.copy_(value, non_blocking=True)

    copied = tree_map(copy, content)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copied


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint. Raises UserError for another file or another format."""
    checkpoint = load_torch_file(path)
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise UserError(
            f"{path}: not a checkpoint of multitask_classifier.py; "
            "give a file that a run has written into models/"
        )
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        raise UserError(
            f"{path}: has checkpoint format {checkpoint['format']!r}, this version reads format "
            f"{CHECKPOINT_FORMAT}; use the version of this project that wrote it"
        )
    try:
        checkpoint["options"]["tasks"] = tasks_of_rows(checkpoint["options"]["tasks"])
    except Exception as error:  # whatever a missing or damaged entry makes of this line
        raise UserError(f"{path}: a damaged checkpoint ({one_line(error)})") from error
    return checkpoint


def read_state(path: str | Path) -> dict[str, Any]:
    """Read the state of a run. Raises UserError with the reason if the file holds none."""
    state = read_checkpoint(path)
    training = state.get("training")
    if not training:
        raise UserError(f"{path}: holds no state of a run to continue; give a models/RUN.resume")
    if training != "finished" and not {"data", "threads", "processes", "log"} <= set(training):
        raise UserError(f"{path}: a damaged state of a run")
    # A state of an older version lacks the flags that are new since then.
    state["options"] = vars(build_parser().parse_args([])) | state["options"]
    return state


# ------------------------------------------------------------------------------------------- tags


def check_entries(checkpoint: Mapping[str, Any], config: BertConfig) -> None:
    """Raise KeyError, TypeError or ValueError for a checkpoint that lacks entries, or whose pipeline has
    not as many labels as its model has embeddings."""
    if "max_length" not in checkpoint["options"]:
        raise KeyError("max_length")
    int(checkpoint["epoch"])  # must be a number
    tags, sizes = checkpoint.get("tags"), (config.num_pos_tags, config.num_ner_tags)
    if tags is None and sizes == (0, 0):
        return
    if tags is None:
        raise ValueError("its model has embeddings of tags, but the tags are missing")
    strings = [tags["name"], tags["version"], tags["digest"], *tags["pos_labels"]]
    strings += [*tags["ner_labels"], checkpoint["options"]["spacy_model"]]
    fits = (len(tags["pos_labels"]), len(tags["ner_labels"])) == sizes
    if not fits or not all(isinstance(text, str) for text in strings):
        raise ValueError("its tags are not those of its model")


def find_tagger(
    tags: Mapping[str, Any] | None, path: str | Path, options: argparse.Namespace
) -> Tagger | None:
    """Return the tagger of a checkpoint with these tags. Raises UserError if `--spacy_model` names
    another pipeline than the one it was trained with."""
    if tags is None:
        if options.additional_input or options.spacy_model:
            flags = "--additional_input and --spacy_model"
            raise UserError(f"{path}: was trained without tags; leave {flags} out")
        return None
    wanted = f"{tags['name']} {tags['version']} ({tags['digest'][:8]})"
    try:
        pipeline = Pipeline.find(options.spacy_model or DEFAULT_SPACY_MODEL)
    except UserError as error:
        raise UserError(
            f"{path}: was trained with tags of {wanted}; name it with --spacy_model ({error})"
        ) from error
    if pipeline.to_dict() != tags:
        raise UserError(
            f"{path}: was trained with tags of {wanted}, not of {pipeline}; "
            "name that one with --spacy_model"
        )
    return Tagger(pipeline, options.cache_dir)


def check_encoder(
    bert: BertModel,
    source: str,
    tagger: Tagger | None,
    tasks: Mapping[str, Task],
    moe: str | None,
) -> None:
    """Raise UserError for an encoder that cannot do what is asked: it brings embeddings of tags of an
    unknown pipeline, no pooler for a gate, or cannot read two sentences in one sequence."""
    if moe and bert.has_new_pooler:
        raise UserError(
            f"{source}: this encoder has no pooler, which the gate of --moe reads; "
            "take an encoder with a pooler, or leave --moe out"
        )
    tables = bert.new_parameters
    if tables and (tagger is None or any(table.any() for table in tables)):
        raise UserError(
            f"{source}: this encoder has embeddings of tags already, of an unknown spaCy pipeline; "
            "start from one that has none, or continue from a checkpoint (--resume, --evaluate)"
        )
    check_pairs(bert.config, source, tasks)


def check_pairs(config: BertConfig, source: str, tasks: Mapping[str, Task]) -> None:
    """Raise UserError for an encoder that cannot read the two sentences of a task in one sequence."""
    joint = [name for name, task in tasks.items() if task.encoding != "bi"]
    if joint and config.type_vocab_size < 2:
        raise UserError(
            f"{source}: this encoder does not tell two sentences of a sequence apart "
            f"(type_vocab_size 1); leave --{'_encoding and --'.join(joint)}_encoding at bi"
        )


# -------------------------------------------------------------------------- options of a checkpoint


def options_of(argv: list[str]) -> argparse.Namespace:
    """Parse the flags. Those that are left open are as in the checkpoint that `--resume` or `--evaluate`
    names."""
    options = named_files(argv)
    if not options.evaluate and options.resume in (None, "auto"):
        options = parse_options(argv)  # a --config may name a checkpoint too
    if options.evaluate:
        return options_to_evaluate(argv, options.evaluate)
    if options.resume in (None, "auto"):
        return options
    return options_to_resume(argv, options.resume)


def options_to_evaluate(argv: list[str], patterns: Sequence[str]) -> argparse.Namespace:
    """Return the options of an evaluation: tasks and data are those of the checkpoints, unless `argv` has
    others. Of a task that several know, the first decides. Raises UserError if one of several shares no
    task with the others, if none knows a task, or if a flag is for another model."""
    paths = [path for pattern in patterns for path in find_files(pattern)]
    trained = {path: read_checkpoint(path)["options"] for path in paths}
    data_dir, tasks = trained[paths[0]]["data_dir"], dict[str, Task]()
    defaults: dict[str, Any] = {"data_dir": data_dir}
    for path, saved in trained.items():
        follows = saved["data_dir"] == data_dir or named_files(argv).data_dir
        if tasks and not set(tasks) & set(saved["tasks"]):
            raise UserError(f"{path}: shares no task with {paths[0]}, so they are not averaged")
        for name, task in saved["tasks"].items():
            labels = task.classes, task.range, task.sentences
            known = tasks.get(name, task)
            if labels != (known.classes, known.range, known.sentences):
                raise UserError(f"{path}: its task {name} is another one than that of {paths[0]}")
            for split in () if name in tasks else SPLITS:
                # Those of the task's row follow --data_dir.
                files = [find_data(saved["data_dir"], file) for file in getattr(task, split)]
                if saved[f"{name}_{split}"] != files or not follows:
                    defaults[f"{name}_{split}"] = saved[f"{name}_{split}"]
        tasks = saved["tasks"] | tasks
    options = parse_options(argv, defaults, tasks)
    if untrained := [name for name in options.tasks if name not in tasks]:
        known = ", ".join(tasks)
        raise UserError(f"{paths[0]}: was not trained on {', '.join(untrained)}, only on {known}")
    given = given_flags(argv, TASKS | tasks)
    for path, saved in trained.items():
        check_as_trained(given, saved, path)
    return changed_options(options, evaluate=paths)


def check_as_trained(given: Mapping[str, Any], trained: Mapping[str, Any], path: str) -> None:
    """Raise UserError for a flag on the command line with which the model would be another one than
    that of the checkpoint."""
    for flag, value in given.items():
        of_model = flag == "moe" or flag.endswith(("_encoding", "_loss"))
        if of_model and (own := trained.get(flag, value)) != value:
            how = f"with --{flag} {own}" if own else f"without --{flag}"
            raise UserError(f"{path}: was trained {how}; leave --{flag} out")


def find_files(pattern: str) -> list[str]:
    """Return the files that a pattern means, in order. Raises UserError if there is none."""
    if os.path.exists(pattern) or not glob.has_magic(pattern):
        return [pattern]
    if not (found := sorted(glob.glob(pattern))):
        raise UserError(f"{pattern}: no file has such a name")
    return found


def find_state(options: argparse.Namespace) -> Path | None:
    """Return the state file that `--resume` means; None for a new run.

    `auto` is the newest readable one in `--models_dir` of a run that has the same options and is not
    still running.
    """
    if options.resume != "auto":
        return Path(options.resume) if options.resume else None
    wanted, tags = deciding(vars(options)), None
    if options.additional_input:
        tags = Pipeline.find(options.spacy_model).to_dict()
    paths = [path for path in Path(options.models_dir).glob("*.resume") if path.exists()]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            state = read_state(path)
        except UserError as error:
            warnings.warn(f"--resume auto passes over {error}", stacklevel=2)
            continue
        if deciding(state["options"]) == wanted and state.get("tags") == tags:
            with contextlib.suppress(UserError), lock_files([path], STILL_RUNNING):
                return path
    print(f"--resume auto: {options.models_dir} has no run with these options; this is a new one")
    return None


def lock_state(
    options: argparse.Namespace, locks: contextlib.ExitStack
) -> tuple[Path | None, dict[str, Any] | None]:
    """Find, lock and read the state that `--resume` means; (None, None) for a new run."""
    remove_leftovers(Path(options.models_dir))
    path = by_first(lambda: find_state(options))
    if path is None:
        return None, None
    locks.enter_context(lock_files([path], STILL_RUNNING))
    return path, read_state(path)


def options_to_resume(argv: list[str], path: str) -> argparse.Namespace:
    """Return the options of a saved run, with those flags of `argv` that do not change its numbers.
    Raises UserError for flags that do."""
    saved = read_state(path)["options"]

    def follows_folder(key: str) -> bool:
        """Whether a file of predictions follows --predictions_dir, which may have changed."""
        is_given = key.endswith("_out") and saved[key] is not None
        return is_given and os.path.dirname(saved[key]) == saved["predictions_dir"]

    defaults = {key: value for key, value in saved.items() if not follows_folder(key)}
    options = parse_options(argv, defaults, saved["tasks"])
    given, wanted = deciding(vars(options)), deciding(saved)
    # The tasks follow from other flags, or from the file of tasks.
    differing = [key for key in wanted if key != "tasks" and given.get(key) != wanted[key]]
    if differing or given["tasks"] != wanted["tasks"]:
        differing = differing or ["task_file"]
        raise UserError(
            f"{path}: this run has other values of --{', --'.join(differing)}; "
            "leave them out to continue it, or start a new run"
        )
    return changed_options(options, models_dir=str(Path(path).parent))


def check_unchanged(
    data: Mapping[str, Mapping[str, TaskDataset]], state: Mapping[str, Any], path: Path
) -> None:
    """Raise UserError if the data have changed since the run was saved. Warn of differences that can
    change its numbers a little."""
    saved, here = state["training"]["data"], data_digests(data)
    if changed := [name for name, digest in here.items() if saved.get(name) != digest]:
        raise UserError(
            f"{path}: the files of --{', --'.join(changed)} have changed since this run began; "
            "put them back, or start a new run"
        )
    now = {"threads": torch.get_num_threads(), "processes": n_processes()} | current_versions()
    then = {key: state["training"][key] for key in ("threads", "processes")} | state["versions"]
    if other := [f"{key} {then[key]}, now {now[key]}" for key in now if now[key] != then[key]]:
        warnings.warn(f"{path} was saved with {'; '.join(other)}: the numbers may differ a little")


def data_digests(data: Mapping[str, Mapping[str, TaskDataset]]) -> dict[str, str]:
    """Return the digests of the files that decide what training does."""
    return {
        f"{name}_{split}": dataset.digest
        for split in ("train", "dev")
        for name, dataset in data[split].items()
    }


# ------------------------------------------------------------------------------- names and locks


def same_shapes(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two heads have the same weights by name and shape."""
    shapes = [{key: t.shape for key, t in head.state_dict().items()} for head in (one, other)]
    return shapes[0] == shapes[1]


def other_encoding(name: str, trained: Mapping[str, Task], tasks: Mapping[str, Task]) -> str:
    """Name the encoding that a task was trained with, if it is another one now."""
    before = trained.get(name, tasks[name]).encoding
    return f" (was trained with --{name}_encoding {before})" * (before != tasks[name].encoding)


def new_name(options: argparse.Namespace, kind: str = "") -> str:
    """Choose a name that no other run has. `kind` is `--option` where it is not given."""
    start = f"{datetime.now():%Y%m%d-%H%M%S}"
    return f"{start}-{kind or options.option}-{options.optimizer}-{secrets.token_hex(2)}"


def new_run(options: argparse.Namespace, run: str) -> tuple[Path, Path]:
    """Return the path of a new run's state, and its TensorBoard folder, which is made here."""
    directory = Path(options.logdir) / (options.tensorboard_subfolder or "") / run
    try:
        directory.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror}") from error
    return Path(options.models_dir) / f"{run}.resume", directory


def remove_leftovers(models_dir: Path) -> None:
    """Remove half-written files of runs that were killed."""
    for leftover in models_dir.glob(".*.tmp"):
        run = leftover.name[1:].rsplit(".", 3)[0]
        paths = [models_dir / f"{run}.resume"]
        # `lock_files` removes half-written files of what it locks. A run that is still running holds
        # its lock, so its files stay.
        with contextlib.suppress(UserError), lock_files(paths, STILL_RUNNING):
            pass


def name_predictions(options: argparse.Namespace, run: str) -> argparse.Namespace:
    """Return the options with the prediction files in a folder of the run's name, unless flags choose
    others."""
    folder = options.predictions_dir or os.path.join(PREDICTIONS, run)
    keys = [(name, split) for name in options.tasks for split in ("dev", "test")]
    paths = {
        f"{name}_{split}_out": os.path.join(folder, f"{name}-{split}-output.csv")
        for name, split in keys
        if getattr(options, f"{name}_{split}_out") is None
    }
    return changed_options(options, predictions_dir=folder, **paths)


def link_latest(options: argparse.Namespace) -> None:
    """Let `predictions/latest` lead to the folder of a run's predictions, if it is one of those there."""
    folder, link = Path(options.predictions_dir), Path(PREDICTIONS) / "latest"
    if rank() or folder.parent != link.parent or not folder.is_dir():
        return
    temporary = link.with_name(f".{folder.name}.latest")
    try:
        temporary.symlink_to(folder.name)
        temporary.replace(link)
    except OSError as error:  # such as a file system without links
        complain(f"warning: {link} does not lead to {folder.name} ({error.strerror})")


def lock_predictions(options: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """Lock the prediction files of this run against other runs."""
    what = "a run that is still running will write it; give this one another --predictions_dir"
    return lock_files([Path(getattr(options, flag)) for flag in prediction_flags(options)], what)


def check_outputs(options: argparse.Namespace) -> None:
    """Refuse outputs that cannot be written, or that are inputs, before hours of training."""
    check_writable(Path(options.models_dir) / "run.pt")
    inputs = [f"{name}_{split}" for name in options.tasks for split in SPLITS]
    paths = [(path, flag) for flag in inputs for path in getattr(options, flag)]
    taken = {Path(os.path.realpath(path)): flag for path, flag in paths}
    for flag in prediction_flags(options):
        path = getattr(options, flag)
        check_writable(path)
        target = file_to_replace(Path(path))
        other = taken.setdefault(target, flag) if target else flag
        if other != flag:
            raise UserError(f"{path}: is given for --{flag} and for --{other}")


def prediction_flags(options: argparse.Namespace) -> list[str]:
    """Return the names of the options that name the prediction files of the chosen tasks."""
    keys = [f"{name}_{split}" for name in options.tasks for split in ("dev", "test")]
    return [f"{key}_out" for key in keys if getattr(options, key)]
