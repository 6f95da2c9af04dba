"""`_native.pyi` lists exactly what the compiled module exports: names, parameters, defaults."""

import ast
import inspect
import types
from pathlib import Path
from typing import Any

import pytest

import skvq
from skvq import _native

STUB = Path(skvq.__file__).with_name("_native.pyi")
TREE = ast.parse(STUB.read_text(encoding="utf-8"))
CLASSES = {node.name: node for node in TREE.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")}
FUNCTIONS = {node.name: node for node in TREE.body if isinstance(node, ast.FunctionDef)}
VARIABLES = {
    node.target.id for node in TREE.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
}

Parameter = tuple[str, Any, Any]  # name, kind, default


def public(names: Any) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def stub_parameters(function: ast.FunctionDef, *, bound: bool) -> list[Parameter]:
    """The parameters of a stub function, without `self` or `cls` if `bound`."""
    arguments = function.args
    others = [arguments.posonlyargs, arguments.vararg, arguments.kwarg]
    assert not any(others), f"{function.name}: positional-only and variadic parameters are not compared"
    missing = [inspect.Parameter.empty] * (len(arguments.args) - len(arguments.defaults))
    defaults = missing + [ast.literal_eval(default) for default in arguments.defaults]
    found = [
        (argument.arg, inspect.Parameter.POSITIONAL_OR_KEYWORD, default)
        for argument, default in zip(arguments.args, defaults, strict=True)
    ][1 if bound else 0 :]
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        value = inspect.Parameter.empty if default is None else ast.literal_eval(default)
        found.append((argument.arg, inspect.Parameter.KEYWORD_ONLY, value))
    return found


def module_parameters(function: Any) -> list[Parameter]:
    found = [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
    return found[1:] if found and found[0][0] == "self" else found


def is_property(function: ast.FunctionDef) -> bool:
    return any(isinstance(decorator, ast.Name) and decorator.id == "property" for decorator in function.decorator_list)


def is_setter(function: ast.FunctionDef) -> bool:
    return any(
        isinstance(decorator, ast.Attribute) and decorator.attr == "setter" for decorator in function.decorator_list
    )


def test_the_stub_is_installed_beside_the_module() -> None:
    assert STUB.is_file()
    assert STUB.with_name("py.typed").is_file()


def test_names() -> None:
    assert public(vars(_native)) == public(CLASSES.keys() | FUNCTIONS.keys() | VARIABLES)
    assert isinstance(_native.__version__, str)
    assert isinstance(_native.testing, types.ModuleType)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functions(name: str) -> None:
    assert stub_parameters(FUNCTIONS[name], bound=False) == module_parameters(getattr(_native, name))


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_classes(name: str) -> None:
    cls = getattr(_native, name)
    members = {
        node.name: node for node in CLASSES[name].body if isinstance(node, ast.FunctionDef) and not is_setter(node)
    }
    assert public(vars(cls)) == public(members)
    assert inspect.getdoc(cls)
    for member, node in members.items():
        if is_property(node):
            assert isinstance(vars(cls)[member], types.GetSetDescriptorType), member
        elif member == "__new__":
            assert stub_parameters(node, bound=True) == module_parameters(cls), member
        else:
            assert stub_parameters(node, bound=True) == module_parameters(vars(cls)[member]), member


def test_errors_are_value_errors() -> None:
    assert issubclass(_native.SkvqError, ValueError)
    assert _native.SkvqError.__module__ == "skvq._native"
