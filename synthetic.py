"""Synthetic sentiment data: sentences for each label, checked against the real ones and each other.

python synthetic.py --generator small --num_samples 5000 --output data/ids-sst-train-syn1.csv
python synthetic.py --generator gpt2 --model gpt2-medium --num_samples 100000 --output OUT.csv
python synthetic.py --generator openai --model gpt-4 --num_samples 500 --output OUT.csv

The CSV is one for `multitask_classifier.py --sst_train`.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from base_bert import BertConfig
from bert import BertLayer, BertSelfAttention, Sequences
from datasets import TASKS, Example, read_examples
from multitask_classifier import load_checkpoint
from optimizer import AdamW
from options import PRECISIONS, non_negative_float, positive_float, positive_int, probability, seed
from tokenizer import BertTokenizer
from utils import (
    UserError,
    atomic_write,
    autocast,
    check_writable,
    exit_status,
    hold,
    one_line,
    pick_device,
    seed_everything,
    terminate,
)

SST = TASKS["sst"]
LABELS = range(SST.num_classes)
DESCRIPTIONS = ("negative", "somewhat negative", "neutral", "somewhat positive", "positive")
NEAR = 0.8  # of all different words of two sentences, the share that both have in a near-duplicate
LIKELY = 1000  # of all word pieces, those that are looked at first for the next one
FRUITLESS_ROUNDS = 20  # without a single new sentence, after which no more come
STILL_GOING = "a run that is still going will write it; give this one another --output"

# ------------------------------------------------------------------------------- near-duplicates


def words_of(sentence: str) -> frozenset[str]:
    """What is compared: the different words, without case and punctuation."""
    return frozenset(re.findall(r"\w+", sentence.lower()))


def one_line_of(text: str) -> str:
    """Without line breaks, control characters and spaces that are too many."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())


class NearDuplicates:
    """Finds whether a sentence nearly repeats one that was added: the words that both have are at
    least `NEAR` of all that one of them has (Jaccard similarity), or both have no words at all.

    Exact, by prefix filtering (Chaudhuri et al. 2006, "A primitive operator for similarity joins"): with
    words in one fixed order, the rarest first, two such sentences share one of the first
    `n - ceil(NEAR n) + 1` of their n words.

    Args:
        corpus: sentences that tell which words are rare.
    """

    def __init__(self, corpus: list[str]):
        self.frequency = Counter(word for sentence in corpus for word in words_of(sentence))
        self.by_word = defaultdict(list)

    def __contains__(self, sentence: str) -> bool:
        words = words_of(sentence)
        candidates = {other for word in self._prefix(words) for other in self.by_word[word]}
        return any(len(words & other) >= NEAR * len(words | other) for other in candidates)

    def add(self, sentence: str) -> None:
        words = words_of(sentence)
        for word in self._prefix(words):
            self.by_word[word].append(words)

    def _prefix(self, words: frozenset[str]) -> list[str]:
        in_order = sorted(words, key=lambda word: (self.frequency[word], word)) or [""]
        return in_order[: len(in_order) - math.ceil(NEAR * len(in_order)) + 1]


# ------------------------------------------------------------------------------------ generators


class CausalSelfAttention(BertSelfAttention):
    """Each token attends to itself and those before it. What it has computed of them is kept, so that
    the next tokens can be given alone; `past` None: nothing is kept."""

    past = None

    def forward(self, hidden_states: Tensor, sequences: Sequences) -> Tensor:
        ((n_sequences, length),) = sequences.runs
        config = self.config
        query, key, value = (
            linear(hidden_states)
            .view(n_sequences, length, config.num_attention_heads, config.head_size)
            .transpose(1, 2)  # [B, H, S, K]
            for linear in (self.query, self.key, self.value)
        )
        if self.past is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(self.past, (key, value)))
            self.past = key, value
        dropout = config.attention_probs_dropout_prob if self.training else 0.0
        first = key.shape[2] == length  # else one token more, which sees all that there are
        context = F.scaled_dot_product_attention(query, key, value, None, dropout, is_causal=first)
        return context.transpose(1, 2).reshape(n_sequences * length, -1)


