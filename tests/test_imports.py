"""The house: who may import whom, how long a file may grow, and what stays out of it."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import adaptive

ROOT = Path(__file__).parents[1]
RUNTIME = ["quantize", "sealed", "memory", "texts", "session", "runtime", "run"]
GRAPHS = ["recipes", "onnx_graph", "graphs"]
# A file imports from rows above its own, and from files that stand before it in its row.
ROWS = [
    [],  # __init__.py imports nothing of ours: its names are looked up when they are asked for
    ["checked", "config", "policy", "costs", "calibration", "ranking", "drafting", "board", *RUNTIME],
    ["pretrained", "data", "prompts", "turned", "anatomy", "kv", "straight", "backbone", "placed", "losses", "screen"]
    + ["fills", "exits", "objective", "closed_form", *GRAPHS],
    ["lanes", "members", "record", "walk", "replay", "sampling", "verify", "decoding"],
    ["runs", "card", "storage", "model"],
    ["rows", "states", "gates", "measure", "outcomes", "survey", "choice", "certify"]
    + ["tally", "descent", "scoring", "provenance", "metrics", "probing"],
    ["harness", "plain", "smooth", "parts", "folder", "export"],
]
PLACE = {name: (row, column) for row, names in enumerate(ROWS) for column, name in enumerate(names)}
LIGHT = ROWS[1]  # these run where torch is not installed
HEAVY = {
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "evaluate",
    "wandb",
    "safetensors",
    "huggingface_hub",
}
INTERNALS = ("transformers.models", "transformers.cache_utils", "transformers.masking_utils")
SCRIPTS = sorted(p.stem for folder in ("train", "eval") for p in (ROOT / folder).glob("*.py"))
LIBRARY = sorted((ROOT / "adaptive").glob("*.py"))
SOURCES = [*LIBRARY, *(p for folder in ("train", "eval") for p in sorted((ROOT / folder).glob("*.py")))]
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")


def imports(source: str, package: str = "") -> set[str]:
    """Dotted names of all that is imported anywhere in a source text; `from x import y` gives `x` and `x.y`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(part for part in (package if node.level else "", node.module or "") if part)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def ours(names: set[str]) -> set[str]:
    """The modules (or, through the door, public names) of `adaptive` among dotted names."""
    return {name.split(".")[1] for name in names if name.startswith("adaptive.")} - {"__version__"}


def faults(stem: str, source: str) -> list[str]:
    """What a library file imports that its row does not allow."""
    names = imports(source, package="adaptive")
    tops = {name.split(".")[0] for name in names}
    found = [f"{other}: not above" for other in ours(names) if PLACE.get(other, (99, 0)) >= PLACE.get(stem, (0, 0))]
    found += [f"{top}: a script" for top in tops & {"train", "eval", *SCRIPTS}]
    found += [f"{top}: too heavy for row 1" for top in tops & HEAVY if stem in ("__init__", *LIGHT)]
    if stem not in ("backbone", "kv"):
        found += [f"{name}: inside transformers" for name in names if name.startswith(INTERNALS)]
    return sorted(found)


def test_the_check_itself_sees_each_fault():
    assert faults("costs", "def f():\n    from adaptive.policy import Trace") == []
    assert faults("policy", "from adaptive.costs import price") == ["costs: not above"]
    assert faults("exits", "from . import __version__, kv, model") == ["model: not above"]
    assert faults("exits", "from adaptive import EarlyExitModel") == ["EarlyExitModel: not above"]
    assert faults("__init__", "from .config import ExitConfig") == ["config: not above"]
    assert faults("policy", "def f():\n    import torch.nn") == ["torch: too heavy for row 1"]
    assert faults("data", "import train.text") == ["train: a script"]
    code = "from transformers.models.llama import modeling_llama\nfrom transformers import AutoModel, cache_utils"
    inside = {"transformers.cache_utils", "transformers.models.llama", "transformers.models.llama.modeling_llama"}
    assert {fault.split(":")[0] for fault in faults("model", code)} == inside
    assert faults("backbone", code) == []


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.name)
def test_library_files_import_only_from_above(path):
    assert path.stem == "__init__" or path.stem in PLACE, f"give {path.name} a row in ROWS"
    assert faults(path.stem, path.read_text()) == []


@each_source
def test_scripts_import_no_scripts(path):
    if path.parent.name != "adaptive":
        names = imports(path.read_text())
        assert not {name.split(".")[0] for name in names} & {"train", "eval", *SCRIPTS}
        assert not [name for name in names if name.startswith(INTERNALS)]
        # Its folder comes first on the path: a script of that name would stand in for the package.
        assert path.stem not in HEAVY


@each_source
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    num_lines = text.count("\n")
    assert num_lines <= 350, "one concept too many: split it"
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 60] == []


def test_the_door_is_light():
    code = "import sys, adaptive; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "adaptive" in loaded and not HEAVY & set(loaded) and "numpy" not in loaded


def test_public_names_are_found_when_asked_for():
    assert len(adaptive.__all__) <= 8 and set(adaptive.__all__) <= set(dir(adaptive))
    homes = {name: f"adaptive.{home}" for name, home in adaptive._HOMES.items()}
    for name in [name for name, home in homes.items() if importlib.util.find_spec(home)]:
        assert getattr(adaptive, name).__module__ == homes[name]
    with pytest.raises(AttributeError, match="no attribute `Nothing`; it offers .*ExitConfig"):
        adaptive.Nothing  # noqa: B018


def test_no_machine_is_named():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(?<![\w.~-])/(?:root|work|home/\w+|opt)/")
    files = [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    assert [str(f) for f in files if pattern.search(f.read_text(errors="ignore"))] == []
    assert pattern.search("cd /" + "work/x") and not pattern.search("docs/work/x")
