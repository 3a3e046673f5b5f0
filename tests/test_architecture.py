"""The floors of the house: a module imports only from lower floors or its own folder; nothing loads a pickle."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "modern_llm"

FLOORS: list[set[str]] = [
    {"config"},
    {"losses", "products", "secrets"},
    {
        "allocator",
        "layout",
        "distributed",
        "exit_codes",
        "checkpoint",
        "lock",
        "metrics",
        "precision",
        "hub",
        "foreign",
        "limits",
    },
    {"models", "data"},
    {"initial"},
    {"objectives", "evaluation"},
    {
        "training",
        "training.answers",
        "training.best",
        "training.checks",
        "training.in_backward",
        "training.ema",
        "training.garbage",
        "training.inputs",
        "training.muon",
        "training.optim",
        "training.speed",
        "training.loop",
        "training.preflight",
        "training.resume",
        "training.saving",
        "training.skipped",
        "training.stopping",
        "training.stage",
    },
    {"training.train_lm", "training.train_sft", "training.train_dpo"},
    {"", "reuse", "pipeline", "report", "lineage", "export", "cli", "__main__"},  # "" is modern_llm/__init__.py
]

SIBLINGS = {
    ("losses", "products"),
    ("checkpoint", "exit_codes"),
    ("limits", "distributed"),
    ("foreign", "hub"),
    ("lock", "checkpoint"),
    ("metrics", "checkpoint"),
    ("metrics", "exit_codes"),
    ("metrics", "distributed"),
    ("evaluation", "objectives"),
    ("training.in_backward", "training.muon"),
    ("training.optim", "training.in_backward"),
    ("training.preflight", "training.in_backward"),
    ("training.optim", "training.muon"),
    ("training.checks", "training.optim"),
    ("training.loop", "training.best"),
    ("training.loop", "training.ema"),
    ("training.loop", "training.garbage"),
    ("training.loop", "training.optim"),
    ("training.loop", "training.skipped"),
    ("training.loop", "training.speed"),
    ("training.loop", "training.stopping"),
    ("training.stage", "training.answers"),
    ("training.stage", "training.checks"),
    ("training.stage", "training.inputs"),
    ("training.stage", "training.optim"),
    ("training.stage", "training.loop"),
    ("training.stage", "training.preflight"),
    ("training.stage", "training.resume"),
    ("training.stage", "training.saving"),
    ("training.stage", "training.stopping"),
    ("training.stage", "training.speed"),
    ("pipeline", "report"),
    ("pipeline", "reuse"),
    ("cli", "report"),
    ("cli", "pipeline"),
    ("cli", "export"),
    ("cli", "lineage"),
    ("__main__", "cli"),
    ("", "pipeline"),
}
"""(importer, imported) on one floor; everything else on one floor is apart."""

FLOOR_OF = {unit: number for number, floor in enumerate(FLOORS) for unit in floor}
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path for path in FILES
}

MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 80


def unit_of(module: str) -> str:
    """The entry of the table that a module (without `modern_llm.`) belongs to: the longest that is a prefix of it."""
    while module not in FLOOR_OF:
        assert "." in module, f"modern_llm.{module} has no floor: give it one in tests/test_architecture.py"
        module = module.rpartition(".")[0]
    return module


def imported_modules(module: str, node: ast.AST) -> list[str]:
    """What an import statement in a module takes from the package, without `modern_llm.`; [] for any other node."""
    if isinstance(node, ast.Import):
        return [name.name.partition(".")[2] for name in node.names if name.name.split(".")[0] == "modern_llm"]
    if not isinstance(node, ast.ImportFrom):
        return []
    source = node.module or ""
    if node.level:
        is_package = MODULES[module].name == "__init__.py"
        above = ["modern_llm", *filter(None, module.split("."))]
        above = above[: len(above) - node.level + is_package]
        source = ".".join([*above, *([source] if source else [])])
    if source.split(".")[0] != "modern_llm":
        return []
    inside = source.partition(".")[2]
    names = [f"{inside}.{name.name}".lstrip(".") for name in node.names]
    return [name if name in MODULES else inside for name in names]


def package_imports(module: str) -> Iterator[tuple[ast.AST, str]]:
    """Every import of the package by a module, wherever it stands, except that of `cli` by a stage that is run as a program."""
    tree = TREES[MODULES[module]]
    lazy = {
        id(node)
        for block in tree.body
        if module.startswith("training.train_") and isinstance(block, ast.If)
        for node in ast.walk(block)
        if imported_modules(module, node) == ["cli"]
    }
    for node in ast.walk(tree):
        for imported in imported_modules(module, node):
            if id(node) not in lazy:
                yield node, imported


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_lower_floors_or_its_own_folder(module) -> None:
    unit = unit_of(module)
    wrong = []
    for node, imported in package_imports(module):
        other = unit_of(imported)
        if other != unit and (unit, other) not in SIBLINGS and FLOOR_OF[other] >= FLOOR_OF[unit]:
            wrong.append(f"line {node.lineno} imports modern_llm.{imported}")
    assert not wrong, f"modern_llm.{module} (floor {FLOOR_OF[unit]}): {wrong}"


def test_models_and_data_never_import_each_other() -> None:
    assert FLOOR_OF["models"] == FLOOR_OF["data"]
    assert not {("models", "data"), ("data", "models")} & SIBLINGS
    pairs = {(unit_of(module), unit_of(imported)) for module in MODULES for _, imported in package_imports(module)}
    assert not {("models", "data"), ("data", "models")} & pairs


def test_every_exception_of_the_table_is_in_use() -> None:
    used = {(unit_of(module), unit_of(imported)) for module in MODULES for _, imported in package_imports(module)}
    assert used >= SIBLINGS


def test_configs_load_neither_torch_nor_datasets_nor_transformers() -> None:
    code = "import sys, modern_llm.config as c; assert c.TrainingConfig(); print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "datasets", "transformers", "numpy"} & set(loaded)


def dotted(node: ast.expr) -> str:
    """`torch.load` for the expression that says so; "" for any other."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "multiprocessing"}
