"""What went wrong with an engine outside this process."""

from lit_agentrl.errors import UserError


class EngineError(UserError):
    """An engine that does not answer, answers wrongly or samples from other weights than it should.

    The text says which one, what came and what to do.
    """
