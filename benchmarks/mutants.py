"""Mutation testing of the mathematics: which single changes of ``lightning_influence/core`` do its tests not notice?

    python benchmarks/mutants.py --sample 200 --seed 0

Every mutant is one small change of one expression: an operator, a comparison, a constant, a sign, a dropped call or
argument, a condition turned round. It is written into a copy of the package, and ``tests/core`` runs on the copy until a
test fails. A mutant that no test fails on is a survivor: a hole in the tests, or a change that changes nothing.

Only the changed module is reread: each run is a fork of a process that has imported torch and lightning already. Tests that
noticed many of the mutants before are asked first.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import lightning  # noqa: F401  # here and below: loaded once, before the forks
import pandas  # noqa: F401
import pytest
import scipy.stats  # noqa: F401

ROOT = Path(__file__).parent.parent
CORE = Path("lightning_influence/core")

OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}

FIRST = 12  # tests that noticed most so far, asked before the others

MODULES = {"torch", "math", "torch.nn.functional", "torch.autograd", "torch.func"}
CONTAINERS = {"items", "values", "append", "appendleft", "setdefault", "tolist"}


@dataclass(frozen=True)
class Mutant:
    """One changed expression.

    Attributes:
        source: the whole module with the change.
    """

    module: str
    line: int
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"{self.module}.py:{self.line}: {self.before}  ->  {self.after}"


def changed(node: ast.AST) -> Iterator[ast.AST]:
    """What an expression or statement may be changed to."""
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in OPERATORS:
            yield _with(node, op=OPERATORS[type(op)]())
        case ast.Compare(ops=[op]) if type(op) in OPERATORS:
            yield _with(node, ops=[OPERATORS[type(op)]()])
        case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield ast.Constant(2 * value if value else 1.0)
        case ast.IfExp(test=test) | ast.If(test=test):
            yield _with(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.AugAssign(target=target, value=value):
            yield ast.Assign([target], value, lineno=node.lineno)
        case ast.Call(func=func, args=args, keywords=keywords):
            if isinstance(func, ast.Attribute) and ast.unparse(func.value) in MODULES:
                if args:
                    yield args[0]
            elif isinstance(func, ast.Attribute) and func.attr not in CONTAINERS:
                yield func.value
            for keyword in (k for k in keywords if k.arg != "strict"):
                yield _with(node, keywords=[k for k in keywords if k is not keyword])
        case ast.Attribute(attr="T" | "mT", value=value):
            yield value


def _with(node: ast.AST, **fields: object) -> ast.AST:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def mutants(path: Path) -> list[Mutant]:
    """Every mutant of a file; annotations, decorators and the texts of errors are left alone."""
    tree = ast.parse(path.read_text())
    found = []
    for parent, field, position, node in list(_places(tree)):
        for new in changed(node):
            _put(parent, field, position, new)
            before, after = (ast.unparse(x).splitlines()[0] for x in (node, new))
            found.append(Mutant(path.stem, node.lineno, before, after, ast.unparse(ast.fix_missing_locations(tree))))  # type: ignore[attr-defined]
        _put(parent, field, position, node)
    return found


def _places(parent: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """``(parent, field, position in a list, node)`` of everything that is computed."""
    for field, value in ast.iter_fields(parent):
        if field in ("annotation", "returns", "decorator_list", "bases", "type_params"):
            continue
        children = [(i, v) for i, v in enumerate(value)] if isinstance(value, list) else [(None, value)]
        for position, child in children:
            if isinstance(child, ast.keyword) and child.arg == "strict":
                continue
            if isinstance(child, ast.AST) and not isinstance(child, ast.Raise | ast.JoinedStr | ast.AnnAssign):
                yield parent, field, position, child
                yield from _places(child)
            elif isinstance(child, ast.AnnAssign) and child.value is not None:
                yield child, "value", None, child.value
                yield from _places(child.value)


def _put(parent: ast.AST, field: str, position: int | None, node: ast.AST) -> None:
    if position is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[position] = node


def tests_of(module: str) -> list[list[str]]:
    """The tests of a module, and those of the others, which are run where the first pass."""
    paths = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests/core").glob("test_*.py"))
    own = [p for p in paths if p == f"tests/core/test_{module}.py"]
    return [part for part in (own, [p for p in paths if p not in own]) if part]


class Notices:
    """Of a run of pytest: the test that failed, written into a pipe."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            os.write(self._pipe, report.nodeid.encode())


def noticed_by(tests: list[list[str]], copied: Path, limit: float) -> str | None:
    """Which test fails on the copy; ``""`` where the tests do not end in time or cannot be read, None where all pass."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.chdir(copied)
        sys.path[:0] = [str(copied), str(copied / "tests")]
        sys.dont_write_bytecode = True
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        hypothesis.settings.register_profile("found is enough", phases=[hypothesis.Phase.generate], database=None)
        hypothesis.settings.load_profile("found is enough")
        arguments = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
        os._exit(int(any(pytest.main([*arguments, *part], plugins=[Notices(write)]) for part in tests)))
    os.close(write)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            with os.fdopen(read) as pipe:
                return pipe.read() if os.waitstatus_to_exitcode(status) else None
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(read)
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sample", type=int, default=200, help="mutants to try, spread evenly over what there is; 0: all"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", nargs="*", help="of core, by name; all by default")
    parser.add_argument("--limit", type=float, default=180, help="seconds for the tests of one mutant")
    options = parser.parse_args()
    paths = [p for p in sorted((ROOT / CORE).glob("*.py")) if not options.modules or p.stem in options.modules]
    every = [m for p in paths for m in mutants(p)]
    count = min(options.sample, len(every)) or len(every)
    chosen = random.Random(options.seed).sample(every, count)
    print(f"{len(every)} mutants of {len(paths)} modules, {len(chosen)} tried", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder)
        for name in ("lightning_influence", "tests"):
            shutil.copytree(ROOT / name, copied / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copied)
        if (failed := noticed_by(tests_of(""), copied, 10 * options.limit)) is not None:
            sys.exit(f"the tests fail on the package as it is: {failed or 'not in time'}")
        left, notices = 0, Counter[str]()
        for mutant in chosen:
            file = copied / CORE / f"{mutant.module}.py"
            original = file.read_text()
            file.write_text(mutant.source)
            first = [[test for test, _ in notices.most_common(FIRST)]] if notices else []
            failed = noticed_by(first + tests_of(mutant.module), copied, options.limit)
            left += failed is None
            notices.update([failed] if failed else [])
            print(f"{'survives' if failed is None else 'killed'}  {mutant}", flush=True)
            file.write_text(original)
    print(f"{left} of {len(chosen)} survive")


if __name__ == "__main__":
    main()
