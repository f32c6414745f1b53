"""What the documents say must exist: links, headings, make targets, names of code, decisions and their status.

Each check is a function from a folder to what is wrong there. It runs on the repository, where nothing may be wrong,
and on a small damaged folder, where it must find the damage.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "trident_client": "client",
    "trident_export": "export",
    "trident_gateway": "gateway",
    "trident_serving": "serving",
}

_STATUS = re.compile(
    r"Status: (accepted|(partly )?superseded by \[(?P<number>\d{4})\]\((?P<file>[\w.-]+\.md)\): (?P<reason>\S.*))"
)
_REASON_WORDS = 6
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_NAME = re.compile(r"`((?:trident_client|trident_export|trident_gateway|trident_serving)(?:\.\w+)+)[`(]")
_PAGE = re.compile(r"(?<![\w/.-])(?:docs/[\w./-]+\.md|docs/decisions/\d{4}(?![\w-]))")
_FOREIGN = ("docs/ContribOperators.md", "docs/gguf.md")  # of onnxruntime and ggml


def documents(root: Path) -> list[Path]:
    """The *.md files of a checkout; of any other folder, all of them."""
    if (root / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
        listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.split()
        return [root / name for name in listed if (root / name).is_file()]
    return sorted(root.rglob("*.md"))


def sources(root: Path) -> list[Path]:
    """The Python files whose docstrings name code and pages."""
    folders = (*PACKAGES.values(), "benchmarks", "deploy", "tests")
    return sorted(file for folder in folders for file in (root / folder).rglob("*.py") if file != Path(__file__))


def decisions(root: Path) -> list[Path]:
    return sorted((root / "docs/decisions").glob("[0-9]*.md"))


def wrong_statuses(root: Path) -> Iterator[str]:
    """Each decision has a status under its title; who supersedes and who is superseded name each other."""
    for file in decisions(root):
        title, blank, status, *_ = file.read_text(encoding="utf-8").splitlines()
        found = _STATUS.fullmatch(status)
        if not title.startswith("# ") or blank or not found:
            yield f"{file.name}: no status under the title, or one that is not allowed: {status!r}"
        elif other := found["file"]:
            path = file.parent / other
            if not path.is_file():
                yield f"{file.name}: it is superseded by {other}, which does not exist"
            elif not other.startswith(found["number"]):
                yield f"{file.name}: number {found['number']} is not that of {other}"
            elif f"]({file.name})" not in "".join(_supersedes(path)):
                yield f"{file.name}: {other} has no line 'Supersedes:' that names it"
            if len(found["reason"].split()) > _REASON_WORDS:
                yield f"{file.name}: the reason has more than {_REASON_WORDS} words: {found['reason']}"
        for line in _supersedes(file):
            for older in re.findall(r"\]\(([\w.-]+)\)", line):
                older_path = file.parent / older
                if not older_path.is_file() or f"]({file.name})" not in older_path.read_text("utf-8").splitlines()[2]:
                    yield f"{file.name}: it supersedes {older}, whose status does not say so"


def _supersedes(file: Path) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("Supersedes: ")]


def missing_in_index(root: Path) -> Iterator[str]:
    """The index has a row for each decision, in order, with the status that the decision has."""
    index = root / "docs/decisions/index.md"
    rows = re.findall(r"^\| \[(\d{4})\]\(([\w.-]+)\) \| [^|]+ \| ([^|]+) \| [^|]+ \|$", index.read_text("utf-8"), re.M)
    expected = []
    for file in decisions(root):
        status = file.read_text(encoding="utf-8").splitlines()[2].removeprefix("Status: ")
        expected.append((file.name[:4], file.name, re.sub(r"\[(\d+)\].*", r"\1", status)))
    for row in expected:
        if row not in rows:
            yield f"index.md has no row {' | '.join(row)}"
    for row in rows:
        if row not in expected:
            yield f"index.md has a row without a decision, or with another status: {' | '.join(row)}"


def dead_links(root: Path) -> Iterator[str]:
    """A relative link leads to a file, and its anchor to a heading of it."""
    for file in documents(root):
        text = _CODE.sub("", _FENCE.sub("", file.read_text(encoding="utf-8")))
        for link in _LINK.findall(text):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (file.parent / path) if path else file
            if not target.exists():
                yield f"{file.relative_to(root)}: {link} does not exist"
            elif anchor and anchor not in anchors(target):
                yield f"{file.relative_to(root)}: {link}: no such heading"
    for file in [*sources(root), *_others(root)]:
        for page in _PAGE.findall(file.read_text(encoding="utf-8")):
            exists = list((root / "docs/decisions").glob(f"{page[-4:]}-*.md")) if page[-4:].isdigit() else None
            if page not in _FOREIGN and not (exists or (root / page).is_file()):
                yield f"{file.relative_to(root)}: {page} does not exist"


def _others(root: Path) -> list[Path]:
    """Other files that name pages."""
    names = ("CHANGELOG.md", "Makefile", "docker-compose.yml", "models.toml", "pyproject.toml")
    found = [root / name for name in names] + [*(root / "deploy").glob("Dockerfile*"), *root.glob("export/*/*.toml")]
    return [file for file in found if file.is_file()]


def anchors(file: Path) -> set[str]:
    """The anchors of a file's headings, as GitHub and mkdocs make them."""
    text = _FENCE.sub("", file.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def unknown_targets(root: Path) -> Iterator[str]:
    """A make target that a document names is one of the Makefile."""
    known = set(re.findall(r"^([a-z]+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for file in documents(root):
        text = file.read_text(encoding="utf-8")
        named = re.findall(r"`make ([a-z]+)\b", text)
        for block in (match.group() for match in _FENCE.finditer(text)):
            named += re.findall(r"^(?:\$ )?(?:[A-Z_]+=\S+ )*make ([a-z]+)\b", block, re.MULTILINE)
            named += re.findall(r"&& make ([a-z]+)\b", block)
        for target in sorted(set(named) - known):
            yield f"{file.relative_to(root)}: there is no `make {target}`"


def unknown_names(root: Path) -> Iterator[str]:
    """A dotted name of our packages in backticks is a module, or is defined in one."""
    for file in [*documents(root), *sources(root)]:
        for name in _NAME.findall(file.read_text(encoding="utf-8")):
            if not is_defined(root, name):
                yield f"{file.relative_to(root)}: there is no {name}"


def is_defined(root: Path, name: str) -> bool:
    """Whether a dotted name is found in the source tree, which is parsed and not imported."""
    first, *parts = name.split(".")
    path = root / PACKAGES[first] / first
    while parts and (path / parts[0]).is_dir():
        path /= parts.pop(0)
    if parts and (path / f"{parts[0]}.py").is_file():
        path = path / f"{parts.pop(0)}.py"
    elif (path / "__init__.py").is_file():
        path /= "__init__.py"
    else:
        return not parts and path.is_dir()
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for part in parts:
        node = next((node for node in body if part in _defines(node)), None)
        if node is None:
            return False
        body = node.body if isinstance(node, ast.ClassDef) else []
    return True


def _defines(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


CHECKS: list[Callable[[Path], Iterator[str]]] = [
    wrong_statuses,
    missing_in_index,
    dead_links,
    unknown_targets,
    unknown_names,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_nothing_is_wrong(check: Callable[[Path], Iterator[str]]) -> None:
    assert list(check(ROOT)) == []


FILES = {
    "Makefile": "serve: ## serve\n",
    "README.md": "[a](docs/a.md#one-two), `make serve`, `trident_serving.engine.Engine.step` "
    "and `trident_serving.engine.FAST`",
    "docs/a.md": "# A\n\n## One, two\n\n```sh\nmake serve\n```\n",
    "docs/decisions/0001-old.md": "# Old\n\nStatus: superseded by [0002](0002-new.md): the new one is faster\n",
    "docs/decisions/0002-new.md": "# New\n\nStatus: accepted\n\nSupersedes: [0001](0001-old.md)\n",
    "docs/decisions/index.md": "| [0001](0001-old.md) | Old | superseded by 0002 | x |\n"
    "| [0002](0002-new.md) | New | accepted | y |\n",
    "serving/trident_serving/__init__.py": "",
    "serving/trident_serving/engine.py": '"""See docs/a.md, docs/decisions/0002 and docs/ContribOperators.md."""\n'
    "FAST: bool = True\n"
    "class Engine:\n    def step(self): ...\n",
}
DAMAGES = [
    ("wrong_statuses", "docs/decisions/0002-new.md", "Status: accepted", "Status: in force", "not allowed"),
    ("wrong_statuses", "docs/decisions/0002-new.md", "Status: accepted\n\n", "", "not allowed"),
    ("wrong_statuses", "docs/decisions/0001-old.md", "0002-new.md", "0003-newer.md", "does not exist"),
    ("wrong_statuses", "docs/decisions/0001-old.md", "[0002]", "[0003]", "is not that of"),
    ("wrong_statuses", "docs/decisions/0001-old.md", ": the new one is faster", "", "not allowed"),
    ("wrong_statuses", "docs/decisions/0001-old.md", "is faster", "is faster in each of the runs", "more than 6 words"),
    ("wrong_statuses", "docs/decisions/0002-new.md", "Supersedes: [0001](0001-old.md)", "", "no line 'Supersedes:'"),
    ("wrong_statuses", "docs/decisions/0002-new.md", "[0001](0001-old.md)", "[0000](0000-none.md)", "does not say so"),
    (
        "missing_in_index",
        "docs/decisions/index.md",
        "| [0001](0001-old.md) | Old | superseded by 0002 | x |\n",
        "",
        "no row",
    ),
    ("missing_in_index", "docs/decisions/index.md", "superseded by 0002", "accepted", "another status"),
    ("dead_links", "README.md", "docs/a.md", "docs/b.md", "docs/b.md#one-two does not exist"),
    ("dead_links", "docs/a.md", "One, two", "One, three", "no such heading"),
    ("dead_links", "serving/trident_serving/engine.py", "docs/a.md", "docs/b.md", "docs/b.md does not exist"),
    ("dead_links", "serving/trident_serving/engine.py", "decisions/0002", "decisions/0003", "0003 does not exist"),
    ("unknown_targets", "README.md", "make serve", "make server", "no `make server`"),
    ("unknown_targets", "docs/a.md", "make serve", "make it", "no `make it`"),
    ("unknown_names", "README.md", "engine.Engine.step", "engine.Engine.run", "trident_serving.engine.Engine.run"),
    ("unknown_names", "README.md", "engine.FAST", "motor.FAST", "trident_serving.motor.FAST"),
    ("unknown_names", "serving/trident_serving/engine.py", "See ", "See `trident_export.repository`, ", "repository"),
]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_a_small_whole_folder_has_nothing_wrong(small: Path) -> None:
    assert [problem for check in CHECKS for problem in check(small)] == []


@pytest.mark.parametrize(("check", "file", "old", "new", "problem"), DAMAGES)
def test_damage_is_found(small: Path, check: str, file: str, old: str, new: str, problem: str) -> None:
    text = (small / file).read_text(encoding="utf-8")
    assert old in text
    (small / file).write_text(text.replace(old, new), encoding="utf-8")
    found = [message for function in CHECKS if function.__name__ == check for message in function(small)]
    assert any(problem in message for message in found), found
