"""WebShop: a shop with a search engine, goals to buy for, and graded purchases. Start reading at `suite.py`."""

from lit_agentrl.envs.webshop.suite import WebShopSuite

__all__ = ["WebShopSuite"]
