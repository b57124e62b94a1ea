"""The pages are true: commands parse, links lead somewhere, bounds hold, generated parts are current."""

import contextlib
import io
import itertools
import re
import shlex

import pytest
from conftest import ROOT

import experiments
import predict
import report
import result_tables
import synthetic
from flags import build_parser, flags_page
from options import parse_options
from significance import difference

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ]
}
LONGEST_ROW = {"README.md": 110}  # of tables; elsewhere 100
MOST_COLUMNS = 6


def parse_experiments(arguments):
    args, flags = experiments.parse(arguments)
    if args.command == "run":
        parse_options(flags)


PARSERS = {
    "multitask_classifier.py": parse_options,
    "hpo.py": lambda words: words[0] in ("list", "plot") or parse_options(["--hpo", *words]),
    "experiments.py": parse_experiments,
    "synthetic.py": synthetic.parse,
    "predict.py": predict.parse,
    "report.py": report.parse,
}


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def commands(text):
    """Yield the commands in blocks of shell code, and those in running text that name a program."""
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield from block.replace("\\\n", " ").splitlines()
    for span in re.findall(r"`([^`]+)`", without_code(text)):
        if span.startswith(("python ", "./run_", "sbatch ", "torchrun ")):
            yield " ".join(span.split())


def arguments_of(command):
    """Return (program, arguments) of a command that starts one of ours; else None."""
    words = shlex.split(command, comments=True)
    for number, word in enumerate(words):
        if word in PARSERS:
            own = itertools.takewhile(lambda word: word[:1] not in ("|", "<", ">"), words[number:])
            return word, list(own)[1:]
        if word.removeprefix("./") == "run_hpo.sh":
            return "hpo.py", words[number + 1 :]
        if word.removeprefix("./") in ("run_train.sh", "run_demo.sh"):
            return "multitask_classifier.py", words[number + 1 :]
        if word.startswith("benchmarks/"):
            return word, words[number + 1 :]
    return None


COMMANDS = sorted({(page, command) for page, text in PAGES.items() for command in commands(text)})


@pytest.mark.parametrize("page, command", COMMANDS)
def test_commands_have_flags_that_exist(page, command, tmp_path, monkeypatch):
    if (found := arguments_of(command)) is None:
        return
    program, arguments = found
    if program.startswith("benchmarks/"):
        text = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
        assert (ROOT / program).exists()
        flags = [word.split("=")[0] for word in arguments if word.startswith("--")]
        assert all(f'"{flag}"' in text for flag in flags)
        return
    # A search writes the one, docs/tasks.md shows the other; every other file that a command reads is
    # in the repository.
    task_file = tmp_path / "my.toml"
    task_file.write_text(re.findall(r"^```toml\n(.*?)^```", PAGES["docs/tasks.md"], re.M | re.S)[0])
    elsewhere = {"best_config.json": "recipes/best.json", "my.toml": str(task_file)}
    arguments = [elsewhere.get(word.rpartition("/")[2], word) for word in arguments]
    if "--help" in arguments or "-h" in arguments:
        return
    # The checkpoints of the pages are not there to be read.
    monkeypatch.setattr(report, "options_of", parse_options)
    with contextlib.chdir(ROOT), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            PARSERS[program](arguments)
        except SystemExit:
            pytest.fail(f"{page}: {command}: {errors.getvalue()}")


def anchors(text):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder, wrong = (ROOT / page).parent, []
    inline, below = r"\]\(([^)\s]+)\)", r"^\[[^]]+\]: (\S+)$"
    text = without_code(PAGES[page])
    for link in re.findall(inline, text) + re.findall(below, text, re.MULTILINE):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (folder / name).resolve() if name else ROOT / page
        if not target.exists() or ROOT not in [target, *target.parents]:
            wrong.append(link)
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            wrong.append(link)
    assert not wrong


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    named = re.findall(r"`((?:\w+/)*[\w.-]+\.(?:py|sh|j2|toml|txt|yml))`", PAGES[page])
    folders = ".", "tests", "benchmarks", "data/sample"
    wrong = [
        name
        for name in named
        if "NAME" not in name and not any((ROOT / folder / name).exists() for folder in folders)
    ]
    assert not wrong


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_narrow(page):
    rows = [line for line in without_code(PAGES[page]).splitlines() if line.startswith("|")]
    longest = LONGEST_ROW.get(page, 100)
    assert not [row for row in rows if len(row) > longest]
    assert not [row for row in rows if len(re.findall(r"(?<!\\)\|", row)) > MOST_COLUMNS + 1]


def test_pages_are_short():
    """Tables that experiments.py writes do not count: they grow with the results."""
    written = re.compile(r"<!-- experiments:.*?<!-- /experiments -->", re.DOTALL)
    by_hand = {page: written.sub("", text).splitlines() for page, text in PAGES.items()}
    assert len(PAGES["README.md"].splitlines()) <= 220
    assert len(PAGES["README.md"].encode()) <= 18 * 1024
    assert not [page for page, lines in by_hand.items() if len(lines) > 250]


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_pages_lead_back_to_the_readme(page):
    assert "](../README.md)" in "".join(PAGES[page].splitlines()[:5])
    assert page in PAGES["README.md"]


