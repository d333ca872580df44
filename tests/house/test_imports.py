"""What importing the package loads, and where its imports stand."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("mini_gpt_pl", "callbacks")
OPTIONAL = ("wandb", "datasets", "tiktoken", "pandas", "matplotlib", "scipy", "jinja2", "jsonargparse", "PIL")

LIGHT = """
import sys
import lightning.pytorch  # loads some of these by itself where they are installed
before = set(sys.modules)
import mini_gpt_pl.callbacks
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""

# As in an environment without the extras: these packages cannot be imported.
WITHOUT = """
import sys
import lightning.pytorch
missing = %r
for name in list(sys.modules):
    if name.split(".")[0] in missing:
        del sys.modules[name]
sys.modules.update(dict.fromkeys(missing))
import mini_gpt_pl.callbacks as callbacks
for name in callbacks.__all__:
    try:
        getattr(callbacks, name)
    except Exception as error:
        print(name, type(error).__name__, error)
"""


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_callbacks_load_nothing_that_draws_or_tabulates_or_reads_text() -> None:
    loaded = run(LIGHT).split()
    assert "mini_gpt_pl" in loaded
    assert set(OPTIONAL).isdisjoint(loaded)


def test_without_the_extras_a_callback_names_the_one_that_it_needs() -> None:
    said = run(WITHOUT % (OPTIONAL,)).splitlines()
    assert len(said) == 1
    assert said[0].startswith("GeometryPictures UserError this needs the package ")
    assert said[0].endswith("pip install 'mini_gpt_pl[report]'")


def inner_imports() -> Iterator[str]:
    """The file of each import of the package that stands inside a function."""
    for room in ROOMS:
        for file in sorted((ROOT / room).rglob("*.py")):
            for outer in ast.walk(ast.parse(file.read_text())):
                if not isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                for node in ast.walk(outer):
                    modules = (
                        [node.module or ""]
                        if isinstance(node, ast.ImportFrom)
                        else [alias.name for alias in node.names]
                        if isinstance(node, ast.Import)
                        else []
                    )
                    yield from (str(file.relative_to(ROOT)) for name in modules if name.startswith("mini_gpt_pl"))


def test_no_import_hides_in_a_function() -> None:
    """A circle between rooms shows at once, and the contracts are not got round."""
    assert list(inner_imports()) == []


@pytest.mark.parametrize("room", ROOMS)
def test_modules_are_named_by_string_in_few_places(room: str) -> None:
    """What is imported by its name in a string is out of the contracts' sight: the list of tasks, and what they say."""
    allowed = {
        "mini_gpt_pl/main.py",  # only the command that is asked for is loaded
        "mini_gpt_pl/tasks.py",  # the list of tasks
        "mini_gpt_pl/training/former_names.py",
        "mini_gpt_pl/training/trust.py",  # the classes that a configuration names
        "mini_gpt_pl/sweep/remote.py",  # wandb and submitit
        "mini_gpt_pl/dashboard/objects.py",  # wandb_workspaces
        "callbacks/__init__.py",  # one callback that draws
        "mini_gpt_pl/runs/__init__.py",  # a former name
    }
    users = {str(file.relative_to(ROOT)) for file in (ROOT / room).rglob("*.py") if "import_module" in file.read_text()}
    assert users <= allowed
