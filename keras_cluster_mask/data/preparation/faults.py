"""Counts of what is broken."""

# So many are told of, unless all are asked for.
EXAMPLES = 100


class FaultCount:
    """How many samples are broken, and which are the first.

    Args:
        by_reason: dict from a reason to a count, to go on from.
        first: list of `[shard, key, reason]`, likewise.
    """

    def __init__(self, by_reason=(), first=()):
        self.by_reason = dict(by_reason)
        self.first = list(first)

    def add(self, shard, key, reason):
        """Counts a sample."""
        self.by_reason[reason] = self.by_reason.get(reason, 0) + 1
        if len(self.first) < EXAMPLES:
            self.first.append([shard, key, reason])

    def summary(self):
        """A dict of `"broken"`, `"by_reason"`, `"first_broken"`, for JSON."""
        return {
            "broken": sum(self.by_reason.values()),
            "by_reason": dict(sorted(self.by_reason.items())),
            "first_broken": self.first,
        }


def print_faults(summary, examples=10):
    """Prints how many are broken for which reason, and the first.

    Args:
        summary: dict, as `FaultCount.summary` returns it.
        examples: int. How many to name.
    """
    for reason, count in summary["by_reason"].items():
        print(f"{count:>12,}  {reason}")
    first = summary["first_broken"][:examples]
    if first:
        print("The first:")
    for shard, key, reason in first:
        print(f"  {printable(shard)}  {printable(key)}  {reason}")


def printable(text):
    """Text, or None, as any terminal can show it in one line."""
    text = "-" if text is None else str(text)
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
