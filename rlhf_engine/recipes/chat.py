"""A conversation with one checkpoint, or with two whose responses are next to each other, in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_engine.config import RunConfig
from rlhf_engine.data import Message, PromptRecord
from rlhf_engine.recipes.generate import Answerer

HELP = "/reset starts a new conversation, /undo removes the last turn, /quit ends (as Ctrl-D does)"


class Chat:
    """A conversation with each of one or two models; every model sees its own responses.

    Without a chat template in a model's tokenizer, it has no conversation: every text is a prompt in `data.prompt_template`.

    Raises:
        ValueError: a model cannot be loaded, or `system` is set for a model without a chat template.
    """

    def __init__(self, config: RunConfig, models: Sequence[str], system: str | None = None) -> None:
        self.names = list(models)
        self.answerers = [Answerer(config, model, seed=config.seed) for model in models]
        self.templated = [bool(one.codec.chat.source) for one in self.answerers]
        if system is not None and not all(self.templated):
            name = self.names[self.templated.index(False)]
            raise ValueError(f"--system: the tokenizer of {name} has no chat template; remove it")
        self.start = () if system is None else (Message("system", system),)
        self.turns: list[tuple[str, list[str]]] = []
        """Texts of the user with the responses of the models."""
        self.asked = 0
        """Number of texts so far, on which the random numbers depend."""

    def ask(self, text: str) -> list[str]:
        """Return the response of each model to the user's next text.

        Raises:
            ValueError: the conversation is too long for a model, or its template refuses it; the turn is then left out.
        """
        replies = []
        for index, answerer in enumerate(self.answerers):
            prompt = self._conversation(index, text) if self.templated[index] else text
            (answers,) = answerer.answer(None, [PromptRecord(prompt)], 1, self.asked)
            replies.append(answers.texts[0])
        self.asked += 1
        self.turns.append((text, replies))
        return replies

    def _conversation(self, index: int, text: str) -> tuple[Message, ...]:
        earlier = [
            message
            for asked, replies in self.turns
            # A template may refuse an empty message.
            for message in (Message("user", asked), Message("assistant", replies[index] or " "))
        ]
        return (*self.start, *earlier, Message("user", text))


def run_chat(chat: Chat, lines: Iterable[str], console: Console) -> None:
    """Answer the lines of a user until they end or one is /quit, and print the responses on `console`."""
    console.print(Text(" | ".join(chat.names), style="bold"), Text(HELP, style="dim"), sep="\n")
    if not all(chat.templated):
        console.print("without a chat template, every text is a separate prompt", style="dim")
    for line in lines:
        text = line.strip()
        if text == "/quit":
            return
        if text == "/reset":
            chat.turns.clear()
        elif text == "/undo":
            del chat.turns[-1:]
        elif text.startswith("/"):
            console.print(HELP, style="dim")
        elif text:
            _turn(chat, text, console)


def _turn(chat: Chat, text: str, console: Console) -> None:
    waiting = console.status("sampling") if console.is_terminal else nullcontext()
    try:
        with waiting:
            replies = chat.ask(text)
    except ValueError as error:
        console.print(Text(f"{error}; /reset starts a new conversation", style="red"))
        return
    console.print(replies_view(chat.names, replies), Text(""))


def replies_view(names: Sequence[str], replies: Sequence[str]) -> Table | Text:
    """Return the response of one model as text, or those of two in columns of equal width."""
    if len(replies) == 1:
        return Text(shown(replies[0]))
    table = Table(expand=True)
    for name in names:
        table.add_column(Text(name), ratio=1, overflow="fold")
    table.add_row(*(Text(shown(reply)) for reply in replies))
    return table


def shown(text: str) -> str:
    """Return a response for a terminal: control characters, which could change its state, become U+FFFD."""
    return "".join(one if one.isprintable() or one in "\n\t" else "\ufffd" for one in text) or "(empty)"


def typed_lines(console: Console) -> Iterator[str]:
    """Yield the lines that a user types, until Ctrl-D."""
    while True:
        try:
            yield console.input("> ")
        except EOFError:
            console.print()
            return
