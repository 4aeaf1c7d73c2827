"""The chat template of the small VLM: the text model's own, extended by content in parts and images among them."""

IMAGE = "<image>"
"""What stands in a prompt for an image, once before a processor expands it and once a feature after."""

_WHOLE = "message['content']"
_PARTS = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ raise_exception('content of type ' + part['type'] + ': allowed are text and image') }}{% endif %}"
    "{% endfor %}{% endif %}"
)


def with_images(template: str) -> str:
    r"""The template with messages whose content is a list of parts; messages of plain text render as they did.

    An image becomes `<image>` and a line's end, as in LLaVA.

    Raises:
        ValueError: The template writes a message's content in another way than ChatML templates do.
    """
    before, found, after = template.partition(f" + {_WHOLE} + ")
    if not found or _WHOLE in before + after:
        raise ValueError(f"expected {_WHOLE!r} once, between other pieces of text, in the template {template!r}")
    return before + " }}" + _PARTS + "{{ " + after
