import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tokenizers
import torch
import transformers
from conftest import ROOT, SAMPLE
from hypothesis import given
from hypothesis import strategies as st

import generators
import synthetic
from base_bert import BertConfig
from datasets import read_examples
from generators import CausalLM, Gpt2Generator, Row, SmallGenerator, nucleus
from tasks import TASKS

SST = TASKS["sst"]


@pytest.fixture(scope="module")
def train_csv(tmp_path_factory):
    """The first 119 training sentences, without dev and test sets."""
    path = tmp_path_factory.mktemp("data") / "train.csv"
    lines = (SAMPLE / SST.train[0]).read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:120]))
    return str(path)


@pytest.fixture
def train(train_csv):
    return read_examples(train_csv, SST, "train")


def rows_of(path):
    """Read what synthetic.py has written, like a training run does."""
    return read_examples(path, SST, "train")


# ------------------------------------------------------------------------------ the small model

SIZE = dict(vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=4)
SIZE |= dict(intermediate_size=37, max_position_embeddings=20, type_vocab_size=3)


@pytest.fixture
def model():
    torch.manual_seed(3)
    model = CausalLM(BertConfig(**SIZE)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_the_small_model_equals_a_decoder_of_transformers(model):
    config = transformers.BertConfig(**SIZE, is_decoder=True, layer_norm_eps=1e-12)
    theirs = transformers.BertModel(config, add_pooling_layer=False).eval()
    theirs.load_state_dict(model.state_dict())
    ids, labels = torch.randint(0, 50, (4, 11)), torch.tensor([2, 0, 1, 2])
    types = labels[:, None].expand_as(ids)
    states = theirs(input_ids=ids, token_type_ids=types).last_hidden_state
    expected = states @ theirs.embeddings.word_embeddings.weight.T
    torch.testing.assert_close(model.logits(ids, labels), expected, rtol=1e-4, atol=1e-4)


def test_kept_states_give_the_same(model):
    ids, labels = torch.randint(0, 50, (4, 11)), torch.tensor([2, 0, 1, 2])
    expected = model.logits(ids, labels)
    with model.keep_past():
        found = [model.logits(ids[:, start : start + 1], labels, start) for start in range(11)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.logits(ids, labels), expected)


@pytest.mark.parametrize("looked_at_first", [1, 2, 3, 1000])
def test_nucleus_sampling_has_the_published_distribution(looked_at_first, monkeypatch):
    """The first three of 0.4, 0.3, 0.2, 0.1 reach 0.8; they are drawn in proportion."""
    monkeypatch.setattr(generators, "LIKELY", looked_at_first)
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(60_000, 4)
    shares = torch.bincount(nucleus(logits, 0.8, 1.0), minlength=4) / 60_000
    expected = torch.tensor([0.0, 0.4, 0.2, 0.3]) / 0.9
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.01)
    hot = torch.bincount(nucleus(logits, 1.0, 2.0), minlength=4) / 60_000
    expected = torch.tensor([0.1, 0.4, 0.2, 0.3]).sqrt()
    torch.testing.assert_close(hot, expected / expected.sum(), rtol=0, atol=0.01)


def test_small_keeps_its_best_epoch_and_stops_when_it_overfits(
    train_csv, train, tmp_path, monkeypatch
):
    """The dev perplexities are given: worse by less than a tenth, the best, worse by more."""
    left, seen = iter([50.0, 54.0, 40.0, 43.0, 45.0, 1.0]), []

    def perplexity(self, examples):
        seen.append(self.model.embeddings.word_embeddings.weight.detach().clone())
        return next(left)

    monkeypatch.setattr(SmallGenerator, "perplexity", perplexity)
    size = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    monkeypatch.setattr(SmallGenerator, "SIZE", size)
    flags = ["--generator", "small", "--sst_train", train_csv, "--epochs", "9", "--output", "x"]
    generator = SmallGenerator(synthetic.parse(flags), torch.device("cpu"))
    generator.fit(train[:100], train[:10], tmp_path)
    assert len(seen) == 5
    assert torch.equal(generator.model.embeddings.word_embeddings.weight, seen[2])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=50), st.integers(1, 99))
