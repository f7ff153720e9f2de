"""Visual heads: how the language model predicts the next visual embedding. One file each; `registry.py` names them."""
