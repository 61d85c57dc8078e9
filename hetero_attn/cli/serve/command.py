"""`hetero-attn serve`: a model over HTTP, for the tools that people have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hetero_attn.cli import options
from hetero_attn.cli.output import read_text

if TYPE_CHECKING:
    from socket import socket

    from hetero_attn import LLM
    from hetero_attn.server.settings import ServerSettings

SEQUENCES = 4


@options.spread
def serve(
    model: options.Model,
    *,
    host: Annotated[
        str, typer.Option(help="Where to listen; elsewhere than on loopback a key is needed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option(help="Key that clients must present; seen in lists of processes.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="Take the key from a file.")] = None,
    served_name: Annotated[str | None, typer.Option(help="The model's name to clients. Default: its own.")] = None,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; others get 429.", min=0)] = 256,
    ping_interval: Annotated[
        float, typer.Option(help="Seconds of silence before a stream is kept alive; 0: never.")
    ] = 15,
    allow_host: Annotated[list[str] | None, typer.Option(help="A Host that requests may name.")] = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="An origin whose pages may ask.")] = None,
    ui: Annotated[bool, typer.Option(help="Show a page at /, with a chat and what the lanes do.")] = True,
    speculate: options.Speculate = None,
    loading: options.Loading,
) -> None:
    """Serve a model by OpenAI's, Anthropic's and Ollama's protocols; /health answers at once, everything else once the
    model is loaded."""
    _check_installed()
    from hetero_attn.server.run import serve as serve_on
    from hetero_attn.server.settings import ServerSettings

    settings = ServerSettings(
        host=host,
        port=port,
        api_key=_key(api_key, api_key_file),
        served_name=served_name,
        max_waiting=max_waiting,
        ping_interval_s=ping_interval,
        allowed_hosts=tuple(allow_host or ()),
        allowed_origins=tuple(allow_origin or ()),
        has_page=ui,
    )
    sock = _listen(settings)

    def load() -> LLM:
        from hetero_attn.server.driver import settled, warmed

        places = SEQUENCES if loading.batch is None else loading.batch
        return settled(warmed(loading.llm(model, seed=None, max_batch=places, speculate=speculate)))

    settings = replace(settings, port=sock.getsockname()[1])
    typer.echo(f"loading {model}; {settings.address}/health tells when it is ready", err=True)
    serve_on(load, settings, lambda text: typer.echo(text, err=True), sock)


def _check_installed() -> None:
    """Raise typer.BadParameter, with how to install it, where a library that only a server needs is not there."""
    try:
        import hetero_attn.server.run  # noqa: F401
    except ImportError as missing:
        if missing.name is None or missing.name.partition(".")[0] not in ("starlette", "uvicorn", "prometheus_client"):
            raise
        raise typer.BadParameter(f"serve needs {missing.name}: pip install 'hetero-attn[server]'") from None


def _listen(settings: ServerSettings) -> socket:
    """The socket at the host and port of the settings; raises typer.BadParameter where there can be none."""
    from hetero_attn.server.run import listen

    try:
        return listen(settings)
    except OSError as error:
        raise typer.BadParameter(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; choose another --port"
        ) from None


def _key(key: str | None, file: Path | None) -> str | None:
    if key is not None and file is not None:
        raise typer.BadParameter("give the key by --api-key or by --api-key-file, one of the two")
    found = key if file is None else read_text(file).strip()
    if found == "":
        raise typer.BadParameter("the key is empty; give one, or leave the option out")
    return found
