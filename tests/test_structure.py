"""The layout: which file may import which, and how long files and functions may be."""

import ast

import pytest
from conftest import ROOT

# From top to bottom: a file imports only files that come after it.
ORDER = """
    predict export modeling_multitask report synthetic predictor generators experiments comparison
    result_tables hpo search_space search_results multitask_classifier heads training checkpoint run_log options flags
    evaluation significance moe curvature balancing graphs batches optimizer datasets tables bert activations base_bert attention
    kernels tokenizer tagging profiler tasks pretrained utils processes streams
""".split()
LATE = {"modeling_multitask", "kernels"}  # need transformers, Triton
LONGEST_FILE, LONGEST_FUNCTION = 600, 50
FLAGS = {"flags"}  # a flag takes lines, not thought

TREES = {path.stem: ast.parse(path.read_text()) for path in sorted(ROOT.glob("*.py"))}


def imported(tree):
    """Return (name, line) of the modules that a tree imports, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0], node.lineno


def test_every_file_has_its_place():
    assert set(TREES) == set(ORDER)


@pytest.mark.parametrize("name", TREES)
def test_imports_go_down(name):
    below = ORDER[ORDER.index(name) + 1 :] if name in ORDER else []
    wrong = [
        f"line {line} imports {module}"
        for module, line in imported(TREES[name])
        if module in TREES and module not in below and module != name
    ]
    assert not wrong


@pytest.mark.parametrize("name", TREES)
def test_own_files_are_imported_at_the_top(name):
    """Only libraries that one option needs are imported in functions, and what needs such a library."""
    functions = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)]
    hidden = [
        f"line {line} imports {module}"
        for function in functions
        for module, line in imported(function)
        if module in TREES and module not in LATE
    ]
    assert not hidden


@pytest.mark.parametrize("name", TREES)
def test_files_and_functions_fit_on_a_screen(name):
    lines = len((ROOT / f"{name}.py").read_text().splitlines())
    assert lines <= LONGEST_FILE or name in FLAGS
    long = [
        f"{node.name}: {length} lines"
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for length in [node.end_lineno - node.lineno + 1]
        if length > LONGEST_FUNCTION and not (node.name == "parse" or node.name.startswith("add_"))
    ]
    assert not long


def test_the_entry_file_is_short():
    assert len((ROOT / "multitask_classifier.py").read_text().splitlines()) <= 600


@pytest.mark.parametrize("name", TREES)
def test_no_module_is_replaced(name):
    text = (ROOT / f"{name}.py").read_text()
    assert "sys.modules[" not in text


@pytest.mark.parametrize("name", TREES)
def test_docstrings_start_with_a_verb_or_name_the_thing(name):
    wrong = [
        f"line {node.lineno}: {text.splitlines()[0]}"
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)
        and (text := ast.get_docstring(node))
        and text.split()[0] in ("Of", "What", "From", "For", "As")
    ]
    assert not wrong
