"""Dependencies point one way: who may import whom, read from the source of every file."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SCIENCE = {"models", "saes", "training", "discovery", "steering", "export", "demo"}

MAY_IMPORT = {
    "api": {"api"},
    **{name: {"api"} | SCIENCE for name in SCIENCE},
    "runtime": {"api", "runtime"},
    "handlers": {"api", "runtime", "handlers"} | SCIENCE,
    "server": {"api", "runtime", "handlers", "server"} | SCIENCE,
    "mistudio_mcp": {"api", "mistudio_mcp"},
    "mistudio_widgets": {"api", "mistudio_widgets"},
}
"""For each package the packages of ours that it may import."""

EXCEPTIONS = {
    ("server/app.py", "mistudio_mcp"): "the one place that mounts the MCP door",
    ("server/cli.py", "mistudio_mcp"): "`mistudio mcp` starts the stdio process",
    ("api/progress.py", "mistudio_widgets"): "a notebook's progress is a widget, imported when one is shown",
}

SCIENCE_EDGES = {
    "models": set(),
    "saes": set(),
    "training": {"models", "saes"},
    "discovery": {"models", "saes"},
    "steering": {"models", "saes"},
    "export": {"saes"},
    "demo": {"models", "saes", "discovery"},
}
"""Within the science, too, nothing goes round in a circle."""

NO_TORCH = {"api", "runtime", "mistudio_mcp", "mistudio_widgets"}
HEAVY = {"torch", "transformers", "datasets", "safetensors", "tokenizers"}


def package_of(module: str) -> str | None:
    """`api` of `mistudio_engine.api.records`, `mistudio_mcp` of `mistudio_mcp.text`; None for what is not ours."""
    parts = module.split(".")
    if parts[0] in ("mistudio_mcp", "mistudio_widgets"):
        return parts[0]
    return parts[1] if parts[0] == "mistudio_engine" and len(parts) > 1 and parts[1] in MAY_IMPORT else None


def files() -> list[tuple[str, Path]]:
    found = [
        (path.relative_to(ROOT / "mistudio_engine").parts[0], path) for path in (ROOT / "mistudio_engine").rglob("*.py")
    ]
    found = [(package, path) for package, path in found if not package.endswith(".py")]
    for name in ("mistudio_mcp", "mistudio_widgets"):
        found += [(name, path) for path in (ROOT / name).rglob("*.py") if "node_modules" not in path.parts]
    return found


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, `if TYPE_CHECKING` included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


@pytest.mark.parametrize(("package", "path"), files(), ids=lambda value: str(getattr(value, "name", value)))
def test_a_file_imports_only_what_its_package_may(package: str, path: Path) -> None:
    name = (
        str(path.relative_to(ROOT / "mistudio_engine"))
        if package not in ("mistudio_mcp", "mistudio_widgets")
        else path.name
    )
    for module in imports(path):
        target = package_of(module)
        if target is None or (name, target) in EXCEPTIONS:
            continue
        assert target in MAY_IMPORT[package], f"{name} imports {module}, which {package} may not"
        if package in SCIENCE and target in SCIENCE and target != package:
            assert target in SCIENCE_EDGES[package], f"{name} imports {module}: {package} does not build on {target}"


@pytest.mark.parametrize(
    ("package", "path"), [each for each in files() if each[0] in NO_TORCH], ids=lambda v: str(getattr(v, "name", v))
)
def test_nothing_outside_the_science_imports_torch(package: str, path: Path) -> None:
    heavy = {module.split(".")[0] for module in imports(path)} & HEAVY
    assert not heavy, f"{path.name} imports {heavy}"


@pytest.mark.parametrize(
    "module",
    [
        "mistudio_engine",
        "mistudio_engine.api.operations",
        "mistudio_engine.api.client",
        "mistudio_mcp",
        "mistudio_mcp.server",
        "mistudio_widgets",
    ],
)
def test_clients_start_without_torch(module: str) -> None:
    code = f"import sys, {module}; assert not {{'torch', 'transformers', 'datasets'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def imported_at_once(path: Path) -> set[str]:
    """The modules that importing a file imports: those of its top level."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


@pytest.mark.parametrize("client", ["openai", "ollama"])
def test_an_engine_starts_without_the_clients_of_servers_that_it_may_never_ask(client: str) -> None:
    handlers = sorted((ROOT / "mistudio_engine" / "handlers").glob("*.py"))
    seen, waiting = set(handlers), list(handlers)
    while waiting:
        path = waiting.pop()
        modules = imported_at_once(path)
        assert client not in modules, f"{path.name} is imported at the start and imports {client}"
        ours = {ROOT.joinpath(*module.split(".")).with_suffix(".py") for module in modules}
        new = {each for each in ours if each.is_file() and ROOT / "mistudio_engine" in each.parents} - seen
        seen |= new
        waiting += new
    assert ROOT / "mistudio_engine" / "discovery" / "embedding.py" in seen


def test_every_exception_is_still_needed() -> None:
    for (name, target), reason in EXCEPTIONS.items():
        path = ROOT / "mistudio_engine" / name
        assert any(package_of(module) == target for module in imports(path)), (
            f"{name} no longer imports {target}: {reason}"
        )
