"""Which part of the package may import which, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rlhf_lightning

PACKAGE = Path(rlhf_lightning.__file__).parent
GROUND = {"types", "errors", "jsonl", "random_states"}
MAY_IMPORT = {
    "errors": set(),
    "jsonl": set(),
    "random_states": set(),
    "types": set(),
    "functional": set(),
    "networks": GROUND | {"functional"},
    "rollout": GROUND | {"functional", "networks"},
    "preflight": GROUND | {"functional", "networks", "rollout"},
    "modules": GROUND | {"functional", "networks", "rollout", "preflight", "callbacks"},
    "data": GROUND,
    "callbacks": GROUND,
    "world": GROUND,
    "evaluation": GROUND | {"functional", "networks", "rollout", "modules", "data", "callbacks", "world"},
}


def imports(node: ast.AST) -> Iterator[str]:
    """Dotted names that are imported at run time, at the top of a file or inside of a function."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        for name in node.names:
            yield f"{node.module}.{name.name}"
    if isinstance(node, ast.Import):
        for name in node.names:
            yield name.name
    for child in ast.iter_child_nodes(node):
        yield from imports(child)


def imported_parts(part: str) -> set[tuple[str, str]]:
    """Pairs of a file of ``part`` and another part that it imports."""
    path = PACKAGE / part
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    found = set()
    for file in files:
        for name in imports(ast.parse(file.read_text(encoding="utf-8"))):
            words = name.split(".")
            if words[0] == PACKAGE.name and words[1] != part:
                found.add((str(file.relative_to(PACKAGE)), words[1]))
    return found


def test_the_reader_of_imports_finds_them_at_any_depth_and_skips_those_for_types() -> None:
    source = "import a.b\nif TYPE_CHECKING:\n    import c\ndef f():\n    from d.e import g, h\n"
    assert list(imports(ast.parse(source))) == ["a.b", "d.e.g", "d.e.h"]


def test_every_part_has_a_place_in_the_order() -> None:
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert parts - {"__init__", "cli", "conf"} == set(MAY_IMPORT)


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_point_one_way(part: str) -> None:
    assert {(file, other) for file, other in imported_parts(part) if other not in MAY_IMPORT[part]} == set()


def test_the_command_reaches_modules_only_through_hydra_targets() -> None:
    assert {(file, other) for file, other in imported_parts("cli") if other == "modules"} == set()


@pytest.mark.parametrize("word", ["util", "common", "helper", "manager"])
def test_no_file_is_named_after_nothing(word: str) -> None:
    assert [path for path in PACKAGE.rglob("*.py") if word in path.stem] == []


def test_the_package_and_its_error_are_imported_without_torch() -> None:
    program = (
        "import sys, rlhf_lightning; from rlhf_lightning import InputError; dir(rlhf_lightning); "
        "assert not {'torch', 'transformers', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("name", rlhf_lightning.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert vars(sys.modules[getattr(rlhf_lightning, name).__module__])[name] is getattr(rlhf_lightning, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'Missing'"):
        rlhf_lightning.Missing  # noqa: B018


MODULES = sorted(str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if file.name != "__init__.py")


@pytest.mark.parametrize("module", MODULES)
def test_each_module_has_its_test_file_at_the_same_place(module: str) -> None:
    mirrored = Path(__file__).parent / module
    assert mirrored.with_name(f"test_{mirrored.name}").is_file()
