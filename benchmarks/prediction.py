"""Compare predict.py with a pipeline of `transformers` that has the same encoder and heads: lines/s.

    python benchmarks/prediction.py --data_dir data

The input is 10,000 lines, sentences and pairs mixed, from the dev and test files, repeated if
necessary. Both read the same file and return the answers of each line as JSON; they take turns.
predict.py works as it does from the shell, with its model loaded already. The peer is what many would
write: the feature-extraction pipeline with the same batch size, in the order of the lines; the mean of
its output for each sentence (with the padding of its batch, so that it needs no mask); then our heads
in batches. Three models as one are three times the same checkpoint, which takes as long as three
others. The limit is that of throughput.py: the arithmetic of the real tokens divided by the
matrix-multiply rate of this machine, measured in the same run.
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
from measuring import in_turns, print_table  # noqa: E402
from throughput import ROOT, MatrixRate, encoder_flops, mc  # noqa: E402
from throughput import seconds as timed  # noqa: E402

import predict  # noqa: E402
from checkpoint import checkpoint_content, write_checkpoint  # noqa: E402
from export import export  # noqa: E402
from options import parse_options  # noqa: E402
from tasks import TASKS  # noqa: E402
from utils import autocast, flush_denormals, seed_everything  # noqa: E402

OURS, THREE, PEER, LIMIT = "this project", "three models as one", "transformers", "limit"
MATRIX_TOKENS = 6000


def mixed_lines(data_dir: str, n_lines: int) -> list[str]:
    """Draw as many lines from each task, if its files have enough; repeat them if not."""
    lines: list[str] = []
    for task in TASKS.values():
        rows: list[dict[str, str]] = []
        for split in ("dev", "test"):
            for name in getattr(task, split):
                with open(Path(data_dir, name), newline="", encoding="utf-8") as file:
                    rows += csv.DictReader(file, delimiter="\t")
        random.shuffle(rows)
        for row in rows[: n_lines // len(TASKS) + 1]:
            lines.append("\t".join(row[name].replace("\n", " ") for name in task.sentences))
    random.shuffle(lines)
    return (lines * (n_lines // len(lines) + 1))[:n_lines]


def make_checkpoint(args: argparse.Namespace, path: Path) -> None:
    """Save the pretrained encoder with new heads. Training would not change how long they take."""
    options = parse_options(["--bert_model", args.bert_model])
    start, tokenizer, _ = mc.load_start(options)
    model = mc.new_model(start, options)
    write_checkpoint(path, checkpoint_content(model, tokenizer, options, 0, {}))


class Ours:
    """predict.py as it is, with one model or several as one."""

    def __init__(self, checkpoints: list[Path], args: argparse.Namespace):
        self.predictor = predict.Predictor(
            checkpoints,
            use_gpu=args.use_gpu,
            precision=args.precision,
            batch_size=args.batch_size,
        )

    def __call__(self, path: Path) -> list[str]:
        found: list[str] = []
        with open(path, "rb") as file:
            for queries in predict.read_queries(file.fileno(), str(path)):
                answers = predict.answer_queries(self.predictor, queries, predict.Remarks())
                found += map(predict.to_json_line, queries, answers)
        return found


class Peer:
    """The pipeline of `transformers`, then our heads."""

    def __init__(self, checkpoint: Path, args: argparse.Namespace):
        folder = str(checkpoint.with_suffix(""))
        export(str(checkpoint), folder)
        self.heads = mc.load_checkpoint(checkpoint).model.eval().to(args.device).heads
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
        lines = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n")]
        with autocast(self.device, self.precision):
            states = self.extract(sum(lines, []), return_tensors=True, truncation=True)
        vectors = iter([state[0].float().mean(dim=0) for state in states])
        # Number of sentences -> (line number, their vectors)
        grouped: dict[int, list[tuple[int, list[torch.Tensor]]]] = {1: [], 2: []}
        for number, sentences in enumerate(lines, start=1):
            grouped[len(sentences)].append((number, [next(vectors) for _ in sentences]))
        found: dict[int, dict] = {}
        for group in grouped.values():
            for start in range(0, len(group), self.batch_size):
                numbers, rows = zip(*group[start : start + self.batch_size], strict=True)
                columns = [torch.stack(column) for column in zip(*rows, strict=True)]
                found |= zip(numbers, self.answers(columns), strict=True)
        return [json.dumps({"line": number} | found[number]) for number in sorted(found)]

    def answers(self, columns: list[torch.Tensor]) -> list[dict]:
        """Answer sentences, or pairs, from their vectors: one or two columns [B, D]."""
        columns = [column.to(self.device) for column in columns]
        keys: tuple[str, str]
        values: tuple[list, list]
        if len(columns) == 1:
            shares = self.heads["sst"](*columns).softmax(dim=-1)
            keys = "sentiment", "sentiment_probabilities"
            values = shares.argmax(dim=-1).tolist(), shares.tolist()
        else:
            paraphrase = self.heads["para"](*columns).softmax(dim=-1)[:, 1]
            keys = "paraphrase", "similarity"
            values = paraphrase.tolist(), self.heads["sts"](*columns).clamp(0, 5).tolist()
        return [dict(zip(keys, row, strict=True)) for row in zip(*values, strict=True)]


def seconds(contender: Ours | Peer, path: Path, n_lines: int) -> float:
    start = time.perf_counter()
    answers = contender(path)
    taken = time.perf_counter() - start
    assert len(answers) == n_lines and "error" not in "".join(answers)
    return taken


class Limit:
    """The time that the encoder's arithmetic takes at the matrix-multiply rate of this machine."""

    def __init__(self, predictor: predict.Predictor, path: Path, args: argparse.Namespace):
        sentences = path.read_text("utf-8").replace("\t", "\n").split("\n")
        (member,) = predictor.members
        _, lengths = member.tokenizer.packed_ids(sentences, member.max_length)
        config, self.device = member.model.bert.config, args.device
        self.flops = encoder_flops(config, lengths.tolist(), training=False)
        self.rate = MatrixRate(config, MATRIX_TOKENS, args.device, args.precision)

    def seconds(self) -> float:
        return self.flops / self.rate.flops * timed(self.rate, self.device)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flag = parser.add_argument
    flag("--data_dir", default=str(ROOT / "data" / "sample"), help="default: the sample data")
    flag("--bert_model", default="minilm", help="default: minilm")
    flag("--lines", type=int, default=10_000, help="default: 10000")
    flag("--rounds", type=int, default=3, help="default: 3")
    flag("--batch_size", type=int, default=64, help="of both; default: 64")
    flag("--use_gpu", action="store_true")
    flag("--precision", choices=["float32", "bfloat16"], default="float32", help="of both")
    args = parser.parse_args()
    args.device = torch.device("cuda" if args.use_gpu else "cpu")
    return args


