"""Arithmetic expressions from a database, evaluated without Python's `eval`.

``caxev.handlers.corrections`` evaluates what calibrators wrote. Only what is named here has a
meaning: numbers, the names that are given, arithmetic, comparisons and a few functions; so nothing
can be reached that was not given. The text of sympy's ``Piecewise`` is understood, with ``Eq``,
``Ne``, ``And``, ``Or``, ``Not``, ``pi`` and ``E``::

    Piecewise((1.44e-4, t < 1478000000), (1.45e-4 + 1e-12 * (t - 1.478e9), True))

Pure.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

LONGEST: Final = 100_000
"""Characters that an expression may have."""

_OPERATORS: Final[Mapping[type[ast.AST], Callable[..., Any]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_LOGIC: Final[Mapping[type[ast.AST], Callable[..., bool]]] = {
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
}
_RELATIONS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    "Eq": operator.eq,
    "Ne": operator.ne,
}
# sympy's And and Or, and the names of Python's own ``and`` and ``or`` in its syntax tree.
_JOINED: Final[Mapping[str, Callable[[Iterable[bool]], bool]]] = {"And": all, "Or": any}
_CONSTANTS: Final[Mapping[str, float]] = {"pi": math.pi, "E": math.e}
_FUNCTIONS: Final[Mapping[str, Callable[..., float]]] = {
    "exp": math.exp,
    "log": math.log,
    "sqrt": math.sqrt,
    "sin": math.sin,
    "cos": math.cos,
    "tanh": math.tanh,
    "abs": abs,
    "Abs": abs,
    "min": min,
    "Min": min,
    "max": max,
    "Max": max,
}


class ExpressionError(ValueError):
    """The expression has no value; the message is why, in one line."""


def evaluate(text: str, names: Mapping[str, float]) -> float:
    """Return the value of an expression, a finite number, for these values of the names.

    Raises `ExpressionError` if it is no such expression, or has no value.
    """
    # Before parsing: the parser itself needs memory and stack for it.
    if len(text) > LONGEST:
        raise ExpressionError(f"it has {len(text)} characters, more than {LONGEST}")
    try:
        value = _number(ast.parse(text.strip(), mode="eval").body, names)
    except ExpressionError:
        raise
    except SyntaxError as error:
        raise ExpressionError(f"it is no expression: {error.msg}") from error
    except (ArithmeticError, ValueError, TypeError) as error:
        raise ExpressionError(f"it has no value: {error}") from error
    # Anyone who may write a document chooses this text.
    except (RecursionError, MemoryError) as error:
        raise ExpressionError("it is nested too deeply") from error
    if not math.isfinite(value):
        raise ExpressionError(f"its value is {value}")
    return value


def _number(node: ast.expr, names: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(int(value) | float(value)) if not isinstance(value, bool):
            return float(value)  # also an integer, whose powers could fill the memory
        case ast.Name(name) if name in names:
            return float(names[name])
        case ast.Name(name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.Name(name):
            known = ", ".join(sorted(names)) or "none"
            raise ExpressionError(f"{name!r} is not known here (known: {known})")
        case ast.BinOp(left, sign, right) if type(sign) in _OPERATORS:
            return _real(_OPERATORS[type(sign)](_number(left, names), _number(right, names)))
        case ast.UnaryOp(sign, operand) if type(sign) in _OPERATORS:
            return _real(_OPERATORS[type(sign)](_number(operand, names)))
        case ast.IfExp(test, body, orelse):
            return _number(body if _truth(test, names) else orelse, names)
        case ast.Call(ast.Name("Piecewise"), pieces, []):
            return _piecewise(pieces, names)
        case ast.Call(ast.Name(name), arguments, []) if name in _FUNCTIONS:
            return _real(_FUNCTIONS[name](*(_number(one, names) for one in arguments)))
        case _:
            raise ExpressionError(f"{_shown(node)} is not to be used here")


def _piecewise(pieces: Sequence[ast.expr], names: Mapping[str, float]) -> float:
    for piece in pieces:
        match piece:
            case ast.Tuple([value, condition]):
                if _truth(condition, names):
                    return _number(value, names)
            case _:
                raise ExpressionError(f"{_shown(piece)} is no (value, condition)")
    raise ExpressionError("no piece of it fits")


def _truth(node: ast.expr, names: Mapping[str, float]) -> bool:
    match node:
        case ast.Constant(bool(value)):
            return value
        case ast.Compare(first, signs, rest) if all(type(sign) in _OPERATORS for sign in signs):
            values = [_number(one, names) for one in (first, *rest)]
            pairs = zip(signs, values, values[1:], strict=False)
            return all(_OPERATORS[type(sign)](one, other) for sign, one, other in pairs)
        case ast.BoolOp(sign, parts):
            return _JOINED[type(sign).__name__](_truth(part, names) for part in parts)
        case ast.BinOp(left, sign, right) if type(sign) in _LOGIC:
            return _LOGIC[type(sign)](_truth(left, names), _truth(right, names))
        case ast.UnaryOp(ast.Invert() | ast.Not(), operand) | ast.Call(
            ast.Name("Not"), [operand], []
        ):
            return not _truth(operand, names)
        case ast.Call(ast.Name(name), [left, right], []) if name in _RELATIONS:
            return _RELATIONS[name](_number(left, names), _number(right, names))
        case ast.Call(ast.Name(name), parts, []) if name in _JOINED:
            return _JOINED[name](_truth(part, names) for part in parts)
        case _:
            raise ExpressionError(f"{_shown(node)} is no condition")


def _real(value: object) -> float:
    if not isinstance(value, float):
        raise ExpressionError(f"{value} is not a real number")
    return value


def _shown(node: ast.expr) -> str:
    text = ast.unparse(node)
    return repr(text if len(text) <= 40 else f"{text[:37]}...")  # noqa: PLR2004  # so that it stays a line
