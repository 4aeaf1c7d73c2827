"""A corpus and questions made from facts that ship in Python packages: search agents without a download.

`sources` reads the packages' files, `passages` makes the corpus, `countries` and `elements` find the facts that can be
asked for and where they stand, `questions` chains them, `splits` holds entities out, `command` writes the folder.
"""
