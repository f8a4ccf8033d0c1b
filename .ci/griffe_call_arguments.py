"""Shows `Call arguments` in docstrings as a list, like other arguments."""

import griffe


class CallArguments(griffe.Extension):
    """Renames the section to one that griffe knows, and keeps its title."""

    def on_instance(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace(
                "Call arguments:\n", "Other Parameters: Call arguments:\n"
            )
