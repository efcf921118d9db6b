"""Agents that know nothing of training: anything that talks to an OpenAI-compatible endpoint.

agent --chat/completions--> Endpoint --> Episode --> Transcript --> engine
                             key, path     ledger: exactly the tokens that were sampled
"""

from arealite.agents.endpoint import Endpoint
from arealite.agents.episode import Episode
from arealite.agents.workflow import AgentWorkflow

__all__ = ["AgentWorkflow", "Endpoint", "Episode"]
