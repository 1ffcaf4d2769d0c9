"""Grammars that take much, or do harm, each with what is to become of it.

Owns the table. For the server, which tries them out, and the instances, which follow those that
pass. "works": text can be generated; "too complex": refused by a bound on time, memory or stack;
else what the refusal says, as a regular expression.
"""

import json
from collections.abc import Callable
from typing import Any

from workers.messages import GrammarKind

Case = tuple[GrammarKind, Callable[[], str], str]


def _chain(number: int, link: Callable[[dict[str, str]], Any], end: Any) -> str:
    """Definitions that each refer to the next."""
    refs = [{"$ref": f"#/$defs/d{n}"} for n in range(number + 1)]
    defs = {f"d{n}": link(refs[n + 1]) for n in range(number)}
    return json.dumps({**refs[0], "$defs": {**defs, f"d{number}": end}}, separators=(",", ":"))


def _nested(number: int, wrap: Callable[[Any], Any], inner: Any) -> Any:
    for _ in range(number):
        inner = wrap(inner)
    return inner


def _rules(number: int, rule: str, end: str = '"a"') -> str:
    """Rules (or terminals) x0, x1, ... by a pattern in which # is the next one's name."""
    name = "X" if "X#" in rule else "x"
    lines = [f"{name}{n}: " + rule.replace("#", str(n + 1)) for n in range(number)]
    return "\n".join([f"start: {name}0", *lines, f"{name}{number}: {end}"])


def _object(number: int, *, required: bool = False, **more: Any) -> dict[str, Any]:
    names = [f"p{n}" for n in range(number)]
    schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
    return {**schema, **({"required": names} if required else {}), **more}


def _either(number: int, key: str, **more: Any) -> dict[str, Any]:
    return {
        key: [
            {"type": "object", "properties": {f"a{n}": {}}, "required": [f"a{n}"], **more}
            for n in range(number)
        ]
    }


