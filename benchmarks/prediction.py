"""Lines a second of predict.py, beside a pipeline of `transformers` with the same encoder and heads.

    python benchmarks/prediction.py --data_dir data

10,000 lines, sentences and pairs in no order, from the dev and test files, repeated. Both read the same
file and give each line its answers as JSON, and take turns. predict.py works as it does when it is
called, its model loaded. The peer is what many would write: the feature-extraction pipeline in batches
of as many, in the order of the lines, the mean of what it gives for each sentence (padding of its batch
too, which spares it a mask), then our heads in batches. The limit is that of throughput.py: the
arithmetic of the real tokens over the rate at which this machine multiplies matrices meanwhile.
"""

import argparse
import csv
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as predict.py does

import torch  # noqa: E402
import transformers  # noqa: E402
from throughput import ROOT, MatrixRate, encoder_flops, mc  # noqa: E402
from throughput import seconds as timed  # noqa: E402

import predict  # noqa: E402
from checkpoint import checkpoint_content, write_checkpoint
from export import export
from options import parse_options
from tasks import TASKS
from utils import autocast, seed_everything

MATRIX_TOKENS = 6000


def mixed_lines(data_dir: str, n_lines: int) -> list[str]:
    """Of all three tasks as many, if there is enough of each."""
    lines = []
    for task in TASKS.values():
        rows = []
        for split in ("dev", "test"):
            with open(Path(data_dir, task.filename(split)), newline="", encoding="utf-8") as file:
                rows += csv.DictReader(file, delimiter="\t")
        rows = [[row[name].replace("\n", " ") for name in task.sentence_columns] for row in rows]
        random.shuffle(rows)
        lines += ["\t".join(row) for row in rows[: n_lines // len(TASKS) + 1]]
    random.shuffle(lines)
    return (lines * (n_lines // len(lines) + 1))[:n_lines]


def make_checkpoint(args, path: Path) -> None:
    """The pretrained encoder and new heads: how long they take does not hang on what they know."""
    options = parse_options(["--bert_model", args.bert_model])
    model, tokenizer, _, _ = mc.load_model(options, None, None)
    write_checkpoint(path, checkpoint_content(model, tokenizer, options, 0, {}))


class Ours:
    def __init__(self, checkpoint: Path, args):
        self.predictor = predict.Predictor(str(checkpoint), predict.parse(args.predict_flags))

    def __call__(self, path: Path) -> list[str]:
        found = []
        with open(path, "rb") as file:
            for queries in predict.queries_of_lines(file.fileno(), str(path)):
                answers = predict.answer(self.predictor, queries, predict.Remarks())
                found += [predict.json_line(*each) for each in zip(queries, answers)]
        return found


class Peer:
    def __init__(self, checkpoint: Path, args):
        folder = str(checkpoint.with_suffix(""))
        export(str(checkpoint), folder)
        self.heads = mc.load_checkpoint(checkpoint)[0].eval().to(args.device).heads
        self.batch_size, self.device, self.precision = args.batch_size, args.device, args.precision
        self.extract = transformers.pipeline(
            "feature-extraction",
            model=folder,
            tokenizer=folder,
            device=args.device,
            batch_size=args.batch_size,
        )

    @torch.no_grad()
    def __call__(self, path: Path) -> list[str]:
        lines = path.read_text(encoding="utf-8").split("\n")
        parts = [line.split("\t") for line in lines]
        with autocast(self.device, self.precision):
            states = self.extract(sum(parts, []), return_tensors=True, truncation=True)
        vectors = iter([each[0].float().mean(dim=0) for each in states])
        grouped = {1: [], 2: []}
        for number, sentences in enumerate(parts, start=1):
            grouped[len(sentences)].append((number, [next(vectors) for _ in sentences]))
        found = {}
        for group in grouped.values():
            for start in range(0, len(group), self.batch_size):
                numbers, rows = zip(*group[start : start + self.batch_size])
                found |= zip(numbers, self.answers([torch.stack(each) for each in zip(*rows)]))
        return [json.dumps({"line": number} | found[number]) for number in sorted(found)]

    def answers(self, columns: list[torch.Tensor]) -> list[dict]:
        columns = [column.to(self.device) for column in columns]
        if len(columns) == 1:
            shares = self.heads["sst"](*columns).softmax(dim=-1)
            keys = "sentiment", "sentiment_probabilities"
            values = shares.argmax(dim=-1).tolist(), shares.tolist()
        else:
            paraphrase = self.heads["para"](*columns).softmax(dim=-1)[:, 1]
            keys = "paraphrase", "similarity"
            values = paraphrase.tolist(), self.heads["sts"](*columns).clamp(0, 5).tolist()
        return [dict(zip(keys, row)) for row in zip(*values)]


def seconds(contender, path: Path, n_lines: int) -> float:
    start = time.perf_counter()
    answers = contender(path)
    taken = time.perf_counter() - start
    assert len(answers) == n_lines and "error" not in "".join(answers)
    return taken


class Limit:
    def __init__(self, predictor: predict.Predictor, path: Path, args):
        sentences = sum((line.split("\t") for line in path.read_text("utf-8").split("\n")), [])
        _, lengths = predictor.tokenizer.packed_ids(sentences, predictor.max_length)
        config, self.device = predictor.model.bert.config, args.device
        self.flops = encoder_flops(config, lengths.tolist(), training=False)
        self.rate = MatrixRate(config, MATRIX_TOKENS, args.device, args.precision)

    def seconds(self) -> float:
        return self.flops / self.rate.flops * timed(self.rate, self.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--data_dir", default=str(ROOT / "data" / "sample"), help="default: the sample data")
    flag("--bert_model", default="minilm", help="default: minilm")
    flag("--lines", type=int, default=10_000, help="default: 10000")
    flag("--rounds", type=int, default=3, help="default: 3")
    flag("--batch_size", type=int, default=64, help="of both; default: 64")
    flag("--use_gpu", action="store_true")
    flag("--precision", choices=["float32", "bfloat16"], default="float32", help="of both")
    args = parser.parse_args()
    seed_everything(0)
    args.device = torch.device("cuda" if args.use_gpu else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, path = Path(folder, "model.pt"), Path(folder, "lines.txt")
        make_checkpoint(args, checkpoint)
        path.write_text("\n".join(mixed_lines(args.data_dir, args.lines)), encoding="utf-8")
        args.predict_flags = ["--checkpoint", str(checkpoint), "--batch_size", str(args.batch_size)]
        args.predict_flags += ["--precision", args.precision] + ["--use_gpu"] * args.use_gpu
        contenders = {
            "this project": Ours(checkpoint, args),
            "transformers": Peer(checkpoint, args),
        }
        limit = Limit(contenders["this project"].predictor, path, args)
        limit.seconds()  # warm-up
        times = {name: [] for name in (*contenders, "limit")}
        for number in range(args.rounds):
            for name in list(contenders)[:: 1 if number % 2 else -1]:
                times[name].append(seconds(contenders[name], path, args.lines))
                times["limit"].append(limit.seconds())
    medians = {name: statistics.median(each) for name, each in times.items()}
    print(
        f"{args.lines} lines, {args.device}, {args.precision}, {torch.get_num_threads()} threads, "
        f"{args.rounds} rounds"
    )
    print("| | lines/s | / transformers | share of limit |")
    print("| --- | --- | --- | --- |")
    for name, median in medians.items():
        share = medians["transformers"] / median
        reached = f"{medians['limit'] / median:.0%}"
        print(f"| {name} | {args.lines / median:.0f} | {share:.2f} | {reached} |")


if __name__ == "__main__":
    main()
