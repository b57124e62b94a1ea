"""The three generators of synthetic sentences: a small language model of our own, GPT-2, a chat model."""

import argparse
import contextlib
import copy
import importlib
import itertools
import json
import math
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import Sequences
from base_bert import BertConfig
from bert import BertModel, BertSelfAttention, Tokens
from datasets import Example
from optimizer import AdamW
from tasks import TASKS
from tokenizer import BertTokenizer
from utils import UserError, atomic_write, autocast, load_torch_file, one_line, progress_bar

SST = TASKS["sst"]
LABELS = range(len(SST.classes))

# How many of the likeliest ids `nucleus` sorts first. To sort all takes most of the time of drawing,
# and is rarely needed.
LIKELY = 1000


class Sentence(NamedTuple):
    label: int
    text: str


# ------------------------------------------------------------------------------ our language model


class CausalSelfAttention(BertSelfAttention):
    """Self-attention in which a token sees itself and the tokens before it. Sequences have one length.

    While `past` is a list, it keeps the keys and values [B, H, S, K] of all tokens so far, so that the
    next tokens can be given alone.
    """

    past: list[tuple[Tensor, Tensor]] | None = None

    def forward(self, hidden_states: Tensor, sequences: Sequences) -> Tensor:
        ((n_sequences, length),) = sequences.runs
        shape = n_sequences, length, self.config.num_attention_heads, self.config.head_size
        query, key, value = (
            linear(hidden_states).view(shape).transpose(1, 2)  # [B, H, S, K]
            for linear in (self.query, self.key, self.value)
        )
        if self.past is not None:
            self.past.append((key, value))
            key, value = (torch.cat(parts, dim=2) for parts in zip(*self.past, strict=True))
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        # Without a past, the mask is a triangle. After a past comes one token, which sees all others.
        is_causal = key.shape[2] == length
        context = F.scaled_dot_product_attention(query, key, value, None, dropout, is_causal)
        return context.transpose(1, 2).flatten(0, 1).flatten(1)  # [B S, D]


class CausalLM(BertModel):
    """A small language model: BERT with a causal mask. Its token types are labels, so that all tokens
    get the embedding of the label: the model soon forgets a label that only comes before the
    sentence. The word embeddings are also the weights of the output."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        del self.pooler
        layers: Any = self.encoder.layer
        for layer in layers:
            layer.attention.self = CausalSelfAttention(config)
        self.init_weights()

    def logits(self, ids: Tensor, labels: Tensor, start: int = 0) -> Tensor:
        """Return the logits [B, S, V] of the token that follows each token of `ids` [B, S]. `labels` are
        [B]. The first column of `ids` has position `start`."""
        n_sequences, length = ids.shape
        positions = torch.arange(start, start + length, device=ids.device).repeat(n_sequences)
        sequences = Sequences.of([length] * n_sequences, ids.device)
        types = labels.repeat_interleave(length)
        states = self.encode(Tokens(ids.flatten(), positions, sequences, types))  # [B S, D]
        weight = self.embeddings.word_embeddings.weight
        return F.linear(states, weight).unflatten(0, ids.shape)

    @contextlib.contextmanager
    def keep_past(self) -> Iterator[None]:
        """Within the block, keep what attention needs of the tokens so far, so that `logits` is given
        only the next tokens."""
        attentions = [part for part in self.modules() if isinstance(part, CausalSelfAttention)]
        for attention in attentions:
            attention.past = []
        try:
            yield
        finally:
            for attention in attentions:
                attention.past = None


def nucleus(logits: Tensor, top_p: float, temperature: float) -> Tensor:
    """Draw from the likeliest ids that together have probability `top_p` (Holtzman et al. 2020, arXiv
    1904.09751). [B, V] to [B]."""
    of_all_ids = (logits / temperature).softmax(-1)
    n_ids = of_all_ids.shape[-1]
    for count in (min(LIKELY, n_ids), n_ids):
        probabilities, ids = of_all_ids.topk(count)
        sums = probabilities.cumsum(-1)
        if (sums[:, -1] >= top_p).all():
            break
    probabilities[sums - probabilities >= top_p] = 0
    return ids.gather(1, torch.multinomial(probabilities, 1)).squeeze(1)


# -------------------------------------------------------------------------------------- generators


def import_library(generator: str, requirement: str) -> Any:
    """Import a library that only this generator needs. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(requirement.partition("==")[0])
    except ImportError as error:
        raise UserError(f"--generator {generator} needs: pip install {requirement}") from error


