"""Commands that prepare data: `python -m keras_cluster_mask.data --help`."""

import sys

from keras_cluster_mask.command_line import run_command
from keras_cluster_mask.data.preparation import (
    checking,
    contact_sheets,
    converting,
    counting,
    deduplication,
    reporting,
)

COMMANDS = (checking, counting, converting, deduplication, reporting, contact_sheets)


def main(arguments=None):
    """Runs a command.

    Args:
        arguments: list of str. Defaults to `None`: those of the program.

    Returns:
        int. The exit status: 0; 1 if `check` has found something broken, or there was
        no whole sample to write; 2 for an error; 130 if the user has stopped it.
    """
    return run_command(
        "python -m keras_cluster_mask.data",
        "Prepare image-text data for training.",
        COMMANDS,
        arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
