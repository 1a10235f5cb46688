"""Who may import whom: no room reaches upward, and what plans or lists needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS = [  # each row may import the rows before it; within a row nobody imports a neighbour
    {"settings", "sizes", "layout", "inputs", "objectives", "optim", "precision", "spikes", "validation"}
    | {"stopping", "heartbeat", "progress", "pages", "writable"},
    {"flops", "buckets", "windows"},
    {"recipe"},
    {"cluster", "node", "batch", "flow", "prompts", "video_files", "watch", "utilisation"},
    {"diffusion"},
    {"training_objective"},
    {"data", "tae", "text_encoders", "video", "live", "planning"},
    {"sampling"},
    {"training"},
    {"encode", "generation", "report_charts", "report_samples", "launch"},
    {"curation", "bench", "submit", "preflight", "preflight_network"},
    {"evaluation"},
    {"report_scores"},
    {"report"},
    {"recipes"},
    {"tables", "demo_stages", "arguments"},
    {"demo"},
    {"commands"},
    {"__main__", "nemo_cli"},
]
NO_TORCH = (
    "settings",
    "sizes",
    "layout",
    "inputs",
    "objectives",
    "optim",
    "precision",
    "spikes",
    "validation",
    "progress",
    "windows",
    "stopping",
    "heartbeat",
    "pages",
    "writable",
    "flops",
    "recipe",
    "buckets",
    "cluster",
    "node",
    "launch",
    "submit",
    "preflight",
    "watch",
    "utilisation",
    "planning.plan",
    "planning.published",
    "planning.search",
    "live.page",
    "live.screen",
    "tables",
    "arguments",
    "__main__",
)
HEAVY = (
    "torch",
    "numpy",
    "nemo",
    "megatron",
    "lightning",
    "transformers",
    "nvidia",
    "nemo_run",
    "matplotlib",
)
FILES = sorted([*(ROOT / "nemo_moviegen").rglob("*.py"), *(ROOT / "recipes").glob("*.py")])


def room(module):
    """The room of a module of ours: its name below nemo_moviegen, or recipes; "" for any other."""
    parts = module.split(".")
    if parts[0] == "recipes":
        return "recipes"
    return parts[1] if parts[0] == "nemo_moviegen" and len(parts) > 1 else ""


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported_modules(path):
    """Modules a file imports, also those inside functions; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rank(name, path):
    rows = [index for index, row in enumerate(ROWS) if name in row]
    assert rows, f"{path}: the room {name!r} is in no row of ROWS; say what it may import"
    return rows[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_room_imports_upward_or_sideways(path):
    own = room(module_of(path))
    if own in ("", "__init__"):  # the package itself
        assert not [module for module in imported_modules(path) if room(module)]
        return
    for module in imported_modules(path):
        other = room(module)
        if other and other != own:
            assert rank(other, path) < rank(own, path), f"{own} imports {module}, which is not below it"


@pytest.mark.parametrize(
    ("package", "rooms"),
    [
        ("nemo.lightning", {"training"}),
        ("megatron", {"training", "video"}),
        ("transformer_engine", {"video"}),
        ("nvidia.dali", {"data"}),
        ("nemo_run", {"nemo_cli"}),
    ],
)
def test_foreign_packages_stay_at_the_edge(package, rooms):
    users = {
        room(module_of(path))
        for path in FILES
        for module in imported_modules(path)
        if module == package or module.startswith(f"{package}.")
    }
    assert users <= rooms


def test_plain_numbers_and_the_command_line_import_no_torch():
    modules = ", ".join(f"nemo_moviegen.{name}" for name in NO_TORCH)
    code = f"import sys, recipes, {modules}; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"


def test_what_makes_videos_and_measures_them_starts_without_lightning_and_nemo():
    """They take ten seconds to import, of a demo's every stage."""
    modules = ["generation.generate", "evaluation.shapes", "evaluation.measuring", "encode", "report"]
    modules += ["report_samples", "training.autoencoder_weights", "training.checkpoint", "training.place"]
    code = "import sys\n" + "".join(f"import nemo_moviegen.{module}\n" for module in modules)
    code += "print(sorted({'lightning', 'nemo', 'torchmetrics', 'megatron'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
