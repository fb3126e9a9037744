"""Calculator tool: parses arithmetic only, and never runs text of the model as Python code."""

import ast
import math
import operator
from typing import Any

from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse

MAX_CHARACTERS = 200
# Limit of every intermediate result: 2 ** 512 has 155 digits. Without a limit, "9**9**9" would use all memory.
MAX_BITS = 512
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def evaluate(expression: str) -> int | float:
    """Return the value of an expression of numbers, `+ - * / // % **` and parentheses.

    Raises:
        ValueError: the text is not such an expression or is too long, or an intermediate result is too large.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"the expression has {len(expression)} characters, the limit is {MAX_CHARACTERS}")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression!r} is not an arithmetic expression") from error
    try:
        return _value(tree.body)
    except (ArithmeticError, RecursionError) as error:
        raise ValueError(f"{expression!r} has no value: {error}") from error


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _power(_value(node.left), _value(node.right))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return _bounded(OPERATORS[type(node.op)](_value(node.left), _value(node.right)))
    raise ValueError("only numbers, + - * / // % ** and parentheses are supported")


def _power(base: int | float, exponent: int | float) -> int | float:
    # Check before the computation: a power of integers has at least this many bits, and at most twice as many.
    if isinstance(base, int) and isinstance(exponent, int) and (base.bit_length() - 1) * abs(exponent) > MAX_BITS:
        raise ValueError(f"{base}**{exponent} is too large")
    result = base**exponent
    if isinstance(result, complex):
        raise ValueError(f"({base})**{exponent} is not a real number")
    return _bounded(result)


def _bounded(number: int | float) -> int | float:
    if isinstance(number, int):
        if number.bit_length() > MAX_BITS:
            raise ValueError("a number is too large")
    elif not math.isfinite(number):
        raise ValueError("a number is too large")
    return number


def shown(number: int | float) -> str:
    """Format a number; integral floats without decimals, so that `6/3` gives 2 and not 2.0."""
    return str(int(number)) if number == int(number) and abs(number) < 1e15 else str(number)


class CalculatorTool(BaseTool):
    """Tool `calculator(expression)`; the model receives the error text of an invalid expression."""

    def get_openai_tool_schema(self) -> OpenAIFunctionToolSchema:
        expression = {"type": "string", "description": "numbers, + - * / // % ** and parentheses, e.g. (3+4)*5"}
        parameters = {"type": "object", "properties": {"expression": expression}, "required": ["expression"]}
        function = {"name": "calculator", "description": "Calculates.", "parameters": parameters}
        return OpenAIFunctionToolSchema.model_validate({"type": "function", "function": function})

    # Not `async`, because it only computes; it runs in a separate thread.
    def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        return ToolResponse(text=shown(evaluate(str(parameters["expression"])))), None, {}
