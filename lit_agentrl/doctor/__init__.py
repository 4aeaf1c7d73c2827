"""`lit-agentrl doctor`: equality, cost and noise of training on the user's own model and rows."""
