"""Errors that are the user's to fix: the command line prints their text, without a traceback."""


class UserError(ValueError):
    """A wrong option, file or environment; the text says what was given, what is allowed and what to do."""


def missing_extra(package: str, extra: str, purpose: str) -> UserError:
    """The error for a package that is not installed, naming the extra that brings it."""
    return UserError(
        f"{purpose} needs the package `{package}`, which is not installed: pip install 'lit-agentrl[{extra}]'"
    )
