"""What the commands of all rooms share: `python -m keras_cluster_mask.ROOM COMMAND`."""

import argparse
import sys
import warnings


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def run_command(program, description, commands, arguments=None):
    """Runs one of several commands.

    Args:
        program: str. How the program is called.
        description: str. What it is for.
        commands: Modules with `NAME`, `HELP`, `add_arguments(parser)` and
            `run(options)`, which returns the exit status.
        arguments: list of str. Defaults to `None`: those of the program.

    Returns:
        int. The exit status: the command's own; 2 for an error; 130 if the user has
        stopped it.
    """
    parser = Parser(prog=program, description=description)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in commands:
        own = subparsers.add_parser(
            command.NAME, help=command.HELP, description=command.HELP.capitalize() + "."
        )
        command.add_arguments(own)
        own.set_defaults(run=command.run, prog=own.prog)
    options = parser.parse_args(arguments)
    # What Pillow warns of is counted, or does no harm.
    warnings.filterwarnings("ignore", module="PIL")
    try:
        return options.run(options)
    except (ValueError, OSError, ImportError) as error:
        message = " ".join(str(error).split())
        print(f"{options.prog}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{options.prog}: stopped", file=sys.stderr)
        return 130
