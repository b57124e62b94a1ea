"""Random folders of tokenizers, as people share them: every file and setting that changes ids."""

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as splitters
from tokenizers import processors

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROLES = ["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"]
LETTERS = [*"abcdefghijklmnopqrstuvwxyzABCDEÉéüßжя漢字日0123456789.,?!'-$…“”🎈ı"]
WORDS = ["the", "The", "film", "is", "was", "good", "très", "tres", "don", "café", "##ing", "##s"]
ADDED = [
    "<ent>",
    "<URL>",
    "new york",
    "@user",
    "Film",
    "covid",
    "##x",
    "[unused1]",
    "héros",
    "🎈🎈",
]

SENTENCES = [
    "A deep, moving and often funny film.",
    "It's the worst film I've seen in 20 years -- don't go!",
    "Which is the best way to learn rock climbing?",
    "TRÈS bon Café, naïve HÉROS; e\u0301te\u0301",
    "the <ent> was at <URL>, in new york, New York and newyork",
    "new  york<ent>the <ent>film <URL>",
    "@user @USER: covid COVID covid-19 Covid",
    "Film film FILM filming films the Films",
    "[CLS] [MASK] [SEP] [PAD] [UNK] [mask] [Cls]",
    "x[MASK]y [MASK] , <s> </s> <mask> <pad> <cls> [unused1] [unused2]",
    "",
    " ",
    "\t leading and trailing \n",
    "a\u00a0b\u2028c\u2003d\u200be\ufefff",
    "a\u0000b\u0007c\u001fd\u007fe\u0085f\ufffdg",
    "a\u00adb soft",
    "漢字とかな交じり文、日本。",
    "한국어 문장입니다",
    "Привет, Мир! жяЖЯ",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "İstanbul ıI Straße ﬁne ﬀ ǆ Σίσυφος",
    "🎈🎈🎈 👩‍👩‍👧‍👦 😀a👍🏽",
    "\U00013000 \U0001f9ff \ue000",
    "x" * 99,
    "x" * 100,
    "x" * 101,
    "a" * 250 + " b",
    "https://a.b/c?d=e&f=g#h",
    "C++ & C# @ $5.00 = 100% ^ ~ `tick`",
    "I\u2019ll “quote” – dash — em… ‘single’",
    "½ ² ⅷ Ⅷ ㎏ ﷺ",
    "##ing ##s # #s s## ##",
    "AbCdE éÉüÜ ßẞ",
    "e\u0301\u0327\u0302 A\u030a",
    "1,000.50 3/4 12:30",
    "don't DON'T Don’t dont",
    "tab\tnew\nline\rreturn\r\nend",
    "  two  spaces   three ",
    "héros Héros heros HEROS",
    "covid covidcovid xcovid covidx covid.",
    "<ent><ent> <ent>\t<URL>  x",
    "the\u3000film ａｂｃ ＡＢＣ",
    "-" * 40,
    "\u202ertl\u202c \u2066iso\u2069",
    "q\u20dd z\u0336a\u0336",
    "日本 film 漢 the 字",
    "new\u00a0york new\tyork [MASK]new york[MASK]",
]


def vocabulary(rng: random.Random) -> list[str]:
    pieces = [*LETTERS, *("##" + letter for letter in LETTERS), *WORDS]
    pieces = rng.sample(pieces, rng.choice([len(pieces), len(pieces) - 20]))
    pieces += rng.sample(ADDED, rng.randint(0, 3))
    special = list(SPECIAL)
    if rng.random() < 0.15:
        special += ["<s>", "</s>", "<pad>", "<mask>"]
    if rng.random() < 0.06:
        special.remove(rng.choice(SPECIAL))
    return list(dict.fromkeys(pieces + special if rng.random() < 0.2 else special + pieces))


def normalizer(rng: random.Random):
    def bert():
        return normalizers.BertNormalizer(
            rng.random() < 0.8,
            rng.random() < 0.8,
            rng.choice([None, True, False]),
            rng.random() < 0.5,
        )

    steps = [
        *(bert, normalizers.NFD, normalizers.NFC, normalizers.NFKC, normalizers.NFKD),
        *(normalizers.Lowercase, normalizers.StripAccents, normalizers.Strip, normalizers.Nmt),
        *(lambda: normalizers.Replace("’", "'"), lambda: normalizers.Replace("  ", " ")),
    ]
    if rng.random() < 0.5:
        return bert()
    if rng.random() < 0.1:
        return None
    chosen = [make() for make in rng.sample(steps, rng.randint(1, 3))]
    return normalizers.Sequence(chosen) if len(chosen) > 1 else chosen[0]


