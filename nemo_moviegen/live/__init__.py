"""A run folder as one looks at it: the page that is made while a run goes on, and one screen of text."""
