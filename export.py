"""A checkpoint as a folder that other libraries open."""

import argparse
import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from datasets import checked_max_length
from multitask_classifier import MultitaskBERT, load_checkpoint
from tasks import TASKS
from utils import MINILM, ROOT, UserError

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
`transformers` runs no code from here.

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

- It has seen English only. What is longer than {max_length} word pieces is cut.
- The epoch was chosen by its scores on the same dev files, which flatters them a little.
- Of the real data, sentiment is of film reviews, paraphrase of questions, similarity of captions,
  headlines and forum posts. How it does on other text has not been measured, nor has any bias.

## Licence

Apache 2.0, for weights and code. The training data have terms of their own.
"""
SCORED_BY_COSINE = """\
The cosine of two vectors, times 5, is the similarity for which the scores below were measured."""
NOT_BY_COSINE = """\
**The cosine of two vectors is not the similarity for which the scores below were measured**: {why}"""
WHY_NOT = {
    "cross": "that comes from a head on both sentences in one sequence (`joint_heads.sts`).",
    "both": "that is the mean of 5 times the cosine and what a head says of both sentences in one "
    "sequence (`joint_heads.sts`).",
}


def export(checkpoint_path: str, directory: str) -> None:
    """Write the model as a folder for `transformers` and `sentence-transformers`, all or nothing.

    Raises:
        UserError: the folder is there and not empty, or the model is none that these can compute.
    """
    with new_folder(Path(directory)) as folder:
        model, tokenizer, checkpoint = load_checkpoint(checkpoint_path)
        options = checkpoint["options"]
        for flag, used in (
            ("additional_input", checkpoint.get("tags")),
            ("moe", options.get("moe")),
        ):
            if used:
                raise UserError(
                    f"{checkpoint_path}: was trained with --{flag}, which transformers' BERT does "
                    "not have, so it cannot be exported"
                )
        asked = argparse.Namespace(max_length=options["max_length"])
        config = model.bert.config
        tokenizer.max_length = checked_max_length(asked, checkpoint_path, config, tokenizer)
        model.bert.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_heads(model, folder)
        write_sentence_transformers_files(model, folder, tokenizer.max_length)
        card = model_card(model, checkpoint, Path(checkpoint_path).name, tokenizer.max_length)
        (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"exported {checkpoint_path} to {directory}")


@contextlib.contextmanager
def new_folder(path: Path):
    """Yield an empty folder, which takes the name `path` when all has gone well. UserError: that is
    there and not empty, or cannot be written."""
    try:
        if path.is_symlink() or path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(f"{path}: is there already, and is no empty folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
            whole = Path(temporary) / "whole"  # which, unlike the temporary one, others may read
            whole.mkdir()
            yield whole
            os.replace(whole, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def write_heads(model: MultitaskBERT, folder: Path) -> None:
    from safetensors.torch import save

    weights = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith("bert.")
    }
    (folder / "heads.safetensors").write_bytes(save(weights, metadata=model.encodings))
    pooling = folder / POOLING_FOLDER
    pooling.mkdir()
    weights = {name: each.contiguous() for name, each in model.attention_layer.state_dict().items()}
    (pooling / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))


def write_sentence_transformers_files(model: MultitaskBERT, folder: Path, max_length: int) -> None:
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
        # Our pooling reads padded batches, which the library else gives up for flash attention.
        "sentence_bert_config.json": {"max_seq_length": max_length, "unpad_inputs": False},
        f"{POOLING_FOLDER}/config.json": {"hidden_size": model.bert.config.hidden_size},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(ROOT / "attention_pooling.py", folder / "attention_pooling.py")


def model_card(model: MultitaskBERT, checkpoint: dict, name: str, max_length: int) -> str:
    """The text of the folder's README.md. Of paths, only those relative to the checkout are named."""
    from huggingface_hub import ModelCardData

    options, encoding = checkpoint["options"], model.encodings["sts"]
    titles = [TASKS[name].title for name in options["tasks"]]
    base = hub_id(options["bert_model"])
    front = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "bert", *titles],
        base_model=base,
    )
    tasks = [*titles[:-2], " and ".join(titles[-2:])]
    heads = ["heads"] + ["joint_heads"] * bool(model.joint_heads)
    similarity = (
        NOT_BY_COSINE.format(why=WHY_NOT[encoding]) if encoding != "bi" else SCORED_BY_COSINE
    )
    if "sts" not in options["tasks"]:
        similarity = NOT_BY_COSINE.format(why="this model was not trained on similarity.")
    card = CARD.format(
        title=f"BERT for {', '.join(tasks)}",
        tasks=", ".join(tasks),
        origin=f", from `{base}`" if base else "",
        heads=", ".join(f"`{each}.*`" for each in heads),
        similarity=similarity,
        scores="\n".join(score_rows(checkpoint)),
        epoch=checkpoint["epoch"],
        smoketest=" --smoketest  # 32 rows of each file" * options["smoketest"],
        checkpoint=f"models/{name}",
        data_dir="DATA" if Path(options["data_dir"]).is_absolute() else options["data_dir"],
        max_length=max_length,
    )
    return f"---\n{front.to_yaml()}\n---\n{card}"


def score_rows(checkpoint: dict) -> Iterator[str]:
    for name, metrics in checkpoint["dev_scores"].items():
        path = Path(checkpoint["options"][f"{name}_train"])
        file = path.name if path.is_absolute() else path
        for metric, value in metrics.items():
            yield f"| {TASKS[name].title} | `{file}` | {metric} | {value:.4f} |"


def hub_id(bert_model: str) -> str | None:
    """Of the model that the training began with; None for one in a folder."""
    if bert_model == MINILM:
        return "sentence-transformers/all-MiniLM-L6-v2"
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", bert_model) and not Path(bert_model).exists()
    return bert_model if is_id else None
