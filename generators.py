"""The three generators of synthetic sentences."""

import json
import math
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from attention import Sequences
from base_bert import BertConfig
from bert import BertLayer, BertSelfAttention
from datasets import Example
from optimizer import AdamW
from tasks import TASKS
from tokenizer import BertTokenizer
from utils import UserError, atomic_write, autocast, one_line

SST = TASKS["sst"]
LABELS = range(len(SST.classes))
LIKELY = 1000  # of all word pieces, those that are looked at first for the next one


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
        return f"{SST.classes[label]}:"

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
            f"These sentences from film reviews are of {SST.classes[labels[0]]} sentiment:\n{shown}\n"
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
