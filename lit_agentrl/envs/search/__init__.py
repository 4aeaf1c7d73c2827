"""Search agents: questions that are answered by searching a corpus."""
