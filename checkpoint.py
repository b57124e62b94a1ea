"""Files of a run: write, read, find, resume, lock."""

import argparse
import contextlib
import dataclasses
import os
import secrets
import warnings
from datetime import datetime
from pathlib import Path

import torch

from base_bert import BertConfig
from datasets import TaskDataset
from options import DEFAULT_SPACY_MODEL, build_parser, decisive, parse_options
from tagging import Pipeline, Tagger
from tasks import SPLITS
from tokenizer import BertTokenizer
from utils import (
    UserError,
    atomic_write,
    check_writable,
    current_versions,
    hold,
    load_torch_file,
    n_processes,
    one_line,
    rank,
)

CHECKPOINT_FORMAT = 2
STILL_GOING = "is the state of a run that is still going"


def checkpoint_content(
    model: torch.nn.Module,
    tokenizer: BertTokenizer,
    options: argparse.Namespace,
    epoch: int,
    scores: dict[str, dict[str, float]],
    tagger: Tagger | None = None,
) -> dict:
    """All that a later load needs. `epoch` counts those that are over, `scores` are on dev."""
    return {
        "format": CHECKPOINT_FORMAT,
        "model": model.state_dict(),
        "bert_config": dataclasses.asdict(model.bert.config),
        "tokenizer": tokenizer.to_json(),
        "tags": tagger.pipeline.to_dict() if tagger else None,
        "options": vars(options),
        "epoch": epoch,
        "dev_scores": scores,
        "versions": current_versions(),
    }


def write_checkpoint(path: Path, content: dict) -> None:
    """Atomically, by the first process. UserError: it cannot be written, and what was there is
    still there."""
    if rank():
        return
    try:
        with atomic_write(path) as temporary:
            torch.save(content, temporary)
    except RuntimeError as error:  # what PyTorch's writer makes of a full disk
        raise UserError(f"cannot write {path}: {one_line(error)}") from error


def read_checkpoint(path: str | Path) -> dict:
    """What `write_checkpoint` wrote, of a format that this version reads; else UserError."""
    checkpoint = load_torch_file(path)
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise UserError(
            f"{path}: not a checkpoint of multitask_classifier.py; "
            "give a models/RUN.pt that a run has written"
        )
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        raise UserError(
            f"{path}: has checkpoint format {checkpoint['format']!r}, this version reads format "
            f"{CHECKPOINT_FORMAT}; use the version of this project that wrote it"
        )
    return checkpoint


def check_tags(checkpoint: dict, config: BertConfig) -> None:
    """ValueError unless a checkpoint's pipeline has as many labels as its model has embeddings."""
    tags, sizes = checkpoint.get("tags"), (config.num_pos_tags, config.num_ner_tags)
    if tags is None and sizes == (0, 0):
        return
    strings = [tags["name"], tags["version"], tags["digest"], *tags["pos_labels"]]
    strings += tags["ner_labels"]
    fits = (len(tags["pos_labels"]), len(tags["ner_labels"])) == sizes
    spacy_model = checkpoint["options"]["spacy_model"]
    if not fits or not all(isinstance(each, str) for each in (*strings, spacy_model)):
        raise ValueError("its tags are not those of its model")


def tagger_like(tags: dict | None, path: str | Path, options) -> Tagger | None:
    """What tags sentences for a model that was trained with these tags; UserError if the pipeline
    that `--spacy_model` names is another one."""
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


def remove_leftovers(models_dir: Path) -> None:
    """What runs had half written when they were killed, and nobody will go on with."""
    for leftover in models_dir.glob(".*.tmp"):
        run = leftover.name[1:].rsplit(".", 3)[0]
        with contextlib.suppress(UserError), hold([models_dir / f"{run}.resume"], STILL_GOING):
            pass  # to hold it is to remove them


def find_state(options: argparse.Namespace) -> Path | None:
    """The state file that `--resume` means; None for a new run.

    `auto` is the newest good one in `--models_dir` of a run with the same options that is not going
    on meanwhile.
    """
    if options.resume != "auto":
        return Path(options.resume) if options.resume else None
    wanted, tags = decisive(vars(options)), None
    if options.additional_input:
        tags = Pipeline.find(options.spacy_model or DEFAULT_SPACY_MODEL).to_dict()
    paths = [path for path in Path(options.models_dir).glob("*.resume") if path.exists()]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            state = read_state(path)
        except UserError as error:
            warnings.warn(f"--resume auto passes over {error}", stacklevel=2)
            continue
        if decisive(state["options"]) == wanted and state.get("tags") == tags:
            with contextlib.suppress(UserError), hold([path], STILL_GOING):
                return path
    print(f"--resume auto: {options.models_dir} has no run with these options; this is a new one")
    return None