"""Modules that read pickles; processes of `multiprocessing` send each other nothing else."""

RUNS_CODE = {
    "torch.load", "torch.save", "torch.serialization.load", "torch.hub", "torch.jit.load", "torch.export.load",
    "torch.distributed.checkpoint", "torch.multiprocessing", "torch.package", "concurrent.futures.ProcessPoolExecutor",
    "dist.broadcast_object_list", "dist.all_gather_object", "dist.gather_object", "dist.scatter_object_list",
    "yaml.unsafe_load", "yaml.full_load", "yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader", "yaml.CLoader",
    "os.system", "os.popen", "eval", "exec", "compile", "__import__",
}  # fmt: skip
"""What runs code that comes from elsewhere, or may."""

ALWAYS = {
    "AutoModelForCausalLM.from_pretrained": {"trust_remote_code": False, "use_safetensors": True},
    "AutoTokenizer.from_pretrained": {"trust_remote_code": False},
    "AutoConfig.from_pretrained": {"trust_remote_code": False},  # left out, it asks on a terminal
    "np.load": {"allow_pickle": False},
    "np.save": {"allow_pickle": False},
}
"""What must be said in every call."""


def imports(node: ast.AST) -> list[str]:
    """The full names that an import statement takes."""
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    return [f"{node.module}.{name.name}" for name in node.names] if isinstance(node, ast.ImportFrom) else []


def dangers(tree: ast.AST) -> Iterator[str]:
    """Each way in which a module could run what it loads."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        for name in imports(node):
            if name.split(".")[0] in PICKLES or any(f"{name}.".startswith(f"{danger}.") for danger in RUNS_CODE):
                yield name
        if isinstance(node, ast.Attribute) and dotted(node) in RUNS_CODE:
            yield dotted(node)
        if isinstance(node, ast.Name) and node.id in RUNS_CODE and id(node) in called:
            yield node.id
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle", "shell"):
            allowed = isinstance(node.value, ast.Constant) and node.value.value is False
            yield from () if allowed else (f"{node.arg}=True",)
        if isinstance(node, ast.Call):
            given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            for word, value in ALWAYS.get(dotted(node.func), {}).items():
                if given.get(word, "left out") is not value:
                    yield f"{dotted(node.func)} without {word}={value}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_loads_pickles_or_remote_code(path) -> None:
    assert not list(dangers(TREES[path]))


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import multiprocessing.pool", "from torch import load", "eval(x)",
        "import torch.hub", "torch.hub.load(f)", "torch.load(f)", "from torch.distributed import checkpoint", "exec(x)",
        "dist.all_gather_object(a, b)", "yaml.load(x, Loader=yaml.Loader)", "subprocess.run(x, shell=True)", "os.system(x)",
        "np.load(f)", "np.load(f, allow_pickle=True)", "AutoConfig.from_pretrained(f)",
        "AutoConfig.from_pretrained(f, trust_remote_code=ask)",
        "AutoModelForCausalLM.from_pretrained(f, trust_remote_code=False)",
        "from concurrent.futures import ProcessPoolExecutor",
    ],
)  # fmt: skip
def test_the_search_for_pickles_and_remote_code_finds_them(code) -> None:
    assert list(dangers(ast.parse(code)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES_OF_A_FILE
    functions = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES_OF_A_FUNCTION} == {}
