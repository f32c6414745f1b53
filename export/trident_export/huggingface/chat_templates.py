"""A chat template is a program: it is run first in a process of its own, with bounds on time, memory and length.

One that loops for ever, or writes gigabytes, would do so in an export and in a server, too. What is within the bounds
for the conversations here is rendered without them afterwards.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from trident_export.errors import UnreadableSource

# Of each message, its role and what it says.
Conversations = Sequence[Sequence[tuple[str, str]]]
# Conversations that the gate compares, too: with a system message, and with an answer.
CONVERSATIONS: Conversations = (
    (("user", "Hello"),),
    (("system", "Answer briefly."), ("user", " What is 2 + 2?\n")),
    (("user", "Hi <|im_end|>"), ("assistant", "Bonjour, é 😀"), ("user", "中文?")),
)
SECONDS = 5
_MEBIBYTES = 1024
_CHARACTERS = 2**20
_MEND = "mend it in chat_template.jinja or tokenizer_config.json, or take it away to serve the model without messages"


def check(
    source: object,
    template: str,
    special_tokens: Mapping[str, str],
    conversations: Conversations = CONVERSATIONS,
    seconds: int = SECONDS,
) -> None:
    """Render conversations by a template within the bounds; it may refuse all but the first.

    Args:
        source: what a message names.
        special_tokens: texts by role, as the runtime gives them to the template.
        seconds: of a processor, for all of them.

    Raises:
        UnreadableSource: the template does not parse, fails, is beyond a bound, or writes what is no text.
    """
    order = json.dumps(
        {
            "template": template,
            "special_tokens": dict(special_tokens),
            "conversations": conversations,
            "seconds": seconds,
        }
    )
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(command, input=order, capture_output=True, text=True, check=False, timeout=20 * seconds)
    except subprocess.TimeoutExpired:
        why = f"it is not done after {20 * seconds} seconds"
    else:
        if done.returncode == 0:
            return
        ended = done.returncode in (-signal.SIGXCPU, -signal.SIGKILL)
        said = done.stdout.strip() or "its process ended"
        why = f"it is not done after {seconds} seconds of a processor" if ended else said
    raise UnreadableSource(f"{source}: the chat template can't be used ({why}): {_MEND}")


def _main() -> int:
    """Read an order on standard input; say what is wrong on standard output."""
    from jinja2 import TemplateError, TemplateSyntaxError

    from trident_serving.chat.messages import Conversation
    from trident_serving.chat.template import ChatTemplate

    order = json.load(sys.stdin)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    room = used + _MEBIBYTES * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_CPU, (order["seconds"], order["seconds"] + 1))
    try:
        template = ChatTemplate(order["template"], order["special_tokens"])
        for index, conversation in enumerate(order["conversations"]):
            try:
                text = template.run(
                    Conversation([{"role": role, "content": content} for role, content in conversation])
                )
            except TemplateError as error:
                if index:
                    continue  # a template may refuse a system message
                print(error.message)
                return 1
            if len(text) > _CHARACTERS:
                print(f"it writes {len(text)} characters for a short conversation, the limit is {_CHARACTERS}")
                return 1
            if text.encode("utf-8", "ignore").decode() != text:
                print("it writes half of a surrogate pair, which is no text")
                return 1
    except TemplateSyntaxError as error:
        print(f"{error.message}, line {error.lineno}")
    except TemplateError as error:
        print(error.message)
    except MemoryError:
        print(f"it takes more than {_MEBIBYTES} MiB")
    except OverflowError as error:
        print(f"it counts too far: {error}")
    except RecursionError:
        print("it is nested too deeply, or calls itself without an end")
    except Exception as error:  # a template can raise whatever its expressions raise
        print(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(_main())
