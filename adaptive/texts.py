"""Text in, text out: tokenizer and chat template of an exported folder, without transformers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from adaptive.memory import give_back
from adaptive.sealed import check

ROLES = ("system", "user", "assistant")


class Chat:
    """Renders chat messages.

    Args:
        template: None, {"jinja": text, and the special tokens by name}, or, where what a template writes does not
            depend on more than the role, {"start": before a first message that is not the system's, "roles": {role:
            [before, after]}, "answer": before the answer}.
    """

    def __init__(self, template: dict | None):
        self.template = template

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """Returns the text of a conversation, up to where the answer begins.

        Raises:
            ValueError: no messages, unknown roles, a model without a chat template, a template that fails.
        """
        if self.template is None:
            raise ValueError("this model has no chat template; use generate")
        roles = self.template.get("roles")
        known = ROLES if roles is None else tuple(roles)
        if not messages or any(set(m) != {"role", "content"} or m["role"] not in known for m in messages):
            raise ValueError(
                f"`messages` must be a list of {{'role': ..., 'content': ...}} with roles among {', '.join(known)}; "
                f"got {[m.get('role') for m in messages]}"
            )
        if roles is None:
            return self._jinja(messages)
        out = "" if messages[0]["role"] == "system" else self.template["start"]
        for message in messages:
            before, after = roles[message["role"]]
            out += before + message["content"] + after
        return out + self.template["answer"]

    def _jinja(self, messages) -> str:
        try:
            environment = _environment()
        except ImportError:
            raise ValueError("this model's chat template needs jinja2: pip install jinja2, or use generate") from None
        values = {name: value for name, value in self.template.items() if name != "jinja"}
        values |= {"messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return environment.from_string(self.template["jinja"]).render(values)
        except Exception as error:  # templates raise what they like
            raise ValueError(f"the chat template fails on this conversation ({error}); use generate") from None


def _environment():
    """Returns what templates are rendered in: what transformers gives them, they have here."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}, which marks answers for training."""

        tags = {"generation"}

        def parse(self, parser):
            """Returns what the tag encloses."""
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str):
        raise TemplateError(message)

    def as_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # jinja2's own escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = as_json
    made.globals |= {"raise_exception": refuse, "strftime_now": lambda style: datetime.now().strftime(style)}
    return made


class Texts:
    """A tokenizer, loaded when it is first asked for: who gives ids and takes ids is spared its 15 MB.

    Args:
        path: of tokenizer.json.
        digest: its sha256, compared again when it is loaded.
        chat: renders conversations.
    """

    def __init__(self, path: Path, digest: str, chat: Chat):
        self.path, self.digest, self.template, self.loading, self.loaded = path, digest, chat, threading.Lock(), None

    @property
    def tokenizer(self):
        """The tokenizer."""
        with self.loading:
            if self.loaded is None:
                from tokenizers import Tokenizer

                check(self.path.parent, {self.path.name: self.digest})
                self.loaded = Tokenizer.from_file(str(self.path))
                give_back()
            return self.loaded

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Returns token ids; with `special`, what the tokenizer puts before every text, too.

        Raises:
            ValueError: the text is not valid Unicode (bytes that were no UTF-8).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt is not UTF-8 (at character {error.start}); pass valid text") from None
        return self.tokenizer.encode(text, add_special_tokens=special).ids

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Returns the ids of a conversation, up to where the answer begins."""
        return self.encode(self.template.render(messages), special=False)

    def stream(self) -> Callable[[int], str]:
        """Returns a function that takes the ids of an answer one by one and returns what each adds to its text."""
        from tokenizers.decoders import DecodeStream

        tokenizer, stream, held = self.tokenizer, DecodeStream(skip_special_tokens=True), []

        def add(token: int) -> str:
            """Returns what one more id adds."""
            nonlocal stream
            held.append(token)
            try:
                text = stream.step(tokenizer, token)
            except Exception:  # bytes that became no character take back the one before, which has been said
                stream = DecodeStream(skip_special_tokens=True)
                text = [stream.step(tokenizer, each) for each in held][-1]
            if text:
                held.clear()
            return text or ""

        return add
