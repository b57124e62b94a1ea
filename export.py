"""Export a checkpoint as a folder that other libraries open."""

import argparse
import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from datasets import checked_max_length
from moe import MixtureOfExperts
from multitask_classifier import MultitaskBERT, load_checkpoint
from tasks import TASKS, Task, plain_rows
from utils import MINILM, ROOT, UserError, errors_of_writing

POOLING_FOLDER = "1_AttentionPooling"
CARD = """
# {title}

A BERT fine-tuned on {tasks} at once{origin}.

Exported by Multitask BERT's `predict.py`. This folder holds the encoder and its tokenizer in Hugging
Face layout. The rest of the model is in `heads.safetensors`, in that project's names: attention pooling
(`attention_layer.*`) and the heads ({heads}).

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER", trust_remote_code=True)
vectors = model.encode(["How old are you?", "What is your age?"])
print(model.similarity(vectors, vectors))
```

```python
from transformers import AutoModel, AutoTokenizer

encoder, tokenizer = AutoModel.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")
```

`trust_remote_code=True` lets `sentence-transformers` (6.0 or newer) run this folder's
`attention_pooling.py`, since it has no such pooling of its own. The file is short; read it first.
`transformers` runs no code from this folder.

{similarity}

## Training and scores

| task | trained on | dev metric | value |
| --- | --- | --- | --- |
{scores}

Measured on the dev files after epoch {epoch}. To measure them again, with the checkpoint and the data:

```sh
python multitask_classifier.py --evaluate {checkpoint} --data_dir {data_dir}{smoketest}
```

## Limits

- It was trained on English only. Text is cut after {max_length} word pieces.
- The epoch was chosen by its scores on the same dev files, so they are a little too high.
- Scores on other text than that of the dev files, and bias, have not been measured.{about}

## Licence

Apache 2.0, for weights and code. The training data have their own terms.
"""
ABOUT_REAL_DATA = """ In the
  real data, sentiment is about film reviews, paraphrase about questions, and similarity about captions,
  headlines and forum posts."""
SCORED_BY_COSINE = """\
The {title} that was scored below is the cosine of two vectors, on the scale of its labels ({scale})."""
NOT_BY_COSINE = """\
**The cosine of two vectors is not the {title} for which the scores below were measured**: {why}"""
UNTRAINED = """\
**The cosine of two vectors was not trained**: this model has no task of how similar two sentences are."""
WHY_NOT = {
    "cross": "that comes from a head on both sentences in one sequence (`joint_heads.{name}`).",
    "both": "that is the mean of the cosine, on the scale of the labels, and the output of a head on both "
    "sentences in one sequence (`joint_heads.{name}`).",
}


def about_cosine(task: Task) -> str:
    """Return what the cosine of two vectors says about a task whose label is a number for a pair."""
    if task.encoding == "bi":
        return SCORED_BY_COSINE.format(title=task.title, scale=task.scale)
    why = WHY_NOT[task.encoding].format(name=task.name)
    return NOT_BY_COSINE.format(title=task.title, why=why)


