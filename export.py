"""Export a checkpoint as a folder that other libraries open."""

import contextlib
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from datasets import checked_max_length
from multitask_classifier import MultitaskBERT, load_checkpoint
from pretrained import MINILM
from tasks import TASKS, Task
from utils import ROOT, UserError, errors_of_writing

CODE = "modeling_multitask.py", "heads.py"  # run in exported folders
FORMATS = "pytorch", "onnx"
CARD = """
# {title}

A BERT fine-tuned on {tasks} at once{origin}.

Exported by Multitask BERT's `predict.py`. This folder holds the tokenizer and the whole model: encoder
(`bert.*` in `model.safetensors`), attention pooling (`attention_layer.*`) and the heads ({heads}).

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True)

def read(*texts):
    return tokenizer(*texts, padding=True, truncation=True, return_tensors="pt")

first, second = read(["How old are you?"]), read(["What is your age?"])
print(model(**first))  # tasks for one sentence
print(model(**first, second=second))  # tasks for pairs too
```

The outputs are `sentence_embedding` and, by the name of the task, logits or numbers. A pair in one
sequence is answered only by tasks with the encoding "cross", and a bit faster. `config.json`
names the classes.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER", trust_remote_code=True)
vectors = model.encode(["How old are you?", "What is your age?"])
print(model.similarity(vectors, vectors))
```

`trust_remote_code=True` lets `transformers` and `sentence-transformers` (6.0 or newer) run this folder's
`modeling_multitask.py` and `heads.py`. The files are short; read them first. Without it,
`AutoModel.from_pretrained("FOLDER")` runs no code from this folder and gives the encoder alone; it
reports the other weights as unexpected.

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

- {language} Text is cut after {max_length} word pieces.
- The epoch was chosen by its scores on the same dev files, so they are a little too high.
- Scores on other text than that of the dev files, and bias, have not been measured.{about}

## Licence

{licence} The training data have their own terms.
"""
# The models whose licence we know, by their names on the Hub.
APACHE = ["sentence-transformers/all-MiniLM-L6-v2", "bert-base-uncased"]
ABOUT_REAL_DATA = """ In the
  real data, sentiment is about film reviews, paraphrase about questions, and similarity about captions,
  headlines and forum posts."""
UNKNOWN_LANGUAGE = "It knows the languages of its encoder and of its training data only."
UNKNOWN_LICENCE = """\
The code is under Apache 2.0. The weights come from an encoder that has terms of its own."""
SCORED_BY_COSINE = """\
The {title} that was scored below is the cosine of two vectors, on the scale of its labels ({scale})."""
NOT_BY_COSINE = """\
**The cosine of two vectors is not the {title} for which the scores below were measured**: {why}"""
UNTRAINED = """\
**The cosine of two vectors was not trained**: this model has no task of how similar two sentences are."""
ONNX_USE = """
`model.onnx` is the same model for ONNX Runtime. All tasks answer at once; to ask only those for one
sentence, give empty second sentences.
"""
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


def export(checkpoint_path: str, directory: str, format: str = "pytorch") -> None:
    """Write the model as a folder for `transformers` and `sentence-transformers`, all or nothing. The
    format "onnx" adds `model.onnx`.

    Raises:
        UserError: the folder is there and not empty, or these libraries cannot compute the model.
    """
    with new_folder(Path(directory)) as folder:
        model, tokenizer, content = load_checkpoint(checkpoint_path)
        for flag in ("additional_input", "moe"):
            if content["options"].get(flag):
                raise UserError(
                    f"{checkpoint_path}: was trained with --{flag}, which transformers' BERT does not "
                    "have, so it cannot be exported"
                )
        asked = content["options"]["max_length"]
        max_length = checked_max_length(asked, checkpoint_path, model.bert.config, tokenizer)
        tokenizer.max_length = max_length
        tokenizer.save_pretrained(str(folder))
        write_model(model, folder, max_length)
        write_sentence_transformers_files(folder, max_length)
        if format == "onnx":
            write_onnx(model, folder)
        card = model_card(model, content, Path(checkpoint_path).name, max_length)
        card += ONNX_USE if format == "onnx" else ""
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