def test_pictures_have_a_text():
    images = [image for text in PAGES.values() for image in re.findall(r"!\[(.*?)\]\(", text)]
    assert images and all(images)


def test_the_page_of_flags_is_what_the_parser_says():
    assert PAGES["docs/flags.md"] == flags_page()


def test_every_flag_that_a_page_names_exists():
    """Of any program; `--NAME_...` stands for a task's flag."""
    known = set(build_parser()._option_string_actions)
    others = [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *(ROOT / "benchmarks").glob("*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in others)
    foreign = {
        "--me",
        "--gres",
        "--pty",
        "--no-verify",
        "--nproc_per_node",
        "--logdir",
        "--bind_all",
    }
    wrong = {}
    for page, text in PAGES.items():
        flags = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", text)) - known - foreign
        if missing := sorted(flag for flag in flags if flag not in source):
            wrong[page] = missing
    assert not wrong


def test_generated_tables_are_current(monkeypatch):
    """If this fails: python experiments.py table --write"""
    monkeypatch.chdir(ROOT)
    pages = [page for page, text in PAGES.items() if "<!-- experiments:" in text]
    assert {"README.md", "docs/results.md", "docs/results-variants.md"} == set(pages)
    for page in pages:
        assert result_tables.filled_in(ROOT / page) == PAGES[page]


COMPARED = re.compile(
    r"\b(changes|changed|(better|best|worse|worst|higher|lower|gain|improve|help|hurt|beat|lose|lost|"
    r"raise|rise|rose|fall|fell|differ)(s|d|ed)?)\b"
)
SCORED = re.compile(r"\b(sentiment|paraphrase|similarity|means?|scores?|tasks?|together)\b", re.I)
INTERVAL = re.compile(r"[-+]0\.\d+ to [-+]0\.\d+")
RECIPES = {
    str(path.relative_to(ROOT / "recipes"))[:-5] for path in ROOT.glob("recipes/**/*.json")
} - {"best"}


def claims(text):
    """Return the sentences that compare recipes or scores. Questions, and what others found, do not."""
    found = []
    for sentence in re.split(r"(?<=[.?])\s+(?=[A-Z*`\[])|\n\n|\n- ", text):
        sentence = " ".join(sentence.split())
        words = re.sub("`.+?`", "", sentence).replace("best epoch", "")
        about = SCORED.search(words) or RECIPES & set(re.findall("`(.+?)`", sentence))
        asks = sentence.endswith("?") or re.search(r"original|report\b|published", sentence, re.I)
        if COMPARED.search(words) and about and not asks:
            found.append(sentence)
    return found


@pytest.fixture(scope="module")
def intervals():
    """Return all intervals in generated parts, and those of `best` for each task."""
    parts = re.findall(
        r"<!-- experiments:.*?<!-- /experiments -->", "".join(PAGES.values()), re.DOTALL
    )
    with contextlib.chdir(ROOT):
        rows = [s for s in result_tables.summarize() if s.cells["budget"] == "4 × 10,000"]
        best = next(s for s in rows if s.recipe == "best")
        linear = next(
            s for s in rows if s.recipe == "baseline-linear" and s.setting == best.setting
        )
        pairs = result_tables.pairs_of(linear, best).values()
    parts += [result_tables.format_difference(difference([pair])) for pair in pairs]
    return set(INTERVAL.findall(" ".join(" ".join(parts).split())))


@pytest.mark.parametrize("page, least", [("results", 1), ("results-variants", 1), ("variants", 5)])
def test_claims_about_recipes_have_an_interval(page, least, intervals):
    """The text by hand; the generated parts have one for each difference."""
    by_hand = without_code(PAGES[f"docs/{page}.md"])
    by_hand = re.sub(r"<!-- experiments:.*?<!-- /experiments -->", "", by_hand, flags=re.DOTALL)
    by_hand = re.sub(r"^[|#].*$", "", by_hand, flags=re.MULTILINE)
    assert not set(INTERVAL.findall(" ".join(by_hand.split()))) - intervals
    found = claims(by_hand)
    assert len(found) >= least
    assert not [claim for claim in found if not INTERVAL.search(claim)]


@pytest.mark.parametrize(
    "text, n_claims",
    {
        "`baseline` is better than `sophiag`.": 1,
        "With `sophiag`, training gained\nmuch.": 1,
        "Together, sentiment is worse: no interval.": 1,
        "A rate of 1e-4 is the best, by the mean.": 1,
        "`best` has other flags than `baseline`.": 0,
        "Is `baseline` better?": 0,
        "The original report has higher scores.": 0,
    }.items(),
)
def test_sentences_that_compare_are_found(text, n_claims):
    assert len(claims(text)) == n_claims
