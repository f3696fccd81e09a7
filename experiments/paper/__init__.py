"""Tables, figures and claims of paper 1 as running experiments: one script a subject, and `all.py` for the whole page.

Each script has a function `section()`, from which `report` makes what is printed, written and drawn.
"""
