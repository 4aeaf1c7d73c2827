"""A scripted shopper that knows the goal's product: demonstrations, and the proof that a goal can be won."""

from __future__ import annotations

from collections.abc import Iterator

from lit_agentrl.envs.webshop.goals import Goal
from lit_agentrl.envs.webshop.pages import BUY, NEXT, Page, Site
from lit_agentrl.envs.webshop.reward import normalize_colour, score, similar
from lit_agentrl.envs.webshop.search import RESULTS_PER_PAGE


def plan(site: Site, goal: Goal) -> list[str] | None:
    """The actions that buy the goal's product for a score of 1; None where no options or no query would do."""
    clicks = _option_clicks(site, goal)
    if clicks is None:
        return None
    for query in _queries(goal):
        found = site.catalogue.search(query)
        if goal.product.asin in found:
            pages = found.index(goal.product.asin) // RESULTS_PER_PAGE
            targets = [NEXT] * pages + [goal.product.asin, *clicks, BUY]
            return [f"search[{query}]", *(f"click[{target}]" for target in targets)]
    return None


def _queries(goal: Goal) -> Iterator[str]:
    """What to search for: first what the instruction says, which can be learnt, then what only the product says."""
    values = [value for _, value in goal.options]
    yield " ".join([goal.product.query, *goal.attributes])
    yield " ".join([goal.product.query, *goal.attributes, *values])
    yield goal.instruction
    yield " ".join(goal.product.title.split())
    yield " ".join(goal.product.search_text.split())


def _option_clicks(site: Site, goal: Goal) -> list[str] | None:
    """The option values to click, checked by clicking them."""
    wanted = [_offered(goal, name, value) for name, value in goal.options]
    order = [value for name, values in goal.product.options for value in values if (name, value) in wanted]
    page, clicks = Page("item", asin=goal.product.asin), list[str]()
    for value in order:
        following = site.links(page).get(value)
        if following is None or following.kind != "item":
            return None
        page, clicks = following, [*clicks, value]
    chosen = [value for _, value in page.options]
    return clicks if score(goal.product, chosen, goal).total == 1.0 else None


def _offered(goal: Goal, name: str, wanted: str) -> tuple[str, str] | None:
    """The product's own (list, value) for a wanted option: the very one, else one that counts as it."""
    offers = [(list_name, value) for list_name, values in goal.product.options for value in values]
    exact = [offer for offer in offers if offer[1] == wanted.lower() and name in ("", offer[0])]
    close = [offer for offer in offers if similar(normalize_colour(offer[1]), normalize_colour(wanted))]
    return next(iter(exact + close), None)
