"""The page's tabs, one a module: what is shown, and what happens when a person does something with it."""
