"""BertConfig, and how a BERT's weights are read and written in Hugging Face's layout."""

import dataclasses
import json
import math
import reprlib
import textwrap
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save
from torch import nn

from pretrained import find_pretrained, read_json_table
from utils import UserError, atomic_write, load_torch_file, one_line, without_weights

TAG_TABLES = "pos_tag_embeddings.weight", "ner_tag_embeddings.weight"
# The activations of `transformers` that bring no weights of their own.
ACTIVATIONS = (
    *("gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh"),
    *("gelu_python_tanh", "gelu_10", "quick_gelu", "silu", "swish", "hardswish", "mish", "relu"),
    *("relu2", "relu6", "leaky_relu", "sigmoid", "tanh", "laplace", "sqrtsoftplus", "linear"),
)
# Weights files in the order in which `transformers` looks for them. An index names several.
WEIGHTS_FILES = [
    name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")
]
WORDS = "embeddings.word_embeddings.weight"
LONGEST_ERROR = 300
# Keys of a config.json that change the computation, with the only value that this BERT supports.
ONLY_SUPPORTED = {
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


def _is_size(name: str, value: Any) -> bool:
    if name == "pad_token_id" and value is None:
        return True
    # A negative padding id counts from the end.
    smallest = {"pad_token_id": -(10**7), "num_pos_tags": 0, "num_ner_tags": 0}.get(name, 1)
    # Larger models would take forever to build.
    largest = 1000 if name == "num_hidden_layers" else 10**7
    return isinstance(value, int) and not isinstance(value, bool) and smallest <= value <= largest


def _is_rate(name: str, value: Any) -> bool:
    largest = 1.0 if name.endswith("_prob") else math.inf
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and 0 <= value <= largest


# Type of a setting -> how an error describes its values, and the check of (name, value).
EXPECTED = {
    int: ("a positive whole number of a size in use", _is_size),
    float: ("a number in its range", _is_rate),
    str: (
        "an activation without weights of its own, like gelu",
        lambda name, value: value in ACTIVATIONS,
    ),
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The sizes and rates of a BERT, with the names and defaults of its `config.json`."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    # Sizes of the tables of tag embeddings, with id 0; a plain BERT has none.
    num_pos_tags: int = 0
    num_ner_tags: int = 0

    def __post_init__(self):
        problems = []
        for field in dataclasses.fields(self):
            (expected, is_valid), value = EXPECTED[type(field.default)], getattr(self, field.name)
            if not is_valid(field.name, value):
                problems.append(f"{field.name} must be {expected}, not {reprlib.repr(value)}")
        if not problems and self.hidden_size % self.num_attention_heads:
            problems.append(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        pad = self.pad_token_id or 0
        if not problems and not -self.vocab_size <= pad < self.vocab_size:
            problems.append(f"pad_token_id {self.pad_token_id} is not in the vocabulary")
        if not problems and bool(self.num_pos_tags) != bool(self.num_ner_tags):
            problems.append("num_pos_tags and num_ner_tags must both be 0, or neither")
        if problems:
            raise UserError(shortened("; ".join(problems)))

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json_file(cls, path: Path, **overrides: Any) -> Self:
        """Read a `config.json`; `overrides` replace its values.

        Keys that only other programs use are ignored. Raises UserError for a key that would change
        what this BERT computes (relative positions, a decoder, another model type).
        """
        values = read_json_table(path)
        for key, supported in ONLY_SUPPORTED.items():
            if (value := values.get(key, supported)) not in (supported, None):
                value = reprlib.repr(value)
                raise UserError(f"{path}: {key} is {value}; only {supported!r} is a BERT")
        names = {field.name for field in dataclasses.fields(cls)}
        settings = {key: value for key, value in values.items() if key in names} | overrides
        try:
            return cls(**settings)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def to_json(self) -> str:
        """Return the text of a `config.json`, which `transformers` reads too."""
        fixed = {"architectures": ["BertModel"], "model_type": "bert", "dtype": "float32"}
        values = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if value or not name.endswith("_tags")
        }
        return json.dumps(fixed | values, indent=2, sort_keys=True) + "\n"


class BertPreTrainedModel(nn.Module):
    """The base of `BertModel` in bert.py. It initialises, loads and saves weights."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.has_new_pooler = False

    def init_weights(self) -> None:
        """Draw new weights as BERT does: normal with `initializer_range`, biases 0, LayerNorm 1.

        Tag embeddings start at 0, so that they do not change what a pretrained BERT computes.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                nn.init.zeros_(module.weight.data[module.padding_idx])
        for name, parameter in self.named_parameters():
            if name.endswith(TAG_TABLES):
                nn.init.zeros_(parameter)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, local_files_only: bool = False, **overrides: Any
    ) -> Self:
        """Load a BERT with trained weights.

        Args:
            name_or_path: a directory in Hugging Face layout (`config.json` with
                `model.safetensors` or `pytorch_model.bin`), one of these weights files, a hub id,
                or `minilm` (all-MiniLM-L6-v2 from the package that pretrained.py names).
            local_files_only: use the files on this disk and download nothing.
            overrides: settings of `BertConfig` that replace those of `config.json`.

        Raises:
            UserError: files are missing or damaged, or the weights do not fit.
        """

        def find(filename: str) -> Path | None:
            return find_pretrained(name_or_path, filename, local_files_only)

        given = Path(name_or_path)
        hint = " on this machine (--local_files_only downloads nothing)" if local_files_only else ""
        config_path = find("config.json")
        if config_path is None:
            if given.is_file():
                read_weights(given, find)  # says so if this is a checkpoint
            raise UserError(f"{name_or_path}: no config.json found{hint}")
        config = BertConfig.from_json_file(config_path, **overrides)
        paths = map(find, [given.name] if given.is_file() else WEIGHTS_FILES)
        path = next((path for path in paths if path), None)
        if path is None:
            problem = "no model.safetensors and no pytorch_model.bin found"
            raise UserError(f"{name_or_path}: {problem}{hint}")
        weights = encoder_weights(read_weights(path, find), str(path))
        # Weights that are replaced take no time and no random numbers.
        with without_weights():
            model = cls(config)
        model.add_new_weights(weights, str(path))
        _check_fit(model, weights, str(path))
        model.load_state_dict(weights, assign=True)
        return model

    def add_new_weights(self, weights: dict[str, torch.Tensor], source: str) -> None:
        """Add a pooler and embeddings of tags to weights that have none of these."""
        for part in (("pooler.dense.weight", "pooler.dense.bias"), TAG_TABLES):
            if not any(name.endswith(part) for name in weights):
                shapes = {name: table.shape for name, table in self.state_dict().items()}
                weights |= {n: torch.zeros(s) for n, s in shapes.items() if n.endswith(part)}
                self.has_new_pooler |= part is not TAG_TABLES
        if self.has_new_pooler:
            nn.init.normal_(weights["pooler.dense.weight"], std=self.config.initializer_range)
            warnings.warn(f"{source}: has no pooler; a new one is made, which only --moe would use")

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors`; `transformers` can open the directory."""
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        with atomic_write(Path(directory) / "model.safetensors") as temporary:
            temporary.write_bytes(save(weights, metadata={"format": "pt"}))
        with atomic_write(Path(directory) / "config.json") as temporary:
            temporary.write_text(self.config.to_json(), encoding="utf-8")


def read_weights(path: Path, find: Callable[[str], Path | None]) -> dict[str, torch.Tensor]:
    """Read the tensors of a `.safetensors` file, of a `torch.save` file (`weights_only=True`), or of
    all files that an index names. `find` returns the path of a file in the same folder."""
    if path.suffix == ".json":
        shards = [read_weights(shard, find) for shard in _find_shards(path, find)]
        return {name: tensor for shard in shards for name, tensor in shard.items()}
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        # SafetensorError, OSError, and whatever a damaged header makes of PyTorch and NumPy.
        except Exception as error:
            reason = shortened(one_line(error))
            raise UserError(f"{path}: not a readable weights file ({reason})") from error
    weights = load_torch_file(path)
    if isinstance(weights, dict) and "bert_config" in weights:
        raise UserError(
            f"{path}: a checkpoint of this project, not an encoder; "
            "to start from it, give it with --init_from instead of --bert_model"
        )
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in weights.items()
    ):
        raise UserError(f"{path}: not a weights file: it holds no table of tensors")
    return weights


def _find_shards(index: Path, find: Callable[[str], Path | None]) -> list[Path]:
    places = read_json_table(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index}: not an index of weights")
    names = set(places.values())
    # A path could lead anywhere.
    paths = {name: find(name) for name in sorted(names) if name == Path(name).name}
    if missing := [name for name in names if not paths.get(name)]:
        raise UserError(f"{index}: {listed(missing, 'files are not in its folder')}")
    return [path for path in paths.values() if path]


def encoder_weights(weights: dict[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """Give the weights of the encoder the names that `BertModel` has, and convert them to float32.

    Removes a common prefix (`bert.`, `module.`, ...) and stored ids, and renames `gamma`
    and `beta` to `weight` and `bias`. Passes over the weights of heads, with a warning.
    """
    prefixes = [name.removesuffix(WORDS) for name in weights if f".{name}".endswith(f".{WORDS}")]
    if len(prefixes) != 1:
        raise UserError(f"{source}: has {len(prefixes)} weights named {WORDS}, not one")
    parts = tuple(prefixes[0] + part for part in ("embeddings.", "encoder.", "pooler."))
    if others := [name for name in weights if not name.startswith(parts)]:
        warnings.warn(f"{source}: {listed(others, 'weights of other heads are not used')}")
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if name.startswith(parts):
            name = name.removeprefix(prefixes[0]).replace("LayerNorm.gamma", "LayerNorm.weight")
            name = name.replace("LayerNorm.beta", "LayerNorm.bias")
            if name in renamed:
                raise UserError(f"{source}: holds {name} twice under different names")
            renamed[name] = tensor.to(torch.float32)
    buffers = "embeddings.position_ids", "embeddings.token_type_ids"
    return {name: tensor for name, tensor in renamed.items() if name not in buffers}


def _check_fit(model: nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Raise UserError unless the model has exactly these weights; it names the first misfits."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    misfits = {
        "missing": wanted.keys() - given.keys(),
        "left over": given.keys() - wanted.keys(),
        "of the wrong shape": {
            f"{name} {given[name]} instead of {shape}"
            for name, shape in wanted.items()
            if given.get(name, shape) != shape
        },
    }
    found = {kind: names for kind, names in misfits.items() if names}
    if found:
        start = f"{source}: these weights do not fit this BERT; "
        room = (LONGEST_ERROR - len(start)) // len(found) - len("; ")
        lists = [listed(names, kind, room) for kind, names in found.items()]
        raise UserError(start + "; ".join(lists))


def listed(names: Iterable[str], what: str, length: int = LONGEST_ERROR // 2) -> str:
    """Return how many names there are, and the first ones."""
    names = sorted(names)
    return shortened(f"{len(names)} {what}: {', '.join(names)}", length)


def shortened(text: str, length: int = LONGEST_ERROR // 2) -> str:
    """Cut a text after a word so that it has at most `length` characters, or 40 if this is less."""
    return textwrap.shorten(text, max(length, 40), placeholder=" ...")
