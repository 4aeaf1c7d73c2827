"""`python -m lit_agentrl` is the command `lit-agentrl`."""

from lit_agentrl.cli import main

main()