def export(checkpoint_path: str, directory: str) -> None:
    """Write the model as a folder for `transformers` and `sentence-transformers`, all or nothing.

    Raises:
        UserError: the folder is there and not empty, or these libraries cannot compute the model.
    """
    with new_folder(Path(directory)) as folder:
        model, tokenizer, content = load_checkpoint(checkpoint_path)
        bert, tags = model.bert, content.get("tags")
        if isinstance(bert, MixtureOfExperts) or tags:
            raise UserError(
                f"{checkpoint_path}: was trained with --{'additional_input' if tags else 'moe'}, which "
                "transformers' BERT does not have, so it cannot be exported"
            )
        asked = argparse.Namespace(max_length=content["options"]["max_length"])
        max_length = checked_max_length(asked, checkpoint_path, bert.config, tokenizer)
        tokenizer.max_length = max_length
        bert.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        write_heads(model, folder)
        write_sentence_transformers_files(folder, bert.config.hidden_size, max_length)
        card = model_card(model, content, Path(checkpoint_path).name, max_length)
        (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"exported {checkpoint_path} to {directory}")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder, which is renamed to `path` if all goes well. Raises UserError if `path` is
    there and not empty, or cannot be written."""
    with errors_of_writing(path):
        if path.is_symlink() or path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(f"{path}: is there already, and is no empty folder; name a new one")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
            # Others may read this one, unlike the temporary one.
            whole = Path(temporary) / "whole"
            whole.mkdir()
            yield whole
            os.replace(whole, path)


def write_heads(model: MultitaskBERT, folder: Path) -> None:
    """Write all weights outside the encoder, and those of the pooling once more for
    `sentence-transformers`."""
    weights = model.state_dict()
    heads = {name: weight for name, weight in weights.items() if not name.startswith("bert.")}
    tasks = {name: json.dumps(row) for name, row in plain_rows(model.tasks).items()}
    write_weights(folder / "heads.safetensors", heads, tasks)
    (folder / POOLING_FOLDER).mkdir()
    pooling = folder / POOLING_FOLDER / "model.safetensors"
    write_weights(pooling, model.attention_layer.state_dict(), {"format": "pt"})


def write_weights(path: Path, weights: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save

    contiguous = {name: weight.contiguous() for name, weight in weights.items()}
    path.write_bytes(save(contiguous, metadata=metadata))


def write_sentence_transformers_files(folder: Path, hidden_size: int, max_length: int) -> None:
    library = "sentence_transformers.base.modules.transformer.Transformer"
    modules = [("", library), (POOLING_FOLDER, "attention_pooling.AttentionPooling")]
    contents = {
        "modules.json": [
            {"idx": number, "name": str(number), "path": path, "type": type}
            for number, (path, type) in enumerate(modules)
        ],
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "similarity_fn_name": "cosine",
            "requirements": {"sentence-transformers": ">=6.0"},
        },
        # Our pooling reads padded batches. By default the library gives them up for flash attention.
        "sentence_bert_config.json": {"max_seq_length": max_length, "unpad_inputs": False},
        f"{POOLING_FOLDER}/config.json": {"hidden_size": hidden_size},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(ROOT / "attention_pooling.py", folder / "attention_pooling.py")


def model_card(
    model: MultitaskBERT, checkpoint: Mapping[str, Any], name: str, max_length: int
) -> str:
    """Return the text of the folder's README.md. It names only paths relative to the checkout."""
    from huggingface_hub import ModelCardData

    options = checkpoint["options"]
    titles = [task.title for task in model.tasks.values()]
    tasks = ", ".join([*titles[:-2], " and ".join(titles[-2:])])
    base = None if options.get("init_from") else hub_id(options["bert_model"])
    front = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "bert", *titles],
        base_model=base,
    )
    by_cosine = [t for t in model.tasks.values() if t.is_pair and not t.classes]
    card = CARD.format(
        title=f"BERT for {tasks}",
        tasks=tasks,
        origin=f", from `{base}`" if base else "",
        heads="`heads.*`, `joint_heads.*`" if model.joint_heads else "`heads.*`",
        similarity="\n".join(map(about_cosine, by_cosine)) or UNTRAINED,
        about=ABOUT_REAL_DATA if set(model.tasks) <= set(TASKS) else "",
        scores="\n".join(score_rows(checkpoint)),
        epoch=checkpoint["epoch"],
        smoketest=" --smoketest  # 32 rows of each file" if options["smoketest"] else "",
        checkpoint=f"models/{name}",
        data_dir="DATA" if Path(options["data_dir"]).is_absolute() else options["data_dir"],
        max_length=max_length,
    )
    return f"---\n{front.to_yaml()}\n---\n{card}"


def score_rows(checkpoint: Mapping[str, Any]) -> Iterator[str]:
    for name, metrics in checkpoint["dev_scores"].items():
        paths = map(Path, checkpoint["options"][f"{name}_train"])
        files = ", ".join(f"`{path.name if path.is_absolute() else path}`" for path in paths)
        title = checkpoint["options"]["tasks"][name].title
        for metric, value in metrics.items():
            yield f"| {title} | {files} | {metric} | {value:.4f} |"


def hub_id(bert_model: str) -> str | None:
    """Return the Hub's name of the model that training started from; None for one in a folder."""
    if bert_model == MINILM:
        return "sentence-transformers/all-MiniLM-L6-v2"
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", bert_model) and not Path(bert_model).exists()
    return bert_model if is_id else None
