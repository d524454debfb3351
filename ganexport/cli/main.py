"""The ``ganexport`` command: finds the sub-command's file, and turns errors into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from types import FrameType

import click

from ganexport.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, EXIT_USAGE, GanExportError, Terminated, UsageError

#: Command name → (module, one line for the overview). One file a command; imported only when it runs.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("train", "Train a GAN from a recipe."),
    "convert": ("convert", "Export a generator: TorchScript, ONNX, TensorRT, OpenVINO, …"),
    "verify": ("verify", "Compare an artifact's outputs with its source; exit 1 when outside tolerance."),
    "generate": ("generate", "Make images from an artifact, one seed an image."),
    "evaluate": ("evaluate", "Measure the quality of a generator's images against real data."),
    "explore": ("explore", "Walk through latents, sweep truncations, compare classes and training images."),
    "bench": ("bench", "Measure latency and throughput of every backend, side by side."),
    "serve": ("serve", "Serve an artifact over HTTP."),
    "inspect": ("inspect", "Show what an artifact, run or ONNX file holds."),
    "doctor": ("doctor", "Say which backends, kernels and devices work on this machine, and why not."),
    "recipes": ("recipes", "List the recipes and trained models that come with ganexport."),
}


class LazyGroup(click.Group):
    """A group whose sub-commands are imported when they are asked for, so that ``--help`` is instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands that are installed, in the order of a user's work."""
        from importlib.util import find_spec

        return [name for name, (module, _) in COMMANDS.items() if find_spec(f"ganexport.cli.{module}")]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command = importlib.import_module(f"ganexport.cli.{COMMANDS[cmd_name][0]}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, naming the nearest one when there is none of that name."""
        from ganexport.errors import unknown_name

        if args and not args[0].startswith("-") and args[0] not in self.list_commands(ctx):
            raise click.UsageError(str(unknown_name("command", args[0], self.list_commands(ctx))))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The overview, from the table above, without importing any command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="ganexport", message="ganexport %(version)s")
def cli() -> None:
    """From a GAN checkpoint to a verified, benchmarked, production-ready generator."""


def _on_sigterm(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with the documented code."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 done; 1 a check failed; 2 bad usage, bad input or a refusal; 130 Ctrl-C; 143 SIGTERM.
    """
    try:
        _require_utf8(sys.argv[1:] if arguments is None else arguments)
        result = cli.main(args=arguments, prog_name="ganexport", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except GanExportError as error:
        _say(str(error))
        return error.exit_code
    except click.exceptions.Abort:
        _say("stopped by Ctrl-C")
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        where = f" (see: {error.ctx.command_path} --help)" if isinstance(error, click.UsageError) and error.ctx else ""
        _say(error.format_message() + where)
        return EXIT_USAGE
    except KeyboardInterrupt:
        _say("stopped by Ctrl-C")
        return EXIT_INTERRUPTED
    except Terminated:
        _say("stopped by SIGTERM")
        return EXIT_TERMINATED
    except BrokenPipeError:
        # The reader of our output went away (| head): nothing to say, and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _require_utf8(arguments: list[str]) -> None:
    """Refuse names that neither JSON nor the engines can take."""
    for word in arguments:
        if not word.isascii() and any("\ud800" <= letter <= "\udfff" for letter in word):
            raise UsageError(f"{os.fsencode(word)!r}: is not UTF-8; rename the file or folder")


def _say(message: str) -> None:
    click.echo(f"error: {' '.join(message.split())}", err=True)


if __name__ == "__main__":
    main()
