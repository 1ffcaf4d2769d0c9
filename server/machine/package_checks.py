"""Whether Python and the installed packages lie in the ranges that our metadata declares. Pure.

Owns comparing versions as far as our ranges need it. Invariant: a clause that can't be judged is
refused, never taken for met.
"""

import re
from collections.abc import Sequence

from server.machine.checks import Check, ok, problem, release_numbers, warning


def python(version: str, wanted: str | None) -> Check:
    """`wanted`: the installed package's Requires-Python."""
    if wanted is None or is_within(version, wanted):
        return ok("python", version)
    fix = f"make a virtual environment with Python {wanted}"
    return problem("python", f"{version}, not {wanted}", fix)


def own_package(installed: str | None) -> Check:
    """onecopy itself, whose metadata names the ranges of all others."""
    if installed is not None:
        return ok("onecopy", installed)
    return warning(
        "onecopy", "not installed, so no ranges are known", "in the checkout: `pip install -e .`"
    )


def package(name: str, installed: str | None, wanted: str) -> Check:
    """One dependency against its declared range, such as `<2.14,>=2.11`; empty allows any."""
    fix = f"`pip install '{name}{wanted}'`"
    if installed is None:
        return problem(name, "not installed", fix)
    if not is_within(installed, wanted):
        return problem(name, f"{installed}, not {wanted}", fix)
    return ok(name, f"{installed} ({wanted})" if wanted else installed)


def other_packages(checked: Sequence[Check]) -> Check:
    """All further dependencies on one line: those that are not ok, else how many are."""
    wrong = [one for one in checked if one.status != "ok"]
    if not wrong:
        return ok("other packages", f"{len(checked)}, all in their ranges")
    seen = "; ".join(f"{one.name} {one.seen}" for one in wrong)
    return problem("other packages", seen, ", ".join(one.fix for one in wrong))


def declared(requirements: Sequence[str]) -> dict[str, str]:
    """Name → range, of a distribution's Requires-Dist lines. Those with a marker are left out: they
    hold only for an extra, or for other machines."""
    found = {}
    for line in requirements:
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*\(?([^()]*)", line.strip())
        if match and ";" not in line:
            found[match[1]] = match[2].replace(" ", "")
    return found


def is_within(version: str, wanted: str) -> bool:
    """Whether the release number of `version` meets all clauses; 2.13.0+cpu counts as 2.13.0, and
    so does 2.13.0rc1. Raises ValueError for a clause other than >=, >, <=, <, ==, != a number."""
    has = release_numbers(version)
    for clause in filter(None, wanted.split(",")):
        match = re.fullmatch(r"\s*(>=|<=|==|!=|>|<)\s*([0-9.]+)\s*", clause)
        if match is None:
            raise ValueError(f"the range {clause!r} can't be judged")
        bound = release_numbers(match[2])
        meets = {
            ">=": has >= bound,
            "<=": has <= bound,
            "==": has == bound,
            "!=": has != bound,
            ">": has > bound,
            "<": has < bound,
        }
        if not meets[match[1]]:
            return False
    return True