def write_model(model: MultitaskBERT, folder: Path, max_length: int) -> None:
    """Write weights, settings and code of the whole model."""
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    fields = "title", "is_pair", "symmetric", "encoding", "classes", "num_classes", "range"
    tasks = {
        name: {field: getattr(task, field) for field in fields}
        for name, task in model.tasks.items()
    }
    config = json.loads(model.bert.config.to_json())
    config["auto_map"] = {"AutoModel": "modeling_multitask.MultitaskBERT"}
    config["multitask"] = {"max_length": max_length, "tasks": tasks}
    write_json(folder / "config.json", config)
    for name in CODE:
        text = (ROOT / name).read_text(encoding="utf-8")
        # `transformers` takes only relative imports from the same folder.
        text = text.replace("\nfrom heads import", "\nfrom .heads import")
        (folder / name).write_text(text, encoding="utf-8")


def write_sentence_transformers_files(folder: Path, max_length: int) -> None:
    library = "sentence_transformers.base.modules.transformer.Transformer"
    contents: dict[str, Any] = {
        "modules.json": [{"idx": 0, "name": "0", "path": "", "type": library}],
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "similarity_fn_name": "cosine",
            "requirements": {"sentence-transformers": ">=6.0"},
        },
        "sentence_bert_config.json": {
            "max_seq_length": max_length,
            "modality_config": {"text": {"method": "embed", "method_output_name": None}},
            "module_output_name": "sentence_embedding",
            # Our pooling reads padded batches. By default the library gives them up for flash attention.
            "unpad_inputs": False,
        },
    }
    for name, content in contents.items():
        write_json(folder / name, content)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_onnx(model: MultitaskBERT, folder: Path) -> None:
    """Write encoder, pooling and heads as one graph, for any number of rows and word pieces. If a task
    has pairs, its inputs are both sentences. Raises UserError if a library is missing."""
    try:
        import onnxscript  # noqa: F401
        from transformers import BertConfig

        from modeling_multitask import MultitaskBERT as Exported
    except ImportError as error:
        need = "pip install transformers onnx onnxscript"
        raise UserError(f"--format onnx: {error.name} is not installed; {need}") from error

    exported = Exported(BertConfig.from_pretrained(folder)).eval()
    exported.load_state_dict(model.state_dict())
    names = ["input_ids", "attention_mask"]
    inputs: dict[str, Any] = {name: torch.ones(2, 7, dtype=torch.long) for name in names}
    axes: dict[str, Any] = dict.fromkeys(names, {0: "rows", 1: "pieces"})
    if any(task.is_pair for task in model.tasks.values()):
        inputs["second"] = {name: torch.ones(2, 5, dtype=torch.long) for name in names}
        axes["second"] = dict.fromkeys(names, {0: "rows", 1: "second_pieces"})
        names += [f"second_{name}" for name in names]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):  # about its own insides
        torch.onnx.export(
            exported,
            kwargs=inputs,
            f=str(folder / "model.onnx"),
            input_names=names,
            output_names=["sentence_embedding", *model.tasks],
            dynamic_shapes=axes,
            external_data=False,
            verbose=False,
        )


def model_card(
    model: MultitaskBERT, checkpoint: Mapping[str, Any], name: str, max_length: int
) -> str:
    """Return the text of the folder's README.md. It names only paths relative to the checkout."""
    from huggingface_hub import ModelCardData

    options = checkpoint["options"]
    titles = [task.title for task in model.tasks.values()]
    tasks = ", ".join([*titles[:-2], " and ".join(titles[-2:])])
    base = None if options.get("init_from") else hub_id(options["bert_model"])
    is_english, is_apache = set(model.tasks) <= set(TASKS), base in APACHE
    front = ModelCardData(
        language="en" if is_english else None,
        license="apache-2.0" if is_apache else None,
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
        language="It was trained on English only." if is_english else UNKNOWN_LANGUAGE,
        about=ABOUT_REAL_DATA if is_english else "",
        licence="Apache 2.0, for weights and code." if is_apache else UNKNOWN_LICENCE,
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
        return APACHE[0]
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", bert_model) and not Path(bert_model).exists()
    return bert_model if is_id else None