CASES: dict[str, Case] = {
    # --- JSON schemas: depth
    "a chain of 100 references": (
        "json_schema",
        lambda: _chain(100, lambda ref: ref, {"type": "integer"}),
        "works",
    ),
    "a chain of 1800 references": (
        "json_schema",
        lambda: _chain(1800, lambda ref: ref, {"type": "integer"}),
        "any",
    ),
    "objects in objects, 1000 by reference": (
        "json_schema",
        lambda: _chain(1000, lambda ref: {"properties": {"a": ref}}, {"type": "integer"}),
        "too complex",
    ),
    "arrays in arrays, 1000 by reference": (
        "json_schema",
        lambda: _chain(1000, lambda ref: {"type": "array", "items": ref}, {}),
        "any",
    ),
    "any of, 1000 by reference": (
        "json_schema",
        lambda: _chain(1000, lambda ref: {"anyOf": [{"type": "null"}, ref]}, {}),
        "any",
    ),
    "objects in objects, 30 deep": (
        "json_schema",
        lambda: json.dumps(
            _nested(30, lambda one: {"type": "object", "properties": {"a": one}}, {})
        ),
        "works",
    ),
    "objects in objects, 100 deep": (
        "json_schema",
        lambda: json.dumps(
            _nested(100, lambda one: {"type": "object", "properties": {"a": one}}, {})
        ),
        "recursion limit",
    ),
    "brackets": ("json_schema", lambda: '{"a":' * 5000, "not JSON"),
    "an example nested 5000 deep": (
        "json_schema",
        lambda: '{"examples": [' + "[" * 5000 + "]" * 5000 + "]}",
        "not JSON|nested too deeply",
    ),
    # --- JSON schemas: numbers
    "a multiple of 97": ("json_schema", lambda: '{"type": "integer", "multipleOf": 97}', "works"),
    "a multiple of 999983": (
        "json_schema",
        lambda: '{"type": "integer", "multipleOf": 999983}',
        "too complex",
    ),
    "a multiple of 9999991": (
        "json_schema",
        lambda: '{"type": "integer", "multipleOf": 9999991}',
        "too complex",
    ),
    "a multiple of very little": (
        "json_schema",
        lambda: '{"type": "number", "multipleOf": 1e-300}',
        "any",
    ),
    "many multiples": (
        "json_schema",
        lambda: json.dumps(
            {"allOf": [{"type": "integer", "multipleOf": n} for n in (97, 101, 103, 107, 109)]}
        ),
        "any",
    ),
    "bounds with many digits": (
        "json_schema",
        lambda: json.dumps({"type": "number", "minimum": 1e-9, "maximum": 123456789.123456789}),
        "works",
    ),
    "bounds beyond numbers": (
        "json_schema",
        lambda: '{"type": "integer", "minimum": -1e400, "maximum": 9' + "9" * 300 + "}",
        "any",
    ),
    # --- JSON schemas: breadth
    "an enum of 5000": (
        "json_schema",
        lambda: json.dumps({"enum": [f"v{n}" for n in range(5000)]}),
        "works",
    ),
    "1500 optional properties": ("json_schema", lambda: json.dumps(_object(1500)), "works"),
    "1500 required properties": (
        "json_schema",
        lambda: json.dumps(_object(1500, required=True)),
        "works",
    ),
    "one of 400": (
        "json_schema",
        lambda: json.dumps(_either(400, "oneOf", additionalProperties=False)),
        "works",
    ),
    "one of 400 that may be both": (
        "json_schema",
        lambda: json.dumps(_either(400, "oneOf")),
        "oneOf",
    ),
    "any of 400": ("json_schema", lambda: json.dumps(_either(400, "anyOf")), "works"),
    "all of 8 times any of 8": (
        "json_schema",
        lambda: json.dumps(
            {
                "allOf": [
                    {"anyOf": [{"properties": {f"a{i}{j}": {}}} for j in range(8)]}
                    for i in range(8)
                ]
            }
        ),
        "too large|too complex",
    ),
    "all of, nested": (
        "json_schema",
        lambda: json.dumps(_nested(10, lambda one: {"allOf": [one, one]}, {"type": "object"})),
        "any",
    ),
    "patterns of properties": (
        "json_schema",
        lambda: json.dumps(
            {
                "type": "object",
                "patternProperties": {f"^p{n:03}.*$": {"type": "integer"} for n in range(300)},
            }
        ),
        "too complex",
    ),
    "a schema that is itself": ("json_schema", lambda: '{"$ref": "#"}', "no text matches"),
    "two schemas that are each other": (
        "json_schema",
        lambda: json.dumps(
            {
                "$ref": "#/$defs/a",
                "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
            }
        ),
        "no text matches",
    ),
    "a tree": (
        "json_schema",
        lambda: json.dumps(
            {
                "type": "object",
                "properties": {"children": {"type": "array", "items": {"$ref": "#"}}},
            }
        ),
        "works",
    ),
    # --- JSON schemas: lengths
    "at least 10**9 items": (
        "json_schema",
        lambda: '{"type": "array", "minItems": 1000000000}',
        "any",
    ),
    "at most 10**9 items": (
        "json_schema",
        lambda: '{"type": "array", "maxItems": 1000000000}',
        "any",
    ),
    "at most 10**6 letters": (
        "json_schema",
        lambda: '{"type": "string", "maxLength": 1000000}',
        "works",
    ),
    "at least 10**9 letters": (
        "json_schema",
        lambda: '{"type": "string", "minLength": 1000000000}',
        "works",
    ),
    "a prefix of 500 items": (
        "json_schema",
        lambda: json.dumps({"type": "array", "prefixItems": [{"type": "integer"}] * 500}),
        "works",
    ),
    "a pattern with much to remember": (
        "json_schema",
        lambda: json.dumps({"type": "string", "pattern": "^(a|b)*a(a|b){25}$"}),
        "works",
    ),
    # --- regular expressions
    "stars in stars": ("regex", lambda: "(((a*)*b*)*c*)*", "works"),
    "parentheses": ("regex", lambda: "(" * 3000 + "a" + ")" * 3000, "nest|invalid regex"),
    "counts in counts": ("regex", lambda: "((a{1000}){1000}){1000}", "any"),
    "a count of 10**5": ("regex", lambda: "[a-z]{1,100000}", "works"),
    "a count of 10**9": ("regex", lambda: "(ab){1000000000}", "any"),
    "what came 500 letters before": ("regex", lambda: "(a|b)*a(a|b){500}", "works"),
    "20,000 alternatives": (
        "regex",
        lambda: "|".join(f"{n:x}" for n in range(10_000)),
        "works",
    ),
    "classes of all letters": ("regex", lambda: r"(\p{L}\p{N}){1,500}", "any"),
    "what is not": ("regex", lambda: "[^a]" * 10_000, "any"),
    # --- choices
    "1024 choices": (
        "choice",
        lambda: json.dumps([f"choice {n} of many" for n in range(1024)]),
        "works",
    ),
    "2000 choices": ("choice", lambda: json.dumps([f"{n}" for n in range(2000)]), "between 1 and"),
    "long choices": ("choice", lambda: json.dumps(["a" * 30_000, "a" * 30_000 + "b"]), "works"),
    # --- Lark
    "rules in rules, 100": ("lark", lambda: _rules(100, "x#"), "works"),
    "rules in rules, 3000": ("lark", lambda: _rules(3000, "x#"), "too complex"),
    "optional rules in rules, 1500": (
        "lark",
        lambda: _rules(1500, '("a" (x# | "b")?)*'),
        "too complex",
    ),
    "terminals in terminals, 3500": ("lark", lambda: _rules(3500, '"a" X#'), "any"),
    "parentheses of Lark": (
        "lark",
        lambda: "start: " + "(" * 3000 + '"a"' + ")" * 3000,
        "nested",
    ),
    "ambiguous": ("lark", lambda: 'start: s\ns: s s s | s s | "a" | "b" | "ab"', "works"),
    "left recursive": ("lark", lambda: 'start: start "a" | "a"', "works"),
    "right recursive": ("lark", lambda: 'start: "a" start | "a"', "works"),
    "for ever": ("lark", lambda: 'start: "a" start', "any"),
    "nothing, again and again": ("lark", lambda: 'start: (x?)*\nx: (y?)*\ny: "a"?', "works"),
    "5000 alternatives": (
        "lark",
        lambda: "start: " + " | ".join(f'"a{n}"' for n in range(5000)),
        "works",
    ),
    "15,000 optional parts": (
        "lark",
        lambda: 'start: "x" ' + " a?" * 15_000 + '\na: "a"',
        "works",
    ),
    "a count of rules": ("lark", lambda: 'start: a{0,100000}\na: "a" | "b"?', "any"),
    "counts of rules in counts": (
        "lark",
        lambda: 'start: ((a{0,100} "b"?){0,100} "c"?){0,100}\na: "a"?',
        "any",
    ),
    "500 terminals with much to remember": (
        "lark",
        lambda: (
            "start: ("
            + "|".join(f"A{n}" for n in range(500))
            + ")*\n"
            + "\n".join(f"A{n}: /.*{chr(97 + n % 26)}.{{{n}}}/" for n in range(500))
        ),
        "any",
    ),
    "an undefined rule": ("lark", lambda: "start: other", "other"),
    "options of the library": ("lark", lambda: '%llguidance {}\nstart: "a"', "not allowed"),
}
