"""`rosaq`: its commands, and what happens when one of them fails.

Exit codes: 0 done; 1 something that the user gave is wrong, said in one sentence; 2 the command line itself is wrong;
130 interrupted (Ctrl-C); 143 terminated. Whatever the code, nothing half-written has the output's name; what can be
continued is in a hidden folder beside it, and the message says so.
"""

import os
import signal
import sys

import typer

from rosaq_cli import benchmark
from rosaq_cli.compare import compare
from rosaq_cli.distill import distill
from rosaq_cli.evaluate import evaluate
from rosaq_cli.export import export
from rosaq_cli.generate import generate
from rosaq_cli.inspect import inspect
from rosaq_cli.quantize import quantize
from rosaq_cli.recipes import recipes
from rosaq_cli.report import report
from rosaq_cli.screen import errors
from rosaq_cli.serve import SETTINGS, serve
from rosaq_cli.verify import verify

QUANTIZE, MEASURE, RUN = "Quantize", "Check and measure", "Run"
EPILOG = "Exit codes: 0 done; 1 something given is wrong; 2 so is the command line; 130 interrupted; 143 terminated."
app = typer.Typer(
    help="Quantize language models to 2, 3 and 4 bits with rotation-based saliency (ROSAQ), and run them.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode="rich",
)
app.command(rich_help_panel=QUANTIZE, short_help="Make a checkpoint of a model; --plan: only say what it takes.")(quantize)
app.command(rich_help_panel=QUANTIZE, short_help="Train what a checkpoint keeps precise, for the same bits.")(distill)
app.command(rich_help_panel=QUANTIZE, short_help="List the recipes, with their bits per weight.")(recipes)
app.command(rich_help_panel=MEASURE, short_help="Check a checkpoint's hashes, shapes and values.")(verify)
app.command(rich_help_panel=MEASURE, short_help="Perplexity, divergence from the original, zero-shot tasks.")(evaluate)
app.command(rich_help_panel=MEASURE, short_help="Several recipes on one model, in one table.")(compare)
app.command(rich_help_panel=MEASURE, short_help="Activations before and after rotation, errors by layer.")(inspect)
app.command(rich_help_panel=MEASURE, short_help="One HTML page of all that was measured.")(report)
app.add_typer(benchmark.app, name="benchmark", rich_help_panel=MEASURE, short_help="Time kernels, decoding, quantizing.")
app.command(rich_help_panel=RUN, short_help="Continue a prompt.")(generate)
app.command(rich_help_panel=RUN, short_help="Serve a checkpoint with vLLM over the OpenAI protocol.", context_settings=SETTINGS)(serve)
app.command(rich_help_panel=RUN, short_help="Write a checkpoint for engines that do not know rosaq.")(export)


def _version(show: bool) -> None:
    if show:
        from rosaq_cli.release import version

        print(f"rosaq {version()}")  # noqa: T201
        raise typer.Exit


@app.callback()
def options(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version and exit.")) -> None:
    """Options of rosaq itself."""


def main() -> None:
    """Run the command line; the entry point `rosaq`."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is about its own options, not ours
    signal.signal(signal.SIGINT, _stop)  # not as KeyboardInterrupt, which the library of the command line ends without a word
    signal.signal(signal.SIGTERM, _stop)
    try:
        app()
    except (ValueError, MemoryError, NotImplementedError) as error:
        _say(str(error), error)
        sys.exit(1)
    except OSError as error:  # what the file system refuses, such as a name that is too long
        _say(f"{error.filename or 'a file'}: {error.strerror or error}", error)
        sys.exit(1)
    except Stopped as error:
        _say("interrupted" if error.number == signal.SIGINT else "terminated", error)
        sys.exit(128 + error.number)


class Stopped(BaseException):
    """A signal asked the process to end."""

    def __init__(self, number: int) -> None:
        """Which signal."""
        super().__init__()
        self.number = number


def _stop(number: int, _: object) -> None:
    raise Stopped(number)


def _say(what: str, error: BaseException) -> None:
    """One sentence, with what a stage that the error passed had to add."""
    told = "; ".join([" ".join(what.split()) or type(error).__name__, *getattr(error, "__notes__", [])])
    errors.print(f"rosaq: {told}", style="red", markup=False, highlight=False, soft_wrap=True)
