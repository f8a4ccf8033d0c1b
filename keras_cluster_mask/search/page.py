"""The page of the search."""

import html
import re

from PIL import Image

from keras_cluster_mask.data.images import EncodedImage

THUMBNAIL, MAX_CHARACTERS = 384, 1000
# Without a second scroll bar, and with whole names where the mouse is.
CSS = """.grid-wrap { max-height: none !important; }
.gallery-item:hover .caption-label { opacity: 1; white-space: normal; }"""


def page(index):
    """Returns the page of an `Index`, a `gr.Blocks`."""
    import gradio as gr

    def shown(query, count):
        """Returns thumbnails of the nearest photographs, and the names of these."""
        thumbnails, names = [], []
        for name, score in index.nearest(query, int(count)):
            try:
                content = (index.folder / name).read_bytes()
                image = EncodedImage(content, Image.MAX_IMAGE_PIXELS).decoded()
            except (OSError, ValueError):
                # Gradio shows messages as HTML.
                gr.Warning(f"{html.escape(as_text(name))} can no longer be read.")
                continue
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            thumbnails.append((image, f"{score:.3f}  {as_text(name)}"))
            names.append(name)
        # What was clicked before is no longer selected.
        return gr.Gallery(thumbnails, selected_index=None), names

    def by_words(words, count):
        if not words.strip() or len(words) > MAX_CHARACTERS:
            gr.Warning(f"Enter a text of 1 to {MAX_CHARACTERS} characters.")
            return gr.skip()
        return shown(index.model.encode_text(words)[0], count)

    def by_photo(names, count, clicked: gr.SelectData):
        number = index.names.index(names[clicked.index])
        return shown(index.embeddings[number], count)

    with gr.Blocks(title="Search photographs", delete_cache=(600, 3600)) as made:
        gr.Markdown(f"# Search {len(index.names):,} photographs")
        words = gr.Textbox(
            label="Sentence",
            placeholder="a dog in the snow",
            info="Click a photograph to find similar ones.",
        )
        count = gr.Slider(1, 60, 12, step=1, label="Photographs, best first")
        gallery = gr.Gallery(
            show_label=False,
            columns=4,
            object_fit="contain",
            height="auto",
            interactive=False,
            preview=False,
            allow_preview=False,
        )
        if index.left_out:
            # A name may look like Markdown or HTML, which a text box shows as text.
            lines = "\n".join(map(as_text, index.left_out))
            gr.Textbox(lines, label="Skipped files", max_lines=10)
        names = gr.State([])
        results = [gallery, names]
        words.submit(by_words, [words, count], results, api_visibility="private")
        gallery.select(by_photo, [names, count], results, api_visibility="private")
    return made


def as_text(name):
    """Replaces control characters, and bytes that are not UTF-8."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", name)