class Generator:
    """A source of sentences for given labels."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.usage: dict[str, float] = {}  # what has been used so far, by name

    def fit(self, train: list[Example], dev: list[Example], folder: Path) -> None:
        """Learn from the training set, or load what an interrupted run has left in `folder`."""
        raise NotImplementedError

    def sample(self, labels: list[int], seed: int) -> list[Sentence]:
        """Draw a sentence for each label. Return those that are complete."""
        raise NotImplementedError

    def perplexity(self, examples: list[Example]) -> float | None:
        """Return the perplexity of a token, given the label and the tokens before it; None if the
        generator does not know it."""
        return None

    def choose(self, missing: list[int], n: int, rng: random.Random) -> list[int]:
        """Choose the labels of a round of `n` from those that are missing. Near the end, where fewer
        than `n` are missing, each is drawn up to three times, since some sentences are dropped."""
        return rng.choices(missing, k=n) if len(missing) > n else (missing * 3)[:n]


class Row(NamedTuple):
    """A sentence as a language model reads it: a prompt that names the label, the tokens, an end."""

    ids: list[int]
    n_prompt: int


class LanguageModelGenerator(Generator):
    """A language model that is trained on the training set."""

    EPOCHS: int  # unless --epochs says more or fewer
    LR: float  # the highest; unless --lr says another
    TOKENS: int  # of a batch, about
    WEIGHT_DECAY: float
    WARM_UP = 0.1  # share of the steps in which the rate rises; then it falls to 0

    model: Any

    def _make_model(self, train: list[Example]) -> None:
        """Make the model that is to be trained."""
        raise NotImplementedError

    def _encode(self, examples: list[Example]) -> list[Row]:
        """Turn examples into rows."""
        raise NotImplementedError

    def _losses(self, rows: list[Row]) -> Tensor:
        """Return the cross-entropy [n] of all tokens that are not part of a prompt."""
        raise NotImplementedError

    def _batches(self, rows: list[Row]) -> list[list[Row]]:
        """Divide the rows into batches of rows of one length, which need no padding."""
        batches: list[list[Row]] = [[]]
        for row in sorted(rows, key=lambda row: len(row.ids)):
            last, length = batches[-1], len(row.ids)
            if last and (len(last[0].ids) < length or (len(last) + 1) * length > self.TOKENS):
                batches.append([])
            batches[-1].append(row)
        return batches

    def fit(self, train: list[Example], dev: list[Example], folder: Path) -> None:
        self._make_model(train)
        self.model.to(self.device)
        saved = folder / "model.pt"
        if saved.exists():
            self.model.load_state_dict(load_torch_file(saved))
            return
        self._train(train, dev)
        with atomic_write(saved) as temporary:
            torch.save(self.model.state_dict(), temporary)

    def _train_step(self, batch: list[Row], optimizer: torch.optim.Optimizer) -> None:
        with autocast(self.device, self.args.precision, small_gradients=True):
            # Each token counts the same, also in a small batch.
            loss = self._losses(batch).sum() / self.TOKENS
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def _train(self, train: list[Example], dev: list[Example]) -> None:
        """Train, and keep the epoch with the lowest perplexity on dev. Stop after an epoch whose
        perplexity is a tenth above the lowest. Without a dev set, keep the last epoch."""
        rows = self._encode(train)
        rate, epochs = self.args.lr or self.LR, self.args.epochs or self.EPOCHS
        n_steps = epochs * len(self._batches(rows))
        optimizer = AdamW(self.model.parameters(), lr=rate, weight_decay=self.WEIGHT_DECAY)
        shape: Any = dict(pct_start=self.WARM_UP, anneal_strategy="linear", cycle_momentum=False)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, n_steps, **shape)
        rng = random.Random(self.args.seed)
        best, weights = math.inf, {}
        for epoch in range(1, epochs + 1):
            self.model.train()
            batches = self._batches(rng.sample(rows, len(rows)))
            rng.shuffle(batches)
            for batch in progress_bar(batches, desc=f"epoch {epoch}", unit="batch", leave=False):
                self._train_step(batch, optimizer)
                schedule.step()
            perplexity = self.perplexity(dev) if dev else math.nan
            print(f"epoch {epoch}" + (f": perplexity on dev {perplexity:.1f}" if dev else ""))
            # Without a dev set it is nan, which is never worse.
            if not perplexity >= best:
                best, weights = perplexity, copy.deepcopy(self.model.state_dict())
            elif perplexity > 1.1 * best:
                break
        self.model.load_state_dict(weights)

    @torch.no_grad()
    def perplexity(self, examples: list[Example]) -> float:
        self.model.eval()
        losses = [self._losses(batch) for batch in self._batches(self._encode(examples))]
        return float(torch.cat(losses).cpu().double().mean().exp())


class SmallGenerator(LanguageModelGenerator):
    """`CausalLM` on rows [label] word pieces [end]. Its vocabulary is the labels, the end and the word
    pieces of the training set; it leaves out all other word pieces."""

    # With three times as many tokens in a batch, it learns clearly less in as many epochs.
    EPOCHS, LR, TOKENS, WEIGHT_DECAY = 4, 1e-3, 512, 0.05
    SIZE: dict[str, Any] = dict(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024
    )
    END = len(LABELS)

    def __init__(self, args: argparse.Namespace, device: torch.device):
        super().__init__(args, device)
        source = args.model or "minilm"
        self.tokenizer = BertTokenizer.from_pretrained(source, args.local_files_only)

    def _make_model(self, train: list[Example]) -> None:
        self.pieces = sorted(set(itertools.chain(*self._word_pieces(train))))
        self.ids = {piece: id for id, piece in enumerate(self.pieces, start=self.END + 1)}
        config = BertConfig(
            vocab_size=self.END + 1 + len(self.pieces),
            max_position_embeddings=self.args.max_length + 2,
            type_vocab_size=len(LABELS),
            pad_token_id=self.END,  # it is never read, only predicted
            **self.SIZE,
        )
        self.model = CausalLM(config)

    @torch.no_grad()
    def sample(self, labels: list[int], seed: int) -> list[Sentence]:
        torch.manual_seed(seed)
        self.model.eval()
        ids = torch.tensor(labels, device=self.device)[:, None]  # [B, 1]
        ended = torch.zeros(len(labels), dtype=torch.bool, device=self.device)
        with self.model.keep_past():
            for position in range(self.args.max_length):
                logits = self.model.logits(ids[:, -1:], ids[:, 0], position)[:, -1].float()
                logits[:, : self.END] = -torch.inf  # no label within a sentence
                drawn = nucleus(logits, self.args.top_p, self.args.temperature)
                ids = torch.cat([ids, drawn.masked_fill(ended, self.END)[:, None]], dim=1)
                ended |= drawn == self.END
                if ended.all():
                    break
        rows = zip(labels, ids[:, 1:].tolist(), ended.tolist(), strict=True)
        return [Sentence(label, self._decode(row)) for label, row, complete in rows if complete]

    def _decode(self, row: list[int]) -> str:
        pieces = [self.pieces[id - self.END - 1] for id in row if id != self.END]
        return self.tokenizer.backend.decode(pieces)

    def _word_pieces(self, examples: list[Example]) -> list[list[int]]:
        """Return the ids that the tokenizer gives to each sentence, without [CLS] and [SEP]."""
        texts = [example.sentences[0] for example in examples]
        batch = self.tokenizer(texts, truncation=True, max_length=self.args.max_length + 1)
        return [ids[1:-1] for ids in batch["input_ids"]]

    def _encode(self, examples: list[Example]) -> list[Row]:
        rows = []
        for example, pieces in zip(examples, self._word_pieces(examples), strict=True):
            ids = [self.ids[piece] for piece in pieces if piece in self.ids]
            rows.append(Row([int(example.label), *ids, self.END], n_prompt=1))
        return rows

    def _losses(self, rows: list[Row]) -> Tensor:
        ids = torch.tensor([row.ids for row in rows], device=self.device)  # [B, S]
        logits = self.model.logits(ids[:, :-1], ids[:, 0]).flatten(0, 1).float()
        return F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")


class Gpt2Generator(LanguageModelGenerator):
    """A GPT-2 from `transformers`, fine-tuned. Its prompt is the label in words."""

    EPOCHS, LR, TOKENS, WEIGHT_DECAY = 2, 3e-5, 512, 0.01
    PROMPTS = [f"{name}:" for name in SST.classes]  # by label

    tokenizer: Any  # its type is known to `transformers` only

    def __init__(self, args: argparse.Namespace, device: torch.device):
        super().__init__(args, device)
        self.library = import_library("gpt2", "transformers==5.23.0")

    def _make_model(self, train: list[Example]) -> None:
        source = self.args.model or "gpt2"
        local = dict(local_files_only=self.args.local_files_only)
        try:
            self.tokenizer = self.library.AutoTokenizer.from_pretrained(source, **local)
            self.model = self.library.AutoModelForCausalLM.from_pretrained(source, **local)
        except (OSError, ValueError) as error:
            raise UserError(f"--model {source}: {one_line(error)}") from error
        self.tokenizer.pad_token = self.tokenizer.eos_token

    @torch.no_grad()
    def sample(self, labels: list[int], seed: int) -> list[Sentence]:
        torch.manual_seed(seed)
        self.model.eval()
        prompts = [self.PROMPTS[label] for label in labels]
        padding = dict(padding=True, padding_side="left", return_tensors="pt")
        batch = self.tokenizer(prompts, **padding).to(self.device)
        end = self.tokenizer.eos_token_id
        ids = self.model.generate(
            **batch,
            do_sample=True,
            top_p=self.args.top_p,
            top_k=0,
            temperature=self.args.temperature,
            max_new_tokens=self.args.max_length,
            pad_token_id=end,
        )[:, batch["input_ids"].shape[1] :]
        return [
            Sentence(label, self.tokenizer.decode(row[: row.index(end)]).strip())
            for label, row in zip(labels, ids.tolist(), strict=True)
            if end in row
        ]

    def _encode(self, examples: list[Example]) -> list[Row]:
        prompts = self.tokenizer(self.PROMPTS)["input_ids"]
        texts = [" " + example.sentences[0].strip() for example in examples]
        rows, end = [], [self.tokenizer.eos_token_id]
        for example, ids in zip(examples, self.tokenizer(texts)["input_ids"], strict=True):
            prompt = prompts[int(example.label)]
            rows.append(Row(prompt + ids[: self.args.max_length] + end, n_prompt=len(prompt)))
        return rows

    def _losses(self, rows: list[Row]) -> Tensor:
        ids = torch.tensor([row.ids for row in rows], device=self.device)  # [B, S]
        starts = torch.tensor([row.n_prompt for row in rows], device=self.device)
        is_target = torch.arange(1, ids.shape[1], device=self.device) >= starts[:, None]
        logits = self.model(input_ids=ids).logits[:, :-1][is_target].float()  # [n, V]
        return F.cross_entropy(logits, ids[:, 1:][is_target], reduction="none")


class LimitReached(Exception):
    """No more requests may be made."""


class OpenAIGenerator(Generator):
    """A chat model behind an OpenAI-compatible endpoint. It sees examples from the training set, and
    answers by calling a function, whose arguments have a fixed form: all chat models can do that.
    """

    PER_REQUEST = 10  # sentences that one request asks for, at most
    EXAMPLES = 8  # sentences of the training set that one request shows
    RETRIES = 6  # of a request that fails; the library waits longer from one to the next
    FUNCTION: Any = {
        "name": "write",
        "description": "Hand in new sentences.",
        "parameters": {
            "type": "object",
            "properties": {"sentences": {"type": "array", "items": {"type": "string"}}},
            "required": ["sentences"],
        },
    }

    def __init__(self, args: argparse.Namespace, device: torch.device):
        super().__init__(args, device)
        self.library = import_library("openai", "openai==3.51.0")
        if not os.environ.get("OPENAI_API_KEY"):
            raise UserError("--generator openai: put your key into the variable OPENAI_API_KEY")
        limits = dict(timeout=args.timeout, max_retries=self.RETRIES)
        self.client = self.library.OpenAI(base_url=args.base_url, **limits)
        self.usage = {"requests": 0, "spent": 0}  # "spent" is in dollars

    def fit(self, train: list[Example], dev: list[Example], folder: Path) -> None:
        self.examples = {
            label: [row.sentences[0].strip() for row in train if row.label == label]
            for label in LABELS
        }

    def choose(self, missing: list[int], n: int, rng: random.Random) -> list[int]:
        """Choose the labels of one request: a single label, the one that most sentences miss. A round
        is one request, so that what has been paid for is kept at once."""
        ((label, count),) = Counter(missing).most_common(1)
        return [label] * min(count, n, self.PER_REQUEST)

    def sample(self, labels: list[int], seed: int) -> list[Sentence]:
        """Ask for a sentence for each of `labels`, which are all the same. Raises LimitReached."""
        label, n = labels[0], len(labels)
        known = self.examples[label]
        examples = random.Random(seed).sample(known, min(self.EXAMPLES, len(known)))
        shown = "\n".join(f"- {example}" for example in examples)
        text = (
            f"These sentences from film reviews are of {SST.classes[label]} sentiment:\n{shown}\n"
            f"Write {n} new ones of the same sentiment and style, on different things."
        )
        try:
            sentences = json.loads(self._request(text))["sentences"]
            if isinstance(sentences, list) and all(isinstance(s, str) for s in sentences):
                return [Sentence(label, sentence) for sentence in sentences[:n]]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            pass  # not what was asked for: a round without a sentence
        return []

    def _request(self, text: str) -> str:
        """Send a request. Return the arguments with which the model calls the function."""
        used = self.usage
        if used["requests"] >= self.args.max_requests or used["spent"] >= self.args.max_cost:
            raise LimitReached
        try:
            raw = self.client.chat.completions.with_raw_response.create(
                model=self.args.model or "gpt-4",
                messages=[{"role": "user", "content": text}],
                tools=[{"type": "function", "function": self.FUNCTION}],
                tool_choice={"type": "function", "function": {"name": self.FUNCTION["name"]}},
                temperature=self.args.temperature,
                top_p=self.args.top_p,
            )
        except self.library.APIError as error:
            # The error's own text may hold parts of the key.
            status = getattr(error, "status_code", None)
            problem = type(error).__name__ + (f", status {status}" if status else "")
            raise UserError(f"--generator openai: {self.client.base_url}: {problem}") from None
        used["requests"] += 1 + raw.retries_taken
        answer: Any = raw.parse()  # any part may be missing, whatever its type says
        # An estimate, for an endpoint that does not say how many tokens there were.
        estimate = 1.4 * len(text.split())
        usage = answer.usage
        tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else (estimate, estimate)
        price = np.dot(tokens, (self.args.price_input, self.args.price_output)).item()
        used["spent"] += price / 1e6
        return answer.choices[0].message.tool_calls[0].function.arguments


GENERATORS = {"small": SmallGenerator, "gpt2": Gpt2Generator, "openai": OpenAIGenerator}
