"""Runs guides as notebooks, and writes them with their outputs as Markdown.

    KERAS_BACKEND=jax python guides/render.py guides/compare_maskings.py

writes `docs/guides/compare_maskings.md` with its plots, and the notebook. A guide that raises an
error stops the program. `--missing` writes the guides whose pages do not exist, without running
them. Needs `pip install jupytext nbconvert ipykernel`.
"""

import argparse
import re
from pathlib import Path

import jupytext
import nbclient
import nbconvert
import nbformat

ROOT = Path(__file__).resolve().parents[1]
# Colors of terminals, and the backspaces of progress bars.
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|\x08")


def run(path):
    """Returns the notebook of a guide, with its outputs."""
    notebook = jupytext.read(path)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata["kernelspec"] = kernel
    # Runs in the current folder, because guides write to `results`.
    client = nbclient.NotebookClient(
        notebook, timeout=1800, resources={"metadata": {"path": Path.cwd()}}
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = readable(cell.outputs)
    return notebook


def readable(outputs):
    """Returns outputs without warnings, with only the last state of progress bars."""
    text = "".join(
        output.text
        for output in outputs
        if output.output_type == "stream" and output.name == "stdout"
    )
    lines = ESCAPES.sub("", text).split("\n")
    text = "\n".join(line.rstrip("\r ").rpartition("\r")[2] for line in lines)
    shown = [output for output in outputs if output.output_type != "stream"]
    if text.strip():
        shown.insert(0, nbformat.v4.new_output("stream", name="stdout", text=text))
    return shown


def write(notebook, name, folder):
    """Writes a notebook as Markdown, with links that work in its folder."""
    notebook.metadata.setdefault("language_info", {"name": "python"})
    exporter = nbconvert.MarkdownExporter()
    resources = {"output_files_dir": f"{name}_files", "unique_key": name}
    text, resources = exporter.from_notebook_node(notebook, resources)
    text = re.sub(r"\]\((\w+)\.py", r"](\1.md", text)
    text = text.replace("](../docs/", "](../")
    # Links to files that are not on the site become plain text.
    text = re.sub(r"\[([^\]]+)\]\(\.\./(examples/[^)]+)\)", r"\1 (`\2`)", text)
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in resources["outputs"].items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(content)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    nbformat.write(notebook, folder / f"{name}.ipynb")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("guides", nargs="+", type=Path)
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "guides")
    parser.add_argument("--missing", action="store_true")
    args = parser.parse_args()
    for path in args.guides:
        if args.missing and (args.to / f"{path.stem}.md").exists():
            continue
        write(jupytext.read(path) if args.missing else run(path), path.stem, args.to)
        print(f"{args.to / path.stem}.md")
