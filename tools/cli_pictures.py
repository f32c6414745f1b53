"""Draws docs/images/cli-*.svg: what `trident` shows on a terminal, against a real server.

python tools/cli_pictures.py [--repository model_repository]  needs smollm2 and minilm, and takes a minute

Every command runs on a terminal of its own, whose screen is drawn as it is.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import fcntl
import itertools
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import MONOKAI
from rich.text import Text

from trident_serving.launcher import local
from trident_serving.launcher.local import LocalServer

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
COMMAND = [sys.executable, "-m", "trident_client.cli"]
_COLORS = {"brown": "yellow", "default": None}


class Screen:
    """A terminal, on which one command runs after the other."""

    def __init__(self, environment: dict[str, str], columns: int, rows: int) -> None:
        self._environment = {**os.environ, **environment, "TERM": "xterm-256color"}
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.Stream(self._screen)
        self._text = codecs.getincrementaldecoder("utf-8")("replace")
        self._pid = self._file = -1
        self._seen = ""

    def run(self, arguments: str, typed: str = "") -> None:
        """Start a command.

        Args:
            arguments: of `trident`.
            typed: what is shown as them.
        """
        self._stream.feed(f"$ trident {typed or arguments}\r\n")
        self._pid, self._file = pty.fork()
        if self._pid == 0:
            os.execve(COMMAND[0], [*COMMAND, *arguments.split()], self._environment)
        size = struct.pack("HHHH", self._screen.lines, self._screen.columns, 0, 0)
        fcntl.ioctl(self._file, termios.TIOCSWINSZ, size)

    def read(self, seconds: float) -> bool:
        """Take what comes in so many seconds; False once the command has ended."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self._file], [], [], left)[0]:
                continue
            try:
                content = os.read(self._file, 65536)
            except OSError:
                return False
            if not content:
                return False
            text = self._text.decode(content)
            self._seen += text
            self._stream.feed(text)
        return True

    def until(self, pattern: str, seconds: float = 60) -> None:
        """Wait for what the command shows next."""
        deadline = time.monotonic() + seconds
        while (found := re.search(pattern, self._seen)) is None:
            if not self.read(0.05) or time.monotonic() > deadline:
                raise SystemExit(f"no {pattern!r} in {self._seen!r}")
        self._seen = self._seen[found.end() :]

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._file, text.encode())

    def finish(self) -> None:
        """Wait for the command's end."""
        while self.read(0.2):
            pass
        os.waitpid(self._pid, 0)
        os.close(self._file)

    def draw(self, name: str) -> None:
        """Write the screen as a picture."""
        lines = [self._line(row) for row in range(self._screen.lines)]
        while lines and not lines[-1].plain.strip():
            lines.pop()
        console = Console(record=True, width=self._screen.columns, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
        for line in lines:
            console.print(line, no_wrap=True, crop=True)
        from rich._export_format import CONSOLE_SVG_FORMAT

        # Without the fonts that it would fetch from another server.
        form = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
        form = form.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, monospace")
        svg = console.export_svg(title="", theme=MONOKAI, code_format=form, unique_id=name)
        (IMAGES / f"{name}.svg").write_text("\n".join(map(str.rstrip, svg.splitlines())) + "\n", encoding="utf-8")

    def _line(self, row: int) -> Text:
        cells = [self._screen.buffer[row][column] for column in range(self._screen.columns)]
        text = Text()
        for style, run in itertools.groupby(cells, key=lambda cell: (cell.fg, cell.bg, cell.bold, cell.italics)):
            color, background, bold, italic = style
            shown = Style(color=_color(color), bgcolor=_color(background), bold=bold, italic=italic)
            text.append("".join(cell.data for cell in run), shown)
        text.rstrip()
        return text


def _color(name: str) -> str | None:
    if re.fullmatch("[0-9a-f]{6}", name):
        return f"#{name}"
    name = _COLORS.get(name, name) or ""
    return re.sub("^bright", "bright_", name) or None


@contextlib.contextmanager
def load(server: LocalServer) -> Iterator[None]:
    """Some callers for the time of a `with` block."""
    command = [*COMMAND, "batch", "-", os.devnull, "--verb", "generate", "--model", "smollm2", "--concurrency", "6"]
    command += ["--option", "max_tokens=60", "--lines", "--quiet", "--url", server.grpc_url]
    texts = subprocess.Popen(["yes", "The river runs past a mill and"], stdout=subprocess.PIPE)
    other = [*COMMAND, "batch", "-", os.devnull, "--verb", "embed", "--lines", "--quiet", "--url", server.grpc_url]
    callers = [subprocess.Popen([*each, "--concurrency", "4"], stdin=texts.stdout) for each in (command, other)]
    try:
        yield
    finally:
        for caller in callers:
            caller.send_signal(signal.SIGINT)
            caller.wait(30)
        texts.terminate()
        texts.wait(10)


def draw(server: LocalServer, folder: Path) -> None:
    """Every picture."""
    environment = {
        "TRIDENT_URL": server.grpc_url,
        "TRIDENT_METRICS_URL": server.metrics_url,
        "XDG_STATE_HOME": str(folder),
        "PROMPT_TOOLKIT_NO_CPR": "1",
    }

    talk = Screen(environment, 90, 40)
    talk.run("chat --model smollm2")
    talk.until(">>>")
    for line, after in (
        ("What is the capital of France?", "tokens, first"),
        ("/set max_tokens 20", "= 20"),
        ("Tell me about the river there.", "tokens, first"),
        ("/undo", "took back"),
        ("/history", "assistant: "),
    ):
        talk.type(f"{line}\r")
        talk.until(after)
        talk.until(">>>")
    talk.read(0.3)
    talk.draw("cli-chat")
    talk.type("\x04")
    talk.finish()

    lines: list[dict[str, object]] = [
        {"id": f"q{number}", "text": f"{number} plus {number} is", "max_tokens": 40} for number in range(40)
    ]
    lines[7]["top_p"] = 7
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    typed = "batch in.jsonl out.jsonl --verb generate --model smollm2"
    arguments = typed.replace("in.jsonl out.jsonl", f"{folder}/in.jsonl {folder}/out.jsonl")
    batch = Screen(environment, 110, 12)
    batch.run(arguments, typed)
    batch.until("[1-9][0-9]/40")
    batch.type("\x03")
    batch.finish()
    batch.run(arguments, typed)
    batch.finish()
    batch.draw("cli-batch")

    with load(server):
        time.sleep(3)
        live = Screen(environment, 130, 16)
        live.run("top")
        live.until("generators")
        live.read(6)
        live.draw("cli-top")
        live.type("\x03")
        live.finish()

    bench = Screen(environment, 120, 12)
    bench.run("bench --model smollm2")
    bench.finish()
    bench.draw("cli-bench")


def main() -> int:
    """Start a server and draw; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repository")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, local.running(options.repository, Path(folder) / "log") as server:
        draw(server, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