class CausalLM(nn.Module):
    """A small language model of word pieces: BERT's layers with a causal mask; the embedding's
    weights are the output's too."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        for layer in self.layers:
            layer.attention.self = CausalSelfAttention(config)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)

    def forward(self, ids: Tensor, start: int = 0, labels: Tensor | None = None) -> Tensor:
        """Logits [B, S, V] of the token after each one of `ids` [B, S], of which the first stands at
        position `start`. The embeddings of `labels` [B] are added to those of all tokens, since a
        label before the sentence alone is soon forgotten."""
        return self.logits(self.states(ids, start, labels))

    def logits(self, states: Tensor) -> Tensor:
        return F.linear(states, self.words.weight)  # [..., D] to [..., V]

    def states(self, ids: Tensor, start: int = 0, labels: Tensor | None = None) -> Tensor:
        """What `forward` has before the last multiplication, [B, S, D]."""
        n_sequences, length = ids.shape
        positions = torch.arange(start, start + length, device=ids.device)
        embeddings = self.words(ids) + self.positions(positions)
        if labels is not None:
            embeddings = embeddings + self.words(labels)[:, None]
        states = self.dropout(self.norm(embeddings))
        states = states.flatten(0, 1)  # [B S, D]
        sequences = Sequences.of([length] * n_sequences, ids.device)
        for layer in self.layers:
            states = layer(states, sequences)
        return states.view(n_sequences, length, -1)

    def keep_past(self, n_sequences: int | None) -> None:
        """From now on for so many sequences; None: no longer."""
        size = n_sequences, self.config.num_attention_heads, 0, self.config.head_size
        for layer in self.layers:
            keep = n_sequences is not None
            empty = self.words.weight.new_empty(size) if keep else None
            layer.attention.self.past = (empty, empty) if keep else None


def nucleus(logits: Tensor, top_p: float, temperature: float) -> Tensor:
    """Draw from the likeliest ids that together have probability `top_p` (Holtzman et al. 2020, arXiv
    1904.09751). [B, V] to [B]."""
    every = (logits / temperature).softmax(-1)
    for count in (
        LIKELY,
        every.shape[-1],
    ):  # to sort all takes most of the time, and is rarely needed
        probabilities, ids = every.topk(min(count, every.shape[-1]))
        sums = probabilities.cumsum(-1)
        if (sums[:, -1] >= top_p).all():
            break
    probabilities[sums - probabilities >= top_p] = 0
    return ids.gather(1, torch.multinomial(probabilities, 1)).squeeze(1)


class Generator:
    """What draws sentences for labels."""

    def choose(self, missing: list[int], n: int, chance: random.Random) -> list[int]:
        """The labels of a round of n: of those that are missing, and near the end a few to spare."""
        return chance.choices(missing, k=n) if len(missing) > n else (missing * 3)[:n]

    def account(self) -> dict[str, float]:
        """What has been used so far."""
        return {}


class SmallGenerator(Generator):
    """`CausalLM` on the training set: [LABEL] pieces [SEP]. Its vocabulary is the labels, the end and
    the word pieces that occur."""

    SIZE = dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
    EPOCHS, LR, BATCH = 12, 5e-4, 32
    WARM_UP = 100  # steps; without it, and at 2e-3, no more than the words' frequencies is learned

    def __init__(self, args, device: torch.device):
        self.args, self.device = args, device
        self.tokenizer = BertTokenizer.from_pretrained(
            args.model or "minilm", args.local_files_only
        )

    def fit(self, train: list[Example], dev: list[Example], folder: Path) -> None:
        """Train, or take what an interrupted run has left in `folder`."""
        self.pieces = sorted({piece for _, ids in self._pieces_of(train) for piece in ids})
        self.end = len(LABELS)
        self.number = {piece: self.end + 1 + n for n, piece in enumerate(self.pieces)}
        size = self.end + 1 + len(self.pieces)
        length = self.args.max_length + 2
        config = BertConfig(vocab_size=size, max_position_embeddings=length, **self.SIZE)
        self.model = CausalLM(config).to(self.device)
        saved = folder / "model.pt"
        if saved.exists():
            weights = torch.load(saved, map_location=self.device, weights_only=True)
            self.model.load_state_dict(weights)
            return
        self._train(train, dev)
        with atomic_write(saved) as temporary:
            torch.save(self.model.state_dict(), temporary)

    def _train(self, train, dev) -> None:
        """The epoch that models the dev set best is kept, and the first that does so worse by a tenth is
        the last; without a dev set, all are trained and the last is kept."""
        epochs = self.args.epochs or self.EPOCHS
        rows, best, weights = self._rows(train), math.inf, None
        optimizer = AdamW(self.model.parameters(), lr=self.args.lr or self.LR, weight_decay=0.05)
        warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / self.WARM_UP, 1, self.WARM_UP)
        order = np.random.default_rng(self.args.seed)
        for epoch in range(1, epochs + 1):
            self.model.train()
            chosen = order.permutation(len(rows))
            batches = [chosen[i : i + self.BATCH] for i in range(0, len(rows), self.BATCH)]
            for batch in tqdm(batches, desc=f"epoch {epoch}", unit="batch", leave=False):
                with autocast(self.device, self.args.precision):
                    loss = self._loss([rows[row] for row in batch]).mean()
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                optimizer.step()
                warm_up.step()
                optimizer.zero_grad()
            perplexity = self.perplexity(dev) if dev else math.nan
            print(f"epoch {epoch}: perplexity on dev {perplexity:.1f}")
            if not perplexity >= best:
                best = perplexity
                weights = {n: each.clone() for n, each in self.model.state_dict().items()}
            elif perplexity > 1.1 * best:
                break
        self.model.load_state_dict(weights)

    @torch.no_grad()
    def perplexity(self, examples: list[Example]) -> float:
        """Of a word piece, given the label and those before it; pieces that the training set does not
        have are passed over."""
        self.model.eval()
        rows = self._rows(examples)
        losses = [self._loss(rows[i : i + self.BATCH]) for i in range(0, len(rows), self.BATCH)]
        return float(torch.cat(losses).cpu().double().mean().exp())

    @torch.no_grad()
    def sample(self, labels: list[int], generator_seed: int) -> list[tuple[int, str]]:
        """(label, sentence) of those that have come to an end."""
        torch.manual_seed(generator_seed)
        self.model.eval()
        ids = torch.tensor(labels, device=self.device)[:, None]  # [B, 1]
        ended = torch.zeros(len(labels), dtype=torch.bool, device=self.device)
        self.model.keep_past(len(labels))
        for position in range(self.args.max_length):
            logits = self.model(ids[:, -1:], position, ids[:, 0])[:, -1].float()
            logits[:, : self.end] = -torch.inf  # no label within a sentence
            drawn = nucleus(logits, self.args.top_p, self.args.temperature)
            ids = torch.cat([ids, drawn.masked_fill(ended, self.end)[:, None]], dim=1)
            ended |= drawn == self.end
            if ended.all():
                break
        self.model.keep_past(None)
        rows = zip(labels, ids[:, 1:].tolist(), ended.tolist())
        return [(label, self._text(row)) for label, row, complete in rows if complete]

    def _text(self, row: list[int]) -> str:
        pieces = [self.pieces[each - self.end - 1] for each in row if each != self.end]
        return self.tokenizer.backend.decode(pieces)

    def _pieces_of(self, examples: list[Example]) -> list[tuple[int, list[int]]]:
        texts = [example.sentences[0] for example in examples]
        limit = dict(truncation=True, max_length=self.args.max_length + 1)  # with [CLS] and [SEP]
        ids = self.tokenizer(texts, **limit)["input_ids"]
        return [(int(example.label), row[1:-1]) for example, row in zip(examples, ids)]

    def _rows(self, examples: list[Example]) -> list[list[int]]:
        return [
            [label, *(self.number[piece] for piece in ids if piece in self.number), self.end]
            for label, ids in self._pieces_of(examples)
        ]

    def _loss(self, rows: list[list[int]]) -> Tensor:
        """Of each token but the first of its row."""
        longest = max(map(len, rows))
        padded = [row + [-100] * (longest - len(row)) for row in rows]
        ids = torch.tensor(padded, device=self.device)  # [B, S]
        real = ids[:, 1:] >= 0  # most of the work is the multiplication by all words
        states = self.model.states(ids[:, :-1].clamp_min(0), labels=ids[:, 0])[real]
        logits = self.model.logits(states).float()
        return F.cross_entropy(logits, ids[:, 1:][real], reduction="none")


class Gpt2Generator(Generator):
    """A GPT-2 from `transformers`, fine-tuned at a constant rate on the training set, with the label in
    words before the sentence."""

    EPOCHS, LR, BATCH = 2, 3e-5, 16

    def __init__(self, args, device: torch.device):
        try:
            import transformers
        except ImportError as error:
            raise UserError("--generator gpt2 needs: pip install transformers==5.23.0") from error
        self.args, self.device, self.library = args, device, transformers
        self.source = args.model or "gpt2"

    def fit(self, train: list[Example], dev: list[Example], folder: Path) -> None:
        saved = folder / "model"
        complete = (folder / "model-is-complete").exists()
        self._load(str(saved) if complete else self.source)
        if complete:
            return
        epochs = self.args.epochs or self.EPOCHS
        optimizer = AdamW(self.model.parameters(), lr=self.args.lr or self.LR)
        order = np.random.default_rng(self.args.seed)
        self.model.train()
        for epoch in range(1, epochs + 1):
            chosen = order.permutation(len(train))
            starts = range(0, len(train), self.BATCH)
            for start in tqdm(starts, desc=f"epoch {epoch}", unit="batch", leave=False):
                batch = [train[row] for row in chosen[start : start + self.BATCH]]
                with autocast(self.device, self.args.precision):
                    loss = self._losses(batch).mean()
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if dev:
                print(f"epoch {epoch}: perplexity on dev {self.perplexity(dev):.1f}")
        self.model.save_pretrained(saved)
        self.tokenizer.save_pretrained(saved)
        (folder / "model-is-complete").touch()

    @torch.no_grad()
    def perplexity(self, examples: list[Example]) -> float:
        """Of a token, given the label and those before it."""
        was_training = self.model.training
        self.model.eval()
        starts = range(0, len(examples), self.BATCH)
        losses = [self._losses(examples[start : start + self.BATCH]) for start in starts]
        self.model.train(was_training)
        return float(torch.cat(losses).cpu().double().mean().exp())

    @torch.no_grad()
    def sample(self, labels: list[int], generator_seed: int) -> list[tuple[int, str]]:
        torch.manual_seed(generator_seed)
        self.model.eval()
        self.tokenizer.padding_side = "left"
        prompts = [self._prompt(label) for label in labels]
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.device)
        ids = self.model.generate(
            **batch,
            do_sample=True,
            top_p=self.args.top_p,
            top_k=0,
            temperature=self.args.temperature,
            max_new_tokens=self.args.max_length,
            pad_token_id=self.tokenizer.eos_token_id,
        )[:, batch["input_ids"].shape[1] :]
        end = self.tokenizer.eos_token_id
        rows = [(label, row) for label, row in zip(labels, ids.tolist()) if end in row]
        return [
            (label, self.tokenizer.decode(row[: row.index(end)]).strip()) for label, row in rows
        ]

    def _load(self, source: str) -> None:
        local = dict(local_files_only=self.args.local_files_only)
        try:
            self.tokenizer = self.library.AutoTokenizer.from_pretrained(source, **local)
            self.model = self.library.AutoModelForCausalLM.from_pretrained(source, **local)
        except (OSError, ValueError) as error:
            raise UserError(f"--model {source}: {one_line(error)}") from error
        self.model.to(self.device)
        self.tokenizer.pad_token = self.tokenizer.eos_token

    def _prompt(self, label: int) -> str:
        return f"{DESCRIPTIONS[label]}:"

    def _losses(self, examples: list[Example]) -> Tensor:
        """Of the sentences' tokens and of their ends, not of the prompts."""
        rows, starts = [], []
        for example in examples:
            prompt = self.tokenizer(self._prompt(int(example.label)))["input_ids"]
            sentence = self.tokenizer(" " + example.sentences[0].strip())["input_ids"]
            starts.append(len(prompt))
            rows.append(prompt + sentence[: self.args.max_length] + [self.tokenizer.eos_token_id])
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        wanted = mask.bool() & (torch.arange(longest) >= torch.tensor(starts)[:, None])
        targets = ids.masked_fill(~wanted, -100)[:, 1:].to(self.device).flatten()
        model_input = dict(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
        logits = self.model(**model_input).logits[:, :-1].float().flatten(0, 1)
        return F.cross_entropy(logits, targets, reduction="none")[targets >= 0]


class LimitReached(Exception):
    """No more requests may be made."""


class OpenAIGenerator(Generator):
    """A chat model behind an OpenAI-compatible endpoint, shown examples of the training set. Its answers
    are arguments of a function that it is made to call, of a fixed form; all chat models know that.
    """

    PER_REQUEST, EXAMPLES, ATTEMPTS, RETRIES = 10, 8, 3, 6
    FUNCTION = {
        "name": "write",
        "description": "Hand in new sentences.",
        "parameters": {
            "type": "object",
            "properties": {"sentences": {"type": "array", "items": {"type": "string"}}},
            "required": ["sentences"],
        },
    }

    def __init__(self, args, device: torch.device):
        try:
            import openai
        except ImportError as error:
            raise UserError("--generator openai needs: pip install openai==3.51.0") from error
        if not os.environ.get("OPENAI_API_KEY"):
            raise UserError("--generator openai: put your key into the variable OPENAI_API_KEY")
        self.args, self.library = args, openai
        limits = dict(timeout=args.timeout, max_retries=self.RETRIES)  # with back-off
        self.client = openai.OpenAI(base_url=args.base_url, **limits)
        self.requests = self.spent = 0

    def fit(self, train: list[Example], dev: list[Example], folder: Path) -> None:
        self.examples = {
            label: [each.sentences[0].strip() for each in train if each.label == label]
            for label in LABELS
        }

    def perplexity(self, examples: list[Example]) -> None:
        return None

    def choose(self, missing: list[int], n: int, chance: random.Random) -> list[int]:
        """One label, and no more than one request asks for: what has been paid for is kept at once."""
        ((label, count),) = Counter(missing).most_common(1)
        return [label] * min(count, n, self.PER_REQUEST)

    def account(self) -> dict[str, float]:
        return {"requests": self.requests, "spent": self.spent}

    def sample(self, labels: list[int], generator_seed: int) -> list[tuple[int, str]]:
        """The labels are all the same."""
        known, n = self.examples[labels[0]], len(labels)
        examples = random.Random(generator_seed).sample(known, min(self.EXAMPLES, len(known)))
        shown = "\n".join(f"- {each}" for each in examples)
        text = (
            f"These sentences from film reviews are of {DESCRIPTIONS[labels[0]]} sentiment:\n{shown}\n"
            f"Write {n} new ones of the same sentiment and style, on different things."
        )
        for _ in range(self.ATTEMPTS):
            try:
                sentences = json.loads(self._request(text))["sentences"]
                if isinstance(sentences, list) and all(isinstance(s, str) for s in sentences):
                    return [(labels[0], sentence) for sentence in sentences[:n]]
            except (ValueError, KeyError, TypeError, AttributeError, IndexError):
                continue  # not what was asked for
        return []

    def _request(self, text: str) -> str:
        """The arguments that the function is called with."""
        if self.requests >= self.args.max_requests or self.spent >= self.args.max_cost:
            raise LimitReached
        tool = {"type": "function", "function": {"name": self.FUNCTION["name"]}}
        try:
            raw = self.client.chat.completions.with_raw_response.create(
                model=self.args.model or "gpt-4",
                messages=[{"role": "user", "content": text}],
                tools=[{"type": "function", "function": self.FUNCTION}],
                tool_choice=tool,
                temperature=self.args.temperature,
                top_p=self.args.top_p,
            )
        except self.library.APIError as error:  # its text may hold parts of the key
            status = getattr(error, "status_code", None)
            problem = type(error).__name__ + (f", status {status}" if status else "")
            raise UserError(f"--generator openai: {self.client.base_url}: {problem}") from None
        self.requests += 1 + raw.retries_taken
        answer = raw.parse()
        words = 1.4 * len(
            text.split()
        )  # where the endpoint does not say how many tokens there were
        usage = answer.usage
        tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else (words, words)
        self.spent += np.dot(tokens, (self.args.price_input, self.args.price_output)).item() / 1e6
        return answer.choices[0].message.tool_calls[0].function.arguments


GENERATORS = {"small": SmallGenerator, "gpt2": Gpt2Generator, "openai": OpenAIGenerator}

# ---------------------------------------------------------------------------------------- the work


class Draft:
    """What there is so far, in a folder beside the output: a line for each round, written as it ends."""

    def __init__(self, folder: Path, identity: dict):
        self.folder, self.path = folder, folder / "rounds.jsonl"
        settings = folder / "settings.json"
        text = json.dumps(identity, indent=1, sort_keys=True) + "\n"
        if settings.exists() and settings.read_text() != text:
            raise UserError(
                f"{folder}: an interrupted run with other flags or files; go on with the same ones, "
                "give another --output, or remove this folder"
            )
        self._settings = settings, text  # written when there is something to keep
        if not settings.exists() and folder.exists():  # of nobody knows which flags
            shutil.rmtree(folder)
        whole = self.path.read_text().rpartition("\n")[0] if self.path.exists() else ""
        self.rounds = [json.loads(line) for line in whole.splitlines()]
        if self.path.exists():
            with atomic_write(self.path) as temporary:  # without a line that a kill has cut short
                temporary.write_text("".join(json.dumps(each) + "\n" for each in self.rounds))

    def begin(self) -> None:
        """From now on there is something to keep."""
        settings, text = self._settings
        with atomic_write(settings) as temporary:
            temporary.write_text(text)

    def add(self, round: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(round) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rounds.append(round)

    @property
    def rows(self) -> list[tuple[int, str]]:
        return [tuple(row) for each in self.rounds for row in each["rows"]]

    def total(self, key: str) -> float:
        return sum(each[key] for each in self.rounds)


class Screen:
    """Sorts drawn sentences: new, or why not."""

    def __init__(self, train: list[Example], held_out: list[Example], classifier, draft: Draft):
        texts = [[each.sentences[0] for each in part] for part in (train, held_out)]
        self.known, self.held_out = (NearDuplicates(sum(texts, [])) for _ in range(2))
        for near, part in zip((self.known, self.held_out), texts):
            for text in part:
                near.add(text)
        for _, text in draft.rows:
            self.known.add(text)
        self.classifier = classifier

    def sort(self, drawn: list[tuple[int, str]], left: dict[int, int]) -> dict:
        """A round: the rows that are new, of each label no more than are `left` to find, and how many
        others there are, by reason."""
        drawn = [(label, one_line_of(text)) for label, text in drawn]
        reasons = ("empty", "contaminated", "duplicates", "unsure", "surplus")
        round = {"rows": [], "drawn": len(drawn)} | dict.fromkeys(reasons, 0)
        agrees = self.classifier(drawn) if self.classifier and drawn else [True] * len(drawn)
        for (label, text), sure in zip(drawn, agrees, strict=True):
            if not words_of(text):
                round["empty"] += 1
            elif text in self.held_out:
                round["contaminated"] += 1
            elif text in self.known:
                round["duplicates"] += 1
            elif not sure:
                round["unsure"] += 1
            elif left[label] > 0:
                left[label] -= 1
                self.known.add(text)
                round["rows"].append((label, text))
            else:
                round["surplus"] += 1
        return round


def classifier_of(path: str, min_confidence: float, device: torch.device):
    """What tells for (label, sentence) pairs whether a trained model gives the label at least this
    probability."""
    model, tokenizer, checkpoint = load_checkpoint(path)
    if checkpoint["tags"] is not None:
        raise UserError(f"{path}: was trained with tags; filter with a model without")
    if "sst" not in checkpoint["options"]["tasks"]:
        raise UserError(f"{path}: was not trained on sentiment")
    limit = checkpoint["options"]["max_length"] or model.bert.config.max_position_embeddings
    model.to(device).eval()

    @torch.no_grad()
    def agrees(pairs: list[tuple[int, str]]) -> list[bool]:
        texts = [text for _, text in pairs]
        batch = tokenizer(texts, True, truncation=True, max_length=limit, return_tensors="pt")
        ids, mask = (batch[key].to(device) for key in ("input_ids", "attention_mask"))
        probabilities = model.predict_sentiment(ids, mask).float().softmax(-1).cpu()
        return [bool(p[label] >= min_confidence) for p, (label, _) in zip(probabilities, pairs)]

    return agrees


def generate(args: argparse.Namespace) -> None:
    """Write the CSV and its report."""
    output = Path(args.output)
    check_writable(output)
    for given in (args.sst_train, args.sst_dev, args.sst_test, args.filter_with):
        if given and not Path(given).is_file():
            raise UserError(f"{given}: no such file")
        if given and Path(given).resolve() == output.resolve():
            raise UserError(f"--output {output}: is read too; give it another name")
    device = pick_device(args.use_gpu)
    seed_everything(args.seed)
    with hold([output], STILL_GOING):
        train, dev, test = read_real(args)
        folder = output.with_name(f"{output.name}.part")
        draft = Draft(folder, identity_of(args))
        generator = GENERATORS[args.generator](args, device)
        classifier = None
        if args.filter_with:
            classifier = classifier_of(args.filter_with, args.min_confidence, device)
        generator.fit(train, labelled(dev), folder)
        draft.begin()
        if args.generator == "openai":
            generator.requests, generator.spent = draft.total("requests"), draft.total("spent")
        screen = Screen(train, (dev or []) + (test or []), classifier, draft)
        fill(draft, generator, screen, args)
        rows = draft.rows
        write_rows(output, rows, train if args.mix else [], args.generator)
        report = report_of(draft, args, dev, test, generator)
        with atomic_write(output.with_suffix(".report.json")) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")
        show(report)
        print(f"{len(rows)} sentences: {output}")
        if len(rows) == args.num_samples:
            shutil.rmtree(folder)
        else:
            print(f"fewer than asked for; what there is stays in {folder}, to go on with")


def fill(draft: Draft, generator, screen: Screen, args) -> None:
    """Draw until each label has its share, or nothing new comes any more."""
    shares = {
        label: args.num_samples // len(LABELS) + (label < args.num_samples % len(LABELS))
        for label in LABELS
    }
    fruitless = 0
    with tqdm(total=args.num_samples, initial=len(draft.rows), unit="sentence") as bar:
        while fruitless < FRUITLESS_ROUNDS:
            have = Counter(label for label, _ in draft.rows)
            missing = [x for x in LABELS for _ in range(shares[x] - have[x])]
            if not missing:
                return
            chance = random.Random(f"{args.seed} {len(draft.rounds)}")
            chosen = generator.choose(missing, args.batch_size, chance)
            before = generator.account()
            try:
                drawn = generator.sample(sorted(chosen), chance.getrandbits(62))
            except LimitReached:
                warnings.warn("the limit of requests or cost is reached; writing what there is")
                return
            round = screen.sort(drawn, {label: shares[label] - have[label] for label in LABELS})
            used = {key: value - before[key] for key, value in generator.account().items()}
            draft.add(round | used)
            fruitless = 0 if round["rows"] else fruitless + 1
            bar.update(len(round["rows"]))
    warnings.warn(f"{FRUITLESS_ROUNDS} rounds have brought nothing new; writing what there is")


def read_real(args) -> tuple[list[Example], list[Example] | None, list[Example] | None]:
    """Training, dev and test sentences; None where there is no such file."""
    parts = [read_examples(args.sst_train, SST, "train")]
    for split in ("dev", "test"):
        path = getattr(args, f"sst_{split}")
        parts.append(read_examples(path, SST, split) if path else None)
    return tuple(parts)


def labelled(examples: list[Example] | None) -> list[Example]:
    return [each for each in examples or [] if not math.isnan(each.label)]


def identity_of(args) -> dict:
    """What a draft depends on."""
    own = {"output", "use_gpu", "local_files_only", "mix", "timeout", "max_requests", "max_cost"}
    values = {key: value for key, value in vars(args).items() if key not in own}
    for key in ("sst_train", "sst_dev", "sst_test", "filter_with"):
        if values[key]:
            with open(values[key], "rb") as file:
                values[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return values


def write_rows(
    path: Path, rows: list[tuple[int, str]], real: list[Example], generator: str
) -> None:
    """As pandas writes a CSV, which is how the real ones are."""
    cells = [(each.id, each.sentences[0], int(each.label)) for each in real]
    cells += [
        (f"synthetic-{generator}-{number:06d}", text, label)
        for number, (label, text) in enumerate(rows)
    ]
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, delimiter="\t", lineterminator="\n")
        writer.writerow(("", "id", "sentence", "sentiment"))
        writer.writerows((number, *row) for number, row in enumerate(cells))


def report_of(draft: Draft, args, dev, test, generator) -> dict:
    rows = draft.rows
    report = {
        "generator": args.generator,
        "sentences": len(rows),
        "of each label": [sum(each == label for each, _ in rows) for label in LABELS],
        "mean length in words": round(sum(len(t.split()) for _, t in rows) / max(len(rows), 1), 2),
        "drawn": draft.total("drawn"),
        "dropped: without a word": draft.total("empty"),
        "dropped: near-duplicates of training or of each other": draft.total("duplicates"),
    }
    contaminated = "dropped: near-duplicates of dev or test"
    checked = [name for name, part in (("dev", dev), ("test", test)) if part]
    report[contaminated] = draft.total("contaminated") if checked else "not checked"
    report["checked against"] = checked or "neither dev nor test: no files"
    if args.filter_with:
        report["dropped: the classifier is less sure"] = draft.total("unsure")
        agreed = draft.total("surplus") + len(rows)
        asked = draft.total("unsure") + agreed
        report["the classifier agrees with"] = round(agreed / max(asked, 1), 3)
    if labelled(dev) and (perplexity := generator.perplexity(labelled(dev))):
        report["perplexity on dev"] = round(perplexity, 2)
    if args.generator == "openai":
        report["requests"] = draft.total("requests")
        report["spent, dollars"] = round(draft.total("spent"), 4)
    return report


def show(report: dict) -> None:
    print("\n| | |\n| --- | --- |")
    for name, value in report.items():
        print(f"| {name} | {', '.join(map(str, value)) if isinstance(value, list) else value} |")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--generator", choices=GENERATORS, required=True)
    flag(
        "--model",
        help="minilm's word pieces for small; gpt2: hub id or directory, default gpt2; "
        "openai: default gpt-4",
    )
    flag("--num_samples", type=positive_int, default=5000, help="new sentences; default: 5000")
    flag("--output", required=True, metavar="CSV")
    flag("--mix", action="store_true", help="write the real training rows too, before the new ones")
    flag("--data_dir", default="data", help="folder of the real CSVs; default: data")
    for split in ("train", "dev", "test"):
        where = "DATA_DIR" if split == "train" else "beside --sst_train, if there is one"
        flag(f"--sst_{split}", metavar="CSV", help=f"default: {where}")
    flag("--filter_with", metavar="CHECKPOINT", help="keep what this trained model agrees with")
    flag(
        "--min_confidence",
        type=probability,
        default=0.5,
        help="probability that it gives the label, at least; default: 0.5",
    )
    flag("--seed", type=seed, default=11711, help="default: 11711")
    flag("--use_gpu", action="store_true")
    flag(
        "--precision", choices=PRECISIONS, default="auto", help="of training, as for training BERT"
    )
    flag("--local_files_only", action="store_true", help="download no model")
    flag("--epochs", type=positive_int, help="default: 12 for small, 2 for gpt2")
    flag("--lr", type=positive_float, help="default: 5e-4 for small, 3e-5 for gpt2")
    flag("--batch_size", type=positive_int, default=128, help="drawn at a time; default: 128")
    flag("--max_length", type=positive_int, default=64, help="word pieces; default: 64")
    flag("--top_p", type=positive_float, default=0.9, help="nucleus sampling; default: 0.9")
    flag("--temperature", type=positive_float, default=1.0, help="default: 1")
    flag("--base_url", help="openai: another endpoint with its protocol")
    flag("--timeout", type=positive_float, default=60.0, help="openai: seconds; default: 60")
    flag("--max_requests", type=positive_int, default=500, help="openai; default: 500")
    flag("--max_cost", type=positive_float, default=10.0, help="openai: dollars; default: 10")
    flag(
        "--price_input",
        type=non_negative_float,
        default=30.0,
        help="openai: dollars for a million tokens; default: 30",
    )
    flag("--price_output", type=non_negative_float, default=60.0, help="likewise; default: 60")
    args = parser.parse_args(argv)
    if args.top_p > 1:
        parser.error("--top_p must be at most 1")
    if args.sst_train is None:
        args.sst_train = os.path.join(args.data_dir, SST.filename("train"))
    for split in ("dev", "test"):
        if getattr(args, f"sst_{split}") is None:
            beside = Path(args.sst_train).with_name(SST.filename(split))
            setattr(args, f"sst_{split}", str(beside) if beside.exists() else None)
    del args.data_dir
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    advice = "lower --batch_size or --max_length"
    return exit_status(lambda: generate(args), advice, "run the same command again to go on")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