def read_state(path: str | Path) -> dict:
    """The state of a run; UserError says why a file holds none."""
    state = read_checkpoint(path)
    training = state.get("training")
    if not training or not isinstance(state.get("options"), dict):
        raise UserError(f"{path}: holds no state of a run to go on with; give a models/RUN.resume")
    if training != "finished" and not {"data", "threads", "processes", "log"} <= set(training):
        raise UserError(f"{path}: a damaged state of a run")
    state["options"] = vars(build_parser().parse_args([])) | state["options"]  # older: fewer flags
    return state


def options_to_resume(argv: list[str] | None, path: str) -> argparse.Namespace:
    """The options of the saved run; what `argv` gives besides must not change its numbers."""
    saved = read_state(path)["options"]
    named = {  # the other predictions follow --predictions_dir, which may be another one now
        key: value
        for key, value in saved.items()
        if key[-4:] != "_out" or os.path.dirname(value) != saved["predictions_dir"]
    }
    options = parse_options(argv, named)
    options.models_dir = str(Path(path).parent)
    given, wanted = decisive(vars(options)), decisive(saved)
    wanted.pop("tasks")  # follow from the flags of the tasks
    if differing := [key for key in wanted if given.get(key) != wanted[key]]:
        raise UserError(
            f"{path}: this run has other values of --{', --'.join(differing)}; "
            "leave them out to go on with it, or start a new run"
        )
    return options


def check_unchanged(data: dict[str, dict[str, TaskDataset]], state: dict, path: Path) -> None:
    """UserError unless the data are those of the saved run; a warning where numbers may differ."""
    saved, here = state["training"]["data"], digests(data)
    if changed := [name for name, digest in here.items() if saved.get(name) != digest]:
        raise UserError(
            f"{path}: the files of --{', --'.join(changed)} have changed since this run began; "
            "put them back, or start a new run"
        )
    now = {"threads": torch.get_num_threads(), "processes": n_processes()} | current_versions()
    then = {key: state["training"][key] for key in ("threads", "processes")} | state["versions"]
    if other := [f"{key} {then[key]}, now {now[key]}" for key in now if now[key] != then[key]]:
        warnings.warn(f"{path} was saved with {'; '.join(other)}: the numbers may differ a little")


def digests(data: dict[str, dict[str, TaskDataset]]) -> dict[str, str]:
    """Of the files that decide what training does."""
    return {
        f"{name}_{split}": dataset.digest
        for split in ("train", "dev")
        for name, dataset in data[split].items()
    }


def claim_run(options: argparse.Namespace, kind: str) -> tuple[Path, Path]:
    """For a name that no other run has: the path of its state, and its TensorBoard folder, made
    here."""
    start = f"{datetime.now():%Y%m%d-%H%M%S}"
    run = f"{start}-{kind}-{options.optimizer}-{secrets.token_hex(2)}"
    directory = Path(options.logdir) / (options.tensorboard_subfolder or "") / run
    try:
        directory.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror}") from error
    return Path(options.models_dir) / f"{run}.resume", directory


def hold_predictions(options: argparse.Namespace):
    """Keep other runs from writing the files that this one will write."""
    paths = [
        Path(getattr(options, f"{name}_{split}_out"))
        for name in options.tasks
        for split in ("dev", "test")
    ]
    what = "a run that is still going will write it; give this one another --predictions_dir"
    return hold(paths, what)


def check_outputs(options: argparse.Namespace) -> None:
    """Refuse paths that cannot be written before hours of training, not after."""
    check_writable(Path(options.models_dir) / "run.pt")
    taken = {
        Path(getattr(options, f"{name}_{split}")).resolve(): f"--{name}_{split}"
        for name in options.tasks
        for split in SPLITS
    }
    for name in options.tasks:
        for split in ("dev", "test"):
            flag, path = f"--{name}_{split}_out", getattr(options, f"{name}_{split}_out")
            check_writable(path)
            other = taken.setdefault(Path(path).resolve(), flag)
            if other != flag:
                raise UserError(f"{path}: is given for {flag} and for {other}")
