"""`ridgeline …`: gathers the commands and words errors.

Knows commands' names. It must not import torch: each command loads what it needs when it runs.
"""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.text import Text

from ridgeline import __version__
from ridgeline.cli import (
    bench,
    bench_serve,
    bench_serving,
    calibrate,
    explain,
    generate,
    kernels,
    plan,
    price,
    profile,
    serve,
    simulate,
)
from ridgeline.core.errors import RidgelineError

application = typer.Typer(
    name="ridgeline",
    help="An LLM inference engine that runs at the limit of the hardware and knows what that limit is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
application.command("generate")(generate.command)
application.add_typer(kernels.application)
bench.application.command("throughput")(bench_serving.command)
bench.application.command("serve")(bench_serve.command)
application.add_typer(bench.application)
application.command("calibrate")(calibrate.command)
application.command("explain")(explain.command)
application.command("plan")(plan.command)
application.command("price")(price.command)
application.command("profile")(profile.command)
application.command("serve")(serve.command)
application.command("simulate")(simulate.command)


def _version(asked: bool) -> None:
    if asked:
        print(f"ridgeline {__version__}")
        raise typer.Exit


@application.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None: ...


def main() -> None:
    """Entry point. A refusal is one line on standard error and exit status 1; Ctrl-C is 130."""
    try:
        application(standalone_mode=True)
    except RidgelineError as error:
        message = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), message))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
