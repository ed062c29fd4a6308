"""The loop of a conversation: read a message, obey or answer it, until the end of input."""

from optim.cli import ui
from optim.cli.conversation.chat import Chat, answer
from optim.cli.conversation.commands import find
from optim.cli.conversation.input import Reader
from optim.recipes.errors import OptimError

LEAVE = "Ctrl-D or /quit leaves"


def take(chat: Chat, text: str) -> None:
    """One message: a slash command or a question. Mistakes are explained and nothing ends."""
    try:
        command = find(text)
        if command is not None:
            command.handler(chat, "".join(text.split(maxsplit=1)[1:]))
        elif text:
            answer(chat, text)
    except OptimError as error:
        ui.error(error)


def talk(chat: Chat, read: Reader) -> None:
    """The loop: until /quit or the end of input."""
    while not chat.done:
        try:
            take(chat, read())
        except EOFError:
            break
        except KeyboardInterrupt:
            ui.note(LEAVE)
        except OptimError as error:
            ui.error(error)
