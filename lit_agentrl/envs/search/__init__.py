"""Search agents: questions, tools to find their answers with, and scores. Start reading at `suite.py`."""

from lit_agentrl.envs.search.pages import CorpusPages
from lit_agentrl.envs.search.suite import SearchSuite
from lit_agentrl.envs.search.web import WebSuite

__all__ = ["CorpusPages", "SearchSuite", "WebSuite"]
