"""The site: its pages as values, what each shows, and where each click leads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lit_agentrl.envs.webshop.catalogue import Catalogue
from lit_agentrl.envs.webshop.products import Product
from lit_agentrl.envs.webshop.search import RESULTS_PER_PAGE

PageKind = Literal["search", "results", "item", "description", "features", "reviews", "attributes", "done"]

BACK, PREVIOUS, NEXT, BUY = "Back to Search", "< Prev", "Next >", "Buy Now"
SUB_PAGES: dict[str, PageKind] = {"Description": "description", "Features": "features", "Reviews": "reviews"}
ATTRIBUTES = "Attributes"
SEPARATOR = " [SEP] "


@dataclass(frozen=True, slots=True)
class Page:
    """All that the site remembers of a visit: equal pages behave alike, whatever way led there."""

    kind: PageKind = "search"
    query: str = ""
    number: int = 1
    """Which page of results, from 1."""
    asin: str = ""
    options: tuple[tuple[str, str], ...] = ()
    """The chosen (list, value) pairs, in the order of the product's lists."""


class Site:
    """Shows the catalogue. Threads share it; nothing in it changes.

    Args:
        catalogue: What is sold.
        show_attributes: Offer the page that lists a product's hidden attributes.
    """

    def __init__(self, catalogue: Catalogue, show_attributes: bool = False) -> None:
        self.catalogue = catalogue
        self._sub_pages = SUB_PAGES | ({ATTRIBUTES: "attributes"} if show_attributes else {})

    def search(self, query: str) -> Page:
        """The first page of results; case and white space do not matter."""
        return Page("results", " ".join(query.lower().split()))

    def links(self, page: Page) -> dict[str, Page]:
        """What can be clicked, as it is written on the page, and where it leads."""
        if page.kind in ("search", "done"):
            return {}
        if page.kind == "results":
            return self._result_links(page)
        if page.kind == "item":
            return self._item_links(page, self.catalogue.find(page.asin))
        return {BACK: Page(), PREVIOUS: replace(page, kind="item")}

    def parts(self, page: Page) -> list[str]:
        """What the page shows below the instruction, piece by piece in reading order."""
        if page.kind == "search":
            return ["Search"]
        if page.kind == "done":
            return ["Thank you for shopping with us!"]
        if page.kind == "results":
            return self._result_parts(page)
        product = self.catalogue.find(page.asin)
        if page.kind == "item":
            return self._item_parts(product)
        return [BACK, PREVIOUS, *_sub_page_parts(page.kind, product)]

    def _result_links(self, page: Page) -> dict[str, Page]:
        found = self.catalogue.search(page.query)
        links = {BACK: Page()}
        if page.number > 1:
            links[PREVIOUS] = replace(page, number=page.number - 1)
        if page.number * RESULTS_PER_PAGE < len(found):
            links[NEXT] = replace(page, number=page.number + 1)
        return links | {asin: replace(page, kind="item", asin=asin) for asin in _window(found, page)}

    def _result_parts(self, page: Page) -> list[str]:
        found = self.catalogue.search(page.query)
        buttons = [label for label in self._result_links(page) if label in (PREVIOUS, NEXT)]
        parts = [BACK, f"Page {page.number} (Total results: {len(found)})", *buttons]
        for asin in _window(found, page):
            product = self.catalogue.find(asin)
            parts += [asin, product.title, product.price_tag]
        return parts

    def _item_links(self, page: Page, product: Product) -> dict[str, Page]:
        links = {BACK: Page(), PREVIOUS: Page("results", page.query, page.number)}
        links |= {label: replace(page, kind=kind) for label, kind in self._sub_pages.items()}
        links[BUY] = replace(page, kind="done")
        taken = {label.lower() for label in links}
        for _, values in product.options:
            links |= {value: _choose(page, product, value) for value in values if value not in taken}
        return links

    def _item_parts(self, product: Product) -> list[str]:
        lists = [part for name, values in product.options for part in (name, *values)]
        facts = [product.title, f"Price: {product.price_tag}", f"Rating: {product.rating}"]
        return [BACK, PREVIOUS, *lists, *facts, *self._sub_pages, BUY]


def _window(found: tuple[str, ...], page: Page) -> tuple[str, ...]:
    return found[(page.number - 1) * RESULTS_PER_PAGE : page.number * RESULTS_PER_PAGE]


def _choose(page: Page, product: Product, value: str) -> Page:
    """The page with the value chosen, in the first list that has it and no choice yet, else in the last that has it."""
    chosen = dict(page.options)
    lists = [name for name, values in product.options if value in values]
    chosen[next((name for name in lists if name not in chosen), lists[-1])] = value
    return replace(page, options=tuple((name, chosen[name]) for name, _ in product.options if name in chosen))


def _sub_page_parts(kind: PageKind, product: Product) -> list[str]:
    if kind == "description":
        return [product.description]
    if kind == "features":
        return list(product.bullets)
    if kind == "attributes":
        return list(product.attributes)
    return [part for review in product.reviews for part in (f'"{review.title}"', review.score, review.body)] or [
        "No reviews found"
    ]
