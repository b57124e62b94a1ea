"""BertConfig, and how a BERT's weights are read and written in Hugging Face's layout."""

import dataclasses
import json
import math
import reprlib
import textwrap
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save
from torch import nn

from utils import (
    UserError,
    atomic_write,
    find_pretrained,
    load_torch_file,
    one_line,
    without_weights,
)

TAG_TABLES = "pos_tag_embeddings.weight", "ner_tag_embeddings.weight"
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
LONGEST_ERROR = 300
# Keys of a config.json that change the computation, with the only value that this BERT supports.
ONLY_SUPPORTED = {
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


def _is_size(name: str, value: Any) -> bool:
    smallest = 0 if name in ("pad_token_id", "num_pos_tags", "num_ner_tags") else 1
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
    str: (f"one of {', '.join(ACTIVATIONS)}", lambda name, value: value in ACTIVATIONS),
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
    pad_token_id: int = 0
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
        if not problems and self.pad_token_id >= self.vocab_size:
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
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a readable config.json ({one_line(error)})") from error
        if not isinstance(values, dict):
            raise UserError(f"{path}: not a config.json: it holds no table of settings")
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
                or `minilm` (all-MiniLM-L6-v2 from the package that utils.py names).
            local_files_only: use the files on this disk and download nothing.
            overrides: settings of `BertConfig` that replace those of `config.json`.

        Raises:
            UserError: files are missing or damaged, or the weights do not fit.
        """
        config_path = find_pretrained(name_or_path, "config.json", local_files_only)
        if config_path is None:
            raise UserError(f"{name_or_path}: no config.json found{_hint(local_files_only)}")
        config = BertConfig.from_json_file(config_path, **overrides)
        weights_path = _find_weights(name_or_path, local_files_only)
        weights = with_our_names(read_weights(weights_path), str(weights_path))
        # Weights that are replaced take no time and no random numbers.
        with without_weights():
            model = cls(config)
        # A BERT without tag embeddings gets new ones.
        if not any(name.endswith(TAG_TABLES) for name in weights):
            for name, table in model.state_dict().items():
                if name.endswith(TAG_TABLES):
                    weights[name] = torch.zeros(table.shape)
        _check_fit(model, weights, str(weights_path))
        model.load_state_dict(weights, assign=True)
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors`; `transformers` can open the directory."""
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        with atomic_write(Path(directory) / "model.safetensors") as temporary:
            temporary.write_bytes(save(weights, metadata={"format": "pt"}))
        with atomic_write(Path(directory) / "config.json") as temporary:
            temporary.write_text(self.config.to_json(), encoding="utf-8")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a `.safetensors` file or of a `torch.save` file (`weights_only=True`)."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        # SafetensorError, OSError, and whatever a damaged header makes of PyTorch and NumPy.
        except Exception as error:
            reason = shortened(one_line(error))
            raise UserError(f"{path}: not a readable weights file ({reason})") from error
    weights = load_torch_file(path)
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in weights.items()
    ):
        raise UserError(f"{path}: not a weights file: it holds no table of tensors")
    return weights


def with_our_names(weights: dict[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """Give weights the names that `BertModel` has, and convert them to float32.

    Removes the prefix `bert.`, the pre-training heads (`cls.*`) and stored `position_ids`, and
    renames `gamma` and `beta` to `weight` and `bias`.
    """
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith("cls.") or name.endswith("embeddings.position_ids"):
            continue
        name = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if name in renamed:
            raise UserError(f"{source}: holds {name} twice under different names")
        renamed[name] = tensor.to(torch.float32)
    return renamed


def _find_weights(name_or_path: str | Path, local_files_only: bool) -> Path:
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    for filename in ("model.safetensors", "pytorch_model.bin"):
        if path := find_pretrained(name_or_path, filename, local_files_only):
            return path
    problem = "no model.safetensors and no pytorch_model.bin found"
    raise UserError(f"{name_or_path}: {problem}{_hint(local_files_only)}")


def _hint(local_files_only: bool) -> str:
    return " on this machine (--local_files_only downloads nothing)" if local_files_only else ""


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
    found = {kind: sorted(names) for kind, names in misfits.items() if names}
    if found:
        start = f"{source}: these weights do not fit this BERT; "
        room = (LONGEST_ERROR - len(start)) // len(found) - len("; ")
        lists = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in found.items()]
        raise UserError(start + "; ".join(shortened(names, room) for names in lists))


def shortened(text: str, length: int = LONGEST_ERROR // 2) -> str:
    """Cut a text after a word so that it has at most `length` characters, or 40 if this is less."""
    return textwrap.shorten(text, max(length, 40), placeholder=" ...")