def test_batches_need_no_padding_and_hold_each_row_once(lengths, tokens):
    generator = SmallGenerator.__new__(SmallGenerator)
    generator.TOKENS = tokens
    rows = [Row([number] * length, 1) for number, length in enumerate(lengths)]
    batches = generator._batches(rows)
    assert sorted(row for batch in batches for row in batch) == sorted(rows)
    for batch in batches:
        (length,) = {len(row.ids) for row in batch}
        assert len(batch) == 1 or len(batch) * length <= tokens
    # A row that starts a batch does not fit into the one before.
    for before, after in itertools.pairwise(batches):
        length = len(after[0].ids)
        assert len(before[0].ids) < length or (len(before) + 1) * length > tokens


def test_perplexity_is_that_of_tokens_one_by_one(train_csv, train, tmp_path, monkeypatch):
    """Word pieces of dev that the training set lacks are left out."""
    monkeypatch.setattr(SmallGenerator, "_train", lambda *_: None)
    flags = ["--generator", "small", "--sst_train", train_csv, "--output", "x"]
    generator = SmallGenerator(synthetic.parse(flags), torch.device("cpu"))
    generator.fit(train[:60], [], tmp_path)
    dev, losses = train[60:80], []
    known = {piece for pieces in generator._word_pieces(train[:60]) for piece in pieces}
    for example, pieces in zip(dev, generator._word_pieces(dev), strict=True):
        ids = torch.tensor(
            [[int(example.label)] + [generator.ids[p] for p in pieces if p in known]]
        )
        with torch.no_grad():
            probabilities = generator.model.eval().logits(ids, ids[:, 0]).double().softmax(-1)[0]
        targets = [*ids[0, 1:].tolist(), generator.END]
        losses += [-probabilities[row, id].log().item() for row, id in enumerate(targets)]
    assert any(set(pieces) - known for pieces in generator._word_pieces(dev))
    expected = torch.tensor(losses).mean().exp().item()
    assert generator.perplexity(dev) == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------------ GPT-2


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory):
    """A random GPT-2 with a vocabulary of bytes."""
    directory = tmp_path_factory.mktemp("gpt2")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, "<|endoftext|>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    end = dict(eos_token="<|endoftext|>", bos_token="<|endoftext|>", unk_token="<|endoftext|>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **end).save_pretrained(directory)
    torch.manual_seed(0)
    size = dict(vocab_size=len(vocabulary), n_positions=256, n_embd=32, n_layer=2, n_head=2)
    ids = dict(eos_token_id=len(alphabet), bos_token_id=len(alphabet))
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, **ids)).save_pretrained(directory)
    return directory


def test_gpt2_for_real(tiny_gpt2, train_csv, tmp_path):
    """In a process of its own, in which our datasets.py is on the path before transformers is."""
    command = [sys.executable, ROOT / "synthetic.py", "--generator", "gpt2", "--model", tiny_gpt2]
    command += ["--sst_train", train_csv, "--num_samples", "10", "--batch_size", "16"]
    command += ["--epochs", "1", "--max_length", "150", "--output", tmp_path / "new.csv"]
    command += ["--local_files_only"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "new.csv")
    assert len(rows) == 10
    assert Counter(row.label for row in rows) == dict.fromkeys(range(5), 2)
    assert all(row.id.startswith("synthetic-gpt2-") for row in rows)


