"""The evidence of a run: a receipt for machines, a self-contained page for people.

``receipt`` and ``arena`` are the documents, ``pictures`` and ``plots`` draw, ``page`` writes the HTML.
"""