def measure(args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Return the seconds of each round: of ours, of the peer, and of the limit."""
    checkpoint, path = folder / "model.pt", folder / "lines.txt"
    make_checkpoint(args, checkpoint)
    path.write_text("\n".join(mixed_lines(args.data_dir, args.lines)), encoding="utf-8")
    ours = Ours([checkpoint], args)
    contenders: dict[str, Ours | Peer] = {OURS: ours, THREE: Ours([checkpoint] * 3, args)}
    contenders[PEER] = Peer(checkpoint, args)
    limit = Limit(ours.predictor, path, args)
    limit.seconds()  # warm-up
    times: dict[str, list[float]] = {name: [] for name in (*contenders, LIMIT)}
    for number in range(args.rounds):
        for name in in_turns(contenders, number):
            times[name].append(seconds(contenders[name], path, args.lines))
            times[LIMIT].append(limit.seconds())
    return times


def main() -> None:
    args = parse_args()
    flush_denormals()  # as all programs do
    seed_everything(0)
    with tempfile.TemporaryDirectory() as folder:
        times = measure(args, Path(folder))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    print(
        f"{args.lines} lines, {args.device}, {args.precision}, {torch.get_num_threads()} threads, "
        f"{args.rounds} rounds"
    )
    rows = [
        [
            name,
            f"{args.lines / median:.0f}",
            f"{medians[PEER] / median:.2f}",
            f"{median / medians[OURS]:.2f}",
            f"{medians[LIMIT] / median:.0%}",
        ]
        for name, median in medians.items()
    ]
    print_table(["", "lines/s", "/ transformers", "time / one model", "share of limit"], rows)


if __name__ == "__main__":
    main()
