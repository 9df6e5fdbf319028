"""The rules that Triton kernels keep, read off their source."""

import ast
import inspect
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(find_spec("unlearn_kernels.triton_kernels").origin).parent
FILES = sorted(FOLDER.rglob("*.py"))
BANNED = ("make_block_ptr", "autotune", "libdevice", "inline_asm_elementwise", "atomic_")


def called(node: ast.AST) -> str:
    """`tl.load` for a call of that name, else nothing."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def converted(tree: ast.AST) -> dict[ast.AST, str]:
    """What `.to(...)` is called on, and what it is converted to."""
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute))
    return {n.func.value: ast.unparse(n.args[0]) for n in calls if n.func.attr == "to" and n.args}


def banned_names(tree: ast.AST) -> Iterator[str]:
    """No removed API, no tuning at run time, no vendor library, no order that changes from run to run."""
    for node in ast.walk(tree):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if any(word in name for word in BANNED):
            yield name


def loads_unconverted(tree: ast.AST) -> Iterator[str]:
    """Every load is converted at once: the interpreter computes on the raw bits of bf16."""
    types = converted(tree)
    yield from (ast.unparse(n) for n in ast.walk(tree) if called(n) == "tl.load" and n not in types)


def ids_not_wide(tree: ast.AST) -> Iterator[str]:
    """Program ids are int64 before a stride multiplies them."""
    types = converted(tree)
    for node in ast.walk(tree):
        if called(node) == "tl.program_id" and types.get(node) != "tl.int64":
            yield ast.unparse(node)


def dots_unstated(tree: ast.AST) -> Iterator[str]:
    """TF32 is Triton's default."""
    for node in ast.walk(tree):
        if called(node) == "tl.dot":
            stated = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if stated.get("input_precision") != "'ieee'":
                yield ast.unparse(node)


Rule = Callable[[ast.AST], Iterator[str]]
BROKEN: dict[Rule, tuple[str, ...]] = {
    banned_names: ("tl.make_block_ptr(x)", "@triton.autotune([])\ndef f(): ...", "tl.atomic_add(p, v)"),
    loads_unconverted: ("x = tl.load(p)", "x = tl.load(p) + tl.load(q).to(tl.float32)"),
    ids_not_wide: ("i = tl.program_id(0) * stride", "i = tl.program_id(0).to(tl.int32)"),
    dots_unstated: ("tl.dot(x, y)", "tl.dot(x, y, input_precision='tf32')"),
}


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_kernels_keep(file: Path, rule: Rule) -> None:
    assert not list(rule(ast.parse(file.read_text()))), inspect.getdoc(rule)


@pytest.mark.parametrize(("rule", "code"), [(rule, code) for rule, codes in BROKEN.items() for code in codes])
def test_rule_sees(rule: Rule, code: str) -> None:
    assert list(rule(ast.parse(code)))


def jitted(tree: ast.Module) -> set[str]:
    """The kernels of a module: what a launch can name."""
    functions = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.endswith("_kernel"))
    return {f.name for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)}


def test_every_kernel_is_compiled_ahead_of_time() -> None:
    pytest.importorskip("triton")
    from unlearn_kernels.triton_kernels import aot

    kernels = set().union(*(jitted(ast.parse(file.read_text())) for file in FILES))
    assert kernels
    assert kernels == {case.kernel.__name__ for case in aot.cases()}