def test_gpt2_fine_tuning_lowers_the_loss_of_sentences(tiny_gpt2, train_csv, train, tmp_path):
    args = synthetic.parse(
        ["--generator", "gpt2", "--model", str(tiny_gpt2), "--output", "x", "--lr", "1e-2"]
        + ["--sst_train", train_csv, "--epochs", "1", "--max_length", "100"]
    )
    generator = Gpt2Generator(args, torch.device("cpu"))
    generator._make_model(train)
    before = generator.perplexity(train)
    # Compare with transformers' own loss, one sentence at a time.
    for example in train[:3]:
        prompt = generator.tokenizer(f"{SST.classes[int(example.label)]}:")["input_ids"]
        text = generator.tokenizer(" " + example.sentences[0].strip())["input_ids"][:100]
        ids = torch.tensor([prompt + text + [generator.tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            expected = generator.model(ids, labels=labels).loss
            found = generator._losses(generator._encode([example])).mean()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    generator.fit(train, [], tmp_path)
    assert generator.perplexity(train) < 0.5 * before
    again = Gpt2Generator(args, torch.device("cpu"))
    again.fit(train, [], tmp_path)  # from what the first one has left
    assert again.perplexity(train) == pytest.approx(generator.perplexity(train))


def test_a_missing_gpt2_is_one_clear_line(train_csv, tmp_path, capsys):
    flags = ["--generator", "gpt2", "--model", str(tmp_path), "--output", str(tmp_path / "o.csv")]
    assert synthetic.main(flags + ["--sst_train", train_csv]) == 1
    assert f"error: --model {tmp_path}: " in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- OpenAI

KEY = "sk-secret-of-the-test"


class Endpoint(ThreadingHTTPServer):
    """A server of the chat protocol. `behave` returns the kind of answer to the n-th request."""

    def __init__(self, behave):
        self.behave, self.bodies, self.keys = behave, [], []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.keys.append(self.headers["Authorization"])
        kind = self.server.behave(len(self.server.bodies))
        if kind == "slow":
            time.sleep(1)
        if kind in (401, 429, 500):
            text = json.dumps({"error": {"message": f"no, {KEY}", "type": "x"}})
            return self.answer(kind, text)
        wanted = int(re.search(r"Write (\d+) new ones", body["messages"][0]["content"])[1])
        number = len(self.server.bodies)
        words = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
        sentences = [f"{w} film{number}x{n} {w}{number}" for n, w in enumerate(words)][:wanted]
        bad = {"malformed": "Sure! Here:", "wrong": '{"sentences": "abc"}'}
        call = dict(name="write", arguments=bad.get(kind, json.dumps({"sentences": sentences})))
        message = dict(role="assistant", content=None)
        if kind != "empty":
            message["tool_calls"] = [dict(id="1", type="function", function=call)]
        choice = dict(index=0, finish_reason="stop", message=message)
        usage = dict(prompt_tokens=1000, completion_tokens=500, total_tokens=1500)
        whole = dict(id="1", object="chat.completion", created=1, model="m", choices=[choice])
        text = "<html>" if kind == "html" else json.dumps(whole | {"usage": usage})
        self.answer(200, text)

    def answer(self, status, text):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Retry-After-Ms", "10")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def ask(train_csv, tmp_path, monkeypatch, capfd):
    """Run synthetic.py against an endpoint; return exit status, printed text and endpoint."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def ask(behave, *more):
        endpoint = Endpoint(behave)
        thread = threading.Thread(target=endpoint.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        flags = ["--generator", "openai", "--model", "gpt-4", "--sst_train", train_csv]
        flags += ["--num_samples", "20", "--batch_size", "20", "--base_url", endpoint.url]
        try:
            code = synthetic.main([*flags, "--output", str(tmp_path / "new.csv"), *more])
        finally:
            endpoint.shutdown()
            endpoint.server_close()
        shown = capfd.readouterr()
        return code, shown.out + shown.err, endpoint

    return ask


def test_good_answers(ask, train, tmp_path):
    code, shown, endpoint = ask(lambda n: "good")
    assert code == 0, shown
    rows = rows_of(tmp_path / "new.csv")
    assert Counter(row.label for row in rows) == dict.fromkeys(range(5), 4)
    assert set(endpoint.keys) == {f"Bearer {KEY}"}
    body = endpoint.bodies[0]
    assert body["model"] == "gpt-4" and body["tool_choice"]["function"]["name"] == "write"
    examples = re.findall(r"^- (.*)$", body["messages"][0]["content"], re.M)
    assert len(examples) == 8
    assert set(examples) <= {example.sentences[0].strip() for example in train}
    report = json.loads((tmp_path / "new.report.json").read_text())
    assert report["requests"] == len(endpoint.bodies)
    cost = len(endpoint.bodies) * (30 * 1000 + 60 * 500) / 1e6
    assert report["spent, dollars"] == pytest.approx(cost, abs=1e-4)


@pytest.mark.parametrize("kind", ["malformed", "empty", "wrong", "html", "slow", 429, 500])
def test_every_second_answer_is_bad(ask, tmp_path, kind):
    timeout = "0.3" if kind == "slow" else "5"
    code, shown, _ = ask(lambda n: kind if n % 2 else "good", "--timeout", timeout)
    assert code == 0, shown
    assert len(rows_of(tmp_path / "new.csv")) == 20


def test_a_refused_key_ends_it_at_once_and_is_not_shown(ask, tmp_path):
    code, shown, endpoint = ask(lambda n: 401)
    assert code == 1 and len(endpoint.bodies) == 1
    assert "AuthenticationError, status 401" in shown and KEY not in shown
    for path in (tmp_path / "new.csv.part").rglob("*"):
        assert KEY not in path.read_text()


def test_failures_without_end_give_up_and_keep_what_is_paid_for(ask, tmp_path):
    code, shown, endpoint = ask(lambda n: "good" if n <= 5 else 500, "--num_samples", "100")
    assert code == 1 and "InternalServerError, status 500" in shown
    assert len(endpoint.bodies) == 5 + 7  # a request and six more tries
    kept = (tmp_path / "new.csv.part" / "rounds.jsonl").read_text().splitlines()
    assert len(kept) == 5 and sum(len(json.loads(line)["rows"]) for line in kept) == 50


def test_limits_of_requests_and_cost(ask, tmp_path):
    """It writes the sentences that it has, and keeps them so that a later run can continue."""
    code, shown, endpoint = ask(lambda n: "good", "--max_requests", "3")
    assert code == 0 and len(endpoint.bodies) == 3 and "limit of requests or cost" in shown
    assert len(rows_of(tmp_path / "new.csv")) == 12
    part = tmp_path / "new.csv.part"
    assert len((part / "rounds.jsonl").read_text().splitlines()) == 3
    shutil.rmtree(part)
    code, shown, endpoint = ask(lambda n: "good", "--max_cost", "0.1")
    assert code == 0 and len(endpoint.bodies) == 2  # of 6 cents each


def test_an_answer_of_no_use_is_paid_for_too(ask, tmp_path):
    limit = "--max_requests", "2"
    code, _, endpoint = ask(lambda n: "good" if n == 1 else "malformed", *limit)
    assert code == 0 and len(endpoint.bodies) == 2
    assert json.loads((tmp_path / "new.report.json").read_text())["requests"] == 2
    assert len(ask(lambda n: "good", *limit)[2].bodies) == 0  # the run that goes on has none left


def test_no_key_is_one_clear_line(train_csv, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    flags = ["--generator", "openai", "--output", str(tmp_path / "o.csv"), "--sst_train", train_csv]
    assert synthetic.main(flags) == 1
    assert "put your key into the variable OPENAI_API_KEY" in capsys.readouterr().err


@pytest.mark.parametrize("generator, library", [("gpt2", "transformers"), ("openai", "openai")])
def test_a_missing_library_names_the_command_that_installs_it(
    generator, library, train_csv, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, library, None)
    flags = ["--generator", generator, "--output", str(tmp_path / "o.csv")]
    assert synthetic.main([*flags, "--sst_train", train_csv]) == 1
    assert f"needs: pip install {library}==" in capsys.readouterr().err
