"""What an agent can do besides reasoning: each tool a small class with a typed schema, usable without the agent."""
