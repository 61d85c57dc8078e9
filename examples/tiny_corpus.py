"""The text that `train_tiny.py` trains on: what every CPython carries about itself.

Documents are the topics of `pydoc_data` (the language reference that `help()` prints) and, module by module, the
docstrings of the standard library, read with `ast` so that no module is imported. The order, the split and so the
training are the same on every run of one CPython.
"""

import ast
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
HELD_OUT_ONE_IN = 32
HELD_OUT_CHARACTERS_EACH = 6000  # so that no single long document decides the figure


def iterate_docstrings(tree: ast.AST, qualified_name: str) -> Iterator[tuple[str, str, str]]:
    """Yield `(qualified name, signature, docstring)` of a module and all that is defined in it, in source order."""
    docstring = ast.get_docstring(tree)
    if docstring:
        is_function = isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef))
        yield qualified_name, f"({ast.unparse(tree.args)})" if is_function else "", docstring
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from iterate_docstrings(child, f"{qualified_name}.{child.name}")


def read_modules(source: Path) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Yield `(module name, its docstrings)` for every parsable module under `source`, in order of path."""
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        if SKIPPED_FOLDERS.intersection(parts):
            continue
        name = ".".join(part for part in parts if part != "__init__")
        try:
            docstrings = list(iterate_docstrings(ast.parse(path.read_text("utf-8")), name))
        except (SyntaxError, UnicodeDecodeError):
            continue  # a few files are broken on purpose, or in an old encoding, to test the parser
        if docstrings:
            yield name, docstrings


def read_topics() -> dict[str, str]:
    """Return the language reference that `help()` prints, by topic name."""
    from pydoc_data.topics import topics

    return {f"topic {name}": text.strip() for name, text in sorted(topics.items())}


def question_and_answer(question: str, text: str) -> tuple[str, str] | None:
    """Return the question with the first paragraph of `text`, or None where that makes no good answer."""
    answer = " ".join(text.strip().split("\n\n")[0].split())
    if not 30 <= len(answer) <= 500 or not answer.endswith("."):
        return None
    return question, answer


def gather_documents(source: Path | None) -> tuple[dict[str, str], dict[str, list[tuple[str, str]]]]:
    """Return documents by name, and for each name its question-and-answer pairs.

    `source` is a folder of Python files; None means the standard library of this interpreter and the reference topics.
    """
    documents: dict[str, str] = {}
    exchanges: dict[str, list[tuple[str, str]]] = {}
    if source is None:
        documents.update(read_topics())
        source = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    for name, docstrings in read_modules(source):
        fresh = [entry for entry in docstrings if entry[2] not in seen]
        seen.update(entry[2] for entry in fresh)
        if not fresh:
            continue
        documents[name] = "\n\n".join(f"{full_name}{signature}\n\n{text}" for full_name, signature, text in fresh)
        pairs = (
            question_and_answer(f"What does {full_name} do?" if signature else f"What is {full_name}?", text)
            for full_name, signature, text in fresh
            if "._" not in full_name
        )
        exchanges[name] = [pair for pair in pairs if pair is not None]
    return documents, exchanges


def split_documents(documents: dict[str, str]) -> tuple[list[str], str]:
    """Return the names to train on, and the held-out text without paragraphs that the training text also has."""
    held_out = [name for name in documents if zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0] or list(documents)[-1:]
    trained = [name for name in documents if name not in held_out]
    known = {paragraph.strip() for name in trained for paragraph in documents[name].split("\n\n")}
    kept = (
        "\n\n".join(part for part in documents[name].split("\n\n") if part.strip() not in known) for name in held_out
    )
    return trained, "\n\n".join(text[:HELD_OUT_CHARACTERS_EACH] for text in kept) + "\n"
