"""Errors that are the user's to fix: the command line prints their text, without a traceback."""


class UserError(ValueError):
    """A wrong option, file or environment; the text says what was given, what is allowed and what to do."""


class ImageError(UserError):
    """An image that cannot be shown: missing, empty, damaged, too large, or refused by a model's processor.

    The text names it. A rollout fails the episodes that would show it; whatever reads all of its data at the start ends
    there.
    """


def missing_extra(package: str, extra: str, purpose: str) -> UserError:
    """The error for a package that is not installed, naming the extra that brings it."""
    return UserError(
        f"{purpose} needs the package `{package}`, which is not installed: pip install 'lit-agentrl[{extra}]'"
    )
