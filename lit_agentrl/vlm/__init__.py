"""A small vision-language model made from parts that ship in packages, and the stage that teaches it to look."""
