"""The page's tabs, one per module: their widgets and event handlers."""
