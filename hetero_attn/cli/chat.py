"""`hetero-attn chat`: a conversation in the terminal. Ctrl-C ends an answer, /exit ends the program."""

from __future__ import annotations

import shutil
import sys
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hetero_attn.cli import options
from hetero_attn.cli.option_words import in_option_words
from hetero_attn.cli.output import speed_line
from hetero_attn.cli.talk.commands import HELP, command_of, parse_value, run_command
from hetero_attn.cli.talk.conversation import Conversation
from hetero_attn.cli.talk.first_words import FirstWords
from hetero_attn.cli.talk.line_editor import LineSource, line_source, read_message
from hetero_attn.cli.talk.word_wrap import WordWrap
from hetero_attn.errors import EngineDeadError, HeteroError
from hetero_attn.serving.prompts import as_template_variables

if TYPE_CHECKING:
    from hetero_attn import LLM

GREETING = "/help lists the commands; Ctrl-C ends an answer, Ctrl-D leaves"


@options.spread
def chat(
    model: options.Model,
    *,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    template_var: Annotated[
        list[str] | None,
        typer.Option(
            help="A variable of the chat template, such as enable_thinking=false; may be given several times."
        ),
    ] = None,
    sampling: options.Sampling,
    seed: options.Seed = 0,
    loading: options.Loading,
    speculate: options.Speculate = None,
) -> None:
    """Talk with a model; Ctrl-C ends an answer, /exit ends the program, /help lists what else there is."""
    variables = as_template_variables(dict(map(template_variable, template_var or ())))
    first = FirstWords(sampling.wishes())
    with loading.llm(model, seed=seed, needs_text=first, speculate=speculate) as llm:
        note(banner(llm))
        if unread := sorted(variables.keys() - llm.tokenizer.template_variables):
            note(f"the chat template does not read {', '.join(unread)}, so --template-var {unread[0]} changes nothing")
        talk = Conversation(llm, first.params, system, variables=variables)
        converse(talk, line_source(note, tuple(HELP)))


def converse(talk: Conversation, source: LineSource) -> None:
    """Read messages and print answers until /exit or the end of the input.

    What a person can mend is reported, and the conversation goes on; an engine that is dead ends it, and so does a
    stdout that takes no answers.
    """
    while True:
        try:
            line = read_message(source)
            if line and not take(talk, line):
                return
        except EOFError:
            return
        except KeyboardInterrupt:
            with suppress(KeyboardInterrupt):  # pressed twice it is the same wish
                talk.forget_question()
                note(GREETING)
        except EngineDeadError:
            raise
        except HeteroError as error:
            talk.forget_question()
            note(f"error: {in_option_words(str(error))}")


def take(talk: Conversation, line: str) -> bool:
    """Carry out a command or answer a message; False to leave."""
    command = command_of(line)
    if command == "/exit":
        return False
    if command == "/regen":
        question = talk.last_question()
        note("there is no question yet") if question is None else answer(talk, question, anew=True)
    elif command is not None:
        run_command(command, line.partition(" ")[2].strip(), talk, note)
    else:
        answer(talk, line.strip())
    return True


def answer(talk: Conversation, question: str, anew: bool = False) -> None:
    """Stream the answer to a question; what was printed of it becomes part of the conversation. anew: in place of the
    last one."""
    pieces, dropped = talk.ask(question, anew)
    if dropped:
        note(f"the context is full: the {dropped} oldest messages were dropped (--context holds more)")
    text, last = "", None
    write = screen()
    try:
        with closing(pieces):
            for last in pieces:
                write.push(last.text)
                text += last.text
    except KeyboardInterrupt:
        last = None
    finally:
        write.finish()
        typer.echo()
    talk.answered(text)
    if last is None or last.finish_reason == "abort":
        note("[interrupted]")
        return
    talk.last = last.metrics
    if last.finish_reason == "length":
        tokens = last.metrics.generated_tokens
        end = "the limit of --max-tokens" if tokens == talk.params.max_tokens else "the end of the context"
        note(f"[cut after {tokens} tokens: {end}]")
    note(speed_line(last.metrics))


def screen() -> WordWrap:
    """Where an answer is written: wrapped at words in a terminal, as it is into anything else."""
    width = shutil.get_terminal_size((80, 24)).columns if sys.stdout.isatty() else sys.maxsize
    return WordWrap(lambda text: typer.echo(text, nl=False), width)


def banner(llm: LLM) -> str:
    """What answers: model, dtype, context, where it runs and how fast the plan expects it to be."""
    from placement.plan.words import cpu_threads, expected

    plan = llm.plan
    speed = ""
    if predicted := expected(plan.predicted, plan.device):
        from placement.plan.units import rounded_speed

        speed = f", about {rounded_speed(predicted.decode.tokens_per_s)} tokens/s expected"
    return (
        f"{plan.model}: {plan.workload.weight_dtype} weights, {plan.workload.kv_dtype} cache, context "
        f"{plan.max_context}, "
        f"on {plan.device} with {cpu_threads(plan.num_threads)}{speed}\n{GREETING}"
    )


def template_variable(text: str) -> tuple[str, Any]:
    """Name and value of NAME=VALUE; raises typer.BadParameter."""
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals:
        raise typer.BadParameter(
            f"--template-var {text!r} is not of the form NAME=VALUE, such as enable_thinking=false"
        )
    return name, parse_value(value)


def note(text: str) -> None:
    """Say something beside the conversation, on stderr, in a terminal dim and broken at words."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=not sys.stderr.isatty(), highlight=False).print(Text(text, style="dim"))
