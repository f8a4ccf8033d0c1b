"""Search from the command line: `python -m keras_cluster_mask.search --help`.

```bash
python -m keras_cluster_mask.search index model.keras pictures/ --to pictures.npz
python -m keras_cluster_mask.search query pictures.npz "a dog on a beach" \\
    --model model.keras --tokenizer tokenizer.json --sheet results.png
```
"""

import sys

from keras_cluster_mask.command_line import run_command
from keras_cluster_mask.search import index_command, query_command


def main(arguments=None):
    """Runs a command.

    Args:
        arguments: list of str. Defaults to `None`: those of the program.

    Returns:
        int. The exit status: 0, 2 for an error, or 130 if the user has stopped it.
    """
    return run_command(
        "python -m keras_cluster_mask.search",
        "Search your own pictures by words or by a picture.",
        (index_command, query_command),
        arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
