"""Commands that prepare data: `python -m keras_cluster_mask.data --help`."""

import argparse
import sys
import warnings

from keras_cluster_mask.data.preparation import (
    checking,
    contact_sheets,
    converting,
    counting,
    deduplication,
    reporting,
)

COMMANDS = (checking, counting, converting, deduplication, reporting, contact_sheets)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments=None):
    """Runs a command.

    Args:
        arguments: list of str. Defaults to `None`: those of the program.

    Returns:
        int. The exit status: 0; 1 if `check` has found something broken, or there was
        no whole sample to write; 2 for an error; 130 if the user has stopped it.
    """
    parser = Parser(
        prog="python -m keras_cluster_mask.data",
        description="Prepare image-text data for training.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        own = commands.add_parser(
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


if __name__ == "__main__":
    sys.exit(main())