def splitter(rng: random.Random):
    others = [
        *(splitters.BertPreTokenizer, splitters.Whitespace, splitters.WhitespaceSplit),
        lambda: splitters.Punctuation(rng.choice(["isolated", "removed", "merged_with_previous"])),
        lambda: splitters.Digits(rng.random() < 0.5),
        *(splitters.UnicodeScripts, lambda: splitters.Split("-", "isolated")),
        lambda: splitters.CharDelimiterSplit("t"),
    ]
    if rng.random() < 0.5:
        return splitters.BertPreTokenizer()
    chosen = [make() for make in rng.sample(others, rng.randint(1, 2))]
    return splitters.Sequence(chosen) if len(chosen) > 1 else chosen[0]


def post_processor(rng: random.Random, ids: dict[str, int]):
    cls, sep = ("[CLS]", "[SEP]") if rng.random() < 0.9 else ("<s>", "</s>")
    if cls not in ids or sep not in ids or rng.random() < 0.05:
        return None
    kind = rng.random()
    if kind < 0.3:
        return processors.BertProcessing((sep, ids[sep]), (cls, ids[cls]))
    template = processors.TemplateProcessing(
        single=f"{cls} $A {sep}" if kind < 0.9 else f"{cls}:0 $A:1 {sep}:1",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, ids[cls]), (sep, ids[sep])],
    )
    if kind < 0.4:
        return processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return template


def added_token(rng: random.Random, text: str) -> AddedToken:
    flags = {name: rng.random() < 0.3 for name in ("lstrip", "rstrip", "single_word", "special")}
    normalized = rng.choice([True, False, not flags["special"]])
    return AddedToken(text, normalized=normalized, **flags)


def model(rng: random.Random, ids: dict[str, int]):
    unknown = rng.choices(["[UNK]", "<unk>"], [30, 1])[0]
    if rng.random() < 0.05:
        return models.WordLevel(ids, unk_token=unknown)
    if rng.random() < 0.05:
        return models.BPE(
            ids, [("a", "b")] if {"a", "b", "ab"} <= set(ids) else [], unk_token=unknown
        )
    longest = rng.choice([100, 100, 100, 5])
    prefix = rng.choice(["##"] * 9 + ["@@"])
    return models.WordPiece(
        ids, unk_token=unknown, max_input_chars_per_word=longest, continuing_subword_prefix=prefix
    )


def json_tokenizer(rng: random.Random, pieces: list[str]) -> Tokenizer:
    gap = rng.choice([0] * 9 + [3])  # after the last but one
    ids = {piece: number + gap * (number == len(pieces) - 1) for number, piece in enumerate(pieces)}
    backend = Tokenizer(model(rng, ids))
    if (made := normalizer(rng)) is not None:
        backend.normalizer = made
    backend.pre_tokenizer = splitter(rng)
    backend.decoder = decoders.WordPiece()
    if (made := post_processor(rng, ids)) is not None:
        backend.post_processor = made
    if rng.random() < 0.9:
        backend.add_special_tokens([token for token in SPECIAL if token in ids])
    backend.add_tokens([added_token(rng, text) for text in rng.sample(ADDED, rng.randint(0, 3))])
    if rng.random() < 0.3:
        backend.enable_truncation(128, direction=rng.choice(["right"] * 9 + ["left"]))
    if rng.random() < 0.3:
        backend.enable_padding(length=rng.choice([None, 128]), pad_token=rng.choice(SPECIAL[:2]))
    return backend


def token_value(rng: random.Random, text: str):
    """A token as tokenizer_config.json writes it."""
    if rng.random() < 0.7:
        return text
    names = ("content", "single_word", "lstrip", "rstrip", "normalized")
    values = (text, *(rng.random() < 0.2 for _ in range(4)))
    return dict(zip(names, values, strict=True)) | {"__type": "AddedToken"}


