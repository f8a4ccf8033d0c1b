"""Shows the section `Call arguments` of docstrings as a list, like that of arguments."""

import griffe


class CallArguments(griffe.Extension):
    """Renames the section to one that griffe knows, and keeps its title."""

    def on_instance(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace(
                "Call arguments:\n", "Other Parameters: Call arguments:\n"
            )
