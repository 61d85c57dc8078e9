"""`hetero-attn policy`: check a policy file, show how it was understood, compare two, the schema for editors."""

from typing import Annotated

import typer

from hetero_attn.cli import options
from hetero_attn.cli.output import print_json, remark

app = typer.Typer(help="Check, show and compare policy files.", no_args_is_help=True)

File = Annotated[str, typer.Argument(help="A policy file, or the name of a shipped policy.", show_default=False)]


@app.command()
def lint(file: File, as_json: options.Json = False) -> None:
    """Report every problem of a policy with its line; exit code 2 where there is one."""
    from placement.policy.policy import Policy
    from placement.policy.problems import PolicyError

    try:
        policy, problems = Policy.load(file), tuple[str, ...]()
    except PolicyError as error:
        policy, problems = None, error.problems
    if as_json:
        print_json({"file": file, "valid": policy is not None, "problems": list(problems)})
    elif policy is not None:
        typer.echo(f"{file}: ok, {len(policy.rules)} rules")
    for problem in () if as_json else problems:
        remark(problem)
    if problems:
        raise typer.Exit(2)


@app.command()
def show(file: File, as_json: options.Json = False) -> None:
    """Print a policy as it was understood; what is left out is auto."""
    from placement.policy.policy import Policy

    policy = Policy.load(file)
    if as_json:
        print_json(policy.model_dump(mode="json"))
    else:
        typer.echo(policy.to_yaml(), nl=False)


@app.command()
def diff(file: File, other: File, as_json: options.Json = False) -> None:
    """Print where two policies differ, one line each; exit code 1 where they do, as diff does."""
    from placement.policy.policy import Policy

    lines = Policy.load(file).diff(Policy.load(other))
    if as_json:
        print_json({"differences": lines})
    else:
        for line in lines:
            typer.echo(line)
    if lines:
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON Schema of policy files, for editors that check and complete YAML."""
    from placement import policy_schema

    print_json(policy_schema())


@app.command()
def reference() -> None:
    """Print the page about policy files, every key described, as Markdown."""
    from placement.policy.reference import policy_page

    typer.echo(policy_page(), nl=False)