def settings(rng: random.Random, pieces: list[str]) -> dict:
    made: dict = {}
    for key, values in {
        "do_lower_case": [True, False],
        "strip_accents": [True, False, None],
        "tokenize_chinese_chars": [True, False],
        "model_max_length": [512, 128, int(1e30), 1e30, None],
        "max_len": [512],
        "do_basic_tokenize": [True, False],
        "never_split": [None, ["film"]],
        "padding_side": ["right", "left"],
        "clean_up_tokenization_spaces": [True, False],
        "name_or_path": ["some/where"],
    }.items():
        if rng.random() < 0.4:
            made[key] = rng.choice(values)
    for key, value, chance in (
        *(("truncation_side", "left", 0.03), ("split_special_tokens", True, 0.03)),
        *(("add_bos_token", True, 0.03), ("bos_token", "<s>", 0.05), ("eos_token", "[SEP]", 0.05)),
        *(("image_token", "<img>", 0.02), ("extra_special_tokens", {"a_token": "<a>"}, 0.02)),
        ("auto_map", {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}, 0.02),
        ("mask_token", None, 0.02),
    ):
        if rng.random() < chance:
            made[key] = value
    other = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
    for role, text in zip(ROLES, SPECIAL, strict=True):
        if rng.random() < 0.3:
            name = other.get(role, text) if rng.random() < 0.07 else text
            made.setdefault(role, token_value(rng, name))
    classes = ["BertTokenizer"] * 4 + ["BertTokenizerFast"] * 4 + ["PreTrainedTokenizerFast"] * 4
    classes += [
        "TokenizersBackend",
        "PreTrainedTokenizer",
        "ElectraTokenizer",
        "DistilBertTokenizer",
    ]
    classes += ["BertJapaneseTokenizer", "RobertaTokenizer", "AlbertTokenizerFast", "MyTokenizer"]
    if rng.random() < 0.8:
        made["tokenizer_class"] = rng.choice(classes)
    if rng.random() < 0.15:
        key = rng.choice(["additional_special_tokens", "extra_special_tokens"])
        made[key] = [token_value(rng, text) for text in rng.sample(ADDED, rng.randint(0, 2))]
    if rng.random() < 0.3:
        listed = [*SPECIAL, *rng.sample(ADDED, rng.randint(0, 3))]
        made["added_tokens_decoder"] = {}
        for text in rng.sample(listed, len(listed)):
            place = pieces.index(text) if text in pieces else len(pieces) + rng.randint(0, 9)
            token = added_token(rng, text).__getstate__()
            token["special"] = text in SPECIAL or token["special"]
            made["added_tokens_decoder"][str(place)] = token
    return made


def special_tokens_map(rng: random.Random) -> dict:
    made: dict = {}
    for role, text in zip(ROLES, SPECIAL, strict=True):
        if rng.random() < 0.8:
            value = token_value(rng, text)
            if isinstance(value, dict):
                del value["__type"]
            made[role] = value
    if rng.random() < 0.2:
        key = rng.choice(["additional_special_tokens", "extra_special_tokens"])
        made[key] = rng.sample(ADDED, rng.randint(0, 2))
    return made


def vocab_text(rng: random.Random, pieces: list[str]) -> str:
    lines = list(pieces)
    if rng.random() < 0.2:
        lines.insert(rng.randint(5, len(lines)), rng.choice(lines[5:]))
    if rng.random() < 0.2:
        lines.insert(
            rng.randint(5, len(lines)), rng.choice(["", " ", "\u00a0", "a\u2028b", "\x85", "zz "])
        )
    end = rng.choice(["\n"] * 4 + ["\r\n"])
    return end.join(lines) + rng.choice([end] * 3 + ["", end * 2, end * 3])


def random_folder(folder: Path, seed: int) -> None:
    """Write a folder with config.json and a tokenizer, another one for each seed."""
    rng = random.Random(seed)
    pieces = vocabulary(rng)
    config = {"model_type": "bert", "vocab_size": 1000}
    if rng.random() < 0.05:
        config["tokenizer_class"] = rng.choice(
            ["BertTokenizerFast", "PreTrainedTokenizerFast", "BertJapaneseTokenizer"]
        )
    texts = {"config.json": json.dumps(config)}
    kinds = rng.choice(["json", "vocab", "both", "both"])
    if kinds != "vocab":
        texts["tokenizer.json"] = json_tokenizer(rng, pieces).to_str()
    if kinds != "json":
        listed = vocabulary(rng) if rng.random() < 0.2 else pieces
        texts["vocab.txt"] = vocab_text(rng, listed)
    if rng.random() < 0.85:
        texts["tokenizer_config.json"] = json.dumps(settings(rng, pieces))
    if rng.random() < 0.3:
        texts["special_tokens_map.json"] = json.dumps(special_tokens_map(rng))
    if rng.random() < 0.3:
        chosen = rng.sample(ADDED + SPECIAL, rng.randint(1, 3))
        start = len(pieces)
        numbers = [pieces.index(t) if t in pieces else start + n for n, t in enumerate(chosen)]
        texts["added_tokens.json"] = json.dumps(dict(zip(chosen, numbers, strict=True)))
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
