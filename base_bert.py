"""BertConfig, and a BERT's weights in and out in Hugging Face's layout and names."""

import dataclasses
import json
import math
from pathlib import Path

import torch
from torch import nn

from utils import UserError, atomic_write, find_pretrained, load_torch_file, one_line

TAG_TABLES = "pos_tag_embeddings.weight", "ner_tag_embeddings.weight"
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


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
    num_pos_tags: int = 0  # sizes of the tables of tag embeddings, id 0 included; 0: a plain BERT
    num_ner_tags: int = 0

    def __post_init__(self):
        problems = [
            f"{name} must be {what}, not {value!r}"
            for name, value in vars(self).items()
            for what, valid in [_EXPECTED[type(getattr(BertConfig, name))]]
            if not valid(name, value)
        ]
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
            raise UserError("; ".join(problems))

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json_file(cls, path: Path, **overrides) -> "BertConfig":
        """Read a `config.json`; `overrides` replace its values.

        Keys that only other programs use are passed over. A key that would change what this BERT
        computes (relative positions, a decoder, another model type) is a UserError.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a readable config.json ({one_line(error)})") from error
        if not isinstance(values, dict):
            raise UserError(f"{path}: not a config.json: it holds no table of settings")
        for key, supported in _ONLY_SUPPORTED.items():
            if values.get(key, supported) not in (supported, None):
                raise UserError(f"{path}: {key} is {values[key]!r}; only {supported!r} is a BERT")
        names = {field.name for field in dataclasses.fields(cls)}
        given = {key: value for key, value in values.items() if key in names} | overrides
        try:
            return cls(**given)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def to_json(self) -> str:
        """The text of a `config.json` that `transformers` reads too."""
        fixed = {"architectures": ["BertModel"], "model_type": "bert", "dtype": "float32"}
        values = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if value or not name.endswith("_tags")
        }
        return json.dumps(fixed | values, indent=2, sort_keys=True) + "\n"


def _whole(name: str, value) -> bool:
    smallest = 0 if name in ("pad_token_id", "num_pos_tags", "num_ner_tags") else 1
    largest = 1000 if name == "num_hidden_layers" else 10**7  # to build more would take for ever
    return isinstance(value, int) and not isinstance(value, bool) and smallest <= value <= largest


def _rate(name: str, value) -> bool:
    largest = 1.0 if name.endswith("_prob") else float("inf")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and 0 <= value <= largest


_EXPECTED = {  # a default's type -> what to say, how to check
    int: ("a positive whole number of a size in use", _whole),
    float: ("a number in its range", _rate),
    str: (f"one of {', '.join(ACTIVATIONS)}", lambda name, value: value in ACTIVATIONS),
}
_ONLY_SUPPORTED = {
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


class BertPreTrainedModel(nn.Module):
    """Loading, saving and initialising; `BertModel` in bert.py has the layers."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config

    def init_weights(self) -> None:
        """Fresh weights as in BERT: normal with `initializer_range`, biases 0, LayerNorm 1. Tag
        embeddings start at 0, so that they leave what a BERT has learned as it is."""
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
    def from_pretrained(cls, name_or_path: str, local_files_only: bool = False, **overrides):
        """A BERT with trained weights.

        Args:
            name_or_path: a directory in Hugging Face layout (`config.json` with
                `model.safetensors` or `pytorch_model.bin`), one of these weights files, a hub id,
                or `minilm` (all-MiniLM-L6-v2 from the package named in utils.py).
            local_files_only: use what is on this disk, download nothing.
            overrides: settings of `BertConfig` that replace those of `config.json`.

        Raises:
            UserError: files missing or damaged, or weights that do not fit, with their names.
        """
        config_path = find_pretrained(name_or_path, "config.json", local_files_only)
        if config_path is None:
            raise UserError(f"{name_or_path}: no config.json found" + _hint(local_files_only))
        config = BertConfig.from_json_file(config_path, **overrides)
        weights_path = _find_weights(name_or_path, local_files_only)
        weights = with_our_names(read_weights(weights_path), str(weights_path))
        with torch.device("meta"):  # no time and no random numbers for weights to be replaced
            model = cls(config)
        if not any(name.endswith(TAG_TABLES) for name in weights):  # new to this BERT
            for name, table in model.state_dict().items():
                if name.endswith(TAG_TABLES):
                    weights[name] = torch.zeros(table.shape)
        _check_fit(model, weights, str(weights_path))
        model.load_state_dict(weights, assign=True)
        return model

    def save_pretrained(self, directory: str) -> None:
        """Write `config.json` and `model.safetensors`; `transformers` opens the directory."""
        from safetensors.torch import save

        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        with atomic_write(Path(directory) / "model.safetensors") as temporary:
            temporary.write_bytes(save(weights, metadata={"format": "pt"}))
        with atomic_write(Path(directory) / "config.json") as temporary:
            temporary.write_text(self.config.to_json(), encoding="utf-8")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.safetensors` file or of a `torch.save` file (`weights_only=True`)."""
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # SafetensorError, OSError, and what headers make of NumPy
            raise UserError(f"{path}: not a readable weights file ({one_line(error)})") from error
    weights = load_torch_file(path)
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in weights.items()
    ):
        raise UserError(f"{path}: not a weights file: it holds no table of tensors")
    return weights


def with_our_names(weights: dict[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """Hugging Face's names as `BertModel` has them, in float32: no `bert.` prefix, no
    pre-training heads (`cls.*`), no stored `position_ids`, `weight`/`bias` for `gamma`/`beta`."""
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith("cls.") or name.endswith("embeddings.position_ids"):
            continue
        name = name.removeprefix("bert.")
        for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
            if name.endswith("LayerNorm" + old):
                name = name.removesuffix(old) + new
        if name in renamed:
            raise UserError(f"{source}: holds {name} twice under different names")
        renamed[name] = tensor.to(torch.float32)
    return renamed


def _find_weights(name_or_path: str, local_files_only: bool) -> Path:
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    for filename in ("model.safetensors", "pytorch_model.bin"):
        path = find_pretrained(name_or_path, filename, local_files_only)
        if path is not None:
            return path
    raise UserError(
        f"{name_or_path}: no model.safetensors and no pytorch_model.bin found"
        + _hint(local_files_only)
    )


def _hint(local_files_only: bool) -> str:
    return " on this machine (--local_files_only downloads nothing)" if local_files_only else ""


def _check_fit(model: nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {
        f"{name} {tuple(weights[name].shape)} instead of {shape}"
        for name, shape in wanted.items()
        if name in weights and tuple(weights[name].shape) != shape
    }
    problems = {
        "missing": wanted.keys() - weights.keys(),
        "left over": weights.keys() - wanted.keys(),
        "of the wrong shape": shapes,
    }
    found = [f"{what}: {', '.join(sorted(names))}" for what, names in problems.items() if names]
    if found:
        raise UserError(f"{source}: these weights do not fit this BERT; " + "; ".join(found))
