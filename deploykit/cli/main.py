"""The command line: parse, one library call, print, exit code. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from pathlib import Path

import typer

from deploykit import __version__
from deploykit.cli import (
    build_commands,
    build_trt_command,
    commands,
    config,
    config_schema,
    gate_command,
    line_commands,
    look_commands,
    options,
    package_command,
    sweep_command,
)
from deploykit.errors import EXIT_INPUT, EXIT_INTERRUPTED, DeploykitError, OutOfSpace

# typer carries click inside itself since 0.2x: the class of all usage errors is reached through one it exports.
_UsageProblem: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="deploykit",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: rich would double the time that --help takes
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Takes a trained vision model and a folder of images and gives back the fastest engine for the hardware at hand "
    "that keeps the accuracy, with the evidence.\n\nStart here:  deploykit run resnet18 --weights none --data digits -o out",
    epilog="Exit codes: 0 passed, 1 a gate or a finding, 2 your input, 3 a backend or hardware is missing, 4 a backend failed, "
    "5 inconclusive. Every command takes --debug to show where an error came from.",
)


@app.callback(invoke_without_command=True)
def _top(version: bool = typer.Option(False, "--version", help="Print the version and leave.", is_eager=True)) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


line_commands.register(app)
commands.register(app)
build_commands.register(app)
build_trt_command.register(app)
look_commands.register(app)
package_command.register(app)
sweep_command.register(app)
gate_command.register(app)


def main() -> None:
    """Runs the command line and ends the process with its exit code."""
    # where a shell closed them (>&-): a file opened later would get their number
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    for name in ("SIGTERM", "SIGHUP"):  # a cancelled CI job, a closed terminal: cleans up as Ctrl-C does
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _stop)
    sys.exit(run(arguments, debug=debug))


_stopped_by = signal.SIGINT


def _stop(number: int, _frame: object) -> None:
    global _stopped_by
    _stopped_by = signal.Signals(number)
    raise KeyboardInterrupt


def run(arguments: list[str], *, debug: bool = False) -> int:
    """The exit code of one command line. The one place where a DeploykitError becomes a message."""
    try:
        result = app(args=_with_config(arguments), standalone_mode=False, prog_name="deploykit")
        sys.stdout.flush()
        if result == EXIT_INTERRUPTED:  # what typer makes of KeyboardInterrupt
            return _interrupted()
        return result if isinstance(result, int) else 0
    except DeploykitError as exc:
        return _tell(exc, debug)
    except (typer.Abort, KeyboardInterrupt):
        return _interrupted()
    except _UsageProblem as exc:
        exc.show()  # type: ignore[attr-defined]  # every usage error has it
        return EXIT_INPUT
    except typer.Exit as exc:
        return int(exc.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" ({exc.filename})" if exc.filename else ""
            return _tell(
                OutOfSpace(f"no space left on the disk{where}", "free some space and run it again; finished steps are kept"),
                debug,
            )
        if exc.filename is not None and exc.errno in (errno.EACCES, errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EROFS):
            return _tell(DeploykitError(f"{exc.filename}: {exc.strerror}", "check the path and its permissions"), debug)
        raise


def _with_config(arguments: list[str]) -> list[str]:
    """`run deploykit.yaml ...` as the command line it stands for; what is typed after it stands over the file."""
    if not arguments or arguments[0] != "run" or not any(config.is_config(text) for text in arguments):
        return arguments
    known = config_keys()
    flags = {f"--{name}" for name, key in known.items() if key.kind == "flag"} | {key.off for key in known.values() if key.off}

    def stands_alone(at: int) -> bool:
        before = arguments[at - 1]
        return not before.startswith("-") or before in flags or "=" in before

    # a text with a dash in front is an option with its value: --limits=limits.yaml
    files = (i for i, text in enumerate(arguments) if i > 0 and config.is_config(text) and not text.startswith("-"))
    at = next((i for i in files if stands_alone(i)), None)
    if at is None:
        return arguments
    return ["run", *config.arguments(Path(arguments[at]), known), *arguments[1:at], *arguments[at + 1 :]]


def config_keys() -> dict[str, config_schema.Key]:
    """The keys that a deploykit.yaml may hold: the options of `run`."""
    command = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]  # it is a group
    return config_schema.keys(command, options.spread(line_commands.run))


def _tell(exc: DeploykitError, debug: bool) -> int:
    if debug:
        traceback.print_exception(exc)
    else:
        print(f"error: {exc}", file=sys.stderr)
    return exc.exit_code


def _interrupted() -> int:
    print("interrupted; nothing half-made was left, and finished steps are kept for next time", file=sys.stderr)
    return 128 + _stopped_by  # SIGINT: EXIT_INTERRUPTED


if __name__ == "__main__":
    main()
