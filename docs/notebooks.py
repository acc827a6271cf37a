"""Examples as notebooks: ``python docs/notebooks.py`` makes them from the scripts, runs them and keeps what they show.

The body of a script's ``main`` becomes cells, one for each paragraph, a comment that begins one becoming text; what its
options are by default becomes the first cell. While the documentation is built, the notebook takes the place of a line
``<!-- notebook: name -->``.
"""

from __future__ import annotations

import ast
import html
import json
import re
import tempfile
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples"
SHOWN = {
    "digits_mlp": ["report"],
    "mnist_cnn": ["%matplotlib inline\ndynamics.plot()", "report.suspects(5, dynamics=dynamics)"],
}
"""What is looked at in the end of each notebook."""

_MARK = re.compile(r"^<!-- notebook: (\w+) -->$", re.M)
_STYLE = re.compile(r'<style.*?</style>|( border="1")? class="dataframe"')  # of pandas; the page has its own for tables
_KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
_QUIET = (
    "import logging\nimport warnings\n\n"
    'warnings.filterwarnings("ignore", module="lightning")\n'
    'logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)'
)


def made(name: str, **settings: Any) -> Any:
    """The notebook of an example, not yet run; options have their defaults but for the settings given.

    Raises:
        ValueError: a setting that the example does not have.
    """
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    rest = tree.body[1:]
    main = next(node for node in rest if isinstance(node, ast.FunctionDef) and node.name == "main")
    title, _, about = str(ast.get_docstring(tree)).partition(":")
    defined = [node for node in rest if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node is not main]
    chosen = _options(main) | settings
    if len(chosen) > len(_options(main)):
        raise ValueError(
            f"{name}.py has the options {', '.join(_options(main))}, and not all of {', '.join(settings)}."
        )
    lines = "".join(f"\n    {key}={value!r}," for key, value in chosen.items()).replace("'", '"')
    cells = [
        new_markdown_cell(f"# {title}\n\n{_sentence(about.splitlines()[0].strip())}"),
        new_code_cell(_imports(rest, [*defined, *main.body])),
        new_code_cell(_QUIET),
        new_code_cell(f"args = argparse.Namespace({lines.replace('PosixPath', 'Path')}\n)"),
        *(new_code_cell(ast.get_source_segment(source, node)) for node in defined),
    ]
    for paragraph in _paragraphs(main, source):
        comment = re.match(r"((?:#.*\n)+)", paragraph)
        if comment:
            said = " ".join(line.lstrip("# ") for line in comment[0].splitlines())
            cells.append(new_markdown_cell(_sentence(f"{said}.")))
        cells.append(new_code_cell(paragraph[comment.end() if comment else 0 :]))
    cells += [new_code_cell(shown) for shown in SHOWN[name]]
    for number, cell in enumerate(cells):
        cell["id"] = f"{name}-{number}"  # the same each time
    return new_notebook(cells=cells, metadata=_KERNEL)


def _imports(tree: list[ast.stmt], used_by: list[ast.stmt]) -> str:
    """What of the imports is used, in the groups of the script."""
    used = {node.id for part in used_by for node in ast.walk(part) if isinstance(node, ast.Name)}
    lines, last = list[str](), 0
    for node in tree:
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        node.names = [name for name in node.names if (name.asname or name.name.partition(".")[0]) in used]
        if node.names:
            lines += ["", ast.unparse(node)] if lines and node.lineno > last + 1 else [ast.unparse(node)]
        last = node.end_lineno or last
    return "\n".join(lines)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _options(main: ast.FunctionDef) -> dict[str, Any]:
    """Names and defaults of the command line's options."""
    found = {}
    for call in ast.walk(main):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            default = next(word.value for word in call.keywords if word.arg == "default")
            value = (
                Path(ast.literal_eval(default.args[0])) if isinstance(default, ast.Call) else ast.literal_eval(default)
            )
            found[ast.literal_eval(call.args[0]).lstrip("-").replace("-", "_")] = value
    return found


def _paragraphs(main: ast.FunctionDef, source: str) -> list[str]:
    """The body of ``main`` after the options were read and before it returns."""
    lines = source.splitlines()
    read = next(node for node in main.body if "parse_args" in ast.unparse(node))
    end = main.body[-1].lineno - 1 if isinstance(main.body[-1], ast.Return) else main.end_lineno
    body = textwrap.dedent("\n".join(lines[read.end_lineno : end]))
    return [part.strip("\n") for part in re.split(r"\n\n+(?=\S)", body) if part.strip()]


def run(notebook: Any, folder: Path) -> Any:
    """The same notebook with what it shows, run in a folder."""
    from nbclient import NotebookClient

    done = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in done.cells:
        cell.metadata.pop("execution", None)  # when it was run
        cell["outputs"] = (
            [out for out in cell.get("outputs", []) if _is_told(out)] if cell.cell_type == "code" else None
        )
        if cell.cell_type != "code":
            del cell["outputs"]
    return done


def _is_told(output: Any) -> bool:
    """Whether an output is the example's, rather than progress or a notice."""
    if output["output_type"] == "stream":
        return bool(output["name"] == "stdout")
    return output["output_type"] == "execute_result" or "image/png" in output.get("data", {})


# -- in the documentation ------------------------------------------------------------------------------------


def rendered(notebook: Any) -> str:
    """The cells of a notebook, as it is stored, in Markdown."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```py\n{source}\n```")
        parts += [_rendered(output) for output in cell.get("outputs", [])]
    return "\n\n".join(parts) + "\n"


def _rendered(output: Any) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).strip()}\n```"
    data = output["data"]
    if "image/png" in data:
        return f'<img alt="What the cell shows" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    if "text/html" in data:
        shown = _STYLE.sub("", re.sub(r"\n\s*", " ", "".join(data["text/html"])))
        return f'<div class="shown">{shown}</div>'
    return f'<pre class="shown">{html.escape("".join(data["text/plain"]))}</pre>'


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""

    def stored(found: re.Match[str]) -> str:
        return rendered(json.loads((FOLDER / f"{found[1]}.ipynb").read_text(encoding="utf-8")))

    return _MARK.sub(stored, markdown)


if __name__ == "__main__":
    import nbformat

    for example in SHOWN:
        with tempfile.TemporaryDirectory() as workplace:
            nbformat.write(run(made(example), Path(workplace)), FOLDER / f"{example}.ipynb")
