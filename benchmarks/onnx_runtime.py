"""Compare the exported model and its ONNX graphs with this project on a CPU: rows/s and scores.

    python benchmarks/onnx_runtime.py --checkpoint models/RUN.pt --data_dir data

All answer the dev rows of all tasks, sorted by length, in batches of 64. Ours reads them packed; the
others read them padded to the longest of a batch. In int8, weights are quantized beforehand and
activations in each call. Tokenizing and loading are not measured. They take turns. Tasks whose pairs are
read in one sequence are left out.
"""

import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as predict.py does

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
import torch  # noqa: E402
from measuring import ROOT, in_turns, new_parser, print_table  # noqa: E402
from onnxruntime.quantization import quantize_dynamic  # noqa: E402
from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from transformers import AutoModel  # noqa: E402

sys.path.insert(0, str(ROOT))

from batches import Batch, evaluation_batches  # noqa: E402
from checkpoint import options_to_evaluate  # noqa: E402
from datasets import TaskDataset, load_data  # noqa: E402
from evaluation import score  # noqa: E402
from export import export  # noqa: E402
from multitask_classifier import load_trained  # noqa: E402

BATCH_SIZE = 64
Answer = Callable[[TaskDataset, Batch], torch.Tensor]  # -> outputs of the batch's rows


def padded(dataset: TaskDataset, rows: np.ndarray) -> Iterator[dict[str, torch.Tensor]]:
    """Yield what a tokenizer gives for each sentence column of these rows."""
    for column in dataset.columns:
        ids = [torch.from_numpy(column.row(row)[0]).long() for row in rows]
        mask = pad_sequence([torch.ones_like(sentence) for sentence in ids], batch_first=True)
        yield {"input_ids": pad_sequence(ids, batch_first=True), "attention_mask": mask}


def transformers_answer(folder: str) -> Answer:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)

    def answer(dataset: TaskDataset, batch: Batch) -> torch.Tensor:
        first, *second = padded(dataset, batch.rows[dataset.task.name])
        return model(**first, **({"second": second[0]} if second else {}))[dataset.task.name]

    return answer


def onnx_answer(path: str) -> Answer:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options)
    names = {node.name for node in session.get_inputs()}

    def answer(dataset: TaskDataset, batch: Batch) -> torch.Tensor:
        first, *others = padded(dataset, batch.rows[dataset.task.name])
        # An empty sentence has [CLS] and [SEP], which stand at the ends of others.
        empty = {
            "input_ids": first["input_ids"][:, :2],
            "attention_mask": first["attention_mask"][:, :2],
        }
        second = {f"second_{name}": ids for name, ids in [*others, empty][0].items()}
        inputs = {name: ids.numpy() for name, ids in (first | second).items() if name in names}
        return torch.from_numpy(session.run([dataset.task.name], inputs)[0])

    return answer


@torch.no_grad()
def answer_all(answer: Answer, dataset: TaskDataset) -> torch.Tensor:
    """Return the outputs for all rows, in the dataset's order."""
    batches = list(evaluation_batches(dataset, BATCH_SIZE))
    outputs = torch.cat([answer(dataset, batch) for batch in batches])
    rows = np.concatenate([batch.rows[dataset.task.name] for batch in batches])
    return outputs[torch.from_numpy(np.argsort(rows))]


def make_contenders(checkpoint: str, model: torch.nn.Module, parent: str) -> dict[str, Answer]:
    folder = Path(parent, "exported")
    export(checkpoint, str(folder), "onnx")
    full, small = str(folder / "model.onnx"), str(Path(parent, "int8.onnx"))
    # Without this, the weights are behind transpositions, and are left in float32.
    quant_pre_process(full, small, skip_symbolic_shape=True)
    quantize_dynamic(small, small)
    sizes = (f"{Path(path).stat().st_size / 1e6:.0f} MB" for path in (full, small))
    print("float32 {}, int8 {}".format(*sizes))
    return {
        "this project": lambda dataset, batch: model(batch)[dataset.task.name],
        "transformers, exported": transformers_answer(str(folder)),
        "ONNX Runtime, float32": onnx_answer(full),
        "ONNX Runtime, int8": onnx_answer(small),
    }


def first_score(dataset: TaskDataset, outputs: torch.Tensor) -> float:
    predictions = dataset.task.decode(outputs).numpy()
    return next(iter(score(dataset.task, dataset.labels, predictions).values()))


def main() -> None:
    parser = new_parser(__doc__ or "", steps=3)
    parser.add_argument("--checkpoint", required=True, metavar="PT")
    parser.add_argument("--rows", type=int, default=1000, help="of each task; default: 1000")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # the quantizer advises preprocessing, done or not
    options = options_to_evaluate(["--data_dir", args.data_dir], [args.checkpoint])
    model, tokenizer, _, _, options = load_trained(args.checkpoint, options)
    dev = load_data(options, tokenizer, options.max_length, ("dev",))["dev"].values()
    datasets = [dataset.sample(args.rows) for dataset in dev if dataset.task.encoding == "bi"]
    table = []
    with tempfile.TemporaryDirectory() as parent:
        contenders = make_contenders(args.checkpoint, model.eval(), parent)
        for dataset in datasets:
            scores, times = {}, {name: [] for name in contenders}
            for turn in range(args.steps):
                for name in in_turns(contenders, turn):
                    start = time.perf_counter()
                    outputs = answer_all(contenders[name], dataset)
                    times[name].append(time.perf_counter() - start)
                    scores[name] = first_score(dataset, outputs)
            for name, taken in times.items():
                speed = len(dataset) / statistics.median(taken)
                table.append([dataset.task.title, name, f"{speed:.0f}", f"{scores[name]:.4f}"])
    print(f"{torch.get_num_threads()} threads, median of {args.steps} turns")
    print_table(["task", "by", "rows/s", "score"], table)


if __name__ == "__main__":
    main()
